"""One way from a data section to images: a training and a validation set with one class list.

A source is a list of (PIL image, class index) pairs. Where a name could mean two things (a misspelt split, a class that
only one split has) it is an error here, because the libraries underneath go on with something else.

Which splits train and validate is decided by their names (`SplitNames`), before one is opened.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.schema import NO_SPLIT, DataConfig
from ..errors import DataError, counted, shorten
from .digits import write_digits
from .folders import FolderSplits, check_class_folders, check_same_folders, is_bare
from .hf import HfSplits, find_hf
from .holdout import Division, divide
from .split import VAL_NAMES, DataSource, Source, Splits, UnlabelledSplit
from .streams import StreamSource
from .tables import find_tables, read_class_list
from .tars import TarSplits, find_tars

__all__ = ["VAL_NAMES", "DataSource", "Source", "is_bare", "open_split", "open_train_and_val", "open_val"]


@dataclass(frozen=True)
class SplitNames:
    """Which splits train and validate.

    Attributes:
        train: the training split.
        val: the validation split; None where there is none, so that images of the training split are held out for it.
        why_none: says why in a message.
    """

    train: str
    val: str | None
    why_none: str


def open_train_and_val(config: DataConfig) -> tuple[Source, Source]:
    """Opens both splits. The class list is the training split's, and the validation split is read by it.

    Where there is no validation split and `config.holdout` is set, the training split is divided; see holdout.py.

    Raises:
        DataError: a split is missing or empty, or the classes are not what the configuration or the other split says.
    """
    with _readable(config):
        _check_two_splits(config)
        splits = _find_splits(config)
        names = _choose_both(config, splits)
        train = splits.open(names.train, _class_list(config))
        _check_class_count(config, train)
        if names.val is None:
            return _split_off(config, splits, names, train)
        val = _open_beside(config, splits, names, train.class_names)
        _check_apart(config, train, val)
        return train, val


def open_val(config: DataConfig, class_names: list[str] | None) -> Source:
    """Opens the validation split, its labels as indices into `class_names`; None takes the split's own list.

    Where there is none and `config.holdout` is set, it is what training with this configuration holds out.

    Raises:
        DataError: the split is missing or empty, has a class that is not in `class_names`, or other images than those
            of `config.holdout_sha256` would be held out.
    """
    class_names = _class_list(config) if class_names is None else class_names
    with _readable(config):
        splits = _find_splits(config)
        val = splits.choose(config.val_split)
        if val.name is None and not config.holdout and splits.is_whole and not _is_none(config):
            val = splits.choose(".")  # a table without splits, or a split that was stored alone
        if val.name is not None:
            return splits.open(val.name, class_names)
        if not config.holdout:
            raise DataError(val.why_none)
        _check_undivided(config, splits, _train_split(config), val.why_none)
        train = splits.open(_choose_train(config, splits), class_names)
        return _held_out(train, _divide(config, train))


def open_split(config: DataConfig, split: str | None, class_names: list[str] | None = None) -> Source:
    """Opens one split.

    Args:
        config: where the data is.
        split: its name; None for the first of validation, val, valid and test that exists; of image folders '.' for
            the root itself, with a folder per class, and of a table or a stored split '.' for all of it.
        class_names: the class list to use; None to find it in this split.

    Raises:
        DataError: the data set or the split is missing or empty, or has a class that is not in `class_names`.
    """
    class_names = _class_list(config) if class_names is None else class_names
    with _readable(config):
        splits = _find_splits(config)
        chosen = splits.choose(split)
        if chosen.name is None:
            raise DataError(chosen.why_none)
        return splits.open(chosen.name, class_names)


# --------------------------------------------------------------------------------------------- which splits, by name


@contextlib.contextmanager
def _readable(config: DataConfig) -> Iterator[None]:
    """Turns what the operating system says inside of folders and files into a DataError; hf.py does so by itself."""
    try:
        yield
    except OSError as e:
        if config.source not in ("folder", "csv", "wds"):
            raise
        raise DataError(f"{e.filename or Path(config.root)}: cannot be read ({e.strerror})") from None


def _find_splits(config: DataConfig) -> Splits:
    """Looks which splits the configured data set has."""
    root = Path(config.root)
    if config.source == "digits":
        files = write_digits(root)
        keys = {"image_key": "image", "label_key": "label"}
        found = find_hf(config.model_copy(update=keys), files)
        return _DigitSplits(found.config, found.places, found.loaded)
    if config.source == "hf":
        return find_hf(config)
    if not root.is_dir():
        raise DataError(f"{root}: {'a file, not a' if root.exists() else 'no such'} folder (data.root)")
    if config.source == "wds":
        return TarSplits(config, find_tars(root))
    return find_tables(config) if config.source == "csv" else FolderSplits(config)


class _DigitSplits(HfSplits):
    def open(self, name: str, class_names: list[str] | None) -> Source:
        source = super().open(name, class_names)
        if class_names is None and source.class_names != list("0123456789"):
            root, names = self.config.root, shorten(source.class_names, 10)
            raise DataError(f"{root} is not the digits data set: its classes are {names}")
        return source


def _class_list(config: DataConfig) -> list[str] | None:
    """Returns the class list that the configuration gives, if it does."""
    return None if config.class_names is None else read_class_list(Path(config.class_names))


def _check_two_splits(config: DataConfig) -> None:
    """Raises a DataError if the validation split is the training split, or if class folders are taken for splits."""
    if config.val_split is not None and os.path.normpath(config.val_split) == os.path.normpath(config.train_split):
        raise DataError(
            f"data.val_split is the training split, '{config.train_split}': the accuracy would be that on the "
            f"training images; name another split, or hold some of these out: {_without_val(config)}"
        )
    root = Path(config.root)
    is_folder = config.source == "folder" and config.train_split != "."
    if is_folder and not config.holdout and is_bare(root) and not (root / config.train_split).is_dir():
        raise DataError(
            f"{root} has class folders and no split '{config.train_split}'; data.holdout=0.2 holds a fifth of each "
            "class out for validation and trains on the others"
        )


def _choose_both(config: DataConfig, splits: Splits) -> SplitNames:
    train, val = _choose_train(config, splits), splits.choose(config.val_split)
    return SplitNames(train, val.name, val.why_none)


def _choose_train(config: DataConfig, splits: Splits) -> str:
    train = splits.choose(_train_split(config))
    if train.name is None:
        raise DataError(train.why_none)
    return train.name


def _train_split(config: DataConfig) -> str:
    """Returns the name of the training split: of class folders without splits, which are to be divided, '.'."""
    root = Path(config.root)
    by_itself = config.source == "folder" and config.holdout and config.val_split in (None, NO_SPLIT)
    if by_itself and config.train_split == DataConfig().train_split and is_bare(root):
        check_class_folders(root)
        return "."
    return config.train_split


def _is_none(config: DataConfig) -> bool:
    return config.val_split == NO_SPLIT


def _without_val(config: DataConfig) -> str:
    """Returns the words that make a run hold images of the training split out, whatever other splits there are."""
    return f"data.val_split={NO_SPLIT} data.holdout={config.holdout or 0.2:g}"


# ------------------------------------------------------------------------------------------- a validation split beside


def _open_beside(config: DataConfig, splits: Splits, names: SplitNames, class_names: list[str]) -> Source:
    """Opens the validation split by the training split's classes."""
    assert names.val is not None
    try:
        if config.source == "folder" and "." not in (names.train, names.val):
            check_same_folders(Path(config.root) / names.train, Path(config.root) / names.val)
        return splits.open(names.val, class_names)
    except UnlabelledSplit as e:
        hint = "" if config.streaming else f"; to train without it: {_without_val(config)}"
        raise DataError(f"{e}{hint}") from None


def _check_class_count(config: DataConfig, train: Source) -> None:
    if config.num_classes not in (None, len(train.class_names)):
        raise DataError(
            f"{config.class_names or train.name} has {counted(len(train.class_names), 'class', 'classes')}, "
            f"data.num_classes says {config.num_classes}: "
            f"{shorten(train.class_names, 10)}"
        )


def _check_apart(config: DataConfig, train: Source, val: Source) -> None:
    """Raises a DataError if the splits have images in common."""
    both = _in_common(train, val)
    if both:
        what = "tar" if config.source == "wds" else "image"
        raise DataError(
            f"{train.name} and {val.name} have {counted(len(both), what)} in common: "
            f"{shorten(both, 5)}; remove them from one, or the link by which they are in both"
        )


def _in_common(train: Source, val: Source) -> list[str]:
    """Returns the files of the validation split, tars or images, that are also in the training split."""
    if isinstance(train, StreamSource) or isinstance(val, StreamSource):
        return []
    there, here = train.real_files, val.real_files
    if there is None or here is None or there.real_folders.isdisjoint(here.real_folders):
        return []
    path_of = {here(path): path for path in val.files}
    return sorted(path_of[real] for real in map(there, train.files) if real in path_of)


# ------------------------------------------------------------------------------- a validation split that is held out


def _split_off(config: DataConfig, splits: Splits, names: SplitNames, train: Source) -> tuple[Source, Source]:
    """Divides the training split, as there is no other, into what is trained on and what is held out."""
    if not config.holdout:
        hint = "" if config.streaming else "; data.holdout=0.2 holds a fifth of the training images out instead"
        raise DataError(f"{names.why_none}{hint}")
    _check_undivided(config, splits, names.train, names.why_none)
    division = _divide(config, train)
    assert isinstance(train, DataSource)
    rest = replace(train, images=division.train, name=f"{train.name}, not held out")
    return rest, _held_out(train, division)


def _check_undivided(config: DataConfig, splits: Splits, train: str, why_none: str) -> None:
    """Raises a DataError if there is more than the training split: it may be a validation split, misspelt."""
    if not _is_none(config) and splits.others(train):
        there = f"give data.root={Path(config.root) / train}, or " if config.source == "folder" else ""
        raise DataError(
            f"{why_none}: if one of them is, name it (data.val_split); nothing is held out (data.holdout) where there "
            f"is more than '{train}'; to train on '{train}' alone, {there}data.val_split={NO_SPLIT}"
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
    because = f"is divided, as data.val_split is {NO_SPLIT}" if _is_none(config) else "has no validation split"
    division = divide(train.images, train.class_names, train.name, root, config.holdout, config.holdout_seed, because)
    if config.holdout_sha256 not in (None, division.sha256):
        raise DataError(
            f"{train.name}: the images have changed: other ones than in the run would be held out. What was held out "
            "is listed in split.csv in the run folder (data.source=csv data.csv=RUN/split.csv); data.holdout=null "
            "looks for a validation split"
        )
    return division


def _held_out(train: Source, division: Division) -> DataSource:
    return DataSource(division.val, train.class_names, f"{train.name}, held out", division.note, sha256=division.sha256)
