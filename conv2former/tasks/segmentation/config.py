"""The configuration of a segmentation: what every task has, config/base.py, and what is segmentation's own.

One class per YAML section, every key with its unit and default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..._preprocessing import FIELDS, size_text
from ...config.base import (
    BaseCheckpointConfig,
    BaseConfig,
    BaseDataConfig,
    BaseEarlyStopConfig,
    BaseTrainConfig,
    ImgSize,
    Interval,
    Location,
    ModelConfig,
    NonNegative,
    Probability,
    Rate,
    Section,
)

__all__ = ["Head", "SegmentationConfig", "SegmentationData"]

Metric = Literal["miou", "loss", "pixel_accuracy", "mean_accuracy"]
Head = Literal["upernet", "fpn", "deeplabv3plus", "segformer"]
Channels = Annotated[int, Field(ge=8, le=4096)]


class HeadConfig(Section):
    """What makes classes of pixels from the backbone's maps: a decoder of segmentation-models-pytorch."""

    name: Head = "upernet"
    channels: Channels = 256  # of its maps; of fpn a multiple of 32, 64 or more
    dropout: Rate = 0.1  # of whole channels, before the last convolution
    # a second, small head on the third stage, FCN, that helps in training alone: its share of the loss; 0 for none
    auxiliary: NonNegative = 0.4
    auxiliary_channels: Channels = 256


class SegmentationModel(ModelConfig):
    """Which network, and from which weights it starts."""

    head: HeadConfig = HeadConfig()


class SegmentationData(BaseDataConfig):
    """Where images and masks are, and how they become the network's input. `img_size` is that of training's crops."""

    # folder: root/images/SPLIT/NAME.jpg and root/masks/SPLIT/NAME.png; a pair has one name, its ending aside.
    # csv: the folder that the paths in a table are relative to; without `csv` it also holds a SPLIT.csv per split.
    # hf: a local folder that `datasets` reads, or a name on the Hugging Face hub, with a column of images and of masks.
    # ade20k: the folder ADEChallengeData2016. cityscapes: the folder with leftImg8bit and gtFine.
    source: Literal["folder", "csv", "hf", "ade20k", "cityscapes"] = "folder"
    train_split: Location | None = None  # null: train, or training
    val_split: Location | None = None  # null: validation, val, valid or test, whichever exists first
    # the share of the training images that is held out for validation where the data has no split for it; which they
    # are is a function of the images' names and the seed. null: nothing is
    holdout: Annotated[float, Field(gt=0.0, le=0.5)] | None = None
    holdout_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    csv: Location | None = None  # csv only: a .csv or .tsv with a header, of all splits or of one
    image_key: str = "image"  # hf and csv: columns of the data set
    mask_key: str = "mask"
    split_key: str = "split"  # csv only: the column, if there is one, that says to which split a row belongs
    absolute_paths: bool = False  # hf only: read files outside data.root, too, where the data has their absolute paths
    # what the numbers in a mask mean. index: places in the list of classes, from 0. minus_one: the same from 1, and 0
    # is ignored, as in ADE20K. binary: 0 is the first of two classes, any other number the second. cityscapes:
    # labelIds, of which 19 are classes. null: as the source has it, index for folder, csv and hf
    labels: Literal["index", "minus_one", "binary", "cityscapes"] | None = None
    # the number in masks of pixels that count for nothing, beside those that `labels` leaves out; null: there is none
    ignore_index: Annotated[int, Field(ge=0, le=65_535)] | None = 255
    # a text file with a class name a line; null: root/classes.txt, or the source's own
    class_names: Location | None = None
    # where nothing names the classes: how many there are; otherwise checked against them
    num_classes: Annotated[int, Field(ge=2, le=32_767)] | None = None
    # images are resized, with their aspect ratio, until their shorter side has so many pixels, before all else; null:
    # they keep their size. An evaluation compares with the masks as they are
    short_side: Annotated[int, Field(ge=8, le=16_384)] | None = None
    # read every mask before the first step: one that does not fit its image or its classes is named at once, and not
    # in the middle of the run. What was found is kept, and counted anew where a file has changed
    check: bool = True

    @model_validator(mode="before")
    @classmethod
    def _without_useless_notes(cls, raw: Any) -> Any:
        """Leaves out what runs of earlier versions noted and did not use: they noted all of a preprocessing."""
        if isinstance(raw, Mapping) and all(raw.get(key) is not None for key in FIELDS):
            return {key: value for key, value in raw.items() if key not in ("interpolation", "crop_pct", "crop_mode")}
        return raw

    @property
    def label_key(self) -> str:
        """The column of masks, where the readers of tables look for that of labels."""
        return self.mask_key

    @property
    def streaming(self) -> bool:
        """Whether a Hugging Face set is read as it comes, which classification can."""
        return False


class SegmentationAugment(Section):
    """Augmentation of a training image and its mask. The defaults are those of UPerNet's recipes."""

    scale: Interval = (0.5, 2.0)  # factors by which it is resized before it is cropped, alike on a logarithmic scale
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    # of each of four changes of colour: brightness by up to an eighth, contrast and saturation by up to a half, hue by
    # a twentieth of the circle; grey images keep theirs
    photometric: Probability = 0.5
    # the largest share of a crop that one class may have; where it has more, another crop is tried, ten times
    max_class_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75


class SegmentationLoss(Section):
    """What is minimised: the mean over all pixels of the cross-entropy, 0 at pixels that are ignored."""

    # weight of each class: a list in the order of the classes; balanced: one over its pixels; sqrt: over their root,
    # with 1 as the mean over all pixels
    class_weights: Literal["none", "balanced", "sqrt"] | Annotated[tuple[NonNegative, ...], Field(min_length=2)] = (
        "none"
    )
    dice: NonNegative = 0.0  # factor of the Dice loss, which is added: 1 minus the mean overlap of an image's classes


class EvaluationConfig(Section):
    """How an image is evaluated: in training, and by the same file afterwards."""

    mode: Literal["whole", "slide"] = "whole"  # slide: in windows that overlap, whose answers are averaged
    window: ImgSize | None = None  # of slide; null: data.img_size
    overlap: Annotated[float, Field(ge=0.0, le=0.9)] = 1 / 3  # of slide: the share that a window has with the next
    flip: bool = False  # also evaluate the mirrored image, and average
    pictures: Annotated[int, Field(ge=0, le=32)] = 6  # images of the lowest IoU that the end of a run draws


class SegmentationEarlyStop(BaseEarlyStopConfig):
    """When a run that gets no better ends before its last epoch."""

    metric: Metric | None = None


class SegmentationTrain(BaseTrainConfig):
    """One step and the order of the run."""

    early_stop: SegmentationEarlyStop | None = None


class SegmentationCheckpoint(BaseCheckpointConfig):
    """When the run is saved. Every evaluated epoch and the end always are."""

    metric: Metric = "miou"


class SegmentationConfig(BaseConfig):
    """A whole run of semantic segmentation."""

    task: Literal["segmentation"] = "segmentation"
    model: SegmentationModel = SegmentationModel()
    data: SegmentationData = SegmentationData()
    augment: SegmentationAugment = SegmentationAugment()
    loss: SegmentationLoss = SegmentationLoss()
    evaluation: EvaluationConfig = EvaluationConfig()
    train: SegmentationTrain = SegmentationTrain()
    checkpoint: SegmentationCheckpoint = SegmentationCheckpoint()

    @property
    def image_fields(self) -> tuple[str, ...]:
        """See `BaseConfig`."""
        return ("img_size", "mean", "std")

    def image_texts(self) -> dict[str, str]:
        """See `BaseConfig`."""
        crops, short_side = f"training crops of {size_text(self.data.preprocessing.size)}", self.data.short_side
        more = {"short_side": f"resized to a shorter side of {short_side}"} if short_side else {}
        return {**super().image_texts(), "img_size": crops, **more}

    @property
    def labels(self) -> str:
        """What the numbers in masks mean."""
        own = {"ade20k": "minus_one", "cityscapes": "cityscapes"}
        return self.data.labels or own.get(self.data.source, "index")

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the windows of a sliding evaluation, pixels."""
        size = self.evaluation.window or self.data.preprocessing.size
        return (size, size) if isinstance(size, int) else size

    def conflicts(self) -> list[str]:
        """See `BaseConfig`."""
        found, data, head = super().conflicts(), self.data, self.model.head
        if data.cache != "none":
            found.append(f"data.cache: {data.cache} holds images without masks; leave it out")
        if data.csv and data.source != "csv":
            found.append(f"data.csv: only with data.source csv, not {data.source}")
        if data.absolute_paths and data.source != "hf":
            found.append(f"data.absolute_paths: only with data.source hf, not {data.source}")
        if self.labels == "binary" and data.ignore_index == 255:
            found.append(
                "data.ignore_index: with data.labels binary 255 is the second class; set data.ignore_index=null"
            )
        low, high = self.augment.scale
        if low > high:
            found.append(f"augment.scale: the first number must not be above the second: [{low}, {high}]")
        if head.name == "fpn" and (head.channels % 32 or head.channels < 64):  # it normalises in 32 groups
            found.append(f"model.head.channels: a multiple of 32 from 64 on for fpn, not {head.channels}")
        if self.loss.class_weights in ("balanced", "sqrt") and not data.check:
            found.append(f"loss.class_weights: {self.loss.class_weights} needs pixels counted; leave data.check on")
        if self.train.batch_size == 1 and head.name in ("upernet", "deeplabv3plus"):
            found.append(
                f"train.batch_size: {head.name} normalises, over the batch, what it has pooled to one pixel, and needs "
                "2 images or more; raise it, or choose model.head.name=fpn"
            )
        return found
