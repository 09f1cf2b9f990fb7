"""methods.py: one table, from which options, records and folders' names follow."""

import json
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cohorts import contents, load_volume, only_error, read_values
from networks import CASES, random_network, random_volume
from torch import Tensor

import heatmap
import methods
import utils
from brain_maps import FLOORS
from ggc import gradcam, guided_gradcam
from gradient import gradient, input_times_gradient, smoothgrad
from ig import integrated_gradients
from internals.errors import InputError
from lrp import lrp
from methods import METHODS, Method, Option
from occlusion import occlusion

# the published one and options that are not the defaults
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "LRP": (lrp, {"beta": 0.0}),
    "IG": (integrated_gradients, {"steps": 3}),
    "GGC": (guided_gradcam, {}),
    "GradCAM": (gradcam, {"layer": 0}),
    "Gradient": (gradient, {}),
    "InputXGradient": (input_times_gradient, {}),
    "SmoothGrad": (smoothgrad, {"samples": 2, "sigma": 0.3}),
    "Occlusion": (occlusion, {"size": 4.0, "stride": 3.0}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_entry_is_callable_as_its_function(name):
    function, options = FUNCTIONS[name]
    assert heatmap.METHODS.keys() == FUNCTIONS.keys()
    assert heatmap.METHODS[name].function is function
    case = CASES["one block"]
    model, volume, target = random_network(case), random_volume(case, batch=2), torch.tensor([0, 1])
    needed = {"baseline": volume[:1], "seeds": [5, 7], "voxel_sizes": (1, 2, 1)}
    options = options | {what: needed[what] for what in METHODS[name].needs}
    assert torch.equal(
        METHODS[name](model, volume, target, **options), function(model, volume, target, **options)
    )


def test_sums_that_are_promised():
    logit, baseline = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    sums = {name: method.map_sum for name, method in METHODS.items()}
    found = {name: rule and rule(logit, baseline).tolist() for name, rule in sums.items()}
    assert found == dict.fromkeys(METHODS) | {"LRP": [3, -1], "IG": [2.5, -3]}


def helps() -> dict[str, str]:
    """Every option's help as the user sees it."""
    words = " ".join(heatmap.get_parser().format_help().split())
    return {part.split()[0]: part for part in words.split(" --")}


def test_options_are_as_given_else_their_defaults():
    assert METHODS["IG"].chosen({"steps": 4, "sigma": 3}) == {"steps": 4, "baseline": "zero"}
    assert METHODS["LRP"].chosen({}) == {"rule": "beta", "beta": 0.5}
    assert METHODS["LRP"].chosen({"rule": "composite"}) == {"rule": "composite"}  # which has no beta


@pytest.mark.parametrize(
    ("given", "asked", "wrong"),
    [
        ({"steps": 3}, ["LRP", "GGC"], "--steps 3: is an option of IG, which is not asked for"),
        ({"baseline": "zero"}, ["Gradient"], "--baseline zero: is an option of IG, Occlusion, which is not"),
        (
            {"beta": 0.2, "rule": "composite"},
            ["LRP"],
            "--beta 0.2: is an option of LRP with --rule beta, which",
        ),
    ],
)
def test_option_that_no_method_has_is_refused(given, asked, wrong):
    with pytest.raises(InputError, match=re.escape(wrong)):
        methods.check_given(given, asked)


def test_option_of_one_method_among_several_is_taken():
    methods.check_given({"steps": 3, "size": 8.0, "beta": 0.2}, ["GGC", "Occlusion", "IG", "LRP"])


def test_option_of_two_methods_is_one_option(monkeypatch):
    monkeypatch.setitem(METHODS, "TOY", Method(lrp, (methods.STEPS,)))
    assert "IG, TOY: steps" in helps()["steps"]
    assert METHODS["TOY"].chosen({"steps": 4, "beta": 0.1}) == {"steps": 4}
    methods.check_given({"steps": 4}, ["TOY"])


def test_new_method_is_one_entry(lively_run, csv, tmp_path, monkeypatch, capsys):
    """Its option reaches the parser, the function and the record; its name the choices and the folder."""

    def toy(model, volume, target, colour, baseline):
        """The scan less its baseline, times the colour; nothing for controls."""
        difference = volume - (0 if baseline is None else baseline)
        return difference * colour * target.view(-1, 1, 1, 1, 1)

    colour = Option("colour", 3, "of the toy", utils.bounded(int, at_least=1))
    kind = Option("kind", "plain", "of the toy, too", choices={"plain": "", "fancy": "-fancy"})
    summed = Method(
        lambda *scans, kind, **others: toy(*scans, **others),
        (colour, kind, methods.BASELINE),
        needs=("baseline",),
        map_sum=lambda logit, baseline: logit - baseline,
    )
    monkeypatch.setitem(METHODS, "TOY", summed)
    assert "TOY" in helps()["method"].split("}")[0]
    assert "TOY: of the toy (default: 3)" in helps()["colour"]
    assert "IG, Occlusion, TOY: zero" in helps()["baseline"]

    def explain(*options: str) -> int:
        where = f"--modelpath {lively_run} --outpath {tmp_path} --device cpu --run-folds 1"
        return heatmap.main(["--method", "TOY", *where.split(), *options])

    assert explain("--colour", "7", "--save-subjects") == 0
    folder = tmp_path / "TOY"
    record = json.loads((folder / "map.json").read_text())
    assert (record["method"], record["options"]["colour"]) == ("TOY", 7)
    table = heatmap.read_subjects(folder)
    assert table["zero"].tolist() == (1 - table["label"]).tolist()
    assert np.isfinite(table["residual"]).all()
    files = sorted((folder / "subjects").iterdir())
    for file, path, label in zip(files, table["path"], table["label"], strict=True):
        assert np.array_equal(read_values(file), 7 * label * load_volume(csv.parent / path)[0, 0].numpy())
    before = contents(tmp_path)
    assert explain("--save-subjects") == 2
    assert "colour (7 there, 3 now)" in only_error(capsys.readouterr().err)
    assert contents(tmp_path) == before

    assert explain("--baseline", "controls", "--kind", "fancy") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"TOY", "TOY-fancy-controls"}


def test_folders_of_methods_differ():
    """Whatever the method, its options and its networks are, no maps overwrite others."""
    names = []
    for name, method in METHODS.items():
        choices = [[(option.name, choice) for choice in option.choices] for option in method.options]
        for chosen in product(*filter(None, choices)):
            names += [name + method.suffix(dict(chosen)) + floor for floor in ("", *FLOORS.values())]
    assert (
        len(set(names)) == len(names) == 3 * (len(METHODS) + 3)
    )  # IG and Occlusion by baseline, LRP by rule
    assert names[:6] == [
        *(f"LRP{rule}{floor}" for rule in ("", "-composite") for floor in ("", "-random", "-permuted"))
    ]
