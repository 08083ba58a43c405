"""Lines that say what a run will do: its network, batch, rate and length, its images."""

from __future__ import annotations

from collections.abc import Mapping

from .._preprocessing import size_text
from ..config import BaseConfig, Plan
from ..errors import counted
from ..tasks.network import describe_network
from .kernels_used import changed_kernels
from .prepare import Job

__all__ = ["describe", "describe_job", "length_of"]


def describe_job(job: Job, world_size: int, kernels: Mapping[str, str], first_kernels: Mapping[str, str]) -> list[str]:
    """Returns the lines with which a run begins.

    Args:
        job: the run.
        world_size: how many processes there are.
        kernels: what computes it, see kernels_used.py.
        first_kernels: what computed its first step.
    """
    lines = [*job.notes, *describe(job.config, job.plan, world_size)]
    lines.append(f"kernels: {', '.join(f'{name} {text}' for name, text in kernels.items())}")
    if warning := changed_kernels(first_kernels, kernels):
        lines.append(warning)
    train, val = job.train_source, job.val_source
    classes = f" of {counted(len(job.class_names), 'class', 'classes')}" if job.class_names else ""
    lines.append(
        f"training on {counted(len(train), 'image')}{classes} ({train.name}), "
        f"validating on {f'{len(val)} ' if len(val) else ''}({val.name})"
    )
    return lines + job.task.about_data(job.config, train, val)


def describe(config: BaseConfig, plan: Plan, world_size: int) -> list[str]:
    """Returns lines that say what will be trained and how: network, batch and rate, length."""
    frozen = "" if config.model.freeze == "nothing" else f", frozen up to {config.model.freeze}"
    schedule = config.schedule
    size = f", {size_text(config.data.preprocessing.size)}" if "img_size" in config.image_fields else ""
    return [
        f"{describe_network(config)}{size}{frozen}",
        f"global batch {plan.global_batch_size} = {config.train.batch_size} per device x "
        f"{counted(world_size, 'device')} x {counted(config.train.accum_steps, 'accumulation step')}",
        f"learning rate {plan.lr:.3g} = {config.optim.base_lr:g} x {plan.global_batch_size} / "
        f"{config.optim.base_batch_size}, {config.optim.opt}{_about_decay(config)}",
        f"{counted(plan.epochs, 'epoch')} ({schedule.warmup_epochs} warm-up, {schedule.cooldown_epochs} cool-down) of "
        f"{counted(plan.steps_per_epoch, 'step')}{_sum_of_epochs(config)}",
    ]


def _about_decay(config: BaseConfig) -> str:
    """Returns how the rate falls, if not as a cosine."""
    schedule = config.schedule
    epochs = ", ".join(f"{epoch:g}" for epoch in schedule.milestones)
    return {
        "cosine": "",
        "linear": f", in a straight line to {schedule.min_lr:g}",
        "multistep": f", times {schedule.gamma:g} after epochs {epochs}",
    }[schedule.decay]


def length_of(config: BaseConfig, plan: Plan) -> str:
    """Returns a line on how long a run is whose images have not been counted."""
    return f"{counted(plan.epochs, 'epoch')}{_sum_of_epochs(config)}; the number of steps follows from the data"


def _sum_of_epochs(config: BaseConfig) -> str:
    """Returns where the number of epochs comes from, if not from `schedule.epochs` alone."""
    schedule = config.schedule
    if not schedule.cooldown_epochs:
        return ""
    return f": schedule.epochs {schedule.epochs} + schedule.cooldown_epochs {schedule.cooldown_epochs}"
