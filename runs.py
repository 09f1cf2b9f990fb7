"""The training run that a command goes on from: what run.json and folds.csv record, checked."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

import dataset
import utils


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
        raise utils.InputError(f"--modelpath {modelpath}: no such folder; train_cv.py makes one")
    if csv is None or model is None:
        raise utils.InputError(
            f"--modelpath {modelpath}: holds no run.json, so --path and --model are needed"
        )
    print(
        f"{modelpath} holds no run.json: published checkpoints, explained on the published contiguous folds"
    )
    table, k = dataset.read_csv(csv), k or 5
    folds = dataset.make_folds(table, k, "contiguous", val_fraction=0, seed=0)  # nothing is trained here
    return Run(csv, table, dataset.check_grid(table), folds, model, k)


def _recorded_run(modelpath: Path, csv: Path | None, model: str | None, k: int | None) -> Run:
    """The run that run.json and folds.csv describe, as long as its CSV and scans are the same."""
    record = utils.read_json(modelpath / "run.json")
    try:
        recorded = Path(record["csv"]), record["csv_sha256"], record["model"], record["grid"]
        trained_k = int(record["arguments"]["fold"])
        folds = pd.read_csv(
            modelpath / "folds.csv", dtype={"path": str, "subject": str}, keep_default_na=False
        )
    except (OSError, KeyError, TypeError, ValueError) as problem:
        raise utils.InputError(f"{modelpath}: run.json or folds.csv is damaged ({problem!r})") from problem
    trained_csv, digest, trained_model, trained_grid = recorded
    if model not in (None, trained_model):
        raise utils.InputError(f"--model {model}: {modelpath} was trained with {trained_model}")
    if k not in (None, trained_k):
        raise utils.InputError(f"--fold {k}: {modelpath} was trained with {trained_k} folds")
    csv = csv or trained_csv
    table = dataset.read_csv(csv)
    if utils.sha256(csv) != digest:
        raise utils.InputError(f"{csv}: is not the CSV that {modelpath} was trained on; its content changed")
    grid = dataset.check_grid(table)
    if grid.record() != trained_grid:
        raise utils.InputError(f"{csv}: the scans' grid is not the one that {modelpath} was trained on")
    columns = ["fold", "role", *dataset.COLUMNS]
    if list(folds.columns) != columns or folds["path"].tolist() != table["path"].tolist() * trained_k:
        raise utils.InputError(f"{modelpath / 'folds.csv'}: does not list every scan once per fold")
    return Run(csv, table, grid, folds, trained_model, trained_k)
