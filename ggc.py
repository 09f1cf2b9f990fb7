"""Guided Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from internals.folded import FoldedNetwork, batchnorm_scale, max_unpool, relu_backward
from models import CNN3d, check_arguments, evaluation_mode


def guided_gradcam(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    """Guided backpropagation times Grad-CAM of the last convolution.

    Grad-CAM: relu(sum_k w_k A_k), A the last Conv3d's output before BatchNorm, w_k the mean over
    its grid of the target logit's gradient at A_k (their equations 1 and 2), upsampled trilinearly
    to the scan. Guided backpropagation: the logit's gradient at the scan, with what is negative
    dropped at every ReLU (Springenberg et al. 2015, arXiv 1412.6806). One forward pass serves both.
    The numbers are those of captum's GuidedGradCam with interpolate_mode="trilinear".

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
        features, caches = volume, []
        for block in network.blocks:
            last_inputs = features
            features, cache = block.forward(features)
            caches.append(cache)
        _, hidden = network.classify(features)
        shape, last = features.shape, caches[-1]

        gradient = relu_backward(network.classifier_gradient(target, hidden, shape), last.outputs)
        cam = _gradcam(model, last_inputs, max_unpool(gradient, last.max_indices, last.conv_shape))
        guided = network.classifier_gradient(target, hidden, shape, guided=True)
        for block, cache in zip(reversed(network.blocks), reversed(caches), strict=True):
            guided = block.backward(guided, cache, guided=True)
        return guided * F.interpolate(cam, volume.shape[2:], mode="trilinear")


def _gradcam(model: CNN3d, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM of the last block's convolution, (B, 1, X', Y', Z').

    Args:
        model: the network.
        inputs: (B, n, X, Y, Z), what the last convolution reads.
        gradient: (B, n, X', Y', Z'), the target logit's gradient after its BatchNorm.
    """
    conv, norm, _, _ = model.blocks()[-1]
    weights = gradient.mean((2, 3, 4)) * batchnorm_scale(norm)  # (B, n)
    return F.relu(torch.einsum("bn,bnxyz->bxyz", weights, conv(inputs))).unsqueeze(1)
