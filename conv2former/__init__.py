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
    load_weights,
    register_variant,
    variant,
)
from .models.restore import restore as _restore
from .weights.description import task_noted as _task_noted
from .weights.reading import read_checkpoint as _read_checkpoint

__version__ = "0.1.0"


def load_model(
    path: str | _PathLike[str], use_ema: bool = True, expect: str | _PathLike[str] | None = None
) -> tuple[_Any, CheckpointInfo]:
    """Builds the network that a weight file holds, with its weights, in evaluation mode.

    Args:
        path: a file in any known layout, or a folder in timm's hub layout; see `read_checkpoint`.
        use_ema: take the averaged weights where the file has them.
        expect: the name of a variant, or its YAML file, that the network must be; None for whatever it is. Or the name
            of another network, `timm/NAME`: what a file is that does not say so.

    Returns:
        The network, and what the file says about itself. Of a classifier it is a `Conv2Former` or that of timm's
        registry which the file notes, whose `pretrained_cfg` has the file's preprocessing where timm looks for it; of a
        Conv2Former's weights without a head it has none either, and gives the last stage's features, pooled. Of a
        checkpoint of `task: segmentation` it gives logits for every pixel.

    Raises:
        CheckpointError: the file cannot be read, holds code, is not a whole network, or another than expected.
        ConfigError: there is no variant of the expected name.
        ImportError: a package is not installed that the task needs and a classifier does not.
    """
    content, path, expect = _read_checkpoint(str(path)), str(path), None if expect is None else str(expect)
    if _task_noted(content) == "classification":
        return _restore(content, path, use_ema, expect)
    registry = _import_module("conv2former.tasks.registry")  # only now: the zoo needs less
    return registry.task_of(content, path).restore(content, path, use_ema, expect)


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
