"""README.md and docs/ held against the repository: options, links, make targets, files, names."""

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import methods
import train_cv
import utils

ROOT = Path(__file__).parent.parent
README, CODE = ROOT / "README.md", ROOT / "docs" / "code.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "RESULTS.md"]
MODULES = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("internals/*.py")] if path.stem != "__init__"]
COMMANDS = sorted(path.stem for path in MODULES if "\ndef get_parser(" in path.read_text())
# what methods' options are where they are not given; the parser leaves them out then
DEFAULTS = {option.name: option.default for option in methods.users()}
OUTPUTS = ("csv", "json", "md", "png", "py")  # overlap.csv is no name in overlap.py

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fences(page: Path) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def code(page: Path) -> list[str]:
    """Code spans and indented lines of a page, without comments."""
    text = prose(page)
    lines = re.findall(r"^ {4,}(.+)$", text, re.M)
    return [line.split("#")[0].strip() for line in lines] + re.findall(r"`([^`\n]+)`", text)


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), re.M)


def anchors(page: Path) -> list[str]:
    """What links to a heading end in, as GitHub makes them."""
    return [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings(page)]


def links(page: Path) -> list[str]:
    """Targets of the links and pictures that are no addresses."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", prose(page)))
    return [target for target in targets if not target.startswith("https://")]


def tables(page: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """Every table, rows of cells with its header first, and the command that the headings above it name."""
    command, rows = "", list[list[str]]()
    for line in [*prose(page).splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            yield command, rows[:1] + rows[2:]
            rows = []
        named = re.fullmatch(r"#+ .*?(\w+)\.py", line)
        command = named[1] if named else command


def option_tables() -> list[tuple[str, list[list[str]]]]:
    found = [table for page in PAGES for table in tables(page)]
    return [(command, rows[1:]) for command, rows in found if rows[0][0] == "option"]


def get_parser(command: str) -> argparse.ArgumentParser:
    return importlib.import_module(command).get_parser()


def says_default(cell: str, action: argparse.Action) -> bool:
    """Whether a table's cell says an option's default: its value; where there is none, words or nothing."""
    default: Any = DEFAULTS.get(action.dest) if action.default == argparse.SUPPRESS else action.default
    if action.required or default is False:
        return cell == ("required" if action.required else "")
    values = cell.strip("`").split()
    if default is None:
        return not re.fullmatch(r"`[^`]*`|[-\d. e]+", cell)
    defaults = default if isinstance(default, list) else [default]
    try:
        return [type(defaults[0])(value) for value in values] == defaults
    except ValueError:
        return False


def mismatches(rows: list[list[str]], parser: argparse.ArgumentParser) -> list[str]:
    """What an option table says otherwise than the parser."""
    actions = {action.option_strings[-1]: action for action in parser._actions if action.dest != "help"}
    told = {row[0].strip("`").split()[0]: row for row in rows}
    wrong = [f"{name}: only one of table and parser has it" for name in sorted(told.keys() ^ actions.keys())]
    wrong += ["an option is listed twice"] if len(told) < len(rows) else []
    for name in told.keys() & actions.keys():
        (_, default, text), action = told[name], actions[name]
        if not says_default(default, action):
            wrong.append(f"{name}: the default is {action.default}, not {default or 'unsaid'}")
        unsaid = [choice for choice in action.choices or () if f"`{choice}`" not in default + text]
        wrong += [f"{name}: {choice} is not named" for choice in unsaid]
    return wrong


@pytest.mark.parametrize("command", COMMANDS)
def test_options(command):
    (rows,) = (rows for name, rows in option_tables() if name == command)  # one table each
    assert mismatches(rows, get_parser(command)) == []


def test_a_wrong_table_is_noticed():
    parser = utils.ArgumentParser(None)
    parser.add_argument("--rate", default=1e-3)
    parser.add_argument("--edges", default=[0, 2, 4])
    parser.add_argument("--need", required=True)
    parser.add_argument("--free")
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--pick", choices=["a", "b"], default="a")
    right = {"--rate": "1e-3", "--edges": "0 2 4", "--need": "required", "--free": "all", "--flag": ""}
    rows = {name: [f"`{name} X`", cell, ""] for name, cell in right.items()}
    rows["--pick"] = ["`--pick`", "`a`", "or `b`"]
    assert mismatches(list(rows.values()), parser) == []
    wrong = {"--rate": ["1e-4", "the run's", ""], "--edges": ["0 2 5"], "--need": ["`x`"], "--free": ["3"]}
    wrong |= {"--flag": ["on"], "--other": [""]}
    changes = [{name: [f"`{name}`", default, ""]} for name in wrong for default in wrong[name]]
    for change in [*changes, {"--pick": ["`--pick`", "`a`", "or `c`"]}]:
        assert mismatches(list((rows | change).values()), parser), change
    assert mismatches(list(rows.values())[1:], parser)


@each_page
def test_commands_in_the_pages_are_accepted(page):
    for line in code(page):
        words = line.replace("$method", "LRP").split()
        if words[:1] == ["python3"] and Path(words[1]).stem in COMMANDS:
            get_parser(Path(words[1]).stem).parse_args(words[2:])


def test_readme_is_short_and_says_how_to_start():
    assert len(README.read_text().splitlines()) <= 150
    wanted = {"make demo", "make test", "python3 heatmap.py --method IG"}
    assert wanted | {"python3 train_cv.py --path data.csv --device 0"} <= set(code(README))


@each_page
def test_links(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchors(file).count(anchor) == 1, target


def test_everything_in_docs_is_linked():
    linked = {(page.parent / target.partition("#")[0]).resolve() for page in PAGES for target in links(page)}
    assert set((ROOT / "docs").iterdir()) - linked == set()


def make_words(page: Path) -> list[str]:
    return [word for line in code(page) if line.startswith("make ") for word in line.split()[1:]]


def test_make():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.M)[0].split())
    variables = set(re.findall(r"^(\w+) *[:?]?=", makefile, re.M))
    said = [word.partition("=") for page in PAGES for word in make_words(page)]
    assert {word for word, sign, _ in said if not sign} <= targets
    assert {word for word, sign, _ in said if sign} <= variables
    assert targets <= set(make_words(CODE))


def test_map_of_the_code():
    (_, rows), *_ = tables(CODE)
    files = sorted(row[0].strip("`") for row in rows if row[0].endswith(".py`"))
    assert files == sorted(str(path.relative_to(ROOT)) for path in MODULES)


@each_page
def test_files_and_names_in_the_pages_exist(page):
    """`bench/device.py` is a file; `folded.convolve` is a function, class, constant or method there."""
    source = {path.stem: path.read_text() for path in MODULES}
    for word in " ".join(code(page)).split():
        if re.fullmatch(r"[\w/]+\.(py|md|txt|cff)", word) and word not in train_cv.FILES.summary:
            assert (ROOT / word).is_file(), word
        module, _, name = word.partition(".")
        if module in source and re.fullmatch(r"\w+", name) and name not in OUTPUTS:
            assert re.search(rf"^( *def |class )?{name}\b", source[module], re.M), word


@pytest.mark.parametrize("example", fences(CODE), ids=lambda text: text.split("\n")[0].strip('"'))
def test_examples_find_what_they_import(example):
    exec(compile(example, "example in docs/code.md", "exec"), {"__name__": "example"})
