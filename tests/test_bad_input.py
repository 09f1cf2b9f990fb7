"""Malformed inputs of the commands, each with the words of the one line it gets; and odd ones that are fine.

    .venv/bin/python -m pytest -rP tests/test_bad_input.py

prints every input with its message. What each reader detects is told in its own tests; here is what a command
makes of it: status 2, one line that names file or option, nothing written.
"""

import argparse
import ctypes
import gzip
import io
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from cohorts import AFFINE, LABELS, MODEL, OBLIQUE, SHAPE, TRAINED, only_error, voxels, write_scan

import heatmap
import models
import overlap
import simulate
import svm
import train_cv

COMMANDS: dict[str, ModuleType] = {m.__name__: m for m in (train_cv, heatmap, svm, overlap, simulate)}
COMPARE = "--maps heatmaps --reference truth.nii --mask mask.nii --smooth 0 --rank-smooth 0"
GOOD = {  # arguments that work in the good folder
    "train_cv": f"--path data.csv {' '.join(TRAINED)} --workers 0 --outpath out",
    "heatmap": "--method LRP --path data.csv --modelpath models --device cpu --outpath out",
    "svm": "--path data.csv --modelpath models --outpath out",
    "overlap": f"{COMPARE} --outpath out",
    "simulate": "--subjects 4 --voxel 4 --outpath out",
}
VICTIM = "scans/003.nii"  # row 5 of data.csv
RECORD, FOLDS = "models/run.json", "models/folds.csv"
CHECKPOINT, HISTORY = "models/state_dict_f1.pth", "models/history_f1.csv"
MAP, MAP_RECORD = "heatmaps/LRP/map_f1.nii.gz", "heatmaps/LRP/map.json"
MEAN = "heatmaps/GGC/mean_scan.nii.gz"
BEYOND = torch.cuda.device_count()  # the first GPU that is not there

Spoil = Callable[[], object]


class Row(NamedTuple):
    """A malformed input."""

    command: str
    name: str
    spoil: Spoil  # changes files of the good folder, which is the working folder
    words: str  # in the message, capital or not, with "|" between them
    options: str = ""  # after the good ones
    alone: bool = False  # the options are all there are
    unprivileged: bool = False  # in a thread that file permissions bind


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


def rewrite(path: str, change: Callable[[bytes], bytes], source: str = "") -> Spoil:
    """Change a file's content, or make the file of another's."""
    return lambda: write(path, change(Path(source or path).read_bytes()))()


def cut(path: str, count: int) -> Spoil:
    """A file without its last bytes."""
    return rewrite(path, lambda raw: raw[:-count])


def folder(path: str) -> Spoil:
    """A folder where a file was."""
    return lambda: (Path(path).unlink(missing_ok=True), Path(path).mkdir(parents=True))


def image(path: str, values: np.ndarray, affine: np.ndarray = AFFINE, kind=nib.Nifti1Image) -> Spoil:
    """Another image."""
    return lambda: (Path(path).unlink(missing_ok=True), write_scan(Path(path), values, affine, kind))


def header(path: str, start: int, layout: str, *values: float) -> Spoil:
    """A scan with other values in its NIfTI header, from a byte on."""
    fields = struct.pack(f"<{layout}", *values)
    return rewrite(path, lambda raw: raw[:start] + fields + raw[start + len(fields) :], VICTIM)


def csv(rows: list[tuple[object, ...]], head: str = "") -> Spoil:
    """Another data.csv."""
    return write("data.csv", head + "".join(",".join(map(str, cells)) + "\n" for cells in rows))


def row(text: str) -> Spoil:
    """Another fifth row in data.csv, that of VICTIM."""
    return rewrite("data.csv", lambda raw: re.sub(rb"(?m)^scans/003.*$", text.encode(), raw))


def record(path: str, **changes: object) -> Spoil:
    """Other values in a JSON record; those of inner dicts are merged into them, None takes them out."""

    def change(raw: bytes) -> bytes:
        found = json.loads(raw)
        for key, value in changes.items():
            found[key] = found[key] | value if isinstance(value, dict) else value
        kept = {key: value for key, value in found.items() if value is not None}
        return (json.dumps(kept, indent=2) + "\n").encode()  # as the commands write it

    return rewrite(path, change)


def folds(pattern: str, replacement: str) -> Spoil:
    """Other rows in the run's folds.csv."""
    pair = pattern.encode(), replacement.encode()
    return rewrite(FOLDS, lambda raw: re.sub(*pair, raw, flags=re.MULTILINE))


def checkpoint(content: object) -> Spoil:
    """Something else in the checkpoint."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return write(CHECKPOINT, stream.getvalue())


# The inputs ----------------------------------------------------------------------------------------

VALUES = voxels(3)
FLOATS = VALUES.astype(np.float32)
NAN = np.where(VALUES.max() == VALUES, np.nan, FLOATS)
BLOCK = np.zeros(SHAPE, np.uint8)  # what counts as brain: a hundred random maps of more would take minutes
BLOCK[30:45, 30:45, 30:45] = 1
PLAIN = [(f"scans/{i:03d}.nii", label) for i, label in enumerate(LABELS)]
NO_RUN = "--modelpath none --fold 2 --val-fraction 0.34"
published = both(remove(RECORD), csv(PLAIN))

# fmt: off
OUT = "; choose another --outpath, or --overwrite"
# By command: name, what is spoilt, words (with "|" between them), options after the good ones.
FILES: dict[str, list[tuple]] = {
    "train_cv": [
        ("CSV missing", remove("data.csv"), "data.csv: no such CSV"),
        ("CSV a NIfTI file", rewrite("data.csv", bytes, VICTIM), "data.csv: cannot be read"),
        ("CSV compressed", rewrite("a.csv.gz", gzip.compress, "data.csv"), "a.csv.gz: cannot be read",
         "--path a.csv.gz"),
        ("CSV with semicolons", rewrite("data.csv", lambda raw: raw.replace(b",", b";")), "found 1"),
        ("CSV with a third label", row(f"{VICTIM},2,0003"), "data.csv: row 5|'2'|not 0 or 1"),
        ("CSV with one file by two paths", lambda: row(f"{Path('scans/000.nii').absolute()},0,0003")(),
         "row 5|scans/000.nii|twice"),
        ("CSV with paths of nothing, named as they are written",
         csv([*PLAIN, ("/no/3.nii", 0), ("../3.nii", 0), ("~/no/3.nii", 0), (f"'{VICTIM}'", 0)]),
         f"4 of 16|/no/3.nii: no such|../3.nii: no such|~/no/3.nii: no such|'{VICTIM}': not a"),
        ("CSV of one class", csv([(path, 0) for path, _ in PLAIN]), "12 of label 0|0 of label 1"),
        ("CSV whose controls are patients, too",
         csv([(*cells, f"s{i // 2}") for i, cells in enumerate(PLAIN)], "path,label,subject\n"),
         "3 stratified folds|of label 0", "--fold 3"),
        ("scan of text", write(VICTIM, "no image " * 99), f"1 of 12|{VICTIM}: |no NIfTI header"),
        ("scan with NaN, cache on disk", image(VICTIM, NAN), f"1 of 12|{VICTIM}: |NaN", "--cache disk"),
        ("scan, the first, of another shape", image("scans/000.nii", VALUES[:-1]),
         "11 of 12|(94, 95, 96), the first scan has (93, 95, 96)"),
        ("25 scans missing", csv([*PLAIN, *((f"no{i}.nii", 1) for i in range(25))]),
         "25 of 37|no0.nii|no19.nii|5 more"),
        ("run, another", nothing, f"{RECORD}|epochs (2 there, 3 now)|{OUT}", "--outpath models --epochs 3"),
        ("run of another CSV", row(f"{VICTIM},0,another"), f"{RECORD}|csv_sha256|{OUT}", "--outpath models"),
        ("checkpoint of text", write(CHECKPOINT, "x"), f"{CHECKPOINT}|state dict", "--outpath models"),
        ("checkpoint of text, another fold to train",
         both(write(CHECKPOINT, "x"), remove("models/state_dict_f0.pth")), CHECKPOINT, "--outpath models"),
        ("history of text", write(HISTORY, "x\n"), f"{HISTORY}|columns", "--outpath models"),
        ("folds edited", folds("^1,val", "1,train"), f"{FOLDS}|is not as this run wrote", "--outpath models"),
    ],
    "heatmap": [
        ("CSV missing", remove("data.csv"), "data.csv: no such CSV"),
        ("CSV not the run's", row(f"{VICTIM},1,0003"), "data.csv|content changed"),
        ("CSV with a third label, published weights", both(published, row(f"{VICTIM},2")), "row 4|'2'",
         f"--model {MODEL}"),
        ("scan missing", remove(VICTIM), f"1 of 12|{VICTIM}: no such file"),
        ("scan of another affine", image(VICTIM, VALUES, OBLIQUE), f"1 of 12|{VICTIM}|affine"),
        ("scans of another affine than in training",
         lambda: [image(path, VALUES, OBLIQUE)() for path, _ in PLAIN], "data.csv|grid"),
        ("scan made anew since training", image(VICTIM, VALUES // 2), "data.csv|scans changed"),
        ("checkpoint missing", remove(CHECKPOINT), f"{CHECKPOINT}: no such checkpoint"),
        ("checkpoint of text", write(CHECKPOINT, "no weights"), f"{CHECKPOINT}|not a PyTorch state dict"),
        ("checkpoint cut short", cut(CHECKPOINT, 1), f"{CHECKPOINT}|not a PyTorch state dict"),
        ("checkpoint of another network", checkpoint(models.build_model("modelB3", SHAPE).state_dict()),
         f"{CHECKPOINT}|features.0.weight is (3, 1, 3, 3, 3)|(2, 1, 3, 3, 3)"),
        ("published checkpoints of another width", published, "state_dict_f0.pth|features.0.weight",
         "--model modelB3 --fold 2"),
        ("published checkpoints, fewer than folds", published, "state_dict_f2.pth|no such checkpoint",
         f"--model {MODEL} --fold 3"),
        ("no record, no --model", remove(RECORD), "run.json|--path and --model"),
        ("run, model unknown", record(RECORD, model="modelZ9"), "--model|modelZ9"),
        ("run, no controls to train on", folds(r"^1,train,(.*),0,", r"1,val,\1,0,"),
         "--baseline controls|fold 1 has no controls", "--method IG --baseline controls"),
        ("maps of other options", nothing, f"map.json|save_subjects (True there, False now)|{OUT}",
         "--outpath heatmaps"),
        ("subjects cut short", cut("heatmaps/LRP/subjects.csv", 3), "LRP/subjects.csv|damaged",
         "--outpath heatmaps --save-subjects"),
    ],
    "svm": [
        ("CSV missing, no run", remove("data.csv"), "data.csv: no such CSV", NO_RUN),
        ("CSV not the run's", row(f"{VICTIM},1,0003"), "data.csv|content changed"),
        ("CSV of one class, no run", csv([(path, 1) for path, _ in PLAIN]), "0 of label 0", NO_RUN),
        ("scan missing", remove(VICTIM), f"1 of 12|{VICTIM}: no such file"),
        ("scan cut short", cut(VICTIM, 1000), f"1 of 12|{VICTIM}|claims"),
        ("scan constant", image(VICTIM, 0 * VALUES), f"1 of 12|{VICTIM}|constant", NO_RUN),
        ("scans all the same", lambda: [image(path, VALUES)() for path, _ in PLAIN], "data.csv|the same",
         NO_RUN),
        ("run, no patients to train on", folds(r"^1,train,(.*),1,", r"1,val,\1,1,"),
         f"{FOLDS}|fold 1|train|[0]"),
        ("run, nothing to validate on", folds("^0,val", "0,train"), f"{FOLDS}|fold 0|val|[]"),
        ("--mask where scans do not differ",
         image("other.nii", (np.arange(94) == 0)[:, None, None] * np.ones(SHAPE, np.uint8)),
         "other.nii|the same", "--mask other.nii"),
    ],
    "overlap": [
        ("map missing", remove(MAP), f"maps are missing|{MAP}"),
        ("map of text", write(MAP, "no map" * 99), f"{MAP}|not packed with gzip"),
        ("map cut short", cut(MAP, 500), f"{MAP}|cannot be read|ended"),
        ("map of another shape", image(MAP, FLOATS[1:]), f"{MAP}|(93, 95, 96)|(94, 95, 96)"),
        ("map of NaN", image(MAP, np.full(SHAPE, np.nan, np.float32)), f"{MAP}|NaN"),
        ("mean scans missing", lambda: [path.unlink() for path in Path().glob("heatmaps/*/mean_scan.nii.gz")],
         f"{MEAN}: no such file"),
        ("mean scan cut short", cut(MEAN, 500), f"{MEAN}|cannot be read|ended"),
        ("record damaged", write(MAP_RECORD, "{"), f"{MAP_RECORD}|JSON"),
        ("record of another number of folds", record(MAP_RECORD, folds=3), "LRP has 3|GGC has 2"),
        ("record of another CSV", record(MAP_RECORD, csv_sha256="other"), "different CSVs"),
        ("record of unfinished maps", record(MAP_RECORD, finished=[0]), f"{MAP_RECORD}|not finished"),
        ("comparison, another", write("out/overlap.json", '{"seed": 1}'),
         f"overlap.json|seed (1 there, 0 now)|{OUT}"),
    ],
    "simulate": [
        ("record of something else", write("out/cohort.json", '{"subjects": 4}'),
         "cohort.json: not written by simulate.py", "--overwrite"),
    ],
}
ROWS = [Row(command, *cells) for command, rows in FILES.items() for cells in rows]
ROWS += [
    Row(command, name, *cells)
    for command in ("heatmap", "svm")
    for name, *cells in [
        ("record cut short", cut(RECORD, 40), f"{RECORD}|JSON"),
        ("record of a map", rewrite(RECORD, bytes, MAP_RECORD), f"{RECORD}|damaged|'arguments'"),
        ("record without seed", record(RECORD, arguments={"seed": None}), f"{RECORD}|damaged|'seed'"),
        ("record of another grid", record(RECORD, grid={"shape": [94, 95, 97]}), "data.csv|grid"),
        ("folds missing", remove(FOLDS), f"{FOLDS}: no such"),
        ("folds a NIfTI file", rewrite(FOLDS, bytes, VICTIM), f"{FOLDS}: cannot be read"),
        ("folds of a lost row", folds(r"^1,\w+,scans/011.*\n", ""), f"{FOLDS}|every scan"),
    ]
]
ROWS += [
    Row(command, f"{option} {name}", spoil, f"other.nii: |{words}", f"{option} other.nii")
    for command, option in [("svm", "--mask"), ("overlap", "--mask"), ("overlap", "--reference")]
    for name, spoil, words in [
        ("missing", nothing, "no such file"),
        ("of text", write("other.nii", "no image" * 99), "no NIfTI header"),
        ("cut short", rewrite("other.nii", lambda raw: raw[:-9], VICTIM), "claims 94x95x96"),
        ("of two volumes", image("other.nii", np.stack([BLOCK, BLOCK], -1)), "one 3D volume"),
        ("all zero", image("other.nii", 0 * BLOCK), f"{option} other.nii: |no voxel"),
        ("all NaN", image("other.nii", NAN * np.float32(np.nan)), "no voxel"),
        *([("of another shape", image("other.nii", BLOCK[1:]), "(93, 95, 96)"),
           ("of another affine", image("other.nii", BLOCK, OBLIQUE), "affine")] if option == "--mask" else
          [("of every voxel", image("other.nii", BLOCK + 1), "every voxel"),
           ("elsewhere", image("other.nii", BLOCK, AFFINE + 900 * np.eye(4, k=3)), "field of view")]),
    ]
]
ROWS += [
    Row(command, f"--outpath {name}", *cells)
    for command, record_file, other in [
        ("train_cv", "run.json", "state_dict_f1.pth"), ("heatmap", "LRP/map.json", "LRP/map_f0.nii.gz"),
        ("svm", "SVM/map.json", "SVM/map_all.nii.gz"), ("overlap", "overlap.json", "overlap.csv"),
        ("simulate", "cohort.json", "data.csv"),
    ]
    for name, *cells in [
        ("a file", write("out", "mine"), "--outpath out|out is not a folder"),
        ("below a file", write("out", "mine"), "--outpath out/below|out is not a", "--outpath out/below"),
        ("without a record", write(f"out/{other}", "mine"), f"out/{other} is in the way{OUT}"),
        ("with a damaged record", write(f"out/{record_file}", "{"), f"out/{record_file}: |JSON"),
        *[("with a file METHOD", write(f"out/{other[:3]}", ""), f"--outpath out/{other[:3]}|not a folder")]
        * ("/" in other),
    ]
]
ROWS += [
    Row(command, f"{path}, reading forbidden", both(rewrite(path, bytes), partial(os.chmod, path, 0)),
        f"{path}|permission denied", options, unprivileged=True)
    for command, path, options in [
        ("train_cv", "data.csv", ""), ("train_cv", VICTIM, ""), ("heatmap", CHECKPOINT, ""),
        ("heatmap", RECORD, ""), ("svm", "mask.nii", "--mask mask.nii"), ("overlap", "truth.nii", ""),
        ("overlap", MAP, ""),
    ]
]
ROWS += [
    Row(command, "--outpath, writing forbidden", lambda: Path("locked").mkdir(mode=0o555),
        "--outpath locked|written", "--outpath locked/out", unprivileged=True)
    for command in COMMANDS
]

# Scans by their names, how they are made, and what is said of them; all of them in one list of scans.
BAD_SCANS: dict[str, tuple[Callable[[str], Spoil], str]] = {
    "missing.nii": (lambda file: nothing, "no such file"),
    "link.nii": (lambda file: lambda: Path(file).symlink_to("gone"), "no such file"),
    "folder.nii": (folder, "is a folder"),
    "text.nii": (lambda file: write(file, "no image " * 100), "no NIfTI header"),
    "short.nii": (lambda file: rewrite(file, lambda raw: raw[:-1000], VICTIM), "claims 94x95x96 voxels"),
    "packed.nii": (lambda file: rewrite(file, gzip.compress, VICTIM), "is packed with gzip"),
    "plain.nii.gz": (lambda file: rewrite(file, bytes, VICTIM), "is not packed with gzip"),
    "short.nii.gz": (lambda file: rewrite(file, lambda raw: gzip.compress(raw)[:-9999], VICTIM), "ended"),
    "sum.nii.gz": (lambda file: rewrite(file, lambda raw: gzip.compress(raw)[:-8] + bytes(8), VICTIM), "CRC"),
    "003.img": (lambda file: lambda: nib.save(nib.Spm99AnalyzeImage(VALUES, AFFINE), file),
        "expected a .nii"),
    "type.nii": (lambda file: header(file, 70, "h", 9999), "data code 9999"),
    "volumes.nii": (lambda file: image(file, np.stack([VALUES, VALUES], -1)), "found shape (94, 95, 96, 2)"),
    "complex.nii": (lambda file: image(file, VALUES.astype(np.complex64)), "found complex64"),
    "nan.nii": (lambda file: image(file, NAN), "NaN or infinite"),
    "intercept.nii": (lambda file: header(file, 112, "2f", 1, np.inf), "intercept"),
    "constant.nii": (lambda file: image(file, np.full(SHAPE, 7, np.int16)), "constant (every voxel is 7)"),
    "range.nii": (lambda file: image(file, np.where(VALUES > 500, 3e38, -3e38)), "too far apart for float32"),
    "swapped.nii": (lambda file: image(file, VALUES.transpose(1, 0, 2)),
        "(95, 94, 96), the first scan has (94,"),
    "turned.nii": (lambda file: image(file, VALUES, OBLIQUE), "affine differs from the first scan's"),
    "singular.nii": (lambda file: both(header(file, 252, "h", 0), rewrite(file, lambda raw: (
        raw[:280] + bytes(16) + raw[296:]))), "singular"),
}

# What lies just beyond the bounds of every number; what is no number at all is told in test_utils.py.
NUMBERS = {
    "train_cv": {
        "--batch": "0 2.5", "--fold": "1 2.5", "--lr": "0 1.01", "--wd": "-0.1 1.01", "--epochs": "0 2.5",
        "--patience": "0 2.5", "--delta": "-0.1 nan", "--val-fraction": "0 1", "--seed": "-1 4294967296 2.5",
        "--run-folds": "-1 2.5", "--workers": "-1 2.5",
    },
    "heatmap": {
        "--fold": "1 2.5", "--batch": "0 2.5", "--run-folds": "-1 2.5", "--seed": "-1 4294967296 2.5",
        "--steps": "0 2.5", "--beta": "-0.1 100.1",
    },
    "svm": {"--C": "0 nan", "--fold": "1 2.5", "--val-fraction": "0 1", "--seed": "-1 4294967296 2.5"},
    "overlap": {
        "--reference-threshold": "nan inf", "--smooth": "-0.1 100.1", "--rank-smooth": "-0.1 100.1",
        "--seed": "-1 2.5",
    },
    "simulate": {"--subjects": "3 4.5", "--voxel": "0.9 4.1", "--seed": "-1 2.5", "--severity": "-0.1 10.1"},
}
ROWS += [
    Row(command, f"{option} {bad}", nothing, f"{option}|'{bad}'", f"{option} {bad}")
    for command, options in NUMBERS.items()
    for option, every in options.items()
    for bad in every.split()
]
ROWS += [
    Row(command, options or "no options", nothing, words, options, alone=not options)
    for command, options, words in [
        ("train_cv", "", "--path|required"),
        ("train_cv", "data.csv", "data.csv|unrecognized"),
        ("train_cv", "--val-fraction 0.01", "--val-fraction 0.01|both labels"),
        ("train_cv", "--val-fraction 0.9", "--val-fraction 0.9|both labels"),
        ("train_cv", "--run-folds 0 2", "--run-folds 2|0 to 1"),
        ("train_cv", f"--device {BEYOND}", f"--device {BEYOND}"),
        ("train_cv", "--device tpu", "--device tpu|cpu|cuda:N"),
        ("train_cv", "--model modelE24", "--model|modelE24|A-D"),
        ("train_cv", "--model modelA2", "--model|110x110x110|94x95x96"),
        ("train_cv", "--split random", "--split|stratified|contiguous"),
        ("train_cv", "--precision fp16", "--precision|fp32|bf16"),
        ("train_cv", "--precision tf32", "--precision tf32|cpu|use fp32"),
        ("train_cv", "--cache tape", "--cache|ram|disk"),
        ("train_cv", "--cache gpu", "--cache gpu|the device is cpu"),
        ("heatmap", "", "--method|required"),
        ("heatmap", "--method GradCAM", "--method|'GradCAM'|LRP|IG|GGC"),
        ("heatmap", "--baseline controls", "--baseline controls|LRP has no baseline"),
        ("heatmap", "--baseline mean", "--baseline|zero|controls"),
        ("heatmap", "--target 2", "--target|label|predicted"),
        ("heatmap", "--weights none", "--weights|trained|random"),
        ("heatmap", "--model modelB1", f"--model modelB1|{MODEL}"),
        ("heatmap", "--fold 3", "--fold 3|2 folds"),
        ("heatmap", "--run-folds 2", "--run-folds 2|0 to 1"),
        ("heatmap", f"--device {BEYOND}", f"--device {BEYOND}"),
        ("heatmap", "--modelpath none", "--modelpath none|no such folder"),
        ("heatmap", "--modelpath scans", "--modelpath scans|run.json|--path and --model"),
        ("svm", "--fold 3", "--fold 3|2"),
        ("svm", "--split contiguous", "--split contiguous|stratified"),
        ("svm", "--split random", "--split|stratified|contiguous"),
        ("svm", "--val-fraction 0.5", "--val-fraction 0.5|0.34"),
        ("svm", "--seed 7", "--seed 7|trained with 3"),
        ("overlap", "", "--reference|required"),
        ("overlap", "--maps none", "--maps none|METHOD"),
        ("overlap", "--maps scans", "--maps scans|METHOD"),
        ("overlap", "--reference-threshold 1", "--reference truth.nii|no voxel|above 1"),
        ("overlap", "--reference-threshold -1", "--reference truth.nii|every voxel|above -1"),
        ("simulate", "", "--outpath|required"),
    ]
]
ROWS += [
    Row("svm", "no --path, no run", nothing, "--modelpath none|--path", "--modelpath none", alone=True),
    Row("heatmap", "no --path, no record", remove(RECORD), "run.json|--path", "--method LRP", alone=True),
    Row("heatmap", "no --path, CSV of the record gone", record(RECORD, csv="/gone/list.csv"),
        "/gone/list.csv: no such CSV", "--method LRP", alone=True),
]
# fmt: on


# The good folder, and the tests ----------------------------------------------------------------------


@pytest.fixture
def world(csv, lively_run, maps, tmp_path, monkeypatch) -> Path:
    """A cohort, a run and maps that nothing is wrong with, to be spoilt: the working folder, and home."""
    here = tmp_path / "world"
    shutil.copytree(csv.parent, here, copy_function=os.link)
    shutil.copytree(lively_run, here / "models", copy_function=os.link)
    ignored = shutil.ignore_patterns("subjects")
    shutil.copytree(maps, here / "heatmaps", copy_function=os.link, ignore=ignored)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    write_scan(here / "mask.nii", BLOCK)
    write_scan(here / "truth.nii", BLOCK * (VALUES > 900))
    record(RECORD, csv=str(here / "data.csv"))()
    return here


@pytest.fixture(scope="module", autouse=True)
def _links_are_not_written_through(csv, lively_run, maps):
    """What the links lead to stays as it is."""
    before = [snapshot(folder) for folder in (csv.parent, lively_run, maps)]
    yield
    assert [snapshot(folder) for folder in (csv.parent, lively_run, maps)] == before


def snapshot(folder: Path) -> dict[Path, object]:
    """Everything below a folder, by what tells whether it was written to: of small files the bytes."""

    def state(path: Path) -> object:
        about = path.lstat()
        if path.is_file() and about.st_size < 10**5 and os.access(path, os.R_OK):
            return path.read_bytes()
        return about.st_mode, path.is_file() and (about.st_ino, about.st_size, about.st_mtime_ns)

    return {path: state(path) for path in folder.rglob("*")}


def unprivileged(call: Callable[[], int]) -> int:
    """Call in a thread that file permissions bind; root's do not, so it gives up that right (capset(2))."""

    def work() -> int:
        if os.geteuid() == 0:
            libc, which = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522)  # version 3, this thread
            rights = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, then their upper halves
            assert libc.capget(which, rights) == 0
            for kind in range(3):
                rights[kind] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert libc.capset(which, rights) == 0
        return call()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def shown(warnings: pytest.WarningsRecorder, log: pytest.LogCaptureFixture) -> list[str]:
    """What Python and nibabel would print beside the one line: warnings and log."""
    hidden = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
    return [str(w.message) for w in warnings if not issubclass(w.category, hidden)] + log.messages


MESSAGES: dict[str, str] = {}  # what every row got


def label_of(row: Row) -> str:
    """A row's name, as the table and pytest show it."""
    return f"{row.command} | {row.name}"


@pytest.mark.parametrize("row", ROWS, ids=label_of)
def test_malformed_input_is_one_line(row: Row, world, capsys, caplog, recwarn):
    row.spoil()
    before = snapshot(world)
    argv = f"{'' if row.alone else GOOD[row.command]} {row.options}".split()
    main = COMMANDS[row.command].main
    status = unprivileged(lambda: main(argv)) if row.unprivileged else main(argv)
    captured = capsys.readouterr()
    assert status == 2, captured.err
    line = only_error(captured.err)
    MESSAGES[label_of(row)] = line.removeprefix("error: ").rstrip().replace(f"{world}/", "")
    assert [word for word in row.words.split("|") if word.lower() not in line.lower()] == [], line
    after = snapshot(world)
    assert [path.name for path in before | after if before.get(path) != after.get(path)] == []
    assert shown(recwarn, caplog) == []


def test_every_bad_scan_is_named_with_what_is_wrong_with_it(world, capsys, caplog, recwarn):
    for name, (make, _) in BAD_SCANS.items():
        make(f"scans/{name}")()
    csv([*PLAIN, *((f"scans/{name}", 0) for name in BAD_SCANS)])()
    assert train_cv.main(GOOD["train_cv"].split()) == 2
    count, said = only_error(capsys.readouterr().err).split(" scans cannot be used: ")
    assert count == f"error: {len(BAD_SCANS)} of {len(PLAIN) + len(BAD_SCANS)}"
    for name, (_, words) in BAD_SCANS.items():
        assert words in said.partition(f"scans/{name}: ")[2].partition("; scans/")[0]
    assert shown(recwarn, caplog) == []


def test_odd_input_is_fine(world, capsys, caplog, recwarn):
    """A CSV and scans with everything that looks odd and is allowed."""
    scans = [path for path, _ in PLAIN]
    for path, values, kind in [
        (scans[1], VALUES[..., None], nib.Nifti1Image),
        (scans[2], VALUES[..., None, None], nib.Nifti1Image),
        (scans[3], VALUES, nib.Nifti2Image),
        (scans[4], VALUES.astype(np.float64), nib.Nifti1Image),
        (scans[5], (VALUES // 4).astype(np.uint8), nib.Nifti1Image),
    ]:
        image(path, values, kind=kind)()
    image(scans[6], VALUES, AFFINE + 1e-5 * np.eye(4, k=1))()  # rounded
    Path(scans[7]).rename("7.nii")
    Path(scans[7]).symlink_to("../7.nii")
    Path(scans[8]).rename("scans/8, a copy.NII")
    for path, name in [(scans[9], "scans/009.NII.GZ"), (scans[10], "scans/010.nii.GZ")]:
        rewrite(name, gzip.compress, path)()
    paths = [str(Path(scans[0]).absolute()), f"~/{scans[1]}", f"models/../{scans[2]}", *scans[3:8]]
    paths += ['"scans/8, a copy.NII"', "scans/009.NII.GZ", "scans/010.nii.GZ", scans[11]]
    subjects = ['"00,7"', *"1234567", "5", *"89", "é"]  # subject 5 has scans of both labels
    rows = [f"70, {path}, {label} , {who}" for path, label, who in zip(paths, LABELS, subjects, strict=True)]
    text = "\ufeffage, Path,LABEL,Subject\r\n\r\n" + "\r\n".join(rows)  # and no last newline
    write("data.csv", text)()
    assert train_cv.main(f"{GOOD['train_cv']} --run-folds 0 --epochs 1".split()) == 0
    table = Path("out/folds.csv").read_text()
    assert all(table.count(f"{path},{label},") == 2 for path, label in zip(paths, LABELS, strict=True))
    assert capsys.readouterr().err == ""
    assert shown(recwarn, caplog) == []


@pytest.mark.parametrize(
    ("command", "options", "made"),
    [
        ("svm", "--C 1", "out/SVM/map_all.nii.gz"),
        ("overlap", "", "out/overlap.csv"),
    ],
)
def test_good_input_is_good(command, options, made, world, capsys):
    """What the rows spoil works as it is; the fixtures show so of the other commands."""
    assert COMMANDS[command].main(f"{GOOD[command]} {options}".split()) == 0
    assert Path(made).is_file()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_named_in_a_message(command):
    parser: argparse.ArgumentParser = COMMANDS[command].get_parser()
    options = {action.option_strings[0] for action in parser._actions if action.nargs != 0}
    words = " ".join(row.words for row in ROWS if row.command == command).replace(OUT, "")
    named = set(re.findall(r"--[\w-]+", words))
    assert options <= named


def test_table_of_messages():
    """Prints the table, of the rows that ran before."""
    labels = [label_of(row) for row in ROWS]
    assert len(set(labels)) == len(labels)
    width = max(map(len, labels))
    print(f"\n{len(labels)} malformed inputs")
    print("\n".join(f"{label:{width}} | {MESSAGES[label]}" for label in labels if label in MESSAGES))
