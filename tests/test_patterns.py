"""patterns.py: Gram matrix in pieces, against the dense one. Machines and maps are in test_svm.py."""

import numpy as np
import pytest
from cohorts import scans_of, two_groups

import patterns
import voxelwise

N, SHAPE = 31, (5, 6, 7)


@pytest.fixture
def volumes() -> np.ndarray:
    """Scans, float32 (N, X, Y, Z), of two groups that overlap; one face is the same in all."""
    return two_groups(N, SHAPE)


@pytest.mark.parametrize("block", [1, 2, 7, 10, 30, 31, 100])
@pytest.mark.parametrize("streamed", [1, 3, 4])
def test_gram_matrix_is_that_of_the_dense_matrix(volumes, monkeypatch, block, streamed):
    mask = np.ptp(volumes, axis=0) > 0
    X = volumes[:, mask].astype(float)
    monkeypatch.setattr(patterns, "STREAMED", streamed)
    monkeypatch.setattr(voxelwise, "HELD", (block + streamed) * X.shape[1])
    monkeypatch.setattr(voxelwise, "CHUNK", 1000)
    assert X.shape[1] % (1000 // min(block, N)) != 0  # a last chunk that is shorter
    found = patterns.gram_matrix(scans_of(volumes), mask)
    assert found.dtype == np.float64
    assert np.allclose(found, X @ X.T, rtol=1e-12, atol=0)  # float64 sums in another order


def test_inner_products_do_not_add_up_in_float32():
    """One large product and many small ones: float32 would lose every small one."""
    left = np.full((1, 100_000), 1e-4, np.float32)
    left[0, 0] = 1e2
    exact = float(np.float64(left[0, 0]) ** 2 + 99_999 * np.float64(left[0, 1]) ** 2)
    assert patterns.inner_products(left, left)[0, 0] == pytest.approx(exact, rel=1e-12)


def test_balanced_accuracy_comes_first_and_roundings_are_ties(monkeypatch):
    """AUC decides between equals, the smaller C after that."""
    accuracies, areas = iter([0.5, 0.7, 0.7 + 1e-15, 0.7]), iter([0.9, 0.7, 0.8, 0.8 + 1e-15])
    monkeypatch.setattr(patterns, "balanced_accuracy_score", lambda *_: next(accuracies))
    monkeypatch.setattr(patterns, "roc_auc_score", lambda *_: next(areas))
    labels = np.array([0, 1, 0, 1])
    svm, accuracy, area = patterns.fit_best(np.eye(4), labels, [0, 1], [2, 3], [1e-3, 1e-2, 1e-1, 1.0])
    assert (svm.C, accuracy, area) == (1e-1, 0.7, 0.8)
