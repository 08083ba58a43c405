"""Images with their objects, wherever they are stored: a split of a data set, as the loader reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...data.images import check_shape, opened_image, to_rgb, upright_size
from ...errors import DataError
from .objects import Objects
from .records import Record, Records, Tally, resolve

__all__ = ["DetectionImages", "DetectionSource", "Examined", "Example", "ObjectCounts"]


class Example(NamedTuple):
    """An image in RGB and its objects."""

    photo: Image.Image
    objects: Objects
    name: str


class Examined(NamedTuple):
    """What is known of an image of which no pixel was read.

    Attributes:
        name: of it.
        objects: in it.
        tally: of those that are not as they should be.
        is_turned: whether it is read as it is stored, and not upright, because its boxes are so.
    """

    name: str
    objects: Objects
    tally: Tally
    is_turned: bool


class DetectionImages:
    """Images with objects as a loader reads them: `images[i]` is an `Example`, and 0 in the place of a class index.

    An image is upright by its EXIF orientation, as browsers and so most tools show it. Where the data gives the size
    that the file has before it is turned, its boxes are meant so, and the image is left as it is.

    Args:
        records: what the data says of them.
        with_masks: whether objects come with masks.
        value_range, max_pixels: of images, see `open_rgb`.
    """

    def __init__(
        self, records: Records, with_masks: bool, value_range: tuple[float, float] | None, max_pixels: int | None
    ) -> None:
        self.records, self.with_masks = records, with_masks
        self._value_range, self._max_pixels = value_range, max_pixels

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Example, int]:
        record = self.records.records[index]
        file, name = self.records.file(record.file)
        with opened_image(file, name, self._max_pixels) as image:
            size, upright = _size_of(image, record)
            photo = to_rgb(image, self._value_range, upright)
        objects, tally = resolve(record, size, self.with_masks)
        if tally.without_mask:
            have = "has" if tally.without_mask == 1 else "have"
            raise DataError(f"{record.name}: {tally.without_mask} of its objects {have} no mask, which mask_rcnn needs")
        return Example(photo, objects, record.name), 0

    def examine(self, index: int) -> Examined:
        """Returns the objects of an image, of which no pixel is read; their masks are None where they are missing.

        Raises:
            UnreadableImage: it cannot be read.
            DataError: it is of another size than the data says, or one of its masks is.
        """
        record = self.records.records[index]
        file, name = self.records.file(record.file)
        with opened_image(file, name, self._max_pixels) as image:
            check_shape(image)
            size, upright = _size_of(image, record)
        return Examined(record.name, *resolve(record, size, self.with_masks), not upright)

    def name(self, index: int) -> str:
        return self.records.name(index)


def _size_of(image: Image.Image, record: Record) -> tuple[tuple[int, int], bool]:
    """Returns width and height of an image as its boxes are meant, and whether that is upright.

    Raises:
        DataError: the data says another size.
    """
    upright, given = upright_size(image), record.size
    if given is None or given == upright:
        return upright, True
    if given == image.size:
        return given, False
    raise DataError(
        f"{record.name}: an image of {upright[0]} x {upright[1]} pixels, and its boxes are for one of "
        f"{given[0]} x {given[1]}; put the image back that was annotated, or correct the size in the annotations"
    )


@dataclass(frozen=True)
class ObjectCounts:
    """What a check has counted in a split.

    Attributes:
        objects: of each class, (classes,) int64, groups (`crowd`) left out.
        crowds: groups.
        empty: images without an object that counts.
        tally: objects that are not as they should be.
        turned: images that are read as they are stored, and not upright.
        unreadable: images that cannot be read, where the run goes on without them.
    """

    objects: np.ndarray
    crowds: int
    empty: int
    tally: Tally
    turned: int
    unreadable: int


@dataclass(frozen=True)
class DetectionSource:
    """One split.

    Attributes:
        images: see `DetectionImages`.
        class_names: names in index order.
        name: what to call the split in messages.
        note: what its owner should know, such as files that were left out.
        has_masks: whether objects come with masks, as the network wants them.
        counts: of its objects; None where they were not checked.
    """

    images: DetectionImages
    class_names: list[str]
    name: str
    note: str = ""
    has_masks: bool = False
    counts: ObjectCounts | None = None

    def __len__(self) -> int:
        return len(self.images)
