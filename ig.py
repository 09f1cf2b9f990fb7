"""Integrated gradients (Sundararajan, Taly and Yan 2017, arXiv 1703.01365), left Riemann sum."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

import utils
from internals.devices import values_at_once
from internals.folded import (
    FoldedNetwork,
    add_at_maxima,
    bounding_box,
    convolve,
    pool_in_slabs,
    transposed_convolution,
    unpool_and_transpose,
)
from models import CNN3d, check_arguments, evaluation_mode

CHUNK = 2**24  # values of the first block's output that are computed at once on a CPU, 64 MiB in float32


def integrated_gradients(
    model: CNN3d, volume: Tensor, target: Tensor, steps: int = 100, baseline: Tensor | None = None
) -> Tensor:
    """Integrate the gradient of a logit along the straight line from a baseline to a scan.

    map = (x - b) * 1/m sum_{j=0}^{m-1} dF/dx at b + (j/m)(x - b)      (their equation 3, left sum)

    On that line the first convolution is linear in alpha = j/m, so it is evaluated twice in all:
    conv(b) and conv(x - b). From the zero baseline conv(b) = 0, and the maximum of a pooling window
    is at the same place for every alpha > 0; then each step starts on the pooled grid. The gradients
    at the first convolution's output are summed over the steps; one transposed convolution of their
    sum gives the gradient at the scan.

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
        box = bounding_box(volume) if baseline is None else bounding_box(volume, baseline)
        network = FoldedNetwork(model, volume.shape[2:], box)
        box = network.input_box
        alphas = torch.arange(steps, device=volume.device, dtype=volume.dtype) / steps
        if baseline is None:
            difference = volume
            gradient = _sum_from_zero(network, volume[:, :, *box], target, alphas)
        else:
            difference = volume - baseline
            line = difference[:, :, *box], baseline[:, :, *box]
            gradient = _sum_from_baseline(network, *line, target, alphas)
        result = torch.zeros_like(volume)
        result[:, :, *box] = gradient * difference[:, :, *box] / steps
        return result


def _sum_from_zero(network: FoldedNetwork, volume: Tensor, target: Tensor, alphas: Tensor) -> Tensor:
    """Sum over the steps of the gradient at the scan, (B, 1, X, Y, Z), from the zero baseline."""
    block = network.blocks[0]
    conv_shape = block.conv_shape(volume.shape[2:])

    # At alpha = 0 the image is blank and all windows are tied: their maxima are where a constant has them.
    blank, blank_indices = block.pool(volume.new_zeros(1, 1, *conv_shape))
    blank = blank.expand(len(target), len(block.shift), -1, -1, -1)
    first = network.pooled_gradient(block.activate(blank), target)
    total = unpool_and_transpose(
        first, blank_indices.expand(blank.shape), conv_shape, block.weight, block.window
    )

    pooled, max_indices = block.convolve_and_pool(volume)
    summed = torch.zeros_like(pooled)
    for chunk in _chunks(alphas[1:], pooled):
        features = block.activate(pooled, chunk)  # (S * B, n, x, y, z)
        for gradient in _gradients(network, features, target):
            summed += gradient
    return total.add_(unpool_and_transpose(summed, max_indices, conv_shape, block.weight, block.window))


def _sum_from_baseline(
    network: FoldedNetwork, difference: Tensor, baseline: Tensor, target: Tensor, alphas: Tensor
) -> Tensor:
    """The same from another baseline, where the maxima move from step to step."""
    block = network.blocks[0]
    start, slope = convolve(baseline, block.weight), convolve(difference, block.weight)  # (B, n, X', Y', Z')
    total = torch.zeros_like(slope)

    def pool(rows: slice) -> tuple[Tensor, ...]:
        return block.pool(torch.addcmul(start[:, :, rows], slope[:, :, rows], chunk))

    for chunk in _chunks(alphas, slope):
        channels = len(chunk) * total.shape[0] * total.shape[1]
        pooled, max_indices = pool_in_slabs(pool, slope.shape[2:], block.window, channels, total.device)
        gradients = _gradients(network, block.activate(pooled), target)
        for gradient, indices in zip(gradients, max_indices.split(len(target)), strict=True):
            add_at_maxima(total, gradient, indices)
    return transposed_convolution(total, block.weight)


def _gradients(network: FoldedNetwork, features: Tensor, target: Tensor) -> Sequence[Tensor]:
    """Gradient of the logits before the first ReLU, (B, n, x, y, z), for each of S steps of B scans."""
    targets = target.repeat(len(features) // len(target))
    return network.pooled_gradient(features, targets).split(len(target))


def _chunks(alphas: Tensor, values: Tensor) -> Iterable[Tensor]:
    """Steps to take at once, (S, 1, 1, 1, 1): several for a single small scan, else one."""
    size = max(1, values_at_once(values.device, CHUNK) // values.numel()) if len(values) == 1 else 1
    parts = [alphas[i : i + size].view(-1, 1, 1, 1, 1) for i in range(0, len(alphas), size)]
    return utils.progress(parts, desc="IG steps", leave=False)
