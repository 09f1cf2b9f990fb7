"""runs.py: a training run's records, as they were written and as they were edited by hand."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from cohorts import tiny_cohort

import dataset
import runs
from internals import storage
from internals.errors import InputError

K = 2


@pytest.fixture
def run(tmp_path) -> Path:
    """The records of a run, as train_cv.py leaves them."""
    csv = tiny_cohort(tmp_path, 8)
    csv.write_text(
        "path,label,subject\n" + "".join(f"{i}.nii,{i % 2},00{i // 4 * 2 + i % 2}\n" for i in range(8))
    )
    table = dataset.read_csv(csv)
    arguments = {"fold": K, "split": "stratified", "val_fraction": 0.5, "seed": 0, "lr": 1e-4}
    record = {"csv": str(csv), "csv_sha256": storage.sha256(csv), "model": "modelB2", "arguments": arguments}
    folder = tmp_path / "models"
    parts = [table[dataset.COLUMNS].assign(fold=fold, role=role) for fold, role in enumerate(ROLES)]
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_csv(pd.concat(parts)[["fold", "role", *dataset.COLUMNS]], folder / "folds.csv")
    storage.write_json(record | {"grid": dataset.check_grid(table).record()}, folder / "run.json")
    return folder


# Of the scans in fold 0 and 1. Subjects 000 and 001 have the first four scans, 002 and 003 the others.
ROLES = [["test", "train"] * 2 + ["val", "train"] * 2, ["val", "test"] * 2 + ["test", "test"] * 2]


def refusal(run: Path) -> str:
    with pytest.raises(InputError) as error:
        runs.find_run(run, None, None, None)
    return str(error.value)


def test_run_as_it_was_written(run):
    found = runs.find_run(run, None, None, None)
    assert (found.model, found.k, len(found.table)) == ("modelB2", K, 8)
    assert [found.folds.loc[found.folds["fold"] == fold, "role"].tolist() for fold in range(K)] == ROLES
    assert found.folds.to_csv(index=False) == (run / "folds.csv").read_text()
    assert runs.recorded_arguments(run) == {"fold": K, "split": "stratified", "val_fraction": 0.5, "seed": 0}


@pytest.mark.parametrize("value", [None, "x", [1], {"a": 1}, -1, 10**9, 1e999, True, "\0"])
@pytest.mark.parametrize("name", ["csv", "csv_sha256", "model", "grid", "arguments"])
def test_record_edited_to_nonsense(run, name, value):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {name: value}))
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
    record = json.loads((run / "run.json").read_text())
    record["arguments"][name] = value
    (run / "run.json").write_text(json.dumps(record))
    assert "run.json: is damaged" in refusal(run)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("fold,role", "fold,part", "columns"),
        ("0,test,0.nii", "0,best,0.nii", "row 2"),
        ("0,test,0.nii", "1,test,0.nii", "row 2"),
        ("0,test,0.nii", "zero,test,0.nii", "row 2"),
        ("0,test,0.nii", "0,test,9.nii", "row 2"),
        ("0.nii,0,000", "0.nii,1,000", "row 2"),
        ("0.nii,0,000", "0.nii,0,0", "row 2"),
        ("0.nii,0,000", "0.nii,0", "row 2"),
        ("0.nii,0,000", "0.nii,0,000,0", "row 2"),
        ("1,test,7.nii,1,003\n", "", "row 17 is missing"),
        ("1,test,7.nii,1,003\n", "1,test,7.nii,1,003\n" * 2, "row 18"),
        ("0,train,5.nii", "0,test,5.nii", "5.nii is not tested in exactly one fold"),
        ("0,test,0.nii", "0,val,0.nii", "0.nii is not tested in exactly one fold"),
        ("0,train,1.nii", "0,val,1.nii", "subject 001 has several roles in fold 0"),
        ("0,train,1.nii", "0,train,\0.nii", "NUL"),
        ("0,train,1.nii", '0,train,"1.nii', "cannot be read as a CSV"),
    ],
)
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
