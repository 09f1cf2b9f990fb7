"""How well a classifier does: scores per fold, and pooled over folds with bootstrap intervals."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import xlogy

import utils

PREDICTIONS = ["fold", "path", "label", "subject", "prob_1", "predicted"]
CALIBRATED = "prob_1_calibrated"  # a column that predictions may have beside
SCORES = ["accuracy", "balanced_accuracy", "auc", "sensitivity", "specificity"]
PROBABILITY_SCORES = ["brier", "log_loss"]  # of how far probabilities can be believed
DRAWS = 1000
ENSEMBLE, MEAN, DIFFERENCE = "ensemble", "mean of networks", "difference"  # rows of `ensemble_table`


def scores(
    label: np.ndarray, prob_1: np.ndarray, predicted: np.ndarray, weight: np.ndarray | None = None
) -> dict[str, float]:
    """Score predictions of label 1.

    Args:
        label: (N,) int, 0 or 1.
        prob_1: (N,) float, any score that rises with the probability of label 1.
        predicted: (N,) int, 0 or 1.
        weight: (N,) int, how often each prediction counts; once by default.

    Returns:
        n, the scores in [0, 1], and the counts tp, tn, fp, fn. Where only one label occurs, scores
        that need both are NaN.
    """
    weight = np.ones(len(label), dtype=int) if weight is None else weight
    tn, fp, fn, tp = (
        int(weight[(label == truth) & (predicted == guess)].sum()) for truth in (0, 1) for guess in (0, 1)
    )
    both = tn + fp > 0 and fn + tp > 0
    sensitivity = tp / (tp + fn) if tp + fn else np.nan
    specificity = tn / (tn + fp) if tn + fp else np.nan
    return {
        "n": tn + fp + fn + tp,
        "accuracy": (tp + tn) / (tn + fp + fn + tp),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "auc": _auc(label, prob_1, weight) if both else np.nan,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "tp": tp,
        "tn": tn,
        "fp": fp,
        "fn": fn,
    }


def probability_scores(
    label: np.ndarray, prob_1: np.ndarray, weight: np.ndarray | None = None
) -> dict[str, float]:
    """Score probabilities of label 1, the smaller the better.

    Args:
        label: (N,) int, 0 or 1.
        prob_1: (N,) float in [0, 1].
        weight: (N,) int, how often each counts; once by default.

    Returns:
        brier, the mean squared difference (Brier 1950), in [0, 1]; and log_loss, the cross-entropy in nats,
        of probabilities that are at least 1e-15 away from 0 and 1.
    """
    inside = np.clip(prob_1, 1e-15, 1 - 1e-15)
    brier = np.average((prob_1 - label) ** 2, weights=weight)
    log_loss = -np.average(xlogy(label, inside) + xlogy(1 - label, 1 - inside), weights=weight)
    return {"brier": float(brier), "log_loss": float(log_loss)}


def intervals(
    score: Callable[[np.ndarray], Mapping[str, float]], subjects: Sequence[str], seed: int
) -> dict[str, float]:
    """95 % intervals of scores: percentiles of 1000 bootstrap draws of subjects (Efron and Tibshirani 1993).

    Args:
        score: scores, given how often each scan counts, int (N,).
        subjects: whose each scan is, (N,).
        seed: of the draws.

    Returns:
        The ends by the scores' names, *_low and *_high; draws where a score is NaN are left out.
    """
    subject, names = pd.factorize(np.asarray(subjects, dtype=object))  # (N,), each scan's subject by number
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in utils.progress(range(DRAWS), desc="bootstrap", leave=False):
        times = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))
        drawn.append(score(times[subject]))
    found = {}
    for name in drawn[0]:
        values = [draw[name] for draw in drawn if np.isfinite(draw[name])] or [np.nan]
        found[f"{name}_low"], found[f"{name}_high"] = np.percentile(values, [2.5, 97.5])
    return found


def metrics_table(predictions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Score each fold, then all folds pooled, with 95 % `intervals`.

    Args:
        predictions: columns as PREDICTIONS, and perhaps CALIBRATED.
        seed: of the intervals' draws.

    Returns:
        One row per fold and one `pooled`; columns fold, n (scans), SCORES, tp, tn, fp, fn, and *_low,
        *_high, which only the pooled row fills, and subjects, how many people the scans are of. Where there
        are calibrated probabilities, PROBABILITY_SCORES of both kinds follow.
    """
    folds = predictions.groupby("fold", sort=True)
    rows = [{"fold": fold} | _scores(part) for fold, part in folds]

    def ends(score: Callable[..., dict[str, float]], names: Sequence[str]) -> dict[str, float]:
        def chosen(weight: np.ndarray) -> dict[str, float]:
            found = score(predictions, weight)
            return {name: found[name] for name in names}

        return intervals(chosen, predictions["subject"].tolist(), seed)

    pooled = {"fold": "pooled"} | _scores(predictions) | ends(_scores, SCORES)
    people = folds["subject"].nunique().tolist()
    table = pd.DataFrame([*rows, pooled]).assign(subjects=[*people, predictions["subject"].nunique()])
    if CALIBRATED not in predictions:
        return table
    of_all = _both(predictions)
    probable = [*(_both(part) for _, part in folds), of_all | ends(_both, list(of_all))]
    return pd.concat([table, pd.DataFrame(probable)], axis=1)


def ensemble_table(
    label: np.ndarray, prob_1: np.ndarray, members: np.ndarray, subjects: Sequence[str], seed: int
) -> pd.DataFrame:
    """Score an ensemble of networks, each of them, the mean of their scores, and the ensemble less that mean.

    Args:
        label: (N,) int, 0 or 1.
        prob_1: (N,), the ensemble's probability of label 1.
        members: (N, k), each network's; NaN for scans that it does not predict.
        subjects: whose each scan is, (N,).
        seed: of the intervals' draws.

    Returns:
        Columns network (ENSEMBLE, MEAN, DIFFERENCE, 0 ... k-1), n, SCORES, PROBABILITY_SCORES, and *_low,
        *_high, 95 % `intervals`, the same draws for all rows.
    """
    names = [*SCORES, *PROBABILITY_SCORES]

    def score(weight: np.ndarray) -> dict[str, float]:
        found: dict[str, float] = {}
        for network, values in ((ENSEMBLE, prob_1), *enumerate(members.T)):
            known = np.isfinite(values) & (weight > 0)
            parts = label[known], values[known]
            row = dict.fromkeys(names, np.nan)
            if known.any():
                row = scores(*parts, (values[known] > 0.5).astype(int), weight[known])
                row |= probability_scores(*parts, weight[known])
            found |= {f"{network} {name}": row[name] for name in names}
        for name in names:
            own = [found[f"{network} {name}"] for network in range(members.shape[1])]
            own = [value for value in own if np.isfinite(value)]
            found[f"{MEAN} {name}"] = float(np.mean(own)) if own else np.nan
            found[f"{DIFFERENCE} {name}"] = found[f"{ENSEMBLE} {name}"] - found[f"{MEAN} {name}"]
        return found

    found = score(np.ones(len(label), dtype=int)) | intervals(score, subjects, seed)
    counts = {ENSEMBLE: len(label)} | dict(enumerate(np.isfinite(members).sum(axis=0).tolist()))
    ends = [f"{name}{end}" for name in names for end in ("_low", "_high")]
    rows = []
    for network in (ENSEMBLE, MEAN, DIFFERENCE, *range(members.shape[1])):
        values = {name: found[f"{network} {name}"] for name in [*names, *ends]}
        rows.append({"network": network, "n": counts.get(network, np.nan), **values})
    return pd.DataFrame(rows)


def summary(metrics: pd.DataFrame) -> str:
    """The pooled scores as one line."""
    pooled = metrics.iloc[-1].to_dict()
    parts = [f"{name.replace('_', ' ')} {with_interval(pooled, name)}" for name in SCORES]
    counts = f"{pooled['n']:.0f} scans of {pooled['subjects']:.0f} subjects"
    return f"tests of all folds ({counts}): " + ", ".join(parts)


def with_interval(row: Mapping[Any, Any], name: str) -> str:
    """A score and its interval, as people read them."""
    return f"{row[name]:.3f} [{row[name + '_low']:.3f}, {row[name + '_high']:.3f}]"


def _auc(label: np.ndarray, prob_1: np.ndarray, weight: np.ndarray) -> float:
    """The area under the ROC curve: the chance that a scan of label 1 scores above one of label 0, ties half.

    scikit-learn's checks of its arguments take far longer than this, and the bootstrap asks a thousand times.
    """
    values, place = np.unique(prob_1, return_inverse=True)
    ones, zeros = (np.bincount(place, weight * (label == own), len(values)) for own in (1, 0))
    below = np.cumsum(zeros) - zeros / 2
    return float(ones @ below / (ones.sum() * zeros.sum()))


def _scores(predictions: pd.DataFrame, weight: np.ndarray | None = None) -> dict[str, float]:
    label, prob_1, predicted = (predictions[column].to_numpy() for column in ("label", "prob_1", "predicted"))
    return scores(label, prob_1, predicted, weight)


def _both(predictions: pd.DataFrame, weight: np.ndarray | None = None) -> dict[str, float]:
    """The scores of the probabilities as they are, and calibrated."""
    label = predictions["label"].to_numpy()
    found = probability_scores(label, predictions["prob_1"].to_numpy(), weight)
    calibrated = probability_scores(label, predictions[CALIBRATED].to_numpy(), weight)
    return found | {f"{name}_calibrated": value for name, value in calibrated.items()}
