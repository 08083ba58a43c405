"""Loaders of images with objects, whose every random draw is a function of where it happens; see data/loader.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from ...data import EpochSampler
from ...data.batch import Item
from ...data.pixels import normalize
from ..dense.loader import loaded, make_eval_loader, make_train_loader, mean_and_std, with_neighbours
from .augment import EvalTransform, TrainTransform
from .config import DetectionConfig
from .images import DetectionSource
from .objects import EvalBatch, TrainBatch

__all__ = ["eval_loader", "train_loader"]


def _collate(items: list[Item]) -> EvalBatch:
    found, places, skipped = loaded(items)
    return EvalBatch(
        [pixels.image for pixels in found],
        [pixels.size for pixels in found],
        [pixels.objects for pixels in found],
        skipped,
        places,
        [pixels.name for pixels in found],
    )


def _collate_augmented(items: list[Item]) -> TrainBatch:
    """Makes a batch of images, each (h, w, channels) of 8 bits; see `with_neighbours`."""
    found, _, skipped = with_neighbours(items)
    images = [pixels.image.permute(1, 2, 0).contiguous() for pixels in found]
    return TrainBatch(images, [pixels.target for pixels in found], skipped)


@dataclass(frozen=True)
class _Finish:
    """Moves images to the device, and normalises them there; targets are moved by the objective."""

    mean: torch.Tensor
    std: torch.Tensor

    def __call__(self, batch: TrainBatch) -> TrainBatch:
        device = self.mean.device
        images = [
            normalize(pixels.to(device, non_blocking=True)[None], self.mean, self.std)[0].permute(2, 0, 1)
            for pixels in batch.images
        ]
        return batch._replace(images=images)


def train_loader(
    source: DetectionSource, config: DetectionConfig, sampler: EpochSampler, device: torch.device, worker_init: Any
) -> DataLoader:
    """Returns a loader of `TrainBatch`es, augmented, in the order of `sampler`, on the device."""
    transform, finish = TrainTransform(config), _Finish(*mean_and_std(config.data, device))
    return make_train_loader(source, transform, config, sampler, device, worker_init, _collate_augmented, finish)


def eval_loader(
    source: DetectionSource,
    config: DetectionConfig,
    rank: int,
    world_size: int,
    device: torch.device,
    worker_init: Any,
) -> DataLoader:
    """Returns a loader of `EvalBatch`es over this device's share of the images: every one on just one device."""
    data = config.data
    transform = EvalTransform(data.short_side, data.long_side, data.preprocessing.channels)
    return make_eval_loader(source, transform, config, rank, world_size, device, worker_init, _collate)
