"""How scans are explained: which logit, what a map should sum to, the mean map of a fold."""

from collections.abc import Callable, Iterator, Sized
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
        baseline: (1, 1, X, Y, Z), what scans are compared with; None for all zeros.
        rule: which logit is explained, one of TARGETS.
    """

    def __init__(
        self, model: CNN3d, method: Method, options: dict[str, Any], baseline: Tensor | None, rule: str
    ) -> None:
        self.model, self.method, self.baseline, self.rule = model, method, baseline, rule
        self.options = options | ({"baseline": baseline} if method.takes_baseline else {})
        self.baseline_logits: Tensor | None = None  # (1, 2), once the scans' shape is known

    def explain(self, volume: Tensor, label: Tensor) -> tuple[Tensor, pd.DataFrame]:
        """Explain a batch.

        Args:
            volume: float32 (B, 1, X, Y, Z), on the network's device.
            label: int64 (B,), there too.

        Returns:
            The maps, like `volume`, on the CPU; and a row of FOUND for each. The residual is relative to what
            the map should sum to, and NaN where its sum means nothing.
        """
        with torch.no_grad():
            logits = self.model(volume)  # (B, 2)
        target = self._target(label, logits)
        maps = self.method(self.model, volume, target, **self.options)
        wanted = self._wanted_sums(volume, logits, target).cpu().double()
        maps, logits, target = (
            maps.cpu(),
            logits.cpu(),
            target.cpu(),
        )  # before float64, which MPS does not have
        sums = maps.double().sum((1, 2, 3, 4))
        residual = (sums - wanted).abs() / wanted.abs()
        zero = (maps == 0).flatten(1).all(1).long()
        columns = [logits.argmax(1), target, _pick(logits.double().softmax(1), target), sums, residual, zero]
        return maps, pd.DataFrame({n: c.numpy() for n, c in zip(FOUND, columns, strict=True)})

    def _target(self, label: Tensor, logits: Tensor) -> Tensor:
        """The logit to explain for each scan, int64 (B,)."""
        if self.rule == "label":
            return label
        return logits.argmax(1) if self.rule == "predicted" else torch.full_like(label, int(self.rule))

    def _wanted_sums(self, volume: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """What each map should sum to, (B,); NaN where its sum means nothing."""
        if self.method.map_sum is None:
            return torch.full_like(logits[:, 0], torch.nan)
        if self.baseline_logits is None:
            blank = torch.zeros_like(volume[:1])
            with torch.no_grad():
                self.baseline_logits = self.model(blank if self.baseline is None else self.baseline)
        return self.method.map_sum(
            _pick(logits, target), _pick(self.baseline_logits.expand_as(logits), target)
        )


def _pick(values: Tensor, target: Tensor) -> Tensor:
    """Each scan's value of its target: (B, 2), (B,) -> (B,)."""
    return values.gather(1, target[:, None])[:, 0]


def explain_scans(
    explainer: Explainer, loader: Loader, keep: Callable[[int, np.ndarray], None], name: str
) -> tuple[np.ndarray, pd.DataFrame]:
    """Explain every scan of a loader, holding no more than a batch and a running sum.

    Args:
        keep: called with each scan's number within the loader and its map (X, Y, Z).
        name: for the progress bar and errors.

    Returns:
        The mean map, float64 (X, Y, Z), and a row of FOUND per scan.

    Raises:
        FloatingPointError: a map has values that are not finite.
    """
    total, done = cast(Any, 0.0), 0
    rows: list[pd.DataFrame] = []
    with utils.progress(None, len(cast(Sized, loader.dataset)), desc=name) as bar:
        for volume, label in _on_device(loader, explainer.model):
            maps, found = explainer.explain(volume, label)
            if not torch.isfinite(maps).all():
                raise FloatingPointError(f"{name}: a map has values that are not finite")
            rows.append(found)
            for values in maps[:, 0].numpy():
                keep(done, values)
                total = total + values.astype(np.float64)
                done += 1
            bar.update(len(label))
    return total / done, pd.concat(rows, ignore_index=True)


def _on_device(loader: Loader, model: CNN3d) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, where the network is."""
    device = next(model.parameters()).device
    for volume, label in loader:
        yield devices.to_device(volume, device), devices.to_device(label, device)
