"""train_cv.py: what a run writes, what it reproduces, how it goes on, and how it refuses."""

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
    read_table,
    voxels,
    write_csv,
    write_scan,
)
from interruptions import ends_after

import classifier_scores
import dataset
import figures
import models
import train_cv
import training
import utils
from internals import devices, storage

ROOT = Path(train_cv.__file__).parent
PREDICTIONS = ["fold", "path", "label", "subject", "prob_1", "predicted"]
SCORES = ["accuracy", "balanced_accuracy", "auc", "sensitivity", "specificity"]
SUMMARY = {"predictions.csv", "metrics.csv", "training.png"}
FOLD_0, FOLD_1 = ({f"history_f{fold}.csv", f"state_dict_f{fold}.pth"} for fold in range(K))
FILES = {"run.json", "folds.csv", *FOLD_0, *FOLD_1, *SUMMARY}


def command(csv: Path, outpath: Path, *options: str) -> list[str]:
    return ["--path", str(csv), "--outpath", str(outpath), *TRAINED, *options]


def train(csv: Path, outpath: Path, *options: str) -> int:
    return train_cv.main(command(csv, outpath, *options))


def load_state(folder: Path, fold: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"state_dict_f{fold}.pth", weights_only=True)


def same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def unclocked(folder: Path) -> dict[str, bytes]:
    """Every file of a run, less the seconds that its epochs took."""
    files = dict(contents(folder))
    for name in [name for name in files if name.startswith("history")]:
        files[name] = b"\n".join(line.rsplit(b",", 1)[0] for line in files[name].splitlines())
    return files


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def edit_record(folder: Path, drop: str = "", **changes: object) -> None:
    found = {name: value for name, value in record(folder).items() if name != drop}
    (folder / "run.json").write_text(json.dumps(found | changes))


def times(*files: Path) -> list[int]:
    return [file.stat().st_mtime_ns for file in files]


def interrupt(*_: object) -> float:
    raise KeyboardInterrupt


# What a run writes -------------------------------------------------------------------------------


def test_defaults_are_the_specified_ones():
    args = vars(train_cv.get_parser().parse_args(["--path", "data.csv"]))
    assert args == {
        "path": Path("data.csv"), "outpath": Path("models"), "model": "modelA24", "device": "auto",
        "batch": 5, "fold": 5, "lr": 1e-4, "wd": 1e-4, "epochs": 200, "patience": 10, "delta": 0,
        "split": "stratified", "val_fraction": 0.2, "seed": 0, "run_folds": None, "precision": "fp32",
        "workers": args["workers"], "cache": "auto", "overwrite": False,
    }  # fmt: skip


def test_run_writes_these_files_and_no_others(run):
    assert set(contents(run)) == FILES
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")


def test_run_record(run, csv):
    found = record(run)
    assert found["csv"] == str(csv.resolve())
    assert found["csv_sha256"] == storage.file_sha256(csv)
    assert (found["model"], found["seed"]) == (MODEL, 3)
    assert found["grid"] == {"shape": list(SHAPE), "affine": AFFINE.tolist()}
    assert found["versions"] == storage.package_versions()
    assert found["finished"] == [0, 1, "summary"]
    here = devices.describe(torch.device("cpu"))
    assert found["devices_per_fold"] == {"0": [here], "1": [here]}
    assert found["arguments"] == {
        "model": MODEL, "batch": 2, "fold": 2, "lr": 1e-3, "wd": 1e-4, "epochs": 2, "patience": 10,
        "delta": 0, "split": "stratified", "val_fraction": 0.34, "seed": 3, "precision": "fp32",
    }  # fmt: skip


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
        right = history["valid_accuracy"] * ((folds["fold"] == fold) & (folds["role"] == "val")).sum()
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
    found = []
    for fold in range(K):
        network = load_network(run / f"state_dict_f{fold}.pth")
        with torch.no_grad():
            logits = [network(load_volume(csv.parent / path)) for path in predictions["path"]]
        found.append(torch.cat(logits).double().softmax(1)[:, 1].numpy())
    own, other = (np.choose(predictions["fold"].to_numpy() ^ swap, found) for swap in (0, 1))
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
    found = pd.read_csv(run / "metrics.csv")
    bounds = [f"{name}_{end}" for name in SCORES for end in ("low", "high")]
    assert list(found.columns) == ["fold", "n", *SCORES, "tp", "tn", "fp", "fn", *bounds, "subjects"]
    assert list(found["fold"]) == ["0", "1", "pooled"]
    expected = classifier_scores.metrics_table(read_table(run / "predictions.csv"), seed=3)
    numbers = found.columns[1:]
    assert np.array_equal(found[numbers].to_numpy(float), expected[numbers].to_numpy(float), equal_nan=True)


# The same again ----------------------------------------------------------------------------------


def test_folds_in_turn_give_the_same_files_as_all_at_once(run, csv, tmp_path, capsys):
    assert train(csv, tmp_path, "--run-folds", "1") == 0
    assert set(contents(tmp_path)) == {"run.json", "folds.csv", *FOLD_1}
    assert record(tmp_path)["finished"] == [1]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "not trained yet: folds [0]; tests and metrics follow with the last fold"
    assert train(csv, tmp_path, "--run-folds", "0") == 0
    assert unclocked(tmp_path) == unclocked(run)


def test_another_seed_or_fold_starts_from_other_weights():
    grid = dataset.Grid(SHAPE, AFFINE, None)  # type: ignore[arg-type]

    def start(seed: int, fold: int) -> dict[str, torch.Tensor]:
        own = utils.fold_seed(seed, fold)
        return train_cv.start(MODEL, grid, 1e-3, 0, own, dataset.CPU).model.state_dict()

    assert same_state(start(3, 1), start(3, 1))
    assert not any(same_state(start(3, 1), start(*other)) for other in ((4, 1), (3, 0), (1, 3)))


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_cache_and_workers_do_not_change_the_weights(run, csv, tmp_path, cache):
    assert train(csv, tmp_path, "--run-folds", "0", "--cache", cache, "--workers", "1") == 0
    assert same_state(load_state(run, 0), load_state(tmp_path, 0))


def test_second_call_keeps_everything(run_copy, csv, capsys):
    before, written = contents(run_copy), times(*sorted(run_copy.iterdir()))
    assert train(csv, run_copy) == 0
    assert contents(run_copy) == before
    assert times(*sorted(run_copy.iterdir())) == written
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "fold 0: finished before, kept",
        "fold 1: finished before, kept",
        f"written to {run_copy}: state_dict_f*.pth, predictions.csv, metrics.csv, training.png",
    ]


def test_loader_shuffles_training_and_nothing_else(csv):
    cohort = dataset.new_cohort(csv, K, "stratified", 0.34, 3)
    scans = dataset.ScanDataset(cohort.table, np.arange(12, dtype=np.float32).reshape(12, 1, 1, 1))
    load = train_cv.batches(cohort, scans, batch=2, workers=0, seed=3, device=dataset.CPU)

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


# Interrupted -------------------------------------------------------------------------------------

# after: the last epoch of a fold, before its progress is saved; the progress of an epoch; the last file of a
# fold, before the record says that it is finished; the last file of the summary
MOMENTS = [
    (training, "evaluate", 4, [0], {*FOLD_0, "progress_f1.pth"}),
    (storage, "write_tensors", 1, [], {"progress_f0.pth"}),
    (storage, "write_tensors", 6, [0], {*FOLD_0, *FOLD_1, "progress_f1.pth"}),
    (figures, "draw_training", 1, [0, 1], {*FOLD_0, *FOLD_1, *SUMMARY}),
]


@pytest.mark.parametrize(("module", "step", "call", "finished", "there"), MOMENTS)
def test_interrupted_run_goes_on_bit_for_bit(
    csv, run, tmp_path, monkeypatch, capsys, module, step, call, finished, there
):
    with monkeypatch.context() as patch:
        ends_after(patch, module, step, call)
        assert train(csv, tmp_path) == 143
    assert capsys.readouterr().err.startswith("interrupted: finished folds and epochs are saved")
    assert set(contents(tmp_path)) == {"run.json", "folds.csv", *there}  # and no locks
    assert record(tmp_path)["finished"] == finished
    torch.manual_seed(99)  # another process starts from another state
    assert train(csv, tmp_path) == 0
    assert unclocked(tmp_path) == unclocked(run)


@pytest.mark.parametrize("lost", sorted(FOLD_1))
def test_lost_fold_is_trained_again_and_the_other_is_kept(run_copy, run, csv, monkeypatch, lost):
    """What is left of it never passes for a file of the new one, which is killed between its two files."""
    (run_copy / lost).unlink()
    (left,) = (run_copy / name for name in FOLD_1 - {lost})
    left.write_bytes(left.read_bytes() + b"old")
    kept = [run_copy / name for name in sorted(FOLD_0)]
    before = times(*kept)
    with monkeypatch.context() as patch:
        ends_after(patch, storage, "write_csv", 1)  # the history
        assert train(csv, run_copy) == 143
    assert set(contents(run_copy)) == {"run.json", "folds.csv", *FOLD_0, "history_f1.csv", "progress_f1.pth"}
    assert train(csv, run_copy) == 0
    assert times(*kept) == before
    assert unclocked(run_copy) == unclocked(run)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_to_all_processes_is_one_line(csv, tmp_path, name):
    """Batch systems, and Ctrl-C, reach the processes that read scans, too."""
    options = ["--cache", "none", "--workers", "2", "--epochs", "50", "--patience", "50"]
    with subprocess.Popen(
        [sys.executable, "train_cv.py", *command(csv, tmp_path, *options)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as job:  # fmt: skip
        assert job.stdout is not None
        while "epoch 1:" not in job.stdout.readline():
            assert job.poll() is None
        time.sleep(0.3)
        os.killpg(job.pid, getattr(signal, name))
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 128 + getattr(signal, name)
    assert errors.startswith("interrupted: "), errors
    assert errors.count("\n") == 1, errors


def test_output_that_nobody_reads_is_one_line(csv, tmp_path):
    program = [sys.executable, "-u", "train_cv.py", *command(csv, tmp_path)]
    with subprocess.Popen(
        program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        assert job.stderr is not None
        job.stdout.readline()
        job.stdout.close()
        line = only_error(job.stderr.read())
    assert job.returncode == 1
    assert "standard output was closed" in line


# Several processes in one folder -----------------------------------------------------------------


def test_fold_that_another_process_trains_is_refused(run_copy, csv, run, capsys):
    before = contents(run_copy)
    program = "import sys; from internals import storage; from pathlib import Path\n"
    program += "with storage.locked(Path(sys.argv[1])): input()"
    lock = run_copy / ".lock-fold_1"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], cwd=ROOT, stdin=subprocess.PIPE, text=True
    ) as other:
        while not lock.exists():
            time.sleep(0.05)
        for options in ([], ["--run-folds", "1"], ["--overwrite"]):
            assert train(csv, run_copy, *options) == 2
            assert "another process is at work on fold 1" in only_error(capsys.readouterr().err)
        assert train(csv, run_copy, "--run-folds", "0") == 0
        assert contents(run_copy) == before | {lock.name: b""}
        assert train(csv, run_copy, "--overwrite", "--run-folds", "0") == 0  # of its own, and no other
        other.communicate("done")
    assert unclocked(run_copy) == unclocked(run)


def test_two_jobs_at_once_share_a_folder(csv, run, tmp_path, monkeypatch):
    """A job array: fold 1 is trained by another call, while fold 0 is."""
    honest = train_cv.train_fold
    others = [["--run-folds", "1"]]

    def busy(*args):
        if others:
            assert train(csv, tmp_path, *others.pop()) == 0
            assert not SUMMARY & set(contents(tmp_path))
        return honest(*args)

    monkeypatch.setattr(train_cv, "train_fold", busy)
    # the inner call draws random numbers, so the outer one must have drawn its weights before
    assert train(csv, tmp_path, "--run-folds", "0") == 0
    assert set(contents(tmp_path)) == FILES
    assert record(tmp_path)["finished"] == [0, 1, "summary"]
    assert same_state(load_state(tmp_path, 1), load_state(run, 1))


def test_array_of_jobs_that_overwrite_starts_together(run_copy, csv, run):
    """Real processes; each removes its own fold of an earlier run, whatever the other does meanwhile."""
    checkpoints = [run_copy / f"state_dict_f{fold}.pth" for fold in range(K)]
    before = max(times(*checkpoints))
    options = command(csv, run_copy, "--overwrite", "--run-folds")
    jobs = [
        subprocess.Popen([sys.executable, "train_cv.py", *options, fold], cwd=ROOT) for fold in ("0", "1")
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    assert min(times(*checkpoints)) > before
    there, here = unclocked(run_copy), unclocked(run)
    for files in (there, here):
        assert files.pop("metrics.csv")  # of a thousand draws there, of fifty here
    assert there == here


def test_jobs_of_single_folds_share_a_cache_on_disk(csv, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train_epoch", interrupt)
    assert train(csv, tmp_path, "--cache", "auto", "--run-folds", "0") == 130
    assert len(list((tmp_path / "cache").glob("scans-*.float32"))) == 1


# Overwriting -------------------------------------------------------------------------------------


def test_overwrite_starts_afresh_and_leaves_other_files(run_copy, csv):
    """What a run of more folds left goes, too: files, half a file and the lock of a process that died."""
    (run_copy / "notes.txt").write_text("mine")
    for name in ("state_dict_f4.pth", ".partial-history_f4.csv", ".lock-fold_4"):
        (run_copy / name).write_text("of a run of five folds")
    assert train(csv, run_copy, "--epochs", "1", "--overwrite") == 0
    assert set(contents(run_copy)) == {*FILES, "notes.txt"}
    assert (run_copy / "notes.txt").read_text() == "mine"
    assert len(pd.read_csv(run_copy / "history_f0.csv")) == 1


def test_overwrite_of_one_fold_keeps_the_others(run_copy, csv, run, monkeypatch):
    """As in a job array whose script says --overwrite: each job removes its own fold, and the summary."""
    kept = {name: content for name, content in contents(run_copy).items() if name in {*FOLD_1, "folds.csv"}}
    before = times(run_copy / "history_f0.csv")
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", interrupt)
        assert train(csv, run_copy, "--run-folds", "0", "--overwrite") == 130
    assert set(contents(run_copy)) == {*kept, "run.json"}
    assert contents(run_copy).items() >= kept.items()
    assert record(run_copy)["finished"] == [1]
    assert train(csv, run_copy, "--run-folds", "0", "--overwrite") == 0
    assert times(run_copy / "history_f0.csv") != before
    assert unclocked(run_copy) == unclocked(run)


def test_overwrite_of_a_damaged_fold_mends_it(run_copy, csv, run, capsys):
    """What is about to be removed need not be readable."""
    (run_copy / "state_dict_f0.pth").write_bytes(b"cut")
    assert train(csv, run_copy, "--run-folds", "1", "--overwrite") == 2
    assert "state_dict_f0.pth" in only_error(capsys.readouterr().err)
    assert train(csv, run_copy, "--run-folds", "0", "--overwrite") == 0
    assert unclocked(run_copy) == unclocked(run)


def test_record_names_the_devices_that_a_fold_was_trained_on(run_copy, csv, monkeypatch):
    here, card = devices.describe(torch.device("cpu")), {"name": "NVIDIA H100", "cuda": "12.8"}
    monkeypatch.setattr(devices, "describe", lambda device: card)
    assert train(csv, run_copy) == 0  # a visit
    assert record(run_copy)["devices_per_fold"] == {"0": [here], "1": [here]}
    with monkeypatch.context() as patch:
        ends_after(patch, storage, "write_tensors", 1)
        assert train(csv, run_copy, "--overwrite", "--run-folds", "0") == 143
    assert record(run_copy)["devices_per_fold"] == {"1": [here]}  # what is not finished has none
    monkeypatch.setattr(devices, "describe", lambda device: here)
    assert train(csv, run_copy) == 0  # it goes on elsewhere
    assert record(run_copy)["devices_per_fold"] == {"0": [card, here], "1": [here]}


# What lies there -------------------------------------------------------------------------------


def test_record_of_an_earlier_version(run_copy, csv, run, capsys):
    """It says of no fold that it is finished: that all its files are there does."""
    edit_record(run_copy, drop="finished")
    edit_record(run_copy, drop="devices_per_fold")
    before = times(*(run_copy / name for name in sorted(FILES - {"run.json"})))
    assert train(csv, run_copy) == 0
    assert capsys.readouterr().out.count("finished before, kept") == K
    assert times(*(run_copy / name for name in sorted(FILES - {"run.json"}))) == before
    assert record(run_copy)["finished"] == [0, 1, "summary"]
    edit_record(run_copy, drop="finished")
    (run_copy / "state_dict_f1.pth").unlink()
    assert train(csv, run_copy, "--run-folds", "0") == 0
    assert record(run_copy)["finished"] == [0, "summary"]
    assert train(csv, run_copy) == 0
    assert unclocked(run_copy).items() >= {n: c for n, c in unclocked(run).items() if n != "run.json"}.items()


def check_refused(csv: Path, run: Path, capsys, options: list[str], words: list[str]) -> None:
    """One line with these words, and nothing is written."""
    before = contents(run)
    assert train(csv, run, *options) == 2
    line = only_error(capsys.readouterr().err)
    assert all(word in line for word in words), line
    assert "patience" not in line  # which is the same in both runs
    assert contents(run) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "2e-3"], ["lr (0.001 there, 0.002 now)"]),
        (["--seed", "4"], ["seed (3 there, 4 now)"]),
        (["--model", "modelB1"], ["model (modelB2 there, modelB1 now)"]),
        (["--fold", "3"], ["fold (2 there, 3 now)"]),
        (["--precision", "bf16"], ["precision (fp32 there, bf16 now)"]),
        (["--epochs", "1", "--overwrite", "--run-folds", "0"], ["epochs (2", " without --run-folds"]),
    ],
)
def test_other_arguments_are_refused(run, csv, capsys, options, words):
    """With --overwrite of one fold, too: the others would be of other arguments."""
    check_refused(csv, run, capsys, options, ["run.json is of another run", *words, "--overwrite"])


def test_other_scans_are_refused(run, csv, tmp_path, capsys):
    rows = [(csv.parent / f"scans/{i:03d}.nii", label) for i, label in enumerate(LABELS)]
    check_refused(write_csv(tmp_path / "other.csv", rows), run, capsys, [], ["csv_sha256", "folds_sha256"])
    shutil.copytree(csv.parent, tmp_path / "cohort")
    write_scan(tmp_path / "cohort" / "scans" / "004.nii", voxels(4) // 2)
    check_refused(tmp_path / "cohort" / "data.csv", run, capsys, [], ["scans_sha256"])


OVERWRITE_ONE = ["--run-folds", "0", "--overwrite"]


@pytest.mark.parametrize("options", [[], OVERWRITE_ONE])
def test_what_was_edited_is_refused(run_copy, run, csv, capsys, options):
    whole = contents(run)
    for changes, words in [
        ({"devices_per_fold": 3}, "run.json: is damaged: 'devices_per_fold' is 3"),
        ({"finished": "all"}, "run.json: is damaged: 'finished' is 'all'"),
    ]:
        edit_record(run_copy, **changes)
        check_refused(csv, run_copy, capsys, options, [words])
        (run_copy / "run.json").write_bytes(whole["run.json"])
    (run_copy / "folds.csv").write_text((run / "folds.csv").read_text().replace("train", "val", 1))
    check_refused(csv, run_copy, capsys, options, ["folds.csv: is not as this run wrote it", "--overwrite"])
    (run_copy / "folds.csv").write_bytes(whole["folds.csv"])
    (run_copy / "history_f1.csv").write_text("epoch,loss\n1,2\n")
    check_refused(csv, run_copy, capsys, options, ["history_f1.csv: expected the columns"])


def test_nonsense_in_the_list_of_finished_folds_is_ignored(run_copy, csv, run):
    """Entries that no fold has, of any type."""
    edit_record(run_copy, finished=[[0], {"fold": 1}, None, 7, "1", 1])
    assert train(csv, run_copy) == 0
    assert unclocked(run_copy) == unclocked(run)


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


def test_loss_that_is_not_finite_stops_the_fold(csv, tmp_path, monkeypatch, capsys):
    """The first step throws the weights out of float32's range."""
    honest = train_cv.start

    def start(*args):
        state = honest(*args)
        state.optimiser.param_groups[0]["lr"] = 1e30
        return state

    monkeypatch.setattr(train_cv, "start", start)
    assert train(csv, tmp_path, "--run-folds", "1") == 2
    assert "fold 1, epoch 1, batch 2: the loss is nan" in only_error(capsys.readouterr().err)
    assert set(contents(tmp_path)) == {"run.json", "folds.csv"}


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
