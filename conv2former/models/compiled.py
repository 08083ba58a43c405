"""Blocks compiled by torch.compile, one by one: regional compilation, for training.

The blocks of a stage are alike, so one program computes them all, and a network has four, whatever its depth. Compiling
the network in one piece takes several times as long, and the more the deeper it is. Stem, downsampling and head run as
they are: each is there once, has few operations, and has convolutions whose backward pass could lose channels_last
memory in Inductor (pytorch issue 189239). In a standard block there is no convolution left for the compiler: the 1x1
ones are matrix products, and the depthwise ones are in the operators of `ops`.

What differs from block to block must not be part of the program. That is drop path's probability, so its draws come
from outside, as do a block's parameters. What is saved for the backward pass is what `ops.autograd` saves: the compiler
by itself would save twice as much.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from timm.layers import LayerScale2d
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .. import _private
from ..errors import UserError, first_line
from ..ops import functional, operators
from ..ops.backends import supports_operators
from ..ops.branch import BranchParams, BranchSpec, SpatialMixing
from ..ops.tensors import autocast_dtype, nchw, nhwc, without_autocast
from . import fusion

__all__ = ["compile_blocks", "forward"]

# Programs in a process: four shapes of blocks, times the sizes of images that grow, times those of a smaller last batch
MOST = 64


class _Programs(NamedTuple):
    """What blocks are computed with: standard ones by their parameters, others by their modules."""

    branches: Callable[..., Tensor]
    modules: Callable[..., Tensor]


def compile_blocks(blocks: Iterable[Any], backend: str | Callable = "inductor") -> None:
    """Lets blocks train with compiled code; without gradients, and in evaluation mode, they run as they are.

    State dicts stay as they are, and blocks can be copied and pickled. A program is compiled when the first block of
    its shape runs on a map of a new size, in some seconds.

    Args:
        blocks: `Conv2FormerBlock`s.
        backend: torch.compile's.

    Raises:
        UserError: there is no torch.compile here, as for a Python that is newer than PyTorch.
    """
    try:
        _programs(backend)
    except RuntimeError as e:
        raise _failed(e) from e
    for block in blocks:
        block.compiled = backend


@functools.cache
def _programs(backend: str | Callable) -> _Programs:
    _private.allow_recompiling(MOST)
    _private.keep_programs_whole()
    _private.hush_about_checkpoints()
    # dynamic=False: or maps of the second shape, which are those of the second stage, would count as maps of any shape
    return _Programs(*(torch.compile(part, backend=backend, dynamic=False) for part in (_branches, _modules)))


def _failed(error: BaseException) -> UserError:
    reason = first_line(getattr(error, "inner_exception", error))
    return UserError(f"torch.compile cannot compile the network's blocks here ({reason}): set train.compile: false")


def forward(block: Any, x: Tensor) -> Tensor:
    """Computes a block, (N, C, H, W) to (N, C, H, W); `fusion.runs_compiled` must have returned True, just before.

    Raises:
        UserError: it cannot be compiled.
    """
    try:
        return _forward(block, x)
    except _private.compiler_errors() as e:
        raise _failed(e) from e


def _forward(block: Any, x: Tensor) -> Tensor:
    programs = _programs(block.compiled)
    dtype = autocast_dtype(x) or x.dtype
    if not (block.fused and fusion.is_fusable(block, x)):
        out_dtype = _sum_dtype(block, torch.promote_types(x.dtype, dtype))
        draws = fusion.drop_masks([block.drop_path] * 2, x, [out_dtype] * 2)
        masks = [_mask(draw, x, out_dtype) for draw in draws]
        return programs.modules(block, x.to(out_dtype), *masks)
    calls = fusion.calls_of([block], x, dtype)
    out_dtype = calls[-1].spec.out_dtype
    masks = [_mask(call.mask, x, out_dtype) for call in calls]
    specs, params = [call.spec for call in calls], [call.params.tensors() for call in calls]
    x = x.contiguous(memory_format=torch.channels_last)
    with without_autocast(x):  # the types are in the specs
        # a stage's first map has the type of the convolution before, all others that of the residual sum
        return programs.branches(specs, params, x.to(out_dtype), masks)


def _sum_dtype(block: Any, dtype: torch.dtype) -> torch.dtype:
    """Returns the type of a block's result, whose branches have the type `dtype` before layer scale."""
    for scale in (block.ls1, block.ls2):
        if isinstance(scale, LayerScale2d):
            dtype = torch.promote_types(dtype, scale.gamma.dtype)
    return dtype


def _mask(mask: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns drop path's factors, of ones where there are none: the first block has no drop path, as others have."""
    return x.new_ones((x.shape[0], 1, 1, 1), dtype=dtype) if mask is None else mask.to(dtype)


# ------------------------------------------------------------------------------------------------------- the programs


def _modules(block: Any, x: Tensor, modulation_mask: Tensor, mlp_mask: Tensor) -> Tensor:
    x = x + block.ls1(block.attn(x)) * modulation_mask
    return x + block.ls2(block.mlp(x)) * mlp_mask


def _branches(specs: list[BranchSpec], params: list[tuple[Any, ...]], x: Tensor, masks: list[Tensor]) -> Tensor:
    def compute(x: Tensor) -> Tensor:
        for spec, tensors, mask in zip(specs, params, masks, strict=True):
            x = functional.residual_branch(spec, BranchParams.from_tensors(tensors), x, mask, _mix_of(spec, tensors, x))
        return x

    if not specs[0].recompute:
        return compute(x)
    return checkpoint(compute, x, use_reentrant=False, context_fn=_contexts, preserve_rng_state=False)


def _mix_of(spec: BranchSpec, params: tuple[Any, ...], x: Tensor) -> Callable[..., Tensor] | None:
    """Returns the operator for a branch's spatial mixing, or None where the formula is to be compiled."""
    kernel_size = BranchParams.from_tensors(params).conv_weight.shape[-1]
    if not supports_operators(x.to(spec.dtype), kernel_size, compiles=True):
        return None
    return _modulate if spec.mixing is SpatialMixing.MODULATION else _mlp_mix


def _modulate(a: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nhwc(operators.modulate(nchw(a), weight, bias, nchw(v)))


def _mlp_mix(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nhwc(operators.mlp_mix(nchw(u), weight, bias))


# --------------------------------------------------------------------------------- what is saved for the backward pass

# Results of matrix products and of the large depthwise convolution; the others take little time to compute again.
_SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,  # where the formula is compiled
    torch.ops.conv2former.modulate.default,
}


def _policy(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


# By which torch.compile knows the policy again in its cache; without it torch 2.14 does not use the cache
_contexts.cache_hash = f"conv2former saves {sorted(map(str, _SAVED))}"  # type: ignore[attr-defined]
