"""Pairs of image and mask in folders: one's own, ADE20K's and Cityscapes', matched by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...data.files import find_files
from ...data.folders import folders_in, has_images
from ...data.images import IMAGE_ENDINGS
from ...data.split import SPLIT_NAMES
from ...errors import DataError, closest, counted, shorten
from .masks import MASK_ENDINGS
from .pairs import FilePairs

__all__ = ["Layout", "find_pairs", "layout_of", "splits_in"]


@dataclass(frozen=True)
class Layout:
    """Where a data set has images and masks.

    Attributes:
        images, masks: folders of splits.
        image_suffix, mask_suffix: what names end in, before the ending, beyond what the two have in common.
    """

    images: Path
    masks: Path
    image_suffix: str = ""
    mask_suffix: str = ""


LAYOUTS: Mapping[str, tuple[str, str, str, str]] = {
    "folder": ("images", "masks", "", ""),
    "ade20k": ("images", "annotations", "", ""),
    "cityscapes": ("leftImg8bit", "gtFine", "_leftImg8bit", "_gtFine_labelIds"),
}


def layout_of(source: str, root: Path) -> Layout:
    """Returns the layout of a data set below a folder.

    Raises:
        DataError: one of its two folders is not there.
    """
    images, masks, *suffixes = LAYOUTS[source]
    for folder in (images, masks):
        if not (root / folder).is_dir():
            there = folders_in(root)
            raise DataError(
                f"{root} has no folder '{folder}'{closest(folder, there)}; expected {root}/{images}/SPLIT/NAME.jpg and "
                f"{root}/{masks}/SPLIT/NAME.png (data.source: {source})"
            )
    return Layout(root / images, root / masks, *suffixes)


def splits_in(layout: Layout) -> list[str]:
    """Returns the names of the splits that have images and masks; '.' alone where images lie beside such folders."""
    masks = folders_in(layout.masks)
    splits = [name for name in folders_in(layout.images) if name in masks]
    if not {*splits} & {*SPLIT_NAMES} and has_images(layout.images):
        return ["."]
    if not splits:
        raise DataError(
            f"{layout.images} and {layout.masks} have no folders of one name; expected one for each split, such as "
            f"{layout.images / 'train'} and {layout.masks / 'train'}, and the same with val"
        )
    return splits


def find_pairs(layout: Layout, split: str) -> tuple[FilePairs, str]:
    """Finds the images of a split and their masks.

    Returns:
        The pairs, in the order of their names, and words about what is left out.

    Raises:
        DataError: there are none, an image has no mask, or two files have one name.
    """
    images, masks = layout.images / split, layout.masks / split
    photo_of, other_images = _by_name(images, IMAGE_ENDINGS, layout.image_suffix)
    mask_of, other_masks = _by_name(masks, MASK_ENDINGS, layout.mask_suffix)
    if not photo_of:
        raise DataError(f"{images} has no images; they end in {', '.join(IMAGE_ENDINGS)}")
    missing = [name for name in photo_of if name not in mask_of]
    if missing:
        raise DataError(_without_mask(layout, split, missing, photo_of, mask_of, other_masks))
    notes = [f"{counted(len(files), 'file')} of {folder}, such as {files[0]}" for folder, files in
             ((images, other_images), (masks, other_masks)) if files and not layout.mask_suffix]  # fmt: skip
    if alone := [name for name in mask_of if name not in photo_of]:
        notes.append(f"{counted(len(alone), 'mask')} without an image, such as {mask_of[alone[0]]}")
    pairs = FilePairs(list(photo_of.values()), [mask_of[name] for name in photo_of])
    return pairs, f"left out: {'; '.join(notes)}" if notes else ""


def _by_name(folder: Path, endings: tuple[str, ...], suffix: str) -> tuple[dict[str, str], list[str]]:
    """Returns paths by their names below a folder, ending and suffix taken off, and paths of other files."""
    found: dict[str, str] = {}
    others: list[str] = []
    for path in find_files(folder).paths:
        stem, ending = os.path.splitext(os.path.relpath(path, folder))
        if ending.lower() not in endings or not stem.endswith(suffix):
            others.append(path)
            continue
        name = stem.removesuffix(suffix)
        if name in found:
            raise DataError(f"{found[name]} and {path} have one name, and it is not said which is meant; remove one")
        found[name] = path
    return dict(sorted(found.items())), others


def _without_mask(
    layout: Layout, split: str, missing: list[str], photo_of: Mapping[str, str], mask_of: Mapping[str, str],
    others: list[str],
) -> str:  # fmt: skip
    name = missing[0]
    path = layout.masks / split / f"{name}{layout.mask_suffix}.png"
    text = f"{photo_of[name]}: no mask {path}"
    lossy = [other for other in others if os.path.splitext(os.path.basename(other))[0] == os.path.basename(name)]
    if lossy:
        return f"{text}, but {lossy[0]}; masks are read from {', '.join(MASK_ENDINGS)}, which keep every number"
    if len(missing) > 1:
        text += f"; {len(missing):,} of {counted(len(photo_of), 'image')} have none"
    near = closest(name, mask_of) if mask_of else f"; {layout.masks / split} has {shorten(others, 3) or 'no files'}"
    return f"{text}{near}; image and mask have one name, their endings aside"
