"""Metrics of every class, and their means over the classes, from counts: exact, whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import counted, shorten

__all__ = ["ClassMetrics", "about_missing"]


@dataclass(frozen=True)
class ClassMetrics:
    """Recall, precision and F1 of every class, as scikit-learn defines them.

    Attributes:
        images: (classes,) how many there are, int64.
        answered: (classes,) how often the class was the answer, int64.
        hits: (classes,) how often rightly, int64.
    """

    images: torch.Tensor
    answered: torch.Tensor
    hits: torch.Tensor

    @classmethod
    def of(cls, counts: torch.Tensor | Sequence[Sequence[int]]) -> ClassMetrics:
        """Takes the total of `tallies.PerClass`, (4, classes), also as nested lists."""
        images, hits, _, answered = torch.as_tensor(counts, dtype=torch.int64)
        return cls(images, answered, hits)

    @property
    def recall(self) -> torch.Tensor:
        """Percent of a class's images that got it as the answer, (classes,) float64; NaN without images."""
        return 100 * self.hits.double() / self.images

    @property
    def precision(self) -> torch.Tensor:
        """Percent of a class's answers that were right, (classes,) float64; NaN where it never was the answer."""
        return 100 * self.hits.double() / self.answered

    @property
    def f1(self) -> torch.Tensor:
        """Harmonic mean of both, percent, (classes,) float64; NaN where there is neither an image nor an answer."""
        return 200 * self.hits.double() / (self.images + self.answered)

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have images, percent; NaN if none has."""
        return float(self.recall.nanmean())

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that have images or were an answer, percent; NaN if none has or was."""
        return float(self.f1.nanmean())

    def recalls(self, class_names: Sequence[str]) -> dict[str, float]:
        """Returns `recall/NAME` in percent of every class that has images."""
        pairs = zip(class_names, self.recall.tolist(), strict=True)
        return {f"recall/{name}": recall for name, recall in pairs if not math.isnan(recall)}

    def rows(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Returns a row for every class: its name, `images`, `answered`, and percentages, None where undefined."""
        percentages = [[_defined(value) for value in of.tolist()] for of in (self.recall, self.precision, self.f1)]
        columns = (class_names, self.images.tolist(), self.answered.tolist(), *percentages)
        keys = ("class", "images", "answered", "recall", "precision", "f1")
        return [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]


def about_missing(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a sentence on the classes without images among `ClassMetrics.rows`, '' if all have some."""
    names = [row["class"] for row in rows if not row["images"]]
    if not names:
        return ""
    have = "has no image: it has" if len(names) == 1 else "have no images: they have"
    return (
        f"{len(names):,} of {counted(len(rows), 'class', 'classes')} {have} no recall, and no part in balanced "
        f"accuracy ({shorten(names, 5)})"
    )


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
