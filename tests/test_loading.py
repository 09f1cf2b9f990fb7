"""loading.py: batches that threads read ahead are those of a DataLoader."""

import pytest
import torch
from cohorts import cohort_of, tiny_cohort

import dataset
from dataset import ScanDataset
from internals.caches import Cache
from internals.errors import InputError
from internals.loading import ReadAhead


def read_ahead(scans: ScanDataset, indices: list[int], workers: int, seed: int | None = None) -> ReadAhead:
    ahead = scans.loader(indices, 2, workers, seed, torch.device("cuda", 0))
    assert isinstance(ahead, ReadAhead)
    assert ahead.device == torch.device("cuda", 0)
    ahead.device = dataset.CPU  # there may be no GPU to pin memory for
    return ahead


@pytest.mark.parametrize("kind", ["ram", "disk", "none"])
@pytest.mark.parametrize("seed", [None, 3])
def test_threads_that_read_ahead_give_what_a_loader_gives(tmp_path, kind, seed):
    scans = cohort_of(tiny_cohort(tmp_path)).open_scans(Cache(kind, tmp_path / "cache"))
    indices = [5, 0, 3, 2, 1]
    plain, ahead = scans.loader(indices, 2, workers=0, seed=seed), read_ahead(scans, indices, 3, seed)
    assert len(ahead) == 3
    assert len(ahead.dataset) == 5
    in_order = torch.stack([scans[i][0] for i in indices])
    for _ in range(3):  # epochs
        found, wanted = (
            [torch.cat(part) for part in zip(*batches, strict=True)] for batches in (ahead, plain)
        )
        assert all(map(torch.equal, found, wanted))
        assert found[1].dtype == torch.int64
        assert torch.equal(found[0], in_order) == (seed is None)
    if seed is not None:  # what a resumed run restores
        assert torch.equal(ahead.generator.get_state(), plain.generator.get_state())


def test_threads_that_read_ahead_hand_on_what_goes_wrong(tmp_path):
    scans = ScanDataset(cohort_of(tiny_cohort(tmp_path)).table)
    (tmp_path / "3.nii").unlink()
    batches = iter(read_ahead(scans, list(range(6)), 2))
    next(batches)
    with pytest.raises(InputError, match=r"3\.nii"):
        next(batches)
