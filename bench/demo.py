"""Print what the demo shows: the test metrics, how the maps fare against the planted truth, the pictures.

    python3 bench/demo.py --path demo

Hit rate: the share of the k largest voxels of |map_all| inside the brain mask that lie in the planted
truth, k the truth's voxel count. A random map's is truth / mask. Beside it the same after a Gaussian of
8 mm FWHM, on |map_all|, and on the signed map, where neighbours of opposite sign cancel.
"""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nilearn.image import smooth_img

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import metrics
import utils

FWHM = 8  # mm


def hit_rate(image: nib.Nifti1Image, truth: np.ndarray, mask: np.ndarray) -> float:
    """Share of the k largest voxels of |image| inside `mask` that lie in `truth`, k = truth's size."""
    magnitude = np.where(mask, np.abs(image.get_fdata()), -1).ravel()
    k = int((truth & mask).sum())
    return float(truth.ravel()[np.argpartition(magnitude, -k)[-k:]].mean())


def map_row(folder: Path, truth: np.ndarray, mask: np.ndarray) -> dict[str, float | str]:
    """One method's hit rates and the residuals of its maps' sums."""
    image = nib.Nifti1Image.from_filename(folder / "map_all.nii.gz")
    magnitude = nib.Nifti1Image(np.abs(image.get_fdata()), image.affine)
    residual = pd.read_csv(folder / "subjects.csv")["residual"]
    return {
        "method": folder.name,
        "hit rate": hit_rate(image, truth, mask),
        f"|map| smoothed {FWHM} mm": hit_rate(smooth_img(magnitude, FWHM), truth, mask),
        f"map smoothed {FWHM} mm": hit_rate(smooth_img(image, FWHM), truth, mask),
        "median residual": residual.median(),
        "worst residual": residual.max(),
    }


@utils.command
def main(argv: list[str] | None = None) -> int:
    """Read the demo's outputs and print them."""
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument(
        "--path", type=Path, default=Path("demo"), metavar="DIR", help="where make demo wrote"
    )
    demo = parser.parse_args(argv).path
    truth, mask = (utils.load_map(demo / "cohort" / f"{name}.nii.gz") > 0 for name in ("truth", "mask"))
    folders = sorted(path.parent for path in (demo / "heatmaps").glob("*/map_all.nii.gz"))
    table = pd.DataFrame([map_row(folder, truth, mask) for folder in folders])
    print()
    print(metrics.summary(pd.read_csv(demo / "models" / "metrics.csv")))
    print(
        f"maps against the planted truth; a random map's hit rate is {(truth & mask).sum() / mask.sum():.4f}:"
    )
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print("pictures:")
    for path in [demo / "models" / "training.png", *(folder / "map_all.png" for folder in folders)]:
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
