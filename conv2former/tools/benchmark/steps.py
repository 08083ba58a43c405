"""One network of a benchmark: makes it and its step, warms it up, counts its memory, and gives a clock for it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _private, graphs
from ...errors import ConfigError
from ...graphs import Graph
from ...models import Conv2Former
from ...models.backbone import Stage
from ...models.compiled import compile_blocks
from ...models.others import overwriting_convolution
from .device import profile_device
from .machine import OperatorTraffic
from .memory import bytes_held, peak_bytes
from .networks import CLASSES, Network
from .results import FORMATS, Plan, Result

__all__ = ["DTYPES", "Clock", "prepare", "warm_up"]

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_SECONDS = 0.2  # of one timing, so that the clock's and the events' grain is no part of it


@dataclass
class Clock:
    """Something to time: an action, how often in one timing, and where its times go."""

    action: Callable[[], object]
    steps: int
    device: torch.device
    result: Result | None
    seconds: list[float]

    def read(self) -> float:
        """Returns the seconds of one action."""
        if self.device.type != "cuda":
            since = time.perf_counter()
            for _ in range(self.steps):
                self.action()
            return (time.perf_counter() - since) / self.steps
        self.action()  # fills the queue, and the caches that another network has emptied
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.steps):
            self.action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / self.steps


def prepare(plan: Plan, network: Network, result: Result) -> Clock:
    """Makes a network and its step, runs it until nothing is done for the first time, and counts its memory."""
    setting, device = result.setting, plan.device
    torch.manual_seed(0)
    memory_format = FORMATS[setting.memory_format]
    size = (3, setting.height, setting.width)

    def images(count: int) -> Tensor:
        return torch.randn(count, *size, device=device).to(memory_format=memory_format)

    model = network.create(setting.height, setting.width).to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    how = setting.mode, setting.memory_format, device.type
    if how == ("training", "channels_last", "cpu") and (name := overwriting_convolution(model)):
        raise ValueError(f"PyTorch crashes in the gradient of {name}; measure it in nchw")
    model.train(setting.mode == "training")
    runnable: nn.Module = model
    if setting.execution == "compile":
        runnable = _compiled(plan, model)
    optimizer: torch.optim.Optimizer | None = None
    step: _Step
    if setting.mode == "training":
        held = bytes_held(runnable, images(plan.held_batch_size), DTYPES[setting.precision])
        result.bytes_held_per_image = held / plan.held_batch_size
        fused = True if device.type == "cuda" else None  # as in training
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=fused)
        step = _TrainingStep(runnable, optimizer, images(setting.batch_size), setting.precision)
    else:
        step = _Step(runnable, images(setting.batch_size), setting.precision)
    since = time.perf_counter()
    warm_up(step, optimizer)
    result.first_seconds = time.perf_counter() - since
    if plan.details:
        _count_step(step, model, optimizer, device, result)
    if setting.execution == "cudagraph":
        step.capture()
    if plan.details and device.type == "cuda":
        _profile_step(step, result)
    if plan.steps is None or setting.execution != "eager":  # else the first step tells enough of what is to come
        result.first_seconds = Clock(step, 1, device, None, []).read()
    result.steps = plan.steps or max(1, math.ceil(MIN_SECONDS / max(result.first_seconds, 1e-6)))
    return Clock(step, result.steps, device, result, result.seconds)


def _compiled(plan: Plan, model: nn.Module) -> nn.Module:
    """Returns a network as it is compiled for training or inference: this project's block by block for the former."""
    if model.training and isinstance(model, Conv2Former) and plan.compile_mode is None:
        compile_blocks((block for stage in model.stages for block in cast(Stage, stage).blocks), plan.compile_backend)
        return model
    _private.allow_recompiling(64)  # networks of one class share their code, each compiled anew
    return cast(nn.Module, torch.compile(model, mode=plan.compile_mode, backend=plan.compile_backend, dynamic=False))


def warm_up(step: Callable[[], object], optimizer: torch.optim.Optimizer | None, attempts: int = 20) -> None:
    """Runs a step, and again while fp16's loss scale is still too large and the optimizer is left out of the step."""
    step()
    for _ in range(attempts):
        if optimizer is None or optimizer.state:
            return
        step()


class _Step:
    """An inference; a CUDA graph repeats it once it is captured."""

    def __init__(self, model: nn.Module, images: Tensor, precision: str) -> None:
        self._model, self._images, self._precision = model, images, precision
        self._graph: Graph | None = None

    def __call__(self) -> object:
        return self._graph(self._images) if self._graph else self.compute(self._images)

    def compute(self, images: Tensor) -> Tensor:
        """What is captured."""
        with torch.inference_mode(), _autocast(images.device, self._precision):
            return self._model(images)

    def capture(self) -> None:
        """Captures the step, which has run before."""
        recorder = graphs.recorder_for(self._images.device)
        if recorder is None:
            raise ConfigError("there are no CUDA graphs here")
        recorder.warm_up(self)
        self._graph = Graph(recorder, self.compute, self._images)


class _TrainingStep(_Step):
    """Forward pass, cross-entropy and backward pass, which can be captured, then the optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, precision: str) -> None:
        super().__init__(model, images, precision)
        self._optimizer = optimizer
        self._labels = torch.randint(CLASSES, (len(images),), device=images.device)
        self._scaler = torch.amp.GradScaler(images.device.type, enabled=precision == "fp16")

    def __call__(self) -> object:
        loss = super().__call__()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if not self._graph:  # which writes the same gradients again
            self._optimizer.zero_grad()
        return loss

    def compute(self, images: Tensor) -> Tensor:
        """See `_Step`."""
        with _autocast(images.device, self._precision):
            logits = self._model(images)
        loss = F.cross_entropy(logits.float(), self._labels)
        self._scaler.scale(loss).backward()
        return loss.detach()


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=DTYPES[precision] is not None)


def _profile_step(step: Callable[[], object], result: Result, steps: int = 3) -> None:
    """Counts the launches of a step, how long the GPU works, and how long Python needs to queue it."""
    step()  # after a capture: what a step of its own allocates is there
    torch.cuda.synchronize()
    since = time.perf_counter()
    for _ in range(steps):
        step()
    result.host_seconds = (time.perf_counter() - since) / steps
    work = profile_device(step, steps)
    result.launches, result.busy_seconds = work.launches, work.busy


def _count_step(
    step: Callable[[], object],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
    result: Result,
) -> None:
    """Counts the peak memory of a step, and what its operators read and write if they run one by one."""
    traffic = OperatorTraffic() if result.setting.execution != "compile" and _private.sees_operators() else None
    with traffic or nullcontext():
        peak = peak_bytes(step, device)
    states = optimizer.state.values() if optimizer else []
    lasting: Iterable[Any] = itertools.chain(model.parameters(), model.buffers(), *(s.values() for s in states))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in lasting if isinstance(t, Tensor)}
    result.peak_bytes = peak + sum(storages.values())
    result.bytes_moved = traffic.bytes_moved if traffic else None
