"""Residual branches as functions with a gradient, by whichever backend is fastest.

Three things save memory and time, in every backend:

- Of the maps between x and the result only those are saved for the backward pass that are expensive to compute again:
  the results of the first 1x1 convolutions and of the large depthwise convolution. The norm, GELU, the 3x3 convolution
  and the product are computed again.
- The last 1x1 convolution's result is not saved for the gradient of layer scale, which follows from that of the
  weights.
- Each sum over all pixels of a batch is made where its terms are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import functional
from .backends import choose_backend, prepare
from .branch import Backend, BranchCall, BranchParams
from .tensors import as_type, is_batched, without_autocast

__all__ = ["residual_branches"]


def residual_branches(calls: Sequence[BranchCall], x: Tensor) -> Tensor:
    """Computes residual branches one after the other.

    Args:
        calls: the branches.
        x: (N, C, H, W), in channels_last memory or else copied into it.

    Returns:
        (N, C, H, W) in channels_last memory, of the last branch's `out_dtype`; it has derivatives of any order.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    with without_autocast(x):  # the types are in the specs
        calls = prepare(calls, x)
        if torch.is_grad_enabled():
            for call in calls:
                x = _branch(call, x)
            return x
        if x.is_cpu:  # a GPU's kernels take any type
            x = as_type(x, calls[0].spec.out_dtype)  # which it would be in the sum, too
        # All that is Python first: between products, which fill the caches, each piece takes up to ten times as long.
        backends = [choose_backend(call, x, learns=False) for call in calls]
        if all(backend is backends[0] for backend in backends):
            return backends[0].forward(calls, x, None)
        for backend, call in zip(backends, calls, strict=True):
            x = backend.forward([call], x, None)
        return x


def _branch(call: BranchCall, x: Tensor) -> Tensor:
    tensors = call.params.tensors()
    learns = x.requires_grad or any(p is not None and p.requires_grad for p in tensors)
    backend = choose_backend(call, x, learns)
    if learns:
        return _ResidualBranch.apply(backend, call, x, call.mask, *tensors)
    return backend.forward([call], x, None)


class _ResidualBranch(torch.autograd.Function):
    """A residual branch with a gradient."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, call: BranchCall, x: Tensor, mask: Tensor | None, *params: Any) -> Tensor:
        saved: list[Tensor] = []
        y = backend.forward([call], x, saved)
        ctx.backend, ctx.spec, ctx.links, ctx.num_params = backend, call.spec, call.links, len(params)
        ctx.save_for_backward(x, mask, *params, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, mask, *saved = ctx.saved_tensors
        params, saved = saved[: ctx.num_params], saved[ctx.num_params :]
        with without_autocast(x):
            if torch.is_grad_enabled() or is_batched(grad):
                return _grads_of_definition(ctx, grad, x, mask, params)
            links = ctx.links
            if links is not None and not ctx.needs_input_grad[2]:  # nothing goes on to the branch before
                links = links._replace(previous_sum_grad=None)
            call = BranchCall(ctx.spec, BranchParams.from_tensors(params), mask, links=links)
            learns = any(ctx.needs_input_grad[4:])
            dx, grads = ctx.backend.backward(call, x, saved, grad, learns)
            return None, None, dx, None, *(grads or (None,) * len(params))


def _grads_of_definition(ctx: Any, grad: Tensor, x: Tensor, mask: Tensor | None, params: list) -> tuple:
    """Returns what `backward` does, from autograd: where it will be differentiated again, or is batched."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # each its own alias, because autograd would sum up over the places where one parameter stands twice
        tensors: list[Any] = [t if t is None else t.view_as(t) for t in (x, mask, *params)]
        y = functional.residual_branch(ctx.spec, BranchParams.from_tensors(tensors[2:]), *tensors[:2])
    needed = [tensor for tensor, needs in zip(tensors, ctx.needs_input_grad[2:], strict=True) if needs]
    grads = iter(torch.autograd.grad(y, needed, grad, create_graph=create_graph))
    return None, None, *(next(grads) if needs else None for needs in ctx.needs_input_grad[2:])
