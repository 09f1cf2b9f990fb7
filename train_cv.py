"""Train a 3D CNN to tell patients from controls, with k-fold cross-validation and early stopping.

    python3 train_cv.py --path data.csv --device 0

Every subject is tested once, by a network that never saw it. A second call with the same arguments
keeps the folds that are finished.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dataset
import metrics
import models
import utils

WRITTEN = [
    "run.json",
    "folds.csv",
    "state_dict_f*.pth",
    "history_f*.csv",
    "predictions.csv",
    "metrics.csv",
    "training.png",
]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# options that change neither the networks nor the folds
INCIDENTAL = ("path", "outpath", "device", "run_folds", "workers", "cache", "overwrite")


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    whole, real = utils.number(int, at_least=1), utils.number(float, at_least=0)
    add = parser.add_argument
    add("--path", type=Path, required=True, metavar="CSV", help="list of scans: path, label[, subject]")
    add("--outpath", type=Path, default=Path("models"), metavar="DIR", help="where to write")
    add("--model", default="modelA24", help="family A-D and number of filters")
    add("--device", default="auto", help="GPU number, cpu, cuda:N, mps or auto")
    add("--batch", type=whole, default=5, help="scans per training step")
    add("--fold", type=utils.number(int, at_least=2), default=5, help="number of folds")
    add("--lr", type=utils.number(float, above=0), default=1e-4, help="learning rate of Adam")
    add("--wd", type=real, default=1e-4, help="weight decay of Adam")
    add("--epochs", type=whole, default=200, help="at most so many epochs")
    add("--patience", type=whole, default=10, help="stop after so many epochs without improvement")
    add("--delta", type=real, default=0.0, help="smallest fall of the validation loss that counts")
    add("--split", choices=dataset.SPLITS, default="stratified", help="how subjects are divided into folds")
    fraction = utils.number(float, above=0, below=1)
    add("--val-fraction", type=fraction, default=0.2, help="share of the training subjects for validation")
    add(
        "--seed",
        type=utils.number(int, at_least=0, at_most=2**32 - 1),
        default=0,
        help="of folds, weights and shuffling",
    )
    add("--run-folds", type=utils.number(int, at_least=0), nargs="+", metavar="I", help="only these folds")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the forward and backward pass")
    add("--workers", type=utils.number(int, at_least=0), default=2, help="processes that read scans")
    add("--cache", choices=dataset.CACHES, default="auto", help="where decoded scans are kept")
    add("--overwrite", action="store_true", help="remove an earlier run in DIR first")
    return parser


def new_training(
    name: str, grid: dataset.Grid, device: torch.device, lr: float, wd: float, seed: int, fold: int
) -> tuple[models.CNN3d, torch.optim.Optimizer]:
    """An untrained network and its optimiser; the weights depend on the seed and the fold alone."""
    utils.seed_everything(utils.fold_seed(seed, fold))
    model = models.build_model(name, grid.shape).to(device)
    model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return model, torch.optim.Adam(model.parameters(), lr=lr, weight_decay=wd)


def make_loader(
    scans: dataset.Scans, folds: pd.DataFrame, fold: int, role: str, batch: int, workers: int, seed: int
) -> DataLoader:
    """Batches of one role of one fold; shuffled for training, else in the CSV's order."""
    order = utils.fold_seed(seed, fold) if role == "train" else None
    return dataset.loader(scans, dataset.rows(folds, fold, role), batch, workers, order)


def train_fold(
    model: models.CNN3d,
    optimiser: torch.optim.Optimizer,
    train: DataLoader,
    val: DataLoader,
    epochs: int,
    patience: int,
    delta: float,
    precision: torch.dtype,
    name: str,
) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """Train until the validation loss has not fallen by more than `delta` for `patience` epochs.

    Returns:
        The weights of the best epoch, on the CPU, and the history, one row per epoch.
    """
    best, waited, state, history = float("inf"), 0, {}, []
    for epoch in range(1, epochs + 1):
        begin = time.perf_counter()
        train_loss = train_epoch(model, train, optimiser, precision, f"{name}, epoch {epoch}")
        valid_loss, accuracy = evaluate(model, val)
        check_loss(valid_loss, f"{name}, epoch {epoch}, validation")
        seconds = time.perf_counter() - begin
        history.append([epoch, train_loss, valid_loss, accuracy, seconds])
        improved = valid_loss < best - delta
        print(
            f"{name}, epoch {epoch}: training loss {train_loss:.4f}, validation loss {valid_loss:.4f}, "
            f"accuracy {accuracy:.3f}, {seconds:.1f} s{', best' if improved else ''}",
            flush=True,
        )
        waited += 1
        if improved:
            best, waited, state = valid_loss, 0, weights(model)
        if waited >= patience:
            break
    columns = ["epoch", "train_loss", "valid_loss", "valid_accuracy", "seconds"]
    return state, pd.DataFrame(history, columns=columns)


def check_loss(loss: float, where: str) -> None:
    """Raise InputError where the loss is not finite."""
    if not np.isfinite(loss):
        raise utils.InputError(
            f"{where}: the loss is {loss}; nothing of this fold is saved, try a lower --lr"
        )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state dict on the CPU, in the published layout."""
    return {
        key: value.detach().to("cpu", copy=True).contiguous() for key, value in model.state_dict().items()
    }


def train_epoch(
    model: nn.Module, loader: DataLoader, optimiser: torch.optim.Optimizer, precision: torch.dtype, name: str
) -> float:
    """One pass over the training scans; returns the mean loss."""
    model.train()
    device = next(model.parameters()).device
    total = 0.0
    for number, (volume, label) in enumerate(utils.progress(loader, desc=name, leave=False), 1):
        volume, label = volume.to(device, non_blocking=True), label.to(device, non_blocking=True)
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            loss = F.cross_entropy(model(volume).float(), label)
        check_loss(loss.item(), f"{name}, batch {number}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        total += loss.item() * len(label)
    return total / len(loader.dataset)  # type: ignore[arg-type]


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """Logits (N, 2) and labels (N,) of all scans of a loader, on the CPU, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    logits, labels = [], []
    for volume, label in loader:
        logits.append(model(volume.to(device, non_blocking=True)).float().cpu())
        labels.append(label)
    return torch.cat(logits), torch.cat(labels)


def evaluate(model: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    logits, labels = predict(model, loader)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def predict_test(model: models.CNN3d, loader: DataLoader, test: pd.DataFrame) -> pd.DataFrame:
    """Predictions of one fold's test scans, in the columns of metrics.PREDICTIONS."""
    logits, _ = predict(model, loader)
    prob_1 = logits.double().softmax(1)[:, 1].numpy()
    return test.assign(prob_1=prob_1, predicted=logits.argmax(1).numpy())[metrics.PREDICTIONS]


def test_folds(
    name: str,
    grid: dataset.Grid,
    device: torch.device,
    load: Callable[[int, str], DataLoader],
    folds: pd.DataFrame,
    checkpoints: list[Path],
) -> pd.DataFrame:
    """Predict every fold's test scans with that fold's weights; columns as metrics.PREDICTIONS."""
    model = models.build_model(name, grid.shape)
    tests = folds[folds["role"] == "test"]
    predictions = []
    for fold, checkpoint in enumerate(checkpoints):
        models.load_weights(model, checkpoint, device)
        predictions.append(predict_test(model, load(fold, "test"), tests[tests["fold"] == fold]))
    return pd.concat(predictions)


def report(
    predictions: pd.DataFrame, histories: list[pd.DataFrame], delta: float, seed: int, outpath: Path
) -> None:
    """Write predictions, metrics and the loss curves; print the scores."""
    scores = metrics.metrics_table(predictions, seed)
    utils.write_csv(predictions, outpath / "predictions.csv")
    utils.write_csv(scores, outpath / "metrics.csv")
    draw_training(histories, delta, outpath / "training.png")
    print(metrics.summary(scores))
    print(f"written to {outpath}: state_dict_f*.pth, predictions.csv, metrics.csv, training.png")


def best_row(losses: Sequence[float], delta: float) -> int:
    """The row of a history whose weights were saved: the last to fall by more than `delta`."""
    best = 0
    for row, loss in enumerate(losses):
        best = row if loss < losses[best] - delta else best
    return best


def draw_training(histories: list[pd.DataFrame], delta: float, path: Path) -> None:
    """Loss curves of every fold, the epoch whose weights were saved marked (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(histories), figsize=(3.2 * len(histories), 3.2), sharey=True, squeeze=False
    )
    for fold, (axis, history) in enumerate(zip(axes[0], histories, strict=True)):
        best = history.iloc[best_row(history["valid_loss"].tolist(), delta)]
        axis.plot(history["epoch"], history["train_loss"], ".-", label="training")
        axis.plot(history["epoch"], history["valid_loss"], ".-", label="validation")
        axis.axvline(best["epoch"], color="grey", linestyle=":", linewidth=1)
        axis.plot(best["epoch"], best["valid_loss"], "k*", markersize=9, label="best epoch")
        axis.set(title=f"fold {fold}", xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes[0][0].set_ylabel("cross-entropy")
    axes[0][0].set_ylim(bottom=0)  # shared, and set once all curves are there
    axes[0][-1].legend(frameon=False)
    figure.tight_layout()
    with utils.whole_file(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)


@utils.command
def main(argv: list[str] | None = None) -> int:
    """Check everything, train the folds, test them, report."""
    args = get_parser().parse_args(argv)
    utils.hold_memory()
    device = utils.resolve_device(args.device)
    chosen = utils.choose_folds(args.run_folds, args.fold)
    table = dataset.read_csv(args.path)
    folds = dataset.make_folds(table, args.fold, args.split, args.val_fraction, args.seed)
    grid = dataset.check_grid(table)
    models.require_model(args.model, grid.shape)
    options = {name: value for name, value in vars(args).items() if name not in INCIDENTAL}
    identity = {"csv_sha256": utils.sha256(args.path), "grid": grid.record(), "arguments": options}
    utils.check_folder(args.outpath, "run.json", identity, WRITTEN, args.overwrite)
    scans = dataset.open_scans(table, grid, args.cache, args.outpath / "cache", args.workers)

    utils.start_folder(args.outpath, WRITTEN, args.overwrite)
    about = {"csv": str(args.path.resolve()), "model": args.model, "seed": args.seed}
    utils.write_json(about | identity | {"versions": utils.versions()}, args.outpath / "run.json")
    utils.write_csv(folds, args.outpath / "folds.csv")
    load = partial(make_loader, scans, folds, batch=args.batch, workers=args.workers, seed=args.seed)

    checkpoints = [args.outpath / f"state_dict_f{fold}.pth" for fold in range(args.fold)]
    histories = [args.outpath / f"history_f{fold}.csv" for fold in range(args.fold)]
    for fold in chosen:
        if checkpoints[fold].exists() and histories[fold].exists():
            print(f"fold {fold}: finished before, kept")
            continue
        model, optimiser = new_training(args.model, grid, device, args.lr, args.wd, args.seed, fold)
        state, history = train_fold(
            model, optimiser, load(fold, "train"), load(fold, "val"),
            args.epochs, args.patience, args.delta, PRECISIONS[args.precision], f"fold {fold}",
        )  # fmt: skip
        utils.write_csv(history, histories[fold])
        with utils.whole_file(checkpoints[fold]) as path:  # last: its presence says the fold is finished
            torch.save(state, path)

    missing = [f for f in range(args.fold) if not (checkpoints[f].exists() and histories[f].exists())]
    if missing:
        print(f"not trained yet: folds {missing}; tests and metrics follow with the last fold")
        return 0
    predictions = test_folds(args.model, grid, device, load, folds, checkpoints)
    losses = [pd.read_csv(history) for history in histories]
    report(predictions, losses, args.delta, args.seed, args.outpath)
    return 0


if __name__ == "__main__":
    sys.exit(main())
