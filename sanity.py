"""Check maps where nobody knows the truth: do they depend on the network, and it on what they mark?

    python3 sanity.py --maps heatmaps --modelpath models --mask mask.nii.gz

Takes every METHOD folder under --maps that heatmap.py wrote. On some test scans of every fold it draws the
network's layers anew, asks the other folds' networks, and covers the brain in the map's order. The maps of
svm.py and ttest.py are compared between folds. The same command again keeps the folds that are finished.
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
from checking import Panel, Use, compare_folds
from dataset import Cohort
from explaining import TARGETS
from internals import devices, process, storage
from internals.caches import Cache
from internals.errors import InputError, blaming
from internals.results import Files, ResultFolder
from methods import METHODS
from overlap_scores import floor_of
from runs import Run, TrainedNetworks

FILES = Files(
    record="sanity.json",
    part=["sanity_f{}.csv"],
    summary=["sanity.csv", "sanity_summary.csv", "sanity.png"],
)


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = utils.ArgumentParser(__doc__)
    number, whole = utils.bounded(int, at_least=0), utils.bounded(int, at_least=1)
    add = parser.add_argument
    add("--maps", type=Path, default=Path("heatmaps"), metavar="DIR", help="holds the METHOD folders")
    add("--modelpath", type=Path, default=Path("models"), metavar="DIR", help="output of train_cv.py")
    add("--second-run", type=Path, metavar="DIR", help="the same scans trained on with another --seed")
    add("--path", type=Path, metavar="CSV", help="list of scans (default: the run's)")
    add("--model", help="family A-D and number of filters (default: the run's)")
    add("--fold", type=utils.bounded(int, at_least=2), help="number of folds (default: the run's, else 5)")
    add("--mask", type=Path, metavar="NIFTI", help="the brain (default: where the mean scan is above 0)")
    add("--scans-per-fold", type=whole, default=4, metavar="N", help="test scans of each fold")
    add(
        "--orders",
        choices=randomizing.ORDERS,
        nargs="*",
        default=list(randomizing.ORDERS),
        help="in which layers are drawn anew, beside all layers at once",
    )
    add("--repeats", type=whole, default=3, metavar="N", help="draws of new weights, and of orders by chance")
    add("--outpath", type=Path, metavar="DIR", help="where to write (default: --maps)")
    add("--device", default="auto", help="GPU number, cpu, cuda:N, mps or auto")
    add("--run-folds", type=number, nargs="+", metavar="I", help="only these folds")
    add("--seed", type=utils.SEED, default=0, help="of scans, weights, orders and intervals")
    add("--overwrite", action="store_true", help="remove an earlier panel, or its --run-folds, first")
    return parser


# Before any check --------------------------------------------------------------------------------


def read_use(maps: MethodMaps, networks: TrainedNetworks) -> Use | None:
    """How a METHOD folder's maps were made; None where no network was explained.

    Raises:
        InputError: no record, a damaged one, or one of other scans, folds or weights than the run's.
    """
    file, run = maps.folder / "map.json", networks.run
    if not file.exists():
        raise InputError(f"{file}: no such file, which says how the maps were made")
    record = storage.read_json(file)
    with blaming(file):
        for name, what in brain_maps.DIGESTS.items():
            if storage.entry(record, name, str) != run.cohort.identity[name]:
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
    return Use(METHODS[method], options, target, seed)


def without_floors(found: Sequence[MethodMaps]) -> list[MethodMaps]:
    """The METHODs that are no floors for others; the others are named."""
    floors = [maps.name for maps in found if floor_of(maps.name)]
    if floors:
        print(f"left out, as floors for others: {', '.join(floors)}")
    return [maps for maps in found if maps.name not in floors]


def maps_identity(found: Sequence[MethodMaps], uses: Mapping[str, Use]) -> dict[str, Any]:
    """What tells the maps that are checked from others: how they were made, or what they are."""
    files = {maps.name: [maps.files[maps.name, str(fold)] for fold in range(maps.folds)] for maps in found}
    made = {
        name: {"options": use.options, "target": use.target, "seed": use.seed} for name, use in uses.items()
    }
    return {
        f"maps of {name}": made[name] if name in made else [storage.file_sha256(file) for file in files[name]]
        for name in files
    }


def find_second(folder: Path | None, run: Run) -> TrainedNetworks | None:
    """The networks of another run of the same scans; InputError where it is not such."""
    if folder is None:
        return None
    second = runs.find_run(folder, None, None, None)
    for name in ("csv_sha256", "scans_sha256"):
        if second.cohort.identity[name] != run.cohort.identity[name]:
            raise InputError(
                f"--second-run {folder}: is of other {brain_maps.DIGESTS[name]} than {run.folder}"
            )
    if second.model != run.model:
        raise InputError(f"--second-run {folder}: is of {second.model}, {run.folder} of {run.model}")
    networks = TrainedNetworks(second)
    if networks.digest(0) == TrainedNetworks(run).digest(0):
        raise InputError(f"--second-run {folder}: has the same networks as {run.folder}")
    networks.check(range(second.cohort.k))
    second.cohort.check_controls(range(second.cohort.k), f"--second-run {folder}")
    return networks


def check_scans(cohort: Cohort, count: int) -> None:
    """Raise InputError where a fold has fewer test scans than are asked for."""
    for fold in range(cohort.k):
        there = len(cohort.scan_indices(fold, "test"))
        if count > there:
            raise InputError(f"--scans-per-fold {count}: fold {fold} has {there} test scans")


def choose_scans(cohort: Cohort, fold: int, count: int, seed: int) -> list[int]:
    """Rows of some test scans of a fold, drawn by the seed: of as many subjects as can be, labels in turn."""
    drawn = np.random.default_rng([seed, fold]).permutation(cohort.scan_indices(fold, "test"))
    table = cohort.table.loc[drawn]
    of_subject = table.groupby("subject").cumcount()  # 0 for a subject's first scan
    of_label = table.groupby([of_subject, table["label"]]).cumcount()
    later = (table["label"] + fold) % 2  # every other fold begins with a patient
    order = np.lexsort((later, of_label, of_subject))
    return sorted(int(row) for row in drawn[order[:count]])


def read_folds(maps: MethodMaps, brain: np.ndarray, cohort: Cohort) -> list[np.ndarray]:
    """The magnitudes of a METHOD's fold maps at the voxels of the brain, (V,) each."""
    files = {(maps.name, str(fold)): maps.files[maps.name, str(fold)] for fold in range(maps.folds)}
    return list(brain_maps.read_maps(files, brain, cohort.grid).values())


# What is written ---------------------------------------------------------------------------------


def read_rows(folder: Path, folds: Sequence[int]) -> pd.DataFrame:
    """The findings of some folds; InputError where a file is damaged."""
    parts = []
    for fold in folds:
        file = folder / FILES.part[0].format(fold)
        texts = dict.fromkeys(("method", "check", "setting", "path", "subject"), str)
        try:
            # a METHOD may be called "NA", a setting or a path be empty: only a value may be missing
            part = pd.read_csv(
                file,
                dtype=texts | {"fold": int, "value": float},
                keep_default_na=False,
                na_values={"value": [""]},
            )
        except (OSError, ValueError) as problem:
            raise InputError(f"{file}: cannot be read ({problem})") from problem
        if list(part.columns) != sanity_scores.COLUMNS or (part["fold"] != fold).any():
            raise InputError(f"{file}: is damaged: expected the columns {', '.join(sanity_scores.COLUMNS)}")
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def check_part(folder: Path, fold: int) -> None:
    """Raise InputError where the findings of a finished fold are damaged."""
    read_rows(folder, [fold])


def read_summary(file: Path) -> pd.DataFrame:
    """The summary that this call or an earlier one wrote."""
    try:
        return pd.read_csv(file, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as problem:
        raise InputError(f"{file}: cannot be read ({problem})") from problem


def summary_text(summary: pd.DataFrame) -> str:
    """The summary as people read it."""

    def cells(name: str) -> list[str]:
        ends = zip(summary[name], summary[f"{name}_low"], summary[f"{name}_high"], strict=True)
        return [
            ""
            if math.isnan(mean)
            else f"{mean:.2f}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")
            for mean, low, high in ends
        ]

    columns = {name.replace("_", " "): cells(name) for name in sanity_scores.SUMMARY}
    table = pd.DataFrame({"method": summary["method"], **columns, "verdict": summary["verdict"]})
    shown = table.loc[:, (table != "").any()]  # no column that says nothing
    return shown.to_string(index=False)


def report(rows: pd.DataFrame, seed: int, folder: Path) -> None:
    """Write what is made of all folds."""
    summary = sanity_scores.summarize(rows, seed)
    storage.write_csv(rows, folder / "sanity.csv")
    storage.write_csv(summary, folder / "sanity_summary.csv")
    figures.draw_sanity(rows, summary, folder / "sanity.png")


def say_state(results: ResultFolder) -> None:
    """Print the summary, or what is still to be checked."""
    unfinished, folder = results.unfinished(), results.path
    if unfinished:
        print(f"not checked yet: folds {unfinished}; the summary follows with the last fold")
        return
    print("mean over subjects [95 % interval]; what the columns are: docs/sanity.md")
    print(summary_text(read_summary(folder / "sanity_summary.csv")))
    print(f"written to {folder}: {', '.join(FILES.summary)}")


@utils.command("finished folds are saved; the same command, without --overwrite, goes on from there")
def main(argv: list[str] | None = None) -> int:
    """Check everything, then the maps of every fold; sum up."""
    args = get_parser().parse_args(argv)
    process.keep_freed_memory()
    device = selfcheck.open_device(args.device)
    run = runs.find_run(args.modelpath, args.path, args.model, args.fold)
    cohort, networks, second = run.cohort, TrainedNetworks(run), find_second(args.second_run, run)
    folds, chosen = range(cohort.k), utils.choose_folds(args.run_folds, cohort.k)
    check_scans(cohort, args.scans_per_fold)
    cohort.check_controls(folds, f"--modelpath {args.modelpath}")
    networks.check(folds)
    devices.check_batch(1, models.largest_output(run.model, cohort.grid.shape), device)
    found = without_floors(brain_maps.find_maps(args.maps))
    uses = {maps.name: use for maps in found if (use := read_use(maps, networks))}
    if not uses:
        raise InputError(f"--maps {args.maps}: holds no maps of heatmap.py that are no floors")
    mask = args.mask or brain_maps.find_mean_scan(found)
    brain = voxelwise.read_mask(mask, cohort.grid)
    others = {maps.name: maps for maps in found if maps.name not in uses}
    of_scans = {name: read_folds(maps, brain, cohort) for name, maps in others.items()}
    asked = {name: getattr(args, name) for name in ("scans_per_fold", "orders", "repeats", "seed")}
    made_from = {f"weights of fold {fold}": networks.digest(fold) for fold in folds}
    made_from["mask"] = storage.file_sha256(mask)
    made_from["second run"] = second.digest(0) if second else None
    identity = asked | cohort.identity | {"made_from": made_from | maps_identity(found, uses)}
    folder, only = args.outpath or args.maps, args.run_folds and chosen
    results = ResultFolder(folder, FILES, folds, identity, {}, only, args.overwrite)
    results.check(partial(check_part, folder))

    about = {"csv": str(cohort.csv), "modelpath": str(run.folder.resolve())}
    work = devices.describe_batch(1, cohort.grid.shape, run.model, device)
    with process.out_of_memory(work, "give a smaller --mask"), results.at_work(about) as missing:
        scans = cohort.open_scans(Cache("reuse", args.modelpath / "cache"))
        panel = Panel(uses, networks, second, scans, brain, args.orders, args.repeats, args.seed, device)
        utils.say_kept(chosen, missing)
        for fold in missing:
            rows = choose_scans(cohort, fold, args.scans_per_fold, args.seed)
            parts = [panel.check_fold(fold, rows)]
            parts += [compare_folds(name, maps, fold) for name, maps in of_scans.items()]
            storage.write_csv(pd.concat(parts), folder / FILES.part[0].format(fold))
            results.finish(fold)
        with results.summary() as due:
            if due:
                report(read_rows(folder, folds), args.seed, folder)
    say_state(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
