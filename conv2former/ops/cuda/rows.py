"""Cuts the work of `row_kernels.py` into programs, and runs them. Maps are (N, H, W, C) and contiguous.

As in `mixing.py` the cuts are functions of the shapes alone, so that two runs on one GPU give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..branch import NormAhead
from . import row_kernels as kernels
from .launch import launch

__all__ = [
    "Partials",
    "SumBackward",
    "branch_grad",
    "layer_norm",
    "layer_norm_backward",
    "out_grads",
    "residual_norm",
    "residual_sum",
    "sum_partials",
]

PROGRAMS = 512  # where work can be cut at will: some for each of a hundred or so multiprocessors
TILE = 2048  # numbers of a map that a program has in its registers, 16 for each thread
LOOP_TILE = 1024  # where a thread keeps two or three sums for each of them besides


def _tile(channels: int, size: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    return {"C": channels, "BLOCK": block, "ROWS": max(1, size // block)}


def _chunks(pixels: int, rows: int) -> tuple[int, int]:
    """Returns how many pixels a program takes, a multiple of `rows`, and how many programs that makes."""
    chunk = rows * max(1, triton.cdiv(pixels, rows * PROGRAMS))
    return chunk, triton.cdiv(pixels, chunk)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, stats: bool
) -> tuple[Tensor, ...]:
    """Computes a layer norm over the channels.

    Args:
        x: (N, H, W, C).
        weight, bias: (C,).
        eps: added to the variance.
        dtype: of the result.
        stats: each pixel's mean and reciprocal deviation are wanted.

    Returns:
        The result, (N, H, W, C), and, if they are wanted, the statistics, (N, H, W) float32 each.
    """
    c = x.shape[-1]
    pixels, tile = x.numel() // c, _tile(c, TILE)
    h = x.new_empty(x.shape, dtype=dtype)
    found = tuple(x.new_empty(x.shape[:3], dtype=torch.float32) for _ in range(2)) if stats else ()
    launch(
        kernels.layer_norm_kernel, triton.cdiv(pixels, tile["ROWS"]), x, weight, bias, h, *(found or (h, h)), pixels,
        EPS=eps, SAVES=stats, **tile,
    )  # fmt: skip
    return h, *found


class SumBackward(NamedTuple):
    """What goes back through a residual sum ``x + mask * gamma * y``, and what is written there.

    Attributes:
        gamma, mask: as in `residual_sum`.
        weight: of the 1x1 convolution that y comes from, (C, D).
        dy: for the sum's gradient times the mask, (N, H, W, C); None if it is not wanted.
        scaled: for that times gamma, if it is wanted.
        scaled_weight: for ``gamma[:, None] * weight``, if it is wanted.
    """

    gamma: Tensor | None
    mask: Tensor | None
    weight: Tensor
    dy: Tensor | None
    scaled: Tensor | None
    scaled_weight: Tensor | None


def _sum_arguments(way: SumBackward | None, grad: Tensor) -> tuple[tuple[Tensor, ...], dict[str, bool | int]]:
    """Returns what kernels get of a way through a residual sum whose gradient is `grad`: tensors and constants."""
    gamma, mask, weight, dy, scaled, scaled_weight = way or (None,) * 6
    optional = (gamma, mask, weight, dy, scaled, scaled_weight)
    return tuple(grad if t is None else t for t in optional), {
        "HAS_MASK": mask is not None,
        "WRITES": dy is not None,
        "SCALES": scaled is not None,
        "SCALES_WEIGHT": scaled_weight is not None,
        "D": 0 if weight is None else weight.shape[1],
    }


def layer_norm_backward(
    grad: Tensor, x: Tensor, stats: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor, residual: Tensor | None,
    h: Tensor | None, other: Tensor | None, way: SumBackward | None = None,
) -> tuple[Tensor, Partials, Tensor | None]:  # fmt: skip
    """Computes the gradients of `layer_norm`.

    Args:
        grad: of the result, (N, H, W, C).
        x, stats, weight, bias: as in `layer_norm`.
        residual: what is added to the gradient of x, or None.
        h: for the norm's result, computed again; None if it is not wanted.
        other: another map, (N, H, W, a multiple of C), contiguous, that is to be summed over the pixels; or None.
        way: through the residual sum that x is the result of, to be gone while the gradient of x is at hand; or None.

    Returns:
        The gradient of x, in its type; those of weight and bias as partial sums, in further rows `other`'s sums; and
        what `branch_grad` returns for the gradient of x, if there is a way.
    """
    n, height, width, c = x.shape
    pixels, tile = n * height * width, _tile(c, LOOP_TILE)
    chunk, programs = _chunks(pixels, tile["ROWS"])
    rests = 0 if other is None else other.shape[-1] // c
    dx, partial = x.new_empty(x.shape), weight.new_empty((programs, 2 + rests, 1, c), dtype=torch.float32)
    sum_partial = None if way is None else weight.new_empty((programs, c), dtype=torch.float32)
    tensors, constants = _sum_arguments(way, dx)
    launch(
        kernels.layer_norm_backward_kernel, programs,
        grad, x, *stats, weight, bias, x if residual is None else residual, x if other is None else other,
        dx, dx if h is None else h, partial, *tensors, partial if sum_partial is None else sum_partial,
        pixels, height * width, chunk,
        HAS_RESIDUAL=residual is not None, WRITES_H=h is not None, RESTS=rests, HAS_SUM=way is not None,
        **constants, **tile,
    )  # fmt: skip
    return dx, Partials(partial, weight, bias), sum_partial


def residual_sum(x: Tensor, y: Tensor, gamma: Tensor | None, mask: Tensor | None, out: Tensor) -> None:
    """Writes ``x + y * gamma * mask`` to `out`.

    Args:
        x, y, out: (N, H, W, C).
        gamma: (C,), or None.
        mask: a factor of each image, (N, 1, 1, 1), or None.
    """
    n, h, w, c = x.shape
    pixels, tile = n * h * w, _tile(c, TILE)
    launch(
        kernels.residual_kernel, triton.cdiv(pixels, tile["ROWS"]),
        x, y, x if gamma is None else gamma, x if mask is None else mask, out, pixels, h * w,
        HAS_GAMMA=gamma is not None, HAS_MASK=mask is not None, **tile,
    )  # fmt: skip


def residual_norm(
    x: Tensor, y: Tensor, gamma: Tensor | None, mask: Tensor | None, out: Tensor, norm: NormAhead
) -> tuple[Tensor, ...]:
    """As `residual_sum`, and computes the next branch's layer norm of `out` while it is at hand.

    Returns:
        What `layer_norm` returns for `out`, the same bits.
    """
    n, h, w, c = x.shape
    pixels, tile = n * h * w, _tile(c, TILE)
    normed = out.new_empty(out.shape, dtype=norm.dtype)
    found = tuple(out.new_empty(out.shape[:3], dtype=torch.float32) for _ in range(2)) if norm.stats else ()
    launch(
        kernels.residual_norm_kernel, triton.cdiv(pixels, tile["ROWS"]),
        x, y, x if gamma is None else gamma, x if mask is None else mask, out,
        norm.weight, norm.bias, normed, *(found or (normed, normed)), pixels, h * w,
        EPS=norm.eps, SAVES=norm.stats, HAS_GAMMA=gamma is not None, HAS_MASK=mask is not None, **tile,
    )  # fmt: skip
    return normed, *found


def branch_grad(grad: Tensor, way: SumBackward) -> Tensor:
    """Goes back through a residual sum.

    Args:
        grad: of the sum, (N, H, W, C).
        way: what is needed, and what is written.

    Returns:
        The sum of ``grad * mask`` over all pixels, as partial sums (parts, C) in float32.
    """
    n, h, w, c = grad.shape
    pixels, tile = n * h * w, _tile(c, TILE)
    chunk, programs = _chunks(pixels, tile["ROWS"])
    partial = grad.new_empty((programs, c), dtype=torch.float32)
    tensors, constants = _sum_arguments(way, grad)
    launch(kernels.branch_grad_kernel, programs, grad, *tensors, partial, pixels, h * w, chunk, **constants, **tile)
    return partial


def out_grads(
    product: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, partial: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients of a branch's last 1x1 convolution and of its layer scale, in their types.

    Args:
        product: the gradient of gamma times the weight, (C, D).
        weight: (C, D, 1, 1).
        bias, gamma: (C,); gamma may be None.
        partial: from `branch_grad`.
    """
    c, d = product.shape
    weight_grad, bias_grad = weight.new_empty(weight.shape), bias.new_empty(c)
    gamma_grad = None if gamma is None else gamma.new_empty(c)
    launch(
        kernels.out_grads_kernel, c,
        product, weight, bias, bias if gamma is None else gamma, partial,
        weight_grad, bias_grad, bias_grad if gamma_grad is None else gamma_grad, len(partial),
        HAS_GAMMA=gamma is not None, C=c, D=d, BLOCK=min(1024, triton.next_power_of_2(d)),
    )  # fmt: skip
    return weight_grad, bias_grad, gamma_grad


class Partials(NamedTuple):
    """The gradients of a weight and a bias as partial sums.

    Attributes:
        sums: (parts, rows, strips, C) float32: the weight's taps, the bias's, and in further rows what else is summed.
        weight: what the gradient of shape (C, 1, k, k), or (C,), is of; k k are the taps.
        bias: (C,).
    """

    sums: Tensor
    weight: Tensor
    bias: Tensor

    def rests(self) -> int:
        """Returns how many further rows there are."""
        return self.sums.shape[1] - 1 - self.weight.numel() // len(self.bias)

    def results(self) -> list[Tensor]:
        """Returns tensors for the gradients, and one (rows, C) float32 for further rows if there are any."""
        grads = [self.weight.new_empty(self.weight.shape), self.bias.new_empty(self.bias.shape)]
        return grads + [self.sums.new_empty((self.rests(), len(self.bias)))] * (self.rests() > 0)


def sum_partials(partials: Partials, norm: Partials | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Adds partial sums, with one launch.

    The results are tensors of their own: an operator may not return two views of one.

    Args:
        partials: of a convolution or a norm.
        norm: of a norm besides, from `layer_norm_backward`.

    Returns:
        Of both the gradients of weight and bias, in their shapes and types, contiguous, and the sums of further rows,
        (rows, C) float32, where there are such. The second list means nothing without a norm.
    """
    parts, rows, strips, c = partials.sums.shape
    results, programs = partials.results(), triton.cdiv(rows * c, 32)
    others, more, other = results, 0, partials
    if norm is not None:
        other, others, more = norm, norm.results(), triton.cdiv(norm.sums.shape[1] * len(norm.bias), 32)
    launch(
        kernels.sum_partials_kernel, programs + more,
        partials.sums, *results[:2], results[-1], parts, strips, programs,
        other.sums, *others[:2], others[-1], len(other.sums),
        C=c, TAPS=rows - 1 - partials.rests(), RESTS=partials.rests(),
        OTHER_C=len(other.bias), OTHER_RESTS=other.rests(), BLOCK=32, PARTS=32,
    )  # fmt: skip
    return results, others
