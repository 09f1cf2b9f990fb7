"""Where the numerical tests run: on every device that is there, in both layouts, and on a GPU's stand-in."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from standin import StandIn
from torch import Tensor

from internals import devices
from models import CNN3d

GPUS = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
KINDS = ["cpu", *(kind for kind, there in GPUS.items() if there), "stand-in for cuda"]
LAYOUTS = {"": torch.contiguous_format, ", channels last": torch.channels_last_3d}


class Place(NamedTuple):
    """A device and the layout in which scans and weights come to it."""

    kind: str
    layout: torch.memory_format

    @property
    def oracle(self) -> float:
        """What may differ from a float64 reference: rounding of float64 sums, on MPS of float32."""
        return 1e-2 if self.kind == "mps" else 1e-10

    @contextlib.contextmanager
    def entered(self) -> Iterator[torch.device]:
        """The device, as long as it is used, set up as the commands do it."""
        if self.kind != "stand-in for cuda":
            devices.set_precision(torch.device(self.kind), "fp32")
            yield torch.device(self.kind)
            return
        with pytest.MonkeyPatch.context() as patch, StandIn("cuda") as standin:
            patch.setattr(devices, "free_memory", lambda device: 2**20)
            patch.setattr(devices, "record_event", lambda device: lambda: None)
            devices.values_at_once.cache_clear()
            yield standin.device
        devices.values_at_once.cache_clear()

    def do(self, work: Callable[..., Tensor], model: CNN3d, *arguments: Any) -> Tensor:
        """work(model, *arguments) there, of a copy of the model; the result on the CPU, in float64."""
        with self.entered() as device:
            there = copy.deepcopy(model)
            there = self.placed(there.float() if self.kind == "mps" else there, device)
            return work(there, *(self.placed(argument, device) for argument in arguments)).cpu().double()

    def placed(self, what: Any, device: torch.device) -> Any:
        """A model or tensor on the device, in the layout; anything else as it is."""
        if isinstance(what, Tensor) and what.is_floating_point() and self.kind == "mps":
            what = what.float()
        if isinstance(what, torch.nn.Module) or (isinstance(what, Tensor) and what.ndim == 5):
            return what.to(device).to(memory_format=self.layout)  # type: ignore[call-overload]
        return what.to(device) if isinstance(what, Tensor) else what


PLACES = {f"{kind}{name}": Place(kind, layout) for kind in KINDS for name, layout in LAYOUTS.items()}


over_places = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
