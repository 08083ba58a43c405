"""Image classification as a task: a class for an image, cross-entropy, accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ..._yaml import cut
from ...config import Config, Plan, img_size_at
from ...data import (
    Batch,
    DataSource,
    EpochSampler,
    eval_loader,
    open_train_and_val,
    train_loader,
    train_transforms,
)
from ...data.sources import Source
from ...errors import ConfigError, counted, first_line
from ...models.others import check_size
from ...text import clipped
from ...weights.others import OtherNetwork
from ..network import build_model, find_network
from ..task import Metric, Processes, Task
from .class_metrics import ClassMetrics, about_missing
from .data import (
    SPLIT_FILE,
    check_beside_images,
    class_counts,
    describe_classes,
    describe_validation,
    write_split,
)
from .evaluation import (
    SMALL_SPLIT,
    Evaluation,
    Score,
    SingleView,
    has_top5,
    one_image,
    standard_error,
    with_error,
)
from .loss import ClassificationObjective
from .probe import LinearProbe
from .saved import is_confusion, is_per_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Classification"]

FEW_CLASSES = 3  # of the lowest recall, which the end of a run names


class Classification(Task):
    """See `tasks.task.Task`; arguments are a `Config`, and a `DataSource` or `StreamSource` for each split."""

    name = "classification"
    config = Config
    metrics: ClassVar = {
        "top1": Metric("top-1"),
        "loss": Metric("the loss", is_percent=False, higher_is_better=False),
        "macro_f1": Metric("macro-F1"),
        "balanced_accuracy": Metric("balanced accuracy"),
    }
    headline = "top1"
    curve_title = "Validation accuracy"
    pictures: ClassVar = {"confusion": "confusions"}
    details: ClassVar = {"per_class": is_per_class, "confusion": is_confusion}

    def check(self, config: Config) -> None:
        try:
            train_transforms(config)
        except Exception as e:  # timm asserts, or fails in parsing
            policy = cut(config.augment.auto_augment)
            raise ConfigError(f"augment.auto_augment: timm does not take '{policy}': {first_line(e)}") from None

    def check_output(self, config: Config, output: Path) -> None:
        check_beside_images(output, config)

    def open_data(self, config: Config) -> tuple[Source, Source]:
        return open_train_and_val(config.data)

    def settle_data(self, config: Config, train: Source, val: Source) -> Config:
        """Notes which images are held out."""
        sha256 = val.sha256 if isinstance(val, DataSource) else ""
        return config.model_copy(update={"data": config.data.model_copy(update={"holdout_sha256": sha256 or None})})

    def write_split(self, config: Config, train: Source, val: Source, output: Path) -> None:
        if config.data.holdout_sha256:
            write_split(output / SPLIT_FILE, config.data.root, train, val)

    def notes(self, config: Config, train: Source, val: Source, output: Path) -> list[str]:
        if not config.data.holdout_sha256:
            return []
        return [f"what is trained on and what is held out is listed in {output / SPLIT_FILE}"]

    def about_data(self, config: Config, train: Source, val: Source) -> list[str]:
        counts = class_counts(train)
        classes = [] if counts is None else [describe_classes(config, counts, train.class_names)]
        return [*describe_validation(val), *classes]

    def known_classes(self, config: Config) -> int | None:
        return config.data.num_classes

    def train_loader(
        self, config: Config, source: Source, world: Processes, worker_init: Any
    ) -> tuple[EpochSampler, DataLoader]:
        train, sampling = config.train, config.data.sampling
        sampler = EpochSampler(
            len(source),
            train.batch_size,
            train.accum_steps,
            world.rank,
            world.size,
            train.seed,
            train.keep_tail,
            source.images.labels if sampling != "uniform" and isinstance(source, DataSource) else None,
            sampling,
        )
        pin_memory = world.device.type == "cuda"
        return sampler, train_loader(source, config, sampler, pin_memory, worker_init, world.device)

    def eval_loader(self, config: Config, source: Source, world: Processes, worker_init: Any) -> DataLoader:
        batch_size, pin_memory = config.train.eval_batch_size or config.train.batch_size, world.device.type == "cuda"
        return eval_loader(source, config.data, batch_size, world.rank, world.size, pin_memory, worker_init)

    def synthetic_batch(self, config: Config, num_classes: int, size: int, generator: torch.Generator) -> Batch:
        given = config.data.preprocessing
        images = torch.randn(size, given.channels, *given.size, generator=generator)
        return Batch(images, torch.randint(num_classes, (size,), generator=generator), [])

    def build_model(self, config: Config, num_classes: int, class_names: Sequence[str] | None) -> nn.Module:
        model = build_model(config, num_classes, class_names)
        network, first = find_network(config), img_size_at(config, 0)
        if isinstance(network, OtherNetwork):
            size = (first, first) if isinstance(first, int) else first
            check_size(model, network.name, size, network.in_chans, "augment.first_img_size")
        return model

    def linear_probe(self, config: Config, model: nn.Module, device: torch.device) -> LinearProbe | None:
        mode = config.train.linear_probe
        return None if mode == "none" else LinearProbe(model, device, config.train.channels_last, mode == "start")

    def statistics(self, config: Config, train: Source) -> np.ndarray | None:
        """Returns the training images of each class, (classes,), where they weigh."""
        return class_counts(train) if config.weighs else None

    def objective(
        self, config: Config, plan: Plan, device: torch.device, model: nn.Module, statistics: np.ndarray | None
    ) -> ClassificationObjective:
        return ClassificationObjective(config, plan, device, cast(int, model.num_classes), statistics)

    def evaluator(self, config: Config, class_names: Sequence[str], device: torch.device) -> SingleView:
        return SingleView([Score(device)], device, config.train.channels_last)

    def check_details(self, details: Mapping[str, Any], num_classes: int) -> None:
        if details["per_class"] and len(details["per_class"][0]) != num_classes:
            raise ValueError("per_class is of other classes")

    def hidden_metrics(self, num_classes: int) -> tuple[str, ...]:
        return () if has_top5(num_classes) else ("top5", "ema_top5")

    def about_first_evaluation(self, evaluation: Evaluation, class_names: Sequence[str]) -> list[str]:
        missing = about_missing(ClassMetrics.of(evaluation.per_class).rows(class_names))
        return [f"validation: {missing}"] if missing else []

    def result_line(self, row: Mapping[str, float], has_average: bool, num_classes: int) -> str:
        n, prefix = int(row["n"]), "ema_" if has_average else ""
        top5 = f"  top-5 {row['top5']:.2f} %" if has_top5(num_classes) else ""
        ema = f"  averaged weights {with_error(row['ema_top1'], n)}" if has_average else ""
        classes = f"macro-F1 {row[f'{prefix}macro_f1']:.2f} %  balanced {row[f'{prefix}balanced_accuracy']:.2f} %"
        return f"top-1 {with_error(row['top1'], n)}{top5}{ema}  {classes}  loss {row['loss']:.4f}"

    def batch_figure(
        self, config: Config, inputs: torch.Tensor, targets: torch.Tensor, class_names: list[str]
    ) -> Figure:
        from .. import pictures

        given, smoothing = config.data.preprocessing, config.augment.smoothing
        return pictures.batch_figure(inputs, targets, class_names, given.mean, given.std, smoothing)

    def result_figures(self, details: Mapping[str, Any], class_names: list[str]) -> dict[str, Figure | None]:
        from .. import pictures

        counts = details["confusion"]
        return {"confusion": pictures.confusion_figure(counts, class_names) if counts else None}

    def report(self, best: Mapping[str, float], details: Mapping[str, Any], class_names: list[str]) -> dict[str, Any]:
        per_class = details["per_class"]
        return {
            "top1": best["top1"],
            "top5": best["top5"],
            "loss": best["loss"],
            # None and an empty list where the best is of a version that did not count classes
            "macro_f1": best.get("macro_f1"),
            "balanced_accuracy": best.get("balanced_accuracy"),
            "classes": ClassMetrics.of(per_class).rows(class_names) if per_class else [],
        }

    def summarise(self, report: Mapping[str, Any]) -> tuple[str, list[str]]:
        top1, n = report["top1"], report["n"]
        small = f"  precision    {one_image(n)} of top-1, whose standard error is {standard_error(top1, n):.2f} points"
        lines = [*([small] if n < SMALL_SPLIT else []), *_about_classes(report)]
        return f"top-1 {top1:.2f} % on {counted(n, 'image')}", lines


def _about_classes(report: Mapping[str, Any]) -> list[str]:
    """Returns what the accuracies of single classes add to top-1."""
    rows = [row for row in report["classes"] if row["images"]]
    if not rows:
        return []
    lowest = sorted(rows, key=lambda row: row["recall"])[:FEW_CLASSES]
    named = ", ".join(f"{clipped(row['class'], 24)} {row['recall']:.2f} % of {row['images']:,}" for row in lowest)
    means = f"macro-F1 {report['macro_f1']:.2f} %, balanced accuracy {report['balanced_accuracy']:.2f} %"
    missing = about_missing(report["classes"])
    return [
        f"  classes      {means}",
        f"  lowest       recall of {named}",
        *([f"  no images    {missing}"] if missing else []),
    ]
