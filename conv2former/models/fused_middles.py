"""What lies between the linears of a block's half, forward and backward, each in three ways.

`Modulation` and `Mixing` have the formulas and take PyTorch's operations; the classes below them take the compiled
functions of `compiled.py` on a CPU, and the Triton kernels of `kernels.py` on a GPU. `fused.py` calls them. In all:

- `formula`: the sentence in plain PyTorch, for second derivatives.
- `infer`: from the first linears' input and their weights to the result, with nothing kept.
- `forward`: the result, and after it what `backward` needs besides `us`. That is what is dear to compute again if it
  shall be computed again, and else everything.
- `again`: what `backward` needs, from what was dear.
- `backward`: the result once more, the gradients of `us`, and those of the convolution's weight and bias (None if
  nothing `learns`); after them, if the way has them at hand, the sums over all pixels of the gradients of `us`.

The compiled functions can add the first linears' biases themselves, which makes these plain matrix products:

- `write`: writes the result for `us` without their biases to `out`, which may be the last of `us`, and returns what
  `backward` needs besides `us` if that is to be kept, which is what is dear to compute again. `backward` then takes the
  biases, too.

`us` are the results of the first linears. Maps are (N, H, W, C), weights of depthwise convolutions (C, 1, k, k), biases
(C,). `ds`, the result's gradient, may be overwritten. `conv_weights` is what the convolution's weight and bias go
through first, once for all parts of a batch, and `linear` computes `F.linear` as fast as it can be had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compiled, cpu_ops, kernels
from .fused_common import as_type, nchw, nhwc

__all__ = ["COMPILED", "ON_GPU", "Mixing", "Modulation", "cast"]

aten = torch.ops.aten


def cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Returns tensors in a type."""
    return [as_type(tensor, dtype) for tensor in tensors]


def _as_they_are(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Takes the place of `cast` for the compiled functions, which compute in float32 at least."""
    return tensors


class Modulation:
    """``conv_dw(gelu(a)) * v``, of a and v."""

    linear: Any = staticmethod(cpu_ops.linear)
    conv_weights: Any = staticmethod(cast)

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


class Mixing:
    """``g + gelu(conv_dw(g))`` with ``g = gelu(u)``, of u."""

    linear: Any = staticmethod(cpu_ops.linear)
    conv_weights: Any = staticmethod(cast)

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
        s, *rest = Mixing.again(us, [], weight, bias)
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


class _ModulationCompiled(Modulation):
    """`Modulation` with the compiled functions."""

    conv_weights: Any = staticmethod(_as_they_are)

    @staticmethod
    def infer(h: Tensor, linears: list, weight: Tensor, bias: Tensor) -> Tensor:
        a, v = (cpu_ops.linear(h, w, b) for w, b in linears)
        return compiled.modulate(a, v, weight, bias, out=v)

    @staticmethod
    def write(
        out: Tensor, us: list[Tensor], biases: Sequence[Tensor], weight: Tensor, bias: Tensor, keep: bool
    ) -> list[Tensor]:
        context = torch.empty_like(us[0]) if keep else None
        compiled.modulate(us[0], us[1], weight, bias, context, out, biases)
        return [] if context is None else [context]

    @staticmethod
    def forward(us: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        context = torch.empty_like(us[0])
        return compiled.modulate(us[0], us[1], weight, bias, context), context

    @staticmethod
    def again(us: list[Tensor], dear: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(dear)

    @staticmethod
    def backward(
        ds: Tensor, us: list, dear: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool, *biases: Tensor
    ) -> tuple[Tensor, list[Tensor], Sequence[Any]]:
        s, da, dv, dweight, (dbias, *sums) = compiled.modulate_backward(ds, us[0], us[1], dear[0], weight, biases)
        return s, [da, dv], (dweight, dbias, *sums)


class _MixingCompiled(Mixing):
    """`Mixing` with the compiled functions."""

    conv_weights: Any = staticmethod(_as_they_are)

    @staticmethod
    def infer(h: Tensor, linears: list, weight: Tensor, bias: Tensor) -> Tensor:
        u = cpu_ops.linear(h, *linears[0])
        return compiled.mix(u, weight, bias, out=u)

    @staticmethod
    def write(
        out: Tensor, us: list[Tensor], biases: Sequence[Tensor], weight: Tensor, bias: Tensor, keep: bool
    ) -> list[Tensor]:
        compiled.mix(us[0], weight, bias, out, biases[0])
        return []

    @staticmethod
    def forward(us: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        return (compiled.mix(us[0], weight, bias),)

    @staticmethod
    def again(us: list[Tensor], dear: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return ()

    @staticmethod
    def backward(
        ds: Tensor, us: list, dear: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool, *biases: Tensor
    ) -> tuple[Tensor, list[Tensor], Sequence[Any]]:
        s, du, dweight, (dbias, *sums) = compiled.mix_backward(ds, us[0], weight, bias, *biases)
        return s, [du], (dweight, dbias, *sums)


class _ModulationOnGPU(Modulation):
    """`Modulation` with the Triton kernels, which find the context anew in the backward pass; the product is kept."""

    linear: Any = staticmethod(F.linear)

    @staticmethod
    def infer(h: Tensor, linears: list, weight: Tensor, bias: Tensor) -> Tensor:
        return _ModulationOnGPU.forward([F.linear(h, w, b) for w, b in linears], weight, bias, True)[0]

    @staticmethod
    def forward(us: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        a, v = (nchw(u) for u in us)
        s = nhwc(kernels.modulate(a, weight, bias, v))
        return s, s

    @staticmethod
    def again(us: list[Tensor], dear: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (dear[0],)

    @staticmethod
    def backward(
        ds: Tensor, us: list[Tensor], dear: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool
    ) -> tuple[Tensor, list[Tensor], Sequence[Any]]:
        a, v = (nchw(u) for u in us)
        da, dweight, dbias, dv = kernels.modulate_backward(nchw(ds), a, weight, bias, v)
        return dear[0], [nhwc(da), nhwc(dv)], (dweight, dbias)


class _MixingOnGPU(Mixing):
    """`Mixing` with the Triton kernels."""

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
        return (nhwc(kernels.mlp_mix(nchw(us[0]), weight, bias)),)

    @staticmethod
    def backward(
        ds: Tensor, us: list[Tensor], dear: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool
    ) -> tuple[Tensor, list[Tensor], Sequence[Any]]:
        df, dweight, dbias = kernels.mlp_mix_backward(nchw(ds), nchw(us[0]), weight, bias)
        return dear[0], [nhwc(df)], (dweight, dbias)


COMPILED: dict[Any, Any] = {Modulation: _ModulationCompiled, Mixing: _MixingCompiled}
ON_GPU: dict[Any, Any] = {Modulation: _ModulationOnGPU, Mixing: _MixingOnGPU}
