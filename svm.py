"""Turn a linear support vector machine into brain maps: activation patterns, on the networks' folds.

    python3 svm.py --path data.csv --modelpath models --outpath heatmaps

The folds are those of the run under --modelpath; where that holds none, they are made from --path as
train_cv.py makes them. Each fold's machine is fitted on its training scans alone, C is chosen on its
validation scans, and its test scans are predicted. Everything is written to DIR/SVM.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.svm import SVC

import classifier_scores
import dataset
import figures
import runs
import utils
from internals import nifti, process, storage
from internals.errors import InputError, blaming

FOLDING = {"fold": 5, "split": "stratified", "val_fraction": 0.2, "seed": 0}  # as train_cv.py's
CANDIDATES = [10.0**power for power in range(-6, 3)]  # of C
ONCE = ["map.json", "map_all.nii.gz", "map_all.png", "mean_scan.nii.gz", "predictions.csv", "metrics.csv"]
PER_FOLD = ["map_f{}.nii.gz", "weights_f{}.nii.gz"]
WRITTEN = [*ONCE, *(name.format("*") for name in PER_FOLD)]

HELD = 2**28  # float32 voxels in memory at once: 1 GiB
STREAMED = 4  # scans that pass by a held block together: it is widened to float64 once for all of them
CHUNK = 2**22  # voxels widened to float64 at once: 32 MiB
WORKERS = 2  # threads that decode


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    fraction = utils.bounded(float, above=0, below=1)
    seed = utils.bounded(int, at_least=0, at_most=2**32 - 1)
    add = parser.add_argument
    add("--path", type=Path, metavar="CSV", help="list of scans (default: the run's)")
    add("--modelpath", type=Path, default=Path("models"), metavar="DIR", help="output of train_cv.py")
    add("--outpath", type=Path, default=Path("heatmaps"), metavar="DIR", help="maps go to DIR/SVM")
    add("--mask", type=Path, metavar="NIFTI", help="voxels > 0 are used (default: all that are not constant)")
    add(
        "--C",
        type=utils.bounded(float, above=0),
        help="cost of a margin violation (default: chosen on each fold's validation scans)",
    )
    add("--fold", type=utils.bounded(int, at_least=2), help="number of folds (default: the run's, else 5)")
    add("--split", choices=dataset.SPLITS, help="how folds are made (default: the run's, else stratified)")
    add("--val-fraction", type=fraction, help="share for validation (default: the run's, else 0.2)")
    add("--seed", type=seed, help="of folds and bootstrap (default: the run's, else 0)")
    add("--overwrite", action="store_true", help="remove earlier maps of the SVM first")
    return parser


# The cohort --------------------------------------------------------------------------------------


class Cohort(NamedTuple):
    """Checked scans and their folds, and the options that made the folds."""

    csv: Path
    table: pd.DataFrame
    grid: dataset.Grid
    folds: pd.DataFrame
    folding: dict[str, Any]
    run: Path | None  # the folder of the run that the folds are of


def find_cohort(modelpath: Path, csv: Path | None, asked: dict[str, Any]) -> Cohort:
    """The cohort of the run under `modelpath`, or of `csv` where there is no run.

    Args:
        asked: the keys of FOLDING, with the user's values, or None where the user gave none.

    Raises:
        InputError: neither run nor CSV, a damaged run, or one of other folds than asked for.
    """
    if (modelpath / "run.json").exists():
        run = runs.find_run(modelpath, csv, model=None, k=None)
        folding = recorded_folding(modelpath, asked)
        return Cohort(run.csv.resolve(), run.table, run.grid, run.folds, folding, modelpath.resolve())
    if csv is None:
        raise InputError(f"--modelpath {modelpath}: holds no run.json, so --path is needed")
    folding = {name: FOLDING[name] if value is None else value for name, value in asked.items()}
    table = dataset.read_csv(csv)
    k, split, fraction, seed = folding.values()
    folds = dataset.make_folds(table, k, split, fraction, seed)
    print(f"{modelpath} holds no run.json: {k} {split} folds are made of {csv}")
    return Cohort(csv.resolve(), table, dataset.check_grid(table), folds, folding, None)


def recorded_folding(modelpath: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The options that made a run's folds, as long as the user asked for no others."""
    arguments = runs.recorded_arguments(modelpath)
    for name, value in asked.items():
        if value not in (None, arguments[name]):
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} {value}: {modelpath} was trained with {arguments[name]}")
    return {name: arguments[name] for name in asked}


def check_labels(cohort: Cohort) -> None:
    """Raise InputError where a fold's training or validation scans are not of both labels."""
    source = cohort.run / "folds.csv" if cohort.run else cohort.csv
    for fold in range(cohort.folding["fold"]):
        for role in ("train", "val"):
            labels = set(cohort.table["label"][dataset.rows(cohort.folds, fold, role)])
            if labels != {0, 1}:
                raise InputError(
                    f"{source}: fold {fold}: its {role} scans have the labels {sorted(labels)}, expected both"
                )


def read_mask(path: Path, grid: dataset.Grid) -> np.ndarray:
    """Where a mask is > 0, bool (X, Y, Z).

    Raises:
        InputError: not a NIfTI image of real numbers, not on the scans' grid, or empty.
    """
    with blaming(f"--mask {path}"):
        values, found = nifti.read_image(path)
        if found.shape != grid.shape:
            raise InputError(f"shape {found.shape}, the scans have {grid.shape}")
        if not found.lies_like(grid):
            raise InputError("its affine differs from the scans'")
        if not (values > 0).any():
            raise InputError("is empty, no voxel is > 0")
    return values > 0


def identify(cohort: Cohort, C: float | None, mask: Path | None) -> dict[str, Any]:
    """What two calls must have in common for their results to be the same."""
    return {
        "method": "SVM",
        "options": {"C": "chosen" if C is None else C, **cohort.folding},
        "csv_sha256": storage.sha256(cohort.csv),
        "scans_sha256": dataset.scans_digest(cohort.table),
        "folds_sha256": dataset.folds_digest(cohort.folds),
        "mask_sha256": None if mask is None else storage.sha256(mask),
        "grid": cohort.grid.record(),
    }


def finished(folder: Path, record: dict[str, Any], k: int) -> bool:
    """Whether a record is a finished one (it names every C), and all files are still there."""
    names = ONCE + [name.format(fold) for name in PER_FOLD for fold in range(k)]
    return "C_per_fold" in record and all((folder / name).exists() for name in names)


# Voxels, a few scans at a time -------------------------------------------------------------------


def batches(rows: range, size: int) -> list[range]:
    """Cut row numbers into pieces of `size`; the last may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def read_voxels(scans: dataset.Scans, rows: Sequence[int], inside: np.ndarray) -> np.ndarray:
    """The voxels of some scans where `inside` (bool (X, Y, Z)) is true, float32 (len(rows), V)."""
    voxels = np.empty((len(rows), np.count_nonzero(inside)), np.float32)

    def read(number: int) -> None:
        voxels[number] = scans[rows[number]][0][0].numpy()[inside]

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(read, range(len(rows))))
    return voxels


def survey(scans: dataset.Scans) -> tuple[np.ndarray, np.ndarray]:
    """The mean scan, float64 (X, Y, Z), and where the scans are not all alike, bool (X, Y, Z)."""
    first = scans[0][0][0].numpy()
    total, varies = np.zeros(first.shape), np.zeros(first.shape, bool)
    everywhere = np.ones(first.shape, bool)
    for rows in utils.progress(batches(range(len(scans)), STREAMED), desc="mean scan"):
        for volume in read_voxels(scans, rows, everywhere).reshape(-1, *first.shape):
            total += volume
            varies |= volume != first
    return total / len(scans), varies


def choose_voxels(varies: np.ndarray, mask: np.ndarray | None, source: Path) -> np.ndarray:
    """The voxels that the machine sees, bool (X, Y, Z): those of the mask that are not constant.

    A voxel that is the same in all scans moves no decision and no map (the dual coefficients sum to
    zero); left out, it is exactly zero there.
    """
    inside = varies if mask is None else varies & mask
    if not inside.any():
        where = "" if mask is None else " inside this mask"
        raise InputError(f"{source}: the scans are all the same{where}")
    return inside


def linear_kernel(scans: dataset.Scans, inside: np.ndarray) -> np.ndarray:
    """Inner products of all pairs of scans, float64 (N, N), with at most HELD voxels in memory.

    A block of scans is held while all later ones pass by: a scan is read once for its own block and
    once for every earlier one.
    """
    n = len(scans)
    blocks = batches(range(n), max(HELD // int(np.count_nonzero(inside)) - STREAMED, 1))
    products = np.empty((n, n))
    with utils.progress(None, sum(n - block.start for block in blocks), desc="kernel") as bar:
        for block in blocks:
            voxels = read_voxels(scans, block, inside)  # (B, V)
            products[block.start : block.stop, block.start : block.stop] = multiply(voxels, voxels)
            bar.update(len(block))
            for rows in batches(range(block.stop, n), STREAMED):
                part = multiply(voxels, read_voxels(scans, rows, inside))
                products[block.start : block.stop, rows.start : rows.stop] = part
                products[rows.start : rows.stop, block.start : block.stop] = part.T
                bar.update(len(rows))
            del voxels  # before the next block is read
    return products


def chunks(scans: int, voxels: int) -> list[slice]:
    """Cut the voxels of some scans into slices of at most CHUNK values in all."""
    width = max(CHUNK // scans, 1)
    return [slice(start, start + width) for start in range(0, voxels, width)]


def multiply(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left @ right.T of float32 (A, V) and (B, V), as float64 throughout, (A, B)."""
    total = np.zeros((len(left), len(right)))
    for chunk in chunks(*left.shape):
        total += left[:, chunk].astype(np.float64) @ right[:, chunk].astype(np.float64).T
    return total


def combine(coefficients: np.ndarray, scans: dataset.Scans, inside: np.ndarray) -> np.ndarray:
    """Weighted sums of the scans, (M, N) @ (N, V) -> float64 (M, V), in one pass over the scans."""
    total = np.zeros((len(coefficients), np.count_nonzero(inside)))
    for rows in utils.progress(batches(range(len(scans)), STREAMED), desc="maps"):
        voxels = read_voxels(scans, rows, inside)
        for chunk in chunks(*total.shape):
            total[:, chunk] += coefficients[:, rows] @ voxels[:, chunk].astype(np.float64)
        del voxels  # before the next ones are read
    return total


# The machines ------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """A linear SVM in terms of the scans: decision(x) = sum_i dual_i <x_i, x> + intercept."""

    C: float
    dual: np.ndarray  # (N,), zero where a scan is no support vector
    intercept: float

    def decide(self, products: np.ndarray) -> np.ndarray:
        """Decision values of all scans, (N, N) -> (N,); > 0 is label 1."""
        return products @ self.dual + self.intercept


def fit(products: np.ndarray, labels: np.ndarray, train: list[int], C: float) -> Machine:
    """The SVM of the training scans: that of SVC(kernel="linear", C=C) on their voxels."""
    svc = SVC(kernel="precomputed", C=C).fit(products[np.ix_(train, train)], labels[train])
    dual = np.zeros(len(products))
    dual[np.array(train)[svc.support_]] = svc.dual_coef_[0]
    return Machine(C, dual, float(svc.intercept_[0]))


def fit_best(
    products: np.ndarray, labels: np.ndarray, train: list[int], val: list[int], candidates: list[float]
) -> tuple[Machine, float, float]:
    """The machine that does best on the validation scans, with its balanced accuracy and AUC there.

    AUC alone would not do: it sees neither scale nor offset, and at a tiny C hardly any decision value
    differs from the others. Balanced accuracy comes first, AUC decides between equals, then the smaller C.
    """
    machines = [fit(products, labels, train, C) for C in candidates]
    scores = []
    for machine in machines:
        decision = machine.decide(products)[val]
        accuracy = balanced_accuracy_score(labels[val], decision > 0)
        scores.append((round(accuracy, 9), round(roc_auc_score(labels[val], decision), 9)))
    best = scores.index(max(scores))  # the first of equals; rounded, as sums in another order differ
    return machines[best], *scores[best]


def fit_folds(products: np.ndarray, cohort: Cohort, C: float | None) -> list[Machine]:
    """Every fold's machine, with the given C or one chosen from CANDIDATES; prints which."""
    labels = cohort.table["label"].to_numpy()
    machines = []
    for fold in range(cohort.folding["fold"]):
        train, val = (dataset.rows(cohort.folds, fold, role) for role in ("train", "val"))
        machine, accuracy, area = fit_best(products, labels, train, val, CANDIDATES if C is None else [C])
        print(f"fold {fold}: C = {machine.C:g}, validation balanced accuracy {accuracy:.3f}, AUC {area:.3f}")
        machines.append(machine)
    return machines


def predict(machines: list[Machine], products: np.ndarray, cohort: Cohort) -> pd.DataFrame:
    """Every scan's prediction by the machine that tests it, in the columns of classifier_scores.PREDICTIONS.

    prob_1 is the logistic function of the decision value: it ranks scans, but is not calibrated.
    """
    parts = []
    for fold, machine in enumerate(machines):
        rows = dataset.rows(cohort.folds, fold, "test")
        decision = machine.decide(products)[rows]
        about = {"fold": fold, "prob_1": expit(decision), "predicted": (decision > 0).astype(int)}
        parts.append(cohort.table.loc[rows].assign(**about))
    return pd.concat(parts)[classifier_scores.PREDICTIONS]


# The maps ----------------------------------------------------------------------------------------


def pattern_coefficients(machine: Machine, products: np.ndarray, train: list[int]) -> np.ndarray:
    """What each scan adds to the activation pattern, (N,).

    The pattern is A = cov(X, s) of the training scans X and their decision values s, unbiased: Haufe
    et al. 2014, doi 10.1016/j.neuroimage.2013.10.067, theorem 1; var(s), by which it divides, is one
    factor for all voxels and left out. Deviations from the mean sum to zero, so that
    A = sum_i (s_i - mean s) x_i / (n - 1).
    """
    decision = machine.decide(products)[train]
    coefficients = np.zeros(len(products))
    coefficients[train] = (decision - decision.mean()) / (len(train) - 1)
    return coefficients


def write_maps(
    machines: list[Machine],
    products: np.ndarray,
    cohort: Cohort,
    scans: dataset.Scans,
    inside: np.ndarray,
    folder: Path,
) -> np.ndarray:
    """Write every fold's pattern and weights, zero outside; returns the mean pattern, (X, Y, Z)."""
    mean = np.zeros(np.count_nonzero(inside))
    together = max(HELD // 4 // len(mean), 1)  # folds of one pass; each has two maps of float64
    for folds in batches(range(len(machines)), together):
        rows = []
        for fold in folds:
            train = dataset.rows(cohort.folds, fold, "train")
            rows += [pattern_coefficients(machines[fold], products, train), machines[fold].dual]
        sums = combine(np.stack(rows), scans, inside)  # (2 F, V)
        for fold, maps in zip(folds, sums.reshape(len(folds), 2, -1), strict=True):
            for name, values in zip(PER_FOLD, maps, strict=True):
                nifti.save_map(place(values, inside), cohort.grid.header, folder / name.format(fold))
            mean += maps[0] / len(machines)
        del sums, maps, values  # before the next ones are made
    return place(mean, inside)


def place(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Put voxels (V,) back where they are from, zero elsewhere: float64 (X, Y, Z)."""
    volume = np.zeros(inside.shape)
    volume[inside] = values
    return volume


def save_means(pattern: np.ndarray, scan: np.ndarray, cohort: Cohort, folder: Path) -> None:
    """Write the mean pattern and the mean scan, and the picture of one over the other."""
    k, n = cohort.folding["fold"], len(cohort.table)
    nifti.save_map(pattern, cohort.grid.header, folder / "map_all.nii.gz")
    nifti.save_map(scan, cohort.grid.header, folder / "mean_scan.nii.gz")
    title = f"SVM: mean activation pattern of {k} folds, {n} scans"
    figures.draw_map(pattern, scan, cohort.grid.affine, title, folder / "map_all.png")


@utils.command("no map is finished; the same command starts again")
def main(argv: list[str] | None = None) -> int:
    """Check everything, fit the folds, write their predictions and maps."""
    args = get_parser().parse_args(argv)
    cohort = find_cohort(args.modelpath, args.path, {name: getattr(args, name) for name in FOLDING})
    check_labels(cohort)
    mask = read_mask(args.mask, cohort.grid) if args.mask else None
    folder = args.outpath / "SVM"
    identity = identify(cohort, args.C, args.mask)
    overwrite = WRITTEN if args.overwrite else []
    found = storage.check_folder(folder, "map.json", identity, WRITTEN, overwrite)
    if finished(folder, found, cohort.folding["fold"]):
        print(f"{folder}: done before, kept")
        return 0
    scans = dataset.open_scans(cohort.table, cohort.grid, "reuse", args.modelpath / "cache", WORKERS)
    mean_scan, varies = survey(scans)
    inside = choose_voxels(varies, mask, args.mask or cohort.csv)
    print(f"voxels: {np.count_nonzero(inside)} of {inside.size}")

    paths = {"csv": cohort.csv, "modelpath": cohort.run, "mask": args.mask and args.mask.resolve()}
    record = identity | {name: path and str(path) for name, path in paths.items()}
    record |= {"versions": storage.versions()}
    work = f"{len(scans)} scans of {np.count_nonzero(inside)} voxels"
    with storage.claimed(folder, ["SVM"]), process.out_of_memory(work, "give a smaller --mask"):
        with storage.locked(folder / storage.LOCK):
            storage.start_folder(folder, "map.json", identity, WRITTEN, overwrite)
            storage.remove(folder, WRITTEN)  # what is there is not finished
            storage.write_json(record, folder / "map.json")
        products = linear_kernel(scans, inside)
        machines = fit_folds(products, cohort, args.C)
        predictions = predict(machines, products, cohort)
        scores = classifier_scores.metrics_table(predictions, cohort.folding["seed"])
        storage.write_csv(predictions, folder / "predictions.csv")
        storage.write_csv(scores, folder / "metrics.csv")
        mean_pattern = write_maps(machines, products, cohort, scans, inside, folder)
        save_means(mean_pattern, mean_scan, cohort, folder)
        record["C_per_fold"] = {str(fold): machine.C for fold, machine in enumerate(machines)}
        record["intercept_per_fold"] = {str(fold): machine.intercept for fold, machine in enumerate(machines)}
        storage.write_json(record, folder / "map.json")  # last: it says that all is finished
    print(classifier_scores.summary(scores))
    print(
        f"written to {folder}: map_all.nii.gz, map_f*.nii.gz, weights_f*.nii.gz, predictions.csv, metrics.csv"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
