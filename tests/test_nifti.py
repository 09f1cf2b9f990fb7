"""nifti.py: what is read and what is refused, and maps that lie where the scans lie."""

import gzip
import itertools
import os
import re
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cohorts import AFFINE, OBLIQUE, read_nifti, read_values, voxels, white, write_scan

from internals import nifti
from internals.errors import InputError

SHAPE = (4, 5, 6)


def plain_scan(path: Path, kind: type[nib.Nifti1Image] = nib.Nifti1Image) -> Path:
    return write_scan(path, voxels(3, shape=SHAPE), image_class=kind)


def patched(path: Path, *fields: tuple[int, str, object]) -> Path:
    """Overwrite fields of a header, each an offset, a struct format and a value; .gz is packed again."""
    raw = bytearray(path.read_bytes())
    packed = raw[:2] == nifti.GZIP
    raw = bytearray(gzip.decompress(raw)) if packed else raw
    for offset, form, value in fields:
        struct.pack_into(form, raw, offset, *(value if isinstance(value, list) else [value]))
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


def refusal(path: Path) -> str:
    """What both ways of reading say of a file; the header alone shows what is wrong with it."""
    messages = []
    for read in (nifti.read_grid, nifti.read_image):
        with pytest.raises(InputError) as error:
            read(path)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    return messages[0]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.float32, np.float64, ">f4", ">i2"])
def test_reads_what_nibabel_reads(tmp_path, name, image_class, dtype):
    values = (1000 * white(SHAPE, 0)).clip(0, 255).astype(dtype)
    path = write_scan(tmp_path / name, values, OBLIQUE, image_class)
    found, grid = nifti.read_image(path)
    image = read_nifti(path)
    assert found.dtype == np.float32
    assert np.array_equal(found, image.get_fdata(dtype=np.float32))
    assert np.array_equal(grid.affine, image.affine)
    assert grid.shape == nifti.read_grid(path).shape == SHAPE


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("slope", "inter"), [(-0.5, 300), (1, 0), (1, 7), (0, 9), (np.nan, 1), (np.inf, 2), (3e-5, 0)]
)
def test_scaling_is_nibabels(tmp_path, dtype, slope, inter):
    path = write_scan(tmp_path / "a.nii", voxels(3, shape=SHAPE).astype(dtype))
    patched(path, (112, "<2f", [slope, inter]))
    assert np.array_equal(nifti.read_image(path)[0], read_nifti(path).get_fdata(dtype=np.float32))


def test_extensions_and_whatever_follows_plain_voxels_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(nifti, "BLOCK", 7)  # many of them
    image = nib.Nifti1Image(voxels(3, shape=SHAPE), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"born 1950" * 100))
    nib.save(image, tmp_path / "a.nii")
    nib.save(image, tmp_path / "a.nii.gz")
    raw = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").write_bytes(raw + b"rest")
    (tmp_path / "members.nii.gz").write_bytes(gzip.compress(raw[:400]) + gzip.compress(raw[400:]))
    for name in ("a.nii", "a.nii.gz", "members.nii.gz"):
        values, grid = nifti.read_image(tmp_path / name)
        assert np.array_equal(values, voxels(3, shape=SHAPE))
        nifti.save_map(values, grid.header, tmp_path / "map.nii")
        assert b"born" not in (tmp_path / "map.nii").read_bytes()
        assert np.array_equal(nifti.load_map(tmp_path / "map.nii"), values)
    with pytest.raises(InputError, match=r"none\.nii: no such file"):
        nifti.load_map(tmp_path / "none.nii")


LENGTHS, FORM = 40, "<8h"  # where a NIfTI-1 header keeps its dimensions


# fmt: off
NONSENSE = [
    ((LENGTHS, FORM, [3, 30000, 30000, 30000, 1, 1, 1, 1]), "30000x30000x30000 voxels, more than"),
    ((LENGTHS, FORM, [3, 400, 400, 400, 1, 1, 1, 1]), "128000352 bytes"),
    ((LENGTHS, FORM, [3, -4, -5, 6, 1, 1, 1, 1]), "(-4, -5, 6)"),
    ((LENGTHS, FORM, [3, 0, 5, 6, 1, 1, 1, 1]), "(0, 5, 6)"),
    ((LENGTHS, FORM, [5, 4, 5, 6, -1, -1, 1, 1]), "(4, 5, 6, -1, -1)"),
    ((LENGTHS, FORM, [4, 4, 5, 3, 2, 1, 1, 1]), "one 3D volume, found shape (4, 5, 3, 2)"),
    ((LENGTHS, FORM, [2, 4, 30, 1, 1, 1, 1, 1]), "one 3D volume, found shape (4, 30)"),
    ((108, "<f", np.nan), "vox_offset"), ((108, "<f", np.inf), "vox_offset"),
    ((108, "<f", -352), "byte -352"), ((108, "<f", 0), "byte 0"), ((108, "<f", 348), "byte 348"),
    ((108, "<f", 352.5), "byte 352.5"), ((108, "<f", 3e38), "byte 3e+38"), ((108, "<f", 400), "640 bytes"),
    ((70, "<h", 0), "data code 0"), ((70, "<h", 999), "data code 999"),
    ((70, "<h", 32), "complex64"), ((70, "<h", 128), "real voxels"),
    ((344, "<3s", b"ni1"), "half of a .hdr/.img pair"), ((344, "<3s", b"abc"), "no NIfTI header"),
    ((280, "<f", np.nan), "affine"), ((280, "<12f", [0] * 12), "affine"),
    ((252, "<2h3f", [1, 0, 3, 3, 3]), "affine"),  # a quaternion that is none
]
# fmt: on


# a packed file of this size may hold as many bytes as some of these headers claim
@pytest.mark.parametrize(
    ("field", "words", "name"),
    [(field, words, "a.nii") for field, words in NONSENSE]
    + [(field, words, "a.nii.gz") for field, words in NONSENSE if not words.endswith(" bytes")],
)
def test_headers_that_make_no_sense(tmp_path, field, words, name):
    path = write_scan(tmp_path / name, np.random.default_rng(0).integers(0, 9, SHAPE, np.int16))
    assert words in refusal(patched(path, field))


@pytest.mark.parametrize("lengths", [[3, 2**62, 2**62, 2**62], [3, -1, 5, 6], [9, 4, 5, 6], [3, 4, 5, 2**40]])
def test_nifti2_headers_that_make_no_sense(tmp_path, lengths):
    refusal(patched(plain_scan(tmp_path / "a.nii", nib.Nifti2Image), (16, "<4q", lengths)))


def test_small_repairs_are_made_without_a_word(tmp_path, caplog, capfd):
    path = patched(plain_scan(tmp_path / "a.nii"), (80, "<f", -1.5))  # a length is > 0
    assert np.array_equal(nifti.read_grid(path).affine, AFFINE)
    assert caplog.messages == []
    assert capfd.readouterr().err == ""


def test_values_that_are_not_finite(tmp_path, recwarn):
    path = patched(plain_scan(tmp_path / "a.nii"), (112, "<2f", [2, np.nan]))
    with pytest.raises(InputError, match=r"cannot be read .*intercept"):
        nifti.read_image(path)
    assert np.isinf(nifti.read_image(write_scan(tmp_path / "a.nii", np.full(SHAPE, -1e300)))[0]).all()
    assert not recwarn.list


NOISE = np.random.default_rng(0).random((40, 40, 40))
# name: what a .nii.gz holds, given a .nii, and what is wrong with it
DAMAGE = {
    "checksum": (lambda raw: gzip.compress(raw)[:-8] + b"\0" * 4 + gzip.compress(raw)[-4:], "CRC"),
    "no checksum": (lambda raw: gzip.compress(raw)[:-8], "ended"),
    "cut": (lambda raw: gzip.compress(raw)[: len(raw) // 2], "ended"),
    "one byte more": (lambda raw: gzip.compress(raw + b"!"), "unpacks to more"),
    "another member": (lambda raw: gzip.compress(raw) + gzip.compress(bytes(10**6)), "unpacks to more"),
    "rubbish behind": (lambda raw: gzip.compress(raw) + b"rubbish", "gzip"),
    "one byte less": (lambda raw: gzip.compress(raw[:-1]), "ends before its last voxel"),
}


@pytest.mark.parametrize(("change", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damage_beyond_the_header(tmp_path, change, words):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(change(write_scan(tmp_path / "whole.nii", NOISE).read_bytes()))
    nifti.read_grid(path)
    with pytest.raises(InputError, match=words):
        nifti.read_image(path)


def test_what_is_no_file_or_has_another_name(tmp_path):
    plain = plain_scan(tmp_path / "a.nii").read_bytes()
    for name in ("d.img", "d.nii.bz2", "d", "d.gz", "plain.nii.gz"):
        (tmp_path / name).write_bytes(plain)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(plain))
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "empty.nii").touch()
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    wrong = dict.fromkeys(("d.img", "d.nii.bz2", "d", "d.gz"), "expected a .nii or .nii.gz")
    wrong |= {
        "packed.nii": "packed with gzip, its name must end in .gz",
        "plain.nii.gz": "not packed with gzip",
    }
    wrong |= {"pipe.nii": "pipe", "folder.nii": "is a folder", "empty.nii": "no NIfTI header"}
    wrong |= dict.fromkeys(("none.nii", "empty.nii/below.nii"), "no such file")
    for name, words in (wrong | {"loop.nii": "cannot be found", "long" * 100 + ".nii": "too long"}).items():
        assert words in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("shape", "affine", "words"),
    [
        (SHAPE, AFFINE, ""),
        (SHAPE, AFFINE + 5e-4 * np.eye(4, k=3), ""),  # half a micrometre
        (SHAPE, AFFINE + 5e-3 * np.eye(4, k=3), "its affine differs from the mask's"),
        (SHAPE, OBLIQUE, "its affine differs from the mask's"),
        ((4, 6, 5), OBLIQUE, "shape (4, 6, 5), the mask has (4, 5, 6)"),
    ],
)
def test_image_that_lies_elsewhere(tmp_path, shape, affine, words):
    like = nifti.read_grid(write_scan(tmp_path / "mask.nii", voxels(0, shape=SHAPE)))
    path = write_scan(tmp_path / "a.nii.gz", voxels(1, shape=shape), affine)
    assert nifti.read_grid(path).mismatch(like, "the mask") == words
    if not words:
        values, grid = nifti.read_image(path, like, "the mask")
        assert np.array_equal(values, voxels(1, shape=SHAPE))
        assert np.allclose(grid.affine, affine, rtol=0, atol=1e-5)  # its own, rounded to float32
        return
    path.write_bytes(path.read_bytes()[:-9])  # which is seen without reading it to its end
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        nifti.read_image(path, like, "the mask")


@pytest.mark.parametrize("affine", [AFFINE, OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize("name", ["map.nii", "map.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_map_lies_where_the_scan_lies(tmp_path, affine, name, kind, caplog):
    scan = read_nifti(write_scan(tmp_path / "scan.nii", voxels(0, shape=SHAPE), affine, kind))
    # NIfTI-1 keeps what it stores; a NIfTI-2 scan's float64 may be rounded to float32
    rounding = 0 if kind is nib.Nifti1Image else 2**-23
    for sform, qform in [(4, 1), (0, 1), (4, 0), (2, 3)]:
        header = scan.header.copy()
        header["sform_code"], header["qform_code"] = sform, qform
        nifti.save_map(np.zeros(SHAPE), header, tmp_path / name)
        found = read_nifti(tmp_path / name)
        assert found.shape == SHAPE
        assert (found.header["sform_code"], found.header["qform_code"]) == (sform, qform)
        for get in ("get_sform", "get_qform", "get_best_affine", "get_zooms"):
            assert np.allclose(
                getattr(found.header, get)(), getattr(header, get)(), rtol=rounding, atol=rounding
            )
        # of a qform: its rotation is three float32 numbers, a few parts in 1e7 of 90 mm
        assert np.allclose(found.affine, affine, rtol=0, atol=1e-4)
        assert found.header.get_xyzt_units() == ("mm", "sec")
    assert caplog.messages == []


def test_map_values_are_float32_and_unscaled(tmp_path):
    path = plain_scan(tmp_path / "scan.nii")
    # the scan's own scl_slope and scl_inter, and a viewer's window: cal_max, cal_min
    patched(path, (112, "<2f", [3, -7]), (124, "<2f", [90, 10]))
    values, header = np.random.default_rng(0).normal(size=SHAPE) * 1e-6, read_nifti(path).header
    kept, before = values.copy(), header.copy()
    nifti.save_map(values, header, tmp_path / "map.nii.gz")
    found = read_nifti(tmp_path / "map.nii.gz")
    assert found.get_data_dtype() == np.float32
    assert np.array_equal(read_values(tmp_path / "map.nii.gz"), values.astype(np.float32))
    assert found.header["cal_max"] == found.header["cal_min"] == 0
    assert header == before
    assert np.array_equal(values, kept)


# Onto another grid -------------------------------------------------------------------------------


def like(shape: tuple[int, int, int], affine: np.ndarray) -> nifti.Grid:
    return nifti.Grid(shape, affine, nib.Nifti1Header())


def places(own: np.ndarray, grid: nifti.Grid) -> np.ndarray:
    """Where the voxels of a grid lie, (X, Y, Z, 3), in voxels of another affine."""
    there = np.linalg.inv(own) @ grid.affine
    return nib.affines.apply_affine(there, np.moveaxis(np.indices(grid.shape), 0, -1))


def at(values: np.ndarray, index: np.ndarray, fill: float) -> np.ndarray:
    """The voxels at some indices (..., 3), `fill` where there are none."""
    inside = ((index >= 0) & (index < SHAPE)).all(axis=-1)
    found = values[tuple(np.moveaxis(index.clip(0, np.array(SHAPE) - 1), -1, 0))]
    return np.where(inside.reshape(inside.shape + (1,) * (values.ndim - 3)), found, fill)


def nearest(values: np.ndarray, place: np.ndarray, fill: float) -> np.ndarray:
    return at(values, np.rint(place).astype(int), fill)


def linear(values: np.ndarray, place: np.ndarray, fill: float) -> np.ndarray:
    """The eight voxels around each place, weighted; those that there are none of count as `fill`."""
    base, total = np.floor(place).astype(int), np.zeros((*place.shape[:3], *values.shape[3:]))
    for corner in itertools.product((0, 1), repeat=3):
        weight = np.abs(1 - np.array(corner) - (place - base)).prod(axis=-1)
        total += weight.reshape(weight.shape + (1,) * (values.ndim - 3)) * at(values, base + corner, fill)
    return total


# beyond the image on every side, and finer; turned and flipped; flipped and shifted; wholly within the image
WIDE = AFFINE @ nib.affines.from_matvec(np.diag([0.7, 0.6, 0.8]), [-1.7, -2.3, -1.9])
ELSEWHERE = {
    "wide": like((12, 15, 13), WIDE),
    "turned": like((7, 8, 9), OBLIQUE @ nib.affines.from_matvec(np.diag([1, -1, 0.8]), [-1, 4, -1])),
    "flipped": like((5, 7, 6), AFFINE @ nib.affines.from_matvec(np.diag([-1.0, 1, 1]), [3.2, -1.4, 0.4])),
    "inside": like((2, 3, 4), AFFINE @ nib.affines.from_matvec(np.eye(3), [0.3, 1.2, 0.6])),
}


@pytest.mark.parametrize("fill", [0, -2.5, 7])
@pytest.mark.parametrize("several", [(), (3,)], ids=["3D", "4D"])
@pytest.mark.parametrize(("interpolation", "oracle"), [("nearest", nearest), ("linear", linear)])
@pytest.mark.parametrize("grid", ELSEWHERE.values(), ids=ELSEWHERE)
def test_resampled_voxels_are_those_of_their_place_in_mm(grid, interpolation, oracle, several, fill):
    values = white((*SHAPE, *several), 5)
    kept, place = values.copy(), places(AFFINE, grid)
    found, wanted = nifti.resample(values, AFFINE, grid, interpolation, fill), oracle(values, place, fill)
    assert found.shape == (*grid.shape, *several)
    assert found.dtype == np.float32
    # halfway between voxels either is the nearest
    sure = (np.abs(place - np.floor(place) - 0.5) > 1e-6).all(axis=-1) | (interpolation == "linear")
    assert sure.mean() > 0.5
    # a value below 8, rounded to float32
    assert np.allclose(found[sure], wanted[sure], rtol=0, atol=2**-21)
    assert np.array_equal(values, kept)
    beyond = ((place < -1) | (place > SHAPE)).any(axis=-1)
    assert (found[beyond] == fill).all()
    assert beyond.any() == (grid is not ELSEWHERE["inside"])


@pytest.mark.parametrize("several", [(), (3,)], ids=["3D", "4D"])
@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
@pytest.mark.parametrize("affine", [AFFINE, OBLIQUE], ids=["straight", "oblique"])
def test_resampled_where_it_lies_already_it_stays(affine, interpolation, several):
    values = white((*SHAPE, *several), 5)
    assert np.array_equal(nifti.resample(values, affine, like(SHAPE, affine), interpolation, -9), values)


@pytest.mark.parametrize("several", [(), (2,)], ids=["3D", "4D"])
@pytest.mark.parametrize("fill", [0, -2.5])
@pytest.mark.parametrize("shift", [*(500 * np.eye(3)), *(-500 * np.eye(3)), [500, -500, 500]])
def test_resampled_from_elsewhere_nothing_is_there(shift, fill, several):
    affine = AFFINE @ nib.affines.from_matvec(np.eye(3), shift)
    for interpolation in ("nearest", "linear"):
        values = white((*SHAPE, *several), 5)
        found = nifti.resample(values, affine, like((7, 5, 6), AFFINE), interpolation, fill)
        assert found.shape == (7, 5, 6, *several)
        assert (found == fill).all()
        assert found.dtype == np.float32
