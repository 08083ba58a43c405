"""What is in an image, and what a network answers: boxes with classes, and masks where there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["Detections", "EvalBatch", "Objects", "TrainBatch"]


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects of an image as it is stored, n of them.

    Attributes:
        boxes: (n, 4) float32, left, top, right, bottom, pixels from the image's upper left corner.
        labels: (n,) int64 class indices from 0.
        crowd: (n,) bool, whether it stands for a group (COCO's `iscrowd`): not trained on, and what is found in it
            counts neither as right nor as wrong.
        areas: (n,) float64 pixels, as the data has them; COCO's sizes small, medium and large go by these.
        masks: n dicts of COCO's compressed RLE, `{"size": [height, width], "counts": bytes}`; None where the data has
            boxes alone.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True, slots=True)
class Detections:
    """What a network finds in an image, the highest score first, in pixels of the image as it is stored.

    Attributes:
        boxes: (n, 4) float32, as those of `Objects`.
        scores: (n,) float32, 0 to 1.
        labels: (n,) int64 class indices from 0.
        masks: n dicts of COCO's compressed RLE; None of a network without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.boxes)


class TrainBatch(NamedTuple):
    """Augmented images, each of its own size.

    Attributes:
        images: each (channels, h, w), float32 and normalised, on the device.
        targets: for each image `boxes` (n, 4) float32 left, top, right, bottom in its pixels, each of an area above 0,
            `labels` (n,) int64 from 0, and of an instance segmentation `masks` (n, h, w) uint8; n may be 0.
        skipped: what could not be read.
    """

    images: list[torch.Tensor]
    targets: list[dict[str, torch.Tensor]]
    skipped: list[Any]


class EvalBatch(NamedTuple):
    """Images to be evaluated, each of its own size.

    Attributes:
        images: each (channels, h, w) of 8 bits, resized as `data.short_side` and `data.long_side` say.
        sizes: of each image as it is stored, height and width.
        objects: of each image as it is stored.
        skipped: what could not be read.
        places: of the images in the data set.
        names: of the images.
    """

    images: list[torch.Tensor]
    sizes: list[tuple[int, int]]
    objects: list[Objects]
    skipped: list[Any]
    places: list[int]
    names: list[str]
