"""What pictures of dense tasks share: classes laid over a photo, and a legend of their colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ...text import clipped

__all__ = ["add_legend", "laid_over"]

MOST_IN_LEGEND = 40
OPACITY = 0.55  # of the classes over an image


def laid_over(photo: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Returns a photo with colours over it, both (H, W, 3) of 0 to 255."""
    return (OPACITY * colour + (1 - OPACITY) * photo).astype(np.uint8)


def add_legend(figure: Figure, class_names: Sequence[str], palette: np.ndarray, there: set[int]) -> None:
    """Names the colours of the classes that are in a picture, below it."""
    shown = sorted(there)[:MOST_IN_LEGEND]
    patches = [Patch(color=tuple(palette[i] / 255), label=clipped(class_names[i], 24)) for i in shown]
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=min(8, len(patches) or 1), fontsize=7)
    for text in legend.get_texts():
        text.set_parse_math(False)
