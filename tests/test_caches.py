"""caches.py: where decoded scans are kept, and what of it is taken again."""

import multiprocessing
import os
import pickle
import shutil
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from cohorts import cohort_of, stacked, tiny_cohort, voxels, write_csv, write_scan
from standin import StandIn

import dataset
from dataset import ScanDataset
from internals import caches, devices, memory
from internals.caches import Cache
from internals.errors import InputError

TINY = (5, 6, 7)
GPU = torch.device("cuda", 0)


def opened(csv: Path, kind: str, **options) -> ScanDataset:
    return cohort_of(csv).open_scans(Cache(kind, csv.parent / "cache", **options))


def stored(csv: Path) -> list[Path]:
    return [path for path in (csv.parent / "cache").glob("*") if not path.name.startswith(".")]


@pytest.fixture
def csv(tmp_path) -> Path:
    return tiny_cohort(tmp_path)


@pytest.mark.parametrize("kind", ["ram", "disk", "none", "auto", "reuse"])
def test_caches_hold_the_same_tensors(csv, kind, capsys):
    scans = opened(csv, kind)
    before = [file.read_bytes() for file in stored(csv)]
    place = {"ram": "in memory", "auto": "in memory", "disk": "in /"}.get(kind, "not cached")
    assert f"scans: 6 of 5x6x7 voxels, 0.00 GB, {place}" in capsys.readouterr().out
    expected = np.stack([dataset.read_scan(csv.parent / f"{i}.nii") for i in range(6)])[:, None]
    for _ in range(2):
        volumes = stacked(scans)
        assert volumes.dtype == torch.float32
        assert np.array_equal(volumes.numpy(), expected)
        batch, _ = next(iter(scans.loader([0, 1], 2, workers=0)))
        batch.zero_()  # a consumer of batches that writes must not reach the cache
    assert [scans[i][1] for i in range(len(scans))] == [0, 1] * 3
    scans[0][0].zero_()  # nor the file
    assert [file.read_bytes() for file in stored(csv)] == before
    assert len(before) == (kind == "disk")
    assert scans.in_memory == (kind in ("ram", "auto"))
    packed = pickle.dumps(scans)  # goes to another process; a disk cache by its name, not as a copy
    assert (len(packed) < 4 * expected.size) == (not scans.in_memory)
    there = pickle.loads(packed)
    assert there.in_memory == scans.in_memory
    assert torch.equal(stacked(there)[1:], stacked(scans)[1:])
    if kind not in ("none", "reuse"):  # handed out as it lies there
        assert np.shares_memory(scans[2][0].numpy(), scans[2][0].numpy())


def replace_scan(path: Path, values: np.ndarray, later: int = 0) -> None:
    """Write another scan in place of one, with the same time or one that is later by nanoseconds."""
    status = path.stat()
    write_scan(path, values)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + later))


def test_disk_cache_is_reused_and_rebuilt_when_a_scan_changes(csv, capsys):
    """It changes by its time or its size; other lists of the scans have caches of their own."""
    first = stacked(opened(csv, "disk"))
    replace_scan(csv.parent / "2.nii", voxels(77, shape=TINY))
    for kind in ("disk", "auto", "reuse", "ram"):  # not decoded again
        capsys.readouterr()
        assert torch.equal(stacked(opened(csv, kind)), first)
        assert ("read from" in capsys.readouterr().out) == (kind != "ram")
    replace_scan(csv.parent / "2.nii", voxels(78, shape=TINY), later=10**9)
    rebuilt = stacked(opened(csv, "disk"))
    assert np.array_equal(rebuilt[2, 0].numpy(), dataset.read_scan(csv.parent / "2.nii"))
    assert torch.equal(rebuilt[[0, 1, 3, 4, 5]], first[[0, 1, 3, 4, 5]])
    backwards = write_csv(csv.parent / "back.csv", [(f"{i}.nii", i % 2) for i in range(5, -1, -1)])
    assert torch.equal(stacked(opened(backwards, "disk")), rebuilt.flip(0))
    fewer = write_csv(csv.parent / "fewer.csv", [("1.nii", 1), ("0.nii", 0)])
    assert torch.equal(stacked(opened(fewer, "disk")), rebuilt[[1, 0]])
    opened(csv, "disk")
    replace_scan(csv.parent / "2.nii", voxels(5, shape=TINY).astype(np.float32))
    assert torch.equal(stacked(opened(csv, "disk"))[2], first[5])


def test_disk_cache_of_a_crash_is_ignored(csv, monkeypatch):
    expected, cache = stacked(opened(csv, "none")), csv.parent / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "read_scan", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            opened(csv, "disk")
    assert stored(csv) == []
    assert torch.equal(stacked(opened(csv, "disk")), expected)
    (whole,) = stored(csv)
    # a killed process' leftover, a file of scans as they were, and a disk that ran full
    for name in (f".partial-{whole.name}", "scans-0123456789abcdef.float32"):
        (cache / name).write_bytes(bytes(whole.stat().st_size))
    whole.write_bytes(whole.read_bytes()[:-4])
    assert torch.equal(stacked(opened(csv, "disk")), expected)
    assert [file.name for file in cache.iterdir()] == [whole.name]


@pytest.mark.parametrize("kind", ["ram", "disk", "none"])
def test_bad_scans_are_all_named_and_no_cache_stays(csv, kind):
    write_scan(csv.parent / "1.nii", np.full(TINY, 3, np.int16))
    write_scan(csv.parent / "4.nii", np.full(TINY, np.nan, np.float32))
    words = r"2 of 6 .*1\.nii: is constant \(every voxel is 3\).*4\.nii: has voxels that are NaN"
    with pytest.raises(InputError, match=words):
        opened(csv, kind)
    assert not (csv.parent / "cache").exists()


@pytest.mark.parametrize("kind", ["none", "reuse"])
def test_many_scans_that_nothing_keeps_are_checked_as_they_are_read(csv, kind, monkeypatch, capsys):
    write_scan(csv.parent / "1.nii", np.full(TINY, 3, np.int16))
    monkeypatch.setattr(caches, "CHECKED_AHEAD", 6)
    with pytest.raises(InputError, match=r"1 of 6 .*1\.nii: is constant"):
        opened(csv, kind)
    assert "checked as they are read" not in capsys.readouterr().out
    monkeypatch.setattr(caches, "CHECKED_AHEAD", 5)
    scans = opened(csv, kind)
    said = "scans: 6 of 5x6x7 voxels, 0.00 GB, not cached; voxels are checked as they are read\n"
    assert capsys.readouterr().out == said
    assert np.array_equal(scans[2][0][0].numpy(), dataset.read_scan(csv.parent / "2.nii"))
    with pytest.raises(InputError, match=r"1\.nii: is constant \(every voxel is 3\)$"):
        scans[1]
    with pytest.raises(InputError, match=r"1 of 6 .*1\.nii: is constant"):  # what is kept is checked
        opened(csv, "ram")


def fill_together(csv: Path, barrier: Barrier) -> None:
    """Open the scans as other processes do; write down which are decoded, slowly, and the sum of all."""
    honest = dataset.read_scan

    def slow(file: Path, *onto: object) -> np.ndarray:
        time.sleep(0.05)
        with (csv.parent / "decoded").open("a") as stream:
            stream.write(f"{file.name}\n")
        return honest(file, *onto)

    dataset.read_scan = slow  # in this process, which ends with this function
    barrier.wait(timeout=60)
    (csv.parent / f"sum-{os.getpid()}").write_text(str(stacked(opened(csv, "disk")).double().sum().item()))


def test_disk_cache_is_filled_once_by_many_processes(csv):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    jobs = [context.Process(target=fill_together, args=(csv, barrier)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(timeout=120)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert sorted((csv.parent / "decoded").read_text().split()) == [f"{i}.nii" for i in range(6)]
    sums = {file.read_text() for file in csv.parent.glob("sum-*")}
    assert sums == {str(stacked(opened(csv, "none")).double().sum().item())}
    assert len(stored(csv)) == 1


@pytest.mark.parametrize(
    ("free", "disk", "shared", "expected"),
    [(200, 0, False, "ram"), (199, 200, False, "disk"), (199, 199, False, "none"), (200, 200, False, "ram"),
     (200, 200, True, "disk"), (200, 199, True, "ram")],
)  # fmt: skip
def test_cache_takes_at_most_half_of_memory_or_disk(tmp_path, monkeypatch, free, disk, shared, expected):
    monkeypatch.setattr(memory, "available", lambda: free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    assert caches.roomiest(100, tmp_path / "not" / "there" / "yet", shared) == expected


@pytest.mark.parametrize(
    ("free", "need", "fits"), [(200, 0, True), (199, 0, False), (300, 200, True), (300, 201, False)]
)
def test_gpu_cache_takes_at_most_half_and_leaves_what_a_network_needs(monkeypatch, free, need, fits):
    monkeypatch.setattr(devices, "free_memory", lambda device: free)
    assert caches.fits_on_gpu(100, GPU, need) == fits
    assert not caches.fits_on_gpu(0, torch.device("cpu"), 0)


def test_gpu_cache_that_cannot_be(csv, monkeypatch):
    with pytest.raises(InputError, match="--cache gpu: the device is cpu, expected a GPU of CUDA"):
        opened(csv, "gpu")
    monkeypatch.setattr(devices, "free_memory", lambda device: 5 * 10**3)
    with pytest.raises(InputError, match=r"the scans take 0\.0 GB, cuda:0 has 0\.0 GB free"):
        opened(csv, "gpu", device=GPU)


@pytest.mark.parametrize("kind", ["gpu", "auto"])
def test_scans_kept_on_a_gpu_are_batches_there(csv, monkeypatch, kind):
    """Decoded by threads into one tensor there; batches are put together there, too."""
    monkeypatch.setattr(devices, "free_memory", lambda device: 10**6)
    with StandIn("cuda") as standin:
        scans = opened(csv, kind, device=standin.device)
        assert scans.on_gpu
        found = list(scans.loader([4, 0, 3], 2, 2, device=standin.device))
        assert all(volume.device == standin.device for volume, _ in found)
        volumes = torch.cat([volume.cpu() for volume, _ in found])
    expected = np.stack([dataset.read_scan(csv.parent / f"{i}.nii") for i in (4, 0, 3)])[:, None]
    assert np.array_equal(volumes.numpy(), expected)
    assert [label.tolist() for _, label in found] == [[0, 0], [1]]
