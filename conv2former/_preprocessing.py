"""How an image becomes the input of a network: the fields that configurations and weight files have in common.

timm's terms are used throughout, so that the fields are keywords of `timm.data.create_transform`, keys of timm's
`pretrained_cfg` and of a configuration's data section alike. Needs no other package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .text import shown

__all__ = ["CHANNELS", "FIELDS", "Preprocessing", "as_img_size", "channels_text", "is_noted", "size_text", "wrong_note"]

CHANNELS = (1, 3)  # of images that can be read: grey and RGB
MIN_SIDE, MAX_SIDE = 32, 4096  # pixels
LARGEST = 1e12  # of a mean or std


def as_img_size(size: Sequence[int] | int) -> int | tuple[int, int]:
    """Returns a size as it is written: one number for a square, otherwise (height, width); pixels."""
    if isinstance(size, int):
        return size
    height, width = size
    return height if height == width else (height, width)


def size_text(size: Sequence[int] | int) -> str:
    """Returns a size for people: '32 x 32', or '128 x 256 (height x width)'."""
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height} x {width}{'' if height == width else ' (height x width)'}"


def channels_text(count: int) -> str:
    """Returns a number of channels for people."""
    return {1: "1 channel (grey)", 3: "3 channels (RGB)"}.get(count, f"{count} channels")


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalisation of an evaluation.

    Attributes:
        img_size: height and width of the network's input, pixels: one number for a square, otherwise both.
        mean, std: of each channel, for values from 0 to 1: three, or one for grey images.
        interpolation: 'bilinear' or 'bicubic'.
        crop_pct: the image is resized to `img_size / crop_pct` and cropped to `img_size`.
        crop_mode: 'center': resized, with its aspect ratio, until it covers the size; 'squash': both sides are resized,
            whatever the shape; 'border': resized until it fits into the size, and the rest filled.
    """

    img_size: int | tuple[int, int] = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", as_img_size(self.img_size))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input, pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return len(self.mean)

    def for_channels(self, count: int) -> Preprocessing:
        """Returns the same for images of another number of channels, each with the mean over the channels here."""
        if count == self.channels:
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,) * count, std=(std,) * count)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain built-in types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def to_cfg(self) -> dict[str, Any]:
        """Returns the fields as keys of timm's `pretrained_cfg`."""
        plain = self.to_dict()
        del plain["img_size"]
        return {"input_size": [self.channels, *self.size], **plain}

    def __str__(self) -> str:
        return ", ".join(self.texts().values())

    def texts(self) -> dict[str, str]:
        """Returns each field for people; the two of the crop are one, `crop_pct`."""
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return {
            "img_size": size_text(self.size),
            "interpolation": self.interpolation,
            "crop_pct": f"crop {self.crop_pct:g}{'' if self.crop_mode == 'center' else f' {self.crop_mode}'}",
            "mean": f"mean {mean}",
            "std": f"std {std}",
        }


FIELDS = tuple(field.name for field in fields(Preprocessing))


def is_noted(value: Any) -> bool:
    """Returns whether the value of a field says anything: timm's scripts note None, or '', for what was not given."""
    return value is not None and value != ""


def wrong_note(noted: Mapping[Any, Any]) -> str:
    """Returns what is wrong with a file's note of a preprocessing, a configuration or timm's `pretrained_cfg`.

    Returns:
        The first field that cannot be used, its value and what is allowed; empty where all can be, or are not noted.
    """
    for key, (is_right, expected) in _ALLOWED.items():
        value = noted.get(key)
        if is_noted(value) and not is_right(value):
            return f"{key} is {shown(value)}; expected {expected}"
    return ""


def _is_side(value: Any) -> bool:
    return type(value) is int and MIN_SIDE <= value <= MAX_SIDE


def _is_size(value: Any) -> bool:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    return _is_side(value) or (is_pair and all(map(_is_side, value)))


def _is_input_size(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) == 3
    return is_list and type(value[0]) is int and value[0] >= 1 and all(map(_is_side, value[1:]))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -LARGEST <= value <= LARGEST and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and 1 <= len(value) <= 1000 and all(map(_is_number, value))


def _one_of(*texts: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in texts, " or ".join(map(repr, texts))


_SIDES = f"whole numbers of pixels from {MIN_SIDE} to {MAX_SIDE}"
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (_is_input_size, f"[channels, height, width], the last two {_SIDES}"),
    "img_size": (_is_size, f"one number or [height, width], {_SIDES}"),
    "mean": (_are_numbers, "a list of finite numbers, one for each channel"),
    "std": (lambda value: _are_numbers(value) and min(value) > 0, "a list of numbers above 0, one for each channel"),
    "interpolation": _one_of("bilinear", "bicubic"),
    "crop_pct": (lambda value: _is_number(value) and 0.1 <= value <= 1, "a number from 0.1 to 1"),
    "crop_mode": _one_of("center", "squash", "border"),
}
