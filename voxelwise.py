"""Maps made of the scans alone, voxel by voxel: which voxels, passes over the scans, what is written.

However many scans there are, no more than 1 GiB of voxels is in memory at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dataset
import figures
import utils
from dataset import Cohort, Grid, ScanDataset
from internals import nifti, storage
from internals.caches import Cache
from internals.errors import InputError, blaming

HELD = 2**28  # float32 voxels in memory at once: 1 GiB
STREAMED = 4  # scans that pass by a held block together: it is widened to float64 once for all of them
CHUNK = 2**22  # voxels widened to float64 at once: 32 MiB


# Options, scans and voxels -----------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, method: str) -> None:
    """Give a command's parser the options of scans, folds and voxels."""
    fraction, add = utils.bounded(float, above=0, below=1), parser.add_argument
    add("--path", type=Path, metavar="CSV", help="list of scans (default: the run's)")
    add("--modelpath", type=Path, default=Path("models"), metavar="DIR", help="output of train_cv.py")
    add("--outpath", type=Path, default=Path("heatmaps"), metavar="DIR", help=f"maps go to DIR/{method}")
    add("--mask", type=Path, metavar="NIFTI", help="voxels > 0 are used (default: all that are not constant)")
    add("--fold", type=utils.bounded(int, at_least=2), help="number of folds (default: the run's, else 5)")
    add("--split", choices=dataset.SPLITS, help="how folds are made (default: the run's, else stratified)")
    add("--val-fraction", type=fraction, help="share for validation (default: the run's, else 0.2)")
    add("--seed", type=utils.SEED, help="of everything random (default: the run's, else 0)")
    add("--overwrite", action="store_true", help=f"remove earlier maps of {method} first")


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
    """The voxels that a map is made of, bool (X, Y, Z): those of the mask that are not constant.

    A voxel that is the same in all scans tells nothing. It would move no decision and no pattern of an SVM
    (the dual coefficients sum to zero); left out, the map is exactly zero there.
    """
    voxels = varies & mask
    if not voxels.any():
        raise InputError(f"{source}: the scans are all the same{'' if mask.all() else ' inside this mask'}")
    return voxels


def open_voxels(
    cohort: Cohort, mask: np.ndarray, source: Path, modelpath: Path
) -> tuple[ScanDataset, np.ndarray, np.ndarray]:
    """The scans, their mean, float64 (X, Y, Z), and the voxels that a map is made of, bool (X, Y, Z)."""
    scans = cohort.open_scans(Cache("reuse", modelpath / "cache"))
    mean_scan, varies = voxel_statistics(scans)
    voxels = choose_voxels(varies, mask, source)
    print(f"voxels: {np.count_nonzero(voxels)} of {voxels.size}")
    return scans, mean_scan, voxels


# Passes over the scans ---------------------------------------------------------------------------


def batches(rows: range, size: int) -> list[range]:
    """Cut row numbers into pieces of `size`; the last may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def voxel_statistics(scans: ScanDataset) -> tuple[np.ndarray, np.ndarray]:
    """The mean scan, float64 (X, Y, Z), and where the scans are not all alike, bool (X, Y, Z)."""
    first = scans[0][0][0].numpy()
    total, varies = np.zeros(first.shape), np.zeros(first.shape, bool)
    everywhere = np.ones(first.shape, bool)
    for rows in utils.progress(batches(range(len(scans)), STREAMED), desc="mean scan"):
        for volume in read_voxels(scans, rows, everywhere).reshape(-1, *first.shape):
            total += volume
            varies |= volume != first
    return total / len(scans), varies


def weighted_sums(
    coefficients: np.ndarray, scans: ScanDataset, mask: np.ndarray, powers: Sequence[int] = (1,)
) -> np.ndarray:
    """Weighted sums of the scans, or of their powers, in one pass over them.

    Args:
        coefficients: (M, N), the weight of every scan in every sum.
        mask: bool (X, Y, Z), the V voxels that count.
        powers: of the voxels' values.

    Returns:
        float64 (P * M, V), all M sums of the first power, then of the next.
    """
    total = np.zeros((len(powers), len(coefficients), np.count_nonzero(mask)))
    for rows in utils.progress(batches(range(len(scans)), STREAMED), desc="maps"):
        voxels = read_voxels(scans, rows, mask)
        for chunk in chunks(len(coefficients), total.shape[2]):
            values = voxels[:, chunk].astype(np.float64)
            for sums, power in zip(total, powers, strict=True):
                sums[:, chunk] += coefficients[:, rows] @ (values if power == 1 else values**power)
        del voxels  # before the next ones are read
    return total.reshape(-1, total.shape[2])


def read_voxels(scans: ScanDataset, rows: Sequence[int], mask: np.ndarray) -> np.ndarray:
    """The voxels of some scans in a mask, float32 (len(rows), V)."""
    voxels = np.empty((len(rows), np.count_nonzero(mask)), np.float32)

    def read(number: int) -> None:
        voxels[number] = scans[rows[number]][0][0].numpy()[mask]

    utils.in_threads(read, range(len(rows)))
    return voxels


def chunks(scans: int, voxels: int) -> list[slice]:
    """Cut the voxels of some scans into slices of at most CHUNK values in all."""
    width = max(CHUNK // scans, 1)
    return [slice(start, start + width) for start in range(0, voxels, width)]


# What is written ---------------------------------------------------------------------------------


def describe(csv: Path, modelpath: Path, mask: Path | None) -> dict[str, Any]:
    """What map.json says beside the identity: absolute paths, or None, and versions."""
    run = modelpath if (modelpath / "run.json").exists() else None
    paths = {"csv": csv, "modelpath": run, "mask": mask}
    about = {name: path and str(path.resolve()) for name, path in paths.items()}
    return about | {"versions": storage.package_versions()}


def write_means(mean: np.ndarray, scan: np.ndarray, grid: Grid, title: str, folder: Path) -> None:
    """Write the mean map and the mean scan, and the picture of one over the other."""
    nifti.save_map(mean, grid.header, folder / "map_all.nii.gz")
    nifti.save_map(scan, grid.header, folder / "mean_scan.nii.gz")
    figures.draw_map({"all": mean}, scan, grid.affine, title, folder / "map_all.png")
