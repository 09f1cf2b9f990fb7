#!/usr/bin/env python3
"""Show how time and memory of the commands grow with subjects, steps and voxels.

    python3 bench/slopes.py

Every row is a command in a process of its own, on simulated cohorts, without a cache, with the seconds it
took and the most memory it held. `per unit` is what it took more than the row before, per subject, step
or million voxels more.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

SUITE = Path(__file__).resolve().parents[1]
MODEL, SUBJECTS, STEPS, VOXELS = "modelB8", (20, 40, 80), (25, 50, 100), (2, 1.5, 1)
SCANS = (20, 502)  # of the SVM


def run(script: str, *options: object) -> tuple[float, float]:
    """Seconds and peak GB of one command of the suite."""
    begin = time.perf_counter()
    command = [sys.executable, str(SUITE / script), *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e9


def train(csv: Path, models: Path) -> tuple[float, float]:
    """Two epochs of one fold of two."""
    folds = ["--fold", 2, "--run-folds", 0, "--val-fraction", 0.4, "--epochs", 2]
    options = ["--model", MODEL, "--device", "cpu", "--cache", "none", *folds]
    return run("train_cv.py", "--path", csv, "--outpath", models, *options)


def explain(models: Path, method: str, *options: object) -> tuple[float, float]:
    """Half of the cohort, the test scans of that fold."""
    where = ["--modelpath", models, "--outpath", models / "heatmaps", "--run-folds", 0, "--overwrite"]
    return run("heatmap.py", "--method", method, "--device", "cpu", *where, *options)


def measure(folder: Path) -> Iterator[tuple[object, ...]]:
    """What was run, how much of it, seconds and GB."""
    run("simulate.py", "--outpath", folder, "--subjects", max(SUBJECTS), "--voxel", 2)
    lines = (folder / "data.csv").read_text().splitlines(keepends=True)
    for count in SUBJECTS:
        csv = folder / f"{count}.csv"
        csv.write_text("".join(lines[: count + 1]))
        yield "train_cv.py, subjects", count, *train(csv, folder / f"models{count}")
    for count in SUBJECTS:
        yield "heatmap.py --method LRP, subjects", count / 2, *explain(folder / f"models{count}", "LRP")
    for steps in STEPS:
        yield "heatmap.py --method IG, steps", steps, *explain(folder / "models20", "IG", "--steps", steps)
    for voxel in VOXELS:  # in mm
        part = folder / f"voxel{voxel}"
        run("simulate.py", "--outpath", part, "--subjects", 10, "--voxel", voxel)
        train(part / "data.csv", part / "models")
        million = 193 * 229 * 193 / voxel**3 / 1e6
        yield "heatmap.py --method LRP, million voxels", million, *explain(part / "models", "LRP")
    yield from measure_comparison(folder / "full")


def measure_comparison(folder: Path) -> Iterator[tuple[object, ...]]:
    """SVM and overlap at the published grid, 193 x 229 x 193 voxels of 1 mm, with five folds.

    As many scans as the paper's are 20 scans, each listed many times by links to it: decoding
    and inner products do not care.
    """
    run("simulate.py", "--outpath", folder, "--subjects", 20, "--voxel", 1)
    rows = [line.split(",") for line in (folder / "data.csv").read_text().splitlines()[1:]]
    for count in SCANS:
        links = [f"scans/link{i:03d}.nii.gz" for i in range(count)]
        for i, link in enumerate(links):
            (folder / link).unlink(missing_ok=True)
            (folder / link).symlink_to(folder / rows[i % len(rows)][0])
        csv = folder / f"{count}.csv"
        csv.write_text("".join(f"{link},{rows[i % len(rows)][1]}\n" for i, link in enumerate(links)))
        where = ["--path", csv, "--modelpath", folder / "none", "--outpath", folder / f"svm{count}"]
        yield "svm.py at 1 mm, scans", count, *run("svm.py", *where)
    run("train_cv.py", "--path", folder / "data.csv", "--outpath", folder / "models", "--model", MODEL,
        "--epochs", 1, "--device", "cpu")  # fmt: skip
    maps = ["--modelpath", folder / "models", "--outpath", folder / "maps"]
    run("svm.py", *maps)
    compare = [
        "--maps",
        folder / "maps",
        "--reference",
        folder / "truth.nii.gz",
        "--mask",
        folder / "mask.nii.gz",
    ]
    folders = 1
    for method in ("LRP", "GGC"):
        for weights in ("trained", "random"):
            run("heatmap.py", "--method", method, "--weights", weights, "--device", "cpu", *maps)
        folders += 2
        yield "overlap.py at 1 mm, METHOD folders", folders, *run("overlap.py", *compare, "--overwrite")


def main() -> int:
    """Measure, print one table."""
    with tempfile.TemporaryDirectory() as folder:
        columns = ["command, what grows", "count", "seconds", "GB"]
        table = pd.DataFrame(measure(Path(folder)), columns=columns)
    steps = table.groupby(columns[0], sort=False)[["count", "seconds"]].diff()
    table["s per unit"] = steps["seconds"] / steps["count"]
    print(table.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
