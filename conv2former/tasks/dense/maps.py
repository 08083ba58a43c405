"""A backbone that gives four maps of an image, and the network that has it: layer groups, frozen parts, compiling."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ...config import BaseConfig
from ...errors import ConfigError, first_line
from ...models import Conv2Former
from ...weights.others import OtherNetwork
from ..network import build_model, compile_network, find_network
from ..network import freeze as freeze_network

__all__ = ["STAGES", "DenseNetwork", "Maps", "build_backbone", "compile_parts", "freeze"]

STAGES = 4
STARTS = re.compile(r"(?<![\[\\])\^")  # a ^ that stands for the start of a name


class Maps(NamedTuple):
    """The four maps of a backbone, the finest first.

    Attributes:
        indices: for `forward_intermediates`.
        channels, strides: of each.
    """

    indices: list[int]
    channels: list[int]
    strides: list[int]


class DenseNetwork(nn.Module):
    """A network on the maps of a backbone; all that is not the backbone's is above it in layer decay.

    Args:
        backbone: has `forward_intermediates`, as timm's networks have.
        maps: of it.
    """

    def __init__(self, backbone: nn.Module, maps: Maps) -> None:
        super().__init__()
        self.backbone, self.indices = backbone, maps.indices

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Returns the four maps of images, (N, C, H, W), whose sides are multiples of the largest stride."""
        backbone = cast(Any, self.backbone)
        return backbone.forward_intermediates(images, indices=self.indices, intermediates_only=True)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns timm's patterns for layer groups: the backbone's own, from its stem on; the heads are above them."""
        groups = cast(Any, self.backbone).group_matcher(coarse=coarse)
        return {name: _below_backbone(patterns) for name, patterns in groups.items()}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that are left out of weight decay beyond those of one dimension: the backbone's."""
        own: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in own}


def _below_backbone(patterns: Any) -> Any:
    """Returns timm's patterns of a layer group, regular expressions from a name's start, below `backbone.`."""
    if isinstance(patterns, (list, tuple)):
        return [(_prefixed(pattern), *rest) for pattern, *rest in patterns]
    return _prefixed(patterns)


def _prefixed(pattern: str) -> str:
    return rf"^backbone\.(?:{STARTS.sub('', pattern)})"


def build_backbone(config: BaseConfig, **options: Any) -> tuple[nn.Module, Maps]:
    """Builds the configured network, with its starting weights, without its classifier and what leads to it.

    Args:
        config: the run.
        **options: see `tasks.network.build_model`.

    Raises:
        ConfigError: there is no such network, or it has no four maps of which each is half as large as the one before.
        CheckpointError: the starting weights cannot be read or do not fit.
    """
    network = find_network(config)
    # others are tried with an image, for which they need a classifier; it is removed again
    backbone: Any = build_model(config, int(isinstance(network, OtherNetwork)), **options)
    info = list(getattr(backbone, "feature_info", []))[-STAGES:]
    first = len(getattr(backbone, "feature_info", [])) - len(info)
    strides: list[int] = [feature["reduction"] for feature in info]
    if len(strides) != STAGES or not hasattr(backbone, "forward_intermediates") or strides[0] not in (2, 4):
        raise ConfigError(
            f"model.name: {network.name} has no four maps of an image, each of half the size of the one before, for a "
            "head"
        )
    indices = list(range(first, first + STAGES))
    try:
        backbone.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
    except (AttributeError, AssertionError, TypeError, ValueError) as e:
        raise ConfigError(f"model.name: {network.name} cannot give its maps to a head ({first_line(e)})") from None
    return backbone, Maps(indices, [feature["num_chs"] for feature in info], strides)


def freeze(model: DenseNetwork, until: str) -> None:
    """Freezes the backbone up to and including a part, see `tasks.network.freeze`; `backbone` is all but the heads."""
    if until == "backbone":
        model.backbone.eval().requires_grad_(False)
    elif until != "nothing" or isinstance(model.backbone, Conv2Former):
        freeze_network(model.backbone, until)


def compile_parts(model: DenseNetwork) -> nn.Module:
    """Returns what to train the network through: a Conv2Former's blocks are compiled, or else the whole.

    Raises:
        UserError: there is no torch.compile here.
    """
    if isinstance(model.backbone, Conv2Former):
        compile_network(model.backbone)
        return model
    return compile_network(model)
