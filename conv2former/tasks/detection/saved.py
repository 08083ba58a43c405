"""What checkpoints keep of a detection's best evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..fields import is_count, is_number, or_none

__all__ = ["check_classes", "is_classes", "is_confusion", "is_score", "is_worst"]

MOST_TEXT = 1 << 22  # characters of a picture
MOST_SIDE = 1 << 16  # pixels
KEYS = {f"{prefix}{key}" for prefix in ("", "mask_") for key in ("ap", "ap50", "ap75")}


def _is_class(value: Any) -> bool:
    if not isinstance(value, dict) or not {"objects", "ap", "ap50", "ap75"} <= value.keys() <= {"objects", *KEYS}:
        return False
    numbers = [item for key, item in value.items() if key != "objects"]
    return is_count(value["objects"]) and all(item is None or is_number(item) for item in numbers)


def _is_square(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == len(value) and all(map(is_count, row)) for row in value
    )


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 4 and all(is_number(side) and abs(side) < MOST_SIDE for side in value)
    )


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_TRUTH = {"boxes": _is_box, "labels": is_count, "crowd": _is_bool, "missed": _is_bool}
_ANSWER = {"boxes": _is_box, "labels": is_count, "scores": is_number, "wrong": _is_bool}


def _are_boxes(value: Any, fields: Mapping[str, Any]) -> bool:
    """Returns whether a value is lists of equal length by these keys, each item as it should be."""
    if not isinstance(value, dict) or value.keys() != fields.keys():
        return False
    if not all(isinstance(items, list) for items in value.values()):
        return False
    is_even = len({len(items) for items in value.values()}) == 1
    return is_even and all(fields[key](item) for key, items in value.items() for item in items)


def _is_image(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 9:
        return False
    mistakes, objects, place, *texts, truth, answer = value
    are_counts = is_count(mistakes) and is_count(objects) and is_count(place)
    are_texts = all(isinstance(text, str) and len(text) < MOST_TEXT for text in texts)
    return are_counts and are_texts and _are_boxes(truth, _TRUTH) and _are_boxes(answer, _ANSWER)


is_classes = or_none(lambda value: isinstance(value, list) and all(map(_is_class, value)))
is_confusion = or_none(_is_square)  # (classes + 1, classes + 1)
is_score = or_none(is_number)  # of the best F1, and of that itself
is_worst = or_none(lambda value: isinstance(value, list) and all(map(_is_image, value)))


def check_classes(details: Mapping[str, Any], num_classes: int) -> None:
    """Checks that what a checkpoint keeps is of so many classes.

    Raises:
        ValueError: it is not.
    """
    if details["classes"] is not None and len(details["classes"]) != num_classes:
        raise ValueError("classes is of other classes")
    if details["confusion"] is not None and len(details["confusion"]) != num_classes + 1:
        raise ValueError("confusion is of other classes")
    labels = [label for one in details["worst"] or [] for each in one[-2:] for label in each["labels"]]
    if any(label >= num_classes for label in labels):
        raise ValueError("worst has other classes")
