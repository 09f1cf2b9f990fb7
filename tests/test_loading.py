"""loading.py: batches that threads read ahead are those of a DataLoader."""

import pytest
import torch
from cohorts import cohort_of, tiny_cohort

import dataset
from dataset import ScanDataset
from internals.caches import Cache
from internals.errors import InputError
from internals.loading import Loader, ReadAhead

GPU = torch.device("cuda", 0)


def read_ahead(scans: ScanDataset, indices: list[int], workers: int, seed: int | None = None) -> Loader:
    ahead = scans.loader(indices, 2, workers, seed, GPU)
    assert isinstance(ahead, ReadAhead)
    assert ahead.device == GPU
    ahead.device = dataset.CPU  # there may be no GPU to pin memory for
    return ahead


@pytest.mark.parametrize("kind", ["ram", "disk", "none"])
@pytest.mark.parametrize("seed", [None, 3])
def test_threads_that_read_ahead_give_what_a_loader_gives(tmp_path, kind, seed):
    """The same batches in the same order, epoch after epoch, whatever the number of threads."""
    scans = cohort_of(tiny_cohort(tmp_path)).open_scans(Cache(kind, tmp_path / "cache"))
    indices = [5, 0, 3, 2, 1]
    plain = scans.loader(indices, 2, workers=0, seed=seed)
    ahead = read_ahead(scans, indices, 3, seed)
    assert len(ahead) == len(plain) == 3
    assert len(ahead.dataset) == len(plain.dataset) == 5  # type: ignore[arg-type]
    epochs = []
    for _ in range(3):
        found = list(ahead)
        for (volume, label), (wanted, right) in zip(found, plain, strict=True):
            assert torch.equal(volume, wanted)
            assert torch.equal(label, right)
            assert label.dtype == torch.int64
        epochs.append(torch.cat([volume for volume, _ in found]))
    in_order = torch.stack([scans[i][0] for i in indices])
    assert all(torch.equal(volumes, in_order) for volumes in epochs) == (seed is None)
    if seed is not None:  # what a resumed run restores
        assert torch.equal(ahead.generator.get_state(), plain.generator.get_state())


def test_threads_that_read_ahead_hand_on_what_goes_wrong(tmp_path):
    scans = ScanDataset(cohort_of(tiny_cohort(tmp_path)).table)
    (tmp_path / "3.nii").unlink()
    batches = iter(read_ahead(scans, list(range(6)), 2))
    next(batches)
    with pytest.raises(InputError, match=r"3\.nii"):
        next(batches)
