"""Files and folders that survive: locks, whole files, records, output folders."""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from internals.errors import Failure, InputError, blaming

PACKAGES = ("torch", "numpy", "pandas", "nibabel", "scikit-learn", "nilearn", "captum")
RECORD_SIZE = 2**22  # bytes of a record: one of a thousand folds has a tenth of it


# Locks and whole files ---------------------------------------------------------------------------

PARTIAL = ".partial-"  # begins the names of temporary files
LOCK = ".lock"  # of a folder's shared files, held while they are read, changed and written back
KEPT = "; what was finished before is kept"
_held: dict[int, Path] = {}  # this process's locks by descriptor


def _leave_locks() -> None:
    """Close the locks that a forked child inherits: it would hold them beyond its parent's end."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_leave_locks)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, which is there only while somebody holds or has died holding it.

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
        if _is_at(handle, path):  # not if it was renamed, or its folder is gone
            path.unlink()
        _close(handle)


def _lock(path: Path, wait: bool) -> int:
    """Open and lock a file, again and again until it is still at its path afterwards."""
    try:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            _held[handle] = path
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _is_at(handle, path):
                    return handle
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
    del _held[handle]
    os.close(handle)


@contextlib.contextmanager
def claimed(folder: Path, parts: Iterable[str]) -> Iterator[None]:
    """Create a folder and hold the locks of parts of it, such as "fold 0", while they are worked on.

    Raises:
        InputError: another process holds one of them.
        Failure: the folder cannot be made or locked.
    """
    make_folder(folder)
    with contextlib.ExitStack() as stack:
        try:
            for part in parts:
                name = f"{LOCK}-{part.replace(' ', '_')}"
                stack.enter_context(locked(folder / name, wait=False))
        except BlockingIOError as problem:
            raise InputError(f"{folder}: another process is at work on {part}") from problem
        yield


def make_folder(folder: Path) -> None:
    """Create a folder where there is none; Failure where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise Failure(f"{folder}: cannot be made ({problem.strerror})") from problem


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file appears at `path` complete and on disk, or not at all.

    The temporary file lies beside `path`, is locked while it is written, and keeps its suffixes, so writers
    that choose a format by name (nibabel, matplotlib) work unchanged.

    Raises:
        Failure: it cannot be written: the disk is full, the folder is gone.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        with locked(partial):
            yield partial
            if not partial.stat().st_size:
                raise RuntimeError(f"nothing was written to {partial}")
            _sync(partial)
            partial.replace(path)
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


def remove_leftovers(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the temporary files of writers that died; those of living ones are locked."""
    for pattern in patterns:
        for partial in (folder / pattern).parent.glob(f"{PARTIAL}{Path(pattern).name}"):
            with contextlib.suppress(BlockingIOError), locked(partial, wait=False):
                pass  # the lock file is the temporary file itself, and goes with the lock


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table without its index; floats keep every digit."""
    with whole_file(path) as partial:
        table.to_csv(partial, index=False, lineterminator="\n")


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record as indented JSON."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")


def write_tensors(record: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values as torch.save does; the same record gives the same bytes."""
    buffer = io.BytesIO()  # torch.save to a file puts its name inside, and reports a full disk in its own way
    torch.save(record, buffer)
    with whole_file(path) as partial:
        partial.write_bytes(buffer.getbuffer())


# Records and output folders ----------------------------------------------------------------------


def versions() -> dict[str, str]:
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


def sha256(path: Path) -> str:
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


def recorded(
    record: Any, name: str, kinds: type | tuple[type, ...], valid: Callable[[Any], bool] = lambda _: True
) -> Any:
    """One value of a record, which may have been edited by hand.

    Args:
        record: what should be a dict.
        kinds: the types that the value may have; bool is no int here.
        valid: what else must be true of it.

    Raises:
        InputError: the value is missing, or not such.
    """
    value = record.get(name) if isinstance(record, dict) else None
    right = isinstance(value, kinds) and not isinstance(value, bool)
    if not right or not valid(value):
        raise InputError(f"is damaged: '{name}' is {reprlib.repr(value)}")
    return value


def overwritten(
    patterns: Sequence[str], per_fold: Sequence[str], summary: Sequence[str], run_folds: list[int] | None
) -> list[str]:
    """The patterns of what --overwrite removes: everything or, with --run-folds, what belongs to those folds.

    Then the other folds stay, and so does the record; what is made of all folds goes.

    Args:
        patterns: glob patterns of all files the suite writes in a folder.
        per_fold: those of a fold, with "{}" for its number.
        summary: those of what is made of all folds.
        run_folds: the chosen folds; None for all.
    """
    if run_folds is None:
        return list(patterns)
    return [*(name.format(fold) for name in per_fold for fold in run_folds), *summary]


def check_folder(
    folder: Path, record: str, identity: dict[str, Any], patterns: Iterable[str], overwrite: Iterable[str]
) -> dict[str, Any]:
    """Find out whether an output folder is free, or holds the same run to go on with. Writes nothing.

    Args:
        folder: the output folder, which need not exist.
        record: name of the record in it.
        identity: what two runs must have in common for the second to go on with the first.
        patterns: glob patterns of all files the suite writes there.
        overwrite: patterns of those that will be removed, so whatever they hold is fine; see `overwritten`.

    Returns:
        The record that is there; empty where the run starts afresh.

    Raises:
        InputError: the folder cannot be written to, holds another run, or results without a record.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--outpath {folder}: {existing} is not a folder that can be written to")
    removed = set(written(folder, overwrite))
    present = [path for path in written(folder, patterns) if path not in removed]
    if not present:
        return {}
    way_out = f"choose another --outpath, or --overwrite{' without --run-folds' if overwrite else ''}"
    if folder / record not in present:
        raise InputError(f"{present[0]} is in the way; {way_out}")
    found = read_json(folder / record)
    before, now = _flat(found), _flat(identity)
    differing = [
        f"{name} ({before.get(name)} there, {now[name]} now)" for name in now if before.get(name) != now[name]
    ]
    if differing:
        raise InputError(f"{folder / record} is of another run: {', '.join(differing)}; {way_out}")
    return found


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the items of its inner dicts at the top."""
    inner = {k: v for item in record.values() if isinstance(item, dict) for k, v in item.items()}
    return {k: v for k, v in record.items() if not isinstance(v, dict)} | inner


def start_folder(
    folder: Path, record: str, identity: dict[str, Any], patterns: Sequence[str], overwrite: Sequence[str]
) -> dict[str, Any]:
    """Begin in a folder whose LOCK is held, or go on there: `check_folder` once more, and tidy up.

    The files of `overwrite` are removed, and no others.

    Raises:
        InputError: as `check_folder`; or the record would be removed while another process is at work there.
    """
    found = check_folder(folder, record, identity, patterns, overwrite)
    remove_leftovers(folder, patterns)
    if record in overwrite and any(_is_held(lock) for lock in folder.glob(f"{LOCK}-*")):
        raise InputError(f"--overwrite: another process is at work in {folder}")
    remove(folder, sorted(overwrite, key=record.__eq__))  # the record last: without it all is in the way
    return found


def _is_held(lock: Path) -> bool:
    """Whether another process holds a lock file; one that a dead process left behind goes."""
    if lock in _held.values():
        return False
    try:
        with locked(lock, wait=False):
            return False
    except BlockingIOError:
        return True


def remove(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the files in a folder that match any of the patterns; another process may do the same."""
    for path in written(folder, patterns):
        path.unlink(missing_ok=True)


def written(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in a folder that match any of the patterns."""
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]
