"""One way from a data section to images: a training and a validation set with one class list.

A source is a list of (PIL image, class index) pairs. Where a name could mean two things (a misspelt split, a class that
only one split has) it is an error here, because the libraries underneath go on with something else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..config.schema import DataConfig
from ..errors import DataError, closest, shorten
from .digits import write_digits

__all__ = ["DataSource", "open_split", "open_train_and_val", "open_val"]

VAL_NAMES = ("validation", "val", "valid", "test")


class _Images(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class DataSource:
    """One split.

    Attributes:
        images: `images[i]` is the i-th image, RGB, and its class index; `len(images)` is their number.
        class_names: names in index order.
        name: what to call the split in messages.
    """

    images: _Images
    class_names: list[str]
    name: str

    def __len__(self) -> int:
        return len(self.images)


def open_train_and_val(config: DataConfig) -> tuple[DataSource, DataSource]:
    """Opens both splits. The class list is the training split's, and the validation split is read by it.

    Raises:
        DataError: a split is missing or empty, or the classes are not what the configuration or the other split says.
    """
    train = open_split(config, config.train_split)
    if config.num_classes not in (None, len(train.class_names)):
        raise DataError(
            f"{train.name} has {len(train.class_names)} classes, data.num_classes says {config.num_classes}: "
            f"{shorten(train.class_names, 10)}"
        )
    return train, open_val(config, train.class_names)


def open_val(config: DataConfig, class_names: list[str] | None) -> DataSource:
    """Opens the validation split, its labels as indices into `class_names`; None takes the split's own list.

    Raises:
        DataError: the split is missing or empty, or has a class that is not in `class_names`.
    """
    return open_split(config, config.val_split, class_names)


def open_split(config: DataConfig, split: str | None, class_names: list[str] | None = None) -> DataSource:
    """Opens one split.

    Args:
        config: where the data is.
        split: its name; None for the first of validation, val, valid and test that exists.
        class_names: the class list to use; None to find it in this split.

    Raises:
        DataError: the data set or the split is missing or empty, or has a class that is not in `class_names`.
    """
    if config.source == "folder":
        return _open_folder(Path(config.root), split, class_names)
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
            raise DataError(f"{where} has no validation split: none of {', '.join(VAL_NAMES)} in {shorten(existing)}")
        return found[0]
    if wanted not in existing:
        raise DataError(f"{where} has no split '{wanted}'{closest(wanted, existing)}: it has {shorten(existing)}")
    return wanted


def _check_classes(found: Sequence[str], class_names: Sequence[str], where: object) -> None:
    unknown = [name for name in found if name not in class_names]
    if unknown:
        raise DataError(
            f"{where} has {len(unknown)} classes that the class list has not: {shorten(unknown, 10)}; "
            f"the list has {len(class_names)}: {shorten(class_names, 10)}"
        )


# ---------------------------------------------------------------------------------------------------- image folders


@dataclass(frozen=True)
class _FolderImages:
    samples: list[tuple[str, int]]
    load: Callable[[str], Image.Image]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        try:
            return self.load(path), label
        except (OSError, ValueError, SyntaxError) as e:  # what Pillow raises for a file that is no image
            raise DataError(f"{path}: not a readable image ({e}); remove or replace it") from None


def _folders_in(folder: Path) -> list[str]:
    """Returns the names of the folders in a folder, sorted, without hidden ones such as .ipynb_checkpoints."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _open_folder(root: Path, split: str | None, class_names: list[str] | None) -> DataSource:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset, pil_loader

    if not root.is_dir():
        raise DataError(f"{root}: no such folder (data.root)")
    folder = root / _choose_split(split, _folders_in(root), root)
    found = _folders_in(folder)
    if not found:
        raise DataError(f"{folder} has no class folders; expected {folder}/CLASS/IMAGE")
    names = class_names or found
    _check_classes(found, names, folder)
    index = {name: i for i, name in enumerate(names)}
    # Images of nested folders belong to the class folder right below the split.
    samples = make_dataset(
        str(folder), {name: index[name] for name in found}, extensions=IMG_EXTENSIONS, allow_empty=True
    )
    filled = {label for _, label in samples}
    empty = [name for name in found if index[name] not in filled]
    if empty:
        raise DataError(f"{folder} has {len(empty)} class folders without images: {shorten(empty, 10)}")
    return DataSource(_FolderImages(samples, pil_loader), names, str(folder))


# ------------------------------------------------------------------------------------------- Hugging Face `datasets`


@dataclass(frozen=True)
class _HfImages:
    dataset: Any
    image_key: str
    label_key: str
    relabel: dict[Any, int]  # from the labels as they are in the data
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            row = self.dataset[index]
            image = row[self.image_key].convert("RGB")
        except (OSError, ValueError, SyntaxError, AttributeError) as e:
            raise DataError(f"{self.name}, row {index}: not a readable image ({e})") from None
        label = row[self.label_key]
        if label not in self.relabel:
            raise DataError(f"{self.name}, row {index}: label {label!r} is none of the {len(self.relabel)} classes")
        return image, self.relabel[label]


def _load_hf(root: str, files: dict[str, str] | None) -> Any:
    """Returns a DatasetDict from a `save_to_disk` folder, a folder of data files, or a name on the hub."""
    import datasets

    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        datasets.disable_progress_bars()
    path = Path(root)
    try:
        if files:
            return datasets.load_dataset("parquet", data_files=files)
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(root)
        if path.is_dir() or not path.is_absolute():
            return datasets.load_dataset(str(path.resolve()) if path.is_dir() else root)
        reason: object = "no such folder"
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        reason = str(e).split("\n")[0]
    raise DataError(f"{root}: `datasets` cannot read it as a folder or a hub name (data.root): {reason}")


def _open_hf(
    config: DataConfig, split: str | None, class_names: list[str] | None, files: dict[str, str] | None
) -> DataSource:
    splits = _load_hf(config.root, files)
    split = _choose_split(split, list(splits), config.root)
    dataset = splits[split]
    name = f"{config.root} ({split})"
    for key in (config.image_key, config.label_key):
        if key not in dataset.column_names:
            which = "image_key" if key == config.image_key else "label_key"
            raise DataError(
                f"{name} has no column '{key}' (data.{which}){closest(key, dataset.column_names)}: "
                f"it has {shorten(dataset.column_names)}"
            )
    if len(dataset) == 0:
        raise DataError(f"{name} is empty")
    found = _hf_labels(dataset, config.label_key, name)
    names = class_names or list(found.values())
    _check_classes(list(found.values()), names, name)
    index = {class_name: i for i, class_name in enumerate(names)}
    relabel = {label: index[class_name] for label, class_name in found.items()}
    dataset = dataset.select_columns([config.image_key, config.label_key])
    return DataSource(_HfImages(dataset, config.image_key, config.label_key, relabel, name), names, name)


def _hf_labels(dataset: Any, key: str, where: str) -> dict[Any, str]:
    """Returns the name of every label: from the column's own list, or from the values that occur, sorted."""
    import datasets

    feature = dataset.features[key]
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names))
    kind = getattr(feature, "dtype", type(feature).__name__)
    if not str(kind).startswith(("int", "uint", "string", "large_string", "bool")):
        raise DataError(f"{where}: the column '{key}' (data.label_key) holds {kind}, not classes")
    labels = dataset.unique(key)
    if None in labels:
        raise DataError(f"{where}: the column '{key}' (data.label_key) has rows without a label")
    return {label: str(label) for label in sorted(labels)}
