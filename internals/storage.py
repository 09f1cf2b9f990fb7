"""Files that survive: locks, atomic writes, records."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import reprlib
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from internals.errors import Failure, InputError, blaming

PACKAGES = ("torch", "numpy", "pandas", "nibabel", "scikit-learn", "nilearn", "captum")
RECORD_SIZE = 2**25  # bytes of a record: simulate.py's of 30,000 subjects
PARTIAL = ".partial-"  # begins the names of temporary files
KEPT = "; what was finished before is kept"


# Locks -------------------------------------------------------------------------------------------

PATIENCE = 0.5  # seconds that a lock is tried for, as somebody may just look at it (`is_held`)
_held: set[int] = set()  # descriptors of this process's locks


def _leave_locks() -> None:
    """Close the locks that a forked child inherits: it would hold them beyond its parent's end."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_leave_locks)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, which is there only while somebody holds it or has died holding it.

    The kernel releases the lock (flock) when its holder ends, however it ends; between machines too, where
    their shared file system passes flock on, as NFS does on Linux.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
        Failure: the file cannot be made, or its file system has no locks.
    """
    handle = _lock(path, wait)
    try:
        yield
    finally:
        if _is_at(handle, path):  # not if its folder is gone
            path.unlink()
        _close(handle)


def _lock(path: Path, wait: bool) -> int:
    """Open and lock a file, again and again until it is still at its path afterwards."""
    patient_until = time.monotonic() + PATIENCE
    try:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            _held.add(handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _is_at(handle, path):
                    return handle
            except BlockingIOError:
                if time.monotonic() > patient_until:
                    _close(handle)
                    raise
                time.sleep(PATIENCE / 10)
            except BaseException:
                _close(handle)
                raise
            _close(handle)
    except BlockingIOError:
        raise
    except OSError as problem:
        reason = problem.strerror or problem
        raise Failure(f"{path.parent}: cannot be written and locked ({reason}){KEPT}") from problem


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one at a path, which is opened, as other machines' caches answer stat."""
    try:
        there = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return os.path.samestat(os.fstat(handle), os.fstat(there))
    finally:
        os.close(there)


def _close(handle: int) -> None:
    _held.remove(handle)
    os.close(handle)


def is_held(path: Path) -> bool:
    """Whether another process holds a lock file; to look is to hold it, shared, for an instant."""
    try:
        with path.open("rb") as stream:  # which NFS does not lock but shared
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


# Files that appear whole -------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Create a folder where there is none; Failure where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise Failure(f"{folder}: cannot be made ({problem.strerror})") from problem


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file appears at `path` complete and on disk, or not at all.

    The temporary file lies beside `path` and keeps its suffixes, so writers that choose a format by name
    (nibabel, matplotlib) work unchanged. The caller sees to it that nobody else writes the same file.

    Raises:
        Failure: it cannot be written: the disk is full, the folder is gone.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        try:
            yield partial
            if not partial.stat().st_size:
                raise RuntimeError(f"nothing was written to {partial}")
            _sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as problem:
        reason = problem.strerror or problem
        raise Failure(f"{path}: cannot be written ({reason}){KEPT}") from problem


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in a folder that match any of the glob patterns."""
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def remove(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the files in a folder that match any of the patterns; another process may do the same."""
    for path in matching(folder, patterns):
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the temporary files of a writer that died; the caller holds the lock that writers hold."""
    parts = (Path(pattern) for pattern in patterns)
    remove(folder, [str(part.with_name(f"{PARTIAL}{part.name}")) for part in parts])


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table without its index; floats keep every digit."""
    with atomic_write(path) as partial:
        table.to_csv(partial, index=False, lineterminator="\n")


def write_text(text: str, path: Path) -> None:
    """Write a text in UTF-8."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record as indented JSON."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")


def write_tensors(record: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values as torch.save does; the same record gives the same bytes."""
    buffer = io.BytesIO()  # torch.save to a file puts its name inside, and reports a full disk in its own way
    torch.save(record, buffer)
    with atomic_write(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def write_arrays(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write arrays as numpy.savez does."""
    with atomic_write(path) as partial:
        np.savez(partial, **arrays)  # type: ignore[arg-type]  # as if a name could be `allow_pickle`


# Records -----------------------------------------------------------------------------------------


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}


def file_size(path: Path, kind: str = "file") -> int:
    """Bytes of a file; `kind` is what an error calls it.

    Raises:
        InputError: it is not there, or none: reading a folder fails, reading a pipe or a device may wait.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as problem:
        raise InputError(f"no such {kind}") from problem
    except (OSError, ValueError) as problem:  # a name that is too long, or that no file can have
        raise InputError(f"cannot be found ({getattr(problem, 'strerror', problem)})") from problem
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"is a folder, expected a {kind}")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"is a pipe or a device, expected a {kind}")
    return status.st_size


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; InputError where it cannot be read."""
    with blaming(path):
        file_size(path)
        try:
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as problem:
            raise InputError(f"cannot be read ({problem.strerror})") from problem


def read_json(path: Path) -> dict[str, Any]:
    """Read a record; raise InputError where it is not a JSON object."""
    with blaming(path):
        if file_size(path, "JSON record") > RECORD_SIZE:
            raise InputError(f"is no record of a run: larger than {RECORD_SIZE >> 20} MiB")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as problem:  # a number of 5000 digits is a ValueError
            raise InputError(f"cannot be read as JSON ({problem})") from problem
        if not isinstance(record, dict):
            raise InputError("expected a JSON object")
    return record


def entry(
    record: Any, name: str, kinds: type | tuple[type, ...], valid: Callable[[Any], bool] = lambda _: True
) -> Any:
    """One value of a record, which may have been edited by hand.

    Args:
        record: what should be a dict.
        kinds: the types that the value may have; a bool is no int here.
        valid: what else must be true of it.

    Raises:
        InputError: the value is missing, or not such.
    """
    value = record.get(name) if isinstance(record, dict) else None
    right = isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
    if not right or not valid(value):
        raise InputError(f"is damaged: '{name}' is {reprlib.repr(value)}")
    return value
