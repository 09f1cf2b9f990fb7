"""dataset.py: the CSV, the checks of scans, scaling and folds."""

import contextlib
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from cohorts import AFFINE, read_nifti, tiny_cohort, voxels, write_csv, write_scan
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from internals.errors import InputError

TINY = (5, 6, 7)


def read_text(folder: Path, text: str, encoding: str = "utf-8") -> pd.DataFrame:
    csv = folder / "data.csv"
    csv.write_bytes(text.encode(encoding))
    return dataset.read_csv(csv)


def cells(table: pd.DataFrame) -> list[list[object]]:
    return table[["path", "label", "subject"]].to_numpy(dtype=object).tolist()


# The CSV -----------------------------------------------------------------------------------------

PLAIN = [["a.nii", 0, "a.nii"], ["sub/b.nii", 1, "sub/b.nii"]]
NAMED = [["a.nii", 0, "007"], ["sub/b.nii", 1, "NA"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.nii,0\nsub/b.nii,1\n", PLAIN),
        ("a.nii,0\nsub/b.nii,1", PLAIN),
        ("a.nii, 0 \n sub/b.nii ,1\n", PLAIN),
        ("a.nii,0\r\nsub/b.nii,1\r\n", PLAIN),
        ('"a.nii","0"\n"sub/b.nii",1\n', PLAIN),
        ("a.nii,0\n\nsub/b.nii,1\n\n", PLAIN),
        ("path,label\na.nii,0\nsub/b.nii,1\n", PLAIN),
        ("label,path\r\n0,a.nii\r\n1,sub/b.nii\r\n", PLAIN),
        ("path,label,subject\na.nii,0,007\nsub/b.nii,1,NA\n", NAMED),
        ("subject,age,label,path\n007,61,0,a.nii\nNA,,1,sub/b.nii\n", NAMED),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_forms(tmp_path, text, expected, encoding):
    table = read_text(tmp_path, text, encoding)
    assert cells(table) == expected
    assert list(table["file"]) == [tmp_path / "a.nii", tmp_path / "sub/b.nii"]
    assert list(table.index) == [0, 1]


def test_csv_quoted_comma_and_unicode(tmp_path):
    table = read_text(tmp_path, '"a, b.nii",0\nsüß/é.nii,1\n')
    assert list(table["path"]) == ["a, b.nii", "süß/é.nii"]
    assert table["file"][0] == tmp_path / "a, b.nii"


def test_csv_paths_absolute_home_and_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "lists").mkdir()
    table = read_text(tmp_path / "lists", "/data/a.nii,0\n~/b.nii,1\n../c.nii,1\n")
    assert list(table["path"]) == ["/data/a.nii", "~/b.nii", "../c.nii"]
    assert list(table["file"]) == [Path("/data/a.nii"), tmp_path / "home/b.nii", tmp_path / "c.nii"]


def test_csv_relative_path_does_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    write_csv(tmp_path / "data.csv", [("a.nii", 0), ("b.nii", 1)])
    monkeypatch.chdir(tmp_path)
    from_inside = dataset.read_csv(Path("data.csv"))
    monkeypatch.chdir("/")
    assert dataset.read_csv(tmp_path / "data.csv").equals(from_inside)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["data.csv"]),
        ("\n\n", ["data.csv"]),
        ("path,label\n", ["data.csv", "no scans"]),
        ("a.nii\nb.nii\n", ["two columns", "found 1"]),
        ("a.nii,0,s1\nb.nii,1,s2\n", ["two columns", "header", "found 3"]),
        ("path,diagnosis\na.nii,0\n", ["header", "'label'"]),
        ("file,label\na.nii,0\n", ["header", "'path'"]),
        ("path,label,path\na.nii,0,b.nii\n", ["header", "once"]),
        ("path,label,subject,subject\na.nii,0,s,t\n", ["header", "once"]),
        ("scan,diagnosis\na.nii,0\nb.nii,1\n", ["row 1", "'diagnosis'", "not 0 or 1"]),
        ("a.nii,0\n,1\n", ["row 2", "path", "blank"]),
        ("a.nii,0\nb.nii,\n", ["row 2", "label", "blank"]),
        ("a.nii,0\nb.nii,  \n", ["row 2", "label", "blank"]),
        ("path,label,subject\na.nii,0,s1\nb.nii,1,\n", ["row 3", "subject", "blank"]),
        ("path,label,subject\na.nii,0,s1\nb.nii,1\n", ["row 3", "subject", "blank"]),
        ("label,path\n0,a.nii\n1\n", ["row 3", "path", "blank"]),
        ("a.nii,0\nb.nii,2\n", ["row 2", "label '2'", "0 or 1"]),
        ("a.nii,0\nb.nii,-1\n", ["row 2", "label '-1'"]),
        ("a.nii,0\nb.nii,AD\n", ["row 2", "label 'AD'"]),
        ("a.nii,0\nb.nii,0.5\n", ["row 2", "label '0.5'"]),
        ("path,label\na.nii,0\nb.nii,yes\n", ["row 3", "label 'yes'"]),
        ("a.nii,0\nb.nii,1\na.nii,0\n", ["row 3", "a.nii", "twice"]),
        ("a.nii,0\nsub/../a.nii,1\n", ["row 2", "sub/../a.nii", "twice"]),
        ("a.nii,0\nb.nii,1,x\n", ["data.csv"]),
        ("~no-such-user-here/a.nii,0\nb.nii,1\n", ["row 1", "~no-such-user-here/a.nii"]),
    ],
)
def test_csv_errors(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        read_text(tmp_path, text)
    assert all(word in str(error.value) for word in ["data.csv", *words]), error.value


def test_csv_error_missing_folder_or_not_text(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv: no such"):
        dataset.read_csv(tmp_path / "none.csv")
    with pytest.raises(InputError, match="is a folder, expected a CSV"):
        dataset.read_csv(tmp_path)
    with pytest.raises(InputError, match="cannot be read as a CSV"):
        read_text(tmp_path, "é.nii,0\n", encoding="latin-1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.nii,0\nb\0.nii,1\n", "line 2 has a NUL"),
        ('a.nii,0\n"b.nii,1\nc.nii,0\n', "cannot be read as a CSV (unexpected end of data)"),
        ('"a.nii"x,0\n', "cannot be read as a CSV"),
        ("a.nii,0\n" + "b" * 2**16 + ",1\n", "line 2 has more than 65536 characters"),
        ("a.nii,0,1,2\n" * 3, "expected two columns (path, label), or a header; found 4"),
        ("a.nii,0\nb.nii,1,2\n", "row 2: 3 cells, expected 2 in a row"),
        ("a.nii,0\n" + "b" * 300 + "/c.nii,1\n", None),
    ],
)
def test_csv_nonsense(tmp_path, text, words):
    if words is None:  # no file can have such a name: a matter of the scans
        with pytest.raises(InputError, match=r"b/c\.nii: cannot be found \(File name too long\)"):
            dataset.check_grid(read_text(tmp_path, text))
        return
    with pytest.raises(InputError) as error:
        read_text(tmp_path, text)
    assert f"{tmp_path / 'data.csv'}: {words}" in str(error.value)


def test_csv_of_too_many_rows_or_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MOST_ROWS", 3)
    text = "a.nii,0\nb.nii,1\nc.nii,1\n"
    assert len(read_text(tmp_path, text)) == 3
    with pytest.raises(InputError, match="more than 3 rows"):
        read_text(tmp_path, text + "d.nii,1\n")
    monkeypatch.setattr(dataset, "CSV_SIZE", len(text))
    assert len(read_text(tmp_path, text)) == 3
    with pytest.raises(InputError, match="is larger than"):
        read_text(tmp_path, text + "\n")


def test_csv_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "data.csv")
    with pytest.raises(InputError, match="is a pipe or a device, expected a CSV"):
        dataset.read_csv(tmp_path / "data.csv")


# The grid ----------------------------------------------------------------------------------------


def check(folder: Path, *extra: str) -> dataset.Grid:
    """check_grid of four tiny scans, then of those under the extra names."""
    tiny_cohort(folder, 4)
    names = [*(f"{i}.nii" for i in range(4)), *extra]
    return dataset.check_grid(dataset.read_csv(write_csv(folder / "more.csv", [(n, 0) for n in names])))


def test_grid_is_the_scans(tmp_path):
    grid = check(tmp_path)
    assert grid.shape == TINY
    assert np.array_equal(grid.affine, AFFINE)
    assert grid.header.get_data_shape() == TINY
    assert grid.record() == {"shape": [5, 6, 7], "affine": AFFINE.tolist()}


def test_grid_takes_gz_nifti2_trailing_axis_and_rounded_affines(tmp_path):
    write_scan(tmp_path / "gz.nii.gz", voxels(9, shape=TINY))
    write_scan(tmp_path / "second.nii", voxels(9, shape=TINY), image_class=nib.Nifti2Image)
    write_scan(tmp_path / "axis.nii", voxels(9, shape=TINY)[..., None])
    write_scan(tmp_path / "float.nii", voxels(9, shape=TINY).astype(np.float64))
    write_scan(tmp_path / "rounded.nii", voxels(9, shape=TINY), AFFINE + 1e-5 * np.eye(4, k=1))
    assert check(tmp_path, "gz.nii.gz", "second.nii", "axis.nii", "float.nii", "rounded.nii").shape == TINY


def test_grid_of_a_first_scan_with_trailing_axis_is_3d(tmp_path):
    write_scan(tmp_path / "axis.nii", voxels(9, shape=TINY)[..., None])
    table = dataset.read_csv(write_csv(tmp_path / "one.csv", [("axis.nii", 0)]))
    grid = dataset.check_grid(table)
    assert grid.shape == grid.header.get_data_shape() == TINY


def break_scan(kind: str, folder: Path) -> str:
    """Write a scan that is broken in one way; returns its name."""
    name = f"{kind}.nii"
    values = voxels(9, shape=TINY)
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "text":
        (folder / name).write_text("no image " * 100)
    elif kind == "empty":
        (folder / name).touch()
    elif kind == "truncated":
        name = "truncated.nii.gz"
        whole = write_scan(folder / "whole.nii.gz", np.random.default_rng(0).random(TINY)).read_bytes()
        (folder / name).write_bytes(whole[:60])
    elif kind == "volumes":
        write_scan(folder / name, np.stack([values, values], -1))
    elif kind == "slice":
        write_scan(folder / name, values[..., 0])
    elif kind == "turned":
        write_scan(folder / name, values.transpose(1, 0, 2))
    elif kind == "moved":
        write_scan(folder / name, values, AFFINE + np.eye(4, k=3))
    elif kind == "complex":
        write_scan(folder / name, values.astype(np.complex64))
    elif kind == "singular":
        path = write_scan(folder / name, values)
        raw = bytearray(path.read_bytes())
        raw[252:256] = np.array([0, 4], "<i2").tobytes()  # qform_code 0: the sform alone counts
        raw[280:296] = bytes(16)  # srow_x
        path.write_bytes(raw)
    elif kind == "analyze":
        name = "analyze.img"
        nib.save(nib.Spm99AnalyzeImage(values, AFFINE), folder / name)
    return name


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["no such file"]),
        ("folder", ["is a folder"]),
        ("text", ["not a NIfTI image"]),
        ("empty", ["not a NIfTI image"]),
        ("truncated", ["cannot be read", "ended"]),
        ("analyze", ["not a NIfTI image", ".nii.gz"]),
        ("volumes", ["one 3D volume", "(5, 6, 7, 2)"]),
        ("slice", ["one 3D volume", "(5, 6)"]),
        ("turned", ["shape (6, 5, 7)", "first scan", "(5, 6, 7)"]),
        ("moved", ["affine differs"]),
        ("complex", ["real voxels", "complex64"]),
        ("singular", ["affine is singular"]),
    ],
)
def test_grid_errors(tmp_path, kind, words):
    name = break_scan(kind, tmp_path)
    with pytest.raises(InputError) as error:
        check(tmp_path, name)
    assert all(word in str(error.value) for word in ["1 of 5", name, *words]), error.value


def test_grid_lists_all_bad_scans_at_once(tmp_path):
    names = [break_scan(kind, tmp_path) for kind in ("missing", "text", "turned", "moved", "complex")]
    with pytest.raises(InputError) as error:
        check(tmp_path, *names)
    assert all(name in str(error.value) for name in ["5 of 9", *names])


def test_grid_shortens_a_long_list(tmp_path):
    with pytest.raises(InputError) as error:
        check(tmp_path, *(f"gone{i}.nii" for i in range(25)))
    assert str(error.value).startswith("25 of 29 scans")
    assert str(error.value).count("no such file") == 20
    assert "5 more" in str(error.value)


# One scan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_scaling(tmp_path, dtype):
    values = (np.random.default_rng(1).random(TINY) * 200 + 20).astype(dtype)
    scan = dataset.read_scan(write_scan(tmp_path / "a.nii.gz", values))
    assert scan.dtype == np.float32
    assert scan.shape == TINY
    exact = values.astype(np.float64)
    exact = (exact - exact.min()) / (exact.max() - exact.min())
    # float32 rounds voxel, minimum and range (each 2^-17 of 200 at most) and the quotient (2^-25)
    assert np.allclose(scan, exact, rtol=0, atol=3 * 2**-17 / 199 + 2**-25)


@pytest.mark.parametrize("low", [0, -700, 100])
@pytest.mark.parametrize("spread", [41, 47, 83, 1000, 4095, 30000])
def test_scaling_ends_exactly_at_0_and_1(tmp_path, low, spread):
    values = np.linspace(low, low + spread, 210).round().astype(np.int16).reshape(TINY)
    scan = dataset.read_scan(write_scan(tmp_path / "a.nii", values))
    assert (scan.min(), scan.max()) == (0, 1)


@pytest.mark.parametrize(("low", "high"), [(-3e38, 3e38), (0, 1e-39), (0, 1e-45)])
def test_scaling_of_extreme_ranges_is_right_or_refused(tmp_path, low, high):
    values = np.full(TINY, low, np.float32)
    values[0] = high
    try:
        scan = dataset.read_scan(write_scan(tmp_path / "a.nii", values))
    except InputError:
        return
    assert np.array_equal(scan, values == np.float32(high))


def test_slope_and_intercept_are_honoured(tmp_path):
    raw = voxels(3, shape=TINY)
    path = write_scan(tmp_path / "a.nii", raw)
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([-0.5, 300], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(content)
    # a negative slope turns black into white; scl_inter drops out
    upside_down = (raw.max() - raw) / np.float64(raw.max() - raw.min())
    assert np.allclose(dataset.read_scan(path), upside_down, rtol=0, atol=1e-6)


def test_trailing_axis_is_dropped(tmp_path):
    values = voxels(3, shape=TINY)
    flat = dataset.read_scan(write_scan(tmp_path / "a.nii", values))
    assert np.array_equal(dataset.read_scan(write_scan(tmp_path / "b.nii", values[..., None])), flat)


def test_reading_leaves_the_file_alone(tmp_path):
    path = write_scan(tmp_path / "a.nii", voxels(3, shape=TINY).astype(np.float32))
    before = path.read_bytes()
    dataset.read_scan(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite(tmp_path, value):
    values = voxels(3, shape=TINY).astype(np.float32)
    values[1, 2, 3] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        dataset.read_scan(write_scan(tmp_path / "a.nii", values))


@pytest.mark.parametrize("value", [0, 7])
def test_constant_scan(tmp_path, value):
    with pytest.raises(InputError, match=f"constant.*{value}"):
        dataset.read_scan(write_scan(tmp_path / "a.nii", np.full(TINY, value, np.int16)))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_truncated_scan(tmp_path, name):
    path = write_scan(tmp_path / name, np.random.default_rng(0).random((40, 40, 40)))
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 3 // 4])
    with pytest.raises(InputError, match="cannot be read"):
        dataset.read_scan(path)


# Folds -------------------------------------------------------------------------------------------


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
@given(
    table=cohorts(),
    k=st.integers(2, 5),
    seed=st.integers(0, 2**32 - 1),
    fraction=st.sampled_from([0.25, 0.4]),
)
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
    moved = table.assign(file=[Path("/elsewhere") / path for path in table["path"]])
    assert dataset.make_folds(moved, 3, "stratified", 0.3, seed).equals(first)
    assert not dataset.make_folds(table, 3, "stratified", 0.3, seed + 1).equals(first)


@pytest.mark.parametrize("split", ["stratified", "contiguous"])
def test_folds_leave_the_global_random_state_alone(split):
    table = cohort_table([f"s{i}" for i in range(30)], [0, 1] * 15)
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    dataset.make_folds(table, 3, split, 0.3, seed=1)
    assert np.random.random() == expected


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


def test_contiguous_seed_moves_validation_only():
    table = cohort_table([f"s{i}" for i in range(60)], [0, 1, 1] * 20)
    first, second = (dataset.make_folds(table, 3, "contiguous", 0.2, seed) for seed in (0, 1))
    assert ((first["role"] == "test") == (second["role"] == "test")).all()
    assert not first.equals(second)


def test_contiguous_keeps_a_subject_within_its_block():
    subjects = ["a", "a"] + [f"s{i}" for i in range(26)] + ["z", "z"]
    folds = dataset.make_folds(cohort_table(subjects, [0, 0] + [0, 1] * 14), 3, "contiguous", 0.2, 0)
    assert list(by_role(folds, 0)["test"]["subject"])[:2] == ["a", "a"]


def test_contiguous_refuses_to_cut_a_subject():
    subjects = [f"s{i}" for i in range(30)]
    subjects[9] = subjects[10] = "both"
    with pytest.raises(InputError, match=r"contiguous.*subject both"):
        dataset.make_folds(cohort_table(subjects, [0, 1] * 15), 3, "contiguous", 0.2, 0)


@pytest.mark.parametrize(
    ("labels", "k", "split", "fraction", "words"),
    [
        ([0] * 20 + [1] * 4, 5, "stratified", 0.2, ["5 stratified folds", "20 of label 0", "4 of label 1"]),
        ([0] * 20, 5, "stratified", 0.2, ["20 of label 0", "0 of label 1"]),
        ([1] * 20, 5, "contiguous", 0.2, ["0 of label 0", "20 of label 1"]),
        ([0, 1], 3, "contiguous", 0.2, ["3 contiguous folds"]),
        ([0, 1] * 5, 5, "stratified", 0.05, ["--val-fraction 0.05", "8 training subjects"]),
        ([0, 1] * 5, 5, "stratified", 0.95, ["--val-fraction 0.95", "8 training subjects"]),
        ([0] * 10 + [1] * 10, 2, "contiguous", 0.2, ["both labels"]),
    ],
)
def test_fold_errors(labels, k, split, fraction, words):
    table = cohort_table([f"s{i}" for i in range(len(labels))], labels)
    with pytest.raises(InputError) as error:
        dataset.make_folds(table, k, split, fraction, seed=0)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.9])
def test_validation_and_training_hold_both_labels_or_the_split_is_refused(fraction):
    # three patients among forty: a tenth of the training part would leave them out of validation
    table = cohort_table([f"s{i}" for i in range(40)], ([1] + [0] * 12) * 3 + [0])
    with contextlib.suppress(InputError):
        folds = dataset.make_folds(table, 3, "stratified", fraction, seed=0)
        assert (folds.groupby(["fold", "role"])["label"].nunique() == 2).all()


def test_scans_of_a_role():
    table = cohort_table([f"s{i}" for i in range(20)], [0, 1] * 10)
    folds = dataset.make_folds(table, 4, "stratified", 0.3, seed=0)
    cohort = dataset.Cohort(Path("data.csv"), table, None, folds, 4)  # type: ignore[arg-type]
    for role, scans in by_role(folds, 2).items():
        numbers = cohort.scan_indices(2, role)
        assert numbers == sorted(numbers)
        assert [table["path"][i] for i in numbers] == list(scans["path"])
        assert cohort.labels(2, role).tolist() == list(scans["label"])


def test_identity_of_a_cohort(tmp_path):
    """It follows what the files hold: the CSV, the scans, their folds; not where they lie."""
    (tmp_path / "one").mkdir()
    csv = tiny_cohort(tmp_path / "one", 12)
    folding = (2, "stratified", 0.4, 0)
    identity = dataset.new_cohort(csv, *folding).identity
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    moved = tmp_path / "moved" / "data.csv"
    assert dataset.new_cohort(moved, *folding).identity == identity
    other = dataset.new_cohort(moved, 2, "stratified", 0.4, 1).identity
    assert [name for name in identity if other[name] != identity[name]] == ["folds_sha256"]
    write_scan(tmp_path / "moved" / "3.nii", voxels(99, shape=TINY))
    other = dataset.new_cohort(moved, *folding).identity
    assert [name for name in identity if other[name] != identity[name]] == ["scans_sha256"]


def test_scans_written_by_the_helpers_are_as_announced(tmp_path):
    """The helpers' own promise: geometry, codes and units of the scans that other tests rely on."""
    image = read_nifti(write_scan(tmp_path / "a.nii", voxels(0, shape=TINY)))
    assert np.array_equal(image.affine, AFFINE)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (4, 1)
    assert image.header.get_xyzt_units() == ("mm", "sec")
