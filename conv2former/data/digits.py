"""The data set of the quickstart: scikit-learn's 1,797 scans of handwritten digits, which need no download."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["write_digits", "write_samples"]


def write_digits(root: Path) -> dict[str, str]:
    """Writes the digits as a parquet data set, 1,437 training and 360 validation images, each digit in proportion.

    A data set that is already there stays as it is. Several processes may call this at once: one writes, and the others
    take its files.

    Args:
        root: the folder to make: `root/train.parquet` and `root/validation.parquet` with the columns `image` (8 x 8,
            grey) and `label`.

    Returns:
        The path of each split's file.

    Raises:
        DataError: the folder holds something else, or cannot be written.
    """
    files = {split: str(root / f"{split}.parquet") for split in ("train", "validation")}
    try:
        if _exist(files):
            return files
        in_use = root.exists() and (not root.is_dir() or any(root.iterdir()))
        if in_use and not _exist(files):  # looked at again: another process may have written them in between
            raise DataError(f"{root} holds something else than the digits: give another data.root, or data.source")
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=".digits-") as folder:
            _write(Path(folder) / "new")
            try:
                os.replace(Path(folder) / "new", root)  # both files or none
            except OSError:  # a folder that is not empty
                if not _exist(files):
                    raise
    except OSError as e:
        raise DataError(f"{root}: the digits cannot be written there ({e})") from None
    return files


def _exist(files: dict[str, str]) -> bool:
    return all(Path(path).is_file() for path in files.values())


def write_samples(folder: Path, count: int = 10) -> list[Path]:
    """Writes the first validation images as files to predict on, `0_is_7.png`: its number, and the digit that it is.

    Args:
        folder: made if need be; files of the same names are written anew.
        count: how many.

    Raises:
        DataError: the files cannot be written.
    """
    images, labels = _digits()["validation"]
    paths = [folder / f"{i}_is_{label}.png" for i, label in enumerate(labels[:count])]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, images, strict=False):
            image.save(path)
    except OSError as e:
        raise DataError(f"{folder}: the digits cannot be written there ({e})") from None
    return paths


def _digits() -> dict[str, tuple[list[Image.Image], list[int]]]:
    """Returns images, 8 x 8 and grey, and labels of each split."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = train_test_split(np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
    found = {}
    for split, chosen in zip(("train", "validation"), indices, strict=True):
        pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # 17 shades of grey
        found[split] = ([Image.fromarray(p) for p in pixels], digits.target[chosen].tolist())
    return found


def _write(root: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    root.mkdir()
    for split, (images, labels) in _digits().items():
        columns = {"image": images, "label": labels}
        with _without_progress_bars():
            datasets.Dataset.from_dict(columns, features=features).to_parquet(root / f"{split}.parquet")


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Turns the bars of `datasets` off inside: for a moment's work every process would print its own."""
    import datasets

    was_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()
