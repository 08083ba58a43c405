"""Every image is looked at before the first step, in threads; what was counted is kept for the next run.

It is kept in the project's store, by the names, sizes and times of all files, so that the next run with the same files
begins at once. The processes of one machine wait for the first of them, which does it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ..._store import store_folder
from ...data.images import UnreadableImage
from ...data.loader import usable_cores
from ...errors import DataError, counted

__all__ = ["count_once", "in_order", "stamp_of"]

MOST_THREADS = 16
MOST_ERRORS = 10  # after which no further image is looked at
Found = TypeVar("Found")
Counts = TypeVar("Counts")


def in_order(
    examine: Callable[[int], Found], count: int, skip: bool, title: str, unit: str, ahead: int = 4
) -> Iterator[Found | None]:
    """Goes over what is found of each image, in their order: None of one that cannot be read, where that is skipped.

    Args:
        examine: looks at the image of a number; Pillow lets other threads work while it decodes.
        count: of images.
        skip: go on where one cannot be read.
        title, unit: of the bar.
        ahead: for each thread, how many results may wait: they take memory.

    Raises:
        DataError: at the end, the first that `examine` has raised, with the number of the others that were found.
    """
    errors: list[DataError] = []

    def look(index: int) -> Found | DataError:
        try:
            return examine(index)
        except DataError as e:
            return e

    def results(pool: ThreadPoolExecutor) -> Iterator[Found | DataError]:
        for start in range(0, count, ahead * MOST_THREADS):
            yield from pool.map(look, range(start, min(start + ahead * MOST_THREADS, count)))

    is_shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    with ThreadPoolExecutor(min(MOST_THREADS, 2 * usable_cores())) as pool:
        for found in tqdm(results(pool), title, count, leave=False, unit=f" {unit}s", disable=not is_shown):
            if isinstance(found, UnreadableImage) and skip:
                yield None
            elif isinstance(found, DataError):
                errors.append(found)
            else:
                yield found
            if len(errors) == MOST_ERRORS:
                break
        pool.shutdown(cancel_futures=True)
    if errors:
        more = f"; there are mistakes in {counted(len(errors) - 1, f'more {unit}')} at least" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more}")


# ------------------------------------------------------------------------------------------------------ what is kept


def stamp_of(path: str) -> str:
    """Returns what changes with the content of a file.

    Raises:
        DataError: it is not there.
    """
    try:
        found = os.stat(path)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None
    return f"{os.path.abspath(path)}\0{found.st_size}\0{found.st_mtime_ns}"


def count_once(
    kind: str, stamp: list[str] | None, count: Callable[[], dict[str, Any]], read: Callable[[dict[str, Any]], Counts]
) -> Counts:
    """Returns counts, those that are kept or new ones.

    Args:
        kind: a folder of the store.
        stamp: all that they follow from; None keeps nothing.
        count: returns new ones as plain types by name.
        read: makes counts of these; raises ValueError, KeyError or TypeError of what is none.
    """
    place = None if stamp is None else _place(kind, stamp)
    with _alone(place):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if place is not None:
                return read(json.loads(place.read_text()))
        content = count()
        _keep(place, content)
    return read(content)


def _place(kind: str, stamp: list[str]) -> Path:
    name = hashlib.sha256("\0".join(stamp).encode("utf-8", "surrogateescape")).hexdigest()
    return store_folder() / kind / f"{name}.json"


@contextlib.contextmanager
def _alone(place: Path | None) -> Iterator[None]:
    """Lets one process of the machine at a time in; all at once where the store cannot be written."""
    with contextlib.ExitStack() as stack:
        if place is not None:
            with contextlib.suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(place.with_suffix(".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if place is not None:
            with contextlib.suppress(OSError):
                place.with_suffix(".lock").unlink()


def _keep(place: Path | None, content: dict[str, Any]) -> None:
    if place is None:
        return
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # it is only faster with it
        temporary.write_text(json.dumps(content))
        os.replace(temporary, place)
