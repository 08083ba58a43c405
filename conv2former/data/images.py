"""From any image file to 8-bit RGB: right, or refused by name. Pillow alone clips 16 bits and shows hidden colours."""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import DataError, first_line

__all__ = [
    "IMAGE_ENDINGS",
    "UNREAD_ENDINGS",
    "UnreadableImage",
    "any_size",
    "check_shape",
    "naming",
    "open_rgb",
    "opened_image",
    "pixel_limit",
    "to_rgb",
    "unread_hint",
    "upright_size",
]

IMAGE_ENDINGS = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
# of phones, cameras and other programs: images, but none that Pillow reads
UNREAD_ENDINGS = (
    ".arw", ".cr2", ".cr3", ".dng", ".heic", ".heics", ".heif", ".hif", ".jxl", ".nef", ".orf", ".raf", ".rw2", ".svg",
)  # fmt: skip
# Pillow's names of the formats that are read. Its others are of no use here, and to open some is unsafe: for EPS it
# starts another program, Ghostscript. TGA is last because any file may be one by its first bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
MAX_ASPECT_RATIO = 200  # resized by its short side, a longer image would fill the memory
Range = tuple[float, float]

TO_RGB = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339  # tags of TIFF and EXIF
STRIP_PIXELS = 1 << 24  # that are converted at once: some ways need tens of bytes for a pixel
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(DataError):
    """An image that cannot be read. The only data error that a loader may skip.

    Attributes:
        name: of the image, as in the text.
    """

    def __init__(self, text: str, name: str = "") -> None:  # a DataLoader raises it anew from the text alone
        super().__init__(text)
        self.name = name


class _RefusedImage(ValueError):
    """An image that Pillow reads but whose way to RGB is unknown: its text says why and what to do."""


def unread_hint(endings: Iterable[str]) -> str:
    """Returns what to do about files whose endings, such as '.HEIC', are those of images that Pillow does not read."""
    known = sorted({ending.lower() for ending in endings} & set(UNREAD_ENDINGS))
    return f"; {', '.join(known)} are images that Pillow does not read: convert them to .jpg or .png" if known else ""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turns whatever goes wrong inside, while an image is read, into an UnreadableImage that names it."""
    try:
        yield
    except DataError:  # says by itself what is wrong
        raise
    except _RefusedImage as e:
        raise UnreadableImage(f"{name}: {e}", name) from None
    except Exception as e:  # damaged bytes make Pillow raise nearly anything, from struct.error to MemoryError
        if isinstance(e, UnidentifiedImageError):
            reason = "empty, or of a format that is not read"
            if hint := unread_hint([os.path.splitext(name)[1]]):
                raise UnreadableImage(f"{name}: not a readable image ({reason}){hint}", name) from None
        else:
            reason = (isinstance(e, OSError) and e.strerror) or first_line(e)
        raise UnreadableImage(f"{name}: not a readable image ({reason}); remove or replace it", name) from None


@contextmanager
def pixel_limit(max_pixels: int | None) -> Iterator[None]:
    """Lets Pillow read images of up to `max_pixels` inside; None for its own limit, 178,956,970."""
    before = Image.MAX_IMAGE_PIXELS
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment] # Pillow warns from here on, and refuses twice
    try:
        yield
    except Image.DecompressionBombError:
        limit = int(2 * (Image.MAX_IMAGE_PIXELS or 0))
        raise _RefusedImage(
            f"an image of more than {limit:,} pixels; make it smaller, or raise data.max_image_pixels"
        ) from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def any_size() -> Iterator[None]:
    """Lets Pillow work on images of any size inside: it checks crops, too, of images that `open_rgb` has accepted."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def open_rgb(
    file: str | os.PathLike[str] | bytes | IO[bytes],
    name: str,
    value_range: Range | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Reads an image, the first of several, as 8-bit RGB.

    Args:
        file: a path, the bytes of a file, or an open file.
        name: what to call the image in messages.
        value_range: see `to_rgb`.
        max_pixels: the largest image that is read; None for Pillow's limit.

    Raises:
        UnreadableImage: the file is missing, no image or damaged, or `to_rgb` refuses it.
    """
    with opened_image(file, name, max_pixels) as image:
        return to_rgb(image, value_range)


@contextmanager
def opened_image(
    file: str | os.PathLike[str] | bytes | IO[bytes], name: str, max_pixels: int | None = None
) -> Iterator[Image.Image]:
    """Opens an image to read its pixels inside; the arguments are as for `open_rgb`.

    Raises:
        UnreadableImage: the file is missing, no image or damaged; whatever goes wrong inside, but for a DataError.
    """
    with naming(name), pixel_limit(max_pixels), ExitStack() as stack:
        if isinstance(file, bytes):
            file = io.BytesIO(file)
        elif isinstance(file, (str, os.PathLike)):  # given a path, Pillow maps the file, and jumbles some turned TIFFs
            file = stack.enter_context(_opened(file))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield stack.enter_context(Image.open(file, formats=_formats()))


def check_shape(image: Image.Image) -> None:
    """Checks the size of an opened image, of which no pixel need be read; raises a ValueError that `naming` knows."""
    if 0 in image.size:
        raise _RefusedImage(f"an image of {image.width} x {image.height} pixels; remove or replace it")
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise _RefusedImage(f"an image of {image.width} x {image.height} pixels is too long and thin; cut it in pieces")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns width and height of an opened image as `to_rgb` turns it by its EXIF orientation; reads no pixel."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # an image with damaged metadata is still an image
        orientation = 1
    width, height = image.size
    return (height, width) if orientation in range(5, 9) else (width, height)


def _opened(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a regular file.

    Raises:
        OSError: it cannot be opened.
        _RefusedImage: it is something else.
    """
    if not os.path.isfile(path) and os.path.exists(path):
        raise _RefusedImage("not a file; remove it")
    # Should it be a pipe by now: opening one waits for ever, unless told not to.
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image, value_range: Range | None = None, upright: bool = True) -> Image.Image:
    """Converts an image to 8-bit RGB: upright by its EXIF orientation, what is transparent over white.

    Args:
        image: of any mode; best just opened and not loaded, because Pillow forgets the file's bit depth.
        value_range: the values that become black and white where there are more than 8 bits; None for [0, 65535],
            which only 16-bit images have.
        upright: False leaves it as it is stored, whatever its EXIF orientation.

    Raises:
        ValueError: there is no one right way to RGB; the text says what to do. Pillow raises others for damaged files.
    """
    encoding = str([tile[3] for tile in getattr(image, "tile", ())])  # such as RGB;16B
    tags = dict(getattr(image, "tag_v2", {}))
    image.load()
    check_shape(image)
    if image.mode.startswith(("I", "F")):
        rgb = _scaled(image, value_range, tags)
    else:
        rgb = _converted(image, value_range, encoding, tags)
    if not upright:
        return rgb
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # an image with damaged metadata is still an image
        orientation = None
    return rgb.transpose(TURNS[orientation]) if orientation in TURNS else rgb


def _scaled(image: Image.Image, value_range: Range | None, tags: dict) -> Image.Image:
    """Maps the range of a grey image of 16 or 32 bits to 0..255; convert("RGB") would clip it."""
    values = np.asarray(image)
    bits, unsigned = tags.get(BITS, (0,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == 1
    if image.mode == "I" and bits == 32 and unsigned:
        values = values.view(np.uint32)  # Pillow has signed integers only
    if value_range is None:
        # Pillow also opens the 16 bits of PGM, and in some versions of PNG, in the 32 of mode I.
        if not image.mode.startswith("I;16") and image.format not in ("PNG", "PPM"):
            raise _RefusedImage(
                f"mode {image.mode} says not which values are black and white; give data.value_range, or convert it"
            )
        value_range = (0, 4095 if bits == 12 else 65535)
    elif not np.isfinite(values).all():
        raise _RefusedImage("has values that are not finite numbers (NaN or infinite); replace them or remove it")
    grey = np.empty(values.shape, np.uint8)
    for rows in _strips(image):
        grey[rows] = _to_8_bits(values[rows], value_range)
    if tags.get(PHOTOMETRIC) == 0:  # white is zero; Pillow sees to it for 8 bits only
        np.subtract(255, grey, out=grey)
    grey[values == image.info.get("transparency")] = 255
    return Image.fromarray(grey).convert("RGB")


def _to_8_bits(values: np.ndarray, value_range: Range) -> np.ndarray:
    low, high = value_range
    return np.round(((values.astype(np.float64) - low) / (high - low)).clip(0, 1) * 255).astype(np.uint8)


def _strips(image: Image.Image) -> list[slice]:
    """Returns the rows of an image in pieces of at most `STRIP_PIXELS`, or of one row."""
    height = max(1, STRIP_PIXELS // image.width)
    return [slice(top, min(top + height, image.height)) for top in range(0, image.height, height)]


def _converted(image: Image.Image, value_range: Range | None, encoding: str, tags: dict) -> Image.Image:
    """Converts an image of 8 bits, or of 16 of which Pillow keeps the upper 8, and lays it over white."""
    if image.mode not in TO_RGB:
        raise _RefusedImage(f"mode {image.mode} has no known way to RGB; convert it")
    if tags.get(SAMPLE_FORMAT, (1,))[0] != 1:
        raise _RefusedImage("has signed values in 8 bits, which Pillow reads wrong; convert it")
    if ";16" in encoding and (value_range or "transparency" in image.info):
        what = "data.value_range" if value_range else "its transparent colour"
        raise _RefusedImage(f"16-bit colour, of which Pillow keeps 8 bits, too few for {what}; convert it to 8 bits")
    for grey, factor in (("L;2", 85), ("L;4", 17)):  # PNG: Pillow scales the pixels but not the transparent value
        if grey in encoding and "transparency" in image.info:
            image.info["transparency"] *= factor
    if image.mode == "La":
        image = image.convert("LA")  # the only way out of La
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _over_white(image: Image.Image) -> Image.Image:
    """Lays an image with transparency over white."""
    result = Image.new("RGB", image.size)
    for rows in _strips(image):
        strip = image.crop((0, rows.start, image.width, rows.stop)).convert("RGBA")
        result.paste(
            Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, rows.start)
        )
    return result
