"""The study's tables and picture, of the runs that are done so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING

from conv2former.errors import counted
from conv2former.tools.output import replacing, save_figure, write_csv

from ..study import deviation, table, with_deviation
from .cost import Cost
from .plan import Setting, Study
from .runs import Results, choose, setting_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Row", "comparison_table", "progress_text", "rows_of", "tuning_table", "write_results"]

MISSING = "-"


@dataclass(frozen=True)
class Row:
    """One network, over the seeds of its final runs that are done.

    Attributes:
        top1: by seed, percent, of the runs that did not diverge.
        diverged: how many runs did.
        mean, std: of `top1`; None of no runs, and of one.
        minus_first: mean and standard deviation of the difference to the first network, seed by seed, points; None
            where they have no seed in common, and of the first network.
        minutes: of training, the median.
        setting: that was chosen; None as long as the tuning is not done.
    """

    name: str
    label: str
    top1: dict[int, float]
    diverged: int
    mean: float | None
    std: float | None
    minus_first: tuple[float, float | None] | None
    minutes: float | None
    setting: Setting | None
    cost: Cost


def rows_of(study: Study, results: Results, costs: Mapping[str, Cost]) -> list[Row]:
    """Returns a row for each network that is trained."""
    chosen = choose(study, results)
    finals = {name: {run.seed: out for run, out in results.items() if run.is_final and run.network == name}
              for name in study.only}  # fmt: skip
    top1 = {
        name: {seed: out.top1 for seed, out in sorted(outs.items()) if out.top1 is not None}
        for name, outs in finals.items()
    }
    first = top1.get(study.networks[0].name, {})
    rows = []
    for name in study.only:
        own = top1[name]
        values = list(own.values())
        pairs = [own[seed] - first[seed] for seed in own if seed in first]
        minutes = [out.seconds / 60 for out in finals[name].values() if out.top1 is not None]
        rows.append(
            Row(
                name,
                study.network(name).label,
                own,
                len(finals[name]) - len(own),
                mean(values) if values else None,
                deviation(values),
                (mean(pairs), deviation(pairs)) if pairs and name != study.networks[0].name else None,
                median(minutes) if minutes else None,
                chosen.get(name),
                costs[name],
            )
        )
    return rows


def progress_text(study: Study, results: Results) -> str:
    """Returns `7 of 40 runs`."""
    return f"{len(results)} of {counted(len(study.plan({})), 'run')}"


def comparison_table(study: Study, rows: list[Row], markdown: bool = False) -> str:
    """Returns a table with a row per network, for a terminal or in Markdown."""
    first = study.networks[0].label
    header = ["network", "seeds", "top-1, %", f"minus {first}", "parameters, M", "MACs, M"]
    header += ["training, min", "time of a step", "setting"]
    lines = []
    for row in rows:
        seeds = str(len(row.top1)) + (f", {row.diverged} diverged" if row.diverged else "")
        lines.append([
            row.label,
            seeds,
            MISSING if row.mean is None else with_deviation(row.mean, row.std, digits=2),
            MISSING if row.minus_first is None else with_deviation(*row.minus_first, "+", 2),
            f"{row.cost.parameters / 1e6:.2f}",
            f"{row.cost.macs / 1e6:.1f}",
            MISSING if row.minutes is None else f"{row.minutes:.1f}",
            f"{row.cost.ratio:.2f}",
            MISSING if row.setting is None else setting_text(row.setting),
        ])  # fmt: skip
    return table(header, lines, markdown)


def tuning_table(study: Study, results: Results, markdown: bool = False) -> str:
    """Returns a table of the accuracies on the held-out training images, a row per network, a column per setting."""
    lines = []
    for name in study.only:
        cells = []
        for setting in study.settings:
            found = [out for run, out in results.items()
                     if not run.is_final and (run.network, run.setting) == (name, setting)]  # fmt: skip
            shown = ["diverged" if out.top1 is None else f"{out.top1:.2f}" for out in found]
            cells.append(shown[0] if shown else MISSING)
        lines.append([study.network(name).label, *cells])
    return table(["network", *map(setting_text, study.settings)], lines, markdown)


def write_results(study: Study, results: Results, costs: Mapping[str, Cost]) -> list[Path]:
    """Writes results.json, results.csv (a row per run) and table.md, and returns their paths.

    With the first final run accuracy.png is one of them.

    Raises:
        OutputError: they cannot be written.
    """
    rows = rows_of(study, results, costs)
    paths = [study.output / name for name in ("results.json", "results.csv", "table.md")]
    runs = [
        {"network": run.network, "part": "final" if run.is_final else "tuning", "seed": run.seed}
        | dict(run.setting or ())
        | asdict(outcome)
        for run, outcome in results.items()
    ]
    content = {"done": progress_text(study, results), "table": [asdict(row) for row in rows], "runs": runs}
    with replacing(paths[0]) as new:
        new.write_text(json.dumps(content, indent=2) + "\n")
    keys = list(dict.fromkeys(key for run in runs for key in run))
    write_csv(paths[1], keys, [["" if run.get(key) is None else run[key] for key in keys] for run in runs])
    with replacing(paths[2]) as new:
        new.write_text(_page(study, results, rows))
    if any(row.top1 for row in rows):
        paths.append(study.output / "accuracy.png")
        save_figure(_figure(study, results, rows), paths[-1])
    return paths


def _page(study: Study, results: Results, rows: list[Row]) -> str:
    """Returns what table.md has."""
    epochs = study.recipe.schedule.epochs
    each = f"{counted(epochs, 'epoch')} each"
    if study.tuning_epochs not in (None, epochs):
        each = f"{counted(epochs, 'epoch')} each final run, {study.tuning_epochs} each of the tuning"
    parts = [
        f"{progress_text(study, results)}, {each}. Mean ± standard deviation over the seeds.",
        comparison_table(study, rows, markdown=True),
        f"Tuning: top-1 on {100 * study.holdout:g} % of the training images, which were held out, one seed.",
        tuning_table(study, results, markdown=True),
    ]
    return "\n\n".join(parts) + "\n"


def _figure(study: Study, results: Results, rows: list[Row]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.4, 1])
    left.set_xticks(range(len(rows)), [row.label for row in rows])
    left.set_xlim(-0.5, len(rows) - 0.5)
    for place, row in enumerate(rows):
        if row.mean is not None:
            color = f"C{place}"
            left.plot([place + 0.15] * len(row.top1), list(row.top1.values()), ".", color=color, alpha=0.6)
            _mean(left, place, row, color)
            _mean(right, row.cost.ratio, row, color)
            right.annotate(row.label, (row.cost.ratio, row.mean), (6, 4), textcoords="offset points", fontsize=8)
    left.set(ylabel="top-1, %", title="mean, standard deviation, and each seed")
    right.set(xlabel=f"time of a training step, {study.networks[0].label} = 1", title="and what it costs")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.margins(x=0.3)
    epochs = counted(study.recipe.schedule.epochs, "epoch")
    figure.suptitle(f"CIFAR-10 at equal multiply-accumulates, {epochs} ({progress_text(study, results)})")
    return figure


def _mean(axes: Axes, place: float, row: Row, color: str) -> None:
    axes.errorbar([place], [row.mean or 0.0], row.std or 0.0, marker="o", capsize=4, color=color)
