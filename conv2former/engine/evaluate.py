"""Exact evaluation, for the trainer and for scripts/validate.py alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from timm.task import ClassificationEvaluator
from torch import nn

from ..data import Batch, Skipped
from .distributed import World

__all__ = ["MAX_CONFUSION_CLASSES", "Evaluation", "evaluate"]

MAX_CONFUSION_CLASSES = 50  # more cannot be read in a picture


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, over all processes.

    Attributes:
        metrics: `top1` and `top5` in percent, the mean cross-entropy `loss`, and the number of images `n`. With fewer
            than five classes `top5` is over all of them.
        confusion: (classes, classes) counts, a row per true class; None with more than `MAX_CONFUSION_CLASSES`.
        skipped: this process's unreadable images, which are in none of the counts.
    """

    metrics: dict[str, float]
    confusion: torch.Tensor | None
    skipped: list[Skipped]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    world: World,
    autocast: Callable[[], AbstractContextManager],
    channels_last: bool = True,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluates a classifier over all processes' shares of a data set; every process must call it.

    Args:
        model: maps (N, 3, H, W) images to (N, classes) logits; in evaluation mode afterwards.
        loader: this process's share, in batches of any size.
        world: the processes; their shares may differ in size, since nothing is exchanged before the end.
        autocast: makes the context in which the model runs.
        channels_last: memory format of the images.
        interrupted: asked after every batch; where it is true on any process, the evaluation is given up.

    Returns:
        The result, the same on every process but for `skipped`; None if it was interrupted.
    """
    model.eval()
    evaluator = ClassificationEvaluator(world.device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    confusion: torch.Tensor | None = None
    skipped: list[Skipped] = []
    stops = False
    for batch in loader:
        skipped += batch.skipped
        if len(batch.images):
            images = batch.images.to(world.device, memory_format=memory_format, non_blocking=True)
            labels = batch.labels.to(world.device, non_blocking=True)
            with autocast():
                logits = model(images)
            evaluator.update(logits, labels)
            classes = logits.shape[1]
            if classes <= MAX_CONFUSION_CLASSES:
                if confusion is None:
                    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=world.device)
                confusion.index_put_((labels, logits.argmax(1)), torch.ones_like(labels), accumulate=True)
        if stops := interrupted():
            break
    world.at("the end of an evaluation")
    seen = world.gather((stops, 0 if confusion is None else len(confusion)))
    if any(stopped for stopped, _ in seen):
        return None
    classes = max(length for _, length in seen)
    if classes and confusion is None:  # a process without images
        confusion = torch.zeros(classes, classes, dtype=torch.int64, device=world.device)
    if confusion is not None:
        confusion = world.sum(confusion).cpu()
    metrics = evaluator.compute(distributed=world.size > 1)
    n = int(world.sum(evaluator.counts[0]))
    return Evaluation({**{key: metrics[key] for key in ("top1", "top5", "loss")}, "n": n}, confusion, skipped)
