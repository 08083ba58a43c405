"""What a block's residual branches consist of, as tensors and types: what autograd and the backends hand each other.

A residual branch is ``x + mask * gamma * out(mix(in(norm(x))))``: layer norm, one or two 1x1 convolutions beside each
other, the spatial mixing with its depthwise convolution, a 1x1 convolution back, layer scale and drop path. A block has
two, the modulation and the MLP. `functional.py` says the same in code.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import _private
from .tensors import as_type, matrix

__all__ = [
    "Backend",
    "BranchCall",
    "BranchGradTensors",
    "BranchLinks",
    "BranchParams",
    "BranchSpec",
    "NormAhead",
    "ProductWeights",
    "SpatialMixing",
    "SumGrad",
    "SumGradAhead",
]

# Gradients in the order of `BranchParams.tensors`, in the shapes and types of the parameters.
BranchGradTensors = tuple[Tensor | None, ...]


class SpatialMixing(enum.Enum):
    """What stands between a branch's 1x1 convolutions; the value is how many of these come before it."""

    MODULATION = 2  # conv_dw(gelu(a)) * v, of a and v
    MLP = 1  # g + gelu(conv_dw(g)) with g = gelu(u), of u


@dataclass(frozen=True, slots=True)
class BranchSpec:
    """What there is to know of a branch besides tensors.

    Attributes:
        mixing: which branch it is.
        eps: added to the variance in the norm.
        recompute: compute again in the backward pass what is cheap, instead of saving it.
        dtype: that everything between norm and residual sum is computed in.
        saved_dtype: of the maps that are saved for the backward pass.
        out_dtype: of the result.
    """

    mixing: SpatialMixing
    eps: float
    recompute: bool
    dtype: torch.dtype
    saved_dtype: torch.dtype
    out_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class BranchParams:
    """A branch's parameters, C channels outside and D inside.

    Attributes:
        norm_weight, norm_bias: of the layer norm, (C,).
        conv_weight, conv_bias: of the depthwise convolution, (D, 1, k, k) and (D,).
        out_weight, out_bias: of the last 1x1 convolution, (C, D, 1, 1) and (C,).
        gamma: the layer scale, (C,), or None.
        in_weights, in_biases: of the first 1x1 convolutions, (D, C, 1, 1) and (D,) each, as many as `mixing` takes.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    gamma: Tensor | None
    in_weights: tuple[Tensor, ...]
    in_biases: tuple[Tensor, ...]

    def in_linears(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Returns what `F.linear` takes for the first 1x1 convolutions: weights (D, C) and biases (D,) in a type."""
        pairs = zip(self.in_weights, self.in_biases, strict=True)
        return [(matrix(weight, dtype), as_type(bias, dtype)) for weight, bias in pairs]

    def out_linear(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns what `F.linear` takes for the last 1x1 convolution: weight (C, D) and bias (C,) in a type."""
        return matrix(self.out_weight, dtype), as_type(self.out_bias, dtype)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Returns all of them in a row, as autograd takes them."""
        conv, out = (self.conv_weight, self.conv_bias), (self.out_weight, self.out_bias)
        return self.norm_weight, self.norm_bias, *conv, *out, self.gamma, *self.in_weights, *self.in_biases

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> BranchParams:
        """Returns the parameters that `tensors` gave."""
        norm_weight, norm_bias, conv_weight, conv_bias, out_weight, out_bias, gamma, *ins = tensors
        count = len(ins) // 2
        norm, conv, out = (norm_weight, norm_bias), (conv_weight, conv_bias), (out_weight, out_bias)
        return cls(*norm, *conv, *out, gamma, tuple(ins[:count]), tuple(ins[count:]))


@dataclass
class NormAhead:
    """A branch's layer norm, for the branch before it to compute: there the map is at hand already.

    Attributes:
        weight, bias, eps: of the norm.
        dtype: of its result.
        stats: whether each pixel's mean and reciprocal deviation are wanted, for the backward pass.
        result: the norm's result (N, H, W, C) and the statistics, (N, H, W) float32 each, once it is computed.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    dtype: torch.dtype
    stats: bool
    result: tuple[Tensor, ...] | None = None

    def take(self) -> tuple[Tensor, ...] | None:
        """Returns the result, and forgets it."""
        result, self.result = self.result, None
        return result


class SumGrad(NamedTuple):
    """What goes back through a branch's residual sum ``x + mask * gamma * y``, from the sum's gradient `dout`.

    Attributes:
        dy: ``dout * mask`` in the branch's type, (N, H, W, C).
        scaled, weight: two factors, (N, H, W, C) and (C, D), whose product is the gradient of what the last 1x1
            convolution takes: gamma is in one of them.
        partial: sums of ``dout * mask`` over the pixels in parts, (parts, C) float32.
    """

    dy: Tensor
    scaled: Tensor
    weight: Tensor
    partial: Tensor


@dataclass
class SumGradAhead:
    """The way back through a branch's residual sum, for the branch after it to go: there the gradient is at hand.

    Attributes:
        dtype: of the branch.
        weight, gamma, mask: its last 1x1 convolution's weight, (C, D, 1, 1), its layer scale and drop path's factors.
        result: the sum's gradient (N, C, H, W), its version, and what was computed from it.
    """

    dtype: torch.dtype
    weight: Tensor
    gamma: Tensor | None
    mask: Tensor | None
    result: tuple[Tensor, int, SumGrad] | None = None

    def put(self, grad: Tensor, result: SumGrad) -> None:
        """Keeps what was computed from a gradient, and this: its memory is used for nothing else meanwhile."""
        version = _private.version_of(grad)
        self.result = None if version is None else (grad, version, result)

    def take(self, grad: Tensor) -> SumGrad | None:
        """Returns the result if `grad` is what it was computed from, and forgets it.

        It is not where autograd has added another gradient, or a hook has changed it or put another one in its place.
        """
        kept, self.result = self.result, None
        if kept is None or kept[0] is not grad or kept[1] != _private.version_of(grad):
            return None
        return kept[2]


class BranchLinks(NamedTuple):
    """What a branch computes for its neighbours in a row of branches, and they for it; None for no such neighbour.

    Two neighbours have the same object.

    Attributes:
        norm: the branch's norm, which the one before it may have computed.
        next_norm: that of the branch after it.
        sum_grad: the way back through the branch's residual sum, which the one after it may have gone.
        previous_sum_grad: that of the branch before it.
    """

    norm: NormAhead | None
    next_norm: NormAhead | None
    sum_grad: SumGradAhead | None
    previous_sum_grad: SumGradAhead | None


class ProductWeights(NamedTuple):
    """What the matrix products of a branch need, in the type that they are computed in.

    Attributes:
        in_weight, in_bias: of all first 1x1 convolutions one after the other, (all D, C) and (all D,).
        out_weight, out_bias: of the last one, (C, D) and (C,).
    """

    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


class BranchCall(NamedTuple):
    """A branch that only lacks its map.

    Attributes:
        spec: what it is.
        params: its parameters.
        mask: what drop path multiplies each image with, (N, 1, 1, 1), or None.
        products: where a backend prepares weights, what it has made of them; else None.
        links: with its neighbours, where a backend has such; else None.
    """

    spec: BranchSpec
    params: BranchParams
    mask: Tensor | None
    products: ProductWeights | None = None
    links: BranchLinks | None = None


class Backend(Protocol):
    """A set of kernels for a branch, which is a module with these functions."""

    def forward(self, calls: Sequence[BranchCall], x: Tensor, saved: list[Tensor] | None) -> Tensor:
        """Computes branches one after the other, (N, C, H, W) to (N, C, H, W), both in channels_last memory.

        Args:
            calls: the branches; one alone where something is saved.
            x: the map.
            saved: takes up what `backward` needs besides x and the parameters; None for no backward pass.
        """

    def backward(
        self, call: BranchCall, x: Tensor, saved: Sequence[Tensor], grad: Tensor, learns: bool
    ) -> tuple[Tensor, BranchGradTensors | None]:
        """Returns the gradient of x, (N, C, H, W), and those of the parameters, or None if nothing `learns`.

        Args:
            call: the branch, with its links and without products.
            x, saved: as in `forward`.
            grad: of the result, (N, C, H, W).
            learns: a parameter needs its gradient.
        """
