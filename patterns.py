"""Linear support vector machines on whole brains and their activation patterns.

The kernel is linear, so all that a machine needs to know of N scans of V voxels is their Gram matrix, (N, N),
and every map is a weighted sum of the scans (`voxelwise.weighted_sums`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.svm import SVC

import utils
import voxelwise
from dataset import ScanDataset
from voxelwise import STREAMED, batches, chunks, read_voxels

# The machine -------------------------------------------------------------------------------------


class LinearSVM(NamedTuple):
    """A linear SVM in terms of the scans: decision(x) = sum_i dual_i <x_i, x> + intercept."""

    C: float
    dual: np.ndarray  # (N,), zero where a scan is no support vector
    intercept: float

    def decision_function(self, gram: np.ndarray) -> np.ndarray:
        """Decision values of all scans, (N, N) -> (N,); > 0 is label 1."""
        return gram @ self.dual + self.intercept


class Fit(NamedTuple):
    """A machine and how it does on its validation scans."""

    svm: LinearSVM
    balanced_accuracy: float
    auc: float


def fit(gram: np.ndarray, labels: np.ndarray, train: list[int], C: float) -> LinearSVM:
    """The SVM of the training scans: that of SVC(kernel="linear", C=C) on their voxels."""
    svc = SVC(kernel="precomputed", C=C).fit(gram[np.ix_(train, train)], labels[train])
    dual = np.zeros(len(gram))
    dual[np.array(train)[svc.support_]] = svc.dual_coef_[0]
    return LinearSVM(C, dual, float(svc.intercept_[0]))


def fit_best(
    gram: np.ndarray, labels: np.ndarray, train: list[int], val: list[int], candidates: Sequence[float]
) -> Fit:
    """The machine whose C does best on the validation scans.

    AUC alone would not do: it sees neither scale nor offset, and at a tiny C hardly any decision value
    differs from the others. Balanced accuracy comes first, AUC decides between equals, then the smaller C.
    """
    fits = []
    for C in candidates:
        svm = fit(gram, labels, train, C)
        decision = svm.decision_function(gram)[val]
        accuracy = balanced_accuracy_score(labels[val], decision > 0)
        # rounded, as sums in another order differ
        fits.append(Fit(svm, round(accuracy, 9), round(roc_auc_score(labels[val], decision), 9)))
    return max(fits, key=lambda found: found[1:])  # the first of equals


def pattern_coefficients(svm: LinearSVM, gram: np.ndarray, train: list[int]) -> np.ndarray:
    """What each scan adds to the activation pattern, (N,).

    The pattern is A = cov(X, s) of the training scans X and their decision values s, unbiased: Haufe
    et al. 2014, doi 10.1016/j.neuroimage.2013.10.067, theorem 1; var(s), by which it divides, is one
    factor for all voxels and left out. Deviations from the mean sum to zero, so that
    A = sum_i (s_i - mean s) x_i / (n - 1).
    """
    decision = svm.decision_function(gram)[train]
    coefficients = np.zeros(len(gram))
    coefficients[train] = (decision - decision.mean()) / (len(train) - 1)
    return coefficients


# The Gram matrix --------------------------------------------------------------------------------


def gram_matrix(scans: ScanDataset, mask: np.ndarray) -> np.ndarray:
    """Inner products of all pairs of scans, float64 (N, N), with at most `voxelwise.HELD` voxels in memory.

    A block of scans is held while all later ones pass by: a scan is read once for its own block and
    once for every earlier one.

    Args:
        mask: bool (X, Y, Z), the voxels that count.
    """
    n = len(scans)
    blocks = batches(range(n), max(voxelwise.HELD // int(np.count_nonzero(mask)) - STREAMED, 1))
    gram = np.empty((n, n))
    with utils.progress(None, sum(n - block.start for block in blocks), desc="Gram matrix") as bar:
        for block in blocks:
            voxels = read_voxels(scans, block, mask)  # (B, V)
            gram[block.start : block.stop, block.start : block.stop] = inner_products(voxels, voxels)
            bar.update(len(block))
            for rows in batches(range(block.stop, n), STREAMED):
                part = inner_products(voxels, read_voxels(scans, rows, mask))
                gram[block.start : block.stop, rows.start : rows.stop] = part
                gram[rows.start : rows.stop, block.start : block.stop] = part.T
                bar.update(len(rows))
            del voxels  # before the next block is read
    return gram


def inner_products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left @ right.T of float32 (A, V) and (B, V), as float64 throughout, (A, B)."""
    total = np.zeros((len(left), len(right)))
    for chunk in chunks(*left.shape):
        total += left[:, chunk].astype(np.float64) @ right[:, chunk].astype(np.float64).T
    return total
