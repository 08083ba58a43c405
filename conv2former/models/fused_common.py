"""What the fast ways share: whether they may be taken, the types that they compute in, and memory layouts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath, LayerNorm2d, LayerScale2d
from torch import Tensor, nn

from .. import _private
from . import cpu_ops

if TYPE_CHECKING:
    from .block import Conv2FormerBlock

__all__ = [
    "as_type",
    "autocast_dtype",
    "computes_in",
    "is_anyone_looking",
    "is_depthwise",
    "is_plain",
    "is_standard",
    "is_transformed",
    "is_watched",
    "nchw",
    "nhwc",
    "weight_dtype",
    "without_autocast",
]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns autocast's type where `x` is, or None without autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def weight_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the type that weights must have for `x`; None if autocast would do something out of the ordinary."""
    autocast = autocast_dtype(x)
    if autocast is None:
        return x.dtype
    return torch.float32 if x.dtype in (torch.float32, autocast) else None


def computes_in(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Returns the type to compute with where autocast, or the weights, say `dtype`: float32 where a CPU has no such.

    What is kept for the backward pass, and what is returned, is of `dtype` all the same.
    """
    return torch.float32 if x.is_cpu and not cpu_ops.multiplies(dtype) else dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Returns a context without autocast; an empty one, which is cheaper, where there is none anyway."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def is_transformed(x: Tensor) -> bool:
    """Says whether torch.func or forward-mode differentiation is at work, or `x` is more than a tensor."""
    return _private.is_transforming() or type(x) is not Tensor


def is_anyone_looking() -> bool:
    """Says whether there are hooks on all modules, or a mode that is shown every operation, such as make_fx's.

    A mode that wants to be shown those of the fast way says so with an attribute `takes_fused`.
    """
    modes = _private.modes_at_work()
    if modes is None or _private.has_global_hooks():
        return True
    return not all(getattr(mode, "takes_fused", False) for mode in modes)


def is_standard(block: Conv2FormerBlock, dtype: torch.dtype | None) -> bool:
    """Says whether a block consists of the layers that it was made with, their weights of that type, and no hooks."""
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
        if not is_depthwise(layer, dtype):
            return False
    for layer in (attns["norm"], mlps["norm"]):
        if type(layer) is not LayerNorm2d or not is_plain(layer, dtype):
            return False
    for layer in (attns["act"], mlps["act"]):
        if type(layer) is not nn.GELU or layer.approximate != "none" or is_watched(layer):
            return False
    for layer in (rest["ls1"], rest["ls2"]):
        if not (type(layer) is nn.Identity or _is_scale(layer, dtype)) or is_watched(layer):
            return False
    if type(drop_path) not in (DropPath, nn.Identity) or is_watched(drop_path):
        return False
    return mlp.conv_dw.kernel_size == (3, 3) and not is_watched(attn) and not is_watched(mlp)


def is_watched(layer: Any) -> bool:
    """Says whether a layer has hooks, or an attribute in the place of one of its methods."""
    own = layer.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own or "fuse" in own or "_conv_forward" in own


def is_plain(layer: Any, dtype: torch.dtype | None) -> bool:
    """Says whether a layer has ordinary weights of that type, none with an arithmetic of its own, and no hooks."""
    own = layer._parameters
    return _is_weight(own.get("weight"), dtype) and _is_weight(own.get("bias"), dtype) and not is_watched(layer)


def _is_weight(weight: Any, dtype: torch.dtype | None) -> bool:
    return (type(weight) is nn.Parameter or type(weight) is Tensor) and weight.dtype is dtype


def _is_scale(layer: Any, dtype: torch.dtype | None) -> bool:
    return type(layer) is LayerScale2d and _is_weight(layer._parameters.get("gamma"), dtype)


def _is_linear(layer: Any, dtype: torch.dtype | None) -> bool:
    if type(layer) is not nn.Conv2d or not is_plain(layer, dtype):
        return False
    return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1


def is_depthwise(layer: Any, dtype: torch.dtype | None) -> bool:
    """Says whether a layer is a plain 'same' padded depthwise convolution, square, odd and not dilated."""
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or not is_plain(layer, dtype):
        return False
    k = layer.kernel_size[0]
    same = layer.kernel_size == (k, k) and k % 2 == 1 and layer.padding == (k // 2, k // 2)
    depthwise = layer.in_channels == layer.out_channels == layer.groups
    return same and depthwise and layer.stride == layer.dilation == (1, 1)


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what `Tensor.to` does, in a tenth of the time if there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


def nchw(x: Tensor) -> Tensor:
    """Returns a view (N, C, H, W) of (N, H, W, C)."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    """Returns a view (N, H, W, C) of (N, C, H, W)."""
    return x.permute(0, 2, 3, 1)
