"""The network: a backbone of this project's or of timm's registry, a head on its four maps, logits for every pixel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ...data import Stream, seed_all
from ...errors import ConfigError, first_line, memory_for
from ...models import Conv2Former
from ...weights.others import OtherNetwork
from ..network import SMALLER, build_model, compile_network, find_network, read_start
from ..network import freeze as freeze_network
from .config import SegmentationConfig
from .heads import Auxiliary, build_head, output_stride_of
from .start import load_heads

__all__ = ["SegmentationNetwork", "build_network", "compile_parts", "freeze"]

STAGES = 4
STARTS = re.compile(r"(?<![\[\\])\^")  # a ^ that stands for the start of a name


class SegmentationNetwork(nn.Module):
    """A backbone and its head.

    Args:
        backbone: has `forward_intermediates`, as timm's networks have.
        indices: of the four maps, for that method.
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
        indices: Sequence[int],
        stride: int,
        head: nn.Module,
        auxiliary: nn.Module | None,
        num_classes: int,
        in_chans: int,
    ) -> None:
        super().__init__()
        self.backbone, self.indices, self.stride = backbone, list(indices), stride
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
        maps = cast(Any, self.backbone).forward_intermediates(padded, indices=self.indices, intermediates_only=True)
        logits = _enlarged(self.head(maps), padded, height, width)
        if not self.training:
            return logits
        if self.auxiliary is None:
            return (logits,)
        return logits, _enlarged(self.auxiliary(maps[2]), padded, height, width)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns timm's patterns for layer groups: the backbone's own, from its stem on; the heads are above them."""
        groups = cast(Any, self.backbone).group_matcher(coarse=coarse)
        return {name: _below_backbone(patterns) for name, patterns in groups.items()}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that are left out of weight decay beyond those of one dimension: the backbone's."""
        own: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in own}


def _enlarged(logits: torch.Tensor, padded: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Returns logits at the size of the padded images, cut to that of the images; float32."""
    size = padded.shape[-2:]
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)[..., :height, :width]


def _below_backbone(patterns: Any) -> Any:
    """Returns timm's patterns of a layer group, regular expressions from a name's start, below `backbone.`."""
    if isinstance(patterns, (list, tuple)):
        return [(_prefixed(pattern), *rest) for pattern, *rest in patterns]
    return _prefixed(patterns)


def _prefixed(pattern: str) -> str:
    return rf"^backbone\.(?:{STARTS.sub('', pattern)})"


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
    network = find_network(config)
    # others are tried with an image, for which they need a classifier; it is removed again
    backbone: Any = build_model(config, int(isinstance(network, OtherNetwork)), **options)
    indices, channels, strides = _maps_of(backbone, network.name)
    seed_all(Stream.INIT, config.train.seed, 1)  # after the backbone's, which may come from a file
    with memory_for(f"the head {head.name} of {head.channels} channels", f"lower model.head.channels, or {SMALLER}"):
        built = build_head(head, channels, strides[-1] // strides[0], num_classes)
        auxiliary = None
        if head.auxiliary:
            auxiliary = Auxiliary(channels[2], head.auxiliary_channels, num_classes, head.dropout)
    multiple = strides[0] * 2 ** (STAGES - 1)  # also where the last stage is dilated, whose maps decoders halve alike
    in_chans, path = config.model.in_chans or 3, config.model.checkpoint
    model = SegmentationNetwork(backbone, indices, multiple, built, auxiliary, num_classes, in_chans)
    if path:
        load_heads(model, read_start(path), path, class_names)
    return model


def _maps_of(backbone: Any, name: str) -> tuple[list[int], list[int], list[int]]:
    """Removes a backbone's classifier and what leads to it, and returns which four maps it has for a head.

    Returns:
        Their indices for `forward_intermediates`, their channels and their strides.

    Raises:
        ConfigError: it has no four of which each is half as large as the one before.
    """
    info = list(getattr(backbone, "feature_info", []))[-STAGES:]
    first = len(getattr(backbone, "feature_info", [])) - len(info)
    strides: list[int] = [feature["reduction"] for feature in info]
    if len(strides) != STAGES or not hasattr(backbone, "forward_intermediates") or strides[0] not in (2, 4):
        raise ConfigError(
            f"model.name: {name} has no four maps of an image, each of half the size of the one before, for a head"
        )
    indices = list(range(first, first + STAGES))
    try:
        backbone.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
    except (AttributeError, AssertionError, TypeError, ValueError) as e:
        raise ConfigError(f"model.name: {name} cannot give its maps to a head ({first_line(e)})") from None
    return indices, [feature["num_chs"] for feature in info], strides


def freeze(model: SegmentationNetwork, until: str) -> None:
    """Freezes the backbone up to and including a part, see `tasks.network.freeze`; `backbone` is all but the heads."""
    if until == "backbone":
        model.backbone.eval().requires_grad_(False)
    elif until != "nothing" or isinstance(model.backbone, Conv2Former):
        freeze_network(model.backbone, until)


def compile_parts(model: SegmentationNetwork) -> nn.Module:
    """Returns what to train the network through: a Conv2Former's blocks are compiled, or else the whole.

    Raises:
        UserError: there is no torch.compile here.
    """
    if isinstance(model.backbone, Conv2Former):
        compile_network(model.backbone)
        return model
    return compile_network(model)
