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
from typing import Any, NamedTuple

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
from atypical import Head, Own
from calibration import Temperature
from classifier_scores import ENSEMBLE, MEAN, with_interval
from dataset import Cohort, ScanDataset
from explaining import SAVE_EVERY
from internals import devices, process, sharing, storage
from internals.caches import Cache
from internals.errors import InputError
from internals.process import printable
from internals.results import Files, ResultFolder, states_of
from internals.sharing import Share
from models import CNN3d
from runs import Run, TrainedNetworks

FILES = Files(
    record="predict.json",
    part=["network_f{}.csv"],
    beside=["metrics.csv"],  # which lists without labels have not
    progress=["found_f{}{}.csv"],
    summary=["predictions.csv", "metrics.csv"],
    facts=["weights_sha256", "head_sha256", "found_sha256", "device_per_fold"],
)
FOUND = ["path", "logit_0", "logit_1", "atypical", "reason"]  # what a network finds of a scan
FEW = 10  # scans of which each gets a line


class Typical(NamedTuple):
    """What is typical of a network's training scans."""

    head: Head
    ranges: pd.DataFrame


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
    add("--part", type=sharing.parse_part, default="1/1", metavar="I/N", help=sharing.PART)
    add("--seed", type=utils.SEED, default=0, help="of the intervals' draws")
    add("--overwrite", action="store_true", help="remove earlier predictions, or those of --run-folds, first")
    parser.add_status()
    return parser


# Before any prediction ---------------------------------------------------------------------------


def check_outpath(outpath: Path) -> None:
    """Raise InputError where predictions would take the place of a training run's."""
    if (outpath / "run.json").exists():
        raise InputError(f"--outpath {outpath}: holds a training run with predictions of its own")


def read_typical(run: Run) -> dict[int, Typical]:
    """What is typical of the training scans of every network; of those where that is known."""
    if not run.is_recorded:
        print("nothing is known of the training: probabilities are not calibrated, scans not compared")
        return {}
    if not (run.folder / runs.RANGES).exists():
        raise InputError(f"{run.folder / runs.RANGES}: no such file{runs.REMEDY}")
    found = {}
    for fold, ranges in enumerate(atypical.read_ranges(run.folder / runs.RANGES, run.cohort.k)):
        head = Head(run.mean_head(fold), run.cohort.grid.affine)
        if atypical.is_known(ranges):
            found[fold] = Typical(head, ranges)
    return found


def result_folder(
    networks: TrainedNetworks,
    temperatures: Sequence[Temperature],
    outpath: Path,
    only: list[int] | None,
    overwrite: bool,
    share: Share,
    asked: Mapping[str, Any],
) -> ResultFolder:
    """Where the predictions go; its parts are the networks that predict any scan."""
    run, cohort = networks.run, networks.run.cohort
    identity = {"model": run.model, "folds": cohort.k, **asked, **cohort.identity}
    identity["temperatures"] = [temperature.value for temperature in temperatures]
    known = [run.folder / name for name in (runs.RANGES, runs.TEMPERATURES)] if run.is_recorded else []
    identity |= {f"{file.stem}_sha256": storage.file_sha256(file) for file in known}
    made_from = {fold: {"weights_sha256": networks.digest(fold)} for fold in run.folds}
    for fold in run.folds if run.is_recorded else ():
        made_from[fold]["head_sha256"] = storage.file_sha256(run.folder / runs.HEAD.format(fold))
    is_labelled = (cohort.table["label"] != dataset.UNKNOWN).any()
    files = replace(FILES, summary=FILES.summary if is_labelled else FILES.summary[:1])
    return ResultFolder(outpath, files, run.folds, identity, made_from, only, overwrite, share=share)


# The networks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One network of the ensemble, and what its training scans look like, where that is known."""

    network: CNN3d
    typical: Typical | None = None

    @torch.no_grad()
    def predict(self, volume: torch.Tensor, scan: np.ndarray, own: Own, path: str) -> dict[str, Any]:
        """What it finds of a scan (1, 1, X, Y, Z), on its device, and (X, Y, Z): FOUND."""
        logits = self.network(volume)[0].tolist()
        if self.typical is None:
            return dict(zip(FOUND, [path, *logits, "", ""], strict=True))
        traits = self.typical.head.traits(scan, own)
        reason = atypical.reasons(traits, self.typical.ranges)
        return dict(zip(FOUND, [path, *logits, int(reason != ""), reason], strict=True))


def predict_scans(
    members: Mapping[int, Member],
    scans: ScanDataset,
    paths: Sequence[str],
    affine: np.ndarray,
    rows: Mapping[int, list[int]],
    found: Mapping[int, list[dict[Any, Any]]],
    save: Callable[[], None],
) -> None:
    """Ask every network about the scans that it has not seen yet; each scan is read once.

    Args:
        members: by fold.
        scans, paths, affine: of all scans.
        rows: those that each network is to predict.
        found: what each found of the first of them so far; the others' is added.
        save: called now and then, after a signal to stop, and in the end.
    """
    due = {fold: set(rows[fold][len(found[fold]) :]) for fold in members}
    order, saved = sorted(set().union(*due.values())), time.monotonic()
    device = next(next(iter(members.values())).network.parameters()).device
    with process.steps(save) as finish_step:
        loader = scans.loader(order, 1, device=device)  # one at a time, so that parts change nothing
        for row, (volume, _) in zip(utils.progress(order, desc="predicting"), loader, strict=True):
            scan = volume[0, 0].numpy()
            own = atypical.own_traits(scan, affine)
            volume = devices.to_device(volume, device)
            for fold, member in members.items():
                if row in due[fold]:
                    found[fold].append(member.predict(volume, scan, own, paths[row]))
            finish_step()
            if time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()
        save()


def predict_folds(
    missing: Sequence[int],
    networks: TrainedNetworks,
    scans: ScanDataset,
    typical: Mapping[int, Typical],
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
        members = {f: Member(networks.load(f, scans, device), typical.get(f)) for f in lacking}
        paths = cohort.table["path"].tolist()
        predict_scans(members, scans, paths, cohort.grid.affine, rows, found, save)
    for fold in missing:
        with results.finish_share(fold) as about:
            if about is not None:
                about |= put_together(results, cohort, fold)
                about["device_per_fold"] = devices.describe(device)


def put_together(results: ResultFolder, cohort: Cohort, fold: int) -> dict[str, Any]:
    """Write what a network found of all scans, from all shares; returns what the record says of it."""
    rows, tables = cohort.scan_indices(fold, "test"), []
    for share in results.division.all():
        dealt, file = share.deal(rows), results.progress_file(fold, share)
        table = read_found(file)
        if table["path"].tolist() != cohort.table["path"][dealt].tolist():
            raise InputError(f"{file}: does not list its scans; remove it to predict them again")
        tables.append(table.set_index(pd.Index(dealt)))
    file = results.path / FILES.part[0].format(fold)
    storage.write_csv(pd.concat([table for table in tables if len(table)]).sort_index(), file)
    return {"found_sha256": storage.file_sha256(file)}


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


def combine(run: Run, found: Mapping[int, pd.DataFrame], temperatures: Sequence[Temperature]) -> pd.DataFrame:
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
        prob[rows, fold] = calibration.calibrated(margin, temperatures[fold].value)
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


def report(results: ResultFolder, run: Run, temperatures: Sequence[Temperature], seed: int) -> None:
    """Write what is made of all networks, unless it is there, and print it; or print which are missing."""
    if unfinished := results.unfinished():
        print(f"not predicted yet: by the networks of folds {unfinished}; predictions.csv follows")
        return
    with results.summary() as due:
        if due:
            found = {fold: read_found(results.path / FILES.part[0].format(fold)) for fold in run.folds}
            write_predictions(run, combine(run, found, temperatures), seed, results.path)
    if run.is_recorded and (notes := calibration.notes(temperatures)):
        print(notes)
    say_predictions(run, results)
    print(f"written to {results.path}: {', '.join(results.files.summary)}")


def write_predictions(run: Run, table: pd.DataFrame, seed: int, folder: Path) -> None:
    """Write the predictions, and their scores where there are labels."""
    known = table[table["label"] != dataset.UNKNOWN]
    if known.empty:
        storage.write_csv(table.drop(columns="label"), folder / "predictions.csv")
        return
    storage.write_csv(dataset.as_written(table), folder / "predictions.csv")
    members = known[[f"prob_f{fold}" for fold in range(run.cohort.k)]].to_numpy()
    label, prob_1 = known["label"].to_numpy(int), known["prob_1"].to_numpy()
    scores = classifier_scores.ensemble_table(label, prob_1, members, known["subject"].tolist(), seed)
    storage.write_csv(scores.astype({"n": "Int64"}), folder / "metrics.csv")


def say_predictions(run: Run, results: ResultFolder) -> None:
    """Print every prediction where there are few, how many there are of each kind, and the scores."""
    folder = results.path
    table = pd.read_csv(folder / "predictions.csv", dtype={"path": str, "reason": str}, keep_default_na=False)
    if len(table) <= FEW:
        print("\n".join(in_words(row, run.cohort.k) for row in table.to_dict("records")))
    counts = {"as label 1": "predicted", "the run's own": "seen", "atypical": "atypical"}
    words = [f"{(table[name] == 1).sum()} {what}" for what, name in counts.items()]
    print(f"{len(table)} scans predicted by {run.cohort.k} networks {run.model}: {', '.join(words)}")
    if run.permuted:
        print("these networks were trained on permuted labels: they know nothing of the groups")
    if "metrics.csv" in results.files.summary:
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
    return f"{printable(row['path'])}: probability of label 1: {row['prob_1']:.3f} ({spread}){known}{odd}"


@utils.command("what is finished is saved; the same command, without --overwrite, goes on from there")
def main(argv: list[str] | None = None) -> int:
    """Check everything, ask the networks, put together what they say."""
    args = get_parser().parse_args(argv)
    if args.status:
        utils.say_states(args.outpath, states_of(args.outpath, FILES))
        return 0
    process.keep_freed_memory()
    device = selfcheck.open_device(args.device)
    check_outpath(args.outpath)
    run = runs.find_run_for(args.path, args.modelpath, args.model, args.resample)
    cohort, networks = run.cohort, TrainedNetworks(run)
    asked = [fold for fold in utils.choose_folds(args.run_folds, cohort.k) if fold in run.folds]
    networks.check(range(cohort.k))
    temperatures, typical = calibration.known_temperatures(run), read_typical(run)
    devices.check_batch(1, models.largest_output(run.model, cohort.grid.shape), device)
    share = sharing.own_share().within(args.part)
    share.check_overwrite(args.overwrite)
    where = args.outpath, asked if args.run_folds else None, args.overwrite, share
    asked_for = {"resample": args.resample, "seed": args.seed}
    results = result_folder(networks, temperatures, *where, asked_for)
    results.check(partial(results.check_unchanged, "found_sha256"))

    about = {"csv": str(args.path.resolve()), "modelpath": str(run.folder.resolve())}
    work = f"one scan of {'x'.join(map(str, cohort.grid.shape))} voxels, {run.model}, on {device}"
    with process.out_of_memory(work, "use --device cpu, or --run-folds"):
        own = {row for fold in asked for row in share.deal(cohort.scan_indices(fold, "test"))}
        scans = cohort.open_scans(Cache("none", args.outpath), rows=sorted(own))
        share.say()
        runs.say_seen(run)
        with results.at_work(about) as missing:
            utils.say_kept(asked, missing)
            predict_folds(missing, networks, scans, typical, results, device)
            report(results, run, temperatures, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
