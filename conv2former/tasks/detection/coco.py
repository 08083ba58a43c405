"""COCO's JSON files, as COCO has them and as labelling tools write them: what is an object in them, or why not.

What pycocotools would take without a word and get wrong is refused by name: ids that come twice, of which it keeps the
last; objects of a category or an image that is not there; boxes with a negative side. A category without objects stays
a class, as in its list of categories, but for headings (`_headings`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.files import is_within
from ...errors import DataError, counted, shorten
from ..dense.splits import path_below
from .records import Noted, Records, check_box, check_number
from .shapes import read_shape

__all__ = ["read_coco"]

SAMPLE = 50  # images that are looked for in each folder, to find the one that they are in
EXPECTED = "a COCO file has lists of `images`, `annotations` and `categories`"
BACKGROUND = "_background_"  # labelme's, of which there are no objects
# by which other formats of labelling tools can be told: a key of theirs, and the tool
OTHERS = {"shapes": "labelme", "_via_img_metadata": "the VGG annotator", "regions": "the VGG annotator"}


def read_coco(path: Path, folders: Sequence[Path], root: Path, keeps_masks: bool) -> Records:
    """Reads a JSON file; images are only looked for.

    Args:
        path: of the file.
        folders: where its images may be: that is taken in which most of the first ones are.
        root: the data's, in which files with an absolute path must be.
        keeps_masks: whether masks are wanted.

    Raises:
        DataError: something in it is wrong; it is named by its id.
    """
    content = _load(path)
    images = _by_id(content["images"], "image", path)
    names, class_of = _categories(content, path)
    files = _Files(path, root, images, folders)
    noted = {key: Noted(keeps_masks) for key in images}
    seen: set[Any] = set()
    for place, annotation in enumerate(content["annotations"], 1):
        where = _where(path, annotation, place)
        if not isinstance(annotation, dict):
            raise DataError(
                f"{where}: not an object with `image_id`, `category_id` and `bbox`, but {_kind(annotation)}"
            )
        _check_new(annotation, seen, where)
        owner, category = (_id(annotation.get(key), key, where) for key in ("image_id", "category_id"))
        if owner not in images:
            raise DataError(f"{where}: is of image {owner!r}, which is not in `images`; remove it")
        if category not in class_of:
            raise DataError(
                f"{where}: has category {category!r}, which is none of `categories`, {shorten(class_of, 10)}; correct "
                "or remove it"
            )
        _add(noted[owner], annotation, class_of[category], where)
    records = []
    for key, image in images.items():
        file = files.path_of(key)
        record = noted[key].record(file, file, _size(image, _where(path, image, key, "image")))
        records.append(record._replace(number=key))
    used = {label for objects in noted.values() for label in objects.labels}
    return Records(
        records,
        names,
        category_ids={names[index]: key for key, index in class_of.items()},
        headings=_headings(content["categories"], {names[label] for label in used}),
    )


def _add(noted: Noted, annotation: Mapping[str, Any], label: int, where: str) -> None:
    """Adds an annotation to the objects of its image."""
    crowd, area = annotation.get("iscrowd") or 0, annotation.get("area")
    if crowd not in (0, 1, "0", "1"):
        raise DataError(f"{where}: iscrowd is {str(crowd)[:40]!r}; it is 0 or 1")
    is_crowd = bool(int(crowd))
    area = None if area is None else check_number(area, "its area", where)
    box = annotation.get("bbox")
    has_box = box not in (None, [])
    shape = read_shape(annotation.get("segmentation"), where) if noted.needs_mask(area) or not has_box else None
    if has_box:
        noted.add(check_box(box, where), label, is_crowd, area, shape)
    elif isinstance(shape, list):
        noted.add(_around(shape), label, is_crowd, area, shape)
    else:
        raise DataError(f"{where}: has no `bbox`; this file is not for detection, or was exported without boxes")


def _around(shape: Sequence[np.ndarray]) -> tuple[float, float, float, float]:
    """Returns the box around polygons."""
    left, top = (min(float(points[:, axis].min()) for points in shape) for axis in (0, 1))
    right, bottom = (max(float(points[:, axis].max()) for points in shape) for axis in (0, 1))
    return left, top, right, bottom


# ---------------------------------------------------------------------------------------------------------- the file


def _load(path: Path) -> dict[str, Any]:
    """Returns what a JSON file holds, a dictionary with the three lists.

    Raises:
        DataError: it cannot be read, or is no COCO file.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError, MemoryError) as e:
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e)[:200]
        raise DataError(f"{path}: not a JSON file in UTF-8 ({reason}); export it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a COCO file, but {_kind(content)}; {EXPECTED}")
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    if missing:
        inner = next(iter(content.values()), None)  # the VGG annotator's files are by image
        keys = {*content, *(inner if isinstance(inner, dict) else ())}
        tool = next((tool for key, tool in OTHERS.items() if key in keys), None)
        hint = f"; it looks like a file of {tool}, which can export COCO files" if tool else ""
        raise DataError(f"{path}: not a COCO file, as it has no list `{missing[0]}`: {EXPECTED}{hint}")
    if not content["images"]:
        raise DataError(f"{path}: `images` is empty")
    return content


def _kind(value: Any) -> str:
    return {list: "a list", dict: "a dictionary", str: "text", type(None): "nothing"}.get(type(value), "a number")


def _where(path: Path, entry: Any, place: Any, what: str = "annotation") -> str:
    found = entry.get("id") if isinstance(entry, dict) else None
    return f"{path}, {what} {f'number {place}' if found is None else str(found)[:40]}"


def _id(value: Any, what: str, where: str) -> int | str:
    """Returns an id: text that is a whole number is that number, as tools write the same id either way."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19 and str(int(value)) == value:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise DataError(f"{where}: {what} is {str(value)[:40]!r}; it is a whole number or text")
    return value


def _check_new(annotation: Mapping[str, Any], seen: set[Any], where: str) -> None:
    """Raises a DataError if an annotation has the id of one before it; it need not have one."""
    if annotation.get("id") is None:
        return
    key = _id(annotation["id"], "its id", where)
    if key in seen:
        raise DataError(
            f"{where}: a second annotation has this id, and the COCO tools would lose one of them; number them anew"
        )
    seen.add(key)


def _by_id(entries: Iterable[Any], what: str, path: Path) -> dict[int | str, dict[str, Any]]:
    """Returns images or categories by their ids.

    Raises:
        DataError: one is no dictionary, has no id, or that of another.
    """
    found: dict[int | str, dict[str, Any]] = {}
    for place, entry in enumerate(entries, 1):
        where = _where(path, entry, place, what)
        if not isinstance(entry, dict):
            raise DataError(f"{where}: not a dictionary, but {_kind(entry)}; {EXPECTED}")
        key = _id(entry.get("id"), "its id", where)
        if key in found:
            raise DataError(f"{where}: a second {what} has this id; number them anew, with what refers to them")
        found[key] = entry
    return found


def _categories(content: Mapping[str, Any], path: Path) -> tuple[list[str], dict[int | str, int]]:
    """Returns the names of the classes, in the order of their ids, and the class of each id.

    Of several categories of one name those without objects are left out: some tools add one for all others.

    Raises:
        DataError: a category has no name, or two with objects have one.
    """
    categories = _by_id(content["categories"], "category", path)
    if not categories:
        raise DataError(f"{path}: `categories` is empty; there is nothing to detect")
    named: dict[int | str, str] = {}
    for key, category in categories.items():
        name = category.get("name")
        if not isinstance(name, (str, int)) or isinstance(name, bool) or not _is_text(str(name)):
            raise DataError(f"{path}, category {key}: has no name, or one that is not UTF-8")
        named[key] = str(name).strip()
    order = sorted(named, key=lambda key: (isinstance(key, str), key))
    twice = {name for name, times in Counter(named.values()).items() if times > 1}
    if twice:
        used = {str(entry.get("category_id")) for entry in content["annotations"] if isinstance(entry, dict)}
        for name in sorted(twice):
            keys = [key for key in order if named[key] == name]
            there = [key for key in keys if str(key) in used]
            if len(there) > 1:
                raise DataError(f"{path}: categories {there[0]} and {there[1]} are both called '{name}'; rename one")
            order = [key for key in order if named[key] != name or key == (there or keys)[0]]
    return [named[key] for key in order], {key: index for index, key in enumerate(order)}


def _headings(categories: Iterable[Mapping[str, Any]], used: set[str]) -> frozenset[str]:
    """Returns the names of categories without objects that are the supercategory of others, or the background."""
    pairs = {(str(category.get("supercategory")).strip(), str(category["name"]).strip()) for category in categories}
    above = {group for group, name in pairs if group != name}
    return frozenset({name for _, name in pairs if name in above or name == BACKGROUND} - used)


def _is_text(text: str) -> bool:
    """Returns whether a text says something, and can be written: JSON can hold half a character."""
    try:
        return bool(text.strip()) and "\0" not in text and bool(text.encode())
    except UnicodeEncodeError:
        return False


def _size(image: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """Returns width and height as a file says them; None where it leaves them out, or has 0."""
    sides = []
    for key in ("width", "height"):
        value = image.get(key)
        side = 0.0 if value in (None, "") else check_number(value, key, where)
        if side < 0 or side != int(side):
            raise DataError(f"{where}: {key} is {side:g}; it is a whole number of pixels")
        sides.append(int(side))
    return (sides[0], sides[1]) if all(sides) else None


# -------------------------------------------------------------------------------------------------------- its images


class _Files:
    """Where the images of a file are.

    Where none is below any folder by the path that the file gives, they are looked for by their names alone: a tool may
    write the paths of its own server, as `../../label-studio/data/media/upload/4/NAME.jpg`.

    Args:
        json_path: of the file, for messages.
        root: the data's.
        images: by their ids.
        folders: in which they may be.

    Raises:
        DataError: two are one file, or a name leads elsewhere.
    """

    def __init__(
        self, json_path: Path, root: Path, images: Mapping[Any, Mapping[str, Any]], folders: Sequence[Path]
    ) -> None:
        self._json_path, self._root = json_path, root
        names = {key: self._name(key, image) for key, image in images.items()}
        folder, names = self._choose(folders, names)
        self._paths: dict[Any, str] = {}
        seen: dict[str, Any] = {}
        for key, name in names.items():
            path = self._path(folder, name, key)
            if path in seen:
                raise DataError(
                    f"{json_path}: images {seen[path]} and {key} are one file, {name}; number their annotations as one"
                )
            seen[path] = key
            self._paths[key] = path

    def path_of(self, key: Any) -> str:
        """Returns the path of an image, whether it exists or not."""
        return self._paths[key]

    def _name(self, key: Any, image: Mapping[str, Any]) -> str:
        name, where = image.get("file_name"), f"{self._json_path}, image {key}"
        if not isinstance(name, str) or not _is_text(name):
            raise DataError(f"{where}: has no `file_name`, or one that is no name of a file")
        if "://" in name:
            raise DataError(f"{where}: {name} is an address, and nothing is fetched; copy the image, and give its path")
        return name

    def _path(self, folder: Path, name: str, key: Any) -> str:
        where = f"{self._json_path}, image {key}"
        path = path_below(str(folder), name, where, "the folder of the images (data.train_images, data.val_images)")
        inside = (os.path.abspath(place) for place in (folder, self._root))
        if os.path.isabs(name) and not any(is_within(os.path.abspath(path), place) for place in inside):
            raise DataError(f"{where}: {name} lies outside the folder data.root; give its path relative to that")
        return path

    def _choose(self, folders: Sequence[Path], names: dict[Any, str]) -> tuple[Path, dict[Any, str]]:
        """Returns the folder in which most of the first images are, and their names in it.

        Raises:
            DataError: none of them is in any.
        """
        there = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
        bare = {key: re.split(r"[/\\]", name)[-1] for key, name in names.items()}
        for candidates in (names, bare) if len({*bare.values()}) == len(bare) else (names,):
            found = {folder: self._count(folder, candidates) for folder in there}
            if any(found.values()):
                return max(found, key=lambda folder: found[folder]), candidates
        first = next(iter(names))
        self._path(folders[0], names[first], first)  # it may lead elsewhere, which is said then
        raise DataError(
            f"{self._json_path}: none of its {counted(len(names), 'image')}, such as {names[first]}, is in "
            f"{shorten(there, 8) or shorten(folders, 8)}; give their folder (data.train_images, data.val_images)"
        )

    def _count(self, folder: Path, names: Mapping[Any, str]) -> int:
        """Returns how many of the first images are in a folder."""
        count = 0
        for key in [*names][:SAMPLE]:
            with contextlib.suppress(DataError):  # it leads elsewhere
                count += os.path.isfile(self._path(folder, names[key], key))
        return count
