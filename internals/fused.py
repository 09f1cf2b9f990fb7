"""Fast versions of the layers that make a training step slow on a CPU; same numbers, up to rounding.

BatchNorm, ReLU and max pooling are one function that works on the pooled grid (`norm_relu_pool`).

At full resolution these three layers cost more than the convolution before them: each reads
and writes every voxel of every channel, forwards and backwards. But normalisation is increasing in each
channel (decreasing where its weight is negative) and so is ReLU, so both may come after the pool,
on 1/8 or 1/27 of the voxels. What stays at full resolution are the batch's mean and variance, the
pool itself, and the gradient.

The first convolution reads a single channel, which is slow in 16 bits (`stacked_convolution`).
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLAB = 4  # rows along the first axis whose mean and variance are taken at once


def norm_relu_pool(values: Tensor, norm: nn.BatchNorm3d, pool: nn.MaxPool3d) -> Tensor:
    """pool(relu(norm(values))) in training mode. Updates the running statistics of `norm`.

    Args:
        values: (B, n, X, Y, Z), a convolution's output.
        norm: BatchNorm3d in training mode, with weight, bias and running statistics.
        pool: MaxPool3d with stride = kernel.

    Returns:
        (B, n, x, y, z), like `values`.
    """
    mean, variance = statistics(values.detach())
    count, batches = values.numel() // values.shape[1], cast(Tensor, norm.num_batches_tracked).add_(1)
    share = 1 / float(batches) if norm.momentum is None else norm.momentum  # None: the mean over all batches
    cast(Tensor, norm.running_mean).lerp_(mean, share)
    cast(Tensor, norm.running_var).lerp_(variance * (count / (count - 1)), share)
    inverse_std = torch.rsqrt(variance + norm.eps)
    return _NormReluPool.apply(values, norm.weight, norm.bias, mean, inverse_std, cast(int, pool.kernel_size))


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (not corrected) of every channel of (B, n, X, Y, Z), two (n,).

    PyTorch adds up channels-last values one after the other, which costs digits where a channel
    has millions of voxels. Slabs are short enough; their moments are combined in float64.
    """
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    moments, counts = [], []
    for scan in values.split(1):
        for slab in scan.split(SLAB, 2):
            moments.append(torch.stack(torch.batch_norm_update_stats(slab, None, None, 0.0)).double())
            counts.append(slab.numel() // slab.shape[1])
    means, variances = torch.stack(moments, 1)  # (slabs, n) each
    share = torch.tensor(counts, dtype=torch.float64, device=values.device).unsqueeze(1) / sum(counts)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean) ** 2)).sum(0)
    return mean.to(dtype), variance.to(dtype)


class _NormReluPool(torch.autograd.Function):
    """The three layers given the batch's mean and 1 / standard deviation, each (n,).

    The backward pass includes that both depend on the values, so they get no gradient of their own.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, window: int
    ) -> Tensor:
        # where the weight is negative the largest output comes from the smallest input
        sign = torch.where(weight < 0, -1, 1).to(values.dtype).view(-1, 1, 1, 1)
        oriented = values if bool((sign > 0).all()) else values * sign
        pooled, max_indices = F.max_pool3d(oriented, window, return_indices=True)
        pooled = pooled if oriented is values else pooled * sign
        scale = weight * inverse_std  # (n,)
        outputs = affine(pooled, scale, bias - mean * scale).relu_()
        ctx.save_for_backward(values, weight, mean, inverse_std, max_indices, pooled, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, mean, inverse_std, max_indices, pooled, outputs = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradients[0], outputs, 0)  # (B, n, x, y, z)
        normalised = affine(pooled, inverse_std, -mean * inverse_std)
        count, space = values.numel() // values.shape[1], (0, 2, 3, 4)
        bias_gradient = gradient.sum(space, dtype=mean.dtype)  # (n,)
        weight_gradient = (gradient * normalised).sum(space, dtype=mean.dtype)
        # BatchNorm's gradient is scale * (g - mean of g - normalised * mean of g * normalised). But g is zero
        # except at the maxima: everywhere else BatchNorm's gradient is linear in `values`.
        scale = weight * inverse_std  # (n,)
        slope = -scale * inverse_std * weight_gradient / count
        offset = -scale * bias_gradient / count - slope * mean
        at_maxima = affine(pooled, slope, offset) + affine(gradient, scale, torch.zeros_like(scale))
        # in place, for the values are needed no more; autograd refuses a second pass over them
        full = affine(values, slope, offset, in_place=True)
        # 16-bit numbers are scattered as integers: PyTorch would copy the whole grid otherwise
        bits = torch.int16 if values.element_size() == 2 else values.dtype
        full.view(bits).flatten(2).scatter_(2, max_indices.flatten(2), at_maxima.view(bits).flatten(2))
        return full, weight_gradient, bias_gradient, None, None, None


def affine(values: Tensor, factor: Tensor, offset: Tensor, in_place: bool = False) -> Tensor:
    """factor * values + offset, one each (n,) per channel of (B, n, X, Y, Z), in one pass."""
    zero, one = torch.zeros_like(factor), torch.ones_like(factor)
    if not in_place:
        # not F.batch_norm, which PyTorch 2.11 lets have no epsilon of 0
        return torch.batch_norm(values, factor, offset, zero, one, False, 0.0, 0.0, False)
    none = factor.new_empty(0)
    return torch.native_batch_norm(
        values, factor, offset, zero, one, False, 0.0, 0.0, out=(values, none, none)
    )[0]


def stacked_convolution(volume: Tensor, conv: nn.Conv3d) -> Tensor:
    """conv(volume) for scans (B, 1, X, Y, Z), with the taps along the first axis as channels.

    In 16 bits a convolution of one channel is slow. Here it reads k copies of the scan, each shifted by
    one voxel, with a kernel of (1, k, k), and one blank copy where k is odd.
    """
    taps = conv.weight.shape[2]
    length, spare = volume.shape[2] - taps + 1, taps % 2
    scan = volume[:, 0].to(torch.get_autocast_dtype(volume.device.type))
    copies = [scan[:, tap : tap + length] for tap in range(taps)]
    copies += [torch.zeros_like(copies[0])] * spare
    weight = F.pad(conv.weight.transpose(1, 2), (0, 0, 0, 0, 0, 0, 0, spare))  # (n, k + spare, 1, k, k)
    return F.conv3d(torch.stack(copies, -1).movedim(-1, 1), weight, conv.bias)
