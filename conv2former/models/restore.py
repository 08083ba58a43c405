"""From a weight file to a network with its weights: one that is there, or the one that the file says it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.utils import unwrap_model
from torch import nn

from ..errors import CheckpointError, memory_for
from ..text import printable
from ..variants import differences, list_variants, read_variant, variant
from ..weights.contents import native_state_dict, plain_state_dict
from ..weights.description import (
    CheckpointInfo,
    OtherInfo,
    check_is_classifier,
    definition_in,
    describe_checkpoint,
    untold_args,
)
from ..weights.installed import say_if_unverified
from ..weights.others import is_other, other_network
from ..weights.reading import read_checkpoint
from .backbone import Conv2Former
from .others import load_other
from .zoo import make_cfg

__all__ = ["check_expected", "load_content", "load_model", "load_weights", "restore"]


def load_model(path: str | Path, use_ema: bool = True, expect: str | Path | None = None) -> tuple[Any, CheckpointInfo]:
    """Builds the network that a weight file holds, with its weights, in evaluation mode.

    Args:
        path: a file in any known layout, or a folder in timm's hub layout; see `read_checkpoint`.
        use_ema: take the averaged weights where the file has them.
        expect: the name of a variant, or its YAML file, that the network must be; None for whatever it is. Or the name
            of another network, `timm/NAME`: what a file is that does not say so.

    Returns:
        The network, a `Conv2Former` or that of timm's registry which the file notes, whose `pretrained_cfg` has the
        file's preprocessing where timm looks for it, and what the file says about itself. Of a Conv2Former's weights
        without a head it has none either, and gives the last stage's features, pooled.

    Raises:
        CheckpointError: the file cannot be read, holds code, is not a whole Conv2Former, another than expected, or of
            another task than classification.
        ConfigError: there is no variant of the expected name.
    """
    content = read_checkpoint(path)
    check_is_classifier(content, path)
    return restore(content, path, use_ema, expect)


def restore(
    content: Mapping[str, Any], path: str | Path, use_ema: bool = True, expect: str | Path | None = None
) -> tuple[Any, CheckpointInfo]:
    """As `load_model`, of what `read_checkpoint` returned; `path` is named in errors."""
    info = describe_checkpoint(content, path, other_network(str(expect)) if is_other(expect) else None)
    if expect is not None:
        check_expected(info, path, expect)
    if info.is_part:
        raise CheckpointError(
            f"{path} holds a part of a network; all four stages and the whole head or none are needed"
        )
    if len(info.class_names or ()) not in (0, info.num_classes):
        raise CheckpointError(
            f"{path} names {len(info.class_names or ())} classes, and its classifier has {info.num_classes}"
        )
    with memory_for(f"the network in {path}", "use a machine with more of it", CheckpointError):
        if isinstance(info, OtherInfo):
            network = info.network.sized(info.preprocessing.size)
            other = load_other(info, plain_state_dict(content, use_ema, path), path, network)
            cfg = {**other.pretrained_cfg, "num_classes": info.num_classes, **info.preprocessing.to_cfg()}
            other.pretrained_cfg, other.default_cfg = cfg, cfg
            return other.eval(), info
        model = Conv2Former(in_chans=info.in_chans, num_classes=info.num_classes, **info.model_args())
        if not info.has_head:
            model.reset_classifier(0, reset_other=True)
        load_content(model, content, path, use_ema)
    height, width = info.preprocessing.size
    stride = model.feature_info[-1]["reduction"]
    cfg = {
        **make_cfg(None),
        "architecture": info.name or "conv2former",
        "num_classes": info.num_classes,
        **info.preprocessing.to_cfg(),
        "input_size": (info.in_chans, height, width),
        "pool_size": (height // stride, width // stride),
    }
    model.pretrained_cfg, model.default_cfg = cfg, cfg
    return model.eval(), info


def check_expected(info: CheckpointInfo, path: str | Path, expect: str | Path) -> None:
    """Raises a CheckpointError if a file's network is not the expected one; see `load_model`."""
    if is_other(expect) or isinstance(info, OtherInfo):
        if str(expect).partition(".")[0] != str(info.name).partition(".")[0]:
            raise CheckpointError(f"{path} is not {expect} but {info.name or 'a Conv2Former'}")
        return
    is_file = str(expect).endswith((".yaml", ".yml"))
    wanted = read_variant(expect) if is_file else variant(str(expect))
    differing = differences(info.model_args(), wanted.model_args())
    if differing:
        name = info.name if info.name in list_variants() else "a network of its own"
        raise CheckpointError(f"{path} is not {wanted.name} but {name}: {', '.join(differing)}")


def load_weights(model: nn.Module, path: str | Path, use_ema: bool = True) -> None:
    """Loads a weight file into a Conv2Former; every tensor must fit, but the classifier may be for other classes.

    Args:
        model: a Conv2Former.
        path: a file in this project's, the authors' or birder's layout; see `read_checkpoint`.
        use_ema: take the averaged weights where the file has them.

    Raises:
        CheckpointError: the file cannot be read, holds code, or differs in more than the classifier; the model is
            unchanged.
    """
    from ..models.backbone import Conv2Former  # which imports this module

    model = unwrap_model(model)  # of torch.compile and DistributedDataParallel
    if not isinstance(model, Conv2Former):
        raise CheckpointError(
            f"load_weights needs a whole Conv2Former, not a {type(model).__name__}; for features_only=True "
            "call timm.create_model with checkpoint_path=FILE, or with pretrained=True and "
            "pretrained_cfg_overlay=dict(file=FILE)"
        )
    load_content(model, read_checkpoint(path), path, use_ema)


def load_content(model: nn.Module, content: Mapping[str, Any], path: object, use_ema: bool = True) -> None:
    """As `load_weights`, into a Conv2Former itself, of what `read_checkpoint` returned; `path` is named in errors."""
    if definition := definition_in(content):
        for key, trained in untold_args(definition, path).items():
            if trained != (own := getattr(model, key)):  # the tensors would fit
                raise CheckpointError(f"{path} was trained with {key} {trained!r}, the network has {own!r}")
    say_if_unverified(path)
    try:
        model.load_state_dict(native_state_dict(content, use_ema, path))
    except CheckpointError as e:
        is_named = str(e).startswith(printable(str(path)))
        raise (e if is_named else e.below(path)) from None
