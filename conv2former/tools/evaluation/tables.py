"""What the texts and tables of several tasks' evaluations share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import counted
from ..output import write_csv

__all__ = ["data_line", "write_class_table", "written"]


def data_line(row: dict[str, Any]) -> str:
    """Returns what a dense task is evaluated on."""
    processes = "" if row["processes"] == 1 else f", {row['processes']} processes"
    images, classes = counted(row["n"], "image"), counted(row["classes"], "class", "classes")
    return f"{row['data']}: {images}, {classes}, {row['precision']}{processes}"


def write_class_table(folder: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """Writes per_class.csv, and returns its path.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / "per_class.csv"
    write_csv(path, list(lines[0]), (["" if value is None else value for value in line.values()] for line in lines))
    return path


def written(rows: Sequence[dict[str, Any]], folder: Path | None) -> list[str]:
    """Returns lines that name the files of an evaluation; none where there are no files."""
    if not folder:
        return []
    files = [path for row in rows for path in row.get("files", {}).values()]
    names = [str(folder / "results.json"), str(folder / "results.csv"), *files]
    return ["", "written:", *(f"  {name}" for name in names)]
