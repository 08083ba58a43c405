"""Compiles the kernels of a stage together, on all cores, before the first of them is run.

Triton compiles a kernel where it is first run, which takes up to some seconds, and a stage has eighteen in a training
step. Its compiler lets other threads run. What is compiled is kept on disk, so that later processes only read it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..branch import BranchCall, BranchParams
from . import branch, mixing
from .launch import intercepting

__all__ = ["compile_ahead", "compile_together", "kernels_of", "launched_by"]

_seen: set[Hashable] = set()


def compile_ahead(calls: Sequence[BranchCall], x: Tensor, trains: bool) -> None:
    """Compiles what a row of branches launches for a map, unless that was done before for one that is cut as it is.

    Args:
        calls: the branches.
        x: the map of the first one, on a GPU.
        trains: whether there is a backward pass.
    """
    # not all that kernels depend on, but cheap: what it misses is compiled where it is run
    first, last = calls[0], calls[-1]
    weight = first.params.conv_weight
    cuts = mixing.cuts(x.shape, first.spec.dtype, weight.shape[-1])
    masks = first.mask is None, last.mask is None
    key = (cuts, x.dtype, x.device, trains, first.spec, weight.shape, masks, len(calls))
    if key in _seen:
        return
    _seen.add(key)
    compile_together(kernels_of(_shortened(calls), x, trains), x.device)


def compile_together(jobs: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Compiles kernels at the same time, if this process has cores for it; else each is compiled where it is run.

    Args:
        jobs: from `launched_by`.
        device: the GPU.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(jobs), cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(partial(_compile, device), jobs))


def kernels_of(calls: Sequence[BranchCall], x: Tensor, trains: bool) -> list[Callable[[], object]]:
    """Returns what compiles each kernel that branches launch, one after the other.

    Args:
        calls, x, trains: as for `compile_ahead`.
    """

    def run(x: Tensor) -> None:
        bare = [
            BranchCall(call.spec, BranchParams.from_tensors(list(map(_bare, call.params.tensors()))), _bare(call.mask))
            for call in calls
        ]
        with torch.set_grad_enabled(trains):  # norms' statistics
            prepared = branch.prepare(bare)
        tasks: list[tuple[BranchCall, Tensor, list[Tensor]]] = []
        for call in prepared:
            saved: list[Tensor] | None = [] if trains else None
            tasks += [] if saved is None else [(call, x, saved)]
            x = branch.forward([call], x, saved)
        grad = x
        for task in reversed(tasks):
            grad, _ = branch.backward(*task, grad, True)

    return launched_by(partial(run, torch.empty_like(x, device="meta")))


def launched_by(run: Callable[[], object]) -> list[Callable[[], object]]:
    """Returns what compiles each kernel that a function launches, for tensors without data; nothing is run."""
    found: dict[Hashable, Callable[[], object]] = {}

    def note(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        types = [arg.dtype if isinstance(arg, Tensor) else arg for arg in args]
        signature = (kernel, *(t if isinstance(t, torch.dtype) else "number" for t in types), *options.items())
        found.setdefault(signature, partial(kernel.warmup, *types, grid=(1,), **options))

    with torch.no_grad(), intercepting(note):
        run()
    return list(found.values())


def _shortened(calls: Sequence[BranchCall]) -> list[BranchCall]:
    """Returns fewer branches that begin and end as a row does and have the same pairs of neighbours.

    Kernels depend on a branch and on its neighbours, and a row repeats itself.
    """
    row: list[BranchCall] = []
    kinds: list[Hashable] = []
    for call in calls:
        row.append(call)
        kinds.append(_kind(call))
        last = len(row) - 1
        before = next((i for i in reversed(range(last)) if kinds[i] == kinds[last]), last)
        if set(pairwise(kinds[before:])) <= set(pairwise(kinds[: before + 1])):  # nothing new since such a branch
            del row[before + 1 :], kinds[before + 1 :]
    return row


def _kind(call: BranchCall) -> Hashable:
    """Returns all of a branch that kernels depend on."""
    tensors = (*call.params.tensors(), call.mask)
    return call.spec, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors)


def _bare(tensor: Any) -> Any:
    return None if tensor is None else torch.empty_like(tensor, device="meta", requires_grad=False)


def _compile(device: torch.device, job: Callable[[], object]) -> None:
    with torch.cuda.device(device), suppress(Exception):  # the launch says what is wrong
        job()
