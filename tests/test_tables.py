"""tables.py: rows of text, within bounds."""

import os
import re

import pytest

from internals import tables
from internals.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\r\nc,d", [["a", "b"], ["c", "d"]]), ("\n\na, b \n\n\n c\n", [["a", "b "], ["c"]]),
        (',\n""\n"a, ""b"""\n', [["", ""], ['a, "b"']]), ("\ufeffsüß,é\n", [["süß", "é"]]), ("", []),
        ("b" * (2**16 - 1) + "\n", [["b" * (2**16 - 1)]]),
    ],
    ids=range(6),
)  # fmt: skip
def test_rows(tmp_path, text, expected):
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert list(tables.read_rows(tmp_path / "a.csv")) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("b\0,1\n", "line 2 has a NUL character; expected text"),
        ('"b,1\nc,0\n', "cannot be read as a CSV (unexpected end of data)"),
        ('"b"x,0\n', "cannot be read as a CSV"),
        ("b" * 2**16 + ",1\n", "line 2 has more than 65536 characters"),
    ],
    ids=range(4),
)
def test_rows_come_before_what_is_wrong(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(f"a,0\n{text}")
    read = tables.read_rows(tmp_path / "a.csv")
    assert next(read) == ["a", "0"]
    with pytest.raises(InputError, match=f"^{re.escape(words)}"):
        next(read)


def test_what_is_no_file_or_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")  # reading would wait
    (tmp_path / "latin.csv").write_bytes(b"\xe9,0\n")
    wrong = {"none.csv": "no such CSV", "": "is a folder", "pipe.csv": "is a pipe or a device"}
    for name, words in (wrong | {"latin.csv": "cannot be read as a CSV .'utf-8' codec"}).items():
        with pytest.raises(InputError, match=words):
            next(tables.read_rows(tmp_path / name))
