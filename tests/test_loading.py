"""loading.py: threads that read ahead for a GPU give what PyTorch's loader gives."""

import pytest
import torch
from cohorts import tiny_cohort
from test_caches import GPU, opened

import dataset
from dataset import ScanDataset
from internals import caches
from internals.errors import InputError
from internals.loading import ReadAhead


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
@pytest.mark.parametrize("seed", [None, 3])
def test_threads_that_read_ahead_give_what_a_loader_gives(tmp_path, cache, seed):
    """The same batches in the same order, epoch after epoch, whatever the number of threads."""
    scans = opened(tiny_cohort(tmp_path), cache, tmp_path / "cache")
    plain = scans.loader([5, 0, 3, 2, 1], 2, workers=0, seed=seed)
    ahead = scans.loader([5, 0, 3, 2, 1], 2, workers=3, seed=seed, device=GPU)
    assert isinstance(ahead, ReadAhead)
    assert ahead.device == GPU
    ahead.device = caches.CPU  # there may be no GPU to pin memory for
    assert len(ahead) == len(plain) == 3
    assert len(ahead.dataset) == len(plain.dataset) == 5  # type: ignore[arg-type]
    for _ in range(3):
        for (volume, label), (wanted, right) in zip(ahead, plain, strict=True):
            assert torch.equal(volume, wanted)
            assert torch.equal(label, right)
            assert label.dtype == torch.int64
    if seed is not None:  # what a resumed run restores
        assert torch.equal(ahead.generator.get_state(), plain.generator.get_state())


def test_threads_that_read_ahead_hand_on_what_goes_wrong(tmp_path):
    scans = ScanDataset(dataset.read_csv(tiny_cohort(tmp_path)))
    (tmp_path / "3.nii").unlink()
    ahead = scans.loader(list(range(6)), 2, workers=2, device=GPU)
    ahead.device = caches.CPU
    batches = iter(ahead)
    next(batches)
    with pytest.raises(InputError, match=r"3\.nii"):
        next(batches)
