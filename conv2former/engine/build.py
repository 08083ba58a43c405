"""Puts a run together, in the one order that works, from a checked configuration."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.loss import create_classification_loss
from timm.models import adapt_input_conv
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from .._yaml import cut
from ..config import Config, Plan
from ..data import Stream, seed_all, train_transforms
from ..data.classes import class_names_of, match_classes, order_in_doubt
from ..errors import CheckpointError, ConfigError, DataError, UserError, closest, first_line, memory_for, raise_mistakes
from ..models import Conv2Former, Variant, list_variants, variant
from ..models.restore import load_content
from ..models.zoo import add_and_register
from ..text import printable
from ..variants import differences, parse_variant, read_builtin_variants
from ..weights.architecture import FIRST_CONV
from ..weights.contents import native_state_dict
from ..weights.description import definition_in, describe_checkpoint
from ..weights.reading import read_checkpoint
from .distributed import World, wrap

__all__ = [
    "OVERFLOWS",
    "Run",
    "autocast_for",
    "build_model",
    "build_run",
    "check_names",
    "drop_path_rate_of",
    "find_variant_of",
    "freeze",
    "name_network",
    "read_start",
]

_logger = logging.getLogger(__name__)

# before an optimizer's name: every 6 steps the weights go back half of the way to where they were 6 steps before
LOOKAHEAD = "lookahead_"
SMALLER = "choose a smaller network (model.name or model.variant), or a machine with more of it"

# fp16 overflows in a row after which the run is lost: the scale, 65536 at the start, has then been halved to below 1
OVERFLOWS = 20

Autocast = Callable[[], AbstractContextManager]


@dataclass
class Run:
    """Everything that a training step touches.

    Attributes:
        model: the raw network; what is saved, averaged and evaluated.
        forward: the network to train through: compiled and wrapped for several processes, where that is asked for.
        parameters: of the network, those that are trained.
        ema: the average, or None.
        mixup: mixes a batch of images and labels, or None.
        criterion: (N, classes) logits and targets, as the batch has them, to a mean loss.
    """

    config: Config
    plan: Plan
    world: World
    model: Conv2Former
    forward: nn.Module
    parameters: list[nn.Parameter]
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    mixup: Mixup | None
    criterion: nn.Module
    autocast: Autocast


def name_network(config: Config) -> Config:
    """Returns the configuration with the network that `model.name: auto` stands for: that of `model.checkpoint`.

    A network that is none of the project's own is put into `model.variant`, as the file defines it.

    Raises:
        CheckpointError: the file cannot be read, or is no whole network.
        ConfigError: the definition in it has mistakes.
    """
    model, path = config.model, config.model.checkpoint
    if model.name != "auto" or model.variant is not None:
        return config
    if not path:
        raise ConfigError("model.name: auto reads the network off model.checkpoint; give a weight file, or a name")
    content = read_start(path)
    info = describe_checkpoint(content, path)
    if info.is_part:
        raise CheckpointError(
            f"{path} holds a part of a network; all four stages and the whole head or none are needed"
        )
    for builtin in read_builtin_variants():
        if not differences(info.model_args(), builtin.model_args()):
            return _with_model(config, name=builtin.name)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in info.model_args().items()}
    untold = ("name", "ls_init_value", "train_drop_path_rate")  # by the tensors; all else is as they are
    noted = {key: value for key, value in definition_in(content).items() if key in untold}
    own = parse_variant({"name": "conv2former_custom", **plain, **noted}, path)
    return _with_model(config, name=own.name, variant=own.to_dict())


def read_start(path: str) -> dict[str, Any]:
    """Reads the starting weights.

    Raises:
        CheckpointError: they cannot be read; names the key, and what to give where nothing is.
    """
    try:
        return read_checkpoint(path)
    except CheckpointError as e:
        raise CheckpointError(f"{e} (model.checkpoint){_example(path)}") from None


def _example(path: str) -> str:
    if Path(path.removeprefix("local-dir:")).exists():
        return ""
    return (
        "; give the weights to start from: model.checkpoint=runs/NAME/checkpoints/best.pt, or a downloaded file, or "
        "the name of installed weights"
    )


def _with_model(config: Config, **values: Any) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=values)})


def find_variant_of(config: Config) -> Variant:
    """Returns the definition of the configured network, registering it with timm if it is the user's own.

    Raises:
        ConfigError: the variant has mistakes, or there is none of that name.
        CheckpointError: see `name_network`.
    """
    model = name_network(config).model
    if model.variant is not None:
        own = parse_variant(model.variant, "model.variant")
        add_and_register(own, "model.variant", replace=True)
        return own
    if model.name not in list_variants():
        names = list_variants()
        raise ConfigError(
            f"model.name: no variant '{cut(model.name)}'{closest(model.name, names)}: {', '.join(names)}, "
            "or give your own as model.variant"
        )
    return variant(model.name)


def drop_path_rate_of(config: Config) -> float:
    """Returns the configured drop path rate, the variant's own where none is set."""
    rate = config.model.drop_path_rate
    return find_variant_of(config).train_drop_path_rate if rate is None else rate


def build_model(config: Config, num_classes: int, class_names: Sequence[str] | None = None) -> Conv2Former:
    """Builds the network on the CPU, with the configured starting weights. The same seed gives the same weights.

    Args:
        config: the run.
        num_classes: of the data.
        class_names: of the data, in index order; None where they are not known.

    Raises:
        ConfigError: there is no such variant.
        CheckpointError: the starting weights cannot be read or do not fit.
        UserError: memory does not suffice for it.
    """
    seed_all(Stream.INIT, config.train.seed)
    variant = find_variant_of(config)
    with memory_for(f"the network {variant.name} of {num_classes:,} classes", SMALLER):
        model = timm.create_model(
            variant.name,
            num_classes=num_classes,
            in_chans=config.model.in_chans or 3,
            drop_rate=config.model.drop_rate,
            drop_path_rate=drop_path_rate_of(config),
            head_init_scale=config.model.head_init_scale,
            fused=config.model.fused,
        )
        assert isinstance(model, Conv2Former)
        if config.model.checkpoint:
            _load(model, config.model.checkpoint, class_names, config.model.freeze)
    model.set_grad_checkpointing(config.model.grad_checkpointing)
    return model


def _load(model: Conv2Former, path: str, class_names: Sequence[str] | None, frozen: str) -> None:
    """Loads starting weights. A classifier of as many classes is only taken for the same ones, by name.

    Where the file has them in another order, so has the classifier; where they are others, the fresh one stays. So does
    the whole head where the file has none; it must not be `frozen` then. Where the network takes one channel and
    the file's three, the first convolution is summed over them, as timm does.
    """
    classifier = model.get_classifier()
    fresh = copy.deepcopy(classifier.state_dict())
    content = read_start(path)
    info = describe_checkpoint(content, path)
    if not info.has_head and frozen == "backbone":
        raise ConfigError(
            f"model.freeze: backbone would freeze the 1x1 convolution before the classifier, which {path} does not "
            "have, as it is drawn; train it too: model.freeze=stage4"
        )
    if info.in_chans == 3 and model.in_chans == 1:
        state_dict = native_state_dict(content)
        weight = f"{FIRST_CONV}.weight"
        state_dict[weight] = adapt_input_conv(model.in_chans, state_dict[weight])
        notes = {key: value for key, value in content.items() if key in ("variant", "hub_config")}
        content = {**notes, "state_dict": state_dict}
    load_content(model, content, path)
    noted = class_names_of(info.num_classes, info.class_names)
    is_unnamed = noted is None and info.num_classes == len(class_names or ())
    if is_unnamed and (doubt := order_in_doubt(class_names or ())):
        text = f"{path} does not name its classes, and its classifier is taken as it is; {doubt}"
        _logger.warning("%s", printable(text))
    if class_names is None or noted is None or len(noted) != len(class_names):
        return
    try:
        order = match_classes(class_names, noted, path)
    except DataError:
        _logger.warning(
            "the checkpoint's %d classes are others than the data's: the classifier starts anew; all other weights are "
            "loaded",
            len(noted),
        )
        classifier.load_state_dict(fresh)
    else:
        classifier.load_state_dict({key: tensor[order] for key, tensor in classifier.state_dict().items()})


def freeze(model: Conv2Former, until: str) -> None:
    """Freezes the network up to and including a part, and puts that part into evaluation mode.

    Needed after every `model.train()`, which would let BatchNorm's statistics run and drop path drop.

    Args:
        model: the network.
        until: nothing, stem, stage1 to stage4, or backbone: all but the classifier.
    """
    parts: list[nn.Module] = [model.stem, *model.stages, model.head_conv]
    count = ["nothing", "stem", "stage1", "stage2", "stage3", "stage4", "backbone"].index(until)
    for part in parts[:count]:
        part.eval().requires_grad_(False)


def autocast_for(precision: str, device: torch.device) -> tuple[str, Autocast]:
    """Returns the precision in effect, `auto` decided, and what makes its context."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return precision, partial(torch.autocast, device.type, dtype=dtype, enabled=precision != "fp32")


def build_run(
    config: Config, plan: Plan, world: World, model: Conv2Former, class_counts: np.ndarray | None = None
) -> Run:
    """Builds all that trains a network. Every process builds the same.

    Args:
        config: the run.
        plan: its numbers.
        world: the processes, met.
        model: from `build_model`; moved to the device.
        class_counts: (classes,) training images, for `train.class_weight`; None for equal ones.
    """
    _, autocast = autocast_for(config.train.precision, world.device)
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.train.tf32
    num_classes = model.num_classes
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    with memory_for(f"the network on {world.device}", SMALLER):
        model.to(world.device)
        model.to(memory_format=memory_format)
    if config.train.batchnorm == "sync" and world.size > 1:
        model = cast(Conv2Former, nn.SyncBatchNorm.convert_sync_batchnorm(model))
    freeze(model, config.model.freeze)
    ema = ModelEmaV3(model, decay=config.ema.decay, use_warmup=config.ema.warmup) if config.ema.decay else None
    optim = config.optim
    optimizer = create_optimizer_v2(
        model,
        optim.opt,
        lr=plan.lr,
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay,
        **_optimizer_args(config),
    )
    mixup = _build_mixup(config, num_classes)
    forward: nn.Module = cast(nn.Module, torch.compile(model)) if config.train.compile else model
    forward = wrap(forward, world)
    schedule = config.schedule
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=schedule.epochs,
        warmup_epochs=schedule.warmup_epochs,
        warmup_lr=schedule.warmup_lr,
        min_lr=schedule.min_lr,
        cooldown_epochs=schedule.cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=plan.steps_per_epoch,
    )
    return Run(
        config=config,
        plan=plan,
        world=world,
        model=model,
        forward=forward,
        parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.train.precision == "fp16"),
        mixup=mixup,
        criterion=_build_criterion(config, num_classes, class_counts).to(world.device),
        autocast=autocast,
    )


def class_weights(counts: np.ndarray, kind: str) -> torch.Tensor:
    """Returns each class's weight in the loss, (classes,) float, 1 in the mean over the training images.

    Args:
        counts: (classes,) training images; a class without any has weight 0.
        kind: 'balanced': one over the images; 'sqrt': over their square root.
    """
    power = {"balanced": 1.0, "sqrt": 0.5}[kind]
    weights = np.where(counts > 0, np.maximum(counts, 1.0) ** -power, 0.0)
    return torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy in which every class has a weight: the mean over the images of -sum(weight x target x log p).

    The mean is over the number of images, not over their weights, so that accumulation steps and devices average to
    what one large batch gives.

    Args:
        weights: (classes,).
        smoothing: of targets that are class indices, as timm's.
    """

    weights: torch.Tensor

    def __init__(self, weights: torch.Tensor, smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the loss, scalar, of (N, classes) logits and (N,) indices or (N, classes) probabilities."""
        if targets.ndim == 1:
            targets = nn.functional.one_hot(targets, logits.shape[1]).to(logits.dtype)
            targets = targets * (1.0 - self.smoothing) + self.smoothing / logits.shape[1]
        return nn.functional.cross_entropy(logits, targets, weight=self.weights)


def _build_criterion(config: Config, num_classes: int, class_counts: np.ndarray | None) -> nn.Module:
    smoothing = config.augment.smoothing
    if config.weighs:
        counts = np.ones(num_classes) if class_counts is None else class_counts
        return WeightedCrossEntropy(class_weights(counts, config.train.class_weight), smoothing)
    has_mixup = bool(config.augment.mixup or config.augment.cutmix)
    return create_classification_loss(smoothing=smoothing, soft_targets=has_mixup)


def check_names(config: Config, device: torch.device) -> None:
    """Checks all that needs more than the schema, before the data is opened, which can take minutes.

    Raises:
        ConfigError: lists every mistake: the variant, the optimizer, what does not go with the device.
    """
    mistakes: list[str | UserError] = []
    for check in (lambda: find_variant_of(config), lambda: _optimizer_args(config), lambda: _check_policy(config)):
        try:
            check()
        except ConfigError as e:
            mistakes.append(e)
    if config.train.batchnorm == "sync" and device.type != "cuda":
        mistakes.append("train.batchnorm: sync needs GPUs; use average on CPUs")
    if len(mistakes) == 1:
        raise ConfigError(*(mistakes[0].lines if isinstance(mistakes[0], UserError) else mistakes))
    raise_mistakes("the configuration", mistakes)


def _check_policy(config: Config) -> None:
    try:
        train_transforms(config)
    except Exception as e:  # timm asserts, or fails in parsing
        policy = cut(config.augment.auto_augment)
        raise ConfigError(f"augment.auto_augment: timm does not take '{policy}': {first_line(e)}") from None


def _optimizer_name(opt: str) -> str:
    """Returns timm's name of an optimizer, without the prefix `lookahead_`.

    Raises:
        ConfigError: there is none of that name. timm reads a name only up to its first and from its last underscore,
            and would take others for what they are not.
    """
    names = [str(name) for name in list_optimizers()]
    name = opt.lower()
    if (base := name.removeprefix(LOOKAHEAD)) in names:
        return base
    near = closest(name, [*names, *(LOOKAHEAD + known for known in names)])
    raise ConfigError(f"optim.opt: timm has no optimizer '{cut(opt)}'{near}")


def _optimizer_args(config: Config) -> dict[str, Any]:
    """Returns the optional arguments of the configured optimizer: those that are set, and `fused` where it exists."""
    optim = config.optim
    info = get_optimizer_info(_optimizer_name(optim.opt))
    if info.second_order:
        raise ConfigError(f"optim.opt: {optim.opt} needs second derivatives, which this loop does not compute")
    optional: dict[str, tuple[Any, bool]] = {"betas": (optim.betas, info.has_betas), "eps": (optim.eps, info.has_eps)}
    for key, (value, is_known) in optional.items():
        if value is not None and not is_known:
            raise ConfigError(f"optim.{key}: {optim.opt} has none; leave it out")
    args = {key: value for key, (value, _) in optional.items() if value is not None}
    if isinstance(info.opt_class, type) and "fused" in inspect.signature(info.opt_class).parameters:
        args["fused"] = True  # one kernel, and it can leave a step out by itself; see step.FiniteCheck
    try:
        create_optimizer_v2([nn.Parameter(torch.zeros(2, 2))], optim.opt, lr=1e-3, **args)
    except Exception as e:  # an assertion or an import error: some need a package that is not here
        raise ConfigError(f"optim.opt: {optim.opt} cannot be used here: {first_line(e)}") from None
    return args


def _build_mixup(config: Config, num_classes: int) -> Mixup | None:
    augment = config.augment
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )
