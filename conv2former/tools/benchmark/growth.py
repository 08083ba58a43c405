"""How time and memory grow with the size of the image: per image, and per pixel relative to the smallest size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ...errors import counted
from ...memory import free_memory
from ..output import text_table
from .machine import machine_lines
from .models import Watcher, measure
from .networks import Network, parse_networks
from .report import FORMAT_NAMES, incomplete, markdown_table
from .results import MODES, Baseline, Group, Plan, Report, Result, Setting

__all__ = [
    "GROWTH_NETWORKS",
    "GROWTH_SIZES",
    "growth_figure",
    "growth_foot",
    "growth_group",
    "growth_head",
    "growth_markdown",
    "growth_plan",
    "measure_growth",
]

# A ViT of similar size twice: the fused operator never stores the attention maps, the plain formula does.
GROWTH_NETWORKS = (
    "conv2former_t",
    "swin_tiny_patch4_window7_224",
    "vit_small_patch16_224",
    "vit_small_patch16_224:fused_attn=false",
)
GROWTH_SIZES = ((224, 224), (384, 384), (512, 512), (480, 640), (768, 768), (1024, 1024))  # height, width
FIGURES = {
    "training": "training, ms",
    "inference": "inference, ms",
    "held": "held for the backward pass, MB",
}


def growth_plan(
    labels: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
    precision: str = "fp32",
    memory_format: str = "nchw",
    rounds: int = 3,
    threads: int | None = None,
) -> Plan:
    """Returns what to measure: inference and a training step of one image at several sizes.

    Args:
        labels: of networks, as `parse_networks` reads them.
        sizes: (height, width), pixels.
        device: where.
        precision, memory_format: see `Setting`.
        rounds: timings of each.
        threads: of the CPU; None leaves torch's number.

    Raises:
        ConfigError: a network is not known.
    """
    return Plan(
        networks=parse_networks(labels),
        device=device,
        modes=list(MODES),
        precisions=[precision],
        memory_formats=[memory_format],
        sizes=sorted(sizes, key=lambda size: size[0] * size[1]),
        batch_sizes=[1],
        rounds=rounds,
        steps=None if device.type == "cuda" else 1,
        held_batch_size=1,
        threads=threads,
        details=False,
    )


def measure_growth(plan: Plan, watcher: Watcher | None = None) -> Report:
    """Measures what `growth_plan` plans.

    A network that would keep more than the free memory at a size is left out there, as far as its growth until then
    lets one tell.

    Raises:
        ConfigError: the device is not there, or a network does not take its options.
    """
    return measure(plan, Baseline(plan.networks[0].label), _too_large, watcher)


def growth_head(report: Report) -> str:
    """Returns what a terminal shows before the results: the machine."""
    return "\n".join(machine_lines(report.machine))


def growth_group(report: Report, group: Group) -> str:
    """Returns the figures at one size, a line for each network; the tables with all sizes come at the end."""
    lines = []
    for result in group.results:
        setting = result.setting
        figures = [(_value(result, name), unit) for name, unit in ((setting.mode, "ms"), ("held", "MB held"))]
        text = ", ".join(f"{value:,.1f} {unit}" for value, unit in figures if value is not None)
        error = f"not measured: {result.error}" if result.error else "not measured yet"
        lines.append(f"{setting.mode} {setting.width} x {setting.height}: {result.network}: {text or error}")
    return "\n".join(lines)


def growth_foot(report: Report) -> str:
    """Returns the tables for a terminal."""
    lines = [*_notes(report)]
    for name in FIGURES:
        header, rows = _cells(report, name)
        lines += ["", _title(name), text_table(header, rows)]
    return "\n".join([*lines, *_failures(report)])


def growth_markdown(report: Report, chart: Path | None) -> str:
    """Returns a section of a page, with a link to the chart if there is one."""
    lines = ["## Growth with the image", "", "```sh", report.command, "```", ""]
    lines += [f"{line}.  " for line in [*machine_lines(report.machine), *_notes(report)]]
    if chart is not None:
        lines += ["", f"![Time and memory per pixel against the size of the image]({chart.name})"]
    for name in FIGURES:
        header, rows = _cells(report, name)
        lines += ["", f"### {_title(name)}", "", *markdown_table(header, rows)]
    return "\n".join([*lines, "", *_failures(report)])


def growth_figure(report: Report) -> Figure:
    """Draws time and memory per pixel against the side of the image, a line for each network."""
    figure = Figure(figsize=(11, 4), layout="constrained", dpi=110)
    for panel, (name, title) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
        for number, (network, values) in enumerate(_values(report, name).items()):
            points = sorted((size, value) for size, value in values.items() if size[0] == size[1])
            sides = [height for (height, _), _ in points]
            costs = [value / (height * width) * 1e6 for (height, width), value in points]
            panel.set_xticks(sides)
            panel.plot(sides, costs, marker="o", markersize=4, color=f"C{number}", label=network)
        panel.set_title(f"{title} per megapixel", fontsize=9)
        panel.set_xlabel("side of the image, pixels", fontsize=8)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    if not report.complete:
        figure.suptitle("incomplete", fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


# ------------------------------------------------------------------------------------------------------------ parts


def _too_large(network: Network, setting: Setting, groups: list[Group]) -> str | None:
    """Returns why a training step is not tried: it could end the program, and with it the results so far.

    Memory grows at most with the square of the pixels, so what was held at the size before bounds what will be.
    """
    free = free_memory()
    if setting.mode != "training" or free is None:
        return None
    known = [r for g in groups for r in g.results if r.network == network.label and r.bytes_held_per_image]
    if not known:
        return None
    last = max(known, key=lambda result: _pixels(result.setting))
    assert last.bytes_held_per_image is not None
    bound = last.bytes_held_per_image * (_pixels(setting) / _pixels(last.setting)) ** 2
    if 2 * bound < free:  # the gradients of what is held
        return None
    return f"may need {2 * bound / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"


def _pixels(setting: Setting) -> int:
    return setting.height * setting.width


def _value(result: Result, name: str) -> float | None:
    """Returns a figure of one image: milliseconds, or megabytes held."""
    if name == "held":
        return None if result.bytes_held_per_image is None else result.bytes_held_per_image / 1e6
    speed = result.images_per_second if result.setting.mode == name else None
    return None if speed is None else 1000 / speed.median


def _values(report: Report, name: str) -> dict[str, dict[tuple[int, int], float]]:
    """Returns a figure per network and (height, width)."""
    values: dict[str, dict[tuple[int, int], float]] = {}
    for result in (result for group in report.groups for result in group.results):
        of_network = values.setdefault(result.network, {})
        value = _value(result, name)
        if value is not None:
            of_network[result.setting.height, result.setting.width] = value
    return values


def _cells(report: Report, name: str) -> tuple[list[str], list[list[str]]]:
    """Returns a table: a row for each network, a column for each size, with the cost per pixel in brackets."""
    values = _values(report, name)
    settings = {(g.setting.height, g.setting.width) for g in report.groups}
    sizes = sorted(settings, key=lambda size: size[0] * size[1])
    rows = []
    for network, of_network in values.items():
        cells = [network]
        for height, width in sizes:
            cost, first = of_network.get((height, width)), of_network.get(sizes[0])
            if cost is None:
                cells.append("-")
                continue
            grown = f" ({cost / first / (height * width) * sizes[0][0] * sizes[0][1]:.2f})" if first else ""
            cells.append((f"{cost:,.0f}" if cost >= 100 else f"{cost:.1f}") + grown)
        rows.append(cells)
    return ["network", *(f"{width} x {height}" for height, width in sizes)], rows


def _title(name: str) -> str:
    return f"{FIGURES[name][0].upper()}{FIGURES[name][1:]} per image (per pixel, relative to the first size)"


def _notes(report: Report) -> list[str]:
    setting: Any = report.groups[0].setting if report.groups else None
    how = f"{setting.precision}, {FORMAT_NAMES[setting.memory_format]}, " if setting else ""
    ended = f", {mark}" if (mark := incomplete(report, "some figures")) else ""
    return [
        f"one image, {how}median of {counted(report.rounds, 'round')}{ended}",
        "fused_attn=false is the plain formula of attention; timm's default calls the fused operator, which does not "
        "store the attention maps",
        "a training step includes the optimizer's part, whose time does not depend on the size of the image: with one "
        "image that is most of the time at small sizes",
    ]


def _failures(report: Report) -> list[str]:
    failed = [result for group in report.groups for result in group.results if result.error]
    return [
        f"not measured: {r.network}, {r.setting.mode} at {r.setting.width} x {r.setting.height}: {r.error}"
        for r in failed
    ]
