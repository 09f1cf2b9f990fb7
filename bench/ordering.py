#!/usr/bin/env python3
"""Does sanity.py, which does not know the truth, order the methods as the truth does?

    python3 bench/ordering.py demo/heatmaps demo1/heatmaps

Every folder holds what overlap.py and sanity.py wrote of a cohort whose truth is known. For each check, and
for the mean rank of all that stand for something good, this prints Spearman's correlation over the METHODs
with their Dice (mean map, at the smoothing of the ranking): of all METHODs of a cohort, then of those that
all cohorts have, and of the latter the mean over cohorts with a 95 % interval, percentiles of 1000 draws of
METHODs.
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
    """The METHODs that explain networks, with their Dice and every check."""
    truth = pd.read_csv(folder / "overlap_ranked.csv", index_col="method")["dice"]
    checks = pd.read_csv(folder / "sanity_summary.csv", index_col="method")
    return checks[checks["weights_rho"].notna()].join(truth, how="inner")


def with_mean_ranks(table: pd.DataFrame) -> pd.DataFrame:
    """The same with the mean ranks among its METHODs."""
    return table.assign(**{name: table[columns].rank().mean(axis=1) for name, columns in MEANS.items()})


def correlations(tables: list[pd.DataFrame], check: str) -> list[float]:
    """Spearman's rho of a check with Dice, of each cohort."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)  # NaN then
        return [stats.spearmanr(table[check], table["dice"]).statistic for table in tables]


def interval(tables: list[pd.DataFrame], check: str) -> tuple[float, float]:
    """95 % of the draws of METHODs, which all tables have: the mean over cohorts of `correlations`."""
    names, random = list(tables[0].index), np.random.default_rng(0)
    drawn = [random.choice(names, len(names)) for _ in range(DRAWS)]
    means = [np.mean(correlations([table.loc[each] for table in tables], check)) for each in drawn]
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(low), float(high)


def main(argv: list[str] | None = None) -> int:
    """Print the table: all METHODs of each cohort, then those that all cohorts have."""
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="maps of a cohort, compared and checked")
    tables = [read(folder) for folder in parser.parse_args(argv).folder]
    common = sorted(set.intersection(*(set(table.index) for table in tables)))
    shared = [with_mean_ranks(table.loc[common]) for table in tables]
    print("all METHODs:", "; ".join(", ".join(table.index) for table in tables))
    print("METHODs of all cohorts:", ", ".join(common))
    checks = [name for name in SUMMARY if all(table[name].notna().all() for table in tables)]
    checks.remove("zero_share")  # which is the same of most
    for check in [*checks, *MEANS]:
        every = correlations([with_mean_ranks(table) for table in tables], check)
        each, (low, high) = correlations(shared, check), interval(shared, check)
        told = [" ".join(f"{rho:5.2f}" for rho in part) for part in (every, each)]
        mean = f"{np.mean(each):5.2f} [{low:5.2f}, {high:5.2f}]"
        print(f"{check:42} all {told[0]}   common {told[1]}   mean {mean}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
