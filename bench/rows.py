#!/usr/bin/env python3
"""Measure what a long list of scans costs every command before its first scan of work.

    python3 bench/rows.py
    python3 bench/rows.py --rows 2000

The scans are links to six of 94 x 94 x 94 voxels, and every fourth subject has two. Each command is a process
of its own; the seconds from its start, and the most memory that it has held, are those at the moment when it
comes to train, explain, read or compare its first scan or map. "cold" is with a run.json that does not say
what was found in the files, or with none; "warm" is the same command again, with one that does. The file
system has all files at hand both times.
"""

import argparse
import importlib
import json
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SUITE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SUITE))

import utils  # noqa: E402

EDGE, SCANS, MODEL, K = 94, 6, "modelB2", 5
FIRST_WORK = {  # of each command: what does not come to be done
    "train_cv": "training:train_epoch",
    "heatmap": "explaining:explain_scans",
    "svm": "voxelwise:voxel_statistics",
    "ttest": "voxelwise:voxel_statistics",
    "sanity": "checking:Panel.check_fold",
    "overlap": "overlap:compare",
}


# What is measured --------------------------------------------------------------------------------


def write_cohort(folder: Path, rows: int) -> None:
    """A few scans of noise, links to them, and data.csv, which lists the links."""
    import nibabel as nib

    (folder / "scans").mkdir()
    for number in range(SCANS):
        values = np.random.default_rng(number).integers(0, 1000, (EDGE, EDGE, EDGE), np.int16)
        nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"{number}.nii.gz")
    lines = ["path,label,subject"]
    for row in range(rows):
        link, subject = Path("scans") / f"{row:06d}.nii.gz", row * 4 // 5
        (folder / link).symlink_to(folder / f"{row % SCANS}.nii.gz")
        lines.append(f"{link},{subject % 2},{subject:06d}")
    (folder / "data.csv").write_text("\n".join(lines) + "\n")


def finish(folder: Path) -> None:
    """A run to its end but for epochs and predictions, and maps of noise as if heatmap.py had made them."""
    import torch

    import heatmap
    import runs
    import train_cv
    import training
    from atypical import ANY, COLUMNS, TRAITS
    from internals import nifti, storage

    def train(state: training.TrainingState, *_: Any) -> None:
        state.best_weights = training.plain_weights(state.model)
        state.history.append([1, 0.7, 0.7, 0.5, 1.0])

    def predict(model: torch.nn.Module, loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
        labels = loader.dataset.dataset.labels
        return torch.rand(len(loader.dataset), 2), torch.tensor([labels[i] for i in loader.dataset.indices])

    def describe(cohort: Any, scans: Any, folder: Path) -> pd.DataFrame:
        names = [name.format(fold) for name in (runs.HEAD, runs.CONTROLS) for fold in range(K)]
        for name in (*names, runs.SCANS, runs.RANGES):
            (folder / name).touch()
        rows = [[fold, name, 0, 1, 0, 1, 1, 0] for fold in range(K) for name in (*TRAITS, ANY)]
        return pd.DataFrame(rows, columns=COLUMNS)

    training.train, training.predict, train_cv.describe_scans = train, predict, describe  # type: ignore[assignment]
    if train_cv.main(options("train_cv", folder, folder / "models")):
        raise SystemExit(1)
    say_taken()

    run = runs.find_run(folder / "models", None, None, None)
    networks, maps = runs.TrainedNetworks(run), folder / "heatmaps" / "Gradient"
    maps.mkdir(parents=True)
    given = vars(heatmap.get_parser().parse_args(["--method", "Gradient"]))
    record: dict[str, Any] = {"method": "Gradient", "model": MODEL, "folds": K, "finished": ["summary"]}
    record["options"] = heatmap.map_options("Gradient", given)
    record["weights_sha256"] = {str(fold): networks.digest(fold) for fold in range(K)}
    storage.write_json(record | run.cohort.identity, maps / "map.json")
    for name in [*(f"map_f{fold}" for fold in range(K)), "map_all", "mean_scan"]:
        values = np.random.default_rng(0).random(run.cohort.grid.shape)
        nifti.save_map(values, run.cohort.grid.header, maps / f"{name}.nii.gz")
    nifti.save_map(values > 0.9, run.cohort.grid.header, folder / "reference.nii.gz")


def measure_steps(folder: Path) -> None:
    """Seconds of single steps, one after the other in one process."""
    import classifier_scores
    import dataset
    import runs
    import train_cv
    from internals import storage

    def timed(name: str, step: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = step(*arguments)
        print(json.dumps({"step": name, "seconds": time.perf_counter() - begin}), flush=True)
        return result

    csv, file = folder / "data.csv", folder / "folds.csv"
    table = timed("the CSV", dataset.read_csv, csv)
    folds = timed("folds", dataset.make_folds, table, K, "stratified", 0.2, 0)
    timed("headers", dataset.check_grid, table)
    timed("samples of the content", dataset.scans_digest, table)
    checked = timed("headers and samples, remembered", recheck, folder, table)
    cohort = dataset.Cohort(csv, table, checked, folds, K)
    timed("digests of CSV and folds", lambda: cohort.identity)
    timed("rows of every role", lambda: [cohort.labels(f, r) for f in range(K) for r in runs.ROLES])
    timed("folds.csv, written", storage.write_csv, folds, file)
    timed("folds.csv, compared", train_cv.check_folds, file, folds)
    timed("folds.csv, read", runs._read_folds, file, table, K)
    random = np.random.default_rng(0)
    found = {"fold": np.arange(len(table)) % K, "prob_1": random.random(len(table))}
    predictions = table.assign(**found, predicted=(found["prob_1"] > 0.5).astype(int))
    timed("metrics with intervals", classifier_scores.metrics_table, predictions, 0)


def recheck(folder: Path, table: pd.DataFrame) -> Any:
    """What a finished run's record says of the files."""
    import dataset
    import runs

    return dataset.check_scans(table, runs.earlier_record(folder / "models"))


def options(command: str, folder: Path, models: Path) -> list[str]:
    """How a command is called; its results go where no other's are."""
    words: list[object] = ["--outpath", folder / f"{command}-{models.name}"]
    if command == "train_cv":
        words = ["--path", folder / "data.csv", "--outpath", models, "--model", MODEL, "--fold", K]
    elif command != "overlap":
        words += ["--modelpath", models]
    if command in ("sanity", "overlap"):
        words += ["--maps", folder / "heatmaps"]
    if command == "overlap":
        words += ["--reference", folder / "reference.nii.gz", "--overwrite"]
    if command == "heatmap":
        words += ["--method", "LRP"]
    return [*map(str, words), *(["--device", "cpu"] if command in ("train_cv", "heatmap", "sanity") else [])]


# Processes of their own --------------------------------------------------------------------------


def say_taken() -> None:
    """Print the time, and the most bytes that this process has held."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"at": time.time(), "peak": int(status["VmHWM"].split()[0]) * 1024}), flush=True)


def work(name: str, folder: Path, models: Path) -> None:
    """What a process does: single steps, a whole run, or a command up to its first scan of work."""
    if name in OTHERS:
        OTHERS[name](folder)
        return
    command = importlib.import_module(name)
    owner, _, function = FIRST_WORK[name].replace(":", ".").rpartition(".")

    def stop(*_: Any, **__: Any) -> None:
        say_taken()
        raise KeyboardInterrupt

    setattr(pkgutil.resolve_name(owner), function, stop)
    command.main(options(name, folder, models))


OTHERS = {"finish": finish, "steps": measure_steps}


def process(name: str, folder: Path, models: Path, limit: float) -> tuple[list[dict[str, Any]], float]:
    """What a process prints in JSON, and when it began; nothing where it takes longer than it may."""
    command, begin = [sys.executable, __file__, "--worker", name, str(folder), str(models)], time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return [], begin
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not found:
        raise SystemExit(f"{name}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return found, begin


# The table ---------------------------------------------------------------------------------------


def measure(folder: Path, limit: float) -> Iterator[dict[str, Any]]:
    """Rows of the table: every command cold and warm, then the steps."""

    def taken(name: str, models: Path) -> tuple[float, float]:
        """Seconds and GB; infinite where it takes longer than it may."""
        found, begin = process(name, folder, models, limit)
        return (found[0]["at"] - begin, found[0]["peak"] / 1e9) if found else (np.inf, np.nan)

    (seconds, peak) = taken("finish", folder / "models")
    yield {"what": "train_cv.py, whole, without epochs and predictions", "cold s": seconds, "GB": peak}
    if np.isinf(seconds):
        return
    cold = shutil.copytree(folder / "models", folder / "cold")
    record = json.loads((cold / "run.json").read_text())
    record.pop("scans_mark", None)
    for name in FIRST_WORK:
        row: dict[str, Any] = {"what": f"{name}.py"}
        for heading, models in {"cold s": cold, "warm s": folder / "models"}.items():
            (cold / "run.json").write_text(json.dumps(record))
            if name == "train_cv":  # a new run, and that one again
                models = folder / "new"
            row[heading], peak = taken(name, models)
            row["GB"] = max(row.get("GB", 0), peak)
        yield row
    found, _ = process("steps", folder, folder / "models", limit)
    for step in found:
        yield {"what": step["step"], "cold s": step["seconds"]}


def main() -> int:
    """Make the cohort, measure, print one table."""
    parser = utils.ArgumentParser(__doc__)
    whole = utils.bounded(int, at_least=100)
    parser.add_argument("--rows", type=whole, default=40_000, help="scans in the list")
    parser.add_argument("--limit", type=float, default=600, help="seconds, after which a command is killed")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, *places = args.worker
        work(name, *map(Path, places))
        return 0
    with tempfile.TemporaryDirectory() as place:
        write_cohort(Path(place), args.rows)
        table = pd.DataFrame(measure(Path(place), args.limit))
    print(table.to_string(index=False, float_format="{:.2f}".format, na_rep=""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
