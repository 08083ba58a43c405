"""What scripts/real_cases.py does: the runs of a case and their tables."""

from __future__ import annotations

from conv2former.tasks.registry import find_task

from ..study import Say
from .plan import Case
from .results import class_table, costs_of, progress_text, rows_table, write_results
from .runs import Results, run_case

__all__ = ["run"]


def run(case: Case, say: Say) -> None:
    """Does what is left of a case. After each run the tables are written anew.

    Raises:
        UserError, TrainingError, RunStopped: see `run_case`.
    """
    train = find_task(case.recipe).open_data(case.recipe)[0]  # a mistake in the data is found first
    costs = costs_of(case, len(train.class_names))
    paths: list[str] = []

    def note(results: Results) -> None:
        paths[:] = write_results(case, results, costs)

    results = run_case(case, say, note)
    for line in ("", progress_text(case, results), *rows_table(case, results, costs).split("\n")):
        say(line)
    for line in ("", *class_table(case, results).split("\n"), "", f"written: {', '.join(paths)}"):
        say(line)
