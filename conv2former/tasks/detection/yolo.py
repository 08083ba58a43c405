"""YOLO's text files: a line for each object, its class and its box, or a polygon around it, in shares of the image.

An image has a file of its name with the ending .txt: below `labels`, where its own path has `images`, otherwise beside
it. Where there is none, the image has no objects. A YAML file, or Darknet's obj.data, says which images there are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..._yaml import read_yaml
from ...data.files import find_files, is_within
from ...data.folders import folders_in, has_images
from ...data.images import IMAGE_ENDINGS
from ...data.split import SPLIT_NAMES
from ...data.tables import read_class_list
from ...errors import ConfigError, DataError, closest, counted, shorten
from ..dense.splits import Opened, Splits
from .config import DetectionData
from .records import Noted, Records, check_number

__all__ = ["DESCRIPTIONS", "yolo_splits"]

# of class names, where there is no YAML file; LabelImg writes one into each folder of labels
LISTS = ("classes.txt", "labels/classes.txt", "obj.names", "*/classes.txt", "labels/*/classes.txt")
DESCRIPTIONS = (".yaml", ".yml", ".data")  # endings of files that say what a data set has
FURTHEST = 0.5  # share of a side by which a coordinate may lie outside; beyond, it is in pixels or damaged


def yolo_splits(data: DetectionData, keeps_masks: bool) -> Splits:
    """Returns the splits of a data set with YOLO's text files.

    Raises:
        DataError: nothing names the classes, or there are no images.
    """
    root = Path(data.root)
    path = root if root.is_file() else _description_of(root)
    root = root.parent if root.is_file() else root
    content = {} if path is None else _read(path)
    names = _names(data, root, path, content)
    listed = {name: places for name, places in content.items() if places and str(name).lower() in SPLIT_NAMES}
    folders = {} if listed else _folders(root)

    def open_(name: str) -> Opened:
        if path is not None and listed:
            images, where = _listed(root, path, content, name), f"{path} ({name})"
        else:
            images, where = _images_in(folders[name]), str(folders[name])
        return Opened(_records(images, root, names, where, keeps_masks), where)

    return Splits(data, [*(listed or folders)], open_)


def _records(images: Sequence[str], root: Path, names: list[str], where: str, keeps_masks: bool) -> Records:
    """Reads the labels of images.

    Raises:
        DataError: a line is wrong, or not one image has labels.
    """
    records, there = [], 0
    for image in images:
        labels, noted = _labels_of(image, root), Noted(keeps_masks)
        if os.path.isfile(labels):
            there += 1
            _read_labels(labels, names, noted)
        records.append(noted.record(image, image, are_shares=True))
    if images and not there:
        raise DataError(
            f"{where}: not one of its {counted(len(images), 'image')} has a text file of labels; that of {images[0]} "
            f"would be {_labels_of(images[0], root)}"
        )
    return Records(records, names)


def _labels_of(image: str, root: Path) -> str:
    """Returns the path of an image's labels: the last folder `images` below the root is `labels` in it."""
    parts = os.path.splitext(os.path.relpath(image, root))[0].split(os.sep)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return f"{os.path.join(root, *parts)}.txt"


def _read_labels(path: str, names: Sequence[str], noted: Noted) -> None:
    """Adds the objects of a text file.

    Raises:
        DataError: it cannot be read, or a line of it is wrong.
    """
    for number, line in enumerate(_lines_of(Path(path)), 1):
        words, where = line.split(), f"{path}, line {number}"
        if not words:
            continue
        values = [check_number(word, "a number of it", where) for word in words]
        label = values[0]
        if label != int(label) or not 0 <= label < len(names):
            raise DataError(
                f"{where}: class {words[0]}, and there are {counted(len(names), 'name')}, for 0 to {len(names) - 1}"
            )
        if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
            raise DataError(
                f"{where}: {counted(len(values), 'number')}; a line is a class, the box's middle in x and y, its width "
                "and its height, or a class and x and y of three points or more"
            )
        if not all(-FURTHEST <= value <= 1 + FURTHEST for value in values[1:]):
            raise DataError(f"{where}: coordinates are shares of the image's sides, from 0 to 1; export it again")
        if len(values) == 5:
            x, y, width, height = values[1:]
            if width < 0 or height < 0:
                raise DataError(f"{where}: a box with a negative side; correct or remove it")
            noted.add((x - width / 2, y - height / 2, x + width / 2, y + height / 2), int(label))
        else:
            points = np.array(values[1:], dtype=np.float64).reshape(-1, 2)
            noted.add((*points.min(0), *points.max(0)), int(label), shape=[points])


# ---------------------------------------------------------------------------------------------------- YAML and classes


def _description_of(root: Path) -> Path | None:
    """Returns the YAML file that describes a data set, or Darknet's file, if there is one."""
    found = sorted({*root.glob("*.yaml"), *root.glob("*.yml")})
    named = [path for path in found if path.stem in ("data", "dataset")]
    if len(named or found) > 1:
        raise DataError(
            f"{root}: {shorten([path.name for path in named or found], 5)} could each describe it; keep one"
        )
    darknet = root / "obj.data"
    return next(iter(named or found), darknet if darknet.is_file() else None)


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".data":  # names are in obj.names
        pairs = (line.partition("=") for line in _lines_of(path))
        return {key.strip(): value.strip() for key, _, value in pairs if key.strip() != "names"}
    try:
        content = read_yaml(path)
    except ConfigError as e:
        raise DataError(*e.args) from None
    if "kpt_shape" in content:
        raise DataError(f"{path}: `kpt_shape` says that labels are poses, which are not read; export boxes or polygons")
    return content


def _lines_of(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8") from None


def _names(data: DetectionData, root: Path, path: Path | None, content: Mapping[Any, Any]) -> list[str]:
    """Returns the names of the classes.

    Raises:
        DataError: nothing names them, or not all of them.
    """
    names = content.get("names")
    if names is None:
        listed = Path(data.class_names) if data.class_names else _list_in(root)
        if listed is None:
            raise DataError(
                f"{root}: nothing names the classes; expected a data.yaml with `names`, or their names, one a line, in "
                f"{root / 'classes.txt'} or another file (data.class_names)"
            )
        return read_class_list(listed)
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise DataError(f"{path}: `names` has {shorten(names, 10)} for classes; they are 0, 1, 2 and so on")
        names = [value for _, value in sorted(names.items(), key=lambda item: int(item[0]))]
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, int, float)) for name in names):
        raise DataError(f"{path}: `names` is no list of class names")
    names = [str(name).strip() for name in names]
    if twice := sorted({name for name in names if names.count(name) > 1 or not name}):
        raise DataError(f"{path}: `names` has '{twice[0]}' {'empty' if not twice[0] else 'twice'}; rename one")
    if content.get("nc") not in (None, len(names)):
        raise DataError(f"{path}: `nc` is {str(content['nc'])[:20]}, and `names` has {len(names)}")
    return names


def _list_in(root: Path) -> Path | None:
    """Returns the file that lists the classes' names, if there is one.

    Raises:
        DataError: two folders have different ones.
    """
    for pattern in LISTS:
        files = sorted(root.glob(pattern))
        other = next((file for file in files if file.read_bytes().split() != files[0].read_bytes().split()), None)
        if other is not None:
            raise DataError(f"{files[0]} and {other} list other classes; give the right list (data.class_names)")
        if files:
            return files[0]
    return None


# ---------------------------------------------------------------------------------------------------------- the images


def _listed(root: Path, yaml: Path, content: Mapping[str, Any], split: str) -> list[str]:
    """Returns the images of a split as a YAML file has it: a folder, or a text file of paths, or several of these."""
    places, base = content[split], root
    inner = content.get("path")
    if isinstance(inner, str) and "\0" not in inner and (root / inner).is_dir():
        base = root / inner
    found: dict[str, None] = {}
    for place in places if isinstance(places, list) else [places]:
        if not isinstance(place, str) or not place.strip() or "\0" in place:
            raise DataError(f"{yaml}: `{split}` is no path, or list of paths")
        path = _place(root, base, place, f"{yaml}, `{split}`")
        found |= dict.fromkeys(_lines(root, path, base) if path.suffix == ".txt" else _images_in(path))
    return [*found]


def _place(root: Path, base: Path, text: str, where: str) -> Path:
    """Returns a folder or file that is named relative to `base`; see `_as_moved`.

    Raises:
        DataError: it is not there, or outside of the data's root.
    """
    for path in (base / written for written in _as_moved(text)):
        if is_within(os.path.abspath(path), os.path.abspath(root)) and path.exists():
            return Path(os.path.normpath(path))
    raise DataError(f"{where}: {text.strip()} is not in {base}; paths are relative to it, and lie below data.root")


def _as_moved(text: str) -> list[str]:
    """Returns a path as it is written, and what it may be for a data set that was made elsewhere.

    That is without its first folders, one after another: of `/content/pets/train/images` and of `../train/images`, as
    some tools write for a folder beside the YAML file, `train/images` remains. Darknet's paths begin with `data`.
    """
    text = text.strip().replace("\\", "/")
    parts = text.split("/")
    if parts[0] not in ("", "..", "data") and not re.fullmatch(r"[A-Za-z]:", parts[0]):
        return [text]
    return [text, *("/".join(parts[i:]) for i in range(1, len(parts)) if parts[i] not in ("", ".", ".."))]


def _lines(root: Path, path: Path, base: Path) -> list[str]:
    """Returns the images that a text file lists, relative to its folder or to `base`."""
    return [
        _listed_image(line.strip(), (path.parent, base), root, f"{path}, line {number}")
        for number, line in enumerate(_lines_of(path), 1)
        if line.strip()
    ]


def _listed_image(text: str, bases: Sequence[Path], root: Path, where: str) -> str:
    """Returns the path of an image that is named relative to one of some folders; see `_as_moved`.

    Raises:
        DataError: it is not there, or outside of the data's root.
    """

    def inside(written: str) -> list[str]:
        places = [os.path.normpath(base / written) for base in bases]
        return [place for place in places if is_within(os.path.abspath(place), os.path.abspath(root))]

    if "\0" not in text:
        image = next((place for written in _as_moved(text) for place in inside(written) if os.path.isfile(place)), None)
        if image is not None:
            return image
        if as_written := inside(text.replace("\\", "/")):
            raise DataError(f"{where}: no such file: {as_written[0]}")
    raise DataError(f"{where}: {text[:200]} lies outside of data.root")


def _images_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no folder of images")
    found = [path for path in find_files(folder).paths if path.lower().endswith(IMAGE_ENDINGS)]
    if not found:
        raise DataError(f"{folder} has no images; they end in {', '.join(IMAGE_ENDINGS)}")
    return found


def _folders(root: Path) -> dict[str, Path]:
    """Returns the folder of images of each split, where no YAML file says them.

    Raises:
        DataError: there are none.
    """
    there = folders_in(root)
    inner = folders_in(root / "images") if "images" in there else []
    if {*inner} & {*SPLIT_NAMES}:
        return {name: root / "images" / name for name in inner}
    beside = {name: root / name / "images" for name in there if (root / name / "images").is_dir()}
    if beside:
        return beside
    if "images" in there:
        return {".": root / "images"}
    if plain := {name: root / name for name in SPLIT_NAMES if name in there}:
        return plain
    if has_images(root):
        return {".": root}
    raise DataError(
        f"{root} has no images as YOLO's sets have them{closest('images', there)}; expected a data.yaml with `train` "
        f"and `val`, or {root}/images/SPLIT/NAME.jpg and {root}/labels/SPLIT/NAME.txt"
    )
