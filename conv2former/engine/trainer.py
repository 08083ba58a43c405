"""The training loop: one for training from scratch, fine-tuning and pre-training alike."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.optim import Lookahead
from timm.utils import distribute_bn
from torch.utils.data import DataLoader

from .. import __version__
from .._preprocessing import size_text
from ..config import Config, Plan, differences, fit_batch, make_plan
from ..data import (
    Batch,
    EpochSampler,
    batches,
    eval_loader,
    open_train_and_val,
    start_workers,
    train_loader,
    worker_errors,
)
from ..errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RunStopped,
    TrainingError,
    before_processes_meet,
    bullets,
    counted,
    first_line,
    shorten,
)
from .build import Run, build_run, check_names
from .checkpoint import check_best_and_last, latest_checkpoint, link_last, save_checkpoint, take_best
from .distributed import World, join_world
from .evaluate import SMALL_SPLIT, Evaluation, evaluate, has_top5, one_image, shown, with_error
from .images import settle_images
from .kernels_used import changed_kernels, kernels_used
from .logging import RunLog, read_metrics, writing
from .meter import MeanLoss, Meter, describe_waiting
from .network import build_model, drop_path_rate_of, find_variant_of, name_network
from .prepare import Job, as_config, prepare
from .signals import StopSignal, ignore_stop_signals
from .skipped import SkippedImages
from .step import FiniteCheck, StepResult, mix, train_step

__all__ = ["Trainer", "describe", "dry_run", "train"]

DRAW_EVERY = 30.0  # seconds, at least, between two pictures of the curves
DRAWING_SHARE = 0.01  # of the run's time that drawing them may take
IMBALANCED = 3  # times as many images of one class as of another: worth a hint

_RUNNING = threading.Lock()


def train(
    config: Config | Mapping[str, Any] | str | Path, output: str | Path | None = None, resume: str = "auto"
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
    folder = Path(output) if output else Path("runs") / find_variant_of(config).name
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
            _check_agreement(job, world)
            _check_files(job, world)
            with worker_errors():
                return Trainer(job, world, signal).train()
    finally:
        _RUNNING.release()
        if job and job.lock:
            job.lock.close()


def _check_agreement(job: Job, world: World) -> None:
    """Checks that all processes have found the same data and the same checkpoint on their machines.

    Raises:
        ConfigError: what differs, and on which process.
    """
    steps = world.gather(job.saved["step"] if job.saved else None)
    if steps[world.rank] != steps[0]:
        # The processes of a run that was just killed may have written after this one looked. The main process looked
        # when it had the folder for itself, so by now there is nothing newer.
        found = latest_checkpoint(job.output / "checkpoints")
        job.saved = found[1] if found else None
    config = job.config.to_dict()
    del config["data"]["root"]  # may be another path on another machine
    mine = {
        "configuration": config,
        "training images": len(job.train_source),
        "validation images": len(job.val_source),
        "classes": hashlib.sha256("\n".join(job.class_names).encode()).hexdigest(),
        "checkpoint to go on from": job.saved["step"] if job.saved else None,
    }
    first, *others = world.gather(mine)
    for rank, theirs in enumerate(others, 1):
        if changed := differences(first, theirs):
            raise ConfigError(f"rank {rank} has found something else than rank 0:", *bullets(changed))


def _check_files(job: Job, world: World) -> None:
    """Looks whether the best weights so far are still there, and makes `last.pt` the checkpoint to go on from.

    Where the best are lost, the run goes on as one that has none yet, and a note says so.

    Raises:
        UserError: the files cannot be read or written.
    """
    saved, folder = job.saved, job.output / "checkpoints"
    lost: list[str] = []

    def look() -> None:
        assert saved is not None
        link_last(folder, saved["step"])
        if saved.get("best_row"):
            lost.append(take_best(folder, saved["best_row"]["epoch"] * saved["plan"]["steps_per_epoch"]))

    if saved is None:
        return
    world.on_main(look)
    why = next(filter(None, world.gather("".join(lost))), "")
    if not why:
        return
    row = saved["best_row"]
    job.notes.insert(
        0,
        f"warning: {why}. The best weights so far, of epoch {row['epoch']}, are lost: the best from here on take their "
        f"place, and {folder / 'last.pt'} has the last ones",
    )
    saved["best_metric"] = saved["best_row"] = saved["confusion"] = None


class Trainer:
    """A run in progress.

    Attributes:
        kernels, first_kernels: what computes now, and what computed the run's first step; on the main process.
        step: optimizer steps done.
        metric: top-1 of last.pt, None if it was not evaluated.
        best_metric, best_row: top-1 and all metrics of best.pt, None so far.
        skipped: the images that could not be read and why.
    """

    def __init__(self, job: Job, world: World, signal: StopSignal) -> None:
        self.job, self.config, self.plan, self.world, self.signal = job, job.config, job.plan, world, signal
        self.output = job.output
        self.run: Run = build_run(
            job.config, job.plan, world, job.model, job.class_counts if job.config.weighs else None
        )
        self.check = FiniteCheck.of(self.run)
        self.kernels = self.first_kernels = kernels_used(self.config, world.device) if world.is_main else {}
        self.step = 0
        self.metric: float | None = None
        self.best_metric: float | None = None
        self.best_row: dict[str, Any] | None = None
        self.confusion: list[list[int]] | None = None
        self.skipped = SkippedImages(self.config.data, world, ("training", "validation"))
        self.must_evaluate = False
        self._seconds, self._since = 0.0, time.perf_counter()
        self.meter, self.losses = Meter(), MeanLoss(world)
        self._drawn, self._drawing = time.perf_counter(), 0.0  # when the curves were last drawn, and for how long
        if job.saved:
            try:
                self._restore(job.saved)
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as e:  # of torch, about shapes
                raise CheckpointError(f"the checkpoint to go on from does not fit this run ({first_line(e)})") from None
            job.saved = None  # its memory
        self.log = RunLog(
            self.output,
            self.plan.total_steps,
            self.step,
            self.config.log.tensorboard,
            world.is_main,
            self.must_evaluate,
            () if has_top5(len(job.class_names)) else ("top5", "ema_top5"),
        )
        pin_memory = world.device.type == "cuda"
        train_config = self.config.train
        self.sampler = EpochSampler(
            len(job.train_source),
            train_config.batch_size,
            train_config.accum_steps,
            world.rank,
            world.size,
            train_config.seed,
            train_config.keep_tail,
            None if job.config.data.sampling == "uniform" else job.labels,
            job.config.data.sampling,
        )
        self.loader = train_loader(
            job.train_source, self.config, self.sampler, pin_memory, ignore_stop_signals, world.device
        )
        batch_size = train_config.eval_batch_size or train_config.batch_size
        self.val_loader: DataLoader = eval_loader(
            job.val_source, self.config.data, batch_size, world.rank, world.size, pin_memory, ignore_stop_signals
        )

    @property
    def seconds(self) -> float:
        """Time spent on the run so far, in earlier attempts too."""
        return self._seconds + time.perf_counter() - self._since

    def train(self) -> dict[str, Any]:
        for loader in (self.loader, self.val_loader):
            start_workers(loader)
        for line in [*self.job.notes, *describe(self.config, self.plan, self.world.size)]:
            self.log.say(line)
        self.log.say(f"kernels: {', '.join(f'{name} {text}' for name, text in self.kernels.items())}")
        if warning := changed_kernels(self.first_kernels, self.kernels):
            self.log.say(warning)
        source, val_source = self.job.train_source, self.job.val_source
        self.log.say(
            f"training on {counted(len(source), 'image')} of {counted(len(source.class_names), 'class', 'classes')} "
            f"({source.name}), "
            f"validating on {f'{len(val_source)} ' if len(val_source) else ''}({val_source.name})"
        )
        if 0 < len(val_source) < SMALL_SPLIT:  # of a stream the length is not known
            # without the word error, for which people search their logs
            small = one_image(len(val_source))
            self.log.say(f"validation: {small} of top-1; ± is one standard deviation, sqrt(p (1 - p) / n)")
        counts = self.job.class_counts if self.world.is_main else None
        if counts is not None:
            self.log.say(describe_classes(self.config, counts, self.job.class_names))
        try:
            if self.must_evaluate:
                self._evaluate_and_save()
            for epoch in range(self.step // self.plan.steps_per_epoch, self.plan.epochs):
                self.train_epoch(epoch)
                self._end_epoch(epoch)
            return self._finish()
        finally:
            self.log.close()

    def train_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch, self.step - epoch * self.plan.steps_per_epoch)
        source = batches(self.loader)
        every = self.config.checkpoint.every_steps
        meter = self.meter
        meter.start()
        while True:
            self.world.at(f"the data of step {self.step}")
            with meter.waiting():
                window: list[Batch] = list(islice(source, self.config.train.accum_steps))
            if not window:
                return
            self.world.at(f"step {self.step}")
            if self.step == 0 and self.world.is_main:
                self._show(window[0])
            result = train_step(self.run, window, self.step, self.check)
            self.step += 1
            self.losses.add(result.loss)
            for batch in window:
                self.skipped.note("training", batch.skipped)
            self.log.advance()
            meter.images += sum(len(batch.labels) for batch in window) * self.world.size
            is_end = self.step % self.plan.steps_per_epoch == 0
            if self._is_logged():
                self.check.read()
                self._exchange_skipped()
                row = self._measure(result) | meter.read()
                if all(map(math.isfinite, row.values())):
                    self.log.step(self.step, math.ceil(self.step / self.plan.steps_per_epoch), row)
                    self.losses.start()
                else:
                    self.log.say(f"step {self.step}: an overflow in fp16; the step is left out and the scale lowered")
            if self.signal.agreed(self.world) and not is_end:
                self._save(None)
                self._stop()
            # at the end of an epoch the evaluation comes first, so that a run that goes on there does not miss it
            if every and self.step % every == 0 and not is_end:
                self._save(None)

    def _is_logged(self) -> bool:
        """Returns whether this step has a log line: every `log.every_steps`, and once in an epoch of fewer steps."""
        every, epoch = self.config.log.every_steps, self.plan.steps_per_epoch
        is_end = self.step % epoch == 0
        return self.step % every == 0 or (is_end and self.step // every == (self.step - epoch) // every)

    def _end_epoch(self, epoch: int) -> None:
        if isinstance(self.run.optimizer, Lookahead):  # the network at the end of an epoch is that of the slow weights
            self.run.optimizer.sync_lookahead()
        self._exchange_skipped()
        self.check.read()
        if self.world.size > 1:
            distribute_bn(self.run.model, self.world.size, reduce=True)
            if self.run.ema:  # its BatchNorm statistics are each process's own; rank 0's are the ones that are saved
                distribute_bn(self.run.ema.module, self.world.size, reduce=False)
        every = self.config.checkpoint.every_steps
        stops = self.signal.finish() or any(self.world.gather(self.signal.name is not None))
        if stops:
            self._save(None)
            self._stop()
        if self._is_evaluated(epoch):
            self._evaluate_and_save()
        elif every and self.step % every == 0:
            self._save(None)

    def _is_evaluated(self, epoch: int) -> bool:
        return epoch + 1 == self.plan.epochs or (epoch + 1) % self.config.train.eval_every == 0

    def _stop(self) -> None:
        names = [name for name in self.world.gather(self.signal.name) if name]
        raise RunStopped(
            f"stopped by {names[0]} after step {self.step} of {self.plan.total_steps}, and saved; the same command "
            "goes on from there"
        )

    def _show(self, batch: Batch) -> None:
        """Draws the first batch as the step will see it, mixed."""
        from .pictures import batch_figure

        batch = batch._replace(images=batch.images.clone())  # mixup mixes in place, and the step is still to come
        images, targets = mix(self.run, batch, self.step, 0)
        given, smoothing = self.config.data.preprocessing, self.config.augment.smoothing
        self.log.picture(
            "first_batch", batch_figure(images, targets, self.job.class_names, given.mean, given.std, smoothing), 0
        )

    def _measure(self, result: StepResult) -> dict[str, float]:
        """Returns a training row; every process calls it, because the loss is the mean over all of them."""
        row = {"loss": self.losses.mean(), "lr": result.lr, "grad_norm": float(result.grad_norm)}
        if self.world.device.type == "cuda":
            return row | {"memory_gib": torch.cuda.max_memory_allocated() / 2**30}
        unit = 1 if sys.platform == "darwin" else 1024
        return row | {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}

    def _exchange_skipped(self, evaluated: int = 0) -> None:
        """Tells all processes which images could not be read, logs them and checks their number.

        Args:
            evaluated: how many validation images could be, after an evaluation.
        """
        for reason in self.skipped.exchange():
            self.log.say(f"skipped: {reason}")
        self.skipped.check("training", len(self.job.train_source))
        if evaluated:
            self.skipped.check("validation", evaluated + len(self.skipped.reasons["validation"]))

    def _evaluate(self, model: torch.nn.Module) -> Evaluation:
        self.world.at("an evaluation")
        total = len(self.job.val_source)  # 0 of a stream
        result = evaluate(
            model,
            shown(batches(self.val_loader), total, "validating", self.world.size, leave=False),
            self.world,
            self.run.autocast,
            self.config.train.channels_last,
            lambda: self.signal.name is not None,
        )
        if result is None:
            self._save(None)  # without a metric: the evaluation is made up for when the run goes on
            self._stop()
        assert result is not None
        self.skipped.note("validation", result.skipped)
        return result

    def _evaluate_and_save(self) -> None:
        result = self._evaluate(self.run.model)
        row, confusion = dict(result.metrics), result.confusion
        if self.run.ema:
            average = self._evaluate(self.run.ema.module)
            row |= {f"ema_{key}": value for key, value in average.metrics.items() if key != "n"}
            confusion = average.confusion
        self._exchange_skipped(int(row["n"]))
        if not row["n"]:
            raise DataError(f"{self.job.val_source.name}: not one image could be read")
        broken = [key for key in ("loss", "ema_loss") if not math.isfinite(row.get(key, 0.0))]
        if broken:
            raise TrainingError(
                f"the validation {broken[0]} is not finite after step {self.step}: the weights have grown beyond all "
                "bounds and are not saved. Lower optim.base_lr or set optim.clip_grad"
            )
        epoch = self.step // self.plan.steps_per_epoch
        if is_best := self._is_best(row):
            self.best_metric, self.best_row = row[f"{self._prefix}top1"], {"epoch": epoch, **row}
            self.confusion = confusion.tolist() if confusion is not None else None
        self.log.evaluation(self.step, epoch, row)
        n = int(row["n"])
        top5 = f"  top-5 {row['top5']:.2f} %" if has_top5(len(self.job.class_names)) else ""
        ema = f"  averaged weights {with_error(row['ema_top1'], n)}" if self.run.ema else ""
        self.log.say(
            f"epoch {epoch}/{self.plan.epochs}  top-1 {with_error(row['top1'], n)}{top5}{ema}  "
            f"loss {row['loss']:.4f}  ({counted(n, 'image')})"
        )
        self._save(row[f"{self._prefix}top1"], is_best)
        cost = self._drawing / DRAWING_SHARE
        if self.world.is_main and time.perf_counter() - self._drawn >= max(DRAW_EVERY, cost):
            self._draw_curves(False)

    @property
    def _prefix(self) -> str:
        """Of the metrics of the weights that loading a checkpoint takes."""
        return "ema_" if self.run.ema else ""

    def _is_best(self, row: dict[str, Any]) -> bool:
        """Returns whether an evaluation is the best so far: the higher top-1, and of equal ones the lower loss."""
        if self.best_metric is None:
            return True
        metric, key = row[f"{self._prefix}top1"], f"{self._prefix}loss"
        best_loss = (self.best_row or {}).get(key)  # a checkpoint of before this rule may have none
        is_tie_broken = best_loss is not None and row[key] < best_loss
        return metric > self.best_metric or (metric == self.best_metric and is_tie_broken)

    def _draw_curves(self, in_tensorboard: bool) -> Path:
        from .pictures import curves_figure

        start = time.perf_counter()
        figure = curves_figure(read_metrics(self.log.path), self.best_row["epoch"] if self.best_row else None)
        path = self.log.picture("curves", figure, self.step, in_tensorboard)
        self._drawn = time.perf_counter()
        self._drawing = self._drawn - start
        return path

    def _save(self, metric: float | None, is_best: bool = False) -> None:
        """Saves the run; every process calls it, and all fail if the main one does."""
        self.check.read()
        self._exchange_skipped()
        self.metric = metric
        self.world.at(f"saving step {self.step}")
        losses = self.losses.state()
        self.world.on_main(lambda: self._write(losses, is_best))

    def _write(self, losses: list[list[float]], is_best: bool) -> None:
        run = self.run
        # str: torch's version is a class of its own, which a safe load would refuse
        versions = {"torch": str(torch.__version__), "timm": timm.__version__, "conv2former": __version__}
        content = {
            "step": self.step,
            "epoch": self.step // self.plan.steps_per_epoch,
            "model": run.model.state_dict(),
            "model_ema": run.ema.module.state_dict() if run.ema else None,
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict() if run.scaler.is_enabled() else None,
            "metric": self.metric,
            "best_metric": self.best_metric,
            "best_row": self.best_row,
            "confusion": self.confusion,
            "class_names": self.job.class_names,
            "skipped": self.skipped.reasons,
            "losses": losses,
            "config": self.config.to_dict(),
            "variant": find_variant_of(self.config).to_dict(),
            "plan": self.job.plan_of_data,
            "started_from": self.job.started_from,
            "kernels": self.first_kernels,
            "seconds": self.seconds,
            "time": {"training": self.meter.seconds, "waiting": self.meter.waited},
            "versions": versions,
        }
        save_checkpoint(self.output / "checkpoints", content, is_best, self.config.checkpoint.keep)

    def _restore(self, saved: dict[str, Any]) -> None:
        run = self.run
        run.model.load_state_dict(saved["model"])
        if run.ema:
            run.ema.module.load_state_dict(saved["model_ema"])
        run.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:
            run.scaler.load_state_dict(saved["scaler"])
        self.step, self.best_metric, self.confusion = saved["step"], saved["best_metric"], saved.get("confusion")
        self.metric, self.first_kernels = saved["metric"], saved.get("kernels") or self.kernels
        self.best_row, self._seconds = saved.get("best_row"), saved.get("seconds", 0.0)
        self.skipped.restore(saved.get("skipped") or {})
        self.losses = MeanLoss(self.world, saved.get("losses"))
        spent = saved.get("time") or {"training": 0.0, "waiting": 0.0}
        self.meter = Meter(spent["training"], spent["waiting"])
        epoch, rest = divmod(self.step, self.plan.steps_per_epoch)
        # stopped before the evaluation at the end of an epoch, or a finished run in a new folder, which has no best yet
        not_yet = saved["metric"] is None or (self.best_metric is None and epoch == self.plan.epochs)
        self.must_evaluate = not rest and self._is_evaluated(epoch - 1) and not_yet

    def _finish(self) -> dict[str, Any]:
        """Draws the curves and the confusions and writes the report, which is that of best.pt."""
        if not self.world.is_main:
            return {}
        from .pictures import confusion_figure

        assert self.best_row is not None
        best, prefix = self.best_row, self._prefix
        curves = self._draw_curves(True)
        if (waited := self.meter.share_waited) is not None:
            data = self.config.data
            self.log.say(describe_waiting(waited, self.meter.seconds, self.loader.num_workers, data.source))
        confusion = None
        if self.confusion:
            figure = confusion_figure(self.confusion, self.job.class_names)
            confusion = self.log.picture("confusion", figure, self.step)
        checkpoints = self.output / "checkpoints"
        check_best_and_last(checkpoints)
        report = {
            "model": find_variant_of(self.config).name,
            "started_from": self.config.model.checkpoint,
            "top1": best[f"{prefix}top1"],
            "top5": best[f"{prefix}top5"],
            "loss": best[f"{prefix}loss"],
            "n": best["n"],
            "weights": "average" if self.run.ema else "raw",
            "epoch": best["epoch"],
            "epochs": self.plan.epochs,
            "steps": self.step,
            "skipped": len(self.skipped),
            "seconds": round(self.seconds, 1),
            "data_wait": waited,
            "checkpoint": str(checkpoints / "best.pt"),
            "last_checkpoint": str(checkpoints / "last.pt"),
            "last_top1": self.metric,
            "kernels": self.kernels,
            "tensorboard": str(self.output / "tensorboard") if self.config.log.tensorboard else None,
            "curves": str(curves),
            "confusion": str(confusion) if confusion else None,
        }
        with writing(self.output):
            temporary = self.output / "report.json.tmp"
            temporary.write_text(json.dumps(report, indent=2) + "\n")
            os.replace(temporary, self.output / "report.json")
        return report


def describe(config: Config, plan: Plan, world_size: int) -> list[str]:
    """Returns lines that say what will be trained and how: network, batch and rate, length."""
    network = find_variant_of(config)
    start = f"from {config.model.checkpoint}" if config.model.checkpoint else "from scratch"
    frozen = "" if config.model.freeze == "nothing" else f", frozen up to {config.model.freeze}"
    schedule, size = config.schedule, size_text(config.data.preprocessing.size)
    return [
        f"{network.name} {start}, drop path {drop_path_rate_of(config):g}, {size}{frozen}",
        f"global batch {plan.global_batch_size} = {config.train.batch_size} per device x "
        f"{counted(world_size, 'device')} x {counted(config.train.accum_steps, 'accumulation step')}",
        f"learning rate {plan.lr:.3g} = {config.optim.base_lr:g} x {plan.global_batch_size} / "
        f"{config.optim.base_batch_size}, {config.optim.opt}",
        f"{counted(plan.epochs, 'epoch')} ({schedule.warmup_epochs} warm-up, {schedule.cooldown_epochs} cool-down) of "
        f"{counted(plan.steps_per_epoch, 'step')}{_sum_of_epochs(config)}",
    ]


def _sum_of_epochs(config: Config) -> str:
    """Returns where the number of epochs comes from, if not from `schedule.epochs` alone."""
    schedule = config.schedule
    if not schedule.cooldown_epochs:
        return ""
    return f": schedule.epochs {schedule.epochs} + schedule.cooldown_epochs {schedule.cooldown_epochs}"


def describe_classes(config: Config, counts: np.ndarray, class_names: Sequence[str]) -> str:
    """Returns a line on how many training images the classes have, and what is done where they differ.

    Args:
        config: the run.
        counts: (classes,) training images.
        class_names: names in index order.
    """
    there = np.flatnonzero(counts)
    few, many = (int(there[choose(counts[there])]) for choose in (np.argmin, np.argmax))
    line = f"training images per class: {counts[few]:,}"
    if few != many:
        line += f" ({class_names[few]}) to {counts[many]:,} ({class_names[many]})"
    missing = [class_names[i] for i in np.flatnonzero(counts == 0).tolist()]
    if missing:
        line += f", none of {counted(len(missing), 'listed class', 'listed classes')}: {shorten(missing, 10)}"
    alike = [name for name, times in Counter(map(str.casefold, class_names)).items() if times > 1]
    if alike:
        line += f"; names that differ by capital letters only are several classes: {shorten(alike, 5)}"
    sampling, weights = config.data.sampling, config.train.class_weight
    if sampling != "uniform":
        what = "equally often" if sampling == "balanced" else "in proportion to the square root of that"
        return f"{line}; seen {what} (data.sampling)"
    if weights != "none":
        what = "that" if weights == "balanced" else "the square root of that"
        return f"{line}; weighted in the loss by one over {what} (train.class_weight)"
    if counts[many] > IMBALANCED * counts[few]:
        line += "; to learn the rare ones better try data.sampling=sqrt, or train.class_weight=sqrt"
    return line


def dry_run(config: Config | Mapping[str, Any] | str | Path) -> list[str]:
    """Builds everything and trains on one synthetic batch, without looking at the data if the class count is given.

    On a CPU the batch is of two images, because it is only to show that the step works; on a GPU it is of the
    configured size, so that the memory is known.

    Returns:
        Lines to print: what would be trained, parameters, and the step's loss and time.

    Raises:
        UserError: a mistake in the configuration.
    """
    with before_processes_meet():
        config = name_network(as_config(config))
        world = World.from_environment()
        check_names(config, world.device)
        config, about_images = settle_images(config)
    num_classes = config.data.num_classes
    num_images = class_names = None
    if num_classes is None:
        source, _ = open_train_and_val(config.data)
        class_names, num_images = source.class_names, len(source)
        num_classes = len(class_names)
        config = fit_batch(config, world.size, num_images)
    global_batch_size = config.train.batch_size * config.train.accum_steps * world.size
    plan = make_plan(config, world.size, num_images or global_batch_size)
    model = build_model(config, num_classes, class_names)
    batch_size = config.train.batch_size if world.device.type == "cuda" else 2
    given = config.data.preprocessing
    generator = torch.Generator().manual_seed(config.train.seed)
    images = torch.randn(batch_size, given.channels, *given.size, generator=generator)
    labels = torch.randint(num_classes, (batch_size,), generator=generator)
    with join_world(world, config.train.timeout_minutes) as world:
        run = build_run(config, plan, world, model)
        start = time.perf_counter()
        check = FiniteCheck.of(run)
        result = train_step(run, [Batch(images, labels, [])] * config.train.accum_steps, 0, check)
        loss = float(result.loss)  # waits for the device
        check.read()
        seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lines = describe(config, plan, world.size)
    if num_images is None:
        lines[-1] = (
            f"{counted(plan.epochs, 'epoch')}{_sum_of_epochs(config)}; the number of steps follows from the data"
        )
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if world.device.type == "cuda" else ""
    return [
        *about_images,
        *lines,
        f"{parameters:,} parameters, {f'{trained:,} of them trained, ' if trained < parameters else ''}"
        f"{num_classes} {'class' if num_classes == 1 else 'classes'}",
        f"one step on {counted(batch_size, 'random image')}: loss {loss:.4f}, gradient norm "
        f"{float(result.grad_norm):.3g}, {seconds:.1f} s{memory}",
    ]
