"""Files made to hurt, through the commands: refused in one line, soon, within memory, nothing written.

`pytest -rP tests/test_hostile.py` shows seconds, memory and message of each.
"""

import gzip
import os
import resource
import signal
import struct
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

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


@pytest.mark.parametrize("given", ["--path", "--mask", "--reference"])
def test_image(folder, run, given):
    """A header that claims 27 terabytes, and 32 GiB of zeros, packed, behind what a header declares."""
    if given == "--reference":
        file, words = set_header(folder / "bomb.nii.gz"), "unpacks to more than its header declares"
        file.write_bytes(file.read_bytes() + gzip.compress(bytes(2**26)) * 2**9)
    else:
        file = set_header(folder / "huge.nii.gz", (40, "<4h", [3, 30000, 30000, 30000]))
        words = "claims 30000x30000x30000 vox"
    for other in ("map_all.nii.gz", "mean_scan.nii.gz"):
        set_header(folder / "maps" / "IG" / other)
    command, options = {
        "--path": (train_cv, list_scans(folder, file.name)),
        "--mask": (svm, ["--mask", file.name, "--modelpath", run]),
        "--reference": (overlap, ["--reference", file.name, "--maps", "maps"]),
    }[given]
    assert f"{file.name}: {words}" in refused(folder, command, *options, whole=given == "--path")


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


def test_names(folder):
    set_header(folder / "e\x1b[31m.nii", (70, "<h", [32]))
    os.mkfifo(folder / "pipe.nii")
    names = ["pipe.nii", "e\x1b[31m.nii", "$(touch ran).nii", "{0.__class__}.nii", "/dev/zero"]
    message = refused(folder, train_cv, *list_scans(folder, *names, "x" * 9000 + ".nii"))
    words = ["6 of 18", "pipe", "complex64", "$(touch ran).nii: no such", "{0.__class__}.nii: no such"]
    assert [word for word in [*words, "/dev/zero: not a NIfTI", "..."] if word not in message] == []
    assert "\x1b" not in message


def many_cells() -> bytes:
    rows = (b"%d.nii,%d%b\n" % (i, i % 2, b"," * 8000) for i in range(3750))
    return b"path,label%b\n" % b"".join(b",%d" % i for i in range(8000)) + b"".join(rows)


@pytest.mark.parametrize(
    ("content", "size", "words"),
    [
        (lambda: b"", 10**9, "is larger than 32 MiB"),
        (lambda: b'"%b",0\n' % (b"a" * 30_000_000), 0, "line 1 has more than 65536 characters"),
        (many_cells, 0, "3750 of 3750 scans cannot be used"),
        (lambda: b"".join(b"%050d.nii,%d\n" % (i, i % 2) for i in range(dataset.MOST_ROWS)), 0,
         "200000 of 200000 scans cannot be used"),
    ],
    ids=["1 GB", "field of 30 MB", "thirty million cells", "most rows"],
)  # fmt: skip
def test_csv(folder, content, size, words):
    (folder / "data.csv").write_bytes(content())
    if size:
        os.truncate(folder / "data.csv", size)
    assert words in refused(folder, train_cv, "--path", "data.csv", "--model", "modelB1")


class Payload:
    """Unpickling calls a function: os.system, or one that weights_only allows, for a tenth of a terabyte."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_checkpoint_that_asks_for_more(run_copy, tmp_path):
    checkpoint, marker = run_copy / "state_dict_f0.pth", tmp_path / "ran"
    state = torch.load(checkpoint, weights_only=True)
    call = tmp_path, heatmap, "--method", "LRP", "--modelpath", run_copy
    for payload in (Payload(bytearray, 10**11), Payload(os.system, f"touch '{marker}'")):
        torch.save({**state, "more": payload}, checkpoint)
        message = refused(*call, whole=payload.call[0] is os.system)
        assert "state_dict_f0.pth: not a PyTorch state dict of plain tensors: it asks for" in message
        assert not marker.exists()
    torch.load(checkpoint, weights_only=False)  # the payload is live: it runs where it is let
    assert marker.exists()
    torch.save(state, checkpoint)
    with zipfile.ZipFile(checkpoint, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more", bytes(2**28))
    assert "unpacks to" in refused(*call)
