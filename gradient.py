"""Gradients of a logit at the scan: plain (Simonyan et al. 2014), times the scan, and smoothed by noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

import utils
from internals.devices import to_memory_format
from internals.folded import (
    FoldedBlock,
    FoldedNetwork,
    add_at_maxima,
    bounding_box,
    max_unpool,
    transposed_convolution,
)
from models import CNN3d, check_arguments, evaluation_mode


def gradient(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    """The gradient of a logit at the scan (Simonyan, Vedaldi and Zisserman 2014, arXiv 1312.6034).

    The numbers are those of captum's Saliency(abs=False).

    Args:
        model: the network; evaluated in evaluation mode, left as found.
        volume: (B, 1, X, Y, Z), scans in [0, 1].
        target: int64 (B,), the logit to explain, per scan.

    Returns:
        The gradient, like `volume`, signed; logits per unit of the scan. It is not zero outside the head.

    Raises:
        ValueError: shapes, dtypes or targets that do not fit.
    """
    check_arguments(model, volume, target)
    with evaluation_mode(model), torch.no_grad():
        return FoldedNetwork(model, volume.shape[2:]).input_gradient(volume, target)


def input_times_gradient(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    """The gradient of a logit times the scan (Shrikumar et al. 2016, arXiv 1605.01713).

    The numbers are those of captum's InputXGradient. Arguments and errors are those of `gradient`; the map is
    in logits, and zero where the scan is.
    """
    check_arguments(model, volume, target)
    with evaluation_mode(model), torch.no_grad():
        network = FoldedNetwork(model, volume.shape[2:], bounding_box(volume))
        head = volume[:, :, *network.input_box]
        result = torch.zeros_like(volume)
        result[:, :, *network.input_box] = network.input_gradient(head, target) * head
        return result


def smoothgrad(
    model: CNN3d,
    volume: Tensor,
    target: Tensor,
    samples: int = 25,
    sigma: float = 0.1,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """The mean gradient at noisy copies of the scan (Smilkov et al. 2017, arXiv 1706.03825).

    map = 1/n sum_{j=1}^{n} dF/dx at x + s g_j,   g_j standard normal where the scan is not zero, else 0,
    s = sigma (max x - min x)

    As in integrated gradients, the gradients at the first convolution's output are summed over the copies,
    and one transposed convolution of their sum gives the map.

    Args:
        model: the network; evaluated in evaluation mode, left as found.
        volume: (B, 1, X, Y, Z), scans in [0, 1].
        target: int64 (B,), the logit to explain, per scan.
        samples: number n of noisy copies.
        sigma: standard deviation of the noise, as a share of each scan's range.
        seeds: of the noise, one per scan, so that it does not depend on what else is in the batch; 0 by
            default. Every device gets the same numbers.

    Returns:
        The mean gradient, like `volume`, signed; logits per unit of the scan.

    Raises:
        ValueError: shapes, dtypes, targets, samples, sigma or seeds that do not fit.
    """
    check_arguments(model, volume, target)
    if samples < 1:
        raise ValueError(f"samples: expected >= 1, got {samples}")
    if not sigma > 0:
        raise ValueError(f"sigma: expected > 0, got {sigma}")
    seeds = [0] * len(volume) if seeds is None else seeds
    if len(seeds) != len(volume):
        raise ValueError(f"seeds: expected {len(volume)}, one per scan, got {len(seeds)}")
    with evaluation_mode(model), torch.no_grad():
        network = FoldedNetwork(model, volume.shape[2:])
        first = NoisyBlock(network.blocks[0], volume)
        scans = [NoisyScan(*scan, sigma) for scan in zip(volume, seeds, strict=True)]
        for _ in utils.progress(range(samples), desc="noisy copies", leave=False):
            features = first.forward(torch.stack([scan.copy() for scan in scans]))
            first.add(network.pooled_gradient(features, target))
        return first.gradient() / samples


class NoisyBlock:
    """The first block on many copies of scans that differ only inside the head; sums their gradients.

    Around the head all is zero, so that a window's maximum is always its first voxel. Only a box around the
    head is convolved, and there the maxima move from copy to copy.
    """

    def __init__(self, block: FoldedBlock, volume: Tensor) -> None:
        self.block, self.shape = block, block.conv_shape(volume.shape[2:])
        self.read, self.made = block.propagate_box(bounding_box(volume), volume.shape[2:])
        self.inside = tuple(slice(axis.start, axis.stop - block.weight.shape[2] + 1) for axis in self.read)
        channels = (len(volume), len(block.weight))
        pooled = (edge // block.window for edge in self.shape)
        self.pooled = to_memory_format(volume.new_zeros(*channels, *pooled))  # zero around the head
        self.outside = torch.zeros_like(self.pooled)
        edges = (axis.stop - axis.start for axis in self.inside)
        self.total = to_memory_format(volume.new_zeros(*channels, *edges))

    def forward(self, copies: Tensor) -> Tensor:
        """The block's outputs, (B, 1, X, Y, Z) -> (B, n, x, y, z)."""
        pooled, self.max_indices = self.block.convolve_and_pool(copies[:, :, *self.read])
        self.pooled[:, :, *self.made] = pooled
        return self.block.activate(self.pooled)

    def add(self, gradient: Tensor) -> None:
        """Add the gradient before the ReLU, (B, n, x, y, z), of the copies that came last."""
        self.outside += gradient
        add_at_maxima(self.total, gradient[:, :, *self.made], self.max_indices)

    def gradient(self) -> Tensor:
        """The sum of the gradients at the scans, (B, 1, X, Y, Z)."""
        self.outside[:, :, *self.made] = 0
        _, first = self.block.pool(self.total.new_zeros(1, 1, *self.shape))
        total = max_unpool(self.outside, first.expand_as(self.outside), self.shape)
        total[:, :, *self.inside] += self.total
        return transposed_convolution(total, self.block.weight)


class NoisyScan:
    """A scan (1, X, Y, Z), and copies of it with normal noise where it is not zero.

    The noise is drawn on the CPU, so that every device gets the same. Its standard deviation is `sigma` of
    the scan's range.
    """

    def __init__(self, scan: Tensor, seed: int, sigma: float) -> None:
        self.scan = scan.contiguous()
        self.inside = self.scan.view(-1).nonzero()[:, 0]
        self.spread = sigma * float(scan.max() - scan.min())
        self.generator = torch.Generator().manual_seed(seed)

    def copy(self) -> Tensor:
        """The next copy, (1, X, Y, Z)."""
        noise = torch.randn(len(self.inside), generator=self.generator, dtype=self.scan.dtype)
        copy = self.scan.clone()
        copy.view(-1).index_add_(0, self.inside, noise.to(copy.device), alpha=self.spread)
        return copy
