"""The runs of the study, one after the other, and what they came to."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from conv2former.config import Config, fit_auto, fit_batch, make_plan
from conv2former.tools.output import check_writable

from ..study import Say, check_alone, final_row, holds_run, is_finished, top1_of, train_quietly
from .images import Pool, cells, digits, known, photos, write_choice
from .plan import PRETRAINING, Run, Study

__all__ = ["Outcome", "Results", "find_results", "passes", "run_study", "seconds_of", "settled_config", "write_tables"]

PATIENCE = 5.0  # seconds between two looks at the pre-training of another process
FROZEN_COST = 0.4  # of an image whose gradients end at the classifier, by what other images cost


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        top1: accuracy of the run's best weights, percent: those of its end, or the linear probe that it begins with.
        images: that it was measured on.
        epochs, steps: of the training.
        seconds: of the training, by the run's own meter.
        folder: of the run.
    """

    top1: float
    images: int
    epochs: int
    steps: int
    seconds: float
    folder: str


Results = Mapping[Run, Outcome]


def write_tables(study: Study) -> dict[Run, int]:
    """Writes the images that are not there yet and the tables of all runs; returns how many each run is trained on.

    Raises:
        ConfigError: images are missing.
    """
    pools: dict[str, Pool] = {"photos": photos(study.photos)}
    pools["known"] = known(pools["photos"], study.known)
    kinds = {one.images for one in study.sets.values()}
    if "digits" in kinds:
        pools["digits"] = digits(study.output / "images" / "digits")
    if "cells" in kinds and study.cells is not None:
        pools["cells"] = cells(study.cells, study.output / "images" / "cells")
    counts: dict[Run, int] = {}
    by_table: dict[object, int] = {}
    for run in study.plan():
        path = study.table(run)
        if path not in by_table:
            by_table[path] = _write_table(study, run, pools)
        counts[run] = by_table[path]
    return counts


def _write_table(study: Study, run: Run, pools: Mapping[str, Pool]) -> int:
    path = study.table(run)
    if run == PRETRAINING:
        return write_choice(path, pools["photos"], list(study.classes), None, None, 0)
    one = study.sets[run.set]
    left_out = study.classes if one.images == "photos" else ()
    classes = [name for name in sorted(pools[one.images]["train"]) if name not in left_out]
    return write_choice(path, pools[one.images], classes, one.per_class, study.held[one.images], run.seed)


def settled_config(study: Study, run: Run, images: int) -> Config:
    """Returns the configuration of a run with nothing left open.

    So a run with values that another version found fitting is another run.

    Args:
        study: of the run.
        run: one of its plan.
        images: that it is trained on.
    """
    return fit_auto(fit_batch(study.config(run), 1, images), 1, images)[0]


def find_results(study: Study, counts: Mapping[Run, int], known: Results | None = None) -> dict[Run, Outcome]:
    """Returns what is done, in the order of the plan.

    Args:
        study: all runs.
        counts: of the images that each is trained on.
        known: what is not looked at again.

    Raises:
        ConfigError: a run's folder holds another one.
    """
    known = known or {}
    found = {run: known.get(run) or _outcome(study, run, images) for run, images in counts.items()}
    return {run: outcome for run, outcome in found.items() if outcome}


def _outcome(study: Study, run: Run, images: int) -> Outcome | None:
    """Returns what a run came to, None if it is not done.

    Raises:
        ConfigError: its folder holds another one.
    """
    folder = study.folder(run)
    if not (folder / "report.json").is_file():
        return None
    config = settled_config(study, run, images)
    if not (holds_run(folder, config, "remove it, give another --output") and is_finished(folder, config)):
        return None
    row, report = final_row(folder), json.loads((folder / "report.json").read_text())
    top1 = report["top1"] if run != PRETRAINING else top1_of(row)
    return Outcome(top1, row["n"], row["epoch"], row["step"], report["seconds"], str(folder))


def run_study(study: Study, say: Say, note: Callable[[Results], None], part: tuple[int, int] = (1, 1)) -> Results:
    """Does the runs that are not done; one that was stopped goes on.

    Args:
        study: what to do.
        say: takes a line for every run.
        note: called with all results at the start and after every run.
        part: (i, n) for the i-th of n processes, counted from 1, each of which does every n-th run. The pre-training is
            the first one's; the others wait for it.

    Raises:
        UserError: a mistake in the configurations or the data, or the output cannot be written.
        TrainingError: a run has diverged.
        RunStopped: SIGTERM or SIGUSR1 came; the run in progress is saved.
    """
    check_alone()
    check_writable(study.output / "table.md")
    counts = write_tables(study)
    results = find_results(study, counts)
    note(results)
    plan = study.plan()
    for number, run in enumerate(plan):
        if run in results or (run != PRETRAINING and number % part[1] != part[0] - 1):
            continue
        if run == PRETRAINING and part[0] != 1:
            say("waiting for the pre-training, which part 1 does")
            while not _outcome(study, run, counts[run]):
                time.sleep(PATIENCE)
            continue
        train_quietly(settled_config(study, run, counts[run]), study.folder(run))
        if run != PRETRAINING:
            shutil.rmtree(study.folder(run) / "checkpoints")
        results = find_results(study, counts, results)  # the other parts', too
        say(f"[{len(results):{len(str(len(plan)))}d}/{len(plan)}]  {_line(run, results[run])}")
        note(results)
    return results


def _line(run: Run, outcome: Outcome) -> str:
    what = f"{run.set:12s}  {run.setting:12s}  seed {run.seed}" if run != PRETRAINING else f"{'pre-training':34s}"
    return f"{what}  top-1 {outcome.top1:6.2f} %  ({outcome.steps:,} steps, {outcome.seconds:.0f} s)"


def passes(config: Config, images: int) -> float:
    """Returns about how much a run costs, in training images of which all gradients are computed."""
    plan = make_plan(config, 1, images)
    each = 1.0 if config.model.freeze == "nothing" else FROZEN_COST
    return plan.total_steps * plan.global_batch_size * each


def seconds_of(study: Study, results: Results, costs: Mapping[Run, float], each: float) -> dict[Run, float]:
    """Returns about how long the runs that are not done train.

    Args:
        study: the runs.
        results: of those that are done.
        costs: of all, from `passes`.
        each: seconds for a training image, where no run is done.
    """
    done = [run for run in results if run in costs]
    if done:
        each = sum(results[run].seconds for run in done) / sum(costs[run] for run in done)
    return {run: costs[run] * each for run in study.plan() if run not in results}
