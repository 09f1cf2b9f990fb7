"""faithfulness.py: cubes, orders, and curves against covered scans put through the plain network."""

import itertools

import numpy as np
import pytest
import torch
from networks import CASES, over_cases, random_network, random_volume

import faithfulness
from faithfulness import POINTS, CoveredScan, divide, falling_order, gain


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


def test_ties_are_broken_by_chance():
    cubes = np.arange(40)
    orders = [falling_order(np.zeros(40), cubes, seed) for seed in range(200)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert np.array_equal(orders[3], falling_order(np.zeros(40), cubes, 3))
    # the mean of 200 places of 0 to 39, of variance (40^2 - 1) / 12, within five standard errors
    assert np.abs(np.mean(orders, 0) - 19.5).max() < 5 * np.sqrt((40**2 - 1) / 12 / 200)
    some = falling_order(np.where(cubes == 7, 1.0, 0), cubes, 3)
    assert some[7] == 0
    rest = cubes != 7  # in the order that chance alone gives
    assert np.array_equal(np.argsort(some[rest]), np.argsort(orders[3][rest]))


@over_cases
def test_curve_is_that_of_the_covered_scan(case):
    """Every point by the plain network, float64: the scan with the voxels of some cubes replaced."""
    model, volume, filling = random_network(case), random_volume(case), random_volume(case, seed=9)
    volume[:, :, -4:] = 0
    brain = np.zeros(case.grid, bool)
    brain[3:-2, 4:-3, 1:-2] = True  # in places where the scan is zero, too
    cubes = divide(brain, (2.5, 3, 4))
    count = cubes.max() + 1
    places = falling_order(np.random.default_rng(0).standard_normal(len(cubes)), cubes, 0)
    for shown, way in itertools.product((torch.zeros_like(filling), filling), faithfulness.WAYS):
        found = CoveredScan(model, volume, shown, brain, cubes).curve(places, way)
        assert found.shape == (len(POINTS), 2)
        for share, logits in zip(POINTS, found, strict=True):
            few = 0 if share == 0 else max(round(share * count), 1)
            hidden = places[cubes] < few if way == "deletion" else places[cubes] >= few
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
    covered.curve(np.arange(int(covered.cubes.max()) + 1), "deletion")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gain_is_the_mean_difference_between_the_ends():
    other = np.zeros(len(POINTS))
    curve = np.array([9.0, 6, 5, 4, 3, 2, 1, 9])  # 3.5 in the mean of the six between
    assert gain(curve, other, "insertion") == pytest.approx(3.5)
    assert gain(curve, other, "deletion") == pytest.approx(-3.5)
    assert gain(curve, curve, "deletion") == 0
