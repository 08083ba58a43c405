"""Loaders of images with masks, whose every random draw is a function of where it happens; see data/loader.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from ...data import EpochSampler, Skipped
from ...data.batch import Item
from ...data.pixels import normalize
from ..dense.loader import loaded, make_eval_loader, make_train_loader, mean_and_std, with_neighbours
from .augment import EvalTransform, TrainTransform
from .config import SegmentationConfig
from .pairs import PairSource

__all__ = ["EvalBatch", "MaskBatch", "eval_loader", "train_loader"]


class MaskBatch(NamedTuple):
    """Images of one size, (N, channels, H, W) float, and their masks, (N, H, W), see `Labels.to_indices`."""

    images: torch.Tensor
    masks: torch.Tensor
    skipped: list[Skipped]


class EvalBatch(NamedTuple):
    """Images to be evaluated, of any sizes.

    Attributes:
        images: each (channels, H, W) of 8 bits, resized.
        masks: each (H, W), of the image as it is stored.
        skipped: what could not be read.
        places: of the images in the data set.
        names: of the images.
    """

    images: list[torch.Tensor]
    masks: list[torch.Tensor]
    skipped: list[Skipped]
    places: list[int]
    names: list[str]


def _collate(items: list[Item]) -> EvalBatch:
    found, places, skipped = loaded(items)
    return EvalBatch(
        [pixels.image for pixels in found],
        [pixels.mask for pixels in found],
        skipped,
        places,
        [pixels.name for pixels in found],
    )


def _collate_crops(items: list[Item]) -> MaskBatch:
    """Makes a batch of crops, (N, H, W, channels) of 8 bits; see `with_neighbours`."""
    found, _, skipped = with_neighbours(items)
    images = torch.stack([pixels.image.permute(1, 2, 0) for pixels in found])
    return MaskBatch(images, torch.stack([pixels.mask for pixels in found]), skipped)


@dataclass(frozen=True)
class Finish:
    """Normalises crops on the device; they stay in the channels_last layout."""

    mean: torch.Tensor
    std: torch.Tensor

    def __call__(self, batch: MaskBatch) -> MaskBatch:
        pixels = batch.images.to(self.mean.device, non_blocking=True)
        return batch._replace(images=normalize(pixels, self.mean, self.std).permute(0, 3, 1, 2))


def train_loader(
    source: PairSource, config: SegmentationConfig, sampler: EpochSampler, device: torch.device, worker_init: Any
) -> DataLoader:
    """Returns a loader of `MaskBatch`es, augmented, in the order of `sampler`, on the device."""
    transform, finish = TrainTransform(config, len(source.class_names)), Finish(*mean_and_std(config.data, device))
    return make_train_loader(source, transform, config, sampler, device, worker_init, _collate_crops, finish)


def eval_loader(
    source: PairSource, config: SegmentationConfig, rank: int, world_size: int, device: torch.device, worker_init: Any
) -> DataLoader:
    """Returns a loader of `EvalBatch`es over this device's share of the images: every one on just one device."""
    transform = EvalTransform(config.data.short_side, config.data.preprocessing.channels)
    return make_eval_loader(source, transform, config, rank, world_size, device, worker_init, _collate)
