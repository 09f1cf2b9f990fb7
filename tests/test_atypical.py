"""atypical.py: the numbers of a scan against naive ones, ranges and reasons, and damage that must show."""

import itertools
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cohorts import OBLIQUE, scans_of
from scipy import ndimage
from scipy.stats import pearsonr

import atypical
from atypical import ANY, COLUMNS, TRAITS, Head, common_head, ranges_of, ranges_table, read_ranges, reasons
from internals import storage
from internals.errors import InputError

SIZES = (1.5, 2, 1.25)  # mm, of OBLIQUE's voxels
QUANTILES = {"q10": 10, "q50": 50, "q90": 90}
ONE_SIDED = {"offset": "high", "overlap": "low", "correlation": "low"}  # nearer, or more alike, is no fault


# The numbers -------------------------------------------------------------------------------------


def sparse(seed: int, shape: tuple[int, ...] = (7, 5, 6)) -> np.ndarray:
    """A volume in [0, 1], float32, of which about half is zero."""
    values = np.random.default_rng(seed).uniform(-1, 1, shape)
    return np.maximum(values, 0).astype(np.float32)


def centre(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The mean place in mm of the voxels that are not zero, voxel by voxel."""
    places = [affine @ [*place, 1] for place in itertools.product(*map(range, volume.shape)) if volume[place]]
    return np.mean(places, axis=0)[:3]


def quantile(values: list[float], percent: float) -> float:
    """The value at a place between the sorted ones, 0 % the first and 100 % the last."""
    place = percent / 100 * (len(values) - 1)
    low = int(place)
    first, second = sorted(values)[low], sorted(values)[min(low + 1, len(values) - 1)]
    return first + (place - low) * (second - first)


@pytest.mark.parametrize("seed", range(4))
def test_traits_are_the_naive_ones(seed):
    """Voxels of three edges, turned and flipped."""
    mean, volume = sparse(seed), sparse(seed + 100)
    volume[: seed + 2] = 0  # so that the two lie apart
    found = Head(mean, OBLIQUE).traits(volume)
    assert set(found) == set(TRAITS)
    places = [*itertools.product(*map(range, mean.shape))]
    own, theirs = ({place for place in places if each[place]} for each in (volume, mean))
    in_head = [(float(volume[place]), float(mean[place])) for place in places if place in theirs]
    expected = {
        "overlap": 2 * len(own & theirs) / (len(own) + len(theirs)),
        "offset": np.linalg.norm(centre(volume, OBLIQUE) - centre(mean, OBLIQUE)),
        "volume": len(own) * np.prod(SIZES) / 1000,
        "correlation": pearsonr(*zip(*in_head, strict=True)).statistic,
    }
    assert expected["offset"] > 1
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-11)  # sums of some hundred numbers in float64
    values = [float(volume[place]) for place in own]
    for name, percent in QUANTILES.items():  # numpy keeps float32 between two values
        assert found[name] == pytest.approx(quantile(values, percent), rel=1e-6)


def test_head_shifted_by_whole_voxels():
    """By 2, -1 and 3 voxels, in mm; everything else is as it was but for what depends on the place."""
    mean = np.zeros((12, 11, 13), np.float32)
    mean[3:8, 3:8, 3:8] = sparse(0, (5, 5, 5)) + 0.1
    head = Head(mean, OBLIQUE)
    same, moved = head.traits(mean), head.traits(np.roll(mean, (2, -1, 3), (0, 1, 2)))
    assert same["offset"] == 0
    assert (same["overlap"], same["correlation"]) == (1, pytest.approx(1, abs=1e-12))
    assert moved["offset"] == pytest.approx(np.linalg.norm(np.multiply((2, -1, 3), SIZES)), rel=1e-12)
    assert moved["overlap"] == (5 - 2) * (5 - 1) * (5 - 3) / 5**3
    assert {name: moved[name] for name in ("volume", *QUANTILES)} == {
        name: same[name] for name in ("volume", *QUANTILES)
    }


def test_scan_that_is_the_same_everywhere_in_the_head_has_no_correlation():
    mean = sparse(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Head(mean, OBLIQUE).traits((mean > 0).astype(np.float32))["correlation"] == 0
        assert Head((mean > 0).astype(np.float32), OBLIQUE).traits(mean)["correlation"] == 0


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [4, 0, 2], [3], [5, 5, 1, 2, 0]])
def test_common_head_is_the_mean_where_half_of_the_scans_are_not_zero(rows):
    volumes = np.stack([sparse(seed) for seed in range(6)])
    found = common_head(scans_of(volumes), rows)
    assert found.dtype == np.float32
    counts = set()
    for place in itertools.product(*map(range, found.shape)):
        values = [float(volumes[row][place]) for row in rows]
        count = sum(value > 0 for value in values)
        counts.add(count)
        expected = sum(values) / len(rows) if count >= len(rows) / 2 else 0
        assert found[place] == pytest.approx(expected, rel=1e-7)  # one rounding to float32
    assert len(counts) > len(rows) / 2  # half of an even number, and one less, are among them


# Ranges and reasons ------------------------------------------------------------------------------


def ordered(n: int) -> pd.DataFrame:
    """Numbers 0, 1 ... n - 1, shuffled, of every trait, times 1, 2, 4 ..."""
    random = np.random.default_rng(0)
    columns = {name: 2.0**place * random.permutation(n) for place, name in enumerate(TRAITS)}
    return pd.DataFrame(columns)[[*reversed(TRAITS)]]  # told apart by name


def test_range_is_beyond_the_percentiles_by_a_share_of_their_width(monkeypatch):
    """Of 0, 1 ... 20 they are 2 and 18, and half of 16 is 8."""
    monkeypatch.setattr(atypical, "MARGIN", 0.5)
    monkeypatch.setattr(atypical, "PERCENTILES", (10, 90))
    found = ranges_of(ordered(21))
    assert list(found.columns) == ["trait", "low", "high", "training_low", "training_high"]
    assert found["trait"].tolist() == list(TRAITS)
    for place, row in enumerate(found.to_dict("records")):
        one, side = 2**place, ONE_SIDED.get(row["trait"])
        ends = {"training_low": 2 * one, "training_high": 18 * one}
        ends |= {"low": -6 * one if side != "high" else np.nan, "high": 26 * one if side != "low" else np.nan}
        assert {name: row[name] for name in ends} == pytest.approx(ends, nan_ok=True)


@pytest.mark.parametrize("short", [0, 1])
def test_few_training_scans_tell_nothing(short):
    """Their range is told all the same; no scan is atypical."""
    found = ranges_of(ordered(atypical.FEWEST - short))
    assert np.isfinite(found[["training_low", "training_high"]]).all(axis=None)
    assert atypical.is_known(found) == (short == 0)
    assert (reasons(dict.fromkeys(TRAITS, 1e6), found) == "") == (short == 1)
    assert (reasons(dict.fromkeys(TRAITS, -1e6), found) == "") == (short == 1)


def wide() -> pd.DataFrame:
    """Every trait from 2 to 4, its training scans from 2.5 to 3.5; one end where there is but one."""
    rows = [
        {"trait": name, "low": 2.0, "high": 4.0, "training_low": 2.5, "training_high": 3.5} for name in TRAITS
    ]
    found = pd.DataFrame(rows)
    for name, side in ONE_SIDED.items():
        found.loc[found["trait"] == name, "low" if side == "high" else "high"] = np.nan
    return found


@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize("name", TRAITS)
def test_number_beyond_its_range_is_the_reason(name, side):
    typical, trait = dict.fromkeys(TRAITS, 3.0), TRAITS[name]
    bound, step = (2.0, -np.inf) if side == "low" else (4.0, np.inf)
    assert reasons(typical, wide()) == ""
    assert reasons(typical | {name: bound}, wide()) == ""
    beyond = reasons(typical | {name: float(np.nextafter(bound, step))}, wide())
    far = reasons(typical | {name: bound + np.sign(step) * 1.23456}, wide())
    if side != ONE_SIDED.get(name, side):
        assert (beyond, far) == ("", "")
        return
    wrong = trait.too_low if side == "low" else trait.too_high
    assert wrong
    assert beyond == f"{wrong}: {trait.words} {bound:.0f}, theirs 2.5-3.5"
    assert far == f"{wrong}: {trait.words} {0.765 if side == 'low' else 5.23}, theirs 2.5-3.5"


@pytest.mark.parametrize("name", ONE_SIDED)
def test_one_sided_traits_have_no_words_for_the_other_side(name):
    trait = TRAITS[name]
    assert (trait.too_low == "") == (ONE_SIDED[name] == "high")
    assert (trait.too_high == "") == (ONE_SIDED[name] == "low")
    assert [each for each in TRAITS if not (TRAITS[each].too_low and TRAITS[each].too_high)] == list(
        ONE_SIDED
    )


def test_all_reasons_are_told_in_the_order_of_the_traits():
    typical = dict.fromkeys(TRAITS, 3.0)
    found = reasons(typical | {"q90": 0.01234, "offset": 1234.5}, wide())
    first, second = found.split("; ")
    assert first == "shifted: mm between its centre and theirs 1234, theirs 2.5-3.5"
    assert second.startswith(TRAITS["q90"].too_low)
    assert second.endswith(" 0.0123, theirs 2.5-3.5")


# A cohort of blobs, and damage -------------------------------------------------------------------

SHAPE, VOXEL = (26, 30, 28), 7.0  # mm
AFFINE = np.array([[-VOXEL, 0, 0, 90], [0, VOXEL, 0, -110], [0, 0, VOXEL, -70], [0, 0, 0, 1]])
TRAIN, TEST = range(40), range(40, 60)


def smooth(random: np.random.Generator) -> np.ndarray:
    """White noise, smoothed to blobs of some voxels, of standard deviation 1."""
    values = ndimage.gaussian_filter(random.standard_normal(SHAPE), 1.5)
    return values / values.std()


def scaled(values: np.ndarray) -> np.ndarray:
    """To [0, 1] by its own minimum and maximum, as scans are."""
    return ((values - values.min()) / (values.max() - values.min())).astype(np.float32)


@cache
def heads() -> np.ndarray:
    """Sixty scans: one pattern and a weaker one of their own, in ellipsoids of about one size and place."""
    random = np.random.default_rng(0)
    pattern, scans = smooth(random), []
    for _ in range(len(TRAIN) + len(TEST)):
        middle = np.array(SHAPE) / 2 + random.normal(0, 0.2, 3)
        radii = np.array([8, 10, 9]) * random.normal(1, 0.015, 3)
        places = np.moveaxis(np.indices(SHAPE), 0, -1)
        inside = (((places - middle) / radii) ** 2).sum(-1) < 1
        values = 5 + pattern + 0.3 * smooth(random)
        scans.append(scaled(np.where(inside, values * random.normal(1, 0.05), 0)))
    return np.stack(scans)


@cache
def typical() -> tuple[Head, pd.DataFrame]:
    """The training scans' head, and what is typical of them."""
    head = Head(common_head(scans_of(heads()), TRAIN), AFFINE)
    return head, ranges_of(pd.DataFrame([head.traits(heads()[row]) for row in TRAIN]))


def skull(scan: np.ndarray) -> np.ndarray:
    """A bright shell, two voxels of air around the head, two thick."""
    inner, outer = (ndimage.binary_dilation(scan > 0, iterations=times) for times in (2, 4))
    return np.where(outer & ~inner, 0.9, scan)


def halved(scan: np.ndarray) -> np.ndarray:
    values = scan.copy()
    values[SHAPE[0] // 2 :] = 0
    return values


def resampled(scan: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turned or stretched about the middle: where a voxel comes from, by a matrix."""
    middle = (np.array(SHAPE) - 1) / 2
    return ndimage.affine_transform(scan, matrix, middle - matrix @ middle, order=1)


def noisy(scan: np.ndarray) -> np.ndarray:
    return np.where(scan > 0, np.abs(scan + 0.3 * np.random.default_rng(0).standard_normal(SHAPE)), 0)


TURN = np.deg2rad(25)
TURNED = np.array([[1, 0, 0], [0, np.cos(TURN), -np.sin(TURN)], [0, np.sin(TURN), np.cos(TURN)]])

# what is done to a scan, and the trait that must tell
DAMAGE: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, str]] = {
    "shift": (lambda scan: np.roll(scan, 3, axis=1), "offset", "too_high"),
    "smaller": (lambda scan: resampled(scan, np.eye(3) / 0.8), "volume", "too_low"),
    "larger": (lambda scan: resampled(scan, np.eye(3) / 1.2), "volume", "too_high"),
    "rotation": (lambda scan: resampled(scan, TURNED), "correlation", "too_low"),
    "quarter turn": (lambda scan: resampled(scan, np.eye(3)[[0, 2, 1]]), "correlation", "too_low"),
    "inverted contrast": (lambda scan: np.where(scan > 0, 1.05 - scan, 0), "correlation", "too_low"),
    "noise": (noisy, "correlation", "too_low"),
    "empty half": (halved, "volume", "too_low"),
    "skull": (skull, "volume", "too_high"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_in_every_held_out_scan(damage):
    head, ranges = typical()
    work, name, side = DAMAGE[damage]
    for row in TEST:
        found = reasons(head.traits(scaled(work(heads()[row]))), ranges)
        assert f"{getattr(TRAITS[name], side)}: {TRAITS[name].words}" in found


def test_held_out_scans_are_typical():
    head, ranges = typical()
    assert [reasons(head.traits(heads()[row]), ranges) for row in TEST] == [""] * len(TEST)


# The table ---------------------------------------------------------------------------------------


def test_table_counts_the_test_scans_that_are_marked():
    """Of twenty, three are shifted and two inverted; a scan counts once among any, whatever its reasons."""
    volumes = heads().copy()
    for row, damage in zip((40, 44, 58, 47, 51), ["shift"] * 3 + ["inverted contrast"] * 2, strict=True):
        volumes[row] = scaled(DAMAGE[damage][0](volumes[row]))
    head, ranges = typical()
    found = ranges_table(scans_of(volumes), head, TRAIN, TEST)
    assert list(found.columns) == [name for name in COLUMNS if name != "fold"]
    assert found["trait"].tolist() == [*TRAITS, ANY]
    pd.testing.assert_frame_equal(found[COLUMNS[1:6]][:-1], ranges, check_exact=True)
    assert found[COLUMNS[2:6]].iloc[-1].isna().all()
    assert found["test_scans"].tolist() == [20] * (len(TRAITS) + 1)
    told = [reasons(head.traits(volumes[row]), ranges) for row in TEST]
    for name, marked in zip(found["trait"][:-1], found["test_marked"], strict=False):
        assert marked == sum(TRAITS[name].words in words for words in told)
    assert found["test_marked"].iloc[-1] == sum(map(bool, told)) == 5
    assert found["test_marked"].iloc[:-1].sum() > 5
    assert found["test_marked"].iloc[0] == 3  # the offset


def folds() -> pd.DataFrame:
    """The tables of three folds, of other training scans each, as a run has them; the last's are too few."""
    found = []
    for fold in range(3):
        train = [row for row in TRAIN if row % 3 != fold][: atypical.FEWEST - (fold == 2)]
        head = Head(common_head(scans_of(heads()), train), AFFINE)
        found.append(ranges_table(scans_of(heads()), head, train, range(fold, 9)).assign(fold=fold)[COLUMNS])
    return pd.concat(found)


def test_summary_is_of_all_folds():
    rows = [
        (0, "offset", 9.5, 9, 9),
        (0, ANY, np.nan, 20, 3),
        (1, "offset", 9.5, 9, 9),
        (1, ANY, np.nan, 21, 4),
    ]
    table = pd.DataFrame(rows, columns=["fold", "trait", "high", "test_scans", "test_marked"]).assign(
        low=np.nan
    )
    assert atypical.summary(table) == "7 of 41 test scans are atypical"
    words = f"fewer than {atypical.FEWEST} training scans: what is typical is not known"
    assert atypical.summary(table.assign(high=np.nan)) == words


@cache
def text() -> str:
    """The file of three folds."""
    return folds().to_csv(index=False, lineterminator="\n")


def test_ranges_are_read_as_they_were_written(tmp_path):
    table, names = folds(), COLUMNS[1:6]
    storage.write_csv(table, tmp_path / "typical.csv")
    found = read_ranges(tmp_path / "typical.csv", 3)
    shifted = typical()[0].traits(np.roll(heads()[50], 3, axis=1))
    traits = table[table["trait"] != ANY]
    for fold, ranges in zip(range(3), found, strict=True):
        expected = traits[traits["fold"] == fold][names].reset_index(drop=True)
        pd.testing.assert_frame_equal(ranges[names].reset_index(drop=True), expected, check_exact=True)
        assert reasons(shifted, ranges) == reasons(shifted, expected)
        assert (reasons(shifted, ranges) == "") == (not atypical.is_known(ranges)) == (fold == 2)
    assert not found[0][names].equals(found[1][names])


NUMBER = r"^1,volume,[^,]*,"  # to the lower bound of fold 1's volume

DAMAGED = {
    "another column": ("training_low", "training low"),
    "a column less": (",test_marked$", ""),
    "no header": (r"\A.*\n", ""),
    "nothing": (r"(?s)\A.*\Z", ""),
    "header alone": (r"(?s)\n.*", "\n"),
    "another fold": ("^1,offset", "4,offset"),
    "another trait": ("^1,offset", "1,distance"),
    "a trait less": ("^1,volume,.*\n", ""),
    "a trait twice": ("^(1,volume,.*\n)", r"\1\1"),
    "a fold less": (r"(?s)^2,offset.*", ""),
    "no row for any": (f"^1,{ANY},.*\n", ""),
    "a row of two cells": ("^1,volume,.*", "1,volume"),
    "a row cut short": (f"({NUMBER}).*", r"\1"),
    "a cell more": ("^(1,volume,.*)", r"\1,5"),
    "text": (NUMBER, "1,volume,small,"),
    "blank": (NUMBER, "1,volume,,"),
    "not a number": (NUMBER, "1,volume,nan,"),
    "infinite": (NUMBER, "1,volume,-inf,"),
    "binary": (NUMBER, "1,volume,\0,"),
}


def check_damaged(file: Path) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: .") as problem:
        read_ranges(file, 3)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file(tmp_path, damage):
    pattern, instead = DAMAGED[damage]
    damaged, times = re.subn(pattern, instead, text(), count=1, flags=re.MULTILINE)
    assert times == 1
    (tmp_path / "typical.csv").write_text(damaged)
    check_damaged(tmp_path / "typical.csv")


@pytest.mark.parametrize("width", [2, 4])
def test_file_whose_rows_are_all_cut_short(tmp_path, width):
    header, *rows = text().split("\n")
    short = [",".join(row.split(",")[:width]) for row in rows]
    (tmp_path / "typical.csv").write_text("\n".join([header, *short]))
    check_damaged(tmp_path / "typical.csv")


@pytest.mark.parametrize("k", [2, 4])
def test_file_of_another_run(tmp_path, k):
    (tmp_path / "typical.csv").write_text(text())
    with pytest.raises(InputError, match=r"is damaged: expected every fold's traits$"):
        read_ranges(tmp_path / "typical.csv", k)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv: no such CSV"):
        read_ranges(tmp_path / "none.csv", 3)
