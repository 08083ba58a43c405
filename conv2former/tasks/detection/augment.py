"""An image and its objects together through torchvision's transforms: every draw from torch's seeded generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..dense.pixels import Window, as_tensor, draw_place, happens, recoloured, resized, scaled_size
from .config import DetectionConfig
from .images import Example
from .objects import Objects
from .shapes import decode

__all__ = ["EvalPixels", "EvalTransform", "TrainPixels", "TrainTransform"]

SMALLEST = 1.0  # area in pixels of a box that is trained on; what is less after a crop or resizing is left out


class TrainPixels(NamedTuple):
    """An image of 8 bits, (channels, h, w), and its targets as `TrainBatch` has them."""

    image: torch.Tensor
    target: dict[str, torch.Tensor]


class EvalPixels(NamedTuple):
    """An image of 8 bits, (channels, h, w), and height, width and objects of what is stored."""

    image: torch.Tensor
    size: tuple[int, int]
    objects: Objects
    name: str


class _Scene(NamedTuple):
    """What is changed together: (channels, h, w) of 8 bits, (n, 4) boxes, (n, h, w) masks or None, (n,) labels."""

    image: Any
    boxes: Any
    masks: Any
    labels: torch.Tensor

    @classmethod
    def of(cls, example: Example, channels: int) -> _Scene:
        """Returns what is trained on: groups are left out."""
        objects, (width, height) = example.objects, example.photo.size
        single = np.flatnonzero(~objects.crowd)
        boxes = torch.from_numpy(np.ascontiguousarray(objects.boxes[single]))
        masks = None
        if objects.masks is not None:
            masks = torch.from_numpy(decode([objects.masks[index] for index in single], height, width))
        return cls(
            tv_tensors.Image(as_tensor(example.photo, channels)),
            tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=(height, width)),
            None if masks is None else tv_tensors.Mask(masks),
            torch.from_numpy(objects.labels[single]),
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.image.shape[-2], self.image.shape[-1]

    def through(self, change: Any, *args: Any, **kwargs: Any) -> _Scene:
        """Returns what a function of torchvision's makes of image, boxes and masks."""
        image, boxes = (change(values, *args, **kwargs) for values in (self.image, self.boxes))
        masks = None if self.masks is None else change(self.masks, *args, **kwargs)
        return self._replace(image=image, boxes=boxes, masks=masks)


class TrainTransform:
    """Crops, mirrors, resizes and recolours a training image, and does the same with its boxes and masks.

    What is cut off is cut before the image is resized, so that it costs nothing.

    Args:
        config: the run.
    """

    def __init__(self, config: DetectionConfig) -> None:
        self.augment, self.data, self.images = config.augment, config.data, config.data.preprocessing
        self.fill: dict[type, Any] = {tv_tensors.Image: [round(255 * value) for value in self.images.mean]}

    def __call__(self, example: Example) -> TrainPixels:
        augment = self.augment
        scene = _Scene.of(example, self.images.channels)
        scene = self._jittered(scene) if augment.resize == "large_scale_jitter" else self._multi_scale(scene)
        if happens(augment.hflip):
            scene = scene.through(F.horizontal_flip)
        if happens(augment.vflip):
            scene = scene.through(F.vertical_flip)
        image = scene.image
        if augment.photometric and image.shape[0] == 3:
            image = recoloured(image, augment.photometric)
        return TrainPixels(image.as_subclass(torch.Tensor), _target(scene))

    def _jittered(self, scene: _Scene) -> _Scene:
        """As large as fits into `data.img_size`, times a factor, then cropped or filled up to it."""
        low, high = self.augment.scale
        factor, size, wanted = low + (high - low) * float(torch.rand(())), scene.size, self.images.size
        fitting = factor * min(inner / side for inner, side in zip(wanted, size, strict=True))
        scaled = scaled_size(size, None, fitting)
        top, left = (draw_place(side, inner) for side, inner in zip(scaled, wanted, strict=True))
        window = Window.of(size, scaled, wanted, top, left)
        return scene.through(window.cut).through(window.fit, wanted, self.fill)

    def _multi_scale(self, scene: _Scene) -> _Scene:
        """Perhaps a crop, then its shorter side is one of several lengths."""
        if self.augment.crop and happens(self.augment.crop):
            scene = scene.through(F.crop, *self._crop(scene))
        sides = self.augment.short_sides
        short = sides[int(torch.randint(len(sides), ()))]
        size = scaled_size(scene.size, short, long_side=self.data.long_side)
        return scene if size == scene.size else scene.through(F.resize, list(size), antialias=True)

    def _crop(self, scene: _Scene) -> tuple[int, int, int, int]:
        """Draws a crop, top, left, height and width, that shows the middle of an object if there is one."""
        low, high = self.augment.crop_scale
        shares = (low + (high - low) * torch.rand(2)).clamp(max=1.0).tolist()
        sides = [max(1, round(share * side)) for share, side in zip(shares, scene.size, strict=True)]
        if len(scene.boxes):
            left, top, right, bottom = scene.boxes[int(torch.randint(len(scene.boxes), ()))].tolist()
            middles = (top + bottom) / 2, (left + right) / 2
        starts = []
        for axis, (side, inner) in enumerate(zip(scene.size, sides, strict=True)):
            first, last = 0, side - inner
            if len(scene.boxes):
                middle = min(int(middles[axis]), side - 1)
                first, last = max(0, middle - inner + 1), min(last, middle)
            starts.append(first + int(torch.randint(last - first + 1, ())))
        return starts[0], starts[1], sides[0], sides[1]


def _target(scene: _Scene) -> dict[str, torch.Tensor]:
    """Returns the objects of which there is something to see, as `TrainBatch` has them."""
    boxes = F.clamp_bounding_boxes(scene.boxes).as_subclass(torch.Tensor).float()
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    kept = (width > 0) & (height > 0) & (width * height >= SMALLEST)
    if scene.masks is None:
        return {"boxes": boxes[kept], "labels": scene.labels[kept]}
    masks = scene.masks.as_subclass(torch.Tensor)
    kept &= (masks != 0).flatten(1).any(1)
    return {"boxes": boxes[kept], "labels": scene.labels[kept], "masks": masks[kept]}


@dataclass(frozen=True)
class EvalTransform:
    """Resizes an image to be evaluated, with its aspect ratio; its objects stay as they are.

    Attributes:
        short_side, long_side: see `data.short_side`.
        channels: of the tensor.
    """

    short_side: int
    long_side: int
    channels: int

    def __call__(self, example: Example) -> EvalPixels:
        photo = example.photo
        return EvalPixels(self.image(photo), (photo.height, photo.width), example.objects, example.name)

    def image(self, photo: Image.Image) -> torch.Tensor:
        """Returns a photo, (channels, h, w) of 8 bits, resized."""
        size = scaled_size((photo.height, photo.width), self.short_side, long_side=self.long_side)
        return resized(photo, size, self.channels)
