"""What studies share: runs that are not repeated, what they came to, tables of means over seeds."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any

from conv2former._yaml import read_yaml
from conv2former.config import BaseConfig, check_config
from conv2former.engine import train
from conv2former.engine.images import settle_images
from conv2former.engine.logging import read_metrics
from conv2former.engine.prepare import changed_keys
from conv2former.engine.signals import StopSignal
from conv2former.errors import (
    CheckpointError,
    ConfigError,
    RunStopped,
    TrainingError,
    UserError,
    bullets,
    closest,
)
from conv2former.tasks.network import name_network
from conv2former.tools.cli import run_cli
from conv2former.tools.output import text_table
from conv2former.tools.runs.killing import RunProcesses

__all__ = [
    "Say",
    "changes_of",
    "check_alone",
    "check_count",
    "check_names",
    "check_processes",
    "deviation",
    "final_row",
    "holds_run",
    "is_finished",
    "table",
    "top1_of",
    "train_quietly",
    "with_deviation",
]

Say = Callable[[str], None]

OUTPUT = "output.txt"  # in a run folder: what several processes have printed
PATIENCE = 60.0  # seconds that processes have to save and end


# -------------------------------------------------------------------------------------------------------- the runs


def changes_of(folder: Path, config: BaseConfig) -> list[str] | None:
    """Returns how a configuration differs from that of the run in a folder, but for what changes nothing.

    Returns:
        `dotted.key: old -> new` lines; None if there is no run, or one that this version cannot go on with.
    """
    try:
        noted = check_config(read_yaml(folder / "config.yaml"), folder).to_dict()
        now = settle_images(name_network(config))[0].to_dict()
    except (ConfigError, CheckpointError):  # no run; of another version; without the weights that it started from
        return None
    # a run that cannot train in channels_last memory notes that it did not; it rounds otherwise, and no more
    return changed_keys(noted, now, ["train.channels_last"])


def holds_run(folder: Path, config: BaseConfig, advice: str = "give another --output") -> bool:
    """Returns whether a folder holds this run, finished or not.

    Args:
        folder: of the run.
        config: how it would be done now.
        advice: what can be done about another one.

    Raises:
        ConfigError: it holds another one.
    """
    changes = changes_of(folder, config)
    if changes:
        raise ConfigError(
            f"{folder} holds a run with another configuration; {advice}, or undo the change:", *bullets(changes)
        )
    return changes is not None


def is_finished(folder: Path, config: BaseConfig, processes: int = 1) -> bool:
    """Returns whether a folder holds a finished run of this configuration by any number of processes.

    Args:
        folder: of the run.
        config: how it would be done now.
        processes: by how many; the global batch must be the same.
    """
    try:
        report = json.loads((folder / "report.json").read_text())
    except (OSError, ValueError):
        return False
    batch = config.train.batch_size * config.train.accum_steps * processes
    return report.get("global_batch_size", batch) == batch and changes_of(folder, config) == []


def train_quietly(config: BaseConfig, folder: Path, processes: int = 1) -> None:
    """Trains without printing; what a run says is in its train.log. A run that was stopped goes on.

    Args:
        config: the run, with the batch size of one of the processes.
        folder: of the run.
        processes: how many train it together, on this machine.

    Raises:
        UserError, TrainingError: as `train`; begins with the folder.
        RunStopped: SIGTERM or SIGUSR1 came; the run is saved.
    """
    try:
        if processes > 1:
            _train_together(config, folder, processes)
            return
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            train(config, folder)
    except (UserError, TrainingError) as e:
        raise e.below(folder) from None


def _train_together(config: BaseConfig, folder: Path, count: int) -> None:
    """Trains in processes of their own. They save and stop with this one, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / OUTPUT
    log.unlink(missing_ok=True)
    with StopSignal() as signalled:
        running = RunProcesses(partial(_train_rank, config, folder), count, log, "forkserver")
        try:
            while not (running.wait(0.5) or running.has_failed or signalled.name):
                pass
            if signalled.name:
                running.stop()
            running.wait(PATIENCE)
        except KeyboardInterrupt:
            running.stop()
            running.wait(PATIENCE)
            raise
        finally:
            running.kill()
    if signalled.name:
        raise RunStopped(f"stopped by {signalled.name}, and saved; the same command goes on from there")
    if running.has_failed:
        raise _error_of(log, running.exit_codes)


def _train_rank(config: BaseConfig, folder: Path) -> None:
    """Trains as one of several processes, and stops when the one that started it has gone."""
    threading.Thread(target=_stop_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    run_cli(partial(train, config, folder))  # type: ignore[arg-type]


def _stop_with(parent: Any) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _error_of(log: Path, exit_codes: Sequence[int | None]) -> UserError | TrainingError:
    """Returns the error that processes ended with, as they have printed it."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    begins = next((i for i, line in enumerate(lines) if line.startswith("error")), len(lines) - 1)
    first, *others = lines[begins:] or ["ended without a word"]
    text = [first.partition(": ")[2] or first, *others[:20]]
    return ConfigError(*text) if ConfigError.exit_code in exit_codes else TrainingError(*text)


def check_alone() -> None:
    """Checks that this process is the only one of its program.

    Raises:
        ConfigError: torchrun has started several.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("a comparison is one process; start it without torchrun")


def check_names(option: str, given: Sequence[str], known: Sequence[str], what: str = "") -> None:
    """Checks an option that lists some of what a study has, of which `what` is the word, such as `row`.

    Raises:
        ConfigError: the study has none of a name.
    """
    for name in given:
        if name not in known:
            raise ConfigError(f"{option}: no {what}{what and ' '}'{name}'{closest(name, known)}: {', '.join(known)}")


def check_count(option: str, count: int) -> None:
    """Checks the number that an option such as `--seeds` gives.

    Raises:
        ConfigError: it is not positive.
    """
    if count < 1:
        raise ConfigError(f"{option} {count}: give at least one")


def check_processes(processes: int, batch_size: int) -> None:
    """Checks `--processes`, among which each batch is divided.

    Raises:
        ConfigError: it cannot be.
    """
    if processes < 1 or batch_size % processes:
        raise ConfigError(
            f"--processes {processes}: a batch of {batch_size} images cannot be divided among them; give another "
            "number, or another train.batch_size"
        )


# ----------------------------------------------------------------------------------------------------- the results


def final_row(folder: Path) -> dict[str, Any]:
    """Returns the row of metrics.jsonl of a run's last evaluation."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "eval"][-1]


def top1_of(row: Mapping[str, Any]) -> float:
    """Returns the accuracy of an evaluation's row, of the averaged weights if there are any, as in the report."""
    return row.get("ema_top1", row["top1"])


def deviation(values: Sequence[float]) -> float | None:
    """Returns the standard deviation of a sample; None of a single value."""
    return stdev(values) if len(values) > 1 else None


def with_deviation(value: float, deviation: float | None, sign: str = "", digits: int = 1) -> str:
    """Returns `94.7 ± 0.2`, or the value alone."""
    return f"{value:{sign}.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """Returns a table for a terminal, or in Markdown."""
    if not markdown:
        return text_table(header, rows)
    first, *others = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([first, "|" + "---|" * len(header), *others])
