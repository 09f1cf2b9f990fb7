#!/usr/bin/env python3
"""Hold predict.py against what it promises, on the demo's networks and people that they never saw.

    python3 bench/new_scans.py --modelpath demo/models --cohort demo/cohort

Four tables: scores of a fresh cohort, by all networks and by single ones; seven kinds of scans that are not
what the networks were trained on, and how many of each are called atypical; a scan of the run under another
name; time and memory of whole commands.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import ndimage

SUITE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SUITE))

import atypical  # noqa: E402
import dataset  # noqa: E402
import models  # noqa: E402
import simulate  # noqa: E402
import utils  # noqa: E402
from internals import nifti  # noqa: E402

FRESH, SPOILT, SEED = 60, 20, 1
SHIFT, LARGER, TURN, NOISE = 10.0, 1.15, 10.0, 0.2  # mm, times, degrees, share of the scan's range
SHOWN = ["accuracy", "auc", "sensitivity", "specificity", "brier", "log_loss"]


# Scans that are not what they should be ----------------------------------------------------------


def moved(volume: np.ndarray, matrix: np.ndarray, shift: float = 0) -> np.ndarray:
    """A scan (X, Y, Z) under a linear map about its centre, and shifted along x by some voxels."""
    centre = (np.array(volume.shape) - 1) / 2
    offset = centre - matrix @ centre + np.array([shift, 0, 0])
    return ndimage.affine_transform(volume, matrix, offset, order=1)


def turned(volume: np.ndarray) -> np.ndarray:
    """Turned about the axis from left to right."""
    cos, sin = np.cos(np.deg2rad(TURN)), np.sin(np.deg2rad(TURN))
    return moved(volume, np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]))


def inverted(volume: np.ndarray) -> np.ndarray:
    """Dark where it was bright in the head, as T2-weighted scans are."""
    head = volume > 0
    return np.where(head, volume.max() + volume[head].min() - volume, 0)


def with_skull(volume: np.ndarray, size: float) -> np.ndarray:
    """With dark bone and bright scalp around the brain, 6 mm each."""
    brain = ndimage.binary_closing(volume > 0, iterations=3)
    distance = ndimage.distance_transform_edt(~brain, sampling=size)
    scalp = 0.8 * volume.max() * (distance > 6) * (distance <= 12)
    bone = 0.08 * volume.max() * (distance > 0) * (distance <= 6)
    return np.where(brain, volume, scalp + bone)


def kinds(size: float) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What spoils a scan (X, Y, Z) of voxels of `size` mm, by name."""
    random = np.random.default_rng(0)
    return {
        "skull not stripped": lambda v: with_skull(v, size),
        f"shifted by {SHIFT:g} mm": lambda v: moved(v, np.eye(3), SHIFT / size),
        f"scaled by {LARGER:g}": lambda v: moved(v, np.eye(3) / LARGER),
        f"turned by {TURN:g} degrees": turned,
        "contrast inverted": inverted,
        "heavy noise": lambda v: np.where(v > 0, np.abs(v + random.normal(0, NOISE * v.max(), v.shape)), 0),
        "an empty half": lambda v: np.where(np.arange(len(v))[:, None, None] < len(v) // 2, 0, v),
    }


def write_spoilt(table: pd.DataFrame, folder: Path) -> Path:
    """Some scans spoilt in every way; returns their list."""
    lines = []
    grid = nifti.read_grid(table["file"][0])
    for name, spoil in kinds(grid.voxel_sizes[0]).items():
        for row in range(SPOILT):
            values = spoil(nifti.load_map(table["file"][row]))
            path = f"{name.replace(' ', '_')}_{row:03d}.nii.gz"
            nifti.save_map(values, grid.header, folder / path)
            lines.append(path)
    (folder / "spoilt.csv").write_text("\n".join(lines) + "\n")
    return folder / "spoilt.csv"


# What is measured --------------------------------------------------------------------------------


def run_predict(csv: Path, modelpath: Path, outpath: Path, *options: str) -> dict[str, float]:
    """Predict in a process of its own; returns its seconds and its largest memory in GB."""
    words = [
        sys.executable,
        str(SUITE / "predict.py"),
        "--path",
        csv,
        "--modelpath",
        modelpath,
        "--outpath",
        outpath,
    ]
    begin = time.perf_counter()
    with subprocess.Popen([*map(str, words), *options], stdout=subprocess.DEVNULL) as process:
        memory = 0.0
        while process.poll() is None:
            memory = max(memory, resident(process.pid))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"predict.py: status {process.returncode}")
    return {"s": time.perf_counter() - begin, "GB": memory}


def resident(pid: int) -> float:
    """The most memory that a process has held so far, in GB; 0 once it has ended.

    Not getrusage's ru_maxrss, which a process takes over from the one that started it: here that holds scans.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM"))


def fresh_cohort(folder: Path, subjects: int, voxel: float) -> pd.DataFrame:
    """People of another seed, and new.csv: path and label, as their subjects are called like the run's."""
    words = ["--subjects", subjects, "--voxel", voxel, "--severity", 2, "--seed", SEED, "--overwrite"]
    if simulate.main(["--outpath", str(folder), *map(str, words)]):
        raise SystemExit(1)
    table = dataset.read_csv(folder / "data.csv")
    table[["path", "label"]].to_csv(folder / "new.csv", index=False, header=False)
    return table


def show(title: str, rows: pd.DataFrame) -> None:
    """Print a table."""
    print(f"\n{title}\n{rows.to_string(index=False, float_format=lambda value: f'{value:.3f}')}", flush=True)


def score(folder: Path, modelpath: Path) -> None:
    """Predict the fresh cohort, and print its scores, and how far they are from plain PyTorch's."""
    run_predict(folder / "new.csv", modelpath, folder / "out")
    metrics = pd.read_csv(folder / "out/metrics.csv")
    cells = {
        name: [f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in
               zip(metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"], strict=True)]
        for name in SHOWN
    }  # fmt: skip
    show(f"{FRESH} scans of people of another seed", pd.DataFrame({"network": metrics["network"], **cells}))
    predictions = pd.read_csv(folder / "out/predictions.csv")
    print(f"atypical: {predictions['atypical'].sum()} of {len(predictions)}")
    table = dataset.read_csv(folder / "new.csv")
    worst = max(difference(table["file"][row], predictions.iloc[row], modelpath) for row in range(10))
    print(f"prob_1 of 10 scans against plain PyTorch: largest difference {worst:.1e}")


def difference(file: Path, row: pd.Series, modelpath: Path) -> float:
    """How far a prediction is from that of the checkpoints by PyTorch alone."""
    record = json.loads((modelpath / "run.json").read_text())
    temperatures = pd.read_csv(modelpath / "calibration.csv")["temperature"]
    volume = torch.from_numpy(dataset.read_scan(file))[None, None]
    found = []
    for fold in range(record["arguments"]["fold"]):
        network = models.build_model(record["model"], tuple(record["grid"]["shape"])).eval()
        network.load_state_dict(torch.load(modelpath / f"state_dict_f{fold}.pth", weights_only=True))
        with torch.no_grad():
            found.append((network(volume).double() / temperatures[fold]).softmax(1)[0, 1].item())
    return abs(float(np.mean(found)) - row["prob_1"])


def catch(table: pd.DataFrame, folder: Path, modelpath: Path) -> None:
    """Print how many spoilt scans of each kind are called atypical, and how many of the run's own tests."""
    csv = write_spoilt(table, folder)
    run_predict(csv, modelpath, folder / "spoilt")
    found = pd.read_csv(folder / "spoilt/predictions.csv")
    found["kind"] = found["path"].str.slice(0, -len("_000.nii.gz")).str.replace("_", " ")
    rows = found.groupby("kind", sort=False)["atypical"].agg(["size", "sum"]).reset_index()
    own = pd.read_csv(modelpath / "typical.csv")
    own = own[own["trait"] == atypical.ANY]
    last = ["the run's own test scans", own["test_scans"].sum(), own["test_marked"].sum()]
    rows = pd.concat([rows, pd.DataFrame([last], columns=rows.columns)])
    show("scans called atypical", rows.set_axis(["scans", "of them", "atypical"], axis=1))
    for _, row in found.drop_duplicates("kind").iterrows():
        print(f"{row['kind']}: prob_1 {row['prob_1']:.3f}; {row['reason']}")


def rename(cohort: Path, folder: Path, modelpath: Path) -> None:
    """Print what becomes of a scan of the run under another name."""
    path = dataset.read_csv(cohort / "data.csv")["path"][2]
    (folder / "another_name.nii.gz").write_bytes((cohort / path).read_bytes())
    (folder / "renamed.csv").write_text("another_name.nii.gz\n")
    run_predict(folder / "renamed.csv", modelpath, folder / "renamed")
    found, tested = (pd.read_csv(place / "predictions.csv") for place in (folder / "renamed", modelpath))
    tested = tested[tested["path"] == path]
    show(f"{path} of the run under another name", found.drop(columns=["subject", "reason"]))
    print(f"tested in fold {tested['fold'].item()}: {tested['prob_1_calibrated'].item():.6f}")


def measure(folder: Path, modelpath: Path) -> None:
    """Print time and memory of whole commands."""
    fresh_cohort(folder / "many", 100, 2)
    rows = [
        {"what": "100 scans at 2 mm"} | run_predict(folder / "many/new.csv", modelpath, folder / "many/out")
    ]
    fresh_cohort(folder / "large", 4, 1)
    (folder / "a24").mkdir()
    for fold in range(5):
        torch.manual_seed(fold)
        torch.save(models.build_model("modelA24").state_dict(), folder / f"a24/state_dict_f{fold}.pth")
    large = run_predict(folder / "large/new.csv", folder / "a24", folder / "large/out", "--model", "modelA24")
    rows.append({"what": "4 scans at 1 mm, modelA24, 5 networks"} | large)
    volume = dataset.read_scan(dataset.read_csv(folder / "large/new.csv")["file"][0])
    head = atypical.Head(volume, np.eye(4))
    begin = time.perf_counter()
    head.traits(volume)
    rows.append({"what": "compare one scan at 1 mm with one network's", "s": time.perf_counter() - begin})
    show("whole commands", pd.DataFrame(rows))


def main() -> int:
    """Make the scans, and print the tables."""
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("--modelpath", type=Path, default=Path("demo/models"), help="the demo's networks")
    parser.add_argument("--cohort", type=Path, default=Path("demo/cohort"), help="the scans that they know")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = fresh_cohort(folder, FRESH, 2)
        score(folder, args.modelpath)
        catch(table, folder, args.modelpath)
        rename(args.cohort, folder, args.modelpath)
        measure(folder, args.modelpath)
    return 0


if __name__ == "__main__":
    sys.exit(main())
