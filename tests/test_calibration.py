"""calibration.py: temperatures against scikit-learn's and a search, reliability against a naive loop."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from scipy.stats import norm
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import brier_score_loss, log_loss

import calibration
from calibration import (
    HIGHEST,
    Temperature,
    calibrated,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from classifier_scores import CALIBRATED
from internals import storage
from internals.errors import InputError
from runs import Run

SEEDS = range(4)


@pytest.fixture(autouse=True)
def _few_suffice(monkeypatch):
    """Small examples are taken for what they say; that few scans say little has a test of its own."""
    monkeypatch.setattr(calibration, "FEWEST", 1)


def test_few_validation_scans_do_not_tell(monkeypatch):
    monkeypatch.setattr(calibration, "FEWEST", 20)
    margin, label = simulated(0, 2.5, 20)
    fitted = fit_temperature(margin, label)
    assert (fitted.note, fitted.value != 1) == ("", True)
    assert fit_temperature(margin[1:], label[1:]) == (1, "fewer than 20 validation scans")


def simulated(seed: int, temperature: float, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Margins, and labels of which 1 is as frequent as the margins over a temperature say."""
    random = np.random.default_rng(seed)
    margin = temperature * random.normal(0.5, 2, n)
    return margin, (random.random(n) < expit(margin / temperature)).astype(int)


def loss(margin: np.ndarray, label: np.ndarray, temperature: float) -> float:
    """The mean cross-entropy in nats: log(1 + exp(-m / T)), m towards the true label."""
    return float(np.logaddexp(0, np.where(label == 1, -margin, margin) / temperature).mean())


# The temperature ---------------------------------------------------------------------------------


class Halved(ClassifierMixin, BaseEstimator):
    """Half the margin in the first column: scikit-learn takes x for the logits -x and x, 2 x apart."""

    classes_ = np.array([0, 1])

    def fit(self, x: np.ndarray, y: np.ndarray) -> "Halved":
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def decision_function(self, x: np.ndarray) -> np.ndarray:
        return x[:, 0] / 2

    def predict(self, x: np.ndarray) -> np.ndarray:
        return (x[:, 0] > 0).astype(int)


@pytest.mark.parametrize("temperature", [0.3, 1, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_temperature_is_scikit_learns(seed, temperature):
    margin, label = simulated(seed, temperature)
    theirs = CalibratedClassifierCV(FrozenEstimator(Halved()), method="temperature")
    theirs.fit(margin[:, None], label)
    found = fit_temperature(margin, label)
    assert found.note == ""
    # theirs compares losses, which see log T to the root of float64's step, about 1e-8
    (inner,) = theirs.calibrated_classifiers_
    assert found.value == pytest.approx(1 / inner.calibrators[0].beta_, rel=1e-6)
    # a probability moves with log T by p (1 - p) m / T, which is at most 0.23
    expected = theirs.predict_proba(margin[:, None])[:, 1]
    assert np.allclose(calibrated(margin, found.value), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.02, 1, 300])
@pytest.mark.parametrize("n", [6, 60])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_temperature_has_a_smaller_loss(seed, n, temperature):
    """A search over 4001 temperatures; every set has scans on both sides, and more on the right one."""
    margin, label = simulated(seed, temperature, n)
    label[:2] = [0, 1]
    margin[:2] = np.array([0.1, 6]) * temperature
    found = fit_temperature(margin, label)
    assert found.note == ""
    tried = np.geomspace(1 / HIGHEST, HIGHEST, 4001)
    losses = [loss(margin, label, each) for each in tried]
    best = int(np.argmin(losses))
    assert tried[best - 1] < found.value < tried[best + 1]
    assert loss(margin, label, found.value) <= min(losses) + 1e-14  # losses below 1: a few steps of float64


def test_temperature_by_hand():
    """A network that says c of all is right in three of four where the probability is 3/4: T = c / log 3."""
    found = fit_temperature(np.full(8, 5.0), np.array([1, 1, 1, 0, 1, 0, 1, 1]))
    assert found == (pytest.approx(5 / np.log(3), rel=1e-10), "")  # log T is found to 1e-12


@pytest.mark.parametrize("temperature", [0.4, 1, 2.5])
def test_known_temperature_is_recovered(temperature):
    """Within five standard errors of 1 / T, from the Fisher information: the sum of m^2 p (1 - p)."""
    margin, label = simulated(0, temperature, 20_000)
    p = expit(margin / temperature)
    error = 1 / np.sqrt((margin**2 * p * (1 - p)).sum())
    assert 5 * error < 0.1 / temperature  # so that this can fail
    assert 1 / fit_temperature(margin, label).value == pytest.approx(1 / temperature, abs=5 * error)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 20))
def test_temperature_grows_with_the_margins_and_does_not_know_the_labels_names(seed, scale):
    margin, label = simulated(seed, 1, 50)
    found = fit_temperature(margin, label)
    scaled = fit_temperature(scale * margin, label)
    assert scaled.note == found.note
    assert scaled.value == pytest.approx(found.value if found.note else scale * found.value, rel=1e-9)
    assert fit_temperature(-margin, 1 - label) == found
    assert fit_temperature(margin.astype(np.float32).astype(np.float64), label) == fit_temperature(
        margin.astype(np.float32), label
    )


ONE_LABEL = "validation scans of one label"
SEPARATED = "all validation scans are on the right side"
CHANCE = "no temperature does better than calling every validation scan 0.5"
BEYOND = "the best temperature is beyond 0.0001 and 10000"


@pytest.mark.parametrize(
    ("margin", "label", "note"),
    [
        ([1, -2, 3], [1, 1, 1], ONE_LABEL),
        ([1, -2, 3], [0, 0, 0], ONE_LABEL),
        ([1, 2, -3, -0.1], [1, 1, 0, 0], SEPARATED),
        ([1, 0, -3], [1, 0, 0], SEPARATED),
        ([1, -2], [1, 0], SEPARATED),
        ([-1, 2, -3, 1], [1, 1, 0, 0], ""),  # one of each label is wrong, by less than the others are right
        ([1, -1, 1, -1], [1, 1, 0, 0], CHANCE),
        ([-1, 2], [1, 0], CHANCE),
        ([4, -1, -9, -1], [1, 1, 1, 0], CHANCE),
        ([-1e-6, 2e-6, -3e-6, 1e-6], [1, 1, 0, 0], BEYOND),
        ([-1e6, 2e6, -3e6, 1e6], [1, 1, 0, 0], BEYOND),
    ],
)
def test_scans_that_tell_no_temperature(margin, label, note):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fit_temperature(np.array(margin, float), np.array(label))
    assert found.note == note
    assert (found.value == 1) == bool(note)


@pytest.mark.parametrize("sign", [1, -1])
def test_reasons_are_true(sign):
    """On the right side, the loss falls with T to the end; where margins say nothing, it falls with 1 / T."""
    label = np.array([1, 1, 0, 0])
    margin = sign * np.array([1, 2, -3, -0.1])
    tried = np.geomspace(0.05, HIGHEST, 50)  # below, the loss of the first is zero in float64
    steps = np.diff([loss(margin, label, each) for each in tried])
    assert (sign * steps > 0).all()
    assert fit_temperature(margin, label).note == (SEPARATED if sign == 1 else CHANCE)


# Calibrated probabilities ------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.7])
def test_calibrated_is_the_softmax_of_the_logits_over_the_temperature(temperature):
    logits = np.random.default_rng(0).normal(0, 10, (500, 2))
    found = calibrated(logits[:, 1] - logits[:, 0], temperature)
    # logits up to 40 over 0.5, rounded a few times: relative errors of 80 * 1e-16 each
    np.testing.assert_allclose(found, softmax(logits / temperature, axis=1)[:, 1], rtol=1e-13, atol=0)


def test_calibrated_margins_that_are_large_or_float32():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibrated(np.array([-1e5, 0, 1e5], np.float32), 0.5)
    assert found.dtype == np.float64
    assert found.tolist() == [0, 0.5, 1]
    third = np.array([1 / 3], np.float32)
    assert calibrated(third, 1.0) == calibrated(third.astype(np.float64), 1.0)  # not rounded to float32


# Reliability -------------------------------------------------------------------------------------

THOUSANDTHS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1000)), min_size=1, max_size=25)


def naive_bins(pairs: list[tuple[int, int]]) -> dict[int, list[tuple[int, float]]]:
    """Labels and probabilities by tenth; probabilities in thousandths, and 1 belongs to the last tenth."""
    bins: dict[int, list[tuple[int, float]]] = {}
    for label, thousandths in pairs:
        bins.setdefault(min(thousandths // 100, 9), []).append((label, thousandths / 1000))
    return bins


@settings(max_examples=25, deadline=None)
@given(THOUSANDTHS)
def test_reliability_is_that_of_a_loop(pairs):
    label, prob_1 = np.array([y for y, _ in pairs]), np.array([p / 1000 for _, p in pairs])
    found, bins = reliability(label, prob_1), naive_bins(pairs)
    assert list(found.columns) == ["n", "prob_1", "share", "low", "high"]
    assert found["n"].tolist() == [len(bins[number]) for number in sorted(bins)]
    error, z = 0.0, norm.ppf(0.975)
    for row, number in zip(found.to_dict("records"), sorted(bins), strict=True):
        n = len(bins[number])
        share, mean = (sum(pair[i] for pair in bins[number]) / n for i in (0, 1))
        # Wilson 1927: all shares from which the one found is no further than z of their standard errors
        middle, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        expected = {"n": n, "prob_1": mean, "share": share}
        expected |= {"low": (middle - half) / (1 + z**2 / n), "high": (middle + half) / (1 + z**2 / n)}
        assert row == pytest.approx(expected, abs=1e-12)  # numbers below 1, each of a few roundings
        error += n * abs(share - mean)
    assert expected_calibration_error(label, prob_1) == pytest.approx(error / len(pairs), abs=1e-12)


def test_edges_of_the_bins():
    """A bin holds its lower edge; the last one, its upper edge too."""
    edges = np.arange(11) / 10
    below = np.nextafter(edges[[1, 5, 10]], 0)
    found = reliability(np.zeros(14, int), np.concatenate([edges, below]))
    assert found["n"].tolist() == [2, 1, 1, 1, 2, 1, 1, 1, 1, 3]
    assert found["prob_1"].to_numpy()[[1, 2]] == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(("prob_1", "error"), [(0.0, 0.75), (0.1, 0.65), (0.25, 0), (1.0, 0.25)])
def test_expected_error_of_one_bin(prob_1, error):
    """Of four scans three have label 1, or one where the probability says so."""
    label = np.array([1, 1, 1, 0] if prob_1 != 0.25 else [1, 0, 0, 0])
    assert expected_calibration_error(label, np.full(4, prob_1)) == pytest.approx(error)


# The table ---------------------------------------------------------------------------------------

TEMPERATURES = [Temperature(1.7320508075688772), Temperature(1.0, SEPARATED), Temperature(0.1)]


def predictions() -> pd.DataFrame:
    """Ninety test scans in three folds of 30, 20 and 40, calibrated by TEMPERATURES."""
    margin, label = simulated(3, 2, 90)
    fold = np.repeat([0, 1, 2], [30, 20, 40])
    after = expit(margin / np.array([found.value for found in TEMPERATURES])[fold])
    table = pd.DataFrame({"fold": fold, "label": label, "prob_1": expit(margin), CALIBRATED: after})
    return table.sample(frac=1, random_state=0)


def table() -> pd.DataFrame:
    return calibration.calibration_table(predictions(), TEMPERATURES)


def test_table_has_a_row_per_fold_and_one_of_all():
    found, given = table(), predictions()
    names = ["brier", "log_loss", "ece", "brier_calibrated", "log_loss_calibrated", "ece_calibrated"]
    assert list(found.columns) == ["fold", "temperature", "note", "n", *names] == calibration.COLUMNS
    assert found["fold"].tolist() == [0, 1, 2, "pooled"]
    assert found["temperature"].tolist()[:3] == [value for value, _ in TEMPERATURES]
    assert np.isnan(found["temperature"][3])
    assert found["note"].tolist() == ["", SEPARATED, "", ""]
    assert found["n"].tolist() == [30, 20, 40, 90]
    parts = [given[given["fold"] == fold] for fold in range(3)] + [given]
    for row, part in zip(found.to_dict("records"), parts, strict=True):
        for column, kind in (("prob_1", ""), (CALIBRATED, "_calibrated")):
            label, prob_1 = part["label"].to_numpy(), part[column].to_numpy()
            assert row["brier" + kind] == pytest.approx(brier_score_loss(label, prob_1))
            # scikit-learn keeps 2e-16 from 0 and 1, these 1e-15; a scan of the third fold may be nearer
            far = np.clip(prob_1, 1e-15, 1 - 1e-15)
            assert row["log_loss" + kind] == pytest.approx(log_loss(label, far))
            number = np.minimum(np.floor(10 * prob_1), 9)
            gaps = [abs((label - prob_1)[number == each].sum()) for each in range(10)]
            assert row["ece" + kind] == pytest.approx(sum(gaps) / len(label))


def test_summary_and_notes():
    found = table()
    whole = found.iloc[3]
    assert calibration.summary(found) == (
        f"Brier score {whole['brier']:.3f}, calibrated {whole['brier_calibrated']:.3f}; "
        f"log loss {whole['log_loss']:.3f}, calibrated {whole['log_loss_calibrated']:.3f}; "
        f"calibration error {whole['ece']:.3f}, calibrated {whole['ece_calibrated']:.3f}"
    )
    assert calibration.notes(TEMPERATURES) == f"fold 1: not calibrated: {SEPARATED}"
    assert calibration.notes(TEMPERATURES[:1]) == ""


# The file ----------------------------------------------------------------------------------------


def written(folder: Path) -> Path:
    storage.write_csv(table(), folder / "calibration.csv")
    return folder / "calibration.csv"


def test_temperatures_are_read_as_they_were_written(tmp_path):
    assert calibration.read_temperatures(written(tmp_path), 3) == TEMPERATURES


CELL = "^0,[^,]*,"  # fold 0's temperature

DAMAGED = {
    "another column": ("temperature", "temperatures"),
    "a column less": (",ece_calibrated$", ""),
    "no header": (r"\Afold.*\n", ""),
    "nothing": (r"(?s)\A.*\Z", ""),
    "header alone": (r"(?s)\n.*", "\n"),
    "another fold": ("^1,", "3,"),
    "a fold twice": ("^1,", "0,"),
    "no fold 1": ("^1,.*\n", ""),
    "not pooled": ("^pooled,.*\n", ""),
    "a fold more": ("^pooled", "3,1,,9,0,0,0,0,0,0\npooled"),
    "a row of one cell": ("^0,.*", "0"),
    "a row cut short": ("^0,([^,]*),.*", r"0,\1"),
    "text": (CELL, "0,warm,"),
    "blank": (CELL, "0,,"),
    "zero": (CELL, "0,0.0,"),
    "below zero": (CELL, "0,-1.5,"),
    "infinite": (CELL, "0,inf,"),
    "not a number": (CELL, "0,nan,"),
    "binary": (CELL, "0,\0,"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file(tmp_path, damage):
    file = written(tmp_path)
    pattern, instead = DAMAGED[damage]
    text, times = re.subn(pattern, instead, file.read_text(), count=1, flags=re.MULTILINE)
    assert times == 1
    file.write_text(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: .") as problem:
        calibration.read_temperatures(file, 3)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("k", [2, 4])
def test_file_of_another_run(tmp_path, k):
    with pytest.raises(InputError, match=rf"is damaged: .* folds 0 to {k - 1}, "):
        calibration.read_temperatures(written(tmp_path), k)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv: no such CSV"):
        calibration.read_temperatures(tmp_path / "none.csv", 3)


def test_temperatures_of_a_run(tmp_path):
    """They are its file's; 1 where there are published checkpoints only, and no record of their training."""
    run = Run(tmp_path, SimpleNamespace(k=3), "modelB2")  # type: ignore[arg-type]
    assert calibration.known_temperatures(run) == [(1, "nothing is known of the training")] * 3
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"calibration\.csv: no such file; train_cv\.py, called as before, "):
        calibration.known_temperatures(run)
    written(tmp_path)
    assert calibration.known_temperatures(run) == TEMPERATURES
