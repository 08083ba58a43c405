"""The configuration of a classifier's training: what every task has, base.py, and what is classification's own.

One class per YAML section, every key with its unit and default.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from .auto import AUTO_KEYS, fitted
from .base import (
    ONE,
    WORD,
    BaseCheckpointConfig,
    BaseConfig,
    BaseDataConfig,
    BaseEarlyStopConfig,
    BaseTrainConfig,
    Epochs,
    Interval,
    Location,
    NonNegative,
    Positive,
    Probability,
    Rate,
    Section,
    Side,
)

__all__ = ["NO_SPLIT", "Config"]

NO_SPLIT = "none"  # as `data.val_split`: no validation split, even where one could be found

Flip = Annotated[
    Annotated[Probability, Tag(ONE)] | Annotated[Literal["alternating"], Tag(WORD)],
    Discriminator(lambda value: WORD if isinstance(value, str) else ONE),
]
Metric = Literal["top1", "loss", "macro_f1", "balanced_accuracy"]


class DataConfig(BaseDataConfig):
    """Where the images are, and their size and normalisation."""

    source: Literal["folder", "csv", "hf", "wds", "digits"] = "folder"
    # folder: a folder with one folder per split, in it one per class.
    # csv: the folder that the paths in a table are relative to; without `csv` it also holds a SPLIT.csv per split.
    # hf: a local folder of parquet, arrow or image files that `datasets` reads, or a name on the Hugging Face hub.
    # wds: a folder of WebDataset tars, root/SPLIT/*.tar or root/SPLIT-*.tar, on a local or mounted disk.
    # digits: where scikit-learn's digits are written, once, as a parquet data set.
    root: Location = ""
    train_split: Location = "train"
    # null: validation, val, valid or test, whichever exists first; none: no split, hold training images out (`holdout`)
    val_split: Location | None = None
    # csv only: a .csv or .tsv with a header, of all splits or of one, or a .txt of lines `path label` without a header
    csv: Location | None = None
    image_key: str = "image"  # hf and csv: columns of the data set
    label_key: str = "label"  # also of the json files in tars
    split_key: str = "split"  # csv only: the column, if there is one, that says to which split a row belongs
    # a text file with a class name a line: which classes there are, in which order; it also names labels 0, 1, ...
    class_names: Location | None = None
    # the share of each class that is held out of training for validation, where `val_split` is none, or is null and the
    # data has no validation split; a function of this, the seed and the images' names. 0 and null: nothing is held out.
    holdout: Annotated[float, Field(ge=0.0, le=0.5)] | None = None
    holdout_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    # filled in by the run: which images are held out. An evaluation with other ones is refused.
    holdout_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    # how often the classes are seen in an epoch, whose length stays: as often as they have images; equally often; or
    # between the two, by the square root of their images. Images of rare classes repeat, each time augmented anew.
    sampling: Literal["uniform", "balanced", "sqrt"] = "uniform"
    # null: as many as the data has; otherwise checked against it
    num_classes: Annotated[int, Field(ge=1, le=10**6)] | None = None
    # hf only: read image files outside data.root, too, where the data has their absolute paths
    absolute_paths: bool = False
    streaming: bool = False  # hf only: read the training images as they come instead of storing the data set first
    epoch_images: Positive | None = None  # with streaming: how many images an epoch is; the length is not guessed
    # with streaming: images in the buffer that the order is drawn from, per process
    shuffle_images: Annotated[int, Field(ge=1, le=10**7)] = 4096


class AugmentConfig(Section):
    """Augmentation of the training images, in timm's terms. The defaults are the ImageNet recipe."""

    scale: Interval = (0.08, 1.0)  # of the random crop's area
    ratio: Interval = (3 / 4, 4 / 3)  # width by height, relative to that of data.img_size
    # pixels. The whole image, mirrored at its edges, moves by up to so many; `scale` and `ratio` have no effect. For
    # small images, whose objects are then as large as in the evaluation; 4 is usual for 32 x 32. null: a random crop
    padding: Annotated[int, Field(ge=1, le=31)] | None = None
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    # left and right. alternating: an image is mirrored in every other epoch, half of the images in the first
    hflip: Flip = 0.5
    vflip: Probability = 0.0
    color_jitter: NonNegative = 0.4  # without effect where auto_augment is set, as in timm
    # a timm policy string: RandAugment, or one of its AutoAugment policies
    auto_augment: Annotated[str, Field(pattern=r"^(rand|original|originalr|v0|v0r|3a)(-|$)")] | None = (
        "rand-m9-mstd0.5-inc1"
    )
    re_prob: Probability = 0.25  # random erasing
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: NonNegative = 0.8  # alpha; 0 turns it off
    cutmix: NonNegative = 1.0
    mix_prob: Probability = 1.0  # of a batch to be mixed at all
    mix_switch_prob: Probability = 0.5  # of cutmix, where both are on
    mix_off_epochs: Epochs = 0  # the last epochs without either, cool-down included
    # grow from this to data.img_size, in steps of 32 pixels; of its shorter side, and the longer one in proportion
    first_img_size: Side | None = None
    smoothing: Rate = 0.1  # of the labels


class EarlyStopConfig(BaseEarlyStopConfig):
    """When a run that gets no better ends before its last epoch."""

    metric: Metric | None = None


class TrainConfig(BaseTrainConfig):
    """One step and the order of the run."""

    early_stop: EarlyStopConfig | None = None
    # weight of a class in the training loss: by one over its images, or over their square root; 1 in the mean over them
    class_weight: Literal["none", "balanced", "sqrt"] = "none"
    # before the first step, fit a linear classifier to the features of the starting weights. evaluate: measure it as
    # epoch 0, and keep it as best.pt until something is better; start: also train from it, not from a fresh classifier.
    # docs/finetune.md
    linear_probe: Literal["none", "evaluate", "start"] = "none"


class CheckpointConfig(BaseCheckpointConfig):
    """When the run is saved. Every evaluated epoch and the end always are."""

    metric: Metric = "top1"


class Config(BaseConfig):
    """A whole run of image classification."""

    auto_keys: ClassVar[tuple[str, ...]] = AUTO_KEYS

    task: Literal["classification"] = "classification"
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def weighs(self) -> bool:
        """Whether the classes have weights in the loss."""
        return self.train.class_weight != "none"

    @property
    def pairs_images(self) -> bool:
        return bool(self.augment.mixup or self.augment.cutmix)

    def fitting_values(self, images: int, batch: int) -> dict[str, Any]:
        """See `AutoKeys`."""
        epochs = None if "schedule.epochs" in self.auto else self.schedule.epochs
        return fitted(images, batch, epochs, self.optim.base_batch_size)

    def conflicts(self) -> list[str]:
        """See `BaseConfig`."""
        return super().conflicts() + self._conflicts_of_data() + self._conflicts_of_augmentation()

    def _conflicts_of_data(self) -> list[str]:
        found = []
        if self.data.streaming and self.data.source != "hf":
            found.append(f"data.streaming: only with data.source hf, not {self.data.source}")
        if self.data.cache == "ram" and self.data.streaming:
            found.append("data.cache: not with data.streaming, which keeps no image; leave one of them out")
        if self.augment.hflip == "alternating" and self.data.streaming:
            found.append("augment.hflip: not alternating with data.streaming, which knows no image again; take 0.5")
        if self.data.absolute_paths and self.data.source != "hf":
            found.append(f"data.absolute_paths: only with data.source hf, not {self.data.source}")
        if self.data.streaming and self.data.epoch_images is None:
            found.append("data.epoch_images: missing; with data.streaming say how many images an epoch is")
        if self.data.val_split == NO_SPLIT and not self.data.holdout:
            found.append(
                f"data.val_split: {NO_SPLIT} leaves nothing to validate on; add data.holdout=0.2, the share of the "
                "training images to hold out"
            )
        if self.data.csv and self.data.source != "csv":
            found.append(f"data.csv: only with data.source csv, not {self.data.source}")
        for key, is_set in (("data.sampling", self.data.sampling != "uniform"), ("train.class_weight", self.weighs)):
            if is_set and self.data.streaming:
                found.append(f"{key}: not with data.streaming, whose classes cannot be counted")
        if self.weighs and self.data.sampling != "uniform":
            found.append("train.class_weight: corrects what data.sampling does already; set one of them")
        if self.data.epoch_images is not None and not self.data.streaming:
            found.append("data.epoch_images: has no effect without data.streaming; leave it out")
        return found

    def _conflicts_of_augmentation(self) -> list[str]:
        found = []
        if self.pairs_images and self.train.batch_size % 2:
            found.append(f"train.batch_size: mixup and cutmix pair images, so it must be even: {self.train.batch_size}")
        is_known = self.data.img_size is not None or not self.model.checkpoint
        first = self.augment.first_img_size
        if first and is_known and first > min(self.data.preprocessing.size):
            found.append(f"augment.first_img_size: above data.img_size: {self.augment.first_img_size}")
        last = self.schedule.epochs + self.schedule.cooldown_epochs
        if "schedule.epochs" not in self.auto and self.augment.mix_off_epochs > last:
            found.append(f"augment.mix_off_epochs: more than the run has: {self.augment.mix_off_epochs}")
        for key in ("scale", "ratio"):
            low, high = getattr(self.augment, key)
            if low > high:
                found.append(f"augment.{key}: the first number must not be above the second: [{low}, {high}]")
        return found
