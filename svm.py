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

import numpy as np
import pandas as pd
from scipy.special import expit

import brain_maps
import classifier_scores
import patterns
import runs
import utils
import voxelwise
from dataset import Cohort, ScanDataset
from internals import nifti, process, storage
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
    voxelwise.add_options(parser, "SVM")
    cost = utils.bounded(float, above=0)
    parser.add_argument(
        "--C", type=cost, help="cost of a margin violation (default: chosen on each fold's validation scans)"
    )
    return parser


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
    together = max(voxelwise.HELD // 4 // len(mean), 1)  # folds of one pass; each has two maps of float64
    for folds in voxelwise.batches(range(cohort.k), together):
        rows = []
        for fold in folds:
            train = cohort.scan_indices(fold, "train")
            rows += [patterns.pattern_coefficients(svms[fold], gram, train), svms[fold].dual]
        sums = voxelwise.weighted_sums(np.stack(rows), scans, voxels)  # (2 F, V)
        for fold, maps in zip(folds, sums.reshape(len(folds), 2, -1), strict=True):
            for name, values in zip(FILES.part, maps, strict=True):
                volume = brain_maps.unmask(values, voxels)
                nifti.save_map(volume, cohort.grid.header, results.path / name.format(fold))
            results.finish(fold, C_per_fold=svms[fold].C, intercept_per_fold=svms[fold].intercept)
            mean += maps[0] / cohort.k
        del sums, maps, values, volume  # before the next ones are made
    return brain_maps.unmask(mean, voxels)


def report(predictions: pd.DataFrame, seed: int, folder: Path) -> None:
    """Write predictions and metrics; print the scores."""
    scores = classifier_scores.metrics_table(predictions, seed)
    storage.write_csv(predictions, folder / "predictions.csv")
    storage.write_csv(scores, folder / "metrics.csv")
    print(classifier_scores.summary(scores))


@utils.command("the maps are not finished; the same command starts again")
def main(argv: list[str] | None = None) -> int:
    """Check everything, fit the folds, write their maps and predictions."""
    args = get_parser().parse_args(argv)
    asked = {name: getattr(args, name) for name in runs.FOLDING}
    cohort, folding = runs.find_cohort(args.modelpath, args.path, asked)
    voxelwise.check_labels(cohort, args.modelpath / "folds.csv")
    mask = voxelwise.read_mask(args.mask, cohort.grid)
    identity = {"method": "SVM", "options": {"C": args.C or "chosen", **folding}, **cohort.identity}
    identity["mask_sha256"] = args.mask and storage.file_sha256(args.mask)
    folder = args.outpath / "SVM"
    results = ResultFolder(folder, FILES, range(cohort.k), identity, overwrite=args.overwrite)
    if results.is_finished():
        print(f"{folder}: done before, kept")
        return 0
    source = args.mask or cohort.csv
    scans, mean_scan, voxels = voxelwise.open_voxels(cohort, mask, source, args.modelpath)

    about = voxelwise.describe(cohort.csv, args.modelpath, args.mask)
    work = f"{len(scans)} scans of {np.count_nonzero(voxels)} voxels"
    with results.at_work(about), process.out_of_memory(work, "give a smaller --mask"):
        gram = patterns.gram_matrix(scans, voxels)
        fits = fit_folds(gram, cohort, [args.C] if args.C else CANDIDATES)
        say_chosen(fits)
        svms = [found.svm for found in fits]
        pattern = write_maps(svms, gram, cohort, scans, voxels, results)  # all: they share the Gram matrix
        with results.summary() as due:
            if due:
                title = f"SVM: mean activation pattern of {cohort.k} folds, {len(scans)} scans"
                voxelwise.write_means(pattern, mean_scan, cohort.grid, title, folder)
                report(predict(svms, gram, cohort), folding["seed"], folder)
    maps = ", ".join(name.format("*") for name in FILES.part)
    print(f"written to {folder}: map_all.nii.gz, {maps}, predictions.csv, metrics.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
