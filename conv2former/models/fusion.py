"""When a block, or its spatial mixing, may be computed by `ops` instead of module by module.

It may if the block consists of the standard layers and nothing looks inside: with hooks, exchanged layers, TorchScript,
torch.compile, torch.export, torch.func and the like the modules run, in `block.py`. What a block consists of is found
out once, and then kept until something in it changes (`_BlockPlan`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_, itemgetter
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from timm.layers import DropPath, LayerNorm2d, LayerScale2d
from torch import Tensor, nn

from .. import _private
from ..ops.autograd import residual_branches
from ..ops.backends import compute_dtype, supports_operators
from ..ops.branch import BranchCall, BranchParams, BranchSpec, SpatialMixing
from ..ops.tensors import as_type, autocast_dtype, is_ordinary, is_transformed

__all__ = [
    "calls_of",
    "draw_together",
    "drop_masks",
    "forward",
    "fusable_block",
    "fusable_mixing",
    "has_global_hooks",
    "has_hooks",
    "is_fusable",
    "is_fusable_mixing",
    "is_fusable_row",
    "is_plain",
    "is_weight",
    "runs_compiled",
    "weight_dtype",
    "weights",
]

_Module = TypeVar("_Module", bound=type)
_mixings: dict[type, SpatialMixing] = {}
_blocks: set[type] = set()


def fusable_mixing(mixing: SpatialMixing) -> Any:
    """Declares that modules of a class, and not of its subclasses, compute a branch with that mixing."""

    def declare(cls: _Module) -> _Module:
        _mixings[cls] = mixing
        return cls

    return declare


def fusable_block(cls: _Module) -> _Module:
    """Declares that blocks of a class, and not of its subclasses, compute their two branches and nothing else."""
    _blocks.add(cls)
    return cls


def weight_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the type that weights must have for `x`; None if autocast would do something out of the ordinary."""
    autocast = autocast_dtype(x)
    if autocast is None:
        return x.dtype
    return torch.float32 if x.dtype in (torch.float32, autocast) else None


def has_global_hooks() -> bool:
    """Returns whether there are hooks on all modules, or a mode that is shown every operation, such as make_fx's.

    A mode that wants to be shown those of `ops` says so with an attribute `allows_fused`.
    """
    modes = _private.modes_at_work()
    if modes is None or _private.has_global_hooks():
        return True
    return not all(getattr(mode, "allows_fused", False) for mode in modes)


def has_hooks(layer: Any) -> bool:
    """Returns whether a layer has hooks, or an attribute in the place of one of its methods."""
    own = layer.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own or "fuse" in own or "_conv_forward" in own


def is_plain(layer: Any, dtype: torch.dtype | None) -> bool:
    """Returns whether a layer has ordinary weights of that type, none with an arithmetic of its own, and no hooks."""
    own = layer._parameters
    return is_weight(own.get("weight"), dtype) and is_weight(own.get("bias"), dtype) and not has_hooks(layer)


def is_weight(weight: Any, dtype: torch.dtype | None) -> bool:
    """Returns whether something is an ordinary weight of that type."""
    return (type(weight) is nn.Parameter or is_ordinary(weight)) and weight.dtype is dtype


def is_fusable(block: Any, x: Tensor) -> bool:
    """Returns whether `forward` computes for `x` what the block's modules would, and nothing could notice.

    On a GPU `x` must lie in channels_last memory, which is what the backbone gives to its blocks.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(x) or x.dim() != 4:
        return False
    if not (x.is_cpu or x.is_cuda) or has_global_hooks():
        return False
    plan = _plan_of(block, weight_dtype(x), x.is_cpu)
    return plan is not None and (x.is_cpu or supports_operators(x, plan.kernel_size))


def is_fusable_row(blocks: Any, x: Tensor) -> bool:
    """Returns whether `forward` computes for `x` what a row of blocks would one after the other."""
    if torch.compiler.is_compiling() or type(blocks) is not nn.Sequential or has_hooks(blocks):
        return False
    row = blocks._modules.values()
    return len(row) > 0 and all(
        type(block) in _blocks
        and block.fused
        and not has_hooks(block)
        and not (block.compiled is not None and runs_compiled(block, x))
        and is_fusable(block, x)
        for block in row
    )


def runs_compiled(block: Any, x: Tensor) -> bool:
    """Returns whether a block for which `compiled.compile_blocks` was called computes `x` so: in training alone."""
    if not block.training or not torch.is_grad_enabled():
        return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(x))


def is_fusable_mixing(branch: Any, x: Tensor) -> bool:
    """Returns whether an operator can take the place of a branch's GELU and depthwise convolution, for `x` before them.

    That is what torch.compile is given, because it does better what `forward` does besides; and on a CPU a branch with
    another norm than `forward` knows.
    """
    if type(branch) not in _mixings or not is_ordinary(x):
        return False
    conv, compiling = branch.conv_dw, torch.compiler.is_compiling()
    alone = not compiling and type(branch.norm) is nn.BatchNorm2d and not has_global_hooks()
    if not supports_operators(x, conv.kernel_size[0], conv.dilation[0], alone=alone):
        return False
    if not compiling and is_transformed(x):
        return False
    return _is_exact_gelu(branch.act) and _is_depthwise(branch.conv_dw, branch.conv_dw.weight.dtype)


def weights(layer: Any) -> tuple[Tensor, Tensor]:
    """Returns the weight and the bias of a layer that has both."""
    return layer.weight, layer.bias


def forward(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Computes blocks one after the other, (N, C, H, W) to (N, C, H, W) in channels_last memory.

    `is_fusable` must have returned True for each, just before.
    """
    inner = compute_dtype(x, autocast_dtype(x) or x.dtype)
    return residual_branches(calls_of(blocks, x, inner), x)


def calls_of(blocks: Iterable[nn.Module], x: Tensor, inner: torch.dtype) -> list[BranchCall]:
    """Returns the branches of blocks, one after the other, with drop path's draws.

    Args:
        blocks: `is_fusable` must have returned True for each, just before.
        x: the first block's map.
        inner: the type to compute with.
    """
    dtype, came_in, calls, drop_paths = autocast_dtype(x) or x.dtype, x.dtype, [], []
    for block in blocks:
        drop_path, plan = block._modules["drop_path"], _plans[block]
        for mixing, eps, params in plan.branches:
            # As PyTorch promotes types in the residual sum; the next branch gets that type.
            came_in = torch.promote_types(came_in, dtype if params.gamma is None else params.gamma.dtype)
            spec = BranchSpec(mixing, eps, block.recompute, inner, dtype, came_in)  # type: ignore[arg-type]
            calls.append(BranchCall(spec, params, None))
            drop_paths.append(drop_path)
    masks = drop_masks(drop_paths, x, [call.spec.out_dtype for call in calls])
    return [call._replace(mask=mask) for call, mask in zip(calls, masks, strict=True)]


def drop_masks(drop_paths: list[Any], x: Tensor, dtypes: list[torch.dtype]) -> list[Tensor | None]:
    """Draws what each `DropPath` multiplies each image with, (N, 1, 1, 1); None for nothing.

    On a CPU the numbers are those that the modules draw. On a GPU, where one launch takes longer than all numbers, they
    are drawn together.
    """
    masks: list[Tensor | None] = [None] * len(drop_paths)
    size = (x.shape[0], 1, 1, 1)
    drawn = [i for i, layer in enumerate(drop_paths) if type(layer) is DropPath and layer.training and layer.drop_prob]
    if x.is_cpu:
        for i in drawn:
            masks[i] = drop_paths[i](x.new_ones(size, dtype=dtypes[i]))
    elif drawn:
        for i, mask in zip(drawn, draw_together([drop_paths[i] for i in drawn], size, x.device), strict=True):
            masks[i] = as_type(mask, dtypes[i])
    return masks


def draw_together(drop_paths: list[Any], size: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Returns what each `DropPath` multiplies each image with, float32 of that size, with four launches for all."""
    keeps = [1 - layer.drop_prob for layer in drop_paths]
    numbers = torch.rand((len(drop_paths), *size), device=device)
    masks = list(numbers.unbind())
    _private.add_all(masks, keeps)
    numbers.floor_()  # 1 where the number was at least 1 - keep, else 0
    scales = [keep if layer.scale_by_keep and keep else 1.0 for layer, keep in zip(drop_paths, keeps, strict=True)]
    _private.divide_all(masks, scales)
    return masks


# ------------------------------------------------------------------------------------------ what a block consists of

# A branch's module in a block, its first 1x1 convolutions, its last one, and the block's layer scale for it.
_BRANCHES = (("attn", ("a", "v"), "proj", "ls1"), ("mlp", ("fc1",), "fc2", "ls2"))
# The attributes of a layer that decide what it computes.
_SETTINGS: dict[type, Callable[[dict[str, Any]], Any]] = {
    nn.Conv2d: itemgetter(
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
    ),
    nn.GELU: itemgetter("approximate"),
    LayerNorm2d: itemgetter("eps"),
}


class _BlockPlan:
    """What was found out about a fusable block, and how to see that it is so no more.

    Whatever decides over a block can be changed at any time: by hooks, other layers, other parameters, `.half()`, a new
    value of an attribute. All of it is looked up here again, in less than half of the time that finding it out takes,
    because this is done for every block in every step.

    Args:
        block: a block for which `_has_standard_layers` holds.
    """

    def __init__(self, block: Any) -> None:
        parts = block._modules
        self.kernel_size: int = parts["attn"]._modules["conv_dw"].kernel_size[0]
        self.branches = [
            (
                _mixings[type(parts[name])],
                parts[name].norm.eps,
                _params_of(parts[name]._modules, ins, out, parts[scale]),
            )
            for name, ins, out, scale in _BRANCHES
        ]
        containers = (parts, parts["attn"]._modules, parts["mlp"]._modules)
        self._children = [(children, tuple(children.values())) for children in containers]
        self._layers = [layer for _, children in self._children for layer in children]
        self._types = [*map(type, self._layers)]
        self._attributes = [layer.__dict__ for layer in self._layers]
        self._sizes = [*map(len, self._attributes)]
        self._settings = [
            (_SETTINGS[type(layer)], layer.__dict__, _SETTINGS[type(layer)](layer.__dict__))
            for layer in self._layers
            if type(layer) in _SETTINGS
        ]
        self._held = [(layer._parameters, name) for layer in self._layers for name in layer._parameters]
        self._params = [parameters[name] for parameters, name in self._held]

    def is_current(self, dtype: torch.dtype | None, is_cpu: bool) -> bool:
        """Returns whether the block is as it was, with weights of that type, on a CPU or elsewhere."""
        for own in self._attributes:
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
            ):
                return False
        # An attribute in the place of a method is one attribute more.
        if [*map(type, self._layers)] != self._types or [*map(len, self._attributes)] != self._sizes:
            return False
        if not all(tuple(children.values()) == before for children, before in self._children):
            return False
        if not all(settings(own) == before for settings, own, before in self._settings):
            return False
        params = [parameters.get(name) for parameters, name in self._held]
        return all(map(is_, params, self._params)) and _kinds(self._params) == {(dtype, is_cpu)}


_plans: WeakKeyDictionary[Any, _BlockPlan] = WeakKeyDictionary()


def _plan_of(block: Any, dtype: torch.dtype | None, is_cpu: bool) -> _BlockPlan | None:
    """Returns the plan of a block, or None if it is not fusable with weights of that type, on a CPU or elsewhere."""
    plan = _plans.get(block)
    if plan is not None and plan.is_current(dtype, is_cpu):
        return plan
    plan = _BlockPlan(block) if _has_standard_layers(block, dtype) else None
    if plan is None or _kinds(plan._params) != {(dtype, is_cpu)}:  # some elsewhere: the modules have an error for that
        _plans.pop(block, None)
        return None
    _plans[block] = plan  # in the place of the one before: another thread may be about to take it
    return plan


def _kinds(params: list[Tensor]) -> set[tuple[torch.dtype, bool]]:
    return {(p.dtype, p.is_cpu) for p in params}


def _params_of(layers: Any, ins: tuple[str, ...], out: str, scale: Any) -> BranchParams:
    conv, last = layers["conv_dw"], layers[out]
    return BranchParams(
        norm_weight=layers["norm"].weight,
        norm_bias=layers["norm"].bias,
        conv_weight=conv.weight,
        conv_bias=conv.bias,
        out_weight=last.weight,
        out_bias=last.bias,
        gamma=scale._parameters.get("gamma"),
        in_weights=tuple(layers[name].weight for name in ins),
        in_biases=tuple(layers[name].bias for name in ins),
    )


def _has_standard_layers(block: Any, dtype: torch.dtype | None) -> bool:
    """Returns whether a block has the layers that it was made with, their weights of that type, and no hooks."""
    attn, mlp = block.attn, block.mlp
    mixings = _mixings.get(type(attn)), _mixings.get(type(mlp))
    if mixings != (SpatialMixing.MODULATION, SpatialMixing.MLP) or has_hooks(attn) or has_hooks(mlp):
        return False
    return (
        all(_is_linear(layer, dtype) for layer in (attn.a, attn.v, attn.proj, mlp.fc1, mlp.fc2))
        and all(_is_depthwise(layer, dtype) for layer in (attn.conv_dw, mlp.conv_dw))
        and mlp.conv_dw.kernel_size == (3, 3)
        and all(type(layer) is LayerNorm2d and is_plain(layer, dtype) for layer in (attn.norm, mlp.norm))
        and all(_is_exact_gelu(layer) for layer in (attn.act, mlp.act))
        and all(_is_scale_or_identity(layer, dtype) for layer in (block.ls1, block.ls2))
        and type(block.drop_path) in (DropPath, nn.Identity)
        and not has_hooks(block.drop_path)
    )


def _is_exact_gelu(layer: Any) -> bool:
    return type(layer) is nn.GELU and layer.approximate == "none" and not has_hooks(layer)


def _is_scale_or_identity(layer: Any, dtype: torch.dtype | None) -> bool:
    is_scale = type(layer) is LayerScale2d and is_weight(layer._parameters.get("gamma"), dtype)
    return (is_scale or type(layer) is nn.Identity) and not has_hooks(layer)


def _is_linear(layer: Any, dtype: torch.dtype | None) -> bool:
    """Returns whether a layer is a plain dense 1x1 convolution."""
    if type(layer) is not nn.Conv2d or not is_plain(layer, dtype):
        return False
    return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1


def _is_depthwise(layer: Any, dtype: torch.dtype | None) -> bool:
    """Returns whether a layer is a plain 'same' padded depthwise convolution, square, odd and not dilated."""
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or not is_plain(layer, dtype):
        return False
    k = layer.kernel_size[0]
    same = layer.kernel_size == (k, k) and k % 2 == 1 and layer.padding == (k // 2, k // 2)
    depthwise = layer.in_channels == layer.out_channels == layer.groups
    return same and depthwise and layer.stride == layer.dilation == (1, 1)
