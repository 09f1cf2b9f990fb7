"""From a CSV to checked scans, from scans to tensors, and from subjects to folds."""

import atexit
import contextlib
import csv
import functools
import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

import utils
from internals import devices, memory, nifti, storage
from internals.errors import InputError, blaming
from internals.nifti import Grid

COLUMNS = ["path", "label", "subject"]
CACHES = ("auto", "gpu", "ram", "disk", "none")
CPU = torch.device("cpu")
SCALING = "min-max, float32"
WORKERS = 2  # threads that look at voxels where nothing is to be kept
SAMPLE = 2**12  # bytes
SHOWN = 20  # bad scans named in one message
# of a list of scans: twice as many as UK Biobank has; what is larger is something else, and not read
CSV_SIZE, MOST_ROWS, LONGEST_LINE = 2**25, 200_000, 2**16


# The CSV -----------------------------------------------------------------------------------------


def read_csv(path: Path) -> pd.DataFrame:
    """Read the list of scans.

    Args:
        path: a CSV without a header (path, label), or with one naming path, label and optionally
            subject. Relative paths are relative to the CSV's folder; ~ is expanded.

    Returns:
        One row per scan, in the CSV's order: path (str, as written), label (0 or 1), subject (str;
        the path where there is no such column) and file (absolute Path).

    Raises:
        InputError: the file cannot be read as such a table, or is larger than any such.
    """
    with blaming(path):
        return _check_rows(_read_cells(path), path)


def read_rows(file: Path) -> Iterator[list[str]]:
    """The rows of a CSV in UTF-8, one at a time, without the blank ones.

    Raises:
        InputError: no such file, or no such text; said when the iteration gets there.
    """
    storage.file_size(file, "CSV")
    try:
        with file.open(encoding="utf-8-sig") as stream:  # \r\n and \r become \n
            rows = csv.reader(_lines(stream), skipinitialspace=True, strict=True)
            yield from (row for row in rows if row not in ([], [""]))
    except (OSError, UnicodeError, csv.Error) as problem:
        raise InputError(f"cannot be read as a CSV ({problem})") from problem


def _lines(stream: TextIO) -> Iterator[str]:
    """The lines of a text; a longer one than any row of a CSV is not read to its end."""
    for number in itertools.count(1):
        line = stream.readline(LONGEST_LINE + 1)
        if len(line) > LONGEST_LINE:
            raise InputError(f"line {number} has more than {LONGEST_LINE} characters")
        if "\0" in line:
            raise InputError(f"line {number} has a NUL character; expected text")
        if not line:
            return
        yield line


def _read_cells(file: Path) -> pd.DataFrame:
    """Path, label and subject of every row, as text; the index is the row's number, from 1."""
    if storage.file_size(file, "CSV") > CSV_SIZE:
        raise InputError(f"is larger than {CSV_SIZE >> 20} MiB; expected a list of scans")
    rows = read_rows(file)
    first = next(rows, [])
    header = [name.strip().lower() for name in first]
    named = "path" in header or "label" in header
    if named and not ({"path", "label"} <= set(header) and len(set(header)) == len(header)):
        raise InputError(f"the header needs 'path' and 'label', once each; it has {header}")
    if not first:
        raise InputError("holds no scans")
    if not named and len(header) != 2:
        raise InputError(f"expected two columns (path, label), or a header; found {len(header)} of them")
    names = header if named else COLUMNS[:2]
    cells: dict[str, list[str]] = {name: [] for name in COLUMNS if name in names}
    places = [names.index(name) for name in cells]
    number = 1
    for number, row in enumerate(rows if named else itertools.chain([first], rows), 1 + named):
        if len(row) > len(names) or number > MOST_ROWS:
            wrong = f"more than {MOST_ROWS} rows" if number > MOST_ROWS else f"row {number}: {len(row)} cells"
            raise InputError(f"{wrong}, expected {len(names)} in a row")
        for column, place in zip(cells.values(), places, strict=True):
            column.append(row[place].strip() if place < len(row) else "")
    if not cells["path"]:
        raise InputError("holds no scans")
    table = pd.DataFrame(cells, index=range(1 + named, number + 1), dtype=str)
    return table if "subject" in table else table.assign(subject=table["path"])


def _check_rows(table: pd.DataFrame, csv: Path) -> pd.DataFrame:
    """Check every cell, turn labels into integers and add the column `file`."""
    for column in COLUMNS:
        for row in table.index[table[column] == ""]:
            raise InputError(f"row {row}: the {column} is blank")
    for row in table.index[~table["label"].isin(["0", "1"])]:
        raise InputError(f"row {row}: label '{table['label'][row]}' is not 0 or 1")
    files = [_locate(path, csv.parent, row) for row, path in table["path"].items()]
    table = table.assign(label=table["label"].astype(int), file=pd.Series(files, table.index, dtype=object))
    for row in table.index[table["file"].duplicated()]:
        raise InputError(f"row {row}: {table['path'][row]} is listed twice")
    return table.reset_index(drop=True)


def _locate(path: str, folder: Path, row: Hashable) -> Path:
    """Absolute path of a scan, relative to the CSV's folder."""
    try:
        return Path(os.path.abspath(folder / Path(path).expanduser()))
    except RuntimeError as problem:
        raise InputError(f"row {row}: {path}: {problem}") from problem


# Scans -------------------------------------------------------------------------------------------


def check_grid(table: pd.DataFrame) -> Grid:
    """Read every header: all scans must be 3D, real, and share one shape and one affine.

    Raises:
        InputError: naming every scan that cannot be used, the first 20 in words.
    """
    grids: list[Grid] = []
    problems: dict[int, str] = {}
    for row, file in enumerate(table["file"]):
        try:
            grids.append(nifti.read_grid(file))
        except InputError as problem:
            problems[row] = str(problem)
            continue
        first = grids[0]
        if grids[-1].shape != first.shape:
            problems[row] = f"shape {grids[-1].shape}, the first scan has {first.shape}"
        elif not grids[-1].lies_like(first):
            problems[row] = "its affine differs from the first scan's"
    if problems:  # the voxels of the others are looked at as well, so that one report has all
        problems |= _decode(table["file"].drop(list(problems)), lambda row, volume: None, WORKERS)
    _report(problems, table)
    return grids[0]


def scans_digest(table: pd.DataFrame) -> str:
    """SHA-256 of 16 samples of every scan's file, wherever it lies: it tells when scans were made anew."""
    digest = hashlib.sha256()
    for path, file in zip(table["path"], table["file"], strict=True):
        try:
            size = file.stat().st_size
            digest.update(f"\n{size} ".encode())
            with file.open("rb") as stream:
                for start in np.linspace(0, max(size - SAMPLE, 0), 16, dtype=np.int64):
                    stream.seek(start)
                    digest.update(stream.read(SAMPLE))
        except OSError as problem:
            raise InputError(f"{path}: cannot be read ({problem.strerror})") from problem
    return digest.hexdigest()


def read_scan(file: Path) -> np.ndarray:
    """Decode one scan and scale it to [0, 1] by its own minimum and maximum, as published.

    Returns:
        float32 (X, Y, Z).

    Raises:
        InputError: damaged file, voxels that are not finite, or a constant scan.
    """
    values, _ = nifti.read_image(file)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError("has voxels that are NaN or infinite")
    if low == high:
        raise InputError(f"is constant (every voxel is {low:g})")
    if high / 2 - low / 2 > np.finfo(np.float32).max / 2:
        raise InputError(f"has voxels from {low:g} to {high:g}, too far apart for float32")
    values -= low
    values /= high - low
    return values


def _report(problems: dict[int, str], table: pd.DataFrame) -> None:
    """Raise InputError where there are problems, by row; the first in words."""
    if problems:
        lines = [f"{table['path'][row]}: {problems[row]}" for row in sorted(problems)[:SHOWN]]
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        raise InputError(f"{len(problems)} of {len(table)} scans cannot be used: {'; '.join(lines)}{more}")


class Scans(Dataset):
    """The scans of a cohort as tensors; item i is (volume, label) of row i.

    volume: float32 (1, X, Y, Z) in [0, 1]; label: int. With a cache every scan is decoded once, and handed
    out as it lies there, not as a copy.
    """

    def __init__(self, table: pd.DataFrame, cached: np.ndarray | Tensor | None = None) -> None:
        self.files = list(table["file"])
        self.labels = [int(label) for label in table["label"]]
        self.cached = cached

    @property
    def in_memory(self) -> bool:
        """Whether a scan can be had without decoding or reading from disk."""
        return self.cached is not None and not isinstance(self.cached, np.memmap)

    @property
    def on_gpu(self) -> bool:
        """Whether the scans are kept in a GPU's memory."""
        return isinstance(self.cached, Tensor)

    def mean(self, rows: Sequence[int]) -> np.ndarray:
        """Mean of some scans, float32 (X, Y, Z), read one at a time."""
        total = self[rows[0]][0][0].double()
        for row in rows[1:]:
            total += self[row][0][0]
        return (total / len(rows)).float().cpu().numpy()

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict:
        """What a process that does not share this one's memory needs: a file's name, not its content."""
        if not isinstance(self.cached, np.memmap):
            return vars(self)
        return vars(self) | {"cached": (self.cached.filename, self.cached.shape)}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if isinstance(self.cached, tuple):
            file, shape = self.cached
            self.cached = np.memmap(file, np.float32, "c", shape=shape)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if self.cached is not None:
            volume = self.cached[i]
        else:
            with blaming(self.files[i]):
                volume = read_scan(self.files[i])
        return torch.as_tensor(volume).unsqueeze(0), self.labels[i]


def open_scans(
    table: pd.DataFrame,
    grid: Grid,
    cache: str,
    folder: Path,
    workers: int,
    device: torch.device = CPU,
    shared: bool = False,
    need: int = 0,
) -> Scans:
    """Decode and check every scan once, and keep what `cache` says.

    Args:
        table: from `read_csv`.
        grid: from `check_grid`.
        cache: "gpu", in the memory of `device`; "ram"; "disk", one memory-mapped file in `folder`, reused as
            long as no scan changes; "none", decode again at every use; "auto", on the GPU where they
            take at most half of its free memory, else in a disk cache that is there, else as `choose_cache`
            says; "reuse", a disk cache that is there, else none.
        folder: where a disk cache lies.
        workers: threads that decode.
        device: what the scans are read for.
        shared: other processes may read the same scans at the same time.
        need: bytes of the device's memory that "auto" leaves to the network at least.

    Raises:
        InputError: naming every scan that cannot be used; or `device` has no room of its own for them.
    """
    size = 4 * len(table) * prod(grid.shape)
    if cache == "gpu":
        check_gpu_cache(size, device)
    stored = folder / f"scans-{_cache_key(table, grid)}.float32"
    shape = (len(table), *grid.shape)
    if cache == "auto" and fits_on_gpu(size, device, need):
        cache = "gpu"
    if cache in ("auto", "disk", "reuse") and _is_whole(stored, size):
        print(f"scans: {len(table)}, read from {stored}")
        return Scans(table, np.memmap(stored, np.float32, "c", shape=shape))
    if cache == "auto":
        cache = choose_cache(size, folder, shared)
    places = {"gpu": f"in the memory of {device}", "ram": "in memory", "disk": f"in {stored}"}
    where = places.get(cache, "not cached")
    print(f"scans: {len(table)} of {'x'.join(map(str, grid.shape))} voxels, {size / 1e9:.2f} GB, {where}")
    if cache == "disk":
        _fill_disk(table, stored, size, workers)
        return Scans(table, np.memmap(stored, np.float32, "c", shape=shape))
    kept = None
    if cache in ("gpu", "ram"):
        kept = torch.empty(shape, device=device if cache == "gpu" else CPU)

    def keep(row: int, volume: np.ndarray) -> None:
        if kept is not None:
            kept[row] = torch.from_numpy(volume)

    if kept is not None and _is_whole(stored, size):  # decoded and checked before
        for row, volume in enumerate(np.memmap(stored, np.float32, "c", shape=shape)):
            keep(row, volume)
    else:
        _report(_decode(table["file"], keep, workers), table)
    return Scans(table, kept.numpy() if kept is not None and cache == "ram" else kept)


class ReadAhead:
    """Batches for a GPU, put together in pinned memory by threads while the GPU works; see `loader`.

    Threads, since a process would copy every scan twice more. The order is that of a DataLoader of the
    same generator.
    """

    def __init__(self, order: DataLoader, dataset: Subset, workers: int, device: torch.device) -> None:
        self.order, self.dataset, self.workers, self.device = order, dataset, max(workers, 1), device

    @property
    def generator(self) -> torch.Generator | None:
        """What shuffles."""
        return self.order.generator

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        coming: deque[Future] = deque()
        pool = ThreadPoolExecutor(self.workers, initializer=devices.make_current, initargs=(self.device,))
        try:
            for numbers in self.order:
                coming.append(pool.submit(self._gather, numbers.tolist()))
                if len(coming) > self.workers:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, too

    def _gather(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """One batch: volumes (B, 1, X, Y, Z) and labels (B,)."""
        volumes, labels = zip(*(self.dataset[number] for number in numbers), strict=True)
        pinned = self.device.type == "cuda"
        batch = torch.empty((len(volumes), *volumes[0].shape), pin_memory=pinned)
        return torch.stack(volumes, out=batch), torch.tensor(labels)


Loader = DataLoader | ReadAhead


def loader(
    scans: Scans,
    rows: list[int],
    batch: int,
    workers: int,
    seed: int | None = None,
    device: torch.device = CPU,
) -> Loader:
    """Batches of some scans for a device: shuffled where there is a seed, else in the order of `rows`.

    For CUDA, `workers` threads read ahead (`ReadAhead`), but not where the scans are kept on the GPU. Else
    `workers` processes do, but not where the scans are kept in memory: they are at hand, and a process would
    copy them once more.
    """
    chosen = Subset(scans, rows)
    ahead = device.type == "cuda" and not scans.on_gpu
    order = DataLoader(
        range(len(rows)) if ahead else chosen,  # type: ignore[arg-type]
        batch,
        shuffle=seed is not None,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        num_workers=0 if ahead or scans.in_memory else workers,
        worker_init_fn=_ignore_signals,
    )
    return ReadAhead(order, chosen, workers, device) if ahead else order


def _ignore_signals(_: int) -> None:
    """Leave Ctrl-C and SIGTERM, which may go to all processes, to the one that this one reads for."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


@atexit.register
def _end_readers() -> None:
    """Kill what still reads when the command ends: multiprocessing would send SIGTERM and wait."""
    for child in multiprocessing.active_children():
        child.kill()


def _is_whole(stored: Path, size: int) -> bool:
    return stored.exists() and stored.stat().st_size == size


def _fill_disk(table: pd.DataFrame, stored: Path, size: int, workers: int) -> None:
    """Decode every scan into one file; of several processes the first does so, the others wait for it."""
    folder, ours = stored.parent, ["scans-*.float32"]
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    storage.make_folder(folder)
    try:
        with storage.locked(folder / storage.LOCK):
            storage.remove_leftovers(folder, ours)
            if _is_whole(stored, size):
                return
            with storage.whole_file(stored) as path:
                # written, not mapped: a disk that fills up raises an error then, and does not kill
                write = functools.partial(_write_volume, path)
                _report(_decode(table["file"], write, workers), table)
            for former in set(storage.written(folder, ours)) - {stored}:  # of scans that have changed
                former.unlink(missing_ok=True)
    except InputError:
        with contextlib.suppress(OSError):  # another process may have put something there
            for place in missing:
                place.rmdir()
        raise


def _write_volume(path: Path, row: int, volume: np.ndarray) -> None:
    """Write one decoded scan to its place in the file of all."""
    with path.open("r+b") as stream:
        stream.seek(row * volume.nbytes)
        stream.write(np.ascontiguousarray(volume).data)


def _decode(files: pd.Series, keep: Callable[[int, np.ndarray], None], workers: int) -> dict[int, str]:
    """Decode and check scans, and hand row and volume to `keep`; returns what is wrong with which rows."""
    problems: dict[int, str] = {}

    def decode(row: int) -> None:
        try:
            volume = read_scan(files[row])
        except InputError as problem:
            problems[row] = str(problem)
            return
        keep(row, volume)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            for _ in utils.progress(pool.map(decode, files.index), len(files), desc="reading scans"):
                pass
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, too
    return problems


def _cache_key(table: pd.DataFrame, grid: Grid) -> str:
    """A name for the decoded cohort that changes whenever a scan, the grid or the scaling does."""
    digest = hashlib.sha256(f"{SCALING} {grid.shape}".encode())
    for file in table["file"]:
        status = file.stat()
        digest.update(f"\n{file} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def fits_on_gpu(size: int, device: torch.device, need: int) -> bool:
    """Whether `size` bytes fill at most half of a CUDA device's free memory, and leave `need` bytes."""
    if device.type != "cuda":
        return False
    free = devices.free_memory(device)
    return size <= min(free / 2, free - need)


def check_gpu_cache(size: int, device: torch.device) -> None:
    """Raise InputError where `size` bytes of scans cannot be kept in a device's own memory."""
    if device.type != "cuda":
        raise InputError(f"--cache gpu: the device is {device}, expected a GPU of CUDA")
    if size > devices.free_memory(device):
        free = f"{device} has {devices.free_memory(device) / 1e9:.1f} GB free"
        raise InputError(f"--cache gpu: the scans take {size / 1e9:.1f} GB, {free}")


def choose_cache(size: int, folder: Path, shared: bool = False) -> str:
    """The first of ram and disk that `size` bytes fill at most half of; "none" where neither does.

    Where the scans are shared with other processes disk comes first: they read the same file.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    room = {"ram": memory.available(), "disk": shutil.disk_usage(existing).free}
    order = ("disk", "ram") if shared else ("ram", "disk")
    return next((cache for cache in order if size <= room[cache] / 2), "none")


# Folds -------------------------------------------------------------------------------------------


def make_folds(table: pd.DataFrame, k: int, split: str, val_fraction: float, seed: int) -> pd.DataFrame:
    """Divide the subjects into k folds of train, validation and test.

    Subjects are divided, never scans, so no subject is in two roles of a fold. A subject with any
    scan labelled 1 counts as 1 for stratification.

    Args:
        table: from `read_csv`.
        k: number of folds, >= 2.
        split: a key of SPLITS. "stratified": test folds stratified by label and shuffled;
            "contiguous": the published blocks in the CSV's order.
        val_fraction: share of a fold's training subjects kept for validation, stratified, shuffled;
            0 where nothing is to be trained.
        seed: of both shuffles.

    Returns:
        Columns fold, role (train, val, test), path, label, subject: every scan once per fold.

    Raises:
        InputError: too few subjects of a class, or a subject that a block boundary cuts.
    """
    subjects = table.groupby("subject", sort=False)["label"].max()
    names, labels = subjects.index.to_numpy(dtype=object), subjects.to_numpy()
    counts = np.bincount(labels, minlength=2)
    needed = k if split == "stratified" else int(val_fraction > 0)
    if counts.min() < needed or counts.sum() < k:
        raise InputError(
            f"{k} {split} folds need at least {needed} subjects of each label and {k} in all; "
            f"the CSV has {counts[0]} of label 0 and {counts[1]} of label 1"
        )
    folds = []
    for fold, test in enumerate(SPLITS[split](table, names, labels, k, seed)):
        rest = np.flatnonzero(~subjects.index.isin(test))  # np.isin compares every pair of texts
        val = names[_validation(rest, labels[rest], val_fraction, seed)] if val_fraction else []
        role = np.where(table["subject"].isin(test), "test", "train")
        role[table["subject"].isin(val)] = "val"
        folds.append(table[COLUMNS].assign(fold=fold, role=role))
    return pd.concat(folds, ignore_index=True)[["fold", "role", *COLUMNS]]


def folds_digest(folds: pd.DataFrame) -> str:
    """SHA-256 of who is train, val and test in each fold."""
    return hashlib.sha256(folds.to_csv(index=False).encode()).hexdigest()


def rows(folds: pd.DataFrame, fold: int, role: str) -> list[int]:
    """Row numbers, in the CSV's order, of the scans that have a role in a fold."""
    roles = folds.loc[folds["fold"] == fold, "role"].to_numpy()
    return [int(row) for row in np.flatnonzero(roles == role)]


def _validation(rest: np.ndarray, labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose the validation subjects among the training part, in proportion to the labels."""
    size = round(fraction * len(rest))
    if min(size, len(rest) - size, np.bincount(labels, minlength=2).min()) >= 2:
        train, val = train_test_split(
            np.arange(len(rest)), test_size=size, stratify=labels, random_state=seed
        )
        if set(labels[train]) == set(labels[val]) == {0, 1}:
            return rest[val]
    raise InputError(
        f"--val-fraction {fraction:g} of {len(rest)} training subjects leaves training or validation "
        "without both labels"
    )


def _stratified(table: pd.DataFrame, names: np.ndarray, labels: np.ndarray, k: int, seed: int) -> list:
    splitter = StratifiedKFold(k, shuffle=True, random_state=seed)
    return [names[test] for _, test in splitter.split(names, labels)]


def _contiguous(table: pd.DataFrame, names: np.ndarray, labels: np.ndarray, k: int, seed: int) -> list:
    size = len(table) // k
    block = np.minimum(np.arange(len(table)) // size, k - 1)  # the last block takes the remainder
    blocks = pd.Series(block).groupby(table["subject"])
    for subject in blocks.nunique().loc[lambda n: n > 1].index:
        raise InputError(f"--split contiguous: the scans of subject {subject} fall into two blocks")
    return [table["subject"][block == fold].unique() for fold in range(k)]


SPLITS: dict[str, Callable[..., list]] = {"stratified": _stratified, "contiguous": _contiguous}
