"""BatchNorm, ReLU and max pooling of a training step in one function that works on the pooled grid.

After a convolution at full resolution these three layers cost more than the convolution: each reads
and writes every voxel of every channel, forth and back. But normalisation is increasing in each
channel (decreasing where its weight is negative) and so is ReLU, so both may come after the pool,
on 1/8 or 1/27 of the voxels. What stays at full resolution are the batch's mean and variance, the
pool itself, and the gradient. The numbers are those of the three layers, up to rounding.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm_relu_pool(values: Tensor, norm: nn.BatchNorm3d, pool: nn.MaxPool3d) -> Tensor:
    """pool(relu(norm(values))) in training mode; updates the running statistics of `norm`.

    Args:
        values: (B, n, X, Y, Z), a convolution's output.
        norm: BatchNorm3d in training mode, with weight, bias and running statistics.
        pool: MaxPool3d with stride = kernel.

    Returns:
        (B, n, x, y, z), like `values`.
    """
    mean, variance = torch.batch_norm_update_stats(
        values.detach(), norm.running_mean, norm.running_var, cast(float, norm.momentum)
    )
    cast(Tensor, norm.num_batches_tracked).add_(1)
    precision = torch.rsqrt(variance + norm.eps)
    return _NormReluPool.apply(values, norm.weight, norm.bias, mean, precision, cast(int, pool.kernel_size))


class _NormReluPool(torch.autograd.Function):
    """The three layers given the batch's mean and 1 / standard deviation, each (n,).

    BatchNorm's gradient takes in that both depend on the values, so they get no gradient of their own.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, precision: Tensor, window: int
    ) -> Tensor:
        # where the weight is negative the largest output comes from the smallest input
        sign = _channels(torch.where(weight < 0, -1, 1).to(values.dtype))
        rising = values if bool((sign > 0).all()) else values * sign
        pooled, winners = F.max_pool3d(rising, window, return_indices=True)
        normal = (pooled * sign - _channels(mean)) * _channels(precision)
        outputs = F.relu(normal * _channels(weight) + _channels(bias))
        ctx.save_for_backward(values, weight, mean, precision, winners, normal, outputs > 0)
        return outputs.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, mean, precision, winners, normal, active = ctx.saved_tensors
        gradient = gradients[0] * active  # (B, n, x, y, z)
        count = values.numel() // values.shape[1]
        to_bias = gradient.sum((0, 2, 3, 4), dtype=mean.dtype)  # (n,)
        to_weight = (gradient * normal).sum((0, 2, 3, 4))
        # BatchNorm's gradient is scale * (g - mean of g - normal * mean of g * normal), and g is zero but
        # at the winners: everywhere else it is linear in `values`.
        scale = weight * precision  # (n,)
        slope, offset = (-scale * precision * to_weight / count), (-scale * to_bias / count)
        offset = offset - slope * mean
        full = torch.addcmul(_channels(offset).to(values.dtype), values, _channels(slope).to(values.dtype))
        won = _channels(scale) * (gradient - (_channels(to_bias) + normal * _channels(to_weight)) / count)
        full.flatten(2).scatter_(2, winners.flatten(2), won.to(values.dtype).flatten(2))
        return full, to_weight, to_bias, None, None, None


def _channels(values: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1, 1), to go with (B, n, X, Y, Z)."""
    return values.view(-1, 1, 1, 1)
