"""ttest.py: t-maps against scipy's, on the folds of a run and on new ones; files, going on, mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
from cohorts import (
    AFFINE,
    K,
    contents,
    only_error,
    read_nifti,
    read_values,
    two_groups,
    write_csv,
    write_scan,
)
from interruptions import ends_after
from scipy import stats

import dataset
import figures
import ttest
import voxelwise
from internals import nifti, storage

FILES = {"map_f0.nii.gz", "map_f1.nii.gz", "map_all.nii.gz", "map_all.png", "mean_scan.nii.gz", "map.json"}


SHAPE, FOLDING = (8, 9, 10), ("--fold", str(K), "--val-fraction", "0.3", "--seed", "1")


@pytest.fixture(scope="module")
def csv(tmp_path_factory) -> Path:
    """Twenty scans of two groups and their CSV; read only."""
    folder = tmp_path_factory.mktemp("cohort")
    for number, values in enumerate(two_groups(20, SHAPE)):
        write_scan(folder / f"scans/{number}.nii.gz", values)
    rows = [(f"scans/{number}.nii.gz", number % 2) for number in range(20)]
    return write_csv(folder / "data.csv", rows, header="path,label")


def compare(csv: Path, outpath: Path, *options: str) -> int:
    return ttest.main(
        ["--path", str(csv), "--modelpath", "none", "--outpath", str(outpath), *FOLDING, *options]
    )


@pytest.fixture(scope="module")
def done(csv, tmp_path_factory) -> Path:
    """The folder of everything; read only."""
    outpath = tmp_path_factory.mktemp("maps")
    assert compare(csv, outpath) == 0
    return outpath / "TTEST"


def t_maps(csv: Path) -> np.ndarray:
    """scipy's t of every fold's training patients against its training controls, (K, X, Y, Z)."""
    table = dataset.make_folds(dataset.read_csv(csv), K, "stratified", 0.3, seed=1).query("role == 'train'")
    maps = []
    for fold in range(K):
        mine = table[table["fold"] == fold]
        scans = np.stack([dataset.read_scan(csv.parent / path).astype(float) for path in mine["path"]])
        groups = [scans[(mine["label"] == label).to_numpy()] for label in (1, 0)]
        with np.errstate(invalid="ignore", divide="ignore"):
            maps.append(stats.ttest_ind(*groups, equal_var=False).statistic)
    return np.nan_to_num(maps, nan=0.0)  # where no scan varies


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_welch_equals_scipy(shift):
    random = np.random.default_rng(0)
    groups = [random.normal(shift, 1, (4, 50)), random.normal(shift + 1, 3, (7, 50))]
    for group in groups:
        group[:, :5] = shift  # constant, in both
    groups[1][:, 5:9] = random.random(4)  # in one
    sums, squares = (np.stack([(group**power).sum(0) for group in groups]) for power in (1, 2))
    found = ttest.welch_t(sums, squares, np.array([4, 7]))
    expected = stats.ttest_ind(groups[1][:, 5:], groups[0][:, 5:], equal_var=False).statistic
    assert np.allclose(found[5:], expected, rtol=1e-7)  # squares of 1000 leave ten digits of a variance of 1
    assert not found[:5].any()


def test_maps_are_those_of_scipy_on_the_training_scans(done, csv):
    assert set(contents(done)) == FILES
    expected = t_maps(csv)
    largest = np.abs(expected).max()
    for fold in range(K):
        found = read_values(done / f"map_f{fold}.nii.gz")
        assert np.allclose(found, expected[fold], rtol=1e-5, atol=1e-6 * largest)  # rounded to float32
        assert np.array_equal(read_nifti(done / f"map_f{fold}.nii.gz").affine, AFFINE)
    found = read_values(done / "map_all.nii.gz")
    assert np.allclose(found, expected.mean(0), rtol=1e-5, atol=1e-6 * largest)
    record = json.loads((done / "map.json").read_text())
    assert (record["method"], record["finished"]) == ("TTEST", [0, 1, "summary"])
    assert record["options"]["fold"] == K
    assert record["csv_sha256"] == storage.file_sha256(csv)


def test_mask_and_folds_in_several_passes(csv, tmp_path, done, monkeypatch):
    """However few voxels may be held, the same t; outside the mask, zero."""
    values = np.zeros(read_values(done / "map_all.nii.gz").shape, np.float32)
    values[2:6, 2:6, 2:6] = 1
    mask = nifti.load_map(done / "map_all.nii.gz") * 0 + values
    nifti.save_map(mask, read_nifti(done / "map_all.nii.gz").header, tmp_path / "mask.nii.gz")
    monkeypatch.setattr(voxelwise, "HELD", 1)
    monkeypatch.setattr(figures, "draw_map", lambda *given: given[-1].write_bytes(b"picture"))
    assert compare(csv, tmp_path, "--mask", str(tmp_path / "mask.nii.gz")) == 0
    for name in ("map_f0.nii.gz", "map_f1.nii.gz", "map_all.nii.gz"):
        found, before = read_values(tmp_path / "TTEST" / name), read_values(done / name)
        assert np.allclose(found, before * values, rtol=1e-6, atol=1e-6)


def test_interrupted_maps_start_again_and_finished_ones_are_kept(csv, tmp_path, done, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        ends_after(patch, nifti, "save_map", 2)
        assert compare(csv, tmp_path) == 130
    assert compare(csv, tmp_path) == 0
    written = contents(tmp_path / "TTEST")
    maps = [name for name in FILES if name.startswith("map_f")]
    assert {name: written[name] for name in maps} == {name: contents(done)[name] for name in maps}
    capsys.readouterr()
    assert compare(csv, tmp_path) == 0
    assert "done before, kept" in capsys.readouterr().out
    assert contents(tmp_path / "TTEST") == written


def test_too_few_scans_of_a_group_are_one_line(csv, tmp_path, capsys):
    rows = [(csv.parent / f"scans/{number}.nii.gz", number % 2) for number in (*range(0, 16, 2), 1, 3, 5, 7)]
    few = write_csv(tmp_path / "few.csv", rows)
    assert compare(few, tmp_path / "out") == 2
    said = only_error(capsys.readouterr().err)
    assert (
        "fold 0: a t-test needs 2 training scans of each label, there are 3 of label 0 and 1 of label 1"
        in said
    )
    assert not (tmp_path / "out").exists()
