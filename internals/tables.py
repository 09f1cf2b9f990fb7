"""Text tables read row by row, within bounds."""

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from internals import storage
from internals.errors import InputError

LONGEST_LINE = 2**16  # characters


def read_rows(file: Path) -> Iterator[list[str]]:
    """The rows of a CSV in UTF-8, one at a time, without the blank ones.

    Raises:
        InputError: no such file, or no such text; said when the iteration gets there.
    """
    storage.file_size(file, "CSV")
    try:
        with file.open(encoding="utf-8-sig") as stream:  # \r\n and \r become \n
            rows = csv.reader(_lines(stream), skipinitialspace=True, strict=True)
            yield from (row for row in rows if row not in ([], [""]))
    except (OSError, UnicodeError, csv.Error) as problem:
        raise InputError(f"cannot be read as a CSV ({problem})") from problem


def read_table(file: Path, columns: Sequence[str]) -> list[list[str]]:
    """The rows of a CSV below its header; InputError where that, or the number of cells, is another."""
    header, *rows = list(read_rows(file)) or [[]]
    if header != list(columns) or any(len(row) != len(columns) for row in rows):
        raise InputError(f"is damaged: expected the columns {', '.join(columns)}")
    return rows


def _lines(stream: TextIO) -> Iterator[str]:
    """The lines of a text; a longer one than any row of a CSV is not read to its end."""
    for number in itertools.count(1):
        line = stream.readline(LONGEST_LINE + 1)
        if len(line) > LONGEST_LINE:
            raise InputError(f"line {number} has more than {LONGEST_LINE} characters")
        if "\0" in line:
            raise InputError(f"line {number} has a NUL character; expected text")
        if not line:
            return
        yield line
