"""What the numbers in a mask mean: from raw numbers to class indices, or a message that says which one is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...errors import DataError, counted, shorten

__all__ = ["CITYSCAPES", "Labels", "as_targets", "ignored_value"]

HIGHEST = 65_535  # that a mask of 16 bits can hold
IGNORED = -1  # of targets
IGNORED_8_BIT = 255  # of masks of 8 bits on their way through the loader
NOWHERE = -2  # in a table: no class, and not ignored

# Cityscapes' 19 classes with their numbers in labelIds masks, by the authors' cityscapesscripts/helpers/labels.py.
CITYSCAPES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
MOST_LABEL_ID = 33  # of Cityscapes; those that are none of the 19 are ignored


def ignored_value(num_classes: int) -> int:
    """Returns what stands for an ignored pixel in a mask of class indices: 255 in 8 bits, -1 in 32."""
    return IGNORED_8_BIT if num_classes <= IGNORED_8_BIT else IGNORED


def as_targets(mask: torch.Tensor) -> torch.Tensor:
    """Returns a mask of class indices as targets of a loss: int64, -1 where a pixel is ignored."""
    targets = mask.long()
    return torch.where(targets == IGNORED_8_BIT, IGNORED, targets) if mask.dtype == torch.uint8 else targets


@dataclass(frozen=True)
class Labels:
    """The meaning of a mask's numbers.

    Attributes:
        kind: as `data.labels`.
        num_classes: of the list of classes.
        ignore_index: the number of pixels that count for nothing; None for none.
    """

    kind: str
    num_classes: int
    ignore_index: int | None

    def table(self) -> np.ndarray:
        """Returns the class index of every number, (65536,) int32: -1 is ignored, -2 is a mistake."""
        table = np.full(HIGHEST + 1, NOWHERE, dtype=np.int32)
        if self.kind == "binary":
            table[:] = 1
            table[0] = 0
        elif self.kind == "cityscapes":
            table[: MOST_LABEL_ID + 1] = IGNORED
            for index, number in enumerate(CITYSCAPES.values()):
                table[number] = index
        else:
            first = 1 if self.kind == "minus_one" else 0
            table[:first] = IGNORED
            table[first : first + self.num_classes] = np.arange(self.num_classes)
        if self.ignore_index is not None and table[self.ignore_index] == NOWHERE:
            table[self.ignore_index] = IGNORED
        elif self.ignore_index is not None and self.kind == "index":
            table[self.ignore_index] = IGNORED  # a number of the list that the user wants left out
        return table

    def to_indices(self, mask: np.ndarray, table: np.ndarray, name: str) -> np.ndarray:
        """Returns a mask of class indices, (H, W), uint8 or int32, see `ignored_value`.

        Args:
            mask: (H, W) raw numbers, uint8 or uint16.
            table: `table()`, made once.
            name: of the mask, for messages.

        Raises:
            DataError: a number is none of the list of classes.
        """
        found = table[mask]
        if found.min(initial=0) == NOWHERE:
            wrong = np.unique(mask[found == NOWHERE])
            raise DataError(self.complaint({int(number): int((mask == number).sum()) for number in wrong}, name))
        if self.num_classes > IGNORED_8_BIT:
            return found
        return np.where(found == IGNORED, IGNORED_8_BIT, found).astype(np.uint8)

    def complaint(self, wrong: dict[int, int], name: str) -> str:
        """Returns a message about numbers of a mask that are none of its classes, with the pixels of each."""
        numbers = shorten(sorted(wrong), 8)
        pixels = counted(sum(wrong.values()), "pixel")
        first = 1 if self.kind == "minus_one" else 0
        last = MOST_LABEL_ID if self.kind == "cityscapes" else self.num_classes - 1 + first
        ignored = "" if self.ignore_index is None else f", and {self.ignore_index} is ignored (data.ignore_index)"
        text = (
            f"{name}: {pixels} of class {numbers}; the list has {counted(self.num_classes, 'class', 'classes')}, "
            f"numbers {first if self.kind != 'cityscapes' else 0} to {last}{ignored}"
        )
        if self.kind == "index" and set(wrong) == {self.num_classes}:
            text += "; if the masks count from 1 and 0 is nothing, set data.labels=minus_one"
        elif self.kind == "index" and set(wrong) == {255}:
            text += "; if it is the second of two classes, set data.labels=binary"
        return text
