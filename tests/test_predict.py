"""predict.py: new scans by the networks of a run folder alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cohorts import (
    AFFINE,
    MODEL,
    SHAPE,
    TRAINED,
    K,
    contents,
    load_network,
    load_volume,
    only_error,
    read_table,
    voxels,
    write_csv,
    write_new_scans,
    write_scan,
)
from interruptions import ends_after

import atypical
import classifier_scores
import dataset
import predict
import train_cv

TEMPERATURES = [2.5, 0.4]
SCANS = {"a": 0, "b": 1, "c": 0, "d": 1}  # new ones, and their labels


@pytest.fixture(scope="module")
def here(lively_run, csv, tmp_path_factory) -> Path:
    """A folder with new scans, unlabelled.csv and labelled.csv, and a run alone; read only.

    Nothing is left of what the run was trained on, and its networks have temperatures of their own.
    """
    folder = tmp_path_factory.mktemp("new")
    write_new_scans(folder, SCANS, lively_run)
    set_temperatures(folder / "models", TEMPERATURES)
    return folder


def set_temperatures(run: Path, values: list[float]) -> None:
    table = pd.read_csv(run / "calibration.csv")
    table.loc[: K - 1, "temperature"] = values
    table.to_csv(run / "calibration.csv", index=False)


def set_ranges(run: Path, folds: dict[int, dict[str, tuple[float, float]]]) -> None:
    """What is typical, of every fold, and by the trait: from, to; of the traits that are not named all."""
    rows = []
    for fold in range(K):
        for trait in (*atypical.TRAITS, atypical.ANY):
            low, high = folds.get(fold, {}).get(trait, (-1e9, 1e9))
            about = atypical.TRAITS.get(trait)
            ends = [low if about and about.too_low else None, high if about and about.too_high else None]
            rows.append([fold, trait, *ends, 0.25, 0.75, 6, 0])
    pd.DataFrame(rows, columns=atypical.COLUMNS).to_csv(run / "typical.csv", index=False)


def run_predict(here: Path, outpath: Path, csv: str = "unlabelled.csv", *options: str) -> int:
    where = ["--path", str(here / csv), "--modelpath", str(here / "models"), "--outpath", str(outpath)]
    return predict.main([*where, "--device", "cpu", *options])


@pytest.fixture(scope="module")
def predicted(here, tmp_path_factory) -> Path:
    """What was predicted of the labelled scans; read only."""
    folder = tmp_path_factory.mktemp("predicted") / "out"
    assert run_predict(here, folder, "labelled.csv") == 0
    return folder


@pytest.fixture
def copy(here, tmp_path) -> Path:
    """The scans and the run, to be changed."""
    return Path(shutil.copytree(here, tmp_path / "here"))


def margins(here: Path, file: Path) -> np.ndarray:
    """Logit 1 less logit 0 of a scan by every network, (K,), by plain PyTorch."""
    networks = [load_network(here / f"models/state_dict_f{fold}.pth") for fold in range(K)]
    logits = np.array([network(load_volume(file))[0].tolist() for network in networks])
    return logits[:, 1] - logits[:, 0]


# What is predicted -------------------------------------------------------------------------------


def test_ensemble_is_that_of_plain_pytorch(here, predicted):
    table = read_table(predicted / "predictions.csv")
    members = [f"prob_f{fold}" for fold in range(K)]
    head = ["path", "label", "subject", "prob_1", "predicted", "prob_sd"]
    assert list(table.columns) == [*head, *members, "seen", "atypical", "reason"]
    assert table["path"].tolist() == [f"{name}.nii" for name in SCANS]
    assert table["label"].tolist() == list(SCANS.values())
    for row in table.to_dict("records"):
        odds = margins(here, here / row["path"]) / TEMPERATURES
        expected = 1 / (1 + np.exp(-odds))
        # float32 logits of two implementations
        assert [row[name] for name in members] == pytest.approx(expected, abs=1e-6)
        assert row["prob_1"] == pytest.approx(expected.mean(), abs=1e-6)
        assert row["prob_sd"] == pytest.approx(expected.std(ddof=1), abs=1e-6)
        assert row["predicted"] == int(row["prob_1"] > 0.5)
    assert (table["prob_sd"] > 0).all()  # the networks differ, so that a mix-up of them shows
    assert (table["seen"] == 0).all()


def test_scores(predicted):
    table, metrics = (read_table(predicted / name) for name in ("predictions.csv", "metrics.csv"))
    members = table[[f"prob_f{fold}" for fold in range(K)]].to_numpy()
    label, prob_1 = table["label"].to_numpy(), table["prob_1"].to_numpy()
    expected = classifier_scores.ensemble_table(label, prob_1, members, table["subject"].tolist(), 0)
    assert metrics["network"].tolist() == [str(name) for name in expected["network"]]
    assert np.allclose(
        metrics.iloc[:, 1:], expected.iloc[:, 1:].astype(float), rtol=0, atol=0, equal_nan=True
    )
    assert metrics["brier"][0] == pytest.approx(((prob_1 - label) ** 2).mean())


def test_without_labels(here, predicted, tmp_path, capsys):
    assert run_predict(here, tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "predict.json", "predictions.csv", "network_f0.csv", "network_f1.csv",
    }  # fmt: skip
    table, labelled = (read_table(p / "predictions.csv") for p in (tmp_path / "out", predicted))
    assert "label" not in table
    pd.testing.assert_frame_equal(table, labelled.drop(columns="label"))
    lines = capsys.readouterr().out.splitlines()
    for row in table.to_dict("records"):
        own = [row[f"prob_f{fold}"] for fold in range(K)]
        words = f"{row['path']}: probability of label 1: {row['prob_1']:.3f} (networks {min(own):.3f} to"
        assert [line for line in lines if line.startswith(words)], words


def test_some_labels(here, tmp_path, predicted):
    rows = [("a.nii", 0, "x"), ("b.nii", "", "x"), ("c.nii", 1, "y"), ("d.nii", "", "z")]
    write_csv(
        tmp_path / "some.csv", [(here / path, *rest) for path, *rest in rows], header="path,label,subject"
    )
    assert run_predict(here, tmp_path / "out", str(tmp_path / "some.csv")) == 0
    table = read_table(tmp_path / "out/predictions.csv")
    assert table["label"].fillna(-1).tolist() == [0, -1, 1, -1]
    assert table["subject"].tolist() == ["x", "x", "y", "z"]
    assert table["prob_1"].tolist() == read_table(predicted / "predictions.csv")["prob_1"].tolist()
    assert read_table(tmp_path / "out/metrics.csv")["n"][0] == 2


def test_many_scans_have_no_line_each(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "FEW", 3)
    assert run_predict(here, tmp_path) == 0
    said = capsys.readouterr().out
    assert "a.nii:" not in said
    assert f"4 scans predicted by {K} networks {MODEL}" in said


def test_moved_folder_gives_the_same_bytes(here, predicted, tmp_path):
    """Scans, list and run elsewhere, and called from there."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(here, moved)
    assert run_predict(moved, tmp_path / "out", "labelled.csv") == 0
    there, before = contents(tmp_path / "out"), contents(predicted)
    assert {name: there[name] for name in there if name != "predict.json"} == {
        name: before[name] for name in before if name != "predict.json"
    }
    facts = [json.loads(files["predict.json"]) for files in (there, before)]
    assert [f.pop("csv") != g.pop("csv") for f, g in [facts]] == [True]
    assert [f.pop("modelpath") != g.pop("modelpath") for f, g in [facts]] == [True]
    assert facts[0] == facts[1]


# Scans of the run --------------------------------------------------------------------------------


def test_scan_of_the_run_is_left_to_the_network_that_tested_it(run, csv, tmp_path, capsys):
    shutil.copy(csv.parent / "scans/004.nii", tmp_path / "renamed.nii")
    write_scan(tmp_path / "new.nii", voxels(100))
    write_csv(tmp_path / "new.csv", [("renamed.nii",), ("new.nii",)])
    where = ["--path", str(tmp_path / "new.csv"), "--modelpath", str(run), "--outpath", str(tmp_path / "out")]
    assert predict.main([*where, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("1 of 2 scans are the run's own")
    assert "renamed.nii" in captured.err
    assert "renamed.nii: probability of label 1:" in captured.out
    tested = read_table(run / "predictions.csv").set_index("path").loc["scans/004.nii"]
    own, new = read_table(tmp_path / "out/predictions.csv").to_dict("records")
    assert (own["seen"], new["seen"]) == (1, 0)
    blank = [np.isnan(own[f"prob_f{fold}"]) for fold in range(K)]
    assert blank == [fold != tested["fold"] for fold in range(K)]
    assert np.isnan(own["prob_sd"])
    # of other batches: rounding of float32
    assert own["prob_1"] == pytest.approx(tested["prob_1_calibrated"], abs=1e-6)
    assert not np.isnan([new[f"prob_f{fold}"] for fold in range(K)]).any()


def test_the_run_s_own_list_is_its_test(run, csv, tmp_path):
    """Predicting what the run was tested on gives its tests, and nothing else."""
    where = ["--path", str(csv), "--modelpath", str(run), "--outpath", str(tmp_path), "--device", "cpu"]
    assert predict.main(where) == 0
    table = read_table(tmp_path / "predictions.csv").set_index("path")
    tested = read_table(run / "predictions.csv").set_index("path").loc[table.index]
    assert (table["seen"] == 1).all()
    assert table["prob_1"].to_numpy() == pytest.approx(tested["prob_1_calibrated"].to_numpy(), abs=1e-6)


# Atypical scans ----------------------------------------------------------------------------------


def test_atypical_is_what_most_networks_find_so(copy, tmp_path):
    """Of two networks one does not suffice; bounds are exact."""
    mean = dataset.nifti.load_map(copy / "models/mean_train_f0.nii.gz")
    traits = atypical.Head(mean, AFFINE).traits(dataset.read_scan(copy / "a.nii"))
    above, below = np.nextafter(traits["q50"], 1), np.nextafter(traits["q50"], 0)
    for folds, marked in (
        ({0: {"q50": (above, 9)}}, False),
        ({0: {"q50": (above, 9)}, 1: {"q50": (above, 9)}}, True),
        ({0: {"q50": (-9, below)}, 1: {"q50": (-9, below)}}, True),
        ({0: {"q50": (traits["q50"],) * 2}, 1: {"q50": (traits["q50"],) * 2}}, False),
    ):
        set_ranges(copy / "models", folds)
        assert run_predict(copy, tmp_path / "out", "unlabelled.csv", "--overwrite") == 0
        row = read_table(tmp_path / "out/predictions.csv").iloc[0]
        assert row["atypical"] == int(marked)
    assert not row["reason"] or np.isnan(row["reason"])


def test_reason_is_said(copy, tmp_path, capsys):
    far = {"offset": (-9, -8), "volume": (1e8, 1e9)}
    set_ranges(copy / "models", dict.fromkeys(range(K), far))
    assert run_predict(copy, tmp_path / "out") == 0
    reasons = pd.read_csv(tmp_path / "out/predictions.csv")["reason"]
    for reason in reasons:
        assert reason.startswith("shifted: mm between its centre and theirs ")
        assert ", theirs 0.25-0.75; part of the head is missing" in reason
    assert f"ATYPICAL: {reasons[0]}" in capsys.readouterr().out


def test_few_training_scans_do_not_tell(here, predicted):
    """The run has eight; the column is blank rather than 0."""
    assert len(read_table(here / "models/folds.csv")) == 12 * K
    assert read_table(predicted / "predictions.csv")["atypical"].isna().all()


# Going on, and several at once -------------------------------------------------------------------


def outcome(folder: Path) -> dict[str, bytes]:
    """All files but the record, which names places."""
    return {name: content for name, content in contents(folder).items() if name != "predict.json"}


def test_second_call_keeps_everything(here, predicted, tmp_path, capsys):
    folder = Path(shutil.copytree(predicted, tmp_path / "out"))
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert run_predict(here, folder, "labelled.csv") == 0
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert "fold 1: finished before, kept" in capsys.readouterr().out


@pytest.mark.parametrize("call", [1, 3, 7])
def test_interrupted_predictions_go_on(here, predicted, tmp_path, monkeypatch, call):
    """Stopped by a signal after a scan, or by Ctrl-C at once: what was saved is not predicted again."""
    monkeypatch.setattr(predict, "SAVE_EVERY", 0)
    with monkeypatch.context() as patch:
        ends_after(patch, predict.Member, "predict", call)
        assert run_predict(here, tmp_path, "labelled.csv") == 130
    honest, looked = predict.Member.predict, list[str]()

    def predict_and_note(self, *scan):
        looked.append(scan[-1])
        return honest(self, *scan)

    monkeypatch.setattr(predict.Member, "predict", predict_and_note)
    assert run_predict(here, tmp_path, "labelled.csv") == 0
    assert outcome(tmp_path) == outcome(predicted)
    assert len(looked) == K * (len(SCANS) - (call - 1) // K)


def test_parts_and_folds_make_what_one_call_makes(here, predicted, tmp_path, capsys):
    for options in (["--part", "2/3"], ["--part", "1/3", "--run-folds", "1"], ["--part", "1/3"]):
        assert run_predict(here, tmp_path, "labelled.csv", *options) == 0
        assert not (tmp_path / "predictions.csv").exists()
    assert "not predicted yet: by the networks of folds [0, 1]" in capsys.readouterr().out
    assert predict.main(["--status", "--outpath", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "fold 0, part 3 of 3: open" in said
    assert "fold 0, part 1 of 3: finished" in said
    assert run_predict(here, tmp_path, "labelled.csv", "--part", "3/3") == 0
    assert outcome(tmp_path) == outcome(predicted)


def test_folds_one_by_one(here, predicted, tmp_path):
    for fold in "10":
        assert run_predict(here, tmp_path, "labelled.csv", "--run-folds", fold) == 0
    assert outcome(tmp_path) == outcome(predicted)


def test_other_scans_or_networks_are_refused(copy, predicted, tmp_path, capsys):
    folder = Path(shutil.copytree(predicted, tmp_path / "out"))
    changes: list[Callable[[], object]] = [
        lambda: write_scan(copy / "a.nii", voxels(7)),
        lambda: set_temperatures(copy / "models", [1.0, 1.0]),
        lambda: set_ranges(copy / "models", {}),
    ]
    before = contents(folder)
    for change, words in zip(changes, ("scans_sha256", "temperatures", "typical_sha256"), strict=True):
        change()
        assert run_predict(copy, folder, "labelled.csv") == 2
        line = only_error(capsys.readouterr().err)
        assert f"{words} (" in line
        assert "--overwrite" in line
    assert contents(folder) == before
    assert run_predict(copy, folder, "labelled.csv", "--overwrite") == 0
    assert outcome(folder).keys() == outcome(predicted).keys()


def test_scores_of_another_list_do_not_stay(here, predicted, tmp_path, capsys):
    folder = Path(shutil.copytree(predicted, tmp_path / "out"))
    assert run_predict(here, folder, "unlabelled.csv", "--overwrite") == 0
    assert not (folder / "metrics.csv").exists()
    assert "AUC" not in capsys.readouterr().out


def test_network_of_changed_weights_predicts_again(copy, predicted, tmp_path):
    folder = Path(shutil.copytree(predicted, tmp_path / "out"))
    shutil.copy(copy / "models/state_dict_f0.pth", copy / "models/state_dict_f1.pth")
    assert run_predict(copy, folder, "labelled.csv") == 0
    table = read_table(folder / "predictions.csv")
    odds = np.log(table["prob_f1"] / (1 - table["prob_f1"])) * TEMPERATURES[1]
    same = np.log(table["prob_f0"] / (1 - table["prob_f0"])) * TEMPERATURES[0]
    assert odds.to_numpy() == pytest.approx(same.to_numpy(), abs=1e-5)


def test_damaged_predictions_of_a_network_are_one_line(here, predicted, tmp_path, capsys):
    for change in (
        lambda text: text[:-4],
        lambda text: text.replace("a.nii", "x.nii"),
        lambda text: text.replace("path", "file"),
        lambda text: "",
    ):
        folder = Path(shutil.copytree(predicted, tmp_path / "out", dirs_exist_ok=True))
        file = folder / "network_f1.csv"
        file.write_text(change((predicted / "network_f1.csv").read_text()))
        assert run_predict(here, folder, "labelled.csv") == 2
        assert "network_f1.csv" in only_error(capsys.readouterr().err)


# Other inputs ------------------------------------------------------------------------------------


def test_resampled_scan_is_what_nilearn_makes_of_it(here, tmp_path):
    from nilearn.image import resample_img

    affine = np.array([[2, 0, 0, -75], [0, 2, 0, -95], [0, 0, 2, -65], [0, 0, 0, 1.0]])
    shape = (80, 110, 70)
    values = np.zeros(shape, np.float32)
    values[10:-10, 10:-10, 10:-10] = np.random.default_rng(0).random((60, 90, 50), np.float32) + 0.5
    write_scan(tmp_path / "far.nii", values, affine)
    image = dataset.nifti.nib.load(tmp_path / "far.nii")
    moved = resample_img(image, AFFINE, SHAPE, interpolation="linear", force_resample=True, copy_header=True)
    write_scan(tmp_path / "near.nii", np.asarray(moved.dataobj, np.float32))
    for name, options in (("far", ["--resample"]), ("near", [])):
        write_csv(tmp_path / f"{name}.csv", [(f"{name}.nii",)])
        assert run_predict(here, tmp_path / name, str(tmp_path / f"{name}.csv"), *options) == 0
    far, near = (read_table(tmp_path / name / "predictions.csv") for name in ("far", "near"))
    assert far["prob_1"][0] == pytest.approx(near["prob_1"][0], abs=1e-6)
    assert json.loads((tmp_path / "far/predict.json").read_text())["resample"] is True


def test_published_checkpoints(here, tmp_path, capsys):
    """Nothing is known of them: no temperature, no scan that was seen, nothing typical."""
    (tmp_path / "models").mkdir()
    for fold in range(K):
        shutil.copy(here / f"models/state_dict_f{fold}.pth", tmp_path / "models")
    where = ["--path", str(here / "unlabelled.csv"), "--modelpath", str(tmp_path / "models")]
    where += ["--model", MODEL, "--outpath", str(tmp_path / "out"), "--device", "cpu"]
    assert predict.main(where) == 0
    assert "not calibrated" in capsys.readouterr().out
    table = read_table(tmp_path / "out/predictions.csv")
    expected = [(1 / (1 + np.exp(-margins(here, here / path)))).mean() for path in table["path"]]
    assert table["prob_1"].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert table[["seen", "atypical", "reason"]].replace("", np.nan).isna().all(axis=None)


def test_run_of_an_earlier_version_gets_what_it_lacks(run_copy, csv, here, tmp_path, capsys):
    """The same call of train_cv.py writes it, and trains nothing."""
    new = ("calibration.csv", "scans.csv", "typical.csv", "mean_train_f0.nii.gz", "mean_controls_f1.nii.gz")
    before = contents(run_copy)
    for name in new:
        (run_copy / name).unlink()
    where = ["--path", str(here / "unlabelled.csv"), "--modelpath", str(run_copy), "--device", "cpu"]
    assert predict.main([*where, "--outpath", str(tmp_path / "out")]) == 2
    assert "train_cv.py, called as before, keeps the networks" in only_error(capsys.readouterr().err)
    trained = {p.name: p.stat().st_mtime_ns for p in run_copy.glob("state_dict*")}
    assert train_cv.main(["--path", str(csv), "--outpath", str(run_copy), *TRAINED]) == 0
    assert {p.name: p.stat().st_mtime_ns for p in run_copy.glob("state_dict*")} == trained
    after = contents(run_copy)
    assert {name: after[name] for name in new} == {name: before[name] for name in new}
    assert predict.main([*where, "--outpath", str(tmp_path / "out")]) == 0
