"""From a data section to pairs of image and mask: a training and a validation split with one list of classes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...data.hf import find_hf, read_cell, reading
from ...data.places import Places, leads_out
from ...data.split import choose_split
from ...data.tables import Row, find_tables, read_class_list
from ...errors import DataError, closest, counted, shorten
from .config import SegmentationConfig, SegmentationData
from .labels import CITYSCAPES, Labels
from .layouts import find_pairs, layout_of, splits_in
from .pairs import Cells, File, FilePairs, PairImages, PairSource, hold_out

__all__ = ["class_names_of", "open_split", "open_train_and_val"]

Opened = tuple[Cells, str, str]  # pairs, what to call their split, and a note


def open_train_and_val(config: SegmentationConfig) -> tuple[PairSource, PairSource]:
    """Opens both splits; their masks are not read yet.

    Raises:
        DataError: a split or a mask is missing, or nothing names the classes.
    """
    with _readable():
        names, open_ = _find_splits(config)
        train, val = _train_split(config.data, names), choose_split(config.data.val_split, names, config.data.root)
        if val.name is None:
            return _divided(config, names, train, open_, val.why_none)
        if val.name == train:
            raise DataError(f"data.val_split is the training split, '{train}'; name another")
        found = _source(config, *open_(train)), _source(config, *open_(val.name))
        _check_apart(*found)
        return found


def _train_split(data: SegmentationData, names: list[str]) -> str:
    if data.train_split is None and names == ["."]:
        return "."
    wanted = data.train_split or ("training" if "training" in names and "train" not in names else "train")
    return str(choose_split(wanted, names, data.root).name)


def _divided(
    config: SegmentationConfig,
    names: list[str],
    train: str,
    open_: Callable[[str], Opened],
    why: str,
    class_names: list[str] | None = None,
) -> tuple[PairSource, PairSource]:
    """Divides the training split, as there is no other.

    Raises:
        DataError: nothing is to be held out, there are other splits, or too few images.
    """
    data = config.data
    if data.holdout is None:
        raise DataError(f"{why}; name one (data.val_split), or data.holdout=0.2 holds a fifth of the images out")
    if others := [name for name in names if name != train]:
        raise DataError(
            f"{why}, and nothing is held out (data.holdout) where there is more than '{train}': if one of "
            f"{shorten(others, 5)} is to validate, name it (data.val_split)"
        )
    cells, name, note = open_(train)
    if len(cells) < 2:
        raise DataError(f"{name} has {counted(len(cells), 'image')}, of which none can be held out (data.holdout)")
    kept, held = hold_out(cells, data.root, data.holdout, data.holdout_seed)
    return (
        _source(config, kept, f"{name}, not held out", note, class_names),
        _source(config, held, f"{name}, held out", "", class_names),
    )


def _check_apart(train: PairSource, val: PairSource) -> None:
    """Raises a DataError if the splits have images in common."""
    cells, others = train.images.cells, val.images.cells
    if isinstance(cells, FilePairs) and isinstance(others, FilePairs):
        both = sorted({*map(os.path.realpath, cells.photos)} & {*map(os.path.realpath, others.photos)})
        if both:
            raise DataError(
                f"{train.name} and {val.name} have {counted(len(both), 'image')} in common: {shorten(both, 3)}; remove "
                "them from one"
            )


def open_split(config: SegmentationConfig, split: str | None, class_names: list[str] | None = None) -> PairSource:
    """Opens one split: that of a name, or for None the first that is called like one for validation, or held out.

    Args:
        config: of the data.
        split: its name; None for `data.val_split`, and all of a data set that has no splits if none is held out.
        class_names: of a network, for data where nothing names the classes.

    Raises:
        DataError: it is missing, or one of its masks is.
    """
    with _readable():
        names, open_ = _find_splits(config)
        wanted = split or config.data.val_split
        if wanted is None and names == ["."] and config.data.holdout is None:
            wanted = "."
        chosen = choose_split(wanted, names, config.data.root)
        if chosen.name is None:
            train = _train_split(config.data, names)
            return _divided(config, names, train, open_, chosen.why_none, class_names)[1]
        return _source(config, *open_(chosen.name), class_names)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise DataError(f"{e.filename or 'data.root'}: cannot be read ({e.strerror or e})") from None


def _source(
    config: SegmentationConfig, cells: Cells, name: str, note: str, class_names: list[str] | None = None
) -> PairSource:
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


def _find_splits(config: SegmentationConfig) -> tuple[list[str], Callable[[str], Opened]]:
    """Returns the names of the splits, and what opens one."""
    data = config.data
    if data.source == "hf":
        return _hf_splits(data)
    root = Path(data.root)
    if not root.is_dir():
        raise DataError(f"{root}: {'a file, not a' if root.exists() else 'no such'} folder (data.root)")
    if data.source == "csv":
        return _table_splits(data)
    layout = layout_of(data.source, root)

    def open_(name: str) -> Opened:
        pairs, note = find_pairs(layout, name)
        return pairs, str(layout.images / name), note

    return splits_in(layout), open_


# ----------------------------------------------------------------------------------------------------------- tables


def _table_splits(data: SegmentationData) -> tuple[list[str], Callable[[str], Opened]]:
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
        return FilePairs(photos, masks), f"{path} ({name})", ""

    return splits.names, open_


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
    path = os.path.join(data.root, text)
    if "\\" in text and not os.path.isfile(path):  # as Windows separates folders
        text = text.replace("\\", "/")
        path = os.path.join(data.root, text)
    if leads_out(text):
        raise DataError(f"{where}: {text} leads out of data.root by '..'; make data.root a folder above all files")
    if not os.path.isfile(path):
        raise DataError(f"{where}: no such file: {path}; paths are relative to data.root")
    return os.path.normpath(path)


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


def _hf_splits(data: SegmentationData) -> tuple[list[str], Callable[[str], Opened]]:
    import datasets

    found = find_hf(cast(Any, data))
    if found.is_whole:
        raise DataError(f"{data.root} is one split of a data set, by save_to_disk; save both splits together")

    def open_(name: str) -> Opened:
        dataset, where = found.loaded[name], f"{data.root} ({name})"
        keys = (data.image_key, data.mask_key)
        for which, key in zip(("image_key", "mask_key"), keys, strict=True):
            if key not in dataset.features:
                raise DataError(
                    f"{where} has no column '{key}' (data.{which}){closest(key, dataset.features)}: it has "
                    f"{shorten(dataset.features)}"
                )
        dataset = dataset.with_format(None).select_columns(list(keys))
        for key in keys:
            if isinstance(dataset.features[key], datasets.Image):
                dataset = dataset.cast_column(key, datasets.Image(decode=False))
            elif getattr(dataset.features[key], "dtype", "") not in ("binary", "large_binary"):
                kind = getattr(dataset.features[key], "dtype", type(dataset.features[key]).__name__)
                raise DataError(f"{where}: the column '{key}' holds {kind}, not images")
        return HfPairs(dataset, found.places, *keys, where), where, ""

    return list(found.loaded), open_
