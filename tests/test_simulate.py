"""simulate.py: the grid, the people, the planted loss, reproducible files, and the error paths."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

import simulate
from simulate import main

SMALL = ["--subjects", "6", "--voxel", "4", "--seed", "1"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Six planted scans at 4 mm; read only."""
    folder = tmp_path_factory.mktemp("planted")
    assert main(["--outpath", str(folder), *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def null_cohort(tmp_path_factory) -> Path:
    """The same six people with nothing planted; read only."""
    folder = tmp_path_factory.mktemp("null")
    assert main(["--outpath", str(folder), *SMALL, "--null"]) == 0
    return folder


def volume(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj).astype(float)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# The grid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("voxel", "shape"),
    [(1, (193, 229, 193)), (2.5, (77, 92, 77)), (2, (97, 115, 97)), (4, (49, 58, 49))],
)
def test_grid(voxel, shape):
    assert simulate.grid_shape(voxel) == shape
    expected = [[voxel, 0, 0, -96], [0, voxel, 0, -132], [0, 0, voxel, -78], [0, 0, 0, 1]]
    assert simulate.grid_affine(voxel).tolist() == expected


def test_files_are_in_mni_space(cohort):
    for name in ("scans/sub-001_T1w.nii.gz", "truth.nii.gz", "mask.nii.gz"):
        nifti = nib.load(cohort / name)
        assert nifti.shape == (49, 58, 49)
        assert np.array_equal(nifti.affine, simulate.grid_affine(4))
        assert (int(nifti.header["sform_code"]), int(nifti.header["qform_code"])) == (4, 4)
        assert nifti.header.get_xyzt_units()[0] == "mm"
        assert nifti.header.get_data_dtype() == (np.int16 if "T1w" in name else np.uint8)


def test_template_is_upright():
    """The splenium is white, the lateral ventricle dark, and both sides are where MNI has them."""
    template = simulate.load_template()

    def at(array: np.ndarray, x: int, y: int, z: int) -> float:
        i, j, k = np.subtract((x, y, z), simulate.ORIGIN).astype(int)
        return float(array[..., i, j, k])

    assert at(template.t1, 0, -38, 12) > 0.7
    assert at(template.t1, 10, 5, 20) < 0.45
    assert at(template.t1, 0, -110, 0) == 0
    for x in (-25, 25):
        assert at(template.region, x, -18, -17) == 1
        assert at(template.grey, x, -18, -17) > 0.5
    assert at(template.region, 40, -18, -17) == 0


# The people --------------------------------------------------------------------------------------


@pytest.mark.parametrize("subjects", [7, 40])
def test_labels_are_balanced_and_shuffled(subjects):
    labels = [simulate.draw_subject(0, index, 1.0).label for index in range(subjects)]
    assert abs(2 * sum(labels) - subjects) <= 1
    assert labels not in (sorted(labels), sorted(labels, reverse=True))
    assert labels != [simulate.draw_subject(1, index, 1.0).label for index in range(subjects)]


def test_only_the_planted_loss_knows_the_label():
    people = pd.DataFrame([vars(simulate.draw_subject(0, index, 1.0)) for index in range(400)])
    patients = people.label == 1
    assert (people.planted_loss[~patients] == 0).all()
    for nuisance in ("age", "natural_loss", "diffuse_loss", "ventricles", "gain", "bias", "noise"):
        one, other = people[nuisance][patients], people[nuisance][~patients]
        error = np.sqrt(one.var() / len(one) + other.var() / len(other))
        assert abs(one.mean() - other.mean()) < 4 * error, nuisance
    loss = people.natural_loss + people.planted_loss
    assert loss[patients].min() < loss[~patients].max() < loss[patients].median()  # the groups overlap


def test_every_subject_of_every_seed_has_its_own_noise_and_anatomy():
    streams = {simulate.draw_subject(seed, index, 1.0).stream for seed in range(3) for index in range(3)}
    assert len({np.random.default_rng(stream).random() for stream in streams}) == 9


def test_severity_scales_the_planted_loss_only():
    for index in range(4):
        one, two = (vars(simulate.draw_subject(5, index, severity)) for severity in (1.0, 2.0))
        assert two.pop("planted_loss") == 2 * one.pop("planted_loss")
        assert one == two


# The scans ---------------------------------------------------------------------------------------


def test_table_and_record(cohort):
    table = pd.read_csv(cohort / "data.csv")
    record = json.loads((cohort / "cohort.json").read_text())
    assert list(table.columns) == ["path", "label", "subject"]
    assert table.path.tolist() == [f"scans/sub-00{i}_T1w.nii.gz" for i in range(1, 7)]
    assert table.label.sum() == 3
    assert all((cohort / path).is_file() for path in table.path)
    assert record["planted"] is True
    assert [person["label"] for person in record["subjects"]] == table.label.tolist()


def test_scans_are_brains(cohort):
    mask = volume(cohort / "mask.nii.gz") == 1
    assert 1.7e6 < mask.sum() * 4**3 < 2.1e6  # mm^3
    for path in pd.read_csv(cohort / "data.csv").path:
        scan = volume(cohort / path)
        brain = scan > 0
        assert scan.min() == 0
        assert 2 * (brain & mask).sum() / (brain.sum() + mask.sum()) > 0.93  # other people, same space
        assert scan.max() < 1.3 * np.percentile(scan[brain], 99)  # no voxel sets the range alone


def test_truth_is_a_small_part_of_the_brain(cohort):
    truth, mask = (volume(cohort / f"{name}.nii.gz") == 1 for name in ("truth", "mask"))
    assert not (truth & ~mask).any()
    assert 0.005 < truth.sum() / mask.sum() < 0.02
    assert np.array_equal(truth[:, :, :], truth[::-1])  # both sides


def test_same_anatomy_at_every_voxel_size():
    """Every second voxel at 2 mm is a voxel at 4 mm, but for the noise."""
    person = simulate.draw_subject(0, 0, 1.0)
    template = simulate.load_template()
    fine, coarse = (
        simulate.anatomy(person, template, voxel, np.random.default_rng(person.stream)) for voxel in (2, 4)
    )
    np.testing.assert_allclose(fine[:, ::2, ::2, ::2], coarse, atol=1e-3)  # mm; float32 of up to 229


def test_deformation_never_folds():
    """A map with a positive Jacobian determinant everywhere tears and folds nothing."""
    template = simulate.load_template()
    for index in range(3):
        person = simulate.draw_subject(0, index, 1.0)
        place = simulate.anatomy(person, template, 4, np.random.default_rng(person.stream))
        jacobian = np.stack([np.stack(np.gradient(axis, 4), -1) for axis in place], -2)
        assert np.linalg.det(jacobian).min() > 0


def test_smooth_field_has_unit_variance():
    fields = simulate.smooth_field(np.random.default_rng(0), 4, 16, components=8)
    assert fields.shape == (8, 49, 58, 49)
    assert fields.std() == pytest.approx(1, abs=0.05)  # about 10^4 independent values
    steps = np.abs(np.diff(fields, axis=1))
    assert steps.std() < 0.5 * fields.std()  # a voxel is a quarter of the lattice spacing


def test_null_cohort_differs_only_where_loss_was_planted(cohort, null_cohort):
    table = pd.read_csv(cohort / "data.csv")
    assert (null_cohort / "data.csv").read_bytes() == (cohort / "data.csv").read_bytes()
    assert (null_cohort / "truth.nii.gz").read_bytes() == (cohort / "truth.nii.gz").read_bytes()
    assert json.loads((null_cohort / "cohort.json").read_text())["planted"] is False
    near = ndimage.binary_dilation(volume(cohort / "truth.nii.gz") == 1, iterations=3)  # 12 mm
    for path, label in zip(table.path, table.label, strict=True):
        if label == 0:
            assert (null_cohort / path).read_bytes() == (cohort / path).read_bytes()
            continue
        planted, null = volume(cohort / path), volume(null_cohort / path)
        changed = planted != null
        assert changed.sum() > 50
        assert not (changed & ~near).any()
        assert (planted <= null).all()
        assert (planted - null).min() < -0.1 * null.max()


def test_patients_are_darker_in_the_truth(cohort):
    truth, mask = (volume(cohort / f"{name}.nii.gz") == 1 for name in ("truth", "mask"))
    table = pd.read_csv(cohort / "data.csv")
    relative = pd.Series(
        [volume(cohort / p)[truth].mean() / volume(cohort / p)[mask].mean() for p in table.path]
    )
    means = relative.groupby(table.label).mean()
    assert means[1] < means[0] - 0.05


# The files ---------------------------------------------------------------------------------------


def test_same_seed_same_bytes(cohort, tmp_path):
    assert main(["--outpath", str(tmp_path / "again"), *SMALL]) == 0
    assert files(tmp_path / "again") == files(cohort)


def test_another_seed_and_a_larger_cohort(cohort, tmp_path):
    assert main(["--outpath", str(tmp_path / "more"), *SMALL[2:], "--subjects", "8"]) == 0
    more, few = files(tmp_path / "more"), files(cohort)
    assert all(more[name] == few[name] for name in few if name.startswith("scans/"))
    assert main(["--outpath", str(tmp_path / "other"), *SMALL[:-1], "2"]) == 0
    other = files(tmp_path / "other")
    assert all(other[name] != few[name] for name in few if name.startswith("scans/"))


def test_overwrite_replaces_the_cohort_and_nothing_else(tmp_path):
    assert main(["--outpath", str(tmp_path), *SMALL]) == 0
    foreign = [tmp_path / "notes.txt", tmp_path / "scans" / "sub-900_T1w.nii.gz"]
    for path in foreign:
        path.write_text("mine")
    assert main(["--outpath", str(tmp_path), "--subjects", "4", "--voxel", "4", "--overwrite"]) == 0
    assert [path.read_text() for path in foreign] == ["mine", "mine"]
    scans = sorted(path.name for path in (tmp_path / "scans").iterdir())
    assert scans == [*(f"sub-00{i}_T1w.nii.gz" for i in range(1, 5)), "sub-900_T1w.nii.gz"]


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--subjects", "3"], "'3' is not an integer >= 4"),
        (["--voxel", "0.5"], "'0.5' is not a number >= 1 and <= 4"),
        (["--voxel", "nan"], "--voxel"),
        (["--seed", "-1"], "--seed"),
        (["--severity", "-0.1"], "--severity"),
        (["--depth", "2"], "--depth"),
    ],
)
def test_bad_options(options, named, tmp_path, capsys):
    assert main(["--outpath", str(tmp_path / "cohort"), *options]) == 2
    assert_one_error_line(capsys, named)
    assert not (tmp_path / "cohort").exists()


@pytest.mark.parametrize("name", ["cohort.json", "data.csv", "scans/sub-004_T1w.nii.gz"])
def test_existing_files_stop_the_run(name, tmp_path, capsys):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    assert main(["--outpath", str(tmp_path), *SMALL]) == 2
    assert_one_error_line(capsys, str(path))
    assert files(tmp_path) == {name: b"precious"}


@pytest.mark.parametrize("content", ["precious", '{"subjects": 6}'])
def test_overwrite_spares_a_foreign_record(content, tmp_path, capsys):
    (tmp_path / "cohort.json").write_text(content)
    assert main(["--outpath", str(tmp_path), *SMALL, "--overwrite"]) == 2
    assert_one_error_line(capsys, str(tmp_path / "cohort.json"))
    assert files(tmp_path) == {"cohort.json": content.encode()}


@pytest.mark.parametrize("name", ["taken", "cohort/scans"])
def test_a_file_where_a_folder_belongs(name, tmp_path, capsys):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file")
    folder = tmp_path / name.split("/")[0]
    assert main(["--outpath", str(folder), *SMALL]) == 2
    assert_one_error_line(capsys, "--outpath")
    assert files(tmp_path) == {name: b"a file"}


def assert_one_error_line(capsys, named: str) -> None:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert named in lines[0]
