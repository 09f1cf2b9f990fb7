"""The published way of every piece of work, written plainly: what the suite is held against."""

from typing import cast

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import CNN3d


def integrated_gradients(
    model: CNN3d, volume: Tensor, target: Tensor, steps: int = 100, baseline: Tensor | None = None
) -> Tensor:
    """IG by autograd through the whole network, one step at a time, left Riemann sum."""
    model.eval()
    start = torch.zeros_like(volume) if baseline is None else baseline
    total = torch.zeros_like(volume)
    for step in range(steps):
        point = (start + (volume - start) * (step / steps)).requires_grad_()
        score = model(point).gather(1, target[:, None]).sum()
        total += torch.autograd.grad(score, point)[0]
    return total / steps * (volume - start)


def guided_gradcam(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    """captum's GuidedGradCam of the last convolution."""
    from captum.attr import GuidedGradCam

    model.eval()
    method = GuidedGradCam(model, model.features[-4])
    return method.attribute(volume, target=target, interpolate_mode="trilinear").detach()


def gradcam(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    """captum's LayerGradCam of the last convolution, upsampled trilinearly."""
    from captum.attr import LayerGradCam

    model.eval()
    cam = LayerGradCam(model, model.features[-4]).attribute(volume, target, relu_attributions=True)
    return F.interpolate(cam.detach(), volume.shape[2:], mode="trilinear")


def gradient(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    """captum's Saliency, signed."""
    from captum.attr import Saliency

    return Saliency(model.eval()).attribute(volume, target, abs=False).detach()


def input_times_gradient(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    """captum's InputXGradient."""
    from captum.attr import InputXGradient

    return InputXGradient(model.eval()).attribute(volume, target).detach()


def smoothgrad(model: CNN3d, volume: Tensor, target: Tensor, samples: int) -> Tensor:
    """captum's Saliency at noisy copies, the same ones as ours."""
    from gradient import NoisyScan

    noisy, total = NoisyScan(volume[0], 0, 0.1), torch.zeros_like(volume)
    for _ in range(samples):
        total += gradient(model, noisy.copy()[None], target)
    return total / samples


def occlusion(model: CNN3d, volume: Tensor, target: Tensor, edge: int) -> Tensor:
    """captum's Occlusion with cubes side by side, of an edge in voxels."""
    from captum.attr import Occlusion

    windows = {"sliding_window_shapes": (1, edge, edge, edge), "strides": (1, edge, edge, edge)}
    with torch.no_grad():
        return Occlusion(model.eval()).attribute(volume, target=target, **windows)


@torch.no_grad()
def composite_lrp(model: CNN3d, volume: Tensor, target: Tensor, epsilon: float = 1e-6) -> Tensor:
    """EpsilonPlusFlat at every unit, BatchNorm merged into the convolution before it."""
    model.eval()
    values, blocks = volume, []
    for conv, norm, relu, pool in model.blocks():
        factor = norm.weight * torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)
        weight = conv.weight * factor.view(-1, 1, 1, 1, 1)
        bias = (cast(Tensor, conv.bias) - cast(Tensor, norm.running_mean)) * factor + norm.bias
        after = relu(F.conv3d(values, weight, bias))
        blocks.append((values, weight, bias, after, [cast(int, pool.kernel_size)] * 3))
        values = pool(after)
    hidden, output = model.linears()
    flat = values.flatten(1)
    units = F.relu(hidden(flat))
    logits = output(units)
    relevance = logits * F.one_hot(target, logits.shape[1])
    for linear, a in ((output, units), (hidden, flat)):
        z = linear(a)
        relevance = a * ((relevance / (z + torch.where(z < 0, -epsilon, epsilon))) @ linear.weight)
    relevance = relevance.view(values.shape)
    for a, weight, bias, after, window in reversed(blocks):
        max_indices = F.max_pool3d(after, window, return_indices=True)[1]
        relevance = F.max_unpool3d(relevance, max_indices, window, output_size=after.shape[2:])
        if a is volume:
            relevance = F.conv_transpose3d(relevance, torch.full_like(weight, 1 / weight[0].numel()))
        else:
            z = F.conv3d(a, weight.clamp(min=0), bias.clamp(min=0)) + epsilon
            relevance = a * F.conv_transpose3d(relevance / z, weight.clamp(min=0))
    return relevance


@torch.no_grad()
def lrp(model: CNN3d, volume: Tensor, target: Tensor, beta: float = 0.5, epsilon: float = 1e-6) -> Tensor:
    """The beta rule with all four terms in every layer, denominators at every unit."""
    model.eval()
    inputs, values = [], volume
    layers = [*model.features, nn.Flatten(), *model.classifier]
    for layer in layers:
        inputs.append(values)
        values = layer(values)
    relevance = values * F.one_hot(target, values.shape[1])
    for layer, a in zip(reversed(layers), reversed(inputs), strict=True):
        if isinstance(layer, nn.Flatten):
            relevance = relevance.view(a.shape)
        elif isinstance(layer, nn.MaxPool3d):
            window = [cast(int, layer.kernel_size)] * 3
            max_indices = F.max_pool3d(a, window, return_indices=True)[1]
            relevance = F.max_unpool3d(relevance, max_indices, window, output_size=a.shape[2:])
        elif isinstance(layer, nn.Conv3d | nn.Linear):
            relevance = _alpha_beta_rule(layer, a, relevance, beta, epsilon)
    return relevance


def _alpha_beta_rule(
    layer: nn.Conv3d | nn.Linear, a: Tensor, relevance: Tensor, beta: float, epsilon: float
) -> Tensor:
    dense = isinstance(layer, nn.Linear)

    def forth(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) if dense else F.conv3d(x, w)

    def back(s: Tensor, w: Tensor) -> Tensor:
        return s @ w if dense else F.conv_transpose3d(s, w)

    a_plus, a_minus = a.clamp(min=0), a.clamp(max=0)
    w_plus, w_minus = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    z_plus = forth(a_plus, w_plus) + forth(a_minus, w_minus)
    z_minus = forth(a_plus, w_minus) + forth(a_minus, w_plus)
    both = (z_plus > 0) & (z_minus < 0)
    share_plus = torch.where(both, 1 + beta, 1.0) * relevance / (z_plus + epsilon)
    share_minus = torch.where(both, -beta, 1.0) * relevance / (z_minus - epsilon)
    share_plus = torch.where(z_plus > 0, share_plus, 0)
    share_minus = torch.where(z_minus < 0, share_minus, 0)
    return (
        a_plus * back(share_plus, w_plus)
        + a_minus * back(share_plus, w_minus)
        + a_plus * back(share_minus, w_minus)
        + a_minus * back(share_minus, w_plus)
    )


def training_step(
    model: CNN3d,
    optimiser: torch.optim.Optimizer,
    volume: Tensor,
    label: Tensor,
    dtype: torch.dtype = torch.float32,
) -> float:
    """One plain step through the layers as they stand, in float32 or under PyTorch's autocast."""
    model.train()
    with torch.autocast(volume.device.type, dtype, enabled=dtype is not torch.float32):
        logits = model.classifier(model.features(volume).flatten(1))
    loss = F.cross_entropy(logits.float(), label)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def read_scan(path: str) -> np.ndarray:
    """nibabel's get_fdata and min-max scaling, in float64 as the published loader does."""
    values = nib.Nifti1Image.from_filename(path).get_fdata()
    return ((values - values.min()) / (values.max() - values.min())).astype(np.float32)
