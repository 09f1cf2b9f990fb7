"""process.py: how a command ends, memory that does not suffice, states of random generators."""

import os
import random
import signal
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from cohorts import contents

from internals import process, storage
from internals.errors import Failure, InputError


def ended(work: Any, *argv: str) -> int:
    """The status of a command that does some work, or raises an error."""

    @process.command("all is saved")
    def main(argv: list[str] | None = None) -> int:
        """Say how many."""
        return (Mock(side_effect=work)() or 0) + len(argv or [])

    assert main.__doc__ == "Say how many."
    return main(list(argv))


@pytest.mark.parametrize(
    ("end", "status", "line"),
    [
        (lambda: 1, 3, ""),
        (InputError("--batch 0:\n  expected   more"), 2, "error: --batch 0: expected more\n"),
        # as a process of PyTorch's that reads scans sends it
        (InputError("Caught ...\nTrace:\ninternals.errors.InputError: a.nii: bad"), 2, "error: a.nii: bad\n"),
        (Failure("disk\nfull"), 1, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "interrupted: all is saved\n"),
    ],
)
def test_command_says_in_one_line_how_it_ended(capsys, end, status, line):
    assert ended(end, "a", "b") == status
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("fault", [ValueError, KeyError, RuntimeError, FileNotFoundError])
def test_command_lets_a_fault_of_the_program_through(fault):
    with pytest.raises(fault, match="deep inside"):
        ended(fault("deep inside"))


def send(*numbers: int) -> None:
    """Signals to this very process, as batch systems send them."""
    for number in numbers:
        os.kill(os.getpid(), number)


STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 138}


@pytest.mark.parametrize(("number", "status"), STATUS.items())
def test_command_unwinds_on_a_signal_and_restores_its_handler(capsys, tmp_path, number, status):
    before = signal.getsignal(number)

    def work() -> None:
        with storage.atomic_write(tmp_path / "a.csv") as partial:
            partial.write_text("half")
            send(number)

    assert ended(work) == status
    assert capsys.readouterr().err == "interrupted: all is saved\n"
    assert contents(tmp_path) == {}
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "status"), STATUS.items())
def test_a_step_is_finished_before_a_signal_ends_the_command(capfd, number, status):
    done = []

    def work() -> None:
        for step in range(5):
            with process.step() as is_last:
                assert not is_last()
                if step == 1:
                    send(number)
                    assert is_last()
                done.append(step)

    assert ended(work) == status
    assert done == [0, 1]
    name = signal.Signals(number).name
    first = f"{name}: this step is finished and saved first; again ends it at once\n"
    assert capfd.readouterr().err == f"{first}interrupted: all is saved\n"


def test_a_second_signal_ends_a_step_at_once_and_so_does_ctrl_c():
    done = []

    def work(*numbers: int) -> None:
        with process.step():
            send(*numbers)
            done.append(numbers)

    assert ended(lambda: work(signal.SIGUSR1, signal.SIGTERM)) == 143
    assert ended(lambda: work(signal.SIGINT)) == 130
    assert done == []
    assert ended(lambda: work()) == 0  # what came before is forgotten
    assert done == [()]


def test_an_error_in_a_step_comes_before_a_signal(capfd):
    def work() -> None:
        with process.step():
            send(signal.SIGTERM)
            raise InputError("a.nii: bad")

    assert ended(work) == 2
    assert "a.nii: bad" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\n b\t  c", "a b c"), ("\x1b[31mred\x07", "\\x1b[31mred\\x07"), ("\u202egnp.exe", "\\u202egnp.exe"),
     ("\udcff", "\\udcff"), ("süß 脳 {0} %s", "süß 脳 {0} %s"),
     ("x" * 10**6, "x" * process.LONGEST + " ...")],
    ids=range(6),
)  # fmt: skip
def test_what_is_shown_is_harmless_and_not_endless(text, line):
    assert process.printable(text) == line


# Memory ------------------------------------------------------------------------------------------

ADVICE = "lower --batch"
SCARCE = f"out of memory; {ADVICE}"
REFUSED = f"refused, mostly for want of memory; {ADVICE}; `make device`"


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: torch.empty(2**60, dtype=torch.uint8), SCARCE),
        (lambda: np.empty(2**60, np.uint8), SCARCE),
        # in the words of PyTorch, cuDNN and cuBLAS, which raise no class of their own for it
        ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 15.77 GiB", SCARCE),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", SCARCE),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", SCARCE),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", SCARCE),
        # which may have other reasons
        ("Unable to find a valid cuDNN algorithm to run convolution", REFUSED),
        ("GET was unable to find an engine to execute this computation", REFUSED),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", REFUSED),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", "that reads scans ended; lower --workers"),
    ],
    ids=range(10),
)
def test_memory_that_does_not_suffice_is_a_failure(work, words):
    work = Mock(side_effect=RuntimeError(work)) if isinstance(work, str) else work
    with pytest.raises(Failure, match=f"^a batch: .*{words}"), process.out_of_memory("a batch", ADVICE):
        work()


def test_other_faults_are_no_failures():
    with pytest.raises(RuntimeError, match="inconsistent"), process.out_of_memory("a batch", ADVICE):
        torch.ones(2) @ torch.ones(3)


# Random generators -------------------------------------------------------------------------------


def test_random_states_come_back():
    def draw() -> list[float]:
        return [random.random(), np.random.random(), torch.rand(()).item()]

    states = process.random_states(torch.device("cpu"))
    first = draw()
    assert all(a != b for a, b in zip(draw(), first, strict=True))
    process.restore_random(states, torch.device("cpu"))
    assert draw() == first
