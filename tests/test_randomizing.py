"""randomizing.py: which layers are drawn anew, with which weights, and BatchNorm's statistics behind them."""

import copy

import pytest
import torch
from networks import CASES, random_network, random_volume
from torch import Tensor

import randomizing
import utils
from models import CNN3d
from randomizing import Randomizer

CASE = CASES["A three blocks"]
LAYERS = 5  # three blocks, two linear layers


def scans(count: int = 3) -> list[Tensor]:
    return [random_volume(CASE, seed=seed) for seed in range(count)]


def parameters(model: CNN3d, layer: int) -> list[Tensor]:
    """The weights of a layer, a block's with those of its BatchNorm."""
    blocks = [[*block.conv.parameters(), *block.norm.parameters()] for block in model.blocks()]
    return [*blocks, *(list(linear.parameters()) for linear in model.linears())][layer]


def statistics(model: CNN3d) -> list[Tensor]:
    """The running mean and variance of every block, (2, n)."""
    return [torch.stack([block.norm.running_mean, block.norm.running_var]) for block in model.blocks()]


def test_steps():
    found = list(randomizing.steps(2, ["output", "input", "alone"]))
    names = ["block 0", "block 1", "hidden", "output"]
    assert found[0] == ("all", "all layers", range(4))
    assert [(order, name, list(layers)) for order, name, layers in found[1:]] == [
        *[("output", names[i], list(range(i, 4))) for i in (3, 2, 1, 0)],
        *[("input", names[i], list(range(i + 1))) for i in range(4)],
        *[("alone", names[i], [i]) for i in range(4)],
    ]
    assert {order for order, *_ in randomizing.steps(2, ["input"])} == {"all", "input"}


@pytest.mark.parametrize("layers", [[4], [0], [1, 3], range(5)], ids=str)
def test_chosen_layers_alone_are_new(layers):
    model = random_network(CASE)
    before = copy.deepcopy(model.state_dict())
    found = Randomizer(model, scans()).randomize(layers, seed=7)
    assert not found.training
    for layer in range(LAYERS):
        same = all(map(torch.equal, parameters(found, layer), parameters(model, layer)))
        assert same == (layer not in layers)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_new_weights_are_those_of_a_layer_that_training_begins_with():
    """From a seed of the layer's own, whichever others are drawn; the caller's random state stays."""
    model = random_network(CASE)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    alone = Randomizer(model, scans()).randomize([1], seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    among = Randomizer(model, scans()).randomize(range(5), seed=7)
    torch.manual_seed(utils.own_seed(7, 1))
    fresh = torch.nn.Conv3d(3, 3, 3, dtype=torch.float64)
    for found in (alone, among):
        block = found.blocks()[1]
        assert torch.equal(block.conv.weight, fresh.weight)
        assert torch.equal(block.conv.bias, fresh.bias)
        assert block.norm.weight.tolist() == [1, 1, 1]
        assert block.norm.bias.tolist() == [0, 0, 0]
    other = Randomizer(model, scans()).randomize([1], seed=8)
    assert not torch.equal(other.blocks()[1].conv.weight, fresh.weight)


@pytest.mark.parametrize("first", range(3))
def test_statistics_behind_new_weights_are_those_of_the_scans(first):
    """The mean over the scans, taken one at a time, of what each block makes; before, as they were."""
    model = random_network(CASE)
    found = Randomizer(model, scans()).randomize([first], seed=7)
    expected = []
    for scan in scans():
        values, seen = scan, []
        for number, (conv, norm, relu, pool) in enumerate(found.blocks()):
            made = conv(values)
            mean, variance = made.mean((0, 2, 3, 4)), made.var((0, 2, 3, 4))
            seen.append(torch.stack([mean, variance]))
            if number < first:
                made = norm(made)
            else:  # by its own statistics, as in training
                spread = torch.sqrt(made.var((0, 2, 3, 4), correction=0) + norm.eps)
                made = (made - mean.view(-1, 1, 1, 1)) / spread.view(-1, 1, 1, 1)
                made = made * norm.weight.view(-1, 1, 1, 1) + norm.bias.view(-1, 1, 1, 1)
            values = pool(relu(made))
        expected.append(seen)
    for number, (own, before) in enumerate(zip(statistics(found), statistics(model), strict=True)):
        wanted = torch.stack([seen[number] for seen in expected]).mean(0) if number >= first else before
        assert torch.allclose(own, wanted, rtol=1e-10, atol=1e-12)


def test_linear_layers_alone_leave_all_statistics():
    model = random_network(CASE)
    found = Randomizer(model, scans()).randomize([3, 4], seed=7)
    assert all(map(torch.equal, statistics(found), statistics(model)))
