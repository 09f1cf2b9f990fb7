"""Layer-wise relevance propagation, beta rule (Bach et al. 2015, doi 10.1371/journal.pone.0130140)."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import check_arguments, pull, unpool
from models import CLASSES, CNN3d, frozen


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
    with frozen(model), torch.no_grad():
        values, steps = volume, []
        for conv, norm, relu, pool in model.blocks():
            rule = BetaRule(conv, values, beta, epsilon)
            before = rule.forward()
            values, winners = F.max_pool3d(relu(norm(before)), pool.kernel_size, return_indices=True)
            rule.keep(winners)
            steps.append((rule, (winners, before.shape[2:])))
        hidden, output = model.linears()
        rules = [BetaRule(hidden, values.flatten(1), beta, epsilon)]
        rules.append(BetaRule(output, F.relu(rules[0].forward()), beta, epsilon))
        logits = rules[1].forward()

        relevance = logits * F.one_hot(target, CLASSES)  # (B, 2)
        for rule in reversed(rules):
            relevance = rule.backward(relevance)
        relevance = relevance.view(values.shape)
        for rule, pooled in reversed(steps):
            relevance = rule.backward(relevance, pooled)
        return relevance


class BetaRule:
    """The beta rule for one linear or convolutional layer and the inputs it read.

    Exciting and inhibiting parts come from one convolution with twice the filters,
    z = [z+, z-]: with a >= 0, z+ = a * w+ and z- = a * w-. Where a has negative values its positive
    and negative parts become twice the input channels, z+ = a+ * w+ + a- * w- and
    z- = a+ * w- + a- * w+. Either way z+ + z- + bias is the layer's output.
    """

    def __init__(self, layer: nn.Linear | nn.Conv3d, inputs: Tensor, beta: float, epsilon: float) -> None:
        self.layer, self.beta, self.epsilon = layer, beta, epsilon
        exciting, inhibiting = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
        self.inputs = inputs
        self.weight = torch.cat([exciting, inhibiting])  # (2n, C, k, k, k) or (2n, C)
        if bool((inputs < 0).any()):
            self.inputs = torch.cat([inputs.clamp(min=0), inputs.clamp(max=0)], 1)
            self.weight = torch.cat([self.weight, torch.cat([inhibiting, exciting])], 1)

    def forward(self) -> Tensor:
        """The layer's output; its exciting and inhibiting parts are kept for the way back."""
        parts = F.linear if isinstance(self.layer, nn.Linear) else F.conv3d
        self.exciting, self.inhibiting = parts(self.inputs, self.weight).chunk(2, 1)
        bias = cast(Tensor, self.layer.bias)
        return self.exciting + self.inhibiting + bias.view(-1, *[1] * (self.exciting.ndim - 2))

    def keep(self, winners: Tensor) -> None:
        """Forget the parts of all units but the winners of the pool that follows."""
        self.exciting, self.inhibiting = (
            part.flatten(2).gather(2, winners.flatten(2)).view(winners.shape)
            for part in (self.exciting, self.inhibiting)
        )

    def backward(self, relevance: Tensor, pooled: tuple[Tensor, torch.Size] | None = None) -> Tensor:
        """Relevance of the layer's outputs -> of its inputs.

        Where a pool follows, the relevance is the pool's, and `pooled` its winners and the grid before it.
        """
        excited, inhibited = self.exciting > 0, self.inhibiting < 0
        both = excited & inhibited  # a unit with one part alone gets all its relevance through that one
        shares = [
            relevance * torch.where(both, 1 + self.beta, 1.0) / (self.exciting + self.epsilon),
            relevance * torch.where(both, -self.beta, 1.0) / (self.inhibiting - self.epsilon),
        ]
        shares = [
            torch.where(there, part, 0) for there, part in zip((excited, inhibited), shares, strict=True)
        ]
        if pooled is not None:
            shares = [unpool(part, *pooled) for part in shares]
        share = torch.cat(shares, 1)  # (B, 2n, ...)
        pulled = share @ self.weight if isinstance(self.layer, nn.Linear) else pull(share, self.weight)
        relevance = self.inputs * pulled
        if relevance.shape[1] != self.layer.weight.shape[1]:
            positive, negative = relevance.chunk(2, 1)
            relevance = positive + negative
        return relevance
