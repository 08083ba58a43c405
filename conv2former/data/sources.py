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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .. import _private
from ..config.schema import DataConfig
from ..errors import DataError, UserError, closest, counted, shorten
from .classes import match_classes
from .digits import write_digits
from .holdout import Division, divide
from .images import IMAGE_ENDINGS, UnreadableImage, files_below, naming, open_rgb, to_rgb
from .streams import StreamSource
from .tables import TABLE_ENDINGS, Row, TableImages, read_class_list, read_table
from .tars import TarImages, find_tars, index_tars

__all__ = ["DataSource", "is_bare", "open_split", "open_train_and_val", "open_val"]

VAL_NAMES = ("validation", "val", "valid", "test")
SPLIT_NAMES = ("train", "training", *VAL_NAMES)


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
        sha256: of a held-out part, which images it has: see `holdout.fingerprint`; elsewhere empty.
    """

    images: _Images
    class_names: list[str]
    name: str
    note: str = ""
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.images)


Source = DataSource | StreamSource


class _NoValidationSplit(DataError):
    """No split is called like a validation split; `existing` are those that there are."""

    def __init__(self, text: str, existing: Sequence[str]) -> None:
        super().__init__(text)
        self.existing = list(existing)


def open_train_and_val(config: DataConfig) -> tuple[Source, Source]:
    """Opens both splits. The class list is the training split's, and the validation split is read by it.

    Where there is no validation split and `config.holdout` is set, the training split is divided; see holdout.py.

    Raises:
        DataError: a split is missing or empty, or the classes are not what the configuration or the other split says.
    """
    root = Path(config.root)
    is_folder = config.source == "folder" and config.train_split != "."
    if is_folder and not config.holdout and is_bare(root) and not (root / config.train_split).is_dir():
        raise DataError(
            f"{root} has class folders and no split '{config.train_split}'; data.holdout=0.2 holds a fifth of each "
            "class out for validation and trains on the others"
        )
    train = open_split(config, _train_split(config))
    if config.num_classes not in (None, len(train.class_names)):
        raise DataError(
            f"{config.class_names or train.name} has {counted(len(train.class_names), 'class', 'classes')}, "
            f"data.num_classes says {config.num_classes}: "
            f"{shorten(train.class_names, 10)}"
        )
    try:
        if config.source == "folder" and _train_split(config) != ".":
            _check_same_folders(config)
        val = open_split(config, config.val_split, train.class_names)
    except _NoValidationSplit as e:
        if not config.holdout:
            hint = "" if config.streaming else "; data.holdout=0.2 holds a fifth of the training images out instead"
            raise DataError(f"{e}{hint}") from None
        _check_undivided(config, e)
        division = _divide(config, train)
        assert isinstance(train, DataSource)
        rest = replace(train, images=division.train, name=f"{train.name}, not held out")
        return rest, _held_out(config, train, division)
    both = sorted(_files_of(train) & _files_of(val))
    if both and config.val_split != config.train_split:
        what = "tar" if config.source == "wds" else "image"
        raise DataError(f"{train.name} and {val.name} have {counted(len(both), what)} in common: {shorten(both, 5)}")
    return train, val


def open_val(config: DataConfig, class_names: list[str] | None) -> Source:
    """Opens the validation split, its labels as indices into `class_names`; None takes the split's own list.

    Where there is none and `config.holdout` is set, it is what training with this configuration holds out.

    Raises:
        DataError: the split is missing or empty, has a class that is not in `class_names`, or other images than those
            of `config.holdout_sha256` would be held out.
    """
    try:
        return open_split(config, config.val_split, class_names)
    except _NoValidationSplit as e:
        if not config.holdout and config.source == "csv" and not e.existing:  # a table of one split
            return open_split(config, ".", class_names)
        if not config.holdout:
            raise
        _check_undivided(config, e)
    train = open_split(config, _train_split(config), class_names)
    return _held_out(config, train, _divide(config, train))


def _train_split(config: DataConfig) -> str:
    """Returns the name of the training split: of class folders without splits, which are to be divided, '.'."""
    root = Path(config.root)
    by_itself = config.source == "folder" and config.holdout and config.val_split is None
    if by_itself and config.train_split == DataConfig().train_split and is_bare(root):
        _check_class_folders(root)
        return "."
    return config.train_split


def _check_class_folders(root: Path) -> None:
    """Raises a DataError if a class folder could be a misspelt split: by its name, and because it has folders."""
    for name in _folders_in(root):
        if closest(name, SPLIT_NAMES) and _folders_in(root / name):
            raise DataError(
                f"{root / name}: a class, or a misspelt split{closest(name, SPLIT_NAMES)}? It has folders itself; "
                "rename it, or set data.train_split=. if it is a class"
            )


def _check_undivided(config: DataConfig, error: _NoValidationSplit) -> None:
    """Raises a DataError if there is more than the training split: it may be a validation split, misspelt."""
    train = _train_split(config)
    root, others = Path(config.root), [name for name in error.existing if name != train]
    if config.source == "folder":
        files = (os.scandir(root / name) for name in others)
        kinds = [any(f.is_dir() or f.name.lower().endswith(IMAGE_ENDINGS) for f in found) for found in files]
        others = [] if train == "." else [name for name, is_split in zip(others, kinds, strict=True) if is_split]
    elif config.source == "wds":
        tars = find_tars(root)
        others = [name for name in others if not set(tars[name]) <= set(tars.get(train, []))]
    if others:
        there = f"; to train on '{train}' alone, give data.root={root / train}" if config.source == "folder" else ""
        raise DataError(
            f"{error}: if one of them is, name it (data.val_split); nothing is held out (data.holdout) where there is "
            f"more than '{train}'{there}"
        )


def _divide(config: DataConfig, train: Source) -> Division:
    """Divides a training split.

    Raises:
        DataError: it is a stream, or not the one of which `config.holdout_sha256` is.
    """
    assert config.holdout
    if isinstance(train, StreamSource):
        raise DataError(
            f"{train.name}: of a stream nothing can be held out (data.holdout); store the data, or name a validation "
            "split (data.val_split)"
        )
    root = config.root
    division = divide(train.images, train.class_names, train.name, root, config.holdout, config.holdout_seed)
    if config.holdout_sha256 not in (None, division.sha256):
        raise DataError(
            f"{train.name}: the images have changed: other ones than in the run would be held out. What was held out "
            "is listed in split.csv in the run folder (data.source=csv data.csv=RUN/split.csv); data.holdout=null "
            "looks for a validation split"
        )
    return division


def _held_out(config: DataConfig, train: Source, division: Division) -> DataSource:
    return DataSource(division.val, train.class_names, f"{train.name}, held out", division.note, sha256=division.sha256)


def _files_of(source: Source) -> set[str]:
    """Returns the files of tars and tables, of which one could be in two splits."""
    images = source.images if isinstance(source, DataSource) else None
    if isinstance(images, TarImages):
        return {str(tar) for tar in images.tars}
    if isinstance(images, TableImages):
        return {os.path.normpath(images.name(i)) for i in range(len(images))}
    return set()


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
    if class_names is None and config.class_names is not None:
        class_names = read_class_list(Path(config.class_names))
    if config.source in ("folder", "csv", "wds"):
        root = Path(config.root)
        try:
            if not root.is_dir():
                raise DataError(f"{root}: {'a file, not a' if root.exists() else 'no such'} folder (data.root)")
            openers = {"folder": _open_folder, "csv": _open_table, "wds": _open_tars}
            return openers[config.source](config, split, class_names)
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


def _choose_split(wanted: str | None, existing: Sequence[str], where: object, hint: str = "") -> str:
    if wanted is None:
        found = [name for name in VAL_NAMES if name in existing]
        if not found:
            text = f"{where} has no validation split: none of {', '.join(VAL_NAMES)} in {shorten(existing) or 'it'}"
            raise _NoValidationSplit(text, existing)
        return found[0]
    if wanted not in existing:
        raise DataError(
            f"{where} has no split '{wanted}'{closest(wanted, existing)}: it has {shorten(existing) or 'none'}{hint}"
        )
    return wanted


def _match(config: DataConfig, found: Sequence[str], class_names: Sequence[str], where: object) -> list[int]:
    """Finds the classes of a data set in a list, as `match_classes`; a list of the user's also names 0, 1, 2, ..."""
    if config.class_names is not None and not set(found) <= set(class_names) and all(map(_is_index, found)):
        beyond = [name for name in found if int(name) >= len(class_names)]
        if beyond:
            raise DataError(
                f"{where} has class {shorten(beyond, 10)}, and the class list {len(class_names)} names, for 0 to "
                f"{len(class_names) - 1} (data.class_names)"
            )
        return [int(name) for name in found]
    try:
        return match_classes(found, class_names, where)
    except DataError as e:
        raise (DataError(f"{e} ({config.class_names})") if config.class_names else e) from None


def _is_index(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10


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
    hint = f"; expected {root}/train/CLASS/IMAGE and {root}/val/CLASS/IMAGE, or {root}/CLASS/IMAGE with data.holdout"
    folder = root if split == "." else root / _choose_split(split, _folders_in(root), root, hint)
    found = _folders_in(folder)
    if not found:
        raise DataError(f"{folder} has no class folders; expected {folder}/CLASS/IMAGE")
    names = class_names or found
    index = dict(zip(found, _match(config, found, names, folder), strict=True))
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


# ----------------------------------------------------------------------------------------------------------- tables


def _open_table(config: DataConfig, split: str | None, class_names: list[str] | None) -> DataSource:
    path, rows = _rows_of(config, split)
    rows = _with_slashes(rows, config.root)
    _check_files(config, path, rows)
    line_of: dict[str, int] = {}
    for row in rows:
        line_of.setdefault(row.label, row.line)
    found = sorted(line_of, key=lambda label: (int(label), label)) if all(map(_is_index, line_of)) else sorted(line_of)
    names = class_names or found
    unknown = [label for label in line_of if label not in names]
    where = f"{path}, line {line_of[unknown[0]]}" if unknown else path
    index = dict(zip(found, _match(config, found, names, where), strict=True))
    labels = np.array([index[row.label] for row in rows], dtype=np.int64)
    paths = [os.path.normpath(row.image) for row in rows]
    images = TableImages(str(Path(config.root)), paths, labels, config.value_range)
    is_part = rows[0].split is not None
    return DataSource(images, names, f"{path} ({rows[0].split})" if is_part else str(path))


def _with_slashes(rows: Sequence[Row], root: str) -> list[Row]:
    """Returns rows whose paths have slashes where Windows' separators lead to no file."""
    return [
        replace(row, image=row.image.replace("\\", "/"))
        if "\\" in row.image and not os.path.isfile(os.path.join(root, row.image))
        else row
        for row in rows
    ]


def _rows_of(config: DataConfig, split: str | None) -> tuple[Path, list[Row]]:
    """Returns the table that has a split, and the split's rows."""
    root = Path(config.root)
    if config.csv is None:
        tables = {file.stem: file for file in sorted(root.iterdir()) if file.suffix.lower() in TABLE_ENDINGS}
        if not tables:
            raise DataError(f"{root} has no tables; expected {root}/train.csv, or another file as data.csv")
        path = tables[_choose_split(split, list(tables), root)]
        return path, read_table(path, config.image_key, config.label_key, config.split_key)
    path = Path(config.csv)
    if not path.is_file() and (root / path).is_file():
        raise DataError(f"{path}: no such file (data.csv); it is not relative to data.root: give {root / path}")
    rows = read_table(path, config.image_key, config.label_key, config.split_key)
    if rows[0].split is None:  # it is one split
        text = f"column '{config.split_key}' (data.split_key), so the table is one split"
        if split is None:
            raise _NoValidationSplit(f"{path} has no validation split: no {text}", [])
        if split not in (".", DataConfig().train_split):
            raise DataError(f"{path} has no split '{split}': no {text}")
        return path, rows
    splits = dict.fromkeys(row.split for row in rows)
    chosen = _choose_split(split, [str(name) for name in splits], path)
    return path, [row for row in rows if row.split == chosen]


def _check_files(config: DataConfig, path: Path, rows: Sequence[Row]) -> None:
    """Raises a DataError if a file that a table names is not there."""
    missing = [row for row in rows if not os.path.isfile(os.path.join(config.root, row.image))]
    if missing:
        first = missing[0]
        some = f"{len(missing):,} of {len(rows):,} are missing; " if len(missing) > 1 else ""
        raise DataError(
            f"{path}, line {first.line}: no such file: {os.path.join(config.root, first.image)}; {some}paths are "
            "relative to data.root"
        )


# ------------------------------------------------------------------------------------------------- WebDataset tars


def _open_tars(config: DataConfig, split: str | None, class_names: list[str] | None) -> DataSource:
    root = Path(config.root)
    tars = find_tars(root)
    # Numbers of shards are no splits, unless one is asked for.
    split = _choose_split(split, [word for word in sorted(tars) if word == split or not word.isdigit()], root)
    name = f"{root} ({split})"
    images, labels = index_tars(tars[split], config.label_key, config.value_range)
    found = [str(label) for label in labels]
    listed = _listed_classes(root) if config.class_names is None else []
    for i, label in enumerate(labels):
        if listed and isinstance(label, int):
            if not 0 <= label < len(listed):
                where = images.name(int((images.labels == i).argmax()))
                raise DataError(f"{where}: class {label} of the {len(listed)} in {root}'s list of class names")
            found[i] = listed[label]
    names = class_names or listed or found
    return DataSource(images.relabel(_match(config, found, names, name)), names, name)


def _listed_classes(root: Path) -> list[str]:
    """Returns the class names that a file beside the tars lists, one a line, or an empty list if there is none."""
    files = (root / "classnames.txt", root / "classes.txt")
    return next((read_class_list(file) for file in files if file.is_file()), [])


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
            dataset = _private.features_of_stream(dataset)
    _check_columns(dataset.features, config, name)
    if not config.streaming and len(dataset) == 0:
        raise DataError(f"{name} is empty")
    count = len(class_names) if config.class_names and class_names else config.num_classes

    def unique(key: str) -> Iterable[Any]:
        return _stream_labels(dataset.features[key], key, count, name) if config.streaming else dataset.unique(key)

    found = _hf_labels(dataset.features, config.label_key, name, unique, config.streaming)
    names = class_names or list(found.values())
    is_listed = isinstance(dataset.features[config.label_key], datasets.ClassLabel)
    if config.class_names and is_listed and len(found) != len(names):
        raise DataError(f"{config.class_names} has {len(names)} names, the data has {len(found)} classes: {name}")
    relabel = dict(zip(found, _match(config, list(found.values()), names, name), strict=True))
    is_image = isinstance(dataset.features[config.image_key], datasets.Image)
    dataset = dataset.with_format(None).select_columns([config.image_key, config.label_key])
    if is_image:
        # An image that `datasets` cannot decode must be an error of its own, not one of the row.
        dataset = dataset.cast_column(config.image_key, datasets.Image(decode=False))
    read = _HfReader(config.image_key, config.label_key, relabel, config.value_range)
    if config.streaming:
        num_images = config.epoch_images if split == config.train_split else 0
        return StreamSource(dataset, read, names, name, num_images or 0, config.shuffle_images)
    return DataSource(_HfImages(dataset, read, name), names, name)


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
