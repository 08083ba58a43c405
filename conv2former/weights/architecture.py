"""Which network the tensors of a state dict belong to, by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..variants import find_variant

__all__ = ["CLASSIFIER", "FIRST_CONV", "HEAD", "Architecture", "identify"]

CLASSIFIER = ("head.fc.weight", "head.fc.bias")
HEAD = ("head_conv.", "head.fc.")  # what comes after the last stage
FIRST_CONV = "stem.conv1"


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a state dict tell about its network; the arguments of `Conv2Former` of the same names.

    Attributes:
        dims, depths, kernel_size, mlp_ratio, head_hidden_size: as in the variants' YAML files; `kernel_size` is one
            number if all stages agree, `head_hidden_size` is 0 for a network without its head.
        layer_scale: whether there is one.
        norm_layer: which normalisation the blocks have.
        in_chans, num_classes: channels of the input, size of the classifier (0 without one).
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    mlp_ratio: float
    head_hidden_size: int
    layer_scale: bool
    norm_layer: str
    in_chans: int
    num_classes: int

    @property
    def variant(self) -> str | None:
        """Name of the variant with this shape, or None."""
        return find_variant(
            dims=self.dims,
            depths=self.depths,
            kernel_size=self.kernel_size,
            mlp_ratio=self.mlp_ratio,
            norm_layer=self.norm_layer,
        )

    def num_block_weights(self) -> float:
        """Returns how many weights the blocks have, but for norms and biases."""
        kernels = [self.kernel_size] * len(self.dims) if isinstance(self.kernel_size, int) else self.kernel_size
        one = [c * c * (3 + 2 * self.mlp_ratio) + c * k * k for c, k in zip(self.dims, kernels, strict=True)]
        return sum(float(depth) * weights for depth, weights in zip(self.depths, one, strict=True))

    def __str__(self) -> str:
        shape = f"dims {list(self.dims)}, depths {list(self.depths)}, kernel size {self.kernel_size}"
        return f"{self.variant} ({shape})" if self.variant else f"a Conv2Former with {shape}"


def identify(state_dict: Mapping[str, Any]) -> Architecture | None:
    """Reads the architecture off a state dict in this project's layout; None if it is not a Conv2Former's."""
    blocks: dict[int, set[int]] = {}
    for key in state_dict:
        if match := re.match(r"stages\.(\d)\.blocks\.(\d{1,15})\.attn\.conv_dw\.weight$", key):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    first_conv, fc1 = (state_dict.get(k) for k in (f"{FIRST_CONV}.weight", "stages.0.blocks.0.mlp.fc1.weight"))
    if first_conv is None or fc1 is None or not blocks or sorted(blocks) != list(range(len(blocks))):
        return None
    kernels = [state_dict[f"stages.{s}.blocks.{min(blocks[s])}.attn.conv_dw.weight"] for s in sorted(blocks)]
    if any(weight.ndim != 4 or 0 in weight.shape for weight in (first_conv, fc1, *kernels)):
        return None
    sizes = tuple(int(kernel.shape[-1]) for kernel in kernels)
    classifier, head_conv = (state_dict.get(key) for key in (CLASSIFIER[0], "head_conv.conv.weight"))
    return Architecture(
        dims=tuple(int(kernel.shape[0]) for kernel in kernels),
        depths=tuple(max(blocks[s]) + 1 for s in sorted(blocks)),
        kernel_size=sizes[0] if len(set(sizes)) == 1 else sizes,
        mlp_ratio=fc1.shape[0] / fc1.shape[1],
        head_hidden_size=0 if head_conv is None or not head_conv.ndim else int(head_conv.shape[0]),
        layer_scale="stages.0.blocks.0.ls1.gamma" in state_dict,
        norm_layer="batchnorm2d" if "stages.0.blocks.0.attn.norm.running_mean" in state_dict else "layernorm2d",
        in_chans=int(first_conv.shape[1]),
        num_classes=0 if classifier is None or not classifier.ndim else int(classifier.shape[0]),
    )
