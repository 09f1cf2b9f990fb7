"""overlap.py: what the command writes, keeps, makes again and refuses."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from cohorts import AFFINE, contents, only_error, white
from scipy import ndimage

import overlap
import overlap_scores
from internals import storage

SHAPE = (12, 13, 14)
K = 3
LEVELS = [0, 3.0, 6.0]
METHODS = ["GGC", "IG", "IG-random", "SVM"]
COLUMNS = ["method", "fold", "fwhm_mm", "dice", "threshold", "percent_of_max", "dice_floor", "dice_matched"]
COLUMNS += ["auc", "average_precision"]


def save(values: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, AFFINE), path)


# a mask off the centre of the grid, and a block that reaches out of it
MASK, TRUTH = np.zeros((2, *SHAPE), bool)
MASK[2:10, 3:12, 1:12] = TRUTH[4:7, 5:9, 0:5] = True
BRAIN, REFERENCE = overlap_scores.BrainMask(MASK, AFFINE), TRUTH[MASK]


def fold_map(method: str, fold: int) -> np.ndarray:
    """Signed noise, larger in the truth for trained methods; anything at all outside the brain.

    (What is not finite inside the brain is refused: tests/test_bad_input.py.)
    """
    noise = white(SHAPE, 10 * METHODS.index(method) + fold)
    strength = {"GGC": 1.0, "IG": 3.0, "IG-random": 0.0, "SVM": 2.0}[method]
    values = np.where(MASK, noise * (1 + strength * TRUTH), 50 * noise)
    values[0, 0, :2] = np.nan, np.inf
    return values


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """heatmaps/ with four METHOD folders of three folds, truth.nii.gz and mask.nii.gz; read only."""
    folder = tmp_path_factory.mktemp("world")
    save(MASK.astype(np.uint8), folder / "mask.nii.gz")
    save(TRUTH.astype(np.uint8), folder / "truth.nii.gz")
    scan = np.where(MASK, 0.5 + 0.1 * np.abs(white(SHAPE, 99)), 0).astype(np.float32)
    for method in METHODS:
        place = folder / "heatmaps" / method
        folds = [fold_map(method, fold) for fold in range(K)]
        for fold, values in enumerate(folds):
            save(values, place / f"map_f{fold}.nii.gz")
        save(np.mean(folds, axis=0), place / "map_all.nii.gz")
        if method != "SVM":
            storage.write_json({"folds": K, "csv_sha256": "abc"}, place / "map.json")
        if method != "GGC":
            save(scan, place / "mean_scan.nii.gz")
    counts = {"zero_maps_per_fold": {"0": 1, "1": 0, "2": 5}, "scans_per_fold": {"0": 8, "1": 8, "2": 8}}
    storage.write_json({"folds": K, **counts}, folder / "heatmaps" / "GGC" / "map.json")
    (folder / "heatmaps" / "notes").mkdir()
    return folder


@pytest.fixture
def copy(world, tmp_path) -> Path:
    """The world, to be changed."""
    return Path(shutil.copytree(world, tmp_path / "world"))


@pytest.fixture(scope="module", autouse=True)
def _few_noise_draws():
    """Ten random maps in place of a hundred, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap_scores, "NOISE_DRAWS", 10)
        yield


def compare(world: Path, outpath: Path, *options: str) -> int:
    argv = [
        "--maps",
        str(world / "heatmaps"),
        "--reference",
        str(world / "truth.nii.gz"),
        "--outpath",
        str(outpath),
    ]
    return overlap.main([*argv, "--smooth", *map(str, LEVELS), "--rank-smooth", "3", *options])


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory) -> Path:
    """What the command writes with a mask; read only."""
    folder = tmp_path_factory.mktemp("compared")
    assert compare(world, folder, "--mask", str(world / "mask.nii.gz")) == 0
    return folder


@pytest.fixture
def earlier(compared, tmp_path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(compared, tmp_path / "earlier"))


def read_table(folder: Path, name: str = "overlap.csv") -> pd.DataFrame:
    return pd.read_csv(folder / name, dtype={"fold": str})


def test_record_and_these_files_and_no_others(compared, world):
    assert set(contents(compared)) == {"overlap.json", *overlap.FILES.part}
    for name in ("overlap.png", "overlap_maps.png"):
        assert (compared / name).read_bytes().startswith(b"\x89PNG")
    record = json.loads((compared / "overlap.json").read_text())
    options = {"reference_threshold": 0, "rank_smooth": 3, "seed": 0, "smooth": LEVELS, "methods": METHODS}
    options |= {"versions": storage.package_versions(), "finished": ["overlap"]}
    assert record.items() >= options.items()
    maps = {f"{m}, fold {f}": f"heatmaps/{m}/map_f{f}.nii.gz" for m in METHODS for f in range(K)}
    maps |= {f"{m}, fold all": f"heatmaps/{m}/map_all.nii.gz" for m in METHODS}
    maps |= {"reference": "truth.nii.gz", "mask": "mask.nii.gz", "mean_scan": "heatmaps/IG/mean_scan.nii.gz"}
    assert record["sha256"] == {name: storage.file_sha256(world / file) for name, file in maps.items()}


def test_table_holds_the_scores_of_smoothed_magnitudes(compared):
    table = read_table(compared).set_index(["method", "fold", "fwhm_mm"])
    rows = [(m, fold, fwhm) for m in METHODS for fold in ("0", "1", "2", "all") for fwhm in LEVELS]
    rows += [(floor, "all", fwhm) for floor in ("edges", "random") for fwhm in LEVELS]
    assert table.index.tolist() == rows
    for method, fold, fwhm in rows[: -2 * len(LEVELS)]:
        folds = [fold_map(method, fold) for fold in range(K)]
        values = np.mean(folds, axis=0) if fold == "all" else folds[int(fold)]
        smooth = BRAIN.smooth(np.abs(values[MASK]).astype(np.float32), fwhm)
        expected = overlap_scores.overlap_scores(smooth, REFERENCE)
        expected["smoothness_mm"] = BRAIN.smoothness(smooth)
        found = table.loc[(method, fold, fwhm), list(expected)].to_dict()
        # the mean map is rounded to float32 where it is saved
        assert found == pytest.approx(expected, rel=1e-5), (method, fold, fwhm)


def test_table_holds_floors_and_intervals(compared, world):
    table = read_table(compared)
    assert list(table.columns[: len(COLUMNS)]) == COLUMNS
    scores = table.loc[table["method"] != "random", [*COLUMNS, "smoothness_mm"]]
    floor = overlap_scores.random_floor(REFERENCE, BRAIN, scores["smoothness_mm"].max(), seed=0)
    expected = overlap_scores.add_intervals(overlap_scores.add_random(scores, floor), seed=0)
    pd.testing.assert_frame_equal(table, expected)
    assert set(table.loc[table["minus_untrained"].notna(), "method"]) == {"IG"}
    # the edge filter is the gradient of the mean scan
    scan = nib.Nifti1Image.from_filename(world / "heatmaps" / "IG" / "mean_scan.nii.gz").get_fdata()
    parts = [ndimage.gaussian_filter(scan, 1, order=order) for order in np.eye(3, dtype=int)]
    edges = overlap_scores.overlap_scores(np.sqrt(sum(part**2 for part in parts))[MASK], REFERENCE)
    row = table.set_index(["method", "fwhm_mm"]).loc[("edges", 0)]
    assert row[list(edges)].to_dict() == pytest.approx(edges, rel=1e-4)  # the command's is in float32


def test_ranking_is_written_and_printed(world, compared, tmp_path, capsys):
    """Without --mask, which here gives the same voxels; the ranked smoothing is always among the levels."""
    assert compare(world, tmp_path, "--smooth", "0", "6") == 0
    assert read_table(tmp_path).equals(read_table(compared))
    said, ranked = capsys.readouterr().out, read_table(tmp_path, "overlap_ranked.csv").set_index("method")
    assert "no --mask" in said
    assert "3 mm" in said
    assert said.splitlines()[-1] == f"written to {tmp_path}: {', '.join(overlap.FILES.part)}"
    assert ranked["dice"].is_monotonic_decreasing
    assert (ranked["fwhm_mm"] == 3).all()
    assert sorted(ranked.index) == sorted([*METHODS, "edges", "random"])
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert [name for name in lines if name in ranked.index] == ranked.index.tolist()
    verdicts = ranked["than_the_next"].dropna()
    assert verdicts.index.tolist() == [name for name in ranked.index if name in ("GGC", "IG", "SVM")][:-1]
    assert set(verdicts) <= {"better", "not separated"}
    # as map.json counts them; blank where it does not
    assert ranked.columns[-1] == "zero_share"
    assert ranked["zero_share"].dropna().to_dict() == {"GGC": 6 / 24}
    assert [name for name in lines if lines[name].endswith("%")] == ["GGC"]
    assert lines["GGC"].endswith(" 25%")


def test_results_go_to_the_maps_by_default_and_are_kept(copy, capsys):
    maps = copy / "heatmaps"
    argv = ["--maps", str(maps), "--reference", str(copy / "truth.nii.gz"), "--smooth", "0"]
    assert overlap.main(argv) == 0
    before, said = contents(maps), capsys.readouterr().out
    assert "overlap_ranked.csv" in before
    assert overlap.main(argv) == 0
    assert contents(maps) == before
    again = capsys.readouterr().out
    assert f"{maps}: compared before, kept" in again
    assert again.splitlines()[-len(METHODS) - 3 :] == said.splitlines()[-len(METHODS) - 4 : -1]  # the ranking


def test_seed_changes_floors_and_intervals_only(world, compared, tmp_path):
    assert compare(world, tmp_path, "--seed", "1") == 0
    first, second = read_table(compared), read_table(tmp_path)
    maps = first["method"] != "random"
    same = [*COLUMNS, "smoothness_mm", "dice_folds_mean", "minus_untrained"]
    assert first.loc[maps, same].equals(second.loc[maps, same])
    assert not first["random_dice"].equals(second["random_dice"])


def test_zeros_and_the_signs_of_formulas_are_fine(copy, tmp_path):
    for file in (copy / "heatmaps" / "GGC").glob("map_*.nii.gz"):
        save(np.zeros(SHAPE, np.float32), file)
    name = "G$\\frac{G$ {0.x} %s"  # the name of a folder, to be drawn as it is
    (copy / "heatmaps" / "GGC").rename(copy / "heatmaps" / name)
    assert compare(copy, tmp_path / "out") == 0
    zeros = read_table(tmp_path / "out").set_index("method").loc[name]
    assert (zeros["dice"] == zeros["dice_floor"]).all()
    assert zeros[["smoothness_mm", "random_dice", "percent_of_max"]].isna().all(axis=None)


def test_comparison_of_an_earlier_version(world, compared, earlier, capsys):
    """Kept where all is there; made again where a column is not. Refused where it is damaged."""
    mask, file = ["--mask", str(world / "mask.nii.gz")], earlier / "overlap_ranked.csv"
    record = storage.read_json(earlier / "overlap.json")
    del record["finished"]
    storage.write_json(record, earlier / "overlap.json")
    before = contents(earlier)
    assert compare(world, earlier, *mask) == 0
    assert "compared before, kept" in capsys.readouterr().out
    assert contents(earlier) == before
    for column in ("zero_share", "permuted_dice"):
        read_table(earlier, file.name).drop(columns=column).to_csv(file, index=False)
        assert compare(world, earlier, *mask) == 0
        assert "compared before" not in capsys.readouterr().out
        assert contents(earlier) == contents(compared)
    file.write_text("")
    assert compare(world, earlier, *mask) == 2
    assert f"{file}: cannot be read" in only_error(capsys.readouterr().err)


def test_other_comparison_is_refused_and_overwritten_on_request(copy, compared, earlier, capsys):
    mask = ["--mask", str(copy / "mask.nii.gz")]

    def refused(*options: str) -> str:
        assert compare(copy, earlier, *mask, *options) == 2
        assert contents(earlier) == contents(compared)
        return only_error(capsys.readouterr().err)

    for change in ("--seed 1", "--smooth 0", "--reference-threshold 0.5", "--rank-smooth 6"):
        assert "--overwrite" in refused(*change.split())
    save(fold_map("SVM", 0), copy / "heatmaps" / "SVM" / "map_all.nii.gz")
    assert "SVM, fold all" in refused()
    shutil.rmtree(copy / "heatmaps" / "GGC")
    assert "methods" in refused()
    assert compare(copy, earlier, *mask, "--overwrite") == 0
    assert "GGC" not in set(read_table(earlier)["method"])


def refuse(world: Path, tmp_path: Path, capsys) -> str:
    """The error line of a comparison that must not write anything."""
    assert compare(world, tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    return only_error(capsys.readouterr().err)


def test_methods_of_names_that_cannot_be(copy, tmp_path, capsys):
    place = copy / "heatmaps" / "IG"
    for name in ("random", "edges", "a\nb", "\x1b[31m", "\u202eGI"):
        place = place.rename(copy / "heatmaps" / name)
        line = refuse(copy, tmp_path, capsys)
        assert "cannot have this name" in line
        assert line.rstrip("\n").isprintable()


def test_maps_that_change_while_they_are_read(copy, tmp_path, monkeypatch, capsys):
    read = overlap.brain_maps.read_maps

    def read_and_change(*args):
        save(fold_map("SVM", 1), copy / "heatmaps" / "SVM" / "map_f0.nii.gz")
        return read(*args)

    monkeypatch.setattr(overlap.brain_maps, "read_maps", read_and_change)
    assert "the maps changed while they were read" in refuse(copy, tmp_path, capsys)
