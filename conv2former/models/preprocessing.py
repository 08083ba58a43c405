"""How an image becomes the input of a network: what a weight file notes about it, or what is assumed without a note."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD

from .._preprocessing import FIELDS, Preprocessing
from .variants import list_variants
from .variants import variant as variant_named

__all__ = ["Preprocessing", "candidates", "noted_preprocessing"]


def candidates(img_size: int | tuple[int, int], channels: int = 3) -> dict[str, Preprocessing]:
    """Returns the two preprocessings that the authors' files may have been evaluated with; see docs/checkpoints.md.

    Their README gives ImageNet's mean and std; above 224 pixels the whole image is resized, as in ConvNeXt's recipe.
    Their code, under the timm releases that could run it, took mean = std = 0.5 and crop 0.9.
    """
    sized = Preprocessing(img_size)
    whole: dict[str, Any] = {"crop_pct": 1.0, "crop_mode": "squash"} if max(sized.size) > 224 else {}
    inception: dict[str, Any] = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD, "crop_pct": 0.9}
    found = {"imagenet": replace(sized, **whole), "inception": replace(sized, **inception)}
    return {name: one.for_channels(channels) for name, one in found.items()}


def noted_preprocessing(
    recipe: Mapping[str, Any], note: Mapping[str, Any], variant: str | None, channels: int = 3
) -> tuple[Preprocessing, list[str]]:
    """Puts together what a weight file notes about its preprocessing; what it does not is as published or the default.

    Args:
        recipe: the training script's arguments or configuration in the file.
        note: timm's `pretrained_cfg` beside the file, or the fields of a `Preprocessing` in it; outweighs the recipe.
        variant: name of the network; its published files tell the crop that goes with an image size.
        channels: of the network's input. Values for three are taken for one, too, as their mean.

    Returns:
        The preprocessing, and the names of the fields that are noted.
    """
    section = recipe.get("data")
    noted: dict[Any, Any] = _with_img_size(section if isinstance(section, Mapping) else recipe)
    noted |= _with_img_size(note)
    found = {key: noted[key] for key in FIELDS if _is_right(key, noted, channels)}
    found |= {key: tuple(found[key]) for key in ("mean", "std") if key in found}
    default = Preprocessing().for_channels(channels)
    for key in ("mean", "std"):
        if key in found and len(found[key]) != channels:  # of a network for RGB that was made one for grey images
            found[key] = (sum(found[key]) / len(found[key]),) * channels
    own = replace(default, **found)
    published = variant_named(variant).pretrained if variant in list_variants() else ()
    for tag in published:
        if tag.input_size[1:] == own.size and not {"crop_pct", "crop_mode"} & found.keys():
            return replace(own, crop_pct=tag.crop_pct, crop_mode=tag.crop_mode), list(found)
    return own, list(found)


def _with_img_size(noted: Mapping[Any, Any]) -> dict[Any, Any]:
    size = noted.get("input_size")  # (channels, height, width), in timm's arguments and its pretrained_cfg
    is_size = isinstance(size, (list, tuple)) and len(size) == 3
    return {**noted, "img_size": list(size[1:])} if is_size else dict(noted)  # type: ignore[index]


def _is_right(key: str, noted: Mapping[str, Any], channels: int) -> bool:
    """Whether a file's note of a field can be used; others, such as timm's empty `--interpolation`, say nothing."""
    value: Any = noted.get(key)
    if key in ("mean", "std"):
        return (
            isinstance(value, (list, tuple))
            and len(value) in (channels, 3)
            and all(_is_number(v) and (v > 0 or key == "mean") for v in value)
        )
    if key == "img_size":
        sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
        return all(type(side) is int and 32 <= side <= 4096 for side in sides)
    if key == "crop_pct":
        return _is_number(value) and 0.1 <= value <= 1
    return value in {"interpolation": ["bilinear", "bicubic"], "crop_mode": ["center", "squash", "border"]}[key]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
