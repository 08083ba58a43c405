"""What scripts/small_sets.py does: the runs and their table, or the list of them."""

from __future__ import annotations

from pathlib import Path

from conv2former.errors import ConfigError
from conv2former.tools.benchmark.progress import duration

from ..study import Say
from .plan import PRETRAINING, Study
from .results import progress_text, small_sets_table, write_results
from .runs import Results, find_results, passes, run_study, seconds_of, settled_config, write_tables

__all__ = ["list_runs", "part_of", "run"]

EACH = 1 / 400  # seconds for a training image of 32 x 32 pixels, about, on one core; until a run is done


def part_of(text: str) -> tuple[int, int]:
    """Returns (1, 2) of `1/2`.

    Raises:
        ConfigError: it is no part.
    """
    first, _, count = text.partition("/")
    if first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count):
        return int(first), int(count)
    raise ConfigError(f"--part {text}: expected 1/2 in one process and 2/2 in another, for example")


def run(study: Study, say: Say, part: tuple[int, int] = (1, 1)) -> None:
    """Does what is left of the study. After each run the table is written anew.

    Raises:
        UserError, TrainingError, RunStopped: see `run_study`.
    """
    paths: list[Path] = []

    def note(results: Results) -> None:
        paths[:] = write_results(study, results)

    results = run_study(study, say, note, part)
    for line in ("", progress_text(study, results), *small_sets_table(study, results).split("\n")):
        say(line)
    say("")
    say(f"written: {', '.join(map(str, paths))}")


def list_runs(study: Study, say: Say) -> None:
    """Prints the runs in their order, which are done, and about how long the others take.

    Raises:
        UserError: a mistake in the configurations or the data.
    """
    counts = write_tables(study)
    costs = {run: passes(settled_config(study, run, images), images) for run, images in counts.items()}
    results = find_results(study, counts)
    seconds = seconds_of(study, results, costs, EACH)
    for number, one in enumerate(study.plan(), 1):
        what = "pre-training" if one == PRETRAINING else f"{one.set:12s}  {one.setting:12s}  seed {one.seed}"
        left = "done" if one in results else f"about {duration(seconds[one])}"
        say(f"{number:3d}  {what:36s}  {left}")
    basis = "the runs that are done" if results else f"{1 / EACH:.0f} training images a second"
    left = duration(sum(seconds.values()))
    say(f"{progress_text(study, results)} done; the others train for about {left}, by {basis}")
