"""How an image becomes the input of a network: what a weight file notes about it, or what is assumed without a note."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD

from .._preprocessing import FIELDS, Preprocessing, is_noted, wrong_note
from ..errors import CheckpointError, counted
from ..variants import list_variants
from ..variants import variant as variant_named

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

    Raises:
        CheckpointError: a field is noted that cannot be used; says which, its value and what is allowed.
    """
    section = recipe.get("data")
    noted: dict[Any, Any] = {}
    for part in (section if isinstance(section, Mapping) else recipe, note):
        if problem := wrong_note(part):
            raise CheckpointError(f"{problem}; correct it in the file")
        noted |= _with_img_size(part)
    found = {key: noted[key] for key in FIELDS if is_noted(noted.get(key))}
    default = Preprocessing().for_channels(channels)
    for key in {"mean", "std"} & found.keys():
        found[key] = _for_channels(key, tuple(found[key]), channels)
    own = replace(default, **found)
    published = variant_named(variant).pretrained if variant in list_variants() else ()
    for tag in published:
        if tag.input_size[1:] == own.size and not {"crop_pct", "crop_mode"} & found.keys():
            return replace(own, crop_pct=tag.crop_pct, crop_mode=tag.crop_mode), list(found)
    return own, list(found)


def _for_channels(key: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Returns one value for each channel: one alone is for all, as in timm; three are for RGB, and grey their mean."""
    if len(values) not in (1, 3, channels):
        numbers = counted(len(values), "number")
        raise CheckpointError(
            f"{key} has {numbers}; expected one for each channel ({channels}); correct it in the file"
        )
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _with_img_size(noted: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns a note, that has passed `wrong_note`, with its `img_size` by timm's (channels, height, width)."""
    size = noted.get("input_size")
    return {**noted, "img_size": list(size[1:])} if is_noted(size) else dict(noted)  # type: ignore[index]
