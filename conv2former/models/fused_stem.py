"""The stem, the downsampling's norm and the other convolutions outside of the blocks, in less time and memory.

The modules' own formulas are in `backbone.py`. As in `fused.py`, the ways here compute the same, and are taken where
nobody can tell the difference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from . import compiled, kernels
from .fused_common import (
    autocast_dtype,
    computes_in,
    is_anyone_looking,
    is_plain,
    is_transformed,
    is_watched,
    nchw,
    nhwc,
    weight_dtype,
    without_autocast,
)

__all__ = ["channels_last", "convolve", "forward_norm", "forward_stem", "norm_applies", "stem_applies"]

aten = torch.ops.aten


def channels_last(x: Tensor) -> Tensor:
    """Returns images in the memory format that the fast ways are for, or as they are where there is none."""
    compiling = torch.compiler.is_compiling()
    if type(x) is not Tensor or x.dim() != 4 or kernels.is_exporting() or (not compiling and is_transformed(x)):
        return x
    y = x.contiguous(memory_format=torch.channels_last)
    return y if (x.is_cpu and not compiling) or kernels.usable(y, 3) else x


def stem_applies(stem: Any, x: Tensor) -> bool:
    """Says whether `forward_stem` computes for `x` what the stem's modules would, with nobody to notice the difference.

    There is a way for training, where less is kept, and one without gradients, which takes compiled functions.
    """
    trains = torch.is_grad_enabled()
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(x):
        return False
    if x.dim() != 4 or not (x.is_cpu or x.is_cuda) or is_anyone_looking():
        return False
    inner = computes_in(x, autocast_dtype(x) or x.dtype)
    if not trains and not (x.is_cpu and compiled.takes_gelu_affine(stem.conv1.out_channels, inner)):
        return False
    if x.numel() == 0 or min(x.shape[2:]) < 3:  # too few pixels for statistics, which BatchNorm itself has a word for
        return False
    dtype = weight_dtype(x)
    convs, norms, acts = (stem.conv1, stem.conv2, stem.conv3), (stem.norm1, stem.norm2), (stem.act1, stem.act2)
    return (
        all(type(layer) is nn.Conv2d and layer.bias is None and layer.weight.dtype == dtype for layer in convs)
        and all(layer.padding_mode == "zeros" and isinstance(layer.padding, tuple) for layer in convs)
        and all(layer.groups == 1 and type(layer.weight) in (nn.Parameter, Tensor) for layer in convs)
        and all(
            type(layer) is nn.BatchNorm2d and is_plain(layer, dtype) and layer.training == trains for layer in norms
        )
        and all(layer.track_running_stats and layer.momentum is not None for layer in norms)
        and all(type(layer) is nn.GELU and layer.approximate == "none" for layer in acts)
        and not any(is_watched(layer) for layer in (*convs, *acts))
    )


def forward_stem(stem: Any, x: Tensor) -> Tensor:
    """Computes the stem, (N, in_chans, H, W) to (N, C, H / 4, W / 4). `stem_applies` must hold."""
    dtype = autocast_dtype(x) or x.dtype
    inner = computes_in(x, dtype)
    with without_autocast(x):  # the types are chosen here
        x = _conv2d(stem.conv1, channels_last(x.to(inner)), stem.conv1.weight)  # in this order: fewer bytes are moved
        for norm, conv in ((stem.norm1, stem.conv2), (stem.norm2, stem.conv3)):
            if torch.is_grad_enabled():
                norm.num_batches_tracked.add_(1)
                fits = norm.weight.dtype == inner  # or PyTorch's batch norm does not take it
                x = _NormedConv.apply(
                    x.to(dtype), norm.weight, norm.bias, conv.weight, norm, conv, inner if fits else dtype
                )
                continue
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            shift = norm.bias - norm.running_mean * scale
            y = compiled.gelu_affine(nhwc(x).contiguous(), scale, shift, overwrite=True)
            x = _conv2d(conv, nchw(y), conv.weight)
        return x.to(dtype)


def norm_applies(downsample: Any, x: Tensor) -> bool:
    """Says whether `forward_norm` computes for `x` what the downsampling's norm would, with nobody to notice."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled() or is_transformed(x):
        return False
    if x.dim() != 4 or not x.is_cpu or not x.is_contiguous(memory_format=torch.channels_last) or is_anyone_looking():
        return False
    plain = type(downsample.norm) is LayerNorm2d and is_plain(downsample.norm, x.dtype)
    return (
        plain
        and type(downsample.conv) is nn.Conv2d
        and not is_watched(downsample.conv)
        and compiled.takes_pixels(nhwc(x), x.dtype, computes_in(x, autocast_dtype(x) or x.dtype))
    )


def forward_norm(downsample: Any, x: Tensor) -> Tensor:
    """Computes a downsampling's norm without gradients, in the type that the convolution after it is computed in.

    That is the compiled function of the blocks. `norm_applies` must hold.
    """
    norm, dtype = downsample.norm, computes_in(x, autocast_dtype(x) or x.dtype)
    h, *_ = compiled.norm(nhwc(x), norm.weight, norm.bias, norm.eps, dtype, stats=False)
    return nchw(h)


def convolve(conv: Any, x: Tensor) -> Tensor:
    """Calls a convolution, under autocast in a type that the processor has convolutions of.

    Its result has autocast's type all the same.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(x) or not x.is_cpu:
        return conv(x)
    dtype = autocast_dtype(x)
    inner = x.dtype if dtype is None else computes_in(x, dtype)
    if dtype in (None, inner) or conv.weight.dtype != inner:
        return conv(x)
    with without_autocast(x):
        return conv(x.to(inner)).to(dtype)


class _NormedConv(torch.autograd.Function):
    """``conv(norm(gelu(x)))`` with BatchNorm in training, of which only x is kept; all else is of type `inner`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, conv_w: Tensor, norm: Any, conv: Any, inner: Any) -> Tensor:
        kept, x = x, x.to(inner)
        if _is_compiled(x, w):
            y, mean, var = compiled.gelu_norm(nhwc(x), w, b, norm.eps)
            y, stats, pixels = nchw(y), (mean, (var + norm.eps).rsqrt()), y.numel() // len(w)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var * (pixels / (pixels - 1)), norm.momentum)
        else:
            y, *stats = aten.native_batch_norm(
                F.gelu(x), w, b, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
            )
        ctx.save_for_backward(kept, w, b, conv_w, *stats)
        ctx.eps, ctx.conv, ctx.inner = norm.eps, conv, inner
        return _conv2d(conv, y, conv_w).to(kept.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        kept, w, b, conv_w, mean, rstd = ctx.saved_tensors
        with without_autocast(kept):
            if torch.is_grad_enabled():  # somebody wants to differentiate the gradient
                y = F.batch_norm(F.gelu(kept.to(ctx.inner)), None, None, w, b, training=True, eps=ctx.eps)
                y = _conv2d(ctx.conv, y, conv_w).to(kept.dtype)
                needed = [t for t, needs in zip((kept, w, b, conv_w), ctx.needs_input_grad, strict=False) if needs]
                grads = iter(torch.autograd.grad(y, needed, grad, create_graph=True))
                return *(next(grads) if needs else None for needs in ctx.needs_input_grad[:4]), None, None, None
            x = kept.to(ctx.inner)
            scale = w * rstd
            shift = b - mean * scale
            is_compiled = _is_compiled(x, w)
            if is_compiled:
                y = nchw(compiled.gelu_affine(nhwc(x), scale, shift))
            else:
                z = F.gelu(x)
                y = torch.addcmul(_per_channel(shift), z, _per_channel(scale)).to(x.dtype)
            geometry = ctx.conv.stride, ctx.conv.padding, ctx.conv.dilation
            grad, weight = grad.to(x.dtype), conv_w.to(x.dtype)
            own = is_compiled and compiled.takes_conv_weight_grad(weight, *geometry)
            dy, dconv_w, _ = aten.convolution_backward(
                grad, y, weight, None, *geometry, False, [0, 0], 1, [True, not own, False]
            )
            if own:
                side, stride, padding = weight.shape[-1], ctx.conv.stride[0], ctx.conv.padding[0]
                dconv_w = compiled.conv_weight_grad(nhwc(grad).contiguous(), nhwc(y), side, stride, padding)
            dconv_w = dconv_w.to(conv_w.dtype)
            if is_compiled:
                dx, dw, db = compiled.gelu_norm_backward(nhwc(dy).contiguous(), nhwc(x), w, mean, rstd)
                return nchw(dx).to(kept.dtype), dw, db, dconv_w, None, None, None
            dz, dw, db = aten.native_batch_norm_backward(dy, z, w, None, None, mean, rstd, True, ctx.eps, [True] * 3)
            return aten.gelu_backward(dz, x).to(kept.dtype), dw, db, dconv_w, None, None, None


def _conv2d(conv: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Computes a convolution without bias in the type of x."""
    return F.conv2d(x, weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation)


def _is_compiled(x: Tensor, weight: Tensor) -> bool:
    """Says whether compiled functions take GELU and a batch norm of that weight, for x (N, C, H, W)."""
    wide = weight.dtype == torch.promote_types(x.dtype, torch.float32)
    fits = x.is_cpu and wide and x.is_contiguous(memory_format=torch.channels_last)
    return fits and compiled.takes_gelu_affine(x.shape[1], x.dtype)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
