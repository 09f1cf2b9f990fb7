"""ttest.py: t-maps against scipy's, on the folds of a run and on new ones; files, going on, mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
from cohorts import AFFINE, K, contents, only_error, read_nifti, read_table, read_values, write_csv
from interruptions import ends_after
from scipy import stats

import dataset
import figures
import ttest
import voxelwise
from internals import nifti, storage

FILES = {"map_f0.nii.gz", "map_f1.nii.gz", "map_all.nii.gz", "map_all.png", "mean_scan.nii.gz", "map.json"}


def compare(run: Path, outpath: Path, *options: str) -> int:
    return ttest.main(["--modelpath", str(run), "--outpath", str(outpath), *options])


@pytest.fixture(scope="module")
def done(run, tmp_path_factory) -> Path:
    """The folder of everything; read only."""
    outpath = tmp_path_factory.mktemp("maps")
    assert compare(run, outpath) == 0
    return outpath / "TTEST"


def t_maps(csv: Path, folds: Path) -> np.ndarray:
    """scipy's t of every fold's training patients against its training controls, (K, X, Y, Z)."""
    table = read_table(folds).query("role == 'train'")
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


def test_maps_are_those_of_scipy_on_the_training_scans(done, run, csv):
    assert set(contents(done)) == FILES
    expected = t_maps(csv, run / "folds.csv")
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


def test_mask_and_folds_in_several_passes(run, tmp_path, done, monkeypatch):
    """However few voxels may be held, the same t; outside the mask, zero."""
    values = np.zeros(read_values(done / "map_all.nii.gz").shape, np.float32)
    values[20:60, 20:60, 20:60] = 1
    mask = nifti.load_map(done / "map_all.nii.gz") * 0 + values
    nifti.save_map(mask, read_nifti(done / "map_all.nii.gz").header, tmp_path / "mask.nii.gz")
    monkeypatch.setattr(voxelwise, "HELD", 1)
    monkeypatch.setattr(figures, "draw_map", lambda *given: given[-1].write_bytes(b"picture"))
    assert compare(run, tmp_path, "--mask", str(tmp_path / "mask.nii.gz")) == 0
    for name in ("map_f0.nii.gz", "map_f1.nii.gz", "map_all.nii.gz"):
        found, before = read_values(tmp_path / "TTEST" / name), read_values(done / name)
        assert np.allclose(found, before * values, rtol=1e-6, atol=1e-6)


def test_interrupted_maps_start_again_and_finished_ones_are_kept(run, tmp_path, done, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        ends_after(patch, nifti, "save_map", 2)
        assert compare(run, tmp_path) == 143
    assert compare(run, tmp_path) == 0
    written = contents(tmp_path / "TTEST")
    maps = [name for name in FILES if name.startswith("map_f")]
    assert {name: written[name] for name in maps} == {name: contents(done)[name] for name in maps}
    capsys.readouterr()
    assert compare(run, tmp_path) == 0
    assert "done before, kept" in capsys.readouterr().out
    assert contents(tmp_path / "TTEST") == written


def test_too_few_scans_of_a_group_are_one_line(csv, tmp_path, capsys):
    table = read_table(csv)
    rows = table[(table["label"] == 0) | (table["label"].cumsum() <= 4)][["path", "label"]].to_numpy()
    few = write_csv(tmp_path / "few.csv", [(csv.parent / path, label) for path, label in rows])
    options = ["--fold", "2", "--val-fraction", "0.4", "--path", str(few)]
    assert compare(tmp_path / "none", tmp_path / "out", *options) == 2
    assert "a t-test needs 2 training scans of each label, there are" in only_error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
