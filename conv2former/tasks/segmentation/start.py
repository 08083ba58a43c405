"""Heads from a checkpoint of another segmentation; its backbone is loaded as that of a classifier's is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...weights.contents import announce

__all__ = ["load_heads"]

HEADS = ("head.", "auxiliary.")
CLASSIFIERS = ("head.classifier.", "auxiliary.4.")  # what has a row for each class


def load_heads(model: nn.Module, content: Mapping[str, Any], path: str, class_names: Sequence[str] | None) -> None:
    """Loads the heads of a training checkpoint into a network that has the same, and says what starts anew.

    Args:
        model: a `SegmentationNetwork`.
        content: of the file; one that is no segmentation's changes nothing.
        path: of the file.
        class_names: of the data, in index order; None where they are not known.
    """
    noted = content.get("config")
    found = content.get("model_ema") or content.get("model")
    if not isinstance(noted, Mapping) or noted.get("task") != "segmentation" or not isinstance(found, Mapping):
        return
    own = {key: value for key, value in model.state_dict().items() if key.startswith(HEADS)}
    theirs = {key: value for key, value in found.items() if key in own and isinstance(value, torch.Tensor)}
    inner = [key for key in own if not key.startswith(CLASSIFIERS)]
    if any(key not in theirs or theirs[key].shape != own[key].shape for key in inner):
        announce(f"{path} has another head: the run's starts anew; the backbone is loaded")
        return
    is_same = class_names is not None and list(class_names) == content.get("class_names")
    last = "" if is_same else ", but the last convolutions, whose classes are others"
    announce(f"the heads for pixels of {path} are loaded{last}")
    taken = theirs if is_same else {key: theirs[key] for key in inner}
    model.load_state_dict(taken, strict=False)
