"""What checkpoints keep of a segmentation's best evaluation."""

from __future__ import annotations

from typing import Any

from ..fields import is_count, is_number, or_none

__all__ = ["is_pixels", "is_worst"]

MOST_TEXT = 1 << 22  # characters of a picture


def _is_counts(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(row, list) for row in value):
        return False
    return len({len(row) for row in value}) == 1 and all(is_count(count) for row in value for count in row)


def _is_image(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 6:
        return False
    iou, place, *texts = value
    return is_number(iou) and is_count(place) and all(isinstance(text, str) and len(text) < MOST_TEXT for text in texts)


is_pixels = or_none(_is_counts)  # (3, classes): right, true and predicted pixels
is_worst = or_none(lambda value: isinstance(value, list) and all(map(_is_image, value)))
