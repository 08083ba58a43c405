"""How fast training images are read and augmented: this package's loader beside timm's, with the same recipe."""

from __future__ import annotations

import os
import random
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform

from ...config import Config, check_config
from ...config.registry import as_classification
from ...data import DataSource, EpochSampler, Finish, Stream, seed_all, train_loader, train_transforms
from ...data.batch import collate_augmented
from ...data.images import open_rgb
from ...data.sources import open_split
from ...data.transforms import allow_black
from .loop import compare
from .progress import Progress

__all__ = ["compare_input", "one_core", "shares", "write_photos"]

BATCH_SIZE = 32
WIDTH, HEIGHT = 500, 375  # the most frequent size in ImageNet
QUALITY = 92
SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
SEED = 0


def write_photos(folder: Path, count: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> int:
    """Writes JPEGs, cut at random from scikit-learn's two photographs, into two class folders.

    Args:
        folder: of the class folders.
        count: of JPEGs.
        size: of each, width and height in pixels.

    Returns:
        Their bytes, on average.
    """
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427
    rng = random.Random(SEED)
    written = []
    for i in range(count):
        photo = photos[i % len(photos)]
        width = rng.randint(400, 560)
        height = min(width * size[1] // size[0], photo.height)
        left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
        part = photo.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
        path = folder / str(i % len(photos)) / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.save(path, quality=QUALITY, subsampling=SUBSAMPLINGS["4:2:0"])
        written.append(path.stat().st_size)
    return round(sum(written) / count)


def compare_input(images: int, rounds: int, progress: Progress | None = None) -> Iterator[str]:
    """Compares `train_loader` with timm's `create_loader` on JPEGs, on one core, in turns.

    Both use the ImageNet recipe at 224 pixels and yield normalised float images on the CPU. timm's loader is taken with
    its prefetcher, the faster of its two ways.

    Args:
        images: how many files, rounded up to whole batches; they stay in the disk cache.
        rounds: how often each loader goes over them.
        progress: told how far it is.

    Yields:
        Lines to print, as they come: the ratio without and with a worker process, where the time goes, and what the
        pixels are.

    Raises:
        KeyboardInterrupt: the user has ended it; what was measured until then is yielded before.
    """
    count = -(-images // BATCH_SIZE) * BATCH_SIZE
    with tempfile.TemporaryDirectory() as name, one_core() as core:
        root = Path(name)
        size = write_photos(root / "train", count)
        yield (
            f"{count} JPEGs of {WIDTH} x {HEIGHT}, 4:2:0, {size / 1000:.0f} kB on average; 224 x 224, batch "
            f"{BATCH_SIZE}, {core}"
        )
        for workers, title in enumerate(("no worker process", "one worker process")):
            epochs = (_our_epoch(root, workers), _timm_epoch(root, workers))
            times = compare(*epochs, rounds, torch.device("cpu"), progress, title)
            described = times.describe("  this package", "  timm", count, "image")
            described[-1] = f"  images/s, this package over timm: {described[-1].removeprefix('ratio ')}"
            yield from (title, *described)
            if times.interrupted:
                raise KeyboardInterrupt
        source = _source(root)
        yield from shares(source, _config(root))
        yield from _decoders(source, progress)
        yield _same_pixels(source)


@contextmanager
def one_core() -> Iterator[str]:
    """Keeps this process and those that it starts on one core, where the system can; yields what to call that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    try:
        if allowed:
            os.sched_setaffinity(0, {max(allowed)})
        yield "one core" if allowed else "one thread per process"
    finally:
        if allowed:
            os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def _config(root: Path, workers: int = 0) -> Config:
    sections = {"data": {"root": str(root), "workers": workers}, "train": {"batch_size": BATCH_SIZE, "seed": SEED}}
    return as_classification(check_config(sections, "the benchmark"))


def _source(root: Path) -> DataSource:
    source = open_split(_config(root).data, "train")
    assert isinstance(source, DataSource)
    return source


def _our_epoch(root: Path, workers: int) -> Callable[[], None]:
    source = _source(root)
    sampler = EpochSampler(len(source), BATCH_SIZE, seed=SEED)
    loader = train_loader(source, _config(root, workers), sampler, pin_memory=False)

    def epoch() -> None:
        for _ in loader:
            pass
        sampler.set_epoch((sampler.epoch + 1) % 300)  # other crops and operations each time, as in timm's

    return epoch


def _timm_options(config: Config) -> dict[str, Any]:
    """Returns the recipe in the words that timm's `create_loader` and `create_transform` share."""
    augment = config.augment
    names = ("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment", "interpolation", "re_prob", "re_mode")
    options = {name: getattr(augment, name) for name in names}
    return options | {"is_training": True, "mean": config.data.preprocessing.mean, "std": config.data.preprocessing.std}


def _timm_epoch(root: Path, workers: int) -> Callable[[], None]:
    config = _config(root)
    dataset = create_dataset("", str(root / "train"))
    loader = create_loader(
        dataset,
        (3, *config.data.preprocessing.size),
        BATCH_SIZE,
        num_workers=workers,
        device=torch.device("cpu"),
        **_timm_options(config),
    )
    allow_black(dataset.transform)  # or Pillow 13 ends the loader within some hundred images

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def shares(source: DataSource, config: Config, batch_size: int = BATCH_SIZE) -> list[str]:
    """Returns a line per step of this package's way from file to batch, of one process, the longest first."""
    transform = train_transforms(config)[0]
    finish = Finish(config.data.preprocessing.mean, config.data.preprocessing.std, torch.device("cpu"))
    seconds: defaultdict[str, float] = defaultdict(float)

    def timed(name: str, step: Callable[..., Any], *args: Any) -> Any:
        since = time.perf_counter()
        result = step(*args)
        seconds[name] += time.perf_counter() - since
        return result

    class Timed:
        """A step of the transform, with a clock."""

        def __init__(self, step: Callable[[Any], Any]) -> None:
            self.step = step

        def __call__(self, image: Any) -> Any:
            return timed(type(self.step).__name__, self.step, image)

    transform.of_image = [Timed(step) for step in transform.of_image]
    transform.erasing = [Timed(step) for step in transform.erasing]
    for start in range(0, len(source), batch_size):
        items = []
        for index in range(start, min(start + batch_size, len(source))):
            image, label = timed("read and decode", source.images.__getitem__, index)
            timed("seed", seed_all, Stream.IMAGE, SEED, 0, index)
            items.append((transform(image), label, index))
        timed("normalise and erase", finish, timed("collate", collate_augmented, items))
    total = sum(seconds.values())
    lines = [f"where this package's {1000 * total / len(source):.2f} ms per image go, without a worker process"]
    for name, value in sorted(seconds.items(), key=lambda pair: -pair[1]):
        lines.append(f"  {value / total:6.1%}  {1000 * value / len(source):.3f} ms  {name}")
    return lines


def _decoders(source: DataSource, progress: Progress | None) -> list[str]:
    """Compares Pillow's decoder, which is used, with torchvision's: time, and pixels by colour subsampling."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:  # deprecated since torchvision 0.29
        return ["torchvision has no JPEG decoder any more"]
    files = [Path(source.images.name(i)).read_bytes() for i in range(len(source))]
    tensors = [torch.from_numpy(np.frombuffer(content, np.uint8).copy()) for content in files]

    def with_pillow() -> None:
        for content in files:
            open_rgb(content, "a photograph")

    def with_torchvision() -> None:
        for tensor in tensors:
            decode_jpeg(tensor, ImageReadMode.RGB)

    def to_pillow() -> None:
        for tensor in tensors:
            Image.fromarray(decode_jpeg(tensor, ImageReadMode.RGB).permute(1, 2, 0).numpy())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = ["decoding alone, Pillow's decoder over torchvision's"]
        for name, action in (("into a tensor", with_torchvision), ("into a Pillow image", to_pillow)):
            times = compare(action, with_pillow, 5, torch.device("cpu"), progress, f"decoding, {name}")
            if times.interrupted:
                raise KeyboardInterrupt
            lines.append(f"  time, {name}: {times.describe('', '', len(files), 'image')[-1]}")
        for name, subsampling in SUBSAMPLINGS.items():
            lines.append(f"  pixels, {name}: {_difference(source, subsampling, decode_jpeg)}")
    return lines


def _difference(source: DataSource, subsampling: int, decode: Callable[..., torch.Tensor]) -> str:
    import io

    found = []
    for i in range(min(len(source), 8)):
        buffer = io.BytesIO()
        source.images[i][0].save(buffer, "JPEG", quality=QUALITY, subsampling=subsampling)
        content = np.frombuffer(buffer.getvalue(), np.uint8).copy()
        theirs = decode(torch.from_numpy(content)).permute(1, 2, 0).numpy().astype(np.int16)
        found.append(np.abs(theirs - np.asarray(open_rgb(buffer.getvalue(), "a photograph"))))
    return f"at most {max(d.max() for d in found)} of 255 apart, {np.mean(found):.4f} on average"


def _same_pixels(source: DataSource) -> str:
    """Compares this package's images with those of timm's own transform after the same draws."""
    config = _config(Path())
    count = len(source)
    theirs = create_transform(config.data.preprocessing.img_size, **_timm_options(config))
    allow_black(theirs)
    same = 0
    for batch in train_loader(source, config, EpochSampler(count, BATCH_SIZE, seed=SEED), pin_memory=False):
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            with Image.open(source.images.name(index)) as file:
                photo = file.convert("RGB")
            seed_all(Stream.IMAGE, SEED, 0, index)
            same += torch.equal(image, theirs(photo))
    return f"{same} of {count} normalised images equal those of timm's own transform, to the bit, after the same draws"
