"""Data sets that Hugging Face `datasets` reads, with a column of objects as COCO's sets on the hub have it.

A row's objects are a dictionary of lists, or a list of dictionaries, with a box, a class, and, where the data has them,
`area`, `iscrowd` and `segmentation` as in COCO's files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.classes import in_class_order
from ...data.hf import read_cell, reading
from ...data.places import Places
from ...data.tables import read_class_list
from ...errors import DataError, counted, shorten
from ..dense.hf import check_columns, find_splits, undecoded
from ..dense.splits import Opened, Splits
from .config import DetectionData
from .records import File, Noted, Records, check_box, check_number
from .shapes import read_shape

__all__ = ["hf_splits"]

BOXES = ("bbox", "bboxes", "boxes", "box")  # what sets on the hub call the lists in a row's objects
CLASSES = ("category", "categories", "category_id", "label", "labels", "class")
CROWDS = ("iscrowd", "is_crowd", "crowd")
AREAS, SHAPES = ("area", "areas"), ("segmentation", "segmentations")


def hf_splits(data: DetectionData, keeps_masks: bool) -> Splits:
    """Returns the splits of a data set that `datasets` reads.

    Raises:
        DataError: it cannot be read.
    """
    found = find_splits(data)

    def open_(name: str) -> Opened:
        dataset, where = found.loaded[name], f"{data.root} ({name})"
        check_columns(dataset, {"image_key": data.image_key, "objects_key": data.objects_key}, where)
        dataset = dataset.with_format(None)
        files = HfFiles(
            undecoded(dataset.select_columns([data.image_key]), data.image_key, where),
            found.places,
            data.image_key,
            where,
        )
        sizes = [key for key in ("width", "height") if key in dataset.features]
        columns = dataset.select_columns([data.objects_key, *(sizes if len(sizes) == 2 else [])])
        return Opened(_records(columns, files, data, where, keeps_masks), where)

    return Splits(data, list(found.loaded), open_)


@dataclass(frozen=True)
class HfFiles:
    """The files of images in rows; see `Records.file`."""

    dataset: Any
    places: Places
    image_key: str
    split: str

    def __call__(self, row: int) -> File:
        where = self.name(row)
        with reading(where):
            cell = self.dataset[row][self.image_key]
        return read_cell(cell, where, self.places)

    def name(self, row: int) -> str:
        return f"{self.split}, row {row}"


def _records(dataset: Any, files: HfFiles, data: DetectionData, where: str, keeps_masks: bool) -> Records:
    """Reads the objects of all rows.

    Raises:
        DataError: those of one are wrong.
    """
    listed = _named_classes(dataset.features[data.objects_key])
    rows = [
        (list(_objects(row[data.objects_key], files.name(index))), _size(row, files.name(index)))
        for index, row in enumerate(_rows(dataset, where))
    ]
    labels = {_label(entry, files.name(index)) for index, (entries, _) in enumerate(rows) for entry in entries}
    names, place = _class_names(data, listed, labels, where)
    records = []
    for index, (entries, size) in enumerate(rows):
        noted, name = Noted(keeps_masks), files.name(index)
        for number, entry in enumerate(entries, 1):
            _add(noted, entry, place[_label(entry, name)], data.box_format, f"{name}, object {number}")
        records.append(noted.record(index, name, size))
    return Records(records, names, listed is not None, files)


def _rows(dataset: Any, where: str) -> Iterator[dict[str, Any]]:
    with reading(where):
        yield from dataset


def _named_classes(feature: Any) -> list[str] | None:
    """Returns the names of the classes, where the column's type has them."""
    import datasets

    while not isinstance(feature, dict) and hasattr(feature, "feature"):
        feature = feature.feature
    if isinstance(feature, list):
        feature = feature[0]
    if not isinstance(feature, dict):
        return None
    inner: Any = next((feature[key] for key in CLASSES if key in feature), None)
    while hasattr(inner, "feature"):
        inner = inner.feature
    return list(inner.names) if isinstance(inner, datasets.ClassLabel) else None


def _class_names(
    data: DetectionData, listed: list[str] | None, labels: set[int | str], where: str
) -> tuple[list[str], Mapping[int | str, int]]:
    """Returns the names of the classes, and the class of each label.

    Raises:
        DataError: a label is a number for which there is no name.
    """
    numbers = all(isinstance(label, int) for label in labels)
    if listed is None and data.class_names and numbers:
        listed = read_class_list(Path(data.class_names))
    if listed is not None and numbers:
        beyond = sorted(label for label in labels if not 0 <= int(label) < len(listed))
        if beyond:
            raise DataError(f"{where}: objects of class {shorten(beyond, 5)}, and {counted(len(listed), 'name')}")
        return listed, {index: index for index in range(len(listed))}
    names = in_class_order({str(label) for label in labels})
    return names, {label: names.index(str(label)) for label in labels}


def _objects(value: Any, where: str) -> Iterator[dict[str, Any]]:
    """Goes over the objects of a row, each a dictionary."""
    if value is None:
        return
    if isinstance(value, dict):
        columns = {key: values for key, values in value.items() if isinstance(values, (list, tuple))}
        lengths = {len(values) for values in columns.values()}
        if len(lengths) > 1:
            sizes = ", ".join(f"{len(values)} of {key}" for key, values in columns.items())
            raise DataError(f"{where}: its objects have lists of different lengths: {sizes}")
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
        return
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, dict) for entry in value):
        raise DataError(f"{where}: its objects are no dictionary of lists, or list of dictionaries (data.objects_key)")
    yield from value


def _first(entry: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((entry[key] for key in keys if key in entry), None)


def _label(entry: Mapping[str, Any], where: str) -> int | str:
    label = _first(entry, CLASSES)
    if isinstance(label, str) and label.strip():
        return label.strip()
    if isinstance(label, bool) or not isinstance(label, int):
        raise DataError(
            f"{where}: an object has {shorten(entry, 10)}, and no class that is text or a number; one is expected as "
            f"{', '.join(CLASSES)}"
        )
    return label


def _add(noted: Noted, entry: Mapping[str, Any], label: int, box_format: str, where: str) -> None:
    box, area = _first(entry, BOXES), _first(entry, AREAS)
    if box is None:
        raise DataError(f"{where}: has {shorten(entry, 10)}, and no box; one is expected as {', '.join(BOXES)}")
    left, top, right, bottom = check_box(box, where, box_format == "xyxy")
    area = None if area is None else check_number(area, "its area", where)
    crowd = bool(_first(entry, CROWDS) or 0)
    shape = read_shape(_first(entry, SHAPES), where) if noted.needs_mask(area) else None
    noted.add((left, top, right, bottom), label, crowd, area, shape)


def _size(row: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    sides = [check_number(row.get(key) or 0, key, where) for key in ("width", "height")]
    return (int(sides[0]), int(sides[1])) if all(side > 0 for side in sides) else None
