#!/usr/bin/env python3
"""Check a device: what it computes, against float64 on the CPU; how fast; and whether it waits for scans.

    python3 bench/device.py --device 0          (or: make device DEVICE=0)
    python3 bench/device.py --device cpu

A small network of every family, on the smallest scans it takes: LRP, IG (one step), guided Grad-CAM, and, in
every precision that the device has, the forward pass and the gradients of a training step. `difference` is
|found - exact| / |exact|; a row is wrong where it is larger than `at most` (`selfcheck.TOLERANCES` says why).
Then a few epochs of training on simulated scans, kept where --cache says and in main memory: the share of the
time that the training loop waited for scans. A GPU has a step to do meanwhile, so it waits no longer than
that. Status 1 where a row is wrong or failed.
"""

import argparse
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dataset
import models
import selfcheck
import simulate
import training
import utils
from internals import caches, devices, process
from internals.errors import InputError
from internals.loading import Loader

EPOCHS = 3  # the first one warms up


class Timed:
    """A loader, and the seconds that were spent in waiting for its batches."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.dataset, self.seconds = loader, loader.dataset, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - begin
            if batch is None:
                return
            yield batch


def precisions(device: torch.device) -> list[str]:
    """The precisions that a device has."""
    having = []
    for name in devices.PRECISIONS:
        try:
            devices.set_precision(device, name)
            having.append(name)
        except InputError:
            pass
    return having


def check_numbers(device: torch.device, names: list[str]) -> list[selfcheck.Check]:
    """Every network, every piece of work."""
    having = precisions(device)
    work = [selfcheck.checks(device, name, having) for name in names]
    bar = utils.progress(itertools.chain(*work), len(names) * (2 * len(having) + len(selfcheck.MAPS)))
    return list(bar)


def table(checks: list[selfcheck.Check]) -> str:
    """The rows as people read them, and what the rows that failed ended with."""
    rows = pd.DataFrame(
        {
            "network": check.model,
            "work": check.work,
            "precision": check.precision,
            "difference": check.difference,
            "at most": check.tolerance,
            "s": check.seconds,
            "GB": check.bytes / 1e9 if check.bytes else math.nan,
            "verdict": "right" if check.passed else "FAILED" if check.problem else "WRONG",
        }
        for check in checks
    )
    lines = [rows.to_string(index=False, float_format="{:.2g}".format, na_rep="")]
    lines += [f"{check.model}, {check.work}: {check.problem}" for check in checks if check.problem]
    return "\n".join(lines)


def share_of_waiting(device: torch.device, name: str, subjects: int, voxel: float, cache: str) -> str:
    """Train on a simulated cohort for a few epochs; say how much of the time the loop waited for scans."""
    with tempfile.TemporaryDirectory() as folder:
        simulate.main(["--outpath", folder, "--subjects", str(subjects), "--voxel", str(voxel)])
        cohort = dataset.new_cohort(Path(folder) / "data.csv", 2, "contiguous", 0, 0)
        scans = cohort.open_scans(caches.Cache(cache, Path(folder) / "cache", device))
        loader = Timed(scans.loader(list(range(subjects)), 4, seed=0, device=device))
        state = training.new_state(models.build_model(name, cohort.grid.shape), 1e-4, 1e-4, device)
        for epoch in range(EPOCHS):
            if epoch == 1:
                loader.seconds, begin = 0.0, time.perf_counter()
            training.train_epoch(state, loader, "fp32", "")  # type: ignore[arg-type]
        selfcheck.synchronise(device)
        seconds = time.perf_counter() - begin
    steps = (EPOCHS - 1) * len(loader)
    shape = "x".join(map(str, cohort.grid.shape))
    return (
        f"training, {name}, 4 of {subjects} scans of {shape} a step, --cache {cache}: "
        f"{seconds / steps:.3g} s a step, {loader.seconds / seconds:.1%} of it waiting for scans"
    )


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="as in train_cv.py")
    add("--model", nargs="+", default=[f"model{family}4" for family in models.FAMILIES], help="networks")
    add("--training-model", default="modelB8", help="network of the training run")
    add("--subjects", type=utils.bounded(int, at_least=4), default=16, help="simulated scans to train on")
    add("--voxel", type=utils.bounded(float, above=0), default=2, help="their voxels, mm")
    add("--cache", choices=caches.KINDS, default="auto", help="where they are kept, as in train_cv.py")
    return parser


@utils.command("nothing is saved")
def main(argv: list[str] | None = None) -> int:
    """Check the numbers, print the table, train for a moment."""
    args = get_parser().parse_args(argv)
    process.keep_freed_memory()
    device = devices.resolve_device(args.device)  # and no more: here MPS is checked at length
    described = ", ".join(f"{key} {value}" for key, value in devices.describe(device).items())
    print(f"{described}; PyTorch {torch.__version__}")
    for fault in sorted(
        {fault for name in precisions(device) for fault in devices.known_faults(device, name)}
    ):
        print(f"warning: {fault}")
    found = check_numbers(device, args.model)
    print(f"\n{table(found)}\n")
    devices.set_precision(device, "fp32")
    with process.out_of_memory(f"training on {device}", "take fewer --subjects or larger --voxel"):
        for cache in dict.fromkeys([args.cache, "ram"]):
            print(share_of_waiting(device, args.training_model, args.subjects, args.voxel, cache))
    wrong = sum(not check.passed for check in found)
    print(
        f"{wrong} of {len(found)} rows are not right: do not use this device"
        if wrong
        else "all rows are right"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
