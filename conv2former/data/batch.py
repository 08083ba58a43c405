"""From one image to a batch: seeding, transforms, and what becomes of an image that cannot be read."""

from __future__ import annotations

import enum
import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import auto_augment, create_transform

from ..config import Config, img_size_at
from ..config.schema import DataConfig
from ..errors import DataError
from .images import UnreadableImage

__all__ = [
    "Batch",
    "Item",
    "Skipped",
    "Stream",
    "collate",
    "eval_transform",
    "load_image",
    "seed_all",
    "train_transforms",
]


class Stream(enum.IntEnum):
    """What a random number is for, so that equal places in different streams draw different numbers."""

    INIT = 0
    IMAGE = 1
    STEP = 2
    ORDER = 3


def seed_all(stream: Stream, *place: int) -> None:
    """Seeds Python, NumPy and torch, on the CPU and the current GPU, from a place in the run: (seed, epoch, index)."""
    words = np.random.SeedSequence([stream, *map(int, place)]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - timm's augmentation draws from the global generator
    # not torch.manual_seed, which takes a stack trace for every kind of device that there might be
    seed = int(words[2]) << 31 ^ int(words[3])
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def train_transforms(config: Config) -> list[Any]:
    """Returns timm's training transform of every epoch: a PIL image to a normalised float tensor, (3, size, size).

    The size is that of `img_size_at`; epochs of one size share a transform.
    """
    data, augment = config.data, config.augment

    def build(size: int) -> Any:
        transform = create_transform(
            size,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            interpolation=augment.interpolation,
            mean=data.mean,
            std=data.std,
            re_prob=augment.re_prob,
            re_mode=augment.re_mode,
        )
        for step in transform.transforms:
            policies = [getattr(step, "ops", []), *getattr(step, "policy", [])]  # of RandAugment, of AutoAugment
            for operation in itertools.chain.from_iterable(policies):
                if operation.aug_fn is auto_augment.posterize:
                    operation.aug_fn = _posterize
        return transform

    sizes = [img_size_at(config, epoch) for epoch in range(config.schedule.epochs + config.schedule.cooldown_epochs)]
    of_size = {size: build(size) for size in sorted(set(sizes))}
    return [of_size[size] for size in sizes]


def _posterize(image: Any, bits: int, **kwargs: Any) -> Any:
    """Keeps the highest `bits` of every value. Strong policies draw 0, which is black, and which Pillow 13 refuses."""
    return auto_augment.posterize(image, bits, **kwargs) if bits > 0 else image.point(lambda value: 0)


def eval_transform(data: DataConfig) -> Any:
    """Returns timm's evaluation transform: a PIL image to a normalised float tensor, (3, img_size, img_size)."""
    return create_transform(
        data.img_size,
        is_training=False,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        crop_pct=data.crop_pct,
        crop_mode=data.crop_mode,
    )


class Skipped(NamedTuple):
    """An image that cannot be read, in a run with `data.on_error: skip`."""

    name: str
    reason: str


class Batch(NamedTuple):
    """Images, (N, 3, H, W) float, their class indices, (N,) int64, and what could not be read.

    `indices`, (N,) int64, are the images' places in the data set, -1 where it has none: in a stream.
    """

    images: torch.Tensor
    labels: torch.Tensor
    skipped: list[Skipped]
    indices: torch.Tensor = torch.empty(0, dtype=torch.int64)


Item = tuple[torch.Tensor, int, int] | Skipped


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
    try:
        image, label = read()
    except UnreadableImage as e:
        if skip:
            return Skipped(e.name, str(e))
        raise UnreadableImage(f"{e}; or go on without such images: data.on_error=skip", e.name) from None
    if place is not None:
        seed_all(Stream.IMAGE, *place)
    return transform(image), label, index


def collate(items: list[Item], fill: bool) -> Batch:
    """Makes a batch of loaded images.

    Args:
        items: of one batch.
        fill: put a copy of a neighbour in an unreadable image's place. In training a batch must be whole, because
            mixup pairs its images, and the place of every other image must stay what it would have been. Without it the
            batch is smaller, so that an evaluation counts every readable image once and no other.

    Raises:
        DataError: not one image can be read, and the places are to be filled.
    """
    skipped = [item for item in items if isinstance(item, Skipped)]
    kept: list[tuple[torch.Tensor, int, int]] = []
    readable = [item for item in items if not isinstance(item, Skipped)]
    if fill and not readable:
        raise DataError(f"not one image of a batch of {len(items)} can be read: {skipped[0].reason}")
    if fill:
        previous = readable[-1]
        for item in items:
            previous = previous if isinstance(item, Skipped) else item
            kept.append(previous)
    else:
        kept = readable
    images = torch.stack([image for image, _, _ in kept]) if kept else torch.empty(0, 3, 1, 1)
    labels, indices = (torch.tensor([item[k] for item in kept], dtype=torch.int64) for k in (1, 2))
    return Batch(images, labels, skipped, indices)
