"""From a data section to images with objects: a training and a validation split with one list of classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ...data.tables import read_class_list
from ...errors import DataError, counted, shorten
from ..dense.splits import Opened, Splits, check_apart, folder_at, readable
from .config import DetectionConfig
from .hf import hf_splits
from .images import DetectionImages, DetectionSource
from .layouts import coco_splits
from .records import Records
from .voc import voc_splits
from .yolo import DESCRIPTIONS, yolo_splits

__all__ = ["open_split", "open_train_and_val"]


def open_train_and_val(config: DetectionConfig) -> tuple[DetectionSource, DetectionSource]:
    """Opens both splits; their images are not read yet.

    Raises:
        DataError: a split is missing, an annotation is wrong, or the splits have other classes.
    """
    with readable():
        listed = _class_list(config)
        opened = _find_splits(config).train_and_val()
        names = listed or _class_names(*opened)
        if listed is None:
            _check_same(*opened)
        train, val = (_source(config, split, names) for split in opened)
        check_apart(train.name, train.images.records.paths, val.name, val.images.records.paths)
        return train, val


def open_split(config: DetectionConfig, split: str | None, class_names: list[str] | None = None) -> DetectionSource:
    """Opens one split; see `Splits.one`.

    Args:
        config: of the data.
        split: its name, or None.
        class_names: of a network; None for those of the data.

    Raises:
        DataError: it is missing, an annotation is wrong, or it has objects of another class.
    """
    with readable():
        names = class_names or _class_list(config)
        opened = _find_splits(config).one(split)
        return _source(config, opened, names or _class_names(opened))


def _class_list(config: DetectionConfig) -> list[str] | None:
    return None if config.data.class_names is None else read_class_list(Path(config.data.class_names))


def _class_names(first: Opened, *others: Opened) -> list[str]:
    """Returns the classes of a split, without those that are but headings in this and all others."""
    headings = first.content.headings.intersection(*(split.content.headings for split in others))
    return [name for name in first.content.class_names if name not in headings]


def _find_splits(config: DetectionConfig) -> Splits:
    """Returns the splits, of which none is opened."""
    root = Path(config.data.root)
    is_description = config.data.source == "yolo" and root.suffix.lower() in DESCRIPTIONS and root.is_file()
    if config.data.source != "hf" and not is_description:
        folder_at(config.data.root)
    find = {"coco": coco_splits, "yolo": yolo_splits, "voc": voc_splits, "hf": hf_splits}[config.data.source]
    return find(config.data, config.has_masks)


def _check_same(train: Opened, val: Opened) -> None:
    """Raises a DataError if the splits have other classes; where none lists them, validation may have fewer."""
    there, here = train.content.class_names, val.content.class_names
    more = [name for name in here if name not in there]
    fewer = [name for name in there if name not in here] if val.content.are_all_classes else []
    if not more and not fewer:
        return
    parts = [
        f"{name} alone has {shorten(which, 10)}" for name, which in ((val.name, more), (train.name, fewer)) if which
    ]
    raise DataError(
        f"{train.name} and {val.name} have other classes: {', and '.join(parts)}; make them the same, or list them in "
        "a file (data.class_names), and those without objects may then be missing"
    )


def _source(config: DetectionConfig, opened: Opened, class_names: list[str]) -> DetectionSource:
    """Returns a split whose labels are places in a list of classes.

    Raises:
        DataError: it has no images, or objects of a class that is not in the list.
    """
    records, name, note = opened
    if not len(records):
        raise DataError(f"{name} has no images")
    images = DetectionImages(
        _relabelled(records, class_names, name),
        config.has_masks,
        config.data.value_range,
        config.data.max_image_pixels,
    )
    return DetectionSource(images, class_names, name, note, config.has_masks)


def _relabelled(records: Records, class_names: list[str], where: str) -> Records:
    if records.class_names == class_names:
        return records
    place = {name: index for index, name in enumerate(class_names)}
    table = np.array([place.get(name, -1) for name in records.class_names], dtype=np.int64)
    counts = np.zeros(len(table), dtype=np.int64)
    for record in records.records:
        counts += np.bincount(record.labels, minlength=len(table))
    unknown = [records.class_names[index] for index in np.flatnonzero((table < 0) & (counts > 0)).tolist()]
    if unknown:
        raise DataError(
            f"{where} has objects of {counted(len(unknown), 'class', 'classes')} that the list of classes "
            f"(data.class_names, or the network's) has not: {shorten(unknown, 10)}; it has {shorten(class_names, 10)}"
        )
    new = [record._replace(labels=table[record.labels]) for record in records.records]
    return replace(records, records=new, class_names=class_names)
