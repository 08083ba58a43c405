from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import datasets
import numpy as np
import pytest
from PIL import Image

from conv2former.config import Config, check_config
from conv2former.engine import logging, trainer
from conv2former.engine import pictures as curves
from conv2former.engine.evaluate import evaluate
from conv2former.tasks import pictures
from conv2former.tasks.classification.evaluation import Score, Views


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A parquet data set of 3 classes, 44 training and 7 validation images: stripes of three directions in noise."""
    root = tmp_path_factory.mktemp("small_data")
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    waves = np.sin(np.arange(32) * 1.3)
    patterns = [waves[:, None] + np.zeros((1, 32)), waves[None, :] + np.zeros((32, 1)), waves[:, None] * waves[None, :]]
    for split, count in (("train", 44), ("validation", 7)):
        labels = [i % 3 for i in range(count)]
        pixels = [patterns[label] * 70 + 128 + rng.normal(0, 25, (32, 32)) for label in labels]
        images = [Image.fromarray(p.clip(0, 255).astype(np.uint8)) for p in pixels]
        datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
            root / f"{split}.parquet"
        )
    return root


class Killed(Exception):
    pass


@contextlib.contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """Ends the training in it after so many steps, counted from where it starts, as a kill does: nothing is saved."""
    real, done = trainer.train_step, []

    def dying_step(*args):
        if len(done) == steps:
            raise Killed
        done.append(args)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "train_step", dying_step)
        yield


def configure(raw: dict, **changes) -> Config:
    """Checks a copy of `raw` with changes such as `optim__base_lr=1e-3`."""
    raw = copy.deepcopy(raw)
    for key, value in changes.items():
        section, name = key.split("__")
        raw.setdefault(section, {})[name] = value
    return check_config(raw, "test")


# not that of the `tiny` fixture: a file's variant is told by its shape
SHAPE = {"dims": [8, 16, 24, 40], "depths": [1, 1, 2, 1], "kernel_size": 7}


@pytest.fixture
def with_pictures():
    """For tests that want a run to draw its pictures."""


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    """Spares the other tests a third of the time of a run as small as theirs."""
    if "with_pictures" not in request.fixturenames:
        for module, name in ((pictures, "batch_figure"), (curves, "curves_figure"), (pictures, "confusion_figure")):
            monkeypatch.setattr(module, name, lambda *_: "a figure")
        monkeypatch.setattr(logging.RunLog, "picture", lambda log, name, *_: log.folder / f"{name}.png")


@pytest.fixture
def raw_config(small_data) -> dict:
    """Everything that draws random numbers or keeps state is on."""
    return {
        "model": {
            "variant": {"name": "conv2former_test", "ls_init_value": 0.5, **SHAPE},
            "drop_path_rate": 0.2,
            "drop_rate": 0.1,
        },
        "data": {"source": "hf", "root": str(small_data), "img_size": 32, "workers": 0},
        "schedule": {"epochs": 3, "warmup_epochs": 1, "cooldown_epochs": 1},
        "train": {"batch_size": 4, "accum_steps": 2, "eval_batch_size": 5},
        "optim": {"base_lr": 1e-3, "base_batch_size": 8, "clip_grad": 5.0, "layer_decay": 0.9},
        "ema": {"decay": 0.9},
        "log": {"every_steps": 2, "tensorboard": False},
    }


def evaluate_views(model, loader, world, autocast, scores, **options):
    return evaluate(model, loader, world, autocast, Views(scores, world.device), **options)


def evaluate_classifier(model, loader, world, autocast, **options):
    results = evaluate_views(model, loader, world, autocast, [Score(world.device)], **options)
    return results and results[0]
