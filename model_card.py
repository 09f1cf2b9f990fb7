"""The model card: what a run's networks are, how well they do, and what they are not for, as Markdown.

After Mitchell et al. 2019 (arXiv 1810.03993). It names no scan, path or subject.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

import atypical
from classifier_scores import SCORES, with_interval
from dataset import Cohort

LIMITS = """\
## What it is for

Research on scans like those above: how well such networks tell the groups apart, and what they use. Each
network was tested on subjects that it never saw; predictions of new scans come from all of them.

## What it is not for

- **A prediction is no diagnosis**, and no part of one. No such use was studied.
- **Prevalence.** Probabilities hold where disease is as frequent as in these scans. Where it is rarer, more
  alarms are false.
- **Other sites, scanners, sequences, ages, other preprocessing** can change both score and calibration,
  unnoticed. The check for atypical scans sees what is grossly different, and nothing else; it does not see
  a scan that is flipped from left to right.
- **Other diseases.** The networks know two groups, and call everything one of them.
- **The intervals** are over subjects of these folds; they say nothing of other cohorts.
"""


def model_card(
    cohort: Cohort,
    arguments: Mapping[str, Any],
    epochs: Sequence[int],
    scores: pd.DataFrame,
    errors: pd.DataFrame,
    ranges: pd.DataFrame,
) -> str:
    """Describe a run.

    Args:
        cohort: its scans and folds.
        arguments: train_cv.py's that shape the networks.
        epochs: how many each fold was trained.
        scores: from `classifier_scores.metrics_table`, with probabilities.
        errors: from `calibration.calibration_table`.
        ranges: of all folds, as atypical.COLUMNS.
    """
    sections = [
        f"# {cohort.k} networks {arguments['model']}: label 1 (patient) against label 0 (control)",
        _warning(arguments),
        "## Data\n\n" + _data(cohort),
        "## Training\n\n" + _training(arguments, epochs),
        "## Scores\n\nOf every scan once, by the network that never saw its subject; with 95 % bootstrap "
        "intervals over subjects.\n\n" + _scores(scores),
        "## Calibration\n\n" + _calibration(errors),
        "## Atypical scans\n\n" + _atypical(ranges),
        LIMITS,
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _warning(arguments: Mapping[str, Any]) -> str:
    if not arguments["permute_labels"]:
        return ""
    return "**Trained on permuted labels**: these networks know nothing of the groups; a floor for maps."


def _data(cohort: Cohort) -> str:
    shape = " x ".join(map(str, cohort.grid.shape))
    sizes = " x ".join(f"{size:g}" for size in cohort.grid.voxel_sizes)
    counts = cohort.table["label"].value_counts()
    people = cohort.table["subject"].nunique()
    roles = cohort.folds.groupby(["fold", "role"])["path"].size().unstack()[["train", "val", "test"]]
    lines = [
        f"{len(cohort.table)} T1-weighted scans of {people} subjects, {counts[1]} of label 1",
        f"{shape} voxels of {sizes} mm, each scan scaled to [0, 1] by its own minimum and maximum",
        f"{cohort.k} folds; subjects never cross them",
    ]
    table = _table(["fold", "training scans", "validation", "test"], roles.reset_index().to_numpy().tolist())
    return "\n".join(f"- {line}" for line in lines) + f"\n\n{table}"


def _training(arguments: Mapping[str, Any], epochs: Sequence[int]) -> str:
    names = ("batch", "lr", "wd", "epochs", "patience", "delta", "split", "val_fraction", "seed", "precision")
    words = ", ".join(f"{name.replace('_', '-')} {arguments[name]}" for name in names)
    return (
        f"Adam on the cross-entropy, with early stopping on the validation scans: {words}. "
        f"The folds ended after {', '.join(map(str, epochs))} epochs."
    )


def _scores(scores: pd.DataFrame) -> str:
    pooled, folds = scores.iloc[-1].to_dict(), scores.iloc[:-1]
    names = [*SCORES, "brier", "log_loss", "brier_calibrated", "log_loss_calibrated"]
    rows = [
        [n.replace("_", " "), with_interval(pooled, n), ", ".join(f"{v:.3f}" for v in folds[n])]
        for n in names
    ]
    return _table(["score", "all folds", "each fold"], rows)


def _calibration(errors: pd.DataFrame) -> str:
    pooled, folds = errors.iloc[-1], errors.iloc[:-1]
    rows = [[row["fold"], f"{row['temperature']:.3g}", row["note"]] for row in folds.to_dict("records")]
    return (
        "One temperature per network, fitted on its validation scans by log loss (Guo et al. 2017). On the "
        f"test scans the expected calibration error is {pooled['ece']:.3f} before and "
        f"{pooled['ece_calibrated']:.3f} after; calibration.png shows it.\n\n"
        + _table(["fold", "temperature", "why 1"], rows)
    )


def _atypical(ranges: pd.DataFrame) -> str:
    if not atypical.is_known(ranges):
        return f"{atypical.summary(ranges)}."
    rows = []
    for name, trait in atypical.TRAITS.items():
        own = ranges[ranges["trait"] == name]
        theirs = f"{own['training_low'].min():.3g} to {own['training_high'].max():.3g}"
        rows.append([trait.words, theirs, int(own["test_marked"].sum())])
    return (
        f"{atypical.summary(ranges)}: a number below lies beyond the training scans' range by more than "
        f"{atypical.MARGIN:g} of its width, or, where that is narrow, by a smallest margin.\n\n"
        + _table(["number", "training scans", "test scans marked"], rows)
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
