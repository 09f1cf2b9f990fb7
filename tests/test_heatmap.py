"""heatmap.py: the maps and tables of every method, going on, published checkpoints, and mistakes."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from cohorts import (
    AFFINE,
    LABELS,
    MODEL,
    QUICK,
    SHAPE,
    K,
    contents,
    load_network,
    load_volume,
    only_error,
    quick,
    read_nifti,
    read_table,
    read_values,
    write_csv,
)
from interruptions import ends_after, interrupt

import dataset
import explaining
import heatmap
import models
import runs
import utils
from ig import integrated_gradients
from internals import devices, nifti, sharing, storage
from internals.errors import InputError
from lrp import lrp
from methods import Method

METHODS = list(heatmap.METHODS)
IDENTITY = ["fold", "path", "label", "subject"]
COLUMNS = [*IDENTITY, "predicted", "target", "prob_target", "sum", "residual", "zero"]
OF_ALL = ("all", "controls", "patients")
MEANS = {*(f"map_{group}.nii.gz" for group in OF_ALL), "map_all.png", "mean_scan.nii.gz"}
FOLDS = {f"map_{group}f{fold}.nii.gz" for group in ("", "controls_", "patients_") for fold in range(K)}
FILES = {*FOLDS, "subjects.csv", "map.json", *MEANS}
VOXEL_SIZES = np.linalg.norm(AFFINE[:3, :3], axis=0)
FACTS = ["weights_sha256", "scans_per_fold", "zero_maps_per_fold", "device_per_fold"]


def explain(method: str, run: Path, outpath: Path, *options: str) -> int:
    where = ["--method", method, "--modelpath", str(run), "--outpath", str(outpath)]
    return heatmap.main([*where, "--device", "cpu", *quick(method), *options])


def options_of(method: str) -> dict[str, Any]:
    """A method's options as `explain` gives them."""
    return heatmap.METHODS[method].chosen(QUICK.get(method, {}))


def read_record(folder: Path) -> dict:
    return json.loads((folder / "map.json").read_text())


def edit_record(folder: Path, **changes: object) -> None:
    (folder / "map.json").write_text(json.dumps(read_record(folder) | changes))


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
    scans = zip(table["fold"], table["path"], strict=True)
    with torch.no_grad():
        rows = [networks[fold](load_volume(csv.parent / path)) for fold, path in scans]
    return torch.cat(rows).double().numpy()


def check_residual(table: pd.DataFrame, wanted: np.ndarray) -> None:
    """|sum - wanted| / |wanted|, where `wanted` comes from float32 logits known to about 1e-6."""
    wanted = wanted[np.arange(len(table)), table["target"]]
    residual = np.abs(table["sum"] - wanted) / np.abs(wanted)
    assert np.allclose(table["residual"], residual, rtol=1e-4, atol=2e-6 / np.abs(wanted).min())


def check_groups(folder: Path, table: pd.DataFrame) -> None:
    """The maps of one label's scans are the mean of them all, whatever their folds."""
    files = [values for fold in sorted(set(table["fold"])) for values in subject_maps(folder, table, fold)]
    for group, label in (("controls", 0), ("patients", 1)):
        chosen = [values for values, truth in zip(files, table["label"], strict=True) if truth == label]
        found = read_values(folder / f"map_{group}.nii.gz")
        # the folds' means were rounded to float32 before
        assert np.allclose(found, np.mean(chosen, axis=0), rtol=1e-5, atol=1e-6 * np.abs(found).max())


over_methods = pytest.mark.parametrize("method", METHODS)


@over_methods
def test_files_lie_where_the_scans_lie_and_maps_are_means(maps, csv, method):
    names = set(contents(maps / method))
    assert {name for name in names if not name.startswith("subjects/")} == FILES
    assert (maps / method / "map_all.png").read_bytes().startswith(b"\x89PNG")
    scan = read_nifti(csv.parent / "scans" / "000.nii")
    files = sorted((maps / method).rglob("*.nii.gz"))
    assert len(files) == len(names) - 3 == 22
    for file in files:
        found = read_nifti(file)
        assert (found.shape, found.get_data_dtype()) == (SHAPE, np.float32)
        assert np.array_equal(found.affine, AFFINE)
        for name in ("sform_code", "qform_code", "pixdim", "srow_x", "quatern_b", "xyzt_units"):
            assert np.array_equal(found.header[name], scan.header[name]), name
        assert np.isfinite(read_values(file)).all()
    assert {path.name for path in maps.iterdir()} == set(METHODS)
    table = read_table(maps / method / "subjects.csv")
    for fold in range(K):
        mean = np.mean(subject_maps(maps / method, table, fold), axis=0)
        assert equal_in_float32(read_values(maps / method / f"map_f{fold}.nii.gz"), mean)
        assert np.ptp(mean) > 0
    check_groups(maps / method, table)
    check_map_all(maps / method)
    scans = [dataset.read_scan(path).astype(float) for path in sorted((csv.parent / "scans").iterdir())]
    found = read_values(maps / method / "mean_scan.nii.gz")
    assert np.allclose(found, np.mean(scans, axis=0), rtol=0, atol=2**-24)  # rounded to float32, below 1


@over_methods
def test_subjects(maps, lively_run, csv, method):
    """Every scan's row and its map: the method's own answer with the weights of the fold that tests it."""
    table, folds = read_table(maps / method / "subjects.csv"), read_table(lively_run / "folds.csv")
    assert list(table.columns) == COLUMNS
    tests = folds[folds["role"] == "test"]
    assert table[IDENTITY].to_numpy().tolist() == tests[IDENTITY].to_numpy().tolist()
    assert table["target"].tolist() == table["label"].tolist()
    logits = logits_of(lively_run, csv, table)
    assert table["predicted"].tolist() == logits.argmax(1).tolist()
    files = [values for fold in range(K) for values in subject_maps(maps / method, table, fold)]
    size = max(np.abs(values).sum() for values in files)
    sums = [values.sum() for values in files]
    assert np.allclose(table["sum"], sums, rtol=0, atol=1e-12 * size)  # float64 sums of the same voxels
    assert table["zero"].tolist() == [int(not values.any()) for values in files]
    networks = [load_network(lively_run / f"state_dict_f{fold}.pth") for fold in range(K)]
    for fold, network in enumerate(networks):
        row = table[table["fold"] == fold].iloc[-1]
        volume, target = load_volume(csv.parent / str(row["path"])), torch.tensor([row["label"]])
        scan = int(np.flatnonzero(read_table(csv)["path"] == row["path"])[0])
        needed = {"seeds": [utils.own_seed(0, scan)], "voxel_sizes": VOXEL_SIZES, "baseline": None}
        known = heatmap.METHODS[method]
        settings = options_of(method) | {name: needed[name] for name in known.needs}
        assert same_map(
            subject_maps(maps / method, table, fold)[-1], known(network, volume, target, **settings)
        )
    if method == "LRP":  # relevance is conserved
        check_residual(table, logits)
    elif method != "IG":  # their sums mean nothing
        assert table["residual"].isna().all()
    else:  # completeness: the rise over a blank image
        with torch.no_grad():
            origin = [network(torch.zeros(1, 1, *SHAPE))[0].double() for network in networks]
        check_residual(table, logits - torch.stack(origin).numpy()[table["fold"]])


@over_methods
def test_record(maps, lively_run, csv, method):
    record, table = read_record(maps / method), read_table(maps / method / "subjects.csv")
    wanted = {"target": "label", "save_subjects": True, "weights": "trained", **options_of(method)}
    wanted |= {"seed": 0} if method == "SmoothGrad" else {}
    sha = {str(fold): storage.file_sha256(lively_run / f"state_dict_f{fold}.pth") for fold in range(K)}
    known = {"method": method, "options": wanted, "modelpath": str(lively_run.resolve())}
    known |= {"csv_sha256": storage.file_sha256(csv), "versions": storage.package_versions()}
    known |= {"finished": [0, 1, "summary"], "weights_sha256": sha}
    known |= {"device_per_fold": dict.fromkeys(sha, devices.describe(torch.device("cpu")))}
    for fact, how in [("scans_per_fold", "size"), ("zero_maps_per_fold", "sum")]:
        known[fact] = {str(f): int(n) for f, n in table.groupby("fold")["zero"].agg(how).items()}
    assert {name: record[name] for name in known} == known
    assert "calibration_scans_per_fold" not in record


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


@pytest.fixture(scope="module")
def in_batches(lively_run, tmp_path_factory) -> Path:
    """The maps of one fold by all methods, two scans at once; read only."""
    folder = tmp_path_factory.mktemp("batches")
    options = [word for method in METHODS for word in quick(method)]
    where = ["--modelpath", str(lively_run), "--outpath", str(folder), "--device", "cpu"]
    assert heatmap.main(["--method", *METHODS, *options, *where, "--batch", "2", "--run-folds", "0"]) == 0
    return folder


@over_methods
def test_batch_does_not_change_the_maps(maps, in_batches, method):
    """And maps of subjects are written on request only."""
    tmp_path = in_batches
    parts = {f"map_{group}f0.nii.gz" for group in ("", "controls_", "patients_")}
    assert set(contents(tmp_path / method)) == {*parts, "subjects.csv", "map.json"}
    one, two = (read_values(folder / method / "map_f0.nii.gz") for folder in (maps, tmp_path))
    # float32 in another order; where the two largest voxels of a pooling window differ by a rounding
    # the other one may win, which changes the map within that unit's field of view
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.9999
    assert abs(one - two).sum() < 1e-2 * abs(one).sum()
    first, second = (read_table(folder / method / "subjects.csv") for folder in (maps, tmp_path))
    first, exact = first[first["fold"] == 0], [*IDENTITY, "predicted", "target"]
    assert first[exact].equals(second[exact])
    assert np.allclose(first["prob_target"], second["prob_target"], rtol=0, atol=1e-6)
    assert np.allclose(first["sum"], second["sum"], rtol=1e-3, atol=1e-5)


def test_baseline_of_controls(lively_run, csv, tmp_path):
    options = ["--baseline", "controls", "--run-folds", "1", "--save-subjects"]
    assert explain("IG", lively_run, tmp_path, *options) == 0
    folder, file = tmp_path / "IG-controls", tmp_path / "IG-controls" / "baseline_f1.nii.gz"
    assert {path.name for path in tmp_path.iterdir()} == {"IG-controls"}
    mine = read_table(lively_run / "folds.csv").query("fold == 1 and role == 'train' and label == 0")
    assert len(mine) > 1
    mean = np.mean([dataset.read_scan(csv.parent / path).astype(float) for path in mine["path"]], axis=0)
    saved = read_values(file)
    assert np.allclose(saved, mean, rtol=0, atol=2**-24)  # rounded to float32, below 1
    assert np.array_equal(read_nifti(file).affine, AFFINE)
    table, network = read_table(folder / "subjects.csv"), load_network(lively_run / "state_dict_f1.pth")
    baseline = torch.from_numpy(saved.astype(np.float32))[None, None]
    volume, target = load_volume(csv.parent / table["path"][0]), torch.tensor([int(table["target"][0])])
    direct = integrated_gradients(network, volume, target, steps=2, baseline=baseline)
    assert same_map(subject_maps(folder, table, 1)[0], direct)
    with torch.no_grad():
        check_residual(table, logits_of(lively_run, csv, table) - network(baseline).double().numpy())
    assert read_record(folder)["options"]["baseline"] == "controls"


def test_maps_that_are_zero_are_counted(lively_run, tmp_path, monkeypatch, capsys):
    """As guided Grad-CAM's are where no channel speaks for the logit; here those of all patients."""
    silent = Method(lambda model, volume, target: volume * (1 - target).view(-1, 1, 1, 1, 1))
    monkeypatch.setitem(heatmap.METHODS, "GGC", silent)
    assert explain("GGC", lively_run, tmp_path, "--run-folds", "1") == 0
    assert explain("GGC", lively_run, tmp_path) == 0
    found, record = read_table(tmp_path / "GGC" / "subjects.csv"), read_record(tmp_path / "GGC")
    assert found["zero"].tolist() == found["label"].tolist()
    zero, scans = (found.groupby("fold")["label"].agg(how).astype(int).tolist() for how in ("sum", "size"))
    assert record["zero_maps_per_fold"] == {"0": zero[0], "1": zero[1]}
    said = capsys.readouterr().out
    assert f"maps that are zero everywhere: {zero[1]} of {scans[1]} in fold 1\n" in said
    assert f"zero everywhere: {zero[0]} of {scans[0]} in fold 0, {zero[1]} of {scans[1]} in fold 1\n" in said


def untrained(seed: int, fold: int, csv: Path, run: Path) -> models.CNN3d:
    """A network before training; BatchNorm's statistics are the mean over the fold's training scans.

    In training mode, through the layers as they stand, a scan at a time; None is PyTorch's plain mean.
    """
    train = read_table(run / "folds.csv").query(f"role == 'train' and fold == {fold}")
    utils.seed_everything(utils.own_seed(seed, fold))
    network = models.build_model(MODEL, SHAPE)
    for block in network.blocks():
        block.norm.momentum = None
    with torch.no_grad():
        for path in train["path"]:
            network.features(load_volume(csv.parent / path))
    return network.eval()


def test_random_weights(run_copy, csv, tmp_path, capsys):
    """No checkpoint is read."""
    for file in run_copy.glob("state_dict_f*.pth"):
        file.unlink()
    out, options = tmp_path / "out", ["--weights", "random", "--save-subjects", "--seed"]
    assert explain("LRP", run_copy, out, *options, "3") == 0
    table, record = read_table(out / "LRP-random" / "subjects.csv"), read_record(out / "LRP-random")
    trains = read_table(run_copy / "folds.csv").query("role == 'train'")
    networks = [untrained(3, fold, csv, run_copy) for fold in range(K)]
    for fold, network in enumerate(networks):
        row = table[table["fold"] == fold].iloc[0]
        direct = lrp(network, load_volume(csv.parent / row["path"]), torch.tensor([int(row["label"])]))
        first = subject_maps(out / "LRP-random", table, fold)[0]
        # statistics added up in another order, float32 through five blocks; single winners may differ
        assert np.linalg.norm(first - direct[0, 0].numpy()) < 1e-2 * np.linalg.norm(direct)
        count = int((trains["fold"] == fold).sum())
        assert record["weights_sha256"][str(fold)] == f"random, seed 3, BatchNorm of {count} training scans"
        assert record["calibration_scans_per_fold"][str(fold)] == count
    assert len(table) == 12
    assert not torch.allclose(*(network.features[0].weight for network in networks))
    capsys.readouterr()
    assert explain("LRP", run_copy, out, *options, "3") == 0
    assert capsys.readouterr().out.count("finished before, kept") == K
    assert explain("LRP", run_copy, out, *options, "4") == 2
    assert "seed (3 there, 4 now)" in only_error(capsys.readouterr().err)
    controls = ["--weights", "random", "--baseline", "controls", "--run-folds", "0"]
    assert explain("IG", run_copy, out, *controls) == 0
    assert {path.name for path in out.iterdir()} == {"LRP-random", "IG-controls-random"}


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


def time_of(path: Path) -> int:
    return path.stat().st_mtime_ns


def same_files(folder: Path, maps: Path) -> bool:
    """Whether a folder is the finished one of LRP, byte for byte, but for the order of the record's keys."""
    found, expected = (dict(contents(place)) for place in (folder, maps / "LRP"))
    return json.loads(found.pop("map.json")) == json.loads(expected.pop("map.json")) and found == expected


def replace_lrp(patch: pytest.MonkeyPatch, function: Callable[..., torch.Tensor]) -> None:
    honest = heatmap.METHODS["LRP"]
    patch.setitem(heatmap.METHODS, "LRP", Method(function, honest.options, map_sum=honest.map_sum))


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How many scans each call of LRP explains; the calls themselves are the real ones."""
    calls: list[int] = []
    replace_lrp(monkeypatch, lambda *args, **options: (calls.append(len(args[1])), lrp(*args, **options))[1])
    return calls


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
    assert [f"LRP fold {fold}: finished before, kept" for fold in range(K)] == lines[1:3]
    assert lines[-1] == f"written to {copy}: map_all.nii.gz, map_all.png, map_f*.nii.gz, subjects.csv"


def test_record_that_knows_fewer_options_is_of_their_defaults(copy, lively_run, capsys):
    """As one of an earlier version, which had no --rule."""
    options = {name: value for name, value in read_record(copy)["options"].items() if name != "rule"}
    edit_record(copy, options=options)
    assert explain("LRP", lively_run, copy.parent, "--save-subjects", "--rule", "beta") == 0
    assert "LRP fold 1: finished before, kept" in capsys.readouterr().out


# after: a few scans; all scans of the second fold, before anything of it is written; the rows of the first,
# before the record says that it is finished; the means
MOMENTS = [(nifti, "save_map", 3, []), (explaining, "explain_scans", 2, [0])]
MOMENTS += [(heatmap, "update_subjects", 2, []), (heatmap.FoldMaps, "average", 1, [0, 1])]


@pytest.mark.parametrize(("module", "step", "call", "finished"), MOMENTS)
def test_interrupted_maps_go_on(maps, lively_run, tmp_path, monkeypatch, module, step, call, finished):
    with monkeypatch.context() as patch:
        ends_after(patch, module, step, call)
        assert again(lively_run, tmp_path / "LRP") == 130
    assert read_record(tmp_path / "LRP")["finished"] == finished
    assert not list(tmp_path.rglob(".*"))  # neither locks nor half a file
    assert again(lively_run, tmp_path / "LRP") == 0
    assert same_files(tmp_path / "LRP", maps)


def test_stopped_maps_go_on_with_the_next_scan(maps, lively_run, tmp_path, counted, monkeypatch, capfd):
    """A batch system's signal waits for the scan that is explained."""
    honest, calls = heatmap.FoldMaps.keep, []

    def keep(self: heatmap.FoldMaps, *args: Any) -> None:
        honest(self, *args)
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(heatmap.FoldMaps, "keep", keep)
        assert again(lively_run, tmp_path / "LRP") == 143
    said = capfd.readouterr()
    assert "SIGTERM: this step is finished and saved first" in said.err
    assert "sums_f0.npz" in contents(tmp_path / "LRP")
    assert sum(counted) == 2
    assert again(lively_run, tmp_path / "LRP") == 0
    assert sum(counted) == len(LABELS)
    assert same_files(tmp_path / "LRP", maps)


# Parts -------------------------------------------------------------------------------------------


def test_parts_make_what_one_process_makes(maps, lively_run, tmp_path, capsys):
    """Byte for byte, whichever part is last."""
    for place, part in enumerate((3, 1, 2)):
        assert "map_all.png" not in contents(tmp_path)
        assert again(lively_run, tmp_path / "LRP", "--part", f"{part}/3") == 0
        said = capsys.readouterr().out
        assert f"part {part} of 3\n" in said
        assert ("not explained yet" in said) == (place < 2)
    assert same_files(tmp_path / "LRP", maps)


def test_more_parts_than_scans(lively_run, tmp_path, capsys):
    assert again(lively_run, tmp_path / "LRP", "--part", "99/99", "--run-folds", "1") == 0
    assert "LRP fold 1: no scan is left for this part" in capsys.readouterr().out
    assert "sums_f1-99of99.npz" in contents(tmp_path / "LRP")


def test_processes_of_torchrun_share_the_scans(maps, lively_run, tmp_path, monkeypatch, counted):
    cohort = runs.find_run(lively_run, None, None, None).cohort
    second = sum(len(cohort.scan_indices(fold, "test")[1::2]) for fold in range(K))
    monkeypatch.setattr(sharing, "share_threads", lambda: None)  # the reference had as many as there are
    for rank, explained in ((1, second), (0, len(LABELS))):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        assert again(lively_run, tmp_path / "LRP") == 0
        assert sum(counted) == explained
    assert same_files(tmp_path / "LRP", maps)


def test_baseline_of_parts(lively_run, tmp_path):
    options = ["--baseline", "controls", "--run-folds", "0"]
    assert explain("IG", lively_run, tmp_path / "one", *options) == 0
    for part in (2, 1):
        assert explain("IG", lively_run, tmp_path / "two", *options, "--part", f"{part}/2") == 0
    one, two = (dict(contents(tmp_path / name / "IG-controls")) for name in ("one", "two"))
    assert "baseline_f0.nii.gz" in one
    assert {n: c for n, c in one.items() if n != "map.json"} == {
        n: c for n, c in two.items() if n != "map.json"
    }


def test_status_says_what_is_finished_and_changes_nothing(lively_run, tmp_path, capsys):
    assert heatmap.main(["--status", "--outpath", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: nothing yet\n"
    assert again(lively_run, tmp_path / "LRP", "--run-folds", "0") == 0
    assert again(lively_run, tmp_path / "LRP", "--run-folds", "1", "--part", "2/2") == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert heatmap.main(["--status", "--outpath", str(tmp_path)]) == 0
    expected = [
        "fold 0: finished",
        "fold 1, part 1 of 2: open",
        "fold 1, part 2 of 2: finished",
        "summary: open",
    ]
    assert capsys.readouterr().out.splitlines() == [f"LRP {line}" for line in expected]
    where = ["--outpath", str(tmp_path), "--modelpath", str(lively_run)]
    for options, folder in [
        ("IG --baseline controls", "IG-controls"), ("LRP --weights random", "LRP-random"), ("IG", "IG"),
    ]:  # fmt: skip
        assert heatmap.main(["--status", "--method", *options.split(), *where]) == 0
        assert capsys.readouterr().out == f"{tmp_path / folder}: nothing yet\n"
    assert heatmap.main(["--status", "--method", "LRP", *where]) == 0
    assert capsys.readouterr().out.splitlines() == [f"LRP {line}" for line in expected]
    assert contents(tmp_path) == before


def test_damaged_progress_is_one_line(lively_run, maps, tmp_path, capsys):
    assert again(lively_run, tmp_path / "LRP", "--part", "1/2") == 0
    (tmp_path / "LRP/sums_f1-1of2.npz").write_bytes(b"PK")
    assert again(lively_run, tmp_path / "LRP", "--part", "2/2") == 2
    assert "sums_f1-1of2.npz: is damaged" in only_error(capsys.readouterr().err)
    (tmp_path / "LRP/sums_f1-1of2.npz").unlink()
    assert again(lively_run, tmp_path / "LRP", "--part", "1/2") == 0
    assert same_files(tmp_path / "LRP", maps)


# Weights that change -----------------------------------------------------------------------------


def test_fold_of_changed_weights_is_explained_again(copy, maps, lively_copy, counted, capsys):
    """But not by a call for the other fold, which neither calls it finished nor mixes it into a new mean."""
    kept, mean = time_of(copy / "map_f0.nii.gz"), time_of(copy / "map_all.nii.gz")
    state = torch.load(weights := lively_copy / "state_dict_f1.pth", weights_only=True)
    state["classifier.3.weight"] *= 1.5  # as if the fold had been trained again
    torch.save(state, weights)
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
    assert len(kept) == 3 + (read_table(maps / "LRP" / "subjects.csv")["fold"] == fold).sum()
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
        patch.setattr(heatmap, "explain_fold", interrupt)
        assert again(lively_copy, copy) == 130
    check_only(copy, maps, fold=0)
    weights.write_bytes(former)
    assert again(lively_copy, copy) == 0
    edit_record(copy, modelpath=read_record(maps / "LRP")["modelpath"])
    assert same_files(copy, maps)


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


def test_job_that_knows_older_weights_leaves_folds_of_others_finished(lively_copy, tmp_path, monkeypatch):
    """Fold 1 is trained and explained, while a job for fold 0 that saw no weights of it starts."""
    weights = lively_copy / "state_dict_f1.pth"
    content = weights.read_bytes()
    weights.unlink()
    honest = dataset.Cohort.open_scans

    def late(*args, **options):
        monkeypatch.setattr(dataset.Cohort, "open_scans", honest)
        weights.write_bytes(content)
        assert again(lively_copy, tmp_path / "LRP", "--run-folds", "1") == 0
        return honest(*args, **options)

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
        patch.setattr(heatmap, "explain_fold", interrupt)
        assert again(lively_run, copy, *options) == 130
    check_only(copy, maps, fold=1)
    assert again(lively_run, copy, *options) == 0
    assert "kept" not in capsys.readouterr().out
    assert same_files(copy, maps)


OVERWRITE_ONE = ["--run-folds", "0", "--overwrite"]


def edit_subjects(folder: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(read_table(folder / "subjects.csv")).to_csv(folder / "subjects.csv", index=False)


def damaged_before_any_fold(folder: Path) -> None:
    edit_record(folder, finished=[])
    (folder / "subjects.csv").write_text("fold\n")


no_column_zero = partial(edit_subjects, change=lambda table: table.drop(columns="zero"))
no_rows_of_fold_1 = partial(edit_subjects, change=lambda table: table.query("fold == 0"))
OTHER_BETA = "beta (0.5 there, 0.0 now); choose another --outpath, or --overwrite"
REFUSED = [
    (edit_record, ["--beta", "0"], OTHER_BETA),
    (edit_record, ["--beta", "0", *OVERWRITE_ONE], f"{OTHER_BETA} without --run-folds"),
    (edit_record, ["--target", "1"], "target (label there, 1 now)"),
    (no_rows_of_fold_1, [], "subjects.csv: has no rows of fold 1; --overwrite without --run-folds starts"),
    (lambda folder: (folder / "subjects.csv").unlink(), [], "subjects.csv: has no rows of fold 0;"),
]
for edit, words in [
    (no_column_zero, "is of an earlier version (no column zero); --overwrite without --run-folds starts"),
    (damaged_before_any_fold, "subjects.csv: is damaged: expected the columns"),
    (partial(edit_record, zero_maps_per_fold=3), "map.json: is damaged: 'zero_maps_per_fold' is 3"),
    (partial(edit_record, weights_sha256=None), "map.json: is damaged: 'weights_sha256' is None"),
]:
    REFUSED += [(edit, options, words) for options in ([], OVERWRITE_ONE)]


@pytest.mark.parametrize(("edit", "options", "words"), REFUSED)
def test_what_is_of_other_options_or_was_edited_is_refused(copy, lively_run, capsys, edit, options, words):
    edit(copy)
    before = contents(copy)
    assert again(lively_run, copy, *options) == 2
    assert words in only_error(capsys.readouterr().err)
    assert contents(copy) == before


ROWS = ["x,a.nii,1,s,1,1,0.5,2,,0", "0,a.nii,1,s,1,1,0.5", "0,a.nii,1,s,1,1,half,2,,0", '"']
ROWS += ["0,a.nii,1,s,1,1,1,2,,7"]


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_subjects_that_were_edited(tmp_path, row):
    header = ",".join(heatmap.SUBJECT_COLUMNS)
    (tmp_path / "subjects.csv").write_text(f"{header}\n0,a.nii,1,007,1,1,0.5,2.5,,1\n")
    rows = heatmap.read_subjects(tmp_path)
    wanted = [0, "a.nii", 1, "007", 1, 1, 0.5, 2.5, "none", 1]
    assert rows.astype(object).fillna("none").to_numpy().tolist() == [wanted]
    for content in (f"{header}\n{row}\n", header[:-1] + "\n", ""):
        (tmp_path / "subjects.csv").write_text(content)
        with pytest.raises(InputError, match=r"subjects\.csv: (is damaged|cannot be read)"):
            heatmap.read_subjects(tmp_path)


@pytest.mark.parametrize(
    ("path", "name"),
    [("scans/a b.nii.gz", "a_b"), ("../../etc/passwd", "passwd"), ("..", ".."), ("$(x);\x1b\n/.nii", ""),
     ("é脳.nii", "__"), ("x" * 251 + ".nii", "x" * 150)],
)  # fmt: skip
def test_map_of_a_scan_stays_in_its_folder(path, name):
    assert heatmap.subject_name(1, 7, path) == f"subjects/f1_00007_{name}"


def test_published_checkpoints_use_the_published_blocks(lively_run, csv, tmp_path):
    """Nothing is trained here, so a cohort too small to validate will do."""
    weights, given = tmp_path / "models", ["--model", MODEL, "--fold", "3", "--path"]
    weights.mkdir()
    for fold in range(3):
        shutil.copy(lively_run / f"state_dict_f{fold % K}.pth", weights / f"state_dict_f{fold}.pth")
    before = contents(weights)
    (tmp_path / "again.nii").symlink_to(csv.parent / "scans" / "001.nii")
    scans = [str(csv.parent / f"scans/{i:03d}.nii") for i in range(12)]
    plain = write_csv(tmp_path / "plain.csv", [("again.nii", 1), *zip(scans, LABELS, strict=True)])
    assert explain("LRP", weights, tmp_path, *given, str(plain), "--save-subjects") == 0
    table = read_table(tmp_path / "LRP" / "subjects.csv")
    counts = table[table["label"] == 1].groupby("fold").size()
    assert counts.nunique() > 1  # so that a mean of the folds' means would show
    check_groups(tmp_path / "LRP", table)
    assert table["fold"].tolist() == [0] * 4 + [1] * 4 + [2] * 5  # 13 // 3, the remainder in the last
    assert table["path"].tolist() == table["subject"].tolist() == ["again.nii", *scans]
    assert table["label"].tolist() == [1, *LABELS]
    table["path"] = table["path"].replace("again.nii", "scans/001.nii")
    check_residual(table, logits_of(weights, csv, table))
    few = write_csv(tmp_path / "few.csv", zip(scans[:3], LABELS[:3], strict=True))
    assert explain("LRP", weights, tmp_path / "few", *given, str(few)) == 0
    assert len(read_table(tmp_path / "few" / "LRP" / "subjects.csv")) == 3
    assert contents(weights) == before
