"""Evaluates detections' checkpoints: boxes, and masks where network and data have them, as their training did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from ...config.base import BaseTrainConfig
from ...data.split import VAL_NAMES
from ...engine.build import autocast_for
from ...engine.distributed import World
from ...errors import DataError
from ...models import CheckpointInfo
from ...tasks.detection.check import MissingMasks, check_source
from ...tasks.detection.config import UNUSED_AUGMENT, UNUSED_DATA, DetectionConfig
from ...tasks.detection.evaluation import BoxEvaluation, BoxEvaluator, class_rows
from ...tasks.detection.images import DetectionSource
from ...tasks.detection.loader import eval_loader
from ...tasks.detection.network import DetectionNetwork
from ...tasks.detection.restore import restore_network
from ...tasks.detection.sources import open_split
from ...tasks.detection.yolo import DESCRIPTIONS
from .boxes import write_box_extras
from .dense import OF_ANY_DATA, DenseKind, DenseValidation, check_classes, folder_words, names_in, validate_dense

__all__ = ["BoxValidation", "validate_boxes"]


def _settled(noted: Mapping[str, Any]) -> list[str]:
    detector, augment = json.dumps(noted["model"]["detector"]), json.dumps(UNUSED_AUGMENT)
    data = [f"data.{key}={json.dumps(value)}" for key, value in UNUSED_DATA.items()]
    return [f"model.detector={detector}", f"augment={augment}", *data, "checkpoint.metric=ap", "train.early_stop=null"]


def _words_for(data: Path) -> list[str]:
    """Returns overrides that say where data is and how it is stored: a COCO or YOLO file, a folder, a name on the hub.

    A file is that of the split that is evaluated.
    """
    if data.is_file():
        if data.suffix.lower() in DESCRIPTIONS:
            return folder_words(data, "yolo")
        if data.suffix.lower() == ".json":
            return folder_words(data.parent, "coco", val_annotations=data.name)
        raise DataError(f"{data}: a file, and neither COCO's .json nor YOLO's .yaml; give one, or a folder")
    return folder_words(data, _detect(data))


def _detect(root: Path) -> str:
    """Tells how a data set is stored, by the names in its folder and those of its splits."""
    names = names_in(root)
    if names is None:
        return "coco" if root.exists() or root.parent.exists() else "hf"
    below = {name for split in VAL_NAMES for name in names_in(root / split) or ()}
    every = names | below
    if {"dataset_dict.json", "metadata.jsonl"} & every or any(name.endswith((".parquet", ".arrow")) for name in names):
        return "hf"
    is_devkit = any({"Annotations", "ImageSets"} <= (names_in(root / name) or set()) for name in names)
    if is_devkit or "Annotations" in names or any(name.endswith(".xml") for name in every):
        return "voc"
    if {"labels", "classes.txt"} & every or any(name.endswith(DESCRIPTIONS) for name in names):
        return "yolo"
    return "coco"


def _open(settings: DetectionConfig, info: CheckpointInfo, path: Path) -> DetectionSource:
    """Opens the images, whose classes must be those of the network; without masks, where not every object has one.

    Raises:
        DataError: they are not, or an object is wrong.
    """
    names, skip = list(info.class_names or ()), settings.data.on_error == "skip"
    source = open_split(settings, None, names)
    check_classes(source, names, path, "rename them in the data as the network has them")
    try:
        return check_source(source, skip)
    except MissingMasks:
        detector = settings.model.detector.model_copy(update={"name": "faster_rcnn"})
        model = settings.model.model_copy(update={"detector": detector})
        source = open_split(settings.model_copy(update={"model": model}), None, names)
        note = f"{source.name} has not a mask for each object: boxes alone are evaluated"
        return replace(check_source(source, skip), note="; ".join(filter(None, (source.note, note))))


class BoxValidation(DenseValidation[DetectionConfig, DetectionSource]):
    """The evaluation of one checkpoint; see `run.Prepared`."""

    def known(self, world: World) -> list[dict[str, Any]]:
        evaluation, data = self.settings.evaluation, self.settings.data
        return [
            {
                "task": "detection",
                "checkpoint": str(self.path),
                "variant": self.info.name or "unnamed variant",
                "detector": self.settings.model.detector.name,
                "weights": self.info.weights(self.options.use_ema),
                "score": evaluation.score,
                "nms": evaluation.nms,
                "max_detections": evaluation.max_detections,
                "short_side": data.short_side,
                "long_side": data.long_side,
                **self.known_of_all(world, autocast_for(self.settings.train.precision, world.device)[0]),
            }
        ]

    def evaluator(self, world: World) -> BoxEvaluator:
        shown = self.settings.evaluation.model_copy(update={"pictures": self.options.extras.worst})
        settings = self.settings.model_copy(update={"evaluation": shown})
        return BoxEvaluator(settings, self.source.class_names, world.device)

    def loader(self, world: World) -> DataLoader:
        return eval_loader(self.source, self.settings, world.rank, world.size, world.device, None)

    def ready(self, network: DetectionNetwork) -> BaseTrainConfig:
        network.limit(self.settings.evaluation)
        # lists of images are no input of a CUDA graph
        return super().ready(network).model_copy(update={"cuda_graph": "off"})

    def row(self, known: dict[str, Any], result: BoxEvaluation) -> dict[str, Any]:
        rows = class_table(result, self.source.class_names)
        best = {"best_score": result.score, "best_f1": result.f1}
        return {**known, **result.coco, **result.metrics, **best, "per_class": rows}

    def write(self, folder: Path, row: dict[str, Any], result: BoxEvaluation) -> dict[str, Any]:
        return write_box_extras(folder, row, result, self.source, self.options.extras)


def class_table(result: BoxEvaluation, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns for each class its `objects` and AP, and at the score of the best F1 the `boxes` that are taken for it.

    `recall` is the share of the objects that have a box of their class, and `precision` that of the boxes that have
    such an object, in percent; None where there is none.
    """
    confusion = result.confusion
    rows: list[dict[str, Any]] = []
    for i, row in enumerate(class_rows(result.classes, class_names)):
        right, boxes = int(confusion[i, i]), int(confusion[:, i].sum())
        shares = {"recall": row["objects"], "precision": boxes}
        rows.append({**row, "boxes": boxes} | {key: 100 * right / n if n else None for key, n in shares.items()})
    return rows


_KIND = DenseKind(
    "detection",
    DetectionConfig,
    restore_network,
    {*OF_ANY_DATA, "long_side"},
    {"source", "val_annotations"},
    _settled,
    _words_for,
    _open,
    BoxValidation,
)
# A row has COCO's numbers in percent, `best_score` and `best_f1`, `n`, and `per_class`: see `BoxEvaluation` and
# `class_table`.
validate_boxes = partial(validate_dense, _KIND)
