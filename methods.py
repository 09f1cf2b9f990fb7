"""The explanation methods: one table, from which options, records and folders' names follow.

A method is a function of a network, scans (B, 1, X, Y, Z) and the logit to explain per scan, int64 (B,), that
returns one map per scan, and what there is to know about it. To add one, write the function in a file of its
own and enter it here.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import utils
from ggc import guided_gradcam
from ig import integrated_gradients
from lrp import lrp


@dataclass(frozen=True)
class Option:
    """An option of explanation methods, as argparse takes it and the functions name it."""

    name: str
    default: Any
    help: str
    type: Callable[[str], Any]


@dataclass(frozen=True)
class Method:
    """An explanation method.

    Attributes:
        function: function(model, volume, target, **options) -> maps like `volume`.
        options: what may be set.
        takes_baseline: whether the function takes `baseline`, the scan that others are compared with: None
            for all zeros, or (1, 1, X, Y, Z).
        map_sum: what a map should sum to, given the explained logit of the scans and that of the baseline,
            (B,) each; None where the sum means nothing.
    """

    function: Callable[..., Tensor]
    options: tuple[Option, ...] = ()
    takes_baseline: bool = False
    map_sum: Callable[[Tensor, Tensor], Tensor] | None = None

    def __call__(self, model: Any, volume: Tensor, target: Tensor, **options: Any) -> Tensor:
        return self.function(model, volume, target, **options)

    def chosen(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the given options that are this method's."""
        return {option.name: given[option.name] for option in self.options}


STEPS = Option("steps", 100, "steps of the Riemann sum", utils.bounded(int, at_least=1))
BETA = Option("beta", 0.5, "weight of negative contributions", utils.bounded(float, at_least=0, at_most=100))

METHODS: dict[str, Method] = {
    # relevance is conserved (Bach et al. 2015, equation 2)
    "LRP": Method(lrp, (BETA,), map_sum=lambda logit, baseline: logit),
    # completeness (Sundararajan et al. 2017, proposition 1)
    "IG": Method(
        integrated_gradients, (STEPS,), takes_baseline=True, map_sum=lambda logit, baseline: logit - baseline
    ),
    "GGC": Method(guided_gradcam),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser every method's options, each with the names of the methods that have it."""
    users: dict[Option, list[str]] = {}
    for name, method in METHODS.items():
        for option in method.options:
            users.setdefault(option, []).append(name)
    for option, names in users.items():
        parser.add_argument(
            f"--{option.name}",
            type=option.type,
            default=option.default,
            help=f"{', '.join(names)}: {option.help}",
        )
