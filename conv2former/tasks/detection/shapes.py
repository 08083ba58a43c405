"""Masks of single objects as data sets write them, polygons or run lengths, and as COCO's compressed run lengths.

pycocotools computes on what it is given without a check: run lengths of another image make it write where it must not,
and a polygon of two points is a box to it. So both are checked here, before it sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import DataError

__all__ = ["RunLengths", "Shape", "area_of", "decode", "read_shape", "to_rle"]

RunLengths = dict[str, Any]  # COCO's, compressed: {"size": [height, width], "counts": bytes}
Shape = list[np.ndarray] | RunLengths  # polygons, each (points, 2) float64 of x and y, or run lengths
MOST_PIXELS = 1 << 31  # of a mask, whose places pycocotools counts in 32 bits


def read_shape(value: Any, where: str) -> Shape | None:
    """Reads a mask as COCO's `segmentation` has it.

    Args:
        value: a list of polygons, one polygon, or run lengths, compressed or not; from a file, so anything.
        where: what to call the object.

    Returns:
        None where there is no mask: an empty list, or polygons of fewer than 3 points alone, which enclose nothing.

    Raises:
        DataError: it is something else, or run lengths that are damaged.
    """
    if value is None or value in ([], "", {}):
        return None
    if isinstance(value, dict):
        return _read_runs(value, where)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: a segmentation is a list of polygons or run lengths, not {type(value).__name__}")
    is_one = not isinstance(value[0], (list, tuple))
    polygons = [_read_polygon(polygon, where) for polygon in ([value] if is_one else value)]
    return [polygon for polygon in polygons if len(polygon) >= 3] or None


def _read_polygon(value: Any, where: str) -> np.ndarray:
    try:
        flat = np.asarray(value, dtype=np.float64).reshape(-1)
        points = flat.reshape(-1, 2)
    except (ValueError, TypeError, OverflowError):
        raise DataError(f"{where}: a polygon is a list of x, y, x, y and so on; correct or remove it") from None
    if not np.isfinite(points).all():
        raise DataError(f"{where}: a polygon with a coordinate that is no finite number; correct or remove it")
    return points


def _read_runs(value: dict[str, Any], where: str) -> RunLengths:
    size, counts = value.get("size"), value.get("counts")
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(_is_length(side) for side in size)):
        raise DataError(f"{where}: run lengths without a `size` of height and width; correct or remove them")
    if not 0 < size[0] * size[1] < MOST_PIXELS:
        raise DataError(f"{where}: run lengths for {size[1]} x {size[0]} pixels; correct or remove them")
    if isinstance(counts, str):
        counts = counts.encode("utf-8", "surrogateescape")
    runs = _decompressed(counts) if isinstance(counts, bytes) else counts
    runs = runs if isinstance(runs, (list, tuple)) and all(_is_length(run) for run in runs) else []
    if sum(runs) != size[0] * size[1]:
        raise DataError(f"{where}: run lengths that do not add up to the {size[1]} x {size[0]} pixels of its mask")
    if isinstance(counts, bytes):
        return {"size": list(size), "counts": counts}
    import pycocotools.mask

    return pycocotools.mask.frPyObjects({"size": list(size), "counts": list(runs)}, size[0], size[1])


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_PIXELS


def _decompressed(text: bytes) -> list[int] | None:
    """Returns COCO's run lengths: 5 bits a byte, and from the fourth on the difference to the last but one."""
    runs: list[int] = []
    value = shift = 0
    for byte in text:
        bits = byte - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return None if shift else runs


def to_rle(shape: Shape, height: int, width: int, where: str) -> RunLengths:
    """Returns a mask as compressed run lengths; of polygons what any of them encloses.

    Raises:
        DataError: run lengths are of another size than the image.
    """
    if isinstance(shape, dict):
        if shape["size"] != [height, width]:
            raise DataError(
                f"{where}: a mask of {shape['size'][1]} x {shape['size'][0]} pixels, and its image has "
                f"{width} x {height}"
            )
        return shape
    import pycocotools.mask

    # what lies further out than another image beside this one costs memory and shows nothing
    sides = np.array([width, height], dtype=np.float64)
    flat = [points.clip(-sides, 2 * sides).reshape(-1).tolist() for points in shape]
    return pycocotools.mask.merge([pycocotools.mask.frPyObjects([points], height, width)[0] for points in flat])


def area_of(mask: RunLengths) -> float:
    """Returns the number of pixels of a mask."""
    import pycocotools.mask

    return float(pycocotools.mask.area(mask))


def decode(masks: Sequence[RunLengths], height: int, width: int) -> np.ndarray:
    """Returns masks as pixels of 0 and 1, (n, height, width) uint8."""
    import pycocotools.mask

    if not masks:
        return np.zeros((0, height, width), np.uint8)
    return np.ascontiguousarray(pycocotools.mask.decode(list(masks)).transpose(2, 0, 1))
