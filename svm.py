"""Turn a linear support vector machine into brain maps: activation patterns, on the networks' folds.

    python3 svm.py --path data.csv --modelpath models --outpath heatmaps

The folds are those of the run under --modelpath; where that holds none, they are made from --path as
train_cv.py makes them. Each fold's machine is fitted on its training scans alone, C is chosen on its
validation scans, and its test scans are predicted. Everything is written to DIR/SVM.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

import classifier_scores
import dataset
import figures
import patterns
import runs
import utils
from dataset import Cohort, Grid, ScanDataset
from internals import nifti, process, storage
from internals.caches import Cache
from internals.errors import InputError, blaming
from internals.results import Files, ResultFolder
from patterns import Fit, LinearSVM

CANDIDATES = [10.0**power for power in range(-6, 3)]  # of C
FILES = Files(
    record="map.json",
    part=["map_f{}.nii.gz", "weights_f{}.nii.gz"],
    summary=["map_all.nii.gz", "map_all.png", "mean_scan.nii.gz", "predictions.csv", "metrics.csv"],
    facts=["C_per_fold", "intercept_per_fold"],
)


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    fraction, real = utils.bounded(float, above=0, below=1), utils.bounded(float, above=0)
    add = parser.add_argument
    add("--path", type=Path, metavar="CSV", help="list of scans (default: the run's)")
    add("--modelpath", type=Path, default=Path("models"), metavar="DIR", help="output of train_cv.py")
    add("--outpath", type=Path, default=Path("heatmaps"), metavar="DIR", help="maps go to DIR/SVM")
    add("--mask", type=Path, metavar="NIFTI", help="voxels > 0 are used (default: all that are not constant)")
    add("--C", type=real, help="cost of a margin violation (default: chosen on each fold's validation scans)")
    add("--fold", type=utils.bounded(int, at_least=2), help="number of folds (default: the run's, else 5)")
    add("--split", choices=dataset.SPLITS, help="how folds are made (default: the run's, else stratified)")
    add("--val-fraction", type=fraction, help="share for validation (default: the run's, else 0.2)")
    add("--seed", type=utils.SEED, help="of folds and bootstrap (default: the run's, else 0)")
    add("--overwrite", action="store_true", help="remove earlier maps of the SVM first")
    return parser


# Scans and voxels --------------------------------------------------------------------------------


def check_labels(cohort: Cohort, file: Path) -> None:
    """Raise InputError where a fold's training or validation scans are not of both labels.

    Args:
        file: the folds of a run, which may have been edited; new ones are always of both.
    """
    for fold in range(cohort.k):
        for role in ("train", "val"):
            labels = sorted(set(cohort.labels(fold, role).tolist()))
            if labels != [0, 1]:
                raise InputError(
                    f"{file}: fold {fold}: its {role} scans have the labels {labels}, expected both"
                )


def read_mask(file: Path | None, grid: Grid) -> np.ndarray:
    """Where a mask on the scans' grid is > 0, bool (X, Y, Z); everywhere without a file.

    Raises:
        InputError: not a NIfTI image of real numbers, not on the grid, or empty.
    """
    if file is None:
        return np.ones(grid.shape, bool)
    with blaming(f"--mask {file}"):
        mask = nifti.read_image(file, like=grid)[0] > 0
        if not mask.any():
            raise InputError("is empty, no voxel is > 0")
    return mask


def choose_voxels(varies: np.ndarray, mask: np.ndarray, source: Path) -> np.ndarray:
    """The voxels that the machine sees, bool (X, Y, Z): those of the mask that are not constant.

    A voxel that is the same in all scans moves no decision and no map (the dual coefficients sum to
    zero); left out, it is exactly zero there.
    """
    voxels = varies & mask
    if not voxels.any():
        raise InputError(f"{source}: the scans are all the same{'' if mask.all() else ' inside this mask'}")
    return voxels


# The machines ------------------------------------------------------------------------------------


def fit_folds(gram: np.ndarray, cohort: Cohort, candidates: Sequence[float]) -> list[Fit]:
    """Every fold's machine, with the candidate for C that does best on its validation scans."""
    labels = cohort.table["label"].to_numpy()
    roles = [(cohort.scan_indices(f, "train"), cohort.scan_indices(f, "val")) for f in range(cohort.k)]
    return [patterns.fit_best(gram, labels, train, val, candidates) for train, val in roles]


def say_chosen(fits: Sequence[Fit]) -> None:
    """Print every fold's C and how its machine does on the validation scans."""
    for fold, (svm, accuracy, area) in enumerate(fits):
        print(f"fold {fold}: C = {svm.C:g}, validation balanced accuracy {accuracy:.3f}, AUC {area:.3f}")


def predict(svms: Sequence[LinearSVM], gram: np.ndarray, cohort: Cohort) -> pd.DataFrame:
    """Every scan's prediction by the machine that tests it, in the columns of classifier_scores.PREDICTIONS.

    prob_1 is the logistic function of the decision value: it ranks scans, but is not calibrated.
    """
    parts = []
    for fold, svm in enumerate(svms):
        rows = cohort.scan_indices(fold, "test")
        decision = svm.decision_function(gram)[rows]
        found = {"prob_1": expit(decision), "predicted": (decision > 0).astype(int)}
        parts.append(cohort.table.loc[rows].assign(fold=fold, **found))
    return pd.concat(parts)[classifier_scores.PREDICTIONS]


# What is written ---------------------------------------------------------------------------------


def write_maps(
    svms: Sequence[LinearSVM],
    gram: np.ndarray,
    cohort: Cohort,
    scans: ScanDataset,
    voxels: np.ndarray,
    results: ResultFolder,
) -> np.ndarray:
    """Write every fold's pattern and weights, zero outside `voxels`; returns the mean pattern, (X, Y, Z)."""
    mean = np.zeros(np.count_nonzero(voxels))
    together = max(patterns.HELD // 4 // len(mean), 1)  # folds of one pass; each has two maps of float64
    for folds in patterns.batches(range(cohort.k), together):
        rows = []
        for fold in folds:
            train = cohort.scan_indices(fold, "train")
            rows += [patterns.pattern_coefficients(svms[fold], gram, train), svms[fold].dual]
        sums = patterns.weighted_sums(np.stack(rows), scans, voxels)  # (2 F, V)
        for fold, maps in zip(folds, sums.reshape(len(folds), 2, -1), strict=True):
            for name, values in zip(FILES.part, maps, strict=True):
                volume = patterns.unmask(values, voxels)
                nifti.save_map(volume, cohort.grid.header, results.path / name.format(fold))
            results.finish(fold, C_per_fold=svms[fold].C, intercept_per_fold=svms[fold].intercept)
            mean += maps[0] / cohort.k
        del sums, maps, values, volume  # before the next ones are made
    return patterns.unmask(mean, voxels)


def write_means(pattern: np.ndarray, scan: np.ndarray, cohort: Cohort, folder: Path) -> None:
    """Write the mean pattern and the mean scan, and the picture of one over the other."""
    nifti.save_map(pattern, cohort.grid.header, folder / "map_all.nii.gz")
    nifti.save_map(scan, cohort.grid.header, folder / "mean_scan.nii.gz")
    title = f"SVM: mean activation pattern of {cohort.k} folds, {len(cohort.table)} scans"
    figures.draw_map(pattern, scan, cohort.grid.affine, title, folder / "map_all.png")


def report(predictions: pd.DataFrame, seed: int, folder: Path) -> None:
    """Write predictions and metrics; print the scores."""
    scores = classifier_scores.metrics_table(predictions, seed)
    storage.write_csv(predictions, folder / "predictions.csv")
    storage.write_csv(scores, folder / "metrics.csv")
    print(classifier_scores.summary(scores))


def describe(csv: Path, modelpath: Path, mask: Path | None) -> dict[str, Any]:
    """What map.json says beside the identity: absolute paths, or None, and versions."""
    run = modelpath if (modelpath / "run.json").exists() else None
    paths = {"csv": csv, "modelpath": run, "mask": mask}
    about = {name: path and str(path.resolve()) for name, path in paths.items()}
    return about | {"versions": storage.package_versions()}


@utils.command("the maps are not finished; the same command starts again")
def main(argv: list[str] | None = None) -> int:
    """Check everything, fit the folds, write their maps and predictions."""
    args = get_parser().parse_args(argv)
    asked = {name: getattr(args, name) for name in runs.FOLDING}
    cohort, folding = runs.find_cohort(args.modelpath, args.path, asked)
    check_labels(cohort, args.modelpath / "folds.csv")
    mask = read_mask(args.mask, cohort.grid)
    identity = {"method": "SVM", "options": {"C": args.C or "chosen", **folding}, **cohort.identity}
    identity["mask_sha256"] = args.mask and storage.file_sha256(args.mask)
    folder = args.outpath / "SVM"
    results = ResultFolder(folder, FILES, range(cohort.k), identity, overwrite=args.overwrite)
    if results.is_finished():
        print(f"{folder}: done before, kept")
        return 0
    scans = cohort.open_scans(Cache("reuse", args.modelpath / "cache"))
    mean_scan, varies = patterns.voxel_statistics(scans)
    voxels = choose_voxels(varies, mask, args.mask or cohort.csv)
    print(f"voxels: {np.count_nonzero(voxels)} of {voxels.size}")

    about = describe(cohort.csv, args.modelpath, args.mask)
    work = f"{len(scans)} scans of {np.count_nonzero(voxels)} voxels"
    with results.at_work(about), process.out_of_memory(work, "give a smaller --mask"):
        gram = patterns.gram_matrix(scans, voxels)
        fits = fit_folds(gram, cohort, [args.C] if args.C else CANDIDATES)
        say_chosen(fits)
        svms = [found.svm for found in fits]
        pattern = write_maps(svms, gram, cohort, scans, voxels, results)  # all: they share the Gram matrix
        with results.summary() as due:
            if due:
                write_means(pattern, mean_scan, cohort, folder)
                report(predict(svms, gram, cohort), folding["seed"], folder)
    maps = ", ".join(name.format("*") for name in FILES.part)
    print(f"written to {folder}: map_all.nii.gz, {maps}, predictions.csv, metrics.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
