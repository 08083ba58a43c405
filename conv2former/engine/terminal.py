"""What a command shows while it works: its lines at once, and how far it is, as a bar or in plain lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, TypeVar

from tqdm import tqdm
from tqdm.utils import disp_len

from ..printing import encodable
from ..text import clipped, printable

__all__ = ["Bar", "PlainProgress", "bar", "bar_size", "clock", "say"]

T = TypeVar("T")

LEAST_BAR = 20  # columns of a bar; fields beside it are left out until so many remain
LONGEST_LABEL = 24  # columns of what stands before a bar
SECONDS, SHARE, PATIENCE = 10.0, 0.05, 60.0  # between plain lines: at least both of the first, at most the last


def say(*lines: str, file: TextIO | None = None, required: bool = False) -> None:
    """Prints lines at once, above a bar if there is one. Where the reader of a pipe has gone, nothing is printed.

    Args:
        *lines: each is one line: a line end inside it is escaped, as all that `printable` escapes.
        file: standard output unless given.
        required: the text is the only result of the command, so that there is nothing to do without a reader.

    Raises:
        BrokenPipeError: the reader has gone and `required`.
    """
    file = file or sys.stdout
    try:
        tqdm.write(encodable(lines, file), file=file)
        file.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        if required:
            raise


def bar_size() -> dict[str, Any]:
    """Returns tqdm's arguments for the width of a bar. A program that plays the terminal says that it has none."""
    width = os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0
    return {"dynamic_ncols": True} if width else {"ncols": 120, "nrows": 20}


class Bar(tqdm):
    """A bar that leaves out what stands beside it until there is room for the bar itself.

    Its postfix is fields with two blanks between them, the most important first.
    """

    @staticmethod
    def format_meter(  # type: ignore[override]
        n: float,
        total: float,
        elapsed: float,
        ncols: int | None = None,
        prefix: str | None = "",
        postfix: Any = None,
        **more: Any,
    ) -> str:
        def meter(label: str, fields: str, layout: str | None, width: int | None) -> str:
            options = {**more, "prefix": label, "postfix": fields, "bar_format": layout}
            return str(tqdm.format_meter(n, total, elapsed, width, **options))

        prefix = printable((prefix or "").removesuffix(": "))
        if not total:  # nor a share, nor the time that is left
            return meter(prefix, postfix, "{desc}: {n_fmt}{unit} [{elapsed}, {rate_fmt}{postfix}]", ncols)
        for label, fields, layout in _layouts(prefix, postfix or ""):
            if not ncols or ncols - disp_len(meter(label, fields, layout.replace("{bar}", ""), None)) >= LEAST_BAR:
                break
        return meter(label, fields, layout, ncols)


def _layouts(label: str, postfix: str) -> Iterator[tuple[str, str, str]]:
    """Goes over what can stand beside a bar, from all fields to the fewest: label, postfix, and tqdm's layout."""
    start, short = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}", _short(label)
    yield label, postfix, f"{start} [{{elapsed}}<{{remaining}}, {{rate_fmt}}{{postfix}}]"
    fields = postfix.split("  ") if postfix else []
    for count in range(len(fields), 0, -1):
        yield short, "  ".join(fields[:count]), f"{start} [{{elapsed}}<{{remaining}}{{postfix}}]"
    if not fields:
        yield short, "", f"{start} [{{elapsed}}<{{remaining}}, {{rate_fmt}}]"
    yield short, "", f"{start} [{{elapsed}}<{{remaining}}]"
    yield "", "", f"{start} [{{elapsed}}<{{remaining}}]"
    yield "", "", start


def _short(label: str) -> str:
    return clipped(label, LONGEST_LABEL)


class PlainProgress:
    """Says in plain lines how far something is: every ten seconds or 5 %, whichever is later, but once a minute.

    Args:
        what: is being done.
        unit: of the counts, with a blank before it.
        total: how many there are; None where nobody knows.
        done: how many were done before.
        file: where to, standard output unless given.
    """

    def __init__(
        self, what: str, unit: str, total: int | None = None, done: int = 0, file: TextIO | None = None
    ) -> None:
        self.what, self.unit, self.total, self.file = what, unit, total, file
        self.done = self._first = self._said = done
        self._start = self._time = time.perf_counter()

    def update(self, number: int = 1) -> None:
        """Counts what has been done since the last call, and says so if it is time."""
        self.done += number
        passed = time.perf_counter() - self._time
        is_share = not self.total or self.done - self._said >= SHARE * self.total
        if passed >= PATIENCE or (passed >= SECONDS and is_share):
            say(str(self), file=self.file)
            self.rest()

    def start_clock(self) -> None:
        """Counts the time from here on."""
        self._start = self._time = time.perf_counter()

    def rest(self) -> None:
        """Begins to wait anew, after another line has said how far it is."""
        self._said, self._time = self.done, time.perf_counter()

    def __str__(self) -> str:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = (self.done - self._first) / seconds
        of, share, left = "", "", ""
        if self.total:
            of, share = f" of {self.total:,}", f" ({100 * self.done / self.total:.0f} %)"
            left = f", {clock((self.total - self.done) / rate)} left" if rate else ""
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return f"{self.what}: {self.done:,}{of}{self.unit}{share}, {speed}{self.unit}/s{left}".lstrip(": ")


def bar(
    items: Iterable[T],
    total: int | None,
    unit: str,
    what: str = "",
    count: Callable[[T], int] | None = None,
    file: TextIO | None = None,
    leave: bool = True,
) -> Iterator[T]:
    """Goes over `items` and shows how far it is, on the main process: a bar on a terminal, or else plain lines.

    Args:
        items: what to go over.
        total: how many there are; None where nobody knows.
        unit: of them, ` images`.
        what: is being done.
        count: how many of the total an item stands for; None for one.
        file: for plain lines, standard output unless given. The bar is on standard error.
        leave: whether the bar stays when it has ended.
    """
    if os.environ.get("RANK", "0") != "0":
        yield from items
        return
    is_bar = sys.stderr.isatty()
    progress: Any = (
        Bar(desc=what or None, total=total, unit=unit, leave=leave, **bar_size())
        if is_bar
        else PlainProgress(what, unit, total, file=file)
    )
    try:
        for item in items:
            yield item
            number = count(item) if count else 1
            progress.update(number if total is None else min(number, total - (progress.n if is_bar else progress.done)))
    finally:
        if is_bar:
            progress.close()


def clock(seconds: float) -> str:
    """Returns a time as text, `1:23` or `4:05:06`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
