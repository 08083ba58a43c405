"""Text of a given width, for terminals and pictures."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["clipped", "columns_of", "shown", "without_controls"]

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but line ends and tabs


def without_controls(text: str) -> str:
    """Returns text in which what could move a terminal's cursor or colour it is escaped: names come from files."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def columns_of(text: str) -> int:
    """Returns how wide a text is on a terminal, in columns: Chinese letters have two, accents and joiners none."""
    if text.isascii():
        return len(text)
    seen = [c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf")]
    return len(seen) + sum(unicodedata.east_asian_width(c) in "WF" for c in seen)


def clipped(text: str, columns: int, keep_end: bool = False) -> str:
    """Returns text of at most so many columns, Chinese letters two wide; `keep_end` cuts the start."""
    if columns_of(text) <= columns:
        return text
    taken, room = "", columns - 1
    for character in reversed(text) if keep_end else text:
        room -= columns_of(character)
        if room < 0:
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
