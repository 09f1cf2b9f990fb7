"""classifier_scores.py: scores against their definitions, and the bootstrap over subjects."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

import classifier_scores

COUNTS = ["tp", "tn", "fp", "fn"]


def predictions(
    label: list[int], prob_1: list[float], fold: list[int] | None = None, subject: list[str] | None = None
) -> pd.DataFrame:
    """A table as train_cv.py makes it; predicted is prob_1 > 0.5."""
    n = len(label)
    return pd.DataFrame(
        {
            "fold": fold or [i % 2 for i in range(n)],
            "path": [f"{i}.nii" for i in range(n)],
            "label": label,
            "subject": subject or [f"s{i}" for i in range(n)],
            "prob_1": prob_1,
            "predicted": [int(p > 0.5) for p in prob_1],
        }
    )


def score(table: pd.DataFrame) -> dict[str, float]:
    return classifier_scores.scores(*(table[name].to_numpy() for name in ("label", "prob_1", "predicted")))


def noisy(n: int, seed: int = 0) -> pd.DataFrame:
    """Predictions that are often right."""
    random = np.random.default_rng(seed)
    label = np.arange(n) // 2 % 2
    return predictions(label.tolist(), np.clip(0.3 * label + 0.7 * random.random(n), 0, 1).tolist())


@pytest.fixture
def few_draws(monkeypatch):
    """Two hundred bootstrap draws in place of a thousand, for speed."""
    monkeypatch.setattr(classifier_scores, "DRAWS", 200)


# Scores ------------------------------------------------------------------------------------------


def test_scores_by_hand():
    # seven patients, of whom five are found; three controls, of whom one is taken for a patient
    table = predictions([1, 1, 1, 1, 1, 1, 1, 0, 0, 0], [0.9, 0.8, 0.7, 0.7, 0.6, 0.4, 0.2, 0.1, 0.3, 0.65])
    found = score(table)
    assert (found["n"], found["tp"], found["fn"], found["tn"], found["fp"]) == (10, 5, 2, 2, 1)
    assert found["accuracy"] == pytest.approx(7 / 10)
    assert found["sensitivity"] == pytest.approx(5 / 7)
    assert found["specificity"] == pytest.approx(2 / 3)
    assert found["balanced_accuracy"] == pytest.approx((5 / 7 + 2 / 3) / 2)
    # of 21 pairs those with 0.65 lose three (0.6, 0.4, 0.2) and those with 0.3 lose one (0.2)
    assert found["auc"] == pytest.approx(17 / 21)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.9])), min_size=2))
def test_scores_by_definition(pairs):
    label, prob = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = score(predictions(label, prob))
    patients = [p for y, p in pairs if y == 1]
    controls = [p for y, p in pairs if y == 0]
    tp, tn = sum(p > 0.5 for p in patients), sum(p <= 0.5 for p in controls)
    assert [found[name] for name in COUNTS] == [tp, tn, len(controls) - tn, len(patients) - tp]
    assert found["accuracy"] == pytest.approx((tp + tn) / len(pairs))
    if patients:
        assert found["sensitivity"] == pytest.approx(tp / len(patients))
    if controls:
        assert found["specificity"] == pytest.approx(tn / len(controls))
    if patients and controls:
        # the chance that a patient scores above a control, ties counting half
        wins = [float(p > c) + 0.5 * float(p == c) for p in patients for c in controls]
        assert found["auc"] == pytest.approx(np.mean(wins))
        assert found["balanced_accuracy"] == pytest.approx((found["sensitivity"] + found["specificity"]) / 2)


@pytest.mark.parametrize(
    ("label", "known", "unknown"), [(1, "sensitivity", "specificity"), (0, "specificity", "sensitivity")]
)
def test_one_label_leaves_what_needs_both_undefined(label, known, unknown):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(predictions([label] * 4, [0.2, 0.6, 0.7, 0.9]))
    assert found["accuracy"] == found[known] == (0.75 if label else 0.25)
    assert all(np.isnan(found[name]) for name in ("auc", "balanced_accuracy", unknown))
    assert sum(found[name] for name in COUNTS) == 4


# The table ---------------------------------------------------------------------------------------


def test_table_has_a_row_per_fold_and_one_pooled(few_draws):
    table = noisy(40).assign(fold=[i % 3 for i in range(40)])
    found = classifier_scores.metrics_table(table, seed=0)
    bounds = [f"{name}_{end}" for name in classifier_scores.SCORES for end in ("low", "high")]
    assert list(found.columns) == ["fold", "n", *classifier_scores.SCORES, *COUNTS, *bounds, "subjects"]
    assert list(found["fold"]) == [0, 1, 2, "pooled"]
    parts = [table[table["fold"] == fold] for fold in range(3)] + [table]
    for row, part in zip(found.to_dict("records"), parts, strict=True):
        assert {name: row[name] for name in score(part)} == score(part)
    assert found[bounds][:3].isna().all().all()
    assert found[bounds][3:].notna().all().all()


def test_fold_of_one_label_is_nan_but_pooled_is_not(few_draws):
    table = predictions([1, 1, 1, 0, 0, 0], [0.9, 0.2, 0.8, 0.4, 0.6, 0.1], fold=[0, 0, 0, 1, 1, 1])
    found = classifier_scores.metrics_table(table, seed=0).set_index("fold")
    assert found["auc"].isna().tolist() == [True, True, False]
    assert found["sensitivity"].isna().tolist() == [False, True, False]
    assert found.loc["pooled", classifier_scores.SCORES].notna().all()


# The intervals -----------------------------------------------------------------------------------


def test_intervals_bracket_the_scores_and_stay_within_0_and_1(few_draws):
    pooled = classifier_scores.metrics_table(noisy(60), seed=1).iloc[-1]
    for name in classifier_scores.SCORES:
        assert 0 <= pooled[f"{name}_low"] < pooled[name] < pooled[f"{name}_high"] <= 1


def test_intervals_reproduce_by_seed(few_draws):
    table = noisy(30)
    first = classifier_scores.metrics_table(table, seed=4)
    np.random.seed(0)
    pd.testing.assert_frame_equal(classifier_scores.metrics_table(table, seed=4), first, check_exact=True)
    assert not classifier_scores.metrics_table(table, seed=5).equals(first)


def test_interval_of_accuracy_is_the_binomial_one():
    # resampling n independent subjects of whom a share p is right draws Binomial(n, p) right ones
    n, right = 40, 30
    table = predictions([0, 1] * 20, ([0.1, 0.9] * 15) + ([0.9, 0.1] * 5))
    pooled = classifier_scores.metrics_table(table, seed=0).iloc[-1]
    expected = binom.ppf([0.025, 0.975], n, right / n) / n
    # a percentile of 1000 draws has a standard error of 0.5 %; one step of 1/40 is several of them
    assert np.allclose([pooled["accuracy_low"], pooled["accuracy_high"]], expected, rtol=0, atol=1 / n + 1e-9)


def test_bootstrap_draws_subjects_not_scans(few_draws):
    # One subject, always right, with one scan; one, always wrong, with nine. Drawing subjects gives
    # accuracies 1, 0.1 and 0 with chances 1/4, 1/2, 1/4; drawing ten scans gives 0.1 on average and
    # all right with a chance of 1e-10.
    table = predictions([1] + [0] * 9, [0.9] * 10, subject=["once"] + ["often"] * 9)
    pooled = classifier_scores.metrics_table(table, seed=0).iloc[-1]
    assert (pooled["accuracy_low"], pooled["accuracy_high"]) == (0, 1)


def test_a_subject_counts_as_often_as_it_is_drawn(few_draws):
    # equal subjects: every draw scores alike, whichever are drawn, unless repeats are lost
    table = predictions([1, 1, 1, 1] * 5, [0.9, 0.9, 0.9, 0.1] * 5, subject=[f"s{i // 4}" for i in range(20)])
    pooled = classifier_scores.metrics_table(table, seed=0).iloc[-1]
    assert (pooled["accuracy_low"], pooled["accuracy"], pooled["accuracy_high"]) == (0.75, 0.75, 0.75)


def test_scores_of_draws_with_one_label_are_left_out(few_draws):
    # with two subjects, half of the draws hold one label; AUC is 1 in all the others
    pooled = classifier_scores.metrics_table(predictions([1, 0], [0.9, 0.1]), seed=0).iloc[-1]
    assert (pooled["auc_low"], pooled["auc_high"]) == (1, 1)


def test_scans_and_subjects_are_counted(few_draws):
    """Twelve scans of five people, one of whom has scans in no other fold than their own."""
    table = noisy(12).assign(fold=[0] * 7 + [1] * 5, subject=list("aaaabbb" + "ccdde"))
    found = classifier_scores.metrics_table(table, seed=0)
    assert found["n"].tolist() == [7, 5, 12]
    assert found["subjects"].tolist() == [2, 3, 5]
    assert classifier_scores.summary(found).startswith("tests of all folds (12 scans of 5 subjects): ")


def test_summary_names_every_score(few_draws):
    table = classifier_scores.metrics_table(noisy(20), seed=0)
    line = classifier_scores.summary(table)
    assert "\n" not in line
    assert "20 scans of 20 subjects" in line
    for name in classifier_scores.SCORES:
        values = [table.iloc[-1][name + end] for end in ("", "_low", "_high")]
        assert "{} {:.3f} [{:.3f}, {:.3f}]".format(name.replace("_", " "), *values) in line
