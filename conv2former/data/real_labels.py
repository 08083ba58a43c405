"""ReaL, the reassessed labels of ImageNet's validation images (arXiv 2006.07159): none, one or more for each.

timm carries the list, in the order of the file names and with indices into the sorted WordNet ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from .. import _private
from ..errors import DataError, UserError
from .classes import class_names_of, match_classes
from .sources import DataSource

__all__ = ["real_labels"]

FILE_NAME = re.compile(r"ILSVRC2012_val_([0-9]{8})\D[^/\\]*$")
_LIST = "imagenet_real_labels.json"


def real_labels(source: DataSource, class_names: Sequence[str]) -> list[list[int]]:
    """Finds the ReaL labels of a data set's images by their file names, ILSVRC2012_val_00000001.JPEG.

    Args:
        source: images of ImageNet's validation set, all or some of them.
        class_names: that labels are to be indices into; labels of other classes are left out.

    Returns:
        For each image its labels, perhaps none.

    Raises:
        DataError: an image is not called as those of ImageNet's validation set, or the classes are not ImageNet's.
    """
    synsets = class_names_of(1000, None)
    assert synsets is not None
    place = _places(synsets, class_names)
    listed = _read_list()
    found = []
    for i in range(len(source)):
        match = FILE_NAME.search(source.images.name(i))
        if not match or not 1 <= int(match[1]) <= len(listed):
            raise DataError(
                f"ReaL labels go by the file names of ImageNet's validation images, ILSVRC2012_val_00000001.JPEG to "
                f"{len(listed):08d}; {source.name} has '{source.images.name(i)}'"
            )
        found.append([place[label] for label in listed[int(match[1]) - 1] if label in place])
    return found


def _read_list() -> list[list[int]]:
    """Returns the labels of every validation image, as timm carries them.

    Raises:
        DataError: it does not, or its file is damaged.
    """
    text = _private.imagenet_file(_LIST)
    if text is None:
        raise DataError(f"ReaL labels come with timm, and this version of it has no {_LIST}; install timm 1.0.31")
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError):
        listed = None
    is_right = isinstance(listed, list) and all(isinstance(labels, list) for labels in listed)
    if not is_right or not all(type(label) is int for labels in listed for label in labels):
        raise DataError(f"timm's {_LIST} is damaged: not a list of lists of whole numbers; install timm anew")
    return listed


def _places(synsets: Sequence[str], class_names: Sequence[str]) -> dict[int, int]:
    """Returns for every of ImageNet's 1,000 classes that is in `class_names` its place there."""
    try:
        return dict(enumerate(match_classes(synsets, class_names, "ImageNet")))
    except UserError:
        index = {name: i for i, name in enumerate(class_names)}
        place = {i: index[synset] for i, synset in enumerate(synsets) if synset in index}
    if not place:
        raise DataError("ReaL labels are of ImageNet's classes, and the network has others")
    return place
