"""What is counted of a detector's answers: exact, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...data import Skipped
from ...errors import shorten
from ..task import Processes
from .average_precision import AveragePrecision, ImageRecord, average_precision
from .config import DetectionConfig
from .inference import Finder
from .matching import best_score, confusion_of, match
from .objects import EvalBatch
from .worst import Candidate, Worst, WorstImages, worst_at

__all__ = ["HEADLINES", "BoxEvaluation", "BoxEvaluator", "about_missing", "class_rows"]

FEW_CLASSES = 50  # whose AP is logged for each
HEADLINES = ("ap", "ap50", "ap75", "ar100")  # of every evaluation, 0 where there is no object
OF_SIZES = ("ap_small", "ap_medium", "ap_large")  # where there are objects of the size


def class_rows(counts: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns for each class its name and what an evaluation keeps of it: `objects`, without groups, and its AP."""
    return [{"class": name, **own} for name, own in zip(class_names, counts, strict=True)]


def about_missing(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns words about the classes without an object, which are left out of the means; '' if there are none."""
    missing = [row["class"] for row in rows if not row["objects"]]
    if not missing:
        return ""
    if len(missing) == len(rows):
        return "no object of any class, so that every AP is 0, whatever is found"
    return f"no object of {shorten(missing, 10)}, left out of the means over the classes"


@dataclass(frozen=True)
class BoxEvaluation:
    """What an evaluation found, over all processes.

    Attributes:
        metrics: COCO's `ap`, `ap50`, `ap75` and `ar100` of boxes in percent, `ap_small`, `ap_medium` and `ap_large`
            where there are such objects; the same of masks as `mask_ap` and so on, where network and data have them;
            and the number of images `n`.
        coco: all of COCO's twelve numbers that can be measured, of boxes, and of masks as `mask_...`.
        classes: for each class its `objects`, and `ap`, `ap50` and `ap75`, also of masks, None where there is no
            object.
        score: from which detections count for `confusion` and `worst`: that of the best F1.
        f1: in percent, at this score.
        confusion: (classes + 1, classes + 1) int64, see `confusion_of`.
        worst: the images of the most mistakes for each object, the worst first.
        skipped: this process's unreadable images.
        records: every image with its objects and detections, in the order of the data set.
    """

    metrics: dict[str, float]
    coco: dict[str, float]
    classes: list[dict[str, Any]]
    score: float
    f1: float
    confusion: torch.Tensor
    worst: list[Worst]
    skipped: list[Skipped]
    records: list[ImageRecord]

    def row(self, class_names: Sequence[str]) -> dict[str, float]:
        """Returns the metrics, and the AP of every class that occurs where there are few enough to look at."""
        if len(class_names) > FEW_CLASSES:
            return self.metrics
        rows = class_rows(self.classes, class_names)
        return self.metrics | {f"ap/{row['class']}": row["ap"] for row in rows if row["ap"] is not None}

    def details(self) -> dict[str, Any]:
        """Returns what is known of every class, confusions, and the worst images with pictures, as plain types."""
        return {
            "classes": self.classes,
            "score": self.score,
            "f1": self.f1,
            "confusion": self.confusion.tolist(),
            "worst": [one.plain() for one in self.worst],
        }


class BoxEvaluator:
    """Collects a network's answers on this process, and evaluates those of all.

    Args:
        config: the run.
        class_names: of the data, in index order.
        device: of the network.
    """

    def __init__(self, config: DetectionConfig, class_names: Sequence[str], device: torch.device) -> None:
        self.evaluation, self.num_classes = config.evaluation, len(class_names)
        self.finder = Finder(config, device)
        self.records: list[ImageRecord] = []
        self.worst = WorstImages(config.evaluation.pictures)

    def update(self, answer: Callable[[Any], Any], batch: EvalBatch) -> None:
        """Collects what is found in a batch."""
        answers = self.finder(answer, batch.images, batch.sizes)
        fields = zip(batch.places, batch.names, batch.sizes, batch.objects, answers, strict=True)
        for image, record in zip(batch.images, (ImageRecord(*each) for each in fields), strict=True):
            self.records.append(record)
            if self.worst.most:
                self.worst.add(record, match(record.objects, record.found), image)

    def total(self, world: Processes, skipped: list[Skipped]) -> BoxEvaluation:
        """Returns the result over all processes; every one must call it.

        The images are sorted by their places, so that it is the same whoever had which; one process computes it.
        """
        records = [record for records in world.gather(self.records) for record in records]
        records.sort(key=lambda record: record.place)
        candidates = [one for some in world.gather(list(self.worst.kept.values())) for one in some]
        found = world.gather(self._evaluated(records, candidates) if world.rank == 0 else None)[0]
        return replace(found, skipped=skipped, records=records)

    def _evaluated(self, records: Sequence[ImageRecord], candidates: Sequence[Candidate]) -> BoxEvaluation:
        """Returns the result, but for what each process adds itself."""
        most, classes = self.evaluation.max_detections, self.num_classes
        by_kind = {"": average_precision(records, classes, "bbox", most)}
        if _have_masks(records):
            by_kind["mask_"] = average_precision(records, classes, "segm", most)
        metrics: dict[str, float] = {}
        for prefix, (summary, _) in by_kind.items():
            metrics |= {f"{prefix}{key}": summary.get(key, 0.0) for key in HEADLINES}
            metrics |= {f"{prefix}{key}": summary[key] for key in OF_SIZES if key in summary}
        coco = {f"{prefix}{key}": value for prefix, found in by_kind.items() for key, value in found.summary.items()}
        matches = [match(record.objects, record.found) for record in records]
        score, f1 = best_score(matches)
        confusion = np.zeros((classes + 1, classes + 1), dtype=np.int64)
        for record, matched in zip(records, matches, strict=True):
            confusion += confusion_of(record.objects, record.found, matched, score, classes)
        worst = worst_at(score, candidates, self.worst.most)
        metrics["n"] = len(records)
        rows, counts = _classes(records, by_kind, classes), torch.from_numpy(confusion)
        return BoxEvaluation(metrics, coco, rows, score, f1, counts, worst, [], [])


def _have_masks(records: Sequence[ImageRecord]) -> bool:
    """Returns whether there are masks, and all objects and detections have one."""
    both = [each for record in records for each in (record.objects, record.found)]
    return any(each.masks is not None for each in both) and not any(len(each) and each.masks is None for each in both)


def _classes(
    records: Sequence[ImageRecord], by_kind: Mapping[str, AveragePrecision], classes: int
) -> list[dict[str, Any]]:
    objects = np.zeros(classes, dtype=np.int64)
    for record in records:
        objects += np.bincount(record.objects.labels[~record.objects.crowd], minlength=classes)
    return [
        {"objects": count}
        | {
            f"{prefix}{key}": found.classes[i].get(key)
            for prefix, found in by_kind.items()
            for key in ("ap", "ap50", "ap75")
        }
        for i, count in enumerate(objects.tolist())
    ]
