"""svm.py: machines, maps and tables against dense ones; folds, leakage, memory, going on."""

import contextlib
import io
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cohorts import AFFINE, contents, only_error, read_nifti, read_table, read_values, write_csv, write_scan
from sklearn.svm import SVC

import classifier_scores
import dataset
import figures
import runs
import svm
import train_cv
import utils
import voxelwise
from internals import storage
from internals.caches import Cache

# nilearn, of slices this small that have nothing to show
pytestmark = pytest.mark.filterwarnings("ignore:Warning. converting a masked element to nan")

SHAPE, N, K = (8, 9, 10), 31, 3
VOLUMES = {f"{kind}_f{fold}.nii.gz" for kind in ("map", "weights") for fold in range(K)}
VOLUMES |= {"map_all.nii.gz", "mean_scan.nii.gz"}
NAMES = {"map.json", "map_all.png", "predictions.csv", "metrics.csv", *VOLUMES}
TRAINED = ["--fold", str(K), "--val-fraction", "0.3", "--seed", "1", "--cache", "none", "--device", "cpu"]
GRID = [10.0**power for power in (-6, -5, -4, -3, -2, -1, 0, 1, 2)]


def weak_voxels(seed: int, label: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Noise in a black frame, int16; label 1 is a little darker in a corner, so that groups overlap."""
    values = np.random.default_rng(seed).normal(500, 100, shape).clip(100, 900)
    values[2:4, 3:6, 4:7] -= 60 * label
    values[:1], values[:, -1:] = 0, 0
    return values.astype(np.int16)


def write_weak_cohort(folder: Path, n: int = N, shape: tuple[int, ...] = SHAPE) -> Path:
    """Scans of both labels in no order; two of one subject, whose name pandas would take for missing."""
    labels = np.random.default_rng(0).permutation(np.arange(n) % 2)
    subjects = [f"{i:03d}" for i in range(n)]
    subjects[1] = subjects[int(np.flatnonzero(labels == labels[1])[-1])] = "NA"
    for i, label in enumerate(labels):
        write_scan(folder / "scans" / f"{i:03d}.nii", weak_voxels(i, label, shape))
    rows = [(f"scans/{i:03d}.nii", labels[i], subjects[i]) for i in range(n)]
    return write_csv(folder / "data.csv", rows, header="path,label,subject")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """No picture is drawn within a test (those of `finished` are)."""
    monkeypatch.setattr(figures, "draw_map", lambda *given: given[-1].write_bytes(b"picture"))


@pytest.fixture(scope="module")
def csv(tmp_path_factory) -> Path:
    """Thirty-one scans and their CSV; read only."""
    return write_weak_cohort(tmp_path_factory.mktemp("cohort"))


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def run(csv, tmp_path_factory) -> Path:
    """Record and folds of train_cv.py, interrupted before the first network; read only."""
    folder = tmp_path_factory.mktemp("run") / "models"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "new_network", lambda *_: None)  # no network takes a grid this small
        patch.setattr(train_cv, "start", interrupt)
        assert train_cv.main(["--path", str(csv), "--outpath", str(folder), *TRAINED]) == 130
    return folder


def train_svm(run: Path, outpath: Path, *options: str) -> int:
    return svm.main(["--modelpath", str(run), "--outpath", str(outpath), *options])


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> tuple[Path, str, tuple]:
    """The folder of the run's folds (read only), what was printed, and what the picture shows."""
    outpath, pictures, said = tmp_path_factory.mktemp("done"), [], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        draw = figures.draw_map
        patch.setattr(figures, "draw_map", lambda *given: (pictures.append(given), draw(*given)))
        assert train_svm(run, outpath) == 0
    (picture,) = pictures
    return outpath / "SVM", said.getvalue(), picture


@pytest.fixture
def done(finished) -> Path:
    """The folder of everything; read only."""
    return finished[0]


def record_of(folder: Path) -> dict:
    return json.loads((folder / "map.json").read_text())


# The dense machine that all must equal -----------------------------------------------------------


class Dense:
    """All scans in memory, and the textbook on them."""

    def __init__(self, csv: Path, mask: np.ndarray | bool = True) -> None:
        table = read_table(csv)
        self.scans = np.stack([dataset.read_scan(csv.parent / path) for path in table["path"]]).astype(float)
        self.mask = (np.ptp(self.scans, axis=0) > 0) & mask
        self.X, self.y = self.scans[:, self.mask], table["label"].to_numpy()  # (N, V), (N,)

    def fit(self, train: np.ndarray, C: float) -> SVC:
        return SVC(kernel="linear", C=C).fit(self.X[train], self.y[train])

    def pattern(self, train: np.ndarray, machine: SVC) -> np.ndarray:
        """Covariance of every voxel with the decision value, by numpy, a voxel at a time."""
        decision = machine.decision_function(self.X[train])
        return np.array([np.cov(voxel, decision)[0, 1] for voxel in self.X[train].T])

    def choose(self, train: np.ndarray, val: np.ndarray) -> float:
        """The smallest C of the grid with the most right validation scans, class by class, then pairs."""
        right = []
        for C in GRID:
            decision = self.fit(train, C).decision_function(self.X[val])
            patients, controls = decision[self.y[val] == 1], decision[self.y[val] == 0]
            accuracy = (patients > 0).mean() + (controls <= 0).mean()
            right.append((accuracy, np.sign(patients[:, None] - controls).sum()))
        return GRID[right.index(max(right))]


def members(folds: pd.DataFrame, fold: int, role: str) -> np.ndarray:
    """The rows of the CSV that have a role in a fold."""
    return np.flatnonzero(folds.loc[folds["fold"] == fold, "role"] == role)


def near(found: np.ndarray, expected: np.ndarray) -> bool:
    """Within 1e-6 of the largest value; what is on disk is rounded to float32, 6e-8."""
    return np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def check_dense(folder: Path, dense: Dense, folds: pd.DataFrame, C: float | None = None) -> None:
    """Everything in a folder, recomputed densely."""
    table, record, patterns = read_table(folder / "predictions.csv"), record_of(folder), []
    for fold in range(folds["fold"].nunique()):
        train, val, test = (members(folds, fold, role) for role in ("train", "val", "test"))
        chosen = C or dense.choose(train, val)
        machine = dense.fit(train, chosen)
        patterns.append(dense.pattern(train, machine))
        assert record["C_per_fold"][str(fold)] == pytest.approx(chosen)
        assert record["intercept_per_fold"][str(fold)] == pytest.approx(machine.intercept_[0], rel=1e-6)
        check_map(folder / f"weights_f{fold}.nii.gz", machine.coef_[0], dense.mask)
        check_map(folder / f"map_f{fold}.nii.gz", patterns[-1], dense.mask)
        decision, mine = machine.decision_function(dense.X[test]), table[table["fold"] == fold]
        assert np.allclose(mine["prob_1"], 1 / (1 + np.exp(-decision)), rtol=0, atol=1e-6)
        assert mine["predicted"].tolist() == machine.predict(dense.X[test]).tolist()
    check_map(folder / "map_all.nii.gz", np.mean(patterns, axis=0), dense.mask)
    tests, known = folds[folds["role"] == "test"], ["fold", "path", "label", "subject"]
    assert table[known].to_numpy().tolist() == tests[known].to_numpy().tolist()


def check_map(file: Path, expected: np.ndarray, mask: np.ndarray) -> None:
    """Values within a mask, and zero outside."""
    found = read_values(file)
    assert near(found[mask], expected)
    assert not found[~mask].any()


# What is written ---------------------------------------------------------------------------------


def test_everything_equals_the_dense_machine_on_the_folds_of_the_run(done, csv, run):
    check_dense(done, Dense(csv), read_table(run / "folds.csv"))
    assert len(set(record_of(done)["C_per_fold"].values())) > 1  # so that the choice was put to the test


def test_predictions_and_metrics(finished, csv):
    folder, said, _ = finished
    table = read_table(folder / "predictions.csv")
    assert list(table.columns) == ["fold", "path", "label", "subject", "prob_1", "predicted"]
    assert len(set(table["path"])) == len(table) == N
    assert (table["subject"] == "NA").sum() == 2
    assert table["predicted"].tolist() == (table["prob_1"] > 0.5).astype(int).tolist()
    assert 0 < table["predicted"].sum() < N
    expected = classifier_scores.metrics_table(table, seed=1)
    found = pd.read_csv(folder / "metrics.csv", dtype={"fold": str})
    assert found["fold"].tolist() == ["0", "1", "2", "pooled"]
    columns = list(expected.columns[1:])
    assert np.allclose(found[columns].astype(float), expected[columns].astype(float), equal_nan=True)
    assert classifier_scores.summary(expected) in said
    for fold, C in record_of(folder)["C_per_fold"].items():
        assert f"fold {fold}: C = {C:g}, validation balanced accuracy" in said
    assert f"voxels: {Dense(csv).mask.sum()} of {np.prod(SHAPE)}" in said
    assert f"{folder}: map_all.nii.gz, map_f*.nii.gz, weights_f*.nii.gz, predictions.csv, metrics.csv" in said


def test_files_lie_where_the_scans_lie(finished, csv):
    folder, _, (drawn, background, affine, title, path) = finished
    assert set(contents(folder)) == NAMES
    scan = read_nifti(csv.parent / "scans" / "000.nii")
    for file in sorted(VOLUMES):
        found = read_nifti(folder / file)
        assert (found.shape, found.get_data_dtype()) == (SHAPE, np.float32)
        assert np.array_equal(found.affine, AFFINE)
        for name in ("sform_code", "qform_code", "pixdim", "srow_x", "quatern_b", "xyzt_units"):
            assert np.array_equal(found.header[name], scan.header[name]), name
        assert np.isfinite(read_values(folder / file)).all()
    mean = Dense(csv).scans.mean(0)
    assert np.allclose(read_values(folder / "mean_scan.nii.gz"), mean, rtol=0, atol=2**-24)
    assert list(drawn) == ["all"]
    assert near(drawn["all"], read_values(folder / "map_all.nii.gz"))
    assert np.allclose(background, mean, rtol=0, atol=2**-24)
    assert np.array_equal(affine, AFFINE)
    assert title == "SVM: mean activation pattern of 3 folds, 31 scans"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_record(done, run, csv):
    record = record_of(done)
    folding = {"fold": K, "split": "stratified", "val_fraction": 0.3, "seed": 1}
    paths = {"modelpath": str(run.resolve()), "csv": str(csv.resolve()), "mask": None, "mask_sha256": None}
    expected = {"method": "SVM", "options": {"C": "chosen", **folding}, **paths}
    expected |= {"csv_sha256": storage.file_sha256(csv), "versions": storage.package_versions()}
    trained = json.loads((run / "run.json").read_text())
    expected |= {name: trained[name] for name in ("grid", "scans_sha256", "folds_sha256")}
    others = {"C_per_fold", "intercept_per_fold", "finished", "parts"}
    assert {name: record[name] for name in record.keys() - others} == expected
    assert all(list(record[name]) == ["0", "1", "2"] for name in ("C_per_fold", "intercept_per_fold"))


@pytest.fixture(scope="module")
def mask(tmp_path_factory) -> Path:
    """A third of the voxels, some of the black frame among them; its other values are not above 0."""
    values = np.random.default_rng(5).choice([-1.0, 0.0, 0.25], size=SHAPE).astype(np.float32)
    assert (values[0] > 0).any()
    return write_scan(tmp_path_factory.mktemp("mask") / "mask.nii.gz", values)


def test_small_blocks_and_many_passes_change_nothing(csv, run, mask, tmp_path, monkeypatch):
    """Seven scans are a block, two folds a pass."""
    dense = Dense(csv, read_values(mask) > 0)
    monkeypatch.setattr(voxelwise, "HELD", 11 * np.count_nonzero(dense.mask))
    monkeypatch.setattr(voxelwise, "CHUNK", 37)
    assert train_svm(run, tmp_path, "--mask", str(mask)) == 0
    check_dense(tmp_path / "SVM", dense, read_table(run / "folds.csv"))
    record = record_of(tmp_path / "SVM")
    assert (record["mask"], record["mask_sha256"]) == (str(mask.resolve()), storage.file_sha256(mask))


def test_c_that_is_given_on_folds_without_a_run(csv, tmp_path):
    options = ["--path", str(csv), "--fold", "4", "--val-fraction", "0.4", "--seed", "3", "--C", "0.37"]
    assert train_svm(tmp_path / "none", tmp_path, *options) == 0
    made = (4, "stratified", 0.4, 3)
    check_dense(tmp_path / "SVM", Dense(csv), dataset.make_folds(dataset.read_csv(csv), *made), C=0.37)
    record = record_of(tmp_path / "SVM")
    assert record["options"] == dict(zip(["C", *runs.FOLDING], [0.37, *made], strict=True))
    assert record["modelpath"] is None


# No leakage --------------------------------------------------------------------------------------


def changed_scan(csv: Path, run: Path, folder: Path, row: int) -> tuple[Path, Path]:
    """A copy of cohort and run in which one scan is another one, and was so always; returns CSV and run."""
    mine = Path(shutil.copytree(csv.parent, folder / "cohort")) / "data.csv"
    write_scan(mine.parent / "scans" / f"{row:03d}.nii", weak_voxels(1000, 0)[:, :, ::-1])
    run = Path(shutil.copytree(run, folder / "run"))
    record = json.loads((run / "run.json").read_text()) | {"scans_sha256": ""}
    (run / "run.json").write_text(json.dumps(record))
    return mine, run


def maps_of(folder: Path, fold: int) -> np.ndarray:
    return np.stack([read_values(folder / "SVM" / f"{kind}_f{fold}.nii.gz") for kind in ("map", "weights")])


def test_test_scans_have_no_say_in_choice_and_maps(csv, run, done, tmp_path):
    folds = read_table(run / "folds.csv")
    row = int(members(folds, 0, "test")[0])
    mine, run = changed_scan(csv, run, tmp_path, row)
    assert train_svm(run, tmp_path, "--path", str(mine)) == 0
    assert record_of(tmp_path / "SVM")["C_per_fold"]["0"] == record_of(done)["C_per_fold"]["0"]
    assert near(maps_of(tmp_path, 0), maps_of(done.parent, 0))
    trains = [fold for fold in range(K) if row in members(folds, fold, "train")]
    assert trains
    assert not any(near(maps_of(tmp_path, fold), maps_of(done.parent, fold)) for fold in trains)


def test_validation_scans_choose_c_and_nothing_else(csv, run, tmp_path):
    row = int(members(read_table(run / "folds.csv"), 0, "val")[0])
    mine, run = changed_scan(csv, run, tmp_path, row)
    assert train_svm(run, tmp_path / "a", "--C", "0.1") == 0
    assert train_svm(run, tmp_path / "b", "--C", "0.1", "--path", str(mine)) == 0
    assert near(maps_of(tmp_path / "a", 0), maps_of(tmp_path / "b", 0))


def test_memory_does_not_grow_with_the_number_of_scans(tmp_path, monkeypatch):
    shape = (48, 49, 50)
    volume = 4 * np.prod(shape)  # bytes of one scan
    monkeypatch.setattr(voxelwise, "HELD", 8 * np.prod(shape))
    monkeypatch.setattr(voxelwise, "CHUNK", 1000)
    in_threads = utils.in_threads  # one thread: scans that are being decoded take memory too
    monkeypatch.setattr(utils, "in_threads", lambda work, items, *_, **__: in_threads(work, items, threads=1))
    peaks = []
    for n in (20, 20, 50):  # the first call warms up
        folder = tmp_path / f"{n}-{len(peaks)}"
        csv = write_weak_cohort(folder, n, shape)
        tracemalloc.start()
        assert train_svm(folder / "none", folder, "--path", str(csv), "--fold", "6", "--C", "1") == 0
        peaks.append(tracemalloc.get_traced_memory()[1] / volume)
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 2, peaks
    # 8 held (or 4 of the 12 maps, in float64), the means in float64, one scan coming in or one map going out
    assert peaks[2] < 24, peaks


def test_a_disk_cache_of_the_run_is_read(csv, run, done, tmp_path, capsys):
    run = Path(shutil.copytree(run, tmp_path / "models"))
    runs.find_cohort(run, csv, {})[0].open_scans(Cache("disk", run / "cache"))
    before = contents(run)
    assert train_svm(run, tmp_path) == 0
    assert "read from" in capsys.readouterr().out
    assert (tmp_path / "SVM" / "predictions.csv").read_text() == (done / "predictions.csv").read_text()
    assert contents(run) == before


@pytest.fixture
def copy(done, tmp_path) -> Path:
    """Finished results, to be changed; returns their --outpath."""
    shutil.copytree(done, tmp_path / "copy" / "SVM")
    return tmp_path / "copy"


def test_second_call_keeps_everything(copy, run, monkeypatch, capsys):
    before = contents(copy)
    monkeypatch.setattr(dataset.Cohort, "open_scans", interrupt)
    assert train_svm(run, copy) == 0
    assert "done before, kept" in capsys.readouterr().out
    assert contents(copy) == before


@pytest.mark.parametrize("name", ["map_f1.nii.gz", "weights_f2.nii.gz", "metrics.csv"])
def test_lost_file_is_made_again(copy, done, run, name):
    (copy / "SVM" / name).unlink()
    assert train_svm(run, copy) == 0
    found, expected = contents(copy / "SVM"), contents(done)
    assert found.keys() == expected.keys()
    # a .nii.gz holds the time; no picture is drawn here
    assert all(found[file] == expected[file] for file in NAMES if file.endswith((".csv", ".json")))
    assert all(np.array_equal(read_values(copy / "SVM" / file), read_values(done / file)) for file in VOLUMES)


def test_other_arguments_are_refused(copy, csv, run, mask, tmp_path, capsys):
    before, none = contents(copy), ["--path", str(csv), "--modelpath", str(tmp_path / "none")]
    for options, words in [
        (["--C", "1"], "C (chosen there, 1.0 now)"),
        (["--mask", str(mask)], "mask_sha256"),
        ([*none, "--fold", "4"], "fold (3 there, 4 now)"),
        ([*none, "--fold", "3", "--val-fraction", "0.3"], "seed (1 there, 0 now)"),
    ]:
        assert train_svm(run, copy, *options) == 2
        assert words in only_error(capsys.readouterr().err)
    assert contents(copy) == before
