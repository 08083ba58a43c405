"""Images of any size as tensors of 8 bits: their sizes, crops and colours. Every draw is torch's, and seeded."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from ...data.transforms import in_channels

__all__ = ["Window", "as_tensor", "draw_place", "happens", "recoloured", "resized", "scaled_size"]


def as_tensor(photo: Image.Image, channels: int) -> torch.Tensor:
    """Returns a photo as a tensor of 8 bits, (channels, H, W)."""
    values = np.array(in_channels(photo, channels))
    return torch.from_numpy(values if values.ndim == 3 else values[..., None]).permute(2, 0, 1).contiguous()


def scaled_size(
    size: tuple[int, int], short_side: int | None, factor: float = 1.0, long_side: int | None = None
) -> tuple[int, int]:
    """Returns the size, height and width, of a resized image.

    Args:
        size: of the image.
        short_side: what its shorter side is to be; None for what it is.
        factor: of both sides, after that.
        long_side: what its longer side is to be where it would be more.
    """
    scale = factor * (short_side / min(size) if short_side else 1.0)
    if long_side is not None and scale * max(size) > long_side:
        scale = long_side / max(size)
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def resized(photo: Image.Image, size: tuple[int, int], channels: int) -> torch.Tensor:
    """Returns a photo, resized to a height and width, as a tensor of 8 bits, (channels, H, W)."""
    if size != (photo.height, photo.width):
        photo = photo.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return as_tensor(photo, channels)


def happens(probability: float) -> bool:
    """Draws whether something that has a probability happens."""
    return float(torch.rand(())) < probability


def recoloured(image: torch.Tensor, probability: float) -> torch.Tensor:
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


def draw_place(side: int, crop: int) -> int:
    """Draws where a crop begins along a side; where that is shorter, it is 0."""
    return int(torch.randint(side - crop + 1, ())) if side > crop else 0


class Window(NamedTuple):
    """A crop before it is resized: its place in the image, and the size to which what is cut is resized."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], scaled: tuple[int, int], crop: tuple[int, int], top: int, left: int) -> Window:
        """Returns the part of an image of a size, to be resized to `scaled`, that a crop at `top`, `left` shows."""
        inner = (min(scaled[0], crop[0]), min(scaled[1], crop[1]))
        sides = []
        for start, length, whole, after in zip((top, left), inner, size, scaled, strict=True):
            first = math.floor(start * whole / after)
            last = max(first + 1, round((start + length) * whole / after))
            sides.append((first, min(last, whole) - first))
        (y, height), (x, width) = sides
        return cls(y, x, height, width, inner)

    def cut(self, values: Any) -> Any:
        """Returns what the crop shows of an image, a mask or boxes, which are tensors of torchvision's types."""
        return F.crop(values, self.top, self.left, self.height, self.width)

    def fit(self, values: Any, crop: tuple[int, int], fill: dict[type, Any]) -> Any:
        """Resizes what was cut, and fills it up to the crop's size at its lower and right edges."""
        values = F.resize(values, list(self.size), antialias=True)  # a mask without interpolation
        below, beside = crop[0] - self.size[0], crop[1] - self.size[1]
        return F.pad(values, [0, 0, beside, below], fill=fill.get(type(values), 0)) if below or beside else values
