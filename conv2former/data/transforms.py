"""What is done to an image before it goes into a batch: timm's and torchvision's transforms, without normalising."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation, ResizeKeepRatio
from torchvision.transforms import ColorJitter, RandomHorizontalFlip

from .._preprocessing import Preprocessing
from ..config import Config, img_size_at
from ..config.schema import DataConfig
from . import pixels

__all__ = ["Augmented", "TrainTransform", "allow_black", "eval_transform", "in_channels", "train_transforms"]


class Augmented(NamedTuple):
    """An augmented image, not yet normalised.

    Attributes:
        image: in RGB or grey, 8 bits.
        patches: what random erasing puts into the normalised image: top, left, and values, (channels, h, w) float.
    """

    image: Image.Image
    patches: list[tuple[int, int, torch.Tensor]]


class _Notepad:
    """Takes the place of a normalised image, (channels, H, W), in timm's RandomErasing, and notes what that writes."""

    dtype = torch.float32

    def __init__(self, channels: int, height: int, width: int) -> None:
        self._size = torch.Size((channels, height, width))
        self.patches: list[tuple[int, int, torch.Tensor]] = []

    def size(self) -> torch.Size:
        return self._size

    def __setitem__(self, place: tuple[slice, slice, slice], values: torch.Tensor) -> None:
        _, rows, columns = place
        shape = (self._size[0], rows.stop - rows.start, columns.stop - columns.start)
        self.patches.append((rows.start, columns.start, values.expand(shape)))


class CropAndFlip:
    """timm's random crop and torchvision's random flip with their draws, as one step; the pixels are theirs."""

    def __init__(self, crop: RandomResizedCropAndInterpolation, flip: RandomHorizontalFlip | None) -> None:
        self.crop, self.flip = crop, flip
        # a tensor and a number are compared as float32, here without the tensor of the result
        self._flips_below = float(np.float32(flip.p)) if flip else 0.0

    def __call__(self, image: Image.Image) -> Image.Image:
        crop = self.crop
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        choice = crop.interpolation
        interpolation = random.choice(choice) if isinstance(choice, (tuple, list)) else choice
        mirror = self.flip is not None and torch.rand(1).item() < self._flips_below
        return pixels.resized_crop(image, top, left, height, width, crop.size, interpolation, mirror)


class PaddedCrop:
    """torchvision's random crop of an image that is padded with its mirror image, without making the padded image.

    Args:
        size: of the result, (height, width), at most that of the image.
        padding: pixels on each side, fewer than the image has.
    """

    def __init__(self, size: tuple[int, int], padding: int) -> None:
        self.size, self.padding = size, padding

    def __call__(self, image: Image.Image) -> Image.Image:
        values = np.asarray(image)
        rows, columns = map(self._places, values.shape[:2], self.size)
        return Image.fromarray(values.take(rows, 0).take(columns, 1))

    def _places(self, length: int, size: int) -> np.ndarray:
        """Draws `size` neighbours of a padded row, and returns which pixels of the row, of `length`, they are."""
        start = int(torch.randint(length + 2 * self.padding - size + 1, ())) - self.padding
        return length - 1 - abs(length - 1 - abs(np.arange(start, start + size)))


class TrainTransform:
    """timm's training transform without its normalisation, which `Finish` makes up for.

    A normalised image has four times the bytes of its pixels, and random erasing needs it. So the worker processes send
    8-bit pixels and the few values that erasing draws, in timm's order of draws.

    Args:
        transform: timm's, of a PIL image to a normalised tensor.
        channels: of the images, 3 or 1.

    Attributes:
        of_image: its steps from PIL image to PIL image.
        erasing: those that erase from a normalised image.
    """

    def __init__(self, transform: Any, channels: int = 3) -> None:
        pixels.prepare()
        self.channels = channels
        steps = transform.transforms
        to_tensor = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
        self.of_image: list[Any] = _joined([_without_effect(step) for step in steps[:to_tensor]])
        self.erasing: list[Any] = [step for step in steps[to_tensor:] if isinstance(step, RandomErasing)]
        if not self.erasing and self.of_image and isinstance(self.of_image[-1], _OrderOfNothing):
            self.of_image.pop()  # nobody draws after it

    def __call__(self, image: Image.Image) -> Augmented:
        image = in_channels(image, self.channels)
        for step in self.of_image:
            image = step(image)
        notes = _Notepad(self.channels, image.height, image.width)
        for erase in self.erasing:
            erase(notes)
        return Augmented(image, notes.patches)


def _joined(steps: list[Any]) -> list[Any]:
    """Puts a `CropAndFlip` in the place of timm's random crop and the flip that follows it."""
    if not steps or type(steps[0]) is not RandomResizedCropAndInterpolation:
        return steps
    flips = len(steps) > 1 and type(steps[1]) is RandomHorizontalFlip
    return [CropAndFlip(steps[0], steps[1] if flips else None), *steps[1 + flips :]]


def _without_effect(step: Any) -> Any:
    """Puts what draws alike in the place of a colour jitter of nothing, as timm makes it of `color_jitter: 0`."""
    if type(step) is not ColorJitter:
        return step
    factors = (step.brightness, step.contrast, step.saturation, step.hue)
    return step if any(factor is not None for factor in factors) else _OrderOfNothing()


class _OrderOfNothing:
    """torchvision's ColorJitter that does nothing: it draws the order in which it would."""

    def __call__(self, image: Image.Image) -> Image.Image:
        torch.randperm(4)
        return image


def train_transforms(config: Config) -> list[TrainTransform]:
    """Returns the training transform of every epoch, of PIL images in RGB.

    The size is that of `img_size_at`; epochs of one size share a transform. The random crop has the shape of the input,
    so that objects keep theirs, but for `augment.ratio`; with `augment.padding` they keep their size, too. Colour
    operations leave grey images as they are. With `augment.hflip: alternating` they mirror nothing; `Transformed` does.
    """
    images, augment = config.data.preprocessing, config.augment

    def build(size: int | tuple[int, int]) -> TrainTransform:
        shape = 1.0 if isinstance(size, int) else size[1] / size[0]
        transform = create_transform(
            size,
            is_training=True,
            scale=augment.scale,
            ratio=(augment.ratio[0] * shape, augment.ratio[1] * shape),
            hflip=0.0 if augment.hflip == "alternating" else augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            interpolation=augment.interpolation,
            mean=images.mean,
            std=images.std,
            re_prob=augment.re_prob,
            re_mode=augment.re_mode,
        )
        if augment.padding:
            resize = ResizeKeepRatio(size, longest=0.0, interpolation=augment.interpolation)  # until it is covered
            transform.transforms[:1] = [resize, PaddedCrop(resize.size, augment.padding)]
        allow_black(transform)
        for operation in _operations(transform):
            if operation.aug_fn in AFFINE:
                operation.aug_fn = functools.partial(_transformed, operation.aug_fn)
        for step in transform.transforms:
            if isinstance(step, auto_augment.RandAugment):
                step.ops = np.array(step.ops)  # NumPy would make this array anew for every image to choose from it
        return TrainTransform(transform, images.channels)

    sizes = [img_size_at(config, epoch) for epoch in range(config.schedule.epochs + config.schedule.cooldown_epochs)]
    of_size = {size: build(size) for size in dict.fromkeys(sizes)}
    return [of_size[size] for size in sizes]


def allow_black(transform: Any) -> None:
    """Lets a transform of timm's posterize to 0 bits, which its policies draw and Pillow 13 refuses."""
    for operation in _operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


def _operations(transform: Any) -> Iterator[Any]:
    """Goes over the operations of a transform's RandAugment or AutoAugment."""
    for step in transform.transforms:
        yield from itertools.chain(getattr(step, "ops", []), *getattr(step, "policy", []))


def _posterize(image: Any, bits: int, **kwargs: Any) -> Any:
    """Keeps the highest `bits` of every value; of 0 nothing is left."""
    return auto_augment.posterize(image, bits, **kwargs) if bits > 0 else image.point(lambda value: 0)


AFFINE = (
    auto_augment.rotate,
    auto_augment.shear_x,
    auto_augment.shear_y,
    auto_augment.translate_x_abs,
    auto_augment.translate_x_rel,
    auto_augment.translate_y_abs,
    auto_augment.translate_y_rel,
)


def _transformed(operation: Callable[..., Any], image: Any, *args: Any, **kwargs: Any) -> Any:
    """Does one of `AFFINE`, with its draws, by a faster transform."""
    return operation(pixels.Transformable(image), *args, **kwargs)


class _InChannels:
    """Makes an image grey where the network takes one channel; see `in_channels`."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __call__(self, image: Image.Image) -> Image.Image:
        return in_channels(image, self.channels)


def in_channels(image: Image.Image, channels: int) -> Image.Image:
    """Returns an RGB image with 3 channels as it is, and with 1 as its luma; of equal channels that is their value."""
    return image if channels == 3 else image.convert("L")


def eval_transform(images: DataConfig | Preprocessing) -> Any:
    """Returns timm's evaluation transform: a PIL image in RGB to a normalised float tensor, (channels, H, W)."""
    given = images.preprocessing if isinstance(images, DataConfig) else images
    transform = create_transform(
        given.img_size,
        is_training=False,
        interpolation=given.interpolation,
        mean=given.mean,
        std=given.std,
        crop_pct=given.crop_pct,
        crop_mode=given.crop_mode,
    )
    if given.channels != 3:
        transform.transforms.insert(0, _InChannels(given.channels))
    return transform
