"""Layer-wise relevance propagation, beta rule (Bach et al. 2015, doi 10.1371/journal.pone.0130140)."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internals.devices import to_memory_format
from internals.folded import (
    Network,
    at_winners,
    convolve,
    in_slabs,
    support,
    unpool_and_pull,
    with_halo,
)
from models import CLASSES, BlockLayers, CNN3d, check_arguments, evaluation_mode


def lrp(model: CNN3d, volume: Tensor, target: Tensor, beta: float = 0.5, epsilon: float = 1e-6) -> Tensor:
    """Propagate the target logit back to the scan with the beta rule of Bach et al., equation 60.

    As used by Boehle et al. 2019 (doi 10.3389/fnagi.2019.00194): without biases; max pooling is
    winner takes all; BatchNorm, ReLU and dropout pass relevance unchanged. With inputs a >= 0, as
    behind every ReLU, half of the rule's terms vanish; inputs with negatives get all four.

    Args:
        model: the network; evaluated in evaluation mode, left as found.
        volume: (B, 1, X, Y, Z), scans.
        target: int64 (B,), the logit to explain, per scan.
        beta: weight of inhibiting contributions; the exciting ones weigh 1 + beta.
        epsilon: stabiliser of the denominators.

    Returns:
        The relevance, like `volume`, signed; its sum is the target logit up to epsilon and to what
        units without any input (windows of pure background) absorbed.

    Raises:
        ValueError: shapes, dtypes or targets that do not fit.
    """
    check_arguments(model, volume, target)
    with evaluation_mode(model), torch.no_grad():
        network = Network(model, volume.shape[2:], support(volume))
        values, rules = volume[:, :, *network.head], []
        for layers, margin in zip(model.blocks(), network.margins, strict=True):
            rules.append(BlockRule(layers, values, beta, epsilon))
            values = margin.pad(rules[-1].forward())
        hidden, output = model.linears()
        linear = [BetaRule(hidden, values.flatten(1), beta, epsilon)]
        linear.append(BetaRule(output, F.relu(linear[0].forward()), beta, epsilon))
        logits = linear[1].forward()

        relevance = logits * F.one_hot(target, CLASSES)  # (B, 2)
        for rule in reversed(linear):
            relevance = rule.backward(relevance)
        relevance = to_memory_format(relevance.view(values.shape))
        for block, margin in zip(reversed(rules), reversed(network.margins), strict=True):
            relevance = block.backward(margin.crop(relevance))
        result = torch.zeros_like(volume)
        result[:, :, *network.head] = relevance
        return result


class BetaRule:
    """The beta rule for one linear layer and the inputs it read.

    Exciting and inhibiting parts come from one layer with twice the units,
    z = [z+, z-]: with a >= 0, z+ = a * w+ and z- = a * w-. Where a has negative values its positive
    and negative parts become twice the inputs, z+ = a+ * w+ + a- * w- and
    z- = a+ * w- + a- * w+. Either way z+ + z- + bias is the layer's output.
    """

    def __init__(self, layer: nn.Linear | nn.Conv3d, inputs: Tensor, beta: float, epsilon: float) -> None:
        self.bias, self.beta, self.epsilon = cast(Tensor, layer.bias), beta, epsilon
        exciting, inhibiting = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
        self.inputs = inputs
        self.weight = torch.cat([exciting, inhibiting])  # (2n, C, k, k, k) or (2n, C)
        self.signed = bool((inputs < 0).any())
        if self.signed:
            self.inputs = torch.cat([inputs.clamp(min=0), inputs.clamp(max=0)], 1)
            self.weight = torch.cat([self.weight, torch.cat([inhibiting, exciting])], 1)

    def forward(self) -> Tensor:
        """The layer's output; its exciting and inhibiting parts are kept for the way back."""
        self.exciting, self.inhibiting = F.linear(self.inputs, self.weight).chunk(2, 1)
        return self.exciting + self.inhibiting + self.bias

    def backward(self, relevance: Tensor) -> Tensor:
        """Relevance of the layer's outputs -> of its inputs."""
        excited, inhibited = self.exciting > 0, self.inhibiting < 0
        both = excited & inhibited  # a unit with one part alone gets all its relevance through that one
        shares = [
            relevance * torch.where(both, 1 + self.beta, 1.0) / (self.exciting + self.epsilon),
            relevance * torch.where(both, -self.beta, 1.0) / (self.inhibiting - self.epsilon),
        ]
        share = torch.cat([torch.where(excited, shares[0], 0), torch.where(inhibited, shares[1], 0)], 1)
        relevance = self.inputs * self.pull(share)
        if self.signed:
            positive, negative = relevance.chunk(2, 1)
            relevance = positive + negative
        return relevance

    def pull(self, share: Tensor) -> Tensor:
        """From the layer's 2n parts to its inputs, by the transposed weights."""
        return share @ self.weight


class BlockRule(BetaRule):
    """The beta rule for a block's convolution; only the units that win their pool have relevance."""

    def __init__(self, layers: BlockLayers, inputs: Tensor, beta: float, epsilon: float) -> None:
        super().__init__(layers.conv, inputs, beta, epsilon)
        self.layers, self.window = layers, cast(int, layers.pool.kernel_size)
        self.grid = torch.Size(edge - self.weight.shape[2] + 1 for edge in inputs.shape[2:])

    def forward(self) -> Tensor:
        """The block's output (B, n, x, y, z); both parts of the winners are kept."""
        filters = len(self.inputs) * len(self.weight)
        results = in_slabs(self._forward, self.grid, self.window, filters, self.inputs.device)
        self.exciting, self.inhibiting, outputs, self.winners = results
        return outputs

    def _forward(self, rows: slice) -> tuple[Tensor, ...]:
        """Exciting and inhibiting parts of the winners, the block's output, and the winners, of a slab."""
        exciting, inhibiting = convolve(with_halo(self.inputs, rows, self.weight), self.weight).chunk(2, 1)
        values = self.layers.norm(exciting + inhibiting + self.bias.view(-1, 1, 1, 1)).relu_()
        outputs, winners = F.max_pool3d(values, self.window, return_indices=True)
        return at_winners(exciting, winners), at_winners(inhibiting, winners), outputs, winners

    def pull(self, share: Tensor) -> Tensor:
        """From the winners' 2n parts to the convolution's inputs."""
        winners = torch.cat([self.winners, self.winners], 1)
        return unpool_and_pull(share, winners, self.grid, self.weight, self.window)
