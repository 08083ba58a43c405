"""The training loop: one for training from scratch, fine-tuning and pre-training alike."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.optim import Lookahead
from timm.utils import distribute_bn

from ..config import BaseConfig
from ..data import batches, running_workers, worker_errors
from ..errors import ConfigError, DataError, RunStopped, TrainingError, before_processes_meet, counted
from ..tasks.network import find_network, name_network
from ..tasks.task import AnyBatch, Evaluation
from .agreement import check_agreement, check_best
from .build import Run, build_run
from .cache import cache_images
from .checkpoint import save_checkpoint
from .distributed import World, join_world
from .early_stop import stop_reason
from .evaluate import evaluate, shown
from .kernels_used import kernels_used
from .logging import RunLog
from .meter import peak_memory
from .prepare import Job, as_config, prepare
from .report import Curves, draw_first_batch, finish
from .signals import StopSignal, ignore_stop_signals
from .starting_probe import StartingProbe
from .state import TrainState
from .step import FiniteCheck, StepResult, train_step
from .summary import describe_job

__all__ = ["Trainer", "train"]

_RUNNING = threading.Lock()


def train(
    config: BaseConfig | Mapping[str, Any] | str | Path, output: str | Path | None = None, resume: str = "auto"
) -> dict[str, Any]:
    """Trains, evaluates and saves until the last epoch.

    Under torchrun every process calls it, and they meet here.

    Args:
        config: the run: a `Config`, the same as plain types, or the path of a YAML file.
        output: the run folder: config.yaml, checkpoints/, metrics.jsonl, train.log, tensorboard/, pictures and
            report.json; None for `runs/NAME_OF_MODEL`.
        resume: 'auto' goes on where `output` stopped, if it has checkpoints; 'never' refuses such a folder; anything
            else is the path of a checkpoint to go on from.

    Returns:
        The report, as in report.json; empty on other processes than the main one.

    Raises:
        UserError: a mistake in the configuration, the data, the checkpoint or the output folder.
        TrainingError: the gradients are not finite.
        RunStopped: SIGTERM or SIGUSR1 came; the run is saved.
    """
    with before_processes_meet():
        config = name_network(as_config(config))
    world = World.from_environment()
    folder = Path(output) if output else Path("runs") / find_network(config).name
    if not _RUNNING.acquire(blocking=False):
        raise ConfigError(
            "another thread of this process is training, and would share its random numbers; use processes"
        )
    job = None
    try:
        job = prepare(config, folder, resume, world)
        # Until the processes have met, a signal has its usual effect: there is nothing to save, and a handler would not
        # run while a process waits for another in vain.
        with join_world(world, config.train.timeout_minutes) as world, StopSignal() as signal:
            check_agreement(job, world)
            check_best(job, world)
            with worker_errors():
                cache_images(job, world, signal)
                trainer = Trainer(job, world, signal)
                with running_workers(trainer.loader, trainer.val_loader):
                    return trainer.train()
    finally:
        _RUNNING.release()
        if job and job.lock:
            job.lock.close()


class Trainer:
    """A run in progress.

    Attributes:
        run: what is trained.
        state: how far it is.
        kernels: what computes it now; on the main process.
    """

    def __init__(self, job: Job, world: World, signal: StopSignal) -> None:
        self.job, self.config, self.plan, self.world, self.signal = job, job.config, job.plan, world, signal
        self.task = job.task
        statistics = self.task.statistics(job.config, job.train_source)
        self.run: Run = build_run(job.config, job.plan, world, job.model, statistics)
        self.check = FiniteCheck.of(self.run)
        self.kernels = kernels_used(self.config, world.device) if world.is_main else {}
        self.state = TrainState(job, self.run, self.kernels)
        if job.saved:
            self.state.restore(job.saved)
            job.saved = None  # its memory
        self._first_step = self.state.step
        self._probe = self._starting_probe()
        self.log = RunLog(
            job.output,
            self.plan.total_steps,
            self.state.step,
            self.config.log.tensorboard,
            world.is_main,
            self._misses_evaluation() or self._probe is not None,
            self.task.hidden_metrics(len(job.class_names)),
            self.task.metrics_of(job.config),
        )
        if self.run.graphs:
            self.run.graphs.say = self.log.say
        self.curves = Curves(self.state, self.log)
        self.sampler, self.loader = self.task.train_loader(self.config, job.train_source, world, ignore_stop_signals)
        self.val_loader = self.task.eval_loader(self.config, job.val_source, world, ignore_stop_signals)

    def train(self) -> dict[str, Any]:
        """Trains, evaluates and saves until the last epoch, and returns the report; empty but on the main process."""
        if self.world.is_main:
            lines = describe_job(self.job, self.world.size, self.kernels, self.state.kernels)
            self.log.say(*lines, *filter(None, [self.run.about_graphs]))
        is_done = False
        try:
            has_probe = self._fit_probe()  # before threads of trackers are there, as it forks workers
            self.log.begin(self.config.to_dict(), self.config.log.trackers, self.config.log.project)
            if has_probe:
                self._evaluate_probe()
            if self._misses_evaluation():
                self._evaluate_and_save()
            for epoch in range(self.state.epochs, self.plan.epochs):
                if self._stops_early():
                    break
                self.train_epoch(epoch)
                self._end_epoch(epoch)
            if not self.world.is_main:
                return {}
            report = finish(self.state, self.curves, self.log, self.loader.num_workers, self.kernels)
            is_done = True
            return report
        finally:
            self.log.close(is_done)
            self.run.release()

    def train_epoch(self, epoch: int) -> None:
        """Does the steps of an epoch that are still to be done."""
        state = self.state
        self.sampler.set_epoch(epoch, state.step - epoch * self.plan.steps_per_epoch)
        source = batches(self.loader)
        state.meter.start()
        while window := self._next_window(source):
            if state.step == 0 and self.world.is_main:
                draw_first_batch(self.state, window[0], self.log)
            result = train_step(self.run, window, state.step, self.check)
            state.step += 1
            self._count(window, result)
            if self._is_logged():
                self._log_step(result)
            stops = self.signal.agreed(self.world)
            if state.is_epoch_done:  # the evaluation comes first, so that a run that goes on there does not miss it
                continue
            if stops:
                self._save_and_stop()
            if self._is_saved_now():
                self._save(None)

    def _next_window(self, source: Iterator[AnyBatch]) -> list[AnyBatch]:
        """Returns the batches of the next step, one for each accumulation step; none at the end of the epoch."""
        step = self.state.step
        self.world.at(f"the data of step {step}")
        with self.state.meter.waiting():
            window = list(islice(source, self.config.train.accum_steps))
        if window:
            self.world.at(f"step {step}")
        return window

    def _count(self, window: Sequence[AnyBatch], result: StepResult) -> None:
        """Counts a step's loss and images on this process."""
        self.state.losses.add(result.loss)
        for batch in window:
            self.state.skipped.note("training", batch.skipped)
        self.log.advance()
        self.state.meter.images += sum(len(batch.images) for batch in window) * self.world.size

    def _is_logged(self) -> bool:
        """Returns whether this step has a log line: every `log.every_steps`, and once in an epoch of fewer steps."""
        every, epoch, step = self.config.log.every_steps, self.plan.steps_per_epoch, self.state.step
        return step % every == 0 or (self.state.is_epoch_done and step // every == (step - epoch) // every)

    def _log_step(self, result: StepResult) -> None:
        """Logs a step; every process calls it, because the loss is the mean over all of them and the steps since."""
        state = self.state
        self.check.read()
        self._exchange_skipped()
        row = {"loss": state.losses.mean(), "lr": result.lr, "grad_norm": float(result.grad_norm)}
        row |= {"memory_gib": peak_memory(self.world.device)} | state.meter.read()
        if all(map(math.isfinite, row.values())):
            self.log.step(state.step, math.ceil(state.step / self.plan.steps_per_epoch), row)
            state.losses.start()
        else:
            self.log.say(f"step {state.step}: an overflow in fp16; the step is left out and the scale lowered")

    def _end_epoch(self, epoch: int) -> None:
        if isinstance(self.run.optimizer, Lookahead):  # the network at the end of an epoch is that of the slow weights
            self.run.optimizer.sync_lookahead()
        self._exchange_skipped()
        self.check.read()
        self._average_batchnorm()
        if self.signal.finish() or any(self.world.gather(self.signal.name is not None)):
            self._save_and_stop()
        if self._is_evaluated(epoch):
            self._evaluate_and_save()
        elif self._is_saved_now():
            self._save(None)

    def _average_batchnorm(self) -> None:
        """Makes the running statistics of BatchNorm those of all processes."""
        if self.world.size > 1:
            distribute_bn(self.run.model, self.world.size, reduce=True)
            if self.run.ema:  # its BatchNorm statistics are each process's own; rank 0's are the ones that are saved
                distribute_bn(self.run.ema.module, self.world.size, reduce=False)

    def _is_evaluated(self, epoch: int) -> bool:
        return epoch + 1 == self.plan.epochs or (epoch + 1) % self.config.train.eval_every == 0

    def _misses_evaluation(self) -> bool:
        """Returns whether an evaluation is due before the next step.

        The run was stopped before the one at the end of an epoch, or is one without a best although it has ended: in a
        new folder, or where best.pt is lost.
        """
        state = self.state
        if not state.step or not state.is_epoch_done or not self._is_evaluated(state.epochs - 1):
            return False
        has_ended = state.epochs == self.plan.epochs or bool(stop_reason(self.config, state.history))
        return state.metric is None or (state.best_metric is None and has_ended)

    def _stops_early(self) -> bool:
        """Returns the same on every process: whether `train.early_stop` ends the run here, which it then says."""
        state = self.state
        if self.config.train.early_stop is None or not state.is_epoch_done:
            return False
        self.world.at("whether to stop early")
        why = self.world.gather(stop_reason(self.config, state.history))[0]
        if why:
            has_trained = state.step > self._first_step
            hint = "" if has_trained else "; to go on, raise train.early_stop.patience or set train.early_stop=null"
            self.log.say(f"stopped early after epoch {state.epochs} of {self.plan.epochs}: {why}{hint}")
        return bool(why)

    def _starting_probe(self) -> StartingProbe | None:
        """Returns the linear probe that is evaluated before the next step, if that is the run's first."""
        if self.state.step or self.state.history:
            return None
        probe = self.task.linear_probe(self.config, self.run.model, self.world.device)
        return StartingProbe(self.job, self.run, self.world, probe) if probe else None

    def _fit_probe(self) -> bool:
        """Returns whether the run begins with a linear probe, which is then fitted."""
        if not self._probe:
            return False
        problem = self._probe.fit(self.signal, self.state.skipped)
        if problem is None:
            self._save_and_stop()
        if problem:
            self.log.say(problem)
        return not problem

    def _evaluate_probe(self) -> None:
        """Evaluates the linear probe of the starting weights as epoch 0, which is best.pt until weights are better.

        Only best.pt is saved: a run that is stopped before its first step begins anew.
        """
        assert self._probe
        found = self._evaluate_weights()
        if found:
            self._save(*found, only_best=True)
        if not (found and self._probe.stays):
            self._probe.undo()
            self.state.metric = None
        if not found:
            self._save_and_stop()
        self.log.start_clock()

    def _evaluate_and_save(self) -> None:
        """Evaluates the weights and saves the run with the metrics."""
        found = self._evaluate_weights()
        if not found:  # saved without a metric: the evaluation is made up for when the run goes on
            self._save_and_stop()
        self._save(*found)
        if self.world.is_main and self.curves.are_due:
            self.curves.draw(False)

    def _evaluate_weights(self) -> tuple[float, bool] | None:
        """Evaluates the weights, and their average if there is one, and notes and logs the metrics.

        Returns:
            The headline metric, and whether they are the best so far; None if a signal came first.
        """
        state = self.state
        result = self._evaluate(self.run.model)
        if result is None:
            return None
        row = result.row(self.job.class_names)
        if self.run.ema:
            result = self._evaluate(self.run.ema.module)
            if result is None:
                return None
            row |= {f"ema_{key}": value for key, value in result.row(self.job.class_names).items() if key != "n"}
        self._exchange_skipped(int(row["n"]))
        self._check_evaluation(row)
        is_best = state.note_evaluation(row, result)
        self.log.evaluation(state.step, state.epochs, row, state.prefix if is_best else None)
        self.log.say(self._evaluation_line(row))
        if len(state.history) == 1 and (lines := self.task.about_first_evaluation(result, self.job.class_names)):
            self.log.say(*lines)
        return row[f"{state.prefix}{self.task.headline}"], is_best

    def _evaluate(self, model: torch.nn.Module) -> Evaluation | None:
        """Returns what an evaluation finds; None if a signal came first."""
        self.world.at("an evaluation")
        if self.run.graphs:
            self.run.graphs.make_room()
        total = len(self.job.val_source)  # 0 of a stream
        result = evaluate(
            model,
            shown(batches(self.val_loader), total, "validating", self.world.size, leave=False),
            self.world,
            self.run.autocast,
            self.task.evaluator(self.config, self.job.class_names, self.world.device),
            lambda: self.signal.name is not None,
            self.config.train.cuda_graph != "off" and not self.task.no_graph,
        )
        if result is not None:
            self.state.skipped.note("validation", result.skipped)
        return result

    def _check_evaluation(self, row: Mapping[str, float]) -> None:
        if not row["n"]:
            raise DataError(f"{self.job.val_source.name}: not one image could be read")
        keys = ("loss", self.task.headline)  # not every task has the first
        broken = [key for name in keys for key in (name, f"ema_{name}") if not math.isfinite(row.get(key, 0.0))]
        if broken:
            raise TrainingError(
                f"the validation {broken[0]} is not finite after step {self.state.step}: the weights have grown beyond "
                "all bounds and are not saved. Lower optim.base_lr or set optim.clip_grad"
            )

    def _evaluation_line(self, row: Mapping[str, float]) -> str:
        found = self.task.result_line(row, self.run.ema is not None, len(self.job.class_names))
        epoch = f"epoch {self.state.epochs}/{self.plan.epochs}" if self.state.step else "linear probe"
        return f"{epoch}  {found}  ({counted(int(row['n']), 'image')})"

    def _exchange_skipped(self, evaluated: int = 0) -> None:
        """Tells all processes which images could not be read, logs them and checks their number.

        Args:
            evaluated: how many validation images could be, after an evaluation.
        """
        skipped = self.state.skipped
        for reason in skipped.exchange():
            self.log.say(f"skipped: {reason}")
        skipped.check("training", len(self.job.train_source))
        if evaluated:
            skipped.check("validation", evaluated + len(skipped.reasons["validation"]))

    def _is_saved_now(self) -> bool:
        """Returns whether this step is saved without an evaluation: every `checkpoint.every_steps`."""
        every = self.config.checkpoint.every_steps
        return every is not None and self.state.step % every == 0

    def _save(self, metric: float | None, is_best: bool = False, only_best: bool = False) -> None:
        """Saves the run; every process calls it, and all fail if the main one does.

        Args:
            metric: the task's headline metric of these weights; None if they were not evaluated.
            is_best: whether they become best.pt.
            only_best: whether nothing else is written, so that no run goes on from them.
        """
        state = self.state
        self.check.read()
        self._exchange_skipped()
        state.metric = metric
        self.world.at(f"saving step {state.step}")
        losses = state.losses.state()
        folder, keep = self.job.output / "checkpoints", self.config.checkpoint.keep
        self.world.on_main(lambda: save_checkpoint(folder, state.checkpoint(losses), is_best, keep, only_best))

    def _save_and_stop(self) -> NoReturn:
        """Ends the run after a signal."""
        self._save(None)
        names = [name for name in self.world.gather(self.signal.name) if name]
        raise RunStopped(
            f"stopped by {names[0]} after step {self.state.step} of {self.plan.total_steps}, and saved; the same "
            "command goes on from there"
        )
