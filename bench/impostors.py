#!/usr/bin/env python3
"""What sanity.py says of maps that are worth nothing, and of an honest one beside them.

    python3 bench/impostors.py --modelpath demo/models --mask demo/cohort/mask.nii.gz

Each impostor enters the table of methods like any method; heatmap.py makes its maps and sanity.py checks
them: an edge filter, white noise, the map of another scan, and the map of the other logit. The honest one is
IG from the mean control, of which the last two are made.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from scipy import ndimage
from torch import Tensor

SUITE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SUITE))

import heatmap  # noqa: E402
import sanity  # noqa: E402
import utils  # noqa: E402
from ig import integrated_gradients  # noqa: E402
from methods import BASELINE, METHODS, STEPS, Method  # noqa: E402


def edges(model: Any, volume: Tensor, target: Tensor) -> Tensor:
    """An edge filter of the scan; the network is not asked."""
    filtered = [ndimage.gaussian_gradient_magnitude(scan[0].cpu().numpy(), 1) for scan in volume]
    return torch.stack([torch.from_numpy(scan)[None] for scan in filtered]).to(volume)


def noise(model: Any, volume: Tensor, target: Tensor) -> Tensor:
    """White noise, other at every call."""
    return torch.randn_like(volume)


class AnotherScan:
    """The honest map of the first scan that ever came, whatever scan is asked for."""

    def __init__(self) -> None:
        self.first: Tensor | None = None

    def __call__(self, model: Any, volume: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Like `integrated_gradients`."""
        self.first = volume[:1].clone() if self.first is None else self.first
        return integrated_gradients(model, self.first.repeat(len(volume), 1, 1, 1, 1), target, **options)


def other_logit(model: Any, volume: Tensor, target: Tensor, **options: Any) -> Tensor:
    """What speaks for the other class."""
    return integrated_gradients(model, volume, 1 - target, **options)


def impostors() -> dict[str, Method]:
    """The methods, by name."""
    options, needs = (STEPS, BASELINE), ("baseline",)
    return {
        "EdgeFilter": Method(edges),
        "WhiteNoise": Method(noise),
        "AnotherScan": Method(AnotherScan(), options, needs),
        "OtherLogit": Method(other_logit, options, needs),
    }


def check(modelpath: Path, maps: Path, explained: list[str], checked: list[str]) -> None:
    """Make the maps of the impostors and of the honest method, and check them; into `maps`."""
    METHODS.update(impostors())
    names = ["IG", *impostors()]
    where = ["--modelpath", str(modelpath)]
    statuses = [
        heatmap.main(
            [*where, "--method", *names, "--baseline", "controls", "--outpath", str(maps), *explained]
        ),
        sanity.main([*where, "--maps", str(maps), *checked]),
    ]
    if any(statuses):
        raise SystemExit(max(statuses))


def main(argv: list[str] | None = None) -> int:
    """Check the impostors on a run; print what is said of them."""
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("--modelpath", type=Path, required=True, metavar="DIR", help="output of train_cv.py")
    parser.add_argument("--mask", type=Path, required=True, metavar="NIFTI", help="the brain")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        checked = ["--mask", str(args.mask), "--scans-per-fold", "2", "--orders"]
        check(args.modelpath, Path(folder), ["--steps", "50"], checked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
