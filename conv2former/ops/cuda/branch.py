"""A residual branch on an NVIDIA GPU: matrix products by PyTorch, and between them one Triton kernel each.

What these kernels can compute again in little time is not saved: of the modulation its result alone, since the kernel
finds the context anew in the backward pass; of the MLP nothing but what comes in.

The host may be slower than the GPU, so there are few launches: `prepare` brings the weights of all branches of a stage
into the type of the products together; `a` and `v` are one product, and the two halves of its result stay where they
are; what is summed over pixels comes out of passes that read the map anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _private
from ..branch import (
    BranchCall,
    BranchGradTensors,
    BranchLinks,
    BranchParams,
    BranchSpec,
    NormAhead,
    ProductWeights,
    SpatialMixing,
    SumGrad,
    SumGradAhead,
)
from ..tensors import add_pixel_product, as_type, matmul, nchw, nhwc, rows
from . import mixing
from .rows import (
    Partials,
    SumBackward,
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

_ALONE = BranchLinks(None, None, None, None)


def prepare(calls: Sequence[BranchCall]) -> list[BranchCall]:
    """Returns branches with their `products`: all weights and biases are copied in one multi-tensor operation.

    Neighbours are linked: see `branch.BranchLinks`. What has products already stays as it is.
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
    """Returns branches each of which computes the norm of the one after it, and goes back through the sum before it."""
    trains = torch.is_grad_enabled()
    norms = [
        NormAhead(call.params.norm_weight, call.params.norm_bias, call.spec.eps, call.spec.dtype, trains)
        for call in calls[1:]
    ]
    sums = [
        SumGradAhead(call.spec.dtype, call.params.out_weight, call.params.gamma, call.mask) if trains else None
        for call in calls[:-1]
    ]
    links = map(BranchLinks, [None, *norms], [*norms, None], [*sums, None], [None, *sums])
    return [call._replace(links=link) for call, link in zip(calls, links, strict=True)]


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
    norm_ahead, next_norm, _, previous = call.links or _ALONE
    xs = nhwc(x)
    normed = None if norm_ahead is None else norm_ahead.take()
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
        if previous is not None:  # these come last
            saved += [t for t in (previous.weight, previous.gamma, previous.mask) if t is not None]
    out = torch.empty_like(xs, dtype=spec.out_dtype)
    if next_norm is None:
        residual_sum(xs, y, params.gamma, call.mask, out)
    else:
        next_norm.result = residual_norm(xs, y, params.gamma, call.mask, out, next_norm)
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
    spec, params = call.spec, call.params
    _, _, ahead, previous = call.links or _ALONE
    # contiguous, which hooks on saved tensors may have changed
    xs, dout = nhwc(x).contiguous(), nhwc(grad).contiguous()
    mean, rstd, in_weight, pre_acts, *rest = [t.contiguous() for t in saved]
    mixed = rest.pop(0) if _saves_mixed(spec) else None
    h = torch.empty_like(xs, dtype=spec.dtype) if spec.recompute else rest.pop(0)

    through_sum = None if ahead is None else ahead.take(grad)
    if through_sum is None:
        way = _way_through_sum(spec.dtype, params.out_weight, params.gamma, call.mask, dout)
        through_sum = _through_sum(way, dout, branch_grad(dout, way))
    dy, scaled, weight, partial = through_sum
    dmixed = matmul(scaled, weight)
    dpre_acts, conv_partials = _mix_backward(spec, params, dmixed, pre_acts)
    dh = matmul(dpre_acts, in_weight)
    norm = (params.norm_weight, params.norm_bias)
    # For biases' gradients: the MLP's kernels have summed their result over the pixels, the modulation's have not.
    unsummed = dpre_acts if learns and spec.mixing is SpatialMixing.MODULATION else None
    on = None if previous is None else _way_through_previous(previous, rest, xs)
    dx, norm_partials, previous_partial = layer_norm_backward(
        dh, xs, (mean, rstd), *norm, dout, h if spec.recompute else None, unsummed, on
    )
    grad = nchw(dx)
    if previous is not None and on is not None and previous_partial is not None:
        previous.put(grad, _through_sum(on, dx, previous_partial))
    if not learns:
        return grad, None
    mixed = _mix(spec, params, pre_acts) if mixed is None else mixed
    out = out_grads(_pixel_product(dy, mixed), params.out_weight, params.out_bias, params.gamma, partial)
    conv_grads, norm_grads = sum_partials(conv_partials, norm_partials)
    (in_sums,) = conv_grads[2:] + norm_grads[2:]
    ins = _in_grads(params, _pixel_product(dpre_acts, h), in_sums.flatten())
    return grad, (*norm_grads[:2], *conv_grads[:2], *out, *ins)


def _way_through_sum(
    dtype: torch.dtype, weight: Tensor, gamma: Tensor | None, mask: Tensor | None, dout: Tensor
) -> SumBackward:
    """Returns what goes back through a branch's residual sum, with tensors for what has to be written.

    Args:
        dtype: of the branch.
        weight: of its last 1x1 convolution, (C, D, 1, 1).
        gamma, mask: of the branch.
        dout: a tensor like the sum's gradient, (N, H, W, C).
    """
    weight = weight.flatten(1).contiguous()
    # The layer scale is multiplied into the smaller factor, unless the range of its type ends too early.
    scales = gamma is not None and dtype == torch.float16
    writes = mask is not None or dout.dtype != dtype
    return SumBackward(
        gamma,
        mask,
        weight,
        dy=torch.empty_like(dout, dtype=dtype) if writes else None,
        scaled=torch.empty_like(dout, dtype=dtype) if scales else None,
        scaled_weight=torch.empty_like(weight, dtype=dtype) if gamma is not None and not scales else None,
    )


def _way_through_previous(previous: SumGradAhead, saved: list[Tensor], x: Tensor) -> SumBackward:
    """Returns `_way_through_sum` for the branch before, from what was saved of it and a map like the gradient."""
    weight, *rest = saved
    gamma = None if previous.gamma is None else rest.pop(0)
    return _way_through_sum(previous.dtype, weight, gamma, rest[0] if rest else None, x)


def _through_sum(way: SumBackward, dout: Tensor, partial: Tensor) -> SumGrad:
    """Returns what has come through a residual sum, from the sum's gradient and the sums over its pixels in parts."""
    dy = dout if way.dy is None else way.dy
    weight = as_type(way.weight, dy.dtype) if way.scaled_weight is None else way.scaled_weight
    return SumGrad(dy, dy if way.scaled is None else way.scaled, weight, partial)


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
