"""fused.py: every function against the layers that it replaces."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from internals.fused import norm_relu_pool, stacked_convolution, statistics
from models import build_model


def make_norm(channels: int) -> nn.BatchNorm3d:
    """BatchNorm in float64 whose weights have both signs."""
    norm = nn.BatchNorm3d(channels).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1.5, 2, channels))
        norm.bias.copy_(torch.linspace(0.7, -0.4, channels))
    return norm


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_same_outputs_gradients_and_statistics_as_the_layers(
    window: int, batch: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(window)
    # edges that the pool does not divide, so that its floor leaves voxels without a window
    values = 3 + 2 * torch.randn(batch, 5, 10, 8, 7, dtype=torch.float64)
    values = values.contiguous(memory_format=layout)
    pool, norms = nn.MaxPool3d(window), [make_norm(5), make_norm(5)]
    inputs = [values.clone().requires_grad_(), values.clone().requires_grad_()]
    outputs = [pool(F.relu(norms[0](inputs[0]))), norm_relu_pool(inputs[1], norms[1], pool)]
    gradient = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(gradient)

    pairs = [outputs, [values.grad for values in inputs]]
    pairs += [[n.weight.grad for n in norms], [n.bias.grad for n in norms]]
    pairs += [[norm.get_buffer(name) for norm in norms] for name, _ in norms[0].named_buffers()]
    for wanted, found in pairs:
        # float64 rounds at 1e-16; sums over some 1000 voxels stay far below 1e-12
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_statistics_of_millions_of_voxels_in_float32() -> None:
    """Channels last, far from zero: as exact as float32 numbers can be, not as its running sums are."""
    torch.manual_seed(0)
    values = (5 + torch.randn(2, 3, 61, 130, 131)).contiguous(memory_format=torch.channels_last_3d)
    mean, variance = statistics(values)
    exact = values.double()
    # 68,000 roundings a slab at 6e-8; the variance is taken 5 standard deviations from zero.
    # PyTorch's own, of the whole at once, is off by 1e-3.
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3, 4)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), exact.var((0, 2, 3, 4), correction=0), rtol=2e-5, atol=0)


def test_a_training_step_of_the_network_is_that_of_its_layers() -> None:
    torch.manual_seed(0)
    model = build_model("modelB2", (94, 95, 96)).double()
    model.classifier[2].p = 0.0  # dropout would draw differently
    plain = copy.deepcopy(model)
    volume, label = torch.rand(2, 1, 94, 95, 96, dtype=torch.float64), torch.tensor([0, 1])
    F.cross_entropy(model(volume), label).backward()
    F.cross_entropy(plain.classifier(plain.features(volume).flatten(1)), label).backward()
    for (name, wanted), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert wanted.grad is not None
        assert found.grad is not None
        # relative to the layer: a convolution's bias before BatchNorm has a gradient of zero, up to rounding
        scale = max(wanted.grad.abs().max().item(), 1e-3)
        assert (wanted.grad - found.grad).abs().max().item() < 1e-9 * scale, name
    torch.testing.assert_close(dict(plain.named_buffers()), dict(model.named_buffers()), rtol=1e-12, atol=0)


def test_a_second_pass_over_overwritten_values_is_refused() -> None:
    """The backward pass writes over what it read; autograd must notice."""
    values = torch.randn(1, 5, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    outputs = norm_relu_pool(values * 1, make_norm(5), nn.MaxPool3d(2)).sum()
    outputs.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.backward()


@pytest.mark.parametrize("kernel", [3, 5, 7, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_taps_as_channels_are_the_same_convolution(kernel: int, batch: int) -> None:
    """In 16 bits as autocast has it: the same products, added up in float32, rounded once."""
    torch.manual_seed(0)
    conv, volume = nn.Conv3d(1, 4, kernel), torch.rand(batch, 1, 13, 12, 11)
    with torch.autocast("cpu", torch.bfloat16):
        found = stacked_convolution(volume, conv)
    wanted = F.conv3d(volume.bfloat16().float(), conv.weight.bfloat16().float(), conv.bias.bfloat16().float())
    assert found.dtype == torch.bfloat16
    # bfloat16 holds 8 bits: rounding is within 2**-8 of a value; bias and sums are of the order of 1
    torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=2**-8)
    gradient = torch.randn_like(wanted)
    (slopes,) = torch.autograd.grad(found.float(), conv.weight, gradient)
    (expected,) = torch.autograd.grad(
        F.conv3d(volume.bfloat16().float(), conv.weight), conv.weight, gradient.bfloat16().float()
    )
    assert (slopes - expected).abs().max() < 2**-7 * expected.abs().max()
