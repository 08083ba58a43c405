"""The folder for what is kept between runs: installed weights, and C++ that was compiled."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["store_folder"]


def store_folder() -> Path:
    """Returns the folder, `$CONV2FORMER_HOME` or one in the user's cache; it need not exist."""
    if home := os.environ.get("CONV2FORMER_HOME"):
        return Path(os.path.expanduser(home)).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(cache)).absolute() / "conv2former"
