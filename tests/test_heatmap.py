"""heatmap.py: the maps and tables of every method, going on, published checkpoints, and mistakes."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cohorts import (
    AFFINE,
    LABELS,
    MODEL,
    SHAPE,
    contents,
    load_network,
    load_volume,
    only_error,
    read_nifti,
    read_values,
    voxels,
    write_cohort,
    write_csv,
    write_scan,
)

import classifier_scores
import dataset
import heatmap
import models
import runs
import train_cv
import utils
from ggc import guided_gradcam
from ig import integrated_gradients
from internals import devices, storage
from internals.errors import InputError
from lrp import lrp

K = 2
METHODS = ["LRP", "IG", "GGC"]
STEPS = 2
COLUMNS = ["fold", "path", "label", "subject", "predicted", "target", "prob_target", "sum", "residual"]
COLUMNS += ["zero"]
FAST = ["--device", "cpu", "--steps", str(STEPS)]
TRAINED = ["--model", MODEL, "--device", "cpu", "--fold", str(K), "--batch", "2", "--lr", "1e-3"]
TRAINED += ["--epochs", "1", "--val-fraction", "0.34", "--seed", "1"]


@pytest.fixture(scope="module")
def csv(tmp_path_factory) -> Path:
    """Twelve scans and their CSV; read only."""
    return write_cohort(tmp_path_factory.mktemp("cohort"))


def lively_weights(csv: Path, seed: int) -> dict[str, torch.Tensor]:
    """An untrained network whose BatchNorm knows the scans, so that no scan's activations are all zero.

    (After an epoch on eight scans a network this narrow may answer nothing but its last bias.)
    """
    torch.manual_seed(seed)
    network = models.build_model(MODEL, SHAPE)
    for block in network.blocks():
        block.norm.momentum = 1.0  # the statistics of the scans that follow, and nothing else
        torch.nn.init.constant_(block.norm.bias, 2.0)
    with torch.no_grad():
        network(torch.cat([load_volume(csv.parent / f"scans/{i:03d}.nii") for i in (0, 1, 2)]))
    return network.state_dict()


@pytest.fixture(scope="module")
def run(csv, tmp_path_factory) -> Path:
    """A training run of one epoch, its weights replaced by lively ones; read only."""
    folder = tmp_path_factory.mktemp("run") / "models"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_scores, "DRAWS", 10)  # for speed; nothing here reads the intervals
        assert train_cv.main(["--path", str(csv), "--outpath", str(folder), *TRAINED]) == 0
    for fold in range(K):
        torch.save(lively_weights(csv, seed=fold), folder / f"state_dict_f{fold}.pth")
    return folder


def explain(method: str, run: Path, outpath: Path, *options: str) -> int:
    argv = ["--method", method, "--modelpath", str(run), "--outpath", str(outpath), *FAST, *options]
    return heatmap.main(argv)


@pytest.fixture(scope="module")
def maps(run, tmp_path_factory) -> Path:
    """Every method's maps of every scan, one after the other into one folder; read only."""
    folder = tmp_path_factory.mktemp("maps")
    for method in METHODS:
        assert explain(method, run, folder, "--save-subjects") == 0
    return folder


def read_table(path: Path) -> pd.DataFrame:
    """A CSV as it stands: "NA" is a subject, "007" is not 7; numbers are numbers, blanks NaN."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column in table.columns.difference(["path", "subject", "role"]):
        table[column] = pd.to_numeric(table[column])
    return table


def subject_maps(folder: Path, table: pd.DataFrame, fold: int) -> list[np.ndarray]:
    """The saved maps of a fold's scans, in the order of subjects.csv."""
    files = sorted((folder / "subjects").glob(f"f{fold}_*.nii.gz"))
    stems = [Path(path).stem for path in table.loc[table["fold"] == fold, "path"]]
    assert [file.name.split("_", 2)[2] for file in files] == [f"{stem}.nii.gz" for stem in stems]
    return [read_values(file) for file in files]


def equal_in_float32(written: np.ndarray, mean: np.ndarray) -> bool:
    """Whether a map holds a mean that was taken in float64 and rounded to float32 on its way to disk."""
    return np.allclose(written, mean, rtol=2**-23, atol=1e-12 * np.abs(mean).max())


def logits_of(run: Path, csv: Path, table: pd.DataFrame) -> np.ndarray:
    """Logits (N, 2) of a table's scans, each by its own fold's weights, one at a time."""
    networks = {fold: load_network(run / f"state_dict_f{fold}.pth") for fold in set(table["fold"])}
    with torch.no_grad():
        rows = [
            networks[fold](load_volume(csv.parent / path))
            for fold, path in zip(table["fold"], table["path"], strict=True)
        ]
    return torch.cat(rows).double().numpy()


# The maps ----------------------------------------------------------------------------------------


def test_methods_are_the_specified_ones():
    expected = {"LRP": lrp, "IG": integrated_gradients, "GGC": guided_gradcam}
    assert expected == heatmap.METHODS


def test_defaults_are_the_specified_ones():
    args = vars(heatmap.get_parser().parse_args(["--method", "IG"]))
    assert args == {
        "method": "IG",
        "path": None,
        "modelpath": Path("models"),
        "model": None,
        "outpath": Path("heatmaps"),
        "device": "auto",
        "fold": None,
        "batch": 1,
        "run_folds": None,
        "target": "label",
        "weights": "trained",
        "seed": 0,
        "steps": 100,
        "baseline": "zero",
        "beta": 0.5,
        "save_subjects": False,
        "overwrite": False,
    }


@pytest.mark.parametrize("method", METHODS)
def test_these_files_and_no_others(maps, method):
    names = {"map_f0.nii.gz", "map_f1.nii.gz", "map_all.nii.gz", "map_all.png", "subjects.csv", "map.json"}
    names.add("mean_scan.nii.gz")
    found = set(contents(maps / method))
    assert {name for name in found if not name.startswith("subjects/")} == names
    assert len(found) == len(names) + 12
    assert (maps / method / "map_all.png").read_bytes().startswith(b"\x89PNG")


def test_each_method_has_its_own_folder(maps):
    assert {path.name for path in maps.iterdir()} == set(METHODS)
    assert len({(maps / method / "map_all.nii.gz").read_bytes() for method in METHODS}) == 3


@pytest.mark.parametrize("method", METHODS)
def test_maps_lie_where_the_scans_lie(maps, csv, method):
    scan = read_nifti(csv.parent / "scans" / "000.nii")
    files = sorted((maps / method).rglob("*.nii.gz"))
    assert len(files) == 16
    for file in files:
        found = read_nifti(file)
        assert found.shape == SHAPE
        assert np.array_equal(found.affine, AFFINE)
        assert found.get_data_dtype() == np.float32
        for name in ("sform_code", "qform_code", "pixdim", "srow_x", "quatern_b", "xyzt_units"):
            assert np.array_equal(found.header[name], scan.header[name]), name
        assert np.isfinite(read_values(file)).all()


@pytest.mark.parametrize("method", METHODS)
def test_fold_map_is_the_mean_of_its_subjects_and_map_all_of_the_folds(maps, method):
    table = read_table(maps / method / "subjects.csv")
    folds = [read_values(maps / method / f"map_f{fold}.nii.gz") for fold in range(K)]
    sizes = [len(table[table["fold"] == fold]) for fold in range(K)]
    assert sizes[0] != sizes[1]  # so the mean over folds is not the mean over scans
    for fold in range(K):
        mean = np.mean(subject_maps(maps / method, table, fold), axis=0)
        assert equal_in_float32(folds[fold], mean)
        assert np.ptp(mean) > 0
    assert equal_in_float32(read_values(maps / method / "map_all.nii.gz"), (folds[0] + folds[1]) / 2)


OPTIONS: dict[str, dict[str, float]] = {"LRP": {"beta": 0.5}, "IG": {"steps": STEPS}, "GGC": {}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fold", range(K))
def test_map_is_the_methods_own_answer(maps, run, csv, method, fold):
    table = read_table(maps / method / "subjects.csv")
    test = table[table["fold"] == fold].iloc[-1]
    network = load_network(run / f"state_dict_f{fold}.pth")
    direct = heatmap.METHODS[method](
        network,
        load_volume(csv.parent / str(test["path"])),
        torch.tensor([test["label"]]),
        **OPTIONS[method],
    )
    saved = subject_maps(maps / method, table, fold)[-1]
    # the same float32 operations on the same numbers; threads may still sum in another order
    assert np.allclose(saved, direct[0, 0].numpy(), rtol=1e-5, atol=1e-6 * np.abs(saved).max())


@pytest.mark.parametrize("method", METHODS)
def test_subjects_table(maps, run, csv, method):
    table = read_table(maps / method / "subjects.csv")
    folds = read_table(run / "folds.csv")
    assert list(table.columns) == COLUMNS
    tests = folds[folds["role"] == "test"]
    identity = ["fold", "path", "label", "subject"]
    assert table[identity].to_numpy().tolist() == tests[identity].to_numpy().tolist()
    assert table["target"].tolist() == table["label"].tolist()
    logits = logits_of(run, csv, table)
    assert table["predicted"].tolist() == logits.argmax(1).tolist()
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    picked = np.arange(12), table["target"].to_numpy()
    assert np.allclose(table["prob_target"], probability[picked], rtol=0, atol=1e-6)  # float32 logits
    files = [subject_maps(maps / method, table, fold) for fold in range(K)]
    sums = np.array([values.sum() for fold in files for values in fold])
    size = max(np.abs(values).sum() for fold in files for values in fold)
    assert np.allclose(table["sum"], sums, rtol=0, atol=1e-12 * size)  # float64 sums of the same voxels


def check_residual(table: pd.DataFrame, wanted: np.ndarray) -> None:
    """|sum - wanted| / |wanted|, where `wanted` comes from float32 logits known to about 1e-6."""
    residual = np.abs(table["sum"] - wanted) / np.abs(wanted)
    assert np.allclose(table["residual"], residual, rtol=1e-4, atol=2e-6 / np.abs(wanted).min())


def test_residual_of_lrp_is_relative_to_the_logit(maps, run, csv):
    table = read_table(maps / "LRP" / "subjects.csv")
    check_residual(table, logits_of(run, csv, table)[np.arange(12), table["target"]])


def test_residual_of_ig_is_relative_to_the_rise_over_a_blank_image(maps, run, csv):
    table = read_table(maps / "IG" / "subjects.csv")
    networks = [load_network(run / f"state_dict_f{fold}.pth") for fold in range(K)]
    with torch.no_grad():
        blank = np.stack([net(torch.zeros(1, 1, *SHAPE)).double().numpy()[0] for net in networks])
    rise = logits_of(run, csv, table) - blank[table["fold"]]
    check_residual(table, rise[np.arange(12), table["target"]])


def test_ggc_has_no_residual(maps):
    assert read_table(maps / "GGC" / "subjects.csv")["residual"].isna().all()


@pytest.mark.parametrize("method", METHODS)
def test_record(maps, run, csv, method):
    record = json.loads((maps / method / "map.json").read_text())
    assert record["method"] == method
    assert record["options"].items() >= {"target": "label", **OPTIONS[method]}.items()
    assert record["modelpath"] == str(run.resolve())
    assert record["csv_sha256"] == storage.sha256(csv)
    assert record["versions"] == storage.versions()
    assert record["device_per_fold"] == {str(f): devices.describe(torch.device("cpu")) for f in range(K)}
    assert "calibration_scans_per_fold" not in record
    assert record["weights_sha256"] == {
        str(f): storage.sha256(run / f"state_dict_f{f}.pth") for f in range(K)
    }


def test_maps_of_subjects_are_written_on_request_only(run, tmp_path):
    assert explain("LRP", run, tmp_path, "--run-folds", "0") == 0
    assert set(contents(tmp_path / "LRP")) == {"map_f0.nii.gz", "subjects.csv", "map.json"}


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["predicted", "0", "1"])
def test_target(run, csv, tmp_path, rule):
    options = ["--target", rule, "--run-folds", "1", "--save-subjects"]
    assert explain("LRP", run, tmp_path, *options) == 0
    table = read_table(tmp_path / "LRP" / "subjects.csv")
    logits = logits_of(run, csv, table)
    wanted = logits.argmax(1) if rule == "predicted" else np.full(len(table), int(rule))
    assert table["target"].tolist() == wanted.tolist()
    network = load_network(run / "state_dict_f1.pth")
    direct = lrp(network, load_volume(csv.parent / table["path"][0]), torch.tensor(wanted[:1]))
    saved = subject_maps(tmp_path / "LRP", table, 1)[0]
    assert np.allclose(saved, direct[0, 0].numpy(), rtol=1e-5, atol=1e-6 * np.abs(saved).max())
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probability = (shifted / shifted.sum(1, keepdims=True))[np.arange(len(table)), wanted]
    assert np.allclose(table["prob_target"], probability, rtol=0, atol=1e-6)  # float32 logits


def test_beta(maps, run, csv, tmp_path):
    assert explain("LRP", run, tmp_path, "--beta", "0", "--run-folds", "0", "--save-subjects") == 0
    table = read_table(tmp_path / "LRP" / "subjects.csv")
    network = load_network(run / "state_dict_f0.pth")
    target = torch.tensor(table["label"][:1].tolist())
    direct = lrp(network, load_volume(csv.parent / table["path"][0]), target, beta=0.0)[0, 0].numpy()
    saved = subject_maps(tmp_path / "LRP", table, 0)[0]
    assert np.allclose(saved, direct, rtol=1e-5, atol=1e-6 * np.abs(saved).max())
    assert not np.allclose(saved, subject_maps(maps / "LRP", table, 0)[0], rtol=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_batch_does_not_change_the_maps(maps, run, tmp_path, method):
    assert explain(method, run, tmp_path, "--batch", "2", "--run-folds", "0") == 0
    one, two = (read_values(folder / method / "map_f0.nii.gz") for folder in (maps, tmp_path))
    # float32 in another order; where the two largest voxels of a pooling window differ by a rounding
    # the other one may win, which changes the map within that unit's field of view
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.9999
    assert abs(one - two).sum() < 1e-2 * abs(one).sum()
    first, second = (read_table(folder / method / "subjects.csv") for folder in (maps, tmp_path))
    first = first[first["fold"] == 0]
    exact = ["fold", "path", "label", "subject", "predicted", "target"]
    assert first[exact].to_numpy().tolist() == second[exact].to_numpy().tolist()
    assert np.allclose(first["prob_target"], second["prob_target"], rtol=0, atol=1e-6)
    assert np.allclose(first["sum"], second["sum"], rtol=1e-3, atol=1e-5)


def test_baseline_of_controls(run, csv, tmp_path):
    options = ["--baseline", "controls", "--run-folds", "1", "--save-subjects"]
    assert explain("IG", run, tmp_path, *options) == 0
    folder = tmp_path / "IG-controls"
    assert {path.name for path in tmp_path.iterdir()} == {"IG-controls"}
    folds = read_table(run / "folds.csv")
    mine = folds[(folds["fold"] == 1) & (folds["role"] == "train") & (folds["label"] == 0)]
    assert len(mine) > 1
    mean = np.mean([dataset.read_scan(csv.parent / path).astype(float) for path in mine["path"]], axis=0)
    saved = read_values(folder / "baseline_f1.nii.gz")
    assert np.allclose(saved, mean, rtol=0, atol=2**-24)  # rounded to float32, below 1
    assert np.array_equal(read_nifti(folder / "baseline_f1.nii.gz").affine, AFFINE)

    table = read_table(folder / "subjects.csv")
    network = load_network(run / "state_dict_f1.pth")
    baseline = torch.from_numpy(saved.astype(np.float32))[None, None]
    volume, target = load_volume(csv.parent / table["path"][0]), torch.tensor([int(table["target"][0])])
    direct = integrated_gradients(network, volume, target, steps=STEPS, baseline=baseline)[0, 0].numpy()
    first = subject_maps(folder, table, 1)[0]
    assert np.allclose(first, direct, rtol=1e-5, atol=1e-6 * np.abs(direct).max())
    with torch.no_grad():
        rise = logits_of(run, csv, table) - network(baseline).double().numpy()
    check_residual(table, rise[np.arange(len(table)), table["target"]])
    assert json.loads((folder / "map.json").read_text())["options"]["baseline"] == "controls"


def test_mean_scan(maps, csv):
    scans = [dataset.read_scan(path).astype(float) for path in sorted((csv.parent / "scans").iterdir())]
    found = read_values(maps / "LRP" / "mean_scan.nii.gz")
    assert np.allclose(found, np.mean(scans, axis=0), rtol=0, atol=2**-24)  # rounded to float32, below 1


def untrained(seed: int, fold: int, csv: Path, run: Path) -> models.CNN3d:
    """A network before training; BatchNorm's statistics are the mean over the fold's training scans.

    In training mode, through the layers as they stand, a scan at a time; None is PyTorch's plain mean.
    """
    folds = read_table(run / "folds.csv")
    train = folds[(folds["fold"] == fold) & (folds["role"] == "train")]
    utils.seed_everything(utils.fold_seed(seed, fold))
    network = models.build_model(MODEL, SHAPE)
    for block in network.blocks():
        block.norm.momentum = None
    with torch.no_grad():
        for path in train["path"]:
            network.features(load_volume(csv.parent / path))
    return network.eval()


def test_random_weights(run, csv, tmp_path, capsys):
    """Each fold's test scans, explained by a network as it is before training; no checkpoint is read."""
    bare = tmp_path / "run"
    bare.mkdir()
    for name in ("run.json", "folds.csv"):
        shutil.copy(run / name, bare)
    options = ["--weights", "random", "--seed", "3", "--save-subjects"]
    assert explain("LRP", bare, tmp_path, *options) == 0
    folder = tmp_path / "LRP-random"
    table = read_table(folder / "subjects.csv")
    assert len(table) == 12
    for fold in range(K):
        row = table[table["fold"] == fold].iloc[0]
        volume = load_volume(csv.parent / row["path"])
        network = untrained(3, fold, csv, run)
        direct = lrp(network, volume, torch.tensor([int(row["label"])]))[0, 0].numpy()
        first = subject_maps(folder, table, fold)[0]
        # statistics added up in another order, float32 through five blocks; single winners may differ
        assert np.linalg.norm(first - direct) < 1e-2 * np.linalg.norm(direct)
    record = json.loads((folder / "map.json").read_text())
    trained_on = len(read_table(run / "folds.csv").query("role == 'train' and fold == 0"))
    assert record["weights_sha256"]["0"] == f"random, seed 3, BatchNorm of {trained_on} training scans"
    assert record["calibration_scans_per_fold"]["0"] == trained_on
    assert not torch.allclose(*(untrained(3, fold, csv, run).features[0].weight for fold in range(K)))
    capsys.readouterr()
    assert explain("LRP", bare, tmp_path, *options) == 0
    assert capsys.readouterr().out.count("explained before, kept") == K
    assert explain("LRP", bare, tmp_path, "--weights", "random", "--seed", "4", "--save-subjects") == 2
    assert "seed (3 there, 4 now)" in only_error(capsys.readouterr().err)


def test_random_weights_of_controls_have_a_folder_of_their_own(run, tmp_path):
    assert (
        explain("IG", run, tmp_path, "--weights", "random", "--baseline", "controls", "--run-folds", "0") == 0
    )
    assert {path.name for path in tmp_path.iterdir()} == {"IG-controls-random"}


# Going on, starting again ------------------------------------------------------------------------


@pytest.fixture
def copy(maps, tmp_path) -> Path:
    """The finished LRP maps, to be changed."""
    shutil.copytree(maps / "LRP", tmp_path / "copy" / "LRP")
    return tmp_path / "copy"


@pytest.fixture
def run_copy(run, tmp_path) -> Path:
    """The training run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "models"))


def change_weights(run: Path, fold: int) -> None:
    """As if a fold had been trained again."""
    path = run / f"state_dict_f{fold}.pth"
    state = torch.load(path, weights_only=True)
    state["classifier.3.weight"] *= 1.5
    torch.save(state, path)


def time_of(path: Path) -> int:
    return path.stat().st_mtime_ns


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How many scans each call of LRP explains; the calls themselves are the real ones."""
    calls: list[int] = []

    def counting(model, volume, target, **options):
        calls.append(len(volume))
        return lrp(model, volume, target, **options)

    monkeypatch.setitem(heatmap.METHODS, "LRP", counting)
    return calls


def test_second_call_keeps_the_folds(copy, run, counted, capsys):
    before = contents(copy)
    times = [time_of(copy / "LRP" / f"map_f{fold}.nii.gz") for fold in range(K)]
    assert explain("LRP", run, copy, "--save-subjects") == 0
    assert counted == []
    assert [time_of(copy / "LRP" / f"map_f{fold}.nii.gz") for fold in range(K)] == times
    after = contents(copy)
    for name in ("LRP/subjects.csv", "LRP/map.json"):
        assert after[name] == before[name]
    check_map_all(copy / "LRP")


def check_map_all(folder: Path) -> None:
    means = [read_values(folder / f"map_f{fold}.nii.gz") for fold in range(K)]
    assert equal_in_float32(read_values(folder / "map_all.nii.gz"), np.mean(means, axis=0))


def test_folds_in_two_calls_equal_one_call(maps, run, tmp_path, capsys):
    assert explain("LRP", run, tmp_path, "--save-subjects", "--run-folds", "1") == 0
    assert "0" in capsys.readouterr().out.split("not explained yet")[1]
    assert not (tmp_path / "LRP" / "map_all.nii.gz").exists()
    assert explain("LRP", run, tmp_path, "--save-subjects", "--run-folds", "0") == 0
    assert (tmp_path / "LRP" / "subjects.csv").read_text() == (maps / "LRP" / "subjects.csv").read_text()
    for name in ("map_f0.nii.gz", "map_f1.nii.gz", "map_all.nii.gz"):
        assert np.array_equal(read_values(tmp_path / "LRP" / name), read_values(maps / "LRP" / name))
    assert (tmp_path / "LRP" / "map_all.png").exists()


def test_fold_of_changed_weights_is_explained_again(copy, maps, run_copy, counted):
    kept = time_of(copy / "LRP" / "map_f0.nii.gz")
    change_weights(run_copy, 1)
    assert explain("LRP", run_copy, copy, "--save-subjects") == 0
    before, after = (read_table(folder / "LRP" / "subjects.csv") for folder in (maps, copy))
    assert sum(counted) == (after["fold"] == 1).sum()
    assert time_of(copy / "LRP" / "map_f0.nii.gz") == kept
    # the logit without its bias grew by half, and LRP conserves it
    same = before["fold"] == 0
    assert after[same].equals(before[same])
    assert (after.loc[~same, "sum"] != before.loc[~same, "sum"]).all()
    check_map_all(copy / "LRP")


def test_map_all_never_mixes_in_a_fold_of_older_weights(copy, run_copy, counted):
    """Fold 1 was trained again; a call for fold 0 alone must not call the old map of fold 1 finished."""
    change_weights(run_copy, 1)
    before = time_of(copy / "LRP" / "map_all.nii.gz")
    status = explain("LRP", run_copy, copy, "--save-subjects", "--run-folds", "0")
    assert status == 2 or sum(counted) or time_of(copy / "LRP" / "map_all.nii.gz") == before


@pytest.mark.parametrize("name", ["map_f1.nii.gz", "subjects.csv"])
def test_lost_file_is_made_again_or_named(copy, maps, run, capsys, name):
    (copy / "LRP" / name).unlink()
    if explain("LRP", run, copy, "--save-subjects") == 2:
        assert name in only_error(capsys.readouterr().err)
    else:
        assert np.array_equal(
            read_values(copy / "LRP" / "map_f1.nii.gz"), read_values(maps / "LRP" / "map_f1.nii.gz")
        )
        assert read_table(copy / "LRP" / "subjects.csv").equals(read_table(maps / "LRP" / "subjects.csv"))


def test_interrupted_first_fold_goes_on(maps, run, tmp_path, monkeypatch):
    calls: list[int] = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return lrp(*args, **options)

    with monkeypatch.context() as patch:
        patch.setitem(heatmap.METHODS, "LRP", interrupted)
        assert explain("LRP", run, tmp_path, "--save-subjects") == 130
    assert not (tmp_path / "LRP" / "map_f0.nii.gz").exists()
    assert explain("LRP", run, tmp_path, "--save-subjects") == 0
    assert (tmp_path / "LRP" / "subjects.csv").read_text() == (maps / "LRP" / "subjects.csv").read_text()


def test_weights_that_change_meanwhile_are_refused(run_copy, tmp_path, monkeypatch, capsys):
    honest = heatmap.load_fold

    def change(run, modelpath, scans, fold, *args):
        shutil.copy(modelpath / f"state_dict_f{1 - fold}.pth", modelpath / f"state_dict_f{fold}.pth")
        return honest(run, modelpath, scans, fold, *args)

    monkeypatch.setattr(heatmap, "load_fold", change)
    assert explain("LRP", run_copy, tmp_path) == 2
    assert "the weights of fold 0 changed meanwhile" in only_error(capsys.readouterr().err)
    assert not (tmp_path / "LRP" / "map_f0.nii.gz").exists()


def test_fold_that_is_begun_again_is_struck_off_first(maps, run_copy, tmp_path, monkeypatch):
    """Its weights changed, it was interrupted, and the former weights came back: its map is of neither."""
    shutil.copytree(maps / "LRP", tmp_path / "LRP")
    weights = run_copy / "state_dict_f1.pth"
    former = weights.read_bytes()
    shutil.copy(run_copy / "state_dict_f0.pth", weights)
    with monkeypatch.context() as patch:
        patch.setattr(heatmap, "save_rows", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert explain("LRP", run_copy, tmp_path, "--save-subjects") == 143
    assert not (tmp_path / "LRP" / "map_all.nii.gz").exists()
    weights.write_bytes(former)
    assert explain("LRP", run_copy, tmp_path, "--save-subjects") == 0
    for name in ("map_f1.nii.gz", "map_all.nii.gz", "subjects.csv"):
        assert (tmp_path / "LRP" / name).read_bytes() == (maps / "LRP" / name).read_bytes()


def test_scans_that_changed_since_training_are_refused(run_copy, csv, tmp_path, capsys):
    shutil.copytree(csv.parent, tmp_path / "cohort")
    write_scan(tmp_path / "cohort" / "scans" / "004.nii", voxels(4) // 2)
    assert explain("LRP", run_copy, tmp_path / "out", "--path", str(tmp_path / "cohort" / "data.csv")) == 2
    assert "the scans changed" in only_error(capsys.readouterr().err)


def test_two_jobs_at_once_share_a_folder(maps, run, tmp_path, monkeypatch):
    """A job array: fold 1 is explained by another call, while fold 0 is."""
    others = [["--run-folds", "1"]]

    def busy(*args, **options):
        if others:
            assert explain("LRP", run, tmp_path, "--save-subjects", *others.pop()) == 0
        return lrp(*args, **options)

    monkeypatch.setitem(heatmap.METHODS, "LRP", busy)
    assert explain("LRP", run, tmp_path, "--save-subjects", "--run-folds", "0") == 0
    assert (tmp_path / "LRP" / "subjects.csv").read_text() == (maps / "LRP" / "subjects.csv").read_text()
    assert (tmp_path / "LRP" / "map_all.nii.gz").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--beta", "0"], ["beta", "0.5", "0.0"]),
        (["--target", "1"], ["target", "label", "1"]),
    ],
)
def test_other_options_are_refused(maps, run, capsys, options, words):
    before = contents(maps)
    assert explain("LRP", run, maps, "--save-subjects", *options) == 2
    line = only_error(capsys.readouterr().err)
    assert all(word in line for word in [*words, "--overwrite"])
    assert contents(maps) == before


def test_overwrite_starts_afresh_and_leaves_other_files(copy, run):
    (copy / "LRP" / "notes.txt").write_text("mine")
    (copy / "LRP" / "subjects" / "notes.txt").write_text("mine")
    assert explain("LRP", run, copy, "--beta", "0", "--overwrite") == 0
    expected = {f"map_{part}.nii.gz" for part in ("f0", "f1", "all")} | {"map_all.png", "mean_scan.nii.gz"}
    expected |= {"subjects.csv", "map.json", "notes.txt", "subjects/notes.txt"}
    assert set(contents(copy / "LRP")) == expected


def test_overwrite_of_one_fold_keeps_the_others(copy, run, maps, monkeypatch, capsys):
    """Its map, its scans' maps, its rows and the means go; what is of other folds stays, byte for byte."""
    kept = {name: content for name, content in contents(copy / "LRP").items() if "f1" in name}
    monkeypatch.setattr(heatmap, "map_fold", _interrupted)
    options = ["--save-subjects", "--run-folds", "0", "--overwrite"]
    assert explain("LRP", run, copy, *options) == 130
    assert len(kept) == 1 + len(read_table(maps / "LRP" / "subjects.csv").query("fold == 1"))
    assert contents(copy / "LRP").items() >= kept.items()
    assert set(contents(copy / "LRP")) == {*kept, "map.json", "subjects.csv"}
    assert set(read_table(copy / "LRP" / "subjects.csv")["fold"]) == {1}
    record = storage.read_json(copy / "LRP" / "map.json")
    assert all(set(record[name]) == {"1"} for name in heatmap.MADE)
    monkeypatch.undo()
    assert explain("LRP", run, copy, *options) == 0
    assert "kept" not in capsys.readouterr().out
    found, expected = contents(copy / "LRP"), contents(maps / "LRP")
    assert {name: found[name] for name in expected if name != "map.json"} == {
        name: expected[name] for name in expected if name != "map.json"
    }


def test_record_that_was_edited_is_refused_before_anything_is_overwritten(copy, run, capsys):
    file = copy / "LRP" / "map.json"
    file.write_text(json.dumps(storage.read_json(file) | {"zero_maps_per_fold": 3}))
    before = contents(copy)
    assert explain("LRP", run, copy, "--save-subjects", "--run-folds", "0", "--overwrite") == 2
    assert "map.json: is damaged: 'zero_maps_per_fold' is 3" in only_error(capsys.readouterr().err)
    assert contents(copy) == before


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_overwrite_of_one_fold_with_other_options_is_refused(copy, run, capsys):
    before = contents(copy)
    options = ["--save-subjects", "--beta", "0", "--run-folds", "0", "--overwrite"]
    assert explain("LRP", run, copy, *options) == 2
    assert (
        "beta (0.5 there, 0.0 now); choose another --outpath, or --overwrite without --run-folds"
        in only_error(capsys.readouterr().err)
    )
    assert contents(copy) == before


# Maps of nothing ---------------------------------------------------------------------------------


def test_maps_that_are_zero_are_counted(run, tmp_path, monkeypatch, capsys):
    """As guided Grad-CAM's are where no channel speaks for the logit; here those of all patients."""

    def silent(model, volume, target):
        return volume * (1 - target).view(-1, 1, 1, 1, 1)

    monkeypatch.setitem(heatmap.METHODS, "GGC", silent)
    assert explain("GGC", run, tmp_path, "--run-folds", "1") == 0
    assert "maps that are zero everywhere: 3 of 5 in fold 1\n" in capsys.readouterr().out
    assert explain("GGC", run, tmp_path) == 0
    found = read_table(tmp_path / "GGC" / "subjects.csv")
    assert found.columns[-1] == "zero"
    assert found["zero"].tolist() == found["label"].tolist()
    zero, scans = (found.groupby("fold")["label"].agg(how).astype(int).tolist() for how in ("sum", "size"))
    record = json.loads((tmp_path / "GGC" / "map.json").read_text())
    assert record["zero_maps_per_fold"] == {"0": zero[0], "1": zero[1]}
    assert record["scans_per_fold"] == {"0": scans[0], "1": scans[1]}
    line = f"zero everywhere: {zero[0]} of {scans[0]} in fold 0, {zero[1]} of {scans[1]} in fold 1\n"
    assert line in capsys.readouterr().out


def test_maps_of_an_earlier_version_are_one_line(copy, run, capsys):
    file = copy / "LRP" / "subjects.csv"
    read_table(file).drop(columns="zero").to_csv(file, index=False)
    before = contents(copy)
    for options in ([], ["--run-folds", "0", "--overwrite"]):
        assert explain("LRP", run, copy, "--save-subjects", *options) == 2
        assert "subjects.csv: is of an earlier version (no column zero); --overwrite without" in only_error(
            capsys.readouterr().err
        )
        assert contents(copy) == before


# The untrained network ---------------------------------------------------------------------------


def test_untrained_networks_tell_scans_apart(run, csv):
    """With BatchNorm as it is set up, logits hardly differ between scans: such a network explains nothing."""
    found = runs.find_run(run, None, None, None)
    scans = dataset.Scans(found.table)
    volumes = torch.stack([scans[row][0] for row in range(12)])
    with torch.no_grad():
        estimated = heatmap.untrained(found, scans, 0, 0, torch.device("cpu"))(volumes)
        utils.seed_everything(utils.fold_seed(0, 0))
        as_set_up = models.build_model(MODEL, SHAPE).eval()(volumes)
    assert estimated.std(0).max() > 10 * as_set_up.std(0).max()


def test_calibration_scans_are_training_scans_evenly_spaced(run, monkeypatch):
    found = runs.find_run(run, None, None, None)
    train = dataset.rows(found.folds, 0, "train")
    assert heatmap.calibration_rows(found, 0) == train
    monkeypatch.setattr(
        dataset, "rows", lambda folds, fold, role: list(range(100, 164)) if role == "train" else []
    )
    assert heatmap.calibration_rows(found, 0) == list(range(100, 164, 2))
    monkeypatch.setattr(heatmap, "CALIBRATION", 3)
    assert heatmap.calibration_rows(found, 0) == [100, 121, 142]


def test_run_is_found_from_its_own_folder(maps, run, csv, tmp_path, monkeypatch):
    """As in the README: nothing but --method, in the folder that holds models/."""
    shutil.copytree(run, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    assert heatmap.main(["--method", "LRP", "--run-folds", "1", "--device", "cpu"]) == 0
    found = read_values(tmp_path / "heatmaps" / "LRP" / "map_f1.nii.gz")
    assert np.array_equal(found, read_values(maps / "LRP" / "map_f1.nii.gz"))


def test_run_of_a_moved_csv_is_explained_with_path(run, csv, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "scans").symlink_to(csv.parent / "scans")
    shutil.copy(csv, moved / "list.csv")
    options = ["--path", str(moved / "list.csv"), "--run-folds", "0", "--model", MODEL, "--fold", "2"]
    assert explain("LRP", run, tmp_path / "out", *options) == 0


# Published checkpoints ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(run, csv, tmp_path_factory) -> Path:
    """A folder of nothing but three state_dict_f*.pth, and a headerless CSV of 13 scans; read only."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "models").mkdir()
    for fold in range(3):
        shutil.copy(run / f"state_dict_f{fold % K}.pth", folder / "models" / f"state_dict_f{fold}.pth")
    (folder / "again.nii").symlink_to(csv.parent / "scans" / "001.nii")
    rows: list[tuple[object, int]] = [("again.nii", 1)]
    rows += [(csv.parent / f"scans/{i:03d}.nii", label) for i, label in enumerate(LABELS)]
    write_csv(folder / "plain.csv", rows)
    return folder


def explain_published(published: Path, outpath: Path, *options: str) -> int:
    given = ["--path", str(published / "plain.csv"), "--model", MODEL, "--fold", "3"]
    return explain("LRP", published / "models", outpath, *given, *options)


def test_published_checkpoints_use_the_published_blocks(published, csv, tmp_path, capsys):
    before = contents(published)
    assert explain_published(published, tmp_path) == 0
    said = capsys.readouterr().out
    assert "contiguous" in said
    assert "run.json" in said
    table = read_table(tmp_path / "LRP" / "subjects.csv")
    assert table["fold"].tolist() == [0] * 4 + [1] * 4 + [2] * 5  # 13 // 3, the remainder in the last
    assert table["path"].tolist() == ["again.nii"] + [
        str(csv.parent / f"scans/{i:03d}.nii") for i in range(12)
    ]
    assert table["subject"].tolist() == table["path"].tolist()
    assert table["label"].tolist() == [1, *LABELS]
    table["path"] = table["path"].replace("again.nii", "scans/001.nii")
    check_residual(table, logits_of(published / "models", csv, table)[np.arange(13), table["target"]])
    assert contents(published) == before


def test_published_checkpoints_explain_a_cohort_too_small_to_validate(published, csv, tmp_path):
    """Nothing is trained here, so no validation set is needed."""
    rows = [(csv.parent / f"scans/{i:03d}.nii", LABELS[i]) for i in range(3)]
    few = write_csv(tmp_path / "few.csv", rows)
    assert explain_published(published, tmp_path / "out", "--path", str(few)) == 0
    assert len(read_table(tmp_path / "out" / "LRP" / "subjects.csv")) == 3


def test_published_checkpoints_need_path_and_model(published, tmp_path, capsys):
    path, model = ["--path", str(published / "plain.csv")], ["--model", MODEL]
    for options in ([], path, model):
        assert explain("LRP", published / "models", tmp_path / "out", *options) == 2
        line = only_error(capsys.readouterr().err)
        assert all(word in line for word in ["run.json", "--path", "--model"])
    assert not (tmp_path / "out").exists()


def test_published_folds_are_five_unless_told(published, tmp_path, capsys):
    rows = [(f"{i}.nii", i % 2) for i in range(30)]
    for path, _ in rows:
        (tmp_path / path).symlink_to(published / "again.nii")
    options = ["--path", str(write_csv(tmp_path / "many.csv", rows)), "--model", MODEL]
    assert explain("LRP", published / "models", tmp_path / "out", *options) == 2
    assert "state_dict_f3.pth" in only_error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# Mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("scans/a b.nii.gz", "f1_00007_a_b.nii.gz"),
        ("../../etc/passwd", "f1_00007_passwd.nii.gz"),
        ("..", "f1_00007_...nii.gz"),
        ("$(x);\x1b\n/.nii", "f1_00007_.nii.gz"),
        ("é脳.nii", "f1_00007___.nii.gz"),
        ("x" * 251 + ".nii", f"f1_00007_{'x' * 150}.nii.gz"),
    ],
)
def test_map_of_a_scan_stays_in_its_folder(tmp_path, path, name):
    assert heatmap.subject_file(tmp_path, 1, 7, path) == tmp_path / "subjects" / name


@pytest.mark.parametrize("weights", [None, [], "x", {"0": ["x"]}])
def test_record_of_maps_that_was_edited(tmp_path, weights):
    (tmp_path / "map.json").write_text(json.dumps({"weights_sha256": weights}))
    if isinstance(weights, dict):
        assert heatmap.finished_folds(tmp_path, {0: "x"}) == []
        return
    with pytest.raises(InputError, match=r"map\.json: is damaged: 'weights_sha256' is"):
        heatmap.finished_folds(tmp_path, {0: "x"})


@pytest.mark.parametrize(
    "row",
    [
        "x,a.nii,1,s,1,1,0.5,2,,0",
        "0,a.nii,1,s,1,1,0.5",
        "0,a.nii,1,s,1,1,half,2,,0",
        "0,a.nii,1,s,1,1,1,2,,7",
        '"',
    ],
)
def test_rows_of_subjects_that_were_edited(tmp_path, row):
    header = ",".join(heatmap.SUBJECT_COLUMNS)
    (tmp_path / "subjects.csv").write_text(f"{header}\n0,a.nii,1,007,1,1,0.5,2.5,,1\n")
    rows = heatmap.read_subjects(tmp_path)
    assert rows.astype(object).fillna("none").to_numpy().tolist() == [
        [0, "a.nii", 1, "007", 1, 1, 0.5, 2.5, "none", 1]
    ]
    for content in (f"{header}\n{row}\n", header[:-1] + "\n", ""):
        (tmp_path / "subjects.csv").write_text(content)
        with pytest.raises(InputError, match=r"subjects\.csv: (is damaged|cannot be read)"):
            heatmap.read_subjects(tmp_path)


def test_only_the_folds_that_are_run_need_weights(run_copy, tmp_path):
    (run_copy / "state_dict_f1.pth").unlink()
    assert explain("LRP", run_copy, tmp_path, "--run-folds", "0") == 0


def test_maps_that_are_not_finite_are_a_fault_not_a_result(run, tmp_path, monkeypatch):
    def broken(model, volume, target, **options):
        return torch.full_like(volume, torch.nan)

    monkeypatch.setitem(heatmap.METHODS, "LRP", broken)
    with pytest.raises(FloatingPointError, match="LRP fold 0"):
        explain("LRP", run, tmp_path)
    assert not list(tmp_path.rglob("*.nii.gz"))
