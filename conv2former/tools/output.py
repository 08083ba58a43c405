"""What tools write and show: files that appear whole or not at all, pictures, tables."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError
from ..text import columns_of, printable, table_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_writable", "replacing", "save_figure", "text_table", "write_csv"]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and puts what is written there in its place if all goes well.

    The folder is made if need be. After an error neither the temporary file nor folder is left, and `path` is as it
    was.

    Args:
        path: a file to write, or a folder to fill; a folder that is not empty is not replaced.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:50]}-") as folder:
            temporary = Path(folder) / path.name  # the ending tells some writers the format
            yield temporary
            if temporary.exists():
                os.replace(temporary, path)
    except BrokenPipeError:  # of the terminal, not of the file
        raise
    except OSError as e:
        raise OutputError(f"{path} cannot be written ({e.strerror or e})") from None


def check_writable(path: str | Path) -> None:
    """Checks that a file could be written, before the work whose result it is to hold.

    Raises:
        OutputError: it could not; nothing has changed but for folders above it, which are made.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give a file name")
    with replacing(path) as temporary:
        temporary.with_name(".test").touch()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a picture whole or not at all; the ending of `path` is its format.

    Raises:
        OutputError: it cannot be written.
    """
    from ..engine.fonts import drawing  # not above: the engine needs packages that tables and files do not

    with replacing(path) as temporary, drawing(figure):
        figure.savefig(temporary)


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file in UTF-8, whole or not at all; its texts are `table_cell`s, numbers are as they are.

    Raises:
        OutputError: it cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for row in (header, *rows):
            writer.writerow([table_cell(value) if isinstance(value, str) else value for value in row])


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table of `printable` cells for a terminal, the first column to the left and the others to the right."""
    lines = [list(map(printable, line)) for line in (header, *rows)]
    widths = [max(columns_of(line[i]) for line in lines) for i in range(len(header))]

    def padded(line: Sequence[str]) -> str:
        spaces = [" " * (width - columns_of(cell)) for cell, width in zip(line, widths, strict=True)]
        others = (space + cell for cell, space in zip(line[1:], spaces[1:], strict=True))
        return "  ".join([line[0] + spaces[0], *others]).rstrip()

    return "\n".join(map(padded, lines))
