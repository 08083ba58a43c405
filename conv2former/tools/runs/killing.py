"""Kills runs at random moments, starts them again, and compares the end with that of a run that was left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...config import Config
from ...engine import train
from ...engine.logging import read_metrics
from ...errors import TrainingError
from .comparing import differing_runs

__all__ = ["ForkedProcesses", "kill_and_compare"]


class ForkedProcesses:
    """The processes of a run as torchrun would start them, but forked, so that they need not import anything again.

    Args:
        action: what each does; its return is exit code 0, an exception is printed and is exit code 1.
        count: how many.
        log: a file for what they print.
    """

    def __init__(self, action: Callable[[], object], count: int, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids: dict[int, int | None] = {}  # exit codes
        for rank in range(count):
            pid = os.fork()
            if pid:
                self.pids[pid] = None
                continue
            code = 1
            try:
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
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def wait(self, seconds: float) -> bool:
        """Waits for the end, at most `seconds`; returns whether all have ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for pid in [pid for pid, code in self.pids.items() if code is None]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.pids[pid] = os.waitstatus_to_exitcode(status)
            if None not in self.pids.values():
                return True
            time.sleep(0.005)
        return False

    def kill(self) -> None:
        """Kills every process and its workers with SIGKILL."""
        for pid in [pid for pid, code in self.pids.items() if code is None]:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its own group yet
                os.kill(pid, signal.SIGKILL)
        self.wait(60.0)

    @property
    def has_failed(self) -> bool:
        return any(code not in (0, None) for code in self.pids.values())


def kill_and_compare(
    config: Config,
    folder: Path,
    kills: int,
    processes: int,
    workers: Sequence[int],
    seed: int,
    say: Callable[[str], None],
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

    Returns:
        How many finished runs differed from the one that was left alone.

    Raises:
        TrainingError: a run failed by itself.
    """
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def start(name: str, count: int) -> ForkedProcesses:
        with_workers = config.model_copy(update={"data": config.data.model_copy(update={"workers": count})})
        return ForkedProcesses(lambda: train(with_workers, folder / name), processes, folder / "output.txt")

    def end(run: ForkedProcesses) -> None:
        if run.has_failed:
            run.kill()
            tail = (folder / "output.txt").read_text().splitlines()[-15:]
            raise TrainingError("a run failed by itself; the end of its output:", *tail)

    began = time.monotonic()
    whole = start("whole", workers[0])
    while not whole.wait(1.0):
        end(whole)
    end(whole)
    duration = time.monotonic() - began
    say(f"the run that is left alone: {duration:.1f} s, {processes} processes, {workers[0]} workers")
    killed = finished = different = in_this = 0
    while killed < kills or in_this:
        count = rng.choice(list(workers))
        run = start("parts", count)
        patience = rng.uniform(0.0, duration) if killed < kills else 100 * duration
        if run.wait(patience):
            end(run)
            places = differing_runs(folder / "whole", folder / "parts")
            finished += 1
            different += bool(places)
            result = "identical" if not places else f"DIFFERENT in {', '.join(places[:5])}"
            say(f"run {finished}: ended after {in_this} kills, {result}")
            shutil.rmtree(folder / "parts")
            in_this = 0
            continue
        end(run)
        run.kill()
        killed, in_this = killed + 1, in_this + 1
        say(f"kill {killed}: after {patience:.2f} s, {count} workers, {_moment(folder / 'parts')}")
    say(f"{killed} kills, {finished} finished runs, {different} different")
    return different


def _moment(folder: Path) -> str:
    """Returns what a killed run was doing, as far as its folder tells."""
    if list((folder / "checkpoints").glob(".*.pt*")):
        return "while writing a checkpoint"
    steps = sorted((folder / "checkpoints").glob("step_*.pt"))
    rows = read_metrics(folder / "metrics.jsonl")
    return (
        f"newest checkpoint {steps[-1].name if steps else 'none'}, last logged step {rows[-1]['step'] if rows else 0}"
    )
