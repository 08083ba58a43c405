"""What is counted of a classifier's answers: exact, whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.task import ClassificationEvaluator

from ...data import Batch, Skipped
from ...errors import counted
from ..task import Processes
from .class_metrics import ClassMetrics
from .tallies import Answers, PerClass, Tally

__all__ = [
    "MAX_CONFUSION_CLASSES",
    "SMALL_SPLIT",
    "Evaluation",
    "Score",
    "SingleView",
    "Views",
    "has_top5",
    "one_image",
    "standard_error",
    "with_error",
]

MAX_CONFUSION_CLASSES = 50  # more cannot be read in a picture
SMALL_SPLIT = 500  # images; in fewer, one of them moves top-1 by more than 0.2 points


def has_top5(classes: int) -> bool:
    """Returns whether top-5 says anything: among five classes or fewer it is always 100 %, and is not shown."""
    return classes > 5


def standard_error(top1: float, n: int) -> float:
    """Returns the standard error of a top-1 accuracy in percent on `n` images, in points: sqrt(p (1 - p) / n)."""
    return math.sqrt(top1 * (100 - top1) / n)


def with_error(top1: float, n: int) -> str:
    """Returns a top-1 accuracy as text; on a small split with its standard error, where the images have one."""
    error = f" ± {standard_error(top1, n):.2f}" if n < SMALL_SPLIT and 0 < top1 < 100 else ""
    return f"{top1:.2f} %{error}"


def one_image(n: int) -> str:
    """Returns a sentence's beginning on how coarse an accuracy on `n` images is."""
    return f"one of {counted(n, 'image')} is {100 / n:.2f} points"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, over all processes.

    Attributes:
        metrics: `top1` and `top5` in percent, the mean cross-entropy `loss`, `macro_f1` and `balanced_accuracy` in
            percent, see `ClassMetrics`, and the number of images `n`. With fewer than five classes `top5` is over all
            of them.
        per_class: (4, classes) counts, see `PerClass`.
        confusion: (classes, classes) counts, a row per true class; None with more than `MAX_CONFUSION_CLASSES`, or
            than the `Score` was told.
        skipped: this process's unreadable images, which are in none of the counts.
        tallies: the results of the further tallies, by name.
    """

    metrics: dict[str, float]
    per_class: torch.Tensor
    confusion: torch.Tensor | None
    skipped: list[Skipped]
    tallies: dict[str, Any] = field(default_factory=dict)

    def row(self, class_names: Sequence[str]) -> dict[str, float]:
        """Returns the metrics, and the recall of every class where there are few enough to look at."""
        has_few = len(class_names) <= MAX_CONFUSION_CLASSES
        return self.metrics | (ClassMetrics.of(self.per_class).recalls(class_names) if has_few else {})

    def details(self) -> dict[str, Any]:
        """Returns the counts of every class and the confusions, None of many classes, as lists."""
        confusion = None if self.confusion is None else self.confusion.tolist()
        return {"per_class": self.per_class.tolist(), "confusion": confusion}


class Score:
    """Counts one network's answers on this process, and adds them up over all.

    Args:
        device: of the counts.
        among: indices of the classes that can be the answer, all others are left out; None for all. Labels must be
            among them. The result's classes are then places in this list.
        max_confusion_classes: with more, confusions are not counted.
        tallies: what else to count, by name.
    """

    def __init__(
        self,
        device: torch.device,
        among: Sequence[int] | None = None,
        max_confusion_classes: int = MAX_CONFUSION_CLASSES,
        tallies: Mapping[str, Tally] | None = None,
    ) -> None:
        self.evaluator = ClassificationEvaluator(device)
        self.device, self.max_confusion_classes, self.tallies = device, max_confusion_classes, dict(tallies or {})
        self.among = None if among is None else torch.tensor(among, device=device)
        self.per_class: PerClass | None = None
        self.confusion: torch.Tensor | None = None

    def update(self, logits: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor) -> None:
        """Counts a batch: (N, classes) logits, (N,) labels, (N,) places of the images in the data set."""
        if self.among is not None:
            place = torch.full((logits.shape[1],), -1, device=self.device)
            place[self.among] = torch.arange(len(self.among), device=self.device)
            logits, labels = logits[:, self.among], place[labels]
        self.evaluator.update(logits, labels)
        answers = Answers(logits.float(), labels, indices)
        classes = logits.shape[1]
        if self.per_class is None:
            self.per_class = PerClass(classes, self.device)
        self.per_class.update(answers)
        if classes <= self.max_confusion_classes:
            if self.confusion is None:
                self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
            # not argmax: of two equal logits, which bf16 has, it may take another than top-1 does
            self.confusion.index_put_((labels, answers.top[:, 0]), torch.ones_like(labels), accumulate=True)
        for tally in self.tallies.values():
            tally.update(answers)

    def total(self, world: Processes, skipped: list[Skipped]) -> Evaluation:
        """Returns the result over all processes; every one must call it."""
        classes = max(world.gather(self.per_class.counts.shape[1] if self.per_class else 0))
        # a process without images knows no number of classes
        per_class = (self.per_class or PerClass(classes, self.device)).total(world)
        confusion = self.confusion
        if confusion is None and 0 < classes <= self.max_confusion_classes:
            confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
        if confusion is not None:
            confusion = world.sum(confusion).cpu()
        found = self.evaluator.compute(distributed=world.size > 1)
        by_class = ClassMetrics.of(per_class)
        metrics = {key: found[key] for key in ("top1", "top5", "loss")}
        metrics |= {"macro_f1": by_class.macro_f1, "balanced_accuracy": by_class.balanced_accuracy}
        metrics["n"] = int(world.sum(self.evaluator.counts[0]))
        tallied = {name: tally.total(world) for name, tally in self.tallies.items()}
        return Evaluation(metrics, per_class, confusion, skipped, tallied)


class Views:
    """Evaluates one or more views of every image, such as two preprocessings, with a score for each.

    Args:
        scores: one for each view. Images are (N, 3, H, W), or (N, views, 3, H, W).
        device: of the network.
        channels_last: memory format of the images.
    """

    def __init__(self, scores: Sequence[Score], device: torch.device, channels_last: bool = True) -> None:
        self.scores, self.device = scores, device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def update(self, answer: Callable[[torch.Tensor], torch.Tensor], batch: Batch) -> None:
        """Counts a batch; the network gives (N, classes) logits."""
        labels = batch.labels.to(self.device, non_blocking=True)
        views = batch.images.unbind(1) if batch.images.ndim == 5 else (batch.images,)
        for view, score in zip(views, self.scores, strict=True):
            images = view.to(self.device, memory_format=self.memory_format, non_blocking=True)
            score.update(answer(images), labels, batch.indices)

    def total(self, world: Processes, skipped: list[Skipped]) -> list[Evaluation]:
        """Returns the results of the views over all processes; every one must call it."""
        return [score.total(world, skipped) for score in self.scores]


class SingleView(Views):
    """As `Views`, of images as they are: the result is that of the one score."""

    def total(self, world: Processes, skipped: list[Skipped]) -> Any:
        """Returns the result over all processes; every one must call it."""
        return super().total(world, skipped)[0]
