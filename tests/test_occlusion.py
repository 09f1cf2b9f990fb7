"""occlusion.py: against every cube covered in turn, and against captum."""

import itertools
from functools import cache

import pytest
import torch
from captum.attr import Occlusion
from networks import (
    CASES,
    Case,
    difference,
    example,
    head_in_zeros,
    mixed_targets,
    network_by_hand,
    over_cases,
    random_network,
    smallest_network,
)
from places import Place, over_places
from torch import Tensor

import models
import occlusion as rooms
from internals.folded import FoldedNetwork
from models import CNN3d
from occlusion import cube_in_voxels, occlusion

ONE = torch.tensor([1])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")


@torch.no_grad()
def naive(model: CNN3d, volume: Tensor, target: Tensor, edge: int, step: int, filling: Tensor) -> Tensor:
    """Every cube covered, the whole network run again."""
    picked = target[:, None]
    whole, total, count = model(volume).gather(1, picked), torch.zeros_like(volume), torch.zeros_like(volume)
    starts = [range(0, max(length - edge, 0) + step, step) for length in volume.shape[2:]]
    for start in itertools.product(*starts):
        cube = (..., *(slice(begin, begin + edge) for begin in start))
        covered = volume.clone()
        covered[cube] = filling.expand_as(volume)[cube]
        total[cube] += (whole - model(covered).gather(1, picked))[..., None, None, None]
        count[cube] += 1
    return total / count


def captum(model: CNN3d, volume: Tensor, target: Tensor, edge: int, step: int, filling: Tensor) -> Tensor:
    method, windows = (
        Occlusion(model),
        {"sliding_window_shapes": (1, edge, edge, edge), "strides": (1, *[step] * 3)},
    )
    return method.attribute(volume, target=target, baselines=filling.expand_as(volume), **windows).detach()


@over_cases
@pytest.mark.parametrize("overlap", [0, 2])
def test_equals_every_cube_covered_in_turn_and_captum(case: Case, overlap: int):
    """Filled with zeros, and otherwise; captum divides by the number of cubes in float32, at 6e-8."""
    model, volume, target = random_network(case), head_in_zeros(case, 2), mixed_targets(2)
    edge = min(case.grid) // 2 - 1
    step = edge - overlap
    filling = 0.5 * volume[:1].flip(2) if overlap else torch.zeros_like(volume[:1])
    found = occlusion(model, volume, target, edge, step, filling if overlap else None)
    assert difference(found, naive(model, volume, target, edge, step, filling)) < 1e-10
    expected = captum(model, volume, target, edge, step, filling).double()
    assert difference(found, expected) < 2e-7


@cache
def explained() -> tuple[CNN3d, Tensor, Tensor, Tensor]:
    """A network, scans, targets and the plain maps, the same for all places."""
    model, volume, target = example(CASES["A three blocks"], 2)
    return model, volume, target, naive(model, volume, target, 15, 12, torch.zeros_like(volume[:1]))


@over_places
def test_on_every_device(place: Place):
    model, volume, target, expected = explained()
    assert difference(place.do(occlusion, model, volume, target, 15, 12), expected) < place.oracle


@pytest.mark.parametrize("family", models.FAMILIES)
def test_smallest_published_grid(family: str):
    model, volume = smallest_network(family)
    volume[:, :, :, 60:] = 0
    expected = naive(model, volume, ONE, 64, 50, torch.zeros_like(volume))
    assert difference(occlusion(model, volume, ONE, 64, 50), expected) < 1e-4  # of sums in float32


def test_cubes_are_counted_in_voxels_of_any_shape():
    model, volume, target = example(CASES["B"], 1)
    found = occlusion(model, volume, target, 12, 6, voxel_sizes=(2, 2, 2))
    assert torch.equal(found, occlusion(model, volume, target, 6, 3))
    assert [part.tolist() for part in cube_in_voxels(7, 2, (1, 2, 3))] == [[7, 4, 2], [2, 1, 1]]


def test_network_by_hand():
    """See `network_by_hand`. Voxel by voxel, what is before BatchNorm at 000 and 111, and what is pooled:

    without v000   f0 (7, 7), f1 (-3, 4), f2 (3, -1)   pooled 3.5, 5, 3   h0 = 5.5, h2 = 5, logit 7
    without v111   f0 (-1, 4), f1 (2, -2), f2 (-1, 2)  pooled 2, 3, 3     h0 = 6, h2 = 3, logit 10
    without v222   f0 (8, 1), f1 (-1, 6), f2 (2, -3)   pooled 4, 7, 7     h0 = 12, h2 = 7, logit 18

    The logit, 2 h0 - h2 + 1, is 8, so it falls by 1, -2 and -10.
    """
    model, volume = network_by_hand()
    found = occlusion(model, volume, ONE, 1, 1)
    expected = torch.zeros_like(volume)
    expected.view(27)[::13] = torch.tensor([1.0, -2, -10]).double()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_background_costs_nothing_and_few_cubes_are_held(monkeypatch):
    """Only cubes that change a voxel go through the network, as many at once as fit."""
    case = CASES["C"]
    model, volume = random_network(case), head_in_zeros(case)
    expected, seen = occlusion(model, volume, ONE, 5, 5), []
    honest = FoldedNetwork.classify
    monkeypatch.setattr(
        FoldedNetwork, "classify", lambda *given: (seen.append(len(given[1])), honest(*given))[1]
    )
    monkeypatch.setattr(rooms, "CHUNK", 20_000)
    assert difference(occlusion(model, volume, ONE, 5, 5), expected) < 1e-12
    cubes = torch.nn.functional.max_pool3d((volume != 0).double(), 5, ceil_mode=True).sum()
    assert sum(seen) == 1 + cubes < 0.6 * 5 * 7 * 6
    assert len(seen) > 3
    assert occlusion(model, 0 * volume, ONE, 5, 5).eq(0).all()


@pytest.mark.parametrize(
    ("size", "stride", "wrong"),
    [
        (1.5, 1, r"size 1.5: is smaller than a voxel, whose longest edge is 2 mm"),
        (4, 6, r"stride 6: leaves gaps"),
    ],
)
def test_bad_cubes(size, stride, wrong):
    model, volume, target = example(CASES["one block"], 1)
    with pytest.raises(ValueError, match=wrong):
        occlusion(model, volume, target, size, stride, voxel_sizes=(1, 2, 1))
