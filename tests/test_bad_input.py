"""Malformed inputs of the commands, each with the words of the one line it gets; and odd ones that are fine.

    .venv/bin/python -m pytest -rP tests/test_bad_input.py

prints every input with its message.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from cohorts import AFFINE, LABELS, MODEL, OBLIQUE, SHAPE, only_error, voxels, white, write_cohort, write_scan

import dataset
import heatmap
import models
import overlap
import svm
import train_cv
import utils
from internals import storage

COMMANDS: dict[str, ModuleType] = {m.__name__: m for m in (train_cv, heatmap, svm, overlap)}
TRAIN = f"--path data.csv --model {MODEL} --device cpu --fold 2 --val-fraction 0.34 --epochs 1 --workers 0"
COMPARE = "--maps heatmaps --reference truth.nii --mask mask.nii --smooth 0 --rank-smooth 0"
GOOD = {  # arguments that work in the good folder
    "train_cv": f"{TRAIN} --outpath out",
    "heatmap": "--method LRP --path data.csv --modelpath models --device cpu --outpath out",
    "svm": "--path data.csv --modelpath models --outpath out",
    "overlap": f"{COMPARE} --outpath out",
}
VICTIM = "scans/003.nii"  # row 5 of data.csv
CHECKPOINT = "models/state_dict_f1.pth"
SMALL = (12, 13, 14)  # grid of the maps that are compared
BEYOND = torch.cuda.device_count()  # the first GPU that is not there
NO_MPS = not torch.backends.mps.is_available()

Spoil = Callable[[], object]


class Row(NamedTuple):
    """A malformed input."""

    name: str
    command: str
    spoil: Spoil  # changes files of the good folder, which is the working folder
    words: list[str]  # in the message, capital or not
    options: str = ""  # after the good ones
    argv: str | None = None  # in place of all others
    unprivileged: bool = False  # in a process that file permissions bind


# How files are spoilt ------------------------------------------------------------------------------


def nothing() -> None:
    """All files are fine."""


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""
    return lambda: [spoil() for spoil in spoils]


def remove(path: str) -> Spoil:
    """Remove a file."""
    return lambda: Path(path).unlink()


def write(path: str, content: str | bytes) -> Spoil:
    """Write a file, in place of what is there: never into it, as files are links to the good ones."""

    def spoil() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).unlink(missing_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def rewrite(path: str, change: Callable[[bytes], bytes]) -> Spoil:
    """Change a file's content."""
    return lambda: write(path, change(Path(path).read_bytes()))()


def folder(path: str) -> Spoil:
    """A folder where a file was."""
    return lambda: (Path(path).unlink(missing_ok=True), Path(path).mkdir(parents=True))


def forbid(path: str) -> Spoil:
    """A file of the same content that may not be read."""
    return both(rewrite(path, bytes), lambda: Path(path).chmod(0))


def image(path: str, values: np.ndarray, affine: np.ndarray = AFFINE) -> Spoil:
    """Another image."""
    return lambda: (Path(path).unlink(missing_ok=True), write_scan(Path(path), values, affine))


def header(path: str, start: int, layout: str, *values: float) -> Spoil:
    """Other values in a NIfTI header, from a byte on."""
    fields = struct.pack(f"<{layout}", *values)
    return rewrite(path, lambda raw: raw[:start] + fields + raw[start + len(fields) :])


def singular(path: str) -> Spoil:
    """An affine whose first row is zero: srow_x, the qform switched off."""
    return both(header(path, 252, "h", 0), header(path, 280, "4f", 0, 0, 0, 0))


def row(number: int, text: str) -> Spoil:
    """Another row in data.csv, numbered as messages number them."""

    def change(raw: bytes) -> bytes:
        lines = raw.decode().splitlines()
        lines[number - 1] = text
        return "\n".join([*lines, ""]).encode()

    return rewrite("data.csv", change)


def csv(content: str | bytes) -> Spoil:
    """Another data.csv."""
    return write("data.csv", content)


def listed(rows: list[tuple[object, ...]]) -> str:
    """Rows of a CSV as text."""
    return "".join(",".join(map(str, cells)) + "\n" for cells in rows)


def scan_as(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    """One scan under another name, its bytes changed."""
    file = f"scans/{name}"
    return both(
        lambda: write(file, change(Path(VICTIM).read_bytes()))(),
        rewrite("data.csv", lambda raw: raw.replace(VICTIM.encode(), file.encode())),
    )


def record(path: str, **changes: object) -> Spoil:
    """Other values in a JSON record; those of inner dicts are merged into them."""

    def change(raw: bytes) -> bytes:
        found = json.loads(raw)
        for key, value in changes.items():
            found[key] = found[key] | value if isinstance(value, dict) else value
        return (json.dumps(found, indent=2) + "\n").encode()  # as the commands write it

    return rewrite(path, change)


def folds(pattern: str, replacement: str) -> Spoil:
    """Other rows in the run's folds.csv."""
    pair = pattern.encode(), replacement.encode()
    return rewrite("models/folds.csv", lambda raw: re.sub(*pair, raw, flags=re.MULTILINE))


def checkpoint(content: object) -> Spoil:
    """Something else in the checkpoint; a function is given its state dict."""

    def spoil() -> None:
        stream = io.BytesIO()
        state = torch.load(CHECKPOINT, weights_only=True)
        torch.save(content(state) if callable(content) else content, stream)
        write(CHECKPOINT, stream.getvalue())()

    return spoil


def weights_of(name: str, shape: tuple[int, int, int] = SHAPE) -> Callable[[object], object]:
    """The weights of another network."""
    return lambda _: models.build_model(name, shape).state_dict()


def with_value(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    """One weight replaced."""

    def change(state: dict[str, torch.Tensor]) -> object:
        state[key].view(-1)[-1] = value
        return state

    return change


# The inputs --------------------------------------------------------------------------------------

VALUES = voxels(3)
REAL = VALUES.astype(np.float32)
RGB = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
BLOCK = np.zeros(SMALL, np.uint8)
BLOCK[4:7, 5:9, 2:6] = 1
PLAIN = [(f"scans/{i:03d}.nii", label) for i, label in enumerate(LABELS)]
HERE = ["data.csv"]
LOST = "scans/nowhere.nii"


def one_voxel(value: float) -> np.ndarray:
    """A scan with one voxel of another value."""
    values = REAL.copy()
    values[9, 9, 9] = value
    return values


CSVS = [
    Row(f"CSV: {name}", "train_cv", spoil, [*HERE, *words])
    for name, spoil, words in [
        ("missing", remove("data.csv"), ["no such CSV"]),
        ("a folder", folder("data.csv"), ["is a folder", "expected a CSV"]),
        ("empty", csv(""), ["no scans"]),
        ("blank lines only", csv("\n\n\n"), ["no scans"]),
        ("header only", csv("path,label,subject\n"), ["no scans"]),
        ("binary", csv(bytes(range(256)) * 20), ["cannot be read"]),
        ("a NIfTI file", lambda: csv(Path(VICTIM).read_bytes())(), ["cannot be read"]),
        ("not UTF-8", csv("café.nii,0\n".encode("latin-1")), ["cannot be read", "utf-8"]),
        ("UTF-16", csv(listed(PLAIN).encode("utf-16")), ["cannot be read", "utf-8"]),
        ("one column", csv("".join(f"{path}\n" for path, _ in PLAIN)), ["two columns", "found 1"]),
        ("semicolons", csv(listed(PLAIN).replace(",", ";")), ["two columns", "found 1"]),
        ("tabs", csv(listed(PLAIN).replace(",", "\t")), ["two columns", "found 1"]),
        ("three columns, no header", csv(listed([(*r, 7) for r in PLAIN])), ["two columns", "found 3"]),
        ("header without label", row(1, "path,diagnosis,subject"), ["header", "'label'"]),
        ("header without path", row(1, "file,label,subject"), ["header", "'path'"]),
        ("header with two labels", row(1, "path,label,label"), ["header", "once"]),
        ("row of four cells among three", row(5, f"{VICTIM},0,0003,x"), ["row 5", "4 cells", "expected 3"]),
        ("row of two cells among three", row(5, f"{VICTIM},0"), ["row 5", "subject is blank"]),
        ("blank path", row(5, ",0,0003"), ["row 5", "path is blank"]),
        ("blank label", row(5, f"{VICTIM}, ,0003"), ["row 5", "label is blank"]),
        ("blank subject", row(5, f"{VICTIM},0,"), ["row 5", "subject is blank"]),
        *(
            (f"label {label}", row(5, f"{VICTIM},{label},0003"), ["row 5", f"'{label}'", "not 0 or 1"])
            for label in ("2", "-1", "AD", "0.5", "NaN", "1.0", "inf", "True")
        ),
        ("header in words of its own", csv("scan,group\n" + listed(PLAIN)), ["row 1", "'group'", "0 or 1"]),
        ("quote that stays open", row(5, f'"{VICTIM},0,0003'), ["cannot be read"]),
        ("path listed twice", row(5, "scans/000.nii,0,0003"), ["row 5", "scans/000.nii", "twice"]),
        ("one file by two paths", row(5, "scans/../scans/000.nii,0,0003"), ["row 5", "twice"]),
        (
            "one file by relative and absolute path",
            lambda: row(5, f"{Path('scans/000.nii').absolute()},0,0003")(),
            ["row 5", "scans/000.nii", "twice"],
        ),
        ("home of no user", row(5, "~no-such-user/003.nii,0,0003"), ["row 5", "~no-such-user"]),
    ]
]
CSVS += [
    Row("CSV: single quotes", "train_cv", row(5, f"'{VICTIM}',0,x"), ["1 of 12", f"'{VICTIM}': not a"]),
    Row("CSV: absolute path of nothing", "train_cv", row(5, "/no/003.nii,0,x"), ["/no/003.nii: no such"]),
    Row("CSV: relative path of nothing", "train_cv", row(5, "../003.nii,0,x"), ["../003.nii: no such"]),
    Row("CSV: home path of nothing", "train_cv", row(5, "~/no/003.nii,0,x"), ["~/no/003.nii: no such"]),
    Row(
        "CSV: one class only",
        "train_cv",
        csv(listed([(path, 0) for path, _ in PLAIN])),
        ["12 of label 0", "0 of label 1"],
    ),
    Row("CSV: fewer patients than folds", "train_cv", nothing, ["7 stratified folds", "6 of"], "--fold 7"),
    Row("CSV: fewer scans than folds", "train_cv", nothing, ["99", "folds", "label"], "--fold 99"),
    Row(
        "CSV: controls only where their subject is a patient, too",
        "train_cv",
        csv("path,label,subject\n" + listed([(*cells, f"s{i // 2}") for i, cells in enumerate(PLAIN)])),
        ["of label 0", "of label 1"],
        "--fold 3",
    ),
    Row(
        "CSV: block boundary cuts a subject",
        "train_cv",
        nothing,
        ["--split contiguous", "subject 007"],
        "--split contiguous",
    ),
    Row("CSV: compressed", "train_cv", write("list.csv.gz", gzip.compress(listed(PLAIN).encode())),
        ["list.csv.gz", "cannot be read"], "--path list.csv.gz"),
    Row("CSV: not the run's", "heatmap", row(5, f"{VICTIM},1,0003"), [*HERE, "changed"]),
    Row("CSV: missing, of a run", "heatmap", remove("data.csv"), [*HERE, "no such CSV"]),
    Row("CSV: the recorded one is gone", "heatmap", record("models/run.json", csv="/gone/list.csv"),
        ["/gone/list.csv", "no such CSV"], argv="--method LRP"),
    Row("CSV: label 2, published weights", "heatmap",
        both(remove("models/run.json"), row(5, f"{VICTIM},2,x")), ["row 5", "'2'"], f"--model {MODEL}"),
    Row("CSV: not the run's", "svm", row(5, f"{VICTIM},1,0003"), [*HERE, "changed"]),
    Row("CSV: missing, without a run", "svm", remove("data.csv"), [*HERE, "no such CSV"], "--modelpath none"),
    Row("CSV: one class only, without a run", "svm", csv(listed([(path, 1) for path, _ in PLAIN])),
        ["0 of label 0", "12 of label 1"], "--modelpath none"),
]  # fmt: skip

SCANS = [
    Row(f"scan: {name}", "train_cv", spoil, ["1 of 12", VICTIM, *words])
    for name, spoil, words in [
        ("missing", remove(VICTIM), ["no such file"]),
        (
            "link to nothing",
            lambda: (Path(VICTIM).unlink(), Path(VICTIM).symlink_to("gone")),
            ["no such file"],
        ),
        ("a folder", folder(VICTIM), ["folder"]),
        ("empty", write(VICTIM, ""), ["no NIfTI header"]),
        ("text", write(VICTIM, "no image " * 100), ["NIfTI"]),
        ("header cut short", rewrite(VICTIM, lambda raw: raw[:200]), ["no NIfTI header"]),
        ("header alone", rewrite(VICTIM, lambda raw: raw[:352]), ["94x95x96", "holds 352"]),
        ("voxels cut short", rewrite(VICTIM, lambda raw: raw[:-1000]), ["94x95x96", "holds"]),
        ("compressed, called .nii", rewrite(VICTIM, gzip.compress), ["packed with gzip"]),
        ("unknown voxel type", header(VICTIM, 70, "h", 9999), ["9999"]),
        ("voxels that begin beyond the file", header(VICTIM, 108, "f", 1e7), ["claims", "holds"]),
        ("2D", image(VICTIM, VALUES[..., 0]), ["3D", "(94, 95)"]),
        ("4D, two volumes", image(VICTIM, np.stack([VALUES, VALUES], -1)), ["3D", "(94, 95, 96, 2)"]),
        ("complex voxels", image(VICTIM, VALUES.astype(np.complex64)), ["real", "complex64"]),
        ("RGB voxels", image(VICTIM, RGB), ["real"]),
        ("NaN", image(VICTIM, one_voxel(np.nan)), ["NaN"]),
        ("infinity", image(VICTIM, one_voxel(np.inf)), ["infinite"]),
        ("minus infinity", image(VICTIM, one_voxel(-np.inf)), ["infinite"]),
        ("all NaN", image(VICTIM, np.full(SHAPE, np.nan, np.float32)), ["NaN"]),
        ("infinity added by its header", header(VICTIM, 112, "2f", 1, np.inf), []),
        ("constant", image(VICTIM, np.full(SHAPE, 7, np.int16)), ["constant", "7"]),
        ("all zero", image(VICTIM, 0 * VALUES), ["constant", "0"]),
        ("a range beyond float32", image(VICTIM, np.where(VALUES > 500, 3e38, -3e38)), ["float32"]),
        ("two shapes", image(VICTIM, VALUES[:-1]), ["(93, 95, 96)", "(94, 95, 96)"]),
        ("axes swapped", image(VICTIM, VALUES.transpose(1, 0, 2)), ["(95, 94, 96)", "(94, 95, 96)"]),
        ("two affines", image(VICTIM, VALUES, OBLIQUE), ["affine", "first scan"]),
        ("singular affine", singular(VICTIM), ["affine", "singular"]),
        ("affine of NaN", both(singular(VICTIM), header(VICTIM, 280, "f", np.nan)), ["affine", "finite"]),
    ]
]
SCANS += [
    Row("scan: .nii.gz cut short", "train_cv", scan_as("cut.nii.gz", lambda raw: gzip.compress(raw)[:-9999]),
        ["1 of 12", "cut.nii.gz", "cannot be read", "ended"]),
    Row("scan: .nii.gz of a wrong checksum", "train_cv",
        scan_as("sum.nii.gz", lambda raw: gzip.compress(raw)[:-8] + bytes(4) + gzip.compress(raw)[-4:]),
        ["1 of 12", "sum.nii.gz", "cannot be read", "CRC"]),
    Row("scan: .nii.gz header cut short", "train_cv",
        scan_as("head.nii.gz", lambda raw: gzip.compress(raw)[:60]),
        ["1 of 12", "head.nii.gz", "cannot be read", "ended"]),
    Row("scan: not compressed, called .nii.gz", "train_cv", scan_as("plain.nii.gz", bytes),
        ["1 of 12", "plain.nii.gz", "is not packed with gzip"]),
    Row("scan: other suffix", "train_cv", scan_as("003.dat", bytes), ["1 of 12", "003.dat", "NIfTI"]),
    Row("scan: Analyze", "train_cv",
        both(scan_as("003.img", bytes),
             lambda: nib.save(nib.Spm99AnalyzeImage(VALUES, AFFINE), "scans/003.img")),
        ["1 of 12", "003.img", "NIfTI"]),
    Row("scan: first of another shape", "train_cv", image("scans/000.nii", VALUES[:-1]), ["(94, 95, 96)"]),
    Row("scan: five bad ones", "train_cv",
        both(remove("scans/001.nii"), write("scans/002.nii", "x"), image("scans/004.nii", VALUES[1:]),
             image("scans/005.nii", VALUES, OBLIQUE), singular("scans/006.nii")),
        ["5 of 12", *(f"scans/{i:03d}.nii" for i in (1, 2, 4, 5, 6))]),
    Row("scan: three bad voxels", "train_cv",
        both(image("scans/001.nii", one_voxel(np.nan)), image("scans/002.nii", 0 * VALUES),
             rewrite("scans/004.nii", lambda raw: raw[:-1])),
        ["3 of 12", *(f"scans/{i:03d}.nii" for i in (1, 2, 4))]),
    Row("scan: one missing, one of bad voxels", "train_cv",
        both(remove("scans/001.nii"), image("scans/002.nii", one_voxel(np.nan))),
        ["2 of 12", "scans/001.nii", "scans/002.nii"]),
    Row("scan: 25 missing", "train_cv",
        csv(listed([*PLAIN, *((f"scans/no{i}.nii", 1) for i in range(25))])),
        ["25 of 37", "scans/no0.nii", "scans/no19.nii", "5 more"]),
    Row("scan: NaN, cache on disk", "train_cv", image(VICTIM, one_voxel(np.nan)), [VICTIM, "NaN"],
        "--cache disk"),
    Row("scan: too small for the network", "train_cv", nothing, ["--model", "110x110x110", "94x95x96"],
        "--model modelA2"),
    Row("scan: missing", "heatmap", remove(VICTIM), ["1 of 12", VICTIM, "no such file"]),
    Row("scan: another affine than in training", "heatmap", image(VICTIM, VALUES, OBLIQUE),
        [VICTIM, "affine"]),
    Row("scan: all of another affine than in training", "heatmap",
        lambda: [image(path, VALUES, OBLIQUE)() for path, _ in PLAIN], [*HERE, "grid"]),
    Row("scan: made anew since training", "heatmap", image(VICTIM, VALUES // 2), [*HERE, "scans changed"]),
    Row("scan: missing", "svm", remove(VICTIM), ["1 of 12", VICTIM, "no such file"]),
    Row("scan: voxels cut short", "svm", rewrite(VICTIM, lambda raw: raw[:-1000]), ["1 of 12", VICTIM]),
    Row("scan: constant", "svm", image(VICTIM, 0 * VALUES), ["1 of 12", VICTIM, "constant"],
        "--modelpath none --fold 2 --val-fraction 0.34"),
    Row("scan: all the same", "svm", lambda: [image(path, VALUES)() for path, _ in PLAIN],
        [*HERE, "the same"],
        "--modelpath none --fold 2 --val-fraction 0.34"),
]  # fmt: skip

INTEGER = "2.5 x nan"
NUMBERS = [
    ("train_cv", "--batch", f"0 -1 {INTEGER}"),
    ("train_cv", "--fold", f"1 0 -5 {INTEGER}"),
    ("train_cv", "--lr", "0 -1 1e38 nan inf x"),
    ("train_cv", "--wd", "-1 1e39 nan inf x"),
    ("train_cv", "--epochs", f"0 -1 {INTEGER}"),
    ("train_cv", "--patience", f"0 -1 {INTEGER}"),
    ("train_cv", "--delta", "-1 nan inf x"),
    ("train_cv", "--val-fraction", "0 1 -0.1 1.5 nan x"),
    ("train_cv", "--seed", f"-1 4294967296 {INTEGER}"),
    ("train_cv", "--run-folds", f"-1 {INTEGER}"),
    ("train_cv", "--workers", f"-1 {INTEGER}"),
    ("heatmap", "--fold", f"1 0 -5 {INTEGER}"),
    ("heatmap", "--batch", f"0 -1 {INTEGER}"),
    ("heatmap", "--run-folds", f"-1 {INTEGER}"),
    ("heatmap", "--seed", f"-1 4294967296 {INTEGER}"),
    ("heatmap", "--steps", f"0 -1 {INTEGER}"),
    ("heatmap", "--beta", "-1 1e39 nan inf x"),
    ("svm", "--C", "0 -1 nan inf x"),
    ("svm", "--fold", f"1 0 -5 {INTEGER}"),
    ("svm", "--val-fraction", "0 1 -0.1 1.5 nan x"),
    ("svm", "--seed", f"-1 4294967296 {INTEGER}"),
    ("overlap", "--reference-threshold", "nan inf x"),
    ("overlap", "--smooth", "-1 1e9 nan inf x"),
    ("overlap", "--rank-smooth", "-1 1e9 nan inf x"),
    ("overlap", "--seed", f"-1 {INTEGER}"),
]
OPTIONS = [
    Row(f"{option} {bad}", command, nothing, [option, f"'{bad}'"], f"{option} {bad}")
    for command, option, every in NUMBERS
    for bad in every.split()
]
OPTIONS += [
    Row(f"{given}{name}", command, nothing, [given.split(" ")[0], *words], given)
    for command, given, words, name in [
        ("train_cv", "--val-fraction 0.01", ["0.01", "both labels"], " of few subjects"),
        ("train_cv", "--val-fraction 0.9", ["0.9", "both labels"], " of few subjects"),
        ("train_cv", "--run-folds 0 2", ["--run-folds 2", "0 to 1"], ""),
        ("train_cv", "--run-folds", ["argument"], " without a number"),
        ("train_cv", f"--device {BEYOND}", [f"--device {BEYOND}"], ""),
        ("train_cv", "--device cuda:99", ["--device cuda:99"], ""),
        ("train_cv", "--device tpu", ["--device tpu", "cpu", "cuda:N"], ""),
        ("train_cv", "--device -1", ["--device -1"], ""),
        ("train_cv", "--model modelE24", ["modelE24", "A-D"], ""),
        ("train_cv", "--model modelB0", ["modelB0", "number of filters"], ""),
        ("train_cv", "--model resnet", ["resnet", "modelA24"], ""),
        ("train_cv", "--split random", ["stratified", "contiguous"], ""),
        *[("train_cv", "--device mps", ["--device mps", "no MPS device", "--device cpu"], "")] * NO_MPS,
        ("train_cv", "--precision fp16", ["fp32", "bf16"], ""),
        ("train_cv", "--precision tf32", ["--precision tf32", "cpu", "use fp32"], " on a CPU"),
        ("train_cv", "--cache tape", ["ram", "disk"], ""),
        ("train_cv", "--cache gpu", ["--cache gpu", "the device is cpu"], " on a CPU"),
        ("train_cv", "--epoch 3", ["unrecognized"], ""),
        ("train_cv", "--folds 3", ["unrecognized"], ""),
        ("train_cv", "--path", ["argument"], " without a value"),
        ("train_cv", "data.csv", ["unrecognized"], " without its option"),
        ("heatmap", "--method GradCAM", ["'GradCAM'", "LRP", "IG", "GGC"], ""),
        ("heatmap", "--baseline controls", ["controls", "IG", "LRP"], " with LRP"),
        ("heatmap", "--baseline controls --method GGC", ["controls", "IG", "GGC"], ""),
        ("heatmap", "--baseline mean", ["zero", "controls"], ""),
        ("heatmap", "--target 2", ["label", "predicted"], ""),
        ("heatmap", "--weights none", ["trained", "random"], ""),
        ("heatmap", "--model modelB1", ["modelB1", MODEL], " of another run"),
        ("heatmap", "--fold 3", ["3", "2 folds"], " of another run"),
        ("heatmap", "--run-folds 2", ["2", "0 to 1"], ""),
        ("heatmap", f"--device {BEYOND}", [f"--device {BEYOND}"], ""),
        ("heatmap", "--device tpu", ["--device tpu"], ""),
        *[("heatmap", "--device mps", ["--device mps", "no MPS device"], "")] * NO_MPS,
        ("heatmap", "--modelpath none", ["none", "no such folder"], ""),
        ("heatmap", "--modelpath data.csv", ["data.csv", "folder"], ", a file"),
        ("heatmap", "--modelpath scans", ["scans", "run.json", "--model"], ", a folder of other files"),
        ("svm", "--fold 3", ["3", "2"], " of another run"),
        ("svm", "--split contiguous", ["contiguous", "stratified"], " of another run"),
        ("svm", "--val-fraction 0.5", ["0.5", "0.34"], " of another run"),
        ("svm", "--seed 7", ["7", "0"], " of another run"),
        ("svm", "--split random", ["stratified", "contiguous"], ""),
        ("svm", "--c 1", ["unrecognized"], ""),
        ("overlap", "--maps none", ["none", "METHOD"], ""),
        ("overlap", "--maps scans", ["scans", "METHOD"], ", a folder of other files"),
        ("overlap", "--maps data.csv", ["data.csv", "METHOD"], ", a file"),
        ("overlap", "--smooth", ["argument"], " without a number"),
    ]
]
OPTIONS += [
    Row("no --path", "train_cv", nothing, ["--path", "required"], argv=""),
    Row("no --method", "heatmap", nothing, ["--method", "required"], argv=""),
    Row("no --path, no run", "svm", nothing, ["--modelpath none", "--path"], argv="--modelpath none"),
    Row("no --reference", "overlap", nothing, ["--reference", "required"], argv=""),
    Row("no run.json, no --path", "heatmap", remove("models/run.json"), ["run.json", "--path"],
        argv=f"--method LRP --model {MODEL}"),
    Row("no run.json, no --model", "heatmap", remove("models/run.json"), ["run.json", "--model"]),
    *(
        Row(f"--outpath {where}", command, write("out", "mine"), [f"--outpath {where}", "folder"],
            f"--outpath {where}")
        for command in COMMANDS
        for where in ("out", "out/below")
    ),
    Row("--outpath holds another run", "train_cv", nothing, ["run.json", "epochs", "--overwrite"],
        "--outpath models --epochs 3"),
    Row("--outpath holds a run of another CSV", "train_cv", row(5, f"{VICTIM},0,another"),
        ["run.json", "csv_sha256", "--overwrite"], "--outpath models"),
    Row("--outpath holds networks without a record", "train_cv", remove("models/run.json"),
        ["in the way", "--overwrite"], "--outpath models"),
    Row("--outpath holds a damaged record", "train_cv", write("models/run.json", "{"), ["run.json"],
        "--outpath models"),
    Row("--outpath holds a damaged checkpoint", "train_cv", write(CHECKPOINT, "x"), [CHECKPOINT],
        "--outpath models"),
    Row("--outpath holds a damaged checkpoint, another fold to train", "train_cv",
        both(write(CHECKPOINT, "x"), remove("models/state_dict_f0.pth")), [CHECKPOINT], "--outpath models"),
    Row("--outpath holds a damaged history", "train_cv", write("models/history_f1.csv", "x\n"),
        ["history_f1.csv"], "--outpath models"),
    Row("--outpath holds an empty history", "train_cv", write("models/history_f1.csv", ""),
        ["history_f1.csv"], "--outpath models"),
    Row("--outpath: METHOD is a file", "heatmap", write("out/LRP", "mine"),
        ["--outpath", "out/LRP", "folder"]),
    Row("--outpath holds maps without a record", "heatmap", write("out/LRP/map_f0.nii.gz", "mine"),
        ["map_f0.nii.gz", "in the way", "--overwrite"]),
    Row("--outpath holds maps of other options", "heatmap",
        write("out/LRP/map.json", '{"method": "LRP", "options": {"beta": 9}}'), ["map.json", "beta", "9"]),
    Row("--outpath holds a damaged record", "heatmap", write("out/LRP/map.json", "[]"), ["map.json", "JSON"]),
    Row("--outpath: METHOD is a file", "svm", write("out/SVM", "mine"), ["--outpath", "out/SVM", "folder"]),
    Row("--outpath holds maps without a record", "svm", write("out/SVM/map_all.nii.gz", "mine"),
        ["map_all.nii.gz", "in the way", "--overwrite"]),
    Row("--outpath holds a damaged record", "svm", write("out/SVM/map.json", b"\xff"), ["map.json", "JSON"]),
    Row("--outpath holds a table without a record", "overlap", write("out/overlap.csv", "mine"),
        ["overlap.csv", "in the way", "--overwrite"]),
    Row("--outpath holds another comparison", "overlap", write("out/overlap.json", '{"seed": 1}'),
        ["overlap.json", "seed (1 there, 0 now)", "--overwrite"]),
]  # fmt: skip

RECORD, FOLDS = "models/run.json", "models/folds.csv"
CHECKPOINTS = [
    Row(f"checkpoint: {name}", "heatmap", spoil, [CHECKPOINT, *words])
    for name, spoil, words in [
        ("missing", remove(CHECKPOINT), ["no such checkpoint"]),
        ("a folder", folder(CHECKPOINT), ["is a folder"]),
        ("empty", write(CHECKPOINT, ""), ["state dict"]),
        ("text", write(CHECKPOINT, "no weights"), ["state dict"]),
        ("cut in half", rewrite(CHECKPOINT, lambda raw: raw[: len(raw) // 2]), ["state dict"]),
        ("last byte lost", rewrite(CHECKPOINT, lambda raw: raw[:-1]), ["state dict"]),
        ("a list", checkpoint([1, 2]), ["not the weights"]),
        ("a state dict in a dict", checkpoint(lambda state: {"state_dict": state}), ["other layers"]),
        ("a whole network", checkpoint(lambda _: models.build_model("modelB1", SHAPE)), ["state dict"]),
        ("names of DataParallel", checkpoint(lambda state: {f"module.{k}": v for k, v in state.items()}),
         ["other layers"]),
        ("family A", checkpoint(weights_of("modelA2", (110, 110, 110))), ["features.0.weight", "7, 7"]),
        ("family D", checkpoint(weights_of("modelD2", (105, 105, 105))), ["other layers"]),
        ("other width", checkpoint(weights_of("modelB3")), ["(3, 1, 3, 3, 3)", "(2, 1, 3, 3, 3)"]),
        ("other grid", checkpoint(weights_of(MODEL, (94, 95, 126))), ["(64, 4)", "(64, 2)"]),
        ("a list among the weights", checkpoint(lambda state: state | {"classifier.3.bias": [0, 0]}),
         ["classifier.3.bias", "list"]),
        ("NaN weights", checkpoint(with_value("features.4.weight", np.nan)), ["features.4.weight", "finite"]),
        ("infinite weights", checkpoint(with_value("classifier.3.bias", np.inf)),
         ["classifier.3.bias", "finite"]),
        ("complex weights",
         checkpoint(lambda state: state | {"classifier.3.bias": torch.zeros(2, dtype=torch.cfloat)}),
         ["classifier.3.bias", "complex"]),
        ("variance below zero", checkpoint(with_value("features.1.running_var", -1)),
         ["features.1.running_var"]),
    ]
]  # fmt: skip
CHECKPOINTS += [
    Row("checkpoint: published, other width", "heatmap", both(remove(RECORD), csv(listed(PLAIN))),
        ["state_dict_f0.pth", "features.0.weight"], "--model modelB3 --fold 2"),
    Row("checkpoint: published, fewer than folds", "heatmap", both(remove(RECORD), csv(listed(PLAIN))),
        ["state_dict_f2.pth", "no such checkpoint"], f"--model {MODEL} --fold 3"),
    Row("checkpoint: published, unknown network", "heatmap", both(remove(RECORD), csv(listed(PLAIN))),
        ["--model", "modelX2", "A-D"], "--model modelX2 --fold 2"),
    Row("checkpoint: published, scans too small", "heatmap", both(remove(RECORD), csv(listed(PLAIN))),
        ["--model", "112x112x112", "94x95x96"], "--model modelC2 --fold 2"),
]  # fmt: skip
RECORDS = [
    Row(f"run: {name}", command, spoil, words)
    for command in ("heatmap", "svm")
    for name, spoil, words in [
        ("record cut short", rewrite(RECORD, lambda raw: raw[:-40]), [RECORD]),
        ("record empty", write(RECORD, ""), [RECORD]),
        ("record of no keys", write(RECORD, "{}"), ["run.json", "damaged"]),
        ("record a list", write(RECORD, "[]"), [RECORD, "JSON object"]),
        ("record not UTF-8", write(RECORD, b'{"csv": "\xe9"}'), [RECORD]),
        ("record a folder", folder(RECORD), [RECORD]),
        ("record without arguments", record(RECORD, arguments=None), ["run.json"]),
        ("recorded folds a word", record(RECORD, arguments={"fold": "many"}), ["run.json", "many"]),
        ("recorded folds none", record(RECORD, arguments={"fold": 0}), ["models"]),
        ("recorded CSV a number", record(RECORD, csv=5), ["run.json"]),
        ("recorded grid another", record(RECORD, grid={"shape": [94, 95, 97]}), [*HERE, "grid"]),
        ("recorded grid a word", record(RECORD, grid="MNI"), ["grid"]),
        ("folds missing", remove(FOLDS), ["folds.csv"]),
        ("folds empty", write(FOLDS, ""), ["folds.csv"]),
        ("folds binary", write(FOLDS, bytes(range(256))), ["folds.csv"]),
        ("folds of other columns", folds("^fold,role", "fold,part"), [FOLDS]),
        ("folds of a lost row", folds(r"^1,\w+,scans/011.*\n", ""), [FOLDS, "every scan"]),
        ("folds of an unknown role", folds("^1,test", "1,tset"), ["folds.csv"]),
        ("folds of an unknown number", folds("^1,", "9,"), ["folds.csv"]),
        ("folds of a word", folds("^1,", "one,"), ["folds.csv"]),
        ("folds that test nothing", folds("^1,test", "1,train"), ["folds.csv"]),
        ("folds that test a scan twice", folds(r"^1,\w+,scans/000", "1,test,scans/000"), ["folds.csv"]),
    ]
]  # fmt: skip
RECORDS += [
    Row("run: recorded model a number", "heatmap", record(RECORD, model=7), ["run.json", "model"]),
    Row("run: recorded model unknown", "heatmap", record(RECORD, model="modelZ9"), ["modelZ9"]),
    Row("run: no seed in the record", "svm", rewrite(RECORD, lambda raw: raw.replace(b'"seed"', b'"sead"')),
        [RECORD, "seed"]),
    Row("run: no patients to train on", "svm", folds(r"^1,train,(.*),1,", r"1,val,\1,1,"),
        ["folds.csv", "fold 1", "train", "[0]"]),
    Row("run: nothing to validate on", "svm", folds("^0,val", "0,train"),
        ["folds.csv", "fold 0", "val", "[]"]),
]  # fmt: skip

MASKS = [
    Row(f"--mask: {name}", "svm", spoil, ["--mask", "brain.nii", *words], "--mask brain.nii")
    for name, spoil, words in [
        ("missing", nothing, []),
        ("a folder", folder("brain.nii"), []),
        ("text", write("brain.nii", "no mask"), ["NIfTI"]),
        ("empty", write("brain.nii", ""), ["NIfTI"]),
        (
            "cut short",
            both(image("brain.nii", VALUES), rewrite("brain.nii", lambda raw: raw[:-9])),
            ["94x95x96", "holds"],
        ),
        ("complex", image("brain.nii", VALUES.astype(np.complex64)), ["real"]),
        ("another shape", image("brain.nii", VALUES[1:]), ["shape", "(93, 95, 96)", "(94, 95, 96)"]),
        ("two volumes", image("brain.nii", np.stack([VALUES, VALUES], -1)), ["(94, 95, 96, 2)"]),
        ("another affine", image("brain.nii", VALUES, OBLIQUE), ["affine"]),
        ("all zero", image("brain.nii", 0 * VALUES), ["empty"]),
        ("all NaN", image("brain.nii", REAL * np.nan), ["empty"]),
    ]
]
MASKS += [
    Row("--mask: where scans do not differ", "svm",
        image("brain.nii", (np.arange(94) == 0)[:, None, None] * np.ones(SHAPE, np.uint8)),
        ["brain.nii", "the same"], "--mask brain.nii"),
]  # fmt: skip
MASKS += [
    Row(f"{option}: {name}", "overlap", spoil, ["other.nii", *words], f"{option} other.nii")
    for option in ("--reference", "--mask")
    for name, spoil, words in [
        ("missing", nothing, ["no such file"]),
        ("a folder", folder("other.nii"), []),
        ("text", write("other.nii", "no image"), ["NIfTI"]),
        ("empty", write("other.nii", ""), ["NIfTI"]),
        (
            "cut short",
            both(image("other.nii", BLOCK), rewrite("other.nii", lambda raw: raw[:-9])),
            ["12x13x14", "holds"],
        ),
        ("compressed, called .nii", both(image("other.nii", BLOCK), rewrite("other.nii", gzip.compress)), []),
        ("2D", image("other.nii", BLOCK[..., 3]), ["3D"]),
        ("two volumes", image("other.nii", np.stack([BLOCK, BLOCK], -1)), ["3D"]),
        ("complex", image("other.nii", BLOCK.astype(np.complex64)), ["real"]),
        ("RGB", image("other.nii", RGB[:12, :13, :14]), []),
        ("all zero", image("other.nii", 0 * BLOCK), [option, "no voxel"]),
        ("all NaN", image("other.nii", np.full(SMALL, np.nan, np.float32)), [option, "no voxel"]),
        ("singular affine", both(image("other.nii", BLOCK), singular("other.nii")), ["affine"]),
    ]
]
MASKS += [
    Row("--reference-threshold 1, its largest value", "overlap", nothing,
        ["--reference", "truth.nii", "no voxel", "above 1"], "--reference-threshold 1"),
    Row("--reference-threshold -1, below all", "overlap", nothing,
        ["--reference", "truth.nii", "every voxel", "above -1"], "--reference-threshold -1"),
    Row("--mask: another shape", "overlap", image("other.nii", BLOCK[1:]),
        ["other.nii", "11x13x14", "12x13x14"], "--mask other.nii"),
    Row("--mask: another affine", "overlap", image("other.nii", BLOCK, OBLIQUE), ["other.nii", "affine"],
        "--mask other.nii"),
    Row("--reference: every voxel of the mask", "overlap", image("other.nii", BLOCK + 1),
        ["--reference", "other.nii", "every voxel"], "--reference other.nii"),
    Row("--reference: somewhere else", "overlap", image("other.nii", BLOCK, AFFINE + 900 * np.eye(4, k=3)),
        ["--reference", "other.nii", "field of view"], "--reference other.nii"),
]  # fmt: skip

MAP, MEAN = "heatmaps/SVM/map_f1.nii.gz", "heatmaps/GGC/mean_scan.nii.gz"
MAPS = [
    Row(f"map: {name}", "overlap", spoil, words)
    for name, spoil, words in [
        ("missing", remove(MAP), ["maps are missing", MAP]),
        ("mean missing", remove("heatmaps/GGC/map_all.nii.gz"), ["missing", "GGC/map_all.nii.gz"]),
        ("mean scan missing", remove(MEAN), [MEAN, "no such file"]),
        ("empty", write(MAP, ""), [MAP, "NIfTI"]),
        ("cut short", rewrite(MAP, lambda raw: raw[:-500]), [MAP, "cannot be read", "ended"]),
        ("not compressed", rewrite(MAP, gzip.decompress), [MAP]),
        ("another shape", image(MAP, white((12, 13, 15), 0)), [MAP, "12x13x15", "12x13x14"]),
        ("another affine", image(MAP, white(SMALL, 0), OBLIQUE), [MAP, "affine"]),
        ("NaN", image(MAP, np.full(SMALL, np.nan, np.float32)), [MAP, "NaN"]),
        ("infinity", image(MAP, np.full(SMALL, np.inf, np.float32)), [MAP, "infinite"]),
        ("mean scan cut short", rewrite(MEAN, lambda raw: raw[:-500]), [MEAN, "cannot be read", "ended"]),
        ("mean scan of another shape", image(MEAN, white((12, 13, 15), 0)), [MEAN, "12x13x15"]),
        ("record damaged", write("heatmaps/SVM/map.json", "{"), ["SVM/map.json", "JSON"]),
        ("folds in words", record("heatmaps/SVM/map.json", folds="two"), ["SVM", "two"]),
        ("folds in words everywhere",
         both(*(record(f"heatmaps/{method}/map.json", folds="two") for method in ("GGC", "SVM"))),
         ["map.json", "folds"]),
        ("other number of folds", record("heatmaps/SVM/map.json", folds=3), ["SVM has 3", "GGC has 2"]),
        ("of another CSV", record("heatmaps/SVM/map.json", csv_sha256="other"), ["different CSVs"]),
    ]
]  # fmt: skip

PERMISSIONS = [
    Row(f"{name} reading forbidden", command, forbid(path), words, options, unprivileged=True)
    for name, command, path, words, options in [
        ("CSV:", "train_cv", "data.csv", HERE, ""),
        ("scan:", "train_cv", VICTIM, ["1 of 12", VICTIM, "permission denied"], ""),
        ("checkpoint:", "heatmap", CHECKPOINT, [CHECKPOINT, "permission"], ""),
        ("run: record,", "heatmap", RECORD, [RECORD, "permission denied"], ""),
        ("--mask:", "svm", "mask.nii", ["--mask", "mask.nii", "permission denied"], "--mask mask.nii"),
        ("--reference:", "overlap", "truth.nii", ["truth.nii", "permission denied"], ""),
        ("map:", "overlap", MAP, [MAP, "permission denied"], ""),
    ]
]
PERMISSIONS += [
    Row("--outpath, writing forbidden", command, lambda: Path("locked").mkdir(mode=0o555),
        ["--outpath locked", "written"], "--outpath locked/out", unprivileged=True)
    for command in COMMANDS
]  # fmt: skip

ROWS = [*CSVS, *SCANS, *OPTIONS, *CHECKPOINTS, *RECORDS, *MASKS, *MAPS, *PERMISSIONS]


# What is fine, however odd it looks --------------------------------------------------------------


def relisted(change: Callable[[str], str]) -> Spoil:
    """Other paths in data.csv for the same files."""
    return lambda: csv("path,label\n" + listed([(change(path), label) for path, label in PLAIN]))()


def replaced(*pairs: tuple[bytes, bytes]) -> Spoil:
    """Other bytes in data.csv."""

    def change(raw: bytes) -> bytes:
        for old, new in pairs:
            raw = raw.replace(old, new)
        return raw

    return rewrite("data.csv", change)


ODD: dict[str, Spoil] = {
    "nothing": nothing,
    "CSV without header": csv(listed(PLAIN)),
    "CSV with a byte order mark": rewrite("data.csv", lambda raw: b"\xef\xbb\xbf" + raw),
    "CSV of CRLF lines": replaced((b"\n", b"\r\n")),
    "CSV header in capitals": row(1, "Path,LABEL,Subject"),
    "CSV of quoted fields": row(5, f'"{VICTIM}","0","00,03"'),
    "CSV of spaces and blank lines": replaced((b",", b" , "), (b"\n", b"\n\n")),
    "CSV without a last newline": rewrite("data.csv", bytes.rstrip),
    "CSV of other columns": csv("age,label,path\n" + listed([(70, label, path) for path, label in PLAIN])),
    "absolute paths": relisted(lambda path: str(Path(path).absolute())),
    "paths below home": relisted(lambda path: f"~/{path}"),
    "paths through other folders": relisted(lambda path: f"models/../{path}"),
    "scan listed by a path with a comma": both(
        lambda: Path(VICTIM).rename("scans/0,3.nii"), row(5, '"scans/0,3.nii",0,0003')
    ),
    "subject of both labels": row(5, f"{VICTIM},0,010"),
    "4D of one volume": image(VICTIM, VALUES[..., None]),
    "5D of one volume": image(VICTIM, VALUES[..., None, None]),
    "NIfTI-2": lambda: (Path(VICTIM).unlink(), write_scan(Path(VICTIM), VALUES, AFFINE, nib.Nifti2Image)),
    "float64 voxels": image(VICTIM, VALUES.astype(np.float64)),
    "uint8 voxels": image(VICTIM, (VALUES // 4).astype(np.uint8)),
    "compressed": scan_as("003.nii.gz", gzip.compress),
    "suffix in capitals": scan_as("003.NII", bytes),
    "compressed, suffix in capitals": scan_as("003.NII.GZ", gzip.compress),
    "compressed, suffix in both": scan_as("003.nii.GZ", gzip.compress),
    "affine rounded": image(VICTIM, VALUES, AFFINE + 1e-5 * np.eye(4, k=1)),
    "link to a scan": lambda: (Path(VICTIM).rename("003.nii"), Path(VICTIM).symlink_to("../003.nii")),
}


# The good folder, and asking -----------------------------------------------------------------------


def write_maps(folder: Path) -> None:
    """Maps of two methods and two folds, with a mask and a reference."""
    mask = np.zeros(SMALL, np.uint8)
    mask[2:10, 3:12, 1:12] = 1
    write_scan(folder / "mask.nii", mask)
    write_scan(folder / "truth.nii", BLOCK)
    for place in (folder / "heatmaps" / "GGC", folder / "heatmaps" / "SVM"):
        for seed, name in enumerate(["map_f0", "map_f1", "map_all"]):
            write_scan(place / f"{name}.nii.gz", white(SMALL, seed) + 2 * BLOCK)
        storage.write_json({"folds": 2, "csv_sha256": "abc"}, place / "map.json")
    write_scan(folder / "heatmaps" / "GGC" / "mean_scan.nii.gz", mask * white(SMALL, 9))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Iterator[Path]:
    """A cohort, a run of two folds and maps of it that nothing is wrong with; read only."""
    folder = tmp_path_factory.mktemp("good")
    write_cohort(folder)
    write_maps(folder)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        assert train_cv.main(f"{TRAIN} --outpath models --run-folds 0".split()) == 0
    for name in ("state_dict_f{}.pth", "history_f{}.csv"):  # one network will do for both folds
        shutil.copy(folder / "models" / name.format(0), folder / "models" / name.format(1))
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before  # rows work on links to these files


@pytest.fixture
def world(good, tmp_path, monkeypatch) -> Path:
    """The good folder once more, to be spoilt: the working folder, and home."""
    shutil.copytree(good, tmp_path / "world", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setenv("HOME", str(tmp_path / "world"))
    record(RECORD, csv=str(tmp_path / "world" / "data.csv"))()
    return tmp_path / "world"


def snapshot(folder: Path) -> dict[Path, object]:
    """Everything below a folder, by what tells whether it was written to: of small files the bytes."""

    def state(path: Path) -> object:
        about = path.lstat()
        if path.is_file() and about.st_size < 10**5 and os.access(path, os.R_OK):
            return path.read_bytes()
        return about.st_mode, path.is_file() and (about.st_ino, about.st_size, about.st_mtime_ns)

    return {path: state(path) for path in folder.rglob("*")}


# Runs commands for others: a line of JSON [folder, command, argv] in, a line of [status, stderr] out.
SERVER = """
import contextlib, importlib, io, json, os, sys, traceback
answers, sys.stdout = sys.stdout, open(os.devnull, "w")
for line in sys.stdin:
    folder, command, argv = json.loads(line)
    os.chdir(folder)
    status = 1
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            status = importlib.import_module(command).main(argv)
        except Exception:
            traceback.print_exc()
    print(json.dumps([status, said.getvalue()]), file=answers, flush=True)
"""
Ask = Callable[[Path, str, list[str]], tuple[int, str]]


@pytest.fixture(scope="module")
def ask_unprivileged() -> Iterator[Ask]:
    """Run commands in a process that file permissions bind; root's do not, so it gives up that right."""
    root = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [*root, sys.executable, "-c", SERVER],
        env=os.environ | {"PYTHONPATH": str(Path(train_cv.__file__).parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(folder: Path, command: str, argv: list[str]) -> tuple[int, str]:
        print(json.dumps([str(folder), command, argv]), file=process.stdin, flush=True)
        return tuple(json.loads(process.stdout.readline()))

    yield ask
    process.stdin.close()
    process.wait()


# The tests ---------------------------------------------------------------------------------------

MESSAGES: dict[str, str] = {}  # what every row got


def label_of(row: Row) -> str:
    """A row's name, as the table and pytest show it."""
    return f"{row.command} | {row.name}"


@pytest.mark.parametrize("row", ROWS, ids=label_of)
def test_malformed_input_is_one_line(row: Row, world, capsys, caplog, recwarn, request):
    row.spoil()
    before = snapshot(world)
    argv = (f"{GOOD[row.command]} {row.options}" if row.argv is None else row.argv).split()
    if row.unprivileged:
        status, said = request.getfixturevalue("ask_unprivileged")(world, row.command, argv)
    else:
        status, said = COMMANDS[row.command].main(argv), capsys.readouterr().err
    assert status == 2, said
    line = only_error(said)
    MESSAGES[label_of(row)] = line.removeprefix("error: ").rstrip().replace(f"{world}/", "")
    assert [word for word in row.words if word.lower() not in line.lower()] == [], line
    assert changes(before, snapshot(world)) == []
    assert shown(recwarn, caplog) == []


def digests() -> dict[str, str]:
    """What run.json says of the cohort that is there now."""
    table = dataset.read_csv(Path("data.csv"))
    arguments = json.loads(Path(RECORD).read_text())["arguments"]
    folds = dataset.make_folds(
        table, *(arguments[name] for name in ("fold", "split", "val_fraction", "seed"))
    )
    scans = {"scans_sha256": dataset.scans_digest(table), "folds_sha256": dataset.folds_digest(folds)}
    return {"csv_sha256": storage.sha256(Path("data.csv")), **scans}


@pytest.mark.parametrize("name", ODD)
def test_odd_input_is_fine(name, world, capsys, caplog, recwarn):
    """Everything is read, checked and divided into folds; a run that has its first fold ends there."""
    ODD[name]()
    for known in (FOLDS, "models/state_dict_f1.pth"):
        Path(known).unlink()
    record(RECORD, **digests())()
    argv = f"{GOOD['train_cv']} --outpath models --run-folds 0".split()
    assert train_cv.main(argv) == 0
    captured = capsys.readouterr()
    assert "fold 0: finished before, kept" in captured.out
    assert captured.err == ""
    assert Path(FOLDS).read_text().count("\n") == 1 + 2 * len(PLAIN)
    assert shown(recwarn, caplog) == []


@pytest.mark.parametrize(
    ("command", "options", "made"),
    [
        ("heatmap", "--method GGC --run-folds 0", "out/GGC/map_f0.nii.gz"),
        ("svm", "--C 1", "out/SVM/map_all.nii.gz"),
        ("overlap", "", "out/overlap.csv"),
    ],
)
def test_good_input_is_good(command, options, made, world, capsys):
    """What the rows spoil works as it is: nothing else is wrong with it. (`good` is made by train_cv.)"""
    assert COMMANDS[command].main(f"{GOOD[command]} {options}".split()) == 0
    assert Path(made).is_file()
    assert capsys.readouterr().err == ""


def changes(before: dict[Path, object], after: dict[Path, object]) -> list[str]:
    """The files that came, went or changed."""
    return [path.name for path in before | after if before.get(path) != after.get(path)]


def shown(warnings: pytest.WarningsRecorder, log: pytest.LogCaptureFixture) -> list[str]:
    """What Python and nibabel would print beside the one line: warnings and log."""
    hidden = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
    return [str(w.message) for w in warnings if not issubclass(w.category, hidden)] + log.messages


def numbers(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a command that take numbers."""
    made_by = utils.bounded.__qualname__
    return {a.option_strings[0] for a in parser._actions if made_by in getattr(a.type, "__qualname__", "")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_rows(command):
    assert numbers(COMMANDS[command].get_parser()) == {option for who, option, _ in NUMBERS if who == command}


def test_table_of_messages():
    """Prints the table, of the rows that ran before."""
    labels = [label_of(row) for row in ROWS]
    assert len(set(labels)) == len(labels) >= 75
    width = max(map(len, labels))
    print(f"\n{len(labels)} malformed inputs")
    print("\n".join(f"{label:{width}} | {MESSAGES[label]}" for label in labels if label in MESSAGES))
