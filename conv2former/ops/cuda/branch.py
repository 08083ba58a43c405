"""A residual branch on an NVIDIA GPU: the spatial mixing is one Triton kernel forward and a few backward.

What these kernels can compute again in little time is not saved: of the modulation its result alone, since the kernel
finds the context anew in the backward pass; of the MLP nothing but what comes in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import aten, operators
from ..branch import BranchCall, BranchGrads, BranchParams, BranchSpec, SpatialMixing, new_grads, out_matrix
from ..tensors import as_type, cast, matmul, matmul_sum, matrix, nchw, nhwc

__all__ = ["backward", "forward"]


def forward(calls: Sequence[BranchCall], x: Tensor, saved: list[Tensor] | None) -> Tensor:
    """See `branch.Backend`."""
    for call in calls:
        x = _forward(call, x, saved)
    return x


def _forward(call: BranchCall, x: Tensor, saved: list[Tensor] | None) -> Tensor:
    spec, params, mask = call
    xs = nhwc(x)
    out = torch.empty_like(xs, dtype=spec.out_dtype)
    h, mean, rstd = aten.layer_norm(spec, params, xs)
    pre_acts = [F.linear(h, *linear) for linear in params.in_linears(spec.dtype)]
    mixed = _mix(spec, params, pre_acts)
    y = F.linear(mixed, *params.out_linear(spec.dtype))
    if saved is not None:
        saved += cast(spec.saved_dtype, *pre_acts)
        if spec.mixing is SpatialMixing.MODULATION or not spec.recompute:
            saved.append(as_type(mixed, spec.saved_dtype))
        if not spec.recompute:
            saved += [as_type(h, spec.saved_dtype), mean, rstd]
    aten.add_scaled(xs, y, params.gamma, mask, out)
    return nchw(out)


def _mix(spec: BranchSpec, params: BranchParams, pre_acts: Sequence[Tensor]) -> Tensor:
    """Returns the spatial mixing of maps (N, H, W, D)."""
    weight, bias = cast(spec.dtype, params.conv_weight, params.conv_bias)
    if spec.mixing is SpatialMixing.MODULATION:
        a, v = map(nchw, pre_acts)
        return nhwc(operators.modulate(a, weight, bias, v))
    return nhwc(operators.mlp_mix(nchw(pre_acts[0]), weight, bias))


def backward(
    call: BranchCall, x: Tensor, saved: Sequence[Tensor], grad: Tensor, learns: bool
) -> tuple[Tensor, BranchGrads | None]:
    """See `branch.Backend`."""
    spec, params, mask = call
    xs, dout = nhwc(x), nhwc(grad).contiguous()
    pre_acts, mixed, h, mean, rstd = _restore(spec, params, xs, saved)
    dy = dout if mask is None else dout * mask
    out_weight, scale = out_matrix(spec, params, xs.numel())
    dmixed = nchw(matmul(as_type(dy if scale is None else dy * scale, spec.dtype), out_weight))
    weight, bias = cast(spec.dtype, params.conv_weight, params.conv_bias)
    if spec.mixing is SpatialMixing.MODULATION:
        a, v = map(nchw, pre_acts)
        da, dweight, dbias, dv = operators.modulate_backward(dmixed, a, weight, bias, v)
        dpre_acts = [nhwc(da), nhwc(dv)]
    else:
        du, dweight, dbias = operators.mlp_mix_backward(dmixed, nchw(pre_acts[0]), weight, bias)
        dpre_acts = [nhwc(du)]
    in_weights = [matrix(weight, spec.dtype) for weight in params.in_weights]
    dh = matmul_sum(dpre_acts, in_weights)
    dx = torch.empty_like(xs)
    norm_grads = aten.layer_norm_backward(params, dh, xs, mean, rstd, dout, dx)
    if not learns:
        return nchw(dx), None
    total = new_grads(params)
    total.add_norm(*norm_grads)
    total.add_conv(dweight, dbias)
    total.add_out(dy, mixed)
    total.add_ins(h, dpre_acts)
    return nchw(dx), total


def _restore(
    spec: BranchSpec, params: BranchParams, x: Tensor, saved: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Returns the first 1x1 convolutions' results, the mixing's, and the norm with its statistics."""
    saved = [t.contiguous() for t in saved]  # which hooks on saved tensors may have changed
    if spec.recompute:
        h, mean, rstd = aten.layer_norm(spec, params, x)
    else:
        *saved, h, mean, rstd = saved
        h = as_type(h, spec.dtype)
    pre_acts = cast(spec.dtype, *saved)
    has_mixed = spec.mixing is SpatialMixing.MODULATION or not spec.recompute
    mixed = pre_acts.pop() if has_mixed else _mix(spec, params, pre_acts)
    return pre_acts, mixed, h, mean, rstd
