"""Images resized, rotated, moved and normalised, compiled: the same bits as Pillow's and torchvision's, in less time.

`pixels.cpp` has the arithmetic. Where it cannot be compiled (see `compiling.py`), or Pillow keeps an image as it cannot
be read, Pillow and PyTorch do the same work. In which order Pillow makes its two passes depends on its version; so the
first use compares a few small images with Pillow's, and nothing is taken that differs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from .. import compiling

__all__ = ["Transformable", "normalize", "prepare", "resized_crop", "stack"]

SOURCE = Path(__file__).with_name("pixels.cpp")
FLAGS = ("-ffp-contract=off",)  # no product and sum as one, since Pillow's weights are rounded in between
FILTERS = {InterpolationMode.BILINEAR: Image.Resampling.BILINEAR, InterpolationMode.BICUBIC: Image.Resampling.BICUBIC}
# Says whether Pillow makes the pass along the rows last, by height and width and those of the result.
RowsLast = Callable[[int, int, int, int], bool]
ORDERS: tuple[RowsLast, ...] = (
    lambda h, w, to_h, to_w: h - to_h > max(0, 2 * (w - to_w)),  # since Pillow 13
    lambda h, w, to_h, to_w: False,
)
PROBES = [((37, 50), (21, 19)), ((90, 20), (17, 31)), ((12, 13), (30, 40)), ((70, 40), (20, 16))]  # and to which size
MATRICES = [(1, 0.3, 0, 0, 1, 0), (1, 0, 0, -0.2, 1, 3.3), (0.9, 0.2, 1, -0.1, 1, 2)]
log = logging.getLogger(__name__)


def prepare() -> None:
    """Compiles now what would be compiled at the first use, by every worker process of its own."""
    _order(_library())


def resized_crop(
    image: Image.Image,
    top: int,
    left: int,
    height: int,
    width: int,
    size: tuple[int, int],
    interpolation: InterpolationMode,
    mirror: bool = False,
) -> Image.Image:
    """Cuts a rectangle out of an image and resizes it, as torchvision's `resized_crop`.

    Args:
        image: of any mode; fast are those in RGB.
        top, left, height, width: of the rectangle, in pixels.
        size: height and width of the result.
        interpolation: fast are bilinear and bicubic.
        mirror: also turn left and right round, as torchvision's `hflip`.
    """
    inside = 0 <= left < left + width <= image.width and 0 <= top < top + height <= image.height and min(size) > 0
    if inside and interpolation in FILTERS:
        library = _library()
        rows_last, pixels = _order(library), _Pixels.of(library, image)
        if library is not None and rows_last is not None and pixels is not None:
            order, box = rows_last(height, width, *size), (top, left, height, width)
            resized = _resize(library, pixels, box, size, FILTERS[interpolation], order, mirror)
            if resized is not None:
                return resized
    result = F.resized_crop(image, top, left, height, width, list(size), interpolation)
    return F.hflip(result) if mirror else result


class Transformable:
    """Takes the place of an image where timm rotates, shears or moves it."""

    def __init__(self, image: Image.Image) -> None:
        self.image, self.size = image, image.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.image, name)

    def rotate(self, angle: float, **options: Any) -> Image.Image:
        """Rotates as the method of Pillow's images does, which finds the matrix and calls `transform`."""
        return Image.Image.rotate(self, angle, **options)  # type: ignore[arg-type]

    def transform(
        self, size: tuple[int, int], method: int, data: Sequence[float], resample: int, fillcolor: Any = None
    ) -> Image.Image:
        """Does what the method of Pillow's images does."""
        image = self.image
        if resample in FILTERS.values() and method == Image.Transform.AFFINE and size == image.size and fillcolor:
            library = _library()
            pixels = _Pixels.of(library, image)
            if library is not None and pixels is not None and _order(library):
                result = _transform(library, pixels, data, resample, fillcolor)
                if result is not None:
                    return result
        return image.transform(size, Image.Transform(method), data, resample, fillcolor=fillcolor)


def stack(images: Sequence[Image.Image]) -> torch.Tensor:
    """Returns the values of images of one size, all in RGB or all grey, (N, H, W, channels) 8-bit.

    Raises:
        ValueError: their sizes differ.
    """
    (width, height), *others = {image.size for image in images}
    if others:
        raise ValueError(f"images of different sizes: {width} x {height} and {others[0][0]} x {others[0][1]}")
    result = torch.empty(len(images), height, width, len(images[0].getbands()), dtype=torch.uint8)
    library = _library()
    for image, target in zip(images, result, strict=True):
        pixels = _Pixels.of(library, image)
        if library is None or pixels is None:
            target.copy_(torch.from_numpy(np.array(image)).view(target.shape))
        else:
            library.pack(pixels.address, width * height, target.data_ptr())
    return result


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.argtypes, _get_pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p


class _Pixels(NamedTuple):
    """Where an RGB image has its pixels: row by row, four bytes for each.

    Attributes:
        address: of the first one.
        width, height: of the image.
        owner: what keeps them there.
    """

    address: int
    width: int
    height: int
    owner: object

    @classmethod
    def of(cls, library: ctypes.CDLL | None, image: Image.Image) -> _Pixels | None:
        """Returns an image's pixels, or None if it is not in RGB, nothing is compiled, or Pillow does not show them."""
        if image.mode != "RGB" or library is None:
            return None
        try:
            _, capsule = image.__arrow_c_array__()
        except (AttributeError, ValueError):  # a Pillow before 11.2; more than 16 MB, which Pillow keeps in pieces
            return None
        address = library.pixels_of(_get_pointer(capsule, b"arrow_array"), image.width * image.height)
        return None if address is None else cls(address, image.width, image.height, capsule)


def _resize(
    library: ctypes.CDLL,
    pixels: _Pixels,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    resample: Image.Resampling,
    rows_last: bool,
    mirror: bool,
) -> Image.Image | None:
    """Returns None if the result is so large that Pillow does not show its pixels."""
    top, left, height, width = box
    result = Image.new("RGB", size[::-1], None)
    to = _Pixels.of(library, result)
    if to is None:
        return None
    stride = pixels.width * 4
    source = pixels.address + top * stride + left * 4
    library.resize(source, stride, width, height, to.address, to.width, to.height, resample, rows_last, mirror)
    return result


def _transform(
    library: ctypes.CDLL, pixels: _Pixels, matrix: Sequence[float], resample: int, fill: Any
) -> Image.Image | None:
    result = Image.new("RGB", (pixels.width, pixels.height), fill)
    to = _Pixels.of(library, result)
    if to is None:
        return None
    numbers = (ctypes.c_double * 6)(*matrix)
    library.transform(pixels.address, pixels.width, pixels.height, to.address, numbers, resample)
    return result


def _order(library: ctypes.CDLL | None) -> RowsLast | None:
    """Returns the order of this Pillow's passes, or None if nothing is compiled that does what it does."""
    return None if library is None else _find_order(library)


@functools.cache
def _find_order(library: ctypes.CDLL) -> RowsLast | None:
    draw = np.random.Generator(np.random.PCG64(0))
    images = [(Image.fromarray(draw.integers(0, 256, (*of, 3), np.uint8)), to) for of, to in PROBES]
    for rows_last in ORDERS:
        if all(_is_pillows(library, rows_last, image, size) for image, size in images):
            return rows_last
    log.info("%s does not do what this Pillow does: without it augmentation takes longer", SOURCE.name)
    return None


def _is_pillows(library: ctypes.CDLL, rows_last: RowsLast, image: Image.Image, size: tuple[int, int]) -> bool:
    pixels, fill = _Pixels.of(library, image), (1, 2, 3)
    if pixels is None:
        return False
    box, order = (0, 0, image.height, image.width), rows_last(image.height, image.width, *size)
    for resample in FILTERS.values():
        ours = [_resize(library, pixels, box, size, resample, order, False)]
        theirs = [image.resize(size[::-1], resample)]
        for matrix in MATRICES:
            ours.append(_transform(library, pixels, matrix, resample, fill))
            theirs.append(image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill))
        if any(a is None or a.tobytes() != b.tobytes() for a, b in zip(ours, theirs, strict=True)):
            return False
    return True


def normalize(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Does what torchvision's ToTensor and Normalize do.

    Args:
        pixels: (N, H, W, channels) 8-bit, of 3 channels or 1.
        mean, std: (channels,) float, of values in [0, 1], on the same device.

    Returns:
        (N, H, W, channels) float.
    """
    pixels, library = pixels.contiguous(), _library() if pixels.is_cpu else None
    count, height, width, channels = pixels.shape
    result = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    if library is not None:
        values = torch.arange(256.0).div(255)
        table = ((values - mean[:, None]) / std[:, None]).float().contiguous()
        pixels = pixels.contiguous()
        arguments = pixels.data_ptr(), pixels.numel() // channels, channels, table.data_ptr(), result.data_ptr()
        library.look_up(*arguments, torch.get_num_threads())
        return result
    # Whole rows, because a broadcast over an innermost dimension of 3 is slow; on a CPU image by image, which stays in
    # the cache.
    mean, std = mean.repeat(width), std.repeat(width)
    flat, at_once = pixels.view(count, height, -1), 1 if pixels.is_cpu else count
    rows = result.view(count, height, -1)
    scratch = torch.empty_like(rows[:at_once])
    for source, target in zip(flat.split(at_once), rows.split(at_once), strict=True):
        torch.div(scratch.copy_(source).div_(255).sub_(mean), std, out=target)
    return result


def _library() -> ctypes.CDLL | None:
    library = compiling.library(SOURCE, *FLAGS)
    return None if library is None else _typed(library)


@functools.cache
def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    number, place = ctypes.c_int64, ctypes.c_void_p
    library.pixels_of.argtypes, library.pixels_of.restype = [place, number], place
    library.resize.argtypes = [place, *[number] * 3, place, *[number] * 5]
    library.transform.argtypes = [place, number, number, place, place, number]
    library.pack.argtypes = [place, number, place]
    library.look_up.argtypes = [place, number, number, place, place, number]
    for function in (library.resize, library.transform, library.pack, library.look_up):
        function.restype = None
    return library
