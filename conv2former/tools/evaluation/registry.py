"""Evaluation of checkpoints of any task: which functions do it, and which say what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError, before_processes_meet
from ...weights.reading import read_checkpoint
from ..kinds import kind_for
from . import boxes, files, masks
from .detection import validate_boxes
from .segmentation import validate_masks
from .validate import validate_files as validate_classifiers

__all__ = ["heading", "summary", "validate_files"]

Rows = list[dict[str, Any]]


class _Kind(NamedTuple):
    """What a task's evaluation is.

    Attributes:
        validate: see `validate.validate_files`.
        heading, summary: see files.py.
    """

    validate: Callable[..., Rows]
    heading: Callable[[Sequence[dict[str, Any]]], list[str]]
    summary: Callable[..., list[str]]


_KINDS = {
    "classification": _Kind(validate_classifiers, files.heading, files.summary),
    "segmentation": _Kind(validate_masks, masks.heading, masks.summary),
    "detection": _Kind(validate_boxes, boxes.heading, boxes.summary),
}


def validate_files(checkpoints: Sequence[str | Path], *args: Any, **kwargs: Any) -> Rows:
    """Evaluates weight files of one task; the arguments and the rows are those of `validate.validate_files`.

    Raises:
        UserError: as there, or the files are of several tasks.
    """
    with before_processes_meet():
        if not checkpoints:
            raise ConfigError("no checkpoint is given")
        contents = [read_checkpoint(checkpoints[0])]  # a list, so that it can be let go when the network is built
        kind = kind_for(_KINDS, checkpoints[0], contents[0])
        if len(checkpoints) > 1:  # one network at a time is in memory, so each is read again
            contents.clear()
        for path in checkpoints[1:]:
            if kind_for(_KINDS, path, read_checkpoint(path)) is not kind:
                raise ConfigError(f"{path} is of another task than {checkpoints[0]}: evaluate them apart")
    return kind.validate(checkpoints, *args, **kwargs, contents=contents)


def _printer_of(rows: Sequence[dict[str, Any]]) -> _Kind:
    return _KINDS[rows[0].get("task", "classification")]


def heading(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns lines that say what is evaluated, how and on what; `rows` as `validate_files` announces them."""
    return _printer_of(rows).heading(rows)


def summary(rows: Sequence[dict[str, Any]], folder: Path | None = None, is_headed: bool = False) -> list[str]:
    """Returns lines that say what was evaluated, and the results; `rows` as `validate_files` returns them."""
    return _printer_of(rows).summary(rows, folder, is_headed)
