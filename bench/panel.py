#!/usr/bin/env python3
"""Time and memory of checking one scan of 193 x 229 x 193 voxels, METHOD by METHOD (modelA24, untrained).

    python3 bench/panel.py --method Gradient LRP

Each row is a process of its own: one scan of one of two folds, all layers drawn anew once. That is four maps,
and 100 forward passes of covered scans. docs/sanity.md says how many a scan takes by default.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

SUITE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SUITE))

import dataset  # noqa: E402
import simulate  # noqa: E402
import voxelwise  # noqa: E402
from checking import Panel, Recipe  # noqa: E402
from internals import process  # noqa: E402
from internals.caches import Cache  # noqa: E402
from methods import METHODS  # noqa: E402
from runs import Run, UntrainedNetworks  # noqa: E402

MODEL, SUBJECTS = "modelA24", 8
VARIANTS = {"LRP-composite": ("LRP", {"rule": "composite"}), "IG-controls": ("IG", {"baseline": "controls"})}


def check(name: str, folder: Path) -> None:
    """Check one scan by one METHOD; print the seconds of a map, how many there were, and of all."""
    process.keep_freed_memory()
    cohort = dataset.new_cohort(folder / "data.csv", 2, "stratified", 0.5, seed=0)
    method_name, options = VARIANTS.get(name, (name, {}))
    method, seconds = METHODS[method_name], list[float]()

    def timed(*args: Any, **given: Any) -> torch.Tensor:
        begin = time.perf_counter()
        maps = method(*args, **given)
        seconds.append(time.perf_counter() - begin)
        return maps

    recipe = Recipe(replace(method, function=timed), method.chosen(options), "label", 0)
    networks: Any = UntrainedNetworks(Run(folder, cohort, MODEL), 0)
    brain = voxelwise.read_mask(folder / "mask.nii.gz", cohort.grid)
    scans, device = cohort.open_scans(Cache("none", folder / "cache")), torch.device("cpu")
    panel = Panel({name: recipe}, networks, None, scans, brain, [], 1, 0, device)
    begin = time.perf_counter()
    next(iter(panel.check_fold(0, cohort.scan_indices(0, "test")[:1])))
    print(sum(seconds) / len(seconds), len(seconds), time.perf_counter() - begin)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """A row of the table: `check` in a process of its own."""
    command = [sys.executable, __file__, "--check", name, "--cohort", str(folder)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    printed = running.stdout.read() if running.stdout else ""
    _, status, usage = os.wait4(running.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    one, count, total = map(float, printed.splitlines()[-1].split())
    return {
        "METHOD": name,
        "one map, s": one,
        "maps": int(count),
        "the rest, s": total - one * count,
        "peak, GB": usage.ru_maxrss * 1024 / 1e9,
    }


def main() -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*METHODS, *VARIANTS]
    parser.add_argument("--method", nargs="+", choices=names, default=names, help="only these")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--cohort", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        check(args.check, args.cohort)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        simulate.main(["--outpath", folder, "--subjects", str(SUBJECTS), "--voxel", "1"])
        rows = [measure(name, Path(folder)) for name in args.method]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
