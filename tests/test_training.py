"""training.py: epochs, early stopping, losses that are not finite, and a state that is saved and restored."""

import copy
import random
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import assemble
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import figures
import models
import training
from internals import devices
from internals.errors import InputError
from training import Schedule, TrainingState

CPU = torch.device("cpu")
SCHEDULE = Schedule(epochs=4, patience=9, delta=0, precision="fp32")


def new_state(seed: int = 0) -> TrainingState:
    """A network of two filters with BatchNorm and dropout, and Adam."""
    torch.manual_seed(seed)
    return training.new_state(assemble(((3, 2),), (6, 7, 8), width=2).float(), 1e-2, 1e-3, CPU)


def scans() -> TensorDataset:
    volumes = torch.rand(5, 1, 6, 7, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(volumes, torch.arange(5) % 2)


def shuffled() -> DataLoader:
    return DataLoader(scans(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(2))


def in_order(dataset: TensorDataset) -> DataLoader:
    return DataLoader(dataset, batch_size=2)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# An epoch ----------------------------------------------------------------------------------------


def test_epoch_and_prediction_are_plain_loops_over_the_scans():
    """The loop of PyTorch's documentation; mean losses are over scans, the last batch being smaller."""
    state, plain, losses = new_state(), new_state(), []
    torch.manual_seed(3)  # of dropout
    loss = training.train_epoch(state, in_order(scans()), "fp32", "fold 0")
    torch.manual_seed(3)
    plain.model.train()
    for volume, label in in_order(scans()):
        plain.optimiser.zero_grad()
        value = F.cross_entropy(plain.model(volume), label)
        value.backward()
        plain.optimiser.step()
        losses += [value.item()] * len(label)
    assert loss == pytest.approx(np.mean(losses), rel=1e-12)  # float64 sums of the same float32 losses
    assert equal(state.model.state_dict(), plain.model.state_dict())
    assert not equal(state.model.state_dict(), new_state().model.state_dict())

    volumes, wanted = scans().tensors
    logits, labels = training.predict(state.model, in_order(scans()))
    expected = plain.model.eval()(volumes)
    # float32 sums of another order: all scans at once here, two there
    assert torch.allclose(logits, expected, rtol=0, atol=1e-6)
    assert torch.equal(labels, wanted)
    assert not logits.requires_grad
    found = training.evaluate(state.model, in_order(scans()))
    right = (expected.argmax(1) == wanted).double().mean().item()
    assert found == pytest.approx((F.cross_entropy(expected, wanted).item(), right), abs=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_training_stops_at_a_loss_that_is_not_finite(tmp_path, batch):
    """It is looked at one step late, the last one's at the end."""
    dataset, progress = scans(), tmp_path / "progress.pth"
    dataset.tensors[0][2 * (batch - 1)] = torch.inf
    words = rf"^fold 7, epoch 1, batch {batch}: the loss is nan; .* try a lower --lr$"
    with pytest.raises(InputError, match=words):
        training.train(new_state(), in_order(dataset), in_order(scans()), SCHEDULE, progress, "fold 7")
    assert not progress.exists()


def test_plain_weights_are_copies_in_the_published_layout():
    layout = torch.channels_last_3d
    model = assemble(((3, 1), (3, 2)), (6, 7, 8)).to(memory_format=layout)  # type: ignore[call-overload]
    kept, expected = training.plain_weights(model), copy.deepcopy(model.state_dict())
    assert not model.state_dict()["features.4.weight"].is_contiguous()
    assert all(value.is_contiguous() for value in kept.values())
    with torch.no_grad():
        for values in model.parameters():
            values += 1
    assert equal(kept, expected)


# Early stopping ----------------------------------------------------------------------------------


def stubbed(monkeypatch, folder: Path, losses: list[float], patience: int = 10, delta=0.0) -> TrainingState:
    """Train with validation losses that are given; every epoch adds 1 to the last bias, from 0."""
    state, given = new_state(), iter(losses)
    torch.nn.init.zeros_(state.model.linears()[1].bias)

    def train_epoch(state, *_):
        with torch.no_grad():
            state.model.linears()[1].bias += 1
        return 0.5

    monkeypatch.setattr(training, "train_epoch", train_epoch)
    monkeypatch.setattr(training, "evaluate", lambda *_: (next(given), 0.75))
    schedule = Schedule(len(losses), patience, delta, "fp32")
    training.train(state, shuffled(), shuffled(), schedule, folder / "progress.pth", "fold 0")
    return state


@pytest.mark.parametrize(
    ("losses", "patience", "delta", "best", "epochs"),
    [([3, 2, 1], 1, 0, 3, 3), ([1, 2, 3, 0.5], 2, 0, 1, 3), ([1, 2, 3, 0.5], 3, 0, 4, 4),
     ([1, 2, 0.9, 2, 0.8, 2, 2, 0.1], 2, 0, 5, 7), ([1, 1, 1, 1], 3, 0, 1, 4),
     ([1, 0.95, 0.91, 0.85, 0.8], 10, 0.1, 4, 5), ([1, 0.95, 0.91, 0.85, 0.8], 2, 0.1, 1, 3),
     ([1, 0.75], 10, 0.25, 1, 2), ([9, 2], 10, 100, 1, 2), ([5], 1, 0, 1, 1)],
)  # fmt: skip
def test_early_stopping(monkeypatch, tmp_path, losses, patience, delta, best, epochs):
    state = stubbed(monkeypatch, tmp_path, losses, patience, delta)
    assert state.best_weights["classifier.3.bias"].tolist() == [best, best]
    assert state.best_loss == losses[best - 1]
    assert figures.best_row(losses[:epochs], delta) == best - 1  # the one that the figure marks
    columns = [list(column) for column in zip(*state.history, strict=True)]
    assert columns[:4] == [list(range(1, epochs + 1)), [0.5] * epochs, losses[:epochs], [0.75] * epochs]
    assert len(columns) == len(training.HISTORY)


@pytest.mark.parametrize("losses", [[float("nan")], [1.0, float("inf")]])
def test_validation_loss_that_is_not_finite_stops(monkeypatch, tmp_path, losses):
    words = rf"^fold 0, epoch {len(losses)}, validation: the loss is {losses[-1]};"
    with pytest.raises(InputError, match=words):
        stubbed(monkeypatch, tmp_path, losses)
    assert (tmp_path / "progress.pth").exists() == (len(losses) > 1)  # of the epoch before


# Saved and restored ------------------------------------------------------------------------------


def everything(state: TrainingState, shuffling: torch.Generator) -> object:
    """All that the next epoch depends on, seconds left out, comparable by ==."""
    moments = [value for of in state.optimiser.state_dict()["state"].values() for value in of.values()]
    tensors = [*state.model.state_dict().values(), *state.best_weights.values(), *moments]
    tensors += [torch.get_rng_state(), shuffling.get_state()]
    plain = [tensor.numpy().tobytes() for tensor in tensors], [row[:-1] for row in state.history]
    drawn = random.getstate(), str(np.random.get_state())
    return *plain, drawn, state.best_loss, state.epochs_without_improvement, state.devices


def train(folder: Path, seed: int, schedule: Schedule = SCHEDULE) -> tuple[TrainingState, object]:
    state, loader = new_state(seed), shuffled()
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    training.train(state, loader, in_order(scans()), schedule, folder / "progress.pth", "fold 0")
    return state, everything(state, loader.generator)


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_training_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys, epoch):
    """It ends in the middle of an epoch; another process, of other weights and random states, goes on."""
    (whole := tmp_path / "whole").mkdir()
    _, expected = train(whole, seed=0)
    with monkeypatch.context() as patch:
        ends = [DEFAULT] * (epoch - 1) + [KeyboardInterrupt]
        patch.setattr(training, "evaluate", Mock(wraps=training.evaluate, side_effect=ends))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, seed=0)
    capsys.readouterr()
    again = 0 if epoch == 1 else 9  # there is nothing to go on from before the first epoch's end
    _, found = train(tmp_path, seed=again)
    assert capsys.readouterr().out.startswith(f"fold 0: goes on after epoch {epoch - 1}\n") == (epoch > 1)
    assert found == expected
    assert found != train(whole, 0, Schedule(5, 9, 0, "fp32"))[1]


def test_state_names_the_devices_that_it_was_trained_on(tmp_path, monkeypatch):
    here, card = devices.describe(CPU), {"name": "NVIDIA H100", "cuda": "12.8", "cudnn": "9.10.2"}
    assert train(tmp_path, 0)[0].devices == [here]
    monkeypatch.setattr(devices, "describe", lambda device: card)
    assert train(tmp_path, 0)[0].devices == [here]  # nothing was left to train
    for epochs in (5, 6):
        assert train(tmp_path, 0, Schedule(epochs, 9, 0, "fp32"))[0].devices == [here, card]


@pytest.mark.parametrize("damage", ["cut", "text", "of another network", "of an earlier version"])
def test_progress_that_is_damaged_is_refused(tmp_path, damage):
    train(tmp_path, 0)
    path = tmp_path / "progress.pth"
    if damage == "of another network":
        model = models.build_model("modelB1", (94, 94, 94))
        training.new_state(model, 1e-3, 0, CPU).save(path, torch.Generator())
    elif damage == "of an earlier version":
        saved = torch.load(path, weights_only=True)
        torch.save({"course" if name == "state" else name: value for name, value in saved.items()}, path)
    else:
        path.write_bytes(path.read_bytes()[:-1000] if damage == "cut" else b"progress")
    with pytest.raises(InputError, match=r"progress\.pth: is damaged \(\w+\); remove it to train this fold"):
        train(tmp_path, 0)
