"""The network: a backbone of this project's or of timm's registry, a feature pyramid and a detector of torchvision."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...data import Stream, seed_all
from ...errors import memory_for
from ..dense.maps import DenseNetwork, Maps, build_backbone
from ..dense.start import load_parts
from ..network import SMALLER, read_start
from .config import DetectionConfig, DetectorConfig, EvaluationConfig
from .detectors import TWO_STAGES, build_detector, build_pyramid, finest_stride, limit

__all__ = ["PARTS", "DetectionNetwork", "build_network", "build_parts"]

PARTS = ("pyramid.", "detector.")
LAST = (  # what has a row for each class
    "detector.roi_heads.box_predictor.",
    "detector.roi_heads.mask_predictor.mask_fcn_logits.",
    "detector.head.classification_head.cls_logits.",
)


class DetectionNetwork(DenseNetwork):
    """A backbone, its feature pyramid and a detector.

    Args:
        backbone, maps: see `DenseNetwork`.
        settings: of the detector.
        pyramid, detector: as `build_parts` returns them.

    Attributes:
        num_classes: without the background.
        in_chans: channels of the images.
        has_masks: whether it gives masks.
    """

    def __init__(
        self,
        backbone: nn.Module,
        maps: Maps,
        settings: DetectorConfig,
        pyramid: nn.Module,
        detector: nn.Module,
        num_classes: int,
        in_chans: int,
    ) -> None:
        super().__init__(backbone, maps)
        self.finest = maps.strides.index(finest_stride(settings))
        self.first_label = int(settings.name in TWO_STAGES)  # below it is the background
        self.pyramid, self.detector = pyramid, detector
        # It calls what stands there, and has no parameters of it: these are where layer groups, freezing and files
        # look for them. A method, unlike a closure, is copied with the network, as the average of weights is.
        del self.detector.backbone
        self.detector.backbone = self.levels  # type: ignore[assignment]
        self.num_classes, self.in_chans, self.has_masks = num_classes, in_chans, settings.name == "mask_rcnn"

    def levels(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Returns the maps of the pyramid, the finest first, of images (N, C, H, W) in one tensor."""
        maps = self.maps(images)[self.finest :]
        return self.pyramid(OrderedDict((str(i), x) for i, x in enumerate(maps)))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Finds boxes, or says how wrong it is.

        Args:
            images: each (in_chans, h, w), normalised, so that what is filled in beside them is the mean colour.
            targets: in training, of each image `boxes`, `labels` and perhaps `masks`; see `objects.TrainBatch`.

        Returns:
            In training the losses by name, scalars. Else of each image a dict of `boxes` (n, 4) left, top, right,
            bottom in its pixels, `scores` (n,), the highest first, `labels` (n,) from 0, and of a network with masks
            `masks` (n, 1, h, w), probabilities. float32.
        """
        if self.training:
            assert targets is not None
            own = [{**target, "labels": target["labels"] + self.first_label} for target in targets]
            return self.detector(images, own)
        return [{**found, "labels": found["labels"] - self.first_label} for found in self.detector(images)]

    def limit(self, settings: EvaluationConfig) -> None:
        """Sets what of its answers counts: lowest score, overlap, and number."""
        limit(self.detector, settings)


def build_parts(
    settings: DetectorConfig, channels: list[int], strides: list[int], num_classes: int
) -> tuple[nn.Module, nn.Module]:
    """Returns the feature pyramid and the detector for a backbone's maps, with fresh weights.

    Args:
        settings: of the detector.
        channels, strides: of all maps of the backbone.
        num_classes: without the background.

    Raises:
        ConfigError: there are not as many sizes of anchors as maps.
    """
    finest = strides.index(finest_stride(settings))
    detector = build_detector(settings, strides[finest:], num_classes)
    return build_pyramid(settings, channels[finest:]), detector


def build_network(
    config: DetectionConfig, num_classes: int, class_names: Sequence[str] | None = None
) -> DetectionNetwork:
    """Builds the network on the CPU; the backbone has the configured starting weights. The same seed gives the same.

    Pyramid and detector have those of a detection's checkpoint, too, and are fresh otherwise.

    Args:
        config: the run.
        num_classes: of the data.
        class_names: of the data, in index order; None where they are not known.

    Raises:
        ConfigError: there is no such network, it has no four maps, or the anchors are not for these.
        CheckpointError: the starting weights cannot be read or do not fit.
    """
    backbone, maps = build_backbone(config)
    settings, path = config.model.detector, config.model.checkpoint
    seed_all(Stream.INIT, config.train.seed, 1)  # after the backbone's, which may come from a file
    what = f"the detector {settings.name} of {settings.channels} channels"
    with memory_for(what, f"lower model.detector.channels, or {SMALLER}"):
        parts = build_parts(settings, maps.channels, maps.strides, num_classes)
    model = DetectionNetwork(backbone, maps, settings, *parts, num_classes, config.model.in_chans or 3)
    model.limit(config.evaluation)
    if path:
        load_parts(model, read_start(path), path, class_names, config.task, "detector", PARTS, LAST)
    return model
