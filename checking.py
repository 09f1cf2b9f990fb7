"""How maps are checked without a truth: against new weights, other folds' networks, and covered scans."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import Tensor

import faithfulness
import randomizing
import runs
import utils
from dataset import Cohort, ScanDataset
from explaining import Explainer
from faithfulness import POINTS, WAYS, CoveredScan
from methods import Method
from models import CNN3d
from runs import TrainedNetworks
from sanity_scores import ANOTHER, COLUMNS, EDGES, FILLINGS, RANDOM, Magnitudes

# training scans that BatchNorm's statistics are estimated on behind new weights; fewer than runs.CALIBRATION,
# as there are many such networks
CALIBRATION = 8
EDGE_WIDTH = 1.0  # voxels, the standard deviation of the edge filter's Gaussian
WEIGHTS_SEED, COVERING_SEED = range(2)  # what seeds are drawn for

Finding = tuple[str, str, str, float]  # METHOD, check, setting, value


class Recipe(NamedTuple):
    """How a METHOD's maps are made of a network and scans."""

    method: Method
    options: dict[str, Any]  # its own
    target: str  # which logit, one of explaining.TARGETS
    seed: int


class Explained(NamedTuple):
    """A network, what explains scans with it by METHOD, and what its maps are compared for."""

    model: CNN3d
    explainers: Mapping[str, Explainer]
    checks: Sequence[tuple[str, str]] = ()  # and their settings


class Scan(NamedTuple):
    """A test scan, on the networks' device."""

    row: int
    volume: Tensor  # (1, 1, X, Y, Z)
    label: Tensor  # (1,)


@dataclass(eq=False)
class Panel:
    """The checks of a run's maps.

    Attributes:
        recipes: by METHOD.
        networks: the run's.
        second: those of another run of the same scans.
        scans: the cohort's.
        brain: bool (X, Y, Z), where maps are looked at; V of its voxels are true.
        orders: of randomizing.ORDERS, in which layers are drawn anew.
        repeats: draws of new weights, and of orders by chance.
        seed: of everything drawn.
    """

    recipes: Mapping[str, Recipe]
    networks: TrainedNetworks
    second: TrainedNetworks | None
    scans: ScanDataset
    brain: np.ndarray
    orders: Sequence[str]
    repeats: int
    seed: int
    device: torch.device
    _controls: dict[tuple[bool, int], Tensor] = field(default_factory=dict)

    @property
    def cohort(self) -> Cohort:
        """That of the run."""
        return self.networks.run.cohort

    @functools.cached_property
    def cubes(self) -> np.ndarray:
        """The cube of every voxel of the brain, int (V,)."""
        return faithfulness.divide(self.brain, self.cohort.grid.voxel_sizes)

    def check_fold(self, fold: int, rows: Sequence[int]) -> Iterator[pd.DataFrame]:
        """Check the maps of some test scans of a fold; yields the findings of one scan after the other.

        The columns are sanity_scores.COLUMNS.
        """
        if not rows:
            return
        own = self._explained(self.networks, fold)
        others = [f for f in range(self.cohort.k) if f != fold]
        networks = [self._explained(self.networks, f, [("fold", f"fold {f}")]) for f in others]
        networks += self._redrawn(fold, own.model)
        for row in rows:
            path, subject = (str(self.cohort.table[name][row]) for name in ("path", "subject"))
            compared = [*networks, *self._of_second_run(row)]
            findings = self._check_scan(fold, row, own, compared, f"fold {fold}, {path}")
            table = pd.DataFrame(findings, columns=["method", "check", "setting", "value"])
            yield table.assign(fold=fold, scan=path, subject=subject)[COLUMNS]

    # The networks -------------------------------------------------------------------------------

    def _explained(
        self,
        networks: TrainedNetworks,
        fold: int,
        checks: Sequence[tuple[str, str]] = (),
        model: CNN3d | None = None,
    ) -> Explained:
        """A fold's network, or `model` in its place."""
        model = model or networks.load(fold, self.scans, self.device)
        explainers = {}
        for name, recipe in self.recipes.items():
            compared = recipe.options.get("baseline") == "controls"
            baseline = self._mean_control(networks, fold) if compared else None
            settings = {"baseline": baseline, "voxel_sizes": self.cohort.grid.voxel_sizes}
            explainers[name] = Explainer(model, recipe.method, recipe.options, settings, recipe.target)
        return Explained(model, explainers, checks)

    def _redrawn(self, fold: int, model: CNN3d) -> Iterator[Explained]:
        """Copies of a fold's network with layers drawn anew; each may serve several checks."""
        rows = runs.calibration_scans(self.cohort, fold, CALIBRATION)
        randomizer = randomizing.Randomizer(model, [self._scan(row).volume for row in rows])
        checks: dict[range, list[tuple[str, str]]] = {}
        for order, added, layers in randomizing.steps(len(model.blocks()), self.orders):
            checks.setdefault(layers, []).append((f"weights_{order}", added))
        for draw, (layers, served) in itertools.product(range(self.repeats), checks.items()):
            copied = randomizer.randomize(layers, utils.own_seed(self.seed, WEIGHTS_SEED, fold, draw))
            named = [(check, f"{added}, draw {draw}") for check, added in served]
            yield self._explained(self.networks, fold, named, copied)

    def _of_second_run(self, row: int) -> Iterator[Explained]:
        """The second run's network that tests a scan, where there is such a run."""
        if self.second:
            cohort = self.second.run.cohort
            fold = next(f for f in range(cohort.k) if row in cohort.scan_indices(f, "test"))
            yield self._explained(self.second, fold, [("seed", f"fold {fold} of the second run")])

    # The scans ----------------------------------------------------------------------------------

    def _scan(self, row: int) -> Scan:
        volume, label = self.scans[row]
        return Scan(row, volume[None].to(self.device), torch.tensor([label], device=self.device))

    def _mean_control(self, networks: TrainedNetworks, fold: int) -> Tensor:
        """The mean of a fold's training controls, (1, 1, X, Y, Z)."""
        key = networks is self.second, fold
        if key not in self._controls:
            mean = self.scans.mean(networks.run.cohort.training_controls(fold))
            self._controls[key] = torch.from_numpy(mean).to(self.device)[None, None]
        return self._controls[key]

    # The checks ---------------------------------------------------------------------------------

    def _check_scan(
        self, fold: int, row: int, own: Explained, networks: Sequence[Explained], title: str
    ) -> list[Finding]:
        """All checks of the maps of one scan by its own fold's network."""
        scan, findings = self._scan(row), []
        with torch.no_grad():
            logits = own.model(scan.volume)
        maps, targets = {}, {}
        for name, explainer in own.explainers.items():
            volumes, found = explainer.explain(scan.volume, scan.label, logits, self._seeds(name, row))
            maps[name], targets[name] = self._inside(volumes, name), explainer.target(scan.label, logits)
            findings += [(name, check, "", float(found[check].item())) for check in ("residual", "zero")]
        magnitudes = {name: Magnitudes(values) for name, values in maps.items()}
        for other in utils.progress(networks, desc=title):
            findings += self._compare(other, scan, magnitudes, targets)
        another = self._maps_of_another(fold, row, own, targets)
        logit_of = {RANDOM: int(scan.label), EDGES: int(scan.label)} | {n: int(t) for n, t in targets.items()}
        shown = {"controls": self._mean_control(self.networks, fold), "zero": torch.zeros_like(scan.volume)}
        findings += self._cover(own.model, scan, shown, [maps, another], logit_of)
        return findings

    def _maps_of_another(
        self, fold: int, row: int, own: Explained, targets: Mapping[str, Tensor]
    ) -> dict[str, np.ndarray]:
        """The maps of another test scan, for the same logits; none where there is no other subject."""
        other = another_scan(self.cohort, fold, row)
        if other is None:
            return {}
        volume = self._scan(other).volume
        return {
            name: self._inside(explainer.maps(volume, targets[name], self._seeds(name, other)), name)
            for name, explainer in own.explainers.items()
        }

    def _compare(
        self,
        other: Explained,
        scan: Scan,
        magnitudes: Mapping[str, Magnitudes],
        targets: Mapping[str, Tensor],
    ) -> Iterator[Finding]:
        """How alike a scan's maps of the same logits are by another network."""
        for name, explainer in other.explainers.items():
            maps = explainer.maps(scan.volume, targets[name], self._seeds(name, scan.row))
            theirs = Magnitudes(self._inside(maps, name))
            rho, dice = magnitudes[name].spearman(theirs), magnitudes[name].dice5(theirs)
            for check, setting in other.checks:
                yield name, f"{check}_spearman", setting, rho
                yield name, f"{check}_dice5", setting, dice

    def _cover(
        self,
        model: CNN3d,
        scan: Scan,
        shown: Mapping[str, Tensor],
        maps: Sequence[Mapping[str, np.ndarray]],
        logit_of: Mapping[str, int],
    ) -> Iterator[Finding]:
        """How a logit changes where the scan is covered in the order of maps, its edges, or by chance.

        Args:
            shown: what a covered voxel shows, by filling, (1, 1, X, Y, Z).
            maps: by METHOD, those of the scan and those of another one.
            logit_of: the logit that each METHOD explains, and that RANDOM and EDGES are held against.
        """
        edges = ndimage.gaussian_gradient_magnitude(scan.volume[0, 0].cpu().numpy(), EDGE_WIDTH)[self.brain]
        seeds = [utils.own_seed(self.seed, COVERING_SEED, scan.row, draw) for draw in range(self.repeats)]
        order = functools.partial(faithfulness.falling_order, cubes=self.cubes, seed=seeds[0])
        orders, another = ({name: order(values) for name, values in each.items()} for each in maps)
        orders[EDGES] = order(edges)
        by_chance = [order(np.zeros(len(self.cubes)), seed=seed) for seed in seeds]
        for filling in FILLINGS:
            covered = CoveredScan(model, scan.volume, shown[filling], self.brain, self.cubes)
            for way in WAYS:
                curves = {name: covered.curve(cubes, way) for name, cubes in orders.items()}
                curves[RANDOM] = np.mean([covered.curve(cubes, way) for cubes in by_chance], axis=0)
                others = {name: covered.curve(cubes, way) for name, cubes in another.items()}
                yield from _curves_and_gains(curves, others, logit_of, way, filling)

    def _seeds(self, name: str, row: int) -> list[int]:
        """The seed of a scan's own, as heatmap.py gives it."""
        return [utils.own_seed(self.recipes[name].seed, row)]

    def _inside(self, maps: Tensor, name: str) -> np.ndarray:
        """The brain's voxels of a map (1, 1, X, Y, Z), (V,); FloatingPointError if they are not finite."""
        values = maps[0, 0].cpu().numpy()[self.brain]
        if not np.isfinite(values).all():
            raise FloatingPointError(f"a map of {name} has values that are not finite")
        return values


def _curves_and_gains(
    curves: Mapping[str, np.ndarray],
    another: Mapping[str, np.ndarray],
    logit_of: Mapping[str, int],
    way: str,
    filling: str,
) -> Iterator[Finding]:
    """Curves (POINTS, 2) of METHODs, EDGES and RANDOM, each of one logit; and what they gain over others."""
    for name, curve in curves.items():
        logit = logit_of[name]
        for share, value in zip(POINTS, curve[:, logit].tolist(), strict=True):
            yield name, f"{way}_{filling}", str(share), value
        floors = {RANDOM: curves[RANDOM], EDGES: curves[EDGES]}
        floors |= {ANOTHER: another[name]} if name in another else {}
        for floor, other in floors.items():
            if name not in (floor, RANDOM):
                gain = faithfulness.gain(curve[:, logit], other[:, logit], way)
                yield name, f"{way}_gain_{filling}", floor, gain


def another_scan(cohort: Cohort, fold: int, row: int) -> int | None:
    """The next test scan of another subject, of the same label if there is one; None where there is none."""
    rows = np.array(cohort.scan_indices(fold, "test"))
    others = cohort.table.loc[np.roll(rows, -int(np.searchsorted(rows, row)) - 1)]
    others = others[others["subject"] != cohort.table["subject"][row]]
    alike = others[others["label"] == cohort.table["label"][row]]
    found = alike if len(alike) else others
    return int(found.index[0]) if len(found) else None


def compare_folds(name: str, maps: Sequence[Magnitudes], fold: int) -> pd.DataFrame:
    """How alike a fold's map of the scans alone is to the other folds': columns as sanity_scores.COLUMNS."""
    findings: list[Finding] = []
    for other in range(len(maps)):
        if other != fold:
            findings.append((name, "fold_spearman", f"fold {other}", maps[fold].spearman(maps[other])))
            findings.append((name, "fold_dice5", f"fold {other}", maps[fold].dice5(maps[other])))
    table = pd.DataFrame(findings, columns=["method", "check", "setting", "value"])
    return table.assign(fold=fold, scan="", subject="")[COLUMNS]
