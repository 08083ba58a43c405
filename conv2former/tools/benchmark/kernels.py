"""Times the fused operators of `ops/operators.py` on a GPU, beside the plain formula and a copy of the same bytes."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError, counted
from ...ops import operators
from ...ops.backends import MIN_TRITON, supports_operators
from ..output import text_table
from .machine import copy_probe, matmul_probe
from .models import reason
from .progress import Progress

__all__ = ["measure_kernels"]

STAGES = ((72, 56), (144, 28), (288, 14), (576, 7))  # channels and side of conv2former_t's maps at 224 pixels
KERNEL_SIZE = 11
MLP_RATIO = 4

Results = Sequence[Tensor]


@dataclass(frozen=True)
class Task:
    """One operator, forward or backward, at one stage.

    Attributes:
        name: for the table.
        floor: bytes that it must move: each map that goes in read once, each that comes out written once.
        fused, plain: compute it, by the operator and by the formula in eager PyTorch.
    """

    name: str
    floor: int
    fused: Callable[[], Results]
    plain: Callable[[], Results]


@dataclass(frozen=True)
class Timing:
    """Seconds of a task, one for each round, and how far its two results are apart, relative to their size."""

    task: Task
    fused: list[float]
    plain: list[float]
    difference: float


def plain_modulate(a: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
    return F.conv2d(F.gelu(a), weight, bias, padding=weight.shape[-1] // 2, groups=a.shape[1]) * v


def plain_mlp_mix(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = F.gelu(f)
    return h + F.gelu(F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2, groups=f.shape[1]))


def make_tasks(batch_size: int, channels: int, side: int, dtype: torch.dtype, device: torch.device) -> list[Task]:
    """Returns both operators, forward and backward, on random maps of one stage.

    The plain backward pass finds what the plain forward pass kept; the fused one computes it again.
    """

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    tasks = []
    for name, fused, fused_backward, plain, width, kernel_size, maps in (
        ("modulate", operators.modulate, operators.modulate_backward, plain_modulate, channels, KERNEL_SIZE, 2),
        ("mlp_mix", operators.mlp_mix, operators.mlp_mix_backward, plain_mlp_mix, MLP_RATIO * channels, 3, 1),
    ):
        shape = (batch_size, width, side, side)
        a, v, grad = (randn(*shape).contiguous(memory_format=torch.channels_last) for _ in range(3))
        weight = randn(width, 1, kernel_size, kernel_size) / kernel_size
        inputs = (a, weight, randn(width), v)[: 2 + maps]
        tasks += operator_tasks(f"{name} {width} x {side} x {side}", fused, fused_backward, plain, inputs, grad)
    return tasks


def operator_tasks(
    name: str,
    fused: Callable[..., Tensor],
    fused_backward: Callable[..., Results],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor,
) -> list[Task]:
    """Returns the forward and the backward pass of one operator."""
    maps = sum(x.shape == grad.shape for x in inputs)
    size = grad.numel() * grad.element_size()
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = plain(*leaves)

    def no_grad(operator: Callable[..., Tensor]) -> Callable[[], Results]:
        @torch.no_grad()
        def forward() -> Results:
            return [operator(*inputs)]

        return forward

    return [
        Task(f"{name} forward", (maps + 1) * size, no_grad(fused), no_grad(plain)),
        Task(
            f"{name} backward",
            (2 * maps + 1) * size,
            lambda: fused_backward(grad, *inputs),
            lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
        ),
    ]


@functools.cache
def filler() -> Callable[[], None]:
    """Returns some milliseconds of work for the current GPU: one large matrix product."""
    return matmul_probe(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)[0]


def cuda_seconds(action: Callable[[], object]) -> float:
    """Returns the seconds that the device spends on an action.

    The device is kept busy while Python launches the action, or it would wait for Python between the two events.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    filler()()
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def time_tasks(
    tasks: Sequence[Task], copy: Callable[[], None], rounds: int, clock: Callable[[Callable[[], object]], float]
) -> tuple[list[float], list[Timing]]:
    """Times a copy, the operator and the formula of each task in turns, after a round that does not count.

    The copy runs before everything that is timed, so that nothing is found in the cache.

    Returns:
        Seconds of the copy, and the timings.
    """
    copies: list[float] = []
    timings = []
    for task in tasks:
        apart = max(relative_difference(x, y) for x, y in zip(task.fused(), task.plain(), strict=True))
        fused: list[float] = []
        plain: list[float] = []
        for number in range(rounds + 1):
            turns = [(fused, task.fused), (plain, task.plain)]
            for seconds, action in turns[:: 1 if number % 2 else -1]:
                copies.append(clock(copy))
                seconds.append(clock(action))
        timings.append(Timing(task, fused[1:], plain[1:], apart))
    return copies[2:], timings


def relative_difference(x: Tensor, y: Tensor) -> float:
    return float((x.float() - y.float()).norm() / y.float().norm())


HEADER = [f"{'operator, channels x map':32}", "     us", "plain us", "ratio", "floor MB", "of copy", "difference"]


def describe(timings: Sequence[Timing], copy_bandwidth: float) -> list[str]:
    """Returns the table: medians, the ratio's median, and the share of the copy's bandwidth that the floor takes.

    Its columns are as wide whatever the rows are, so that rows can be printed one by one.

    Args:
        timings: of at least one round.
        copy_bandwidth: bytes per second, read and written together.
    """
    rows = []
    for timing in timings:
        fused, plain = statistics.median(timing.fused), statistics.median(timing.plain)
        ratio = statistics.median(p / f for f, p in zip(timing.fused, timing.plain, strict=True))
        rows.append(
            [
                timing.task.name,
                f"{1e6 * fused:.0f}",
                f"{1e6 * plain:.0f}",
                f"{ratio:.2f}",
                f"{timing.task.floor / 1e6:.0f}",
                f"{timing.task.floor / fused / copy_bandwidth:.0%}",
                f"{timing.difference:.0e}",
            ]
        )
    return text_table(HEADER, rows).splitlines()


def measure_kernels(
    batch_size: int, dtype: torch.dtype, rounds: int, progress: Progress | None = None
) -> Iterator[str]:
    """Times the fused operators at the four stages of conv2former_t, 224 pixels, on the current GPU.

    An operator that fails is a row with the reason.

    Args:
        batch_size: images.
        dtype: float32, bfloat16 or float16, of maps and parameters.
        rounds: timings of each.
        progress: told how far it is.

    Yields:
        Lines to print, as they come.

    Raises:
        UserError: there is no GPU, or none that the kernels run on, or nothing could be measured.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "benchmark kernels: the fused operators need an NVIDIA GPU, and torch finds none here; "
            "run this on a machine with one"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    probe = torch.empty(1, 8, 8, 8, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    name = torch.cuda.get_device_name(device)
    if not supports_operators(probe, KERNEL_SIZE):
        raise UserError(
            f"benchmark kernels: {name} runs no fused operators for {dtype}; they need an NVIDIA GPU of capability 8.0 "
            f"or more, Triton {MIN_TRITON} or newer, and float32, bfloat16 or float16"
        )
    if progress is not None:
        progress.say(
            f"timing two operators, forward and backward, at {len(STAGES)} stages beside the plain formula, "
            f"{counted(rounds, 'round')} each; each is compiled before, one to five seconds"
        )
    copy, copied = copy_probe(device)
    bandwidth = copied / statistics.median([cuda_seconds(copy) for _ in range(rounds + 1)][1:])
    yield (
        f"{name}, batch {batch_size}, {str(dtype).removeprefix('torch.')}, medians of {rounds} rounds; "
        f"a copy moves {bandwidth / 1e9:.0f} GB/s, read and written together"
    )
    yield text_table(HEADER, [])
    measured = 0
    for number, (channels, side) in enumerate(STAGES):
        where = f"stage {number + 1} of {len(STAGES)}, {channels} x {side} x {side}"
        if progress is not None:
            progress.at(f"{where}: making the maps")
        try:
            tasks = make_tasks(batch_size, channels, side, dtype, device)
        except Exception as e:  # of the formula, on this machine: mostly memory
            yield f"{where}: not measured: {reason(e)}"
            continue
        for task in tasks:
            if progress is not None:
                progress.at(f"{where}: {task.name}; compiled at the first use, which takes some seconds")
            try:
                copies, timings = time_tasks([task], copy, rounds, cuda_seconds)
            except Exception as e:  # whatever a kernel, its compiler or the formula raises
                yield f"{task.name}: not measured: {reason(e)}"
                continue
            measured += 1
            yield describe(timings, copied / statistics.median(copies))[-1]
    if not measured:
        raise UserError("benchmark kernels: nothing could be measured; the reasons are above")
