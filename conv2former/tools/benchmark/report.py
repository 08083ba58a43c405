"""What a benchmark writes: tables for a terminal and for Markdown, JSON, a chart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...engine.distributed import World
from ...errors import OutputError, counted
from ..output import check_writable, replacing, save_figure, text_table
from .machine import command_line, describe_machine, machine_lines
from .results import Group, Report, Result, Spread

__all__ = [
    "FORMAT_NAMES",
    "check_outputs",
    "group_title",
    "incomplete",
    "loop_markdown",
    "markdown_table",
    "models_figure",
    "models_foot",
    "models_group",
    "models_head",
    "models_markdown",
    "put_section",
    "save_outputs",
]

FORMAT_NAMES = {"nchw": "NCHW", "channels_last": "channels_last"}
PICTURES = (".png", ".pdf", ".svg")
PAGE_HEAD = """# Benchmarks

Written by `scripts/benchmark.py`; each section says with which command and on which machine. Networks are timed in
turns in one process, so compare figures within a table: ratios hold on other machines far better than milliseconds do.
"""
COLUMNS = """\
- **images/s** and **ms** per step: the median of the rounds; in brackets the middle half of them.
- **speed**: times as fast as the baseline, the median of the ratios within each round and their middle half.
- **at equal MACs**: the same, of multiply-accumulates per second: a network with half the arithmetic is expected to be
  twice as fast.
- **held**: MB (1e6 bytes) that a training step keeps per image between the forward and the backward pass: allocations
  less releases from the profiler's records, of a batch of {held}. Autocast's copies of the weights are in it, once per
  batch; the images are in it where the graph keeps them; weights, gradients and optimizer state are not.
- **peak**: MB of weights, buffers, optimizer state and the most that a step allocates at one time, for the whole batch.
- **GPU ms**, **GPU busy**: for how long the GPU works in a step, by the profiler, and which part of the step that is.
- **host ms**: until Python has queued a step; where that is the longer, the GPU waits for it.
- **launches**: kernels, and fills and copies of memory, of a step, by the profiler.
- **of matmul**: multiply-accumulates per second as a share of those of one large matrix product of the same type on
  this machine in the same rounds. A backward pass is counted as two forward passes.
- **of copy**: bytes that the operators of the step read and write, each tensor once per operator, per second, as a
  share of those of a large copy. Eager only; above 100 % caches have helped."""


def check_outputs(json_file: Path | None, chart: Path | None, markdown: Path | None) -> None:
    """Checks that all results can be written, before they are measured.

    Raises:
        OutputError: one cannot.
    """
    if chart is not None and chart.suffix.lower() not in PICTURES:
        raise OutputError(f"{chart}: a chart's name ends with {', '.join(PICTURES)}")
    for path in (json_file, chart, markdown):
        if path is not None:
            check_writable(path)


def save_outputs(
    report: Report,
    name: str,
    text: str,
    draw: Callable[[], Figure],
    json_file: Path | None,
    chart: Path | None,
    markdown: Path | None,
) -> None:
    """Writes what the user asked for: every raw figure as JSON, a chart, a section of a Markdown page.

    Args:
        report: all results.
        name: of the section.
        text: of the section.
        draw: the chart.
        json_file, chart, markdown: files, or None.

    Raises:
        OutputError: one cannot be written.
    """
    if json_file is not None:
        with replacing(json_file) as temporary:
            temporary.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    if chart is not None:
        save_figure(draw(), chart)
    if markdown is not None:
        put_section(name, text, markdown)


def put_section(name: str, content: str, path: Path) -> None:
    """Puts a section into a Markdown page in the place of the one with the same name; makes the page if need be.

    Raises:
        OutputError: it cannot be written.
    """
    start, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{start}\n{content.strip()}\n{end}"
    page = path.read_text() if path.is_file() else PAGE_HEAD
    page, found = re.subn(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: section, page, count=1, flags=re.DOTALL)
    with replacing(path) as temporary:
        temporary.write_text(page if found else f"{page.rstrip()}\n\n{section}\n")


def group_title(group: Group) -> str:
    """Returns what the results of a group have in common."""
    setting, results = group.setting, group.results
    parts = ["Training step" if setting.mode == "training" else "Inference", setting.precision]
    parts += [FORMAT_NAMES[setting.memory_format]] if len({r.setting.memory_format for r in results}) == 1 else []
    parts += [setting.execution] if len({r.setting.execution for r in results}) == 1 else []
    return ", ".join([*parts, f"{setting.width} x {setting.height} pixels", f"batch {setting.batch_size}"])


def incomplete(report: Report, missing: str) -> str | None:
    """Returns what to say of a report that lacks something, or None.

    Args:
        report: so far.
        missing: what an interrupted measurement lacks, such as `some rounds`.
    """
    if report.interrupted:
        return f"interrupted: {missing} are missing"
    return None if report.complete else f"incomplete: written while it was being measured; {missing} are missing"


def models_head(report: Report) -> str:
    """Returns what a terminal shows before the results: the machine, and what speeds are relative to."""
    return "\n".join([*machine_lines(report.machine), _baseline(report)])


def models_group(report: Report, group: Group) -> str:
    """Returns the results of a group for a terminal."""
    header, rows = _cells(report, group)
    return "\n".join([group_title(group), text_table(header, rows), *_failures(group)])


def models_foot(report: Report) -> str:
    """Returns what a terminal shows after the results."""
    notes = [incomplete(report, "some rounds"), _machine_rates(report)]
    return "\n".join(["", *filter(None, notes)])


def models_markdown(report: Report, chart: Path | None) -> str:
    """Returns all results as a section of a page, with a link to the chart if there is one."""
    lines = ["## Networks side by side", "", "```sh", report.command, "```", ""]
    notes = [*machine_lines(report.machine), _baseline(report), _machine_rates(report)]
    lines += [f"**{mark}.**  "] if (mark := incomplete(report, "some rounds")) else []
    lines += [f"{line}.  " for line in notes if line]
    lines += ["", f"![Images per second]({chart.name})"] if chart else []
    for group in report.groups:
        header, rows = _cells(report, group)
        lines += ["", f"### {group_title(group)}", "", *markdown_table(header, rows)]
        lines += ["", *_failures(group)] if _failures(group) else []
    held = f"{report.held_batch_size} images" if report.held_batch_size > 1 else "one image"
    return "\n".join([*lines, "", "The columns:", "", COLUMNS.format(held=held)])


def loop_markdown(lines: Sequence[str]) -> str:
    """Returns what `benchmark.py loop` has printed as a section of a page."""
    world = World.from_environment()
    machine = [f"{line}.  " for line in machine_lines(describe_machine(world.device))]
    head = ["## The training loop beside a bare one", "", "```sh", command_line(), "```", "", *machine]
    return "\n".join([*head, "", "```", *lines, "```"])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table, the first column aligned to the left and the others to the right."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (header, ruler, *rows)]


def models_figure(report: Report) -> Figure:
    """Draws images/s of every result with the middle half of the rounds, a panel for each group."""
    groups = [group for group in report.groups if any(result.seconds for result in group.results)]
    bars = sum(len(group.results) for group in groups)
    figure = Figure(figsize=(9, 1 + 0.75 * len(groups) + 0.28 * bars), layout="constrained", dpi=110)
    heights = [len(group.results) + 1.5 for group in groups]
    panels = figure.subplots(max(1, len(groups)), 1, squeeze=False, height_ratios=heights or None)[:, 0]
    for group, panel in zip(groups, panels, strict=False):
        _draw_group(group, panel)
    mark = "" if report.complete else " (incomplete)"
    figure.suptitle(f"Images per second{mark}", fontsize=11)
    return figure


def _draw_group(group: Group, panel: Any) -> None:
    results = [result for result in group.results if result.seconds]
    names = list(dict.fromkeys(result.network for result in results))
    for place, result in enumerate(results):
        speed = result.images_per_second
        assert speed is not None
        error = [[speed.median - speed.low], [speed.high - speed.median]]
        panel.barh(place, speed.median, xerr=error, color=f"C{names.index(result.network) % 10}", ecolor="0.3")
        panel.text(speed.high, place, f"  {speed.median:.3g}", va="center", fontsize=7)
    panel.set_yticks(range(len(results)), [", ".join(_variant(result)) for result in results], fontsize=7)
    panel.invert_yaxis()
    panel.margins(x=0.1)
    panel.tick_params(axis="x", labelsize=7)
    panel.set_title(group_title(group), fontsize=9, loc="left")


# ------------------------------------------------------------------------------------------------------------ cells


def _baseline(report: Report) -> str:
    return f"baseline {report.baseline.describe()}; {counted(report.rounds, 'round')}"


def _machine_rates(report: Report) -> str | None:
    """Returns the machine's best rates over all groups, or None if they were not timed."""
    probes: dict[str, list[float]] = {}
    for group in report.groups:
        for name, probe in group.probes.items():
            if probe.seconds:
                kind = f"matrix product {group.setting.precision}" if name == "matmul" else "copy"
                probes.setdefault(kind, []).extend(probe.work / seconds for seconds in probe.seconds)
    rates = []
    for kind, values in probes.items():
        best = max(values)
        rates.append(f"{kind} {best / 1e9:,.0f} GB/s" if kind == "copy" else f"{kind} {best / 1e9:,.0f} GMACs/s")
    return f"the machine's own best: {', '.join(rates)}" if rates else None


def _variant(result: Result) -> tuple[str, str, str]:
    return result.network, FORMAT_NAMES[result.setting.memory_format], result.setting.execution


def _cells(report: Report, group: Group) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a group's table; columns without any figure are left out."""
    columns: list[tuple[str, Callable[[Result], str]]] = [
        ("network", lambda result: result.network),
        *_varying(group),
        ("images/s", lambda result: _with_spread(result.images_per_second)),
        ("ms", lambda result: _milliseconds(result)),
        ("speed", lambda result: _with_spread(_speed(report, group, result))),
        ("at equal MACs", lambda result: _at_equal_macs(report, group, result)),
        ("held MB/image", lambda result: _number(result.bytes_held_per_image, 1e6, 1)),
        ("peak MB", lambda result: _number(result.peak_bytes, 1e6, 0)),
        ("GPU ms", lambda result: _number(result.busy_seconds, 1e-3, 2)),
        ("GPU busy", lambda result: _percent(result.busy_share)),
        ("host ms", lambda result: _number(result.host_seconds, 1e-3, 2)),
        ("launches", lambda result: _number(result.launches, 1, 0)),
        ("of matmul", lambda result: _percent(result.share_of(result.step_macs, group.probes.get("matmul")))),
        ("of copy", lambda result: _percent(result.share_of(result.bytes_moved, group.probes.get("copy")))),
        ("GMACs", lambda result: _number(result.macs, 1e9, 2)),
        ("M parameters", lambda result: _number(result.parameters, 1e6, 1)),
    ]
    filled = [(name, [cell(result) for result in group.results]) for name, cell in columns]
    filled = [(name, cells) for name, cells in filled if any(cell != "-" for cell in cells)]
    return [name for name, _ in filled], [list(row) for row in zip(*(cells for _, cells in filled), strict=True)]


def _varying(group: Group) -> list[tuple[str, Callable[[Result], str]]]:
    """Returns the columns that tell results of one network apart; what is the same for all is in the title."""
    columns: list[tuple[str, Callable[[Result], str]]] = []
    if len({result.setting.memory_format for result in group.results}) > 1:
        columns.append(("format", lambda result: FORMAT_NAMES[result.setting.memory_format]))
    if len({result.setting.execution for result in group.results}) > 1:
        columns.append(("run", lambda result: result.setting.execution))
    return columns


def _failures(group: Group) -> list[str]:
    return [f"not measured: {', '.join(_variant(result))}: {result.error}" for result in group.results if result.error]


def _speed(report: Report, group: Group, result: Result) -> Spread | None:
    base = group.baseline_of(result, report.baseline)
    return result.speed_over(base) if base else None


def _at_equal_macs(report: Report, group: Group, result: Result) -> str:
    base, speed = group.baseline_of(result, report.baseline), _speed(report, group, result)
    if not speed or base is None or not base.macs or not result.macs:
        return "-"
    return f"{speed.median * result.macs / base.macs:.2f}"


def _with_spread(value: Spread | None) -> str:
    """Returns a median and its middle half, with as many decimals as the median needs."""
    if value is None:
        return "-"
    decimals = 0 if value.median >= 100 else 2 if value.median >= 0.5 else 3
    low, median, high = (f"{number:,.{decimals}f}" for number in value)
    return f"{median} ({low}-{high})"


def _milliseconds(result: Result) -> str:
    speed = result.images_per_second
    if speed is None:
        return "-"
    milliseconds = 1000 * result.setting.batch_size / speed.median
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.2f}"


def _number(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
