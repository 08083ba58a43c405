"""Exact evaluation, for the trainer and for scripts/validate.py alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from timm.task import ClassificationEvaluator
from torch import nn

from .distributed import World

__all__ = ["evaluate"]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    world: World,
    autocast: Callable[[], AbstractContextManager],
    channels_last: bool = True,
) -> dict[str, float]:
    """Evaluates a classifier over all processes' shares of a data set; every process must call it.

    Args:
        model: maps (N, 3, H, W) images to (N, classes) logits; in evaluation mode afterwards.
        loader: this process's share, (images, class indices) batches of any size.
        world: the processes; their shares may differ in size, since nothing is exchanged before the end.
        autocast: makes the context in which the model runs.
        channels_last: memory format of the images.

    Returns:
        `top1` and `top5` in percent, the mean cross-entropy `loss`, and the number of images `n`, over all shares. With
        fewer than five classes `top5` is over all of them.
    """
    model.eval()
    evaluator = ClassificationEvaluator(world.device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for images, labels in loader:
        images = images.to(world.device, memory_format=memory_format, non_blocking=True)
        with autocast():
            logits = model(images)
        evaluator.update(logits, labels.to(world.device, non_blocking=True))
    metrics = evaluator.compute(distributed=world.size > 1)
    count = world.sum(evaluator.counts[0])
    return {"top1": metrics["top1"], "top5": metrics["top5"], "loss": metrics["loss"], "n": int(count)}
