"""The loss of a classifier, and the mixing of images that goes with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import create_classification_loss
from torch import nn

from ...config import Config, Plan
from ...data import Batch

__all__ = ["ClassificationObjective", "WeightedCrossEntropy", "build_criterion", "build_mixup", "class_weights"]


def class_weights(counts: np.ndarray, kind: str) -> torch.Tensor:
    """Returns each class's weight in the loss, (classes,) float, 1 in the mean over the training images.

    Args:
        counts: (classes,) training images; a class without any has weight 0.
        kind: 'balanced': one over the images; 'sqrt': over their square root.
    """
    power = {"balanced": 1.0, "sqrt": 0.5}[kind]
    weights = np.where(counts > 0, np.maximum(counts, 1.0) ** -power, 0.0)
    return torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy in which every class has a weight: the mean over the images of -sum(weight x target x log p).

    The mean is over the number of images, not over their weights, so that accumulation steps and devices average to
    what one large batch gives.

    Args:
        weights: (classes,).
        smoothing: of targets that are class indices, as timm's.
    """

    weights: torch.Tensor

    def __init__(self, weights: torch.Tensor, smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the loss, scalar, of (N, classes) logits and (N,) indices or (N, classes) probabilities."""
        if targets.ndim == 1:
            targets = nn.functional.one_hot(targets, logits.shape[1]).to(logits.dtype)
            targets = targets * (1.0 - self.smoothing) + self.smoothing / logits.shape[1]
        return nn.functional.cross_entropy(logits, targets, weight=self.weights)


def build_criterion(config: Config, num_classes: int, class_counts: np.ndarray | None) -> nn.Module:
    """Builds the loss: of (N, classes) logits and the targets that `build_mixup`'s mixing gives, their mean.

    Args:
        config: the run.
        num_classes: of the data.
        class_counts: (classes,) training images, for `train.class_weight`; None for equal ones.
    """
    smoothing = config.augment.smoothing
    if config.weighs:
        counts = np.ones(num_classes) if class_counts is None else class_counts
        return WeightedCrossEntropy(class_weights(counts, config.train.class_weight), smoothing)
    has_mixup = bool(config.augment.mixup or config.augment.cutmix)
    return create_classification_loss(smoothing=smoothing, soft_targets=has_mixup)


def build_mixup(config: Config, num_classes: int) -> Mixup | None:
    """Builds what mixes a batch of images and labels; None where neither mixup nor cutmix is on."""
    augment = config.augment
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )


class ClassificationObjective:
    """Cross-entropy of images that are mixed if so configured; see `tasks.task.Objective`.

    Args:
        config: the run.
        plan: its numbers.
        device: of the network.
        num_classes: of the network.
        class_counts: (classes,) training images, for `train.class_weight`; None for equal ones.
    """

    def __init__(
        self, config: Config, plan: Plan, device: torch.device, num_classes: int, class_counts: np.ndarray | None
    ) -> None:
        self.device = device
        self.memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.mixup = build_mixup(config, num_classes)
        self.mixed_steps = (plan.epochs - config.augment.mix_off_epochs) * plan.steps_per_epoch
        self.criterion = build_criterion(config, num_classes, class_counts).to(device)

    def prepare(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns images and targets on the device: (N, classes) with mixup or cutmix, else (N,)."""
        images = batch.images.to(self.device, memory_format=self.memory_format, non_blocking=True)
        targets = batch.labels.to(self.device, non_blocking=True)
        if self.mixup:
            self.mixup.mixup_enabled = step < self.mixed_steps  # off: the targets are still smoothed
            images, targets = self.mixup(images, targets)
        return images, targets

    def loss(self, forward: Callable[..., torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss of the logits."""
        return self.criterion(forward(inputs).float(), targets)
