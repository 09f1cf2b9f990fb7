"""What happens to the commands when disk, memory or other processes fail: one line, and nothing lost."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cohorts import MODEL, SHAPE, contents, only_error, voxels, write_cohort, write_scan

import classifier_scores
import dataset
import heatmap
import overlap
import svm
import train_cv
from internals import storage

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def _few_draws():
    """Fifty bootstrap draws in place of a thousand, for speed; test_metrics.py has the bootstrap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_scores, "DRAWS", 50)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A cohort, a run, maps of two methods with their overlap, and a reference; read only."""
    folder = tmp_path_factory.mktemp("world")
    write_cohort(folder)
    write_reference(folder)
    for place in COMMANDS:
        assert call(place, folder) == 0
    return folder


def write_reference(folder: Path) -> None:
    """A small block as mask, as a hundred random maps of the whole grid would take minutes; a part of it."""
    block = np.zeros(SHAPE, bool)
    block[30:60, 30:60, 30:60] = True
    write_scan(folder / "mask.nii", block.astype(np.uint8))
    write_scan(folder / "reference.nii", (block & (voxels(0) > 900)).astype(np.uint8))


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "models": (
        train_cv.main,
        f"--path AT/data.csv --outpath AT/models --model {MODEL} --device cpu --batch 3 --fold 2 --epochs 2 "
        "--val-fraction 0.34",
    ),
    "maps/LRP": (
        heatmap.main,
        "--method LRP --modelpath AT/models --outpath AT/maps --device cpu --save-subjects",
    ),
    "maps/SVM": (svm.main, "--modelpath AT/models --outpath AT/maps --C 1"),
    "overlap": (
        overlap.main,
        "--maps AT/maps --outpath AT/overlap --reference AT/reference.nii --mask AT/mask.nii --smooth 0 "
        "--rank-smooth 4",
    ),
}


def call(place: str, at: Path, more: str = "") -> int:
    """Run the command that fills a place."""
    main, options = COMMANDS[place]
    return main([word.replace("AT", str(at)) for word in f"{options} {more}".split()])


FILES = {
    "models": [
        *["run.json", "folds.csv", "progress_f0.pth", "history_f1.csv", "state_dict_f0.pth"],
        *["predictions.csv", "metrics.csv", "training.png"],
    ],
    "maps/LRP": [
        *["map.json", "map_f1.nii.gz", "subjects.csv", "map_all.nii.gz", "map_all.png", "mean_scan.nii.gz"],
        "subjects/f0_00000_000.nii.gz",
    ],
    "maps/SVM": ["map.json", "predictions.csv", "metrics.csv", "map_f0.nii.gz", "weights_f1.nii.gz"],
    "overlap": ["overlap.json", "overlap.csv", "overlap_ranked.csv", "overlap.png"],
}


@pytest.fixture
def at(world, tmp_path) -> Path:
    """The world, to be changed."""
    for item in world.iterdir():
        if item.name in ("scans", "data.csv", "reference.nii", "mask.nii"):
            (tmp_path / item.name).symlink_to(item)
        else:
            shutil.copytree(item, tmp_path / item.name)
    return tmp_path


def results(folder: Path) -> dict[str, bytes]:
    """All files, less what names places, versions and seconds."""
    files = dict(contents(folder))
    for name in list(files):
        if name.endswith(".json"):
            del files[name]
        elif Path(name).name.startswith("history"):
            files[name] = b"\n".join(line.rsplit(b",", 1)[0] for line in files[name].splitlines())
    return files


@pytest.mark.parametrize(("place", "name"), [(place, name) for place in FILES for name in FILES[place]])
def test_full_disk_is_one_line_and_the_same_command_goes_on(at, world, monkeypatch, capsys, place, name):
    shutil.rmtree(at / place)
    (at / place / name).parent.mkdir(parents=True)
    # what is written there goes to a device that is always full; what a crash left is not swept up meanwhile
    (at / place / name).with_name(f".partial-{Path(name).name}").symlink_to("/dev/full")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_leftovers", lambda *_: None)
        assert call(place, at) == 1
    line = only_error(capsys.readouterr().err)
    assert f"{Path(name).name}: cannot be written (No space left on device)" in line
    assert not [file for file in contents(at / place) if ".partial" in file or ".lock" in file]
    assert call(place, at) == 0
    assert results(at / place) == results(world / place)


def test_folder_that_is_removed_is_not_made_again(at, monkeypatch, capsys):
    honest = train_cv.train_epoch

    def remove(*args):
        shutil.rmtree(at / "new")
        return honest(*args)

    monkeypatch.setattr(train_cv, "train_epoch", remove)
    assert call("models", at, "--outpath AT/new") == 1
    assert "new: cannot be written and locked (No such file" in only_error(capsys.readouterr().err)
    assert not (at / "new").exists()


def test_killed_reading_process_is_one_line(at, monkeypatch, capfd):
    honest = dataset.read_scan

    def killed(file: Path) -> np.ndarray:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(file)

    monkeypatch.setattr(dataset, "read_scan", killed)
    assert call("models", at, "--outpath AT/new --cache none --workers 1") == 1
    line = only_error(capfd.readouterr().err)
    assert "a process that reads scans ended" in line
    assert "--workers" in line


# Training that may take a little more memory than it has when it begins.
STARVED = """
import resource, sys, train_cv, utils
def starve(*_):
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**27, taken + 2**27))
    return honest(*_)
honest, train_cv.new_training = train_cv.new_training, starve
sys.exit(train_cv.main(sys.argv[1:]))
"""


def test_too_little_memory_is_one_line(at):
    options = f"{COMMANDS['models'][1]} --outpath AT/new --batch 4 --model modelB24"
    command = [sys.executable, "-c", STARVED, *options.replace("AT", str(at)).split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    line = only_error(done.stderr)
    words = ["out of memory", "--batch 4", "94x95x96", "modelB24", "cpu", "lower --batch"]
    assert all(word in line for word in words), line
