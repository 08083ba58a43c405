"""The loss of a run, and the mixing of images that goes with it."""

from __future__ import annotations

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import create_classification_loss
from torch import nn

from ..config import Config

__all__ = ["WeightedCrossEntropy", "build_criterion", "build_mixup", "class_weights"]


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
