"""A residual branch on a CPU by PyTorch's operators, with the native functions for those parts that these can take.

It takes every type, and saves what is asked for. `native_branch.py` is faster where it applies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..branch import BranchCall, BranchGradTensors, BranchParams, BranchSpec
from ..tensors import as_type, cast, matmul, matmul_sum, matrix, nchw, nhwc
from . import aten, native, onednn
from .chunks import images_at_a_time, in_chunks
from .grads import new_grads, out_matrix
from .mixing import choose_mixing

__all__ = ["backward", "forward"]


def forward(calls: Sequence[BranchCall], x: Tensor, saved: list[Tensor] | None) -> Tensor:
    """See `branch.Backend`."""
    for call in calls:
        x = _forward(call, x, saved)
    return x


def _forward(call: BranchCall, x: Tensor, saved: list[Tensor] | None) -> Tensor:
    spec, params, mask, *_ = call
    xs = nhwc(x)
    out = torch.empty_like(xs, dtype=spec.out_dtype)
    mixing = choose_mixing(spec.mixing, spec.dtype)
    conv = mixing.conv_params(spec.dtype, params.conv_weight, params.conv_bias)
    ins, out_linear = params.in_linears(spec.dtype), params.out_linear(spec.dtype)
    for images, images_mask, result in in_chunks(images_at_a_time(xs, params.out_weight.shape[1]), xs, mask, out):
        h, *stats = _layer_norm(spec, params, images, saved is not None)
        if saved is None:
            mixed = mixing.infer(h, ins, *conv)
        else:
            pre_acts = [onednn.linear(h, *linear) for linear in ins]
            mixed, *expensive = mixing.forward(pre_acts, *conv, spec.recompute)
            saved += cast(spec.saved_dtype, *pre_acts, *expensive)
            if not spec.recompute:
                saved += [h.to(spec.saved_dtype), *stats]
        _add_scaled(images, onednn.linear(mixed, *out_linear), params.gamma, images_mask, result)
    return nchw(out)


def backward(
    call: BranchCall, x: Tensor, saved: Sequence[Tensor], grad: Tensor, learns: bool
) -> tuple[Tensor, BranchGradTensors | None]:
    """See `branch.Backend`."""
    spec, params, mask, *_ = call
    xs, grads = nhwc(x), nhwc(grad).contiguous()
    dx = torch.empty_like(xs)
    mixing = choose_mixing(spec.mixing, spec.dtype)
    conv = mixing.conv_params(spec.dtype, params.conv_weight, params.conv_bias)
    out_weight, scale = out_matrix(spec, params, xs.numel())
    in_weights = [matrix(weight, spec.dtype) for weight in params.in_weights]
    total = new_grads(params)
    chunks = in_chunks(len(saved[0]), xs, grads, mask, dx)  # as in the forward pass, whose first map this is
    count = len(saved) // len(chunks)
    for i, (images, dout, images_mask, result) in enumerate(chunks):
        # contiguous, which hooks on saved tensors may have changed
        pre_acts, expensive, h, mean, rstd = _restore(
            spec, params, images, [t.contiguous() for t in saved[i * count :][:count]]
        )
        if spec.recompute:
            expensive = mixing.recompute(pre_acts, expensive, *conv)
        dy = dout if images_mask is None else dout * images_mask
        dmixed = matmul(as_type(dy if scale is None else dy * scale, spec.dtype), out_weight)
        mixed, dpre_acts, conv_grads, sums = mixing.backward(dmixed, pre_acts, expensive, *conv, learns)
        dh = matmul_sum(dpre_acts, in_weights)
        norm_grads = _layer_norm_backward(params, dh, images, mean, rstd, dout, result)
        if learns:
            total.add_norm(*norm_grads)
            total.add_conv(*conv_grads)
            total.add_out(dy, mixed)
            total.add_ins(h, dpre_acts, sums)
    return nchw(dx), total.tensors(params) if learns else None


def _restore(
    spec: BranchSpec, params: BranchParams, x: Tensor, saved: list[Tensor]
) -> tuple[list[Tensor], Sequence[Tensor], Tensor, Tensor, Tensor]:
    """Returns of a chunk the first 1x1 convolutions' results, what else was saved, and the norm with its statistics."""
    if spec.recompute:
        h, mean, rstd = _layer_norm(spec, params, x, True)
    else:
        *saved, h, mean, rstd = saved
        h = as_type(h, spec.dtype)
    maps = cast(spec.dtype, *saved)
    ins = len(params.in_weights)
    return maps[:ins], maps[ins:], h, mean, rstd


def _layer_norm(spec: BranchSpec, params: BranchParams, x: Tensor, stats: bool) -> tuple:
    """Returns what `aten.layer_norm` does, and without `stats` perhaps None for its statistics."""
    if native.supports_layer_norm(x, params.norm_weight.dtype, spec.dtype):
        return native.layer_norm(x, params.norm_weight, params.norm_bias, spec.eps, spec.dtype, stats)
    return aten.layer_norm(spec, params, x)


def _layer_norm_backward(
    params: BranchParams, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Does what `aten.layer_norm_backward` does."""
    weight = params.norm_weight
    if residual.dtype == x.dtype and native.supports_layer_norm(x, weight.dtype, grad.dtype):
        return native.layer_norm_backward(grad, x, mean, rstd, weight, residual, out)
    return aten.layer_norm_backward(params, grad, x, mean, rstd, residual, out)


def _add_scaled(x: Tensor, y: Tensor, gamma: Tensor | None, mask: Tensor | None, out: Tensor) -> None:
    """Does what `aten.add_scaled` does."""
    same = all(t is None or t.dtype == x.dtype for t in (gamma, mask, out))
    if same and native.supports_layer_norm(x, x.dtype, y.dtype):
        native.add_scaled(x, y, gamma, mask, out)
    else:
        aten.add_scaled(x, y, gamma, mask, out)
