"""Loaders whose every random draw is a function of where it happens, never of what was drawn before.

The order of an epoch is a function of (seed, epoch), the augmentation of an image of (seed, epoch, index). So there is
no state to save: a run that starts again in the middle of an epoch sees what the other would have seen, the number of
loader workers changes nothing, and the same global batches come for any number of devices that gives the same global
batch.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config.schema import AugmentConfig, DataConfig
from ..errors import DataError
from .sources import DataSource

__all__ = ["EpochSampler", "Stream", "eval_loader", "eval_transform", "seed_all", "train_loader", "train_transform"]


class Stream(enum.IntEnum):
    """What a random number is for, so that equal places in different streams draw different numbers."""

    INIT = 0
    IMAGE = 1
    STEP = 2


def seed_all(stream: Stream, *place: int) -> None:
    """Seeds Python, NumPy and torch on every device from a place in the run, such as (seed, epoch, index)."""
    words = np.random.SeedSequence([stream, *map(int, place)]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - timm's augmentation draws from the global generator
    torch.manual_seed(int(words[2]) << 31 ^ int(words[3]))


def train_transform(data: DataConfig, augment: AugmentConfig) -> Any:
    """Returns timm's training transform: a PIL image to a normalised float tensor, (3, img_size, img_size)."""
    return create_transform(
        data.img_size,
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


class _Transformed(Dataset):
    """Images through a transform. A key is an index, or, to seed the transform, a pair of epoch and index."""

    def __init__(self, source: DataSource, transform: Any, seed: int = 0) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        index = key if isinstance(key, int) else key[1]
        image, label = self.source.images[index]
        if not 0 <= label < len(self.source.class_names):  # on a GPU it would be an assertion without a name
            raise DataError(f"{self.source.name}, image {index}: class {label} of {len(self.source.class_names)}")
        if isinstance(key, tuple):
            seed_all(Stream.IMAGE, self.seed, *key)
        return self.transform(image), label


class EpochSampler(Sampler):
    """Deals one global order of the images to devices, in batches of (epoch, index).

    The order is cut into global batches, a rest is left out; a global batch is cut into accumulation steps, and each of
    those into the devices' batches.

    Args:
        num_images: size of the data set.
        batch_size: images per device and forward pass.
        accum_steps: forward passes per optimizer step.
        rank, world_size: this device, and how many there are.
        seed: of the order.
    """

    def __init__(
        self, num_images: int, batch_size: int, accum_steps: int = 1, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        self.num_images, self.batch_size, self.accum_steps = num_images, batch_size, accum_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = self.first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a whole epoch."""
        return self.num_images // (self.batch_size * self.accum_steps * self.world_size)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Chooses what the next iteration goes over: `epoch`, from optimizer step `first_step` of it on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.accum_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        used = order[: self.steps_per_epoch * self.accum_steps * self.world_size * self.batch_size]
        batches = used.reshape(-1, self.world_size, self.batch_size)[self.first_step * self.accum_steps :, self.rank]
        for batch in batches:
            yield [(self.epoch, int(index)) for index in batch]


def train_loader(
    source: DataSource, data: DataConfig, augment: AugmentConfig, sampler: EpochSampler, pin_memory: bool
) -> DataLoader:
    """Returns a loader of (images, labels): (batch_size, 3, img_size, img_size) float and (batch_size,) int64."""
    return DataLoader(
        _Transformed(source, train_transform(data, augment), sampler.seed),
        batch_sampler=sampler,
        num_workers=data.workers,
        persistent_workers=data.workers > 0,
        pin_memory=pin_memory,
    )


def eval_loader(
    source: DataSource, data: DataConfig, batch_size: int, rank: int, world_size: int, pin_memory: bool
) -> DataLoader:
    """Returns a loader over this device's share of the images: every image on just one device, none twice."""
    return DataLoader(
        _Transformed(source, eval_transform(data)),
        batch_size=batch_size,
        sampler=list(range(rank, len(source), world_size)),
        num_workers=data.workers,
        pin_memory=pin_memory,
    )
