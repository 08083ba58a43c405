"""Memory that the processes of one machine share: it is there once, has no name, and goes with the last of them."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

__all__ = ["SharedBytes"]


class SharedBytes:
    """Bytes that one process writes, one piece after the other, and that many read.

    They are a file in memory (Linux's memfd), which takes no room in /dev/shm and leaves nothing behind, however the
    processes end. Forked processes inherit it; processes that are started otherwise get it with what is pickled for
    them; others of the same user on the same machine open its `address`.

    Attributes:
        size: bytes that have been written.
    """

    def __init__(self, fd: int, size: int = 0) -> None:
        self._fd, self.size = fd, size
        self._mapped: mmap.mmap | None = None
        weakref.finalize(self, os.close, fd)

    @classmethod
    def create(cls) -> SharedBytes:
        """Makes an empty one.

        Raises:
            OSError: the system has none.
        """
        return cls(os.memfd_create("conv2former"))

    @classmethod
    def open(cls, address: str) -> SharedBytes:
        """Opens that of another process, which must not have ended.

        Raises:
            OSError: that process does not let this one do so.
        """
        fd = os.open(address, os.O_RDONLY | os.O_CLOEXEC)
        return cls(fd, os.fstat(fd).st_size)

    @property
    def address(self) -> str:
        """Where other processes of this machine open it, as long as this process is there."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def append(self, content: Any) -> None:
        """Writes what has a buffer of bytes behind the others; not after the first reading.

        Raises:
            OSError: there is no memory left.
        """
        rest = memoryview(content).cast("B")
        while rest:
            written = os.write(self._fd, rest)
            self.size += written
            rest = rest[written:]

    @property
    def content(self) -> mmap.mmap:
        """All bytes, to be read."""
        if self._mapped is None:
            self._mapped = mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
        return self._mapped

    def array(self, dtype: DTypeLike, count: int, start: int) -> np.ndarray:
        """Returns `count` values from byte `start` on, not copied, not to be written to."""
        return np.frombuffer(self.content, dtype, count, start)

    def __reduce__(self) -> tuple[Callable[..., SharedBytes], tuple[Any, int]]:
        return _received, (DupFd(self._fd), self.size)


def _received(sent: Any, size: int) -> SharedBytes:
    return SharedBytes(sent.detach(), size)
