"""simulate.py: the grid, the people, the planted loss, reproducible files, the folder, and mistakes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cohorts import contents, only_error, read_nifti, read_values
from scipy import ndimage

import simulate
from internals import storage

SMALL = ["--subjects", "6", "--voxel", "4", "--seed", "1"]


def make(folder: Path, *options: str) -> int:
    """Six scans at 4 mm, as far as the options do not say otherwise."""
    return simulate.main(["--outpath", str(folder), *SMALL, *options])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Six planted scans at 4 mm; read only."""
    folder = tmp_path_factory.mktemp("planted")
    assert make(folder) == 0
    return folder


@pytest.fixture(scope="module")
def scans(cohort) -> dict[str, np.ndarray]:
    return {path: read_values(cohort / path) for path in pd.read_csv(cohort / "data.csv").path}


@pytest.fixture(scope="module")
def masks(cohort) -> tuple[np.ndarray, np.ndarray]:
    """Truth and brain mask."""
    return read_values(cohort / "truth.nii.gz") == 1, read_values(cohort / "mask.nii.gz") == 1


def test_files_are_in_mni_space(cohort):
    for voxel, shape in {1: (193, 229, 193), 2.5: (77, 92, 77), 2: (97, 115, 97), 4: (49, 58, 49)}.items():
        affine = [[voxel, 0, 0, -96], [0, voxel, 0, -132], [0, 0, voxel, -78], [0, 0, 0, 1]]
        assert (simulate.grid_shape(voxel), simulate.grid_affine(voxel).tolist()) == (shape, affine)
    for name in ("scans/sub-001_T1w.nii.gz", "truth.nii.gz", "mask.nii.gz"):
        nifti = read_nifti(cohort / name)
        assert (nifti.shape, nifti.affine.tolist()) == (shape, affine)
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


@pytest.mark.parametrize("subjects", [7, 40])
def test_labels_are_balanced_and_shuffled(subjects):
    labels, other = ([simulate.draw_subject(s, i, 1.0).label for i in range(subjects)] for s in (0, 1))
    assert abs(2 * sum(labels) - subjects) <= 1
    assert labels not in (sorted(labels), sorted(labels, reverse=True), other)


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


def test_severity_scales_the_planted_loss_only_and_each_subject_has_its_own_noise_and_anatomy():
    streams = {simulate.draw_subject(seed, index, 1.0).stream for seed in range(3) for index in range(3)}
    assert len({np.random.default_rng(stream).random() for stream in streams}) == 9
    for index in range(4):
        one, two = (vars(simulate.draw_subject(5, index, severity)) for severity in (1.0, 2.0))
        assert two.pop("planted_loss") == 2 * one.pop("planted_loss")
        assert one == two


def test_table_and_record(cohort):
    table = pd.read_csv(cohort / "data.csv")
    record = json.loads((cohort / "cohort.json").read_text())
    assert list(table.columns) == ["path", "label", "subject"]
    assert table.path.tolist() == [f"scans/sub-00{i}_T1w.nii.gz" for i in range(1, 7)]
    said = {"planted": True, "severity": 1, "voxel_mm": 4, "seed": 1, "number_of_subjects": 6}
    assert record.items() >= (said | {"finished": ["cohort"]}).items()
    drawn = [simulate.draw_subject(1, index, 1.0) for index in range(6)]
    assert record["subjects"] == json.loads(json.dumps([vars(person) for person in drawn]))
    assert [person.label for person in drawn] == table.label.tolist()


def test_scans_are_brains_and_patients_darker_in_the_truth(cohort, scans, masks):
    truth, mask = masks
    assert 1.7e6 < mask.sum() * 4**3 < 2.1e6  # mm^3
    assert not (truth & ~mask).any()
    assert 0.005 < truth.sum() / mask.sum() < 0.02
    assert np.array_equal(truth, truth[::-1])  # both sides
    for scan in scans.values():
        brain = scan > 0
        assert scan.min() == 0
        assert 2 * (brain & mask).sum() / (brain.sum() + mask.sum()) > 0.93  # other people, same space
        assert scan.max() < 1.3 * np.percentile(scan[brain], 99)  # no voxel sets the range alone
    relative = pd.Series([scan[truth].mean() / scan[mask].mean() for scan in scans.values()])
    means = relative.groupby(pd.read_csv(cohort / "data.csv").label).mean()
    assert means[1] < means[0] - 0.05


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


def test_null_cohort_differs_only_where_loss_was_planted(cohort, scans, masks, tmp_path):
    assert make(tmp_path, "--null") == 0
    one, other = contents(cohort), contents(tmp_path)
    assert json.loads(other["cohort.json"])["planted"] is False
    patients = [path for path, label in pd.read_csv(cohort / "data.csv")[["path", "label"]].values if label]
    assert {name for name in one if one[name] != other[name]} == {*patients, "cohort.json"}
    near = ndimage.binary_dilation(masks[0], iterations=3)  # 12 mm
    for path in patients:
        planted, null = scans[path], read_values(tmp_path / path)
        changed = planted != null
        assert changed.sum() > 50
        assert not (changed & ~near).any()
        assert (planted <= null).all()
        assert (planted - null).min() < -0.1 * null.max()


def test_same_seed_same_bytes_whatever_the_number_of_scans(cohort, tmp_path):
    few = contents(cohort)
    assert make(tmp_path / "more", "--subjects", "8") == 0
    more = contents(tmp_path / "more")
    assert len(more) == len(few) + 2
    assert all(more[name] == few[name] for name in few if name not in ("data.csv", "cohort.json"))
    assert make(tmp_path / "other", "--seed", "2") == 0
    other = contents(tmp_path / "other")
    assert all(other[name] != few[name] for name in few if name.startswith("scans/"))


def test_same_command_keeps_the_cohort_and_another_is_refused(cohort, capsys):
    before = contents(cohort)
    assert make(cohort) == 0
    assert capsys.readouterr().out == f"{cohort}: simulated before, kept\n"
    for change, words in {
        "--subjects 5": "number_of_subjects (6 there, 5 now)",
        "--voxel 3": "voxel_mm (4.0 there, 3.0 now)",
        "--seed 2": "seed (1 there, 2 now)",
        "--severity 2": "severity (1.0 there, 2.0 now)",
        "--null": "severity (1.0 there, 0.0 now)",
    }.items():
        assert make(cohort, *change.split()) == 2
        assert f"is of another run: {words}; " in only_error(capsys.readouterr().err)
    assert contents(cohort) == before


def test_overwrite_replaces_the_cohort_and_nothing_else(cohort, tmp_path):
    shutil.copytree(cohort, tmp_path, dirs_exist_ok=True)
    foreign = tmp_path / "scans" / "sub-900_T1w.nii.gz"
    foreign.write_bytes(b"mine")
    assert make(tmp_path, "--subjects", "4", "--overwrite") == 0
    assert foreign.read_bytes() == b"mine"
    scans = {path.name for path in (tmp_path / "scans").iterdir()} - {foreign.name}
    assert scans == {f"sub-00{i}_T1w.nii.gz" for i in range(1, 5)}


def test_record_of_many_subjects_can_be_read_again():
    people = [simulate.draw_subject(0, index, 1.0) for index in range(100)]
    size = len(json.dumps(simulate.describe(people, 2.0, 1.0), indent=2))
    assert 30_000 * size / len(people) < storage.RECORD_SIZE


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scans/sub-004_T1w.nii.gz", "scans/sub-004_T1w.nii.gz is in the way"),
        ("scans", "--outpath .: scans is not a folder"),
    ],
)
def test_scans_of_others_stop_the_run(name, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("precious")
    assert make(Path()) == 2
    assert only_error(capsys.readouterr().err).startswith(f"error: {words}")
    assert contents(tmp_path) == {name: b"precious"}
