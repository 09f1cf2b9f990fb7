"""checkpoints.py: state dicts that fit a model, and those that do not."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from internals import checkpoints
from internals.checkpoints import load_weights
from internals.errors import InputError
from models import CNN3d, build_model, evaluation_mode

CPU = torch.device("cpu")
GRID = (94, 95, 96)


@pytest.fixture(scope="module")
def trained() -> CNN3d:
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
    with torch.no_grad(), evaluation_mode(trained):
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
        monkeypatch.setattr(checkpoints, "_check_pickle", lambda stream: None)
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
