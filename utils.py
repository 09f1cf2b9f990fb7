"""What the commands share: options, progress bars, threads and seeds."""

import argparse
import math
import random
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from internals.errors import Failure, InputError
from internals.process import command

__all__ = ["Failure", "InputError", "command"]

STATUS = "--status"
THREADS = 2  # that decode scans: at 1 mm each takes about 0.1 GB meanwhile

Item = TypeVar("Item")
Result = TypeVar("Result")


# Options -------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose mistakes are one line (`InputError`) and whose help shows the defaults."""

    def __init__(self, docstring: str | None) -> None:
        super().__init__(description=docstring, formatter_class=_HelpFormatter, allow_abbrev=False)

    def add_status(self) -> None:
        """Add --status, beside which no other option is required."""
        words = "print which folds are finished, running or open, and change nothing"
        self.add_argument(STATUS, action="store_true", help=words)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        for action in self._actions if STATUS in (sys.argv[1:] if args is None else args) else ():
            action.required = False
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} -h)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default is None or action.default is False  # 0 is said
        return action.help if unsaid else super()._get_help_string(action)


def bounded(
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
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            value, finite = math.nan, False
        inside = (
            finite
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


SEED = bounded(int, at_least=0, at_most=2**32 - 1)  # an argparse type


def choose_folds(wanted: list[int] | None, k: int) -> list[int]:
    """The folds to run: all, or those of --run-folds, in order and once each."""
    if wanted and max(wanted) >= k:
        raise InputError(f"--run-folds {max(wanted)}: the folds are numbered 0 to {k - 1}")
    return sorted(set(wanted)) if wanted else list(range(k))


def say_kept(chosen: list[int], missing: list[int], whose: str = "") -> None:
    """Print which of the chosen folds were finished before."""
    for fold in chosen:
        if fold not in missing:
            print(f"{whose}fold {fold}: finished before, kept")


def say_states(folder: Path, states: Mapping[str, str], whose: str = "") -> None:
    """Print what is finished, running or open in a folder."""
    print("\n".join(f"{whose}{name}: {state}" for name, state in states.items()) or f"{folder}: nothing yet")


# Progress and seeds ------------------------------------------------------------------------------


def progress(items: Iterable | None, total: int | None = None, **options: Any) -> tqdm:
    """A progress bar on stderr, silent where stderr is not a terminal."""
    return tqdm(items, total=total, disable=not sys.stderr.isatty(), dynamic_ncols=True, **options)


def in_threads(
    work: Callable[[Item], Result], items: Collection[Item], name: str = "", threads: int = THREADS
) -> list[Result]:
    """Apply `work` to every item in threads; the results in the items' order. A name shows a progress bar."""
    shown = {"desc": name, "disable": not (name and sys.stderr.isatty()), "dynamic_ncols": True}
    return thread_map(work, items, max_workers=threads, total=len(items), **shown)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (every device) and ask cuDNN for reproducible algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def own_seed(seed: int, *numbers: int) -> int:
    """A seed of a fold's or scan's own, so that it comes out the same whichever others are run."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0])
