"""How well a classifier does: scores per fold, and pooled over folds with bootstrap intervals."""

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

import utils

PREDICTIONS = ["fold", "path", "label", "subject", "prob_1", "predicted"]
SCORES = ["accuracy", "balanced_accuracy", "auc", "sensitivity", "specificity"]
DRAWS = 1000


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
        "auc": float(roc_auc_score(label, prob_1, sample_weight=weight)) if both else np.nan,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "tp": tp,
        "tn": tn,
        "fp": fp,
        "fn": fn,
    }


def metrics_table(predictions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Score each fold, then all folds pooled, with 95 % intervals.

    The intervals are percentiles of 1000 bootstrap draws of subjects (Efron and Tibshirani 1993).

    Args:
        predictions: columns as PREDICTIONS.
        seed: of the draws.

    Returns:
        One row per fold and one `pooled`; columns fold, n (scans), SCORES, tp, tn, fp, fn, and *_low,
        *_high, which only the pooled row fills, and subjects, how many people the scans are of.
    """
    rows = [{"fold": fold} | scores(*_columns(part)) for fold, part in predictions.groupby("fold", sort=True)]
    columns = _columns(predictions)
    pooled = {"fold": "pooled"} | scores(*columns)
    subject, subjects = pd.factorize(predictions["subject"])  # (N,), each scan's subject by number
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in utils.progress(range(DRAWS), desc="bootstrap", leave=False):
        times = np.bincount(generator.integers(len(subjects), size=len(subjects)), minlength=len(subjects))
        drawn.append(scores(*columns, times[subject]))
    for score in SCORES:
        values = [draw[score] for draw in drawn if np.isfinite(draw[score])] or [np.nan]
        pooled[f"{score}_low"], pooled[f"{score}_high"] = np.percentile(values, [2.5, 97.5])
    people = predictions.groupby("fold", sort=True)["subject"].nunique().tolist()
    return pd.DataFrame([*rows, pooled]).assign(subjects=[*people, len(subjects)])


def summary(metrics: pd.DataFrame) -> str:
    """The pooled scores as one line."""
    pooled = metrics.iloc[-1]
    parts = [
        f"{s.replace('_', ' ')} {pooled[s]:.3f} [{pooled[s + '_low']:.3f}, {pooled[s + '_high']:.3f}]"
        for s in SCORES
    ]
    counts = f"{pooled['n']:.0f} scans of {pooled['subjects']:.0f} subjects"
    return f"tests of all folds ({counts}): " + ", ".join(parts)


def _columns(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    label, prob_1, predicted = (predictions[column].to_numpy() for column in ("label", "prob_1", "predicted"))
    return label, prob_1, predicted
