"""The floors of the house: imports only point down, and nobody imports a command."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    ["internals"],
    ["utils"],
    ["dataset", "brain_maps", "models"],
    ["runs", "training", "classifier_scores", "overlap_scores", "atypical"],
    [
        "lrp",
        "ig",
        "ggc",
        "gradient",
        "occlusion",
        "randomizing",
        "faithfulness",
        "sanity_scores",
        "calibration",
    ],
    ["methods", "selfcheck", "figures", "model_card"],
    ["explaining", "voxelwise"],
    ["patterns", "checking"],
    ["train_cv", "heatmap", "predict", "svm", "ttest", "overlap", "sanity", "simulate"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported(node: ast.AST) -> Iterator[str]:
    """The rooms that are imported at run time below a node of a module's syntax tree."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    yield from (name.split(".")[0] for name in names if name.split(".")[0] in FLOOR)
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def test_imports_point_down():
    files = {file.stem: [file] for file in ROOT.glob("*.py")}
    assert set(files) == set(FLOOR) - {"internals"}
    files["internals"] = list((ROOT / "internals").glob("*.py"))
    pairs = {
        (room, other)
        for room, parts in files.items()
        for part in parts
        for other in imported(ast.parse(part.read_text()))
    }
    assert len(pairs) > 40  # so that a reader of imports that finds none would show
    upwards = [pair for pair in pairs if FLOOR[pair[0]] <= FLOOR[pair[1]] and set(pair) != {"internals"}]
    assert upwards == []
