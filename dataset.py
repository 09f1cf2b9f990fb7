"""From a CSV to checked scans, from subjects to folds, and from scans to batches of tensors: a cohort."""

import copy
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor
from torch.utils.data import Dataset, Subset

import utils
from internals import caches, nifti, storage, tables
from internals.caches import Cache
from internals.errors import InputError, blaming
from internals.loading import Batches, Loader, ReadAhead
from internals.nifti import Grid

COLUMNS = ["path", "label", "subject"]
UNKNOWN = -1  # the label of a scan that has none
CPU = torch.device("cpu")
SCALING = "min-max, float32"
SAMPLE = 2**12  # bytes
SHOWN = 20  # bad scans named in one message
LOOKERS = 16  # threads that look at files without decoding them: they wait for the file system, mostly
PIECE = 32  # files that each of them takes at once: on a disk nearby, one costs less than a change of threads
# of a list of scans: twice as many as UK Biobank has; what is larger is something else, and not read
CSV_SIZE, MOST_ROWS = 2**25, 200_000

Result = TypeVar("Result")


# The cohort --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """What was found when the files of all scans were looked at.

    Attributes:
        grid: the shape and affine of all.
        scans_sha256: what tells their content from another, from `scans_digest`.
        mark: stands for that, and for each file's name, size and time before it was looked at.
        resampled: whether scans that lie elsewhere are brought onto the grid when they are read.
    """

    grid: Grid
    scans_sha256: str
    mark: str
    resampled: bool = False


@dataclass(frozen=True)
class Cohort:
    """Checked scans on one grid, their folds, and their identity.

    Attributes:
        csv: the list that they are from.
        table: one row per scan, from `read_csv`.
        checked: their grid, and what tells their content from another, from `check_scans`.
        folds: who is trained on, validated on and tested in each fold, from `make_folds`.
        k: number of folds.
    """

    csv: Path
    table: pd.DataFrame
    checked: Checked
    folds: pd.DataFrame
    k: int

    @property
    def grid(self) -> Grid:
        """The scans' shape and affine."""
        return self.checked.grid

    @functools.cached_property
    def identity(self) -> dict:
        """What tells this cohort from others: digests of CSV, scans and folds, and the grid."""
        return {
            "csv_sha256": storage.file_sha256(self.csv),
            "scans_sha256": self.checked.scans_sha256,
            "folds_sha256": hashlib.sha256(self.folds.to_csv(index=False).encode()).hexdigest(),
            "grid": self.grid.record(),
        }

    def scan_indices(self, fold: int, role: str) -> list[int]:
        """Row numbers, in the CSV's order, of the scans that have a role (train, val, test) in a fold."""
        roles = self.folds.loc[self.folds["fold"] == fold, "role"].to_numpy()
        return [int(row) for row in np.flatnonzero(roles == role)]

    def labels(self, fold: int, role: str) -> np.ndarray:
        """Labels of those scans, int (N,)."""
        return self.table["label"].to_numpy()[self.scan_indices(fold, role)]

    def training_controls(self, fold: int) -> list[int]:
        """Row numbers of a fold's training scans of label 0."""
        labels = self.table["label"].to_numpy()
        return [row for row in self.scan_indices(fold, "train") if labels[row] == 0]

    def check_controls(self, folds: Sequence[int], option: str) -> None:
        """Raise InputError where a fold has no training controls, which an option needs the mean of."""
        for fold in folds:
            if not self.training_controls(fold):
                raise InputError(f"{option}: fold {fold} has no controls among its training scans")

    def permuted_labels(self, fold: int, seed: int) -> np.ndarray:
        """Labels of all scans, int (N,), for a network that is to learn nothing: see --permute-labels.

        Labels are shuffled among the training subjects of a fold, and among its validation subjects, so that
        either has as many of each as before; test scans keep theirs. All scans of a subject get the same one.
        """
        labels, random = self.table["label"].to_numpy(copy=True), np.random.default_rng([seed, fold])
        for role in ("train", "val"):
            rows = self.scan_indices(fold, role)
            of_subjects = self.table.loc[rows].groupby("subject", sort=False)["label"].max()
            shuffled = pd.Series(random.permutation(of_subjects.to_numpy()), of_subjects.index)
            labels[rows] = shuffled[self.table.loc[rows, "subject"]]
        return labels

    def open_scans(
        self, cache: Cache, threads: int = utils.THREADS, rows: Sequence[int] | None = None
    ) -> "ScanDataset":
        """Decode and check every scan once, and keep it where the cache says; see `Cache.fill`.

        Args:
            threads: that decode.
            rows: those that are checked ahead where the cache keeps none (all); others, when they are used.

        Raises:
            InputError: naming every scan that cannot be used; or the cache has no room for them.
        """
        shape = (len(self.table), *self.grid.shape)
        chosen = self.table if rows is None else self.table.loc[list(rows)]
        onto = self.grid if self.checked.resampled else None
        read = functools.partial(_decode_all, chosen, max(threads, 1), onto)
        key = _cache_key(self.table, self.grid, onto)
        return ScanDataset(self.table, cache.fill(shape, key, read, len(chosen)), onto)


def new_cohort(
    csv: Path, k: int, split: str, val_fraction: float, seed: int, record: Mapping[str, Any] | None = None
) -> Cohort:
    """Read a list of scans, divide it into folds (see `make_folds`), and check the scans' files.

    Args:
        record: of an earlier run, which may have checked the same files; see `check_scans`.
    """
    table = read_csv(csv)
    folds = make_folds(table, k, split, val_fraction, seed)
    return Cohort(csv, table, check_scans(table, record or {}), folds, k)


# The CSV -----------------------------------------------------------------------------------------


def read_csv(path: Path, labelled: bool = True) -> pd.DataFrame:
    """Read the list of scans.

    Args:
        path: a CSV without a header (path, label), or with one naming path, label and optionally
            subject. Relative paths are relative to the CSV's folder; ~ is expanded.
        labelled: whether every scan must have a label; else the column may be missing, or cells blank.

    Returns:
        One row per scan, in the CSV's order: path (str, as written), label (0, 1 or UNKNOWN), subject (str;
        the path where there is no such column) and file (absolute Path).

    Raises:
        InputError: the file cannot be read as such a table, or is larger than any such.
    """
    with blaming(path):
        return _check_rows(_read_cells(path, labelled), path, labelled)


def as_written(table: pd.DataFrame) -> pd.DataFrame:
    """A table as files have it: labels that are not known are blank."""
    known = table["label"] != UNKNOWN
    return table if known.all() else table.assign(label=table["label"].astype("Int64").where(known))


def _read_cells(file: Path, labelled: bool) -> pd.DataFrame:
    """Path, label and subject of every row, as text; the index is the row's number, from 1."""
    if storage.file_size(file, "CSV") > CSV_SIZE:
        raise InputError(f"is larger than {CSV_SIZE >> 20} MiB; expected a list of scans")
    rows = tables.read_rows(file)
    first = next(rows, [])
    header = [name.strip().lower() for name in first]
    named, needed = "path" in header or "label" in header, COLUMNS[: 2 if labelled else 1]
    if named and not (set(needed) <= set(header) and len(set(header)) == len(header)):
        wanted = " and ".join(f"'{name}'" for name in needed)
        raise InputError(f"the header needs {wanted}, once each; it has {header}")
    if not first:
        raise InputError("holds no scans")
    if not named and not len(needed) <= len(header) <= 2:
        wanted = "two columns (path, label)" if labelled else "one column (path) or two (path, label)"
        raise InputError(f"expected {wanted}, or a header; found {len(header)} of them")
    names = header if named else COLUMNS[: len(header)]
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
    table = table if "label" in table else table.assign(label="")
    table = table if "subject" in table else table.assign(subject=table["path"])
    return table[COLUMNS]


def _check_rows(table: pd.DataFrame, csv: Path, labelled: bool) -> pd.DataFrame:
    """Check every cell, turn labels into integers and add the column `file`."""
    for column in COLUMNS if labelled else ("path", "subject"):
        for row in table.index[table[column] == ""]:
            raise InputError(f"row {row}: the {column} is blank")
    for row in table.index[~table["label"].isin(["0", "1"] if labelled else ["0", "1", ""])]:
        raise InputError(f"row {row}: label '{table['label'][row]}' is not 0 or 1")
    table = table.assign(label=table["label"].replace("", str(UNKNOWN)))
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


def check_new_scans(table: pd.DataFrame, like: Grid | None, resample: bool) -> Checked:
    """Check scans that are not those of a run.

    Args:
        like: the grid of the run's scans, where it is known.
        resample: whether they may lie elsewhere, and are brought onto that grid when they are read.

    Raises:
        InputError: as `check_grid`.
    """
    grid = check_grid(table, like, resample)
    return Checked(grid, scans_digest(table), "", resample)


def check_scans(table: pd.DataFrame, record: Mapping[str, Any]) -> Checked:
    """Check the header and sample the content of every scan's file, unless that was done before.

    A record of a run, run.json, holds what was found then, and the mark of it. While the mark fits, the files
    are as they were, and but for the first none is opened. This relies on a file's size or time of
    modification, to the nanosecond, changing with its content: one that was replaced with both kept is not
    noticed. A record that is damaged, of other scans or of an earlier version has no mark that fits.

    Raises:
        InputError: as `check_grid`.
    """
    states = _file_states(table)  # before they are read: what changes meanwhile is read again next time
    found = _recall(record, table, states)
    if found is None:
        grid, digest = check_grid(table), scans_digest(table)
        found = Checked(grid, digest, _mark(states, digest))
    return found


def _recall(record: Mapping[str, Any], table: pd.DataFrame, states: list[str]) -> Checked | None:
    """What a record says of the scans, where their files are as they were."""
    digest, mark = record.get("scans_sha256"), record.get("scans_mark")
    if not (isinstance(digest, str) and isinstance(mark, str)):
        return None
    if mark != _mark(states, digest):
        return None
    with blaming(table["path"][0]):
        return Checked(nifti.read_grid(table["file"][0]), digest, mark)  # all were found to lie on its grid


def _mark(states: list[str], digest: str) -> str:
    """What stands for some files as they are, and for their content, in hexadecimal."""
    return hashlib.sha256(json.dumps([digest, states]).encode()).hexdigest()


def _file_states(table: pd.DataFrame) -> list[str]:
    """Name, size and time of modification of every scan's file, as text."""
    files = table["file"].tolist()

    def state(row: int) -> str:
        try:
            status = files[row].stat()
        except (OSError, ValueError):  # said where the file is read
            return f"{files[row]} missing"
        return f"{files[row]} {status.st_size} {status.st_mtime_ns}"

    return list(_look(state, len(files), "files"))


def _look(work: Callable[[int], Result], count: int, name: str) -> Iterator[Result]:
    """Apply `work` to the rows of many files, in threads; the results in their order, few held at a time."""
    rows = range(count)
    pieces = [rows[start : start + PIECE] for start in range(0, count, PIECE)]
    groups = [pieces[start : start + LOOKERS] for start in range(0, len(pieces), LOOKERS)]
    for group in utils.progress(groups, desc=name, leave=False):
        found = utils.in_threads(lambda piece: [work(row) for row in piece], group, threads=LOOKERS)
        yield from itertools.chain.from_iterable(found)


def check_grid(table: pd.DataFrame, like: Grid | None = None, anywhere: bool = False) -> Grid:
    """Read every header: all scans must be 3D, real, and share one shape and one affine.

    Args:
        like: the grid that they must lie on, that of a run's scans; by default the first scan's.
        anywhere: whether they may lie elsewhere after all.

    Returns:
        The first scan's grid; or `like`, where they may lie elsewhere.

    Raises:
        InputError: naming every scan that cannot be used, the first 20 in words.
    """
    files, problems = table["file"].tolist(), dict[int, str]()
    first: Grid | None = None
    owner = "the first scan" if like is None else "the run"
    advice = "" if like is None else "; --resample brings it there, as nilearn's resample_to_img does"

    def look(row: int) -> Grid | str:
        try:
            return nifti.read_grid(files[row])
        except InputError as problem:
            return str(problem)

    for row, found in enumerate(_look(look, len(files), "headers")):
        if isinstance(found, Grid):
            first = first or found
            mismatch = found.mismatch(like or first, owner)
            found = f"{mismatch}{advice}" if mismatch and not anywhere else ""
        if found:
            problems[row] = found
    if problems and len(table) <= caches.CHECKED_AHEAD:  # one report has what is wrong with voxels, too
        onto = like if anywhere else None
        rest = table["file"].drop(list(problems))
        problems |= _decode(rest, lambda row, volume: None, utils.THREADS, onto)
    _report(problems, table)
    assert first is not None
    return like if like is not None and anywhere else first


def scans_digest(table: pd.DataFrame) -> str:
    """SHA-256 of 16 samples of every scan's file, wherever it lies: it tells when scans were made anew."""
    digest = hashlib.sha256()
    for samples in _samples(table):
        digest.update(samples)
    return digest.hexdigest()


def scan_digests(table: pd.DataFrame) -> list[str]:
    """SHA-256 of 16 samples of each scan's file: it tells a scan again under another name."""
    return [hashlib.sha256(samples).hexdigest() for samples in _samples(table)]


def _samples(table: pd.DataFrame) -> Iterator[bytes]:
    """The size of every scan's file, and 16 samples of its content."""
    paths, files = table["path"].tolist(), table["file"].tolist()

    def sample(row: int) -> bytes:
        try:
            size = files[row].stat().st_size
            with files[row].open("rb") as stream:
                samples = [f"\n{size} ".encode()]
                for start in np.linspace(0, max(size - SAMPLE, 0), 16, dtype=np.int64):
                    stream.seek(start)
                    samples.append(stream.read(SAMPLE))
        except OSError as problem:
            raise InputError(f"{paths[row]}: cannot be read ({problem.strerror})") from problem
        return b"".join(samples)

    return _look(sample, len(files), "samples")


def read_scan(file: Path, onto: Grid | None = None) -> np.ndarray:
    """Decode one scan and scale it to [0, 1] by its own minimum and maximum, as published.

    Args:
        onto: the grid that it is brought onto by linear interpolation where it lies elsewhere, with its
            minimum outside its field of view; by default it stays where it is.

    Returns:
        float32 (X, Y, Z).

    Raises:
        InputError: damaged file, voxels that are not finite, a constant scan, or one that misses `onto`.
    """
    values, own = nifti.read_image(file)
    low, high = values.min(), values.max()
    if onto is not None and own.mismatch(onto, "the grid") and np.isfinite(low) and np.isfinite(high):
        values = nifti.resample(values, own.affine, onto, "linear", fill=float(low))
        if low < high and values.min() == values.max():
            raise InputError("its field of view does not meet the run's grid")
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


def _decode_all(
    table: pd.DataFrame, threads: int, onto: Grid | None, keep: Callable[[int, np.ndarray], None]
) -> None:
    """Decode every scan and hand row and volume to `keep`; InputError where any cannot be used."""
    _report(_decode(table["file"], keep, threads, onto), table)


def _decode(
    files: pd.Series, keep: Callable[[int, np.ndarray], None], threads: int, onto: Grid | None = None
) -> dict[int, str]:
    """Decode and check scans, and hand row and volume to `keep`; returns what is wrong with which rows."""
    problems: dict[int, str] = {}

    def decode(row: int) -> None:
        try:
            volume = read_scan(files[row], onto)
        except InputError as problem:
            problems[row] = str(problem)
            return
        keep(row, volume)

    utils.in_threads(decode, files.index, "reading scans", threads)
    return problems


def _cache_key(table: pd.DataFrame, grid: Grid, onto: Grid | None) -> str:
    """A name for the decoded cohort that changes whenever a scan, the grid or the scaling does."""
    digest = hashlib.sha256(f"{SCALING} {grid.shape}".encode())
    if onto is not None:
        digest.update(f" {onto.record()}".encode())
    for state in _file_states(table):
        digest.update(f"\n{state}".encode())
    return digest.hexdigest()[:16]


class ScanDataset(Dataset):
    """The scans of a cohort as tensors; item i is (volume, label) of row i.

    volume: float32 (1, X, Y, Z) in [0, 1]; label: int. Cached scans are handed out as they lie there, not as
    copies; others are decoded at every use, and brought onto the grid `onto`, if there is one.
    """

    def __init__(
        self, table: pd.DataFrame, cached: np.ndarray | Tensor | None = None, onto: Grid | None = None
    ) -> None:
        self.files = list(table["file"])
        self.labels = [int(label) for label in table["label"]]
        self.cached, self.onto = cached, onto

    @property
    def in_memory(self) -> bool:
        """Whether a scan can be had without decoding or reading from disk."""
        return self.cached is not None and not isinstance(self.cached, np.memmap)

    @property
    def on_gpu(self) -> bool:
        """Whether the scans are kept in a GPU's memory."""
        return isinstance(self.cached, Tensor)

    def mean(self, rows: Sequence[int]) -> np.ndarray:
        """Mean of some scans, float32 (X, Y, Z), added up one at a time."""
        total = sum(volume.double() for volume in self._each(rows))
        return (cast(Tensor, total) / len(rows)).float().cpu().numpy()

    def volumes(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """Some scans, float32 (X, Y, Z), one at a time."""
        yield from (volume.cpu().numpy() for volume in self._each(rows))

    def _each(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """Some scans (X, Y, Z), one at a time; read ahead by threads, which need no shared memory."""
        if self.in_memory:
            yield from (self[row][0][0] for row in rows)
            return
        order = Batches(range(len(rows)), 1)  # type: ignore[arg-type]
        ahead = ReadAhead(order, Subset(self, list(rows)), utils.THREADS, CPU)
        yield from (volume[0, 0] for volume, _ in ahead)

    def with_labels(self, labels: np.ndarray) -> "ScanDataset":
        """The same scans with other labels, (N,)."""
        other = copy.copy(self)
        other.labels = [int(label) for label in labels]
        return other

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
                volume = read_scan(self.files[i], self.onto)
        return torch.as_tensor(volume).unsqueeze(0), self.labels[i]

    def loader(
        self,
        indices: list[int],
        batch: int,
        workers: int = utils.THREADS,
        seed: int | None = None,
        device: torch.device = CPU,
    ) -> Loader:
        """Batches of some scans for a device: shuffled where there is a seed, else in the order of `indices`.

        For CUDA, `workers` threads read ahead (`ReadAhead`), but not where the scans are kept on the GPU.
        Else `workers` processes do, but not where the scans are kept in memory: they are at hand, and a
        process would copy them once more.
        """
        chosen = Subset(self, indices)
        ahead = device.type == "cuda" and not self.on_gpu
        order = Batches(
            range(len(indices)) if ahead else chosen,  # type: ignore[arg-type]
            batch,
            shuffle=seed is not None,
            generator=None if seed is None else torch.Generator().manual_seed(seed),
            num_workers=0 if ahead or self.in_memory else workers,
        )
        return ReadAhead(order, chosen, workers, device) if ahead else order


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
