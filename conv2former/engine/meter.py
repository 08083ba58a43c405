"""What a run measures of itself between two log lines: speed, waiting, memory, and the mean loss."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence

import torch

from ..data.loader import usable_cores
from .distributed import World

__all__ = ["MeanLoss", "Meter", "describe_waiting", "peak_memory"]

MUCH_WAITING = 0.05  # of the training time, for images: worth a hint
LONG_ENOUGH = 60.0  # seconds of training; in less, the start of the loader's workers is much of the waiting


class Meter:
    """Images per second, and the share of the time spent waiting for them, since it was last read and in the whole run.

    Args:
        seconds, waited: of training so far, in earlier attempts, and of waiting in it.
    """

    def __init__(self, seconds: float = 0.0, waited: float = 0.0) -> None:
        self.seconds, self.waited = seconds, waited
        self.start()

    @property
    def share_waited(self) -> float | None:
        """The share of the whole run's training time; None if there was none."""
        return round(self.waited / self.seconds, 4) if self.seconds else None

    def start(self) -> None:
        """Begins anew after something that is not training, such as an evaluation."""
        self.images, self._since = 0, time.perf_counter()
        self._mark, self._waited_before = self._since, self.waited

    def waiting(self) -> Meter:
        return self

    def __enter__(self) -> None:
        self._pass()

    def __exit__(self, *_: object) -> None:
        self.waited += self._pass()

    def _pass(self) -> float:
        """Adds the time since the last mark to the run's, and returns it."""
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self.seconds += passed
        return passed

    def read(self) -> dict[str, float]:
        """Returns both since it was last read or started."""
        self._pass()
        seconds, waited = max(self._mark - self._since, 1e-9), self.waited - self._waited_before
        row = {"images_per_second": round(self.images / seconds, 1), "data_wait": round(waited / seconds, 4)}
        self.start()
        return row


class MeanLoss:
    """The mean training loss over all processes and the steps since it was last started.

    What has been added is part of a checkpoint, so that a resumed run logs the same numbers. A loss that is not
    finite, which fp16 may have, does not count.

    Args:
        world: the processes.
        saved: as `state` returned it, perhaps of another number of processes; None for nothing so far.
    """

    def __init__(self, world: World, saved: Sequence[Sequence[float]] | None = None) -> None:
        self.world = world
        mine = [0.0, 0.0]
        if saved and len(saved) == world.size:
            mine = list(saved[world.rank])
        elif saved:
            mine = [sum(column) / world.size for column in zip(*saved, strict=True)]
        self._sums = torch.tensor(mine, dtype=torch.float64, device=world.device)  # of losses; how many they are

    def add(self, loss: torch.Tensor) -> None:
        """Adds a step's loss on this process, scalar; does not wait for the device."""
        counts = torch.isfinite(loss)
        self._sums += torch.stack([torch.where(counts, loss, 0.0), counts.to(loss.dtype)])

    def mean(self) -> float:
        """Returns the mean, not a number if nothing was added; every process must call it."""
        total, count = self.world.sum(self._sums).tolist()
        return total / count if count else math.nan

    def start(self) -> None:
        """Begins anew."""
        self._sums.zero_()

    def state(self) -> list[list[float]]:
        """Returns what every process has added; every one must call it."""
        return self.world.gather(self._sums.tolist())


def peak_memory(device: torch.device) -> float:
    """Returns the most memory that this process has had so far, in GiB: PyTorch's on a GPU, or else all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def describe_waiting(share: float, seconds: float, workers: int, source: str) -> str:
    """Returns a line on how long a run waited for images, with a hint where more workers can help.

    Args:
        share: of the training time.
        seconds: of training.
        workers: of this process's loader.
        source: the configured one. The digits are read without workers, on purpose.
    """
    line = f"{share:.1%} of the training time was waiting for images"
    cores = usable_cores()
    if share <= MUCH_WAITING or seconds < LONG_ENOUGH or source == "digits" or workers >= cores:
        return line
    return f"{line}; more data.workers may help: {workers} for {cores} usable cores"
