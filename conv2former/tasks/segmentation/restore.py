"""From a segmentation's checkpoint to its network, whatever the checkpoint's backbone is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from ...weights.description import CheckpointInfo
from ..dense import checkpoints
from .config import SegmentationConfig
from .network import SegmentationNetwork, build_network

__all__ = ["restore_network", "saved_config"]

HEAD = "head."
CLASSIFIER = "head.classifier.weight"


def saved_config(noted: Mapping[str, Any], path: object) -> SegmentationConfig:
    """Returns the configuration that a checkpoint notes; see `checkpoints.saved_config`."""
    return checkpoints.saved_config(noted, path, SegmentationConfig)


def restore_network(
    content: Mapping[str, Any], path: object, use_ema: bool = True, expect: Any = None
) -> tuple[SegmentationNetwork, CheckpointInfo]:
    """Builds the network of a segmentation's checkpoint, in evaluation mode and without an auxiliary head.

    Arguments and errors are those of `checkpoints.restore_network`.
    """
    model, noted = checkpoints.restore_network(
        content, path, use_ema, expect, SegmentationConfig, _check_size, build_network
    )
    model.auxiliary = None
    return model, noted.of_whole(model)


def _check_size(weights: Mapping[str, Tensor], config: SegmentationConfig, classes: int, path: object) -> None:
    """Checks a state dict as far as can be seen before a network of its size is built.

    A file may be made to harm: what it notes of its head must be no larger than the tensors that it has of it.

    Raises:
        CheckpointError: it is none of a segmentation with so many classes.
    """
    last, channels = weights.get(CLASSIFIER), config.model.head.channels
    found = tuple(last.shape) if last is not None else None
    if found != (classes, channels, 1, 1):
        what = "is missing" if found is None else f"has the shape {found}"
        raise CheckpointError(
            f"{path} names {classes} classes and a head of {channels} channels, and its {CLASSIFIER} {what}"
        )
    if sum(tensor.numel() for key, tensor in weights.items() if key.startswith(HEAD)) < channels**2:
        raise CheckpointError(f"{path} notes a head of {channels} channels, and does not have its weights")
