"""models.py: the published networks to the letter, `evaluation_mode`, arguments."""

import contextlib

import pytest
import torch
from networks import CASES, arguments, example, over_bad_arguments, random_network
from torch import nn

import models
from models import build_model, check_arguments, evaluation_mode

# of Wang et al. 2023: kernels, pools, Linear in-features per filter at 193x229x193, smallest edge
PUBLISHED = {
    "A": ((7, 5, 5, 3, 3), (2, 2, 2, 2, 2), 36, 110),
    "B": ((3, 3, 3, 3, 3), (2, 2, 2, 2, 2), 80, 94),
    "C": ((5, 5, 5, 5), (3, 2, 2, 2), 80, 112),
    "D": ((7, 7, 7), (3, 3, 3), 80, 105),
}
WIDTHS = (24, 28, 32, 36, 40, 44, 48, 52)

over_families = pytest.mark.parametrize("family", PUBLISHED)


def meta_model(name: str, *grid: int) -> models.CNN3d:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return build_model(name, grid) if grid else build_model(name)


def test_published_names():
    assert list(models.PUBLISHED) == [f"model{family}{width}" for family in "ABCD" for width in WIDTHS]


@over_families
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_names_and_shapes(family: str, width: int):
    """The keys of the published checkpoints, in their order, with their shapes."""
    kernels, _, per_filter, _ = PUBLISHED[family]
    expected: dict[str, tuple[int, ...]] = {}
    for block, kernel in enumerate(kernels):
        channels = width if block else 1
        expected[f"features.{4 * block}.weight"] = (width, channels, kernel, kernel, kernel)
        expected[f"features.{4 * block}.bias"] = (width,)
        for name in ("weight", "bias", "running_mean", "running_var"):
            expected[f"features.{4 * block + 1}.{name}"] = (width,)
        expected[f"features.{4 * block + 1}.num_batches_tracked"] = ()
    expected |= {"classifier.0.weight": (64, width * per_filter), "classifier.0.bias": (64,)}
    expected |= {"classifier.3.weight": (2, 64), "classifier.3.bias": (2,)}
    state = meta_model(f"model{family}{width}").state_dict()
    assert [(key, tuple(value.shape)) for key, value in state.items()] == list(expected.items())


@over_families
def test_layers_in_order(family: str):
    kernels, pools, _, _ = PUBLISHED[family]
    model = meta_model(f"model{family}24")
    layers = [nn.Conv3d, nn.BatchNorm3d, nn.ReLU, nn.MaxPool3d]
    assert [type(layer) for layer in model.features] == layers * len(kernels)
    assert [type(layer) for layer in model.classifier] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert model.classifier[2].p == 0.5
    for (conv, norm, _, pool), kernel, size in zip(model.blocks(), kernels, pools, strict=True):
        assert conv.kernel_size == (kernel,) * 3
        assert (conv.stride, conv.padding, conv.dilation, conv.groups) == ((1,) * 3, (0,) * 3, (1,) * 3, 1)
        assert (norm.eps, norm.momentum, norm.affine, norm.track_running_stats) == (1e-5, 0.1, True, True)
        assert (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == (size, size, 0, False)
    assert model.linears() == (model.classifier[0], model.classifier[3])


def test_new_networks_are_trainable_float32():
    model = build_model("modelB1", (94, 94, 94))
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@over_families
def test_smallest_grid(family: str):
    """The smallest edge works on each axis; one voxel less is refused with the shape that works."""
    smallest = PUBLISHED[family][3]
    assert models.smallest_edge(family) == smallest
    assert models.output_edge(family, smallest) == 1
    model = build_model(f"model{family}2", (smallest, smallest, smallest)).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 1, smallest, smallest, smallest)).shape == (1, 2)
    for axis in range(3):
        grid = [smallest + 9] * 3
        grid[axis] = smallest - 1
        with pytest.raises(ValueError, match=f"{smallest}x{smallest}x{smallest}"):
            build_model(f"model{family}2", tuple(grid))


@over_families
def test_forward_is_features_then_classifier_on_any_grid(family: str):
    """The linear layer takes what the blocks leave, batch by batch: (B, 2) logits."""
    for grid in ((193, 229, 193), (182, 218, 182), (121, 145, 122)):
        model = meta_model(f"model{family}3", *grid).eval()
        assert model(torch.empty(5, 1, *grid, device="meta")).shape == (5, 2)
    model, volume, _ = example(CASES["B"], 3)
    assert torch.equal(model(volume), model.classifier(model.features(volume).reshape(3, -1)))


UNKNOWN = ["", "A24", *(f"model{end}" for end in ("E24", "A0", "A", "a24", "A024", "A-4", "A24 ", "A24\n"))]


def test_unknown_names_and_grids_that_are_not_three_axes():
    for name in UNKNOWN:
        with pytest.raises(ValueError, match=r"unknown model .*modelA24") as caught:  # a name that would do
            build_model(name)
        assert f"'{name}'" in str(caught.value)
    for grid in ((193, 229), (193, 229, 193, 1)):
        with pytest.raises(ValueError, match="110x110x110"):
            build_model("modelA24", grid)


def flags(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("error", [None, KeyError])
def test_evaluation_mode_restores(error):
    """A network whose modules differ in mode, its parameters in requires_grad; also after an error."""
    model = random_network(CASES["one block"]).train()
    model.features[1].eval()
    model.classifier[0].bias.requires_grad_(False)
    before = flags(model)
    assert {True, False} == set(before[0]) == set(before[1])
    with pytest.raises(error) if error else contextlib.nullcontext(), evaluation_mode(model):
        assert flags(model) == ([False] * len(before[0]), [False] * len(before[1]))
        if error:
            raise error
    assert flags(model) == before


@over_bad_arguments
def test_bad_arguments(changes: dict[str, object]):
    with pytest.raises(ValueError, match="expected") as caught:
        check_arguments(**arguments(**changes))
    assert str(caught.value).startswith(next(iter(changes)) if "model" not in changes else "expected a CNN3d")
