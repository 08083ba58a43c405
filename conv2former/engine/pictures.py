"""The picture of a run's curves."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..tasks.task import Task

__all__ = ["curves_figure"]

FEW_POINTS = 50  # of a curve, each of which is drawn as a dot, too


def curves_figure(task: Task, rows: list[dict[str, Any]], best_epoch: int | None = None) -> Figure:
    """Draws the loss and the task's headline metric over the epochs, from the start to the last point.

    Args:
        task: of the run.
        rows: of metrics.jsonl.
        best_epoch: to mark; None for none.
    """
    evals = [row for row in rows if row["kind"] == "eval"]
    train = [row for row in rows if row["kind"] == "train"]
    steps_per_epoch = max((row["step"] / row["epoch"] for row in evals if row["epoch"]), default=1)
    figure = Figure(figsize=(11, 4), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    headline, metric = task.headline, task.metrics[task.headline]
    has_ema = any(f"ema_{headline}" in row for row in evals)
    averaged = ", averaged weights"
    trained = [(row["step"] / steps_per_epoch, row["loss"]) for row in train]
    lines = [(left, "training", trained, 1.0)]
    for axes, key, label in (
        (left, "loss", "validation"),
        (left, "ema_loss", f"validation{averaged}"),
        (right, headline, metric.label),
        (right, f"ema_{headline}", f"{metric.label}{averaged}"),
    ):
        points = [(row["epoch"], row[key]) for row in evals if key in row]
        lines.append((axes, label, [point for point in points if point[0]], 1.5))
        for point in points:
            if not point[0] and not key.startswith("ema_"):  # the training does not begin there
                axes.plot(*point, "D", ms=6, color="tab:green", label="linear probe", zorder=2.5)
    for axes, label, points, width in lines:
        if points:
            marker = "." if len(points) <= FEW_POINTS else ""
            size = 10 if len(points) == 1 else 5
            axes.plot(*zip(*points, strict=True), marker=marker, ms=size, lw=width, label=label)
    key = f"ema_{headline}" if has_ema else headline
    for row in evals:
        if row["epoch"] == best_epoch and key in row:
            name = f"epoch {best_epoch}" if best_epoch else "linear probe"
            label = f"best: {name}, {metric.text(row[key])}"
            right.plot(best_epoch, row[key], "*", ms=13, color="black", zorder=3, label=label)
            left.axvline(best_epoch, color="black", lw=0.8, ls=":")
    left.set(ylabel="loss", title="Loss (training: mean since the last point, augmented images)")
    right.set(ylabel="%" if metric.is_percent else metric.label, title=task.curve_title)
    _scale(left, 0.2)
    _scale(right, 10.0 if metric.is_percent else 0.2)
    if metric.is_percent:
        right.set_ylim(max(right.get_ylim()[0], -2), min(right.get_ylim()[1], 102))
    return figure


def _scale(axes: Axes, least: float) -> None:
    """Scales curves: epochs from 0, at whole numbers, and a range of values of `least` or more, for a single point."""
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if not axes.lines:
        return
    axes.set_xlim(0, max(1.0, axes.dataLim.x1) * 1.04)
    low, high = axes.dataLim.y0, axes.dataLim.y1
    if high - low < least:
        axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)
    axes.legend(fontsize=9)
