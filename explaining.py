"""How scans are explained: which logit, what a map should sum to, the mean maps of a fold or a part of it."""

import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import utils
from internals import devices, process, storage
from internals.errors import InputError
from internals.loading import Loader
from methods import Method
from models import CNN3d

TARGETS = ("label", "predicted", "0", "1")
FOUND = ["predicted", "target", "prob_target", "sum", "residual", "zero"]  # what is found of each scan
COUNTED = ["predicted", "target", "zero"]  # those that are whole numbers
# what reading a damaged .npz ends with
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
SAVE_EVERY = 300  # seconds, so that a kill costs no more


class Explainer:
    """A method as it explains the scans of one network.

    Args:
        model: the network.
        method: of `methods.METHODS`.
        options: the method's own, by name.
        settings: what methods may need beside the scans: "baseline", (1, 1, X, Y, Z) or None for all zeros,
            and "voxel_sizes" in mm.
        rule: which logit is explained, one of TARGETS.
    """

    def __init__(
        self, model: CNN3d, method: Method, options: dict[str, Any], settings: dict[str, Any], rule: str
    ) -> None:
        self.model, self.method, self.options, self.rule = model, method, options, rule
        self.settings = settings
        self.baseline_logits: Tensor | None = None  # (1, 2), once the scans' shape is known

    def explain(
        self, volume: Tensor, label: Tensor, logits: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, pd.DataFrame]:
        """Explain a batch.

        Args:
            volume: float32 (B, 1, X, Y, Z), on the network's device.
            label: int64 (B,), there too.
            logits: (B, 2), the network's.
            seeds: a number of each scan's own, for methods that draw random numbers.

        Returns:
            The maps, like `volume`, on the CPU; and a row of FOUND for each. The residual is relative to what
            the map should sum to, and NaN where its sum means nothing.
        """
        target = self.target(label, logits)
        maps = self.maps(volume, target, seeds)
        wanted = self._wanted_sums(volume, logits, target).cpu().double()
        # moved before float64, which MPS does not have
        maps, logits, target = maps.cpu(), logits.cpu(), target.cpu()
        sums = maps.double().sum((1, 2, 3, 4))
        residual = (sums - wanted).abs() / wanted.abs()
        zero = (maps == 0).flatten(1).all(1).long()
        columns = [logits.argmax(1), target, _pick(logits.double().softmax(1), target), sums, residual, zero]
        return maps, pd.DataFrame({n: c.numpy() for n, c in zip(FOUND, columns, strict=True)})

    def maps(self, volume: Tensor, target: Tensor, seeds: Sequence[int]) -> Tensor:
        """The maps of a batch for given logits, like `volume`; arguments as of `explain`."""
        settings = self.settings | {"seeds": seeds}
        needed = {name: settings[name] for name in self.method.needs}
        return self.method(self.model, volume, target, **(self.options | needed))

    def target(self, label: Tensor, logits: Tensor) -> Tensor:
        """The logit to explain for each scan, int64 (B,)."""
        if self.rule == "label":
            return label
        return logits.argmax(1) if self.rule == "predicted" else torch.full_like(label, int(self.rule))

    def _wanted_sums(self, volume: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """What each map should sum to, (B,); NaN where its sum means nothing."""
        if self.method.map_sum is None:
            return torch.full_like(logits[:, 0], torch.nan)
        if self.baseline_logits is None:
            baseline = self.settings.get("baseline")
            with torch.no_grad():
                self.baseline_logits = self.model(
                    torch.zeros_like(volume[:1]) if baseline is None else baseline
                )
        return self.method.map_sum(
            _pick(logits, target), _pick(self.baseline_logits.expand_as(logits), target)
        )


def _pick(values: Tensor, target: Tensor) -> Tensor:
    """Each scan's value of its target: (B, 2), (B,) -> (B,)."""
    return values.gather(1, target[:, None])[:, 0]


class MeanMaps:
    """Means of maps, of all and of each label: the same in whatever order and groups the maps are added.

    A sum is held as float64 and, in float32, what its rounding lost, as if it had twice the digits (Ogita,
    Rump and Oishi 2005, algorithm Sum2, doi 10.1137/030601818).
    """

    def __init__(self) -> None:
        self.sums: dict[int, np.ndarray] = {}  # by label, float64 (X, Y, Z)
        self.lost: dict[int, np.ndarray] = {}  # by label, float32 (X, Y, Z)
        self.counts: Counter[int] = Counter()

    def add(self, values: np.ndarray, label: int) -> None:
        """Add a map (X, Y, Z) of a scan of this label."""
        self._sum_up(values, label)
        self.counts[label] += 1

    def merge(self, other: "MeanMaps") -> None:
        """Add the maps that another one was given."""
        for label in other.sums:
            self._sum_up(other.sums[label], label)
            self.lost[label] += other.lost[label]
        self.counts.update(other.counts)

    def mean(self, *labels: int) -> np.ndarray:
        """The mean map of the scans of some labels, of all where none is named: float64 (X, Y, Z)."""
        chosen = labels or tuple(self.sums)
        total = np.zeros_like(self.sums[chosen[0]])
        lost = np.zeros_like(total)
        for label in chosen:
            _add(total, lost, self.sums[label])
            lost += self.lost[label]
        return (total + lost) / sum(self.counts[label] for label in chosen)

    def _sum_up(self, values: np.ndarray, label: int) -> None:
        if label not in self.sums:
            self.sums[label] = np.zeros(values.shape)
            self.lost[label] = np.zeros(values.shape, np.float32)
        _add(self.sums[label], self.lost[label], values)


def _add(total: np.ndarray, lost: np.ndarray, values: np.ndarray) -> None:
    """total += values, and lost += what that rounds away (Knuth's TwoSum); plane by plane, within caches."""
    for before, error, plane in zip(total, lost, values, strict=True):
        after = before + plane
        added = after - before
        error += (before - (after - added)) + (plane - added)
        before[...] = after


@dataclass
class Progress:
    """What a method found of the first scans of some: their mean maps, and a row of FOUND each."""

    means: MeanMaps = field(default_factory=MeanMaps)
    found: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=FOUND))

    def save(self, path: Path) -> None:
        """Write it, to go on from or to be merged with others."""
        means = self.means
        arrays = {f"found_{name}": self.found[name].to_numpy(np.float64) for name in FOUND}
        arrays |= {f"sum_{label}": values for label, values in means.sums.items()}
        arrays |= {f"lost_{label}": values for label, values in means.lost.items()}
        arrays |= {f"count_{label}": np.array(count) for label, count in means.counts.items()}
        storage.write_arrays(arrays, path)

    @classmethod
    def load(cls, path: Path, shape: tuple[int, ...], scans: int) -> "Progress":
        """What `save` wrote, of maps of a shape, of so many scans at most; InputError where it is damaged."""
        progress = cls()
        try:
            with np.load(path) as arrays:
                columns = {name: arrays[f"found_{name}"] for name in FOUND}
                labels = [int(name[6:]) for name in arrays.files if name.startswith("count_")]
                for label in labels:
                    progress.means.sums[label] = arrays[f"sum_{label}"].astype(np.float64, copy=False)
                    progress.means.lost[label] = arrays[f"lost_{label}"].astype(np.float32, copy=False)
                    progress.means.counts[label] = int(arrays[f"count_{label}"])
            progress.found = pd.DataFrame(columns).astype(dict.fromkeys(COUNTED, np.int64))
            shapes = {
                values.shape
                for part in (progress.means.sums, progress.means.lost)
                for values in part.values()
            }
            if shapes - {shape} or not progress.means.counts.total() == len(progress.found) <= scans:
                raise ValueError("of other maps")
        except UNREADABLE as problem:
            raise InputError(
                f"{path}: is damaged ({problem}); remove it to explain its scans again"
            ) from problem
        return progress


def explain_scans(
    explainers: Mapping[str, Explainer],
    loader: Loader,
    seeds: Sequence[int],
    keep: Callable[[str, int, np.ndarray], None],
    progress: Mapping[str, Progress],
    save: Callable[[], None],
    name: str,
) -> None:
    """Explain every scan of a loader by several methods; each is read and classified once.

    No more is held than the maps of a batch, and two sums per method and label. After a signal to stop, the
    batch is finished.

    Args:
        explainers: by name, of one network.
        seeds: of all scans; the loader's are the last of them.
        keep: called with an explainer's name, each scan's number and its map (X, Y, Z).
        progress: by the explainers' names, what they found of the first scans; the others' is added.
        save: called to save the progress: now and then, after a signal to stop, and in the end.
        name: for the progress bar and errors.

    Raises:
        FloatingPointError: a map has values that are not finite.
    """
    model, scans = next(iter(explainers.values())).model, len(cast(Sized, loader.dataset))
    done, saved = len(seeds) - scans, time.monotonic()
    with process.steps(save) as finish_step, utils.progress(None, scans, desc=name) as bar:
        for volume, label in _on_device(loader, model):
            numbers = range(done, done + len(label))
            with torch.no_grad():
                logits = model(volume)  # (B, 2)
            for who, explainer in explainers.items():
                if len(progress[who].found) < numbers.stop:
                    maps, found = explainer.explain(volume, label, logits, [seeds[i] for i in numbers])
                    if not torch.isfinite(maps).all():
                        raise FloatingPointError(f"{name}: a map of {who} has values that are not finite")
                    _take_over(progress[who], numbers, maps, found, label.tolist(), partial(keep, who))
            done = numbers.stop
            bar.update(len(label))
            finish_step()
            if time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()
        save()


def _take_over(
    progress: Progress,
    numbers: range,
    maps: Tensor,
    found: pd.DataFrame,
    labels: Sequence[int],
    keep: Callable[[int, np.ndarray], None],
) -> None:
    """Add the maps of a batch, and what was found of it, to the progress, but for scans that are in there."""
    first = len(progress.found) - numbers.start  # of the batch that is new: 0 but after another --batch
    for number, values, label in list(zip(numbers, maps[:, 0].numpy(), labels, strict=True))[first:]:
        keep(number, values)
        progress.means.add(values, label)
    parts = [table for table in (progress.found, found[first:]) if len(table)]
    progress.found = pd.concat(parts, ignore_index=True)


def _on_device(loader: Loader, model: CNN3d) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, where the network is."""
    device = next(model.parameters()).device
    for volume, label in loader:
        yield devices.to_device(volume, device), devices.to_device(label, device)
