"""The block's two halves, each as one step: the function of `block.py` in less time and less memory.

A half is ``x + mask * gamma * linear(middle(linear(norm(x))))``, where the linears are the 1x1 convolutions; `_formula`
is that sentence as code. What lies in the middle is `_Modulation` or `_Mixing`: on a CPU the compiled functions of
`compiled.py`, or PyTorch's operations if there is no compiler; on an NVIDIA GPU the Triton kernels of `kernels.py`.
Three things save memory and time:

- Of the maps between x and the result only those are kept for the backward pass that are dear to compute again: the
  results of the first linears and of the large depthwise convolution. The norm, GELU, the 3x3 convolution and the
  product are computed again.
- The last linear's result is not kept for the gradient of layer scale, which follows from that of the weights.
- On a CPU a few images at a time go through all of a half, so that much of what one operation writes is still in the
  cache when the next one reads it.

`applies` says when a block can take this way: it is the standard one, and nobody looks inside. With hooks, exchanged
layers, TorchScript, torch.compile, torch.export, torch.func and the like the plain formula runs, in `block.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, LayerScale2d
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import compiled, cpu_ops, kernels

if TYPE_CHECKING:
    from .block import Conv2FormerBlock, ConvMlp, ConvMod

__all__ = [
    "applies",
    "channels_last",
    "convolve",
    "forward",
    "forward_norm",
    "forward_stem",
    "kernel_applies",
    "norm_applies",
    "stem_applies",
    "weights",
]

# Hidden values that go through a half together on a CPU: some MB for each thread, the size of a cache. Of the threads
# at the start, because their number may change before the backward pass.
CHUNK = 2**20 * torch.get_num_threads()
aten = torch.ops.aten


def applies(block: Conv2FormerBlock, x: Tensor) -> bool:
    """Says whether `forward` computes for `x` what the block's modules would, with nobody to notice the difference.

    On a GPU `x` must lie in channels_last memory, which is what the backbone gives to its blocks.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed(x) or x.dim() != 4:
        return False
    if not (x.is_cpu or x.is_cuda):
        return False
    if _is_anyone_looking() or not _is_standard(block, _weight_dtype(x)):
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
    if not torch.compiler.is_compiling() and _transformed(x):
        return False
    exact = type(half.act) is nn.GELU and half.act.approximate == "none" and not _is_watched(half.act)
    return exact and _is_conv_dw(half.conv_dw, half.conv_dw.weight.dtype)


def weights(layer: Any) -> tuple[Tensor, Tensor]:
    """Returns a layer's weight and bias."""
    return layer.weight, layer.bias


def _transformed(x: Tensor) -> bool:
    """Says whether torch.func or forward-mode differentiation is at work, or `x` is more than a tensor."""
    functional = torch._C._functorch.peek_interpreter_stack() is not None
    return functional or forward_ad._current_level >= 0 or type(x) is not Tensor


def _is_anyone_looking() -> bool:
    """Says whether there are hooks on all modules, or a mode that is shown every operation, such as make_fx's.

    A mode that wants to be shown those of the fast way says so with an attribute `takes_fused`.
    """
    modes = _get_current_dispatch_mode_stack()
    return nn_module._has_any_global_hook() or not all(getattr(mode, "takes_fused", False) for mode in modes)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _computes_in(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Returns the type to compute with where autocast, or the weights, say `dtype`: float32 where a CPU has no such.

    What is kept for the backward pass, and what is returned, is of `dtype` all the same.
    """
    return torch.float32 if x.is_cpu and not cpu_ops.multiplies(dtype) else dtype


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """Returns a context without autocast; an empty one, which is cheaper, where there is none anyway."""
    return nullcontext() if _autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def _weight_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the type that weights must have for `x`; None if autocast would do something out of the ordinary."""
    autocast = _autocast_dtype(x)
    if autocast is None:
        return x.dtype
    return torch.float32 if x.dtype in (torch.float32, autocast) else None


def _is_standard(block: Conv2FormerBlock, dtype: torch.dtype | None) -> bool:
    from .block import ConvMlp, ConvMod  # which import this file

    attn, mlp = block.attn, block.mlp
    if type(attn) is not ConvMod or type(mlp) is not ConvMlp:
        return False
    # This is done for every block in every step. A module's attributes take ten times as long as these dictionaries.
    attns, mlps, rest = attn._modules, mlp._modules, block._modules
    drop_path: Any = rest["drop_path"]
    for layer in (attns["a"], attns["v"], attns["proj"], mlps["fc1"], mlps["fc2"]):
        if not _is_linear(layer, dtype):
            return False
    for layer in (attns["conv_dw"], mlps["conv_dw"]):
        if not _is_conv_dw(layer, dtype):
            return False
    for layer in (attns["norm"], mlps["norm"]):
        if type(layer) is not LayerNorm2d or not _is_plain(layer, dtype):
            return False
    for layer in (attns["act"], mlps["act"]):
        if type(layer) is not nn.GELU or layer.approximate != "none" or _is_watched(layer):
            return False
    for layer in (rest["ls1"], rest["ls2"]):
        if not (type(layer) is nn.Identity or _is_scale(layer, dtype)) or _is_watched(layer):
            return False
    if type(drop_path) not in (DropPath, nn.Identity) or _is_watched(drop_path):
        return False
    return mlp.conv_dw.kernel_size == (3, 3) and not _is_watched(attn) and not _is_watched(mlp)


def _is_watched(layer: Any) -> bool:
    own = layer.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own or "fuse" in own or "_conv_forward" in own


def _is_plain(layer: Any, dtype: torch.dtype | None) -> bool:
    """Says whether a layer has ordinary weights of that type, none with an arithmetic of its own, and no hooks."""
    own = layer._parameters
    return _is_weight(own.get("weight"), dtype) and _is_weight(own.get("bias"), dtype) and not _is_watched(layer)


def _is_weight(weight: Any, dtype: torch.dtype | None) -> bool:
    return (type(weight) is nn.Parameter or type(weight) is Tensor) and weight.dtype is dtype


def _is_scale(layer: Any, dtype: torch.dtype | None) -> bool:
    return type(layer) is LayerScale2d and _is_weight(layer._parameters.get("gamma"), dtype)


def _is_linear(layer: Any, dtype: torch.dtype | None) -> bool:
    if type(layer) is not nn.Conv2d or not _is_plain(layer, dtype):
        return False
    return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1


def _is_conv_dw(layer: Any, dtype: torch.dtype | None) -> bool:
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or not _is_plain(layer, dtype):
        return False
    k = layer.kernel_size[0]
    same = layer.kernel_size == (k, k) and k % 2 == 1 and layer.padding == (k // 2, k // 2)
    depthwise = layer.in_channels == layer.out_channels == layer.groups
    return same and depthwise and layer.stride == layer.dilation == (1, 1)


def forward(block: Conv2FormerBlock, x: Tensor) -> Tensor:
    """Computes the block, (N, C, H, W) to (N, C, H, W) in channels_last memory. `applies` must hold."""
    x = x.contiguous(memory_format=torch.channels_last)
    dtype = _autocast_dtype(x) or x.dtype
    layers: Any = block._modules
    with _without_autocast(x):  # the types are chosen here
        x = _half(_Modulation, block, x, dtype, layers["attn"]._modules, ("a", "v"), "proj", layers["ls1"])
        return _half(_Mixing, block, x, dtype, layers["mlp"]._modules, ("fc1",), "fc2", layers["ls2"])


def _half(
    middle: Any,
    block: Conv2FormerBlock,
    x: Tensor,
    dtype: torch.dtype,
    layers: Any,
    ins: tuple[str, ...],
    out: str,
    scale: nn.Module,
) -> Tensor:
    inner, norm = _computes_in(x, dtype), layers["norm"]
    step = _images_at_a_time(x, layers[out].in_channels)
    half = _Half(_way(middle, x, inner), norm.eps, block.recompute, inner, dtype, step)
    gamma = scale._parameters.get("gamma")
    params: tuple = (*_own(norm), *_own(layers["conv_dw"]), *_own(layers[out]), gamma)
    for name in ins:
        params += _own(layers[name])
    mask = _drop_mask(block._modules["drop_path"], x, half, gamma)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, *params)):
        return _Step.apply(half, x, mask, *params)
    return _run(half, x, mask, params, None)


def _own(layer: Any) -> tuple[Tensor, Tensor]:
    """Returns what `weights` does, of a layer whose parameters are its own, in a fifth of the time."""
    parameters = layer._parameters
    return parameters["weight"], parameters["bias"]


def _way(middle: Any, x: Tensor, dtype: torch.dtype) -> Any:
    """Returns the class that computes `middle` fastest where `x` is."""
    if not x.is_cpu:
        return _ON_GPU[middle]
    return _COMPILED[middle] if compiled.usable(dtype) else middle


def _drop_mask(drop_path: Any, x: Tensor, half: _Half, gamma: Tensor | None) -> Tensor | None:
    """Draws what `DropPath` multiplies each image with, (N, 1, 1, 1), as it draws it; None for nothing."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or not drop_path.drop_prob:
        return None
    return drop_path(x.new_ones((x.shape[0], 1, 1, 1), dtype=_out_dtype(half, x, gamma)))


@dataclass(slots=True)
class _Half:
    """What a half consists of besides tensors.

    Attributes:
        middle: the class with the operations between the linears.
        eps: of the norm.
        recompute: compute again in the backward pass what is cheap, instead of keeping it.
        dtype: that the linears, and what lies between them, are computed with.
        kept: that of the maps that are kept for the backward pass, and of the result where nothing else decides.
        step: how many images go through it together.
    """

    middle: Any
    eps: float
    recompute: bool
    dtype: torch.dtype
    kept: torch.dtype
    step: int


def _out_dtype(half: _Half, x: Tensor, gamma: Tensor | None) -> torch.dtype:
    return torch.promote_types(x.dtype, half.kept if gamma is None else gamma.dtype)


def _formula(half: _Half, x: Tensor, mask: Tensor | None, params: tuple) -> Tensor:
    """What a half computes, (N, C, H, W) to (N, C, H, W), in plain PyTorch: for a second derivative."""
    norm_w, norm_b, conv_w, conv_b, out_w, out_b, gamma, *ins = params
    h = F.layer_norm(_nhwc(x).to(norm_w.dtype), norm_w.shape, norm_w, norm_b, half.eps).to(half.dtype)
    us = [F.linear(h, w, b) for w, b in _linears(half, ins)]
    ((out_w, out_b),) = _linears(half, (out_w, out_b))
    y = F.linear(half.middle.formula(us, *_cast(half, conv_w, conv_b)), out_w, out_b)
    y = _nchw(y if gamma is None else y * gamma)
    return (x + (y if mask is None else y * mask)).to(_out_dtype(half, x, gamma))


def _pairs(flat: Any) -> Any:
    return zip(flat[::2], flat[1::2], strict=True)


def _cast(half: _Half, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(half.dtype) for tensor in tensors]


def _matrix(half: _Half, weight: Tensor) -> Tensor:
    """Returns a 1x1 convolution's weight as a matrix (out, in) in the half's type."""
    return weight.to(half.dtype).flatten(1)


def _linears(half: _Half, params: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns what `F.linear` takes, for weights and biases of 1x1 convolutions in turns."""
    return [(_matrix(half, w), b.to(half.dtype)) for w, b in _pairs(params)]


def _as_they_are(half: _Half, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Takes the place of `_cast` for the compiled functions, which compute in float32 at least."""
    return tensors


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
    dtype = _out_dtype(half, x, gamma)
    if kept is None and half.middle.infer_from is not None and dtype == norm_w.dtype:
        x = x.to(dtype)  # which it would be in the sum, too
        if compiled.takes_pixels(_nhwc(x), dtype, half.dtype):
            return _infer(half, x, mask, params)
    xs = _nhwc(x)
    out = torch.empty_like(xs, dtype=dtype)
    conv_w, conv_b = half.middle.conv_weights(half, conv_w, conv_b)
    (out_w, out_b), *linears = _linears(half, (out_w, out_b, *ins))
    for images, m, result in _in_parts(half.step, xs, mask, out):
        h, *stats = _norm(half, images, norm_w, norm_b, kept is not None)
        if kept is None:
            s = half.middle.infer(h, linears, conv_w, conv_b)
        else:
            us = [half.middle.linear(h, w, b) for w, b in linears]
            s, *dear = half.middle.forward(us, conv_w, conv_b, half.recompute)
            kept += [t.to(half.kept) for t in (*us, *dear)]
            if not half.recompute:
                kept += [h.to(half.kept), *stats]
        y = half.middle.linear(s, out_w, out_b)
        _add_scaled(images, y, gamma, m, result)
    return _nchw(out)


def _infer(half: _Half, x: Tensor, mask: Tensor | None, params: tuple) -> Tensor:
    """Does what `_run` does, with compiled functions and nothing kept; x is in the result's type.

    They add the biases of the linears, and all parts are computed in the same memory.
    """
    norm_w, norm_b, conv_w, conv_b, out_w, out_b, gamma, *ins = params
    wo, *ws = [_matrix(half, w).t() for w in (out_w, *ins[::2])]
    xs = _nhwc(x)
    out, first = torch.empty_like(xs), xs[: half.step]
    h = torch.empty_like(first, dtype=half.dtype)
    n, height, width, _ = first.shape
    us = [h.new_empty((n, height, width, w.shape[1])) for w in ws]
    for images, m, result in _in_parts(half.step, xs, mask, out):
        if images.shape[0] < n:  # the last ones
            n = images.shape[0]
            h, us = h[:n], [u[:n] for u in us]
        compiled.norm(images, norm_w, norm_b, half.eps, half.dtype, stats=False, out=h)
        rows = _rows(h)
        for u, w in zip(us, ws, strict=True):
            torch.mm(rows, w, out=_rows(u))
        s = half.middle.infer_from(us, ins[1::2], conv_w, conv_b)
        torch.mm(_rows(s), wo, out=rows)
        compiled.add_scaled(images, h, gamma, m, result, out_b)
    return _nchw(out)


def _norm(half: _Half, x: Tensor, weight: Tensor, bias: Tensor, stats: bool = True) -> tuple[Any, ...]:
    """Returns the layer norm of x in the half's type, and with `stats` each pixel's mean and reciprocal deviation."""
    if compiled.takes_pixels(x, weight.dtype, half.dtype):
        return compiled.norm(x, weight, bias, half.eps, half.dtype, stats)
    h, mean, rstd = aten.native_layer_norm(x.to(weight.dtype), weight.shape, weight, bias, half.eps)
    return h.to(half.dtype), mean, rstd


def _norm_gradient(
    dh: Tensor, x: Tensor, stats: Sequence[Tensor], weight: Tensor, bias: Tensor, residual: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `_norm`'s weight and bias. That of x is added to `residual` in `out`."""
    if residual.dtype == x.dtype and compiled.takes_pixels(x, weight.dtype, dh.dtype):
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
        y = _run(half, x, mask, params, kept)
        ctx.half, ctx.num_params = half, len(params)
        ctx.save_for_backward(x, mask, *params, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, mask, *saved = ctx.saved_tensors
        params, kept = saved[: ctx.num_params], saved[ctx.num_params :]
        with _without_autocast(x):
            if torch.is_grad_enabled() or _is_batched(grad):
                return _gradient_of_formula(ctx, grad, x, mask, params)
            learns = any(ctx.needs_input_grad[3:])
            return None, *_gradient(ctx.half, grad, x, mask, params, kept, learns)


def _is_batched(grad: Tensor) -> bool:
    """Says whether a gradient stands for many, as in a vectorised Jacobian."""
    return _transformed(grad) or torch._C._functorch.is_legacy_batchedtensor(grad)


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
    conv_w, conv_b = half.middle.conv_weights(half, conv_w, conv_b)
    wo, *ws = [_matrix(half, w) for w in (out_w, *ins[::2])]
    xs, grads = _nhwc(x), _nhwc(grad).contiguous()
    dx = torch.empty_like(xs)
    scale = gamma  # of the last linear's gradient, or of its weights where these are the fewer numbers
    if gamma is not None and wo.numel() < xs.numel() and half.dtype != torch.float16:  # whose range ends too early
        wo, scale = _matrix(half, out_w * gamma.view(-1, 1, 1, 1)), None
    parts = _in_parts(half.step, xs, grads, mask, dx)
    each = len(kept) // len(parts)
    for number, (images, dout, m, result) in enumerate(parts):
        mine = [t.contiguous() for t in kept[number * each :][:each]]  # hooks on saved tensors may have changed that
        if half.recompute:
            h, *stats = _norm(half, images, norm_w, norm_b)
        else:
            *mine, h, mean, rstd = mine
            h, stats = h.to(half.dtype), [mean, rstd]
        us, dear = _cast(half, *mine[: len(ws)]), _cast(half, *mine[len(ws) :])
        if half.recompute:
            dear = half.middle.again(us, dear, conv_w, conv_b)
        dy = dout if m is None else dout * m
        ds = (dy if scale is None else dy * scale).to(half.dtype) @ wo
        s, dus, (dconv_w, dconv_b, *du_sums) = half.middle.backward(ds, us, dear, conv_w, conv_b, learns)
        dh = dus[0] @ ws[0]
        for du, w in zip(dus[1:], ws[1:], strict=True):
            _rows(dh).addmm_(_rows(du), w)
        dnorm = _norm_gradient(dh, images, stats, norm_w, norm_b, dout, result)
        if learns:
            du_sums = du_sums or [du.sum((0, 1, 2), dtype=wide) for du in dus]
            found = [*dnorm, dconv_w, dconv_b, (dy.to(half.dtype), s), dy.sum((0, 1, 2), dtype=wide)]
            for du, du_sum in zip(dus, du_sums, strict=True):
                found += [(du, h), du_sum]
            sums = [_plus(total, more, wide) for total, more in zip(sums, found, strict=True)]
    if not learns:
        return _nchw(dx), None, *(None for _ in params)
    dgamma = None
    if gamma is not None:  # so far the sums are those of gamma * out_w and gamma * out_b
        out_w_sum, out_b_sum = sums[4:6]
        dgamma = torch.linalg.vecdot(out_w_sum, out_w.flatten(1).to(wide)) + out_b_sum * out_b
        out_w_sum *= gamma[:, None]
        out_b_sum *= gamma
    sums.insert(6, dgamma)
    return (
        _nchw(dx),
        None,
        *(s if s is None else s.to(norm_w.dtype).view(p.shape) for s, p in zip(sums, params, strict=True)),
    )


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


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
    return more.to(wide) if total is None else total.add_(more)


def channels_last(x: Tensor) -> Tensor:
    """Returns images in the memory format that the fast ways are for, or as they are where there is none."""
    compiling = torch.compiler.is_compiling()
    if type(x) is not Tensor or x.dim() != 4 or kernels.is_exporting() or (not compiling and _transformed(x)):
        return x
    y = x.contiguous(memory_format=torch.channels_last)
    return y if (x.is_cpu and not compiling) or kernels.usable(y, 3) else x


def stem_applies(stem: Any, x: Tensor) -> bool:
    """Says whether `forward_stem` computes for `x` what the stem's modules would, with nobody to notice the difference.

    There is a way for training, where less is kept, and one without gradients, which takes compiled functions.
    """
    trains = torch.is_grad_enabled()
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed(x):
        return False
    if x.dim() != 4 or not (x.is_cpu or x.is_cuda) or _is_anyone_looking():
        return False
    inner = _computes_in(x, _autocast_dtype(x) or x.dtype)
    if not trains and not (x.is_cpu and compiled.takes_gelu_affine(stem.conv1.out_channels, inner)):
        return False
    if x.numel() == 0 or min(x.shape[2:]) < 3:  # too few pixels for statistics, which BatchNorm itself has a word for
        return False
    dtype = _weight_dtype(x)
    convs, norms, acts = (stem.conv1, stem.conv2, stem.conv3), (stem.norm1, stem.norm2), (stem.act1, stem.act2)
    return (
        all(type(layer) is nn.Conv2d and layer.bias is None and layer.weight.dtype == dtype for layer in convs)
        and all(layer.padding_mode == "zeros" and isinstance(layer.padding, tuple) for layer in convs)
        and all(layer.groups == 1 and type(layer.weight) in (nn.Parameter, Tensor) for layer in convs)
        and all(
            type(layer) is nn.BatchNorm2d and _is_plain(layer, dtype) and layer.training == trains for layer in norms
        )
        and all(layer.track_running_stats and layer.momentum is not None for layer in norms)
        and all(type(layer) is nn.GELU and layer.approximate == "none" for layer in acts)
        and not any(_is_watched(layer) for layer in (*convs, *acts))
    )


def forward_stem(stem: Any, x: Tensor) -> Tensor:
    """Computes the stem, (N, in_chans, H, W) to (N, C, H / 4, W / 4). `stem_applies` must hold."""
    dtype = _autocast_dtype(x) or x.dtype
    inner = _computes_in(x, dtype)
    with _without_autocast(x):  # the types are chosen here
        x = _conv2d(stem.conv1, channels_last(x.to(inner)), stem.conv1.weight)  # in this order: fewer bytes are moved
        for norm, conv in ((stem.norm1, stem.conv2), (stem.norm2, stem.conv3)):
            if torch.is_grad_enabled():
                norm.num_batches_tracked.add_(1)
                fits = norm.weight.dtype == inner  # or PyTorch's batch norm does not take it
                x = _NormedConv.apply(
                    x.to(dtype), norm.weight, norm.bias, conv.weight, norm, conv, inner if fits else dtype
                )
                continue
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            shift = norm.bias - norm.running_mean * scale
            y = compiled.gelu_affine(_nhwc(x).contiguous(), scale, shift, overwrite=True)
            x = _conv2d(conv, _nchw(y), conv.weight)
        return x.to(dtype)


def _conv2d(conv: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Computes a convolution without bias in the type of x."""
    return F.conv2d(x, weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation)


def norm_applies(downsample: Any, x: Tensor) -> bool:
    """Says whether `forward_norm` computes for `x` what the downsampling's norm would, with nobody to notice."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled() or _transformed(x):
        return False
    if x.dim() != 4 or not x.is_cpu or not x.is_contiguous(memory_format=torch.channels_last) or _is_anyone_looking():
        return False
    plain = type(downsample.norm) is LayerNorm2d and _is_plain(downsample.norm, x.dtype)
    return (
        plain
        and type(downsample.conv) is nn.Conv2d
        and not _is_watched(downsample.conv)
        and compiled.takes_pixels(_nhwc(x), x.dtype, _computes_in(x, _autocast_dtype(x) or x.dtype))
    )


def forward_norm(downsample: Any, x: Tensor) -> Tensor:
    """Computes a downsampling's norm without gradients, in the type that the convolution after it is computed in.

    That is the compiled function of the blocks. `norm_applies` must hold.
    """
    norm, dtype = downsample.norm, _computes_in(x, _autocast_dtype(x) or x.dtype)
    h, *_ = compiled.norm(_nhwc(x), norm.weight, norm.bias, norm.eps, dtype, stats=False)
    return _nchw(h)


def convolve(conv: Any, x: Tensor) -> Tensor:
    """Calls a convolution, under autocast in a type that the processor has convolutions of.

    Its result has autocast's type all the same.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed(x) or not x.is_cpu:
        return conv(x)
    dtype = _autocast_dtype(x)
    inner = x.dtype if dtype is None else _computes_in(x, dtype)
    if dtype in (None, inner) or conv.weight.dtype != inner:
        return conv(x)
    with _without_autocast(x):
        return conv(x.to(inner)).to(dtype)


class _NormedConv(torch.autograd.Function):
    """``conv(norm(gelu(x)))`` with BatchNorm in training, of which only x is kept; all else is of type `inner`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, conv_w: Tensor, norm: Any, conv: Any, inner: Any) -> Tensor:
        kept, x = x, x.to(inner)
        if _is_compiled(x, w):
            y, mean, var = compiled.gelu_norm(_nhwc(x), w, b, norm.eps)
            y, stats, pixels = _nchw(y), (mean, (var + norm.eps).rsqrt()), y.numel() // len(w)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var * (pixels / (pixels - 1)), norm.momentum)
        else:
            y, *stats = aten.native_batch_norm(
                F.gelu(x), w, b, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
            )
        ctx.save_for_backward(kept, w, b, conv_w, *stats)
        ctx.eps, ctx.conv, ctx.inner = norm.eps, conv, inner
        return _conv2d(conv, y, conv_w).to(kept.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        kept, w, b, conv_w, mean, rstd = ctx.saved_tensors
        with _without_autocast(kept):
            if torch.is_grad_enabled():  # somebody wants to differentiate the gradient
                y = F.batch_norm(F.gelu(kept.to(ctx.inner)), None, None, w, b, training=True, eps=ctx.eps)
                y = _conv2d(ctx.conv, y, conv_w).to(kept.dtype)
                needed = [t for t, needs in zip((kept, w, b, conv_w), ctx.needs_input_grad, strict=False) if needs]
                grads = iter(torch.autograd.grad(y, needed, grad, create_graph=True))
                return *(next(grads) if needs else None for needs in ctx.needs_input_grad[:4]), None, None, None
            x = kept.to(ctx.inner)
            scale = w * rstd
            shift = b - mean * scale
            is_compiled = _is_compiled(x, w)
            if is_compiled:
                y = _nchw(compiled.gelu_affine(_nhwc(x), scale, shift))
            else:
                z = F.gelu(x)
                y = torch.addcmul(_per_channel(shift), z, _per_channel(scale)).to(x.dtype)
            geometry = ctx.conv.stride, ctx.conv.padding, ctx.conv.dilation
            dy, dconv_w, _ = aten.convolution_backward(
                grad.to(x.dtype), y, conv_w.to(x.dtype), None, *geometry, False, [0, 0], 1, [True, True, False]
            )
            dconv_w = dconv_w.to(conv_w.dtype)
            if is_compiled:
                dx, dw, db = compiled.gelu_norm_backward(_nhwc(dy).contiguous(), _nhwc(x), w, mean, rstd)
                return _nchw(dx).to(kept.dtype), dw, db, dconv_w, None, None, None
            dz, dw, db = aten.native_batch_norm_backward(dy, z, w, None, None, mean, rstd, True, ctx.eps, [True] * 3)
            return aten.gelu_backward(dz, x).to(kept.dtype), dw, db, dconv_w, None, None, None


def _is_compiled(x: Tensor, weight: Tensor) -> bool:
    """Says whether compiled functions take GELU and a batch norm of that weight, for x (N, C, H, W)."""
    wide = weight.dtype == torch.promote_types(x.dtype, torch.float32)
    fits = x.is_cpu and wide and x.is_contiguous(memory_format=torch.channels_last)
    return fits and compiled.takes_gelu_affine(x.shape[1], x.dtype)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


class _Modulation:
    """``conv_dw(gelu(a)) * v``, of a and v."""

    linear: Any = staticmethod(cpu_ops.linear)
    conv_weights: Any = staticmethod(_cast)
    infer_from: Any = None  # `infer`, of the linears' results without their biases

    @staticmethod
    def formula(us: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        a, v = us
        return cpu_ops.conv_dw(F.gelu(a), weight, bias) * v

    @staticmethod
    def infer(h: Tensor, linears: list, weight: Tensor, bias: Tensor) -> Tensor:
        a, v = linears
        return cpu_ops.conv_dw(cpu_ops.linear_gelu(h, *a), weight, bias).mul_(cpu_ops.linear(h, *v))

    @staticmethod
    def forward(us: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        a, v = us
        g = F.gelu(a)
        context = cpu_ops.conv_dw(g, weight, bias)
        s = context * v
        return (s, context) if recompute else (s, s, g, context)

    @staticmethod
    def again(us: list[Tensor], dear: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        (a, v), (context,) = us, dear
        return context * v, F.gelu(a), context

    @staticmethod
    def backward(
        ds: Tensor, us: list[Tensor], dear: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool
    ) -> tuple[Tensor, list[Tensor], Sequence[Any]]:
        (a, v), (s, g, context) = us, dear
        dv = ds * context
        dcontext = ds.mul_(v)
        grads = cpu_ops.conv_dw_weight_grad(dcontext, g, weight.shape[-1]) if learns else (None, None)
        da = aten.gelu_backward(cpu_ops.add_conv_dw_input_grad(None, dcontext, weight), a)
        return s, [da, dv], grads


class _Mixing:
    """``g + gelu(conv_dw(g))`` with ``g = gelu(u)``, of u."""

    linear: Any = staticmethod(cpu_ops.linear)
    conv_weights: Any = staticmethod(_cast)
    infer_from: Any = None

    @staticmethod
    def formula(us: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        g = F.gelu(us[0])
        return g + F.gelu(cpu_ops.conv_dw(g, weight, bias))

    @staticmethod
    def infer(h: Tensor, linears: list, weight: Tensor, bias: Tensor) -> Tensor:
        g = cpu_ops.linear_gelu(h, *linears[0])
        return g.add_(cpu_ops.conv_dw_gelu(g, weight, bias))

    @staticmethod
    def forward(us: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        if recompute:
            g = F.gelu(us[0])
            return (g.add_(cpu_ops.conv_dw_gelu(g, weight, bias)),)
        s, *rest = _Mixing.again(us, [], weight, bias)
        return s, s, *rest

    @staticmethod
    def again(us: list[Tensor], dear: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        g = F.gelu(us[0])
        d = cpu_ops.conv_dw(g, weight, bias)
        return F.gelu(d).add_(g), g, d

    @staticmethod
    def backward(
        ds: Tensor, us: list[Tensor], dear: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool
    ) -> tuple[Tensor, list[Tensor], Sequence[Any]]:
        s, g, d = dear
        dd = aten.gelu_backward(ds, d)
        grads = cpu_ops.conv_dw_weight_grad(dd, g, weight.shape[-1]) if learns else (None, None)
        dg = cpu_ops.add_conv_dw_input_grad(ds, dd, weight)
        return s, [aten.gelu_backward(dg, us[0])], grads


class _ModulationCompiled(_Modulation):
    """`_Modulation` with the compiled functions."""

    conv_weights: Any = staticmethod(_as_they_are)

    @staticmethod
    def infer(h: Tensor, linears: list, weight: Tensor, bias: Tensor) -> Tensor:
        a, v = (cpu_ops.linear(h, w, b) for w, b in linears)
        return compiled.modulate(a, v, weight, bias, out=v)

    @staticmethod
    def infer_from(us: list[Tensor], biases: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        a, v = us
        return compiled.modulate(a, v, weight, bias, out=v, biases=biases)

    @staticmethod
    def forward(us: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        context = torch.empty_like(us[0])
        return compiled.modulate(us[0], us[1], weight, bias, context), context

    @staticmethod
    def again(us: list[Tensor], dear: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(dear)

    @staticmethod
    def backward(
        ds: Tensor, us: list[Tensor], dear: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool
    ) -> tuple[Tensor, list[Tensor], Sequence[Any]]:
        s, da, dv, dweight, (dbias, *sums) = compiled.modulate_backward(ds, us[0], us[1], dear[0], weight)
        return s, [da, dv], (dweight, dbias, *sums)


class _MixingCompiled(_Mixing):
    """`_Mixing` with the compiled functions."""

    conv_weights: Any = staticmethod(_as_they_are)

    @staticmethod
    def infer(h: Tensor, linears: list, weight: Tensor, bias: Tensor) -> Tensor:
        u = cpu_ops.linear(h, *linears[0])
        return compiled.mix(u, weight, bias, out=u)

    @staticmethod
    def infer_from(us: list[Tensor], biases: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        return compiled.mix(us[0], weight, bias, out=us[0], u_bias=biases[0])

    @staticmethod
    def forward(us: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        return (compiled.mix(us[0], weight, bias),)

    @staticmethod
    def again(us: list[Tensor], dear: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return ()

    @staticmethod
    def backward(
        ds: Tensor, us: list[Tensor], dear: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool
    ) -> tuple[Tensor, list[Tensor], Sequence[Any]]:
        s, du, dweight, (dbias, *sums) = compiled.mix_backward(ds, us[0], weight, bias)
        return s, [du], (dweight, dbias, *sums)


class _ModulationOnGPU(_Modulation):
    """`_Modulation` with the Triton kernels, which find the context anew in the backward pass; the product is kept."""

    linear: Any = staticmethod(F.linear)

    @staticmethod
    def infer(h: Tensor, linears: list, weight: Tensor, bias: Tensor) -> Tensor:
        return _ModulationOnGPU.forward([F.linear(h, w, b) for w, b in linears], weight, bias, True)[0]

    @staticmethod
    def forward(us: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        a, v = (_nchw(u) for u in us)
        s = _nhwc(kernels.modulate(a, weight, bias, v))
        return s, s

    @staticmethod
    def again(us: list[Tensor], dear: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (dear[0],)

    @staticmethod
    def backward(
        ds: Tensor, us: list[Tensor], dear: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool
    ) -> tuple[Tensor, list[Tensor], Sequence[Any]]:
        a, v = (_nchw(u) for u in us)
        da, dweight, dbias, dv = kernels.modulate_backward(_nchw(ds), a, weight, bias, v)
        return dear[0], [_nhwc(da), _nhwc(dv)], (dweight, dbias)


class _MixingOnGPU(_Mixing):
    """`_Mixing` with the Triton kernels."""

    linear: Any = staticmethod(F.linear)

    @staticmethod
    def infer(h: Tensor, linears: list, weight: Tensor, bias: Tensor) -> Tensor:
        return _MixingOnGPU.again([F.linear(h, *linears[0])], [], weight, bias)[0]

    @staticmethod
    def forward(us: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        (s,) = _MixingOnGPU.again(us, [], weight, bias)
        return (s,) if recompute else (s, s)

    @staticmethod
    def again(us: list[Tensor], dear: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (_nhwc(kernels.mlp_mix(_nchw(us[0]), weight, bias)),)

    @staticmethod
    def backward(
        ds: Tensor, us: list[Tensor], dear: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool
    ) -> tuple[Tensor, list[Tensor], Sequence[Any]]:
        df, dweight, dbias = kernels.mlp_mix_backward(_nchw(ds), _nchw(us[0]), weight, bias)
        return dear[0], [_nhwc(df)], (dweight, dbias)


_COMPILED: dict[Any, Any] = {_Modulation: _ModulationCompiled, _Mixing: _MixingCompiled}
_ON_GPU: dict[Any, Any] = {_Modulation: _ModulationOnGPU, _Mixing: _MixingOnGPU}


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)
