"""Class names: ImageNet's, by any of their names, and how the classes of a data set are found among a checkpoint's."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset

from ..errors import DataError, closest, counted, shorten

__all__ = ["class_names_of", "display_names", "match_classes"]

SYNSET = re.compile(r"n\d{8}")


@functools.cache
def _imagenet(num_classes: int) -> ImageNetInfo | None:
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return ImageNetInfo(subset) if subset else None


def class_names_of(num_classes: int, noted: Sequence[str] | None) -> list[str] | None:
    """Returns a network's class names in index order: those that its file notes, or ImageNet's WordNet ids.

    Args:
        num_classes: of the classifier; 1,000 and 21,841 are ImageNet's unless the file says otherwise.
        noted: what the file says, None for nothing.

    Returns:
        The names; None where nobody knows them.
    """
    if noted:
        return list(noted)
    imagenet = _imagenet(num_classes)
    return list(imagenet.label_names()) if imagenet else None


def display_names(class_names: Sequence[str]) -> list[str]:
    """Returns names for people to read: of WordNet ids such as n01440764 their first word, 'tench'.

    Where two classes have the same first word the second is added, or else the id.
    """
    if not all(SYNSET.fullmatch(name) for name in class_names):
        return list(class_names)
    words = [_words(name).split(", ") for name in class_names]
    firsts = Counter(word[0] for word in words)
    out = [word[0] if firsts[word[0]] == 1 else ", ".join(word[:2]) for word in words]
    times = Counter(out)
    return [text if times[text] == 1 else f"{text} ({name})" for text, name in zip(out, class_names, strict=True)]


def _words(synset: str) -> str:
    """Returns the words of a WordNet id, which need not be one of ImageNet-1k's; the id if timm does not know it."""
    info = _imagenet(1000)
    assert info is not None
    try:
        return info.label_name_to_description(synset)
    except KeyError:
        return synset


def match_classes(found: Sequence[str], class_names: Sequence[str], where: object) -> list[int]:
    """Finds the classes of a data set among those of a network, by name.

    Equal names match. If they do not all, and the network's are ImageNet's, a data set may also call them by WordNet id
    (n01440764), by their words ('tench, Tinca tinca', as on the Hugging Face hub, or 'tench'), or by index ('0' to
    '999', as in ImageNet-V2).

    Args:
        found: names in the data set.
        class_names: the network's, in index order.
        where: what to call the data set.

    Returns:
        For each of `found` an index into `class_names`.

    Raises:
        DataError: a class of the data set is not among the network's; says which.
    """
    if list(found) == list(class_names):  # also where two have one name, as the cranes of ImageNet
        return list(range(len(found)))
    index = {name: i for i, name in enumerate(class_names)}
    for names in (index, *_imagenet_names(class_names)):
        if all(name in names for name in found):
            return [names[name] for name in found]
    unknown = [name for name in found if name not in index]
    hint = closest(unknown[0], class_names)
    raise DataError(
        f"{where} has {counted(len(unknown), 'class', 'classes')} not in the class list: {shorten(unknown, 10)}{hint}; "
        f"the list has {len(class_names)}: {shorten(class_names, 10)}"
    )


def _imagenet_names(class_names: Sequence[str]) -> list[dict[str, int]]:
    """Returns the other ways to name a network's classes if they are ImageNet's 1,000, each with the indices."""
    imagenet = _imagenet(1000)
    assert imagenet is not None
    synsets = imagenet.label_names()
    words = imagenet.label_descriptions()
    forms = [list(synsets), list(words), [text.split(", ")[0] for text in words]]
    order = list(range(len(synsets)))
    if list(class_names) not in forms:
        if sorted(class_names) != sorted(synsets):
            return []
        place = {synset: i for i, synset in enumerate(class_names)}
        order = [place[synset] for synset in synsets]
    named = []
    for form in (*forms, [str(i) for i in range(len(synsets))]):
        times = Counter(form)
        named.append({name: order[i] for i, name in enumerate(form) if times[name] == 1})
    return named
