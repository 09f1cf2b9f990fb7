"""Networks some of whose layers know nothing: weights drawn anew, BatchNorm's statistics estimated again.

How a map changes with them says how far it depends on what the network learned (Adebayo et al. 2018,
arXiv 1810.03292). Binder et al. (2023, arXiv 2211.12486) say what this does not show: a map of noise changes
most of all.
"""

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import utils
from models import CNN3d

# the layers that are drawn anew at each step, of `count` layers from the scan to the logits
ORDERS: dict[str, Callable[[int, int], range]] = {
    "output": lambda step, count: range(count - 1 - step, count),
    "input": lambda step, count: range(step + 1),
    "alone": lambda step, count: range(step, step + 1),
}


def layer_names(depth: int) -> list[str]:
    """The layers of a network of so many blocks, from the scan to the logits: a block is one layer."""
    return [*(f"block {number}" for number in range(depth)), "hidden", "output"]


def steps(depth: int, orders: Sequence[str]) -> Iterator[tuple[str, str, range]]:
    """What is drawn anew in a network of so many blocks: all layers, and every step of some of ORDERS.

    Yields:
        "all" or the order, the layer that the step adds, and all layers that are drawn anew.
    """
    names = layer_names(depth)
    yield "all", "all layers", range(len(names))
    for order, step in itertools.product(orders, range(len(names))):
        layers = ORDERS[order](step, len(names))
        yield order, names[layers[0] if order == "output" else layers[-1]], layers


class Randomizer:
    """Copies of a network with layers drawn anew.

    A layer gets the weights with which training would begin, from a seed of its own: the same ones, whatever
    other layers are drawn. From the first such layer on, BatchNorm gets the mean of its statistics over some
    scans, taken one at a time: what lies before is as it was, and so is what it makes of a scan.

    Args:
        model: the network, in evaluation mode; it is left as found.
        scans: those that the statistics are estimated on, (1, 1, X, Y, Z) each, on the network's device.
    """

    def __init__(self, model: CNN3d, scans: Sequence[Tensor]) -> None:
        self.model = model
        self._inputs = {0: list(scans)}  # of each block

    def randomize(self, layers: Collection[int], seed: int) -> CNN3d:
        """A copy, in evaluation mode, with new weights in some layers, numbered from the scan."""
        result = copy.deepcopy(self.model).cpu()  # where every device's draws are the same
        blocks = result.blocks()
        parts: list[tuple[Any, ...]] = [(block.conv, block.norm) for block in blocks]
        parts += [(linear,) for linear in result.linears()]
        with torch.random.fork_rng(devices=[]):
            for layer in layers:
                torch.default_generator.manual_seed(utils.own_seed(seed, layer))  # no other device's
                for module in parts[layer]:
                    module.reset_parameters()
        result.to(next(self.model.parameters()).device)
        first = min(layers)
        if first < len(blocks):
            rest = CNN3d(nn.Sequential(*list(result.features)[4 * first :]), nn.Sequential())
            with torch.no_grad():
                update_bn(self._block_inputs(first), rest)
        return result.eval()

    def _block_inputs(self, block: int) -> list[Tensor]:
        """What a block of the network itself reads of every scan."""
        if block not in self._inputs:
            before = self.model.features[4 * (block - 1) : 4 * block]
            with torch.no_grad():
                self._inputs[block] = [before(values) for values in self._block_inputs(block - 1)]
        return self._inputs[block]
