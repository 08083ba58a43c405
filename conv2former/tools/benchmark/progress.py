"""How far a measurement is and how long it will still take: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from tqdm import tqdm

from ...engine.terminal import bar_size
from ...printing import encodable
from ...text import printable
from .results import Plan, Result
from .steps import MIN_SECONDS

__all__ = ["Forecast", "Progress", "duration"]

LINE_SECONDS = 10.0  # at least, between two lines where there is no terminal
BAR_SECONDS = 1.0  # between two pictures of a bar
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"


class Progress:
    """Tells on standard error what is being done and how long the rest will take.

    Args:
        ticking: whether a thread tells that something long is still going on; not where processes are forked.
        clock: seconds.
    """

    def __init__(self, ticking: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._since = clock, clock()
        self._last_line = -math.inf
        self._status = "preparing"
        self._left: float | None = None
        self._lock = threading.RLock()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(desc=self._status, total=1.0, bar_format=BAR_FORMAT, leave=False, **bar_size())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True) if ticking else None
        if self._thread is not None:
            self._thread.start()

    def at(self, status: str, left: float | None = None) -> None:
        """Says what is being done now.

        Args:
            status: words.
            left: seconds until the end of the measurement; None leaves the last guess, less what has gone since.
        """
        with self._lock:
            self._status = printable(status)
            if left is not None:
                self._left = self._clock() + left
            self._show()

    def say(self, text: str) -> None:
        """Writes lines of their own, above the bar if there is one."""
        text = encodable(tuple(text.split("\n")), sys.stderr)
        with self._lock:
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        """Writes results to standard output, above the bar if there is one."""
        text = encodable(tuple(text.split("\n")), sys.stdout)
        with self._lock:
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
                sys.stdout.flush()
            else:
                print(text, flush=True)

    @property
    def left(self) -> float | None:
        """Seconds until the end of the measurement, as far as one can tell."""
        return None if self._left is None else max(0.0, self._left - self._clock())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar and the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def _tick(self) -> None:
        while not self._ended.wait(LINE_SECONDS / 4 if self._bar is None else BAR_SECONDS):
            with self._lock:
                self._show()

    def _show(self) -> None:
        gone, left = self._clock() - self._since, self.left
        rest = "" if left is None else f"about {duration(left)} left"
        if self._bar is not None:
            self._bar.set_description_str(self._status, refresh=False)
            self._bar.set_postfix_str(rest, refresh=False)
            self._bar.n = 0.0 if left is None else gone / max(gone + left, 1e-9)
            self._bar.refresh()
        elif self._clock() - self._last_line >= LINE_SECONDS:
            self._last_line = self._clock()
            print(f"[{', '.join(filter(None, (duration(gone), rest)))}] {self._status}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Returns `45 s`, `12 min` or `3.1 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@dataclass
class Task:
    """What is to be done with one network in one setting, and what is known of its time.

    Attributes:
        kind: what has about the same rate of multiply-accumulates.
        macs: multiply-accumulates of a step; None where nobody knows.
        timings: still to come.
        step, preparing: seconds; None until they were seen.
    """

    kind: Hashable
    macs: float | None
    timings: int
    step: float | None = None
    preparing: float | None = None


class Forecast:
    """Guesses how long a measurement will still take, from the steps that were seen so far.

    A step's time is taken to grow with its multiply-accumulates, at the rate of steps with the same precision and
    execution, or of all; and the preparation to be as many steps long.
    """

    def __init__(self, plan: Plan, macs: Callable[[Result], float | None]) -> None:
        self._plan = plan
        self._tasks: dict[Hashable, Task] = {}
        for members in plan.groups():
            for network, setting in members:
                kind = (setting.precision, setting.execution)
                steps = macs(Result(network.label, setting))
                self._tasks[network.label, setting] = Task(kind, steps, plan.rounds)

    def prepared(self, result: Result, seconds: float) -> None:
        """Takes in how long the preparation and a first step took; a network that failed needs no more time."""
        task = self._tasks[result.network, result.setting]
        task.preparing = seconds
        task.step = result.first_seconds
        if result.error:
            task.timings = 0

    def timed(self, result: Result) -> None:
        """Takes in the last timing of a network."""
        task = self._tasks[result.network, result.setting]
        task.timings = 0 if result.error else self._plan.rounds - len(result.seconds)
        if result.seconds:
            task.step = result.seconds[-1]

    def left(self) -> float | None:
        """Returns the seconds that are left, or None as long as no step was seen."""
        seen = [task for task in self._tasks.values() if task.step is not None]
        if not seen:
            return None
        total = 0.0
        for task in self._tasks.values():
            alike = [other for other in seen if other.kind == task.kind] or seen
            step = task.step if task.step is not None else _step(task, alike)
            extra = 1 if self._plan.device.type == "cuda" else 0  # see Clock
            steps = self._plan.steps or max(1, math.ceil(MIN_SECONDS / max(step, 1e-6)))
            total += task.timings * (steps + extra) * step
            if task.preparing is None:
                total += step * _mean([(other.preparing or 0.0) / max(other.step or 0.0, 1e-6) for other in alike])
        return total


def _step(task: Task, alike: list[Task]) -> float:
    """Returns the seconds that a step is expected to take, from those of similar ones."""
    known = [other for other in alike if other.macs and other.step is not None]
    if task.macs is None or not known:
        return _mean([other.step or 0.0 for other in alike])
    return task.macs * sum(other.step or 0.0 for other in known) / sum(other.macs or 0.0 for other in known)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
