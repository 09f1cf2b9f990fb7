"""How scans are explained: which logit, what a map should sum to, the mean maps of a fold."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import utils
from internals import devices
from internals.loading import Loader
from methods import Method
from models import CNN3d

TARGETS = ("label", "predicted", "0", "1")
FOUND = ["predicted", "target", "prob_target", "sum", "residual", "zero"]  # what is found of each scan


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
    """The mean of maps, of all of them and of each label; two sums are held, float64."""

    def __init__(self) -> None:
        self.sums: dict[int, np.ndarray] = {}  # by label, (X, Y, Z)
        self.counts: Counter[int] = Counter()

    def add(self, values: np.ndarray, label: int) -> None:
        """Add a map (X, Y, Z) of a scan of this label."""
        if label not in self.sums:
            self.sums[label] = np.zeros(values.shape)
        self.sums[label] += values
        self.counts[label] += 1

    def mean(self, *labels: int) -> np.ndarray:
        """The mean map of the scans of some labels, of all where none is named: float64 (X, Y, Z)."""
        chosen = labels or tuple(self.sums)
        total = np.sum([self.sums[label] for label in chosen], axis=0)
        return total / sum(self.counts[label] for label in chosen)


def explain_scans(
    explainers: Mapping[str, Explainer],
    loader: Loader,
    seeds: Sequence[int],
    keep: Callable[[str, int, np.ndarray], None],
    name: str,
) -> dict[str, tuple[MeanMaps, pd.DataFrame]]:
    """Explain every scan of a loader by several methods; each is read and classified once.

    No more is held than the maps of a batch, and two sums per method.

    Args:
        explainers: by name, of one network.
        seeds: of the scans, in the loader's order.
        keep: called with an explainer's name, each scan's number within the loader and its map (X, Y, Z).
        name: for the progress bar and errors.

    Returns:
        By the explainers' names the mean maps, and a row of FOUND per scan.

    Raises:
        FloatingPointError: a map has values that are not finite.
    """
    model, done = next(iter(explainers.values())).model, 0
    means = {explainer: MeanMaps() for explainer in explainers}
    rows: dict[str, list[pd.DataFrame]] = {explainer: [] for explainer in explainers}
    with utils.progress(None, len(cast(Sized, loader.dataset)), desc=name) as bar:
        for volume, label in _on_device(loader, model):
            with torch.no_grad():
                logits = model(volume)  # (B, 2)
            numbers = range(done, done + len(label))
            for who, explainer in explainers.items():
                maps, found = explainer.explain(volume, label, logits, [seeds[number] for number in numbers])
                if not torch.isfinite(maps).all():
                    raise FloatingPointError(f"{name}: a map of {who} has values that are not finite")
                rows[who].append(found)
                for number, values, truth in zip(numbers, maps[:, 0].numpy(), label.tolist(), strict=True):
                    keep(who, number, values)
                    means[who].add(values, truth)
            done += len(label)
            bar.update(len(label))
    return {who: (means[who], pd.concat(rows[who], ignore_index=True)) for who in explainers}


def _on_device(loader: Loader, model: CNN3d) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, where the network is."""
    device = next(model.parameters()).device
    for volume, label in loader:
        yield devices.to_device(volume, device), devices.to_device(label, device)
