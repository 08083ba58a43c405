"""Whether a run still gets better: a function of all that was evaluated.

The decision to stop is computed anew from all evaluations, which every checkpoint holds, so that a run that was killed
decides as one that never stopped, and another setting counts from the first evaluation on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..config import BaseConfig
from ..errors import counted
from ..tasks.registry import find_task
from ..tasks.task import Metric

__all__ = ["as_history_row", "columns", "stop_reason"]


def columns(metrics: Mapping[str, Metric]) -> tuple[str, ...]:
    """Returns the names of what a row of the history has; `metrics` are those of a run, see `Task.metrics_of`."""
    return ("epoch", *metrics)


def as_history_row(metrics: Mapping[str, Metric], epoch: int, row: Mapping[str, float], prefix: str) -> list[float]:
    """Returns what the history has of an evaluation: `columns`, the metrics those whose keys begin with `prefix`."""
    return [epoch, *(row[f"{prefix}{key}"] for key in metrics)]


def stop_reason(config: BaseConfig, history: Sequence[Sequence[float]]) -> str:
    """Returns why `train.early_stop` ends a run after the last evaluation, or '' if it goes on.

    Args:
        config: the run.
        history: a row of `columns` for every evaluation, in order.
    """
    settings = config.train.early_stop
    history = [row for row in history if row[0]]  # that of a linear probe, epoch 0, tells of no progress
    if settings is None or not history:
        return ""
    metrics = find_task(config).metrics_of(config)
    key = settings.metric or config.checkpoint.metric
    metric, column = metrics[key], columns(metrics).index(key)
    best, since = history[0], 0
    for row in history[1:]:
        is_progress = metric.is_better(row[column], best[column], settings.min_delta)
        best, since = (row, 0) if is_progress else (best, since + 1)
    if since < settings.patience:
        return ""
    moved = "risen" if metric.higher_is_better else "fallen"
    unit = " points" if metric.is_percent else ""
    by = f" by more than {settings.min_delta:g}{unit}" if settings.min_delta else ""
    evaluations = counted(since, "evaluation")
    value = metric.text(best[column])
    return f"{metric.label} has not {moved}{by} for {evaluations} (best: {value} at epoch {int(best[0])})"
