"""lrp.py: both rules by hand, against plain ones layer by layer, and their conservation."""

from functools import cache, partial
from itertools import product

import pytest
import torch
from networks import (
    CASES,
    Case,
    assemble,
    check_nearly_equal,
    difference,
    example,
    head_in_zeros,
    mixed_targets,
    network_by_hand,
    on_diagonal,
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
    both = ((z_plus != 0) & (z_minus != 0)).double()
    weight_plus = 1 + beta * both  # 1 + beta, or 1 alone
    weight_minus = (1 + beta) * both - 1  # beta; alone, z- hands on + 1, in "- a wT[...]" below
    share_plus = torch.where(z_plus != 0, weight_plus * relevance / (z_plus + epsilon), 0)
    share_minus = torch.where(z_minus != 0, weight_minus * relevance / (z_minus - epsilon), 0)
    return (
        a_plus * spread(share_plus, w_plus)
        + a_minus * spread(share_plus, w_minus)
        - a_plus * spread(share_minus, w_minus)
        - a_minus * spread(share_minus, w_plus)
    )


def windows(values: Tensor, window: int) -> Tensor:
    """The pool's windows as a view (B, n, X, Y, Z, window, window, window); what they do not fill is left."""
    for axis in (2, 3, 4):
        values = values.unfold(axis, window, window)
    return values


def naive_pool(values: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Maxima over the windows, and ones where they are, (B, n, X, Y, Z); the first of equals wins."""
    best = windows(values, window).amax((5, 6, 7))
    hits = (windows(values, window) == best[..., None, None, None]).flatten(5)
    ones = torch.zeros_like(values)
    windows(ones, window).copy_((hits & (hits.cumsum(5) == 1)).view(*best.shape, *[window] * 3))
    return best, ones


@torch.no_grad()
def naive_lrp(
    model: CNN3d, volume: Tensor, target: Tensor, beta: float = 0.5, epsilon: float = 1e-6
) -> Tensor:
    """The rule as Bach et al. write it, layer after layer; linear layers are convolutions over one voxel."""
    values, layers = volume, []
    for conv, norm, _, pool in model.blocks():
        channel = (1, -1, 1, 1, 1)
        before = correlate(values, conv.weight) + conv.bias.view(channel)
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        after = (before - norm.running_mean.view(channel)) * factor.view(channel) + norm.bias.view(channel)
        inputs, (values, ones) = values, naive_pool(after.clamp(min=0), pool.kernel_size)
        layers.append((inputs, conv.weight, ones, pool.kernel_size))
    hidden, output = model.linears()
    voxel = (..., None, None, None)
    flat = values.flatten(1)[voxel]
    weights = [layer.weight[voxel] for layer in (hidden, output)]
    middle = (correlate(flat, weights[0]) + hidden.bias.view(1, -1, 1, 1, 1)).clamp(min=0)
    logits = correlate(middle, weights[1]) + output.bias.view(1, -1, 1, 1, 1)

    scans = torch.arange(len(target))
    relevance = torch.zeros_like(logits)
    relevance[scans, target] = logits[scans, target]
    relevance = naive_rule(middle, weights[1], relevance, beta, epsilon)
    relevance = naive_rule(flat, weights[0], relevance, beta, epsilon).view_as(values)
    for a, w, ones, window in reversed(layers):
        windows(ones, window).mul_(relevance[..., None, None, None])
        relevance = naive_rule(a, w, ones, beta, epsilon)
    return relevance


@cache
def explained(case: Case, batch: int) -> tuple[CNN3d, Tensor, Tensor, Tensor]:
    """A network, scans, targets and the plain maps, the same for all places."""
    model, volume, target = example(case, batch)
    return model, volume, target, naive_lrp(model, volume, target)


@over_places
@over_cases
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_plain_rule(place: Place, case: Case, batch: int):
    model, volume, target, expected = explained(case, batch)
    assert difference(place.do(lrp, model, volume, target), expected) < place.oracle


@pytest.mark.parametrize("options", [(0, 1e-6), (1, 1e-6), (2.5, 1e-6), (0.5, 0), (0.5, 1e-2)])
def test_equals_the_plain_rule_with_other_beta_and_epsilon(options: tuple[float, float]):
    arguments = (*example(CASES["B"]), *options)
    assert difference(lrp(*arguments), naive_lrp(*arguments)) < ORACLE


@over_cases
def test_heads_in_zeros_and_negative_values_equal_the_plain_rule(monkeypatch, case: Case):
    """Of a head in zeros, only a box is computed, in slabs.

    One scan of the second batch has no negative value: it must not be explained differently for that.
    """
    model, volume, target = random_network(case), head_in_zeros(case, 2), mixed_targets(2)
    expected = naive_lrp(model, volume, target)
    for slab in (1, 2**40):
        monkeypatch.setattr(folded, "SLAB", slab)
        assert difference(lrp(model, volume, target), expected) < ORACLE
    volume = torch.cat([random_volume(case), random_volume(case, 2, seed=2) - 0.5])
    assert (volume < 0).any()
    arguments = model, volume, mixed_targets(3)
    assert difference(lrp(*arguments), naive_lrp(*arguments)) < ORACLE


@pytest.mark.parametrize(
    ("beta", "expected"), [(0.5, (0.72, 6.48 - 15 - 5.4, 5 + 16.2)), (0, (0.32, 2.88, 4.8))]
)
def test_network_by_hand(beta: float, expected: tuple[float, ...]):
    """See `network_by_hand` for the way forth. Back, from logit 1 = 8 with beta = 1/2, epsilon = 0:

    output   z+ = 2 h0 = 12, z- = -h2 = -5      h0: 3/2 * 8 = 12      h2: -1/2 * 8 = -4
    h0       z+ = f0 + 2 f2 = 10, z- = -f1      f0: 18 * 4/10 = 7.2   f2: 18 * 6/10 = 10.8   f1: -6
    h2       z+ = f1 only                       f1: -4, together -10
    f0, 000  z+ = v000 + 3 v111 = 10 only       v000: 0.72            v111: 6.48
    f1, 111  z+ = 2 v111 = 6, z- = -v222        v111: -15             v222: 5
    f2, 111  z+ = v222 = 2, z- = -v111 = -3     v222: 16.2            v111: -5.4

    With beta = 0 nothing goes through z- : h0 has all 8, f0 3.2 and f2 4.8; f0 to v000 and v111, f2 to v222.
    """
    model, volume = network_by_hand()
    found = lrp(model, volume, ONE, beta=beta, epsilon=0)
    # a dozen float64 operations
    torch.testing.assert_close(found, on_diagonal(*expected), rtol=1e-13, atol=1e-13)
    assert found.sum().item() == pytest.approx(8, rel=1e-13)


@torch.no_grad()
def one_filter(
    kernel: int, pool: int, grid: tuple[int, int, int], taps: list[float], hidden: tuple[float, ...] = (1,)
) -> CNN3d:
    """A convolution of one filter without bias, and one hidden unit h; the logits are -h and h."""
    model = plain_norms(assemble(((kernel, pool),), grid, width=1, hidden=1))
    conv = model.blocks()[0].conv
    conv.weight.copy_(torch.tensor(taps).view_as(conv.weight))
    model.linears()[0].weight.copy_(torch.tensor([hidden]))
    model.linears()[1].weight.copy_(torch.tensor([[-1.0], [1]]))
    for layer in (conv, *model.linears()):
        layer.bias.zero_()
    return model


def scan(*voxels: float) -> Tensor:
    """A scan of 2x1x1 voxels, or of 2x2x2."""
    edge = 2 if len(voxels) == 8 else 1
    return torch.tensor(voxels, dtype=torch.float64).view(1, 1, 2, edge, edge)


def test_four_terms_by_hand():
    """A unit that reads a- w- = 3, a- w+ = -2, a+ w- = -1, a+ w+ = 2: z+ = 5, z- = -3, logit 2."""
    model = one_filter(2, 1, (2, 2, 2), [-3, 1, 0, 0, 0, 0, -1, 1])
    found = lrp(model, scan(-1, -2, 0, 0, 0, 0, 1, 2), ONE, beta=0.5, epsilon=0)
    expected = scan(3 * 3 / 5, -1 * 2 / 3, 0, 0, 0, 0, -1 * 1 / 3, 3 * 2 / 5)  # 1.5 and -0.5 times the logit
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@torch.no_grad()
def two_voxels(weight: tuple[float, float], bias: float, own: float = 0) -> CNN3d:
    """Scans of 2x1x1 voxels a, b >= 0: h = relu(w . (a + own, b + own) + bias)."""
    model = one_filter(1, 1, (2, 1, 1), [1], weight)
    model.linears()[0].bias.fill_(bias)
    model.blocks()[0].conv.bias.fill_(own)
    return model


@pytest.mark.parametrize("beta", [0, 0.5, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_unit_with_one_sign_alone_passes_on_all_its_relevance(beta: float, sign: int):
    """h = 10 - a - 3 b = 3 at (1, 2) has z- = -7 only; the logit 3 has z+ only, -3 has z- only."""
    model, target = two_voxels((-1, -3), 10), torch.tensor([(1 + sign) // 2])  # the logits are -h and h
    found = lrp(model, scan(1, 2), target, beta=beta, epsilon=0)
    torch.testing.assert_close(found, scan(sign * 3 / 7, sign * 18 / 7), rtol=1e-12, atol=0)


def test_epsilon_stabilises_both_signs():
    """With epsilon = 1 all denominators are larger by 1: h = a - b + 4 = 5 at (3, 2), logit 5.

    output z+ = 5: R(h) = 5 * 5/6. h: z+ = 3, z- = -2: a: 3/2 R(h) * 3/4, b: -1/2 R(h) * 2/3, and the
    voxels' own units, z = 3 and 2, pass on 3/4 and 2/3 of that.
    """
    found = lrp(two_voxels((1, -1), 4), scan(3, 2), ONE, beta=0.5, epsilon=1)
    hidden = 25 / 6
    expected = scan(1.5 * hidden * 3 / 4 * 3 / 4, -0.5 * hidden * 2 / 3 * 2 / 3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_background_absorbs_its_relevance():
    """Units a + 1 and b + 1 at (3, 0): R = 4 and 1; b's unit read nothing, so its 1 is gone."""
    found = lrp(two_voxels((1, 1), 0, own=1), scan(3, 0), ONE, epsilon=0)
    torch.testing.assert_close(found, scan(4, 0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("epsilon", [0, 1e-6])
def test_a_blank_scan_gets_a_map_of_zeros(epsilon: float):
    model, volume, target = example(CASES["A two blocks"])
    assert lrp(model, torch.zeros_like(volume), target, epsilon=epsilon).eq(0).all()


@pytest.mark.parametrize(("factor", "maximum"), [(1, 5), (-1, 2)])
def test_the_maximum_of_a_pool_takes_all(factor: int, maximum: int):
    """One 2x2x2 window: all relevance is the largest voxel's, the smallest's if BatchNorm turns signs."""
    model = one_filter(1, 2, (2, 2, 2), [1])
    with torch.no_grad():
        model.blocks()[0].norm.weight.fill_(factor)
        model.blocks()[0].norm.bias.fill_(2)
    values = [0.4, 0.5, 0.1, 0.3, 0.6, 0.9, 0.2, 0.7]
    found = lrp(model, scan(*values), ONE, epsilon=0)
    expected = [0.0] * 8
    expected[maximum] = 2 + factor * values[maximum]  # the logit
    torch.testing.assert_close(found, scan(*expected), rtol=1e-12, atol=0)


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


# The composite -----------------------------------------------------------------------------------


def hand_on(a: Tensor, w: Tensor, bias: Tensor, relevance: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """One layer of LRP-epsilon, (B, n, x, y, z) -> (B, C, X, Y, Z); what bias and epsilon absorb, (B,)."""
    z = correlate(a, w) + bias.view(1, -1, 1, 1, 1)
    sign = torch.where(z < 0, -1.0, 1.0).double()
    share = relevance / (z + epsilon * sign)
    absorbed = share * (bias.view(1, -1, 1, 1, 1) + epsilon * sign)
    return a * spread(share, w), absorbed.flatten(1).sum(1)


@torch.no_grad()
def naive_composite(
    model: CNN3d, volume: Tensor, target: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """EpsilonPlusFlat, BatchNorm merged; the map, and what biases and epsilon absorbed."""
    values, layers, absorbed = volume, [], torch.zeros(len(volume)).double()
    for conv, norm, _, pool in model.blocks():
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = conv.weight * factor.view(-1, 1, 1, 1, 1)
        bias = (conv.bias - norm.running_mean) * factor + norm.bias
        after = (correlate(values, weight) + bias.view(1, -1, 1, 1, 1)).clamp(min=0)
        inputs, (values, ones) = values, naive_pool(after, pool.kernel_size)
        layers.append((inputs, weight, bias, ones, pool.kernel_size))
    hidden, output = model.linears()
    voxel = (..., None, None, None)
    flat = values.flatten(1)[voxel]
    units = (correlate(flat, hidden.weight[voxel]) + hidden.bias.view(1, -1, 1, 1, 1)).clamp(min=0)
    logits = model(volume)
    relevance = (logits * torch.nn.functional.one_hot(target, 2))[voxel]
    for inputs, linear in ((units, output), (flat, hidden)):
        relevance, lost = hand_on(inputs, linear.weight[voxel], linear.bias, relevance, epsilon)
        absorbed += lost
    relevance = relevance.view(values.shape)
    for number, (inputs, weight, bias, ones, window) in reversed(list(enumerate(layers))):
        at_maxima = torch.zeros_like(ones)
        windows(at_maxima, window).copy_(relevance[..., None, None, None] * windows(ones, window))
        if number:
            weight, bias = weight.clamp(min=0), bias.clamp(min=0)
            relevance, lost = hand_on(inputs, weight, bias, at_maxima, epsilon)
            absorbed += lost
        else:
            relevance = spread(at_maxima, torch.ones_like(weight) / weight[0].numel())
    return relevance, absorbed


@over_places
@over_cases
def test_composite_equals_the_plain_rules_and_conserves(place: Place, case: Case):
    """All relevance is in the map or was absorbed by biases and epsilon."""
    model, volume, target = example(case, 3)
    expected, absorbed = naive_composite(model, volume, target)
    found = place.do(partial(lrp, rule="composite"), model, volume, target)
    assert difference(found, expected) < place.oracle
    logits = model(volume).gather(1, target[:, None])[:, 0]
    total = found.flatten(1).sum(1) + absorbed
    assert (total - logits).abs().max() < max(place.oracle, 1e-9) * found.abs().sum()
    assert (absorbed.abs() > 0.01 * logits.abs()).any()  # so that it would be missed


def test_composite_without_biases_conserves_the_logit():
    model, volume, target = example(CASES["B"], 2)
    with torch.no_grad():
        for conv, norm, _, _ in model.blocks():
            norm.bias.copy_(
                (norm.running_mean - conv.bias) * norm.weight / torch.sqrt(norm.running_var + norm.eps)
            )
        for linear in model.linears():
            linear.bias.zero_()
    logits = model(volume).gather(1, target[:, None])[:, 0]
    sums = lrp(model, volume, target, rule="composite").flatten(1).sum(1)
    # epsilon, 1e-6, takes its part of every unit, most of small ones
    assert ((sums - logits).abs() < 1e-3 * logits.abs()).all()


def test_composite_in_float32():
    """At the smallest grid of a published family."""
    model, volume = smallest_network("B")
    expected, _ = naive_composite(model.double(), volume.double(), ONE)
    check_nearly_equal(lrp(model.float(), volume, ONE, rule="composite"), expected.float())


def test_composite_by_hand():
    """See `network_by_hand`; biases absorb, and every unit of the convolution reads 2 x 2 x 2 voxels.

    Logit 8 = 2 * 6 - 5 + 1: h0 gets 12, h2 gets -5. h0 = 6 = 4 - 5 + 2 * 3 + 1: f0, f1, f2 get 8, -10, 12; h2
    gives f1 -5 more. f0's maximum is at 000: each of its 8 voxels gets 1. Those of f1 and f2 are at 111: each
    of those 8 voxels gets (-15 + 12) / 8.
    """
    model, volume = network_by_hand()
    expected = torch.zeros_like(volume)
    expected[..., :2, :2, :2] += 1
    expected[..., 1:, 1:, 1:] -= 3 / 8
    torch.testing.assert_close(
        lrp(model, volume, ONE, rule="composite"), expected, rtol=0, atol=1e-5
    )  # epsilon


def test_unknown_rule():
    model, volume, target = example(CASES["one block"], 1)
    with pytest.raises(ValueError, match="rule: expected beta or composite, got alpha"):
        lrp(model, volume, target, rule="alpha")
