"""How an image becomes the input of a network: what a weight file notes about it, or what is assumed without a note.

timm's terms are used throughout, so that the fields are keywords of `timm.data.create_transform`, keys of timm's
`pretrained_cfg` and of a configuration's data section alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)

from .variants import list_variants
from .variants import variant as variant_named

__all__ = ["Preprocessing", "candidates", "noted_preprocessing"]


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalisation of an evaluation.

    Attributes:
        img_size: height and width of the network's input, pixels.
        mean, std: of the three channels, for values from 0 to 1.
        interpolation: 'bilinear' or 'bicubic'.
        crop_pct: the image is resized to `img_size / crop_pct` and cropped to `img_size`.
        crop_mode: 'center': the shorter side is resized; 'squash': both are, whatever the shape; 'border': the longer
            side is, and the rest filled.
    """

    img_size: int = 224
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain built-in types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def to_cfg(self) -> dict[str, Any]:
        """Returns the fields as keys of timm's `pretrained_cfg`."""
        plain = self.to_dict()
        side = plain.pop("img_size")
        return {"input_size": [3, side, side], **plain}

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        crop = f"crop {self.crop_pct:g}{'' if self.crop_mode == 'center' else f' {self.crop_mode}'}"
        return f"{self.img_size} x {self.img_size}, {self.interpolation}, {crop}, mean {mean}, std {std}"


def candidates(img_size: int) -> dict[str, Preprocessing]:
    """Returns the two preprocessings that the authors' files may have been evaluated with; see docs/checkpoints.md.

    Their README gives ImageNet's mean and std; above 224 pixels the whole image is resized, as in ConvNeXt's recipe.
    Their code, under the timm releases that could run it, took mean = std = 0.5 and crop 0.9.
    """
    whole: dict[str, Any] = {"crop_pct": 1.0, "crop_mode": "squash"} if img_size > 224 else {}
    return {
        "imagenet": Preprocessing(img_size, **whole),
        "inception": Preprocessing(img_size, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD, crop_pct=0.9),
    }


def noted_preprocessing(
    recipe: Mapping[str, Any], note: Mapping[str, Any], variant: str | None
) -> tuple[Preprocessing, list[str]]:
    """Puts together what a weight file notes about its preprocessing; what it does not is as published or the default.

    Args:
        recipe: the training script's arguments or configuration in the file.
        note: timm's `pretrained_cfg` beside the file, or the fields of a `Preprocessing` in it; outweighs the recipe.
        variant: name of the network; its published files tell the crop that goes with an image size.

    Returns:
        The preprocessing, and the names of the fields that are noted.
    """
    section = recipe.get("data")
    noted: dict[Any, Any] = _with_img_size(section if isinstance(section, Mapping) else recipe)
    noted |= _with_img_size(note)
    found = {field.name: noted[field.name] for field in fields(Preprocessing) if _is_right(field.name, noted)}
    found |= {key: tuple(found[key]) for key in ("mean", "std") if key in found}
    own = Preprocessing(**found)
    published = variant_named(variant).pretrained if variant in list_variants() else ()
    for tag in published:
        if tag.input_size[-1] == own.img_size and not {"crop_pct", "crop_mode"} & found.keys():
            return replace(own, crop_pct=tag.crop_pct, crop_mode=tag.crop_mode), list(found)
    return own, list(found)


def _with_img_size(noted: Mapping[Any, Any]) -> dict[Any, Any]:
    size = noted.get("input_size")  # (channels, height, width), in timm's arguments and its pretrained_cfg
    is_size = isinstance(size, (list, tuple)) and len(size) == 3
    return {**noted, "img_size": size[-1]} if is_size else dict(noted)  # type: ignore[index]


def _is_right(key: str, noted: Mapping[str, Any]) -> bool:
    """Whether a file's note of a field can be used; others, such as timm's empty `--interpolation`, say nothing."""
    value: Any = noted.get(key)
    if key in ("mean", "std"):
        return (
            isinstance(value, (list, tuple))
            and len(value) == 3
            and all(_is_number(v) and (v > 0 or key == "mean") for v in value)
        )
    if key == "img_size":
        return type(value) is int and 32 <= value <= 4096
    if key == "crop_pct":
        return _is_number(value) and 0.1 <= value <= 1
    return value in {"interpolation": ["bilinear", "bicubic"], "crop_mode": ["center", "squash", "border"]}[key]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
