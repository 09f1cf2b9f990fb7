"""Simulate a cohort of T1-weighted scans with planted atrophy, to try the suite on.

    python3 simulate.py --outpath cohort --subjects 40 --voxel 2 --seed 0

Every scan is the MNI152 template made into another person: head size and shape, age, scanner bias
field and noise differ and say nothing of the label. Label 1 also loses grey matter in hippocampi,
amygdalae and posterior cingulate. DIR receives scans/, data.csv (for train_cv.py), truth.nii.gz
(where the loss was planted), mask.nii.gz (the brain) and cohort.json (who was given what).
"""

import argparse
import dataclasses
import functools
import gzip
import math
import os
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nilearn import datasets, image
from scipy import ndimage
from scipy.interpolate import BSpline

import utils
from internals import storage
from internals.errors import InputError
from internals.results import Files, ResultFolder

ORIGIN = np.array([-96.0, -132.0, -78.0])  # mm, centre of the first voxel
EXTENT = np.array([192, 228, 192])  # mm, first to last voxel centre
CENTRE = np.array([96.0, 114.0, 88.0])  # mm from ORIGIN; heads grow and turn about it

# Grey matter lost in Alzheimer's disease: a path in MNI mm (right side; |x| gives the left) and
# the radius around it in mm.
REGIONS: dict[str, tuple[list[tuple[int, int, int]], float]] = {
    "hippocampus": ([(23, -12, -20), (27, -24, -13), (24, -36, -3)], 8.0),
    "amygdala": ([(23, -4, -19)], 8.5),
    "posterior cingulate and precuneus": ([(3, -46, 34), (3, -53, 27), (3, -56, 19)], 8.0),
}
FEATHER = 6.0  # mm over which a region fades
GREY = 0.3  # grey-matter probability from which a voxel of a region counts as truth
CSF = 0.27  # T1 intensity of CSF in nilearn's template, whose brightest voxel is 1
INTENSITY = 600.0  # of the template's brightest voxel in a scan; small integers compress well

PART = "cohort"
RECORD = "cohort.json"
THREADS = min(4, os.cpu_count() or 1)  # that make scans: at 1 mm each takes about 0.5 GB meanwhile


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    number = utils.bounded
    loss = "mean planted loss s of label 1: the share 1 - exp(-s) of the grey matter turns into CSF"
    add = parser.add_argument
    add("--outpath", required=True, type=Path, metavar="DIR", help="folder for the cohort")
    add("--subjects", type=number(int, at_least=4), default=40, help="number of scans")
    add("--voxel", type=number(float, at_least=1, at_most=4), default=2.0, help="voxel size in mm")
    add("--seed", type=number(int, at_least=0), default=0, help="same seed, same files")
    add("--severity", type=number(float, at_least=0, at_most=10), default=1.0, help=loss)
    add("--null", action="store_true", help="plant nothing: the labels mean nothing")
    add("--overwrite", action="store_true", help="replace the cohort in DIR")
    return parser


# The people --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Subject:
    """One person; nothing but `label` and `planted_loss` depends on the label."""

    subject: str
    path: str
    label: int
    age: float  # years
    natural_loss: float  # of grey matter in the regions: the share exp(-loss) is left; everyone has some
    planted_loss: float  # the same, from the disease
    diffuse_loss: float  # of all grey matter; grows with age
    ventricles: float  # mm by which the ventricle walls recede at most; grows with age
    shape: list[list[float]]  # (3, 3) linear part of the map from head to template
    gain: float  # intensity scale
    bias: float  # amplitude of the bias field, natural log
    noise: float  # standard deviation relative to the template's brightest voxel
    stream: tuple[int, int, int]  # seeds the deformation, the bias field and the noise


def draw_subject(seed: int, index: int, severity: float) -> Subject:
    """Draw subject `index` of the cohort `seed`; the size of the cohort plays no part.

    Args:
        severity: mean planted loss of label 1; 0 plants nothing.
    """
    # Labels come in pairs, a coin deciding who of a pair is the patient: balanced, yet shuffled.
    coin = np.random.default_rng([seed, index // 2, 0]).integers(2)
    label = int((index + coin) % 2)
    rng = np.random.default_rng([seed, index, 1])
    age = float(np.clip(rng.normal(72, 7), 55, 90))
    decades = (age - 50) / 10  # the template's people were young
    return Subject(
        subject=f"sub-{index + 1:03d}",
        path=scan_path(index),
        label=label,
        age=age,
        natural_loss=float(abs(rng.normal(0, 0.25))),
        planted_loss=label * severity * float(max(rng.normal(1, 0.4), 0)),
        diffuse_loss=float(max(rng.normal(0.04 * decades, 0.03), 0)),
        ventricles=float(np.clip(rng.normal(decades, 0.6), 0, 4)),
        shape=(np.eye(3) + rng.normal(0, 0.006, (3, 3)) + np.diag(rng.normal(0, 0.012, 3))).tolist(),
        gain=float(rng.lognormal(0, 0.15)),
        bias=float(rng.uniform(0.03, 0.08)),
        noise=float(rng.uniform(0.01, 0.025)),
        stream=(seed, index, 2),
    )


def scan_path(index: int) -> str:
    """Where subject `index` (from 0) lies, relative to the cohort."""
    return f"scans/sub-{index + 1:03d}_T1w.nii.gz"


# The template ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Template:
    """The MNI152 template at 1 mm, every array (193, 229, 193) float32 (`pull` one per axis)."""

    t1: np.ndarray  # intensity, 0 outside the brain
    grey: np.ndarray  # grey-matter probability
    loss: np.ndarray  # intensity a voxel loses where all of its grey matter turns into CSF
    region: np.ndarray  # 1 inside the regions of atrophy, fading to 0
    pull: np.ndarray  # (3, ...) vectors towards the ventricles, the longest 1


@functools.cache
def load_template() -> Template:
    """Read the MNI152 template that nilearn ships and derive what ageing and disease need."""
    t1, grey = (
        on_grid(load(resolution=1))
        for load in (datasets.load_mni152_template, datasets.load_mni152_gm_template)
    )
    # Partial volume: grey matter that turns into CSF takes its share of the voxel along.
    loss = grey * np.maximum(t1 - CSF, 0)
    return Template(t1, grey, loss, atrophy_region(), ventricle_pull(t1))


def on_grid(template: nib.Nifti1Image) -> np.ndarray:
    """Crop and pad one of nilearn's 1 mm templates to the 1 mm grid; float32 (193, 229, 193).

    Both grids hold whole millimetres, so nothing is interpolated; nilearn's default, cubic splines,
    would still ring around the edge of the brain.
    """
    resampled = image.resample_img(
        template,
        grid_affine(1),
        grid_shape(1),
        interpolation="nearest",
        force_resample=True,
        copy_header=True,
    )
    return np.asarray(resampled.dataobj, dtype=np.float32)


def grid_shape(voxel: float) -> tuple[int, int, int]:
    """Voxels per axis: (193, 229, 193) at 1 mm, (97, 115, 97) at 2 mm."""
    x, y, z = (math.floor(extent / voxel) + 1 for extent in EXTENT)
    return x, y, z


def grid_affine(voxel: float) -> np.ndarray:
    """Voxel to MNI mm, (4, 4), RAS."""
    affine = np.diag([voxel, voxel, voxel, 1.0])
    affine[:3, 3] = ORIGIN
    return affine


def atrophy_region() -> np.ndarray:
    """Where `REGIONS` lose grey matter at 1 mm: float32 in [0, 1], half at the radius."""
    x, y, z = mni_axes()
    axes = [np.abs(x), y, z]
    region = np.zeros(grid_shape(1), dtype=np.float32)
    for path, radius in REGIONS.values():
        for start, end in zip(path, path[1:] or path, strict=False):
            along = np.subtract(end, start).astype(np.float32)
            offset = [axis - first for axis, first in zip(axes, start, strict=True)]
            share = sum(o * a for o, a in zip(offset, along, strict=True)) / max(along @ along, 1)
            share = np.clip(share, 0, 1)  # (X, Y, Z), 0 at the start of the segment, 1 at its end
            squares = ((o - share * a) ** 2 for o, a in zip(offset, along, strict=True))
            distance = np.sqrt(sum(squares))
            region = np.maximum(region, np.clip((radius - distance) / FEATHER + 0.5, 0, 1))
    return region


def ventricle_pull(t1: np.ndarray) -> np.ndarray:
    """Vectors towards the ventricles, (3, X, Y, Z) float32, the longest 1.

    Sampling the template a little closer to the ventricles than it should be makes them larger
    and presses the tissue around them together, as ageing does.
    """
    x, y, z = mni_axes()
    deep = (x / 34) ** 2 + ((y + 20) / 46) ** 2 + ((z - 8) / 26) ** 2 < 1  # out of reach of the sulci
    ventricles = deep & (t1 > 0) & (t1 < 0.42)
    pull = np.stack(np.gradient(ndimage.gaussian_filter(ventricles.astype(np.float32), 7)))
    return pull / np.linalg.norm(pull, axis=0).max()


def mni_axes() -> list[np.ndarray]:
    """MNI mm along each axis of the 1 mm grid: (193, 1, 1), (1, 229, 1) and (1, 1, 193) float32."""
    lines = (start + np.arange(n, dtype=np.float32) for start, n in zip(ORIGIN, grid_shape(1), strict=True))
    return [line.astype(np.float32) for line in np.meshgrid(*lines, indexing="ij", sparse=True)]


# A scan ------------------------------------------------------------------------------------------


def render(person: Subject, template: Template, voxel: float) -> np.ndarray:
    """Scan a subject: int16 on the grid of `voxel` mm, 0 outside the brain.

    Anatomy and bias field depend on position in mm, so they are the same at every voxel size.
    """
    rng = np.random.default_rng(person.stream)
    local = template.region * np.float32(person.natural_loss + person.planted_loss)
    left = np.exp(-local - np.float32(person.diffuse_loss))  # share of the grey matter
    t1 = sample(template.t1 - template.loss * (1 - left), anatomy(person, template, voxel, rng))
    brain = t1 > CSF / 2  # halfway between the background and the darkest tissue
    signal = t1 * np.exp(person.bias * smooth_field(rng, voxel, 70)[0])
    # The magnitude of a complex signal is Rician (Gudbjartsson and Patz 1995); noise is cut at
    # 3 sd so that no single voxel sets the range of a scan.
    noise = np.clip(rng.standard_normal((2, *t1.shape), dtype=np.float32), -3, 3) * person.noise
    scan = np.hypot(signal + noise[0], noise[1]) * (INTENSITY * person.gain)
    return np.where(brain, np.rint(scan), 0).astype(np.int16)


def anatomy(person: Subject, template: Template, voxel: float, rng: np.random.Generator) -> np.ndarray:
    """Where in the template each voxel of a head comes from: (3, X, Y, Z) float32, mm from ORIGIN."""
    axes = np.meshgrid(*(voxel * np.arange(n) for n in grid_shape(voxel)), indexing="ij", sparse=True)
    place = smooth_field(rng, voxel, 30, components=3)
    for axis, row in enumerate(np.array(person.shape)):
        centred = (weight * (x - middle) for weight, x, middle in zip(row, axes, CENTRE, strict=True))
        place[axis] += CENTRE[axis] + sum(centred)
    pulls = [sample(component, place) for component in template.pull]
    for component, pull in zip(place, pulls, strict=True):
        component += np.float32(person.ventricles) * pull
    return place


def sample(volume: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Interpolate a 1 mm volume linearly at `place`, (3, X, Y, Z) mm from ORIGIN; 0 outside."""
    return ndimage.map_coordinates(volume, place, order=1)


def smooth_field(rng: np.random.Generator, voxel: float, spacing: float, components: int = 1) -> np.ndarray:
    """Smooth random fields, (components, X, Y, Z) float32, mean 0, standard deviation 1.

    Cubic B-splines over random values on a lattice of `spacing` mm, the free-form deformation of
    Rueckert et al. 1999 (doi 10.1109/42.796284).
    """
    spans = [math.ceil(extent / spacing) for extent in EXTENT]
    field = rng.standard_normal((components, *(n + 3 for n in spans)), dtype=np.float32)
    for n, length in zip(spans, grid_shape(voxel), strict=True):
        knots = spacing * np.arange(-3, n + 4)
        basis = BSpline.design_matrix(voxel * np.arange(length), knots, 3).toarray()  # (length, n + 3)
        # The lattice axis at position 1 goes, the voxel axis joins at the end.
        field = np.tensordot(field, basis.astype(np.float32), axes=(1, 1))
    return field / np.float32((151 / 315) ** 1.5)  # 151/315: mean square of a cubic B-spline


# The files ---------------------------------------------------------------------------------------


def save_volume(volume: np.ndarray, voxel: float, path: Path) -> None:
    """Write an integer volume as NIfTI in MNI space; the same volume gives the same bytes."""
    nifti = nib.Nifti1Image(volume, grid_affine(voxel))
    nifti.header.set_xyzt_units("mm")
    nifti.set_sform(nifti.affine, code="mni")
    nifti.set_qform(nifti.affine, code="mni")
    packed = gzip.compress(nifti.to_bytes(), compresslevel=6, mtime=0)  # no clock, no file name
    with storage.atomic_write(path) as partial:
        partial.write_bytes(packed)


def save_scans(people: list[Subject], template: Template, voxel: float, folder: Path) -> None:
    """Render and write every scan, a few at a time."""
    storage.make_folder((folder / scan_path(0)).parent)

    def save(person: Subject) -> None:
        save_volume(render(person, template, voxel), voxel, folder / person.path)

    # Threads are enough: interpolation, random numbers and gzip leave Python's lock alone.
    utils.in_threads(save, people, "scans", THREADS)


def save_masks(template: Template, voxel: float, folder: Path) -> None:
    """Write where loss is planted (truth.nii.gz) and the brain (mask.nii.gz), in template space."""
    place = np.stack(np.meshgrid(*(voxel * np.arange(n) for n in grid_shape(voxel)), indexing="ij"))
    brain = ndimage.binary_fill_holes(sample(template.t1, place) > CSF / 2)
    regions = (sample(template.region, place) >= 0.5) & (sample(template.grey, place) >= GREY)
    save_volume((brain & regions).astype(np.uint8), voxel, folder / "truth.nii.gz")
    save_volume(brain.astype(np.uint8), voxel, folder / "mask.nii.gz")


def save_table(people: list[Subject], folder: Path) -> None:
    """Write data.csv, the cohort as train_cv.py reads it."""
    columns = ["path", "label", "subject"]
    table = pd.DataFrame([dataclasses.asdict(person) for person in people])[columns]
    storage.write_csv(table, folder / "data.csv")


# The folder --------------------------------------------------------------------------------------


def cohort_files(folder: Path, subjects: int) -> Files:
    """What a cohort consists of, and of the one before it in the folder, if any: no other file is removed.

    Raises:
        InputError: another program's cohort.json is in the way, or what scans/ should be is no folder.
    """
    record, scans = folder / RECORD, (folder / scan_path(0)).parent
    former = storage.read_json(record).get("subjects") if record.exists() else []
    if not isinstance(former, list):
        raise InputError(f"{record}: not written by simulate.py; choose another --outpath")
    if scans.exists() and not (scans.is_dir() and os.access(scans, os.W_OK)):
        raise InputError(f"--outpath {folder}: {scans} is not a folder that can be written to")
    paths = [scan_path(index) for index in range(max(subjects, len(former)))]
    part = ["truth.nii.gz", "mask.nii.gz", *paths[:subjects], "data.csv"]
    return Files(RECORD, part, beside=paths[subjects:])


def describe(people: list[Subject], voxel: float, severity: float) -> dict[str, Any]:
    """How a cohort is made and what each subject is given, as cohort.json says beside the identity."""
    return {
        "planted": severity > 0,
        "shape": grid_shape(voxel),
        "affine": grid_affine(voxel).tolist(),
        "regions_mm": {name: {"path": path, "radius": radius} for name, (path, radius) in REGIONS.items()},
        "feather_mm": FEATHER,
        "truth_grey_matter": GREY,
        "subjects": [dataclasses.asdict(person) for person in people],
    }


@utils.command("the cohort is not finished; the same command starts again")
def main(argv: list[str] | None = None) -> int:
    """Draw the people, then write record, masks, scans and the table."""
    args = get_parser().parse_args(argv)
    severity = 0.0 if args.null else args.severity
    people = [draw_subject(args.seed, index, severity) for index in range(args.subjects)]
    identity = {"severity": severity, "voxel_mm": args.voxel, "seed": args.seed}
    identity["number_of_subjects"] = len(people)
    files = cohort_files(args.outpath, len(people))
    results = ResultFolder(args.outpath, files, [PART], identity, overwrite=args.overwrite)
    if results.check() and not results.unfinished():
        print(f"{args.outpath}: simulated before, kept")
        return 0
    with results.at_work(describe(people, args.voxel, severity)) as missing:
        if missing:  # nobody else made the same meanwhile
            template = load_template()
            save_masks(template, args.voxel, args.outpath)
            save_scans(people, template, args.voxel, args.outpath)
            save_table(people, args.outpath)
            results.finish(PART)
    patients = sum(person.label for person in people)
    print(f"{args.outpath}: {len(people)} scans, {len(people) - patients} controls and {patients} patients")
    return 0


if __name__ == "__main__":
    sys.exit(main())
