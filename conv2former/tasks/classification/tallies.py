"""What an evaluation can count beyond its metrics. Each keeps counts or a few images, never all logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional as F

from ..task import Processes

__all__ = ["BINS", "Answers", "Calibration", "Mistake", "PerClass", "RealLabels", "Tally", "Worst", "calibration_error"]

BINS = 15  # of confidence, equally wide


@dataclass(frozen=True)
class Answers:
    """A network's answers to one batch: (N, classes) float32 logits, (N,) labels, (N,) places in the data set."""

    logits: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor

    @cached_property
    def top(self) -> torch.Tensor:
        """The best five classes, or all where there are fewer, best first: (N, 5)."""
        return self.logits.topk(min(5, self.logits.shape[1])).indices

    @cached_property
    def hits(self) -> torch.Tensor:
        """Which of `top` is the label: (N, 5), at most one in a row."""
        return self.top == self.labels[:, None]

    @cached_property
    def shares(self) -> torch.Tensor:
        """Softmax of the logits: (N, classes)."""
        return self.logits.softmax(1)


class Tally(Protocol):
    """Something that is counted batch by batch on every process, and added up at the end."""

    def update(self, answers: Answers) -> None:
        """Counts a batch."""

    def total(self, world: Processes) -> Any:
        """Returns the result over all processes; every one must call it."""


class PerClass:
    """For every class: images, right ones by top-1 and top-5, and how often it was the answer.

    The total is (4, classes) int64.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.counts = torch.zeros(4, num_classes, dtype=torch.int64, device=device)

    def update(self, answers: Answers) -> None:
        labels, hits = answers.labels, answers.hits.long()
        one = torch.ones_like(labels)
        for row, (classes, times) in enumerate(
            ((labels, one), (labels, hits[:, 0]), (labels, hits.sum(1)), (answers.top[:, 0], one))
        ):
            self.counts[row].index_add_(0, classes, times)  # not bincount, for which a GPU is waited for

    def total(self, world: Processes) -> torch.Tensor:
        return world.sum(self.counts).cpu()


class Calibration:
    """For `BINS` bins of top-1 confidence, (0, 1/15] to (14/15, 1]: images, right ones, and the sum of confidences.

    The total is (3, BINS) float64.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        self.edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64, device=device)[1:-1]

    def update(self, answers: Answers) -> None:
        confidence = answers.shares.amax(1).double()
        bins = torch.bucketize(confidence, self.edges)
        for row, values in enumerate((torch.ones_like(confidence), answers.hits[:, 0].double(), confidence)):
            self.sums[row].index_add_(0, bins, values)

    def total(self, world: Processes) -> torch.Tensor:
        return world.sum(self.sums).cpu()


def calibration_error(sums: torch.Tensor) -> float:
    """Returns the expected calibration error, 0 to 1, of a `Calibration` total.

    It is the mean over images of |accuracy - confidence| of their bin.
    """
    images, right, confidence = sums
    return float((right - confidence).abs().sum() / images.sum().clamp(min=1))


class Mistake(NamedTuple):
    """An image that was taken for another class; `place` is its index in the data set, confidences are 0 to 1."""

    loss: float
    place: int
    label: int
    predicted: int
    confidence: float
    label_confidence: float


class Worst:
    """The `count` mistakes of the highest loss, a list of `Mistake`, worst first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.mistakes: list[Mistake] = []

    def update(self, answers: Answers) -> None:
        wrong = (~answers.hits[:, 0]).nonzero()[:, 0]
        losses = F.cross_entropy(answers.logits[wrong], answers.labels[wrong], reduction="none")
        chosen = losses.topk(min(self.count, len(losses))).indices
        rows = wrong[chosen]
        labels, predicted, shares = answers.labels[rows], answers.top[rows, 0], answers.shares[rows]
        columns = (
            losses[chosen],
            answers.indices.to(rows.device)[rows],
            labels,
            predicted,
            shares.gather(1, predicted[:, None])[:, 0],
            shares.gather(1, labels[:, None])[:, 0],
        )
        found = [Mistake(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        self.mistakes = self._first(self.mistakes + found)

    def total(self, world: Processes) -> list[Mistake]:
        return self._first([mistake for mistakes in world.gather(self.mistakes) for mistake in mistakes])

    def _first(self, mistakes: list[Mistake]) -> list[Mistake]:
        return sorted(mistakes, key=lambda mistake: (-mistake.loss, mistake.place))[: self.count]


class RealLabels:
    """Right answers by more than one label per image, as ReaL has them for ImageNet; images without one are left out.

    The total is (3,) int64: images that have labels, right ones by top-1, by top-5.

    Args:
        labels: (images of the data set, most labels of one) class indices, filled up with -1.
    """

    def __init__(self, labels: torch.Tensor, device: torch.device) -> None:
        self.labels = labels
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)

    def update(self, answers: Answers) -> None:
        labels = self.labels[answers.indices].to(self.counts.device)
        hits = (answers.top[:, :, None] == labels[:, None, :]).any(2)
        has_labels = (labels >= 0).any(1)
        self.counts += torch.stack([has_labels.sum(), hits[:, 0].sum(), hits.any(1).sum()])

    def total(self, world: Processes) -> torch.Tensor:
        return world.sum(self.counts).cpu()
