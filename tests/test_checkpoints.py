"""checkpoints.py: state dicts that fit a model, and those that do not."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internals import checkpoints
from internals.checkpoints import load_weights
from internals.errors import InputError
from models import CNN3d, build_model

CPU = torch.device("cpu")
GRID = (94, 95, 96)
NO_STATE_DICT = "not a PyTorch state dict"
State = dict[str, Tensor]

over_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "torch before 1.6"])


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


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "state_dict_f0.pth"


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


@pytest.mark.parametrize(
    ("zipped", "dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.float64), (True, torch.bfloat16)],
)
def test_published_checkpoint_loads(trained, path, zipped: bool, dtype: torch.dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in trained.state_dict().items()}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    model = build_model("modelB2", GRID)
    assert load_weights(model, path, CPU) is model
    assert not any(module.training for module in model.modules())
    found = model.state_dict()
    assert all(torch.equal(found[key], values.to(found[key].dtype)) for key, values in state.items())


def test_other_files(path):
    assert "no such checkpoint" in refusal(path)
    assert "is a folder, expected a checkpoint" in refusal(path.parent)
    for content in (b"path,label\nscan.nii,0\n", b"\x1f\x8b\x08\x00rest", bytes(1000)):
        path.write_bytes(content)
        assert NO_STATE_DICT in refusal(path)
    path.unlink()
    os.mkfifo(path)
    assert "is a pipe" in refusal(path)


@over_formats
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_truncated_file(trained, path, share: float, zipped: bool):
    torch.save(trained.state_dict(), path, _use_new_zipfile_serialization=zipped)
    os.truncate(path, int(share * path.stat().st_size))
    assert NO_STATE_DICT in refusal(path)


class Payload:
    """Unpickling makes a folder: stands for code that a checkpoint from elsewhere may hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("guards", ["both", "weights_only alone"])
@pytest.mark.parametrize("writer", ["torch", "torch before 1.6", "pickle"])
def test_code_in_a_checkpoint_does_not_run(trained, path, monkeypatch, writer: str, guards: str):
    if guards != "both":
        monkeypatch.setattr(checkpoints, "_check_pickle", lambda stream: None)
    content = trained.state_dict() | {"classifier.3.bias": Payload(path.with_name("made"))}
    torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    assert NO_STATE_DICT in refusal(path)
    assert not path.with_name("made").exists()
    if writer == "pickle":  # the payload is live: it runs where it is let
        pickle.loads(path.read_bytes())
        assert path.with_name("made").is_dir()


OTHER_LAYERS: dict[str, Callable[[State], Any]] = {
    "a tensor": lambda state: torch.zeros(3),
    "nothing": lambda state: {},
    "nested": lambda state: {"state_dict": state},
    "a key more": lambda state: state | {"classifier.4.bias": torch.zeros(2)},
    "a key less": lambda state: dict(list(state.items())[:-1]),
    "of DataParallel": lambda state: {f"module.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("content", OTHER_LAYERS.values(), ids=OTHER_LAYERS)
def test_other_layers(trained, path, content):
    torch.save(content(trained.state_dict()), path)
    assert "not the weights of this model (other layers)" in refusal(path)


@over_formats
def test_more_than_a_state_dict_of_the_model(trained, path, zipped):
    torch.save(trained, path)  # pickles classes
    assert NO_STATE_DICT in refusal(path)
    state = trained.state_dict() | {"more": torch.zeros(10**6)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert "larger than" in refusal(path)


@pytest.mark.parametrize(
    ("name", "grid", "message"),
    [
        ("modelB3", GRID, "features.0.weight is (2, 1, 3, 3, 3), the model and grid need (3, 1, 3, 3, 3)"),
        # two voxels after the last pool along the last axis: 2 * 32 + 62 = 126
        ("modelB2", (94, 95, 126), "classifier.0.weight is (64, 2), the model and grid need (64, 4)"),
        # A differs from B in kernels alone, C in the number of blocks
        ("modelA2", (110, 110, 110), "features.0.weight is (2, 1, 3, 3, 3)"),
        ("modelC2", (112, 112, 112), "other layers"),
    ],
)
def test_other_models(trained, path, name: str, grid: tuple[int, int, int], message: str):
    torch.save(trained.state_dict(), path)
    assert message in refusal(path, name, grid)


WEIGHT, BIAS, VARIANCE = "classifier.3.weight", "classifier.3.bias", "features.1.running_var"
OTHER_VALUES: list[tuple[str, Callable[[Tensor], Any], str]] = [  # key, its value, and the refusal
    (BIAS, Tensor.tolist, f"{BIAS} is list"),
    (VARIANCE, torch.neg, f"{VARIANCE} has negative"),
    *((key, lambda v: torch.where(v == v.max(), torch.nan, v), f"{key} has values that are not finite")
      for key in ("features.4.weight", VARIANCE, BIAS)),
    (WEIGHT, lambda v: v / 0, f"{WEIGHT} has values that are not finite"),
    (WEIGHT, lambda v: v.to(torch.complex64), f"{WEIGHT} is a tensor of torch.complex64"),
    (WEIGHT, Tensor.long, f"{WEIGHT} is a tensor of torch.int64"),
    (WEIGHT, Tensor.to_sparse, "it asks for torch"),
    (WEIGHT, lambda v: v.to("meta"), "it asks for torch"),
    (WEIGHT, lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "it asks for torch"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "change", "message"), OTHER_VALUES, ids=range(11))
def test_other_values(trained, path, key: str, change: Callable[[Tensor], Any], message: str):
    state = trained.state_dict()
    torch.save(state | {key: change(state[key])}, path)
    assert message in refusal(path)
