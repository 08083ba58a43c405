"""Training from Python as the script does it: `conv2former.train`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._configs import find_config
from ..config import Config, load_config, override_config
from ..engine.trainer import train
from ..errors import before_processes_meet
from .recipes import run_name

__all__ = ["train_config"]


def train_config(
    config: Config | Mapping[str, Any] | str | os.PathLike[str],
    overrides: Mapping[str, Any] | None,
    output: str | os.PathLike[str] | None,
    resume: str,
) -> dict[str, Any]:
    """Trains by a configuration with overrides; see `conv2former.train`."""
    with before_processes_meet():
        if isinstance(config, (str, os.PathLike)):
            path = Path(config)
            checked = load_config(path, overrides or {})
            output = output or Path("runs") / run_name(find_config(path))
        else:
            checked = override_config(config, overrides or {})
    return train(checked, Path(output) if output else None, resume)
