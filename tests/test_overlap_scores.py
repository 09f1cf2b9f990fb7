"""overlap_scores.py: scores against their definitions, smoothing, floors, intervals and the ranking."""

import math

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from cohorts import AFFINE, OBLIQUE, white
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nilearn.image import smooth_img
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from brain_maps import GROUPS
from overlap_scores import (
    BrainMask,
    add_intervals,
    add_random,
    bootstrap_interval,
    dice_curve,
    overlap_scores,
    random_floor,
    rank,
)


def plain_dice(taken: list[bool], reference: list[bool]) -> float:
    """2 TP / (2 TP + FP + FN), voxel by voxel."""
    pairs = list(zip(taken, reference, strict=True))
    tp = sum(a and b for a, b in pairs)
    return 2 * tp / (2 * tp + sum(a and not b for a, b in pairs) + sum(b and not a for a, b in pairs))


def plain_curve(values: np.ndarray, reference: np.ndarray) -> tuple[list[float], list[float]]:
    low, high = float(values.min()), float(values.max())
    thresholds = [low + i * (high - low) / 49 for i in range(49)] + [high]  # fifty
    return thresholds, [plain_dice([v >= t for v in values], list(reference)) for t in thresholds]


def plain_matched(values: np.ndarray, reference: np.ndarray) -> float:
    """Mean share of the reference among the k largest voxels, over every way to order tied voxels."""
    k = int(reference.sum())
    cut = sorted(values)[-k]
    tied = [bool(r) for v, r in zip(values, reference, strict=True) if v == cut]
    above = [bool(r) for v, r in zip(values, reference, strict=True) if v > cut]
    # each of the tied voxels is drawn equally often
    return (sum(above) + (k - len(above)) * sum(tied) / len(tied)) / k


def check_scores(values: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    found = overlap_scores(values, reference)
    thresholds, dice = plain_curve(values, reference)
    assert np.allclose(dice_curve(values, reference), (thresholds, dice), rtol=1e-12, atol=1e-12)
    best = max(dice)
    assert found["dice"] == pytest.approx(best, rel=1e-12)
    assert found["threshold"] == pytest.approx(thresholds[dice.index(best)], rel=1e-12, abs=1e-12)
    assert found["dice_floor"] == pytest.approx(2 * reference.sum() / (len(values) + reference.sum()))
    assert found["dice_matched"] == pytest.approx(plain_matched(values, reference), rel=1e-12)
    pairs = [(p, n) for p in values[reference] for n in values[~reference]]
    assert found["auc"] == pytest.approx(sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs))
    assert found["auc"] == pytest.approx(roc_auc_score(reference, values), rel=1e-12)
    assert found["average_precision"] == pytest.approx(average_precision_score(reference, values), rel=1e-12)
    percent = 100 * found["threshold"] / values.max() if values.max() else math.nan
    assert found["percent_of_max"] == pytest.approx(percent, nan_ok=True)
    return found


# Steps of 49 that are exact in binary put voxels exactly on the thresholds.
TIED = st.sampled_from([0.0, 1.0, 2.0, 24.0, 24.5, 48.0, 49.0])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TIED, st.booleans()), min_size=2, max_size=40))
@example([(0.0, True), (0.0, False), (0.0, False)])  # constant maps
@example([(48.0, True), (48.0, False), (48.0, False)])
@example([(49.0, True), (0.0, False), (0.0, False)])  # a perfect one
def test_scores_by_definition_with_ties(voxels):
    values, reference = (np.array(column) for column in zip(*voxels, strict=True))
    if reference.any() and not reference.all():
        check_scores(values, reference)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_by_definition_without_ties(dtype):
    random = np.random.default_rng(0)
    reference = random.random(500) < 0.1
    values = (random.random(500) ** 2 + 0.3 * reference).astype(dtype)
    found = check_scores(values, reference)
    assert found["dice"] > found["dice_floor"] + 0.1


def test_scores_by_hand():
    # three largest: reference, other, reference; k = 3
    values = np.array([10.0, 9.0, 8.0, 1.0, 0.0, 0.0])
    reference = np.array([True, False, True, False, False, True])
    found = overlap_scores(values, reference)
    assert found["dice"] == pytest.approx(4 / 6)  # the three largest; all six give the same: 6 / 9
    assert found["dice_floor"] == pytest.approx(6 / 9)
    assert found["threshold"] == 0  # the lowest of equals
    assert found["dice_matched"] == pytest.approx(2 / 3)
    # pairs won by 10: 3, by 8: 2, by 0: 0.5, of 9
    assert found["auc"] == pytest.approx(5.5 / 9)
    assert found["average_precision"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 6) / 3)


@pytest.mark.parametrize("affine", [AFFINE, OBLIQUE])
def test_smoothing_is_the_weighted_mean_of_the_mask_in_mm(affine):
    """Against a double loop over the voxels of a ragged mask that touches the grid's border."""
    shape, fwhm, random = (5, 6, 7), 4.0, np.random.default_rng(0)
    mask = random.random(shape) < 0.6
    values = random.random(mask.sum()).astype(np.float32)
    places = nib.affines.apply_affine(affine, np.argwhere(mask))
    found = BrainMask(mask, affine).smooth(values, fwhm)
    for i, place in enumerate(places):
        weight = np.exp(-4 * math.log(2) * ((places - place) ** 2).sum(1) / fwhm**2)
        # scipy cuts the kernel at 4 sd, which leaves out less than 1e-4 of it per axis
        assert found[i] == pytest.approx((weight * values).sum() / weight.sum(), rel=2e-3)
    assert np.array_equal(BrainMask(mask, affine).smooth(values, 0), values)


def test_smoothing_agrees_with_nilearn_away_from_the_edge():
    values = white((20, 18, 22), 1)
    found = BrainMask(np.ones(values.shape, bool), AFFINE).smooth(values.ravel(), 4).reshape(values.shape)
    plain = smooth_img(nib.Nifti1Image(values, AFFINE), 4).get_fdata()
    inner = (slice(6, -6),) * 3
    assert np.allclose(found[inner], plain[inner], rtol=1e-5, atol=1e-6)  # float32 sums of both signs


@pytest.mark.parametrize("fwhm", [4.0, 7.0])
def test_smoothness_of_smoothed_noise_is_recovered_in_mm(fwhm):
    field = white((60, 60, 60), 0)
    for axis, size in enumerate((1.5, 2, 1.25)):
        field = ndimage.gaussian_filter1d(field, fwhm / size / math.sqrt(8 * math.log(2)), axis, mode="wrap")
    mask = np.zeros(field.shape, bool)
    mask[5:55, 8:58, 3:50] = True
    found = BrainMask(mask, AFFINE).smoothness(field[mask])
    assert found == pytest.approx(fwhm, rel=0.06)  # sampling error of one field of this size: about 2 %


def test_smoothness_ignores_what_lies_outside_the_mask():
    mask = white((16, 16, 16), 1) > -0.5
    values = np.indices((16, 16, 16)).sum(0)[mask].astype(np.float32)
    # every neighbouring pair differs by 1, so that all three axes have the same correlation
    correlation = 1 - 1 / (2 * values.var(dtype=float))
    expected = math.sqrt(-2 * math.log(2) / math.log(correlation))
    assert BrainMask(mask, np.eye(4)).smoothness(values) == pytest.approx(expected, rel=1e-4)  # float32 sums


def test_smoothness_of_extremes():
    brain, board = BrainMask(np.ones((10, 10, 10), bool), np.eye(4)), np.indices((10, 10, 10)).sum(0) % 2
    assert math.isnan(brain.smoothness(np.full(1000, 4.7, np.float32)))
    assert brain.smoothness(board.ravel().astype(np.float32)) == 0


X, Y, Z = np.indices((20, 22, 18))
ELLIPSOID = ((X - 9.5) / 10) ** 2 + ((Y - 10.5) / 11) ** 2 + ((Z - 8.5) / 9) ** 2 < 1
BALLS = (np.minimum((X - 5) ** 2, (X - 14) ** 2) + (Y - 10) ** 2 + (Z - 8) ** 2 <= 6)[ELLIPSOID]
BRAIN = BrainMask(ELLIPSOID, 2 * np.eye(4))


@pytest.mark.parametrize("fwhm", [0.0, 6.0])
def test_random_maps_exceed_their_floor_one_time_in_twenty(fwhm):
    """Signed white noise, its magnitude taken and smoothed as a map's is, judged by its own smoothness."""
    floor = random_floor(BALLS, BRAIN, largest=10, seed=1)
    exceeded, n = np.zeros(2), 400
    for draw in range(n):
        values = BRAIN.smooth(np.abs(white((ELLIPSOID.sum(),), 1000 + draw)), fwhm)
        found, size = overlap_scores(values, BALLS), BRAIN.smoothness(values)
        for i, score in enumerate(("dice", "dice_matched")):
            exceeded[i] += found[score] > np.interp(size, floor["smoothness_mm"], floor[score])
    # 5 %; the percentile is known from 100 draws (sd 2.2 %), the share from 400 (sd 1.1 %)
    assert np.all((exceeded / n > 0.01) & (exceeded / n < 0.12)), exceeded / n


def test_random_floor_rises_with_smoothness_and_reaches_far_enough():
    floor, again, other = (random_floor(BALLS, BRAIN, largest=9.0, seed=seed) for seed in (0, 0, 1))
    assert floor["smoothness_mm"].is_monotonic_increasing
    assert floor["smoothness_mm"].iloc[0] < 2 < 9 < floor["smoothness_mm"].iloc[-1]
    assert floor["dice"].iloc[-1] > 1.3 * floor["dice"].iloc[0]
    assert (floor["dice_matched"] > BALLS.mean()).all()  # chance
    assert floor.equals(again)
    assert not floor.equals(other)


def test_random_maps_stand_beside_maps_of_their_smoothness():
    floor = pd.DataFrame({"smoothness_mm": [1.0, 3.0], "dice": [0.1, 0.3], "dice_matched": [0.0, 0.1]})
    rows = [("A", "0", 2.0), ("A", "all", 1.5), ("B", "all", 2.5), ("edges", "all", 9.0)]
    table = pd.DataFrame(rows, columns=["method", "fold", "smoothness_mm"]).assign(fwhm_mm=8)
    found = add_random(table, floor)
    assert np.allclose(found["random_dice"][:4], [0.2, 0.15, 0.25, 0.3])
    assert np.allclose(found["random_dice_matched"][:4], [0.05, 0.025, 0.075, 0.1])
    # the floor of the smoothest mean map of a METHOD
    assert found.iloc[4][["method", "fold", "fwhm_mm"]].tolist() == ["random", "all", 8]
    assert found.iloc[4][list(floor)].tolist() == pytest.approx([2.5, 0.25, 0.075])


def test_interval_by_definition():
    values = np.array([0.1, 0.25, 0.2, 0.4])
    means = [np.mean(draw) for draw in np.stack(np.meshgrid(*[values] * 4), -1).reshape(-1, 4)]
    # the percentiles of all 256 draws, to one step between neighbouring means
    assert np.allclose(bootstrap_interval(values, seed=0), np.percentile(means, [2.5, 97.5]), atol=0.012)
    assert bootstrap_interval(np.full(5, 0.25), seed=3) == (0.25, 0.25)  # of equal folds


def test_interval_has_a_seed():
    values = np.random.default_rng(0).random((2, 5))
    first, again, other = (bootstrap_interval(values, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.allclose(first, other, atol=0.02)  # 10,000 draws: the ends' error is below 0.005
    assert np.array_equal(bootstrap_interval(values[1], 0), [first[0][1], first[1][1]])


@pytest.mark.parametrize(("folds", "expected"), [(5, 0.83), (20, 0.92)])
def test_intervals_of_few_folds_are_too_narrow(folds, expected):
    """What the README says of five folds. The spread of a share of 1000 intervals is 0.012 at most."""
    values = np.random.default_rng(0).standard_normal((1000, folds))
    low, high = bootstrap_interval(values, seed=1)
    assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(expected, abs=0.03)


FOLDS = {
    "A": [0.50, 0.60, 0.40, 0.55, 0.45],
    "B": [0.48, 0.57, 0.38, 0.52, 0.44],  # overlaps with A, and is below it in every fold
    "C": [0.44, 0.60, 0.35, 0.56, 0.40],  # below B on average, but not throughout
    "A-random": [0.20, 0.10, 0.15, 0.12, 0.30],
    "B-permuted": [0.10, 0.20, 0.30, 0.22, 0.11],
}


def scored(means: dict[str, float]) -> pd.DataFrame:
    """Dice of FOLDS at one smoothing, the given ones of the mean maps, an edge filter's, and intervals."""
    rows = [(m, str(fold), value) for m in means for fold, value in enumerate(FOLDS[m])]
    rows += [(m, "all", value) for m, value in {**means, "edges": 0.05}.items()]
    table = pd.DataFrame(rows, columns=["method", "fold", "dice"]).assign(fwhm_mm=8)
    return add_intervals(table.assign(dice_matched=table["dice"] / 2), 0)


MEANS = {"C": 0.6, "A": 0.8, "B": 0.7, "A-random": 0.65}


def test_better_only_where_the_paired_interval_is_above_zero():
    ranked = rank(scored(MEANS), 8, 0).set_index("method")
    assert list(ranked.index) == ["A", "B", "A-random", "C", "edges"]
    assert ranked["than_the_next"].fillna("").tolist() == ["better", "not separated", "", "", ""]
    for name, following in (("A", "B"), ("B", "C")):
        gain = np.subtract(FOLDS[name], FOLDS[following])
        row = ranked.loc[name, ["difference", "difference_low", "difference_high"]].astype(float)
        assert np.allclose(row, [gain.mean(), *bootstrap_interval(gain, 0)])
    assert (ranked["edges_dice"] == 0.05).all()
    # their own intervals overlap: only pairing by fold tells A from B
    assert ranked["dice_low"]["A"] < ranked["dice_high"]["B"]
    # never where the folds say the opposite of the mean map
    ranked = rank(scored({"A": 0.6, "B": 0.7}), 8, 0)
    assert ranked["method"].tolist() == ["B", "A", "edges"]
    assert ranked["than_the_next"].fillna("").tolist() == ["not separated", "", ""]


def test_gain_over_the_untrained_network_is_paired():
    def with_interval(values: np.ndarray) -> np.ndarray:
        return np.array([values.mean(), *bootstrap_interval(values, 0)])

    table = scored(MEANS).query("fold == 'all'").set_index("method")
    expected = with_interval(np.subtract(FOLDS["A"], FOLDS["A-random"]))
    for name, factor in (("minus_untrained", 1), ("minus_untrained_matched", 0.5)):
        found = table.loc["A", [name, f"{name}_low", f"{name}_high"]].astype(float)
        assert np.allclose(found, factor * expected)
        assert table.loc[["B", "C", "A-random", "edges"], name].isna().all()
    assert table["untrained_dice"].dropna().to_dict() == {"A": MEANS["A-random"]}
    found = table.loc["A-random", ["dice_folds_mean", "dice_low", "dice_high"]].astype(float)
    assert np.allclose(found, with_interval(np.array(FOLDS["A-random"])))


def test_gain_over_networks_trained_on_permuted_labels_is_one_more_floor():
    ranked = rank(scored(MEANS | {"B-permuted": 0.62}), 8, 0).set_index("method")
    gain = np.subtract(FOLDS["B"], FOLDS["B-permuted"])
    found = ranked.loc["B", ["minus_permuted", "minus_permuted_low", "minus_permuted_high"]].astype(float)
    assert np.allclose(found, [gain.mean(), *bootstrap_interval(gain, 0)])
    assert ranked["minus_permuted"].notna().sum() == 1
    assert ranked["permuted_dice"].dropna().to_dict() == {"B": 0.62}
    assert ranked["permuted_dice_matched"].dropna().to_dict() == {"B": 0.31}
    # a floor is not compared with what follows it, nor is anything with a floor
    assert ranked["than_the_next"].dropna().index.tolist() == ["A", "B"]


def test_maps_of_groups_stand_beside_that_of_all():
    table = scored({"A": 0.8, "B": 0.7})
    groups = pd.DataFrame({"method": "A", "fold": ["controls", "patients"], "dice": [0.3, 0.6], "fwhm_mm": 8})
    table = pd.concat([table, groups.assign(dice_matched=[0.2, 0.5])], ignore_index=True)
    ranked = rank(table, 8, 0).set_index("method")
    row = ranked.loc[
        "A", ["controls_dice", "controls_dice_matched", "patients_dice", "patients_dice_matched"]
    ]
    assert row.tolist() == [0.3, 0.2, 0.6, 0.5]
    assert ranked.loc[["B", "edges"], "patients_dice"].isna().all()
    assert ranked.index.tolist() == ["A", "B", "edges"]
    again = add_intervals(table[["method", "fold", "fwhm_mm", "dice", "dice_matched"]], 0)
    assert again.loc[again["fold"].isin(GROUPS), "dice_low"].isna().all()
