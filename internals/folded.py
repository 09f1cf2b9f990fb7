"""A trained network as the explanation methods see it: evaluation mode, BatchNorm folded, no autograd.

In evaluation mode BatchNorm is one factor and one shift per channel. The factor goes into the
convolution's weights; adding a constant per channel and ReLU both commute with max pooling. So a
block, Conv3d -> BatchNorm3d -> ReLU -> MaxPool3d, becomes

    convolve (no bias)  ->  pool, remembering the winners  ->  relu(. + shift)

and everything after the pool lives on a grid with 1/8 (pool 2) or 1/27 (pool 3) of the voxels.
Backwards, a gradient is masked where relu is shut, put back on the winners, and pulled through
the transposed convolution. Nothing here touches the model: it is read, never changed.

Two things keep this small. A convolution's output is pooled slab by slab and never exists whole. And a
scan is zero outside the head: there every layer's values are one constant per channel, known without
any convolution, and IG and LRP attribute nothing. So blocks work on a box around the head (`Margin`).
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

SLAB = 2**23  # values of a convolution's output that are worked on at once on a CPU, 32 MiB in float32

Box = tuple[slice, ...]  # of a grid, one slice for each axis


class Trace(NamedTuple):
    """What the way back through one block needs to know about the way forth."""

    outputs: Tensor  # (B, n, x, y, z): relu is open where they are > 0
    winners: Tensor  # (B, n, x, y, z) int64: flat index of each window's maximum, before the pool
    grid: torch.Size  # (X, Y, Z) of the convolution's output


@dataclass(frozen=True)
class Block:
    """One block; `weight` (n, C, k, k, k) holds BatchNorm's factor, `shift` (n,) all constants."""

    weight: Tensor
    shift: Tensor
    window: int

    @classmethod
    def fold(cls, layers: "BlockLayers") -> "Block":
        """Fold evaluation-mode BatchNorm into the convolution before it."""
        conv, norm, _, pool = layers
        factor = norm_factor(norm)  # (n,)
        shift = norm.bias + (cast(Tensor, conv.bias) - cast(Tensor, norm.running_mean)) * factor
        return cls(conv.weight * factor.view(-1, 1, 1, 1, 1), shift, cast(int, pool.kernel_size))

    def convolve(self, inputs: Tensor) -> Tensor:
        """Linear part of the block: (B, C, X, Y, Z) -> (B, n, X-k+1, Y-k+1, Z-k+1)."""
        return convolve(inputs, self.weight)

    def pool(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Maxima over the windows and where they are, flat in (X, Y, Z): two (B, n, x, y, z)."""
        return F.max_pool3d(values, self.window, return_indices=True)

    def activate(self, pooled: Tensor, factor: Tensor | None = None) -> Tensor:
        """relu(factor * pooled + shift), on the pooled grid."""
        shift = self.shift.view(-1, 1, 1, 1)
        return (pooled + shift if factor is None else torch.addcmul(shift, pooled, factor)).relu_()

    def grid(self, before: torch.Size) -> torch.Size:
        """(X, Y, Z) of the convolution's output, from that of its inputs."""
        return torch.Size(edge - self.weight.shape[2] + 1 for edge in before)

    def part(self, box: Box, grid: torch.Size) -> tuple[Box, Box]:
        """What to read of the inputs, and what it makes of the pooled outputs.

        Args:
            box: outside of it the inputs are one constant per channel.
            grid: (X, Y, Z) of the inputs.

        Returns:
            The box of all outputs that see a voxel of `box`, last, and of all inputs those see, first.
        """
        kernel, window = self.weight.shape[2], self.window
        reads, makes = [], []
        for around, edge in zip(box, self.grid(grid), strict=True):
            count = edge // window
            begin = max(min((around.start - kernel + 1) // window, count - 1), 0)
            end = max(min(-(-around.stop // window), count), begin + 1)
            makes.append(slice(begin, end))
            # at the end of the axis, the voxels that fill no window belong to the box too
            reads.append(
                slice(begin * window, end * window + kernel - 1 if end < count else edge + kernel - 1)
            )
        return tuple(reads), tuple(makes)

    def convolve_and_pool(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """pool(convolve(inputs)), slab by slab: two (B, n, x, y, z)."""
        filters = len(inputs) * len(self.weight)
        pooled, winners = in_slabs(
            lambda rows: self.pool(self.convolve(with_halo(inputs, rows, self.weight))),
            self.grid(inputs.shape[2:]), self.window, filters, inputs.device,
        )  # fmt: skip
        return pooled, winners

    def forward(self, inputs: Tensor) -> tuple[Tensor, Trace]:
        """The whole block: (B, C, X, Y, Z) -> (B, n, x, y, z), with the trace for the way back."""
        pooled, winners = self.convolve_and_pool(inputs)
        outputs = self.activate(pooled)
        return outputs, Trace(outputs, winners, self.grid(inputs.shape[2:]))

    def backward(self, gradient: Tensor, trace: Trace, guided: bool = False) -> Tensor:
        """Gradient of the outputs (B, n, x, y, z) -> gradient of the inputs (B, C, X, Y, Z)."""
        gradient = through_relu(gradient, trace.outputs, guided)
        return unpool_and_pull(gradient, trace.winners, trace.grid, self.weight, self.window)


@dataclass(frozen=True)
class Margin:
    """What surrounds the part of a block's output that was worked on, up to what is read next."""

    inside: Box  # where the part lies in
    shape: tuple[int, ...]  # (x, y, z), what the next block reads
    background: Tensor  # (n,), the value of each channel everywhere else

    def pad(self, values: Tensor) -> Tensor:
        """Surround values (B, n, ...) by the background: (B, n, *shape)."""
        shape = (*values.shape[:2], *self.shape)
        full = _empty(shape, values)
        full.copy_(self.background.view(-1, 1, 1, 1))
        full[:, :, *self.inside] = values
        return full

    def crop(self, gradient: Tensor) -> Tensor:
        """The gradient (B, n, *shape) inside."""
        return gradient[:, :, *self.inside]


class Network:
    """All blocks and the two linear layers of a `CNN3d`, as plain tensors.

    With a `box` around all that is not zero in the scans, `head` is what the first block has to read
    of them, and `margins` what surrounds each block's output.
    """

    def __init__(self, model: "CNN3d", grid: torch.Size, box: Box | None = None) -> None:
        self.blocks = [Block.fold(layers) for layers in model.blocks()]
        self.hidden, self.output = model.linears()
        box, parts = box or whole(grid), []
        for block in self.blocks:
            reads, box = block.part(box, grid)
            parts.append((reads, box))
            grid = torch.Size(edge // block.window for edge in block.grid(grid))
        self.head = parts[0][0]
        background, self.margins = self.blocks[0].weight.new_zeros(1), []
        following = [*(reads for reads, _ in parts[1:]), whole(grid)]
        for block, (_, inner), outer in zip(self.blocks, parts, following, strict=True):
            background = F.relu(block.weight.sum((2, 3, 4)) @ background + block.shift)  # (n,)
            inside = (slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))
            shape = tuple(o.stop - o.start for o in outer)
            self.margins.append(Margin(tuple(inside), shape, background))

    def classify(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the last block (B, n, x, y, z) -> logits (B, 2), and the hidden units' (B, 64)."""
        hidden = F.relu(self.hidden(features.flatten(1)))  # (B, 64)
        return self.output(hidden), hidden

    def declassify(self, target: Tensor, hidden: Tensor, shape: torch.Size, guided: bool = False) -> Tensor:
        """Gradient of each scan's target logit at the output of the last block, of the given shape."""
        gradient = through_relu(self.output.weight[target], hidden, guided)  # (B, 64)
        return to_memory_format((gradient @ self.hidden.weight).view(shape))

    def gradient(self, features: Tensor, target: Tensor) -> Tensor:
        """Gradient of the target logit at the first block's output.

        Args:
            features: (B, n, x, y, z), the first block's output, without its margin.
            target: int64 (B,), the logit of each scan.

        Returns:
            Like features.
        """
        traces = []
        for block, margin in zip(self.blocks[1:], self.margins, strict=False):
            features, trace = block.forward(margin.pad(features))
            traces.append(trace)
        features = self.margins[-1].pad(features)
        _, hidden = self.classify(features)
        gradient = self.declassify(target, hidden, features.shape)
        gradient = self.margins[-1].crop(gradient)
        for block, margin, trace in zip(
            self.blocks[:0:-1], self.margins[-2::-1], reversed(traces), strict=True
        ):
            gradient = margin.crop(block.backward(gradient, trace))
        return gradient


def support(*volumes: Tensor) -> Box:
    """The smallest box around all that is not zero in any scan of (B, 1, X, Y, Z); all of a blank one."""
    there = torch.stack([(volume != 0).any(0)[0] for volume in volumes]).any(0)
    if not there.any():
        return whole(there.shape)
    lines = (there.any(2).any(1), there.any(2).any(0), there.any(1).any(0))
    found = (line.nonzero() for line in lines)
    return tuple(slice(int(places[0]), int(places[-1]) + 1) for places in found)


def whole(grid: torch.Size) -> Box:
    """The box that a grid fills."""
    return tuple(slice(0, edge) for edge in grid)


def norm_factor(norm: nn.BatchNorm3d) -> Tensor:
    """What evaluation-mode BatchNorm multiplies each channel with, (n,)."""
    return norm.weight * torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)


def through_relu(gradient: Tensor, outputs: Tensor, guided: bool = False) -> Tensor:
    """Gradient before a ReLU; `guided` also drops what is negative (Springenberg et al. 2015)."""
    gradient = torch.ops.aten.threshold_backward(gradient, outputs, 0)  # zero where the outputs are
    return gradient.relu_() if guided else gradient


def in_slabs(
    work: Callable[[slice], tuple[Tensor, ...]],
    grid: torch.Size,
    window: int,
    filters: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Pool slab by slab, so that what is pooled never exists whole.

    Args:
        work: from the rows of a slab, whole windows along the first axis of the grid before the pool, to
            any number of (B, n, x, y, z), the last of them the winners within the slab.
        grid: (X, Y, Z) before the pool.
        window: edge of the pool's windows.
        filters: values at every voxel, B * n.
        device: where they are.

    Returns:
        What `work` returns, of the whole grid.
    """
    plane, height = prod(grid[1:]), grid[0] // window
    results: list[Tensor] = []
    for rows in slabs(height * window, window, filters * plane, device):
        *values, winners = work(rows)
        parts = [*values, winners.add_(rows.start * plane)]
        if not results:
            shape = (*winners.shape[:2], height, *winners.shape[3:])
            results = [_empty(shape, part) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result[:, :, rows.start // window : rows.stop // window] = part
    return tuple(results)


def with_halo(inputs: Tensor, rows: slice, weight: Tensor) -> Tensor:
    """The rows of the inputs (B, C, X, Y, Z) that some rows of their convolution are made of."""
    return inputs[:, :, rows.start : rows.stop + weight.shape[2] - 1]


def slabs(rows: int, window: int, size: int, device: torch.device) -> Iterator[slice]:
    """The rows of each slab: whole windows, as many as suit a device where a row has `size` values."""
    step = max(1, values_at_once(device, SLAB) // (size * window)) * window
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def unpool_and_pull(values: Tensor, winners: Tensor, grid: torch.Size, weight: Tensor, window: int) -> Tensor:
    """Put pooled values back on their winners and pull them through the transposed convolution.

    Args:
        values: (B, n, x, y, z).
        winners: int64 (B, n, x, y, z), flat indices into `grid`.
        grid: (X', Y', Z') of the convolution's output.
        weight: (n, C, k, k, k).
        window: edge of the pool's windows.

    Returns:
        (B, C, X, Y, Z), X = X' + k - 1; a scan (C = 1) is worked on in slabs.
    """
    if weight.shape[1] > 1:
        return pull(unpool(values, winners, grid), weight)
    kernel, plane, rows = weight.shape[2], prod(grid[1:]), values.shape[2] * window
    result = values.new_zeros(len(values), 1, *(edge + kernel - 1 for edge in grid))
    for slab in slabs(rows, window, len(values) * len(weight) * plane, values.device):
        part = slice(slab.start // window, slab.stop // window)
        shape = torch.Size((slab.stop - slab.start, *grid[1:]))
        full = unpool(values[:, :, part], winners[:, :, part] - slab.start * plane, shape)
        result[:, :, slab.start : slab.stop + kernel - 1] += pull(full, weight)
    return result


def unpool(values: Tensor, winners: Tensor, grid: torch.Size) -> Tensor:
    """Put pooled values (B, n, x, y, z) back on their winners, zeros elsewhere: (B, n, X, Y, Z)."""
    shape = (*values.shape[:2], *grid)
    full = _empty(shape, values).zero_()
    full.flatten(2).scatter_(2, winners.flatten(2), values.flatten(2))  # flatten(2) of `full` is a view
    return full


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for values (B, n, x, y, z), of the type, on the device and in the layout of others."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like.device))


def at_winners(values: Tensor, winners: Tensor) -> Tensor:
    """The values (B, n, X, Y, Z) at the winners (B, n, x, y, z)."""
    flat, where = values.flatten(2).transpose(1, 2), winners.flatten(2).transpose(1, 2)  # (B, V, n)
    return flat.gather(1, where).transpose(1, 2).unflatten(2, winners.shape[2:])


def convolve(inputs: Tensor, weight: Tensor, padding: Sequence[int] = (0, 0, 0)) -> Tensor:
    """Convolution (B, C, X, Y, Z) by (n, C, k, k, k).

    On a CPU PyTorch takes a slower routine than oneDNN's where a float32 grid is small.
    """
    inputs = to_memory_format(inputs)
    if inputs.device.type == "cpu" and inputs.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(inputs, weight, None, padding, (1, 1, 1), (1, 1, 1), 1)
    return F.conv3d(inputs, weight, padding=padding)


def pull(gradient: Tensor, weight: Tensor) -> Tensor:
    """Transposed convolution: (B, n, X', Y', Z') by (n, C, k, k, k) -> (B, C, X, Y, Z), X = X' + k - 1.

    It is a convolution with the mirrored kernel, and faster so on a CPU. A single input channel (the scan)
    is a case that a CPU's library handles badly. There, the taps along the first axis become k output
    channels, which are then shifted and added.
    """
    if gradient.device.type == "cuda":
        return F.conv_transpose3d(gradient, weight)
    kernel = weight.shape[2]
    if weight.shape[1] > 1:
        return convolve(gradient, weight.flip(2, 3, 4).transpose(0, 1), [kernel - 1] * 3)
    taps = weight.transpose(0, 2).transpose(1, 2).flip(3, 4)  # (k, n, 1, k, k)
    planes = convolve(gradient, taps, (0, kernel - 1, kernel - 1))  # (B, k, X', Y, Z)
    length = gradient.shape[2]
    result = planes.new_zeros(len(planes), 1, length + kernel - 1, *planes.shape[3:])
    for tap in range(kernel):
        result[:, 0, tap : tap + length] += planes[:, tap]
    return result
