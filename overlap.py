"""Compare the maps of every method with a reference map: Dice overlap, its floors and intervals.

    python3 overlap.py --maps heatmaps --reference truth.nii.gz --mask mask.nii.gz

Takes every METHOD folder under --maps that heatmap.py or svm.py wrote, every fold and the mean of all
folds, at every --smooth. Beside each Dice stand what a random map as smooth as this one, an edge filter
and an untrained network (METHOD-random) reach.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nilearn.image import resample_img
from nilearn.image.resampling import BoundingBoxError
from scipy import ndimage

import figures
import utils
from internals import nifti, storage
from internals.errors import InputError, blaming
from overlap_scores import (
    THRESHOLDS,
    TWIN,
    Brain,
    Maps,
    add_intervals,
    add_random,
    dice_curve,
    random_floor,
    rank,
    score_maps,
)

FLOORS = ("edges", "random")  # they stand among the METHODs
MOST_FOLDS = 1000
OUTPUTS = ["overlap.json", "overlap.csv", "overlap_ranked.csv", "overlap.png"]


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    length = utils.bounded(float, at_least=0, at_most=100)
    add = parser.add_argument
    add("--maps", type=Path, default=Path("heatmaps"), metavar="DIR", help="holds the METHOD folders")
    add("--reference", type=Path, required=True, metavar="NIFTI", help="where the maps should be large")
    add("--reference-threshold", type=utils.bounded(float), default=0.0, metavar="X", help="it is above X")
    add("--mask", type=Path, metavar="NIFTI", help="the brain (default: where the mean scan is above 0)")
    add(
        "--smooth",
        type=length,
        nargs="+",
        default=[0, 2, 4, 6, 8, 10, 12],
        metavar="MM",
        help="FWHM of |map|",
    )
    add("--rank-smooth", type=length, default=8, metavar="MM", help="FWHM of the ranking")
    add("--outpath", type=Path, metavar="DIR", help="where to write (default: --maps)")
    add("--seed", type=utils.bounded(int, at_least=0), default=0, help="of the random maps and intervals")
    add("--overwrite", action="store_true", help="replace an earlier comparison in --outpath")
    return parser


# Reading -----------------------------------------------------------------------------------------


def find_maps(folder: Path) -> dict[tuple[str, str], Path]:
    """The maps of every METHOD folder by method and fold; the fold is "0" ... "k-1" or "all".

    Raises:
        InputError: no maps, maps missing, or methods of different cohorts or numbers of folds.
    """
    methods = sorted(
        {file.parent for name in ("map.json", "map_*.nii.gz") for file in folder.glob(f"*/{name}")}
    )
    if not methods:
        raise InputError(
            f"--maps {folder}: holds no METHOD folder with maps; heatmap.py and svm.py write them"
        )
    records = [_record(method) for method in methods]
    for name, what in {"csv_sha256": "CSVs", "scans_sha256": "scans", "folds_sha256": "folds"}.items():
        if len({record[name] for record in records if record[name]}) > 1:
            raise InputError(f"--maps {folder}: the methods' map.json are of different {what}")
    folds = {method.name: record["folds"] for method, record in zip(methods, records, strict=True)}
    if len(set(folds.values())) > 1:
        counts = ", ".join(f"{name} has {k}" for name, k in folds.items())
        raise InputError(f"--maps {folder}: the methods differ in their number of folds: {counts}")
    names = {str(fold): f"map_f{fold}.nii.gz" for fold in range(folds[methods[0].name])}
    names["all"] = "map_all.nii.gz"
    files = {(method.name, fold): method / name for method in methods for fold, name in names.items()}
    missing = [str(file) for file in files.values() if not file.exists()]
    if missing:
        raise InputError(f"maps are missing: {', '.join(missing)}")
    return files


def _record(method: Path) -> dict[str, Any]:
    """What the map.json of a METHOD folder says of its cohort and folds; "" where it does not say."""
    known: dict[str, Any] = {"csv_sha256": "", "scans_sha256": "", "folds_sha256": ""}
    known["folds"], file = _highest(method) + 1, method / "map.json"
    with blaming(method):
        if method.name in FLOORS or not method.name.isprintable():
            raise InputError("a METHOD cannot have this name")
    if file.exists():
        record = storage.read_json(file)
        with blaming(file):
            known = {name: storage.recorded(known | record, name, type(known[name])) for name in known}
            if record.get("method") == "SVM" and "C_per_fold" not in record:
                raise InputError("is not finished; svm.py goes on with it")
    if not 0 <= known["folds"] <= MOST_FOLDS:
        raise InputError(f"{method}: has {known['folds']} folds, expected at most {MOST_FOLDS}")
    return known


def _highest(method: Path) -> int:
    """The highest fold that a METHOD folder has a map of; -1 where there is none."""
    found = (re.fullmatch(r"map_f(\d+)\.nii\.gz", file.name) for file in method.iterdir())
    return max((int(match[1]) for match in found if match), default=-1)


def zero_share(method: Path) -> float:
    """The share of a METHOD's single maps that are zero everywhere, from its map.json; NaN without one."""
    file = method / "map.json"
    record = storage.read_json(file) if file.exists() else {}
    with blaming(file):
        zero, scans = (_total(record, name) for name in ("zero_maps_per_fold", "scans_per_fold"))
        if zero > scans:
            raise InputError(f"is damaged: {zero} of {scans} maps are zero everywhere")
    return zero / scans if scans else math.nan


def _total(record: dict[str, Any], name: str) -> int:
    """The sum of a record's counts per fold, which may be missing."""
    counts = storage.recorded({name: {}} | record, name, dict)
    return sum(storage.recorded(counts, fold, int, lambda count: count >= 0) for fold in counts)


def find_mean_scan(folder: Path, methods: list[str]) -> Path:
    """The mean scan of the first METHOD folder that has one."""
    places = [folder / method / "mean_scan.nii.gz" for method in methods]
    found = [place for place in places if place.exists()]
    if not found:
        raise InputError(f"{places[0]}: no such file, nor beside the maps of any other method")
    return found[0]


def read_image(file: Path, like: nib.Nifti1Image | None = None) -> nib.Nifti1Image:
    """Read a 3D image as float32.

    Args:
        like: an image whose shape and affine it must have.

    Raises:
        InputError: it is none, or lies elsewhere.
    """
    with blaming(file):
        values, grid = nifti.read_image(file)
        image = nib.Nifti1Image(values, grid.affine)
        if like is not None and not same_grid(image, like):
            raise InputError(f"has {grid_of(image)}; the maps have {grid_of(like)}")
    return image


def same_grid(one: nib.Nifti1Image, other: nib.Nifti1Image) -> bool:
    """Whether two images share shape and affine."""
    return one.shape == other.shape and np.allclose(one.affine, other.affine, atol=1e-3)


def grid_of(image: nib.Nifti1Image) -> str:
    """An image's shape and affine in words."""
    return f"{'x'.join(map(str, image.shape))} voxels, affine {image.affine[:3].round(3).tolist()}"


def read_mask(file: Path | None, scan: nib.Nifti1Image) -> nib.Nifti1Image:
    """The brain mask, voxels above 0; by default those of the mean scan."""
    if file is None:
        print("no --mask: the voxels where the mean scan is above 0")
    mask = scan if file is None else read_image(file, like=scan)
    if not (mask.get_fdata() > 0).any():
        raise InputError(f"--mask {file or 'by default, the mean scan'}: no voxel is above 0")
    return mask


def read_reference(file: Path, threshold: float, mask: nib.Nifti1Image) -> np.ndarray:
    """The binary reference at the voxels of a mask, bool (V,); from another grid, by nearest voxel.

    Raises:
        InputError: it shares no field of view with the mask, has no voxel in it, or fills it.
    """
    image = read_image(file)
    # Its field of view goes along, 1 where there is one, to tell "outside" from "not in the reference".
    pair = np.stack([image.get_fdata() > threshold, np.ones(image.shape)], axis=-1).astype(np.uint8)
    if not same_grid(image, mask):
        print(f"{file}: {grid_of(image)}; resampled to the maps' {grid_of(mask)}, nearest voxel")
        pair = _resample(pair, image.affine, mask)
    reference, seen = pair[mask.get_fdata() > 0].T > 0  # (V,) each
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


def _resample(values: np.ndarray, affine: np.ndarray, like: nib.Nifti1Image) -> np.ndarray:
    """Bring (X, Y, Z, N) values onto another grid by nearest voxel; 0 outside their field of view."""
    # Zeros around, as for nilearn the field of view ends at the centres of the outermost voxels.
    padded = np.pad(values, [(1, 1), (1, 1), (1, 1), (0, 0)])
    image = nib.Nifti1Image(padded, affine @ nib.affines.from_matvec(np.eye(3), [-1, -1, -1]))
    options = {"interpolation": "nearest", "force_resample": True, "copy_header": True}
    try:
        return resample_img(image, like.affine, like.shape, **options).get_fdata()
    except BoundingBoxError:  # raised on some sides only
        return np.zeros((*like.shape, values.shape[-1]))


def read_maps(files: dict[tuple[str, str], Path], mask: nib.Nifti1Image) -> Maps:
    """The magnitude of every map at the voxels of a mask, float32."""
    inside, maps = mask.get_fdata() > 0, {}
    for key, file in utils.progress(files.items(), desc="reading maps"):
        maps[key] = np.abs(read_image(file, like=mask).get_fdata(dtype=np.float32)[inside])
        if not np.isfinite(maps[key]).all():
            raise InputError(f"{file}: has voxels in the mask that are NaN or infinite")
    return maps


# The ranking -------------------------------------------------------------------------------------


def ranking_text(ranked: pd.DataFrame) -> str:
    """The ranking as people read it."""

    def interval(mean: str, name: str) -> list[str]:
        ends = zip(ranked[mean], ranked[f"{name}_low"], ranked[f"{name}_high"], strict=True)
        return ["" if math.isnan(m) else f"{m:.3f} [{low:.3f}, {high:.3f}]" for m, low, high in ends]

    columns = {
        "method": ranked["method"],
        "Dice": ranked["dice"],
        "single folds": interval("dice_folds_mean", "dice"),
        "matched": ranked["dice_matched"],
        "AUC": ranked["auc"],
        "AP": ranked["average_precision"],
        "random": ranked["random_dice"],
        "edges": ranked["edges_dice"],
        "minus untrained": interval("minus_untrained", "minus_untrained"),
        "than the next": ranked["than_the_next"],
        "zero maps": ["" if math.isnan(share) else f"{share:.0%}" for share in ranked["zero_share"]],
    }
    return pd.DataFrame(columns).to_string(index=False, float_format="{:.3f}".format, na_rep="")


def finished(folder: Path, found: dict[str, Any]) -> bool:
    """Whether the folder holds this comparison whole; then its ranking is printed again."""
    if not found or not all((folder / name).exists() for name in OUTPUTS):
        return False
    ranked = pd.read_csv(folder / "overlap_ranked.csv", keep_default_na=False, na_values=[""])
    if "zero_share" not in ranked:  # an earlier version's, to be made again
        return False
    print(f"{folder}: compared before, kept")
    print(ranking_text(ranked))
    return True


@utils.command("the comparison is not finished; the same command starts again")
def main(argv: list[str] | None = None) -> int:
    """Read and check everything, score maps and floors, add the intervals, rank, write."""
    args = get_parser().parse_args(argv)
    files = find_maps(args.maps)
    means = {method: file for (method, fold), file in files.items() if fold == "all"}
    zero_shares = {method: zero_share(args.maps / method) for method in means}
    scan_file = find_mean_scan(args.maps, list(means))
    inputs = {"reference": args.reference, "mask": args.mask or scan_file, "mean_scan": scan_file}
    inputs |= {f"{method}, fold {fold}": file for (method, fold), file in files.items()}
    digests = {name: storage.sha256(file) for name, file in inputs.items()}
    scan = read_image(scan_file, like=read_image(next(iter(means.values()))))
    mask = read_mask(args.mask, scan)
    reference = read_reference(args.reference, args.reference_threshold, mask)
    levels = sorted({*args.smooth, args.rank_smooth})
    identity = {name: getattr(args, name) for name in ("reference_threshold", "rank_smooth", "seed")}
    identity |= {"smooth": levels, "methods": list(means)}
    identity["sha256"] = digests
    folder = args.outpath or args.maps
    overwrite = OUTPUTS if args.overwrite else []
    found = storage.check_folder(folder, "overlap.json", identity, OUTPUTS, overwrite)
    if finished(folder, found):
        return 0
    maps = read_maps(files, mask)
    if digests != {name: storage.sha256(file) for name, file in inputs.items()}:
        raise InputError(f"--maps {args.maps}: the maps changed while they were read")

    inside = mask.get_fdata() > 0
    brain = Brain(inside, mask.affine)
    maps["edges", "all"] = ndimage.gaussian_gradient_magnitude(scan.get_fdata(dtype=np.float32), 1)[inside]
    table = score_maps(maps, reference, brain, levels)
    floor = random_floor(reference, brain, table["smoothness_mm"].max(), args.seed)
    table = add_intervals(add_random(table, floor), args.seed)
    ranked = rank(table, args.rank_smooth, args.seed)
    ranked["zero_share"] = ranked["method"].map(zero_shares)
    curves = {
        method: dice_curve(brain.smooth(values, args.rank_smooth), reference)
        for (method, fold), values in maps.items()
        if fold == "all" and not method.endswith(TWIN)
    }

    with storage.claimed(folder, ["overlap"]):
        with storage.locked(folder / storage.LOCK):
            storage.start_folder(folder, "overlap.json", identity, OUTPUTS, overwrite)
            storage.write_json(identity | {"versions": storage.versions()}, folder / "overlap.json")
        storage.write_csv(table, folder / "overlap.csv")
        storage.write_csv(ranked, folder / "overlap_ranked.csv")
        figures.draw_overlap(table, ranked, curves, folder / "overlap.png")
    print(
        f"|map| smoothed with {args.rank_smooth:g} mm FWHM, best of {THRESHOLDS} thresholds, "
        "by the mean map's Dice; single folds: mean [95 % interval]:"
    )
    print(ranking_text(ranked))
    print(f"written to {folder}: {', '.join(OUTPUTS[1:])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
