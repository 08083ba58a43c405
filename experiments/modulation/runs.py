"""The runs of the study, one after the other, and what they came to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from conv2former.data.sources import open_train_and_val
from conv2former.errors import TrainingError
from conv2former.tools.output import check_writable, replacing

from ..study import Say, check_alone, final_row, holds_run, is_finished, top1_of, train_quietly
from .plan import Run, Setting, Study

__all__ = ["Outcome", "Results", "choose", "count_images", "find_results", "run_study", "setting_text"]

DIVERGED = "diverged.txt"  # in a run folder: why the run was ended


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        top1: accuracy after the last epoch, percent; None if the run diverged.
        images: that it was measured on; 0 if the run diverged.
        seconds: of training, by the run's own meter; 0 if the run diverged.
        folder: of the run.
    """

    top1: float | None
    images: int
    seconds: float
    folder: str


Results = Mapping[Run, Outcome]


def choose(study: Study, results: Results) -> dict[str, Setting]:
    """Returns the best setting of each network whose tuning is done; of equal ones the first.

    Raises:
        TrainingError: all settings of a network have diverged.
    """
    chosen = {}
    for name in study.only:
        tried = [results.get(Run(name, False, study.tuning_seed, setting)) for setting in study.settings]
        found = [outcome for outcome in tried if outcome is not None]
        if len(found) < len(tried):
            continue
        accuracies = [-1.0 if outcome.top1 is None else outcome.top1 for outcome in found]
        if max(accuracies) < 0:
            raise TrainingError(f"{name}: diverged with every setting; list lower rates in the study's file")
        chosen[name] = study.settings[accuracies.index(max(accuracies))]
    return chosen


def find_results(study: Study) -> dict[Run, Outcome]:
    """Returns what is done.

    Raises:
        ConfigError: a run's folder holds another one.
    """
    results: dict[Run, Outcome] = {}
    for is_final in (False, True):
        for run in study.plan(choose(study, results) if is_final else {}):
            outcome = _outcome(study, run) if run.is_final == is_final and run.setting is not None else None
            if outcome:
                results[run] = outcome
    return results


def _outcome(study: Study, run: Run) -> Outcome | None:
    """Returns what a run came to, None if it is not done.

    Raises:
        ConfigError: its folder holds another one.
    """
    folder, config = study.folder(run), study.config(run)
    if not holds_run(folder, config):
        return None
    if (folder / DIVERGED).is_file():
        return Outcome(None, 0, 0.0, str(folder))
    if not is_finished(folder, config, study.processes):
        return None
    row, report = final_row(folder), json.loads((folder / "report.json").read_text())
    return Outcome(top1_of(row), row["n"], report["seconds"], str(folder))


def run_study(study: Study, say: Say, note: Callable[[Results], None]) -> dict[Run, Outcome]:
    """Does the runs that are not done; one that was stopped goes on.

    Args:
        study: what to do.
        say: takes a line for every run.
        note: called with all results at the start and after every run.

    Raises:
        UserError: a mistake in the configurations or the data, or the output cannot be written.
        TrainingError: a run ended, but not because it diverged.
        RunStopped: SIGTERM or SIGUSR1 came; the run in progress is saved.
    """
    check_alone()
    check_writable(study.output / "table.md")
    results = find_results(study)
    note(results)
    total = len(study.plan({}))
    if results:
        say(f"{len(results)} of {total} runs are done")
    while run := _next(study, results):
        _train(study, run)
        outcome = _outcome(study, run)
        assert outcome is not None
        results[run] = outcome
        say(f"[{len(results):{len(str(total))}d}/{total}]  {_line(run, outcome)}")
        note(results)
    return results


def _next(study: Study, results: Results) -> Run | None:
    """Returns the next run that is not done, None at the end."""
    return next((run for run in study.plan(choose(study, results)) if run not in results), None)


def _train(study: Study, run: Run) -> None:
    """Trains. Of a run of the tuning the checkpoints are removed, and of one that diverges it is noted."""
    folder = study.folder(run)
    try:
        train_quietly(study.config(run), folder, study.processes)
    except TrainingError as e:
        if "not finite" not in str(e):  # a process that has died, for example
            raise
        with replacing(folder / DIVERGED) as new:
            new.write_text(f"{e}\n")
    if not run.is_final:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def setting_text(setting: Setting) -> str:
    """Returns `0.02, decay 0.05`, or other keys with their names."""
    names = {"base_lr": "rate", "weight_decay": "decay"}
    return ", ".join(f"{names.get(key, key)} {value:g}" for key, value in setting)


def _line(run: Run, outcome: Outcome) -> str:
    what = f"seed {run.seed}" if run.is_final else f"tuning, {setting_text(run.setting or ())}"
    if outcome.top1 is None:
        return f"{run.network:12s}  {what:30s}  diverged"
    return (
        f"{run.network:12s}  {what:30s}  top-1 {outcome.top1:6.2f} %  ({outcome.images:,} images, "
        f"{outcome.seconds / 60:.1f} min)"
    )


def count_images(study: Study) -> dict[bool, int]:
    """Returns the training images of the final runs (True) and of the tuning (False).

    Raises:
        DataError: the data is not there.
    """
    runs = {run.is_final: run for run in study.plan({})}
    return {is_final: len(open_train_and_val(study.config(run).data)[0]) for is_final, run in runs.items()}
