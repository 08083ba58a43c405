"""Evaluates segmentations' checkpoints: images against masks, whole or in windows, as their training did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from ...data.split import VAL_NAMES
from ...data.tables import TABLE_ENDINGS
from ...engine.build import autocast_for
from ...engine.distributed import World
from ...models import CheckpointInfo
from ...tasks.segmentation.check import check_source
from ...tasks.segmentation.config import SegmentationConfig
from ...tasks.segmentation.evaluation import MaskEvaluation, MaskEvaluator
from ...tasks.segmentation.layouts import LAYOUTS
from ...tasks.segmentation.loader import eval_loader
from ...tasks.segmentation.pairs import PairSource
from ...tasks.segmentation.restore import restore_network
from ...tasks.segmentation.sources import open_split
from .dense import OF_ANY_DATA, DenseKind, DenseValidation, check_classes, folder_words, names_in, validate_dense
from .masks import write_mask_extras
from .settings import is_table

__all__ = ["MaskValidation", "validate_masks"]


def _settled(noted: Mapping[str, Any]) -> list[str]:
    return ["model.head={name: fpn}", "loss.class_weights=none", "augment.scale=[1,1]"]


def _words_for(data: Path) -> list[str]:
    """Returns overrides that say where data is and how it is stored: a table, a folder, or a name on the hub."""
    if is_table(data):
        return [f"data.root={json.dumps(str(data.parent))}", "data.source=csv", f"data.csv={json.dumps(str(data))}"]
    return folder_words(data, _detect(data))


def _detect(root: Path) -> str:
    """Tells how a data set is stored, by the names in its folder."""
    names = names_in(root)
    if names is None:
        return "folder" if root.exists() or root.parent.exists() else "hf"
    for source, (images, masks, *_) in LAYOUTS.items():
        if {images, masks} <= names:
            return source
    if "dataset_dict.json" in names or any(name.endswith((".parquet", ".arrow")) for name in names):
        return "hf"
    tables = [name for name in names if Path(name).stem in VAL_NAMES and Path(name).suffix.lower() in TABLE_ENDINGS]
    return "csv" if tables else "folder"


def _open(settings: SegmentationConfig, info: CheckpointInfo, path: Path) -> PairSource:
    """Opens the images, whose classes must be those of the network.

    Raises:
        DataError: they are not, or a mask is wrong.
    """
    names = list(info.class_names or ())
    source = open_split(settings, None, names)
    how = "give the network's names, one a line (data.class_names=FILE), if the numbers in the masks mean the same"
    check_classes(source, names, path, how)
    return check_source(source, settings.data.on_error == "skip") if settings.data.check else source


class MaskValidation(DenseValidation[SegmentationConfig, PairSource]):
    """The evaluation of one checkpoint; see `run.Prepared`."""

    def known(self, world: World) -> list[dict[str, Any]]:
        evaluation, precision = self.settings.evaluation, self.settings.train.precision
        window = list(self.settings.window) if evaluation.mode == "slide" else None
        return [
            {
                "task": "segmentation",
                "checkpoint": str(self.path),
                "variant": self.info.name or "unnamed variant",
                "head": self.info.recipe["model"]["head"]["name"],
                "weights": self.info.weights(self.options.use_ema),
                "mode": evaluation.mode,
                "window": window,
                "overlap": evaluation.overlap if window else None,
                "flip": evaluation.flip,
                "short_side": self.settings.data.short_side,
                **self.known_of_all(world, autocast_for(precision, world.device)[0]),
            }
        ]

    def evaluator(self, world: World) -> MaskEvaluator:
        shown = self.settings.evaluation.model_copy(update={"pictures": self.options.extras.worst})
        return MaskEvaluator(self.settings.model_copy(update={"evaluation": shown}), world.device)

    def loader(self, world: World) -> DataLoader:
        return eval_loader(self.source, self.settings, world.rank, world.size, world.device, None)

    def row(self, known: dict[str, Any], result: MaskEvaluation) -> dict[str, Any]:
        return {**known, **result.metrics, "per_class": class_rows(result, self.source.class_names)}

    def write(self, folder: Path, row: dict[str, Any], result: MaskEvaluation) -> dict[str, Any]:
        return write_mask_extras(folder, row, result, self.source.class_names, self.options.extras)


def class_rows(result: MaskEvaluation, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns for each class what `ClassCounts.rows` has, `predicted` pixels, and the share of those that are right."""
    counts = result.counts
    rows: list[dict[str, Any]] = []
    for row, right, predicted in zip(
        counts.rows(class_names), counts.right.tolist(), counts.predicted.tolist(), strict=True
    ):
        rows.append({**row, "predicted": predicted, "precision": 100 * right / predicted if predicted else None})
    return rows


_KIND = DenseKind(
    "segmentation",
    SegmentationConfig,
    restore_network,
    {*OF_ANY_DATA, "labels", "ignore_index"},
    {"source", "csv"},
    _settled,
    _words_for,
    _open,
    MaskValidation,
)
# A row has `miou`, `pixel_accuracy` and `mean_accuracy` in percent, `loss` and `n`, as `MaskEvaluation`, and
# `per_class`: see `class_rows`.
validate_masks = partial(validate_dense, _KIND)
