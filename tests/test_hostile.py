"""Files made to hurt, through the real commands: refused in one line, soon, within memory, nothing written.

`pytest -rP tests/test_hostile.py` shows seconds, peak memory and message of each.
"""

import gzip
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cohorts import MODEL, SHAPE, only_error, tiny_cohort, voxels, write_csv, write_scan

import dataset
import models
import utils
from internals import storage

SUITE = Path(utils.__file__).parent
SECONDS, MEGABYTES = 30, 1000
# Small, so that the peak is the command's own: a process starts with its parent's. The alarm ends a hang.
LAUNCH = f"""
import json, os, signal, sys
child = os.fork()
if not child:
    signal.alarm({SECONDS})
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
_, status, usage = os.wait4(child, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1000]))
"""


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refused(folder: Path, script: str, *options: object) -> str:
    """Run a command in a folder, print what it took, and return its message."""
    before = listing(folder)
    command = [sys.executable, "-S", "-c", LAUNCH, SUITE / script, *options]
    begin = os.times().elapsed
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
    seconds = os.times().elapsed - begin
    status, megabytes = json.loads(done.stdout.splitlines()[-1])
    print(f"{script:11} {seconds:5.1f} s {megabytes:5.0f} MB  {done.stderr.strip()[:160]}")
    assert status == 2, done.stderr
    assert megabytes < MEGABYTES
    assert listing(folder) == before
    return only_error(done.stderr)


def train(folder: Path, *scans: Path | str) -> str:
    """What train_cv.py says of a CSV of two fine scans and others."""
    rows = [(scan, i % 2) for i, scan in enumerate([*FINE, *scans])]
    return refused(folder, "train_cv.py", "--path", write_csv(folder / "data.csv", rows), *FEW)


FEW = ["--fold", 2, "--val-fraction", 0.5]
FINE = [f"fine/{i}.nii" for i in range(12)]


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_cohort(tmp_path / "fine", len(FINE))
    return tmp_path


def set_header(path: Path, *fields: tuple[int, str, list]) -> Path:
    """A tiny scan with some fields of its header overwritten; packed where its name says so."""
    raw = bytearray(write_scan(path.with_suffix(".tmp.nii"), voxels(0, shape=(5, 6, 7))).read_bytes())
    path.with_suffix(".tmp.nii").unlink()
    for offset, form, values in fields:
        struct.pack_into(form, raw, offset, *values)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def set_shape(path: Path, *shape: int) -> Path:
    return set_header(path, (40, "<4h", [3, *shape]))


def zeros(count: int) -> bytes:
    """Zero bytes packed with gzip, a thousandth of their number; a piece at a time, as members."""
    return gzip.compress(bytes(2**26)) * (count // 2**26)


# Scans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["huge.nii", "huge.nii.gz"])
def test_header_of_30000_cubed(folder, name):
    set_shape(folder / name, 30000, 30000, 30000)
    assert f"{name}: claims 30000x30000x30000 voxels" in train(folder, name)


def test_bomb_beyond_its_header(folder):
    scan = set_header(folder / "bomb.nii.gz")
    scan.write_bytes(scan.read_bytes() + zeros(2**35))  # 32 GiB
    csv = write_csv(folder / "data.csv", [(name, i % 2) for i, name in enumerate([*FINE, scan.name])])
    message = refused(folder, "svm.py", "--path", csv, *FEW)
    assert "bomb.nii.gz: unpacks to more than its header declares" in message


def test_bombs_of_the_largest_size_that_is_read(folder):
    """As many voxels of eight bytes as an image may have, all zero; two are decoded at once."""
    fields = (40, "<4h", [3, 700, 1000, 100]), (70, "<2h", [64, 64])
    head = set_header(folder / "raw.nii", *fields).read_bytes()[:352] + bytes(1000)
    (folder / "raw.nii").unlink()
    content = gzip.compress(bytes(10**7 - 1000)) + gzip.compress(bytes(10**7)) * 55
    for i in range(12):  # the others, which fail at once, are there to be folded
        (folder / f"{i}.nii.gz").write_bytes(gzip.compress(head) + b"!" * (i > 1) + content)
    csv = write_csv(folder / "data.csv", [(f"{i}.nii.gz", i % 2) for i in range(12)])
    message = refused(folder, "train_cv.py", "--path", csv, *FEW, "--model", "modelB1")
    assert (
        "12 of 12 scans cannot be used: 0.nii.gz: is constant (every voxel is 0); 1.nii.gz: is constant"
        in message
    )


def test_headers_that_are_no_numbers(folder):
    set_header(folder / "nan.nii", (108, "<f", [np.nan]))
    set_header(folder / "before.nii", (108, "<f", [-352]))
    set_header(folder / "negative.nii.gz", (40, "<4h", [3, -5, -6, 7]))
    set_header(folder / "affine.nii", (280, "<f", [np.inf]))
    set_header(folder / "e\x1b[31m.nii", (70, "<h", [32]))
    os.mkfifo(folder / "pipe.nii")
    names = ["nan.nii", "before.nii", "negative.nii.gz", "affine.nii", "pipe.nii", "x" * 9000 + ".nii"]
    message = train(folder, *names, "e\x1b[31m.nii", "$(touch ran).nii", "{0.__class__}.nii", "/dev/zero")
    words = ["(-5, -6, 7)", "byte nan", "byte -352", "affine", "pipe", "too long", "..."]
    assert all(word in message for word in words[:5])
    assert "\x1b" not in message


# CSVs --------------------------------------------------------------------------------------------


def ten_million_lines(csv: Path) -> None:
    csv.write_bytes(b"a.nii,0\n" * 10**7)


def field_of_1_gb(csv: Path) -> None:
    csv.write_bytes(b"path,label\n")
    os.truncate(csv, 10**9)


def field_of_30_mb(csv: Path) -> None:
    csv.write_bytes(b'"' + b"a" * 30_000_000 + b'",0\n')


def thirty_million_cells(csv: Path) -> None:
    names, rest = b"".join(b",%d" % i for i in range(8000)), b"," * 8000
    rows = (b"%d.nii,%d%b\n" % (i, i % 2, rest) for i in range(3750))
    csv.write_bytes(b"path,label" + names + b"\n" + b"".join(rows))


def most_rows(csv: Path) -> None:
    csv.write_bytes(b"".join(b"%050d.nii,%d\n" % (i, i % 2) for i in range(dataset.MOST_ROWS)))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (ten_million_lines, "is larger than 32 MiB"),
        (field_of_1_gb, "is larger than 32 MiB"),
        (field_of_30_mb, "line 1 has more than"),
        (thirty_million_cells, "3750 of 3750 scans cannot be used"),
        (most_rows, "200000 of 200000 scans cannot be used"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_csv(tmp_path, write: Callable[[Path], None], words):
    write(tmp_path / "data.csv")
    assert words in refused(tmp_path, "train_cv.py", "--path", tmp_path / "data.csv", "--model", "modelB1")
    (tmp_path / "data.csv").unlink()


# Runs and checkpoints ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder as train_cv.py leaves it, under models; its weights are random."""
    folder = tmp_path_factory.mktemp("run")
    csv = tiny_cohort(folder, 8, SHAPE)
    table = dataset.read_csv(csv)
    grid = dataset.check_grid(table)
    arguments = {"fold": 2, "split": "stratified", "val_fraction": 0.5, "seed": 0}
    (folder / "models").mkdir()
    storage.write_csv(dataset.make_folds(table, 2, "stratified", 0.5, 0), folder / "models" / "folds.csv")
    record = {"csv": str(csv), "csv_sha256": storage.sha256(csv), "model": MODEL, "grid": grid.record()}
    storage.write_json(record | {"seed": 0, "arguments": arguments}, folder / "models" / "run.json")
    for fold in range(2):
        torch.save(
            models.build_model(MODEL, SHAPE).state_dict(), folder / "models" / f"state_dict_f{fold}.pth"
        )
    return folder


def explain(folder: Path, run: Path) -> str:
    """What heatmap.py says of a run."""
    return refused(folder, "heatmap.py", "--method", "LRP", "--modelpath", run, "--device", "cpu")


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The run's records and weights, to be spoilt."""
    (tmp_path / "models").mkdir()
    for file in (run / "models").iterdir():
        (tmp_path / "models" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "models"


def test_run_of_many_folds(copy, tmp_path):
    record = json.loads((copy / "run.json").read_text())
    record["arguments"]["fold"] = 10**9
    (copy / "run.json").write_text(json.dumps(record))
    assert "run.json: is damaged: 1000000000 folds of 8 scans" in explain(tmp_path, copy)


class Payload:
    """Unpickling runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


class Large:
    """Unpickling asks for a tenth of a terabyte, by a name that weights_only allows."""

    def __reduce__(self):
        return bytearray, (10**11,)


@pytest.mark.parametrize(("kind", "zipped"), [("code", True), ("code", False), ("memory", True)])
def test_checkpoint_that_asks_for_more(copy, tmp_path, kind, zipped):
    checkpoint, marker = copy / "state_dict_f0.pth", tmp_path / "ran"
    state = torch.load(checkpoint, weights_only=True)
    asked = Payload(marker) if kind == "code" else Large()
    torch.save({**state, "more": asked}, checkpoint, _use_new_zipfile_serialization=zipped)
    message = explain(tmp_path, copy)
    assert "state_dict_f0.pth: not a PyTorch state dict of plain tensors: it asks for" in message
    assert not marker.exists()
    if kind == "code":  # the payload is live: it runs where it is let
        torch.load(checkpoint, weights_only=False)
        assert marker.exists()


def test_checkpoint_that_unpacks_to_more(copy, tmp_path):
    with zipfile.ZipFile(copy / "state_dict_f0.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more", bytes(2**28))
    assert "unpacks to" in explain(tmp_path, copy)


# Masks and references ----------------------------------------------------------------------------


def test_mask(run, tmp_path):
    mask = set_shape(tmp_path / "mask.nii.gz", 30000, 30000, 30000)
    message = refused(tmp_path, "svm.py", "--modelpath", run / "models", "--mask", mask)
    assert f"--mask {mask}: claims 30000x30000x30000" in message


def test_reference(tmp_path):
    scan = write_scan(tmp_path / "maps" / "IG" / "map_all.nii.gz", voxels(0, shape=(5, 6, 7)))
    (scan.parent / "mean_scan.nii.gz").write_bytes(scan.read_bytes())
    bomb = tmp_path / "bomb.nii.gz"
    bomb.write_bytes(scan.read_bytes() + zeros(2**35))
    message = refused(tmp_path, "overlap.py", "--maps", "maps", "--reference", bomb)
    assert f"{bomb}: unpacks to more" in message
