"""The runs of a case, one after the other, and what they came to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from conv2former.tools.output import check_writable

from ..study import Say, check_alone, final_row, holds_run, is_finished, train_quietly
from .plan import Case, Run

__all__ = ["Outcome", "Results", "find_results", "run_case"]


@dataclass(frozen=True)
class Outcome:
    """What a run came to, after its last epoch; of the averaged weights if there are any.

    Attributes:
        metrics: the case's, percent.
        classes: the metric of single classes, percent.
        images: that they were measured on.
        seconds: of training, by the run's own meter.
        folder: of the run.
    """

    metrics: dict[str, float]
    classes: dict[str, float]
    images: int
    seconds: float
    folder: str


Results = Mapping[Run, Outcome]


def find_results(case: Case) -> dict[Run, Outcome]:
    """Returns what is done.

    Raises:
        ConfigError: a run's folder holds another one.
    """
    found = {run: _outcome(case, run) for run in case.plan()}
    return {run: outcome for run, outcome in found.items() if outcome is not None}


def _outcome(case: Case, run: Run) -> Outcome | None:
    """Returns what a run came to, None if it is not done."""
    folder, config = case.folder(run), case.config(run)
    if not (holds_run(folder, config) and is_finished(folder, config, case.processes)):
        return None
    row, report = final_row(folder), json.loads((folder / "report.json").read_text())
    prefix = "ema_" if any(key.startswith("ema_") for key in row) else ""
    start = f"{prefix}{case.per_class}/"
    classes = {key.removeprefix(start): value for key, value in row.items() if key.startswith(start)}
    metrics = {name: row[f"{prefix}{name}"] for name in case.metrics}
    return Outcome(metrics, classes, row["n"], report["seconds"], str(folder))


def run_case(case: Case, say: Say, note: Callable[[Results], None]) -> dict[Run, Outcome]:
    """Does the runs that are not done; one that was stopped goes on.

    Args:
        case: what to do.
        say: takes a line for every run.
        note: called with all results at the start and after every run.

    Raises:
        UserError: a mistake in the configurations or the data, or the output cannot be written.
        TrainingError: a run ended.
        RunStopped: SIGTERM or SIGUSR1 came; the run in progress is saved.
    """
    check_alone()
    check_writable(case.output / "table.md")
    results, plan = find_results(case), case.plan()
    note(results)
    if results:
        say(f"{len(results)} of {len(plan)} runs are done")
    for run in plan:
        if run in results:
            continue
        train_quietly(case.config(run), case.folder(run), case.processes)
        outcome = _outcome(case, run)
        assert outcome is not None
        results[run] = outcome
        numbers = ", ".join(f"{label} {outcome.metrics[name]:.2f} %" for name, label in case.metrics.items())
        say(f"[{len(results)}/{len(plan)}]  {run.row}, seed {run.seed}: {numbers}, {outcome.seconds / 60:.1f} min")
        note(results)
    return results
