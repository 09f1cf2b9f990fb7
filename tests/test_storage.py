"""storage.py: locks, files that appear whole, records."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from cohorts import contents

from internals import storage
from internals.errors import Failure, InputError

ROOT = Path(__file__).resolve().parents[1]


# Locks -------------------------------------------------------------------------------------------

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
    assert not storage.is_held(lock)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().startswith(b"held")
        assert storage.is_held(lock)
        with pytest.raises(BlockingIOError), storage.locked(lock, wait=False):
            pass
        holder.kill()
        holder.wait()
        assert lock.exists()
        assert not storage.is_held(lock)  # though the child is still there
        with storage.locked(lock, wait=False):
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


def test_lock_in_a_folder_that_is_not_there_is_a_failure(tmp_path):
    words = re.escape("models: cannot be written and locked (No such file")
    with pytest.raises(Failure, match=words), storage.locked(tmp_path / "models" / "lock"):
        pass


# Files that appear whole -------------------------------------------------------------------------


def test_file_appears_at_the_end_only(tmp_path):
    path = tmp_path / "map.nii.gz"
    with storage.atomic_write(path) as partial:
        assert partial.parent == path.parent
        assert partial.name.endswith(".nii.gz")
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert contents(tmp_path) == {"map.nii.gz": b"whole"}


def write(path: Path, text: str, then: Callable[[], object] = lambda: None) -> None:
    with storage.atomic_write(path) as partial:
        partial.write_text(text)
        then()


def test_after_an_error_the_old_file_is_there_and_no_other(tmp_path):
    (tmp_path / "a.csv").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.csv", "half", Mock(side_effect=KeyboardInterrupt))
    assert contents(tmp_path) == {"a.csv": b"old"}
    with pytest.raises(Failure, match=r"a\.csv: cannot be written \(No space left on device\); what was fin"):
        write(tmp_path / "a.csv", "half", Mock(side_effect=OSError(28, "No space left on device")))
    assert contents(tmp_path) == {"a.csv": b"old"}
    write(tmp_path / "a.csv", "new")
    assert contents(tmp_path) == {"a.csv": b"new"}


def test_a_file_that_nobody_writes_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="nothing was written"):
        write(tmp_path / "a.csv", "")
    assert contents(tmp_path) == {}


def test_folder_that_goes_while_a_file_is_written_is_a_failure(tmp_path):
    folder = tmp_path / "models"
    storage.make_folder(folder)
    words = re.escape("a.csv: cannot be written (No such file")
    with pytest.raises(Failure, match=words):
        write(folder / "a.csv", "whole", lambda: shutil.rmtree(folder))
    assert not folder.exists()


def test_folder_that_cannot_be_made_is_a_failure(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match=r"file/models: cannot be made \(Not a directory\)"):
        storage.make_folder(tmp_path / "file" / "models")


def test_leftovers_go_and_nothing_else(tmp_path):
    left = ["a.csv", ".partial-b.txt", "maps/a.csv", "maps/.partial-b.csv"]
    for name in [".partial-a.csv", "maps/.partial-f0_a.csv", *left]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    storage.remove_leftovers(tmp_path, ["*.csv", "maps/f0_*.csv"])
    assert set(contents(tmp_path)) == set(left)


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


# Records -----------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path):
    record = {"a": [1.0 / 3, None], "b": {"é": "x"}}
    storage.write_json(record, tmp_path / "run.json")
    assert storage.read_json(tmp_path / "run.json") == record


DEEP, LONG = b'{"a":' * 10**5, b'{"a": ' + b"1" * 5000 + b"}"
LARGE = b"{}" + b" " * storage.RECORD_SIZE


@pytest.mark.parametrize(
    ("content", "words"),
    [*((text, "JSON") for text in (None, b"", b"{", b"[1]", b"\xff\xfe", DEEP, LONG)),
     (LARGE, ": is no record of a run")],
    ids=["none", "empty", "cut", "list", "binary", "deep", "long number", "large"],
)  # fmt: skip
def test_json_errors(tmp_path, content, words):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"run\.json.*{words}"):
        storage.read_json(path)


def test_entry():
    assert storage.entry({"k": 3}, "k", int, lambda k: k > 2) == 3
    assert storage.entry({"k": 0.5}, "k", (int, float)) == 0.5
    for record in ({}, {"k": True}, {"k": "3"}, {"k": None}, {"k": 2}, {"k": [3] * 10**6}, [], None, "k"):
        with pytest.raises(InputError, match=r"^is damaged: 'k' is .{1,60}$"):
            storage.entry(record, "k", int, lambda k: k > 2)


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    # the example of FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.file_sha256(tmp_path / "a") == expected
    with pytest.raises(InputError, match=r"b: no such file$"):
        storage.file_sha256(tmp_path / "b")


def test_versions_name_python_and_every_package():
    found = storage.package_versions()
    assert set(found) == {"python", *storage.PACKAGES}
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
