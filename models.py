"""The four published families of 3D convolutional networks.

A block is Conv3d (valid, stride 1), BatchNorm3d, ReLU, MaxPool3d (stride = kernel, floor); every
block of a network has the same number of filters. Flatten, Linear(., 64), ReLU, Dropout(0.5) and
Linear(64, 2) follow. Kernels, pools and layer names are those of Wang et al., NeuroImage
269:119929 (2023), so that published checkpoints load unchanged.
"""

import contextlib
import io
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from internals import storage
from internals.errors import InputError, blaming
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

# what torch.load raises on files that torch.save did not write, or that hold more than tensors
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    struct.error,
    AssertionError,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)
ZIP = b"PK\3\4"
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)
TENSOR_NAMES = (  # what a pickled state dict refers to
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (\w+Storage|Size)"
)


class CNN3d(nn.Module):
    """A network of one of the published families; see `build_model`."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, volume: Tensor) -> Tensor:
        """Map scans (B, 1, X, Y, Z) in [0, 1] to logits (B, 2): control, Alzheimer's disease."""
        if volume.device.type != "cpu":
            return self.classifier(self.features(in_layout(volume)).flatten(1))
        if not self.training:
            return self.classifier(self.features(volume).flatten(1))
        values = in_layout(volume)
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


def require_model(name: str, input_shape: tuple[int, int, int]) -> CNN3d:
    """`build_model` where name and scans are the user's: what does not fit is an InputError."""
    try:
        return build_model(name, input_shape)
    except ValueError as problem:
        raise InputError(f"--model: {problem}") from problem


def load_weights(model: CNN3d, path: Path, device: torch.device) -> CNN3d:
    """Load a plain state dict into `model`, and put it on `device` in evaluation mode.

    Only tensors are unpickled (`weights_only`), so a file that holds code is refused; one that is larger
    than the model's weights can be is not even opened.

    Raises:
        InputError: no such file, not a state dict, of another architecture, width or grid,
            or with weights that are not finite.
    """
    expected = model.state_dict()
    with blaming(path):
        try:
            content = _read_checkpoint(path, sum(values.nbytes for values in expected.values()))
            state = torch.load(content, map_location="cpu", weights_only=True)
        except UNREADABLE as problem:
            raise InputError(f"not a PyTorch state dict ({type(problem).__name__})") from problem
        if not isinstance(state, dict) or state.keys() != expected.keys():
            raise InputError("not the weights of this model (other layers)")
        for key, wanted in expected.items():
            _check_tensor(key, state[key], wanted)
    model.load_state_dict(state)
    return model.to(device).eval()


def _read_checkpoint(path: Path, needed: int) -> io.BytesIO:
    """A checkpoint's content, as long as neither it nor what it unpacks to is too large for the weights.

    Args:
        needed: bytes of the model's weights.

    Raises:
        InputError: too large, or it asks for more than tensors: `weights_only` allows a `bytearray`
            of any length, for one.
    """
    room = 4 * needed + 2**20  # weights may be stored in float64, and beside other things
    if storage.file_size(path, "checkpoint") > room:
        raise InputError(f"not a PyTorch state dict of this model: larger than {room} bytes")
    content = io.BytesIO(path.read_bytes())  # from a file, a pickle could ask for a text of any length
    if content.getvalue().startswith(ZIP):
        with zipfile.ZipFile(content) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > room:
                raise InputError(f"not a PyTorch state dict of this model: unpacks to over {room} bytes")
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    _check_pickle(io.BytesIO(archive.read(name)))
    else:
        for _ in range(5):  # magic number, protocol, machine, tensors, storages; the numbers follow
            _check_pickle(content)
    content.seek(0)
    return content


def _check_pickle(stream: io.BytesIO) -> None:
    """Read one pickle's instructions, without following them; InputError for a name that no weights need."""
    for instruction, name, _ in pickletools.genops(stream):
        if instruction.name == "GLOBAL" and not re.fullmatch(TENSOR_NAMES, str(name)):
            raise InputError(f"not a PyTorch state dict of plain tensors: it asks for {name}")


def _check_tensor(key: str, found: Any, wanted: Tensor) -> None:
    """Raise InputError where one entry of a state dict cannot take the place of `wanted`."""
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"{key} is {shape}, the model and grid need {tuple(wanted.shape)}")
    kind = FLOATS if wanted.is_floating_point() else INTEGERS
    if found.layout != torch.strided or found.device.type != "cpu" or found.dtype not in kind:
        raise InputError(f"{key} is a tensor of {found.dtype}, {found.layout}; expected {wanted.dtype}")
    if not torch.isfinite(found).all():
        raise InputError(f"{key} has values that are not finite")
    if key.endswith("running_var") and (found < 0).any():
        raise InputError(f"{key} has negative variances")


def layout(device: torch.device) -> torch.memory_format:
    """How values lie in memory: on CUDA as PyTorch has them, so that cuDNN chooses; else channels last.

    Channels last are the faster ones for a CPU's convolutions, and the ones that are right on MPS.
    """
    return torch.contiguous_format if device.type == "cuda" else torch.channels_last_3d


def in_layout(values: Tensor) -> Tensor:
    """The same values (B, C, X, Y, Z) in the layout of their device.

    The strides of a single channel fit either layout; PyTorch reads them as channels first unless they
    are spelled out.
    """
    wanted = layout(values.device)
    if wanted == torch.channels_last_3d and values.shape[1] == 1:
        values = values.squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return values.contiguous(memory_format=wanted)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
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
