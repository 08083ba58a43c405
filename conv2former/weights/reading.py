"""Weight files by whatever name users give them: a file, a folder, or installed weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, closest, shorten
from ..variants import list_variants, variant
from .hub_config import HUB_CONFIG, read_hub_config
from .installed import HUB_FILES, find_installed, list_installed, list_shipped
from .safe_load import load_tensors

__all__ = ["read_checkpoint", "weight_file"]

WEIGHT_ENDINGS = (".safetensors", ".pt", ".pth", ".tar", ".bin", ".ckpt")
NOT_UNPACKED = " (a '.pth.tar' file must not be unpacked)"
BEST = Path("checkpoints", "best.pt")  # in a run folder


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a `.safetensors` or `torch.save` file to the CPU without running any code from it.

    Of the classes that a pickle may hold, only tensors, built-in types and `argparse.Namespace` (the recipe in the
    authors' and timm's checkpoints) are allowed.

    Args:
        path: the file, whatever its name ends with: `.pth.tar` files are ordinary `torch.save` files, never to be
            untarred. Or a folder in timm's hub layout, also as `local-dir:FOLDER`, or the weight file in one. Or the
            name of installed weights, such as `conv2former_t.hvision_in1k`, where no file has that name.

    Returns:
        What the file holds: a state dict, or a training checkpoint with the state dict inside. For a folder the state
        dict under `state_dict`, and its config.json under `hub_config`.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint, or holds code.
    """
    path = weight_file(path)
    content = load_tensors(path)
    if path.name in HUB_FILES and (path.parent / HUB_CONFIG).is_file():
        return {"state_dict": content, "hub_config": _read_hub_config(path.parent / HUB_CONFIG)}
    return content


def weight_file(path: str | Path) -> Path:
    """Returns the file that `read_checkpoint` reads the weights from.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(str(path).removeprefix("local-dir:"))
    if not path.exists() and (installed := find_installed(str(path))):
        path = installed.path
    if path.is_dir():
        weights = next((path / name for name in HUB_FILES if (path / name).is_file()), None)
        if weights is None or not (path / HUB_CONFIG).is_file():
            raise CheckpointError(_not_a_hub_folder(path))
        return weights
    if not path.exists():
        raise CheckpointError(_no_such_file(path))
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: no permission to read it")
    return path


def _not_a_hub_folder(folder: Path) -> str:
    """Returns what to say about a folder that was given for a weight file: which file in it may be meant."""
    if (folder / BEST).is_file():
        return f"{folder} is a run folder; give the weight file in it: {folder / BEST}"
    if (folder / BEST.name).is_file():
        return f"{folder} is a folder; give the weight file in it: {folder / BEST.name}"
    runs = sorted(folder.glob(f"*/{BEST}"))
    if runs:
        return f"{folder} holds run folders; give the weight file of one: {shorten(runs, 5)}"
    steps = sorted(folder.glob("step_*.pt")) or sorted((folder / BEST.parent).glob("step_*.pt"))
    files = steps[-1:] or sorted(file for file in folder.iterdir() if file.name.endswith(WEIGHT_ENDINGS))
    if files:
        return f"{folder} is a folder; give a weight file in it: {shorten(files, 5)}{NOT_UNPACKED}"
    return (
        f"{folder} is a folder without {HUB_CONFIG} and {HUB_FILES[0]}, so not in timm's layout; give a weight "
        f"file{NOT_UNPACKED}"
    )


def _no_such_file(path: Path) -> str:
    """Returns what to say about a path where nothing is: which file or which installed weights may be meant."""
    own, _, tag = str(path).partition(".")
    if own in list_variants() and not path.name.endswith(WEIGHT_ENDINGS):
        installed = _installed_names()
        if hint := closest(path, installed):
            return f"{path}: no such file, nor installed weights of that name{hint}"
        tags = [source.tag for source in variant(own).pretrained]
        if not tag or tag in tags:
            name = f"{own}.{tag or next(iter(tags), 'TAG')}"
            return (
                f"{path}: no such file, and no weights of that name are installed; install them once: "
                f"python scripts/convert.py FILE --install {name}"
            )
        return f"{path}: no such file, nor installed weights of that name; installed: {shorten(installed) or 'nothing'}"
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    siblings = [file.name for file in beside if file.name.endswith(WEIGHT_ENDINGS)]
    names = [*siblings, *_installed_names()] if path.parent == Path(".") else siblings
    return f"{path}: no such file{closest(path.name, names)}"


def _installed_names() -> list[str]:
    return [found.name for found in (*list_installed(), *list_shipped())]


def _read_hub_config(path: Path) -> dict[str, Any]:
    try:
        return read_hub_config(path)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: {e}; correct it, or get the file anew") from None
