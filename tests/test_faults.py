"""What happens to the commands when disk, memory or other processes fail: one line, and nothing lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from cohorts import AFFINE, SHAPE, TRAINED, contents, only_error, voxels, write_scan

import dataset
import figures
import heatmap
import overlap
import predict
import sanity
import simulate
import svm
import train_cv
import training
import ttest
from internals import nifti, storage
from internals.caches import Cache
from internals.errors import Failure

ROOT = Path(__file__).resolve().parents[1]
UNFINISHED = ("progress_", "findings_", "sums_", "found_")
COMMANDS: dict[str, tuple[ModuleType, str]] = {  # what fills each place
    "models": (train_cv, f"--path CSV {' '.join(TRAINED)} --cache disk --outpath AT/models"),
    "maps/IG-controls": (
        heatmap,
        "--method IG --steps 1 --baseline controls --save-subjects --modelpath AT/models --outpath AT/maps "
        "--device cpu",
    ),
    "predictions": (predict, "--path CSV --modelpath AT/models --outpath AT/predictions --device cpu"),
    "new/GGC": (
        heatmap,
        "--method GGC --scans CSV --modelpath AT/models --outpath AT/new --save-subjects --device cpu",
    ),
    "maps/SVM": (svm, "--modelpath AT/models --outpath AT/maps --C 1"),
    "ttest/TTEST": (ttest, "--path CSV --modelpath none --outpath AT/ttest --fold 4 --val-fraction 0.34"),
    "overlap": (
        overlap,
        "--maps AT/maps --outpath AT/overlap --reference AT/truth.nii --mask AT/mask.nii --smooth 0 "
        "--rank-smooth 0",
    ),
    "sanity": (
        sanity,
        "--maps AT/maps --modelpath AT/models --outpath AT/sanity --mask AT/mask.nii --scans-per-fold 1 "
        "--repeats 1 --device cpu --orders",
    ),
    "cohort": (simulate, "--outpath AT/cohort --subjects 4 --voxel 4"),
}


class World(NamedTuple):
    """Where every command has written its results, and what was written as a whole meanwhile."""

    folder: Path
    csv: Path
    written: set[Path]

    def call(self, place: str, more: str = "") -> int:
        """Run the command that fills a place."""
        command, options = COMMANDS[place]
        words = f"{options} {more}".split()
        return command.main([w.replace("AT", str(self.folder)).replace("CSV", str(self.csv)) for w in words])


@pytest.fixture(scope="module")
def world(csv, tmp_path_factory, few_points) -> World:
    """The results of all commands; read only."""
    world = World(tmp_path_factory.mktemp("world"), csv, set())
    block = np.zeros(SHAPE, np.uint8)  # a hundred random maps of a whole brain would take minutes
    block[30:45, 30:45, 30:45] = 1
    write_scan(world.folder / "mask.nii", block)
    write_scan(world.folder / "truth.nii", block * (voxels(0) > 900))
    with patch.object(storage, "atomic_write", wraps=storage.atomic_write) as write:
        assert [world.call(place) for place in COMMANDS] == [0] * len(COMMANDS)
    world.written.update(call.args[0] for call in write.call_args_list)
    return world


@pytest.fixture
def at(world, tmp_path) -> World:
    """The same results, to be changed: links, as commands put new files in the place of old ones."""
    shutil.copytree(world.folder, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    return world._replace(folder=tmp_path)


def test_every_file_of_every_command_is_written_as_a_whole(world):
    files = {path for place in COMMANDS for path in (world.folder / place).rglob("*") if path.is_file()}
    assert files - world.written == set()
    known, found = set[Any](), set[Any]()
    for place, (command, _) in COMMANDS.items():
        patterns = command.FILES.of_all() if command is not simulate else []
        known |= {(command, pattern) for pattern in patterns if not pattern.startswith(UNFINISHED)}
        found |= {(command, pattern) for pattern in patterns if list((world.folder / place).glob(pattern))}
    assert known - found == set()
    assert any(path.parent.name == "cache" for path in files)


HISTORY = pd.DataFrame([[1, 0.7, 0.7, 0.5, 9]], columns=training.HISTORY)
HEADER = nib.Nifti1Image(np.ones((4, 5, 6), np.int16), AFFINE).header
WRITERS: dict[str, Callable[[Path], object]] = {
    "a.csv": lambda path: storage.write_csv(HISTORY, path),
    "a.json": lambda path: storage.write_json({"epoch": 1}, path),
    "a.pth": lambda path: storage.write_tensors({"weight": torch.zeros(3)}, path),
    "a.nii": lambda path: nifti.save_map(np.zeros((4, 5, 6)), HEADER, path),
    "a.nii.gz": lambda path: nifti.save_map(np.zeros((4, 5, 6)), HEADER, path),
    "a.png": lambda path: figures.draw_training([HISTORY], 0.0, path),
    "scans-a.float32": lambda path: Cache("disk", path.parent).fill(
        (1, 4, 5, 6), "a", lambda keep: keep(0, np.ones((4, 5, 6), np.float32)), 1
    ),
}


@pytest.fixture
def full(monkeypatch) -> Callable[[Path], None]:
    """Let what is written to a path go to a device that is always full."""

    def fill(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{storage.PARTIAL}{path.name}").symlink_to("/dev/full")
        monkeypatch.setattr(storage, "remove_leftovers", lambda *_: None)  # or the link would be swept up

    return fill


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_leaves_the_old_file(name, full, tmp_path):
    (tmp_path / name).write_text("old")
    full(tmp_path / name)
    with pytest.raises(Failure, match=re.escape(f"{name}: cannot be written (No space left on device)")):
        WRITERS[name](tmp_path / name)
    assert contents(tmp_path) == {name: b"old"}


def results(folder: Path) -> dict[str, bytes]:
    """All files, less what names places, versions and seconds."""
    files = {name: content for name, content in contents(folder).items() if not name.endswith(".json")}
    for name in files:
        if name.startswith("history"):
            files[name] = b"\n".join(line.rsplit(b",", 1)[0] for line in files[name].splitlines())
    return files


@pytest.mark.parametrize(
    ("place", "name"),
    [("models", "history_f1.csv"), ("maps/IG-controls", "subjects/f1_00001_001.nii.gz"),
     ("predictions", "network_f0.csv"), ("new/GGC", "subjects/00003_003.png"),
     ("maps/SVM", "predictions.csv"), ("overlap", "overlap.png"), ("cohort", "scans/sub-003_T1w.nii.gz")],
)  # fmt: skip
def test_full_disk_is_one_line_and_the_call_goes_on(at, world, full, monkeypatch, capsys, place, name):
    shutil.rmtree(at.folder / place)
    full(at.folder / place / name)
    assert at.call(place) == 1
    words = f"{Path(name).name}: cannot be written (No space left on device)"
    *before, last = capsys.readouterr().err.splitlines(keepends=True)
    assert words in only_error(last)
    assert all("the run's own" in line for line in before)  # of new scans that are none
    assert [file for file in contents(at.folder / place) if storage.PARTIAL in file or ".lock" in file] == []
    monkeypatch.undo()
    assert at.call(place) == 0
    assert results(at.folder / place) == results(world.folder / place)


def test_killed_reading_process_is_one_line(at, monkeypatch, capfd):
    honest = dataset.read_scan

    def killed(*arguments: Any) -> np.ndarray:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*arguments)

    monkeypatch.setattr(dataset, "read_scan", killed)
    assert at.call("models", f"--outpath {at.folder}/new --cache none --workers 1") == 1
    assert "a process that reads scans ended; lower --workers" in only_error(capfd.readouterr().err)


# Training that may take a little more memory than it has when it begins.
STARVED = """
import resource, sys, train_cv
def starve(*_):
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**27, taken + 2**27))
    return honest(*_)
honest, train_cv.start = train_cv.start, starve
sys.exit(train_cv.main(sys.argv[1:]))
"""


def test_too_little_memory_is_one_line(csv, tmp_path):
    options = f"--path {csv} --outpath {tmp_path} {' '.join(TRAINED)} --batch 4 --model modelB24".split()
    command = [sys.executable, "-c", STARVED, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    line = only_error(done.stderr)
    words = ["out of memory", "--batch 4", "94x95x96", "modelB24", "cpu", "lower --batch"]
    assert [word for word in words if word not in line] == [], line
