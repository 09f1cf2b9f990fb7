"""Small cohorts of NIfTI scans for the tests of the commands, and readers of what the commands wrote."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch

import dataset
import models
from dataset import ScanDataset

# Three edges, so that swapped axes show; 94 is the smallest that family B takes.
SHAPE = (94, 95, 96)
# Anisotropic, left-right flipped, with an origin; every number is exact in float32.
AFFINE = np.array([[-1.5, 0, 0, 70], [0, 2, 0, -90.5], [0, 0, 1.25, -60.25], [0, 0, 0, 1]])
# Same geometry class, turned by 20 degrees about z: neither axis-aligned nor exact in float32.
TURN = np.deg2rad(20)
OBLIQUE = np.array(
    [
        [-1.5 * np.cos(TURN), -2 * np.sin(TURN), 0, 70],
        [-1.5 * np.sin(TURN), 2 * np.cos(TURN), 0, -90.5],
        [0, 0, 1.25, -60.25],
        [0, 0, 0, 1],
    ]
)
# What spreadsheets and pandas like to change: leading zeros, exponents, "NA".
SUBJECTS = ["007", "010", "NA", "0003", "1e5", "005", "6.0", "0012", "+9", "011", "13", "007"]
LABELS = [0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0]
TEXTS = ["path", "subject", "role", "network", "trait", "reason", "note", "samples_sha256"]  # columns
MODEL, K = "modelB2", 2
# how train_cv.py is called for the run that tests share: quick, and in memory
TRAINED = ["--model", MODEL, "--device", "cpu", "--batch", "2", "--fold", str(K), "--lr", "1e-3"]
TRAINED += ["--epochs", "2", "--val-fraction", "0.34", "--seed", "3", "--cache", "ram"]


def voxels(seed: int, label: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A noisy bright block in a black frame, int16; label 1 has a darker corner."""
    values = np.random.default_rng(seed).integers(300, 1000, size=shape, dtype=np.int16)
    x, y, z = shape[:3]
    values[x // 4 : x // 2, y // 3 : y // 2, z // 2 : z // 3 * 2] //= 1 + 4 * label
    values[:1], values[:, -1:] = 0, 0
    return values


def write_scan(
    path: Path,
    values: np.ndarray,
    affine: np.ndarray = AFFINE,
    image_class: type[nib.Nifti1Image] = nib.Nifti1Image,
) -> Path:
    """Write a scan with sform code 4 (MNI), qform code 1 (scanner), millimetres and seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image_class(values, affine)
    image.set_sform(affine, code=4)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


def write_csv(path: Path, rows: Iterable[Iterable[object]], header: str = "") -> Path:
    """Write rows of cells under a header line, if there is one."""
    lines = [header] if header else []
    path.write_text("\n".join([*lines, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def write_cohort(folder: Path) -> Path:
    """Twelve scans of eleven subjects, listed in data.csv by relative paths; returns the CSV."""
    rows = []
    for i, (label, subject) in enumerate(zip(LABELS, SUBJECTS, strict=True)):
        write_scan(folder / "scans" / f"{i:03d}.nii", voxels(i, label))
        rows.append((f"scans/{i:03d}.nii", label, subject))
    return write_csv(folder / "data.csv", rows, header="path,label,subject")


def write_new_scans(folder: Path, labels: Mapping[str, int], run: Path) -> None:
    """New scans, unlabelled.csv, labelled.csv, and models/, a run whose own list and scans are gone."""
    for number, (name, label) in enumerate(labels.items()):
        write_scan(folder / f"{name}.nii", voxels(100 + number, label))
    write_csv(folder / "unlabelled.csv", [(f"{name}.nii",) for name in labels])
    write_csv(folder / "labelled.csv", [(f"{name}.nii", label) for name, label in labels.items()])
    shutil.copytree(run, folder / "models")
    record = json.loads((folder / "models/run.json").read_text())
    (folder / "models/run.json").write_text(json.dumps(record | {"csv": "/gone/data.csv"}))


def tiny_cohort(folder: Path, n: int = 6, shape: tuple[int, ...] = (5, 6, 7)) -> Path:
    """A headerless CSV of n scans of a few voxels, 0.nii ... labels alternate."""
    for i in range(n):
        write_scan(folder / f"{i}.nii", voxels(i, shape=shape))
    return write_csv(folder / "data.csv", [(f"{i}.nii", i % 2) for i in range(n)])


def cohort_of(csv: Path) -> dataset.Cohort:
    """The scans of a CSV, for tests that ask for no folds."""
    table = dataset.read_csv(csv)
    return dataset.Cohort(csv, table, dataset.check_scans(table, {}), pd.DataFrame(), 0)


def stacked(scans: dataset.ScanDataset) -> torch.Tensor:
    """All scans, float32 (N, 1, X, Y, Z)."""
    return torch.stack([scans[i][0] for i in range(len(scans))])


def read_nifti(path: Path) -> nib.Nifti1Image:
    """Open a NIfTI-1 or NIfTI-2 file, whichever it is."""
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return image


def read_values(path: Path) -> np.ndarray:
    """Voxels of a NIfTI file as float64, scaled as its header says."""
    return np.asarray(read_nifti(path).dataobj, dtype=np.float64)


def read_table(path: Path) -> pd.DataFrame:
    """A CSV as it stands: "NA" is a subject, "007" is not 7; numbers are numbers, blanks NaN."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column in table.columns.difference(TEXTS):
        table[column] = pd.to_numeric(table[column])
    return table


def load_network(checkpoint: Path) -> models.CNN3d:
    """The network of a checkpoint, by plain PyTorch alone, in evaluation mode."""
    network = models.build_model(MODEL, SHAPE)
    network.load_state_dict(torch.load(checkpoint, weights_only=True), strict=True)
    return network.eval()


def load_volume(file: Path) -> torch.Tensor:
    """One scan as the network sees it, float32 (1, 1, X, Y, Z)."""
    return torch.from_numpy(dataset.read_scan(file))[None, None]


def contents(folder: Path) -> Mapping[str, bytes]:
    """Every file below a folder, byte for byte."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def only_error(captured: str) -> str:
    """The one line of stderr that a user's mistake gets."""
    assert captured.startswith("error: "), captured
    assert captured.count("\n") == 1, captured
    return captured


def white(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# what makes a method's map of these scans quick; cubes of three to a side of the grid
QUICK: dict[str, dict[str, float]] = {
    "IG": {"steps": 2},
    "SmoothGrad": {"samples": 2, "sigma": 0.2},
    "Occlusion": {"size": 100.0, "stride": 90.0},
}


def quick(method: str) -> list[str]:
    """The options of QUICK as heatmap.py takes them."""
    return [word for name, value in QUICK.get(method, {}).items() for word in (f"--{name}", str(value))]


# Scans that are never written to disk --------------------------------------------------------------


def two_groups(n: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Scans, float32 (N, X, Y, Z), labelled 0, 1, 0, ...; the groups overlap, one face is the same in all."""
    values = np.random.default_rng(0).random((n, *shape), np.float32)
    values[1::2, 1:3] += 0.1
    values[:, 0] = 0.5
    return values


def scans_of(volumes: np.ndarray) -> ScanDataset:
    """A dataset of scans in memory, labelled 0, 1, 0, 1, ..."""
    n = len(volumes)
    return ScanDataset(pd.DataFrame({"file": range(n), "label": np.arange(n) % 2}), volumes)
