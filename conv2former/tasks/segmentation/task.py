"""Semantic segmentation as a task: a class for every pixel, cross-entropy, intersection over union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ...config import Plan
from ...data import EpochSampler
from ...errors import counted, shorten
from ...models import CheckpointInfo
from ...text import clipped
from ..dense.task import DenseTask
from ..task import Metric, Processes
from .check import check_source
from .config import SegmentationConfig
from .evaluation import ClassCounts, MaskEvaluation, MaskEvaluator, about_missing
from .heads import check_installed
from .loader import MaskBatch, eval_loader, train_loader
from .loss import SegmentationObjective, check_weights
from .network import SegmentationNetwork, build_network
from .pairs import PairSource
from .restore import restore_network
from .saved import is_pixels, is_worst
from .sources import class_names_of, open_train_and_val

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Segmentation"]

FEW_CLASSES = 3  # of the lowest IoU, which the end of a run names


class Segmentation(DenseTask):
    """See `tasks.task.Task`; arguments are a `SegmentationConfig`, and a `PairSource` for each split."""

    name = "segmentation"
    config = SegmentationConfig
    metrics: ClassVar = {
        "miou": Metric("mIoU"),
        "loss": Metric("the loss", is_percent=False, higher_is_better=False),
        "pixel_accuracy": Metric("pixel accuracy"),
        "mean_accuracy": Metric("mean accuracy of the classes"),
    }
    headline = "miou"
    curve_title = "Validation mIoU"
    pictures: ClassVar = {"worst": "worst images"}
    details: ClassVar = {"pixels": is_pixels, "worst": is_worst}

    def check(self, config: SegmentationConfig) -> None:
        check_installed()

    def open_data(self, config: SegmentationConfig) -> tuple[PairSource, PairSource]:
        train, val = open_train_and_val(config)
        check_weights(config, len(train.class_names))
        if not config.data.check:
            return train, val
        skip = config.data.on_error == "skip"
        return check_source(train, skip), check_source(val, skip)

    def about_data(self, config: SegmentationConfig, train: PairSource, val: PairSource) -> list[str]:
        head = config.model.head
        auxiliary = f", an auxiliary one on stage 3 (x {head.auxiliary:g} in the loss)" if head.auxiliary else ""
        lines = [f"head {head.name}, {head.channels} channels{auxiliary}"]
        if train.counts is not None:
            lines.append(_about_pixels(train.counts.pixels, train.counts.ignored, train.class_names))
        return lines

    def known_classes(self, config: SegmentationConfig) -> int | None:
        if config.data.num_classes or config.data.source == "hf":
            return config.data.num_classes
        names = class_names_of(config)
        return None if names is None else len(names)

    def train_loader(
        self, config: SegmentationConfig, source: PairSource, world: Processes, worker_init: Any
    ) -> tuple[EpochSampler, DataLoader]:
        sampler = self.sampler(config, source, world)
        return sampler, train_loader(source, config, sampler, world.device, worker_init)

    def eval_loader(
        self, config: SegmentationConfig, source: PairSource, world: Processes, worker_init: Any
    ) -> DataLoader:
        return eval_loader(source, config, world.rank, world.size, world.device, worker_init)

    def synthetic_batch(
        self, config: SegmentationConfig, num_classes: int, size: int, generator: torch.Generator
    ) -> MaskBatch:
        given = config.data.preprocessing
        images = torch.randn(size, given.channels, *given.size, generator=generator)
        masks = torch.randint(num_classes, (size, *given.size), generator=generator, dtype=torch.int32)
        return MaskBatch(images, masks, [])

    def build_model(self, config: SegmentationConfig, num_classes: int, class_names: Sequence[str] | None) -> nn.Module:
        return build_network(config, num_classes, class_names)

    def restore(
        self, content: Mapping[str, Any], path: str | Path, use_ema: bool = True, expect: str | Path | None = None
    ) -> tuple[SegmentationNetwork, CheckpointInfo]:
        return restore_network(content, path, use_ema, expect)

    def statistics(self, config: SegmentationConfig, train: PairSource) -> np.ndarray | None:
        """Returns the training pixels of each class, (classes,), where they were counted."""
        return None if train.counts is None else train.counts.pixels

    def objective(
        self,
        config: SegmentationConfig,
        plan: Plan,
        device: torch.device,
        model: nn.Module,
        statistics: np.ndarray | None,
    ) -> SegmentationObjective:
        return SegmentationObjective(config, device, cast(int, model.num_classes), statistics)

    def evaluator(self, config: SegmentationConfig, class_names: Sequence[str], device: torch.device) -> MaskEvaluator:
        return MaskEvaluator(config, device)

    def check_details(self, details: Mapping[str, Any], num_classes: int) -> None:
        if details["pixels"] and len(details["pixels"][0]) != num_classes:
            raise ValueError("pixels is of other classes")

    def about_first_evaluation(self, evaluation: MaskEvaluation, class_names: Sequence[str]) -> list[str]:
        missing = about_missing(evaluation.counts.rows(class_names))
        return [f"validation: {missing}"] if missing else []

    def result_line(self, row: Mapping[str, float], has_average: bool, num_classes: int) -> str:
        ema = f"  averaged weights {row['ema_miou']:.2f} %" if has_average else ""
        prefix = "ema_" if has_average else ""
        return (
            f"mIoU {row['miou']:.2f} %{ema}  pixel accuracy {row[f'{prefix}pixel_accuracy']:.2f} %  loss "
            f"{row['loss']:.4f}"
        )

    def batch_figure(
        self, config: SegmentationConfig, inputs: torch.Tensor, targets: torch.Tensor, class_names: list[str]
    ) -> Figure:
        from . import pictures

        given = config.data.preprocessing
        return pictures.batch_figure(inputs, targets, class_names, given.mean, given.std)

    def result_figures(self, details: Mapping[str, Any], class_names: list[str]) -> dict[str, Figure | None]:
        from . import pictures

        return {"worst": pictures.worst_figure(details["worst"] or [], class_names)}

    def report(self, best: Mapping[str, float], details: Mapping[str, Any], class_names: list[str]) -> dict[str, Any]:
        rows = ClassCounts.of(details["pixels"]).rows(class_names) if details["pixels"] else []
        worst = [{"image": name, "iou": iou} for iou, _, name, *_ in details["worst"] or []]
        return {**{key: best.get(key) for key in self.metrics}, "classes": rows, "worst_images": worst}

    def summarise(self, report: Mapping[str, Any]) -> tuple[str, list[str]]:
        return f"mIoU {report['miou']:.2f} % on {counted(report['n'], 'image')}", _about_classes(report)


def _about_pixels(pixels: np.ndarray, ignored: int, class_names: Sequence[str]) -> str:
    """Returns a line on the shares of the classes in the training masks.

    Args:
        pixels: (classes,) of each class.
        ignored: those that count for nothing.
        class_names: in index order.
    """
    total, there = int(pixels.sum()), np.flatnonzero(pixels)
    few, many = (int(there[choose(pixels[there])]) for choose in (np.argmin, np.argmax))
    shares = " to ".join(f"{100 * pixels[i] / total:.2g} % ({clipped(class_names[i], 24)})" for i in (few, many))
    line = f"training pixels per class: {shares}"
    missing = [class_names[i] for i in np.flatnonzero(pixels == 0).tolist()]
    if missing:
        line += f", none of {counted(len(missing), 'class', 'classes')}: {shorten(missing, 10)}"
    return f"{line}; {100 * ignored / (total + ignored):.2g} % of all are ignored"


def _about_classes(report: Mapping[str, Any]) -> list[str]:
    """Returns what the IoU of single classes adds to their mean."""
    rows = [row for row in report["classes"] if row["pixels"]]
    if not rows:
        return []
    lowest = sorted(rows, key=lambda row: row["iou"])[:FEW_CLASSES]
    named = ", ".join(f"{clipped(row['class'], 24)} {row['iou']:.2f} %" for row in lowest)
    means = f"pixel accuracy {report['pixel_accuracy']:.2f} %, mean accuracy {report['mean_accuracy']:.2f} %"
    missing = about_missing(report["classes"])
    return [
        f"  pixels       {means}",
        f"  lowest       IoU of {named}",
        *([f"  not there    {missing}"] if missing else []),
    ]
