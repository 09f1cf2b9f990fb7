"""heatmap.py --scans: new scans, explained by all networks of a run folder alone."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cohorts import (
    AFFINE,
    K,
    contents,
    load_network,
    load_volume,
    only_error,
    quick,
    read_nifti,
    read_table,
    read_values,
    voxels,
    write_csv,
    write_new_scans,
    write_scan,
)
from interruptions import ends_after

import dataset
import figures
import gradient
import heatmap
import utils

SCANS = {"a": 0, "b": 1, "c": 1}  # new ones, and their labels
METHOD = "SmoothGrad"


@pytest.fixture(scope="module")
def here(lively_run, tmp_path_factory) -> Path:
    """A folder with new scans and a run, whose own scans and list are gone; read only."""
    folder = tmp_path_factory.mktemp("new")
    write_new_scans(folder, SCANS, lively_run)
    return folder


def explain(
    here: Path, outpath: Path, *options: str, method: str = METHOD, csv: str = "unlabelled.csv"
) -> int:
    where = ["--scans", str(here / csv), "--modelpath", str(here / "models"), "--outpath", str(outpath)]
    return heatmap.main(["--method", method, *quick(method), *where, "--device", "cpu", *options])


@pytest.fixture(scope="module")
def explained(here, tmp_path_factory) -> Path:
    """The maps of the unlabelled scans, every network's kept; read only."""
    folder = tmp_path_factory.mktemp("explained")
    assert explain(here, folder, "--save-subjects") == 0
    return folder / METHOD


def own_map(here: Path, row: int, fold: int, target: int) -> np.ndarray:
    """The map of a scan by one network, by the method's own function."""
    network = load_network(here / f"models/state_dict_f{fold}.pth")
    volume = load_volume(here / f"{list(SCANS)[row]}.nii")
    seeds = [utils.own_seed(0, row)]
    options = {"samples": 2, "sigma": 0.2, "seeds": seeds}
    return gradient.smoothgrad(network, volume, torch.tensor([target]), **options)[0, 0].numpy()


def probabilities(here: Path, row: int) -> list[float]:
    """Every network's probability of label 1 of a scan, by plain PyTorch; their temperatures are 1."""
    volume = load_volume(here / f"{list(SCANS)[row]}.nii")
    networks = [load_network(here / f"models/state_dict_f{fold}.pth") for fold in range(K)]
    with torch.no_grad():
        return [network(volume).double().softmax(1)[0, 1].item() for network in networks]


def test_every_network_explains_every_scan(here, explained):
    """For what it predicts itself; mean and spread are those of the networks' maps."""
    subjects = read_table(explained / "subjects.csv")
    assert subjects["path"].tolist() == [f"{name}.nii" for name in SCANS] * K
    assert subjects["label"].isna().all()
    for row, name in enumerate(SCANS):
        targets = [int(prob > 0.5) for prob in probabilities(here, row)]
        assert subjects[subjects["path"] == f"{name}.nii"]["target"].tolist() == targets
        single = np.stack([own_map(here, row, fold, target) for fold, target in enumerate(targets)])
        for kind, expected in (("mean", single.mean(axis=0)), ("sd", single.std(axis=0, ddof=1))):
            file = explained / f"subjects/{row:05d}_{name}_{kind}.nii.gz"
            assert np.array_equal(read_nifti(file).affine, AFFINE)
            largest = np.abs(single).max()
            assert np.abs(read_values(file) - expected).max() < 1e-6 * largest  # float32
        assert (explained / f"subjects/{row:05d}_{name}.png").read_bytes().startswith(b"\x89PNG")
    maps = [read_values(explained / f"subjects/{row:05d}_{n}_mean.nii.gz") for row, n in enumerate(SCANS)]
    found = read_values(explained / "map_all.nii.gz")
    assert np.abs(found - np.mean(maps, axis=0)).max() < 1e-6 * np.abs(found).max()


def test_picture_is_over_that_very_scan(here, tmp_path, monkeypatch):
    drawn = []
    honest = figures.draw_map

    def draw(maps, background, affine, title, path):
        drawn.append((maps, background, title, path.name))
        honest(maps, background, affine, title, path)

    monkeypatch.setattr(figures, "draw_map", draw)
    assert explain(here, tmp_path, method="GGC") == 0
    assert [name for *_, name in drawn] == ["map_all.png", *(f"{i:05d}_{n}.png" for i, n in enumerate(SCANS))]
    for row, (maps, background, title, _) in enumerate(drawn[1:]):
        scan = dataset.read_scan(here / f"{list(SCANS)[row]}.nii")
        assert np.array_equal(background, scan)
        assert list(maps) == ["mean", "sd"]
        prob = probabilities(here, row)
        words = f"probability of label 1: {np.mean(prob):.2f}, {min(prob):.2f} to {max(prob):.2f}"
        assert title == f"{list(SCANS)[row]}.nii: GGC, modelB2, 2 networks; {words}"


def test_temperatures_are_in_the_title(here):
    subjects = pd.DataFrame({
        "fold": [0, 1, 0], "path": ["x", "x", "y"], "target": [1, 0, 0], "prob_target": [0.8, 0.8, 1.0],
    })  # fmt: skip
    found = heatmap.probabilities(subjects, [2.0, 0.5])
    # odds of 4 become 2, and of 1/4 become 1/16; of certainty no more is known than that they are above 2^53
    assert found["x"].tolist() == pytest.approx([2 / 3, 1 / 17])
    assert found["y"].tolist() == pytest.approx([2**-26.5], rel=1e-6)


def test_single_networks_maps_go_when_nobody_asked_for_them(here, explained, tmp_path):
    assert explain(here, tmp_path) == 0
    kept, asked = contents(tmp_path / METHOD), contents(explained)
    single = {name for name in asked if name.startswith("subjects/f")}
    assert len(single) == K * len(SCANS)
    assert kept.keys() == asked.keys() - single
    assert {n: kept[n] for n in kept if n != "map.json"} == {n: asked[n] for n in kept if n != "map.json"}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert explain(here, tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before
    # a picture that is gone is drawn from what is there
    (tmp_path / METHOD / "subjects/00001_b.png").unlink()
    assert explain(here, tmp_path) == 0
    assert contents(tmp_path / METHOD).keys() == kept.keys()


def test_what_is_needed_again_is_said_before_anything_is_lost(here, tmp_path, capsys):
    """The single networks' maps are gone, and one fold is to be made anew."""
    assert explain(here, tmp_path, method="GGC") == 0
    before = contents(tmp_path)
    assert explain(here, tmp_path, "--run-folds", "1", "--overwrite", method="GGC") == 2
    line = only_error(capsys.readouterr().err.splitlines()[-1] + "\n")
    assert "subjects/f0_00000_a.nii.gz: was removed when all was made of it" in line
    assert contents(tmp_path) == before
    assert explain(here, tmp_path, "--overwrite", method="GGC") == 0
    assert {n: c for n, c in contents(tmp_path).items() if n != "map.json"} == {
        n: c for n, c in before.items() if n != "map.json"
    }


def test_other_scans_take_the_place_of_the_former(here, tmp_path):
    """With --overwrite; maps of groups that the others do not have go, too."""
    assert explain(here, tmp_path, method="GGC", csv="labelled.csv") == 0
    assert (tmp_path / "GGC/map_patients.nii.gz").exists()
    assert explain(here, tmp_path, "--overwrite", method="GGC") == 0
    assert not (tmp_path / "GGC/map_patients.nii.gz").exists()


@pytest.mark.parametrize(("step", "call"), [("keep", 4), ("_explain_one", 2), ("average", 1)])
def test_interrupted_maps_go_on(here, explained, tmp_path, monkeypatch, step, call):
    with monkeypatch.context() as patch:
        ends_after(patch, heatmap.FoldMaps, step, call)
        assert explain(here, tmp_path, "--save-subjects") == 130
    assert explain(here, tmp_path, "--save-subjects") == 0
    assert contents(tmp_path / METHOD) == contents(explained)


def test_parts_and_folds_make_what_one_call_makes(here, explained, tmp_path):
    for options in (["--part", "2/2"], ["--part", "1/2", "--run-folds", "1"], ["--part", "1/2"]):
        assert explain(here, tmp_path, "--save-subjects", *options) == 0
    assert contents(tmp_path / METHOD) == contents(explained)


def test_labels_give_targets_and_groups(here, tmp_path):
    assert explain(here, tmp_path, method="GGC", csv="labelled.csv") == 0
    subjects = read_table(tmp_path / "GGC/subjects.csv")
    assert subjects["target"].tolist() == subjects["label"].tolist() == list(SCANS.values()) * K
    assert (tmp_path / "GGC/map_patients.nii.gz").exists()


def test_some_labels_are_said_to_be_missing(here, tmp_path, capsys):
    write_csv(tmp_path / "some.csv", [(here / "a.nii", 1), (here / "b.nii", "")])
    assert explain(here, tmp_path / "out", method="GGC", csv=str(tmp_path / "some.csv")) == 0
    assert "1 of 2 scans have no label: all are explained for what is predicted" in capsys.readouterr().out
    subjects = read_table(tmp_path / "out/GGC/subjects.csv")
    assert subjects["target"].tolist() == subjects["predicted"].tolist()


def test_baseline_is_the_recorded_mean_of_controls(here, tmp_path):
    assert explain(here, tmp_path, "--baseline", "controls", method="IG") == 0
    for fold in range(K):
        found, recorded = (
            read_values(path / name)
            for path, name in [(tmp_path / "IG-controls", f"baseline_f{fold}.nii.gz"),
                               (here / "models", f"mean_controls_f{fold}.nii.gz")]
        )  # fmt: skip
        assert np.array_equal(found, recorded)
    residual = read_table(tmp_path / "IG-controls/subjects.csv")["residual"]
    assert len(residual) == K * len(SCANS)


def test_scan_of_the_run_is_explained_by_the_network_that_tested_it(run, csv, tmp_path, capsys):
    shutil.copy(csv.parent / "scans/004.nii", tmp_path / "renamed.nii")
    write_csv(tmp_path / "new.csv", [("renamed.nii",)])
    where = [
        "--scans",
        str(tmp_path / "new.csv"),
        "--modelpath",
        str(run),
        "--outpath",
        str(tmp_path / "out"),
    ]
    assert heatmap.main(["--method", "GGC", *where, "--device", "cpu"]) == 0
    assert "1 of 1 scans are the run's own" in capsys.readouterr().err
    tested = read_table(run / "predictions.csv").set_index("path").loc["scans/004.nii"]
    assert read_table(tmp_path / "out/GGC/subjects.csv")["fold"].tolist() == [tested["fold"]]
    made = {path.name for path in (tmp_path / "out/GGC/subjects").iterdir()}
    assert made == {"00000_renamed_mean.nii.gz", "00000_renamed.png"}  # no spread of one
    names = {path.name for path in (tmp_path / "out/GGC").iterdir()}
    assert {f"map_f{fold}.nii.gz" for fold in range(K)} & names == {f"map_f{tested['fold']}.nii.gz"}


def test_maps_of_different_scans_do_not_lie_side_by_side(here, explained, lively_run, tmp_path, capsys):
    shutil.copytree(explained, tmp_path / METHOD)
    before = contents(tmp_path)
    own = ["--modelpath", str(lively_run), "--outpath", str(tmp_path), "--device", "cpu"]
    assert heatmap.main(["--method", "LRP", *own]) == 2
    assert f"{METHOD} there has maps of new scans" in only_error(capsys.readouterr().err)
    assert explain(here, tmp_path, method="GGC", csv="labelled.csv") == 2
    assert f"{METHOD} there has maps of other new scans" in only_error(capsys.readouterr().err)
    assert contents(tmp_path) == before
    assert explain(here, tmp_path, method="GGC") == 0


def test_resampled_scans(here, tmp_path):
    """Maps lie on the run's grid."""
    values = np.zeros((60, 70, 50), np.int16)
    values[5:-5, 5:-5, 5:-5] = voxels(0, shape=(50, 60, 40))
    write_scan(tmp_path / "far.nii", values, np.diag([3.0, 3, 3, 1]) + np.eye(4, k=3) * -80)
    write_csv(tmp_path / "far.csv", [("far.nii",)])
    assert explain(here, tmp_path, method="GGC", csv=str(tmp_path / "far.csv")) == 2
    assert explain(here, tmp_path, "--resample", method="GGC", csv=str(tmp_path / "far.csv")) == 0
    found = read_nifti(tmp_path / "GGC/subjects/00000_far_mean.nii.gz")
    assert np.array_equal(found.affine, AFFINE)
