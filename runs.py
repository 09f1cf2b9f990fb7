"""A training run that a command goes on from: its cohort, its model and its networks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
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
from internals import storage, tables
from internals.checkpoints import load_weights
from internals.errors import InputError, blaming

ROLES = {role: role for role in ("train", "val", "test")}
FOLDING = {"fold": 5, "split": "stratified", "val_fraction": 0.2, "seed": 0}  # train_cv.py's defaults
CALIBRATION = 32  # training scans at most that give an untrained network's BatchNorm its statistics


@dataclass(frozen=True)
class Run:
    """A training run, checked."""

    folder: Path
    cohort: Cohort
    model: str  # name of its networks
    permuted: bool = False  # whether they were trained on permuted labels

    def checkpoint(self, fold: int) -> Path:
        """The weights of a fold."""
        return self.folder / f"state_dict_f{fold}.pth"


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
    train = cohort.scan_indices(fold, "train")
    count = min(len(train), most)
    return [train[number * len(train) // count] for number in range(count)]


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


def _recorded_run(folder: Path, csv: Path | None, model: str | None, k: int | None) -> Run:
    """The run that run.json and folds.csv describe, as long as its CSV and scans are the same."""
    record = storage.read_json(folder / "run.json")
    with blaming(folder / "run.json"):
        trained_csv = Path(storage.entry(record, "csv", str))
        digest, trained_model = (storage.entry(record, name, str) for name in ("csv_sha256", "model"))
        trained_grid = storage.entry(record, "grid", dict)
        trained_on = {"permute_labels": False} | storage.entry(record, "arguments", dict)
        permuted = storage.entry(trained_on, "permute_labels", bool)
    trained_k = recorded_folding(folder)["fold"]
    if model not in (None, trained_model):
        raise InputError(f"--model {model}: {folder} was trained with {trained_model}")
    if k not in (None, trained_k):
        raise InputError(f"--fold {k}: {folder} was trained with {trained_k} folds")
    csv = csv or trained_csv
    table = dataset.read_csv(csv)
    if trained_k > len(table):
        raise InputError(f"{folder / 'run.json'}: is damaged: {trained_k} folds of {len(table)} scans")
    if storage.file_sha256(csv) != digest:
        raise InputError(f"{csv}: is not the CSV that {folder} was trained on; its content changed")
    checked = dataset.check_scans(table, record)
    if checked.grid.record() != trained_grid:
        raise InputError(f"{csv}: the scans' grid is not the one that {folder} was trained on")
    with blaming(folder / "folds.csv"):
        folds = _read_folds(folder / "folds.csv", table, trained_k)
    if record.get("scans_sha256", "") not in ("", checked.scans_sha256):
        raise InputError(f"{csv}: the scans changed since {folder} was trained on them")
    return Run(folder, Cohort(csv, table, checked, folds, trained_k), trained_model, permuted)


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
