"""What every entry script shares: how it ends, its options, memory and seeds."""

import argparse
import contextlib
import ctypes
import functools
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import torch
from tqdm import tqdm

LONGEST = 8000  # characters of an error
# how PyTorch, cuDNN and cuBLAS say that memory does not suffice
SCARCE = "out of memory|can't allocate memory|_(ALLOC|ALLOCATION)_FAILED"
# and what cuDNN says where no algorithm's workspace fits, or either where it cannot even be set up
REFUSED = "[Uu]nable to find (a valid cuDNN|an engine)|_STATUS_NOT_INITIALIZED"


Main = TypeVar("Main", bound=Callable[..., int])


# Errors and options ------------------------------------------------------------------------------


class InputError(Exception):
    """A user's mistake: reported as one line, never as a traceback."""


class Failure(Exception):
    """A fault of neither user nor program, such as a full disk: reported as one line, too."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it before they kill."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose mistakes are one line (`InputError`) and whose help shows the defaults."""

    def __init__(self, docstring: str | None) -> None:
        super().__init__(description=docstring, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} -h)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


@contextlib.contextmanager
def naming(name: object) -> Iterator[None]:
    """Put the name of a file or option in front of any `InputError` raised inside."""
    try:
        yield
    except InputError as mistake:
        raise InputError(f"{name}: {mistake}") from mistake


def printable(text: str) -> str:
    """A message as one line that is safe to show: no control characters, and of bounded length.

    File names and CSV fields may hold what a terminal would obey, or what turns text around.
    """
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[:LONGEST])
    return line if len(text) <= LONGEST else f"{line} ..."


def command(saved: str) -> Callable[[Main], Main]:
    """Make what ends an entry script early one line on stderr and an exit status.

    2 for an `InputError`, 1 for a `Failure`, 130 for Ctrl-C and 143 for SIGTERM.

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
                line, status = f"interrupted: {saved}", 143 if isinstance(interrupt, Terminated) else 130
            print(printable(line), file=sys.stderr)
            return status

        return cast(Main, guarded)

    return guard


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM, so that it unwinds like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return

    def handler(*_: object) -> NoReturn:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises where a reading process ends with us
        raise Terminated

    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGCHLD)}
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        for name, former in before.items():
            signal.signal(name, former)


@contextlib.contextmanager
def enough(work: str, advice: str) -> Iterator[None]:
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


def number(
    kind: type[int] | type[float],
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Callable[[str], Any]:
    """An argparse type: a finite int or float within the given bounds."""
    bounds = [(at_least, ">="), (above, ">"), (at_most, "<="), (below, "<")]
    wanted = " and ".join(f"{sign} {bound:g}" for bound, sign in bounds if bound is not None)

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        inside = (
            np.isfinite(value)
            and (at_least is None or value >= at_least)
            and (above is None or value > above)
            and (at_most is None or value <= at_most)
            and (below is None or value < below)
        )
        if not inside:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not {'an integer' if kind is int else 'a number'} {wanted}".rstrip()
            )
        return value

    return parse


def progress(items: Iterable | None, total: int | None = None, **options: Any) -> tqdm:
    """A progress bar on stderr, silent where stderr is not a terminal."""
    return tqdm(items, total=total, disable=not sys.stderr.isatty(), dynamic_ncols=True, **options)


def choose_folds(wanted: list[int] | None, k: int) -> list[int]:
    """The folds to run: all, or those of --run-folds, in order and once each."""
    if wanted and max(wanted) >= k:
        raise InputError(f"--run-folds {max(wanted)}: the folds are numbered 0 to {k - 1}")
    return sorted(set(wanted)) if wanted else list(range(k))


# Memory and seeds --------------------------------------------------------------------------------


def hold_memory() -> None:
    """Let the C library keep freed memory for the next large tensor, where it is glibc's (Linux).

    It would otherwise return every tensor beyond 32 MiB to the kernel and have the next one cleared page
    by page: a sixth of a training step's time on a CPU.
    """
    mmap_threshold, trim_threshold, largest = -3, -1, 2**31 - 1  # of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, largest)
        mallopt(trim_threshold, largest)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (every device) and ask cuDNN for reproducible algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def fold_seed(seed: int, fold: int) -> int:
    """A seed of a fold's own, so that a fold comes out the same whichever others are run."""
    return int(np.random.SeedSequence([seed, fold]).generate_state(1)[0])


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
