"""`data.cache: ram`: before the first step one process of each machine reads all images, and the others share them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..data import DataSource
from ..data.cache import SHARE, CachedImages, CachePlace, bytes_text, estimate_bytes, in_memory, read_images, too_large
from ..data.loader import workers_for
from ..errors import ConfigError, RunStopped, UserError, counted
from ..memory import free_memory
from .distributed import PeerError, World
from .prepare import Job
from .signals import StopSignal, ignore_stop_signals
from .terminal import bar

__all__ = ["cache_images"]

# seconds after which the processes hear of each other again: nobody counts as missing while images are read
SLICE = 2.0


class _State(NamedTuple):
    """What the processes tell each other while images are read.

    Attributes:
        places: of both splits' caches, of a process that has read them.
        failed: whether this process has an error.
        signal: that this process has received.
    """

    places: list[CachePlace]
    failed: bool
    signal: str | None


class _Reading:
    """Reads both splits, some seconds at a time.

    Args:
        job: the run.
        processes: how many share this machine, and leave the reading to this one, which starts workers for all.

    Attributes:
        caches: of the splits that have been read.
    """

    def __init__(self, job: Job, processes: int) -> None:
        self._data, self._sources = job.config.data, _sources(job)
        self._workers = processes * workers_for(self._data)
        self.caches: list[CachedImages] = []
        total = sum(map(len, self._sources))
        self._steps = bar(self._read(), total, " images", "reading", lambda number: number, leave=False)

    def advance(self) -> bool:
        """Reads for `SLICE`; returns whether all is done."""
        until = time.monotonic() + SLICE
        return not any(time.monotonic() > until for _ in self._steps)

    def _read(self) -> Iterator[int]:
        data, sources = self._data, self._sources
        if not hasattr(os, "memfd_create"):
            raise ConfigError("data.cache: ram needs Linux; set data.cache=none")
        expected = [estimate_bytes(source, data) for source in sources]
        free = free_memory()
        room = None if free is None else int(SHARE * free)
        if room is not None and sum(expected) > room:
            images = counted(sum(map(len, sources)), "image")
            what = f"the {images} of {' and '.join(source.name for source in sources)}"
            raise too_large(what, f"about {bytes_text(sum(expected))}", room)
        for source, size in zip(sources, expected, strict=True):
            left = None if room is None else room - sum(cache.size for cache in self.caches)
            cache = yield from read_images(source, data, size, left, self._workers, ignore_stop_signals)
            self.caches.append(cache)


def cache_images(job: Job, world: World, signal: StopSignal) -> None:
    """Puts the images of both splits into memory, if the configuration says so. Every process calls it.

    Args:
        job: its sources are replaced, and its notes get a line.
        world: the processes; those of one machine share the memory.
        signal: ends it; nothing has been trained yet.

    Raises:
        UserError: an image cannot be read, or there is too little memory; a PeerError on the other processes.
        RunStopped: a signal came.
    """
    if job.config.data.cache == "none":
        return
    since = time.perf_counter()
    machines = world.gather(_machine())
    readers = {machines.index(machine) for machine in machines}
    reader = machines.index(machines[world.rank])
    reading = _Reading(job, machines.count(machines[world.rank])) if world.rank == reader else None
    states: list[_State] = []
    while not states or not all(states[rank].places for rank in readers):
        world.at("reading the images into memory")
        places, error = list[CachePlace](), None
        try:
            if reading is not None and reading.advance():
                places = [cache.place for cache in reading.caches]
        except UserError as e:
            error = e
        states = world.gather(_State(places, error is not None, signal.name))
        if any(state.failed for state in states):
            raise error or PeerError()
        if names := [state.signal for state in states if state.signal]:
            raise RunStopped(f"stopped by {names[0]} while images were read into memory; the same command goes on")
    caches = _opened(reader, states[reader].places) if reading is None else reading.caches
    sources = _sources(job)
    job.train_source, job.val_source = map(in_memory, sources, caches)
    size, seconds = sum(cache.size for cache in caches), time.perf_counter() - since
    images = counted(sum(map(len, sources)), "image")
    job.notes.append(f"{images} read into memory in {seconds:.0f} s, {bytes_text(size)} (data.cache)")


def _opened(reader: int, places: Sequence[CachePlace]) -> list[CachedImages]:
    try:
        return [CachedImages.open(place) for place in places]
    except OSError as e:
        raise ConfigError(
            f"data.cache: the memory of rank {reader} cannot be opened by another process of the same machine "
            f"({e.strerror}); set data.cache=none"
        ) from None


def _sources(job: Job) -> list[DataSource]:
    sources = [source for source in (job.train_source, job.val_source) if isinstance(source, DataSource)]
    assert len(sources) == 2  # others are refused by `BaseConfig.conflicts`
    return sources


def _machine() -> str:
    """Returns the same for processes that can open each other's memory: one user's, in one container of a machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino} {os.geteuid()}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"
