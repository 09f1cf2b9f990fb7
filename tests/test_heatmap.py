"""heatmap.py: the maps and tables of every method, going on, published checkpoints, and mistakes."""

import json
import shutil
from collections.abc import Callable
from functools import partial
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
    K,
    contents,
    load_network,
    load_volume,
    only_error,
    read_nifti,
    read_table,
    read_values,
    voxels,
    write_csv,
    write_scan,
)
from interruptions import ends_after, terminate

import dataset
import heatmap
import models
import runs
import utils
from ig import integrated_gradients
from internals import devices, nifti, storage
from internals.errors import InputError
from lrp import lrp
from methods import Method

METHODS = ["LRP", "IG", "GGC"]
STEPS = 2
OPTIONS: dict[str, dict[str, float]] = {"LRP": {"beta": 0.5}, "IG": {"steps": STEPS}, "GGC": {}}
COLUMNS = ["fold", "path", "label", "subject", "predicted", "target", "prob_target", "sum", "residual"]
COLUMNS += ["zero"]
MEANS = {"map_all.nii.gz", "map_all.png", "mean_scan.nii.gz"}
FILES = {"map_f0.nii.gz", "map_f1.nii.gz", "subjects.csv", "map.json", *MEANS}
FACTS = ["weights_sha256", "scans_per_fold", "zero_maps_per_fold", "device_per_fold"]


def explain(method: str, run: Path, outpath: Path, *options: str) -> int:
    where = ["--method", method, "--modelpath", str(run), "--outpath", str(outpath)]
    return heatmap.main([*where, "--device", "cpu", "--steps", str(STEPS), *options])


def read_record(folder: Path) -> dict:
    return json.loads((folder / "map.json").read_text())


def edit_record(folder: Path, drop: str = "", **changes: object) -> None:
    found = {name: value for name, value in read_record(folder).items() if name != drop}
    (folder / "map.json").write_text(json.dumps(found | changes))


def subject_maps(folder: Path, table: pd.DataFrame, fold: int) -> list[np.ndarray]:
    """The saved maps of a fold's scans, in the order of subjects.csv."""
    files = sorted((folder / "subjects").glob(f"f{fold}_*.nii.gz"))
    stems = [Path(path).stem for path in table.loc[table["fold"] == fold, "path"]]
    assert [file.name.split("_", 2)[2] for file in files] == [f"{stem}.nii.gz" for stem in stems]
    return [read_values(file) for file in files]


def equal_in_float32(written: np.ndarray, mean: np.ndarray) -> bool:
    """Whether a map holds a mean that was taken in float64 and rounded to float32 on its way to disk."""
    return np.allclose(written, mean, rtol=2**-23, atol=1e-12 * np.abs(mean).max())


def same_map(saved: np.ndarray, direct: torch.Tensor) -> bool:
    """The same float32 operations on the same numbers; threads may still sum in another order."""
    return np.allclose(saved, direct[0, 0].numpy(), rtol=1e-5, atol=1e-6 * np.abs(saved).max())


def logits_of(run: Path, csv: Path, table: pd.DataFrame) -> np.ndarray:
    """Logits (N, 2) of a table's scans, each by its own fold's weights, one at a time."""
    networks = {fold: load_network(run / f"state_dict_f{fold}.pth") for fold in set(table["fold"])}
    with torch.no_grad():
        rows = [
            networks[fold](load_volume(csv.parent / path))
            for fold, path in zip(table["fold"], table["path"], strict=True)
        ]
    return torch.cat(rows).double().numpy()


def check_residual(table: pd.DataFrame, wanted: np.ndarray) -> None:
    """|sum - wanted| / |wanted|, where `wanted` comes from float32 logits known to about 1e-6."""
    wanted = wanted[np.arange(len(table)), table["target"]]
    residual = np.abs(table["sum"] - wanted) / np.abs(wanted)
    assert np.allclose(table["residual"], residual, rtol=1e-4, atol=2e-6 / np.abs(wanted).min())


# The maps ----------------------------------------------------------------------------------------


def test_defaults_are_the_specified_ones():
    args = vars(heatmap.get_parser().parse_args(["--method", "IG"]))
    assert args == {
        "method": "IG", "path": None, "modelpath": Path("models"), "model": None, "outpath": Path("heatmaps"),
        "device": "auto", "fold": None, "batch": 1, "run_folds": None, "target": "label",
        "weights": "trained", "seed": 0, "steps": 100, "baseline": "zero", "beta": 0.5,
        "save_subjects": False, "overwrite": False,
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_these_files_lie_where_the_scans_lie_and_no_others(maps, csv, method):
    names = set(contents(maps / method))
    assert {name for name in names if not name.startswith("subjects/")} == FILES
    assert (maps / method / "map_all.png").read_bytes().startswith(b"\x89PNG")
    scan = read_nifti(csv.parent / "scans" / "000.nii")
    files = sorted((maps / method).rglob("*.nii.gz"))
    assert len(files) == len(names) - 3 == 16
    for file in files:
        found = read_nifti(file)
        assert found.shape == SHAPE
        assert np.array_equal(found.affine, AFFINE)
        assert found.get_data_dtype() == np.float32
        for name in ("sform_code", "qform_code", "pixdim", "srow_x", "quatern_b", "xyzt_units"):
            assert np.array_equal(found.header[name], scan.header[name]), name
        assert np.isfinite(read_values(file)).all()
    assert {path.name for path in maps.iterdir()} == set(METHODS)
    assert len({(maps / method / "map_all.nii.gz").read_bytes() for method in METHODS}) == 3


@pytest.mark.parametrize("method", METHODS)
def test_fold_map_is_the_mean_of_its_subjects_and_map_all_of_the_folds(maps, csv, method):
    table = read_table(maps / method / "subjects.csv")
    folds = [read_values(maps / method / f"map_f{fold}.nii.gz") for fold in range(K)]
    for fold in range(K):
        mean = np.mean(subject_maps(maps / method, table, fold), axis=0)
        assert equal_in_float32(folds[fold], mean)
        assert np.ptp(mean) > 0
    assert equal_in_float32(read_values(maps / method / "map_all.nii.gz"), (folds[0] + folds[1]) / 2)
    scans = [dataset.read_scan(path).astype(float) for path in sorted((csv.parent / "scans").iterdir())]
    found = read_values(maps / method / "mean_scan.nii.gz")
    assert np.allclose(found, np.mean(scans, axis=0), rtol=0, atol=2**-24)  # rounded to float32, below 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fold", range(K))
def test_map_is_the_methods_own_answer(maps, lively_run, csv, method, fold):
    table = read_table(maps / method / "subjects.csv")
    test = table[table["fold"] == fold].iloc[-1]
    network = load_network(lively_run / f"state_dict_f{fold}.pth")
    volume, target = load_volume(csv.parent / str(test["path"])), torch.tensor([test["label"]])
    direct = heatmap.METHODS[method](network, volume, target, **OPTIONS[method])
    assert same_map(subject_maps(maps / method, table, fold)[-1], direct)


@pytest.mark.parametrize("method", METHODS)
def test_subjects_table(maps, lively_run, csv, method):
    table = read_table(maps / method / "subjects.csv")
    folds = read_table(lively_run / "folds.csv")
    assert list(table.columns) == COLUMNS
    tests = folds[folds["role"] == "test"]
    identity = ["fold", "path", "label", "subject"]
    assert table[identity].to_numpy().tolist() == tests[identity].to_numpy().tolist()
    assert table["target"].tolist() == table["label"].tolist()
    logits = logits_of(lively_run, csv, table)
    assert table["predicted"].tolist() == logits.argmax(1).tolist()
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    picked = np.arange(12), table["target"].to_numpy()
    assert np.allclose(table["prob_target"], probability[picked], rtol=0, atol=1e-6)  # float32 logits
    files = [values for fold in range(K) for values in subject_maps(maps / method, table, fold)]
    size = max(np.abs(values).sum() for values in files)
    sums = [values.sum() for values in files]
    assert np.allclose(table["sum"], sums, rtol=0, atol=1e-12 * size)  # float64 sums of the same voxels
    assert table["zero"].tolist() == [int(not values.any()) for values in files]
    blank = torch.zeros(1, 1, *SHAPE)
    if method == "GGC":  # its sum means nothing
        assert table["residual"].isna().all()
    elif method == "LRP":  # relevance is conserved
        check_residual(table, logits)
    else:  # completeness: the rise over a blank image
        with torch.no_grad():
            origin = [load_network(lively_run / f"state_dict_f{f}.pth")(blank)[0].double() for f in range(K)]
        check_residual(table, logits - torch.stack(origin).numpy()[table["fold"]])


@pytest.mark.parametrize("method", METHODS)
def test_record(maps, lively_run, csv, method):
    record, table = read_record(maps / method), read_table(maps / method / "subjects.csv")
    baseline = {"baseline": "zero"} if method == "IG" else {}
    wanted = {"target": "label", "save_subjects": True, "weights": "trained", **baseline, **OPTIONS[method]}
    assert (record["method"], record["options"]) == (method, wanted)
    assert record["modelpath"] == str(lively_run.resolve())
    assert record["csv_sha256"] == storage.file_sha256(csv)
    assert record["versions"] == storage.package_versions()
    assert record["finished"] == [0, 1, "summary"]
    assert "calibration_scans_per_fold" not in record
    checkpoints = {str(fold): lively_run / f"state_dict_f{fold}.pth" for fold in range(K)}
    assert record["weights_sha256"] == {fold: storage.file_sha256(file) for fold, file in checkpoints.items()}
    assert record["device_per_fold"] == dict.fromkeys(checkpoints, devices.describe(torch.device("cpu")))
    for fact, how in [("scans_per_fold", "size"), ("zero_maps_per_fold", "sum")]:
        assert record[fact] == {str(f): int(n) for f, n in table.groupby("fold")["zero"].agg(how).items()}


# Options -----------------------------------------------------------------------------------------


def test_target_and_beta(maps, lively_run, csv, tmp_path):
    options = ["--target", "1", "--beta", "0", "--run-folds", "1", "--save-subjects"]
    assert explain("LRP", lively_run, tmp_path, *options) == 0
    table = read_table(tmp_path / "LRP" / "subjects.csv")
    assert table["target"].tolist() == [1] * len(table)
    check_residual(table, logits_of(lively_run, csv, table))
    saved, before = (subject_maps(folder / "LRP", table, 1) for folder in (tmp_path, maps))
    network = load_network(lively_run / "state_dict_f1.pth")
    for number in (table["label"].tolist().index(label) for label in (0, 1)):
        volume = load_volume(csv.parent / table["path"][number])
        assert same_map(saved[number], lrp(network, volume, torch.tensor([1]), beta=0.0))
        assert not np.allclose(saved[number], before[number], rtol=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_batch_does_not_change_the_maps(maps, lively_run, tmp_path, method):
    """And maps of subjects are written on request only."""
    assert explain(method, lively_run, tmp_path, "--batch", "2", "--run-folds", "0") == 0
    assert set(contents(tmp_path / method)) == {"map_f0.nii.gz", "subjects.csv", "map.json"}
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


def test_baseline_of_controls(lively_run, csv, tmp_path):
    options = ["--baseline", "controls", "--run-folds", "1", "--save-subjects"]
    assert explain("IG", lively_run, tmp_path, *options) == 0
    folder = tmp_path / "IG-controls"
    assert {path.name for path in tmp_path.iterdir()} == {"IG-controls"}
    folds = read_table(lively_run / "folds.csv")
    mine = folds[(folds["fold"] == 1) & (folds["role"] == "train") & (folds["label"] == 0)]
    assert len(mine) > 1
    mean = np.mean([dataset.read_scan(csv.parent / path).astype(float) for path in mine["path"]], axis=0)
    saved = read_values(folder / "baseline_f1.nii.gz")
    assert np.allclose(saved, mean, rtol=0, atol=2**-24)  # rounded to float32, below 1
    assert np.array_equal(read_nifti(folder / "baseline_f1.nii.gz").affine, AFFINE)
    table = read_table(folder / "subjects.csv")
    network = load_network(lively_run / "state_dict_f1.pth")
    baseline = torch.from_numpy(saved.astype(np.float32))[None, None]
    volume, target = load_volume(csv.parent / table["path"][0]), torch.tensor([int(table["target"][0])])
    direct = integrated_gradients(network, volume, target, steps=STEPS, baseline=baseline)
    assert same_map(subject_maps(folder, table, 1)[0], direct)
    with torch.no_grad():
        check_residual(table, logits_of(lively_run, csv, table) - network(baseline).double().numpy())
    assert read_record(folder)["options"]["baseline"] == "controls"


def silent(model, volume, target, **_):
    """As guided Grad-CAM's maps where no channel speaks for the logit; here those of all patients."""
    return volume * (1 - target).view(-1, 1, 1, 1, 1)


def test_maps_that_are_zero_are_counted(lively_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(heatmap.METHODS, "GGC", Method(silent))
    assert explain("GGC", lively_run, tmp_path, "--run-folds", "1") == 0
    assert explain("GGC", lively_run, tmp_path) == 0
    found = read_table(tmp_path / "GGC" / "subjects.csv")
    assert found["zero"].tolist() == found["label"].tolist()
    zero, scans = (found.groupby("fold")["label"].agg(how).astype(int).tolist() for how in ("sum", "size"))
    record = read_record(tmp_path / "GGC")
    assert record["zero_maps_per_fold"] == {"0": zero[0], "1": zero[1]}
    assert record["scans_per_fold"] == {"0": scans[0], "1": scans[1]}
    said = capsys.readouterr().out
    assert f"maps that are zero everywhere: {zero[1]} of {scans[1]} in fold 1\n" in said
    assert f"zero everywhere: {zero[0]} of {scans[0]} in fold 0, {zero[1]} of {scans[1]} in fold 1\n" in said


def test_maps_that_are_not_finite_are_a_fault_not_a_result(run, tmp_path, monkeypatch):
    monkeypatch.setitem(heatmap.METHODS, "LRP", Method(lambda model, volume, target: volume / 0))
    with pytest.raises(FloatingPointError, match="LRP fold 0"):
        explain("LRP", run, tmp_path)
    assert not list(tmp_path.rglob("*.nii.gz"))


# The untrained network ---------------------------------------------------------------------------


def untrained(seed: int, fold: int, csv: Path, run: Path) -> models.CNN3d:
    """A network before training; BatchNorm's statistics are the mean over the fold's training scans.

    In training mode, through the layers as they stand, a scan at a time; None is PyTorch's plain mean.
    """
    train = read_table(run / "folds.csv").query(f"role == 'train' and fold == {fold}")
    utils.seed_everything(utils.fold_seed(seed, fold))
    network = models.build_model(MODEL, SHAPE)
    for block in network.blocks():
        block.norm.momentum = None
    with torch.no_grad():
        for path in train["path"]:
            network.features(load_volume(csv.parent / path))
    return network.eval()


def test_random_weights(run_copy, csv, tmp_path, capsys):
    """Each fold's test scans, explained by a network as it is before training; no checkpoint is read."""
    for file in run_copy.glob("state_dict_f*.pth"):
        file.unlink()
    out = tmp_path / "out"
    options = ["--weights", "random", "--seed", "3", "--save-subjects"]
    assert explain("LRP", run_copy, out, *options) == 0
    table, record = read_table(out / "LRP-random" / "subjects.csv"), read_record(out / "LRP-random")
    folds = read_table(run_copy / "folds.csv")
    networks = [untrained(3, fold, csv, run_copy) for fold in range(K)]
    for fold, network in enumerate(networks):
        row = table[table["fold"] == fold].iloc[0]
        direct = lrp(network, load_volume(csv.parent / row["path"]), torch.tensor([int(row["label"])]))
        first = subject_maps(out / "LRP-random", table, fold)[0]
        # statistics added up in another order, float32 through five blocks; single winners may differ
        assert np.linalg.norm(first - direct[0, 0].numpy()) < 1e-2 * np.linalg.norm(direct)
        count = len(folds.query(f"role == 'train' and fold == {fold}"))
        assert record["weights_sha256"][str(fold)] == f"random, seed 3, BatchNorm of {count} training scans"
        assert record["calibration_scans_per_fold"][str(fold)] == count
    assert len(table) == 12
    assert not torch.allclose(*(network.features[0].weight for network in networks))
    capsys.readouterr()
    assert explain("LRP", run_copy, out, *options) == 0
    assert capsys.readouterr().out.count("finished before, kept") == K
    assert explain("LRP", run_copy, out, "--weights", "random", "--seed", "4", "--save-subjects") == 2
    assert "seed (3 there, 4 now)" in only_error(capsys.readouterr().err)
    controls = ["--weights", "random", "--baseline", "controls", "--run-folds", "0"]
    assert explain("IG", run_copy, out, *controls) == 0
    assert {path.name for path in out.iterdir()} == {"LRP-random", "IG-controls-random"}


def test_untrained_networks_tell_scans_apart(run):
    """With BatchNorm as it is set up, logits hardly differ between scans: such a network explains nothing."""
    found = runs.find_run(run, None, None, None)
    scans = dataset.ScanDataset(found.cohort.table)
    volumes = torch.stack([scans[row][0] for row in range(12)])
    with torch.no_grad():
        estimated = runs.UntrainedNetworks(found, 0).load(0, scans, torch.device("cpu"))(volumes)
        utils.seed_everything(utils.fold_seed(0, 0))
        as_set_up = models.build_model(MODEL, SHAPE).eval()(volumes)
    assert estimated.std(0).max() > 10 * as_set_up.std(0).max()


def test_calibration_scans_are_training_scans_evenly_spaced(run, monkeypatch):
    found = runs.find_run(run, None, None, None)
    networks = runs.UntrainedNetworks(found, 0)
    assert networks.calibration_scans(0) == found.cohort.scan_indices(0, "train")
    rows = {"train": list(range(100, 164))}
    monkeypatch.setattr(dataset.Cohort, "scan_indices", lambda cohort, fold, role: rows[role])
    assert networks.calibration_scans(0) == list(range(100, 164, 2))
    monkeypatch.setattr(runs, "CALIBRATION", 3)
    assert networks.calibration_scans(0) == [100, 121, 142]


# Going on, starting again ------------------------------------------------------------------------


@pytest.fixture
def lively_copy(lively_run, tmp_path) -> Path:
    """The training run, to be changed."""
    return Path(shutil.copytree(lively_run, tmp_path / "models"))


@pytest.fixture
def copy(maps, tmp_path) -> Path:
    """The finished LRP maps, to be changed; `again` explains into it."""
    return Path(shutil.copytree(maps / "LRP", tmp_path / "copy" / "LRP"))


def again(run: Path, folder: Path, *options: str) -> int:
    """Go on with LRP maps."""
    return explain("LRP", run, folder.parent, "--save-subjects", *options)


def change_weights(run: Path, fold: int) -> None:
    """As if a fold had been trained again."""
    path = run / f"state_dict_f{fold}.pth"
    state = torch.load(path, weights_only=True)
    state["classifier.3.weight"] *= 1.5
    torch.save(state, path)


def time_of(path: Path) -> int:
    return path.stat().st_mtime_ns


def same_files(folder: Path, maps: Path) -> bool:
    """Whether a folder is the finished one of LRP, byte for byte, but for the order of the record's keys."""
    found, expected = (dict(contents(place)) for place in (folder, maps / "LRP"))
    return json.loads(found.pop("map.json")) == json.loads(expected.pop("map.json")) and found == expected


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How many scans each call of LRP explains; the calls themselves are the real ones."""
    calls: list[int] = []

    def counting(model, volume, target, **options):
        calls.append(len(volume))
        return lrp(model, volume, target, **options)

    replace_lrp(monkeypatch, counting)
    return calls


def replace_lrp(patch: pytest.MonkeyPatch, function: Callable[..., torch.Tensor]) -> None:
    honest = heatmap.METHODS["LRP"]
    patch.setitem(heatmap.METHODS, "LRP", Method(function, honest.options, map_sum=honest.map_sum))


def check_map_all(folder: Path) -> None:
    means = [read_values(folder / f"map_f{fold}.nii.gz") for fold in range(K)]
    assert equal_in_float32(read_values(folder / "map_all.nii.gz"), np.mean(means, axis=0))


def test_second_call_keeps_everything(copy, lively_run, maps, counted, capsys):
    before = [time_of(file) for file in sorted(copy.rglob("*"))]
    assert again(lively_run, copy) == 0
    assert counted == []
    assert [time_of(file) for file in sorted(copy.rglob("*"))] == before
    assert same_files(copy, maps)
    lines = capsys.readouterr().out.splitlines()
    assert [f"fold {fold}: finished before, kept" for fold in range(K)] == lines[1:3]
    assert lines[-1] == f"written to {copy}: map_all.nii.gz, map_all.png, map_f*.nii.gz, subjects.csv"


def test_folds_in_two_calls_equal_one_call(maps, lively_run, tmp_path, capsys):
    assert again(lively_run, tmp_path / "LRP", "--run-folds", "1") == 0
    assert capsys.readouterr().out.endswith("not explained yet, or with other weights: folds [0]\n")
    assert not MEANS & set(contents(tmp_path / "LRP"))
    assert read_record(tmp_path / "LRP")["finished"] == [1]
    assert again(lively_run, tmp_path / "LRP", "--run-folds", "0") == 0
    assert same_files(tmp_path / "LRP", maps)


# after: a single scan; the maps of a fold, before its rows are entered; its rows, before the record says that
# it is finished; the means
MOMENTS = [(nifti, "save_map", 3, []), (heatmap.FoldMaps, "explain", 2, [0])]
MOMENTS += [(heatmap, "update_subjects", 2, []), (heatmap.FoldMaps, "average", 1, [0, 1])]


@pytest.mark.parametrize(("module", "step", "call", "finished"), MOMENTS)
def test_interrupted_maps_go_on(maps, lively_run, tmp_path, monkeypatch, module, step, call, finished):
    with monkeypatch.context() as patch:
        ends_after(patch, module, step, call)
        assert again(lively_run, tmp_path / "LRP") == 143
    assert read_record(tmp_path / "LRP")["finished"] == finished
    assert not list(tmp_path.rglob(".*"))  # neither locks nor half a file
    assert again(lively_run, tmp_path / "LRP") == 0
    assert same_files(tmp_path / "LRP", maps)


def test_fold_of_changed_weights_is_explained_again(copy, maps, lively_copy, counted, capsys):
    """But not by a call for the other fold, which neither calls it finished nor mixes it into a new mean."""
    kept, mean = time_of(copy / "map_f0.nii.gz"), time_of(copy / "map_all.nii.gz")
    change_weights(lively_copy, 1)
    assert again(lively_copy, copy, "--run-folds", "0") == 0
    assert capsys.readouterr().out.endswith("not explained yet, or with other weights: folds [1]\n")
    assert counted == []
    assert time_of(copy / "map_all.nii.gz") == mean
    assert again(lively_copy, copy) == 0
    before, after = (read_table(folder / "subjects.csv") for folder in (maps / "LRP", copy))
    assert sum(counted) == (after["fold"] == 1).sum()
    assert time_of(copy / "map_f0.nii.gz") == kept
    # the logit without its bias grew by half, and LRP conserves it
    same = before["fold"] == 0
    assert after[same].equals(before[same])
    assert (after.loc[~same, "sum"] != before.loc[~same, "sum"]).all()
    assert time_of(copy / "map_all.nii.gz") != mean
    check_map_all(copy)


def check_only(folder: Path, maps: Path, fold: int) -> None:
    """That the other fold is struck off: its files, rows and facts, and the means; this one's are there."""
    kept = {name: content for name, content in contents(maps / "LRP").items() if f"f{fold}" in name}
    assert len(kept) == 1 + (read_table(maps / "LRP" / "subjects.csv")["fold"] == fold).sum()
    assert contents(folder).items() >= kept.items()
    assert set(contents(folder)) == {*kept, "map.json", "subjects.csv"}
    assert set(read_table(folder / "subjects.csv")["fold"]) == {fold}
    record = read_record(folder)
    assert record["finished"] == [fold]
    assert all(set(record[name]) == {str(fold)} for name in FACTS)


def test_fold_that_is_begun_again_is_struck_off_first(copy, maps, lively_copy, monkeypatch):
    """Its weights changed, it was interrupted, and the former weights came back: its map is of neither."""
    weights = lively_copy / "state_dict_f1.pth"
    former = weights.read_bytes()
    shutil.copy(lively_copy / "state_dict_f0.pth", weights)
    with monkeypatch.context() as patch:
        patch.setattr(heatmap.FoldMaps, "explain", terminate)
        assert again(lively_copy, copy) == 143
    check_only(copy, maps, fold=0)
    weights.write_bytes(former)
    assert again(lively_copy, copy) == 0
    edit_record(copy, modelpath=read_record(maps / "LRP")["modelpath"])
    assert read_record(copy) == read_record(maps / "LRP")
    assert {n: c for n, c in contents(copy).items() if n != "map.json"}.items() <= contents(
        maps / "LRP"
    ).items()


def test_weights_that_change_meanwhile_are_refused(lively_copy, tmp_path, monkeypatch, capsys):
    honest = runs.TrainedNetworks.load

    def change(networks, fold, *args):
        shutil.copy(networks.run.checkpoint(1 - fold), networks.run.checkpoint(fold))
        return honest(networks, fold, *args)

    monkeypatch.setattr(runs.TrainedNetworks, "load", change)
    assert explain("LRP", lively_copy, tmp_path / "out") == 2
    assert "the weights of fold 0 changed meanwhile" in only_error(capsys.readouterr().err)
    assert not (tmp_path / "out" / "LRP" / "map_f0.nii.gz").exists()


def test_two_jobs_at_once_share_a_folder(maps, lively_run, tmp_path, monkeypatch):
    """A job array: fold 1 is explained by another call, while fold 0 is."""
    others = [["--run-folds", "1"]]

    def busy(*args, **options):
        if others:
            assert again(lively_run, tmp_path / "LRP", *others.pop()) == 0
            assert read_record(tmp_path / "LRP")["finished"] == [1]
        return lrp(*args, **options)

    replace_lrp(monkeypatch, busy)
    assert again(lively_run, tmp_path / "LRP", "--run-folds", "0") == 0
    assert same_files(tmp_path / "LRP", maps)


def test_job_that_knows_older_weights_leaves_the_folds_of_others_finished(
    maps, lively_copy, tmp_path, monkeypatch
):
    """Fold 1 is trained and explained, while a job for fold 0 that saw no weights of it starts."""
    weights = lively_copy / "state_dict_f1.pth"
    content = weights.read_bytes()
    weights.unlink()
    honest = dataset.Cohort.open_scans

    def late(*args):
        monkeypatch.setattr(dataset.Cohort, "open_scans", honest)
        weights.write_bytes(content)
        assert again(lively_copy, tmp_path / "LRP", "--run-folds", "1") == 0
        return honest(*args)

    monkeypatch.setattr(dataset.Cohort, "open_scans", late)
    assert again(lively_copy, tmp_path / "LRP", "--run-folds", "0") == 0
    assert read_record(tmp_path / "LRP")["finished"] == [0, 1]
    time = time_of(tmp_path / "LRP" / "map_f1.nii.gz")
    assert again(lively_copy, tmp_path / "LRP") == 0
    assert time_of(tmp_path / "LRP" / "map_f1.nii.gz") == time
    check_map_all(tmp_path / "LRP")


def test_overwrite_starts_afresh_and_leaves_other_files(copy, lively_run):
    for name in ("notes.txt", "subjects/notes.txt"):
        (copy / name).write_text("mine")
    assert explain("LRP", lively_run, copy.parent, "--beta", "0", "--overwrite") == 0
    assert set(contents(copy)) == {*FILES, "notes.txt", "subjects/notes.txt"}


def test_overwrite_of_one_fold_keeps_the_others(copy, lively_run, maps, monkeypatch, capsys):
    """Its map, its scans' maps, its rows and the means go; what is of other folds stays, byte for byte."""
    options = ["--run-folds", "0", "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(heatmap.FoldMaps, "explain", terminate)
        assert again(lively_run, copy, *options) == 143
    check_only(copy, maps, fold=1)
    assert again(lively_run, copy, *options) == 0
    assert "kept" not in capsys.readouterr().out
    assert same_files(copy, maps)


# What lies there ---------------------------------------------------------------------------------


def test_record_of_an_earlier_version(copy, lively_copy, lively_run, maps, counted, capsys):
    """It says of no fold that it is finished: its files do, and that it was made with the same weights."""
    edit_record(copy, drop="finished")
    assert again(lively_run, copy) == 0
    assert capsys.readouterr().out.count("finished before, kept") == K
    assert counted == []
    assert same_files(copy, maps)
    edit_record(copy, drop="finished")
    change_weights(lively_copy, 1)
    assert again(lively_copy, copy) == 0
    assert sum(counted) == (read_table(copy / "subjects.csv")["fold"] == 1).sum()
    check_map_all(copy)


OVERWRITE_ONE = ["--run-folds", "0", "--overwrite"]


def no_column_zero(folder: Path) -> None:
    read_table(folder / "subjects.csv").drop(columns="zero").to_csv(folder / "subjects.csv", index=False)


def no_rows_of_fold_1(folder: Path) -> None:
    read_table(folder / "subjects.csv").query("fold == 0").to_csv(folder / "subjects.csv", index=False)


def damaged_before_any_fold(folder: Path) -> None:
    edit_record(folder, finished=[])
    (folder / "subjects.csv").write_text("fold\n")


def no_rows(folder: Path) -> None:
    (folder / "subjects.csv").unlink()


OTHER_BETA = "beta (0.5 there, 0.0 now); choose another --outpath, or --overwrite"
EARLIER = "subjects.csv: is of an earlier version (no column zero); --overwrite without --run-folds starts"
EDITED = [  # of the record
    ("zero_maps_per_fold", 3, "map.json: is damaged: 'zero_maps_per_fold' is 3"),
    ("weights_sha256", None, "map.json: is damaged: 'weights_sha256' is None"),
    ("weights_sha256", [], "map.json: is damaged: 'weights_sha256' is []"),
    ("finished", {"0": True}, "map.json: is damaged: 'finished' is {'0': True}"),
]
REFUSED = [
    (edit_record, ["--beta", "0"], OTHER_BETA),
    (edit_record, ["--beta", "0", *OVERWRITE_ONE], f"{OTHER_BETA} without --run-folds"),
    (edit_record, ["--target", "1"], "target (label there, 1 now)"),
    (no_column_zero, [], EARLIER),
    (no_column_zero, OVERWRITE_ONE, EARLIER),
    (no_rows_of_fold_1, [], "subjects.csv: has no rows of fold 1; --overwrite without --run-folds starts"),
    (no_rows, [], "subjects.csv: has no rows of fold 0;"),
    (damaged_before_any_fold, [], "subjects.csv: is damaged: expected the columns"),
    (damaged_before_any_fold, OVERWRITE_ONE, "subjects.csv: is damaged: expected the columns"),
]
for name, value, words in EDITED:
    REFUSED += [(partial(edit_record, **{name: value}), options, words) for options in ([], OVERWRITE_ONE)]


@pytest.mark.parametrize(("edit", "options", "words"), REFUSED)
def test_what_is_of_other_options_or_was_edited_is_refused(copy, lively_run, capsys, edit, options, words):
    edit(copy)
    before = contents(copy)
    assert again(lively_run, copy, *options) == 2
    assert words in only_error(capsys.readouterr().err)
    assert contents(copy) == before


def no_map(folder: Path) -> None:
    (folder / "map_f0.nii.gz").unlink()


def other_digest(folder: Path) -> None:
    digests = read_record(folder)["weights_sha256"]
    edit_record(folder, weights_sha256=digests | {"0": ["x"]})


def nonsense_and_fold_1(folder: Path) -> None:
    edit_record(folder, finished=[[0], {"fold": 0}, None, 7, "0", 1])


@pytest.mark.parametrize("edit", [no_map, other_digest, nonsense_and_fold_1])
def test_fold_that_was_lost_is_explained_again(copy, lively_run, maps, counted, edit):
    edit(copy)
    kept = time_of(copy / "map_f1.nii.gz")
    assert again(lively_run, copy) == 0
    assert sum(counted) == (read_table(copy / "subjects.csv")["fold"] == 0).sum()
    assert time_of(copy / "map_f1.nii.gz") == kept
    assert same_files(copy, maps)


ROWS = ["x,a.nii,1,s,1,1,0.5,2,,0", "0,a.nii,1,s,1,1,0.5", "0,a.nii,1,s,1,1,half,2,,0", '"']
ROWS += ["0,a.nii,1,s,1,1,1,2,,7"]


@pytest.mark.parametrize("row", ROWS)
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


# Where the run is --------------------------------------------------------------------------------


def test_run_is_found_from_its_own_folder(maps, lively_copy, tmp_path, monkeypatch):
    """As in the README: nothing but --method, in the folder that holds models/. Fold 0 needs no weights."""
    (lively_copy / "state_dict_f0.pth").unlink()
    monkeypatch.chdir(tmp_path)
    assert heatmap.main(["--method", "LRP", "--run-folds", "1", "--device", "cpu"]) == 0
    found = read_values(tmp_path / "heatmaps" / "LRP" / "map_f1.nii.gz")
    assert np.array_equal(found, read_values(maps / "LRP" / "map_f1.nii.gz"))


def test_run_of_a_moved_csv_is_explained_with_path(run, csv, tmp_path, capsys):
    """Unless its scans changed."""
    shutil.copytree(csv.parent, tmp_path / "moved")
    (tmp_path / "moved" / csv.name).rename(tmp_path / "moved" / "list.csv")
    options = ["--path", str(tmp_path / "moved" / "list.csv"), "--run-folds", "0"]
    assert explain("GGC", run, tmp_path / "out", *options, "--model", MODEL, "--fold", "2") == 0
    write_scan(tmp_path / "moved" / "scans" / "004.nii", voxels(4) // 2)
    assert explain("GGC", run, tmp_path / "other", *options) == 2
    assert "the scans changed" in only_error(capsys.readouterr().err)
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def published(lively_run, csv, tmp_path_factory) -> Path:
    """A folder of nothing but three state_dict_f*.pth, and a headerless CSV of 13 scans; read only."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "models").mkdir()
    for fold in range(3):
        shutil.copy(lively_run / f"state_dict_f{fold % K}.pth", folder / "models" / f"state_dict_f{fold}.pth")
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
    assert "holds no run.json: published checkpoints, explained on the published contiguous folds" in said
    table = read_table(tmp_path / "LRP" / "subjects.csv")
    assert table["fold"].tolist() == [0] * 4 + [1] * 4 + [2] * 5  # 13 // 3, the remainder in the last
    scans = [str(csv.parent / f"scans/{i:03d}.nii") for i in range(12)]
    assert table["path"].tolist() == ["again.nii", *scans]
    assert table["subject"].tolist() == table["path"].tolist()
    assert table["label"].tolist() == [1, *LABELS]
    table["path"] = table["path"].replace("again.nii", "scans/001.nii")
    check_residual(table, logits_of(published / "models", csv, table))
    assert contents(published) == before


def test_published_checkpoints_explain_a_cohort_too_small_to_validate(published, csv, tmp_path):
    """Nothing is trained here, so no validation set is needed."""
    rows = [(csv.parent / f"scans/{i:03d}.nii", LABELS[i]) for i in range(3)]
    few = write_csv(tmp_path / "few.csv", rows)
    assert explain_published(published, tmp_path / "out", "--path", str(few)) == 0
    assert len(read_table(tmp_path / "out" / "LRP" / "subjects.csv")) == 3


def test_published_checkpoints_need_path_and_model(published, tmp_path, capsys):
    """And folds are five unless told."""
    path, model = ["--path", str(published / "plain.csv")], ["--model", MODEL]
    for options in ([], path, model):
        assert explain("LRP", published / "models", tmp_path / "out", *options) == 2
        line = only_error(capsys.readouterr().err)
        assert all(word in line for word in ["run.json", "--path", "--model"])
    assert explain("LRP", published / "models", tmp_path / "out", *path, *model) == 2
    assert "state_dict_f3.pth" in only_error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
