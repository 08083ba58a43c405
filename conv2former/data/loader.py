"""Loaders whose every random draw is a function of where it happens, never of what was drawn before.

The order of an epoch is a function of (seed, epoch), the augmentation of an image of (seed, epoch, index). So there is
no state to save: a run that starts again in the middle of an epoch sees what the other would have seen, the number of
loader workers changes nothing, and the same global batches come for any number of devices that gives the same global
batch. Streams keep all but the last: see streams.py.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import Config
from ..config.base import BaseDataConfig
from ..config.schema import DataConfig
from ..errors import DataError, RunStopped
from .batch import Batch, Finish, Item, collate, collate_augmented, load_image
from .seeding import Stream
from .sources import DataSource
from .streams import StreamBatches, StreamImages, StreamSource
from .transforms import eval_transform, train_transforms
from .workers import Sent, context, raise_lost_worker, starting_workers, stop_workers, worker_errors

__all__ = [
    "EpochSampler",
    "Loader",
    "Share",
    "TrainLoader",
    "Transformed",
    "batches",
    "eval_loader",
    "running_workers",
    "train_loader",
    "usable_cores",
    "workers_for",
]

_MOST_WORKERS = 8  # that a loader gets by itself


class Transformed(Dataset):
    """Images through a transform. A key is an index, or, to seed the transform, that of an EpochSampler.

    Args:
        source: the images.
        transforms: of the epochs.
        skip: return an unreadable image as `Skipped` instead of raising.
        seed: of the run.
        alternating: turn left and right round, before the transform, each time that an image comes in training if it
            was not the time before. In the first epoch that is done to half of the images, which follow from the seed.
    """

    def __init__(
        self, source: DataSource, transforms: list[Any], skip: bool, seed: int = 0, alternating: bool = False
    ) -> None:
        self.source, self.transforms, self.skip, self.seed = source, transforms, skip, seed
        self.alternating = alternating

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, ...]) -> Item:
        if isinstance(key, tuple):
            epoch, index, *repeat = key
            place = (self.seed, epoch, index, *repeat)
            mirror = self.alternating and bool((self._sides[index] + epoch + sum(repeat)) % 2)
            return load_image(lambda: self._read(index, mirror), self.transforms[epoch], self.skip, place, index)
        return load_image(lambda: self._read(key), self.transforms[0], self.skip, None, key)

    @functools.cached_property
    def _sides(self) -> np.ndarray:
        """(images,) 0 or 1 int64: which are mirrored in the first epoch."""
        return np.random.default_rng([Stream.SIDE, self.seed]).integers(2, size=len(self))

    def _read(self, index: int, mirror: bool = False) -> tuple[Any, int]:
        image, label = self.source.images[index]
        if not 0 <= label < len(self.source.class_names):  # on a GPU it would be an assertion without a name
            raise DataError(f"{self.source.name}, image {index}: class {label} of {len(self.source.class_names)}")
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image, label


class EpochSampler(Sampler):
    """Deals one global order of the images to devices, in batches of (epoch, index).

    The order is cut into global batches, a rest is left out; a global batch is cut into accumulation steps, and each of
    those into the devices' batches. An image that comes more than once in an epoch is (epoch, index, repeat) from the
    second time on, with repeat = 1, 2, ..., so that it is augmented anew.

    Args:
        num_images: size of the data set.
        batch_size: images per device and forward pass.
        accum_steps: forward passes per optimizer step.
        rank, world_size: this device, and how many there are.
        seed: of the order.
        keep_tail: deal also the whole batches of an epoch's last, shorter accumulation.
        labels: (images,) class indices; needed unless `sampling` is uniform.
        sampling: see `class_quotas`.
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
        labels: np.ndarray | None = None,
        sampling: str = "uniform",
    ) -> None:
        self.sampling = sampling
        if sampling != "uniform":
            assert labels is not None
            counts = np.bincount(labels)
            self._of_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        self.num_images, self.batch_size, self.accum_steps = num_images, batch_size, accum_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        passes = num_images // (batch_size * world_size)
        self.passes = passes if keep_tail else passes // accum_steps * accum_steps
        self.epoch = self.first_step = 0
        self.idle = False

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Chooses what the next iteration goes over: `epoch`, from optimizer step `first_step` of it on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.passes - self.first_step * self.accum_steps

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        if self.idle:
            return
        order, repeats = self._order()
        used = self.passes * self.world_size * self.batch_size
        shape = (-1, self.world_size, self.batch_size)
        first = self.first_step * self.accum_steps
        mine = (part[:used].reshape(shape)[first:, self.rank].tolist() for part in (order, repeats))
        for indices, times in zip(*mine, strict=True):
            yield [
                (self.epoch, i, repeat) if repeat else (self.epoch, i) for i, repeat in zip(indices, times, strict=True)
            ]

    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the image of each place of the epoch, and how often it has come before: both (images,)."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.sampling == "uniform":
            return rng.permutation(self.num_images), np.zeros(self.num_images, dtype=np.int64)
        images, repeats = [], []
        counts = np.array([len(members) for members in self._of_class])
        for members, quota in zip(self._of_class, class_quotas(counts, self.sampling, rng).tolist(), strict=True):
            if quota:
                times = -(-quota // len(members))  # through the class, the last time not to the end
                images.append(np.concatenate([rng.permutation(members) for _ in range(times)])[:quota])
                repeats.append(np.repeat(np.arange(times), len(members))[:quota])
        order = rng.permutation(self.num_images)
        return np.concatenate(images)[order], np.concatenate(repeats)[order]


def class_quotas(counts: np.ndarray, sampling: str, rng: np.random.Generator) -> np.ndarray:
    """Returns how many places of an epoch each class gets.

    Args:
        counts: (classes,) training images.
        sampling: 'balanced' for the same number of each class that has images, 'sqrt' in proportion to the square root
            of its images.
        rng: rounds: up with the probability that keeps the mean over epochs.

    Returns:
        (classes,) integers that add up to the number of images.
    """
    there = np.flatnonzero(counts)
    shares = np.sqrt(counts[there]) if sampling == "sqrt" else np.ones(len(there))
    total = int(counts.sum())
    # one shift for all: every quota is its exact value rounded up or down
    edges = np.floor(np.cumsum(shares / shares.sum() * total) + rng.random()).astype(np.int64)
    edges[-1] = total
    quotas = np.zeros(len(counts), dtype=np.int64)
    quotas[there] = np.diff(edges, prepend=0)
    return quotas


class _BatchNumbers(Sampler):
    """(epoch, number in it) of an EpochSampler's batches instead of their images: all that a stream needs to know."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        self.idle = False

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        sampler = self.sampler
        if self.idle:
            return
        for number in range(sampler.first_step * sampler.accum_steps, sampler.passes):
            yield sampler.epoch, number


class Share(Sampler):
    """One device's places in a data set, in order: every `world_size`-th."""

    def __init__(self, num_images: int, rank: int, world_size: int) -> None:
        self.places = range(rank, num_images, world_size)
        self.idle = False

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[int]:
        return iter(() if self.idle else self.places)


def start_workers(loader: DataLoader) -> None:
    """Starts a loader's worker processes, which then wait for its first iteration.

    Before Python 3.12 a forked process can hang for ever if a thread outside Python is just entering it, as gloo's and
    autograd's threads do. Before training starts they are at rest.
    """
    for sampler in (loader.sampler, loader.batch_sampler):
        if loader.num_workers and isinstance(sampler, (EpochSampler, _BatchNumbers, Share)):
            sampler.idle = True
            with starting_workers(loader.num_workers):
                iter(loader)
            sampler.idle = False


@contextmanager
def running_workers(*loaders: DataLoader) -> Iterator[None]:
    """Has the worker processes of `loaders` from `start_workers` until it is left.

    After RunStopped they end with this process, which exits then: a scheduler may give it little time.
    """
    with ExitStack() as stack:
        for loader in loaders:
            stack.callback(stop_workers, loader)
            start_workers(loader)
        try:
            yield
        except RunStopped:
            stack.pop_all()
            raise


def batches(loader: DataLoader) -> Iterator[Batch]:
    """Goes over a loader; an error from a worker has its own text, without the worker's traceback in front.

    Raises:
        DataError: of a sample.
        WorkerError: a worker has ended, or cannot be started.
    """
    loaded = None
    try:
        with worker_errors():
            with starting_workers(loader.num_workers):
                loaded = iter(loader)
            try:
                yield from loaded
            except (OSError, EOFError):  # of what the worker was about to hand over, or of a sample
                raise_lost_worker(loaded)
                raise
    except Exception as e:
        stop_workers(loader, loaded)
        if not isinstance(e, DataError):
            raise
        text = str(e.args[0]) if e.args else ""  # of a worker: its traceback, whose last line is its error's
        if "Original Traceback" not in text:
            raise
        raise DataError(*re.split(r"\n\S*(?:DataError|UnreadableImage): ", text)[-1].strip().split("\n")) from None


def _itself(batch: Any) -> Any:
    return batch


def usable_cores() -> int:
    """Returns this process's share of the cores that it may use: those of the machine, or fewer, by its affinity."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def workers_for(data: BaseDataConfig) -> int:
    """Returns how many loader processes a device has: those of the configuration, or its share of the cores."""
    return min(_MOST_WORKERS, usable_cores()) if data.workers is None else data.workers


class Loader(DataLoader):
    """A loader of as many workers as it is told, in the `context` of workers.py."""

    def __init__(self, dataset: Any, *, num_workers: int = 0, **kwargs: Any) -> None:
        if num_workers:
            kwargs.setdefault("multiprocessing_context", context())
        super().__init__(dataset, num_workers=num_workers, **kwargs)

    def check_worker_number_rationality(self) -> None:
        """Does without torch's warning, which each process would print: the number is the user's, or fits the cores."""


class TrainLoader(Loader):
    """A loader whose workers make batches of 8-bit pixels, of which this process makes what it yields: `finish`."""

    def __init__(self, dataset: Any, *, finish: Callable[[Any], Any], **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self._finish = finish

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return map(self._finish, super().__iter__())


def train_loader(
    source: DataSource | StreamSource,
    config: Config,
    sampler: EpochSampler,
    pin_memory: bool,
    worker_init: Any = None,
    device: torch.device | str = "cpu",
) -> DataLoader:
    """Returns a loader of training batches, augmented, in the order of `sampler`.

    The workers read and augment; this process normalises what they send and erases from it, where `next` is called.

    Args:
        source: the images.
        config: the run.
        sampler: chooses epoch and first step before each iteration.
        pin_memory: for a fast copy to a GPU.
        worker_init: called in every worker process with its number.
        device: where the images are normalised and yielded; what moves there are 8-bit pixels.
    """
    workers = workers_for(config.data)
    images = config.data.preprocessing
    finish = Finish(images.mean, images.std, torch.device(device))
    common: dict[str, Any] = {
        "pin_memory": pin_memory,
        "worker_init_fn": worker_init,
        "finish": finish,
    }
    transforms, skip = train_transforms(config), config.data.on_error == "skip"
    if isinstance(source, StreamSource):
        stream = StreamBatches(
            source, transforms, skip, sampler.batch_size, sampler.rank, sampler.world_size, sampler.seed
        )
        workers = stream.useful_workers(workers)
        return TrainLoader(
            stream,
            batch_size=None,
            sampler=_BatchNumbers(sampler),
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=Sent(_itself),
            **common,
        )
    return TrainLoader(
        Transformed(source, transforms, skip, sampler.seed, config.augment.hflip == "alternating"),
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=Sent(collate_augmented),
        **common,
    )


@dataclass(frozen=True)
class _Views:
    """Several transforms of one image, stacked."""

    transforms: Sequence[Any]

    def __call__(self, image: Any) -> torch.Tensor:
        return torch.stack([transform(image) for transform in self.transforms])


def eval_loader(
    source: DataSource | StreamSource,
    data: DataConfig,
    batch_size: int,
    rank: int,
    world_size: int,
    pin_memory: bool,
    worker_init: Any = None,
    views: Sequence[Any] = (),
) -> DataLoader:
    """Returns a loader over this device's share of the images: every image on just one device, none twice.

    Args:
        source: the images.
        data: size and normalisation of the images, workers, and what to do about unreadable ones.
        batch_size: images.
        rank, world_size: this device, and how many there are.
        pin_memory: for a fast copy to a GPU.
        worker_init: called in every worker process with its number.
        views: what `eval_transform` takes, of one output size; batches are then (N, views, channels, H, W), and every
            image is read once. Without it they are (N, channels, H, W), as `data` says.
    """
    workers, skip = workers_for(data), data.on_error == "skip"
    transform = _Views([eval_transform(view) for view in views]) if views else eval_transform(data)
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "pin_memory": pin_memory,
        "worker_init_fn": worker_init,
        "collate_fn": Sent(collate),
    }
    if isinstance(source, StreamSource):
        images = StreamImages(source, transform, skip, rank, world_size)
        workers = images.useful_workers(workers)
        return Loader(images, num_workers=workers, persistent_workers=workers > 0, **common)
    return Loader(
        Transformed(source, [transform], skip),
        sampler=Share(len(source), rank, world_size),
        num_workers=workers,
        persistent_workers=workers > 0,  # not forked anew for every evaluation, see `start_workers`
        **common,
    )
