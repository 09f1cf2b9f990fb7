#!/usr/bin/env python3
"""Hold the commands as torchrun starts them, and in parts, against a single process each.

    python3 bench/sharing.py

Compared are all files, byte for byte, but for the column `seconds` of history_f*.csv. The records (JSON) say
nothing else after the last process than after a single one. Every process has one thread, as sums depend
on how many there are. In the last row one of torchrun's processes is killed, which ends the others after
their epoch; then the same command is typed again.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
if hasattr(os, "sched_setaffinity"):  # so that each of two processes has one thread as well
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

import pandas as pd
from torture import CHECK, EXPLAIN, TRAIN, command, differences, finish, start

import simulate
import utils

PROCESSES = (2, 5)


def torchrun(words: list[str], processes: int) -> list[str]:
    """A command as torchrun starts it."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *words[1:]]


def in_parts(words: list[str], parts: int) -> list[str]:
    """A shell's command line that runs all parts of a command at once."""
    jobs = "; ".join(f'"$@" --part {number}/{parts} & pids="$pids $!"' for number in range(1, parts + 1))
    return ["sh", "-c", f"{jobs}; for pid in $pids; do wait $pid || exit; done", "sh", *words]


def timed(words: list[str]) -> float:
    """Seconds that a command takes."""
    begin = time.perf_counter()
    finish(start(words))
    return time.perf_counter() - begin


def kill_one(words: list[str], folder: Path) -> None:
    """Start a command by torchrun, and kill one of its processes while it trains."""
    job = start(words)
    while not list(folder.glob("progress_f*.pth")):
        if job.poll() is not None:
            raise SystemExit(f"{words}: ended before it was killed")
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(job.pid)], stdout=subprocess.PIPE, text=True, check=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    printed, _ = job.communicate()
    if job.returncode == 0:
        raise SystemExit(f"{words}: ended well though one of its processes was killed\n{printed}")


def main() -> int:
    """Run everything in one process, then shared; print one table. Status 1 where anything differs."""
    utils.ArgumentParser(__doc__).parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        simulate.main(["--outpath", str(top / "cohort"), "--subjects", "20", "--voxel", "2"])
        work: dict[str, Callable[[Path], list[str]]] = {
            "train_cv.py": lambda to: command(
                "train_cv.py", "--path", top / "cohort" / "data.csv", *TRAIN, "--outpath", to
            ),
            "heatmap.py": lambda to: command(
                "heatmap.py", "--modelpath", top / "train_cv.py", *EXPLAIN, "--outpath", to
            ),
            "predict.py": lambda to: command(
                "predict.py", "--path", top / "cohort" / "data.csv", "--modelpath", top / "train_cv.py",
                "--device", "cpu", "--outpath", to,
            ),
            "sanity.py": lambda to: command(
                "sanity.py", "--modelpath", top / "train_cv.py", "--maps", top / "heatmap.py",
                *CHECK, "--scans-per-fold", 2, "--outpath", to,
            ),
        }  # fmt: skip

        def compare(what: str, how: str, seconds: float, folder: Path) -> None:
            files, wrong = differences(folder, top / what)
            row = {"command": what, "how": how, "s": seconds, "files compared": files, "differences": wrong}
            rows.append(row)
            print(row, flush=True)

        for what, words in work.items():
            compare(what, "one process", timed(words(top / what)), top / what)
            for processes in PROCESSES:
                folder = top / f"{what} {processes}"
                compare(what, f"torchrun, {processes}", timed(torchrun(words(folder), processes)), folder)
            if what != "train_cv.py":
                folder = top / f"{what} parts"
                compare(what, "--part i/3", timed(in_parts(words(folder), 3)), folder)
        folder, again = top / "killed", torchrun(work["train_cv.py"](top / "killed"), 2)
        kill_one(again, folder)
        compare("train_cv.py", "torchrun, 2, one killed, again", timed(again), folder)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.0f}".format))
    return int(table["differences"].sum() > 0)


if __name__ == "__main__":
    sys.exit(main())
