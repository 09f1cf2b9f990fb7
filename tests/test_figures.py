"""figures.py: the pictures."""

import itertools
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from cohorts import AFFINE, contents

import calibration
import figures
import sanity_scores

SHAPE = (16, 17, 18)
SCAN = np.random.default_rng(0).random(SHAPE)
CUTS = figures.CUTS  # as it stands while tests are collected


@pytest.fixture(autouse=True)
def _all_slices(monkeypatch) -> None:
    """Pictures as users get them."""
    monkeypatch.setattr(figures, "CUTS", CUTS)


def check_picture(folder: Path) -> None:
    assert set(contents(folder)) == {"map.png"}
    assert (folder / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("low", "high"), [(0, 0), (-1e-9, 3e-9), (-1, 3), (2, 2)])
def test_map_is_drawn_whatever_the_values(tmp_path, low, high):
    """Zeros everywhere, too, and beside maps that are not; without a warning of nilearn's."""
    values = np.linspace(low, high, 16 * 17 * 18).reshape(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        figures.draw_map({"all": values, "controls": 0 * values}, SCAN, AFFINE, "LRP", tmp_path / "map.png")
    check_picture(tmp_path)


def test_maps_are_drawn_under_the_outline_of_a_reference(tmp_path):
    brain = SCAN > 0.1
    reference = np.zeros(SHAPE, bool)
    reference[4:9, 5:9, 6:12] = True
    values = {"LRP": SCAN[brain], "zero": np.zeros(brain.sum())}
    scan = nib.Nifti1Image(SCAN, AFFINE)
    figures.draw_overlap_maps(values, reference[brain], brain, scan, "title", tmp_path / "map.png")
    check_picture(tmp_path)


@pytest.mark.parametrize(
    ("thousandths", "share"), [([0], 0), ([1000] * 3, 1), ([400, 410, 420], 1), ([*range(0, 1001, 13)], 0.5)]
)
def test_reliability_is_drawn_whatever_the_bins(tmp_path, monkeypatch, thousandths, share):
    """One bin, or all; of one label, or both; a point per bin, between the ends of its interval."""
    drawn, save = [], figures._save
    monkeypatch.setattr(figures, "_save", lambda *words, dpi: drawn.append(words[0]) or save(*words, dpi))
    prob_1 = np.array(thousandths) / 1000
    label = (np.arange(len(prob_1)) < share * len(prob_1)).astype(int)
    before, after = (calibration.reliability(label, values) for values in (prob_1, prob_1**2))
    rounded = after.assign(low=after["low"] + 1e-16, high=after["high"] - 1e-16)  # beyond shares of 0 and 1
    bins = {"before": before, "after": rounded}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.draw_calibration(bins, tmp_path / "map.png")
    check_picture(tmp_path)
    for axis, (words, table) in zip(drawn[0].axes, bins.items(), strict=True):
        assert axis.get_title() == words
        (points,) = axis.containers
        assert points.lines[0].get_xydata().tolist() == table[["prob_1", "share"]].to_numpy().tolist()
        (ends,) = points.lines[2]
        heights = [line[:, 1].tolist() for line in ends.get_segments()]
        # an end that rounding puts on the wrong side of its share is drawn at it
        assert heights == [
            pytest.approx(row, abs=1e-12) for row in table[["low", "high"]].to_numpy().tolist()
        ]
        assert [text.get_text() for text in axis.texts] == [str(n) for n in table["n"]]
        low, high = axis.get_ylim()
        assert low < 0
        assert high > 1


def found(orders: tuple[str, ...]) -> pd.DataFrame:
    """Findings of two METHODs, whose curves and correlations are told apart by their height."""
    rows = []
    for height, (name, subject) in enumerate(itertools.product(("LRP", "NA"), ("a", "b")), 1):
        layers = {"output": ["output", "hidden", "block 1", "block 0"], "alone": ["block 0", "block 1"]}
        checks = [(f"weights_{order}_spearman", f"{layer}, draw 0", height / 10 + n / 100)
                  for order in orders for n, layer in enumerate(layers[order])]  # fmt: skip
        checks += [("weights_all_spearman", "all layers, draw 0", -0.1), ("fold_dice5", "fold 1", 0.2)]
        checks += [
            (check, str(share), height + share) for check in figures.COVERINGS for share in (0, 0.125, 0.5, 1)
        ]
        checks += [(gain, "random", 1.0) for gain in sanity_scores.GAINS]
        rows += [(name, *check[:2], 0, f"{subject}.nii", subject, check[2]) for check in checks]
    return pd.DataFrame(rows, columns=sanity_scores.COLUMNS)


@pytest.mark.parametrize("orders", [(), ("output", "alone")])
def test_panel_shows_layers_in_their_order_and_curves_between_their_ends(tmp_path, monkeypatch, orders):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path, dpi: drawn.append(figure))
    rows = found(orders)
    summary = sanity_scores.summarize(rows, 0)
    figures.draw_sanity(rows, summary, tmp_path / "map.png")
    (figure,) = drawn
    above, below = figure.axes[: 2 + len(orders)], figure.axes[2 + len(orders) :]
    assert [axis.get_title("left") for axis in below] == list(figures.COVERINGS.values())
    assert [bar.get_height() for bar in above[0].patches] == pytest.approx([-0.1, -0.1])
    assert above[0].get_ylim()[0] < 0  # they are seen
    for axis in below:
        assert [text.get_text() for text in axis.get_xticklabels()] == ["1/8", "1/2"]
        heights = {line.get_label(): line.get_ydata().tolist() for line in axis.lines}
        assert heights == {"LRP": pytest.approx([1.625, 2.0]), "NA": pytest.approx([3.625, 4.0])}
    if orders:
        names = [[text.get_text() for text in axis.get_xticklabels()] for axis in above[1:-1]]
        assert names == [["output", "hidden", "block 1", "block 0"], ["block 0", "block 1"]]
        line = above[1].lines[0]
        assert line.get_ydata().tolist() == pytest.approx([0.15, 0.16, 0.17, 0.18])


def test_many_methods_have_colours():
    styles = figures._styles([f"m{i}" for i in range(50)])
    assert len(styles) == 52
