"""A training run that a command goes on from: its cohort, its model and its networks."""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.optim.swa_utils import update_bn

import dataset
import models
import utils
from brain_maps import FLOORS
from dataset import Cohort
from internals import nifti, storage, tables
from internals.checkpoints import load_weights
from internals.errors import InputError, blaming
from internals.nifti import Grid
from internals.process import printable

ROLES = {role: role for role in ("train", "val", "test")}
FOLDING = {"fold": 5, "split": "stratified", "val_fraction": 0.2, "seed": 0}  # train_cv.py's defaults
CALIBRATION = 32  # training scans at most that give an untrained network's BatchNorm its statistics
# what train_cv.py leaves in a run's folder for new scans: a digest of each of its own, the mean head of each
# fold's training scans and the mean of the controls among them, what is typical of them, and temperatures
SCANS, HEAD, CONTROLS = "scans.csv", "mean_train_f{}.nii.gz", "mean_controls_f{}.nii.gz"
RANGES, TEMPERATURES = "typical.csv", "calibration.csv"
SCAN_COLUMNS = ["path", "samples_sha256"]
NAMED = 5  # scans in a message
RESAMPLE = "bring scans of another shape or affine onto the run's grid, by linear interpolation"  # --resample


@dataclass(frozen=True)
class Run:
    """A training run, checked.

    Attributes:
        folder: where it lies.
        cohort: the scans that it was trained and tested on; or new scans, which are "test" in every fold
            whose network never saw their subject.
        model: name of its networks.
        permuted: whether they were trained on permuted labels.
        new_scans: whether the cohort is of new scans.
    """

    folder: Path
    cohort: Cohort
    model: str
    permuted: bool = False
    new_scans: bool = False

    @property
    def is_recorded(self) -> bool:
        """Whether train_cv.py made it; else there are published checkpoints, and nothing beside them."""
        return (self.folder / "run.json").exists()

    @property
    def folds(self) -> list[int]:
        """The folds whose networks have any scan to test."""
        return [fold for fold in range(self.cohort.k) if self.cohort.scan_indices(fold, "test")]

    @functools.cached_property
    def testers(self) -> list[list[int]]:
        """For every scan of the cohort, the folds whose networks test it."""
        tests = (self.cohort.folds["role"] == "test").to_numpy().reshape(self.cohort.k, -1)  # (k, N)
        return [np.flatnonzero(row).tolist() for row in tests.T]

    @property
    def seen(self) -> np.ndarray:
        """Which scans of the cohort some network was trained or validated on, bool (N,)."""
        return np.array([len(folds) < self.cohort.k for folds in self.testers])

    def checkpoint(self, fold: int) -> Path:
        """The weights of a fold."""
        return self.folder / f"state_dict_f{fold}.pth"

    def check_controls(self, folds: Sequence[int], option: str) -> None:
        """Raise InputError where an option needs the mean of training controls, and a fold has none."""
        if not self.new_scans:
            self.cohort.check_controls(folds, option)
        for fold in folds if self.new_scans else ():
            if not (self.folder / CONTROLS.format(fold)).exists():
                raise InputError(f"{option}: {self.folder / CONTROLS.format(fold)} is not there{REMEDY}")

    def mean_controls(self, fold: int, scans: dataset.ScanDataset) -> np.ndarray:
        """The mean of a fold's training controls, float32 (X, Y, Z): as recorded, else made anew."""
        file = self.folder / CONTROLS.format(fold)
        if not file.exists():
            return scans.mean(self.cohort.training_controls(fold))
        return self.read_mean(file)

    def mean_head(self, fold: int) -> np.ndarray:
        """The mean of a fold's training scans where half of them are not zero, float32 (X, Y, Z)."""
        return self.read_mean(self.folder / HEAD.format(fold))

    def read_mean(self, file: Path) -> np.ndarray:
        """A mean scan that train_cv.py wrote; InputError where there is none, or it is damaged."""
        if not file.exists():
            raise InputError(f"{file}: no such file{REMEDY}")
        with blaming(file):
            mean, _ = nifti.read_image(file, self.cohort.grid, "the scans")
            if not (np.isfinite(mean).all() and (mean > 0).any()):
                raise InputError("has voxels that are NaN or infinite, or none above 0")
        return mean


REMEDY = "; train_cv.py, called as before, keeps the networks and writes what is missing"


def new_network(model: str, grid: dataset.Grid) -> models.CNN3d:
    """`models.build_model` where name and scans are the user's: what does not fit is an InputError."""
    try:
        return models.build_model(model, grid.shape)
    except ValueError as problem:
        raise InputError(f"--model: {problem}") from problem


# Networks ----------------------------------------------------------------------------------------


class TrainedNetworks:
    """The networks of a run's folds, with the weights of their best epochs."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._digests: dict[int, str | None] = {}

    def check(self, folds: Sequence[int]) -> None:
        """Raise InputError where the network cannot be built, or some folds' weights cannot be loaded."""
        model = new_network(self.run.model, self.run.cohort.grid)
        for fold in folds:
            load_weights(model, self.run.checkpoint(fold), torch.device("cpu"))

    @property
    def suffix(self) -> str:
        """What their maps' folder has in its name."""
        return FLOORS["permuted"] if self.run.permuted else ""

    def digest(self, fold: int) -> str | None:
        """SHA-256 of a fold's weights, as they were at first sight; None where there are none."""
        path = self.run.checkpoint(fold)
        if fold not in self._digests:
            self._digests[fold] = storage.file_sha256(path) if path.exists() else None
        return self._digests[fold]

    def load(self, fold: int, scans: dataset.ScanDataset, device: torch.device) -> models.CNN3d:
        """The network of a fold, in evaluation mode; InputError where its weights changed meanwhile."""
        path = self.run.checkpoint(fold)
        model = models.build_model(self.run.model, self.run.cohort.grid.shape)
        model = load_weights(model, path, device)
        if storage.file_sha256(path) != self.digest(fold):
            raise InputError(f"{self.run.folder}: the weights of fold {fold} changed meanwhile")
        return model

    def about(self) -> dict[str, Any]:
        """What the record says of the networks."""
        return {}


@dataclass(frozen=True)
class UntrainedNetworks:
    """Networks as they were before any training, but for the running statistics of their BatchNorm.

    As they are set up (mean 0, variance 1) they shrink what differs between scans from block to block, until
    the network is nearly a constant function, and its maps are no floor for others. So they are estimated, as
    the mean over some training scans, whose labels are not looked at.
    """

    run: Run
    seed: int
    suffix = FLOORS["untrained"]  # what their maps' folder has in its name

    def check(self, folds: Sequence[int]) -> None:
        """Raise InputError where the network cannot be built."""
        new_network(self.run.model, self.run.cohort.grid)

    def digest(self, fold: int) -> str:
        """What tells a fold's weights from others."""
        count = len(self.calibration_scans(fold))
        return f"random, seed {self.seed}, BatchNorm of {count} training scans"

    def load(self, fold: int, scans: dataset.ScanDataset, device: torch.device) -> models.CNN3d:
        """The network of a fold, in evaluation mode; its weights follow from the seed and the fold."""
        utils.seed_everything(utils.own_seed(self.seed, fold))
        model = models.build_model(self.run.model, self.run.cohort.grid.shape).to(device)
        update_bn(scans.loader(self.calibration_scans(fold), 1, device=device), model, device)
        return model.eval()

    def calibration_scans(self, fold: int) -> list[int]:
        """The training scans that the statistics are estimated on."""
        return calibration_scans(self.run.cohort, fold, CALIBRATION)

    def about(self) -> dict[str, Any]:
        """What the record says of the networks."""
        counts = {str(fold): len(self.calibration_scans(fold)) for fold in range(self.run.cohort.k)}
        return {"calibration_scans_per_fold": counts}


Networks = TrainedNetworks | UntrainedNetworks


def calibration_scans(cohort: Cohort, fold: int, most: int) -> list[int]:
    """Training scans for the statistics of BatchNorm: at most so many, evenly spaced in the CSV."""
    return evenly(cohort.scan_indices(fold, "train"), most)


def evenly(rows: Sequence[int], most: int) -> list[int]:
    """At most so many of some rows, evenly spaced."""
    count = min(len(rows), most)
    return [rows[number * len(rows) // count] for number in range(count)]


# Reading what train_cv.py wrote ------------------------------------------------------------------


def find_run(folder: Path, csv: Path | None, model: str | None, k: int | None) -> Run:
    """The run in a folder, checked; `csv`, `model` and `k` are the user's, or None.

    A folder without a run.json holds published checkpoints, whose folds are the published ones.

    Raises:
        InputError: no run, a damaged one, or another than the user says.
    """
    if (folder / "run.json").exists():
        return _recorded_run(folder, csv, model, k)
    if not folder.is_dir():
        raise InputError(f"--modelpath {folder}: no such folder; train_cv.py makes one")
    if csv is None or model is None:
        raise InputError(f"--modelpath {folder}: holds no run.json, so --path and --model are needed")
    print(f"{folder} holds no run.json: published checkpoints, explained on the published contiguous folds")
    # nothing is trained here
    return Run(folder, dataset.new_cohort(csv, k or 5, "contiguous", val_fraction=0, seed=0), model)


def find_cohort(folder: Path, csv: Path | None, folding: dict[str, Any]) -> tuple[Cohort, dict[str, Any]]:
    """The cohort of the run in a folder, or a new one of `csv` where there is no run.

    Args:
        folding: the keys of FOLDING, with the user's values, or None where the user gave none.

    Returns:
        The cohort, and the options that made its folds.

    Raises:
        InputError: neither run nor CSV, a damaged run, or one of other folds than asked for.
    """
    if (folder / "run.json").exists():
        run, arguments = _recorded_run(folder, csv, model=None, k=None), recorded_folding(folder)
        for name, value in folding.items():
            if value not in (None, arguments[name]):
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} {value}: {folder} was trained with {arguments[name]}")
        return run.cohort, arguments
    if csv is None:
        raise InputError(f"--modelpath {folder}: holds no run.json, so --path is needed")
    folding = {name: FOLDING[name] if value is None else value for name, value in folding.items()}
    k, split, fraction, seed = (folding[name] for name in FOLDING)
    print(f"{folder} holds no run.json: {k} {split} folds are made of {csv}")
    return dataset.new_cohort(csv, k, split, fraction, seed), folding


def earlier_record(folder: Path) -> dict[str, Any]:
    """The record of the run in a folder, which may be any; nothing where none can be read."""
    try:
        return storage.read_json(folder / "run.json")
    except InputError:  # said where the run is gone on with
        return {}


def floor_suffix(folder: Path, weights: str) -> str:
    """What maps of "trained" or "random" networks of a run have in their folder's name; checks nothing."""
    if weights == "random":
        return UntrainedNetworks.suffix
    arguments = earlier_record(folder).get("arguments")
    permuted = isinstance(arguments, dict) and arguments.get("permute_labels") is True
    return FLOORS["permuted"] if permuted else ""


def recorded_folding(folder: Path) -> dict[str, Any]:
    """The arguments of a run that made its folds, from run.json: the keys of FOLDING."""
    record = storage.read_json(folder / "run.json")
    valid: dict[str, tuple[Any, Callable[[Any], bool]]] = {
        "fold": (int, lambda k: k >= 2),
        "split": (str, lambda name: name in dataset.SPLITS),
        "val_fraction": ((int, float), lambda part: 0 < part < 1),
        "seed": (int, lambda seed: 0 <= seed < 2**32),
    }
    with blaming(folder / "run.json"):
        arguments = storage.entry(record, "arguments", dict)
        return {name: storage.entry(arguments, name, *valid[name]) for name in FOLDING}


@dataclass(frozen=True)
class _Record:
    """What run.json says of a run."""

    whole: dict[str, Any]
    csv: Path
    csv_sha256: str
    model: str
    grid: dict[str, Any]
    permuted: bool
    k: int


def _read_record(folder: Path, model: str | None) -> _Record:
    """The record of a run; InputError where it is damaged, or the user names another model."""
    record = storage.read_json(folder / "run.json")
    with blaming(folder / "run.json"):
        csv = Path(storage.entry(record, "csv", str))
        digest, trained_model = (storage.entry(record, name, str) for name in ("csv_sha256", "model"))
        grid = storage.entry(record, "grid", dict)
        trained_on = {"permute_labels": False} | storage.entry(record, "arguments", dict)
        permuted = storage.entry(trained_on, "permute_labels", bool)
    if model not in (None, trained_model):
        raise InputError(f"--model {model}: {folder} was trained with {trained_model}")
    return _Record(record, csv, digest, trained_model, grid, permuted, recorded_folding(folder)["fold"])


def _recorded_run(folder: Path, csv: Path | None, model: str | None, k: int | None) -> Run:
    """The run that run.json and folds.csv describe, as long as its CSV and scans are the same."""
    record = _read_record(folder, model)
    if k not in (None, record.k):
        raise InputError(f"--fold {k}: {folder} was trained with {record.k} folds")
    csv = csv or record.csv
    table = dataset.read_csv(csv)
    if record.k > len(table):
        raise InputError(f"{folder / 'run.json'}: is damaged: {record.k} folds of {len(table)} scans")
    if storage.file_sha256(csv) != record.csv_sha256:
        raise InputError(f"{csv}: is not the CSV that {folder} was trained on; its content changed")
    checked = dataset.check_scans(table, record.whole)
    if checked.grid.record() != record.grid:
        raise InputError(f"{csv}: the scans' grid is not the one that {folder} was trained on")
    with blaming(folder / "folds.csv"):
        folds = _read_folds(folder / "folds.csv", table, record.k)
    if record.whole.get("scans_sha256", "") not in ("", checked.scans_sha256):
        raise InputError(f"{csv}: the scans changed since {folder} was trained on them")
    return Run(folder, Cohort(csv, table, checked, folds, record.k), record.model, record.permuted)


def _read_folds(file: Path, table: pd.DataFrame, k: int) -> pd.DataFrame:
    """The folds of a run, as `dataset.make_folds` returned them.

    Raises:
        InputError: the file does not list every scan once per fold, does not test every scan once,
            leaves a fold without test scans, or gives the scans of one subject several roles.
    """
    role = np.array(_read_roles(file, table, k), dtype=object).reshape(k, len(table))
    for row in np.flatnonzero((role == "test").sum(axis=0) != 1):
        raise InputError(f"is damaged: {table['path'][row]} is not tested in exactly one fold")
    for fold in range(k):
        if "test" not in role[fold]:
            raise InputError(f"is damaged: fold {fold} has no test scans")
    parts = [table[dataset.COLUMNS].assign(fold=fold, role=role[fold].tolist()) for fold in range(k)]
    folds = pd.concat(parts, ignore_index=True)[["fold", "role", *dataset.COLUMNS]]
    roles = folds.groupby(["fold", "subject"], sort=False)["role"].nunique()
    for fold, subject in roles.index[roles > 1]:
        raise InputError(f"is damaged: subject {subject} has several roles in fold {fold}")
    return folds


def _read_roles(file: Path, table: pd.DataFrame, k: int) -> list[str]:
    """The role of every scan in fold 0, then 1, ...; all else that a row says is known beforehand.

    Compared row by row, so that no more is kept than there are scans and folds.
    """
    scans = [list(scan) for scan in table[dataset.COLUMNS].astype(str).itertuples(index=False)]
    expected = ([str(fold), *scan] for fold in range(k) for scan in scans)
    rows, roles = tables.read_rows(file), []
    if next(rows, None) != ["fold", "role", *dataset.COLUMNS]:
        raise InputError(f"is damaged: expected the columns fold, role, {', '.join(dataset.COLUMNS)}")
    for number, (row, wanted) in enumerate(zip_longest(rows, expected), 2):
        if row is None or wanted is None or [row[0], *row[2:]] != wanted or row[1] not in ROLES:
            raise InputError(
                f"is damaged: row {number} is {row or 'missing'}; it must list every scan once per fold, "
                f"in the CSV's order, as {' or '.join(ROLES)}"
            )
        roles.append(ROLES[row[1]])  # one object each, however many rows there are
    return roles


# New scans ---------------------------------------------------------------------------------------


def find_run_for(scans: Path, folder: Path, model: str | None, resample: bool) -> Run:
    """The run in a folder, for scans that need not be its own; nothing but the folder is needed.

    Args:
        scans: a CSV of scans, labelled or not.
        folder: what train_cv.py wrote; or published checkpoints, of which nothing else is known.
        model: the user's, or None; needed for published checkpoints.
        resample: whether scans may lie elsewhere, and are brought onto the run's grid.

    Raises:
        InputError: no run, one that is damaged or of an earlier version; scans that cannot be used, or that
            every network saw.
    """
    table, recorded = dataset.read_csv(scans, labelled=False), (folder / "run.json").exists()
    like, permuted = None, False
    if recorded:
        record = _read_record(folder, model)
        like, k, model, permuted = _recorded_grid(folder, record), record.k, record.model, record.permuted
    else:
        k, model = _published_folds(folder, model, resample)
    checked = dataset.check_new_scans(table, like, resample)
    seen_by = _testers(table, folder, k) if recorded else {}
    parts = []
    for fold in range(k):
        allowed = [fold in seen_by.get(row, range(k)) for row in range(len(table))]
        role = np.where(allowed, "test", "seen")
        parts.append(table[dataset.COLUMNS].assign(fold=fold, role=role))
    folds = pd.concat(parts, ignore_index=True)[["fold", "role", *dataset.COLUMNS]]
    return Run(folder, Cohort(scans, table, checked, folds, k), model, permuted, new_scans=True)


def say_seen(run: Run) -> None:
    """Say on stderr which new scans some of a run's networks were trained on."""
    paths = run.cohort.table.loc[run.seen, "path"].tolist()
    if paths and run.new_scans:
        print(
            f"{len(paths)} of {len(run.seen)} scans are the run's own, by their content or their subject: "
            f"{_named(paths)}; each is left to the network that tested it",
            file=sys.stderr,
        )


def _named(paths: Sequence[str]) -> str:
    """The first of some paths, and how many there are beside."""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return printable(", ".join(paths[:NAMED])) + more


def _recorded_grid(folder: Path, record: _Record) -> Grid:
    """The grid of a run's scans, with their header."""
    file = folder / HEAD.format(0)
    if not file.exists():
        raise InputError(f"{file}: no such file{REMEDY}")
    with blaming(file):
        grid = nifti.read_grid(file)
        if grid.record() != record.grid:
            raise InputError("its grid is not that of the run's scans")
    return grid


def _published_folds(folder: Path, model: str | None, resample: bool) -> tuple[int, str]:
    """How many published checkpoints there are, or should be, as the highest number says; and their model."""
    if not folder.is_dir():
        raise InputError(f"--modelpath {folder}: no such folder; train_cv.py makes one")
    if model is None:
        raise InputError(f"--modelpath {folder}: holds no run.json, so --model is needed")
    if resample:
        raise InputError(f"--resample: {folder} holds no run.json, which would say onto which grid")
    numbers = [path.stem.removeprefix("state_dict_f") for path in folder.glob("state_dict_f*.pth")]
    found = [int(number) for number in numbers if number.isdecimal() and len(number) < 4]
    if not found:
        raise InputError(f"--modelpath {folder}: holds no state_dict_f0.pth")
    print(f"{folder} holds no run.json: published checkpoints; what they were trained on is not known")
    return max(found) + 1, model


def _testers(table: pd.DataFrame, folder: Path, k: int) -> dict[int, set[int]]:
    """For each row of new scans that is a run's own, by content or subject: the fold that tested it.

    Subjects count where both tables name them: else a scan's path stands for its subject.

    Raises:
        InputError: a scan, or the subject that it is said to be of, was seen by every network.
    """
    trained = _trained_scans(folder, k)
    names = all((each["subject"] != each["path"]).any() for each in (table, trained))
    folds: dict[tuple[str, str], set[int]] = {}  # by digest, or by subject
    for _, (subject, digest, fold) in trained[["subject", "digest", "fold"]].iterrows():
        for key in (("scan", digest), ("subject", subject)):
            folds.setdefault(key, set()).add(fold)
    digests = dataset.scan_digests(table)
    of_subject: dict[str, set[int]] = {}  # all scans of a person share what is known of one
    for subject, digest in zip(table["subject"], digests, strict=True):
        known = of_subject.setdefault(subject, set())
        known.update(folds.get(("scan", digest), ()))
        known.update(folds.get(("subject", subject), ()) if names else ())
    paths = [p for p, own in zip(table["path"], table["subject"], strict=True) if len(of_subject[own]) > 1]
    if paths:
        raise InputError(
            f"{len(paths)} scans, or others of their subjects, were seen by every network of {folder}, as "
            f"they were tested in several folds; take them off the list: {_named(paths)}"
        )
    return {row: of_subject[subject] for row, subject in enumerate(table["subject"]) if of_subject[subject]}


def _trained_scans(folder: Path, k: int) -> pd.DataFrame:
    """A run's scans: path, label, subject, digest, and the fold that tested each."""
    file = folder / "folds.csv"
    with blaming(file):
        rows = tables.read_rows(file)
        next(rows, None)
        scans = [row[2:] for row in takewhile(lambda row: row[0] == "0", rows)]
        if any(len(scan) != len(dataset.COLUMNS) for scan in scans):
            raise InputError("is damaged: a row has not the columns of the others")
        table = pd.DataFrame(scans, columns=dataset.COLUMNS)
        if k > len(table):
            raise InputError(f"is damaged: {k} folds of {len(table)} scans")
        if table["path"].duplicated().any():
            raise InputError("is damaged: it lists a scan twice")
        folds = _read_folds(file, table, k)
    file = folder / SCANS
    if not file.exists():
        raise InputError(f"{file}: no such file{REMEDY}")
    with blaming(file):
        lines = tables.read_table(file, SCAN_COLUMNS)
        if [line[0] for line in lines] != table["path"].tolist():
            raise InputError("is damaged: it does not list the scans of folds.csv")
        if not all(re.fullmatch("[0-9a-f]{64}", line[1]) for line in lines):
            raise InputError("is damaged: a row is not a path and a SHA-256")
    tested = folds[folds["role"] == "test"].set_index("path")["fold"]
    fold = [int(tested[path]) for path in table["path"]]
    return table.assign(digest=[line[1] for line in lines], fold=fold)
