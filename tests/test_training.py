"""training.py: epochs, early stopping, losses that are not finite, and a state that is saved and restored."""

import itertools
import random
from pathlib import Path

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


def scans(n: int = 5) -> TensorDataset:
    return TensorDataset(
        torch.rand(n, 1, 6, 7, 8, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 2
    )


def shuffled() -> DataLoader:
    return DataLoader(scans(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(2))


def in_order(dataset: TensorDataset) -> DataLoader:
    return DataLoader(dataset, batch_size=2)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# An epoch ----------------------------------------------------------------------------------------


def test_epoch_is_a_plain_loop_over_the_scans():
    """The loop of PyTorch's documentation; the mean loss is over scans, the last batch being smaller."""
    state, plain = new_state(), new_state()
    torch.manual_seed(3)  # of dropout
    loss = training.train_epoch(state, in_order(scans()), "fp32", "fold 0")
    torch.manual_seed(3)
    losses = []
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


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_epoch_stops_at_a_loss_that_is_not_finite(batch):
    """It is looked at one step late, the last one's at the end."""
    dataset = scans()
    dataset.tensors[0][2 * (batch - 1)] = torch.inf
    with pytest.raises(InputError, match=rf"^fold 7, batch {batch}: the loss is nan; .* try a lower --lr$"):
        training.train_epoch(new_state(), in_order(dataset), "fp32", "fold 7")


def test_prediction_is_the_networks_answer_in_evaluation_mode():
    state, dataset = new_state(), scans()
    training.train_epoch(state, in_order(dataset), "fp32", "")  # BatchNorm's statistics are its own then
    logits, labels = training.predict(state.model, in_order(dataset))
    volumes, wanted = dataset.tensors
    with torch.no_grad():
        expected = state.model.eval()(volumes)
    # float32 sums of another order: all scans at once here, two there
    assert torch.allclose(logits, expected, rtol=0, atol=1e-6)
    assert torch.equal(labels, wanted)
    assert not logits.requires_grad
    loss, accuracy = training.evaluate(state.model, in_order(dataset))
    assert loss == pytest.approx(
        F.cross_entropy(expected, wanted).item(), abs=1e-6
    )  # over scans, not batches
    assert accuracy == pytest.approx((expected.argmax(1) == wanted).float().mean().item())


def test_plain_weights_are_copies_in_the_published_layout():
    model = assemble(((3, 1), (3, 2)), (6, 7, 8))
    model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    kept = training.plain_weights(model)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
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
    [
        ([3, 2, 1], 1, 0, 3, 3),
        ([1, 2, 3, 4], 10, 0, 1, 4),
        ([1, 2, 3, 0.5], 2, 0, 1, 3),
        ([1, 2, 3, 0.5], 3, 0, 4, 4),
        ([1, 2, 0.9, 2, 0.8, 2, 2, 0.1], 2, 0, 5, 7),
        ([1, 1, 1, 1], 3, 0, 1, 4),
        ([1, 0.95, 0.91, 0.85, 0.8], 10, 0.1, 4, 5),
        ([1, 0.95, 0.91, 0.85, 0.8], 2, 0.1, 1, 3),
        ([1, 0.75], 10, 0.25, 1, 2),
        ([9, 2], 10, 100, 1, 2),
        ([5], 1, 0, 1, 1),
    ],
)
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
    with pytest.raises(
        InputError, match=rf"^fold 0, epoch {len(losses)}, validation: the loss is (nan|inf);"
    ):
        stubbed(monkeypatch, tmp_path, losses)
    assert (tmp_path / "progress.pth").exists() == (len(losses) > 1)  # of the epoch before


# Saved and restored ------------------------------------------------------------------------------


def everything(state: TrainingState, shuffling: torch.Generator) -> dict[str, object]:
    """All that the next epoch depends on, seconds left out, comparable by ==."""
    weights = {**state.model.state_dict(), **{f"best {k}": v for k, v in state.best_weights.items()}}
    moments = {
        f"{number} {name}": value
        for number, entries in state.optimiser.state_dict()["state"].items()
        for name, value in entries.items()
    }
    found = {name: value.numpy().tobytes() for name, value in {**weights, **moments}.items()}
    generators = [torch.get_rng_state().tolist(), shuffling.get_state().tolist()]
    drawn = [random.getstate(), str(np.random.get_state())]
    course = [[row[:-1] for row in state.history], state.best_loss, state.epochs_without_improvement]
    return {**found, "random": [*generators, *drawn], "course": course, "devices": state.devices}


def train(folder: Path, seed: int, schedule: Schedule = SCHEDULE) -> tuple[TrainingState, dict[str, object]]:
    state, loader = new_state(seed), shuffled()
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    training.train(state, loader, in_order(scans()), schedule, folder / "progress.pth", "fold 0")
    return state, everything(state, loader.generator)


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_training_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys, epoch):
    """It ends in the middle of an epoch; another process, of other weights and random states, goes on."""
    (tmp_path / "whole").mkdir()
    _, expected = train(tmp_path / "whole", seed=0)
    honest, calls = training.evaluate, itertools.count(1)

    def evaluate(*args):
        if next(calls) == epoch:
            raise KeyboardInterrupt
        return honest(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", evaluate)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, seed=0)
    capsys.readouterr()
    again = 0 if epoch == 1 else 9  # there is nothing to go on from before the first epoch's end
    _, found = train(tmp_path, seed=again)
    said = f"fold 0: goes on after epoch {epoch - 1}\n"
    assert capsys.readouterr().out.startswith(said) == (epoch > 1)
    assert found == expected
    assert found != train(tmp_path / "whole", seed=0, schedule=Schedule(5, 9, 0, "fp32"))[1]


def test_state_names_the_devices_that_it_was_trained_on(tmp_path, monkeypatch):
    here, card = devices.describe(CPU), {"name": "NVIDIA H100", "cuda": "12.8", "cudnn": "9.10.2"}
    assert train(tmp_path, 0)[0].devices == [here]
    monkeypatch.setattr(devices, "describe", lambda device: card)
    assert train(tmp_path, 0)[0].devices == [here]  # nothing was left to train
    assert train(tmp_path, 0, Schedule(5, 9, 0, "fp32"))[0].devices == [here, card]
    assert train(tmp_path, 0, Schedule(6, 9, 0, "fp32"))[0].devices == [here, card]


def of_another_network(path: Path) -> None:
    state = training.new_state(models.build_model("modelB1", (94, 94, 94)), 1e-3, 0, CPU)
    state.save(path, torch.Generator())


def without_a_key(path: Path) -> None:
    """As an earlier version wrote it."""
    saved = torch.load(path, weights_only=True)
    torch.save({"course" if name == "state" else name: value for name, value in saved.items()}, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
        lambda path: path.write_bytes(b"progress"),
        of_another_network,
        without_a_key,
    ],
)
def test_progress_that_is_damaged_is_refused(tmp_path, damage):
    train(tmp_path, 0)
    damage(tmp_path / "progress.pth")
    with pytest.raises(InputError, match=r"progress\.pth: is damaged \(\w+\); remove it to train this fold"):
        train(tmp_path, 0)
