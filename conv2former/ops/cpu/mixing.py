"""The spatial mixing of both branches for `operator_branch.py`, forward and backward.

`Modulation` and `MlpMixing` take PyTorch's operators, `NativeModulation` and `NativeMlpMixing` the native functions.
Maps are (N, H, W, C), weights of depthwise convolutions (C, 1, k, k), biases (C,); `pre_acts` are the results of the
branch's first 1x1 convolutions. All four have:

- `conv_params`: what the depthwise convolution's weight and bias go through first, once for all chunks of a batch.
- `infer`: from the first 1x1 convolutions' input, and their weights (D, C) and biases, to the result; nothing is saved.
- `forward`: the result, and after it what to save besides `pre_acts`: only what is expensive if the rest shall be
  computed again, else everything that `backward` needs.
- `recompute`: what `backward` needs, from `pre_acts` and what was saved, where the rest is computed again.
- `backward`: the result once more, the gradients of `pre_acts`, those of the depthwise convolution's weight and bias
  (or None if nothing `learns`), and the sums over all pixels of the gradients of `pre_acts`, where these are at hand.
  `grad`, the result's gradient, may be overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..branch import SpatialMixing
from ..functional import conv_dw
from ..tensors import cast
from . import native, onednn

__all__ = ["MlpMixing", "Modulation", "NativeMlpMixing", "NativeModulation", "choose_mixing"]

aten = torch.ops.aten


class MixingGrads(NamedTuple):
    """What `backward` returns."""

    mixed: Tensor
    pre_acts: list[Tensor]
    conv: tuple[Any, Any]
    sums: Sequence[Tensor] = ()


class Modulation:
    """``conv_dw(gelu(a)) * v``, of a and v."""

    conv_params: Any = staticmethod(cast)

    @staticmethod
    def infer(h: Tensor, ins: list, weight: Tensor, bias: Tensor) -> Tensor:
        a, v = ins
        return conv_dw(onednn.linear_gelu(h, *a), weight, bias).mul_(onednn.linear(h, *v))

    @staticmethod
    def forward(pre_acts: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        a, v = pre_acts
        gelu_a = F.gelu(a)
        context = conv_dw(gelu_a, weight, bias)
        mixed = context * v
        return (mixed, context) if recompute else (mixed, mixed, gelu_a, context)

    @staticmethod
    def recompute(pre_acts: list[Tensor], saved: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        (a, v), (context,) = pre_acts, saved
        return context * v, F.gelu(a), context

    @staticmethod
    def backward(
        grad: Tensor, pre_acts: list[Tensor], saved: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool
    ) -> MixingGrads:
        (a, v), (mixed, gelu_a, context) = pre_acts, saved
        dv = grad * context
        dcontext = grad.mul_(v)
        conv = onednn.conv_dw_weight_grad(dcontext, gelu_a, weight.shape[-1]) if learns else (None, None)
        da = aten.gelu_backward(onednn.add_conv_dw_input_grad(None, dcontext, weight), a)
        return MixingGrads(mixed, [da, dv], conv)


class MlpMixing:
    """``g + gelu(conv_dw(g))`` with ``g = gelu(u)``, of u."""

    conv_params: Any = staticmethod(cast)

    @staticmethod
    def infer(h: Tensor, ins: list, weight: Tensor, bias: Tensor) -> Tensor:
        g = onednn.linear_gelu(h, *ins[0])
        return g.add_(onednn.conv_dw_gelu(g, weight, bias))

    @staticmethod
    def forward(pre_acts: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        if recompute:
            g = F.gelu(pre_acts[0])
            return (g.add_(onednn.conv_dw_gelu(g, weight, bias)),)
        mixed, *rest = MlpMixing.recompute(pre_acts, [], weight, bias)
        return mixed, mixed, *rest

    @staticmethod
    def recompute(pre_acts: list[Tensor], saved: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        g = F.gelu(pre_acts[0])
        conv = conv_dw(g, weight, bias)
        return F.gelu(conv).add_(g), g, conv

    @staticmethod
    def backward(
        grad: Tensor, pre_acts: list[Tensor], saved: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool
    ) -> MixingGrads:
        mixed, g, conv = saved
        dconv = aten.gelu_backward(grad, conv)
        conv_grads = onednn.conv_dw_weight_grad(dconv, g, weight.shape[-1]) if learns else (None, None)
        dg = onednn.add_conv_dw_input_grad(grad, dconv, weight)
        return MixingGrads(mixed, [aten.gelu_backward(dg, pre_acts[0])], conv_grads)


def _unchanged(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Takes the place of `cast` for the native functions, which compute in float32 at least."""
    return tensors


class NativeModulation:
    """`Modulation` by native functions."""

    conv_params: Any = staticmethod(_unchanged)

    @staticmethod
    def infer(h: Tensor, ins: list, weight: Tensor, bias: Tensor) -> Tensor:
        a, v = (onednn.linear(h, *each) for each in ins)
        return native.modulate(a, v, weight, bias, out=v)

    @staticmethod
    def forward(pre_acts: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        a, v = pre_acts
        context = torch.empty_like(a)
        return native.modulate(a, v, weight, bias, context), context

    @staticmethod
    def recompute(pre_acts: list[Tensor], saved: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(saved)

    @staticmethod
    def backward(
        grad: Tensor, pre_acts: list[Tensor], saved: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool
    ) -> MixingGrads:
        a, v = pre_acts
        mixed, da, dv, dweight, (dbias, *sums) = native.modulate_backward(grad, a, v, saved[0], weight)
        return MixingGrads(mixed, [da, dv], (dweight, dbias), sums)


class NativeMlpMixing:
    """`MlpMixing` by native functions, for which nothing is expensive enough to be saved."""

    conv_params: Any = staticmethod(_unchanged)

    @staticmethod
    def infer(h: Tensor, ins: list, weight: Tensor, bias: Tensor) -> Tensor:
        u = onednn.linear(h, *ins[0])
        return native.mlp_mix(u, weight, bias, out=u)

    @staticmethod
    def forward(pre_acts: list[Tensor], weight: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, ...]:
        return (native.mlp_mix(pre_acts[0], weight, bias),)

    @staticmethod
    def recompute(pre_acts: list[Tensor], saved: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return ()

    @staticmethod
    def backward(
        grad: Tensor, pre_acts: list[Tensor], saved: Sequence[Tensor], weight: Tensor, bias: Tensor, learns: bool
    ) -> MixingGrads:
        mixed, du, dweight, (dbias, *sums) = native.mlp_mix_backward(grad, pre_acts[0], weight, bias)
        return MixingGrads(mixed, [du], (dweight, dbias), sums)


def choose_mixing(mixing: SpatialMixing, dtype: torch.dtype) -> Any:
    """Returns the class that computes a branch's spatial mixing fastest in a type."""
    is_modulation = mixing is SpatialMixing.MODULATION
    if native.usable(dtype):
        return NativeModulation if is_modulation else NativeMlpMixing
    return Modulation if is_modulation else MlpMixing
