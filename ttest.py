"""The baseline of any brain map: a voxelwise t-test of patients against controls, on the networks' folds.

    python3 ttest.py --path data.csv --modelpath models --outpath heatmaps

No classifier is involved. Each fold's map is Welch's t of its training patients against its training
controls, positive where patients have more. The folds are those of the run under --modelpath; where that
holds none, they are made from --path as train_cv.py makes them. Everything is written to DIR/TTEST.
"""

import argparse
import sys

import numpy as np

import brain_maps
import runs
import utils
import voxelwise
from dataset import Cohort, ScanDataset
from internals import nifti, process, storage
from internals.errors import InputError
from internals.results import Files, ResultFolder

FILES = Files(
    record="map.json",
    part=["map_f{}.nii.gz"],
    summary=["map_all.nii.gz", "map_all.png", "mean_scan.nii.gz"],
)


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    voxelwise.add_options(parser, "TTEST")
    return parser


def check_groups(cohort: Cohort) -> None:
    """Raise InputError where a fold's training scans are too few for a variance of each group."""
    for fold in range(cohort.k):
        counts = np.bincount(cohort.labels(fold, "train"), minlength=2)
        if counts.min() < 2:
            raise InputError(
                f"fold {fold}: a t-test needs 2 training scans of each label, "
                f"there are {counts[0]} of label 0 and {counts[1]} of label 1"
            )


def welch_t(sums: np.ndarray, squares: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Welch's t of group 1 against group 0 (Welch 1947, doi 10.1093/biomet/34.1-2.28), voxel by voxel.

    t = (m_1 - m_0) / sqrt(v_1 / n_1 + v_0 / n_0), m the means, v the unbiased variances

    Args:
        sums, squares: (2, V), of the values in each group, and of their squares.
        counts: (2,), n.

    Returns:
        float64 (V,); 0 where neither group varies.
    """
    n = counts[:, None].astype(np.float64)
    means = sums / n
    variances = (squares - sums * means) / (n - 1)
    variances[variances < 1e-12 * squares / n] = 0  # of a constant, but for rounding
    error = np.sqrt((variances / n).sum(0))
    return np.divide(means[1] - means[0], error, out=np.zeros_like(error), where=error > 0)


def write_maps(cohort: Cohort, scans: ScanDataset, voxels: np.ndarray, results: ResultFolder) -> np.ndarray:
    """Write every fold's t-map, zero outside `voxels`; returns their mean, (X, Y, Z)."""
    mean = np.zeros(np.count_nonzero(voxels))
    together = max(voxelwise.HELD // 8 // len(mean), 1)  # folds of one pass; each has four sums of float64
    for folds in voxelwise.batches(range(cohort.k), together):
        members = np.zeros((len(folds), 2, len(scans)))  # 1 where a scan is in a fold's group
        for number, fold in enumerate(folds):
            train = cohort.scan_indices(fold, "train")
            members[number, cohort.labels(fold, "train"), train] = 1
        sums = voxelwise.weighted_sums(members.reshape(-1, len(scans)), scans, voxels, powers=(1, 2))
        sums, counts = sums.reshape(2, len(folds), 2, -1), members.sum(2)
        for number, fold in enumerate(folds):
            values = welch_t(sums[0, number], sums[1, number], counts[number])
            volume = brain_maps.unmask(values, voxels)
            nifti.save_map(volume, cohort.grid.header, results.path / FILES.part[0].format(fold))
            results.finish(fold)
            mean += values / cohort.k
        del sums  # before the next ones are made
    return brain_maps.unmask(mean, voxels)


@utils.command("the maps are not finished; the same command starts again")
def main(argv: list[str] | None = None) -> int:
    """Check everything, compare the groups of every fold, write the maps."""
    args = get_parser().parse_args(argv)
    asked = {name: getattr(args, name) for name in runs.FOLDING}
    cohort, folding = runs.find_cohort(args.modelpath, args.path, asked)
    check_groups(cohort)
    mask = voxelwise.read_mask(args.mask, cohort.grid)
    identity = {"method": "TTEST", "options": folding, **cohort.identity}
    identity["mask_sha256"] = args.mask and storage.file_sha256(args.mask)
    folder = args.outpath / "TTEST"
    results = ResultFolder(folder, FILES, range(cohort.k), identity, overwrite=args.overwrite)
    if results.is_finished():
        print(f"{folder}: done before, kept")
        return 0
    source = args.mask or cohort.csv
    scans, mean_scan, voxels = voxelwise.open_voxels(cohort, mask, source, args.modelpath)

    about = voxelwise.describe(cohort.csv, args.modelpath, args.mask)
    work = f"{len(scans)} scans of {np.count_nonzero(voxels)} voxels"
    with results.at_work(about), process.out_of_memory(work, "give a smaller --mask"):
        mean = write_maps(cohort, scans, voxels, results)
        with results.summary() as due:
            if due:
                title = f"TTEST: mean t of {cohort.k} folds, patients against controls, {len(scans)} scans"
                voxelwise.write_means(mean, mean_scan, cohort.grid, title, folder)
    print(f"written to {folder}: map_all.nii.gz, map_all.png, map_f*.nii.gz")
    return 0


if __name__ == "__main__":
    sys.exit(main())
