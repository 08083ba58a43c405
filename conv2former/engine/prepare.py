"""All that can be wrong with a run, found before its processes meet: nothing hangs, and the message comes once."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from torch import nn

from .._preprocessing import FIELDS
from .._yaml import dump_yaml
from ..config import BaseConfig, Plan, differences, fit_batch, load_config, make_plan, override_config
from ..config.auto import is_auto, value_at, with_values
from ..config.registry import config_class
from ..config.resolve import fit_auto, is_noted
from ..data import StreamSource
from ..errors import ConfigError, DataError, OutputError, before_processes_meet, bullets, shorten
from ..tasks.registry import find_task
from ..tasks.task import Split, Task
from .build import check_names, fit_memory_format
from .checkpoint import latest_checkpoint, read_training_checkpoint, remove_leftovers
from .distributed import World
from .images import fill_images, settle_images
from .logging import writing
from .saved import forget_best

__all__ = ["Job", "as_config", "changed_keys", "prepare"]

# What may differ between a run and its continuation: what changes nothing that is trained, and the division of the
# global batch, which the plan guards and other numbers of devices need.
_HARMLESS = (
    "data.root",
    "data.cache",
    "data.workers",
    "log",
    "checkpoint",
    "train.eval_batch_size",
    "train.batch_size",
    "train.accum_steps",
    "train.cuda_graph",
    "train.early_stop",
    "train.fitted",
    "train.timeout_minutes",
)


def changed_keys(noted: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str] = ()) -> list[str]:
    """Returns `dotted.key: old -> new` for all that makes a configuration another run than the one that noted it.

    Args:
        noted: in the run folder or a checkpoint, perhaps by another version.
        now: the configuration, as plain types, with what it leaves open of the images filled in.
        allowed: keys that may differ, besides those that change nothing.
    """
    # a key, or a section, that this version has and that one had not is at its default, which is what was done then
    kind = config_class(now)
    defaults = fill_images(kind.model_validate({})).to_dict()
    before = {key: {**defaults.get(key, {}), **noted.get(key, {})} for key in {**defaults, **noted} if key != "task"}
    before["task"] = noted.get("task", "classification")  # earlier versions had no other
    now = with_values(now, {key: value_at(before, key) for key in kind.auto_keys if _is_found_again(before, now, key)})
    # earlier versions noted of every task what classification alone uses
    useless = [f"data.{key}" for key in {*FIELDS} - {*kind.model_validate(now).image_fields}]
    # the fingerprint is of the data, no setting
    allowed = (*_HARMLESS, "data.holdout_sha256", *useless, *allowed)
    return [
        line for line in differences(before, now) if not any(line.startswith((f"{key}:", f"{key}.")) for key in allowed)
    ]


def _is_found_again(noted: Mapping[str, Any], now: Mapping[str, Any], key: str) -> bool:
    """Returns whether a key is `auto` now, and was when the run was started, whose value it then has."""
    return is_auto(value_at(now, key)) and is_noted(noted, key)


@dataclass
class Job:
    """A run that is known to be right, as far as that can be known before it starts.

    Attributes:
        saved: the checkpoint to go on from, or None.
        started_from: the path given as `resume`, if the run began with one.
        plan_of_data: what a continuation must have the same.
        notes: lines to print.
        lock: held as long as the run writes into its folder; None on other processes than the main one.
    """

    config: BaseConfig
    output: Path
    plan: Plan
    train_source: Split
    val_source: Split
    model: nn.Module
    saved: dict[str, Any] | None
    started_from: str | None
    plan_of_data: dict[str, int]
    notes: list[str]
    lock: TextIO | None

    @property
    def class_names(self) -> list[str]:
        """Names in index order."""
        return self.train_source.class_names

    @property
    def task(self) -> Task:
        """What is trained for."""
        return find_task(self.config)


def as_config(config: BaseConfig | Mapping[str, Any] | str | Path) -> BaseConfig:
    """Returns a checked configuration from one, from plain types, or from a YAML file.

    Raises:
        ConfigError: it has mistakes.
    """
    if isinstance(config, BaseConfig):
        return config
    return load_config(config) if isinstance(config, (str, os.PathLike)) else override_config(config, {})


def prepare(config: BaseConfig, output: Path, resume: str, world: World) -> Job:
    """Opens the data, builds the network and finds the checkpoint to go on from; talks to no other process.

    Args:
        config: the run.
        output: the run folder.
        resume: as for `train`.
        world: this process; every one does this.

    Raises:
        UserError: a mistake in the configuration, the data, the checkpoint or the output folder. Its `scope` says that
            every process of the machine has the same.
    """
    with before_processes_meet():
        return _prepare(config, output, resume, world)


def _prepare(config: BaseConfig, output: Path, resume: str, world: World) -> Job:
    check_names(config, world.device)
    config, about_images = settle_images(config)
    _check_output(output)
    task = find_task(config)
    task.check_output(config, output)
    train_source, val_source = task.open_data(config)
    given, config = config, fit_batch(config, world.size, len(train_source))
    config = task.settle_data(config, train_source, val_source)
    with ExitStack() as stack:  # an error lets go of the lock, although a notebook keeps the exception and its frames
        lock = stack.enter_context(_lock(output)) if world.is_main and output.is_dir() else None
        saved, started_from, notes = _find_checkpoint(output, resume)
        if saved:
            _check_task(config, saved)
        config, about_auto = fit_auto(config, world.size, len(train_source), saved["config"] if saved else None)
        plan = make_plan(config, world.size, len(train_source))
        model = task.build_model(config, len(train_source.class_names), train_source.class_names)
        config, about_memory = fit_memory_format(config, model, world.device)
        notes += [note for source in (train_source, val_source) if (note := getattr(source, "note", ""))]
        if world.is_main:
            notes += _smaller_batch(given, config, len(train_source))
            notes += [*task.notes(config, train_source, val_source, output), *about_images, *about_auto, *about_memory]
        plan_of_data = {
            "images": len(train_source),
            "global_batch_size": plan.global_batch_size,
            "steps_per_epoch": plan.steps_per_epoch,
        }
        if isinstance(train_source, StreamSource):
            plan_of_data["devices"] = world.size  # a stream's order depends on them
        if saved:
            _check_continuation(config, saved, train_source.class_names, plan_of_data)
        if world.is_main:
            with writing(output):
                output.mkdir(parents=True, exist_ok=True)
                (output / "config.yaml").write_text(dump_yaml(config.to_dict()))
                task.write_split(config, train_source, val_source, output)
            lock = lock or stack.enter_context(_lock(output))
            remove_leftovers(output / "checkpoints")
        stack.pop_all()  # the lock is the job's
    return Job(config, output, plan, train_source, val_source, model, saved, started_from, plan_of_data, notes, lock)


def _smaller_batch(given: BaseConfig, config: BaseConfig, images: int) -> list[str]:
    """Returns a line about a batch that is not as it was given."""
    train, before = config.train, given.train
    keys = [key for key in ("batch_size", "accum_steps") if getattr(train, key) != getattr(before, key)]
    if not keys:
        return []
    changes = ", ".join(f"train.{key} {getattr(before, key)} -> {getattr(train, key)}" for key in keys)
    return [f"{images} training images are fewer than a global batch: {changes}, and the rate follows"]


def _check_output(output: Path) -> None:
    """Checks that the run folder can be written, without making it."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise OutputError(f"{output}: cannot be written ({existing} is a file); choose another --output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: cannot be written (no permission in {existing}); choose another --output")


def _lock(output: Path, patience: float = 20.0) -> TextIO:
    """Keeps others from training into the same folder; the operating system lets go when this process ends.

    The processes of a run that was just killed may need some seconds to go.
    """
    with writing(output):
        file = (output / ".lock").open("w")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{output}: another process is training into this folder; stop it or choose another --output"
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return file


def _find_checkpoint(output: Path, resume: str) -> tuple[dict[str, Any] | None, str | None, list[str]]:
    """Returns the checkpoint to go on from, or None, the path that the run began with, and lines about it."""
    found = latest_checkpoint(output / "checkpoints")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if found:
        path, saved, warnings = found
        if resume == "auto" or restarted or saved.get("started_from") == str(Path(resume).resolve()):
            return saved, saved.get("started_from"), [*warnings, f"going on from {path}"]
        raise ConfigError(f"{output} holds a run; choose another --output, or --resume auto to go on with it")
    if resume in ("auto", "never"):
        return None, None, []
    saved = read_training_checkpoint(Path(resume))
    # the best of this folder is yet to come
    forget_best(saved)
    saved["history"] = []
    return saved, str(Path(resume).resolve()), [f"going on from {resume}"]


def _check_task(config: BaseConfig, saved: dict[str, Any]) -> None:
    """Checks that a checkpoint is of the configuration's task; raises a ConfigError."""
    if (task := saved["config"].get("task", "classification")) != config.task:  # earlier versions had no other
        raise ConfigError(f"the run to go on with is of the task {task}, not {config.task}; choose another --output")


def _check_continuation(
    config: BaseConfig, saved: dict[str, Any], class_names: list[str], plan_of_data: dict[str, int]
) -> None:
    """Checks that a run goes on as it was, but for what changes nothing and what is allowed.

    Raises:
        ConfigError: lists the keys that differ.
        DataError: the classes differ.
    """
    now, noted = config.to_dict(), saved["config"]
    # a run that goes on is past the probe, and earlier versions had none
    changed = changed_keys(noted, now, ("train.linear_probe", *config.checkpoint.allow_changes))
    if changed:
        raise ConfigError(
            "this run was started with another configuration; start a new one with another --output, undo the change, "
            "or allow it (checkpoint.allow_changes=[KEY, ...]):",
            *bullets(changed),
        )
    if noted.get("data", {}).get("holdout_sha256") != now["data"].get("holdout_sha256"):
        raise DataError(
            "the images have changed since this run was started: other ones would be held out for validation (which "
            "were is in its split.csv); put them back, or start a new run with another --output"
        )
    if saved["class_names"] != class_names and sorted(saved["class_names"]) == sorted(class_names):
        raise DataError(
            f"the data set's classes are in another order than when this run was started, {shorten(class_names, 5)} "
            f"instead of {shorten(saved['class_names'], 5)}; to go on, list them in that order, one a line, in a file: "
            "data.class_names=FILE checkpoint.allow_changes=[data.class_names]"
        )
    if saved["class_names"] != class_names:
        raise DataError("the data set's classes have changed since this run was started; start a new run")
    changed = differences(saved["plan"], plan_of_data)
    if changed:
        raise ConfigError(
            "this run was started with other data or another number of devices; an epoch must have the same global "
            "batches, so adjust train.batch_size or train.accum_steps, or start a new run:",
            *bullets(changed),
        )
