"""How the Triton kernels are started, and how they see maps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["intercepting", "launch", "pitch_of", "with_pitch"]

Interceptor = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]


class _Thread(threading.local):
    interceptor: Interceptor | None = None  # of one thread: others may be running kernels


_thread = _Thread()


@contextmanager
def intercepting(call: Interceptor) -> Iterator[None]:
    """Calls something with a kernel, its arguments and options where this thread would run one; it does not then."""
    before, _thread.interceptor = _thread.interceptor, call
    try:
        yield
    finally:
        _thread.interceptor = before


def launch(kernel: Any, programs: int, *args: Any, warps: int = 4, **constants: Any) -> None:
    """Runs a kernel on the device of its first argument. Every kernel of this package is started here."""
    # The kernels write a * b + c where they mean one instruction, which Triton's default may or may not allow.
    options = constants | {"num_warps": warps, "enable_fp_fusion": True}
    if _thread.interceptor is not None:
        _thread.interceptor(kernel, args, options)
        return
    device = args[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[(programs,)](*args, **options)


def pitch_of(x: Tensor) -> int | None:
    """Returns how many numbers lie from a pixel of a map (N, C, H, W) to the next; None if kernels cannot take it.

    In channels_last memory that is C. Half of the channels of such a map have the pitch of the whole.
    """
    _, c, h, w = x.shape
    pitch = x.stride(3)
    return pitch if pitch >= c and x.stride() == (h * w * pitch, 1, w * pitch, pitch) else None


def with_pitch(x: Tensor) -> tuple[Tensor, int]:
    """Returns a map (N, C, H, W) as kernels read it, which is a copy if it has no pitch, and its pitch."""
    pitch = pitch_of(x)
    return (x.contiguous(memory_format=torch.channels_last), x.shape[1]) if pitch is None else (x, pitch)
