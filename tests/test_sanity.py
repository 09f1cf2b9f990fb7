"""sanity.py: what is written, which scans, going on, folds one by one, floors, a second run, mistakes.

The measures are tested in test_checking.py.
"""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cohorts import (
    MODEL,
    SUBJECTS,
    TRAINED,
    K,
    contents,
    load_volume,
    only_error,
    read_values,
    write_scan,
)
from interruptions import ends_after, interrupt
from scipy import stats

import heatmap
import runs
import sanity
import svm
import train_cv
import training
from internals import storage
from methods import BASELINE, METHODS, STEPS, Method

QUICK = ["--scans-per-fold", "2", "--repeats", "1", "--device", "cpu", "--orders"]
WRITTEN = {"sanity.json", "sanity_f0.csv", "sanity_f1.csv", *sanity.FILES.summary}
pytestmark = pytest.mark.usefixtures("few_points")


@pytest.fixture(scope="module")
def some_maps(maps, lively_run, tmp_path_factory) -> Path:
    """Maps of Gradient, their floor, and an SVM's patterns; read only.

    Their mean scan is above 0 in a block alone, which is the brain then: a whole head takes long.
    """
    folder = tmp_path_factory.mktemp("maps")
    for name in ("Gradient", "Gradient-random"):
        ignored = shutil.ignore_patterns("subjects")
        shutil.copytree(maps / "Gradient", folder / name, ignore=ignored)
    assert svm.main(["--modelpath", str(lively_run), "--outpath", str(folder), "--C", "1"]) == 0
    for file in folder.glob("*/mean_scan.nii.gz"):
        mean = read_values(file)
        mean[:20], mean[50:], mean[:, :28], mean[:, 56:], mean[..., :40], mean[..., 70:] = 0, 0, 0, 0, 0, 0
        write_scan(file, mean.astype(np.float32))
    return folder


def check(maps: Path, modelpath: Path, outpath: Path, *options: str) -> int:
    return sanity.main(
        ["--maps", str(maps), "--modelpath", str(modelpath), "--outpath", str(outpath), *QUICK, *options]
    )


@pytest.fixture(scope="module")
def done(some_maps, lively_run, tmp_path_factory, few_points) -> Path:
    """The folder of everything; read only."""
    folder = tmp_path_factory.mktemp("out")
    assert check(some_maps, lively_run, folder) == 0
    return folder


# What is written ---------------------------------------------------------------------------------


def test_files(done, lively_run, some_maps):
    assert set(contents(done)) == WRITTEN
    record = json.loads((done / "sanity.json").read_text())
    assert record["finished"] == [0, 1, "summary"]
    assert (record["methods"], record["orders"], record["repeats"]) == (["Gradient", "SVM"], [], 1)
    rows = sanity.read_all(done, K)
    assert set(rows["method"]) == {"Gradient", "SVM", "edges", "random"}
    pd.testing.assert_frame_equal(sanity.read_findings(done / "sanity.csv"), rows)
    summary = pd.read_csv(done / "sanity_summary.csv")
    assert summary["method"].tolist() == ["Gradient", "SVM", "edges"]
    cohort = runs.find_run(lively_run, None, None, None).cohort
    for fold, part in rows[rows["scan"] != ""].groupby("fold"):
        chosen = sanity.choose_scans(cohort, int(fold), 2, seed=0)
        assert part["scan"].unique().tolist() == cohort.table["path"][chosen].tolist()
        assert part["subject"].unique().tolist() == [SUBJECTS[row] for row in chosen]
    assert (rows["check"] == "weights_all_spearman").sum() == 4
    assert not rows["check"].str.contains("weights_(?:output|input|alone)").any()


def test_summary_is_printed(done, some_maps, lively_run, capsys):
    before = contents(done)
    assert check(some_maps, lively_run, done) == 0
    out = capsys.readouterr().out
    assert "left out, as floors for others: Gradient-random" in out
    assert f"{done}: done before, kept" in out
    lines = [line.split() for line in out.splitlines()]
    rho = pd.read_csv(done / "sanity_summary.csv").set_index("method").loc["Gradient", "weights_rho"]
    (row,) = (line for line in lines if line[:1] == ["Gradient"])
    assert row[1] == f"{rho:.2f}"
    assert contents(done) == before


def test_maps_are_those_of_the_folder(lively_run, tmp_path, monkeypatch, csv):
    """Made with the options, seeds, logits and baselines that map.json says, of the very scans."""
    seen: list[tuple] = []

    def toy(model, volume, target, steps, baseline, seeds):
        sums = (round(float(values.double().sum()), 6) for values in (volume, baseline))
        seen.append((*sums, int(target), steps, tuple(seeds)))
        return volume - baseline

    toys = Method(toy, (STEPS, BASELINE), ("baseline", "seeds"))
    monkeypatch.setitem(METHODS, "TOY", toys)
    options = ["--method", "TOY", "--steps", "7", "--baseline", "controls", "--target", "1", "--seed", "5"]
    where = ["--modelpath", str(lively_run), "--outpath", str(tmp_path), "--device", "cpu"]
    assert heatmap.main([*options, *where]) == 0
    made = set(seen)
    seen.clear()
    assert check(tmp_path, lively_run, tmp_path) == 0
    rows = sanity.read_all(tmp_path, K)
    scans = rows.loc[rows["scan"] != "", "scan"].unique()
    sums = {round(float(load_volume(csv.parent / path).double().sum()), 6) for path in scans}
    assert sums <= {volume for volume, *_ in seen}
    own = {call for call in seen if call in made}
    assert {call[0] for call in own} >= sums  # by the scan's own fold, just as heatmap.py called it
    assert {call[2:4] for call in seen} == {(1, 7)}
    assert {call[4] for call in seen} <= {call[4] for call in made}


def test_patterns_of_the_scans_alone_are_compared_between_folds(done, some_maps):
    brain = read_values(some_maps / "Gradient/mean_scan.nii.gz") > 0
    one, other = (np.abs(read_values(some_maps / f"SVM/map_f{fold}.nii.gz")[brain]) for fold in range(K))
    rows = sanity.read_all(done, K)
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
        assert cohort.table["label"][one] == fold % 2
        every = sanity.choose_scans(cohort, fold, len(cohort.scan_indices(fold, "test")), seed)
        assert every == cohort.scan_indices(fold, "test")
    assert len({tuple(sanity.choose_scans(cohort, 0, 2, seed)) for seed in range(20)}) > 1


# Going on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", [1, 3, 4], ids=["after a scan", "after the fold's", "after the other's first"]
)
def test_interrupted_panel_goes_on_with_the_next_scan(
    call, done, some_maps, lively_run, tmp_path, monkeypatch
):
    """Ctrl-C after the n-th table, each scan's, then the fold's: the rest is made, the same bytes."""
    with monkeypatch.context() as patch:
        ends_after(patch, storage, "write_csv", call)
        assert check(some_maps, lively_run, tmp_path) == 130
    explained: list[int] = []
    honest = sanity.Panel._check_scan

    def counted(self, fold, row, *rest):
        explained.append(row)
        return honest(self, fold, row, *rest)

    monkeypatch.setattr(sanity.Panel, "_check_scan", counted)
    assert check(some_maps, lively_run, tmp_path) == 0
    assert len(explained) == {1: 3, 3: 2, 4: 1}[call]
    found, expected = contents(tmp_path), contents(done)
    assert {name: found[name] for name in WRITTEN} == {name: expected[name] for name in WRITTEN}
    assert set(found) == WRITTEN


def test_stopped_panel_finishes_its_scan(done, some_maps, lively_run, tmp_path, monkeypatch):
    honest = sanity.Panel._check_scan

    def stopped(self, *args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return honest(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(sanity.Panel, "_check_scan", stopped)
        assert check(some_maps, lively_run, tmp_path) == 138
    assert len(set(sanity.read_findings(tmp_path / "findings_f0.csv")["scan"])) == 1
    assert check(some_maps, lively_run, tmp_path) == 0
    assert same(tmp_path, done)


def test_parts_make_what_one_process_makes(done, some_maps, lively_run, tmp_path, capsys):
    """Byte for byte; the third of three has no scan to check."""
    for part in (3, 1, 2):
        assert check(some_maps, lively_run, tmp_path, "--part", f"{part}/3") == 0
    assert same(tmp_path, done)
    capsys.readouterr()
    assert sanity.main(["--status", "--maps", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "fold 0: finished\nfold 1: finished\nsummary: finished\n"


def same(folder: Path, done: Path) -> bool:
    """The same files, byte for byte, but for the order of the record's keys."""
    found, expected = dict(contents(folder)), dict(contents(done))
    return (
        json.loads(found.pop("sanity.json")) == json.loads(expected.pop("sanity.json")) and found == expected
    )


def test_fold_by_fold(done, some_maps, lively_run, tmp_path, capsys):
    assert check(some_maps, lively_run, tmp_path, "--run-folds", "1") == 0
    assert "not checked yet: folds [0]" in capsys.readouterr().out
    assert set(contents(tmp_path)) == {"sanity.json", "sanity_f1.csv"}
    assert check(some_maps, lively_run, tmp_path, "--run-folds", "0") == 0
    assert contents(tmp_path) == contents(done)


def test_other_maps_or_networks_are_another_panel(done, some_maps, lively_run, tmp_path, capsys):
    shutil.copytree(done, tmp_path / "out")
    shutil.copytree(some_maps, tmp_path / "maps")
    shutil.rmtree(tmp_path / "maps/SVM")
    assert check(tmp_path / "maps", lively_run, tmp_path / "out") == 2
    assert "methods (['Gradient', 'SVM'] there, ['Gradient'] now)" in only_error(capsys.readouterr().err)
    shutil.copytree(some_maps / "SVM", tmp_path / "maps/SVM")
    shutil.copy(some_maps / "SVM/map_f0.nii.gz", tmp_path / "maps/SVM/map_f1.nii.gz")
    assert check(tmp_path / "maps", lively_run, tmp_path / "out") == 2
    assert "maps of SVM (" in only_error(capsys.readouterr().err)
    assert contents(tmp_path / "out") == contents(done)


def test_findings_that_were_edited_are_refused(done, some_maps, lively_run, tmp_path, capsys):
    shutil.copytree(done, tmp_path / "out")
    file = tmp_path / "out/sanity_f0.csv"
    file.write_text(file.read_text().replace("deletion", "insertion", 1))
    before = contents(tmp_path / "out")
    assert check(some_maps, lively_run, tmp_path / "out") == 2
    assert f"{file}: is not as it was written; --overwrite" in only_error(capsys.readouterr().err)
    assert contents(tmp_path / "out") == before


# A second run ------------------------------------------------------------------------------------


def test_second_run(done, some_maps, lively_run, csv, tmp_path, capsys):
    second = tmp_path / "second"
    assert train_cv.main(["--path", str(csv), "--outpath", str(second), *TRAINED, "--seed", "4"]) == 0
    assert check(some_maps, lively_run, tmp_path / "out", "--second-run", str(second)) == 0
    rows, before = sanity.read_all(tmp_path / "out", K), sanity.read_all(done, K)
    new = rows["check"].str.startswith("seed_")
    pd.testing.assert_frame_equal(rows[~new].reset_index(drop=True), before)
    cohort = runs.find_run(second, None, None, None).cohort
    for row in rows[new].itertuples():
        scan = cohort.table.index[cohort.table["path"] == row.scan].item()
        fold = next(fold for fold in range(K) if scan in cohort.scan_indices(fold, "test"))
        assert row.setting == f"fold {fold} of the second run"
    assert new.sum() == 8
    summary = pd.read_csv(tmp_path / "out/sanity_summary.csv").set_index("method")
    assert summary.loc["Gradient", ["seed_spearman", "seed_dice5"]].notna().all()

    capsys.readouterr()
    for other, words in {
        lively_run: "has the same networks as",
        tmp_path / "out": "holds no run.json",
        begun(csv, tmp_path, "--permute-labels"): f"is of {MODEL} on permuted labels, ",
        begun(csv, tmp_path, "--model", "modelB1"): "is of modelB1, ",
    }.items():
        capsys.readouterr()
        assert check(some_maps, lively_run, tmp_path / "new", "--second-run", str(other)) == 2
        assert f"--second-run {other}: {words}" in only_error(capsys.readouterr().err)
        assert not (tmp_path / "new").exists()


def begun(csv: Path, folder: Path, *options: str) -> Path:
    """Another run of the cohort, interrupted in its first epoch: its record is there."""
    outpath = folder / options[0].strip("-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_epoch", interrupt)
        assert train_cv.main(["--path", str(csv), "--outpath", str(outpath), *TRAINED, *options]) == 130
    return outpath
