"""What the operators of `torch.ops.conv2former` do on a CPU: native functions, or the formulas where there are none.

Arguments and results are those of `ops/operators.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensors import nchw, nhwc
from . import native

__all__ = [
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "mlp_mix",
    "mlp_mix_backward",
    "modulate",
    "modulate_backward",
]

aten = torch.ops.aten


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _channels_last(_conv_dw(x, weight, bias))


def depthwise_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _conv_dw_backward(grad, x, weight, bias)
    return _channels_last(dx), dweight, dbias


def modulate(a: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
    if native.usable(a.dtype):
        return nchw(native.modulate(_pixels(a), _pixels(v), weight, bias))
    return _channels_last(_conv_dw(F.gelu(a), weight, bias) * v)


def modulate_backward(
    dm: Tensor, a: Tensor, weight: Tensor, bias: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if native.usable(a.dtype):
        a, v, dm = _pixels(a), _pixels(v), _pixels(dm).clone()
        context = torch.empty_like(a)
        native.modulate(a, v, weight, bias, context)
        _, da, dv, dweight, (dbias, *_) = native.modulate_backward(dm, a, v, context, weight)
        return nchw(da), dweight.to(weight.dtype), dbias.to(bias.dtype), nchw(dv)
    g = F.gelu(a)
    dg, dweight, dbias = _conv_dw_backward(dm * v, g, weight, bias)
    dv = _conv_dw(g, weight, bias) * dm
    return _channels_last(aten.gelu_backward(dg, a)), dweight, dbias, _channels_last(dv)


def mlp_mix(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if native.usable(f.dtype):
        return nchw(native.mlp_mix(_pixels(f), weight, bias))
    h = F.gelu(f)
    return _channels_last(h + F.gelu(_conv_dw(h, weight, bias)))


def mlp_mix_backward(ds: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if native.usable(f.dtype):
        _, df, dweight, (dbias, *_) = native.mlp_mix_backward(_pixels(ds).clone(), _pixels(f), weight, bias)
        return nchw(df), dweight.to(weight.dtype), dbias.to(bias.dtype)
    h = F.gelu(f)
    dz = aten.gelu_backward(ds, _conv_dw(h, weight, bias))
    dh, dweight, dbias = _conv_dw_backward(dz, h, weight, bias)
    return _channels_last(aten.gelu_backward(ds + dh, f)), dweight, dbias


def _conv_dw(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=weight.shape[-1] // 2, groups=x.shape[1])


def _conv_dw_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pad = weight.shape[-1] // 2
    dx, dweight, dbias = aten.convolution_backward(
        grad, x, weight.to(x.dtype), bias.shape, [1, 1], [pad, pad], [1, 1], False, [0, 0], x.shape[1], [True] * 3
    )
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pixels(x: Tensor) -> Tensor:
    """Returns (N, C, H, W) as the native functions have it, (N, H, W, C) and contiguous."""
    return nhwc(_channels_last(x))
