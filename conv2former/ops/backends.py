"""Which backend runs where: the only place that asks for processors, Triton and programs that are exported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .branch import Backend, BranchCall
from .cpu import native, native_branch, onednn, operator_branch
from .operators import MAX_KERNEL_SIZE

__all__ = [
    "MIN_TRITON",
    "assume_device",
    "choose_backend",
    "compute_dtype",
    "is_exporting",
    "prepare",
    "supports_operators",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the Triton kernels
CAPABILITY = (8, 0)  # Ampere: the first with bfloat16
MIN_TRITON = "3.3"  # the oldest that was seen to compile the kernels

_devices: dict[int, bool] = {}


def choose_backend(call: BranchCall, x: Tensor, learns: bool) -> Backend:
    """Returns the backend that computes a residual branch of x (N, C, H, W) fastest.

    Args:
        call: the branch.
        x: its map, on a CPU or on a GPU for which `supports_operators` holds.
        learns: there will be a backward pass.
    """
    if not x.is_cpu:
        return _cuda_branch()
    return native_branch if native_branch.applies(call.spec, call.params, x, learns) else operator_branch


def prepare(calls: Sequence[BranchCall], x: Tensor) -> Sequence[BranchCall]:
    """Does what is better done for all branches of a stage together, before the first of them.

    Args:
        calls: the branches.
        x: the map of the first one.

    Returns:
        The calls, perhaps with prepared weights.
    """
    if x.is_cpu:
        return calls
    if type(x) is Tensor and x.is_cuda:  # what only stands for a map on a GPU runs no kernels
        from .cuda import ahead

        ahead.compile_ahead(calls, x, torch.is_grad_enabled())
    return _cuda_branch().prepare(calls)


def _cuda_branch() -> Any:
    from .cuda import branch  # Triton is optional, and takes a second to import

    return branch


def compute_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Returns the type to compute with where autocast, or the weights, say `dtype`: float32 where a CPU has no such.

    What is saved for the backward pass, and what is returned, is of `dtype` all the same.
    """
    return torch.float32 if x.is_cpu and not onednn.multiplies(dtype) else dtype


def supports_operators(
    x: Tensor, kernel_size: int, dilation: int = 1, compiles: bool = False, alone: bool = False
) -> bool:
    """Returns whether `operators.py` can take `x`, is faster than plain PyTorch, and is allowed to.

    It is not where a program is taken down to run elsewhere, without this package: torch.export, TorchScript, ONNX.
    On a CPU it is for torch.compile, and for branches that `autograd.py`, which is faster, does not compute.

    Args:
        x: a map (N, C, H, W); the other maps of the call must be like it.
        kernel_size: side of the depthwise kernel.
        dilation: its dilation; there are kernels for 1 only.
        compiles: torch.compile is at work and torch.export is not, which torch 2.6 cannot tell by itself.
        alone: `autograd.py` does not compute the branch.

    Returns:
        True for maps in channels_last memory and an odd kernel size of at most 31: float32, bfloat16 or float16 on an
        NVIDIA GPU of capability 8.0 or more, with Triton 3.3 or newer installed; while torch.compile is at work or
        if `alone`, float32, bfloat16 or float64 on a CPU with native functions.
    """
    if (not compiles and is_exporting()) or kernel_size % 2 == 0 or kernel_size > MAX_KERNEL_SIZE or dilation != 1:
        return False
    if x.is_cpu:
        runs = (alone or compiles or torch.compiler.is_compiling()) and _runs_native(x.dtype)
    else:
        runs = x.is_cuda and torch.version.hip is None and x.dtype in DTYPES and _runs_triton(x.device.index)
    return runs and x.is_contiguous(memory_format=torch.channels_last)


def is_exporting() -> bool:
    """Returns whether a program is taken down to run elsewhere."""
    # Torch 2.6 does not tell torch.export from torch.compile, which then does without the operators.
    tells = hasattr(torch.compiler, "is_exporting")
    exporting = torch.compiler.is_exporting() if tells else torch.compiler.is_compiling()
    return exporting or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


@torch.compiler.assume_constant_result
def _runs_native(dtype: torch.dtype) -> bool:
    return native.usable(dtype)


@torch.compiler.assume_constant_result
def _runs_triton(device: int) -> bool:
    """Returns whether a CUDA device runs the kernels. Asked at every call, found out once."""
    if device not in _devices:
        _devices[device] = torch.cuda.get_device_capability(device) >= CAPABILITY and _has_triton()
    return _devices[device]


@contextmanager
def assume_device(device: int) -> Iterator[bool]:
    """Takes a CUDA device, without asking it, for one that runs the kernels if Triton is installed; yields whether."""
    before = dict(_devices)
    _devices[device] = _has_triton()
    try:
        yield _devices[device]
    finally:
        _devices.clear()
        _devices.update(before)


def _has_triton() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return _release(triton.__version__) >= _release(MIN_TRITON)


def _release(version: str) -> tuple[int, ...]:
    """Reads the first two numbers of a version, also of `3.9.0+git1234`."""
    return tuple(int(part) for part in version.split(".")[:2])
