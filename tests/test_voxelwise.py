"""voxelwise.py: passes over the scans. Options, masks and files are in test_svm.py and test_ttest.py."""

import numpy as np
import pytest
from cohorts import scans_of, two_groups

import brain_maps
import voxelwise

N, SHAPE = 11, (5, 6, 7)


@pytest.fixture
def volumes() -> np.ndarray:
    return two_groups(N, SHAPE)


@pytest.mark.parametrize("row", [0, 1, N - 1])
def test_voxels_that_differ_in_one_scan_vary(volumes, row):
    volumes[row, 0, 0, 0] = 0.25
    mean, varies = voxelwise.voxel_statistics(scans_of(volumes))
    assert np.allclose(mean, volumes.mean(0, dtype=np.float64), rtol=1e-12, atol=0)
    assert np.array_equal(varies, np.ptp(volumes, axis=0) > 0)
    assert varies[0, 0, :2].tolist() == [True, False]


@pytest.mark.parametrize("powers", [(1,), (1, 2), (2,)])
@pytest.mark.parametrize("chunk", [7, 1000, 2**22])
def test_weighted_sums_are_those_of_the_dense_matrix(volumes, monkeypatch, powers, chunk):
    mask = np.ptp(volumes, axis=0) > 0
    monkeypatch.setattr(voxelwise, "CHUNK", chunk)
    coefficients = np.random.default_rng(1).normal(size=(3, N))
    dense = np.concatenate([coefficients @ volumes[:, mask].astype(float) ** power for power in powers])
    found = voxelwise.weighted_sums(coefficients, scans_of(volumes), mask, powers)
    assert np.allclose(found, dense, rtol=1e-12, atol=1e-12)  # float64 sums in another order
    assert np.array_equal(brain_maps.unmask(found[0], mask)[mask], found[0])
    assert not brain_maps.unmask(found[0], mask)[~mask].any()
