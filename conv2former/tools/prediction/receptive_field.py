"""The effective receptive field: how much each pixel of an image moves a feature in the middle of a stage's map.

As Luo et al. define it (https://arxiv.org/abs/1701.04128), summed over images and tabulated as by Ding et al.
(https://arxiv.org/abs/2203.06717): the share of the area that holds 20, 30, 50 and 99 % of the contribution.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from ..._preprocessing import CHANNELS
from ...config.schema import DataConfig
from ...data import eval_transform
from ...data.images import any_size, open_rgb
from ...engine.terminal import bar
from ...errors import CheckpointError, ConfigError, OutputError, closest, counted
from ...models import Conv2Former, Preprocessing, list_variants, load_model
from ...text import clipped, printable
from ..output import check_writable, text_table
from .inputs import ImageFile, find_images
from .predict import choose_device, read_settings

__all__ = [
    "SHARES",
    "Field",
    "Square",
    "check_picture",
    "fields_figure",
    "fields_table",
    "measure_all",
    "measure_fields",
    "noise_images",
    "random_network",
    "smallest_squares",
]

SHARES = (0.2, 0.3, 0.5, 0.99)
FORMATS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Square:
    """The smallest square around a feature's centre that holds a share of what all pixels contribute to the feature.

    Attributes:
        share: of the contribution.
        side: pixels; of the part of it that is outside the image, too.
        area: share of the image's area.
    """

    share: float
    side: int
    area: float


@dataclass(frozen=True)
class Field:
    """An effective receptive field.

    Attributes:
        name: of the network.
        stage: 1 to 4.
        contribution: (H, W), of each pixel to the feature, in sum 1.
        centre: row and column of the feature's centre, pixels from the upper left corner of the image.
        cells: height and width of the stage's map.
    """

    name: str
    stage: int
    contribution: torch.Tensor
    centre: tuple[int, int]
    cells: tuple[int, int]

    @property
    def squares(self) -> list[Square]:
        """One for each of `SHARES`."""
        return smallest_squares(self.contribution, self.centre)


def random_network(name: str, seed: int = 0) -> Conv2Former:
    """Builds a registered variant with random weights that let every block take part.

    As training starts every block is close to the identity, because layer scale is 1e-6 and the kernels are small, and
    the field is the stem's. Here layer scale is 1, and each convolution keeps the variance of its input.

    Raises:
        ConfigError: there is no variant of that name.
    """
    if name not in list_variants():
        raise ConfigError(
            f"--model {name}: no such variant{closest(name, list_variants())}; {', '.join(list_variants())}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast(Conv2Former, timm.create_model(name, ls_init_value=1.0, num_classes=0))
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model.eval()


def noise_images(count: int, size: int | tuple[int, int], in_chans: int = 3, seed: int = 0) -> Iterator[torch.Tensor]:
    """Goes over images of independent standard normal values, (in_chans, height, width), the same for equal seeds.

    Args:
        count: of images.
        size: one number for a square, or height and width, pixels.
        in_chans: channels.
        seed: of the values.
    """
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(in_chans, height, width, generator=generator)


@contextmanager
def _saving_memory(model: Conv2Former) -> Iterator[None]:
    """Recomputes each block in the backward pass, as long as it lasts."""
    stages: list[Any] = list(model.stages)
    before = [stage.grad_checkpointing for stage in stages]
    model.set_grad_checkpointing(True)
    try:
        yield
    finally:
        for stage, state in zip(stages, before, strict=True):
            stage.grad_checkpointing = state


def measure_fields(
    model: Conv2Former, images: Iterable[torch.Tensor], stages: Sequence[int], name: str = ""
) -> list[Field]:
    """Measures the effective receptive field of the middle of each stage's output.

    The gradient of the sum of the feature's positive channels is taken with respect to the image; its positive part is
    summed over channels and images. One image at a time is in memory, with the activations of one block.

    Args:
        model: in evaluation mode; it is as it was afterwards.
        images: (channels, H, W), as the network takes them, all of one size.
        stages: 1 to 4.
        name: of the network, for the result.

    Raises:
        ConfigError: nothing contributes: the gradients are all zero or not numbers.
    """
    device = next(model.parameters()).device
    strides = [info["reduction"] for info in model.feature_info]
    sums: dict[int, torch.Tensor] = {}
    cells: dict[int, tuple[int, int]] = {}
    with _saving_memory(model), torch.enable_grad():
        for image in images:
            x = image[None].to(device).requires_grad_()
            maps = _outputs(model, x, max(stages))
            for stage in stages:
                h, w = cells[stage] = (maps[stage - 1].shape[2], maps[stage - 1].shape[3])
                feature = maps[stage - 1][0, :, h // 2, w // 2].relu().sum()
                (gradient,) = torch.autograd.grad(feature, x, retain_graph=stage != stages[-1])
                sums[stage] = sums.get(stage, 0) + gradient[0].relu().sum(0).double().cpu()
    fields = []
    for stage in stages:
        total = sums[stage].sum()
        if not total > 0 or not math.isfinite(total):
            raise ConfigError(
                f"{name}: no pixel moves the middle of stage {stage}: its gradients are zero or no numbers"
            )
        stride = strides[stage - 1]
        h, w = cells[stage]
        centre = (h // 2 * stride + stride // 2, w // 2 * stride + stride // 2)
        fields.append(Field(name, stage, sums[stage] / total, centre, (h, w)))
    return fields


def check_picture(path: Path) -> None:
    """Raises OutputError if no picture could be written to `path`."""
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path}: a picture's name ends with {', '.join(FORMATS)}")
    check_writable(path)


def _outputs(model: Conv2Former, x: torch.Tensor, last: int) -> list[torch.Tensor]:
    x = model.stem(x)
    outputs = []
    for stage in list(model.stages)[:last]:
        x = stage(x)
        outputs.append(x)
    return outputs


def smallest_squares(
    contribution: torch.Tensor, centre: tuple[int, int], shares: Sequence[float] = SHARES
) -> list[Square]:
    """Returns for each share the smallest square around `centre` in which the pixels contribute so much of the sum.

    Args:
        contribution: (H, W), not negative.
        centre: row and column between pixels, from the upper left corner.
        shares: of the sum, above 0 and up to 1.
    """
    height, width = contribution.shape
    rows, columns = (torch.arange(n) - c for n, c in zip((height, width), centre, strict=True))
    rows, columns = (torch.where(d < 0, -d, d + 1) for d in (rows, columns))  # 1 for the pixels beside the centre
    radius = torch.maximum(rows[:, None], columns[None, :]).flatten()
    inside = torch.zeros(int(radius.max()) + 1, dtype=torch.float64)
    inside = inside.index_add(0, radius, contribution.double().flatten()).cumsum(0)
    area = torch.bincount(radius).cumsum(0) / (height * width)
    found = []
    for share in shares:
        needed = share * float(inside[-1]) * (1 - 1e-12)  # rounding of the sum must not ask for one pixel more
        r = int(torch.searchsorted(inside, needed))
        found.append(Square(share, 2 * r, float(area[r])))
    return found


def measure_all(
    checkpoints: Sequence[str],
    variants: Sequence[str],
    stages: Sequence[int],
    inputs: Sequence[str] = (),
    count: int = 50,
    img_size: int | None = None,
    device: str = "auto",
) -> tuple[list[Field], str]:
    """Measures several networks on the same images.

    Args:
        checkpoints: files or folders that `load_model` takes.
        variants: names of registered variants, to be given random weights.
        stages: of each, 1 to 4.
        inputs: images, see `find_images`; none for noise.
        count: of images, at most; of more, `count` are taken at even distances.
        img_size: of the input, pixels; None for what each checkpoint notes, and 224 for random weights.
        device: see `choose_device`.

    Returns:
        The fields, all stages of one network after those of another, and a text that says of what they are.

    Raises:
        UserError: a file, a name or an image cannot be used.
    """
    files = find_images(inputs) if inputs else []
    files = [files[i * len(files) // count] for i in range(count)] if len(files) > count else files
    number = len(files) or count
    overrides = [] if img_size is None else [f"data.img_size={img_size}"]
    fields = []
    for name, model, settings in _networks(checkpoints, variants, overrides):
        images = _read(files, settings) if files else noise_images(count, settings.preprocessing.size, model.in_chans)
        if files and model.in_chans not in CHANNELS:
            raise CheckpointError(
                f"the network in {name} takes {counted(model.in_chans, 'channel')}; leave --images out for noise"
            )
        shown = bar(images, number, " images", name)
        fields += measure_fields(model.to(choose_device(device)), shown, stages, name)
    kind = "image" if files else "image of noise, standard normal values"
    kinds = "images" if files else "images of noise, standard normal values"
    note = f"effective receptive field of the middle of a stage, mean over {counted(number, kind, kinds)}"
    if variants:
        note += "\nrandom weights: every convolution keeps its input's variance, layer scale is 1"
    return fields, note


def _networks(
    checkpoints: Sequence[str], variants: Sequence[str], overrides: Sequence[str]
) -> Iterator[tuple[str, Conv2Former, DataConfig]]:
    """Goes over the networks, one at a time in memory, each with what to call it and how images become its input."""
    for path in checkpoints:
        model, info = load_model(path)
        if not isinstance(model, Conv2Former):
            raise CheckpointError(f"{path} holds {info.name}; the receptive field is measured of Conv2Former alone")
        yield (
            f"{info.name or 'a network of its own'} of {printable(path)}",
            model,
            read_settings(info.preprocessing, overrides),
        )
    for variant in variants:
        yield f"{variant}, random weights", random_network(variant), read_settings(Preprocessing(), overrides)


def _read(files: Sequence[ImageFile], settings: DataConfig) -> Iterator[torch.Tensor]:
    transform = eval_transform(settings)
    for name, file in files:
        image = open_rgb(file, name, settings.value_range, settings.max_image_pixels)
        with any_size():
            pixels = transform(image)
        yield pixels


def fields_table(fields: Sequence[Field]) -> str:
    """Returns a table for a terminal: sides of the squares in pixels and shares of the image's area."""
    header = ["network", "stage", "image", *(f"{100 * share:g} % within" for share in SHARES)]
    rows = []
    for field in fields:
        sides = [f"{square.side} px ({100 * square.area:.1f} %)" for square in field.squares]
        size = " x ".join(map(str, reversed(field.contribution.shape)))
        rows.append([field.name, str(field.stage), size, *sides])
    return text_table(header, rows)


def fields_figure(fields: Sequence[Field], note: str) -> Figure:
    """Draws receptive fields, each relative to its strongest pixel, on one logarithmic scale.

    Args:
        fields: all stages of one network after those of another.
        note: above all: what the images were, and the weights.
    """
    stages = len({field.stage for field in fields})
    columns = stages if stages > 1 else min(4, len(fields))  # a row is a network, or else up to four
    rows = -(-len(fields) // columns)
    figure = Figure(figsize=(max(5.0, 3.6 * columns + 0.9), 4.1 * rows + 0.6), layout="compressed", dpi=110)
    letters = int(figure.get_figwidth() * 12)  # of a line, at that size
    heading = "\n".join(textwrap.fill(line, letters) for line in note.split("\n"))
    figure.suptitle(heading, fontsize=9, parse_math=False)
    grid = figure.subplots(rows, columns, squeeze=False)
    shown: Any = None
    for axes in grid.flat[len(fields) :]:
        axes.set_axis_off()
    for axes, field in zip(grid.flat, fields, strict=False):
        pixels = field.contribution.numpy()
        norm = LogNorm(1e-4, 1.0, clip=True)
        shown = axes.imshow(pixels / pixels.max(), cmap="magma", norm=norm, interpolation="nearest")
        for square, style in zip(field.squares[2:], ("-", "--"), strict=True):
            y, x = (c - square.side / 2 - 0.5 for c in field.centre)
            axes.add_patch(
                Rectangle(
                    (x, y), square.side, square.side, fill=False, edgecolor="white", linestyle=style, clip_on=True
                )
            )
        axes.set_xlim(-0.5, pixels.shape[1] - 0.5)
        axes.set_ylim(pixels.shape[0] - 0.5, -0.5)
        axes.tick_params(labelsize=7)
        half, most = field.squares[2:]
        sides = f"50 % in {half.side} x {half.side} pixels (solid), 99 % in {most.side} x {most.side} (dashed)"
        name = "\n".join(
            clipped(line, 44, keep_end=True) for line in field.name.replace(" of ", " of\n", 1).split("\n")
        )
        axes.set_title(
            f"{name}\nstage {field.stage}, {field.cells[0]} x {field.cells[1]}\n{sides}",
            fontsize=8,
            parse_math=False,
        )
    bar = figure.colorbar(shown, ax=list(grid.flat), shrink=0.8)
    bar.set_label("contribution, relative to the strongest pixel", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure
