"""What of a name reaches terminals, logs, pictures and tables."""

from __future__ import annotations

import csv
import io
import pickle

import pytest

from conv2former.errors import DataError, TrainingError, UserError, bullets, closest, first_line, shorten
from conv2former.printing import print_lines
from conv2former.text import clipped, columns_of, from_table_cell, printable, table_cell

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # an emoji of three with joiners between
HOSTILE = [
    "\x1b]0;title\x07\x1b[31m\r\x9b",
    "cat\nerror: disk full",
    "cat\x85error: a",
    "cat\u2028error: b\u2029c\vd\fe",
    "txt.\u202egpj\u2066\u2069\u200b\ufeff\u00ad",
    "broken \udcff byte",
    "a\tb\0",
]
KEPT = ["a b ü 写 $", "caf\u00e9", "क\u200dष", "\u0645\u06cc\u200c\u062e", FAMILY, "全角\u3000空白", "a\u00a0b", "\\n"]
CELLS = [
    "=1+1",
    "+cmd",
    "-x",
    "@SUM(A1)",
    "=",
    "\uff1d1",
    "$'a'",
    "$'it\\'s'",
    " a",
    "a\t",
    "a'b\\c\n",
    "\\x41\n",
    "$''",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_escaped(text):
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert clipped(text, 500) == shown


@pytest.mark.parametrize("text", KEPT)
def test_what_stays(text):
    assert printable(text) == text


def test_escapes_are_those_of_python():
    assert printable("a\n\x1b\u202e\U000e0041\udcff") == r"a\n\x1b\u202e\U000e0041\udcff"


def test_a_joiner_between_ascii_letters_hides_a_difference():
    assert printable("ca\u200dt") == r"ca\u200dt"
    assert printable("遇\U000e0041\u200d") == r"遇\U000e0041\u200d", "behind an escape, which ends in a digit"


def test_a_name_of_accents_alone_is_cut_too():
    assert len(clipped("a" + "\u0301" * 100_000, 20)) < 200
    assert columns_of(clipped("x" * 100_000, 20)) == 20


@pytest.mark.parametrize("text", ["", "a", "-1", "+0.5e-3", "a=b", "it's", "$5", *KEPT])
def test_cells_that_stay(text):
    assert table_cell(text) == text
    assert from_table_cell(text) == text


@pytest.mark.parametrize("text", [*HOSTILE, *CELLS, "-", "-1+1", "- 1"])
def test_cells_come_back_as_they_were(text):
    cell = table_cell(text)
    assert cell.startswith("$'")
    assert cell.isprintable()
    assert from_table_cell(cell) == text
    written = io.StringIO(newline="")
    csv.writer(written).writerow([cell])
    assert next(csv.reader([written.getvalue()])) == [cell]


@pytest.mark.parametrize("cell", ["$'", "$'a", "$'a'b'", "a$'b'"])
def test_foreign_cells_are_taken_as_they_are(cell):
    assert from_table_cell(cell) == cell


def test_no_escape_of_a_cell_is_beyond_unicode():
    assert from_table_cell(r"$'\Uffffffff\q'") == r"\Uffffffff\q"


@pytest.mark.parametrize("kind", [DataError, TrainingError])
def test_each_argument_of_an_error_is_one_line(kind):
    error = kind("a\nerror: b:", *bullets(["c\nerror: d", DataError("e\nf", "g")]))
    assert str(error) == "a\\nerror: b:\n  - c\\nerror: d\n  - e\\nf\n    g"
    assert str(error.below("file\n")) == "file\\n: " + "a\\nerror: b:\n  - c\\nerror: d\n  - e\\nf\n    g"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(kind()) == ""


def test_huge_names_are_cut():
    huge = "x" * 100_000
    assert len(str(UserError(huge))) < 11_000
    assert len(shorten([huge, huge])) < 500
    assert len(closest("a" * 30, ["a" * 29 + "b" * 20])) < 100
    assert len(first_line(ValueError(huge))) < 250


def test_what_other_libraries_say():
    assert first_line(ValueError("  a\nb")) == "a"
    assert first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_every_name_can_be_printed(encoding):
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding, newline="\n", write_through=True) as file:
        print_lines(*HOSTILE, "猫", "plain", file=file)
        lines = raw.getvalue().decode(encoding).split("\n")
    cat = "猫" if encoding == "utf-8" else r"\u732b"
    assert lines == [*map(printable, HOSTILE), cat, "plain", ""]
