"""explaining.py: which logit is explained, what a map should sum to, and the mean of many maps."""

import math
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from networks import CASES, random_network, random_volume
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import explaining
from explaining import Explainer, MeanMaps, Progress
from internals import process
from internals.errors import InputError
from internals.sharing import Share
from methods import METHODS, Method

CASE = CASES["one block"]
N = 5  # scans
MODEL, SCANS = random_network(CASE), random_volume(CASE, batch=N)
with torch.no_grad():  # both answers are given
    rise = (MODEL(SCANS) @ torch.tensor([-1.0, 1]).double()).sort().values
    MODEL.linears()[1].bias[1] -= rise[1:3].mean()
LABELS = torch.tensor([0, 1, 1, 0, 1])
BASELINE = random_volume(CASE, seed=7)


def weighted(model, volume: Tensor, target: Tensor) -> Tensor:
    """A map that tells scans and targets apart."""
    return (volume - 0.4) * (1 + target).view(-1, 1, 1, 1, 1)


def logits(volume: Tensor) -> np.ndarray:
    """Logits (B, 2), one scan at a time."""
    with torch.no_grad():
        return torch.cat([MODEL(scan[None]) for scan in volume]).numpy()


SEEDS = [3, 1, 4, 1, 5]


def explainer_of(method: Method, baseline: Tensor | None = None, rule: str = "label", **options) -> Explainer:
    return Explainer(MODEL, method, options, {"baseline": baseline, "voxel_sizes": (1, 1, 1)}, rule)


def explain(*args, **options) -> tuple[Tensor, pd.DataFrame]:
    with torch.no_grad():
        return explainer_of(*args, **options).explain(SCANS, LABELS, MODEL(SCANS), SEEDS)


@pytest.mark.parametrize("rule", explaining.TARGETS)
def test_target(rule):
    answers = logits(SCANS)
    predicted = answers.argmax(1)
    assert 0 < predicted.sum() < N  # else the rules could not be told apart
    assert predicted.tolist() != LABELS.tolist()
    rules = {"label": LABELS.numpy(), "predicted": predicted, "0": np.zeros(N, int), "1": np.ones(N, int)}
    wanted, (maps, found) = rules[rule], explain(Method(weighted), rule=rule)
    assert list(found.columns) == ["predicted", "target", "prob_target", "sum", "residual", "zero"]
    assert found["predicted"].tolist() == predicted.tolist()
    assert found["target"].tolist() == wanted.tolist()
    assert torch.equal(maps, weighted(MODEL, SCANS, torch.tensor(wanted)))
    probability = np.exp(answers) / np.exp(answers).sum(1, keepdims=True)
    # float64 from here on; one scan at once there, five here
    assert np.allclose(found["prob_target"], probability[np.arange(N), wanted], rtol=1e-10)
    assert np.allclose(found["sum"], [values.sum() for values in maps.numpy()], rtol=1e-10)


@pytest.mark.parametrize("baseline", [None, BASELINE])
def test_residual_is_relative_to_what_the_map_should_sum_to(baseline):
    """The sum by the method's own rule, of the explained logit of the scan and that of the baseline."""
    given = []

    def takes(model, volume, target, baseline):
        given.append(baseline)
        return weighted(model, volume, target)

    method = Method(takes, needs=("baseline",), map_sum=lambda logit, origin: 2 * logit - 3 * origin)
    maps, found = explain(method, baseline)
    assert given == [baseline]
    picked = np.arange(N), LABELS.numpy()
    origin = logits(torch.zeros_like(BASELINE) if baseline is None else baseline)
    wanted = (2 * logits(SCANS) - 3 * origin)[picked]
    sums = maps.numpy().sum((1, 2, 3, 4))
    assert np.allclose(found["residual"], abs(sums - wanted) / abs(wanted), rtol=1e-9)  # float64


@pytest.mark.parametrize("name", METHODS)
def test_real_methods_keep_their_promise(name):
    """LRP up to epsilon and what background absorbs, IG up to its quadrature: of a few percent here."""
    defaults = METHODS[name].chosen({"size": 5.0, "stride": 4.0})
    explainer = Explainer(
        MODEL, METHODS[name], defaults, {"baseline": None, "voxel_sizes": (1, 1, 1)}, "label"
    )
    residual = explainer.explain(SCANS, LABELS, torch.from_numpy(logits(SCANS)), SEEDS)[1]["residual"]
    assert (
        residual.median() < 0.05 if name in ("LRP", "IG") else residual.isna().all()
    )  # others' sums mean nothing


def test_maps_that_are_zero_everywhere_are_marked():
    """One voxel is enough not to be; minus zero is zero."""

    def silent(model, volume, target):
        maps = torch.zeros_like(volume)
        maps[1], maps[2, 0, 3, 4, 5] = -0.0, 1e-30
        return maps

    assert explain(Method(silent))[1]["zero"].tolist() == [1, 1, 0, 1, 1]


KEPT: list[np.ndarray] = []


def keep(name: str, number: int, values: np.ndarray) -> None:
    assert (name, number) == ("toy", len(KEPT))
    KEPT.append(values.copy())


def explain_all(function, batch: int = 2) -> tuple[np.ndarray, pd.DataFrame]:
    """Explain every scan; the maps are added to KEPT, in turn."""
    KEPT.clear()
    loader = DataLoader(TensorDataset(SCANS, LABELS), batch_size=batch)
    toys, progress = {"toy": explainer_of(Method(function))}, {"toy": Progress()}
    explaining.explain_scans(toys, loader, SEEDS, keep, progress, lambda: None, "fold 3")
    return progress["toy"].means.mean(), progress["toy"].found


@pytest.mark.parametrize("batch", [1, 2, N])
def test_many_scans_give_their_mean_and_a_row_each(batch):
    mean, found = explain_all(weighted, batch)
    maps = weighted(MODEL, SCANS, LABELS)[:, 0].numpy()
    assert np.array_equal(KEPT, maps)
    assert (mean.shape, mean.dtype) == (CASE.grid, np.float64)
    assert np.allclose(mean, maps.mean(0), rtol=1e-12, atol=1e-15)  # float64 sums in another order
    assert found.index.tolist() == list(range(N))
    assert np.allclose(found, explain(Method(weighted))[1], rtol=1e-10, equal_nan=True)


def test_mean_is_taken_in_float64():
    """In float32, 2**24 + 1 is 2**24."""
    values = iter([2.0**24, 1.0, 1.0, 1.0, 1.0])
    mean, _ = explain_all(lambda _, volume, __: torch.full_like(volume, next(values)).float(), batch=1)
    assert (mean == (2**24 + 4) / N).all()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_maps_that_are_not_finite_are_a_fault_not_a_result(value):
    def broken(model, volume, target):
        maps = torch.ones_like(volume)
        maps[-1, 0, 0, 0, 0] = value
        return maps

    with pytest.raises(FloatingPointError, match="fold 3: a map of toy has values that are not finite"):
        explain_all(broken)
    assert KEPT == []


def test_several_methods_share_one_pass_and_groups_have_means_of_their_own():
    """Every scan is read and classified once; each method gets what it needs, and nothing else."""
    passes, given = [], []

    def noted(model, volume, target, seeds, voxel_sizes):
        given.append((list(seeds), voxel_sizes))
        return volume * torch.tensor(seeds).view(-1, 1, 1, 1, 1)

    hook = MODEL.register_forward_hook(lambda model, inputs, output: passes.append(len(output)))
    explainers = {
        "weighted": explainer_of(Method(weighted)),
        "noted": explainer_of(Method(noted, needs=("seeds", "voxel_sizes"))),
    }
    loader = DataLoader(TensorDataset(SCANS, LABELS), batch_size=2)
    try:
        progress = {name: Progress() for name in explainers}
        explaining.explain_scans(explainers, loader, SEEDS, lambda *_: None, progress, list, "fold 0")
    finally:
        hook.remove()
    assert passes == [2, 2, 1]
    assert given == [([3, 1], (1, 1, 1)), ([4, 1], (1, 1, 1)), ([5], (1, 1, 1))]
    expected = {"weighted": weighted(MODEL, SCANS, LABELS), "noted": noted(MODEL, SCANS, LABELS, SEEDS, 1)}
    for name, found in progress.items():
        means, rows = found.means, found.found
        maps = expected[name][:, 0].numpy()
        assert np.allclose(rows["sum"], maps.sum((1, 2, 3)), rtol=1e-12)
        assert means.counts == {0: 2, 1: 3}
        for labels, chosen in (((), range(N)), ((0,), (0, 3)), ((1,), (1, 2, 4))):
            assert np.allclose(means.mean(*labels), maps[list(chosen)].mean(0), rtol=1e-12, atol=1e-15)


# Shares, and going on ----------------------------------------------------------------------------


def spread_maps(count: int) -> list[np.ndarray]:
    """Maps whose values cancel and differ by forty orders of magnitude, as float32."""
    random = np.random.default_rng(0)
    values = random.standard_normal((count, 2, 3, 4)) * 10.0 ** random.integers(-20, 20, (count, 2, 3, 4))
    values[1::2] = -values[::2] * (1 + 1e-6 * random.standard_normal((count // 2, 2, 3, 4)))
    return list(values.astype(np.float32))


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_means_do_not_depend_on_order_or_shares(of):
    """They are the exact sums, rounded; a float64 sum in another order is not."""
    maps, labels = spread_maps(40), [n % 3 % 2 for n in range(40)]
    parts = []
    for number in range(1, of + 1):
        parts.append(MeanMaps())
        for n in Share(number, of).deal(range(40)):
            parts[-1].add(maps[n], labels[n])
    merged = MeanMaps()
    for part in reversed(parts):
        merged.merge(part)
    for chosen in ((), (0,), (1,)):
        summed = [values for values, label in zip(maps, labels, strict=True) if label in (chosen or (0, 1))]
        exact = np.array([math.fsum(v) for v in np.stack(summed).reshape(len(summed), -1).T.tolist()])
        assert np.array_equal(merged.mean(*chosen).ravel(), exact / len(summed))
    backwards = np.sum(maps[::-1], axis=0, dtype=np.float64)
    assert (np.sum(maps, axis=0, dtype=np.float64) != backwards).any()


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("done", [0, 1, 2, 4, N])
def test_saved_progress_is_gone_on_from(tmp_path, done, batch):
    """With another batch, too; and a method that is ahead of the others is not asked again."""
    toys = {name: explainer_of(Method(weighted)) for name in ("behind", "ahead")}

    def explain_from(begin: int, scans: slice, progress: dict[str, Progress]) -> list[tuple[str, int]]:
        kept: list[tuple[str, int]] = []
        loader = DataLoader(TensorDataset(SCANS[begin : scans.stop], LABELS[begin : scans.stop]), batch)
        seeds = SEEDS[: scans.stop]
        explaining.explain_scans(
            toys, loader, seeds, lambda who, n, _: kept.append((who, n)), progress, lambda: None, ""
        )
        return kept

    whole = {name: Progress() for name in toys}
    assert len(explain_from(0, slice(N), whole)) == 2 * N
    first, further = ({name: Progress() for name in toys} for _ in range(2))
    explain_from(0, slice(done), first)
    explain_from(0, slice(min(done + 1, N)), further)  # which may end within a batch
    first["behind"].save(tmp_path / "a.npz")
    again = {"behind": Progress.load(tmp_path / "a.npz", CASE.grid, N), "ahead": further["ahead"]}
    left = [("ahead", n) for n in range(done + 1, N)] + [("behind", n) for n in range(done, N)]
    assert sorted(explain_from(done, slice(N), again)) == left
    for name, found in again.items():
        assert np.array_equal(found.means.mean(), whole[name].means.mean())
        pd.testing.assert_frame_equal(found.found, whole[name].found, rtol=1e-12)


def test_damaged_progress_is_named(tmp_path):
    progress = Progress()
    progress.means.add(np.ones((2, 3, 4), np.float32), 1)
    progress.found = pd.DataFrame([[0] * 6], columns=explaining.FOUND)
    file = tmp_path / "sums_f0.npz"
    progress.save(file)
    assert Progress.load(file, (2, 3, 4), 1).means.counts == {1: 1}
    whole = file.read_bytes()
    for damaged in (whole[:100], b"", b"x" * 1000, whole[:200] + b"x" * 50 + whole[250:]):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"sums_f0\.npz: is damaged .*; remove it to explain"):
            Progress.load(file, (2, 3, 4), 1)
    file.write_bytes(whole)
    with pytest.raises(InputError, match="of other maps"):
        Progress.load(file, (2, 3, 5), 1)
    progress.means.counts[1] = 2
    progress.save(file)
    with pytest.raises(InputError, match="of other maps"):
        Progress.load(file, (2, 3, 4), 1)


@pytest.mark.parametrize(("moment", "expected"), [("reading the second", 4), ("keeping the third", 4)])
def test_a_signal_to_stop_waits_for_the_batch_and_saves_it(moment, expected):
    saved, progress = [], {"toy": Progress()}
    toys = {"toy": explainer_of(Method(weighted))}

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    def keep(who: str, number: int, values: np.ndarray) -> None:
        if moment == "keeping the third" and number == 2:
            stop()

    def collate(items: list) -> list:
        if moment == "reading the second" and len(progress["toy"].found) == 2:
            stop()
        return torch.utils.data.default_collate(items)

    def save() -> None:
        saved.append(len(progress["toy"].found))

    @process.command("")
    def main(argv: list[str] | None = None) -> int:
        loader = DataLoader(TensorDataset(SCANS, LABELS), 2, collate_fn=collate)
        explaining.explain_scans(toys, loader, SEEDS, keep, progress, save, "")
        return 0

    assert main() == 138
    assert saved == [expected]
