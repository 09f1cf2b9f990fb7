"""What the training scans of a network look like, and which scans do not look like them.

A network answers with confidence whatever it is shown. A few numbers of a scan (`TRAITS`), each of which
people can check by eye, say whether it is like those that the network was trained on: a scan is atypical
where one of them lies beyond the range of the training scans.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd

from dataset import ScanDataset
from internals import tables
from internals.errors import InputError, blaming

MARGIN = 0.75  # beyond the training scans' range, as a share of its width
PERCENTILES = (0.5, 99.5)  # of the training scans: their range
FEWEST = 20  # training scans; fewer do not tell what is typical
MOST = 2000  # and more are not needed
QUANTILES = (10, 50, 90)  # percent, of the voxels that are not zero
ANY = "any"  # the row of `ranges_table` for scans that any number marks


class Trait(NamedTuple):
    """A number of a scan, and what is wrong with a scan that has too little or too much of it."""

    words: str
    least: float  # the smallest margin, where training scans hardly differ
    too_low: str = ""  # nothing: it cannot be
    too_high: str = ""


TRAITS = {
    "offset": Trait("mm between its centre and theirs", 0.5, too_high="shifted"),
    "volume": Trait(
        "ml that are not zero",
        10,
        "part of the head is missing, or it is small",
        "more than a brain, or a large one",
    ),
    "overlap": Trait("overlap of the head with the training scans", 0.01, "it lies elsewhere"),
    "correlation": Trait(
        "correlation with the training scans' mean", 0.01, "turned, noisy, or of another contrast"
    ),
    **{
        f"q{q}": Trait(f"{q} % of the head are darker than", 0.01, "dark or noisy", "bright")
        for q in QUANTILES
    },
}
COLUMNS = ["fold", "trait", "low", "high", "training_low", "training_high", "test_scans", "test_marked"]


# The numbers -------------------------------------------------------------------------------------


class Own(NamedTuple):
    """What can be said of a scan alone."""

    inside: np.ndarray  # (X, Y, Z) bool, where it is not zero
    voxels: int  # how many these are
    centre: np.ndarray  # (3,), theirs, in mm
    quantiles: list[float]  # of their values


def own_traits(volume: np.ndarray, affine: np.ndarray) -> Own:
    """What can be said of a scan (X, Y, Z) in [0, 1] alone."""
    inside = volume > 0
    quantiles = np.percentile(volume[inside], QUANTILES).tolist()
    return Own(inside, int(np.count_nonzero(inside)), _centre(inside, affine), quantiles)


class Head:
    """What the heads of some training scans have in common.

    Args:
        mean: (X, Y, Z), their mean where at least half of them are not zero, elsewhere zero.
        affine: (4, 4), voxel to mm.
    """

    def __init__(self, mean: np.ndarray, affine: np.ndarray) -> None:
        self.affine, self.inside = affine, mean > 0
        self.voxels = int(np.count_nonzero(self.inside))
        self.centre = _centre(self.inside, affine)
        values = mean[self.inside].astype(np.float64)
        self.pattern = values - values.mean()  # (V,)

    def traits(self, volume: np.ndarray, own: Own | None = None) -> dict[str, float]:
        """The numbers of a scan (X, Y, Z) in [0, 1], by the names of TRAITS.

        overlap is the Dice coefficient of the voxels that are not zero with the head, correlation is
        Pearson's in the head, and the quantiles are those of the voxels that are not zero.

        Args:
            volume: the scan.
            own: what `own_traits` says of it, where that is known.
        """
        own = own or own_traits(volume, self.affine)
        values = volume[self.inside].astype(np.float64)
        centred = values - values.mean()
        norms = np.linalg.norm(centred) * np.linalg.norm(self.pattern)
        both = np.count_nonzero(own.inside & self.inside)
        found = {
            "overlap": 2 * both / (own.voxels + self.voxels),
            "offset": float(np.linalg.norm(own.centre - self.centre)),
            "volume": own.voxels * abs(np.linalg.det(self.affine[:3, :3])) / 1000,
            "correlation": float(centred @ self.pattern / norms) if norms else 0.0,
        }
        return found | {f"q{q}": value for q, value in zip(QUANTILES, own.quantiles, strict=True)}


def common_head(scans: ScanDataset, rows: Sequence[int]) -> np.ndarray:
    """The mean of some scans where at least half of them are not zero, zero elsewhere: float32 (X, Y, Z)."""
    first = scans[rows[0]][0][0]
    total, count = np.zeros(first.shape), np.zeros(first.shape, np.int32)
    for volume in scans.volumes(rows):
        total += volume
        count += volume > 0
    return np.where(2 * count >= len(rows), total / len(rows), 0).astype(np.float32)


def _centre(inside: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The centre of some voxels in mm, (3,)."""
    counts = [np.count_nonzero(inside, axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    place = [np.average(np.arange(len(number)), weights=number) for number in counts]
    return nib.affines.apply_affine(affine, place)


# The ranges --------------------------------------------------------------------------------------


def ranges_of(training: pd.DataFrame) -> pd.DataFrame:
    """What is typical.

    Args:
        training: the traits of training scans, a row each.

    Returns:
        A row per trait: training_low and training_high, the PERCENTILES; low and high, beyond which a scan is
        atypical, NaN where it cannot be, or where the training scans are fewer than FEWEST.
    """
    rows, tells = [], len(training) >= FEWEST
    for name, trait in TRAITS.items():
        low, high = np.percentile(training[name], PERCENTILES)
        margin = max(MARGIN * (high - low), trait.least)
        ends = {"low": low - margin if trait.too_low and tells else np.nan}
        ends["high"] = high + margin if trait.too_high and tells else np.nan
        rows.append({"trait": name, **ends, "training_low": low, "training_high": high})
    return pd.DataFrame(rows)


def reasons(traits: Mapping[str, float], ranges: pd.DataFrame) -> str:
    """Why a scan is atypical, in words; nothing where it is not."""
    found = []
    for name, low, high, *theirs in ranges[COLUMNS[1:6]].itertuples(index=False):
        trait, value = TRAITS[name], traits[name]
        if value < low or value > high:
            wrong = trait.too_low if value < low else trait.too_high
            known = "-".join(map(_readable, theirs))
            found.append(f"{wrong}: {trait.words} {_readable(value)}, theirs {known}")
    return "; ".join(found)


def _readable(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ranges_table(scans: ScanDataset, head: Head, train: Sequence[int], test: Sequence[int]) -> pd.DataFrame:
    """What is typical of some training scans, and how many test scans are not: COLUMNS, but for the fold.

    The last row, ANY, counts the test scans that any number marks.
    """
    known, held_out = (pd.DataFrame(map(head.traits, scans.volumes(rows))) for rows in (train, test))
    ranges = ranges_of(known)
    outside = {
        name: (held_out[name] < low) | (held_out[name] > high)
        for name, low, high in ranges[COLUMNS[1:4]].itertuples(index=False)
    }
    marked = pd.DataFrame(outside)
    counts = [*marked.sum().tolist(), int(marked.any(axis=1).sum())]
    table = pd.concat([ranges, pd.DataFrame([{"trait": ANY}])], ignore_index=True)
    return table.assign(test_scans=len(test), test_marked=counts)


def is_known(ranges: pd.DataFrame) -> bool:
    """Whether anything is known to be typical: there were training scans enough."""
    return bool(ranges[["low", "high"]].notna().any(axis=None))


def summary(ranges: pd.DataFrame) -> str:
    """How many test scans of all folds are atypical to the network that tests them, as one line."""
    told = [part for _, part in ranges.groupby("fold") if is_known(part)]
    if not told:
        return f"fewer than {FEWEST} training scans: what is typical is not known"
    last = pd.concat(told)
    last = last[last["trait"] == ANY]
    return f"{last['test_marked'].sum()} of {last['test_scans'].sum()} test scans are atypical"


def read_ranges(file: Path, k: int) -> list[pd.DataFrame]:
    """The ranges of every fold as train_cv.py wrote them.

    Raises:
        InputError: no such file, or another content.
    """
    wanted = [[str(fold), name] for fold in range(k) for name in (*TRAITS, ANY)]
    with blaming(file):
        rows = tables.read_table(file, COLUMNS)
        if [row[:2] for row in rows] != wanted:
            raise InputError("is damaged: expected every fold's traits")
        try:
            numbers = [[float(cell or "nan") for cell in row[2:6]] for row in rows]
        except ValueError as problem:
            raise InputError(f"is damaged ({problem})") from problem
        table = pd.DataFrame(numbers, columns=COLUMNS[2:6])
        table = table.assign(fold=[int(row[0]) for row in rows], trait=[row[1] for row in rows])
        found = [table[(table["fold"] == fold) & (table["trait"] != ANY)] for fold in range(k)]
        if not all(map(_is_whole, found)):
            raise InputError("is damaged: it lacks numbers, or has some that are none")
    return found


def _is_whole(ranges: pd.DataFrame) -> bool:
    """Whether a fold's ranges have the training scans' ends, and, where these are enough, the traits' own."""
    ends = np.isfinite(ranges[COLUMNS[2:6]].to_numpy())  # (T, 4)
    wanted = [[bool(trait.too_low), bool(trait.too_high)] for trait in TRAITS.values()]
    return bool(ends[:, 2:].all() and (not is_known(ranges) or (ends[:, :2] == wanted).all()))
