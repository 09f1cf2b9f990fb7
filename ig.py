"""Integrated gradients (Sundararajan, Taly and Yan 2017, arXiv 1703.01365), left Riemann sum."""

from collections.abc import Iterable

import torch
from torch import Tensor

import utils
from internals.devices import values_at_once
from internals.folded import Network, in_slabs, pull, support, through_relu, unpool_and_pull
from models import CNN3d, check_arguments, evaluation_mode

CHUNK = 2**24  # values of the first block's output worked on at once on a CPU, 64 MiB in float32


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
    with evaluation_mode(model), torch.no_grad():
        box = support(volume) if baseline is None else support(volume, baseline)
        network = Network(model, volume.shape[2:], box)
        head = network.head
        alphas = torch.arange(steps, device=volume.device, dtype=volume.dtype) / steps
        if baseline is None:
            difference = volume
            gradient = _from_zero(network, volume[:, :, *head], target, alphas)
        else:
            difference = volume - baseline
            gradient = _from_baseline(network, difference[:, :, *head], baseline[:, :, *head], target, alphas)
        result = torch.zeros_like(volume)
        result[:, :, *head] = gradient * difference[:, :, *head] / steps
        return result


def _from_zero(network: Network, volume: Tensor, target: Tensor, alphas: Tensor) -> Tensor:
    """Sum over the steps of the gradient at the scan, (B, 1, X, Y, Z), from the zero baseline."""
    block = network.blocks[0]
    grid = block.grid(volume.shape[2:])

    # At alpha = 0 the image is blank and all windows tied: their winners are a constant's.
    blank, blank_winners = block.pool(volume.new_zeros(1, 1, *grid))
    blank = blank.expand(len(target), len(block.shift), -1, -1, -1)
    first = _pooled_gradient(network, block.activate(blank), target)
    total = unpool_and_pull(first, blank_winners.expand(blank.shape), grid, block.weight, block.window)

    pooled, winners = block.convolve_and_pool(volume)
    summed = torch.zeros_like(pooled)
    for some in _chunks(alphas[1:], pooled):
        features = block.activate(pooled, some)  # (S * B, n, x, y, z)
        for gradient in _pooled_gradient(network, features, target).split(len(target)):
            summed += gradient
    return total.add_(unpool_and_pull(summed, winners, grid, block.weight, block.window))


def _from_baseline(
    network: Network, difference: Tensor, baseline: Tensor, target: Tensor, alphas: Tensor
) -> Tensor:
    """The same from another baseline, where winners change from step to step."""
    block = network.blocks[0]
    start, slope = block.convolve(baseline), block.convolve(difference)  # (B, n, X', Y', Z')
    total = torch.zeros_like(slope)

    def pool(rows: slice) -> tuple[Tensor, ...]:
        return block.pool(torch.addcmul(start[:, :, rows], slope[:, :, rows], some))

    for some in _chunks(alphas, slope):
        pooled, winners = in_slabs(
            pool, slope.shape[2:], block.window, len(some) * total.shape[0] * total.shape[1], total.device
        )
        gradient = _pooled_gradient(network, block.activate(pooled), target)
        for part, where in zip(gradient.split(len(target)), winners.split(len(target)), strict=True):
            total.flatten(2).scatter_add_(2, where.flatten(2), part.flatten(2))
    return pull(total, block.weight)


def _pooled_gradient(network: Network, features: Tensor, target: Tensor) -> Tensor:
    """Gradient of the logits before the first relu, (S * B, n, x, y, z), for S steps of B scans."""
    target = target.repeat(len(features) // len(target))
    return through_relu(network.gradient(features, target), features)


def _chunks(alphas: Tensor, values: Tensor) -> Iterable[Tensor]:
    """Steps to take at once, (S, 1, 1, 1, 1): those of one small scan keep the processor busier together."""
    size = max(1, values_at_once(values.device, CHUNK) // values.numel()) if len(values) == 1 else 1
    parts = [alphas[i : i + size].view(-1, 1, 1, 1, 1) for i in range(0, len(alphas), size)]
    return utils.progress(parts, desc="IG steps", leave=False)
