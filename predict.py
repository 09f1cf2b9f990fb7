"""Predict new scans with the networks of a training run, all of them together.

    python3 predict.py --path new.csv --modelpath models --outpath predictions

The CSV needs nothing but paths. Every network of the run gives a probability, calibrated on its own
validation scans; prob_1 is their mean. A scan that the run was trained on is left to the network that tested
it, and one that does not look like the training scans is marked as atypical. The same command again goes on
with what is not finished.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
import models
import runs
import selfcheck
import utils
from atypical import Head
from classifier_scores import ENSEMBLE, MEAN, with_interval
from dataset import ScanDataset
from explaining import SAVE_EVERY
from internals import devices, nifti, process, sharing, storage
from internals.caches import Cache
from internals.errors import InputError, blaming
from internals.results import Files, ResultFolder, states_of
from models import CNN3d
from runs import Run, TrainedNetworks

FILES = Files(
    record="predict.json",
    part=["network_f{}.csv"],
    progress=["found_f{}{}.csv"],
    summary=["predictions.csv", "metrics.csv"],
    facts=["weights_sha256", "head_sha256", "found_sha256", "device_per_fold"],
)
FOUND = ["path", "logit_0", "logit_1", "atypical", "reason"]  # what a network finds of a scan
FEW = 10  # scans of which each gets a line


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    number = utils.bounded(int, at_least=0)
    add = parser.add_argument
    add("--path", type=Path, required=True, metavar="CSV", help="list of scans: path[, label][, subject]")
    add("--modelpath", type=Path, default=Path("models"), metavar="DIR", help="output of train_cv.py")
    add("--model", help="family A-D and number of filters (default: the run's)")
    add("--outpath", type=Path, default=Path("predictions"), metavar="DIR", help="where to write")
    add("--device", default="auto", help="GPU number, cpu, cuda:N, mps or auto")
    add("--resample", action="store_true", help=runs.RESAMPLE)
    add("--run-folds", type=number, nargs="+", metavar="I", help="only the networks of these folds")
    add(
        "--part",
        type=sharing.parse_part,
        default="1/1",
        metavar="I/N",
        help="the I-th of N parts of the scans",
    )
    add("--seed", type=utils.SEED, default=0, help="of the intervals' draws")
    add("--overwrite", action="store_true", help="remove earlier predictions, or those of --run-folds, first")
    parser.add_status()
    return parser


# Before any prediction ---------------------------------------------------------------------------


def read_ranges(run: Run) -> list[pd.DataFrame]:
    """What is typical of every network's training scans; nothing where nothing is known of them."""
    if not run.is_recorded:
        print("nothing is known of the training: probabilities are not calibrated, scans not compared")
        return []
    for name in (runs.RANGES, *(runs.HEAD.format(fold) for fold in range(run.cohort.k))):
        if not (run.folder / name).exists():
            raise InputError(f"{run.folder / name}: no such file{runs.REMEDY}")
    return atypical.read_ranges(run.folder / runs.RANGES, run.cohort.k)


def result_folder(
    run: Run,
    networks: TrainedNetworks,
    temperatures: Sequence[float],
    ranges: Sequence[pd.DataFrame],
    asked_for: Mapping[str, Any],
    where: Mapping[str, Any],
) -> ResultFolder:
    """Where the predictions go; its parts are the networks that predict any scan."""
    cohort, folds = run.cohort, run.folds
    identity = {"model": run.model, "folds": cohort.k, **asked_for, "temperatures": list(temperatures)}
    identity["typical_sha256"] = storage.file_sha256(run.folder / runs.RANGES) if ranges else None
    made_from = {fold: {"weights_sha256": networks.digest(fold)} for fold in folds}
    for fold in folds if ranges else ():
        made_from[fold]["head_sha256"] = storage.file_sha256(run.folder / runs.HEAD.format(fold))
    is_labelled = (cohort.table["label"] != dataset.UNKNOWN).any()
    files = replace(FILES, summary=FILES.summary if is_labelled else FILES.summary[:1])
    return ResultFolder(
        files=files, parts=folds, identity=identity | cohort.identity, made_from=made_from, **where
    )


def check_kept(folder: Path, fold: int) -> None:
    """Raise InputError where what a network found is not as it was written."""
    record, file = folder / FILES.record, folder / FILES.part[0].format(fold)
    with blaming(record):
        digests = storage.entry(storage.read_json(record), "found_sha256", dict)
    if digests.get(str(fold)) != storage.file_sha256(file):
        raise InputError(f"{file}: is not as it was written; --overwrite starts again")


# The networks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One network of the ensemble, and what its training scans look like, where that is known."""

    network: CNN3d
    head: Head | None = None
    ranges: pd.DataFrame | None = None

    @torch.no_grad()
    def look(self, volume: torch.Tensor, path: str) -> dict[str, Any]:
        """What it finds of a scan (1, 1, X, Y, Z): FOUND."""
        device = next(self.network.parameters()).device
        logits = self.network(devices.to_device(volume, device))[0].tolist()
        if self.head is None or self.ranges is None:
            return dict(zip(FOUND, [path, *logits, "", ""], strict=True))
        traits = self.head.traits(volume[0, 0].cpu().numpy())
        reason = atypical.reasons(traits, self.ranges)
        return dict(zip(FOUND, [path, *logits, int(reason != ""), reason], strict=True))


def load_member(
    fold: int,
    networks: TrainedNetworks,
    scans: ScanDataset,
    ranges: Sequence[pd.DataFrame],
    device: torch.device,
) -> Member:
    """The network of a fold, and what its training scans look like."""
    network, run = networks.load(fold, scans, device), networks.run
    if not ranges or not atypical.is_known(ranges[fold]):
        return Member(network)
    mean, grid = nifti.read_image(run.folder / runs.HEAD.format(fold), run.cohort.grid, "the scans")
    return Member(network, Head(mean, grid.affine), ranges[fold])


def predict_scans(
    members: Mapping[int, Member],
    scans: ScanDataset,
    paths: Sequence[str],
    rows: Mapping[int, list[int]],
    found: Mapping[int, list[dict[Any, Any]]],
    save: Callable[[], None],
) -> None:
    """Ask every network about the scans that it has not seen yet; each scan is read once.

    Args:
        members: by fold.
        scans, paths: of all scans.
        rows: those that each network is to predict.
        found: what each found of the first of them so far; the others' is added.
        save: called now and then, after a signal to stop, and in the end.
    """
    due = {fold: set(rows[fold][len(found[fold]) :]) for fold in members}
    order, saved = sorted(set().union(*due.values())), time.monotonic()
    device = next(next(iter(members.values())).network.parameters()).device
    with process.steps(save) as finish_step:
        # one at a time, so that parts change nothing
        loader = scans.loader(order, 1, device=device)
        for row, (volume, _) in zip(utils.progress(order, desc="predicting"), loader, strict=True):
            for fold, member in members.items():
                if row in due[fold]:
                    found[fold].append(member.look(volume, paths[row]))
            finish_step()
            if time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()
        save()


def predict_folds(
    missing: Sequence[int],
    networks: TrainedNetworks,
    scans: ScanDataset,
    ranges: Sequence[pd.DataFrame],
    results: ResultFolder,
    device: torch.device,
) -> None:
    """Predict this call's share of the scans by the missing networks; finish those that are complete."""
    cohort, share = networks.run.cohort, results.division
    lacking = [fold for fold in missing if not results.is_share_done(fold)]
    files = {fold: results.progress_file(fold, share) for fold in lacking}
    rows = {fold: share.deal(cohort.scan_indices(fold, "test")) for fold in lacking}
    found: dict[int, list[dict[Any, Any]]]
    found = {fold: read_found(file).to_dict("records") for fold, file in files.items()}

    def save() -> None:
        for fold, file in files.items():
            storage.write_csv(pd.DataFrame(found[fold], columns=FOUND), file)

    if lacking:
        members = {fold: load_member(fold, networks, scans, ranges, device) for fold in lacking}
        predict_scans(members, scans, cohort.table["path"].tolist(), rows, found, save)
    for fold in missing:
        with results.finish_share(fold) as about:
            if about is None:
                continue
            tables = [read_found(results.progress_file(fold, each)) for each in share.all()]
            whole = pd.concat([table for table in tables if len(table)]).set_index("path")
            paths = cohort.table["path"][cohort.scan_indices(fold, "test")]
            if sorted(whole.index) != sorted(paths):
                file = results.progress_file(fold, share)
                raise InputError(f"{file}: lacks scans, or has others; remove it to predict them again")
            file = results.path / FILES.part[0].format(fold)
            storage.write_csv(whole.loc[paths].reset_index(), file)
            about["found_sha256"] = storage.file_sha256(file)
            about["device_per_fold"] = devices.describe(device)


def read_found(file: Path) -> pd.DataFrame:
    """What a network found so far, as FOUND; nothing where there is no such file."""
    if not file.exists():
        return pd.DataFrame(columns=FOUND)
    try:
        # all as text: a path may be "NA", and a number is to be the very same again
        table = pd.read_csv(file, dtype=str, keep_default_na=False, index_col=False)
        if list(table.columns) != FOUND or not table["atypical"].isin(["0", "1", ""]).all():
            raise ValueError(f"expected the columns {', '.join(FOUND)}")
        numbers = {name: [float(value) for value in table[name]] for name in ("logit_0", "logit_1")}
        return table.assign(**numbers)
    except (OSError, ValueError) as problem:
        raise InputError(f"{file}: cannot be read ({problem}); --overwrite starts again") from problem


# What they say together --------------------------------------------------------------------------


def combine(run: Run, found: Mapping[int, pd.DataFrame], temperatures: Sequence[float]) -> pd.DataFrame:
    """The ensemble's prediction of every scan, as predictions.csv has it.

    A scan is atypical where most of the networks that predict it find it so; the reason is the first one's.
    It is blank where none knows what is typical.
    """
    cohort = run.cohort
    table = cohort.table[dataset.COLUMNS].copy()
    prob = np.full((len(table), cohort.k), np.nan)
    marks, reasons = np.full(prob.shape, np.nan), np.full(prob.shape, "", dtype=object)
    for fold, each in found.items():
        rows = cohort.scan_indices(fold, "test")
        margin = (each["logit_1"] - each["logit_0"]).to_numpy()
        prob[rows, fold] = calibration.calibrated(margin, temperatures[fold])
        marks[rows, fold] = [float(mark or "nan") for mark in each["atypical"]]
        reasons[rows, fold] = each["reason"]
    mean = np.nanmean(prob, axis=1)
    table = table.assign(
        prob_1=mean, predicted=(mean > 0.5).astype(int), prob_sd=pd.DataFrame(prob).std(axis=1)
    )
    table = table.assign(**{f"prob_f{fold}": prob[:, fold] for fold in range(cohort.k)})
    known = np.isfinite(marks).any(axis=1)
    is_atypical = known & (np.nansum(marks, axis=1) > np.isfinite(marks).sum(axis=1) / 2)
    first = [next((words for words in row if words), "") for row in reasons]
    return table.assign(
        seen=run.seen.astype(int) if run.is_recorded else "",
        atypical=pd.Series(is_atypical.astype(int), dtype="Int64").where(known),
        reason=np.where(is_atypical, first, ""),
    )


def report(run: Run, table: pd.DataFrame, seed: int, folder: Path) -> None:
    """Write the predictions, and their scores where there are labels."""
    known = table[table["label"] != dataset.UNKNOWN]
    if known.empty:
        storage.write_csv(table.drop(columns="label"), folder / "predictions.csv")
        return
    storage.write_csv(dataset.as_written(table), folder / "predictions.csv")
    members = known[[f"prob_f{fold}" for fold in range(run.cohort.k)]].to_numpy()
    label, prob_1 = known["label"].to_numpy(int), known["prob_1"].to_numpy()
    scores = classifier_scores.ensemble_table(label, prob_1, members, known["subject"].tolist(), seed)
    storage.write_csv(scores, folder / "metrics.csv")


def say_predictions(run: Run, folder: Path) -> None:
    """Print every prediction where there are few, how many there are of each kind, and the scores."""
    table = pd.read_csv(folder / "predictions.csv", dtype={"path": str, "reason": str}, keep_default_na=False)
    if len(table) <= FEW:
        print("\n".join(in_words(row, run.cohort.k) for row in table.to_dict("records")))
    counts = {"as label 1": "predicted", "the run's own": "seen", "atypical": "atypical"}
    words = [f"{(table[name] == 1).sum()} {what}" for what, name in counts.items()]
    print(f"{len(table)} scans predicted by {run.cohort.k} networks {run.model}: {', '.join(words)}")
    if (folder / "metrics.csv").exists():
        scores = pd.read_csv(folder / "metrics.csv").set_index("network")
        for name in (ENSEMBLE, MEAN):
            own = scores.loc[name].to_dict()
            print(f"{name}: AUC {with_interval(own, 'auc')}, Brier score {with_interval(own, 'brier')}")


def in_words(row: Mapping[Any, Any], k: int) -> str:
    """A row of predictions.csv, of so many networks, as people read it."""
    own = [float(row[f"prob_f{fold}"]) for fold in range(k) if row[f"prob_f{fold}"] != ""]
    known = ", the run's own" if row["seen"] == 1 else ""
    odd = f", ATYPICAL: {row['reason']}" if row["reason"] else ""
    spread = f"networks {min(own):.3f} to {max(own):.3f}"
    return f"{row['path']}: probability of label 1 {row['prob_1']:.3f} ({spread}){known}{odd}"


@utils.command("what is finished is saved; the same command, without --overwrite, goes on from there")
def main(argv: list[str] | None = None) -> int:
    """Check everything, ask the networks, put together what they say."""
    args = get_parser().parse_args(argv)
    if args.status:
        utils.say_states(args.outpath, states_of(args.outpath, FILES))
        return 0
    process.keep_freed_memory()
    device = selfcheck.open_device(args.device)
    run = runs.find_run_for(args.path, args.modelpath, args.model, args.resample)
    cohort, networks = run.cohort, TrainedNetworks(run)
    chosen = utils.choose_folds(args.run_folds, cohort.k)
    networks.check(range(cohort.k))
    temperatures, ranges = calibration.known_temperatures(run), read_ranges(run)
    devices.check_batch(1, models.largest_output(run.model, cohort.grid.shape), device)
    share = sharing.own_share().within(args.part)
    share.check_overwrite(args.overwrite)
    asked = [fold for fold in chosen if fold in run.folds]
    only = asked if args.run_folds else None
    where = {"path": args.outpath, "chosen": only, "overwrite": args.overwrite, "share": share}
    asked_for = {"resample": args.resample, "seed": args.seed}
    results = result_folder(run, networks, temperatures, ranges, asked_for, where)
    results.check(partial(check_kept, args.outpath))

    about = {"csv": str(args.path.resolve()), "modelpath": str(run.folder.resolve())}
    work = f"one scan of {'x'.join(map(str, cohort.grid.shape))} voxels, {run.model}, on {device}"
    with process.out_of_memory(work, "use --device cpu, or --run-folds"):
        own = {row for fold in asked for row in share.deal(cohort.scan_indices(fold, "test"))}
        scans = cohort.open_scans(Cache("none", args.outpath), rows=sorted(own))
        share.say()
        runs.say_seen(run)
        with results.at_work(about) as missing:
            utils.say_kept(asked, missing)
            predict_folds(missing, networks, scans, ranges, results, device)
            with results.summary() as due:
                if due:
                    found = {f: read_found(results.path / FILES.part[0].format(f)) for f in run.folds}
                    report(run, combine(run, found, temperatures), args.seed, args.outpath)
            if unfinished := results.unfinished():
                print(f"not predicted yet: by the networks of folds {unfinished}; predictions.csv follows")
            else:
                say_predictions(run, args.outpath)
                print(f"written to {args.outpath}: {', '.join(results.files.summary)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
