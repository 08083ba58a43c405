"""Evaluates classifiers' weight files on a validation split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...data import DataSource, batches, eval_loader
from ...engine.build import autocast_for
from ...engine.distributed import World
from ...errors import ConfigError
from ...models import load_model
from ...tasks.classification.class_metrics import ClassMetrics
from ...tasks.classification.evaluation import Evaluation, Score, Views, has_top5, standard_error
from ...tasks.classification.tallies import Calibration, RealLabels, Tally, Worst
from ...weights.preprocessing import Preprocessing
from .files import Extras, write_extras
from .run import Announce, measure, run_evaluations
from .settings import EvaluationOptions, check_one_root, is_table
from .task import MAX_COUNTED_CLASSES, Task, prepare_tasks, present_classes

__all__ = ["ClassEvaluation", "validate", "validate_files"]


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
    announce: Announce | None = None,
    contents: list[dict[str, Any]] | None = None,
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
        contents: of a single file, where it has been read already; taken out of the list.

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

    def prepare() -> list[ClassEvaluation]:
        words, root = tuple(overrides), data
        if not checkpoints:
            raise ConfigError("no checkpoint is given")
        if root is not None and is_table(Path(root)):
            table = Path(root)  # its paths are relative to its own folder, or to data.root
            above = f"data.root={json.dumps(str(table.parent))}"
            words = (above, *words, "data.source=csv", f"data.csv={json.dumps(str(table))}")
            root = None
        check_one_root(root, words)
        options = EvaluationOptions(config, words, use_ema, model, root, preprocessing, among, extras)
        return [ClassEvaluation(task, options) for task in prepare_tasks(checkpoints, options, contents)]

    return run_evaluations(prepare, extras.folder_for(output), announce)


@dataclass(frozen=True)
class ClassEvaluation:
    """The evaluation of a classifier; see `run.Prepared`."""

    task: Task
    options: EvaluationOptions

    @property
    def path(self) -> Path:
        return self.task.path

    @property
    def views(self) -> list[str]:
        return list(self.task.views)

    @property
    def timeout_minutes(self) -> float:
        return self.task.settings.train.timeout_minutes

    @property
    def signature(self) -> Any:
        return len(self.task.source), self.task.class_names, self.task.info.num_parameters

    def known(self, world: World) -> list[dict[str, Any]]:
        return [_known(self.task, name, view, world, self.options) for name, view in self.task.views.items()]

    def evaluate(self, world: World) -> tuple[list[Evaluation], dict[str, Any]]:
        task, options = self.task, self.options
        model = task.model or load_model(task.path, options.use_ema, options.model)[0]
        task.model = None
        train = task.settings.train
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
        views = Views(scores, world.device, train.channels_last)
        return measure(model, batches(loader), views, task.source, task.path, task.data, train, world)

    def row(self, known: dict[str, Any], result: Evaluation) -> dict[str, Any]:
        return _row(known, result, self.task.class_names)

    def write(self, folder: Path, row: dict[str, Any], result: Evaluation) -> dict[str, Any]:
        return write_extras(folder, row, result, self.task.source, self.task.class_names, self.options.extras)


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
    row["top1_error"] = standard_error(row["top1"], row["n"])
    if "real" in result.tallies:
        n, top1, top5 = result.tallies["real"].tolist()
        row |= {"real_top1": 100 * top1 / max(n, 1), "real_top5": 100 * top5 / max(n, 1), "real_n": n}
    return row if has_top5(row["classes"]) else row | {key: None for key in row if key.endswith("top5")}
