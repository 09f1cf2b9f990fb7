"""Brain maps in their METHOD folders, and the images that they are compared with: read and checked."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import utils
from internals import nifti, storage
from internals.errors import InputError, blaming
from internals.nifti import Grid
from internals.results import FINISHED, SUMMARY

# networks that know nothing of the disease, and what the folder of their maps has in its name after METHOD
FLOORS = {"untrained": "-random", "permuted": "-permuted"}
GROUPS = {"controls": 0, "patients": 1}  # whose mean maps lie beside that of all, and their label
RESERVED = ("edges", "random")  # these floors stand among the METHODs
MOST_FOLDS = 1000
DIGESTS = {"csv_sha256": "CSVs", "scans_sha256": "scans", "folds_sha256": "folds"}  # and what they are of

# by method and fold, "0" ... "k-1", "all", or a group of all folds: magnitudes, (V,)
Maps = dict[tuple[str, str], np.ndarray]


# The METHOD folders ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MethodMaps:
    """The maps of one METHOD, and what its map.json, where there is one, says of them.

    Attributes:
        folder: where they lie.
        folds: how many there are.
        digests: what tells its cohort from others, those of DIGESTS that map.json has.
        zero_share: the share of its single maps that are zero everywhere; NaN where it is not known.
    """

    folder: Path
    folds: int
    digests: Mapping[str, str]
    zero_share: float

    @property
    def name(self) -> str:
        """The METHOD's name."""
        return self.folder.name

    @property
    def files(self) -> dict[tuple[str, str], Path]:
        """The maps by method and fold; the fold is "0" ... "k-1", "all", or a group that has one."""
        names = {str(fold): f"map_f{fold}.nii.gz" for fold in range(self.folds)} | {"all": "map_all.nii.gz"}
        groups = {group: f"map_{group}.nii.gz" for group in GROUPS}
        names |= {group: name for group, name in groups.items() if (self.folder / name).exists()}
        return {(self.name, fold): self.folder / name for fold, name in names.items()}


def find_maps(folder: Path) -> list[MethodMaps]:
    """The maps of every METHOD folder.

    Raises:
        InputError: no maps, maps missing, or methods of different cohorts or numbers of folds.
    """
    found = {file.parent for name in ("map.json", "map_*.nii.gz") for file in folder.glob(f"*/{name}")}
    if not found:
        raise InputError(
            f"--maps {folder}: holds no METHOD folder with maps; heatmap.py and svm.py write them"
        )
    methods = [read_method(method) for method in sorted(found)]
    for name, what in DIGESTS.items():
        if len({method.digests.get(name, "") for method in methods} - {""}) > 1:
            raise InputError(f"--maps {folder}: the methods' map.json are of different {what}")
    if len({method.folds for method in methods}) > 1:
        counts = ", ".join(f"{method.name} has {method.folds}" for method in methods)
        raise InputError(f"--maps {folder}: the methods differ in their number of folds: {counts}")
    missing = [str(file) for method in methods for file in method.files.values() if not file.exists()]
    if missing:
        raise InputError(f"maps are missing: {', '.join(missing)}")
    return methods


def read_method(folder: Path) -> MethodMaps:
    """What is to be known of a METHOD folder; InputError where it is not finished, or map.json is damaged."""
    if folder.name in RESERVED or not folder.name.isprintable():
        raise InputError(f"{folder}: a METHOD cannot have this name")
    file = folder / "map.json"
    record = storage.read_json(file) if file.exists() else {}
    # without such a list, as in a record of an earlier version, the files alone say what is there
    record = {FINISHED: [SUMMARY], "folds": _highest_fold(folder) + 1} | record
    with blaming(file):
        if SUMMARY not in storage.entry(record, FINISHED, list):
            raise InputError("is not finished; the command that began it goes on with it")
        folds = storage.entry(record, "folds", int)
        digests = {name: storage.entry(record, name, str) for name in DIGESTS if name in record}
        zero, scans = (_total(record, name) for name in ("zero_maps_per_fold", "scans_per_fold"))
        if zero > scans:
            raise InputError(f"is damaged: {zero} of {scans} maps are zero everywhere")
    if not 0 <= folds <= MOST_FOLDS:
        raise InputError(f"{folder}: has {folds} folds, expected at most {MOST_FOLDS}")
    return MethodMaps(folder, folds, digests, zero / scans if scans else math.nan)


def _highest_fold(folder: Path) -> int:
    """The highest fold that a METHOD folder has a map of; -1 where there is none."""
    found = (re.fullmatch(r"map_f(\d+)\.nii\.gz", file.name) for file in folder.iterdir())
    return max((int(match[1]) for match in found if match), default=-1)


def _total(record: dict[str, Any], name: str) -> int:
    """The sum of a record's counts per fold, which may be missing."""
    counts = storage.entry({name: {}} | record, name, dict)
    return sum(storage.entry(counts, fold, int, lambda count: count >= 0) for fold in counts)


def find_mean_scan(methods: list[MethodMaps]) -> Path:
    """The mean scan of the first METHOD folder that has one."""
    places = [method.folder / "mean_scan.nii.gz" for method in methods]
    found = [place for place in places if place.exists()]
    if not found:
        raise InputError(f"{places[0]}: no such file, nor beside the maps of any other method")
    return found[0]


# The images --------------------------------------------------------------------------------------


def read_brain(first_map: Path, scan_file: Path, mask: Path | None) -> tuple[np.ndarray, np.ndarray, Grid]:
    """The mean scan, float32 (X, Y, Z), where the brain is, bool (X, Y, Z), and the mask's grid.

    The brain is where the mask is above 0; without one, where the mean scan is.
    """
    _, like = _read(first_map)
    scan, grid = _read(scan_file, like)
    values = scan
    if mask is None:
        print("no --mask: the voxels where the mean scan is above 0")
    else:
        values, grid = _read(mask, like)
    if not (values > 0).any():
        raise InputError(f"--mask {mask or 'by default, the mean scan'}: no voxel is above 0")
    return scan, values > 0, grid


def read_reference(file: Path, threshold: float, brain: np.ndarray, grid: Grid) -> np.ndarray:
    """The binary reference at the voxels of the brain, bool (V,); from another grid, by nearest voxel.

    Args:
        threshold: it is above this.
        brain: bool (X, Y, Z).
        grid: the brain's.

    Raises:
        InputError: it shares no field of view with the brain, has no voxel in it, or fills it.
    """
    values, own = _read(file)
    above = values > np.float64(threshold)  # which float32 may not hold
    # Its field of view goes along, 1 where there is one, to tell "outside" from "not in the reference".
    pair = np.stack([above, np.ones(above.shape)], axis=-1).astype(np.uint8)
    mismatch = own.mismatch(grid, "the first map")
    if mismatch:
        print(f"{file}: {mismatch}; resampled to the maps' grid, nearest voxel")
        pair = nifti.resample(pair, own.affine, grid, "nearest")
    reference, seen = pair[brain].T > 0  # (V,) each
    if not seen.any():
        raise InputError(f"--reference {file}: its field of view does not meet the mask's")
    if reference.all() or not reference.any():
        share = "every voxel" if reference.all() else "no voxel"
        raise InputError(f"--reference {file}: {share} of the mask is above {threshold:g}")
    print(
        f"{file}: {reference.sum()} of the mask's {len(reference)} voxels are above {threshold:g}, "
        f"{int(pair[..., 0].sum()) - reference.sum()} more lie outside the mask"
    )
    if not seen.all():
        print(f"{file}: {(~seen).mean():.1%} of the mask lies outside its field of view, taken as not in it")
    return reference


def unmask(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Put voxels (V,) back where they are from, zero elsewhere: float64 (X, Y, Z)."""
    volume = np.zeros(mask.shape)
    volume[mask] = values
    return volume


def read_maps(files: Mapping[tuple[str, str], Path], brain: np.ndarray, grid: Grid) -> Maps:
    """The magnitude of every map at the voxels of the brain, float32."""
    maps: Maps = {}
    for key, file in utils.progress(files.items(), desc="reading maps"):
        maps[key] = np.abs(_read(file, grid)[0][brain])
        if not np.isfinite(maps[key]).all():
            raise InputError(f"{file}: has voxels in the mask that are NaN or infinite")
    return maps


def _read(file: Path, like: Grid | None = None) -> tuple[np.ndarray, Grid]:
    """Read an image, float32 (X, Y, Z), which must lie on the first map's grid, if that is given."""
    with blaming(file):
        return nifti.read_image(file, like, owner="the first map")
