"""What the evaluation of a checkpoint needs: all that can be a mistake is found here, before an image is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ... import _private
from ..._preprocessing import FIELDS
from ...config import Config
from ...config.schema import DataConfig
from ...data import DataSource, StreamSource, open_val
from ...data.classes import match_classes, order_in_doubt
from ...data.real_labels import real_labels
from ...errors import CheckpointError, ConfigError, DataError, counted, shorten
from ...models import CheckpointInfo, load_model
from ...models.others import check_size
from ...models.restore import restore
from ...weights.preprocessing import Preprocessing
from ..prediction.predict import check_channels
from .files import Extras
from .settings import EvaluationOptions, class_names_for, preprocessings_for, settings_for

__all__ = ["AMONG", "MAX_COUNTED_CLASSES", "Task", "prepare_task", "prepare_tasks", "present_classes"]

AMONG = ("all", "present")
MAX_COUNTED_CLASSES = 5_000  # whose confusions fit the memory: 200 MB

Source = DataSource | StreamSource


@dataclass
class Task:
    """A checkpoint, and what its evaluation needs.

    Attributes:
        views: the preprocessings, by what they are called.
        changed: the keys of the preprocessing that were given on the command line or in a configuration.
        among: indices of the network's classes that are scored; None for all.
        class_names: of the scored classes, in that order.
        real: ReaL labels of every image, (images, most labels of one), filled up with -1; None if not asked for.
    """

    path: Path
    info: CheckpointInfo
    settings: Config
    source: Source
    views: dict[str, Preprocessing]
    changed: list[str]
    class_names: list[str]
    model: nn.Module | None
    among: list[int] | None = None
    real: torch.Tensor | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def data(self) -> DataConfig:
        return self.settings.data


def prepare_tasks(
    checkpoints: Sequence[str | Path], options: EvaluationOptions, contents: list[dict[str, Any]] | None = None
) -> list[Task]:
    """Does all that can be a mistake, before the processes meet; `contents` as in `validate.validate_files`."""
    opened: dict[str, Source] = {}
    tasks = []
    for checkpoint in checkpoints:
        try:
            tasks.append(prepare_task(Path(checkpoint), options, opened, len(checkpoints) == 1, contents))
        except DataError as e:
            if len(checkpoints) == 1:
                raise
            raise e.below(checkpoint) from None
    return tasks


def prepare_task(
    path: Path,
    options: EvaluationOptions,
    opened: dict[str, Source],
    keep: bool,
    contents: list[dict[str, Any]] | None = None,
) -> Task:
    """Checks one checkpoint and opens its data.

    Args:
        path: the checkpoint.
        options: how to evaluate it.
        opened: the data of those before, so that it is looked through once.
        keep: the network; without it it is built to be checked, and again when its turn comes, to hold only one.
        contents: of the checkpoint, where it has been read already; taken out of the list.

    Raises:
        UserError: the file, the configuration or the data is wrong, or they do not go together.
    """
    load = partial(restore, contents.pop()) if contents else load_model
    model, info = load(path, options.use_ema, options.model)
    del load  # with the content, of which the optimizer's state may be most
    if not info.num_classes:
        raise CheckpointError(f"{path} has no classifier, so there is nothing to evaluate")
    check_channels(path, info.in_chans)
    settings = settings_for(info, path, options)
    views, changed = preprocessings_for(info, settings, options)
    for view in views.values():
        check_size(model, path, view.size, info.in_chans)
    names = class_names_for(info, path, settings.data, options)
    notes = []
    where = json.dumps([settings.data.model_dump(mode="json", exclude=set(FIELDS)), names])
    if where not in opened:
        opened[where] = open_val(settings.data, names)
    source = opened[where]
    if names is None:
        if len(source.class_names) != info.num_classes:
            raise DataError(
                f"{source.name} has {counted(len(source.class_names), 'class', 'classes')}, {path} is for "
                f"{info.num_classes}: they do not belong together"
            )
        notes.append(
            f"the file does not name its classes: they are taken to be those of {source.name} in order, "
            f"{shorten(source.class_names, 5)}"
        )
        if doubt := order_in_doubt(source.class_names):
            notes.append(doubt)
    if isinstance(source, DataSource) and source.note:
        notes.append(source.note)
    own = info.recipe.get("data") if options.data is not None else None
    if isinstance(own, dict) and Path(str(own.get("root"))).resolve() == Path(settings.data.root).resolve():
        notes.append(f"{path} was trained on images of {own['root']}; without --data it is evaluated on the others")
    unsaid = [key for key in ("mean", "std", "crop_pct") if key not in {*info.preprocessing_noted, *changed}]
    if unsaid and "checkpoint" in views:
        notes.append(f"{path} does not say its {', '.join(unsaid)}: --preprocessing both compares the two likely ones")
    kept = model if keep else None
    task = Task(path, info, settings, source, views, changed, source.class_names, kept, notes=notes)
    _choose_classes(task, options.among)
    _check_extras(task, options.extras)
    return task


def _choose_classes(task: Task, among: str | None) -> None:
    """Decides among which of the network's classes the answer is sought."""
    if among not in (None, *AMONG):
        raise ConfigError(f"among '{among}': expected {' or '.join(AMONG)}")
    if isinstance(task.source, StreamSource):
        if among == "present":
            raise DataError(f"{task.source.name} is a stream: which classes are present is not known before its end")
        return
    present = present_classes(task.source)
    subset = _subset_of(present, task.class_names) if among is None else None
    if subset:
        task.notes.append(f"{subset}: scored among its {len(present)} classes, as published (--among all for all)")
    if (subset or among == "present") and len(present) < len(task.class_names):
        task.among = present
        task.class_names = [task.class_names[i] for i in present]


def present_classes(source: DataSource) -> list[int]:
    """Returns the indices of the classes that images of a data set have, rising."""
    return [int(label) for label in np.unique(source.images.labels) if label >= 0]


def _subset_of(present: Sequence[int], class_names: Sequence[str]) -> str | None:
    """Returns 'ImageNet-A' or 'ImageNet-R' if the classes of a data set are just theirs."""
    if len(class_names) < 1000 or len(present) != 200:
        return None
    for name, file in (("ImageNet-A", "imagenet_a_synsets.txt"), ("ImageNet-R", "imagenet_r_synsets.txt")):
        synsets = (_private.imagenet_file(file) or "").split()
        try:
            if sorted(match_classes(synsets, class_names, name)) == list(present):
                return name
        except DataError:  # the network's classes are not ImageNet's
            return None
    return None


def _check_extras(task: Task, extras: Extras) -> None:
    """Checks what is asked for, and looks up the ReaL labels."""
    classes = len(task.class_names)
    if extras.confusion and classes > MAX_COUNTED_CLASSES:
        raise ConfigError(
            f"--confusion: {task.path} has {classes:,} classes, too many to count every pair; leave it out, or add "
            "--among present"
        )
    if (extras.worst or extras.real) and isinstance(task.source, StreamSource):
        option = "--worst" if extras.worst else "--real"
        raise DataError(
            f"{option}: {task.source.name} is a stream, whose images have no names; leave out data.streaming"
        )
    if extras.real:
        assert isinstance(task.source, DataSource)
        names = task.source.class_names
        place = {label: i for i, label in enumerate(task.among)} if task.among else {i: i for i in range(len(names))}
        labels = [[place[i] for i in found if i in place] for found in real_labels(task.source, names)]
        task.real = torch.full((len(labels), max(1, *map(len, labels))), -1)
        for row, found in zip(task.real, labels, strict=True):
            row[: len(found)] = torch.tensor(found, dtype=torch.int64)
