"""How a network is trained: epochs, early stopping on the validation loss, prediction."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
import utils
from internals import devices, process, storage
from internals.checkpoints import UNREADABLE
from internals.errors import InputError
from internals.loading import Loader

HISTORY = ["epoch", "train_loss", "valid_loss", "valid_accuracy", "seconds"]


@dataclass(frozen=True)
class Schedule:
    """How long, and how, a network is trained."""

    epochs: int  # at most
    patience: int  # epochs without improvement, then it ends
    delta: float  # smallest fall of the validation loss that is an improvement
    precision: str  # of the forward and backward pass, a key of devices.PRECISIONS


@dataclass
class TrainingState:
    """All that the next epoch depends on, but for the scans."""

    model: models.CNN3d
    optimiser: torch.optim.Optimizer
    history: list[list[float]] = field(default_factory=list)  # one row of HISTORY per epoch
    best_loss: float = float("inf")  # the smallest validation loss
    epochs_without_improvement: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # of the best epoch, on the CPU
    devices: list[dict[str, str]] = field(default_factory=list)  # that it was trained on so far

    def goes_on(self, schedule: Schedule) -> bool:
        """Whether another epoch follows."""
        epochs, waited = len(self.history), self.epochs_without_improvement
        return epochs < schedule.epochs and waited < schedule.patience

    def save(self, path: Path, shuffling: torch.Generator) -> None:
        """Write it, with the state of every random generator."""
        device = next(self.model.parameters()).device
        state = {name: value for name, value in vars(self).items() if name not in ("model", "optimiser")}
        tensors = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        random = {"random": process.random_states(device), "loader": shuffling.get_state()}
        storage.write_tensors({**tensors, **random, "state": state}, path)

    def restore(self, path: Path, shuffling: torch.Generator) -> None:
        """Go back to what `save` wrote, random generators included.

        Raises:
            InputError: the file is damaged.
        """
        try:
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimiser.load_state_dict(saved["optimiser"])
            shuffling.set_state(saved["loader"])
            process.restore_random(saved["random"], next(self.model.parameters()).device)
            vars(self).update(saved["state"])
        except torch.OutOfMemoryError:
            raise
        except UNREADABLE as problem:
            reason = f"is damaged ({type(problem).__name__}); remove it to train this fold from its start"
            raise InputError(f"{path}: {reason}") from problem


def new_state(model: models.CNN3d, lr: float, wd: float, device: torch.device) -> TrainingState:
    """The beginning: a network on its device, Adam, nothing learned."""
    model = model.to(device).to(memory_format=devices.memory_format(device))  # type: ignore[call-overload]
    return TrainingState(model, torch.optim.Adam(model.parameters(), lr=lr, weight_decay=wd))


def train(
    state: TrainingState, train: Loader, val: Loader, schedule: Schedule, progress: Path, name: str
) -> None:
    """Train until the validation loss has not improved for `schedule.patience` epochs.

    After every epoch the state is written to `progress`; where that file exists, training goes on from there,
    as if it had never stopped.
    """
    shuffling = cast(torch.Generator, train.generator)
    if progress.exists():
        state.restore(progress, shuffling)
        print(f"{name}: goes on after epoch {len(state.history)}")
    with process.steps() as finish_step:
        while state.goes_on(schedule):
            line = train_and_validate(state, train, val, schedule, name)
            state.save(progress, shuffling)
            print(line, flush=True)
            finish_step()


def train_and_validate(
    state: TrainingState, train: Loader, val: Loader, schedule: Schedule, name: str
) -> str:
    """One epoch; the state holds what came of it, and the line that is returned says it."""
    begin, epoch = time.perf_counter(), len(state.history) + 1
    here = devices.describe(next(state.model.parameters()).device)
    train_loss = train_epoch(state, train, schedule.precision, f"{name}, epoch {epoch}")
    valid_loss, accuracy = evaluate(state.model, val)
    check_loss(valid_loss, f"{name}, epoch {epoch}, validation")
    state.devices += [] if here in state.devices else [here]
    seconds = time.perf_counter() - begin
    state.history.append([epoch, train_loss, valid_loss, accuracy, seconds])
    state.epochs_without_improvement += 1
    improved = valid_loss < state.best_loss - schedule.delta
    if improved:
        state.best_loss, state.epochs_without_improvement = valid_loss, 0
        state.best_weights = plain_weights(state.model)
    return (
        f"{name}, epoch {epoch}: training loss {train_loss:.4f}, validation loss {valid_loss:.4f}, "
        f"accuracy {accuracy:.3f}, {seconds:.1f} s{', best' if improved else ''}"
    )


def train_epoch(state: TrainingState, loader: Loader, precision: str, name: str) -> float:
    """One pass over the training scans; returns the mean loss.

    A loss is looked at one step late: to look is to wait for the GPU, which then has the next step to do.
    """
    model, dtype = state.model.train(), devices.PRECISIONS[precision]
    device = next(model.parameters()).device
    total = 0.0
    unseen: deque[tuple[Tensor, Callable[[], None], int]] = deque()  # losses, on their way to the CPU

    def look(number: int) -> float:
        loss, wait, scans = unseen.popleft()
        wait()
        check_loss(loss.item(), f"{name}, batch {number}")
        return loss.item() * scans

    for number, (volume, label) in enumerate(utils.progress(loader, desc=name, leave=False)):
        volume, label = devices.to_device(volume, device), devices.to_device(label, device)
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(model(volume).float(), label)
        state.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        state.optimiser.step()
        seen = loss.detach().to("cpu", non_blocking=device.type == "cuda")
        unseen.append((seen, devices.record_event(device), len(label)))
        total += look(number) if len(unseen) > 1 else 0
    return (total + look(len(loader))) / len(loader.dataset)  # type: ignore[arg-type]


@torch.no_grad()
def predict(model: nn.Module, loader: Loader) -> tuple[Tensor, Tensor]:
    """Logits (N, 2) and labels (N,) of all scans of a loader, on the CPU, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    logits, labels = [], []
    for volume, label in loader:
        logits.append(model(devices.to_device(volume, device)).float().cpu())
        labels.append(label)
    return torch.cat(logits), torch.cat(labels)


def evaluate(model: nn.Module, loader: Loader) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over all scans of a loader."""
    logits, labels = predict(model, loader)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def check_loss(loss: float, where: str) -> None:
    """Raise InputError where the loss is not finite."""
    if not np.isfinite(loss):
        raise InputError(f"{where}: the loss is {loss}; nothing of this epoch is saved, try a lower --lr")


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state dict on the CPU, in the published layout."""
    return {
        key: value.detach().to("cpu", copy=True).contiguous() for key, value in model.state_dict().items()
    }
