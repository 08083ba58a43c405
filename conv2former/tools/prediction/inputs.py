"""Which images a user means, and what is said of those that cannot be read."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ...config.base import BaseDataConfig
from ...data import Skipped
from ...data.files import find_files
from ...data.images import IMAGE_ENDINGS, UnreadableImage, any_size, open_rgb, unread_hint
from ...data.loader import Loader, workers_for
from ...data.workers import Sent, portable_errors
from ...errors import DataError, bullets, counted

__all__ = ["STANDARD_INPUT", "ImageFile", "OpenedImages", "find_images", "raise_unreadable"]

STANDARD_INPUT = "-"


class ImageFile(NamedTuple):
    """An image to read: what to call it, and its path or its bytes."""

    name: str
    file: str | bytes


class OpenedImages(Dataset):
    """Images that a user names, for a loader's workers; those that cannot be read are `Skipped`.

    Args:
        images: see `find_images`.
        data: how files are read: `value_range`, `max_image_pixels`, `workers`.
    """

    def __init__(self, images: Sequence[ImageFile], data: BaseDataConfig) -> None:
        self.images, self.data = images, data

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        name, file = self.images[index]
        shown = "standard input" if name == STANDARD_INPUT else name
        try:
            image = open_rgb(file, shown, self.data.value_range, self.data.max_image_pixels)
        except UnreadableImage as e:
            return Skipped(name, str(e))
        with portable_errors(), any_size():
            return self.loaded(name, image)

    def loaded(self, name: str, image: Image.Image) -> Any:
        """Returns what the network needs of an image."""
        raise NotImplementedError

    def loader(self, batch_size: int, few: int) -> DataLoader:
        """Returns a loader of lists; fewer than `few` batches are read without worker processes."""
        count = -(-len(self) // batch_size)
        workers = 0 if count < few else min(workers_for(self.data), count, os.cpu_count() or 1)
        return Loader(cast(Any, self), batch_size=batch_size, num_workers=workers, collate_fn=Sent(list))


def find_images(inputs: Sequence[str]) -> list[ImageFile]:
    """Finds the images that a user names, in that order, each once.

    Args:
        inputs: image files, whatever their names end with; folders, of which all images in and below are taken; glob
            patterns, of whose matches folders and images are; '-' for one image on standard input, which is read here.

    Raises:
        DataError: one of them does not exist, matches nothing or has no image.
    """
    found: dict[str, ImageFile] = {}
    for text in inputs:
        is_folder = os.path.isdir(text)
        for image in _images_of(text):
            found.setdefault(_key_of(image, is_folder), image)
    return list(found.values())


def _key_of(image: ImageFile, is_folder: bool) -> str:
    """Returns what is the same for one image; a link counts as one of its own only where the user names it."""
    if isinstance(image.file, bytes):
        return image.name
    if is_folder:
        return os.path.realpath(image.file)
    folder, name = os.path.split(image.file)
    return os.path.join(os.path.realpath(folder), name)


def _images_of(text: str) -> Iterator[ImageFile]:
    if text == STANDARD_INPUT:
        yield _read_standard_input()
    elif os.path.isdir(text):
        yield from _images_in(text)
    elif os.path.lexists(text):
        yield ImageFile(text, text)
    elif glob.has_magic(text):
        matches = sorted(glob.glob(text, recursive=True))
        images = [image for match in matches if os.path.isdir(match) for image in _images_in(match, required=False)]
        images += [ImageFile(match, match) for match in matches if _is_image(match) and not os.path.isdir(match)]
        if not images:
            others = f"; {counted(len(matches), 'match', 'matches')} without an image's ending" if matches else ""
            hint = unread_hint(os.path.splitext(match)[1] for match in matches)
            raise DataError(f"{text}: no image matches{others}{hint}")
        yield from sorted(images)
    else:
        raise DataError(f"{text}: no such file or folder")


def _images_in(folder: str, required: bool = True) -> list[ImageFile]:
    try:
        paths = find_files(Path(folder)).paths
    except OSError as e:
        raise DataError(f"{e.filename or folder}: cannot be read ({e.strerror})") from None
    images = [ImageFile(path, path) for path in paths if _is_image(path)]
    if required and not images:
        hint = unread_hint(os.path.splitext(path)[1] for path in paths)
        raise DataError(
            f"{folder}: no image in this folder or below it; images end in {', '.join(IMAGE_ENDINGS)}{hint}"
        )
    return images


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_ENDINGS)


def _read_standard_input() -> ImageFile:
    if sys.stdin.isatty():
        raise DataError("-: standard input is the terminal; let a program write an image to it, as in `camera | ...`")
    return ImageFile(STANDARD_INPUT, sys.stdin.buffer.read())


def raise_unreadable(unreadable: Sequence[Skipped], total: int) -> None:
    """Raises one DataError that names every image that could not be read, if there are any."""
    reasons = [item.reason for item in unreadable]
    if total == len(reasons) == 1:
        raise DataError(reasons[0])
    if reasons:
        rest = "the others are done" if len(reasons) < total else "nothing is written"
        raise DataError(f"{len(reasons):,} of {total:,} images cannot be read, {rest}:", *bullets(reasons))
