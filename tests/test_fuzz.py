"""Any bytes in any file that the commands read: a result or an InputError, soon, and within memory.

`make fuzz` searches for about ten minutes; otherwise a few seconds.
"""

import gzip
import json
import re
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from cohorts import AFFINE, tiny_cohort, voxels, write_scan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import brain_maps
import dataset
import heatmap
import models
import runs
from internals import checkpoints, nifti, process, storage
from internals.errors import InputError
from internals.results import ResultFolder

ROOM = 2**30  # bytes beyond what the process has already: more is a MemoryError, which no test allows
# The deadline is generous, as others may use the processor; a hang or a quadratic step shows all the same.
fuzz = settings(deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    """A ceiling over the address space of the process while the tests of this file run."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
    """What a reader returns; None where it refuses, in words that are one harmless line."""
    try:
        return read(*arguments)
    except InputError as mistake:
        line = process.printable(str(mistake))
        if not (line.isprintable() and 0 < len(line) < 10 * process.LONGEST):
            raise
        return None


def patches(size: int) -> st.SearchStrategy[list[tuple[int, bytes]]]:
    """A few pieces of bytes to write over others."""
    return st.lists(st.tuples(st.integers(0, size - 1), st.binary(min_size=1, max_size=8)), max_size=4)


def patch(raw: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    content = bytearray(raw)
    for place, piece in changes:
        content[place : place + len(piece)] = piece
    return bytes(content)


FRAGMENTS = [
    *["path", "label", "subject", "a.nii", "0", "1", "~", "~x/a", "..", "/", "é", '"', ",", ",", ",", "\n"],
    *["\n", "\n", "\r", " ", "\0", "\t", "\u2028", "\ufeff", "a" * 300, "$(x)", "{0}", "%s", "\x1b[31m"],
    *["NA", "1e5", "'", "0,1\n"],
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map(lambda parts: "".join(parts).encode())
CSVS = st.one_of(TEXTS, st.binary(max_size=200), st.tuples(TEXTS, st.binary(max_size=3), TEXTS).map(b"".join))


@fuzz
@given(CSVS)
def test_csv(folder, content: bytes):
    file = folder / "data.csv"
    file.write_bytes(content)
    table = attempt(dataset.read_csv, file)
    if table is not None:
        assert list(table.columns) == ["path", "label", "subject", "file"]
        assert set(table["label"]) <= {0, 1}
        assert not table["file"].duplicated().any()
        attempt(dataset.check_grid, table)


# Offset, format and number of the fields that decide what is read.
FIELDS = {
    nib.Nifti1Image: "0i1 40h8 70h2 76f8 108f3 252h2 256f18",
    nib.Nifti2Image: "0i1 12h2 16q8 104d8 168q1 176d2 344i2",
}


@st.composite
def field_changes(draw, kind: type[nib.Nifti1Image]) -> list[tuple[int, bytes]]:
    """Up to three fields with other values, mostly small ones, in either order of bytes."""
    changes = []
    for _ in range(draw(st.integers(0, 3))):
        place, form, count = re.split("([a-z])", draw(st.sampled_from(FIELDS[kind].split())))
        least = -(2 ** (8 * struct.calcsize("=" + form) - 1))
        values = st.integers(least, -least - 1) | st.integers(-3, 100)
        values = st.floats(width=32 if form == "f" else 64) if form in "fd" else values
        piece = struct.pack(draw(st.sampled_from("<<<>")) + form, draw(values))
        changes.append((int(place) + len(piece) * draw(st.integers(0, int(count) - 1)), piece))
    return changes


@fuzz
@given(st.data(), st.sampled_from(list(FIELDS)), st.booleans(), st.integers(-50, 50))
def test_image(folder, data, kind, packed: bool, longer: int):
    raw = write_scan(folder / "scan.nii", voxels(0, shape=(4, 5, 6)), AFFINE, kind).read_bytes()
    raw = patch(raw, data.draw(field_changes(kind)) + data.draw(patches(len(raw))))
    raw = raw[:longer] if longer < 0 else raw + bytes(longer)
    if packed:
        raw = gzip.compress(raw, 1)
        raw = patch(raw, data.draw(st.just([]) | patches(len(raw))))
    file = folder / f"image.nii{'.gz' if packed else ''}"
    file.write_bytes(raw)
    grid, image = attempt(nifti.read_grid, file), attempt(nifti.read_image, file)
    if image is None:
        return
    values, again = image
    assert values.shape == grid.shape == again.shape
    assert values.dtype == np.float32
    assert np.isfinite(grid.affine).all()
    nifti.save_map(np.ones(grid.shape), grid.header, folder / "map.nii")
    back, place = nifti.read_image(folder / "map.nii")
    assert np.array_equal(back, np.ones(grid.shape))
    assert np.allclose(place.affine, grid.affine, rtol=1e-5, atol=1e-5)


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
JSON = st.recursive(
    ATOMS | st.sampled_from([0, 10**9, -1, "IG"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["fold", "0"]), inner),
    max_leaves=5,
)


def replaced(record: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """A record with one value, at any depth, replaced or gone."""
    inside = record = json.loads(json.dumps(record))
    key = data.draw(st.sampled_from(sorted(inside)))
    while isinstance(inside[key], dict) and inside[key] and data.draw(st.booleans()):
        inside = inside[key]
        key = data.draw(st.sampled_from(sorted(inside)))
    if data.draw(st.booleans()):
        del inside[key]
    else:
        inside[key] = data.draw(JSON)
    return record


FOLDING = {"fold": 2, "split": "stratified", "val_fraction": 0.5, "seed": 0}


@pytest.fixture(scope="module")
def record(folder) -> dict[str, Any]:
    """The record of a run of eight scans; its folds lie beside."""
    cohort = dataset.new_cohort(tiny_cohort(folder / "cohort", 8), 2, "stratified", 0.5, 0)
    (folder / "run").mkdir()
    storage.write_csv(cohort.folds, folder / "folds.csv")
    return cohort.identity | {"csv": str(cohort.csv), "model": "modelB2", "arguments": FOLDING | {"lr": 1e-4}}


def find(folder: Path, content: bytes, folds: bytes) -> Any:
    (folder / "run" / "run.json").write_bytes(content)
    (folder / "run" / "folds.csv").write_bytes(folds)
    found = attempt(runs.find_run, folder / "run", None, None, None)
    if found is not None:
        assert len(found.cohort.folds) == found.cohort.k * len(found.cohort.table)
    return found


@fuzz
@given(st.data())
def test_run_record_and_folds(folder, record, data):
    whole, content = (folder / "folds.csv").read_bytes(), json.dumps(record).encode()
    assert find(folder, content, whole) is not None
    find(folder, json.dumps(replaced(record, data)).encode(), whole)
    lines = whole.splitlines(keepends=True)
    order = data.draw(st.just(lines) | st.lists(st.sampled_from(lines), min_size=1, max_size=20))
    find(folder, content, patch(b"".join(order), data.draw(patches(len(b"".join(order))))))


IDENTITY, WEIGHTS = {"csv_sha256": "ab", "options": {"steps": 1}}, {"weights_sha256": "cd"}
COUNTS = {"scans_per_fold": {"0": 1}, "zero_maps_per_fold": {"0": 0}}
MAP = IDENTITY | COUNTS | {"folds": 1, "finished": [0, "summary"], "weights_sha256": {"0": "cd"}}
ROWS = ",".join(heatmap.SUBJECT_COLUMNS).encode() + b"\n0,a.nii,1,007,1,1,0.5,2.5,,0\n"


def check_maps(method: Path, record: dict[str, Any], rows: bytes) -> Any:
    """Whether heatmap.py goes on with maps of this record and these rows of subjects.csv."""
    method.mkdir(parents=True, exist_ok=True)
    (method / "map_f0.nii.gz").touch()
    (method / "map.json").write_text(json.dumps(record))
    (method / "subjects.csv").write_bytes(rows)
    attempt(brain_maps.find_maps, method.parent)
    results = ResultFolder(method, heatmap.FILES, range(1), IDENTITY, {0: WEIGHTS})
    return attempt(results.check, lambda fold: heatmap.check_subjects(method, fold))


@fuzz
@given(st.data())
def test_map_record_and_subjects(folder, data):
    assert check_maps(folder / "maps" / "IG", MAP, ROWS)
    check_maps(folder / "maps" / "IG", replaced(MAP, data), patch(ROWS, data.draw(patches(len(ROWS)))))


@fuzz
@given(st.data(), st.booleans())
def test_checkpoint(folder, data, zipped: bool):
    model = models.build_model("modelB1", (94, 94, 94))
    whole = folder / f"whole-{zipped}.pth"
    if not whole.exists():
        torch.save(model.state_dict(), whole, _use_new_zipfile_serialization=zipped)
    raw = whole.read_bytes()
    start = data.draw(st.sampled_from([0, len(raw) // 2, len(raw) - 3000]))  # pickle, numbers, zip's index
    raw = raw[:start] + patch(raw[start:], data.draw(patches(min(3000, len(raw) - start))))
    raw = raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))]
    file = folder / "spoilt.pth"
    file.write_bytes(raw)
    if attempt(checkpoints.load_weights, model, file, torch.device("cpu")):
        assert all(torch.isfinite(values).all() for values in model.state_dict().values())
