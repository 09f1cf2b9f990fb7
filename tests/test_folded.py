"""folded.py: every shortcut against the layers and autograd it stands for."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from networks import (
    Case,
    difference,
    example,
    head_in_zeros,
    mixed_targets,
    network_by_hand,
    over_cases,
    random_network,
    random_volume,
)
from torch import Tensor

from internals import folded
from internals.devices import to_memory_format
from internals.folded import (
    FoldedBlock,
    FoldedNetwork,
    bounding_box,
    convolve,
    full_box,
    max_unpool,
    relu_backward,
    transposed_convolution,
)

# Sums of at most a few thousand float64 terms, in another order
ORACLE = 1e-10


@over_cases
@pytest.mark.parametrize("batch", [1, 3])
def test_block_equals_its_four_layers(case: Case, batch: int):
    """Forwards the outputs; backwards autograd's gradient, guided and not, for a random gradient behind."""
    model, values, _ = example(case, batch)
    for layers in model.blocks():
        inputs = values.detach().requires_grad_()
        values = layers.pool(layers.relu(layers.norm(layers.conv(inputs))))
        behind = torch.randn_like(values)
        (plain,) = torch.autograd.grad(values, inputs, behind, retain_graph=True)
        (guided,) = torch.autograd.grad(values, inputs, behind.clamp(min=0))
        with torch.no_grad():
            block = FoldedBlock.fold(layers)
            found, cache = block.forward(inputs)
            assert difference(found, values.detach()) < ORACLE
            assert difference(block.backward(behind, cache), plain) < ORACLE
            found = block.backward(behind, cache, guided=True)  # all zero where a scan's few units are shut
            assert (found - guided).abs().max() < ORACLE * plain.abs().max()


def test_fold_by_hand():
    """See `network_by_hand`; with a mean of 4 for f0, which makes it 2 less.

    Scales (1/2, 1, -2); shifts bias + (conv bias - mean) * scale = (0 + (-2 - 4) / 2, 1, 1).
    """
    model, volume = network_by_hand()
    with torch.no_grad():
        model.blocks()[0].norm.running_mean.copy_(torch.tensor([4.0, 0, 0]))
        block = FoldedBlock.fold(model.blocks()[0])
        outputs, cache = block.forward(volume)
    torch.testing.assert_close(block.shift, torch.tensor([-3.0, 1, 1]).double(), rtol=1e-13, atol=0)
    torch.testing.assert_close(block.weight[:, 0, 1, 1, 1], torch.tensor([1.5, -1, -2]).double())
    torch.testing.assert_close(outputs.flatten(), torch.tensor([2.0, 5, 3]).double(), rtol=1e-13, atol=0)
    assert cache.max_indices.flatten().tolist() == [0, 7, 7]  # 000 and 111 of 2x2x2
    assert torch.equal(cache.outputs, outputs)
    assert cache.conv_shape == (2, 2, 2)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_the_transposed_convolution(kernel: int, channels: int, batch: int):
    """Every output's gradient, times each weight, added to the voxel that weight read."""
    torch.manual_seed(0)
    gradient = torch.randn(batch, 3, 4, 6, 5, dtype=torch.float64)
    weight = torch.randn(3, channels, kernel, kernel, kernel, dtype=torch.float64)
    expected = torch.zeros(batch, channels, *(edge + kernel - 1 for edge in (4, 6, 5)), dtype=torch.float64)
    for i, j, k in product(range(kernel), repeat=3):
        part = torch.einsum("bnxyz,nc->bcxyz", gradient, weight[:, :, i, j, k])
        expected[:, :, i : i + 4, j : j + 6, k : k + 5] += part
    assert difference(transposed_convolution(gradient, weight), expected) < 1e-13  # at most 3 * 343 terms


@pytest.mark.parametrize("window", [1, 2, 3])
def test_max_unpool_puts_values_back_at_the_maxima(window: int):
    torch.manual_seed(0)
    values = torch.randn(2, 3, 7, 9, 8, dtype=torch.float64)
    pooled, max_indices = F.max_pool3d(values, window, return_indices=True)
    found = max_unpool(pooled, max_indices, values.shape[2:])
    taken = found != 0
    assert torch.equal(found[taken], values[taken])
    assert taken.sum() == pooled.numel()
    assert torch.equal(F.max_pool3d(torch.where(taken, found, -torch.inf), window), pooled)


def test_relu_backward():
    gradient, outputs = torch.tensor([-2.0, 3, -4, 5]), torch.tensor([1.0, 0.1, 0, 0])
    assert relu_backward(gradient, outputs).tolist() == [-2, 3, 0, 0]
    assert relu_backward(gradient, outputs, guided=True).tolist() == [0, 3, 0, 0]
    assert gradient.tolist() == [-2, 3, -4, 5]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_channels_last_says_so(channels: int, batch: int):
    """Where PyTorch reads the layout from the strides: the outputs of a convolution are like its inputs."""
    values = torch.rand(batch, channels, 5, 6, 7)
    found = to_memory_format(values)
    assert torch.equal(found, values)
    outputs = convolve(found, torch.rand(4, channels, 3, 3, 3))
    assert outputs.is_contiguous(memory_format=torch.channels_last_3d)


@over_cases
@pytest.mark.parametrize("batch", [1, 3])
def test_slabs_do_not_matter(monkeypatch, case: Case, batch: int):
    """One row of windows at a time, two, or all at once: the same outputs, max_indices and gradients."""
    layers = random_network(case).blocks()[0]
    results = []
    for slab in (1, 2 * 3 * batch * case.blocks[0][1] * case.grid[1] * case.grid[2], 2**40):
        monkeypatch.setattr(folded, "SLAB", slab)
        with torch.no_grad():
            block = FoldedBlock.fold(layers)
            outputs, cache = block.forward(random_volume(case, batch))
            torch.manual_seed(0)
            results.append((outputs, cache.max_indices, block.backward(torch.randn_like(outputs), cache)))
    for outputs, max_indices, gradient in results[1:]:
        assert torch.equal(max_indices, results[0][1])
        assert difference(outputs, results[0][0]) < 1e-13  # sums of 343 products at most
        assert difference(gradient, results[0][2]) < 1e-13


def test_bounding_box_by_hand():
    volume = torch.zeros(2, 1, 5, 6, 7)
    volume[0, 0, 1, 2, 3], volume[1, 0, 3, 2, 0] = 1, -1
    assert bounding_box(volume) == (slice(1, 4), slice(2, 3), slice(0, 4))
    assert bounding_box(volume[:1]) == (slice(1, 2), slice(2, 3), slice(3, 4))
    assert bounding_box(volume[:1], volume[1:]) == bounding_box(volume)
    assert bounding_box(torch.zeros(1, 1, 5, 6, 7)) == full_box(torch.Size((5, 6, 7)))


@pytest.mark.parametrize(("kernel", "window"), [(3, 2), (5, 2), (7, 2), (5, 3), (7, 3), (1, 1)])
def test_propagate_box_is_what_sees_the_box(kernel: int, window: int):
    """One voxel at a time, along one axis: the outputs that read it, and all that those read."""
    block = FoldedBlock(torch.ones(1, 1, kernel, kernel, kernel), torch.zeros(1), window)
    for edge in range(kernel + 2 * window - 1, kernel + 5 * window):
        count = (edge - kernel + 1) // window
        reads = [range(q * window, (q + 1) * window + kernel - 1) for q in range(count)]
        for voxel in range(reads[-1].stop):  # those behind are read by nobody
            seeing = [q for q in range(count) if voxel in reads[q]]
            box = (slice(voxel, voxel + 1),) * 3
            found_reads, found_makes = (axes[0] for axes in block.propagate_box(box, torch.Size([edge] * 3)))
            assert (found_makes.start, found_makes.stop) == (seeing[0], seeing[-1] + 1)
            assert found_reads.start == reads[seeing[0]].start
            # the last window's box takes what is left of the axis, too little for another window
            expected = edge if seeing[-1] == count - 1 else reads[seeing[-1]].stop
            assert found_reads.stop == expected


@over_cases
@pytest.mark.parametrize("batch", [1, 3])
def test_padding_gives_the_whole_features(case: Case, batch: int):
    """Block after block, on the box alone, padded: what the model computes on the whole grid."""
    model, volume = random_network(case), head_in_zeros(case, batch)
    with torch.no_grad():
        network = FoldedNetwork(model, volume.shape[2:], bounding_box(volume))
        values = volume[:, :, *network.input_box]
        assert values.numel() < volume.numel() or len(network.blocks) == 1
        for block, padding in zip(network.blocks, network.paddings, strict=True):
            values = padding.pad(block.forward(values)[0])
        assert difference(values, model.features(volume)) < ORACLE


@over_cases
@pytest.mark.parametrize("volumes", [random_volume, head_in_zeros])
def test_gradient_equals_autograd(case: Case, volumes: Callable[..., Tensor]):
    """Each scan's own target, at the first block's output, inside the padding."""
    model, target, volume = random_network(case), mixed_targets(3), volumes(case, 3)
    features = model.features[:4](volume).detach().requires_grad_()
    logits = model.classifier(model.features[4:](features).flatten(1))
    (expected,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), features)
    with torch.no_grad():
        network = FoldedNetwork(model, volume.shape[2:], bounding_box(volume))
        part, _ = network.blocks[0].forward(volume[:, :, *network.input_box])
        _, box = network.blocks[0].propagate_box(bounding_box(volume), volume.shape[2:])
        assert difference(network.gradient(part, target), expected[..., *box].contiguous()) < ORACLE
