#!/usr/bin/env python3
"""Kill the commands at random moments, type them again, and compare with runs that nobody disturbed.

    python3 bench/torture.py --kills 20

Every kill is a SIGKILL of the process, not of those that read scans for it. Compared are all files, byte for
byte, but for the column `seconds` of history_f*.csv.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

SUITE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SUITE))

os.environ["OMP_NUM_THREADS"] = "1"  # four processes at once would fight for the cores

import simulate  # noqa: E402
import utils  # noqa: E402

K = 5
TRAIN = ["--model", "modelB2", "--fold", K, "--epochs", 3, "--batch", 3, "--lr", 1e-3, "--device", "cpu"]
TRAIN += ["--cache", "none", "--workers", 2]  # processes that outlive a killed parent for a while
EXPLAIN = ["--method", "LRP", "--save-subjects", "--device", "cpu"]
CHECK = ["--scans-per-fold", 1, "--repeats", 1, "--device", "cpu", "--orders"]
ROUNDS = 3  # of the job array


def command(script: str, *options: object) -> list[str]:
    """A command of the suite, as one types it."""
    return [sys.executable, str(SUITE / script), *map(str, options)]


def start(words: list[str]) -> subprocess.Popen:
    """Start a command; what it prints is kept for `finish`."""
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait until a command ends, and insist that it went well."""
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args!r}: status {process.returncode}\n{printed}")


def killed(process: subprocess.Popen, dice: random.Random) -> bool:
    """Kill a process up to three seconds after it took a lock; False where it ended before."""
    while process.poll() is None and not holds_a_lock(process.pid):
        time.sleep(0.01)
    time.sleep(dice.uniform(0, 3))
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def holds_a_lock(pid: int) -> bool:
    """Whether a process has begun to work on a folder, as the kernel's list of locks says."""
    return any(line.split()[4] == str(pid) for line in Path("/proc/locks").read_text().splitlines())


def content(file: Path) -> bytes:
    """What is compared of a file."""
    if file.name.startswith("history"):
        return pd.read_csv(file, dtype=str).drop(columns="seconds").to_csv().encode()
    return file.read_bytes()


def differences(folder: Path, expected: Path) -> tuple[int, int]:
    """How many files two folders have between them, and how many of those differ or lack in one."""
    names = {f.relative_to(top) for top in (folder, expected) for f in top.rglob("*") if f.is_file()}
    pairs = [(folder / name, expected / name) for name in names]
    same = [one.exists() and two.exists() and content(one) == content(two) for one, two in pairs]
    return len(names), same.count(False)


def torture(words: list[str], folder: Path, expected: Path, kills: int, dice: random.Random) -> list[int]:
    """Kill a command again and again, begin anew when it got through; returns a row of the table."""
    hits = resumes = compared = different = 0
    while hits < kills:
        shutil.rmtree(folder, ignore_errors=True)
        while killed(start(words), dice):
            hits, resumes = hits + 1, resumes + 1
            if hits >= kills:
                break
        finish(start(words))
        files, wrong = differences(folder, expected)
        compared, different = compared + files, different + wrong
    return [hits, resumes, compared, different]


def torture_array(words: list[str], folder: Path, expected: Path, dice: random.Random) -> list[int]:
    """Four processes on five folds, one of them killed and typed again; returns a row of the table."""
    hits = compared = different = 0
    for _ in range(ROUNDS):
        shutil.rmtree(folder, ignore_errors=True)
        jobs = [[*words, "--run-folds", *folds] for folds in (["0"], ["1"], ["2"], ["3", "4"])]
        array = [start(job) for job in jobs]
        victim = dice.randrange(len(jobs))
        while not list(folder.glob("progress_f*.pth")):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 3))
        hits += array[victim].poll() is None
        array[victim].kill()
        array[victim].communicate()
        array[victim] = start(jobs[victim])
        for process in array:
            finish(process)
        files, wrong = differences(folder, expected)
        compared, different = compared + files, different + wrong
    return [hits, ROUNDS, compared, different]


def main() -> int:
    """Run everything undisturbed once, then disturbed; print one table. Status 1 where anything differs."""
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("--kills", type=utils.bounded(int, at_least=1), default=20, help="of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args: argparse.Namespace = parser.parse_args()
    dice, rows = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        simulate.main(["--outpath", str(top / "cohort"), "--subjects", "20", "--voxel", "2"])
        train = command("train_cv.py", "--path", top / "cohort" / "data.csv", *TRAIN, "--outpath")
        explain = command("heatmap.py", "--modelpath", top / "run", *EXPLAIN, "--outpath")
        finish(start([*train, str(top / "run")]))
        finish(start([*explain, str(top / "maps")]))
        runs, maps = (top / "run", top / "run again"), (top / "maps" / "LRP", top / "maps again" / "LRP")
        rows["train_cv.py"] = torture([*train, str(runs[1])], runs[1], runs[0], args.kills, dice)
        rows["heatmap.py"] = torture([*explain, str(maps[1].parent)], maps[1], maps[0], args.kills, dice)
        check = command("sanity.py", "--modelpath", top / "run", "--maps", top / "maps", *CHECK, "--outpath")
        finish(start([*check, str(top / "panel")]))
        panels = top / "panel", top / "panel again"
        rows["sanity.py"] = torture([*check, str(panels[1])], panels[1], panels[0], args.kills, dice)
        rows["job array of 4"] = torture_array([*train, str(runs[1])], runs[1], runs[0], dice)
    columns = ["kills", "resumes", "files compared", "differences"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    print(table.to_string())
    return int(table["differences"].sum() > 0)


if __name__ == "__main__":
    sys.exit(main())
