"""Pictures of a segmentation: the first batch, and the images of the lowest IoU beside truth and answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ...text import clipped
from ..dense.pictures import add_legend, laid_over
from ..dense.thumbnails import as_numbers, as_photo, colours
from ..pictures import seen_pixels

__all__ = ["batch_figure", "worst_figure"]

MOST_CROPS = 8
WORST = "Validation images of the lowest IoU, best.pt"


def batch_figure(
    images: torch.Tensor, targets: torch.Tensor, class_names: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> Figure:
    """Draws up to eight training crops as the network sees them, each above its classes.

    Args:
        images: (N, channels, H, W), normalised.
        targets: (N, H, W), -1 where a pixel is ignored, which is white.
        class_names: in index order.
        mean, std: of the normalisation.
    """
    palette = colours(len(class_names))
    photos = [seen_pixels(image, mean, std) for image in images[:MOST_CROPS]]
    masks = [palette[target.cpu().numpy()] for target in targets[:MOST_CROPS]]
    figure = Figure(figsize=(1.9 * len(photos) + 0.4, 4.6), layout="constrained", dpi=100)
    grid = figure.subplots(2, len(photos), squeeze=False)
    for column, pair in enumerate(zip(photos, masks, strict=True)):
        for axes, pixels in zip(grid[:, column], pair, strict=True):
            axes.set_axis_off()
            axes.imshow(pixels, interpolation="nearest")
    there = {int(index) for index in targets[:MOST_CROPS].unique() if index >= 0}
    add_legend(figure, class_names, palette, there)
    return figure


def worst_figure(worst: Sequence[Sequence[Any]], class_names: Sequence[str], title: str = WORST) -> Figure | None:
    """Draws images of the lowest IoU: photo, truth and answer side by side, the classes laid over the photo.

    Args:
        worst: of each IoU in percent, place, name, and the `Thumbnails`.
        class_names: in index order.
        title: above all.
    """
    if not worst:
        return None
    palette = colours(len(class_names))
    figure = Figure(figsize=(10.5, 2.5 * len(worst) + 0.9), layout="constrained", dpi=100)
    grid = figure.subplots(len(worst), 3, squeeze=False)
    there: set[int] = set()
    for row, (iou, _, name, *texts) in zip(grid, worst, strict=True):
        photo, truth, answer = as_photo(texts[0]), as_numbers(texts[1]), as_numbers(texts[2])
        there |= {int(index) for values in (truth, answer) for index in np.unique(values) if index >= 0}
        shown = (photo, laid_over(photo, palette[truth]), laid_over(photo, palette[answer]))
        captions = (clipped(name, 60, keep_end=True), "truth; white: ignored", f"answer, IoU {iou:.1f} %")
        for axes, pixels, caption in zip(row, shown, captions, strict=True):
            axes.set_axis_off()
            axes.imshow(pixels, interpolation="nearest", aspect="equal")
            axes.set_title(caption, fontsize=7, parse_math=False)
    figure.suptitle(title, fontsize=10, parse_math=False)
    add_legend(figure, class_names, palette, there)
    return figure
