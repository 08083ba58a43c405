"""What the command line says about a prediction, whatever the network's task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ExplainOptions", "PredictionOptions"]


@dataclass(frozen=True)
class ExplainOptions:
    """How a prediction is explained; see `explain.Explainer`.

    Attributes:
        class_name: the class to explain; None for the predicted one.
        cam_stage: of the class activation map; None for the one that suits the images.
        stages: of the modulation; None for those that suit.
    """

    class_name: str | None = None
    cam_stage: int | None = None
    stages: Sequence[int] | None = None


@dataclass(frozen=True)
class PredictionOptions:
    """How to predict.

    Attributes:
        overrides: of how images become inputs, `data.img_size=224`.
        device: where to compute, 'auto', 'cpu' or 'cuda'.
        use_ema: take the averaged weights where the file has them.
        topk: classes of an image that are shown.
        batch_size: images at a time; None for what suits the task.
        explain: explain each prediction; None for no explanations.
        crops: cut out what a detection finds.
    """

    overrides: Sequence[str] = ()
    device: str = "auto"
    use_ema: bool = True
    topk: int = 5
    batch_size: int | None = None
    explain: ExplainOptions | None = None
    crops: bool = False
