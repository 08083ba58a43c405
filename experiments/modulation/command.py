"""What scripts/modulation.py does: the runs and their tables, or the list of them."""

from __future__ import annotations

from pathlib import Path

from conv2former.errors import counted
from conv2former.tools.benchmark.progress import duration

from ..study import Say
from .cost import estimate, measure_costs
from .plan import Study
from .results import comparison_table, progress_text, rows_of, tuning_table, write_results
from .runs import Results, choose, count_images, find_results, run_study, setting_text

__all__ = ["list_runs", "run"]

COSTS = "costs.json"  # in the output folder


def run(study: Study, say: Say) -> None:
    """Does what is left of the study. After each run the tables and the picture are written anew.

    Raises:
        UserError, TrainingError, RunStopped: see `run_study`.
    """
    count_images(study)  # a mistake in the data is found first
    costs = measure_costs(study, study.output / COSTS, say)
    paths: list[Path] = []

    def note(results: Results) -> None:
        paths[:] = write_results(study, results, costs)

    results = run_study(study, say, note)
    tables = [comparison_table(study, rows_of(study, results, costs)), tuning_table(study, results)]
    for line in ("", progress_text(study, results), *"\n\n".join(tables).split("\n")):
        say(line)
    say("")
    say("written: " + ", ".join(map(str, paths)))


def list_runs(study: Study, say: Say) -> None:
    """Prints the runs in their order, which are done, and about how long the others take.

    Raises:
        UserError: a mistake in the configurations or the data.
    """
    images = count_images(study)
    costs = measure_costs(study, study.output / COSTS, say)
    results = find_results(study)
    seconds = estimate(study, results, costs, images)
    plan = study.plan(choose(study, results))
    for number, one in enumerate(plan, 1):
        part = f"seed {one.seed}" if one.is_final else "tuning"
        setting = "the best" if one.setting is None else setting_text(one.setting)
        left = "done" if one in results else f"about {duration(seconds[one])}"
        say(f"{number:3d}  {one.network:12s}  {part:6s}  {setting:22s}  {left}")
    basis = "the runs that are done" if results else "training steps in one process"
    size = f"{counted(images[True], 'training image')}, {counted(study.recipe.schedule.epochs, 'epoch')}"
    total = duration(sum(seconds.values()))
    say(f"{progress_text(study, results)} done; the others train for about {total}, by {basis} ({size})")
