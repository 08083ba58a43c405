"""Every annotation is held against its image before the first step, of which only the header is read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from ...data.images import UnreadableImage
from ...data.loader import usable_cores
from ...errors import DataError, counted, shorten
from ...text import clipped
from .images import DetectionImages, DetectionSource, Examined, ObjectCounts
from .records import Tally

__all__ = ["about_objects", "check_source"]

MOST_THREADS = 16
MOST_ERRORS = 10  # after which no further image is looked at
FEW_CLASSES = 6  # whose objects are all named in a line


def check_source(source: DetectionSource, skip: bool) -> DetectionSource:
    """Returns a split with the counts of its objects.

    Args:
        source: the split.
        skip: go on where an image cannot be read, as the loader will.

    Raises:
        DataError: of the first image or object that is wrong, with the number of the others that were found; of objects
            without a mask, where masks are wanted; of a split without objects.
    """
    images, errors = source.images, list[DataError]()
    objects, totals = np.zeros(len(source.class_names), dtype=np.int64), np.zeros(len(Tally._fields), dtype=np.int64)
    crowds = empty = turned = unreadable = 0
    first_without_mask = ""
    is_shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    with ThreadPoolExecutor(min(MOST_THREADS, 2 * usable_cores())) as pool:
        results = enumerate(_in_order(pool, images))
        for index, found in tqdm(
            results, "checking images", len(images), leave=False, unit=" images", disable=not is_shown
        ):
            if isinstance(found, UnreadableImage) and skip:
                unreadable += 1
            elif isinstance(found, DataError):
                errors.append(found)
                if len(errors) == MOST_ERRORS:
                    break
            else:
                single = found.objects.labels[~found.objects.crowd]
                objects += np.bincount(single, minlength=len(objects))
                crowds += int(found.objects.crowd.sum())
                empty, turned = empty + (not len(single)), turned + found.is_turned
                totals += found.tally
                if found.tally.without_mask and not first_without_mask:
                    first_without_mask = images.name(index)
        pool.shutdown(cancel_futures=True)
    if errors:
        more = f"; there are mistakes in {counted(len(errors) - 1, 'more image')} at least" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more}")
    counts = ObjectCounts(objects, crowds, empty, Tally(*totals.tolist()), turned, unreadable)
    _check_counts(source, counts, first_without_mask)
    return replace(source, counts=counts)


def _in_order(pool: ThreadPoolExecutor, images: DetectionImages) -> Iterator[Examined | DataError]:
    """Goes over all images by their numbers, a few at a time, as what is found takes memory."""
    ahead = 16 * MOST_THREADS
    for start in range(0, len(images), ahead):
        yield from pool.map(lambda index: _examine(images, index), range(start, min(start + ahead, len(images))))


def _examine(images: DetectionImages, index: int) -> Examined | DataError:
    try:
        return images.examine(index)
    except DataError as e:
        return e


def _check_counts(source: DetectionSource, counts: ObjectCounts, first_without_mask: str) -> None:
    """Raises a DataError if there is nothing to detect, or masks are wanted and missing."""
    total, missing = int(counts.objects.sum()), counts.tally.without_mask
    if not total:
        raise DataError(
            f"{source.name}: not one of its {counted(len(source), 'image')} has an object; is it the right file?"
        )
    if missing == total + counts.crowds:
        raise DataError(
            f"{source.name} has boxes and no masks, which mask_rcnn needs; set model.detector.name=faster_rcnn"
        )
    if missing:
        raise DataError(
            f"{source.name}: {counted(missing, 'object')} of {total + counts.crowds:,} without a mask, the first in "
            f"{first_without_mask}; mask_rcnn needs one for each: draw them, or set model.detector.name=faster_rcnn"
        )


def about_objects(source: DetectionSource) -> str:
    """Returns a line on the objects of a split that was checked."""
    counts = source.counts
    assert counts is not None
    names, numbers = source.class_names, counts.objects.tolist()
    kinds = "objects with masks" if source.has_masks else "objects"
    line = f"{counted(len(source), 'image')}, {int(counts.objects.sum()):,} {kinds}"
    there = [(number, clipped(name, 24)) for number, name in zip(numbers, names, strict=True) if number]
    if len(there) <= FEW_CLASSES:
        line += f": {', '.join(f'{number:,} {name}' for number, name in there)}"
    else:
        (few, rarest), (many, commonest) = min(there), max(there)
        line += f" of {counted(len(there), 'class', 'classes')}, from {few:,} ({rarest}) to {many:,} ({commonest})"
    if missing := [clipped(name, 24) for number, name in zip(numbers, names, strict=True) if not number]:
        line += f"; none of {counted(len(missing), 'class', 'classes')}: {shorten(missing, 10)}"
    tally = counts.tally
    parts = [
        (counts.empty, "image", "without objects"),
        (counts.crowds, "group", "that count for nothing"),
        (tally.without_area, "box", "without area left out"),
        (tally.outside, "box", "outside the image left out"),
        (tally.clipped, "box", "clipped at the image's edges"),
        (counts.turned, "image", "not turned by EXIF, as the boxes are not"),
        (counts.unreadable, "image", "unreadable"),
    ]
    found = [
        f"{counted(number, what, 'boxes' if what == 'box' else '')} {words}" for number, what, words in parts if number
    ]
    return "; ".join([line, *found])
