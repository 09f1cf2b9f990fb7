"""classifier_scores.py: scores against their definitions, and the bootstrap over subjects."""

import warnings
from collections.abc import Iterable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

import classifier_scores
from classifier_scores import CALIBRATED, DIFFERENCE, ENSEMBLE, MEAN, PROBABILITY_SCORES, SCORES

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


WEIGHTED = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.6, 1.0]), st.integers(0, 3)),
    min_size=2,
)


@settings(max_examples=40, deadline=None)
@given(WEIGHTED, st.integers(0, 2**20))
def test_auc_is_scikit_learns(triples, seed):
    """Ties, weights and zeros among them; and scores that are no probabilities."""
    label, prob_1, weight = (
        np.array(column) for column in zip(*[(1, 0.5, 1), (0, 0.3, 2), *triples], strict=True)
    )
    for values in (prob_1, np.random.default_rng(seed).normal(0, 100, len(label)).round()):
        expected = roc_auc_score(label, values, sample_weight=weight)
        # areas of at most 1, summed up in another order
        assert classifier_scores._auc(label, values, weight) == pytest.approx(expected, abs=1e-12)
        assert classifier_scores.scores(label, values, label, weight)["auc"] == pytest.approx(
            expected, abs=1e-12
        )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(1e-12, 1 - 1e-12), st.integers(0, 3)), min_size=1))
def test_probability_scores_are_scikit_learns(triples):
    """Of one label, too. Far enough from 0 and 1, where scikit-learn keeps another distance."""
    label, prob_1, weight = (np.array(column) for column in zip(*triples, strict=True))
    weight[0] += 1
    for weights in (weight, None):
        found = classifier_scores.probability_scores(label, prob_1, weights)
        brier = brier_score_loss(label, prob_1, sample_weight=weights, pos_label=1)
        expected = {"brier": brier, "log_loss": log_loss(label, prob_1, sample_weight=weights, labels=[0, 1])}
        assert found == pytest.approx(
            expected, rel=1e-12, abs=1e-15
        )  # the same numbers, summed in another order


def test_probabilities_of_zero_and_one():
    """Right ones cost nothing; wrong ones as much as if they were 1e-15 away."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = classifier_scores.probability_scores(np.array([0, 1]), np.array([0.0, 1.0]))
        wrong = classifier_scores.probability_scores(np.array([0, 1, 1, 0]), np.array([1.0, 0.0, 1.0, 0.0]))
        near = classifier_scores.probability_scores(np.array([0, 1]), np.array([0.5, 1e-15]))
    assert right == pytest.approx({"brier": 0, "log_loss": 0}, abs=2e-15)
    # 1 - 1e-15 is a multiple of 1.1e-16, off by up to 12 % of 1e-15: by 0.12 in the loss of one scan of four
    assert wrong == pytest.approx({"brier": 0.5, "log_loss": -np.log(1e-15) / 2}, abs=0.12 / 4)
    assert near["log_loss"] == pytest.approx((np.log(2) - np.log(1e-15)) / 2)


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


def test_calibrated_probabilities_add_columns_and_change_none():
    table = noisy(40).assign(fold=[0, 0, *[1, 2] * 19], subject=[f"s{i // 2 % 19}" for i in range(40)])
    after = table["prob_1"] ** 2
    plain = classifier_scores.metrics_table(table, seed=3)
    found = classifier_scores.metrics_table(table.assign(**{CALIBRATED: after}), seed=3)
    names = [*PROBABILITY_SCORES, *(f"{name}_calibrated" for name in PROBABILITY_SCORES)]
    bounds = [f"{name}_{end}" for name in names for end in ("low", "high")]
    assert list(found.columns) == [*plain.columns, *names, *bounds]
    pd.testing.assert_frame_equal(found[plain.columns], plain, check_exact=True)
    assert found[bounds][:3].isna().all(axis=None)
    parts = [table["fold"] == fold for fold in range(3)] + [table["fold"] >= 0]
    for row, part in zip(found.to_dict("records"), parts, strict=True):
        for values, kind in ((table["prob_1"], ""), (after, "_calibrated")):
            label, prob_1 = table["label"][part], values[part]
            expected = brier_score_loss(label, prob_1, pos_label=1), log_loss(label, prob_1, labels=[0, 1])
            assert (row["brier" + kind], row["log_loss" + kind]) == pytest.approx(expected)
    draws = drawn_weights(table["subject"].tolist(), seed=3)
    for values, name in ((table["prob_1"], "brier"), (after, "brier_calibrated")):
        drawn = [brier_score_loss(table["label"], values, sample_weight=weight) for weight in draws]
        ends = found[[f"{name}_low", f"{name}_high"]].iloc[-1].tolist()
        assert ends == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist())


# The intervals -----------------------------------------------------------------------------------


def drawn_weights(subjects: list[str], seed: int) -> list[np.ndarray]:
    """How often each scan counts in each bootstrap draw."""
    found: list[np.ndarray] = []

    def keep(weight: np.ndarray) -> dict[str, float]:
        found.append(weight)
        return {"": 0.0}

    classifier_scores.intervals(keep, subjects, seed)
    return found


def test_intervals_are_of_the_finite_scores_of_each_draw():
    """Subjects are drawn as often as there are subjects; each name has its own percentiles."""
    subjects = ["a", "b", "a", "c", "a"]
    draws = drawn_weights(subjects, seed=1)
    assert len(draws) == classifier_scores.DRAWS
    counts = np.array(draws)
    assert (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, 0] == counts[:, 4]).all()
    assert (counts[:, [0, 1, 3]].sum(axis=1) == 3).all()

    def score(weight: np.ndarray) -> dict[str, float]:
        return {"b": float(weight[1]), "c": float(weight[3]) if weight[3] else np.nan, "none": np.nan}

    found = classifier_scores.intervals(score, subjects, seed=1)
    b, c = counts[:, 1], counts[:, 3][counts[:, 3] > 0]
    assert 0 < len(c) < len(b)
    expected = [*np.percentile(b, [2.5, 97.5]), *np.percentile(c, [2.5, 97.5]), np.nan, np.nan]
    assert list(found) == [f"{name}_{end}" for name in ("b", "c", "none") for end in ("low", "high")]
    assert list(found.values()) == pytest.approx(expected, nan_ok=True)


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


# The ensemble ------------------------------------------------------------------------------------


def by_definition(label: np.ndarray, prob_1: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """All scores of the scans that are predicted, each repeated; NaN where a label is missing."""
    times = np.where(np.isnan(prob_1), 0, weight)
    label, prob_1 = np.repeat(label, times), np.repeat(prob_1, times)
    ones, zeros = prob_1[label == 1], prob_1[label == 0]
    found = dict.fromkeys([*SCORES, *PROBABILITY_SCORES], np.nan)
    if not len(label):
        return found
    if len(ones):
        found["sensitivity"] = (ones > 0.5).mean()
    if len(zeros):
        found["specificity"] = (zeros <= 0.5).mean()
    if len(ones) and len(zeros):
        found["auc"] = ((ones[:, None] > zeros).mean() + (ones[:, None] >= zeros).mean()) / 2
    right = np.concatenate([ones, 1 - zeros])  # probabilities of what is true
    found["balanced_accuracy"] = (found["sensitivity"] + found["specificity"]) / 2
    found["accuracy"] = ((ones > 0.5).sum() + (zeros <= 0.5).sum()) / len(label)
    return found | {"brier": ((1 - right) ** 2).mean(), "log_loss": -np.log(right).mean()}


def ensemble_rows(
    label: np.ndarray, prob_1: np.ndarray, members: np.ndarray, weight: np.ndarray
) -> dict[str | int, dict[str, float]]:
    """The scores of every row of the table; a mean is of the networks that have the score."""
    rows: dict[str | int, dict[str, float]] = {ENSEMBLE: by_definition(label, prob_1, weight)}
    own = [by_definition(label, members[:, i], weight) for i in range(members.shape[1])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mean of nothing
        rows[MEAN] = {name: float(np.nanmean([row[name] for row in own])) for name in own[0]}
    rows[DIFFERENCE] = {name: rows[ENSEMBLE][name] - rows[MEAN][name] for name in own[0]}
    return rows | dict(enumerate(own))


def ensemble(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Twenty-four scans of fifteen subjects: labels, the mean probability, three networks', subjects."""
    random = np.random.default_rng(0)
    label = np.arange(24) % 2 if kind != "one label" else np.ones(24, int)
    members = np.clip(0.3 * label[:, None] + 0.7 * random.random((24, 3)), 0.01, 0.99).round(2)
    if kind != "whole":
        members[3:9, 0] = np.nan
        members[5:, 1] = np.nan
    if kind == "an idle network":
        members[:, 2] = np.nan
        members[0, [0, 1]] = np.nan
        members[0, 2] = 0.4  # but for one scan, of one label
    return (
        label,
        np.nanmean(np.where(np.isnan(members), 0.4, members), axis=1),
        members,
        [f"s{i % 15}" for i in range(24)],
    )


@pytest.mark.parametrize("kind", ["whole", "parts", "one label", "an idle network"])
def test_ensemble_is_scored_as_its_networks_are(kind):
    """Every row, and its interval from the draws that all rows share."""
    label, prob_1, members, subjects = ensemble(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classifier_scores.ensemble_table(label, prob_1, members, subjects, seed=2)
    names = [*SCORES, *PROBABILITY_SCORES]
    bounds = [f"{name}_{end}" for name in names for end in ("low", "high")]
    assert list(found.columns) == ["network", "n", *names, *bounds]
    assert found["network"].tolist() == [ENSEMBLE, MEAN, DIFFERENCE, 0, 1, 2]
    predicted = [int((~np.isnan(column)).sum()) for column in members.T]
    assert found["n"].tolist() == pytest.approx([24, np.nan, np.nan, *predicted], nan_ok=True)
    whole = ensemble_rows(label, prob_1, members, np.ones(24, int))
    draws = [ensemble_rows(label, prob_1, members, weight) for weight in drawn_weights(subjects, seed=2)]
    for row in found.to_dict("records"):
        for name in names:
            own = [draw[row["network"]][name] for draw in draws]
            ends = np.nanpercentile(own, [2.5, 97.5]) if np.isfinite(own).any() else [np.nan, np.nan]
            values = [row[name], row[f"{name}_low"], row[f"{name}_high"]]
            assert values == pytest.approx([whole[row["network"]][name], *ends], nan_ok=True)
    absent = found["auc"].isna().tolist()
    assert absent == [kind == "one label"] * 5 + [kind in ("one label", "an idle network")]


def test_network_that_predicts_nothing_has_no_scores():
    label, prob_1, members, subjects = ensemble("whole")
    nothing = np.column_stack([members, np.full(24, np.nan)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classifier_scores.ensemble_table(label, prob_1, nothing, subjects, seed=2)
    last = found.iloc[-1]
    assert (last["network"], last["n"]) == (3, 0)
    assert last.drop(["network", "n"]).isna().all()
    pd.testing.assert_frame_equal(
        found[:-1],
        classifier_scores.ensemble_table(label, prob_1, members, subjects, seed=2),
        check_dtype=False,
    )


def test_ensemble_of_one_network_differs_from_it_in_no_draw():
    """Draws of their own would give the difference an interval as wide as those of the two."""
    label, _, members, subjects = ensemble("whole")
    found = classifier_scores.ensemble_table(label, members[:, 0], members[:, :1], subjects, seed=0)
    found = found.set_index("network")
    for name in (*SCORES, *PROBABILITY_SCORES):
        ends = [f"{name}_low", name, f"{name}_high"]
        assert found.loc[DIFFERENCE, ends].tolist() == [0, 0, 0]
        assert found.loc[ENSEMBLE, ends[0]] < found.loc[ENSEMBLE, ends[2]]
