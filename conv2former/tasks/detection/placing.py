"""Where the labels of boxes go in a picture, so that none covers another and none leaves the picture."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["label_places"]

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom


def label_places(
    boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[float, float]], room: tuple[float, float]
) -> list[tuple[float, float] | None]:
    """Returns the upper left corner of each box's label: above the box, else inside or below; None without a free one.

    Args:
        boxes: left, top, right and bottom of each; the first chooses first.
        sizes: width and height of each label, in the same unit.
        room: width and height of the picture.
    """
    taken: list[Rectangle] = []
    found: list[tuple[float, float] | None] = []
    for box, (width, height) in zip(boxes, sizes, strict=True):
        place = None
        for x, y in _candidates(box, width, height):
            x = max(0.0, min(x, room[0] - width))
            label = (x, y, x + width, y + height)
            is_inside = y >= 0 and label[3] <= room[1] and label[2] <= room[0]
            if is_inside and not any(_overlap(label, other) for other in taken):
                place = (x, y)
                taken.append(label)
                break
        found.append(place)
    return found


def _candidates(box: Sequence[float], width: float, height: float) -> list[tuple[float, float]]:
    left, top, right, bottom = box
    rows = (top - height, top, bottom, bottom - height)
    return [(x, y) for x in (left, right - width) for y in rows]


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
