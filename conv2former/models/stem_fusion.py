"""When and how `ops` computes the stem, the downsampling's norm and the other convolutions outside of the blocks.

The modules' own formulas are in `backbone.py`. As in `fusion.py`, what is done here computes the same, and is done
where nothing could notice the difference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..ops import stem as ops
from ..ops.backends import compute_dtype, is_exporting, supports_operators
from ..ops.cpu import native
from ..ops.tensors import autocast_dtype, is_ordinary, is_transformed, nhwc, without_autocast
from .fusion import has_global_hooks, has_hooks, is_plain, is_weight, weight_dtype

__all__ = ["channels_last", "convolve", "forward_norm", "forward_stem", "is_fusable_norm", "is_fusable_stem"]


def channels_last(x: Tensor) -> Tensor:
    """Returns images in the memory format that `ops` is for, or as they are where it will not be used."""
    compiling = torch.compiler.is_compiling()
    if not is_ordinary(x) or x.dim() != 4 or is_exporting() or (not compiling and is_transformed(x)):
        return x
    y = x.contiguous(memory_format=torch.channels_last)
    return y if (x.is_cpu and not compiling) or supports_operators(y, 3) else x


def is_fusable_stem(stem: Any, x: Tensor) -> bool:
    """Returns whether `forward_stem` computes for `x` what the stem's modules would, and nothing could notice.

    It does for training, where less is saved, and without gradients where there are native functions.
    """
    trains = torch.is_grad_enabled()
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(x):
        return False
    if x.dim() != 4 or not (x.is_cpu or x.is_cuda) or has_global_hooks():
        return False
    inner = compute_dtype(x, autocast_dtype(x) or x.dtype)
    if not trains and not (x.is_cpu and native.supports_gelu_affine(stem.conv1.out_channels, inner)):
        return False
    if x.numel() == 0 or min(x.shape[2:]) < 3:  # too few pixels for statistics, which BatchNorm itself has a word for
        return False
    dtype = weight_dtype(x)
    convs, norms, acts = (stem.conv1, stem.conv2, stem.conv3), (stem.norm1, stem.norm2), (stem.act1, stem.act2)
    return (
        all(type(layer) is nn.Conv2d and layer.bias is None and is_weight(layer.weight, dtype) for layer in convs)
        and all(layer.padding_mode == "zeros" and isinstance(layer.padding, tuple) for layer in convs)
        and all(layer.groups == 1 for layer in convs)
        and all(
            type(layer) is nn.BatchNorm2d and is_plain(layer, dtype) and layer.training == trains for layer in norms
        )
        and all(layer.track_running_stats and layer.momentum is not None for layer in norms)
        and all(type(layer) is nn.GELU and layer.approximate == "none" for layer in acts)
        and not any(has_hooks(layer) for layer in (*convs, *acts))
    )


def forward_stem(stem: Any, x: Tensor) -> Tensor:
    """Computes the stem, (N, in_chans, H, W) to (N, C, H / stride, W / stride). `is_fusable_stem` must hold."""
    dtype = autocast_dtype(x) or x.dtype
    inner = compute_dtype(x, dtype)
    weights = [conv.weight for conv in (stem.conv1, stem.conv2, stem.conv3)]
    with without_autocast(x):  # the types are chosen here
        if x.is_cuda and weights[0].dtype != inner:
            weights = list(ops.cast_together(inner, *weights))
        # in this order: fewer bytes are moved
        x = ops.conv2d(channels_last(x.to(inner)), weights[0], _geometry(stem.conv1))
        for norm, conv, weight in ((stem.norm1, stem.conv2, weights[1]), (stem.norm2, stem.conv3, weights[2])):
            if torch.is_grad_enabled():
                norm.num_batches_tracked.add_(1)
                fits = norm.weight.dtype == inner  # or PyTorch's batch norm does not take it
                state = ops.BatchNormState(norm.running_mean, norm.running_var, norm.momentum, norm.eps)
                x = ops.gelu_norm_conv(
                    x.to(dtype), norm.weight, norm.bias, weight, state, _geometry(conv), inner if fits else dtype
                )
            else:
                scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
                shift = norm.bias - norm.running_mean * scale
                x = ops.gelu_affine_conv(x, scale, shift, weight, _geometry(conv))
        return x.to(dtype)


def _geometry(conv: nn.Conv2d) -> ops.ConvGeometry:
    return ops.ConvGeometry(conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]


def is_fusable_norm(downsample: Any, x: Tensor) -> bool:
    """Returns whether `forward_norm` computes for `x` what the downsampling's norm would, and nothing could notice.

    On a CPU it does without gradients only.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(x) or x.dim() != 4:
        return False
    if not x.is_contiguous(memory_format=torch.channels_last) or has_global_hooks():
        return False
    norm, conv = downsample.norm, downsample.conv
    if type(norm) is not LayerNorm2d or type(conv) is not nn.Conv2d or has_hooks(conv):
        return False
    if not x.is_cpu:
        return is_plain(norm, weight_dtype(x)) and supports_operators(x, 3)
    if torch.is_grad_enabled() or not is_plain(norm, x.dtype):
        return False
    return native.supports_layer_norm(nhwc(x), x.dtype, compute_dtype(x, autocast_dtype(x) or x.dtype))


def forward_norm(downsample: Any, x: Tensor) -> Tensor:
    """Computes a downsampling's norm in the type that the convolution after it is computed in.

    `is_fusable_norm` must hold.
    """
    norm, dtype = downsample.norm, compute_dtype(x, autocast_dtype(x) or x.dtype)
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, dtype)


def _is_plain_conv(conv: Any, dtype: torch.dtype) -> bool:
    """Returns whether a layer is a dense convolution, with a bias and no hooks, that pads with zeros."""
    return type(conv) is nn.Conv2d and is_plain(conv, dtype) and conv.padding_mode == "zeros" and conv.groups == 1


def convolve(conv: Any, x: Tensor) -> Tensor:
    """Calls a convolution, under autocast on a CPU in a type that the processor has convolutions of.

    Its result has autocast's type all the same. On a GPU weight and bias are converted together.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(x) or not (x.is_cpu or x.is_cuda):
        return conv(x)
    dtype = autocast_dtype(x)
    if x.is_cuda:
        if dtype is None or not _is_plain_conv(conv, torch.float32) or has_global_hooks():
            return conv(x)
        with without_autocast(x):
            weight, bias = ops.cast_together(dtype, conv.weight, conv.bias)
            return F.conv2d(x.to(dtype), weight, bias, conv.stride, conv.padding, conv.dilation)
    inner = x.dtype if dtype is None else compute_dtype(x, dtype)
    if dtype in (None, inner) or conv.weight.dtype != inner:
        return conv(x)
    with without_autocast(x):
        return conv(x.to(inner)).to(dtype)
