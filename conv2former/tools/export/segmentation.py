"""A segmentation as the export sees it: any height and width, logits for every pixel of the input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ConfigError, OutputError, first_line
from ...models import CheckpointInfo
from ...tasks.dense.thumbnails import colours
from ...tasks.segmentation.config import SegmentationConfig
from ...tasks.segmentation.network import SegmentationNetwork
from ...tasks.segmentation.restore import restore_network
from ...text import clipped
from ..prediction.segmentation import settings_from
from .export import describe
from .opening import silent
from .options import MIN_SIZE, Options
from .subject import LOGITS, Case
from .writing import any_shape, without_paths, write_checked

__all__ = ["MaskSubject", "open_segmentation"]

EXAMPLE = (70, 110)  # height and width of the traced images: no multiples of a stride, so that both are filled up


@dataclass(frozen=True)
class MaskPreprocessing:
    """How images become inputs.

    Attributes:
        short_side: to which an image is resized with its aspect ratio, pixels; None for none.
        mean, std: of values from 0 to 1, for each channel.
        size: (height, width) of the input of a file for one size.
    """

    short_side: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]

    @classmethod
    def of(cls, config: SegmentationConfig) -> MaskPreprocessing:
        images = config.data.preprocessing
        return cls(config.data.short_side, tuple(images.mean), tuple(images.std), images.size)

    def to_dict(self) -> dict[str, Any]:
        """Returns what is noted in a file."""
        return {
            "short_side": self.short_side,
            "interpolation": "bilinear",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def __str__(self) -> str:
        size = f"shorter side {self.short_side} pixels, bilinear" if self.short_side else "at their own size"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{size}, mean {mean}, std {std}"


@dataclass(frozen=True)
class MaskSubject:
    """A segmentation; see `export.Traceable`."""

    model: SegmentationNetwork
    info: CheckpointInfo
    preprocessing: MaskPreprocessing
    metadata: dict[str, str]
    compared: ClassVar = LOGITS

    def write(
        self, kind: str, path: Path, options: Options, say: Callable[[str], None]
    ) -> tuple[list[Case], list[str]]:
        return write_checked(self, kind, path, options, say)

    @property
    def output(self) -> str:
        return "logits"

    @property
    def open_sizes(self) -> dict[int, str]:
        return {0: "batch", 2: "height", 3: "width"}

    def trace(self, shape: tuple[int, ...] | None) -> torch.export.ExportedProgram:
        """Returns the network's graph, for one input shape; None for any batch size, height and width.

        Raises:
            OutputError: torch cannot write it.
        """
        channels = self.info.in_chans
        example = torch.zeros(shape or (2, channels, *EXAMPLE))
        dynamic = None if shape else any_shape(channels, "images")
        try:
            with _exportable_pools(self.model), silent():
                return without_paths(torch.export.export(self.model, (example,), dynamic_shapes=dynamic))
        except Exception as e:  # the compilers' errors have no common class
            reason = clipped(first_line(e), 100)
            how = "with this head" if shape else "for any size"
            advice = "" if shape else ": give --fixed, and --img-size HEIGHT WIDTH"
            raise OutputError(f"torch cannot write {self.info.name} {how} ({reason}){advice}") from None

    def shapes(self, options: Options) -> list[tuple[int, ...]]:
        """Returns the input shapes that a file is tried with; of a dynamic one also odd ones."""
        height, width = self.preprocessing.size
        channels = self.info.in_chans
        if not options.dynamic:
            return [(options.batch_size, channels, height, width)] * 2
        sizes = ((height, width), (height + 27, max(width - 33, MIN_SIZE)), (max(height // 2, MIN_SIZE) + 1, width + 7))
        return [(batch, channels, *size) for size in sizes for batch in (1, 3)]


def open_segmentation(checkpoint: str | Path, content: Mapping[str, Any], kind: str, options: Options) -> MaskSubject:
    """Returns what is exported of a segmentation's checkpoint; see `export.open_classifier`."""
    if options.preprocessing != "checkpoint":
        raise ConfigError("--preprocessing: of classifiers, and this is a segmentation; leave it out")
    if kind == "torchscript":
        raise ConfigError("TorchScript does not take the heads of segmentations; write .onnx or .pt2")
    model, info = restore_network(content, checkpoint, options.use_ema)
    config = settings_from(info.recipe, [*options.size_override, *options.overrides])
    given = MaskPreprocessing.of(config)
    metadata = describe(checkpoint, info, given, options)
    metadata |= {"task": "segmentation", "palette": json.dumps(colours(model.num_classes)[:-1].tolist())}
    return MaskSubject(model, info, given, metadata)


# ------------------------------------------------------------------------------------------------------------- pooling


class _Pool(nn.Module):
    """As `nn.AdaptiveAvgPool2d` of a fixed number of cells, by two products with matrices: for maps of any size.

    ONNX has no such pooling, and torch writes it for one size of the map alone.

    Args:
        cells: along each side.
    """

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, cells, cells)."""
        down, across = (_means(x.shape[dim], self.cells, x) for dim in (-2, -1))
        return down @ x @ across.transpose(0, 1)


def _means(length: int, cells: int, like: Tensor) -> Tensor:
    """Returns the matrix, (cells, length), that takes the means of a side's cells, which may share pixels."""
    places, cell = torch.arange(length, device=like.device), torch.arange(cells, device=like.device)[:, None]
    first = torch.div(cell * length, cells, rounding_mode="floor")
    last = torch.div((cell + 1) * length + (cells - 1), cells, rounding_mode="floor")  # rounded up; not in the cell
    inside = ((places >= first) & (places < last)).to(like.dtype)
    return inside / (last - first).to(like.dtype)


@contextmanager
def _exportable_pools(model: SegmentationNetwork) -> Iterator[None]:
    """Puts pooling that can be written for any size in the place of a network's, as long as it lasts."""
    found = [
        (parent, name, child, other)
        for part, replacement in ((model.head, _for_any_size), (model.backbone, _without_ceil_mode))
        for parent in part.modules()
        for name, child in parent.named_children()
        if (other := replacement(child)) is not None
    ]
    for parent, name, _, other in found:
        setattr(parent, name, other)
    try:
        yield
    finally:
        for parent, name, child, _ in found:
            setattr(parent, name, child)


def _for_any_size(pool: nn.Module) -> nn.Module | None:
    """Returns what to write for a head's pooling to a number of cells; None for other modules."""
    if not isinstance(pool, nn.AdaptiveAvgPool2d):
        return None
    assert isinstance(pool.output_size, int)
    return _Pool(pool.output_size)


def _without_ceil_mode(pool: nn.Module) -> nn.Module | None:
    """Returns what to write for a backbone's pooling whose output has a size that is rounded up; None for others.

    torch writes such sizes for one image size alone. Here images are filled up to a multiple of the stride, so that a
    map that is halved has even sides: windows of 2 then fit exactly, and of windows of 3 the last hangs over by one.
    """
    kind = type(pool)
    is_plain = not (getattr(pool, "divisor_override", None) or getattr(pool, "return_indices", False))
    if kind not in (nn.AvgPool2d, nn.MaxPool2d) or not pool.ceil_mode or not is_plain:
        return None
    kernel, stride, padding, dilation = (
        value[0] if isinstance(value, tuple) and len({*value}) == 1 else value
        for value in (pool.kernel_size, pool.stride, pool.padding, getattr(pool, "dilation", 1))
    )
    if (stride, padding, dilation) != (2, 0, 1):
        return None
    if kernel == 2:
        return kind(2, 2)
    if kernel == 3 and kind is nn.MaxPool2d:
        return nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), -torch.inf), nn.MaxPool2d(3, 2))
    return None
