"""WebDataset tars as a list of images: an index of where each one lies, so that any can be read at any time.

With it the order of an epoch and the place to resume at are as exact as for image folders. A tar is read once, header
by header, when it is opened; for a sample the index keeps about 30 bytes and the name.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from ..config.schema import DataConfig
from ..errors import DataError, closest, shorten
from ..text import shown
from .classes import in_class_order
from .files import RealFiles, find_files
from .images import IMAGE_ENDINGS, UNREAD_ENDINGS, naming, open_rgb, unread_hint
from .split import Choice, DataSource, UnlabelledSplit, check_single_label, choose_split, match_listed
from .tables import read_class_list

__all__ = ["TarImages", "TarSplits", "find_tars", "index_tars"]

MAX_LABEL = 10**9
MAX_LABEL_BYTES = 1 << 24  # of a .cls or .json member
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # of gzip, bzip2, xz and Zstandard
LABEL_ENDINGS = (".cls", ".json")
END_BYTES = 1 << 20  # tar programs fill up to this at most after the last member


@dataclass(frozen=True)
class TarImages:
    """The samples of a list of tars, in their order.

    Attributes:
        tars: paths.
        labels: (samples,) int32, a class index for each.
        tar: (samples,) int32, an index into `tars`.
        offset, size: (samples,) int64, where the image lies in its tar, in bytes.
        name_ends: (samples,) int64, where the image member's name ends in `names`.
        names: all the names, one after the other, in UTF-8.
        value_range, max_pixels: see `open_rgb`.
    """

    tars: list[str]
    labels: np.ndarray
    tar: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    name_ends: np.ndarray
    names: bytes
    value_range: tuple[float, float] | None = None
    max_pixels: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name = self.name(index)
        with naming(name), open(self.tars[self.tar[index]], "rb") as file:  # its own: workers share no position
            file.seek(self.offset[index])
            content = file.read(self.size[index])
        return open_rgb(content, name, self.value_range, self.max_pixels), int(self.labels[index])

    def name(self, index: int) -> str:
        """Returns what to call a sample in messages: `TAR, member NAME`."""
        start = self.name_ends[index - 1] if index else 0
        member = self.names[start : self.name_ends[index]].decode(errors="surrogateescape")
        return f"{self.tars[self.tar[index]]}, member {member}"

    def relabel(self, classes: Sequence[int]) -> TarImages:
        """Returns the same samples with `classes[label]` for each label."""
        return replace(self, labels=np.asarray(classes, dtype=np.int32)[self.labels])


def find_tars(root: Path) -> dict[str, list[str]]:
    """Returns the tars below a folder by the splits that they may belong to, sorted.

    A tar belongs to a split if a folder between it and `root` is named so, or a word of its own name, split at `-_.`.

    Raises:
        OSError: a folder cannot be read.
        DataError: there is no tar.
    """
    splits: dict[str, list[str]] = {}
    for path in find_files(root).paths:
        *folders, file = Path(path).relative_to(root).parts
        ending = next((e for e in (".tar", *COMPRESSED) if file.lower().endswith(e)), None)
        if ending:
            for split in {*folders, *re.split(r"[-_.]", file[: -len(ending)])} - {""}:
                splits.setdefault(split, []).append(path)
    if not splits:
        raise DataError(f"{root} has no tars; expected {root}/SPLIT/*.tar or {root}/SPLIT-*.tar")
    return splits


def index_tars(
    tars: Sequence[str],
    label_key: str,
    value_range: tuple[float, float] | None = None,
    max_pixels: int | None = None,
) -> tuple[TarImages, list[int | str]]:
    """Finds the samples of some tars: an image and a label under one name up to the first dot.

    Args:
        tars: paths.
        label_key: where a json member has the label; a .cls member is one.
        value_range, max_pixels: see `open_rgb`.

    Returns:
        The samples, and the labels as they are in the tars, in class order: `TarImages.labels` has indices into them.
        They are integers, or texts if some are.

    Raises:
        DataError: a tar is compressed, damaged or without samples, or a sample without an image or a label.
    """
    codes: dict[int | str, int] = {}  # by first appearance
    tar_of, label_of = array("i"), array("i")
    offset, size, name_ends = array("q"), array("q"), array("q")
    names = bytearray()
    for number, path in enumerate(tars):
        try:
            for image, label in _samples(path, label_key):
                tar_of.append(number)
                label_of.append(codes.setdefault(label, len(codes)))
                offset.append(image.offset)
                size.append(image.size)
                names += image.name.encode(errors="surrogateescape")
                name_ends.append(len(names))
        except (OSError, tarfile.TarError) as e:
            raise DataError(f"{path}: not a readable tar ({e}); copy or write it again") from None
    kind = str if any(isinstance(label, str) for label in codes) else int
    distinct = {kind(label) for label in codes}
    labels: list[int | str] = sorted(distinct) if kind is int else list(in_class_order(map(str, distinct)))
    rank = {label: i for i, label in enumerate(labels)}
    images = TarImages(
        tars=list(tars),
        labels=np.asarray(label_of),
        tar=np.asarray(tar_of),
        offset=np.asarray(offset),
        size=np.asarray(size),
        name_ends=np.asarray(name_ends),
        names=bytes(names),
        value_range=value_range,
        max_pixels=max_pixels,
    )
    return images.relabel([rank[kind(label)] for label in codes]), labels


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def _members(file: IO[bytes], path: str) -> Iterator[_Member]:
    """Goes over the files in a tar, without links, folders and the hidden files of some systems."""
    if file.read(6).startswith(MAGIC):
        raise DataError(f"{path} is compressed, so that no image in it can be reached alone; unpack it to a .tar")
    file.seek(0)
    end = 0
    has_members = any(file.read(tarfile.BLOCKSIZE))  # where there are none, Python 3.10 looks for them before the file
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while has_members and (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # tarfile would keep a kilobyte for each
            if member.isreg() and not member.issparse():
                yield _Member(member.name, member.offset_data, member.size)
            end = tar.offset
        end = tar.offset
    # A broken header, or none, is the end for tarfile. The true end is zeros, at least one block of them.
    file.seek(end)
    rest = file.read(END_BYTES)
    if len(rest) < tarfile.BLOCKSIZE:
        raise DataError(f"{path} has no end marker, so it is cut off; copy or write it again")
    if any(rest):
        raise DataError(f"{path} is damaged at byte {end}, or tars were joined there; copy or write it again")


def _samples(path: str, label_key: str) -> Iterator[tuple[_Member, int | str]]:
    """Goes over the samples of one tar, in the order of their first members: the image and the label of each."""
    samples: dict[str, dict[str, _Member]] = {}  # by name up to the first dot: the image, .cls and .json
    others: dict[str, str] = {}  # by the same, the name of a member that is none of them
    with open(path, "rb") as file:
        for member in _members(file, path):
            folder, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            ending = os.path.splitext(base)[1].lower()
            if not stem or ending not in (*IMAGE_ENDINGS, *LABEL_ENDINGS, *UNREAD_ENDINGS):
                continue
            key = f"{folder}/{stem}"
            if ending in UNREAD_ENDINGS:
                others.setdefault(key, member.name)
                continue
            sample = samples.setdefault(key, {})
            if f".{kind}".lower() == ending:  # unlike 000.mask.png, which is not the image of 000
                role = ending if ending in LABEL_ENDINGS else "image"
                if role in sample:
                    raise DataError(f"{path}, member {member.name}: its sample already has {sample[role].name}")
                sample[role] = member
            else:
                others.setdefault(key, member.name)
        if not samples:
            raise DataError(
                f"{path} has no samples; expected members such as 000.jpg and 000.cls"
                f"{unread_hint(os.path.splitext(name)[1] for name in others.values())}"
            )
        for key, sample in samples.items():
            image, label = sample.get("image"), sample.get(".cls") or sample.get(".json")
            hint = _key_hint(others.get(key, ""))
            key = key.removeprefix("/")
            if image is None:
                raise DataError(f"{path}, member {key}.*: a sample without an image such as {key}.jpg{hint}")
            if label is None:
                raise UnlabelledSplit(
                    f"{path}, member {image.name}: a sample without a label, {key}.cls or {key}.json{hint}"
                )
            if label.size > MAX_LABEL_BYTES:
                raise DataError(f"{path}, member {label.name}: {label.size:,} bytes are too many for a label")
            file.seek(label.offset)
            yield image, _label(file.read(label.size), label_key, f"{path}, member {label.name}")


def _key_hint(member: str) -> str:
    """Returns why a member does not count as a sample's image or label; nothing for no member."""
    base = member.rpartition("/")[2]
    stem, _, kind = base.partition(".")
    if not member or kind.count(".") == 0:
        return unread_hint([f".{kind}"])
    return (
        f"; a sample's name ends at the first dot, as in WebDataset, so {base} is the '{kind}' of the sample '{stem}'; "
        "write the names without other dots"
    )


def _label(content: bytes, label_key: str, where: str) -> int | str:
    """Reads a .cls or .json member: an integer, or a class name."""
    label: Any
    try:
        label = content.decode("utf-8-sig").strip()
        if where.lower().endswith(".json"):
            label = json.loads(label)
            keys = list(label) if isinstance(label, dict) else []
            if label_key not in keys:
                raise DataError(
                    f"{where} has no key '{label_key}' (data.label_key){closest(label_key, keys)}: "
                    f"it has {shorten(keys) or 'none'}"
                )
            label = label[label_key]
            label = label.strip() if isinstance(label, str) else label
            str(label).encode()  # JSON may hold half a character, which could not be stored or shown
        elif re.fullmatch("-?[0-9]+", label):
            label = int(label)
    except (ValueError, RecursionError) as e:  # also a number of thousands of digits, and lists in lists in lists
        raise DataError(f"{where}: not readable as a label ({e})") from None
    if type(label) is int and abs(label) > MAX_LABEL:
        raise DataError(f"{where}: the label {str(label)[:20]}... is too large for the index of a class")
    if label == -1 or label is None or label == "":
        raise UnlabelledSplit(f"{where}: no label ({label!r})")
    if type(label) not in (int, str):
        raise DataError(f"{where}: the label {shown(label)} is neither an integer nor a class name")
    if type(label) is int and label < 0:
        raise DataError(f"{where}: the label {label} is below 0, so it is not the index of a class")
    return label


@dataclass(frozen=True)
class TarSplits:
    """The splits of the tars in `config.root`; see `Splits`.

    Attributes:
        tars: by the splits that they may belong to, as `find_tars` returns them.
    """

    config: DataConfig
    tars: dict[str, list[str]]

    @property
    def is_whole(self) -> bool:
        return False

    def choose(self, wanted: str | None) -> Choice:
        return choose_split(wanted, self._names(wanted), Path(self.config.root))

    def others(self, train: str) -> list[str]:
        of_train = set(self.tars.get(train, []))
        return [name for name in self._names() if name != train and not set(self.tars[name]) <= of_train]

    def open(self, name: str, class_names: list[str] | None) -> DataSource:
        return _open_tars(self.config, name, self.tars[name], class_names)

    def _names(self, wanted: str | None = None) -> list[str]:
        """Returns what may be splits, sorted; numbers of shards are none, unless one is asked for."""
        return [word for word in sorted(self.tars) if word == wanted or not word.isdigit()]


def _open_tars(config: DataConfig, split: str, tars: Sequence[str], class_names: list[str] | None) -> DataSource:
    root = Path(config.root)
    name = f"{root} ({split})"
    images, labels = index_tars(tars, config.label_key, config.value_range, config.max_image_pixels)
    found = [str(label) for label in labels]
    for text in found:
        check_single_label(text, found, class_names or (), name)
    listed = _listed_classes(root) if config.class_names is None else []
    for i, label in enumerate(labels):
        if listed and isinstance(label, int):
            if not 0 <= label < len(listed):
                where = images.name(int((images.labels == i).argmax()))
                raise DataError(f"{where}: class {label} of the {len(listed)} in {root}'s list of class names")
            found[i] = listed[label]
    names = class_names or listed or found
    real_files = RealFiles()
    for tar in images.tars:
        real_files.add(tar)
    images = images.relabel(match_listed(config, found, names, name))
    return DataSource(images, names, name, files=images.tars, real_files=real_files)


def _listed_classes(root: Path) -> list[str]:
    """Returns the class names that a file beside the tars lists, one a line, or an empty list if there is none."""
    files = (root / "classnames.txt", root / "classes.txt")
    return next((read_class_list(file) for file in files if file.is_file()), [])
