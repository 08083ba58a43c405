"""Decoders of segmentation-models-pytorch on the maps of any backbone, and the small head that helps in training.

That package's decoders take a list of maps from the image's own size on, each half as large as the one before. Our
backbones begin at the fourth part, so the first two places are maps without channels, which the decoders leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from .config import Head, HeadConfig

__all__ = ["Auxiliary", "DecoderHead", "build_head", "check_installed", "output_stride_of"]

NEEDED = "segmentation-models-pytorch"


def check_installed() -> None:
    """Raises a ConfigError if the package with the decoders is not there."""
    try:
        import segmentation_models_pytorch  # noqa: F401
    except ImportError as e:
        raise ConfigError(
            f'task: segmentation needs {NEEDED}, which cannot be imported ({e}); pip install "conv2former[dense]"'
        ) from None


def output_stride_of(head: Head) -> int:
    """Returns the largest stride that a backbone's maps may have: DeepLabV3+ has its last stage dilated instead."""
    return 16 if head == "deeplabv3plus" else 32


def build_head(head: HeadConfig, channels: Sequence[int], steps: int, num_classes: int) -> DecoderHead:
    """Builds a head.

    Args:
        head: which one.
        channels: of the four maps, the largest map first.
        steps: how many pixels of the first map are as wide as one of the last.
        num_classes: of its answer.
    """
    check_installed()
    from segmentation_models_pytorch.base import initialization

    decoder = _decoder(head, [3, 0, *channels])
    if head.name == "deeplabv3plus":  # takes it for granted that the first map has a stride of 4
        decoder.up.scale_factor = steps
    built = DecoderHead(decoder, head.channels, num_classes, head.dropout)
    initialization.initialize_decoder(built.decoder)
    _initialise(built.classifier)
    return built


def _decoder(head: HeadConfig, channels: list[int]) -> Any:
    """Returns a decoder whose maps have `head.channels`.

    Args:
        head: which one.
        channels: of all maps: of the image, of none at half its size, and of the four of the backbone.
    """
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
    from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    if head.name == "upernet":
        return UPerNetDecoder(channels, encoder_depth=5, decoder_channels=head.channels)
    if head.name == "fpn":  # without its own dropout: there is one before the last convolution of every head
        return FPNDecoder(channels, pyramid_channels=256, segmentation_channels=head.channels, dropout=0.0)
    if head.name == "segformer":
        return SegformerDecoder(channels, encoder_depth=5, segmentation_channels=head.channels)
    return DeepLabV3PlusDecoder(
        channels,
        encoder_depth=5,
        out_channels=head.channels,
        atrous_rates=(12, 24, 36),
        output_stride=16,
        aspp_separable=True,
        aspp_dropout=0.5,
    )


def _initialise(convolution: nn.Conv2d) -> None:
    nn.init.normal_(convolution.weight, std=0.01)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


class DecoderHead(nn.Module):
    """A decoder, dropout, and a 1x1 convolution: four maps to logits at the size of the largest map.

    Args:
        decoder: of segmentation-models-pytorch.
        channels: of what it returns.
        num_classes: of the logits.
        dropout: of whole channels.
    """

    def __init__(self, decoder: nn.Module, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.decoder = decoder
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Maps (N, C1, H, W), (N, C2, H / 2, W / 2), ... to logits, (N, num_classes, H, W)."""
        first = maps[0]
        height, width = first.shape[-2:]
        none: list[Any] = [first.new_empty((first.shape[0], 0, k * height, k * width)) for k in (4, 2)]
        return self.classifier(self.dropout(self.decoder([*none, *maps])))


class Auxiliary(nn.Sequential):
    """FCN: a 3x3 convolution, BatchNorm, ReLU, dropout, a 1x1 convolution; a map to logits of the same size."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Dropout2d(dropout),
            nn.Conv2d(channels, num_classes, 1),
        )
        convolution, classifier = self[0], self[-1]
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(classifier, nn.Conv2d)
        nn.init.kaiming_uniform_(convolution.weight, nonlinearity="relu")
        _initialise(classifier)
