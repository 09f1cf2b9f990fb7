"""Turn the networks of a training run into brain maps: LRP, integrated gradients or guided Grad-CAM.

    python3 heatmap.py --method IG

Explains each fold's test scans with that fold's weights. The CSV, the model and the folds come from
the run record under --modelpath. A folder that holds only published state_dict_f*.pth files needs
--path and --model; the published contiguous folds are used then. The same command again keeps the folds
that are finished.
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import dataset
import explaining
import figures
import methods
import models
import runs
import selfcheck
import utils
from dataset import Cohort, ScanDataset
from explaining import TARGETS, Explainer
from internals import devices, nifti, process, storage, tables
from internals.caches import Cache
from internals.errors import InputError, blaming
from internals.results import Files, ResultFolder
from methods import METHODS, Method
from models import CNN3d

FILES = Files(
    record="map.json",
    shared=["subjects.csv"],
    part=["map_f{}.nii.gz"],
    beside=["baseline_f{}.nii.gz", "subjects/f{}_*.nii.gz"],
    summary=["map_all.nii.gz", "map_all.png", "mean_scan.nii.gz"],
    facts=["weights_sha256", "scans_per_fold", "zero_maps_per_fold", "device_per_fold"],
)
BASELINES = {"zero": "", "controls": "-controls"}  # what each adds to the name of the maps' folder
NETWORKS: dict[str, Callable[[runs.Run, int], runs.Networks]] = {
    "trained": lambda run, seed: runs.TrainedNetworks(run),
    "random": runs.UntrainedNetworks,
}
STEM = 150  # characters of a scan's own name in its map's: with all that is added, a name has at most 255
SUBJECT_COLUMNS = ["fold", *dataset.COLUMNS, *explaining.FOUND]


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    number, whole = utils.bounded(int, at_least=0), utils.bounded(int, at_least=1)
    add = parser.add_argument
    add("--method", choices=METHODS, required=True, help="how the networks are explained")
    add("--path", type=Path, metavar="CSV", help="list of scans (default: the run's)")
    add("--modelpath", type=Path, default=Path("models"), metavar="DIR", help="output of train_cv.py")
    add("--model", help="family A-D and number of filters (default: the run's)")
    add("--outpath", type=Path, default=Path("heatmaps"), metavar="DIR", help="maps go to DIR/METHOD")
    add("--device", default="auto", help="GPU number, cpu, cuda:N, mps or auto")
    add("--fold", type=utils.bounded(int, at_least=2), help="number of folds (default: the run's, else 5)")
    add("--batch", type=whole, default=1, help="scans explained at once")
    add("--run-folds", type=number, nargs="+", metavar="I", help="only these folds")
    add("--target", choices=TARGETS, default="label", help="the logit to explain")
    add(
        "--weights", choices=NETWORKS, default="trained", help="or untrained: maps to hold the others against"
    )
    add("--seed", type=utils.SEED, default=0, help="of random weights")
    takers = ", ".join(name for name, method in METHODS.items() if method.takes_baseline)
    add(
        "--baseline",
        choices=BASELINES,
        default="zero",
        help=f"{takers}: zero, or the training controls' mean",
    )
    methods.add_options(parser)
    add("--save-subjects", action="store_true", help="also write the map of every scan")
    add("--overwrite", action="store_true", help="remove earlier maps of this method, or --run-folds, first")
    return parser


# Before any map ----------------------------------------------------------------------------------


def map_options(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the given options that shape a method's maps, as map.json keeps them."""
    method, options = METHODS[name], {key: given[key] for key in ("target", "save_subjects", "weights")}
    if given["weights"] == "random":
        options["seed"] = given["seed"]
    if method.takes_baseline:
        options["baseline"] = given["baseline"]
    elif given["baseline"] != "zero":
        raise InputError(f"--baseline {given['baseline']}: {name} has no baseline")
    return options | method.chosen(given)


def folder_name(method: str, options: dict[str, Any]) -> str:
    """The folder of a method's maps: METHOD, with -controls and -random where they are such."""
    random = "-random" if options["weights"] == "random" else ""
    return f"{method}{BASELINES[options.get('baseline', 'zero')]}{random}"


def check_baseline(kind: str, cohort: Cohort, folds: list[int]) -> None:
    """Raise InputError where a fold has no scans that the baseline could be made of."""
    for fold in folds if kind == "controls" else []:
        if not training_controls(cohort, fold):
            raise InputError(f"--baseline controls: fold {fold} has no controls among its training scans")


def training_controls(cohort: Cohort, fold: int) -> list[int]:
    """The rows of a fold's training controls."""
    return [row for row in cohort.scan_indices(fold, "train") if cohort.table["label"][row] == 0]


# The maps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldMaps:
    """What is written of every fold, and of all.

    Attributes:
        method: how the networks are explained.
        options: as `map_options` returns them.
        batch: scans explained at once.
        folder: where the maps go.
    """

    method: Method
    options: dict[str, Any]
    cohort: Cohort
    scans: ScanDataset
    batch: int
    folder: Path

    def explain(self, fold: int, model: CNN3d) -> pd.DataFrame:
        """Explain a fold's test scans, write their mean map; returns the fold's rows of subjects.csv."""
        rows, device = self.cohort.scan_indices(fold, "test"), next(model.parameters()).device
        loader = self.scans.loader(rows, self.batch, device=device)
        baseline, own = self.load_baseline(fold, device), self.method.chosen(self.options)
        explainer = Explainer(model, self.method, own, baseline, self.options["target"])
        if self.options["save_subjects"]:
            storage.make_folder(self.folder / "subjects")

        def keep(number: int, values: np.ndarray) -> None:
            if self.options["save_subjects"]:
                path = self.cohort.table["path"][rows[number]]
                self._save(values, subject_file(self.folder, fold, rows[number], path))

        mean, found = explaining.explain_scans(explainer, loader, keep, f"{self.folder.name} fold {fold}")
        self._save(mean, self.folder / f"map_f{fold}.nii.gz")
        known = self.cohort.table.loc[rows, dataset.COLUMNS].reset_index(drop=True).assign(fold=fold)
        return pd.concat([known, found], axis=1)[SUBJECT_COLUMNS]

    def load_baseline(self, fold: int, device: torch.device) -> Tensor | None:
        """What scans are compared with, (1, 1, X, Y, Z), which is written, too; None for all zeros."""
        if self.options.get("baseline", "zero") == "zero":
            return None
        mean = self.scans.mean(training_controls(self.cohort, fold))
        self._save(mean, self.folder / f"baseline_f{fold}.nii.gz")
        return torch.from_numpy(mean).to(device)[None, None]

    def average(self, model: str) -> None:
        """Write the mean of the fold means, the mean scan, and the picture of one over the other."""
        cohort, k = self.cohort, self.cohort.k
        mean = np.zeros(cohort.grid.shape)
        for fold in range(k):
            mean += nifti.load_map(self.folder / f"map_f{fold}.nii.gz") / k
        self._save(mean, self.folder / "map_all.nii.gz")
        background = self.scans.mean(range(len(self.scans)))
        self._save(background, self.folder / "mean_scan.nii.gz")
        title = f"{self.folder.name}, {model}: mean of {k} folds, {len(cohort.table)} test scans"
        figures.draw_map(mean, background, cohort.grid.affine, title, self.folder / "map_all.png")

    def _save(self, values: np.ndarray, file: Path) -> None:
        nifti.save_map(values, self.cohort.grid.header, file)


def subject_file(folder: Path, fold: int, row: int, path: str) -> Path:
    """Where the map of one scan goes; the row in the CSV keeps scans of one name apart."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", Path(path).name.removesuffix(".gz").removesuffix(".nii"))
    stem = stem[:STEM]
    return folder / "subjects" / f"f{fold}_{row:05d}_{stem}.nii.gz"


# subjects.csv ------------------------------------------------------------------------------------


def update_subjects(results: ResultFolder, folds: list[int], rows: pd.DataFrame | None = None) -> None:
    """Replace the rows of some folds in subjects.csv."""
    with results.locked():
        before = read_subjects(results.path)
        others = before[~before["fold"].isin(folds)]
        tables = [table for table in (others, rows) if table is not None and len(table)]
        if len(others) < len(before) or rows is not None:
            after = pd.concat(tables).sort_values("fold", kind="stable") if tables else others
            storage.write_csv(after, results.path / "subjects.csv")


def check_subjects(folder: Path, fold: int) -> None:
    """Raise InputError where subjects.csv is damaged, or lacks a finished fold."""
    if fold not in set(read_subjects(folder)["fold"]):
        file = folder / "subjects.csv"
        raise InputError(f"{file}: has no rows of fold {fold}; --overwrite without --run-folds starts again")


def read_subjects(folder: Path) -> pd.DataFrame:
    """The rows of subjects.csv so far; none where it does not exist. Paths and subjects stay text."""
    file = folder / "subjects.csv"
    if not file.exists():
        return pd.DataFrame(columns=SUBJECT_COLUMNS)
    with blaming(file):
        rows = tables.read_rows(file)
        header = next(rows, None)
        if header == SUBJECT_COLUMNS[:-1]:
            raise InputError(
                "is of an earlier version (no column zero); --overwrite without --run-folds starts again"
            )
        if header != SUBJECT_COLUMNS:
            raise InputError(f"is damaged: expected the columns {', '.join(SUBJECT_COLUMNS)}")
        try:
            return pd.DataFrame([_subject(row) for row in rows], columns=SUBJECT_COLUMNS)
        except ValueError as problem:
            raise InputError(f"is damaged ({problem})") from problem


def _subject(row: list[str]) -> list[Any]:
    """One row of subjects.csv; ValueError where a cell is not what its column holds."""
    fold, path, label, subject, predicted, target, *numbers, zero = row
    prob_target, total, residual = (float(number or "nan") for number in numbers)
    if zero not in ("0", "1"):
        raise ValueError(f"zero is '{zero}', expected 0 or 1")
    known = [int(fold), path, int(label), subject, int(predicted), int(target)]
    return [*known, prob_target, total, residual, int(zero)]


def facts(rows: pd.DataFrame, device: torch.device) -> dict[str, Any]:
    """What map.json says of a finished fold, beside its weights."""
    zero = int(rows["zero"].sum())
    return {
        "scans_per_fold": len(rows),
        "zero_maps_per_fold": zero,
        "device_per_fold": devices.describe(device),
    }


def report(results: ResultFolder) -> None:
    """Print how well the maps' sums keep their promise, how many maps are all zero, and what is missing."""
    unfinished, subjects = results.unfinished(), read_subjects(results.path)
    subjects = subjects[~subjects["fold"].isin(unfinished)]
    residual, zero = subjects["residual"].dropna(), subjects.groupby("fold")["zero"]
    sums = f"; residual of the sums: median {residual.median():.2g}, worst {residual.max():.2g}"
    print(f"{len(subjects)} scans explained{'' if residual.empty else sums}")
    counts = ", ".join(f"{flags.sum()} of {len(flags)} in fold {fold}" for fold, flags in zero)
    print(f"maps that are zero everywhere: {counts}")
    if unfinished:
        print(f"not explained yet, or with other weights: folds {unfinished}")
    else:
        print(f"written to {results.path}: map_all.nii.gz, map_all.png, map_f*.nii.gz, subjects.csv")


@utils.command("finished folds are saved; the same command, without --overwrite, explains the others")
def main(argv: list[str] | None = None) -> int:
    """Check everything, explain the folds, average them."""
    args = get_parser().parse_args(argv)
    process.keep_freed_memory()
    device = selfcheck.open_device(args.device)
    options = map_options(args.method, vars(args))
    run = runs.find_run(args.modelpath, args.path, args.model, args.fold)
    cohort, networks = run.cohort, NETWORKS[args.weights](run, args.seed)
    chosen = utils.choose_folds(args.run_folds, cohort.k)
    networks.check(chosen)
    devices.check_batch(args.batch, models.largest_output(run.model, cohort.grid.shape), device)
    check_baseline(args.baseline, cohort, chosen)
    identity = {"method": args.method, "options": options, "model": run.model, "folds": cohort.k}
    identity |= cohort.identity
    made_from = {fold: {"weights_sha256": networks.digest(fold)} for fold in range(cohort.k)}
    folder, only = args.outpath / folder_name(args.method, options), args.run_folds and chosen
    results = ResultFolder(folder, FILES, range(cohort.k), identity, made_from, only, args.overwrite)
    if results.check(partial(check_subjects, folder)):
        read_subjects(folder)  # though no fold is finished

    about = {"csv": str(cohort.csv), "modelpath": str(run.folder.resolve()), **networks.about()}
    work = devices.describe_batch(args.batch, cohort.grid.shape, run.model, device)
    with process.out_of_memory(work, "lower --batch"):
        scans = cohort.open_scans(Cache("reuse", args.modelpath / "cache"))
        maps = FoldMaps(METHODS[args.method], options, cohort, scans, args.batch, folder)
        with results.at_work(about) as missing:
            utils.say_kept(chosen, missing)
            update_subjects(results, missing)
            for fold in missing:
                rows = maps.explain(fold, networks.load(fold, scans, device))
                update_subjects(results, [fold], rows)
                results.finish(fold, **facts(rows, device))
            with results.summary() as due:
                if due:
                    maps.average(run.model)
            report(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
