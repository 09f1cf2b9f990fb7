"""model_card.py: what the card says, found again in the tables that it was made from."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

import atypical
import calibration
import classifier_scores
import dataset
from calibration import Temperature
from classifier_scores import CALIBRATED
from dataset import Cohort
from internals.nifti import Grid
from model_card import model_card

K = 3
NOTE = "all validation scans are on the right side"
TEMPERATURES = [Temperature(1.23456), Temperature(1.0, NOTE), Temperature(0.0123456)]
ARGUMENTS: dict[str, Any] = {
    "model": "modelC7", "batch": 6, "lr": 0.00123, "wd": 0.0045, "epochs": 77, "patience": 8, "delta": 0.0625,
    "split": "stratified", "val_fraction": 0.34, "seed": 99, "precision": "tf32", "permute_labels": False,
}  # fmt: skip
EPOCHS = [11, 77, 5]


def cohort() -> Cohort:
    """Forty-one scans of thirty subjects, eleven of whom have two; 12 subjects have label 1."""
    rows = [*range(30), *range(11)]
    table = pd.DataFrame({
        "path": [f"secret/scan_{place}_of_{who}.nii.gz" for place, who in enumerate(rows)],
        "label": [int(who % 5 in (1, 4)) for who in rows],
        "subject": [f"Nightingale{who}" for who in rows],
    })  # fmt: skip
    table = table.assign(file=[Path("/archive") / path for path in table["path"]])
    grid = Grid((31, 37, 29), np.diag([-1.5, 2, 1.25, 1]), nib.Nifti1Header())
    folds = dataset.make_folds(table, K, "stratified", 0.34, 0)
    return Cohort(Path("/archive/clinic.csv"), table, dataset.Checked(grid, "", ""), folds, K)


def predictions(own: Cohort) -> pd.DataFrame:
    """Of every fold's test scans, in the order of the folds; often right."""
    random, parts = np.random.default_rng(0), []
    for fold in range(own.k):
        scans = own.table.loc[own.scan_indices(fold, "test")]
        margin = random.normal(2 * scans["label"] - 1, 1.5)
        probs = {
            "prob_1": expit(margin),
            CALIBRATED: calibration.calibrated(margin, TEMPERATURES[fold].value),
        }
        parts.append(scans.assign(fold=fold, predicted=(margin > 0).astype(int), **probs))
    return pd.concat(parts)


def ranges() -> pd.DataFrame:
    """Every fold's, numbers that are told apart; two scans of 14, 0 of 14 and 3 of 13 are atypical."""
    rows = []
    for fold, (n, marked) in enumerate(((14, 2), (14, 0), (13, 3))):
        for place, name in enumerate(atypical.TRAITS):
            low, high = 10 * place + fold, 10 * place + 3 + fold
            ends = {"low": low - 2, "high": high + 2, "training_low": low, "training_high": high}
            rows.append({"fold": fold, "trait": name, **ends, "test_scans": n, "test_marked": fold + place})
        rows.append({"fold": fold, "trait": atypical.ANY, "test_scans": n, "test_marked": marked})
    return pd.DataFrame(rows)[atypical.COLUMNS]


def parts(own: Cohort, found: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Scores, errors of the probabilities, ranges."""
    errors = calibration.calibration_table(found, TEMPERATURES)
    return classifier_scores.metrics_table(found, seed=0), errors, ranges()


def card(**changes: Any) -> str:
    own = cohort()
    return model_card(own, ARGUMENTS | changes, EPOCHS, *parts(own, predictions(own)))


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table of a Markdown text, rows of dashes too."""
    found: list[list[list[str]]] = []
    previous = ""
    for line in text.split("\n"):
        if line.startswith("|"):
            if not previous.startswith("|"):
                assert previous == "", "a table needs a blank line before it"
                found.append([])
            assert line.endswith("|")
            found[-1].append([cell.strip() for cell in line[1:-1].split("|")])
        previous = line
    return found


def sections(text: str) -> dict[str, str]:
    """What is written under each heading of the second level."""
    _, *found = text.split("\n## ")
    return {part.split("\n")[0]: part.split("\n", 1)[1] for part in found}


def test_card_has_its_sections_in_their_order():
    text = card()
    assert text.startswith("# 3 networks modelC7: ")
    wanted = [
        "Data",
        "Training",
        "Scores",
        "Calibration",
        "Atypical scans",
        "What it is for",
        "What it is not for",
    ]
    assert list(sections(text)) == wanted
    assert "diagnosis" in sections(text)["What it is not for"]
    assert text.endswith("\n")
    assert "\n\n\n" not in text


def test_tables_are_well_formed():
    found = tables(card())
    assert len(found) == 4
    for header, dashes, *rows in found:
        assert all(header)
        assert set(dashes) == {"---"}
        assert rows
        assert {len(row) for row in (dashes, *rows)} == {len(header)}


def test_data_are_counted():
    own = cohort()
    text = sections(card())["Data"]
    ones = sum(own.table["label"])
    first = text.strip().split("\n")[0]
    assert first.startswith("- 41 T1-weighted scans of 30 subjects")
    assert first.endswith(f" {ones} of label 1")
    assert ones not in (0, 41 - ones)  # so that they are told apart
    assert "- 31 x 37 x 29 voxels of 1.5 x 2 x 1.25 mm, " in text
    assert "- 3 folds; " in text
    (found,) = tables(text)
    pairs = [*zip(own.folds["fold"], own.folds["role"], strict=True)]
    expected = [
        [fold, *(pairs.count((fold, role)) for role in ("train", "val", "test"))] for fold in range(K)
    ]
    assert len({tuple(row[1:]) for row in expected}) > 1
    assert found[2:] == [[str(cell) for cell in row] for row in expected]


def test_training_is_told():
    text = sections(card())["Training"]
    for name in ("batch", "lr", "wd", "epochs", "patience", "delta", "split", "seed", "precision"):
        assert f" {name} {ARGUMENTS[name]}" in text
    assert " val-fraction 0.34," in text
    assert "after 11, 77, 5 epochs." in text


def test_scores_are_those_of_the_table():
    own = cohort()
    scores, _, _ = parts(own, predictions(own))
    whole = scores.iloc[-1]
    (found,) = tables(sections(card())["Scores"])
    rows = {row[0]: row[1:] for row in found[2:]}
    names = [*classifier_scores.SCORES, "brier", "log_loss", "brier_calibrated", "log_loss_calibrated"]
    assert list(rows) == [" ".join(name.split("_")) for name in names]
    for name, (pooled, folds) in zip(names, rows.values(), strict=True):
        low, high = whole[f"{name}_low"], whole[f"{name}_high"]
        assert low < high
        assert pooled == f"{whole[name]:.3f} [{low:.3f}, {high:.3f}]"
        assert folds.split(", ") == [f"{value:.3f}" for value in scores[name][:K]]


def test_calibration_is_told():
    own = cohort()
    _, errors, _ = parts(own, predictions(own))
    before, after = errors["ece"].iloc[-1], errors["ece_calibrated"].iloc[-1]
    text = sections(card())["Calibration"]
    assert f"{before:.3f} before and {after:.3f} after" in " ".join(text.split())
    (found,) = tables(text)
    assert found[2:] == [["0", "1.23", ""], ["1", "1", NOTE], ["2", "0.0123", ""]]


def test_atypical_scans_are_told():
    """The training scans' range is that of all folds, what is marked is their sum."""
    text = sections(card())["Atypical scans"]
    assert text.strip().startswith("5 of 41 test scans are atypical: ")
    assert f" by more than {atypical.MARGIN:g} of its width" in " ".join(text.split())
    (found,) = tables(text)
    expected = [
        [trait.words, f"{10 * place} to {10 * place + 5}", str(3 * place + 3)]
        for place, trait in enumerate(atypical.TRAITS.values())
    ]
    assert found[2:] == expected


@pytest.mark.parametrize("permuted", [False, True])
def test_networks_of_permuted_labels_are_marked_above_all(permuted):
    text = card(permute_labels=permuted)
    assert ("permuted labels" in text) == permuted
    head = text.split("\n## ")[0]
    assert ("**Trained on permuted labels**" in head) == permuted


def test_card_names_no_scan_and_nobody():
    text = card()
    own = cohort()
    for word in ("Nightingale", "secret", "scan_", ".nii", "archive", "clinic", ".csv", *own.table["path"]):
        assert word not in text


def test_folds_of_one_label_have_no_scores_but_a_card():
    own = cohort()
    found = predictions(own)
    found = found[(found["fold"] != 1) | (found["label"] == 0)]
    text = model_card(own, ARGUMENTS, EPOCHS, *parts(own, found))
    rows = {row[0]: row[2].split(", ") for row in tables(sections(text)["Scores"])[0][2:]}
    assert [cell == "nan" for cell in rows["auc"]] == [False, True, False]
    assert {len(row) for table in tables(text) for row in table} == {3, 4}
