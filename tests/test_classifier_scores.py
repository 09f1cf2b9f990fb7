"""classifier_scores.py: scores against their definitions, and the bootstrap over subjects."""

import warnings
from collections.abc import Iterable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

import classifier_scores

COUNTS = ["tp", "tn", "fp", "fn"]


def predictions(label: list[int], prob_1: list[float], subject: Iterable[str] = ()) -> pd.DataFrame:
    """A table as train_cv.py makes it; predicted is prob_1 > 0.5."""
    table = pd.DataFrame({"fold": np.arange(len(label)) % 2, "label": label, "prob_1": prob_1})
    names = [f"s{i}" for i in table.index]
    table["predicted"] = (table["prob_1"] > 0.5).astype(int)
    return table.assign(path=names, subject=list(subject) or names)


def score(table: pd.DataFrame) -> dict[str, float]:
    return classifier_scores.scores(*(table[name].to_numpy() for name in ("label", "prob_1", "predicted")))


def pooled(table: pd.DataFrame) -> pd.Series:
    """The last row of a table's metrics."""
    return classifier_scores.metrics_table(table, seed=0).iloc[-1]


def noisy(n: int) -> pd.DataFrame:
    """Predictions that are often right."""
    label = np.arange(n) // 2 % 2
    return predictions(label.tolist(), (0.3 * label + 0.7 * np.random.default_rng(0).random(n)).tolist())


# Scores ------------------------------------------------------------------------------------------


def test_scores_by_hand():
    # seven patients, of whom five are found; three controls, of whom one is taken for a patient
    table = predictions([1, 1, 1, 1, 1, 1, 1, 0, 0, 0], [0.9, 0.8, 0.7, 0.7, 0.6, 0.4, 0.2, 0.1, 0.3, 0.65])
    # of 21 pairs those with 0.65 lose three (0.6, 0.4, 0.2) and those with 0.3 lose one (0.2)
    assert score(table) == pytest.approx({
        "n": 10, "tp": 5, "fn": 2, "tn": 2, "fp": 1, "accuracy": 7 / 10, "sensitivity": 5 / 7,
        "specificity": 2 / 3, "balanced_accuracy": (5 / 7 + 2 / 3) / 2, "auc": 17 / 21,
    })  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.9])), min_size=1))
def test_scores_by_definition(pairs):
    label, prob = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(predictions(label, prob))
    patients, controls = ([p for y, p in pairs if y == own] for own in (1, 0))
    tp, tn = sum(p > 0.5 for p in patients), sum(p <= 0.5 for p in controls)
    # the chance that a patient scores above a control, ties counting half
    wins = [float(p > c) + 0.5 * float(p == c) for p in patients for c in controls]
    sensitivity = tp / len(patients) if patients else np.nan
    specificity = tn / len(controls) if controls else np.nan
    assert [found[name] for name in COUNTS] == [tp, tn, len(controls) - tn, len(patients) - tp]
    expected = {
        "n": len(pairs), "accuracy": (tp + tn) / len(pairs), "sensitivity": sensitivity,
        "specificity": specificity, "balanced_accuracy": (sensitivity + specificity) / 2,
        "auc": np.mean(wins) if wins else np.nan,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True)


# The table ---------------------------------------------------------------------------------------


def test_table_has_a_row_per_fold_and_one_pooled():
    """Forty scans of nineteen subjects; fold 0 has one label."""
    table = noisy(40).assign(fold=[0, 0, *[1, 2] * 19], subject=[f"s{i // 2 % 19}" for i in range(40)])
    found = classifier_scores.metrics_table(table, seed=0)
    bounds = [f"{name}_{end}" for name in classifier_scores.SCORES for end in ("low", "high")]
    assert list(found.columns) == ["fold", "n", *classifier_scores.SCORES, *COUNTS, *bounds, "subjects"]
    assert list(found["fold"]) == [0, 1, 2, "pooled"]
    parts = [table[table["fold"] == fold] for fold in range(3)] + [table]
    for row, part in zip(found.to_dict("records"), parts, strict=True):
        np.testing.assert_equal({name: row[name] for name in score(part)}, score(part))  # NaN, too
        assert row["subjects"] == len(set(part["subject"]))
    assert found["auc"].isna().tolist() == [True, False, False, False]
    assert found[bounds][:3].isna().all().all()
    whole, line = found.iloc[-1], classifier_scores.summary(found)
    assert line.startswith("tests of all folds (40 scans of 19 subjects): ")
    assert "\n" not in line
    for name in classifier_scores.SCORES:
        value, low, high = (whole[name + end] for end in ("", "_low", "_high"))
        assert 0 <= low < value < high <= 1
        assert f"{name.replace('_', ' ')} {value:.3f} [{low:.3f}, {high:.3f}]" in line


# The intervals -----------------------------------------------------------------------------------


def test_intervals_reproduce_by_seed():
    table = noisy(30)
    first = classifier_scores.metrics_table(table, seed=4)
    np.random.seed(0)
    pd.testing.assert_frame_equal(classifier_scores.metrics_table(table, seed=4), first, check_exact=True)
    assert not classifier_scores.metrics_table(table, seed=5).equals(first)


def test_interval_of_accuracy_is_the_binomial_one(monkeypatch):
    monkeypatch.setattr(classifier_scores, "DRAWS", 1000)
    # resampling n independent subjects of whom a share p is right draws Binomial(n, p) right ones
    n, right = 40, 30
    table = predictions([0, 1] * 20, ([0.1, 0.9] * 15) + ([0.9, 0.1] * 5))
    found = pooled(table)
    expected = binom.ppf([0.025, 0.975], n, right / n) / n
    # a percentile of 1000 draws has a standard error of 0.5 %; one step of 1/40 is several of them
    assert np.allclose([found["accuracy_low"], found["accuracy_high"]], expected, rtol=0, atol=1 / n + 1e-9)


def test_bootstrap_draws_subjects_not_scans():
    # One subject, always right, with one scan; one, always wrong, with nine. Drawing subjects gives
    # accuracies 1, 0.1 and 0 with chances 1/4, 1/2, 1/4; drawing ten scans gives 0.1 on average and
    # all right with a chance of 1e-10.
    table = predictions([1] + [0] * 9, [0.9] * 10, subject=["once"] + ["often"] * 9)
    found = pooled(table)
    assert (found["accuracy_low"], found["accuracy_high"]) == (0, 1)


def test_a_subject_counts_as_often_as_it_is_drawn():
    # equal subjects: every draw scores alike, whichever are drawn, unless repeats are lost
    table = predictions([1, 1, 1, 1] * 5, [0.9, 0.9, 0.9, 0.1] * 5, subject=[f"s{i // 4}" for i in range(20)])
    assert set(pooled(table)[["accuracy_low", "accuracy", "accuracy_high"]]) == {0.75}


def test_scores_of_draws_with_one_label_are_left_out():
    # with two subjects, half of the draws hold one label; AUC is 1 in all the others
    found = pooled(predictions([1, 0], [0.9, 0.1]))
    assert (found["auc_low"], found["auc_high"]) == (1, 1)
