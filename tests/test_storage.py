"""storage.py: locks, files that appear whole, records."""

import os
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
    print("held", flush=True)
    time.sleep(60)
"""

# Four processes, forked, which takes less time than four starts of Python.
ADDERS = """
import os, sys; from internals import storage
from pathlib import Path
number, lock = map(Path, sys.argv[1:])
for _ in range(4):
    if os.fork() == 0:
        for _ in range(100):
            with storage.locked(lock):
                number.write_text(str(int(number.read_text()) + 1))
        sys.exit()
assert [os.wait()[1] for _ in range(4)] == [0] * 4
"""


def test_lock_is_released_when_its_holder_is_killed(tmp_path):
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(lock)]
    assert not storage.is_held(lock)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as holder:
        assert holder.stdout.readline() == b"held\n"  # type: ignore[union-attr]
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
    command = [sys.executable, "-c", ADDERS, str(number), str(lock)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert number.read_text() == "400"
    assert not lock.exists()


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
    full = OSError(28, "No space left on device")
    for text, end, error, words in [
        ("half", KeyboardInterrupt, KeyboardInterrupt, None),
        ("half", full, Failure, r"a\.csv: cannot be written \(No space left on device\); what was finished"),
        ("", None, RuntimeError, "nothing was written"),
    ]:
        with pytest.raises(error, match=words):
            write(tmp_path / "a.csv", text, Mock(side_effect=end))
        assert contents(tmp_path) == {"a.csv": b"old"}
    write(tmp_path / "a.csv", "new")
    assert contents(tmp_path) == {"a.csv": b"new"}


def test_folder_that_goes_or_cannot_be_made_is_a_failure(tmp_path):
    folder, gone = tmp_path / "a" / "models", r"cannot be written{} \(No such file"
    with pytest.raises(Failure, match="models: " + gone.format(" and locked")):
        storage.locked(folder / "lock").__enter__()
    storage.make_folder(folder)
    with pytest.raises(Failure, match=r"a\.csv: " + gone.format("")):
        write(folder / "a.csv", "whole", lambda: shutil.rmtree(folder))
    assert not folder.exists()
    folder.touch()
    with pytest.raises(Failure, match=r"models/below: cannot be made \(Not a directory\)"):
        storage.make_folder(folder / "below")


def test_leftovers_go_and_nothing_else(tmp_path):
    left = ["a.csv", ".partial-b.txt", "maps/a.csv", "maps/.partial-b.csv"]
    for name in [".partial-a.csv", "maps/.partial-f0_a.csv", *left]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    storage.remove_leftovers(tmp_path, ["*.csv", "maps/f0_*.csv"])
    assert set(contents(tmp_path)) == set(left)


def test_tensors_have_the_same_bytes_under_any_name_and_tables_keep_every_digit(tmp_path):
    for name in ("a.pth", "b.pth"):
        storage.write_tensors({"weight": torch.arange(5.0), "epoch": 3}, tmp_path / name)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert torch.load(tmp_path / "a.pth", weights_only=True)["epoch"] == 3
    values = np.random.default_rng(0).random(50) * 10.0 ** np.arange(-25, 25)
    storage.write_csv(pd.DataFrame({"path": ["a, b"] * 50, "value": values}), tmp_path / "a.csv")
    lines = (tmp_path / "a.csv").read_bytes().decode().split("\n")
    assert lines[0] == "path,value"
    assert [float(line.rsplit(",", 1)[1]) for line in lines[1:-1]] == values.tolist()


# Records -----------------------------------------------------------------------------------------


DEEP, LONG = b'{"a":' * 10**5, b'{"a": ' + b"1" * 5000 + b"}"
LARGE = b"{}" + b" " * storage.RECORD_SIZE


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[1]", b"\xff\xfe", DEEP, LONG, LARGE],
    ids=["none", "empty", "cut", "list", "binary", "deep", "long number", "large"],
)  # fmt: skip
def test_json(tmp_path, content):
    path, record = tmp_path / "run.json", {"a": [1.0 / 3, None], "b": {"é": "x"}}
    storage.write_json(record, path)
    assert storage.read_json(path) == record
    path.unlink() if content is None else path.write_bytes(content)
    words = ": is no record of a run" if content == LARGE else "JSON"
    with pytest.raises(InputError, match=rf"run\.json.*{words}"):
        storage.read_json(path)


def test_entry():
    assert storage.entry({"k": 3}, "k", int, lambda k: k > 2) == 3
    assert storage.entry({"k": 0.5}, "k", (int, float)) == 0.5
    for record in ({}, {"k": True}, {"k": "3"}, {"k": None}, {"k": 2}, {"k": [3] * 10**6}, [], None, "k"):
        with pytest.raises(InputError, match=r"^is damaged: 'k' is .{1,60}$"):
            storage.entry(record, "k", int, lambda k: k > 2)


def test_sha256_and_versions(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # the example of FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.file_sha256(tmp_path / "a") == expected
    with pytest.raises(InputError, match=r"b: no such file$"):
        storage.file_sha256(tmp_path / "b")
    assert set(storage.package_versions()) == {"python", *storage.PACKAGES}
    assert storage.package_versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
