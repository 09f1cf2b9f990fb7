"""The explanation methods: one table, from which options, records and folders' names follow.

A method is a function of a network, scans (B, 1, X, Y, Z) and the logit to explain per scan, int64 (B,), that
returns one map per scan, and what there is to know about it. To add one, write the function in a file of its
own and enter it here.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import models
import utils
from ggc import check_layer, gradcam, guided_gradcam
from gradient import gradient, input_times_gradient, smoothgrad
from ig import integrated_gradients
from internals.errors import InputError
from lrp import lrp
from occlusion import cube_in_voxels, occlusion


@dataclass(frozen=True)
class Option:
    """An option of explanation methods, as argparse takes it and the functions name it.

    Attributes:
        choices: where the value is one of a few, what each adds to the name of the maps' folder.
        where: the choices of other options without which this one has no meaning.
    """

    name: str
    default: Any
    help: str
    type: Callable[[str], Any] = str
    choices: Mapping[str, str] = field(default_factory=dict, hash=False)
    where: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Method:
    """An explanation method.

    Attributes:
        function: function(model, volume, target, **options) -> maps like `volume`.
        options: what may be set.
        needs: what else the function takes: "baseline", the scan that others are compared with, None for all
            zeros or (1, 1, X, Y, Z); "seeds", a number of each scan's own; "voxel_sizes", in mm.
        map_sum: what a map should sum to, given the explained logit of the scans and that of the baseline,
            (B,) each; None where the sum means nothing.
        check: check(options, model's name, voxel sizes) raises ValueError where options do not fit these.
    """

    function: Callable[..., Tensor]
    options: tuple[Option, ...] = ()
    needs: tuple[str, ...] = ()
    map_sum: Callable[[Tensor, Tensor], Tensor] | None = None
    check: Callable[[Mapping[str, Any], str, Sequence[float]], Any] = lambda options, model, sizes: None

    def __call__(self, model: Any, volume: Tensor, target: Tensor, **options: Any) -> Tensor:
        return self.function(model, volume, target, **options)

    def chosen(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """This method's options: as they are given, else their defaults."""
        values = {option.name: given.get(option.name, option.default) for option in self.options}
        meant = [option for option in self.options if option.where.items() <= values.items()]
        return {option.name: values[option.name] for option in meant}

    def suffix(self, chosen: Mapping[str, Any]) -> str:
        """What its options add to the name of the maps' folder."""
        return "".join(option.choices[chosen[option.name]] for option in self.options if option.choices)


positive, whole = utils.bounded(float, above=0, at_most=1000), utils.bounded(int, at_least=1)

STEPS = Option("steps", 100, "steps of the Riemann sum", whole)
BASELINE = Option(
    "baseline", "zero", "zero, or the training controls' mean", choices={"zero": "", "controls": "-controls"}
)
RULE = Option("rule", "beta", "how relevance is shared out", choices={"beta": "", "composite": "-composite"})
BETA = Option(
    "beta",
    0.5,
    "weight of negative contributions",
    utils.bounded(float, at_least=0, at_most=100),
    where={"rule": "beta"},
)
SAMPLES = Option("samples", 25, "noisy copies of a scan", whole)
SIGMA = Option("sigma", 0.1, "noise, as a share of the scan's range", positive)
LAYER = Option("layer", -1, "block, from 0, or from the end", utils.bounded(int))
SIZE = Option("size", 16.0, "edge of the cubes in mm", positive)
STRIDE = Option("stride", 8.0, "mm from one cube to the next", positive)

METHODS: dict[str, Method] = {
    # relevance is conserved (Bach et al. 2015, equation 2)
    "LRP": Method(lrp, (RULE, BETA), map_sum=lambda logit, baseline: logit),
    # completeness (Sundararajan et al. 2017, proposition 1)
    "IG": Method(
        integrated_gradients,
        (STEPS, BASELINE),
        needs=("baseline",),
        map_sum=lambda logit, baseline: logit - baseline,
    ),
    "GGC": Method(guided_gradcam),
    "GradCAM": Method(
        gradcam,
        (LAYER,),
        check=lambda options, model, sizes: check_layer(options["layer"], models.depth(model)),
    ),
    "Gradient": Method(gradient),
    "InputXGradient": Method(input_times_gradient),
    "SmoothGrad": Method(smoothgrad, (SAMPLES, SIGMA), needs=("seeds",)),
    "Occlusion": Method(
        occlusion,
        (SIZE, STRIDE, BASELINE),
        needs=("baseline", "voxel_sizes"),
        check=lambda options, model, sizes: cube_in_voxels(options["size"], options["stride"], sizes),
    ),
}


def users() -> dict[Option, list[str]]:
    """Every option, and the names of the methods that have it."""
    found: dict[Option, list[str]] = {}
    for name, method in METHODS.items():
        for option in method.options:
            found.setdefault(option, []).append(name)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser every method's options; what the user does not give, it leaves out."""
    for option, names in users().items():
        parser.add_argument(
            f"--{option.name}",
            type=option.type,
            choices=option.choices or None,
            default=argparse.SUPPRESS,
            help=f"{', '.join(names)}: {option.help} (default: {option.default})",
        )


def check_given(given: Mapping[str, Any], asked: Sequence[str]) -> None:
    """Raise InputError where an option is given that none of the methods asked for has."""
    for option, names in users().items():
        if option.name in given and not any(option.name in METHODS[name].chosen(given) for name in asked):
            where = "".join(f" with --{other} {value}" for other, value in option.where.items())
            wanted = f"is an option of {', '.join(names)}{where}, which is not asked for"
            raise InputError(f"--{option.name} {given[option.name]}: {wanted}")


def check_options(name: str, options: Mapping[str, Any], model: str, voxel_sizes: Sequence[float]) -> None:
    """Raise InputError where a method's options do not fit the network or the scans."""
    try:
        METHODS[name].check(options, model, voxel_sizes)
    except ValueError as problem:
        raise InputError(f"--{problem}") from problem


def recorded_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's own options as a record has them; InputError where a value is none that the option takes."""
    chosen = METHODS[name].chosen(options)
    for option in METHODS[name].options:
        if option.name in chosen:
            value = chosen[option.name]
            try:
                right = str(value) in option.choices if option.choices else option.type(str(value)) == value
            except argparse.ArgumentTypeError:
                right = False
            if not right:
                raise InputError(f"is damaged: option {option.name} is {value!r}")
    return chosen
