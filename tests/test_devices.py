"""devices.py and selfcheck.py: choosing a device, what is known of it, whether it computes what it should."""

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from networks import CASES, Case, difference, example, over_cases, random_network, random_volume
from places import PLACES, Place, over_places
from standin import StandIn
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import models
import selfcheck
import training
from explaining import Explainer, Progress, explain_scans
from internals import devices
from internals.errors import InputError
from methods import METHODS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_devices_that_are_there(monkeypatch):
    assert devices.resolve_device("cpu") == CPU
    if torch.cuda.is_available():
        assert devices.resolve_device("0") == devices.resolve_device("auto") == GPU
        assert torch.cuda.current_device() == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.resolve_device("auto") == CPU  # never MPS, which must be asked for
    assert devices.resolve_device("mps") == torch.device("mps")


@pytest.fixture
def current(monkeypatch) -> list[torch.device]:
    """Two GPUs, as far as PyTorch tells; which became the current one, and where a tensor was made."""
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: used.append(device))
    return used


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("0", 0), ("1", 1), ("cuda:1", 1)])
def test_a_gpu_becomes_the_current_device(current, name, index):
    """Else pinned memory and whatever names no device would go to the first GPU."""
    assert devices.resolve_device(name) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)] * 2  # and it is tried


BEYOND = str(torch.cuda.device_count())  # the first GPU that is not there; "0" on a machine without any
NAMES = (BEYOND, f"cuda:{BEYOND}", "99", "cuda:99", "tpu", "gpu", "meta", "xpu", "-1", "cuda:x", "", "1.0")


@pytest.mark.usefixtures("current")
def test_gpus_that_cannot_be_used(monkeypatch):
    """In PyTorch's words, as where another process has it; without a driver it only counts the cards."""

    def busy(_: torch.device) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(InputError, match=r"^--device 0: cannot be used \(.*busy or unavailable\)$"):
        devices.resolve_device("0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.resolve_device("auto") == CPU


@pytest.mark.parametrize("name", NAMES)
def test_devices_that_are_not(name):
    with pytest.raises(InputError, match=f"^--device {name}:"):
        devices.resolve_device(name)


def test_float32_is_float32_unless_tf32_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: True)
    for precision, tf32 in (("tf32", True), ("fp32", False), ("tf32", True), ("bf16", False)):
        devices.set_precision(GPU, precision)
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32


def test_precisions_that_a_device_lacks(monkeypatch):
    with pytest.raises(InputError, match=r"--precision tf32: cpu, .* has no TF32"):
        devices.set_precision(CPU, "tf32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: emulated)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for precision in ("tf32", "bf16"):
        with pytest.raises(InputError, match=f"--precision {precision}: Tesla T4 has no"):
            devices.set_precision(GPU, precision)


def test_cudnn_version_as_people_write_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for number, text in {91002: "9.10.2", 90100: "9.1.0", 8907: "8.9.7"}.items():
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda number=number: number)
        assert devices.describe(GPU) == {"name": "NVIDIA H100", "cuda": "12.8", "cudnn": text}
    assert devices.describe(CPU) == {"name": f"cpu, {torch.backends.cpu.get_cpu_capability()}"}


# PyTorch, cuDNN, capability and precision, and the thread of PyTorch's that names these numbers
FAULTS = """
    2.8.0          90800 8.0 bf16 163539
    2.8.0          90701 8.0 bf16
    2.8.0          91002 8.0 fp32
    2.9.0+cu128    91002 8.0 bf16 166643
    2.9.0+cu128    91500 8.0 bf16 166643
    2.9.1+cu128    91002 8.0 bf16 166643
    2.9.1+cu128    91500 8.0 bf16
    2.10.0a0+git1f 91400 8.0 bf16 166643
    2.8.0          91002 8.0 tf32 167024
    2.8.0          91002 9.0 fp32
    2.10.0         91501 9.0 tf32 167024
    2.10.0         91600 9.0 tf32
    2.6.0+cu124    90100 9.0 fp32 150700
    2.6.0+cu124    90100 8.6 fp32
    2.13.0         92000 9.0 bf16
"""


@pytest.mark.parametrize("row", FAULTS.strip().splitlines(), ids=str.strip)
def test_known_faults_are_named(monkeypatch, row):
    version, cudnn, capability, precision, *issues = row.split()
    major, minor = map(int, capability.split("."))
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: int(cudnn))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
    found = devices.known_faults(GPU, precision)
    assert len(found) == len(issues)
    assert all(f"#{issue}" in line for issue, line in zip(issues, found, strict=True))
    assert devices.known_faults(CPU, precision) == []


def test_sizes_follow_the_free_memory_of_a_gpu(monkeypatch):
    """A 128th of it, as a power of two."""
    for free, expected in {2**20: 2**13, 8e9: 2**25, 24e9: 2**27, 80e9: 2**29, 180e9: 2**29}.items():
        monkeypatch.setattr(devices, "free_memory", lambda device, free=free: int(free))
        devices.values_at_once.cache_clear()
        assert devices.values_at_once(GPU, 2**23) == expected
        assert devices.values_at_once(CPU, 2**23) == 2**23
    devices.values_at_once.cache_clear()


def test_free_memory_is_what_the_card_and_the_allocator_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert devices.free_memory(GPU) == 1000 + 300 - 100


@pytest.mark.parametrize("name", ["modelA24", "modelB3", "modelC2", "modelD5"])
def test_largest_output_is_that_of_the_first_convolution(name):
    grid = (112, 113, 114)
    with torch.device("meta"):  # shapes alone
        model = models.build_model(name, grid).eval()
        values, sizes = torch.empty(1, 1, *grid), []
        for layer in model.features:
            values = layer(values)
            sizes.append(values.numel())
    assert models.largest_output(name, grid) == max(sizes) == sizes[0]


def test_batches_that_a_gpu_cannot_count_are_refused():
    """modelB52, five scans of the published grid: 52 * 191 * 227 * 191 * 5 = 2.153e9 > 2^31 = 2.147e9."""
    wide, narrow = (models.largest_output(name, models.PUBLISHED_GRID) for name in ("modelB52", "modelB48"))
    assert wide == 52 * 191 * 227 * 191
    for batch, values, device in ((4, wide, GPU), (5, wide, CPU), (5, narrow, GPU)):
        devices.check_batch(batch, values, device)
    with pytest.raises(InputError, match=r"--batch 5: .* the largest batch that works is 4"):
        devices.check_batch(5, wide, GPU)
    with pytest.raises(InputError, match="no batch works"):
        devices.check_batch(1, 2**31, GPU)


@over_places
@over_cases
def test_forward_pass_is_that_of_the_layers(place: Place, case: Case):
    """In float32: sums of some 1000 products."""
    model, volume, _ = example(case)
    with torch.no_grad():
        expected = model.classifier(model.features(volume).flatten(1))
        for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            found = place.do(lambda there, scans: there(scans), model.to(dtype), volume.to(dtype))
            assert difference(found, expected) < close


TARGET = torch.tensor([0, 1])


@functools.cache
def reference(work: str, family: str) -> Tensor:
    """A piece of the self-check's work, in float64 by the layers as they stand."""
    model, volume = selfcheck.example_network(f"model{family}2")
    return selfcheck.MAPS.get(work, selfcheck.gradients)(model.double(), volume.double(), TARGET)


@over_places
@over_cases
def test_training_step_is_that_of_the_layers(place: Place, case: Case):
    """test_fused.py holds the CPU's own layers against PyTorch's in float64."""
    model, volume, target = example(case)
    model.classifier[2].p = 0.0  # drawn otherwise on every device
    exact, sizes = selfcheck.gradients(model, volume, target), selfcheck.kernel_sizes(model)
    step = functools.partial(selfcheck.gradients, dtype=torch.float32)
    found = place.do(step, model.float(), volume.float(), target)
    # PyTorch's BatchNorm loses digits where channels lie last; without a gradient it would be 1
    assert selfcheck.relative_difference(found, exact, sizes) < 0.5


@pytest.mark.parametrize("place", [p for p in PLACES.values() if p.kind != "stand-in for cuda"], ids=str)
def test_training_step_in_bfloat16(place: Place):
    """Of family B: a CPU without instructions for it takes minutes for large kernels."""
    model, volume = selfcheck.example_network("modelB2")
    found = place.do(functools.partial(selfcheck.gradients, dtype=torch.bfloat16), model, volume, TARGET)
    exact = reference("training gradients", "B")
    bound = selfcheck.TOLERANCES["training gradients", "bf16"]
    assert selfcheck.relative_difference(found, exact, selfcheck.kernel_sizes(model)) < bound


@over_places
@pytest.mark.parametrize("method", selfcheck.MAPS)
def test_maps_in_float32_are_those_of_float64(place: Place, method: str):
    """As commands make them; test_lrp.py, test_ig.py and test_ggc.py hold them against oracles in float64."""
    model, volume = selfcheck.example_network("modelB2")
    found, exact = place.do(selfcheck.MAPS[method], model, volume, TARGET), reference(method, "B")
    assert (found - exact).norm() < selfcheck.TOLERANCES["maps", "fp32"] * exact.norm()


@pytest.mark.parametrize("place", [p for name, p in PLACES.items() if name != "cpu"], ids=str)
def test_an_epoch_of_training_and_its_scores(place: Place):
    """As on the CPU; test_training.py holds that against a plain loop, test_fused.py against the layers."""
    case = CASES["B"]
    model, scans = random_network(case).float(), random_volume(case, 5).float()
    model.classifier[2].p = 0.0  # drawn otherwise on every device
    loader = DataLoader(TensorDataset(scans, torch.tensor([0, 1, 1, 0, 1])), 2)

    def trained(network: models.CNN3d) -> Tensor:
        state = training.TrainingState(network, torch.optim.Adam(network.parameters(), lr=1e-3))
        losses = [training.train_epoch(state, loader, "fp32", "") for _ in range(2)]
        assert all(values.device == CPU for values in training.plain_weights(network).values())
        return torch.tensor([*losses, *training.evaluate(network, loader)])

    expected = trained(copy.deepcopy(model)).double()
    assert expected[0] > expected[1] > 0
    # float32 through two epochs of Adam
    torch.testing.assert_close(place.do(trained, model), expected, rtol=1e-3, atol=1e-3)


def test_a_loss_is_waited_for_one_step_late(monkeypatch):
    """So that the GPU has the next step to do meanwhile; and once per step."""
    events: list[str] = []
    steps = itertools.count(1)

    def mark(device: torch.device) -> Callable[[], None]:
        number = next(steps)
        events.append(f"step {number}")
        return lambda: events.append(f"wait {number}")

    monkeypatch.setattr(devices, "record_event", mark)
    case = CASES["one block"]
    model, scans = random_network(case).float(), random_volume(case, 3).float()
    state = training.TrainingState(model, torch.optim.Adam(model.parameters()))
    training.train_epoch(state, DataLoader(TensorDataset(scans, torch.tensor([1, 0, 1])), 1), "fp32", "")
    assert events == ["step 1", "step 2", "wait 1", "step 3", "wait 2", "wait 3"]


def test_only_cuda_copies_without_waiting_and_it_is_waited_for(monkeypatch):
    """On MPS PyTorch may read the scan after its memory was given back (pytorch#189690)."""
    scan, waited = Mock(), Mock()
    for device, without_waiting in ((CPU, False), (GPU, True), (torch.device("mps"), False)):
        devices.to_device(scan, device)
        scan.to.assert_called_with(device, non_blocking=without_waiting)
    monkeypatch.setattr(torch, "get_device_module", waited)
    selfcheck.synchronise(CPU)
    assert waited.mock_calls == []
    selfcheck.synchronise(GPU)
    waited.return_value.synchronize.assert_called_once()


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_described_where_there_is_no_float64(method):
    """On MPS: sums and residuals are taken in float64, so the maps leave the device before."""
    case, known = CASES["B"], METHODS[method]
    model, scans = random_network(case).float(), random_volume(case, 2).float()

    def explained(network: models.CNN3d) -> tuple[np.ndarray, pd.DataFrame]:
        options = known.chosen({"steps": 2, "samples": 2, "size": 20.0, "stride": 15.0})
        settings = {"baseline": None, "voxel_sizes": (1, 1, 1)}
        explainers = {method: Explainer(network, known, options, settings, "label")}
        loader = DataLoader(TensorDataset(scans, torch.tensor([0, 1])), 2)
        progress = {method: Progress()}
        explain_scans(explainers, loader, [1, 2], lambda *_: None, progress, lambda: None, method)
        return progress[method].means.mean(), progress[method].found

    mean, rows = explained(model)
    with StandIn("mps") as standin:
        there = copy.deepcopy(model).to(standin.device)
        with pytest.raises(TypeError, match="float64"):
            copy.deepcopy(model).to(standin.device).double()
        mean_there, rows_there = explained(there)
        scans_there, exact = scans.to(standin.device), scans.double()
        assert selfcheck.measure(lambda: scans_there, exact, CPU)[0] == 0
    # other routines of the same float32 sums
    np.testing.assert_allclose(mean_there, mean, atol=1e-3 * np.abs(mean).max())
    pd.testing.assert_frame_equal(rows_there, rows, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", [2, 4])  # those of the commands' own check and of bench/device.py
@pytest.mark.parametrize("family", models.FAMILIES)
def test_no_map_of_the_checks_is_zero(family, width):
    """Their difference would be a division by zero: the device would pass for wrong."""
    model, volume = selfcheck.example_network(f"model{family}{width}")
    for explain in selfcheck.MAPS.values():
        assert (explain(model, volume, torch.tensor([0, 1])).flatten(1).norm(dim=1) > 1e-3).all()


def test_a_convolution_that_lies_is_found(monkeypatch):
    """As on MPS in 2026: no error, no NaN, other numbers. Here it forgets the kernel's last plane."""
    truth = F.conv3d

    def lying(inputs: Tensor, weight: Tensor, *rest: object, **options: object) -> Tensor:
        if weight.dtype == torch.float32:
            weight = torch.cat([weight[:, :, :-1], torch.zeros_like(weight[:, :, -1:])], 2)
        return truth(inputs, weight, *rest, **options)  # type: ignore[arg-type]

    selfcheck.require_correct(CPU)
    monkeypatch.setattr(F, "conv3d", lying)
    with pytest.raises(InputError, match=r"wrong values there \(forward pass off by .*use --device cpu"):
        selfcheck.require_correct(CPU)


def missing(found: Tensor) -> Tensor:
    raise NotImplementedError("The operator 'aten::max_pool3d_with_indices' is not implemented for MPS")


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], list[torch.dtype], str]] = {  # what, where, and the words
    "LRP IG GGC": (
        lambda found: found * 1.2,
        [torch.float32],
        r"wrong values there .LRP off by 0.2, IG off by 0.2, GGC off by 0.2[,)]",
    ),
    "IG": (torch.zeros_like, [torch.float32, torch.float64], r"wrong values there .IG off by nan\)"),
    "GGC": (missing, [torch.float32], r"cannot run the networks \(The operator .*use --device cpu"),
}


@pytest.mark.parametrize("works", WRONG)
def test_maps_that_are_wrong_zero_or_missing_are_found(monkeypatch, works):
    """Each is named; one is enough."""
    change, dtypes, message = WRONG[works]

    def changed(right: Callable[..., Tensor], model: models.CNN3d, volume: Tensor, target: Tensor) -> Tensor:
        found = right(model, volume, target)
        return change(found) if volume.dtype in dtypes else found

    for work in works.split():
        monkeypatch.setitem(selfcheck.MAPS, work, functools.partial(changed, selfcheck.MAPS[work]))
    with pytest.raises(InputError, match=message):
        selfcheck.require_correct(CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_kernel_without_a_gradient_is_found(monkeypatch, precision):
    """However small its share of the whole gradient is; here the last convolution's."""
    right = selfcheck.gradients

    def wrong(model: models.CNN3d, *arguments: Any, dtype: torch.dtype | None = None) -> Tensor:
        found, sizes = right(model, *arguments, dtype), selfcheck.kernel_sizes(model)
        if dtype is not None:  # not the reference
            found[sum(sizes[:4]) : sum(sizes[:5])] = 0
        return found

    monkeypatch.setattr(selfcheck, "gradients", wrong)
    with pytest.raises(InputError, match=r"wrong values there \(training gradients off by 1[,)]"):
        selfcheck.require_correct(CPU, precision)


def test_a_difference_that_is_no_number_is_not_right():
    zero, one, found = torch.zeros(4), torch.ones(4), selfcheck.relative_difference
    for values, reference, sizes in ((zero, zero, []), (zero * torch.nan, one, [1, 2]), (one, zero, [4])):
        assert not found(values, reference, sizes) < 1e9
    other = one + torch.tensor([0, 0, 1, 0])
    assert found(one, other, [1, 1]) == pytest.approx(1 / 7**0.5)
    assert found(one, other, [2, 1]) == 0.5


def test_mps_is_checked_before_it_is_used_and_warnings_are_said(monkeypatch, capsys):
    checked: list[tuple[torch.device, str]] = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(selfcheck, "require_correct", lambda *what: checked.append(what))
    assert selfcheck.open_device("mps", "bf16") == torch.device("mps")
    assert checked == [(torch.device("mps"), "bf16")]
    monkeypatch.setattr(devices, "known_faults", lambda device, precision: [f"broken in {precision}"])
    selfcheck.open_device("cpu", "bf16")
    assert len(checked) == 1
    assert capsys.readouterr().err == "warning: broken in bf16; `make device` checks this machine\n"
