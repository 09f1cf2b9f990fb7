"""Integrated gradients (Sundararajan, Taly and Yan 2017, arXiv 1703.01365), left Riemann sum."""

from collections.abc import Iterable

import torch
from torch import Tensor

import utils
from blocks import Network, check_arguments, pull, through_relu
from models import CNN3d, frozen

CHUNK = 2**24  # values of the first block's output worked on at once, 64 MiB in float32


def integrated_gradients(
    model: CNN3d, volume: Tensor, target: Tensor, steps: int = 100, baseline: Tensor | None = None
) -> Tensor:
    """Integrate the gradient of a logit along the straight line from a baseline to a scan.

    map = (x - b) * 1/m sum_{j=0}^{m-1} dF/dx at b + (j/m)(x - b)      (their equation 3, left sum)

    On that line the first convolution is linear in alpha = j/m, so it is evaluated twice in all:
    conv(b) and conv(x - b). From the zero baseline conv(b) = 0, and the winner of a pooling window
    is the same for every alpha > 0; then each step starts on the pooled grid. The gradients at the
    first convolution's output are summed over the steps and pulled back to the scan once.

    Args:
        model: the network; evaluated in evaluation mode, left as found.
        volume: (B, 1, X, Y, Z), scans in [0, 1].
        target: int64 (B,), the logit to explain, per scan.
        steps: number m of steps; the error falls like 1 / m.
        baseline: None for all zeros (as published), or (1 or B, 1, X, Y, Z).

    Returns:
        The attributions, like `volume`, signed; they sum to F(x) - F(b) up to the steps' error.

    Raises:
        ValueError: shapes, dtypes, targets or steps that do not fit.
    """
    check_arguments(model, volume, target)
    if steps < 1:
        raise ValueError(f"steps: expected >= 1, got {steps}")
    if baseline is not None and (
        baseline.shape not in (volume.shape, volume[:1].shape) or baseline.dtype != volume.dtype
    ):
        raise ValueError(
            f"baseline: expected {volume.dtype} {tuple(volume.shape)}, "
            f"got {baseline.dtype} {tuple(baseline.shape)}"
        )
    with frozen(model), torch.no_grad():
        network = Network(model)
        difference = volume if baseline is None else volume - baseline
        gradient = _summed_gradient(network, difference, baseline, target, steps)
        return difference * pull(gradient, network.blocks[0].weight) / steps


def _summed_gradient(
    network: Network, difference: Tensor, baseline: Tensor | None, target: Tensor, steps: int
) -> Tensor:
    """Sum over the steps of the gradient at the first convolution's output, (B, n, X', Y', Z')."""
    block = network.blocks[0]
    slope = block.convolve(difference)  # (B, n, X', Y', Z')
    alphas = torch.arange(steps, device=slope.device, dtype=slope.dtype) / steps
    total = torch.zeros_like(slope).flatten(2)

    def add(gradient: Tensor, winners: Tensor) -> None:
        total.scatter_add_(2, winners.flatten(2), gradient.flatten(2))

    if baseline is None:
        # At alpha = 0 the image is blank and all windows tied: their winners are a constant's.
        pooled, winners = block.pool(torch.zeros_like(slope))
        add(_pooled_gradient(network, pooled, target), winners)
        pooled, winners = block.pool(slope)
        summed = torch.zeros_like(pooled)
        for some in _chunks(alphas[1:], pooled.numel()):
            scaled = (some * pooled).flatten(0, 1)  # (S * B, n, x, y, z)
            summed += _pooled_gradient(network, scaled, target).view(-1, *pooled.shape).sum(0)
        add(summed, winners)
    else:
        start = block.convolve(baseline)
        for some in _chunks(alphas, slope.numel()):
            pooled, winners = block.pool((start + some * slope).flatten(0, 1))
            gradient = _pooled_gradient(network, pooled, target)
            for part in zip(gradient.split(len(target)), winners.split(len(target)), strict=True):
                add(*part)
    return total.view(slope.shape)


def _pooled_gradient(network: Network, pooled: Tensor, target: Tensor) -> Tensor:
    """Gradient of the logits at the first pool, (S * B, n, x, y, z), for S steps of B scans."""
    features = network.blocks[0].activate(pooled)
    target = target.repeat(len(pooled) // len(target))
    return through_relu(network.gradient(features, target), features > 0)


def _chunks(alphas: Tensor, size: int) -> Iterable[Tensor]:
    """Steps to take at once, (S, 1, 1, 1, 1, 1): small grids keep the processor busier together."""
    shaped = alphas.view(-1, 1, 1, 1, 1, 1)
    return utils.progress(shaped.split(max(1, CHUNK // size)), desc="IG steps", leave=False)
