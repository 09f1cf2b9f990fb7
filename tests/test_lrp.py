"""lrp.py: the beta rule by hand, against the plain four-term rule, and its conservation."""

from itertools import product

import pytest
import torch
from networks import (
    CASES,
    Case,
    arguments,
    assemble,
    check_left_as_found,
    check_mode_does_not_matter,
    check_result_like_volume,
    check_scans_are_independent,
    difference,
    head_in_zeros,
    linear_stub,
    mixed_targets,
    network_by_hand,
    on_diagonal,
    over_bad_arguments,
    over_cases,
    plain_norms,
    random_network,
    random_volume,
    smallest_network,
)
from places import Place, over_places
from torch import Tensor

import models
from internals import folded
from lrp import lrp
from models import CNN3d

ONE = torch.tensor([1])

# Sums of a few thousand float64 terms in another order differ by about 1e-13 of the largest term;
# relevance of both signs, up to (1 + 2 beta) a layer, cancels from terms somewhat larger than the map.
ORACLE = 1e-10


# The plain rule ----------------------------------------------------------------------------------


def correlate(inputs: Tensor, weight: Tensor) -> Tensor:
    """Valid convolution, (B, C, X, Y, Z) by (n, C, k, k, k), added up tap by tap."""
    kernel = weight.shape[2]
    x, y, z = (edge - kernel + 1 for edge in inputs.shape[2:])
    total = torch.zeros(len(inputs), len(weight), x, y, z, dtype=inputs.dtype)
    for i, j, k in product(range(kernel), repeat=3):
        part = inputs[:, :, i : i + x, j : j + y, k : k + z]
        total += torch.einsum("bcxyz,nc->bnxyz", part, weight[:, :, i, j, k])
    return total


def spread(shares: Tensor, weight: Tensor) -> Tensor:
    """w transposed: every output's share, times the weight, added to each input it read."""
    kernel = weight.shape[2]
    x, y, z = shares.shape[2:]
    edges = (edge + kernel - 1 for edge in (x, y, z))
    total = torch.zeros(len(shares), weight.shape[1], *edges, dtype=shares.dtype)
    for i, j, k in product(range(kernel), repeat=3):
        part = torch.einsum("bnxyz,nc->bcxyz", shares, weight[:, :, i, j, k])
        total[:, :, i : i + x, j : j + y, k : k + z] += part
    return total


def naive_rule(a: Tensor, w: Tensor, relevance: Tensor, beta: float, epsilon: float) -> Tensor:
    """All four terms of the beta rule for one layer, whatever the sign of its inputs."""
    a_plus, a_minus, w_plus, w_minus = a.clamp(min=0), a.clamp(max=0), w.clamp(min=0), w.clamp(max=0)
    z_plus = correlate(a_plus, w_plus) + correlate(a_minus, w_minus)
    z_minus = correlate(a_plus, w_minus) + correlate(a_minus, w_plus)
    weight_plus = torch.ones_like(relevance)
    weight_minus = -torch.ones_like(relevance)  # alone, z- hands on + 1, in "- a wT[...]" below
    both = (z_plus != 0) & (z_minus != 0)
    weight_plus[both], weight_minus[both] = 1 + beta, beta
    share_plus, share_minus = torch.zeros_like(relevance), torch.zeros_like(relevance)
    some = z_plus != 0
    share_plus[some] = (weight_plus * relevance)[some] / (z_plus[some] + epsilon)
    some = z_minus != 0
    share_minus[some] = (weight_minus * relevance)[some] / (z_minus[some] - epsilon)
    return (
        a_plus * spread(share_plus, w_plus)
        + a_minus * spread(share_plus, w_minus)
        - a_plus * spread(share_minus, w_minus)
        - a_minus * spread(share_minus, w_plus)
    )


def naive_pool(values: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Maxima over the windows, and ones where they are, (B, n, X, Y, Z); the first of equals wins."""
    x, y, z = (edge // window for edge in values.shape[2:])
    best = torch.full((*values.shape[:2], x, y, z), -torch.inf, dtype=values.dtype)
    where = torch.zeros(best.shape, dtype=torch.int64)
    taps = list(product(range(window), repeat=3))
    cut = [
        values[:, :, i : x * window : window, j : y * window : window, k : z * window : window]
        for i, j, k in taps
    ]
    for number, part in enumerate(cut):
        better = part > best
        best[better], where[better] = part[better], number
    ones = torch.zeros_like(values)
    for number, (i, j, k) in enumerate(taps):
        ones[:, :, i : x * window : window, j : y * window : window, k : z * window : window] = (
            where == number
        ).double()
    return best, ones


def naive_lrp(model: CNN3d, volume: Tensor, target: Tensor, beta: float, epsilon: float) -> Tensor:
    """The definition in design.md, layer after layer; linear layers are convolutions over one voxel."""
    values, layers = volume, []
    for conv, norm, _, pool in model.blocks():
        channel = (1, -1, 1, 1, 1)
        before = correlate(values, conv.weight) + conv.bias.view(channel)
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        after = (before - norm.running_mean.view(channel)) * factor.view(channel) + norm.bias.view(channel)
        pooled, ones = naive_pool(after.clamp(min=0), pool.kernel_size)
        layers.append((values, conv.weight, ones, pool.kernel_size))
        values = pooled
    shape = values.shape
    hidden, output = model.linears()
    voxel = (..., None, None, None)
    flat = values.flatten(1)[voxel]
    weights = [layer.weight[voxel] for layer in (hidden, output)]
    middle = (correlate(flat, weights[0]) + hidden.bias.view(1, -1, 1, 1, 1)).clamp(min=0)
    logits = correlate(middle, weights[1]) + output.bias.view(1, -1, 1, 1, 1)

    relevance = torch.zeros_like(logits)
    for scan, goal in enumerate(target.tolist()):
        relevance[scan, goal] = logits[scan, goal]
    relevance = naive_rule(middle, weights[1], relevance, beta, epsilon)
    relevance = naive_rule(flat, weights[0], relevance, beta, epsilon).view(shape)
    for a, w, ones, window in reversed(layers):
        relevance = naive_rule(a, w, ones * enlarge(relevance, window, ones.shape), beta, epsilon)
    return relevance


def enlarge(pooled: Tensor, window: int, shape: torch.Size) -> Tensor:
    """Every pooled value repeated over its window; zeros where the pool did not reach."""
    full = torch.zeros(shape, dtype=pooled.dtype)
    repeated = pooled
    for axis in (2, 3, 4):
        repeated = repeated.repeat_interleave(window, axis)
    x, y, z = repeated.shape[2:]
    full[:, :, :x, :y, :z] = repeated
    return full


@torch.no_grad()
def gap(model: CNN3d, volume: Tensor, target: Tensor, beta: float = 0.5, epsilon: float = 1e-6) -> float:
    found = lrp(model, volume, target, beta, epsilon)
    return difference(found, naive_lrp(model, volume, target, beta, epsilon))


@over_cases
@pytest.mark.parametrize("slab", [1, 2**40])
def test_head_in_zeros_equals_the_plain_rule(monkeypatch, case: Case, slab: int):
    """Only a box around the head is worked on, in slabs."""
    monkeypatch.setattr(folded, "SLAB", slab)
    model, volume, target = random_network(case), head_in_zeros(case, 2), mixed_targets(2)
    with torch.no_grad():
        expected = naive_lrp(model, volume, target, 0.5, 1e-6)
    assert difference(lrp(model, volume, target, 0.5, 1e-6), expected) < ORACLE


@over_places
@over_cases
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_plain_rule(place: Place, case: Case, batch: int):
    model, volume, target = random_network(case), random_volume(case, batch), mixed_targets(batch)
    with torch.no_grad():
        expected = naive_lrp(model, volume, target, 0.5, 1e-6)
    assert difference(place.do(lrp, model, volume, target), expected) < place.oracle


@pytest.mark.parametrize("beta", [0, 1, 2.5])
def test_equals_the_plain_rule_for_other_betas(beta: float):
    case = CASES["B"]
    assert gap(random_network(case), random_volume(case, 2), mixed_targets(2), beta) < ORACLE


@pytest.mark.parametrize("epsilon", [0, 1e-2])
def test_equals_the_plain_rule_for_other_epsilons(epsilon: float):
    case = CASES["C"]
    assert gap(random_network(case), random_volume(case, 2), mixed_targets(2), 0.5, epsilon) < ORACLE


@over_cases
def test_volumes_with_negative_values_get_all_four_terms(case: Case):
    """One scan of the batch has no negative value: it must not be explained differently for that."""
    volume = torch.cat([random_volume(case), random_volume(case, 2, seed=2) - 0.5])
    assert (volume < 0).any()
    assert gap(random_network(case), volume, mixed_targets(3)) < ORACLE


# By hand -----------------------------------------------------------------------------------------


def test_network_by_hand():
    """See `network_by_hand` for the way forth. Back, from logit 1 = 8 with beta = 1/2, epsilon = 0:

    output   z+ = 2 h0 = 12, z- = -h2 = -5      h0: 3/2 * 8 = 12      h2: -1/2 * 8 = -4
    h0       z+ = f0 + 2 f2 = 10, z- = -f1      f0: 18 * 4/10 = 7.2   f2: 18 * 6/10 = 10.8   f1: -6
    h2       z+ = f1 only                       f1: -4, together -10
    f0, 000  z+ = v000 + 3 v111 = 10 only       v000: 0.72            v111: 6.48
    f1, 111  z+ = 2 v111 = 6, z- = -v222        v111: -15             v222: 5
    f2, 111  z+ = v222 = 2, z- = -v111 = -3     v222: 16.2            v111: -5.4
    """
    model, volume = network_by_hand()
    found = lrp(model, volume, ONE, beta=0.5, epsilon=0)
    # a dozen float64 operations
    torch.testing.assert_close(found, on_diagonal(0.72, 6.48 - 15 - 5.4, 5 + 16.2), rtol=1e-13, atol=1e-13)
    assert found.sum().item() == pytest.approx(8, rel=1e-13)


def test_beta_zero_by_hand():
    """Nothing goes through z- : h0 has all 8, f0 3.2 and f2 4.8; f0 to v000 and v111, f2 to v222."""
    model, volume = network_by_hand()
    found = lrp(model, volume, ONE, beta=0, epsilon=0)
    torch.testing.assert_close(found, on_diagonal(0.32, 2.88, 4.8), rtol=1e-13, atol=1e-13)


def one_unit(weight: dict[tuple[int, int, int], float]) -> CNN3d:
    """One 2x2x2 convolution that sees all of a 2x2x2 scan; logit 1 is its relu."""
    model = plain_norms(assemble(((2, 1),), (2, 2, 2), width=1, hidden=1))
    conv = model.blocks()[0].conv
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
        for tap, value in weight.items():
            conv.weight[(0, 0, *tap)] = value
    linear_stub(model, [[1.0]], [0.0])
    return model


def test_four_terms_by_hand():
    """A unit that reads a+ w+ = 2, a- w- = 3, a- w+ = -2, a+ w- = -1: z+ = 5, z- = -3, logit 2."""
    model = one_unit({(0, 0, 0): -3, (1, 1, 1): 1, (0, 0, 1): 1, (1, 1, 0): -1})
    volume = torch.zeros(1, 1, 2, 2, 2, dtype=torch.float64)
    for voxel, value in {(0, 0, 0): -1, (1, 1, 1): 2, (0, 0, 1): -2, (1, 1, 0): 1}.items():
        volume[(0, 0, *voxel)] = value
    found = lrp(model, volume, ONE, beta=0.5, epsilon=0)[0, 0]
    assert found[0, 0, 0].item() == pytest.approx(1.5 * 2 * 3 / 5, rel=1e-12)
    assert found[1, 1, 1].item() == pytest.approx(1.5 * 2 * 2 / 5, rel=1e-12)
    assert found[0, 0, 1].item() == pytest.approx(-0.5 * 2 * 2 / 3, rel=1e-12)
    assert found[1, 1, 0].item() == pytest.approx(-0.5 * 2 * 1 / 3, rel=1e-12)


def two_voxels(weight: list[float], bias: float, sign: float = 1) -> CNN3d:
    """Scans of 2x1x1 voxels a, b >= 0: h = relu(w . (a, b) + bias), logit 1 = sign * h."""
    model = plain_norms(assemble(((1, 1),), (2, 1, 1), width=1, hidden=1))
    conv = model.blocks()[0].conv
    with torch.no_grad():
        conv.weight.fill_(1)
        conv.bias.zero_()
    linear_stub(model, [weight], [bias])
    with torch.no_grad():
        model.linears()[1].weight.mul_(sign)
    return model


def scan(*voxels: float) -> Tensor:
    return torch.tensor(voxels, dtype=torch.float64).view(1, 1, -1, 1, 1)


@pytest.mark.parametrize("beta", [0, 0.5, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_unit_with_one_part_alone_hands_on_all_its_relevance(beta: float, sign: int):
    """h = 10 - a - 3 b = 3 at (1, 2) has z- = -7 only; the logit 3 has z+ only, -3 has z- only."""
    model = two_voxels([-1.0, -3.0], 10.0, sign)
    found = lrp(model, scan(1, 2), ONE, beta=beta, epsilon=0)
    torch.testing.assert_close(found, scan(sign * 3 / 7, sign * 18 / 7), rtol=1e-12, atol=0)


def test_epsilon_stabilises_both_signs():
    """With epsilon = 1 all denominators are larger by 1: h = a - b + 4 = 5 at (3, 2), logit 5.

    output z+ = 5: R(h) = 5 * 5/6. h: z+ = 3, z- = -2: a: 3/2 R(h) * 3/4, b: -1/2 R(h) * 2/3, and the
    voxels' own units, z = 3 and 2, hand on 3/4 and 2/3 of that.
    """
    found = lrp(two_voxels([1.0, -1.0], 4.0), scan(3, 2), ONE, beta=0.5, epsilon=1)
    hidden = 25 / 6
    expected = scan(1.5 * hidden * 3 / 4 * 3 / 4, -0.5 * hidden * 2 / 3 * 2 / 3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_background_absorbs_its_relevance():
    """Units a + 1 and b + 1 at (3, 0): R = 4 and 1; b's unit read nothing, so its 1 is gone."""
    model = two_voxels([1.0, 1.0], 0.0)
    with torch.no_grad():
        model.blocks()[0].conv.bias.fill_(1)
    found = lrp(model, scan(3, 0), ONE, epsilon=0)
    torch.testing.assert_close(found, scan(4, 0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("epsilon", [0, 1e-6])
def test_a_blank_scan_gets_a_map_of_zeros(epsilon: float):
    case = CASES["A two blocks"]
    volume = torch.zeros(1, 1, *case.grid, dtype=torch.float64)
    assert lrp(random_network(case), volume, ONE, epsilon=epsilon).eq(0).all()


@pytest.mark.parametrize(("factor", "winner"), [(1, 5), (-1, 2)])
def test_the_winner_of_a_pool_takes_all(factor: int, winner: int):
    """One 2x2x2 window: all relevance is the largest voxel's, the smallest's if BatchNorm turns signs."""
    model = plain_norms(assemble(((1, 2),), (2, 2, 2), width=1, hidden=1))
    conv, norm, _, _ = model.blocks()[0]
    with torch.no_grad():
        conv.weight.fill_(1)
        conv.bias.zero_()
        norm.weight.fill_(factor)
        norm.bias.fill_(2)
    linear_stub(model, [[1.0]], [0.0])
    values = [0.4, 0.5, 0.1, 0.3, 0.6, 0.9, 0.2, 0.7]
    volume = torch.tensor(values, dtype=torch.float64).view(1, 1, 2, 2, 2)
    found = lrp(model, volume, ONE, epsilon=0).flatten()
    expected = torch.zeros(8, dtype=torch.float64)
    expected[winner] = 2 + factor * values[winner]  # the logit
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# Conservation ------------------------------------------------------------------------------------


@over_cases
def test_relevance_is_conserved(case: Case):
    """(1 + beta) - beta = 1 in every unit, biases or not: with epsilon = 0 and no background, exactly."""
    model = random_network(case)
    volume, target = random_volume(case, 3).clamp(min=0.01), mixed_targets(3)
    logits = model(volume).gather(1, target[:, None]).flatten().detach()
    maps = lrp(model, volume, target, epsilon=0).flatten(1)
    # sums in another order; the map's positive and negative parts are larger than the logit
    assert ((maps.sum(1) - logits).abs() / maps.abs().sum(1)).max() < 1e-13
    with_epsilon = lrp(model, volume, target).flatten(1).sum(1)
    # a denominator is of order 0.01 to 1, the stabiliser 1e-6
    torch.testing.assert_close(with_epsilon, logits, rtol=1e-2, atol=1e-3)


@over_cases
def test_positive_network_without_bias_gets_gradient_times_input(case: Case):
    """With a, w >= 0 and no bias, R = a w / z: the map is gradient times input, whatever beta."""
    torch.manual_seed(0)
    model = plain_norms(assemble(case.blocks, case.grid))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.abs_().mul_(0 if name.endswith("bias") else 1)
    volume = random_volume(case, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(model(volume)[:, 1].sum(), volume)
    expected = (gradient * volume).detach()
    found = lrp(model, volume.detach(), torch.tensor([1, 1]), beta=0.7, epsilon=0)
    assert difference(found, expected) < ORACLE


@pytest.mark.parametrize("family", models.FAMILIES)
def test_conservation_at_the_smallest_published_grid(family: str):
    model, volume = smallest_network(family)
    logit = model(volume)[0, 1].item()
    relevance = lrp(model, volume, ONE)
    assert relevance.dtype == torch.float32
    # float32 rounds at 6e-8, of sums over 1e6 voxels of both signs; the stabiliser takes up to 1e-4
    residual = abs(relevance.double().sum().item() - logit)
    assert residual < 1e-3 * relevance.double().abs().sum().item()
    assert residual < 1e-2 * abs(logit)


# Contract ----------------------------------------------------------------------------------------


def test_model_is_left_as_found():
    check_left_as_found(lrp)


def test_training_mode_does_not_matter():
    check_mode_does_not_matter(lrp)


def test_result_is_like_the_volume():
    check_result_like_volume(lrp)


def test_each_scan_has_its_own_target():
    check_scans_are_independent(lrp)


@over_bad_arguments
def test_bad_arguments(changes: dict[str, object]):
    with pytest.raises(ValueError, match=r"CNN3d|volume|target"):
        lrp(**arguments(**changes))
