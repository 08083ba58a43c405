"""From a mask's file to its numbers: what is no mask, such as an image in colours, is refused by name."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...data.images import opened_image
from ...errors import DataError

__all__ = ["MASK_ENDINGS", "RawMask", "read_mask"]

MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm")  # of formats that keep every number
LOSSY = ("JPEG", "WEBP", "JPEG2000", "AVIF")
COLOURS = ("RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "LA", "La", "PA")
FACTORS = {"L;2": 85, "L;4": 17}  # by which Pillow stretches the grey values of PNGs of 2 and 4 bits


class RawMask(NamedTuple):
    """The numbers of a mask, (H, W) uint8 or uint16, and how often each comes, (256,) or (65536,) int64."""

    numbers: np.ndarray
    counts: np.ndarray


def read_mask(file: str | os.PathLike[str] | bytes, name: str, max_pixels: int | None = None) -> RawMask:
    """Reads a mask: grey of 1 to 16 bits, or a palette, of which the indices count and not the colours.

    Args:
        file: a path, or the bytes of a file.
        name: what to call it in messages.
        max_pixels: the largest that is read; None for Pillow's limit.

    Raises:
        UnreadableImage: the file is missing or damaged.
        DataError: it is an image in colours, or of a format that changes numbers.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = stack.enter_context(opened_image(file, name, max_pixels))
        _check_kind(image, name)
        factor = next((value for mode, value in FACTORS.items() if mode in str(getattr(image, "tile", ""))), 1)
        if image.mode in ("1", "L", "P"):
            histogram = np.array(image.histogram(), dtype=np.int64)  # reads the pixels
            numbers = np.asarray(image, dtype=np.uint8)
            if image.mode == "1":
                numbers = (numbers > 0).astype(np.uint8)
                histogram = np.bincount(numbers.ravel(), minlength=256)
            elif factor > 1:
                numbers, histogram = (
                    numbers // factor,
                    np.append(histogram[::factor], np.zeros(256 - 255 // factor - 1)),
                )
            return RawMask(numbers, histogram.astype(np.int64))
        wide = np.asarray(image)
        if wide.min(initial=0) < 0 or wide.max(initial=0) > 65_535:
            raise DataError(f"{name}: a mask with numbers from {wide.min()} to {wide.max()}; 0 to 65535 are read")
        numbers = wide.astype(np.uint16)
        return RawMask(numbers, np.bincount(numbers.ravel(), minlength=65_536))


def _check_kind(image: Image.Image, name: str) -> None:
    """Raises a DataError if an image cannot be a mask: it has colours, or its format does not keep numbers."""
    if image.mode in COLOURS:
        raise DataError(
            f"{name}: an image in colours (mode {image.mode}), and a mask has one number a pixel, its class; save it "
            "as indexed or 8-bit grey PNG, whose numbers are places in the list of classes"
        )
    if image.format in LOSSY:
        raise DataError(f"{name}: a mask in {image.format}, which changes numbers; save it as PNG where it was drawn")
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise DataError(f"{name}: mode {image.mode} is not read as a mask; save it as indexed or 8-bit grey PNG")
