"""The ways to join context and values that the paper compares with the product, and that lose accuracy against it.

Their names and results were read at second hand, without formulas: these are this project's reading of the names,
unverified. They have the parameters of `ConvMod`, so the tensors do not tell which of them they were trained with.
"""

import torch
import torch.nn.functional as F

from .block import ConvMod

__all__ = ["FUSIONS"]


class SumMod(ConvMod):
    """Adds context and values."""

    def fuse(self, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return a + v


class SigmoidMod(ConvMod):
    """Passes the context through a sigmoid, which makes it a gate."""

    def fuse(self, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(a) * v


class L1Mod(ConvMod):
    """Divides the context by the sum of its absolute values over the channels, at each pixel."""

    def fuse(self, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.normalize(a, p=1.0, dim=1, eps=1e-6) * v


class UnitMod(ConvMod):
    """Scales the context linearly into (0, 1], over the pixels of each channel of each image."""

    def fuse(self, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        low = a.amin((2, 3), keepdim=True)
        high = a.amax((2, 3), keepdim=True)
        eps = 1e-6  # a map of one value becomes 1
        return (a - low + eps) / (high - low + eps) * v


FUSIONS: dict[str, type[ConvMod]] = {
    "product": ConvMod,
    "sum": SumMod,
    "sigmoid": SigmoidMod,
    "l1": L1Mod,
    "unit": UnitMod,
}
