"""Values that fit the number of training images: which keys of a configuration may be `auto`, and what they become.

Which keys these are, and what fits, is a matter of the task: its configuration's class says both, see `AutoKeys`. This
file has the mechanism, and the numbers for classification. The study of experiments/small_sets/ measures them;
docs/finetune.md has the result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, PrivateAttr, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler  # pydantic itself has it from 2.8 on

__all__ = ["AUTO", "AUTO_KEYS", "AutoKeys", "fitted", "is_auto", "value_at", "with_values"]

AUTO = "auto"

MIN_STEPS = 400  # optimizer steps of a run, however few the images are
MIN_EPOCHS = 30  # and how often each image is seen at least
# The rate of a run of so few steps with batches of 32. That of a longer one falls with the square root of its steps;
# that of other batches follows the square root of their images, as suits Adam.
FEW_STEPS_LR, LR_BATCH = 2e-3, 32
LEAST_LR = 1e-4  # likewise
WARMUP = 0.1  # of the run
EVALUATIONS = 30  # of a run
SMALL = 2000  # images; of fewer, crops are larger, and there are neither RandAugment nor erasing

# of a classifier's configuration
AUTO_KEYS = (
    "augment.scale",
    "augment.auto_augment",
    "augment.re_prob",
    "optim.base_lr",
    "schedule.epochs",
    "schedule.warmup_epochs",
    "train.eval_every",
)


def fitted(images: int, batch: int, epochs: int | None = None, base_batch: int = LR_BATCH) -> dict[str, Any]:
    """Returns what fits a classifier's training set, for each of `AUTO_KEYS`.

    Args:
        images: that are trained on.
        batch: images per optimizer step, over all devices and accumulation steps.
        epochs: if they are given; other values then fit to a run of so many.
        base_batch: `optim.base_batch_size`.
    """
    steps = max(1, images // batch)  # of an epoch
    epochs = epochs or max(MIN_EPOCHS, math.ceil(MIN_STEPS / steps))
    rate = max(LEAST_LR, FEW_STEPS_LR * math.sqrt(min(1.0, MIN_STEPS / (epochs * steps))))
    base_lr = rate * math.sqrt(batch / LR_BATCH) * base_batch / batch  # which is scaled by the batch, not by its root
    is_small = images < SMALL
    return {
        "augment.scale": [0.5, 1.0] if is_small else [0.25, 1.0],
        "augment.auto_augment": None if is_small else "rand-m9-mstd0.5-inc1",
        "augment.re_prob": 0.0 if is_small else 0.25,
        "optim.base_lr": float(f"{base_lr:.2g}"),
        "schedule.epochs": epochs,
        "schedule.warmup_epochs": min(math.ceil(WARMUP * epochs), epochs - 1),
        "train.eval_every": max(1, epochs // EVALUATIONS),
    }


def is_auto(value: Any) -> bool:
    """Returns whether a value is `auto`; any may stand there, such as an array, which compares to an array."""
    return isinstance(value, str) and value == AUTO


def value_at(plain: Mapping[str, Any], key: str) -> Any:
    """Returns the value of a dotted key in a configuration as plain types, None where there is none."""
    section, _, name = key.partition(".")
    inner = plain.get(section)
    return inner.get(name) if isinstance(inner, Mapping) else None


def with_values(plain: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration as plain types with other values of some dotted keys."""
    changed = copy.deepcopy(dict(plain))
    for key, value in values.items():
        section, _, name = key.partition(".")
        changed[section][name] = value
    return changed


class AutoKeys(BaseModel):
    """A configuration in which keys may be `auto` until the number of training images is known.

    Such a key has its default for as long; `auto` says that this means nothing.

    Attributes:
        auto_keys: dotted keys that may be it.
    """

    auto_keys: ClassVar[tuple[str, ...]] = ()
    _auto: frozenset[str] = PrivateAttr(frozenset())

    @model_validator(mode="wrap")
    @classmethod
    def _take_auto(cls, raw: Any, handler: ModelWrapValidatorHandler[AutoKeys]) -> AutoKeys:
        keys = [key for key in cls.auto_keys if isinstance(raw, Mapping) and is_auto(value_at(raw, key))]
        if not keys:
            return handler(raw)
        config = handler(_without(raw, keys))
        config._auto = frozenset(keys)
        return config

    @property
    def auto(self) -> tuple[str, ...]:
        """The dotted keys that are still `auto`."""
        return tuple(key for key in self.auto_keys if key in self._auto)

    def fitting_values(self, images: int, batch: int) -> dict[str, Any]:
        """Returns what fits a training set, for each of `auto_keys`.

        Args:
            images: that are trained on.
            batch: images per optimizer step, over all devices and accumulation steps.
        """
        return {}


def _without(raw: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Returns a configuration as plain types without some dotted keys, whose sections it has."""
    sections = {key.partition(".")[0] for key in keys}
    kept = {
        section: {name: value for name, value in raw[section].items() if f"{section}.{name}" not in keys}
        for section in sections
    }
    return {**raw, **kept}
