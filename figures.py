"""The pictures: loss curves, reliability, maps over a scan, overlap with a reference."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd

from brain_maps import FLOORS, RESERVED, unmask
from internals import storage
from overlap_scores import BrainMask
from sanity_scores import LARGEST

# Okabe and Ito's colours, told apart with any kind of colour vision; grey is left to the floors.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
SMOOTHED = 6.0  # mm FWHM, in the picture of a map
CUTS = 7  # slices in a row
# of the floors' bars, and what they are called
HATCHES = {"untrained": ("////", "untrained network"), "permuted": ("....", "trained on permuted labels")}


def _pyplot() -> Any:
    """matplotlib.pyplot, imported only where pictures are drawn: it takes a while, and writes a cache."""
    import matplotlib

    matplotlib.use("Agg")  # pictures are written, never shown: no display is needed
    matplotlib.rcParams["text.parse_math"] = False  # a METHOD is the name of a folder, $ is a letter of it
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure as PNG, and close it."""
    with storage.atomic_write(path) as partial:
        figure.savefig(partial, dpi=dpi)
    _pyplot().close(figure)


def best_row(losses: Sequence[float], delta: float) -> int:
    """The row of a history whose weights were saved: the last to fall by more than `delta`."""
    best = 0
    for row, loss in enumerate(losses):
        best = row if loss < losses[best] - delta else best
    return best


def draw_training(histories: list[pd.DataFrame], delta: float, path: Path) -> None:
    """Loss curves of every fold, the epoch whose weights were saved marked (PNG)."""
    plt = _pyplot()
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
    _save(figure, path, dpi=110)


def draw_calibration(bins: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Reliability diagrams: how often the disease was there, against how probable it was called (PNG).

    Args:
        bins: `calibration.reliability`, by the words to write over each.
        path: the PNG to write.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(bins), figsize=(4.2 * len(bins), 4.6), sharey=True, squeeze=False)
    for axis, (words, table) in zip(axes[0], bins.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="perfectly calibrated")
        ends = [table["share"] - table["low"], table["high"] - table["share"]]
        look = {"fmt": "o", "color": COLOURS[0], "capsize": 3, "label": "test scans, 95 % interval"}
        axis.errorbar(table["prob_1"], table["share"], np.maximum(ends, 0), **look)
        for prob_1, high, n in zip(table["prob_1"], table["high"], table["n"], strict=True):
            axis.annotate(f"{n}", (prob_1, high), (0, 4), textcoords="offset points", ha="center", fontsize=8)
        axis.set(title=words, xlabel="probability of label 1", xlim=(-0.04, 1.04), ylim=(-0.04, 1.1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("share of scans with label 1")
    axes[0][0].legend(frameon=False, loc="upper left", fontsize=8)
    figure.tight_layout()
    _save(figure, path, dpi=110)


def draw_map(
    maps: Mapping[str, np.ndarray], background: np.ndarray, affine: np.ndarray, title: str, path: Path
) -> None:
    """Draw signed maps over a scan, and the first one's magnitude smoothed, as people compare maps (PNG).

    Shown is what lies in the brain, where the scan is above 0: the largest 3 % of a signed map's voxels, as
    they are, with colours that end at the 99.9th percentile of all of them; of the smoothed magnitude the
    largest 5 %.

    Args:
        maps: by name, (X, Y, Z) each, signed; the first as axial, coronal and sagittal slices, others axial.
        background: (X, Y, Z) scan on the same grid.
        affine: (4, 4), voxel to mm.
        title: written over the figure.
        path: the PNG to write.
    """
    plt = _pyplot()
    brain, (first, *others) = background > 0, maps
    maps = {name: np.where(brain, values, 0) for name, values in maps.items()}
    rows = [(first, "z"), (first, "y"), (first, "x"), *((name, "z") for name in others)]
    figure, axes = _rows(len(rows) + 1, title)
    scan = nib.Nifti1Image(background.astype(np.float32), affine)
    ends = {name: _percentiles(np.abs(values[values != 0]), 97, 99.9) for name, values in maps.items()}
    top = max(high for _, high in ends.values())
    for axis, (name, direction) in zip(axes, rows, strict=False):
        _draw_slices(axis, name, maps[name], scan, Slices(direction, CUTS, ends[name][0], -top, top))

    smoothed = BrainMask(brain, affine).smooth(np.abs(maps[first][brain]).astype(np.float32), SMOOTHED)
    low, high = _percentiles(smoothed, 95, 100)
    seen = Slices("z", CUTS, low, 0, high)
    _draw_slices(axes[-1], f"|{first}|, {SMOOTHED:g} mm", unmask(smoothed, brain), scan, seen)

    from nilearn.plotting import cm

    colours = plt.cm.ScalarMappable(plt.Normalize(-top, top), cm.cold_hot)
    bar = figure.add_axes((0.945, 0.45, 0.015, 0.4))
    bar.set_title("value", fontsize=10)
    figure.colorbar(colours, cax=bar).formatter.set_powerlimits((-2, 2))
    _save(figure, path, dpi=110)


def _rows(count: int, title: str) -> tuple[Any, Any]:
    """A figure of so many rows of slices."""
    height = 2.4 * count + 0.5
    figure, axes = _pyplot().subplots(count, 1, figsize=(13, height), facecolor="white", squeeze=False)
    figure.subplots_adjust(left=0.05, right=0.92, top=1 - 0.5 / height, bottom=0.01, hspace=0.02)
    figure.suptitle(title, fontsize=13, y=1 - 0.15 / height, va="top")
    return figure, axes[:, 0]


def _percentiles(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Two percentiles of values >= 0, above zero even where all values are zero, and apart."""
    smallest = float(np.finfo(np.float32).tiny)
    below, above = np.percentile(values, [low, high]) if values.size else (0.0, 0.0)
    below = max(float(below) * (1 - 1e-6), smallest)  # the voxels at it are shown
    return below, max(float(above), 2 * below if above <= below else 0.0)


class Slices(NamedTuple):
    """Which slices of a map are drawn, and what of it is seen."""

    direction: str  # "x", "y" or "z"
    cuts: int | Sequence[float]  # how many slices, or where, in mm
    threshold: float  # magnitudes above it are seen
    low: float  # the ends of the colours
    high: float


def _draw_slices(axis: Any, name: str, values: np.ndarray, scan: nib.Nifti1Image, slices: Slices) -> Any:
    """Draw a map over a scan, as a row of slices with its name to the left; returns nilearn's display."""
    from nilearn import plotting

    direction, cuts, _, low, high = slices
    threshold: float | None = slices.threshold
    shape = {"display_mode": direction, "cut_coords": cuts, "axes": axis, "black_bg": False, "dim": 0}
    if not values.any():  # nilearn takes no map of zeros: the scan stands in, and is not seen
        values, threshold, low, high, shape["transparency"] = scan.get_fdata(), None, -1.0, 1.0, 0.0
    image = nib.Nifti1Image(values.astype(np.float32), scan.affine)
    look = {"cmap": "cold_hot" if low < 0 else "hot", "symmetric_cbar": low < 0, "colorbar": False}
    display = plotting.plot_stat_map(image, scan, threshold=threshold, vmin=low, vmax=high, **look, **shape)
    place = axis.get_position()
    middle = (place.y0 + place.y1) / 2
    axis.figure.text(place.x0 - 0.005, middle, name, rotation=90, ha="right", va="center", fontsize=11)
    return display


def draw_overlap_maps(
    maps: Mapping[str, np.ndarray],
    reference: np.ndarray,
    brain: np.ndarray,
    scan: nib.Nifti1Image,
    title: str,
    path: Path,
) -> None:
    """Draw every map's largest voxels, as many as the reference has, under the reference's outline (PNG).

    Args:
        maps: by the words to write beside them, (V,) >= 0 each, at the voxels of the brain.
        reference: (V,) bool.
        brain: (X, Y, Z) bool.
        scan: what they are drawn over.
        title: written over the figure.
        path: the PNG to write.
    """
    outline = nib.Nifti1Image(unmask(reference, brain).astype(np.float32), scan.affine)
    heights = np.unique(nib.affines.apply_affine(scan.affine, np.argwhere(outline.get_fdata()))[:, 2])
    cuts = heights[np.unique(np.linspace(0, len(heights) - 1, CUTS + 2).round().astype(int)[1:-1])]
    figure, axes = _rows(len(maps), title)
    percent = 100 * (1 - reference.mean())
    for axis, (name, values) in zip(axes, maps.items(), strict=True):
        low, high = _percentiles(values, percent, 100)
        display = _draw_slices(axis, name, unmask(values, brain), scan, Slices("z", cuts, low, 0, high))
        display.add_contours(outline, levels=[0.5], colors="#56B4E9", linewidths=1.2)
    _save(figure, path, dpi=110)


def draw_overlap(table: pd.DataFrame, ranked: pd.DataFrame, curves: dict[str, Any], path: Path) -> None:
    """Draw Dice against threshold, against smoothing, and method by method (PNG).

    Args:
        table, ranked: the content of overlap.csv and overlap_ranked.csv.
        curves: `dice_curve` of the mean map of each METHOD and of "edges", smoothed as in `ranked`.
        path: the PNG to write.
    """
    plt = _pyplot()
    names = [name for name in ranked["method"] if name in curves and name != "edges"]
    styles = _styles(names)
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.5), sharey=True, layout="constrained")
    ranked = ranked.set_index("method")
    _draw_thresholds(axes[0], curves, ranked, styles)
    _draw_smoothing(axes[1], table[table["fold"] == "all"], styles)
    _draw_bars(axes[2], names, ranked, styles)
    known: dict[str, Any] = {}
    for axis in axes[[1, 0, 2]]:
        axis.spines[["top", "right"]].set_visible(False)
        known |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0].set(ylabel="Dice with the reference", ylim=(0, None))
    figure.legend(known.values(), known, loc="outside lower center", ncols=min(len(known), 7), frameon=False)
    _save(figure, path, dpi=150)


def _draw_thresholds(axis: Any, curves: dict[str, Any], ranked: pd.DataFrame, styles: dict[str, Any]) -> None:
    """Dice of the mean maps against the threshold."""
    for name in [name for name in styles if name in curves]:
        thresholds, dice = curves[name]
        axis.plot(100 * thresholds / (thresholds[-1] or 1), dice, **styles[name])
    axis.axhline(ranked.loc["random", "dice"], **styles["random"])
    axis.axhline(ranked["dice_floor"].max(), color="0.35", linestyle=":", label="whole brain")
    axis.set_xlabel("threshold (% of the map's largest value)")
    axis.set_title(f"A   every threshold, {ranked['fwhm_mm'].iloc[0]:g} mm FWHM", loc="left")


def _draw_smoothing(axis: Any, table: pd.DataFrame, styles: dict[str, Any]) -> None:
    """Best Dice of the mean maps against the smoothing, and the intervals over single folds, side by side."""
    apart = 0.012 * np.ptp(table["fwhm_mm"])
    for place, (name, style) in enumerate(styles.items()):
        rows = table[table["method"] == name]
        label = {"edges": "edge filter", "random": "random map, 95th percentile"}.get(name, name)
        axis.plot(rows["fwhm_mm"], rows["dice"], marker="o", markersize=4, label=label, **style)
        beside = rows["fwhm_mm"] + apart * (place - (len(styles) - 3) / 2)
        axis.vlines(beside, rows["dice_low"], rows["dice_high"], style["color"], linewidth=3, alpha=0.45)
    axis.set_xlabel("smoothing of |map| (FWHM, mm)")
    axis.set_title("B   best threshold, every smoothing; bars: single folds", loc="left")


def _draw_bars(axis: Any, names: list[str], ranked: pd.DataFrame, styles: dict[str, Any]) -> None:
    """Best Dice of the mean map of each METHOD and of its floors, and of single folds."""
    looks = {FLOORS[floor]: {"facecolor": "white", "hatch": hatch} for floor, (hatch, _) in HATCHES.items()}
    for place, method in enumerate(names):
        bars = [suffix for suffix in ("", *looks) if method + suffix in ranked.index]
        width = 0.8 / max(len(bars), 2)
        offsets = width * (np.arange(len(bars)) - (len(bars) - 1) / 2)
        for suffix, x in zip(bars, place + offsets, strict=True):
            row, colour = ranked.loc[method + suffix], styles[method]["color"]
            look = looks[suffix] if suffix else {"facecolor": colour, "alpha": 0.75}
            axis.bar(x, row["dice"], 0.9 * width, edgecolor=colour, **look)
            axis.hlines(row["random_dice"], x - 0.45 * width, x + 0.45 * width, **styles["random"])
            low, mean, high = row["dice_low"], row["dice_folds_mean"], row["dice_high"]
            label, ends = "single folds: mean, 95 % interval", [[mean - low], [high - mean]]
            axis.errorbar(x, mean, ends, fmt="o", color="black", markersize=3, capsize=3, lw=1, label=label)
    for floor, (_, words) in HATCHES.items():
        if any(name.endswith(FLOORS[floor]) for name in ranked.index):
            axis.bar(0, 0, edgecolor="0.35", label=words, **looks[FLOORS[floor]])
    axis.axhline(ranked.loc["edges", "dice"], **styles["edges"])
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_title(f"C   best threshold, {ranked['fwhm_mm'].iloc[0]:g} mm FWHM", loc="left")


COVERINGS = {
    "deletion_zero": "deletion, zeros",
    "deletion_controls": "deletion, mean control",
    "insertion_zero": "insertion, zeros",
    "insertion_controls": "insertion, mean control",
}
REDRAWN = {"output": "from the logits down", "input": "from the scan up", "alone": "in one layer alone"}


def draw_sanity(rows: pd.DataFrame, summary: pd.DataFrame, path: Path) -> None:
    """Draw what new weights do to maps, how alike networks' maps are, what covering does to the logit (PNG).

    Args:
        rows, summary: the content of sanity.csv and sanity_summary.csv.
        path: the PNG to write.
    """
    styles = _styles([name for name in summary["method"] if name not in RESERVED])
    covered = set(rows.loc[rows["check"] == "deletion_zero", "method"])
    colours = {name: style["color"] if name in covered else "0.7" for name, style in styles.items()}
    redrawn = {f"weights_{order}_spearman": f"new weights {words}" for order, words in REDRAWN.items()}
    redrawn = {check: words for check, words in redrawn.items() if check in set(rows["check"])}
    figure = _pyplot().figure(figsize=(17, 9), layout="constrained")
    above, below = _two_rows(figure, 2 + len(redrawn), len(COVERINGS))
    _draw_column(above[0], summary, "weights_rho", colours)
    above[0].set_ylabel("rank correlation with the network's own map")
    above[0].set_title("new weights in all layers", loc="left")
    for axis, (check, words) in zip(above[1:], redrawn.items(), strict=False):
        axis.set_title(words, loc="left")
        chosen = rows[rows["check"] == check]
        _draw_new_weights(axis, chosen, styles, reverse=check == "weights_output_spearman")
    _draw_column(above[-1], summary, "fold_dice5", colours)
    above[-1].axhline(LARGEST, **styles["random"])
    above[-1].set_title("other folds' networks: Dice of the largest 5 %", loc="left")
    for axis, (check, words) in zip(below, COVERINGS.items(), strict=True):
        axis.set_title(words, loc="left")
        _draw_covering(axis, rows[rows["check"] == check], styles)
    below[0].set_ylabel("explained logit")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = below[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    _save(figure, path, dpi=110)


def _two_rows(figure: Any, above: int, below: int) -> tuple[list[Any], list[Any]]:
    """The axes of two rows, so many each, of equal width within a row."""
    grid = figure.add_gridspec(2, above * below)
    upper = [figure.add_subplot(grid[0, i * below : (i + 1) * below]) for i in range(above)]
    lower = [figure.add_subplot(grid[1, i * above : (i + 1) * above]) for i in range(below)]
    return upper, lower


def _draw_column(axis: Any, summary: pd.DataFrame, column: str, colours: dict[str, str]) -> None:
    """One check, METHOD by METHOD, with its intervals."""
    known = summary[summary[column].notna()].set_index("method")
    for place, (name, row) in enumerate(known.iterrows()):
        axis.bar(place, row[column], color=colours[str(name)], alpha=0.75)
        axis.vlines(place, row[f"{column}_low"], row[f"{column}_high"], "black", linewidth=1)
    axis.set_xticks(range(len(known)), known.index, rotation=30, ha="right")
    axis.set_ylim(np.nanmin([0, *known[f"{column}_low"]]), 1)


def _draw_new_weights(axis: Any, rows: pd.DataFrame, styles: dict[str, Any], reverse: bool) -> None:
    """Rank correlation by layer, from the scan to the logits, or in reverse."""
    layers = rows["setting"].str.split(",").str[0]
    order = sorted(set(layers), key=lambda name: (not name.startswith("block"), name), reverse=reverse)
    means = rows.assign(layer=layers).groupby(["method", "layer"])["value"].mean()
    for name in [name for name in styles if name in means.index]:
        heights = means[name].reindex(order)
        axis.plot(range(len(order)), heights, marker="o", markersize=4, label=name, **styles[name])
    axis.axhline(0, color="0.8", linewidth=1, zorder=0)
    axis.set_xticks(range(len(order)), order, rotation=30, ha="right")
    axis.set_ylim(-0.3, 1.03)


def _draw_covering(axis: Any, rows: pd.DataFrame, styles: dict[str, Any]) -> None:
    """The logit against the share of the brain that is covered, or uncovered; but for the ends."""
    means = rows.assign(share=rows["setting"].astype(float)).groupby(["method", "share"])["value"].mean()
    shares = sorted(set(means.index.get_level_values("share")) - {0, 1})
    for name in [name for name in styles if name in means.index]:
        axis.plot(shares, means[name][shares], marker="o", markersize=4, label=name, **styles[name])
    axis.set_xscale("log", base=2)
    axis.set_xticks(shares, [f"1/{round(1 / share)}" for share in shares])
    axis.minorticks_off()
    axis.set_xlabel("share of the brain")


def _styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colours and lines of METHODs, by name, so that a method keeps them; and of the floors, in grey."""
    looks = itertools.cycle(itertools.product(("-", "--", ":"), COLOURS))
    given = {name: {"color": c, "linestyle": d} for name, (d, c) in zip(sorted(names), looks, strict=False)}
    styles = {name: given[name] for name in names}
    grey = {"edges": "-", "random": "--"}
    return styles | {name: {"color": "0.35", "linestyle": line} for name, line in grey.items()}
