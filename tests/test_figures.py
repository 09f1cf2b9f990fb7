"""figures.py: the pictures."""

import numpy as np
import pytest
from cohorts import AFFINE, contents

import figures


@pytest.mark.parametrize("low", [0, -1e-9, -1])
def test_figure_is_a_png_whatever_the_values(tmp_path, low):
    values = np.linspace(low, 3 * abs(low), 16 * 17 * 18).reshape(16, 17, 18)
    scan = np.random.default_rng(0).random((16, 17, 18))
    figures.draw_map(values, scan, AFFINE, "LRP", tmp_path / "map.png")
    assert set(contents(tmp_path)) == {"map.png"}
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
