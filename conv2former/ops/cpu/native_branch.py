"""Residual branches on a CPU by native functions: nothing else is left than these and matrix products.

A few images at a time go through all of a branch. Without a backward pass the branches of a whole stage are computed in
memory that they share, and a residual sum together with the norm behind it, which is the next branch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..branch import BranchCall, BranchGradTensors, BranchParams, BranchSpec, SpatialMixing
from ..tensors import as_type, cast, matmul, matmul_sum, matrix, nchw, nhwc, rows
from . import native
from .chunks import images_at_a_time, in_chunks
from .grads import new_grads, out_matrix

__all__ = ["applies", "backward", "forward"]

LINE = 32  # numbers in a cache line, of the smallest type


def applies(spec: BranchSpec, params: BranchParams, x: Tensor, learns: bool) -> bool:
    """Returns whether the functions here take a branch.

    Args:
        spec, params: the branch.
        x: the map (N, C, H, W) on a CPU.
        learns: there will be a backward pass.
    """
    fits = x.dtype is spec.out_dtype and (spec.recompute or not learns)
    return fits and native.supports_layer_norm(nhwc(x), params.norm_weight.dtype, spec.dtype)


def forward(calls: Sequence[BranchCall], x: Tensor, saved: list[Tensor] | None) -> Tensor:
    """See `branch.Backend`."""
    xs, spec = nhwc(x), calls[0].spec
    out = torch.empty_like(xs)
    # The norms of all images, which come with the sum before; of a branch alone those of a chunk are enough.
    normed = torch.empty_like(xs, dtype=spec.dtype) if len(calls) > 1 else None
    workspace = _Workspace(xs, calls, saved is not None)
    # Before the first product, because between products, which fill the caches, all Python takes several times as long.
    norms = [(call.params.norm_weight, call.params.norm_bias, call.spec.eps) for call in calls]
    matrices = [[w.flatten(1).t() for w in (*call.params.in_weights, call.params.out_weight)] for call in calls]
    images = [images_at_a_time(xs, call.params.out_weight.shape[1]) for call in calls]
    for i, (spec, params, mask, *_) in enumerate(calls):
        weights = cast(spec.dtype, *matrices[i])
        next_norm = norms[i + 1] if i + 1 < len(calls) else None
        for chunk, chunk_mask, result, h in in_chunks(images[i], xs, mask, out, normed):
            h = workspace.norm(chunk) if h is None else h
            if i == 0:
                native.layer_norm(chunk, *norms[0], spec.dtype, stats=False, out=h)
            *pre_acts, mixed = workspace.maps(chunk, params)
            for pre_act, weight in zip(pre_acts, weights, strict=False):
                torch.mm(rows(h), weight, out=rows(pre_act))
            context = _mix(spec, params, pre_acts, mixed, saved is not None)
            torch.mm(rows(mixed), weights[-1], out=rows(h))
            if saved is not None:
                saved += cast(spec.saved_dtype, *pre_acts, *context)
            normed_too = None if next_norm is None else (*next_norm, h)
            native.add_scaled(chunk, h, params.gamma, chunk_mask, result, params.out_bias, normed_too)
        xs = out  # where the next sums take the place of these
    return nchw(out)


def _mix(spec: BranchSpec, params: BranchParams, pre_acts: Sequence[Tensor], mixed: Tensor, save: bool) -> list[Tensor]:
    """Writes the spatial mixing of `pre_acts`, which lack their biases, to `mixed`; it may be the last of these.

    Returns:
        With `save` what is expensive to compute again.
    """
    if spec.mixing is SpatialMixing.MLP:
        native.mlp_mix(pre_acts[0], params.conv_weight, params.conv_bias, mixed, params.in_biases[0])
        return []
    a, v = pre_acts
    context = torch.empty_like(a) if save else None
    native.modulate(a, v, params.conv_weight, params.conv_bias, context, mixed, params.in_biases)
    return [] if context is None else [context]


class _Workspace:
    """Memory that the chunks of all branches use one after the other.

    Args:
        x: the map (N, H, W, C).
        calls: the branches.
        save: the first 1x1 convolutions' results will be saved, so that each chunk needs its own.
    """

    def __init__(self, x: Tensor, calls: Sequence[BranchCall], save: bool) -> None:
        self.like, self.save, self.dtype = x, save, calls[0].spec.dtype
        self.buffers: dict[tuple, list[Tensor]] = {}
        n, height, width, _ = x.shape
        sizes = []
        for call in calls:
            images = min(n, images_at_a_time(x, call.params.out_weight.shape[1]))
            sizes.append(_room(images * height * width, _channels(call.params)))
        self.memory = self._new(0 if save else max(sizes))

    def _new(self, *size: int) -> Tensor:
        return self.like.new_empty(size, dtype=self.dtype)

    def norm(self, chunk: Tensor) -> Tensor:
        """Returns memory for the norm of a chunk, (N, H, W, C)."""
        key = "norm", len(chunk)
        if key not in self.buffers:
            self.buffers[key] = [self._new(*chunk.shape)]
        return self.buffers[key][0]

    def maps(self, chunk: Tensor, params: BranchParams) -> list[Tensor]:
        """Returns memory for the results of the first 1x1 convolutions and of the mixing, (N, H, W, D) each."""
        size, channels = chunk.shape[:-1], _channels(params)
        key = channels, len(chunk)
        if key not in self.buffers:
            maps = [self._new(*size, channels[-1])] if self.save else _cut(self.memory, size, channels)
            self.buffers[key] = maps if self.save else [*maps, maps[-1]]
        pre_acts = [self._new(*size, c) for c in channels] if self.save else []
        return [*pre_acts, *self.buffers[key]]


def _channels(params: BranchParams) -> tuple[int, ...]:
    return tuple(weight.shape[0] for weight in params.in_weights)


def _room(pixels: int, channels: Sequence[int]) -> int:
    """Returns how many numbers `_cut` needs."""
    return sum(-(-pixels * c // LINE) * LINE for c in channels)


def _cut(memory: Tensor, size: Sequence[int], channels: Sequence[int]) -> list[Tensor]:
    """Returns maps (*size, channels) that lie in `memory` one behind the other, each from a cache line's beginning."""
    pixels, start, maps = math.prod(size), 0, []
    for c in channels:
        maps.append(memory[start : start + pixels * c].view(*size, c))
        start += _room(pixels, [c])
    return maps


def backward(
    call: BranchCall, x: Tensor, saved: Sequence[Tensor], grad: Tensor, learns: bool
) -> tuple[Tensor, BranchGradTensors | None]:
    """See `branch.Backend`."""
    spec, params, mask, *_ = call
    xs, grads = nhwc(x), nhwc(grad).contiguous()
    dx = torch.empty_like(xs)
    out_weight, scale = out_matrix(spec, params, xs.numel())
    in_weights = [matrix(weight, spec.dtype) for weight in params.in_weights]
    total = new_grads(params)
    chunks = in_chunks(len(saved[0]), xs, grads, mask, dx)  # as in the forward pass, whose first map this is
    count = len(saved) // len(chunks)
    for i, (images, dout, images_mask, result) in enumerate(chunks):
        # contiguous, which hooks on saved tensors may have changed
        maps = cast(spec.dtype, *(t.contiguous() for t in saved[i * count :][:count]))
        h, mean, rstd = native.layer_norm(images, params.norm_weight, params.norm_bias, spec.eps, spec.dtype)
        dy = dout if images_mask is None else dout * images_mask
        dmixed = matmul(as_type(dy if scale is None else dy * scale, spec.dtype), out_weight)
        if spec.mixing is SpatialMixing.MODULATION:
            a, v, context = maps
            mixed, da, dv, dweight, sums = native.modulate_backward(
                dmixed, a, v, context, params.conv_weight, params.in_biases
            )
            dpre_acts = [da, dv]
        else:
            mixed, du, dweight, sums = native.mlp_mix_backward(
                dmixed, maps[0], params.conv_weight, params.conv_bias, params.in_biases[0]
            )
            dpre_acts = [du]
        dh = matmul_sum(dpre_acts, in_weights)
        assert mean is not None and rstd is not None  # noqa: PT018
        norm_grads = native.layer_norm_backward(dh, images, mean, rstd, params.norm_weight, dout, result)
        if learns:
            total.add_norm(*norm_grads)
            total.add_conv(dweight, sums[0])
            total.add_out(dy, mixed)
            total.add_ins(h, dpre_acts, sums[1:])
    return nchw(dx), total.tensors(params) if learns else None
