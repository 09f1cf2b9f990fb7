"""overlap.py: what the command writes, the reference on other grids, and mistakes."""

import json
import math
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from cohorts import AFFINE, OBLIQUE, contents, only_error, white
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


# The command -------------------------------------------------------------------------------------


def save(values: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def brain_and_truth() -> tuple[np.ndarray, np.ndarray]:
    """A mask off the centre of the grid, and a block that reaches out of it."""
    mask, truth = np.zeros((2, *SHAPE), bool)
    mask[2:10, 3:12, 1:12] = True
    truth[4:7, 5:9, 0:5] = True
    return mask, truth


def fold_map(method: str, fold: int) -> np.ndarray:
    """Signed noise, larger in the truth for trained methods; anything at all outside the brain."""
    mask, truth = brain_and_truth()
    noise = white(SHAPE, 10 * METHODS.index(method) + fold)
    strength = {"GGC": 1.0, "IG": 3.0, "IG-random": 0.0, "SVM": 2.0}[method]
    return np.where(mask, noise * (1 + strength * truth), 50 * noise)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """heatmaps/ with four METHOD folders of three folds, truth.nii.gz and mask.nii.gz; read only."""
    folder = tmp_path_factory.mktemp("world")
    mask, truth = brain_and_truth()
    save(mask.astype(np.uint8), folder / "mask.nii.gz")
    save(truth.astype(np.uint8), folder / "truth.nii.gz")
    scan = np.where(mask, 0.5 + 0.1 * np.abs(white(SHAPE, 99)), 0).astype(np.float32)
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
    (folder / "heatmaps" / "notes").mkdir()
    return folder


@pytest.fixture(autouse=True)
def few_noise_draws(monkeypatch, request):
    """Ten random maps in place of a hundred where the command is run, for speed."""
    if "world" in request.fixturenames:
        monkeypatch.setattr(overlap_scores, "NOISE_DRAWS", 10)


def compare(world: Path, outpath: Path, *options: str) -> int:
    argv = ["--maps", str(world / "heatmaps"), "--reference", str(world / "truth.nii.gz")]
    argv += ["--mask", str(world / "mask.nii.gz"), "--outpath", str(outpath)]
    return overlap.main([*argv, "--smooth", *map(str, LEVELS), "--rank-smooth", "3", *options])


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory) -> Path:
    """What the command writes; read only."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap_scores, "NOISE_DRAWS", 10)
        assert compare(world, folder) == 0
    return folder


def read_table(folder: Path, name: str = "overlap.csv") -> pd.DataFrame:
    return pd.read_csv(folder / name, dtype={"fold": str})


def test_defaults_are_the_specified_ones():
    args = vars(overlap.get_parser().parse_args(["--reference", "truth.nii.gz"]))
    assert args == {
        "maps": Path("heatmaps"),
        "reference": Path("truth.nii.gz"),
        "reference_threshold": 0,
        "mask": None,
        "smooth": [0, 2, 4, 6, 8, 10, 12],
        "rank_smooth": 8,
        "outpath": None,
        "seed": 0,
        "overwrite": False,
    }


def test_these_files_and_no_others(compared):
    assert set(contents(compared)) == {"overlap.json", "overlap.csv", "overlap_ranked.csv", "overlap.png"}
    assert (compared / "overlap.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_every_map_and_floor_once(compared):
    table = read_table(compared)
    assert list(table.columns[: len(COLUMNS)]) == COLUMNS
    folds = [*map(str, range(K)), "all"]
    expected = [(m, fold, fwhm) for m in METHODS for fold in folds for fwhm in LEVELS]
    expected += [(floor, "all", fwhm) for floor in ("edges", "random") for fwhm in LEVELS]
    assert list(table[["method", "fold", "fwhm_mm"]].itertuples(index=False, name=None)) == expected


@pytest.mark.parametrize("method", METHODS)
def test_table_holds_the_scores_of_smoothed_magnitudes(compared, method):
    mask, truth = brain_and_truth()
    brain, table = overlap_scores.Brain(mask, AFFINE), read_table(compared)
    folds = [fold_map(method, fold) for fold in range(K)]
    maps = {str(fold): values for fold, values in enumerate(folds)} | {"all": np.mean(folds, axis=0)}
    for fold, values in maps.items():
        for fwhm in LEVELS:
            smooth = brain.smooth(np.abs(values[mask]).astype(np.float32), fwhm)
            expected = overlap_scores.overlap_scores(smooth, truth[mask]) | {
                "smoothness_mm": brain.smoothness(smooth)
            }
            row = table[(table["method"] == method) & (table["fold"] == fold) & (table["fwhm_mm"] == fwhm)]
            for name, value in expected.items():
                assert row[name].item() == pytest.approx(value, rel=1e-5), (fold, fwhm, name)


def test_table_holds_intervals_floors_and_gains(compared):
    mask, truth = brain_and_truth()
    table = read_table(compared)
    folds = table[table["fold"] != "all"].set_index(["method", "fwhm_mm"])
    means = table[table["fold"] == "all"].set_index(["method", "fwhm_mm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap_scores, "NOISE_DRAWS", 10)
        largest = table.loc[table["method"] != "random", "smoothness_mm"].max()
        floor = overlap_scores.random_floor(truth[mask], overlap_scores.Brain(mask, AFFINE), largest, seed=0)
    for score, gain in (("dice", "minus_untrained"), ("dice_matched", "minus_untrained_matched")):
        for key in means.index:
            row = means.loc[key]
            if key[0] == "random":
                assert row[score] == max(means[f"random_{score}"][method, key[1]] for method in METHODS)
                continue
            expected = np.interp(row["smoothness_mm"], floor["smoothness_mm"], floor[score])
            assert row[f"random_{score}"] == pytest.approx(expected)
            if key[0] == "edges":
                continue
            values = folds.loc[key, score].to_numpy()
            low, high = overlap_scores.bootstrap_interval(values, 0)
            assert row[f"{score}_folds_mean"] == pytest.approx(values.mean())
            assert (row[f"{score}_low"], row[f"{score}_high"]) == pytest.approx((low, high))
            if key[0] != "IG":
                assert math.isnan(row[gain])
                continue
            values = values - folds.loc[("IG-random", key[1]), score].to_numpy()
            low, high = overlap_scores.bootstrap_interval(values, 0)
            found = row[gain], row[f"{gain}_low"], row[f"{gain}_high"]
            assert found == pytest.approx((values.mean(), low, high))


def test_edge_filter_is_the_gradient_of_the_mean_scan(compared, world):
    mask, truth = brain_and_truth()
    scan = nib.Nifti1Image.from_filename(world / "heatmaps" / "IG" / "mean_scan.nii.gz").get_fdata()
    sobel = [ndimage.gaussian_filter(scan, 1, order=[int(a == axis) for a in range(3)]) for axis in range(3)]
    edges = np.sqrt(sum(part**2 for part in sobel))[mask]
    table = read_table(compared)
    row = table[(table["method"] == "edges") & (table["fwhm_mm"] == 0)]
    for name, value in overlap_scores.overlap_scores(edges, truth[mask]).items():
        assert row[name].item() == pytest.approx(value, rel=1e-4), name


def test_ranking_is_written_and_printed(world, tmp_path, capsys):
    assert compare(world, tmp_path) == 0
    said = capsys.readouterr().out
    ranked = read_table(tmp_path, "overlap_ranked.csv")
    assert ranked["dice"].is_monotonic_decreasing
    assert (ranked["fwhm_mm"] == 3).all()
    assert sorted(ranked["method"]) == sorted([*METHODS, "edges", "random"])
    assert "3 mm" in said
    printed = [line.split()[0] for line in said.splitlines() if line.split()[0] in set(ranked["method"])]
    assert printed == ranked["method"].tolist()
    assert said.splitlines()[-1].startswith("written to")
    compared = ranked.set_index("method")["than_the_next"].dropna()
    trained = [method for method in ranked["method"] if method in ("GGC", "IG", "SVM")]
    assert compared.index.tolist() == trained[:-1]
    assert set(compared) <= {"better", "not separated"}


def test_share_of_maps_that_are_zero_stands_in_the_ranking(broken, tmp_path, capsys):
    """As map.json counts them; blank where it does not, as for an SVM."""
    for method, last in (("GGC", 5), ("IG", 0)):
        file = broken / "heatmaps" / method / "map.json"
        counts = {
            "zero_maps_per_fold": {"0": 1, "1": 0, "2": last},
            "scans_per_fold": {"0": 8, "1": 8, "2": 8},
        }
        storage.write_json(storage.read_json(file) | counts, file)
    assert compare(broken, tmp_path) == 0
    ranked = read_table(tmp_path, "overlap_ranked.csv")
    assert ranked.columns[-1] == "zero_share"
    found = ranked.set_index("method")["zero_share"]
    assert (found["GGC"], found["IG"]) == (6 / 24, 1 / 24)
    assert found.drop(["GGC", "IG"]).isna().all()
    printed = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert (printed["GGC"], printed["IG"]) == ("25%", "4%")


@pytest.mark.parametrize("counts", [5, {"0": "x"}, {"0": -1}, {"0": True}])
def test_counts_of_zero_maps_that_were_edited(broken, tmp_path, capsys, counts):
    file = broken / "heatmaps" / "GGC" / "map.json"
    storage.write_json(storage.read_json(file) | {"zero_maps_per_fold": counts}, file)
    assert "GGC/map.json: is damaged" in refuse(broken, tmp_path, capsys)


def test_comparison_of_an_earlier_version_is_made_again(world, compared, tmp_path, capsys):
    shutil.copytree(compared, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "overlap_ranked.csv"
    wanted = file.read_bytes()
    read_table(tmp_path, file.name).drop(columns="zero_share").to_csv(file, index=False)
    assert compare(world, tmp_path) == 0
    assert "compared before" not in capsys.readouterr().out
    assert file.read_bytes() == wanted


def test_ranked_smoothing_is_always_among_the_levels(world, tmp_path):
    argv = ["--maps", str(world / "heatmaps"), "--reference", str(world / "truth.nii.gz")]
    assert overlap.main([*argv, "--outpath", str(tmp_path), "--smooth", "0", "--rank-smooth", "2"]) == 0
    assert sorted(set(read_table(tmp_path)["fwhm_mm"])) == [0, 2]


def test_mask_is_where_the_mean_scan_is_unless_given(world, tmp_path, capsys, compared):
    argv = ["--maps", str(world / "heatmaps"), "--reference", str(world / "truth.nii.gz")]
    argv += ["--smooth", *map(str, LEVELS), "--rank-smooth", "3"]
    assert overlap.main([*argv, "--outpath", str(tmp_path)]) == 0
    assert "no --mask" in capsys.readouterr().out
    assert read_table(tmp_path).equals(read_table(compared))  # here the same voxels


def test_results_go_to_the_maps_by_default(world, tmp_path):
    maps = Path(shutil.copytree(world / "heatmaps", tmp_path / "heatmaps"))
    argv = ["--maps", str(maps), "--reference", str(world / "truth.nii.gz"), "--smooth", "0"]
    assert overlap.main(argv) == 0
    before = read_table(maps)
    assert overlap.main(argv) == 0  # the same once more: replaced
    assert read_table(maps).equals(before)


def test_seed_changes_floors_and_intervals_only(world, compared, tmp_path):
    assert compare(world, tmp_path, "--seed", "1") == 0
    first, second = read_table(compared), read_table(tmp_path)
    maps = first["method"] != "random"
    same = [*COLUMNS, "smoothness_mm", "dice_folds_mean", "minus_untrained"]
    assert first.loc[maps, same].equals(second.loc[maps, same])
    assert not first["random_dice"].equals(second["random_dice"])


def test_map_of_zeros_is_scored_without_a_fuss(world, tmp_path):
    maps = Path(shutil.copytree(world / "heatmaps", tmp_path / "heatmaps"))
    for file in (maps / "GGC").glob("map_*.nii.gz"):
        save(np.zeros(SHAPE, np.float32), file)
    assert (
        compare(
            tmp_path,
            tmp_path / "out",
            "--reference",
            str(world / "truth.nii.gz"),
            "--mask",
            str(world / "mask.nii.gz"),
        )
        == 0
    )
    table = read_table(tmp_path / "out")
    zeros = table[table["method"] == "GGC"]
    assert (zeros["dice"] == zeros["dice_floor"]).all()
    assert zeros[["smoothness_mm", "random_dice", "percent_of_max"]].isna().all(axis=None)


@pytest.mark.parametrize(
    "change",
    [["--seed", "1"], ["--smooth", "0"], ["--reference-threshold", "0.5"], ["--rank-smooth", "6"]],
)
def test_other_comparison_is_refused_and_overwritten_on_request(world, compared, tmp_path, capsys, change):
    folder = Path(shutil.copytree(compared, tmp_path / "copy"))
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    assert compare(world, folder, *change) == 2
    assert "--overwrite" in only_error(capsys.readouterr().err)
    assert contents(folder) == before
    assert compare(world, folder, *change, "--overwrite") == 0
    after = contents(folder)
    assert after["notes.txt"] == b"mine"
    assert after["overlap.json"] != before["overlap.json"]


def test_comparison_of_other_maps_is_refused(world, compared, tmp_path, capsys):
    folder = Path(shutil.copytree(compared, tmp_path / "copy"))
    fewer = Path(shutil.copytree(world, tmp_path / "fewer"))
    shutil.rmtree(fewer / "heatmaps" / "GGC")
    assert compare(fewer, folder) == 2
    assert "methods" in only_error(capsys.readouterr().err)
    changed = Path(shutil.copytree(world, tmp_path / "changed"))
    save(fold_map("SVM", 0), changed / "heatmaps" / "SVM" / "map_all.nii.gz")
    assert compare(changed, folder) == 2
    assert "SVM" in only_error(capsys.readouterr().err)


def test_record(compared, world):
    record = json.loads((compared / "overlap.json").read_text())
    assert record["methods"] == METHODS
    assert record["smooth"] == LEVELS
    assert record["sha256"]["reference"] == storage.sha256(world / "truth.nii.gz")
    assert record["sha256"]["IG, fold all"] == storage.sha256(world / "heatmaps" / "IG" / "map_all.nii.gz")
    assert record["versions"] == storage.versions()


# The reference -----------------------------------------------------------------------------------


def reference_of(
    tmp_path: Path, values: np.ndarray, affine: np.ndarray, mask: np.ndarray, threshold: float = 0
) -> np.ndarray:
    """The reference at the voxels of a mask on the grid of AFFINE, put back into a volume."""
    image = nib.Nifti1Image(mask.astype(np.float32), AFFINE)
    found = overlap.read_reference(save(values, tmp_path / "reference.nii.gz", affine), threshold, image)
    volume = np.zeros(mask.shape, bool)
    volume[mask] = found
    return volume


def test_reference_is_above_a_threshold_inside_the_mask(tmp_path, capsys):
    mask, _ = brain_and_truth()
    values = white(SHAPE, 5)
    values[2, 3, 1] = np.nan
    found = reference_of(tmp_path, values, AFFINE, mask, 0.5)
    assert np.array_equal(found, mask & (values > 0.5))
    said = capsys.readouterr().out
    assert "resampled" not in said
    inside, outside = int((mask & (values > 0.5)).sum()), int((~mask & (values > 0.5)).sum())
    assert all(str(number) in said for number in (inside, mask.sum(), outside))


@pytest.mark.parametrize("off", [(0, 0, 0), (0.6, -0.9, 0.5), (-0.6, 0.9, -0.5)])  # less than half a voxel
def test_shifted_reference_lands_where_it_lies_in_mm(tmp_path, capsys, off):
    """The reference's grid starts two voxels later along x and one earlier along z, and ends earlier."""
    values = np.zeros((8, 13, 14), np.float32)
    values[0, 6, 3] = values[7, 12, 12] = values[5, 0, 1] = 1
    affine = AFFINE.copy()
    affine[:3, 3] += AFFINE[:3, :3] @ [2, 0, -1] + off
    found = reference_of(tmp_path, values, affine, np.ones(SHAPE, bool))
    assert np.argwhere(found).tolist() == [[2, 6, 2], [7, 0, 0], [9, 12, 11]]
    said = capsys.readouterr().out
    assert "resampled" in said
    # x 0, 1, 10, 11 and z 13 of the maps' grid have no voxel of the reference's nearby
    assert f"{1 - 8 * 13 / (12 * 14):.1%} of the mask lies outside its field of view" in said


def test_turned_reference_lands_where_it_lies_in_mm(tmp_path, capsys):
    """Axes swapped and flipped, voxels of 1 mm: blocks placed by hand, in mm."""
    # i runs to superior, j to the right, k to posterior
    affine = np.array([[0, 1, 0, 50.25], [0, 0, -1, -60], [1, 0, 0, -65], [0, 0, 0, 1]])
    values = np.zeros((30, 40, 45), np.uint8)
    values[5:12, 10:17, 8:14] = 1  # z -60 ... -54, x 60.25 ... 66.25, y -68 ... -73, half a voxel around
    found = reference_of(tmp_path, values, affine, np.ones(SHAPE, bool))
    places = np.argwhere(np.ones(SHAPE, bool))
    x, y, z = nib.affines.apply_affine(AFFINE, places).T
    block = (np.abs(x - 63.25) < 3.5) & (np.abs(y + 70.5) < 3) & (np.abs(z + 57) < 3.5)
    assert block.sum() == 4 * 3 * 6
    assert np.argwhere(found).tolist() == places[block].tolist()
    assert "resampled" in capsys.readouterr().out


def test_oblique_reference_lands_where_it_lies_in_mm(tmp_path):
    values = np.zeros(SHAPE, np.uint8)
    values[3:9, 4:10, 5:9] = 1
    found = reference_of(tmp_path, values, OBLIQUE, np.ones(SHAPE, bool))
    for place in np.ndindex(SHAPE):
        there = nib.affines.apply_affine(np.linalg.inv(OBLIQUE) @ AFFINE, place)
        if np.abs(there - np.floor(there) - 0.5).min() < 1e-3:
            continue  # halfway between voxels
        nearest = np.rint(there).astype(int)
        inside = (nearest >= 0).all() and (nearest < SHAPE).all()
        assert found[place] == (inside and bool(values[tuple(nearest)])), place


# Mistakes ----------------------------------------------------------------------------------------


def refuse(world: Path, tmp_path: Path, capsys, *options: str) -> str:
    """The error line of a comparison that must not write anything."""
    assert compare(world, tmp_path / "out", *options) == 2
    assert not (tmp_path / "out").exists()
    return only_error(capsys.readouterr().err)


@pytest.fixture
def broken(world, tmp_path) -> Path:
    """The world, to be damaged."""
    return Path(shutil.copytree(world, tmp_path / "broken"))


def test_missing_maps_are_named(broken, tmp_path, capsys):
    (broken / "heatmaps" / "IG" / "map_f2.nii.gz").unlink()
    (broken / "heatmaps" / "SVM" / "map_f1.nii.gz").unlink()
    (broken / "heatmaps" / "GGC" / "map_all.nii.gz").unlink()
    line = refuse(broken, tmp_path, capsys)
    assert all(name in line for name in ("IG/map_f2.nii.gz", "SVM/map_f1.nii.gz", "GGC/map_all.nii.gz"))
    assert "map_f0" not in line


def test_method_of_other_folds(broken, tmp_path, capsys):
    (broken / "heatmaps" / "SVM" / "map_f2.nii.gz").unlink()
    line = refuse(broken, tmp_path, capsys)
    assert "SVM has 2" in line
    assert "IG has 3" in line


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"folds": 10**9}, "has 1000000000 folds"),
        ({"folds": -1}, "has -1 folds"),
        ({"folds": "3"}, "'folds' is '3'"),
        ({"folds": True}, "'folds' is True"),
        ({"folds": K, "csv_sha256": [["abc"]]}, "'csv_sha256' is [['abc']]"),
    ],
)
def test_nonsense_in_a_record(broken, tmp_path, capsys, record, words):
    (broken / "heatmaps" / "IG" / "map.json").write_text(json.dumps(record))
    line = refuse(broken, tmp_path, capsys)
    assert words in line
    assert "IG" in line


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"folds_sha256": "abc"}, "of different folds"),
        ({"scans_sha256": "abc"}, "of different scans"),
        ({"method": "SVM"}, "is not finished"),
    ],
)
def test_maps_that_cannot_be_compared(broken, tmp_path, capsys, record, words):
    other = {"folds": K, "folds_sha256": "def", "scans_sha256": "def"}
    for name, more in {"IG": record, "SVM": {"C_per_fold": {}}}.items():
        (broken / "heatmaps" / name / "map.json").write_text(json.dumps(other | more))
    assert words in refuse(broken, tmp_path, capsys)


def test_map_of_a_fold_beyond_all_bounds(broken, tmp_path, capsys):
    (broken / "heatmaps" / "IG" / "map.json").unlink()
    (broken / "heatmaps" / "IG" / f"map_f{10**30}.nii.gz").touch()
    assert "folds, expected at most" in refuse(broken, tmp_path, capsys)


@pytest.mark.parametrize("name", ["random", "edges", "a\nb", "\x1b[31m", "\u202eGI"])
def test_method_of_a_name_that_cannot_be(broken, tmp_path, capsys, name):
    (broken / "heatmaps" / "IG").rename(broken / "heatmaps" / name)
    line = refuse(broken, tmp_path, capsys)
    assert "cannot have this name" in line
    assert line.rstrip("\n").isprintable()


def test_method_with_signs_of_formulas_is_drawn_as_it_is(broken, tmp_path):
    (broken / "heatmaps" / "IG").rename(broken / "heatmaps" / "I$\\frac{G$ {0.x} %s")
    assert compare(broken, tmp_path / "out") == 0
    assert (tmp_path / "out" / "overlap.png").stat().st_size > 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_map_that_is_not_finite(broken, tmp_path, capsys, value):
    values = fold_map("SVM", 1)
    values[0, 0, 0] = value  # outside the mask nothing matters
    save(values, broken / "heatmaps" / "SVM" / "map_f1.nii.gz")
    assert compare(broken, tmp_path / "fine") == 0
    values[5, 5, 5] = value
    save(values, broken / "heatmaps" / "SVM" / "map_f1.nii.gz")
    assert "SVM/map_f1.nii.gz" in refuse(broken, tmp_path, capsys)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("distance", [-500, 500])
def test_reference_elsewhere(world, tmp_path, capsys, axis, distance):
    affine = AFFINE.copy()
    affine[axis, 3] += distance
    far = save(np.ones(SHAPE, np.uint8), tmp_path / "far.nii.gz", affine)
    assert "field of view" in refuse(world, tmp_path, capsys, "--reference", str(far))
