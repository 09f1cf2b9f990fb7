"""storage.py: locks, whole files, records, output folders."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cohorts import contents

from internals import storage
from internals.errors import Failure, InputError

SHAPE = (4, 5, 6)
ROOT = Path(__file__).resolve().parents[1]


# Whole files -------------------------------------------------------------------------------------


def test_whole_file_appears_at_the_end_only(tmp_path):
    path = tmp_path / "map.nii.gz"
    with storage.whole_file(path) as partial:
        assert partial.parent == path.parent
        assert partial.name.endswith(".nii.gz")
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert contents(tmp_path) == {"map.nii.gz": b"whole"}


def test_whole_file_is_cleaned_after_an_error_and_the_old_one_survives(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def write_half() -> None:
        with storage.whole_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert contents(tmp_path) == {"a.csv": b"old"}
    with storage.whole_file(path) as partial:
        partial.write_text("new")
    assert contents(tmp_path) == {"a.csv": b"new"}


def test_whole_file_that_nobody_writes_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="nothing was written"), storage.whole_file(tmp_path / "a.csv"):
        pass
    assert contents(tmp_path) == {}


def test_whole_file_in_a_folder_that_is_gone_is_a_failure(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()

    def write() -> None:
        with storage.whole_file(folder / "a.csv") as partial:
            shutil.rmtree(folder)
            partial.write_text("whole")

    for words in (
        "a.csv: cannot be written (No such file",
        "models: cannot be written and locked (No such file",
    ):
        with pytest.raises(Failure, match=re.escape(words)):  # while it is written, and before
            write()
    assert not folder.exists()


# A process that says "held" once it holds a lock, forks a child that lives on as data loaders do, and waits.
HOLDER = """
import os, sys, time; from internals import storage
from pathlib import Path
with storage.locked(Path(sys.argv[1])):
    if os.fork() == 0:
        sys.stdout.close()
        time.sleep(60)
    print("held", os.getpid(), flush=True)
    time.sleep(60)
"""


def test_lock_is_released_when_its_holder_is_killed(tmp_path):
    lock = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().startswith(b"held")
        with pytest.raises(BlockingIOError), storage.locked(lock, wait=False):
            pass
        holder.kill()
        holder.wait()
        with storage.locked(lock, wait=False):  # though the child is still there
            assert lock.exists()
        os.killpg(holder.pid, signal.SIGKILL)
    assert not lock.exists()


def test_locks_of_many_processes_exclude_each_other(tmp_path):
    """Four processes add one to a number, a hundred times each; the lock file comes and goes meanwhile."""
    number, lock = tmp_path / "number", tmp_path / "lock"
    number.write_text("0")
    program = "import sys; from internals import storage; from pathlib import Path\n"
    program += "number, lock = map(Path, sys.argv[1:])\n"
    program += "for _ in range(100):\n with storage.locked(lock):\n"
    program += "  number.write_text(str(int(number.read_text()) + 1))"
    command = [sys.executable, "-c", program, str(number), str(lock)]
    others = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [other.wait() for other in others] == [0] * 4
    assert number.read_text() == "400"
    assert not lock.exists()


def test_leftovers_go_unless_they_are_being_written(tmp_path):
    for name in (".partial-a.csv", ".partial-b.csv", ".partial-other.txt", "a.csv"):
        (tmp_path / name).write_text("half")
    with storage.locked(tmp_path / ".partial-b.csv"):
        storage.remove_leftovers(tmp_path, ["*.csv"])
        assert set(contents(tmp_path)) == {".partial-b.csv", ".partial-other.txt", "a.csv"}


def test_tensors_have_the_same_bytes_under_any_name(tmp_path):
    record = {"weight": torch.arange(5.0), "epoch": 3}
    for name in ("a.pth", "b.pth"):
        storage.write_tensors(record, tmp_path / name)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert torch.load(tmp_path / "a.pth", weights_only=True)["epoch"] == 3


def test_csv_keeps_every_digit(tmp_path):
    values = np.random.default_rng(0).random(50) * 10.0 ** np.arange(-25, 25)
    storage.write_csv(pd.DataFrame({"path": ["a, b"] * 50, "value": values}), tmp_path / "a.csv")
    lines = (tmp_path / "a.csv").read_bytes().decode().split("\n")
    assert lines[0] == "path,value"
    assert [float(line.rsplit(",", 1)[1]) for line in lines[1:-1]] == values.tolist()


def test_json_round_trip(tmp_path):
    record = {"a": [1.0 / 3, None], "b": {"é": "x"}}
    storage.write_json(record, tmp_path / "run.json")
    assert storage.read_json(tmp_path / "run.json") == record


DEEP, LONG = b'{"a":' * 10**5, b'{"a": ' + b"1" * 5000 + b"}"


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe", DEEP, LONG])
def test_json_errors(tmp_path, content):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"run\.json.*JSON"):
        storage.read_json(path)


def test_json_of_no_sensible_size(tmp_path):
    (tmp_path / "run.json").write_text("{}" + " " * storage.RECORD_SIZE)
    with pytest.raises(InputError, match=r"run\.json: is no record of a run"):
        storage.read_json(tmp_path / "run.json")


def test_recorded():
    assert storage.recorded({"k": 3}, "k", int, lambda k: k > 2) == 3
    assert storage.recorded({"k": 0.5}, "k", (int, float)) == 0.5
    for record in ({}, {"k": True}, {"k": "3"}, {"k": None}, {"k": 2}, {"k": [3] * 10**6}, [], None, "k"):
        with pytest.raises(InputError, match=r"^is damaged: 'k' is .{1,60}$"):
            storage.recorded(record, "k", int, lambda k: k > 2)


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    # the example of FIPS 180-2, appendix B.1
    assert (
        storage.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_versions_name_python_and_every_package():
    found = storage.versions()
    assert set(found) == {"python", *storage.PACKAGES}
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]


# Folders -----------------------------------------------------------------------------------------

PATTERNS = ["run.json", "map_f*.nii.gz", "subjects/f*.nii.gz"]
IDENTITY = {"model": "modelB2", "folds": 2}


def fill(folder: Path, record: dict | None) -> None:
    """A folder with a map, a map in a subfolder, and two files of somebody else."""
    for name in ("map_f0.nii.gz", "subjects/f0_a.nii.gz", "notes.txt", "subjects/other.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))


def check(folder: Path, overwrite: bool = False) -> dict:
    return storage.check_folder(folder, "run.json", IDENTITY, PATTERNS, PATTERNS if overwrite else [])


def test_new_folder_is_free_and_is_not_created_by_the_check(tmp_path):
    assert check(tmp_path / "a" / "b") == {}
    assert contents(tmp_path) == {}
    assert not (tmp_path / "a").exists()


def test_folder_with_other_files_is_free(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert check(tmp_path) == {}


def test_folder_of_the_same_run_is_gone_on_with(tmp_path):
    fill(tmp_path, IDENTITY | {"weights": "x"})
    assert check(tmp_path) == IDENTITY | {"weights": "x"}


def test_folder_of_another_run_is_refused(tmp_path):
    fill(tmp_path, IDENTITY | {"folds": 5})
    before = contents(tmp_path)
    with pytest.raises(InputError) as error:
        check(tmp_path)
    assert all(word in str(error.value) for word in ["run.json", "folds", "5", "2", "--overwrite"])
    assert "modelB2" not in str(error.value)
    assert check(tmp_path, overwrite=True) == {}
    assert contents(tmp_path) == before


def test_folder_with_results_but_no_record_is_refused(tmp_path):
    fill(tmp_path, None)
    with pytest.raises(InputError, match=r"map_f0\.nii\.gz is in the way.*--overwrite"):
        check(tmp_path)
    assert check(tmp_path, overwrite=True) == {}


def test_folder_with_a_damaged_record_is_refused(tmp_path):
    fill(tmp_path, None)
    (tmp_path / "run.json").write_text('{"model": ')
    with pytest.raises(InputError, match=r"run\.json"):
        check(tmp_path)


def test_outpath_that_is_or_lies_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"--outpath .*file"):
            check(place)


def test_overwrite_removes_the_suites_files_only(tmp_path):
    fill(tmp_path, IDENTITY)
    storage.start_folder(tmp_path, "run.json", IDENTITY, PATTERNS, overwrite=[])
    assert len(contents(tmp_path)) == 5
    storage.start_folder(tmp_path, "run.json", IDENTITY, PATTERNS, overwrite=PATTERNS)
    assert set(contents(tmp_path)) == {"notes.txt", "subjects/other.txt"}


PER_FOLD, SUMMARY = ["map_f{}.nii.gz", "subjects/f{}_*.nii.gz"], ["map_all.nii.gz"]
EVERYTHING = ["run.json", "map_f*.nii.gz", "subjects/f*_*.nii.gz", *SUMMARY]
THERE = ["run.json", "map_f1.nii.gz", "map_f10.nii.gz", "subjects/f1_a.nii.gz", "subjects/f10_a.nii.gz"]


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        (None, []),
        ([0], THERE),
        ([1], ["run.json", "map_f10.nii.gz", "subjects/f10_a.nii.gz"]),
        ([10], ["run.json", "map_f1.nii.gz", "subjects/f1_a.nii.gz"]),
        ([1, 10], ["run.json"]),
    ],
)
def test_overwriting_some_folds_spares_the_others_and_the_record(tmp_path, chosen, left):
    (tmp_path / "subjects").mkdir()
    for name in [*THERE, *SUMMARY]:
        (tmp_path / name).write_text(json.dumps(IDENTITY))
    removed = storage.overwritten(EVERYTHING, PER_FOLD, SUMMARY, chosen)
    found = storage.start_folder(tmp_path, "run.json", IDENTITY, EVERYTHING, removed)
    assert found == (IDENTITY if left else {})
    assert set(contents(tmp_path)) == set(left)


def test_some_folds_of_another_run_are_not_overwritten(tmp_path):
    """The record describes all folds; without it the others would be nobody's."""
    (tmp_path / "subjects").mkdir()
    for name in THERE:
        (tmp_path / name).write_text(json.dumps(IDENTITY | {"model": "modelA24"}))
    removed = storage.overwritten(EVERYTHING, PER_FOLD, SUMMARY, [1])
    with pytest.raises(InputError, match=r"of another run: .*--overwrite without --run-folds$"):
        storage.start_folder(tmp_path, "run.json", IDENTITY, EVERYTHING, removed)
    assert set(contents(tmp_path)) == set(THERE)


def test_a_folder_where_somebody_is_at_work_is_not_overwritten(tmp_path):
    """As by a run of more folds; and a lock that a dead process left behind is nobody at work."""
    fill(tmp_path, IDENTITY)
    program = "import sys; from internals import storage; from pathlib import Path\n"
    program += "with storage.claimed(Path(sys.argv[1]), ['fold 7']): print('ready', flush=True); input()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other, storage.claimed(tmp_path, ["fold 0"]):
        other.stdout.readline()
        with pytest.raises(InputError, match="another process is at work"):
            storage.start_folder(tmp_path, "run.json", IDENTITY, PATTERNS, PATTERNS)
        assert {"run.json", "map_f0.nii.gz"} <= set(contents(tmp_path))
        other.kill()
        other.wait()
        assert (tmp_path / ".lock-fold_7").exists()
        storage.start_folder(tmp_path, "run.json", IDENTITY, PATTERNS, PATTERNS)
    assert set(contents(tmp_path)) == {"notes.txt", "subjects/other.txt"}
