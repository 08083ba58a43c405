from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from conv2former import DataError
from conv2former.config.schema import AugmentConfig, DataConfig
from conv2former.data import DataSource, EpochSampler, Stream, eval_loader, seed_all, train_loader

DATA = DataConfig(root="x", img_size=32, workers=0)


class Noise:
    def __init__(self, count: int, bad_label: bool = False) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 255, (count, 40, 40, 3), dtype=np.uint8)
        self.bad_label = bad_label

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
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
    augment = AugmentConfig()
    data = DATA.model_copy(update={"workers": workers})
    sampler = EpochSampler(12, 4, seed=5)
    whole = [images for images, _ in train_loader(source(12), data, augment, sampler, False)]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    sampler.set_epoch(0, first_step=2)
    last = [images for images, _ in train_loader(source(12), DATA, augment, sampler, False)]
    assert torch.equal(last[0], whole[2])
    sampler.set_epoch(1)
    other = [images for images, _ in train_loader(source(12), DATA, augment, sampler, False)]
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
        for images, _ in eval_loader(source(7), DATA, batch_size, rank, world_size, False):
            seen += [image.numpy().tobytes() for image in images]
    whole, _ = next(iter(eval_loader(source(7), DATA, 7, 0, 1, False)))
    expected = [image.numpy().tobytes() for image in whole]
    assert sorted(seen) == sorted(expected)


def test_a_class_out_of_range_is_an_error_on_the_cpu():
    loader = train_loader(source(4, bad_label=True), DATA, AugmentConfig(), EpochSampler(4, 2), False)
    with pytest.raises(DataError, match=r"noise, image \d: class 9 of 3"):
        next(iter(loader))
