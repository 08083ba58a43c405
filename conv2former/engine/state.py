"""How far a run is: what a checkpoint holds of it, and how a checkpoint is restored."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import timm
import torch

from .. import __version__
from ..errors import CheckpointError, first_line
from ..tasks.network import find_network
from ..tasks.task import Evaluation
from .build import Run
from .early_stop import as_history_row
from .meter import MeanLoss, Meter
from .prepare import Job
from .skipped import SkippedImages

__all__ = ["TrainState"]


class TrainState:
    """How far a run is.

    Args:
        job: the run.
        run: what it trains.
        kernels: what computes it now, see kernels_used.py.

    Attributes:
        step: optimizer steps done.
        metric: the task's headline metric of these weights; None if they were not evaluated.
        best_metric, best_row: of the best weights so far, the headline metric, and epoch and all metrics; None so far.
        details: of the best weights so far, what the task keeps of an evaluation by its names; None so far.
        history: a row of `early_stop.columns` for every evaluation.
        skipped: the images that could not be read and why.
        losses: the training losses since the last logged step.
        meter: speed, and the time that training and waiting took.
        kernels: what computed the first step.
    """

    def __init__(self, job: Job, run: Run, kernels: Mapping[str, str]) -> None:
        self.job, self.run = job, run
        self.step = 0
        self.metric: float | None = None
        self.best_metric: float | None = None
        self.best_row: dict[str, Any] | None = None
        self.details: dict[str, Any] = dict.fromkeys(job.task.details)
        self.history: list[list[float]] = []
        self.skipped = SkippedImages(job.config.data, run.world, ("training", "validation"))
        self.losses, self.meter = MeanLoss(run.world), Meter()
        self.kernels = dict(kernels)
        self._seconds, self._since = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time spent on the run so far, in earlier attempts too."""
        return self._seconds + time.perf_counter() - self._since

    @property
    def epochs(self) -> int:
        """Whole epochs done."""
        return self.step // self.job.plan.steps_per_epoch

    @property
    def is_epoch_done(self) -> bool:
        """Whether the last step was the last of an epoch."""
        return self.step % self.job.plan.steps_per_epoch == 0

    @property
    def prefix(self) -> str:
        """Of the names of the metrics of the weights that loading a checkpoint takes: the average, if there is one."""
        return "ema_" if self.run.ema else ""

    def note_evaluation(self, row: dict[str, Any], evaluation: Evaluation) -> bool:
        """Notes the metrics of these weights.

        Args:
            row: all metrics.
            evaluation: of the weights that loading a checkpoint takes.

        Returns:
            Whether they are the best so far by `checkpoint.metric`, or as good and of the lower loss; a linear probe is
            as good within a standard error.
        """
        metrics = self.job.task.metrics_of(self.job.config)
        before = [
            kept for kept in self.history if kept[0] < self.epochs
        ]  # one that is made up for may be there already
        self.history = [*before, as_history_row(metrics, self.epochs, row, self.prefix)]
        if not self._is_best(row):
            return False
        self.best_metric = row[f"{self.prefix}{self.job.task.headline}"]
        self.best_row, self.details = {"epoch": self.epochs, **row}, evaluation.details()
        return True

    def _is_best(self, row: dict[str, Any]) -> bool:
        if self.best_metric is None:
            return True
        task, metric = self.job.task, self.job.config.checkpoint.metric
        key, loss = f"{self.prefix}{metric}", f"{self.prefix}loss"
        # older checkpoints may have no row
        best = {f"{self.prefix}{task.headline}": self.best_metric, **(self.best_row or {})}
        if key not in best:  # of a version that did not count it: the best from here on
            return True
        error = 0.0
        if best.get("epoch") == 0 and task.metrics[metric].is_percent:
            # A linear probe is evaluated once, what is trained many times, so that the highest of its accuracies
            # flatters: within a standard error they are equal.
            error = math.sqrt(sum(value * (100 - value) for value in (row[key], best[key])) / row["n"])
        if abs(row[key] - best[key]) > error:
            return task.metrics[metric].is_better(row[key], best[key])
        return loss in best and loss in row and row[loss] < best[loss]

    def checkpoint(self, losses: list[list[float]]) -> dict[str, Any]:
        """Returns the content of a checkpoint; see checkpoint.py for what is in it.

        Args:
            losses: of all processes, as `MeanLoss.state` returns them.
        """
        run, config = self.run, self.job.config
        return {
            "step": self.step,
            "epoch": self.epochs,
            "model": run.model.state_dict(),
            "model_ema": run.ema.module.state_dict() if run.ema else None,
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict() if run.scaler.is_enabled() else None,
            "metric": self.metric,
            "best_metric": self.best_metric,
            "best_row": self.best_row,
            **self.details,
            "history": self.history,
            "class_names": self.job.class_names,
            "skipped": self.skipped.reasons,
            "losses": losses,
            "config": config.to_dict(),
            "variant": find_network(config).to_dict(),
            "plan": self.job.plan_of_data,
            "started_from": self.job.started_from,
            "kernels": self.kernels,
            "seconds": self.seconds,
            "time": {"training": self.meter.seconds, "waiting": self.meter.waited},
            # str: torch's version is a class of its own, which a safe load would refuse
            "versions": {"torch": str(torch.__version__), "timm": timm.__version__, "conv2former": __version__},
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes a checkpoint's state, also into the network, its average, the optimizer and the scaler.

        Raises:
            CheckpointError: it does not fit this run.
        """
        try:
            self._restore(saved)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as e:  # of torch, about shapes
            raise CheckpointError(f"the checkpoint to go on from does not fit this run ({first_line(e)})") from None

    def _restore(self, saved: Mapping[str, Any]) -> None:
        run = self.run
        run.model.load_state_dict(saved["model"])
        if run.ema:
            run.ema.module.load_state_dict(saved["model_ema"])
        run.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:
            run.scaler.load_state_dict(saved["scaler"])
        self.step, self.metric, self.best_metric = saved["step"], saved["metric"], saved["best_metric"]
        self.best_row, self.history = saved.get("best_row"), saved.get("history") or []
        self.details = {key: saved.get(key) for key in self.job.task.details}
        self.job.task.check_details(self.details, len(self.job.class_names))
        self.skipped.restore(saved.get("skipped") or {})
        self.losses = MeanLoss(run.world, saved.get("losses"))
        spent = saved.get("time") or {"training": 0.0, "waiting": 0.0}
        self.meter = Meter(spent["training"], spent["waiting"])
        self.kernels = saved.get("kernels") or self.kernels
        self._seconds = saved.get("seconds", 0.0)
