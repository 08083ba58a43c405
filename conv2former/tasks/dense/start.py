"""Parts of a network from a checkpoint of the same task; its backbone is loaded as that of a classifier's is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...weights.contents import announce

__all__ = ["load_parts"]


def load_parts(
    model: nn.Module,
    content: Mapping[str, Any],
    path: str,
    class_names: Sequence[str] | None,
    task: str,
    what: str,
    parts: tuple[str, ...],
    last: tuple[str, ...],
) -> None:
    """Loads what is not the backbone's of a training checkpoint into a network that has the same, and says it.

    Args:
        model: a `DenseNetwork`.
        content: of the file; one that is of another task changes nothing.
        path: of the file.
        class_names: of the data, in index order; None where they are not known.
        task: of the network.
        what: the parts are, in a sentence: one, and several.
        parts: what their names begin with.
        last: what the names of those begin with that have a row for each class.
    """
    noted = content.get("config")
    found = content.get("model_ema") or content.get("model")
    if not isinstance(noted, Mapping) or noted.get("task") != task or not isinstance(found, Mapping):
        return
    own = {key: value for key, value in model.state_dict().items() if key.startswith(parts)}
    theirs = {key: value for key, value in found.items() if key in own and isinstance(value, torch.Tensor)}
    inner = [key for key in own if not key.startswith(last)]
    if any(key not in theirs or theirs[key].shape != own[key].shape for key in inner):
        announce(f"{path} has another {what}: the run's starts anew; the backbone is loaded")
        return
    is_same = class_names is not None and list(class_names) == content.get("class_names")
    but = "" if is_same else ", but its last layers, whose classes are others"
    announce(f"the {what} of {path} is loaded{but}")
    taken = theirs if is_same else {key: theirs[key] for key in inner}
    model.load_state_dict(taken, strict=False)
