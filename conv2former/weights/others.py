"""Networks of timm's registry besides Conv2Former: how configurations and weight files name them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import torch
from timm.models import get_pretrained_cfg, is_model, list_models

from .._preprocessing import CHANNELS
from ..errors import CheckpointError, ConfigError, shorten
from ..text import shown
from ..variants import list_variants

__all__ = ["PREFIX", "OtherNetwork", "channels_in", "classes_in", "is_other", "noted_network", "other_network"]

PREFIX = "timm/"
NEAR = 5  # names that are shown for an unknown one
LARGEST = 100_000  # number among the arguments in a file
MOST = 100  # arguments of a network, and values of a list in them
_DEPTH = re.compile(r"depth|layers|blocks|repeats")  # arguments that say how many parts there are
_CLASSIFIERS = ("head.fc", "head", "fc", "classifier")  # the usual names
# Arguments of timm's constructors that something else says, or that would be given to other functions of timm's
_TAKEN = {
    "num_classes": "it follows from the data",
    "in_chans": "set model.in_chans",
    "drop_rate": "set model.drop_rate",
    "drop_path_rate": "set model.drop_path_rate",
    "pretrained": "set model.pretrained",
    "checkpoint_path": "set model.checkpoint",
} | dict.fromkeys(
    (
        "cache_dir", "device", "dtype", "exportable", "feature_cfg", "feature_cls", "features_only", "kwargs_filter",
        "model_cfg", "no_jit", "out_indices", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn",
        "pretrained_model_args", "pretrained_strict", "pruned", "scriptable",
    ),
    "it does not belong to the network; leave it out",
)  # fmt: skip


@dataclass(frozen=True)
class OtherNetwork:
    """A network of timm's registry, as its constructor takes it.

    Attributes:
        entry: its name in the registry, with or without the tag of its pretrained weights.
        args: arguments of its constructor.
        in_chans: channels of its input.
    """

    entry: str
    args: Mapping[str, Any] = field(default_factory=dict)
    in_chans: int = 3

    @property
    def name(self) -> str:
        """As configurations have it: `timm/convnext_tiny`."""
        return PREFIX + self.entry

    @property
    def cfg(self) -> dict[str, Any]:
        """The description in timm of the network and its pretrained weights."""
        found = get_pretrained_cfg(self.entry)
        return found.to_dict() if found else {}

    @property
    def has_fixed_size(self) -> bool:
        """Whether the constructor takes the size of the images."""
        return bool(self.cfg.get("fixed_input_size"))

    def sized(self, size: Sequence[int]) -> OtherNetwork:
        """Returns the network for images of (height, width) pixels; itself if it takes any, or `args` say the size."""
        if not self.has_fixed_size or "img_size" in self.args:
            return self
        return replace(self, args={**self.args, "img_size": list(size)})

    def to_dict(self) -> dict[str, Any]:
        """Returns what files note of it, as plain types; `noted_network` reads it."""
        return {"name": self.name, "args": dict(self.args), "in_chans": self.in_chans}

    def __str__(self) -> str:
        args = ", ".join(f"{key}={value}" for key, value in self.args.items())
        return f"{self.name}({args})" if args else self.name


def is_other(name: object) -> bool:
    """Returns whether a name is that of a network of timm's registry which is not Conv2Former."""
    return isinstance(name, str) and name.startswith(PREFIX) and name.removeprefix(PREFIX) not in list_variants()


def other_network(name: str, args: Mapping[str, Any] | None = None, in_chans: int = 3) -> OtherNetwork:
    """Returns the network of a name, `timm/convnext_tiny`.

    Args:
        name: in timm's registry, after `timm/`; with a tag, `timm/convnext_tiny.in12k_ft_in1k`, its weights are meant.
        args: of its constructor.
        in_chans: channels of its input.

    Raises:
        ConfigError: timm has no such network or no such weights, or an argument is not the constructor's.
    """
    entry, args = name.removeprefix(PREFIX), args or {}
    own, _, tag = entry.partition(".")
    if not is_model(own):
        near = get_close_matches(own, list_models(), n=NEAR, cutoff=0.6)
        hint = f"; near it: {', '.join(near)}" if near else "; timm.list_models() lists them"
        raise ConfigError(f"model.name: timm has no network {shown(own)}{hint}")
    try:
        get_pretrained_cfg(entry)
    except RuntimeError:
        tags = [known.partition(".")[2] for known in list_models(f"{own}.*", include_tags=True)]
        known = shorten(filter(None, tags)) or "none"
        raise ConfigError(f"model.name: timm's {own} has no weights {shown(tag)}; it has: {known}") from None
    for key in args:
        if not isinstance(key, str) or not key.isidentifier():
            raise ConfigError(f"model.args: {shown(key)} is no name of an argument")
        if key in _TAKEN:
            raise ConfigError(f"model.args.{key}: {_TAKEN[key]}")
    return OtherNetwork(entry, dict(args), in_chans)


def noted_network(
    definition: Mapping[str, Any], hub_config: Mapping[str, Any], content: Mapping[str, Any], tensors: int
) -> OtherNetwork | None:
    """Returns the network that a file notes it is, if that is one of timm's registry besides Conv2Former.

    Args:
        definition: this project's note.
        hub_config: timm's config.json beside the file.
        content: of the file; timm's training script notes `arch`.
        tensors: how many there are in it.

    Raises:
        CheckpointError: the note is wrong.
    """
    name, args, chans = definition.get("name"), definition.get("args"), definition.get("in_chans")
    if not is_other(name):
        name = hub_config.get("architecture") or content.get("arch")
        if not isinstance(name, str) or name.partition(".")[0] in list_variants() or not is_model(name):
            return None
        recipe = content.get("args")
        args = hub_config.get("model_args") or getattr(recipe, "model_kwargs", None)
        inner = hub_config.get("pretrained_cfg") or {}
        size = inner.get("input_size") or getattr(recipe, "input_size", None) or [getattr(recipe, "in_chans", None)]
        chans = size[0]
        if isinstance(args, Mapping):
            chans = args.get("in_chans", chans)
            args = {key: value for key, value in args.items() if key not in _TAKEN}
        name = PREFIX + name.partition(".")[0]
    args, chans = args or {}, 3 if chans is None else chans
    if not isinstance(args, Mapping) or type(chans) is not int or not 0 < chans <= LARGEST:
        raise CheckpointError(f"the note of its network is not one: args {shown(args)}, in_chans {shown(chans)}")
    if problem := _too_much(args, tensors):
        raise CheckpointError(f"it is damaged or made to harm: {problem}")
    try:
        return other_network(str(name), args, chans)
    except ConfigError as e:
        raise CheckpointError(f"the note of its network is wrong: {e}") from None


def _too_much(args: Mapping[Any, Any], tensors: int) -> str:
    """Returns what in a file's arguments would let a network be built that has nothing to do with it."""
    if len(args) > MOST:
        return f"its network has {len(args)} arguments"
    for key, value in args.items():
        most = tensors if _DEPTH.search(str(key)) else LARGEST
        for number in _numbers(value):
            if not -most <= number <= most:
                return f"its network has the argument {shown(key)} {shown(value)}, and the file {tensors:,} tensors"
    return ""


def _numbers(value: Any) -> Iterator[float]:
    """Goes over the numbers in nested lists and mappings; one that is far too long or deep counts as infinite."""
    waiting, left = [value], MOST * 10
    while waiting:
        one = waiting.pop()
        if isinstance(one, (list, tuple)):
            waiting += one[: left + 1]
        elif isinstance(one, Mapping):
            waiting += list(one.values())[: left + 1]
        elif isinstance(one, (int, float)) and not isinstance(one, bool):
            yield one
        left -= 1
        if left < 0:
            yield float("inf")
            return


def classes_in(network: OtherNetwork, state_dict: Mapping[str, torch.Tensor]) -> int:
    """Returns the size of the classifier in a state dict, 0 where there is none."""
    name = network.cfg.get("classifier")
    names = [name] if isinstance(name, str) else list(name or ())
    for key in (*names, *_CLASSIFIERS):
        weight = state_dict.get(f"{key}.weight")
        if weight is not None and weight.ndim in (2, 4):  # 4: a convolution of one pixel
            return int(weight.shape[0])
    return 0


def channels_in(network: OtherNetwork, state_dict: Mapping[str, torch.Tensor]) -> int:
    """Returns the channels that a state dict takes, by its first convolution; as in `network` where that tells none."""
    name = network.cfg.get("first_conv")
    weight = state_dict.get(f"{name if isinstance(name, str) else next(iter(name or ()), '')}.weight")
    if weight is None or weight.ndim != 4 or weight.shape[1] not in CHANNELS:
        return network.in_chans
    return int(weight.shape[1])
