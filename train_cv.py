"""Train a 3D CNN to tell patients from controls, with k-fold cross-validation and early stopping.

    python3 train_cv.py --path data.csv --device 0

Every subject is tested once, by a network that never saw it. The same command again keeps the folds that
are finished and goes on with an interrupted one after its last finished epoch.
"""

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import classifier_scores
import dataset
import figures
import models
import selfcheck
import utils
from dataset import Loader
from internals import devices, process, storage
from internals.checkpoints import UNREADABLE, load_weights
from internals.devices import PRECISIONS
from internals.errors import InputError, blaming

SUMMARY = ["predictions.csv", "metrics.csv", "training.png"]  # of all folds
PER_FOLD = ["state_dict_f{}.pth", "history_f{}.csv", "progress_f{}.pth"]
WRITTEN = ["run.json", "folds.csv", *(name.format("*") for name in PER_FOLD), *SUMMARY]
DEVICES = "devices_per_fold"  # in run.json
HISTORY = ["epoch", "train_loss", "valid_loss", "valid_accuracy", "seconds"]
# options that change neither the networks nor the folds
INCIDENTAL = ("path", "outpath", "device", "run_folds", "workers", "cache", "overwrite")


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    whole, real = utils.bounded(int, at_least=1), utils.bounded(float, at_least=0)
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
    fraction = utils.bounded(float, above=0, below=1)
    add("--val-fraction", type=fraction, default=0.2, help="share of the training subjects for validation")
    add(
        "--seed",
        type=utils.bounded(int, at_least=0, at_most=2**32 - 1),
        default=0,
        help="of folds, weights and shuffling",
    )
    add("--run-folds", type=utils.bounded(int, at_least=0), nargs="+", metavar="I", help="only these folds")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the forward and backward pass")
    add(
        "--workers",
        type=utils.bounded(int, at_least=0),
        default=2,
        help="processes or threads that read scans",
    )
    add("--cache", choices=dataset.CACHES, default="auto", help="where decoded scans are kept")
    add("--overwrite", action="store_true", help="remove an earlier run in DIR, or its --run-folds, first")
    return parser


def new_training(
    name: str, grid: dataset.Grid, device: torch.device, lr: float, wd: float, seed: int, fold: int
) -> tuple[models.CNN3d, torch.optim.Optimizer]:
    """An untrained network and its optimiser; the weights depend on the seed and the fold alone."""
    utils.seed_everything(utils.fold_seed(seed, fold))
    model = models.build_model(name, grid.shape).to(device)
    model = model.to(memory_format=devices.memory_format(device))  # type: ignore[call-overload]
    return model, torch.optim.Adam(model.parameters(), lr=lr, weight_decay=wd)


def make_loader(
    scans: dataset.Scans,
    folds: pd.DataFrame,
    fold: int,
    role: str,
    batch: int,
    workers: int,
    seed: int,
    device: torch.device,
) -> Loader:
    """Batches of one role of one fold; shuffled for training, else in the CSV's order."""
    order = utils.fold_seed(seed, fold) if role == "train" else None
    return dataset.loader(scans, dataset.rows(folds, fold, role), batch, workers, order, device)


@dataclass
class Course:
    """How the training of a fold went so far."""

    history: list[list[float]] = field(default_factory=list)  # one row of HISTORY per epoch
    best: float = float("inf")  # the smallest validation loss
    waited: int = 0  # epochs since then
    weights: dict[str, Tensor] = field(default_factory=dict)  # of that epoch, on the CPU

    def goes_on(self, epochs: int, patience: int) -> bool:
        """Whether another epoch follows."""
        return len(self.history) < epochs and self.waited < patience


def train_fold(
    model: models.CNN3d,
    optimiser: torch.optim.Optimizer,
    train: Loader,
    val: Loader,
    epochs: int,
    patience: int,
    delta: float,
    precision: torch.dtype,
    name: str,
    progress: Path,
) -> Course:
    """Train until the validation loss has not fallen by more than `delta` for `patience` epochs.

    After every epoch all that the next one depends on is written to `progress`; where that file exists,
    training goes on from there, as if it had never stopped.
    """
    course = Course()
    if progress.exists():
        course = load_progress(progress, model, optimiser, train)
        print(f"{name}: goes on after epoch {len(course.history)}")
    while course.goes_on(epochs, patience):
        begin, epoch = time.perf_counter(), len(course.history) + 1
        train_loss = train_epoch(model, train, optimiser, precision, f"{name}, epoch {epoch}")
        valid_loss, accuracy = evaluate(model, val)
        check_loss(valid_loss, f"{name}, epoch {epoch}, validation")
        seconds = time.perf_counter() - begin
        course.history.append([epoch, train_loss, valid_loss, accuracy, seconds])
        course.waited += 1
        improved = valid_loss < course.best - delta
        if improved:
            course.best, course.waited, course.weights = valid_loss, 0, weights(model)
        save_progress(course, model, optimiser, train, progress)
        print(
            f"{name}, epoch {epoch}: training loss {train_loss:.4f}, validation loss {valid_loss:.4f}, "
            f"accuracy {accuracy:.3f}, {seconds:.1f} s{', best' if improved else ''}",
            flush=True,
        )
    return course


def save_progress(
    course: Course, model: models.CNN3d, optimiser: torch.optim.Optimizer, train: Loader, path: Path
) -> None:
    """Write all that the next epoch depends on."""
    device = next(model.parameters()).device
    state: dict[str, Any] = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
    state |= {"course": vars(course), "random": process.random_states(device)}
    state |= {"loader": cast(torch.Generator, train.generator).get_state()}
    storage.write_tensors(state, path)


def load_progress(path: Path, model: models.CNN3d, optimiser: torch.optim.Optimizer, train: Loader) -> Course:
    """Restore what `save_progress` wrote into model, optimiser, loader and random generators."""
    device = next(model.parameters()).device
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        cast(torch.Generator, train.generator).set_state(state["loader"])
        process.restore_random(state["random"], device)
        return Course(**state["course"])
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as problem:
        reason = f"is damaged ({type(problem).__name__}); remove it to train this fold from its start"
        raise InputError(f"{path}: {reason}") from problem


def check_loss(loss: float, where: str) -> None:
    """Raise InputError where the loss is not finite."""
    if not np.isfinite(loss):
        raise InputError(f"{where}: the loss is {loss}; nothing of this epoch is saved, try a lower --lr")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state dict on the CPU, in the published layout."""
    return {
        key: value.detach().to("cpu", copy=True).contiguous() for key, value in model.state_dict().items()
    }


def train_epoch(
    model: nn.Module, loader: Loader, optimiser: torch.optim.Optimizer, precision: torch.dtype, name: str
) -> float:
    """One pass over the training scans; returns the mean loss.

    A loss is looked at one step late: to look is to wait for the GPU, which then has the next step to do.
    """
    model.train()
    device = next(model.parameters()).device
    total = 0.0
    unseen: deque[tuple[Tensor, Callable[[], None], int]] = deque()  # losses, on their way to the CPU

    def look(number: int) -> float:
        loss, wait, scans = unseen.popleft()
        wait()
        check_loss(loss.item(), f"{name}, batch {number}")
        return loss.item() * scans

    for number, (volume, label) in enumerate(utils.progress(loader, desc=name, leave=False)):
        volume, label = devices.to_device(volume, device), devices.to_device(label, device)
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            loss = F.cross_entropy(model(volume).float(), label)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        seen = loss.detach().to("cpu", non_blocking=device.type == "cuda")
        unseen.append((seen, devices.record_event(device), len(label)))
        total += look(number) if len(unseen) > 1 else 0
    return (total + look(len(loader))) / len(loader.dataset)  # type: ignore[arg-type]


@torch.no_grad()
def predict(model: nn.Module, loader: Loader) -> tuple[Tensor, Tensor]:
    """Logits (N, 2) and labels (N,) of all scans of a loader, on the CPU, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    logits, labels = [], []
    for volume, label in loader:
        logits.append(model(devices.to_device(volume, device)).float().cpu())
        labels.append(label)
    return torch.cat(logits), torch.cat(labels)


def evaluate(model: nn.Module, loader: Loader) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    logits, labels = predict(model, loader)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def predict_test(model: models.CNN3d, loader: Loader, test: pd.DataFrame) -> pd.DataFrame:
    """Predictions of one fold's test scans, in the columns of classifier_scores.PREDICTIONS."""
    logits, _ = predict(model, loader)
    prob_1 = logits.double().softmax(1)[:, 1].numpy()
    return test.assign(prob_1=prob_1, predicted=logits.argmax(1).numpy())[classifier_scores.PREDICTIONS]


# One output folder, several processes --------------------------------------------------------------


def start_run(
    folder: Path,
    identity: dict[str, Any],
    about: dict[str, Any],
    folds: pd.DataFrame,
    overwrite: list[str],
) -> None:
    """Write run.json and folds.csv where they are not there yet."""
    with storage.locked(folder / storage.LOCK):
        found = storage.start_folder(folder, "run.json", identity, WRITTEN, overwrite)
        record = {"versions": storage.versions()} | found | about | identity
        if record != found:  # none yet, or the CSV has moved
            storage.write_json(record, folder / "run.json")
        if not (folder / "folds.csv").exists():
            storage.write_csv(folds, folder / "folds.csv")


def check_folds(folder: Path, folds: pd.DataFrame) -> None:
    """Raise InputError where folds.csv is there, but not as this run wrote it."""
    file = folder / "folds.csv"
    if file.exists() and file.read_bytes() != folds.to_csv(index=False, lineterminator="\n").encode():
        raise InputError(f"{file}: is not as this run wrote it; --overwrite without --run-folds starts again")


def note_device(folder: Path, fold: "Fold", device: torch.device) -> None:
    """Enter the device that a fold is trained on into run.json, beside those it was trained on before."""
    number, here = str(fold.number), devices.describe(device)
    with storage.locked(folder / storage.LOCK):
        known = trained_on(folder)
        before = known.get(number, []) if fold.progress.exists() else []
        known[number] = before if here in before else [*before, here]
        record = storage.read_json(folder / "run.json")
        storage.write_json(record | {DEVICES: dict(sorted(known.items()))}, folder / "run.json")


def trained_on(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The devices that each fold was trained on, from run.json."""
    record = storage.read_json(folder / "run.json")
    with blaming(folder / "run.json"):
        known = storage.recorded({DEVICES: {}} | record, DEVICES, dict)
        return {fold: storage.recorded(known, fold, list) for fold in known}


class Fold:
    """The files of one fold."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.checkpoint, self.history, self.progress = (folder / name.format(number) for name in PER_FOLD)

    @property
    def finished(self) -> bool:
        """Whether its training ended."""
        return self.checkpoint.exists() and self.history.exists()

    def check(self, model: models.CNN3d) -> None:
        """Raise InputError where it is finished, but its files are not as they were written."""
        if not self.finished:
            return
        load_weights(model, self.checkpoint, torch.device("cpu"))
        try:
            history = pd.read_csv(self.history, dtype=float)
        except (OSError, ValueError) as problem:
            raise InputError(f"{self.history}: cannot be read ({problem})") from problem
        if list(history.columns) != HISTORY or history.empty:
            raise InputError(f"{self.history}: expected the columns {HISTORY} and at least one epoch")

    def kept(self) -> bool:
        """Whether it was finished before, which is said."""
        if self.finished:
            print(f"fold {self.number}: finished before, kept")
            self.progress.unlink(missing_ok=True)
        return self.finished

    def begin(self) -> None:
        """Remove a checkpoint whose history is lost, so that it never passes for that of a new history."""
        self.checkpoint.unlink(missing_ok=True)

    def finish(self, course: Course) -> None:
        """Write what training led to; the checkpoint last, as its presence says so."""
        storage.write_csv(pd.DataFrame(course.history, columns=HISTORY), self.history)
        storage.write_tensors(course.weights, self.checkpoint)
        self.progress.unlink()


def all_trained(folds: list[Fold]) -> bool:
    """Whether every fold is finished; those that are not are named."""
    missing = [fold.number for fold in folds if not fold.finished]
    if missing:
        print(f"not trained yet: folds {missing}; tests and metrics follow with the last fold")
    return not missing


def summarised(folder: Path) -> bool:
    """Whether the folds that are there were tested before, which is said."""
    done = all((folder / name).exists() for name in SUMMARY)
    if done:
        print(f"{folder}: tested before, kept")
    return done


def test_folds(
    name: str,
    grid: dataset.Grid,
    device: torch.device,
    load: Callable[[int, str], Loader],
    folds: pd.DataFrame,
    checkpoints: list[Path],
) -> pd.DataFrame:
    """Predict every fold's test scans with that fold's weights; columns as classifier_scores.PREDICTIONS."""
    model = models.build_model(name, grid.shape)
    tests = folds[folds["role"] == "test"]
    predictions = []
    for fold, checkpoint in enumerate(checkpoints):
        load_weights(model, checkpoint, device)
        predictions.append(predict_test(model, load(fold, "test"), tests[tests["fold"] == fold]))
    return pd.concat(predictions)


def report(predictions: pd.DataFrame, folds: list[Fold], delta: float, seed: int, outpath: Path) -> None:
    """Write predictions, metrics and the loss curves; print the scores."""
    scores = classifier_scores.metrics_table(predictions, seed)
    storage.write_csv(predictions, outpath / "predictions.csv")
    storage.write_csv(scores, outpath / "metrics.csv")
    figures.draw_training([pd.read_csv(fold.history) for fold in folds], delta, outpath / "training.png")
    print(classifier_scores.summary(scores))
    print(f"written to {outpath}: state_dict_f*.pth, predictions.csv, metrics.csv, training.png")


@utils.command(
    "finished folds and epochs are saved; the same command, without --overwrite, goes on from there"
)
def main(argv: list[str] | None = None) -> int:
    """Check everything, train the folds, test them, report."""
    args = get_parser().parse_args(argv)
    process.keep_freed_memory()
    device = selfcheck.open_device(args.device, args.precision)
    chosen = utils.choose_folds(args.run_folds, args.fold)
    table = dataset.read_csv(args.path)
    folds = dataset.make_folds(table, args.fold, args.split, args.val_fraction, args.seed)
    grid = dataset.check_grid(table)
    model = models.require_model(args.model, grid.shape)
    largest = models.largest_output(args.model, grid.shape)
    devices.check_batch(args.batch, largest, device)
    options = {name: value for name, value in vars(args).items() if name not in INCIDENTAL}
    identity: dict[str, Any] = {"csv_sha256": storage.sha256(args.path)}
    identity |= {"scans_sha256": dataset.scans_digest(table)}
    identity |= {"folds_sha256": dataset.folds_digest(folds), "grid": grid.record(), "arguments": options}
    about = {"csv": str(args.path.resolve()), "model": args.model, "seed": args.seed}
    every = [Fold(args.outpath, number) for number in range(args.fold)]
    overwrite = storage.overwritten(WRITTEN, PER_FOLD, SUMMARY, args.run_folds) if args.overwrite else []
    if storage.check_folder(args.outpath, "run.json", identity, WRITTEN, overwrite):
        with storage.locked(args.outpath / storage.LOCK):  # another process may remove folds of its own
            check_folds(args.outpath, folds)
            trained_on(args.outpath)
            for fold in every:
                if not (args.overwrite and fold.number in chosen):
                    fold.check(model)
    work = f"--batch {args.batch} of {'x'.join(map(str, grid.shape))} voxels, {args.model}, on {device}"
    limits = work, "lower --batch, take fewer filters, or --cache disk"
    with process.out_of_memory(*limits):
        scans = dataset.open_scans(
            table, grid, args.cache, args.outpath / "cache", args.workers, device, bool(args.run_folds),
            devices.training_memory(args.batch, largest),
        )  # fmt: skip
    load = partial(
        make_loader, scans, folds, batch=args.batch, workers=args.workers, seed=args.seed, device=device
    )

    with storage.claimed(args.outpath, [f"fold {fold}" for fold in chosen]), process.out_of_memory(*limits):
        start_run(args.outpath, identity, about, folds, overwrite)
        for number in chosen:
            if every[number].kept():
                continue
            storage.remove(args.outpath, SUMMARY)
            every[number].begin()
            note_device(args.outpath, every[number], device)
            network = new_training(args.model, grid, device, args.lr, args.wd, args.seed, number)
            course = train_fold(
                *network, load(number, "train"), load(number, "val"), args.epochs, args.patience,
                args.delta, PRECISIONS[args.precision], f"fold {number}", every[number].progress,
            )  # fmt: skip
            every[number].finish(course)
        with storage.locked(args.outpath / storage.LOCK):
            if not all_trained(every) or summarised(args.outpath):
                return 0
            checkpoints = [fold.checkpoint for fold in every]
            predictions = test_folds(args.model, grid, device, load, folds, checkpoints)
            report(predictions, every, args.delta, args.seed, args.outpath)
    return 0


if __name__ == "__main__":
    sys.exit(main())
