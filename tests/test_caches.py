"""caches.py: scans are the same wherever they are kept, and those of a changed cohort are never taken."""

import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cohorts import tiny_cohort, voxels, write_csv, write_scan
from standin import StandIn

import dataset
from dataset import ScanDataset
from internals import caches
from internals.errors import InputError

TINY = (5, 6, 7)
GPU = torch.device("cuda", 0)


def opened(csv: Path, cache: str, folder: Path, device: torch.device = caches.CPU) -> ScanDataset:
    """The scans of a CSV, kept in a cache."""
    return dataset.new_cohort(csv, 2, "contiguous", 0, 0).open_scans(caches.Cache(cache, folder, device))


def stored(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if not path.name.startswith(".")]


def stacked(scans: ScanDataset) -> torch.Tensor:
    return torch.stack([scans[i][0] for i in range(len(scans))])


@pytest.mark.parametrize("cache", ["ram", "disk", "none", "auto"])
def test_caches_hold_the_same_tensors(tmp_path, cache):
    scans = opened(tiny_cohort(tmp_path), cache, tmp_path / "cache")
    expected = np.stack([dataset.read_scan(tmp_path / f"{i}.nii") for i in range(6)])[:, None]
    for _ in range(2):
        volumes = stacked(scans)
        assert volumes.dtype == torch.float32
        assert np.array_equal(volumes.numpy(), expected)
        batch, _ = next(iter(scans.loader([0, 1], 2, workers=0)))
        batch.zero_()  # a consumer of batches that writes must not reach the cache
    assert [scans[i][1] for i in range(len(scans))] == [0, 1] * 3
    assert (len(stored(tmp_path / "cache")) == 1) == (cache == "disk")
    if cache != "none":  # handed out as it lies there
        assert np.shares_memory(scans[2][0].numpy(), scans[2][0].numpy())


def test_writing_to_a_scan_does_not_reach_the_file(tmp_path):
    scans = opened(tiny_cohort(tmp_path), "disk", tmp_path / "cache")
    (file,) = stored(tmp_path / "cache")
    before = file.read_bytes()
    scans[0][0].zero_()
    del scans
    assert file.read_bytes() == before


def test_mean_of_scans(tmp_path):
    scans = opened(tiny_cohort(tmp_path), "none", tmp_path / "cache")
    wanted = np.mean([dataset.read_scan(tmp_path / f"{i}.nii") for i in (1, 4, 5)], axis=0, dtype=np.float64)
    assert scans.mean([1, 4, 5]).dtype == np.float32
    assert np.allclose(scans.mean([1, 4, 5]), wanted, rtol=0, atol=6e-8)  # half a unit of float32 near 1


def replace_scan(path: Path, seed: int, keep_time: bool) -> None:
    status = path.stat()
    write_scan(path, voxels(seed, shape=TINY))
    shift = 0 if keep_time else 1_000_000_000
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + shift))


def test_disk_cache_is_reused_and_rebuilt_when_a_scan_changes(tmp_path):
    csv = tiny_cohort(tmp_path)
    first = stacked(opened(csv, "disk", tmp_path / "cache"))
    replace_scan(tmp_path / "2.nii", 77, keep_time=True)
    assert torch.equal(stacked(opened(csv, "disk", tmp_path / "cache")), first)  # not decoded again
    assert torch.equal(stacked(opened(csv, "auto", tmp_path / "cache")), first)
    replace_scan(tmp_path / "2.nii", 78, keep_time=False)
    rebuilt = stacked(opened(csv, "disk", tmp_path / "cache"))
    assert np.array_equal(rebuilt[2, 0].numpy(), dataset.read_scan(tmp_path / "2.nii"))
    assert torch.equal(rebuilt[[0, 1, 3, 4, 5]], first[[0, 1, 3, 4, 5]])


def test_disk_cache_follows_size_order_and_number_of_scans(tmp_path):
    csv = tiny_cohort(tmp_path)
    first = stacked(opened(csv, "disk", tmp_path / "cache"))
    backwards = write_csv(tmp_path / "back.csv", [(f"{i}.nii", i % 2) for i in range(5, -1, -1)])
    assert torch.equal(stacked(opened(backwards, "disk", tmp_path / "cache")), first.flip(0))
    fewer = write_csv(tmp_path / "fewer.csv", [("1.nii", 1), ("0.nii", 0)])
    assert torch.equal(stacked(opened(fewer, "disk", tmp_path / "cache")), first[[1, 0]])
    status = (tmp_path / "2.nii").stat()
    write_scan(tmp_path / "2.nii", voxels(5, shape=TINY).astype(np.float32))
    os.utime(tmp_path / "2.nii", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(stacked(opened(csv, "disk", tmp_path / "cache"))[2], first[5])


def test_disk_cache_of_a_crash_is_ignored(tmp_path, monkeypatch):
    csv, cache = tiny_cohort(tmp_path), tmp_path / "cache"
    expected = stacked(opened(csv, "none", cache))

    def crash(file: Path) -> np.ndarray:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "read_scan", crash)
        with pytest.raises(KeyboardInterrupt):
            opened(csv, "disk", cache)
    assert stored(cache) == []
    assert torch.equal(stacked(opened(csv, "disk", cache)), expected)
    (whole,) = stored(cache)
    partial = cache / f".partial-{whole.name}"
    partial.write_bytes(bytes(whole.stat().st_size))  # a killed process' leftover
    former = cache / "scans-0123456789abcdef.float32"  # of scans as they were
    former.write_bytes(bytes(whole.stat().st_size))
    whole.write_bytes(whole.read_bytes()[:-4])  # and a disk that ran full
    assert torch.equal(stacked(opened(csv, "disk", cache)), expected)
    assert [file.name for file in cache.iterdir()] == [whole.name]


def test_disk_cache_goes_to_another_process_by_name(tmp_path):
    scans = opened(tiny_cohort(tmp_path), "disk", tmp_path / "cache")
    packed = pickle.dumps(scans)
    assert len(packed) < 10_000
    assert torch.equal(stacked(pickle.loads(packed)), stacked(scans))


def test_bad_scans_are_all_named_and_no_cache_stays(tmp_path):
    csv = tiny_cohort(tmp_path)
    write_scan(tmp_path / "1.nii", np.full(TINY, 3, np.int16))
    write_scan(tmp_path / "4.nii", np.full(TINY, np.nan, np.float32))
    for cache in ("ram", "disk", "none"):
        with pytest.raises(InputError) as error:
            opened(csv, cache, tmp_path / "cache")
        words = ["2 of 6", "1.nii: is constant (every voxel is 3)", "4.nii: has voxels that are NaN"]
        assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("memory", "disk", "expected"),
    [(200, 0, "ram"), (199, 200, "disk"), (199, 199, "none"), (10**6, 10**6, "ram")],
)
def test_cache_takes_at_most_half_of_memory_or_disk(tmp_path, monkeypatch, memory, disk, expected):
    monkeypatch.setattr("internals.memory.available", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    assert caches.roomiest(100, tmp_path / "not" / "there" / "yet") == expected


@pytest.mark.parametrize(("memory", "disk", "expected"), [(200, 200, "disk"), (200, 199, "ram")])
def test_jobs_that_share_scans_prefer_the_disk(tmp_path, monkeypatch, memory, disk, expected):
    monkeypatch.setattr("internals.memory.available", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    assert caches.roomiest(100, tmp_path, shared=True) == expected


@pytest.mark.parametrize(
    ("free", "need", "fits"), [(200, 0, True), (199, 0, False), (300, 200, True), (300, 201, False)]
)
def test_gpu_cache_takes_at_most_half_and_leaves_what_a_network_needs(monkeypatch, free, need, fits):
    monkeypatch.setattr("internals.devices.free_memory", lambda device: free)
    assert caches.fits_on_gpu(100, GPU, need) == fits
    assert not caches.fits_on_gpu(0, torch.device("cpu"), 0)


def test_gpu_cache_that_cannot_be(tmp_path, monkeypatch):
    csv = tiny_cohort(tmp_path)
    with pytest.raises(InputError, match="--cache gpu: the device is cpu, expected a GPU of CUDA"):
        opened(csv, "gpu", tmp_path / "cache")
    monkeypatch.setattr("internals.devices.free_memory", lambda device: 5 * 10**3)
    with pytest.raises(InputError, match=r"the scans take 0\.0 GB, cuda:0 has 0\.0 GB free"):
        opened(csv, "gpu", tmp_path / "cache", GPU)


@pytest.mark.parametrize("cache", ["gpu", "auto"])
def test_scans_kept_on_a_gpu_are_batches_there(tmp_path, monkeypatch, cache):
    """Decoded by threads into one tensor there; batches are put together there, too."""
    csv = tiny_cohort(tmp_path)
    monkeypatch.setattr("internals.devices.free_memory", lambda device: 10**6)
    with StandIn("cuda") as standin:
        scans = opened(csv, cache, tmp_path / "cache", standin.device)
        batches = scans.loader([4, 0, 3], 2, 2, device=standin.device)
        found = [(volume, label) for volume, label in batches]
        assert all(volume.device == standin.device for volume, _ in found)
        volumes = torch.cat([volume.cpu() for volume, _ in found])
    expected = np.stack([dataset.read_scan(tmp_path / f"{i}.nii") for i in (4, 0, 3)])[:, None]
    assert np.array_equal(volumes.numpy(), expected)
    assert [label.tolist() for _, label in found] == [[0, 0], [1]]


def test_auto_cache_goes_to_disk_where_memory_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr("internals.memory.available", lambda: 1000)
    scans = opened(tiny_cohort(tmp_path), "auto", tmp_path / "cache")
    assert stored(tmp_path / "cache")[0].stat().st_size == 4 * 6 * 5 * 6 * 7
    assert not scans.in_memory
