"""An image and its mask together through torchvision's transforms: every draw from torch's seeded generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..dense.pixels import Window, as_tensor, draw_place, happens, recoloured, resized, scaled_size
from .config import SegmentationConfig
from .labels import ignored_value
from .pairs import Pair

__all__ = ["EvalTransform", "Pixels", "TrainTransform"]

CROPS = 10  # that are tried for one in which no class has nearly all


class Pixels(NamedTuple):
    """An image of 8 bits, (channels, H, W), and its mask of class indices; of an evaluation the mask may be larger."""

    image: torch.Tensor
    mask: torch.Tensor
    name: str


def _as_tensors(pair: Pair, channels: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    return tv_tensors.Image(as_tensor(pair.photo, channels)), tv_tensors.Mask(torch.from_numpy(pair.mask))


class TrainTransform:
    """Resizes, crops, mirrors and recolours a training image, and does the same with its mask.

    The crop is made first and resized afterwards, which is the same but for the pixels at its edges, and costs what the
    crop costs, whatever the image's size. Where the resized image is smaller than the crop, the rest is ignored.

    Args:
        config: the run.
        num_classes: of the data.
    """

    def __init__(self, config: SegmentationConfig, num_classes: int) -> None:
        self.augment, self.images, self.short_side = config.augment, config.data.preprocessing, config.data.short_side
        self.ignored = ignored_value(num_classes)
        mean = [round(255 * value) for value in self.images.mean]
        self.fill: dict[type, Any] = {tv_tensors.Image: mean, tv_tensors.Mask: self.ignored}

    def __call__(self, pair: Pair) -> Pixels:
        image, mask = self._crop(*_as_tensors(pair, self.images.channels))
        if happens(self.augment.hflip):
            image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
        if happens(self.augment.vflip):
            image, mask = F.vertical_flip(image), F.vertical_flip(mask)
        if self.augment.photometric and image.shape[0] == 3:
            image = recoloured(image, self.augment.photometric)
        return Pixels(image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor), pair.name)

    def _crop(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws a scale and a crop, at `CROPS` most until one is not nearly of one class, and cuts it out."""
        low, high = self.augment.scale
        factor = low * (high / low) ** float(torch.rand(()))
        size = (mask.shape[-2], mask.shape[-1])
        scaled = scaled_size(size, self.short_side, factor)
        crop = self.images.size
        for _ in range(CROPS):
            top, left = (draw_place(side, wanted) for side, wanted in zip(scaled, crop, strict=True))
            window = Window.of(size, scaled, crop, top, left)
            cut = window.cut(mask)
            if not self._is_of_one_class(cut):
                break
        return window.fit(window.cut(image), crop, self.fill), window.fit(cut, crop, self.fill)

    def _is_of_one_class(self, mask: torch.Tensor) -> bool:
        most = self.augment.max_class_share
        if most >= 1.0:
            return False
        values = mask.as_subclass(torch.Tensor).flatten()[:: max(1, mask.numel() // 4096)].long()  # enough to judge by
        values = values[values != self.ignored]
        return not len(values) or int(values.bincount().max()) > most * len(values)


@dataclass(frozen=True)
class EvalTransform:
    """Resizes an image to be evaluated; its mask keeps its size."""

    short_side: int | None
    channels: int

    def __call__(self, pair: Pair) -> Pixels:
        return Pixels(self.image(pair.photo), torch.from_numpy(pair.mask), pair.name)

    def image(self, photo: Image.Image) -> torch.Tensor:
        """Returns a photo, (channels, H, W) of 8 bits, resized."""
        return resized(photo, scaled_size((photo.height, photo.width), self.short_side), self.channels)
