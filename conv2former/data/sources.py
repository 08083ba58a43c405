"""One way from a data section to images: a training and a validation set with one class list.

A source is a list of (PIL image, class index) pairs. Where a name could mean two things (a misspelt split, a class that
only one split has) it is an error here, because the libraries underneath go on with something else.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..config.schema import NO_SPLIT, DataConfig
from ..errors import DataError, counted, shorten
from .digits import write_digits
from .folders import check_class_folders, check_same_folders, is_bare, open_folder
from .hf import open_hf
from .holdout import Division, divide
from .images import IMAGE_ENDINGS
from .split import VAL_NAMES, DataSource, NoValidationSplit, Source, UnlabelledSplit
from .streams import StreamSource
from .tables import open_table, read_class_list
from .tars import find_tars, open_tars

__all__ = ["VAL_NAMES", "DataSource", "Source", "is_bare", "open_split", "open_train_and_val", "open_val"]


def open_train_and_val(config: DataConfig) -> tuple[Source, Source]:
    """Opens both splits. The class list is the training split's, and the validation split is read by it.

    Where there is no validation split and `config.holdout` is set, the training split is divided; see holdout.py.

    Raises:
        DataError: a split is missing or empty, or the classes are not what the configuration or the other split says.
    """
    share = f"data.holdout={config.holdout or 0.2:g}"
    if config.val_split is not None and os.path.normpath(config.val_split) == os.path.normpath(config.train_split):
        raise DataError(
            f"data.val_split is the training split, '{config.train_split}': the accuracy would be that on the "
            f"training images; name another split, or hold some of these out: data.val_split={NO_SPLIT} {share}"
        )
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
        if config.source == "folder" and "." not in (_train_split(config), config.val_split) and not _is_none(config):
            check_same_folders(config)
        val = open_split(config, config.val_split, train.class_names)
    except NoValidationSplit as e:
        if not config.holdout:
            hint = "" if config.streaming else "; data.holdout=0.2 holds a fifth of the training images out instead"
            raise DataError(f"{e}{hint}") from None
        _check_undivided(config, e)
        division = _divide(config, train)
        assert isinstance(train, DataSource)
        rest = replace(train, images=division.train, name=f"{train.name}, not held out")
        return rest, _held_out(config, train, division)
    except UnlabelledSplit as e:
        hint = "" if config.streaming else f"; to train without it: data.val_split={NO_SPLIT} {share}"
        raise DataError(f"{e}{hint}") from None
    both = _in_common(train, val)
    if both:
        what = "tar" if config.source == "wds" else "image"
        raise DataError(
            f"{train.name} and {val.name} have {counted(len(both), what)} in common: "
            f"{shorten(both, 5)}; remove them from one, or the link by which they are in both"
        )
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
    except NoValidationSplit as e:
        is_one_split = config.source in ("csv", "hf") and not e.existing and not _is_none(config)
        if not config.holdout and is_one_split:  # a table without splits, or a split that was stored alone
            return open_split(config, ".", class_names)
        if not config.holdout:
            raise
        _check_undivided(config, e)
    train = open_split(config, _train_split(config), class_names)
    return _held_out(config, train, _divide(config, train))


def _is_none(config: DataConfig) -> bool:
    return config.val_split == NO_SPLIT


def _train_split(config: DataConfig) -> str:
    """Returns the name of the training split: of class folders without splits, which are to be divided, '.'."""
    root = Path(config.root)
    by_itself = config.source == "folder" and config.holdout and config.val_split in (None, NO_SPLIT)
    if by_itself and config.train_split == DataConfig().train_split and is_bare(root):
        check_class_folders(root)
        return "."
    return config.train_split


def _check_undivided(config: DataConfig, error: NoValidationSplit) -> None:
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
        there = f"give data.root={root / train}, or " if config.source == "folder" else ""
        raise DataError(
            f"{error}: if one of them is, name it (data.val_split); nothing is held out (data.holdout) where there is "
            f"more than '{train}'; to train on '{train}' alone, {there}data.val_split={NO_SPLIT}"
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


def _held_out(config: DataConfig, train: Source, division: Division) -> DataSource:
    return DataSource(division.val, train.class_names, f"{train.name}, held out", division.note, sha256=division.sha256)


def _in_common(train: Source, val: Source) -> list[str]:
    """Returns the files of the validation split, tars or images, that are also in the training split."""
    if isinstance(train, StreamSource) or isinstance(val, StreamSource):
        return []
    there, here = train.real_files, val.real_files
    if there is None or here is None or there.real_folders.isdisjoint(here.real_folders):
        return []
    path_of = {here(path): path for path in val.files}
    return sorted(path_of[real] for real in map(there, train.files) if real in path_of)


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
    if class_names is None and config.class_names is not None:
        class_names = read_class_list(Path(config.class_names))
    if config.source in ("folder", "csv", "wds"):
        root = Path(config.root)
        try:
            if not root.is_dir():
                raise DataError(f"{root}: {'a file, not a' if root.exists() else 'no such'} folder (data.root)")
            if config.source == "folder" and split is None and config.train_split == ".":
                raise NoValidationSplit(f"{root} has no validation split, only classes (data.train_split: .)", [])
            openers = {"folder": open_folder, "csv": open_table, "wds": open_tars}
            return openers[config.source](config, split, class_names)
        except OSError as e:
            raise DataError(f"{e.filename or root}: cannot be read ({e.strerror})") from None
    files = None
    if config.source == "digits":
        files = write_digits(Path(config.root))
        config = config.model_copy(update={"image_key": "image", "label_key": "label"})
    source = open_hf(config, split, class_names, files)
    if config.source == "digits" and class_names is None and source.class_names != list("0123456789"):
        raise DataError(f"{config.root} is not the digits data set: its classes are {shorten(source.class_names, 10)}")
    return source
