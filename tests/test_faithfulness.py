"""faithfulness.py: cubes, orders, and curves against covered scans put through the plain network."""

import itertools

import numpy as np
import pytest
import torch
from networks import CASES, over_cases, random_network, random_volume

import faithfulness
from faithfulness import POINTS, CoveredScan, divide, falling_order, first_cubes, gain


def test_cubes_of_eight_millimetres():
    """Of 4 x 2 x 1 voxels of 2, 4.4 and 9 mm; cubes without brain have no number."""
    brain = np.zeros((9, 4, 3), bool)
    brain[3:6, 1, 0] = brain[0, 0, 2] = brain[8, 3, 1] = True
    #  voxels in C order: (0,0,2) (3,1,0) (4,1,0) (5,1,0) (8,3,1)
    assert divide(brain, (2, 4.4, 9)).tolist() == [1, 0, 2, 2, 3]


def test_cubes_smaller_than_voxels_are_voxels():
    assert divide(np.ones((2, 1, 2), bool), (20, 20, 20)).tolist() == [0, 1, 2, 3]


def test_largest_sum_is_first():
    values, cubes = np.array([1.0, 5, -3, 2, 2, 0.5]), np.array([0, 1, 1, 2, 2, 3])
    assert falling_order(values, cubes, seed=0).tolist() == [2, 1, 0, 3]  # sums 1, 2, 4, 0.5
    assert falling_order(-values, cubes, seed=0).tolist() == [3, 0, 1, 2]


def test_ties_come_in_the_order_of_white_noise():
    cubes = np.repeat(np.arange(40), [4] * 39 + [400])
    orders = [falling_order(np.zeros(len(cubes)), cubes, seed) for seed in range(200)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert np.array_equal(orders[3], falling_order(np.zeros(len(cubes)), cubes, 3))
    noise = np.random.default_rng(3).standard_normal(len(cubes))
    assert np.array_equal(orders[3], np.argsort([-noise[cubes == cube].sum() for cube in range(40)]))
    places = np.argsort(orders, axis=1)
    # the mean of 200 places of 0 to 39, of variance (40^2 - 1) / 12, within five standard errors
    assert np.abs(places.mean(0) - 19.5)[:39].max() < 5 * np.sqrt((40**2 - 1) / 12 / 200)
    # a sum of a hundred times as many voxels is beyond the largest of the others in 83 % of the draws
    assert np.isin(places[:, 39], [0, 39]).mean() > 0.7
    some = falling_order(np.where(cubes == 7, 1.0, 0), cubes, 3)
    assert some.tolist() == [7, *(cube for cube in orders[3] if cube != 7)]


def test_first_cubes_hold_a_share_of_the_voxels():
    cubes, order = (
        np.repeat([0, 1, 2, 3], [1, 5, 2, 8]),
        np.array([2, 0, 3, 1]),
    )  # 2, 3, 11, 16 voxels are held
    wanted = {
        0: [],
        1 / 16: [2],
        2 / 16: [2],
        3 / 16: [0, 2],
        0.25: [0, 2, 3],
        0.7: [0, 1, 2, 3],
        1: [0, 1, 2, 3],
    }
    for share, chosen in wanted.items():
        assert np.flatnonzero(first_cubes(order, cubes, share)).tolist() == chosen


@over_cases
def test_curve_is_that_of_the_covered_scan(case):
    """Every point by the plain network, float64: the scan with the voxels of some cubes replaced."""
    model, volume, filling = random_network(case), random_volume(case), random_volume(case, seed=9)
    volume[:, :, -4:] = 0
    brain = np.zeros(case.grid, bool)
    brain[3:-2, 4:-3, 1:-2] = True  # in places where the scan is zero, too
    cubes = divide(brain, (2.5, 3, 4))
    order = falling_order(np.random.default_rng(0).standard_normal(len(cubes)), cubes, 0)
    for shown, way in itertools.product((torch.zeros_like(filling), filling), faithfulness.WAYS):
        found = CoveredScan(model, volume, shown, brain, cubes).curve(order, way)
        assert found.shape == (len(POINTS), 2)
        for share, logits in zip(POINTS, found, strict=True):
            first, held = set(), 0
            for cube in order:
                if held < share * brain.sum():
                    first.add(cube)
                    held += (cubes == cube).sum()
            hidden = np.isin(cubes, list(first), invert=way == "insertion")
            scan = volume.clone()
            scan[0, 0][torch.from_numpy(brain)] = torch.where(
                torch.from_numpy(hidden),
                shown[0, 0][torch.from_numpy(brain)],
                volume[0, 0][torch.from_numpy(brain)],
            )
            with torch.no_grad():
                expected = model(scan)[0].numpy()
            assert np.allclose(logits, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_network_is_left_as_found():
    case = CASES["one block"]
    model = random_network(case).train()
    brain = np.ones(case.grid, bool)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    covered = CoveredScan(model, random_volume(case), random_volume(case), brain, divide(brain, (3, 3, 3)))
    covered.curve(np.arange(covered.cubes.max() + 1), "deletion")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gain_is_the_mean_difference_between_the_ends():
    other = np.zeros(len(POINTS))
    curve = np.array([9.0, 6, 5, 4, 3, 2, 1, 9])  # 3.5 in the mean of the six between
    assert gain(curve, other, "insertion") == pytest.approx(3.5)
    assert gain(curve, other, "deletion") == pytest.approx(-3.5)
    assert gain(curve, curve, "deletion") == 0
