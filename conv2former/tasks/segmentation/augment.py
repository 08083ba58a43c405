"""An image and its mask together through torchvision's transforms: every draw from torch's seeded generator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ...data.batch import in_channels
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
    return tv_tensors.Image(_as_image(pair.photo, channels)), tv_tensors.Mask(torch.from_numpy(pair.mask))


def _as_image(photo: Image.Image, channels: int) -> torch.Tensor:
    """Returns a photo as a tensor of 8 bits, (channels, H, W)."""
    values = np.array(in_channels(photo, channels))
    return torch.from_numpy(values if values.ndim == 3 else values[..., None]).permute(2, 0, 1).contiguous()


def scaled_size(size: tuple[int, int], short_side: int | None, factor: float = 1.0) -> tuple[int, int]:
    """Returns the size, height and width, of an image whose shorter side is to be `short_side` times `factor`."""
    scale = factor * (short_side / min(size) if short_side else 1.0)
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


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
        if float(torch.rand(())) < self.augment.hflip:
            image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
        if float(torch.rand(())) < self.augment.vflip:
            image, mask = F.vertical_flip(image), F.vertical_flip(mask)
        if self.augment.photometric and image.shape[0] == 3:
            image = _recoloured(image, self.augment.photometric)
        return Pixels(image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor), pair.name)

    def _crop(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws a scale and a crop, at `CROPS` most until one is not nearly of one class, and cuts it out."""
        low, high = self.augment.scale
        factor = low * (high / low) ** float(torch.rand(()))
        size = (mask.shape[-2], mask.shape[-1])
        scaled = scaled_size(size, self.short_side, factor)
        crop = self.images.size
        for _ in range(CROPS):
            top, left = (_place(side, wanted) for side, wanted in zip(scaled, crop, strict=True))
            box = _Box.of(size, scaled, crop, top, left)
            cut = box.cut(mask)
            if not self._is_of_one_class(cut):
                break
        return box.fit(box.cut(image), crop, self.fill), box.fit(cut, crop, self.fill)

    def _is_of_one_class(self, mask: torch.Tensor) -> bool:
        most = self.augment.max_class_share
        if most >= 1.0:
            return False
        values = mask.as_subclass(torch.Tensor).flatten()[:: max(1, mask.numel() // 4096)].long()  # enough to judge by
        values = values[values != self.ignored]
        return not len(values) or int(values.bincount().max()) > most * len(values)


def _recoloured(image: torch.Tensor, probability: float) -> torch.Tensor:
    """Changes brightness, contrast, saturation and hue, each with a probability; contrast is first or last."""
    draws = torch.rand(9).tolist()
    changes: list[Any] = [
        (F.adjust_brightness, 0.875 + 0.25 * draws[1]),
        (F.adjust_saturation, 0.5 + draws[3]),
        (F.adjust_hue, 0.1 * draws[5] - 0.05),
    ]
    changes.insert(1 if draws[8] < 0.5 else 3, (F.adjust_contrast, 0.5 + draws[7]))
    for (change, amount), draw in zip(changes, draws[0:8:2], strict=True):
        if draw < probability:
            image = change(image, amount)
    return image


def _place(side: int, crop: int) -> int:
    """Draws where a crop begins along a side; where that is shorter, it is 0."""
    return int(torch.randint(side - crop + 1, ())) if side > crop else 0


class _Box(NamedTuple):
    """A crop before it is resized: its place in the image, and the size to which what is cut is resized."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], scaled: tuple[int, int], crop: tuple[int, int], top: int, left: int) -> _Box:
        """Returns the part of an image of a size, to be resized to `scaled`, that a crop at `top`, `left` shows."""
        inner = (min(scaled[0], crop[0]), min(scaled[1], crop[1]))
        sides = []
        for start, length, whole, resized in zip((top, left), inner, size, scaled, strict=True):
            first = math.floor(start * whole / resized)
            last = max(first + 1, round((start + length) * whole / resized))
            sides.append((first, min(last, whole) - first))
        (y, height), (x, width) = sides
        return cls(y, x, height, width, inner)

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        return F.crop(values, self.top, self.left, self.height, self.width)

    def fit(self, values: torch.Tensor, crop: tuple[int, int], fill: dict) -> torch.Tensor:
        """Resizes what was cut, and fills it up to the crop's size at its lower and right edges."""
        values = F.resize(values, list(self.size), antialias=True)  # a mask without interpolation
        below, beside = crop[0] - self.size[0], crop[1] - self.size[1]
        return F.pad(values, [0, 0, beside, below], fill=fill[type(values)]) if below or beside else values


@dataclass(frozen=True)
class EvalTransform:
    """Resizes an image to be evaluated; its mask keeps its size."""

    short_side: int | None
    channels: int

    def __call__(self, pair: Pair) -> Pixels:
        return Pixels(self.image(pair.photo), torch.from_numpy(pair.mask), pair.name)

    def image(self, photo: Image.Image) -> torch.Tensor:
        """Returns a photo, (channels, H, W) of 8 bits, resized."""
        size = scaled_size((photo.height, photo.width), self.short_side)
        if size != (photo.height, photo.width):
            photo = photo.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return _as_image(photo, self.channels)
