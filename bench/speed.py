#!/usr/bin/env python3
"""Measure the suite against the published way, side by side.

    python3 bench/speed.py            (193 x 229 x 193 voxels, modelA24 and modelB44)
    python3 bench/speed.py --quick    (97 x 115 x 97 voxels, modelB8)
    python3 bench/speed.py --device 0

On a CPU each piece of work has a process of its own, as the memory it takes is that of a process.

The references stand in references.py. Every piece of work is done once to warm up and once for the
clock, but what is linear in its steps: the reference's 100 steps of integrated gradients are 50 times
two steps, ours the line through 2 and 10 steps, and so with SmoothGrad's 25 samples. captum's Occlusion runs
the network once per cube: it is timed with 27 cubes of 80 mm and multiplied, ours is timed with all cubes of
16 mm; compared are both maps of the large cubes. Peak memory is the process's largest resident set on a
CPU, PyTorch and the scan included, and torch's largest allocation on a GPU. The difference is the
largest one between both results, relative to the reference's largest value, and "voxels off" the share
of voxels that differ by more than 1e-5 of it: float32 rounds two ways of adding up differently, and
where two voxels of a pool's window nearly tie, the other one wins. For IG it is that of two steps
without the one at alpha = 0, where the image is blank, all windows are tied, and autograd's maxima are
rounding noise. The difference of a training step is that of the first convolution's gradient.

"with logits" is a map as heatmap.py makes it, with one forward pass before; the published way has its logits
from the map's own. "autocast" is PyTorch's, bfloat16 on the plain network, beside our bf16: both are compared
with the plain network in float32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import references

import dataset
import ggc
import gradient
import ig
import lrp
import models
import occlusion
import selfcheck
import simulate
import training
import utils
from internals import checkpoints, process
from internals.caches import Cache

TARGETS = {  # work: at least so many times faster, at most this share of the memory, on a CPU
    "IG, 100 steps": (10, 0.6),
    "IG, 100 steps, other baseline": (5, 1),
    "LRP": (6, 1 / 3),
    "LRP with logits": (4, 0.6),
    "GGC": (4, 0.6),
    "GGC with logits": (3, 0.9),
    "Gradient": (4, 0.6),
    "InputXGradient": (4, 0.6),
    "GradCAM": (1.5, 0.6),
    "SmoothGrad, 25 samples": (4, 1),
    "LRP composite": (3, 0.6),
    "Occlusion, 16 mm cubes": (5, 1),
    "training step, bf16": (3, 0.6),
    "training step, autocast": (np.nan, np.nan),  # nothing of ours
    "training step, fp32": (1.3, 1),
}
STEPS = (2, 10)  # of what is linear in its steps
REPEATED = {"IG, 100 steps": 100, "IG, 100 steps, other baseline": 100, "SmoothGrad, 25 samples": 25}
# in mm
CUBES: dict[str, dict[str, Any]] = {"large": {"size": 80, "stride": 80}, "small": {"size": 16, "stride": 8}}
READS = 20  # of a scan
READING = {
    "reading a scan, cache in memory": "ram",
    "reading a scan, cache on disk": "disk",
    "reading a scan, cache on disk, every voxel looked at": "disk",
}


# One piece of work, in a process of its own ------------------------------------------------------


def explain(work: str, side: str, model: models.CNN3d, volume: Tensor, steps: int) -> Tensor:
    """The map of one scan by one method, (1, 1, X, Y, Z)."""
    target = torch.ones(len(volume), dtype=torch.int64, device=volume.device)
    ours = side == "ours"
    if ours and work.endswith("with logits"):
        with torch.no_grad():
            model(volume)
    mine, published = MAPS[work.removesuffix(" with logits")]
    return (mine if ours else published)(model, volume, target, steps)


def repeated(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A method that takes the number of its steps last."""
    return lambda model, volume, target, steps: function(model, volume, target, steps, **options)


def single(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A method without steps."""
    return lambda model, volume, target, steps: function(model, volume, target, **options)


def from_baseline(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Integrated gradients from the mirrored scan at half its brightness."""
    return lambda model, volume, target, steps: function(model, volume, target, steps, 0.5 * volume.flip(2))


MAPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {  # ours and the reference
    "IG, 100 steps": (repeated(ig.integrated_gradients), repeated(references.integrated_gradients)),
    "IG, 100 steps, other baseline": (
        from_baseline(ig.integrated_gradients),
        from_baseline(references.integrated_gradients),
    ),
    "LRP": (single(lrp.lrp), single(references.lrp)),
    "LRP composite": (single(lrp.lrp, rule="composite"), single(references.composite_lrp)),
    "GGC": (single(ggc.guided_gradcam), single(references.guided_gradcam)),
    "GradCAM": (single(ggc.gradcam), single(references.gradcam)),
    "Gradient": (single(gradient.gradient), single(references.gradient)),
    "InputXGradient": (single(gradient.input_times_gradient), single(references.input_times_gradient)),
    "SmoothGrad, 25 samples": (repeated(gradient.smoothgrad), repeated(references.smoothgrad)),
    "Occlusion, 16 mm cubes": (
        single(occlusion.occlusion, **CUBES["large"]),
        single(references.occlusion, edge=CUBES["large"]["size"]),
    ),
}


def train(work: str, side: str, model: models.CNN3d, volume: Tensor, steps: int) -> Tensor:
    """Training steps on one scan; returns the gradient of the first convolution's weights in the last."""
    label = torch.ones(len(volume), dtype=torch.int64, device=volume.device)
    if side == "reference" or work.endswith("autocast"):
        dtype = torch.float32 if side == "reference" else torch.bfloat16
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
        for _ in range(steps):
            references.training_step(model, optimiser, volume, label, dtype)
    else:
        state = training.new_state(model, 1e-4, 0, volume.device)
        # a generator of its own, so that both sides draw the same dropout
        loader = DataLoader(TensorDataset(volume, label), generator=torch.Generator())
        for _ in range(steps):
            training.train_epoch(state, loader, work.split()[-1], work)
    gradient = model.blocks()[0].conv.weight.grad
    assert gradient is not None
    return gradient


def measure(work: str, side: str, model: models.CNN3d, volume: Tensor) -> tuple[float, Tensor]:
    """Seconds that one piece of work takes, and its result."""
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    do: Callable[..., Tensor] = train if work.startswith("training") else explain

    def timed(steps: int) -> tuple[float, Tensor]:
        model.load_state_dict(weights)
        torch.manual_seed(0)  # of dropout
        selfcheck.synchronise(volume.device)
        begin = time.perf_counter()
        result = do(work, side, model, volume, steps)
        selfcheck.synchronise(volume.device)
        return time.perf_counter() - begin, result

    if work.startswith("Occlusion"):
        few, result = timed(1)
        return few * cube_ratio(volume) if side == "reference" else time_small_cubes(model, volume), result
    if work not in REPEATED:
        timed(1)
        return timed(1)
    _, first = timed(1)
    few, result = timed(STEPS[0])
    result = STEPS[0] * result - (first if work == "IG, 100 steps" else 0)
    if side == "reference":
        return REPEATED[work] / STEPS[0] * few, result
    many, _ = timed(STEPS[1])
    slope = (many - few) / (STEPS[1] - STEPS[0])
    return few + (REPEATED[work] - STEPS[0]) * slope, result


def cube_ratio(volume: Tensor) -> float:
    """How many passes of the network the small cubes take for one of the large ones, the scan's included.

    A scan of 193 voxels along an axis has voxels of 1 mm, one of 97 voxels of 2 mm.
    """
    sizes = voxel_sizes(volume)
    counts = []
    for cubes in CUBES.values():
        edges, steps = occlusion.cube_in_voxels(cubes["size"], cubes["stride"], sizes)
        starts = [
            max(-(-(n - e) // s), 0) + 1 for n, e, s in zip(volume.shape[2:], edges, steps, strict=True)
        ]
        counts.append(1 + int(np.prod(starts)))
    return counts[1] / counts[0]


def voxel_sizes(volume: Tensor) -> tuple[float, float, float]:
    """Of a simulated scan, in mm: it spans 193 mm from left to right."""
    return (float(round(193 / volume.shape[2])),) * 3


def time_small_cubes(model: models.CNN3d, volume: Tensor) -> float:
    """Seconds of the whole map of small cubes."""
    target = torch.ones(len(volume), dtype=torch.int64, device=volume.device)
    begin = time.perf_counter()
    occlusion.occlusion(model, volume, target, **CUBES["small"], voxel_sizes=voxel_sizes(volume))
    selfcheck.synchronise(volume.device)
    return time.perf_counter() - begin


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # not getrusage's ru_maxrss, which a process takes over from the one that started it
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def costliest(work: str, model: models.CNN3d, volume: Tensor) -> str:
    """The three operations that take most of a piece of work, with their shares of its time."""
    kind = torch.profiler.ProfilerActivity
    cuda = volume.device.type == "cuda"
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if cuda else [kind.CPU]) as profile:
        (train if work.startswith("training") else explain)(
            work, "ours", model, volume, 1 if work.startswith("training") else STEPS[1]
        )
        selfcheck.synchronise(volume.device)

    def cost(event: Any) -> float:
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    events = sorted(profile.key_averages(), key=cost, reverse=True)
    total = sum(map(cost, events))
    return ", ".join(f"{event.key} {cost(event) / total:.0%}" for event in events[:3])


def load_scan(scan: Path, device: torch.device) -> Tensor:
    """A scan as the networks read it, (1, 1, X, Y, Z)."""
    return torch.from_numpy(dataset.read_scan(scan))[None, None].to(device)


def save_weights(name: str, scan: Path, path: Path) -> None:
    """Weights with BatchNorm parameters and statistics as after training, so that units are alive."""
    volume = load_scan(scan, torch.device("cpu"))
    torch.manual_seed(0)
    model = models.build_model(name, volume.shape[2:])  # type: ignore[arg-type]
    with torch.no_grad():
        for block in model.blocks():
            block.norm.weight.uniform_(0.5, 1.5)
            block.norm.bias.uniform_(-0.2, 0.5)
            block.norm.momentum = 1.0  # the running statistics become this scan's
        model(volume)
    torch.save(model.state_dict(), path)


def worker(
    work: str, side: str, name: str, scan: Path, device: torch.device, profile: bool
) -> dict[str, float | str]:
    """Do one piece of work; returns seconds, peak memory and the costliest operations."""
    weights = scan.with_name(f"{name}.pth")
    if work == "weights":
        save_weights(name, scan, weights)
        return {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    volume = load_scan(scan, device)
    model = checkpoints.load_weights(models.build_model(name, volume.shape[2:]), weights, device)  # type: ignore[arg-type]
    if side == "ours":
        process.keep_freed_memory()  # as the commands do
    seconds, result = measure(work, side, model, volume)
    record: dict[str, float | str] = {"seconds": seconds, "peak": peak_memory(device)}
    np.save(scan.with_name(f"{side}.npy"), result.detach().float().cpu().numpy())
    if profile and side == "ours":
        record["costs"] = costliest(work, model, volume)
    return record


# The table ---------------------------------------------------------------------------------------


def compare(
    models_: list[str], scan: Path, device: torch.device, profile: bool, chosen: list[str]
) -> Iterator[dict[str, float | str]]:
    """Every piece of work with every network, both ways: rows of the table."""
    options = ["--device", str(device), *["--profile"] * profile]

    def run(work: str, side: str, name: str) -> dict[str, Any]:
        if device.type != "cpu":
            return worker(work, side, name, scan, device, profile)
        command = [sys.executable, __file__, "--worker", work, side, name, str(scan), *options]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(output.splitlines()[-1])

    for name in models_:
        run("weights", "", name)
        former: dict[str, Any] = {}
        done = ""  # the work of the reference that was run last
        for work, (faster, smaller) in TARGETS.items():
            if work not in chosen:
                continue
            published = "training step" if work.startswith("training") else work.removesuffix(" with logits")
            if published != done:
                former, done = run(work, "reference", name), published
            ours = run(work, "ours", name)
            there, here = (np.load(scan.with_name(f"{side}.npy")) for side in ("reference", "ours"))
            yield {
                "model": name,
                "work": work,
                "reference s": former["seconds"],
                "ours s": ours["seconds"],
                "ratio": former["seconds"] / ours["seconds"],
                "at least": faster,
                "reference GB": former["peak"] / 1e9,
                "ours GB": ours["peak"] / 1e9,
                "share": ours["peak"] / former["peak"],
                "at most": smaller,
                "difference": np.abs(here - there).max() / np.abs(there).max(),
                "voxels off": np.mean(np.abs(here - there) > 1e-5 * np.abs(there).max()),
                "1 - correlation": 1 - np.corrcoef(here.ravel().astype(float), there.ravel())[0, 1],
                "costs": ours.get("costs", ""),
            }


def compare_reading(cohort: Path) -> Iterator[dict[str, float | str]]:
    """nibabel's get_fdata and scaling against the caches, which hand out scans that lie ready."""
    known = dataset.new_cohort(cohort / "data.csv", 2, "contiguous", 0, 0)
    row, file = 0, known.table["file"][0]

    def seconds(read: Callable[[], Any]) -> float:
        read()
        begin = time.perf_counter()
        for _ in range(READS):
            read()
        return (time.perf_counter() - begin) / READS

    there = references.read_scan(file)
    for work, cache in READING.items():
        scans = known.open_scans(Cache(cache, cohort / "cache"), threads=1)
        look = np.mean if "looked at" in work else np.asarray
        reference = seconds(lambda look=look: look(references.read_scan(file)))  # type: ignore[misc]
        ours = seconds(lambda look=look, scans=scans: look(scans[row][0].numpy()))  # type: ignore[misc]
        here = scans[row][0].numpy()[0]
        yield {
            "work": work,
            "reference s": reference,
            "ours s": ours,
            "ratio": reference / ours,
            "at least": 50,
            "difference": np.abs(here - there).max(),
        }


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="2 mm and one small network instead")
    add("--work", choices=[*TARGETS, "reading"], nargs="+", default=[*TARGETS, "reading"], metavar="WORK")
    add("--model", nargs="+", metavar="NAME", help="networks (default: modelA24 modelB44; quick: modelB8)")
    add("--device", default="cpu", help="as in train_cv.py")
    add("--profile", action="store_true", help="also name the three costliest operations of each row")
    add("--worker", nargs=4, metavar=("WORK", "SIDE", "NAME", "SCAN"), help=argparse.SUPPRESS)
    return parser


@utils.command("nothing is saved")
def main(argv: list[str] | None = None) -> int:
    """Simulate a scan, do every piece of work both ways, print one table."""
    args = get_parser().parse_args(argv)
    device = selfcheck.open_device(args.device)
    if args.worker:
        work, side, name, scan = args.worker
        print(json.dumps(worker(work, side, name, Path(scan), device, args.profile)))
        return 0
    names = args.model or (["modelB8"] if args.quick else ["modelA24", "modelB44"])
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cohort = Path(folder)
        voxel = 2 if args.quick else 1
        simulate.main(["--outpath", folder, "--subjects", "4", "--voxel", str(voxel)])
        rows = []
        for row in compare(names, cohort / simulate.scan_path(0), device, args.profile, args.work):
            rows.append(row)
            print({key: f"{v:.3g}" if isinstance(v, float) else v for key, v in row.items()}, flush=True)
        if "reading" in args.work:
            rows += compare_reading(cohort)
    table = pd.DataFrame(rows)
    print(f"\n{device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, {voxel} mm")
    print(table.drop(columns="costs", errors="ignore").to_string(index=False, float_format="{:.3g}".format))
    if args.profile:
        print()
        for row in rows:
            print(f"{row.get('model', '')} {row['work']}: {row.get('costs', '')}")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
