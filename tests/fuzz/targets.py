"""What reads files, each as a function that writes a hostile file into an empty folder and returns what reads it.

`prepare` writes, once, what they damage. What a target returns may come back, or raise a UserError or TrainingError;
all else is a find. It returns a text if what it read is silently wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from .common import Call, prepare
from .data_targets import configs, folders, hub_configs, images, names, parquet, tables, tars
from .detection_targets import objects
from .run_targets import checkpoints, compiled_libraries, resuming, run_folders, weights

__all__ = ["TARGETS", "prepare"]

FUNCTIONS = (
    weights,
    checkpoints,
    resuming,
    run_folders,
    compiled_libraries,
    configs,
    tables,
    tars,
    folders,
    names,
    parquet,
    images,
    hub_configs,
    objects,
)
TARGETS: dict[str, Callable[[random.Random, Path, Path], Call]] = {
    function.__name__: function for function in FUNCTIONS
}
