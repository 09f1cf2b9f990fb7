"""Compare the maps of every method with a reference map: Dice overlap, its floors and intervals.

    python3 overlap.py --maps heatmaps --reference truth.nii.gz --mask mask.nii.gz

Takes every METHOD folder under --maps that heatmap.py or svm.py wrote, every fold and the mean of all
folds, at every --smooth. Beside each Dice stand what a random map as smooth as this one, an edge filter
and an untrained network (METHOD-random) reach.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

import brain_maps
import figures
import utils
from brain_maps import Maps
from internals import storage
from internals.errors import InputError
from internals.results import Files, ResultFolder
from overlap_scores import (
    THRESHOLDS,
    BrainMask,
    add_intervals,
    add_random,
    dice_curve,
    floor_of,
    random_floor,
    rank,
    score_maps,
)

PART = "overlap"
FILES = Files(
    record="overlap.json", part=["overlap.csv", "overlap_ranked.csv", "overlap.png", "overlap_maps.png"]
)


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    length, levels = utils.bounded(float, at_least=0, at_most=100), [0, 2, 4, 6, 8, 10, 12]
    add = parser.add_argument
    add("--maps", type=Path, default=Path("heatmaps"), metavar="DIR", help="holds the METHOD folders")
    add("--reference", type=Path, required=True, metavar="NIFTI", help="where the maps should be large")
    add("--reference-threshold", type=utils.bounded(float), default=0.0, metavar="X", help="it is above X")
    add("--mask", type=Path, metavar="NIFTI", help="the brain (default: where the mean scan is above 0)")
    add("--smooth", type=length, nargs="+", default=levels, metavar="MM", help="FWHM of |map|")
    add("--rank-smooth", type=length, default=8, metavar="MM", help="FWHM of the ranking")
    add("--outpath", type=Path, metavar="DIR", help="where to write (default: --maps)")
    add("--seed", type=utils.bounded(int, at_least=0), default=0, help="of the random maps and intervals")
    add("--overwrite", action="store_true", help="replace an earlier comparison in --outpath")
    return parser


# The comparison ----------------------------------------------------------------------------------


def sha256_of(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of some files' content."""
    return {name: storage.file_sha256(file) for name, file in files.items()}


def compare(
    maps: Maps, reference: np.ndarray, brain: BrainMask, levels: list[float], fwhm: float, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score maps beside their floors at every smoothing, and rank the methods at one, `fwhm`."""
    table = score_maps(maps, reference, brain, levels)
    floor = random_floor(reference, brain, table["smoothness_mm"].max(), seed)
    table = add_intervals(add_random(table, floor), seed)
    return table, rank(table, fwhm, seed)


def smoothed_means(maps: Maps, brain: BrainMask, fwhm: float) -> dict[str, np.ndarray]:
    """The mean map of every METHOD, floors aside, and of the edge filter, smoothed: (V,) each."""
    means = {method: values for (method, fold), values in maps.items() if fold == "all"}
    return {name: brain.smooth(values, fwhm) for name, values in means.items() if not floor_of(name)}


# The ranking -------------------------------------------------------------------------------------


def read_ranking(file: Path) -> pd.DataFrame:
    """The ranking that an earlier call wrote; a METHOD may be called "NA"."""
    try:
        return pd.read_csv(file, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as problem:
        raise InputError(f"{file}: cannot be read ({problem})") from problem


def ranking_text(ranked: pd.DataFrame) -> str:
    """The ranking as people read it."""

    def interval(mean: str, name: str) -> list[str]:
        ends = zip(ranked[mean], ranked[f"{name}_low"], ranked[f"{name}_high"], strict=True)
        return ["" if math.isnan(m) else f"{m:.3f} [{low:.3f}, {high:.3f}]" for m, low, high in ends]

    columns = {
        "method": ranked["method"],
        "Dice": ranked["dice"],
        "untrained": ranked["untrained_dice"],
        "permuted": ranked["permuted_dice"],
        "single folds": interval("dice_folds_mean", "dice"),
        "matched": ranked["dice_matched"],
        "AUC": ranked["auc"],
        "AP": ranked["average_precision"],
        "of controls": ranked["controls_dice"],
        "of patients": ranked["patients_dice"],
        "random": ranked["random_dice"],
        "edges": ranked["edges_dice"],
        "minus untrained": interval("minus_untrained", "minus_untrained"),
        "minus permuted": interval("minus_permuted", "minus_permuted"),
        "than the next": ranked["than_the_next"],
        "zero maps": ["" if math.isnan(share) else f"{share:.0%}" for share in ranked["zero_share"]],
    }
    table = pd.DataFrame(columns)
    shown = table.loc[:, (table.notna() & (table != "")).any()]  # no column that says nothing
    return shown.to_string(index=False, float_format="{:.3f}".format, na_rep="")


def draw_maps(
    means: Mapping[str, np.ndarray],
    ranked: pd.DataFrame,
    reference: np.ndarray,
    inside: np.ndarray,
    scan: nib.Nifti1Image,
    file: Path,
) -> None:
    """Draw the smoothed mean maps in the order of the ranking, each with its Dice."""
    rows = ranked[ranked["method"].isin(set(means) - {"edges"})]
    pairs = zip(rows["method"], rows["dice"], strict=True)
    maps = {f"{name}\nDice {dice:.2f}": means[name] for name, dice in pairs}
    fwhm = f"{rows['fwhm_mm'].iloc[0]:g} mm"
    title = f"|map| smoothed with {fwhm}: as many voxels as the reference has, which is outlined"
    figures.draw_overlap_maps(maps, reference, inside, scan, title, file)


@utils.command("the comparison is not finished; the same command starts again")
def main(argv: list[str] | None = None) -> int:
    """Read and check everything, score maps and floors, add the intervals, rank, write."""
    args = get_parser().parse_args(argv)
    folder = args.outpath or args.maps
    methods = brain_maps.find_maps(args.maps)
    files = {key: file for method in methods for key, file in method.files.items()}
    mean_scan = brain_maps.find_mean_scan(methods)
    inputs = {"reference": args.reference, "mask": args.mask or mean_scan, "mean_scan": mean_scan}
    inputs |= {f"{method}, fold {fold}": file for (method, fold), file in files.items()}
    digests = sha256_of(inputs)
    scan, inside, grid = brain_maps.read_brain(files[methods[0].name, "all"], mean_scan, args.mask)
    reference = brain_maps.read_reference(args.reference, args.reference_threshold, inside, grid)

    levels = sorted({*args.smooth, args.rank_smooth})
    identity = {name: getattr(args, name) for name in ("reference_threshold", "rank_smooth", "seed")}
    identity |= {"smooth": levels, "methods": [method.name for method in methods], "sha256": digests}
    results = ResultFolder(folder, FILES, [PART], identity, overwrite=args.overwrite)
    if results.check() and not results.unfinished():
        ranked = read_ranking(folder / "overlap_ranked.csv")
        if {"zero_share", "permuted_dice"} <= set(ranked):
            print(f"{folder}: compared before, kept\n{ranking_text(ranked)}")
            return 0
        results.overwrite = True  # an earlier version's is made again

    maps = brain_maps.read_maps(files, inside, grid)
    if sha256_of(inputs) != digests:
        raise InputError(f"--maps {args.maps}: the maps changed while they were read")
    maps["edges", "all"] = ndimage.gaussian_gradient_magnitude(scan, 1)[inside]
    brain = BrainMask(inside, grid.affine)
    table, ranked = compare(maps, reference, brain, levels, args.rank_smooth, args.seed)
    ranked["zero_share"] = ranked["method"].map({method.name: method.zero_share for method in methods})
    means = smoothed_means(maps, brain, args.rank_smooth)
    curves = {name: dice_curve(values, reference) for name, values in means.items()}
    with results.at_work({}) as missing:
        if missing:  # nobody else made the same meanwhile
            storage.write_csv(table, folder / "overlap.csv")
            storage.write_csv(ranked, folder / "overlap_ranked.csv")
            figures.draw_overlap(table, ranked, curves, folder / "overlap.png")
            image = nib.Nifti1Image(scan, grid.affine)
            draw_maps(means, ranked, reference, inside, image, folder / "overlap_maps.png")
            results.finish(PART)
    print(
        f"|map| smoothed with {args.rank_smooth:g} mm FWHM, best of {THRESHOLDS} thresholds, "
        "by the mean map's Dice; single folds: mean [95 % interval]:"
    )
    print(ranking_text(ranked))
    print(f"written to {folder}: {', '.join(FILES.part)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
