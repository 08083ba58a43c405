"""A run without its data: everything is built, and one step is done on synthetic images."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import BaseConfig, fit_auto, fit_batch, make_plan
from ..errors import before_processes_meet, counted
from ..tasks.network import name_network
from ..tasks.registry import find_task
from .build import build_run, check_names, fit_memory_format
from .distributed import World, join_world
from .images import settle_images
from .prepare import as_config
from .step import FiniteCheck, train_step
from .summary import describe, length_of

__all__ = ["dry_run"]


def dry_run(config: BaseConfig | Mapping[str, Any] | str | Path) -> list[str]:
    """Builds everything and trains on one synthetic batch, without looking at the data if the class count is given.

    On a CPU the batch is of two images, because it is only to show that the step works; on a GPU it is of the
    configured size, so that the memory is known.

    Returns:
        Lines to print: what would be trained, parameters, and the step's loss and time.

    Raises:
        UserError: a mistake in the configuration.
    """
    with before_processes_meet():
        config = name_network(as_config(config))
        world = World.from_environment()
        check_names(config, world.device)
        config, about_images = settle_images(config)
    task = find_task(config)
    num_classes = task.known_classes(config)
    num_images = class_names = None
    if num_classes is None:
        source, _ = task.open_data(config)
        class_names, num_images = source.class_names, len(source)
        num_classes = len(class_names)
        config = fit_batch(config, world.size, num_images)
    config, about_auto = fit_auto(config, world.size, num_images)
    global_batch_size = config.train.batch_size * config.train.accum_steps * world.size
    plan = make_plan(config, world.size, num_images or global_batch_size)
    model = task.build_model(config, num_classes, class_names)
    config, about_memory = fit_memory_format(config, model, world.device)
    batch_size = config.train.batch_size if world.device.type == "cuda" else 2
    batch = task.synthetic_batch(config, num_classes, batch_size, torch.Generator().manual_seed(config.train.seed))
    with join_world(world, config.train.timeout_minutes) as world:
        run = build_run(config, plan, world, model)
        start = time.perf_counter()
        check = FiniteCheck.of(run)
        try:
            result = train_step(run, [batch] * config.train.accum_steps, 0, check)
            loss = float(result.loss)  # waits for the device
            check.read()
        finally:
            run.release()
        seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lines = describe(config, plan, world.size)
    if num_images is None:
        lines[-1] = length_of(config, plan)
    classes = f", {num_classes} {'class' if num_classes == 1 else 'classes'}" if num_classes else ""
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if world.device.type == "cuda" else ""
    return [
        *about_images,
        *about_auto,
        *about_memory,
        *lines,
        *filter(None, [run.about_graphs]),
        f"{parameters:,} parameters{f', {trained:,} of them trained' if trained < parameters else ''}{classes}",
        f"one step on {counted(batch_size, 'random image')}: loss {loss:.4f}, gradient norm "
        f"{float(result.grad_norm):.3g}, {seconds:.1f} s{memory}",
    ]
