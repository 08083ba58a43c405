"""Evaluates weight files on a validation split."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...data import DataSource, batches, eval_loader
from ...data.tables import TABLE_ENDINGS
from ...engine.build import autocast_for
from ...engine.distributed import World, join_world
from ...engine.evaluate import evaluate, shown
from ...engine.skipped import SkippedImages
from ...errors import ConfigError, DataError, before_processes_meet
from ...models import load_model
from ...tasks.classification.class_metrics import ClassMetrics
from ...tasks.classification.evaluation import Evaluation, Score, Views, has_top5, standard_error
from ...tasks.classification.tallies import Calibration, RealLabels, Tally, Worst
from ...weights.preprocessing import Preprocessing
from .files import NOT_FINITE, Extras, check_folder, folders_of, write_extras, write_results
from .settings import EvaluationOptions, given_on_command_line
from .task import MAX_COUNTED_CLASSES, Task, prepare_tasks, present_classes

__all__ = ["DEFAULT_FOLDER", "validate", "validate_files"]

DEFAULT_FOLDER = Path("runs/evaluation")


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
        `top1`, `top5` (None with five classes or fewer), `loss`, `macro_f1`, `balanced_accuracy` and `n`, as
        `Evaluation`; `top1_error`, the standard error of `top1`; `per_class`, a row for each class as
        `ClassMetrics.rows` has them; `variant`, `weights`, `data`, `preprocessing` and `precision`, what was evaluated;
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
        if data is not None and "root" in given_on_command_line(overrides, "data"):
            raise ConfigError("--data and data.root are two ways to say the same; give one")
        options = EvaluationOptions(config, tuple(overrides), use_ema, model, data, preprocessing, among, extras)
        tasks = prepare_tasks(checkpoints, options)
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
                rows.append(_row(_known(task, name, view, world, options), result, task.class_names) | shared)
            if folder:
                write = partial(_write, task, results, rows, first, folders, folder, extras)
                world.on_main(write)  # after every file, so that nothing is lost if a later one fails
            task.model = None
    return rows


def _check_agreement(tasks: Sequence[Task], world: World) -> None:
    """Checks that all processes have found the same images and classes on their machines.

    Raises:
        ConfigError: they have not.
    """
    found = world.gather([(len(task.source), task.class_names, task.info.num_parameters) for task in tasks])
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise ConfigError(f"rank {rank} has found other checkpoints, images or classes than rank 0")


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
    model.to(world.device)
    uses_graph = train.cuda_graph != "off"
    views = Views(scores, world.device, train.channels_last)
    results = evaluate(model, loaded, world, autocast, views, cuda_graph=uses_graph)
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
    tallies: dict[str, Tally] = {}
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
        "present_classes": len(present_classes(task.source)) if isinstance(task.source, DataSource) else None,
        "precision": autocast_for(task.settings.train.precision, world.device)[0],
        "processes": world.size,
        "n": len(task.source),
        "notes": list(task.notes),
    }


def _row(known: dict[str, Any], result: Evaluation, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns a row with its metrics; top-5 of five classes or fewer is always 100 %, and None."""
    row = {**known, **result.metrics, "per_class": ClassMetrics.of(result.per_class).rows(class_names)}
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
