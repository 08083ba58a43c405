"""The configuration of a training run: one class per YAML section, every key with its unit and default.

pydantic checks types and ranges; what involves two keys is in `Config.conflicts`. The upper ends of the ranges are far
above what is of use: they turn a slip of the hand into a message where the run would hang or need all memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, JsonValue, Tag

from .._preprocessing import FIELDS, Preprocessing, as_img_size, channels_text
from ..errors import ConfigError, counted
from .auto import AUTO, AutoKeys, with_values

__all__ = ["NO_SPLIT", "Config"]

NO_SPLIT = "none"  # as `data.val_split`: no validation split, even where one could be found

Positive = Annotated[int, Field(ge=1, le=10**9)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
Side = Annotated[int, Field(ge=32, le=4096)]
ONE, TWO = "<one number>", "<two numbers>"  # in pydantic's errors, where messages leave them out
ImgSize = Annotated[
    Annotated[Side, Tag(ONE)] | Annotated[tuple[Side, Side], Tag(TWO)],
    Discriminator(lambda value: TWO if isinstance(value, (list, tuple)) else ONE),
    AfterValidator(as_img_size),
]
Epochs = Annotated[int, Field(ge=0, le=100_000)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, le=1e12)]
Above0 = Annotated[float, Field(gt=0.0, le=1e12)]
Interval = tuple[Above0, Above0]
Finite = Annotated[float, Field(ge=-1e12, le=1e12)]
Mean = Annotated[tuple[Finite, ...], Field(min_length=1, max_length=1000)]
Std = Annotated[tuple[Above0, ...], Field(min_length=1, max_length=1000)]
Location = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")]  # no path holds a NUL


def _as_word(value: Any) -> Any:
    """Returns what was written for on or off, which to YAML 1.1 are other words for true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Trackers = Annotated[
    tuple[Literal["wandb", "trackio", "mlflow"], ...],
    Field(max_length=10),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]
Metric = Literal["top1", "loss", "macro_f1", "balanced_accuracy"]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_as_word)]


class Section(BaseModel):
    # protected_namespaces: pydantic would reserve every name that begins with model_
    # coerce_numbers_to_str: a folder may be called 2024
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())


class ModelConfig(Section):
    """Which network, and from which weights it starts."""

    # a variant; with `variant`, its name; auto: whichever network `checkpoint` holds; timm/NAME: any other of timm's
    # registry, docs/other-networks.md
    name: str = "conv2former_t"
    args: dict[str, JsonValue] = {}  # of timm/NAME: arguments of its constructor, such as {depths: [2, 2, 4, 2]}
    pretrained: bool = False  # of timm/NAME: start from the weights that timm has of it on the Hugging Face hub
    variant: dict[str, JsonValue] | None = None  # a variant of your own: the path of its YAML file, or its content
    checkpoint: Location | None = None  # weights to start from; a classifier for other classes is replaced
    # channels of the images: 3, RGB, or 1, grey, to which any image is then converted. null: the checkpoint's, or 3
    in_chans: Literal[1, 3] | None = None
    drop_path_rate: Rate | None = None  # null: the variant's train_drop_path_rate
    drop_rate: Rate = 0.0  # dropout before the classifier
    head_init_scale: Above0 = 1.0  # factor on the fresh classifier's weights; small for fine-tuning
    grad_checkpointing: bool = False  # recompute each block in the backward pass: less memory, more time
    fused: bool = True  # compute blocks in less time and memory, docs/performance.md; false: module by module
    # what keeps its starting weights, from the input up to and including this; backbone: all but the classifier (linear
    # probing). Frozen BatchNorm and drop path stay in evaluation mode.
    freeze: Literal["nothing", "stem", "stage1", "stage2", "stage3", "stage4", "backbone"] = "nothing"


class DataConfig(Section):
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
    on_error: Literal["raise", "skip"] = "raise"  # an unreadable image: stop and name it, or go on without it
    max_skipped: Probability = 0.01  # with skip: the share of a split that may be unreadable before the run stops
    # black and white of images of more than 8 bits; null: [0, 65535] for 16-bit integers, others are refused
    value_range: tuple[Finite, Finite] | None = None
    # images of more pixels are unreadable; null: Pillow's limit, 178,956,970, a guard against files made to fill the
    # memory. An image takes 3 bytes a pixel in each process that reads it, some kinds several times that.
    max_image_pixels: Annotated[int, Field(ge=1, le=10**12)] | None = None
    # How images become the network's input. null: as `model.checkpoint` notes it, or else 224, ImageNet's mean and std,
    # bicubic, 0.875, center. A run writes down what it took.
    img_size: ImgSize | None = None  # one number for a square, or [height, width], pixels
    mean: Mean | None = None  # of values from 0 to 1, for each channel
    std: Std | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None  # of the evaluation
    # of the evaluation: resize to img_size / crop_pct, crop
    crop_pct: Annotated[float, Field(ge=0.1, le=1.0)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    # loader processes per device; they do not change what is trained. null: the device's share of the cores that this
    # machine lets the run use, at most 8
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    # ram: a training reads every image once, before its first step, and keeps the pixels in memory, once for all
    # processes of a machine; 3 bytes a pixel, 1 of grey images. It does not change what is trained. docs/data.md
    cache: Literal["none", "ram"] = "none"

    @property
    def given(self) -> dict[str, Any]:
        """What is set of how images become the network's input."""
        return {key: value for key in FIELDS if (value := getattr(self, key)) is not None}

    def given_for(self, channels: int) -> dict[str, Any]:
        """As `given`, of images of so many channels.

        Raises:
            ConfigError: `mean` or `std` is for others.
        """
        for key in ("mean", "std"):
            if len(values := self.given.get(key, ())) not in (0, channels):
                raise ConfigError(
                    f"data.{key}: {counted(len(values), 'number')} for images of {channels_text(channels)}; give one "
                    "for each channel"
                )
        return self.given

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become the network's input, the defaults in the place of what is not set."""
        channels = len(self.mean or self.std or Preprocessing().mean)
        return replace(Preprocessing().for_channels(channels), **self.given)


class AugmentConfig(Section):
    """Augmentation of the training images, in timm's terms. The defaults are the ImageNet recipe."""

    scale: Interval = (0.08, 1.0)  # of the random crop's area
    ratio: Interval = (3 / 4, 4 / 3)  # width by height, relative to that of data.img_size
    # pixels. The whole image, mirrored at its edges, moves by up to so many; `scale` and `ratio` have no effect. For
    # small images, whose objects are then as large as in the evaluation; 4 is usual for 32 x 32. null: a random crop
    padding: Annotated[int, Field(ge=1, le=31)] | None = None
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    hflip: Probability = 0.5
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


class OptimConfig(Section):
    """The optimizer. Weight decay leaves out parameters of one dimension: norms, biases, layer scale."""

    opt: str = "adamw"  # a timm optimizer name, or lookahead_NAME
    base_lr: Above0 = 1e-3  # learning rate at base_batch_size; scaled linearly to the global batch size
    base_batch_size: Positive = 1024
    weight_decay: NonNegative = 0.05
    betas: tuple[Rate, Rate] | None = None  # null: the optimizer's own, for AdamW (0.9, 0.999)
    eps: Above0 | None = None  # null: the optimizer's own, for AdamW 1e-8
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = (
        None  # rate factor from a layer group to the one below
    )
    clip_grad: Above0 | None = None  # largest gradient norm


class ScheduleConfig(Section):
    """Linear warm-up, then cosine to `min_lr`, set anew for every step."""

    # warm-up included, cool-down not: the run has epochs + cooldown_epochs
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 300
    warmup_epochs: Epochs = 5
    warmup_lr: NonNegative = 1e-6  # at the first step
    min_lr: NonNegative = 1e-6
    cooldown_epochs: Epochs = 10  # further ones at min_lr, after `epochs`; 0 for none


class EarlyStopConfig(Section):
    """When a run that gets no better ends before its last epoch."""

    patience: Positive  # evaluations in a row without progress, after which it ends
    metric: Metric | None = None  # of the weights that best.pt is chosen by; null: checkpoint.metric
    min_delta: NonNegative = 0.0  # what counts as progress is more than this: percentage points, or loss


class TrainConfig(Section):
    """One step and the order of the run."""

    batch_size: BatchSize = 128  # images per device and forward pass
    # forward passes per optimizer step; global batch = batch_size x accum_steps x devices
    accum_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    eval_batch_size: BatchSize | None = None  # null: batch_size
    eval_every: Positive = 1  # epochs; the last epoch is always evaluated
    early_stop: EarlyStopConfig | None = None  # end the run before its last epoch; docs/tracking.md
    # let a training set that is smaller than the global batch have a smaller batch; the rate follows it
    shrink_batch: bool = False
    # filled in by the run: the keys that were `auto`, and now have the values that fit the training set
    fitted: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    # weight of a class in the training loss: by one over its images, or over their square root; 1 in the mean over them
    class_weight: Literal["none", "balanced", "sqrt"] = "none"
    keep_tail: bool = False  # also train on an epoch's last batches that do not fill all accumulation steps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 autocast on a GPU, fp32 on a CPU
    tf32: bool = True  # let GPUs round the factors of fp32 products to 19 bits
    # of several devices: each normalises by its own batch, and the running statistics are averaged at the end of an
    # epoch; or all of them by all their images (GPUs only)
    batchnorm: Literal["average", "sync"] = "average"
    channels_last: bool = True
    compile: bool = False  # train with torch.compile, block by block
    # on a GPU, start all kernels of a forward and backward pass, or of an evaluation's batch, at once: the same results
    # in less time. auto: where that is possible; on: an error where it is not. docs/training.md
    cuda_graph: Switch = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    # a process that lets the others wait for longer ends the run
    timeout_minutes: Annotated[float, Field(gt=0.0, le=100_000.0)] = 10.0


class EmaConfig(Section):
    """Exponential moving average of the weights; evaluated and saved beside the raw ones."""

    decay: Rate | None = None  # null: no average
    warmup: bool = True  # grow the decay from 0 with the step


class CheckpointConfig(Section):
    """When the run is saved. Every evaluated epoch and the end always are."""

    every_steps: Positive | None = None  # also every so many optimizer steps
    keep: Positive = 2  # newest ones to keep, besides the best
    metric: Metric = "top1"  # decides which is the best; of equal ones it is that of the lower loss
    # what may differ from the run that is continued, such as [optim.base_lr, augment]; it then ends differently
    allow_changes: Annotated[tuple[str, ...], Field(max_length=100)] = ()


class LogConfig(Section):
    """What the run writes down."""

    every_steps: Positive = 50
    tensorboard: bool = True
    trackers: Trackers = ()  # of wandb, trackio and mlflow, each a package that is installed apart; docs/tracking.md
    project: str | None = None  # to which the trackers count the run; null: what their variables say, or conv2former


class Config(AutoKeys, Section):
    """A whole run. Keys may be `auto`, see auto.py, until the number of training images is known."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def weighs(self) -> bool:
        """Whether the classes have weights in the loss."""
        return self.train.class_weight != "none"

    def conflicts(self) -> list[str]:
        """Returns what is wrong between keys that are right on their own, each as `dotted.key: what, what to do`."""
        found = []
        if not self.data.root:
            found.append("data.root: missing; give the folder of the data set, or its name on the Hugging Face hub")
        if self.model.name == "auto" and self.model.variant is None and not self.model.checkpoint:
            found.append("model.name: auto reads the network off model.checkpoint; give a weight file, or a name")
        found += self._conflicts_of_network()
        if (self.augment.mixup or self.augment.cutmix) and self.train.batch_size % 2:
            found.append(f"train.batch_size: mixup and cutmix pair images, so it must be even: {self.train.batch_size}")
        is_open = {*self.auto} & {"schedule.epochs", "schedule.warmup_epochs"}
        if not is_open and self.schedule.warmup_epochs >= self.schedule.epochs:
            warmup, epochs = self.schedule.warmup_epochs, self.schedule.epochs
            found.append(f"schedule.warmup_epochs: must be below schedule.epochs: {warmup} of {epochs}")
        if self.data.streaming and self.data.source != "hf":
            found.append(f"data.streaming: only with data.source hf, not {self.data.source}")
        if self.data.cache == "ram" and self.data.streaming:
            found.append("data.cache: not with data.streaming, which keeps no image; leave one of them out")
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
        if self.data.value_range and self.data.value_range[0] >= self.data.value_range[1]:
            found.append(f"data.value_range: the first number must be below the second: {list(self.data.value_range)}")
        is_known = self.data.img_size is not None or not self.model.checkpoint
        first = self.augment.first_img_size
        if first and is_known and first > min(self.data.preprocessing.size):
            found.append(f"augment.first_img_size: above data.img_size: {self.augment.first_img_size}")
        lengths = {key: len(values) for key, values in self.data.given.items() if key in ("mean", "std")}
        if len(set(lengths.values())) > 1:
            numbers = counted(lengths["mean"], "number")
            found.append(f"data.mean: {numbers}, and data.std has {lengths['std']}; give one for each channel")
        elif self.model.in_chans and {*lengths.values()} - {self.model.in_chans}:
            key, length = next(iter(lengths.items()))
            takes = channels_text(self.model.in_chans)
            found.append(f"data.{key}: {counted(length, 'number')} for images of {takes}; give one for each channel")
        last = self.schedule.epochs + self.schedule.cooldown_epochs
        if "schedule.epochs" not in self.auto and self.augment.mix_off_epochs > last:
            found.append(f"augment.mix_off_epochs: more than the run has: {self.augment.mix_off_epochs}")
        if "optim.base_lr" not in self.auto and self.schedule.min_lr > self.optim.base_lr:
            found.append(f"schedule.min_lr: above optim.base_lr: {self.schedule.min_lr} > {self.optim.base_lr}")
        if self.train.cuda_graph == "on" and self.model.grad_checkpointing:
            found.append("train.cuda_graph: not with model.grad_checkpointing, which no graph can hold; leave one out")
        for key in ("scale", "ratio"):
            low, high = getattr(self.augment, key)
            if low > high:
                found.append(f"augment.{key}: the first number must not be above the second: [{low}, {high}]")
        return found

    def _conflicts_of_network(self) -> list[str]:
        """As `conflicts`, of the keys that say which network it is."""
        model, found = self.model, []
        is_timms = model.name.startswith("timm/")
        if is_timms and model.variant is not None:
            found.append("model.variant: a Conv2Former of your own, and model.name is one of timm; give one of them")
        if model.args and not is_timms and model.name != "auto":
            found.append("model.args: for model.name: timm/NAME; a Conv2Former of your own is given as model.variant")
        if model.pretrained and not is_timms:
            found.append(
                "model.pretrained: for model.name: timm/NAME; give a file or installed weights, model.checkpoint"
            )
        if model.pretrained and model.checkpoint:
            found.append("model.pretrained: and model.checkpoint are two starts; give one of them")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole configuration as plain built-in types, for YAML and for checkpoints."""
        return with_values(self.model_dump(mode="json"), dict.fromkeys(self.auto, AUTO))
