"""The training loop: one for training from scratch, fine-tuning and pre-training alike."""

from __future__ import annotations

import json
import math
import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import yaml
from timm.utils import distribute_bn
from torch.utils.data import DataLoader

from .. import __version__
from ..config import Config, Plan, differences, make_plan
from ..data import EpochSampler, eval_loader, open_train_and_val, train_loader
from ..errors import ConfigError, DataError, TrainingError, bullets
from .build import Run, build_run, check_names, drop_path_rate_of, find_variant_of
from .checkpoint import latest_checkpoint, read_training_checkpoint, save_checkpoint
from .distributed import World, rank0_first
from .evaluate import evaluate
from .logging import RunLog, read_metrics
from .step import StepResult, train_step

__all__ = ["describe", "dry_run", "train"]

# What may differ between a run and its continuation: what changes nothing that is trained, and the division of the
# global batch, which `_plan_of` guards and other numbers of devices need.
_HARMLESS = (
    "data.root:",
    "data.workers:",
    "log.",
    "checkpoint.",
    "train.eval_batch_size:",
    "train.batch_size:",
    "train.accum_steps:",
)


def train(config: Config, output: Path, world: World, resume: str = "auto") -> dict[str, Any]:
    """Trains, evaluates and saves until the last epoch; every process calls it.

    Args:
        config: the run.
        output: the run folder: config.yaml, checkpoints/, metrics.jsonl, tensorboard/, curves.png, report.json.
        world: the processes.
        resume: 'auto' goes on where `output` stopped, if it has checkpoints; 'never' refuses such a folder; anything
            else is the path of a checkpoint to go on from.

    Returns:
        The report, as in report.json.

    Raises:
        UserError: a mistake in the configuration, the data or the checkpoint.
        TrainingError: the gradients are not finite.
    """
    check_names(config, world.device)
    with rank0_first(world):
        train_source, val_source = open_train_and_val(config.data)
    plan = make_plan(config, world.size, len(train_source))
    class_names = train_source.class_names
    run = build_run(config, plan, world, len(class_names))
    saved, note = _find_checkpoint(output / "checkpoints", resume, world)
    progress = _Progress(class_names, len(train_source))
    if saved:
        _restore(run, progress, saved)
    if world.is_main:
        _prepare_folder(output, config)

    log = RunLog(output, plan.total_steps, progress.step, config.log.tensorboard, world.is_main)
    for line in [*note, *describe(config, plan, world.size)]:
        log.say(line)
    log.say(
        f"training on {len(train_source)} images of {len(class_names)} classes ({train_source.name}), "
        f"validating on {len(val_source)} ({val_source.name})"
    )
    pin_memory = world.device.type == "cuda"
    sampler = EpochSampler(
        len(train_source), config.train.batch_size, config.train.accum_steps, world.rank, world.size, config.train.seed
    )
    loader = train_loader(train_source, config.data, config.augment, sampler, pin_memory)
    batch_size = config.train.eval_batch_size or config.train.batch_size
    val_loader = eval_loader(val_source, config.data, batch_size, world.rank, world.size, pin_memory)

    try:
        for epoch in range(progress.step // plan.steps_per_epoch, plan.epochs):
            sampler.set_epoch(epoch, progress.step - epoch * plan.steps_per_epoch)
            _train_epoch(run, progress, loader, log, output)
            if world.size > 1:
                distribute_bn(run.model, world.size, reduce=True)
            is_last = epoch + 1 == plan.epochs
            if is_last or (epoch + 1) % config.train.eval_every == 0:
                _evaluate_and_save(run, progress, val_loader, log, output)
        if resume not in ("auto", "never") and saved and saved["step"] == plan.total_steps:
            _evaluate_and_save(run, progress, val_loader, log, output)  # a finished run under a new name: only a report
    finally:
        log.close()
    return _finish(run, progress, log, output)


class _Progress:
    """What changes during a run besides the weights; saved with them."""

    def __init__(self, class_names: list[str], num_images: int) -> None:
        self.class_names, self.num_images = class_names, num_images
        self.step = 0
        self.best_metric: float | None = None
        self._seconds, self._since = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._seconds + time.perf_counter() - self._since

    def restore(self, saved: dict[str, Any]) -> None:
        self.step, self.best_metric = saved["step"], saved["best_metric"]
        self._seconds = saved.get("seconds", 0.0)


def _train_epoch(run: Run, progress: _Progress, loader: DataLoader, log: RunLog, output: Path) -> None:
    config, plan = run.config, run.plan
    batches = iter(loader)
    since, since_step = time.perf_counter(), progress.step
    while window := list(islice(batches, config.train.accum_steps)):
        if progress.step == 0:
            log.images(window[0][0], config.data.mean, config.data.std)
        result = train_step(run, window, progress.step)
        progress.step += 1
        log.advance()
        if progress.step % config.log.every_steps == 0:
            row = _measure(run, result)
            now = time.perf_counter()
            images = (progress.step - since_step) * plan.global_batch_size
            row["images_per_second"] = round(images / (now - since), 1)
            log.step(progress.step, math.ceil(progress.step / plan.steps_per_epoch), row)
            since, since_step = now, progress.step
        every = config.checkpoint.every_steps
        # at the end of an epoch the evaluation comes first, so that a run that resumes there does not miss it
        if every and progress.step % every == 0 and progress.step % plan.steps_per_epoch:
            _save(run, progress, output, metric=None)


def _measure(run: Run, result: StepResult) -> dict[str, float]:
    """Returns a training row; every process calls it, because the loss is the mean over all of them."""
    loss = float(run.world.sum(result.loss)) / run.world.size
    row = {"loss": loss, "lr": result.lr, "grad_norm": float(result.grad_norm)}
    if run.world.device.type == "cuda":
        row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def _evaluate_and_save(run: Run, progress: _Progress, loader: DataLoader, log: RunLog, output: Path) -> None:
    channels_last = run.config.train.channels_last
    row = evaluate(run.model, loader, run.world, run.autocast, channels_last)
    if run.ema:
        if run.world.size > 1:  # its BatchNorm statistics are each process's own; rank 0's are the ones that are saved
            distribute_bn(run.ema.module, run.world.size, reduce=False)
        average = evaluate(run.ema.module, loader, run.world, run.autocast, channels_last)
        row |= {f"ema_{key}": value for key, value in average.items() if key != "n"}
    broken = [key for key in ("loss", "ema_loss") if not math.isfinite(row.get(key, 0.0))]
    if broken:
        raise TrainingError(
            f"the validation {broken[0]} is not finite after step {progress.step}: the weights have grown beyond all "
            "bounds and are not saved. Lower optim.base_lr or set optim.clip_grad"
        )
    metric = row["ema_top1" if run.ema else "top1"]  # of the weights that loading the file takes
    epoch = progress.step // run.plan.steps_per_epoch
    log.evaluation(progress.step, epoch, row)
    ema = f"  averaged weights {row['ema_top1']:.2f} %" if run.ema else ""
    log.say(
        f"epoch {epoch}/{run.plan.epochs}  top-1 {row['top1']:.2f} %  top-5 {row['top5']:.2f} %{ema}  "
        f"loss {row['loss']:.4f}  ({row['n']} images)"
    )
    _save(run, progress, output, metric)


def _save(run: Run, progress: _Progress, output: Path, metric: float | None) -> None:
    is_best = metric is not None and (progress.best_metric is None or metric > progress.best_metric)
    if is_best:
        progress.best_metric = metric
    if not run.world.is_main:
        return
    # str: torch's version is a class of its own, which a safe load would refuse
    versions = {"torch": str(torch.__version__), "timm": timm.__version__, "conv2former": __version__}
    content = {
        "step": progress.step,
        "epoch": progress.step // run.plan.steps_per_epoch,
        "model": run.model.state_dict(),
        "model_ema": run.ema.module.state_dict() if run.ema else None,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict() if run.scaler.is_enabled() else None,
        "metric": metric,
        "best_metric": progress.best_metric,
        "class_names": progress.class_names,
        "config": run.config.to_dict(),
        "variant": find_variant_of(run.config).to_dict(),
        "plan": _plan_of(run, progress),
        "seconds": progress.seconds,
        "versions": versions,
    }
    save_checkpoint(output / "checkpoints", content, is_best, run.config.checkpoint.keep)


def _find_checkpoint(folder: Path, resume: str, world: World) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns the checkpoint to go on from, or None, and lines to print about it. The main process chooses for all."""
    choice: list[Any] = [None]
    found = None
    if world.is_main:
        found = latest_checkpoint(folder)
        choice = [str(found[0]) if found else None]
    if world.size > 1:
        dist.broadcast_object_list(choice)
    if choice[0] is not None and resume != "auto":
        raise ConfigError(f"{folder.parent} holds a run; choose another --output, or --resume auto to go on with it")
    if resume not in ("auto", "never"):
        saved = read_training_checkpoint(Path(resume))
        saved["best_metric"] = None  # the best of this folder is yet to come
        return saved, [f"going on from {resume}"]
    if choice[0] is None:
        return None, []
    path, saved, warnings = found or (Path(choice[0]), read_training_checkpoint(Path(choice[0])), [])
    return saved, [*warnings, f"going on from {path}"]


def _plan_of(run: Run, progress: _Progress) -> dict[str, int]:
    batch_size, steps = run.plan.global_batch_size, run.plan.steps_per_epoch
    return {"images": progress.num_images, "global_batch_size": batch_size, "steps_per_epoch": steps}


def _restore(run: Run, progress: _Progress, saved: dict[str, Any]) -> None:
    changed = [d for d in differences(saved["config"], run.config.to_dict()) if not d.startswith(_HARMLESS)]
    if changed:
        raise ConfigError(
            "this run was started with another configuration; start a new one with another --output, or undo:\n"
            + bullets(changed)
        )
    if saved["class_names"] != progress.class_names:
        raise DataError("the data set's classes have changed since this run was started")
    changed = differences(saved["plan"], _plan_of(run, progress))
    if changed:
        raise ConfigError(
            "this run was started with other data or another number of devices; an epoch must have the same global "
            "batches, so adjust train.batch_size or train.accum_steps, or start a new run:\n" + bullets(changed)
        )
    run.model.load_state_dict(saved["model"])
    if run.ema:
        run.ema.module.load_state_dict(saved["model_ema"])
    run.optimizer.load_state_dict(saved["optimizer"])
    if saved["scaler"]:
        run.scaler.load_state_dict(saved["scaler"])
    progress.restore(saved)


def _prepare_folder(output: Path, config: Config) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    except OSError as e:
        raise ConfigError(f"{output}: cannot be written ({e}); choose another --output") from None


def describe(config: Config, plan: Plan, world_size: int) -> list[str]:
    """Returns lines that say what will be trained and how: network, batch and rate, length."""
    network = find_variant_of(config)
    start = f"from {config.model.checkpoint}" if config.model.checkpoint else "from scratch"
    schedule, side = config.schedule, config.data.img_size
    return [
        f"{network.name} {start}, drop path {drop_path_rate_of(config):g}, {side} x {side}",
        f"global batch {plan.global_batch_size} = {config.train.batch_size} per device x {world_size} devices x "
        f"{config.train.accum_steps} accumulation steps",
        f"learning rate {plan.lr:.3g} = {config.optim.base_lr:g} x {plan.global_batch_size} / "
        f"{config.optim.base_batch_size}, {config.optim.opt}",
        f"{plan.epochs} epochs ({schedule.warmup_epochs} warm-up, {schedule.cooldown_epochs} cool-down) of "
        f"{plan.steps_per_epoch} steps",
    ]


def _finish(run: Run, progress: _Progress, log: RunLog, output: Path) -> dict[str, Any]:
    """Writes curves.png and report.json. The report is that of best.pt."""
    if not run.world.is_main:
        return {}
    evals = [row for row in read_metrics(log.path) if row["kind"] == "eval"]
    prefix = "ema_" if run.ema else ""
    best = max(evals, key=lambda row: (row[f"{prefix}top1"], -row["step"]))
    report = {
        "top1": best[f"{prefix}top1"],
        "top5": best[f"{prefix}top5"],
        "loss": best[f"{prefix}loss"],
        "n": best["n"],
        "weights": "average" if run.ema else "raw",
        "epoch": best["epoch"],
        "epochs": run.plan.epochs,
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "checkpoint": str(output / "checkpoints" / "best.pt"),
        "tensorboard": str(output / "tensorboard") if run.config.log.tensorboard else None,
        "curves": str(log.plot()),
    }
    temporary = output / "report.json.tmp"
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(temporary, output / "report.json")
    return report


def dry_run(config: Config, world: World) -> list[str]:
    """Builds everything and trains on one synthetic batch, without looking at the data if the class count is given.

    On a CPU the batch is of two images, because it is only to show that the step works; on a GPU it is of the
    configured size, so that the memory is known.

    Returns:
        Lines to print: what would be trained, parameters, and the step's loss and time.

    Raises:
        UserError: a mistake in the configuration.
    """
    check_names(config, world.device)
    num_classes = config.data.num_classes
    num_images = None
    if num_classes is None:
        with rank0_first(world):
            source, _ = open_train_and_val(config.data)
        num_classes, num_images = len(source.class_names), len(source)
    batch_size = config.train.batch_size if world.device.type == "cuda" else 2
    global_batch_size = config.train.batch_size * config.train.accum_steps * world.size
    plan = make_plan(config, world.size, num_images or global_batch_size)
    run = build_run(config, plan, world, num_classes)
    side = config.data.img_size
    generator = torch.Generator().manual_seed(config.train.seed)
    images = torch.randn(batch_size, 3, side, side, generator=generator)
    labels = torch.randint(num_classes, (batch_size,), generator=generator)
    start = time.perf_counter()
    result = train_step(run, [(images, labels)] * config.train.accum_steps, step=0)
    loss = float(result.loss)  # waits for the device
    seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in run.model.parameters())
    lines = describe(config, plan, world.size)
    if num_images is None:
        lines[-1] = f"{plan.epochs} epochs; the number of steps follows from the data"
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if world.device.type == "cuda" else ""
    return [
        *lines,
        f"{parameters:,} parameters, {num_classes} classes",
        f"one step on {batch_size} random images: loss {loss:.4f}, gradient norm {float(result.grad_norm):.3g}, "
        f"{seconds:.1f} s{memory}",
    ]
