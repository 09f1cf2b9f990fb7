"""sanity_scores.py: rank correlation, the largest voxels, summaries over subjects, verdicts."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import sanity_scores
from sanity_scores import GAINS, SUMMARY, Magnitudes, dice, largest, summarize, verdict

NAN = float("nan")


@pytest.mark.parametrize("levels", [10**6, 5])  # hardly a tie, hardly anything else
def test_spearman_is_scipys(levels):
    one, other = np.random.default_rng(0).integers(-levels, levels, (2, 3000)).astype(np.float32)
    expected = stats.spearmanr(np.abs(one), np.abs(other)).statistic
    assert Magnitudes(one).spearman(Magnitudes(other)) == pytest.approx(expected, abs=1e-12)
    assert Magnitudes(one).spearman(Magnitudes(-2 * one)) == pytest.approx(1, abs=1e-12)


def test_map_that_is_the_same_everywhere_has_no_rank_correlation():
    flat, other = Magnitudes(np.zeros(50)), Magnitudes(np.arange(50.0))
    assert np.isnan(flat.spearman(other))
    assert np.isnan(other.spearman(flat))


def test_largest_five_percent():
    values = np.random.default_rng(0).permutation(200).astype(float)
    assert sorted(values[largest(values)]) == list(range(190, 200))
    tied = np.repeat([3.0, 2.0, 1.0], [4, 8, 188])
    assert largest(tied).tolist() == [True] * 12 + [False] * 188  # the tenth is 2: all of these
    sparse = np.repeat([3.0, 0.0], [4, 196])
    assert largest(sparse).tolist() == [True] * 4 + [False] * 196
    assert not largest(np.zeros(200)).any()


def test_dice_of_the_largest():
    one, other = np.arange(100.0), np.roll(np.arange(100.0), 2)  # 95 to 99; there, 3 of these are among the 5
    assert Magnitudes(one).dice5(Magnitudes(-other)) == 2 * 3 / 10
    assert dice(np.array([True, False]), np.array([False, True])) == 0
    assert np.isnan(dice(np.array([True, False]), np.zeros(2, bool)))  # of an empty map nothing is known
    assert np.isnan(dice(np.zeros(3, bool), np.zeros(3, bool)))


def finding(
    method: str, check: str, setting: str, value: float, subject: str = "a", fold: int = 0
) -> tuple[Any, ...]:
    return method, check, setting, fold, f"{subject}.nii" if subject else "", subject, value


def table(*findings: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(findings, columns=sanity_scores.COLUMNS)


def test_subjects_count_once():
    """Subject a by the mean over three values, b by one: (2 + 6) / 2, not the mean of all; Student's."""
    values = [("a", 1.0), ("a", 2.0), ("a", 3.0), ("b", 6.0), ("b", NAN)]
    rows = [finding("M", "fold_dice5", f"fold {i}", v, who) for i, (who, v) in enumerate(values)]
    (row,) = summarize(table(*rows), seed=0).to_dict("records")
    assert row["fold_dice5"] == 4
    interval = stats.ttest_1samp([2, 6], 0).confidence_interval()
    assert (row["fold_dice5_low"], row["fold_dice5_high"]) == pytest.approx(interval)
    assert np.isnan(row["weights_rho"])


def test_each_column_takes_its_check_and_setting_alone():
    rows = [finding("M", check, setting or "any", n) for n, (check, setting) in enumerate(SUMMARY.values())]
    rows += [finding("M", gain, "edges", 100) for gain in GAINS]
    rows += [finding("M", "weights_output_spearman", "block 0, draw 0", 100)]
    rows += [finding("random", "deletion_zero", "0.5", 100)]
    (row,) = summarize(table(*rows), seed=0).to_dict("records")  # no row of what was not summed up
    assert [row[name] for name in SUMMARY] == list(range(len(SUMMARY)))


def test_median_of_the_residuals():
    values = [0.1, 0.2, 9.0]
    rows = [finding("M", "residual", "", v, who) for v, who in zip(values, "abc", strict=True)]
    (row,) = summarize(table(*rows), seed=0).to_dict("records")
    assert (row["residual_median"], row["residual_median_low"], row["residual_median_high"]) == (0.2, 0.1, 9)


def test_share_is_bootstrapped():
    """Of 12 subjects with two empty maps: 95 % of the draws of 12 have none to five."""
    rows = [finding("M", "zero", "", float(i < 2), f"s{i}") for i in range(12)]
    (row,) = summarize(table(*rows), seed=0).to_dict("records")
    ends = stats.binom(12, 1 / 6).ppf([0.025, 0.975]) / 12
    assert (row["zero_share_low"], row["zero_share_high"]) == pytest.approx(ends)


def test_one_subject_leaves_no_interval():
    (row,) = summarize(table(finding("M", "fold_spearman", "fold 1", 0.5)), seed=0).to_dict("records")
    assert row["fold_spearman"] == 0.5
    assert np.isnan([row["fold_spearman_low"], row["fold_spearman_high"]]).all()


def test_values_of_no_scan_have_no_interval():
    rows = [finding("SVM", "fold_spearman", f"fold {i}", v, subject="") for i, v in enumerate((0.2, 0.6))]
    (row,) = summarize(table(*rows), seed=0).to_dict("records")
    assert row["fold_spearman"] == pytest.approx(0.4)
    assert np.isnan(row["fold_spearman_low"])
    assert row["verdict"] == "explains no network"


GOOD = dict.fromkeys(GAINS, 1.0) | {"weights_rho": 0.3, "fold_dice5": 0.3, "zero_share": 0.0}
GOOD |= {"residual_median": 0.01, "deletion_gain_another": 1.0, "insertion_gain_another": 1.0}


ANOTHER = {"deletion_gain_another": 0.0, "insertion_gain_another": 0.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "faithful"),
        ({"residual_median": NAN}, "faithful"),
        ({"weights_rho": 0.95}, "faithful; does not depend on the weights"),
        ({"weights_rho": 0.6}, "faithful; depends little on the weights"),
        ({"fold_dice5": 0.07}, "faithful; other networks give other maps"),
        (ANOTHER, "faithful; another scan's map does as well"),
        ({"deletion_gain_another": 0.0}, "faithful"),
        (ANOTHER | {GAINS[0]: 0.0}, "faithful with controls only; another scan's map does as well"),
        (ANOTHER | {GAINS[1]: 0.0}, "faithful with zero only"),
        ({"zero_share": 0.25}, "faithful; 25% of the maps are zero"),
        ({"residual_median": 0.5}, "faithful; sums are off by 50%"),
        (dict.fromkeys(GAINS, 0.0), "no more faithful than chance"),
        ({GAINS[1]: 0.0}, "faithful with zero only"),
        ({GAINS[2]: -1.0}, "faithful with controls only"),
        ({GAINS[2]: 0.0, GAINS[3]: 0.0}, "no more faithful than chance"),
        ({GAINS[0]: -1.0, GAINS[2]: -1.0}, "faithful with controls only; worse than chance with zero"),
        (dict.fromkeys(GAINS, -1.0), "worse than chance with zero and controls"),
    ],
)
def test_verdict(changes, expected):
    """Every value with an interval of 0.02 to either side, which must not hold the bound."""
    row = GOOD | changes
    assert (
        verdict(
            row
            | {f"{name}_low": value - 0.02 for name, value in row.items()}
            | {f"{name}_high": value + 0.02 for name, value in row.items()}
        )
        == expected
    )


def test_an_interval_decides():
    row = GOOD | {"weights_rho": 0.95}
    wide = {
        f"{name}_{end}": value + step
        for name, value in row.items()
        for end, step in (("low", -2), ("high", 2))
    }
    assert verdict(row | wide) == "no more faithful than chance"


def test_ways_and_fillings_make_the_gains():
    from faithfulness import WAYS

    pairs = itertools.product(WAYS, sanity_scores.FILLINGS)
    assert {f"{way}_gain_{filling}" for way, filling in pairs} == set(GAINS)
