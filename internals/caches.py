"""Where decoded scans are kept: in a GPU's memory, in main memory, in one file on disk, or nowhere."""

import contextlib
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from internals import devices, memory, storage
from internals.errors import InputError

CPU = torch.device("cpu")
CHECKED_AHEAD = 2000  # scans at most that are all decoded to be checked, though nothing keeps them
KINDS = ("auto", "gpu", "ram", "disk", "none")  # of --cache
Keep = Callable[[int, np.ndarray], None]  # takes a scan's row and its voxels


@dataclass(frozen=True)
class Cache:
    """Where decoded scans are to be kept.

    Attributes:
        kind: "gpu", in the memory of `device`; "ram"; "disk", one memory-mapped file in `folder`, reused as
            long as no scan changes; "none", decode again at every use; "auto", on the GPU where scans take
            at most half of its free memory, else in a disk cache that is there, else as `roomiest` says;
            "reuse", a disk cache that is there, else none.
        folder: where a disk cache lies.
        device: what the scans are read for.
        shared: other processes may read the same scans at the same time.
        need: bytes of the device's memory that "auto" leaves to the network at least.
    """

    kind: str
    folder: Path
    device: torch.device = CPU
    shared: bool = False
    need: int = 0

    def fill(
        self, shape: tuple[int, ...], key: str, read: Callable[[Keep], None]
    ) -> np.ndarray | Tensor | None:
        """Read the scans once, and keep them.

        Where they are not kept, and are more than CHECKED_AHEAD, none is read: that would take hours. What is
        wrong with one is said when it is used.

        Args:
            shape: (N, X, Y, Z) of all.
            key: names these very scans; those of another key are not taken for them.
            read: decodes and checks every scan, and hands its row and voxels over.

        Returns:
            float32 (N, X, Y, Z); None where nothing is kept.
        """
        size, stored = 4 * prod(shape), self.folder / f"scans-{key}.float32"
        kind = self._choose(size, stored)
        where = {"gpu": f"in the memory of {self.device}", "ram": "in memory", "disk": f"in {stored}"}
        if kind == "stored":
            print(f"scans: {shape[0]}, read from {stored}")
            return _mapped(stored, shape)
        voxels, late = "x".join(map(str, shape[1:])), kind not in where and shape[0] > CHECKED_AHEAD
        place = where.get(kind, f"not cached{'; voxels are checked as they are read' if late else ''}")
        print(f"scans: {shape[0]} of {voxels} voxels, {size / 1e9:.2f} GB, {place}")
        if kind == "disk":
            _fill_disk(stored, size, read)
            return _mapped(stored, shape)
        if kind not in where:
            if not late:
                read(lambda row, volume: None)
            return None
        kept = torch.empty(shape, device=self.device if kind == "gpu" else CPU)

        def keep(row: int, volume: np.ndarray) -> None:
            kept[row] = torch.from_numpy(volume)

        if _is_whole(stored, size):  # decoded and checked before
            for row, volume in enumerate(_mapped(stored, shape)):
                keep(row, volume)
        else:
            read(keep)
        return kept if kind == "gpu" else kept.numpy()

    def _choose(self, size: int, stored: Path) -> str:
        """One of KINDS but "auto", or "stored": the file is there already."""
        if self.kind == "gpu":
            check_gpu(size, self.device)
        if self.kind == "auto" and fits_on_gpu(size, self.device, self.need):
            return "gpu"
        if self.kind in ("auto", "disk", "reuse") and _is_whole(stored, size):
            return "stored"
        return roomiest(size, self.folder, self.shared) if self.kind == "auto" else self.kind


def fits_on_gpu(size: int, device: torch.device, need: int) -> bool:
    """Whether `size` bytes fill at most half of a CUDA device's free memory, and leave `need` bytes."""
    if device.type != "cuda":
        return False
    free = devices.free_memory(device)
    return size <= min(free / 2, free - need)


def check_gpu(size: int, device: torch.device) -> None:
    """Raise InputError where `size` bytes of scans cannot be kept in a device's own memory."""
    if device.type != "cuda":
        raise InputError(f"--cache gpu: the device is {device}, expected a GPU of CUDA")
    if size > devices.free_memory(device):
        free = f"{device} has {devices.free_memory(device) / 1e9:.1f} GB free"
        raise InputError(f"--cache gpu: the scans take {size / 1e9:.1f} GB, {free}")


def roomiest(size: int, folder: Path, shared: bool = False) -> str:
    """The first of "ram" and "disk" that `size` bytes fill at most half of; "none" where neither does.

    Where the scans are shared with other processes disk comes first: they read the same file.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    room = {"ram": memory.available(), "disk": shutil.disk_usage(existing).free}
    order = ("disk", "ram") if shared else ("ram", "disk")
    return next((cache for cache in order if size <= room[cache] / 2), "none")


def _is_whole(stored: Path, size: int) -> bool:
    return stored.exists() and stored.stat().st_size == size


def _mapped(stored: Path, shape: tuple[int, ...]) -> np.memmap:
    return np.memmap(stored, np.float32, "c", shape=shape)


def _fill_disk(stored: Path, size: int, read: Callable[[Keep], None]) -> None:
    """Decode every scan into one file; of several processes the first does so, the others wait for it."""
    folder, ours = stored.parent, ["scans-*.float32"]
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    storage.make_folder(folder)
    try:
        with storage.locked(folder / ".lock"):
            storage.remove_leftovers(folder, ours)
            if _is_whole(stored, size):
                return
            with storage.atomic_write(stored) as path:
                # written, not mapped: a disk that fills up raises an error then, and does not kill
                path.touch()
                read(functools.partial(_write_volume, path))
            for former in set(storage.matching(folder, ours)) - {stored}:  # of scans that have changed
                former.unlink(missing_ok=True)
    except InputError:
        with contextlib.suppress(OSError):  # another process may have put something there
            for place in missing:
                place.rmdir()
        raise


def _write_volume(path: Path, row: int, volume: np.ndarray) -> None:
    """Write one decoded scan to its place in the file of all."""
    with path.open("r+b") as stream:
        stream.seek(row * volume.nbytes)
        stream.write(np.ascontiguousarray(volume).data)
