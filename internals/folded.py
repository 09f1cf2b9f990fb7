"""A trained network as the explanation methods see it: evaluation mode, BatchNorm folded, no autograd.

In evaluation mode BatchNorm is one scale and one shift per channel. The scale goes into the
convolution's weights; adding a constant per channel and ReLU both commute with max pooling. So a
block, Conv3d -> BatchNorm3d -> ReLU -> MaxPool3d, becomes

    convolve (no bias)  ->  max pool with indices  ->  relu(. + shift)

and everything after the pool lives on a grid with 1/8 (pool 2) or 1/27 (pool 3) of the voxels.
Backwards, a gradient is masked where the ReLU is zero, put back at the maxima (max unpooling), and
goes through the transposed convolution. The model is read, never changed.

Two things keep the memory small. A convolution's output is pooled slab by slab and never exists as a
whole. And a scan is zero outside the head: there every layer's values are one constant per channel,
known without any convolution, and IG and LRP attribute nothing. So blocks work on a box around the
head, and `BackgroundPadding` supplies what surrounds it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internals.devices import memory_format, to_memory_format, values_at_once

if TYPE_CHECKING:
    from models import BlockLayers, CNN3d

SLAB = 2**23  # values of a convolution's output that are computed at once on a CPU, 32 MiB in float32

Box = tuple[slice, ...]  # one slice for each axis of a grid


# The network -------------------------------------------------------------------------------------


class ForwardCache(NamedTuple):
    """What the backward pass of a block needs from its forward pass."""

    outputs: Tensor  # (B, n, x, y, z): the ReLU passes a gradient where they are > 0
    max_indices: Tensor  # (B, n, x, y, z) int64: flat index of each window's maximum, before the pool
    conv_shape: torch.Size  # (X, Y, Z) of the convolution's output


@dataclass(frozen=True)
class FoldedBlock:
    """One block; `weight` (n, C, k, k, k) includes BatchNorm's scale, `shift` (n,) every constant."""

    weight: Tensor
    shift: Tensor
    window: int  # edge of the pool's windows

    @classmethod
    def fold(cls, layers: "BlockLayers") -> "FoldedBlock":
        """Fold evaluation-mode BatchNorm into the convolution before it."""
        conv, norm, _, pool = layers
        scale = batchnorm_scale(norm)  # (n,)
        shift = norm.bias + (cast(Tensor, conv.bias) - cast(Tensor, norm.running_mean)) * scale
        return cls(conv.weight * scale.view(-1, 1, 1, 1, 1), shift, cast(int, pool.kernel_size))

    def conv_shape(self, input_shape: torch.Size) -> torch.Size:
        """(X, Y, Z) of the convolution's output, from that of its inputs."""
        return torch.Size(edge - self.weight.shape[2] + 1 for edge in input_shape)

    def pool(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Maxima of the windows and their flat indices in (X, Y, Z): two (B, n, x, y, z)."""
        return F.max_pool3d(values, self.window, return_indices=True)

    def activate(self, pooled: Tensor, alpha: Tensor | None = None) -> Tensor:
        """relu(alpha * pooled + shift), alpha 1 by default; (B, n, x, y, z)."""
        shift = self.shift.view(-1, 1, 1, 1)
        return (pooled + shift if alpha is None else torch.addcmul(shift, pooled, alpha)).relu_()

    def convolve_and_pool(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """`pool` of the convolution of (B, C, X, Y, Z), slab by slab: two (B, n, x, y, z)."""
        pooled, max_indices = pool_in_slabs(
            lambda rows: self.pool(convolve(with_halo(inputs, rows, self.weight), self.weight)),
            self.conv_shape(inputs.shape[2:]), self.window, len(inputs) * len(self.weight), inputs.device,
        )  # fmt: skip
        return pooled, max_indices

    def forward(self, inputs: Tensor) -> tuple[Tensor, ForwardCache]:
        """The block's outputs, (B, C, X, Y, Z) -> (B, n, x, y, z), and the cache for `backward`."""
        pooled, max_indices = self.convolve_and_pool(inputs)
        outputs = self.activate(pooled)
        return outputs, ForwardCache(outputs, max_indices, self.conv_shape(inputs.shape[2:]))

    def backward(self, gradient: Tensor, cache: ForwardCache, guided: bool = False) -> Tensor:
        """Gradient of the outputs (B, n, x, y, z) -> gradient of the inputs (B, C, X, Y, Z)."""
        gradient = relu_backward(gradient, cache.outputs, guided)
        return unpool_and_transpose(gradient, cache.max_indices, cache.conv_shape, self.weight, self.window)

    def propagate_box(self, box: Box, input_shape: torch.Size) -> tuple[Box, Box]:
        """The part of the block that a box of its inputs matters to.

        Args:
            box: outside of it the inputs are one constant per channel.
            input_shape: (X, Y, Z) of the inputs.

        Returns:
            The box of all inputs to read, and the box of the pooled outputs that they make. The outputs are
            those that see a voxel of `box`; the inputs are what these outputs see.
        """
        inputs, outputs = zip(*map(self.propagate_axis, box, input_shape), strict=True)
        return inputs, outputs

    def propagate_axis(self, axis: slice, edge: int) -> tuple[slice, slice]:
        """`propagate_box` along one axis, whose inputs have `edge` voxels."""
        kernel, count = self.weight.shape[2], (edge - self.weight.shape[2] + 1) // self.window
        begin = max(min((axis.start - kernel + 1) // self.window, count - 1), 0)
        end = max(min(-(-axis.stop // self.window), count), begin + 1)
        field = self.receptive_field(slice(begin, end))
        # at the end of the axis, the voxels that fill no window belong to the box too
        return field if end < count else slice(field.start, edge), slice(begin, end)

    def receptive_field(self, outputs: slice) -> slice:
        """The inputs that some pooled outputs see, along one axis."""
        return slice(outputs.start * self.window, outputs.stop * self.window + self.weight.shape[2] - 1)


@dataclass(frozen=True)
class BackgroundPadding:
    """Extends a block's output, computed on a box, to all that the next block reads."""

    inside: Box  # the part that was computed
    shape: tuple[int, ...]  # (x, y, z), what the next block reads
    background: Tensor  # (n,), the value of each channel everywhere else

    def pad(self, values: Tensor) -> Tensor:
        """Surround values (B, n, ...) by the background: (B, n, *shape)."""
        full = _empty((*values.shape[:2], *self.shape), values)
        full.copy_(self.background.view(-1, 1, 1, 1))
        full[:, :, *self.inside] = values
        return full

    def crop(self, gradient: Tensor) -> Tensor:
        """The part of a gradient (B, n, *shape) that belongs to what was computed."""
        return gradient[:, :, *self.inside]


class FoldedNetwork:
    """All blocks and the two linear layers of a `CNN3d`, as plain tensors.

    Args:
        model: the network.
        input_shape: (X, Y, Z) of the scans.
        box: outside of it the scans are zero; None: they may be non-zero everywhere.

    Attributes:
        input_box: what the first block has to read of the scans.
        paddings: what surrounds each block's output.
    """

    def __init__(self, model: "CNN3d", input_shape: torch.Size, box: Box | None = None) -> None:
        self.blocks = [FoldedBlock.fold(layers) for layers in model.blocks()]
        self.hidden, self.output = model.linears()
        box, shape = box or full_box(input_shape), input_shape
        inputs, outputs = [], []
        for block in self.blocks:
            read, box = block.propagate_box(box, shape)
            inputs.append(read)
            outputs.append(box)
            shape = torch.Size(edge // block.window for edge in block.conv_shape(shape))
        self.input_box = inputs[0]
        background, self.paddings = self.blocks[0].weight.new_zeros(1), []
        for block, made, read in zip(self.blocks, outputs, [*inputs[1:], full_box(shape)], strict=True):
            background = F.relu(block.weight.sum((2, 3, 4)) @ background + block.shift)  # (n,)
            inside = (slice(m.start - r.start, m.stop - r.start) for m, r in zip(made, read, strict=True))
            edges = tuple(axis.stop - axis.start for axis in read)
            self.paddings.append(BackgroundPadding(tuple(inside), edges, background))

    def classify(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the last block (B, n, x, y, z) -> logits (B, 2), and the hidden units' (B, 64)."""
        hidden = F.relu(self.hidden(features.flatten(1)))  # (B, 64)
        return self.output(hidden), hidden

    def logits(self, head: Tensor) -> Tensor:
        """Logits (B, 2) of scans of which `head` (B, 1, X, Y, Z) is what lies in `input_box`."""
        values = head
        for block, padding in zip(self.blocks, self.paddings, strict=True):
            values = padding.pad(block.activate(block.convolve_and_pool(values)[0]))
        return self.classify(values)[0]

    def classifier_gradient(
        self, target: Tensor, hidden: Tensor, shape: torch.Size, guided: bool = False
    ) -> Tensor:
        """Gradient of each scan's target logit at the output of the last block, of the given shape."""
        gradient = relu_backward(self.output.weight[target], hidden, guided)  # (B, 64)
        return to_memory_format((gradient @ self.hidden.weight).view(shape))

    def gradient(self, features: Tensor, target: Tensor) -> Tensor:
        """Gradient of the target logit at the first block's output.

        Args:
            features: (B, n, x, y, z), the first block's output, without its padding.
            target: int64 (B,), the logit of each scan.

        Returns:
            Like features.
        """
        caches = []
        for block, padding in zip(self.blocks[1:], self.paddings, strict=False):
            features, cache = block.forward(padding.pad(features))
            caches.append(cache)
        features = self.paddings[-1].pad(features)
        _, hidden = self.classify(features)
        gradient = self.paddings[-1].crop(self.classifier_gradient(target, hidden, features.shape))
        behind_first = zip(self.blocks[:0:-1], self.paddings[-2::-1], reversed(caches), strict=True)
        for block, padding, cache in behind_first:
            gradient = padding.crop(block.backward(gradient, cache))
        return gradient

    def pooled_gradient(self, features: Tensor, target: Tensor) -> Tensor:
        """The same before the first ReLU: at the maxima of the first pool's windows."""
        return relu_backward(self.gradient(features, target), features)

    def input_gradient(self, volume: Tensor, target: Tensor) -> Tensor:
        """Gradient of the target logit at the scan, like `volume`, which is what lies in `input_box`."""
        features, cache = self.blocks[0].forward(volume)
        return self.blocks[0].backward(self.gradient(features, target), cache)


# Boxes -------------------------------------------------------------------------------------------


def bounding_box(*volumes: Tensor) -> Box:
    """The smallest box around all that is not zero in any scan of (B, 1, X, Y, Z).

    Where all is zero, it is the full box.
    """
    occupied = torch.stack([(volume != 0).any(0)[0] for volume in volumes]).any(0)
    if not occupied.any():
        return full_box(occupied.shape)
    lines = (occupied.any(2).any(1), occupied.any(2).any(0), occupied.any(1).any(0))
    found = (line.nonzero() for line in lines)
    return tuple(slice(int(places[0]), int(places[-1]) + 1) for places in found)


def full_box(shape: torch.Size) -> Box:
    """The box that covers a whole grid."""
    return tuple(slice(0, edge) for edge in shape)


# Slabs -------------------------------------------------------------------------------------------


def pool_in_slabs(
    work: Callable[[slice], tuple[Tensor, ...]],
    shape: torch.Size,
    window: int,
    channels: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Compute and pool a grid slab by slab, so that what is pooled never exists as a whole.

    Args:
        work: from the rows of a slab, whole windows along the first axis of the grid before the pool, to
            any number of (B, n, x, y, z), the last of them the maxima's indices within the slab.
        shape: (X, Y, Z) before the pool.
        window: edge of the pool's windows.
        channels: values at every voxel, B * n.
        device: where they are.

    Returns:
        What `work` returns, for the whole grid.
    """
    plane, height = prod(shape[1:]), shape[0] // window
    results: list[Tensor] = []
    for rows in slabs(height * window, window, channels * plane, device):
        *values, max_indices = work(rows)
        parts = [*values, max_indices.add_(rows.start * plane)]
        if not results:
            full = (*max_indices.shape[:2], height, *max_indices.shape[3:])
            results = [_empty(full, part) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result[:, :, rows.start // window : rows.stop // window] = part
    return tuple(results)


def slabs(rows: int, window: int, row_size: int, device: torch.device) -> Iterator[slice]:
    """The rows of each slab: whole windows, as many as suit a device where a row has `row_size` values."""
    step = max(1, values_at_once(device, SLAB) // (row_size * window)) * window
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def with_halo(inputs: Tensor, rows: slice, weight: Tensor) -> Tensor:
    """The rows of the inputs (B, C, X, Y, Z) that the given rows of their convolution depend on."""
    return inputs[:, :, rows.start : rows.stop + weight.shape[2] - 1]


# Layers, forwards and backwards ------------------------------------------------------------------


def batchnorm_scale(norm: nn.BatchNorm3d) -> Tensor:
    """What evaluation-mode BatchNorm multiplies each channel with, (n,)."""
    return norm.weight * torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)


def relu_backward(gradient: Tensor, outputs: Tensor, guided: bool = False) -> Tensor:
    """Gradient before a ReLU; `guided` also drops what is negative (Springenberg et al. 2015)."""
    gradient = torch.ops.aten.threshold_backward(gradient, outputs, 0)  # zero where the outputs are
    return gradient.relu_() if guided else gradient


def convolve(inputs: Tensor, weight: Tensor, padding: Sequence[int] = (0, 0, 0)) -> Tensor:
    """Convolution (B, C, X, Y, Z) by (n, C, k, k, k).

    On a CPU PyTorch takes a slower routine than oneDNN's where a float32 grid is small.
    """
    inputs = to_memory_format(inputs)
    if inputs.device.type == "cpu" and inputs.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(inputs, weight, None, padding, (1, 1, 1), (1, 1, 1), 1)
    return F.conv3d(inputs, weight, padding=padding)


def transposed_convolution(gradient: Tensor, weight: Tensor) -> Tensor:
    """(B, n, X', Y', Z') by (n, C, k, k, k) -> (B, C, X, Y, Z), X = X' + k - 1.

    It is a convolution with the mirrored kernel, and faster so on a CPU. A single input channel (the scan)
    is a case that oneDNN and cuDNN handle badly. There, the taps along the first axis become k output
    channels, which are then shifted and added.
    """
    kernel = weight.shape[2]
    if weight.shape[1] > 1:
        if gradient.device.type == "cuda":
            return F.conv_transpose3d(gradient, weight)
        return convolve(gradient, weight.flip(2, 3, 4).transpose(0, 1), [kernel - 1] * 3)
    taps = weight.transpose(0, 2).transpose(1, 2).flip(3, 4)  # (k, n, 1, k, k)
    planes = convolve(gradient, taps, (0, kernel - 1, kernel - 1))  # (B, k, X', Y, Z)
    length = gradient.shape[2]
    result = planes.new_zeros(len(planes), 1, length + kernel - 1, *planes.shape[3:])
    for tap in range(kernel):
        result[:, 0, tap : tap + length] += planes[:, tap]
    return result


def max_unpool(values: Tensor, max_indices: Tensor, shape: torch.Size) -> Tensor:
    """Put pooled values (B, n, x, y, z) back at the maxima, zeros elsewhere: (B, n, X, Y, Z)."""
    full = _empty((*values.shape[:2], *shape), values).zero_()
    full.flatten(2).scatter_(2, max_indices.flatten(2), values.flatten(2))  # flatten(2) of `full` is a view
    return full


def add_at_maxima(total: Tensor, values: Tensor, max_indices: Tensor) -> None:
    """Add pooled values (B, n, x, y, z) at their maxima to a grid before the pool, (B, n, X, Y, Z)."""
    total.flatten(2).scatter_add_(2, max_indices.flatten(2), values.flatten(2))


def gather_at_maxima(values: Tensor, max_indices: Tensor) -> Tensor:
    """The values (B, n, X, Y, Z) at the indices (B, n, x, y, z) of a pool's maxima."""
    flat, where = values.flatten(2).transpose(1, 2), max_indices.flatten(2).transpose(1, 2)  # (B, V, n)
    return flat.gather(1, where).transpose(1, 2).unflatten(2, max_indices.shape[2:])


def unpool_and_transpose(
    values: Tensor, max_indices: Tensor, conv_shape: torch.Size, weight: Tensor, window: int
) -> Tensor:
    """`max_unpool`, then `transposed_convolution`.

    Args:
        values: (B, n, x, y, z).
        max_indices: int64 (B, n, x, y, z), flat indices into `conv_shape`.
        conv_shape: (X', Y', Z') of the convolution's output.
        weight: (n, C, k, k, k).
        window: edge of the pool's windows.

    Returns:
        (B, C, X, Y, Z), X = X' + k - 1; a scan (C = 1) is computed in slabs.
    """
    if weight.shape[1] > 1:
        return transposed_convolution(max_unpool(values, max_indices, conv_shape), weight)
    kernel, plane, rows = weight.shape[2], prod(conv_shape[1:]), values.shape[2] * window
    result = values.new_zeros(len(values), 1, *(edge + kernel - 1 for edge in conv_shape))
    for slab in slabs(rows, window, len(values) * len(weight) * plane, values.device):
        part = slice(slab.start // window, slab.stop // window)
        shape = torch.Size((slab.stop - slab.start, *conv_shape[1:]))
        full = max_unpool(values[:, :, part], max_indices[:, :, part] - slab.start * plane, shape)
        result[:, :, slab.start : slab.stop + kernel - 1] += transposed_convolution(full, weight)
    return result


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for values (B, n, x, y, z), of another tensor's type, on its device, in that one's format."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like.device))
