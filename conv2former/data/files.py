"""Which files there are: each is found once, under one path, however many links lead to it."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

__all__ = ["FoundFiles", "RealFiles", "find_files", "is_within", "walk"]


@dataclass
class RealFiles:
    """Where files really lie, with the links in their paths resolved.

    Attributes:
        folders: the real path of each folder that files are in.
        links: of the files that are links themselves, the path of the real file.
    """

    folders: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    def __call__(self, path: str) -> str:
        """Returns the path of the real file."""
        if path in self.links:
            return self.links[path]
        folder, name = os.path.split(path)
        return os.path.join(self.folders[folder], name)

    def add(self, path: str) -> bool:
        """Looks up where a file lies. Returns whether it is there, and a file or a link to one."""
        try:
            mode = os.lstat(path).st_mode
        except (OSError, ValueError):  # a NUL in the name
            return False
        if stat.S_ISLNK(mode):
            self.links[path] = os.path.realpath(path)
        folder = os.path.dirname(path)
        if folder not in self.folders:
            self.folders[folder] = os.path.realpath(folder)
        return stat.S_ISREG(mode) or os.path.isfile(path)

    @property
    def real_folders(self) -> set[str]:
        """The real folders in which the files are."""
        return {*self.folders.values(), *map(os.path.dirname, self.links.values())}


@dataclass
class FoundFiles:
    """The files below a folder.

    Attributes:
        paths: sorted by their folders, then by name.
        real: where they lie; its `folders` are those that have files.
        upward: links to a folder above the place where they are, which are not followed.
        repeated: links to a file that is among `paths` anyway, and are left out.
    """

    paths: list[str] = field(default_factory=list)
    real: RealFiles = field(default_factory=RealFiles)
    upward: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


class _Folder(NamedTuple):
    path: str
    real: str
    entered: tuple[str, ...]  # real folders with a link through which the path leads


class _Content(NamedTuple):
    path: str
    real: str
    files: list[str]
    links: set[str]  # those of the files that are links


def is_within(place: str, folder: str) -> bool:
    """Returns whether a real path is a folder or lies below it."""
    return place == folder or place.startswith(folder.rstrip(os.sep) + os.sep)


def walk(folder: str | os.PathLike[str], upward: list[str] | None = None) -> Iterator[_Content]:
    """Goes over a folder and those below it, hidden ones left out; each real folder comes once.

    Links to folders are followed after all else, so that a folder has the path with the fewest links, whatever links
    are added; those that lead to a folder above are not, and are added to `upward`.

    Raises:
        OSError: a folder cannot be read.
    """
    seen: set[str] = set()
    folders, links = deque([_Folder(os.fspath(folder), os.path.realpath(folder), ())]), deque[_Folder]()
    while folders or links:
        path, real, entered = (folders or links).popleft()
        if real in seen:
            continue
        seen.add(real)
        content = _Content(path, real, [], set())
        with os.scandir(path) as entries:
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
        for entry in visible:
            is_link = entry.is_symlink()
            if not _is_folder(entry):
                content.files.append(entry.name)
                if is_link:
                    content.links.add(entry.name)
                continue
            target = _Folder(entry.path, os.path.join(real, entry.name), entered)
            if not is_link:
                folders.append(target)
                continue
            target = _Folder(entry.path, os.path.realpath(entry.path), (*entered, real))
            if not any(is_within(place, target.real) for place in target.entered):
                links.append(target)
            elif upward is not None:
                upward.append(entry.path)
        yield content


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def find_files(folder: str | Path) -> FoundFiles:
    """Finds the files in a folder and in those below it, without hidden ones.

    Raises:
        OSError: a folder cannot be read.
    """
    found = FoundFiles()
    contents = sorted((content for content in walk(folder, found.upward) if content.files), key=lambda c: c.path)
    found.real.folders = {content.path: content.real for content in contents}
    real_files: set[str] = set()
    if any(content.links for content in contents):
        real_files = {
            os.path.join(content.real, name)
            for content in contents
            for name in content.files
            if name not in content.links
        }
    for content in contents:
        for name in content.files:
            path = os.path.join(content.path, name)
            if name in content.links:
                real = os.path.realpath(path)
                if real in real_files:
                    found.repeated.append(path)
                    continue
                real_files.add(real)
                found.real.links[path] = real
            found.paths.append(path)
    return found
