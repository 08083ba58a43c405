"""One split of a data set, and how its name and its classes are found, whatever the source."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from ..config.schema import NO_SPLIT, DataConfig
from ..errors import DataError, closest, counted, shorten
from .classes import match_classes
from .files import RealFiles
from .streams import StreamSource

__all__ = [
    "SPLIT_NAMES",
    "VAL_NAMES",
    "Choice",
    "DataSource",
    "Source",
    "Splits",
    "UnlabelledSplit",
    "check_single_label",
    "choose_split",
    "is_index",
    "is_no_label",
    "match_listed",
]

VAL_NAMES = ("validation", "val", "valid", "test")
SPLIT_NAMES = ("train", "training", *VAL_NAMES)


class Images(Protocol):
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
        files: paths of the files that the images are in, tars or images, by which two splits are compared; none where
            the images are in no files of their own.
        real_files: where `files` lie.
    """

    images: Images
    class_names: list[str]
    name: str
    note: str = ""
    sha256: str = ""
    files: Sequence[str] = ()
    real_files: RealFiles | None = None

    def __len__(self) -> int:
        return len(self.images)


Source = DataSource | StreamSource


class UnlabelledSplit(DataError):
    """A split whose images, or some of them, have no labels."""


@dataclass(frozen=True)
class Choice:
    """The split that a name in the configuration stands for.

    Attributes:
        name: of the split; None where none validates.
        why_none: a sentence for a message: none is called like a validation split, or none is to be taken.
    """

    name: str | None
    why_none: str = ""


class Splits(Protocol):
    """The splits of a data set by their names; an image is looked for when one is opened."""

    @property
    def is_whole(self) -> bool:
        """Whether the data set knows no splits, and is one."""
        ...

    def choose(self, wanted: str | None) -> Choice:
        """Chooses by name, as `choose_split`; '.' is all of a data set that knows no splits."""
        ...

    def others(self, train: str) -> list[str]:
        """Returns the names of what may be splits besides `train`, and share no file with it."""
        ...

    def open(self, name: str, class_names: list[str] | None) -> Source:
        """Opens a split that `choose` has named; see `sources.open_split`."""
        ...


def choose_split(wanted: str | None, existing: Sequence[str], where: object, hint: str = "") -> Choice:
    """Chooses a split by name: `wanted`, or for None the first that is called like a validation split.

    Args:
        wanted: the name; None, or `NO_SPLIT` unless a split is called so, need not lead to one.
        existing: the names that there are.
        where: what to call the data set in messages.
        hint: what to add to the message that there is none of that name.

    Raises:
        DataError: there is none of that name.
    """
    if wanted is None:
        found = next((name for name in VAL_NAMES if name in existing), None)
        names = f"none of {', '.join(VAL_NAMES)} in {shorten(existing) or 'it'}"
        return Choice(found) if found else Choice(None, f"{where} has no validation split: {names}")
    if wanted == NO_SPLIT and NO_SPLIT not in existing:
        return Choice(None, f"{where}: no validation split is to be taken (data.val_split: {NO_SPLIT})")
    if wanted not in existing:
        if "[" in wanted:
            hint = "; a part of a split has no name: data.holdout holds a share of the training images out"
        raise DataError(
            f"{where} has no split '{wanted}'{closest(wanted, existing)}: it has {shorten(existing) or 'none'}{hint}"
        )
    return Choice(wanted)


def match_listed(config: DataConfig, found: Sequence[str], class_names: Sequence[str], where: object) -> list[int]:
    """Finds the classes of a data set in a list, as `match_classes`; a list of the user's also names 0, 1, 2, ..."""
    if config.class_names is not None and not set(found) <= set(class_names) and all(map(is_index, found)):
        beyond = [name for name in found if int(name) >= len(class_names)]
        if beyond:
            raise DataError(
                f"{where} has class {shorten(beyond, 10)}, and the class list "
                f"{counted(len(class_names), 'name')}, for 0 to {len(class_names) - 1} (data.class_names)"
            )
        return [int(name) for name in found]
    try:
        return match_classes(found, class_names, where)
    except DataError as e:
        raise (DataError(f"{e} ({config.class_names})") if config.class_names else e) from None


def is_no_label(label: object, class_names: Collection[str]) -> bool:
    """Returns whether a label says that there is none: None, -1 or blank text, unless a known class is called so."""
    text = "" if label is None else str(label).strip()
    return text in ("", "-1") and text not in class_names


def is_index(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10


def check_single_label(label: str, labels: Collection[str], class_names: Collection[str], where: str) -> None:
    """Raises a DataError if a label is several, as 'cat|dog' or, where cat and dog are labels, 'cat,dog'.

    Args:
        label: of an image, in data that does not say which classes there are.
        labels: all of the data set; a set or a dictionary.
        class_names: labels that are known to be classes, however they are written.
        where: what to call the place of the label.
    """
    parts = {separator: [part.strip() for part in label.split(separator)] for separator in "|;," if separator in label}
    is_several = all(parts.get("|", [""])) or any(all(word in labels for word in words) for words in parts.values())
    if is_several and label not in class_names:
        raise DataError(
            f"{where}: the label '{label}' is several labels, and an image has one class here; leave one of them, "
            "or, if it is the name of one class, list it in a file of class names (data.class_names)"
        )
