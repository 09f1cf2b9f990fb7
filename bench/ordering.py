#!/usr/bin/env python3
"""Does sanity.py, which does not know the truth, order the methods as the truth does?

    python3 bench/ordering.py demo/heatmaps demo1/heatmaps

Every folder holds what overlap.py and sanity.py wrote of a cohort whose truth is known. For each check, and
for the mean rank of all that stand for something good, this prints Spearman's correlation over the METHODs
with their Dice (mean map, at the smoothing of the ranking), cohort by cohort, and its mean over cohorts with
a 95 % interval: percentiles of 1000 draws of METHODs, the same ones in every cohort.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from sanity_scores import GAINS, SUMMARY

DRAWS = 1000
GOOD = [*GAINS, "deletion_gain_another", "insertion_gain_another", "fold_spearman", "fold_dice5"]
WITH_CONTROLS = [name for name in GAINS if name.endswith("controls")]
MEANS = {
    "mean rank of all gains and of agreement": GOOD,
    "mean rank of the two gains with controls": WITH_CONTROLS,
}


def read(folder: Path) -> pd.DataFrame:
    """The METHODs that explain networks, with their Dice, every check, and the mean ranks."""
    truth = pd.read_csv(folder / "overlap_ranked.csv", index_col="method")["dice"]
    checks = pd.read_csv(folder / "sanity_summary.csv", index_col="method")
    table = checks[checks["weights_rho"].notna()].join(truth, how="inner")
    for name, columns in MEANS.items():
        table[name] = table[columns].rank().mean(axis=1)
    return table


def correlations(tables: list[pd.DataFrame], check: str) -> list[float]:
    """Spearman's rho of a check with Dice, of each cohort."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)  # NaN then
        return [stats.spearmanr(table[check], table["dice"]).statistic for table in tables]


def interval(tables: list[pd.DataFrame], check: str) -> tuple[float, float]:
    """95 % of the draws of METHODs: the mean over cohorts of `correlations`."""
    names = sorted(set.intersection(*(set(table.index) for table in tables)))
    random = np.random.default_rng(0)
    drawn = [random.choice(names, len(names)) for _ in range(DRAWS)]
    means = [np.mean(correlations([table.loc[each] for table in tables], check)) for each in drawn]
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(low), float(high)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="maps of a cohort, compared and checked")
    tables = [read(folder) for folder in parser.parse_args(argv).folder]
    print("METHODs:", "; ".join(", ".join(table.index) for table in tables))
    checks = [name for name in SUMMARY if all(table[name].notna().all() for table in tables)]
    checks.remove("zero_share")  # which is the same of most
    for check in [*checks, *MEANS]:
        each, (low, high) = correlations(tables, check), interval(tables, check)
        told = "  ".join(f"{rho:5.2f}" for rho in each)
        print(f"{check:42} {told}   mean {np.mean(each):5.2f} [{low:5.2f}, {high:5.2f}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
