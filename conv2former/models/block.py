"""The Conv2Former block and its two residual branches, usable on their own in any network.

`Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition` - https://arxiv.org/abs/2211.11943

Every module maps (N, C, H, W) to (N, C, H, W) for any H and W, in either memory format.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, LayerScale2d
from timm.models import register_notrace_module
from torch import nn

from ..ops import operators
from ..ops.branch import SpatialMixing
from ..weights.layouts import rename_keys_in_place
from . import compiled, fusion

__all__ = ["NORMS", "Conv2FormerBlock", "ConvMlp", "ConvMod", "make_norm"]

# by timm's names
NORMS: dict[str, Callable[..., nn.Module]] = {
    "layernorm2d": partial(LayerNorm2d, eps=1e-6),
    "batchnorm2d": nn.BatchNorm2d,
}


def make_norm(norm_layer: str, dim: int, **dd: Any) -> nn.Module:
    """Returns a normalisation of (N, dim, H, W); raises a ValueError if there is none of that name."""
    if norm_layer not in NORMS:
        raise ValueError(f"norm_layer must be one of {', '.join(NORMS)}: {norm_layer!r}")
    return NORMS[norm_layer](dim, **dd)


class RenamesForeignKeys(nn.Module):
    """Loads state dicts in the authors' and in birder's layout as if they were in this project's own.

    Also where the module is a part of a bigger one: torch calls this for every module, with the module's own keys.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_keys_in_place(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_kernel_size(kernel_size: int) -> None:
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be a positive odd number, so that 'same' padding exists: {kernel_size!r}")


def _depthwise(dim: int, kernel_size: int, dilation: int, **dd: Any) -> nn.Conv2d:
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, **dd)


@fusion.fusable_mixing(SpatialMixing.MODULATION)
class ConvMod(RenamesForeignKeys):
    """Convolutional modulation: ``proj(conv_dw(gelu(a(h))) * v(h))`` with ``h = norm(x)``.

    The depthwise convolution gathers spatial context the way attention weights do; the product applies it to the
    values. Nothing stands between the convolution and the product: the paper's ablation loses accuracy with an
    activation or a normalisation there. Those ablations are in `ablations.py`; they override `fuse`.

    Args:
        dim: channels C of input and output.
        kernel_size: side of the depthwise kernel, odd. The map may be smaller than the kernel.
        dilation: dilation of the depthwise convolution.
        fused: let an operator of `ops` compute what lies between the 1x1 convolutions, where there is one: on a GPU,
            under torch.compile, and beside a BatchNorm.
        norm_layer: the normalisation, of `NORMS`.
        device, dtype: where and how to create the parameters.

    Raises:
        ValueError: `kernel_size` is even or not positive, or there is no such `norm_layer`.
    """

    fused: bool = True  # for pickles that have no such attribute

    def __init__(
        self,
        dim: int,
        kernel_size: int = 11,
        dilation: int = 1,
        fused: bool = True,
        norm_layer: str = "layernorm2d",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _check_kernel_size(kernel_size)
        self.norm = make_norm(norm_layer, dim, **dd)
        self.a = nn.Conv2d(dim, dim, 1, **dd)
        self.act = nn.GELU()
        self.conv_dw = _depthwise(dim, kernel_size, dilation, **dd)
        self.v = nn.Conv2d(dim, dim, 1, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, H, W) to (N, C, H, W). The residual connection is the block's."""
        x = self.norm(x)
        a, v = self.a(x), self.v(x)
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript leaves out only what stands below this alone
            if self.fused and fusion.is_fusable_mixing(self, a):
                return self.proj(operators.modulate(a, *fusion.weights(self.conv_dw), v))
        return self.proj(self.fuse(self.conv_dw(self.act(a)), v))

    def fuse(self, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Applies the context `a` to the values `v`, both (N, C, H, W)."""
        return a * v


@fusion.fusable_mixing(SpatialMixing.MLP)
class ConvMlp(RenamesForeignKeys):
    """MLP of 1x1 convolutions with a 3x3 depthwise residual: ``fc2(h + gelu(conv_dw(h)))``, ``h = gelu(fc1(norm(x)))``.

    The 3x3 residual is in the authors' code and missing in the paper's text.

    Args:
        dim: channels C of input and output.
        mlp_ratio: hidden channels as a multiple of `dim`.
        dilation: dilation of the 3x3 depthwise convolution.
        fused: let an operator of `ops` compute what lies between the 1x1 convolutions, where there is one: on a GPU,
            under torch.compile, and beside a BatchNorm.
        norm_layer: the normalisation, of `NORMS`.
        device, dtype: where and how to create the parameters.
    """

    fused: bool = True  # for pickles that have no such attribute

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        dilation: int = 1,
        fused: bool = True,
        norm_layer: str = "layernorm2d",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_dim = int(dim * mlp_ratio)
        self.norm = make_norm(norm_layer, dim, **dd)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act = nn.GELU()
        self.conv_dw = _depthwise(hidden_dim, 3, dilation, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, H, W) to (N, C, H, W). The residual connection is the block's."""
        x = self.fc1(self.norm(x))
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.fused and fusion.is_fusable_mixing(self, x):
                return self.fc2(operators.mlp_mix(x, *fusion.weights(self.conv_dw)))
        x = self.act(x)
        x = x + self.act(self.conv_dw(x))
        return self.fc2(x)


@register_notrace_module  # a leaf to timm's fx tracer, see backbone.py
@fusion.fusable_block
class Conv2FormerBlock(RenamesForeignKeys):
    """One residual block: convolutional modulation, then the MLP, each with layer scale and drop path.

    Args:
        dim: channels C of input and output.
        kernel_size: side of the modulation's depthwise kernel, odd.
        mlp_ratio: hidden channels of the MLP as a multiple of `dim`.
        drop_path: probability, in [0, 1), to skip a branch for a sample while training.
        ls_init_value: initial layer scale, one learned value per channel; None for no layer scale. Inside a deep
            network the authors start at 1e-6, so a fresh block is close to the identity.
        dilation: dilation of both depthwise convolutions.
        mod_layer: the modulation's class, `ConvMod` or one of its ablations.
        fused: let `ops` compute the block, in less time and memory, wherever that gives the same; False for the
            modules alone.
        recompute: there, compute cheap maps again in the backward pass instead of saving them.
        norm_layer: the normalisation before each branch, of `NORMS`. `ops` computes blocks with 'layernorm2d'.
        device, dtype: where and how to create the parameters.

    Raises:
        ValueError: `kernel_size` is even or not positive, `drop_path` is not in [0, 1), or there is no such
            `norm_layer`.
    """

    fused: bool = True  # for pickles that have no such attributes
    recompute: bool = True
    compiled: Any = None  # torch.compile's backend, once `compiled.compile_blocks` was called

    def __init__(
        self,
        dim: int,
        kernel_size: int = 11,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        ls_init_value: float | None = 1e-6,
        dilation: int = 1,
        mod_layer: type[ConvMod] = ConvMod,
        fused: bool = True,
        recompute: bool = True,
        norm_layer: str = "layernorm2d",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1): {drop_path!r}")
        self.attn = mod_layer(dim, kernel_size, dilation, fused, norm_layer, **dd)
        self.ls1 = nn.Identity() if ls_init_value is None else LayerScale2d(dim, ls_init_value, **dd)
        self.mlp = ConvMlp(dim, mlp_ratio, dilation, fused, norm_layer, **dd)
        self.ls2 = nn.Identity() if ls_init_value is None else LayerScale2d(dim, ls_init_value, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.fused, self.recompute = fused, recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        if not torch.jit.is_scripting():
            if self.compiled is not None and fusion.runs_compiled(self, x):
                return compiled.forward(self, x)
            if self.fused and fusion.is_fusable(self, x):
                return fusion.forward([self], x)
        x = x + self.drop_path(self.ls1(self.attn(x)))
        x = x + self.drop_path(self.ls2(self.mlp(x)))
        return x
