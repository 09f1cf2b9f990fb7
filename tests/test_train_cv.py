"""train_cv.py: what a run writes, what it reproduces, how it goes on, and how it refuses."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    contents,
    load_network,
    load_volume,
    only_error,
    voxels,
    write_cohort,
    write_csv,
    write_scan,
)
from torch.utils.data import DataLoader

import classifier_scores
import dataset
import figures
import models
import train_cv
from internals import devices, storage
from internals.errors import InputError

ROOT = Path(train_cv.__file__).parent
K = 2
FAST = ["--model", MODEL, "--device", "cpu", "--batch", "2", "--fold", str(K), "--lr", "1e-3"]
FAST += ["--epochs", "2", "--val-fraction", "0.34", "--seed", "3"]
PREDICTIONS = ["fold", "path", "label", "subject", "prob_1", "predicted"]
TEXT = {"path": str, "subject": str}
SCORES = ["accuracy", "balanced_accuracy", "auc", "sensitivity", "specificity"]


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    """Fifty bootstrap draws in place of a thousand, for speed; test_metrics.py has the bootstrap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_scores, "DRAWS", 50)
        yield


@pytest.fixture(scope="module")
def csv(tmp_path_factory) -> Path:
    """Twelve scans and their CSV; read only."""
    return write_cohort(tmp_path_factory.mktemp("cohort"))


def train(csv: Path, outpath: Path, *options: str) -> int:
    where = ["--path", str(csv), "--outpath", str(outpath), "--cache", "ram"]
    return train_cv.main([*where, *FAST, *options])


@pytest.fixture(scope="module")
def run(csv, tmp_path_factory) -> Path:
    """A finished run of two folds; read only."""
    folder = tmp_path_factory.mktemp("run") / "models"
    assert train(csv, folder) == 0
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The finished run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def read_table(path: Path) -> pd.DataFrame:
    """A CSV as it stands: "NA" is a subject, "007" is not 7."""
    return pd.read_csv(path, dtype=TEXT, keep_default_na=False)


def load_state(folder: Path, fold: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"state_dict_f{fold}.pth", weights_only=True)


def same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# What a run writes -------------------------------------------------------------------------------


def test_defaults_are_the_specified_ones():
    args = vars(train_cv.get_parser().parse_args(["--path", "data.csv"]))
    assert args == {
        "path": Path("data.csv"),
        "outpath": Path("models"),
        "model": "modelA24",
        "device": "auto",
        "batch": 5,
        "fold": 5,
        "lr": 1e-4,
        "wd": 1e-4,
        "epochs": 200,
        "patience": 10,
        "delta": 0,
        "split": "stratified",
        "val_fraction": 0.2,
        "seed": 0,
        "run_folds": None,
        "precision": "fp32",
        "workers": args["workers"],
        "cache": "auto",
        "overwrite": False,
    }


def test_run_writes_these_files_and_no_others(run):
    names = {"run.json", "folds.csv", "predictions.csv", "metrics.csv", "training.png"}
    names |= {
        f"{stem.format(fold)}" for stem in ("state_dict_f{}.pth", "history_f{}.csv") for fold in range(K)
    }
    assert set(contents(run)) == names
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")


def test_run_record(run, csv):
    record = json.loads((run / "run.json").read_text())
    assert record["csv"] == str(csv.resolve())
    assert record["csv_sha256"] == storage.sha256(csv)
    assert (record["model"], record["seed"]) == (MODEL, 3)
    assert record["grid"] == {"shape": list(SHAPE), "affine": AFFINE.tolist()}
    assert record["versions"] == storage.versions()
    wanted = {
        "batch": 2,
        "fold": 2,
        "lr": 1e-3,
        "epochs": 2,
        "wd": 1e-4,
        "patience": 10,
        "split": "stratified",
    }
    assert record["arguments"].items() >= wanted.items()


def test_folds_table(run, csv):
    folds = read_table(run / "folds.csv")
    assert list(folds.columns) == ["fold", "role", "path", "label", "subject"]
    expected = dataset.make_folds(dataset.read_csv(csv), K, "stratified", 0.34, 3)
    assert folds.to_numpy().tolist() == expected.to_numpy().tolist()
    assert folds[:12]["path"].tolist() == [f"scans/{i:03d}.nii" for i in range(12)]
    assert folds[:12]["subject"].tolist() == SUBJECTS


def test_weights_are_a_plain_published_state_dict(run):
    published = models.build_model(MODEL, SHAPE).state_dict()
    for fold in range(K):
        state = load_state(run, fold)
        assert list(state) == list(published)
        for key, value in state.items():
            assert (value.shape, value.dtype) == (published[key].shape, published[key].dtype)
            assert value.is_contiguous()
            assert value.device.type == "cpu"
            assert torch.isfinite(value).all()
        # nothing but these numbers is stored: no views into larger tensors
        size = sum(value.numel() * value.element_size() for value in state.values())
        assert (run / f"state_dict_f{fold}.pth").stat().st_size < size + 40_000
    assert not same_state(load_state(run, 0), load_state(run, 1))


def test_history_has_a_row_per_epoch(run):
    folds = read_table(run / "folds.csv")
    for fold in range(K):
        history = pd.read_csv(run / f"history_f{fold}.csv")
        assert list(history.columns) == ["epoch", "train_loss", "valid_loss", "valid_accuracy", "seconds"]
        assert list(history["epoch"]) == [1, 2]
        assert np.isfinite(history.to_numpy()).all()
        assert (history["seconds"] > 0).all()
        right = history["valid_accuracy"] * len(dataset.rows(folds, fold, "val"))
        assert np.allclose(right, right.round(), rtol=0, atol=1e-6)  # whole scans, in float32


def test_predictions_hold_every_scan_once_from_its_own_test_fold(run):
    predictions, folds = read_table(run / "predictions.csv"), read_table(run / "folds.csv")
    assert list(predictions.columns) == PREDICTIONS
    tests = folds[folds["role"] == "test"]
    columns = ["fold", "path", "label", "subject"]
    assert predictions[columns].to_numpy().tolist() == tests[columns].to_numpy().tolist()
    assert sorted(predictions["path"]) == [f"scans/{i:03d}.nii" for i in range(12)]
    assert predictions["predicted"].tolist() == (predictions["prob_1"] > 0.5).astype(int).tolist()


def test_predictions_are_those_of_the_saved_weights(run, csv):
    predictions = read_table(run / "predictions.csv")
    found: dict[int, list[float]] = {0: [], 1: []}
    for fold in range(K):
        network = load_network(run / f"state_dict_f{fold}.pth")
        for path in predictions["path"]:
            with torch.no_grad():
                logits = network(load_volume(csv.parent / path))
            found[fold].append(float(logits.double().softmax(1)[0, 1]))
    own, other = (
        np.choose(predictions["fold"].to_numpy() ^ swap, [np.array(found[0]), np.array(found[1])])
        for swap in (0, 1)
    )
    # float32 sums of another order: one scan at once here, two there
    assert np.allclose(predictions["prob_1"], own, rtol=0, atol=1e-5)
    assert np.abs(predictions["prob_1"] - other).min() > 1e-5  # so the test would see swapped folds


def test_saved_weights_are_those_of_the_best_epoch(run, csv):
    folds = read_table(run / "folds.csv")
    for fold in range(K):
        network = load_network(run / f"state_dict_f{fold}.pth")
        val = folds[(folds["fold"] == fold) & (folds["role"] == "val")]
        with torch.no_grad():
            logits = torch.cat([network(load_volume(csv.parent / path)) for path in val["path"]])
        loss = F.cross_entropy(logits, torch.tensor(val["label"].tolist())).item()
        history = pd.read_csv(run / f"history_f{fold}.csv")
        assert loss == pytest.approx(history["valid_loss"].min(), abs=1e-5)  # float32, other batches
        assert abs(history["valid_loss"].diff()[1]) > 1e-4  # so the test would see the other epoch


def test_metrics_table(run):
    predictions = read_table(run / "predictions.csv")
    found = pd.read_csv(run / "metrics.csv")
    bounds = [f"{name}_{end}" for name in SCORES for end in ("low", "high")]
    assert list(found.columns) == ["fold", "n", *SCORES, "tp", "tn", "fp", "fn", *bounds, "subjects"]
    assert list(found["fold"]) == ["0", "1", "pooled"]
    expected = classifier_scores.metrics_table(predictions, seed=3)
    numbers = found.columns[1:]
    assert np.array_equal(found[numbers].to_numpy(float), expected[numbers].to_numpy(float), equal_nan=True)


# Reproducing, going on, starting again -----------------------------------------------------------


@pytest.fixture(scope="module")
def in_turn(csv, tmp_path_factory) -> Path:
    """The same run, fold by fold and backwards; read only."""
    folder = tmp_path_factory.mktemp("turn") / "models"
    assert train(csv, folder, "--run-folds", "1") == 0
    assert set(contents(folder)) == {"run.json", "folds.csv", "state_dict_f1.pth", "history_f1.csv"}
    assert train(csv, folder, "--run-folds", "0") == 0
    return folder


@pytest.mark.parametrize("fold", range(K))
def test_same_seed_gives_the_same_weights_bit_for_bit(run, in_turn, fold):
    assert same_state(load_state(run, fold), load_state(in_turn, fold))


@pytest.mark.parametrize("name", ["predictions.csv", "metrics.csv", "folds.csv", "run.json"])
def test_folds_in_turn_give_the_same_files_as_all_at_once(run, in_turn, name):
    assert (in_turn / name).read_bytes() == (run / name).read_bytes()


def test_another_seed_or_fold_starts_from_other_weights():
    grid = dataset.Grid(SHAPE, AFFINE, None)  # type: ignore[arg-type]

    def start(seed: int, fold: int) -> dict[str, torch.Tensor]:
        return train_cv.new_training(MODEL, grid, torch.device("cpu"), 1e-3, 0, seed, fold)[0].state_dict()

    assert same_state(start(3, 1), start(3, 1))
    assert not same_state(start(3, 1), start(4, 1))
    assert not same_state(start(3, 1), start(3, 0))
    assert not same_state(start(0, 1), start(1, 0))


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_cache_and_workers_do_not_change_the_weights(run, csv, tmp_path, cache):
    assert train(csv, tmp_path, "--run-folds", "0", "--cache", cache, "--workers", "1") == 0
    assert same_state(load_state(run, 0), load_state(tmp_path, 0))


def test_second_call_keeps_the_folds(copy, csv, capsys):
    kept = [copy / f"state_dict_f{fold}.pth" for fold in range(K)]
    times = [path.stat().st_mtime_ns for path in kept]
    before = contents(copy)
    assert train(csv, copy) == 0
    assert [path.stat().st_mtime_ns for path in kept] == times
    after = contents(copy)
    for name in ("predictions.csv", "metrics.csv", "history_f0.csv", "run.json", "folds.csv"):
        assert after[name] == before[name]
    assert capsys.readouterr().out.count("finished before, kept") == K


def test_lost_fold_is_trained_again_and_the_other_is_kept(copy, run, csv):
    (copy / "state_dict_f1.pth").unlink()
    time = (copy / "state_dict_f0.pth").stat().st_mtime_ns
    assert train(csv, copy) == 0
    assert (copy / "state_dict_f0.pth").stat().st_mtime_ns == time
    assert same_state(load_state(copy, 1), load_state(run, 1))
    assert (copy / "predictions.csv").read_bytes() == (run / "predictions.csv").read_bytes()


# Interrupted in the middle of an epoch, between two files of a fold, and while the summary is written.
MOMENTS = [("evaluate", 1), ("evaluate", 2), ("evaluate", 4), ("save_progress", 2), ("draw_training", 1)]
MOMENTS += [("check_loss", 3), ("check_loss", 9), ("predict_test", 2), ("weights", 1), ("new_training", 2)]


@pytest.mark.parametrize(("step", "call"), MOMENTS)
def test_interrupted_run_goes_on_bit_for_bit(csv, run, tmp_path, monkeypatch, capsys, step, call):
    module = figures if step == "draw_training" else train_cv
    honest = getattr(module, step)
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, step, interrupted)
        assert train(csv, tmp_path) == 143
    assert capsys.readouterr().err.startswith("interrupted: finished folds and epochs are saved")
    assert not {"metrics.csv", ".lock"} & set(contents(tmp_path)) or step == "draw_training"
    torch.manual_seed(99)  # another process starts from another state
    assert train(csv, tmp_path) == 0
    assert unclocked(tmp_path) == unclocked(run)


def unclocked(folder: Path) -> dict[str, bytes]:
    """Every file of a run, less the seconds that its epochs took."""
    files = dict(contents(folder))
    for name in [name for name in files if name.startswith("history")]:
        files[name] = b"\n".join(line.rsplit(b",", 1)[0] for line in files[name].splitlines())
    return files


def test_fold_that_another_process_trains_is_refused(copy, csv, run, capsys):
    before = contents(copy)
    program = "import sys; from internals import storage; from pathlib import Path\n"
    program += "with storage.claimed(Path(sys.argv[1]), ['fold 1']): input()"
    command = [sys.executable, "-c", program, str(copy)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True) as other:
        while not (copy / ".lock-fold_1").exists():
            time.sleep(0.05)
        for options in ([], ["--run-folds", "1"], ["--overwrite"]):
            assert train(csv, copy, *options) == 2
            assert "another process is at work" in only_error(capsys.readouterr().err)
        assert train(csv, copy, "--run-folds", "0") == 0
        assert contents(copy) == before | {".lock-fold_1": b""}
        assert train(csv, copy, "--overwrite", "--run-folds", "0") == 0  # the fold of its own, and no other
        other.communicate("done")
    assert unclocked(copy) == unclocked(run)


def test_checkpoint_without_its_history_is_not_taken_for_that_of_a_new_one(copy, run, csv, monkeypatch):
    """The history is lost, the fold is trained again, and killed between the two files of its end."""
    (copy / "history_f1.csv").unlink()
    with (copy / "state_dict_f1.pth").open("ab") as stream:
        stream.write(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_tensors", _interrupt_at_checkpoints(storage.write_tensors))
        assert train(csv, copy) == 143
    assert (copy / "history_f1.csv").exists()
    assert train(csv, copy) == 0
    assert unclocked(copy) == unclocked(run)


def _interrupt_at_checkpoints(honest):
    def write(record, path: Path) -> None:
        if path.name.startswith("state_dict"):
            os.kill(os.getpid(), signal.SIGTERM)
        honest(record, path)

    return write


def test_scans_that_changed_meanwhile_are_refused(copy, csv, tmp_path, capsys):
    shutil.copytree(csv.parent, tmp_path / "cohort")
    write_scan(tmp_path / "cohort" / "scans" / "004.nii", voxels(4) // 2)
    assert train(tmp_path / "cohort" / "data.csv", copy) == 2
    assert "scans_sha256" in only_error(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_to_all_processes_is_one_line(csv, tmp_path, name):
    """Batch systems, and Ctrl-C, reach the processes that read scans, too."""
    command = [
        sys.executable,
        str(ROOT / "train_cv.py"),
        "--path",
        str(csv),
        "--outpath",
        str(tmp_path),
        *FAST,
    ]
    command += ["--cache", "none", "--workers", "2", "--epochs", "50", "--patience", "50"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        while "epoch 1:" not in run.stdout.readline():
            assert run.poll() is None
        time.sleep(0.3)
        os.killpg(run.pid, getattr(signal, name))
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + getattr(signal, name)
    assert errors.startswith("interrupted: "), errors
    assert errors.count("\n") == 1, errors


def test_output_that_nobody_reads_is_one_line(csv, tmp_path):
    command = [
        sys.executable,
        "-u",
        str(ROOT / "train_cv.py"),
        "--path",
        str(csv),
        "--outpath",
        str(tmp_path),
    ]
    with subprocess.Popen(
        [*command, *FAST], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr is not None
        line = only_error(run.stderr.read())
    assert run.returncode == 1
    assert "standard output was closed" in line


def test_folds_csv_that_was_edited_is_refused(copy, csv, capsys):
    (copy / "folds.csv").write_text((copy / "folds.csv").read_text().replace("train", "val", 1))
    assert train(csv, copy) == 2
    assert "folds.csv" in only_error(capsys.readouterr().err)


def test_damaged_progress_is_one_line(csv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_cv.Fold, "finish", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert train(csv, tmp_path) == 143
    progress = tmp_path / "progress_f0.pth"
    progress.write_bytes(progress.read_bytes()[:-1000])
    capsys.readouterr()
    assert train(csv, tmp_path) == 2
    assert "progress_f0.pth: is damaged" in only_error(capsys.readouterr().err)


def test_two_jobs_at_once_share_a_folder(csv, run, tmp_path, monkeypatch):
    """A job array: fold 1 is trained by another call, while fold 0 is."""
    honest = train_cv.train_fold
    others = [["--run-folds", "1"]]

    def busy(*args):
        if others:
            assert train(csv, tmp_path, *others.pop()) == 0
        return honest(*args)

    monkeypatch.setattr(train_cv, "train_fold", busy)
    # the inner call draws random numbers, so the outer one must have drawn its weights before
    assert train(csv, tmp_path, "--run-folds", "0") == 0
    assert {"predictions.csv", "metrics.csv", "training.png"} <= set(contents(tmp_path))
    assert same_state(load_state(tmp_path, 1), load_state(run, 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "2e-3"], ["lr", "0.001", "0.002"]),
        (["--seed", "4"], ["seed", "3", "4"]),
        (["--model", "modelB1"], ["model", "modelB1", "modelB2"]),
        (["--fold", "3"], ["fold", "2", "3"]),
        (["--precision", "bf16"], ["precision", "bf16", "fp32"]),
    ],
)
def test_other_arguments_are_refused(run, csv, capsys, options, words):
    before = contents(run)
    assert train(csv, run, *options) == 2
    line = only_error(capsys.readouterr().err)
    assert all(word in line for word in [*words, "--overwrite"])
    assert "patience" not in line  # which is the same in both runs
    assert contents(run) == before


def test_other_scans_are_refused(run, csv, capsys):
    before = contents(run)
    rows = [(f"scans/{i:03d}.nii", label) for i, label in enumerate(LABELS)]
    assert train(write_csv(csv.with_name("other.csv"), rows), run) == 2
    line = only_error(capsys.readouterr().err)
    assert "csv" in line
    assert "patience" not in line
    assert contents(run) == before


def test_overwrite_starts_afresh_and_leaves_other_files(copy, csv):
    (copy / "notes.txt").write_text("mine")
    (copy / "state_dict_f4.pth").write_text("of a run of five folds")
    assert train(csv, copy, "--epochs", "1", "--overwrite") == 0
    names = {"run.json", "folds.csv", "notes.txt", "predictions.csv", "metrics.csv", "training.png"}
    names |= {f"{name}_f{fold}{suffix}" for fold in range(K) for name, suffix in FOLD_FILES}
    assert set(contents(copy)) == names
    assert (copy / "notes.txt").read_text() == "mine"
    assert len(pd.read_csv(copy / "history_f0.csv")) == 1


FOLD_FILES = [("state_dict", ".pth"), ("history", ".csv")]


def test_overwrite_of_one_fold_keeps_the_others(copy, csv, run):
    """As in a job array whose script says --overwrite: each job removes its own fold, and the summary."""
    kept = {name: content for name, content in contents(copy).items() if "_f1" in name or "folds" in name}
    before = (copy / "history_f0.csv").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_cv, "train_epoch", _interrupt)
        assert train(csv, copy, "--run-folds", "0", "--overwrite") == 130
    assert set(contents(copy)) == {*kept, "run.json"}
    assert contents(copy).items() >= kept.items()
    assert train(csv, copy, "--run-folds", "0", "--overwrite") == 0
    assert (copy / "history_f0.csv").stat().st_mtime_ns != before
    assert unclocked(copy) == unclocked(run)


def _interrupt(*_: object) -> float:
    raise KeyboardInterrupt


def test_overwrite_of_one_fold_by_another_run_is_refused(copy, csv, capsys):
    """The other folds would be of other arguments."""
    before = contents(copy)
    assert train(csv, copy, "--epochs", "1", "--run-folds", "0", "--overwrite") == 2
    line = only_error(capsys.readouterr().err)
    assert all(word in line for word in ["epochs (", "1 now", "--overwrite without --run-folds"])
    record = storage.read_json(copy / "run.json")
    storage.write_json(record | {"devices_per_fold": {"0": "GPU"}}, copy / "run.json")
    assert train(csv, copy, "--run-folds", "0", "--overwrite") == 2
    assert "run.json: is damaged: '0' is 'GPU'" in only_error(capsys.readouterr().err)
    (copy / "run.json").write_bytes(before["run.json"])
    (copy / "folds.csv").write_text("edited")
    assert train(csv, copy, "--run-folds", "0", "--overwrite") == 2
    assert "folds.csv: is not as this run wrote it" in only_error(capsys.readouterr().err)
    assert contents(copy) == before | {"folds.csv": b"edited"}


def test_overwrite_of_a_damaged_fold_mends_it(copy, csv, run, capsys):
    """What is about to be removed need not be readable."""
    (copy / "state_dict_f0.pth").write_bytes(b"cut")
    assert train(csv, copy, "--run-folds", "1", "--overwrite") == 2
    assert "state_dict_f0.pth" in only_error(capsys.readouterr().err)
    assert train(csv, copy, "--run-folds", "0", "--overwrite") == 0
    assert unclocked(copy) == unclocked(run)


def test_array_of_jobs_that_overwrite_starts_together(csv, run, tmp_path):
    """Each removes its own fold of an earlier run, whatever the other does meanwhile."""
    shutil.copytree(run, tmp_path / "models")
    checkpoints = [tmp_path / "models" / f"state_dict_f{fold}.pth" for fold in range(K)]
    before = max(checkpoint.stat().st_mtime_ns for checkpoint in checkpoints)
    options = ["--path", str(csv), "--outpath", str(tmp_path / "models"), *FAST, "--cache", "ram"]
    options += ["--overwrite"]
    jobs = [
        subprocess.Popen([sys.executable, "train_cv.py", *options, "--run-folds", fold], cwd=ROOT)
        for fold in "01"
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    assert all(checkpoint.stat().st_mtime_ns > before for checkpoint in checkpoints)
    there, here = unclocked(tmp_path / "models"), unclocked(run)
    for files in (there, here):
        assert files.pop("metrics.csv")  # of a thousand draws there, of fifty here
    assert there == here


def test_record_names_the_devices_that_a_fold_was_trained_on(copy, csv, monkeypatch):
    here = devices.describe(torch.device("cpu"))
    assert storage.read_json(copy / "run.json")["devices_per_fold"] == {"0": [here], "1": [here]}
    card = {"name": "NVIDIA H100", "cuda": "12.8", "cudnn": "9.10.2"}
    monkeypatch.setattr(devices, "describe", lambda device: card)
    assert train(csv, copy) == 0  # a visit
    assert storage.read_json(copy / "run.json")["devices_per_fold"] == {"0": [here], "1": [here]}
    with monkeypatch.context() as patch:
        patch.setattr(train_cv, "evaluate", _interrupt_after_an_epoch())
        assert train(csv, copy, "--overwrite", "--run-folds", "0") == 130
    assert storage.read_json(copy / "run.json")["devices_per_fold"] == {"0": [card], "1": [here]}
    monkeypatch.setattr(devices, "describe", lambda device: here)
    assert train(csv, copy) == 0  # it goes on elsewhere
    assert storage.read_json(copy / "run.json")["devices_per_fold"] == {"0": [card, here], "1": [here]}


def _interrupt_after_an_epoch() -> Callable[..., tuple[float, float]]:
    """An `evaluate` that is interrupted the second time."""
    evaluate, calls = train_cv.evaluate, itertools.count()

    def interrupted(*arguments: Any) -> tuple[float, float]:
        if next(calls):
            raise KeyboardInterrupt
        return evaluate(*arguments)

    return interrupted


def test_jobs_of_single_folds_share_a_cache_on_disk(csv, tmp_path, monkeypatch):
    monkeypatch.setattr(train_cv, "train_epoch", _interrupt)
    assert train(csv, tmp_path, "--cache", "auto", "--run-folds", "0") == 130
    assert len(list((tmp_path / "cache").glob("scans-*.float32"))) == 1


def test_history_that_was_deleted_is_no_traceback(copy, csv, capsys):
    (copy / "history_f1.csv").unlink()
    status = train(csv, copy)
    assert status == 0 or "history_f1.csv" in only_error(capsys.readouterr().err)


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
    assert predictions["path"].tolist() == [str(path) for path, _ in rows]
    assert predictions["subject"].tolist() == predictions["path"].tolist()
    assert predictions["fold"].tolist() == [0] * 5 + [1] * 6  # 11 // 2, the remainder in the last


# One fold ----------------------------------------------------------------------------------------


def stubbed_fold(
    monkeypatch: pytest.MonkeyPatch, losses: list[float], patience: int = 10, delta: float = 0.0
) -> tuple[int, pd.DataFrame]:
    """Train a real network with validation losses that are given; every epoch adds 1 to its last bias.

    Returns the epoch whose weights came back, and the history.
    """
    model = models.build_model("modelB1", (94, 94, 94))
    torch.nn.init.zeros_(model.linears()[1].bias)
    given = iter(losses)

    def train_epoch(model, *_):
        with torch.no_grad():
            model.linears()[1].bias += 1
        return 0.5

    monkeypatch.setattr(train_cv, "train_epoch", train_epoch)
    monkeypatch.setattr(train_cv, "evaluate", lambda *_: (next(given), 0.75))
    nothing: DataLoader = DataLoader([])  # type: ignore[arg-type]
    monkeypatch.setattr(train_cv, "save_progress", lambda *_: None)
    optimiser = torch.optim.Adam(model.parameters())
    course = train_cv.train_fold(
        model,
        optimiser,
        nothing,
        nothing,
        len(losses),
        patience,
        delta,
        torch.float32,
        "fold 0",
        Path("none"),
    )
    history = pd.DataFrame(course.history, columns=train_cv.HISTORY)
    return int(course.weights["classifier.3.bias"][0]), history


@pytest.mark.parametrize(
    ("losses", "patience", "delta", "best", "epochs"),
    [
        ([3, 2, 1], 1, 0, 3, 3),
        ([1, 2, 3, 4], 10, 0, 1, 4),
        ([1, 2, 3, 0.5], 2, 0, 1, 3),
        ([1, 2, 3, 0.5], 3, 0, 4, 4),
        ([1, 2, 0.9, 2, 0.8, 2, 2, 0.1], 2, 0, 5, 7),
        ([1, 1, 1, 1], 3, 0, 1, 4),
        ([1, 0.95, 0.91, 0.85, 0.8], 10, 0.1, 4, 5),
        ([1, 0.95, 0.91, 0.85, 0.8], 2, 0.1, 1, 3),
        ([1, 0.75], 10, 0.25, 1, 2),
        ([9, 2], 10, 100, 1, 2),
        ([5], 1, 0, 1, 1),
    ],
)
def test_early_stopping(monkeypatch, losses, patience, delta, best, epochs):
    epoch, history = stubbed_fold(monkeypatch, losses, patience, delta)
    assert epoch == best
    assert figures.best_row(losses[:epochs], delta) == best - 1  # the one that the figure marks
    assert history["epoch"].tolist() == list(range(1, epochs + 1))
    assert history["valid_loss"].tolist() == losses[:epochs]
    assert set(history["train_loss"]) == {0.5}
    assert set(history["valid_accuracy"]) == {0.75}


@pytest.mark.parametrize("losses", [[float("nan")], [1.0, float("nan")]])
def test_validation_loss_that_is_nan_stops(monkeypatch, losses):
    with pytest.raises(InputError, match=f"fold 0, epoch {len(losses)}"):
        stubbed_fold(monkeypatch, losses)


@pytest.fixture
def _wild_steps(monkeypatch) -> None:
    """An optimiser whose first step throws the weights out of float32's range."""
    honest = train_cv.new_training

    def new_training(*args):
        model, optimiser = honest(*args)
        optimiser.param_groups[0]["lr"] = 1e30
        return model, optimiser

    monkeypatch.setattr(train_cv, "new_training", new_training)


@pytest.mark.usefixtures("_wild_steps")
def test_loss_that_is_not_finite_stops_the_fold(csv, tmp_path, capsys):
    assert train(csv, tmp_path, "--run-folds", "1") == 2  # the second batch has no finite loss
    line = only_error(capsys.readouterr().err)
    assert all(word in line for word in ["fold 1", "epoch 1", "batch 2", "--lr"])
    assert set(contents(tmp_path)) <= {"run.json", "folds.csv"}


@pytest.mark.usefixtures("_wild_steps")
def test_weights_that_blow_up_in_the_last_step_are_not_saved(csv, tmp_path, capsys):
    # one batch holds all training scans: its own loss is fine, and what follows is not
    assert train(csv, tmp_path, "--batch", "12", "--epochs", "1", "--run-folds", "0") == 2
    line = only_error(capsys.readouterr().err)
    assert all(word in line for word in ["fold 0", "epoch 1", "--lr"])
    assert set(contents(tmp_path)) <= {"run.json", "folds.csv"}


def test_loader_shuffles_training_and_nothing_else(csv):
    table = dataset.read_csv(csv)
    folds = dataset.make_folds(table, K, "stratified", 0.34, 3)
    scans = dataset.Scans(table, np.arange(12, dtype=np.float32).reshape(12, 1, 1, 1))

    def order(role: str) -> list[list[int]]:
        loader = train_cv.make_loader(scans, folds, 0, role, batch=2, workers=0, seed=3, device=dataset.CPU)
        return [[int(i) for volume, _ in loader for i in volume.flatten()] for _ in range(8)]

    expected = dataset.rows(folds, 0, "train")
    passes = order("train")
    assert all(sorted(once) == expected for once in passes)
    assert len({tuple(once) for once in passes}) > 1
    assert order("train") == passes
    for role in ("val", "test"):
        assert order(role) == [dataset.rows(folds, 0, role)] * 8


# Mistakes ----------------------------------------------------------------------------------------


def test_as_a_script(tmp_path):
    """The command as users run it: from another folder, a mistake, one line, status 2."""
    done = subprocess.run(
        [sys.executable, ROOT / "train_cv.py", "--path", "none.csv", "--device", "cpu"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "none.csv" in only_error(done.stderr)
    assert contents(tmp_path) == {}
