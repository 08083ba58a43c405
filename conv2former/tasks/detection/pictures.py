"""Pictures of a detection: the first batch, the images of the most mistakes beside truth and answer, confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from ...errors import counted
from ...text import clipped, columns_of
from ..classification.evaluation import MAX_CONFUSION_CLASSES
from ..dense.pictures import add_legend, laid_over
from ..dense.thumbnails import as_numbers, as_photo, colours
from ..pictures import confusion_figure, many_confusions_figure, seen_pixels
from .placing import label_places

__all__ = ["batch_figure", "confusions_figure", "worst_figure"]

MOST_CROPS = 8
WORST = "Validation images of the most mistakes, best.pt"
BACKGROUND = "background"
THIN, THICK = 1.0, 2.2  # lines of boxes, points; thick ones are mistakes
LETTERS = 5.5  # points
LETTER_WIDTH, LINE_HEIGHT = 0.62 * LETTERS, 1.5 * LETTERS  # with the border of a label
NAME = 14  # columns of a class's name in a label
CELL = (3.3, 2.3)  # width and height of an image among the worst, inches
CROP = (2.6, 2.2)  # of a training image


def batch_figure(
    images: Sequence[torch.Tensor],
    targets: Sequence[Mapping[str, torch.Tensor]],
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> Figure:
    """Draws up to eight training images as the network sees them, with boxes, classes and masks.

    Args:
        images: each (channels, h, w), normalised.
        targets: of each `boxes` (n, 4), `labels` (n,) and perhaps `masks` (n, h, w).
        class_names: in index order.
        mean, std: of the normalisation.
    """
    palette = colours(len(class_names))
    shown = min(MOST_CROPS, len(images))
    columns, rows = max(1, min(4, shown)), max(1, -(-shown // 4))
    figure = Figure(figsize=(CROP[0] * columns + 0.4, CROP[1] * rows + 0.6), layout="constrained", dpi=100)
    grid = figure.subplots(rows, columns, squeeze=False)
    there: set[int] = set()
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, target in zip(grid.flat, images, targets, strict=False):
        pixels, labels = 255 * seen_pixels(image, mean, std), target["labels"].cpu().tolist()
        if "masks" in target and labels:
            masks = target["masks"].cpu().bool()
            numbers = torch.where(masks.any(0), masks.to(torch.uint8).argmax(0), -1)
            pixels = _with_masks(pixels, numbers.numpy(), labels, palette)
        axes.imshow(pixels.astype(np.uint8), interpolation="nearest", aspect="equal")
        words = [clipped(class_names[i], NAME) for i in labels]
        _draw(axes, pixels.shape[:2], CROP, palette, target["boxes"].cpu().tolist(), labels, words)
        there |= set(labels)
    add_legend(figure, class_names, palette, there)
    return figure


def worst_figure(
    worst: Sequence[Sequence[Any]], score: float | None, class_names: Sequence[str], title: str = WORST
) -> Figure | None:
    """Draws images with mistakes: photo, truth and answer side by side; mistakes have thick lines, groups dotted ones.

    Args:
        worst: of each what `Worst.plain` returns.
        score: from which detections count.
        class_names: in index order.
        title: above all.
    """
    if not worst:
        return None
    palette = colours(len(class_names))
    figure = Figure(figsize=(3 * CELL[0] + 0.4, (CELL[1] + 0.25) * len(worst) + 0.9), layout="constrained", dpi=100)
    grid = figure.subplots(len(worst), 3, squeeze=False)
    there: set[int] = set()
    for row, (_, objects, _, name, photo_text, *mask_texts, truth, answer) in zip(grid, worst, strict=True):
        photo = as_photo(photo_text)
        there |= {*truth["labels"], *answer["labels"]}
        captions = (
            f"truth: {counted(objects, 'object')}, {sum(truth['missed'])} missed",
            f"answer: {counted(len(answer['boxes']), 'box', 'boxes')}, {sum(answer['wrong'])} wrong",
        )
        _show(row[0], photo, clipped(name, 60, keep_end=True))
        for axes, side, text, caption in zip(row[1:], (truth, answer), mask_texts, captions, strict=True):
            labels, mistakes = side["labels"], side.get("missed") or side.get("wrong") or []
            words = [clipped(class_names[i], NAME) for i in labels]
            if "scores" in side:
                words = [f"{word} {value:.2f}" for word, value in zip(words, side["scores"], strict=True)]
            pixels = _with_masks(photo, as_numbers(text), labels, palette) if text else photo
            _show(axes, pixels, caption)
            _draw(axes, photo.shape[:2], CELL, palette, side["boxes"], labels, words, mistakes, side.get("crowd", ()))
    since = "" if score is None else f"; boxes of score {score:.2f} and above, thick: wrong or missed"
    figure.suptitle(f"{title}{since}", fontsize=10, parse_math=False)
    add_legend(figure, class_names, palette, there)
    return figure


def confusions_figure(
    confusion: Sequence[Sequence[int]], score: float | None, class_names: Sequence[str], title: str
) -> Figure:
    """Draws what objects were taken for: a table of few classes, the most frequent confusions of many.

    Args:
        confusion: (classes + 1, classes + 1), see `confusion_of`.
        score: from which detections count.
        class_names: in index order.
        title: above all.
    """
    names = [*class_names, BACKGROUND]
    if score is not None:
        title += f"\nboxes of score {score:.2f} and above, at an IoU of 0.5 and more with an object"
    if len(names) > MAX_CONFUSION_CLASSES:
        return many_confusions_figure(torch.tensor(confusion), names, title, "objects")
    return confusion_figure([list(row) for row in confusion], names, title)


def _show(axes: Axes, pixels: np.ndarray, caption: str) -> None:
    axes.set_axis_off()
    axes.imshow(pixels, interpolation="nearest", aspect="equal")
    axes.set_title(caption, fontsize=7, parse_math=False)


def _with_masks(photo: np.ndarray, numbers: np.ndarray, labels: Sequence[int], palette: np.ndarray) -> np.ndarray:
    """Returns a photo with its objects in their classes' colours, (H, W, 3).

    Args:
        photo: (H, W, 3) of 0 to 255.
        numbers: which object a pixel is of, (H, W); -1 for none, as one that is not shown.
        labels: of the objects that are shown.
        palette: a colour for each class.
    """
    is_shown = (numbers >= 0) & (numbers < len(labels))
    colour = palette[np.array([*labels, -1])[np.where(is_shown, numbers, -1)]]
    return np.where(is_shown[..., None], laid_over(photo, colour), photo)


def _draw(
    axes: Axes,
    size: tuple[int, ...],
    cell: tuple[float, float],
    palette: np.ndarray,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    words: Sequence[str],
    mistakes: Sequence[bool] = (),
    dotted: Sequence[bool] = (),
) -> None:
    """Draws boxes over an image, and the words of those for which there is room.

    Args:
        axes: with the image.
        size: of it, height and width in pixels.
        cell: width and height that it is drawn in, inches, at most.
        palette: a colour for each class.
        boxes: left, top, right, bottom, the most important first.
        labels, words: of each.
        mistakes: whether a box has a thick line; empty for none.
        dotted: whether it has a dotted one; empty for none.
    """
    pixels = max(size[0] / cell[1], size[1] / cell[0]) / 72  # of a point
    sizes = [(pixels * (LETTER_WIDTH * columns_of(word) + 2), pixels * LINE_HEIGHT) for word in words]
    places = label_places(boxes, sizes, (size[1], size[0]))
    for i in reversed(range(len(boxes))):  # the most important last, and so above the others
        left, top, right, bottom = boxes[i]
        colour = tuple(palette[labels[i]] / 255)
        width = THICK if i < len(mistakes) and mistakes[i] else THIN
        style = ":" if i < len(dotted) and dotted[i] else "-"
        outline = Rectangle(
            (left - 0.5, top - 0.5), right - left, bottom - top, fill=False, ec=colour, lw=width, ls=style
        )
        outline.set_path_effects([withStroke(linewidth=width + 0.8, foreground="white")])  # to be seen on any photo
        axes.add_patch(outline)
        if place := places[i]:
            box = {"facecolor": colour, "edgecolor": "none", "pad": 0.6}
            ink = "black" if palette[labels[i]] @ (0.299, 0.587, 0.114) > 140 else "white"
            x, y = place[0] + pixels, place[1] + sizes[i][1] / 2
            axes.text(
                x, y, words[i], fontsize=LETTERS, color=ink, va="center", bbox=box, parse_math=False, clip_on=True
            )
