"""Residual branches with random parameters, and what the definition makes of them in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from conv2former.ops import functional
from conv2former.ops.branch import BranchCall, BranchParams, BranchSpec, SpatialMixing


def random(number: int, *size: int) -> Tensor:
    """Returns random numbers in float64, always the same ones for a number and a size."""
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def make_params(mixing: SpatialMixing, channels: int, inner: int, kernel_size: int, gamma: bool) -> BranchParams:
    """Returns random parameters in float64, with a layer scale if `gamma`."""
    return BranchParams(
        norm_weight=random(1, channels) + 1,
        norm_bias=random(2, channels),
        conv_weight=random(3, inner, 1, kernel_size, kernel_size) / kernel_size,
        conv_bias=random(4, inner),
        out_weight=random(5, channels, inner, 1, 1) / 4,
        out_bias=random(6, channels),
        gamma=random(7, channels) if gamma else None,
        in_weights=tuple(random(8 + i, inner, channels, 1, 1) / 4 for i in range(mixing.value)),
        in_biases=tuple(random(10 + i, inner) for i in range(mixing.value)),
    )


def exact(call: BranchCall, x: Tensor, grad: Tensor) -> list[Tensor | None]:
    """Returns the definition's result in float64, and the gradients of x and of the parameters in a row."""
    wide = torch.float64
    tensors = [t if t is None else t.to(wide, copy=True).requires_grad_() for t in (x, *call.params.tensors())]
    spec = BranchSpec(call.spec.mixing, call.spec.eps, call.spec.recompute, wide, wide, wide)
    mask = None if call.mask is None else call.mask.to(wide)
    y = functional.residual_branch(spec, BranchParams.from_tensors(tensors[1:]), tensors[0], mask)  # type: ignore[arg-type]
    grads = iter(torch.autograd.grad(y, [t for t in tensors if t is not None], grad.to(wide)))
    return [y.detach(), *(t if t is None else next(grads) for t in tensors)]
