"""Prediction of boxes: what is where in images from anywhere, as photos with boxes, COCO's results and crops."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...config import apply_overrides
from ...data.images import any_size
from ...errors import counted
from ...tasks.detection.augment import EvalTransform
from ...tasks.detection.config import UNUSED_AUGMENT, UNUSED_DATA, DetectionConfig
from ...tasks.detection.inference import Finder
from ...tasks.detection.objects import Detections
from ...tasks.detection.restore import restore_network
from ...tasks.detection.results import coco_results
from ...text import printable
from .dense import QUALITY, DensePrediction, DenseResults, Loaded, dense_settings, distinct
from .drawing import annotated
from .inputs import ImageFile
from .options import PredictionOptions
from .results import MAX_BARS

__all__ = ["BoxPrediction", "PredictedBoxes", "class_folders", "settings_from"]

SETTINGS = {
    "data": ("short_side", "long_side", "mean", "std", "value_range", "max_image_pixels", "workers"),
    "evaluation": ("score", "nms", "max_detections"),
}  # keys that matter here
SHOWN_SCORE = 0.5  # of a box that is shown, where nothing else is asked for; an evaluation needs lower ones, too
LONGEST_NAME = 80  # letters of a folder


@dataclass(frozen=True)
class PredictedBoxes:
    """What was found for one image.

    Attributes:
        place: of the image among those that were given.
        name: of the image, as it was given or found.
        size: height and width of the upright photo.
        found: the boxes, in its pixels.
        class_names, names: of the classes, in the checkpoint and for people.
        photo: the image; None if it was not asked for.
        topk: how many classes the text names.
        score: of a box that is shown, at least.
    """

    place: int
    name: str
    size: tuple[int, int]
    found: Detections
    class_names: Sequence[str]
    names: Sequence[str]
    photo: Image.Image | None
    topk: int
    score: float

    def lines(self) -> list[dict[str, Any]]:
        """Returns the detections in COCO's result format, with the image's place from 1 and its name, and classes."""
        categories = range(1, len(self.class_names) + 1)
        found = coco_results(self.found, self.place + 1, categories)
        return [
            {**line, "file_name": self.name, "category": self.class_names[line["category_id"] - 1]} for line in found
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns the object of a JSON line; boxes are left, top, width and height in pixels."""
        found = []
        for line, index in zip(self.lines(), self.found.labels.tolist(), strict=True):
            about = {"class": self.class_names[index], "index": index, "name": self.names[index]}
            found.append(about | {key: line[key] for key in ("score", "bbox", "segmentation") if key in line})
        height, width = self.size
        return {"image": self.name, "size": [width, height], "detections": found}

    def __str__(self) -> str:
        """Returns how many boxes each class has, and its highest score, the highest first."""
        best: dict[int, list[float]] = {}
        for index, score in zip(self.found.labels.tolist(), self.found.scores.tolist(), strict=True):
            best.setdefault(index, []).append(score)
        if not best:
            return f"nothing of score {self.score:g} and above"
        parts = [f"{len(scores)} {printable(self.names[index])} ({scores[0]:.2f})" for index, scores in best.items()]
        more = len(parts) - self.topk
        return ", ".join(parts[: self.topk]) + (f", {counted(more, 'more class', 'more classes')}" if more > 0 else "")


def settings_from(noted: Mapping[str, Any], overrides: Sequence[str]) -> DetectionConfig:
    """Returns how images become inputs and which boxes are shown; see `dense_settings`."""
    fixed = {"evaluation": {"score": SHOWN_SCORE}, "augment": UNUSED_AUGMENT, "data": UNUSED_DATA}
    found: DetectionConfig = dense_settings(SETTINGS, noted, overrides, **fixed)
    return found


class BoxPrediction(DensePrediction):
    """A detector that is ready to predict; see there."""

    def __init__(self, checkpoint: str | Path, content: Mapping[str, Any], options: PredictionOptions) -> None:
        kind = "a detection, whose boxes say where"
        super().__init__(checkpoint, content, options, restore_network, settings_from, kind)
        self.model.limit(self.config.evaluation)
        self.finder = Finder(self.config, self.device)
        given = apply_overrides({}, options.overrides).get("evaluation", {})
        self.is_score_given = "score" in given

    def __str__(self) -> str:
        evaluation, data = self.config.evaluation, self.config.data
        classes = counted(len(self.names), "class", "classes")
        about = f"{self.title}, {self.config.model.detector.name}: {classes}, {self.weights}, on {self.device}"
        default = "" if self.is_score_given else " (evaluation.score)"
        return (
            f"{printable(about)}\nimages: shorter side {data.short_side} pixels, longer one at most {data.long_side}; "
            f"boxes of score {evaluation.score:g} and above{default}, at most {evaluation.max_detections:,} of an image"
        )

    def results(self, folder: Path, images: Sequence[ImageFile]) -> BoxResults:
        """See `registry.Predicting`."""
        return BoxResults(folder, images, self)

    def transform(self) -> EvalTransform:
        data = self.config.data
        return EvalTransform(data.short_side, data.long_side, data.preprocessing.channels)

    @torch.inference_mode()
    def answers(self, items: Sequence[Loaded]) -> list[Detections]:
        return self.finder(self.model, [item.pixels for item in items], [item.size for item in items])

    def prediction(self, place: int, item: Loaded, answer: Detections) -> PredictedBoxes:
        return PredictedBoxes(
            place,
            item.name,
            item.size,
            answer,
            self.class_names,
            self.names,
            item.photo,
            self.options.topk,
            self.config.evaluation.score,
        )


# ------------------------------------------------------------------------------------------------------------- results


class BoxResults(DenseResults):
    """Results being written: photos with boxes, detections.json and perhaps crops, and what all dense tasks leave."""

    def __init__(self, folder: Path, images: Sequence[ImageFile], predicting: BoxPrediction) -> None:
        score = predicting.config.evaluation.score
        note = f"boxes of score {score:g} and above; below: the highest scores"
        super().__init__(folder, images, predicting, note)
        self.crops = predicting.options.crops
        self.folders = class_folders(predicting.class_names)
        self.lines: list[str] = []
        self.cut = 0

    def add(self, prediction: PredictedBoxes) -> dict[str, Any]:
        """Adds an image; returns the object of its JSON line."""
        own, photo, found = self.files[prediction.place], prediction.photo, prediction.found
        assert photo is not None
        record = {**prediction.to_dict(), "annotated": f"annotated/{own}.jpg"}
        with any_size():
            picture = annotated(photo, found, prediction.names, self.predicting.palette)
            picture.save(self.path(record["annotated"]), quality=QUALITY)
            if self.crops:
                self._cut_out(record, own, photo.convert("RGB"), found)
        self.lines += [json.dumps(line) for line in prediction.lines()]
        self.write_record(record)
        bars = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
        self.show_picture(prediction.name, photo.size, picture, [*bars][:MAX_BARS])
        return record

    def _cut_out(self, record: dict[str, Any], own: str, photo: Image.Image, found: Detections) -> None:
        """Writes what is in each box, whole pixels and at least one, into a folder of its class."""
        for i, (box, label) in enumerate(zip(found.boxes.tolist(), found.labels.tolist(), strict=True)):
            left, top = (min(math.floor(value), side - 1) for value, side in zip(box, photo.size, strict=False))
            right, bottom = (max(math.ceil(box[2]), left + 1), max(math.ceil(box[3]), top + 1))
            name = f"crops/{self.folders[label]}/{own}_{i + 1}.jpg"
            photo.crop((left, top, right, bottom)).save(self.path(name), quality=QUALITY)
            record["detections"][i]["crop"] = name
            self.cut += 1

    def finish(self) -> None:
        """Writes detections.json and the last sheet."""
        text = "[" + ",\n".join(self.lines) + "]\n"
        (self.folder / "detections.json").write_text(text, encoding="utf-8")
        super().finish()

    def __str__(self) -> str:
        crops = f", {counted(self.cut, 'crop')}" if self.crops else ""
        pictures = counted(self.count, "photo with boxes", "photos with boxes")
        return f"{super().__str__()}, {pictures}, detections.json{crops}, legend.png"


def class_folders(class_names: Sequence[str]) -> list[str]:
    """Returns the name of a folder for each class: without slashes, and none that leads elsewhere."""
    plain = [re.sub(r"[^\w\- .]", "_", name)[:LONGEST_NAME].strip(" .") or "class" for name in class_names]
    return distinct(plain)
