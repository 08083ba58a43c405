"""Times the fused operators of `ops/operators.py` on a GPU, beside the plain formula, a copy and a matrix product."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError, counted
from ...ops import operators
from ...ops.backends import MIN_TRITON, supports_operators
from ..output import text_table
from .device import DeviceClock
from .machine import copy_probe, matmul_probe
from .models import reason
from .progress import Progress

__all__ = ["ALL_STAGES", "DEPTHWISE", "KERNEL_SIZE", "MLP_RATIO", "STAGES", "Clock", "gpu_for", "measure_kernels"]

STAGES = ((72, 56), (144, 28), (288, 14), (576, 7))  # channels and side of conv2former_t's maps at 224 pixels
ALL_STAGES = (1, 2, 3, 4)
KERNEL_SIZE = 11
MLP_RATIO = 4
DEPTHWISE = [(side, k) for side in (7, 14, 28, 56, 112) for k in (3, 5, 7, 9, 11, 13, 21, 31)]  # sides, kernel sizes
DEPTHWISE_CHANNELS = 64
CHECKED_IMAGES = 2  # of a batch, in float64

Results = Sequence[Tensor]


@dataclass(frozen=True)
class Task:
    """One operator, forward or backward, at one stage.

    Attributes:
        name: for the table.
        floor: bytes that it must move: each map that goes in read once, each that comes out written once.
        macs: multiply-accumulates, where they are what takes the time; else None.
        fused, plain: compute it, by the operator and by the formula in eager PyTorch.
        errors: returns how far the results of both are from the formula in float64, relative to their size.
    """

    name: str
    floor: int
    macs: int | None
    fused: Callable[[], Results]
    plain: Callable[[], Results]
    errors: Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Timing:
    """Seconds of a task, one for each round, and its errors."""

    task: Task
    fused: list[float]
    plain: list[float]
    errors: tuple[float, float]


class Clock(Protocol):
    """What tells how long a device takes."""

    def repetitions(self, action: Callable[[], object]) -> int:
        """Returns how often an action is to be done in one timing. It is done here, too, so it is compiled then."""

    def read(self, action: Callable[[], object], repetitions: int = 1) -> float:
        """Returns the seconds of one action."""


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
        macs = grad.numel() * kernel_size**2 if name == "modulate" else None
        tasks += operator_tasks(f"{name} {width} x {side} x {side}", fused, fused_backward, plain, inputs, grad, macs)
    return tasks


def depthwise_tasks(
    batch_size: int, side: int, kernel_size: int, dtype: torch.dtype, device: torch.device
) -> list[Task]:
    """Returns the depthwise convolution alone, forward and backward, beside PyTorch's, which on a GPU is cuDNN's."""

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=kernel_size // 2, groups=DEPTHWISE_CHANNELS)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    shape = (batch_size, DEPTHWISE_CHANNELS, side, side)
    x, grad = (randn(*shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight = randn(DEPTHWISE_CHANNELS, 1, kernel_size, kernel_size) / kernel_size
    inputs = (x, weight, randn(DEPTHWISE_CHANNELS))
    name = f"{kernel_size} x {kernel_size}, {DEPTHWISE_CHANNELS} x {side} x {side}"
    operator, gradients = operators.depthwise_conv2d, operators.depthwise_conv2d_backward
    tasks = operator_tasks(name, operator, gradients, plain, inputs, grad, grad.numel() * kernel_size**2)
    return [tasks[0], replace(tasks[1], macs=2 * grad.numel() * kernel_size**2)]  # two sums, of x and of the weight


def operator_tasks(
    name: str,
    fused: Callable[..., Tensor],
    fused_backward: Callable[..., Results],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor,
    macs: int | None,
) -> list[Task]:
    """Returns the forward and the backward pass of one operator; the latter has three sums as long as the former's."""
    maps = sum(x.shape == grad.shape for x in inputs)
    size = grad.numel() * grad.element_size()
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = plain(*leaves)

    def no_grad(operator: Callable[..., Tensor]) -> Callable[[], Results]:
        @torch.no_grad()
        def forward() -> Results:
            return [operator(*inputs)]

        return forward

    def plain_backward(grad: Tensor) -> Results:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def forward_errors() -> tuple[float, float]:
        exact = exact_results(plain, inputs, grad)[:1]
        return error(no_grad(fused)(), exact), error(no_grad(plain)(), exact)

    def backward_errors() -> tuple[float, float]:
        exact = exact_results(plain, inputs, grad)[1:]
        few = torch.zeros_like(grad)  # of the other images nothing is in the sums over the batch
        few[:CHECKED_IMAGES] = grad[:CHECKED_IMAGES]
        return error(fused_backward(few, *inputs), exact), error(plain_backward(few), exact)

    forward, backward = f"{name} forward", f"{name} backward"
    backward_macs = None if macs is None else 3 * macs
    return [
        Task(forward, (maps + 1) * size, macs, no_grad(fused), no_grad(plain), forward_errors),
        Task(
            backward,
            (2 * maps + 1) * size,
            backward_macs,
            lambda: fused_backward(grad, *inputs),
            lambda: plain_backward(grad),
            backward_errors,
        ),
    ]


def exact_results(plain: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Results:
    """Returns the result of the formula and the gradients of its inputs for the first images, in float64."""
    few = [x[:CHECKED_IMAGES] if x.shape == grad.shape else x for x in inputs]
    leaves = [x.detach().double().requires_grad_() for x in few]
    out = plain(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad[:CHECKED_IMAGES].double())]


def error(results: Results, exact: Results) -> float:
    """Returns how far results are from exact ones, relative to their size: the largest of all tensors' errors.

    Maps may have more images than the exact ones.
    """
    pairs = [(x[: len(y)].double(), y) for x, y in zip(results, exact, strict=True)]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def time_tasks(
    tasks: Sequence[Task], copy: Callable[[], None], rounds: int, clock: Clock
) -> tuple[list[float], list[Timing]]:
    """Times a copy, the operator and the formula of each task in turns, after a round that does not count.

    Returns:
        Seconds of the copy, and the timings.
    """
    copies: list[float] = []
    timings = []
    for task in tasks:
        errors = task.errors()
        fused: list[float] = []
        plain: list[float] = []
        turns = [(values, f, clock.repetitions(f)) for values, f in ((fused, task.fused), (plain, task.plain))]
        for number in range(rounds + 1):
            for seconds, action, repetitions in turns[:: 1 if number % 2 else -1]:
                copies.append(clock.read(copy))
                seconds.append(clock.read(action, repetitions))
        timings.append(Timing(task, fused[1:], plain[1:], errors))
    return copies[2:], timings


HEADER = [
    f"{'operator, channels x map':32}", "     us", "plain us", "ratio", "floor MB", "of copy", "of matmul", "error",
    "plain error",
]  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What the device does by itself in a second: bytes that a copy reads and writes, multiply-accumulates."""

    copy: float
    matmul: float


def describe(timings: Sequence[Timing], rates: Rates) -> list[str]:
    """Returns the table: medians, the ratio's median, shares of the device's rates that floor and products take.

    Its columns are as wide whatever the rows are, so that rows can be printed one by one.

    Args:
        timings: of at least one round.
        rates: of the device.
    """
    rows = []
    for timing in timings:
        task, fused, plain = timing.task, statistics.median(timing.fused), statistics.median(timing.plain)
        ratio = statistics.median(p / f for f, p in zip(timing.fused, timing.plain, strict=True))
        rows.append(
            [
                task.name,
                f"{1e6 * fused:.0f}",
                f"{1e6 * plain:.0f}",
                f"{ratio:.2f}",
                f"{task.floor / 1e6:.0f}",
                f"{task.floor / fused / rates.copy:.0%}",
                "-" if task.macs is None else f"{task.macs / fused / rates.matmul:.1%}",
                *(f"{error:.0e}" for error in timing.errors),
            ]
        )
    return text_table(HEADER, rows).splitlines()


def measure_kernels(
    batch_size: int,
    dtype: torch.dtype,
    rounds: int,
    stages: Sequence[int] = ALL_STAGES,
    progress: Progress | None = None,
    depthwise: bool = False,
) -> Iterator[str]:
    """Times the fused operators at stages of conv2former_t, 224 pixels, on the current GPU.

    An operator that fails is a row with the reason.

    Args:
        batch_size: images.
        dtype: float32, bfloat16 or float16, of maps and parameters.
        rounds: timings of each.
        stages: 1 to 4.
        progress: told how far it is.
        depthwise: instead, the depthwise convolution alone for all of `DEPTHWISE`.

    Yields:
        Lines to print, as they come.

    Raises:
        UserError: there is no GPU, or none that the kernels run on, or nothing could be measured.
    """
    device = gpu_for("kernels", dtype)
    made = [partial(make_tasks, batch_size, *STAGES[number - 1], dtype, device) for number in stages]
    cases = {f"stage {number}": make for number, make in zip(stages, made, strict=True)}
    if depthwise:
        cases = {
            f"{k} x {k}, {side} x {side}": partial(depthwise_tasks, batch_size, side, k, dtype, device)
            for side, k in DEPTHWISE
        }
    if progress is not None:
        what = f"two operators, forward and backward, at {counted(len(stages), 'stage')} beside the plain formula"
        what = (
            f"a depthwise convolution, forward and backward, in {len(cases)} sizes beside cuDNN's"
            if depthwise
            else what
        )
        progress.say(f"timing {what}, {counted(rounds, 'round')} each; each is compiled before, up to five seconds")
    clock = DeviceClock(matmul_probe(device, torch.bfloat16)[0])
    (copy, copied), (multiply, macs) = copy_probe(device), matmul_probe(device, dtype)
    bandwidth, products = (
        work / statistics.median([clock.read(action) for _ in range(rounds + 1)][1:])
        for action, work in ((copy, copied), (multiply, macs))
    )
    yield (
        f"{torch.cuda.get_device_name(device)}, batch {batch_size}, {str(dtype).removeprefix('torch.')}, medians of "
        f"{rounds} rounds; a copy moves {bandwidth / 1e9:.0f} GB/s, read and written together, and a matrix product "
        f"has {products / 1e12:.0f} T multiply-adds/s; errors are relative to float64, of {CHECKED_IMAGES} images"
    )
    yield text_table(HEADER, [])
    measured = 0
    for where, make in cases.items():
        if progress is not None:
            progress.at(f"{where}: making the maps")
        try:
            tasks = make()
        except Exception as e:  # of the formula, on this machine: mostly memory
            yield f"{where}: not measured: {reason(e)}"
            continue
        for task in tasks:
            if progress is not None:
                progress.at(f"{where}: {task.name}; compiled at the first use, which takes some seconds")
            try:
                copies, timings = time_tasks([task], copy, rounds, clock)
            except Exception as e:  # whatever a kernel, its compiler or the formula raises
                yield f"{task.name}: not measured: {reason(e)}"
                continue
            measured += 1
            yield describe(timings, Rates(copied / statistics.median(copies), products))[-1]
    if not measured:
        raise UserError("benchmark kernels: nothing could be measured; the reasons are above")


def gpu_for(command: str, dtype: torch.dtype) -> torch.device:
    """Returns the current GPU.

    Args:
        command: of `benchmark.py`, for its errors.
        dtype: of the maps.

    Raises:
        UserError: there is none, or it has no kernels for that type.
    """
    if not torch.cuda.is_available():
        raise UserError(
            f"benchmark {command}: the fused operators need an NVIDIA GPU, and torch finds none here; "
            "run this on a machine with one"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    probe = torch.empty(1, 8, 8, 8, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    if not supports_operators(probe, KERNEL_SIZE):
        raise UserError(
            f"benchmark {command}: {torch.cuda.get_device_name(device)} runs no fused operators for {dtype}; they need "
            f"an NVIDIA GPU of capability 8.0 or more, Triton {MIN_TRITON} or newer, and float32, bfloat16 or float16"
        )
    return device
