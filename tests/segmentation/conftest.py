"""A drawn data set: squares and discs on noise, whose classes can be told by their brightness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conv2former.config import check_config
from conv2former.tasks.registry import task_named
from conv2former.tasks.segmentation.config import SegmentationConfig

SHAPE = {"dims": [8, 16, 24, 40], "depths": [1, 1, 2, 1], "kernel_size": 7}
NAMES = ["ground", "square", "disc"]
IGNORED = 255
assert task_named("segmentation").config is SegmentationConfig  # known to `check_config` once tasks are imported


def draw(seed: int, size: tuple[int, int] = (40, 48)) -> tuple[Image.Image, np.ndarray]:
    """Returns an image and its mask, (H, W) uint8; the upper row of the mask is ignored."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(size)
    mask = np.zeros(size, np.uint8)
    top, left = (int(rng.integers(2, side - 14)) for side in size)
    mask[top : top + 12, left : left + 12] = 1
    y, x = (int(rng.integers(8, side - 8)) for side in size)
    mask[(rows - y) ** 2 + (columns - x) ** 2 < 36] = 2
    pixels = 40 + 80.0 * mask[..., None] + rng.normal(0, 8, (*size, 3))
    mask[0] = IGNORED
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def write_pair(root: Path, split: str, name: str, image: Image.Image, mask: np.ndarray | Image.Image) -> None:
    for folder in ("images", "masks"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    image.save(root / "images" / split / f"{name}.png")
    mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    mask.save(root / "masks" / split / f"{name}.png")


def make_folder(root: Path) -> Path:
    """Writes 12 training and 5 validation images; of one training image all is ignored."""
    for split, count in (("train", 12), ("val", 5)):
        for i in range(count):
            size = (40, 48) if i % 3 else (37, 55)
            image, mask = draw(100 * count + i, size)
            write_pair(
                root, split, f"{i:02}", image, np.full_like(mask, IGNORED) if (split, i) == ("train", 3) else mask
            )
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "data")


@pytest.fixture
def raw(folder) -> dict:
    """Everything that draws random numbers or keeps state is on."""
    return {
        "task": "segmentation",
        "model": {
            "variant": {"name": "conv2former_test", "ls_init_value": 0.5, **SHAPE},
            "drop_path_rate": 0.2,
            "head": {"name": "fpn", "channels": 64, "auxiliary_channels": 8, "dropout": 0.2},
        },
        "data": {"root": str(folder), "img_size": 32, "workers": 0},
        "loss": {"dice": 0.5, "class_weights": "sqrt"},
        "schedule": {"epochs": 2, "warmup_epochs": 0, "cooldown_epochs": 0},
        "train": {"batch_size": 2, "accum_steps": 2},
        "optim": {"base_lr": 3e-3, "base_batch_size": 4, "layer_decay": 0.9},
        "ema": {"decay": 0.5},
        "checkpoint": {"every_steps": 1},
        "log": {"every_steps": 1, "tensorboard": False},
    }


@pytest.fixture
def config(raw) -> SegmentationConfig:
    found = check_config(raw, "test")
    assert isinstance(found, SegmentationConfig)
    return found
