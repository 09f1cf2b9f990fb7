"""Small networks, volumes and arguments that the tests of the explanation methods share."""

from math import prod
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import models
from models import CNN3d


class Case(NamedTuple):
    """Kernel and pool of each block, and a grid that is not a cube and not divisible by the pools."""

    blocks: tuple[tuple[int, int], ...]
    grid: tuple[int, int, int]


# The first blocks of each family, and a third block where a small grid allows one.
CASES = {
    "A two blocks": Case(((7, 2), (5, 2)), (20, 25, 27)),
    "A three blocks": Case(((5, 2), (3, 2), (3, 2)), (33, 35, 32)),
    "B": Case(((3, 2), (3, 2), (3, 2)), (30, 34, 31)),
    "C": Case(((5, 3), (5, 2)), (23, 34, 29)),
    "D": Case(((7, 3), (7, 3)), (33, 34, 36)),
    "one block": Case(((5, 2),), (9, 12, 10)),
}


over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# Networks and volumes ----------------------------------------------------------------------------


def assemble(
    blocks: tuple[tuple[int, int], ...], grid: tuple[int, ...], width: int = 3, hidden: int = 8
) -> CNN3d:
    """A network with the layers of the published ones, float64, in evaluation mode."""
    layers: list[nn.Module] = []
    channels, edges = 1, list(grid)
    for kernel, pool in blocks:
        layers += [nn.Conv3d(channels, width, kernel), nn.BatchNorm3d(width), nn.ReLU(), nn.MaxPool3d(pool)]
        channels, edges = width, [(edge - kernel + 1) // pool for edge in edges]
    classifier = nn.Sequential(
        nn.Linear(width * prod(edges), hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, 2)
    )
    return CNN3d(nn.Sequential(*layers), classifier).double().eval()


@torch.no_grad()
def dress(model: CNN3d, volume: Tensor) -> CNN3d:
    """Give a network the look of a trained one: signals alive, relus half shut, no BatchNorm default left.

    Every third factor of BatchNorm is negative: there, the pool picks what is smallest before it.
    """
    values = volume
    for conv, norm, relu, pool in model.blocks():
        before = conv(values)
        # zero mean is where a trained BatchNorm would put it; the noise keeps it from being just there
        norm.running_mean.copy_(before.mean((0, 2, 3, 4)) + torch.empty_like(norm.bias).normal_(0, 0.1))
        norm.running_var.uniform_(0.2, 2)
        factor = torch.sqrt(norm.running_var) / before.std((0, 2, 3, 4))
        conv.weight.mul_(factor.view(-1, 1, 1, 1, 1))
        conv.bias.mul_(factor)
        norm.running_mean.mul_(factor)
        norm.weight.uniform_(0.5, 1.5)
        norm.weight[::3] *= -1
        norm.bias.normal_(-0.8, 0.3)  # below zero, since the pool picks what is large
        values = pool(relu(norm(conv(values))))
    return model


def random_network(case: Case, seed: int = 0, width: int = 3) -> CNN3d:
    """A network with random weights and BatchNorm, float64, in evaluation mode."""
    torch.manual_seed(seed)
    return dress(assemble(case.blocks, case.grid, width), random_volume(case, batch=2, seed=seed + 100))


def random_volume(case: Case, batch: int = 1, seed: int = 1) -> Tensor:
    """Scans in [0, 1], float64, with a slab of background like a scan's empty border.

    The slab fills whole windows of the first pool, whose voxels then tie exactly. It is thinner than
    what a second pool sees: there, ties would be broken by rounding, and no reference is right.
    """
    kernel, pool = case.blocks[0]
    generator = torch.Generator().manual_seed(seed)
    volume = torch.rand(batch, 1, *case.grid, generator=generator, dtype=torch.float64)
    if len(case.blocks) > 1:
        volume[:, :, : kernel + pool] = 0
    return volume


def head_in_zeros(case: Case, batch: int = 1) -> Tensor:
    """Scans with zeros on all six sides, another width on each, some wider than a kernel."""
    volume = torch.zeros_like(random_volume(case, batch))
    x, y, z = case.grid
    volume[:, :, x // 3 : -1, 2 : -y // 3, z // 5 : -3] = 1
    return volume * random_volume(case, batch, seed=3).clamp(min=0.01)


def smallest_network(family: str, seed: int = 0) -> tuple[CNN3d, Tensor]:
    """A published family, two filters wide, on the smallest grid it takes, and a scan; float32."""
    edge = models.smallest_edge(family)
    grid = (edge, edge + 1, edge + 2)
    torch.manual_seed(seed)
    volume = torch.rand(1, 1, *grid)
    model = models.build_model(f"model{family}2", grid).eval()
    dress(model, volume)
    with torch.no_grad():
        for layers in model.blocks():  # two units are left at the end: keep them open, the gradient too
            layers.norm.bias.add_(0.8)
        for linear in model.linears():
            linear.weight.abs_()
    return model, volume


def mixed_targets(batch: int) -> Tensor:
    """Logits to explain, not the same for all scans of a batch: 1, 0, 1, ..."""
    return (torch.arange(batch) + 1) % 2


def example(case: Case, batch: int = 2) -> tuple[CNN3d, Tensor, Tensor]:
    """A network, scans and their targets."""
    return random_network(case), random_volume(case, batch), mixed_targets(batch)


def plain_norms(model: CNN3d) -> CNN3d:
    """Make every BatchNorm the identity, to the last bit or two."""
    for layers in model.blocks():
        layers.norm.running_var.fill_(1 - layers.norm.eps)
    return model


def network_by_hand() -> tuple[CNN3d, Tensor]:
    """One block, three filters, three hidden units: small enough for pencil and paper.

    Only the diagonal voxels v = (v000, v111, v222) = (1, 3, 2) of the 3x3x3 scan and the taps
    (w000, w111) of the 2x2x2 kernels are not zero, so only outputs 000 and 111 of the 2x2x2 the pool
    sees are not zero before the bias:

        filter    w000 w111 bias   out000          out111           BatchNorm    pooled
        f0          1    3   -2    1 + 9 - 2 = 8   3 + 6 - 2 = 7    / 2          4 at 000
        f1          2   -1    0    2 - 3     = -1  6 - 2     = 4    + 1          5 at 111
        f2         -1    1    0    -1 + 3    = 2   -3 + 2    = -1   * -2, + 1    3 at 111

        h0 = f0 - f1 + 2 f2 + 1 = 6     h1 = -f0 + 1 = -3, shut     h2 = f1 = 5
        logit 1 = 2 h0 + 4 h1 - h2 + 1 = 8
    """
    model = plain_norms(assemble(((2, 2),), (3, 3, 3), width=3, hidden=3))
    conv, norm, _, _ = model.blocks()[0]
    hidden, output = model.linears()
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, 0, 0, 0, 0] = torch.tensor([1.0, 2, -1])
        conv.weight[:, 0, 1, 1, 1] = torch.tensor([3.0, -1, 1])
        conv.bias.copy_(torch.tensor([-2.0, 0, 0]))
        norm.weight.copy_(torch.tensor([0.5, 1, -2]))
        norm.bias.copy_(torch.tensor([0.0, 1, 1]))
        hidden.weight.copy_(torch.tensor([[1.0, -1, 2], [-1, 0, 0], [0, 1, 0]]))
        hidden.bias.copy_(torch.tensor([1.0, 1, 0]))
        output.weight.copy_(torch.tensor([[0.0, 0, 1], [2, 4, -1]]))
        output.bias.copy_(torch.tensor([0.0, 1]))
    return model, on_diagonal(1, 3, 2)


def on_diagonal(*values: float) -> Tensor:
    """A scan (1, 1, 3, 3, 3) of zeros but for its diagonal."""
    volume = torch.zeros(1, 1, 3, 3, 3, dtype=torch.float64)
    volume.view(27)[::13] = torch.tensor(values, dtype=torch.float64)
    return volume


# Comparison --------------------------------------------------------------------------------------


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two maps, per scan relative to the expected map's largest value."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    largest = expected.flatten(1).abs().amax(1)
    assert (largest > 0).all(), "a map of zeros shows nothing"
    relative = float(((found - expected).flatten(1).abs().amax(1) / largest).max())
    print(f"largest difference, relative to the map's largest value: {relative:.1e}")
    return relative


def check_nearly_equal(found: Tensor, expected: Tensor) -> None:
    """Two float32 maps agree to rounding nearly everywhere, and as a whole.

    Where the two largest voxels of a window differ by rounding, another one may be the maximum. That moves a
    voxel's gradient, or all that a late window sees. Few are so close, and not the same on every processor.
    """
    assert (found.shape, found.dtype) == (expected.shape, torch.float32)
    largest = expected.abs().max()
    assert largest > 0
    assert ((found - expected).abs() < 1e-4 * largest).double().mean() > 0.95
    assert (found - expected).norm() < 0.1 * expected.norm()


# Arguments -------------------------------------------------------------------------------------

# name: what a method must refuse, as changes of good arguments of one scan on an 8x8x8 grid
BAD_ARGUMENTS: dict[str, dict[str, object]] = {
    "no model": {"model": nn.Linear(3, 2)},
    "no batch axis": {"volume": torch.rand(1, 8, 8, 8)},
    "two channels": {"volume": torch.rand(1, 2, 8, 8, 8)},
    "integer volume": {"volume": torch.ones(1, 1, 8, 8, 8, dtype=torch.int64)},
    "target 2": {"target": torch.tensor([2])},
    "target -1": {"target": torch.tensor([-1])},
    "int32 target": {"target": torch.tensor([1], dtype=torch.int32)},
    "float target": {"target": torch.tensor([1.0])},
    "too many targets": {"target": torch.tensor([1, 0])},
    "target without a batch": {"target": torch.tensor(1)},
    "target per class": {"target": torch.tensor([[0, 1]])},
}


over_bad_arguments = pytest.mark.parametrize("changes", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)


def arguments(**changes: object) -> dict[str, object]:
    """Good arguments for any method, but for the given changes."""
    model = assemble(((3, 2),), (8, 8, 8)).float()
    return {"model": model, "volume": torch.rand(1, 1, 8, 8, 8), "target": torch.tensor([1])} | changes
