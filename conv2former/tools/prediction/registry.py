"""What predicts with a checkpoint of each task; the command knows them by `Predicting` alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...errors import ConfigError
from ...weights.reading import read_checkpoint
from ..kinds import kind_for
from .classification import ClassPrediction
from .detection import BoxPrediction
from .folder import AnyResults
from .inputs import ImageFile
from .options import PredictionOptions
from .segmentation import MaskPrediction

__all__ = ["Predicting", "open_predicting"]


class AnyPrediction(Protocol):
    """What was found for one image; as text, on one line."""

    @property
    def name(self) -> str:
        """Of the image, as it was given or found."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the object of its JSON line."""


class Predicting(Protocol):
    """A network that is ready to predict; as text, lines on what it is and how images become its input."""

    def results(self, folder: Path, images: Sequence[ImageFile]) -> AnyResults:
        """Returns results to be written into an empty folder."""

    def predict(self, images: Sequence[ImageFile], results: Any | None) -> Iterator[Any]:
        """Predicts images in their order, each an `AnyPrediction`, or a `Skipped` that cannot be read.

        Args:
            images: see `find_images`.
            results: of `results`, to which each prediction will be added; None for none.
        """


# by the task: from a file's path, its content and the options to a `Predicting`
_KINDS: dict[str, Any] = {"classification": ClassPrediction, "segmentation": MaskPrediction, "detection": BoxPrediction}


def open_predicting(checkpoint: str | Path, options: PredictionOptions) -> Predicting:
    """Returns what predicts with a weight file.

    Raises:
        UserError: the file cannot be used for it, or the options do not go with it.
    """
    content = read_checkpoint(checkpoint)
    kind = kind_for(_KINDS, checkpoint, content)
    if options.crops and kind is not BoxPrediction:
        raise ConfigError(f"--crops: of the boxes of a detection, and {checkpoint} gives none; leave it out")
    found: Predicting = kind(checkpoint, content, options)
    return found
