"""One optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from ..data import Stream, seed_all
from ..errors import TrainingError
from .build import Run

__all__ = ["StepResult", "train_step"]

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a step measured. The tensors stay on the device: reading one waits for it.

    Attributes:
        loss: mean over this process's images, scalar.
        grad_norm: of the averaged gradients before clipping, scalar, the same on every process.
        lr: of the parameter groups without layer decay.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    lr: float


def train_step(run: Run, batches: Sequence[Batch], step: int) -> StepResult:
    """Does optimizer step number `step`, counted from 0.

    Args:
        run: what to train.
        batches: the accumulation steps' (images, class indices) of this process.
        step: decides the learning rate and every random draw.

    Raises:
        TrainingError: the gradients are not finite, on every process, before any weight has changed.
    """
    run.scheduler.step_update(step)
    run.optimizer.zero_grad(set_to_none=True)
    run.forward.train()
    loss_sum = torch.zeros((), device=run.world.device)
    for i, batch in enumerate(batches):
        is_last = i == len(batches) - 1
        seed_all(Stream.STEP, run.config.train.seed, step, i, run.world.rank)
        # gradients are exchanged once, in the last backward pass
        waits = isinstance(run.forward, DistributedDataParallel) and not is_last
        with run.forward.no_sync() if waits else nullcontext():  # type: ignore[operator]
            loss = _loss(run, batch)
            run.scaler.scale(loss / len(batches)).backward()
        loss_sum += loss.detach() / len(batches)
    run.scaler.unscale_(run.optimizer)
    if run.config.optim.clip_grad:
        grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.optim.clip_grad)
    else:
        grad_norm = torch.nn.utils.get_total_norm(p.grad for p in run.model.parameters() if p.grad is not None)
    lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in run.optimizer.param_groups)
    _check_finite(run, step, loss_sum, grad_norm, lr)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.ema:
        run.ema.update(run.model, step + 1)
    return StepResult(loss_sum, grad_norm, lr)


def _loss(run: Run, batch: Batch) -> torch.Tensor:
    memory_format = torch.channels_last if run.config.train.channels_last else torch.contiguous_format
    images = batch[0].to(run.world.device, memory_format=memory_format, non_blocking=True)
    targets = batch[1].to(run.world.device, non_blocking=True)
    if run.mixup:
        images, targets = run.mixup(images, targets)
    with run.autocast():
        logits = run.forward(images)
    return run.criterion(logits.float(), targets)


def _check_finite(run: Run, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, lr: float) -> None:
    # The norm is that of the averaged gradients, so all processes stop together without asking each other.
    if run.scaler.is_enabled():
        if run.scaler.get_scale() >= 1.0:
            return  # an overflow in fp16 is the scaler's business: it leaves the step out and lowers the scale
    elif torch.isfinite(grad_norm):
        return
    raise TrainingError(
        f"the gradients are not finite at step {step} (rank {run.world.rank}, loss {loss.item():.4g}, gradient norm "
        f"{grad_norm.item():.4g}, learning rate {lr:.3g}): stopped before any weight changed. "
        "Lower optim.base_lr, set optim.clip_grad, or look at the images of this step"
    )
