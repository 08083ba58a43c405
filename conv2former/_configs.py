"""Where the project's own configurations are: in the source tree, or inside the installed package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["configs_folder"]


def configs_folder() -> Path:
    """Returns the folder with `models/` and the recipes."""
    packaged = Path(__file__).with_name("configs")  # where a built wheel carries them
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "configs"
