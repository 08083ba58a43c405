"""What is counted of a segmentation's answers: exact, whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...data import Skipped
from ...data.pixels import normalize
from ...errors import shorten
from ..dense.thumbnails import Thumbnails, thumbnails
from ..task import Processes
from .config import SegmentationConfig
from .inference import Answerer
from .labels import IGNORED, as_targets
from .loader import EvalBatch

__all__ = ["ClassCounts", "MaskEvaluation", "MaskEvaluator", "about_missing", "image_iou"]

FEW_CLASSES = 50  # whose IoU is logged for each


@dataclass(frozen=True)
class ClassCounts:
    """Pixels of every class, (classes,) int64 each: right ones, those that are of it, those that were taken for it."""

    right: torch.Tensor
    truth: torch.Tensor
    predicted: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]] | torch.Tensor) -> ClassCounts:
        return cls(*torch.as_tensor(rows).unbind(0))

    @property
    def is_there(self) -> torch.Tensor:
        """Which classes occur in the masks; the others have no IoU, and are in no mean."""
        return self.truth > 0

    @property
    def iou(self) -> torch.Tensor:
        """Intersection over union in percent, (classes,) float64; NaN of a class that does not occur."""
        union = self.truth + self.predicted - self.right
        return torch.where(self.is_there, 100 * self.right.double() / union.clamp(min=1), math.nan)

    @property
    def recall(self) -> torch.Tensor:
        """The share of a class's pixels that are right, in percent, as `iou`."""
        return torch.where(self.is_there, 100 * self.right.double() / self.truth.clamp(min=1), math.nan)

    def metrics(self) -> dict[str, float]:
        """Returns the means over the classes that occur, and over the pixels, in percent; 0 where there is none."""
        if not self.is_there.any():
            return {"miou": 0.0, "pixel_accuracy": 0.0, "mean_accuracy": 0.0}
        return {
            "miou": float(self.iou.nanmean()),
            "pixel_accuracy": 100 * int(self.right.sum()) / int(self.truth.sum()),
            "mean_accuracy": float(self.recall.nanmean()),
        }

    def rows(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Returns for each class its name, pixels, IoU and recall; None where it does not occur."""
        found = zip(class_names, self.truth.tolist(), self.iou.tolist(), self.recall.tolist(), strict=True)
        return [
            {"class": name, "pixels": pixels, "iou": iou if pixels else None, "recall": recall if pixels else None}
            for name, pixels, iou, recall in found
        ]


def about_missing(rows: Sequence[dict[str, Any]]) -> str:
    """Returns words about the classes without a pixel, which are left out of the means; '' if there are none."""
    missing = [row["class"] for row in rows if not row["pixels"]]
    if not missing:
        return ""
    return f"no pixel of {shorten(missing, 10)}, left out of the means over the classes"


class ImageResult(NamedTuple):
    """What an image adds to the loss: the sum over its pixels, and how many they are."""

    loss: float
    pixels: int


class Worst(NamedTuple):
    """An image of a low IoU: its place and name, its IoU in percent, and its pictures."""

    iou: float
    place: int
    name: str
    pictures: Thumbnails


def image_iou(counts: torch.Tensor) -> float:
    """Returns the mean IoU in percent over the classes that an image has, from its confusions; NaN where it has none.

    Args:
        counts: (classes, classes) int64, a row per true class.
    """
    found = ClassCounts(counts.diag(), counts.sum(1), counts.sum(0))
    return float(found.iou.nanmean())


@dataclass(frozen=True)
class MaskEvaluation:
    """What an evaluation found, over all processes.

    Attributes:
        metrics: `miou`, `pixel_accuracy` and `mean_accuracy` in percent, the mean cross-entropy `loss` of a pixel, and
            the number of images `n`.
        confusion: (classes, classes) int64 pixels, a row per true class.
        worst: the images of the lowest IoU, the lowest first.
        skipped: this process's unreadable images.
    """

    metrics: dict[str, float]
    confusion: torch.Tensor
    worst: list[Worst]
    skipped: list[Skipped]

    @property
    def counts(self) -> ClassCounts:
        """Pixels of every class."""
        return ClassCounts(self.confusion.diag(), self.confusion.sum(1), self.confusion.sum(0))

    def row(self, class_names: Sequence[str]) -> dict[str, float]:
        """Returns the metrics, and the IoU of every class that occurs where there are few enough to look at."""
        if len(class_names) > FEW_CLASSES:
            return self.metrics
        rows = self.counts.rows(class_names)
        return self.metrics | {f"iou/{row['class']}": row["iou"] for row in rows if row["iou"] is not None}

    def details(self) -> dict[str, Any]:
        """Returns the counts of every class, and the worst images with their pictures, as plain types."""
        counts = self.counts
        rows = [counts.right.tolist(), counts.truth.tolist(), counts.predicted.tolist()]
        return {"pixels": rows, "worst": [[w.iou, w.place, w.name, *w.pictures] for w in self.worst]}


class MaskEvaluator:
    """Counts a network's answers on this process, and adds them up over all.

    Args:
        config: the run.
        device: of the network.
    """

    def __init__(self, config: SegmentationConfig, device: torch.device) -> None:
        evaluation, images = config.evaluation, config.data.preprocessing
        window = config.window if evaluation.mode == "slide" else None
        self.answerer = Answerer(window, evaluation.overlap, evaluation.flip)
        self.pictures, self.device = evaluation.pictures, device
        self.mean, self.std = (torch.tensor(values, device=device) for values in (images.mean, images.std))
        self.memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.confusion: torch.Tensor | None = None  # a row per true class; None until there is an answer
        self.results: list[ImageResult] = []
        self.worst: list[Worst] = []

    def update(self, answer: Callable[[torch.Tensor], torch.Tensor], batch: EvalBatch) -> None:
        """Counts a batch: images of one size are answered together, in their order."""
        of_size: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(batch.images):
            of_size.setdefault(tuple(image.shape), []).append(i)
        for members in of_size.values():
            pixels = torch.stack([batch.images[i] for i in members]).to(self.device, non_blocking=True)
            images = normalize(pixels.permute(0, 2, 3, 1), self.mean, self.std).permute(0, 3, 1, 2)
            images = images.contiguous(memory_format=self.memory_format)
            sizes = [(batch.masks[i].shape[0], batch.masks[i].shape[1]) for i in members]
            for i, log_shares in zip(members, self.answerer(answer, images, sizes), strict=True):
                self._count(log_shares, batch, i)

    def _count(self, log_shares: torch.Tensor, batch: EvalBatch, i: int) -> None:
        """Counts an image: (classes, H, W) log-probabilities."""
        targets = as_targets(batch.masks[i].to(self.device, non_blocking=True))
        predicted = log_shares.argmax(0)
        counts = targets != IGNORED
        truth, answers, classes = targets[counts], predicted[counts], log_shares.shape[0]
        confusion = torch.bincount(truth * classes + answers, minlength=classes**2).view(classes, classes)
        self.confusion = confusion if self.confusion is None else self.confusion + confusion
        losses = torch.nn.functional.nll_loss(log_shares[None], targets[None], ignore_index=IGNORED, reduction="none")
        self.results.append(ImageResult(float(losses.double().sum()), int(counts.sum())))
        iou = image_iou(confusion.cpu())
        if self.pictures and not math.isnan(iou):
            key = (iou, batch.places[i])
            if len(self.worst) < self.pictures or key < self.worst[-1][:2]:
                pictures = thumbnails(batch.images[i], targets.cpu(), predicted.cpu())
                self.worst = self._first([*self.worst, Worst(*key, batch.names[i], pictures)])

    def _first(self, worst: list[Worst]) -> list[Worst]:
        return sorted(worst, key=lambda image: image[:2])[: self.pictures]

    def total(self, world: Processes, skipped: list[Skipped]) -> MaskEvaluation:
        """Returns the result over all processes; every one must call it.

        The losses of the images are added up exactly, so that their sum is the same in any order.
        """
        classes = max(world.gather(0 if self.confusion is None else len(self.confusion)))
        if self.confusion is None:  # a process without images knows no number of classes
            self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
        confusion = world.sum(self.confusion).cpu()
        results = [result for results in world.gather(self.results) for result in results]
        worst = self._first([image for images in world.gather(self.worst) for image in images])
        counts = ClassCounts(confusion.diag(), confusion.sum(1), confusion.sum(0))
        pixels = sum(result.pixels for result in results)
        loss = math.fsum(result.loss for result in results) / max(1, pixels)
        metrics = {**counts.metrics(), "loss": loss, "n": len(results)}
        return MaskEvaluation(metrics, confusion, worst, skipped)
