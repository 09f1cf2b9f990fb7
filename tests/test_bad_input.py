"""Malformed inputs of the commands, each with the words of the one line it gets.

What each reader detects is told in its own tests; here is what a command makes of it: status 2, one line
that names file or option, nothing written. `pytest -rP tests/test_bad_input.py` shows inputs and messages.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cohorts import AFFINE, LABELS, MODEL, OBLIQUE, SHAPE, TRAINED, only_error, voxels, write_scan

import heatmap
import overlap
import predict
import sanity
import simulate
import svm
import train_cv
import ttest

MODULES = (train_cv, heatmap, predict, svm, ttest, overlap, sanity, simulate)
COMMANDS: dict[str, ModuleType] = {module.__name__: module for module in MODULES}
COMPARE = "--maps heatmaps --reference truth.nii --mask mask.nii --smooth 0 --rank-smooth 0"
GOOD = {  # arguments that work in the good folder
    "train_cv": f"--path data.csv {' '.join(TRAINED)} --workers 0 --outpath out",
    "heatmap": "--method LRP --path data.csv --modelpath models --device cpu --outpath out",
    "predict": "--path new.csv --modelpath models --device cpu --outpath out",
    "svm": "--path data.csv --modelpath models --outpath out",
    "ttest": "--path data.csv --modelpath none --fold 4 --val-fraction 0.34 --outpath out",
    "overlap": f"{COMPARE} --outpath out",
    "sanity": "--maps heatmaps --modelpath models --device cpu --scans-per-fold 1 --repeats 1 --outpath out",
    "simulate": "--subjects 4 --voxel 4 --outpath out",
}
VICTIM = "scans/003.nii"  # row 5 of data.csv
RECORD, FOLDS = "models/run.json", "models/folds.csv"
CHECKPOINT, HISTORY = "models/state_dict_f1.pth", "models/history_f1.csv"
MAP, MAP_RECORD = "heatmaps/LRP/map_f1.nii.gz", "heatmaps/LRP/map.json"
MEAN = "heatmaps/GGC/mean_scan.nii.gz"
NEW = "--method LRP --scans new.csv --modelpath models --device cpu"  # heatmap.py's options for new scans
LATER = "train_cv.py, called as before, keeps the networks"
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
    return lambda: [spoil() for spoil in spoils]


def remove(path: str) -> Spoil:
    return lambda: Path(path).unlink()


def write(path: str, content: str | bytes) -> Spoil:
    """Write a file, in place of what is there: never into it, as files are links to the good ones."""

    def spoil() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).unlink(missing_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def rewrite(path: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda: write(path, change(Path(path).read_bytes()))()


def cut(path: str, count: int) -> Spoil:
    """A file without its last bytes."""
    return rewrite(path, lambda raw: raw[:-count])


def image(path: str, values: np.ndarray, affine: np.ndarray = AFFINE) -> Spoil:
    return lambda: (Path(path).unlink(missing_ok=True), write_scan(Path(path), values, affine))


def csv(rows: list[tuple[object, ...]]) -> Spoil:
    return write("data.csv", "".join(",".join(map(str, cells)) + "\n" for cells in rows))


def row(text: str) -> Spoil:
    """Another fifth row in data.csv, that of VICTIM."""
    return rewrite("data.csv", lambda raw: re.sub(rb"(?m)^scans/003.*$", text.encode(), raw))


def record(path: str, **changes: object) -> Spoil:
    """Other values in a JSON record."""
    # as the commands write it
    return rewrite(path, lambda raw: (json.dumps(json.loads(raw) | changes, indent=2) + "\n").encode())


def folds(pattern: str, replacement: str) -> Spoil:
    """Other rows in the run's folds.csv."""
    return rewrite(FOLDS, lambda raw: re.sub(f"(?m){pattern}".encode(), replacement.encode(), raw))


def only_a_floor() -> None:
    """Of all maps, those of one METHOD stay, as a floor."""
    shutil.move("heatmaps", "old")
    shutil.move("old/LRP", "heatmaps/LRP-random")


# The inputs ----------------------------------------------------------------------------------------

VALUES = voxels(3)
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
        ("CSV with a third label", row(f"{VICTIM},2,0003"), "data.csv: row 5|'2'|not 0 or 1"),
        ("CSV with paths of nothing, named as they are written",
         csv([*PLAIN, ("/no/3.nii", 0), ("../3.nii", 0), ("~/no/3.nii", 0), (f"'{VICTIM}'", 0)]),
         f"4 of 16|/no/3.nii: no such|../3.nii: no such|~/no/3.nii: no such|'{VICTIM}': not a"),
        ("CSV of one class", csv([(path, 0) for path, _ in PLAIN]), "12 of label 0|0 of label 1"),
        ("CSV without labels", csv([(path,) for path, _ in PLAIN]), "data.csv: expected two columns|found 1"),
        ("scan of text", write(VICTIM, "no image " * 99), f"1 of 12|{VICTIM}: |no NIfTI header"),
        ("scan constant, cache on disk", image(VICTIM, 0 * VALUES), f"1 of 12|{VICTIM}: |constant",
         "--cache disk"),
        ("run, another", nothing, f"{RECORD}|epochs (2 there, 3 now)|{OUT}", "--outpath models --epochs 3"),
        ("checkpoint of text", write(CHECKPOINT, "x"), f"{CHECKPOINT}|state dict", "--outpath models"),
        ("history of text", write(HISTORY, "x\n"), f"{HISTORY}|columns", "--outpath models"),
        ("folds edited", folds("^1,val", "1,train"), f"{FOLDS}|is not as this run wrote", "--outpath models"),
    ],
    "heatmap": [
        ("CSV not the run's", row(f"{VICTIM},1,0003"), "data.csv|content changed"),
        ("scan missing", remove(VICTIM), f"1 of 12|{VICTIM}: no such file"),
        ("scan made anew since training", image(VICTIM, VALUES // 2), "data.csv|scans changed"),
        ("checkpoint missing", remove(CHECKPOINT), f"{CHECKPOINT}: no such checkpoint"),
        ("checkpoint cut short", cut(CHECKPOINT, 1), f"{CHECKPOINT}|not a PyTorch state dict"),
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
        ("maps of an earlier version", remove("heatmaps/LRP/map_patients_f1.nii.gz"),
         "LRP/map_patients_f1.nii.gz: no such file|earlier version|--overwrite",
         "--outpath heatmaps --save-subjects"),
        ("subjects cut short", cut("heatmaps/LRP/subjects.csv", 3), "LRP/subjects.csv|damaged",
         "--outpath heatmaps --save-subjects"),
    ],
    "predict": [
        ("CSV missing", remove("new.csv"), "new.csv: no such CSV"),
        ("CSV without paths", write("new.csv", "label,subject\n0,a\n"), "new.csv: the header needs 'path'"),
        ("CSV of three columns", write("new.csv", "new.nii,0,a\n"), "one column (path) or two|found 3"),
        ("CSV with a third label", write("new.csv", "new.nii,2\n"), "new.csv: row 1: label '2'"),
        ("scan of another shape", image("new.nii", VALUES[1:]),
         "1 of 2|new.nii: shape (93, 95, 96)|--resample|resample_to_img"),
        ("scan of another affine", image("new.nii", VALUES, OBLIQUE), "new.nii: its affine|--resample"),
        ("scan constant", image("new.nii", 0 * VALUES), "1 of 2|new.nii: |constant"),
        ("scan that every network saw", write("new.csv", f"path,subject\n{VICTIM},1e5\n"),
         f"1 scans|seen by every network of models|off the list: {VICTIM}"),
        ("checkpoint missing", remove(CHECKPOINT), f"{CHECKPOINT}: no such checkpoint"),
        ("checkpoints of another width", record(RECORD, model="modelB3"),
         "state_dict_f0.pth|features.0.weight"),
        ("published checkpoints, no --model", remove(RECORD), "run.json|--model is needed"),
        ("published checkpoints, --resample", remove(RECORD), "--resample: models holds no run.json",
         f"--model {MODEL} --resample"),
        ("published checkpoints, a gap", both(remove(RECORD), remove("models/state_dict_f0.pth")),
         "state_dict_f0.pth: no such checkpoint", f"--model {MODEL}"),
        *((f"run of an earlier version, {name}", remove(f"models/{name}"),
           f"models/{name}: no such file|{LATER}")
          for name in ("scans.csv", "typical.csv", "calibration.csv", "mean_train_f0.nii.gz",
                       "mean_train_f1.nii.gz")),
        *((f"damaged {name}", write(f"models/{name}", "fold\nx\n"), f"models/{name}|damaged")
          for name in ("scans.csv", "typical.csv", "calibration.csv", "folds.csv")),
        ("mean scan elsewhere", image("models/mean_train_f0.nii.gz", VALUES, OBLIQUE),
         "mean_train_f0.nii.gz: its grid is not"),
        ("mean scan cut short", cut("models/mean_train_f1.nii.gz", 500),
         "mean_train_f1.nii.gz: cannot be read"),
        ("mean scan of zeros", image("models/mean_train_f1.nii.gz", 0 * VALUES),
         "mean_train_f1.nii.gz: has voxels"),
        ("into a run", nothing, "--outpath models: holds a training run", "--outpath models --overwrite"),
        ("folds missing", remove(FOLDS), f"{FOLDS}: no such"),
        ("record cut short", cut(RECORD, 40), f"{RECORD}|JSON"),
        ("predictions, others", write("out/predict.json", '{"model": "modelB1"}'),
         f"predict.json|model (modelB1 there, {MODEL} now)|{OUT}"),
    ],
    "svm": [
        ("CSV missing, no run", remove("data.csv"), "data.csv: no such CSV", NO_RUN),
        ("CSV of one class, no run", csv([(path, 1) for path, _ in PLAIN]), "0 of label 0", NO_RUN),
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
    "ttest": [
        ("CSV missing, no run", remove("data.csv"), "data.csv: no such CSV"),
        ("scan cut short", cut(VICTIM, 1000), f"1 of 12|{VICTIM}|claims"),
        ("scans all the same", lambda: [image(path, VALUES)() for path, _ in PLAIN], "data.csv|the same"),
        ("run, too few controls to train on", nothing,
         "fold 0: a t-test needs 2|1 of label 0", "--modelpath models --fold 2"),
    ],
    "overlap": [
        ("map missing", remove(MAP), f"maps are missing|{MAP}"),
        ("map cut short", cut(MAP, 500), f"{MAP}|cannot be read|ended"),
        ("map of another shape", image(MAP, VALUES[1:]), f"{MAP}|(93, 95, 96)|(94, 95, 96)"),
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
    "sanity": [
        ("no record, no --model", remove(RECORD), "run.json|--path and --model"),
        ("checkpoint missing", remove(CHECKPOINT), f"{CHECKPOINT}: no such checkpoint"),
        ("scan cut short", cut(VICTIM, 1000), f"1 of 12|{VICTIM}|claims"),
        ("run, no controls to train on", folds(r"^1,train,(.*),0,", r"1,val,\1,0,"),
         "--modelpath models: fold 1 has no controls"),
        ("run, other folds", folds("^0,val", "0,train"),
         "heatmaps/GGC/map.json|another run|other folds than models"),
        ("maps of nothing but a floor", only_a_floor,
         "--maps heatmaps|expected maps of heatmap.py"),
        ("maps without a record", remove(MAP_RECORD), f"{MAP_RECORD}: no such file"),
        ("maps of other weights",
         both(remove(CHECKPOINT), lambda: os.link("models/state_dict_f0.pth", CHECKPOINT)),
         "map.json: is of another run: fold 1 of other weights than models"),
        ("record of other scans", record(MAP_RECORD, scans_sha256="other"), "different scans"),
        ("record damaged", write(MAP_RECORD, "{"), f"{MAP_RECORD}|JSON"),
        ("record of no weights", record(MAP_RECORD, weights_sha256=3), "LRP/map.json|damaged|weights_sha256"),
        ("record of an unknown method", record(MAP_RECORD, method="Saliency"), f"{MAP_RECORD}|'Saliency'"),
        ("record of an unknown rule", record(MAP_RECORD, options={"target": "label", "rule": ["beta"]}),
         f"{MAP_RECORD}|damaged|option rule is ['beta']"),
        ("record of too many steps", record("heatmaps/IG/map.json", options={"target": "label", "steps": 0}),
         "IG/map.json|damaged|option steps is 0"),
        ("record of a layer that is not there",
         record("heatmaps/GradCAM/map.json", options={"target": "label", "layer": 9}),
         "GradCAM/map.json: --layer 9|5 blocks"),
        ("record of no logit", record(MAP_RECORD, options={"target": "2"}), f"{MAP_RECORD}|damaged|target"),
        ("panel, another", write("out/sanity.json", '{"seed": 1}'),
         f"sanity.json|seed (1 there, 0 now)|{OUT}"),
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
        ("record without arguments", record(RECORD, arguments={}), f"{RECORD}|damaged"),
        ("folds missing", remove(FOLDS), f"{FOLDS}: no such"),
    ]
]
ROWS += [
    Row(command, f"{option} {name}", spoil, f"other.nii: |{words}", f"{option} other.nii")
    for command, option in [
        ("svm", "--mask"), ("ttest", "--mask"), ("overlap", "--mask"), ("overlap", "--reference"),
        ("sanity", "--mask"),
    ]
    for name, spoil, words in [
        ("missing", nothing, "no such file"),
        ("all zero", image("other.nii", 0 * BLOCK), f"{option} other.nii: |no voxel"),
        ("all NaN", image("other.nii", np.full(SHAPE, np.nan, np.float32)), "no voxel"),
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
        ("predict", "predict.json", "network_f0.csv"),
        ("svm", "SVM/map.json", "SVM/map_all.nii.gz"), ("ttest", "TTEST/map.json", "TTEST/map_f0.nii.gz"),
        ("overlap", "overlap.json", "overlap.csv"), ("sanity", "sanity.json", "sanity_f0.csv"),
        ("simulate", "cohort.json", "data.csv"),
    ]
    for name, *cells in [
        ("below a file", write("out", "mine"), "--outpath out/below|out is not a", "--outpath out/below"),
        ("without a record", write(f"out/{other}", "mine"), f"out/{other} is in the way{OUT}"),
        *[("with a file METHOD", write(f"out/{method}", ""), f"--outpath out/{method}|not a folder")
          for method, slash, _ in [other.partition("/")] if slash],
    ]
]
ROWS += [
    Row(command, f"{path}, reading forbidden", both(rewrite(path, bytes), partial(os.chmod, path, 0)),
        f"{path}|permission denied", unprivileged=True)
    for command, path in [
        ("train_cv", "data.csv"), ("train_cv", VICTIM), ("heatmap", CHECKPOINT), ("heatmap", RECORD),
        ("overlap", MAP),
    ]
]
ROWS += [
    Row(command, "--outpath, writing forbidden", lambda: Path("locked").mkdir(mode=0o555),
        "--outpath locked|written", "--outpath locked/out", unprivileged=True)
    for command in COMMANDS
]

# What lies just beyond the bounds of every number; what is no number at all is told in test_utils.py.
NUMBERS = {
    "train_cv": {
        "--batch": "0 2.5", "--fold": "1 2.5", "--lr": "0 1.01", "--wd": "-0.1 1.01", "--epochs": "0 2.5",
        "--patience": "0 2.5", "--delta": "-0.1 nan", "--val-fraction": "0 1", "--seed": "-1 4294967296 2.5",
        "--run-folds": "-1 2.5", "--workers": "-1 2.5",
    },
    "heatmap": {
        "--fold": "1 2.5", "--batch": "0 2.5", "--run-folds": "-1 2.5", "--seed": "-1 4294967296 2.5",
        "--steps": "0 2.5", "--beta": "-0.1 100.1", "--samples": "0 2.5", "--sigma": "0 -0.1 nan",
        "--layer": "2.5 last", "--size": "0 -8 nan", "--stride": "0 -4", "--part": "0/4 5/4 1 1/2/3 a/2",
    },
    "predict": {"--run-folds": "-1 2.5", "--seed": "-1 4294967296 2.5", "--part": "0/4 5/4 1 1/2/3 a/2"},
    "svm": {"--C": "0 nan", "--fold": "1 2.5", "--val-fraction": "0 1", "--seed": "-1 4294967296 2.5"},
    "ttest": {"--fold": "1 2.5", "--val-fraction": "0 1", "--seed": "-1 4294967296 2.5"},
    "overlap": {
        "--reference-threshold": "nan inf", "--smooth": "-0.1 100.1", "--rank-smooth": "-0.1 100.1",
        "--seed": "-1 2.5",
    },
    "sanity": {
        "--fold": "1 2.5", "--scans-per-fold": "0 2.5", "--repeats": "0 2.5", "--run-folds": "-1 2.5",
        "--seed": "-1 4294967296 2.5", "--part": "0/4 5/4 1 1/2/3 a/2",
    },
    "simulate": {"--subjects": "3 4.5", "--voxel": "0.9 4.1", "--seed": "-1 2.5", "--severity": "-0.1 10.1"},
}
ROWS += [
    Row(command, f"{option} {bad}", nothing, f"{option}|'{bad}'", f"{option} {bad}")
    for command, options in NUMBERS.items()
    for option, every in options.items()
    for bad in every.split()
]
OPTIONS: dict[str, dict[str, str]] = {  # what is given after the good options, or no options, and the words
    "train_cv": {
        "": "--path|required", "data.csv": "data.csv|unrecognized", "--run-folds 0 2": "--run-folds 2|0 to 1",
        "--val-fraction 0.01": "--val-fraction 0.01|both labels",
        "--split random": "--split|stratified|contiguous",
        f"--device {BEYOND}": f"--device {BEYOND}", "--device tpu": "--device tpu|cpu|cuda:N",
        "--model modelE24": "--model|modelE24|A-D", "--model modelA2": "--model|110x110x110|94x95x96",
        "--precision fp16": "--precision|fp32|bf16", "--precision tf32": "--precision tf32|cpu|use fp32",
        "--cache tape": "--cache|ram|disk", "--cache gpu": "--cache gpu|the device is cpu",
    },
    "heatmap": {
        "": "--method|required", "--method Saliency": "--method|'Saliency'|LRP|IG|GGC",
        "--method IG GGC IG": "--method: IG is named twice",
        "--baseline controls": "--baseline controls: is an option of IG, Occlusion, which is not asked for",
        "--method GGC --steps 5": "--steps 5: is an option of IG, which",
        "--beta 1 --rule composite": "--beta 1.0: is an option of LRP with --rule beta, which",
        "--rule z": "--rule|beta|composite",
        "--method GradCAM --layer 5": "--layer 5|5 blocks, 0 to 4 or -5 to -1",
        "--method GradCAM LRP --layer -6": "--layer -6|5 blocks",
        "--method Occlusion --size 1": "--size 1: is smaller than a voxel, whose longest edge is 2 mm",
        "--method Occlusion --stride 17": "--stride 17: leaves gaps between cubes of 16 mm",
        "--baseline mean": "--baseline|zero|controls",
        "--target 2": "--target|label|predicted", "--weights none": "--weights|trained|random",
        "--model modelB1": f"--model modelB1|{MODEL}", "--fold 3": "--fold 3|2 folds",
        "--run-folds 2": "--run-folds 2|0 to 1", f"--device {BEYOND}": f"--device {BEYOND}",
        "--modelpath none": "--modelpath none|no such folder",
        "--modelpath scans": "--modelpath scans|run.json|--path and --model",
        "--part 1/2 --overwrite": "--overwrite: one of several",
        "--scans new.csv": "--path data.csv: is of the run's own scans, which --scans does not ask for",
        "--resample": "--resample: is an option of --scans",
    },
    "predict": {
        "": "--path|required", "--modelpath none": "--modelpath none|no such folder",
        "--modelpath scans": "--modelpath scans|run.json|--model is needed",
        f"--modelpath scans --model {MODEL}": "--modelpath scans: holds no state_dict_f0.pth",
        "--model modelB1": f"--model modelB1|{MODEL}", "--run-folds 2": "--run-folds 2|0 to 1",
        f"--device {BEYOND}": f"--device {BEYOND}", "--part 1/2 --overwrite": "--overwrite: one of several",
    },
    "svm": {
        "--fold 3": "--fold 3|2", "--split contiguous": "--split contiguous|stratified",
        "--split random": "--split|stratified|contiguous", "--val-fraction 0.5": "--val-fraction 0.5|0.34",
        "--seed 7": "--seed 7|trained with 3",
    },
    "ttest": {
        "--modelpath models": "--fold 4|trained with 2", "--split random": "--split|stratified|contiguous",
        "--val-fraction 0.01": "--val-fraction 0.01|both labels",
    },
    "overlap": {
        "": "--reference|required", "--maps none": "--maps none|METHOD",
        "--maps scans": "--maps scans|METHOD",
        "--reference-threshold 1": "--reference truth.nii|no voxel|above 1",
        "--reference-threshold -1": "--reference truth.nii|every voxel|above -1",
    },
    "sanity": {
        "--scans-per-fold 7": "--scans-per-fold 7: fold 0 has 6 test scans",
        "--orders down": "--orders|output|input|alone",
        "--maps none": "--maps none|METHOD", "--modelpath none": "--modelpath none|no such folder",
        "--second-run scans": "--second-run scans: holds no run.json",
        "--second-run models": "--second-run models: has the same networks as models",
        "--model modelB1": f"--model modelB1|{MODEL}", "--fold 3": "--fold 3|2 folds",
        "--run-folds 2": "--run-folds 2|0 to 1", f"--device {BEYOND}": f"--device {BEYOND}",
        "--part 1/2 --overwrite": "--overwrite: one of several",
    },
    "simulate": {"": "--outpath|required"},
}
ROWS += [
    Row(command, options or "no options", nothing, words, options, alone=not options)
    for command, every in OPTIONS.items()
    for options, words in every.items()
]
ROWS += [
    Row("heatmap", f"new scans, {name}", spoil, words, f"{NEW} {options}", alone=True)
    for name, spoil, words, options in [
        ("into the run's own maps", nothing, "--outpath heatmaps: GGC there has maps of a run's own scans",
         "--outpath heatmaps"),
        ("random weights", nothing, "--weights random: needs the run's own scans", "--weights random"),
        ("--target label without labels", nothing, "--target label: 2 of 2 scans have no label",
         "--target label"),
        ("--fold", nothing, "--fold 2: is of the run's own scans", "--fold 2"),
        ("no mean of controls", remove("models/mean_controls_f1.nii.gz"),
         f"--baseline controls: models/mean_controls_f1.nii.gz is not there|{LATER}",
         "--method IG --baseline controls"),
        ("calibration missing", remove("models/calibration.csv"), "models/calibration.csv: no such file", ""),
    ]
]
ROWS += [
    Row("svm", "no --path, no run", nothing, "--modelpath none|--path", "--modelpath none", alone=True),
    Row("ttest", "no --path, no run", nothing, "--modelpath none|--path", "--modelpath none", alone=True),
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
    write_scan(here / "new.nii", VALUES // 2)
    (here / "new.csv").write_text("new.nii\nscans/001.nii\n")
    record(RECORD, csv=str(here / "data.csv"))()
    return here


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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.command} | {row.name}")
def test_malformed_input_is_one_line(row: Row, world, capsys, caplog, recwarn):
    row.spoil()
    before = snapshot(world)
    argv = f"{'' if row.alone else GOOD[row.command]} {row.options}".split()
    main = COMMANDS[row.command].main
    status = unprivileged(lambda: main(argv)) if row.unprivileged else main(argv)
    captured = capsys.readouterr()
    assert status == 2, captured.err
    line = only_error(captured.err)
    print(line.removeprefix("error: ").rstrip().replace(f"{world}/", ""))
    assert [word for word in row.words.split("|") if word.lower() not in line.lower()] == [], line
    after = snapshot(world)
    assert [path.name for path in before | after if before.get(path) != after.get(path)] == []
    hidden = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
    assert [str(w.message) for w in recwarn if not issubclass(w.category, hidden)] + caplog.messages == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_named_in_a_message(command):
    parser: argparse.ArgumentParser = COMMANDS[command].get_parser()
    options = {action.option_strings[0] for action in parser._actions if action.nargs != 0}
    words = " ".join(row.words for row in ROWS if row.command == command).replace(OUT, "")
    named = set(re.findall(r"--[\w-]+", words))
    assert options <= named
