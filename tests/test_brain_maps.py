"""brain_maps.py: what METHOD folders say of themselves, references on other grids, and mistakes."""

import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from cohorts import AFFINE, OBLIQUE, white, write_scan

import brain_maps
from internals import nifti, storage
from internals.errors import InputError

SHAPE = (12, 13, 14)
EVERYWHERE = np.ones(SHAPE, bool)


@pytest.fixture
def maps(tmp_path) -> Path:
    """METHOD folders of three folds, whose maps are empty files, and another folder."""
    for method in ("GGC", "IG", "SVM"):
        (tmp_path / method).mkdir()
        for fold in ("f0", "f1", "f2", "all"):
            (tmp_path / method / f"map_{fold}.nii.gz").touch()
        record(tmp_path, method, {"folds": 3, "csv_sha256": "abc"})
    (tmp_path / "SVM" / "map.json").unlink()
    (tmp_path / "notes").mkdir()
    return tmp_path


def record(maps: Path, method: str, content: dict[str, Any]) -> None:
    storage.write_json(content, maps / method / "map.json")


def refused(maps: Path) -> str:
    with pytest.raises(InputError) as mistake:
        brain_maps.find_maps(maps)
    return str(mistake.value)


def test_methods_with_and_without_a_record(maps):
    counts = {"zero_maps_per_fold": {"0": 1, "1": 0, "2": 5}, "scans_per_fold": {"0": 8, "1": 8, "2": 8}}
    record(maps, "GGC", {"csv_sha256": "abc", "finished": [0, 1, 2, "summary"], **counts})
    methods = brain_maps.find_maps(maps)
    assert [(method.name, method.folds) for method in methods] == [("GGC", 3), ("IG", 3), ("SVM", 3)]
    assert methods[0].zero_share == 6 / 24
    assert all(math.isnan(method.zero_share) for method in methods[1:])
    names = {"0": "map_f0.nii.gz", "1": "map_f1.nii.gz", "2": "map_f2.nii.gz", "all": "map_all.nii.gz"}
    assert methods[2].files == {("SVM", fold): maps / "SVM" / name for fold, name in names.items()}


def test_maps_that_are_missing_or_too_many(maps):
    missing = [maps / name for name in ("GGC/map_all.nii.gz", "IG/map_f2.nii.gz", "SVM/map_f1.nii.gz")]
    for file in missing:
        file.unlink()
    assert refused(maps) == f"maps are missing: {', '.join(map(str, missing))}"
    for file in missing:
        file.touch()
    (maps / "SVM" / "map_f2.nii.gz").unlink()
    assert refused(maps).endswith("differ in their number of folds: GGC has 3, IG has 3, SVM has 2")
    (maps / "SVM" / f"map_f{10**30}.nii.gz").touch()
    assert refused(maps) == f"{maps / 'SVM'}: has {10**30 + 1} folds, expected at most 1000"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"folds": 10**9}, "has 1000000000 folds"),
        ({"folds": "3"}, "'folds' is '3'"),
        ({"folds": True}, "'folds' is True"),
        ({"csv_sha256": [["abc"]]}, "'csv_sha256' is [['abc']]"),
        ({"zero_maps_per_fold": 5}, "'zero_maps_per_fold' is 5"),
        ({"scans_per_fold": {"0": -1}}, "'0' is -1"),
        ({"scans_per_fold": {"0": True}}, "'0' is True"),
        ({"zero_maps_per_fold": {"0": 9}, "scans_per_fold": {"0": 8}}, "9 of 8 maps are zero everywhere"),
        ({"finished": "summary"}, "'finished' is 'summary'"),
        ({"finished": [0, 1, 2]}, "map.json: is not finished"),  # though all maps are there
        ({"csv_sha256": "def"}, "of different CSVs"),
        ({"folds_sha256": "def"}, "of different folds"),
        ({"scans_sha256": "def"}, "of different scans"),
    ],
)
def test_records_that_cannot_be(maps, content, words):
    record(maps, "GGC", {"csv_sha256": "abc", "folds_sha256": "abc", "scans_sha256": "abc"})
    record(maps, "IG", content)
    assert words in refused(maps)
    assert "IG" in refused(maps) or "different" in words


def reference_of(tmp_path: Path, values: np.ndarray, affine: np.ndarray, mask: np.ndarray, threshold=0.0):
    """The reference at the voxels of a mask on the grid of AFFINE, put back into a volume."""
    grid = nifti.read_grid(write_scan(tmp_path / "mask.nii.gz", mask.astype(np.uint8)))
    file = write_scan(tmp_path / "reference.nii.gz", values, affine)
    volume = np.zeros(mask.shape, bool)
    volume[mask] = brain_maps.read_reference(file, threshold, mask, grid)
    return volume


@pytest.mark.parametrize("threshold", [0.5, 0.1])
def test_reference_is_above_a_threshold_inside_the_mask(tmp_path, capsys, threshold):
    mask, values = np.zeros(SHAPE, bool), white(SHAPE, 5)
    mask[2:10, 3:12, 1:12] = True
    values[2, 3, 1:4] = np.nan, 0.5, 0.1  # 0.1 in float32 is above 0.1
    above = mask & (values.astype(float) > threshold)
    assert np.array_equal(reference_of(tmp_path, values, AFFINE, mask, threshold), above)
    said = capsys.readouterr().out
    assert "resampled" not in said
    assert f"{above.sum()} of the mask's {mask.sum()} voxels" in said
    assert f"{(~mask & (values > threshold)).sum()} more lie outside" in said


@pytest.mark.parametrize("off", [(0, 0, 0), (0.6, -0.9, 0.5), (-0.6, 0.9, -0.5)])  # less than half a voxel
def test_shifted_reference_lands_where_it_lies_in_mm(tmp_path, capsys, off):
    """The reference's grid starts two voxels later along x and one earlier along z, and ends earlier."""
    values = np.zeros((8, 13, 14), np.float32)
    values[0, 6, 3] = values[7, 12, 12] = values[5, 0, 1] = 1
    affine = AFFINE.copy()
    affine[:3, 3] += AFFINE[:3, :3] @ [2, 0, -1] + off
    found = reference_of(tmp_path, values, affine, EVERYWHERE)
    assert np.argwhere(found).tolist() == [[2, 6, 2], [7, 0, 0], [9, 12, 11]]
    said = capsys.readouterr().out
    assert "shape (8, 13, 14), the first map has (12, 13, 14); resampled to the maps' grid" in said
    # x 0, 1, 10, 11 and z 13 of the maps' grid have no voxel of the reference's nearby
    assert f"{1 - 8 * 13 / (12 * 14):.1%} of the mask lies outside its field of view" in said


def test_turned_reference_lands_where_it_lies_in_mm(tmp_path, capsys):
    """Axes swapped and flipped, voxels of 1 mm: blocks placed by hand, in mm."""
    # i runs to superior, j to the right, k to posterior
    affine = np.array([[0, 1, 0, 50.25], [0, 0, -1, -60], [1, 0, 0, -65], [0, 0, 0, 1]])
    values = np.zeros((30, 40, 45), np.uint8)
    values[5:12, 10:17, 8:14] = 1  # z -60 ... -54, x 60.25 ... 66.25, y -68 ... -73, half a voxel around
    found = reference_of(tmp_path, values, affine, EVERYWHERE)
    places = np.argwhere(EVERYWHERE)
    x, y, z = nib.affines.apply_affine(AFFINE, places).T
    block = (np.abs(x - 63.25) < 3.5) & (np.abs(y + 70.5) < 3) & (np.abs(z + 57) < 3.5)
    assert block.sum() == 4 * 3 * 6
    assert np.argwhere(found).tolist() == places[block].tolist()
    assert "resampled" in capsys.readouterr().out


def test_oblique_reference_lands_where_it_lies_in_mm(tmp_path, capsys):
    values = np.zeros(SHAPE, np.uint8)
    values[3:9, 4:10, 5:9] = 1
    found = reference_of(tmp_path, values, OBLIQUE, EVERYWHERE)
    assert "its affine differs from the first map's; resampled" in capsys.readouterr().out
    for place in np.ndindex(SHAPE):
        there = nib.affines.apply_affine(np.linalg.inv(OBLIQUE) @ AFFINE, place)
        if np.abs(there - np.floor(there) - 0.5).min() < 1e-3:
            continue  # halfway between voxels
        nearest = np.rint(there).astype(int)
        inside = (nearest >= 0).all() and (nearest < SHAPE).all()
        assert found[place] == (inside and bool(values[tuple(nearest)])), place


@pytest.mark.parametrize("shift", [*(500 * np.eye(3)), *(-500 * np.eye(3))])
def test_reference_elsewhere(tmp_path, shift):
    affine = AFFINE.copy()
    affine[:3, 3] += shift
    with pytest.raises(InputError, match="its field of view does not meet the mask's"):
        reference_of(tmp_path, np.ones(SHAPE, np.uint8), affine, EVERYWHERE)
