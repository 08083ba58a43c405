"""Evaluates weight files on a validation split."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import _private
from ..._preprocessing import FIELDS
from ...config import Config, apply_overrides, check_config, load_config
from ...config.schema import DataConfig, TrainConfig
from ...data import DataSource, StreamSource, batches, eval_loader, open_val
from ...data.classes import class_names_of, match_classes, order_in_doubt
from ...data.loader import usable_cores
from ...data.real_labels import real_labels
from ...data.sources import VAL_NAMES, is_bare
from ...data.tables import TABLE_ENDINGS, read_class_list
from ...data.tars import COMPRESSED
from ...engine.build import autocast_for
from ...engine.distributed import World, join_world
from ...engine.evaluate import Evaluation, Score, evaluate_views, has_top5, shown, standard_error
from ...engine.skipped import SkippedImages
from ...engine.tallies import Calibration, PerClass, RealLabels, Tally, Worst
from ...errors import CheckpointError, ConfigError, DataError, before_processes_meet, counted, shorten
from ...models import CheckpointInfo, Conv2Former, load_model
from ...weights.preprocessing import Preprocessing, candidates
from ..prediction.predict import check_channels
from .files import NOT_FINITE, Extras, check_folder, folders_of, write_extras, write_results

__all__ = [
    "AMONG",
    "PREPROCESSINGS",
    "EvaluationOptions",
    "Extras",
    "Task",
    "prepare_task",
    "validate",
    "validate_files",
]

PREPROCESSINGS = ("checkpoint", "imagenet", "inception", "both")
AMONG = ("all", "present")
MAX_COUNTED_CLASSES = 5_000  # whose confusions fit the memory: 200 MB
DEFAULT_FOLDER = Path("runs/evaluation")

Source = DataSource | StreamSource
# of a checkpoint's own data section, what holds for other data too
_OF_ANY_DATA = {*FIELDS, "on_error", "max_skipped", "value_range", "max_image_pixels", "workers"}
_OF_TRAIN = {"batch_size", "eval_batch_size", "precision", "channels_last", "timeout_minutes"}
# of an evaluation's configuration nothing else is used, so that nothing else can be in conflict
_NEUTRAL = ("augment.mixup=0", "augment.cutmix=0", "augment.first_img_size=null")


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
    model: Conv2Former | None
    among: list[int] | None = None
    real: torch.Tensor | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def data(self) -> DataConfig:
        return self.settings.data


def validate(checkpoint: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """As `validate_files`, of one file under one preprocessing: its row."""
    return validate_files([checkpoint], *args, **kwargs)[0]


def validate_files(
    checkpoints: Sequence[str | Path],
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    use_ema: bool = True,
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    preprocessing: str | None = None,
    among: str | None = None,
    extras: Extras | None = None,
    output: str | Path | None = None,
    announce: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Evaluates weight files; under torchrun every process calls it. All are checked before the first is evaluated.

    Args:
        checkpoints: files in any known layout, or timm's `local-dir:FOLDER`.
        config: a configuration whose data section to use; None for the one in the file, if it has one.
        overrides: changes to it, `data.root=...`.
        use_ema: evaluate the averaged weights where a file has them.
        model: a variant, or its YAML file, that the network must be.
        data: in place of `data.root`; then where the data is, is not taken from the checkpoint.
        preprocessing: 'checkpoint', as the file notes it; 'imagenet' or 'inception', one of the two candidates for the
            authors' files; 'both' of these in one pass. None is 'checkpoint', or as `config` says. Overrides win.
        among: 'all' of the network's classes can be the answer, or only those 'present' in the data; None for all,
            but on ImageNet-A and -R their 200, as published.
        extras: what else to find out; it needs files.
        output: a folder for results.json, results.csv and those files; None for no files, or runs/evaluation if
            `extras` needs some.
        announce: called on the main process before the first image is read, with the rows as far as they are known:
            without metrics, and `n` is the number of images that there are.

    Returns:
        A row for each file and preprocessing, the same on all processes but for `files`, which only the main one has:
        `top1`, `top5` (None with five classes or fewer), `loss` and `n`, as `evaluate`; `top1_error`, the standard
        error of `top1`; `variant`, `weights`, `data`, `preprocessing` and `precision`, what was evaluated;
        `images_per_second`; `skipped`, a sentence for each unreadable image; and more, as in docs/evaluate.md.

    Raises:
        UserError: a file, the configuration, the data or the folder is wrong, or they do not go together.
    """
    extras = extras or Extras()
    world = World.from_environment()
    with before_processes_meet():
        if not checkpoints:
            raise ConfigError("no checkpoint is given")
        if data is not None and Path(data).suffix.lower() in TABLE_ENDINGS and Path(data).is_file():
            table = Path(data)  # its paths are relative to its own folder, or to data.root
            above = f"data.root={json.dumps(str(table.parent))}"
            overrides = [above, *overrides, "data.source=csv", f"data.csv={json.dumps(str(table))}"]
            data = None
        if data is not None and "root" in _given(overrides, "data"):
            raise ConfigError("--data and data.root are two ways to say the same; give one")
        options = EvaluationOptions(config, tuple(overrides), use_ema, model, data, preprocessing, among, extras)
        tasks = _prepare(checkpoints, options)
    folder = Path(output) if output else DEFAULT_FOLDER if extras.need_files else None
    rows: list[dict[str, Any]] = []
    with join_world(world, tasks[0].settings.train.timeout_minutes) as world:
        _check_agreement(tasks, world)
        if folder:
            world.on_main(partial(check_folder, folder))
        if announce and world.is_main:
            announce([_known(task, name, view, world, options) for task in tasks for name, view in task.views.items()])
        folders = folders_of(folder, [(task.path, name) for task in tasks for name in task.views])
        for task in tasks:
            results, shared = _evaluate(task, world, options)
            first = len(rows)
            for (name, view), result in zip(task.views.items(), results, strict=True):
                rows.append(_row(_known(task, name, view, world, options), result) | shared)
            if folder:
                write = partial(_write, task, results, rows, first, folders, folder, extras)
                world.on_main(write)  # after every file, so that nothing is lost if a later one fails
            task.model = None
    return rows


@dataclass(frozen=True)
class EvaluationOptions:
    """What `validate_files` was given; see there."""

    config: str | Path | None = None
    overrides: tuple[str, ...] = ()
    use_ema: bool = True
    model: str | Path | None = None
    data: str | Path | None = None
    preprocessing: str | None = None
    among: str | None = None
    extras: Extras = field(default_factory=Extras)


# ------------------------------------------------------------------------------- all that can be a mistake, found first


def _prepare(checkpoints: Sequence[str | Path], options: EvaluationOptions) -> list[Task]:
    """Does all that can be a mistake, before the processes meet."""
    opened: dict[str, Source] = {}
    tasks = []
    for checkpoint in checkpoints:
        try:
            tasks.append(prepare_task(Path(checkpoint), options, opened, keep=len(checkpoints) == 1))
        except DataError as e:
            if len(checkpoints) == 1:
                raise
            raise e.below(checkpoint) from None
    return tasks


def prepare_task(path: Path, options: EvaluationOptions, opened: dict[str, Source], keep: bool) -> Task:
    """Checks one checkpoint and opens its data.

    Args:
        path: the checkpoint.
        options: how to evaluate it.
        opened: the data of those before, so that it is looked through once.
        keep: the network; without it it is built to be checked, and again when its turn comes, to hold only one.

    Raises:
        UserError: the file, the configuration or the data is wrong, or they do not go together.
    """
    model, info = load_model(path, options.use_ema, options.model)
    if not info.num_classes:
        raise CheckpointError(f"{path} has no classifier, so there is nothing to evaluate")
    check_channels(path, info.in_chans)
    settings = _settings(info, path, options)
    views, changed = _views(info, settings, options)
    names = _class_names(info, path, settings.data, options)
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


def _class_names(info: CheckpointInfo, path: Path, data: DataConfig, options: EvaluationOptions) -> list[str] | None:
    """Returns the names of the network's classes: a list that was given, the file's, or ImageNet's."""
    is_given = options.config is not None or "class_names" in _given(options.overrides, "data")
    if data.class_names is None or not is_given:
        return class_names_of(info.num_classes, info.class_names)
    listed = read_class_list(Path(data.class_names))
    if len(listed) != info.num_classes:
        raise DataError(
            f"{data.class_names} has {counted(len(listed), 'name')}, {path} has {info.num_classes:,} classes "
            "(data.class_names)"
        )
    return listed


def _settings(info: CheckpointInfo, path: Path, options: EvaluationOptions) -> Config:
    """Returns the configuration to evaluate under: the file's own data section, or the given one, with overrides."""
    useless = sorted(apply_overrides({}, options.overrides).keys() - {"data", "train"})
    given = _given(options.overrides, "data")
    train = _given(options.overrides, "train")
    useless += [f"train.{key}" for key in sorted(train.keys() - _OF_TRAIN) if key in TrainConfig.model_fields]
    if useless:
        raise ConfigError(
            f"{', '.join(useless)}: no effect on an evaluation, which takes the data section and, of train, "
            f"{', '.join(sorted(_OF_TRAIN))}"
        )
    root = [] if options.data is None else [f"data.root={json.dumps(str(options.data))}"]
    words = [*_NEUTRAL, *root, *options.overrides]
    if options.config is not None:
        settings = load_config(options.config, words)
    else:
        settings = check_config(apply_overrides(_own(info, path, options, given), words), "the configuration")
    located = _located(settings.data)
    if "workers" not in given and located.workers is not None:  # what a training machine has may be more than this one
        located = located.model_copy(update={"workers": min(located.workers, usable_cores())})
    return settings.model_copy(update={"data": located})


def _given(overrides: Sequence[str], section: str) -> dict[str, Any]:
    """Returns the keys of a section that are on the command line."""
    found = apply_overrides({}, overrides).get(section)
    return found if isinstance(found, dict) else {}


def _own(info: CheckpointInfo, path: Path, options: EvaluationOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of the configuration in a checkpoint of this project holds; nothing of another's."""
    sections = {key: info.recipe.get(key) for key in ("data", "train")}
    is_own = info.layout == "conv2former" and all(isinstance(section, dict) for section in sections.values())
    data, train = (dict(section) if is_own else {} for section in sections.values())  # type: ignore[arg-type]
    if {"source", "csv"} & given.keys():  # a list of images, with splits of its own
        data = {key: value for key, value in data.items() if key in _OF_ANY_DATA | {"root"}}
    if options.data is not None:
        data = {key: value for key, value in data.items() if key in _OF_ANY_DATA}
    elif not data.get("root") and "root" not in given:
        raise ConfigError(f"{path} does not say where images are: give --data FOLDER, or data.root=...")
    return {"data": data, "train": {key: value for key, value in train.items() if key in _OF_TRAIN}}


def _located(data: DataConfig) -> DataConfig:
    """Returns the data section with its source, where nothing says it, and the split '.' of a folder of classes."""
    found: dict[str, Any] = {}
    root = Path(data.root)
    source: str = data.source
    if "source" not in data.model_fields_set:
        if root.is_file() and root.suffix.lower() in TABLE_ENDINGS and data.csv is None:
            found = {"csv": str(root), "root": str(root.parent)}
        source = found["source"] = "csv" if found or data.csv else _detect(root)
        if source == "folder" and not root.exists():
            raise DataError(f"{root}: no such folder; a data set on the Hugging Face hub is OWNER/NAME")
    if source == "folder" and root.is_dir() and data.val_split is None and not data.holdout:
        if is_bare(root):
            found["val_split"] = "."
        elif not any(entry.is_dir() for entry in root.iterdir()):
            raise DataError(f"{root} has no class folders; expected {root}/CLASS/IMAGE or {root}/val/CLASS/IMAGE")
    return data.model_copy(update=found)


def _detect(root: Path) -> str:
    """Tells the kind of a data set: by the files in a folder and in those right below it, or by the form of a name."""
    if not root.is_dir():
        is_hub_name = not root.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(root)) and not root.parent.exists()
        return "hf" if is_hub_name else "folder"
    try:
        entries = sorted(root.iterdir())
        below = [entry for folder in entries if folder.is_dir() for entry in folder.iterdir()]
    except OSError as e:
        raise DataError(f"{e.filename or root}: cannot be read ({e.strerror})") from None
    names = [entry.name.lower() for entry in (*entries, *below)]
    if any(name.endswith((".tar", *COMPRESSED)) for name in names):
        return "wds"
    if "dataset_dict.json" in names or any(name.endswith((".parquet", ".arrow")) for name in names):
        return "hf"
    is_table = any(entry.stem in VAL_NAMES and entry.suffix.lower() in TABLE_ENDINGS for entry in entries)
    return "csv" if is_table else "folder"


def _views(
    info: CheckpointInfo, settings: Config, options: EvaluationOptions
) -> tuple[dict[str, Preprocessing], list[str]]:
    """Returns the preprocessings by name, and the keys of them that were given."""
    wanted = options.preprocessing or "checkpoint"
    if wanted not in PREPROCESSINGS:
        raise ConfigError(f"preprocessing '{wanted}': expected {', '.join(PREPROCESSINGS)}")
    data = settings.data
    keys = set(_given(options.overrides, "data"))
    if options.config is not None and options.preprocessing is None:
        keys |= data.model_fields_set
    given = {key: value for key, value in data.given.items() if key in keys}
    data.model_copy(update=dict.fromkeys(set(FIELDS) - keys)).given_for(info.in_chans)
    size = info.preprocessing.img_size
    chosen = {"checkpoint": info.preprocessing, **candidates(given.get("img_size", size), info.in_chans)}
    names = ("imagenet", "inception") if wanted == "both" else (wanted,)
    views = {name: Preprocessing(**{**vars(chosen[name]), **given}) for name in names}
    if len(views) > len(set(views.values())):
        raise ConfigError(f"preprocessing 'both': with {', '.join(given)} given, both are the same")
    unchanged = {"checkpoint": info.preprocessing, **candidates(size, info.in_chans)}
    changed = [key for key in given if any(given[key] != getattr(unchanged[name], key) for name in names)]
    return views, changed


def _choose_classes(task: Task, among: str | None) -> None:
    """Decides among which of the network's classes the answer is sought."""
    if among not in (None, *AMONG):
        raise ConfigError(f"among '{among}': expected {' or '.join(AMONG)}")
    if isinstance(task.source, StreamSource):
        if among == "present":
            raise DataError(f"{task.source.name} is a stream: which classes are present is not known before its end")
        return
    present = _present(task.source)
    subset = _subset_of(present, task.class_names) if among is None else None
    if subset:
        task.notes.append(f"{subset}: scored among its {len(present)} classes, as published (--among all for all)")
    if (subset or among == "present") and len(present) < len(task.class_names):
        task.among = present
        task.class_names = [task.class_names[i] for i in present]


def _present(source: DataSource) -> list[int]:
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


def _check_agreement(tasks: Sequence[Task], world: World) -> None:
    """Checks that all processes have found the same images and classes on their machines.

    Raises:
        ConfigError: they have not.
    """
    found = world.gather([(len(task.source), task.class_names, task.info.num_parameters) for task in tasks])
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise ConfigError(f"rank {rank} has found other checkpoints, images or classes than rank 0")


# ------------------------------------------------------------------------------------------------------- the evaluation


def _evaluate(task: Task, world: World, options: EvaluationOptions) -> tuple[list[Evaluation], dict[str, Any]]:
    """Evaluates one checkpoint.

    Returns:
        The result of each view, and what the rows of all of them have in common.
    """
    model = task.model or load_model(task.path, options.use_ema, options.model)[0]
    train = task.settings.train
    autocast = autocast_for(train.precision, world.device)[1]
    loader = eval_loader(
        task.source,
        task.data.model_copy(update=vars(next(iter(task.views.values())))),
        train.eval_batch_size or train.batch_size,
        world.rank,
        world.size,
        world.device.type == "cuda",
        views=list(task.views.values()) if len(task.views) > 1 else (),
    )
    scores = [_score(task, options.extras, world.device) for _ in task.views]
    start = time.perf_counter()
    loaded = shown(batches(loader), len(task.source), task.path.name, world.size)  # of a stream 0
    results = evaluate_views(model.to(world.device), loaded, world, autocast, scores, train.channels_last)
    seconds = max(world.gather(time.perf_counter() - start))
    assert results is not None
    n = int(results[0].metrics["n"])
    skipped = SkippedImages(task.data, world, [""])
    skipped.note("", results[0].skipped)
    reasons = skipped.exchange()
    skipped.check("", n + len(skipped))
    if not n:
        error = DataError(f"{task.source.name}: {'not one image could be read' if reasons else 'there are no images'}")
        error.scope = "run"
        raise error
    return results, {
        "seconds": round(seconds, 3),
        "images_per_second": round(n / max(seconds, 1e-9), 1),
        "skipped": reasons,
    }


def _score(task: Task, extras: Extras, device: torch.device) -> Score:
    classes = len(task.class_names)
    tallies: dict[str, Tally] = {}
    if extras.per_class:
        tallies["per_class"] = PerClass(classes, device)
    if extras.calibration:
        tallies["calibration"] = Calibration(device)
    if extras.worst:
        tallies["worst"] = Worst(extras.worst)
    if task.real is not None:
        tallies["real"] = RealLabels(task.real, device)
    limit = MAX_COUNTED_CLASSES if extras.confusion or extras.per_class else 0
    return Score(device, task.among, limit, tallies)


def _known(task: Task, name: str, view: Preprocessing, world: World, options: EvaluationOptions) -> dict[str, Any]:
    """Returns a row as far as it is known before the evaluation."""
    return {
        "checkpoint": str(task.path),
        "variant": task.info.name or "unnamed variant",
        "weights": task.info.weights(options.use_ema),
        "preprocessing": name,
        "changed": task.changed,
        **view.to_dict(),
        "data": task.source.name,
        "classes": len(task.class_names),
        "network_classes": task.info.num_classes,
        "present_classes": len(_present(task.source)) if isinstance(task.source, DataSource) else None,
        "precision": autocast_for(task.settings.train.precision, world.device)[0],
        "processes": world.size,
        "n": len(task.source),
        "notes": list(task.notes),
    }


def _row(known: dict[str, Any], result: Evaluation) -> dict[str, Any]:
    """Returns a row with its metrics; top-5 of five classes or fewer is always 100 %, and None."""
    row = {**known, **result.metrics}
    if not math.isfinite(row["loss"]):
        row["notes"] = [*known["notes"], NOT_FINITE]
    row["top1_error"] = standard_error(row["top1"], row["n"])
    if "real" in result.tallies:
        n, top1, top5 = result.tallies["real"].tolist()
        row |= {"real_top1": 100 * top1 / max(n, 1), "real_top5": 100 * top5 / max(n, 1), "real_n": n}
    return row if has_top5(row["classes"]) else row | {key: None for key in row if key.endswith("top5")}


def _write(
    task: Task,
    results: Sequence[Evaluation],
    rows: list[dict[str, Any]],
    first: int,
    folders: Sequence[Path],
    folder: Path,
    extras: Extras,
) -> None:
    """Writes the files of one checkpoint's rows, which begin at `first`, and the results so far."""
    for row, result, place in zip(rows[first:], results, folders[first:], strict=False):
        row |= write_extras(place, row, result, task.source, task.class_names, extras)
    write_results(folder, rows)
