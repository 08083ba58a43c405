"""Images that are read once and then stay in memory as the pixels that reading has given.

A cache holds what `DataSource.images` returns, of 8 bits in RGB, or grey where the network takes that, so that all that
comes after reading, every random draw included, is as without it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image

from ..config.base import BaseDataConfig
from ..errors import DataError
from .batch import Item, Skipped
from .images import UnreadableImage
from .loader import Loader, Transformed, batches
from .shared import SharedBytes
from .split import DataSource
from .transforms import in_channels
from .workers import Sent

__all__ = [
    "CachePlace",
    "CachedImages",
    "bytes_text",
    "estimate_bytes",
    "in_memory",
    "read_at_once",
    "read_images",
    "too_large",
]

MODES = {1: "L", 3: "RGB"}
SAMPLE = 100  # images that are read to estimate the size of all
BATCH_BYTES = 1 << 20  # that travel from a worker at once
MOST_AT_ONCE = 256  # images of them
NAME_BYTES = 64  # about, in an estimate
SHARE = 0.8  # of the free memory that images may take: the run itself needs some
ROW = np.dtype([(name, np.int64) for name in ("start", "width", "height", "label", "name", "name_bytes")])


class CachePlace(NamedTuple):
    """Where other processes of the machine find a cache: `SharedBytes.address`, and what the bytes do not hold."""

    address: str
    images: int
    channels: int
    unreadable: dict[int, Skipped]


class CachedImages:
    """Images in memory, as `DataSource.images`; of any sizes. What is pickled of them is small.

    Args:
        memory: the pixels of one image after the other, their names, and a `ROW` for each image at the end.
        count: images.
        channels: of each, 3 or 1.
        unreadable: those that could not be read, by index; reading them raises what it raised then.
    """

    def __init__(self, memory: SharedBytes, count: int, channels: int, unreadable: dict[int, Skipped]) -> None:
        self._memory, self._count, self._channels, self._unreadable = memory, count, channels, unreadable

    @classmethod
    def open(cls, place: CachePlace) -> CachedImages:
        """Opens the cache of another process; see `SharedBytes.open`."""
        return cls(SharedBytes.open(place.address), *place[1:])

    @property
    def place(self) -> CachePlace:
        """For `open` in another process, as long as this one has the cache."""
        return CachePlace(self._memory.address, self._count, self._channels, self._unreadable)

    @property
    def size(self) -> int:
        """Bytes of the memory."""
        return self._memory.size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        start, width, height, label, _, _ = self._rows[index].item()
        if not width:
            name, reason = self._unreadable[index]
            raise UnreadableImage(reason, name)
        pixels = self._memory.content[start : start + width * height * self._channels]
        return Image.frombytes(MODES[self._channels], (width, height), pixels), label

    @property
    def labels(self) -> np.ndarray:
        return self._rows["label"].copy()

    def name(self, index: int) -> str:
        *_, start, length = self._rows[index].item()
        return self._memory.content[start : start + length].decode("utf-8", "surrogateescape")

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        return self._memory.array(ROW, self._count, self._memory.size - self._count * ROW.itemsize)

    def __reduce__(self) -> tuple[Callable[..., CachedImages], tuple[Any, ...]]:
        return CachedImages, (self._memory, self._count, self._channels, self._unreadable)


class _Pixels(NamedTuple):
    """Images as they travel to the process that fills the cache.

    Attributes:
        sizes: (N, 2) int64, width and height; 0 of what could not be read.
        values: (bytes,) 8-bit, image after image.
    """

    sizes: torch.Tensor
    values: torch.Tensor
    skipped: list[Skipped]


@dataclass(frozen=True)
class _Pack:
    """A transform: an image to its width, height and bytes."""

    channels: int

    def __call__(self, image: Image.Image) -> tuple[int, int, bytes]:
        image = in_channels(image, self.channels)
        return image.width, image.height, image.tobytes()


def _collate(items: list[Item]) -> _Pixels:
    packed = [(0, 0, b"") if isinstance(item, Skipped) else item[0] for item in items]
    values = np.frombuffer(b"".join(content for _, _, content in packed), np.uint8).copy()
    sizes = torch.tensor([(width, height) for width, height, _ in packed], dtype=torch.int64)
    return _Pixels(sizes, torch.from_numpy(values), [item for item in items if isinstance(item, Skipped)])


def estimate_bytes(source: DataSource, data: BaseDataConfig) -> int:
    """Returns about how many bytes a cache of a split takes, by some of its images that can be read.

    Raises:
        DataError: a sample is wrong.
    """
    count, channels = len(source), data.preprocessing.channels
    sizes = []
    for index in sorted({i * count // SAMPLE for i in range(SAMPLE)}):
        with contextlib.suppress(UnreadableImage):
            width, height = source.images[index][0].size
            sizes.append(width * height * channels)
    return round(sum(sizes) / max(1, len(sizes)) * count) + count * (ROW.itemsize + NAME_BYTES)


def too_large(what: str, needed: str, room: int) -> DataError:
    """Returns the error of images for which there is too little memory."""
    return DataError(
        f"data.cache: {what} take {needed} as pixels, and there is room for {bytes_text(room)} "
        f"({SHARE:.0%} of the free memory); set data.cache=none, so that images are read whenever they are needed"
    )


def bytes_text(number: int) -> str:
    """Returns a number of bytes for people, in GiB or MiB."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


def read_images(
    source: DataSource, data: BaseDataConfig, expected: int, room: int | None, workers: int, worker_init: Any = None
) -> Generator[int, None, CachedImages]:
    """Reads a split into memory.

    Args:
        source: the split.
        data: channels, and what to do about unreadable images.
        expected: bytes, by `estimate_bytes`.
        room: bytes that it may be; None where nobody knows.
        workers: processes that read.
        worker_init: called in every worker process with its number.

    Yields:
        How many images have just been read.

    Returns:
        The images in memory.

    Raises:
        DataError: a sample is wrong, or there is not enough memory.
    """
    count, channels = len(source), data.preprocessing.channels
    loader = Loader(
        Transformed(source, [_Pack(channels)], data.on_error == "skip"),
        batch_size=min(max(1, BATCH_BYTES * count // expected), MOST_AT_ONCE),
        num_workers=workers,
        collate_fn=Sent(_collate),
        worker_init_fn=worker_init,
    )
    memory, rows = SharedBytes.create(), np.zeros(count, ROW)
    rows["label"] = source.images.labels
    unreadable: dict[int, Skipped] = {}
    done = 0
    for pixels in cast(Iterator[_Pixels], batches(loader)):
        sizes = pixels.sizes.numpy()
        part = rows[done : done + len(sizes)]
        part["width"], part["height"] = sizes.T
        lengths = sizes.prod(1) * channels
        part["start"] = memory.size + np.cumsum(lengths) - lengths
        unreadable |= zip((done + np.flatnonzero(lengths == 0)).tolist(), pixels.skipped, strict=True)
        if room is not None and memory.size + len(pixels.values) > room:
            raise too_large(f"the images of {source.name}", f"more than {bytes_text(room)}", room)
        _append(memory, pixels.values.numpy())
        done += len(sizes)
        yield len(sizes)
    names = [source.images.name(i).encode("utf-8", "surrogateescape") for i in range(count)]
    rows["name_bytes"] = [len(name) for name in names]
    rows["name"] = memory.size + np.cumsum(rows["name_bytes"]) - rows["name_bytes"]
    _append(memory, b"".join(names))
    _append(memory, rows.view(np.uint8))
    return CachedImages(memory, count, channels, unreadable)


def read_at_once(source: DataSource, data: BaseDataConfig, workers: int = 0, room: int | None = None) -> CachedImages:
    """Does what `read_images` does, and returns what that returns."""
    reading = read_images(source, data, estimate_bytes(source, data), room, workers)
    while True:
        try:
            next(reading)
        except StopIteration as end:
            return end.value


def in_memory(source: DataSource, images: CachedImages) -> DataSource:
    """Returns a split with its images in memory; it no longer knows the files that they were in."""
    return replace(source, images=images, files=(), real_files=None)


def _append(memory: SharedBytes, content: Any) -> None:
    try:
        memory.append(content)
    except OSError as e:
        raise DataError(
            f"data.cache: the memory is full after {bytes_text(memory.size)} of pixels ({e.strerror}); set "
            "data.cache=none"
        ) from None
