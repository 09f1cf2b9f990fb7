"""train_cv.py: what a run writes, what it reproduces, and how it goes on."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from cohorts import (
    AFFINE,
    LABELS,
    MODEL,
    SHAPE,
    SUBJECTS,
    TRAINED,
    K,
    contents,
    load_network,
    load_volume,
    only_error,
    read_nifti,
    read_table,
    voxels,
    write_csv,
    write_scan,
)
from interruptions import ends_after

import atypical
import calibration
import classifier_scores
import dataset
import figures
import heatmap
import models
import train_cv
import training
import utils
from internals import caches, devices, sharing, storage

ROOT = Path(train_cv.__file__).parent
PREDICTIONS = ["fold", "path", "label", "subject", "prob_1", "predicted"]
HISTORY = ["epoch", "train_loss", "valid_loss", "valid_accuracy", "seconds"]
SCORES = ["accuracy", "balanced_accuracy", "auc", "sensitivity", "specificity"]
CALIBRATED = [*PREDICTIONS, "prob_1_calibrated"]
PROBABLE = ["brier", "log_loss", "brier_calibrated", "log_loss_calibrated"]
PICTURES = {"training.png", "calibration.png"}
MEANS = {f"mean_{of}_f{fold}.nii.gz" for of in ("train", "controls") for fold in range(K)}
SUMMARY = {"predictions.csv", "metrics.csv", "calibration.csv", "scans.csv", "typical.csv", "model_card.md"}
SUMMARY |= PICTURES | MEANS
FOLD_0, FOLD_1 = ({f"history_f{fold}.csv", f"state_dict_f{fold}.pth"} for fold in range(K))
FILES = {"run.json", "folds.csv", *FOLD_0, *FOLD_1, *SUMMARY}


def command(csv: Path, outpath: Path, *options: str) -> list[str]:
    return ["--path", str(csv), "--outpath", str(outpath), *TRAINED, *options]


def train(csv: Path, outpath: Path, *options: str) -> int:
    return train_cv.main(command(csv, outpath, *options))


def process(*arguments: str) -> subprocess.Popen:
    """The command as users run it, in a group of processes of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    argv = [sys.executable, "-u", "train_cv.py", *arguments]
    return subprocess.Popen(argv, cwd=ROOT, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]


def load_state(folder: Path, fold: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"state_dict_f{fold}.pth", weights_only=True)


def same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def unclocked(folder: Path) -> dict[str, bytes]:
    """Every file of a run, unpacked, less the seconds that its epochs took."""
    files = {
        name: gzip.decompress(content) if name.endswith(".gz") else content
        for name, content in contents(folder).items()
    }
    for name in [name for name in files if name.startswith("history")]:
        files[name] = b"\n".join(line.rsplit(b",", 1)[0] for line in files[name].splitlines())
    return files


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def interrupt(*_: object) -> float:
    raise KeyboardInterrupt


# What a run writes -------------------------------------------------------------------------------


def test_files_and_record(run, csv):
    assert set(contents(run)) == FILES
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    found = record(run)
    assert (found["csv"], found["csv_sha256"]) == (str(csv.resolve()), storage.file_sha256(csv))
    assert (found["model"], found["seed"]) == (MODEL, 3)
    assert found["grid"] == {"shape": list(SHAPE), "affine": AFFINE.tolist()}
    assert found["versions"] == storage.package_versions()
    assert found["finished"] == [0, 1, "summary"]
    here = devices.describe(torch.device("cpu"))
    assert found["devices_per_fold"] == {"0": [here], "1": [here]}
    assert found["arguments"] == {
        "model": MODEL, "batch": 2, "fold": 2, "lr": 1e-3, "wd": 1e-4, "epochs": 2, "patience": 10,
        "delta": 0, "split": "stratified", "val_fraction": 0.34, "seed": 3, "precision": "fp32",
        "permute_labels": False,
    }  # fmt: skip


def test_tables(run, csv):
    folds, predictions = read_table(run / "folds.csv"), read_table(run / "predictions.csv")
    assert list(folds.columns) == ["fold", "role", "path", "label", "subject"]
    expected = dataset.make_folds(dataset.read_csv(csv), K, "stratified", 0.34, 3)
    assert folds.to_numpy().tolist() == expected.to_numpy().tolist()
    assert folds[:12]["path"].tolist() == [f"scans/{i:03d}.nii" for i in range(12)]
    assert folds[:12]["subject"].tolist() == SUBJECTS

    assert list(predictions.columns) == CALIBRATED
    own, tests = PREDICTIONS[:4], folds[folds["role"] == "test"]
    assert predictions[own].to_numpy().tolist() == tests[own].to_numpy().tolist()
    assert sorted(predictions["path"]) == [f"scans/{i:03d}.nii" for i in range(12)]
    assert predictions["predicted"].tolist() == (predictions["prob_1"] > 0.5).astype(int).tolist()

    metrics = pd.read_csv(run / "metrics.csv")
    bounds = [f"{name}_{end}" for name in SCORES for end in ("low", "high")]
    ends = [f"{name}_{end}" for name in PROBABLE for end in ("low", "high")]
    first = ["fold", "n", *SCORES, "tp", "tn", "fp", "fn", *bounds, "subjects"]
    assert list(metrics.columns) == [*first, *PROBABLE, *ends]
    assert list(metrics["fold"]) == ["0", "1", "pooled"]
    numbers = metrics.columns[1:]
    expected = classifier_scores.metrics_table(predictions, seed=3)[numbers].to_numpy(float)
    assert np.array_equal(metrics[numbers].to_numpy(float), expected, equal_nan=True)

    for fold in range(K):
        history = pd.read_csv(run / f"history_f{fold}.csv")
        assert list(history.columns) == HISTORY
        assert list(history["epoch"]) == [1, 2]
        assert np.isfinite(history.to_numpy()).all()
        assert (history["seconds"] > 0).all()
        right = history["valid_accuracy"] * ((folds["fold"] == fold) & (folds["role"] == "val")).sum()
        assert np.allclose(right, right.round(), rtol=0, atol=1e-6)  # whole scans, in float32


def test_probabilities_are_calibrated_on_the_validation_scans(lively_run, csv, tmp_path, monkeypatch):
    """By plain PyTorch, on the scans whose role is val; what is made of all folds is made again here."""
    given = []

    def fit(margin: np.ndarray, label: np.ndarray) -> calibration.Temperature:
        given.append((margin, label))
        return calibration.Temperature(len(given) + 1.0)

    monkeypatch.setattr(calibration, "fit_temperature", fit)
    run = Path(shutil.copytree(lively_run, tmp_path / "models"))
    (run / "calibration.csv").unlink()
    assert train(csv, run) == 0
    folds, predictions = (read_table(run / name) for name in ("folds.csv", "predictions.csv"))
    for fold, (margin, label) in enumerate(given):
        network = load_network(run / f"state_dict_f{fold}.pth")
        rows = folds[(folds["fold"] == fold) & (folds["role"] == "val")]
        with torch.no_grad():
            logits = torch.cat([network(load_volume(csv.parent / path)) for path in rows["path"]]).double()
        # float32 logits, in batches or one by one
        assert margin == pytest.approx((logits[:, 1] - logits[:, 0]).numpy(), abs=1e-5)
        assert label.tolist() == rows["label"].tolist()
        own = predictions[predictions["fold"] == fold]
        odds = np.log(own["prob_1"] / (1 - own["prob_1"])) / (fold + 2)
        expected = (1 / (1 + np.exp(-odds))).to_numpy()
        assert own["prob_1_calibrated"].to_numpy() == pytest.approx(expected, abs=1e-9)
    found = pd.read_csv(run / "calibration.csv").set_index("fold")
    assert found["temperature"].dropna().to_dict() == {"0": 2, "1": 3}
    label, prob_1 = predictions["label"].to_numpy(), predictions["prob_1_calibrated"].to_numpy()
    assert found.loc["pooled", "brier_calibrated"] == pytest.approx(((label - prob_1) ** 2).mean())


def test_what_new_scans_are_compared_with(run, csv):
    """Training scans of each fold alone; the controls' mean is heatmap.py's baseline."""
    table, folds = dataset.read_csv(csv), read_table(run / "folds.csv")
    scans = read_table(run / "scans.csv")
    assert scans["path"].tolist() == table["path"].tolist()
    assert scans["samples_sha256"].tolist() == dataset.scan_digests(table)
    volumes = {path: dataset.read_scan(file) for path, file in zip(table["path"], table["file"], strict=True)}
    typical = read_table(run / "typical.csv")
    assert typical["fold"].tolist() == [fold for fold in range(K) for _ in range(len(atypical.TRAITS) + 1)]
    for fold in range(K):
        train = folds[(folds["fold"] == fold) & (folds["role"] == "train")]
        own = np.stack([volumes[path] for path in train["path"]]).astype(np.float64)
        common = np.where((own > 0).mean(axis=0) >= 0.5, own.mean(axis=0), 0)
        controls = own[train["label"].to_numpy() == 0].mean(axis=0)
        for name, expected in (("train", common), ("controls", controls)):
            found = read_nifti(run / f"mean_{name}_f{fold}.nii.gz")
            assert np.array_equal(found.affine, AFFINE)
            # written in float32
            assert np.allclose(np.asarray(found.dataobj), expected, rtol=1e-6, atol=0)
        head = atypical.Head(common.astype(np.float32), AFFINE)
        traits = pd.DataFrame([head.traits(volumes[path]) for path in train["path"]])
        rows = typical[typical["fold"] == fold].set_index("trait").drop(index=atypical.ANY)
        for trait, row in rows.iterrows():
            assert row["training_low"] == pytest.approx(np.percentile(traits[trait], 0.5))
            assert row["training_high"] == pytest.approx(np.percentile(traits[trait], 99.5))
        assert rows[["low", "high"]].isna().all(axis=None)  # of so few scans


def test_model_card_is_of_this_run(run):
    card = (run / "model_card.md").read_text()
    metrics = pd.read_csv(run / "metrics.csv").iloc[-1]
    assert f"{metrics['auc']:.3f} [{metrics['auc_low']:.3f}, {metrics['auc_high']:.3f}]" in card
    assert "networks modelB2" in card


def test_weights_are_a_plain_published_state_dict(run):
    published = models.build_model(MODEL, SHAPE).state_dict()
    for fold in range(K):
        state = load_state(run, fold)
        assert list(state) == list(published)
        for key, value in state.items():
            assert (value.shape, value.dtype) == (published[key].shape, published[key].dtype)
            assert torch.isfinite(value).all()
        # nothing but these numbers is stored: no views into larger tensors
        size = sum(value.numel() * value.element_size() for value in state.values())
        assert (run / f"state_dict_f{fold}.pth").stat().st_size < size + 40_000
    assert not same_state(load_state(run, 0), load_state(run, 1))


def test_weights_are_those_of_the_best_epoch_and_of_the_predictions(run, csv):
    folds, predictions = read_table(run / "folds.csv"), read_table(run / "predictions.csv")
    found = []
    for fold in range(K):
        network = load_network(run / f"state_dict_f{fold}.pth")
        with torch.no_grad():
            logits = torch.cat([network(load_volume(csv.parent / path)) for path in predictions["path"]])
        found.append(logits.double().softmax(1)[:, 1].numpy())
        val = folds[(folds["fold"] == fold) & (folds["role"] == "val")]
        rows = [predictions["path"].tolist().index(path) for path in val["path"]]
        loss = F.cross_entropy(logits[rows], torch.tensor(val["label"].tolist())).item()
        losses = pd.read_csv(run / f"history_f{fold}.csv")["valid_loss"]
        assert loss == pytest.approx(losses.min(), abs=1e-5)  # float32, other batches
        assert abs(losses.diff()[1]) > 1e-4  # so the test would see the other epoch
    own, other = (np.choose(predictions["fold"].to_numpy() ^ swap, found) for swap in (0, 1))
    # float32 sums of another order: one scan at once here, two there
    assert np.allclose(predictions["prob_1"], own, rtol=0, atol=1e-5)
    assert np.abs(predictions["prob_1"] - other).min() > 1e-5  # so the test would see swapped folds


# The same again ----------------------------------------------------------------------------------


def test_folds_in_turn_give_the_same_files_as_all_at_once(run, csv, tmp_path, capsys):
    assert train(csv, tmp_path, "--run-folds", "1") == 0
    assert set(contents(tmp_path)) == {"run.json", "folds.csv", *FOLD_1}
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "not trained yet: folds [0]; tests and metrics follow with the last fold"
    assert train(csv, tmp_path, "--run-folds", "0") == 0
    assert unclocked(tmp_path) == unclocked(run)


def test_another_seed_or_fold_starts_from_other_weights():
    grid = dataset.Grid(SHAPE, AFFINE, None)  # type: ignore[arg-type]

    def start(seed: int, fold: int) -> dict[str, torch.Tensor]:
        own = utils.own_seed(seed, fold)
        return train_cv.start(MODEL, grid, 1e-3, 0, own, dataset.CPU).model.state_dict()

    assert same_state(start(3, 1), start(3, 1))
    assert not any(same_state(start(3, 1), start(*other)) for other in ((4, 1), (3, 0), (1, 3)))


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_cache_and_workers_do_not_change_the_weights(run, csv, tmp_path, cache):
    assert train(csv, tmp_path, "--run-folds", "0", "--cache", cache, "--workers", "1") == 0
    assert same_state(load_state(run, 0), load_state(tmp_path, 0))


def test_second_call_keeps_everything(run_copy, csv, capsys):
    before, written = contents(run_copy), times(run_copy)
    assert train(csv, run_copy) == 0
    assert (contents(run_copy), times(run_copy)) == (before, written)
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "fold 0: finished before, kept",
        "fold 1: finished before, kept",
        f"written to {run_copy}: state_dict_f*.pth, predictions.csv, metrics.csv, training.png, "
        "calibration.png, model_card.md",
    ]


def test_loader_shuffles_training_and_nothing_else(csv):
    cohort = dataset.new_cohort(csv, K, "stratified", 0.34, 3)
    scans = dataset.ScanDataset(cohort.table, np.arange(12, dtype=np.float32).reshape(12, 1, 1, 1))
    load = train_cv.batches(cohort, lambda fold: scans, batch=2, workers=0, seed=3, device=dataset.CPU)

    def order(fold: int, role: str) -> list[list[int]]:
        loader = load(fold, role)
        return [[int(i) for volume, _ in loader for i in volume.flatten()] for _ in range(8)]

    expected, passes = cohort.scan_indices(0, "train"), order(0, "train")
    assert all(sorted(once) == expected for once in passes)
    assert len({tuple(once) for once in passes}) > 1
    assert order(0, "train") == passes
    ranks = [[sorted(once).index(i) for i in once] for once in order(1, "train")]
    assert ranks != [[expected.index(i) for i in once] for once in passes]  # a seed of the fold's own
    for role in ("val", "test"):
        assert order(0, role) == [cohort.scan_indices(0, role)] * 8


# Scans that were checked before, and that were not -------------------------------------------------


@pytest.fixture
def own_csv(csv, tmp_path) -> Path:
    """The scans and their CSV, to be changed."""
    return Path(shutil.copytree(csv.parent, tmp_path / "cohort")) / "data.csv"


def test_files_are_looked_at_again_where_one_changed(own_csv, tmp_path, monkeypatch, capsys):
    out, honest, looked = tmp_path / "models", dataset.check_grid, list[int]()
    monkeypatch.setattr(dataset, "check_grid", lambda table: looked.append(len(table)) or honest(table))
    monkeypatch.setattr(training, "train_epoch", interrupt)

    def call(*options: str, status: int = 130) -> list[int]:
        looked.clear()
        assert train(own_csv, out, *options) == status
        return looked

    assert call() == [12]
    mark = record(out)["scans_mark"]
    assert mark == dataset.check_scans(dataset.read_csv(own_csv), {}).mark
    for options in (
        [],
        ["--run-folds", "1"],
        ["--overwrite"],
        ["--epochs", "1", "--overwrite"],
        ["--overwrite"],
    ):
        assert call(*options) == []
        assert record(out)["scans_mark"] == mark
    os.utime(own_csv.parent / "scans" / "003.nii", ns=(0, 0))
    assert call() == [12]
    assert record(out)["scans_mark"] != mark
    assert call() == []
    (out / "run.json").write_text("{")
    capsys.readouterr()
    assert call(status=2) == [12]
    assert "run.json" in only_error(capsys.readouterr().err)
    assert call("--overwrite") == [12]
    assert call() == []


@pytest.mark.parametrize("workers", ["0", "1"])
def test_bad_voxels_among_many_scans_are_said_when_they_are_read(
    own_csv, tmp_path, monkeypatch, capsys, workers
):
    bad, out = own_csv.parent / "scans" / "003.nii", tmp_path / "models"
    write_scan(bad, np.where(voxels(3) > 900, np.nan, 1).astype(np.float32))
    for most, written in [(12, set()), (11, {"run.json", "folds.csv"})]:
        monkeypatch.setattr(caches, "CHECKED_AHEAD", most)
        assert train(own_csv, out, "--cache", "none", "--workers", workers) == 2
        assert f"{bad.name}: has voxels that are NaN or infinite" in only_error(capsys.readouterr().err)
        assert {file.name for file in out.glob("*")} - {"progress_f0.pth"} == written


# Interrupted -------------------------------------------------------------------------------------

# after: the last epoch of a fold, before its progress is saved; the progress of an epoch; the last file of a
# fold, before the record says that it is finished; the last file of the summary
MOMENTS = [
    (training, "evaluate", 4, [0], {*FOLD_0, "progress_f1.pth"}),
    (storage, "write_tensors", 1, [], {"progress_f0.pth"}),
    (storage, "write_tensors", 6, [0], {*FOLD_0, *FOLD_1, "progress_f1.pth"}),
    (
        figures,
        "draw_training",
        1,
        [0, 1],
        {*FOLD_0, *FOLD_1, *SUMMARY} - {"calibration.png", "model_card.md"},
    ),
]


@pytest.mark.parametrize(("module", "step", "call", "finished", "there"), MOMENTS)
def test_interrupted_run_goes_on(
    csv, run, tmp_path, monkeypatch, capsys, module, step, call, finished, there
):
    """Bit for bit."""
    with monkeypatch.context() as patch:
        ends_after(patch, module, step, call)
        assert train(csv, tmp_path) == 130
    assert capsys.readouterr().err.startswith("interrupted: finished folds and epochs are saved")
    assert set(contents(tmp_path)) == {"run.json", "folds.csv", *there}  # and no locks
    assert record(tmp_path)["finished"] == finished
    torch.manual_seed(99)  # another process starts from another state
    assert train(csv, tmp_path) == 0
    assert unclocked(tmp_path) == unclocked(run)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signal_to_all_processes_is_one_line(csv, tmp_path, name):
    """Batch systems, and Ctrl-C, reach the processes that read scans, too. The former wait for the epoch."""
    options = ["--cache", "none", "--workers", "2", "--epochs", "50", "--patience", "50"]
    with process(*command(csv, tmp_path, *options)) as job:
        while "epoch 1:" not in job.stdout.readline():
            assert job.poll() is None
        time.sleep(0.3)
        os.killpg(job.pid, getattr(signal, name))
        out, errors = job.communicate(timeout=60)
    assert job.returncode == 128 + getattr(signal, name)
    *said, last = errors.splitlines()
    assert last.startswith("interrupted: "), errors
    waits = [f"{name}: this step is finished and saved first; again ends it at once"]
    assert said == ([] if name == "SIGINT" else waits)
    saved = torch.load(tmp_path / "progress_f0.pth", weights_only=True)["state"]["history"]
    assert len(saved) == 1 + out.count("fold 0, epoch")  # the last one that was begun, but for Ctrl-C
    assert len(saved) > 1 or name == "SIGINT"


def test_output_that_nobody_reads_is_one_line(csv, tmp_path):
    with process(*command(csv, tmp_path)) as job:
        job.stdout.readline()
        job.stdout.close()
        line = only_error(job.stderr.read())
    assert job.returncode == 1
    assert "standard output was closed" in line


# Several processes in one folder, and overwriting ------------------------------------------------


def test_processes_of_torchrun_share_the_folds(csv, run, tmp_path, monkeypatch, capsys):
    """The last makes what is made of all folds; one that has no fold says so."""
    monkeypatch.setattr(sharing, "share_threads", lambda: None)  # the reference had as many as there are
    for rank, said in [(2, "no fold is left"), (1, "not trained yet: folds [0]"), (0, "written to")]:
        for name, value in {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 3}.items():
            monkeypatch.setenv(name, str(value))
        assert train(csv, tmp_path) == 0
        assert said in capsys.readouterr().out
    assert unclocked(tmp_path) == unclocked(run)
    assert train(csv, tmp_path, "--overwrite") == 2
    assert "--overwrite: one of several processes" in only_error(capsys.readouterr().err)
    assert train(csv, tmp_path, "--device", "cuda:1") == 2
    assert "--device cuda:1: torchrun started 3 processes here" in only_error(capsys.readouterr().err)


def test_status(csv, run, tmp_path, capsys):
    assert train_cv.main(["--status", "--outpath", str(run)]) == 0
    assert capsys.readouterr().out == "fold 0: finished\nfold 1: finished\nsummary: finished\n"
    assert train(csv, tmp_path, "--run-folds", "1") == 0
    capsys.readouterr()
    with storage.locked(tmp_path / ".lock-fold_0"):
        assert train_cv.main(["--status", "--outpath", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "fold 0: running\nfold 1: finished\nsummary: open\n"
    assert train_cv.main(["--outpath", str(tmp_path)]) == 2
    assert "the following arguments are required: --path" in only_error(capsys.readouterr().err)


def test_two_jobs_at_once_share_a_folder(csv, run, tmp_path, monkeypatch):
    """A job array: fold 1 is trained by another call, while fold 0 is."""
    honest, others = train_cv.train_fold, [["--run-folds", "1"]]

    def busy(*args):
        if others:
            assert train(csv, tmp_path, *others.pop()) == 0
            assert not SUMMARY & set(contents(tmp_path))
        return honest(*args)

    monkeypatch.setattr(train_cv, "train_fold", busy)
    # the inner call draws random numbers, so the outer one must have drawn its weights before
    assert train(csv, tmp_path, "--run-folds", "0") == 0
    assert unclocked(tmp_path).keys() == FILES
    assert record(tmp_path)["finished"] == [0, 1, "summary"]
    assert same_state(load_state(tmp_path, 1), load_state(run, 1))


def test_array_of_jobs_that_overwrite_starts_together(run_copy, csv, run):
    """Real processes; each removes its own fold of an earlier run, whatever the other does meanwhile."""
    before, options = times(run_copy), command(csv, run_copy, "--overwrite", "--run-folds")
    jobs = [process(*options, fold) for fold in "01"]
    said = [job.communicate()[1] for job in jobs]
    assert ([job.returncode for job in jobs], said) == ([0, 0], ["", ""])
    assert all(times(run_copy)[name] > before[name] for name in FOLD_0 | FOLD_1)
    there, here = unclocked(run_copy), unclocked(run)
    for files in (there, here):
        for name in ("metrics.csv", "model_card.md"):
            assert files.pop(name)  # of a thousand draws there, of fifty here
    assert there == here


def test_jobs_of_single_folds_share_a_cache_on_disk(csv, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train_epoch", interrupt)
    assert train(csv, tmp_path, "--cache", "auto", "--run-folds", "0") == 130
    assert len(list((tmp_path / "cache").glob("scans-*.float32"))) == 1


def test_overwrite_of_one_fold_keeps_the_others(run_copy, csv, run, monkeypatch, capsys):
    """What is about to be removed need not be readable."""
    (run_copy / "state_dict_f0.pth").write_bytes(b"cut")
    kept = {name: content for name, content in contents(run_copy).items() if name in {*FOLD_1, "folds.csv"}}
    assert train(csv, run_copy, "--run-folds", "1", "--overwrite") == 2
    assert "state_dict_f0.pth" in only_error(capsys.readouterr().err)
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", interrupt)
        assert train(csv, run_copy, "--run-folds", "0", "--overwrite") == 130
    assert set(contents(run_copy)) == {*kept, "run.json"}
    assert contents(run_copy).items() >= kept.items()
    assert train(csv, run_copy, "--run-folds", "0", "--overwrite") == 0
    assert unclocked(run_copy) == unclocked(run)


def test_overwrite_starts_afresh_and_leaves_other_files(run_copy, csv):
    for name in ("notes.txt", "state_dict_f0.pth", "state_dict_f4.pth", ".partial-history_f4.csv"):
        (run_copy / name).write_text("mine, or of a run of five folds")
    assert train(csv, run_copy, "--epochs", "1", "--overwrite") == 0
    assert set(contents(run_copy)) == {*FILES, "notes.txt"}
    assert len(pd.read_csv(run_copy / "history_f0.csv")) == 1


# Other ways to train -----------------------------------------------------------------------------


def test_bf16_trains_float32_weights_of_its_own(run, csv, tmp_path):
    assert train(csv, tmp_path, "--precision", "bf16", "--run-folds", "0") == 0
    state = load_state(tmp_path, 0)
    assert not same_state(state, load_state(run, 0))
    assert all(torch.isfinite(value).all() for value in state.values())
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    losses = [pd.read_csv(folder / "history_f0.csv")["train_loss"][0] for folder in (tmp_path, run)]
    # one epoch of two steps: bfloat16 keeps 8 bits, so the loss agrees to a few percent
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_headerless_csv_and_contiguous_split(csv, tmp_path):
    rows = [(csv.parent / f"scans/{i:03d}.nii", label) for i, label in enumerate(LABELS[:11])]
    plain = write_csv(tmp_path / "plain.csv", rows)
    options = ["--split", "contiguous", "--val-fraction", "0.4", "--epochs", "1"]
    assert train(plain, tmp_path / "out", *options) == 0
    predictions = read_table(tmp_path / "out" / "predictions.csv")
    assert predictions["path"].tolist() == predictions["subject"].tolist() == [str(path) for path, _ in rows]
    assert predictions["fold"].tolist() == [0] * 5 + [1] * 6  # 11 // 2, the remainder in the last


# Permuted labels ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def permuted(csv, tmp_path_factory) -> Path:
    """A run on permuted labels; read only."""
    folder = tmp_path_factory.mktemp("permuted")
    assert train(csv, folder, "--permute-labels") == 0
    return folder


def test_permuted_labels_are_what_training_sees_and_tests_do_not(permuted, run, csv, tmp_path, monkeypatch):
    seen: dict[tuple[int, ...], list[int]] = {}
    honest = training.train_epoch

    def note(state, loader, precision, name):
        chosen = loader.dataset
        seen[tuple(chosen.indices)] = [chosen[i][1] for i in range(len(chosen))]
        return honest(state, loader, precision, name)

    monkeypatch.setattr(training, "train_epoch", note)
    assert train(csv, tmp_path, "--permute-labels") == 0
    cohort = dataset.new_cohort(csv, K, "stratified", 0.34, 3)
    assert len(seen) == K
    for fold in range(K):
        rows = cohort.scan_indices(fold, "train")
        assert seen[tuple(rows)] == cohort.permuted_labels(fold, 3)[rows].tolist()
    folds, tests = (pd.read_csv(permuted / name, dtype=str) for name in ("folds.csv", "predictions.csv"))
    assert folds.equals(pd.read_csv(run / "folds.csv", dtype=str))  # labels as they are
    assert tests["label"].tolist() == pd.read_csv(run / "predictions.csv", dtype=str)["label"].tolist()
    assert not same_state(load_state(permuted, 0), load_state(run, 0))


def test_run_on_permuted_labels_is_another_run(permuted, run_copy, csv, tmp_path, capsys):
    """And a record of an earlier version, which does not say so, is of labels as they are."""
    copy = Path(shutil.copytree(permuted, tmp_path / "copy"))
    for folder, options, words in (
        (copy, [], "True there, False now"),
        (run_copy, ["--permute-labels"], "False there"),
    ):
        assert train(csv, folder, *options) == 2
        assert f"permute_labels ({words}" in only_error(capsys.readouterr().err)
    record = storage.read_json(run_copy / "run.json")
    del record["arguments"]["permute_labels"]
    storage.write_json(record, run_copy / "run.json")
    assert train(csv, run_copy, "--permute-labels") == 2
    assert "permute_labels (False there, True now)" in only_error(capsys.readouterr().err)
    assert train(csv, run_copy) == 0
    assert "fold 1: finished before, kept" in capsys.readouterr().out


def test_maps_of_a_run_on_permuted_labels_say_so(permuted, tmp_path):
    options = [
        "--modelpath",
        str(permuted),
        "--outpath",
        str(tmp_path),
        "--run-folds",
        "1",
        "--device",
        "cpu",
    ]
    assert heatmap.main(["--method", "GGC", "Gradient", *options]) == 0
    assert heatmap.main(["--method", "GGC", "--weights", "random", *options]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"GGC-permuted", "Gradient-permuted", "GGC-random"}
