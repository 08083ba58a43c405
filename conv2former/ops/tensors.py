"""Types and memory layouts of tensors, as all backends need them.

Maps inside of `ops` are (N, H, W, C) unless their name says otherwise: channels lie last and close together, so that a
1x1 convolution is one matrix product over all pixels. Networks hand over (N, C, H, W) in channels_last memory, which
`nhwc` turns into that without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _private

__all__ = [
    "add_pixel_product",
    "as_type",
    "autocast_dtype",
    "cast",
    "is_batched",
    "is_ordinary",
    "is_transformed",
    "matmul",
    "matmul_sum",
    "matrix",
    "nchw",
    "nhwc",
    "rows",
    "wide_dtype",
    "without_autocast",
]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns autocast's type where `x` is, or None without autocast."""
    device = x.device.type
    if device == "meta":  # has no autocast, which torch 2.6 raises an error for
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Returns a context without autocast; an empty one, which is cheaper, where there is none anyway."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def is_ordinary(x: Any) -> bool:
    """Returns whether `x` is a tensor and no more, or stands for one on a GPU and may be taken for it.

    The latter is what counts launches where there is no GPU, see `_private.stands_for_gpu`.
    """
    return type(x) is Tensor or (not torch.compiler.is_compiling() and _private.stands_for_gpu(x))


def is_transformed(x: Tensor) -> bool:
    """Returns whether torch.func or forward-mode differentiation is at work, or `x` is more than a tensor."""
    return _private.is_transforming() or not is_ordinary(x)


def is_batched(gradient: Tensor) -> bool:
    """Returns whether a gradient stands for many, as in a vectorised Jacobian."""
    return is_transformed(gradient) or _private.is_legacy_batched(gradient)


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what `Tensor.to` does, in a tenth of the time if there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


def cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Returns tensors in a type."""
    return [as_type(tensor, dtype) for tensor in tensors]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the type of sums over all pixels, which would come to a standstill in 16 bits: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def nchw(x: Tensor) -> Tensor:
    """Returns a view (N, C, H, W) of (N, H, W, C)."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    """Returns a view (N, H, W, C) of (N, C, H, W)."""
    return x.permute(0, 2, 3, 1)


def rows(x: Tensor) -> Tensor:
    """Returns a view (N H W, C), a row for each pixel, of (N, H, W, C)."""
    return x.view(-1, x.shape[-1])


def matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a 1x1 convolution's weight (D, C, 1, 1) as a matrix (D, C) in a type."""
    return as_type(weight, dtype).flatten(1)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Returns ``x @ weight``, (N, H, W, C) by (C, D), in one call instead of the three that `@` makes of it."""
    return torch.mm(rows(x), weight).view(*x.shape[:-1], weight.shape[1])


def matmul_sum(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Returns the sum of ``x @ weight`` over pairs of a map (N, H, W, C) and a weight (C, D), of which there is one."""
    total = matmul(maps[0], weights[0])
    for x, weight in zip(maps[1:], weights[1:], strict=True):
        rows(total).addmm_(rows(x), weight)
    return total


def add_pixel_product(total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """Adds the sum over all pixels of the products of two maps' channels, which is the gradient of a 1x1 weight.

    Args:
        total: what there is so far, (C, D) of type `wide`, to be overwritten; None for nothing.
        a: (N, H, W, C).
        b: (N, H, W, D).
        wide: the type of the sum.
    """
    a, b = rows(a), rows(b)
    if a.dtype == torch.float16:  # whose range such sums exceed
        a, b = a.to(wide), b.to(wide)
    if total is not None and a.dtype == wide:
        return total.addmm_(a.t(), b)
    product = as_type(a.t() @ b, wide)
    return product if total is None else total.add_(product)
