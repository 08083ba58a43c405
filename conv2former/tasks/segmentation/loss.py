"""The loss of a segmentation: of each pixel, with what is ignored counting as 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import ConfigError, counted
from ..classification.loss import class_weights
from .config import SegmentationConfig
from .labels import IGNORED, as_targets
from .loader import MaskBatch

__all__ = ["SegmentationObjective", "check_weights", "cross_entropy", "dice_loss"]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the mean over all pixels of the cross-entropy, 0 at those that are ignored, scalar.

    It divides by the number of all pixels, as the published recipes do, so that it is a mean over the images, is 0
    where all are ignored, and accumulation steps and devices average to what one large batch gives.

    Args:
        logits: (N, classes, H, W).
        targets: (N, H, W), -1 where a pixel is ignored.
        weights: (classes,).
    """
    return F.cross_entropy(logits, targets, weights, ignore_index=IGNORED, reduction="none").mean()


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns 1 minus the mean overlap (Dice) of the classes that an image has, the mean over the images, scalar.

    An image without a pixel that counts has 0. Shapes are as of `cross_entropy`.
    """
    truth = targets[:, None] == torch.arange(logits.shape[1], device=targets.device)[:, None, None]  # no class is -1
    shares = logits.softmax(1) * (targets != IGNORED)[:, None]
    overlap, sizes = (shares * truth).sum((2, 3)), shares.sum((2, 3)) + truth.sum((2, 3))
    is_there = truth.any(3).any(2)
    losses = (1 - 2 * overlap / sizes.clamp(min=1e-6)) * is_there
    return (losses.sum(1) / is_there.sum(1).clamp(min=1)).mean()


def check_weights(config: SegmentationConfig, num_classes: int) -> None:
    """Raises a ConfigError if the list of weights is for another number of classes."""
    weights = config.loss.class_weights
    if not isinstance(weights, str) and len(weights) != num_classes:
        raise ConfigError(
            f"loss.class_weights: {counted(len(weights), 'number')} for {counted(num_classes, 'class', 'classes')}"
        )


class SegmentationObjective:
    """Cross-entropy and Dice of the head, and cross-entropy of the auxiliary head; see `tasks.task.Objective`.

    Args:
        config: the run.
        device: of the network.
        num_classes: of the network.
        pixels: (classes,) training pixels, for `loss.class_weights`; None for equal ones.
    """

    def __init__(
        self, config: SegmentationConfig, device: torch.device, num_classes: int, pixels: np.ndarray | None
    ) -> None:
        self.device, self.dice, self.auxiliary = device, config.loss.dice, config.model.head.auxiliary
        self.memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.weights = _weights(config.loss.class_weights, num_classes, pixels)
        if self.weights is not None:
            self.weights = self.weights.to(device)

    def prepare(self, batch: MaskBatch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns images and targets, (N, H, W) int64 with -1 where a pixel is ignored, on the device."""
        images = batch.images.to(self.device, memory_format=self.memory_format, non_blocking=True)
        return images, as_targets(batch.masks.to(self.device, non_blocking=True))

    def loss(
        self, forward: Callable[..., tuple[torch.Tensor, ...]], inputs: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Returns the mean loss over the images."""
        logits, *others = forward(inputs)
        loss = cross_entropy(logits, targets, self.weights)
        if self.dice:
            loss = loss + self.dice * dice_loss(logits, targets)
        for other in others:
            loss = loss + self.auxiliary * cross_entropy(other, targets, self.weights)
        return loss


def _weights(given: str | Sequence[float], num_classes: int, pixels: np.ndarray | None) -> torch.Tensor | None:
    if given == "none":
        return None
    if isinstance(given, str):
        return class_weights(np.ones(num_classes) if pixels is None else pixels, given)
    return torch.tensor(given)
