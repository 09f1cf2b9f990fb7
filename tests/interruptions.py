"""How tests end a command before its time."""

import itertools
import os
import signal
from typing import Any

import pytest


def interrupt(*_: object) -> None:
    """Ctrl-C, which waits for nothing; a command ends with status 130."""
    os.kill(os.getpid(), signal.SIGINT)


def ends_after(patch: pytest.MonkeyPatch, place: Any, step: str, call: int) -> None:
    """Have Ctrl-C come at the end of a function's n-th call."""
    honest, calls = getattr(place, step), itertools.count(1)

    def interrupted(*args: Any) -> Any:
        result = honest(*args)
        if next(calls) == call:
            interrupt()
        return result

    patch.setattr(place, step, interrupted)
