"""Pictures of a run: its first batch, its curves, its confusions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

__all__ = ["batch_figure", "confusion_figure", "curves_figure", "grid_figure"]


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
        images: (N, 3, H, W), normalised.
        targets: (N,) class indices, or (N, classes) shares as mixup makes them.
        class_names: in index order.
        mean, std: of the normalisation.
        smoothing: of the labels, taken off the shares that are shown.
    """
    scale, offset = torch.tensor(std).view(1, 3, 1, 1), torch.tensor(mean).view(1, 3, 1, 1)
    shown = images[:32].detach().float().cpu() * scale + offset
    pixels = [image.permute(1, 2, 0).numpy() for image in shown.clamp(0, 1)]
    captions = [_label(target.cpu(), class_names, smoothing) for target in targets[: len(pixels)]]
    return grid_figure(pixels, captions)


def grid_figure(
    images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8, size: float = 1.7, colours: Any = None
) -> Figure:
    """Draws images in rows, each with the caption above it.

    Args:
        images: each (H, W, 3), uint8 or float in [0, 1], of any size.
        captions: one for each, of any number of lines; markup in them is not read.
        columns: images in a row, at most.
        size: width and height of an image, inches.
        colours: of the captions, one for each; None for black.
    """
    columns = max(1, min(columns, len(images)))
    rows = max(1, -(-len(images) // columns))
    lines = max((caption.count("\n") + 1 for caption in captions), default=1)
    figure = Figure(figsize=(size * columns, (size + 0.13 * lines + 0.1) * rows), layout="constrained", dpi=100)
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
    return name if len(name) <= length else name[: length - 1] + "…"


def curves_figure(rows: list[dict[str, Any]]) -> Figure:
    """Draws loss and accuracy over the epochs.

    Args:
        rows: of metrics.jsonl.
    """
    evals = [row for row in rows if row["kind"] == "eval"]
    train = [row for row in rows if row["kind"] == "train"]
    steps_per_epoch = max((row["step"] / row["epoch"] for row in evals), default=1)
    figure = Figure(figsize=(11, 4), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    left.plot([r["step"] / steps_per_epoch for r in train], [r["loss"] for r in train], lw=1, label="training")
    left.plot([r["epoch"] for r in evals], [r["loss"] for r in evals], marker=".", label="validation")
    left.set(xlabel="epoch", ylabel="loss", title="Loss (training: of one step, on augmented images)")
    for key, label in (("top1", "top-1"), ("ema_top1", "top-1, averaged weights")):
        points = [(r["epoch"], r[key]) for r in evals if key in r]
        if points:
            right.plot(*zip(*points, strict=True), marker=".", label=label)
    right.set(xlabel="epoch", ylabel="%", title="Validation accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def confusion_figure(counts: list[list[int]], class_names: list[str]) -> Figure:
    """Draws a confusion matrix, shares of each true class as colour and counts as numbers.

    Args:
        counts: a row per true class, a column per predicted one.
        class_names: in index order.
    """
    table = torch.tensor(counts)
    shares = table / table.sum(1, keepdim=True).clamp(min=1)
    side = min(16.0, 3.0 + 0.45 * len(class_names))
    figure = Figure(figsize=(side, side), layout="constrained", dpi=100)
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    names = [_short(name) for name in class_names]
    axes.set_xticks(ticks, names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=8, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true", title="Validation images of best.pt")
    for row, column in torch.nonzero(table).tolist():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row][column]), ha="center", va="center", fontsize=7, color=colour)
    return figure
