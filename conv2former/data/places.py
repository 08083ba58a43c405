"""Where the files of a data set may lie: what it names must not lead to other files of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config.schema import DataConfig
from ..errors import DataError
from .files import is_within

__all__ = ["Places", "check_card", "leads_out"]

ARCHIVES = ("zip://", "tar://", "gzip://", "bz2://", "xz://", "zstd://", "lz4://")  # of fsspec, inside another file
ON_HUB = "hf://datasets/"
CARDS = ("README.md", ".huggingface.yaml")  # in which a folder may say to `datasets` where its data files are
WAY_OUT = "the folder data.root; data.absolute_paths=true allows files elsewhere on this machine"


def leads_out(path: str) -> bool:
    """Returns whether a relative path leads out of the folder that it is relative to, by `..`."""
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] == os.pardir


@dataclass(frozen=True)
class Places:
    """Where the files may lie that a Hugging Face data set names.

    Links are not looked at: those below a folder of the user's are the user's own.

    Attributes:
        folders: absolute paths: the data's root, and the cache where `datasets` unpacks archives.
        is_on_hub: whether the root is a name on the hub, so that files there belong to it.
        absolute: whether files may lie anywhere on this machine, if their paths are absolute.
    """

    folders: tuple[str, ...]
    is_on_hub: bool
    absolute: bool = False

    @classmethod
    def of(cls, config: DataConfig) -> Places:
        """Returns the places of a configured data set."""
        import datasets
        from huggingface_hub import constants

        root = Path(config.root)
        caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.EXTRACTED_DATASETS_PATH, constants.HF_HUB_CACHE)
        folders = {os.path.abspath(folder) for folder in caches} | {os.path.realpath(folder) for folder in caches}
        if root.is_dir():
            folders |= {os.path.abspath(root), os.path.realpath(root)}
        return cls(tuple(sorted(folders)), not root.is_dir(), config.absolute_paths)

    def check(self, path: str, where: str) -> None:
        """Raises a DataError if a file lies elsewhere.

        Args:
            path: as in the data: of a file, or of one in an archive as `zip://NAME::ARCHIVE`.
            where: what to call the place of the path.
        """
        *inner, file = path.split("::")
        if not all(part.startswith(ARCHIVES) for part in inner) or (
            "://" in file and not (self.is_on_hub and file.startswith(ON_HUB))
        ):
            raise DataError(f"{where}: {path!r} is refused: an address, and nothing is fetched from elsewhere; copy it")
        if "://" in file or (self.absolute and os.path.isabs(file)):
            return
        if not any(is_within(os.path.abspath(file), folder) for folder in self.folders):
            raise DataError(f"{where}: {path!r} is refused: it lies outside {WAY_OUT}")

    def check_all(self, paths: Iterable[str], where: str) -> None:
        """Raises a DataError at the first path that `check` refuses."""
        for path in paths:
            self.check(path, where)


def check_card(folder: Path) -> None:
    """Raises a DataError if a folder's own description has its data files at addresses.

    `Places` would refuse what they lead to, but to find out what that is, `datasets` asks the network.
    """
    for name in CARDS:
        try:
            text = (folder / name).read_text("utf-8").removeprefix("---\n")
            card = yaml.safe_load(text.partition("\n---")[0])
        except (OSError, ValueError, RecursionError, yaml.YAMLError):  # there is none, or `datasets` says what is wrong
            continue
        for config in _values_of(card, "configs"):
            for value in _values_of(config, "data_files"):
                if isinstance(value, str) and "://" in value:
                    raise DataError(f"{folder / name}: {value!r} is refused: an address, and not a file of the folder")


def _values_of(content: Any, key: str) -> list[Any]:
    """Returns what is anywhere in `content[key]`, each container once, if `content` is a dictionary that has it."""
    found: list[Any] = []
    todo, seen = [content[key]] if isinstance(content, dict) and key in content else [], set[int]()
    while todo:
        value = todo.pop()
        if isinstance(value, (dict, list)):
            if id(value) in seen:
                continue
            seen.add(id(value))
            todo += value.values() if isinstance(value, dict) else value
        found.append(value)
    return found
