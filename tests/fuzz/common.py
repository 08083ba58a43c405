"""What all targets share: the small data set and the run on it that they damage copies of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from conv2former import load_model
from conv2former.engine import train

Call = Callable[[], "str | None"]
SHAPE = {"name": "conv2former_fuzzed", "dims": [8, 16, 24, 40], "depths": [1, 1, 2, 1], "kernel_size": 7}


def settings_for(root: Path, **schedule: Any) -> dict[str, Any]:
    return {
        "model": {"variant": SHAPE},
        "data": {"source": "folder", "root": str(root), "img_size": 32, "workers": 0},
        "train": {"batch_size": 6, "channels_last": False},
        "schedule": {"epochs": 1, "warmup_epochs": 0, "cooldown_epochs": 0, **schedule},
        "checkpoint": {"every_steps": 1, "keep": 3},
        "log": {"tensorboard": False, "every_steps": 1},
        "ema": {"decay": 0.9},
    }


def prepare(base: Path) -> None:
    """Writes a small data set and a run on it."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 2)):
        for name in ("a", "b"):
            (base / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(base / "photos" / split / name / f"{i}.png")
    train(settings_for(base / "photos"), base / "run")
    save_file(load_model(newest(base))[0].state_dict(), base / "model.safetensors")


def newest(base: Path) -> Path:
    return sorted((base / "run" / "checkpoints").glob("step_*.pt"))[-1]


# ------------------------------------------------------------------------------------------------------------ weights
