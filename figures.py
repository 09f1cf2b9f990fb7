"""The pictures: loss curves, maps over a scan, overlap with a reference."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from brain_maps import UNTRAINED
from internals import storage

# Okabe and Ito's colours, told apart with any kind of colour vision; grey is left to the floors.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


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


def draw_map(values: np.ndarray, background: np.ndarray, affine: np.ndarray, title: str, path: Path) -> None:
    """Draw a signed map over a scan, as axial, coronal and sagittal slices (PNG).

    Shown are the largest 3 % of the map's voxels, as they are; the colours end at the 99.9th percentile.

    Args:
        values: (X, Y, Z) map, signed.
        background: (X, Y, Z) scan on the same grid.
        affine: (4, 4), voxel to mm.
        title: written over the figure.
        path: the PNG to write.
    """
    plt = _pyplot()
    from nilearn import plotting

    magnitude = np.abs(values[values != 0])
    shown, top = np.percentile(magnitude, [97, 99.9]) if magnitude.size else (0.0, 0.0)
    top = max(float(top), float(np.finfo(np.float32).tiny))
    figure, axes = plt.subplots(3, 1, figsize=(13, 7.5), facecolor="white")
    figure.subplots_adjust(left=0.01, right=0.9, top=0.94, bottom=0.01, hspace=0.02)
    figure.suptitle(title, fontsize=13)
    for axis, direction in zip(axes, "zyx", strict=True):
        plotting.plot_stat_map(
            nib.Nifti1Image(values.astype(np.float32), affine),
            bg_img=nib.Nifti1Image(background.astype(np.float32), affine),
            display_mode=direction,
            cut_coords=7,
            threshold=float(shown),
            vmax=top,
            cmap="cold_hot",
            colorbar=False,
            axes=axis,
            black_bg=False,
            dim=0,
        )
    colours = plt.cm.ScalarMappable(plt.Normalize(-top, top), plotting.cm.cold_hot)
    bar = figure.add_axes((0.92, 0.25, 0.015, 0.5))
    bar.set_title("attribution", fontsize=10)
    figure.colorbar(colours, cax=bar).formatter.set_powerlimits((-2, 2))
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
    looks = itertools.product(("-", "--", ":"), COLOURS)  # by name, so that a method keeps its colour
    given = {name: {"color": c, "linestyle": d} for name, (d, c) in zip(sorted(names), looks, strict=False)}
    styles = {name: given[name] for name in names}
    styles |= {"edges": {"color": "0.35", "linestyle": "-"}, "random": {"color": "0.35", "linestyle": "--"}}
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
    figure.legend(known.values(), known, loc="outside lower center", ncols=-(-len(known) // 2), frameon=False)
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
    """Best Dice of the mean map of each METHOD and of the untrained network, and of single folds."""
    untrained = {"facecolor": "white", "hatch": "////"}
    for place, method in enumerate(names):
        bars = [name for name in (method, method + UNTRAINED) if name in ranked.index]
        for name, x in zip(bars, place + 0.4 * (np.arange(len(bars)) - (len(bars) - 1) / 2), strict=True):
            row, colour = ranked.loc[name], styles[method]["color"]
            look = untrained if name.endswith(UNTRAINED) else {"facecolor": colour, "alpha": 0.75}
            axis.bar(x, row["dice"], 0.36, edgecolor=colour, **look)
            axis.hlines(row["random_dice"], x - 0.18, x + 0.18, **styles["random"])
            low, mean, high = row["dice_low"], row["dice_folds_mean"], row["dice_high"]
            label, ends = "single folds: mean, 95 % interval", [[mean - low], [high - mean]]
            axis.errorbar(x, mean, ends, fmt="o", color="black", markersize=3, capsize=3, lw=1, label=label)
    if any(name.endswith(UNTRAINED) for name in ranked.index):
        axis.bar(0, 0, edgecolor="0.35", label="untrained network", **untrained)
    axis.axhline(ranked.loc["edges", "dice"], **styles["edges"])
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_title(f"C   best threshold, {ranked['fwhm_mm'].iloc[0]:g} mm FWHM", loc="left")
