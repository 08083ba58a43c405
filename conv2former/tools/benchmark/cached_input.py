"""How fast small training images are with `data.cache: ram` and without."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ...config import Config, check_config
from ...config.registry import as_classification
from ...data import DataSource, EpochSampler, train_loader
from ...data.cache import bytes_text, in_memory, read_at_once
from ...data.holdout import Part
from ...data.sources import open_split
from ...errors import counted
from .input import SEED, one_core, shares, write_photos
from .loop import Comparison, compare
from .progress import Progress

__all__ = ["compare_cached"]

BATCH_SIZE = 128
SIDE = 32  # pixels
IMAGES = 2048
# that images of 32 x 32 are trained with: a random crop and a flip
AUGMENT = {"scale": [0.5, 1.0], "auto_augment": None, "color_jitter": 0.0, "re_prob": 0.0, "interpolation": "bicubic"}


def compare_cached(folder: Path | None, rounds: int, progress: Progress | None = None) -> Iterator[str]:
    """Compares `train_loader` on images in memory with itself on their files, on one core, in turns.

    Args:
        folder: of class folders with images, of which some are taken; None for JPEGs cut from two photographs.
        rounds: how often each goes over the images.
        progress: told how far it is.

    Yields:
        Lines to print, as they come: the ratio without and with a worker process, where the time goes, and whether the
        batches are the same.

    Raises:
        DataError: there are no such images in the folder.
        KeyboardInterrupt: the user has ended it; what was measured until then is yielded before.
    """
    with tempfile.TemporaryDirectory() as name, one_core() as core:
        root = folder or Path(name)
        if folder is None:
            write_photos(root, IMAGES, (SIDE, SIDE))
        config = _config(root, 0)
        source = _some(open_split(config.data, "."))
        images = read_at_once(source, config.data)
        cached = in_memory(source, images)
        yield (
            f"data.cache: {counted(len(source), 'image')} in {bytes_text(images.size)}, crop to {SIDE} x {SIDE} and "
            f"flip, batch {BATCH_SIZE}, {core}"
        )
        for workers, title in enumerate(("no worker process", "one worker process")):
            epochs = [_epoch(each, _config(root, workers)) for each in (cached, source)]
            times = compare(epochs[0], epochs[1], rounds, torch.device("cpu"), progress, title)
            yield f"{title}: {_described(times, len(source) // BATCH_SIZE * BATCH_SIZE)}"
            if times.interrupted:
                raise KeyboardInterrupt
        yield from shares(cached, config, BATCH_SIZE)
        yield _same_batches(cached, source, config)


def _config(root: Path, workers: int) -> Config:
    data = {"root": str(root), "img_size": SIDE, "workers": workers}
    sections = {"data": data, "augment": AUGMENT, "train": {"batch_size": BATCH_SIZE, "seed": SEED}}
    return as_classification(check_config(sections, "the benchmark"))


def _some(source: object) -> DataSource:
    """Returns at most `IMAGES` of a split, evenly spread."""
    assert isinstance(source, DataSource)
    count = min(len(source), IMAGES)
    return replace(source, images=Part(source.images, np.arange(count) * len(source) // count))


def _epoch(source: DataSource, config: Config) -> Callable[[], None]:
    sampler = EpochSampler(len(source), BATCH_SIZE, seed=SEED)
    loader = train_loader(source, config, sampler, pin_memory=False)

    def epoch() -> None:
        for _ in loader:
            pass
        sampler.set_epoch((sampler.epoch + 1) % config.schedule.epochs)

    return epoch


def _described(times: Comparison, images: int) -> str:
    memory, files = (images / statistics.median(seconds) for seconds in (times.first, times.second))
    ratio = times.describe("", "", images, "image")[-1].removeprefix("ratio ")
    return f"{memory:,.0f} images/s from memory, {files:,.0f} from files, {ratio}"


def _same_batches(cached: DataSource, source: DataSource, config: Config) -> str:
    same = total = 0
    loaders = (
        train_loader(each, config, EpochSampler(len(each), BATCH_SIZE, seed=SEED), pin_memory=False)
        for each in (cached, source)
    )
    for ours, theirs in zip(*loaders, strict=True):
        total += len(ours.images)
        same += sum(map(torch.equal, ours.images, theirs.images))
    return f"{same} of {total} augmented images from memory equal those from files, to the bit"
