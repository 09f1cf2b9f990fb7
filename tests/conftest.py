"""What tests share: how long hypothesis searches, and a cohort, a run and maps that are made once."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import pytest
import torch
from cohorts import MODEL, SHAPE, TRAINED, K, load_volume, quick, write_cohort
from hypothesis import settings

import checking
import classifier_scores
import faithfulness
import figures
import heatmap
import models
import train_cv

settings.register_profile("long", max_examples=10_000)  # of `make fuzz`


@pytest.fixture(scope="session", autouse=True)
def _few_draws() -> Iterator[None]:
    """Fifty bootstrap draws in place of a thousand, for speed; the bootstrap has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_scores, "DRAWS", 50)
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_files() -> Iterator[None]:
    """Two slices in a row of a picture, and .nii.gz that are packed but not compressed, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "CUTS", 2)  # test_figures.py draws them all
        patch.setattr(nib.openers.Opener, "default_compresslevel", 0)
        yield


@pytest.fixture(scope="session")
def csv(tmp_path_factory) -> Path:
    """Twelve scans of eleven subjects and their CSV; read only."""
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="session")
def run(csv, tmp_path_factory) -> Path:
    """A finished run of two folds; read only."""
    folder = tmp_path_factory.mktemp("run") / "models"
    assert train_cv.main(["--path", str(csv), "--outpath", str(folder), *TRAINED]) == 0
    return folder


@pytest.fixture(scope="session")
def lively_run(run, csv, tmp_path_factory) -> Path:
    """The same run, its BatchNorm knowing the scans so that activations are not all zero; read only.

    (After two epochs on eight scans a network this narrow may answer nothing but its last bias.)
    """
    folder = Path(shutil.copytree(run, tmp_path_factory.mktemp("lively") / "models"))
    volumes = torch.cat([load_volume(csv.parent / f"scans/{i:03d}.nii") for i in (0, 1, 2)])
    for fold in range(K):
        torch.manual_seed(fold)
        network = models.build_model(MODEL, SHAPE)
        for block in network.blocks():
            block.norm.momentum = 1.0  # the statistics of the scans that follow, and nothing else
            torch.nn.init.constant_(block.norm.bias, 2.0)
        with torch.no_grad():
            network(volumes)
        torch.save(network.state_dict(), folder / f"state_dict_f{fold}.pth")
    return folder


@pytest.fixture(scope="session")
def maps(lively_run, tmp_path_factory) -> Path:
    """Every method's maps of every scan, one METHOD folder each; read only."""
    folder = tmp_path_factory.mktemp("maps")
    options = ["--method", *heatmap.METHODS, "--modelpath", str(lively_run), "--outpath", str(folder)]
    options += [word for method in heatmap.METHODS for word in quick(method)]
    assert heatmap.main([*options, "--device", "cpu", "--save-subjects"]) == 0
    return folder


@pytest.fixture(scope="module")
def few_points() -> Iterator[None]:
    """Curves of one point between the ends: on these scans a covered scan takes longer than a map."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faithfulness, "SHARES", (1 / 8,))
        for module in (faithfulness, checking):
            patch.setattr(module, "POINTS", (0.0, 1 / 8, 1.0))
        yield


@pytest.fixture
def run_copy(run, tmp_path) -> Path:
    """The finished run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "run copy"))
