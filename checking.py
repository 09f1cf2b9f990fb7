"""How maps are checked without a truth: against new weights, other folds' networks, and covered scans."""

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
from faithfulness import WAYS, CoveredScan
from methods import Method
from models import CNN3d
from runs import TrainedNetworks
from sanity_scores import COLUMNS, EDGES, FILLINGS, RANDOM, Magnitudes

CALIBRATION = 8  # training scans that BatchNorm's statistics are estimated on behind new weights
EDGE_WIDTH = 1.0  # voxels, the standard deviation of the edge filter's Gaussian

Finding = tuple[str, str, str, float]  # METHOD, check, setting, value


class Use(NamedTuple):
    """How a method was used to explain a run's networks."""

    method: Method
    options: dict[str, Any]  # its own
    target: str  # which logit, one of explaining.TARGETS
    seed: int


class Scan(NamedTuple):
    """A test scan, on the networks' device."""

    row: int
    volume: Tensor  # (1, 1, X, Y, Z)
    label: Tensor  # (1,)


class Witness(NamedTuple):
    """A network, what explains scans with it by METHOD, and the checks and settings that it serves."""

    model: CNN3d
    explainers: Mapping[str, Explainer]
    serves: Sequence[tuple[str, str]] = ()


@dataclass(eq=False)
class Panel:
    """The checks of a run's maps.

    Attributes:
        uses: how each METHOD explains the networks.
        networks: the run's.
        second: those of another run of the same scans.
        scans: the cohort's.
        brain: bool (X, Y, Z), where maps are looked at; V of its voxels are true.
        orders: of randomizing.ORDERS, in which layers are drawn anew.
        repeats: draws of new weights, and of orders by chance.
        seed: of everything drawn.
    """

    uses: Mapping[str, Use]
    networks: TrainedNetworks
    second: TrainedNetworks | None
    scans: ScanDataset
    brain: np.ndarray
    orders: Sequence[str]
    repeats: int
    seed: int
    device: torch.device
    _controls: dict[tuple[TrainedNetworks, int], Tensor] = field(default_factory=dict)

    @property
    def cohort(self) -> Cohort:
        """That of the run."""
        return self.networks.run.cohort

    def check_fold(self, fold: int, rows: Sequence[int]) -> pd.DataFrame:
        """Check the maps of some test scans of a fold: columns as sanity_scores.COLUMNS."""
        own = self._witness(self.networks, fold)
        others = [f for f in range(self.cohort.k) if f != fold]
        witnesses = [self._witness(self.networks, f, [("fold", f"fold {f}")]) for f in others]
        witnesses += self._redrawn(fold, own.model)
        parts = []
        for number, row in enumerate(rows, 1):
            title = f"fold {fold}, scan {number} of {len(rows)}"
            findings = self._check_scan(fold, row, own, [*witnesses, *self._second_opinion(row)], title)
            known = self.cohort.table.loc[row]
            table = pd.DataFrame(findings, columns=["method", "check", "setting", "value"])
            parts.append(table.assign(fold=fold, path=known["path"], subject=known["subject"]))
        return pd.concat(parts)[COLUMNS]

    # The networks -------------------------------------------------------------------------------

    def _witness(
        self,
        networks: TrainedNetworks,
        fold: int,
        serves: Sequence[tuple[str, str]] = (),
        model: CNN3d | None = None,
    ) -> Witness:
        """A fold's network, or `model` in its place."""
        model = model or networks.load(fold, self.scans, self.device)
        explainers = {}
        for name, use in self.uses.items():
            compared = use.options.get("baseline") == "controls"
            baseline = self._mean_control(networks, fold) if compared else None
            settings = {"baseline": baseline, "voxel_sizes": self.cohort.grid.voxel_sizes}
            explainers[name] = Explainer(model, use.method, use.options, settings, use.target)
        return Witness(model, explainers, serves)

    def _redrawn(self, fold: int, model: CNN3d) -> Iterator[Witness]:
        """Copies of a fold's network with layers drawn anew; each may serve several checks."""
        rows = runs.calibration_scans(self.cohort, fold, CALIBRATION)
        randomizer = randomizing.Randomizer(model, [self._scan(row).volume for row in rows])
        serves: dict[range, list[tuple[str, str]]] = {}
        for order, added, layers in randomizing.steps(len(model.blocks()), self.orders):
            serves.setdefault(layers, []).append((f"weights_{order}", added))
        for draw, (layers, served) in itertools.product(range(self.repeats), serves.items()):
            copied = randomizer.randomize(layers, utils.own_seed(self._own_seed(fold), draw))
            named = [(check, f"{added}, draw {draw}") for check, added in served]
            yield self._witness(self.networks, fold, named, copied)

    def _second_opinion(self, row: int) -> Iterator[Witness]:
        """The second run's network that tests a scan, where there is such a run."""
        if self.second:
            cohort = self.second.run.cohort
            fold = next(f for f in range(cohort.k) if row in cohort.scan_indices(f, "test"))
            yield self._witness(self.second, fold, [("seed", f"fold {fold} of the second run")])

    # The scans ----------------------------------------------------------------------------------

    def _scan(self, row: int) -> Scan:
        volume, label = self.scans[row]
        return Scan(row, volume[None].to(self.device), torch.tensor([label], device=self.device))

    def _mean_control(self, networks: TrainedNetworks, fold: int) -> Tensor:
        """The mean of a fold's training controls, (1, 1, X, Y, Z)."""
        key = networks, fold
        if key not in self._controls:
            mean = self.scans.mean(networks.run.cohort.training_controls(fold))
            self._controls[key] = torch.from_numpy(mean).to(self.device)[None, None]
        return self._controls[key]

    def _own_seed(self, number: int) -> int:
        return utils.own_seed(self.seed, number)

    # The checks ---------------------------------------------------------------------------------

    def _check_scan(
        self, fold: int, row: int, own: Witness, witnesses: Sequence[Witness], title: str
    ) -> list[Finding]:
        """All checks of the maps of one scan by its own fold's network."""
        scan, findings = self._scan(row), []
        with torch.no_grad():
            logits = own.model(scan.volume)
        maps, targets = {}, {}
        for name, explainer in own.explainers.items():
            volumes, found = explainer.explain(scan.volume, scan.label, logits, self._seeds(name, row))
            maps[name], targets[name] = self._inside(volumes), explainer.target(scan.label, logits)
            findings += [(name, check, "", float(found[check].item())) for check in ("residual", "zero")]
        whole = {name: Magnitudes(values) for name, values in maps.items()}
        for witness in utils.progress(witnesses, desc=title):
            findings += self._compare(witness, scan, whole, targets)
        mean_control = self._mean_control(self.networks, fold)
        findings += self._cover(own.model, mean_control, scan, maps, targets)
        return findings

    def _compare(
        self, witness: Witness, scan: Scan, whole: Mapping[str, Magnitudes], targets: Mapping[str, Tensor]
    ) -> Iterator[Finding]:
        """How alike a scan's maps of the same logits are by another network."""
        for name, explainer in witness.explainers.items():
            maps = explainer.maps(scan.volume, targets[name], self._seeds(name, scan.row))
            other = Magnitudes(self._inside(maps))
            rho, dice = whole[name].spearman(other), whole[name].dice5(other)
            for check, setting in witness.serves:
                yield name, f"{check}_spearman", setting, rho
                yield name, f"{check}_dice5", setting, dice

    def _cover(
        self,
        model: CNN3d,
        mean_control: Tensor,
        scan: Scan,
        maps: Mapping[str, np.ndarray],
        targets: Mapping[str, Tensor],
    ) -> Iterator[Finding]:
        """How a logit changes where the scan is covered in the order of its maps, its edges, or by chance."""
        cubes = faithfulness.divide(self.brain, self.cohort.grid.voxel_sizes)
        edges = ndimage.gaussian_gradient_magnitude(scan.volume[0, 0].cpu().numpy(), EDGE_WIDTH)[self.brain]
        seeds = [utils.own_seed(self._own_seed(scan.row), draw) for draw in range(self.repeats)]
        by_chance = [faithfulness.falling_order(np.zeros(len(cubes)), cubes, seed) for seed in seeds]
        orders = {
            name: faithfulness.falling_order(values, cubes, seeds[0])
            for name, values in {EDGES: edges, **maps}.items()
        }
        logits = {RANDOM: int(scan.label), EDGES: int(scan.label)} | {n: int(t) for n, t in targets.items()}
        for filling, way in itertools.product(FILLINGS, WAYS):
            shown = mean_control if filling == "controls" else torch.zeros_like(mean_control)
            covered = CoveredScan(model, scan.volume, shown, self.brain, cubes)
            curves = {name: covered.curve(places, way) for name, places in orders.items()}
            curves[RANDOM] = np.mean([covered.curve(places, way) for places in by_chance], axis=0)
            for name, curve in curves.items():
                logit = logits[name]
                for share, value in zip(faithfulness.POINTS, curve[:, logit].tolist(), strict=True):
                    yield name, f"{way}_{filling}", str(share), value
                for floor in (RANDOM, EDGES):
                    if name not in (RANDOM, floor):
                        gain = faithfulness.gain(curve[:, logit], curves[floor][:, logit], way)
                        yield name, f"{way}_gain_{filling}", floor, gain

    def _seeds(self, name: str, row: int) -> list[int]:
        """The seed of a scan's own, as heatmap.py gives it."""
        return [utils.own_seed(self.uses[name].seed, row)]

    def _inside(self, maps: Tensor) -> np.ndarray:
        """The voxels of a map (1, 1, X, Y, Z) in the brain, (V,)."""
        return maps[0, 0].cpu().numpy()[self.brain]


def compare_folds(name: str, maps: Sequence[np.ndarray], fold: int) -> pd.DataFrame:
    """How alike a fold's map of the scans alone is to the other folds': columns as sanity_scores.COLUMNS."""
    of_fold = [Magnitudes(values) for values in maps]
    rows = []
    for other in range(len(maps)):
        if other != fold:
            setting = f"fold {other}"
            rows.append((name, "fold_spearman", setting, of_fold[fold].spearman(of_fold[other])))
            rows.append((name, "fold_dice5", setting, of_fold[fold].dice5(of_fold[other])))
    table = pd.DataFrame(rows, columns=["method", "check", "setting", "value"])
    return table.assign(fold=fold, path="", subject="")[COLUMNS]
