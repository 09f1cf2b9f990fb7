"""explaining.py: which logit is explained, what a map should sum to, and the mean of many maps."""

import numpy as np
import pandas as pd
import pytest
import torch
from networks import CASES, random_network, random_volume
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import explaining
from explaining import Explainer
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


def explain(
    method: Method, rule: str = "label", baseline: Tensor | None = None
) -> tuple[Tensor, pd.DataFrame]:
    return Explainer(MODEL, method, {}, baseline, rule).explain(SCANS, LABELS)


@pytest.mark.parametrize("rule", explaining.TARGETS)
def test_target(rule):
    answers = logits(SCANS)
    predicted = answers.argmax(1)
    assert 0 < predicted.sum() < N  # else the rules could not be told apart
    assert predicted.tolist() != LABELS.tolist()
    wanted = {"label": LABELS.numpy(), "predicted": predicted, "0": np.zeros(N, int), "1": np.ones(N, int)}[
        rule
    ]
    maps, found = explain(Method(weighted), rule)
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

    method = Method(takes, takes_baseline=True, map_sum=lambda logit, origin: 2 * logit - 3 * origin)
    maps, found = explain(method, baseline=baseline)
    assert given == [baseline]
    picked = np.arange(N), LABELS.numpy()
    origin = logits(torch.zeros_like(BASELINE) if baseline is None else baseline)
    wanted = (2 * logits(SCANS) - 3 * origin)[picked]
    sums = maps.numpy().sum((1, 2, 3, 4))
    assert np.allclose(found["residual"], abs(sums - wanted) / abs(wanted), rtol=1e-9)  # float64


def test_methods_whose_sum_means_nothing_have_no_residual():
    assert explain(Method(weighted))[1]["residual"].isna().all()
    assert explain(METHODS["GGC"])[1]["residual"].isna().all()


@pytest.mark.parametrize("name", ["LRP", "IG"])
def test_real_methods_keep_their_promise(name):
    """LRP up to epsilon and what background absorbs, IG up to its quadrature: of a few percent here."""
    method = METHODS[name]
    options = {option.name: option.default for option in method.options}
    _, found = Explainer(MODEL, method, options, None, "label").explain(SCANS, LABELS)
    wanted = logits(SCANS)[np.arange(N), LABELS]
    if name == "IG":
        wanted = wanted - logits(torch.zeros_like(BASELINE))[0, LABELS]
    assert np.allclose(found["residual"], abs(found["sum"] - wanted) / abs(wanted), rtol=1e-9)
    assert found["residual"].median() < 0.05


def test_maps_that_are_zero_everywhere_are_marked():
    """One voxel is enough not to be; minus zero is zero."""

    def silent(model, volume, target):
        maps = torch.zeros_like(volume)
        maps[1], maps[2, 0, 3, 4, 5] = -0.0, 1e-30
        return maps

    assert explain(Method(silent))[1]["zero"].tolist() == [1, 1, 0, 1, 1]


def test_options_reach_the_function():
    def scaled(model, volume, target, factor):
        return volume * factor

    maps, _ = Explainer(MODEL, Method(scaled), {"factor": 3}, None, "label").explain(SCANS, LABELS)
    assert torch.equal(maps, SCANS * 3)


def loader(batch: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(SCANS, LABELS), batch_size=batch)


@pytest.mark.parametrize("batch", [1, 2, N])
def test_many_scans_give_their_mean_and_a_row_each(batch):
    kept: list[tuple[int, np.ndarray]] = []
    explainer = Explainer(MODEL, Method(weighted), {}, None, "label")
    mean, found = explaining.explain_scans(
        explainer, loader(batch), lambda number, values: kept.append((number, values.copy())), "toy"
    )
    maps = weighted(MODEL, SCANS, LABELS)[:, 0].numpy()
    assert [number for number, _ in kept] == list(range(N))
    assert all(np.array_equal(values, expected) for (_, values), expected in zip(kept, maps, strict=True))
    assert (mean.shape, mean.dtype) == (CASE.grid, np.float64)
    assert np.allclose(mean, maps.mean(0), rtol=1e-12, atol=1e-15)  # float64 sums in another order
    assert found.index.tolist() == list(range(N))
    assert np.allclose(found, explain(Method(weighted))[1], rtol=1e-10, equal_nan=True)


def test_mean_is_taken_in_float64():
    """In float32, 2**24 + 1 is 2**24."""
    values = iter([2.0**24, 1.0, 1.0, 1.0, 1.0])

    def constant(model, volume, target):
        return torch.full_like(volume, next(values), dtype=torch.float32)

    explainer = Explainer(MODEL, Method(constant), {}, None, "label")
    mean, _ = explaining.explain_scans(explainer, loader(1), lambda *_: None, "toy")
    assert (mean == (2**24 + 4) / N).all()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_maps_that_are_not_finite_are_a_fault_not_a_result(value):
    def broken(model, volume, target):
        maps = torch.ones_like(volume)
        maps[-1, 0, 0, 0, 0] = value
        return maps

    kept: list[int] = []
    explainer = Explainer(MODEL, Method(broken), {}, None, "label")
    with pytest.raises(FloatingPointError, match="toy fold 3: a map has values that are not finite"):
        explaining.explain_scans(explainer, loader(), lambda number, _: kept.append(number), "toy fold 3")
    assert kept == []
