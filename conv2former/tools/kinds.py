"""How a command finds what it does with a checkpoint: by the task that it was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError, shorten
from ..tasks.registry import task_of

__all__ = ["kind_for"]

K = TypeVar("K")


def kind_for(kinds: Mapping[str, K], checkpoint: str | Path, content: Mapping[str, Any]) -> K:
    """Returns what a command has for the task of a weight file.

    Args:
        kinds: by the names of tasks.
        checkpoint: the file, named in errors.
        content: of it.

    Raises:
        CheckpointError: this version does not know the task, or the command has nothing for it.
    """
    task = task_of(content, checkpoint).name
    if task not in kinds:
        raise CheckpointError(f"{checkpoint} is of the task {task!r}; this command is for {shorten(kinds)}")
    return kinds[task]
