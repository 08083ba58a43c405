"""Loaders of images with masks, whose every random draw is a function of where it happens; see data/loader.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import DataLoader

from ...data import EpochSampler, Skipped
from ...data.batch import Item
from ...data.loader import Loader, Share, TrainLoader, Transformed, workers_for
from ...data.pixels import normalize
from ...data.workers import Sent
from ...errors import DataError
from .augment import EvalTransform, Pixels, TrainTransform
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
    kept = [item for item in items if not isinstance(item, Skipped)]
    found = [cast(Pixels, pixels) for pixels, _, _ in kept]
    skipped = [item for item in items if isinstance(item, Skipped)]
    places = [place for _, _, place in kept]
    return EvalBatch(
        [pixels.image for pixels in found],
        [pixels.mask for pixels in found],
        skipped,
        places,
        [pixels.name for pixels in found],
    )


def _collate_crops(items: list[Item]) -> MaskBatch:
    """Makes a batch of crops, (N, H, W, channels) of 8 bits, with a copy of a neighbour in an unreadable one's place.

    Raises:
        DataError: not one image can be read.
    """
    kept = [item for item in items if not isinstance(item, Skipped)]
    skipped = [item for item in items if isinstance(item, Skipped)]
    if not kept:
        raise DataError(f"not one image of a batch of {len(items)} can be read: {skipped[0].reason}")
    whole, previous = [], kept[-1]
    for item in items:
        previous = previous if isinstance(item, Skipped) else item
        whole.append(previous[0])
    images = torch.stack([pixels.image.permute(1, 2, 0) for pixels in whole])
    return MaskBatch(images, torch.stack([pixels.mask for pixels in whole]), skipped)


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
    workers, images = workers_for(config.data), config.data.preprocessing
    transform = TrainTransform(config, len(source.class_names))
    epochs = config.schedule.epochs + config.schedule.cooldown_epochs
    return TrainLoader(
        Transformed(cast(Any, source), [transform] * epochs, config.data.on_error == "skip", sampler.seed),
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=Sent(_collate_crops),
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_init,
        finish=Finish(torch.tensor(images.mean, device=device), torch.tensor(images.std, device=device)),
    )


def eval_loader(
    source: PairSource, config: SegmentationConfig, rank: int, world_size: int, device: torch.device, worker_init: Any
) -> DataLoader:
    """Returns a loader of `EvalBatch`es over this device's share of the images: every one on just one device."""
    workers = workers_for(config.data)
    transform = EvalTransform(config.data.short_side, config.data.preprocessing.channels)
    return Loader(
        Transformed(cast(Any, source), [transform], config.data.on_error == "skip"),
        batch_size=config.train.eval_batch_size or config.train.batch_size,
        sampler=Share(len(source), rank, world_size),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=Sent(_collate),
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_init,
    )
