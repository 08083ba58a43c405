"""The gradients of a residual branch's parameters, summed up over the pieces of a batch that a CPU takes one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..branch import BranchGradTensors, BranchParams, BranchSpec
from ..tensors import add_pixel_product, as_type, matrix, wide_dtype

__all__ = ["BranchGrads", "new_grads", "out_matrix"]


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

    def tensors(self, params: BranchParams) -> BranchGradTensors:
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
