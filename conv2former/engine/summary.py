"""Lines that say what a run will do: its network, batch, rate and length, its images and their classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from .._preprocessing import size_text
from ..config import Config, Plan
from ..errors import counted, shorten
from .evaluate import SMALL_SPLIT, one_image
from .kernels_used import changed_kernels
from .network import describe_network
from .prepare import Job

__all__ = ["describe", "describe_classes", "describe_job", "length_of"]

IMBALANCED = 3  # times as many images of one class as of another: worth a hint


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
    lines.append(
        f"training on {counted(len(train), 'image')} of {counted(len(train.class_names), 'class', 'classes')} "
        f"({train.name}), validating on {f'{len(val)} ' if len(val) else ''}({val.name})"
    )
    if 0 < len(val) < SMALL_SPLIT:  # of a stream the length is not known
        # without the word error, for which people search their logs
        lines.append(f"validation: {one_image(len(val))} of top-1; ± is one standard deviation, sqrt(p (1 - p) / n)")
    if job.class_counts is not None:
        lines.append(describe_classes(job.config, job.class_counts, job.class_names))
    return lines


def describe(config: Config, plan: Plan, world_size: int) -> list[str]:
    """Returns lines that say what will be trained and how: network, batch and rate, length."""
    frozen = "" if config.model.freeze == "nothing" else f", frozen up to {config.model.freeze}"
    schedule, size = config.schedule, size_text(config.data.preprocessing.size)
    return [
        f"{describe_network(config)}, {size}{frozen}",
        f"global batch {plan.global_batch_size} = {config.train.batch_size} per device x "
        f"{counted(world_size, 'device')} x {counted(config.train.accum_steps, 'accumulation step')}",
        f"learning rate {plan.lr:.3g} = {config.optim.base_lr:g} x {plan.global_batch_size} / "
        f"{config.optim.base_batch_size}, {config.optim.opt}",
        f"{counted(plan.epochs, 'epoch')} ({schedule.warmup_epochs} warm-up, {schedule.cooldown_epochs} cool-down) of "
        f"{counted(plan.steps_per_epoch, 'step')}{_sum_of_epochs(config)}",
    ]


def length_of(config: Config, plan: Plan) -> str:
    """Returns a line on how long a run is whose images have not been counted."""
    return f"{counted(plan.epochs, 'epoch')}{_sum_of_epochs(config)}; the number of steps follows from the data"


def _sum_of_epochs(config: Config) -> str:
    """Returns where the number of epochs comes from, if not from `schedule.epochs` alone."""
    schedule = config.schedule
    if not schedule.cooldown_epochs:
        return ""
    return f": schedule.epochs {schedule.epochs} + schedule.cooldown_epochs {schedule.cooldown_epochs}"


def describe_classes(config: Config, counts: np.ndarray, class_names: Sequence[str]) -> str:
    """Returns a line on how many training images the classes have, and what is done where they differ.

    Args:
        config: the run.
        counts: (classes,) training images.
        class_names: names in index order.
    """
    there = np.flatnonzero(counts)
    few, many = (int(there[choose(counts[there])]) for choose in (np.argmin, np.argmax))
    line = f"training images per class: {counts[few]:,}"
    if few != many:
        line += f" ({class_names[few]}) to {counts[many]:,} ({class_names[many]})"
    missing = [class_names[i] for i in np.flatnonzero(counts == 0).tolist()]
    if missing:
        line += f", none of {counted(len(missing), 'listed class', 'listed classes')}: {shorten(missing, 10)}"
    alike = [name for name, times in Counter(map(str.casefold, class_names)).items() if times > 1]
    if alike:
        line += f"; names that differ by capital letters only are several classes: {shorten(alike, 5)}"
    sampling, weights = config.data.sampling, config.train.class_weight
    if sampling != "uniform":
        what = "equally often" if sampling == "balanced" else "in proportion to the square root of that"
        return f"{line}; seen {what} (data.sampling)"
    if weights != "none":
        what = "that" if weights == "balanced" else "the square root of that"
        return f"{line}; weighted in the loss by one over {what} (train.class_weight)"
    if counts[many] > IMBALANCED * counts[few]:
        line += "; to learn the rare ones better try data.sampling=sqrt, or train.class_weight=sqrt"
    return line
