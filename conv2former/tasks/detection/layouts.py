"""Where COCO's JSON files lie, one for each split, and the folders that their images may be in."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...data.folders import folders_in
from ...data.split import SPLIT_NAMES, VAL_NAMES
from ...errors import DataError, shorten
from ..dense.splits import Opened, Splits
from .coco import read_coco
from .config import DetectionData

__all__ = ["coco_splits"]

YEAR = re.compile(r"^(.+?)_?(?:19|20)\d\d$")
ROBOFLOW = "_annotations.coco.json"
# inside a split's folder, the likeliest first
IN_FOLDERS = (ROBOFLOW, "annotations/instances.json", "annotations.json", "labels.json")


def coco_splits(data: DetectionData, keeps_masks: bool) -> Splits:
    """Returns the splits of a data set with COCO's JSON files.

    Raises:
        DataError: there is no such file, or a split has several.
    """
    root = Path(data.root)
    files = _named(data, root)

    def open_(name: str) -> Opened:
        path = files[name]
        return Opened(read_coco(path, _folders(data, root, name, path), root, keeps_masks), str(path))

    return Splits(data, [*files], open_)


def _named(data: DetectionData, root: Path) -> dict[str, Path]:
    """Returns the JSON file of each split: those that are configured, and those that are found."""
    given = {
        split or name: _at(root, path, key)
        for name, split, path, key in (
            ("train", data.train_split, data.train_annotations, "train_annotations"),
            ("val", data.val_split, data.val_annotations, "val_annotations"),
        )
        if path
    }
    found = _found(root, {*SPLIT_NAMES, *filter(None, (data.train_split, data.val_split))})
    names = dict(given)
    # of another name for the same split, which would be taken before the one that is given
    others = {*(("validation",) if data.val_annotations else ()), *(("training",) if data.train_annotations else ())}
    for name, paths in found.items():
        if name in {*names, *others}:
            continue
        if len(paths) > 1:
            raise DataError(
                f"{root}: both {paths[0].relative_to(root)} and {paths[1].relative_to(root)} could be the split "
                f"'{name}'; give the right one (data.train_annotations, data.val_annotations)"
            )
        names[name] = paths[0]
    is_one = len(names) == 1 and not given and not {*names} & {*SPLIT_NAMES, data.train_split, data.val_split}
    if names and not is_one:
        return names
    alone = sorted({*root.glob("*.json"), *root.glob("annotations/*.json")})
    if len(alone) != 1:
        there = f": it has {shorten([path.relative_to(root) for path in alone], 5)}" if alone else ""
        raise DataError(
            f"{root}: no COCO file for a split, such as train.json, annotations/instances_train.json or "
            f"train/{ROBOFLOW}{there}; give them (data.train_annotations, data.val_annotations)"
        )
    return {".": alone[0]}


def _at(root: Path, path: str, key: str) -> Path:
    if not (root / path).is_file():
        raise DataError(f"{root / path}: no such file (data.{key})")
    return root / path


def _found(root: Path, wanted: set[str]) -> dict[str, list[Path]]:
    """Returns the files that are called like splits, by the splits' names: of one year without it."""
    found: dict[str, list[Path]] = {}
    for path in [*sorted(root.glob("instances_*.json")), *sorted(root.glob("annotations/instances_*.json"))]:
        found.setdefault(path.stem.removeprefix("instances_"), []).append(path)
    for path in [*sorted(root.glob("*.json")), *sorted(root.glob("annotations/*.json"))]:
        if _without_year(path.stem).lower() in wanted or path.stem in wanted:
            found.setdefault(path.stem, []).append(path)
    for folder in folders_in(root):
        places = [root / folder / name for name in IN_FOLDERS if name == ROBOFLOW or {folder, folder.lower()} & wanted]
        there = [place for place in places if place.is_file()]
        if there:
            found.setdefault(folder, []).append(there[0])
    short: dict[str, list[str]] = {}
    for name in found:
        short.setdefault(_without_year(name), []).append(name)
    return {
        (brief if len(names) == 1 and brief not in wanted - {*SPLIT_NAMES, brief} else name): found[name]
        for brief, names in short.items()
        for name in names
    }


def _without_year(name: str) -> str:
    match = YEAR.match(name)
    return match[1] if match else name


def _folders(data: DetectionData, root: Path, split: str, path: Path) -> list[Path]:
    """Returns the folders in which the images of a split may be, the likeliest first."""
    is_train = split == data.train_split if data.train_split else split.lower() in ("train", "training")
    is_val = split == data.val_split if data.val_split else split.lower() in VAL_NAMES
    if images := data.train_images if is_train else data.val_images if is_val else None:
        return [root / images]
    full = path.stem.removeprefix("instances_")  # with its year
    names = [full] if split == "." else list(dict.fromkeys([split, full]))
    inner = [root / os.path.join(*parts) for name in names for parts in ((name,), ("images", name), (name, "images"))]
    around = [place for place in (root, path.parent) for place in (place / "images", place, place / "data")]
    return [*inner, *around]
