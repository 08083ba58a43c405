"""One network of a benchmark: makes it and its step, warms it up, counts its memory, and gives a clock for it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _private
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
    model.train(setting.mode == "training")
    runnable: nn.Module = model
    if setting.execution == "compile":
        _private.allow_recompiling(64)  # networks of one class share their code, each compiled anew
        runnable = torch.compile(model, mode=plan.compile_mode, backend=plan.compile_backend, dynamic=False)  # type: ignore[assignment]
    optimizer: torch.optim.Optimizer | None = None
    if setting.mode == "training":
        held = bytes_held(runnable, images(plan.held_batch_size), DTYPES[setting.precision])
        result.bytes_held_per_image = held / plan.held_batch_size
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
        step = _training_step(runnable, optimizer, images(setting.batch_size), setting.precision)
    else:
        step = _inference_step(runnable, images(setting.batch_size), setting.precision)
    since = time.perf_counter()
    warm_up(step, optimizer)
    result.first_seconds = time.perf_counter() - since
    if plan.details:
        _count_step(step, model, optimizer, device, result)
    if setting.execution == "cudagraph":
        step = _captured(step)
    if plan.steps is None or setting.execution != "eager":  # else the first step tells enough of what is to come
        result.first_seconds = Clock(step, 1, device, None, []).read()
    result.steps = plan.steps or max(1, math.ceil(MIN_SECONDS / max(result.first_seconds, 1e-6)))
    return Clock(step, result.steps, device, result, result.seconds)


def warm_up(step: Callable[[], object], optimizer: torch.optim.Optimizer | None, attempts: int = 20) -> None:
    """Runs a step, and again while fp16's loss scale is still too large and the optimizer is left out of the step."""
    step()
    for _ in range(attempts):
        if optimizer is None or optimizer.state:
            return
        step()


def _inference_step(model: nn.Module, images: Tensor, precision: str) -> Callable[[], object]:
    def step() -> Tensor:
        with torch.inference_mode(), _autocast(images.device, precision):
            return model(images)

    return step


def _training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, precision: str
) -> Callable[[], object]:
    labels = torch.randint(CLASSES, (len(images),), device=images.device)
    scaler = torch.amp.GradScaler(images.device.type, enabled=precision == "fp16")

    def step() -> None:
        with _autocast(images.device, precision):
            logits = model(images)
        scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=DTYPES[precision] is not None)


def _captured(step: Callable[[], object]) -> Callable[[], object]:
    """Returns a CUDA graph of a step that has run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


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
