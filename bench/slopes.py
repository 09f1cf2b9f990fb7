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
    options = [
        "--path",
        csv,
        "--outpath",
        models,
        "--model",
        MODEL,
        "--fold",
        2,
        "--run-folds",
        0,
        "--val-fraction",
        0.4,
    ]
    return run("train_cv.py", *options, "--epochs", 2, "--device", "cpu", "--cache", "none")


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
