"""The block's heavy parts as native functions for a CPU: `kernels.cpp`, compiled where it runs.

Where `compiling.py` cannot compile it, `usable` returns False, and PyTorch's own operators do the work, in more time.

All maps here are (N, H, W, C) and contiguous. Weights are (C, 1, k, k), biases (C,).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import compiling

__all__ = [
    "add_scaled",
    "conv_weight_grad",
    "gelu_affine",
    "gelu_norm",
    "gelu_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "mlp_mix",
    "mlp_mix_backward",
    "modulate",
    "modulate_backward",
    "supports_conv_weight_grad",
    "supports_gelu_affine",
    "supports_layer_norm",
    "usable",
]

SOURCE = Path(__file__).with_name("kernels.cpp")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}
# Types of the maps between blocks and of those in a block, which autocast makes smaller.
PAIRS = {
    (torch.float32, torch.float32): "float32_float32",
    (torch.float32, torch.bfloat16): "float32_bfloat16",
    (torch.float64, torch.float64): "float64_float64",
}
MOST_WEIGHTS = 2**16  # whose sums a second-level cache holds, in `conv_weight_grad`
STRIPS = 4  # of an image, that threads can share in it
_functions: dict[str, Any] = {}  # that were called before
watchers: list[Callable[[tuple], None]] = []  # called with the arguments of every call, by who counts memory traffic


def usable(dtype: torch.dtype) -> bool:
    """Returns whether the functions are there, for maps of that type on a CPU. The first call may compile them."""
    return dtype in DTYPES and compiling.library(SOURCE) is not None


def supports_layer_norm(x: Tensor, weight_dtype: torch.dtype, inner: torch.dtype) -> bool:
    """Returns whether `layer_norm`, `layer_norm_backward` and `add_scaled` are there.

    Args:
        x: a map (N, H, W, C) between branches.
        weight_dtype: of the norm's parameters.
        inner: the type of the maps inside of a branch.
    """
    same = x.dtype == weight_dtype and (x.dtype, inner) in PAIRS
    return same and x.is_cpu and x.shape[-1] >= _lanes(x.dtype) and x.is_contiguous() and usable(inner)


def _lanes(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float64 else 16  # of the widest vectors


def supports_gelu_affine(channels: int, dtype: torch.dtype) -> bool:
    """Returns whether `gelu_affine` and `gelu_norm` are there, for maps of so many channels and that type."""
    return channels >= _lanes(dtype) and usable(dtype)


def supports_conv_weight_grad(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Returns whether `conv_weight_grad` is there and faster than oneDNN, for a dense convolution in its weight's type.

    That is so with AVX2; for AVX-512 oneDNN has one that is fast, too.
    """
    outs, _, *kernel = weight.shape
    square = len({*kernel}) == len({*stride}) == len({*padding}) == 1 and tuple(dilation) == (1, 1)
    fits = square and weight.dtype == torch.float32 and outs >= _lanes(weight.dtype)
    small = weight.numel() <= MOST_WEIGHTS
    return fits and small and torch.backends.cpu.get_cpu_capability() == "AVX2" and usable(weight.dtype)


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Calls a function of `kernels.cpp`."""
    function = _functions.get(name) or _function(name, arguments)
    for watch in watchers:
        watch(arguments)
    function(*map(_pass, arguments))


def _function(name: str, arguments: tuple) -> Any:
    """Returns a function, which is found faster the next time. Arguments are of the same types in every call."""
    library = compiling.library(SOURCE)
    assert library is not None  # or `usable` would have said so
    function, types = getattr(library, name), {int: ctypes.c_int64, float: ctypes.c_double}
    function.restype, function.argtypes = None, [types.get(type(a), ctypes.c_void_p) for a in arguments]
    _functions[name] = function
    return function


def _pass(argument: Tensor | int | float | None) -> int | float | None:
    if not isinstance(argument, Tensor):
        return argument
    if not argument.is_contiguous():
        raise ValueError(f"the maps of a native function must be contiguous, not of strides {argument.stride()}")
    return argument.data_ptr()


def _wide(parameter: Tensor, x: Tensor) -> Tensor:
    """Returns a parameter in the type that maps like `x` are computed with."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return parameter if parameter.dtype is dtype and parameter.is_contiguous() else parameter.to(dtype).contiguous()


def _wide_or_none(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else _wide(parameter, x)


def modulate(
    a: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    context: Tensor | None = None,
    out: Tensor | None = None,
    biases: Sequence[Tensor] = (),
) -> Tensor:
    """``conv_dw(gelu(a)) * v``, for any odd k.

    Args:
        a, v: maps (N, H, W, C).
        weight: of the depthwise convolution, (C, 1, k, k).
        bias: (C,).
        context: a map for the convolution's result, which the backward pass needs.
        out: a map for the result; it may be `v`.
        biases: are added to a and v before, (C,) each; or none.

    Returns:
        The result, (N, H, W, C).
    """
    out = torch.empty_like(a) if out is None else out
    k, threads = weight.shape[-1], torch.get_num_threads()
    name = f"modulate_{DTYPES[a.dtype]}"
    a_bias, v_bias = (_wide_or_none(b, a) for b in biases or (None, None))
    _call(name, *a.shape, k, threads, a, v, a_bias, v_bias, _wide(weight, a), _wide(bias, a), context, out)
    return out


def modulate_backward(
    dout: Tensor, a: Tensor, v: Tensor, context: Tensor, weight: Tensor, biases: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients of `modulate`. That of `a` takes the place of `dout`.

    Args:
        dout: gradient of the result, (N, H, W, C); it is overwritten.
        a, v, context: maps as in `modulate`.
        weight, biases: as in `modulate`.

    Returns:
        The result of `modulate`, the gradients of a and v, that of the weight (C, 1, k, k), and the sums over all
        pixels of the gradients of the context (which is that of the bias), a and v, each (C,). Sums and the weight's
        gradient are in float32 at least.
    """
    (n, _, _, c), k, wide = a.shape, weight.shape[-1], _wide(weight, a)
    dv, out = torch.empty_like(a), torch.empty_like(a)
    dweight, sums = wide.new_empty(n, c, 1, k, k), wide.new_empty(n, 3, c)
    name, threads = f"modulate_backward_{DTYPES[a.dtype]}", torch.get_num_threads()
    a_bias, v_bias = (_wide_or_none(b, a) for b in biases or (None, None))
    _call(name, *a.shape, k, threads, dout, a, v, a_bias, v_bias, context, wide, dout, dv, out, dweight, sums)
    return out, dout, dv, dweight.sum(0), list(sums.sum(0))


def mlp_mix(u: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None, u_bias: Tensor | None = None) -> Tensor:
    """``g + gelu(conv_dw(g))`` with ``g = gelu(u)``.

    Args:
        u: a map (N, H, W, C).
        weight: of the depthwise convolution, (C, 1, 3, 3).
        bias: (C,).
        out: a map for the result; it may be `u`.
        u_bias: is added to u before, (C,).

    Returns:
        The result, (N, H, W, C).
    """
    out = torch.empty_like(u) if out is None else out
    name, threads = f"mix_{DTYPES[u.dtype]}", torch.get_num_threads()
    _call(name, *u.shape, threads, u, _wide_or_none(u_bias, u), _wide(weight, u), _wide(bias, u), out)
    return out


def mlp_mix_backward(
    dout: Tensor, u: Tensor, weight: Tensor, bias: Tensor, u_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients of `mlp_mix`. That of `u` takes the place of `dout`.

    Args:
        dout: gradient of the result, (N, H, W, C); it is overwritten.
        u, weight, bias, u_bias: as in `mlp_mix`.

    Returns:
        The result of `mlp_mix`, the gradient of u, that of the weight (C, 1, 3, 3), and the sums over all pixels of the
        gradients of the convolution's result (which is that of the bias) and of u, each (C,). Sums and the weight's
        gradient are in float32 at least.
    """
    n, _, _, c = u.shape
    out, wide = torch.empty_like(u), _wide(weight, u)
    dweight, sums = wide.new_empty(n, c, 1, 3, 3), wide.new_empty(n, 2, c)
    name, threads = f"mix_backward_{DTYPES[u.dtype]}", torch.get_num_threads()
    _call(name, *u.shape, threads, dout, u, _wide_or_none(u_bias, u), wide, _wide(bias, u), dout, out, dweight, sums)
    return out, dout, dweight.sum(0), list(sums.sum(0))


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    stats: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Layer norm over the channels. `supports_layer_norm` must hold.

    Args:
        x: a map (N, H, W, C).
        weight, bias: (C,), in x's type.
        eps: added to the variance.
        dtype: of the result.
        stats: return the second and third, too, and not None.
        out: a map for the result.

    Returns:
        The result, (N, H, W, C), and each pixel's mean and reciprocal deviation, (N, H, W, 1) in x's type.
    """
    out = torch.empty_like(x, dtype=dtype) if out is None else out
    mean, rstd = (x.new_empty(*x.shape[:-1], 1) if stats else None for _ in range(2))
    name, pixels = f"norm_{PAIRS[x.dtype, dtype]}", x.shape[:-1].numel()
    _call(name, pixels, x.shape[-1], torch.get_num_threads(), x, weight, bias, float(eps), out, mean, rstd)
    return out, mean, rstd


def layer_norm_backward(
    dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor, dx: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `layer_norm`.

    Args:
        dout: gradient of the result, (N, H, W, C).
        x, mean, rstd, weight: as in `layer_norm`.
        residual: what is added to the gradient of x, a map like x.
        dx: the map for their sum.

    Returns:
        The gradients of weight and bias, (C,).
    """
    n, h, w, c = x.shape
    sums = x.new_empty(n * h, 2, c)
    name, threads = f"norm_backward_{PAIRS[x.dtype, dout.dtype]}", torch.get_num_threads()
    _call(name, n * h, w, c, threads, dout, x, weight, mean, rstd, residual, dx, sums)
    dweight, dbias = sums.sum(0)
    return dweight, dbias


def add_scaled(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    bias: Tensor | None = None,
    normed: tuple[Tensor, Tensor, float, Tensor] | None = None,
) -> None:
    """Writes ``x + (y + bias) * scale * mask`` to `out`, and perhaps the layer norm of that.

    `supports_layer_norm` must hold.

    Args:
        x: a map (N, H, W, C).
        y: another, perhaps of a smaller type.
        scale: (C,) in x's type, or None for 1.
        mask: one number for each image, in x's type, or None for 1.
        out: the map for the result, of x's type; it may be `x`.
        bias: (C,) in x's type, or None for 0.
        normed: weight, bias and eps of the norm, as in `layer_norm`, and the map for its result, of y's type; it may be
            `y`.
    """
    n, h, w, c = x.shape
    name = f"add_scaled_{PAIRS[x.dtype, y.dtype]}"
    norm_w, norm_b, eps, result = normed or (None, None, 0.0, None)
    threads = torch.get_num_threads()
    _call(name, n, h * w, c, threads, x, y, bias, scale, mask, out, norm_w, norm_b, float(eps), result)


def gelu_affine(x: Tensor, scale: Tensor, shift: Tensor, overwrite: bool = False) -> Tensor:
    """``gelu(x) * scale + shift``, GELU and a norm whose statistics are fixed. `supports_gelu_affine` must hold.

    Args:
        x: a map (N, H, W, C).
        scale, shift: (C,), in the type of x or float32.
        overwrite: let the result take the place of x, if it can.

    Returns:
        The result, (N, H, W, C) in x's type.
    """
    pixels, c = x.shape[:-1].numel(), x.shape[-1]
    together = math.lcm(c, _lanes(x.dtype)) // c  # pixels whose channels fill vectors
    if pixels % together == 0:
        pixels, c, scale, shift = pixels // together, c * together, scale.repeat(together), shift.repeat(together)
    # not with parts of vectors, of which some values are read once more after the result is written
    out = x if overwrite and c % _lanes(x.dtype) == 0 else torch.empty_like(x)
    _call(
        f"gelu_affine_{DTYPES[x.dtype]}", pixels, c, torch.get_num_threads(), x, _wide(scale, x), _wide(shift, x), out
    )
    return out


def gelu_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``norm(gelu(x))`` with the batch's own statistics. `supports_gelu_affine` must hold.

    Args:
        x: a map (N, H, W, C).
        weight, bias: (C,), float64 for a map of float64 and else float32.
        eps: added to the variance.

    Returns:
        The result, (N, H, W, C) in x's type, and the batch's mean and variance (the sum of squares over the number of
        pixels), (C,).
    """
    n, h, w, c = x.shape
    sums = weight.new_empty(n * h, 2, c)
    _call(f"gelu_moments_{DTYPES[x.dtype]}", n * h, w, c, torch.get_num_threads(), x, sums)
    means, squares = sums[:, 0] / w, sums[:, 1]
    mean = means.mean(0)
    var = (squares.sum(0) + w * (means - mean).square().sum(0)) / (n * h * w)
    scale = weight * (var + eps).rsqrt()
    return gelu_affine(x, scale, bias - mean * scale), mean, var


def gelu_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `gelu_norm`.

    Args:
        dout: gradient of the result, (N, H, W, C) in x's type.
        x, weight: as in `gelu_norm`.
        mean, rstd: the batch's mean and reciprocal deviation, (C,).

    Returns:
        The gradients of x, weight and bias.
    """
    n, h, w, c = x.shape
    sums, threads = weight.new_empty(n * h, 2, c), torch.get_num_threads()
    _call(f"gelu_products_{DTYPES[x.dtype]}", n * h, w, c, threads, dout, x, sums)
    dbias, products = sums.sum(0)
    dweight = (products - mean * dbias) * rstd
    # dx = scale * (dout - mean(dout) - normed * mean(dout * normed)) * gelu'(x), with normed = (gelu(x) - mean) * rstd
    scale, pixels = weight * rstd, n * h * w
    by_gelu = -scale * rstd * dweight / pixels
    shift = -scale * dbias / pixels - mean * by_gelu
    dx = torch.empty_like(x)
    _call(f"gelu_affine_backward_{DTYPES[x.dtype]}", pixels, c, threads, dout, x, scale, by_gelu, shift, dx)
    return dx, dweight, dbias


def conv_weight_grad(dout: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """The gradient of a dense convolution's weight, for square kernels without dilation.

    Args:
        dout: gradient of the result, (N, H', W', D), float32; D is a vector's length at least.
        x: the map that was convolved, (N, H, W, C), float32.
        kernel_size, stride, padding: of the convolution, k, and the others as many for rows as for columns.

    Returns:
        (D, C, k, k).
    """
    (n, h, w, c), (_, out_h, out_w, outs) = x.shape, dout.shape
    sums = x.new_empty(n * STRIPS, kernel_size, kernel_size, c, outs)
    sizes = n, h, w, c, out_h, out_w, outs, kernel_size, stride, padding, STRIPS, torch.get_num_threads()
    _call("conv_weight_grad_float32", *sizes, x, dout, sums)
    return sums.sum(0).permute(3, 2, 0, 1)
