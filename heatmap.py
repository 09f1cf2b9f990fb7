"""Turn the networks of a training run into brain maps: LRP, integrated gradients or guided Grad-CAM.

    python3 heatmap.py --method IG

Explains each fold's test scans with that fold's weights. The CSV, the model and the folds come from
the run record under --modelpath. A folder that holds only published state_dict_f*.pth files needs
--path and --model; the published contiguous folds are used then. The same command again keeps the folds
that are finished.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sized
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

import dataset
import figures
import models
import runs
import selfcheck
import utils
from dataset import Loader
from ggc import guided_gradcam
from ig import integrated_gradients
from internals import checkpoints, devices, nifti, process, storage
from internals.errors import InputError, blaming
from lrp import lrp
from runs import Run

METHODS: dict[str, Callable[..., Tensor]] = {
    "LRP": lrp,
    "IG": integrated_gradients,
    "GGC": guided_gradcam,
}
TARGETS = ("label", "predicted", "0", "1")
BASELINES = ("zero", "controls")
WEIGHTS = ("trained", "random")
WORKERS = 2  # processes or threads that decode scans
CALIBRATION = 32  # training scans at most that give an untrained network's BatchNorm its statistics
STEM = 150  # characters of a scan's own name in its map's: with all that is added, a name has at most 255
MEANS = ["map_all.nii.gz", "map_all.png", "mean_scan.nii.gz"]  # of all folds
PER_FOLD = ["map_f{}.nii.gz", "baseline_f{}.nii.gz", "subjects/f{}_*.nii.gz"]
WRITTEN = ["map.json", "subjects.csv", *(name.format("*") for name in PER_FOLD), *MEANS]
SUBJECT_COLUMNS = ["fold", *dataset.COLUMNS, "predicted", "target", "prob_target", "sum", "residual", "zero"]
# what map.json says of each finished fold
MADE = ("weights_sha256", "scans_per_fold", "zero_maps_per_fold", "device_per_fold")


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    whole = utils.bounded(int, at_least=1)
    add = parser.add_argument
    add("--method", choices=METHODS, required=True, help="how the networks are explained")
    add("--path", type=Path, metavar="CSV", help="list of scans (default: the run's)")
    add("--modelpath", type=Path, default=Path("models"), metavar="DIR", help="output of train_cv.py")
    add("--model", help="family A-D and number of filters (default: the run's)")
    add("--outpath", type=Path, default=Path("heatmaps"), metavar="DIR", help="maps go to DIR/METHOD")
    add("--device", default="auto", help="GPU number, cpu, cuda:N, mps or auto")
    add("--fold", type=utils.bounded(int, at_least=2), help="number of folds (default: the run's, else 5)")
    add("--batch", type=whole, default=1, help="scans explained at once")
    add("--run-folds", type=utils.bounded(int, at_least=0), nargs="+", metavar="I", help="only these folds")
    add("--target", choices=TARGETS, default="label", help="the logit to explain")
    add("--weights", choices=WEIGHTS, default="trained", help="or untrained: maps to hold the others against")
    seed = utils.bounded(int, at_least=0, at_most=2**32 - 1)
    add("--seed", type=seed, default=0, help="of random weights")
    add("--steps", type=whole, default=100, help="IG: steps of the Riemann sum")
    add(
        "--baseline",
        choices=BASELINES,
        default="zero",
        help="IG: a black image, or the training controls' mean",
    )
    add(
        "--beta",
        type=utils.bounded(float, at_least=0, at_most=100),
        default=0.5,
        help="LRP: weight of inhibiting contributions",
    )
    add("--save-subjects", action="store_true", help="also write the map of every scan")
    add("--overwrite", action="store_true", help="remove earlier maps of this method, or --run-folds, first")
    return parser


# The weights --------------------------------------------------------------------------------------


def check_weights(run: Run, modelpath: Path, folds: list[int], weights: str) -> None:
    """Build the network and load the folds' trained weights once; raises InputError where that fails."""
    model = models.require_model(run.model, run.grid.shape)
    for fold in folds if weights == "trained" else []:
        checkpoints.load_weights(model, run.checkpoint(modelpath, fold), torch.device("cpu"))


def digests(run: Run, modelpath: Path, weights: str, seed: int, folds: Iterable[int]) -> dict[int, str]:
    """What tells the weights of each fold from others; folds without any are left out."""
    if weights == "random":
        scans = calibration_scans(run)
        return {
            fold: f"random, seed {seed}, BatchNorm of {scans[str(fold)]} training scans" for fold in folds
        }
    paths = {fold: run.checkpoint(modelpath, fold) for fold in folds}
    return {fold: storage.sha256(path) for fold, path in paths.items() if path.exists()}


def load_fold(
    run: Run,
    modelpath: Path,
    scans: dataset.Scans,
    fold: int,
    weights: str,
    seed: int,
    device: torch.device,
) -> models.CNN3d:
    """The network of a fold: trained, or as it was before any training, on a seed of the fold's own."""
    if weights == "random":
        return untrained(run, scans, fold, seed, device)
    model = models.build_model(run.model, run.grid.shape)
    return checkpoints.load_weights(model, run.checkpoint(modelpath, fold), device)


def untrained(run: Run, scans: dataset.Scans, fold: int, seed: int, device: torch.device) -> models.CNN3d:
    """A network as it was before any training, but for the running statistics of its BatchNorm.

    As they are set up (mean 0, variance 1) they shrink what differs between scans from block to block, until
    the network is nearly a constant function, and its maps are no floor for others. So they are estimated, as
    the mean over some training scans, whose labels are not looked at.
    """
    utils.seed_everything(utils.fold_seed(seed, fold))
    model = models.build_model(run.model, run.grid.shape).to(device)
    update_bn(dataset.loader(scans, calibration_rows(run, fold), 1, WORKERS, device=device), model, device)
    return model.eval()


def calibration_rows(run: Run, fold: int) -> list[int]:
    """The training scans of a fold that statistics are estimated on: at most 32, evenly spaced in the CSV."""
    train = dataset.rows(run.folds, fold, "train")
    count = min(len(train), CALIBRATION)
    return [train[number * len(train) // count] for number in range(count)]


def calibration_scans(run: Run) -> dict[str, int]:
    """How many scans of every fold statistics are estimated on."""
    return {str(fold): len(calibration_rows(run, fold)) for fold in range(run.k)}


# One fold ----------------------------------------------------------------------------------------


def map_fold(
    model: models.CNN3d,
    run: Run,
    scans: dataset.Scans,
    fold: int,
    method: str,
    options: dict[str, Any],
    batch: int,
    folder: Path,
) -> pd.DataFrame:
    """Explain a fold's test scans and write their mean map; returns the fold's rows of subjects.csv."""
    rows = dataset.rows(run.folds, fold, "test")
    baseline = None
    if options.get("baseline") == "controls":
        mean = scans.mean(training_controls(run, fold))
        nifti.save_map(mean, run.grid.header, folder / f"baseline_f{fold}.nii.gz")
        baseline = torch.from_numpy(mean).to(next(model.parameters()).device)[None, None]

    def keep(number: int, values: np.ndarray) -> None:
        if options["save_subjects"]:
            file = subject_file(folder, fold, rows[number], run.table["path"][rows[number]])
            nifti.save_map(values, run.grid.header, file)

    explain, expected = configure(method, model, run.grid, options, baseline)
    loader = dataset.loader(scans, rows, batch, WORKERS, device=next(model.parameters()).device)
    mean, about = explain_fold(
        model, loader, explain, expected, options["target"], keep, f"{method} fold {fold}"
    )
    nifti.save_map(mean, run.grid.header, folder / f"map_f{fold}.nii.gz")
    known = run.table.loc[rows, dataset.COLUMNS].reset_index(drop=True).assign(fold=fold)
    return pd.concat([known, about], axis=1)[SUBJECT_COLUMNS]


def training_controls(run: Run, fold: int) -> list[int]:
    """The rows of a fold's training controls; InputError where it has none."""
    controls = [row for row in dataset.rows(run.folds, fold, "train") if run.table["label"][row] == 0]
    if not controls:
        raise InputError(f"--baseline controls: fold {fold} has no controls among its training scans")
    return controls


def configure(
    method: str, model: models.CNN3d, grid: dataset.Grid, options: dict[str, Any], baseline: Tensor | None
) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor] | None]:
    """Bind a method's options.

    Returns:
        explain(model, volume, target) -> maps, and expected(logits, target) -> what each map should
        sum to, (B,): the logit for LRP (conservation), its rise over the baseline for IG
        (completeness), None for GGC, whose sum means nothing.
    """
    explain = METHODS[method]
    if method == "LRP":
        return partial(explain, beta=options["beta"]), _pick
    if method == "GGC":
        return explain, None
    blank = torch.zeros(1, 1, *grid.shape, device=next(model.parameters()).device)
    with torch.no_grad():
        origin = model(blank if baseline is None else baseline)  # (1, 2)
    return (
        partial(explain, steps=options["steps"], baseline=baseline),
        lambda logits, target: _pick(logits - origin, target),
    )


def _pick(logits: Tensor, target: Tensor) -> Tensor:
    """Each scan's value of its target: (B, 2), (B,) -> (B,)."""
    return logits.gather(1, target[:, None])[:, 0]


def choose_target(rule: str, label: Tensor, logits: Tensor) -> Tensor:
    """The logit to explain for each scan, int64 (B,)."""
    if rule == "label":
        return label
    return logits.argmax(1) if rule == "predicted" else torch.full_like(label, int(rule))


def explain_fold(
    model: models.CNN3d,
    loader: Loader,
    explain: Callable[..., Tensor],
    expected: Callable[[Tensor, Tensor], Tensor] | None,
    target_rule: str,
    keep: Callable[[int, np.ndarray], None],
    name: str,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Explain every scan of a loader, holding no more than a batch and a running sum.

    Args:
        keep: called with each scan's number within the fold and its map (X, Y, Z).
        name: for the progress bar and errors.

    Returns:
        The mean map, float64 (X, Y, Z), and the last columns of SUBJECT_COLUMNS, one row per scan.
    """
    device = next(model.parameters()).device
    total: Any = 0.0
    rows: list[pd.DataFrame] = []
    done = 0
    with utils.progress(None, len(cast(Sized, loader.dataset)), desc=name) as bar:
        for volume, label in loader:
            volume, label = devices.to_device(volume, device), devices.to_device(label, device)
            with torch.no_grad():
                logits = model(volume)
            target = choose_target(target_rule, label, logits)
            maps = explain(model, volume, target)
            if not torch.isfinite(maps).all():
                raise FloatingPointError(f"{name}: a map has values that are not finite")
            rows.append(describe(maps, logits, target, expected))
            for values in maps[:, 0].cpu().numpy():
                keep(done, values)
                total = total + values.astype(np.float64)
                done += 1
            bar.update(len(label))
    return total / done, pd.concat(rows, ignore_index=True)


def describe(
    maps: Tensor, logits: Tensor, target: Tensor, expected: Callable[[Tensor, Tensor], Tensor] | None
) -> pd.DataFrame:
    """What subjects.csv says of each map; the residual is relative, and NaN without an expectation."""
    wanted = None if expected is None else expected(logits, target).cpu().double()
    maps, logits, target = maps.cpu(), logits.cpu(), target.cpu()  # before float64, which MPS does not have
    sums = maps.double().sum((1, 2, 3, 4))
    residual = torch.full_like(sums, torch.nan) if wanted is None else (sums - wanted).abs() / wanted.abs()
    zero = (maps == 0).flatten(1).all(1).long()
    columns = [logits.argmax(1), target, _pick(logits.double().softmax(1), target), sums, residual, zero]
    return pd.DataFrame({n: c.numpy() for n, c in zip(SUBJECT_COLUMNS[-6:], columns, strict=True)})


def subject_file(folder: Path, fold: int, row: int, path: str) -> Path:
    """Where the map of one scan goes; the row in the CSV keeps scans of one name apart."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", Path(path).name.removesuffix(".gz").removesuffix(".nii"))
    stem = stem[:STEM]
    return folder / "subjects" / f"f{fold}_{row:05d}_{stem}.nii.gz"


# All folds ---------------------------------------------------------------------------------------


def average_folds(folder: Path, run: Run, scans: dataset.Scans, title: str) -> None:
    """Write the mean of the fold means, the mean scan, and the picture of one over the other."""
    mean = np.zeros(run.grid.shape)
    for fold in range(run.k):
        mean += nifti.load_map(folder / f"map_f{fold}.nii.gz") / run.k
    nifti.save_map(mean, run.grid.header, folder / "map_all.nii.gz")
    background = scans.mean(range(len(scans)))
    nifti.save_map(background, run.grid.header, folder / "mean_scan.nii.gz")
    figures.draw_map(mean, background, run.grid.affine, title, folder / "map_all.png")


def method_options(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the given options that shape a method's maps, as map.json keeps them."""
    if given["baseline"] == "controls" and method != "IG":
        raise InputError(f"--baseline controls: only IG has a baseline, {method} has none")
    own = {"IG": ("steps", "baseline"), "LRP": ("beta",), "GGC": ()}[method]
    seed = ("seed",) if given["weights"] == "random" else ()
    return {name: given[name] for name in ("target", "save_subjects", "weights", *seed, *own)}


def folder_name(method: str, options: dict[str, Any]) -> str:
    """The folder of a method's maps: METHOD, with -controls and -random where they are such."""
    controls = "-controls" if options.get("baseline") == "controls" else ""
    return f"{method}{controls}{'-random' if options['weights'] == 'random' else ''}"


def read_subjects(folder: Path) -> pd.DataFrame:
    """The rows of subjects.csv so far; none where it does not exist. Paths and subjects stay text."""
    file = folder / "subjects.csv"
    if not file.exists():
        return pd.DataFrame(columns=SUBJECT_COLUMNS)
    with blaming(file):
        rows = dataset.read_rows(file)
        header = next(rows, None)
        if header == SUBJECT_COLUMNS[:-1]:
            raise InputError(
                "is of an earlier version (no column zero); --overwrite without --run-folds starts again"
            )
        if header != SUBJECT_COLUMNS:
            raise InputError(f"is damaged: expected the columns {', '.join(SUBJECT_COLUMNS)}")
        try:
            return pd.DataFrame([_subject(row) for row in rows], columns=SUBJECT_COLUMNS)
        except ValueError as problem:
            raise InputError(f"is damaged ({problem})") from problem


def _subject(row: list[str]) -> list[Any]:
    """One row of subjects.csv; ValueError where a cell is not what its column holds."""
    fold, path, label, subject, predicted, target, *numbers, zero = row
    prob_target, total, residual = (float(number or "nan") for number in numbers)
    if zero not in ("0", "1"):
        raise ValueError(f"zero is '{zero}', expected 0 or 1")
    known = [int(fold), path, int(label), subject, int(predicted), int(target)]
    return [*known, prob_target, total, residual, int(zero)]


def save_rows(folder: Path, fold: int, rows: pd.DataFrame, digest: str, device: dict[str, str]) -> None:
    """Enter a fold into subjects.csv, then into map.json, which says that it is finished."""
    made = dict(zip(MADE, (digest, len(rows), int(rows["zero"].sum()), device), strict=True))
    with storage.locked(folder / storage.LOCK):
        others = read_subjects(folder)
        tables = [part for part in (others[others["fold"] != fold], rows) if len(part)]
        storage.write_csv(pd.concat(tables).sort_values("fold", kind="stable"), folder / "subjects.csv")
        record = storage.read_json(folder / "map.json")
        for name, entries in read_made(folder).items():
            record[name] = dict(sorted((entries | {str(fold): made[name]}).items()))
        storage.write_json(record, folder / "map.json")


def start_maps(
    folder: Path,
    identity: dict[str, Any],
    about: dict[str, Any],
    overwrite: list[str],
) -> None:
    """Write map.json, with no fold finished where it is not there yet."""
    fresh: dict[str, Any] = {name: {} for name in MADE}
    with storage.locked(folder / storage.LOCK):
        found = storage.start_folder(folder, "map.json", identity, WRITTEN, overwrite)
        record = identity | fresh | {"versions": storage.versions()} | found | about
        if record != found:  # none yet, or what it is about has moved
            storage.write_json(record, folder / "map.json")
        if identity["options"]["save_subjects"]:
            storage.make_folder(folder / "subjects")


def strike(folder: Path, folds: list[int]) -> None:
    """Strike folds off map.json and subjects.csv before they are made anew; what is made of all goes."""
    with storage.locked(folder / storage.LOCK):
        made = read_made(folder)
        for entries in made.values():
            for fold in folds:
                entries.pop(str(fold), None)
        storage.write_json(storage.read_json(folder / "map.json") | made, folder / "map.json")
        subjects = read_subjects(folder)
        if subjects["fold"].isin(folds).any():
            storage.write_csv(subjects[~subjects["fold"].isin(folds)], folder / "subjects.csv")
        storage.remove(folder, MEANS)


def read_made(folder: Path) -> dict[str, dict[str, Any]]:
    """What map.json says of the finished folds: the entries of MADE, by the fold's number as text."""
    record = storage.read_json(folder / "map.json")
    with blaming(folder / "map.json"):
        return {name: storage.recorded({name: {}} | record, name, dict) for name in MADE}


def finished_folds(folder: Path, weights: dict[int, str]) -> list[int]:
    """The folds whose map was made with the weights that are there now, from `digests`."""
    made = read_made(folder)["weights_sha256"]
    known = set(read_subjects(folder)["fold"])
    return [
        fold
        for fold, digest in weights.items()
        if fold in known and made.get(str(fold)) == digest and (folder / f"map_f{fold}.nii.gz").exists()
    ]


def summary(subjects: pd.DataFrame) -> str:
    """How well the maps' sums keep their promise, and how many maps are all zero, as two lines."""
    residual, zero = subjects["residual"].dropna(), subjects.groupby("fold")["zero"]
    kept = f"median {residual.median():.2g}, worst {residual.max():.2g}"
    counts = ", ".join(f"{flags.sum()} of {len(flags)} in fold {fold}" for fold, flags in zero)
    return (
        f"{len(subjects)} scans explained{'' if residual.empty else f'; residual of the sums: {kept}'}\n"
        f"maps that are zero everywhere: {counts}"
    )


@utils.command("finished folds are saved; the same command, without --overwrite, explains the others")
def main(argv: list[str] | None = None) -> int:
    """Check everything, explain the folds, average them."""
    args = get_parser().parse_args(argv)
    process.keep_freed_memory()
    device = selfcheck.open_device(args.device)
    options = method_options(args.method, vars(args))
    run = runs.find_run(args.modelpath, args.path, args.model, args.fold)
    chosen = utils.choose_folds(args.run_folds, run.k)
    check_weights(run, args.modelpath, chosen, args.weights)
    devices.check_batch(args.batch, models.largest_output(run.model, run.grid.shape), device)
    for fold in chosen if args.baseline == "controls" else []:
        training_controls(run, fold)
    weights = digests(run, args.modelpath, args.weights, args.seed, range(run.k))
    name = folder_name(args.method, options)
    folder = args.outpath / name
    identity = {"method": args.method, "options": options, "model": run.model, "folds": run.k}
    identity |= {"csv_sha256": storage.sha256(run.csv), "scans_sha256": dataset.scans_digest(run.table)}
    identity |= {"folds_sha256": dataset.folds_digest(run.folds), "grid": run.grid.record()}
    about: dict[str, Any] = {"csv": str(run.csv), "modelpath": str(args.modelpath.resolve())}
    if args.weights == "random":
        about |= {"calibration_scans_per_fold": calibration_scans(run)}
    overwrite = storage.overwritten(WRITTEN, PER_FOLD, MEANS, args.run_folds) if args.overwrite else []
    if storage.check_folder(folder, "map.json", identity, WRITTEN, overwrite):
        read_subjects(folder)
        read_made(folder)
    scans = dataset.open_scans(run.table, run.grid, "reuse", args.modelpath / "cache", WORKERS)

    work = f"--batch {args.batch} of {'x'.join(map(str, run.grid.shape))} voxels, {run.model}, on {device}"
    memory = process.out_of_memory(work, "lower --batch")
    with storage.claimed(folder, [f"fold {fold}" for fold in chosen]), memory:
        start_maps(folder, identity, about, overwrite)
        kept = set(chosen) & set(finished_folds(folder, weights))
        for fold in sorted(kept):
            print(f"fold {fold}: explained before, kept")
        missing = [fold for fold in chosen if fold not in kept]
        if missing:
            strike(folder, missing)
        for fold in missing:
            model = load_fold(run, args.modelpath, scans, fold, args.weights, args.seed, device)
            if digests(run, args.modelpath, args.weights, args.seed, [fold]) != {fold: weights[fold]}:
                raise InputError(f"{args.modelpath}: the weights of fold {fold} changed meanwhile")
            rows = map_fold(model, run, scans, fold, args.method, options, args.batch, folder)
            save_rows(folder, fold, rows, weights[fold], devices.describe(device))
        # of several processes the first to see all folds finished
        with storage.locked(folder / storage.LOCK):
            finished, subjects = finished_folds(folder, weights), read_subjects(folder)
            missing = [fold for fold in range(run.k) if fold not in finished]
            if not missing and not all((folder / file).exists() for file in MEANS):
                title = f"{name}, {run.model}: mean of {run.k} folds, {len(subjects)} test scans"
                average_folds(folder, run, scans, title)
    print(summary(subjects[subjects["fold"].isin(finished)]))
    if missing:
        print(f"not explained yet, or with other weights: folds {missing}")
    else:
        print(f"written to {folder}: map_all.nii.gz, map_all.png, map_f*.nii.gz, subjects.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
