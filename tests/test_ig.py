"""ig.py: the left Riemann sum by hand, against autograd and captum, and its completeness."""

from functools import cache

import pytest
import torch
from captum.attr import IntegratedGradients
from networks import (
    CASES,
    Case,
    arguments,
    assemble,
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

import ig
import models
from ig import integrated_gradients
from internals import folded
from models import CNN3d

ONE = torch.tensor([1])

# A gradient is a sum of a few thousand float64 terms, in another order: about 1e-13. It jumps only
# where a pool's two largest or a relu's input come within that of each other, and none do here.
ORACLE = 1e-10


def baseline_like(volume: Tensor, one_for_all: bool) -> Tensor:
    """A baseline without ties: a mean scan is nowhere quite black inside the head."""
    generator = torch.Generator().manual_seed(7)
    baseline = torch.rand(volume.shape, generator=generator, dtype=volume.dtype) / 2
    return baseline[:1] if one_for_all else baseline


def gradient(model: CNN3d, image: Tensor, target: Tensor) -> Tensor:
    """dF/dx of each scan's target logit, by autograd through the layers as they are."""
    image = image.detach().requires_grad_()
    logits = model(image).gather(1, target[:, None])
    return torch.autograd.grad(logits.sum(), image)[0]


def naive_ig(
    model: CNN3d, volume: Tensor, target: Tensor, steps: int, baseline: Tensor | None = None, first: int = 0
) -> Tensor:
    """The left Riemann sum as it is written down, from step number `first` on."""
    start = torch.zeros_like(volume) if baseline is None else baseline
    total = torch.zeros_like(volume)
    for step in range(first, steps):
        total += gradient(model, start + step / steps * (volume - start), target)
    return (volume - start) * total / steps


def without_blank(model: CNN3d, volume: Tensor, target: Tensor, steps: int) -> Tensor:
    """integrated_gradients without its term at alpha = 0.

    That term is IG(1) / steps. It is the gradient at a blank image, where every window of the deeper
    pools is tied up to the rounding noise of the convolution's edge kernels: any reference picks its
    maxima by that noise. All other terms are well defined, and this isolates them.
    """
    one = integrated_gradients(model, volume, target, 1)
    return integrated_gradients(model, volume, target, steps) - one / steps


@cache
def explained(
    case: Case, batch: int, one_for_all: bool | None
) -> tuple[CNN3d, Tensor, Tensor, Tensor, Tensor]:
    """A network, scans, targets, a baseline and the plain maps, the same for all places.

    Without `one_for_all` the baseline is blank, and its own term is left out.
    """
    model, volume, target = example(case, batch)
    baseline = torch.zeros_like(volume) if one_for_all is None else baseline_like(volume, one_for_all)
    expected = naive_ig(model, volume, target, 5, baseline, first=int(one_for_all is None))
    return model, volume, target, baseline, expected


@over_places
@over_cases
@pytest.mark.parametrize("batch", [1, 3])
def test_zero_baseline_equals_autograd(place: Place, case: Case, batch: int):
    model, volume, target, _, expected = explained(case, batch, None)
    assert difference(place.do(without_blank, model, volume, target, 5), expected) < place.oracle


@over_places
@over_cases
@pytest.mark.parametrize(("batch", "one_for_all"), [(1, False), (3, True)])
def test_other_baselines_equal_autograd(place: Place, case: Case, batch: int, one_for_all: bool):
    model, volume, target, baseline, expected = explained(case, batch, one_for_all)
    found = place.do(integrated_gradients, model, volume, target, 5, baseline)
    assert difference(found, expected) < place.oracle


@over_cases
@pytest.mark.parametrize("slab", [1, 2**40])
def test_head_in_zeros_equals_autograd(monkeypatch, case: Case, slab: int):
    """Only a box around the head is worked on, in slabs; the blank image's term is left out, as above."""
    monkeypatch.setattr(folded, "SLAB", slab)
    model, volume, target = random_network(case), head_in_zeros(case, 2), mixed_targets(2)
    found = without_blank(model, volume, target, 4)
    assert difference(found, naive_ig(model, volume, target, 4, first=1)) < ORACLE
    baseline = head_in_zeros(case).flip(2, 3, 4) / 3
    found = integrated_gradients(model, volume, target, 4, baseline)
    assert difference(found, naive_ig(model, volume, target, 4, baseline)) < ORACLE


@pytest.mark.parametrize("blocks", [((5, 2),), ((3, 3), (3, 1)), ((5, 2), (3, 1), (3, 1))])
@pytest.mark.parametrize("steps", [1, 4])
def test_blank_image_included(blocks: tuple[tuple[int, int], ...], steps: int):
    """Without a pool behind the first, the blank image's maxima are defined: the first of equals."""
    model, volume, target = example(Case(blocks, (17, 20, 18)))
    with torch.no_grad():
        for layers in model.blocks():
            layers.norm.bias.add_(1)  # open where the image is blank
    expected = naive_ig(model, volume, target, steps)
    assert difference(integrated_gradients(model, volume, target, steps), expected) < ORACLE


@pytest.mark.parametrize("baseline", [False, True])
def test_steps_taken_together_or_alone(monkeypatch, baseline: bool):
    """However many steps fit into a chunk, also where they do not divide, the sum is the same."""
    model, volume, target = example(CASES["B"], 3)
    start = baseline_like(volume, one_for_all=True) if baseline else None
    maps = []
    for chunk in (1, 2**18, 2**30):
        monkeypatch.setattr(ig, "CHUNK", chunk)
        maps.append(integrated_gradients(model, volume, target, 8, start))
    assert difference(maps[1], maps[0]) < 1e-12  # float64 sums in another order
    assert difference(maps[2], maps[0]) < 1e-12


def test_default_is_a_hundred_steps_from_black():
    model, volume, target = example(CASES["one block"])
    expected = naive_ig(model, volume, target, 100)
    assert difference(integrated_gradients(model, volume, target), expected) < ORACLE
    # and a scan that is its baseline gets zeros
    assert integrated_gradients(model, volume, target, 3, volume).eq(0).all()


def test_network_by_hand():
    """See `network_by_hand`. Gradient of logit 1 at (v000, v111, v222) for alpha = 0, 1/4, 1/2, 3/4.

    Behind an open h0, h1, h2 the pooled f0, f1, f2 have the slopes (2, -2, 4), (-4, 0, 0), (0, -1, 0).
    f0 = (10 alpha - 2) / 2 at 000, slope 1/2 (1, 3, 0); f1 = 4 alpha + 1 at 111, slope (0, 2, -1);
    f2 = 2 alpha + 1 at 111, slope -2 (0, -1, 1); h1 = 1 - f0 is open while f0 < 1.

    alpha   f0          f1               f2              h1     gradient
    0       shut        at 000: (2,-1)   at 000: (2,-2)  open   -3 (2, -1, 0) + 4 (2, -2, 0) = (2, -5, 0)
    1/4     1/4         2                3/2             open   -1 (1, 3, 0) - 3 (0, 2, -1)
                                                                + 4 (0, 2, -2) = (-1, -1, -5)
    1/2     3/2         3                2               shut   (1, 3, 0) + (0, 2, -5) = (1, 5, -5)
    3/4     11/4        4                5/2             shut   (1, 5, -5)

    (At alpha = 0 all windows are tied and the first voxel wins.) The mean, times the scan (1, 3, 2):
    """
    model, volume = network_by_hand()
    found = integrated_gradients(model, volume, ONE, steps=4)
    expected = on_diagonal(1 * (2 - 1 + 1 + 1) / 4, 3 * (-5 - 1 + 5 + 5) / 4, 2 * (0 - 5 - 5 - 5) / 4)
    # a dozen float64 operations
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_network_by_hand_from_half_the_scan():
    """From v / 2 to v the gradient is (1, 5, -5) throughout: times v / 2, for any number of steps."""
    model, volume = network_by_hand()
    for steps in (1, 3):
        found = integrated_gradients(model, volume, ONE, steps, baseline=volume / 2)
        torch.testing.assert_close(found, on_diagonal(0.5, 7.5, -5), rtol=1e-13, atol=1e-13)
    # F(v) = 8 and F(v / 2) = 2 * 3.5 - 3 + 1 = 5: with a constant gradient, complete
    assert found.sum().item() == pytest.approx(3, rel=1e-12)


@over_cases
@pytest.mark.parametrize("baseline", [False, True])
def test_completeness_falls_like_one_over_steps(case: Case, baseline: bool):
    """sum(map) -> F(x) - F(b), and steps * error stays where it is: the gradient jumps along the line."""
    model, volume, target = example(case)
    start = baseline_like(volume, one_for_all=True) if baseline else torch.zeros_like(volume[:1])
    change = (model(volume) - model(start)).gather(1, target[:, None]).flatten().detach()

    def constant(steps: int) -> float:
        found = integrated_gradients(model, volume, target, steps, start if baseline else None)
        return steps * float((found.flatten(1).sum(1) - change).abs().max())

    coarse = max(constant(steps) for steps in (2, 3, 4, 5))
    assert coarse > 0.01  # the line does cross jumps
    # the constant differs from one number of steps to the next, by less than this factor; a sum that
    # went elsewhere would have it grow like the steps
    assert constant(16) < 3 * coarse
    assert constant(64) < 3 * coarse


def captum_ig(model: CNN3d, volume: Tensor, target: Tensor, steps: int, start: Tensor | None) -> Tensor:
    """captum keeps its step sizes in float32; powers of two are exact in it."""
    return IntegratedGradients(model).attribute(
        volume, start, target, n_steps=steps, method="riemann_left", internal_batch_size=len(volume)
    )


@over_cases
def test_equals_captum(case: Case):
    """From black, 8 IG(8) - 4 IG(4) is the sum over the odd eighths: in both is the blank image's term."""
    model, volume, target = example(case)
    start = baseline_like(volume, one_for_all=False)
    found, expected = (
        method(model, volume, target, 4, start) for method in (integrated_gradients, captum_ig)
    )
    assert difference(found, expected) < ORACLE
    found, expected = (
        8 * method(model, volume, target, 8, None) - 4 * method(model, volume, target, 4, None)
        for method in (integrated_gradients, captum_ig)
    )
    assert difference(found, expected) < ORACLE


@pytest.mark.parametrize("family", models.FAMILIES)
def test_smallest_published_grid(family: str):
    model, volume = smallest_network(family)
    check_nearly_equal(without_blank(model, volume, ONE, 2), naive_ig(model, volume, ONE, 2, first=1))


@pytest.mark.parametrize("shape", [(8, 8, 8), (1, 1, 8, 8, 9), (2, 1, 8, 8, 8), (1, 2, 8, 8, 8), (1,)])
def test_bad_baseline_and_steps(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="baseline"):
        integrated_gradients(**arguments(), baseline=torch.rand(shape))
    for steps in (0, -1):
        with pytest.raises(ValueError, match="steps"):
            integrated_gradients(**arguments(), steps=steps)


def test_no_block_behind_the_first_is_needed():
    """The pooled grid may be a single voxel."""
    model = assemble(((3, 2),), (4, 4, 4))
    volume = torch.rand(1, 1, 4, 4, 4, dtype=torch.float64)
    found = integrated_gradients(model, volume, ONE, 4)
    assert difference(found, naive_ig(model, volume, ONE, 4)) < ORACLE
