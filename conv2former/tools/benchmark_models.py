"""Time and memory of networks side by side: inference and training steps, in turns, in one process.

Absolute times depend on what else a machine does; ratios within one round hardly do. So every round times each network
once, in another order each time, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _private
from ..errors import ConfigError, UserError
from .benchmark_machine import OperatorTraffic, command_line, copy_probe, describe_machine, matmul_probe
from .benchmark_memory import bytes_held, peak_bytes
from .benchmark_networks import CLASSES, Network, count_macs
from .output import bar

__all__ = ["Baseline", "Group", "Plan", "Report", "Result", "Setting", "Spread", "measure", "spread"]

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
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
        execution: `eager`, `compile` (torch.compile) or `cudagraph` (a captured inference).
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

    def check(self) -> None:
        """Checks what can be checked before anything runs.

        Raises:
            ConfigError: the device is not there, or cannot do what is asked.
        """
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch sees no GPU here; leave --device out, or install torch for CUDA")
        if "cudagraph" in self.executions and (self.device.type != "cuda" or self.modes != ["inference"]):
            raise ConfigError("--execution cudagraph: for inference on a GPU only; take --device cuda without --train")

    def groups(self) -> Iterator[list[tuple[Network, Setting]]]:
        """Yields what is compared in the same rounds: all networks, formats and executions of one setting."""
        variants = list(itertools.product(self.networks, self.memory_formats, self.executions))
        grid = itertools.product(self.modes, self.precisions, self.sizes, self.batch_sizes)
        for mode, precision, (height, width), batch_size in grid:
            shared = (mode, precision, height, width, batch_size)
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
    """What was measured, where, and how."""

    command: str
    machine: dict[str, Any]
    baseline: Baseline
    rounds: int
    held_batch_size: int
    groups: list[Group] = field(default_factory=list)
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data with every raw time, for JSON."""
        return {"format": 1, **asdict(self)}


# by label, height and width: parameters and multiply-accumulates, or why the network cannot be made
Known = dict[tuple[str, int, int], "tuple[int, int | None] | str"]
Refusal = Callable[[Network, Setting, "list[Group]"], "str | None"]
MIN_SECONDS = 0.2  # of one timing, so that the clock's and the events' grain is no part of it


def measure(plan: Plan, baseline: Baseline, refuse: Refusal | None = None) -> Report:
    """Measures everything in a plan.

    What fails becomes a result with an error. Ctrl-C ends the measurement; the report has what was measured until then.

    Args:
        plan: what to measure.
        baseline: what ratios refer to.
        refuse: called with a network, a setting and the groups so far; returns why not to measure it, or None.

    Raises:
        ConfigError: the plan cannot be carried out, or a network does not take the options it was given.
    """
    plan.check()
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    report = Report(command_line(), describe_machine(plan.device), baseline, plan.rounds, plan.held_batch_size)
    try:
        known = _describe_networks(plan)
        for members in plan.groups():
            _measure_group(plan, report, members, known, refuse)
    except KeyboardInterrupt:
        report.interrupted = True
    return report


def _describe_networks(plan: Plan) -> Known:
    """Returns parameters and multiply-accumulates of each network at each size, or why it cannot be made."""
    pairs = list(itertools.product(plan.networks, plan.sizes))
    known: Known = {}
    for network, (height, width) in bar(pairs, len(pairs), " networks", "counting"):
        try:
            model = network.create(height, width)
            known[network.label, height, width] = (_parameters(model), _macs(model, height, width))
        except UserError:
            raise
        except Exception as e:  # of the network's own code: any
            known[network.label, height, width] = _reason(e)
    return known


def _measure_group(
    plan: Plan, report: Report, members: list[tuple[Network, Setting]], known: Known, refuse: Refusal | None
) -> None:
    """Prepares the networks of a group, then times them in rounds. The group is in the report from the start."""
    earlier = list(report.groups)
    group = Group([Result(network.label, setting) for network, setting in members])
    report.groups.append(group)
    setting = group.setting
    title = f"{setting.mode} {setting.precision} {setting.width}x{setting.height} batch {setting.batch_size}"
    clocks: list[_Clock] = []
    pairs = list(zip((network for network, _ in members), group.results, strict=True))
    for network, result in bar(pairs, len(pairs), " networks", f"preparing {title}"):
        clock = _try_to_prepare(plan, network, result, earlier, known, refuse)
        clocks += [clock] if clock else []
    if plan.details:
        clocks += _probe_clocks(plan, group, DTYPES[setting.precision] or torch.float32)
    _time_in_rounds(clocks, plan.rounds, title)
    clocks.clear()
    if "compile" in plan.executions:
        torch.compiler.reset()  # forgets this group's compiled code
    _release(plan.device)


def _try_to_prepare(
    plan: Plan, network: Network, result: Result, earlier: list[Group], known: Known, refuse: Refusal | None
) -> _Clock | None:
    """Returns a network's clock, or None with the reason in its result."""
    setting = result.setting
    fact = known[network.label, setting.height, setting.width]
    if isinstance(fact, str):
        result.error = fact
        return None
    result.parameters, result.macs = fact
    result.error = refuse(network, setting, earlier) if refuse else None
    if result.error:
        return None
    try:
        return _prepare(plan, network, result)
    except Exception as e:  # whatever a network, a compiler or an allocator raises
        result.error = _reason(e)
    _release(plan.device)
    return None


@dataclass
class _Clock:
    """Something to time: an action, how often in one timing, and where its times go."""

    action: Callable[[], object]
    steps: int
    device: torch.device
    result: Result | None
    seconds: list[float]

    def read(self) -> float:
        """Returns the seconds of one action."""
        if self.device.type != "cuda":
            since = time.perf_counter()
            for _ in range(self.steps):
                self.action()
            return (time.perf_counter() - since) / self.steps
        self.action()  # fills the queue, and the caches that another network has emptied
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.steps):
            self.action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / self.steps


def _time_in_rounds(clocks: list[_Clock], rounds: int, title: str) -> None:
    """Reads every clock once a round, in turns; what fails is left out from then on."""
    schedule = [(number, i) for number in range(rounds) for i in _order(len(clocks), number)]
    for _, i in bar(schedule, len(schedule), " timings", f"timing {title}"):
        clock = clocks[i]
        if clock.result is not None and clock.result.error:
            continue
        try:
            clock.seconds.append(clock.read())
        except Exception as e:
            if clock.result is None:
                raise
            clock.result.error = _reason(e)
            clock.action = lambda: None  # lets go of the network


def _order(count: int, number: int) -> list[int]:
    """Returns the order of a round: every second one is the one before backwards, and then it is rotated by one."""
    rotated = [(i + number // 2) % count for i in range(count)]
    return rotated[::-1] if number % 2 else rotated


def _probe_clocks(plan: Plan, group: Group, dtype: torch.dtype) -> list[_Clock]:
    """Returns clocks of the machine's own matrix product and copy, which run once before they count."""
    clocks = []
    steps = 10 if plan.device.type == "cuda" else 1
    for name, (action, work) in (("matmul", matmul_probe(plan.device, dtype)), ("copy", copy_probe(plan.device))):
        group.probes[name] = Probe(work)
        action()
        clocks.append(_Clock(action, steps, plan.device, None, group.probes[name].seconds))
    return clocks


# ------------------------------------------------------------------------------------------------------ one network


def _prepare(plan: Plan, network: Network, result: Result) -> _Clock:
    """Makes a network and its step, runs it until nothing is done for the first time, and counts its memory."""
    setting, device = result.setting, plan.device
    torch.manual_seed(0)
    memory_format = FORMATS[setting.memory_format]
    size = (3, setting.height, setting.width)

    def images(count: int) -> Tensor:
        return torch.randn(count, *size, device=device).to(memory_format=memory_format)

    model = network.create(setting.height, setting.width).to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    model.train(setting.mode == "training")
    runnable: nn.Module = model
    if setting.execution == "compile":
        _private.allow_recompiling(64)  # networks of one class share their code, each compiled anew
        runnable = torch.compile(model, mode=plan.compile_mode, backend=plan.compile_backend, dynamic=False)  # type: ignore[assignment]
    optimizer: torch.optim.Optimizer | None = None
    if setting.mode == "training":
        held = bytes_held(runnable, images(plan.held_batch_size), DTYPES[setting.precision])
        result.bytes_held_per_image = held / plan.held_batch_size
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
        step = _training_step(runnable, optimizer, images(setting.batch_size), setting.precision)
    else:
        step = _inference_step(runnable, images(setting.batch_size), setting.precision)
    _warm_up(step, optimizer)
    if plan.details:
        _count_step(step, model, optimizer, device, result)
    if setting.execution == "cudagraph":
        step = _captured(step)
    result.steps = plan.steps or _steps_to_fill(step, device)
    return _Clock(step, result.steps, device, result, result.seconds)


def _warm_up(step: Callable[[], object], optimizer: torch.optim.Optimizer | None, attempts: int = 20) -> None:
    """Runs a step, and again while fp16's loss scale is still too large and the optimizer is left out of the step."""
    step()
    for _ in range(attempts):
        if optimizer is None or optimizer.state:
            return
        step()


def _inference_step(model: nn.Module, images: Tensor, precision: str) -> Callable[[], object]:
    def step() -> Tensor:
        with torch.inference_mode(), _autocast(images.device, precision):
            return model(images)

    return step


def _training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, precision: str
) -> Callable[[], object]:
    labels = torch.randint(CLASSES, (len(images),), device=images.device)
    scaler = torch.amp.GradScaler(images.device.type, enabled=precision == "fp16")

    def step() -> None:
        with _autocast(images.device, precision):
            logits = model(images)
        scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=DTYPES[precision] is not None)


def _captured(step: Callable[[], object]) -> Callable[[], object]:
    """Returns a CUDA graph of a step that has run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def _count_step(
    step: Callable[[], object],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
    result: Result,
) -> None:
    """Counts the peak memory of a step, and what its operators read and write if they run one by one."""
    traffic = OperatorTraffic() if result.setting.execution != "compile" and _private.sees_operators() else None
    with traffic or nullcontext():
        peak = peak_bytes(step, device)
    states = optimizer.state.values() if optimizer else []
    lasting: Iterable[Any] = itertools.chain(model.parameters(), model.buffers(), *(s.values() for s in states))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in lasting if isinstance(t, Tensor)}
    result.peak_bytes = peak + sum(storages.values())
    result.bytes_moved = traffic.bytes_moved if traffic else None


def _steps_to_fill(step: Callable[[], object], device: torch.device) -> int:
    """Returns how many steps take at least `MIN_SECONDS`."""
    once = _Clock(step, 1, device, None, []).read()
    return max(1, math.ceil(MIN_SECONDS / max(once, 1e-6)))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _macs(model: nn.Module, height: int, width: int) -> int | None:
    try:
        return count_macs(model, height, width)
    except Exception:  # a network that looks at values, which the meta device does not have
        return None


def _reason(error: Exception) -> str:
    """Returns an error's first line, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        text = "out of memory"
    return text if len(text) <= 160 else text[:157] + "..."


def _release(device: torch.device) -> None:
    """Frees what a network that is no longer used has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
