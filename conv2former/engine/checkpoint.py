"""Training checkpoints: one plain dict of tensors and built-in types per file, written whole or not at all.

step, epoch          optimizer steps done, epochs done
model, model_ema     state dicts of the raw module and of the average (None without one)
optimizer, scaler    state dicts (scaler None unless fp16)
metric, best_metric  top-1 of these weights (None if not evaluated), and of the best so far
class_names          names in index order
config, variant      the resolved configuration and the network's definition
seconds              training time so far
plan                 images, global batch and steps per epoch: a continuation must have the same
versions, format     of torch, timm and this package; of this layout
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, bullets
from ..models.weights import read_checkpoint

__all__ = ["FORMAT", "latest_checkpoint", "read_training_checkpoint", "save_checkpoint"]

FORMAT = 1
_NAME = re.compile(r"step_(\d{8})\.pt")
_KEYS = {
    "step",
    "epoch",
    "model",
    "model_ema",
    "optimizer",
    "scaler",
    "best_metric",
    "class_names",
    "config",
    "variant",
    "plan",
}


def save_checkpoint(folder: Path, content: dict[str, Any], is_best: bool, keep: int) -> Path:
    """Writes `folder/step_NNNNNNNN.pt`, and makes `best.pt` the same file if it is the best; removes old ones.

    A file appears under its name only when it is complete and on the disk.

    Args:
        folder: made if it does not exist.
        content: the checkpoint; see the top of this module.
        is_best: whether its metric is the best of the run.
        keep: how many of the newest files stay.

    Returns:
        The path of the new file.

    Raises:
        CheckpointError: the file cannot be written; the files before it are untouched.
    """
    path = folder / f"step_{content['step']:08d}.pt"
    temporary = folder / f".{path.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({**content, "format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if is_best:
            _copy(path, folder / "best.pt")
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written ({e}); earlier checkpoints are untouched") from None
    for old in _list(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)  # no second copy on the disk
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _list(folder: Path) -> list[Path]:
    """Returns the complete step files, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name))


def read_training_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a file that `save_checkpoint` wrote.

    Raises:
        CheckpointError: it cannot be read, is not a training checkpoint of this project, or is of a newer format.
    """
    content = read_checkpoint(path)
    if _KEYS - content.keys():
        raise CheckpointError(f"{path} is a weight file, not a checkpoint to resume from; give it as model.checkpoint")
    if content.get("format", 0) > FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}; this version reads up to {FORMAT}: update it")
    return content


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """Reads the newest checkpoint in `folder` that is intact.

    Returns:
        Its path, its content, and a warning for each newer file that is damaged; None if there is no file at all.

    Raises:
        CheckpointError: there are files and every one is damaged.
    """
    warnings: list[str] = []
    for path in reversed(_list(folder)):
        try:
            return path, read_training_checkpoint(path), warnings
        except CheckpointError as e:
            warnings.append(f"damaged checkpoint: {e}")
    if warnings:
        raise CheckpointError(f"every checkpoint in {folder} is damaged:\n" + bullets(warnings))
    return None
