"""Train a 3D CNN to tell patients from controls, with k-fold cross-validation and early stopping.

    python3 train_cv.py --path data.csv --device 0

Every subject is tested once, by a network that never saw it. The same command again keeps the folds that
are finished and goes on with an interrupted one after its last finished epoch.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import atypical
import calibration
import classifier_scores
import dataset
import figures
import model_card
import models
import runs
import selfcheck
import training
import utils
from calibration import Temperature
from classifier_scores import CALIBRATED
from dataset import Cohort, Grid, ScanDataset
from internals import caches, devices, nifti, process, sharing, storage
from internals.caches import Cache
from internals.checkpoints import load_weights
from internals.devices import PRECISIONS
from internals.errors import InputError
from internals.loading import Loader
from internals.results import Files, ResultFolder, states_of
from models import CNN3d
from training import Schedule, TrainingState

Load = Callable[[int, str], Loader]  # what makes the batches of a fold's role

FILES = Files(
    record="run.json",
    shared=["folds.csv"],
    part=["history_f{}.csv", "state_dict_f{}.pth"],
    beside=[runs.HEAD, runs.CONTROLS],
    progress=["progress_f{}.pth"],
    summary=[
        "predictions.csv",
        "metrics.csv",
        "training.png",
        runs.TEMPERATURES,
        "calibration.png",
        runs.SCANS,
        runs.RANGES,
        "model_card.md",
    ],
    facts=["devices_per_fold"],
)
# options that change neither the networks nor the folds
INCIDENTAL = ("path", "outpath", "device", "run_folds", "workers", "cache", "overwrite", "status")


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    number, whole = utils.bounded(int, at_least=0), utils.bounded(int, at_least=1)
    fraction, real = utils.bounded(float, above=0, below=1), utils.bounded(float, at_least=0)
    add = parser.add_argument
    add("--path", type=Path, required=True, metavar="CSV", help="list of scans: path, label[, subject]")
    add("--outpath", type=Path, default=Path("models"), metavar="DIR", help="where to write")
    add("--model", default="modelA24", help="family A-D and number of filters")
    add("--device", default="auto", help="GPU number, cpu, cuda:N, mps or auto")
    add("--batch", type=whole, default=5, help="scans per training step")
    add("--fold", type=utils.bounded(int, at_least=2), default=5, help="number of folds")
    add("--lr", type=utils.bounded(float, above=0, at_most=1), default=1e-4, help="learning rate of Adam")
    add("--wd", type=utils.bounded(float, at_least=0, at_most=1), default=1e-4, help="weight decay of Adam")
    add("--epochs", type=whole, default=200, help="at most so many epochs")
    add("--patience", type=whole, default=10, help="stop after so many epochs without improvement")
    add("--delta", type=real, default=0.0, help="smallest fall of the validation loss that counts")
    add("--split", choices=dataset.SPLITS, default="stratified", help="how subjects are divided into folds")
    add("--val-fraction", type=fraction, default=0.2, help="share of the training subjects for validation")
    add("--seed", type=utils.SEED, default=0, help="of folds, weights and shuffling")
    add(
        "--permute-labels",
        action="store_true",
        help="shuffle the training and validation labels: networks that learn nothing, as a floor for maps",
    )
    add("--run-folds", type=number, nargs="+", metavar="I", help="only these folds")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the forward and backward pass")
    add("--workers", type=number, default=2, help="processes or threads that read scans")
    add("--cache", choices=caches.KINDS, default="auto", help="where decoded scans are kept")
    add("--overwrite", action="store_true", help="remove an earlier run in DIR, or its --run-folds, first")
    parser.add_status()
    return parser


# Before any training -----------------------------------------------------------------------------


def own_folds(wanted: list[int] | None, k: int, overwrite: bool) -> tuple[list[int], list[int] | None]:
    """The folds of this process, of several that torchrun started its share; and None where it has all."""
    share = sharing.own_share()
    share.check_overwrite(overwrite)
    chosen = share.deal(utils.choose_folds(wanted, k))
    if not chosen:
        print(f"process {share.number} of {share.of}: no fold is left for this one")
    return chosen, chosen if wanted or share.of > 1 else None


def check_fold(folder: Path, network: CNN3d, fold: int) -> None:
    """Raise InputError where the files of a finished fold are not as they were written."""
    load_weights(network, folder / f"state_dict_f{fold}.pth", torch.device("cpu"))
    file = folder / f"history_f{fold}.csv"
    try:
        history = pd.read_csv(file, dtype=float)
    except (OSError, ValueError) as problem:
        raise InputError(f"{file}: cannot be read ({problem})") from problem
    if list(history.columns) != training.HISTORY or history.empty:
        raise InputError(f"{file}: expected the columns {training.HISTORY} and at least one epoch")


def check_folds(file: Path, folds: pd.DataFrame) -> None:
    """Raise InputError where folds.csv is there, but not as this run wrote it."""
    if file.exists() and file.read_bytes() != folds.to_csv(index=False, lineterminator="\n").encode():
        raise InputError(f"{file}: is not as this run wrote it; --overwrite without --run-folds starts again")


def save_folds(results: ResultFolder, folds: pd.DataFrame) -> None:
    """Write folds.csv where it is not there yet."""
    file = results.path / "folds.csv"
    with results.locked():
        if not file.exists():
            storage.write_csv(folds, file)


# Training and testing ----------------------------------------------------------------------------


def batches(
    cohort: Cohort,
    scans: Callable[[int], ScanDataset],
    batch: int,
    workers: int,
    seed: int,
    device: torch.device,
) -> Load:
    """What makes batches of one role of one fold; shuffled for training, else in the CSV's order."""

    def load(fold: int, role: str) -> Loader:
        shuffling = utils.own_seed(seed, fold) if role == "train" else None
        return scans(fold).loader(cohort.scan_indices(fold, role), batch, workers, shuffling, device)

    return load


def with_permuted_labels(cohort: Cohort, scans: ScanDataset, seed: int) -> Callable[[int], ScanDataset]:
    """The scans as a fold sees them where its training and validation labels are shuffled."""
    return lambda fold: scans.with_labels(cohort.permuted_labels(fold, seed))


def start(name: str, grid: Grid, lr: float, wd: float, seed: int, device: torch.device) -> TrainingState:
    """An untrained network and its optimiser; the weights follow from the seed alone."""
    utils.seed_everything(seed)
    return training.new_state(models.build_model(name, grid.shape), lr, wd, device)


def train_fold(state: TrainingState, fold: int, load: Load, schedule: Schedule, folder: Path) -> None:
    """Train a fold; write its history and the weights of its best epoch."""
    progress = folder / f"progress_f{fold}.pth"
    training.train(state, load(fold, "train"), load(fold, "val"), schedule, progress, f"fold {fold}")
    history = pd.DataFrame(state.history, columns=training.HISTORY)
    storage.write_csv(history, folder / f"history_f{fold}.csv")
    storage.write_tensors(state.best_weights, folder / f"state_dict_f{fold}.pth")


def test_folds(
    network: CNN3d, cohort: Cohort, load: Load, folder: Path, device: torch.device
) -> tuple[pd.DataFrame, list[Temperature]]:
    """Predict every fold's test scans with that fold's weights, calibrated on its validation scans.

    Returns:
        The columns classifier_scores.PREDICTIONS and CALIBRATED; and every fold's temperature.
    """
    predictions, temperatures = [], []
    for fold in range(cohort.k):
        load_weights(network, folder / f"state_dict_f{fold}.pth", device)
        margin, label, _ = margins(network, load(fold, "val"))
        temperatures.append(calibration.fit_temperature(margin, label))
        margin, _, prob_1 = margins(network, load(fold, "test"))
        found = {"prob_1": prob_1, "predicted": (margin > 0).astype(int)}
        found[CALIBRATED] = calibration.calibrated(margin, temperatures[fold].value)
        scans = cohort.table.loc[cohort.scan_indices(fold, "test")]
        predictions.append(scans.assign(fold=fold, **found)[[*classifier_scores.PREDICTIONS, CALIBRATED]])
    return pd.concat(predictions), temperatures


def margins(network: CNN3d, scans: Loader) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every scan logit 1 less logit 0, the label, and the probability of label 1, (N,) each."""
    logits, labels = training.predict(network, scans)
    logits = logits.double()
    return (logits[:, 1] - logits[:, 0]).numpy(), labels.numpy(), logits.softmax(1)[:, 1].numpy()


# What is made of all folds -----------------------------------------------------------------------


def describe_scans(cohort: Cohort, scans: ScanDataset, folder: Path) -> pd.DataFrame:
    """Write what new scans are compared with; returns what is typical, as atypical.COLUMNS."""
    known = zip(cohort.table["path"], dataset.scan_digests(cohort.table), strict=True)
    storage.write_csv(pd.DataFrame(known, columns=runs.SCAN_COLUMNS), folder / runs.SCANS)
    ranges = []
    for fold in utils.progress(range(cohort.k), desc="what scans look like", leave=False):
        train, test = (
            runs.evenly(cohort.scan_indices(fold, role), atypical.MOST) for role in ("train", "test")
        )
        mean = atypical.common_head(scans, train)
        controls = scans.mean(cohort.training_controls(fold))
        for name, values in ((runs.HEAD, mean), (runs.CONTROLS, controls)):
            nifti.save_map(values, cohort.grid.header, folder / name.format(fold))
        head = atypical.Head(mean, cohort.grid.affine)
        ranges.append(atypical.ranges_table(scans, head, train, test).assign(fold=fold)[atypical.COLUMNS])
    table = pd.concat(ranges)
    storage.write_csv(table, folder / runs.RANGES)
    return table


def report(
    predictions: pd.DataFrame,
    temperatures: list[Temperature],
    ranges: pd.DataFrame,
    cohort: Cohort,
    arguments: dict[str, Any],
    folder: Path,
) -> None:
    """Write predictions, metrics, calibration, pictures and the model card; print the scores."""
    scores = classifier_scores.metrics_table(predictions, arguments["seed"])
    errors = calibration.calibration_table(predictions, temperatures)
    for table, name in (
        (predictions, "predictions.csv"),
        (scores, "metrics.csv"),
        (errors, runs.TEMPERATURES),
    ):
        storage.write_csv(table, folder / name)
    histories = [pd.read_csv(folder / f"history_f{fold}.csv") for fold in range(cohort.k)]
    figures.draw_training(histories, arguments["delta"], folder / "training.png")
    label, columns = predictions["label"].to_numpy(), {"before": "prob_1", "after": CALIBRATED}
    bins = {
        when: calibration.reliability(label, predictions[name].to_numpy()) for when, name in columns.items()
    }
    figures.draw_calibration(bins, folder / "calibration.png")
    card = model_card.model_card(cohort, arguments, [len(h) for h in histories], scores, errors, ranges)
    storage.write_text(card, folder / "model_card.md")
    print(classifier_scores.summary(scores))
    print("\n".join(filter(None, [calibration.summary(errors), calibration.notes(temperatures)])))
    print(atypical.summary(ranges))


def say_state(results: ResultFolder) -> None:
    """Print what is still to be done, or where everything is."""
    unfinished = results.unfinished()
    if unfinished:
        print(f"not trained yet: folds {unfinished}; tests and metrics follow with the last fold")
    else:
        print(
            f"written to {results.path}: state_dict_f*.pth, predictions.csv, metrics.csv, training.png, "
            "calibration.png, model_card.md"
        )


@utils.command(
    "finished folds and epochs are saved; the same command, without --overwrite, goes on from there"
)
def main(argv: list[str] | None = None) -> int:
    """Check everything, train the folds, test them, report."""
    args = get_parser().parse_args(argv)
    if args.status:
        utils.say_states(args.outpath, states_of(args.outpath, FILES))
        return 0
    process.keep_freed_memory()
    device = selfcheck.open_device(args.device, args.precision)
    chosen, only = own_folds(args.run_folds, args.fold, args.overwrite)
    folding = args.fold, args.split, args.val_fraction, args.seed
    cohort = dataset.new_cohort(args.path, *folding, runs.earlier_record(args.outpath))
    network = runs.new_network(args.model, cohort.grid)
    largest = models.largest_output(args.model, cohort.grid.shape)
    devices.check_batch(args.batch, largest, device)
    arguments = {name: value for name, value in vars(args).items() if name not in INCIDENTAL}
    identity, implied = cohort.identity | {"arguments": arguments}, {"permute_labels": False}
    folds = range(args.fold)
    means = [name.format(fold) for name in FILES.beside for fold in folds]
    files = replace(FILES, summary=[*FILES.summary, *means])
    results = ResultFolder(args.outpath, files, folds, identity, {}, only, args.overwrite, implied)
    if results.check(partial(check_fold, args.outpath, network)):
        check_folds(args.outpath / "folds.csv", cohort.folds)

    need = devices.training_memory(args.batch, largest)
    cache = Cache(args.cache, args.outpath / "cache", device, only is not None, need)
    schedule = Schedule(args.epochs, args.patience, args.delta, args.precision)
    work = devices.describe_batch(args.batch, cohort.grid.shape, args.model, device)
    with process.out_of_memory(work, "lower --batch, take fewer filters, or --cache disk"):
        scans = cohort.open_scans(cache, args.workers)
        seen = with_permuted_labels(cohort, scans, args.seed) if args.permute_labels else lambda fold: scans
        load = batches(cohort, seen, args.batch, args.workers, args.seed, device)
        about = {"csv": str(args.path.resolve()), "model": args.model, "seed": args.seed}
        about["scans_mark"] = cohort.checked.mark
        with results.at_work(about) as missing:
            save_folds(results, cohort.folds)
            utils.say_kept(chosen, missing)
            for fold in missing:
                seed = utils.own_seed(args.seed, fold)
                state = start(args.model, cohort.grid, args.lr, args.wd, seed, device)
                train_fold(state, fold, load, schedule, args.outpath)
                results.finish(fold, devices_per_fold=state.devices)
            with results.summary() as due:
                if due:
                    predictions, temperatures = test_folds(network, cohort, load, args.outpath, device)
                    ranges = describe_scans(cohort, scans, args.outpath)
                    report(predictions, temperatures, ranges, cohort, arguments, args.outpath)
            say_state(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
