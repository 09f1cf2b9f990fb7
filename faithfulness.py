"""How a logit changes when a scan is covered in the order of its map (Samek et al. 2017, arXiv 1509.06321).

Cubes of the brain are covered, those of the largest values first; or uncovered in the same order, beginning
with all of them covered. If the map says what the network uses, the logit falls, or rises, faster than in an
order by chance.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from internals.folded import FoldedNetwork, bounding_box
from models import CNN3d, evaluation_mode

CUBE = 8.0  # mm, of the cubes
# of the brain, covered or uncovered: each step doubles, so that the map's largest values weigh most
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
POINTS = (0.0, *SHARES, 1.0)  # of a curve
WAYS = ("deletion", "insertion")


def divide(brain: np.ndarray, voxel_sizes: Sequence[float]) -> np.ndarray:
    """Divide a brain into cubes of 8 mm, rounded to voxels.

    Args:
        brain: bool (X, Y, Z), V voxels of it true.
        voxel_sizes: edges of a voxel in mm.

    Returns:
        int (V,), the number of each voxel's cube, 0 ... C - 1.
    """
    edges = np.maximum(np.rint(CUBE / np.asarray(voxel_sizes)), 1).astype(int)
    places = np.argwhere(brain) // edges
    _, cubes = np.unique(np.ravel_multi_index(tuple(places.T), brain.shape), return_inverse=True)
    return cubes


def falling_order(values: np.ndarray, cubes: np.ndarray, seed: int) -> np.ndarray:
    """The order of the cubes, the one of the largest sum first.

    Ties are broken as a map of white noise orders them: a map of zeros comes in an order by chance. It is one
    that deals with cubes of many and of few voxels as any map does, whose sums differ in size.

    Args:
        values: (V,), signed.
        cubes: from `divide`.
        seed: of the noise.

    Returns:
        The numbers of the cubes, int (C,).
    """
    noise = np.random.default_rng(seed).standard_normal(len(cubes))
    return np.lexsort((-np.bincount(cubes, weights=noise), -np.bincount(cubes, weights=values)))


def first_cubes(order: np.ndarray, cubes: np.ndarray, share: float) -> np.ndarray:
    """The first cubes of an order that hold a share of the brain's voxels at least, bool (C,)."""
    held = np.cumsum(np.bincount(cubes)[order])
    chosen = np.zeros(len(order), bool)
    chosen[order[: np.searchsorted(held, share * held[-1]) + 1 if share else 0]] = True
    return chosen


class CoveredScan:
    """A scan whose cubes may be covered, and the logits that a network gives it.

    Args:
        model: the network; evaluated in evaluation mode, left as found.
        volume: (1, 1, X, Y, Z), the scan.
        filling: what covers a cube's voxels, like `volume`.
        brain: bool (X, Y, Z).
        cubes: of its voxels, from `divide`.
    """

    def __init__(
        self, model: CNN3d, volume: Tensor, filling: Tensor, brain: np.ndarray, cubes: np.ndarray
    ) -> None:
        inside = torch.from_numpy(brain).to(volume.device)
        with evaluation_mode(model):
            self.network = FoldedNetwork(model, volume.shape[2:], bounding_box(volume, inside[None, None]))
        box = self.network.input_box  # around all that is covered, and all else that is not zero
        self.inside = inside[box]
        self.head, self.filling = volume[:, :, *box], filling[0, 0][box][self.inside]
        self.cubes = cubes
        none = np.zeros(cubes.max() + 1, bool)
        self.whole, self.hidden = self._logits(none), self._logits(~none)  # the ends of all curves

    def curve(self, order: np.ndarray, way: str) -> np.ndarray:
        """The logits at each of POINTS: float64 (len(POINTS), 2).

        Args:
            order: of the cubes, from `falling_order`.
            way: one of WAYS; by insertion, all cubes are covered at 0, and none at 1.
        """
        chosen = [first_cubes(order, self.cubes, share) for share in SHARES]
        between = [self._logits(cubes if way == "deletion" else ~cubes) for cubes in chosen]
        ends = (self.whole, self.hidden) if way == "deletion" else (self.hidden, self.whole)
        return np.stack([ends[0], *between, ends[1]])

    def _logits(self, covered: np.ndarray) -> np.ndarray:
        """The logits of the scan, (2,), with some cubes, bool (C,), covered."""
        voxels = torch.from_numpy(covered[self.cubes]).to(self.head.device)  # (V,)
        head = self.head.clone()
        head[0, 0][self.inside] = torch.where(voxels, self.filling, head[0, 0][self.inside])
        with torch.no_grad():
            return self.network.logits(head)[0].cpu().double().numpy()


def gain(curve: np.ndarray, other: np.ndarray, way: str) -> float:
    """How much better than another order an order is: the mean difference of a logit at SHARES.

    deletion: mean_q [F_other(q) - F(q)];   insertion: mean_q [F(q) - F_other(q)]

    Args:
        curve, other: (len(POINTS),), of one logit each.
        way: one of WAYS.
    """
    difference = float((curve - other)[1:-1].mean())
    return -difference if way == "deletion" else difference
