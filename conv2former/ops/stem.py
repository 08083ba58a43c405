"""The stem's convolutions with the GELU and BatchNorm before them, in less time and memory than the modules take.

Maps are (N, C, H, W) in channels_last memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _private
from .cpu import native
from .tensors import is_batched, nchw, nhwc, without_autocast

__all__ = [
    "BatchNormState",
    "ConvGeometry",
    "cast_together",
    "conv2d",
    "gelu_affine_conv",
    "gelu_norm_conv",
    "layer_norm",
]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class ConvGeometry:
    """A dense convolution's stride, padding and dilation, each as (rows, columns)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BatchNormState:
    """What a BatchNorm has besides weight and bias: running statistics (C,), which a training step moves."""

    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float


def cast_together(dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
    """Returns weights in a type. On a GPU one kernel converts them, and one their gradients."""
    return _CastTogether.apply(dtype, *weights)


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = weights[0].dtype
        ctx.set_materialize_grads(False)
        return _copies(weights, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        if torch.is_grad_enabled() or any(map(is_batched, given)):  # of copies there is no derivative
            converted = iter([grad.to(ctx.dtype) for grad in given])
        else:
            converted = iter(_copies(given, ctx.dtype))
        return None, *(None if grad is None else next(converted) for grad in grads)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns copies of tensors in a type."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    _private.copy_all(copies, list(tensors))
    return tuple(copies)


def conv2d(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """Computes a convolution without bias in the type of x."""
    return F.conv2d(x, weight.to(x.dtype), None, geometry.stride, geometry.padding, geometry.dilation)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Computes a layer norm over the channels, (N, C, H, W), with a result of `dtype`.

    On a CPU the native function does, and there is no gradient; on a GPU Triton's kernels do, with one.
    """
    if not x.is_cpu:
        from .cuda import norm  # Triton is optional, and takes a second to import

        return norm.layer_norm(x, weight, bias, eps, dtype)
    h, *_ = native.layer_norm(nhwc(x), weight, bias, eps, dtype, stats=False)
    return nchw(h)


def gelu_affine_conv(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """``conv(gelu(x) * scale + shift)``, GELU and BatchNorm of an evaluation; x may be overwritten.

    `native.supports_gelu_affine` must hold.

    Args:
        x: (N, C, H, W).
        scale, shift: (C,).
        weight: (D, C, k, k).
        geometry: of the convolution.
    """
    y = native.gelu_affine(nhwc(x).contiguous(), scale, shift, overwrite=True)
    return conv2d(nchw(y), weight, geometry)


def gelu_norm_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv_weight: Tensor,
    state: BatchNormState,
    geometry: ConvGeometry,
    dtype: torch.dtype,
) -> Tensor:
    """``conv(norm(gelu(x)))`` with the batch's own statistics, of which only x is saved; it has all derivatives.

    Args:
        x: (N, C, H, W).
        norm_weight, norm_bias: (C,).
        conv_weight: (D, C, k, k).
        state: of the norm; its running statistics are moved.
        geometry: of the convolution.
        dtype: to compute in; the result has x's type.
    """
    return _GeluNormConv.apply(x, norm_weight, norm_bias, conv_weight, state, geometry, dtype)


class _GeluNormConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor, conv_w: Tensor, state: BatchNormState, geometry: Any, dtype: Any
    ) -> Tensor:
        saved, x = x, x.to(dtype)
        if _is_native(x, w):
            y, mean, var = native.gelu_norm(nhwc(x), w, b, state.eps)
            y, stats, pixels = nchw(y), (mean, (var + state.eps).rsqrt()), y.numel() // len(w)
            state.running_mean.lerp_(mean, state.momentum)
            state.running_var.lerp_(var * (pixels / (pixels - 1)), state.momentum)
        else:
            y, *stats = aten.native_batch_norm(
                F.gelu(x), w, b, state.running_mean, state.running_var, True, state.momentum, state.eps
            )
        ctx.save_for_backward(saved, w, b, conv_w, *stats)
        ctx.eps, ctx.geometry, ctx.dtype = state.eps, geometry, dtype
        return conv2d(y, conv_w, geometry).to(saved.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        with without_autocast(grad):
            make_grads = _grads_of_definition if torch.is_grad_enabled() else _grads
            return *make_grads(ctx, grad, *ctx.saved_tensors), None, None, None


def _grads_of_definition(
    ctx: Any, grad: Tensor, x: Tensor, w: Tensor, b: Tensor, conv_w: Tensor, *stats: Tensor
) -> tuple:
    """Returns the gradients of x, w, b and conv_w from autograd, where they will be differentiated again."""
    y = F.batch_norm(F.gelu(x.to(ctx.dtype)), None, None, w, b, training=True, eps=ctx.eps)
    y = conv2d(y, conv_w, ctx.geometry).to(x.dtype)
    needed = [t for t, needs in zip((x, w, b, conv_w), ctx.needs_input_grad, strict=False) if needs]
    grads = iter(torch.autograd.grad(y, needed, grad, create_graph=True))
    return tuple(next(grads) if needs else None for needs in ctx.needs_input_grad[:4])


def _grads(
    ctx: Any, grad: Tensor, saved: Tensor, w: Tensor, b: Tensor, conv_w: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, w, b and conv_w."""
    x = saved.to(ctx.dtype)
    scale = w * rstd
    shift = b - mean * scale
    is_native = _is_native(x, w)
    if is_native:
        y = nchw(native.gelu_affine(nhwc(x), scale, shift))
    else:
        z = F.gelu(x)
        y = torch.addcmul(_per_channel(shift), z, _per_channel(scale)).to(x.dtype)
    dy, dconv_w = _conv_grads(grad.to(x.dtype), y, conv_w.to(x.dtype), ctx.geometry, is_native)
    dconv_w = dconv_w.to(conv_w.dtype)
    if is_native:
        dx, dw, db = native.gelu_norm_backward(nhwc(dy).contiguous(), nhwc(x), w, mean, rstd)
        return nchw(dx).to(saved.dtype), dw, db, dconv_w
    dz, dw, db = aten.native_batch_norm_backward(dy, z, w, None, None, mean, rstd, True, ctx.eps, [True] * 3)
    return aten.gelu_backward(dz, x).to(saved.dtype), dw, db, dconv_w


def _conv_grads(
    grad: Tensor, y: Tensor, weight: Tensor, geometry: ConvGeometry, is_native: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of a convolution's input y and of its weight."""
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    own = is_native and native.supports_conv_weight_grad(weight, stride, padding, dilation)
    dy, dweight, _ = aten.convolution_backward(
        grad, y, weight, None, stride, padding, dilation, False, [0, 0], 1, [True, not own, False]
    )
    if own:
        side = weight.shape[-1]
        dweight = native.conv_weight_grad(nhwc(grad).contiguous(), nhwc(y), side, stride[0], padding[0])
    return dy, dweight


def _is_native(x: Tensor, weight: Tensor) -> bool:
    """Returns whether native functions take GELU and a batch norm of that weight, for x (N, C, H, W)."""
    wide = weight.dtype == torch.promote_types(x.dtype, torch.float32)
    fits = x.is_cpu and wide and x.is_contiguous(memory_format=torch.channels_last)
    return fits and native.supports_gelu_affine(x.shape[1], x.dtype)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
