"""What a benchmark measures and what it found: plan, settings, results, and the ratios between them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from ...errors import ConfigError, counted
from .networks import Network

__all__ = ["Baseline", "Group", "Plan", "Probe", "Report", "Result", "Setting", "Spread", "spread"]

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
EXECUTIONS = ("eager", "compile", "cudagraph")
MODES = ("inference", "training")


class Spread(NamedTuple):
    """The median of some values and the middle half around it."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    """Returns the quartiles of values, or None if there are none."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0]) if values else None
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high)


@dataclass(frozen=True)
class Setting:
    """How a network is run.

    Attributes:
        mode: `inference` (eval, inference_mode) or `training` (forward, cross-entropy, backward, AdamW).
        precision: `fp32`, or `bf16` or `fp16` under autocast; fp16 training scales its loss.
        height, width: of the images, pixels.
        batch_size: images in a step.
        memory_format: `nchw` or `channels_last`, of the images that the network is given and of its weights.
        execution: `eager`, `compile` (torch.compile; this project's blocks by themselves, as `train.compile` does), or
            `cudagraph` (inference, or a step's forward and backward pass, captured; the optimizer outside).
    """

    mode: str
    precision: str
    height: int
    width: int
    batch_size: int
    memory_format: str
    execution: str


@dataclass(frozen=True)
class Baseline:
    """What ratios refer to: a network, with the format and execution of the row (None) or with its own."""

    network: str
    memory_format: str | None = None
    execution: str | None = None

    @classmethod
    def parse(cls, text: str, plan: Plan) -> Baseline:
        """Reads `NAME`, `NAME@channels_last`, `NAME@compile` or `NAME@channels_last@compile`.

        Raises:
            ConfigError: it is not among what the plan measures.
        """
        network, *marks = text.split("@")
        labels = [known.label for known in plan.networks]
        if network not in labels:
            raise ConfigError(f"--baseline {text}: not among the networks to measure: {', '.join(labels)}")
        wrong = [mark for mark in marks if mark not in (*plan.memory_formats, *plan.executions)]
        if wrong:
            measured = ", ".join((*plan.memory_formats, *plan.executions))
            raise ConfigError(f"--baseline {text}: '{wrong[0]}' is not among what is measured: {measured}")
        formats, executions = ([mark for mark in marks if mark in known] for known in (FORMATS, EXECUTIONS))
        return cls(network, formats[0] if formats else None, executions[0] if executions else None)

    def describe(self) -> str:
        """Returns the baseline as the user writes it."""
        return "@".join(filter(None, (self.network, self.memory_format, self.execution)))


@dataclass
class Plan:
    """What to measure: every network in every combination of the lists.

    Attributes:
        rounds: timings of each.
        steps: in one timing; None for as many as take `MIN_SECONDS`.
        held_batch_size: images of the batch whose kept bytes are counted.
        threads: of the CPU; None leaves torch's number.
        compile_mode, compile_backend: torch.compile's.
        details: whether to count peak memory and bytes moved, and to time the machine's own products and copies.
        by_execution: whether networks are timed in the same rounds only with others of the same execution. Then fewer
            are in memory at a time, and the first results come sooner.
        minutes: after so many nothing new is begun; None for no limit.
    """

    networks: list[Network]
    device: torch.device
    modes: list[str] = field(default_factory=lambda: ["inference"])
    precisions: list[str] = field(default_factory=lambda: ["fp32"])
    memory_formats: list[str] = field(default_factory=lambda: ["nchw"])
    executions: list[str] = field(default_factory=lambda: ["eager"])
    sizes: list[tuple[int, int]] = field(default_factory=lambda: [(224, 224)])
    batch_sizes: list[int] = field(default_factory=lambda: [8])
    rounds: int = 10
    steps: int | None = None
    held_batch_size: int = 2
    threads: int | None = None
    compile_mode: str | None = None
    compile_backend: str = "inductor"
    details: bool = True
    by_execution: bool = False
    minutes: float | None = None

    def check(self) -> None:
        """Checks what can be checked before anything runs.

        Raises:
            ConfigError: the device is not there, or cannot do what is asked.
        """
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch sees no GPU here; leave --device out, or install torch for CUDA")
        if "cudagraph" in self.executions and self.device.type != "cuda":
            raise ConfigError("--execution cudagraph: for a GPU only; take --device cuda")

    def describe(self) -> str:
        """Returns what will be measured, in one sentence."""
        kinds: list[list[str]] = [
            self.modes,
            self.precisions,
            [f"{width} x {height}" for height, width in self.sizes],
            [f"batch {batch_size}" for batch_size in self.batch_sizes],
            self.memory_formats,
            self.executions,
        ]
        settings = "; ".join(", ".join(values) for values in kinds)
        number = math.prod(len(values) for values in kinds)
        timings = len(self.networks) * number * self.rounds
        return (
            f"measuring {counted(len(self.networks), 'network')} in {counted(number, 'setting')} ({settings}), "
            f"{counted(self.rounds, 'round')}: {counted(timings, 'timing')}"
        )

    def groups(self) -> Iterator[list[tuple[Network, Setting]]]:
        """Yields what is compared in the same rounds: all networks, formats and executions of one setting."""
        together = [[how] for how in self.executions] if self.by_execution else [self.executions]
        grid = itertools.product(together, self.modes, self.precisions, self.sizes, self.batch_sizes)
        for executions, mode, precision, (height, width), batch_size in grid:
            shared = (mode, precision, height, width, batch_size)
            variants = itertools.product(self.networks, self.memory_formats, executions)
            yield [(network, Setting(*shared, format_, how)) for network, format_, how in variants]


@dataclass
class Result:
    """One network in one setting.

    Attributes:
        parameters: of the network with 1,000 classes.
        macs: multiply-accumulates of one image's forward pass; None where they cannot be counted.
        bytes_held_per_image: see `bytes_held`; training only.
        peak_bytes: weights, buffers, optimizer state and the most that a step allocates at one time.
        bytes_moved: by the operators of one eager step, see `OperatorTraffic`.
        launches: kernels, fills and copies of a step on a GPU.
        busy_seconds: in which at least one of them runs.
        host_seconds: until Python has queued a step on a GPU.
        first_seconds: of a step before the rounds: what to expect, no result.
        steps: in one timing.
        seconds: of one step, one for each round.
        error: why there is no figure.
    """

    network: str
    setting: Setting
    parameters: int | None = None
    macs: int | None = None
    bytes_held_per_image: float | None = None
    peak_bytes: int | None = None
    bytes_moved: int | None = None
    launches: int | None = None
    busy_seconds: float | None = None
    host_seconds: float | None = None
    first_seconds: float | None = None
    steps: int = 1
    seconds: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def images_per_second(self) -> Spread | None:
        """Images per second over the rounds."""
        return spread([self.setting.batch_size / seconds for seconds in self.seconds])

    def speed_over(self, other: Result) -> Spread | None:
        """How many times as fast as another result of the same group, per round."""
        pairs = zip(self.seconds, other.seconds, strict=False)  # one has fewer if it failed or was interrupted
        return spread([theirs / own for own, theirs in pairs])

    @property
    def busy_share(self) -> float | None:
        """The part of a step in which the GPU works, by the median step."""
        if self.busy_seconds is None or not self.seconds:
            return None
        return self.busy_seconds / statistics.median(self.seconds)

    def share_of(self, work: float | None, probe: Probe | None) -> float | None:
        """The rate at which work of this step is done as a share of the machine's own rate for it, in the median."""
        if work is None or probe is None:
            return None
        pairs = zip(self.seconds, probe.seconds, strict=False)
        rates = spread([(work / own) / (probe.work / machine) for own, machine in pairs])
        return rates.median if rates else None

    @property
    def step_macs(self) -> int | None:
        """Multiply-accumulates of a step. A backward pass counts as two forward passes."""
        passes = 3 if self.setting.mode == "training" else 1
        return None if self.macs is None else passes * self.macs * self.setting.batch_size


@dataclass
class Probe:
    """What the machine does by itself in the same rounds: `work` in multiply-accumulates or bytes."""

    work: int
    seconds: list[float] = field(default_factory=list)


@dataclass
class Group:
    """Results that were measured in the same rounds."""

    results: list[Result]
    probes: dict[str, Probe] = field(default_factory=dict)

    @property
    def setting(self) -> Setting:
        """The first result's; all have the same but for memory format and execution."""
        return self.results[0].setting

    def baseline_of(self, result: Result, baseline: Baseline) -> Result | None:
        """Returns what a result is compared with, or None if that could not be measured."""
        wanted = (
            baseline.network,
            baseline.memory_format or result.setting.memory_format,
            baseline.execution or result.setting.execution,
        )
        for other in self.results:
            if (other.network, other.setting.memory_format, other.setting.execution) == wanted:
                return other if other.seconds else None
        return None


@dataclass
class Report:
    """What was measured, where, and how.

    Attributes:
        complete: whether nothing is left to measure.
        interrupted: whether the user ended the measurement.
    """

    command: str
    machine: dict[str, Any]
    baseline: Baseline
    rounds: int
    held_batch_size: int
    groups: list[Group] = field(default_factory=list)
    interrupted: bool = False
    complete: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data with every raw time, for JSON."""
        return {"format": 1, **asdict(self)}
