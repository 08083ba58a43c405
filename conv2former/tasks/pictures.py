"""Pictures that tasks draw: images with captions, confusions, reliability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..text import clipped

__all__ = [
    "batch_figure",
    "confused_pairs",
    "confusion_figure",
    "grid_figure",
    "many_confusions_figure",
    "reliability_figure",
    "seen_pixels",
]


def batch_figure(
    images: torch.Tensor,
    targets: torch.Tensor,
    class_names: list[str],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    smoothing: float = 0.0,
) -> Figure:
    """Draws up to 32 training images as the network sees them, each with its label or mixture of labels.

    Args:
        images: (N, channels, H, W), normalised.
        targets: (N,) class indices, or (N, classes) shares as mixup makes them.
        class_names: in index order.
        mean, std: of the normalisation.
        smoothing: of the labels, taken off the shares that are shown.
    """
    pixels = [seen_pixels(image, mean, std) for image in images[:32]]
    captions = [_label(target.cpu(), class_names, smoothing) for target in targets[: len(pixels)]]
    return grid_figure(pixels, captions)


def seen_pixels(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Returns a normalised image, (channels, H, W), as it is drawn: (H, W, 3) from 0 to 1, grey as three equal ones."""
    scale, offset = (torch.tensor(values).view(-1, 1, 1) for values in (std, mean))
    shown = (image.detach().float().cpu() * scale + offset).clamp(0, 1).permute(1, 2, 0)
    return shown.expand(-1, -1, 3).numpy()


def grid_figure(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    columns: int = 8,
    size: float = 1.7,
    colours: Any = None,
    title: str = "",
) -> Figure:
    """Draws images in rows, each with the caption above it.

    Args:
        images: each (H, W, 3), uint8 or float in [0, 1], of any size.
        captions: one for each, of any number of lines; markup in them is not read.
        columns: images in a row, at most.
        size: width and height of an image, inches.
        colours: of the captions, one for each; None for black.
        title: above all, of lines for which four images are wide enough.
    """
    columns = max(1, min(columns, len(images)))
    rows = max(1, -(-len(images) // columns))
    lines = max((caption.count("\n") + 1 for caption in captions), default=1)
    height = (size + 0.13 * lines + 0.1) * rows
    if title:
        columns, height = max(columns, 4), height + 0.1 + 0.2 * (title.count("\n") + 1)
    figure = Figure(figsize=(size * columns, height), layout="constrained", dpi=100)
    figure.suptitle(title, fontsize=10, parse_math=False)
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if i < len(images):
            axes.imshow(images[i])
            axes.set_title(captions[i], fontsize=7, color=colours[i] if colours else "black", parse_math=False)
    return figure


def _label(target: torch.Tensor, class_names: list[str], smoothing: float) -> str:
    if target.ndim == 0:
        return _short(class_names[int(target)])
    off = smoothing / len(class_names)
    shares = (target.float() - off) / (1 - smoothing)
    values, indices = shares.topk(min(2, len(class_names)))
    parts = [
        f"{_short(class_names[int(index)])} {value:.2f}"
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        if value > 5e-3
    ]
    return "\n".join(parts)


def _short(name: str, length: int = 18) -> str:
    return clipped(name, length)


def confusion_figure(
    counts: list[list[int]], class_names: list[str], title: str = "Validation images of best.pt"
) -> Figure:
    """Draws a confusion matrix, shares of each true class as colour and counts as numbers.

    Args:
        counts: a row per true class, a column per predicted one.
        class_names: in index order.
        title: above it.
    """
    table = torch.tensor(counts)
    shares = table / table.sum(1, keepdim=True).clamp(min=1)
    side = min(16.0, max(6.5, 3.0 + 0.45 * len(class_names)))
    figure = Figure(figsize=(side, side), layout="constrained", dpi=100)
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    names = [_short(name) for name in class_names]
    axes.set_xticks(ticks, names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=8, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    figure.suptitle(title, fontsize=10, parse_math=False)  # above all: beside long names a title of the axes is cut
    for row, column in torch.nonzero(table).tolist():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row][column]), ha="center", va="center", fontsize=7, color=colour)
    return figure


def confused_pairs(counts: torch.Tensor, limit: int | None = None) -> list[tuple[int, int, int]]:
    """Returns (true class, predicted class, images) of the mistakes in a confusion matrix, the most frequent first.

    Of pairs with as many images, those come first where it is a larger share of the true class's.
    """
    wrong = counts.clone()
    wrong.fill_diagonal_(0)
    sizes = counts.sum(1)
    pairs = [(int(row), int(column), int(wrong[row, column])) for row, column in torch.nonzero(wrong)]
    return sorted(pairs, key=lambda pair: (-pair[2], int(sizes[pair[0]]), pair[:2]))[:limit]


def many_confusions_figure(counts: torch.Tensor, class_names: list[str], title: str, unit: str = "images") -> Figure:
    """Draws the confusions of more classes than a table with numbers can show: a map, and the most frequent ones.

    Args:
        counts: (classes, classes), a row per true class.
        class_names: in index order.
        title: above it.
        unit: what is counted.
    """
    figure = Figure(figsize=(16, 8.5), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2, width_ratios=[1, 0.8])
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).float()
    cells = -(-len(counts) // 250)  # classes in a cell; the largest share of a cell is shown, so that none is lost
    pooled = torch.nn.functional.max_pool2d(shares[None], cells, ceil_mode=True)[0]
    # the root: one image of fifty would be as good as white
    shown = left.imshow(
        pooled.sqrt().numpy(),
        cmap="Blues",
        vmin=0,
        vmax=1,
        extent=(0, len(counts), len(counts), 0),
        interpolation="none",
    )
    bar = figure.colorbar(shown, ax=left, shrink=0.7, label="share of the true class")
    ticks = (0, 0.02, 0.1, 0.25, 0.5, 1)
    bar.set_ticks([tick**0.5 for tick in ticks], labels=[f"{tick:.0%}" for tick in ticks])
    together = f", the largest share of {cells} x {cells} in a dot" if cells > 1 else ""
    left.set(xlabel="predicted class, by index", ylabel="true class, by index")
    left.set_title(f"All {len(counts):,} classes{together}")
    figure.suptitle(title, fontsize=12, parse_math=False)
    pairs = confused_pairs(counts, 30)
    if not pairs:
        right.set_axis_off()
        right.text(0.5, 0.5, "No mistakes", ha="center", va="center", fontsize=14, transform=right.transAxes)
        return figure
    sizes = counts.sum(1)
    places = range(len(pairs))
    right.barh(places, [count for *_, count in pairs], color="tab:blue", height=0.7)
    names = [f"{_short(class_names[true], 24)} → {_short(class_names[said], 24)}" for true, said, _ in pairs]
    right.set_yticks(places, names, fontsize=9, parse_math=False)
    for place, (true, _, count) in zip(places, pairs, strict=True):
        right.text(count, place, f" {count} of {int(sizes[true])}", va="center", fontsize=8)
    right.set_ylim(29.6, -0.6)
    right.margins(x=0.15)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel=unit, title="Most frequent: true → predicted")
    right.spines[["top", "right"]].set_visible(False)
    return figure


def reliability_figure(sums: torch.Tensor, error: float, title: str) -> Figure:
    """Draws accuracy against confidence, and how many images have which.

    Args:
        sums: (3, bins): images, right ones, and the sum of confidences, of equally wide bins of confidence.
        error: the expected calibration error, 0 to 1.
        title: above it.
    """
    images, right, confidence = (row.numpy() for row in sums)
    bins = len(images)
    width = 1 / bins
    middles = (np.arange(bins) + 0.5) * width
    used = images > 0
    accuracy = right[used] / images[used]
    figure = Figure(figsize=(6, 7.5), layout="constrained", dpi=110)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
    upper.bar(middles[used], accuracy, width, color="tab:blue", edgecolor="white", label="accuracy of the bin")
    mean = confidence[used] / images[used]
    upper.plot(mean, accuracy, "o", color="black", ms=4, label="accuracy at its mean confidence", clip_on=False)
    upper.plot([0, 1], [0, 1], "--", color="grey", label="confidence equals accuracy")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    heading = f"{title}\nexpected calibration error {100 * error:.2f} %"
    figure.suptitle(heading, fontsize=10, parse_math=False)
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)  # inside it would hide a bar
    lower.bar(middles, images, width, color="tab:grey", edgecolor="white")
    for middle, count in zip(middles, images, strict=True):
        lower.text(middle, count, f"{int(count):,}" if count else "", ha="center", va="bottom", fontsize=7)
    lower.margins(y=0.15)
    lower.yaxis.get_major_locator().set_params(integer=True)
    lower.set(xlabel="confidence of the answer", ylabel="images")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure
