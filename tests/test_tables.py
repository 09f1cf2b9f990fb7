"""tables.py: rows of text, within bounds."""

import os
import re
from pathlib import Path

import pytest

from internals import tables
from internals.errors import InputError


def rows(folder: Path, text: str, encoding: str = "utf-8") -> list[list[str]]:
    (folder / "a.csv").write_bytes(text.encode(encoding))
    return list(tables.read_rows(folder / "a.csv"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\nc,d\n", [["a", "b"], ["c", "d"]]),
        ("a,b\r\nc,d", [["a", "b"], ["c", "d"]]),
        ("\n\na, b \n\n\n c\n", [["a", "b "], ["c"]]),
        (',\n""\n"a, ""b"""\n', [["", ""], ['a, "b"']]),
        ("süß,é\n", [["süß", "é"]]),
        ("b" * (2**16 - 1) + "\n", [["b" * (2**16 - 1)]]),
        ("", []),
    ],
    ids=range(7),
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_rows(tmp_path, text, expected, encoding):
    assert rows(tmp_path, text, encoding) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,0\nb\0,1\n", "line 2 has a NUL character; expected text"),
        ('a,0\n"b,1\nc,0\n', "cannot be read as a CSV (unexpected end of data)"),
        ('"a"x,0\n', "cannot be read as a CSV"),
        ("a,0\n" + "b" * 2**16 + ",1\n", "line 2 has more than 65536 characters"),
        ("\udce9,0\n", "cannot be read as a CSV ('utf-8' codec"),
    ],
    ids=range(5),
)
def test_what_is_no_table(tmp_path, text, words):
    (tmp_path / "a.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=f"^{re.escape(words)}"):
        list(tables.read_rows(tmp_path / "a.csv"))


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")  # reading would wait
    for name, words in [
        ("none.csv", "no such CSV"),
        ("", "is a folder"),
        ("pipe.csv", "is a pipe or a device"),
    ]:
        with pytest.raises(InputError, match=words):
            next(tables.read_rows(tmp_path / name))


def test_rows_come_before_what_is_wrong(tmp_path):
    (tmp_path / "a.csv").write_text("a,0\nb\0,1\n")
    read = tables.read_rows(tmp_path / "a.csv")
    assert next(read) == ["a", "0"]
    with pytest.raises(InputError, match="NUL"):
        next(read)
