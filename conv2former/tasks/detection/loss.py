"""What a detector minimises: the sum of its own losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .objects import TrainBatch

__all__ = ["DetectionObjective"]

Targets = list[dict[str, Tensor]]


class DetectionObjective:
    """The sum of the losses of torchvision's detectors; see `tasks.task.Objective`.

    They are means over the boxes or places that count, of this process's images. A detector of two stages draws, of
    each image, which boxes it is trained on, from torch's generator, which is seeded for the step.

    Args:
        device: of the network.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, batch: TrainBatch, step: int) -> tuple[list[Tensor], Targets]:
        """Returns images and targets on the device."""
        return [self._moved(image) for image in batch.images], [
            {key: self._moved(value) for key, value in target.items()} for target in batch.targets
        ]

    def _moved(self, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=True)

    def loss(self, forward: Callable[..., Any], inputs: list[Tensor], targets: Targets) -> Tensor:
        """Returns the sum of the losses, scalar, float32."""
        losses: dict[str, Tensor] = forward(inputs, targets)
        return torch.stack([loss.float() for loss in losses.values()]).sum()
