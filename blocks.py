"""A trained network as the explanation methods see it: evaluation mode, BatchNorm folded, no autograd.

In evaluation mode BatchNorm is one factor and one shift per channel. The factor goes into the
convolution's weights; adding a constant per channel and ReLU both commute with max pooling. So a
block, Conv3d -> BatchNorm3d -> ReLU -> MaxPool3d, becomes

    convolve (no bias)  ->  pool, remembering the winners  ->  relu(. + shift)

and everything after the pool lives on a grid with 1/8 (pool 2) or 1/27 (pool 3) of the voxels.
Backwards, a gradient is masked where relu is shut, put back on the winners, and pulled through
the transposed convolution. Nothing here touches the model: it is read, never changed.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import CLASSES, BlockLayers, CNN3d

LAYOUT = torch.channels_last_3d  # the channels of a voxel side by side: the faster one for convolutions


class Trace(NamedTuple):
    """What the way back through one block needs to know about the way forth."""

    active: Tensor  # (B, n, x, y, z) bool: where relu is open, on the pooled grid
    winners: Tensor  # (B, n, x, y, z) int64: flat index of each window's maximum, before the pool
    grid: torch.Size  # (X, Y, Z) of the convolution's output


@dataclass(frozen=True)
class Block:
    """One block; `weight` (n, C, k, k, k) holds BatchNorm's factor, `shift` (n,) all constants."""

    weight: Tensor
    shift: Tensor
    window: int

    @classmethod
    def fold(cls, layers: BlockLayers) -> "Block":
        """Fold evaluation-mode BatchNorm into the convolution before it."""
        conv, norm, _, pool = layers
        factor = norm_factor(norm)  # (n,)
        shift = norm.bias + (cast(Tensor, conv.bias) - cast(Tensor, norm.running_mean)) * factor
        return cls(conv.weight * factor.view(-1, 1, 1, 1, 1), shift, cast(int, pool.kernel_size))

    def convolve(self, inputs: Tensor) -> Tensor:
        """Linear part of the block: (B, C, X, Y, Z) -> (B, n, X-k+1, Y-k+1, Z-k+1)."""
        return F.conv3d(inputs.contiguous(memory_format=LAYOUT), self.weight)

    def pool(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Maxima over the windows and where they are: two (B, n, x, y, z), values and flat indices."""
        return F.max_pool3d(values, self.window, return_indices=True)

    def activate(self, pooled: Tensor) -> Tensor:
        """relu(pooled + shift), on the pooled grid."""
        return F.relu(pooled + self.shift.view(-1, 1, 1, 1))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Trace]:
        """The whole block: (B, C, X, Y, Z) -> (B, n, x, y, z), with the trace for the way back."""
        values = self.convolve(inputs)
        pooled, winners = self.pool(values)
        outputs = self.activate(pooled)
        return outputs, Trace(outputs > 0, winners, values.shape[2:])

    def backward(self, gradient: Tensor, trace: Trace, guided: bool = False) -> Tensor:
        """Gradient of the outputs (B, n, x, y, z) -> gradient of the inputs (B, C, X, Y, Z)."""
        gradient = through_relu(gradient, trace.active, guided)
        return pull(unpool(gradient, trace.winners, trace.grid), self.weight)


class Network:
    """All blocks and the two linear layers of a `CNN3d`, as plain tensors."""

    def __init__(self, model: CNN3d) -> None:
        self.blocks = [Block.fold(layers) for layers in model.blocks()]
        self.hidden, self.output = model.linears()

    def classify(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the last block (B, n, x, y, z) -> logits (B, 2), and where the hidden relu is open."""
        hidden = F.relu(self.hidden(features.flatten(1)))  # (B, 64)
        return self.output(hidden), hidden > 0

    def declassify(self, target: Tensor, active: Tensor, shape: torch.Size, guided: bool = False) -> Tensor:
        """Gradient of each scan's target logit at the output of the last block, of the given shape."""
        gradient = through_relu(self.output.weight[target], active, guided)  # (B, 64)
        return (gradient @ self.hidden.weight).view(shape)

    def gradient(self, features: Tensor, target: Tensor, first: int = 1) -> Tensor:
        """Gradient of the target logit at the inputs of block number `first`.

        Args:
            features: (B, C, X, Y, Z), the inputs of that block.
            target: int64 (B,), the logit of each scan.

        Returns:
            (B, C, X, Y, Z), same dtype as features.
        """
        traces = []
        for block in self.blocks[first:]:
            features, trace = block.forward(features)
            traces.append(trace)
        _, active = self.classify(features)
        gradient = self.declassify(target, active, features.shape)
        for block, trace in zip(reversed(self.blocks[first:]), reversed(traces), strict=True):
            gradient = block.backward(gradient, trace)
        return gradient


def norm_factor(norm: nn.BatchNorm3d) -> Tensor:
    """What evaluation-mode BatchNorm multiplies each channel with, (n,)."""
    return norm.weight * torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)


def through_relu(gradient: Tensor, active: Tensor, guided: bool = False) -> Tensor:
    """Gradient before a ReLU; `guided` also drops what is negative (Springenberg et al. 2015)."""
    gradient = gradient * active
    return F.relu(gradient) if guided else gradient


def unpool(values: Tensor, winners: Tensor, grid: torch.Size) -> Tensor:
    """Put pooled values (B, n, x, y, z) back on their winners, zeros elsewhere: (B, n, X, Y, Z)."""
    layout = LAYOUT if values.is_contiguous(memory_format=LAYOUT) else torch.contiguous_format
    full = values.new_empty(*values.shape[:2], *grid).to(memory_format=layout).zero_()
    full.flatten(2).scatter_(2, winners.flatten(2), values.flatten(2))  # flatten(2) is a view in both layouts
    return full


def pull(gradient: Tensor, weight: Tensor) -> Tensor:
    """Transposed convolution: (B, n, X', Y', Z') by (n, C, k, k, k) -> (B, C, X, Y, Z), X = X' + k - 1.

    A single input channel (the scan) is a case that CPU and GPU libraries handle badly. There, the
    taps along the first axis become k output channels, which are then shifted and added.
    """
    if weight.shape[1] > 1:
        return F.conv_transpose3d(gradient, weight)
    kernel = weight.shape[2]
    planes = F.conv_transpose3d(gradient, weight.transpose(1, 2))  # (B, k, X', Y, Z)
    length = gradient.shape[2]
    result = planes.new_zeros(len(planes), 1, length + kernel - 1, *planes.shape[3:])
    for tap in range(kernel):
        result[:, 0, tap : tap + length] += planes[:, tap]
    return result


def check_arguments(model: nn.Module, volume: Tensor, target: Tensor) -> None:
    """Raise ValueError unless the arguments of an explanation method fit together."""
    if not isinstance(model, CNN3d):
        raise ValueError(f"expected a CNN3d, got {type(model).__name__}")
    if volume.ndim != 5 or volume.shape[1] != 1 or not volume.is_floating_point():
        raise ValueError(f"volume: expected floats (B, 1, X, Y, Z), got {volume.dtype} {tuple(volume.shape)}")
    if target.dtype != torch.int64 or target.shape != volume.shape[:1]:
        raise ValueError(f"target: expected int64 ({len(volume)},), got {target.dtype} {tuple(target.shape)}")
    if ((target < 0) | (target >= CLASSES)).any():
        raise ValueError(f"target: expected 0 or 1, got {target.tolist()}")
