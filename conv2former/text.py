"""Text for terminals, pictures and tables: safe to show, and of a given width.

Names of files, classes, tensors and keys come from whoever made the files. None may move a terminal's cursor, colour
it, turn the reading direction, begin a line of its own or be a formula of a spreadsheet. What writes text for people
asks `printable` or `table_cell`; JSON and YAML escape by themselves.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["clipped", "columns_of", "from_table_cell", "printable", "shown", "table_cell"]

_JOINERS = "\u200c\u200d"  # Hindi, Persian and emoji need them
_FORMULA = re.compile(r"[=+\-@\uff1d\uff0b\uff0d\uff20]")  # what spreadsheets compute, or run; also in full width
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_QUOTED = re.compile(r"\$'((?:[^\\']|\\.)*)'", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|([nrt\\']))")
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}


def printable(text: str) -> str:
    r"""Returns text that is safe in one line of a terminal, a log or a picture.

    Line ends, control and format characters (Unicode's categories Cc, Cf, Zl and Zp), bytes of names that are no UTF-8
    (Cs), and code points without a meaning (Co, Cn) are escaped as Python does, `\n` and `\u202e`. Blanks of any
    width stay, and so do the two joiners after a letter that is not ASCII: scripts and emoji need them there, and
    between ASCII letters they only hide that two names differ.
    """
    if text.isprintable():
        return text
    shown = [" "]
    for character in text:  # a joiner is judged by what stands before it now, which may be an escape
        shown.append(character if _is_harmless(character, shown[-1][-1]) else _escaped(character))
    return "".join(shown[1:])


def _is_harmless(character: str, before: str) -> bool:
    if character in _JOINERS:
        return not before.isascii()
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def table_cell(text: str) -> str:
    """Returns text for a cell of a CSV file, as it is unless that would do harm; then quoted as in a shell, `$'...'`.

    Quoted is what a spreadsheet takes for a formula, such as `=1+1` but not the number `-1`, what `printable` would
    change, and what begins or ends with a blank. `from_table_cell` gives the text back, whatever it was.
    """
    is_formula = _FORMULA.match(text) and not _NUMBER.fullmatch(text)
    if not is_formula and text == text.strip() and printable(text) == text and not _QUOTED.fullmatch(text):
        return text
    return "$'" + printable(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def from_table_cell(cell: str) -> str:
    """Returns the text that `table_cell` made a cell of; other cells as they are."""
    quoted = _QUOTED.fullmatch(cell)
    return _ESCAPE.sub(_unescaped, quoted[1]) if quoted else cell


def _unescaped(escape: re.Match[str]) -> str:
    code = escape[1] or escape[2] or escape[3]
    if not code:
        return _LETTERS.get(escape[4], escape[4])
    return chr(int(code, 16)) if int(code, 16) < 0x110000 else escape[0]


def columns_of(text: str) -> int:
    """Returns how wide a text is on a terminal, in columns: Chinese letters have two, accents and joiners none."""
    if text.isascii():
        return len(text)
    seen = [c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf")]
    return len(seen) + sum(unicodedata.east_asian_width(c) in "WF" for c in seen)


def clipped(text: str, columns: int, keep_end: bool = False) -> str:
    """Returns `printable` text of at most so many columns, Chinese letters two wide; `keep_end` cuts the start."""
    text, most = printable(text), 8 * columns  # characters: a name can have any number of accents, without a width
    if columns_of(text) <= columns and len(text) <= most:
        return text
    taken, room = "", columns - 1
    for character in reversed(text) if keep_end else text:
        room -= columns_of(character)
        if room < 0 or len(taken) >= most:
            break
        taken = character + taken if keep_end else taken + character
    return "…" + taken if keep_end else taken + "…"


def shown(value: object, limit: int = 80) -> str:
    """Returns a value from a file as an error shows it: as Python writes it, cut if that is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4300 digits, and no list in 1000 lists
        return f"a very long {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."
