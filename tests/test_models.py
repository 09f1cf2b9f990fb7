"""models.py: the published networks to the letter, checkpoints that fit and that do not, `frozen`."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from networks import CASES, random_network
from torch import nn

import models
from internals.errors import InputError
from models import build_model, frozen, load_weights

CPU = torch.device("cpu")

# design.md, section 5: kernels, pools, Linear in-features per filter at 193x229x193, smallest edge
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


# The published networks --------------------------------------------------------------------------


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
    found = {
        key: tuple(value.shape) for key, value in meta_model(f"model{family}{width}").state_dict().items()
    }
    assert list(found.items()) == list(expected.items())


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


def test_number_of_parameters():
    assert sum(parameter.numel() for parameter in meta_model("modelA24").parameters()) == 239_186


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
@pytest.mark.parametrize("grid", [(193, 229, 193), (182, 218, 182), (121, 145, 122)])
def test_forward_fits_any_grid(family: str, grid: tuple[int, int, int]):
    """The linear layer takes what the blocks leave, batch by batch: (B, 2) logits."""
    model = meta_model(f"model{family}3", *grid).eval()
    assert model(torch.empty(5, 1, *grid, device="meta")).shape == (5, 2)


def test_forward_is_features_then_classifier():
    case = CASES["B"]
    model = random_network(case)
    volume = torch.rand(3, 1, *case.grid, dtype=torch.float64)
    features = model.features(volume)
    assert torch.equal(model(volume), model.classifier(features.reshape(3, -1)))


@pytest.mark.parametrize(
    "name",
    [
        "modelE24",
        "modelA0",
        "A24",
        "modelA",
        "modela24",
        "modelA024",
        "modelA-4",
        "modelA24 ",
        "modelA24\n",
        "",
    ],
)
def test_unknown_names(name: str):
    with pytest.raises(ValueError, match="unknown model") as caught:
        build_model(name)
    assert f"'{name}'" in str(caught.value)
    assert "modelA24" in str(caught.value)  # an example of what would do


@pytest.mark.parametrize("grid", [(193, 229), (193, 229, 193, 1)])
def test_grids_that_are_not_three_axes(grid: tuple[int, ...]):
    with pytest.raises(ValueError, match="110x110x110"):
        build_model("modelA24", grid)


# Checkpoints -------------------------------------------------------------------------------------

GRID = (94, 95, 96)


@pytest.fixture(scope="module")
def trained() -> models.CNN3d:
    """A network whose state has no default left."""
    torch.manual_seed(0)
    model = build_model("modelB2", GRID)
    for layers in model.blocks():
        layers.norm.running_mean.normal_()
        layers.norm.running_var.uniform_(0.2, 2)
        layers.norm.num_batches_tracked.fill_(17)
    return model


def refusal(path: Path, name: str = "modelB2", grid: tuple[int, int, int] = GRID) -> str:
    """The message of the InputError that loading `path` raises; the model must stay as it was."""
    model = build_model(name, grid)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(model, path, CPU)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "torch before 1.6"])
def test_published_checkpoint_loads(trained, tmp_path, zipped: bool):
    """What the published code wrote: torch.save(model.state_dict(), "state_dict_f0.pth")."""
    path = tmp_path / "state_dict_f0.pth"
    torch.save(trained.state_dict(), path, _use_new_zipfile_serialization=zipped)
    model = build_model("modelB2", GRID)
    loaded = load_weights(model, path, CPU)
    assert loaded is model
    assert not any(module.training for module in loaded.modules())
    found = loaded.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in trained.state_dict().items())
    volume = torch.rand(1, 1, *GRID)
    with torch.no_grad(), frozen(trained):
        assert torch.equal(loaded(volume), trained(volume))


def test_missing_file(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "state_dict_f0.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "torch before 1.6"])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_truncated_file(trained, tmp_path, share: float, zipped: bool):
    path = tmp_path / "state_dict_f0.pth"
    torch.save(trained.state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "not a PyTorch state dict" in refusal(path)


@pytest.mark.parametrize("content", [b"path,label\nscan.nii,0\n", b"\x1f\x8b\x08\x00rest", bytes(1000)])
def test_other_files(tmp_path, content: bytes):
    path = tmp_path / "state_dict_f0.pth"
    path.write_bytes(content)
    assert "not a PyTorch state dict" in refusal(path)


def test_folder(tmp_path):
    assert "is a folder, expected a checkpoint" in refusal(tmp_path)


def test_other_width(trained, tmp_path):
    path = tmp_path / "state_dict_f0.pth"
    torch.save(trained.state_dict(), path)
    message = refusal(path, name="modelB3")
    assert "features.0.weight is (2, 1, 3, 3, 3)" in message
    assert "(3, 1, 3, 3, 3)" in message


def test_other_grid(trained, tmp_path):
    path = tmp_path / "state_dict_f0.pth"
    torch.save(trained.state_dict(), path)
    # two voxels after the last pool along the last axis: 2 * 32 + 62 = 126
    message = refusal(path, grid=(94, 95, 126))
    assert "classifier.0.weight is (64, 2)" in message
    assert "(64, 4)" in message


@pytest.mark.parametrize(("name", "grid"), [("modelC2", (112, 112, 112)), ("modelA2", (110, 110, 110))])
def test_other_family(trained, tmp_path, name: str, grid: tuple[int, int, int]):
    """A differs from B in kernels alone, C in the number of blocks."""
    path = tmp_path / "state_dict_f0.pth"
    torch.save(trained.state_dict(), path)
    refusal(path, name=name, grid=grid)


def test_key_added_or_lost(trained, tmp_path):
    path = tmp_path / "state_dict_f0.pth"
    state = trained.state_dict()
    torch.save(state | {"classifier.4.bias": torch.zeros(2)}, path)
    assert "other layers" in refusal(path)
    del state["classifier.3.bias"]
    torch.save(state, path)
    assert "other layers" in refusal(path)


def test_parallel_prefix(trained, tmp_path):
    """Weights of a DataParallel model have other names; they are refused, not dropped."""
    path = tmp_path / "state_dict_f0.pth"
    torch.save({f"module.{key}": value for key, value in trained.state_dict().items()}, path)
    assert "other layers" in refusal(path)


def test_not_a_state_dict(trained, tmp_path):
    path = tmp_path / "state_dict_f0.pth"
    for content in (torch.zeros(3), [1, 2], {"state_dict": trained.state_dict()}, {}):
        torch.save(content, path)
        assert "not the weights of this model" in refusal(path)


def test_value_that_is_no_tensor(trained, tmp_path):
    path = tmp_path / "state_dict_f0.pth"
    torch.save(trained.state_dict() | {"classifier.3.bias": [0.0, 0.0]}, path)
    assert "classifier.3.bias is list" in refusal(path)


@pytest.mark.parametrize("key", ["features.4.weight", "features.1.running_var", "classifier.3.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(trained, tmp_path, key: str, value: float):
    path = tmp_path / "state_dict_f0.pth"
    state = {name: values.clone() for name, values in trained.state_dict().items()}
    state[key].view(-1)[-1] = value
    torch.save(state, path)
    assert f"{key} has values that are not finite" in refusal(path)


def other_kinds(wanted: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of the right shape that are no weights."""
    zeros = torch.zeros_like(wanted)
    return {
        "sparse": zeros.to_sparse(),
        "complex": zeros.to(torch.complex64),
        "whole": zeros.long(),
        "quantised": torch.quantize_per_tensor(zeros, 0.1, 0, torch.qint8),
        "without values": zeros.to("meta"),
    }


@pytest.mark.parametrize("kind", ["sparse", "complex", "whole", "quantised", "without values"])
def test_tensors_of_another_kind(trained, tmp_path, kind):
    path = tmp_path / "state_dict_f0.pth"
    state = trained.state_dict()
    torch.save(state | {"classifier.3.weight": other_kinds(state["classifier.3.weight"])[kind]}, path)
    message = refusal(path)
    assert "classifier.3.weight is a tensor of" in message or "it asks for torch" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_precision_are_taken(trained, tmp_path, dtype):
    path = tmp_path / "state_dict_f0.pth"
    state = {key: values.to(dtype) if values.is_floating_point() else values for key, values in
             trained.state_dict().items()}  # fmt: skip
    torch.save(state, path)
    found = load_weights(build_model("modelB2", GRID), path, CPU).state_dict()
    assert all(torch.equal(found[key], values.to(found[key].dtype)) for key, values in state.items())


def test_negative_variances(trained, tmp_path):
    path = tmp_path / "state_dict_f0.pth"
    torch.save(trained.state_dict() | {"features.1.running_var": torch.tensor([1.0, -1.0])}, path)
    assert "features.1.running_var has negative" in refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_larger_than_the_model(trained, tmp_path, zipped):
    path = tmp_path / "state_dict_f0.pth"
    torch.save(
        trained.state_dict() | {"more": torch.zeros(10**6)}, path, _use_new_zipfile_serialization=zipped
    )
    assert "larger than" in refusal(path)


def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "state_dict_f0.pth")
    assert "is a pipe" in refusal(tmp_path / "state_dict_f0.pth")


class Payload:
    """Unpickling makes a folder: stands for code that a checkpoint from elsewhere may hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("guards", ["both", "weights_only alone"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_checkpoint_does_not_run(trained, tmp_path, monkeypatch, writer: str, guards: str):
    if guards != "both":
        monkeypatch.setattr(models, "_check_pickle", lambda stream: None)
    path, made = tmp_path / "state_dict_f0.pth", tmp_path / "made"
    content = {**trained.state_dict(), "classifier.3.bias": Payload(made)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    assert "not a PyTorch state dict" in refusal(path)
    assert not made.exists()
    if writer == "pickle":  # the payload is live: it runs where it is let
        pickle.loads(path.read_bytes())
        assert made.is_dir()


def test_whole_models_are_refused(trained, tmp_path):
    """torch.save(model) pickles classes, not a state dict."""
    path = tmp_path / "state_dict_f0.pth"
    torch.save(trained, path)
    assert "not a PyTorch state dict" in refusal(path)


# frozen ------------------------------------------------------------------------------------------


def mixed_state() -> models.CNN3d:
    """A network whose modules differ in mode, its parameters in requires_grad."""
    model = random_network(CASES["one block"]).train()
    model.features[1].eval()
    model.classifier[0].bias.requires_grad_(False)
    return model


def flags(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def test_frozen_evaluates_and_restores():
    model = mixed_state()
    before = flags(model)
    assert {True, False} == set(before[0]) == set(before[1])
    with frozen(model):
        assert flags(model) == ([False] * len(before[0]), [False] * len(before[1]))
    assert flags(model) == before


def test_frozen_restores_after_an_error():
    model = mixed_state()
    before = flags(model)
    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    assert flags(model) == before
