"""Names that nobody means well, and what must be true of all that is written for people where they occur."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from conv2former.text import printable

FORGED = "error: disk full"
NAMES = [
    f"cat\n{FORGED}",
    "\x1b]0;title\x07\x1b[31mred\r",
    f"txt\u202egpj\u2066\u200b\u2028{FORGED}",
    "=1+cmd' C calc'!A0",
    "$\\frac{1}{0$",
    "bad \udcff byte",
    "x" * 180,
]
_NUMBER = re.compile(r"-?[0-9.]+(e[-+]?[0-9]+)?")


def faults_of(text: str) -> list[str]:
    """Returns what a text that people read must not have: what a terminal obeys, and lines that nobody has written."""
    lines = re.split(r"\r?\n", text)
    raw = [line for line in lines if printable(line) != line]
    return raw + [line for line in lines if line.strip().startswith((FORGED, "error: forged"))]


def faults_in(folder: Path) -> list[str]:
    """Returns the same of the files in a folder: logs, tables, JSON, YAML and Markdown; formulas in cells, too."""
    faults = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".log", ".csv", ".json", ".jsonl", ".yaml", ".md", ".txt") or not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8")  # strictly
        found = faults_of(text)
        if path.suffix == ".csv":
            cells = [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
            found += [cell for cell in cells if cell[:1] in ("=", "+", "-", "@") and not _NUMBER.fullmatch(cell)]
        faults += [f"{path.name}: {fault!r}" for fault in found]
    return faults
