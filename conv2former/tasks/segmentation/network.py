"""The network: a backbone of this project's or of timm's registry, a head on its four maps, logits for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...data import Stream, seed_all
from ...errors import memory_for
from ..dense.maps import STAGES, DenseNetwork, Maps, build_backbone
from ..dense.start import load_parts
from ..network import SMALLER, read_start
from .config import SegmentationConfig
from .heads import Auxiliary, build_head, output_stride_of

__all__ = ["SegmentationNetwork", "build_network"]

HEADS = ("head.", "auxiliary.")
CLASSIFIERS = ("head.classifier.", "auxiliary.4.")  # what has a row for each class


class SegmentationNetwork(DenseNetwork):
    """A backbone and its head.

    Args:
        backbone, maps: see `DenseNetwork`.
        stride: of which images are filled up to a multiple.
        head: four maps to logits.
        auxiliary: the third map to logits, in training; None for none.

    Attributes:
        num_classes: of the logits.
        in_chans: channels of the images.
    """

    def __init__(
        self,
        backbone: nn.Module,
        maps: Maps,
        stride: int,
        head: nn.Module,
        auxiliary: nn.Module | None,
        num_classes: int,
        in_chans: int,
    ) -> None:
        super().__init__(backbone, maps)
        self.stride = stride
        self.head, self.auxiliary = head, auxiliary
        self.num_classes, self.in_chans = num_classes, in_chans

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Maps images to logits of their size, float32.

        The images are filled up, below and beside, to a multiple of the stride, and the logits cut again.

        Args:
            images: (N, in_chans, H, W), normalised, so that what is filled in is the mean colour.

        Returns:
            (N, num_classes, H, W); in training a tuple of these, and of those of the auxiliary head if there is one.
        """
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        maps = self.maps(padded)
        logits = _enlarged(self.head(maps), padded, height, width)
        if not self.training:
            return logits
        if self.auxiliary is None:
            return (logits,)
        return logits, _enlarged(self.auxiliary(maps[2]), padded, height, width)


def _enlarged(logits: torch.Tensor, padded: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Returns logits at the size of the padded images, cut to that of the images; float32."""
    size = padded.shape[-2:]
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)[..., :height, :width]


def build_network(
    config: SegmentationConfig, num_classes: int, class_names: Sequence[str] | None = None
) -> SegmentationNetwork:
    """Builds the network on the CPU; the backbone has the configured starting weights. The same seed gives the same.

    Heads have those of a segmentation's checkpoint, too, and are fresh otherwise.

    Args:
        config: the run.
        num_classes: of the data.
        class_names: of the data, in index order; None where they are not known.

    Raises:
        ConfigError: there is no such network, or it has no four maps.
        CheckpointError: the starting weights cannot be read or do not fit.
    """
    head = config.model.head
    stride = output_stride_of(head.name)
    options: dict[str, Any] = {} if stride == 32 else {"output_stride": stride}
    backbone, maps = build_backbone(config, **options)
    seed_all(Stream.INIT, config.train.seed, 1)  # after the backbone's, which may come from a file
    with memory_for(f"the head {head.name} of {head.channels} channels", f"lower model.head.channels, or {SMALLER}"):
        built = build_head(head, maps.channels, maps.strides[-1] // maps.strides[0], num_classes)
        auxiliary = None
        if head.auxiliary:
            auxiliary = Auxiliary(maps.channels[2], head.auxiliary_channels, num_classes, head.dropout)
    multiple = maps.strides[0] * 2 ** (
        STAGES - 1
    )  # also where the last stage is dilated, whose maps decoders halve alike
    in_chans, path = config.model.in_chans or 3, config.model.checkpoint
    model = SegmentationNetwork(backbone, maps, multiple, built, auxiliary, num_classes, in_chans)
    if path:
        load_parts(model, read_start(path), path, class_names, config.task, "head", HEADS, CLASSIFIERS)
    return model
