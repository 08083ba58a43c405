"""Detection as a task: boxes of single things, and perhaps their masks; COCO's average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...config import Plan
from ...data import EpochSampler
from ...data.tables import read_class_list
from ...errors import ConfigError, counted
from ...models import CheckpointInfo
from ...text import clipped
from ...weights.others import OtherNetwork
from ..dense.task import DenseTask
from ..network import find_network
from ..task import Metric, Processes
from .check import about_objects, check_source
from .config import DetectionConfig
from .detectors import finest_stride
from .evaluation import BoxEvaluation, BoxEvaluator, about_missing, class_rows
from .images import DetectionSource
from .loader import eval_loader, train_loader
from .loss import DetectionObjective, Targets
from .matching import NONE_RIGHT
from .network import DetectionNetwork, build_network
from .objects import TrainBatch
from .restore import restore_network
from .saved import check_classes, is_classes, is_confusion, is_score, is_worst
from .sources import open_train_and_val

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Detection"]

FEW_CLASSES = 3  # of the lowest AP, which the end of a run names
SYNTHETIC = 8  # boxes in an image of a dry run


class Detection(DenseTask):
    """See `tasks.task.Task`; arguments are a `DetectionConfig`, and a `DetectionSource` for each split."""

    name = "detection"
    config = DetectionConfig
    metrics: ClassVar = {
        "ap": Metric("AP"),
        "ap50": Metric("AP50"),
        "ap75": Metric("AP75"),
        "mask_ap": Metric("mask AP"),
        "mask_ap50": Metric("mask AP50"),
        "mask_ap75": Metric("mask AP75"),
    }
    optional = frozenset({"mask_ap", "mask_ap50", "mask_ap75"})
    headline = "ap"
    curve_title = "Validation AP"
    pictures: ClassVar = {"confusion": "confusions", "worst": "worst images"}
    details: ClassVar = {
        "classes": is_classes,
        "score": is_score,
        "f1": is_score,
        "confusion": is_confusion,
        "worst": is_worst,
    }
    no_graph = "its images differ in size"

    def check(self, config: DetectionConfig) -> None:
        try:
            import pycocotools  # noqa: F401
        except ImportError as e:
            raise ConfigError(
                f'task: detection needs pycocotools, which cannot be imported ({e}); pip install "conv2former[dense]"'
            ) from None
        if config.train.compile and isinstance(find_network(config), OtherNetwork):
            raise ConfigError(
                "train.compile: of a detection it compiles the blocks, only of a Conv2Former, and "
                f"{config.model.name} is none; set it to false"
            )

    def open_data(self, config: DetectionConfig) -> tuple[DetectionSource, DetectionSource]:
        train, val = open_train_and_val(config)
        skip = config.data.on_error == "skip"
        return check_source(train, skip), check_source(val, skip)

    def about_data(self, config: DetectionConfig, train: DetectionSource, val: DetectionSource) -> list[str]:
        detector = config.model.detector
        return [
            f"detector {detector.name}, {detector.channels} channels, on maps from stride {finest_stride(detector)} on",
            f"training: {about_objects(train)}",
            f"validation: {about_objects(val)}",
        ]

    def known_classes(self, config: DetectionConfig) -> int | None:
        names = config.data.class_names
        return None if names is None else len(read_class_list(Path(names)))

    def train_loader(
        self, config: DetectionConfig, source: DetectionSource, world: Processes, worker_init: Any
    ) -> tuple[EpochSampler, DataLoader]:
        sampler = self.sampler(config, source, world)
        return sampler, train_loader(source, config, sampler, world.device, worker_init)

    def eval_loader(
        self, config: DetectionConfig, source: DetectionSource, world: Processes, worker_init: Any
    ) -> DataLoader:
        return eval_loader(source, config, world.rank, world.size, world.device, worker_init)

    def synthetic_batch(
        self, config: DetectionConfig, num_classes: int, size: int, generator: torch.Generator
    ) -> TrainBatch:
        """Returns images of the largest size that training makes."""
        given, augment = config.data.preprocessing, config.augment
        height, width = given.size
        if augment.resize == "multi_scale":
            height, width = max(augment.short_sides), max(config.data.long_side, max(augment.short_sides))
        targets = []
        for _ in range(size):
            corners = torch.rand(2, SYNTHETIC, 2, generator=generator) * torch.tensor([width - 2.0, height - 2.0])
            target = {
                "boxes": torch.cat([corners.amin(0), corners.amax(0) + 1], dim=1),
                "labels": torch.randint(num_classes, (SYNTHETIC,), generator=generator),
            }
            if config.has_masks:
                target["masks"] = torch.ones(SYNTHETIC, height, width, dtype=torch.uint8)
            targets.append(target)
        images = torch.randn(size, given.channels, height, width, generator=generator)
        return TrainBatch(list(images), targets, [])

    def build_model(self, config: DetectionConfig, num_classes: int, class_names: Sequence[str] | None) -> nn.Module:
        return build_network(config, num_classes, class_names)

    def restore(
        self, content: Mapping[str, Any], path: str | Path, use_ema: bool = True, expect: str | Path | None = None
    ) -> tuple[DetectionNetwork, CheckpointInfo]:
        return restore_network(content, path, use_ema, expect)

    def objective(
        self, config: DetectionConfig, plan: Plan, device: torch.device, model: nn.Module, statistics: None
    ) -> DetectionObjective:
        return DetectionObjective(device)

    def evaluator(self, config: DetectionConfig, class_names: Sequence[str], device: torch.device) -> BoxEvaluator:
        return BoxEvaluator(config, class_names, device)

    def metrics_of(self, config: DetectionConfig) -> dict[str, Metric]:
        return {key: metric for key, metric in self.metrics.items() if config.has_masks or key not in self.optional}

    def check_details(self, details: Mapping[str, Any], num_classes: int) -> None:
        check_classes(details, num_classes)

    def about_first_evaluation(self, evaluation: BoxEvaluation, class_names: Sequence[str]) -> list[str]:
        missing = about_missing(class_rows(evaluation.classes, class_names))
        return [f"validation: {missing}"] if missing else []

    def result_line(self, row: Mapping[str, float], has_average: bool, num_classes: int) -> str:
        prefix = "ema_" if has_average else ""
        ema = f"  averaged weights {row['ema_ap']:.2f} %" if has_average else ""
        masks = f"  mask AP {row[f'{prefix}mask_ap']:.2f} %" if "mask_ap" in row else ""
        return f"AP {row['ap']:.2f} %{ema}  AP50 {row[f'{prefix}ap50']:.2f} %{masks}"

    def batch_figure(
        self, config: DetectionConfig, inputs: list[Tensor], targets: Targets, class_names: list[str]
    ) -> Figure:
        from . import pictures

        given = config.data.preprocessing
        return pictures.batch_figure(inputs, targets, class_names, given.mean, given.std)

    def result_figures(self, details: Mapping[str, Any], class_names: list[str]) -> dict[str, Figure | None]:
        from . import pictures

        score, title, confusion = details["score"], "Validation objects, best.pt", None
        if details["confusion"] is not None:
            confusion = pictures.confusions_figure(details["confusion"], score, class_names, title)
        return {"confusion": confusion, "worst": pictures.worst_figure(details["worst"] or [], score, class_names)}

    def report(self, best: Mapping[str, float], details: Mapping[str, Any], class_names: list[str]) -> dict[str, Any]:
        worst = [
            {"image": name, "mistakes": mistakes, "objects": objects}
            for mistakes, objects, _, name, *_ in details["worst"] or []
        ]
        return {
            **{key: best.get(key) for key in self.metrics},
            "classes": class_rows(details["classes"] or [], class_names if details["classes"] else []),
            "score": details["score"],
            "f1": details["f1"],
            "worst_images": worst,
        }

    def summarise(self, report: Mapping[str, Any]) -> tuple[str, list[str]]:
        return f"AP {report['ap']:.2f} % on {counted(report['n'], 'image')}", _about_result(report)


def _about_result(report: Mapping[str, Any]) -> list[str]:
    """Returns lines on what the AP hides: looser and stricter overlaps, masks, single classes."""
    shown = [(key, Detection.metrics[key]) for key in Detection.metrics if key != Detection.headline]
    values = [f"{metric.label} {metric.text(report[key])}" for key, metric in shown if report[key] is not None]
    lines = [f"  others       {', '.join(values)}"]
    rows = sorted((row for row in report["classes"] if row["objects"]), key=lambda row: row["ap"])
    if len(rows) > 1:
        named = ", ".join(f"{clipped(row['class'], 24)} {row['ap']:.2f} %" for row in rows[:FEW_CLASSES])
        lines.append(f"  lowest       AP of {named}")
    if report["score"] is not None:
        best = f"{report['score']:.2f}, from which on F1 is {report['f1']:.2f} %"
        lines.append(f"  best score   {best if report['f1'] else NONE_RIGHT}")
    missing = about_missing(report["classes"])
    return [*lines, *([f"  not there    {missing}"] if missing else [])]
