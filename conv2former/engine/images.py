"""How a run's images become the network's input: what the user says, or else what the starting weights are used to."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import TypeVar

from .._preprocessing import CHANNELS, Preprocessing, channels_text
from ..config import BaseConfig
from ..errors import CheckpointError, raise_mistakes
from ..tasks.network import describe_start
from ..tasks.others import Start

__all__ = ["fill_images", "settle_images"]

C = TypeVar("C", bound=BaseConfig)

GIVEN, PUBLISHED, DEFAULT = "from the configuration", "as published", "by default"


def settle_images(config: C) -> tuple[C, list[str]]:
    """Returns the configuration with the size, channels and normalisation that it leaves open, and lines about them.

    They are the starting weights' where those note them, and the defaults otherwise. The lines say what is taken, where
    each comes from, and what of the starting weights is changed for it.

    Raises:
        CheckpointError: the starting weights cannot be read, or take images of other channels.
        ConfigError: what results has conflicts, such as three means for one channel.
    """
    info = describe_start(config)
    channels = config.model.in_chans or (info.in_chans if info else 3)
    if info and (info.in_chans not in CHANNELS or (info.in_chans, channels) == (1, 3)):
        wanted = f"for {channels} (model.in_chans)" if config.model.in_chans else "for 3, RGB, or 1, grey"
        raise CheckpointError(
            f"{info.name} is for images of {channels_text(info.in_chans)}; training needs one {wanted}"
        )
    config.data.given_for(channels)
    noted = info.preprocessing if info else Preprocessing()
    settled = fill_images(config, noted, channels)
    raise_mistakes("the configuration", [text for text in settled.conflicts() if text not in config.conflicts()])
    return settled, _lines(config, settled, info)


def fill_images(config: C, noted: Preprocessing | None = None, channels: int = 3) -> C:
    """Returns the configuration with what it leaves open of the images as in `noted`, or the defaults.

    It is the task's business what that is, see `BaseConfig.image_fields`.
    """
    images = replace((noted or Preprocessing()).for_channels(channels), **config.data.given)
    data = config.data.model_copy(update={key: getattr(images, key) for key in config.image_fields})
    return config.model_copy(update={"data": data, "model": config.model.model_copy(update={"in_chans": channels})})


def _lines(config: BaseConfig, settled: BaseConfig, info: Start | None) -> list[str]:
    """Returns lines that say how images become the input, and where each of it comes from."""
    images = settled.data.preprocessing
    default = Preprocessing().for_channels(images.channels)

    def origin(*keys: str) -> str:
        if any(getattr(config.data, key) is not None for key in keys):
            return GIVEN
        if info and {*info.preprocessing_noted} & {*keys}:
            return info.origin
        return DEFAULT if all(getattr(images, key) == getattr(default, key) for key in keys) else PUBLISHED

    own_channels = GIVEN if config.model.in_chans else info.origin if info and info.notes_channels else DEFAULT
    parts = [(origin(*_fields_of(key)), text) for key, text in settled.image_texts().items()]
    parts.insert(1, (own_channels, channels_text(images.channels)))
    groups = [(name, ", ".join(text for _, text in group)) for name, group in groupby(parts, lambda part: part[0])]
    lines = ["images: " + "; ".join(f"{text} {name}" for name, text in groups)]
    if info is None:
        return lines
    if info.in_chans != images.channels:
        lines.append(
            f"the first convolution of {info.name} takes {channels_text(info.in_chans)}: it is summed over them"
        )
    noted = info.preprocessing.for_channels(images.channels)
    is_noted = {"mean", "std"} <= {*info.preprocessing_noted}
    if is_noted and (tuple(noted.mean), tuple(noted.std)) != (tuple(images.mean), tuple(images.std)):
        mean, std = (",".join(f"{value:g}" for value in values) for values in (noted.mean, noted.std))
        lines.append(
            f"{info.name} was trained with another normalisation of the images than this run's; to take it: "
            f"data.mean=[{mean}] data.std=[{std}], or leave both out"
        )
    return lines


def _fields_of(text: str) -> tuple[str, ...]:
    return ("crop_pct", "crop_mode") if text == "crop_pct" else (text,)
