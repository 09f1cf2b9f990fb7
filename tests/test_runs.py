"""runs.py: a training run's records, as they were written and as they were edited by hand."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from cohorts import AFFINE, tiny_cohort, voxels, write_scan

import dataset
import runs
import train_cv
from internals import storage
from internals.errors import InputError

K = 2
FOLDING = {"fold": K, "split": "stratified", "val_fraction": 0.5, "seed": 0}
# Of the scans in fold 0 and 1. Subjects 000 and 001 have the first four scans, 002 and 003 the others.
ROLES = [["test", "train"] * 2 + ["val", "train"] * 2, ["val", "test"] * 2 + ["test", "test"] * 2]


@pytest.fixture
def run(tmp_path) -> Path:
    """The records of a run, as train_cv.py leaves them."""
    csv = tiny_cohort(tmp_path, 8)
    rows = "".join(f"{i}.nii,{i % 2},00{i // 4 * 2 + i % 2}\n" for i in range(8))
    csv.write_text(f"path,label,subject\n{rows}")
    table = dataset.read_csv(csv)
    folder = tmp_path / "models"
    folder.mkdir()
    parts = [table[dataset.COLUMNS].assign(fold=fold, role=role) for fold, role in enumerate(ROLES)]
    folds = pd.concat(parts, ignore_index=True)[["fold", "role", *dataset.COLUMNS]]
    storage.write_csv(folds, folder / "folds.csv")
    cohort = dataset.Cohort(csv, table, dataset.check_scans(table, {}), folds, K)
    about = {"csv": str(csv), "model": "modelB2", "arguments": FOLDING | {"lr": 1e-4}}
    storage.write_json(cohort.identity | about, folder / "run.json")
    return folder


def refusal(run: Path, csv: Path | None = None, model: str | None = None, k: int | None = None) -> str:
    with pytest.raises(InputError) as error:
        runs.find_run(run, csv, model, k)
    return str(error.value)


def edit(run: Path, **changes: Any) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | changes))


def test_run_as_it_was_written(run):
    moved = Path(shutil.copytree(run.parent, run.parent / "moved"))
    csv = (moved / "data.csv").rename(moved / "list.csv")
    for asked in [(None, None, None), (run.parent / "data.csv", "modelB2", K), (csv, None, None)]:
        found = runs.find_run(run, *asked)
        assert (found.folder, found.model, found.cohort.k) == (run, "modelB2", K)
        assert found.cohort.csv == (asked[0] or run.parent / "data.csv")
        assert len(found.cohort.table) == 8
        assert found.cohort.folds.to_csv(index=False) == (run / "folds.csv").read_text()
        assert found.checkpoint(1) == run / "state_dict_f1.pth"
    assert runs.recorded_folding(run) == FOLDING


def test_run_of_something_else(run):
    csv = run.parent / "data.csv"
    assert refusal(run, model="modelA24") == f"--model modelA24: {run} was trained with modelB2"
    assert refusal(run, k=3) == f"--fold 3: {run} was trained with 2 folds"
    edit(run, csv_sha256="0" * 64)
    assert refusal(run) == f"{csv}: is not the CSV that {run} was trained on; its content changed"
    edit(run, csv_sha256=storage.file_sha256(csv))
    write_scan(run.parent / "3.nii", voxels(99, shape=(5, 6, 7)))
    assert refusal(run) == f"{csv}: the scans changed since {run} was trained on them"
    edit(run, scans_sha256="")  # an early version did not look
    assert runs.find_run(run, None, None, None).cohort.k == K
    for i in range(8):
        write_scan(run.parent / f"{i}.nii", voxels(i, shape=(5, 6, 7)), 2 * AFFINE)
    assert refusal(run) == f"{csv}: the scans' grid is not the one that {run} was trained on"


def test_files_that_a_run_remembers_are_not_opened_again(run):
    """The last scan is no image any more, with the time and size that it had: only opening it would tell."""
    csv, file = run.parent / "data.csv", run.parent / "7.nii"
    checked = dataset.check_scans(dataset.read_csv(csv), {})
    status, content = file.stat(), file.read_bytes()

    def put(content: bytes, time: int) -> None:
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, time))

    put(bytes(len(content)), status.st_mtime_ns)
    assert "7.nii: not a NIfTI image" in refusal(run)  # an earlier version's record
    edit(run, scans_mark=checked.mark)
    written = (run / "run.json").read_bytes()
    for find in (runs.find_run(run, None, None, None).cohort, runs.find_cohort(run, None, {})[0]):
        assert find.checked.mark == checked.mark
        assert find.identity["scans_sha256"] == checked.scans_sha256
        assert find.grid.header == checked.grid.header
    put(bytes(len(content)), status.st_mtime_ns + 1)
    assert "7.nii: not a NIfTI image" in refusal(run)
    put((run.parent / "5.nii").read_bytes(), status.st_mtime_ns + 1)
    assert refusal(run) == f"{csv}: the scans changed since {run} was trained on them"
    put(content, status.st_mtime_ns + 1)
    assert runs.find_run(run, None, None, None).cohort.checked.mark != checked.mark
    assert (run / "run.json").read_bytes() == written  # whoever reads a run does not write to it
    put(content, status.st_mtime_ns)
    edit(run, grid={"shape": [5, 6, 7], "affine": (2 * AFFINE).tolist()})
    assert refusal(run) == f"{csv}: the scans' grid is not the one that {run} was trained on"


def test_folder_without_a_run(tmp_path, capsys):
    csv, folder = tiny_cohort(tmp_path, 10), tmp_path / "models"
    assert refusal(folder) == f"--modelpath {folder}: no such folder; train_cv.py makes one"
    folder.mkdir()
    for asked in ((None, "modelB2"), (csv, None)):
        assert "holds no run.json, so --path and --model are needed" in refusal(folder, *asked)
    found = runs.find_run(folder, csv, "modelB2", None)
    published = dataset.make_folds(dataset.read_csv(csv), 5, "contiguous", 0, 0)
    assert found.cohort.folds.equals(published)
    assert "published contiguous folds" in capsys.readouterr().out


def test_cohort_of_a_run_and_the_options_that_made_it(run):
    asked = dict.fromkeys(runs.FOLDING) | {"seed": 0, "fold": K}
    cohort, folding = runs.find_cohort(run, None, asked)
    assert cohort.folds.to_csv(index=False) == (run / "folds.csv").read_text()
    assert folding == FOLDING
    for name, value in {"fold": 3, "split": "contiguous", "val_fraction": 0.2, "seed": 7}.items():
        option = f"--{name.replace('_', '-')} {value}"
        with pytest.raises(InputError, match=rf"^{option}: {run} was trained with {FOLDING[name]}$"):
            runs.find_cohort(run, None, {name: value})


def test_cohort_without_a_run(tmp_path, capsys):
    csv, none = tiny_cohort(tmp_path, 20), tmp_path / "none"
    free = dict.fromkeys(runs.FOLDING)
    with pytest.raises(InputError, match=r"none: holds no run\.json, so --path is needed$"):
        runs.find_cohort(none, None, free)
    trained = train_cv.get_parser().parse_args(["--path", "data.csv"])
    defaults = tuple(getattr(trained, name) for name in runs.FOLDING)
    for asked, made in [(free, defaults), (free | {"fold": 4, "seed": 3}, (4, "stratified", 0.2, 3))]:
        cohort, folding = runs.find_cohort(none, csv, asked)
        assert tuple(folding.values()) == made
        assert cohort.folds.equals(dataset.make_folds(dataset.read_csv(csv), *made))
        said = f"{none} holds no run.json: {made[0]} stratified folds are made of {csv}"
        assert said in capsys.readouterr().out


def test_digest_of_weights_is_that_of_first_sight(run):
    """What begins with some weights says so, whatever they are at its end."""
    networks, weights = runs.TrainedNetworks(runs.find_run(run, None, None, None)), run / "state_dict_f0.pth"
    weights.write_bytes(b"first")
    first = storage.file_sha256(weights)
    assert networks.digest(0) == first
    weights.write_bytes(b"second")
    assert (networks.digest(0), networks.digest(1), networks.about()) == (first, None, {})


def test_calibration_scans_are_training_scans_evenly_spaced(run, monkeypatch):
    networks = runs.UntrainedNetworks(runs.find_run(run, None, None, None), 3)
    assert networks.calibration_scans(0) == [1, 3, 5, 7]
    assert networks.digest(0) == "random, seed 3, BatchNorm of 4 training scans"
    assert networks.about() == {"calibration_scans_per_fold": {"0": 4, "1": 0}}
    monkeypatch.setattr(dataset.Cohort, "scan_indices", lambda *_: list(range(100, 164)))
    assert networks.calibration_scans(0) == list(range(100, 164, 2))
    monkeypatch.setattr(runs, "CALIBRATION", 3)
    assert networks.calibration_scans(0) == [100, 121, 142]


@pytest.mark.parametrize("networks", [runs.TrainedNetworks, lambda run: runs.UntrainedNetworks(run, 0)])
def test_networks_that_the_scans_do_not_fit(run, networks):
    with pytest.raises(InputError, match=r"^--model: .*94x94x94"):
        networks(runs.find_run(run, None, None, None)).check([])


@pytest.mark.parametrize("value", [None, "x", [1], {"a": 1}, -1, 10**9, 1e999, True, "\0"])
@pytest.mark.parametrize("name", ["csv", "csv_sha256", "model", "grid", "arguments"])
def test_record_edited_to_nonsense(run, name, value):
    edit(run, **{name: value})
    if name == "model" and isinstance(value, str):  # which models there are is for models.py to say
        assert runs.find_run(run, None, None, None).model == value
    else:
        refusal(run)


@pytest.mark.parametrize(
    ("name", "value"),
    [("fold", 1), ("fold", 2.0), ("fold", "2"), ("fold", 9), ("fold", 10**12), ("fold", True),
     ("split", "random"), ("split", ["stratified"]), ("val_fraction", 0), ("val_fraction", 1),
     ("val_fraction", float("nan")), ("seed", -1), ("seed", 2**32), ("seed", 0.5), ("seed", None)],
)  # fmt: skip
def test_arguments_edited_to_nonsense(run, name: str, value: Any):
    edit(run, arguments=FOLDING | {name: value})
    assert "run.json: is damaged" in refusal(run)


FIRST, LAST = "0,test,0.nii", "1,test,7.nii,1,003\n"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [("fold,role", "fold,part", "columns"), (FIRST, "0,best,0.nii", "row 2"),
     (FIRST, "1,test,0.nii", "row 2"), ("0.nii,0,000", "0.nii,1,000", "row 2"),
     ("0.nii,0,000", "0.nii,0,0", "row 2"), ("0.nii,0,000", "0.nii,0", "row 2"),
     ("0.nii,0,000", "0.nii,0,000,0", "row 2"),
     (LAST, "", "row 17 is missing"), (LAST, LAST * 2, "row 18"),
     ("0,train,5.nii", "0,test,5.nii", "5.nii is not tested in exactly one fold"),
     (FIRST, "0,val,0.nii", "0.nii is not tested in exactly one fold"),
     ("0,train,1.nii", "0,val,1.nii", "subject 001 has several roles in fold 0"),
     ("0,train,1.nii", "0,train,\0.nii", "NUL"), (FIRST, '0,test,"0.nii', "cannot be read as a CSV")],
)  # fmt: skip
def test_folds_edited_to_nonsense(run, old, new, words):
    text = (run / "folds.csv").read_text()
    assert old in text
    (run / "folds.csv").write_text(text.replace(old, new, 1))
    message = refusal(run)
    assert message.startswith(f"{run / 'folds.csv'}: ")
    assert words in message


def test_fold_without_test_scans(run):
    text = (run / "folds.csv").read_text().replace("0,test", "0,val").replace("1,val", "1,test")
    (run / "folds.csv").write_text(text)
    assert "fold 0 has no test scans" in refusal(run)
