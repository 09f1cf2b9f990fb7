"""What every entry script shares: errors, devices, seeds, whole files, the run record, pictures."""

import argparse
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import random
import re
import reprlib
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

PACKAGES = ("torch", "numpy", "pandas", "nibabel", "scikit-learn", "nilearn", "captum")
LONGEST = 8000  # characters of an error
RECORD_SIZE = 2**22  # bytes of a record: one of a thousand folds has a tenth of it


Main = TypeVar("Main", bound=Callable[..., int])


# Errors and options ------------------------------------------------------------------------------


class InputError(Exception):
    """A user's mistake: reported as one line, never as a traceback."""


class Failure(Exception):
    """A fault of neither user nor program, such as a full disk: reported as one line, too."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it before they kill."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose mistakes are one line (`InputError`) and whose help shows the defaults."""

    def __init__(self, docstring: str | None) -> None:
        super().__init__(description=docstring, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} -h)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


@contextlib.contextmanager
def naming(name: object) -> Iterator[None]:
    """Put the name of a file or option in front of any `InputError` raised inside."""
    try:
        yield
    except InputError as mistake:
        raise InputError(f"{name}: {mistake}") from mistake


def printable(text: str) -> str:
    """A message as one line that is safe to show: no control characters, and of bounded length.

    File names and CSV fields may hold what a terminal would obey, or what turns text around.
    """
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[:LONGEST])
    return line if len(text) <= LONGEST else f"{line} ..."


def command(saved: str) -> Callable[[Main], Main]:
    """Make what ends an entry script early one line on stderr and an exit status.

    2 for an `InputError`, 1 for a `Failure`, 130 for Ctrl-C and 143 for SIGTERM.

    Args:
        saved: what an interrupted command has saved, and how it goes on.
    """

    def guard(main: Main) -> Main:
        @functools.wraps(main)
        def guarded(argv: list[str] | None = None) -> int:
            try:
                with _termination():
                    return main(argv)
            except InputError as mistake:
                line, status = f"error: {mistake}", 2
            except Failure as fault:
                line, status = f"error: {fault}", 1
            except KeyboardInterrupt as interrupt:
                line, status = f"interrupted: {saved}", 143 if isinstance(interrupt, Terminated) else 130
            print(printable(line), file=sys.stderr)
            return status

        return cast(Main, guarded)

    return guard


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM, so that it unwinds like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return

    def handler(*_: object) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def enough(work: str, advice: str) -> Iterator[None]:
    """Turn memory that does not suffice, or a reading process that was killed, into a `Failure`.

    Args:
        work: what is done, and its size.
        advice: what to lower.
    """
    try:
        yield
    except MemoryError as problem:
        raise Failure(f"{work}: out of memory; {advice}") from problem
    except RuntimeError as problem:  # PyTorch's, by their words: on a CPU they have no class of their own
        if re.search("out of memory|can't allocate memory", str(problem)):
            raise Failure(f"{work}: out of memory; {advice} ({problem})") from problem
        if "DataLoader worker" in str(problem):
            raise Failure(
                f"{work}: a process that reads scans ended; lower --workers ({problem})"
            ) from problem
        raise


def number(
    kind: type[int] | type[float],
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Callable[[str], Any]:
    """An argparse type: a finite int or float within the given bounds."""
    bounds = [(at_least, ">="), (above, ">"), (at_most, "<="), (below, "<")]
    wanted = " and ".join(f"{sign} {bound:g}" for bound, sign in bounds if bound is not None)

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        inside = (
            np.isfinite(value)
            and (at_least is None or value >= at_least)
            and (above is None or value > above)
            and (at_most is None or value <= at_most)
            and (below is None or value < below)
        )
        if not inside:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not {'an integer' if kind is int else 'a number'} {wanted}".rstrip()
            )
        return value

    return parse


def progress(items: Iterable | None, total: int | None = None, **options: Any) -> tqdm:
    """A progress bar on stderr, silent where stderr is not a terminal."""
    return tqdm(items, total=total, disable=not sys.stderr.isatty(), dynamic_ncols=True, **options)


# Devices and seeds -------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """Turn `--device` into a torch device.

    Args:
        name: a CUDA index ("0"), "cpu", "cuda", "cuda:1", "mps", or "auto" (CUDA, then MPS, then CPU).

    Raises:
        InputError: the device is not known or not there; an explicit choice never falls back.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(f"cuda:{int(name)}" if name.isdecimal() else name)
    except (RuntimeError, ValueError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name}: expected a GPU number, cpu, cuda:N, mps or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise InputError(
            f"--device {name}: this machine has {there} CUDA device{'s' * (there != 1)}; use --device cpu"
            if there == 0
            else f"--device {name}: this machine has {there} CUDA devices, numbered from 0"
        )
    if device.type == "mps" and not mps:
        raise InputError(f"--device {name}: this machine has no MPS device; use --device cpu")
    return device


def hold_memory() -> None:
    """Let the C library keep freed memory for the next large tensor, where it is glibc's (Linux).

    It would otherwise return every tensor beyond 32 MiB to the kernel and have the next one cleared page
    by page: a sixth of a training step's time on a CPU.
    """
    mmap_threshold, trim_threshold, largest = -3, -1, 2**31 - 1  # of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, largest)
        mallopt(trim_threshold, largest)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (every device) and ask cuDNN for reproducible algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def fold_seed(seed: int, fold: int) -> int:
    """A seed of a fold's own, so that a fold comes out the same whichever others are run."""
    return int(np.random.SeedSequence([seed, fold]).generate_state(1)[0])


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all random generators that `seed_everything` seeds, as tensors and plain numbers."""
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy = (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest)
    states = {"python": random.getstate(), "numpy": numpy, "cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(*_number(device))
    return states


def restore_random(states: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_states` returned; a device of another type keeps the state it has."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], *_number(device))


def _number(device: torch.device) -> list[torch.device]:
    """The argument that tells one device of a type from another, where there may be several."""
    return [device] if device.type == "cuda" else []


# Locks and whole files ---------------------------------------------------------------------------

PARTIAL = ".partial-"  # begins the names of temporary files
LOCK = ".lock"  # of a folder's shared files, held while they are read, changed and written back
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
        OSError: the file cannot be made, or its file system has no locks.
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


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


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
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for part in parts:
                stack.enter_context(locked(folder / f"{LOCK}-{part.replace(' ', '_')}", wait=False))
        except BlockingIOError as problem:
            raise InputError(f"{folder}: another process is at work on {part}") from problem
        except OSError as problem:
            raise Failure(f"{folder}: cannot be written and locked ({problem})") from problem
        yield


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
        raise Failure(f"{path}: cannot be written ({reason}); what was finished before is kept") from problem


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


# The run record ----------------------------------------------------------------------------------


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
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror})") from problem


def read_json(path: Path) -> dict[str, Any]:
    """Read a record; raise InputError where it is not a JSON object."""
    with naming(path):
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


def check_folder(
    folder: Path, record: str, identity: dict[str, Any], patterns: Iterable[str], overwrite: bool
) -> dict[str, Any]:
    """Find out whether an output folder is free, or holds the same run to go on with. Writes nothing.

    Args:
        folder: the output folder, which need not exist.
        record: name of the record in it.
        identity: what two runs must have in common for the second to go on with the first.
        patterns: glob patterns of all files the suite writes there.
        overwrite: those files will be removed, so whatever they hold is fine.

    Returns:
        The record that is there; empty where the run starts afresh.

    Raises:
        InputError: the folder cannot be written to, holds another run, or results without a record.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--outpath {folder}: {existing} is not a folder that can be written to")
    present = written(folder, patterns)
    if overwrite or not present:
        return {}
    way_out = "choose another --outpath, or --overwrite"
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
    folder: Path, record: str, identity: dict[str, Any], patterns: Iterable[str], overwrite: bool
) -> dict[str, Any]:
    """Begin in a folder whose LOCK is held, or go on there: `check_folder` once more, and tidy up.

    With `overwrite`, what the suite wrote there is removed, and only that.

    Raises:
        InputError: as `check_folder`; or, with `overwrite`, another process is at work there.
    """
    found = check_folder(folder, record, identity, patterns, overwrite)
    remove_leftovers(folder, patterns)
    if overwrite:
        for lock in set(folder.glob(f"{LOCK}-*")) - set(_held.values()):
            try:
                with locked(lock, wait=False):
                    pass
            except BlockingIOError as problem:
                raise InputError(f"--overwrite: another process is at work in {folder}") from problem
        remove(folder, patterns)
    return found


def remove(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the files in a folder that match any of the patterns."""
    for path in written(folder, patterns):
        path.unlink()


def written(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in a folder that match any of the patterns."""
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def choose_folds(wanted: list[int] | None, k: int) -> list[int]:
    """The folds to run: all, or those of --run-folds, in order and once each."""
    if wanted and max(wanted) >= k:
        raise InputError(f"--run-folds {max(wanted)}: the folds are numbered 0 to {k - 1}")
    return sorted(set(wanted)) if wanted else list(range(k))


# Pictures ----------------------------------------------------------------------------------------


def save_map_figure(
    values: np.ndarray, background: np.ndarray, affine: np.ndarray, title: str, path: Path
) -> None:
    """Draw a signed map over a scan, as axial, coronal and sagittal slices (PNG).

    Shown are the largest 3 % of the map's voxels, as they are; the colours end at the 99.9th percentile.

    Args:
        values: (X, Y, Z) map, signed.
        background: (X, Y, Z) scan on the same grid.
        affine: (4, 4), voxel to mm.
        title: written over the figure.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from nilearn import plotting

    magnitude = np.abs(values[values != 0])
    shown, top = np.percentile(magnitude, [97, 99.9]) if magnitude.size else (0.0, 0.0)
    top = max(float(top), float(np.finfo(np.float32).tiny))
    figure, axes = plt.subplots(3, 1, figsize=(13, 7.5), facecolor="white")
    figure.subplots_adjust(left=0.01, right=0.9, top=0.94, bottom=0.01, hspace=0.02)
    figure.suptitle(title, fontsize=13)
    for axis, direction in zip(axes, "zyx", strict=True):
        plotting.plot_stat_map(
            nib.Nifti1Image(values.astype(np.float32), affine),
            bg_img=nib.Nifti1Image(background.astype(np.float32), affine),
            display_mode=direction,
            cut_coords=7,
            threshold=float(shown),
            vmax=top,
            cmap="cold_hot",
            colorbar=False,
            axes=axis,
            black_bg=False,
            dim=0,
        )
    colours = plt.cm.ScalarMappable(plt.Normalize(-top, top), plotting.cm.cold_hot)
    bar = figure.add_axes((0.92, 0.25, 0.015, 0.5))
    bar.set_title("attribution", fontsize=10)
    figure.colorbar(colours, cax=bar).formatter.set_powerlimits((-2, 2))  # type: ignore[attr-defined]
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)
