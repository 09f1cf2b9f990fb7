"""utils.py: options, threads, seeds."""

import argparse
import random
import threading

import numpy as np
import pytest
import torch

import utils
from internals.errors import InputError

# Options -----------------------------------------------------------------------------------------


def test_parser_mistakes_are_input_errors():
    parser = utils.ArgumentParser("A command.")
    parser.add_argument("--batch", type=utils.bounded(int, at_least=1), default=5, help="scans at once")
    for argv, word in [(["--batch", "0"], "--batch"), (["--other"], "--other"), (["--bat", "3"], "--bat")]:
        with pytest.raises(InputError, match=word):
            parser.parse_args(argv)
    parser.add_argument("--delta", default=0, help="smallest fall")
    parser.add_argument("--flag", action="store_true", help="off unless given")
    said = parser.format_help()
    assert "(default: 5)" in said
    assert "(default: 0)" in said
    assert said.count("default") == 2


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [({"kind": int}, "-3", -3), ({"kind": int, "at_least": 1}, "1", 1), ({"kind": int, "at_most": 4}, "4", 4),
     ({"kind": float, "above": 0}, "1e-4", 1e-4), ({"kind": float, "at_least": 0}, "0", 0.0),
     ({"kind": float, "above": 0, "below": 1}, "0.99", 0.99)],
)  # fmt: skip
def test_number(options, text, expected):
    value = utils.bounded(**options)(text)
    assert value == expected
    assert type(value) is options["kind"]


@pytest.mark.parametrize(
    ("options", "text", "wanted"),
    [({"kind": int, "at_least": 1}, "0", "an integer >= 1"), ({"kind": int}, "1.5", "an integer"),
     ({"kind": int}, "one", "an integer"), ({"kind": int, "at_most": 4}, "5", "an integer <= 4"),
     ({"kind": float, "above": 0}, "0", "a number > 0"), ({"kind": float}, "nan", "a number"),
     ({"kind": float}, "inf", "a number"), ({"kind": float, "above": 0}, "-inf", "a number > 0"),
     ({"kind": float, "above": 0, "below": 1}, "1", "a number > 0 and < 1"),
     ({"kind": float}, "", "a number")],
)  # fmt: skip
def test_number_out_of_bounds(options, text, wanted):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        utils.bounded(**options)(text)
    assert str(error.value) == f"'{text}' is not {wanted}"


def test_folds_that_are_chosen(capsys):
    utils.say_kept([0, 2, 5], [2])
    assert capsys.readouterr().out == "fold 0: finished before, kept\nfold 5: finished before, kept\n"
    chosen = [utils.choose_folds(wanted, 3) for wanted in (None, [2, 0, 2], [0])]
    assert chosen == [[0, 1, 2], [0, 2], [0]]
    with pytest.raises(InputError, match=r"--run-folds 3.*0 to 2"):
        utils.choose_folds([0, 3], 3)


# Threads and seeds -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "scans"])
def test_threads_work_at_once_and_answer_in_order(capsys, name):
    both = threading.Barrier(2, timeout=60)  # passed by two at once only

    def square(number: int) -> int:
        both.wait()
        return number**2

    assert utils.in_threads(square, range(6), name, threads=2) == [0, 1, 4, 9, 16, 25]
    assert capsys.readouterr().err == ""  # which is no terminal here


def test_folds_have_seeds_of_their_own():
    seeds, again = ([utils.own_seed(seed, fold) for seed in range(3) for fold in range(5)] for _ in "12")
    assert len(set(seeds)) == 15
    assert again == seeds
    assert all(0 <= seed < 2**32 for seed in seeds)


def drawn(seed: int) -> tuple[float, float, float]:
    utils.seed_everything(seed)
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_seed_sets_every_generator():
    first, second, again = map(drawn, (7, 8, 7))
    assert again == first
    assert all(a != b for a, b in zip(first, second, strict=True))
    utils.seed_everything(2**32 + 7)  # a seed beyond numpy's is no reason to fail
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
