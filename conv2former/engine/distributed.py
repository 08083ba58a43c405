"""One process or many, GPU or CPU: the environment decides, as torchrun sets it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["World", "join_world", "rank0_first"]


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, computing on `device`."""

    rank: int
    size: int
    device: torch.device

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


@contextmanager
def join_world(timeout_minutes: float = 10.0) -> Iterator[World]:
    """Joins the other processes of a torchrun, if there are any, and leaves them at the end.

    A GPU is used where there is one (NCCL between processes), else the CPU (gloo).

    Args:
        timeout_minutes: after which a collective that another process does not reach is an error instead of a hang.
    """
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if size == 1:
        yield World(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


@contextmanager
def rank0_first(world: World) -> Iterator[None]:
    """Lets rank 0 through the block first: it writes what the others then find."""
    if world.size > 1 and not world.is_main:
        dist.barrier()
    yield
    if world.size > 1 and world.is_main:
        dist.barrier()
