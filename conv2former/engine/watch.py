"""Notices a process that the others wait for in vain, and says which one it is."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import Any

from ..errors import note_for_torchrun
from ..printing import print_lines

__all__ = ["Watch"]

_HANG_EXIT_CODE = 3  # that of TrainingError
_LISTEN = 4  # seconds in which a living process is heard
_FAREWELL = 2.0  # seconds that the end of a run may wait for the store


class Watch(threading.Thread):
    """A thread that tells the other processes where this one is, and ends the run if it waits too long.

    A collective that one process does not reach makes the others wait; what they then raise, if anything, says only
    that time is up. So each process writes its place into the store that they met at, once a second. One that has
    stood at the same place for the time-out reads the others' places: whoever is at an earlier one, or has stopped
    writing, is named, and the run ends with code 3.

    Every process must call `at` for the same places in the same order.

    Args:
        store: shared by the processes; for this thread's use alone.
        rank, size: of this process.
        timeout: seconds.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        super().__init__(name="conv2former-watch", daemon=True)
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._place, self._count, self._since = "the start", 0, time.monotonic()
        self._done = threading.Event()
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.start()

    def at(self, place: str) -> None:
        """Says that this process has come to `place`."""
        self._place, self._count, self._since = place, self._count + 1, time.monotonic()

    def works(self) -> None:
        """Says that this process is at work where it is, and waits for nobody."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Ends the watch, and waits until the thread has ended or the store has not answered for two seconds.

        A thread that is inside of torch when Python ends makes the process abort (code 134) as it comes back.
        """
        self._done.set()
        self.join(_FAREWELL)

    def run(self) -> None:
        """The thread."""
        beat = 0
        seen: list[dict[int, list[str]]] = []  # the others, once a second, since the time has been up
        while beat == 0 or not self._done.wait(1.0):
            if self._parent not in (None, os.getppid()):
                os._exit(1)  # torchrun has been killed: its processes must not train on beside those of a new start
            beat += 1
            is_late = time.monotonic() - self._since > self._timeout
            try:
                self._store.set(str(self._rank), f"{beat} {self._count} {socket.gethostname()} {self._place}")
                seen = [*seen, self._read()] if is_late else []
            except Exception as e:
                if "reset" in str(e) or "closed" in str(e) or "pipe" in str(e):
                    return  # the process that keeps the store has ended; nothing can be said any more
                if is_late:
                    self._end("the process that the others meet at (rank 0, or torchrun) does not answer")
            if len(seen) > _LISTEN:
                self._accuse(seen[0], seen[-1], len(seen))

    def _read(self) -> dict[int, list[str]]:
        """Returns [beat, count, host, place] of every other process that has written anything."""
        others = [rank for rank in range(self._size) if rank != self._rank and self._store.check([str(rank)])]
        return {rank: self._store.get(str(rank)).decode().split(" ", 3) for rank in others}

    def _accuse(self, before: dict[int, list[str]], after: dict[int, list[str]], seconds: int) -> None:
        """Ends the run if another process is to blame, judged by what was read of them, `seconds` apart."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        silent = [rank for rank in others if rank in before and after[rank][0] == before[rank][0]]
        missing = [rank for rank in others if rank in silent or rank not in after or int(after[rank][1]) < self._count]
        if not missing and any(int(words[1]) > self._count for words in after.values()):
            return  # it is this process that the others wait for; they will say so
        missing = missing or others
        speaker = min(rank for rank in range(self._size) if rank not in missing)
        if self._rank != speaker and seconds < 3 * _LISTEN:
            return  # one voice is enough
        where = []
        for rank in missing:
            if rank not in after:
                where.append(f"rank {rank} has not been heard at all")
            else:
                _, _, host, place = after[rank]
                where.append(f"rank {rank} ({host}) {'is silent; it was last' if rank in silent else 'is'} at {place}")
        self._end(f"{'; '.join(where)}. Rank {self._rank} has waited for {self._timeout:g} s at {self._place}")

    def _end(self, text: str) -> None:
        message = (
            f"error: the processes do not come together: {text} (train.timeout_minutes). Look at that machine; the "
            "same command goes on from the last checkpoint"
        )
        print_lines(message, file=sys.stderr)
        note_for_torchrun(message)
        os._exit(_HANG_EXIT_CODE)  # the main thread hangs in a collective and cannot be told
