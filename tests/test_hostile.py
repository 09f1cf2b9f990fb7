"""Files made to hurt, through the commands: refused in one line, soon, within memory, nothing written.

`pytest -rP tests/test_hostile.py` shows seconds, memory and message of each.
"""

import gzip
import os
import resource
import shutil
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from cohorts import only_error, tiny_cohort, voxels, write_csv, write_scan

import dataset
import heatmap
import overlap
import svm
import train_cv

SECONDS, MEGABYTES = 60, 700  # beyond what this process holds already; 60 s as others may use the processor
FINE = [f"fine/{i}.nii" for i in range(12)]


def memory() -> list[int]:
    """Bytes of addresses and of memory that this process has, and of the latter what a fork leaves out."""
    pages = Path("/proc/self/statm").read_text().split()[:3]
    return [int(count) * resource.getpagesize() for count in pages]


def become(command: ModuleType, whole: bool, options: list[str]) -> None:
    """Turn a forked process into a command with little time and memory: Python anew, or main alone."""
    signal.alarm(SECONDS)
    room = memory()[0] + 2 * MEGABYTES * 10**6  # some addresses are reserved and never used
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    if whole:
        os.execv(sys.executable, [sys.executable, str(command.__file__), *options])
    torch.set_num_threads(1)  # the threads of its parent are not there
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    os._exit(command.main(options))


def refused(folder: Path, command: ModuleType, *options: object, whole: bool = False) -> str:
    """Run a command in a folder, print what it took, and return its message."""
    before, said = set(folder.rglob("*")), folder.with_name(f"{folder.name}.stderr")
    options += ("--device", "cpu") if command in (train_cv, heatmap) else ()  # a fork cannot use the parent's
    begin, (_, held, shared) = time.perf_counter(), memory()
    child = os.fork()
    if not child:
        try:
            os.chdir(folder)
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            become(command, whole, [str(option) for option in options])
        finally:
            os._exit(99)
    _, status, usage = os.wait4(child, 0)
    seconds, megabytes = time.perf_counter() - begin, (1024 * usage.ru_maxrss - held + shared) / 10**6
    message = said.read_text()
    name = f"{command.__name__}{', whole' * whole}"
    print(f"{name:15} {seconds:5.1f} s {megabytes:5.0f} MB  {message.strip()[:160]}")
    assert os.waitstatus_to_exitcode(status) == 2, message
    assert megabytes < MEGABYTES
    assert set(folder.rglob("*")) == before
    return only_error(message)


def list_scans(folder: Path, *scans: str, fine: list[str] = FINE) -> list[object]:
    """List fine scans and others in a CSV; returns the options that name it."""
    rows = [(scan, i % 2) for i, scan in enumerate([*fine, *scans])]
    return ["--path", write_csv(folder / "data.csv", rows), "--fold", 2, "--val-fraction", 0.5]


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_cohort(tmp_path / "here" / "fine", len(FINE))
    return tmp_path / "here"


def set_header(path: Path, *fields: tuple[int, str, list]) -> Path:
    """A tiny scan with some fields of its header overwritten; packed where its name says so."""
    raw = bytearray(write_scan(path.with_suffix(".tmp.nii"), voxels(0, shape=(5, 6, 7))).read_bytes())
    path.with_suffix(".tmp.nii").unlink()
    for offset, form, values in fields:
        struct.pack_into(form, raw, offset, *values)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


# Images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "command", "option", "whole"),
    [
        ("huge.nii", train_cv, "--path", False),
        ("huge.nii.gz", train_cv, "--path", True),
        ("huge.nii.gz", svm, "--mask", False),
        ("bomb.nii.gz", svm, "--path", True),
        ("bomb.nii.gz", overlap, "--reference", False),
    ],
)
def test_image(folder, run, name, command, option, whole):
    """A header that claims 27 terabytes, and 32 GiB of zeros, packed, behind what a header declares."""
    file = set_header(folder / name, *[(40, "<4h", [3, 30000, 30000, 30000])] * (name != "bomb.nii.gz"))
    if name == "bomb.nii.gz":
        file.write_bytes(file.read_bytes() + gzip.compress(bytes(2**26)) * 2**9)
    for other in ("map_all.nii.gz", "mean_scan.nii.gz"):
        set_header(folder / "maps" / "IG" / other)
    inputs = {"--path": [], "--mask": ["--modelpath", run], "--reference": ["--maps", "maps"]}
    options = list_scans(folder, name) if option == "--path" else [option, name, *inputs[option]]
    message = refused(folder, command, *options, whole=whole)
    words = "unpacks to more than its header declares" if "bomb" in name else "claims 30000x30000x30000 vox"
    assert f"{name}: {words}" in message


def test_bombs_of_the_largest_size_that_is_read(folder):
    """As many voxels of eight bytes as an image may have, all zero; two are decoded at once."""
    fields = (40, "<4h", [3, 700, 1000, 100]), (70, "<2h", [64, 64])
    head = set_header(folder / "raw.nii", *fields).read_bytes()[:352] + bytes(1000)
    (folder / "raw.nii").unlink()
    content = gzip.compress(bytes(10**7 - 1000)) + gzip.compress(bytes(10**7)) * 55
    for i in range(12):  # the others, which fail at once, are there to be folded
        (folder / f"{i}.nii.gz").write_bytes(gzip.compress(head) + b"!" * (i > 1) + content)
    options = list_scans(folder, *(f"{i}.nii.gz" for i in range(12)), fine=[])
    message = refused(folder, train_cv, *options, "--model", "modelB1", "--cache", "none")
    words = "0.nii.gz: is constant (every voxel is 0); 1.nii.gz: is constant"
    assert f"12 of 12 scans cannot be used: {words}" in message


def test_headers_that_are_no_numbers(folder):
    set_header(folder / "nan.nii", (108, "<f", [np.nan]))
    set_header(folder / "before.nii", (108, "<f", [-352]))
    set_header(folder / "negative.nii.gz", (40, "<4h", [3, -5, -6, 7]))
    set_header(folder / "affine.nii", (280, "<f", [np.inf]))
    set_header(folder / "e\x1b[31m.nii", (70, "<h", [32]))
    os.mkfifo(folder / "pipe.nii")
    names = ["nan.nii", "before.nii", "negative.nii.gz", "affine.nii", "pipe.nii", "e\x1b[31m.nii"]
    names += ["$(touch ran).nii", "{0.__class__}.nii", "/dev/zero", "x" * 9000 + ".nii"]
    message = refused(folder, train_cv, *list_scans(folder, *names))
    words = ["10 of 22", "byte nan", "byte -352", "(-5, -6, 7)", "affine", "pipe", "complex64", "..."]
    words += ["$(touch ran).nii: no such", "{0.__class__}.nii: no such", "/dev/zero: not a NIfTI"]
    assert [word for word in words if word not in message] == []
    assert "\x1b" not in message


# CSVs --------------------------------------------------------------------------------------------


CELLS = b"".join(b",%d" % i for i in range(8000))
CSVS: dict[str, tuple[Callable[[Path], object], str]] = {
    "ten million lines": (lambda csv: csv.write_bytes(b"a.nii,0\n" * 10**7), "is larger than 32 MiB"),
    "1 GB": (lambda csv: (csv.touch(), os.truncate(csv, 10**9)), "is larger than 32 MiB"),
    "field of 30 MB": (
        lambda csv: csv.write_bytes(b'"' + b"a" * 30_000_000 + b'",0\n'),
        "line 1 has more than 65536 characters",
    ),
    "thirty million cells": (
        lambda csv: csv.write_bytes(
            b"path,label%b\n" % CELLS
            + b"".join(b"%d.nii,%d%b\n" % (i, i % 2, b"," * 8000) for i in range(3750))
        ),
        "3750 of 3750 scans cannot be used",
    ),
    "most rows": (
        lambda csv: csv.write_bytes(
            b"".join(b"%050d.nii,%d\n" % (i, i % 2) for i in range(dataset.MOST_ROWS))
        ),
        "200000 of 200000 scans cannot be used",
    ),
}


@pytest.mark.parametrize("name", CSVS)
def test_csv(folder, name):
    write, words = CSVS[name]
    write(folder / "data.csv")
    assert words in refused(folder, train_cv, "--path", "data.csv", "--model", "modelB1")


# Checkpoints -------------------------------------------------------------------------------------


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A finished run, to be spoilt."""
    return Path(shutil.copytree(run, tmp_path / "here" / "models"))


def explain(models: Path, whole: bool = False) -> str:
    """What heatmap.py says of a run."""
    return refused(models.parent, heatmap, "--method", "LRP", whole=whole)


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
    message = explain(copy, whole=kind == "code" and zipped)
    assert "state_dict_f0.pth: not a PyTorch state dict of plain tensors: it asks for" in message
    assert not marker.exists()
    if kind == "code":  # the payload is live: it runs where it is let
        torch.load(checkpoint, weights_only=False)
        assert marker.exists()


def test_checkpoint_that_unpacks_to_more(copy):
    with zipfile.ZipFile(copy / "state_dict_f0.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more", bytes(2**28))
    assert "unpacks to" in explain(copy)
