"""From single images to a batch, and what becomes of an image that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import DataError
from . import pixels
from .images import UnreadableImage, any_size
from .seeding import Stream, seed_all
from .workers import portable_errors

__all__ = ["Batch", "Finish", "Item", "PixelBatch", "Skipped", "collate", "collate_augmented", "load_image"]


class Skipped(NamedTuple):
    """An image that cannot be read, in a run with `data.on_error: skip`."""

    name: str
    reason: str


class Batch(NamedTuple):
    """Images, (N, channels, H, W) float, their class indices, (N,) int64, and what could not be read.

    `indices`, (N,) int64, are the images' places in the data set, -1 where it has none: in a stream.
    """

    images: torch.Tensor
    labels: torch.Tensor
    skipped: list[Skipped]
    indices: torch.Tensor = torch.empty(0, dtype=torch.int64)


class PixelBatch(NamedTuple):
    """Augmented images as they travel between processes, a quarter of a `Batch`; the rest as there.

    Attributes:
        pixels: (N, H, W, channels) 8-bit.
        patches: (P, 5) int64, the rectangles to fill: image, top, left, height, width.
        values: (V,) float, what to fill them with: the (channels, h, w) of each, one after the other.
    """

    pixels: torch.Tensor
    patches: torch.Tensor
    values: torch.Tensor
    labels: torch.Tensor
    skipped: list[Skipped]
    indices: torch.Tensor


Item = tuple[Any, int, int] | Skipped


def load_image(
    read: Callable[[], Any], transform: Any, skip: bool, place: tuple[int, ...] | None, index: int = -1
) -> Item:
    """Reads and transforms one image.

    Args:
        read: returns a PIL image and its class index.
        transform: of the image.
        skip: return an unreadable image as `Skipped` instead of raising.
        place: seeds the transform, see `Stream.IMAGE`; None for one without random draws.
        index: of the image in the data set.

    Raises:
        DataError: the image is unreadable, or anything else is wrong with the sample.
    """
    with portable_errors():
        try:
            image, label = read()
        except UnreadableImage as e:
            if skip:
                return Skipped(e.name, str(e))
            raise UnreadableImage(f"{e}; or go on without such images: data.on_error=skip", e.name) from None
        if place is not None:
            seed_all(Stream.IMAGE, *place)
        with any_size():
            return transform(image), label, index


def collate(items: list[Item]) -> Batch:
    """Makes a batch of loaded images, (channels, H, W) float.

    It is smaller where an image could not be read, so that an evaluation counts every readable one once and no other.
    """
    kept, skipped = _divided(items)
    images = torch.stack([image for image, _, _ in kept]) if kept else torch.empty(0, 3, 1, 1)
    return Batch(images, _numbers(kept, 1), skipped, _numbers(kept, 2))


def collate_augmented(items: list[Item]) -> PixelBatch:
    """Makes a batch of loaded images, each an `Augmented`, with a copy of a neighbour in an unreadable image's place.

    In training a batch must be whole, because mixup pairs its images, and the place of every other image must stay what
    it would have been.

    Raises:
        DataError: not one image can be read.
    """
    kept, skipped = _divided(items)
    if not kept:
        raise DataError(f"not one image of a batch of {len(items)} can be read: {skipped[0].reason}")
    whole, previous = [], kept[-1]
    for item in items:
        previous = previous if isinstance(item, Skipped) else item
        whole.append(previous)
    patches = [(i, *patch) for i, (augmented, _, _) in enumerate(whole) for patch in augmented.patches]
    places = torch.tensor([(i, top, left, *values.shape[1:]) for i, top, left, values in patches], dtype=torch.int64)
    # one tensor, because each that goes between processes holds a file open
    values = torch.cat([torch.empty(0), *(values.flatten() for *_, values in patches)])
    images = pixels.stack([augmented.image for augmented, _, _ in whole])
    return PixelBatch(images, places.reshape(-1, 5), values, _numbers(whole, 1), skipped, _numbers(whole, 2))


def _divided(items: list[Item]) -> tuple[list[tuple[Any, int, int]], list[Skipped]]:
    """Divides items into those that could be read and the others."""
    kept = [item for item in items if not isinstance(item, Skipped)]
    return kept, [item for item in items if isinstance(item, Skipped)]


def _numbers(items: list[tuple[Any, int, int]], which: int) -> torch.Tensor:
    return torch.tensor([item[which] for item in items], dtype=torch.int64)


class Finish:
    """Normalises augmented images and erases from them, to the bit as torchvision's ToTensor and Normalize would.

    Args:
        mean, std: of each channel, of values in [0, 1].
        device: where the images are to be.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.device = device

    def __call__(self, batch: PixelBatch) -> Batch:
        """Returns the batch with (N, channels, H, W) float images, in the channels_last layout."""
        images = pixels.normalize(batch.pixels.to(self.device, non_blocking=True), self.mean, self.std)
        images, channels = images.permute(0, 3, 1, 2), len(self.mean)
        values = batch.values.to(self.device, non_blocking=True)
        sizes = batch.patches[:, 3:].prod(1) * channels
        for (i, top, left, h, w), patch in zip(batch.patches.tolist(), values.split(sizes.tolist()), strict=True):
            images[i, :, top : top + h, left : left + w] = patch.view(channels, h, w)
        return Batch(images, batch.labels, batch.skipped, batch.indices)
