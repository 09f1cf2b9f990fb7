"""methods.py: one table, from which options, records and folders' names follow."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from cohorts import contents, load_volume, only_error, read_values
from networks import CASES, random_network, random_volume

import heatmap
import methods
import utils
from ggc import guided_gradcam
from ig import integrated_gradients
from lrp import lrp
from methods import METHODS, Method, Option

FUNCTIONS = {"LRP": lrp, "IG": integrated_gradients, "GGC": guided_gradcam}


@pytest.mark.parametrize(("name", "options"), [("LRP", {"beta": 0.0}), ("IG", {"steps": 3}), ("GGC", {})])
def test_entry_is_callable_as_its_function(name, options):
    assert heatmap.METHODS.keys() == FUNCTIONS.keys()
    assert heatmap.METHODS[name].function is FUNCTIONS[name]
    case = CASES["one block"]
    model, volume, target = random_network(case), random_volume(case, batch=2), torch.tensor([0, 1])
    options |= {"baseline": volume[:1]} if METHODS[name].takes_baseline else {}
    found = METHODS[name](model, volume, target, **options)
    assert torch.equal(found, FUNCTIONS[name](model, volume, target, **options))


def test_sums_that_are_promised():
    logit, baseline = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    sums = {name: method.map_sum for name, method in METHODS.items()}
    found = {name: rule and rule(logit, baseline).tolist() for name, rule in sums.items()}
    assert found == {"LRP": [3, -1], "IG": [2.5, -3], "GGC": None}


def helps() -> dict[str, str]:
    """Every option's help as the user sees it."""
    words = " ".join(heatmap.get_parser().format_help().split())
    return {part.split()[0]: part for part in words.split(" --")}


def test_option_of_two_methods_is_one_option(monkeypatch):
    monkeypatch.setitem(METHODS, "TOY", Method(lrp, (methods.STEPS,)))
    assert "IG, TOY: steps" in helps()["steps"]
    assert METHODS["TOY"].chosen({"steps": 4, "beta": 0.1}) == {"steps": 4}


def test_new_method_is_one_entry(lively_run, csv, tmp_path, monkeypatch, capsys):
    """Its option reaches the parser, the function and the record; its name the choices and the folder."""

    def toy(model, volume, target, colour, baseline):
        """The scan less its baseline, times the colour; nothing for controls."""
        difference = volume - (0 if baseline is None else baseline)
        return difference * colour * target.view(-1, 1, 1, 1, 1)

    colour = Option("colour", 3, "of the toy", utils.bounded(int, at_least=1))
    summed = Method(toy, (colour,), takes_baseline=True, map_sum=lambda logit, baseline: logit - baseline)
    monkeypatch.setitem(METHODS, "TOY", summed)
    assert "TOY" in helps()["method"].split("}")[0]
    assert "TOY: of the toy (default: 3)" in helps()["colour"]
    assert "IG, TOY: zero" in helps()["baseline"]

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

    assert explain("--baseline", "controls") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"TOY", "TOY-controls"}


def test_folders_of_methods_differ():
    """Whatever the method, its baseline and its networks are, no maps overwrite others."""
    networks = product(METHODS, heatmap.NETWORKS, heatmap.BASELINES)
    names = [heatmap.folder_name(name, {"weights": w, "baseline": b}) for name, w, b in networks]
    assert len(set(names)) == len(METHODS) * 4
    assert names[:4] == ["LRP", "LRP-controls", "LRP-random", "LRP-controls-random"]
