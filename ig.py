"""Integrated gradients (Sundararajan, Taly and Yan 2017, arXiv 1703.01365), left Riemann sum."""

import torch
from torch import Tensor

import utils
from blocks import Network, check_arguments, pull, through_relu, unpool
from models import CNN3d, frozen


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
    if baseline is not None and baseline.shape not in (volume.shape, volume[:1].shape):
        raise ValueError(f"baseline: expected {tuple(volume.shape)}, got {tuple(baseline.shape)}")
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
    grid = slope.shape[2:]
    if baseline is None:
        # At alpha = 0 the image is blank and every window tied: its winners are those of a constant.
        _, first = block.pool(torch.zeros_like(slope))
        pooled_slope, winners = block.pool(slope)  # (B, n, x, y, z)
        del slope
        total = torch.zeros_like(pooled_slope)
        at_zero = total
        for step in utils.progress(range(steps), desc="IG steps", leave=False):
            features = block.activate(pooled_slope * (step / steps))
            gradient = through_relu(network.gradient(features, target), features > 0)
            if step == 0:
                at_zero = gradient
            else:
                total += gradient
        return unpool(total, winners, grid) + unpool(at_zero, first, grid)
    start = block.convolve(baseline)
    total = torch.zeros_like(slope).flatten(2)
    for step in utils.progress(range(steps), desc="IG steps", leave=False):
        pooled, winners = block.pool(start + slope * (step / steps))
        features = block.activate(pooled)
        gradient = through_relu(network.gradient(features, target), features > 0)
        total.scatter_add_(2, winners.flatten(2), gradient.flatten(2))
    return total.unflatten(2, tuple(grid))
