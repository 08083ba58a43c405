"""SIGTERM and SIGUSR1: finish the step, save, and exit, so that a scheduler can start the run again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .distributed import World

__all__ = ["StopSignal", "ignore_stop_signals"]

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def ignore_stop_signals(*_: Any) -> None:
    """Makes a loader's worker ignore them: they may reach a whole process group, and the last step needs the workers.

    SIGTERM from the process that the worker works for still ends it: without that, it would be waited for without end
    where it has to be terminated.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    owner = multiprocessing.parent_process()  # by a fork server, os.getppid() is that server
    assert owner is not None
    threading.Thread(target=_obey, args=(owner.pid,), daemon=True).start()


def _obey(owner: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != owner:
        pass
    os._exit(0)


class StopSignal:
    """Notes a signal to stop while it is entered, and lets the processes agree on the step after which they do.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        name: of the signal that this process has received, None so far.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}
        self._vote: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def agreed(self, world: World) -> bool:
        """Returns the same on every process: whether one of them was to stop when this was asked the time before.

        The question of one step is answered at the next, so that nobody waits.
        """
        if world.size == 1:
            return self.name is not None
        answer = self.finish()
        votes = torch.tensor(int(self.name is not None))
        self._vote = (dist.all_reduce(votes, group=world.control, async_op=True), votes)
        return answer

    def finish(self) -> bool:
        """Waits for the answer that is still on its way, if there is one, and returns it."""
        if self._vote is None:
            return False
        (work, votes), self._vote = self._vote, None
        work.wait()
        return bool(votes)
