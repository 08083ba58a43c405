"""Prints lines for people. Nothing in a name, wherever it comes from, begins a line or moves the cursor."""

from __future__ import annotations

import sys
from typing import TextIO

from .text import printable

__all__ = ["encodable", "print_lines"]


def print_lines(*lines: str, file: TextIO | None = None) -> None:
    """Prints lines at once.

    Args:
        *lines: each is one line: a line end inside it is escaped, as all that `printable` escapes.
        file: standard output unless given.
    """
    file = file or sys.stdout
    print(encodable(lines, file), file=file, flush=True)


def encodable(lines: tuple[str, ...], file: TextIO) -> str:
    """Returns lines as one `printable` text in which characters that `file` cannot encode, as in ASCII, are escaped."""
    text = "\n".join(map(printable, lines))
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
