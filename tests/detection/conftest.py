"""A drawn data set: discs, squares and triangles on noise, each of its own colour, as every format writes them."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pycocotools.mask
import pytest
from PIL import Image

from conv2former.tasks.detection.check import check_source
from conv2former.tasks.detection.config import DetectionConfig
from conv2former.tasks.detection.sources import open_train_and_val

SHAPE = {"dims": [8, 16, 24, 40], "depths": [1, 1, 2, 1], "kernel_size": 7}
NAMES = ["disc", "square", "triangle"]
COLOURS = np.array([[230, 60, 60], [60, 220, 60], [70, 70, 240]])
NUMBERS = (2, 7, 30)  # of the classes in COCO's file
NEGATIVE = 3  # the image of each split that has no objects


@dataclass(frozen=True)
class Drawn:
    """A thing in an image: its class, and its polygon, whose outermost coordinates are whole numbers."""

    label: int
    polygon: np.ndarray

    @property
    def box(self) -> list[float]:
        """Left, top, right, bottom."""
        return [*self.polygon.min(0).tolist(), *self.polygon.max(0).tolist()]

    @property
    def coco_box(self) -> list[float]:
        left, top, right, bottom = self.box
        return [left, top, right - left, bottom - top]


def polygon_of(label: int, left: int, top: int, side: int) -> np.ndarray:
    """Returns the outline of a thing, (points, 2)."""
    corners = {
        1: [(0, 0), (1, 0), (1, 1), (0, 1)],
        2: [(0.5, 0), (1, 1), (0, 1)],
        0: [(0.5 + 0.5 * np.cos(t), 0.5 + 0.5 * np.sin(t)) for t in np.arange(24) * np.pi / 12],
    }[label]
    return np.array([left, top]) + side * np.array(corners).round(6)


def draw(seed: int, size: tuple[int, int], count: int) -> tuple[Image.Image, list[Drawn]]:
    """Returns an image of a width and height, and the things in it, which do not overlap."""
    rng = np.random.default_rng(seed)
    width, height = size
    pixels, things = 128 + rng.normal(0, 10, (height, width, 3)), list[Drawn]()
    while len(things) < count:
        side = int(rng.choice([12, 16, 20]))
        left, top = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        label = int(rng.integers(3))
        thing = Drawn(label, polygon_of(label, left, top, side))
        boxes = [other.box for other in things]
        if all(left >= box[2] or box[0] >= left + side or top >= box[3] or box[1] >= top + side for box in boxes):
            things.append(thing)
            runs = pycocotools.mask.frPyObjects([things[-1].polygon.reshape(-1).tolist()], height, width)
            pixels[pycocotools.mask.decode(runs[0]) > 0] = COLOURS[label]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), things


Scene = tuple[str, Image.Image, list[Drawn]]  # name, image and things


def scenes(split: str) -> list[Scene]:
    """Returns the images of a split; 12 train, 6 validate."""
    count, seed = (12, 0) if split == "train" else (6, 100)
    found = []
    for i in range(count):
        size = (64, 64) if i % 3 else (80, 56)
        found.append((f"{i:02}.png", *draw(seed + i, size, 0 if i == NEGATIVE else 1 + i % 3)))
    return found


def save_images(folder: Path, split: str, drawn: list[Scene] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image, _ in drawn or scenes(split):
        image.save(folder / name)


def coco_content(split: str, masks: bool = True, drawn: list[Scene] | None = None) -> dict[str, Any]:
    """Returns what COCO's file of a split holds."""
    images, annotations = [], []
    for number, (name, image, things) in enumerate(drawn or scenes(split), 1):
        images.append({"id": 10 * number, "file_name": name, "width": image.width, "height": image.height})
        for thing in things:
            entry = {"id": len(annotations) + 1, "image_id": 10 * number, "category_id": NUMBERS[thing.label]}
            entry |= {"bbox": thing.coco_box, "area": thing.coco_box[2] * thing.coco_box[3], "iscrowd": 0}
            if masks:
                entry["segmentation"] = [thing.polygon.reshape(-1).tolist()]
            annotations.append(entry)
    categories = [{"id": number, "name": name} for number, name in zip(NUMBERS, NAMES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path, masks: bool = True, drawn: dict[str, list[Scene]] | None = None) -> Path:
    for split in ("train", "val"):
        own = drawn[split] if drawn else None
        save_images(root / split, split, own)
        (root / f"{split}.json").write_text(json.dumps(coco_content(split, masks, own)))
    return root


def write_yolo(root: Path, masks: bool = True) -> Path:
    for split in ("train", "val"):
        save_images(root / "images" / split, split)
        (root / "labels" / split).mkdir(parents=True)
        for name, image, things in scenes(split):
            lines = []
            for thing in things:
                sides = np.array([image.width, image.height])
                left, top, right, bottom = (np.array(thing.box).reshape(2, 2) / sides).reshape(-1).tolist()
                numbers = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
                if masks:
                    numbers = (thing.polygon / sides).reshape(-1).tolist()
                lines.append(" ".join(map(str, [thing.label, *numbers])))
            if things:
                (root / "labels" / split / name).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    names = "".join(f"  {index}: {name}\n" for index, name in enumerate(NAMES))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return root


def voc_text(image: Image.Image, things: list[Drawn]) -> str:
    objects = ""
    for thing in things:
        left, top, right, bottom = (int(value) for value in thing.box)
        corners = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        objects += f"<object><name>{NAMES[thing.label]}</name><bndbox>{corners}</bndbox></object>"
    return f"<annotation><size><width>{image.width}</width><height>{image.height}</height></size>{objects}</annotation>"


def write_voc(root: Path) -> Path:
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "Annotations").mkdir()
    (root / "JPEGImages").mkdir()
    for split in ("train", "val"):
        found = scenes(split)
        for name, image, things in found:
            stem = f"{split}_{name.removesuffix('.png')}"
            image.save(root / "JPEGImages" / f"{stem}.png")
            (root / "Annotations" / f"{stem}.xml").write_text(voc_text(image, things))
        listed = [f"{split}_{name.removesuffix('.png')}" for name, *_ in found]
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(listed) + "\n")
    return root


def write_hf(root: Path, masks: bool = True) -> Path:
    root.mkdir(parents=True)
    for split, stored in (("train", "train"), ("val", "validation")):
        found = scenes(split)
        objects = [
            {
                "bbox": [thing.coco_box for thing in things],
                "category": [thing.label for thing in things],
                **({"segmentation": [[thing.polygon.reshape(-1).tolist()] for thing in things]} if masks else {}),
            }
            for *_, things in found
        ]
        numbers = datasets.Sequence(datasets.Value("float64"))
        kinds = {"bbox": datasets.Sequence(numbers), "category": datasets.Sequence(datasets.ClassLabel(names=NAMES))}
        if masks:
            kinds["segmentation"] = datasets.Sequence(datasets.Sequence(numbers))
        datasets.Dataset.from_dict(
            {"image": [image for _, image, _ in found], "objects": objects},
            features=datasets.Features({"image": datasets.Image(), "objects": kinds}),
        ).to_parquet(root / f"{stored}.parquet")
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    """The drawn data in COCO's format, with masks."""
    return write_coco(tmp_path / "data")


@pytest.fixture
def raw(folder) -> dict:
    """Everything that draws random numbers or keeps state is on."""
    return {
        "task": "detection",
        "model": {
            "variant": {"name": "conv2former_test", "ls_init_value": 0.5, **SHAPE},
            "drop_path_rate": 0.2,
            "detector": {"name": "faster_rcnn", "channels": 16},
        },
        "data": {"root": str(folder), "short_side": 64, "long_side": 96, "workers": 0},
        "augment": {"short_sides": [48, 64], "crop": 0.5, "vflip": 0.5, "photometric": 0.5},
        "schedule": {"epochs": 2, "warmup_epochs": 0, "cooldown_epochs": 0},
        "train": {"batch_size": 2, "accum_steps": 2},
        "optim": {"base_lr": 3e-3, "base_batch_size": 4, "layer_decay": 0.9},
        "ema": {"decay": 0.5},
        "checkpoint": {"every_steps": 1},
        "log": {"every_steps": 1, "tensorboard": False},
    }


def configured(raw: dict, **changes: Any) -> DetectionConfig:
    """Returns a copy of `raw` as a configuration, with changes such as `data__root=...`."""
    raw = copy.deepcopy(raw)
    for key, value in changes.items():
        section, name = key.split("__")
        raw.setdefault(section, {})[name] = value
    return DetectionConfig.model_validate(raw)


MASKS = {"model__detector": {"name": "mask_rcnn", "channels": 16}}  # for `configured`


def opened(raw, **changes):
    """Opens and checks both splits."""
    train, val = open_train_and_val(configured(raw, **changes))
    return check_source(train, False), check_source(val, False)


def at(raw, root: Path, source: str = "coco") -> dict:
    """Returns a copy of `raw` for data elsewhere."""
    return {**raw, "data": {**raw["data"], "root": str(root), "source": source}}


def changed(folder: Path, change, split: str = "train") -> dict:
    """Rewrites a split's file as a function changes its content."""
    content = coco_content(split)
    content = change(content) or content
    (folder / f"{split}.json").write_text(json.dumps(content))
    return content


def entry(content, index: int = 0) -> dict:
    return content["annotations"][index]


def moved(folder: Path, places: dict[str, str]) -> None:
    for before, after in places.items():
        (folder / after).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / before, folder / after)
