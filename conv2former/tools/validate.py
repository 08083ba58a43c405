"""Evaluates a weight file on a validation split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Config, apply_overrides, check_config, load_config
from ..data import DataSource, StreamSource, batches, eval_loader, open_val
from ..engine.build import autocast_for
from ..engine.distributed import World, join_world
from ..engine.evaluate import evaluate
from ..errors import CheckpointError, ConfigError, DataError, before_processes_meet, shorten
from ..models import CheckpointInfo, Conv2Former, inspect_checkpoint, load_weights

__all__ = ["validate"]


def validate(
    checkpoint: Path, config: Path | None = None, overrides: Sequence[str] = (), use_ema: bool = True
) -> dict[str, Any]:
    """Evaluates a weight file; under torchrun every process calls it.

    Args:
        checkpoint: a file in this project's, the authors' or birder's layout.
        config: a configuration whose data section to use; None for the one in the file, if it has one.
        overrides: changes to it, `data.root=...`.
        use_ema: evaluate the averaged weights where the file has them.

    Returns:
        `top1`, `top5`, `loss` and `n`, as `evaluate`; `variant`, `weights`, `data` and `precision`, what was evaluated;
        `skipped`, a sentence for each unreadable image.

    Raises:
        UserError: the file, the configuration or the data is wrong, or they do not go together.
    """
    with before_processes_meet():
        world, settings, source, model, info = _prepare(checkpoint, config, overrides, use_ema)
    train = settings.train
    precision, autocast = autocast_for(train.precision, world.device)
    batch_size = train.eval_batch_size or train.batch_size
    with join_world(world, train.timeout_minutes) as world:
        loader = eval_loader(source, settings.data, batch_size, world.rank, world.size, world.device.type == "cuda")
        result = evaluate(model.to(world.device), batches(loader), world, autocast, train.channels_last)
        assert result is not None
        skipped = [item for items in world.gather(result.skipped) for item in items]
    total = result.metrics["n"] + len(skipped)
    if len(skipped) > settings.data.max_skipped * total or not result.metrics["n"]:
        raise DataError(
            f"{len(skipped)} of {total} images cannot be read, more than data.max_skipped = "
            f"{settings.data.max_skipped:g} allows: {shorten((item.name for item in skipped), 5)}"
        )
    return {
        "variant": info.name or "unnamed variant",
        "weights": "average" if info.has_ema and use_ema else "raw",
        "data": source.name,
        "precision": precision,
        "skipped": [item.reason for item in skipped],
        **result.metrics,
    }


def _prepare(
    checkpoint: Path, config: Path | None, overrides: Sequence[str], use_ema: bool
) -> tuple[World, Config, DataSource | StreamSource, Conv2Former, CheckpointInfo]:
    """Does all that can be a mistake, before the processes meet."""
    world = World.from_environment()
    info = inspect_checkpoint(checkpoint)
    settings = _settings(info, config, overrides)
    source = open_val(settings.data, info.class_names)
    if len(source.class_names) != info.num_classes:
        raise DataError(
            f"{source.name} has {len(source.class_names)} classes, {checkpoint} is for {info.num_classes}: "
            "they do not belong together"
        )
    model = _build(info)
    load_weights(model, checkpoint, use_ema)
    return world, settings, source, model, info


def _settings(info: CheckpointInfo, path: Path | None, overrides: Sequence[str]) -> Config:
    """Returns the configuration to evaluate under: the file's own, or the given one, with overrides."""
    ignored = sorted(apply_overrides({}, overrides).keys() - {"data", "train"})
    if ignored:
        raise ConfigError(f"{', '.join(ignored)}: has no effect here; data and train can be changed")
    if path is not None:
        return load_config(path, overrides)
    # a recipe without sections is that of another training script, the authors' or timm's
    own = info.recipe if all(isinstance(section, dict) for section in info.recipe.values()) else {}
    return check_config(apply_overrides(own, overrides), "the checkpoint's configuration")


def _build(info: CheckpointInfo) -> Conv2Former:
    """Builds the network that the file's tensors describe, whether or not it is a registered variant."""
    if len(info.dims) != 4 or not info.head_hidden_size or not info.num_classes:
        raise CheckpointError("the file holds a part of a network; to evaluate it needs all four stages and the head")
    if info.in_chans != 3:
        raise CheckpointError(f"the network in the file takes images of {info.in_chans} channels; here they have 3")
    return Conv2Former(
        in_chans=info.in_chans,
        num_classes=info.num_classes,
        dims=info.dims,
        depths=info.depths,
        kernel_size=info.kernel_size,
        mlp_ratio=info.mlp_ratio,
        head_hidden_size=info.head_hidden_size,
        fusion=info.fusion,
        ls_init_value=1e-6 if info.layer_scale else None,
    )
