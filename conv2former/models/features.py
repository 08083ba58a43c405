"""Loading into the feature extractors that timm makes of a network, `features_only=True`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..weights.architecture import HEAD
from ..weights.contents import native_state_dict
from ..weights.fit import check_fit
from ..weights.layouts import native_key, rename_keys_in_place

__all__ = ["accept_any_layout"]


def accept_any_layout(features: nn.Module) -> None:
    """Lets a feature extractor load what the whole network loads: every layout, with a head or without one.

    timm's classes for it, of which the modules are `stem`, `stages_0`, ..., know nothing of a file's layout, and refuse
    the tensors of what they leave out.

    Args:
        features: made by timm of a `Conv2Former`.
    """
    features.register_load_state_dict_pre_hook(_prepare)


def _prepare(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: Any
) -> None:
    """Puts the names of the feature extractor into `state_dict`, and takes out what it leaves out of the network."""
    own = {_native(name): name for name in module.state_dict()}
    if state_dict.keys() == {prefix + name for name in own.values()}:  # its own
        return
    if prefix:  # a part of a bigger model, whose state dict this is
        found = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        rename_keys_in_place(found)
        found = {_native(name): value for name, value in found.items()}
    else:
        found = native_state_dict(state_dict, path="the state dict")
        state_dict.clear()
    used = {name: value for name, value in found.items() if name in own or not _is_left_out(name, own)}
    if strict and not prefix:
        check_fit(module, {own.get(name, name): value for name, value in used.items()})
    state_dict.update({prefix + own.get(name, name): value for name, value in used.items()})


def _native(name: str) -> str:
    """Returns a name as the whole network has it; some of timm's extractors put 'model.' or 'body.' before."""
    return native_key(name.removeprefix("model.").removeprefix("body."))


def _is_left_out(name: str, own: dict[str, str]) -> bool:
    """Whether a tensor of the network belongs to its head, or to a stage that the extractor does not have."""
    if name.startswith(HEAD):
        return True
    stage = ".".join(name.split(".")[:2]) + "."
    return stage.startswith("stages.") and not any(key.startswith(stage) for key in own)
