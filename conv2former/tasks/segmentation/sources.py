"""From a data section to pairs of image and mask: a training and a validation split with one list of classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...data.hf import read_cell, reading
from ...data.places import Places
from ...data.tables import Row, find_tables, read_class_list
from ...errors import DataError, counted
from ..dense.hf import check_columns, find_splits, undecoded
from ..dense.splits import Opened, Splits, check_apart, folder_at, path_below, readable
from .config import SegmentationConfig, SegmentationData
from .labels import CITYSCAPES, Labels
from .layouts import find_pairs, layout_of, splits_in
from .pairs import File, FilePairs, PairImages, PairSource, SomePairs

__all__ = ["class_names_of", "open_split", "open_train_and_val"]


def open_train_and_val(config: SegmentationConfig) -> tuple[PairSource, PairSource]:
    """Opens both splits; their masks are not read yet.

    Raises:
        DataError: a split or a mask is missing, or nothing names the classes.
    """
    with readable():
        train, val = (_source(config, opened) for opened in _find_splits(config).train_and_val())
        cells, others = train.images.cells, val.images.cells
        if isinstance(cells, FilePairs) and isinstance(others, FilePairs):
            check_apart(train.name, cells.photos, val.name, others.photos)
        return train, val


def open_split(config: SegmentationConfig, split: str | None, class_names: list[str] | None = None) -> PairSource:
    """Opens one split; see `Splits.one`.

    Args:
        config: of the data.
        split: its name, or None.
        class_names: of a network, for data where nothing names the classes.

    Raises:
        DataError: it is missing, or one of its masks is.
    """
    with readable():
        return _source(config, _find_splits(config).one(split), class_names)


def _source(config: SegmentationConfig, opened: Opened, class_names: list[str] | None = None) -> PairSource:
    cells, name, note = opened
    if not len(cells):
        raise DataError(f"{name} has no images")
    names, data = class_names_of(config) or class_names, config.data
    if names is None:
        raise DataError(
            f"{data.root}: nothing names the classes; write their names, one a line in the order of the numbers in the "
            f"masks, into {Path(data.root) / 'classes.txt'} or another file (data.class_names), or give their number "
            "(data.num_classes)"
        )
    if config.labels == "index" and data.ignore_index == 255 < len(names):
        raise DataError(
            f"data.ignore_index: 255 is also the number of the class '{names[255]}'; set the number that is ignored, "
            "such as 65535, or null for none"
        )
    images = PairImages(
        cells, Labels(config.labels, len(names), data.ignore_index), data.value_range, data.max_image_pixels
    )
    return PairSource(images, names, name, note)


def class_names_of(config: SegmentationConfig) -> list[str] | None:
    """Returns the list of classes; None where nothing says it.

    Raises:
        DataError: a file of names cannot be read, or has another number of them than `data.num_classes`.
    """
    data, root = config.data, Path(config.data.root)
    where = data.class_names or (root / "classes.txt" if (root / "classes.txt").is_file() else None)
    if where is not None:
        names = read_class_list(Path(where))
    elif config.labels == "cityscapes":
        where, names = "Cityscapes", list(CITYSCAPES)
    elif data.source == "ade20k" and (root / "objectInfo150.txt").is_file():
        where = root / "objectInfo150.txt"
        names = _ade20k_names(where)
    elif data.source == "ade20k":
        names = [f"class {number}" for number in range(1, 151)]
    elif config.labels == "binary":
        where, names = "data.labels binary", ["background", "foreground"]
    elif data.num_classes:
        names = [str(number) for number in range(data.num_classes)]
    else:
        return None
    wanted = 2 if config.labels == "binary" else data.num_classes
    if wanted not in (None, len(names)):
        key = "data.labels binary" if config.labels == "binary" else "data.num_classes"
        raise DataError(f"{where} has {counted(len(names), 'class', 'classes')}, {key} says {wanted}")
    return names


def _ade20k_names(path: Path) -> list[str]:
    """Returns the classes of ADE20K's own table: below a line of columns, the last is a name, synonyms after commas."""
    lines = path.read_text("utf-8", "replace").splitlines()[1:]
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    if not names or "" in names:
        raise DataError(f"{path}: not the table of classes that comes with ADE20K; remove it, or give data.class_names")
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]


def _find_splits(config: SegmentationConfig) -> Splits:
    """Returns the splits, of which none is opened."""
    data = config.data
    if data.source == "hf":
        return _hf_splits(data)
    root = folder_at(data.root)
    if data.source == "csv":
        return _table_splits(data)
    layout = layout_of(data.source, root)

    def open_(name: str) -> Opened:
        pairs, note = find_pairs(layout, name)
        return Opened(pairs, str(layout.images / name), note)

    return Splits(data, splits_in(layout), open_)


# ----------------------------------------------------------------------------------------------------------- tables


def _table_splits(data: SegmentationData) -> Splits:
    try:
        splits = find_tables(cast(Any, data))
    except DataError as e:
        raise _of_masks(e) from None

    def open_(name: str) -> Opened:
        try:
            path, rows = splits.read(name)
        except DataError as e:
            raise _of_masks(e) from None
        photos = [_path_in(data, path, row, row.image, "image") for row in rows]
        masks = [_path_in(data, path, row, row.label, data.mask_key) for row in rows]
        return Opened(FilePairs(photos, masks), f"{path} ({name})")

    return Splits(data, splits.names, open_)


def _of_masks(error: DataError) -> DataError:
    """Returns an error about a table with the key of this task in it."""
    return DataError(*(line.replace("data.label_key", "data.mask_key") for line in error.lines))


def _path_in(data: SegmentationData, table: Path, row: Row, text: str, what: str) -> str:
    """Returns the path of a file that a table names.

    Raises:
        DataError: it is empty, leads out of the folder, or is not there.
    """
    where = f"{table}, line {row.line}"
    if not text:
        raise DataError(f"{where}: the {what} is empty")
    path = path_below(data.root, text, where)
    if not os.path.isfile(path):
        raise DataError(f"{where}: no such file: {path}; paths are relative to data.root")
    return path


# ---------------------------------------------------------------------------------------------------- Hugging Face sets


@dataclass(frozen=True)
class HfPairs:
    """Rows of a data set that `datasets` reads; see `Cells`."""

    dataset: Any
    places: Places
    image_key: str
    mask_key: str
    split: str

    def __len__(self) -> int:
        return len(self.dataset)

    def files(self, index: int) -> tuple[File, File]:
        where = self.name(index)
        with reading(where):
            row = self.dataset[index]
        photo = read_cell(row[self.image_key], where, self.places)
        file, name = read_cell(row[self.mask_key], f"{where} ({self.mask_key})", self.places)
        return photo, (file, name)

    def name(self, index: int) -> str:
        return f"{self.split}, row {index}"

    def stamp(self) -> list[str] | None:
        return None

    def some(self, indices: Sequence[int]) -> SomePairs:
        return SomePairs(self, indices)


def _hf_splits(data: SegmentationData) -> Splits:
    found = find_splits(data)

    def open_(name: str) -> Opened:
        dataset, where = found.loaded[name], f"{data.root} ({name})"
        check_columns(dataset, {"image_key": data.image_key, "mask_key": data.mask_key}, where)
        keys = (data.image_key, data.mask_key)
        dataset = dataset.with_format(None).select_columns(list(keys))
        for key in keys:
            dataset = undecoded(dataset, key, where)
        return Opened(HfPairs(dataset, found.places, *keys, where), where)

    return Splits(data, list(found.loaded), open_)
