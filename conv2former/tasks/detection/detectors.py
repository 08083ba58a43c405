"""torchvision's detectors for any maps: their feature pyramid, anchors and heads, in mixed precision, too.

Convolutions and linear layers of a detector run in the precision that autocast says. What it computes with boxes and
scores is float32: the last layers of its heads answer in float32, and anchors are float32 whatever the maps are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import LevelMapper

from ...errors import ConfigError, counted
from .config import DetectorConfig, EvaluationConfig

__all__ = ["TWO_STAGES", "build_detector", "build_pyramid", "finest_stride", "limit"]

TWO_STAGES = ("mask_rcnn", "faster_rcnn")  # propose boxes first, and have a class 0 for the background
RATIOS = (0.5, 1.0, 2.0)  # of heights to widths of anchors


def finest_stride(settings: DetectorConfig) -> int:
    """Returns the stride of the finest map that boxes are looked for on."""
    return settings.finest_stride or (4 if settings.name in TWO_STAGES else 8)


def build_pyramid(settings: DetectorConfig, channels: Sequence[int]) -> FeaturePyramidNetwork:
    """Returns the feature pyramid of a detector: a map for each of the backbone's, and one or two coarser ones.

    Args:
        settings: of the detector.
        channels: of the backbone's maps from the finest that is used on.
    """
    last = LastLevelMaxPool() if settings.name in TWO_STAGES else LastLevelP6P7(settings.channels, settings.channels)
    return FeaturePyramidNetwork(list(channels), settings.channels, last)


def build_detector(settings: DetectorConfig, strides: Sequence[int], num_classes: int) -> nn.Module:
    """Returns a detector of torchvision that has no backbone; what it is to call for its maps is to be put there.

    At 256 channels, the default, the heads are torchvision's own; with fewer they are narrower.

    Args:
        settings: of the detector.
        strides: of the backbone's maps from the finest that is used on.
        num_classes: without the background.

    Raises:
        ConfigError: there are not as many sizes of anchors as maps.
    """
    name, channels = settings.name, settings.channels
    backbone: Any = nn.Identity()
    backbone.out_channels = channels
    levels = [*strides, *(strides[-1] * factor for factor in ((2,) if name in TWO_STAGES else (2, 4)))]
    sizes = settings.anchor_sizes
    if sizes and len(sizes) != len(levels):
        on = ", ".join(map(str, levels))
        raise ConfigError(
            f"model.detector.anchor_sizes: {counted(len(sizes), 'size')} for {counted(len(levels), 'map')} (of the "
            f"strides {on}); give a size for each, the finest first"
        )
    detector: Any
    if name == "fcos":
        anchors = _Anchors(tuple((stride,) for stride in levels), ((1.0,),) * len(levels))
        head: nn.Module = _FCOSHead(channels, 1, num_classes, settings.head_convs)
        detector = FCOS(backbone, num_classes, anchor_generator=anchors, head=head)
    elif name == "retinanet":
        anchors = _Anchors(tuple(_octave(size) for size in sizes or (4 * stride for stride in levels)), RATIOS)
        head = _retinanet_head(channels, anchors.num_anchors_per_location()[0], num_classes, settings.head_convs)
        detector = RetinaNet(backbone, num_classes, anchor_generator=anchors, head=head)
    else:
        anchors = _Anchors(tuple((size,) for size in sizes or (8 * stride for stride in levels)), RATIOS)
        parts: dict[str, Any] = {
            "rpn_anchor_generator": anchors,
            "rpn_head": _RPNHead(channels, len(RATIOS)),
            "box_roi_pool": _pool(strides, 7),
            "box_head": TwoMLPHead(channels * 7**2, 4 * channels),
            "box_predictor": _BoxPredictor(4 * channels, num_classes + 1),
        }
        if name == "mask_rcnn":
            parts["mask_roi_pool"] = _pool(strides, 14)
            parts["mask_head"] = MaskRCNNHeads(channels, (channels,) * 4, 1)
            parts["mask_predictor"] = _MaskPredictor(channels, channels, num_classes + 1)
        detector = (MaskRCNN if name == "mask_rcnn" else FasterRCNN)(backbone, **parts)
    detector.transform = _Batching(strides[-1])
    return detector


def limit(detector: nn.Module, settings: EvaluationConfig) -> None:
    """Sets what of a detector's answers counts."""
    holder: Any = getattr(detector, "roi_heads", detector)
    holder.score_thresh, holder.nms_thresh = settings.score, settings.nms
    holder.detections_per_img = settings.max_detections


def _octave(size: float) -> tuple[int, ...]:
    """Returns RetinaNet's three anchors of a map, sides in pixels."""
    return tuple(int(size * 2 ** (third / 3)) for third in range(3))


def _pool(strides: Sequence[int], side: int) -> MultiScaleRoIAlign:
    """Returns what cuts boxes out of maps of these strides.

    torchvision would guess the strides from the first images it sees, and wrongly where those are tiny.
    """
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], side, sampling_ratio=2)
    found = cast(Any, pool)
    found.scales = [1 / stride for stride in strides]
    found.map_levels = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return pool


def _retinanet_head(channels: int, anchors: int, num_classes: int, convs: int) -> _RetinaNetHead:
    """Returns RetinaNet's head with another number of convolutions than torchvision's four."""
    head = _RetinaNetHead(channels, anchors, num_classes)
    for branch in (head.classification_head, head.regression_head):
        tower = [Conv2dNormActivation(channels, channels, norm_layer=None) for _ in range(convs)]
        for convolution, _ in tower:
            nn.init.normal_(convolution.weight, std=0.01)
            nn.init.zeros_(convolution.bias)
        branch.conv = nn.Sequential(*tower)
    return head


class _Batching(GeneralizedRCNNTransform):
    """Puts images into one tensor, filled up with 0 below and beside; they come resized and normalised.

    Args:
        stride: of which the sides of the tensor are multiples.
    """

    def __init__(self, stride: int) -> None:
        super().__init__(0, 0, [], [], size_divisible=stride)

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


class _Anchors(AnchorGenerator):
    """Anchors in float32, which torchvision's have in the type of the maps: bfloat16 has no odd numbers above 256."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        if feature_maps[0].dtype != torch.float32:  # only shapes, the type and the device are looked at
            feature_maps = [x.new_zeros((), dtype=torch.float32).expand(x.shape) for x in feature_maps]
        return super().forward(image_list, feature_maps)


class _RPNHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [t.float() for t in logits], [t.float() for t in deltas]


class _BoxPredictor(FastRCNNPredictor):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


class _MaskPredictor(MaskRCNNPredictor):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class _FCOSHead(FCOSHead):
    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {key: t.float() for key, t in super().forward(x).items()}


class _RetinaNetHead(RetinaNetHead):
    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {key: t.float() for key, t in super().forward(x).items()}
