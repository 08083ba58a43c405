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

from .tensors import add_pixel_product, as_type, matrix, wide_dtype

__all__ = [
    "Backend",
    "BranchCall",
    "BranchGrads",
    "BranchParams",
    "BranchSpec",
    "SpatialMixing",
    "new_grads",
    "out_matrix",
]


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


class BranchCall(NamedTuple):
    """A branch that only lacks its map.

    Attributes:
        spec: what it is.
        params: its parameters.
        mask: what drop path multiplies each image with, (N, 1, 1, 1), or None.
    """

    spec: BranchSpec
    params: BranchParams
    mask: Tensor | None


class Backend(Protocol):
    """A set of kernels for a branch, which is a module with these two functions."""

    def forward(self, calls: Sequence[BranchCall], x: Tensor, saved: list[Tensor] | None) -> Tensor:
        """Computes branches one after the other, (N, C, H, W) to (N, C, H, W), both in channels_last memory.

        Args:
            calls: the branches; one alone where something is saved.
            x: the map.
            saved: takes up what `backward` needs besides x and the parameters; None for no backward pass.
        """

    def backward(
        self, call: BranchCall, x: Tensor, saved: Sequence[Tensor], grad: Tensor, learns: bool
    ) -> tuple[Tensor, BranchGrads | None]:
        """Returns the gradient of x, (N, C, H, W), and those of the parameters, or None if nothing `learns`.

        Args:
            call: the branch.
            x, saved: as in `forward`.
            grad: of the result, (N, C, H, W).
            learns: a parameter needs its gradient.
        """


@dataclass(slots=True)
class BranchGrads:
    """The gradients of `BranchParams`, summed up over the parts of a batch in float32 at least.

    The backends add to them; until `tensors` is called, the last 1x1 convolution's are those of layer scale times
    weight and bias, from which that of layer scale follows: so the result of this convolution need not be saved.
    """

    wide: torch.dtype
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    conv_weight: Tensor | None = None
    conv_bias: Tensor | None = None
    out_weight: Tensor | None = None
    out_bias: Tensor | None = None
    in_weights: tuple[Tensor | None, ...] = (None, None)
    in_biases: tuple[Tensor | None, ...] = (None, None)

    def add_norm(self, weight: Tensor, bias: Tensor) -> None:
        """Adds gradients (C,) of the norm."""
        self.norm_weight, self.norm_bias = self._sum(self.norm_weight, weight), self._sum(self.norm_bias, bias)

    def add_conv(self, weight: Tensor, bias: Tensor) -> None:
        """Adds gradients (D, 1, k, k) and (D,) of the depthwise convolution."""
        self.conv_weight, self.conv_bias = self._sum(self.conv_weight, weight), self._sum(self.conv_bias, bias)

    def add_out(self, grad: Tensor, mixed: Tensor) -> None:
        """Adds those of the last 1x1 convolution.

        Args:
            grad: the gradient of the branch before the residual sum, (N, H, W, C).
            mixed: the convolution's input, (N, H, W, D).
        """
        self.out_weight = add_pixel_product(self.out_weight, as_type(grad, mixed.dtype), mixed, self.wide)
        self.out_bias = self._sum(self.out_bias, grad.sum((0, 1, 2), dtype=self.wide))

    def add_ins(self, h: Tensor, grads: Sequence[Tensor], sums: Sequence[Tensor] = ()) -> None:
        """Adds those of the first 1x1 convolutions.

        Args:
            h: their input, (N, H, W, C).
            grads: the gradients of their results, (N, H, W, D) each.
            sums: of these gradients over all pixels, (D,) each, where they are at hand.
        """
        sums = sums or [grad.sum((0, 1, 2), dtype=self.wide) for grad in grads]
        self.in_weights = tuple(
            add_pixel_product(total, grad, h, self.wide) for total, grad in zip(self.in_weights, grads, strict=False)
        )
        self.in_biases = tuple(self._sum(total, more) for total, more in zip(self.in_biases, sums, strict=False))

    def _sum(self, total: Tensor | None, more: Tensor) -> Tensor:
        return as_type(more, self.wide) if total is None else total.add_(more)

    def tensors(self, params: BranchParams) -> tuple[Tensor | None, ...]:
        """Returns the gradients in a row, in the shapes and the type of `params`, and in the order of its `tensors`."""
        gamma_grad, gamma = None, params.gamma
        out_weight, out_bias = self.out_weight, self.out_bias
        assert out_weight is not None and out_bias is not None  # noqa: PT018
        if gamma is not None:
            gamma_grad = torch.linalg.vecdot(out_weight, params.out_weight.flatten(1).to(self.wide))
            gamma_grad = gamma_grad + out_bias * params.out_bias
            out_weight *= gamma[:, None]
            out_bias *= gamma
        conv = (self.conv_weight, self.conv_bias)
        grads = self.norm_weight, self.norm_bias, *conv, out_weight, out_bias, gamma_grad
        dtype = params.norm_weight.dtype
        return tuple(
            None if grad is None or param is None else as_type(grad, dtype).view(param.shape)
            for grad, param in zip((*grads, *self.in_weights, *self.in_biases), params.tensors(), strict=True)
        )


def new_grads(params: BranchParams) -> BranchGrads:
    """Returns gradients of which nothing is known yet."""
    return BranchGrads(wide_dtype(params.norm_weight.dtype))


def out_matrix(spec: BranchSpec, params: BranchParams, numbers: int) -> tuple[Tensor, Tensor | None]:
    """Returns what a branch's gradient is multiplied with on its way back through the last 1x1 convolution.

    Args:
        spec, params: the branch.
        numbers: in the map.

    Returns:
        The weight (C, D), and the factor (C,) for the gradient before that, or None. The layer scale is in the weight
        if that has fewer numbers than the map; not in float16, whose range ends too early.
    """
    weight, gamma = params.out_weight, params.gamma
    if gamma is None or weight.numel() >= numbers or spec.dtype == torch.float16:
        return matrix(weight, spec.dtype), gamma
    return matrix(weight * gamma.view(-1, 1, 1, 1), spec.dtype), None
