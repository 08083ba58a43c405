"""Whether a state dict fits a network, and what is done where only the head does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import CheckpointError, shorten
from .architecture import CLASSIFIER, HEAD, identify
from .contents import announce

__all__ = ["adapt_classifier", "adapt_head", "check_fit", "lacking_head"]


def check_fit(model: nn.Module, state_dict: Mapping[str, Any], ignore: Iterable[str] = ()) -> None:
    """Checks that a state dict in this project's layout has just the keys and shapes of `model`.

    Args:
        model: a Conv2Former.
        state_dict: what is to be loaded.
        ignore: keys that may differ.

    Raises:
        CheckpointError: they differ; says in one sentence how the networks do, or lists the keys.
    """
    skip = set(ignore)
    own = {key: tensor for key, tensor in model.state_dict().items() if key not in skip}
    # torch fills in the batch counter where an old file lacks it; nothing reads it here
    missing = [key for key in own if key not in state_dict and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state_dict if key not in own and key not in skip]
    reshaped = [key for key, tensor in own.items() if key in state_dict and state_dict[key].shape != tensor.shape]
    if not (missing or unexpected or reshaped):
        return
    theirs, ours = identify(state_dict), identify(model.state_dict())
    if theirs and ours and str(theirs) != str(ours):
        fix = f"create '{theirs.variant}'" if theirs.variant else "register a variant of that shape and create it"
        raise CheckpointError(f"the checkpoint is {theirs}, the model is {ours}: {fix} instead")
    if len(missing) > len(own) // 2:
        raise CheckpointError(f"this is not a Conv2Former checkpoint: its keys are {shorten(state_dict, 5) or 'none'}")
    lines = ["the checkpoint does not fit the model:"]
    if missing:
        lines.append(f"  missing keys: {shorten(missing)}")
    if unexpected:
        lines.append(f"  unexpected keys: {shorten(unexpected)}")
    if reshaped:
        shapes = [f"{key} {tuple(state_dict[key].shape)} for {tuple(own[key].shape)}" for key in reshaped]
        lines.append(f"  wrong shapes: {shorten(shapes)}")
    raise CheckpointError(*lines)


def lacking_head(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Returns the keys of the model's head if `state_dict`, in this project's layout, has none at all, else nothing."""
    if any(key.startswith(HEAD) for key in state_dict):
        return []
    return [key for key in model.state_dict() if key.startswith(HEAD)]


def adapt_head(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Makes the head in `state_dict` fit the model's, in place, and logs a warning where it is not used.

    Weights without a head, as self-supervised training and feature extractors leave them, leave the model's own as it
    is, and so does a classifier for another number of classes, or none.
    """
    if not (keys := lacking_head(model, state_dict)):
        adapt_classifier(model, state_dict)
        return
    own = model.state_dict()
    classes = f", for {own[CLASSIFIER[0]].shape[0]} classes" if CLASSIFIER[0] in own else ""
    announce(f"the checkpoint has no head: the model keeps its own, untrained{classes}; all other weights are loaded")
    state_dict.update({key: own[key] for key in keys})


def adapt_classifier(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Makes the classifier in `state_dict` fit the model's, in place, and logs a warning where it is not used.

    A classifier for another number of classes, or none, leaves the model's own as it is.
    """
    own = {key: tensor for key, tensor in model.state_dict().items() if key in CLASSIFIER}
    theirs = state_dict.get(CLASSIFIER[0])
    if theirs is not None and own and theirs.ndim and theirs.shape[0] == own[CLASSIFIER[0]].shape[0]:
        if theirs.numel() == own[CLASSIFIER[0]].numel():  # Linear, or the 1x1 convolution that it is without pooling
            state_dict[CLASSIFIER[0]] = theirs.reshape(own[CLASSIFIER[0]].shape)
        return
    if theirs is None and not own:
        return
    found = "no classifier" if theirs is None or not theirs.ndim else f"a classifier for {theirs.shape[0]} classes"
    kept = f"the model keeps its own for {own[CLASSIFIER[0]].shape[0]} classes" if own else "it is left out"
    announce(f"the checkpoint has {found}: {kept}; all other weights are loaded")
    for key in CLASSIFIER:
        state_dict.pop(key, None)
    state_dict.update(own)
