"""bench/device.py: what a user runs first on a new card."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import selfcheck

sys.path.append(str(Path(selfcheck.__file__).parent / "bench"))
import device as bench

QUICK = ["--device", "cpu", "--model", "modelB2", "--training-model", "modelB1", "--subjects", "4"]


def test_a_device_that_is_right(capsys):
    assert bench.main(QUICK) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.strip().startswith("modelB2")]
    assert [row[-1] for row in rows] == ["right"] * 7
    assert [row[1] for row in rows] == ["forward", "forward", "LRP", "IG", "GGC", "training", "training"]
    assert [row[-5] for row in rows] == ["fp32", "bf16", *["fp32"] * 4, "bf16"]
    assert lines[-1] == "all rows are right"
    begin = "training, modelB1, 4 of 4 scans of 97x115x97 a step"
    training = [line for line in lines if line.startswith(begin)]
    assert [line.split("--cache ")[1].split(":")[0] for line in training] == ["auto", "ram"]
    assert all(float(re.search(r"([0-9.]+)% of it waiting", line)[1]) <= 100 for line in training)
    assert lines[0].startswith("name cpu, ")


def test_a_device_that_is_wrong_and_lacks_an_operation(monkeypatch, capsys):
    """Each has its row, and the rows that work are still there."""
    right, said = selfcheck.MAPS["IG"], "aten::max_pool3d_with_indices is not implemented for this device"

    def wrong(model: torch.nn.Module, volume: Tensor, target: Tensor) -> Tensor:
        return volume * (1 + (volume.dtype == torch.float32))

    def missing(model: torch.nn.Module, volume: Tensor, target: Tensor) -> Tensor:
        if volume.dtype == torch.float32:
            raise NotImplementedError(said)
        return right(model, volume, target)

    monkeypatch.setitem(selfcheck.MAPS, "GGC", wrong)
    monkeypatch.setitem(selfcheck.MAPS, "IG", missing)
    assert bench.main(QUICK) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[-1]: line.split() for line in lines if line.strip().startswith("modelB2 ")}
    assert (rows["WRONG"][1], rows["FAILED"][1]) == ("GGC", "IG")
    assert float(rows["WRONG"][3]) == pytest.approx(1)
    assert f"modelB2, IG: {said}" in lines
    assert sum(line.endswith("right") for line in lines[:-1]) == 5
    assert lines[-1].startswith("2 of 7 rows are not right")


def test_waiting_is_what_the_loader_takes(monkeypatch):
    """Three batches, two seconds each; the steps' five seconds do not count."""
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    class Slow:
        dataset = range(3)

        def __iter__(self):
            for number in self.dataset:
                clock[0] += 2
                yield number

    loader = bench.Timed(Slow())  # type: ignore[arg-type]
    for _ in loader:
        clock[0] += 5
    assert loader.seconds == 6
