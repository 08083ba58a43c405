"""Images with their masks, wherever they are stored: a split of a data set, as the loader reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from ...data.images import check_shape, open_rgb, opened_image, upright_size
from ...errors import DataError
from ..dense.check import stamp_of
from .labels import Labels
from .masks import RawMask, read_mask

__all__ = ["Cells", "File", "FilePairs", "MaskCounts", "Pair", "PairImages", "PairSource", "SomePairs"]

File = tuple[str | bytes, str]  # a path or the content, and what to call it


class Pair(NamedTuple):
    """An image in RGB and its mask of class indices, (H, W), see `Labels.to_indices`, of the same size."""

    photo: Image.Image
    mask: np.ndarray
    name: str


class Cells(Protocol):
    """Where the files of pairs are."""

    def __len__(self) -> int: ...

    def files(self, index: int) -> tuple[File, File]:
        """Returns the files of an image and of its mask."""

    def name(self, index: int) -> str:
        """Returns what to call the image; reads nothing."""

    def stamp(self) -> list[str] | None:
        """Returns what changes with the content of any file; None where nothing says it."""

    def some(self, indices: Sequence[int]) -> SomePairs:
        """Returns the pairs of these indices."""


@dataclass(frozen=True)
class FilePairs:
    """Pairs of files: the paths of images, and those of their masks."""

    photos: Sequence[str]
    masks: Sequence[str]

    def __len__(self) -> int:
        return len(self.photos)

    def files(self, index: int) -> tuple[File, File]:
        photo, mask = self.photos[index], self.masks[index]
        return (photo, photo), (mask, mask)

    def name(self, index: int) -> str:
        return self.photos[index]

    def stamp(self) -> list[str] | None:
        return [stamp_of(path) for pair in zip(self.photos, self.masks, strict=True) for path in pair]

    def some(self, indices: Sequence[int]) -> SomePairs:
        return SomePairs(self, indices)


@dataclass(frozen=True)
class SomePairs:
    """Some of other pairs; see `Cells`."""

    cells: Cells
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def files(self, index: int) -> tuple[File, File]:
        return self.cells.files(self.indices[index])

    def name(self, index: int) -> str:
        return self.cells.name(self.indices[index])

    def stamp(self) -> list[str] | None:
        stamp = self.cells.stamp()
        return None if stamp is None else [stamp[2 * index + which] for index in self.indices for which in (0, 1)]

    def some(self, indices: Sequence[int]) -> SomePairs:
        return SomePairs(self.cells, [self.indices[index] for index in indices])


class PairImages:
    """Pairs as a loader reads them: `images[i]` is a `Pair`, and 0 in the place of a class index.

    Args:
        cells: where they are.
        labels: what the numbers in the masks mean.
        value_range, max_pixels: of images, see `open_rgb`.
    """

    def __init__(
        self, cells: Cells, labels: Labels, value_range: tuple[float, float] | None, max_pixels: int | None
    ) -> None:
        self.cells, self.labels_of_masks = cells, labels
        self._value_range, self._max_pixels = value_range, max_pixels

    @cached_property
    def table(self) -> np.ndarray:
        """Of class indices, see `Labels.table`."""
        return self.labels_of_masks.table()

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> tuple[Pair, int]:
        (photo, photo_name), (mask, mask_name) = self.cells.files(index)
        image = open_rgb(photo, photo_name, self._value_range, self._max_pixels)
        numbers = read_mask(mask, mask_name, self._max_pixels).numbers
        check_sizes(image.size, photo_name, numbers, mask_name)
        return Pair(image, self.labels_of_masks.to_indices(numbers, self.table, mask_name), photo_name), 0

    def examine(self, index: int) -> RawMask:
        """Returns a mask's numbers, having compared its size with the image's, of which no pixel is read.

        Raises:
            UnreadableImage: one of them cannot be read.
            DataError: the mask is none, or of another size.
        """
        (photo, photo_name), (mask, mask_name) = self.cells.files(index)
        with opened_image(photo, photo_name, self._max_pixels) as image:
            check_shape(image)
            size = upright_size(image)
        found = read_mask(mask, mask_name, self._max_pixels)
        check_sizes(size, photo_name, found.numbers, mask_name)
        return found

    def name(self, index: int) -> str:
        return self.cells.name(index)


def check_sizes(size: tuple[int, int], photo: str, mask: np.ndarray, mask_name: str) -> None:
    """Raises a DataError if a mask is not of its image's size.

    Args:
        size: of the image, width and height.
        photo, mask_name: names.
        mask: (H, W).
    """
    height, width = mask.shape
    if (width, height) != size:
        turned = (height, width) == size
        hint = "; one of them is turned: an image is read upright, by its EXIF orientation" if turned else ""
        raise DataError(
            f"{mask_name}: a mask of {width} x {height} pixels, and its image {photo} has {size[0]} x {size[1]}{hint}"
        )


class MaskCounts(NamedTuple):
    """What a check has counted in the masks of a split.

    Attributes:
        pixels: of each class, (classes,) int64.
        ignored: pixels that count for nothing.
        unreadable: masks or images that cannot be read, where the run goes on without them.
    """

    pixels: np.ndarray
    ignored: int
    unreadable: int


@dataclass(frozen=True)
class PairSource:
    """One split.

    Attributes:
        images: see `PairImages`.
        class_names: names in index order.
        name: what to call the split in messages.
        note: what its owner should know, such as files that were left out.
        counts: of its masks; None where they were not checked.
    """

    images: PairImages
    class_names: list[str]
    name: str
    note: str = ""
    counts: MaskCounts | None = None

    def __len__(self) -> int:
        return len(self.images)
