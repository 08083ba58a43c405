"""Data sets that Hugging Face `datasets` reads: stored ones here, streams by way of streams.py."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import _private
from ..config.schema import NO_SPLIT, DataConfig
from ..errors import DataError, UserError, closest, counted, first_line, shorten
from .classes import in_class_order
from .files import RealFiles, is_within
from .images import UnreadableImage, naming, open_rgb
from .places import Places, check_card
from .split import (
    Choice,
    DataSource,
    Source,
    UnlabelledSplit,
    check_single_label,
    choose_split,
    is_no_label,
    match_listed,
)
from .streams import StreamSource

__all__ = ["HfSplits", "find_hf", "read_cell", "reading"]

MAX_BYTES = 1 << 30  # of an image in an archive, where a small file may claim any size


@dataclass(frozen=True)
class _HfReader:
    """Makes an image and its class index of a row whose image is not decoded."""

    image_key: str
    label_key: str
    relabel: dict[Any, int]  # from the labels as they are in the data
    value_range: tuple[float, float] | None
    max_pixels: int | None
    places: Places

    def __call__(self, row: dict[str, Any], where: str) -> tuple[Image.Image, int]:
        label = row[self.label_key]
        if label not in self.relabel:
            if is_no_label(label, ()):
                raise UnlabelledSplit(f"{where}: no label ({label!r})")
            classes = counted(len(self.relabel), "class", "classes")
            raise DataError(f"{where}: label {label!r} is none of the {classes}")
        return self._image(row[self.image_key], where), self.relabel[label]

    def _image(self, value: Any, where: str) -> Image.Image:
        """Reads a value of an image column; see `read_cell`."""
        file, name = read_cell(value, where, self.places)
        return open_rgb(file, name, self.value_range, self.max_pixels)


def read_cell(value: Any, where: str, places: Places) -> tuple[str | bytes, str]:
    """Returns the file of a value of an image column that is not decoded, and what to call it.

    Args:
        value: bytes, or a dictionary of `bytes` and `path`.
        where: what to call its row.
        places: where files may lie.

    Returns:
        The path, or the content. It is named by its row, or by its path if it is a file.

    Raises:
        UnreadableImage: there is none, or it cannot be fetched.
        DataError: it is a file in a place that is none of the data's.
    """
    value = value if isinstance(value, dict) else {"bytes": value}
    content, path = value.get("bytes"), value.get("path")
    if content is None and not path:
        raise UnreadableImage(f"{where}: no image; remove the row", where)
    if content is not None:
        return content, where
    places.check(path, where)
    if "://" not in path:
        return path, path
    name = f"{where} ({path})"
    return _fetched(path, name), name


@dataclass(frozen=True)
class _HfImages:
    dataset: Any
    read: _HfReader
    source_name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        where = self.name(index)
        with reading(where):
            row = self.dataset[index]
        return self.read(row, where)

    @property
    def labels(self) -> np.ndarray:
        with reading(self.source_name):
            column = self.dataset[self.read.label_key]
        return np.fromiter((self.read.relabel.get(label, -1) for label in column), np.int64, len(self))

    def name(self, index: int) -> str:
        return f"{self.source_name}, row {index}"


def _fetched(path: str, name: str) -> bytes:
    """Returns the content of a file on the hub, or in an archive.

    Raises:
        UnreadableImage: it cannot be read, or is too large.
    """
    import fsspec  # a dependency of datasets

    with naming(name), fsspec.open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        return content


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns what `datasets` raises inside for damaged files into a DataError."""
    import datasets
    import pyarrow

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as e:
        reason = first_line(e)
        raise DataError(f"{where}: `datasets` cannot read the data ({reason}); copy or download it again") from None


def _load_hf(root: str, files: dict[str, str] | None, streaming: bool, places: Places) -> Any:
    """Returns the splits of a folder of data files, of a name on the hub, or of a `save_to_disk` folder.

    The last may also be of one split, which is then returned.

    Raises:
        DataError: it cannot be read, or names data files elsewhere than in `places`, as a README.md in it may.
    """
    import datasets

    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        datasets.disable_progress_bars()
    path = Path(root)
    is_one_split = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    try:
        if files:
            return datasets.load_dataset("parquet", data_files=files)
        if is_one_split or (path / "dataset_dict.json").is_file():
            if streaming:
                raise DataError(f"{root} is stored already, by save_to_disk: leave data.streaming out")
            stored = datasets.load_from_disk(root)
            for split in stored.values() if isinstance(stored, dict) else [stored]:
                places.check_all((file["filename"] for file in split.cache_files), root)
            return stored
        if path.is_dir() or not path.is_absolute():
            name = str(path.resolve()) if path.is_dir() else root
            check_card(path)
            listed = datasets.load_dataset_builder(name).config.data_files or {}
            places.check_all((str(file) for split in listed.values() for file in split), root)
            return datasets.load_dataset(name, streaming=streaming)
        reason = "a file; give its folder" if path.is_file() else "no such folder"
    except UserError:
        raise
    except Exception as e:  # foreign files make it raise nearly anything, and ImportError of what is not installed
        _check_cache(e)
        reason = first_line(e)
    raise DataError(f"{root}: `datasets` cannot read it as a folder or a hub name (data.root): {reason}")


def _check_cache(error: BaseException) -> None:
    """Raises a DataError if it was the cache that `datasets` could not write, rather than the data."""
    from datasets import config

    caches = [os.path.realpath(folder) for folder in (config.HF_DATASETS_CACHE, config.HF_CACHE_HOME)]
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment] # one of them is there
    if not isinstance(error, OSError):
        return
    file = os.path.realpath(str(error.filename)) if error.filename else ""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # reading the data writes nothing else
    if is_full or any(is_within(file, cache) or (file and is_within(cache, file)) for cache in caches):
        raise DataError(
            f"{file or caches[0]}: `datasets` cannot write its cache there ({error.strerror}); set HF_HOME, or "
            "HF_DATASETS_CACHE alone, to a folder on a disk with room that can be written"
        ) from None


@dataclass(frozen=True)
class HfSplits:
    """The splits of a data set that `datasets` reads; see `Splits`.

    Attributes:
        places: where its files may lie.
        loaded: its splits by name, or, of one that was stored alone, that.
    """

    config: DataConfig
    places: Places
    loaded: Any

    @property
    def is_whole(self) -> bool:
        import datasets

        return isinstance(self.loaded, datasets.Dataset)

    def choose(self, wanted: str | None) -> Choice:
        if not self.is_whole:
            return choose_split(wanted, list(self.loaded), self.config.root)
        text = f"{self.config.root} is one split of a data set, by save_to_disk"
        if wanted in (None, NO_SPLIT):
            return Choice(None, f"{text}, so there is no validation split")
        own = str(self.loaded.split or self.config.train_split)
        if wanted not in (".", own, self.config.train_split):
            raise DataError(f"{text}, '{own}', and not '{wanted}'")
        return Choice(own)

    def others(self, train: str) -> list[str]:
        return [] if self.is_whole else [name for name in self.loaded if name != train]

    def open(self, name: str, class_names: list[str] | None) -> Source:
        dataset = self.loaded if self.is_whole else self.loaded[name]
        return _open_hf(self.config, self.places, dataset, name, class_names)


def find_hf(config: DataConfig, files: dict[str, str] | None = None) -> HfSplits:
    """Finds the splits of a data set that `datasets` reads.

    Args:
        config: where it is.
        files: the parquet file of each split, in place of what `config.root` has.

    Raises:
        DataError: it cannot be read.
    """
    places = Places.of(config)
    return HfSplits(config, places, _load_hf(config.root, files, config.streaming, places))


def _open_hf(config: DataConfig, places: Places, dataset: Any, own: str, class_names: list[str] | None) -> Source:
    import datasets

    name = f"{config.root} ({own})"
    if config.streaming and dataset.features is None:
        with reading(name):
            dataset = _private.features_of_stream(dataset)
    _check_columns(dataset.features, config, name)
    if not config.streaming and len(dataset) == 0:
        raise DataError(f"{name} is empty")
    count = len(class_names) if config.class_names and class_names else config.num_classes

    def unique(key: str) -> Iterable[Any]:
        return _stream_labels(dataset.features[key], key, count, name) if config.streaming else dataset.unique(key)

    found = _hf_labels(dataset.features, config.label_key, name, unique, class_names or (), config.streaming)
    is_of_folders = dataset.builder_name == "imagefolder"  # whose list of classes `datasets` has sorted as text
    names = class_names or (in_class_order(found.values()) if is_of_folders else list(found.values()))
    is_listed = isinstance(dataset.features[config.label_key], datasets.ClassLabel)
    if config.class_names and is_listed and len(found) != len(names):
        listed, there = counted(len(names), "name"), counted(len(found), "class", "classes")
        raise DataError(f"{config.class_names} has {listed}, the data has {there}: {name}")
    if not is_listed:
        for label in map(str, found.values()):
            check_single_label(label, found.values(), class_names or (), name)
    relabel = dict(zip(found, match_listed(config, list(found.values()), names, name), strict=True))
    is_image = isinstance(dataset.features[config.image_key], datasets.Image)
    dataset = dataset.with_format(None).select_columns([config.image_key, config.label_key])
    if is_image:
        # An image that `datasets` cannot decode must be an error of its own, not one of the row.
        dataset = dataset.cast_column(config.image_key, datasets.Image(decode=False))
    read = _HfReader(config.image_key, config.label_key, relabel, config.value_range, config.max_image_pixels, places)
    if config.streaming:
        num_images = config.epoch_images if own == config.train_split else 0
        return StreamSource(dataset, read, names, name, num_images or 0, config.shuffle_images)
    paths = _paths(dataset, config.image_key, places, name) if is_image else []
    return DataSource(_HfImages(dataset, read, name), names, name, files=paths, real_files=_each_once(paths, name))


def _paths(dataset: Any, image_key: str, places: Places, where: str) -> list[str]:
    """Returns the paths of images that are files of their own, as in image folders; none if some are in the data.

    Raises:
        DataError: one is not in `places`.
    """
    chunks = dataset.data.column(image_key).chunks
    if len(dataset) != dataset.data.num_rows or any(chunk.field("bytes").null_count < len(chunk) for chunk in chunks):
        return []
    paths = [path for chunk in chunks for path in chunk.field("path").to_pylist() if path]
    places.check_all(paths, where)
    return [path for path in paths if "://" not in path]  # those in archives are left out


def _each_once(paths: Sequence[str], where: str) -> RealFiles:
    """Returns where the images lie.

    Raises:
        DataError: two are the same by a link.
    """
    real_files, first = RealFiles(), dict[str, str]()
    for path in paths:
        real_files.add(path)
        before = first.setdefault(real_files(path), path)
        if before != path:
            raise DataError(f"{where}: {before} and {path} are the same image by a link; remove the link")
    return real_files


def _stream_labels(feature: Any, key: str, count: int | None, where: str) -> Iterable[int]:
    """Returns the labels of a stream, which cannot be looked through for them."""
    if count and str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        return range(count)
    raise DataError(
        f"{where}: a stream's classes cannot be counted; the column '{key}' must be a ClassLabel, or hold integers "
        "from 0 to below data.num_classes"
    )


def _check_columns(features: Any, config: DataConfig, where: str) -> None:
    """Raises a DataError if a column is missing, or the image column holds no images."""
    import datasets

    for which, key in (("image_key", config.image_key), ("label_key", config.label_key)):
        if key not in features:
            raise (UnlabelledSplit if key == config.label_key else DataError)(
                f"{where} has no column '{key}' (data.{which}){closest(key, features)}: it has {shorten(features)}"
            )
    feature = features[config.image_key]
    kind = getattr(feature, "dtype", type(feature).__name__)
    is_file = isinstance(feature, dict) and "bytes" in feature  # an image that was written without saying so
    if not (isinstance(feature, datasets.Image) or is_file or kind in ("binary", "large_binary")):
        raise DataError(f"{where}: the column '{config.image_key}' (data.image_key) holds {kind}, not images")


def _hf_labels(
    features: Any,
    key: str,
    where: str,
    unique: Callable[[str], Iterable[Any]],
    class_names: Collection[str],
    is_stream: bool = False,
) -> dict[Any, str]:
    """Returns the name of every label: from the column's own list, or from its `unique` values, in class order.

    Raises:
        DataError: the column holds no classes, or its list has no name for one; UnlabelledSplit if a row has no label.
    """
    import datasets

    feature = features[key]
    is_named = isinstance(feature, datasets.ClassLabel)
    if is_named and is_stream:
        return dict(enumerate(feature.names))
    kind = getattr(feature, "dtype", type(feature).__name__)
    if not str(kind).startswith(("int", "uint", "string", "large_string", "bool")):
        raise DataError(f"{where}: the column '{key}' (data.label_key) holds {kind}, not classes")
    with reading(where):
        labels = list(unique(key))
    if any(is_no_label(label, () if is_named else class_names) for label in labels):
        none = "" if None in labels else " (-1)" if -1 in labels else " (blank, or -1)"
        raise UnlabelledSplit(f"{where}: the column '{key}' (data.label_key) has rows without a label{none}")
    if is_named:
        beyond = [label for label in labels if not 0 <= label < len(feature.names)]
        if beyond:
            names = counted(len(feature.names), "name")
            raise DataError(f"{where}: the column '{key}' (data.label_key) has {shorten(beyond, 5)}, and {names}")
        return dict(enumerate(feature.names))
    ordered = in_class_order(labels) if all(isinstance(label, str) for label in labels) else sorted(labels)
    return {label: str(label) for label in ordered}
