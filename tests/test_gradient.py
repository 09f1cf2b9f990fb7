"""gradient.py: gradients by hand, against autograd and captum; the noise of SmoothGrad."""

import pytest
import torch
from captum.attr import InputXGradient, Saliency
from networks import (
    CASES,
    Case,
    check_nearly_equal,
    difference,
    example,
    head_in_zeros,
    mixed_targets,
    network_by_hand,
    on_diagonal,
    over_cases,
    random_network,
    smallest_network,
)
from places import Place, over_places
from torch import Tensor

from gradient import NoisyScan, gradient, input_times_gradient, smoothgrad
from models import CNN3d

ONE = torch.tensor([1])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")


def autograd(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    image = volume.detach().requires_grad_()
    return torch.autograd.grad(model(image).gather(1, target[:, None]).sum(), image)[0]


def naive_smoothgrad(
    model: CNN3d, volume: Tensor, target: Tensor, samples: int, sigma: float, seeds: list[int]
) -> Tensor:
    """Autograd at every noisy copy of every scan, one by one."""
    means = []
    for scan, logit, seed in zip(volume.split(1), target.split(1), seeds, strict=True):
        generator, total = torch.Generator().manual_seed(seed), torch.zeros_like(scan)
        for _ in range(samples):
            noise = torch.zeros_like(scan)
            noise[scan != 0] = torch.randn((scan != 0).sum(), generator=generator, dtype=scan.dtype)
            total += autograd(model, scan + sigma * (scan.max() - scan.min()) * noise, logit)
        means.append(total / samples)
    return torch.cat(means)


@over_places
@over_cases
@pytest.mark.parametrize("batch", [1, 3])
def test_gradient_equals_autograd_and_captum(place: Place, case: Case, batch: int):
    model, volume, target = example(case, batch)
    found = place.do(gradient, model, volume, target)
    assert difference(found, autograd(model, volume, target)) < place.oracle
    assert difference(found, Saliency(model).attribute(volume, target, abs=False).detach()) < place.oracle


@over_places
@over_cases
def test_input_times_gradient_equals_captum(place: Place, case: Case):
    """On a head in zeros, around which nothing is computed."""
    model, volume, target = random_network(case), head_in_zeros(case, 2), mixed_targets(2)
    found = place.do(input_times_gradient, model, volume, target)
    assert difference(found, InputXGradient(model).attribute(volume, target).detach()) < place.oracle


@over_places
@over_cases
def test_smoothgrad_equals_autograd_at_the_same_copies(place: Place, case: Case):
    model, volume, target = random_network(case), head_in_zeros(case, 2), mixed_targets(2)
    volume = torch.where(volume > 0, 0.5 * volume + 0.25, 0)  # its range is not 1
    found = place.do(smoothgrad, model, volume, target, 3, 0.2, [5, 6])
    assert difference(found, naive_smoothgrad(model, volume, target, 3, 0.2, [5, 6])) < place.oracle


@pytest.mark.parametrize("family", ["B", "C"])
def test_smallest_published_grid(family: str):
    model, volume = smallest_network(family)
    expected = Saliency(model).attribute(volume, ONE, abs=False).detach()
    check_nearly_equal(gradient(model, volume, ONE), expected)
    check_nearly_equal(input_times_gradient(model, volume, ONE), expected * volume)
    check_nearly_equal(
        smoothgrad(model, volume, ONE, 2, 0.1, [3]), naive_smoothgrad(model, volume, ONE, 2, 0.1, [3])
    )


def test_network_by_hand():
    """See `network_by_hand`. At the scan h0 and h2 are open: logit 1 has slopes (2, -3, 4) at f0, f1, f2.

    Before BatchNorm (1, -3, -8): f0 at 000 reads (1, 3, 0) of the diagonal, f1 at 111 (0, 2, -1), f2 at 111
    (0, -1, 1); so the gradient is (1, 3, 0) - 3 (0, 2, -1) - 8 (0, -1, 1) = (1, 5, -5).
    """
    model, volume = network_by_hand()
    tolerance = {"rtol": 1e-13, "atol": 1e-13}  # a dozen float64 operations
    torch.testing.assert_close(gradient(model, volume, ONE), on_diagonal(1, 5, -5), **tolerance)
    torch.testing.assert_close(input_times_gradient(model, volume, ONE), on_diagonal(1, 15, -10), **tolerance)


def test_noise_is_each_scans_own():
    """Whatever else is in the batch, and in which order: the map of a scan is that of its seed."""
    model, volume, target = example(CASES["B"], 3)
    together = smoothgrad(model, volume, target, 2, 0.1, [7, 8, 9])
    order = [2, 0, 1]
    apart = smoothgrad(model, volume[order], target[order], 2, 0.1, [9, 7, 8])
    assert difference(apart, together[order]) < 1e-11  # float64 sums in another order
    assert difference(smoothgrad(model, volume, target, 2, 0.1, [7, 8, 10])[2:], together[2:]) > 0.01


def test_noise_is_normal_where_the_scan_is_not_zero():
    scan = torch.ones(1, 40, 40, 40)
    scan[:, :10], scan[:, 10:20] = 0, 3
    noisy = NoisyScan(scan, 1, 0.2)
    drawn = [(noisy.copy() - scan) / (0.2 * 3) for _ in range(2)]
    assert drawn[0][:, :10].eq(0).all()
    first, second = (noise[:, 10:] for noise in drawn)
    for noise in (first, second):  # 48,000 draws: five standard errors are 0.023 and 0.016
        assert abs(noise.mean()) < 0.023
        assert abs(noise.std() - 1) < 0.016
    assert abs((first * second).mean()) < 0.023


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"samples": 0}, "samples"),
        ({"sigma": 0}, "sigma"),
        ({"sigma": torch.nan}, "sigma"),
        ({"seeds": [1]}, "seeds"),
    ],
)
def test_bad_options(changes, wrong):
    model, volume, target = example(CASES["one block"], 2)
    with pytest.raises(ValueError, match=f"{wrong}: expected"):
        smoothgrad(model, volume, target, **changes)
