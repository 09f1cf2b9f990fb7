"""How tests end a command before its time."""

import itertools
import os
import signal
from typing import Any

import pytest


def terminate(*_: object) -> None:
    """SIGTERM, as batch systems send it."""
    os.kill(os.getpid(), signal.SIGTERM)


def ends_after(patch: pytest.MonkeyPatch, place: Any, step: str, call: int) -> None:
    """Have SIGTERM come at the end of a function's n-th call."""
    honest, calls = getattr(place, step), itertools.count(1)

    def interrupted(*args: Any) -> Any:
        result = honest(*args)
        if next(calls) == call:
            terminate()
        return result

    patch.setattr(place, step, interrupted)
