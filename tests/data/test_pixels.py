"""Compiled image operations against Pillow's and torchvision's, to the bit, and the ways without them."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from conv2former.data import pixels

BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC


@pytest.fixture(params=["compiled", "Pillow"])
def way(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setenv("CONV2FORMER_COMPILE", "0")
    elif pixels._order(pixels._library()) is None:
        pytest.skip("no C++ compiler")
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """How often the compiled functions were called."""
    if pixels._order(pixels._library()) is None:
        pytest.skip("no C++ compiler")
    count = {"_resize": 0, "_transform": 0}

    def counted(name, function, *args):
        count[name] += 1
        return function(*args)

    for name in count:
        monkeypatch.setattr(pixels, name, functools.partial(counted, name, getattr(pixels, name)))
    return count


def photo(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise with edges of 0 and 255, where bicubic interpolation overshoots."""
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 256, (height, width, 3), np.uint8)
    values[draw.random((height, width)) < 0.3] = 255
    values[draw.random((height, width)) < 0.3] = 0
    return Image.fromarray(values).convert(mode)


def expected(image, box, size, interpolation, mirror):
    result = F.resized_crop(image, *box, list(size), interpolation)
    return F.hflip(result) if mirror else result


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and a.size == b.size and np.array_equal(a, b)


def test_any_crop_to_any_size(way):
    draw = random.Random(0)
    for seed in range(150):
        height, width = draw.randint(1, 300), draw.randint(1, 300)
        h, w = draw.randint(1, height), draw.randint(1, width)
        box = draw.randint(0, height - h), draw.randint(0, width - w), h, w
        size = draw.randint(1, 120), draw.randint(1, 120)
        arguments = photo(height, width, seed), box, size, draw.choice((BILINEAR, BICUBIC)), draw.random() < 0.5
        ours = pixels.resized_crop(arguments[0], *box, *arguments[2:])
        assert same(ours, expected(*arguments)), (height, width, *arguments[1:])


@pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC])
@pytest.mark.parametrize(
    ("of", "to"),
    [((40, 50), (40, 50)), ((40, 50), (40, 20)), ((40, 50), (10, 50)), ((400, 20), (30, 18)), ((1, 1), (9, 7))],
)
def test_a_whole_image(way, of, to, interpolation):
    image = photo(*of)
    assert same(
        pixels.resized_crop(image, 0, 0, *of, to, interpolation), expected(image, (0, 0, *of), to, interpolation, False)
    )


@pytest.mark.parametrize(
    ("image", "box", "interpolation"),
    [
        pytest.param(photo(30, 40, mode="L"), (2, 3, 20, 25), BICUBIC, id="grey"),
        pytest.param(photo(30, 40, mode="CMYK"), (2, 3, 20, 25), BICUBIC, id="four colours"),
        pytest.param(photo(30, 40), (2, 3, 20, 25), InterpolationMode.LANCZOS, id="another filter"),
        pytest.param(photo(30, 40), (2, 3, 40, 25), BICUBIC, id="beyond the border"),
    ],
)
def test_what_is_left_to_pillow(image, box, interpolation, calls):
    ours = pixels.resized_crop(image, *box, (16, 18), interpolation, mirror=True)
    assert same(ours, expected(image, box, (16, 18), interpolation, True))
    assert calls["_resize"] == 0


def test_large_images(calls):
    """Beyond 16 MB Pillow keeps an image in pieces."""
    small, large = photo(8, 9), photo(2100, 2100)
    box = 100, 50, 1900, 2000
    assert same(pixels.resized_crop(large, *box, (32, 32), BILINEAR), expected(large, box, (32, 32), BILINEAR, False))
    size = 2100, 2100
    assert same(pixels.resized_crop(small, 0, 0, 8, 9, size, BICUBIC), small.resize(size, Image.Resampling.BICUBIC))
    moved = pixels.Transformable(large).transform(
        large.size, Image.Transform.AFFINE, (1, 0, 5, 0, 1, 0), Image.Resampling.BILINEAR, fillcolor=(9, 9, 9)
    )
    assert np.array_equal(np.asarray(moved)[:, 100:200], np.asarray(large)[:, 105:205])
    values = pixels.stack([large])
    assert np.array_equal(values[0].numpy(), large)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize(
    ("operation", "values"),
    [
        (auto_augment.rotate, [-27.3, 0.0, 4.2, 90, 180.0]),
        (auto_augment.shear_x, [-0.3, 0.0, 0.25]),
        (auto_augment.shear_y, [-0.3, 0.0, 0.25]),
        (auto_augment.translate_x_rel, [-0.45, 0.1]),
        (auto_augment.translate_y_rel, [-0.45, 0.1]),
        (auto_augment.translate_x_abs, [3, -7.5, 500]),
        (auto_augment.translate_y_abs, [3, -7.5, 500]),
    ],
)
def test_rotations_shears_and_translations(way, operation, values, resample):
    for seed, size in enumerate([(31, 44), (64, 64), (5, 3), (1, 1)]):
        image = photo(*size, seed)
        for value in values:
            options = {"resample": resample, "fillcolor": (124, 116, 104)}
            ours = operation(pixels.Transformable(image), value, **options)
            assert same(ours, operation(image, value, **options)), (size, value)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"resample": Image.Resampling.NEAREST, "fillcolor": (1, 2, 3)}),
        ("RGB", {"resample": Image.Resampling.BICUBIC, "fillcolor": None}),
        ("L", {"resample": Image.Resampling.BICUBIC, "fillcolor": 7}),
    ],
)
def test_transforms_that_are_left_to_pillow(mode, options, calls):
    image = photo(20, 30, mode=mode)
    ours = auto_augment.shear_x(pixels.Transformable(image), 0.2, **options)
    assert same(ours, auto_augment.shear_x(image, 0.2, **options))
    assert calls["_transform"] == 0


def test_the_compiled_functions_are_called(calls):
    image = photo(30, 40)
    pixels.resized_crop(image, 2, 3, 20, 25, (16, 18), BICUBIC)
    for operation in (auto_augment.rotate, auto_augment.shear_y):
        operation(pixels.Transformable(image), 0.2, resample=Image.Resampling.BICUBIC, fillcolor=(1, 2, 3))
    assert calls == {"_resize": 1, "_transform": 2}


def test_another_pillow_is_noticed(monkeypatch):
    """With passes in an order that is neither of those known, nothing compiled is taken."""
    if pixels._order(pixels._library()) is None:
        pytest.skip("no C++ compiler")
    pixels._find_order.cache_clear()
    try:
        monkeypatch.setattr(pixels, "ORDERS", (lambda h, w, to_h, to_w: True,))
        assert pixels._order(pixels._library()) is None
        image = photo(50, 40)
        ours = pixels.resized_crop(image, 0, 0, 50, 40, (20, 20), BICUBIC)
        assert same(ours, image.resize((20, 20), Image.Resampling.BICUBIC))
        monkeypatch.setattr(pixels, "ORDERS", (*pixels.ORDERS, lambda h, w, to_h, to_w: False))
        monkeypatch.setattr(pixels, "PROBES", [((12, 13), (30, 40))])
        pixels._find_order.cache_clear()
        assert pixels._order(pixels._library()) is pixels.ORDERS[1]
    finally:
        monkeypatch.undo()
        pixels._find_order.cache_clear()


def test_a_pillow_that_shows_no_pixels(monkeypatch):
    """As it was before version 11.2."""
    pixels._find_order.cache_clear()
    monkeypatch.delattr(Image.Image, "__arrow_c_array__", raising=False)
    try:
        assert pixels._order(pixels._library()) is None
        image = photo(50, 40)
        ours = pixels.resized_crop(image, 0, 0, 50, 40, (20, 20), BICUBIC)
        assert same(ours, image.resize((20, 20), Image.Resampling.BICUBIC))
        assert np.array_equal(pixels.stack([image])[0].numpy(), image)
    finally:
        pixels._find_order.cache_clear()


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (1, 6), (33, 20)])
def test_stack(way, size):
    images = [photo(*size, seed) for seed in range(3)]
    values = pixels.stack(images)
    assert values.dtype == torch.uint8
    assert np.array_equal(values.numpy(), np.stack([np.asarray(image) for image in images]))


def test_images_of_different_sizes_do_not_stack(way):
    with pytest.raises(ValueError, match="different sizes"):
        pixels.stack([photo(5, 6), photo(6, 5)])


def test_normalize(way):
    images = torch.randint(0, 256, (3, 20, 17, 3), dtype=torch.uint8)
    images[0, 0, :, 0], images[0, 1, :, 1] = 0, 255
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = torch.stack(
        [F.normalize(F.to_tensor(Image.fromarray(image.numpy())), list(mean), list(std)) for image in images]
    )
    for given in (images, images.transpose(1, 2).contiguous().transpose(1, 2)):
        ours = pixels.normalize(given, torch.tensor(mean), torch.tensor(std))
        assert torch.equal(ours.permute(0, 3, 1, 2), theirs)
