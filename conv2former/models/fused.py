"""The block's two halves, each as one step: the function of `block.py` in less time and less memory.

A half is ``x + mask * gamma * linear(middle(linear(norm(x))))``, where the linears are the 1x1 convolutions; `_formula`
is that sentence as code. What lies in the middle is `Modulation` or `Mixing`, in `fused_middles.py`: on a CPU it takes
the compiled functions of `compiled.py`, or PyTorch's operations if there is no compiler; on an NVIDIA GPU the Triton
kernels of `kernels.py`. Three things save memory and time:

- Of the maps between x and the result only those are kept for the backward pass that are dear to compute again: the
  results of the first linears and of the large depthwise convolution. The norm, GELU, the 3x3 convolution and the
  product are computed again.
- The last linear's result is not kept for the gradient of layer scale, which follows from that of the weights.
- On a CPU a few images at a time go through all of a half, so that much of what one operation writes is still in the
  cache when the next one reads it. With compiled functions nothing else is left than these and matrix products, and
  without gradients a stage's blocks are computed in the same memory.

`applies` says when a block can take this way: it is the standard one, and nobody looks inside. With hooks, exchanged
layers, TorchScript, torch.compile, torch.export, torch.func and the like the plain formula runs, in `block.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .. import _private
from . import compiled, kernels
from .fused_common import (
    as_type,
    autocast_dtype,
    computes_in,
    is_anyone_looking,
    is_depthwise,
    is_standard,
    is_transformed,
    is_watched,
    nchw,
    nhwc,
    weight_dtype,
    without_autocast,
)
from .fused_middles import COMPILED, ON_GPU, Mixing, Modulation, cast

if TYPE_CHECKING:
    from .block import ConvMlp, ConvMod

__all__ = ["applies", "forward", "kernel_applies", "row_applies", "weights"]

# Hidden values that go through a half together on a CPU: some MB for each thread that there is at the import, the size
# of a cache.
CHUNK = 2**20 * torch.get_num_threads()
LINE = 32  # numbers in a cache line, of the smallest type
aten = torch.ops.aten
# Of a block's halves: what lies in the middle, the module, the first linears in it, the last, and the layer scale.
HALVES: Any = (
    (Modulation, "attn", ("a", "v"), "proj", "ls1"),
    (Mixing, "mlp", ("fc1",), "fc2", "ls2"),
)


def applies(block: Any, x: Tensor) -> bool:
    """Says whether `forward` computes for `x` what the block's modules would, with nobody to notice the difference.

    On a GPU `x` must lie in channels_last memory, which is what the backbone gives to its blocks.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(x) or x.dim() != 4:
        return False
    if not (x.is_cpu or x.is_cuda):
        return False
    if is_anyone_looking() or not is_standard(block, weight_dtype(x)):
        return False
    return x.is_cpu or kernels.usable(x, block.attn.conv_dw.kernel_size[0])


def kernel_applies(half: ConvMod | ConvMlp, x: Tensor) -> bool:
    """Says whether an operator can take the place of a half's GELU and depthwise convolution, for `x` before them.

    torch.compile comes this way, because it does better what `forward` does besides.
    """
    from .block import ConvMlp, ConvMod  # which import this file

    if type(half) not in (ConvMod, ConvMlp) or type(x) is not Tensor:
        return False
    if not kernels.usable(x, half.conv_dw.kernel_size[0], half.conv_dw.dilation[0]):
        return False
    if not torch.compiler.is_compiling() and is_transformed(x):
        return False
    exact = type(half.act) is nn.GELU and half.act.approximate == "none" and not is_watched(half.act)
    return exact and is_depthwise(half.conv_dw, half.conv_dw.weight.dtype)


def weights(layer: Any) -> tuple[Tensor, Tensor]:
    """Returns a layer's weight and bias."""
    return layer.weight, layer.bias


def row_applies(blocks: Any, x: Tensor) -> bool:
    """Says whether `forward` computes for `x` what a row of blocks would one after the other."""
    if torch.compiler.is_compiling() or type(blocks) is not nn.Sequential or is_watched(blocks):
        return False
    row = blocks._modules.values()
    return len(row) > 0 and all(_is_plain_block(block) for block in row) and all(applies(block, x) for block in row)


def _is_plain_block(block: Any) -> bool:
    from .block import Conv2FormerBlock  # which imports this file

    return type(block) is Conv2FormerBlock and block.fused and not is_watched(block)


def forward(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Computes blocks one after the other, (N, C, H, W) to (N, C, H, W) in channels_last memory.

    `applies` must hold for each.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    dtype = autocast_dtype(x) or x.dtype
    with without_autocast(x):  # the types are chosen here
        if torch.is_grad_enabled():
            for block in blocks:
                for which in (0, 1):
                    x = _run_by(_prepare(which, block, x, dtype), x)
            return x
        # All that is Python first: between products, which fill the caches, each piece takes up to ten times as long.
        blocks = list(blocks)
        x = as_type(x, _result(blocks[0]._modules[HALVES[0][-1]], x, dtype))  # which it would be in the sum, too
        halves = [_prepare(which, block, x, dtype) for block in blocks for which in (0, 1)]
        if all(each.half.is_lean for each in halves):
            return _infer(halves, x)
        for each in halves:
            x = _run_by(each, x)
        return x


class _Prepared(NamedTuple):
    """A half that only lacks its map.

    Attributes:
        half: its description.
        mask: what drop path multiplies each image with, or None.
        params: its parameters: norm, convolution, last linear (a weight and a bias each), layer scale, first linears.
        learns: there will be gradients.
    """

    half: _Half
    mask: Tensor | None
    params: tuple
    learns: bool


def _prepare(which: int, block: Any, x: Tensor, dtype: torch.dtype) -> _Prepared:
    """Does what must be done before a half of a block is computed.

    Args:
        which: 0 for the modulation, 1 for the MLP.
        block: whose half it is.
        x: the map, (N, C, H, W), or one like it.
        dtype: that autocast, or the map, asks for.
    """
    middle, name, ins, out, scale = HALVES[which]
    modules: Any = block._modules  # a module's attributes take ten times as long as these dictionaries
    layers = modules[name]._modules
    inner, norm = computes_in(x, dtype), layers["norm"]
    gamma, result = modules[scale]._parameters.get("gamma"), _result(modules[scale], x, dtype)
    params: tuple = (*_own(norm), *_own(layers["conv_dw"]), *_own(layers[out]), gamma)
    for name in ins:
        params += _own(layers[name])
    learns = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, *params))
    way = _way(middle, x, inner)
    is_lean = way is COMPILED[middle] and x.dtype is result and (block.recompute or not learns)
    is_lean = is_lean and compiled.takes_pixels(nhwc(x), params[0].dtype, inner)
    step = _images_at_a_time(x, layers[out].in_channels)
    half = _Half(way, norm.eps, block.recompute, inner, dtype, result, step, is_lean)
    return _Prepared(half, _drop_mask(modules["drop_path"], x, result), params, learns)


def _result(scale: Any, x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Returns the type of a half's result, for its layer scale, or identity, and what `_prepare` takes."""
    gamma = scale._parameters.get("gamma")
    return torch.promote_types(x.dtype, dtype if gamma is None else gamma.dtype)


def _run_by(prepared: _Prepared, x: Tensor) -> Tensor:
    half, mask, params, learns = prepared
    if learns:
        return _Step.apply(half, x, mask, *params)
    return _infer([prepared], x) if half.is_lean else _run(half, x, mask, params, None)


def _own(layer: Any) -> tuple[Tensor, Tensor]:
    """Returns what `weights` does, of a layer whose parameters are its own, in a fifth of the time."""
    parameters = layer._parameters
    return parameters["weight"], parameters["bias"]


def _way(middle: Any, x: Tensor, dtype: torch.dtype) -> Any:
    """Returns the class that computes `middle` fastest where `x` is."""
    if not x.is_cpu:
        return ON_GPU[middle]
    return COMPILED[middle] if compiled.usable(dtype) else middle


def _drop_mask(drop_path: Any, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Draws what `DropPath` multiplies each image with, (N, 1, 1, 1), as it draws it; None for nothing."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or not drop_path.drop_prob:
        return None
    return drop_path(x.new_ones((x.shape[0], 1, 1, 1), dtype=dtype))


@dataclass(slots=True)
class _Half:
    """What a half consists of besides tensors.

    Attributes:
        middle: the class with the operations between the linears.
        eps: of the norm.
        recompute: compute again in the backward pass what is cheap, instead of keeping it.
        dtype: that the linears, and what lies between them, are computed with.
        kept: that of the maps that are kept for the backward pass.
        result: that of the result.
        step: how many images go through it together.
        is_lean: compiled functions do all but the matrix products, and add the biases of these.
    """

    middle: Any
    eps: float
    recompute: bool
    dtype: torch.dtype
    kept: torch.dtype
    result: torch.dtype
    step: int
    is_lean: bool


def _formula(half: _Half, x: Tensor, mask: Tensor | None, params: tuple) -> Tensor:
    """What a half computes, (N, C, H, W) to (N, C, H, W), in plain PyTorch: for a second derivative."""
    norm_w, norm_b, conv_w, conv_b, out_w, out_b, gamma, *ins = params
    h = F.layer_norm(nhwc(x).to(norm_w.dtype), norm_w.shape, norm_w, norm_b, half.eps).to(half.dtype)
    us = [F.linear(h, w, b) for w, b in _linears(half, ins)]
    ((out_w, out_b),) = _linears(half, (out_w, out_b))
    y = F.linear(half.middle.formula(us, *cast(half.dtype, conv_w, conv_b)), out_w, out_b)
    y = nchw(y if gamma is None else y * gamma)
    return (x + (y if mask is None else y * mask)).to(half.result)


def _pairs(flat: Any) -> Any:
    return zip(flat[::2], flat[1::2], strict=True)


def _matrix(half: _Half, weight: Tensor) -> Tensor:
    """Returns a 1x1 convolution's weight as a matrix (out, in) in the half's type."""
    return as_type(weight, half.dtype).flatten(1)


def _linears(half: _Half, params: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns what `F.linear` takes, for weights and biases of 1x1 convolutions in turns."""
    return [(_matrix(half, w), as_type(b, half.dtype)) for w, b in _pairs(params)]


def _images_at_a_time(x: Tensor, hidden: int) -> int:
    """Returns how many images go through a half together: as many as fit into a CPU's cache; on a GPU all of them."""
    n, _, h, w = x.shape
    return max(1, CHUNK // max(1, h * w * hidden) if x.is_cpu else n)


def _in_parts(step: int, x: Tensor, *others: Tensor | None) -> list[tuple]:
    """Returns `step` images of each tensor at a time; None of those that are None."""
    if x.shape[0] <= step:
        return [(x, *others)]
    parts = x.split(step)
    return list(zip(parts, *(itertools.repeat(None) if t is None else t.split(step) for t in others), strict=False))


def _run(half: _Half, x: Tensor, mask: Tensor | None, params: tuple, kept: list[Tensor] | None) -> Tensor:
    """Computes a half, (N, C, H, W) to (N, C, H, W), a few images at a time.

    What the backward pass needs is added to `kept`, if there is such a list.
    """
    norm_w, norm_b, conv_w, conv_b, out_w, out_b, gamma, *ins = params
    xs = nhwc(x)
    out = torch.empty_like(xs, dtype=half.result)
    conv_w, conv_b = half.middle.conv_weights(half.dtype, conv_w, conv_b)
    (out_w, out_b), *linears = _linears(half, (out_w, out_b, *ins))
    for images, m, result in _in_parts(half.step, xs, mask, out):
        h, *stats = _norm(half, images, norm_w, norm_b, kept is not None)
        if kept is None:
            s = half.middle.infer(h, linears, conv_w, conv_b)
        else:
            us = [half.middle.linear(h, w, b) for w, b in linears]
            s, *dear = half.middle.forward(us, conv_w, conv_b, half.recompute)
            kept += cast(half.kept, *us, *dear)
            if not half.recompute:
                kept += [h.to(half.kept), *stats]
        y = half.middle.linear(s, out_w, out_b)
        _add_scaled(images, y, gamma, m, result)
    return nchw(out)


def _run_lean(half: _Half, x: Tensor, mask: Tensor | None, params: tuple, kept: list[Tensor]) -> Tensor:
    """Does what `_run` does in a lean half, where all parts are computed in the same memory but for what is kept."""
    norm_w, norm_b, _, _, out_w, out_b, gamma, *ins = params
    wo, *ws = matrices = [_matrix(half, w).t() for w in (out_w, *ins[::2])]
    xs, h = nhwc(x), None
    out = torch.empty_like(xs)
    for images, m, result in _in_parts(half.step, xs, mask, out):
        if h is None or len(images) < len(h):  # the first ones, or the last
            h = torch.empty_like(images, dtype=half.dtype)
            s = _like(h, len(wo))
        us = [_like(h, w.shape[1]) for w in ws]
        compiled.norm(images, norm_w, norm_b, half.eps, half.dtype, stats=False, out=h)
        dear = _between(half, params, matrices, (h, us, s), True)
        compiled.add_scaled(images, h, gamma, m, result, out_b)
        kept += cast(half.kept, *us, *dear)
    return nchw(out)


def _infer(halves: list[_Prepared], x: Tensor) -> Tensor:
    """Computes lean halves one after the other, with nothing kept and in memory that they share.

    A residual sum and the norm behind it, which is the next half's, are computed together.
    """
    xs, dtype = nhwc(x), halves[0].half.dtype
    n, height, width, _ = xs.shape
    out, hs = torch.empty_like(xs), torch.empty_like(xs, dtype=dtype)
    matrices = [[w.flatten(1).t() for w in (each.params[4], *each.params[7::2])] for each in halves]
    channels = [tuple(w.shape[1] for w in ws) for _, *ws in matrices]
    pixels = [min(n, each.half.step) * height * width for each in halves]
    memory = xs.new_empty(max(map(_room, pixels, channels)), dtype=dtype)
    maps: dict[tuple, list[Tensor]] = {}
    norms: list[tuple[Tensor, Tensor, float]] = [(*each.params[:2], each.half.eps) for each in halves]
    compiled.norm(xs, *norms[0], dtype, stats=False, out=hs)
    for (half, mask, params, _), mine, cs, norm in zip(halves, matrices, channels, [*norms[1:], None], strict=True):
        mine, (out_b, gamma) = cast(dtype, *mine), params[5:7]
        for images, m, result, h in _in_parts(half.step, xs, mask, out, hs):
            size = len(images), cs
            if size not in maps:
                maps[size] = _cut(memory, (len(images), height, width), cs)
            us = maps[size]
            _between(half, params, mine, (h, us, us[-1]), False)
            compiled.add_scaled(images, h, gamma, m, result, out_b, norm and (*norm, h))
        xs = out  # where the next sums take the place of these
    return nchw(out)


def _between(half: _Half, params: tuple, matrices: list[Tensor], maps: tuple, keep: bool) -> list[Tensor]:
    """Computes what a lean half has between its norm and the residual sum, for a few images.

    Args:
        half, params: as everywhere.
        matrices: the weights of the last linear and the first ones, (in, out) in the half's type.
        maps: the norm's result, in whose place comes the last linear's without its bias; memory for the results of the
            first linears, and for that of the middle, which may be the last of these.
        keep: return what the backward pass needs besides the results of the first linears.
    """
    _, _, conv_w, conv_b, _, _, _, *ins = params
    (h, us, s), (wo, *ws) = maps, matrices
    rows = _rows(h)
    for u, w in zip(us, ws, strict=True):
        torch.mm(rows, w, out=_rows(u))
    dear = half.middle.write(s, us, ins[1::2], conv_w, conv_b, keep)
    torch.mm(_rows(s), wo, out=rows)
    return dear


def _room(pixels: int, channels: Sequence[int]) -> int:
    """Returns how many numbers `_cut` needs."""
    return sum(-(-pixels * c // LINE) * LINE for c in channels)


def _cut(memory: Tensor, size: tuple[int, ...], channels: Sequence[int]) -> list[Tensor]:
    """Returns maps (*size, channels) that lie in `memory` one behind the other, each from a cache line's beginning."""
    pixels, start, maps = math.prod(size), 0, []
    for c in channels:
        maps.append(memory[start : start + pixels * c].view(*size, c))
        start += _room(pixels, [c])
    return maps


def _like(x: Tensor, channels: int) -> Tensor:
    """Returns memory for a map like x (N, H, W, C), of so many channels."""
    return x.new_empty((*x.shape[:-1], channels))


def _norm(half: _Half, x: Tensor, weight: Tensor, bias: Tensor, stats: bool = True) -> tuple[Any, ...]:
    """Returns the layer norm of x in the half's type, and with `stats` each pixel's mean and reciprocal deviation."""
    if half.is_lean or compiled.takes_pixels(x, weight.dtype, half.dtype):
        return compiled.norm(x, weight, bias, half.eps, half.dtype, stats)
    h, mean, rstd = aten.native_layer_norm(x.to(weight.dtype), weight.shape, weight, bias, half.eps)
    return h.to(half.dtype), mean, rstd


def _norm_gradient(
    half: _Half,
    dh: Tensor,
    x: Tensor,
    stats: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `_norm`'s weight and bias. That of x is added to `residual` in `out`."""
    if half.is_lean or (residual.dtype == x.dtype and compiled.takes_pixels(x, weight.dtype, dh.dtype)):
        return compiled.norm_backward(dh, x, stats[0], stats[1], weight, residual, out)
    x, mean, rstd = x.to(weight.dtype), *stats
    dx, dweight, dbias = aten.native_layer_norm_backward(
        dh.to(weight.dtype), x, weight.shape, mean, rstd, weight, bias, [True] * 3
    )
    torch.add(dx, residual, out=out)
    return dweight, dbias


def _add_scaled(x: Tensor, y: Tensor, gamma: Tensor | None, mask: Tensor | None, out: Tensor) -> None:
    """Writes ``x + y * gamma * mask`` to `out`, without the factors that are None."""
    factors = [factor for factor in (gamma, mask) if factor is not None]
    if all(f.dtype == x.dtype for f in (*factors, out)) and compiled.takes_pixels(x, x.dtype, y.dtype):
        compiled.add_scaled(x, y, gamma, mask, out)
    elif factors:
        torch.addcmul(x, y, factors[0] if len(factors) == 1 else factors[0] * factors[1], out=out)
    else:
        torch.add(x, y, out=out)


class _Step(torch.autograd.Function):
    """A half with a gradient."""

    @staticmethod
    def forward(ctx: Any, half: _Half, x: Tensor, mask: Tensor | None, *params: Any) -> Tensor:
        kept: list[Tensor] = []
        y = (_run_lean if half.is_lean else _run)(half, x, mask, params, kept)
        ctx.half, ctx.num_params = half, len(params)
        ctx.save_for_backward(x, mask, *params, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, mask, *saved = ctx.saved_tensors
        params, kept = saved[: ctx.num_params], saved[ctx.num_params :]
        with without_autocast(x):
            if torch.is_grad_enabled() or _is_batched(grad):
                return _gradient_of_formula(ctx, grad, x, mask, params)
            learns = any(ctx.needs_input_grad[3:])
            return None, *_gradient(ctx.half, grad, x, mask, params, kept, learns)


def _is_batched(grad: Tensor) -> bool:
    """Says whether a gradient stands for many, as in a vectorised Jacobian."""
    return is_transformed(grad) or _private.is_legacy_batched(grad)


def _gradient_of_formula(ctx: Any, grad: Tensor, x: Tensor, mask: Tensor | None, params: list) -> tuple:
    """Returns what `_gradient` does, from autograd: where it will be differentiated again, or is batched."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # each its own alias, because autograd would sum up over the places where one parameter stands twice
        tensors: list[Any] = [t if t is None else t.view_as(t) for t in (x, mask, *params)]
        y = _formula(ctx.half, tensors[0], tensors[1], tuple(tensors[2:]))
    needed = [tensor for tensor, needs in zip(tensors, ctx.needs_input_grad[1:], strict=True) if needs]
    grads = iter(torch.autograd.grad(y, needed, grad, create_graph=create_graph))
    return None, *(next(grads) if needs else None for needs in ctx.needs_input_grad[1:])


def _gradient(
    half: _Half, grad: Tensor, x: Tensor, mask: Tensor | None, params: list, kept: list, learns: bool
) -> tuple:
    """Returns the gradients of x, mask (none) and the parameters, of the latter only if the half `learns`."""
    norm_w, norm_b, conv_w, conv_b, out_w, out_b, gamma, *ins = params
    wide = torch.promote_types(norm_w.dtype, torch.float32)  # for sums, which would come to a standstill in 16 bits
    sums: list[Any] = [None] * (len(params) - 1)
    conv_w, conv_b = half.middle.conv_weights(half.dtype, conv_w, conv_b)
    wo, *ws = [_matrix(half, w) for w in (out_w, *ins[::2])]
    xs, grads = nhwc(x), nhwc(grad).contiguous()
    dx = torch.empty_like(xs)
    scale = gamma  # of the last linear's gradient, or of its weights where these are the fewer numbers
    if gamma is not None and wo.numel() < xs.numel() and half.dtype != torch.float16:  # whose range ends too early
        wo, scale = _matrix(half, out_w * gamma.view(-1, 1, 1, 1)), None
    biases = ins[1::2] if half.is_lean else ()  # which us lack
    parts = _in_parts(half.step, xs, grads, mask, dx)
    each = len(kept) // len(parts)
    for number, (images, dout, m, result) in enumerate(parts):
        mine = [t.contiguous() for t in kept[number * each :][:each]]  # hooks on saved tensors may have changed that
        if half.recompute:
            h, *stats = _norm(half, images, norm_w, norm_b)
        else:
            *mine, h, mean, rstd = mine
            h, stats = as_type(h, half.dtype), [mean, rstd]
        us, dear = cast(half.dtype, *mine[: len(ws)]), cast(half.dtype, *mine[len(ws) :])
        if half.recompute:
            dear = half.middle.again(us, dear, conv_w, conv_b)
        dy = dout if m is None else dout * m
        ds = _product(as_type(dy if scale is None else dy * scale, half.dtype), wo)
        s, dus, (dconv_w, dconv_b, *du_sums) = half.middle.backward(ds, us, dear, conv_w, conv_b, learns, *biases)
        dh = _product(dus[0], ws[0])
        for du, w in zip(dus[1:], ws[1:], strict=True):
            _rows(dh).addmm_(_rows(du), w)
        dnorm = _norm_gradient(half, dh, images, stats, norm_w, norm_b, dout, result)
        if learns:
            du_sums = du_sums or [du.sum((0, 1, 2), dtype=wide) for du in dus]
            found = [*dnorm, dconv_w, dconv_b, (as_type(dy, half.dtype), s), dy.sum((0, 1, 2), dtype=wide)]
            for du, du_sum in zip(dus, du_sums, strict=True):
                found += [(du, h), du_sum]
            sums = [_plus(total, more, wide) for total, more in zip(sums, found, strict=True)]
    if not learns:
        return nchw(dx), None, *(None for _ in params)
    dgamma = None
    if gamma is not None:  # so far the sums are those of gamma * out_w and gamma * out_b
        out_w_sum, out_b_sum = sums[4:6]
        dgamma = torch.linalg.vecdot(out_w_sum, out_w.flatten(1).to(wide)) + out_b_sum * out_b
        out_w_sum *= gamma[:, None]
        out_b_sum *= gamma
    sums.insert(6, dgamma)
    return (
        nchw(dx),
        None,
        *(s if s is None else as_type(s, norm_w.dtype).view(p.shape) for s, p in zip(sums, params, strict=True)),
    )


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns ``x @ weight``, (N, H, W, C) by (C, D), in one call instead of the three that `@` makes of it."""
    return torch.mm(_rows(x), weight).view(*x.shape[:-1], weight.shape[1])


def _plus(total: Tensor | None, more: Any, wide: torch.dtype) -> Tensor:
    """Adds to `total`, if there is one, a tensor of `wide`, or of two maps the product over all pixels.

    Args:
        total: what there is so far, of type `wide`, to be overwritten; None for nothing.
        more: the tensor, or a pair (N, H, W, C), (N, H, W, D) whose product is (C, D).
        wide: the type of the sum.
    """
    if isinstance(more, tuple):
        a, b = (_rows(t) for t in more)
        if a.dtype == torch.float16:  # whose range such sums exceed
            a, b = a.to(wide), b.to(wide)
        if total is not None and a.dtype == wide:
            return total.addmm_(a.t(), b)
        more = a.t() @ b
    return as_type(more, wide) if total is None else total.add_(more)
