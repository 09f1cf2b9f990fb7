"""Check maps where nobody knows the truth: against new weights, covered scans, and other networks.

    python3 sanity.py --maps heatmaps --modelpath models --mask mask.nii.gz

Takes every METHOD folder under --maps that heatmap.py wrote. On some test scans of every fold it draws the
network's layers anew, asks the other folds' networks, and covers the brain in the map's order. The maps of
svm.py and ttest.py are compared between folds. The same command again keeps the scans that are finished.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import brain_maps
import figures
import methods
import models
import randomizing
import runs
import sanity_scores
import selfcheck
import utils
import voxelwise
from brain_maps import MethodMaps
from checking import Panel, Recipe, compare_folds
from dataset import Cohort
from explaining import TARGETS
from internals import devices, process, sharing, storage
from internals.caches import Cache
from internals.errors import InputError, blaming
from internals.results import Files, ResultFolder, states_of
from methods import METHODS
from overlap_scores import floor_of
from runs import TrainedNetworks
from sanity_scores import Magnitudes

FILES = Files(
    record="sanity.json",
    part=["sanity_f{}.csv"],
    progress=["findings_f{}{}.csv"],
    summary=["sanity.csv", "sanity_summary.csv", "sanity.png"],
    facts=["findings_sha256", "device_per_fold"],
)
# what the summary's columns are called where people read it
HEADINGS = {
    "weights_rho": "rho",
    "deletion_gain_zero": "del zero",
    "deletion_gain_controls": "del ctrl",
    "deletion_gain_another": "del other",
    "insertion_gain_zero": "ins zero",
    "insertion_gain_controls": "ins ctrl",
    "insertion_gain_another": "ins other",
    "fold_spearman": "fold rho",
    "fold_dice5": "fold Dice",
    "seed_spearman": "seed rho",
    "seed_dice5": "seed Dice",
    "residual_median": "residual",
    "zero_share": "empty",
}
LEGEND = """\
means over subjects; sanity_summary.csv has their 95 % intervals, docs/sanity.md says more
rho: with the maps of new weights; del, ins: gain by deletion and insertion, with zeros or the mean control,
over chance, or over another scan's map (other); * its interval does not hold 0; fold, seed: other networks"""


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    number, whole = utils.bounded(int, at_least=0), utils.bounded(int, at_least=1)
    orders, add = list(randomizing.ORDERS), parser.add_argument
    add("--maps", type=Path, default=Path("heatmaps"), metavar="DIR", help="holds the METHOD folders")
    add("--modelpath", type=Path, default=Path("models"), metavar="DIR", help="output of train_cv.py")
    add("--second-run", type=Path, metavar="DIR", help="the same scans trained on with another --seed")
    add("--path", type=Path, metavar="CSV", help="list of scans (default: the run's)")
    add("--model", help="family A-D and number of filters (default: the run's)")
    add("--fold", type=utils.bounded(int, at_least=2), help="number of folds (default: the run's, else 5)")
    add("--mask", type=Path, metavar="NIFTI", help="the brain (default: where the mean scan is above 0)")
    add("--scans-per-fold", type=whole, default=4, metavar="N", help="test scans of each fold")
    words = "in which layers are drawn anew, step by step; none: only all layers at once, as is always done"
    add("--orders", choices=orders, nargs="*", default=orders, help=words)
    add("--repeats", type=whole, default=3, metavar="N", help="draws of new weights, and of orders by chance")
    add("--outpath", type=Path, metavar="DIR", help="where to write (default: --maps)")
    add("--device", default="auto", help="GPU number, cpu, cuda:N, mps or auto")
    add("--run-folds", type=number, nargs="+", metavar="I", help="only these folds")
    add("--part", type=sharing.parse_part, default="1/1", metavar="I/N", help=sharing.PART)
    add("--seed", type=utils.SEED, default=0, help="of scans, weights, orders and intervals")
    add("--overwrite", action="store_true", help="remove earlier findings, or those of --run-folds, first")
    parser.add_status()
    return parser


# The maps ----------------------------------------------------------------------------------------


def find_maps(folder: Path) -> list[MethodMaps]:
    """The METHODs whose maps are to be checked; floors for others are left out, and named."""
    found = brain_maps.find_maps(folder)
    floors = [maps.name for maps in found if floor_of(maps.name)]
    if floors:
        print(f"left out, as floors for others: {', '.join(floors)}")
    return [maps for maps in found if maps.name not in floors]


def read_recipe(maps: MethodMaps, networks: TrainedNetworks) -> Recipe | None:
    """How a METHOD's maps were made, from map.json; None where no network was explained.

    Raises:
        InputError: no record, a damaged one, or one of other scans, folds or weights than the run's.
    """
    file, run = maps.folder / "map.json", networks.run
    if not file.exists():
        raise InputError(f"{file}: no such file, which says how the maps were made")
    record = storage.read_json(file)
    with blaming(file):
        for name, what in brain_maps.DIGESTS.items():
            if record.get(name, run.cohort.identity[name]) != run.cohort.identity[name]:
                raise InputError(f"is of another run: of other {what} than {run.folder}")
        if "model" not in record:
            return None
        method = storage.entry(record, "method", str, lambda name: name in METHODS)
        weights = storage.entry(record, "weights_sha256", dict)
        for fold in range(run.cohort.k):
            if weights.get(str(fold)) != networks.digest(fold):
                raise InputError(f"is of another run: fold {fold} of other weights than {run.folder}")
        given = {"seed": 0} | storage.entry(record, "options", dict)
        options = methods.recorded_options(method, given)
        target = storage.entry(given, "target", str, lambda rule: rule in TARGETS)
        seed = storage.entry(given, "seed", int, lambda value: 0 <= value < 2**32)
        methods.check_options(method, options, run.model, run.cohort.grid.voxel_sizes)
    return Recipe(METHODS[method], options, target, seed)


def find_recipes(found: Sequence[MethodMaps], networks: TrainedNetworks, folder: Path) -> dict[str, Recipe]:
    """How the maps of every METHOD that explains networks were made; InputError where there is none."""
    recipes = {maps.name: recipe for maps in found if (recipe := read_recipe(maps, networks))}
    if not recipes:
        raise InputError(f"--maps {folder}: expected maps of heatmap.py that are not floors for others")
    return recipes


def fold_maps(maps: MethodMaps) -> dict[tuple[str, str], Path]:
    """The files of a METHOD's fold maps, by method and fold."""
    return {key: file for key, file in maps.files.items() if key[1].isdecimal()}


def read_magnitudes(maps: MethodMaps, brain: np.ndarray, cohort: Cohort) -> list[Magnitudes]:
    """The maps of a METHOD's folds."""
    return [Magnitudes(each) for each in brain_maps.read_maps(fold_maps(maps), brain, cohort.grid).values()]


def maps_identity(found: Sequence[MethodMaps], recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """What tells the maps from others: their content, and how they were made."""
    identity: dict[str, Any] = {}
    for maps in found:
        about: dict[str, Any] = {"sha256": [storage.file_sha256(file) for file in fold_maps(maps).values()]}
        if maps.name in recipes:
            _, options, target, seed = recipes[maps.name]
            about |= {"options": options, "target": target, "seed": seed}
        identity[f"maps of {maps.name}"] = about
    return {"methods": [maps.name for maps in found], "maps": identity}


# Networks and scans ------------------------------------------------------------------------------


def find_second(folder: Path | None, first: TrainedNetworks) -> TrainedNetworks | None:
    """The networks of another run of the same scans; InputError where it is not such."""
    if folder is None:
        return None
    run = first.run
    if not (folder / "run.json").exists():
        raise InputError(f"--second-run {folder}: holds no run.json; train_cv.py writes one")
    second = runs.find_run(folder, run.cohort.csv, None, None)
    if (second.model, second.permuted) != (run.model, run.permuted):
        names = [f"{each.model}{' on permuted labels' if each.permuted else ''}" for each in (second, run)]
        raise InputError(f"--second-run {folder}: is of {names[0]}, {run.folder} of {names[1]}")
    networks, folds = TrainedNetworks(second), range(second.cohort.k)
    networks.check(folds)
    second.cohort.check_controls(folds, f"--second-run {folder}")
    if weights_of(networks) == weights_of(first):
        raise InputError(f"--second-run {folder}: has the same networks as {run.folder}")
    return networks


def weights_of(networks: TrainedNetworks | None) -> list[str | None]:
    """SHA-256 of every fold's weights."""
    return [networks.digest(fold) for fold in range(networks.run.cohort.k)] if networks else []


def check_run(networks: TrainedNetworks, count: int, device: torch.device) -> None:
    """Raise InputError where a fold lacks test scans or controls, or a network cannot be used."""
    run, folds = networks.run, range(networks.run.cohort.k)
    for fold in folds:
        there = len(run.cohort.scan_indices(fold, "test"))
        if count > there:
            raise InputError(f"--scans-per-fold {count}: fold {fold} has {there} test scans")
    run.cohort.check_controls(folds, f"--modelpath {run.folder}")
    networks.check(folds)
    devices.check_batch(1, models.largest_output(run.model, run.cohort.grid.shape), device)


def choose_scans(cohort: Cohort, fold: int, count: int, seed: int) -> list[int]:
    """Rows of some test scans of a fold, drawn by the seed: of as many subjects as can be, labels in turn."""
    drawn = np.random.default_rng([seed, fold]).permutation(cohort.scan_indices(fold, "test"))
    table = cohort.table.loc[drawn]
    of_subject = table.groupby("subject").cumcount()  # 0 for a subject's first scan
    of_label = table.groupby([of_subject, table["label"]]).cumcount()
    later = (table["label"] + fold) % 2  # every other fold begins with a patient
    order = np.lexsort((later, of_label, of_subject))
    return sorted(int(row) for row in drawn[order[:count]])


# The findings ------------------------------------------------------------------------------------


def read_findings(file: Path) -> pd.DataFrame:
    """The findings in a file of this command; none where it does not exist."""
    if not file.exists():
        return pd.DataFrame(columns=sanity_scores.COLUMNS)
    try:
        # all as text: a METHOD may be called "NA", and a number is to be the very same again
        table = pd.read_csv(file, dtype=str, keep_default_na=False, index_col=False)
        if list(table.columns) != sanity_scores.COLUMNS:
            raise ValueError(f"expected the columns {', '.join(sanity_scores.COLUMNS)}")
        values = [float(value or "nan") for value in table["value"]]
        return table.assign(fold=[int(fold) for fold in table["fold"]], value=values)
    except (OSError, ValueError) as problem:
        raise InputError(f"{file}: cannot be read ({problem})") from problem


def check_scans(panel: Panel, fold: int, rows: list[int], file: Path) -> None:
    """Check test scans of a fold, but for those whose findings are in the file; add theirs."""
    found = read_findings(file)
    finished = set(found["scan"])
    rows = [row for row in rows if panel.cohort.table["path"][row] not in finished]
    with process.steps() as finish_step:
        for table in panel.check_fold(fold, rows):
            found = pd.concat([found, table]) if len(found) else table
            storage.write_csv(found, file)
            finish_step()
    if not file.exists():
        storage.write_csv(found, file)


def check_fold(
    panel: Panel,
    fold: int,
    rows: list[int],
    scans_alone: Mapping[str, list[Magnitudes]],
    results: ResultFolder,
) -> None:
    """Check a share of a fold's scans; where it is the last, write the findings of all."""
    if not results.is_share_done(fold):
        check_scans(panel, fold, results.division.deal(rows), results.progress_file(fold, results.division))
    with results.finish_share(fold) as about:
        if about is None:
            return
        tables = [read_findings(results.progress_file(fold, share)) for share in results.division.all()]
        # an empty one would make whole numbers real
        found = pd.concat([table for table in tables if len(table)])
        place = {panel.cohort.table["path"][row]: number for number, row in enumerate(rows)}
        found = found.sort_values("scan", key=lambda scans: scans.map(place), kind="stable")
        others = [compare_folds(name, maps, fold) for name, maps in scans_alone.items()]
        file = results.path / FILES.part[0].format(fold)
        storage.write_csv(pd.concat([found, *others]), file)
        about["findings_sha256"] = storage.file_sha256(file)
        about["device_per_fold"] = devices.describe(panel.device)


def read_all(folder: Path, k: int) -> pd.DataFrame:
    """The findings of all folds."""
    files = [folder / FILES.part[0].format(fold) for fold in range(k)]
    return pd.concat([read_findings(file) for file in files], ignore_index=True)


def summary_text(summary: pd.DataFrame) -> str:
    """The summary as people read it; the intervals stay in the file, but for whether they hold zero."""

    def cell(row: Mapping[Any, Any], name: str) -> str:
        starred = "_gain_" in name and row[f"{name}_low"] * row[f"{name}_high"] > 0
        return "" if math.isnan(row[name]) else f"{row[name]:.2f}{'*' if starred else ''}"

    rows = summary.to_dict("records")
    columns = {heading: [cell(row, name) for row in rows] for name, heading in HEADINGS.items()}
    table = pd.DataFrame({"method": summary["method"], **columns, "verdict": summary["verdict"]})
    shown = table.loc[:, (table != "").any()]  # no column that says nothing
    return shown.to_string(index=False)


def report(results: ResultFolder, k: int, seed: int) -> None:
    """Write what is made of all folds, unless it is there, and print it; or print which folds are missing."""
    unfinished = results.unfinished()
    if unfinished:
        print(f"not checked yet: folds {unfinished}; the summary follows with the last fold")
        return
    rows = read_all(results.path, k)
    summary = sanity_scores.summarize(rows, seed)
    with results.summary() as due:
        if due:
            storage.write_csv(rows, results.path / "sanity.csv")
            storage.write_csv(summary, results.path / "sanity_summary.csv")
            figures.draw_sanity(rows, summary, results.path / "sanity.png")
    print(LEGEND)
    print(summary_text(summary))
    print(f"written to {results.path}: {', '.join(FILES.summary)}")


@utils.command("finished scans are saved; the same command, without --overwrite, goes on from there")
def main(argv: list[str] | None = None) -> int:
    """Check everything, then the maps of every fold; sum up."""
    args = get_parser().parse_args(argv)
    folder = args.outpath or args.maps
    if args.status:
        utils.say_states(folder, states_of(folder, FILES))
        return 0
    process.keep_freed_memory()
    device = selfcheck.open_device(args.device)
    run = runs.find_run(args.modelpath, args.path, args.model, args.fold)
    cohort, networks = run.cohort, TrainedNetworks(run)
    second = find_second(args.second_run, networks)
    chosen = utils.choose_folds(args.run_folds, cohort.k)
    check_run(networks, args.scans_per_fold, device)
    found = find_maps(args.maps)
    recipes = find_recipes(found, networks, args.maps)
    mask = args.mask or brain_maps.find_mean_scan(found)
    brain = voxelwise.read_mask(mask, cohort.grid)
    if not args.mask:
        print("no --mask: the voxels where the mean scan is above 0")
    others = [maps for maps in found if maps.name not in recipes]
    scans_alone = {maps.name: read_magnitudes(maps, brain, cohort) for maps in others}

    orders = [order for order in randomizing.ORDERS if order in args.orders]
    asked = {name: getattr(args, name) for name in ("scans_per_fold", "repeats", "seed")} | {"orders": orders}
    made_from = {"mask_sha256": storage.file_sha256(mask), "weights_sha256": weights_of(networks)}
    made_from["second_run_sha256"] = weights_of(second)
    identity = asked | made_from | cohort.identity | maps_identity(found, recipes)
    only = args.run_folds and chosen
    share = sharing.own_share().within(args.part)
    share.check_overwrite(args.overwrite)
    results = ResultFolder(folder, FILES, range(cohort.k), identity, {}, only, args.overwrite, share=share)
    results.check(partial(results.check_unchanged, "findings_sha256"))
    if results.is_finished():
        print(f"{folder}: done before, kept")
        report(results, cohort.k, args.seed)
        return 0

    places = {"maps": args.maps, "modelpath": run.folder, "second_run": args.second_run, "mask": mask}
    about = {"csv": str(cohort.csv)} | {name: path and str(path.resolve()) for name, path in places.items()}
    work = f"one scan of {'x'.join(map(str, cohort.grid.shape))} voxels, {run.model}, on {device}"
    with process.out_of_memory(work, "use --device cpu, or give --maps fewer METHODs"):
        scans = cohort.open_scans(Cache("reuse", args.modelpath / "cache"))
        panel = Panel(recipes, networks, second, scans, brain, orders, args.repeats, args.seed, device)
        share.say()
        with results.at_work(about) as missing:
            utils.say_kept(chosen, missing)
            for fold in missing:
                rows = choose_scans(cohort, fold, args.scans_per_fold, args.seed)
                check_fold(panel, fold, rows, scans_alone, results)
            report(results, cohort.k, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
