"""Networks of timm's registry besides Conv2Former: built, and given their weights, by timm's own functions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import nn

from .._preprocessing import size_text
from ..errors import CheckpointError, ConfigError, UserError, first_line, is_out_of_memory, shorten
from ..weights.description import OtherInfo
from ..weights.others import OtherNetwork
from .backbone import Conv2Former

__all__ = ["build_other", "check_size", "classifiers", "load_other", "overwriting_convolution"]

MOST_MISSING = 10  # times as many weights as a file has, in the network that its note tells of
_UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")
_KEYS = {key: f"model.{key}" for key in ("drop_rate", "drop_path_rate", "in_chans")}


def build_other(network: OtherNetwork, num_classes: int, pretrained: bool = False, **options: Any) -> Any:
    """Builds a network on the CPU, in training mode.

    Args:
        network: which one.
        num_classes: of its classifier, 0 for none.
        pretrained: with the weights that timm knows, from the hub or its cache.
        **options: further arguments of the constructor, such as `drop_path_rate`, or of timm's `create_model`.

    Raises:
        ConfigError: timm cannot build it so.
        CheckpointError: the pretrained weights cannot be had.
    """
    chans = {} if network.in_chans == 3 else {"in_chans": network.in_chans}  # not every constructor takes it
    try:
        return timm.create_model(
            network.entry, pretrained, num_classes=num_classes, **{**chans, **network.args, **options}
        )
    except UserError:
        raise
    except Exception as e:  # timm's constructors raise whatever their arguments lead to
        if is_out_of_memory(e):
            raise
        error = e
    if found := _UNKNOWN.search(str(error)):
        is_images = found[1] == "img_size" and network.has_fixed_size  # which `sized` has put there
        key = "data.img_size" if is_images else _KEYS.get(found[1], f"model.args.{found[1]}")
        raise ConfigError(f"{key}: {network.name} takes no {found[1]}; leave it out") from None
    if pretrained and "pretrained_cfg_overlay" not in options:
        raise _not_fetched(network, error)
    sizes = ["data.img_size"] if network.has_fixed_size and "img_size" in network.args else []
    keys = sizes + ["model.args"] * (len(network.args) > len(sizes) or not sizes)
    raise ConfigError(f"{' or '.join(keys)}: timm cannot build {network}: {first_line(error)}") from None


def _not_fetched(network: OtherNetwork, error: Exception) -> CheckpointError:
    """Returns the error where pretrained weights cannot be had: where they are, and what to do."""
    cfg = network.cfg
    place = cfg.get("hf_hub_id") or cfg.get("url")
    if not place:
        return CheckpointError(f"model.pretrained: timm knows no weights of {network.name}; leave it out")
    tag = cfg.get("tag")
    full = network.name if not tag or network.name.endswith(f".{tag}") else f"{network.name}.{tag}"
    return CheckpointError(
        f"model.pretrained: the weights {full} cannot be had from {place} ({type(error).__name__}: "
        f"{first_line(error)}); download them where that can be reached and give the file as model.checkpoint, or "
        "leave model.pretrained out"
    )


def load_other(
    info: OtherInfo, state_dict: Mapping[str, torch.Tensor], path: object, network: OtherNetwork, **options: Any
) -> Any:
    """Builds a network with all weights of a file, the classifier included.

    Tensors of another layout, as in files of older versions of timm, a first convolution for other channels, and
    position embeddings for images of another size are changed as timm does it for its own weights.

    Args:
        info: of the file.
        state_dict: the tensors of the file.
        path: named in errors.
        network: what to build: `info.network`, or the same for images of another size or of other channels.
        **options: see `build_other`.

    Raises:
        CheckpointError: the weights are not all that the network has.
    """
    classes = info.num_classes
    _check_weights(network, classes, info.num_parameters, path)
    try:
        model = build_other(network, classes, **options)
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e}") from None
    own = model.state_dict()
    if problem := _misfit(own, state_dict):
        cfg = {
            "state_dict": dict(state_dict),
            "num_classes": classes,
            "input_size": (info.in_chans, *info.preprocessing.size),
            "label_offset": None,
        }
        try:
            model = build_other(network, classes, True, pretrained_cfg_overlay=cfg, **options)
        except ConfigError:
            raise CheckpointError(f"{path} does not hold the weights of {network}: {problem}") from None
        for notes in (model.pretrained_cfg, model.default_cfg):
            notes.pop("state_dict", None)  # no second copy of the weights
    else:
        model.load_state_dict(dict(state_dict))
    return model


def _misfit(own: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> str:
    """Returns how a file's tensors differ from a network's by names and shapes, '' if they do not."""
    missing, unexpected = [key for key in own if key not in theirs], [key for key in theirs if key not in own]
    shapes = [
        f"{key} {tuple(theirs[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in theirs and own[key].shape != theirs[key].shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of other shapes", shapes))
    return "; ".join(f"{what}: {shorten(keys, 3)}" for what, keys in found if keys)


def _check_weights(network: OtherNetwork, classes: int, num_parameters: int, path: object) -> None:
    """Checks, before memory is taken, that a file's note does not tell of a network far larger than the file."""
    try:
        with torch.device("meta"):
            model = build_other(network, classes)
    except Exception:  # not every constructor can do without values
        return
    needed = sum(parameter.numel() for parameter in model.parameters())
    if needed > MOST_MISSING * num_parameters:
        raise CheckpointError(
            f"{path} does not hold the weights of {network}: that has {needed:,}, and the file {num_parameters:,}"
        )


def classifiers(model: Any) -> list[nn.Module]:
    """Returns the layers of a network that give its logits: one, or two of a distilled one; none without parameters."""
    found = model.get_classifier()
    parts = list(found) if isinstance(found, (tuple, list)) else [found]
    return [part for part in parts if isinstance(part, nn.Module) and any(True for _ in part.parameters())]


@torch.inference_mode()
def check_size(model: nn.Module, name: object, size: Sequence[int], in_chans: int, key: str = "data.img_size") -> None:
    """Tries a network with an image of zeros, since many of timm's take one size, or multiples of a number, alone.

    Args:
        model: a Conv2Former takes every size and is not tried.
        name: what to call it.
        size: (height, width), pixels.
        in_chans: channels of the image.
        key: what sets it.

    Raises:
        ConfigError: it does not take such images, or gives no logits.
    """
    if isinstance(model, Conv2Former):
        return
    was_training, text = model.training, size_text(size)
    example = next(model.parameters())
    try:
        logits = model.eval()(torch.zeros(1, in_chans, *size, device=example.device))
    except Exception as e:  # an assertion of timm's, or of torch about shapes
        raise ConfigError(f"{key}: {name} does not take images of {text} ({first_line(e)})") from None
    finally:
        model.train(was_training)
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, model.num_classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(f"model.args: {name} answers an image with {found}, not with a logit for each class")


def overwriting_convolution(model: nn.Module) -> str | None:
    """Returns the name of a convolution that on a CPU must not be trained in channels_last memory; None without one.

    With kernels of 1 x 1, strides, and fewer than 16 input channels, the gradient of the weights is written beyond its
    memory: the process crashes, or other tensors are overwritten. Seen with torch 2.14.1 and AVX-512, in fp32 and bf16,
    and not in NCHW memory. RepVGG, MobileOne and FastViT begin with one.
    """
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and max(module.stride) > 1
            and module.groups == 1
            and module.in_channels < 16
        ):
            return name
    return None
