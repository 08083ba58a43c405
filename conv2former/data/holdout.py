"""A validation split for data that has none: a share of each class, held out of training.

Which images these are follows from the seed and their names below the data's root, so it is the same in any order of
the files, for any number of processes, on any machine, and in an evaluation later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError, counted, shorten

__all__ = ["Division", "Part", "divide", "fingerprint", "held_out", "relative_names"]


@dataclass(frozen=True)
class Part:
    """Some of a source's images.

    Attributes:
        images: all of them.
        indices: (part,) int64, rising: those that belong to it.
    """

    images: Any
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[int(self.indices[index])]

    @property
    def labels(self) -> np.ndarray:
        return self.images.labels[self.indices]

    def name(self, index: int) -> str:
        return self.images.name(int(self.indices[index]))


@dataclass(frozen=True)
class Division:
    """A split in two: what to train on and what is held out, the latter's fingerprint, and a line that says so."""

    train: Part
    val: Part
    sha256: str
    note: str


def relative_names(images: Any, root: str) -> list[str]:
    """Returns what every image is called below the data's root, wherever that lies."""
    above = str(Path(root))
    # a path below the root; of a Hugging Face data set and of tars the root is what the name begins with
    starts = (f"{above}/", f"{above} (")
    names = (images.name(i) for i in range(len(images)))
    return [name[len(above) + 1 :] if name.startswith(starts) else name for name in names]


def held_out(names: Sequence[str], labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Chooses the images to hold out.

    Of each class those whose hashes with the seed are the smallest: its share, rounded, but at least one image, and not
    its only one.

    Args:
        names: of the images; their order does not matter.
        labels: (images,) class indices.
        share: in (0, 0.5].
        seed: another one chooses other images.

    Returns:
        (images,) bool.
    """
    ranks = [hashlib.sha256(f"{seed}\0".encode() + _bytes(name)).digest() for name in names]
    chosen = np.zeros(len(names), dtype=bool)
    of_class: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        of_class.setdefault(label, []).append(i)
    for indices in of_class.values():
        count = min(max(1, int(share * len(indices) + 0.5)), len(indices) - 1)
        chosen[sorted(indices, key=ranks.__getitem__)[:count]] = True
    return chosen


def fingerprint(names: Sequence[str], labels: Sequence[str]) -> str:
    """Returns the sha256 of a set of images and their class names, as hexadecimal digits."""
    lines = sorted(_bytes(f"{name}\0{label}") for name, label in zip(names, labels, strict=True))
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # a file name need not be UTF-8


def divide(
    images: Any,
    class_names: Sequence[str],
    name: str,
    root: str,
    share: float,
    seed: int,
    because: str = "has no validation split",
) -> Division:
    """Divides a split into training and held-out images.

    Args:
        images: of the split, with their `labels`.
        class_names: names in index order.
        name: of the split, in messages.
        root: the data's, see `relative_names`.
        share, seed: see `held_out`.
        because: what the note says of the split before it tells how it is divided.

    Raises:
        DataError: no class has two images, or there is one class only.
    """
    names, labels = relative_names(images, root), images.labels
    counts = np.bincount(labels, minlength=len(class_names))
    if np.count_nonzero(counts) == 1:
        only = class_names[int(counts.argmax())]
        its = f"{counted(len(labels), 'image')} {'is' if len(labels) == 1 else 'are'}"
        raise DataError(f"{name}: all {its} of one class, '{only}'; a classifier needs two")
    chosen = held_out(names, labels, share, seed)
    if not chosen.any():
        raise DataError(f"{name}: no class has two images, so none can be held out (data.holdout)")
    train, val = np.flatnonzero(~chosen), np.flatnonzero(chosen)
    lone = [class_names[i] for i in np.flatnonzero(counts == 1).tolist()]
    note = (
        f"{name} {because}: {counted(len(val), 'image')} of {len(labels)} held out, about "
        f"{100 * share:g} % of each class (data.holdout, seed {seed})"
    )
    if lone:
        note += f"; none of {counted(len(lone), 'class', 'classes')} with a single image: {shorten(lone, 10)}"
    sha256 = fingerprint([names[i] for i in val], [class_names[label] for label in labels[val].tolist()])
    return Division(Part(images, train), Part(images, val), sha256, note)
