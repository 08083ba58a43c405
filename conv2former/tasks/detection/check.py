"""Every annotation is held against its image before the first step, of which only the header is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import DataError, counted, shorten
from ...text import clipped
from ..dense.check import count_once, in_order
from .images import DetectionSource, ObjectCounts
from .records import Tally

__all__ = ["MissingMasks", "about_objects", "check_source"]

VERSION = 1  # of what is kept
FEW_CLASSES = 6  # whose objects are all named in a line


class MissingMasks(DataError):
    """Objects without a mask, where masks are wanted."""


def check_source(source: DetectionSource, skip: bool) -> DetectionSource:
    """Returns a split with the counts of its objects; see dense/check.py.

    Args:
        source: the split.
        skip: go on where an image cannot be read, as the loader will.

    Raises:
        DataError: of the first image or object that is wrong, with the number of the others that were found; of a split
            without objects.
        MissingMasks: see there.
    """
    stamp = source.images.records.stamp()
    if stamp is not None:
        stamp = [str(VERSION), str(source.has_masks), str(skip), *source.class_names, *stamp]
    classes = len(source.class_names)
    counts = count_once("objects", stamp, lambda: _count(source, skip), lambda content: _read(content, classes))
    return replace(source, counts=counts)


def _count(source: DetectionSource, skip: bool) -> dict[str, Any]:
    images, classes = source.images, len(source.class_names)
    objects, totals = np.zeros(classes, dtype=np.int64), np.zeros(len(Tally()), dtype=np.int64)
    crowds = empty = turned = unreadable = 0
    first_without_mask = ""
    results = in_order(images.examine, len(images), skip, "checking images", "image", ahead=16)
    for found in results:
        if found is None:
            unreadable += 1
            continue
        single = found.objects.labels[~found.objects.crowd]
        objects += np.bincount(single, minlength=classes)
        crowds += int(found.objects.crowd.sum())
        empty, turned = empty + (not len(single)), turned + found.is_turned
        totals += found.tally
        if found.tally.without_mask and not first_without_mask:
            first_without_mask = found.name
    counts = ObjectCounts(objects, crowds, empty, Tally(*totals.tolist()), turned, unreadable)
    _check_counts(source, counts, first_without_mask)
    return {**vars(counts), "objects": objects.tolist(), "tally": list(counts.tally)}


def _read(content: dict[str, Any], classes: int) -> ObjectCounts:
    objects, tally = np.array(content["objects"], dtype=np.int64), Tally(*map(int, content["tally"]))
    if objects.shape != (classes,):
        raise ValueError("of other classes")
    others = {key: int(content[key]) for key in ("crowds", "empty", "turned", "unreadable")}
    return ObjectCounts(objects=objects, tally=tally, **others)


def _check_counts(source: DetectionSource, counts: ObjectCounts, first_without_mask: str) -> None:
    """Raises a DataError if there is nothing to detect, or masks are wanted and missing."""
    total, missing = int(counts.objects.sum()), counts.tally.without_mask
    all_groups = f"all {counts.crowds:,} objects" if counts.crowds != 1 else "its only object"
    if counts.unreadable == len(source):
        raise DataError(f"{source.name}: not one of its {counted(len(source), 'image')} can be read")
    if not total and counts.crowds:
        raise DataError(
            f"{source.name}: {all_groups} stand for groups, which are not trained on: iscrowd is 1 in COCO's files, as "
            "CVAT writes for masks of its brush, or difficult in VOC's; set it to 0 where it is one thing"
        )
    if not total:
        raise DataError(
            f"{source.name}: not one of its {counted(len(source), 'image')} has an object; is it the right file?"
        )
    if missing == total + counts.crowds:
        raise MissingMasks(
            f"{source.name} has boxes and no masks, which mask_rcnn needs; set model.detector.name=faster_rcnn"
        )
    if missing:
        raise MissingMasks(
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
        (counts.crowds, "group", "(iscrowd or difficult) not trained on"),
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
