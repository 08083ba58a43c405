"""Images that are not square, and grey ones, on their way to the network: the pixels are timm's, to the bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment, create_transform

from conv2former import Preprocessing
from conv2former.config import img_size_at
from conv2former.data import (
    DataSource,
    EpochSampler,
    Stream,
    eval_loader,
    eval_transform,
    seed_all,
    train_loader,
    transforms,
)
from conv2former.data.images import open_rgb

from .test_loader import Photos, config, source

GREY = {"mean": (0.4,), "std": (0.25,)}


def photo(index: int = 0) -> Image.Image:
    with Image.open(io.BytesIO(Photos(index + 1).files[index])) as file:
        return file.convert("RGB")


@pytest.mark.parametrize("compiles", ["0", "1"])
@pytest.mark.parametrize(
    ("data", "augment"),
    [
        ({"img_size": (32, 80)}, {"re_prob": 0.5, "vflip": 0.5}),
        ({"img_size": (64, 32), **GREY}, {"re_prob": 1.0, "re_mode": "pixel"}),
        ({"img_size": 32, **GREY}, {"re_prob": 1.0, "re_mode": "rand", "auto_augment": None}),
    ],
    ids=["wide", "high and grey", "grey"],
)
def test_training_images_are_those_of_timm(data, augment, compiles, monkeypatch):
    """Through timm's own transform, of grey images as Pillow makes them, with the random crop in the input's shape."""
    monkeypatch.setenv("CONV2FORMER_COMPILE", compiles)
    run = config(augment=augment, data=data)
    given, options = run.data.preprocessing, run.augment.model_dump()
    names = ("scale", "hflip", "vflip", "color_jitter", "auto_augment", "interpolation", "re_prob", "re_mode")
    shape = given.size[1] / given.size[0]
    theirs = create_transform(
        given.size,
        is_training=True,
        mean=given.mean,
        std=given.std,
        ratio=tuple(ratio * shape for ratio in options["ratio"]),
        **{name: options[name] for name in names},
    )
    photos = Photos(8)
    loader = train_loader(DataSource(photos, ["a"], "photos"), run, EpochSampler(8, 4, seed=7), False)
    for batch in loader:
        assert batch.images.shape == (4, given.channels, *given.size)
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            seed_all(Stream.IMAGE, 7, 0, index)
            expected = Image.open(io.BytesIO(photos.files[index])).convert("RGB")
            assert torch.equal(image, theirs(expected.convert("L") if given.channels == 1 else expected))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_evaluation_images_are_those_of_timm(mode):
    for size, mean in (((48, 96), GREY["mean"]), ((96, 48), (0.1, 0.2, 0.3)), (40, GREY["mean"])):
        given = Preprocessing(size, mean, tuple(0.5 for _ in mean), "bicubic", 0.9, mode)
        options = {key: value for key, value in vars(given).items() if key != "img_size"}
        theirs = create_transform(given.size, is_training=False, **options)
        image = photo()
        found = eval_transform(given)(image)
        assert found.shape == (given.channels, *given.size)
        assert torch.equal(found, theirs(image.convert("L") if given.channels == 1 else image))


def test_wide_images_are_cut_less_than_by_a_square():
    """An object keeps its shape: the sides of the random crop are to each other as those of the input."""
    run = config(data={"img_size": (32, 128)}, augment={"scale": (0.999, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0})
    crop = transforms.train_transforms(run)[0].of_image[0].crop
    *_, height, width = crop.get_params(Image.new("RGB", (400, 100)), crop.scale, crop.ratio)
    assert (width, height) == pytest.approx((400, 100), abs=2)


def test_grey_values_of_8_and_16_bits_stay_what_they_are():
    """A grey image becomes RGB where it is read, and its own values again where the network takes one channel."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for pixels in (values, values.astype(np.uint16) * 257):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        grey = transforms.in_channels(open_rgb(file.getvalue(), "it"), 1)
        assert grey.mode == "L"
        assert np.array_equal(grey, values)


def test_every_augmentation_policy_runs_on_grey_images():
    image = photo().resize((40, 40))
    for policy in ("rand-m9-mstd0.5-inc1", "rand-m10-inc1", "original", "v0", "3a", None):
        transform = transforms.train_transforms(config(augment={"auto_augment": policy}, data=GREY))[0]
        for i in range(200):
            seed_all(Stream.IMAGE, i)
            found = transform(image)
            assert (found.image.mode, found.image.size) == ("L", (32, 32))
            assert all(len(values) == 1 for *_, values in found.patches)


def test_what_has_no_meaning_for_grey_images_leaves_them_as_they_are():
    grey = photo().convert("L")
    for operation in (auto_augment.color, auto_augment.desaturate):
        assert np.array_equal(operation(grey, 0.3), grey)


def test_sizes_grow_with_their_shape():
    growing = {"augment": {"first_img_size": 32}, "schedule": {"epochs": 7, "cooldown_epochs": 1}}
    sizes = [img_size_at(config(data={"img_size": (128, 250)}, **growing), epoch) for epoch in range(8)]
    assert sizes == [(32, 64), (32, 64), (64, 128), (64, 128), (96, 192), (96, 192), (128, 250), (128, 250)]
    run = config(data={"img_size": (64, 96)}, **growing)
    sampler = EpochSampler(4, 4)
    loader = train_loader(source(4), run, sampler, False)
    for epoch in (0, 6):
        sampler.set_epoch(epoch)
        height, width = (32, 64) if epoch == 0 else (64, 96)  # 48 is rounded to 64
        assert next(iter(loader)).images.shape == (4, 3, height, width)
    (batch,) = eval_loader(source(3), config(data={"img_size": (32, 64), **GREY}).data, 3, 0, 1, False)
    assert batch.images.shape == (3, 1, 32, 64)
