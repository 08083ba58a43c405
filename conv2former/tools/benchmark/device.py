"""What a GPU does: kernels of a step by name, for how long it is busy, and the time of an action without Python's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["DeviceClock", "DeviceWork", "device_work", "kernel_name", "profile_device"]

MIN_SECONDS = 2e-4  # of one timing: events tell half a microsecond
MAX_REPETITIONS = 10
MAX_FILLS = 64  # a tenth of a second


class DeviceClock:
    """Times the current GPU alone: it is given other work first, so that it never waits for Python.

    Between the two events lies the action alone. Whether the device had come to the first of them before the whole
    action was queued is asked each time; then the time is not taken, and there is more other work the next time. That
    work also leaves nothing of the action's tensors in the cache.

    Args:
        fill: some milliseconds of work.
    """

    def __init__(self, fill: Callable[[], object]) -> None:
        self._fill, self._fills = fill, 1

    def repetitions(self, action: Callable[[], object]) -> int:
        """Returns how often an action is to be done in one timing: more than once if it is very short."""
        action()
        return min(MAX_REPETITIONS, max(1, math.ceil(MIN_SECONDS / max(self.read(action), 1e-9))))

    def read(self, action: Callable[[], object], repetitions: int = 1) -> float:
        """Returns the seconds that the device needs for one action.

        Raises:
            RuntimeError: the host is too slow.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while self._fills <= MAX_FILLS:
            for _ in range(self._fills):
                self._fill()
            start.record()
            for _ in range(repetitions):
                action()
            end.record()
            ran_dry = start.query()
            end.synchronize()
            if not ran_dry:
                return start.elapsed_time(end) / 1000 / repetitions
            self._fills *= 2
        raise RuntimeError(f"the GPU waited for Python although it was given {MAX_FILLS} large matrix products before")


@dataclass
class DeviceWork:
    """What a device did in a step.

    Attributes:
        kernels: how often each ran, by name.
        fills, copies: of memory, which are no kernels.
        busy: seconds in which at least one of them ran.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    fills: int = 0
    copies: int = 0
    busy: float = 0.0

    @property
    def launches(self) -> int:
        """All of them together."""
        return self.kernels.total() + self.fills + self.copies


def profile_device(step: Callable[[], object], steps: int) -> DeviceWork:
    """Runs a step under the profiler; returns what the current GPU did in one, on average.

    Args:
        step: what to run; it should have run before.
        steps: how often.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return device_work(profiler.events() or [], steps)


def device_work(events: Iterable[Any], steps: int) -> DeviceWork:
    """Sums up the profiler's events of a device over some steps.

    Ranges that PyTorch shows on the device's line, such as `Optimizer.step`, are no work: they span that of others.
    """
    work = DeviceWork()
    times: list[tuple[float, float]] = []
    for event in events:
        if event.device_type != DeviceType.CUDA or _is_range(event):
            continue
        times.append((event.time_range.start, event.time_range.end))
        if event.name.startswith("Memset"):
            work.fills += 1
        elif event.name.startswith("Memcpy"):
            work.copies += 1
        else:
            work.kernels[event.name] += 1
    work.kernels = Counter({name: round(count / steps) for name, count in work.kernels.items()})
    work.fills, work.copies = round(work.fills / steps), round(work.copies / steps)
    work.busy = _covered(times) / 1e6 / steps
    return work


def kernel_name(name: str) -> str:
    """Returns a kernel's name without what all have in common."""
    for word in ("void ", "at::native::", "(anonymous namespace)::"):
        name = name.replace(word, "")
    return name


def _is_range(event: Any) -> bool:
    return getattr(event, "is_user_annotation", False) or event.name.startswith(("Optimizer.", "ProfilerStep"))


def _covered(times: list[tuple[float, float]]) -> float:
    """Returns how much time intervals cover together, in their unit."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(times):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
