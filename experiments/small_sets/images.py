"""The images of the study: what there is, and which of it a run is trained on and evaluated on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conv2former.data.tables import write_table
from conv2former.errors import ConfigError, counted
from conv2former.tools.output import replacing

__all__ = ["Pool", "cells", "choose", "digits", "known", "photos", "write_choice"]

Pool = Mapping[str, Mapping[str, list[str]]]  # split, class: paths of images below a folder, sorted

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "val")
MIN_SIDE = 4  # pixels; boxes of less are no cells


def photos(folder: Path) -> Pool:
    """Returns the images in `folder/{train,val}/CLASS/`.

    Raises:
        ConfigError: there are none.
    """
    pool: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for path in sorted((folder / split).glob("*/*")):
            pool[split].setdefault(path.parent.name, []).append(str(path.relative_to(folder)))
        if not pool[split]:
            raise ConfigError(f"{folder / split}: no folders with images; give the folder that has train/CLASS/*.jpg")
    return pool


def known(pool: Pool, classes: Sequence[str]) -> Pool:
    """Returns validation photos of some classes, on which no network here was trained, as two halves."""
    found: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for name in classes:
        paths = pool["val"].get(name, [])
        found["train"][name], found["val"][name] = paths[::2], paths[1::2]
    return found


def digits(folder: Path) -> Pool:
    """Writes scikit-learn's digits as images, once, a third of them for validation, and returns them."""
    from sklearn.datasets import load_digits

    def write(new: Path) -> None:
        found = load_digits()
        for number, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
            path = new / ("val" if number % 3 == 2 else "train") / DIGITS[label] / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(path)

    return _written(folder, write)


def cells(source: Path, folder: Path) -> Pool:
    """Cuts the objects of a COCO data set out, once, and returns them.

    Args:
        source: the data set: `train.json` and `val.json`, whose images are in `train/` and `val/`.
        folder: for the images.

    Raises:
        ConfigError: it is none.
    """

    def write(new: Path) -> None:
        for split in SPLITS:
            _cut(source, split, new / split)

    return _written(folder, write)


def _written(folder: Path, write: Callable[[Path], None]) -> Pool:
    if not folder.exists():
        with replacing(folder) as new:
            write(new)
    return photos(folder)


def _cut(source: Path, split: str, folder: Path) -> None:
    """Writes a square around the box of each object: what lies beyond the edge of the image is left out."""
    content = _read_coco(source / f"{split}.json")
    names = {one["id"]: str(one["name"]) for one in content["categories"]}
    files = {one["id"]: one["file_name"] for one in content["images"]}
    by_image: dict[int, list[Any]] = {}
    for one in content["annotations"]:
        by_image.setdefault(one["image_id"], []).append(one)
    for number, objects in by_image.items():
        with Image.open(source / split / files[number]) as opened:
            image = opened.convert("RGB")
        for one in objects:
            x, y, width, height = one["bbox"]
            if min(width, height) < MIN_SIDE:
                continue
            half = max(width, height) / 2
            left, top = x + width / 2 - half, y + height / 2 - half
            box = [max(0, left), max(0, top), min(image.width, left + 2 * half), min(image.height, top + 2 * half)]
            path = folder / names[one["category_id"]] / f"{number:05d}_{one['id']:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.crop([round(side) for side in box]).save(path)


def _read_coco(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if {"categories", "images", "annotations"} <= content.keys():
            return content
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}; --cells is the folder of a data set in COCO's format") from None
    except (ValueError, AttributeError):
        pass
    raise ConfigError(f"{path}: not a data set in COCO's format, with categories, images and annotations")


def choose(paths: list[str], count: int, *seed: int) -> list[str]:
    """Draws images. A larger number of them holds those of a smaller one."""
    order = np.random.default_rng(seed).permutation(len(paths))
    return [paths[i] for i in order[:count]]


def write_choice(path: Path, pool: Pool, classes: list[str], per_class: int | None, held: int | None, seed: int) -> int:
    """Writes the table of a run's images, and returns how many are trained on.

    Args:
        path: of the table.
        pool: all images.
        classes: that are taken.
        per_class: training images of each; None for all.
        held: validation images of each, the same for every seed; None for all.
        seed: which training images these are.

    Raises:
        ConfigError: there are not so many.
    """
    rows: list[tuple[str, str, str]] = []
    for number, name in enumerate(classes):
        for split, count, place in (("train", per_class, (seed, number)), ("val", held, (10**6, number))):
            there = pool[split].get(name, [])
            if not there or len(there) < (count or 0):
                raise ConfigError(f"{path.name}: {counted(len(there), 'image')} of {name} in {split}, not {count or 1}")
            rows += [(image, name, split) for image in choose(there, count or len(there), *place)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, sorted(rows))
    return sum(split == "train" for *_, split in rows)
