"""A layer norm of its own on an NVIDIA GPU, from any type to any type, with a gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensors import is_batched, nchw, nhwc
from . import rows

__all__ = ["layer_norm"]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Computes a layer norm over the channels.

    Args:
        x: (N, C, H, W) in channels_last memory.
        weight, bias: (C,).
        eps: added to the variance.
        dtype: of the result.

    Returns:
        (N, C, H, W) in channels_last memory; it has derivatives of any order.
    """
    if torch.is_grad_enabled():
        return _LayerNorm.apply(x, weight, bias, eps, dtype)
    h, *_ = rows.layer_norm(nhwc(x), weight, bias, eps, dtype, stats=False)
    return nchw(h)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        h, *stats = rows.layer_norm(nhwc(x), weight, bias, eps, dtype, stats=True)
        ctx.save_for_backward(x, weight, bias, *stats)
        ctx.eps = eps
        return nchw(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grad):
            return *_grads_of_definition(ctx, grad, x, weight, bias), None, None
        maps = (nhwc(grad).contiguous(), nhwc(x).contiguous())
        dx, partials, _ = rows.layer_norm_backward(*maps, (mean, rstd), weight, bias, None, None, None)
        dweight, dbias = rows.sum_partials(partials)[0]
        return nchw(dx), dweight, dbias, None, None


def _grads_of_definition(ctx: Any, grad: Tensor, *inputs: Tensor) -> list[Tensor | None]:
    """Returns what `backward` does, from autograd: where it will be differentiated again, or is batched."""
    create_graph = torch.is_grad_enabled()
    x, weight, bias = inputs
    with torch.enable_grad():
        y = nchw(F.layer_norm(nhwc(x).to(weight.dtype), weight.shape, weight, bias, ctx.eps)).to(grad.dtype)
    needed = [t for t, needs in zip(inputs, ctx.needs_input_grad, strict=False) if needs]
    grads = iter(torch.autograd.grad(y, needed, grad, create_graph=create_graph))
    return [next(grads) if needs else None for needs in ctx.needs_input_grad[:3]]
