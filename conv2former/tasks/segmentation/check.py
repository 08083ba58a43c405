"""Every mask is read before the first step: one that fits neither its image nor the classes is named at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import DataError
from ..dense.check import count_once, in_order
from .labels import IGNORED, NOWHERE
from .pairs import MaskCounts, PairImages, PairSource

__all__ = ["check_source"]

VERSION = 1  # of what is kept


def check_source(source: PairSource, skip: bool) -> PairSource:
    """Returns a split with the counts of its masks; see dense/check.py.

    Args:
        source: the split.
        skip: go on where a file cannot be read, as the loader will.

    Raises:
        DataError: of the first mask that is wrong, with the number of the others that were found.
    """
    stamp, labels, classes = source.images.cells.stamp(), source.images.labels_of_masks, len(source.class_names)
    if stamp is not None:
        stamp = [str(VERSION), labels.kind, str(labels.num_classes), str(labels.ignore_index), str(skip), *stamp]
    counts = count_once("masks", stamp, lambda: _count(source, skip), lambda content: _read(content, classes))
    return replace(source, counts=counts)


def _count(source: PairSource, skip: bool) -> dict[str, Any]:
    images, numbers, unreadable = source.images, np.zeros(len(source.images.table), dtype=np.int64), 0
    for found in in_order(lambda index: _examine(images, index), len(images), skip, "checking masks", "file"):
        if found is None:
            unreadable += 1
        else:
            numbers[: len(found)] += found
    pixels, ignored = _by_class(source, numbers)
    return {"pixels": pixels.tolist(), "ignored": ignored, "unreadable": unreadable}


def _read(content: dict[str, Any], classes: int) -> MaskCounts:
    counts = MaskCounts(
        np.array(content["pixels"], dtype=np.int64), int(content["ignored"]), int(content["unreadable"])
    )
    if counts.pixels.shape != (classes,):
        raise ValueError("of other classes")
    return counts


def _examine(images: PairImages, index: int) -> np.ndarray:
    """Returns how often each number comes in a mask, (256,) or (65536,)."""
    found = images.examine(index)
    there = np.flatnonzero(found.counts)
    wrong = there[images.table[there] == NOWHERE]
    if len(wrong):
        name = images.cells.files(index)[1][1]
        raise DataError(images.labels_of_masks.complaint({int(n): int(found.counts[n]) for n in wrong}, name))
    return found.counts


def _by_class(source: PairSource, numbers: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns how many pixels each class has, and how many are ignored, from the counts of numbers.

    Raises:
        DataError: no pixel has a class, or all are the first class or ignored, as where 255 is the second one.
    """
    table, classes = source.images.table, len(source.class_names)
    pixels = np.bincount(table[table >= 0], weights=numbers[table >= 0], minlength=classes).astype(np.int64)
    labels = source.images.labels_of_masks
    if labels.kind == "index" and labels.ignore_index == 255 and numbers[255] and not pixels[1:].any():
        raise DataError(
            f"{source.name}: the masks have the numbers {'0 and ' if pixels[0] else ''}255 alone, and 255 is ignored "
            "(data.ignore_index); if it is the second of two classes, set data.labels=binary data.ignore_index=null"
        )
    if not pixels.any():
        raise DataError(f"{source.name}: not one pixel of the masks has a class")
    return pixels, int(numbers[table == IGNORED].sum())
