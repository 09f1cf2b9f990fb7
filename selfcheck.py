"""Whether a device computes what it should: small networks there, held against float64 on the CPU."""

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from ggc import guided_gradcam
from ig import integrated_gradients
from internals import devices, sharing
from internals.errors import InputError
from lrp import lrp

BATCH = 2
FORWARD, GRADIENTS = "forward pass", "training gradients"
# The largest relative difference that passes. Sums of a few thousand products lose a few of the format's bits
# (24 in fp32, 11 in tf32, 8 in bf16). Maps and gradients lose more: where two voxels of a pool's window
# nearly tie, rounding decides which is the maximum. A gradient that is missing or noise is off by 1 or more.
TOLERANCES = {
    (FORWARD, "fp32"): 1e-4,
    (FORWARD, "tf32"): 0.01,
    (FORWARD, "bf16"): 0.05,
    ("maps", "fp32"): 0.05,
    (GRADIENTS, "fp32"): 0.1,
    (GRADIENTS, "tf32"): 0.4,
    (GRADIENTS, "bf16"): 0.9,
}


class Check(NamedTuple):
    """One piece of work of one network on a device."""

    model: str
    work: str
    precision: str
    tolerance: float
    difference: float  # see `relative_difference`
    seconds: float
    bytes: int  # the most that was allocated on a CUDA device, else 0
    problem: str = ""  # the error, where there was no result

    @property
    def passed(self) -> bool:
        """Whether the difference is a number, and within the tolerance."""
        return self.difference <= self.tolerance


def open_device(name: str, precision: str = "fp32") -> torch.device:
    """Resolve `--device`, set its precision and threads, and warn on stderr of its known faults.

    On MPS a small network is computed first, as PyTorch's 3D convolutions have returned wrong values there
    without any error.

    Raises:
        InputError: no such device, not this precision, or MPS computes something else than the CPU.
    """
    device = devices.resolve_device(name)
    sharing.share_threads()
    if device.type == "mps":
        require_correct(device, precision)
    devices.set_precision(device, precision)
    for fault in devices.known_faults(device, precision):
        print(f"warning: {fault}; `make device` checks this machine", file=sys.stderr)
    return device


def require_correct(device: torch.device, precision: str = "fp32") -> None:
    """Raise InputError unless the smallest network computes on a device what it does on the CPU."""
    found = list(checks(device, "modelB2", sorted({"fp32", precision})))
    for check in found:
        if check.problem:
            raise InputError(
                f"--device {device}: cannot run the networks ({check.problem}); use --device cpu"
            )
    wrong = ", ".join(f"{check.work} off by {check.difference:.2g}" for check in found if not check.passed)
    if wrong:
        raise InputError(
            f"--device {device}: PyTorch {torch.__version__} computes wrong values there ({wrong}); "
            "use --device cpu"
        )


def checks(device: torch.device, name: str, precisions: list[str]) -> Iterator[Check]:
    """Do every piece of work on a device: maps in fp32, forward pass and a training step's gradients in all.

    Args:
        device: where.
        name: of the network; its scans have the smallest edges that the family takes.
        precisions: of `devices.PRECISIONS`.

    Yields:
        A `Check` for each piece of work. Every one is done twice, and the second time is timed.
    """
    model, volume = example_network(name)
    target = torch.arange(BATCH) % models.CLASSES
    exact = copy.deepcopy(model).double(), volume.double(), target
    model = model.to(device).to(memory_format=devices.memory_format(device))  # type: ignore[call-overload]
    there = model, volume.to(device), target.to(device)

    pieces: list[tuple[str, Callable[..., Tensor], list[str]]]
    pieces = [(method, explain, ["fp32"]) for method, explain in MAPS.items()]
    pieces = [(FORWARD, torch.no_grad()(logits), precisions), *pieces, (GRADIENTS, gradients, precisions)]
    for kind, work, tried in pieces:
        reference = work(*exact)
        sizes = kernel_sizes(model) if kind == GRADIENTS else []
        for precision in tried:
            devices.set_precision(device, precision)
            options = {} if kind in MAPS else {"dtype": devices.PRECISIONS[precision]}
            problem, found = "", (math.nan, math.nan, 0)
            try:
                found = measure(partial(work, *there, **options), reference, device, sizes)
            except (RuntimeError, TypeError) as error:  # no such operation or type, or too little memory
                problem = str(error)
            tolerance = TOLERANCES["maps" if kind in MAPS else kind, precision]
            yield Check(name, kind, precision, tolerance, *found, problem)
    devices.set_precision(device, "fp32")


def measure(
    do: Callable[[], Tensor], reference: Tensor, device: torch.device, sizes: Sequence[int] = ()
) -> tuple[float, float, int]:
    """Do something twice: its `relative_difference`, and the second time's seconds and bytes."""
    do()
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    result = do()
    synchronise(device)
    seconds = time.perf_counter() - begin
    allocated = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    result = result.cpu().double()  # in this order: MPS has no float64
    return relative_difference(result, reference, sizes), seconds, allocated


def relative_difference(found: Tensor, reference: Tensor, sizes: Sequence[int] = ()) -> float:
    """|found - reference| / |reference|, NaN where the reference is all zero.

    Args:
        sizes: lengths of the first parts of both; then it is the largest of these parts and of the whole.
    """
    pairs = [(found, reference)]
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        pairs.append((found[end - size : end], reference[end - size : end]))
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


# The pieces of work ------------------------------------------------------------------------------


@torch.no_grad()
def example_network(name: str) -> tuple[models.CNN3d, Tensor]:
    """A network as after training, and two scans (2, 1, X, Y, Z) of its smallest grid, zero around the head.

    BatchNorm has statistics of these scans and of the same at half their brightness, where IG has a step. The
    weights of the last convolution and the linear layers are positive, so that no map is zero.
    """
    edge = models.smallest_edge(models.parse_name(name)[0])
    grid = (edge, edge + 1, edge + 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        volume = torch.zeros(BATCH, 1, *grid)
        head = volume[:, :, 8:-9, 7:-6, 5:-8]
        head.copy_(torch.rand(head.shape))
        model = models.build_model(name, grid)
        model.classifier[2].p = 0.0  # type: ignore[assignment]  # dropout draws otherwise on every device
        for block in model.blocks():
            block.norm.weight.uniform_(0.5, 1.5)
            block.norm.bias.uniform_(0.2, 1)
            block.norm.momentum = 1.0  # the running statistics become those of what comes next
        model.blocks()[-1].norm.bias.add_(2)  # of its few units some are to be open for every scan
        for layer in (model.blocks()[-1].conv, *model.linears()):
            layer.weight.abs_()
        model(torch.cat([volume, volume / 2]))
    return model.eval(), volume


def logits(model: models.CNN3d, volume: Tensor, label: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The logits as the commands compute them, or without a dtype layer by layer, which is the reference."""
    if dtype is None:
        return model.classifier(model.features(volume).flatten(1))
    with torch.autocast(volume.device.type, dtype, enabled=dtype is not torch.float32):
        return model(volume).float()


def gradients(model: models.CNN3d, volume: Tensor, label: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The gradients of the `compared_parameters` in a training step, from `logits`."""
    model.train()
    loss = F.cross_entropy(logits(model, volume, label, dtype), label)
    found = torch.autograd.grad(loss, compared_parameters(model))
    model.eval()
    return torch.cat([gradient.flatten() for gradient in found])


def compared_parameters(model: models.CNN3d) -> list[nn.Parameter]:
    """The parameters whose gradients are compared: all kernels and matrices, then the vectors.

    Without the convolutions' biases, which BatchNorm takes out again: their gradients are rounding alone.
    """
    cancelled = [block.conv.bias for block in model.blocks()]
    chosen = [p for p in model.parameters() if not any(p is bias for bias in cancelled)]
    return sorted(chosen, key=lambda parameter: parameter.ndim == 1)


def kernel_sizes(model: models.CNN3d) -> list[int]:
    """The sizes of the kernels and matrices, which are compared one by one; a vector's may nearly be zero."""
    return [parameter.numel() for parameter in compared_parameters(model) if parameter.ndim > 1]


def one_step_of_ig(model: models.CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    """The second of two steps of IG. In the first the image is blank: windows tie, and rounding decides."""
    two, first = (integrated_gradients(model, volume, target, steps=steps) for steps in (2, 1))
    return 2 * two - first


MAPS: dict[str, Callable[..., Tensor]] = {"LRP": lrp, "IG": one_step_of_ig, "GGC": guided_gradcam}
