"""Where the project's own configurations are: in the source tree, or inside the installed package."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path, PurePosixPath

__all__ = ["configs_folder", "find_config", "find_recipes", "near_recipes", "recipe_names"]

NO_RUNS = ("models", "variants")  # folders of networks
NEAR = 0.75  # of two names, where 1 is the same
MAX_LENGTH = 200  # of a name that is compared


def configs_folder() -> Path:
    """Returns the folder with `models/` and the recipes."""
    packaged = Path(__file__).with_name("configs")  # where a built wheel carries them
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "configs"


def find_recipes(configs: Path) -> list[Path]:
    """Returns the files below `configs` that are runs: neither networks nor bases, whose names begin with `_`."""
    names = (path.relative_to(configs) for path in configs.glob("**/*.yaml"))
    runs = [name for name in names if not name.name.startswith("_") and name.parts[0] not in NO_RUNS]
    return [configs / name for name in sorted(runs, key=_by_number)]


def _by_number(name: Path) -> list[str | int]:
    """Sorts kernel_5 before kernel_11."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


def recipe_names() -> list[str]:
    """Returns what the project's own recipes can be called without a path: `finetune/folder`."""
    configs = configs_folder()
    return [path.relative_to(configs).with_suffix("").as_posix() for path in find_recipes(configs)]


def find_config(name: str | Path, folder: Path = Path()) -> Path:
    """Returns the file of a configuration: one in `folder`, else one of the project's own.

    Args:
        name: of a file, or of one below `configs/`; `configs/` and `.yaml` can be left out.
        folder: what the path of a file is relative to.

    Returns:
        The path; that in `folder` if there is neither.
    """
    inner = _bare(name)
    is_inner = not os.path.isabs(inner) and ".." not in Path(inner).parts
    own = [configs_folder() / inner, configs_folder() / f"{inner}.yaml"] if is_inner else []
    candidates = (folder / name, folder / f"{name}.yaml", *own)
    return next((path for path in candidates if os.path.isfile(path)), folder / name)


def near_recipes(name: str | Path, limit: int = 3) -> list[str]:
    """Returns the names of recipes that are written much like `name`, the nearest first."""
    wanted = PurePosixPath(_bare(name).removesuffix(".yaml")[-MAX_LENGTH:])

    def likeness(known: str) -> float:
        pairs = ((str(wanted), known), (wanted.name, PurePosixPath(known).name))  # with and without the folder
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    near = [known for known in recipe_names() if likeness(known) >= NEAR]
    return sorted(near, key=likeness, reverse=True)[:limit]


def _bare(name: str | Path) -> str:
    return str(name).replace(os.sep, "/").removeprefix("./").removeprefix("configs/")
