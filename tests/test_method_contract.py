"""What every explanation method promises: the model as it was found, maps like the scans, clear refusals."""

import contextlib
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from networks import CASES, arguments, difference, example, over_bad_arguments
from torch import Tensor, nn

import heatmap
from ggc import gradcam
from gradient import smoothgrad
from ig import integrated_gradients
from lrp import lrp
from models import CNN3d
from occlusion import occlusion


def ig_from_baseline(model: CNN3d, volume: Tensor, target: Tensor) -> Tensor:
    return integrated_gradients(model, volume, target, 3, torch.full_like(volume[:1], 0.3))


METHODS = {
    **heatmap.METHODS,
    "LRP composite": partial(lrp, rule="composite"),
    "IG": partial(integrated_gradients, steps=3),
    "IG from a baseline": ig_from_baseline,
    "GradCAM of the first block": partial(gradcam, layer=0),
    "SmoothGrad": partial(smoothgrad, samples=3),
    "Occlusion": partial(occlusion, size=12, stride=10),
}
over_methods = pytest.mark.parametrize("explain", METHODS.values(), ids=METHODS)
HOOKS = [name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)]


def snapshot(model: CNN3d) -> dict[str, object]:
    """Everything a method must leave alone, in a form that compares with ==."""
    state: dict[str, object] = {"grad mode": torch.is_grad_enabled()}
    for name, module in model.named_modules():
        hooks = [list(getattr(module, hook)) for hook in HOOKS]
        state[f"module {name}"] = (sorted(vars(module)), module.training, hooks)
    for name, p in model.named_parameters():
        state[f"parameter {name}"] = (p.requires_grad, p.grad, p._backward_hooks, p.data_ptr())
    return state | {name: values.numpy().tobytes() for name, values in model.state_dict().items()}


@contextlib.contextmanager
def left_as_found(model: CNN3d) -> Iterator[None]:
    """Put a model into a state that no method would choose, and see it come back to just that.

    Modes differ between modules, one parameter needs no gradient and there is a hook of the user's own.
    """
    model.train()
    model.features[1].eval()
    model.classifier[3].weight.requires_grad_(False)
    model.features[2].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    yield
    assert snapshot(model) == before


@over_methods
def test_the_model_is_left_as_found(explain):
    """By success, by an error midway and by bad arguments."""
    case = CASES["A two blocks"]
    model, volume, target = example(case, 1)
    with left_as_found(model):
        explain(model, volume, target)
    with left_as_found(model), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        # two voxels too long along one axis: all blocks run, then the hidden layer does not fit
        explain(model, torch.rand(1, 1, 24, 25, 27, dtype=torch.float64), target)
    with left_as_found(model), pytest.raises(ValueError, match="target"):
        explain(model, volume, target + 1)


@over_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_map_is_like_the_volume(explain, dtype):
    """Same shape, dtype and device; finite; outside autograd; and the volume is untouched."""
    model, volume, target = example(CASES["one block"])
    model, volume = model.to(dtype), volume.to(dtype)
    before = volume.clone()
    found = explain(model, volume, target)
    # in evaluation mode always: no dropout, no batch statistics; bitwise, being the same operations
    assert torch.equal(explain(model.train(), volume, target), found)
    assert (found.shape, found.dtype, found.device) == (volume.shape, volume.dtype, volume.device)
    assert torch.isfinite(found).all()
    assert found.abs().sum() > 0
    assert not found.requires_grad
    assert torch.equal(volume, before)


@over_methods
def test_each_scan_has_its_own_target(explain):
    """A batch with a target per scan is its scans explained one by one, and targets matter."""
    model, volume, target = example(CASES["B"], 3)
    apart = torch.cat([explain(model, volume[i : i + 1], target[i : i + 1]) for i in range(3)])
    # float64 sums in another order, over a few thousand terms at most
    assert difference(explain(model, volume, target), apart) < 1e-11
    assert difference(explain(model, volume, 1 - target), apart) > 0.1


@over_methods
@over_bad_arguments
def test_bad_arguments(explain, changes: dict[str, object]):
    with pytest.raises(ValueError, match=r"CNN3d|volume|target"):
        explain(**arguments(**changes))
