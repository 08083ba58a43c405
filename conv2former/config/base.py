"""What every task's configuration has: the network, the order of a run, what it saves and writes down.

A task's own sections are classes that inherit from these or stand beside them, as classification's in schema.py.
pydantic checks types and ranges; what involves two keys is in `conflicts`. The upper ends of the ranges are far above
what is of use: they turn a slip of the hand into a message where the run would hang or need all memory.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, JsonValue, Tag

from .._preprocessing import FIELDS, Preprocessing, as_img_size, channels_text
from ..errors import ConfigError, counted
from .auto import AUTO, AutoKeys, with_values

__all__ = ["FORMS", "ONE", "WORD", "BaseConfig"]

Positive = Annotated[int, Field(ge=1, le=10**9)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
Side = Annotated[int, Field(ge=32, le=4096)]
# in pydantic's errors, where messages leave them out
ONE, TWO, WORD = FORMS = "<one number>", "<two numbers>", "<a word>"
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


class BaseDataConfig(Section):
    """Where the images are, and their size and normalisation."""

    source: str  # how the data is stored; each task has its own kinds
    root: Location = ""  # of the data set: a folder, or its name on the Hugging Face hub
    on_error: Literal["raise", "skip"] = "raise"  # an unreadable image: stop and name it, or go on without it
    max_skipped: Probability = 0.01  # with skip: the share of a split that may be unreadable before the run stops
    # black and white of images of more than 8 bits; null: [0, 65535] for 16-bit integers, others are refused
    value_range: tuple[Finite, Finite] | None = None
    # images of more pixels are unreadable; null: Pillow's limit, 178,956,970, a guard against files made to fill the
    # memory. An image takes 3 bytes a pixel in each process that reads it, some kinds several times that.
    max_image_pixels: Annotated[int, Field(ge=1, le=10**12)] | None = None
    # How images become the network's input. null: as `model.checkpoint` notes it, or else 224, ImageNet's mean and std,
    # bicubic, 0.875, center. A run writes down what it took. The last three are for classification alone.
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


class OptimConfig(Section):
    """The optimizer. Weight decay leaves out parameters of one dimension: norms, biases, layer scale."""

    opt: str = "adamw"  # a timm optimizer name, or lookahead_NAME
    base_lr: Above0 = 1e-3  # learning rate at base_batch_size; scaled linearly to the global batch size
    base_batch_size: Positive = 1024
    weight_decay: NonNegative = 0.05
    betas: tuple[Rate, Rate] | None = None  # null: the optimizer's own, for AdamW (0.9, 0.999)
    eps: Above0 | None = None  # null: the optimizer's own, for AdamW 1e-8
    momentum: Rate | None = None  # null: 0.9 where the optimizer has one, such as sgd and muon
    args: dict[str, JsonValue] = {}  # further arguments of timm's optimizer, such as {ns_steps: 3} of muon
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = (
        None  # rate factor from a layer group to the one below
    )
    clip_grad: Above0 | None = None  # largest gradient norm


class ScheduleConfig(Section):
    """Linear warm-up, then down as `decay` says; set anew for every step."""

    # warm-up included, cool-down not: the run has epochs + cooldown_epochs
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 300
    warmup_epochs: Epochs = 5
    warmup_lr: NonNegative = 1e-6  # at the first step
    # cosine and linear fall to min_lr over all of `epochs`, so that a warm-up takes the place of their beginning.
    # multistep stays, and is multiplied by `gamma` after each of `milestones`
    decay: Literal["cosine", "linear", "multistep"] = "cosine"
    # multistep only: epochs, also parts of one, such as 8.5; it is the nearest step
    milestones: Annotated[tuple[Annotated[float, Field(gt=0.0, le=100_000.0)], ...], Field(max_length=100)] = ()
    gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1  # multistep only
    min_lr: NonNegative = 1e-6  # without effect on multistep
    # further ones after `epochs`, at min_lr, or of multistep at its last rate; 0 for none
    cooldown_epochs: Epochs = 10


class BaseEarlyStopConfig(Section):
    """When a run that gets no better ends before its last epoch."""

    patience: Positive  # evaluations in a row without progress, after which it ends
    metric: str | None = None  # of the weights that best.pt is chosen by; null: checkpoint.metric
    min_delta: NonNegative = 0.0  # what counts as progress is more than this: percentage points, or loss


class BaseTrainConfig(Section):
    """One step and the order of the run."""

    batch_size: BatchSize = 128  # images per device and forward pass
    # forward passes per optimizer step; global batch = batch_size x accum_steps x devices
    accum_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    eval_batch_size: BatchSize | None = None  # null: batch_size
    eval_every: Positive = 1  # epochs; the last epoch is always evaluated
    early_stop: BaseEarlyStopConfig | None = None  # end the run before its last epoch; docs/tracking.md
    # let a training set that is smaller than the global batch have a smaller batch; the rate follows it
    shrink_batch: bool = False
    # filled in by the run: the keys that were `auto`, and now have the values that fit the training set
    fitted: Annotated[tuple[str, ...], Field(max_length=100)] = ()
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


class BaseCheckpointConfig(Section):
    """When the run is saved. Every evaluated epoch and the end always are."""

    every_steps: Positive | None = None  # also every so many optimizer steps
    keep: Positive = 2  # newest ones to keep, besides the best
    metric: str  # decides which is the best; of equal ones it is that of the lower loss
    # what may differ from the run that is continued, such as [optim.base_lr, augment]; it then ends differently
    allow_changes: Annotated[tuple[str, ...], Field(max_length=100)] = ()


class LogConfig(Section):
    """What the run writes down."""

    every_steps: Positive = 50
    tensorboard: bool = True
    trackers: Trackers = ()  # of wandb, trackio and mlflow, each a package that is installed apart; docs/tracking.md
    project: str | None = None  # to which the trackers count the run; null: what their variables say, or conv2former


class BaseConfig(AutoKeys, Section):
    """A whole run of any task, as the engine sees it.

    A task's class gives `task` the one word that it may be, and `data`, `train` and `checkpoint` its own classes. Every
    key has a default, so that runs of before a key was there can be continued. Where keys may be `auto`, `auto_keys`
    names them and `fitting_values` says what they become.
    """

    task: str  # what is trained for; a configuration without this key is of classification
    model: ModelConfig = ModelConfig()
    data: BaseDataConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: BaseTrainConfig = BaseTrainConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: BaseCheckpointConfig
    log: LogConfig = LogConfig()

    @property
    def pairs_images(self) -> bool:
        """Whether the images of a batch are augmented in pairs, so that it needs an even number."""
        return False

    @property
    def image_fields(self) -> tuple[str, ...]:
        """The keys among those of `Preprocessing` that the task uses; a run fills in these, others may not be set."""
        return FIELDS

    @property
    def size_shown(self) -> str:
        """The size of the images in a table of recipes, pixels."""
        is_open = self.data.img_size is None and self.model.checkpoint
        return "the file's" if is_open else str(self.data.preprocessing.img_size)

    def image_texts(self) -> dict[str, str]:
        """Returns how images become the network's input, for people, by the keys of `data` that say so."""
        texts = self.data.preprocessing.texts()
        texts["img_size"] = f"input size {texts['img_size']}"
        return {key: text for key, text in texts.items() if key in self.image_fields}

    def without_effect(self, key: str) -> str:
        """Returns what to say where a key is set that is not among `image_fields`."""
        return f"data.{key}: has no effect with task: {self.task}; leave it out"

    def conflicts(self) -> list[str]:
        """Returns what is wrong between keys that are right on their own, each as `dotted.key: what, what to do`."""
        found = []
        if not self.data.root:
            found.append("data.root: missing; give the folder of the data set, or its name on the Hugging Face hub")
        if self.model.name == "auto" and self.model.variant is None and not self.model.checkpoint:
            found.append("model.name: auto reads the network off model.checkpoint; give a weight file, or a name")
        found += self._conflicts_of_network()
        is_open = {*self.auto} & {"schedule.epochs", "schedule.warmup_epochs"}
        if not is_open and self.schedule.warmup_epochs >= self.schedule.epochs:
            warmup, epochs = self.schedule.warmup_epochs, self.schedule.epochs
            found.append(f"schedule.warmup_epochs: must be below schedule.epochs: {warmup} of {epochs}")
        found += self._conflicts_of_milestones()
        if "optim.base_lr" not in self.auto and self.schedule.min_lr > self.optim.base_lr:
            found.append(f"schedule.min_lr: above optim.base_lr: {self.schedule.min_lr} > {self.optim.base_lr}")
        if self.train.cuda_graph == "on" and self.model.grad_checkpointing:
            found.append("train.cuda_graph: not with model.grad_checkpointing, which no graph can hold; leave one out")
        return found + self._conflicts_of_images()

    def _conflicts_of_milestones(self) -> list[str]:
        """As `conflicts`, of the epochs after which the rate falls."""
        schedule, found = self.schedule, []
        given = list(schedule.milestones)
        if schedule.decay != "multistep":
            for key in ("milestones", "gamma"):
                if getattr(schedule, key) != getattr(ScheduleConfig(), key):
                    found.append(f"schedule.{key}: only with schedule.decay multistep, not {schedule.decay}")
        elif not given:
            found.append("schedule.milestones: missing; with schedule.decay multistep give the epochs, such as [8, 11]")
        elif any(first >= second for first, second in pairwise(given)):
            numbers = ", ".join(f"{epoch:g}" for epoch in given)
            found.append(f"schedule.milestones: each must be above the one before: [{numbers}]")
        elif "schedule.warmup_epochs" not in self.auto and given[0] <= schedule.warmup_epochs:
            warmup = schedule.warmup_epochs
            found.append(f"schedule.milestones: must be above schedule.warmup_epochs: {given[0]:g} of {warmup}")
        elif "schedule.epochs" not in self.auto and given[-1] >= schedule.epochs:
            epochs = schedule.epochs
            found.append(f"schedule.milestones: must be below schedule.epochs: {given[-1]:g} of {epochs}")
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

    def _conflicts_of_images(self) -> list[str]:
        """As `conflicts`, of the keys that say how images become the network's input."""
        found = [self.without_effect(key) for key in self.data.given if key not in self.image_fields]
        if self.data.value_range and self.data.value_range[0] >= self.data.value_range[1]:
            found.append(f"data.value_range: the first number must be below the second: {list(self.data.value_range)}")
        lengths = {key: len(values) for key, values in self.data.given.items() if key in ("mean", "std")}
        if len(set(lengths.values())) > 1:
            numbers = counted(lengths["mean"], "number")
            found.append(f"data.mean: {numbers}, and data.std has {lengths['std']}; give one for each channel")
        elif self.model.in_chans and {*lengths.values()} - {self.model.in_chans}:
            key, length = next(iter(lengths.items()))
            takes = channels_text(self.model.in_chans)
            found.append(f"data.{key}: {counted(length, 'number')} for images of {takes}; give one for each channel")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole configuration as plain built-in types, for YAML and for checkpoints."""
        plain = with_values(self.model_dump(mode="json"), dict.fromkeys(self.auto, AUTO))
        own = [key for key in plain if key not in BaseConfig.model_fields]
        return {key: plain[key] for key in dict.fromkeys(["task", "model", "data", *own, *plain])}
