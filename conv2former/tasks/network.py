"""The network of a run with its starting weights, and which parts of it are frozen.

What is Conv2Former's own is here; a network of timm's registry, `model.name: timm/NAME`, is passed on to others.py.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import timm
from timm.models import adapt_input_conv
from torch import nn

from .._yaml import cut
from ..config import BaseConfig
from ..data import Stream, seed_all
from ..data.classes import class_names_of, match_classes, order_in_doubt
from ..errors import CheckpointError, ConfigError, DataError, closest, memory_for
from ..models import CheckpointInfo, Conv2Former, Variant, list_variants, variant
from ..models.backbone import Stage
from ..models.compiled import compile_blocks
from ..models.others import classifiers
from ..models.restore import load_content
from ..models.zoo import add_and_register
from ..text import printable
from ..variants import differences, parse_variant, read_builtin_variants
from ..weights.architecture import FIRST_CONV
from ..weights.contents import native_state_dict
from ..weights.description import OtherInfo, definition_in, describe_checkpoint
from ..weights.fit import lacking_head
from ..weights.others import PREFIX, OtherNetwork, is_other
from ..weights.reading import read_checkpoint
from . import others

__all__ = [
    "SMALLER",
    "build_model",
    "compile_network",
    "compiled_parts",
    "describe_network",
    "describe_start",
    "find_network",
    "find_variant_of",
    "freeze",
    "name_network",
    "read_start",
]

C = TypeVar("C", bound=BaseConfig)
_logger = logging.getLogger(__name__)

SMALLER = "choose a smaller network (model.name or model.variant), or a machine with more of it"


def name_network(config: C) -> C:
    """Returns the configuration with the network that `model.name: auto` stands for: that of `model.checkpoint`.

    A network that is none of the project's own is put into `model.variant`, as the file defines it. Of names,
    `timm/conv2former_t` becomes `conv2former_t`; for another network `model.fused`, which is Conv2Former's own, is off.

    Raises:
        CheckpointError: the file cannot be read, or is no whole network.
        ConfigError: the definition in it has mistakes.
    """
    model, path = config.model, config.model.checkpoint
    if model.name.removeprefix(PREFIX) in list_variants():
        return _with_model(config, name=model.name.removeprefix(PREFIX))
    if is_other(model.name):
        return _with_model(config, fused=False)
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
    if isinstance(info, OtherInfo):
        args = {**others.args_of(info.network), **model.args}
        return _with_model(config, name=info.network.name, args=args, fused=False)
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


def _with_model(config: C, **values: Any) -> C:
    return config.model_copy(update={"model": config.model.model_copy(update=values)})


def find_network(config: BaseConfig) -> Variant | OtherNetwork:
    """Returns the definition of the configured network: its `name`, and as plain types, `to_dict()`.

    Raises:
        ConfigError: there is none of that name, or its definition has mistakes.
        CheckpointError: see `name_network`.
    """
    config = name_network(config)
    return others.find_other(config) if is_other(config.model.name) else find_variant_of(config)


def describe_start(config: BaseConfig) -> others.Start | None:
    """Returns which images the starting weights, or the network's own arguments, are for; None where nothing says.

    Raises:
        ConfigError, CheckpointError: there is no such network, or its weights cannot be read.
    """
    config = name_network(config)
    path, other = config.model.checkpoint, is_other(config.model.name)
    if not path:
        return others.start_of(config) if other else None
    info = describe_checkpoint(read_start(path), path, others.find_other(config) if other else None)
    return others.Start(info.in_chans, info.preprocessing, info.preprocessing_noted, path, "from the checkpoint")


def find_variant_of(config: BaseConfig) -> Variant:
    """Returns the definition of the configured Conv2Former, registering it with timm if it is the user's own.

    Raises:
        ConfigError: the variant has mistakes, or there is none of that name.
        CheckpointError: see `name_network`.
    """
    model = name_network(config).model
    for key in ("args", "pretrained"):
        if getattr(model, key):
            raise ConfigError(
                f"model.{key}: for other networks of timm, and {cut(model.name)} is a Conv2Former; leave it out"
            )
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


def describe_network(config: BaseConfig) -> str:
    """Returns what a line says about network and starting weights: `conv2former_t from scratch, drop path 0.1`."""
    network, model = find_network(config), config.model
    start = f"from {model.checkpoint}" if model.checkpoint else "from scratch"
    if isinstance(network, OtherNetwork):
        start = "with timm's weights" if model.pretrained else start
        rate = "its own" if model.drop_path_rate is None else f"{model.drop_path_rate:g}"
        return f"{network} {start}, drop path {rate}"
    return f"{network.name} {start}, drop path {_drop_path_rate(config, network):g}"


def _drop_path_rate(config: BaseConfig, network: Variant) -> float:
    rate = config.model.drop_path_rate
    return network.train_drop_path_rate if rate is None else rate


def build_model(
    config: BaseConfig, num_classes: int, class_names: Sequence[str] | None = None, **options: Any
) -> nn.Module:
    """Builds the network on the CPU, with the configured starting weights. The same seed gives the same weights.

    Args:
        config: the run.
        num_classes: of the data.
        class_names: of the data, in index order; None where they are not known.
        **options: further arguments of the network's constructor, which change none of its weights.

    Raises:
        ConfigError: there is no such network.
        CheckpointError: the starting weights cannot be read or do not fit.
        UserError: memory does not suffice for it.
    """
    seed_all(Stream.INIT, config.train.seed)
    config = name_network(config)
    network, path = find_network(config), config.model.checkpoint
    content = read_start(path) if path else None
    with memory_for(f"the network {network.name} of {num_classes:,} classes", SMALLER):
        if isinstance(network, OtherNetwork):
            model, info, fresh = others.build(config, network, num_classes, content, **options)
        else:
            model, info, fresh = _build(config, network, num_classes, content, **options)
        if info:
            _match_classes(model, fresh, info, str(path), class_names)
    return model


Built = tuple[nn.Module, CheckpointInfo | None, list[dict[str, Any]]]


def _build(
    config: BaseConfig, network: Variant, num_classes: int, content: dict[str, Any] | None, **options: Any
) -> Built:
    """Builds a Conv2Former.

    Args:
        config: the run.
        network: which one.
        num_classes: of the data.
        content: of the file with the starting weights; None for none.
        **options: see `build_model`.

    Returns:
        The network, what its file says about itself, and its fresh classifier.
    """
    model = timm.create_model(
        network.name,
        num_classes=num_classes,
        in_chans=config.model.in_chans or 3,
        drop_rate=config.model.drop_rate,
        drop_path_rate=_drop_path_rate(config, network),
        head_init_scale=config.model.head_init_scale,
        fused=config.model.fused,
        **options,
    )
    assert isinstance(model, Conv2Former)
    fresh = [copy.deepcopy(model.get_classifier().state_dict())]
    info = _load(model, content, str(config.model.checkpoint), config.model.freeze) if content else None
    model.set_grad_checkpointing(config.model.grad_checkpointing)
    return model, info, fresh


def _load(model: Conv2Former, content: dict[str, Any], path: str, frozen: str) -> CheckpointInfo:
    """Loads starting weights, and returns what their file says about itself.

    A classifier for another number of classes stays fresh; so does the whole head where the file has none, and it must
    not be `frozen` then, unless the network is built without a classifier and its head is taken off. Where the network
    takes one channel and the file's three, the first convolution is summed over them, as timm does.
    """
    info, is_headless = describe_checkpoint(content, path), model.num_classes == 0
    if isinstance(info, OtherInfo):
        raise CheckpointError(f"{path} holds {info.network}, not a Conv2Former; give model.name=auto to train that")
    if not info.has_head and frozen == "backbone" and not is_headless:
        raise ConfigError(
            f"model.freeze: backbone would freeze the 1x1 convolution before the classifier, which {path} does not "
            "have, as it is drawn; train it too: model.freeze=stage4"
        )
    is_narrower = info.in_chans == 3 and model.in_chans == 1
    if is_narrower or is_headless:
        state_dict = native_state_dict(content, path=path)
        if is_narrower:
            weight = f"{FIRST_CONV}.weight"
            state_dict[weight] = adapt_input_conv(model.in_chans, state_dict[weight])
        if is_headless:  # nothing is to be said about a head that nobody will use
            own = model.state_dict()
            state_dict |= {key: own[key] for key in lacking_head(model, state_dict)}
        notes = {key: value for key, value in content.items() if key in ("variant", "hub_config")}
        content = {**notes, "state_dict": state_dict}
    load_content(model, content, path)
    return info


def _match_classes(
    model: nn.Module,
    fresh: list[dict[str, Any]],
    info: CheckpointInfo,
    path: str,
    class_names: Sequence[str] | None,
) -> None:
    """Takes the classifier of a file for the classes that the data has, by name.

    Where the file has them in another order, so has the classifier; where they are others, the fresh one stays.

    Args:
        model: with the file's weights, and with its classifier if that is for as many classes.
        fresh: state dicts of the classifiers before.
        info: of the file.
        path: of the file.
        class_names: of the data, in index order; None where they are not known.
    """
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
        for classifier, before in zip(classifiers(model), fresh, strict=True):
            classifier.load_state_dict(before)
    else:
        for classifier in classifiers(model):
            classifier.load_state_dict({key: tensor[order] for key, tensor in classifier.state_dict().items()})


def freeze(model: nn.Module, until: str) -> None:
    """Freezes the network up to and including a part, and puts that part into evaluation mode.

    Needed after every `model.train()`, which would let BatchNorm's statistics run and drop path drop.

    Args:
        model: the network.
        until: nothing, stem, stage1 to stage4, or backbone: all but the classifier.

    Raises:
        ConfigError: it is not known where the stages of such a network begin.
    """
    if not isinstance(model, Conv2Former):
        others.freeze(model, until)
        return
    parts: list[nn.Module] = [model.stem, *model.stages, model.head_conv]
    count = ["nothing", "stem", "stage1", "stage2", "stage3", "stage4", "backbone"].index(until)
    for part in parts[:count]:
        part.eval().requires_grad_(False)


def compiled_parts(config: BaseConfig) -> str:
    """Returns what of the configured network `compile_network` compiles."""
    return "all of it" if is_other(config.model.name) else "blocks"


def compile_network(model: nn.Module) -> nn.Module:
    """Returns what to train a network through so that torch.compile computes it: block by block, or as a whole.

    Raises:
        UserError: there is no torch.compile here.
    """
    if not isinstance(model, Conv2Former):
        return others.Compiled(model)
    compile_blocks(block for stage in model.stages for block in cast(Stage, stage).blocks)
    return model
