"""A residual branch on an NVIDIA GPU: matrix products by PyTorch, and between them one Triton kernel each.

What these kernels can compute again in little time is not saved: of the modulation its result alone, since the kernel
finds the context anew in the backward pass; of the MLP nothing but what comes in.

The host may be slower than the GPU, so there are few launches: `prepare` brings the weights of all branches of a stage
into the type of the products together; `a` and `v` are one product, and the two halves of its result stay where they
are; what is summed over pixels comes out of passes that read the map anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _private
from ..branch import (
    BranchCall,
    BranchGradTensors,
    BranchParams,
    BranchSpec,
    NormAhead,
    ProductWeights,
    SpatialMixing,
)
from ..tensors import add_pixel_product, as_type, matmul, nchw, nhwc, rows
from . import mixing
from .rows import (
    Partials,
    branch_grad,
    layer_norm,
    layer_norm_backward,
    out_grads,
    residual_norm,
    residual_sum,
    sum_partials,
)

__all__ = ["backward", "forward", "prepare"]

# Whether products of 16 bits can be returned as they were summed, in 32: since torch 2.8, and on GPUs only.
WIDE_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads()


def prepare(calls: Sequence[BranchCall]) -> list[BranchCall]:
    """Returns branches with their `products`: all weights and biases are copied in one multi-tensor operation.

    All but the first have a `norm` that the one before is to compute. What has products already stays as it is.
    """
    copies: list[Tensor] = []
    originals: list[Tensor] = []
    prepared = [
        call._replace(products=_products(call.spec, call.params, copies, originals)) if call.products is None else call
        for call in calls
    ]
    if copies:
        with torch.no_grad():
            _private.copy_all(copies, originals)
    return _linked(prepared) if all(call.products is None for call in calls) else prepared


def _linked(calls: list[BranchCall]) -> list[BranchCall]:
    """Returns branches each of which computes the norm of the one after it."""
    stats = torch.is_grad_enabled()
    norms = [
        NormAhead(call.params.norm_weight, call.params.norm_bias, call.spec.eps, call.spec.dtype, stats)
        for call in calls[1:]
    ]
    links = zip(calls, [None, *norms], [*norms, None], strict=True)
    return [
        call._replace(products=cast(ProductWeights, call.products)._replace(norm=norm, next_norm=next_norm))
        for call, norm, next_norm in links
    ]


def _products(spec: BranchSpec, params: BranchParams, copies: list[Tensor], originals: list[Tensor]) -> ProductWeights:
    """Returns what `prepare` adds to a branch, and notes what must be copied into it."""

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        """Returns tensors (D, ...) as one (all D, ...) of the type `spec.dtype`."""
        first = tensors[0]
        if len(tensors) == 1 and first.dtype == spec.dtype:
            return first
        sizes = [len(tensor) for tensor in tensors]
        whole = first.new_empty((sum(sizes), *first.shape[1:]), dtype=spec.dtype)
        copies.extend(whole.split(sizes))
        originals.extend(tensors)
        return whole

    in_weight = joined([weight.detach().flatten(1) for weight in params.in_weights])
    in_bias = joined([bias.detach() for bias in params.in_biases])
    out_weight = joined([params.out_weight.detach().flatten(1)])
    return ProductWeights(in_weight, in_bias, out_weight, joined([params.out_bias.detach()]))


def forward(calls: Sequence[BranchCall], x: Tensor, saved: list[Tensor] | None) -> Tensor:
    """See `branch.Backend`."""
    for call in prepare(calls):
        x = _forward(call, x, saved)
    return x


def _forward(call: BranchCall, x: Tensor, saved: list[Tensor] | None) -> Tensor:
    spec, params, products = call.spec, call.params, call.products
    assert products is not None
    xs = nhwc(x)
    normed = products.norm.take() if products.norm is not None else None
    if normed is None:
        norm = (params.norm_weight, params.norm_bias)
        normed = layer_norm(xs, *norm, spec.eps, spec.dtype, stats=saved is not None)
    h, *stats = normed
    pre_acts = F.linear(h, products.in_weight, products.in_bias)
    mixed = _mix(spec, params, pre_acts)
    y = F.linear(mixed, products.out_weight, products.out_bias)
    if saved is not None:
        saved += [*stats, products.in_weight, pre_acts]
        if _saves_mixed(spec):
            saved.append(mixed)
        if not spec.recompute:
            saved.append(h)
    out = torch.empty_like(xs, dtype=spec.out_dtype)
    if products.next_norm is None:
        residual_sum(xs, y, params.gamma, call.mask, out)
    else:
        products.next_norm.result = residual_norm(xs, y, params.gamma, call.mask, out, products.next_norm)
    return nchw(out)


def _saves_mixed(spec: BranchSpec) -> bool:
    """Returns whether the spatial mixing's result is saved for the backward pass."""
    return spec.mixing is SpatialMixing.MODULATION or not spec.recompute


def _mix(spec: BranchSpec, params: BranchParams, pre_acts: Tensor) -> Tensor:
    """Returns the spatial mixing, (N, H, W, D), of the first 1x1 convolutions' results beside each other."""
    conv = (params.conv_weight, params.conv_bias)
    if spec.mixing is SpatialMixing.MODULATION:
        a, v = _halves(pre_acts)
        return nhwc(mixing.modulate(a, *conv, v))
    return nhwc(mixing.mlp_mix(nchw(pre_acts), *conv))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns views (N, D, H, W) of both halves of (N, H, W, 2 D)."""
    a, v = nchw(x).chunk(2, dim=1)
    return a, v


def backward(
    call: BranchCall, x: Tensor, saved: Sequence[Tensor], grad: Tensor, learns: bool
) -> tuple[Tensor, BranchGradTensors | None]:
    """See `branch.Backend`."""
    spec, params, mask = call.spec, call.params, call.mask
    xs, dout = nhwc(x), nhwc(grad).contiguous()
    # contiguous, which hooks on saved tensors may have changed
    mean, rstd, in_weight, pre_acts, *maps = [t.contiguous() for t in saved]
    h = torch.empty_like(xs, dtype=spec.dtype) if spec.recompute else maps.pop()

    dy, scaled, weight, partial = _through_sum(spec, params, mask, dout)
    dmixed = matmul(scaled, weight)
    dpre_acts, conv_partials = _mix_backward(spec, params, dmixed, pre_acts)
    dh = matmul(dpre_acts, in_weight)
    norm = (params.norm_weight, params.norm_bias)
    # For biases' gradients: the MLP's kernels have summed their result over the pixels, the modulation's have not.
    unsummed = dpre_acts if learns and spec.mixing is SpatialMixing.MODULATION else None
    dx, norm_partials = layer_norm_backward(dh, xs, (mean, rstd), *norm, dout, h if spec.recompute else None, unsummed)
    if not learns:
        return nchw(dx), None
    mixed = maps[0] if _saves_mixed(spec) else _mix(spec, params, pre_acts)
    out = out_grads(_pixel_product(dy, mixed), params.out_weight, params.out_bias, params.gamma, partial)
    conv_grads, norm_grads = sum_partials(conv_partials, norm_partials)
    (in_sums,) = conv_grads[2:] + norm_grads[2:]
    ins = _in_grads(params, _pixel_product(dpre_acts, h), in_sums.flatten())
    return nchw(dx), (*norm_grads[:2], *conv_grads[:2], *out, *ins)


def _through_sum(
    spec: BranchSpec, params: BranchParams, mask: Tensor | None, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Goes back through the residual sum.

    Returns:
        Of the branch's result before its layer scale, divided by that, the gradient (N, H, W, C) in `spec.dtype`; two
        factors, (N, H, W, C) and (C, D), whose product is the gradient of what the last 1x1 convolution takes; and the
        first's sums over pixels in parts (parts, C).
    """
    weight = params.out_weight.flatten(1).contiguous()
    # The layer scale is multiplied into the smaller factor, unless the range of its type ends too early.
    scales = params.gamma is not None and spec.dtype == torch.float16
    scaled_weight = None
    if params.gamma is not None and not scales:
        scaled_weight = torch.empty_like(weight, dtype=spec.dtype)
    dy = dout
    if mask is not None or dout.dtype != spec.dtype:
        dy = torch.empty_like(dout, dtype=spec.dtype)
    scaled = torch.empty_like(dy) if scales else dy
    partial = branch_grad(
        dout, params.gamma, mask, weight, None if dy is dout else dy, scaled if scales else None, scaled_weight
    )
    return dy, scaled, as_type(weight, spec.dtype) if scaled_weight is None else scaled_weight, partial


def _mix_backward(spec: BranchSpec, params: BranchParams, dmixed: Tensor, pre_acts: Tensor) -> tuple[Tensor, Partials]:
    """Returns the gradients of `_mix`: of `pre_acts`, and of the depthwise convolution's weight and bias.

    With these come the sums of the first over all pixels where they cost nothing.
    """
    conv = (params.conv_weight, params.conv_bias)
    if spec.mixing is SpatialMixing.MODULATION:
        a, v = _halves(pre_acts)
        dpre_acts = pre_acts.new_empty(pre_acts.shape)
        return dpre_acts, mixing.modulate_grads(nchw(dmixed), a, *conv, v, *_halves(dpre_acts))
    df, partials = mixing.mlp_mix_grads(nchw(dmixed), nchw(pre_acts), *conv)
    return nhwc(df), partials


def _in_grads(params: BranchParams, weights: Tensor, biases: Tensor) -> list[Tensor]:
    """Returns the gradients of the first 1x1 convolutions, weights and then biases, from all weights' and all biases'.

    Args:
        params: of the branch.
        weights: (all D, C) float32 or wider.
        biases: (all D,) float32.
    """
    weight, bias = params.in_weights[0], params.in_biases[0]
    sizes = [len(bias) for bias in params.in_biases]
    parts = as_type(weights, weight.dtype).split(sizes)
    return [*(part.view(weight.shape) for part in parts), *as_type(biases, bias.dtype).split(sizes)]


def _pixel_product(a: Tensor, b: Tensor) -> Tensor:
    """Returns the sum over all pixels of the products of two maps' channels, (N, H, W, C) and (N, H, W, D) to (C, D).

    It is float32, rounded before only where this PyTorch cannot return that from maps in 16 bits.
    """
    if a.dtype != torch.float32 and a.is_cuda and WIDE_PRODUCTS:
        return torch.mm(rows(a).t(), rows(b), out_dtype=torch.float32)
    return add_pixel_product(None, a, b, torch.float32)
