"""Values that follow from a configuration, the number of devices and the size of the data: computed once, here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from .._preprocessing import as_img_size
from ..errors import ConfigError, DataError, counted, raise_mistakes
from .auto import AUTO, value_at, with_values
from .base import BaseConfig
from .schema import Config

__all__ = ["Plan", "fit_auto", "fit_batch", "img_size_at", "is_noted", "make_plan"]

MANY = 10**6  # images of a set that is not small

C = TypeVar("C", bound=BaseConfig)


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Attributes:
        global_batch_size: images per optimizer step, over all devices and accumulation steps.
        lr: peak learning rate for that batch.
        steps_per_epoch: optimizer steps; images that do not fill a global batch wait for another epoch's order, with
            `train.keep_tail` only those that do not fill every device's batch.
        epochs: warm-up and cool-down included.
    """

    global_batch_size: int
    lr: float
    steps_per_epoch: int
    epochs: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.epochs


def make_plan(config: BaseConfig, world_size: int, num_train_images: int) -> Plan:
    """Works out batch, rate and steps.

    Raises:
        DataError: the training set is smaller than one global batch.
    """
    global_batch_size = config.train.batch_size * config.train.accum_steps * world_size
    if num_train_images < global_batch_size:
        passes = counted(config.train.accum_steps, "accumulation step")
        raise DataError(
            f"the training set has {counted(num_train_images, 'image')}, fewer than one global batch of "
            f"{global_batch_size} ({config.train.batch_size} x {passes} x {counted(world_size, 'device')}): "
            f"{_smaller_batch(config, world_size, num_train_images)}"
        )
    per_pass = config.train.batch_size * world_size
    steps = num_train_images // global_batch_size
    if config.train.keep_tail:
        steps = math.ceil(num_train_images // per_pass / config.train.accum_steps)
    return Plan(
        global_batch_size=global_batch_size,
        lr=config.optim.base_lr * global_batch_size / config.optim.base_batch_size,
        steps_per_epoch=steps,
        epochs=config.schedule.epochs + config.schedule.cooldown_epochs,
    )


def _smaller_batch(config: BaseConfig, world_size: int, num_train_images: int) -> str:
    """Returns what to do about a training set that is smaller than a global batch."""
    unit = 2 if config.pairs_images else 1
    if num_train_images >= unit * world_size:
        fewer = ", or train.accum_steps" if config.train.accum_steps > 1 else ""
        return f"lower train.batch_size{fewer}"
    each = "two images, for mixup and cutmix" if unit == 2 else "an image"
    if num_train_images < unit:
        off = ", or turn these off (augment.mixup=0 augment.cutmix=0)" if config.pairs_images else ""
        return f"a step needs {each}; add some{off}"
    most = counted(num_train_images // unit, "process", "processes")
    return f"each process needs {each}, so start fewer processes: {most} at most"


def fit_batch(config: C, world_size: int, num_train_images: int) -> C:
    """Returns the configuration with a batch that the training set fills, where `train.shrink_batch` asks for it.

    Accumulation steps are kept as long as each has an image, with mixup or cutmix a pair, for every device. A set that
    is too small even for one step is left to `make_plan`, which refuses it.
    """
    train = config.train
    if not train.shrink_batch or num_train_images >= train.batch_size * train.accum_steps * world_size:
        return config
    unit = 2 if config.pairs_images else 1
    accum_steps = min(train.accum_steps, max(1, num_train_images // (unit * world_size)))
    batch_size = num_train_images // (world_size * accum_steps) // unit * unit
    if not batch_size:
        return config
    smaller = train.model_copy(update={"batch_size": batch_size, "accum_steps": accum_steps})
    return config.model_copy(update={"train": smaller})


def fit_auto(
    config: C, world_size: int, num_train_images: int | None, noted: Mapping[str, Any] | None = None
) -> tuple[C, list[str]]:
    """Returns the configuration with the values that fit the training set in the place of `auto`, and lines about them.

    Args:
        config: with the batch that it has in the end.
        world_size: devices.
        num_train_images: None if they are not counted: then what fits sets that are not small.
        noted: the configuration of the run that is continued, as plain types, whose values it keeps.

    Raises:
        ConfigError: what results has conflicts, such as more epochs of warm-up than of training, or what is noted is no
            value.
    """
    if not config.auto:
        return config, []
    batch = config.train.batch_size * config.train.accum_steps * world_size
    images = MANY if num_train_images is None else num_train_images
    kept = {key: value_at(noted, key) for key in config.auto if is_noted(noted, key)} if noted else {}
    found = config.fitting_values(images, batch)
    values = {key: found[key] for key in config.auto} | kept
    try:
        settled = type(config).model_validate(with_values(config.to_dict(), {**values, "train.fitted": config.auto}))
    except ValidationError as e:  # of a damaged checkpoint, or of a version with other values
        keys = {".".join(map(str, error["loc"][:2])) for error in e.errors()}
        raise ConfigError(f"{', '.join(sorted(keys))}: no such value, in the run to go on with; give one") from None
    raise_mistakes("the configuration", [text for text in settled.conflicts() if text not in config.conflicts()])
    return settled, [_about_auto(values, batch, num_train_images)]


def is_noted(noted: Mapping[str, Any], key: str) -> bool:
    """Returns whether a run has found the value of a key by itself, where `auto` stood."""
    keys = value_at(noted, "train.fitted")
    return isinstance(keys, (list, tuple)) and key in keys and value_at(noted, key) != AUTO


def _about_auto(values: Mapping[str, Any], batch: int, images: int | None) -> str:
    texts = " ".join(f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in values.items())
    if images is None:
        return f"{AUTO}, of a large training set, as the images were not counted: {texts}"
    steps = counted(images // batch, "step")
    return f"{AUTO}, by {counted(images, 'training image')} and {steps} in an epoch: {texts}"


def img_size_at(config: Config, epoch: int) -> int | tuple[int, int]:
    """Returns the size of the training images in `epoch`, counted from 0: one number for a square, or (height, width).

    With `augment.first_img_size` the shorter side grows linearly over `schedule.epochs`, in steps of 32 pixels, and the
    longer one in proportion, to a multiple of 32; they are `data.img_size` in the last of the epochs and in the
    cool-down.
    """
    first, sides = config.augment.first_img_size, config.data.preprocessing.size
    last = min(sides)
    if first is None or epoch >= config.schedule.epochs - 1:
        return as_img_size(sides)
    short = first + int((last - first) * epoch / (config.schedule.epochs - 1)) // 32 * 32
    if short == last:
        return as_img_size(sides)
    return as_img_size([short if side == last else max(32, round(short * side / last / 32) * 32) for side in sides])
