"""Time and memory of networks side by side: inference and training steps, in turns, in one process.

Absolute times depend on what else a machine does; ratios within one round hardly do. So every round times each network
once, in another order each time, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn

from ...errors import UserError
from .machine import command_line, copy_probe, describe_machine, matmul_probe
from .networks import Network, count_macs
from .results import Baseline, Group, Plan, Probe, Report, Result, Setting
from .steps import DTYPES, Clock, prepare

__all__ = ["Known", "Watcher", "measure", "reason"]

# by label, height and width: parameters and multiply-accumulates, or why the network cannot be made
Known: TypeAlias = dict[tuple[str, int, int], "tuple[int, int | None] | str"]
Refusal = Callable[[Network, Setting, "list[Group]"], "str | None"]


class Watcher:
    """What is told of a measurement while it runs. This one does nothing with it."""

    def started(self, report: Report) -> None:
        """The machine is described; nothing is measured yet."""

    def counting(self, network: Network) -> None:
        """The arithmetic of a network is about to be counted."""

    def counted(self, known: Known) -> None:
        """The arithmetic of all networks is known."""

    def preparing(self, group: Group, result: Result) -> None:
        """A network is about to be made, compiled, run for the first time, and its memory counted."""

    def prepared(self, group: Group, result: Result, seconds: float) -> None:
        """A network is ready to be timed, or has failed, after so many seconds."""

    def timing(self, group: Group, result: Result | None, number: int) -> None:
        """A network, or a probe of the machine (None), is about to be timed in round `number`, from 0 on."""

    def round_ended(self, group: Group, number: int) -> None:
        """Every network of a group was timed in round `number`."""

    def group_ended(self, group: Group) -> None:
        """Nothing more will be measured of this group."""


def measure(plan: Plan, baseline: Baseline, refuse: Refusal | None = None, watcher: Watcher | None = None) -> Report:
    """Measures everything in a plan.

    What fails becomes a result with an error. Ctrl-C ends the measurement; the report has what was measured until then.

    Args:
        plan: what to measure.
        baseline: what ratios refer to.
        refuse: called with a network, a setting and the groups so far; returns why not to measure it, or None.
        watcher: told what is measured and what was found, as it comes.

    Raises:
        ConfigError: the plan cannot be carried out, or a network does not take the options it was given.
    """
    plan.check()
    watcher = watcher or Watcher()
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    deadline = math.inf if plan.minutes is None else time.monotonic() + 60 * plan.minutes
    report = Report(command_line(), describe_machine(plan.device), baseline, plan.rounds, plan.held_batch_size)
    try:
        watcher.started(report)
        known = _describe_networks(plan, watcher)
        watcher.counted(known)
        for members in plan.groups():
            _measure_group(plan, report, members, known, refuse, watcher, deadline)
        report.complete = True
    except KeyboardInterrupt:
        report.interrupted = True
    return report


def reason(error: Exception) -> str:
    """Returns an error's first line, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        text = "out of memory"
    return text if len(text) <= 160 else text[:157] + "..."


# ------------------------------------------------------------------------------------------------------------ parts


def _describe_networks(plan: Plan, watcher: Watcher) -> Known:
    """Returns parameters and multiply-accumulates of each network at each size, or why it cannot be made."""
    known: Known = {}
    for network, (height, width) in itertools.product(plan.networks, plan.sizes):
        watcher.counting(network)
        try:
            model = network.create(height, width)
            known[network.label, height, width] = (_parameters(model), _macs(model, height, width))
        except UserError:
            raise
        except Exception as e:  # of the network's own code: any
            known[network.label, height, width] = reason(e)
    return known


def _measure_group(
    plan: Plan,
    report: Report,
    members: list[tuple[Network, Setting]],
    known: Known,
    refuse: Refusal | None,
    watcher: Watcher,
    deadline: float,
) -> None:
    """Prepares the networks of a group, then times them in rounds. The group is in the report from the start.

    Args:
        deadline: of `time.monotonic`; after it no network is prepared, and no round but the first is begun.
    """
    earlier = list(report.groups)
    group = Group([Result(network.label, setting) for network, setting in members])
    report.groups.append(group)
    clocks: list[Clock] = []
    for (network, _), result in zip(members, group.results, strict=True):
        watcher.preparing(group, result)
        since = time.perf_counter()
        late = time.monotonic() > deadline
        result.error = f"{plan.minutes:g} minutes were over" if late else None
        clock = None if late else _try_to_prepare(plan, network, result, earlier, known, refuse)
        clocks += [clock] if clock else []
        watcher.prepared(group, result, time.perf_counter() - since)
    if plan.details:
        clocks += _probe_clocks(plan, group, DTYPES[group.setting.precision] or torch.float32)
    _time_in_rounds(clocks, plan.rounds, group, watcher, deadline)
    clocks.clear()
    if "compile" in plan.executions:
        torch.compiler.reset()  # forgets this group's compiled code
    _release(plan.device)
    watcher.group_ended(group)


def _try_to_prepare(
    plan: Plan, network: Network, result: Result, earlier: list[Group], known: Known, refuse: Refusal | None
) -> Clock | None:
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
        return prepare(plan, network, result)
    except Exception as e:  # whatever a network, a compiler or an allocator raises
        result.error = reason(e)
    _release(plan.device)
    return None


def _time_in_rounds(clocks: list[Clock], rounds: int, group: Group, watcher: Watcher, deadline: float) -> None:
    """Reads every clock once a round, in turns; what fails is left out from then on."""
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            return
        for i in _order(len(clocks), number):
            clock = clocks[i]
            if clock.result is not None and clock.result.error:
                continue
            watcher.timing(group, clock.result, number)
            try:
                clock.seconds.append(clock.read())
            except Exception as e:
                if clock.result is None:
                    raise
                clock.result.error = reason(e)
                clock.action = lambda: None  # lets go of the network
        watcher.round_ended(group, number)


def _order(count: int, number: int) -> list[int]:
    """Returns the order of a round: every second one is the one before backwards, and then it is rotated by one."""
    rotated = [(i + number // 2) % count for i in range(count)]
    return rotated[::-1] if number % 2 else rotated


def _probe_clocks(plan: Plan, group: Group, dtype: torch.dtype) -> list[Clock]:
    """Returns clocks of the machine's own matrix product and copy, which run once before they count."""
    clocks = []
    steps = 10 if plan.device.type == "cuda" else 1
    for name, (action, work) in (("matmul", matmul_probe(plan.device, dtype)), ("copy", copy_probe(plan.device))):
        group.probes[name] = Probe(work)
        action()
        clocks.append(Clock(action, steps, plan.device, None, group.probes[name].seconds))
    return clocks


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _macs(model: nn.Module, height: int, width: int) -> int | None:
    try:
        return count_macs(model, height, width)
    except Exception:  # a network that looks at values, which the meta device does not have
        return None


def _release(device: torch.device) -> None:
    """Frees what a network that is no longer used has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
