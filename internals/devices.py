"""The device that a command runs on: choosing it, setting it up, its known faults, sizes that suit it."""

import functools
import platform
import re
from collections.abc import Callable
from math import log2
from typing import NamedTuple

import torch
from torch import Tensor

from internals import sharing
from internals.errors import InputError

# of the forward and backward pass; tf32 is float32 whose factors CUDA's tensor cores round to 10 bits
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
MAX_TENSOR_VALUES = 2**31 - 1  # beyond, cuDNN's BatchNorm and PyTorch's pooling count wrongly
MAX_CHUNK_VALUES = 2**29  # values computed at once, however much memory there is


# Choosing and setting up -------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """Turn `--device` into a torch device, which becomes the current one where it is a GPU of CUDA.

    Args:
        name: a CUDA index ("0"), "cpu", "cuda", "cuda:1", "mps", or "auto": CUDA where there is one, else
            the CPU, and never MPS, whose 3D convolutions have been wrong (pytorch#197114). Of several
            processes that torchrun started here, each takes a GPU of its own.

    Raises:
        InputError: the device is not known or not there; an explicit choice never falls back.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = sharing.own_device(name, there)
    if name == "auto":
        name = "cuda" if there else "cpu"
    try:
        device = torch.device(f"cuda:{int(name)}" if name.isdecimal() else name)
    except (RuntimeError, ValueError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name}: expected a GPU number, cpu, cuda:N, mps or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device {name}: this machine has no MPS device; use --device cpu")
    if device.type != "cuda":
        return device
    device = torch.device("cuda", device.index or 0)
    if device.index >= there:
        number = f"{there} CUDA device{'s' * (there != 1)}"
        way_out = ", numbered from 0" if there else "; use --device cpu"
        raise InputError(f"--device {name}: this machine has {number}{way_out}")
    try:
        make_current(device)
        torch.zeros(1, device=device)
    except RuntimeError as problem:  # taken by another process, or too old or new for this PyTorch
        raise InputError(f"--device {name}: cannot be used ({problem})") from problem
    return device


def make_current(device: torch.device) -> None:
    """Make a CUDA device the calling thread's current one, which pinned memory, for one, belongs to."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A batch on a device. Only copies to CUDA do not wait: on MPS, such copies have lost values."""
    return values.to(device, non_blocking=device.type == "cuda")


def record_event(device: torch.device) -> Callable[[], None]:
    """A function that waits until a CUDA device has done all it was given so far; elsewhere a no-op."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def set_precision(device: torch.device, precision: str) -> None:
    """Make float32 mean float32 on a GPU, or TF32 where `precision` says so; and cuDNN reproducible.

    Raises:
        InputError: the device does not have this precision.
    """
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise InputError(f"--precision tf32: {describe(device)['name']} has no TF32; use fp32")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise InputError(f"--precision bf16: {describe(device)['name']} has no bfloat16; use fp32")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # PyTorch's own default is True
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def describe(device: torch.device) -> dict[str, str]:
    """What results may depend on: the device's name, on CUDA also its version and cuDNN's."""
    if device.type == "cuda":
        cuda, cudnn = str(torch.version.cuda), _cudnn_release(torch.backends.cudnn.version() or 0)
        return {"name": torch.cuda.get_device_name(device), "cuda": cuda, "cudnn": cudnn}
    if device.type == "mps":
        return {"name": f"mps, macOS {platform.mac_ver()[0]}"}
    return {"name": f"cpu, {torch.backends.cpu.get_cpu_capability()}"}


def _cudnn_release(version: int) -> str:
    """cuDNN's version number, 91002 (8907 before 9), as people write it: 9.10.2."""
    major, rest = divmod(version, 10_000 if version >= 10_000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


# Memory format -----------------------------------------------------------------------------------


def memory_format(device: torch.device) -> torch.memory_format:
    """The order of values in memory that suits a device's convolutions.

    Channels last is faster on a CPU, and right on MPS where channels first has been wrong. On CUDA, cuDNN
    chooses its formats itself.
    """
    return torch.contiguous_format if device.type == "cuda" else torch.channels_last_3d


def to_memory_format(values: Tensor) -> Tensor:
    """The same values (B, C, X, Y, Z) in the `memory_format` of their device.

    The strides of a single channel fit either format; PyTorch reads them as channels first unless they
    are spelled out.
    """
    wanted = memory_format(values.device)
    if wanted == torch.channels_last_3d and values.shape[1] == 1:
        values = values.squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return values.contiguous(memory_format=wanted)


# Known faults ------------------------------------------------------------------------------------


class Versions(NamedTuple):
    """What a fault may depend on."""

    torch: tuple[int, ...]  # (2, 13, 0)
    cudnn: int  # 91002 is 9.10.2
    capability: tuple[int, int]  # (9, 0) is an H100's or H200's
    precision: str


def _is_faulty_cudnn(cudnn: int) -> bool:
    """Whether PyTorch, since 2.9.1, avoids this cuDNN for 3D convolutions in bfloat16."""
    return 90_800 <= cudnn < 91_500


FAULTS: dict[str, Callable[[Versions], bool]] = {
    "cuDNN 9.8 to 9.14 can return wrong 3D convolutions in bfloat16 (pytorch#163539); install 9.15 or later":
        lambda v: v.precision == "bf16" and v.torch < (2, 9) and _is_faulty_cudnn(v.cudnn),
    "PyTorch 2.9.0 bypasses cuDNN for 3D convolutions in bfloat16, slowly and in three times the memory "
    "(pytorch#166643); update PyTorch":
        lambda v: v.precision == "bf16" and v.torch == (2, 9, 0),
    "PyTorch bypasses cuDNN 9.8 to 9.14 for 3D convolutions in bfloat16, slowly and in three times the "
    "memory (pytorch#166643); install cuDNN 9.15 or later":
        lambda v: v.precision == "bf16" and v.torch > (2, 9, 0) and _is_faulty_cudnn(v.cudnn),
    "cuDNN 9.10.2 to 9.15 has a broken 3D convolution in TF32 (pytorch#167024); use --precision fp32":
        lambda v: v.precision == "tf32" and 91_002 <= v.cudnn < 91_600,
    "wrong gradients of cuDNN were reported for such cards with PyTorch 2.6 (pytorch#150700); update PyTorch":
        lambda v: v.capability == (9, 0) and v.torch < (2, 7),
}  # fmt: skip


def known_faults(device: torch.device, precision: str) -> list[str]:
    """The known faults of the installed versions on a CUDA device, one line each; none elsewhere."""
    if device.type != "cuda":
        return []
    release = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:3])
    capability, cudnn = torch.cuda.get_device_capability(device), torch.backends.cudnn.version() or 0
    versions = Versions(release, cudnn, capability, precision)
    return [fault for fault, applies in FAULTS.items() if applies(versions)]


# Sizes -------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that this process may still take, its allocator's reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@functools.cache
def values_at_once(device: torch.device, on_cpu: int) -> int:
    """How many float32 values to compute at once.

    On a CPU it is what suits the caches, `on_cpu`. A GPU wants large chunks: 1/32 of the memory that is free
    at the first call, as a power of two, so that the same card takes the same chunks each time.
    """
    if device.type != "cuda":
        return on_cpu
    fitting = 2 ** int(log2(max(free_memory(device) // (32 * 4), 1)))
    return min(fitting, MAX_CHUNK_VALUES)


def training_memory(batch: int, per_scan: int) -> int:
    """Peak memory of a training step, in bytes: about five times the largest layer's output in float32."""
    return 5 * 4 * batch * per_scan


def check_batch(batch: int, per_scan: int, device: torch.device) -> None:
    """Raise InputError where a GPU's tensors would have more values than can be counted there.

    Args:
        batch: scans at once.
        per_scan: values of the largest layer's output for one scan.
    """
    if device.type == "cpu" or batch * per_scan <= MAX_TENSOR_VALUES:
        return
    largest = MAX_TENSOR_VALUES // per_scan
    way_out = f"the largest batch that works is {largest}" if largest else "no batch works; use --device cpu"
    raise InputError(
        f"--batch {batch}: a layer's output has {batch * per_scan} values, more than 2^31 - 1, which a GPU's "
        f"libraries cannot count; {way_out}"
    )


def describe_batch(batch: int, shape: tuple[int, ...], model: str, device: torch.device) -> str:
    """What is done at once, and where, as an error about too little memory says it."""
    return f"--batch {batch} of {'x'.join(map(str, shape))} voxels, {model}, on {device}"
