"""Turn the networks of a training run into brain maps: LRP, integrated gradients, SmoothGrad and others.

    python3 heatmap.py --method IG
    python3 heatmap.py --method LRP GGC SmoothGrad
    python3 heatmap.py --method SmoothGrad --scans new.csv

Explains each fold's test scans with that fold's weights; several methods share one pass over the scans. The
CSV, the model and the folds come from the run record under --modelpath. A folder that holds only published
state_dict_f*.pth files needs --path and --model; the published contiguous folds are used then. Other scans
(--scans) are explained by all networks. The same command again keeps the folds that are finished.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import logit

import calibration
import dataset
import explaining
import figures
import methods
import models
import runs
import selfcheck
import utils
from brain_maps import GROUPS
from dataset import UNKNOWN, Cohort, ScanDataset
from explaining import TARGETS, Explainer, MeanMaps, Progress
from internals import devices, nifti, process, sharing, storage, tables
from internals.caches import Cache
from internals.errors import InputError, blaming
from internals.results import Files, ResultFolder, states_of
from internals.sharing import Share
from methods import METHODS, Method
from models import CNN3d
from runs import Run

FILES = Files(
    record="map.json",
    shared=["subjects.csv"],
    part=["map_f{}.nii.gz"],
    beside=[
        *(f"map_{group}_f{{}}.nii.gz" for group in GROUPS),
        "baseline_f{}.nii.gz",
        "subjects/f{}_*.nii.gz",
        "subjects/[0-9]*",  # of all networks
        *(f"map_{group}.nii.gz" for group in GROUPS),  # which scans without labels have not
    ],
    progress=["sums_f{}{}.npz"],
    summary=[
        "map_all.nii.gz",
        "map_controls.nii.gz",
        "map_patients.nii.gz",
        "map_all.png",
        "mean_scan.nii.gz",
    ],
    facts=["weights_sha256", "scans_per_fold", "zero_maps_per_fold", "device_per_fold"],
)
NETWORKS: dict[str, Callable[[runs.Run, int], runs.Networks]] = {
    "trained": lambda run, seed: runs.TrainedNetworks(run),
    "random": runs.UntrainedNetworks,
}
OUTPATH, NEW_OUTPATH = Path("heatmaps"), Path("heatmaps_new")
NEW = "new"  # what map.json calls scans that are not the run's
STEM = 150  # characters of a scan's own name in its map's: with all that is added, a name has at most 255
SUBJECT_COLUMNS = ["fold", *dataset.COLUMNS, *explaining.FOUND]


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    number, whole = utils.bounded(int, at_least=0), utils.bounded(int, at_least=1)
    add = parser.add_argument
    names = f"how the networks are explained: {', '.join(METHODS)}"
    add("--method", choices=METHODS, nargs="+", required=True, metavar="METHOD", help=names)
    add("--path", type=Path, metavar="CSV", help="list of scans (default: the run's)")
    add("--modelpath", type=Path, default=Path("models"), metavar="DIR", help="output of train_cv.py")
    add("--model", help="family A-D and number of filters (default: the run's)")
    words = f"maps go to DIR/METHOD (default: {OUTPATH}; with --scans {NEW_OUTPATH})"
    add("--scans", type=Path, metavar="CSV", help="explain these scans, by all networks, not the run's own")
    add("--resample", action="store_true", help=f"with --scans: {runs.RESAMPLE}")
    add("--outpath", type=Path, metavar="DIR", help=words)
    add("--device", default="auto", help="GPU number, cpu, cuda:N, mps or auto")
    add("--fold", type=utils.bounded(int, at_least=2), help="number of folds (default: the run's, else 5)")
    add("--batch", type=whole, default=1, help="scans explained at once")
    add("--run-folds", type=number, nargs="+", metavar="I", help="only these folds")
    add("--part", type=sharing.parse_part, default="1/1", metavar="I/N", help=sharing.PART)
    words = "the logit to explain (default: label; predicted where --scans have none)"
    add("--target", choices=TARGETS, help=words)
    add(
        "--weights", choices=NETWORKS, default="trained", help="or untrained: maps to hold the others against"
    )
    add("--seed", type=utils.SEED, default=0, help="of random weights and of SmoothGrad's noise")
    methods.add_options(parser)
    add("--save-subjects", action="store_true", help="also write the map of every scan")
    add("--overwrite", action="store_true", help="remove earlier maps of this method, or --run-folds, first")
    parser.add_status()
    return parser


# Before any map ----------------------------------------------------------------------------------


def open_run(
    scans: Path | None,
    csv: Path | None,
    folder: Path,
    model: str | None,
    k: int | None,
    resample: bool,
) -> Run:
    """The run, with its own scans or with new ones; InputError for none, or for options that contradict."""
    if scans is None:
        if resample:
            raise InputError("--resample: is an option of --scans; a run's own scans lie on its grid")
        return runs.find_run(folder, csv, model, k)
    for name, value in (("--path", csv), ("--fold", k)):
        if value is not None:
            raise InputError(f"{name} {value}: is of the run's own scans, which --scans does not ask for")
    return runs.find_run_for(scans, folder, model, resample)


def check_apart(outpath: Path, run: Run, replaced: Collection[Path]) -> None:
    """Raise InputError where maps of new scans would come to lie beside maps of others.

    Args:
        replaced: folders whose maps are removed first.
    """
    for file in sorted(outpath.glob(f"*/{FILES.record}")):
        try:
            record = storage.read_json(file)
        except InputError:  # said where it matters
            continue
        theirs = record.get("csv_sha256") if record.get("scans") == NEW else None
        ours = run.cohort.identity["csv_sha256"] if run.new_scans else None
        if theirs != ours and file.parent not in replaced:
            whose = "other new scans" if theirs and ours else "new scans" if theirs else "a run's own scans"
            name = file.parent.name
            raise InputError(f"--outpath {outpath}: {name} there has maps of {whose}; choose another")


def choose_target(target: str | None, table: pd.DataFrame) -> str:
    """Which logit is explained; InputError where that is the label's, and a scan has none."""
    unknown = int((table["label"] == UNKNOWN).sum())
    if target == "label" and unknown:
        raise InputError(
            f"--target label: {unknown} of {len(table)} scans have no label; use predicted, 0 or 1"
        )
    if target is None and 0 < unknown < len(table):
        print(f"{unknown} of {len(table)} scans have no label: all are explained for what is predicted")
    return target or ("predicted" if unknown else "label")


def map_options(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the given options that shape a method's maps, as map.json keeps them."""
    method, options = METHODS[name], {key: given[key] for key in ("target", "save_subjects", "weights")}
    if given["weights"] == "random" or "seeds" in method.needs:
        options["seed"] = given["seed"]
    return options | method.chosen(given)


def choose_options(names: list[str], given: dict[str, Any], run: Run) -> dict[str, dict[str, Any]]:
    """Each method's `map_options`; InputError where they do not fit the methods, the network or the scans."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--method: {name} is named twice")
    if run.new_scans and given["weights"] == "random":
        raise InputError("--weights random: needs the run's own scans, not --scans")
    methods.check_given(given, names)
    given = given | {"target": choose_target(given["target"], run.cohort.table)}
    options = {name: map_options(name, given) for name in names}
    for name in names:
        methods.check_options(name, options[name], run.model, run.cohort.grid.voxel_sizes)
    return options


def result_folder(
    name: str,
    options: dict[str, Any],
    networks: runs.Networks,
    outpath: Path,
    only: list[int] | None,
    overwrite: bool,
    share: Share,
) -> ResultFolder:
    """The folder of a method's maps: METHOD, with -controls, -random and their like where they are such."""
    method, run = METHODS[name], networks.run
    path = outpath / f"{name}{method.suffix(options)}{networks.suffix}"
    identity = {"method": name, "options": options, "model": run.model, "folds": run.cohort.k}
    made_from = {fold: {"weights_sha256": networks.digest(fold)} for fold in run.folds}
    absent = [f"map_{g}.nii.gz" for g, label in GROUPS.items() if label not in set(run.cohort.table["label"])]
    summary = [file for file in FILES.summary if file not in absent]
    if run.new_scans:
        identity["scans"] = NEW
        summary += [file for row in range(len(run.cohort.table)) for file in each_files(run, row).values()]
    return ResultFolder(
        path,
        replace(FILES, summary=summary),
        run.folds,
        identity | run.cohort.identity,
        made_from,
        only,
        overwrite,
        {option.name: option.default for option in method.options},
        share,
    )


# The maps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldMaps:
    """What one method writes of every fold, and of all.

    Attributes:
        method: how the networks are explained.
        options: as `map_options` returns them.
        results: where the maps go.
    """

    method: Method
    options: dict[str, Any]
    run: Run
    scans: ScanDataset
    results: ResultFolder

    @property
    def name(self) -> str:
        """That of the folder."""
        return self.results.path.name

    @property
    def cohort(self) -> Cohort:
        """The scans that are explained."""
        return self.run.cohort

    @property
    def keeps_each(self) -> bool:
        """Whether the map of every scan and network is written; of new scans they are put together later."""
        return self.options["save_subjects"] or self.run.new_scans

    @contextlib.contextmanager
    def begin(self, about: dict[str, Any], chosen: list[int]) -> Iterator[list[int]]:
        """Hold the chosen folds; yields those that are missing."""
        with self.results.at_work(about) as missing:
            utils.say_kept(chosen, missing, f"{self.name} ")
            with self.results.locked():  # another process may have finished one meanwhile
                update_subjects(self.results.path, [f for f in missing if f in self.results.unfinished()])
            if self.keeps_each:
                storage.make_folder(self.results.path / "subjects")
            yield missing

    def explainer(self, fold: int, model: CNN3d) -> Explainer:
        """What explains the scans of a fold; writes the baseline that they are compared with."""
        own, grid = self.method.chosen(self.options), self.cohort.grid
        settings: dict[str, Any] = {"voxel_sizes": grid.voxel_sizes, "baseline": None}
        if own.get("baseline") == "controls":
            mean = self.run.mean_controls(fold, self.scans)
            if self.share.number == 1:
                self._save(mean, f"baseline_f{fold}")
            settings["baseline"] = torch.from_numpy(mean).to(next(model.parameters()).device)[None, None]
        return Explainer(model, self.method, own, settings, self.options["target"])

    def keep(self, fold: int, row: int, values: np.ndarray) -> None:
        """Write the map of one scan, if asked to."""
        if self.keeps_each:
            self._save(values, subject_name(fold, row, self.cohort.table["path"][row]))

    @property
    def share(self) -> Share:
        """Which of every fold's test scans are explained."""
        return self.results.division

    def progress(self, fold: int, share: Share | None = None) -> Progress:
        """What was found of this share, or of another one, so far."""
        share = share or self.share
        file = self.results.progress_file(fold, share)
        rows = share.deal(self.cohort.scan_indices(fold, "test"))
        return Progress.load(file, self.cohort.grid.shape, len(rows)) if file.exists() else Progress()

    def save(self, fold: int, progress: Progress) -> None:
        """Save what was found of this share."""
        progress.save(self.results.progress_file(fold, self.share))

    def finish(self, fold: int, device: torch.device) -> None:
        """Finish this share of a fold; after the last, write the mean maps and the rows of all scans."""
        with self.results.finish_share(fold) as about:
            if about is None:
                return
            means, rows = MeanMaps(), []
            for share in self.share.all():
                part, dealt = self.progress(fold, share), share.deal(self.cohort.scan_indices(fold, "test"))
                if len(part.found) < len(dealt):
                    file = self.results.progress_file(fold, share)
                    raise InputError(f"{file}: lacks scans; remove it to explain them again")
                means.merge(part.means)
                rows.append(part.found.set_index(pd.Index(dealt)))
            self._save(means.mean(), f"map_f{fold}")
            for group, label in GROUPS.items():
                if label in means.counts:
                    self._save(means.mean(label), f"map_{group}_f{fold}")
            found = pd.concat(rows).sort_index()
            known = self.cohort.table.loc[found.index, dataset.COLUMNS].assign(fold=fold)
            table = pd.concat([known, found], axis=1)[SUBJECT_COLUMNS]
            update_subjects(self.results.path, [fold], table)
            about |= facts(table, device)

    def average(self, background: np.ndarray) -> None:
        """Write the mean of the fold means, those of the groups, the mean scan, and the picture of all."""
        cohort, folds = self.cohort, self.run.folds
        maps = {"all": self._mean({f"map_f{fold}": 1 for fold in folds})}
        for group, label in GROUPS.items():
            counts = {fold: int((cohort.labels(fold, "test") == label).sum()) for fold in folds}
            if any(counts.values()):
                maps[group] = self._mean({f"map_{group}_f{fold}": n for fold, n in counts.items() if n})
        for name, values in maps.items():
            self._save(values, f"map_{name}")
        self._save(background, "mean_scan")
        of = f"{len(cohort.table)} {'new' if self.run.new_scans else 'test'} scans"
        title = f"{self.name}, {self.run.model}: mean of {len(folds)} folds, {of}"
        figures.draw_map(maps, background, cohort.grid.affine, title, self.results.path / "map_all.png")

    def explain_each(self) -> None:
        """Write the mean of the networks' maps of every new scan, their standard deviation, and a picture."""
        temperatures = [each.value for each in calibration.known_temperatures(self.run)]
        probable = probabilities(read_subjects(self.results.path), temperatures)
        paths = self.cohort.table["path"]
        with process.steps() as finish_step:
            for row in utils.progress(paths.index, desc=f"{self.name} of every scan"):
                files = {k: self.results.path / name for k, name in each_files(self.run, row).items()}
                if not all(file.exists() for file in files.values()):  # they go where a fold is made anew
                    self._explain_one(row, files, probable[paths[row]])
                finish_step()

    def _explain_one(self, row: int, files: dict[str, Path], probable: np.ndarray) -> None:
        """The same of one scan, given the networks' probabilities of label 1."""
        path, folds = self.cohort.table["path"][row], self.run.testers[row]
        if not (files["mean"].exists() and files.get("sd", files["mean"]).exists()):
            names = [f"{subject_name(fold, row, path)}.nii.gz" for fold in folds]
            single = np.stack([nifti.load_map(self.results.path / name) for name in names])
            nifti.save_map(single.mean(axis=0), self.cohort.grid.header, files["mean"])
            if "sd" in files:
                nifti.save_map(single.std(axis=0, ddof=1), self.cohort.grid.header, files["sd"])
        maps: dict[str, np.ndarray] = {
            kind: nifti.load_map(files[kind]) for kind in ("mean", "sd") if kind in files
        }
        if len(folds) > 1:
            who = f"{len(folds)} networks"
            spread = f"{probable.mean():.2f}, {probable.min():.2f} to {probable.max():.2f}"
        else:
            who, spread = f"the network of fold {folds[0]}, which tested it", f"{probable[0]:.2f}"
        title = f"{Path(path).name}: {self.name}, {self.run.model}, {who}; probability of label 1: {spread}"
        background = self.scans[row][0][0].cpu().numpy()
        figures.draw_map(maps, background, self.cohort.grid.affine, title, files["png"])

    def tidy(self) -> None:
        """Remove the single networks' maps of new scans that nobody asked for, once all is made of them."""
        if self.run.new_scans and not self.options["save_subjects"]:
            with self.results.locked():
                if self.results.is_finished():
                    storage.remove(self.results.path, ["subjects/f*.nii.gz"])

    def _save(self, values: np.ndarray, name: str) -> None:
        nifti.save_map(values, self.cohort.grid.header, self.results.path / f"{name}.nii.gz")

    def _mean(self, weights: dict[str, int]) -> np.ndarray:
        """The weighted mean of some maps, float64 (X, Y, Z)."""
        mean = np.zeros(self.cohort.grid.shape)
        for name, weight in weights.items():
            mean += nifti.load_map(self.results.path / f"{name}.nii.gz") * (weight / sum(weights.values()))
        return mean


def explain_folds(
    maps: list[FoldMaps],
    networks: runs.Networks,
    chosen: list[int],
    about: dict[str, Any],
    batch: int,
    seed: int,
    device: torch.device,
) -> None:
    """Explain what is missing of the chosen folds; average what is complete, and report."""
    scans = maps[0].scans
    with contextlib.ExitStack() as stack:
        missing = [stack.enter_context(each.begin(about, chosen)) for each in maps]
        for fold in chosen:
            due = [each for each, folds in zip(maps, missing, strict=True) if fold in folds]
            lacking = [each for each in due if not each.results.is_share_done(fold)]
            if lacking:
                explain_fold(fold, networks.load(fold, scans, device), lacking, batch, seed)
            for each in due:
                each.finish(fold, device)
        mean_scan = cache(lambda: scans.mean(range(len(scans))))  # read once, whatever the methods
        for each in maps:
            with each.results.summary() as is_due:
                if is_due:
                    each.average(mean_scan())
                    if each.run.new_scans:
                        each.explain_each()
            each.tidy()
            report(each.results)


def explain_fold(fold: int, model: CNN3d, due: list[FoldMaps], batch: int, seed: int) -> None:
    """Explain a share of a fold's test scans by some methods, in one pass."""
    cohort, scans, device = due[0].cohort, due[0].scans, next(model.parameters()).device
    rows, maps = due[0].share.deal(cohort.scan_indices(fold, "test")), {each.name: each for each in due}
    progress = {name: each.progress(fold) for name, each in maps.items()}
    begin = min(len(found.found) for found in progress.values())
    explainers = {name: each.explainer(fold, model) for name, each in maps.items()}
    loader, seeds = scans.loader(rows[begin:], batch, device=device), [utils.own_seed(seed, r) for r in rows]

    def keep(name: str, number: int, values: np.ndarray) -> None:
        maps[name].keep(fold, rows[number], values)

    def save() -> None:
        for name, each in maps.items():
            each.save(fold, progress[name])

    title = f"{', '.join(maps)} fold {fold}"
    if not rows:
        print(f"{title}: no scan is left for this part")
    explaining.explain_scans(explainers, loader, seeds, keep, progress, save, title)


def subject_name(fold: int, row: int, path: str) -> str:
    """Where the map of one scan goes; the row in the CSV keeps scans of one name apart."""
    return f"subjects/f{fold}_{row:05d}_{_stem(path)}"


def each_files(run: Run, row: int) -> dict[str, str]:
    """What is made of all networks' maps of a new scan: mean, sd where there are several, and png."""
    name = f"subjects/{row:05d}_{_stem(run.cohort.table['path'][row])}"
    files = {"mean": f"{name}_mean.nii.gz", "sd": f"{name}_sd.nii.gz", "png": f"{name}.png"}
    return files if len(run.testers[row]) > 1 else {kind: files[kind] for kind in ("mean", "png")}


def _stem(path: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", Path(path).name.removesuffix(".gz").removesuffix(".nii"))
    return stem[:STEM]


def probabilities(subjects: pd.DataFrame, temperatures: Sequence[float]) -> dict[str, np.ndarray]:
    """Every scan's calibrated probabilities of label 1, of the networks that explained it, by path."""
    prob = subjects["prob_target"].where(subjects["target"] == 1, 1 - subjects["prob_target"])
    own = np.array(temperatures)[subjects["fold"].to_numpy(int)]
    nearest = np.finfo(float).eps / 2  # to certainty, of what float64 can tell
    found = calibration.calibrated(logit(np.clip(prob.to_numpy(), nearest, 1 - nearest)), own)
    return {str(path): found[rows] for path, rows in subjects.groupby("path").indices.items()}


# subjects.csv ------------------------------------------------------------------------------------


def update_subjects(folder: Path, folds: list[int], rows: pd.DataFrame | None = None) -> None:
    """Replace the rows of some folds in subjects.csv; the caller holds the folder."""
    before = read_subjects(folder)
    others = before[~before["fold"].isin(folds)]
    tables = [table for table in (others, rows) if table is not None and len(table)]
    if len(others) < len(before) or rows is not None:
        after = pd.concat(tables).sort_values("fold", kind="stable") if tables else others
        storage.write_csv(dataset.as_written(after), folder / "subjects.csv")


def check_subjects(folder: Path, fold: int) -> None:
    """Raise InputError where subjects.csv is damaged, or lacks a finished fold."""
    if fold not in set(read_subjects(folder)["fold"]):
        file = folder / "subjects.csv"
        raise InputError(f"{file}: has no rows of fold {fold}; --overwrite without --run-folds starts again")


def read_subjects(folder: Path) -> pd.DataFrame:
    """The rows of subjects.csv so far; none where it does not exist. Paths and subjects stay text."""
    file = folder / "subjects.csv"
    if not file.exists():
        return pd.DataFrame(columns=SUBJECT_COLUMNS)
    with blaming(file):
        rows = tables.read_rows(file)
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
    known = [int(fold), path, int(label or UNKNOWN), subject, int(predicted), int(target)]
    return [*known, prob_target, total, residual, int(zero)]


def facts(rows: pd.DataFrame, device: torch.device) -> dict[str, Any]:
    """What map.json says of a finished fold, beside its weights."""
    zero = int(rows["zero"].sum())
    return {
        "scans_per_fold": len(rows),
        "zero_maps_per_fold": zero,
        "device_per_fold": devices.describe(device),
    }


def check_kept(folder: Path, cohort: Cohort, fold: int) -> None:
    """Raise InputError where a finished fold lacks its rows in subjects.csv, or the maps of its groups."""
    check_subjects(folder, fold)
    for group, label in GROUPS.items():
        file = folder / f"map_{group}_f{fold}.nii.gz"
        if label in cohort.labels(fold, "test") and not file.exists():
            raise InputError(
                f"{file}: no such file, as in maps of an earlier version; --overwrite starts again"
            )


def check_singles(run: Run, results: ResultFolder) -> None:
    """Raise InputError where single networks' maps are needed again that went when all was made of them."""
    if not run.new_scans or results.is_finished():
        return
    kept = set(run.folds) - set(results.unfinished())
    for row, path in enumerate(run.cohort.table["path"]):
        files = [results.path / name for kind, name in each_files(run, row).items() if kind != "png"]
        is_made = kept == set(run.folds) and all(file.exists() for file in files)
        for fold in [] if is_made else sorted(kept & set(run.testers[row])):
            file = results.path / f"{subject_name(fold, row, path)}.nii.gz"
            if not file.exists():
                raise InputError(
                    f"{file}: was removed when all was made of it, and is needed again; --overwrite without "
                    "--run-folds starts again"
                )


def say_states(outpath: Path, names: list[str] | None, given: dict[str, Any], modelpath: Path) -> None:
    """Print what is finished, running or open: of some methods, as the options have them, or of all."""
    if names:
        suffix = runs.floor_suffix(modelpath, given["weights"])
        found = [
            outpath / f"{name}{METHODS[name].suffix(METHODS[name].chosen(given))}{suffix}" for name in names
        ]
    else:
        records = {file.parent: storage.read_json(file) for file in sorted(outpath.glob(f"*/{FILES.record}"))}
        found = [folder for folder, record in records.items() if record.get("method") in METHODS]
    for folder in found or [outpath]:
        utils.say_states(folder, states_of(folder, FILES), f"{folder.name} ")


def report(results: ResultFolder) -> None:
    """Print how well the maps' sums keep their promise, how many maps are all zero, and what is missing."""
    unfinished, subjects = results.unfinished(), read_subjects(results.path)
    subjects = subjects[~subjects["fold"].isin(unfinished)]
    residual, zero = subjects["residual"].dropna(), subjects.groupby("fold")["zero"]
    sums = f"; residual of the sums: median {residual.median():.2g}, worst {residual.max():.2g}"
    networks = subjects.groupby("path")["fold"].nunique().max() if len(subjects) else 1
    by = f" by up to {networks} networks each" if networks > 1 else ""
    explained = f"{subjects['path'].nunique()} scans explained{by}"
    print(f"{results.path.name}: {explained}{'' if residual.empty else sums}")
    counts = ", ".join(f"{flags.sum()} of {len(flags)} in fold {fold}" for fold, flags in zero)
    if counts:
        print(f"maps that are zero everywhere: {counts}")
    if unfinished:
        print(f"not explained yet, or with other weights: folds {unfinished}")
    else:
        each = ", subjects/*.png" if list(results.path.glob("subjects/*.png")) else ""
        print(f"written to {results.path}: map_all.nii.gz, map_all.png, map_f*.nii.gz, subjects.csv{each}")


@utils.command("what is finished is saved; the same command, without --overwrite, goes on from there")
def main(argv: list[str] | None = None) -> int:
    """Check everything, explain the folds, average them."""
    args = get_parser().parse_args(argv)
    outpath = args.outpath or (NEW_OUTPATH if args.scans else OUTPATH)
    if args.status:
        say_states(outpath, args.method, vars(args), args.modelpath)
        return 0
    process.keep_freed_memory()
    device = selfcheck.open_device(args.device)
    run = open_run(args.scans, args.path, args.modelpath, args.model, args.fold, args.resample)
    cohort, networks = run.cohort, NETWORKS[args.weights](run, args.seed)
    options = choose_options(args.method, vars(args), run)
    chosen = [fold for fold in utils.choose_folds(args.run_folds, cohort.k) if fold in run.folds]
    networks.check(chosen)
    devices.check_batch(args.batch, models.largest_output(run.model, cohort.grid.shape), device)
    if vars(args).get("baseline") == "controls":
        run.check_controls(chosen, "--baseline controls")
    share = sharing.own_share().within(args.part)
    share.check_overwrite(args.overwrite)
    where = outpath, args.run_folds and chosen, args.overwrite, share
    folders = {name: result_folder(name, options[name], networks, *where) for name in args.method}
    all_anew = args.overwrite and not args.run_folds
    check_apart(outpath, run, [each.path for each in folders.values()] if all_anew else [])
    for results in folders.values():
        if results.check(partial(check_kept, results.path, cohort)):
            read_subjects(results.path)  # though no fold is finished
            check_singles(run, results)
    if run.new_scans:
        calibration.known_temperatures(run)  # before any map

    about = {"csv": str(cohort.csv), "modelpath": str(run.folder.resolve()), **networks.about()}
    work = devices.describe_batch(args.batch, cohort.grid.shape, run.model, device)
    with process.out_of_memory(work, "lower --batch"):
        own = {row for fold in chosen for row in share.deal(cohort.scan_indices(fold, "test"))}
        scans = cohort.open_scans(Cache("reuse", args.modelpath / "cache"), rows=sorted(own))
        share.say()
        runs.say_seen(run)
        maps = [FoldMaps(METHODS[n], options[n], run, scans, folders[n]) for n in args.method]
        explain_folds(maps, networks, chosen, about, args.batch, args.seed, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
