"""Which objects of an image were found, at an IoU of 0.5: confusions, mistakes, and the score at which to count them.

AP looks at all scores at once. Whoever uses a detector chooses one, below which boxes are not shown, and then counts
what is wrong: boxes without an object, and objects without a box. Here it is the score of the best F1 on the images
that are evaluated, since detectors differ much in how high their scores are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .average_precision import coco_boxes
from .objects import Detections, Objects

__all__ = ["IOU", "NONE_RIGHT", "SCORES", "Match", "best_score", "confusion_of", "match", "mistakes_of", "shown_from"]

IOU = 0.5  # of a box with its object, at least
NONE_RIGHT = f"no box of any score has an object of its class at an IoU of {IOU:g} or more"
SCORES = np.arange(1, 20) / 20  # 0.05 to 0.95, among which the best is chosen
NOTHING = -1


class Match(NamedTuple):
    """What an image's detections are of, whatever the score from which they are counted.

    Each takes, the highest score first, the object of its class with the largest IoU that is still free: so a lower
    score never takes an object from a higher one, and those above a score are matched as if there were no others.

    Attributes:
        taken: (n,) the object of each detection, -1 for none.
        ignored: (n,) bool, whether it lies in a group of its class (`Objects.crowd`), and counts for nothing.
        scores: (n,) float32 of the detections.
        counts: (m,) bool, which objects are to be found: all but groups.
        ious: (n, m) of detections and objects; of a group the share of the detection that lies in it.
    """

    taken: np.ndarray
    ignored: np.ndarray
    scores: np.ndarray
    counts: np.ndarray
    ious: np.ndarray


def match(objects: Objects, found: Detections) -> Match:
    """Matches boxes as COCO does at an IoU of 0.5; masks have no say."""
    from pycocotools import mask as coco_masks

    n, m = len(found), len(objects)
    ious = np.zeros((n, m))
    if n and m:
        boxes, truth = (np.array(coco_boxes(each.boxes), dtype=np.float64) for each in (found, objects))
        ious = np.asarray(coco_masks.iou(boxes, truth, objects.crowd.astype(np.uint8).tolist()))
    near = (ious >= IOU) & (found.labels[:, None] == objects.labels[None])
    taken, free = np.full(n, NOTHING), ~objects.crowd
    for i in np.flatnonzero((near & free).any(1)).tolist():
        candidates = np.flatnonzero(near[i] & free)
        if candidates.size:
            own = ious[i, candidates]
            taken[i] = candidates[np.flatnonzero(own == own.max())[-1]]  # of equal ones the last, as COCO does
            free[taken[i]] = False
    ignored = (taken == NOTHING) & (near & objects.crowd).any(1)
    return Match(taken, ignored, found.scores, ~objects.crowd, ious)


def shown_from(score: float, scores: np.ndarray) -> np.ndarray:
    """Returns which detections are shown from a score on, (n,) bool; a score of 0.9 in float32 is one of 0.9."""
    return scores >= np.float32(score)


def _counted(found: Match, score: float) -> np.ndarray:
    return shown_from(score, found.scores) & ~found.ignored


def mistakes_of(found: Match, score: float) -> int:
    """Returns how many boxes are without an object, and objects without a box, from a score on."""
    counted = _counted(found, score)
    right = int((found.taken[counted] != NOTHING).sum())
    return int(counted.sum()) + int(found.counts.sum()) - 2 * right


def best_score(matches: Sequence[Match]) -> tuple[float, float]:
    """Returns the score of the highest F1, of several that which is nearest to 0.5, and this F1 in percent.

    F1 is twice the right detections over detections and objects; 0 where there are neither.
    """
    objects = sum(int(found.counts.sum()) for found in matches)
    rows = []
    for score in SCORES.tolist():
        counted = [_counted(found, score) for found in matches]
        shown = sum(int(each.sum()) for each in counted)
        right = sum(int((found.taken[each] != NOTHING).sum()) for found, each in zip(matches, counted, strict=True))
        rows.append((200 * right / max(1, shown + objects), score))
    f1, score = min(rows, key=lambda row: (-row[0], abs(row[1] - 0.5), row[1]))
    return score, f1


def confusion_of(objects: Objects, found: Detections, matched: Match, score: float, num_classes: int) -> np.ndarray:
    """Counts what an image's objects were taken for.

    Detections that have no object of their own class are then compared with the objects of other classes that are left,
    the highest score first.

    Args:
        objects: of the image.
        found: in it.
        matched: these two.
        score: from which detections count.
        num_classes: of the data.

    Returns:
        (classes + 1, classes + 1) int64, a row per true class and a column per predicted one: the last row is of boxes
        without an object, the last column of objects without a box.
    """
    table = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    counted = _counted(matched, score)
    right = counted & (matched.taken != NOTHING)
    free = matched.counts.copy()
    free[matched.taken[right]] = False
    np.add.at(table, (found.labels[right], found.labels[right]), 1)
    for i in np.flatnonzero(counted & ~right).tolist():
        candidates = np.flatnonzero((matched.ious[i] >= IOU) & free)
        truth = num_classes
        if candidates.size:
            chosen = candidates[np.argmax(matched.ious[i, candidates])]
            free[chosen], truth = False, int(objects.labels[chosen])
        table[truth, int(found.labels[i])] += 1
    np.add.at(table, (objects.labels[free], np.full(int(free.sum()), num_classes)), 1)
    return table
