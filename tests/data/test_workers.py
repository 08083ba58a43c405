"""Loader workers that are killed, cannot start, or cannot send what they have."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision.tv_tensors import Mask

from conv2former.data import workers
from conv2former.data.batch import collate, load_image
from conv2former.data.loader import Loader, batches
from conv2former.data.workers import Sent
from conv2former.errors import WorkerError

pytestmark = pytest.mark.slow


class Items(Dataset):
    """Six items, each from calling `act` in a worker."""

    def __init__(self, act) -> None:
        self.act = act

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        return load_image(lambda: (torch.zeros(3, 2, 2), 0), lambda image: self.act(index) or image, False, None, index)


def load(act, workers: int = 1) -> list:
    loader = DataLoader(Items(act), batch_size=2, num_workers=workers, collate_fn=Sent(collate), timeout=workers * 60)
    return list(batches(loader))


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed, most likely by the system for want of memory"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "no room in the shared memory"),
        (lambda: os._exit(5), "has ended before its time"),
    ],
    ids=["killed", "bus error", "exit"],
)
def test_a_worker_that_ends_is_one_error(end, said):
    others = set(multiprocessing.active_children())  # which other tests have left
    with pytest.raises(WorkerError, match=said) as raised:
        load(lambda index: end() if index == 3 else None)
    assert raised.value.exit_code == 3
    assert "\n" not in str(raised.value)
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "gone")])
def test_a_worker_that_is_killed_while_it_hands_over_a_batch(monkeypatch, error):
    """Its batch cannot be fetched, which this process may see before the signal of its end comes."""

    def fetch(self, *args):
        os.kill(self._workers[0].pid, signal.SIGKILL)
        raise error

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", fetch)
    with pytest.raises(WorkerError, match=r"worker process \(pid \d+\) was killed, most likely by the system"):
        load(lambda index: None)


def test_an_error_of_the_system_without_a_dead_worker_stays_what_it_is(monkeypatch):
    def fetch(self, *args):
        raise PermissionError(13, "no")

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", fetch)
    monkeypatch.setattr(workers, "_PATIENCE", 0.2)
    with pytest.raises(PermissionError):
        load(lambda index: None)


@pytest.mark.timeout(60)
def test_a_worker_that_ends_with_a_lock_is_not_waited_for():
    """The lock of the event that tells all workers to end, which each of them takes for a moment in every batch."""

    def end(index: int) -> None:
        if index == 2:
            frame = sys._getframe()
            while frame.f_code.co_name != "_worker_loop":
                frame = frame.f_back
            if isinstance(event := frame.f_locals["done_event"], Event):
                event._cond.acquire()
            os.kill(os.getpid(), signal.SIGKILL)

    others = set(multiprocessing.active_children())
    loader = Loader(Items(end), batch_size=2, num_workers=2, collate_fn=Sent(collate), persistent_workers=True)
    with pytest.raises(WorkerError, match="was killed"):
        list(batches(loader))
    assert set(multiprocessing.active_children()) <= others


def test_a_worker_without_room_for_its_batch(monkeypatch):
    def share(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", share)
    with pytest.raises(WorkerError, match="--shm-size"):
        load(lambda index: None)


def test_workers_that_cannot_be_started():
    class Refused(DataLoader):
        def __iter__(self):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with pytest.raises(WorkerError, match="1 worker processes of a loader cannot be started"):
        next(batches(Refused([], num_workers=1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_class_that_the_parent_cannot_find(workers):
    class Local(Exception):
        pass

    def act(index):
        raise Local("of a plug-in")

    with pytest.raises(RuntimeError if workers else Local, match="of a plug-in"):
        load(act, workers)


@dataclass(frozen=True, slots=True)
class Holder:
    inner: Any


def test_all_tensors_of_a_batch_go_into_shared_memory(monkeypatch):
    one, two, three, four = tensors = [torch.ones(2), torch.ones(3), torch.ones(4), Mask(torch.ones(2, 2))]
    batch = {"images": [one], "targets": ({"boxes": two, "names": ["cat"]}, Holder({"masks": [three, four]})), "n": 3}
    assert Sent(dict)(batch) == batch
    assert not any(tensor.is_shared() for tensor in tensors)  # without a worker they stay where they are
    monkeypatch.setattr(workers, "get_worker_info", lambda: "a worker")
    Sent(dict)(batch)
    assert all(tensor.is_shared() for tensor in tensors)


def test_a_batch_is_as_it_was():
    alone, sent = load(lambda index: None, 0), load(lambda index: None)
    assert [batch.indices.tolist() for batch in sent] == [batch.indices.tolist() for batch in alone]
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, sent, strict=True))
