"""What a command can end with that is no fault of the program."""

import contextlib
from collections.abc import Iterator


class InputError(Exception):
    """A user's mistake: reported as one line, never as a traceback."""


class Failure(Exception):
    """A fault of neither user nor program, such as a full disk: reported as one line, too."""


@contextlib.contextmanager
def blaming(name: object) -> Iterator[None]:
    """Put the name of a file or option in front of any `InputError` raised inside."""
    try:
        yield
    except InputError as mistake:
        raise InputError(f"{name}: {mistake}") from mistake
