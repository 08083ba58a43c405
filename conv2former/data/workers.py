"""What can go wrong with a loader's worker processes, each as one error: they end, cannot start or cannot answer.

PyTorch says that a worker has ended from a signal handler, so its error comes wherever the program happens to be: in a
forward pass, in an evaluation, while a checkpoint is written. So whole loops stand in `worker_errors`.
"""

from __future__ import annotations

import multiprocessing
import pickle
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from multiprocessing.context import BaseContext
from multiprocessing.sharedctypes import RawValue
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from .._private import end_workers, worker_processes
from ..errors import WorkerError, is_lost_worker

__all__ = [
    "Sent",
    "context",
    "portable_errors",
    "raise_lost_worker",
    "starting_workers",
    "stop_workers",
    "why_lost",
    "worker_errors",
]

_PATIENCE = 2.0  # seconds until the end of a worker is known
_FEWER = "set data.workers=0, or lower"


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turns PyTorch's error about a worker that has ended into one that says why that may be and what to do.

    Raises:
        WorkerError: a worker was killed or has ended by itself.
    """
    try:
        yield
    except RuntimeError as e:
        if not is_lost_worker(e):
            raise
        raise WorkerError(why_lost(e)) from None


def why_lost(error: BaseException) -> str:
    """Returns what to say about a worker that has ended, for the error by which `is_lost_worker` knows it."""
    cause = error.__cause__  # has the signal, where PyTorch waited for a batch at that moment
    text = str(cause if cause is not None and is_lost_worker(cause) else error)
    found = re.search(r"worker \(pid(?:\(s\))? ([\d, ]+)\)", text)
    who = f"a loader's worker process{f' (pid {found[1]})' if found else ''}"
    if "Bus error" in text or "shared memory" in text:
        return (
            f"{who} found no room in the shared memory, through which images reach this process: enlarge /dev/shm (of "
            f"a container: --shm-size, or --ipc=host), or {_FEWER} data.workers or the batch size"
        )
    if "signal: Killed" in text:
        return (
            f"{who} was killed, most likely by the system for want of memory: lower data.workers or the batch size, or "
            "give the container or the job more memory"
        )
    return f"{who} has ended before its time ({text.strip().splitlines()[0][:200]}): with data.workers=0 one sees why"


@contextmanager
def starting_workers(count: int) -> Iterator[None]:
    """Turns the system's refusal of new processes, or of what they talk through, into an error that says what to do.

    Args:
        count: of worker processes.

    Raises:
        WorkerError: they cannot be started.
    """
    try:
        yield
    except OSError as e:
        raise WorkerError(
            f"{count} worker processes of a loader cannot be started ({e}): {_FEWER} data.workers, or raise the limits "
            "of processes, open files or shared memory (/dev/shm)"
        ) from None


def raise_lost_worker(iterator: Any) -> None:
    """Looks whether a worker of an iterator over a loader has ended by itself, or does so within two seconds.

    Raises:
        RuntimeError: in PyTorch's words, which may come from its signal handler, too.
    """
    deadline = time.monotonic() + _PATIENCE
    processes = worker_processes(iterator)
    while processes and time.monotonic() < deadline:
        for process in processes:
            if process.exitcode is not None:
                code = process.exitcode
                how = f"is killed by signal: {signal.strsignal(-code)}" if code < 0 else f"exited with code {code}"
                raise RuntimeError(f"DataLoader worker (pid {process.pid}) {how}.")
        time.sleep(0.05)


class _Event:
    """What PyTorch needs of multiprocessing's Event, without its lock.

    Each worker looks for every batch whether the event is set that tells all of them to end. One that was killed while
    it had the lock would keep it, and this process would wait for the lock for ever. A byte that is written once needs
    none.
    """

    def __init__(self) -> None:
        self._byte = RawValue("b", 0)

    def set(self) -> None:
        self._byte.value = 1

    def is_set(self) -> bool:
        return bool(self._byte.value)


def context() -> BaseContext:
    """Returns the `multiprocessing_context` of a loader: the usual one, but that no killed worker is waited for."""
    usual = multiprocessing.get_context(multiprocessing.get_start_method())
    return type("LoaderContext", (type(usual),), {"Event": _Event})()


def stop_workers(loader: DataLoader, iterator: Any = None) -> None:
    """Ends a loader's worker processes now; its next iteration starts others.

    They would end when their iterator is collected. From a reference cycle, as an error leaves it, Python then closes
    the files of its queues twice, and what it closes the second time may be another's file by then.

    Args:
        loader: the loader.
        iterator: over it, which one without persistent workers does not keep.
    """
    kept = getattr(loader, "_iterator", None)
    if kept is not None:
        iterator, loader._iterator = kept, None
    end_workers(iterator)


@contextmanager
def portable_errors() -> Iterator[None]:
    """Makes sure that an error can travel from a worker to its parent, which would wait for ever for one that cannot.

    Raises:
        RuntimeError: in the place of an error whose class the parent could not find, with its name and text.
    """
    try:
        yield
    except Exception as e:
        if get_worker_info() is None or _is_portable(type(e)):
            raise
        raise RuntimeError(f"{type(e).__name__}: {e}") from e


def _is_portable(kind: type) -> bool:
    try:
        return pickle.loads(pickle.dumps(kind)) is kind
    except Exception:  # whatever the class of a class raises
        return False


class Sent:
    """A `collate_fn` that moves tensors into shared memory itself, where it runs in a worker.

    PyTorch would do it in a thread of the worker, and without room there the parent would wait for ever.

    Args:
        collate: makes a batch of items: tensors in sequences, mappings and data classes, in each other as it likes.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Any) -> Any:
        with portable_errors():
            batch = self.collate(items)
            if get_worker_info() is not None:
                _share(batch)
        return batch


def _share(value: Any) -> None:
    """Moves the tensors of a batch into shared memory, in place."""
    if isinstance(value, torch.Tensor):
        value.share_memory_()
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _share(inner)
    elif isinstance(value, Mapping):
        _share([*value.values()])
    elif is_dataclass(value):
        _share([getattr(value, field.name) for field in fields(value)])
