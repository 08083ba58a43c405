"""The network of a run with its starting weights, and which parts of it are frozen."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models import adapt_input_conv
from torch import nn

from .._yaml import cut
from ..config import Config
from ..data import Stream, seed_all
from ..data.classes import class_names_of, match_classes, order_in_doubt
from ..errors import CheckpointError, ConfigError, DataError, closest, memory_for
from ..models import Conv2Former, Variant, list_variants, variant
from ..models.restore import load_content
from ..models.zoo import add_and_register
from ..text import printable
from ..variants import differences, parse_variant, read_builtin_variants
from ..weights.architecture import FIRST_CONV
from ..weights.contents import native_state_dict
from ..weights.description import definition_in, describe_checkpoint
from ..weights.reading import read_checkpoint

__all__ = [
    "SMALLER",
    "build_model",
    "drop_path_rate_of",
    "find_variant_of",
    "freeze",
    "name_network",
    "read_start",
]

_logger = logging.getLogger(__name__)

SMALLER = "choose a smaller network (model.name or model.variant), or a machine with more of it"


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
