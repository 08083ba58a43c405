"""The configuration of a detection: what every task has, config/base.py, and what is detection's own.

One class per YAML section, every key with its unit and default.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..._preprocessing import size_text
from ...config.base import (
    Above0,
    BaseCheckpointConfig,
    BaseConfig,
    BaseDataConfig,
    BaseEarlyStopConfig,
    BaseTrainConfig,
    Interval,
    Location,
    ModelConfig,
    Probability,
    Section,
)

__all__ = ["UNUSED_AUGMENT", "UNUSED_DATA", "DetectionConfig", "DetectionData", "Detector"]

Detector = Literal["mask_rcnn", "faster_rcnn", "fcos", "retinanet"]
Metric = Literal["ap", "ap50", "ap75", "mask_ap", "mask_ap50", "mask_ap75"]
Channels = Annotated[int, Field(ge=8, le=4096)]
Pixels = Annotated[int, Field(ge=8, le=16_384)]
# what is in conflict with nothing, where nothing is trained
UNUSED_AUGMENT = {"resize": "multi_scale", "short_sides": [8], "scale": [1, 1], "crop_scale": [1, 1]}
UNUSED_DATA = {"img_size": None}


class DetectorConfig(Section):
    """What makes boxes from the backbone's maps: a feature pyramid and a detector of torchvision."""

    # mask_rcnn also gives a mask for each box, and needs masks in the data
    name: Detector = "faster_rcnn"
    channels: Channels = (
        256  # of the maps of the feature pyramid, and of the heads; of fcos a multiple of 32, 64 or more
    )
    # stride of the finest map that boxes are looked for on; null: 4 for mask_rcnn and faster_rcnn, 8 for the others
    finest_stride: Literal[4, 8] | None = None
    # side of the anchors on each map, the finest first, pixels of the network's input; null: torchvision's, which
    # double from map to map. Of fcos, which has none, this is not used and refused.
    anchor_sizes: Annotated[tuple[Above0, ...], Field(min_length=1, max_length=8)] | None = None
    head_convs: Annotated[int, Field(ge=1, le=8)] = 4  # of fcos and retinanet: 3x3 convolutions of each branch


class DetectionModel(ModelConfig):
    """Which network, and from which weights it starts."""

    detector: DetectorConfig = DetectorConfig()


class DetectionData(BaseDataConfig):
    """Where images and boxes are, and how they become the network's input."""

    # coco: a JSON file for each split, and folders of images. yolo: a data.yaml, which may also be data.root itself, an
    # obj.data, or images/SPLIT and labels/SPLIT.
    # voc: JPEGImages, Annotations/NAME.xml and ImageSets/Main/SPLIT.txt, or folders of images and XML files.
    # hf: a local folder that `datasets` reads, or a name on the Hugging Face hub, with a column of images and one of
    # objects as COCO's sets there have it.
    source: Literal["coco", "yolo", "voc", "hf"] = "coco"
    # null: train, or training, in capitals, too, or the only split if it is not called like one
    train_split: Location | None = None
    val_split: Location | None = None  # null: validation, val, valid or test, whichever exists first; in capitals, too
    # the share of the training images that is held out for validation where the data has no split for it; which they
    # are is a function of the images' names and the seed. null: nothing is
    holdout: Annotated[float, Field(gt=0.0, le=0.5)] | None = None
    holdout_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    # coco only: the JSON files, relative to root or absolute; null: those that are found by the splits' names
    train_annotations: Location | None = None
    val_annotations: Location | None = None
    # coco only: the folders that the file names in these are relative to; null: found by the splits' names
    train_images: Location | None = None
    val_images: Location | None = None
    image_key: str = "image"  # hf only: columns of the data set
    objects_key: str = "objects"
    # hf only: what four numbers are a box. coco: left, top, width, height. xyxy: left, top, right, bottom
    box_format: Literal["coco", "xyxy"] = "coco"
    absolute_paths: bool = False  # hf only: read files outside data.root, too, where the data has their absolute paths
    # a text file with a class name a line, of all classes; null: what the data says. Categories without objects that
    # are not in it are left out
    class_names: Location | None = None
    # an evaluation resizes images, with their aspect ratio, until the shorter side has `short_side` pixels, or the
    # longer one `long_side` where it would be longer
    short_side: Pixels = 800
    long_side: Pixels = 1333

    @property
    def streaming(self) -> bool:
        """Whether a Hugging Face set is read as it comes, which classification can."""
        return False


class DetectionAugment(Section):
    """Augmentation of a training image, its boxes and its masks. The defaults are those of COCO's usual recipes."""

    # multi_scale: the shorter side is one of `short_sides`, the longer at most data.long_side. large_scale_jitter: as
    # large as fits into data.img_size, times a factor of `scale`, then cropped or filled up to data.img_size
    resize: Literal["multi_scale", "large_scale_jitter"] = "multi_scale"
    short_sides: Annotated[tuple[Pixels, ...], Field(min_length=1, max_length=64)] = (
        480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800,
    )  # fmt: skip
    scale: Interval = (0.1, 2.0)
    # of multi_scale: of a crop, before it is resized, that shows at least one box whole or in part if there is one
    crop: Probability = 0.0
    crop_scale: Interval = (0.3, 1.0)  # the sides of such a crop, shares of the image's
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    # of each of four changes of colour: brightness by up to an eighth, contrast and saturation by up to a half, hue by
    # a twentieth of the circle; grey images keep theirs
    photometric: Probability = 0.0


class EvaluationConfig(Section):
    """What of a network's answers counts: in training, and by the same file afterwards.

    The defaults are those of torchvision's Mask R-CNN and Faster R-CNN.
    """

    score: Probability = 0.05  # boxes of a lower score are left out
    nms: Probability = 0.5  # of two boxes of a class that overlap by a larger IoU, the lower score is left out
    max_detections: Annotated[int, Field(ge=1, le=10_000)] = 100  # of an image, those of the highest scores
    pictures: Annotated[int, Field(ge=0, le=32)] = 6  # images of the most mistakes that the end of a run draws


class DetectionEarlyStop(BaseEarlyStopConfig):
    """When a run that gets no better ends before its last epoch."""

    metric: Metric | None = None


class DetectionTrain(BaseTrainConfig):
    """One step and the order of the run."""

    early_stop: DetectionEarlyStop | None = None


class DetectionCheckpoint(BaseCheckpointConfig):
    """When the run is saved. Every evaluated epoch and the end always are."""

    metric: Metric = "ap"


class DetectionConfig(BaseConfig):
    """A whole run of object detection or instance segmentation."""

    task: Literal["detection"] = "detection"
    model: DetectionModel = DetectionModel()
    data: DetectionData = DetectionData()
    augment: DetectionAugment = DetectionAugment()
    evaluation: EvaluationConfig = EvaluationConfig()
    train: DetectionTrain = DetectionTrain()
    checkpoint: DetectionCheckpoint = DetectionCheckpoint()

    @property
    def has_masks(self) -> bool:
        """Whether the network gives masks, and is trained on the data's."""
        return self.model.detector.name == "mask_rcnn"

    @property
    def image_fields(self) -> tuple[str, ...]:
        """See `BaseConfig`."""
        return ("img_size", "mean", "std") if self.augment.resize == "large_scale_jitter" else ("mean", "std")

    @property
    def size_shown(self) -> str:
        """See `BaseConfig`."""
        return f"{self.data.short_side} to {self.data.long_side}"

    def image_texts(self) -> dict[str, str]:
        """See `BaseConfig`."""
        texts, data, sides = super().image_texts(), self.data, self.augment.short_sides
        evaluated = f"{data.short_side} in an evaluation, longer side at most {data.long_side}"
        if "img_size" in texts:
            texts["img_size"] = f"training images of {size_text(data.preprocessing.size)}"
            return {**texts, "short_side": f"shorter side {evaluated}"}
        several = f"{min(sides)} to {max(sides)}" if len({*sides}) > 1 else f"{sides[0]}"
        return {"short_side": f"shorter side {several} pixels in training, {evaluated}", **texts}

    def without_effect(self, key: str) -> str:
        """See `BaseConfig`."""
        if key != "img_size":
            return super().without_effect(key)
        return (
            "data.img_size: has no effect with augment.resize multi_scale; images are sized by augment.short_sides in "
            "training, by data.short_side in an evaluation, and by data.long_side in both"
        )

    def conflicts(self) -> list[str]:
        """See `BaseConfig`."""
        found, data, detector = super().conflicts(), self.data, self.model.detector
        if data.cache != "none":
            found.append(f"data.cache: {data.cache} holds images without boxes; leave it out")
        for key in ("train_annotations", "val_annotations", "train_images", "val_images"):
            if getattr(data, key) and data.source != "coco":
                found.append(f"data.{key}: only with data.source coco, not {data.source}")
        if data.absolute_paths and data.source != "hf":
            found.append(f"data.absolute_paths: only with data.source hf, not {data.source}")
        if data.short_side > data.long_side:
            found.append(f"data.short_side: above data.long_side: {data.short_side} > {data.long_side}")
        for key in ("scale", "crop_scale"):
            low, high = getattr(self.augment, key)
            if low > high:
                found.append(f"augment.{key}: the first number must not be above the second: [{low}, {high}]")
        if self.augment.resize == "large_scale_jitter" and data.img_size is None:
            found.append("augment.resize: large_scale_jitter makes images of data.img_size; set it, such as 1024")
        if self.augment.crop_scale[1] > 1:
            found.append(
                f"augment.crop_scale: shares of the image's sides, at most 1, not {self.augment.crop_scale[1]:g}"
            )
        if self.augment.resize == "multi_scale" and max(self.augment.short_sides) > data.long_side:
            found.append(
                f"augment.short_sides: {max(self.augment.short_sides)} is above data.long_side, {data.long_side}"
            )
        if detector.name == "fcos" and (detector.channels % 32 or detector.channels < 64):
            # it normalises in 32 groups, of maps that may have one pixel
            found.append(f"model.detector.channels: a multiple of 32 from 64 on for fcos, not {detector.channels}")
        if self.train.compile and self.augment.resize == "multi_scale":
            found.append(
                "train.compile: with augment.resize multi_scale most batches have a size of their own, and blocks are "
                "compiled anew for each; set it to false, or take large_scale_jitter"
            )
        if detector.anchor_sizes and detector.name == "fcos":
            found.append("model.detector.anchor_sizes: fcos has no anchors; leave it out")
        metrics = {"checkpoint.metric": self.checkpoint.metric}
        if self.train.early_stop and self.train.early_stop.metric:
            metrics["train.early_stop.metric"] = self.train.early_stop.metric
        for key, metric in metrics.items():
            if metric.startswith("mask_") and not self.has_masks:
                found.append(f"{key}: {metric} needs masks, and {detector.name} gives none; choose ap")
        return found
