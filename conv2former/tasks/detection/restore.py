"""From a detection's checkpoint to its network, whatever the checkpoint's backbone is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...weights.description import CheckpointInfo
from ..dense import checkpoints
from ..dense.maps import STAGES
from .config import DetectionConfig
from .detectors import finest_stride
from .network import PARTS, DetectionNetwork, build_network, build_parts

__all__ = ["restore_network", "saved_config"]

LATERAL = "pyramid.inner_blocks.{}.0.weight"  # of the pyramid, on a map of the backbone


def saved_config(noted: Mapping[str, Any], path: object) -> DetectionConfig:
    """Returns the configuration that a checkpoint notes; see `checkpoints.saved_config`."""
    return checkpoints.saved_config(noted, path, DetectionConfig)


def restore_network(
    content: Mapping[str, Any], path: object, use_ema: bool = True, expect: Any = None
) -> tuple[DetectionNetwork, CheckpointInfo]:
    """Builds the network of a detection's checkpoint, in evaluation mode.

    Arguments and errors are those of `checkpoints.restore_network`.
    """
    model, noted = checkpoints.restore_network(
        content, path, use_ema, expect, DetectionConfig, _check_shapes, build_network
    )
    return model, noted.of_whole(model)


def _check_shapes(weights: Mapping[str, Tensor], config: DetectionConfig, classes: int, path: object) -> None:
    """Checks that a state dict has the tensors of the pyramid and the detector that its file notes.

    A file may be made to harm: what it notes must be no larger than the tensors that it has. So the shapes are those of
    a network without memory, whose backbone's channels the file's own tensors tell.

    Raises:
        CheckpointError: it has others.
    """
    settings = config.model.detector
    found = [weights[LATERAL.format(i)] for i in range(STAGES) if LATERAL.format(i) in weights]
    channels = [weight.shape[1] if weight.ndim == 4 else 0 for weight in found]
    unused = STAGES - len(channels)  # finer maps
    first = finest_stride(settings) // 2**unused
    if 0 in channels or first not in (2, 4):
        raise CheckpointError(f"{path} has no feature pyramid as it notes; it is no whole checkpoint of a detection")
    strides = [first * 2**i for i in range(STAGES)]
    try:
        with torch.device("meta"):
            parts = build_parts(settings, [0] * unused + channels, strides, classes)
    except ConfigError as e:
        raise CheckpointError(f"{path}: its network cannot be built: {e}") from None
    for prefix, part in zip(PARTS, parts, strict=True):
        for key, tensor in part.state_dict(prefix=prefix).items():
            own = weights.get(key)
            if own is None or own.shape != tensor.shape:
                what = "is missing" if own is None else f"has the shape {tuple(own.shape)}"
                raise CheckpointError(
                    f"{path} notes a {settings.name} of {settings.channels} channels for {classes} classes, and its "
                    f"{key} {what}"
                )
