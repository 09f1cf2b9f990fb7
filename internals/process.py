"""One process: how it ends, what it does with memory, and its random generators."""

import contextlib
import ctypes
import functools
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import numpy as np
import torch

from internals.errors import Failure, InputError

LONGEST = 8000  # characters of an error
STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # as batch systems send them before they kill
# how PyTorch, cuDNN and cuBLAS say that memory does not suffice
SCARCE = "out of memory|can't allocate memory|_(ALLOC|ALLOCATION)_FAILED"
# and what cuDNN says where no algorithm's workspace fits, or either where it cannot even be set up
REFUSED = "[Uu]nable to find (a valid cuDNN|an engine)|_STATUS_NOT_INITIALIZED"


Main = TypeVar("Main", bound=Callable[..., int])


# How it ends ---------------------------------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """A signal that batch systems send before they kill: SIGTERM or SIGUSR1."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number  # as a shell would report it


def command(saved: str) -> Callable[[Main], Main]:
    """Make what ends an entry script early one line on stderr and an exit status.

    2 for an `InputError`, 1 for a `Failure`, 130 for Ctrl-C, 138 for SIGUSR1 and 143 for SIGTERM.

    Args:
        saved: what an interrupted command has saved, and how it goes on.
    """

    def guard(main: Main) -> Main:
        @functools.wraps(main)
        def guarded(argv: list[str] | None = None) -> int:
            try:
                with _termination():
                    status = main(argv)
                    sys.stdout.flush()
                    return status
            except InputError as mistake:
                # one that was raised while a process of PyTorch's read scans comes with a traceback as text
                line, status = f"error: {str(mistake).rpartition('InputError: ')[2]}", 2
            except Failure as fault:
                line, status = f"error: {fault}", 1
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
                line, status = f"error: standard output was closed; {saved}", 1
            except KeyboardInterrupt as interrupt:
                line, status = f"interrupted: {saved}", getattr(interrupt, "status", 130)
            print(printable(line), file=sys.stderr)
            return status

        return cast(Main, guarded)

    return guard


class _Steps:
    """Whether work is under way whose steps are worth waiting for, and the signal that came meanwhile."""

    under_way = False
    signal: int | None = None


@contextlib.contextmanager
def steps(save: Callable[[], None] = lambda: None) -> Iterator[Callable[[], None]]:
    """Long work in steps: the first SIGTERM or SIGUSR1 waits until a step is finished, the next one does not.

    Args:
        save: called then, where the steps do not save what they do themselves.

    Yields:
        What is to be called whenever a step is finished.

    Raises:
        Terminated: there, or at the end, where such a signal came.
    """

    def finish_step() -> None:
        if _Steps.signal is not None:
            save()
            raise Terminated(_Steps.signal)

    _Steps.under_way, _Steps.signal = True, None
    try:
        yield finish_step
        finish_step()
    finally:
        _Steps.under_way = False


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM and SIGUSR1, so that they unwind like Ctrl-C; `steps` are waited for."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return

    def handler(number: int, frame: object) -> None:
        if _Steps.under_way and _Steps.signal is None:
            _Steps.signal = number
            said = (
                f"{signal.Signals(number).name}: this step is finished and saved first; again ends it at once"
            )
            with contextlib.suppress(OSError):  # not by print, which the signal may have interrupted
                os.write(2, f"{said}\n".encode())
            return
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises where a reading process ends with us
        raise Terminated(number)

    before = {name: signal.getsignal(name) for name in (*STOPPING, signal.SIGCHLD)}
    for name in STOPPING:
        signal.signal(name, handler)
    try:
        yield
    finally:
        for name, former in before.items():
            signal.signal(name, former)


def printable(text: str) -> str:
    """A message as one line that is safe to show: no control characters, and of bounded length.

    File names and CSV fields may hold what a terminal would obey, or what turns text around.
    """
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[:LONGEST])
    return line if len(text) <= LONGEST else f"{line} ..."


# Memory ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def out_of_memory(work: str, advice: str) -> Iterator[None]:
    """Turn memory that does not suffice, or a reading process that was killed, into a `Failure`.

    Args:
        work: what is done, and its size.
        advice: what to lower.
    """
    try:
        yield
    except MemoryError as problem:
        raise Failure(f"{work}: out of memory; {advice}") from problem
    except RuntimeError as problem:  # PyTorch's, by their words: on a CPU they have no class of their own
        if re.search(SCARCE, str(problem)):
            raise Failure(f"{work}: out of memory; {advice} ({problem})") from problem
        if re.search(REFUSED, str(problem)):
            raise Failure(
                f"{work}: cuDNN or cuBLAS refused, mostly for want of memory; {advice}; `make device` checks "
                f"this machine ({problem})"
            ) from problem
        if "DataLoader worker (pid" in str(problem):
            raise Failure(
                f"{work}: a process that reads scans ended; lower --workers ({problem})"
            ) from problem
        raise


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next large tensor, where it is glibc's (Linux).

    It would otherwise return every tensor beyond 32 MiB to the kernel and have the next one cleared page
    by page: a sixth of a training step's time on a CPU.
    """
    mmap_threshold, trim_threshold, largest = -3, -1, 2**31 - 1  # of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, largest)
        mallopt(trim_threshold, largest)


# Random generators --------------------------------------------------------------------------------


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all random generators that `seed_everything` seeds, as tensors and plain numbers."""
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy = (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest)
    states = {"python": random.getstate(), "numpy": numpy, "cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(*_number(device))
    return states


def restore_random(states: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_states` returned; a device of another type keeps the state it has."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], *_number(device))


def _number(device: torch.device) -> list[torch.device]:
    """The argument that tells one device of a type from another, where there may be several."""
    return [device] if device.type == "cuda" else []
