"""Whether a device computes what it should: small networks there, held against float64 on the CPU."""

import copy
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import devices
import models
from ggc import guided_gradcam
from ig import integrated_gradients
from lrp import lrp
from utils import InputError

BATCH = 2
GRADIENTS = "training gradients"
MAPS: dict[str, Callable[..., Tensor]] = {
    "LRP": lrp,
    "IG": lambda *arguments: one_step_of_ig(*arguments),
    "GGC": guided_gradcam,
}
# The largest difference that passes, as |found - exact| / |exact|. Sums of a few thousand products lose a few
# of the format's digits (24 bits in fp32, 11 in tf32, 8 in bf16). In maps and gradients more is lost: where
# two voxels of a pool's window nearly tie, another one wins.
TOLERANCES = {
    ("forward pass", "fp32"): 1e-4,
    (GRADIENTS, "fp32"): 0.02,
    ("maps", "fp32"): 0.05,
    (GRADIENTS, "tf32"): 0.2,
    (GRADIENTS, "bf16"): 0.7,
}


class Check(NamedTuple):
    """One piece of work of one network on a device."""

    model: str
    work: str
    precision: str
    difference: float  # |found - exact| / |exact|
    tolerance: float
    seconds: float
    bytes: int  # the most that was allocated on a CUDA device, else 0

    @property
    def right(self) -> bool:
        """Whether the difference is a number, and tolerable."""
        return self.difference <= self.tolerance


def open_device(name: str, precision: str = "fp32") -> torch.device:
    """Resolve `--device`, set its precision, and warn on stderr of what is known to be wrong with it.

    On MPS a small network is computed first, as PyTorch's 3D convolutions have returned wrong values there
    without a word.

    Raises:
        InputError: no such device, not this precision, or MPS computes something else than the CPU.
    """
    device = devices.resolve_device(name)
    devices.set_precision(device, precision)
    for fault in devices.known_faults(device, precision):
        print(f"warning: {fault}; `make device` checks this machine", file=sys.stderr)
    if device.type == "mps":
        require_right(device)
    return device


def require_right(device: torch.device) -> None:
    """Raise InputError unless the smallest network computes on a device what it does on the CPU."""
    try:
        wrong = [check for check in checks(device, "modelB2", ["fp32"]) if not check.right]
    except (RuntimeError, NotImplementedError, TypeError) as problem:  # an operation that is not there
        raise InputError(
            f"--device {device}: cannot run the networks ({problem}); use --device cpu"
        ) from problem
    if wrong:
        found = ", ".join(f"{check.work} off by {check.difference:.2g}" for check in wrong)
        raise InputError(
            f"--device {device}: PyTorch {torch.__version__} computes wrong values there ({found}); "
            "use --device cpu"
        )


def checks(device: torch.device, name: str, precisions: list[str]) -> Iterator[Check]:
    """Do every piece of work on a device: forward pass and maps in fp32, a training step's gradients in all.

    Args:
        device: where.
        name: of the network; its scans have the smallest edges that the family takes.
        precisions: of `devices.PRECISIONS`.

    Yields:
        A `Check` for each piece of work. Every one is done twice, and the second time is timed.
    """
    edge = models.smallest_edge(models.parse_name(name)[0])
    model, volume = lively_network(name, (edge, edge + 1, edge + 2))
    target = torch.arange(BATCH) % models.CLASSES
    exact, wide = copy.deepcopy(model).double(), volume.double()
    there = copy.deepcopy(model).to(device).to(memory_format=models.layout(device))  # type: ignore[call-overload]
    scans, wanted = volume.to(device), target.to(device)

    def check(work: str, precision: str, kind: str, found: Callable[[], Tensor], right: Tensor) -> Check:
        devices.set_precision(device, precision)
        difference, seconds, held = measured(found, right, device)
        return Check(name, work, precision, difference, TOLERANCES[kind, precision], seconds, held)

    with torch.no_grad():
        logits = exact.classifier(exact.features(wide).flatten(1))
        yield check("forward pass", "fp32", "forward pass", lambda: there(scans), logits)
    for work, explain in MAPS.items():
        right = explain(exact, wide, target)
        yield check(work, "fp32", "maps", lambda explain=explain: explain(there, scans, wanted), right)  # type: ignore[misc]
    right = plain_gradients(exact, wide, target)
    for precision in precisions:
        dtype = devices.PRECISIONS[precision]
        yield check(
            GRADIENTS, precision, GRADIENTS, lambda dtype=dtype: gradients(there, scans, wanted, dtype), right  # type: ignore[misc]
        )  # fmt: skip
    devices.set_precision(device, "fp32")


def one_step_of_ig(model: models.CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    """The second of two steps of IG. In the first the image is blank: windows tie, and rounding chooses."""
    two, first = (integrated_gradients(model, volume, target, steps=steps) for steps in (2, 1))
    return 2 * two - first


def measured(found: Callable[[], Tensor], right: Tensor, device: torch.device) -> tuple[float, float, int]:
    """Do something twice: the relative difference of its result, and the second time's seconds and bytes."""
    found()
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    result = found()
    synchronise(device)
    seconds = time.perf_counter() - begin
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    # to the CPU first: MPS has no float64
    difference = float((result.cpu().double() - right).norm() / right.norm())  # NaN for a map of zeros
    return difference, seconds, held


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


@torch.no_grad()
def lively_network(name: str, grid: tuple[int, int, int]) -> tuple[models.CNN3d, Tensor]:
    """A network as after training, and two scans (2, 1, X, Y, Z), zero around the head.

    BatchNorm has statistics of these scans. The weights of the last convolution and the linear layers are
    positive, so that no Grad-CAM, and no other map, is zero.
    """
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
            block.norm.momentum = 1.0  # the running statistics become these scans'
        for layer in (model.blocks()[-1].conv, *model.linears()):
            layer.weight.abs_()
        model(volume)
    return model.eval(), volume


def gradients(model: models.CNN3d, volume: Tensor, label: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradients of all parameters, one after the other, in a training step as train_cv.py makes it."""
    model.train()
    with torch.autocast(volume.device.type, dtype, enabled=dtype is not torch.float32):
        loss = F.cross_entropy(model(volume).float(), label)
    found = torch.autograd.grad(loss, list(model.parameters()))
    model.eval()
    return torch.cat([gradient.flatten() for gradient in found])


def plain_gradients(model: models.CNN3d, volume: Tensor, label: Tensor) -> Tensor:
    """The same by the layers as they stand."""
    model.train()
    loss = F.cross_entropy(model.classifier(model.features(volume).flatten(1)), label)
    found = torch.autograd.grad(loss, list(model.parameters()))
    model.eval()
    return torch.cat([gradient.flatten() for gradient in found])
