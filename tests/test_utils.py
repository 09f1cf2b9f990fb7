"""utils.py: how a command ends, options, seeds."""

import argparse
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from cohorts import contents, only_error

import utils
from internals import process, storage
from internals.errors import Failure, InputError, blaming

SHAPE = (4, 5, 6)
ROOT = Path(__file__).resolve().parents[1]


# Errors and options ------------------------------------------------------------------------------


def test_command_turns_a_mistake_into_one_line(capsys):
    @utils.command("all is saved")
    def main(argv: list[str] | None = None) -> int:
        raise InputError("--batch 0:\n  expected   more")

    assert main([]) == 2
    captured = capsys.readouterr()
    assert only_error(captured.err) == "error: --batch 0: expected more\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n b\t  c", "a b c"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udcff", "\\udcff"),
        ("süß 脳 {0} %s", "süß 脳 {0} %s"),
    ],
)
def test_what_is_shown_is_harmless(text, line):
    assert process.printable(text) == line


def test_what_is_shown_is_not_endless():
    assert len(process.printable("x" * 10**6)) < 2 * process.LONGEST


def test_naming_puts_a_name_in_front_of_a_mistake_alone():
    with pytest.raises(InputError, match=r"^--mask a: is empty$"), blaming("--mask a"):
        raise InputError("is empty")
    with pytest.raises(ValueError, match=r"^a fault$"), blaming("--mask a"):
        raise ValueError("a fault")


def test_command_passes_the_status_and_the_arguments():
    @utils.command("all is saved")
    def main(argv: list[str] | None = None) -> int:
        """Say how many."""
        return len(argv or [])

    assert main(["a", "b", "c"]) == 3
    assert main() == 0
    assert main.__doc__ == "Say how many."


@pytest.mark.parametrize(
    ("end", "status", "line"),
    [
        (Failure("disk\nfull"), 1, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "interrupted: all is saved\n"),
    ],
)
def test_command_says_in_one_line_how_it_ended(capsys, end, status, line):
    @utils.command("all is saved")
    def main(argv: list[str] | None = None) -> int:
        raise end

    assert main([]) == status
    assert capsys.readouterr().err == line


def test_command_unwinds_on_sigterm_and_restores_its_handler(capsys, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    @utils.command("all is saved")
    def main(argv: list[str] | None = None) -> int:
        with storage.whole_file(tmp_path / "a.csv") as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
        return 0

    assert main([]) == 143
    assert capsys.readouterr().err == "interrupted: all is saved\n"
    assert contents(tmp_path) == {}
    assert signal.getsignal(signal.SIGTERM) is before


def test_memory_that_does_not_suffice_is_a_failure():
    with (
        pytest.raises(Failure, match=r"a batch: out of memory; lower --batch"),
        process.out_of_memory("a batch", "lower --batch"),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(Failure, match=r"a kernel: out of memory"), process.out_of_memory("a kernel", "mask"):
        np.empty(2**60, np.uint8)
    with pytest.raises(RuntimeError, match="inconsistent"), process.out_of_memory("a batch", "lower --batch"):
        torch.ones(2) @ torch.ones(3)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    ],
)
def test_memory_that_does_not_suffice_on_a_gpu_is_a_failure(words):
    """In the words of PyTorch, cuDNN and cuBLAS, which raise no class of their own for it."""
    with pytest.raises(Failure, match="lower --batch"), process.out_of_memory("a batch", "lower --batch"):
        raise RuntimeError(words)


@pytest.mark.parametrize(
    "words",
    [
        "Unable to find a valid cuDNN algorithm to run convolution",
        "GET was unable to find an engine to execute this computation",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ],
)
def test_a_refusal_that_may_have_other_reasons_says_so(words):
    with (
        pytest.raises(Failure, match=r"refused, mostly for want of memory; lower --batch; `make device`"),
        process.out_of_memory("a batch", "lower --batch"),
    ):
        raise RuntimeError(words)


def test_random_states_come_back():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    utils.seed_everything(1)
    states = process.random_states(torch.device("cpu"))
    first = draw()
    assert draw() != first
    process.restore_random(states, torch.device("cpu"))
    assert draw() == first


@pytest.mark.parametrize("fault", [ValueError, KeyError, RuntimeError, FileNotFoundError])
def test_command_lets_a_fault_of_the_program_through(fault):
    @utils.command("all is saved")
    def main(argv: list[str] | None = None) -> int:
        raise fault("deep inside")

    with pytest.raises(fault, match="deep inside"):
        main([])


def test_parser_mistakes_are_input_errors():
    parser = utils.ArgumentParser("A command.")
    parser.add_argument("--batch", type=utils.bounded(int, at_least=1), default=5, help="scans at once")
    for argv, word in [(["--batch", "0"], "--batch"), (["--other"], "--other"), (["--bat", "3"], "--bat")]:
        with pytest.raises(InputError, match=word):
            parser.parse_args(argv)
    assert "(default: 5)" in parser.format_help()


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({"kind": int}, "-3", -3),
        ({"kind": int, "at_least": 1}, "1", 1),
        ({"kind": int, "at_most": 4}, "4", 4),
        ({"kind": float, "above": 0}, "1e-4", 1e-4),
        ({"kind": float, "at_least": 0}, "0", 0.0),
        ({"kind": float, "above": 0, "below": 1}, "0.99", 0.99),
    ],
)
def test_number(options, text, expected):
    value = utils.bounded(**options)(text)
    assert value == expected
    assert type(value) is options["kind"]


@pytest.mark.parametrize(
    ("options", "text", "words"),
    [
        ({"kind": int, "at_least": 1}, "0", "'0' is not an integer >= 1"),
        ({"kind": int, "at_least": 1}, "1.5", "'1.5' is not an integer >= 1"),
        ({"kind": int}, "one", "'one' is not an integer"),
        ({"kind": int, "at_most": 4}, "5", "<= 4"),
        ({"kind": float, "above": 0}, "0", "'0' is not a number > 0"),
        ({"kind": float}, "nan", "'nan' is not a number"),
        ({"kind": float}, "inf", "'inf' is not a number"),
        ({"kind": float, "above": 0}, "-inf", "> 0"),
        ({"kind": float, "above": 0, "below": 1}, "1", "> 0 and < 1"),
        ({"kind": float}, "", "'' is not a number"),
    ],
)
def test_number_out_of_bounds(options, text, words):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        utils.bounded(**options)(text)
    assert words in str(error.value)


def test_choose_folds():
    assert utils.choose_folds(None, 3) == [0, 1, 2]
    assert utils.choose_folds([2, 0, 2], 3) == [0, 2]
    assert utils.choose_folds([0], 3) == [0]
    with pytest.raises(InputError, match=r"--run-folds 3.*0 to 2"):
        utils.choose_folds([0, 3], 3)


# Seeds -------------------------------------------------------------------------------------------


def test_seed_sets_every_generator():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    utils.seed_everything(7)
    first = draw()
    utils.seed_everything(8)
    second = draw()
    utils.seed_everything(7)
    assert draw() == first
    assert all(a != b for a, b in zip(first, second, strict=True))
    utils.seed_everything(2**32 + 7)  # a seed beyond numpy's is no reason to fail
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
