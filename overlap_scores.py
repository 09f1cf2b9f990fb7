"""How well maps mark a reference: Dice and its like, smoothing in the brain, random maps, intervals."""

import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nilearn.image import smooth_img
from scipy import ndimage

import utils
from brain_maps import FLOORS, GROUPS, Maps

SCORES = ("dice", "dice_matched")  # whose floors and intervals are reported
THRESHOLDS = 50
BOOTSTRAP_DRAWS = 10_000  # of the folds
NOISE_DRAWS = 100
THREADS = min(4, os.cpu_count() or 1)  # smoothing and sorting leave Python's lock alone


# Overlap -----------------------------------------------------------------------------------------


def dice_curve(values: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dice = 2 TP / (2 TP + FP + FN) of {values >= threshold} with a reference.

    Args:
        values: (V,) real.
        reference: (V,) bool.

    Returns:
        50 thresholds evenly spaced from the smallest to the largest value, and the Dice at each.
    """
    return _dice_curve(np.sort(values), np.sort(values[reference]))


def _dice_curve(ordered: np.ndarray, in_reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`dice_curve` of all values and those in the reference, each sorted."""
    thresholds = np.linspace(float(ordered[0]), float(ordered[-1]), THRESHOLDS)
    positive, true = (len(part) - np.searchsorted(part, thresholds) for part in (ordered, in_reference))
    return thresholds, 2 * true / (positive + len(in_reference))


def overlap_scores(values: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How well large values mark a reference. Everything follows from two sorts, ties included.

    Args:
        values: (V,) real.
        reference: (V,) bool, some voxels in it and some not.

    Returns:
        dice: the best of `dice_curve`, with its threshold, also in percent_of_max; the lowest of equals.
        dice_floor: Dice at the lowest threshold, where every voxel is taken.
        dice_matched: Dice of the k largest voxels, k the size of the reference. Of voxels tied at the
            k-th value those needed count by their mean, as if drawn at random.
        auc: area under the ROC curve (Mann and Whitney's statistic with mean ranks).
        average_precision: mean over the reference's voxels of the precision at their value.
    """
    ordered, in_reference = np.sort(values), np.sort(values[reference])
    thresholds, dice = _dice_curve(ordered, in_reference)
    best, v, k = int(np.argmax(dice)), len(ordered), len(in_reference)
    below, upto = (np.searchsorted(ordered, in_reference, side) for side in ("left", "right"))
    rank_sum = float((below + 1 + upto).sum()) / 2
    precision = (k - np.searchsorted(in_reference, in_reference)) / (v - below)
    cut = ordered[v - k]  # the k-th largest value
    above, true = (len(part) - int(np.searchsorted(part, cut, "right")) for part in (ordered, in_reference))
    tied, true_tied = (
        int(np.searchsorted(part, cut, "right") - np.searchsorted(part, cut))
        for part in (ordered, in_reference)
    )
    return {
        "dice": float(dice[best]),
        "threshold": float(thresholds[best]),
        "percent_of_max": float(100 * thresholds[best] / ordered[-1]) if ordered[-1] else math.nan,
        "dice_floor": float(dice[0]),
        "dice_matched": (true + true_tied * (k - above) / tied) / k,
        "auc": (rank_sum - k * (k + 1) / 2) / (k * (v - k)),
        "average_precision": float(precision.mean()),
    }


class BrainMask:
    """The voxels of the brain, smoothing among them, and the smoothness of what lies on them.

    Args:
        mask: (X, Y, Z) bool.
        affine: (4, 4), voxel to mm.
    """

    def __init__(self, mask: np.ndarray, affine: np.ndarray) -> None:
        self.mask = mask[ndimage.find_objects(mask.astype(np.uint8))[0]]  # without the empty border
        self.affine = affine
        self.voxel_sizes = nib.affines.voxel_sizes(affine)  # mm
        self._weights: dict[float, np.ndarray] = {}

    def smooth(self, values: np.ndarray, fwhm: float) -> np.ndarray:
        """Smooth with a Gaussian of `fwhm` mm, among the voxels of the mask only: float32 (V,).

        Each voxel gets the Gaussian-weighted mean of the mask's voxels: zeros outside are smoothed in,
        then divided out again (normalised convolution, Knutsson and Westin 1993). Left in, they pull
        magnitudes down along the edge of the brain; even white noise then marks deep structures.
        """
        if fwhm == 0:
            return values
        if fwhm not in self._weights:
            self._weights[fwhm] = self._blur(np.ones_like(values), fwhm)
        return self._blur(values, fwhm) / self._weights[fwhm]

    def _blur(self, values: np.ndarray, fwhm: float) -> np.ndarray:
        # nilearn mirrors at the border; with a margin of one FWHM no kernel (1.7 FWHM) reaches its mirror.
        mask = np.pad(self.mask, [(n, n) for n in np.ceil(fwhm / self.voxel_sizes).astype(int)])
        volume = np.zeros(mask.shape, np.float32)
        volume[mask] = values
        return np.asarray(smooth_img(nib.Nifti1Image(volume, self.affine), fwhm).dataobj)[mask]

    def smoothness(self, values: np.ndarray) -> float:
        """FWHM in mm of the Gaussian that would make white noise as smooth as `values`, (V,).

        From the variance of the differences of neighbours (Forman et al. 1995,
        doi 10.1002/mrm.1910330508), the geometric mean over axes; NaN where all values are equal.
        """
        if values.min() == values.max():
            return math.nan
        variance = float(values.var(dtype=np.float64))
        volume = np.zeros(self.mask.shape, np.float32)
        volume[self.mask] = values
        product = 1.0
        for axis, size in enumerate(self.voxel_sizes):
            mask, field = np.moveaxis(self.mask, axis, 0), np.moveaxis(volume, axis, 0)
            both = mask[1:] & mask[:-1]
            steps = np.square((field[1:] - field[:-1]) * both).sum(dtype=np.float64) / both.sum()
            correlation = 1 - steps / (2 * variance)  # of neighbours
            product *= size * math.sqrt(2 * math.log(2) / -math.log(correlation)) if correlation > 0 else 0
        return product ** (1 / 3)


def score_maps(maps: Maps, reference: np.ndarray, brain: BrainMask, levels: list[float]) -> pd.DataFrame:
    """Score every map at every FWHM: columns method, fold, fwhm_mm, `overlap_scores`, smoothness_mm.

    Smoothed are magnitudes: the signs of guided maps alternate from voxel to voxel and would cancel.
    """

    def score(job: tuple[tuple[str, str], float]) -> dict[str, Any]:
        (method, fold), fwhm = job
        values = brain.smooth(maps[method, fold], fwhm)
        about = {"method": method, "fold": fold, "fwhm_mm": fwhm}
        return about | overlap_scores(values, reference) | {"smoothness_mm": brain.smoothness(values)}

    jobs = list(itertools.product(maps, levels))
    return pd.DataFrame(utils.in_threads(score, jobs, "maps", THREADS))


# Floors and intervals ----------------------------------------------------------------------------


def random_floor(reference: np.ndarray, brain: BrainMask, largest: float, seed: int) -> pd.DataFrame:
    """What random maps reach: 100 draws of white noise in the mask, smoother from row to row.

    The noise stands for the smoothed magnitude, not for the map: its smoothness is the one measured
    there, and to take magnitudes once more would roughen it. Overlap depends on the order of voxels
    and little else, so that noise has both signs does not matter.

    Args:
        largest: mm of smoothness that the rows must reach.

    Returns:
        Columns smoothness_mm (mean of the draws, rising), dice and dice_matched (95th percentiles).
    """
    levels = [0.0]  # FWHM in mm
    while levels[-1] < 1.25 * largest:
        levels.append(levels[-1] + max(float(brain.voxel_sizes.mean()), levels[-1] / 4))
    steps = np.sqrt(np.diff(np.square(levels), prepend=0))  # Gaussians one after the other add in squares

    def score_noise(draw: int) -> list[list[float]]:
        noise = np.random.default_rng([seed, draw]).standard_normal(len(reference), dtype=np.float32)
        rows = []
        for step in steps:
            noise = brain.smooth(noise, float(step))
            scores = overlap_scores(noise, reference)
            rows.append([brain.smoothness(noise), scores["dice"], scores["dice_matched"]])
        return rows

    drawn = np.array(utils.in_threads(score_noise, range(NOISE_DRAWS), "random maps", THREADS))
    # (draws, levels, 3)
    dice, matched = np.percentile(drawn[..., 1:], 95, axis=0).T
    return pd.DataFrame({"smoothness_mm": drawn[..., 0].mean(0), "dice": dice, "dice_matched": matched})


def add_random(table: pd.DataFrame, floor: pd.DataFrame) -> pd.DataFrame:
    """Set beside every map what random maps of its own smoothness reach.

    Adds columns random_dice and random_dice_matched, and per FWHM a row of method "random" with the
    highest of both among the METHODs' mean maps: the floor of the smoothest.
    """
    for score in SCORES:
        table[f"random_{score}"] = np.interp(table["smoothness_mm"], floor["smoothness_mm"], floor[score])
    columns = {"smoothness_mm": "smoothness_mm"} | {f"random_{score}": score for score in SCORES}
    means = table[(table["fold"] == "all") & (table["method"] != "edges")]
    rows = means.groupby("fwhm_mm")[list(columns)].max().rename(columns=columns).reset_index()
    return pd.concat([table, rows.assign(method="random", fold="all")], ignore_index=True)


def bootstrap_interval(
    values: np.ndarray, seed: int, statistic: Callable[..., np.ndarray] = np.mean
) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of a mean, over folds mostly (Efron and Tibshirani 1993), 10000 draws.

    Args:
        values: (..., k) one value per fold; every leading index sees the same draws.
        statistic: what takes the place of the mean, along an axis as numpy's functions take it.

    Returns:
        Lower and upper end, (...).
    """
    k = values.shape[-1]
    draws = np.random.default_rng(seed).integers(k, size=(BOOTSTRAP_DRAWS, k))
    low, high = np.percentile(statistic(values[..., draws], axis=-1), [2.5, 97.5], axis=-1)
    return low, high


def fold_scores(table: pd.DataFrame, score: str) -> pd.DataFrame:
    """One score of the fold maps: a row per (method, fwhm_mm), a column per fold."""
    folds = table[table["fold"].str.isdecimal()]
    return folds.pivot(index=["method", "fwhm_mm"], columns="fold", values=score)


def floor_of(method: str) -> str:
    """The kind of floor that a METHOD is, a key of FLOORS; empty where it is none."""
    return next((floor for floor, suffix in FLOORS.items() if method.endswith(suffix)), "")


def add_intervals(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Add to the rows of all folds the mean over folds and its interval, and how far it is above each floor.

    The columns are {score}_folds_mean, {score}_low and {score}_high and, for every kind of FLOORS, the Dice
    of the floor's mean map, {floor}_dice, and the difference fold by fold, minus_{floor}, its mean and
    interval; with _matched for the matched Dice.
    """
    columns: dict[str, Any] = {}

    def enter(mean: str, name: str, part: pd.DataFrame) -> None:
        low, high = bootstrap_interval(part.to_numpy(), seed)
        columns.update({mean: part.mean(axis=1).to_numpy(), f"{name}_low": low, f"{name}_high": high})

    means = table[table["fold"] == "all"].set_index(["method", "fwhm_mm"])
    for score in SCORES:
        folds = fold_scores(table, score)
        enter(f"{score}_folds_mean", score, folds)
        for floor, suffix in FLOORS.items():
            name = f"minus_{floor}{score.removeprefix('dice')}"
            enter(name, name, folds - _floor_values(folds, suffix))
            columns[f"{floor}_{score}"] = _floor_values(means[score].reindex(folds.index), suffix).to_numpy()
    summary = pd.DataFrame(columns, folds.index).reset_index().assign(fold="all")
    return table.merge(summary, on=["method", "fold", "fwhm_mm"], how="left")


def _floor_values(values: Any, suffix: str) -> Any:
    """What METHOD + suffix has, in the place of each METHOD; NaN where there is no such."""
    floors = values[values.index.get_level_values("method").str.endswith(suffix)]
    floors = floors.rename(lambda name: name.removesuffix(suffix), level="method")
    return floors.reindex(values.index)


# The ranking -------------------------------------------------------------------------------------


def rank(table: pd.DataFrame, fwhm: float, seed: int) -> pd.DataFrame:
    """The mean maps and floors at one smoothing, by falling Dice; each METHOD compared with the next.

    Adds edges_dice, the Dice of the edge filter; controls_dice and patients_dice, those of the groups' mean
    maps, matched too; and for METHODs that another follows (floors aside) difference, the mean over folds of
    its Dice minus the other's, with its interval, and than_the_next: "better" where that interval lies above
    zero, else "not separated".
    """
    at = table[table["fwhm_mm"] == fwhm]
    ranked = at[at["fold"] == "all"].sort_values("dice", ascending=False, kind="stable", ignore_index=True)
    ranked["edges_dice"] = ranked.loc[ranked["method"] == "edges", "dice"].item()
    for group, score in itertools.product(GROUPS, SCORES):
        of_group = at[at["fold"] == group].set_index("method")[score]
        ranked[f"{group}_{score}"] = ranked["method"].map(of_group)
    folds = fold_scores(at, "dice").droplevel("fwhm_mm")
    trained = [name for name in ranked["method"] if name in folds.index and not floor_of(name)]
    compared = ["difference", "difference_low", "difference_high", "than_the_next"]
    ranked = ranked.reindex(columns=[*ranked, *compared]).astype({"than_the_next": object})
    for name, following in itertools.pairwise(trained):
        difference = (folds.loc[name] - folds.loc[following]).to_numpy()
        low, high = bootstrap_interval(difference, seed)
        verdict = "better" if low > 0 else "not separated"
        ranked.loc[ranked["method"] == name, compared] = [difference.mean(), low, high, verdict]
    return ranked.drop(columns="fold")
