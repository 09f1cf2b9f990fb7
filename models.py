"""The four published families of 3D convolutional networks.

A block is Conv3d (valid, stride 1), BatchNorm3d, ReLU, MaxPool3d (stride = kernel, floor); every
block of a network has the same number of filters. Flatten, Linear(., 64), ReLU, Dropout(0.5) and
Linear(64, 2) follow. Kernels, pools and layer names are those of Wang et al., NeuroImage
269:119929 (2023), so that published checkpoints load unchanged.
"""

import contextlib
import re
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from internals.devices import to_memory_format
from internals.fused import norm_relu_pool, stacked_convolution

# family: (convolution kernel, pooling kernel) of each block, from the scan to the classifier
FAMILIES: dict[str, tuple[tuple[int, int], ...]] = {
    "A": ((7, 2), (5, 2), (5, 2), (3, 2), (3, 2)),
    "B": ((3, 2), (3, 2), (3, 2), (3, 2), (3, 2)),
    "C": ((5, 3), (5, 2), (5, 2), (5, 2)),
    "D": ((7, 3), (7, 3), (7, 3)),
}
PUBLISHED = tuple(f"model{family}{width}" for family in FAMILIES for width in range(24, 53, 4))
PUBLISHED_GRID = (193, 229, 193)
HIDDEN, CLASSES = 64, 2


class CNN3d(nn.Module):
    """A network of one of the published families; see `build_model`."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, volume: Tensor) -> Tensor:
        """Map scans (B, 1, X, Y, Z) in [0, 1] to logits (B, 2): control, Alzheimer's disease."""
        if volume.device.type != "cpu":
            return self.classifier(self.features(to_memory_format(volume)).flatten(1))
        if not self.training:
            return self.classifier(self.features(volume).flatten(1))
        values = to_memory_format(volume)
        for conv, norm, relu, pool in self.blocks():
            stacks = values.shape[1] == 1 and torch.is_autocast_enabled("cpu")
            values = stacked_convolution(values, conv) if stacks else conv(values)
            values = norm_relu_pool(values, norm, pool) if norm.training else pool(relu(norm(values)))
        return self.classifier(values.flatten(1))

    def blocks(self) -> list["BlockLayers"]:
        """The layers of every block, from the scan to the classifier."""
        layers: list[Any] = list(self.features)
        return [BlockLayers(*layers[i : i + 4]) for i in range(0, len(layers), 4)]

    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The two linear layers, hidden and output."""
        hidden, _, _, output = self.classifier
        return cast(nn.Linear, hidden), cast(nn.Linear, output)


class BlockLayers(NamedTuple):
    """The four layers of one block."""

    conv: nn.Conv3d
    norm: nn.BatchNorm3d
    relu: nn.ReLU
    pool: nn.MaxPool3d


def parse_name(name: str) -> tuple[str, int]:
    """Split a model's name, "modelA24", into family and number of filters, ("A", 24).

    Raises:
        ValueError: the name is not "model", a family A-D and a width >= 1.
    """
    match = re.fullmatch(r"model([A-D])([1-9][0-9]{0,2})", name)
    if match is None:
        raise ValueError(
            f"unknown model '{name}': expected 'model', a family A-D and a number of filters, e.g. modelA24"
        )
    return match[1], int(match[2])


def depth(name: str) -> int:
    """The number of blocks of a network, from its name."""
    return len(FAMILIES[parse_name(name)[0]])


def output_edge(family: str, edge: int) -> int:
    """Length in voxels of one axis after the last pool, for an input axis of `edge` voxels."""
    for kernel, pool in FAMILIES[family]:
        edge = (edge - kernel + 1) // pool
    return edge


def largest_output(name: str, input_shape: tuple[int, int, int]) -> int:
    """Values of the largest layer's output for one scan: those of the first convolution."""
    family, width = parse_name(name)
    kernel, _ = FAMILIES[family][0]
    return width * prod(edge - kernel + 1 for edge in input_shape)


def smallest_edge(family: str) -> int:
    """The shortest input axis, in voxels, that leaves at least one voxel after the last pool."""
    edge = 1
    for kernel, pool in reversed(FAMILIES[family]):
        edge = edge * pool + kernel - 1
    return edge


def build_model(name: str, input_shape: tuple[int, int, int] = PUBLISHED_GRID) -> CNN3d:
    """Build an untrained network for scans of one grid.

    Args:
        name: "model", family A-D, number of filters >= 1; published widths are 24, 28, ..., 52.
        input_shape: (X, Y, Z) of the scans in voxels.

    Returns:
        The network, float32, in training mode, with PyTorch's default initialisation.

    Raises:
        ValueError: unknown name, or `input_shape` too small for the family.
    """
    family, width = parse_name(name)
    smallest = smallest_edge(family)
    if len(input_shape) != 3 or min(input_shape) < smallest:
        raise ValueError(
            f"{name} needs scans of at least {smallest}x{smallest}x{smallest} voxels, "
            f"got {'x'.join(map(str, input_shape))}"
        )
    blocks: list[nn.Module] = []
    channels = 1
    for kernel, pool in FAMILIES[family]:
        blocks += [
            nn.Conv3d(channels, width, kernel),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            nn.MaxPool3d(pool),
        ]
        channels = width
    in_features = width * prod(output_edge(family, edge) for edge in input_shape)
    classifier = nn.Sequential(
        nn.Linear(in_features, HIDDEN), nn.ReLU(), nn.Dropout(0.5), nn.Linear(HIDDEN, CLASSES)
    )
    return CNN3d(nn.Sequential(*blocks), classifier)


def check_arguments(model: nn.Module, volume: Tensor, target: Tensor) -> None:
    """Raise ValueError unless the arguments of an explanation method fit together."""
    if not isinstance(model, CNN3d):
        raise ValueError(f"expected a CNN3d, got {type(model).__name__}")
    if volume.ndim != 5 or volume.shape[1] != 1 or not volume.is_floating_point():
        raise ValueError(f"volume: expected floats (B, 1, X, Y, Z), got {volume.dtype} {tuple(volume.shape)}")
    if target.dtype != torch.int64 or target.shape != volume.shape[:1]:
        raise ValueError(f"target: expected int64 ({len(volume)},), got {target.dtype} {tuple(target.shape)}")
    if ((target < 0) | (target >= CLASSES)).any():
        raise ValueError(f"target: expected 0 or 1, got {target.tolist()}")


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient for the parameters; everything as found afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
