"""The tasks by their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import BaseConfig
from ..config.registry import add_config_class
from ..errors import CheckpointError, shorten
from ..models import CheckpointInfo
from ..weights.description import task_noted
from ..weights.reading import read_checkpoint
from .classification.task import Classification
from .detection.task import Detection
from .segmentation.task import Segmentation
from .task import Task

__all__ = ["find_task", "is_result", "known_tasks", "load_network", "register_task", "task_in", "task_named", "task_of"]

_tasks: dict[str, Task] = {}


def register_task(task: Task) -> None:
    """Makes a task known, so that `task: NAME` configures, trains and goes on with it."""
    _tasks[task.name] = task
    add_config_class(task.name, task.config)


def find_task(config: BaseConfig) -> Task:
    """Returns the task of a configuration."""
    return _tasks[config.task]


def known_tasks() -> list[Task]:
    """Returns all tasks."""
    return list(_tasks.values())


def task_named(name: str) -> Task:
    """Returns the task of a name, as a report has it."""
    return _tasks[name]


def is_result(metrics: Mapping[str, Any]) -> bool:
    """Returns whether metrics have what an evaluation of any task, also one of an earlier version, has at least."""
    return any({task.headline, *({"loss"} & task.metrics.keys())} <= metrics.keys() for task in _tasks.values())


def task_in(content: Mapping[str, Any]) -> Task:
    """Returns the task of a training checkpoint; before there were several, it was classification.

    Raises:
        CheckpointError: this version does not know it.
    """
    config = content.get("config")
    name = config.get("task", Classification.name) if isinstance(config, Mapping) else Classification.name
    if not isinstance(name, str) or name not in _tasks:
        raise CheckpointError(f"is of the task {name!r:.50}, and this version knows {shorten(_tasks)}: update it")
    return _tasks[name]


def task_of(content: Mapping[str, Any], path: object) -> Task:
    """Returns the task of any weight file; that of one which notes none, such as the authors', is classification.

    Args:
        content: of the file.
        path: of it, named in errors.

    Raises:
        CheckpointError: this version does not know the task.
    """
    if task_noted(content) == Classification.name:
        return _tasks[Classification.name]
    try:
        return task_in(content)
    except CheckpointError as e:
        raise CheckpointError(f"{path} {e}") from None


def load_network(
    path: str | Path, use_ema: bool = True, expect: str | Path | None = None
) -> tuple[Any, CheckpointInfo]:
    """Builds the network that a weight file holds, whatever its task, in evaluation mode; see `models.load_model`."""
    content = read_checkpoint(path)
    return task_of(content, path).restore(content, path, use_ema, expect)


register_task(Classification())
register_task(Segmentation())
register_task(Detection())
