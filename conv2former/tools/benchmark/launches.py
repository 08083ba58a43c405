"""How many operators and kernels a training step and an inference launch: what a host that falls behind has to do.

On a GPU the kernels are counted by the profiler. Elsewhere they are estimated, from the operators that the same Python
calls for tensors that only stand for some on a GPU (`counting.py`, `fake_gpu.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _private
from ...errors import ConfigError
from ...ops.backends import assume_device
from ..output import text_table
from . import fake_gpu
from .counting import OperatorCount
from .device import kernel_name, profile_device
from .models import reason
from .networks import Network
from .progress import Progress
from .steps import DTYPES

__all__ = ["MODES", "LaunchPlan", "Launches", "describe_launches", "measure_launches", "show_launches", "summary"]

MODES = ("training", "inference")
ESTIMATED = (
    "no GPU was used: kernels and fills are an estimate from the operators, each of which launches one or a few; for "
    "two programs whose profile on an NVIDIA H200 is known, both together were 3 and 5 % fewer than there"
)
NO_TRITON = "Triton is not installed: conv2former's networks are counted without its kernels"


@dataclass(frozen=True)
class LaunchPlan:
    """What to count.

    Attributes:
        networks: to count.
        modes: of `training` (forward, cross-entropy, backward, fused AdamW; no loss scale) and `inference`.
        precision: `fp32`, or `bf16` or `fp16` under autocast.
        batch_size: images.
        size: height and width, pixels.
        estimate: count operators and estimate kernels, without a GPU.
    """

    networks: list[Network]
    modes: Sequence[str] = MODES
    precision: str = "bf16"
    batch_size: int = 128
    size: tuple[int, int] = (224, 224)
    estimate: bool = False

    def check(self) -> None:
        """Checks that this machine and this torch can do it.

        Raises:
            ConfigError: they cannot.
        """
        if self.estimate and not _private.can_fake_gpu():
            raise ConfigError(
                f"benchmark launches: torch {torch.__version__} has no stand-in for a GPU; "
                "run this on a machine with a GPU, or install torch 2.7 or newer"
            )
        if not self.estimate and not torch.cuda.is_available():
            raise ConfigError("benchmark launches: torch finds no GPU here; leave --device out for an estimate")

    def describe(self) -> str:
        """Returns the setting in words."""
        height, width = self.size
        return f"{self.precision}, {width} x {height} pixels, batch {self.batch_size}, channels_last, eager"


@dataclass
class Launches:
    """What one network launches in one mode.

    Attributes:
        network: its label.
        mode: `training` or `inference`.
        operators, kernels: how often each, by name.
        fills: of memory; copies: of memory. Both are none of the kernels.
        error: why there are no numbers.
    """

    network: str
    mode: str
    operators: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    fills: int = 0
    copies: int = 0
    error: str | None = None

    @property
    def totals(self) -> tuple[int, int]:
        """Operators and kernels."""
        return sum(self.operators.values()), sum(self.kernels.values())


def measure_launches(plan: LaunchPlan) -> Iterator[Launches]:
    """Counts what each network launches; one that fails is a result with the reason.

    Yields:
        The results, as they come.

    Raises:
        ConfigError: a network does not take its options.
    """
    count = _count_on_fake_gpu if plan.estimate else _count_on_gpu
    for network in plan.networks:
        for mode in plan.modes:
            try:
                yield count(plan, network, mode)
            except ConfigError:
                raise
            except Exception as e:  # whatever a network raises, or a tensor without values that it looks at
                yield Launches(network.label, mode, error=reason(e))


def describe_launches(result: Launches, top: int) -> str:
    """Returns a result for a terminal, the `top` most frequent operators and kernels by name."""
    title = f"{result.network}, {result.mode}"
    if result.error:
        return f"{title}: not counted: {result.error}"
    operators, kernels = result.totals
    lines = [f"{title}: {operators:,} operators, {kernels:,} kernels, {result.fills:,} fills, {result.copies:,} copies"]
    for what, counts in (("kernel", result.kernels), ("operator", result.operators)):
        rows = [(name if len(name) <= 90 else f"{name[:87]}...", f"{n:,}") for name, n in _most(counts)[:top]]
        left = _most(counts)[top:]
        rows += [(f"{len(left)} others", f"{sum(n for _, n in left):,}")] if left else []
        lines += ["", text_table([what, "launches" if what == "kernel" else "calls"], rows)]
    return "\n".join(lines)


def summary(results: Sequence[Launches]) -> str:
    """Returns the table of all networks, a row for each."""
    modes = [mode for mode in MODES if any(result.mode == mode for result in results)]
    header = ["network", *(f"{mode}: {what}" for mode in modes for what in ("operators", "kernels", "fills"))]
    rows = []
    for network in dict.fromkeys(result.network for result in results):
        found = {result.mode: result for result in results if result.network == network and not result.error}
        row = [network]
        for mode in modes:
            numbers = [*found[mode].totals, found[mode].fills] if mode in found else [None] * 3
            row += ["-" if number is None else f"{number:,}" for number in numbers]
        rows.append(row)
    return text_table(header, rows)


def show_launches(plan: LaunchPlan, top: int, progress: Progress) -> None:
    """Counts, and prints results as they come.

    Args:
        plan: what to count.
        top: names in each list.
        progress: told how far it is; prints.

    Raises:
        ConfigError: nothing could be counted.
    """
    progress.print(plan.describe())
    if plan.estimate:
        with assume_device(0) as has_kernels:
            progress.print(ESTIMATED if has_kernels else f"{ESTIMATED}\n{NO_TRITON}")
    else:
        progress.print(torch.cuda.get_device_name())
    progress.at("counting")
    results = []
    for result in measure_launches(plan):
        results.append(result)
        progress.print(f"\n{describe_launches(result, top)}")
    progress.print(f"\n{summary(results)}")
    if all(result.error for result in results):
        raise ConfigError("nothing could be counted; the reasons are above")


# --------------------------------------------------------------------------------------------------------------- steps


def _most(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _step(
    model: nn.Module,
    images: Tensor,
    mode: str,
    autocast: Callable[[], AbstractContextManager],
    backward: Callable[[Tensor], None],
) -> Callable[[], None]:
    """Returns what is counted: a training step with fused AdamW, or an inference."""
    model.train(mode == "training")
    if mode == "inference":

        def infer() -> None:
            with torch.inference_mode(), autocast():
                model(images)

        return infer
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def train() -> None:
        with autocast():
            loss = F.cross_entropy(model(images), labels)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return train


def _images(plan: LaunchPlan, device: torch.device) -> Tensor:
    images = torch.empty(plan.batch_size, 3, *plan.size, device=device)
    return images.contiguous(memory_format=torch.channels_last)


def _count_on_fake_gpu(plan: LaunchPlan, network: Network, mode: str) -> Launches:
    model = _without_values(network, plan.size).to(memory_format=torch.channels_last)
    with _private.fake_gpu(), assume_device(0):
        images = _images(plan, fake_gpu.DEVICE)
        autocast = partial(fake_gpu.autocast, DTYPES[plan.precision])
        step = _step(fake_gpu.on_fake_gpu(model), images, mode, autocast, fake_gpu.backward)
        for _ in range(2):  # the first makes the optimizer's state, and whatever else is done once
            count = OperatorCount(estimates=True)
            with count.running():
                step()
    return Launches(network.label, mode, dict(count.operators), dict(count.kernels), count.fills)


def _without_values(network: Network, size: tuple[int, int]) -> nn.Module:
    """Makes a network whose weights have no values, if it can be made so: it takes a tenth of the time."""
    try:
        with torch.device("meta"):
            return network.create(*size)
    except (RuntimeError, NotImplementedError):  # it looks at values
        return network.create(*size)


def _gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _count_on_gpu(plan: LaunchPlan, network: Network, mode: str) -> Launches:
    device = _gpu()
    model = network.create(*plan.size).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = DTYPES[plan.precision]
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    step = _step(model, _images(plan, device).normal_(), mode, autocast, torch.Tensor.backward)
    for _ in range(3):  # compiles kernels, chooses algorithms, makes the optimizer's state
        step()
    counter = OperatorCount(estimates=False)
    with counter.running():
        step()
    seen = profile_device(step, steps=1)
    kernels = Counter(kernel_name(name) for name in seen.kernels.elements())
    return Launches(network.label, mode, dict(counter.operators), dict(kernels), seen.fills, seen.copies)
