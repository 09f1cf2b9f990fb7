"""blocks.py: every shortcut against the layers and autograd it stands for."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from networks import (
    CASES,
    Case,
    arguments,
    difference,
    mixed_targets,
    network_by_hand,
    over_bad_arguments,
    over_cases,
    random_network,
    random_volume,
)
from torch import Tensor

from blocks import Block, Network, check_arguments, norm_factor, pull, through_relu, unpool

# Sums of at most a few thousand float64 terms, in another order
ORACLE = 1e-10


def block_inputs(case: Case, number: int, batch: int) -> Tensor:
    """What block `number` of the case's network reads."""
    values = random_volume(case, batch)
    for layers in random_network(case).blocks()[:number]:
        values = layers.pool(layers.relu(layers.norm(layers.conv(values))))
    return values.detach()


# One block ---------------------------------------------------------------------------------------


@over_cases
@pytest.mark.parametrize("batch", [1, 3])
def test_block_equals_its_four_layers(case: Case, batch: int):
    """Forwards the outputs; backwards autograd's gradient of them, for a random gradient behind."""
    for number, layers in enumerate(random_network(case).blocks()):
        inputs = block_inputs(case, number, batch).requires_grad_()
        expected = layers.pool(layers.relu(layers.norm(layers.conv(inputs))))
        behind = torch.randn_like(expected)
        (slopes,) = torch.autograd.grad(expected, inputs, behind)
        with torch.no_grad():
            block = Block.fold(layers)
            found, trace = block.forward(inputs)
            assert difference(found, expected.detach()) < ORACLE
            assert difference(block.backward(behind, trace), slopes) < ORACLE


@over_cases
def test_guided_block_drops_negative_gradients(case: Case):
    layers = random_network(case).blocks()[0]
    inputs = block_inputs(case, 0, 2).requires_grad_()
    outputs = layers.pool(layers.relu(layers.norm(layers.conv(inputs))))
    behind = torch.randn_like(outputs)
    (slopes,) = torch.autograd.grad(outputs, inputs, behind.clamp(min=0))
    with torch.no_grad():
        block = Block.fold(layers)
        _, trace = block.forward(inputs)
        assert difference(block.backward(behind, trace, guided=True), slopes) < ORACLE


def test_fold_by_hand():
    """See `network_by_hand`; with a mean of 4 for f0, which makes it 2 less.

    Factors (1/2, 1, -2); shifts bias + (conv bias - mean) * factor = (0 + (-2 - 4) / 2, 1, 1).
    """
    model, volume = network_by_hand()
    with torch.no_grad():
        model.blocks()[0].norm.running_mean.copy_(torch.tensor([4.0, 0, 0]))
        block = Block.fold(model.blocks()[0])
        outputs, trace = block.forward(volume)
    torch.testing.assert_close(block.shift, torch.tensor([-3.0, 1, 1]).double(), rtol=1e-13, atol=0)
    torch.testing.assert_close(block.weight[:, 0, 1, 1, 1], torch.tensor([1.5, -1, -2]).double())
    torch.testing.assert_close(outputs.flatten(), torch.tensor([2.0, 5, 3]).double(), rtol=1e-13, atol=0)
    assert trace.winners.flatten().tolist() == [0, 7, 7]  # 000 and 111 of 2x2x2
    assert trace.active.all()
    assert trace.grid == (2, 2, 2)


def test_norm_factor_is_what_batchnorm_multiplies_with():
    norm = random_network(CASES["B"]).blocks()[1].norm
    with torch.no_grad():
        ones, zeros = (torch.full((1, 3, 1, 1, 1), value, dtype=torch.float64) for value in (1, 0))
        expected = (norm(ones) - norm(zeros)).flatten()
        assert (expected < 0).any()
        torch.testing.assert_close(norm_factor(norm), expected, rtol=1e-13, atol=1e-13)


# Its parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_pull_is_the_transposed_convolution(kernel: int, channels: int, batch: int):
    """Every output's gradient, times each weight, added to the voxel that weight read."""
    torch.manual_seed(0)
    gradient = torch.randn(batch, 3, 4, 6, 5, dtype=torch.float64)
    weight = torch.randn(3, channels, kernel, kernel, kernel, dtype=torch.float64)
    expected = torch.zeros(batch, channels, *(edge + kernel - 1 for edge in (4, 6, 5)), dtype=torch.float64)
    for i, j, k in product(range(kernel), repeat=3):
        part = torch.einsum("bnxyz,nc->bcxyz", gradient, weight[:, :, i, j, k])
        expected[:, :, i : i + 4, j : j + 6, k : k + 5] += part
    assert difference(pull(gradient, weight), expected) < 1e-13  # at most 3 * 343 terms


def test_pull_by_hand():
    """Outputs (2, 3) of the kernel (1, 10) along the first axis touch 2 voxels each, and share one."""
    weight = torch.zeros(1, 1, 2, 2, 2)
    weight[0, 0, :, 0, 0] = torch.tensor([1.0, 10])
    found = pull(torch.tensor([2.0, 3]).view(1, 1, 2, 1, 1), weight)
    assert found[0, 0, :, 0, 0].tolist() == [2, 20 + 3, 30]
    assert found.sum() == 55


@pytest.mark.parametrize("window", [1, 2, 3])
def test_unpool_puts_values_back_on_their_winners(window: int):
    torch.manual_seed(0)
    values = torch.randn(2, 3, 7, 9, 8, dtype=torch.float64)
    pooled, winners = F.max_pool3d(values, window, return_indices=True)
    found = unpool(pooled, winners, values.shape[2:])
    x, y, z = (edge - edge % window for edge in (7, 9, 8))
    largest = torch.zeros_like(values)  # the window's maximum at each of its voxels
    largest[:, :, :x, :y, :z] = (
        pooled.repeat_interleave(window, 2).repeat_interleave(window, 3).repeat_interleave(window, 4)
    )
    assert torch.equal(found, torch.where(values == largest, values, 0))
    assert found.count_nonzero() == pooled.numel()


def test_through_relu():
    gradient = torch.tensor([-2.0, 3, -4, 5])
    active = torch.tensor([True, True, False, False])
    assert through_relu(gradient, active).tolist() == [-2, 3, 0, 0]
    assert through_relu(gradient, active, guided=True).tolist() == [0, 3, 0, 0]


# The whole network -------------------------------------------------------------------------------


@over_cases
@pytest.mark.parametrize("batch", [1, 3])
def test_network_gives_the_models_logits(case: Case, batch: int):
    model, volume = random_network(case), random_volume(case, batch)
    with torch.no_grad():
        network = Network(model)
        features = volume
        for block in network.blocks:
            features, _ = block.forward(features)
        logits, active = network.classify(features)
        assert difference(logits, model(volume)) < ORACLE
        assert torch.equal(active, model.classifier[:2](model.features(volume).flatten(1)) > 0)


@over_cases
@pytest.mark.parametrize("first", [0, 1])
def test_gradient_equals_autograd(case: Case, first: int):
    """Each scan's own target; from the scan itself or from the second block's inputs on."""
    model, target = random_network(case), mixed_targets(3)
    inputs = block_inputs(case, first, 3).requires_grad_()
    logits = model.classifier(model.features[4 * first :](inputs).flatten(1))
    (expected,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), inputs)
    with torch.no_grad():
        found = Network(model).gradient(inputs, target, first)
    assert difference(found, expected) < ORACLE


def test_reading_a_model_does_not_change_it():
    case = CASES["B"]
    model = random_network(case)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        Network(model).gradient(block_inputs(case, 1, 1), torch.tensor([1]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Arguments ---------------------------------------------------------------------------------------


def test_good_arguments():
    good = arguments()
    check_arguments(**good)
    volume = torch.rand(3, 1, 8, 8, 8, dtype=torch.float64)
    check_arguments(good["model"], volume, torch.tensor([0, 1, 1]))


@over_bad_arguments
def test_bad_arguments(changes: dict[str, object]):
    with pytest.raises(ValueError, match="expected") as caught:
        check_arguments(**arguments(**changes))
    assert str(caught.value).startswith(next(iter(changes)) if "model" not in changes else "expected a CNN3d")
