"""Loaders whose every random draw is a function of where it happens, never of what was drawn before.

The order of an epoch is a function of (seed, epoch), the augmentation of an image of (seed, epoch, index). So there is
no state to save: a run that starts again in the middle of an epoch sees what the other would have seen, the number of
loader workers changes nothing, and the same global batches come for any number of devices that gives the same global
batch. Streams keep all but the last: see streams.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import Config
from ..config.schema import DataConfig
from ..errors import DataError
from .batch import Batch, Item, collate, eval_transform, load_image, train_transforms
from .sources import DataSource
from .streams import StreamBatches, StreamImages, StreamSource

__all__ = ["EpochSampler", "batches", "eval_loader", "train_loader"]


class _Transformed(Dataset):
    """Images through a transform. A key is an index, or, to seed the transform, a pair of epoch and index."""

    def __init__(self, source: DataSource, transforms: list[Any], skip: bool, seed: int = 0) -> None:
        self.source, self.transforms, self.skip, self.seed = source, transforms, skip, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        if isinstance(key, tuple):
            epoch, index = key
            place = (self.seed, epoch, index)
            return load_image(lambda: self._read(index), self.transforms[epoch], self.skip, place, index)
        return load_image(lambda: self._read(key), self.transforms[0], self.skip, None, key)

    def _read(self, index: int) -> tuple[Any, int]:
        image, label = self.source.images[index]
        if not 0 <= label < len(self.source.class_names):  # on a GPU it would be an assertion without a name
            raise DataError(f"{self.source.name}, image {index}: class {label} of {len(self.source.class_names)}")
        return image, label


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
        keep_tail: deal also the whole batches of an epoch's last, shorter accumulation.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        accum_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        keep_tail: bool = False,
    ) -> None:
        self.num_images, self.batch_size, self.accum_steps = num_images, batch_size, accum_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        passes = num_images // (batch_size * world_size)
        self.passes = passes if keep_tail else passes // accum_steps * accum_steps
        self.epoch = self.first_step = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Chooses what the next iteration goes over: `epoch`, from optimizer step `first_step` of it on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.passes - self.first_step * self.accum_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        used = order[: self.passes * self.world_size * self.batch_size]
        batches = used.reshape(-1, self.world_size, self.batch_size)[self.first_step * self.accum_steps :, self.rank]
        for batch in batches:
            yield [(self.epoch, int(index)) for index in batch]


class _BatchNumbers(Sampler):
    """(epoch, number in it) of an EpochSampler's batches instead of their images: all that a stream needs to know."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        sampler = self.sampler
        for number in range(sampler.first_step * sampler.accum_steps, sampler.passes):
            yield sampler.epoch, number


def batches(loader: DataLoader) -> Iterator[Batch]:
    """Goes over a loader; an error from a worker has its own text, without the worker's traceback in front.

    Raises:
        DataError: of a sample.
    """
    try:
        yield from loader
    except DataError as e:
        text = str(e)
        if "Original Traceback" not in text:
            raise
        raise DataError(re.split(r"\n\S*(?:DataError|UnreadableImage): ", text)[-1].strip()) from None


def _itself(batch: Any) -> Any:
    return batch


def train_loader(
    source: DataSource | StreamSource, config: Config, sampler: EpochSampler, pin_memory: bool, worker_init: Any = None
) -> DataLoader:
    """Returns a loader of training batches, augmented, in the order of `sampler`.

    Args:
        source: the images.
        config: the run.
        sampler: chooses epoch and first step before each iteration.
        pin_memory: for a fast copy to a GPU.
        worker_init: called in every worker process with its number.
    """
    workers = config.data.workers
    common = {"pin_memory": pin_memory, "worker_init_fn": worker_init}
    transforms, skip = train_transforms(config), config.data.on_error == "skip"
    if isinstance(source, StreamSource):
        stream = StreamBatches(
            source, transforms, skip, sampler.batch_size, sampler.rank, sampler.world_size, sampler.seed
        )
        workers = stream.useful_workers(workers)
        return DataLoader(
            stream,
            batch_size=None,
            sampler=_BatchNumbers(sampler),
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_itself,
            **common,
        )
    return DataLoader(
        _Transformed(source, transforms, skip, sampler.seed),
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=partial(collate, fill=True),
        **common,
    )


def eval_loader(
    source: DataSource | StreamSource,
    data: DataConfig,
    batch_size: int,
    rank: int,
    world_size: int,
    pin_memory: bool,
    worker_init: Any = None,
) -> DataLoader:
    """Returns a loader over this device's share of the images: every image on just one device, none twice."""
    workers, transform, skip = data.workers, eval_transform(data), data.on_error == "skip"
    common = {
        "batch_size": batch_size,
        "pin_memory": pin_memory,
        "worker_init_fn": worker_init,
        "collate_fn": partial(collate, fill=False),
    }
    if isinstance(source, StreamSource):
        images = StreamImages(source, transform, skip, rank, world_size)
        return DataLoader(images, num_workers=images.useful_workers(workers), **common)
    return DataLoader(
        _Transformed(source, [transform], skip),
        sampler=cast(Any, range(rank, len(source), world_size)),
        num_workers=workers,
        **common,
    )
