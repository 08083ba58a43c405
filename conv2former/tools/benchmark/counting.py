"""Counts the operators of a step, and estimates the kernels that they launch on a GPU: what can be told without one.

An operator that computes something launches one kernel; views, empty tensors and questions about shapes launch none.
The few that launch more are in `_MORE`. What is there was read from PyTorch's sources and held against one profile of
an NVIDIA H200: a training step of conv2former_t, batch 128, bf16, torch 2.11, project as of commit 5bcf946.

| | kernels and fills, profile | estimate |
|---|---|---|
| modules alone (`fused=False`) | 2,500 + 330 | 2,467 + 288 (3 % fewer together) |
| default | 3,471 together | 3,069 + 219 (5 % fewer) |

Attention is counted as the products and the softmax that it consists of, although a GPU may have one kernel for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ... import _private
from ...ops.cuda.launch import intercepting

__all__ = ["OperatorCount"]

# What a launch of many tensors at once holds, by the tensors that each of them comes with (gradient, average, ...)
TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
CHUNK = 65_536  # numbers of a tensor that one program takes
CHUNKS_PER_LAUNCH = 320
LONG_SUM = 1024  # numbers for each result from which on a sum's programs meet in memory, which is cleared before
SPLIT = 16  # a product over so many times more numbers than its result is long is cut: a fill, and a kernel that adds
NO_KERNEL = ("empty", "new_empty", "detach", "_unsafe_view", "as_strided", "set_", "lift_fresh")


class OperatorCount(_private.DispatchMode):
    """Counts operators, and of tensors that only stand for some on a GPU the kernels that they would launch.

    The operators of `torch.ops.conv2former` count with all that their implementation for a GPU does.

    Args:
        estimates: whether to estimate kernels; tensors have no memory then, and nothing is computed.

    Attributes:
        operators: how often each was called.
        kernels: how often each operator, or Triton kernel, launches one.
        fills: how often memory is cleared before a kernel.
    """

    allows_fused = True  # else the blocks would run module by module, see models/fusion.py

    def __init__(self, estimates: bool) -> None:
        super().__init__()
        self._estimates = estimates
        self.operators: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.fills = 0

    @contextmanager
    def running(self) -> Iterator[OperatorCount]:
        """Counts what runs inside."""
        if not self._estimates:
            with self:
                yield self
            return
        with intercepting(lambda kernel, args, options: self.kernels.update([kernel.fn.__name__])), self:
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and counts it."""
        kwargs = kwargs or {}
        space, _, name = func.name().partition(".")[0].partition("::")
        if space in ("prim", "profiler") or name == "promote_types":  # which are questions
            return func(*args, **kwargs)
        with self:  # what consists of others is taken apart, as it is without a mode
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        self.operators[name] += 1
        if not self._estimates:
            return func(*args, **kwargs)
        if space == "conv2former":
            from ...ops.cuda import mixing  # Triton is optional

            with self:
                return getattr(mixing, name)(*args)
        out = _laid_out(name, args, func(*args, **kwargs))
        kernels, fills = _estimate(func, name, args, out)
        if kernels:
            self.kernels[name] += kernels
        self.fills += fills
        return out


# ----------------------------------------------------------------------------------------------------------- estimates


def _estimate(func: Any, name: str, args: Sequence[Any], out: Any) -> tuple[int, int]:
    """Returns how many kernels an operator launches, and how often memory is filled for them."""
    if func.is_view or name.startswith(NO_KERNEL) or not any(t.is_cuda for t in _tensors((args, out))):
        return 0, 0
    if name.startswith(("_foreach_", "_fused_")):
        lists = [arg for arg in args if isinstance(arg, (list, tuple)) and _tensors(arg)]
        lists = lists[:-1] if name.startswith("_fused_") else lists  # of which the last are the numbers of steps
        return _launches_for_many([t.numel() for t in lists[0]], len(lists)), 0
    more = _MORE.get(name)
    return more(args, out) if more else (1, 0)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in _tensors(value)] if isinstance(values, (list, tuple)) else []


def _launches_for_many(sizes: Sequence[int], lists: int) -> int:
    """Returns the launches of an operator of lists of tensors: each takes so many tensors at most, and so many chunks.

    Args:
        sizes: numbers in each tensor of a list.
        lists: how many lists there are, of tensors of the same sizes.
    """
    most = TENSORS_PER_LAUNCH.get(lists, 30)
    launches, tensors, chunks = 0, 0, 0
    for size in sizes:
        tensors += 1
        left = math.ceil(size / CHUNK)
        while left:
            taken = min(left, CHUNKS_PER_LAUNCH - chunks)
            left, chunks = left - taken, chunks + taken
            if chunks == CHUNKS_PER_LAUNCH or (tensors == most and not left):
                launches, tensors, chunks = launches + 1, int(left > 0), 0
    return launches + (chunks > 0)


def _sum(args: Sequence[Any], out: Any) -> tuple[int, int]:
    return 1, int(args[0].numel() >= LONG_SUM * max(1, out.numel()))


def _pad(args: Sequence[Any], out: Any) -> tuple[int, int]:
    """A copy, after the whole has been filled with the value if there is anything around it."""
    return (2 if any(width > 0 for width in args[1]) else 1), 0


def _product(args: Sequence[Any], out: Any) -> tuple[int, int]:
    a, b = [arg for arg in args if isinstance(arg, Tensor)][-2:]
    is_split = _is_split(a.shape[-1], a.shape[-2], b.shape[-1])
    return 1 + is_split, int(is_split)


def _is_split(summed: int, rows: int, columns: int) -> bool:
    return summed >= SPLIT * max(rows, columns)


def _layer_norm_backward(args: Sequence[Any], out: Any) -> tuple[int, int]:
    """The gradient of x, those of weight and bias; the latter in parts that two sums add if rows are many and short."""
    channels = math.prod(args[2])
    parts = args[1].numel() // channels > 65_536 and channels // 32 < 66
    return 4 if parts else 2, 0


def _convolution(args: Sequence[Any], out: Any) -> tuple[int, int]:
    x, weight, bias = args[:3]
    return 1 + (bias is not None) + 2 * _is_padded(x, weight), 0


def _convolution_backward(args: Sequence[Any], out: Any) -> tuple[int, int]:
    """One kernel for each gradient, and what cuDNN does before and after."""
    grad, x, weight = args[:3]
    wants_x, wants_weight, wants_bias = args[-1]
    kernels, fills = int(wants_x), 0
    if wants_weight:
        summed, rows, columns = grad.numel() // grad.shape[1], weight.shape[0], weight[0].numel()
        is_depthwise = weight.shape[1] == 1 and weight.shape[0] > 1
        kernels += 1
        if is_depthwise:  # 5 and more: two maps and a weight are brought into another layout
            kernels += 3 * (weight.shape[-1] >= 5)
        elif _is_split(summed, rows, columns):
            kernels, fills = kernels + 1, fills + 1
    kernels += 4 * _is_padded(x, weight)
    if wants_bias:
        kernels, fills = kernels + 1, fills + int(grad.numel() >= LONG_SUM * grad.shape[1])
    return kernels, fills


def _is_padded(x: Tensor, weight: Tensor) -> bool:
    """Returns whether cuDNN adds channels of zeros for the tensor cores, which take eight of 16 bits at a time."""
    dense = weight.shape[1] > 1 or weight.shape[0] == 1
    return dense and x.element_size() == 2 and any(n % 8 for n in weight.shape[:2])


_MORE: dict[str, Callable[[Sequence[Any], Any], tuple[int, int]]] = {
    "sum": _sum,
    "mean": _sum,
    "constant_pad_nd": _pad,
    "mm": _product,
    "addmm": _product,
    "addmm_": _product,
    "native_layer_norm_backward": _layer_norm_backward,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_batch_norm": lambda args, out: (3, 0),  # statistics, their running means, the result
    "_native_batch_norm_legit": lambda args, out: (3, 0),
    "_native_batch_norm_legit_no_training": lambda args, out: (2, 0),
    "native_batch_norm_backward": lambda args, out: (2, 0),  # sums, then the gradients
}


# -------------------------------------------------------------------------------------------------------------- layout


def _laid_out(name: str, args: Sequence[Any], out: Any) -> Any:
    """Returns a convolution's results in the memory format that cuDNN gives them, which may be missing here."""
    if name not in ("convolution", "convolution_backward"):
        return out
    inputs = args[:2] if name == "convolution" else args[1:3]
    if not any(map(_is_channels_last, inputs)):
        return out
    if isinstance(out, Tensor):
        return out.contiguous(memory_format=torch.channels_last)
    return tuple(t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t for t in out)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
