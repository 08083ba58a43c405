"""Conv2Former for timm: importing this package registers every variant.

import conv2former, timm
model = timm.create_model("conv2former_t")
"""

from __future__ import annotations

from collections.abc import Mapping as _Mapping
from importlib import import_module as _import_module
from os import PathLike as _PathLike
from typing import Any as _Any

from . import _clock  # noqa: F401 - first: it notes the time
from .errors import CheckpointError, ConfigError, DataError, UserError
from .inference import capture
from .models import (
    CheckpointInfo,
    Conv2Former,
    Conv2FormerBlock,
    ConvMlp,
    ConvMod,
    InstalledModel,
    Preprocessing,
    Variant,
    inspect_checkpoint,
    list_installed,
    list_variants,
    load_model,
    load_weights,
    register_variant,
    variant,
)

__version__ = "0.1.0"


def train(
    config: str | _PathLike[str] | _Mapping[str, _Any],
    overrides: _Mapping[str, _Any] | None = None,
    *,
    output: str | _PathLike[str] | None = None,
    resume: str = "auto",
) -> dict[str, _Any]:
    """Trains in this process as `scripts/train.py` does: the same files, checks, run folder and log.

    It needs `pip install "conv2former[train]"`, which is imported at the first call.

    Args:
        config: a YAML file, the name of a recipe, such as "finetune/folder", or a configuration as plain types.
        overrides: what is set otherwise, by dotted keys, `{"optim.base_lr": 1e-3}`, or nested,
            `{"optim": {"base_lr": 1e-3}}`. They win over the file.
        output: the run folder; None for `runs/NAME_OF_CONFIG`, or `runs/NAME_OF_MODEL` where `config` is no file.
        resume: "auto" goes on where the folder stopped, "never" refuses one with a run; or a checkpoint's path.

    Returns:
        The report, as in report.json: `folder`, `checkpoint`, the path of best.pt, its `top1`, `loss`, `macro_f1`,
        `balanced_accuracy`, `epoch` and `classes`, and more, see docs/python.md. Under torchrun it is empty but on the
        main process.

    Raises:
        UserError: a mistake in the configuration, the data, the checkpoint or the output folder.
        ImportError: a package that training needs is not installed.
        RuntimeError: the run had to stop, see docs/training.md.
    """
    module = _import_module("conv2former.tools.training")  # only now: the zoo needs less
    return module.train_config(config, overrides, output, resume)


__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "ConfigError",
    "Conv2Former",
    "Conv2FormerBlock",
    "ConvMlp",
    "ConvMod",
    "DataError",
    "InstalledModel",
    "Preprocessing",
    "UserError",
    "Variant",
    "capture",
    "inspect_checkpoint",
    "list_installed",
    "list_variants",
    "load_model",
    "load_weights",
    "register_variant",
    "train",
    "variant",
]
