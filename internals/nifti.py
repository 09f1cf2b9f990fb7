"""NIfTI files in and out: images read within bounds, maps written in the scans' own space.

A header is believed only as far as its file can keep the promise: sizes are checked before anything is
allocated, and a compressed image is read through to its end. Errors say what is wrong with a file; the
caller, who knows what the user calls it, puts the name in front (`errors.blaming`).
"""

import gzip
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from math import prod
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nilearn.image import resample_img
from nilearn.image.resampling import BoundingBoxError

from internals import storage
from internals.errors import InputError, blaming

LARGEST = 70_000_000  # voxels: MNI152 at 0.5 mm, 394x466x378, fits; two at once take 0.6 GB in float32
FURTHEST = 2**24  # bytes before the voxels: NIfTI-1 keeps their number in float32, exact up to here
RATIO = 1032  # deflate packs no more than 258 bytes into two bits
BLOCK = 2**18  # voxels decoded at once, so that what they unpack to stays in the processor's cache
GZIP = b"\x1f\x8b"
KINDS: dict[type[nib.Nifti1Header], type[nib.Nifti1Image]] = {
    nib.Nifti1Header: nib.Nifti1Image,
    nib.Nifti2Header: nib.Nifti2Image,
}
SILENT = logging.Logger("nifti")  # nibabel would tell of the header's small repairs on stderr
SILENT.disabled = True


# Reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The space of an image, which all scans of a cohort share."""

    shape: tuple[int, int, int]
    affine: np.ndarray  # (4, 4), voxel to mm
    header: nib.Nifti1Header  # without extensions

    @property
    def voxel_sizes(self) -> tuple[float, ...]:
        """Edges of a voxel in mm."""
        return tuple(nib.affines.voxel_sizes(self.affine).tolist())

    def record(self) -> dict:
        """The grid as the run record keeps it."""
        return {"shape": list(self.shape), "affine": self.affine.tolist()}

    def mismatch(self, other: "Grid", owner: str) -> str:
        """How the space differs from another's, in words; nothing where affines agree to a micrometre."""
        if self.shape != other.shape:
            return f"shape {self.shape}, {owner} has {other.shape}"
        if not np.allclose(self.affine, other.affine, atol=1e-3):
            return f"its affine differs from {owner}'s"
        return ""


def read_grid(file: Path) -> Grid:
    """Read and check the header of a NIfTI-1 or NIfTI-2 file; no voxel is read.

    Raises:
        InputError: no .nii or .nii.gz file, a header that makes no sense or that claims more than
            the file can hold, not one 3D volume of real numbers, or a singular affine.
    """
    with _opened(file) as stream:
        return _grid(_header(stream), _room(file))


def read_image(
    file: Path, like: Grid | None = None, owner: str = "the first scan"
) -> tuple[np.ndarray, Grid]:
    """Read an image through to the end of its file, its checksum included.

    Args:
        like: the grid that it must lie on, that of `owner`.

    Returns:
        The voxels as float32 (X, Y, Z), scaled as the header says, and their grid.

    Raises:
        InputError: as `read_grid`, or it lies elsewhere, or the file is damaged, or unpacks to more than its
            header says.
    """
    with _opened(file) as stream:
        grid = _grid(_header(stream), _room(file))
        mismatch = "" if like is None else grid.mismatch(like, owner)
        if mismatch:
            raise InputError(mismatch)
        stream.seek(int(grid.header["vox_offset"]))
        values = _decode(stream, grid)
        if _packed(file) and stream.read(1):
            raise InputError("unpacks to more than its header declares")
    return values, grid


def load_map(path: Path) -> np.ndarray:
    """Read a map back: float32 (X, Y, Z)."""
    with blaming(path):
        return read_image(path)[0]


def resample(
    values: np.ndarray, affine: np.ndarray, like: Grid, interpolation: str, fill: float = 0
) -> np.ndarray:
    """Bring an image (X, Y, Z), or several (X, Y, Z, N), onto another grid.

    Args:
        values: the voxels.
        affine: (4, 4), voxel to mm.
        like: that grid.
        interpolation: "nearest" or "linear".
        fill: what there is outside its field of view.
    """
    # A frame around, as for nilearn the field of view ends at the centres of the outermost voxels.
    frame = [(1, 1)] * 3 + [(0, 0)] * (values.ndim - 3)
    padded = np.pad(values, frame, constant_values=fill)
    image = nib.Nifti1Image(padded, affine @ nib.affines.from_matvec(np.eye(3), [-1, -1, -1]))
    options = {"interpolation": interpolation, "force_resample": True, "copy_header": True}
    try:
        moved = resample_img(image, like.affine, like.shape, fill_value=fill, **options)
    except BoundingBoxError:  # raised on some sides only
        return np.full((*like.shape, *values.shape[3:]), fill, values.dtype)
    return np.asarray(moved.dataobj)


@contextmanager
def _opened(file: Path) -> Iterator[BufferedIOBase]:
    """The unpacked content of a file; what is wrong with it while it is read is an InputError."""
    if not file.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError("not a NIfTI image: expected a .nii or .nii.gz file")
    storage.file_size(file)  # of a file: reading from a pipe would wait
    try:
        with file.open("rb") as raw:
            packed = raw.read(len(GZIP)) == GZIP
            raw.seek(0)
            if packed != _packed(file):
                wrong = (
                    "is packed with gzip, its name must end in .gz" if packed else "is not packed with gzip"
                )
                raise InputError(f"not a NIfTI image: {wrong}")
            if not packed:
                yield raw
                return
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream
    except (OSError, EOFError, zlib.error) as problem:
        raise InputError(f"cannot be read ({problem})") from problem


def _packed(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


def _room(file: Path) -> int:
    """Bytes that a file's content can have at most, unpacked."""
    return storage.file_size(file) * (RATIO if _packed(file) else 1)


def _header(stream: BufferedIOBase) -> nib.Nifti1Header:
    """The header at the start of a stream, without the extensions that may follow it."""
    block = stream.read(nib.Nifti2Header.sizeof_hdr)
    kind = next((kind for kind in KINDS if kind.may_contain_header(block)), None)
    if kind is None:
        raise InputError("not a NIfTI image: it has no NIfTI header")
    try:
        header = kind(block[: kind.sizeof_hdr], check=False)
        if header["magic"].item() != kind.single_magic:
            raise InputError("not a NIfTI image but half of a .hdr/.img pair")
        _check_offset(header)  # before nibabel's own checks, which repair some of them
        header.check_fix(logger=SILENT)
    except HeaderDataError as problem:
        raise InputError(f"not a NIfTI image ({problem})") from problem
    return header


def _check_offset(header: nib.Nifti1Header) -> None:
    """Raise InputError where voxels cannot start at the place that the header names."""
    offset, smallest = float(header["vox_offset"]), header.single_vox_offset
    if not (offset.is_integer() and smallest <= offset <= FURTHEST):
        raise InputError(
            f"its voxels start at byte {offset:g} (vox_offset), expected {smallest} to {FURTHEST}"
        )


def _grid(header: nib.Nifti1Header, room: int) -> Grid:
    """Check what a header claims; `room` is the number of bytes that its file can unpack to."""
    dims = [int(length) for length in header["dim"]]
    shape = tuple(dims[1 : dims[0] + 1])
    if len(shape) < 3 or prod(shape[3:]) != 1 or min(shape) < 1:
        raise InputError(f"expected one 3D volume, found shape {shape}")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise InputError(f"expected real voxels, found {dtype}")
    size = "x".join(map(str, shape[:3]))
    if prod(shape) > LARGEST:
        raise InputError(f"claims {size} voxels, more than {LARGEST} in all: no scan is that large")
    needed = int(header["vox_offset"]) + prod(shape) * dtype.itemsize
    if needed > room:
        raise InputError(
            f"cannot be read: its header claims {size} voxels, {needed} bytes; its file holds {room} at most"
        )
    header.set_data_shape(shape[:3])
    try:
        affine = header.get_best_affine()
    except (HeaderDataError, ValueError) as problem:  # a quaternion that is none
        raise InputError(f"its affine is singular or not finite ({problem})") from problem
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError("its affine is singular or not finite")
    return Grid(header.get_data_shape(), affine, header)


def _decode(stream: BufferedIOBase, grid: Grid) -> np.ndarray:
    """Read and scale the voxels that a stream stands before, a block at a time."""
    try:
        slope, inter = grid.header.get_slope_inter()
    except HeaderDataError as problem:
        raise InputError(f"cannot be read ({problem})") from problem
    dtype = grid.header.get_data_dtype()
    voxels = np.empty(prod(grid.shape), np.float32)
    for start in range(0, voxels.size, BLOCK):
        block = voxels[start : start + BLOCK]
        raw = stream.read(block.size * dtype.itemsize)
        if len(raw) < block.size * dtype.itemsize:
            raise InputError("cannot be read: it ends before its last voxel")
        values = np.frombuffer(raw, dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # infinite then, and seen by who uses the voxels
            block[:] = values if slope in (None, 1) and not inter else values * np.float64(slope) + inter
    return voxels.reshape(grid.shape, order="F")


# Writing -----------------------------------------------------------------------------------------


def save_map(values: np.ndarray, header: nib.Nifti1Header, path: Path) -> None:
    """Write a map as float32 NIfTI in the scans' own space.

    Args:
        values: (X, Y, Z), any real dtype, finite.
        header: a scan's header; its affine, sform and qform codes and units are kept.
        path: where to write; .nii or .nii.gz.
    """
    header = header.copy()
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["vox_offset"] = 0  # the scan's may leave room for extensions; nibabel puts in its own
    image = KINDS[type(header)](np.asarray(values, dtype=np.float32), None, header)
    with storage.atomic_write(path) as partial:
        nib.save(image, partial)
