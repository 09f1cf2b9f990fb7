"""methods.py: one table, from which options, records and folders' names follow."""

import json
from pathlib import Path

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
from internals.errors import InputError
from lrp import lrp
from methods import METHODS, Method, Option

FUNCTIONS = {"LRP": lrp, "IG": integrated_gradients, "GGC": guided_gradcam}


def test_table_holds_the_published_methods():
    assert heatmap.METHODS is METHODS
    assert {name: method.function for name, method in METHODS.items()} == FUNCTIONS


@pytest.mark.parametrize("name", METHODS)
def test_entry_is_callable_as_its_function(name):
    case = CASES["one block"]
    model, volume, target = random_network(case), random_volume(case, batch=2), torch.tensor([0, 1])
    assert torch.equal(heatmap.METHODS[name](model, volume, target), FUNCTIONS[name](model, volume, target))
    options = {"LRP": {"beta": 0.0}, "IG": {"steps": 3, "baseline": volume[:1]}, "GGC": {}}[name]
    found = heatmap.METHODS[name](model, volume, target, **options)
    assert torch.equal(found, FUNCTIONS[name](model, volume, target, **options))


def test_sums_that_are_promised():
    logit, baseline = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    found = {
        name: method.map_sum and method.map_sum(logit, baseline).tolist() for name, method in METHODS.items()
    }
    assert found == {"LRP": [3, -1], "IG": [2.5, -3], "GGC": None}


def helps() -> dict[str, str]:
    """Every option's help as the user sees it."""
    words = " ".join(heatmap.get_parser().format_help().split())
    return {part.split()[0]: part for part in words.split(" --")}


@pytest.mark.parametrize(
    ("option", "default", "words", "bad"),
    [
        ("steps", 100, "IG: steps of the Riemann sum (default: 100)", ["0", "1.5"]),
        ("beta", 0.5, "LRP: weight of inhibiting contributions (default: 0.5)", ["-1", "nan", "101"]),
    ],
)
def test_options_reach_the_parser(option, default, words, bad):
    parser = heatmap.get_parser()
    assert parser.get_default(option) == default
    assert words in helps()[option]
    for value in bad:
        with pytest.raises(InputError, match=f"--{option}: '{value}' is not"):
            parser.parse_args(["--method", "IG", f"--{option}", value])


def test_option_of_two_methods_is_one_option(monkeypatch):
    monkeypatch.setitem(METHODS, "TOY", Method(lrp, (methods.STEPS,)))
    assert "IG, TOY: steps" in helps()["steps"]
    assert METHODS["TOY"].chosen({"steps": 4, "beta": 0.1}) == {"steps": 4}


COLOUR = Option("colour", 3, "of the toy", utils.bounded(int, at_least=1))


def toy(model, volume, target, colour, baseline):
    """The scan less its baseline, times the colour; nothing for controls."""
    difference = volume - (0 if baseline is None else baseline)
    return difference * colour * target.view(-1, 1, 1, 1, 1)


def test_new_method_is_one_entry(lively_run, csv, tmp_path, monkeypatch, capsys):
    """Its option reaches the parser, the function and the record; its name the choices and the folder."""
    summed = Method(toy, (COLOUR,), takes_baseline=True, map_sum=lambda logit, baseline: logit - baseline)
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
    assert record["method"] == "TOY"
    wanted = {"target": "label", "save_subjects": True, "weights": "trained", "baseline": "zero", "colour": 7}
    assert record["options"] == wanted
    table = heatmap.read_subjects(folder)
    assert table["zero"].tolist() == (1 - table["label"]).tolist()
    assert np.isfinite(table["residual"]).all()
    files = sorted((folder / "subjects").iterdir())
    for file, path, label in zip(files, table["path"], table["label"], strict=True):
        expected = 7 * label * load_volume(csv.parent / path)[0, 0].numpy()
        assert np.array_equal(read_values(file), expected)
    before = contents(tmp_path)
    assert explain("--save-subjects") == 2
    assert "colour (7 there, 3 now)" in only_error(capsys.readouterr().err)
    assert contents(tmp_path) == before

    assert explain("--baseline", "controls") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"TOY", "TOY-controls"}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.takes_baseline])
def test_method_without_a_baseline_refuses_one(run, tmp_path: Path, capsys, name):
    options = ["--method", name, "--modelpath", str(run), "--outpath", str(tmp_path / "out")]
    assert heatmap.main([*options, "--device", "cpu", "--baseline", "controls"]) == 2
    assert f"--baseline controls: {name} has no baseline" in only_error(capsys.readouterr().err)
    assert contents(tmp_path) == {}


def test_folders_of_methods_differ():
    """Whatever the method, its baseline and its networks are, no maps overwrite others."""
    names = [
        heatmap.folder_name(name, {"weights": weights, "baseline": baseline})
        for name in METHODS
        for weights in heatmap.NETWORKS
        for baseline in heatmap.BASELINES
    ]
    assert len(set(names)) == len(METHODS) * 4
    assert names[:4] == ["LRP", "LRP-controls", "LRP-random", "LRP-controls-random"]
