"""Images in memory: the same as when they are read, in any process, of any size, readable or not."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from multiprocessing import context, popen_spawn_posix
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from conv2former.config import check_config
from conv2former.data import EpochSampler, batches, train_loader
from conv2former.data import cache as data_cache
from conv2former.data.cache import CachedImages, estimate_bytes, in_memory, read_at_once
from conv2former.data.images import UnreadableImage
from conv2former.data.loader import Transformed
from conv2former.data.shared import SharedBytes
from conv2former.data.sources import DataSource, open_split
from conv2former.errors import DataError

SIZES = [(40, 33), (7, 61), (33, 40), (120, 90), (34, 34), (40, 40)]


@pytest.fixture
def folder(tmp_path):
    """Two classes of images of different sizes and kinds: RGB, grey, 16 bits, transparent, turned; one is damaged."""
    rng = np.random.default_rng(0)
    kinds = [((3,), np.uint8), ((), np.uint8), ((), np.uint16), ((4,), np.uint8)]
    for i, (width, height) in enumerate(SIZES):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i}\udcff.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        bands, dtype = kinds[i % 4]
        image = Image.fromarray(rng.integers(0, np.iinfo(dtype).max + 1, (height, width, *bands), dtype))
        exif = Image.Exif()
        exif[274] = 6  # on its side
        image.save(path, exif=exif if i == 4 else None)
    return tmp_path


def config(root, **sections):
    data = {"root": str(root), "img_size": 32, "workers": 0, **sections.pop("data", {})}
    return check_config({"data": data, "train": {"batch_size": 2}, **sections}, "test")


def opened(run) -> DataSource:
    source = open_split(run.data, "train")
    assert isinstance(source, DataSource)
    return source


def cached(source, run, workers: int = 0, room: int | None = None) -> CachedImages:
    return read_at_once(source, run.data, workers, room)


def kept(source, run) -> DataSource:
    return in_memory(source, cached(source, run))


def epoch(source, run, workers: int = 0) -> list:
    run = run.model_copy(update={"data": run.data.model_copy(update={"workers": workers})})
    return list(batches(train_loader(source, run, EpochSampler(len(source), 2, seed=1), pin_memory=False)))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_any_size_and_kind_are_as_they_are_read(folder, monkeypatch, channels, workers):
    monkeypatch.setattr(data_cache, "MOST_AT_ONCE", 4)  # the last batch is not whole
    run = config(folder, data={"mean": [0.5] * channels, "std": [0.5] * channels})
    source = opened(run)
    images = cached(source, run, workers)
    assert len(images) == len(SIZES)
    assert images.labels.tolist() == source.images.labels.tolist()
    for i in range(len(SIZES)):
        (image, label), (expected, same_label) = images[i], source.images[i]
        expected = expected if channels == 3 else expected.convert("L")
        assert (image.mode, image.size, image.tobytes()) == (expected.mode, expected.size, expected.tobytes())
        assert label == same_label
        assert images.name(i) == source.images.name(i)
    pixels = sum(width * height for width, height in SIZES) * channels
    assert pixels < images.size < pixels + 1000 + len(SIZES) * 200
    assert estimate_bytes(source, run.data) == pytest.approx(images.size, rel=0.05)


def test_workers_make_the_same_batches(folder):
    run = config(folder)
    source = opened(run)
    expected, found = epoch(source, run), epoch(kept(source, run), run, workers=2)
    assert len(expected) == len(found) == 3
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.indices, b.indices)


class Starting:
    """Takes the place of a process that is being started, not forked: it gets files by copies of their numbers."""

    duplicate_for_child = staticmethod(os.dup)
    DupFd = popen_spawn_posix.Popen.DupFd


def sent(value) -> bytes:
    """Returns what goes to a process that is started."""
    context.set_spawning_popen(Starting)
    try:
        return bytes(ForkingPickler.dumps(value))
    finally:
        context.set_spawning_popen(None)


def test_what_goes_to_a_started_process_does_not_grow_with_the_images(tmp_path):
    sizes = []
    for count in (3, 300):
        for i in range(count):
            path = tmp_path / str(count) / "train" / "a" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (i % 256, 0, 0)).save(path)
        run = config(tmp_path / str(count))
        source = kept(opened(run), run)
        first = source.images[0][0].tobytes()
        received = pickle.loads(sent(source))
        del source
        assert (len(received), received.images[0][0].tobytes()) == (count, first)
        sizes.append(len(sent(received)))
    assert sizes[1] < sizes[0] + 50 < 1000


def test_another_process_opens_the_same_memory(folder):
    run = config(folder)
    images = cached(opened(run), run)
    others = CachedImages.open(pickle.loads(pickle.dumps(images.place)))
    assert [others[i][0].tobytes() for i in range(len(SIZES))] == [images[i][0].tobytes() for i in range(len(SIZES))]
    with pytest.raises(ValueError, match="read-only"):
        others._rows["width"] = 1


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_as_without_a_cache(folder, monkeypatch, workers):
    monkeypatch.setattr(data_cache, "MOST_AT_ONCE", 1)  # it has a batch for itself
    broken = sorted((folder / "train" / "b").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:60])
    run = config(folder, data={"on_error": "skip"})
    source = opened(run)
    images = cached(source, run, workers)
    index = next(i for i in range(len(SIZES)) if source.images.name(i) == str(broken))
    with pytest.raises(UnreadableImage) as expected:
        source.images[index]
    with pytest.raises(UnreadableImage) as found:
        images[index]
    assert (str(found.value), found.value.name) == (str(expected.value), expected.value.name)
    for a, b in zip(epoch(source, run), epoch(replace(source, images=images), run), strict=True):
        assert torch.equal(a.images, b.images)
        assert a.skipped == b.skipped
    with pytest.raises(DataError, match=r"not a readable image .* data.on_error=skip"):
        cached(source, config(folder), workers)


def test_a_wrong_sample_stops_the_reading(folder):
    run = config(folder)
    source = replace(opened(run), class_names=["a"])
    with pytest.raises(DataError, match=r"image \d: class 1 of 1"):
        cached(source, run)


def test_more_images_than_there_is_memory_for(folder):
    run = config(folder)
    with pytest.raises(DataError, match=r"take more than 0.0 MiB as pixels, .* set data.cache=none"):
        cached(opened(run), run, room=20_000)


def test_a_write_that_is_cut_short_goes_on(monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: write(fd, content[:3]))
    memory = SharedBytes.create()
    for content in (b"0123456789", b"", np.arange(5, dtype=np.int16)):
        memory.append(content)
    assert (memory.size, memory.content[:]) == (20, b"0123456789" + np.arange(5, dtype=np.int16).tobytes())


def test_the_memory_is_full(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_cache.SharedBytes, "append", full)
    run = config(folder)
    with pytest.raises(DataError, match=r"the memory is full after 0.0 MiB of pixels .No space left on device."):
        cached(opened(run), run)


def test_the_memory_goes_with_what_holds_it(folder):
    """A descriptor that stays open would keep the pixels for ever."""
    run = config(folder)
    images = cached(opened(run), run)
    address = images.place.address
    assert os.path.exists(address)
    del images
    assert not os.path.exists(address) or "conv2former" not in os.readlink(address)


def test_an_evaluation_reads_from_memory(folder):
    run = config(folder)
    source = opened(run)
    shown = [
        list(DataLoader(Transformed(each, [np.asarray], False), batch_size=None, collate_fn=lambda item: item))
        for each in (source, kept(source, run))
    ]
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(*shown, strict=True))
