"""Times other values of the constants by which the Triton kernels are cut, on the GPU that is at hand.

Nothing is tuned at the start of a run, so that two runs give the same bits; what is found here is written into
`ops/cuda/mixing.py` by hand.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..output import text_table
from .device import DeviceClock
from .kernels import KERNEL_SIZE, MLP_RATIO, STAGES, Clock, gpu_for
from .machine import matmul_probe
from .models import reason
from .progress import Progress

__all__ = ["VARIANTS", "Variant", "measure_variants"]

BLOCKS = (3, 3, 12, 3)  # of conv2former_t's stages

# The constants of ops/cuda/mixing.py, and the values to time: first the one that is there.
VARIANTS: dict[str, tuple[int, ...]] = {
    "BAND_PARTS": (1, 2, 4),
    "BAND_REGISTERS": (128, 168, 255),
    "MLP_STRIP": (4, 2, 8),
    "PROGRAMS": (512, 1024, 2048),
}
NAMES = ("modulate", "modulate backward", "mlp_mix", "mlp_mix backward")
HEADER = [f"{'constant':16}", "value", *NAMES, "     all"]


@dataclass(frozen=True)
class Variant:
    """A value of a constant, and the milliseconds of each operator in a step of conv2former_t, or an error."""

    constant: str
    value: int
    milliseconds: tuple[float, ...] = ()
    error: str = ""

    def row(self) -> list[str]:
        """Returns its line of the table."""
        figures = [*self.milliseconds, sum(self.milliseconds)] if not self.error else []
        return [self.constant, str(self.value), *(f"{ms:.2f}" for ms in figures), *([self.error] if self.error else [])]


@contextmanager
def with_constant(name: str, value: int) -> Iterator[None]:
    """Sets a constant of `ops/cuda/mixing.py` for a while."""
    from ...ops.cuda import mixing  # Triton is optional

    before = getattr(mixing, name)
    setattr(mixing, name, value)
    try:
        yield
    finally:
        setattr(mixing, name, before)


def make_actions(batch_size: int, dtype: torch.dtype, device: torch.device) -> list[list[Callable[[], object]]]:
    """Returns the operators in the order of `NAMES`, each at all stages."""
    from ...ops.cuda import mixing  # Triton is optional

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def conv(width: int, side: int) -> tuple[Tensor, Tensor]:
        return randn(width, 1, side, side) / side, randn(width)

    actions: list[list[Callable[[], object]]] = [[] for _ in NAMES]
    for channels, side in STAGES:
        maps = [randn(batch_size, c, side, side) for c in (channels, channels, channels, *[MLP_RATIO * channels] * 2)]
        a, v, dm, f, ds = (x.contiguous(memory_format=torch.channels_last) for x in maps)
        weight, bias = conv(channels, KERNEL_SIZE)
        mlp_weight, mlp_bias = conv(MLP_RATIO * channels, 3)
        actions[0].append(partial(mixing.modulate, a, weight, bias, v))
        actions[1].append(partial(mixing.modulate_backward, dm, a, weight, bias, v))
        actions[2].append(partial(mixing.mlp_mix, f, mlp_weight, mlp_bias))
        actions[3].append(partial(mixing.mlp_mix_backward, ds, f, mlp_weight, mlp_bias))
    return actions


def time_variant(
    constant: str, value: int, actions: Sequence[Sequence[Callable[[], object]]], rounds: int, clock: Clock
) -> Variant:
    """Times all operators with a value of a constant."""
    try:
        with with_constant(constant, value), torch.no_grad():
            totals = []
            for stages in actions:
                repetitions = [clock.repetitions(action) for action in stages]
                seconds = [
                    statistics.median(clock.read(action, count) for _ in range(rounds))
                    for action, count in zip(stages, repetitions, strict=True)
                ]
                totals.append(1000 * sum(n * s for n, s in zip(BLOCKS, seconds, strict=True)))
            return Variant(constant, value, tuple(totals))
    except Exception as e:  # whatever a kernel or its compiler raises
        return Variant(constant, value, error=f"not measured: {reason(e)}")


def conclusion(constant: str, variants: Sequence[Variant]) -> str:
    """Returns which value is best, and by how much it is faster than the first."""
    measured = [variant for variant in variants if not variant.error]
    if not measured:
        return f"{constant}: nothing could be measured"
    best = min(measured, key=lambda variant: sum(variant.milliseconds))
    now = variants[0]
    if best is now or now.error:
        return f"{constant} = {best.value} is the fastest" + (", as it is" if best is now else "")
    gain = 1 - sum(best.milliseconds) / sum(now.milliseconds)
    return f"set {constant} = {best.value} in conv2former/ops/cuda/mixing.py: {gain:.1%} less time than {now.value}"


def measure_variants(
    batch_size: int, dtype: torch.dtype, rounds: int, progress: Progress | None = None
) -> Iterator[str]:
    """Times the values of each constant in turn, the others as they are, on the current GPU.

    Args:
        batch_size: images of 224 pixels.
        dtype: bfloat16 or float16; float32 takes no matrix products.
        rounds: timings of each.
        progress: told how far it is.

    Yields:
        Lines to print, as they come.

    Raises:
        UserError: there is no GPU, or none that the kernels run on.
    """
    device = gpu_for("tune", dtype)
    from ...ops.cuda.ahead import compile_together, launched_by  # Triton is optional

    clock = DeviceClock(matmul_probe(device, torch.bfloat16)[0])
    actions = make_actions(batch_size, dtype, device)
    without_data = make_actions(batch_size, dtype, torch.device("meta"))
    name = torch.cuda.get_device_name(device)
    yield f"{name}, batch {batch_size}, {str(dtype).removeprefix('torch.')}; ms of a step of conv2former_t"
    yield text_table(HEADER, [])
    for constant, values in VARIANTS.items():
        found = []
        for value in values:
            if progress is not None:
                progress.at(f"{constant} = {value}: compiling and timing")
            with with_constant(constant, value):
                jobs = launched_by(lambda: [action() for stages in without_data for action in stages])
                compile_together(jobs, device)
            found.append(time_variant(constant, value, actions, rounds, clock))
            yield text_table(HEADER, [found[-1].row() + [""] * (len(HEADER) - len(found[-1].row()))]).splitlines()[-1]
        yield conclusion(constant, found)
