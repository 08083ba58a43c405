"""Every mask is read before the first step, so that one which fits neither its image nor the classes is named at once.

What was counted is kept in the project's store, by the names, sizes and times of all files, so that the next run with
the same files begins at once. The processes of one machine wait for the first of them, which does it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..._store import store_folder
from ...data.images import UnreadableImage
from ...data.loader import usable_cores
from ...errors import DataError, counted
from .labels import IGNORED, NOWHERE
from .pairs import MaskCounts, PairImages, PairSource

__all__ = ["check_source"]

VERSION = 1  # of what is kept
MOST_THREADS = 16
MOST_ERRORS = 10  # after which no further mask is read


def check_source(source: PairSource, skip: bool) -> PairSource:
    """Returns a split with the counts of its masks.

    Args:
        source: the split.
        skip: go on where a file cannot be read, as the loader will.

    Raises:
        DataError: of the first mask that is wrong, with the number of the others that were found.
    """
    stamp = source.images.cells.stamp()
    place = None if stamp is None else _place(source, stamp, skip)
    with _alone(place):
        counts = _kept(place, len(source.class_names))
        if counts is None:
            counts = _count(source, skip)
            _keep(place, counts)
    return replace(source, counts=counts)


def _count(source: PairSource, skip: bool) -> MaskCounts:
    """Reads all masks, in threads: Pillow lets others work while it decodes."""
    images, numbers = source.images, np.zeros(len(source.images.table), dtype=np.int64)
    errors: list[DataError] = []
    unreadable = 0
    is_shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    with ThreadPoolExecutor(min(MOST_THREADS, 2 * usable_cores())) as pool:
        results = _in_order(pool, images)
        for found in tqdm(results, "checking masks", len(images), leave=False, unit=" masks", disable=not is_shown):
            if isinstance(found, UnreadableImage) and skip:
                unreadable += 1
            elif isinstance(found, DataError):
                errors.append(found)
            else:
                numbers[: len(found)] += found
            if len(errors) == MOST_ERRORS:
                break
        pool.shutdown(cancel_futures=True)
    if errors:
        more = f"; there are mistakes in {counted(len(errors) - 1, 'more file')} at least" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more}")
    return _by_class(source, numbers, unreadable)


def _in_order(pool: ThreadPoolExecutor, images: PairImages) -> Iterator[np.ndarray | DataError]:
    """Goes over the counts of all masks by their numbers, (256,) or (65536,), or what is wrong with one.

    A few are under way at a time, as their results take memory.
    """
    ahead = 4 * MOST_THREADS
    for start in range(0, len(images), ahead):
        yield from pool.map(lambda index: _examine(images, index), range(start, min(start + ahead, len(images))))


def _examine(images: PairImages, index: int) -> np.ndarray | DataError:
    try:
        found = images.examine(index)
    except DataError as e:
        return e
    there = np.flatnonzero(found.counts)
    wrong = there[images.table[there] == NOWHERE]
    if len(wrong):
        name = images.cells.files(index)[1][1]
        return DataError(images.labels_of_masks.complaint({int(n): int(found.counts[n]) for n in wrong}, name))
    return found.counts


def _by_class(source: PairSource, numbers: np.ndarray, unreadable: int) -> MaskCounts:
    """Returns the counts of classes from those of numbers.

    Raises:
        DataError: no pixel has a class, or all are the first class or ignored, as where 255 is the second one.
    """
    table, classes = source.images.table, len(source.class_names)
    pixels = np.bincount(table[table >= 0], weights=numbers[table >= 0], minlength=classes).astype(np.int64)
    ignored = int(numbers[table == IGNORED].sum())
    labels = source.images.labels_of_masks
    if labels.kind == "index" and labels.ignore_index == 255 and numbers[255] and not pixels[1:].any():
        raise DataError(
            f"{source.name}: the masks have the numbers {'0 and ' if pixels[0] else ''}255 alone, and 255 is ignored "
            "(data.ignore_index); if it is the second of two classes, set data.labels=binary data.ignore_index=null"
        )
    if not pixels.any():
        raise DataError(f"{source.name}: not one pixel of the masks has a class")
    return MaskCounts(pixels, ignored, unreadable)


# ------------------------------------------------------------------------------------------------------ what is kept


def _place(source: PairSource, stamp: list[str], skip: bool) -> Path:
    labels = source.images.labels_of_masks
    key = "\0".join([str(VERSION), labels.kind, str(labels.num_classes), str(labels.ignore_index), str(skip), *stamp])
    name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
    return store_folder() / "masks" / f"{name}.json"


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


def _kept(place: Path | None, classes: int) -> MaskCounts | None:
    try:
        found = json.loads(place.read_text()) if place is not None else {}
        counts = MaskCounts(np.array(found["pixels"], dtype=np.int64), int(found["ignored"]), int(found["unreadable"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return counts if counts.pixels.shape == (classes,) else None


def _keep(place: Path | None, counts: MaskCounts) -> None:
    if place is None:
        return
    content = {"pixels": counts.pixels.tolist(), "ignored": counts.ignored, "unreadable": counts.unreadable}
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # it is only faster with it
        temporary.write_text(json.dumps(content))
        os.replace(temporary, place)
