"""One process or many, GPU or CPU: the environment decides, as torchrun sets it."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError, TrainingError, UserError
from .watch import Watch

__all__ = ["PeerError", "World", "join_world", "wrap"]


class PeerError(UserError):
    """The mistake of another process, which has said what it is; this one ends with it."""

    scope = "run"


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, computing on `device`."""

    rank: int
    size: int
    device: torch.device
    control: Any = None  # a group on the CPU, for messages that must not wait for the GPU
    at: Callable[[str], None] = field(default=lambda where: None)  # tells the others where this process is
    works: Callable[[], None] = field(default=lambda: None)  # and that it is at work there, as often as one likes

    @classmethod
    def from_environment(cls) -> World:
        """Reads what torchrun, or a batch script in its place, has set; talks to nobody.

        Raises:
            ConfigError: there are more processes on this machine than GPUs.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not torch.cuda.is_available():
            return cls(rank, size, torch.device("cpu"))
        local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= count:
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU, {count} can be seen: start {count} per machine "
                "(torchrun --nproc-per-node)"
            )
        return cls(rank, size, torch.device("cuda", local_rank))

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the sum of `value` over all processes, as a new tensor."""
        value = value.clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Returns every process's `value`, any small object, in the order of ranks. All must call it."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, action: Callable[[], Any]) -> None:
        """Runs `action` on the main process while the others wait; if it fails, all fail.

        Raises:
            UserError, TrainingError: that of `action` on the main process, a PeerError on the others.
        """
        error: UserError | TrainingError | None = None
        if self.is_main:
            try:
                action()
            except (UserError, TrainingError) as e:
                error = e
        if self.size > 1 and any(self.gather(error is not None)):
            raise error or PeerError()
        if error:
            raise error


@contextmanager
def join_world(world: World, timeout_minutes: float = 10.0) -> Iterator[World]:
    """Joins the other processes, if there are any, and leaves them at the end.

    Processes talk through NCCL on GPUs, through gloo on CPUs. A group that the caller has made is used as it is.

    Args:
        world: from the environment.
        timeout_minutes: how long the others may wait for one process before they end the run and name it.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1:
        yield world
        return
    # The watch names who is missing; the group's own timeout comes after it and is the second line.
    timeout = timedelta(minutes=timeout_minutes) + timedelta(seconds=20)
    is_mine = not dist.is_initialized()
    store = watched = None
    if is_mine:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=10))))
        meeting = _meet(store, world.rank, world.size)
        watched = dist.PrefixStore("watch", dist.PrefixStore(meeting, _connect_again(store)))
        store = dist.PrefixStore(meeting, store)
        dist.init_process_group(
            "nccl" if world.device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=world.device if world.device.type == "cuda" else None,
        )
    watch = Watch(watched, world.rank, world.size, timeout_minutes * 60) if watched else None
    control = dist.new_group(backend="gloo", timeout=timeout)
    joined = replace(world, control=control)
    if watch:
        joined = replace(joined, at=watch.at, works=watch.works)
    if is_mine and not hasattr(dist.Store, "clone"):
        _kept.append((control, dist.group.WORLD))
    try:
        yield joined
    except BaseException:
        if watch:  # the others may never answer again: leave without a farewell
            watch.stop()
        raise
    if watch:
        watch.stop()
    if is_mine:
        dist.destroy_process_group()


# Before torch 2.8 a group that Python lets go of waits for gloo's thread, which may be waiting for Python to let go of
# its last tensors: for ever, in one of four short runs. So there the groups stay until the process ends.
_kept: list[tuple[Any, Any]] = []


def wrap(model: nn.Module, world: World) -> nn.Module:
    """Returns the network to train through: one that averages gradients over the processes, if there are several.

    A convolution's backward pass chooses the strides of its weight's gradient, and they need not be the weight's. Where
    a dimension has size 1, as in 1x1 and depthwise convolutions, the same memory has several strides; with fused blocks
    and `train.channels_last: false` the memory differs, too. The gradients are exchanged through buffers with the
    weights' strides, and torch warns about every other gradient. So each is given its weight's strides as it comes: a
    new view where only dimensions of size 1 differ, a copy otherwise. Its numbers stay as they are.
    """
    if world.size == 1:
        return model
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 4:
            parameter.register_hook(partial(_with_strides_of, parameter))
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def _with_strides_of(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    shape, wanted, found = parameter.shape, parameter.stride(), gradient.stride()
    if found == wanted:
        return gradient
    if all(size == 1 or a == b for size, a, b in zip(shape, found, wanted, strict=True)):
        return gradient.as_strided(shape, wanted)
    return torch.empty_strided(shape, wanted, dtype=gradient.dtype, device=gradient.device).copy_(gradient)


def _connect_again(store: Any) -> Any:
    """Returns another connection to a store, since each serves one thread at a time."""
    if hasattr(store, "clone"):  # since torch 2.8
        return store.clone()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)


def _meet(store: Any, rank: int, size: int) -> str:
    """Returns a name that only the processes of this attempt share, for their keys in the store.

    After a restart torchrun gives the new processes the store of those before (torch 2.15), whose addresses are still
    in it; and processes on several machines need not agree on how many restarts there were. So each process brings a
    word of its own, and rank 0 answers the words that it finds until all have heard it.
    """
    word = uuid.uuid4().hex
    if rank == 0:
        while not all(store.check([f"heard/{word}/{other}"]) for other in range(1, size)):
            for other in range(1, size):
                if store.check([f"hello/{other}"]):
                    store.set(f"answer/{store.get(f'hello/{other}').decode()}", word)
            time.sleep(0.05)
        return word
    store.set(f"hello/{rank}", word)
    answer = store.get(f"answer/{word}").decode()
    store.set(f"heard/{answer}/{rank}", "yes")
    return answer
