"""Images in folders, one for each class, and what is said where they do not lie as expected."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..config.schema import DataConfig
from ..errors import DataError, closest, counted, shorten
from .classes import in_class_order
from .files import FoundFiles, RealFiles, find_files, is_within, walk
from .images import IMAGE_ENDINGS, UNREAD_ENDINGS, open_rgb, unread_hint
from .split import SPLIT_NAMES, VAL_NAMES, Choice, DataSource, UnlabelledSplit, choose_split, match_listed

__all__ = ["FolderSplits", "check_class_folders", "check_same_folders", "folders_in", "has_images", "is_bare"]


@dataclass(frozen=True)
class _FolderImages:
    samples: list[tuple[str, int]]
    value_range: tuple[float, float] | None
    max_pixels: int | None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return open_rgb(path, path, self.value_range, self.max_pixels), label

    @property
    def labels(self) -> np.ndarray:
        return np.fromiter((label for _, label in self.samples), np.int64, len(self.samples))

    def name(self, index: int) -> str:
        return self.samples[index][0]


def folders_in(folder: Path) -> list[str]:
    """Returns the names of the folders in a folder, sorted, without hidden ones such as .ipynb_checkpoints."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:  # it could not be stored or shown
            raise DataError(f"{folder}: the name of the folder {name!r} is not UTF-8; rename it") from None
    return names


def has_images(folder: Path, below: bool = False) -> bool:
    """Returns whether a folder, or with `below` one below it, has files that look like images, also unreadable ones."""
    endings = (*IMAGE_ENDINGS, *UNREAD_ENDINGS)
    contents = (content.files for content in walk(folder)) if below else (os.listdir(folder),)
    return any(name.lower().endswith(endings) for names in contents for name in names)


def is_bare(root: Path) -> bool:
    """Returns whether a folder holds class folders of images rather than splits.

    Folders that are called like splits (train, val, ...) say that it does not. Where no folder has images itself, but
    folders with images, as a misspelt split, so does a name that is nearly a split's.
    """
    folders = folders_in(root) if root.is_dir() else []
    if not folders or {"train", *VAL_NAMES} & set(folders):
        return False
    if any(has_images(root / name) for name in folders):
        return True
    is_misspelt = any(closest(name.lower(), SPLIT_NAMES) for name in folders)
    return not is_misspelt and any(has_images(root / name, below=True) for name in folders)


def check_class_folders(root: Path) -> None:
    """Raises a DataError if a class folder could be a misspelt split: by its name, and because it has folders."""
    for name in folders_in(root):
        _check_not_above(root, name)
        if closest(name, SPLIT_NAMES) and folders_in(root / name):
            raise DataError(
                f"{root / name}: a class, or a misspelt split{closest(name, SPLIT_NAMES)}? It has folders itself; "
                "rename it, or set data.train_split=. if it is a class"
            )


@dataclass(frozen=True)
class FolderSplits:
    """The folders in `config.root`, each with class folders; see `Splits`. '.' is the root itself, where these are."""

    config: DataConfig

    @property
    def is_whole(self) -> bool:
        return False

    def choose(self, wanted: str | None) -> Choice:
        root = Path(self.config.root)
        if wanted == ".":
            return Choice(".")
        if wanted is None and self.config.train_split == ".":
            return Choice(None, f"{root} has no validation split, only classes (data.train_split: .)")
        folders = folders_in(root)
        return choose_split(wanted, folders, root, "" if wanted in (None, *folders) else _expected(root, folders))

    def others(self, train: str) -> list[str]:
        if train == ".":
            return []
        root = Path(self.config.root)
        return [name for name in folders_in(root) if name != train and _may_be_split(root / name)]

    def open(self, name: str, class_names: list[str] | None) -> DataSource:
        return _open_folder(self.config, name, class_names)


def _may_be_split(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() or is_image(entry.name) for entry in entries)


def _open_folder(config: DataConfig, split: str, class_names: list[str] | None) -> DataSource:
    root = Path(config.root)
    folder = root / split
    found = in_class_order(folders_in(folder))
    if not found:
        raise _no_class_folders(root, folder)
    names = class_names or found
    index = dict(zip(found, match_listed(config, found, names, folder), strict=True))
    below = {name: _files_of_class(folder, name) for name in found}
    _check_once(below)
    samples, empty = [], []
    other: Counter[str] = Counter()
    real_files = RealFiles()
    for name, files in below.items():  # images of nested folders belong to the one right below the split
        its = [(path, index[name]) for path in files.paths if is_image(path)]
        samples += its
        other.update(os.path.splitext(path)[1] or "nothing" for path in files.paths if not is_image(path))
        real_files.folders |= files.real.folders
        real_files.links |= files.real.links
        if not its:
            empty.append(name)
    endings = shorten((f"{ending} ({count:,})" for ending, count in other.most_common()), 10)
    hint = unread_hint(other)
    if empty:
        raise DataError(
            f"{folder} has {counted(len(empty), 'class folder')} without images: {shorten(empty, 10)}; images end in "
            f"{', '.join(IMAGE_ENDINGS)}{f', other files here in {endings}' if endings else ''}{hint}"
        )
    notes = [f"left out of {folder}: {counted(other.total(), 'file')} ending in {endings}{hint}"] if other else []
    notes += _notes_on_links(folder, below.values())
    images = _FolderImages(samples, config.value_range, config.max_image_pixels)
    paths = [path for path, _ in samples]
    return DataSource(images, names, str(folder), "; ".join(notes), files=paths, real_files=real_files)


def is_image(path: str) -> bool:
    """Returns whether a file is an image by its name's ending."""
    return path.lower().endswith(IMAGE_ENDINGS)


def _expected(root: Path, folders: list[str]) -> str:
    """Returns what to add where a split is missing: how folders should lie, or why a class is taken for a split."""
    taken = [name for name in ("train", *VAL_NAMES) if name in folders and has_images(root / name)]
    others = [name for name in folders if name not in SPLIT_NAMES and has_images(root / name, below=True)]
    if taken and others:
        return _taken_for_split(root, taken[0], others)
    text = f"; expected {root}/train/CLASS/IMAGE and {root}/val/CLASS/IMAGE, or {root}/CLASS/IMAGE with data.holdout"
    if len(others) > 1:  # they could be classes whose images lie further down
        text += f"; if {shorten(others, 5)} are classes, set data.train_split=. data.holdout=0.2"
    return text


def _taken_for_split(root: Path, name: str, others: list[str]) -> str:
    return (
        f"; '{name}' is taken for a split because of its name. If it is a class like {shorten(others, 5)}, rename it, "
        "or set data.train_split=. data.holdout=0.2 (in an evaluation data.val_split=.); if it is not, move it out of "
        f"{root}"
    )


def _no_class_folders(root: Path, folder: Path) -> DataError:
    text = f"{folder} has no class folders; expected {folder}/CLASS/IMAGE"
    if not has_images(folder):
        return DataError(text)
    text = f"{folder} has images and no class folders, so no labels; expected {folder}/CLASS/IMAGE"
    beside = [name for name in folders_in(root) if name not in SPLIT_NAMES and has_images(root / name, below=True)]
    if folder.parent == root and beside:
        text += _taken_for_split(root, folder.name, beside)
    return UnlabelledSplit(text)


def _files_of_class(folder: Path, name: str) -> FoundFiles:
    _check_not_above(folder, name)
    return find_files(folder / name)


def _check_not_above(folder: Path, name: str) -> None:
    """Raises a DataError if a class folder is a link to a folder above it, where all classes are."""
    if is_within(os.path.realpath(folder), os.path.realpath(folder / name)):
        raise DataError(f"{folder / name}: a link to a folder above it, where the images of all classes are; remove it")


def _check_once(below: Mapping[str, FoundFiles]) -> None:
    """Raises a DataError if a link puts an image under two classes.

    Args:
        below: of each class what was found.
    """
    folder_at: dict[str, str] = {}
    file_at: dict[str, str] = {}
    for files in below.values():
        with_images = dict.fromkeys(os.path.dirname(path) for path in files.paths if is_image(path))
        for path in with_images:
            _check_same(folder_at.setdefault(files.real.folders[path], path), path)
    for files in below.values():
        for path, real in files.real.links.items():
            if not is_image(path):
                continue
            _check_same(file_at.setdefault(real, path), path)
            folder, name = os.path.split(real)
            if folder in folder_at and is_image(name) and not name.startswith(".") and os.path.isfile(real):
                _check_same(os.path.join(folder_at[folder], name), path)


def _check_same(first: str, second: str) -> None:
    if first != second:
        raise DataError(
            f"{first} and {second} are the same by a link, so that images would be of two classes; remove the link"
        )


def _notes_on_links(folder: Path, below: Iterable[FoundFiles]) -> list[str]:
    below = list(below)
    upward = [path for files in below for path in files.upward]
    repeated = [path for files in below for path in files.repeated if is_image(path)]
    notes = []
    if upward:
        notes.append(
            f"not followed in {folder}: {counted(len(upward), 'link')} to a folder above, {shorten(upward, 3)}"
        )
    if repeated:
        notes.append(
            f"left out of {folder}: {counted(len(repeated), 'link')} to images that the class has already, "
            f"{shorten(repeated, 3)}"
        )
    return notes


def check_same_folders(train: Path, val: Path) -> None:
    """Raises a DataError if a class folder is in one split only: it is a mistake, or a score over other classes."""
    classes, val_classes = set(folders_in(train)), set(folders_in(val))
    only = ((train, sorted(classes - val_classes)), (val, sorted(val_classes - classes)))
    differences = [f"{len(names)} only in {folder}: {shorten(names, 10)}" for folder, names in only if names]
    if differences and val_classes:
        text = f"the splits must have the same class folders, but there are {'; '.join(differences)}"
        raise (DataError if classes & val_classes else UnlabelledSplit)(text)
