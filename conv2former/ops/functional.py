"""What a block computes, in plain PyTorch: the definition that every backend is tested against.

Maps are (N, H, W, C), weights of depthwise convolutions (C, 1, k, k), biases (C,). Everything has derivatives of any
order, from autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .branch import BranchParams, BranchSpec, SpatialMixing
from .tensors import as_type, cast, nchw, nhwc

__all__ = ["conv_dw", "mlp_mix", "modulate", "residual_branch"]


def conv_dw(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution, 'same' padded, of (N, H, W, C) with (C, 1, k, k) to (N, H, W, C)."""
    y = nhwc(F.conv2d(nchw(x), weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1]))
    return y.contiguous()  # which it is, unless the convolution chose another memory format


def modulate(a: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolutional modulation between its 1x1 convolutions: ``conv_dw(gelu(a)) * v``."""
    return conv_dw(F.gelu(a), weight, bias) * v


def mlp_mix(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the MLP does between its 1x1 convolutions: ``g + gelu(conv_dw(g))`` with ``g = gelu(u)``."""
    g = F.gelu(u)
    return g + F.gelu(conv_dw(g, weight, bias))


def residual_branch(
    spec: BranchSpec,
    params: BranchParams,
    x: Tensor,
    mask: Tensor | None,
    mix: Callable[..., Tensor] | None = None,
) -> Tensor:
    """A residual branch with its sum: ``x + mask * gamma * out(mix(in(norm(x))))``.

    Args:
        spec: which branch, and in what types.
        params: its parameters.
        x: (N, C, H, W).
        mask: what drop path multiplies each image with, (N, 1, 1, 1), or None.
        mix: what computes the spatial mixing in the place of `modulate` or `mlp_mix` above, with the same arguments.

    Returns:
        (N, C, H, W) of the type `spec.out_dtype`.
    """
    h = as_type(nhwc(x), params.norm_weight.dtype)
    h = F.layer_norm(h, params.norm_weight.shape, params.norm_weight, params.norm_bias, spec.eps).to(spec.dtype)
    pre_acts = [F.linear(h, *linear) for linear in params.in_linears(spec.dtype)]
    mix = mix or (modulate if spec.mixing is SpatialMixing.MODULATION else mlp_mix)
    mixed = mix(*pre_acts, *cast(spec.dtype, params.conv_weight, params.conv_bias))
    y = F.linear(mixed, *params.out_linear(spec.dtype))
    y = nchw(y if params.gamma is None else y * params.gamma)
    return (x + (y if mask is None else y * mask)).to(spec.out_dtype)
