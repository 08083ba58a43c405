"""One way from a data section to images: a training and a validation set with one class list.

A source is a list of (PIL image, class index) pairs. Where a name could mean two things (a misspelt split, a class that
only one split has) it is an error here, because the libraries underneath go on with something else.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..config.schema import DataConfig
from ..errors import DataError, UserError, closest, counted, shorten
from .classes import match_classes
from .digits import write_digits
from .images import IMAGE_ENDINGS, UnreadableImage, files_below, naming, open_rgb, to_rgb
from .streams import StreamSource
from .tars import TarImages, find_tars, index_tars

__all__ = ["DataSource", "is_bare", "open_split", "open_train_and_val", "open_val"]

VAL_NAMES = ("validation", "val", "valid", "test")


class _Images(Protocol):
    """Images that can be reached in any order. `labels` and `name` read no image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...

    @property
    def labels(self) -> np.ndarray: ...  # class indices, (images,), integers

    def name(self, index: int) -> str: ...  # a path, or what the image is called in messages


@dataclass(frozen=True)
class DataSource:
    """One split.

    Attributes:
        images: `images[i]` is the i-th image, RGB, and its class index; `len(images)` is their number; `images.labels`
            are all class indices and `images.name(i)` tells where an image lies, both without reading one.
        class_names: names in index order.
        name: what to call the split in messages.
        note: what its owner should know, such as files that were left out.
    """

    images: _Images
    class_names: list[str]
    name: str
    note: str = ""

    def __len__(self) -> int:
        return len(self.images)


Source = DataSource | StreamSource


def open_train_and_val(config: DataConfig) -> tuple[Source, Source]:
    """Opens both splits. The class list is the training split's, and the validation split is read by it.

    Raises:
        DataError: a split is missing or empty, or the classes are not what the configuration or the other split says.
    """
    train = open_split(config, config.train_split)
    if config.num_classes not in (None, len(train.class_names)):
        raise DataError(
            f"{train.name} has {counted(len(train.class_names), 'class', 'classes')}, data.num_classes says "
            f"{config.num_classes}: "
            f"{shorten(train.class_names, 10)}"
        )
    if config.source == "folder":
        _check_same_folders(config)
    val = open_val(config, train.class_names)
    both = sorted(_tars_of(train) & _tars_of(val))
    if both and config.val_split != config.train_split:
        raise DataError(f"{train.name} and {val.name} have {counted(len(both), 'tar')} in common: {shorten(both, 5)}")
    return train, val


def _tars_of(source: Source) -> set[str]:
    is_tars = isinstance(source, DataSource) and isinstance(source.images, TarImages)
    return {str(tar) for tar in source.images.tars} if is_tars else set()  # type: ignore[union-attr]


def open_val(config: DataConfig, class_names: list[str] | None) -> Source:
    """Opens the validation split, its labels as indices into `class_names`; None takes the split's own list.

    Raises:
        DataError: the split is missing or empty, or has a class that is not in `class_names`.
    """
    return open_split(config, config.val_split, class_names)


def open_split(config: DataConfig, split: str | None, class_names: list[str] | None = None) -> Source:
    """Opens one split.

    Args:
        config: where the data is.
        split: its name; None for the first of validation, val, valid and test that exists; of image folders '.' for
            the root itself, with a folder per class.
        class_names: the class list to use; None to find it in this split.

    Raises:
        DataError: the data set or the split is missing or empty, or has a class that is not in `class_names`.
    """
    if config.source in ("folder", "wds"):
        root = Path(config.root)
        try:
            if not root.is_dir():
                raise DataError(f"{root}: {'a file, not a' if root.exists() else 'no such'} folder (data.root)")
            return (_open_folder if config.source == "folder" else _open_tars)(config, split, class_names)
        except OSError as e:
            raise DataError(f"{e.filename or root}: cannot be read ({e.strerror})") from None
    files = None
    if config.source == "digits":
        files = write_digits(Path(config.root))
        config = config.model_copy(update={"image_key": "image", "label_key": "label"})
    source = _open_hf(config, split, class_names, files)
    if config.source == "digits" and class_names is None and source.class_names != list("0123456789"):
        raise DataError(f"{config.root} is not the digits data set: its classes are {shorten(source.class_names, 10)}")
    return source


def _choose_split(wanted: str | None, existing: Sequence[str], where: object) -> str:
    if wanted is None:
        found = [name for name in VAL_NAMES if name in existing]
        if not found:
            raise DataError(
                f"{where} has no validation split: none of {', '.join(VAL_NAMES)} in {shorten(existing) or 'it'}"
            )
        return found[0]
    if wanted not in existing:
        raise DataError(
            f"{where} has no split '{wanted}'{closest(wanted, existing)}: it has {shorten(existing) or 'none'}"
        )
    return wanted


# ---------------------------------------------------------------------------------------------------- image folders


@dataclass(frozen=True)
class _FolderImages:
    samples: list[tuple[str, int]]
    value_range: tuple[float, float] | None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return open_rgb(path, path, self.value_range), label

    @property
    def labels(self) -> np.ndarray:
        return np.fromiter((label for _, label in self.samples), np.int64, len(self.samples))

    def name(self, index: int) -> str:
        return self.samples[index][0]


def _folders_in(folder: Path) -> list[str]:
    """Returns the names of the folders in a folder, sorted, without hidden ones such as .ipynb_checkpoints."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:  # it could not be stored or shown
            raise DataError(f"{folder}: the name of the folder {name!r} is not UTF-8; rename it") from None
    return names


def is_bare(root: Path) -> bool:
    """Whether a folder holds class folders of images rather than splits.

    Folders that could be splits (train, val, ...) or that hold no image themselves, as a misspelt split, say that it
    does not.
    """
    folders = _folders_in(root) if root.is_dir() else []
    if not folders or {"train", *VAL_NAMES} & set(folders):
        return False
    return any(name.lower().endswith(IMAGE_ENDINGS) for folder in folders for name in os.listdir(root / folder))


def _open_folder(config: DataConfig, split: str | None, class_names: list[str] | None) -> DataSource:
    root = Path(config.root)
    folder = root if split == "." else root / _choose_split(split, _folders_in(root), root)
    found = _folders_in(folder)
    if not found:
        raise DataError(f"{folder} has no class folders; expected {folder}/CLASS/IMAGE")
    names = class_names or found
    index = dict(zip(found, match_classes(found, names, folder), strict=True))
    samples, empty = [], []
    other: Counter[str] = Counter()
    for name in found:
        files = list(files_below(folder / name))  # images of nested folders belong to the one right below the split
        images = [(path, index[name]) for path in files if path.lower().endswith(IMAGE_ENDINGS)]
        samples += images
        other.update(os.path.splitext(p)[1] or "nothing" for p in files if not p.lower().endswith(IMAGE_ENDINGS))
        if not images:
            empty.append(name)
    endings = shorten((f"{ending} ({count:,})" for ending, count in other.most_common()), 10)
    if empty:
        raise DataError(
            f"{folder} has {counted(len(empty), 'class folder')} without images: {shorten(empty, 10)}; "
            f"images end in {', '.join(IMAGE_ENDINGS)}{f', other files here in {endings}' if endings else ''}"
        )
    left_out = f"left out of {folder}: {counted(other.total(), 'file')} ending in {endings}" if other else ""
    return DataSource(_FolderImages(samples, config.value_range), names, str(folder), left_out)


def _check_same_folders(config: DataConfig) -> None:
    """Raises a DataError if a class folder is in one split only: it is a mistake, or a score over other classes."""
    root = Path(config.root)
    train, val = (
        root / _choose_split(split, _folders_in(root), root) for split in (config.train_split, config.val_split)
    )
    classes, val_classes = set(_folders_in(train)), set(_folders_in(val))
    only = ((train, sorted(classes - val_classes)), (val, sorted(val_classes - classes)))
    differences = [f"{len(names)} only in {folder}: {shorten(names, 10)}" for folder, names in only if names]
    if differences and val_classes:
        raise DataError(f"the splits must have the same class folders, but there are {'; '.join(differences)}")


# ------------------------------------------------------------------------------------------------- WebDataset tars


def _open_tars(config: DataConfig, split: str | None, class_names: list[str] | None) -> DataSource:
    root = Path(config.root)
    tars = find_tars(root)
    # Numbers of shards are no splits, unless one is asked for.
    split = _choose_split(split, [word for word in sorted(tars) if word == split or not word.isdigit()], root)
    name = f"{root} ({split})"
    images, labels = index_tars(tars[split], config.label_key, config.value_range)
    found, listed = [str(label) for label in labels], _listed_classes(root)
    for i, label in enumerate(labels):
        if listed and isinstance(label, int):
            if not 0 <= label < len(listed):
                where = images.name(int((images.labels == i).argmax()))
                raise DataError(f"{where}: class {label} of the {len(listed)} in {root}'s list of class names")
            found[i] = listed[label]
    names = class_names or listed or found
    return DataSource(images.relabel(match_classes(found, names, name)), names, name)


def _listed_classes(root: Path) -> list[str]:
    """Returns the class names that a file beside the tars lists, one a line, or an empty list if there is none."""
    for file in (root / "classnames.txt", root / "classes.txt"):
        if file.is_file():
            try:
                names = [line.strip() for line in file.read_text("utf-8-sig").rstrip().split("\n")]
            except UnicodeDecodeError as e:
                raise DataError(f"{file}: not a text file ({e})") from None
            if "" in names or len(set(names)) < len(names):
                raise DataError(f"{file}: a line is empty or a name is there twice; each line must name one class")
            return names
    return []


# ------------------------------------------------------------------------------------------- Hugging Face `datasets`


@dataclass(frozen=True)
class _HfReader:
    """Makes an image and its class index of a row whose image is not decoded."""

    image_key: str
    label_key: str
    relabel: dict[Any, int]  # from the labels as they are in the data
    value_range: tuple[float, float] | None

    def __call__(self, row: dict[str, Any], where: str) -> tuple[Image.Image, int]:
        label = row[self.label_key]
        if label not in self.relabel:
            raise DataError(f"{where}: label {label!r} is none of the {len(self.relabel)} classes")
        return _hf_image(row[self.image_key], where, self.value_range), self.relabel[label]


@dataclass(frozen=True)
class _HfImages:
    dataset: Any
    read: _HfReader
    source_name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        where = self.name(index)
        with _reading(where):
            row = self.dataset[index]
        return self.read(row, where)

    @property
    def labels(self) -> np.ndarray:
        with _reading(self.source_name):
            column = self.dataset[self.read.label_key]
        return np.fromiter((self.read.relabel.get(label, -1) for label in column), np.int64, len(self))

    def name(self, index: int) -> str:
        return f"{self.source_name}, row {index}"


def _hf_image(value: Any, where: str, value_range: tuple[float, float] | None) -> Image.Image:
    """Reads a value of an image column that is not decoded: bytes, or a dictionary of `bytes` and `path`.

    Raises:
        UnreadableImage: there is none, or it is not readable; named by its row, or by its path if it is a file.
    """
    import datasets

    value = value if isinstance(value, dict) else {"bytes": value}
    content, path = value.get("bytes"), value.get("path")
    if content is None and path is None:
        raise UnreadableImage(f"{where}: no image; remove the row", where)
    if content is not None or "://" not in path:
        return open_rgb(path if content is None else content, path if content is None else where, value_range)
    with naming(f"{where} ({path})"):  # on the hub, or in an archive
        return to_rgb(datasets.Image().decode_example({"bytes": None, "path": path}), value_range)


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turns what `datasets` raises inside for damaged files into a DataError."""
    import datasets
    import pyarrow

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as e:
        reason = str(e).split("\n")[0]
        raise DataError(f"{where}: `datasets` cannot read the data ({reason}); copy or download it again") from None


def _load_hf(root: str, files: dict[str, str] | None, streaming: bool) -> Any:
    """Returns the splits of a `save_to_disk` folder, of a folder of data files, or of a name on the hub."""
    import datasets

    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        datasets.disable_progress_bars()
    path = Path(root)
    try:
        if files:
            return datasets.load_dataset("parquet", data_files=files)
        if (path / "dataset_dict.json").is_file():
            if streaming:
                raise DataError(f"{root} is stored already, by save_to_disk: leave data.streaming out")
            return datasets.load_from_disk(root)
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            raise DataError(f"{root} is one split of a data set, by save_to_disk; give a folder of a DatasetDict's")
        if path.is_dir() or not path.is_absolute():
            return datasets.load_dataset(str(path.resolve()) if path.is_dir() else root, streaming=streaming)
        reason = "a file; give its folder" if path.is_file() else "no such folder"
    except UserError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        reason = str(e).split("\n")[0]
    raise DataError(f"{root}: `datasets` cannot read it as a folder or a hub name (data.root): {reason}")


def _open_hf(
    config: DataConfig, split: str | None, class_names: list[str] | None, files: dict[str, str] | None
) -> Source:
    import datasets

    splits = _load_hf(config.root, files, config.streaming)
    split = _choose_split(split, list(splits), config.root)
    dataset = splits[split]
    name = f"{config.root} ({split})"
    if config.streaming and dataset.features is None:
        with _reading(name):
            dataset = dataset._resolve_features()  # from the first rows
    _check_columns(dataset.features, config, name)
    if not config.streaming and len(dataset) == 0:
        raise DataError(f"{name} is empty")
    unique = (lambda key: _stream_labels(dataset.features[key], config, name)) if config.streaming else dataset.unique
    found = _hf_labels(dataset.features, config.label_key, name, unique, config.streaming)
    names = class_names or list(found.values())
    relabel = dict(zip(found, match_classes(list(found.values()), names, name), strict=True))
    is_image = isinstance(dataset.features[config.image_key], datasets.Image)
    dataset = dataset.with_format(None).select_columns([config.image_key, config.label_key])
    if is_image:
        # An image that `datasets` cannot decode must be an error of its own, not one of the row.
        dataset = dataset.cast_column(config.image_key, datasets.Image(decode=False))
    read = _HfReader(config.image_key, config.label_key, relabel, config.value_range)
    if config.streaming:
        count = config.epoch_images if split == config.train_split else 0
        return StreamSource(dataset, read, names, name, count or 0, config.shuffle_images)
    return DataSource(_HfImages(dataset, read, name), names, name)


def _stream_labels(feature: Any, config: DataConfig, where: str) -> Iterable[int]:
    """Returns the labels of a stream, which cannot be looked through for them."""
    if config.num_classes and str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        return range(config.num_classes)
    raise DataError(
        f"{where}: a stream's classes cannot be counted; the column '{config.label_key}' must be a ClassLabel, or hold "
        "integers from 0 to below data.num_classes"
    )


def _check_columns(features: Any, config: DataConfig, where: str) -> None:
    """Raises a DataError if a column is missing, or the image column holds no images."""
    import datasets

    for which, key in (("image_key", config.image_key), ("label_key", config.label_key)):
        if key not in features:
            raise DataError(
                f"{where} has no column '{key}' (data.{which}){closest(key, features)}: it has {shorten(features)}"
            )
    feature = features[config.image_key]
    kind = getattr(feature, "dtype", type(feature).__name__)
    is_file = isinstance(feature, dict) and "bytes" in feature  # an image that was written without saying so
    if not (isinstance(feature, datasets.Image) or is_file or kind in ("binary", "large_binary")):
        raise DataError(f"{where}: the column '{config.image_key}' (data.image_key) holds {kind}, not images")


def _hf_labels(
    features: Any, key: str, where: str, unique: Callable[[str], Iterable[Any]], is_stream: bool = False
) -> dict[Any, str]:
    """Returns the name of every label: from the column's own list, or from its `unique` values, sorted."""
    import datasets

    feature = features[key]
    is_named = isinstance(feature, datasets.ClassLabel)
    if is_named and is_stream:
        return dict(enumerate(feature.names))
    kind = getattr(feature, "dtype", type(feature).__name__)
    if not str(kind).startswith(("int", "uint", "string", "large_string", "bool")):
        raise DataError(f"{where}: the column '{key}' (data.label_key) holds {kind}, not classes")
    with _reading(where):
        labels = list(unique(key))
    if None in labels or (is_named and -1 in labels):
        raise DataError(f"{where}: the column '{key}' (data.label_key) has rows without a label")
    if is_named:
        return dict(enumerate(feature.names))
    return {label: str(label) for label in sorted(labels)}
