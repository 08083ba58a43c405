"""One optimizer step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from .. import _private
from ..data import Stream, seed_all
from ..errors import TrainingError
from ..tasks.task import AnyBatch
from .build import Run
from .distributed import World

__all__ = ["FiniteCheck", "StepResult", "prepare_batch", "train_step"]

# fp16 overflows in a row after which the run is lost: the scale, 65536 at the start, has then been halved to below 1
OVERFLOWS = 20


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


class FiniteCheck:
    """Stops the run when the gradients are not finite, without making the program wait for a GPU.

    On a CPU the gradient norm is looked at before the optimizer steps. On a GPU it would not be known yet, so the
    optimizer is told where to look and leaves the step out itself, there and in all that follow, and the program reads
    the verdict `lag` steps later; an optimizer that cannot be told (all but torch's fused ones) costs a wait per step.
    Either way no weight has changed. The norm is that of the averaged gradients, so all processes stop at the same
    step without asking each other.

    In fp16 an overflow is the scaler's business: it leaves the step out and lowers the scale, and `train_step` undoes
    what the forward passes did to BatchNorm's statistics. Only `limit` of them in a row are an error.

    Args:
        world: the processes.
        optimizer: whose steps are to be left out.
        limit: steps in a row whose gradients are not finite.
        lag: steps; None for 0 on a CPU and 2 on a GPU.
    """

    def __init__(self, world: World, optimizer: torch.optim.Optimizer, limit: int = 1, lag: int | None = None) -> None:
        self.world, self.optimizer, self.limit = world, optimizer, limit
        can_leave_out = _private.leaves_out_steps(optimizer)
        default = 2 if world.device.type == "cuda" and can_leave_out else 0
        self.lag = default if lag is None else lag
        self._in_a_row = torch.zeros((), device=world.device)
        self._unread: deque[tuple[int, float, torch.Tensor, torch.cuda.Event | None]] = deque()

    @classmethod
    def of(cls, run: Run) -> FiniteCheck:
        """Returns the check that a run needs."""
        return cls(run.world, run.optimizer, OVERFLOWS if run.scaler.is_enabled() else 1)

    def note(self, step: int, result: StepResult, scaled: bool) -> None:
        """Takes in a step's gradient norm, before the optimizer steps.

        Args:
            step: its number.
            result: its measurements.
            scaled: whether a gradient scaler, which tells the optimizer itself, is in use.

        Raises:
            TrainingError: see `read`.
        """
        over = ~torch.isfinite(result.grad_norm) | (self._in_a_row >= self.limit)
        self._in_a_row = torch.where(over, self._in_a_row + 1, 0.0)
        if self.lag and not scaled:
            self.optimizer.found_inf = (self._in_a_row > 0).float()  # type: ignore[attr-defined]
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        values, event = torch.stack([self._in_a_row, result.loss, result.grad_norm]).float(), None
        if self.world.device.type == "cuda":
            values = torch.empty(3, pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._unread.append((step, result.lr, values, event))
        self.read(self.lag)

    def read(self, leave: int = 0) -> None:
        """Reads all verdicts but the newest `leave`. Before anything is saved or evaluated it must read them all.

        Raises:
            TrainingError: the gradients of a step were not finite; on every process.
        """
        while len(self._unread) > leave:
            step, lr, values, event = self._unread.popleft()
            if event:
                event.synchronize()
            in_a_row, loss, grad_norm = values.tolist()
            if in_a_row >= self.limit:
                self._fail(step, lr, loss, grad_norm)

    def _fail(self, step: int, lr: float, loss: float, grad_norm: float) -> None:
        losses = self.world.gather(loss)
        broken = [(rank, value) for rank, value in enumerate(losses) if not abs(value) < float("inf")]
        where = ", ".join(f"loss {value:.4g} on rank {rank}" for rank, value in broken)
        times = f" for {self.limit} steps in a row, whatever the scale," if self.limit > 1 else ""
        raise TrainingError(
            f"the gradients are not finite{times} at step {step} ({where or f'loss {losses[0]:.4g} on rank 0'}, "
            f"gradient norm {grad_norm:.4g}, learning rate {lr:.3g}): stopped before any weight changed. "
            "Lower optim.base_lr, set optim.clip_grad, or look at the images of this step"
        )


def train_step(run: Run, batches: Sequence[AnyBatch], step: int, check: FiniteCheck) -> StepResult:
    """Does optimizer step number `step`, counted from 0.

    Args:
        run: what to train.
        batches: the accumulation steps' batches of this process.
        step: decides the learning rate and every random draw.
        check: of the gradients.

    Raises:
        TrainingError: the gradients are not finite, on every process, before any weight has changed.
    """
    run.scheduler.step_update(step)
    run.optimizer.zero_grad(set_to_none=True)
    if not run.model.training:  # after an evaluation
        run.forward.train()
        run.task.freeze(run.model, run.config.model.freeze)
    scaled = run.scaler.is_enabled()
    buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()] if scaled else []
    loss_sum = torch.zeros((), device=run.world.device)
    run.world.at(f"the forward pass of step {step}")
    for i, batch in enumerate(batches):
        is_last = i == len(batches) - 1
        # gradients are exchanged once, in the last backward pass
        waits = isinstance(run.forward, DistributedDataParallel) and not is_last
        with run.forward.no_sync() if waits else nullcontext():  # type: ignore[operator]
            inputs, targets = prepare_batch(run, batch, step, i)
            compute = partial(_microbatch, run, len(batches), f"the backward pass of step {step}" if is_last else "")
            if run.graphs:
                loss = run.graphs(compute, inputs, targets, len(batches))
            else:
                loss = compute(inputs, targets)
        loss_sum += loss / len(batches)
    run.scaler.unscale_(run.optimizer)
    if run.config.optim.clip_grad:
        grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.config.optim.clip_grad)
    else:
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in run.parameters if p.grad is not None])
    lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in run.optimizer.param_groups)
    result = StepResult(loss_sum, grad_norm, lr)
    check.note(step, result, scaled)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    # Unless scaled, gradients that are not finite have raised in the check, or will before anything is saved.
    is_left_out = ~torch.isfinite(grad_norm) if scaled else None
    if is_left_out is not None:
        for buffer, before in buffers:
            buffer.copy_(torch.where(is_left_out, before, buffer))
    if run.ema and not is_left_out:  # in fp16 with an average the program waits for a GPU here
        run.ema.update(run.model, step + 1)
    return result


def _microbatch(run: Run, count: int, place: str, inputs: Any, targets: Any) -> torch.Tensor:
    """Computes the loss of an accumulation step, scalar, adds its gradients to those that there are, and returns it.

    Args:
        run: what to train.
        count: accumulation steps.
        place: what the other processes are told before the backward pass; '' for nothing.
        inputs, targets: as `prepare_batch` returns them.
    """
    loss = run.objective.loss(run.autocast_forward, inputs, targets)
    if place:
        run.world.at(place)
    run.scaler.scale(loss / count).backward()
    return loss.detach()


def prepare_batch(run: Run, batch: AnyBatch, step: int, accum_step: int) -> tuple[Any, Any]:
    """Seeds everything for one forward pass, and returns its inputs and targets on the device.

    The same step gives the same, also where images are mixed at random.
    """
    seed_all(Stream.STEP, run.config.train.seed, step, accum_step, run.world.rank)
    return run.objective.prepare(batch, step)
