"""dataset.py: the CSV, the checks of scans, scaling, the cohort and its folds."""

import contextlib
import hashlib
import itertools
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from cohorts import (
    AFFINE,
    OBLIQUE,
    cohort_of,
    read_nifti,
    scans_of,
    stacked,
    tiny_cohort,
    two_groups,
    voxels,
    write_csv,
    write_scan,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from nilearn.image import resample_to_img

import dataset
from internals import caches, nifti, storage
from internals.caches import Cache
from internals.errors import InputError

TINY = (5, 6, 7)


def read_text(folder: Path, text: str, labelled: bool = True) -> pd.DataFrame:
    (folder / "data.csv").write_bytes(text.encode(errors="surrogateescape"))
    return dataset.read_csv(folder / "data.csv", labelled)


def cells(table: pd.DataFrame) -> list[list[object]]:
    return table[["path", "label", "subject"]].to_numpy(dtype=object).tolist()


PLAIN = [["a.nii", 0, "a.nii"], ["sub/b.nii", 1, "sub/b.nii"]]
NAMED = [["a.nii", 0, "007"], ["sub/b.nii", 1, "NA"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.nii,0\nsub/b.nii,1", PLAIN), ("a.nii, 0 \n sub/b.nii ,1\n", PLAIN),
     ('\ufeff"a.nii","0"\r\n\r\n"sub/b.nii",1\r\n\r\n', PLAIN),
     ("path,label\na.nii,0\nsub/b.nii,1\n", PLAIN), (" label,Path\r\n0,a.nii\r\n1,sub/b.nii\r\n", PLAIN),
     ("\ufeffpath,label,subject\na.nii,0,007\nsub/b.nii,1,NA\n", NAMED),
     ("subject,age,label,path\n007,61,0,a.nii\nNA,,1,sub/b.nii\n", NAMED)],
)  # fmt: skip
def test_csv_forms(tmp_path, text, expected):
    table = read_text(tmp_path, text)
    assert read_text(tmp_path, text, labelled=False).equals(table)
    assert cells(table) == expected
    assert list(table["file"]) == [tmp_path / "a.nii", tmp_path / "sub/b.nii"]
    assert list(table.index) == [0, 1]


@pytest.mark.parametrize(
    ("text", "labels", "subjects"),
    [
        ("a.nii\nsub/b.nii\n", "??", None), ('\ufeff"a.nii"\r\n\r\n sub/b.nii', "??", None),
        ("a.nii,\nsub/b.nii,1\n", "?1", None), ("a.nii,0\nsub/b.nii\n", "0?", None),
        ("path\na.nii\nsub/b.nii\n", "??", None), (" PATH \r\na.nii\r\nsub/b.nii", "??", None),
        ("path,label\na.nii,\nsub/b.nii,0\n", "?0", None), ("label,path\n,a.nii\n ,sub/b.nii", "??", None),
        ("path,subject\na.nii,007\nsub/b.nii,NA\n", "??", ["007", "NA"]),
        ("subject,age,path\n007,61,a.nii\nNA,,sub/b.nii\n", "??", ["007", "NA"]),
        ("path,label,subject\na.nii,1,007\nsub/b.nii, ,NA\n", "1?", ["007", "NA"]),
        ("path,diagnosis\na.nii,0\nsub/b.nii,1\n", "??", None),
    ],
)  # fmt: skip
def test_csv_forms_of_scans_whose_labels_are_not_known(tmp_path, text, labels, subjects):
    """One column, or a label that is blank; with labels asked for, as by default, none of these is taken."""
    table = read_text(tmp_path, text, labelled=False)
    assert list(table.columns) == ["path", "label", "subject", "file"]
    assert list(table["path"]) == ["a.nii", "sub/b.nii"]
    assert table["label"].dtype == np.int64
    assert list(table["label"]) == [dataset.UNKNOWN if label == "?" else int(label) for label in labels]
    assert list(table["subject"]) == (subjects or ["a.nii", "sub/b.nii"])
    assert list(table["file"]) == [tmp_path / "a.nii", tmp_path / "sub/b.nii"]
    assert list(table.index) == [0, 1]
    for read in (lambda: read_text(tmp_path, text), lambda: read_text(tmp_path, text, labelled=True)):
        with pytest.raises(InputError, match=r"data\.csv: .*label"):
            read()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no scans"), ("\n\n", "no scans"), ("path\n", "no scans"), ("path,subject\n", "no scans"),
        ("a.nii,0,s1\nb.nii,1,s2\n", "one column (path) or two (path, label)|header|found 3"),
        ("label\n0\n", "header|'path'|['label']"), ("file,label\na.nii,0\n", "header|'path'"),
        ("path,path\na.nii,b.nii\n", "header|once"), ("path,age,age\na.nii,0,1\n", "header|once"),
        ("a.nii,0\nb.nii,2\n", "row 2|label '2'|0 or 1"), ("path,label\na.nii,\nb.nii,-1\n", "row 3|'-1'"),
        ("path,label\na.nii,NA\n", "row 2|'NA'"), ("a.nii,s1\n", "row 1|'s1'|not 0 or 1"),
        ("a.nii\nb.nii,1\n", "row 2: 2 cells, expected 1 in a row"), ("path\na.nii\n ,\n", "row 3: 2 cells"),
        ("path,subject\na.nii,s\n,t\n", "row 3|path|blank"), ("label,path\n0,a.nii\n1\n", "row 3|path|blank"),
        ("path,subject\na.nii,s\nb.nii,\n", "row 3|subject|blank"),
        ("a.nii\nb.nii\nsub/../a.nii\n", "row 3|sub/../a.nii|twice"),
        ("~no-such-user-here/a.nii\n", "row 1|~no-such-user-here/a.nii"),
        ("\udce9.nii\n", "cannot be read as a CSV"),
    ],
)  # fmt: skip
def test_csv_errors_of_scans_whose_labels_are_not_known(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        read_text(tmp_path, text, labelled=False)
    assert [word for word in ["data.csv", *words.split("|")] if word not in str(error.value)] == []


def test_csv_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "lists").mkdir()
    text = '/data/a.nii,0\n~/b.nii,1\n../c.nii,1\n"d, e.nii",0\nsüß/é.nii,1\n'
    table = read_text(tmp_path / "lists", text)
    assert list(table["path"]) == ["/data/a.nii", "~/b.nii", "../c.nii", "d, e.nii", "süß/é.nii"]
    places = ["home/b.nii", "c.nii", "lists/d, e.nii", "lists/süß/é.nii"]
    assert list(table["file"]) == [Path("/data/a.nii"), *(tmp_path / place for place in places)]
    monkeypatch.chdir(tmp_path)  # relative to the CSV, not to where the command runs
    assert dataset.read_csv(Path("lists/data.csv")).equals(table)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n\n", "no scans"), ("path,label\n", "no scans"), ("a.nii\nb.nii\n", "two columns|found 1"),
        ("a.nii,0,s1\nb.nii,1,s2\n", "two columns|header|found 3"),
        ("path,diagnosis\na.nii,0\n", "header|'label'"), ("file,label\na.nii,0\n", "header|'path'"),
        ("path,label,path\na.nii,0,b.nii\n", "header|once"),
        ("path,label,subject,subject\na.nii,0,s,t\n", "header|once"),
        ("scan,diagnosis\na.nii,0\nb.nii,1\n", "row 1|'diagnosis'|not 0 or 1"),
        ("a.nii,0\n,1\n", "row 2|path|blank"), ("a.nii,0\nb.nii,  \n", "row 2|label|blank"),
        ("path,label,subject\na.nii,0,s1\nb.nii,1,\n", "row 3|subject|blank"),
        ("path,label,subject\na.nii,0,s1\nb.nii,1\n", "row 3|subject|blank"),
        ("label,path\n0,a.nii\n1\n", "row 3|path|blank"), ("a.nii,0\nb.nii,2\n", "row 2|label '2'|0 or 1"),
        ("a.nii,0\nb.nii,0.5\n", "row 2|label '0.5'"), ("path,label\na.nii,0\nb.nii,yes\n", "row 3|'yes'"),
        ("a.nii,0\nb.nii,1\na.nii,0\n", "row 3|a.nii|twice"),
        ("a.nii,0\nsub/../a.nii,1\n", "row 2|sub/../a.nii|twice"),
        ("a.nii,0\nb.nii,1,x\n", "row 2: 3 cells, expected 2 in a row"),
        ("~no-such-user-here/a.nii,0\nb.nii,1\n", "row 1|~no-such-user-here/a.nii"),
        ("\udce9.nii,0\n", "cannot be read as a CSV"),
        ("path\na.nii\n", "header|'path' and 'label'"), ("path,subject\na.nii,s\n", "'path' and 'label'"),
        ("path,label\na.nii,-1\n", "row 2|label '-1'"), ("label\n0\n", "header|'path' and 'label'"),
    ],
)  # fmt: skip
def test_csv_errors(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        read_text(tmp_path, text)
    assert [word for word in ["data.csv", *words.split("|")] if word not in str(error.value)] == []


def test_csv_of_too_many_rows_or_bytes(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=f"^{tmp_path}/none.csv: no such CSV$"):
        dataset.read_csv(tmp_path / "none.csv")
    monkeypatch.setattr(dataset, "MOST_ROWS", 3)
    text = "a.nii,0\nb.nii,1\nc.nii,1\n"
    with pytest.raises(InputError, match="more than 3 rows"):
        read_text(tmp_path, text + "d.nii,1\n")
    monkeypatch.setattr(dataset, "CSV_SIZE", len(text))
    assert len(read_text(tmp_path, text)) == 3
    with pytest.raises(InputError, match="is larger than"):
        read_text(tmp_path, text + "\n")


def check(folder: Path, *names: str) -> dataset.Grid:
    return dataset.check_grid(dataset.read_csv(write_csv(folder / "more.csv", [(n, 0) for n in names])))


def test_grid_is_the_scans(tmp_path):
    """Of a first scan with a trailing axis it is 3D; NIfTI-2 and other types lie on the same."""
    values = voxels(9, shape=TINY)
    write_scan(tmp_path / "axis.nii", values[..., None])
    write_scan(tmp_path / "second.nii.gz", values, image_class=nib.Nifti2Image)
    write_scan(tmp_path / "float.nii", values.astype(np.float64))
    grid = check(tmp_path, "axis.nii", "second.nii.gz", "float.nii")
    assert grid.shape == grid.header.get_data_shape() == TINY
    assert np.array_equal(grid.affine, AFFINE)


def test_bad_scans_are_all_named_at_once_with_what_is_wrong(tmp_path, monkeypatch):
    """In the CSV's order, though threads look at them, each at one."""
    monkeypatch.setattr(dataset, "PIECE", 1)
    values = voxels(9, shape=TINY)
    write_scan(tmp_path / "fine.nii", values)
    write_scan(tmp_path / "turned.nii", values.transpose(1, 0, 2))
    write_scan(tmp_path / "moved.nii", values, AFFINE + np.eye(4, k=3))
    write_scan(tmp_path / "constant.nii", np.full(TINY, 7, np.int16))
    broken = {
        "missing.nii": "no such file",
        "turned.nii": "shape (6, 5, 7), the first scan has (5, 6, 7)",
        "moved.nii": "its affine differs from the first scan's",
        "constant.nii": "is constant (every voxel is 7)",
    } | {f"gone{i}.nii": "no such file" for i in range(19)}
    lines = [f"{name}: {words}" for name, words in broken.items()]
    for count, more in [(20, ""), (23, " (and 3 more)")]:
        with pytest.raises(InputError) as error:
            check(tmp_path, "fine.nii", *list(broken)[:count])
        named = "; ".join(lines[:20])
        assert str(error.value) == f"{count} of {count + 1} scans cannot be used: {named}{more}"


def test_voxels_of_many_scans_are_not_looked_at_for_one_report(tmp_path, monkeypatch):
    write_scan(tmp_path / "constant.nii", np.full(TINY, 7, np.int16))
    names = ["constant.nii", "missing.nii"]
    for most, count in [(2, 2), (1, 1)]:
        monkeypatch.setattr(caches, "CHECKED_AHEAD", most)
        with pytest.raises(
            InputError, match=f"^{count} of 2 scans cannot be used: .*missing.nii: no such file"
        ):
            check(tmp_path, *names)


@pytest.mark.parametrize("piece", [1, 3, 32])
def test_digest_is_that_of_samples_one_after_the_other(tmp_path, monkeypatch, piece):
    """Whatever threads take which files; the digest is in the records of earlier versions."""
    monkeypatch.setattr(dataset, "PIECE", piece)
    monkeypatch.setattr(dataset, "LOOKERS", 3)
    csv, samples = tiny_cohort(tmp_path, 11), []
    write_scan(tmp_path / "4.nii", voxels(4, shape=(30, 40, 50)))  # larger than its samples
    for number in range(11):
        content = (tmp_path / f"{number}.nii").read_bytes()
        starts = np.linspace(0, max(len(content) - 4096, 0), 16, dtype=np.int64)
        sampled = b"".join(content[start : start + 4096] for start in starts)
        samples.append(f"\n{len(content)} ".encode() + sampled)
    table = dataset.read_csv(csv)
    assert dataset.scans_digest(table) == hashlib.sha256(b"".join(samples)).hexdigest()
    assert dataset.scan_digests(table) == [hashlib.sha256(each).hexdigest() for each in samples]
    for number in (8, 3, 5):
        (tmp_path / f"{number}.nii").unlink()
    for digests in (dataset.scans_digest, dataset.scan_digests):
        with pytest.raises(InputError, match=r"^3\.nii: cannot be read \(No such file or directory\)$"):
            digests(table)


def test_digest_of_a_scan_is_that_of_its_copy_and_of_no_other(tmp_path):
    names = [f"{number}.nii" for number in range(9)]
    write_scan(tmp_path / "0.nii", voxels(0, shape=(30, 40, 50)))
    content = (tmp_path / "0.nii").read_bytes()
    for name in names[1:]:
        (tmp_path / name).write_bytes(content)
    last = len(content) - 1
    middle = (len(content) - 4096) * 7 // 15 + 2000  # in the eighth sample
    for name, place in zip(names[2:5], (0, middle, last), strict=True):
        overwrite(tmp_path / name, content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    (tmp_path / "5.nii").write_bytes(content + b"!")
    (tmp_path / "6.nii").write_bytes(content[:-1])
    os.utime(tmp_path / "7.nii", ns=(0, 0))
    (tmp_path / "sub").mkdir()
    (tmp_path / "8.nii").rename(tmp_path / "sub/8.nii.gz")
    csv = write_csv(tmp_path / "new.csv", [(name,) for name in [*names[:8], "sub/8.nii.gz"]])
    digests = dataset.scan_digests(dataset.read_csv(csv, labelled=False))
    assert [digest == digests[0] for digest in digests] == [True] * 2 + [False] * 5 + [True] * 2
    assert len(set(digests)) == 6


# New scans ---------------------------------------------------------------------------------------


def run_grid(folder: Path, shape: tuple[int, ...] = TINY, affine: np.ndarray = AFFINE) -> dataset.Grid:
    """A grid that is read from a file, as that of a run is."""
    folder.mkdir(exist_ok=True)
    return nifti.read_grid(write_scan(folder / "of run.nii.gz", voxels(9, shape=shape), affine))


def listed(folder: Path, *names: str) -> pd.DataFrame:
    return dataset.read_csv(write_csv(folder / "new.csv", [(name,) for name in names]), labelled=False)


def test_new_scans_lie_on_the_runs_grid_or_are_brought_there(tmp_path):
    like, values = run_grid(tmp_path / "run"), voxels(3, shape=TINY)
    write_scan(tmp_path / "fine.nii", values, AFFINE + 5e-4 * np.eye(4, k=3))  # half a micrometre off
    write_scan(tmp_path / "turned.nii", values.transpose(1, 0, 2))
    write_scan(tmp_path / "moved.nii", values, AFFINE + np.eye(4, k=3))
    for names in (["fine.nii", "turned.nii", "moved.nii"], ["turned.nii", "moved.nii", "fine.nii"]):
        table = listed(tmp_path, *names)
        with pytest.raises(InputError) as error:
            dataset.check_new_scans(table, like, resample=False)
        message = str(error.value)
        assert message.startswith("2 of 3 scans cannot be used: turned.nii: shape (6, 5, 7), the run has ")
        assert "(5, 6, 7); --resample brings it there" in message
        assert "; moved.nii: its affine differs from the run's" in message
        assert message.count("--resample") == 2
        found = dataset.check_new_scans(table, like, resample=True)
        assert found.grid is like
        assert found.resampled
        assert found.scans_sha256 == dataset.scans_digest(table)
    found = dataset.check_new_scans(listed(tmp_path, "fine.nii"), like, resample=False)
    assert (found.grid.mismatch(like, "the run"), found.resampled) == ("", False)


def test_new_scans_of_a_run_whose_grid_is_not_known_share_the_firsts(tmp_path):
    write_scan(tmp_path / "turned.nii", voxels(3, shape=(6, 5, 7)), OBLIQUE)
    write_scan(tmp_path / "fine.nii", voxels(4, shape=TINY))
    found = dataset.check_new_scans(listed(tmp_path, "turned.nii"), None, resample=False)
    assert (found.grid.shape, found.resampled) == ((6, 5, 7), False)
    with pytest.raises(InputError) as error:
        dataset.check_new_scans(listed(tmp_path, "turned.nii", "fine.nii"), None, resample=False)
    words = "fine.nii: shape (5, 6, 7), the first scan has (6, 5, 7)"
    assert str(error.value) == f"1 of 2 scans cannot be used: {words}"


def test_new_scans_that_no_grid_helps(tmp_path):
    """They are named at once, as those of a run are, whether they lie on its grid or not."""
    like, values = run_grid(tmp_path / "run"), voxels(3, shape=(6, 5, 7))
    write_scan(tmp_path / "turned.nii", values)
    write_scan(tmp_path / "4D.nii", np.stack([values] * 2, axis=-1))
    write_scan(tmp_path / "constant.nii", np.full((6, 5, 7), 7, np.int16))
    write_scan(tmp_path / "far.nii", values, AFFINE + 500 * np.eye(4, k=3))
    hole = values.astype(np.float32)
    hole[0, 1, 2] = np.nan
    write_scan(tmp_path / "nan.nii", hole)
    wrong = {
        "gone.nii": "no such file",
        "4D.nii": "expected one 3D volume, found shape (6, 5, 7, 2)",
        "constant.nii": "is constant (every voxel is 7)",
        "far.nii": "",
        "nan.nii": "has voxels that are NaN or infinite",
    }
    with pytest.raises(InputError) as error:
        dataset.check_new_scans(listed(tmp_path, "turned.nii", *wrong), like, resample=True)
    message = str(error.value)
    assert message.startswith("5 of 6 scans cannot be used: ")
    assert [name for name, words in wrong.items() if f"{name}: {words}" not in message] == []
    assert "turned.nii" not in message


# smaller voxels, partly beyond the scan; turned by 20 degrees; larger voxels, all within the scan
ONTO = {
    "shifted": ((8, 9, 7), AFFINE @ nib.affines.from_matvec(np.diag([0.9, 0.8, 1.1]), [-2.4, 3.2, 4.1])),
    "turned": ((12, 13, 14), OBLIQUE @ nib.affines.from_matvec(np.eye(3), [-2, 3, -1])),
    "within": ((4, 4, 5), AFFINE @ nib.affines.from_matvec(2 * np.eye(3), [1.5, 1.2, 1.7])),
}


@pytest.mark.parametrize("low", [0, -50, 120])
@pytest.mark.parametrize(("shape", "affine"), ONTO.values(), ids=ONTO)
def test_scan_is_brought_onto_a_grid_as_by_nilearn(tmp_path, shape, affine, low):
    """Within its outermost voxels' centres; a voxel further out there is its minimum."""
    values = (low + 20 + 100 * np.random.default_rng(2).random((10, 11, 12))).astype(np.float32)
    values[3:7, 4:8, 4:9] += 780  # so that the highest is within
    values[5, 5, 6] = low
    file = write_scan(tmp_path / "scan.nii", values)
    onto = run_grid(tmp_path / "run", shape, affine)
    options = {"interpolation": "linear", "force_resample": True, "copy_header": True, "fill_value": low}
    moved = resample_to_img(
        read_nifti(file), read_nifti(tmp_path / "run/of run.nii.gz"), **options
    ).get_fdata()
    there = np.linalg.inv(AFFINE) @ onto.affine
    place = nib.affines.apply_affine(there, np.moveaxis(np.indices(shape), 0, -1))
    inside = ((place >= 0) & (place <= np.array(values.shape) - 1)).all(axis=-1)
    outside = ((place < -1) | (place > values.shape)).any(axis=-1)
    least, most = (low if outside.any() else moved[inside].min()), moved[inside].max()

    found = dataset.read_scan(file, onto)
    assert (found.shape, found.dtype) == (shape, np.float32)
    # float32 rounds voxel, minimum and range (2^-15 of less than 1024 each) and the quotient (2^-25)
    assert most - least > 500
    exact = (moved - least) / (most - least)
    assert np.allclose(found[inside], exact[inside], rtol=0, atol=4 * 2**-15 / 500)
    assert inside.sum() > 50
    assert (found[outside] == 0).all()
    assert outside.any() == (shape != ONTO["within"][0])
    assert (found.min(), found.max()) == (0, 1)


def test_scan_that_lies_on_the_grid_stays_as_it_is(tmp_path):
    values = (np.random.default_rng(1).random(TINY) * 200 + 20).astype(np.float32)
    for affine in (AFFINE, OBLIQUE):
        onto = run_grid(tmp_path / "run", affine=affine)
        for off in (0, 5e-4):  # mm, half a micrometre
            file = write_scan(tmp_path / "scan.nii.gz", values, affine + off * np.eye(4, k=3))
            assert np.array_equal(dataset.read_scan(file, onto), dataset.read_scan(file))
    moved = write_scan(tmp_path / "moved.nii.gz", values, OBLIQUE + 0.4 * np.eye(4, k=3))
    assert not np.allclose(dataset.read_scan(moved, onto), dataset.read_scan(moved), atol=0.01)


def new_cohort(folder: Path, like: dataset.Grid, *names: str) -> dataset.Cohort:
    """New scans, which are brought onto the grid of a run."""
    table = listed(folder, *names)
    checked = dataset.check_new_scans(table, like, resample=True)
    return dataset.Cohort(folder / "new.csv", table, checked, pd.DataFrame(), 0)


@pytest.mark.parametrize("kind", ["ram", "disk", "none"])
def test_opened_scans_lie_on_the_runs_grid(tmp_path, kind):
    """Wherever they are kept, also where other processes read them."""
    like = run_grid(tmp_path / "run", (6, 5, 8), OBLIQUE)
    for number in range(4):
        write_scan(tmp_path / f"{number}.nii", voxels(number, shape=TINY), AFFINE + number * np.eye(4, k=3))
    write_scan(tmp_path / "1.nii", voxels(1, shape=(6, 5, 8)), OBLIQUE)
    cohort = new_cohort(tmp_path, like, *(f"{number}.nii" for number in range(4)))
    scans = cohort.open_scans(Cache(kind, tmp_path / "cache"))
    wanted = np.stack([dataset.read_scan(tmp_path / f"{number}.nii", like) for number in range(4)])[:, None]
    assert wanted.shape == (4, 1, 6, 5, 8)
    assert np.array_equal(stacked(scans), wanted)
    assert np.array_equal(stacked(pickle.loads(pickle.dumps(scans))), wanted)
    batches = list(scans.loader([3, 0, 2, 1], 3, workers=2))
    assert np.array_equal(torch.cat([volumes for volumes, _ in batches]), wanted[[3, 0, 2, 1]])
    assert torch.cat([labels for _, labels in batches]).tolist() == [dataset.UNKNOWN] * 4


def test_scans_kept_on_one_grid_are_not_taken_for_those_on_another(tmp_path):
    """The same files and the same shape, and another place."""
    write_scan(tmp_path / "0.nii", voxels(0, shape=TINY))
    found = set()
    for affine in (AFFINE, AFFINE + 2 * np.eye(4, k=3), OBLIQUE):
        cohort = new_cohort(tmp_path, run_grid(tmp_path / "run", affine=affine), "0.nii")
        scans = cohort.open_scans(Cache("disk", tmp_path / "cache"))
        assert np.array_equal(scans[0][0][0], dataset.read_scan(tmp_path / "0.nii", cohort.grid))
        found.add(scans[0][0].numpy().tobytes())
    assert len(found) == 3


# What a run remembers of the files ---------------------------------------------------------------


def overwrite(file: Path, content: bytes, later: int = 0) -> None:
    """Put other content into a file, whose time is the same, or later by nanoseconds."""
    status = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + later))


def checked(csv: Path) -> tuple[pd.DataFrame, dataset.Checked, dict[str, Any]]:
    """A table, what was found in its files, and what a record says of that."""
    table = dataset.read_csv(csv)
    found = dataset.check_scans(table, {})
    return table, found, {"scans_sha256": found.scans_sha256, "scans_mark": found.mark}


def test_files_that_did_not_change_are_not_opened_again(tmp_path):
    """But for the first; the others are no images any more, which only opening them would tell."""
    table, first, record = checked(tiny_cohort(tmp_path))
    assert (first.grid.shape, first.scans_sha256) == (TINY, dataset.scans_digest(table))
    for number in range(1, 6):
        file = tmp_path / f"{number}.nii"
        overwrite(file, bytes(file.stat().st_size))
    found = dataset.check_scans(table, record)
    assert (found.scans_sha256, found.mark) == (first.scans_sha256, first.mark)
    assert (found.grid.record(), found.grid.header) == (first.grid.record(), first.grid.header)


@pytest.mark.parametrize(("longer", "later"), [(0, 1), (0, -1), (1, 0), (-1, 0)])
def test_another_size_or_time_of_a_file_has_all_looked_at_again(tmp_path, longer, later):
    table, first, record = checked(tiny_cohort(tmp_path))
    file = tmp_path / "3.nii"
    content = file.read_bytes()
    overwrite(file, bytes(len(content) + longer), later)
    with pytest.raises(InputError, match=r"1 of 6 scans cannot be used: 3\.nii: not a NIfTI image"):
        dataset.check_scans(table, record)
    overwrite(file, content, later)  # what it was, at another time
    found = dataset.check_scans(table, record)
    assert found.scans_sha256 == first.scans_sha256
    assert (found.mark == first.mark) == (later == 0)


@pytest.mark.parametrize(
    "damage",
    [{"scans_mark": None}, {"scans_mark": 5}, {"scans_mark": "0" * 64}, {"scans_mark": ["x"]},
     {"scans_sha256": None}, {"scans_sha256": "0" * 64}, {"scans_sha256": "\ud800"}, {"scans_sha256": [1]}],
)  # fmt: skip
def test_record_that_is_damaged_has_all_looked_at_again(tmp_path, damage):
    table, _, record = checked(tiny_cohort(tmp_path))
    overwrite(tmp_path / "3.nii", bytes((tmp_path / "3.nii").stat().st_size))
    dataset.check_scans(table, record)
    with pytest.raises(InputError, match=r"3\.nii: not a NIfTI image"):
        dataset.check_scans(table, record | damage)
    overwrite(tmp_path / "3.nii", (tmp_path / "1.nii").read_bytes())
    again, afresh = (dataset.check_scans(table, each) for each in (record | damage, {}))
    assert (again.scans_sha256, again.mark) == (afresh.scans_sha256, afresh.mark)


def test_what_was_found_is_of_these_files_and_their_first_header(tmp_path):
    table, first, record = checked(tiny_cohort(tmp_path))
    others = [table, table[::-1].reset_index(drop=True), table[:5]]
    assert len({dataset.check_scans(other, record).mark for other in others}) == 3
    write_scan(tmp_path / "0.nii", voxels(0, shape=TINY), 2 * AFFINE)
    os.utime(tmp_path / "0.nii", ns=(0, 0))
    with pytest.raises(InputError, match=r"5 of 6 scans cannot be used: 1\.nii: its affine differs"):
        dataset.check_scans(table, record)
    (tmp_path / "0.nii").unlink()
    with pytest.raises(InputError, match=r"1 of 6 scans cannot be used: 0\.nii: no such file"):
        dataset.check_scans(table, record)
    assert first.mark == record["scans_mark"]


def test_file_that_changes_while_it_is_looked_at_is_looked_at_again(tmp_path, monkeypatch):
    honest, csv = dataset.scans_digest, tiny_cohort(tmp_path)

    def meanwhile(table: pd.DataFrame) -> str:
        digest = honest(table)
        overwrite(tmp_path / "3.nii", (tmp_path / "1.nii").read_bytes(), later=1)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "scans_digest", meanwhile)
        table, first, record = checked(csv)
    assert dataset.check_scans(table, record).scans_sha256 == honest(table) != first.scans_sha256


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_scaling(tmp_path, dtype):
    values = (np.random.default_rng(1).random(TINY) * 200 + 20).astype(dtype)
    scan = dataset.read_scan(write_scan(tmp_path / "a.nii.gz", values))
    assert scan.dtype == np.float32
    assert scan.shape == TINY
    exact = values.astype(np.float64)
    exact = (exact - exact.min()) / (exact.max() - exact.min())
    # float32 rounds voxel, minimum and range (each 2^-17 of 200 at most) and the quotient (2^-25)
    assert np.allclose(scan, exact, rtol=0, atol=3 * 2**-17 / 199 + 2**-25)


def test_scaling_ends_exactly_at_0_and_1(tmp_path):
    for low, spread in itertools.product((0, -700, 100), (41, 47, 83, 1000, 4095, 30000)):
        values = np.linspace(low, low + spread, 210).round().astype(np.int16).reshape(TINY)
        scan = dataset.read_scan(write_scan(tmp_path / "a.nii", values))
        assert (scan.min(), scan.max()) == (0, 1)
    for high in (1e-45, 1e-39, 3e38):
        values = (np.arange(210).reshape(TINY) % 2 * high).astype(np.float32)
        assert np.array_equal(dataset.read_scan(write_scan(tmp_path / "a.nii", values)), values > 0)


def test_slope_drops_out_and_its_sign_does_not(tmp_path):
    raw = voxels(3, shape=TINY)
    path = write_scan(tmp_path / "a.nii", raw[..., None])  # a trailing axis is dropped
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([-0.5, 300], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(content)
    upside_down = (raw.max() - raw) / np.float64(raw.max() - raw.min())
    assert np.allclose(dataset.read_scan(path), upside_down, rtol=0, atol=1e-6)  # a few roundings of float32


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [*((1, value, "has voxels that are NaN or infinite") for value in (np.nan, np.inf, -np.inf)),
     (0, 0, "is constant (every voxel is 0)"), (7, 7, "is constant (every voxel is 7)"),
     (-3e38, 3e38, "has voxels from -3e+38 to 3e+38, too far apart for float32")],
)  # fmt: skip
def test_voxels_that_cannot_be_scaled(tmp_path, low, high, words):
    values = np.full(TINY, low, np.float32)
    values[1, 2, 3] = high
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        dataset.read_scan(write_scan(tmp_path / "a.nii", values))


def test_cohort_and_its_identity(tmp_path):
    """CSV, folds and grid to the byte; of the scans, samples, wherever they lie."""
    csv = tiny_cohort(tmp_path / "a", 10)
    first, table = dataset.new_cohort(csv, 2, "stratified", 0.4, 1), dataset.read_csv(csv)
    assert (first.csv, first.k, first.grid.shape) == (csv, 2, TINY)
    assert first.table.equals(table)
    assert first.folds.equals(dataset.make_folds(table, 2, "stratified", 0.4, 1))
    for role, scans in by_role(first.folds, 1).items():
        numbers = first.scan_indices(1, role)
        assert numbers == sorted(numbers)
        assert [table["path"][i] for i in numbers] == list(scans["path"])
        assert first.labels(1, role).tolist() == list(scans["label"])
    assert first.identity == {
        "csv_sha256": storage.file_sha256(csv),
        "scans_sha256": first.identity["scans_sha256"],
        "folds_sha256": hashlib.sha256(first.folds.to_csv(index=False).encode()).hexdigest(),
        "grid": {"shape": list(TINY), "affine": AFFINE.tolist()},
    }

    def differing(csv: Path, seed: int = 1) -> set[str]:
        found = dataset.new_cohort(csv, 2, "stratified", 0.4, seed).identity
        return {name for name in found if found[name] != first.identity[name]}

    assert differing(csv, seed=2) == {"folds_sha256"}
    moved = Path(shutil.copytree(tmp_path / "a", tmp_path / "b")) / "data.csv"
    assert differing(moved) == set()
    write_scan(moved.parent / "3.nii", voxels(99, shape=TINY))
    assert differing(moved) == {"scans_sha256"}
    moved.write_text(moved.read_text() + "\n")
    assert differing(moved) == {"csv_sha256", "scans_sha256"}


def test_mean_of_scans(tmp_path):
    scans = dataset.ScanDataset(cohort_of(tiny_cohort(tmp_path)).table)
    wanted = np.mean([dataset.read_scan(tmp_path / f"{i}.nii") for i in (1, 4, 5)], axis=0, dtype=np.float64)
    assert scans.mean([1, 4, 5]).dtype == np.float32
    assert np.allclose(scans.mean([1, 4, 5]), wanted, rtol=0, atol=6e-8)  # half a unit of float32 near 1


def cohort_table(subjects: list[str], labels: list[int]) -> pd.DataFrame:
    """A table as read_csv returns it, of files that need not exist."""
    paths = [f"{i}.nii" for i in range(len(labels))]
    files = [Path("/scans") / path for path in paths]
    return pd.DataFrame({"path": paths, "label": labels, "subject": subjects, "file": files})


@st.composite
def cohorts(draw: st.DrawFn) -> pd.DataFrame:
    """8 to 14 subjects of each label, each with one to three scans, in any order."""
    scans = []
    for label in (0, 1):
        for number in range(draw(st.integers(8, 14))):
            scans += [(f"s{label}{number}", label)] * draw(st.integers(1, 3))
    subjects, labels = zip(*draw(st.permutations(scans)), strict=True)
    return cohort_table(list(subjects), list(labels))


def by_role(folds: pd.DataFrame, fold: int) -> dict[str, pd.DataFrame]:
    part = folds[folds["fold"] == fold]
    return {role: part[part["role"] == role] for role in ("train", "val", "test")}


@settings(deadline=None, max_examples=40)
@given(cohorts(), st.integers(2, 5), st.integers(0, 2**32 - 1), st.sampled_from([0.25, 0.4]))
def test_stratified_folds(table, k, seed, fraction):
    folds = dataset.make_folds(table, k, "stratified", fraction, seed)
    assert list(folds.columns) == ["fold", "role", "path", "label", "subject"]
    everyone = table.groupby("subject")["label"].max()
    tested: list[str] = []
    for fold in range(k):
        part = folds[folds["fold"] == fold]
        assert part[["path", "label", "subject"]].to_numpy().tolist() == cells(table)
        roles = {role: set(scans["subject"]) for role, scans in by_role(folds, fold).items()}
        assert sum(map(len, roles.values())) == len(set.union(*roles.values())) == len(everyone)
        tested += roles["test"]
        rest = everyone.drop(list(roles["test"]))
        assert len(roles["val"]) == round(fraction * len(rest))
        for label in (0, 1):
            labelled = set(everyone.index[everyone == label])
            # a share that cannot be met exactly is missed by less than one subject
            assert abs(len(labelled & roles["test"]) - len(labelled) / k) < 1
            share = len(labelled - roles["test"]) / len(rest)
            assert abs(len(labelled & roles["val"]) - share * len(roles["val"])) < 1
    assert sorted(tested) == sorted(everyone.index)


@settings(deadline=None, max_examples=20)
@given(table=cohorts(), seed=st.integers(0, 10**6))
def test_folds_depend_on_the_seed_and_on_nothing_else(table, seed):
    first = dataset.make_folds(table, 3, "stratified", 0.3, seed)
    np.random.seed(seed % 7)
    before = np.random.get_state()[1].tolist()
    moved = table.assign(file=[Path("/elsewhere") / path for path in table["path"]])
    assert dataset.make_folds(moved, 3, "stratified", 0.3, seed).equals(first)
    assert np.random.get_state()[1].tolist() == before
    assert not dataset.make_folds(table, 3, "stratified", 0.3, seed + 1).equals(first)


def test_subject_with_both_labels_counts_as_patient_and_stays_whole():
    # ten controls, ten patients whose first scan was still labelled 0
    subjects = [f"c{i}" for i in range(10)] + [f"p{i}" for i in range(10) for _ in range(2)]
    table = cohort_table(subjects, [0] * 10 + [0, 1] * 10)
    folds = dataset.make_folds(table, 5, "stratified", 0.25, seed=0)
    for fold in range(5):
        test = set(by_role(folds, fold)["test"]["subject"])
        assert sorted(name[0] for name in test) == ["c", "c", "p", "p"]
    assert (folds.groupby(["fold", "subject"])["role"].nunique() == 1).all()


def test_contiguous_split_is_the_published_one():
    # 502 rows whose labels follow no order that would help the split
    labels = np.random.default_rng(0).permutation([0] * 265 + [1] * 237).tolist()
    table = cohort_table([f"{i}.nii" for i in range(502)], labels)
    folds = dataset.make_folds(table, 5, "contiguous", 0.2, seed=0)
    for fold, (first, last) in enumerate([(0, 100), (100, 200), (200, 300), (300, 400), (400, 502)]):
        roles = by_role(folds, fold)
        assert list(roles["test"]["path"]) == [f"{i}.nii" for i in range(first, last)]
        sizes = (len(roles["train"]), len(roles["val"]))
        assert sizes == ((322, 80) if fold < 4 else (320, 80))
        rest = pd.concat([roles["train"], roles["val"]])["label"].mean()
        # stratified: within one scan of 80
        assert abs(roles["val"]["label"].mean() - rest) < 1 / 80
    other = dataset.make_folds(table, 5, "contiguous", 0.2, seed=1)  # moves validation only
    assert ((folds["role"] == "test") == (other["role"] == "test")).all()
    assert not folds.equals(other)


def test_contiguous_keeps_a_subject_within_its_block_or_refuses():
    subjects = ["a", "a"] + [f"s{i}" for i in range(26)] + ["z", "z"]
    folds = dataset.make_folds(cohort_table(subjects, [0, 0] + [0, 1] * 14), 3, "contiguous", 0.2, 0)
    assert list(by_role(folds, 0)["test"]["subject"])[:2] == ["a", "a"]
    subjects[9] = subjects[10] = "both"
    with pytest.raises(InputError, match=r"contiguous.*subject both"):
        dataset.make_folds(cohort_table(subjects, [0, 1] * 15), 3, "contiguous", 0.2, 0)


@pytest.mark.parametrize(
    ("labels", "k", "split", "fraction", "words"),
    [
        ([0] * 20 + [1] * 4, 5, "stratified", 0.2, "5 stratified folds .* 20 of label 0 and 4 of label 1"),
        ([1] * 20, 5, "contiguous", 0.2, "0 of label 0 and 20 of label 1"),
        ([0, 1], 3, "contiguous", 0.2, "3 contiguous folds"),
        ([0, 1] * 5, 5, "stratified", 0.05, "--val-fraction 0.05 of 8 training subjects"),
        ([0, 1] * 5, 5, "stratified", 0.95, "--val-fraction 0.95 of 8 training subjects"),
        ([0] * 10 + [1] * 10, 2, "contiguous", 0.2, "both labels"),
    ],
)
def test_fold_errors(labels, k, split, fraction, words):
    table = cohort_table([f"s{i}" for i in range(len(labels))], labels)
    with pytest.raises(InputError, match=words):
        dataset.make_folds(table, k, split, fraction, seed=0)


@pytest.mark.parametrize(("fraction", "refused"), [(0.1, True), (0.2, True), (0.5, False), (0.9, True)])
def test_validation_and_training_hold_both_labels_or_the_split_is_refused(fraction, refused):
    # three patients among forty: a tenth of the training part would leave them out of validation
    table = cohort_table([f"s{i}" for i in range(40)], ([1] + [0] * 12) * 3 + [0])
    with pytest.raises(InputError) if refused else contextlib.nullcontext():
        folds = dataset.make_folds(table, 3, "stratified", fraction, seed=0)
        assert (folds.groupby(["fold", "role"])["label"].nunique() == 2).all()


# Permuted labels ---------------------------------------------------------------------------------


def permutable(tmp_path: Path) -> dataset.Cohort:
    """Forty subjects, half of them with two scans, in two folds; no scan exists."""
    rows = [(f"{i}.nii", int(i % 40 < 15), f"s{i % 40}") for i in range(60)]
    csv = write_csv(tmp_path / "data.csv", rows, header="path,label,subject")
    table = dataset.read_csv(csv)
    checked = dataset.Checked(None, "", "")  # type: ignore[arg-type]
    return dataset.Cohort(csv, table, checked, dataset.make_folds(table, 2, "stratified", 0.25, 0), 2)


def test_permuted_labels_are_shuffled_within_a_folds_training_and_validation_subjects(tmp_path):
    cohort = permutable(tmp_path)
    labels, subjects = cohort.table["label"].to_numpy(), cohort.table["subject"]
    for fold in range(2):
        found = cohort.permuted_labels(fold, seed=3)
        test = cohort.scan_indices(fold, "test")
        assert found[test].tolist() == labels[test].tolist()
        for role in ("train", "val"):
            rows = cohort.scan_indices(fold, role)
            mine = pd.DataFrame({"before": labels[rows], "after": found[rows], "subject": subjects[rows]})
            by_subject = mine.groupby("subject")
            assert (by_subject["after"].nunique() == 1).all()  # a subject's scans go together
            assert by_subject["before"].max().sum() == by_subject["after"].max().sum()
            assert mine["before"].tolist() != mine["after"].tolist()
        assert found.tolist() == cohort.permuted_labels(fold, seed=3).tolist()
        assert found.tolist() != cohort.permuted_labels(fold, seed=4).tolist()
    assert cohort.permuted_labels(0, 3).tolist() != cohort.permuted_labels(1, 3).tolist()
    assert cohort.table["label"].tolist() == labels.tolist()


def test_scans_with_other_labels_are_the_same_scans():
    scans = scans_of(two_groups(6, (3, 4, 5)))
    other = scans.with_labels(np.array([1, 1, 0, 0, 1, 0]))
    assert [label for _, label in (other[i] for i in range(6))] == [1, 1, 0, 0, 1, 0]
    assert [label for _, label in (scans[i] for i in range(6))] == [0, 1, 0, 1, 0, 1]
    assert all(torch.equal(scans[i][0], other[i][0]) for i in range(6))
