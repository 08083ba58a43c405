"""The tables of a case, of the runs that are done so far."""

from __future__ import annotations

import json
from dataclasses import asdict
from statistics import mean
from typing import Any

from conv2former.errors import counted
from conv2former.tasks.registry import find_task
from conv2former.tools.benchmark.networks import count_macs
from conv2former.tools.output import replacing

from ..study import deviation, table, with_deviation
from .plan import Case, Run
from .runs import Outcome, Results

__all__ = ["class_table", "costs_of", "progress_text", "rows_table", "write_results"]

MISSING = "-"


def costs_of(case: Case, num_classes: int) -> dict[str, tuple[int, int]]:
    """Returns the parameters of each row's whole network, and multiply-accumulates of its backbone."""
    found = {}
    for row in case.rows:
        config = case.config(Run(row.name, 0))
        size = case.size or config.data.preprocessing.size
        model: Any = find_task(config).build_model(config, num_classes, None)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        found[row.name] = (parameters, count_macs(model.backbone, *size))
    return found


def progress_text(case: Case, results: Results) -> str:
    """Returns `7 of 12 runs`."""
    return f"{len(results)} of {counted(len(case.plan()), 'run')}"


def _of_row(case: Case, results: Results, name: str) -> list[Outcome]:
    return [results[run] for run in case.plan() if run.row == name and run in results]


def rows_table(case: Case, results: Results, costs: dict[str, tuple[int, int]], markdown: bool = False) -> str:
    """Returns a table with a row per network: means and standard deviations over the seeds, and costs."""
    header = ["network", "seeds", *(f"{label} %" for label in case.metrics.values()), "parameters, M", "MACs, M", "min"]
    lines = []
    for row in case.rows:
        found = _of_row(case, results, row.name)
        cells = [_cell([one.metrics[name] for one in found]) for name in case.metrics]
        minutes = f"{mean(one.seconds for one in found) / 60:.1f}" if found else MISSING
        parameters, macs = costs[row.name]
        sizes = [f"{parameters / 1e6:.2f}", f"{macs / 1e6:.0f}"]
        lines.append([row.label, str(len(found)), *cells, *sizes, minutes])
    return table(header, lines, markdown)


def class_table(case: Case, results: Results, markdown: bool = False) -> str:
    """Returns a table of single classes, a column per network."""
    of_rows = {row.name: _of_row(case, results, row.name) for row in case.rows}
    names = list(dict.fromkeys(name for found in of_rows.values() for one in found for name in one.classes))
    lines = []
    for name in names:
        values = [[one.classes[name] for one in found if name in one.classes] for found in of_rows.values()]
        lines.append([name, *map(_cell, values)])
    return table([f"{case.per_class}, %", *(row.label for row in case.rows)], lines, markdown)


def _cell(values: list[float]) -> str:
    return with_deviation(mean(values), deviation(values)) if values else MISSING


def write_results(case: Case, results: Results, costs: dict[str, tuple[int, int]]) -> list[str]:
    """Writes results.json and table.md, and returns their paths.

    Raises:
        OutputError: they cannot be written.
    """
    paths = [case.output / name for name in ("results.json", "table.md")]
    runs = [asdict(run) | asdict(outcome) for run, outcome in results.items()]
    with replacing(paths[0]) as new:
        new.write_text(json.dumps({"done": progress_text(case, results), "runs": runs}, indent=2) + "\n")
    parts = [
        f"{progress_text(case, results)}, {counted(case.recipe.schedule.epochs, 'epoch')} each: after the last one, "
        "mean ± standard deviation over the seeds.",
        rows_table(case, results, costs, markdown=True),
        class_table(case, results, markdown=True),
    ]
    with replacing(paths[1]) as new:
        new.write_text("\n\n".join(parts) + "\n")
    return [*map(str, paths)]
