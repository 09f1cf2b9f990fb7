"""Layer-wise relevance propagation (Bach et al. 2015, doi 10.1371/journal.pone.0130140): two rules."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internals.devices import to_memory_format
from internals.folded import (
    FoldedBlock,
    FoldedNetwork,
    bounding_box,
    convolve,
    gather_at_maxima,
    pool_in_slabs,
    unpool_and_transpose,
    with_halo,
)
from models import CLASSES, BlockLayers, CNN3d, check_arguments, evaluation_mode


def lrp(
    model: CNN3d,
    volume: Tensor,
    target: Tensor,
    beta: float = 0.5,
    epsilon: float = 1e-6,
    rule: str = "beta",
) -> Tensor:
    """Propagate the target logit back to the scan, layer by layer.

    Max pooling is winner takes all; ReLU and dropout pass relevance unchanged. Rule "beta" is equation 60 of
    Bach et al. as used by Boehle et al. 2019 (doi 10.3389/fnagi.2019.00194): without biases; BatchNorm passes
    relevance unchanged. With inputs a >= 0, as behind every ReLU, half of the rule's terms vanish; inputs
    with negatives get all four. Rule "composite" is that of Montavon et al. 2019
    (doi 10.1007/978-3-030-28954-6_10), zennit's EpsilonPlusFlat: BatchNorm merged into the convolution before
    it, then LRP-epsilon in the linear layers, z+ in the convolutions, and flat in the first.

    Args:
        model: the network; evaluated in evaluation mode, left as found.
        volume: (B, 1, X, Y, Z), scans.
        target: int64 (B,), the logit to explain, per scan.
        beta: weight of negative contributions; positive ones weigh alpha = 1 + beta. Of rule "beta".
        epsilon: stabiliser of the denominators.
        rule: a key of RULES.

    Returns:
        The relevance, like `volume`, signed. Its sum is the target logit up to epsilon and, by rule "beta",
        to what units without any input (windows of pure background) absorbed; by rule "composite", to what
        biases absorbed, which are one more input there.

    Raises:
        ValueError: shapes, dtypes, targets or a rule that do not fit.
    """
    check_arguments(model, volume, target)
    if rule not in RULES:
        raise ValueError(f"rule: expected {' or '.join(RULES)}, got {rule}")
    with evaluation_mode(model), torch.no_grad():
        return RULES[rule](model, volume, target, beta, epsilon)


def initial_relevance(logits: Tensor, target: Tensor) -> Tensor:
    """Relevance of the outputs, (B, 2): the value of the target logit, else zero."""
    return logits * F.one_hot(target, CLASSES)


# The beta rule -----------------------------------------------------------------------------------


def _beta(model: CNN3d, volume: Tensor, target: Tensor, beta: float, epsilon: float) -> Tensor:
    """Relevance of the scan by the beta rule."""
    network = FoldedNetwork(model, volume.shape[2:], bounding_box(volume))
    values, blocks = volume[:, :, *network.input_box], []
    for layers, padding in zip(model.blocks(), network.paddings, strict=True):
        blocks.append(AlphaBetaBlock(layers, values, beta, epsilon))
        values = padding.pad(blocks[-1].forward())
    hidden, output = model.linears()
    linears = [AlphaBetaRule(hidden, values.flatten(1), beta, epsilon)]
    linears.append(AlphaBetaRule(output, F.relu(linears[0].forward()), beta, epsilon))

    relevance = initial_relevance(linears[1].forward(), target)
    for rule in reversed(linears):
        relevance = rule.backward(relevance)
    relevance = to_memory_format(relevance.view(values.shape))
    for block, padding in zip(reversed(blocks), reversed(network.paddings), strict=True):
        relevance = block.backward(padding.crop(relevance))
    result = torch.zeros_like(volume)
    result[:, :, *network.input_box] = relevance
    return result


class AlphaBetaRule:
    """The alpha-beta rule, alpha = 1 + beta, for one linear layer and the inputs it read.

    Positive and negative contributions z+ and z- come from one layer with twice the units,
    z = [z+, z-]: with a >= 0, z+ = a * w+ and z- = a * w-. Where a has negative values its positive
    and negative parts become twice the inputs, z+ = a+ * w+ + a- * w- and
    z- = a+ * w- + a- * w+. Either way z+ + z- + bias is the layer's output.
    """

    def __init__(self, layer: nn.Linear | nn.Conv3d, inputs: Tensor, beta: float, epsilon: float) -> None:
        self.bias, self.beta, self.epsilon = cast(Tensor, layer.bias), beta, epsilon
        w_plus, w_minus = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
        self.inputs = inputs
        self.weight = torch.cat([w_plus, w_minus])  # (2n, C, k, k, k) or (2n, C)
        self.signed_inputs = bool((inputs < 0).any())
        if self.signed_inputs:
            self.inputs = torch.cat([inputs.clamp(min=0), inputs.clamp(max=0)], 1)
            self.weight = torch.cat([self.weight, torch.cat([w_minus, w_plus])], 1)

    def forward(self) -> Tensor:
        """The layer's output; its positive and negative contributions are kept for `backward`."""
        self.positive, self.negative = F.linear(self.inputs, self.weight).chunk(2, 1)
        return self.positive + self.negative + self.bias

    def backward(self, relevance: Tensor) -> Tensor:
        """Relevance of the layer's outputs -> of its inputs."""
        has_positive, has_negative = self.positive > 0, self.negative < 0
        both = has_positive & has_negative  # a unit with only one of them passes all its relevance there
        alpha, beta = torch.where(both, 1 + self.beta, 1.0), torch.where(both, -self.beta, 1.0)
        positive = torch.where(has_positive, relevance * alpha / (self.positive + self.epsilon), 0)
        negative = torch.where(has_negative, relevance * beta / (self.negative - self.epsilon), 0)
        relevance = self.inputs * self.transposed(torch.cat([positive, negative], 1))
        if self.signed_inputs:
            of_plus, of_minus = relevance.chunk(2, 1)
            relevance = of_plus + of_minus
        return relevance

    def transposed(self, ratio: Tensor) -> Tensor:
        """The transposed layer: from its 2n units to its inputs."""
        return ratio @ self.weight


class AlphaBetaBlock(AlphaBetaRule):
    """The alpha-beta rule for a block's convolution; only the maxima of its pool have relevance."""

    def __init__(self, layers: BlockLayers, inputs: Tensor, beta: float, epsilon: float) -> None:
        super().__init__(layers.conv, inputs, beta, epsilon)
        self.layers, self.window = layers, cast(int, layers.pool.kernel_size)
        self.conv_shape = torch.Size(edge - self.weight.shape[2] + 1 for edge in inputs.shape[2:])

    def forward(self) -> Tensor:
        """The block's output (B, n, x, y, z); both contributions of the maxima are kept."""
        channels = len(self.inputs) * len(self.weight)
        results = pool_in_slabs(
            self._forward_slab, self.conv_shape, self.window, channels, self.inputs.device
        )
        self.positive, self.negative, outputs, self.max_indices = results
        return outputs

    def _forward_slab(self, rows: slice) -> tuple[Tensor, ...]:
        """For some rows: both contributions of the maxima, the block's output, the maxima's indices."""
        positive, negative = convolve(with_halo(self.inputs, rows, self.weight), self.weight).chunk(2, 1)
        values = self.layers.norm(positive + negative + self.bias.view(-1, 1, 1, 1)).relu_()
        outputs, max_indices = F.max_pool3d(values, self.window, return_indices=True)
        contributions = [gather_at_maxima(part, max_indices) for part in (positive, negative)]
        return *contributions, outputs, max_indices

    def transposed(self, ratio: Tensor) -> Tensor:
        """From the maxima's 2n units to the convolution's inputs."""
        max_indices = torch.cat([self.max_indices, self.max_indices], 1)
        return unpool_and_transpose(ratio, max_indices, self.conv_shape, self.weight, self.window)


# The composite -----------------------------------------------------------------------------------


def _composite(model: CNN3d, volume: Tensor, target: Tensor, beta: float, epsilon: float) -> Tensor:
    """Relevance of the scan by LRP-epsilon, z+ and flat; a background voxel may get some, too."""
    network = FoldedNetwork(model, volume.shape[2:])
    first, *others = network.blocks
    values, cache = first.forward(volume)
    blocks = []
    for block in others:
        blocks.append(PositiveBlock(block, values, epsilon))
        values = blocks[-1].forward()
    hidden, output = network.hidden, network.output
    before_relu = hidden(values.flatten(1))
    units = F.relu(before_relu)
    logits = output(units)

    relevance = initial_relevance(logits, target)
    relevance = units * ((relevance / stabilised(logits, epsilon)) @ output.weight)
    relevance = values.flatten(1) * ((relevance / stabilised(before_relu, epsilon)) @ hidden.weight)
    relevance = to_memory_format(relevance.view(values.shape))
    for positive in reversed(blocks):
        relevance = positive.backward(relevance)
    # flat: all voxels that the unit at a maximum sees get the same share
    shares = torch.full_like(first.weight, 1 / first.weight[0].numel())
    return unpool_and_transpose(relevance, cache.max_indices, cache.conv_shape, shares, first.window)


class PositiveBlock:
    """The z+ rule for a folded block with inputs >= 0; a positive shift is one more input."""

    def __init__(self, block: FoldedBlock, inputs: Tensor, epsilon: float) -> None:
        self.block, self.inputs, self.epsilon = block, inputs, epsilon
        self.weight, self.shift = block.weight.clamp(min=0), block.shift.clamp(min=0)  # (n, C, k, k, k), (n,)
        self.conv_shape = block.conv_shape(inputs.shape[2:])

    def forward(self) -> Tensor:
        """The block's output (B, n, x, y, z); the positive contributions of the maxima are kept."""
        channels = len(self.inputs) * 2 * len(self.weight)
        self.positive, pooled, self.max_indices = pool_in_slabs(
            self._forward_slab, self.conv_shape, self.block.window, channels, self.inputs.device
        )
        return self.block.activate(pooled)

    def _forward_slab(self, rows: slice) -> tuple[Tensor, ...]:
        """For some rows: the positive contributions of the maxima, the maxima, their indices."""
        weight = torch.cat([self.block.weight, self.weight])
        values, positive = convolve(with_halo(self.inputs, rows, weight), weight).chunk(2, 1)
        pooled, max_indices = self.block.pool(values)
        return gather_at_maxima(positive, max_indices), pooled, max_indices

    def backward(self, relevance: Tensor) -> Tensor:
        """Relevance of the block's outputs -> of its inputs."""
        denominators = stabilised(self.positive + self.shift.view(-1, 1, 1, 1), self.epsilon)
        back = unpool_and_transpose(
            relevance / denominators, self.max_indices, self.conv_shape, self.weight, self.block.window
        )
        return self.inputs * back


def stabilised(values: Tensor, epsilon: float) -> Tensor:
    """Denominators kept away from zero: values + epsilon sign(values), with sign(0) = 1."""
    return values + torch.where(values < 0, -epsilon, epsilon)


RULES: dict[str, Callable[[CNN3d, Tensor, Tensor, float, float], Tensor]] = {
    "beta": _beta,
    "composite": _composite,
}
