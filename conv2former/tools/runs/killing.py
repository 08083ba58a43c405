"""Kills runs at random moments, starts them again, and compares the end with that of a run that was left alone."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ...config import BaseConfig
from ...engine import train
from ...engine.logging import read_metrics
from ...errors import TrainingError
from .comparing import differing_runs

__all__ = ["EVERYTHING_ON", "RunProcesses", "kill_and_compare"]

# Changes of the quickstart's configuration that let everything draw random numbers or keep state.
EVERYTHING_ON = [
    "model.drop_path_rate=0.2",
    "model.drop_rate=0.1",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.re_prob=0.25",
    "augment.auto_augment=rand-m9-mstd0.5-inc1",
    "train.accum_steps=2",
    "optim.clip_grad=5.0",
    "schedule.epochs=3",
    "schedule.warmup_epochs=1",
    "checkpoint.every_steps=2",
    "log.every_steps=1",
    "ema.decay=0.9",
]

Start = Literal["forkserver", "fork"]


class RunProcesses:
    """The processes of a run as torchrun would start them, but without the seconds that their imports take.

    Args:
        action: what each does; an exception is printed and is exit code 1.
        count: how many.
        log: a file for what they print.
        start: "forkserver": they are forked from a process that has imported this package and nothing else, which
            works on GPUs too; `action` must be picklable. "fork": from this one as it is, for tests that have changed
            something in it; CUDA cannot be used if this process has touched it.
    """

    def __init__(self, action: Callable[[], object], count: int, log: Path, start: Start = "fork") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        multiprocessing.set_forkserver_preload(["conv2former.engine"])  # before the first start; later it is ignored
        context: Any = multiprocessing.get_context(start)  # typeshed's BaseContext has no Process
        self._processes = [
            context.Process(target=_run_rank, args=(action, rank, count, port, log)) for rank in range(count)
        ]
        for process in self._processes:
            process.start()

    @property
    def exit_codes(self) -> list[int | None]:
        """By rank; None for one that has not ended, -9 for one that was killed with SIGKILL."""
        return [process.exitcode for process in self._processes]

    @property
    def has_failed(self) -> bool:
        return any(code not in (0, None) for code in self.exit_codes)

    def wait(self, seconds: float) -> bool:
        """Waits for the end, at most `seconds`; returns whether all have ended."""
        deadline = time.monotonic() + seconds
        while None in self.exit_codes:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        return True

    def stop(self) -> None:
        """Sends SIGTERM to every process: a training finishes its step and saves."""
        for process in self._processes:
            process.terminate()

    def kill(self) -> None:
        """Kills every process and its workers with SIGKILL."""
        for process in self._processes:
            if process.exitcode is None and process.pid:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # it has not made its own group yet
                    process.kill()
        self.wait(60.0)


def _run_rank(action: Callable[[], object], rank: int, count: int, port: int, log: Path) -> None:
    """Runs `action` as a process that torchrun has started, in a group of its own with its workers."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    action()


def kill_and_compare(
    config: BaseConfig,
    folder: Path,
    kills: int,
    processes: int,
    workers: Sequence[int],
    seed: int,
    say: Callable[[str], None],
    start: Start = "forkserver",
) -> int:
    """Kills runs `kills` times altogether, and compares every one that comes to its end.

    Args:
        config: the run; the shorter, the more often each moment of it is hit.
        folder: for the runs; what is in it is removed.
        kills: how often to kill.
        processes: of each run, on this machine.
        workers: numbers of loader workers, chosen anew for every start: they must change nothing.
        seed: of the moments and the choices.
        say: takes a line for every kill and every comparison.
        start: how processes are started, see `RunProcesses`.

    Returns:
        How many finished runs differed from the one that was left alone.

    Raises:
        TrainingError: a run failed by itself.
    """
    # Python clears up at the end what killed runs have left, and would warn of it.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def run(name: str, count: int, seconds: float) -> bool:
        """Lets a run go on with so many workers, and kills it in the end; returns whether it had ended by itself."""
        with_workers = config.model_copy(update={"data": config.data.model_copy(update={"workers": count})})
        log = folder / "output.txt"
        going = RunProcesses(partial(train, with_workers, folder / name), processes, log, start)
        deadline = time.monotonic() + seconds
        try:
            while not (ended := going.wait(min(1.0, max(0.0, deadline - time.monotonic())))):
                if going.has_failed or time.monotonic() >= deadline:
                    break
            if going.has_failed:
                tail = log.read_text(errors="replace").splitlines()[-15:]
                raise TrainingError("a run failed by itself; the end of its output:", *tail)
        finally:
            going.kill()
        return ended

    RunProcesses(_nothing, 1, folder / "output.txt", start).wait(60.0)  # the imports must not count as the run's time
    began = time.monotonic()
    run("whole", workers[0], math.inf)
    duration = time.monotonic() - began
    say(f"the run that is left alone: {duration:.1f} s, {processes} processes, {workers[0]} workers")
    killed = finished = different = in_this = 0
    while killed < kills or in_this:
        count = rng.choice(list(workers))
        patience = rng.uniform(0.0, duration) if killed < kills else 100 * duration
        if run("parts", count, patience):
            places = differing_runs(folder / "whole", folder / "parts")
            finished += 1
            different += bool(places)
            result = "identical" if not places else f"DIFFERENT in {', '.join(places[:5])}"
            say(f"run {finished}: ended after {in_this} kills, {result}")
            shutil.rmtree(folder / "parts")
            in_this = 0
            continue
        killed, in_this = killed + 1, in_this + 1
        say(f"kill {killed}: after {patience:.2f} s, {count} workers, {_moment(folder / 'parts')}")
    say(f"{killed} kills, {finished} finished runs, {different} different")
    return different


def _nothing() -> None:
    pass


def _moment(folder: Path) -> str:
    """Returns what a killed run was doing, as far as its folder tells."""
    if list((folder / "checkpoints").glob(".*.pt*")):
        return "while writing a checkpoint"
    steps = sorted((folder / "checkpoints").glob("step_*.pt"))
    rows = read_metrics(folder / "metrics.jsonl")
    return (
        f"newest checkpoint {steps[-1].name if steps else 'none'}, last logged step {rows[-1]['step'] if rows else 0}"
    )
