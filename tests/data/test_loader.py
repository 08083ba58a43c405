from __future__ import annotations

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from torch.utils.data import DataLoader

from conv2former import DataError
from conv2former.config import check_config, img_size_at
from conv2former.data import (
    DataSource,
    EpochSampler,
    Stream,
    eval_loader,
    running_workers,
    seed_all,
    train_loader,
    train_transforms,
)
from conv2former.data.images import UnreadableImage, open_rgb
from conv2former.data.loader import workers_for


def config(**sections):
    sections["data"] = {"root": "x", "img_size": 32, "workers": 0} | sections.get("data", {})
    return check_config(sections, "test")


DATA = config().data


class Noise:
    def __init__(self, count: int, bad_label: bool = False, unreadable: tuple[int, ...] = ()) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 255, (count, 40, 40, 3), dtype=np.uint8)
        self.bad_label, self.unreadable = bad_label, unreadable

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        if index in self.unreadable:
            raise UnreadableImage(f"{index}.png: not readable", f"{index}.png")
        return Image.fromarray(self.pixels[index]), 9 if self.bad_label else index % 3


def source(count: int, **kwargs) -> DataSource:
    return DataSource(Noise(count, **kwargs), ["a", "b", "c"], "noise")


def deal(**kwargs) -> list[list[tuple[int, int]]]:
    return list(EpochSampler(**kwargs))


def test_an_epoch_is_every_image_once_up_to_the_rest():
    batches = deal(num_images=23, batch_size=5)
    assert len(batches) == 4
    indices = [index for batch in batches for _, index in batch]
    assert len(set(indices)) == 20
    assert set(indices) < set(range(23))


def test_the_order_is_a_function_of_seed_and_epoch():
    sampler = EpochSampler(50, 5, seed=1)
    first = list(sampler)
    assert first == list(sampler) == deal(num_images=50, batch_size=5, seed=1)
    sampler.set_epoch(1)
    assert [i for b in sampler for _, i in b] != [i for b in first for _, i in b]
    assert {epoch for b in sampler for epoch, _ in b} == {1}
    assert deal(num_images=50, batch_size=5, seed=2) != first


@pytest.mark.parametrize(
    ("batch_size", "accum_steps", "world_size"), [(8, 1, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2), (1, 2, 4)]
)
def test_the_same_global_batches_on_any_number_of_devices(batch_size, accum_steps, world_size):
    dealt = [
        deal(num_images=43, batch_size=batch_size, accum_steps=accum_steps, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    steps = []
    for step in range(43 // 8):
        window = slice(step * accum_steps, (step + 1) * accum_steps)
        steps.append(sorted(key for batches in dealt for batch in batches[window] for key in batch))
    assert steps == [sorted(batch) for batch in deal(num_images=43, batch_size=8)]


def test_starting_in_the_middle_of_an_epoch():
    sampler = EpochSampler(40, 2, accum_steps=2, rank=1, world_size=2, seed=3)
    sampler.set_epoch(4)
    whole = list(sampler)
    sampler.set_epoch(4, first_step=3)
    assert list(sampler) == whole[6:]
    assert len(sampler) == len(whole) - 6


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_the_place_only(workers):
    """Not on the workers, on the batch, or on what was drawn before."""
    sampler = EpochSampler(12, 4, seed=5)
    whole = [b.images for b in train_loader(source(12), config(data={"workers": workers}), sampler, False)]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    sampler.set_epoch(0, first_step=2)
    last = [b.images for b in train_loader(source(12), config(), sampler, False)]
    assert torch.equal(last[0], whole[2])
    sampler.set_epoch(1)
    other = [b.images for b in train_loader(source(12), config(), sampler, False)]
    assert not torch.equal(other[0], whole[0])


def test_seeds_differ_by_place_and_purpose():
    draws = set()
    for place in ((Stream.STEP, 0, 1), (Stream.STEP, 1, 0), (Stream.IMAGE, 0, 1), (Stream.INIT, 0), (Stream.INIT, 1)):
        seed_all(*place)
        draws.add((torch.rand(()).item(), np.random.rand()))  # noqa: NPY002
    assert len(draws) == 5
    seed_all(Stream.STEP, 0, 1)
    assert (torch.rand(()).item(), np.random.rand()) in draws  # noqa: NPY002


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation_sees_every_image_once(world_size, batch_size):
    seen = []
    for rank in range(world_size):
        for batch in eval_loader(source(7), DATA, batch_size, rank, world_size, False):
            seen += [image.numpy().tobytes() for image in batch.images]
    whole = next(iter(eval_loader(source(7), DATA, 7, 0, 1, False)))
    expected = [image.numpy().tobytes() for image in whole.images]
    assert sorted(seen) == sorted(expected)


def test_a_class_out_of_range_is_an_error_on_the_cpu():
    loader = train_loader(source(4, bad_label=True), config(), EpochSampler(4, 2), False)
    with pytest.raises(DataError, match=r"noise, image \d: class 9 of 3"):
        next(iter(loader))


def test_the_tail_of_an_accumulation():
    """By brute force: the windows of all sizes are whole batches, in order, and only the last may be short."""
    for num_images in range(1, 40):
        for accum_steps in (1, 2, 3, 5):
            for world_size in (1, 2):
                shape = {"num_images": num_images, "batch_size": 2, "accum_steps": accum_steps}
                both = [deal(**shape, world_size=world_size, keep_tail=keep) for keep in (True, False)]
                kept, dropped = both
                assert len(kept) == num_images // (2 * world_size)
                assert len(dropped) == len(kept) // accum_steps * accum_steps
                assert kept[: len(dropped)] == dropped
                assert all(len(batch) == 2 for batch in kept)


def test_every_augmentation_policy_runs():
    """Strong policies draw numbers at the ends of their ranges, which not every version of Pillow takes."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for policy in ("rand-m9-mstd0.5-inc1", "rand-m10-inc1", "original", "v0", "3a"):
        transform = train_transforms(config(augment={"auto_augment": policy}))[0]
        for i in range(300):
            seed_all(Stream.IMAGE, i)
            assert transform(image).image.size == (32, 32)


class Photos:
    """JPEG files in memory, read as those on a disk are."""

    def __init__(self, count: int) -> None:
        self.files = []
        for i in range(count):
            photo = Image.fromarray(load_sample_images().images[i % 2])
            buffer = io.BytesIO()
            # the decoders differ, if at all, by how they interpolate the colours; odd sizes have borders of their own
            photo.crop((7 * i, 3 * i, 7 * i + 333, 3 * i + 251)).save(buffer, "JPEG", quality=90, subsampling=i % 3)
            self.files.append(buffer.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        return open_rgb(self.files[index], f"{index}.jpg"), 0


@pytest.mark.parametrize(("workers", "compiles"), [(0, "1"), (2, "1"), (2, "0")])
@pytest.mark.parametrize(
    "augment",
    [
        {"re_prob": 0.5, "vflip": 0.5},
        {"re_prob": 1.0, "re_mode": "rand", "auto_augment": None},
        {"re_prob": 1.0, "re_mode": "const", "auto_augment": "3a", "interpolation": "bicubic"},
        {"re_prob": 0.0, "auto_augment": "original"},
        {"re_prob": 1.0, "auto_augment": None, "color_jitter": 0.0, "hflip": 0.3},
        {"re_prob": 0.0, "auto_augment": None, "color_jitter": 0.0},
    ],
    ids=lambda augment: str(augment.get("auto_augment", "rand")),
)
def test_the_images_are_those_of_timm_to_the_bit(augment, workers, compiles, monkeypatch):
    """Read with Pillow and through timm's own transform, image by image, seeded at the same places."""
    monkeypatch.setenv("CONV2FORMER_COMPILE", compiles)
    run = config(augment=augment, data={"workers": workers, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)})
    options = run.augment.model_dump()
    names = ("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment", "interpolation", "re_prob", "re_mode")
    timm_options = {name: options[name] for name in names}
    theirs = create_transform(32, is_training=True, mean=run.data.mean, std=run.data.std, **timm_options)
    photos = Photos(12)
    sampler = EpochSampler(12, 4, seed=7)
    sampler.set_epoch(1)
    loader = train_loader(DataSource(photos, ["a"], "photos"), run, sampler, False)
    for batch in loader:
        assert batch.images.dtype == torch.float32
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            seed_all(Stream.IMAGE, 7, 1, index)
            expected = theirs(Image.open(io.BytesIO(photos.files[index])).convert("RGB"))
            assert torch.equal(image, expected)


def test_what_travels_between_processes_is_small():
    loader = train_loader(source(8), config(data={"workers": 1}), EpochSampler(8, 4), False)
    for batch in DataLoader.__iter__(loader):  # before it is normalised
        assert batch.pixels.dtype == torch.uint8
        assert batch.pixels.shape == (4, 32, 32, 3)
        assert batch.values.numel() == (batch.patches[:, 3] * batch.patches[:, 4] * 3).sum()


def test_an_unreadable_image_takes_what_is_erased_from_its_neighbour():
    run = config(augment={"re_prob": 1.0}, data={"on_error": "skip"})
    for batch in train_loader(source(8, unreadable=(2, 5)), run, EpochSampler(8, 8), False):
        assert len(batch.skipped) == 2
        assert len({image.numpy().tobytes() for image in batch.images}) == 6


def test_images_grow():
    run = config(data={"img_size": 128}, augment={"first_img_size": 32}, schedule={"epochs": 7, "cooldown_epochs": 1})
    sizes = [img_size_at(run, epoch) for epoch in range(8)]
    assert sizes == [32, 32, 64, 64, 96, 96, 128, 128]
    sampler = EpochSampler(4, 4)
    loader = train_loader(source(4), run, sampler, False)
    for epoch, size in enumerate(sizes):
        sampler.set_epoch(epoch)
        assert next(iter(loader)).images.shape == (4, 3, size, size)


@pytest.mark.parametrize(("mode", "of", "size"), [("RGB", (6, 9), [32, 48]), ("L", (40, 70), 32)])
def test_images_that_move_by_some_pixels(mode, of, size):
    """Every crop is one of the image with mirrored edges, and each of them comes up."""
    channels = 1 if mode == "L" else 3
    raw = {"data": {"root": "x", "img_size": size, "mean": [0.5] * channels, "std": [0.5] * channels}}
    raw["augment"] = {
        "padding": 2,
        "hflip": 0,
        "auto_augment": None,
        "color_jitter": 0,
        "re_prob": 0,
        "interpolation": "bilinear",
    }
    transform = train_transforms(check_config(raw, "test"))[0]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*of, 3), np.uint8)).convert(mode)
    height, width = size if isinstance(size, list) else (size, size)
    scale = max(height / of[0], width / of[1])
    whole = image.resize((round(of[1] * scale), round(of[0] * scale)), Image.Resampling.BILINEAR)
    padded = np.pad(np.array(whole), ((2, 2), (2, 2), (0, 0))[: np.array(whole).ndim], "reflect")
    rows, columns = padded.shape[0] - height + 1, padded.shape[1] - width + 1
    crops = {padded[y : y + height, x : x + width].tobytes() for y in range(rows) for x in range(columns)}
    torch.manual_seed(0)
    seen = {np.array(transform(image).image).tobytes() for _ in range(rows * columns * 8)}
    assert seen == crops


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_changes_no_other(workers):
    bad = (3, 4, 9)
    skipping = config(data={"on_error": "skip", "workers": workers})
    for seed in range(3):
        sampler = EpochSampler(12, 4, seed=seed)
        whole = list(train_loader(source(12), config(), sampler, False))
        holes = list(train_loader(source(12, unreadable=bad), skipping, sampler, False))
        for keys, batch, other in zip(sampler, whole, holes, strict=True):
            missing = {f"{index}.png" for _, index in keys if index in bad}
            assert {item.name for item in other.skipped} == missing
            assert other.images.shape == batch.images.shape  # whole: mixup pairs its images
            readable = [i for i, (_, index) in enumerate(keys) if index not in bad]
            assert torch.equal(other.images[readable], batch.images[readable])
            assert torch.equal(other.labels[readable], batch.labels[readable])
            for i in set(range(4)) - set(readable):  # a neighbour's copy
                same = [j for j in readable if torch.equal(other.images[i], other.images[j])]
                assert same
                assert other.labels[i] == other.labels[same[0]]


def test_an_evaluation_leaves_unreadable_images_out():
    data = config(data={"on_error": "skip"}).data
    batches = list(eval_loader(source(7, unreadable=(2, 6)), data, 2, 0, 1, False))
    assert sum(len(batch.labels) for batch in batches) == 5
    assert [item.name for batch in batches for item in batch.skipped] == ["2.png", "6.png"]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1, 0, 1, 2]


def test_unreadable_images_raise_by_default():
    with pytest.raises(UnreadableImage, match=r"1\.png: not readable"):
        list(train_loader(source(4, unreadable=(1,)), config(), EpochSampler(4, 2), False))
    everything = source(4, unreadable=(0, 1, 2, 3))
    with pytest.raises(DataError, match="not one image of a batch of 2 can be read"):
        list(train_loader(everything, config(data={"on_error": "skip"}), EpochSampler(4, 2), False))


# -------------------------------------------------------------------------------------------------------- imbalance

COUNTS = np.array([2, 40, 0, 10])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))


def epoch_of(sampling: str, epoch: int = 0, **kwargs) -> list[tuple[int, ...]]:
    sampler = EpochSampler(52, 4, labels=LABELS, sampling=sampling, **kwargs)
    sampler.set_epoch(epoch)
    return [key for batch in sampler for key in batch]


@pytest.mark.parametrize(("sampling", "shares"), [("balanced", [1, 1, 0, 1]), ("sqrt", [2**0.5, 40**0.5, 0, 10**0.5])])
def test_how_often_classes_are_seen(sampling, shares):
    exact = 52 * np.array(shares) / sum(shares)
    seen = []
    for epoch in range(60):
        keys = epoch_of(sampling, epoch)
        assert len(keys) == 52
        assert {key[0] for key in keys} == {epoch}
        seen.append(np.bincount(LABELS[[key[1] for key in keys]], minlength=4))
        assert (np.abs(seen[-1] - exact) < 1).all()  # rounded up or down
        for label in range(4):  # no image a second time before every other of its class
            times = [sum(key[1] == i for key in keys) for i in np.flatnonzero(label == LABELS)]
            assert not times or max(times) - min(times) <= 1
    assert np.abs(np.mean(seen, axis=0) - exact).max() < 0.25
    assert epoch_of(sampling, 1) != epoch_of(sampling, 2)
    assert epoch_of(sampling, 1) == epoch_of(sampling, 1)


def test_a_repeated_image_has_its_number():
    keys = epoch_of("balanced")
    assert len(set(keys)) == 52
    for index in np.flatnonzero(LABELS == 0).tolist():  # 2 images in 17 or 18 places
        mine = sorted(key[2:] for key in keys if key[1] == index)
        assert mine == [(), *((repeat,) for repeat in range(1, len(mine)))]
        assert len(mine) > 7


def test_balanced_batches_are_the_same_on_any_number_of_devices_and_from_any_step():
    parts = [deal_balanced(rank=rank, world_size=2) for rank in range(2)]
    whole = deal_balanced(batch_size=8)
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]
    sampler = EpochSampler(52, 8, labels=LABELS, sampling="balanced")
    sampler.set_epoch(0, first_step=3)
    assert list(sampler) == whole[3:]


def deal_balanced(batch_size: int = 4, **kwargs) -> list[list[tuple[int, ...]]]:
    return deal(num_images=52, batch_size=batch_size, labels=LABELS, sampling="balanced", **kwargs)


def test_a_repeated_image_is_augmented_anew():
    """And the first of them as without sampling."""
    images = source(6)
    labels = np.array([0, 1, 1, 1, 1, 1])
    by_key = {}
    for sampling in ("uniform", "balanced"):
        sampler = EpochSampler(6, 2, seed=3, labels=labels, sampling=sampling)
        loader = train_loader(images, config(), sampler, False)
        for keys, batch in zip(list(sampler), loader, strict=True):
            by_key[sampling] = by_key.get(sampling, {}) | dict(zip(keys, batch.images, strict=True))
            assert batch.indices.tolist() == [key[1] for key in keys]
    repeats = [image for key, image in by_key["balanced"].items() if key[1] == 0]
    assert len(repeats) == 3
    assert not torch.equal(repeats[0], repeats[1])
    assert not torch.equal(repeats[1], repeats[2])
    for key in by_key["balanced"].keys() & by_key["uniform"].keys():
        assert torch.equal(by_key["balanced"][key], by_key["uniform"][key])
    assert (0, 0) in by_key["balanced"]


PLAIN = {"auto_augment": None, "color_jitter": 0, "re_prob": 0, "padding": 1, "interpolation": "bilinear"}


class Halves:
    """Black images of 32 x 32 whose left half is bright."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        values = np.zeros((32, 32, 3), np.uint8)
        values[:, :16] = 200
        return Image.fromarray(values), 0


def sides(epochs: int = 4, seed: int = 0, first_step: int = 0, workers: int = 0) -> np.ndarray:
    """Returns by epoch and image whether it came mirrored, and nan where it did not come; (epochs, 64)."""
    run = config(
        data={"workers": workers},
        augment=PLAIN | {"hflip": "alternating"},
        schedule={"epochs": epochs, "warmup_epochs": 0},
    )
    sampler = EpochSampler(64, 8, seed=seed)
    loader = train_loader(DataSource(Halves(64), ["a"], "halves"), run, sampler, False)
    found = np.full((epochs, 64), np.nan)
    for epoch in range(epochs):
        sampler.set_epoch(epoch, first_step)
        for batch in loader:
            bright = batch.images.mean((1, 2))  # by column
            found[epoch, batch.indices] = bright[:, -4] > bright[:, 3]
    return found


def test_images_that_are_mirrored_in_every_other_epoch():
    found = sides()
    assert (found[1:] == 1 - found[:-1]).all()
    assert 20 < found[0].sum() < 44  # half of 64, within three standard deviations
    assert (sides(workers=2) == found).all()
    assert (sides(seed=1) != found).any()
    later = sides(first_step=5)  # as in a run that goes on
    came = ~np.isnan(later)
    assert came.sum() == 4 * 24
    assert (later[came] == found[came]).all()


def test_an_image_that_comes_again_in_an_epoch_is_mirrored_the_other_way():
    run = config(augment=PLAIN | {"hflip": "alternating"})
    sampler = EpochSampler(12, 6, labels=np.array([0] + [1] * 11), sampling="balanced")
    loader = train_loader(DataSource(Halves(12), ["a"], "halves"), run, sampler, False)
    of_repeat = {}
    for keys, batch in zip(list(sampler), loader, strict=True):
        for (_, index, *repeat), image in zip(keys, batch.images.mean((1, 2)), strict=True):
            if index == 0:
                of_repeat[sum(repeat)] = bool(image[-4] > image[3])
    assert len(of_repeat) == 6
    assert all(of_repeat[repeat] != of_repeat[repeat + 1] for repeat in range(5))


@pytest.mark.parametrize("which", ["training", "evaluation"])
def test_workers_that_start_before_they_are_needed(which):
    """They are the ones that then work, and they have read nothing before."""
    two = config(data={"workers": 2})
    if which == "training":
        loader = train_loader(source(10), two, EpochSampler(10, 2), False)
    else:
        loader = eval_loader(source(10), two.data, 2, 0, 1, False)
    with running_workers(loader):
        started = loader._iterator._workers
        assert loader._iterator._tasks_outstanding == 0
        assert sum(len(batch.labels) for batch in loader) == 10
        assert sum(len(batch.labels) for batch in loader) == 10
        assert loader._iterator._workers == started
    assert [worker.exitcode for worker in started] == [0, 0]


@pytest.mark.parametrize(
    ("cores", "processes", "wanted", "expected"),
    [(2, None, None, 2), (2, "2", None, 1), (16, "1", None, 8), (16, "4", None, 4), (1, "2", None, 1), (2, "2", 5, 5)],
)
def test_workers_follow_the_cores(cores, processes, wanted, expected, monkeypatch, recwarn):
    """If they are not set; torch has nothing to say about either number."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    run = config(data={"workers": wanted})
    assert workers_for(run.data) == expected
    loaders = (
        train_loader(source(8), run, EpochSampler(8, 4), False),
        eval_loader(source(8), run.data, 4, 0, 1, False),
    )
    assert [loader.num_workers for loader in loaders] == [expected] * 2
    assert not [str(warning.message) for warning in recwarn if "worker" in str(warning.message)]
