"""The folder for what is kept between runs, installed weights and compiled C++, and how files get to the disk."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["shipped_folder", "store_folder", "to_disk"]


def store_folder() -> Path:
    """Returns the folder, `$CONV2FORMER_HOME` or one in the user's cache; it need not exist."""
    if home := os.environ.get("CONV2FORMER_HOME"):
        return Path(os.path.expanduser(home)).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(cache)).absolute() / "conv2former"


def shipped_folder() -> Path:
    """Returns the folder of the weights that are part of the package, laid out as the store is."""
    return Path(__file__).with_name("pretrained")


def to_disk(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk.

    Raises:
        OSError: it cannot be opened or flushed; not every file system lets folders be.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
