"""sanity.py: every measure against plain PyTorch, impostors, going on, floors, a second run, mistakes."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from cohorts import LABELS, SUBJECTS, K, contents, load_network, load_volume, read_values
from scipy import ndimage, stats
from torch import Tensor

import dataset
import faithfulness
import heatmap
import randomizing
import runs
import sanity
import sanity_scores
import svm
import utils
from checking import CALIBRATION
from faithfulness import POINTS, WAYS

QUICK = ("--scans-per-fold", "1", "--repeats", "1", "--device", "cpu")
WRITTEN = {"sanity.json", "sanity_f0.csv", "sanity_f1.csv", *sanity.FILES.summary}


def check(maps: Path, modelpath: Path, outpath: Path, *options: str) -> int:
    return sanity.main(
        ["--maps", str(maps), "--modelpath", str(modelpath), "--outpath", str(outpath), *QUICK, *options]
    )


def some(maps: Path, folder: Path, *methods: str) -> Path:
    """A folder of some METHODs' maps."""
    for method in methods:
        shutil.copytree(maps / method, folder / method, ignore=shutil.ignore_patterns("subjects"))
    return folder


def findings(folder: Path) -> pd.DataFrame:
    """sanity.csv as it stands."""
    return sanity.read_rows(folder, range(K))


@pytest.fixture(scope="module")
def panel(maps, lively_run, tmp_path_factory) -> Path:
    """What is found of Gradient and LRP, and of an SVM's patterns; read only."""
    folder = tmp_path_factory.mktemp("panel")
    some(maps, folder / "maps", "Gradient", "LRP")
    assert svm.main(["--modelpath", str(lively_run), "--outpath", str(folder / "maps"), "--C", "1"]) == 0
    assert check(folder / "maps", lively_run, folder / "out", "--repeats", "2") == 0
    return folder


# The measures ------------------------------------------------------------------------------------


def plain_gradient(network: Any, volume: Tensor, target: int) -> np.ndarray:
    """By autograd, (X, Y, Z)."""
    scan = volume.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(scan)[0, target], scan)
    return gradient[0, 0].numpy()


def test_files(panel, lively_run):
    assert set(contents(panel / "out")) == WRITTEN
    record = json.loads((panel / "out/sanity.json").read_text())
    assert record["finished"] == [0, 1, "summary"]
    assert (record["scans_per_fold"], record["repeats"], record["seed"]) == (1, 2, 0)
    rows = findings(panel / "out")
    assert set(rows["method"]) == {"Gradient", "LRP", "SVM", "edges", "random"}
    summary = pd.read_csv(panel / "out/sanity_summary.csv")
    assert summary["method"].tolist() == ["Gradient", "LRP", "SVM", "edges"]
    run = runs.find_run(lively_run, None, None, None)
    for fold, part in rows[rows["path"] != ""].groupby("fold"):
        (path,) = part["path"].unique()
        row = run.cohort.table.index[run.cohort.table["path"] == path].item()
        assert row in run.cohort.scan_indices(fold, "test")
        assert part["subject"].unique().tolist() == [SUBJECTS[row]]


def test_agreement_and_covering_by_plain_pytorch(panel, lively_run, csv):
    """Gradient maps by autograd, ranks by scipy, covered scans put through the network as they are."""
    rows = findings(panel / "out")
    mine = rows[(rows["method"] == "Gradient") & (rows["fold"] == 0)]
    row = dataset.read_csv(csv)["path"].tolist().index(mine["path"].iloc[0])
    networks = [load_network(lively_run / f"state_dict_f{fold}.pth") for fold in range(K)]
    volume = load_volume(csv.parent / mine["path"].iloc[0])
    brain = read_values(panel / "maps/LRP/mean_scan.nii.gz") > 0
    own, other = (plain_gradient(network, volume, LABELS[row])[brain] for network in networks)
    value = mine.set_index(["check", "setting"])["value"]
    rho = stats.spearmanr(np.abs(own), np.abs(other)).statistic
    assert value["fold_spearman", "fold 1"] == pytest.approx(rho, abs=1e-3)  # float32, and few near ties
    count = round(0.05 * brain.sum())
    sets = [set(np.argsort(-np.abs(values), kind="stable")[:count]) for values in (own, other)]
    assert value["fold_dice5", "fold 1"] == pytest.approx(2 * len(sets[0] & sets[1]) / (2 * count), abs=2e-3)

    run = runs.find_run(lively_run, None, None, None)
    controls = [i for i in run.cohort.scan_indices(0, "train") if LABELS[i] == 0]
    mean = torch.stack([load_volume(run.cohort.table["file"][i]) for i in controls]).mean(0)
    cubes = faithfulness.divide(brain, run.cohort.grid.voxel_sizes)
    seed = utils.own_seed(utils.own_seed(0, row), 0)
    edges = ndimage.gaussian_gradient_magnitude(volume[0, 0].numpy(), 1)[brain]
    orders = {
        name: faithfulness.falling_order(values, cubes, seed)
        for name, values in (("map", own), ("edges", edges))
    }
    inside = torch.from_numpy(brain)
    for filling, way in itertools.product(sanity_scores.FILLINGS, WAYS):
        shown = torch.zeros_like(volume) if filling == "zero" else mean
        curves = {}
        for name, places in orders.items():
            logits = []
            for share in POINTS:
                few = 0 if share == 0 else max(round(share * len(places)), 1)
                hidden = places[cubes] < few if way == "deletion" else places[cubes] >= few
                scan = volume.clone()
                replaced = torch.where(torch.from_numpy(hidden), shown[0, 0][inside], scan[0, 0][inside])
                scan[0, 0][inside] = replaced
                with torch.no_grad():
                    logits.append(float(networks[0](scan)[0, LABELS[row]]))
            curves[name] = np.array(logits)
        found = [value[f"{way}_{filling}", str(share)] for share in POINTS]
        assert np.allclose(found, curves["map"], atol=1e-4 * np.abs(curves["map"]).max())
        sign = -1 if way == "deletion" else 1
        gain = sign * (curves["map"] - curves["edges"])[1:-1].mean()
        assert value[f"{way}_gain_{filling}", "edges"] == pytest.approx(gain, abs=1e-4)


def test_new_weights_by_plain_pytorch(panel, lively_run, csv):
    """The map of a network drawn anew by hand: randomizing.py has its own tests; here, which one it is."""
    rows = findings(panel / "out")
    mine = rows[(rows["method"] == "Gradient") & (rows["fold"] == 1)]
    row = dataset.read_csv(csv)["path"].tolist().index(mine["path"].iloc[0])
    network, volume = (
        load_network(lively_run / "state_dict_f1.pth"),
        load_volume(csv.parent / mine["path"].iloc[0]),
    )
    brain = read_values(panel / "maps/LRP/mean_scan.nii.gz") > 0
    own = plain_gradient(network, volume, LABELS[row])[brain]
    cohort = runs.find_run(lively_run, None, None, None).cohort
    scans = [load_volume(cohort.table["file"][i]) for i in runs.calibration_scans(cohort, 1, CALIBRATION)]
    value = mine.set_index(["check", "setting"])["value"]
    settings = {
        ("weights_all_spearman", "all layers, draw 1"): range(7),
        ("weights_output_spearman", "block 0, draw 1"): range(7),
        ("weights_output_spearman", "block 4, draw 1"): [4, 5, 6],
        ("weights_input_spearman", "block 1, draw 1"): [0, 1],
        ("weights_alone_spearman", "hidden, draw 1"): [5],
    }
    for setting, layers in settings.items():
        seed = utils.own_seed(utils.own_seed(0, 1), 1)
        drawn = randomizing.Randomizer(network, scans).randomize(layers, seed)
        other = plain_gradient(drawn, volume, LABELS[row])[brain]
        expected = stats.spearmanr(np.abs(own), np.abs(other)).statistic
        assert value[setting] == pytest.approx(expected, abs=1e-3), setting


def test_maps_are_those_of_the_folder(panel, lively_run, maps):
    """The residuals and empty maps are those that heatmap.py found of the same scans, with its options."""
    rows = findings(panel / "out")
    for method in ("LRP", "Gradient"):
        told = heatmap.read_subjects(maps / method).set_index("path")
        for finding in rows[
            (rows["method"] == method) & rows["check"].isin(["residual", "zero"])
        ].itertuples():
            assert finding.value == pytest.approx(told[finding.check][finding.path], rel=1e-3, nan_ok=True)


def test_patterns_of_the_scans_alone_are_compared_between_folds(panel):
    brain = read_values(panel / "maps/LRP/mean_scan.nii.gz") > 0
    one, other = (np.abs(read_values(panel / f"maps/SVM/map_f{fold}.nii.gz")[brain]) for fold in range(K))
    rows = findings(panel / "out")
    mine = rows[rows["method"] == "SVM"].set_index(["check", "fold", "setting"])["value"]
    assert mine["fold_spearman", 0, "fold 1"] == pytest.approx(
        stats.spearmanr(one, other).statistic, abs=1e-9
    )
    assert mine["fold_spearman", 1, "fold 0"] == mine["fold_spearman", 0, "fold 1"]
    assert len(mine) == 4


def test_scans_are_of_different_subjects_and_both_labels(lively_run):
    cohort = runs.find_run(lively_run, None, None, None).cohort
    for fold, seed in itertools.product(range(K), range(20)):
        chosen = sanity.choose_scans(cohort, fold, 2, seed)
        labels, subjects = cohort.table["label"][chosen], cohort.table["subject"][chosen]
        assert chosen == sorted(set(chosen) & set(cohort.scan_indices(fold, "test")))
        assert sorted(labels) == [0, 1]
        assert subjects.nunique() == 2
        (one,) = sanity.choose_scans(cohort, fold, 1, seed)
        assert cohort.table["label"][one] == (fold % 2)
        every = sanity.choose_scans(cohort, fold, len(cohort.scan_indices(fold, "test")), seed)
        assert every == cohort.scan_indices(fold, "test")
    drawn = {tuple(sanity.choose_scans(cohort, 0, 2, seed)) for seed in range(20)}
    assert len(drawn) > 1
