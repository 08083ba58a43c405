"""Exact evaluation, for the trainer and for scripts/validate.py alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.task import ClassificationEvaluator
from torch import nn

from ..data import Batch, Skipped
from ..errors import counted
from ..inference import Captured
from .class_metrics import ClassMetrics
from .distributed import World
from .tallies import Answers, PerClass, Tally
from .terminal import bar

__all__ = [
    "MAX_CONFUSION_CLASSES",
    "SMALL_SPLIT",
    "Evaluation",
    "Score",
    "evaluate",
    "evaluate_views",
    "has_top5",
    "one_image",
    "shown",
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


def shown(loader: Iterable[Batch], total: int, what: str, processes: int = 1, leave: bool = True) -> Iterator[Batch]:
    """Goes over this process's batches; the main one shows how many images of all processes have had their turn.

    Args:
        loader: the batches.
        total: images of all processes; 0 where nobody knows, as of a stream.
        what: is being evaluated.
        processes: how many there are; they are taken to be equally far.
        leave: whether a bar stays on the terminal.
    """

    def images(batch: Batch) -> int:
        return processes * (len(batch.images) + len(batch.skipped))

    return bar(loader, total or None, " images", what, images, leave=leave)


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

    def total(self, world: World, skipped: list[Skipped]) -> Evaluation:
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


def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    world: World,
    autocast: Callable[[], AbstractContextManager],
    channels_last: bool = True,
    interrupted: Callable[[], bool] = lambda: False,
    cuda_graph: bool = True,
) -> Evaluation | None:
    """Evaluates a classifier over all processes' shares of a data set; every process must call it.

    Args:
        model: maps (N, 3, H, W) images to (N, classes) logits; in evaluation mode afterwards.
        loader: this process's share, in batches of any size.
        world: the processes; their shares may differ in size, since nothing is exchanged before the end.
        autocast: makes the context in which the model runs.
        channels_last: memory format of the images.
        interrupted: asked after every batch; where it is true on any process, the evaluation is given up.
        cuda_graph: capture the network on a GPU for batches of a size that comes often; the same results in less time.

    Returns:
        The result, the same on every process but for `skipped`; None if it was interrupted.
    """
    results = evaluate_views(
        model, loader, world, autocast, [Score(world.device)], channels_last, interrupted, cuda_graph
    )
    return results[0] if results else None


@torch.inference_mode()
def evaluate_views(
    model: nn.Module,
    loader: Iterable[Batch],
    world: World,
    autocast: Callable[[], AbstractContextManager],
    scores: Sequence[Score],
    channels_last: bool = True,
    interrupted: Callable[[], bool] = lambda: False,
    cuda_graph: bool = True,
) -> list[Evaluation] | None:
    """As `evaluate`, of one or more views of every image, such as two preprocessings, with a score for each.

    Args:
        loader: its images are (N, 3, H, W), or (N, views, 3, H, W).
        scores: one for each view.
    """
    model.eval()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    skipped: list[Skipped] = []
    stops = False
    with Captured(model, autocast, cuda_graph) as answer:
        for batch in loader:
            skipped += batch.skipped
            if len(batch.images):
                labels = batch.labels.to(world.device, non_blocking=True)
                views = batch.images.unbind(1) if batch.images.ndim == 5 else (batch.images,)
                for view, score in zip(views, scores, strict=True):
                    images = view.to(world.device, memory_format=memory_format, non_blocking=True)
                    score.update(answer(images), labels, batch.indices)
            if stops := interrupted():
                break
    world.at("the end of an evaluation")
    if any(world.gather(stops)):
        return None
    return [score.total(world, skipped) for score in scores]
