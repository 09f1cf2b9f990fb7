"""runs.py: a training run's records, as they were written and as they were edited by hand."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from cohorts import (
    AFFINE,
    MODEL,
    OBLIQUE,
    SHAPE,
    contents,
    read_nifti,
    tiny_cohort,
    voxels,
    white,
    write_csv,
    write_scan,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
import models
import runs
import train_cv
from dataset import ScanDataset
from internals import nifti, storage
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
    record(csv, ROLES, tmp_path / "models")
    return tmp_path / "models"


def record(csv: Path, roles: Sequence[Sequence[str]], folder: Path) -> dataset.Cohort:
    """Write a run's records, given the roles of every scan in every fold."""
    table = dataset.read_csv(csv)
    folder.mkdir()
    parts = [table[dataset.COLUMNS].assign(fold=fold, role=role) for fold, role in enumerate(roles)]
    folds = pd.concat(parts, ignore_index=True)[["fold", "role", *dataset.COLUMNS]]
    storage.write_csv(folds, folder / "folds.csv")
    cohort = dataset.Cohort(csv, table, dataset.check_scans(table, {}), folds, len(roles))
    arguments = FOLDING | {"fold": len(roles), "lr": 1e-4}
    about = {"csv": str(csv), "model": "modelB2", "arguments": arguments}
    storage.write_json(cohort.identity | about, folder / "run.json")
    return cohort


def refusal(run: Path, csv: Path | None = None, model: str | None = None, k: int | None = None) -> str:
    with pytest.raises(InputError) as error:
        runs.find_run(run, csv, model, k)
    return str(error.value)


def read_json(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def edit(run: Path, **changes: Any) -> None:
    (run / "run.json").write_text(json.dumps(read_json(run) | changes))


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


# New scans ---------------------------------------------------------------------------------------

TINY = (5, 6, 7)
SAYS_WHAT_TO_DO = "train_cv.py, called as before, keeps the networks and writes what is missing"
DIGEST = "[0-9a-f]{64}"


def train(folder: Path, named: bool = True) -> Path:
    """A finished run of three folds but for its networks, beside its twelve scans and data.csv.

    Scan i is of subject s(i % 6), where the CSV names them; fold f tests s2f and s2f+1, and validates on
    the two that follow.
    """
    csv = tiny_cohort(folder, 12)
    if named:
        write_csv(csv, [(f"{i}.nii", i % 2, f"s{i % 6}") for i in range(12)], header="path,label,subject")
    roles = [[("test", "val", "train")[(i % 6 // 2 - fold) % 3] for i in range(12)] for fold in range(3)]
    cohort = record(csv, roles, folder / "models")
    train_cv.describe_scans(cohort, in_memory(cohort), folder / "models")
    return folder / "models"


def in_memory(cohort: dataset.Cohort) -> ScanDataset:
    """The scans of a cohort, read where they lie."""
    return ScanDataset(cohort.table, np.stack([dataset.read_scan(file) for file in cohort.table["file"]]))


def own_fold(i: int) -> int:
    """The fold that tests a scan."""
    return i % 6 // 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[bool, Path]:
    """Such runs, by whether their CSV names subjects; read only."""
    return {named: train(tmp_path_factory.mktemp("trained"), named) for named in (True, False)}


@pytest.fixture
def done(trained, tmp_path) -> Path:
    """The folder of such a run, its scans and CSV not at hand."""
    return Path(shutil.copytree(trained[True], tmp_path / "run" / "models"))


def new_scans(folder: Path, count: int = 2) -> list[str]:
    """Scans that no run has seen."""
    names = [f"new{number}.nii" for number in range(count)]
    for number, name in enumerate(names):
        write_scan(folder / name, voxels(100 + number, shape=TINY))
    return names


def find(
    run: Path, scans: Path, rows: Iterable[Sequence[object]], header: str = "", resample: bool = False
) -> runs.Run:
    """The run for some new scans, which lie in a folder."""
    return runs.find_run_for(write_csv(scans / "new.csv", rows, header), run, None, resample)


def refused(run: Path, scans: Path, *arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        find(run, scans, *arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def predicted_by(run: runs.Run, row: int) -> list[int]:
    """The folds whose networks predict a new scan."""
    return [fold for fold in range(run.cohort.k) if row in run.cohort.scan_indices(fold, "test")]


@pytest.mark.parametrize("named", [True, False], ids=["subjects", "no subjects"])
def test_own_scans_are_known_again_by_their_content_alone(tmp_path, named):
    """Under other names, in another order, and where nothing but the run's folder is left, and that moved."""
    made, new = train(tmp_path / "training", named), tmp_path / "new"
    new.mkdir()
    names = [f"copy{i}.nii" for i in range(11, -1, -1)]
    for name, i in zip(names, range(11, -1, -1), strict=True):
        shutil.copyfile(made.parent / f"{i}.nii", new / name)
    names[3:3] = new_scans(new)
    folder = made.rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "training")
    before = contents(folder)
    run = find(folder, new, [(name,) for name in names])
    assert contents(folder) == before
    assert (run.folder, run.model, run.permuted, run.new_scans) == (folder, "modelB2", False, True)
    assert (run.is_recorded, run.cohort.k, run.folds) == (True, 3, [0, 1, 2])
    assert run.cohort.csv == new / "new.csv"
    assert run.cohort.table["path"].tolist() == names
    assert set(run.cohort.table["label"]) == {dataset.UNKNOWN}
    assert run.cohort.grid.record() == read_json(folder)["grid"]
    assert list(run.cohort.folds.columns) == ["fold", "role", "path", "label", "subject"]
    for row, name in enumerate(names):
        own = name.startswith("copy")
        assert run.seen[row] == own
        number = int(re.sub("[a-z.]", "", name))
        assert predicted_by(run, row) == ([own_fold(number)] if own else [0, 1, 2])
    roles = run.cohort.folds.set_index(["fold", "path"])["role"]
    assert (roles[1, "copy0.nii"], roles[0, "copy0.nii"]) == ("seen", "test")
    assert set(roles) == {"seen", "test"}


def test_own_scans_are_all_seen(run):
    """Of the run's own cohort each is tested in one fold, so that all others saw it."""
    found = runs.find_run(run, None, None, None)
    assert (found.new_scans, found.permuted) == (False, False)
    assert found.seen.tolist() == [True] * 8
    assert found.folds == [0, 1]


def test_folds_that_have_nothing_to_test(trained, tmp_path):
    shutil.copyfile(trained[True].parent / "2.nii", tmp_path / "copy.nii")
    run = find(trained[True], tmp_path, [("copy.nii",)])
    assert run.folds == [1]
    assert run.seen.tolist() == [True]


@pytest.mark.parametrize("named", [True, False], ids=["subjects", "no subjects"])
def test_subject_that_both_name_is_known_again(trained, tmp_path, named):
    """Where either names none, a path stands for a subject, and says nothing of another CSV's scans."""
    for name in ("new.nii", "0.nii", "2.nii"):  # named like the run's, and of other content
        write_scan(tmp_path / name, voxels(ord(name[0]), shape=TINY))
    rows = [("0.nii", "s3"), ("new.nii", "someone"), ("2.nii", "s3")]
    run = find(trained[named], tmp_path, rows, "path,subject")
    assert run.seen.tolist() == [named, False, named]
    theirs = [1] if named else [0, 1, 2]
    assert [predicted_by(run, row) for row in range(3)] == [theirs, [0, 1, 2], theirs]
    subjects = [("0.nii", "0.nii"), ("new.nii", "2.nii"), ("2.nii", "10.nii")]
    for these, header in [([row[:1] for row in rows], ""), (subjects, "path,subject")]:
        assert not find(trained[named], tmp_path, these, header).seen.any()


def test_path_is_no_subject_of_a_run(done, tmp_path):
    """Not even where a subject of the run is called like it."""
    folds = (done / "folds.csv").read_text()
    (done / "folds.csv").write_text(folds.replace(",s3\n", ",new0.nii\n"))
    names = new_scans(tmp_path)
    assert not find(done, tmp_path, [(name,) for name in names]).seen.any()
    run = find(done, tmp_path, [(names[0], "someone"), (names[1], "new0.nii")], "path,subject")
    assert run.seen.tolist() == [False, True]


def test_scan_and_subject_that_different_networks_saw(trained, tmp_path):
    """No network is left that knows neither; the same fold's, or a subject's other name, is fine."""
    folder = trained[True]
    shutil.copyfile(folder.parent / "0.nii", tmp_path / "copy.nii")
    for subject in ("s0", "s1", "someone"):
        run = find(folder, tmp_path, [("copy.nii", subject), (*new_scans(tmp_path, 1), "x")], "path,subject")
        assert predicted_by(run, 0) == [0]
        assert run.seen.tolist() == [True, False]
    message = refused(folder, tmp_path, [("copy.nii", "s5")], "path,subject")
    assert message.startswith("1 scans, or others of their subjects, were seen by every network of")
    assert message.endswith("take them off the list: copy.nii")
    # what is known of one scan of a person is known of the others, which the run does not have
    rows = [("copy.nii", "someone"), (*new_scans(tmp_path, 1), "someone")]
    assert find(folder, tmp_path, rows, "path,subject").seen.tolist() == [True, True]


def test_content_that_a_run_tested_twice(done, trained, tmp_path):
    scans = (done / "scans.csv").read_text()
    first, third = (re.findall(DIGEST, scans)[i] for i in (0, 2))
    (done / "scans.csv").write_text(scans.replace(third, first))
    for i in (0, 1):
        shutil.copyfile(trained[True].parent / f"{i}.nii", tmp_path / f"copy{i}.nii")
    assert "were seen by every network" in refused(done, tmp_path, [("copy0.nii",)])
    assert predicted_by(find(done, tmp_path, [("copy1.nii",)]), 0) == [0]


@pytest.mark.parametrize("labels", [[0, 1], [1, ""], ["", ""]])
def test_labels_of_new_scans_are_kept(trained, tmp_path, labels):
    rows = list(zip(new_scans(tmp_path), labels, strict=True))
    run = find(trained[True], tmp_path, rows)
    assert run.cohort.table["label"].tolist() == [dataset.UNKNOWN if x == "" else x for x in labels]
    assert run.cohort.labels(2, "test").tolist() == run.cohort.table["label"].tolist()


# Damage, and folders of other kinds ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["scans.csv", "mean_train_f0.nii.gz", "folds.csv"])
def test_run_that_lacks_what_new_scans_need(done, tmp_path, name):
    (done / name).unlink()
    message = refused(done, tmp_path, [(name,) for name in new_scans(tmp_path)])
    assert message.startswith(f"{done / name}: no such ")
    if name != "folds.csv":  # a run of an earlier version
        assert message == f"{done / name}: no such file; {SAYS_WHAT_TO_DO}"


def test_new_scans_that_cannot_be_used_are_all_named(trained, tmp_path):
    """Before any is read: reading from a pipe would wait for ever."""
    names = [*new_scans(tmp_path), "gone.nii", "pipe.nii", "text.nii"]
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "text.nii").write_text("no image")
    message = refused(
        trained[True], tmp_path, [("gone.nii",), *((name,) for name in names if name != "gone.nii")]
    )
    assert message.startswith("3 of 5 scans cannot be used: gone.nii: no such file; pipe.nii: is a pipe")
    assert "; text.nii: not a NIfTI image" in message


def test_new_scans_that_lie_elsewhere(trained, tmp_path):
    names = new_scans(tmp_path)
    write_scan(tmp_path / names[1], voxels(100, shape=(9, 8, 7)), OBLIQUE)
    rows = [(name,) for name in names]
    message = refused(trained[True], tmp_path, rows)
    assert message.startswith("1 of 2 scans cannot be used: new1.nii: shape (9, 8, 7), the run has ")
    assert "--resample" in message
    for these in (rows, rows[1:]):
        run = find(trained[True], tmp_path, these, resample=True)
        assert run.cohort.grid.record() == read_json(trained[True])["grid"]
        assert run.cohort.checked.resampled
        assert not run.seen.any()


@pytest.mark.parametrize("damage", ["grid", "no image", "record"])
def test_grid_of_a_run_that_is_damaged(done, tmp_path, damage):
    file = done / "mean_train_f0.nii.gz"
    words = "its grid is not that of the run's scans"
    if damage == "grid":
        write_scan(file, white(TINY, 0), AFFINE + np.eye(4, k=3))
    elif damage == "record":
        edit(done, grid={"shape": list(TINY)})
    else:
        file.write_bytes(b"no image")
        words = "not a NIfTI image"
    message = refused(done, tmp_path, [(name,) for name in new_scans(tmp_path)])
    assert message.startswith(f"{file}: {words}")


def test_what_is_asked_of_another_run(trained, tmp_path):
    names = new_scans(tmp_path)
    csv = write_csv(tmp_path / "new.csv", [(name,) for name in names])
    assert runs.find_run_for(csv, trained[True], "modelB2", False).model == "modelB2"
    with pytest.raises(InputError, match=rf"^--model modelA24: {trained[True]} was trained with modelB2$"):
        runs.find_run_for(csv, trained[True], "modelA24", False)
    none = tmp_path / "none"
    with pytest.raises(InputError, match=rf"^--modelpath {none}: no such folder; train_cv.py makes one$"):
        runs.find_run_for(csv, none, "modelB2", False)
    with pytest.raises(InputError, match=rf"^{csv}: row 1: label 'x'"):
        find(trained[True], tmp_path, [("a.nii", "x")])


def test_permuted_run_is_one_for_new_scans_too(done, tmp_path):
    edit(done, arguments=read_json(done)["arguments"] | {"permute_labels": True})
    assert find(done, tmp_path, [(name,) for name in new_scans(tmp_path)]).permuted


@pytest.mark.parametrize("value", [None, "x", -1, 1, 2, 4, 10**12, 10**40, True])
def test_number_of_folds_edited_to_nonsense(done, tmp_path, value):
    edit(done, arguments=read_json(done)["arguments"] | {"fold": value})
    assert "is damaged" in refused(done, tmp_path, [(name,) for name in new_scans(tmp_path, 1)])


@pytest.mark.parametrize("value", [3, 100_000])
def test_more_folds_than_scans(done, tmp_path, value):
    """Seen before the folds are gone through: they may be 10^12."""
    edit(done, arguments=read_json(done)["arguments"] | {"fold": value})
    (done / "folds.csv").write_text("fold,role,path,label,subject\n")
    message = refused(done, tmp_path, [(name,) for name in new_scans(tmp_path, 1)])
    assert message.endswith(f"is damaged: {value} folds of 0 scans")


# patterns, and what to put in their place
FOLDS = [
    ("fold,role", "role,fold"), ("fold,.*\n", ""), ("(?s).*", ""), ("(?s)\n.*", "\n"), (",0,s0", ""),
    (",0,s0", ",0,s0,s0"), ("0,test,0.nii", "0,best,0.nii"), ("0,test,0.nii", "1,test,0.nii"),
    ("0,test,0.nii,0", "0,test,0.nii,1"), ("0,test,0", "0,train,0"), (",0.nii,0,s0", ",0.nii,0,s2"),
    ("0,test,1.nii", "0,test,x.nii"), ("0,test,0.nii,0,s0\n", ""), ("2,.*\n$", ""), ("(2,.*\n)$", r"\1\1"),
    ("0,test", "\0"), ("0,test", '"'), ("0,test", "\udcff"), ("0,test", "x" * 70_000),
]  # fmt: skip
SCANS = [
    ("path,samples_sha256", "samples_sha256,path"), ("path,.*\n", ""), ("(?s).*", ""), ("(?s)\n.*", "\n"),
    ("0.nii,", "x.nii,"), ("0.nii,", ""), (".*\n$", ""), ("(.*\n)$", r"\1\1"), (f",{DIGEST}", ""),
    (f"({DIGEST})", r"\1,\1"), (DIGEST, ""), (DIGEST, "nonsense"), (DIGEST, "0" * 63), (DIGEST, "A" * 65),
    ("(0.nii.*\n)(1.nii.*\n)", r"\2\1"), ("0.nii", "\0"), ("0.nii", '"'), ("0.nii", "\udcff"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        *(("folds", *damage) for damage in FOLDS),
        *(("scans", *damage) for damage in SCANS),
        ("both", r"\b2.nii", "0.nii"),
    ],
)
def test_what_a_run_knows_of_its_scans_is_damaged(done, tmp_path, file, old, new):
    for name in ("folds", "scans") if file == "both" else (file,):
        content = (done / f"{name}.csv").read_text()
        changed = re.sub(old, new, content, count=0 if file == "both" else 1)
        assert changed != content
        (done / f"{name}.csv").write_bytes(changed.encode(errors="surrogateescape"))
    message = refused(done, tmp_path, [(name,) for name in new_scans(tmp_path, 1)])
    assert re.match(rf"{re.escape(str(done))}/(folds|scans).csv: ", message)
    assert "damaged" in message or "cannot be read" in message or "line " in message


PIECES = [
    "0",
    "1",
    "2",
    "test",
    "train",
    "val",
    "0.nii",
    "3.nii",
    "s0",
    "s3",
    "path",
    ",",
    "\n",
    '"',
    " ",
    "a",
    "f",
]
CHANGES = st.tuples(
    st.sampled_from([("folds",), ("scans",), ("folds", "scans")]),
    st.sampled_from(PIECES),
    st.sampled_from([*PIECES, "", "\0", "\r", "\udcff"]),
    st.none() | st.integers(0, 100),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(CHANGES, min_size=1, max_size=3))
def test_any_damage_is_refused_or_harmless(fuzzed, changes):
    """A run that is found leaves every scan to one network that tested it, or to all."""
    folder, whole = fuzzed
    changed = dict(whole)
    for names, old, new, number in changes:
        for name in names:
            pieces = changed[name].split(old)
            count = len(pieces) - 1
            if number is None:
                changed[name] = new.join(pieces)
            elif count:
                at = number % count + 1
                changed[name] = new.join([old.join(pieces[:at]), old.join(pieces[at:])])
    for name, content in changed.items():
        (folder / "models" / f"{name}.csv").write_bytes(content.encode(errors="surrogateescape"))
    with contextlib.suppress(InputError):
        run = find(folder / "models", folder, [("0.nii",), ("new0.nii",)])
        assert [len(predicted_by(run, row)) for row in range(2)] in ([1, 3], [3, 3])
        assert run.seen.tolist() == [len(predicted_by(run, row)) == 1 for row in range(2)]


@pytest.fixture(scope="module")
def fuzzed(trained, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A run beside its scans and a new one, to be damaged; and what its tables were."""
    folder = Path(shutil.copytree(trained[True].parent, tmp_path_factory.mktemp("fuzzed") / "run"))
    new_scans(folder, 1)
    return folder, {name: (folder / "models" / f"{name}.csv").read_text() for name in ("folds", "scans")}


@pytest.fixture
def published(tmp_path) -> tuple[Path, Path]:
    """The CSV of a new scan, and a folder of checkpoints of networks that it fits."""
    write_scan(tmp_path / "new.nii", voxels(0))
    (tmp_path / "published").mkdir()
    torch.save(models.build_model(MODEL, SHAPE).state_dict(), tmp_path / "published" / "state_dict_f0.pth")
    return write_csv(tmp_path / "new.csv", [("new.nii",)]), tmp_path / "published"


@pytest.mark.parametrize(
    ("others", "k", "missing"), [([], 1, None), ([1], 2, None), ([2], 3, 1), ([10], 11, 1)]
)
def test_published_checkpoints_number_the_folds(published, capsys, others, k, missing):
    csv, folder = published
    for fold in others:
        shutil.copyfile(folder / "state_dict_f0.pth", folder / f"state_dict_f{fold}.pth")
    for name in ("state_dict_fbest.pth", "state_dict_f.pth", "state_dict_f7.pt", "progress_f9.pth", "f8.pth"):
        (folder / name).touch()
    run = runs.find_run_for(csv, folder, MODEL, False)
    said = capsys.readouterr()
    assert said.out == (
        f"{folder} holds no run.json: published checkpoints; what they were trained on is not known\n"
    )
    assert (run.cohort.k, run.model, run.new_scans, run.is_recorded) == (k, MODEL, True, False)
    assert predicted_by(run, 0) == run.folds == list(range(k))
    assert run.seen.tolist() == [False]
    assert run.cohort.grid.shape == SHAPE
    networks = runs.TrainedNetworks(run)
    if missing is None:
        networks.check(range(k))
        return
    with pytest.raises(InputError, match=rf"^{folder}/state_dict_f{missing}\.pth: no such checkpoint"):
        networks.check(range(k))


def test_published_checkpoints_are_not_enough(published):
    csv, folder = published
    for model, resample, words in [
        (None, False, f"--modelpath {folder}: holds no run.json, so --model is needed"),
        (MODEL, True, f"--resample: {folder} holds no run.json, which would say onto which grid"),
    ]:
        with pytest.raises(InputError, match=f"^{words}$"):
            runs.find_run_for(csv, folder, model, resample)
    (folder / "state_dict_f0.pth").rename(folder / "weights.pth")
    with pytest.raises(InputError, match=rf"^--modelpath {folder}: holds no state_dict_f0\.pth$"):
        runs.find_run_for(csv, folder, MODEL, False)


# The mean of training controls -------------------------------------------------------------------


def test_mean_of_training_controls_is_the_same_wherever_it_is_from(trained, tmp_path):
    folder = Path(shutil.copytree(trained[True].parent, tmp_path / "run")) / "models"
    own = runs.find_run(folder, folder.parent / "data.csv", None, None)
    new = find(folder, tmp_path, [(name,) for name in new_scans(tmp_path)])
    scans, others = in_memory(own.cohort), in_memory(new.cohort)
    for fold, controls in enumerate([(4, 10), (0, 6), (2, 8)]):
        mean = scans.mean(controls)
        volumes = [dataset.read_scan(folder.parent / f"{i}.nii").astype(np.float64) for i in controls]
        # half a unit of float32 near 1
        assert np.allclose(mean, (volumes[0] + volumes[1]) / 2, rtol=0, atol=2**-24)
        file = folder / f"mean_controls_f{fold}.nii.gz"
        assert read_nifti(file).get_data_dtype() == np.float32
        found = [own.mean_controls(fold, scans), new.mean_controls(fold, others)]
        file.unlink()
        found.append(own.mean_controls(fold, scans))
        for each in found:
            assert each.dtype == np.float32
            assert np.array_equal(each, mean)


def test_mean_of_training_controls_is_as_recorded(done, tmp_path):
    """Also of scans that are brought onto the run's grid."""
    write_scan(tmp_path / "new.nii", voxels(100, shape=(9, 8, 7)), OBLIQUE)
    new = find(done, tmp_path, [("new.nii",)], resample=True)
    scans, file = ScanDataset(new.cohort.table), done / "mean_controls_f1.nii.gz"
    nifti.save_map(white(TINY, 0), new.cohort.grid.header, file)
    assert np.array_equal(new.mean_controls(1, scans), white(TINY, 0))
    hole = white(TINY, 0)
    hole[1, 2, 3] = np.nan
    for values, affine, words in [
        (hole, AFFINE, "has voxels that are NaN or infinite"),
        (white(TINY, 0), AFFINE + np.eye(4, k=3), "its affine differs from the scans'"),
        (white((9, 8, 7), 0), AFFINE, r"shape \(9, 8, 7\), the scans"),
    ]:
        write_scan(file, values, affine)
        with pytest.raises(InputError, match=f"^{file}: {words}"):
            new.mean_controls(1, scans)


def test_option_that_needs_the_mean_of_training_controls(run, trained, done, tmp_path):
    runs.find_run(trained[True], None, None, None).check_controls([0, 1, 2], "--baseline")
    own = runs.find_run(run, None, None, None)  # its training scans are patients'
    with pytest.raises(InputError, match=r"^--baseline: fold 0 has no controls among its training scans$"):
        own.check_controls([0, 1], "--baseline")
    new = find(done, tmp_path, [(name,) for name in new_scans(tmp_path)])
    new.check_controls([0, 1, 2], "--baseline")
    (done / "mean_controls_f1.nii.gz").unlink()
    new.check_controls([0, 2], "--baseline")
    words = rf"^--baseline: {done}/mean_controls_f1\.nii\.gz is not there; {SAYS_WHAT_TO_DO}$"
    with pytest.raises(InputError, match=words):
        new.check_controls([0, 1], "--baseline")


@pytest.mark.parametrize("count", [0, 1, 5, 6, 8])
def test_scans_of_the_runs_own_are_named_on_stderr(trained, tmp_path, capsys, count):
    names = new_scans(tmp_path, 9)
    rows = [(name, "s1" if number < count else "someone") for number, name in enumerate(names)]
    runs.say_seen(find(trained[True], tmp_path, rows[::-1], "path,subject"))
    said = capsys.readouterr()
    assert said.out == ""
    if count == 0:
        assert said.err == ""
        return
    first = [f"new{number}.nii" for number in range(count - 1, -1, -1)][:5]
    more = f" and {count - 5} more" if count > 5 else ""
    assert said.err == (
        f"{count} of 9 scans are the run's own, by their content or their subject: {', '.join(first)}{more}; "
        "each is left to the network that tested it\n"
    )
