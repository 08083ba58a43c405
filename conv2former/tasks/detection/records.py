"""What a data set says of an image's objects, as it was read, and what of that is an object."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ...errors import DataError
from ..dense.check import stamp_of
from .objects import Objects
from .shapes import Shape, area_of, to_rle

__all__ = ["File", "Noted", "Record", "Records", "Tally", "check_box", "check_number", "resolve"]

CORNERS = ("the box's left", "the box's top", "the box's right", "the box's bottom")
SIDES = (*CORNERS[:2], "the box's width", "the box's height")
File = tuple[str | bytes, str]  # a path or the content, and what to call it
TOLERANCE = 1.0  # pixels by which a box may reach out of its image without being counted: edges are rounded


class Record(NamedTuple):
    """An image and what is said of its n objects, whether it can be right or not.

    Attributes:
        file: a path, or the row of a data set.
        name: what to call the image.
        size: its width and height, if the data says them.
        boxes: (n, 4) float64 left, top, right, bottom: pixels, or shares of the image's sides.
        labels: (n,) int64, indices into `Records.class_names`.
        crowd: (n,) bool.
        areas: (n,) float64 pixels; NaN where the data has none.
        shapes: of each the mask, or None; None where no object has one.
        are_shares: whether boxes and polygons are in shares.
        number: the image's id in the data, of COCO's files alone.
    """

    file: str | int
    name: str
    size: tuple[int, int] | None
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    shapes: list[Shape | None] | None
    are_shares: bool = False
    number: int | str | None = None


@dataclass
class Noted:
    """The objects of an image while they are read.

    Attributes:
        keeps_masks: whether masks are of use beyond the areas of objects that come without.
    """

    keeps_masks: bool
    boxes: list[Sequence[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    shapes: list[Shape | None] = field(default_factory=list)

    def needs_mask(self, area: float | None) -> bool:
        """Returns whether the mask of an object of an area is of use."""
        return self.keeps_masks or area is None or not area > 0

    def add(
        self, box: Sequence[float], label: int, crowd: bool = False, area: float | None = None, shape: Any = None
    ) -> None:
        """Adds an object: see `Record`."""
        self.boxes.append(box)
        self.labels.append(label)
        self.crowd.append(crowd)
        self.areas.append(area if area is not None and area > 0 else np.nan)
        self.shapes.append(shape if self.needs_mask(area) else None)

    def record(
        self, file: str | int, name: str, size: tuple[int, int] | None = None, are_shares: bool = False
    ) -> Record:
        """Returns them as a record of an image."""
        return Record(
            file,
            name,
            size,
            np.array(self.boxes, dtype=np.float64).reshape(-1, 4),
            np.array(self.labels, dtype=np.int64),
            np.array(self.crowd, dtype=bool),
            np.array(self.areas, dtype=np.float64),
            self.shapes if any(shape is not None for shape in self.shapes) else None,
            are_shares,
        )


def _itself(file: str | int) -> File:
    return str(file), str(file)


@dataclass(frozen=True)
class Records:
    """The images of a split with what is said of their objects.

    Attributes:
        records: of the images.
        class_names: those that the split itself has.
        are_all_classes: whether it lists them; otherwise they are those that its objects have.
        file: returns the file of a record's `file`.
        category_ids: of classes in the data, by name, of COCO's files alone.
        headings: classes without objects that only stand above others, or for the background.
    """

    records: Sequence[Record]
    class_names: list[str]
    are_all_classes: bool = True
    file: Callable[[Any], File] = _itself
    category_ids: Mapping[str, int | str] = field(default_factory=dict)
    headings: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        return self.records[index].name

    def some(self, indices: Sequence[int]) -> Records:
        """Returns the records with these images alone."""
        return replace(self, records=[self.records[index] for index in indices])

    def stamp(self) -> list[str] | None:
        """Returns what changes with the content of any file, or with what is said of it; None where nothing says it."""
        if not all(isinstance(record.file, str) for record in self.records):
            return None
        said = hashlib.sha256()
        for record in self.records:
            said.update(
                f"{record.name}\0{record.size} {len(record.labels)} {record.are_shares}".encode("utf-8", "replace")
            )
            for values in (record.boxes, record.labels, record.crowd, record.areas):
                said.update(values.tobytes())
            for shape in record.shapes or ():
                said.update(repr(shape).encode() if not isinstance(shape, list) else b"%d" % len(shape))
                for points in shape if isinstance(shape, list) else ():
                    said.update(points.tobytes())
        try:
            return [said.hexdigest(), *map(stamp_of, self.paths)]
        except DataError:  # one is missing, which is said where it is read
            return None

    @property
    def paths(self) -> list[str]:
        """The paths of the images that are files."""
        return [record.file for record in self.records if isinstance(record.file, str)]


class Tally(NamedTuple):
    """How many objects of an image, or of several, are not as they should be.

    Attributes:
        without_area: left out, as their boxes have no area.
        outside: left out, as they lie outside the image.
        clipped: cut off at the image's edges.
        without_mask: have no mask.
    """

    without_area: int = 0
    outside: int = 0
    clipped: int = 0
    without_mask: int = 0


def resolve(record: Record, size: tuple[int, int], with_masks: bool) -> tuple[Objects, Tally]:
    """Returns the objects of an image: those with area inside it, their boxes clipped.

    Args:
        record: what the data says.
        size: of the image, width and height.
        with_masks: whether masks are wanted; an object that has none then has None in its mask's place.

    Raises:
        DataError: a mask is of another size than the image.
    """
    sides = np.array([*size, *size], dtype=np.float64)
    boxes = record.boxes * sides if record.are_shares else record.boxes
    clipped = boxes.clip(0, sides).astype(np.float32)
    has_area = (clipped[:, 2:] > clipped[:, :2]).all(1)
    outside = (boxes[:, 2:] > boxes[:, :2]).all(1) & ((boxes[:, 2:] <= 0) | (boxes[:, :2] >= sides[2:])).any(1)
    kept = np.flatnonzero(has_area)
    masks, areas = _masks_and_areas(record, kept, clipped, size, with_masks)
    tally = Tally(
        int((~has_area & ~outside).sum()),
        int(outside.sum()),
        int((has_area & (np.abs(clipped - boxes) > TOLERANCE).any(1)).sum()),
        sum(mask is None for mask in masks) if with_masks else 0,
    )
    objects = Objects(clipped[kept], record.labels[kept], record.crowd[kept], areas, masks if with_masks else None)
    return objects, tally


def _masks_and_areas(
    record: Record, kept: np.ndarray, boxes: np.ndarray, size: tuple[int, int], with_masks: bool
) -> tuple[list[Any], np.ndarray]:
    """Returns masks, where they are wanted, and areas: the data's, else those of the masks, else of the boxes."""
    width, height = size
    areas = record.areas[kept].copy()
    masks: list[Any] = [None] * len(kept)
    for place, index in enumerate(kept.tolist()):
        shape = record.shapes[index] if record.shapes is not None else None
        if shape is not None and (with_masks or np.isnan(areas[place])):
            if record.are_shares and isinstance(shape, list):
                shape = [points * (width, height) for points in shape]
            masks[place] = to_rle(shape, height, width, f"{record.name}, object {index + 1}")
            if np.isnan(areas[place]):
                areas[place] = area_of(masks[place]) or np.nan
    sides = (boxes[kept, 2:] - boxes[kept, :2]).astype(np.float64)
    return masks, np.where(np.isnan(areas), sides.prod(1), areas)


def check_number(value: Any, what: str, where: str) -> float:
    """Returns a number that a file has, perhaps as text.

    Raises:
        DataError: it is none, or not finite.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: {what} is {str(value)[:40]!r}, and no finite number; correct or remove it")
    return number


def check_box(value: Any, where: str, has_corners: bool = False) -> tuple[float, float, float, float]:
    """Returns a box that a file has as left, top, right, bottom.

    Args:
        value: left, top, width, height.
        where: what to call it.
        has_corners: it is left, top, right, bottom instead.

    Raises:
        DataError: it is no box; one without area is.
    """
    names = CORNERS if has_corners else SIDES
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != 4:
        words = ", ".join(name.removeprefix("the box's ") for name in names)
        raise DataError(f"{where}: a box is a list of {words}, not {str(value)[:60]}")
    left, top, right, bottom = map(check_number, value, names, [where] * 4)
    if not has_corners:
        right, bottom = left + right, top + bottom
    if right < left or bottom < top:
        raise DataError(f"{where}: a box of {right - left:g} x {bottom - top:g} pixels; correct or remove it")
    return left, top, right, bottom
