"""Which of two evaluations is the better one, and whether a run still gets better: functions of what was evaluated.

The decision to stop is computed anew from all evaluations, which every checkpoint holds, so that a run that was killed
decides as one that never stopped, and another setting counts from the first evaluation on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..config import Config
from ..errors import counted

__all__ = ["COLUMNS", "as_history_row", "is_better", "stop_reason"]

COLUMNS = ("epoch", "top1", "loss", "macro_f1", "balanced_accuracy")  # of a row of the history
NAMES = {"top1": "top-1", "loss": "the loss", "macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy"}


def is_better(metric: str, value: float, best: float, min_delta: float = 0.0) -> bool:
    """Returns whether a value is better than the best one by more than `min_delta`: lower of the loss, else higher."""
    return value < best - min_delta if metric == "loss" else value > best + min_delta


def as_history_row(epoch: int, row: Mapping[str, float], prefix: str) -> list[float]:
    """Returns what the history has of an evaluation: `COLUMNS`, the metrics those whose keys begin with `prefix`."""
    return [epoch, *(row[f"{prefix}{key}"] for key in COLUMNS[1:])]


def stop_reason(config: Config, history: Sequence[Sequence[float]]) -> str:
    """Returns why `train.early_stop` ends a run after the last evaluation, or '' if it goes on.

    Args:
        config: the run.
        history: a row of `COLUMNS` for every evaluation, in order.
    """
    settings = config.train.early_stop
    if settings is None or not history:
        return ""
    metric = settings.metric or config.checkpoint.metric
    column = COLUMNS.index(metric)
    best, since = history[0], 0
    for row in history[1:]:
        is_progress = is_better(metric, row[column], best[column], settings.min_delta)
        best, since = (row, 0) if is_progress else (best, since + 1)
    if since < settings.patience:
        return ""
    moved, unit, value = ("fallen", "", f"{best[column]:.4f}")
    if metric != "loss":
        moved, unit, value = "risen", " points", f"{best[column]:.2f} %"
    by = f" by more than {settings.min_delta:g}{unit}" if settings.min_delta else ""
    evaluations = counted(since, "evaluation")
    return f"{NAMES[metric]} has not {moved}{by} for {evaluations} (best: {value} at epoch {int(best[0])})"
