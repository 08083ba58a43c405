"""Which splits train and validate, whatever the images come with, and a validation split that is held out."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...data.places import leads_out
from ...data.split import SPLIT_NAMES, VAL_NAMES, choose_split
from ...errors import DataError, counted, shorten

__all__ = ["Content", "Opened", "Splits", "check_apart", "folder_at", "path_below", "readable"]


class Content(Protocol):
    """The images of a split, not read yet, with what belongs to each."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Returns what to call an image; reads nothing."""

    def some(self, indices: Sequence[int]) -> Any:
        """Returns the content with these images alone."""


class Opened(NamedTuple):
    """A split: its `Content`, what to call it, and a note on what was left out."""

    content: Any
    name: str
    note: str = ""


class _Keys(Protocol):
    """The keys of a data section that choose splits."""

    @property
    def root(self) -> str: ...

    @property
    def train_split(self) -> str | None: ...

    @property
    def val_split(self) -> str | None: ...

    @property
    def holdout(self) -> float | None: ...

    @property
    def holdout_seed(self) -> int: ...


@dataclass(frozen=True)
class Splits:
    """The splits of a data set.

    Attributes:
        data: the data section.
        names: of the splits; '.' alone where a data set has none.
        open: opens the split of a name.
    """

    data: _Keys
    names: list[str]
    open: Callable[[str], Opened]

    def train_and_val(self) -> tuple[Opened, Opened]:
        """Opens both splits.

        Raises:
            DataError: one is missing, or they are the same.
        """
        data = self.data
        train, val = self._train(), choose_split(self._wanted_val(), self.names, data.root)
        if val.name is None:
            return self._divided(train, val.why_none)
        if val.name == train:
            raise DataError(f"data.val_split is the training split, '{train}'; name another")
        return self.open(train), self.open(val.name)

    def one(self, split: str | None) -> Opened:
        """Opens one split: that of a name, or for None the first that is called like one for validation, or held out.

        Args:
            split: its name; None for `data.val_split`, and all of a data set that is one split if none is held out.

        Raises:
            DataError: it is missing.
        """
        data = self.data
        wanted = split or self._wanted_val()
        if wanted is None and data.holdout is None:
            wanted = self._whole
        chosen = choose_split(wanted, self.names, data.root)
        return self._divided(self._train(), chosen.why_none)[1] if chosen.name is None else self.open(chosen.name)

    @property
    def _whole(self) -> str | None:
        """The only split, if it is not called like one: '.', or 'default' as CVAT calls it."""
        return self.names[0] if len(self.names) == 1 and self._called(SPLIT_NAMES) is None else None

    def _called(self, names: Sequence[str]) -> str | None:
        """Returns the split that is called like the first of some names that is there: as it is, or in capitals."""
        plain = {name.lower(): name for name in reversed(self.names)} | {name: name for name in self.names}
        return next((plain[name] for name in names if name in plain), None)

    def _wanted_val(self) -> str | None:
        return self.data.val_split or self._called(VAL_NAMES)

    def _train(self) -> str:
        wanted = self.data.train_split or self._whole or self._called(("train", "training")) or "train"
        return str(choose_split(wanted, self.names, self.data.root).name)

    def _divided(self, train: str, why: str) -> tuple[Opened, Opened]:
        """Divides the training split, as there is no other.

        Raises:
            DataError: nothing is to be held out, there are other splits, or too few images.
        """
        data = self.data
        if data.holdout is None:
            raise DataError(f"{why}; name one (data.val_split), or data.holdout=0.2 holds a fifth of the images out")
        if others := [name for name in self.names if name != train]:
            raise DataError(
                f"{why}, and nothing is held out (data.holdout) where there is more than '{train}': if one of "
                f"{shorten(others, 5)} is to validate, name it (data.val_split)"
            )
        content, name, note = self.open(train)
        if len(content) < 2:
            raise DataError(
                f"{name} has {counted(len(content), 'image')}, of which none can be held out (data.holdout)"
            )
        kept, held = _hold_out(content, data.root, data.holdout, data.holdout_seed)
        return Opened(content.some(kept), f"{name}, not held out", note), Opened(
            content.some(held), f"{name}, held out"
        )


def _hold_out(content: Content, root: str, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Divides images into those to train on and those that are held out, by a hash of each one's name below `root`."""

    def place(index: int) -> bytes:
        name = content.name(index)
        name = os.path.relpath(name, root) if os.path.isabs(name) or name.startswith(root) else name
        return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()

    order = sorted(range(len(content)), key=place)
    count = min(max(1, round(share * len(order))), len(order) - 1)
    return sorted(order[count:]), sorted(order[:count])


def check_apart(train: str, paths: Sequence[str], val: str, others: Sequence[str]) -> None:
    """Raises a DataError if splits have images in common.

    Args:
        train, val: what to call them.
        paths, others: of their images.
    """
    both = sorted({*map(os.path.realpath, paths)} & {*map(os.path.realpath, others)})
    if both:
        raise DataError(
            f"{train} and {val} have {counted(len(both), 'image')} in common: {shorten(both, 3)}; remove them from one"
        )


def path_below(folder: str, text: str, where: str, key: str = "data.root") -> str:
    """Returns the path of a file that a table or an annotation names, relative to a folder; whether it exists or not.

    Args:
        folder: the folder.
        text: what is written there.
        where: what to call the place of the text.
        key: of the configuration, for the folder.

    Raises:
        DataError: it leads out of the folder by '..'.
    """
    path = os.path.join(folder, text)
    if "\\" in text and not os.path.isfile(path):  # as Windows separates folders
        text = text.replace("\\", "/")
        path = os.path.join(folder, text)
    if leads_out(text):
        raise DataError(f"{where}: {text} leads out of {key} by '..'; make {key} a folder above all files")
    return os.path.normpath(path)


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turns what the operating system says of folders and files inside into a DataError."""
    try:
        yield
    except OSError as e:
        raise DataError(f"{e.filename or 'data.root'}: cannot be read ({e.strerror or e})") from None


def folder_at(root: str) -> Path:
    """Returns `data.root`, which is a folder.

    Raises:
        DataError: it is none.
    """
    path = Path(root)
    if not path.is_dir():
        if path.exists():
            raise DataError(f"{path}: a file, not a folder (data.root); give the folder that it is in")
        raise DataError(f"{path}: no such folder (data.root)")
    return path
