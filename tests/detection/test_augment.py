"""Training images with their objects: what is changed together, and that every draw has its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conv2former.data import EpochSampler, Stream, seed_all
from conv2former.tasks.detection.augment import EvalTransform, TrainTransform
from conv2former.tasks.detection.loader import eval_loader, train_loader
from conv2former.tasks.detection.sources import open_train_and_val

from .conftest import (
    COLOURS,
    MASKS,
    NEGATIVE,
    changed,
    configured,
    entry,
    opened,
    scenes,
)


def look(image: torch.Tensor) -> np.ndarray:
    """Returns the class of each pixel by its colour, -1 where it has none of them: (h, w)."""
    pixels = image.permute(1, 2, 0).numpy().astype(float)
    distance = np.abs(pixels[..., None, :] - COLOURS).max(-1)
    return np.where(distance.min(-1) < 40, distance.argmin(-1), -1)


@pytest.mark.parametrize(
    "augment",
    [
        {"crop": 1.0, "crop_scale": [0.4, 0.9], "hflip": 0.5, "vflip": 0.5, "short_sides": [48, 64, 100]},
        {"resize": "large_scale_jitter", "scale": [0.4, 2.5], "hflip": 0.5, "vflip": 0.5},
    ],
    ids=["multi_scale", "large_scale_jitter"],
)
def test_boxes_and_masks_stay_on_their_things(raw, augment):
    size = [72, 96] if "resize" in augment else None
    config = configured({**raw, "augment": augment}, data__img_size=size, **MASKS)
    train = opened(raw, **MASKS)[0]
    transform, seen, cut = TrainTransform(config), 0, 0
    for epoch in range(12):
        for index in range(len(train)):
            seed_all(Stream.IMAGE, 0, epoch, index)
            example = train.images[index][0]
            image, target = transform(example)
            boxes, labels, masks = target["boxes"], target["labels"], target["masks"]
            assert (image.dtype, masks.dtype, boxes.dtype) == (torch.uint8, torch.uint8, torch.float32)
            assert masks.shape == (len(boxes), *image.shape[1:])
            if "resize" in augment:
                assert image.shape == (3, 72, 96)
            else:
                assert max(image.shape[1:]) <= 96
                assert len(boxes) or index == NEGATIVE
            classes, inside = look(image), np.zeros(image.shape[1:], bool)
            for box, label, mask in zip(boxes.tolist(), labels.tolist(), masks.numpy(), strict=True):
                left, top, right, bottom = box
                assert 0 <= left < right <= image.shape[2]
                assert 0 <= top < bottom <= image.shape[1]
                rows, columns = (slice(max(0, int(a) - 1), int(b) + 2) for a, b in ((top, bottom), (left, right)))
                assert not np.delete(mask, np.s_[columns], axis=1).any()
                inside[rows, columns] |= True
                if mask.sum() > 60:
                    assert (classes[mask > 0] == label).mean() > 0.6
                    seen += 1
            assert not (classes[~inside] >= 0).any()
            cut += len(boxes) < len(example.objects)
    assert seen > 100
    assert cut > 3  # some objects are cut off


def test_an_object_of_which_no_pixel_is_seen_is_left_out(raw, folder):
    """The box of a mask with two parts may have nothing between them."""
    parts = [[0, 0, 8, 0, 8, 8, 0, 8], [72, 48, 80, 48, 80, 56, 72, 56]]
    changed(folder, lambda c: entry(c).update(bbox=[0, 0, 80, 56], segmentation=parts))
    example = opened(raw, **MASKS)[0].images[0][0]
    plain = {"crop": 1.0, "crop_scale": [0.7, 0.7], "short_sides": [64], "hflip": 0.0}
    transform = TrainTransform(configured({**raw, "augment": plain}, **MASKS))
    numbers = set()
    for place in range(20):
        seed_all(Stream.IMAGE, 0, 0, place)
        target = transform(example).target
        numbers.add(len(target["boxes"]))
        assert len(target["boxes"]) == len(target["masks"]) == bool(target["masks"].any())
    assert numbers == {0, 1}


def test_colours_change_and_boxes_do_not(raw):
    example, found = opened(raw)[0].images[2][0], []
    for probability in (0.0, 1.0):
        augment = {"short_sides": [64], "hflip": 0.0, "photometric": probability}
        seed_all(Stream.IMAGE, 0, 0, 2)
        found.append(TrainTransform(configured({**raw, "augment": augment}))(example))
    torch.testing.assert_close(found[0].target, found[1].target, rtol=0, atol=0)
    assert (found[0].image != found[1].image).float().mean() > 0.5


def test_what_a_jittered_image_does_not_fill_is_the_mean(raw):
    augment = {"resize": "large_scale_jitter", "scale": [0.5, 0.5], "hflip": 0.0}
    config = configured({**raw, "augment": augment}, data__img_size=64)
    image = TrainTransform(config)(opened(raw)[0].images[1][0]).image
    assert image.shape == (3, 64, 64)
    mean = [round(255 * value) for value in config.data.preprocessing.mean]
    assert image[:, 63, 0].tolist() == image[:, 0, 63].tolist() == mean
    assert image[:, 31, 31].tolist() not in (mean, [0, 0, 0])


def test_objects_of_which_little_is_left_are_left_out(raw, folder):
    changed(folder, lambda c: entry(c).update(bbox=[20, 20, 1.2, 1.2], segmentation=[[20, 20, 22, 20, 22, 22, 20, 22]]))
    train = opened(raw, **MASKS)[0]
    for sides, left in (([56], 1), ([28], 0)):
        plain = {"short_sides": sides, "hflip": 0.0}
        target = TrainTransform(configured({**raw, "augment": plain}, **MASKS))(train.images[0][0]).target
        assert [len(target[key]) for key in ("boxes", "labels", "masks")] == [left] * 3


def test_the_shorter_side_and_the_longer_one(raw, folder):
    photo = Image.new("RGB", (200, 100))
    assert EvalTransform(64, 1000, 3).image(photo).shape == (3, 64, 128)
    assert EvalTransform(64, 96, 3).image(photo).shape == (3, 48, 96)
    assert EvalTransform(64, 96, 1).image(photo).shape == (1, 48, 96)
    batch = next(iter(eval_loader(opened(raw)[1], configured(raw), 1, 2, torch.device("cpu"), None)))
    assert batch.places == [1, 3]
    assert [Path(name).name for name in batch.names] == ["01.png", "03.png"]
    assert batch.sizes == [(64, 64), (56, 80)]
    assert [image.shape[1:] for image in batch.images] == [(64, 64), (64, 91)]
    np.testing.assert_allclose(batch.objects[0].boxes, [thing.box for thing in scenes("val")[1][2]])


def batches_of(raw, workers: int, first: int = 0, epoch: int = 1) -> list:
    size = 64 if raw["augment"]["resize"] == "large_scale_jitter" else None
    config = configured(raw, data__workers=workers, data__img_size=size, **MASKS)
    train = open_train_and_val(config)[0]
    sampler = EpochSampler(len(train), 2, 2, seed=3)
    sampler.set_epoch(epoch, first)
    return list(train_loader(train, config, sampler, torch.device("cpu"), None))


@pytest.mark.parametrize("resize", ["multi_scale", "large_scale_jitter"])
def test_every_draw_is_a_function_of_its_place(raw, resize):
    raw = {**raw, "augment": {**raw["augment"], "resize": resize}}
    whole = batches_of(raw, 0)
    assert len(whole) == 6
    assert whole[0].images[0].dtype == torch.float32
    assert abs(float(whole[0].images[0].mean())) < 2
    for again in (batches_of(raw, 2), batches_of(raw, 0, first=2), batches_of(raw, 2, first=2)):
        for there, here in zip(whole[-len(again) :], again, strict=True):
            for image, other in zip(there.images, here.images, strict=True):
                torch.testing.assert_close(image, other, rtol=0, atol=0)
            for target, other in zip(there.targets, here.targets, strict=True):
                assert target.keys() == other.keys() == {"boxes", "labels", "masks"}
                assert all(torch.equal(target[key], other[key]) for key in target)
    assert any(
        not torch.equal(a.images[0], b.images[0])
        for a, b in zip(whole, batches_of(raw, 0, epoch=0), strict=True)
        if a.images[0].shape == b.images[0].shape
    )


def test_grey_images_and_16_bits(raw, folder):
    values = np.linspace(0, 65535, 56 * 80).reshape(56, 80).astype(np.uint16)
    Image.fromarray(values).save(folder / "train" / "00.png")
    train = opened(raw, data__mean=[0.5], data__std=[0.5])[0]
    photo = train.images[0][0].photo
    assert (photo.mode, photo.getextrema()[0]) == ("RGB", (0, 255))
    config = configured(raw, data__mean=[0.5], data__std=[0.5])
    assert TrainTransform(config)(train.images[0][0]).image.shape[0] == 1
