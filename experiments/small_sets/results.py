"""The study's table, of the runs that are done so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from conv2former.errors import counted
from conv2former.tools.output import replacing, write_csv

from ..study import deviation, table, with_deviation
from .plan import Run, Study
from .runs import Results

__all__ = ["accuracies", "comparison", "progress_text", "small_sets_table", "write_results"]

MISSING = "-"
ADAPTIVE, OTHERS = "auto", ("before", "probe")  # what is compared with the better of what


def accuracies(study: Study, results: Results, name: str, setting: str) -> dict[int, float]:
    """Returns the accuracies of a set with a setting, by seed, percent."""
    runs = {seed: Run(name, setting, seed) for seed in range(study.seeds)}
    return {seed: results[run].top1 for seed, run in runs.items() if run in results}


def comparison(study: Study, results: Results, name: str) -> tuple[float, float | None] | None:
    """Returns mean and standard deviation of what the adaptive setting is ahead, in points, seed by seed.

    It is compared with the better one, in the mean over the seeds, of the recipe as it was and the linear probe. None
    where one of the three has no seed in common with the others.
    """
    own = accuracies(study, results, name, ADAPTIVE)
    others = [accuracies(study, results, name, setting) for setting in OTHERS]
    seeds = [seed for seed in own if all(seed in other for other in others)]
    if not seeds:
        return None
    better = max(others, key=lambda other: mean(other[seed] for seed in seeds))
    ahead = [own[seed] - better[seed] for seed in seeds]
    return mean(ahead), deviation(ahead)


def progress_text(study: Study, results: Results) -> str:
    """Returns `7 of 79 runs`."""
    return f"{len(results)} of {counted(len(study.plan()), 'run')}"


def small_sets_table(study: Study, results: Results, markdown: bool = False) -> str:
    """Returns a table with a row per set and a column per setting, for a terminal or in Markdown."""
    columns = list(study.settings.values())
    is_compared = {ADAPTIVE, *OTHERS} <= study.settings.keys()
    header = ["training images", *(column.label for column in columns)]
    header += ["adaptive minus the better of the first two"] if is_compared else []
    lines = []
    for one in study.sets.values():
        cells = [_cell(list(accuracies(study, results, one.name, column.name).values())) for column in columns]
        if is_compared:
            ahead = comparison(study, results, one.name)
            cells.append(MISSING if ahead is None else with_deviation(*ahead, "+"))
        lines.append([one.label, *cells])
    return table(header, lines, markdown)


def _cell(values: Sequence[float]) -> str:
    return with_deviation(mean(values), deviation(values)) if values else MISSING


def write_results(study: Study, results: Results) -> list[Path]:
    """Writes results.json, results.csv (a row per run) and table.md, and returns their paths.

    Raises:
        OutputError: they cannot be written.
    """
    paths = [study.output / name for name in ("results.json", "results.csv", "table.md")]
    runs = [asdict(run) | asdict(outcome) for run, outcome in results.items()]
    with replacing(paths[0]) as new:
        new.write_text(json.dumps({"done": progress_text(study, results), "runs": runs}, indent=2) + "\n")
    keys = list(runs[0]) if runs else []
    write_csv(paths[1], keys, [[run[key] for key in keys] for run in runs])
    text = f"{progress_text(study, results)}. Top-1, percent: mean ± standard deviation over the seeds."
    with replacing(paths[2]) as new:
        new.write_text(f"{text}\n\n{small_sets_table(study, results, markdown=True)}\n")
    return paths
