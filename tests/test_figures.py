"""figures.py: the pictures."""

import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cohorts import AFFINE, contents

import figures

SHAPE = (16, 17, 18)
SCAN = np.random.default_rng(0).random(SHAPE)


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
