"""Small pictures of an image, its truth and an answer, as text, so that a checkpoint can keep a few of them.

Truth and answer are numbers of pixels: classes of a segmentation, or which object of a detection a pixel is of.
"""

from __future__ import annotations

import base64
import colorsys
import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

__all__ = ["Thumbnails", "as_numbers", "as_photo", "colours", "photo_text", "scaled_size", "thumbnails"]

LONGEST = 320  # pixels of a side
NOTHING = -1  # of a pixel without a number; the lowest there is
GOLDEN = 0.618033988749895  # turns of the circle of hues from a class to the next, so that neighbours differ


class Thumbnails(NamedTuple):
    """Base64 of a JPEG of the image, and of PNGs of truth and answer: number + 1 in 16 bits, 0 where there is none."""

    photo: str
    truth: str
    predicted: str


def thumbnails(image: torch.Tensor, targets: torch.Tensor, predicted: torch.Tensor) -> Thumbnails:
    """Makes the pictures.

    Args:
        image: (channels, h, w) of 8 bits.
        targets, predicted: (H, W) integers, -1 where a pixel has no number.
    """
    height, width = targets.shape
    size = scaled_size(height, width)
    return Thumbnails(photo_text(image, size), *(_png(values.numpy(), size) for values in (targets, predicted)))


def scaled_size(height: int, width: int) -> tuple[int, int]:
    """Returns width and height of the pictures of an image."""
    scale = min(1.0, LONGEST / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))


def photo_text(image: torch.Tensor, size: tuple[int, int]) -> str:
    """Returns an image, (channels, h, w) of 8 bits, at a width and height, as base64 of a JPEG."""
    values = image.permute(1, 2, 0).numpy()
    photo = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    file = io.BytesIO()
    photo.resize(size, Image.Resampling.BILINEAR).save(file, "JPEG", quality=85)
    return _text(file)


def _png(numbers: np.ndarray, size: tuple[int, int]) -> str:
    rows, columns = ((np.arange(n) + 0.5) * length // n for n, length in zip(size[::-1], numbers.shape, strict=True))
    values = (numbers[rows.astype(int)[:, None], columns.astype(int)] - NOTHING).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return _text(file)


def _text(file: io.BytesIO) -> str:
    return base64.b64encode(file.getvalue()).decode()


def as_photo(text: str) -> np.ndarray:
    """Returns the image of a thumbnail, (H, W, 3) uint8."""
    with Image.open(io.BytesIO(base64.b64decode(text)), formats=["JPEG"]) as image:
        return np.asarray(image.convert("RGB"))


def as_numbers(text: str) -> np.ndarray:
    """Returns the numbers of a thumbnail's pixels, (H, W) int64, -1 where there is none."""
    with Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]) as image:
        return np.asarray(image).astype(np.int64) + NOTHING


def colours(num_classes: int) -> np.ndarray:
    """Returns a colour for each class, (classes + 1, 3) uint8: that of a pixel of none, white, is the last, or -1.

    Hues go on by the golden section, and every third class is dark or pale.
    """
    found = [
        colorsys.hsv_to_rgb((0.58 + i * GOLDEN) % 1.0, (0.85, 0.55, 0.95)[i % 3], (0.9, 0.95, 0.6)[i % 3])
        for i in range(num_classes)
    ]
    return (255 * np.array([*found, (1.0, 1.0, 1.0)])).round().astype(np.uint8)
