"""Export of checkpoints of any task: what is exported of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...printing import print_lines
from ..kinds import kind_for
from . import export as files
from .detection import open_detection
from .export import open_classifier
from .options import Options
from .segmentation import open_segmentation
from .subject import Exported, Subject

__all__ = ["export"]

# by the task: from a file's path, its content, the format and the options to what is exported
_KINDS: dict[str, Callable[[str | Path, Mapping[str, Any], str, Options], Subject]] = {
    "classification": open_classifier,
    "segmentation": open_segmentation,
    "detection": open_detection,
}


def export(
    checkpoint: str | Path, output: str | Path, options: Options | None = None, say: Callable[[str], None] = print_lines
) -> Exported:
    """Writes a network of any task for another runtime; see `export.export`."""
    return files.export(checkpoint, output, options, say, _open)


def _open(checkpoint: str | Path, content: Mapping[str, Any], kind: str, options: Options) -> Subject:
    return kind_for(_KINDS, checkpoint, content)(checkpoint, content, kind, options)
