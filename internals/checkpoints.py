"""Reading checkpoints: plain state dicts, from which nothing but a network's tensors is taken."""

import io
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from internals import storage
from internals.errors import InputError, blaming

# what torch.load raises on files that torch.save did not write, or that hold more than tensors
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error, AssertionError, OSError, EOFError,
    RuntimeError, ValueError, LookupError, TypeError, AttributeError,
)  # fmt: skip
ZIP_MAGIC = b"PK\3\4"
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)
TENSOR_NAMES = (  # what a pickled state dict refers to
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (\w+Storage|Size)"
)

Model = TypeVar("Model", bound=nn.Module)


def load_weights(model: Model, path: Path, device: torch.device) -> Model:
    """Load a plain state dict into `model`, and put it on `device` in evaluation mode.

    Only tensors are unpickled (`weights_only`), so a file that holds code is refused. A file that is larger
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


def _read_checkpoint(path: Path, weights: int) -> io.BytesIO:
    """The bytes of a checkpoint, unless they, packed or unpacked, are too many for the model's weights.

    Args:
        weights: bytes of the model's weights.

    Raises:
        InputError: too large, or it asks for more than tensors: `weights_only` allows a `bytearray`
            of any length, for one.
    """
    limit = 4 * weights + 2**20  # they may be stored in float64, and beside other things
    if storage.file_size(path, "checkpoint") > limit:
        raise InputError(f"not a PyTorch state dict of this model: larger than {limit} bytes")
    try:
        content = io.BytesIO(path.read_bytes())  # from a file, a pickle could ask for a text of any length
    except OSError as problem:
        raise InputError(f"cannot be read ({problem.strerror})") from problem
    if content.getvalue().startswith(ZIP_MAGIC):
        with zipfile.ZipFile(content) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > limit:
                raise InputError(f"not a PyTorch state dict of this model: unpacks to over {limit} bytes")
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    _check_pickle(io.BytesIO(archive.read(name)))
    else:
        for _ in range(5):  # magic number, protocol, machine, tensors, storages; the numbers follow
            _check_pickle(content)
    content.seek(0)
    return content


def _check_pickle(stream: io.BytesIO) -> None:
    """Read one pickle's instructions without executing them; InputError for a name that no tensor needs."""
    for instruction, name, _ in pickletools.genops(stream):
        if instruction.name == "GLOBAL" and not re.fullmatch(TENSOR_NAMES, str(name)):
            raise InputError(f"not a PyTorch state dict of plain tensors: it asks for {name}")


def _check_tensor(key: str, found: Any, wanted: Tensor) -> None:
    """Raise InputError where an entry of a state dict cannot replace the model's own, `wanted`."""
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"{key} is {shape}, the model and grid need {tuple(wanted.shape)}")
    dtypes = FLOATS if wanted.is_floating_point() else INTEGERS
    if found.layout != torch.strided or found.device.type != "cpu" or found.dtype not in dtypes:
        raise InputError(f"{key} is a tensor of {found.dtype}, {found.layout}; expected {wanted.dtype}")
    if not torch.isfinite(found).all():
        raise InputError(f"{key} has values that are not finite")
    if key.endswith("running_var") and (found < 0).any():
        raise InputError(f"{key} has negative variances")
