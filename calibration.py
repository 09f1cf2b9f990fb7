"""How far a network's probabilities can be believed: temperature scaling, reliability."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binomtest

import classifier_scores
from classifier_scores import CALIBRATED
from internals import tables
from internals.errors import InputError, blaming
from runs import REMEDY, TEMPERATURES, Run

BINS = 10  # of probabilities, of equal width
FEWEST = 20  # validation scans; fewer leave the temperature wide open
HIGHEST = 1e4  # temperatures, and how many times smaller than 1 they may be
COLUMNS = ["fold", "temperature", "note", "n", *(
    f"{score}{kind}" for kind in ("", "_calibrated") for score in ("brier", "log_loss", "ece")
)]  # fmt: skip


class Temperature(NamedTuple):
    """By what the logits of a network are divided, and why that is 1 where its scans do not tell."""

    value: float
    note: str = ""


def fit_temperature(margin: np.ndarray, label: np.ndarray) -> Temperature:
    """The temperature whose probabilities have the smallest log loss (Guo et al. 2017, arXiv 1706.04599).

    With m the margin towards the true label, the derivative of the loss by 1 / T is the mean of
    -m / (1 + exp(m / T)). It rises with 1 / T, and the temperature is where it is zero. There is none where
    every scan is on the right side, and the loss falls with T to the end, nor where the margins say no more
    than chance, and it falls the other way; and few scans do not tell it.

    Args:
        margin: (N,), logit 1 less logit 0, of scans that the network was not trained on.
        label: (N,) int, 0 or 1.

    Returns:
        The temperature, > 0; 1 with the reason where the scans do not tell.
    """
    towards = np.where(np.asarray(label) == 1, 1.0, -1.0) * np.asarray(margin, np.float64)
    if len(towards) < FEWEST:
        return Temperature(1.0, f"fewer than {FEWEST} validation scans")
    if len(set(np.asarray(label).tolist())) < 2:
        return Temperature(1.0, "validation scans of one label")
    if (towards >= 0).all() and towards.any():
        return Temperature(1.0, "all validation scans are on the right side")
    if towards.mean() <= 0:
        return Temperature(1.0, "no temperature does better than calling every validation scan 0.5")

    def derivative(log_temperature: float) -> float:
        return float(np.mean(-towards * expit(-towards * np.exp(-log_temperature))))

    low, high = -np.log(HIGHEST), np.log(HIGHEST)
    if derivative(low) * derivative(high) >= 0:
        return Temperature(1.0, f"the best temperature is beyond {1 / HIGHEST:g} and {HIGHEST:g}")
    return Temperature(float(np.exp(brentq(derivative, low, high, xtol=1e-12))))


def calibrated(margin: np.ndarray, temperature: float) -> np.ndarray:
    """The probability of label 1, float64 in [0, 1], from logit 1 less logit 0 and a temperature."""
    return expit(np.asarray(margin, np.float64) / temperature)


def known_temperatures(run: Run) -> list[Temperature]:
    """The temperature of every network of a run; 1 where nothing is known of its training.

    Raises:
        InputError: train_cv.py has not written them, or they are damaged.
    """
    if not run.is_recorded:
        return [Temperature(1.0, "nothing is known of the training")] * run.cohort.k
    file = run.folder / TEMPERATURES
    if not file.exists():
        raise InputError(f"{file}: no such file{REMEDY}")
    return read_temperatures(file, run.cohort.k)


def read_temperatures(file: Path, k: int) -> list[Temperature]:
    """The temperature of every fold, from a file that has COLUMNS.

    Raises:
        InputError: no such file, or another content.
    """
    with blaming(file):
        rows = tables.read_table(file, COLUMNS)
        if [row[0] for row in rows] != [*map(str, range(k)), "pooled"]:
            raise InputError(f"is damaged: expected rows of folds 0 to {k - 1}, and of all pooled")
        try:
            found = [Temperature(float(row[1]), row[2]) for row in rows[:k]]
        except ValueError as problem:
            raise InputError(f"is damaged ({problem})") from problem
        if not all(0 < each.value < np.inf for each in found):
            raise InputError(f"is damaged: temperatures {[each.value for each in found]}")
    return found


def notes(temperatures: Sequence[Temperature]) -> str:
    """Which networks are not calibrated, and why: a line each."""
    return "\n".join(f"fold {f}: not calibrated: {note}" for f, (_, note) in enumerate(temperatures) if note)


# How well it did ---------------------------------------------------------------------------------


def reliability(label: np.ndarray, prob_1: np.ndarray) -> pd.DataFrame:
    """How often label 1 came true among scans of like probability.

    Args:
        label: (N,) int, 0 or 1.
        prob_1: (N,) float in [0, 1].

    Returns:
        A row per bin that has scans: n, prob_1 (their mean), share (of label 1), and low, high, its 95 %
        interval (Wilson 1927, doi 10.1080/01621459.1927.10502953).
    """
    number = np.minimum((np.asarray(prob_1) * BINS).astype(int), BINS - 1)
    rows = []
    for _, members in pd.DataFrame({"label": label, "prob_1": prob_1}).groupby(number):
        ends = binomtest(int(members["label"].sum()), len(members)).proportion_ci(method="wilson")
        means = {"prob_1": members["prob_1"].mean(), "share": members["label"].mean()}
        rows.append({"n": len(members), **means, "low": ends.low, "high": ends.high})
    return pd.DataFrame(rows)


def expected_calibration_error(label: np.ndarray, prob_1: np.ndarray) -> float:
    """The expected calibration error: |share - probability| of the bins, weighted by their scans."""
    bins = reliability(label, prob_1)
    return float(np.average((bins["share"] - bins["prob_1"]).abs(), weights=bins["n"]))


def calibration_table(predictions: pd.DataFrame, temperatures: list[Temperature]) -> pd.DataFrame:
    """How well the probabilities of each fold's test scans, and of all, did before and after.

    Args:
        predictions: columns as classifier_scores.PREDICTIONS, and CALIBRATED.
        temperatures: of every fold.

    Returns:
        The columns COLUMNS, a row per fold and one `pooled`, which has no temperature.
    """
    rows = []
    for fold, found in enumerate(temperatures):
        about = {"fold": fold, "temperature": found.value, "note": found.note}
        rows.append(about | _errors(predictions[predictions["fold"] == fold]))
    pooled = {"fold": "pooled", "temperature": np.nan, "note": ""} | _errors(predictions)
    return pd.DataFrame([*rows, pooled]).astype({"n": int})[COLUMNS]


def summary(table: pd.DataFrame) -> str:
    """What `calibration_table` says of all folds, as one line."""
    pooled = table.iloc[-1]
    parts = [
        f"{words} {pooled[name]:.3f}, calibrated {pooled[name + '_calibrated']:.3f}"
        for name, words in (("brier", "Brier score"), ("log_loss", "log loss"), ("ece", "calibration error"))
    ]
    return "; ".join(parts)


def _errors(predictions: pd.DataFrame) -> dict[str, float]:
    label, found = predictions["label"].to_numpy(), {"n": float(len(predictions))}
    for column, kind in (("prob_1", ""), (CALIBRATED, "_calibrated")):
        prob_1 = predictions[column].to_numpy()
        errors = classifier_scores.probability_scores(label, prob_1) | {
            "ece": expected_calibration_error(label, prob_1)
        }
        found |= {f"{name}{kind}": value for name, value in errors.items()}
    return found
