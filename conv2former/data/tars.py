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

from ..errors import DataError, closest, shorten
from .images import IMAGE_ENDINGS, files_below, naming, open_rgb

__all__ = ["TarImages", "find_tars", "index_tars"]

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
        value_range: see `to_rgb`.
    """

    tars: list[str]
    labels: np.ndarray
    tar: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    name_ends: np.ndarray
    names: bytes
    value_range: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name = self.name(index)
        with naming(name), open(self.tars[self.tar[index]], "rb") as file:  # its own: workers share no position
            file.seek(self.offset[index])
            content = file.read(self.size[index])
        return open_rgb(content, name, self.value_range), int(self.labels[index])

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
    for path in files_below(root):
        *folders, file = Path(path).relative_to(root).parts
        ending = next((e for e in (".tar", *COMPRESSED) if file.lower().endswith(e)), None)
        if ending:
            for split in {*folders, *re.split(r"[-_.]", file[: -len(ending)])} - {""}:
                splits.setdefault(split, []).append(path)
    if not splits:
        raise DataError(f"{root} has no tars; expected {root}/SPLIT/*.tar or {root}/SPLIT-*.tar")
    return splits


def index_tars(
    tars: Sequence[str], label_key: str, value_range: tuple[float, float] | None = None
) -> tuple[TarImages, list[int | str]]:
    """Finds the samples of some tars: an image and a label under one name up to the first dot.

    Args:
        tars: paths.
        label_key: where a json member has the label; a .cls member is one.
        value_range: see `to_rgb`.

    Returns:
        The samples, and the labels as they are in the tars, sorted: `TarImages.labels` has indices into them. They are
        integers, or texts if some are.

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
    labels = sorted({kind(label) for label in codes})
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
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # tarfile would keep a kilobyte for each
            if member.isreg() and not member.issparse():
                yield _Member(member.name, member.offset_data, member.size)
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
    with open(path, "rb") as file:
        for member in _members(file, path):
            folder, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            ending = os.path.splitext(base)[1].lower()
            if not stem or ending not in (*IMAGE_ENDINGS, *LABEL_ENDINGS):
                continue
            sample = samples.setdefault(f"{folder}/{stem}", {})
            if f".{kind}".lower() == ending:  # unlike 000.mask.png, which is not the image of 000
                role = ending if ending in LABEL_ENDINGS else "image"
                if role in sample:
                    raise DataError(f"{path}, member {member.name}: its sample already has {sample[role].name}")
                sample[role] = member
        if not samples:
            raise DataError(f"{path} has no samples; expected members such as 000.jpg and 000.cls")
        for key, sample in samples.items():
            image, label = sample.get("image"), sample.get(".cls") or sample.get(".json")
            key = key.removeprefix("/")
            if image is None:
                raise DataError(f"{path}, member {key}.*: a sample without an image such as {key}.jpg")
            if label is None:
                raise DataError(f"{path}, member {image.name}: a sample without a label, {key}.cls or {key}.json")
            file.seek(label.offset)
            yield image, _label(file.read(label.size), label_key, f"{path}, member {label.name}")


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
        elif re.fullmatch("-?[0-9]+", label):
            label = int(label)
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise DataError(f"{where}: not readable as a label ({e})") from None
    if type(label) not in (int, str) or label == "":
        raise DataError(f"{where}: the label {label!r} is neither an integer nor a class name")
    return label
