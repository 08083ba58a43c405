"""Pascal VOC's XML files: one for each image.

Coordinates in them count pixels from 1, and the right and lower ones are of the last pixel inside, so that a box from 1
to an image's width covers it; here it is from 0 to the width. What is `difficult` is not trained on and counts neither
as right nor as wrong, as in VOC's own evaluation.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...data.classes import in_class_order
from ...data.files import find_files
from ...data.folders import folders_in
from ...data.images import IMAGE_ENDINGS
from ...data.split import SPLIT_NAMES
from ...data.tables import read_class_list
from ...errors import DataError, counted, shorten
from ..dense.splits import Opened, Splits
from .config import DetectionData
from .records import Noted, Records, check_number

__all__ = ["voc_splits"]

# folders that say of a file what it is, and not to which split it belongs
PLAIN = {"jpegimages", "images", "imgs", "annotations", "labels", "xmls", "xml"}
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MOST_BYTES = 50_000_000  # of an XML file


def voc_splits(data: DetectionData, keeps_masks: bool) -> Splits:
    """Returns the splits of a data set with XML files: ImageSets/Main/SPLIT.txt, or folders of images and XML files.

    Raises:
        DataError: there are none, or two files have one name.
    """
    root = _root_in(Path(data.root))
    photos, annotations = _by_name(root)
    if not annotations:
        raise DataError(
            f"{root} has no XML files, which VOC's sets have in the folder Annotations or beside the images"
        )
    lists = _lists(root)
    splits = dict.fromkeys(lists) or _folders_of(photos, annotations, data)
    listed = root / "classes.txt"
    classes = read_class_list(listed) if listed.is_file() else None

    def open_(name: str) -> Opened:
        where = str(lists[name] if name in lists else root / name)
        if name in lists:
            names = _names_in(lists[name])
        else:
            start = "" if name == "." else f"{name}/"
            names = [key for key in photos if key.startswith(start)]
        found = _photos_of(names, photos, annotations, where)
        return Opened(_records(found, classes, keeps_masks), where)

    return Splits(data, [*splits], open_)


def _records(files: Sequence[tuple[str, str]], classes: list[str] | None, keeps_masks: bool) -> Records:
    """Reads XML files.

    Args:
        files: the path of each image, and of its annotations.
        classes: their list; None for those that the objects have.
        keeps_masks: see `Noted`.
    """
    read = [_read_xml(path) for _, path in files]
    found = {name for objects, _ in read for name, *_ in objects}
    names = classes or in_class_order(found)
    place = {name: index for index, name in enumerate(names)}
    records = []
    for (photo, path), (objects, size) in zip(files, read, strict=True):
        noted = Noted(keeps_masks)
        for name, box, is_difficult in objects:
            if name not in place:
                raise DataError(f"{path}: the class '{name}' is not in classes.txt, which has {shorten(names, 10)}")
            noted.add(box, place[name], is_difficult)
        records.append(noted.record(photo, photo, size))
    return Records(records, names, classes is not None)


# ----------------------------------------------------------------------------------------------------------- one file

_Object = tuple[str, tuple[float, float, float, float], bool]  # its class, its box, whether it is difficult


class _NoDoctype(ElementTree.TreeBuilder):
    """Builds a tree, and refuses a document type: its entities may be made to fill the memory."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("a document type (DOCTYPE), which is not read")


def _read_xml(path: str) -> tuple[list[_Object], tuple[int, int] | None]:
    """Returns the objects of a file, and width and height of its image if it says them.

    Raises:
        DataError: it cannot be read, or an object in it is wrong.
    """
    try:
        if os.path.getsize(path) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        parser = ElementTree.XMLParser(target=_NoDoctype())
        parser.feed(Path(path).read_bytes())
        tree = parser.close()
    except (ElementTree.ParseError, ValueError, LookupError) as e:  # LookupError: an encoding that does not exist
        raise DataError(f"{path}: not an XML file ({str(e)[:200]}); export it again") from None
    if tree.tag != "annotation":
        raise DataError(f"{path}: not a file of Pascal VOC: its outermost element is <{tree.tag}>, not <annotation>")
    found = [_read_object(element, f"{path}, object {i}") for i, element in enumerate(tree.findall("object"), 1)]
    sides = [check_number(_text(tree, f"size/{key}") or 0, f"its {key}", path) for key in ("width", "height")]
    if any(side < 0 or side != int(side) for side in sides):
        raise DataError(f"{path}: a size of {sides[0]:g} x {sides[1]:g} pixels")
    return found, (int(sides[0]), int(sides[1])) if all(sides) else None


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _read_object(element: ElementTree.Element, where: str) -> _Object:
    name = _text(element, "name")
    if not name:
        raise DataError(f"{where}: has no <name>")
    if element.find("bndbox") is None:
        raise DataError(f"{where} ({name}): has no <bndbox>; only boxes are read from VOC's files")
    left, top, right, bottom = (check_number(_text(element, f"bndbox/{key}"), key, where) for key in CORNERS)
    if right < left or bottom < top:
        raise DataError(f"{where} ({name}): from {left:g}, {top:g} to {right:g}, {bottom:g}; correct or remove it")
    return name, (left - 1, top - 1, right, bottom), _text(element, "difficult") in ("1", "true", "True")


# ------------------------------------------------------------------------------------------------------- which files


def _root_in(root: Path) -> Path:
    """Returns the folder of a data set: the only one with Annotations in a VOCdevkit, else that folder itself.

    Raises:
        DataError: it has several.
    """
    inner = [name for name in folders_in(root) if (root / name / "Annotations").is_dir()]
    inner = [name for name in inner if (root / name / "ImageSets").is_dir()]
    if len(inner) > 1:
        raise DataError(
            f"{root} has {shorten(inner, 5)}, each a set of its own; choose one: data.root={root / inner[0]}"
        )
    return root / inner[0] if inner else root


def _by_name(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the images and the XML files below a folder by what their names have in common.

    That is the path below the folder without its ending, and without folders that are called as in `PLAIN`.
    """
    photos: dict[str, str] = {}
    annotations: dict[str, str] = {}
    for path in find_files(root).paths:
        stem, ending = os.path.splitext(os.path.relpath(path, root))
        *folders, name = stem.split(os.sep)
        key = "/".join([*(folder for folder in folders if folder.lower() not in PLAIN), name])
        if ending.lower() not in (*IMAGE_ENDINGS, ".xml"):
            continue
        found = annotations if ending.lower() == ".xml" else photos
        if key in found:
            raise DataError(f"{found[key]} and {path} have one name, and it is not said which is meant; remove one")
        found[key] = path
    return photos, annotations


def _lists(root: Path) -> dict[str, Path]:
    """Returns the text files of splits, without those that say for one class which images have it."""
    found = {path.stem: path for path in sorted((root / "ImageSets" / "Main").glob("*.txt"))}
    return {name: path for name, path in found.items() if len(_first_line(path).split()) < 2}


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline(10_000).decode("utf-8", "replace")


def _names_in(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8-sig").split()
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8") from None


def _folders_of(photos: Mapping[str, str], annotations: Mapping[str, str], data: DetectionData) -> dict[str, None]:
    """Returns the names of the folders that are splits; '.' where there are none."""
    folders = {key.split("/")[0] for key in photos if "/" in key} & {key.split("/")[0] for key in annotations}
    wanted = {*SPLIT_NAMES, *filter(None, (data.train_split, data.val_split))}
    return dict.fromkeys(sorted(folders)) if folders & wanted else {".": None}


def _photos_of(
    names: Sequence[str], photos: Mapping[str, str], annotations: Mapping[str, str], where: str
) -> list[tuple[str, str]]:
    """Returns the image and the XML file of each name.

    Raises:
        DataError: one is missing, or named twice.
    """
    for what, files in (("image", photos), ("XML file", annotations)):
        missing = [name for name in names if name not in files]
        if missing:
            more = f", as {counted(len(missing) - 1, 'other')}" if len(missing) > 1 else ""
            hint = "; one of an image without objects has no <object> in it" if what == "XML file" else ""
            raise DataError(f"{where}: {missing[0]} has no {what}{more}{hint}")
    if len({*names}) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise DataError(f"{where}: {twice} stands twice in it")
    return [(photos[name], annotations[name]) for name in names]
