"""What loaders of images with masks or boxes share: batches where an image cannot be read, and their settings."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import DataLoader

from ...config.base import BaseConfig, BaseDataConfig
from ...data import EpochSampler, Skipped
from ...data.batch import Item
from ...data.loader import Loader, Share, TrainLoader, Transformed, workers_for
from ...data.workers import Sent
from ...errors import DataError

__all__ = ["Loaded", "loaded", "make_eval_loader", "make_train_loader", "mean_and_std", "with_neighbours"]


class Loaded(NamedTuple):
    """What could be read of a batch: each image as its transform made it, their places, and what was skipped."""

    found: list[Any]
    places: list[int]
    skipped: list[Skipped]


def loaded(items: list[Item]) -> Loaded:
    """Divides a batch into what could be read and what could not."""
    kept = [item for item in items if not isinstance(item, Skipped)]
    skipped = [item for item in items if isinstance(item, Skipped)]
    return Loaded([found for found, _, _ in kept], [place for _, _, place in kept], skipped)


def with_neighbours(items: list[Item]) -> Loaded:
    """As `loaded`, with the image before it once more in an unreadable one's place; see `collate_augmented`.

    Raises:
        DataError: not one image can be read.
    """
    kept, _, skipped = loaded(items)
    if not kept:
        raise DataError(f"not one image of a batch of {len(items)} can be read: {skipped[0].reason}")
    whole, places, previous = [], [], next(item for item in reversed(items) if not isinstance(item, Skipped))
    for item in items:
        previous = previous if isinstance(item, Skipped) else item
        whole.append(previous[0])
        places.append(previous[2])
    return Loaded(whole, places, skipped)


def mean_and_std(data: BaseDataConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what images are normalised by, each (channels,), on a device."""
    given = data.preprocessing
    return torch.tensor(given.mean, device=device), torch.tensor(given.std, device=device)


def make_train_loader(
    source: Any,
    transform: Any,
    config: BaseConfig,
    sampler: EpochSampler,
    device: torch.device,
    worker_init: Any,
    collate: Any,
    finish: Any,
) -> DataLoader:
    """Returns a loader of augmented images in the order of `sampler`.

    Args:
        source: a split: `images[i]` is what `transform` takes, and 0 in the place of a class.
        transform: draws from torch's generator alone.
        config: the run.
        sampler: chooses epoch and first step before each iteration.
        device: where the run computes.
        worker_init: called in every worker process with its number.
        collate: makes a batch of a worker's items.
        finish: makes of it, in this process, what is yielded.
    """
    workers, epochs = workers_for(config.data), config.schedule.epochs + config.schedule.cooldown_epochs
    return TrainLoader(
        Transformed(cast(Any, source), [transform] * epochs, config.data.on_error == "skip", sampler.seed),
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=Sent(collate),
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_init,
        finish=finish,
    )


def make_eval_loader(
    source: Any,
    transform: Any,
    config: BaseConfig,
    rank: int,
    world_size: int,
    device: torch.device,
    worker_init: Any,
    collate: Any,
) -> DataLoader:
    """Returns a loader over this device's share of the images: every one on just one device.

    Args:
        source, config, device, worker_init, collate: as for training.
        transform: without random draws.
        rank, world_size: this device, and how many there are.
    """
    workers = workers_for(config.data)
    return Loader(
        Transformed(cast(Any, source), [transform], config.data.on_error == "skip"),
        batch_size=config.train.eval_batch_size or config.train.batch_size,
        sampler=Share(len(source), rank, world_size),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=Sent(collate),
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_init,
    )
