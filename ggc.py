"""Grad-CAM and guided Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391)."""

from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from internals.folded import FoldedNetwork, ForwardCache, batchnorm_scale, convolve, relu_backward
from models import BlockLayers, CNN3d, check_arguments, evaluation_mode


def guided_gradcam(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    """Guided backpropagation times Grad-CAM of the last convolution.

    Guided backpropagation: the logit's gradient at the scan, with what is negative dropped at every
    ReLU (Springenberg et al. 2015, arXiv 1412.6806). One forward pass serves both. The numbers are
    those of captum's GuidedGradCam with interpolate_mode="trilinear".

    Args:
        model: the network; evaluated in evaluation mode, left as found.
        volume: (B, 1, X, Y, Z), scans in [0, 1].
        target: int64 (B,), the logit to explain, per scan.

    Returns:
        The attributions, like `volume`, signed.

    Raises:
        ValueError: shapes, dtypes or targets that do not fit.
    """
    check_arguments(model, volume, target)
    with evaluation_mode(model), torch.no_grad():
        network = FoldedNetwork(model, volume.shape[2:])
        inputs, caches, hidden = _forward(network, volume)
        shape = caches[-1].outputs.shape
        cam = _gradcam(
            model.blocks()[-1], inputs[-1], caches[-1], network.classifier_gradient(target, hidden, shape)
        )
        guided = network.classifier_gradient(target, hidden, shape, guided=True)
        for block, cache in zip(reversed(network.blocks), reversed(caches), strict=True):
            guided = block.backward(guided, cache, guided=True)
        return guided * F.interpolate(cam, volume.shape[2:], mode="trilinear")


def gradcam(model: CNN3d, volume: Tensor, target: Tensor, layer: int = -1) -> Tensor:
    """Grad-CAM of one convolution, upsampled trilinearly to the scan.

    The numbers are those of captum's LayerGradCam with relu_attributions=True, then interpolated.

    Args:
        model, volume, target: as of `guided_gradcam`.
        layer: the block, from 0, or from the end, -1 the last.

    Returns:
        The map, like `volume`, >= 0.

    Raises:
        ValueError: shapes, dtypes or targets that do not fit, or no such block.
    """
    check_arguments(model, volume, target)
    depth = len(model.blocks())
    check_layer(layer, depth)
    with evaluation_mode(model), torch.no_grad():
        network = FoldedNetwork(model, volume.shape[2:])
        inputs, caches, hidden = _forward(network, volume)
        gradient = network.classifier_gradient(target, hidden, caches[-1].outputs.shape)
        for number in range(depth - 1, layer % depth, -1):
            gradient = network.blocks[number].backward(gradient, caches[number])
        cam = _gradcam(model.blocks()[layer], inputs[layer], caches[layer], gradient)
        return F.interpolate(cam, volume.shape[2:], mode="trilinear")


def check_layer(layer: int, depth: int) -> None:
    """Raise ValueError unless a network of `depth` blocks has this one."""
    if not -depth <= layer < depth:
        raise ValueError(f"layer {layer}: the network has {depth} blocks, 0 to {depth - 1} or -{depth} to -1")


def _forward(network: FoldedNetwork, volume: Tensor) -> tuple[list[Tensor], list[ForwardCache], Tensor]:
    """What every block reads, and its cache; and the hidden units (B, 64)."""
    inputs, caches = [], []
    for block in network.blocks:
        inputs.append(volume)
        volume, cache = block.forward(volume)
        caches.append(cache)
    return inputs, caches, network.classify(volume)[1]


def _gradcam(layers: BlockLayers, inputs: Tensor, cache: ForwardCache, gradient: Tensor) -> Tensor:
    """Grad-CAM of a block's convolution, (B, 1, X', Y', Z').

    relu(sum_k w_k A_k), A the convolution's output before BatchNorm, w_k the mean over its grid of the
    target logit's gradient at A_k (equations 1 and 2). As a convolution is linear, the weighted sum of its
    channels is one convolution with the weighted sum of its kernels.

    Args:
        layers: the block's layers.
        inputs: (B, C, X, Y, Z), what the convolution reads.
        cache: of the block's forward pass.
        gradient: (B, n, x, y, z), the target logit's gradient at the block's output.
    """
    # only the maxima of the pool have a gradient
    slopes = relu_backward(gradient, cache.outputs).sum((2, 3, 4)) / prod(cache.conv_shape)  # (B, n)
    weights = slopes * batchnorm_scale(layers.norm)
    kernels = torch.einsum("bn,ncxyz->bcxyz", weights, layers.conv.weight)
    cams = [convolve(scan[None], kernel[None]) for scan, kernel in zip(inputs, kernels, strict=True)]
    return F.relu(torch.cat(cams) + (weights @ cast(Tensor, layers.conv.bias)).view(-1, 1, 1, 1, 1))
