"""What a run says and writes about the images of its classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...config import Config
from ...data import DataSource, StreamSource
from ...data.holdout import relative_names
from ...data.sources import VAL_NAMES, Source, is_bare
from ...data.tables import write_table
from ...errors import OutputError, counted, shorten
from .evaluation import SMALL_SPLIT, one_image

__all__ = [
    "SPLIT_FILE",
    "check_beside_images",
    "class_counts",
    "describe_classes",
    "describe_validation",
    "write_split",
]

SPLIT_FILE = "split.csv"  # which images are trained on and which are held out
IMBALANCED = 3  # times as many images of one class as of another: worth a hint


def class_counts(source: Source) -> np.ndarray | None:
    """Returns how many images each class has, (classes,); None of a stream, which has no end to look for."""
    if isinstance(source, StreamSource):
        return None
    return np.bincount(source.images.labels, minlength=len(source.class_names))


def check_beside_images(output: Path, config: Config) -> None:
    """Checks that the run folder is not among class folders, where its pictures would make it a class."""
    root, data = Path(config.data.root), config.data
    if data.source != "folder" or not root.is_dir():
        return
    splits = [root / name for name in {data.train_split, data.val_split, *VAL_NAMES} if name]
    for folder in [root] if is_bare(root) else splits:
        if folder.resolve() in (output.resolve(), *output.resolve().parents):
            raise OutputError(
                f"{output}: lies among the class folders in {folder}, and would be one; choose another --output"
            )


def write_split(path: Path, root: str, train: Source, val: Source) -> None:
    """Writes a table of the images with their classes and what each is used for, which trains the same again."""
    rows = []
    for split, source in (("train", train), ("val", val)):
        assert isinstance(source, DataSource)
        names = relative_names(source.images, root)
        labels = (source.class_names[label] for label in source.images.labels)
        rows += [(name, label, split) for name, label in zip(names, labels, strict=True)]
    write_table(path, sorted(rows))


def describe_classes(config: Config, counts: np.ndarray, class_names: Sequence[str]) -> str:
    """Returns a line on how many training images the classes have, and what is done where they differ.

    Args:
        config: the run.
        counts: (classes,) training images.
        class_names: names in index order.
    """
    there = np.flatnonzero(counts)
    few, many = (int(there[choose(counts[there])]) for choose in (np.argmin, np.argmax))
    line = f"training images per class: {counts[few]:,}"
    if few != many:
        line += f" ({class_names[few]}) to {counts[many]:,} ({class_names[many]})"
    missing = [class_names[i] for i in np.flatnonzero(counts == 0).tolist()]
    if missing:
        line += f", none of {counted(len(missing), 'listed class', 'listed classes')}: {shorten(missing, 10)}"
    alike = [name for name, times in Counter(map(str.casefold, class_names)).items() if times > 1]
    if alike:
        line += f"; names that differ by capital letters only are several classes: {shorten(alike, 5)}"
    sampling, weights = config.data.sampling, config.train.class_weight
    if sampling != "uniform":
        what = "equally often" if sampling == "balanced" else "in proportion to the square root of that"
        return f"{line}; seen {what} (data.sampling)"
    if weights != "none":
        what = "that" if weights == "balanced" else "the square root of that"
        return f"{line}; weighted in the loss by one over {what} (train.class_weight)"
    if counts[many] > IMBALANCED * counts[few]:
        line += "; to learn the rare ones better try data.sampling=sqrt, or train.class_weight=sqrt"
    return line


def describe_validation(val: Source) -> list[str]:
    """Returns a line on how coarse an accuracy on a small split is."""
    if not 0 < len(val) < SMALL_SPLIT:  # of a stream the length is not known
        return []
    # without the word error, for which people search their logs
    return [f"validation: {one_image(len(val))} of top-1; ± is one standard deviation, sqrt(p (1 - p) / n)"]
