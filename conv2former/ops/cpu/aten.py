"""The parts of a residual branch that PyTorch's own operators compute well enough, on maps (N, H, W, C)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..branch import BranchParams, BranchSpec
from ..tensors import as_type

__all__ = ["add_scaled", "layer_norm", "layer_norm_backward"]

aten = torch.ops.aten


def layer_norm(spec: BranchSpec, params: BranchParams, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a branch's layer norm in the type `spec.dtype`, each pixel's mean and its reciprocal deviation.

    The latter two are (N, H, W, 1), in the norm's type, which the norm is computed in.
    """
    weight = params.norm_weight
    h, mean, rstd = aten.native_layer_norm(as_type(x, weight.dtype), weight.shape, weight, params.norm_bias, spec.eps)
    return as_type(h, spec.dtype), mean, rstd


def layer_norm_backward(
    params: BranchParams, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `layer_norm`.

    Args:
        params: as in `layer_norm`.
        grad: of the result, (N, H, W, C).
        x, mean, rstd: as in `layer_norm`.
        residual: what is added to the gradient of x.
        out: the map for their sum.

    Returns:
        The gradients of weight and bias, (C,).
    """
    weight, bias = params.norm_weight, params.norm_bias
    dx, dweight, dbias = aten.native_layer_norm_backward(
        as_type(grad, weight.dtype), as_type(x, weight.dtype), weight.shape, mean, rstd, weight, bias, [True] * 3
    )
    torch.add(dx, residual, out=out)
    return dweight, dbias


def add_scaled(x: Tensor, y: Tensor, gamma: Tensor | None, mask: Tensor | None, out: Tensor) -> None:
    """Writes ``x + y * gamma * mask`` to `out`, without the factors that are None."""
    factors = [factor for factor in (gamma, mask) if factor is not None]
    if factors:
        torch.addcmul(x, y, factors[0] if len(factors) == 1 else factors[0] * factors[1], out=out)
    else:
        torch.add(x, y, out=out)
