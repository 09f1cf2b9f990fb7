"""What the checks of maps come to: how alike two maps are, intervals over subjects, a verdict in words."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from brain_maps import RESERVED
from overlap_scores import bootstrap_interval

LARGEST = 0.05  # share of the voxels whose agreement is measured
COLUMNS = ["method", "check", "setting", "fold", "scan", "subject", "value"]
EDGES, RANDOM = RESERVED  # orders of an edge filter and by chance, beside the METHODs
ANOTHER = "another scan"  # the order of the same METHOD's map of another scan
FILLINGS = ("zero", "controls")  # what a covered cube shows: nothing, or the mean of the training controls
GAINS = ("deletion_gain_zero", "deletion_gain_controls", "insertion_gain_zero", "insertion_gain_controls")
# of the summary, by column: the check and the setting ("" for all) that it is of
SUMMARY = {
    "weights_rho": ("weights_all_spearman", ""),  # all layers drawn anew
    **{gain: (gain, RANDOM) for gain in GAINS},
    "deletion_gain_another": ("deletion_gain_controls", ANOTHER),
    "insertion_gain_another": ("insertion_gain_controls", ANOTHER),
    "fold_spearman": ("fold_spearman", ""),
    "fold_dice5": ("fold_dice5", ""),
    "seed_spearman": ("seed_spearman", ""),
    "seed_dice5": ("seed_dice5", ""),
    "residual_median": ("residual", ""),
    "zero_share": ("zero", ""),
}
# what a verdict counts as bad
ALIKE, RATHER_ALIKE = 0.9, 0.5  # rank correlation with the map of new weights
BY_CHANCE = 2 * LARGEST  # Dice of the largest voxels; of maps by chance it is LARGEST
MANY_ZERO, FAR_OFF = 0.1, 0.1  # share of maps that are zero; residual


# Two maps ----------------------------------------------------------------------------------------


def standard_ranks(magnitudes: np.ndarray) -> np.ndarray:
    """The ranks of values, less their mean, of length 1; the dot product of two such is Spearman's rho.

    Args:
        magnitudes: (V,) real. Ties get their mean rank.

    Returns:
        float64 (V,); NaN where all values are equal, and nothing can be ranked.
    """
    ranks = stats.rankdata(magnitudes)
    ranks -= (len(ranks) + 1) / 2
    length = np.sqrt(ranks @ ranks)
    return ranks / length if length else np.full(len(ranks), np.nan)


def largest(magnitudes: np.ndarray) -> np.ndarray:
    """The largest 5 % of values >= 0, bool (V,): with all that equal the smallest of them, without zeros."""
    count = max(round(LARGEST * len(magnitudes)), 1)
    smallest = np.partition(magnitudes, -count)[-count]
    return (magnitudes >= smallest) & (magnitudes > 0)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Dice of two sets, bool (V,) each; NaN where either is empty."""
    sizes = int(one.sum()), int(other.sum())
    return 2 * int((one & other).sum()) / sum(sizes) if all(sizes) else np.nan


class Magnitudes:
    """The magnitudes of a map at the voxels of the brain, prepared to be compared with others."""

    def __init__(self, values: np.ndarray) -> None:
        magnitudes = np.abs(values)
        self.ranks, self.largest = standard_ranks(magnitudes), largest(magnitudes)

    def spearman(self, other: "Magnitudes") -> float:
        """Spearman's rank correlation; NaN where either map is the same everywhere."""
        return float(self.ranks @ other.ranks)

    def dice5(self, other: "Magnitudes") -> float:
        """Dice of the largest 5 %."""
        return dice(self.largest, other.largest)


# All maps ----------------------------------------------------------------------------------------


def summarize(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row per METHOD: its checks with 95 % intervals over subjects, and a verdict.

    A subject counts by the mean over its scans, draws and other networks. One subject leaves no interval, nor
    do values that are of no scan.

    Args:
        rows: columns as COLUMNS; `setting` of the gains is the order that they are over.
        seed: of the bootstrap of `residual_median` and `zero_share`.

    Returns:
        Columns method, the keys of SUMMARY, each with _low and _high, and verdict; NaN where a check was not
        made.
    """
    found = []
    for method, part in rows.groupby("method", sort=True):
        row: dict[str, Any] = {"method": method}
        for name, (check, setting) in SUMMARY.items():
            chosen = part[(part["check"] == check) & (part["setting"].str.startswith(setting))]
            row |= _with_interval(name, chosen, seed)
        if not all(np.isnan(value) for key, value in row.items() if key != "method"):
            found.append(row | {"verdict": verdict(row)})
    return pd.DataFrame(found)


def _with_interval(name: str, rows: pd.DataFrame, seed: int) -> dict[str, float]:
    """The mean over subjects, or their median where the name says so, and its interval.

    Student's interval of the mean, as a bootstrap of few subjects is too narrow; of what cannot be normal,
    the bootstrap's.
    """
    low, high = np.nan, np.nan
    rows = rows.dropna(subset="value")
    values = rows.groupby("subject")["value"].mean().to_numpy()
    statistic = np.median if name == "residual_median" else np.mean
    if len(values) > 1 and name in ("residual_median", "zero_share"):
        low, high = map(float, bootstrap_interval(values, seed, statistic))
    elif len(values) > 1:
        error = values.std(ddof=1) / np.sqrt(len(values))
        low, high = values.mean() + stats.t.ppf([0.025, 0.975], len(values) - 1) * error
    mean = float(statistic(values)) if len(values) else np.nan
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def verdict(row: dict[str, Any]) -> str:
    """What the checks of a METHOD say, in words: by their intervals, but for empty maps and residuals.

    Args:
        row: as `summarize` makes it.
    """
    said = []
    if np.isfinite(row[GAINS[0]]):
        better, worse = _faithful_with(row)
        said += _faithfulness(better, worse)
        own = [row[f"{way}_gain_another_low"] for way in ("deletion", "insertion")]
        said += ["another scan's map does as well"] if "controls" in better and max(own) <= 0 else []
    if row["weights_rho_low"] > ALIKE:
        said.append("does not depend on the weights")
    elif row["weights_rho_low"] > RATHER_ALIKE:
        said.append("depends little on the weights")
    if row["fold_dice5_high"] < BY_CHANCE:
        said.append("other networks give other maps")
    if row["zero_share"] > MANY_ZERO:
        said.append(f"{row['zero_share']:.0%} of the maps are zero")
    if row["residual_median"] > FAR_OFF:
        said.append(f"sums are off by {row['residual_median']:.0%}")
    return "; ".join(said) or "explains no network"


def _faithful_with(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The fillings with which the map's order is better than chance both ways, and worse both ways."""
    ways = {filling: [name for name in GAINS if name.endswith(filling)] for filling in FILLINGS}
    better = [filling for filling in FILLINGS if all(row[f"{name}_low"] > 0 for name in ways[filling])]
    worse = [filling for filling in FILLINGS if all(row[f"{name}_high"] < 0 for name in ways[filling])]
    return better, worse


def _faithfulness(better: list[str], worse: list[str]) -> list[str]:
    """The same in words."""
    if better == list(FILLINGS):
        return ["faithful"]
    said = [f"faithful with {better[0]} only"] if better else []
    said += [f"worse than chance with {' and '.join(worse)}"] if worse else []
    return said or ["no more faithful than chance"]
