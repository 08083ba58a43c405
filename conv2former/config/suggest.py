"""Which key is meant by a word that is none: `lr`, `--data-root`, `epochs`."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from pydantic import BaseModel

from .base import BaseConfig
from .schema import Config

__all__ = ["suggest_key"]

NEAR = 0.8  # of two words, where 1 is the same

# What other training scripts call it, where that is not the last word of our key.
NAMES_ELSEWHERE = {
    "amp": "train.precision",
    "aa": "augment.auto_augment",
    "arch": "model.name",
    "batch": "train.batch_size",
    "bs": "train.batch_size",
    "data": "data.root",
    "data_dir": "data.root",
    "data_path": "data.root",
    "data_set": "data.source",
    "dataset": "data.source",
    "decay_milestones": "schedule.milestones",
    "drop_path": "model.drop_path_rate",
    "dropout": "model.drop_rate",
    "ema": "ema.decay",
    "finetune": "model.checkpoint",
    "grad_accum_steps": "train.accum_steps",
    "gradient_accumulation_steps": "train.accum_steps",
    "image_size": "data.img_size",
    "initial_checkpoint": "model.checkpoint",
    "input_size": "data.img_size",
    "label_smoothing": "augment.smoothing",
    "learning_rate": "optim.base_lr",
    "lr": "optim.base_lr",
    "lr_scheduler": "schedule.decay",
    "max_epochs": "schedule.epochs",
    "model": "model.name",
    "nb_classes": "data.num_classes",
    "num_epochs": "schedule.epochs",
    "num_workers": "data.workers",
    "optimizer": "optim.opt",
    "pretrained": "model.checkpoint",
    "resolution": "data.img_size",
    "sched": "schedule.decay",
    "scheduler": "schedule.decay",
    "train_dir": "data.root",
    "update_freq": "train.accum_steps",
    "wd": "optim.weight_decay",
    "weights": "model.checkpoint",
}


def suggest_key(word: str, sections: Collection[str] = (), kind: type[BaseConfig] = Config) -> str:
    """Returns the dotted key that a word most likely means, or an empty string.

    Args:
        word: `lr`, `--lr`, `data-root`, `optim.batch_size`.
        sections: in which the key may be; empty for all.
        kind: the class of the configuration.
    """
    words: dict[str, str] = {}  # each way to write a key -> the key
    for section, field in kind.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel) and (not sections or section in sections):
            for key in model.model_fields:
                words[f"{section}_{key}"] = f"{section}.{key}"
                words.setdefault(key, f"{section}.{key}")
    words |= {other: key for other, key in NAMES_ELSEWHERE.items() if key in words.values()}
    plain = word.lstrip("-").lower().replace("-", "_").replace(".", "_")
    near = [plain] if plain in words else difflib.get_close_matches(plain[:100], words, 1, NEAR)
    if not near and "." in word:
        return suggest_key(word.rpartition(".")[2], sections, kind)  # the right key in a wrong section
    return words[near[0]] if near else ""
