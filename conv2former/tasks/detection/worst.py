"""The images of the most mistakes, kept small enough for a checkpoint, whatever score they will be counted from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..dense.thumbnails import Thumbnails, photo_text, scaled_size, thumbnails
from .average_precision import ImageRecord
from .matching import NOTHING, SCORES, Match, mistakes_of, shown_from

__all__ = ["Worst", "WorstImages", "worst_at"]


class Worst(NamedTuple):
    """An image with mistakes, see `mistakes_of`.

    Attributes:
        mistakes: boxes without an object, and objects without a box.
        objects: of the image, without groups.
        place: in the data set.
        name: of the image.
        pictures: the image; of an instance segmentation also which object, and which detection, a pixel is of, of
            several the one of the highest score; else ''.
        truth: the objects: `boxes` in pixels of the picture, `labels`, `crowd`, and whether each was `missed`.
        answer: the detections that count: `boxes`, `labels`, `scores`, and whether each is `wrong`.
    """

    mistakes: int
    objects: int
    place: int
    name: str
    pictures: Thumbnails
    truth: dict[str, list[Any]]
    answer: dict[str, list[Any]]

    def plain(self) -> list[Any]:
        """Returns it as a checkpoint keeps it."""
        return [*self[:4], *self.pictures, self.truth, self.answer]


class Candidate(NamedTuple):
    """An image that may be among the worst: record, match and pictures."""

    record: ImageRecord
    matched: Match
    pictures: Thumbnails


def _key(record: ImageRecord, matched: Match, score: float) -> tuple[float, int] | None:
    """Returns by what images are sorted, the worst first: mistakes for each object; None of one without a mistake."""
    mistakes = mistakes_of(matched, score)
    return (-mistakes / max(1, int(matched.counts.sum())), record.place) if mistakes else None


class WorstImages:
    """Keeps this process's worst images for each of `SCORES`.

    Args:
        most: how many images are wanted.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: dict[int, Candidate] = {}  # by place
        self.first: list[list[tuple[float, int]]] = [[] for _ in SCORES]

    def add(self, record: ImageRecord, matched: Match, image: torch.Tensor) -> None:
        """Looks at an image, (channels, h, w) of 8 bits."""
        is_new = False
        for first, score in zip(self.first, SCORES.tolist(), strict=True):
            key = _key(record, matched, score)
            if self.most and key and (len(first) < self.most or key < first[-1]):
                first[:] = sorted([*first, key])[: self.most]
                is_new = True
        if is_new:
            self.kept[record.place] = Candidate(record, matched, _pictures(record, image))
            there = {place for first in self.first for _, place in first}
            self.kept = {place: one for place, one in self.kept.items() if place in there}


def worst_at(score: float, candidates: Sequence[Candidate], most: int) -> list[Worst]:
    """Returns the worst images from a score on, of those that all processes have kept."""
    keyed = [(key, one) for one in candidates if (key := _key(one.record, one.matched, score))]
    chosen = sorted(keyed, key=lambda pair: pair[0])[:most]
    return [_as_worst(one, score) for _, one in chosen]


def _as_worst(one: Candidate, score: float) -> Worst:
    record, matched = one.record, one.matched
    objects, found = record.objects, record.found
    size = scaled_size(*record.size)
    scale = np.array([size[0] / record.size[1], size[1] / record.size[0]] * 2)
    shown = int(shown_from(score, matched.scores).sum())  # those of the highest scores
    missed = matched.counts.copy()
    taken = matched.taken[:shown]
    missed[taken[taken != NOTHING]] = False
    wrong = (taken == NOTHING) & ~matched.ignored[:shown]
    truth = {
        "boxes": (objects.boxes * scale).round(1).tolist(),
        "labels": objects.labels.tolist(),
        "crowd": objects.crowd.tolist(),
        "missed": missed.tolist(),
    }
    answer = {
        "boxes": (found.boxes[:shown] * scale).round(1).tolist(),
        "labels": found.labels[:shown].tolist(),
        "scores": found.scores[:shown].astype(np.float64).round(4).tolist(),
        "wrong": wrong.tolist(),
    }
    counts = mistakes_of(matched, score), int(matched.counts.sum())
    return Worst(*counts, record.place, record.name, one.pictures, truth, answer)


def _pictures(record: ImageRecord, image: torch.Tensor) -> Thumbnails:
    if record.objects.masks is None or record.found.masks is None:
        return Thumbnails(photo_text(image, scaled_size(*record.size)), "", "")
    truth, answer = (_painted(masks, record.size) for masks in (record.objects.masks, record.found.masks))
    return thumbnails(image, truth, answer)


def _painted(masks: Sequence[dict[str, Any]], size: tuple[int, int]) -> torch.Tensor:
    """Returns which of the masks each pixel is of, (H, W), of several the first; -1 where it is of none."""
    from pycocotools import mask as coco_masks

    numbers = torch.full(size, NOTHING)
    for i in reversed(range(len(masks))):
        numbers[torch.from_numpy(coco_masks.decode(masks[i])).bool()] = i
    return numbers
