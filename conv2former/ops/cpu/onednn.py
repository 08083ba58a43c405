"""PyTorch's operators in the form in which oneDNN, on a CPU, does them fast, on maps of shape (N, H, W, C).

Channels lie last and close together, so that a 1x1 convolution is one matrix product over all pixels. The depthwise
convolutions are oneDNN's. Two things that it does slowly are done differently here, with the same result:

- the gradient of a depthwise weight, unless the kernel is at most 3 columns wide (`conv_dw_weight_grad`);
- the gradient of a depthwise input, which is a forward convolution with the kernel turned round.

Where it can, oneDNN adds a bias, an activation or a sum while it writes a result, which saves passes over memory.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _private
from ..functional import conv_dw
from ..tensors import nchw, nhwc

__all__ = [
    "add_conv_dw_input_grad",
    "conv_dw_gelu",
    "conv_dw_weight_grad",
    "linear",
    "linear_gelu",
    "multiplies",
]

aten = torch.ops.aten
FAST_COLUMNS = 3  # of a kernel, in oneDNN's fast gradient of a depthwise weight; its rows may be many


def _can_fuse(x: Tensor) -> bool:
    """Returns whether oneDNN can append an activation or a sum to an operation on `x`."""
    return (
        x.dtype in (torch.float32, torch.bfloat16) and bool(torch.backends.mkldnn.enabled) and _has_pointwise(x.dtype)
    )


def multiplies(dtype: torch.dtype) -> bool:
    """Returns whether the CPU has matrix products and convolutions of that type.

    PyTorch computes them anyway. For 16 bits it then takes about ten times as long as for float32.
    """
    return dtype.itemsize > 2 or (bool(torch.backends.mkldnn.enabled) and _has_products(dtype))


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    return _private.multiplies(dtype)


@functools.cache
def _has_pointwise(dtype: torch.dtype) -> bool:
    # They are not public, so they may be gone or be others one day.
    if not _private.has_pointwise():
        return False
    x, w, b = (torch.zeros(shape, dtype=dtype, device="cpu") for shape in ((1, 1, 1, 1), (1, 1, 1, 1), (1,)))
    try:
        _private.linear_pointwise(x, w[0, 0], b, "none", [], "none")
        _private.convolution_pointwise(*_conv_args(x, w, b), "gelu", [], "none")
        _private.convolution_pointwise_(x, *_conv_args(x, w, b), "add", None, None, [], None)
    except (RuntimeError, TypeError):
        return False
    return True


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear`, (..., C) to (..., D)."""
    return _private.linear_pointwise(x, weight, bias, "none", [], "none") if _can_fuse(x) else F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gelu(linear(x))``, (..., C) to (..., D)."""
    if _can_fuse(x):
        return _private.linear_pointwise(x, weight, bias, "gelu", [], "none")
    return aten.gelu_(F.linear(x, weight, bias))


def conv_dw_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gelu(conv_dw(x))``, (N, H, W, C) to (N, H, W, C)."""
    if _can_fuse(x):
        return _contiguous_nhwc(_private.convolution_pointwise(*_conv_args(x, weight, bias), "gelu", [], "none"))
    return aten.gelu_(conv_dw(x, weight, bias))


def _conv_args(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
    pad = weight.shape[-1] // 2
    return nchw(x), weight, bias, [pad, pad], [1, 1], [1, 1], x.shape[-1]


def add_conv_dw_input_grad(total: Tensor | None, grad: Tensor, weight: Tensor) -> Tensor:
    """Adds the gradient of `conv_dw`'s input to `total`; both and `grad`, that of its output, are (N, H, W, C).

    Returns:
        The sum, in the memory of `total`, or the gradient alone if that is None.
    """
    turned = weight.flip(2, 3)
    if total is None:
        return conv_dw(grad, turned, None)
    if _can_fuse(grad):
        args = _conv_args(grad, turned, None)
        return _contiguous_nhwc(_private.convolution_pointwise_(nchw(total), *args, "add", None, None, [], None))
    return total.add_(conv_dw(grad, turned, None))


def conv_dw_weight_grad(grad: Tensor, x: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """The gradients of `conv_dw`'s weight and bias.

    oneDNN is fast for kernels of up to `FAST_COLUMNS` columns and of no more rows than the map has; beyond that
    it takes 3 to 12 times as long as this function. So the kernel is cut into strips of that many columns. The strip of
    the lags s - 1, s, s + 1 is the gradient of a three columns wide kernel for a map that lies s columns further. Both
    maps are copied into buffers whose rows end in kernel_size // 2 columns of zeros: moving on by s columns is then no
    more than starting s columns later in the same memory, since what enters a row from the next one is zero.

    Args:
        grad: gradient of the output, (N, H, W, C).
        x: the input, (N, H, W, C).
        kernel_size: k.

    Returns:
        (C, 1, k, k) and (C,), in x's type or float32.
    """
    n, h, w, c = x.shape
    pad = kernel_size // 2
    if kernel_size <= FAST_COLUMNS or x.dtype == torch.float64:  # oneDNN has no float64
        return _weight_grad(grad, x, kernel_size, kernel_size)
    rows = h if h >= kernel_size else h + pad
    cols = w + pad
    size = n * rows * cols * c
    # float32 also for bfloat16: faster, and the sum over all pixels is exact to more digits
    flat = x.new_zeros(size + kernel_size * c, dtype=torch.float32)
    flat[pad * c :][:size].view(n, rows, cols, c)[:, :h, 1 : w + 1] = x
    grads = x.new_zeros(n, rows, cols, c, dtype=torch.float32)
    grads[:, :h, 1 : w + 1] = grad
    strips = []
    for first in range(0, kernel_size, FAST_COLUMNS):
        lag = first + FAST_COLUMNS // 2 - pad
        moved = flat[(pad + lag) * c :][:size].view(n, rows, cols, c)
        strip, bias_grad = _weight_grad(grads, moved, kernel_size, FAST_COLUMNS)
        strips.append(strip)
    return torch.cat(strips, dim=3)[..., :kernel_size], bias_grad


def _contiguous_nhwc(x: Tensor) -> Tensor:
    return nhwc(x).contiguous()  # which it is, unless an operator chose another memory format


def _weight_grad(grad: Tensor, x: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    c = x.shape[-1]
    pad = [rows // 2, cols // 2]
    args = (nchw(grad), nchw(x), x.new_empty(c, 1, rows, cols), [c], [1, 1], pad, [1, 1], False, [0, 0], c)
    return aten.convolution_backward(*args, [False, True, True])[1:]
