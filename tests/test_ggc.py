"""ggc.py: Grad-CAM and guided Grad-CAM by hand, against autograd with a guided relu, and against captum."""

from functools import cache

import pytest
import torch
from captum.attr import GuidedGradCam, LayerAttribution, LayerGradCam
from networks import (
    CASES,
    Case,
    check_nearly_equal,
    difference,
    mixed_targets,
    network_by_hand,
    on_diagonal,
    over_cases,
    random_network,
    random_volume,
    smallest_network,
)
from places import Place, over_places
from torch import Tensor, nn

import models
from ggc import gradcam, guided_gradcam
from models import CNN3d

ONE = torch.tensor([1])

# The same sums of a few thousand float64 terms, in another order, differ by about 1e-13.
ORACLE = 1e-10

# captum announces the hooks it sets, and removes
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")


class GuidedRelu(torch.autograd.Function):
    """relu; on the way back, also drop what is negative (Springenberg et al. 2015)."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return values.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        return gradient.clamp(min=0) * (values > 0)


def stretch(length: int, to: int) -> Tensor:
    """Linear interpolation of one axis as a matrix (to, length): half-pixel centres, ends held."""
    places = ((torch.arange(to).double() + 0.5) * length / to - 0.5).clamp(0, length - 1)
    return (1 - (places[:, None] - torch.arange(length)).abs()).clamp(min=0)


def naive_gradcam(model: CNN3d, volume: Tensor, target: Tensor, layer: int = -1) -> Tensor:
    """relu(sum_k w_k A_k) of a convolution's output A, the last one's by default, stretched to the scan."""
    place = 4 * (layer % len(model.blocks())) + 1
    before, after = model.features[:place], model.features[place:]
    maps = before(volume).detach().requires_grad_()
    logits = model.classifier(after(maps).flatten(1))
    (slopes,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), maps)
    weights = slopes.mean((2, 3, 4), keepdim=True)
    cam = (weights * maps.detach()).sum(1, keepdim=True).clamp(min=0)
    axes = [stretch(*lengths) for lengths in zip(cam.shape[2:], volume.shape[2:], strict=True)]
    return torch.einsum("bcxyz,ix,jy,kz->bcijk", cam, *axes)


def naive_guided(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    """The target logit's gradient at the scan with every relu guided."""
    image = volume.detach().requires_grad_()
    values = image
    for layer in (*model.features, nn.Flatten(), *model.classifier):
        values = GuidedRelu.apply(values) if isinstance(layer, nn.ReLU) else layer(values)
    return torch.autograd.grad(values.gather(1, target[:, None]).sum(), image)[0]


def naive_ggc(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    return naive_guided(model, volume, target) * naive_gradcam(model, volume, target)


@cache
def explained(case: Case, batch: int) -> tuple[CNN3d, Tensor, Tensor, Tensor]:
    """A network, scans, targets and the plain maps, none of which is zero.

    One is where Grad-CAM is negative everywhere, or the guided gradient dropped on its way.
    """
    volume, target = random_volume(case, batch), mixed_targets(batch)
    for seed in range(20):
        model = random_network(case, seed)
        expected = naive_ggc(model, volume, target)
        if (expected.flatten(1).abs().amax(1) > 0).all():
            return model, volume, target, expected
    raise AssertionError("every map is zero")


def captum_ggc(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    method = GuidedGradCam(model, model.features[-4])
    return method.attribute(volume, target, interpolate_mode="trilinear").detach()


@over_places
@over_cases
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_autograd_with_guided_relus_and_captum(place: Place, case: Case, batch: int):
    model, volume, target, expected = explained(case, batch)
    found = place.do(guided_gradcam, model, volume, target)
    assert difference(found, expected) < place.oracle
    assert difference(found, captum_ggc(model, volume, target)) < place.oracle


LAYERS = [(name, layer) for name, case in CASES.items() for layer in range(len(case.blocks))]


@over_places
@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_gradcam_of_every_block_equals_autograd_and_captum(place: Place, name: str, layer: int):
    case = CASES[name]
    volume, target = random_volume(case, 3), mixed_targets(3)
    models_of_seeds = (random_network(case, seed) for seed in range(20))
    pairs = ((model, naive_gradcam(model, volume, target, layer)) for model in models_of_seeds)
    model, expected = next(pair for pair in pairs if (pair[1].flatten(1).amax(1) > 0).all())
    for number in (layer, layer - len(case.blocks)):  # from either end
        found = place.do(gradcam, model, volume, target, number)
        assert difference(found, expected) < place.oracle
        assert (found >= 0).all()
    maps = LayerGradCam(model, model.features[4 * layer]).attribute(volume, target, relu_attributions=True)
    captum = LayerAttribution.interpolate(maps, volume.shape[2:], "trilinear").detach()
    assert difference(found, captum) < place.oracle


@pytest.mark.parametrize("layer", [2, -3, 5])
def test_no_such_block(layer: int):
    volume, target = random_volume(CASES["C"], 1), ONE
    with pytest.raises(ValueError, match=f"layer {layer}: the network has 2 blocks, 0 to 1 or -2 to -1"):
        gradcam(random_network(CASES["C"]), volume, target, layer)


def test_volumes_with_negative_values():
    model, volume, target, _ = explained(CASES["C"], 2)
    expected = naive_ggc(model, volume - 0.1, target)
    assert difference(guided_gradcam(model, volume - 0.1, target), expected) < ORACLE


@pytest.mark.parametrize("family", models.FAMILIES)
def test_equals_captum_at_the_smallest_published_grid(family: str):
    model, volume = smallest_network(family)
    check_nearly_equal(guided_gradcam(model, volume, ONE), captum_ggc(model, volume, ONE))


def test_network_by_hand():
    """See `network_by_hand`. At the scan h0 and h2 are open: logit 1 has slopes (2, -3, 4) at f0, f1, f2.

    Grad-CAM   before BatchNorm (1, -3, -8), each at one of 8 voxels: w = (1/8, -3/8, -1)
               at 000, A = (8, -1, 2): 1 + 3/8 - 2 = -5/8, so 0
               at 111, A = (7, 4, -1): 7/8 - 12/8 + 1 = 3/8
               elsewhere, A = (-2, 0, 0): -2/8, so 0
               stretched from 2 to 3 voxels, the weight of index 1 is (0, 1/2, 1) along each axis:
               (v000, v111, v222) get 3/8 (0, 1/8, 1)
    Guided     h2 has slope -1: dropped. f0, f1, f2 have (2, -2, 4): f1 dropped.
               before BatchNorm (1, 0, -8): (1, 3, 0) of f0, -8 (0, -1, 1) of f2: (1, 11, -8)
    """
    model, volume = network_by_hand()
    found = guided_gradcam(model, volume, ONE)
    # a dozen float64 operations
    torch.testing.assert_close(found, on_diagonal(0, 33 / 64, -3), rtol=1e-13, atol=1e-13)


def test_negative_gradcam_gives_zeros():
    """Logit 0 = h2 = f1 by hand: w = (0, 1/8, 0), A_1 = 4 at 111 gives a map; - h2 gives none.

    With logit 0 = -h2 the Grad-CAM is 1/8 at 000 alone, where A_1 = -1, but the guided gradient,
    whose first slope is negative, is zero.
    """
    model, volume = network_by_hand()
    zero = torch.tensor([0])
    # CAM 1/2 at 111 stretched to (0, 1/16, 1/2); guided (0, 2, -1)
    found = guided_gradcam(model, volume, zero)
    torch.testing.assert_close(found, on_diagonal(0, 1 / 8, -1 / 2), rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        model.linears()[1].weight[0, 2] = -1
    assert guided_gradcam(model, volume, zero).eq(0).all()
