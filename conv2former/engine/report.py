"""What a run shows of itself: the first batch, the curves now and then, at the end confusions and the report."""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

from ..tasks.network import find_network
from ..tasks.task import AnyBatch
from .checkpoint import check_best_and_last
from .early_stop import stop_reason
from .logging import RunLog, read_metrics, writing
from .meter import describe_waiting
from .state import TrainState
from .step import prepare_batch

__all__ = ["Curves", "draw_first_batch", "finish"]

DRAW_EVERY = 30.0  # seconds, at least, between two pictures of the curves
DRAWING_SHARE = 0.01  # of the run's time that drawing them may take


def draw_first_batch(state: TrainState, batch: AnyBatch, log: RunLog) -> None:
    """Draws a batch as the next step will see it, if the task has a picture of it."""
    batch = copy.deepcopy(batch)  # mixup mixes in place, and the step is still to come
    inputs, targets = prepare_batch(state.run, batch, state.step, 0)
    figure = state.job.task.batch_figure(state.run.config, inputs, targets, state.job.class_names)
    if figure is not None:
        log.picture("first_batch", figure, 0)


class Curves:
    """The picture of the logged curves, drawn in a small share of the run's time."""

    def __init__(self, state: TrainState, log: RunLog) -> None:
        self.state, self.log = state, log
        self._drawn, self._cost = time.perf_counter(), 0.0  # when they were last drawn, and for how long

    @property
    def are_due(self) -> bool:
        return time.perf_counter() - self._drawn >= max(DRAW_EVERY, self._cost / DRAWING_SHARE)

    def draw(self, in_tensorboard: bool) -> Path:
        """Draws them, with the best epoch so far, and returns the picture's path."""
        from .pictures import curves_figure

        start = time.perf_counter()
        best = self.state.best_row
        figure = curves_figure(self.state.job.task, read_metrics(self.log.path), best["epoch"] if best else None)
        path = self.log.picture("curves", figure, self.state.step, in_tensorboard)
        self._drawn = time.perf_counter()
        self._cost = self._drawn - start
        return path


def finish(state: TrainState, curves: Curves, log: RunLog, workers: int, kernels: dict[str, str]) -> dict[str, Any]:
    """Draws the curves and the task's pictures, and writes the report, which is that of best.pt, and returns it.

    Args:
        state: of the run, at its end.
        curves, log: of the run.
        workers: of the training loader.
        kernels: what computes the run now.
    """
    job = state.job
    pictures: dict[str, str | None] = {"curves": str(curves.draw(True))}
    waited = state.meter.share_waited
    if waited is not None:
        log.say(describe_waiting(waited, state.meter.seconds, workers, job.config.data.source))
    for name, figure in job.task.result_figures(state.details, job.class_names).items():
        pictures[name] = None if figure is None else str(log.picture(name, figure, state.step))
    check_best_and_last(job.output / "checkpoints")
    report = _report(state, waited, kernels) | pictures
    with writing(job.output):
        temporary = job.output / "report.json.tmp"
        temporary.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(temporary, job.output / "report.json")
    return report


def _report(state: TrainState, waited: float | None, kernels: dict[str, str]) -> dict[str, Any]:
    job, best, prefix = state.job, state.best_row, state.prefix
    assert best is not None
    metrics = {key.removeprefix(prefix): value for key, value in best.items() if key.startswith(prefix)}
    return {
        "task": job.task.name,
        "folder": str(job.output),
        "model": find_network(job.config).name,
        "started_from": job.config.model.checkpoint,
        **job.task.report(metrics, state.details, job.class_names),
        "n": best["n"],
        "weights": "average" if state.run.ema else "raw",
        "epoch": best["epoch"],
        "epochs": job.plan.epochs,
        "epochs_done": state.epochs,
        "stopped_early": stop_reason(job.config, state.history) if state.epochs < job.plan.epochs else "",
        "steps": state.step,
        "global_batch_size": job.plan.global_batch_size,
        "skipped": len(state.skipped),
        "seconds": round(state.seconds, 1),
        "data_wait": waited,
        "checkpoint": str(job.output / "checkpoints" / "best.pt"),
        "last_checkpoint": str(job.output / "checkpoints" / "last.pt"),
        f"last_{job.task.headline}": state.metric,
        "kernels": kernels,
        "cuda_graphs": len(state.run.graphs.shapes) if state.run.graphs else 0,
        "tensorboard": str(job.output / "tensorboard") if job.config.log.tensorboard else None,
    }
