"""Gradients of a logit at the scan: plain (Simonyan et al. 2014), times the scan, and smoothed by noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

import utils
from internals.devices import to_memory_format
from internals.folded import FoldedNetwork, add_at_maxima, bounding_box, transposed_convolution
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
        block = network.blocks[0]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (*volume.shape[:1], len(block.weight), *block.conv_shape(volume.shape[2:]))
        total = to_memory_format(volume.new_zeros(shape))  # (B, n, X', Y', Z')
        for _ in utils.progress(range(samples), desc="noisy copies", leave=False):
            copies = torch.stack([noisy_copy(*pair, sigma) for pair in zip(volume, generators, strict=True)])
            pooled, max_indices = block.convolve_and_pool(copies)
            add_at_maxima(total, network.pooled_gradient(block.activate(pooled), target), max_indices)
        return transposed_convolution(total, block.weight) / samples


def noisy_copy(scan: Tensor, generator: torch.Generator, sigma: float) -> Tensor:
    """A scan (1, X, Y, Z) and normal noise where it is not zero, sigma of its range; drawn on the CPU."""
    inside = scan != 0
    noise = torch.randn(int(inside.sum()), generator=generator, dtype=scan.dtype)
    copy = scan.clone()
    copy[inside] += sigma * (scan.max() - scan.min()) * noise.to(scan.device)
    return copy
