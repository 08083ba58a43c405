"""The operators for anybody's network: with the kernels where there are some, with PyTorch's operators elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators
from .backends import supports_operators
from .tensors import autocast_dtype, without_autocast

__all__ = ["depthwise_conv2d", "modulate"]


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A depthwise convolution of stride 1 that keeps the size: ``F.conv2d(x, weight, bias, padding=k // 2, groups=C)``.

    On an NVIDIA GPU it is a Triton kernel for float32, bfloat16 and float16 and odd kernels up to 31 x 31; cuDNN has
    fast ones for small kernels only. Sums are in float32; bfloat16 and float16 may round the weight to their type, as
    autocast does. It repeats bit for bit. Elsewhere it is PyTorch's convolution.

    Args:
        x: (N, C, H, W). Maps in channels_last memory are taken as they are, others are copied into it.
        weight: (C, 1, k, k), k odd; of x's type or float32.
        bias: (C,) likewise, or None.

    Returns:
        (N, C, H, W) in x's type, or autocast's. On a GPU it has a gradient, and no second one.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    x = x.to(autocast_dtype(x) or x.dtype)
    dense = x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x
    with without_autocast(x):
        if supports_operators(dense, weight.shape[-1]):
            return operators.depthwise_conv2d(dense, weight, weight.new_zeros(len(weight)) if bias is None else bias)
        bias = bias if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def modulate(a: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
    """Convolutional modulation: ``depthwise_conv2d(gelu(a), weight, bias) * v``, on a GPU in one kernel.

    Args:
        a: (N, C, H, W), what the context is computed from.
        weight, bias: as for `depthwise_conv2d`.
        v: the values, like `a`.

    Returns:
        (N, C, H, W) in a's type, or autocast's. On a GPU it has a gradient, and no second one.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    dtype = autocast_dtype(a) or a.dtype
    a, v = a.to(dtype), v.to(dtype)
    dense = a.contiguous(memory_format=torch.channels_last) if a.is_cuda else a
    with without_autocast(a):
        if supports_operators(dense, weight.shape[-1]):
            return operators.modulate(dense, weight, bias, v)
        return depthwise_conv2d(F.gelu(a), weight, bias) * v
