"""Prediction with a classifier, as the command sees it; see `registry.Predicting`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data import Skipped
from .explain import Explainer
from .inputs import ImageFile
from .options import PredictionOptions
from .predict import Prediction, Predictor
from .results import Results

__all__ = ["ClassPrediction"]

BATCH_SIZE = 32


class ClassPrediction:
    """A classifier that is ready to predict.

    Args:
        checkpoint: a file or folder that `load_model` takes.
        content: of it.
        options: how to predict.

    Raises:
        UserError: the file cannot be used for it, or an option is wrong.
    """

    def __init__(self, checkpoint: str | Path, content: Mapping[str, Any], options: PredictionOptions) -> None:
        self.predictor = Predictor(checkpoint, options.overrides, options.device, options.use_ema, content)
        self.options, explain = options, options.explain
        self.explainer = (
            Explainer(self.predictor, explain.class_name, explain.cam_stage, explain.stages) if explain else None
        )

    def __str__(self) -> str:
        return str(self.predictor)

    def results(self, folder: Path, images: Sequence[ImageFile]) -> Results:
        """See `registry.Predicting`."""
        return Results(folder, images, self.predictor, self.explainer)

    def predict(self, images: Sequence[ImageFile], results: Results | None) -> Iterator[Prediction | Skipped]:
        """See `registry.Predicting`."""
        preview = results.preview if results else None
        return self.predictor(images, self.options.topk, self.options.batch_size or BATCH_SIZE, preview)
