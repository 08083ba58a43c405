"""Columns of images in data sets that Hugging Face `datasets` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ...data.hf import HfSplits, find_hf
from ...errors import DataError, closest, shorten

__all__ = ["check_columns", "find_splits", "undecoded"]


def find_splits(data: Any) -> HfSplits:
    """Returns the splits of a data section's set.

    Raises:
        DataError: it cannot be read, or is one split.
    """
    found = find_hf(cast(Any, data))
    if found.is_whole:
        raise DataError(f"{data.root} is one split of a data set, by save_to_disk; save both splits together")
    return found


def check_columns(dataset: Any, columns: Mapping[str, str], where: str) -> None:
    """Raises a DataError if a data set lacks a column.

    Args:
        dataset: of one split.
        columns: by the keys of the configuration that name them.
        where: what to call it.
    """
    for key, column in columns.items():
        if column not in dataset.features:
            raise DataError(
                f"{where} has no column '{column}' (data.{key}){closest(column, dataset.features)}: it has "
                f"{shorten(dataset.features)}"
            )


def undecoded(dataset: Any, column: str, where: str) -> Any:
    """Returns a data set in which a column of images has their files.

    Raises:
        DataError: the column holds no images.
    """
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    kind = getattr(feature, "dtype", type(feature).__name__)
    is_file = isinstance(feature, dict) and "bytes" in feature  # an image that was written without saying so
    if not is_file and kind not in ("binary", "large_binary"):
        raise DataError(f"{where}: the column '{column}' holds {kind}, not images")
    return dataset
