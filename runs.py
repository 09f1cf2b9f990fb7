"""The training run that a command goes on from: what run.json and folds.csv record, checked."""

from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import dataset
from internals import storage
from internals.errors import InputError, blaming

ROLES = {role: role for role in ("train", "val", "test")}


class Run(NamedTuple):
    """A training run, checked: what is explained, and with which weights."""

    csv: Path
    table: pd.DataFrame
    grid: dataset.Grid
    folds: pd.DataFrame
    model: str
    k: int

    def checkpoint(self, modelpath: Path, fold: int) -> Path:
        """The weights of a fold."""
        return modelpath / f"state_dict_f{fold}.pth"


def find_run(modelpath: Path, csv: Path | None, model: str | None, k: int | None) -> Run:
    """Read and check the run under `modelpath`; `csv`, `model` and `k` are the user's, or None."""
    if (modelpath / "run.json").exists():
        return _recorded_run(modelpath, csv, model, k)
    if not modelpath.is_dir():
        raise InputError(f"--modelpath {modelpath}: no such folder; train_cv.py makes one")
    if csv is None or model is None:
        raise InputError(f"--modelpath {modelpath}: holds no run.json, so --path and --model are needed")
    print(
        f"{modelpath} holds no run.json: published checkpoints, explained on the published contiguous folds"
    )
    table, k = dataset.read_csv(csv), k or 5
    folds = dataset.make_folds(table, k, "contiguous", val_fraction=0, seed=0)  # nothing is trained here
    return Run(csv, table, dataset.check_grid(table), folds, model, k)


def recorded_arguments(modelpath: Path) -> dict[str, Any]:
    """The arguments of a run that made its folds, from run.json: fold, split, val_fraction and seed."""
    record = storage.read_json(modelpath / "run.json")
    with blaming(modelpath / "run.json"):
        arguments = storage.recorded(record, "arguments", dict)
        return {
            "fold": storage.recorded(arguments, "fold", int, lambda k: k >= 2),
            "split": storage.recorded(arguments, "split", str, lambda name: name in dataset.SPLITS),
            "val_fraction": storage.recorded(
                arguments, "val_fraction", (int, float), lambda part: 0 < part < 1
            ),
            "seed": storage.recorded(arguments, "seed", int, lambda seed: 0 <= seed < 2**32),
        }


def _recorded_run(modelpath: Path, csv: Path | None, model: str | None, k: int | None) -> Run:
    """The run that run.json and folds.csv describe, as long as its CSV and scans are the same."""
    record = storage.read_json(modelpath / "run.json")
    with blaming(modelpath / "run.json"):
        trained_csv = Path(storage.recorded(record, "csv", str))
        digest, trained_model = (storage.recorded(record, name, str) for name in ("csv_sha256", "model"))
        trained_grid = storage.recorded(record, "grid", dict)
    trained_k = recorded_arguments(modelpath)["fold"]
    if model not in (None, trained_model):
        raise InputError(f"--model {model}: {modelpath} was trained with {trained_model}")
    if k not in (None, trained_k):
        raise InputError(f"--fold {k}: {modelpath} was trained with {trained_k} folds")
    csv = csv or trained_csv
    table = dataset.read_csv(csv)
    if trained_k > len(table):
        raise InputError(f"{modelpath / 'run.json'}: is damaged: {trained_k} folds of {len(table)} scans")
    if storage.sha256(csv) != digest:
        raise InputError(f"{csv}: is not the CSV that {modelpath} was trained on; its content changed")
    grid = dataset.check_grid(table)
    if grid.record() != trained_grid:
        raise InputError(f"{csv}: the scans' grid is not the one that {modelpath} was trained on")
    scans = dataset.scans_digest(table)
    if record.get("scans_sha256", scans) != scans:
        raise InputError(f"{csv}: the scans changed since {modelpath} was trained on them")
    with blaming(modelpath / "folds.csv"):
        folds = _read_folds(modelpath / "folds.csv", table, trained_k)
    return Run(csv, table, grid, folds, trained_model, trained_k)


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
    rows, roles = dataset.read_rows(file), []
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
