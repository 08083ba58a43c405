"""Class names: ImageNet's, by any of their names, and how the classes of a data set are found among a checkpoint's."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset

from ..errors import DataError, closest, counted, shorten

__all__ = ["class_names_of", "display_names", "in_class_order", "match_classes", "order_in_doubt"]

SYNSET = re.compile(r"n\d{8}")
WHOLE_NUMBER = re.compile("-?[0-9]{1,18}")


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


def in_class_order(names: Iterable[str]) -> list[str]:
    """Returns class names in the order of their indices: whole numbers by their value, all others as text.

    One rule for every source. By value, because labels 0, 1, 2, ... of tables, tars and integer columns are indices;
    timm, and so the authors' training code, orders folders of numbers in this way too, torchvision does not.
    """
    listed = sorted(names)
    if all(map(WHOLE_NUMBER.fullmatch, listed)):
        listed.sort(key=int)
    return listed


def order_in_doubt(class_names: Sequence[str]) -> str:
    """Returns a sentence for weights that do not name their classes, where programs order these differently.

    Empty where they do not: if not all are whole numbers, or if these have the same order as text.
    """
    orders = [in_class_order(class_names), sorted(class_names)]
    others = [order for order in orders if order != list(class_names)]
    if orders[0] == orders[1] or not others:
        return ""
    return (
        f"the classes are numbers in the order {shorten(class_names, 5)}; for a network that was trained with them in "
        f"another order, such as {shorten(others[0], 5)} (torchvision orders folders as text, this program and timm by "
        "their value), list the names in that order, one a line, and give the file as data.class_names"
    )


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
    (n01440764), by their words ('tench, Tinca tinca', as on the Hugging Face hub, or 'tench'), by index ('0' to
    '999', as in ImageNet-V2), or as `display_names` does ('crane (n02012849)').

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
    ways = [_by_name(class_names, range(len(class_names))), *_imagenet_names(class_names)]
    for names in ways:
        if all(len(names.get(name, ())) == 1 for name in found):
            return [names[name][0] for name in found]
    # by the way of naming that fits best, so that the message has no name that is right
    names = max(ways, key=lambda names: sum(name in names for name in found))
    unknown = [name for name in found if len(names.get(name, ())) != 1]
    several = [name for name in unknown if name in names]
    hint = _which(several[0], names[several[0]], class_names) if several else closest(unknown[0], names)
    raise DataError(
        f"{where} has {counted(len(unknown), 'class', 'classes')} not in the class list: {shorten(unknown, 10)}{hint}; "
        f"the list has {len(class_names)}: {shorten(class_names, 10)}"
    )


def _by_name(names: Sequence[str], indices: Iterable[int]) -> dict[str, list[int]]:
    """Returns the indices of each name: several where several classes have it."""
    found: dict[str, list[int]] = {}
    for name, index in zip(names, indices, strict=True):
        found.setdefault(name, []).append(index)
    return found


def _which(name: str, indices: Sequence[int], class_names: Sequence[str]) -> str:
    """Returns words about the classes that have one name: how else they are called, and what they are."""
    imagenet = _imagenet(1000)
    ways = _imagenet_names(class_names)
    if imagenet is None or not ways:
        return f" (the list has '{name}' {len(indices)} times)"
    synset_at = {index: synset for synset, (index,) in ways[0].items()}
    shown_at = {index: shown for shown, (index,) in ways[-1].items()}
    meanings = dict(zip(imagenet.label_names(), imagenet.label_descriptions(detailed=True), strict=True))
    classes = [f"'{shown_at[i]}', {meanings[synset_at[i]].partition(': ')[2]}" for i in indices]
    return f" (two classes are called so; write which: {'; or '.join(classes)})"


def _imagenet_names(class_names: Sequence[str]) -> list[dict[str, list[int]]]:
    """Returns the other ways to name a network's classes if they are ImageNet's 1,000: name to indices.

    A few words are those of two classes, as 'crane' of a bird and of a machine.
    """
    imagenet = _imagenet(1000)
    assert imagenet is not None
    synsets = imagenet.label_names()
    words = imagenet.label_descriptions()
    firsts = [text.split(", ")[0] for text in words]
    told_apart = [
        f"{first} ({synset})" if shown == first and firsts.count(first) > 1 else shown
        for first, shown, synset in zip(firsts, display_names(synsets), synsets, strict=True)
    ]
    forms = [list(synsets), list(words), firsts, told_apart]
    order = list(range(len(synsets)))
    if list(class_names) not in forms:
        if sorted(class_names) != sorted(synsets):
            return []
        place = {synset: i for i, synset in enumerate(class_names)}
        order = [place[synset] for synset in synsets]
    numbers = [str(i) for i in range(len(synsets))]
    return [_by_name(form, order) for form in (forms[0], *forms[1:3], numbers, forms[3])]
