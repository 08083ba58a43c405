"""What in an image speaks for a class, and what the network's modulation takes in: two maps, and a picture of both."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from timm.utils import unwrap_model
from torch import nn

from ...errors import ConfigError, UserError
from ...models import Conv2Former
from ...tasks.pictures import seen_pixels
from ...text import clipped
from ..output import save_figure
from .predict import Prediction, Predictor

__all__ = ["Explainer", "Heatmap", "activation_map", "default_stage", "explain_figure", "modulation_maps", "spread"]

COARSEST = 4  # cells on a side that a map needs to show where something is


@dataclass(frozen=True)
class Heatmap:
    """A map over an image.

    Attributes:
        stage: of the network, 1 to 4, that it is of.
        values: (h, w), one for each cell of `stride` x `stride` pixels.
        stride: side of a cell, pixels.
    """

    stage: int
    values: torch.Tensor
    stride: int

    @property
    def cells(self) -> str:
        """Its size as text."""
        return f"{self.values.shape[0]} x {self.values.shape[1]}"


def default_stage(img_size: int, strides: Sequence[int]) -> int:
    """Returns the deepest stage whose map has at least 4 x 4 cells; the first if none has.

    Args:
        img_size: the shorter side of the input, pixels.
        strides: of the stages that may be taken, from the first.
    """
    fine_enough = [stage for stage, stride in enumerate(strides, 1) if img_size // stride >= COARSEST]
    return max(fine_enough, default=1)


def _strides(network: Conv2Former) -> list[int]:
    return [info["reduction"] for info in network.feature_info]


def _grad_cam() -> Any:
    try:
        from captum.attr import LayerGradCam  # of the extra `explain`, and slow to import
    except ImportError:
        raise UserError("class activation maps need captum: pip install 'conv2former[explain]'") from None
    return LayerGradCam


def activation_map(
    model: nn.Module, image: torch.Tensor, class_index: int, stage: int = 4, signed: bool = False
) -> Heatmap:
    """Returns the class activation map of an image: Grad-CAM, by captum.

    For the last stage it is taken behind the head's 1x1 convolution, from where on the network is linear. There the
    signed map is exact: its cells sum to the class's score without the classifier's bias.

    Args:
        model: a Conv2Former in evaluation mode with its classifier, compiled or not; it is as it was afterwards.
        image: (channels, H, W), as the network takes it.
        class_index: of the class.
        stage: 1 to 4, whose output is weighed.
        signed: keep what speaks against the class; otherwise it is 0, as in the method's paper.

    Raises:
        UserError: captum is not installed.
    """
    network = cast(Conv2Former, unwrap_model(model))
    layer = network.head_conv if stage == 4 else network.stages[stage - 1]
    batch = image.detach().clone()[None].to(next(network.parameters()).device)
    with torch.enable_grad():
        cam = _grad_cam()(network, layer).attribute(batch, class_index, relu_attributions=not signed)
    return Heatmap(stage, cam.detach().float().cpu()[0, 0], _strides(network)[stage - 1])


@contextmanager
def _recording(modules: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collects the modules' outputs while the network runs, and leaves no hook behind."""
    outputs: list[torch.Tensor] = []
    hooks = [module.register_forward_hook(lambda *call: outputs.append(call[-1].detach())) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def modulation_maps(model: nn.Module, image: torch.Tensor, stages: Sequence[int]) -> list[Heatmap]:
    """Returns how strong the modulation of a stage's last block is at each place, averaged over its channels.

    It is the mean of ``|a|``; ``a`` is what the large depthwise kernel puts out, bias included, and what the values are
    multiplied by.

    Args:
        model: a Conv2Former in evaluation mode, compiled or not; it is as it was afterwards.
        image: (channels, H, W), as the network takes it.
        stages: 1 to 4, ascending.
    """
    network: Any = unwrap_model(model)
    with _recording([network.stages[stage - 1].blocks[-1].attn.conv_dw for stage in stages]) as outputs:
        network(image[None].to(next(network.parameters()).device))
    return [
        Heatmap(stage, a[0].abs().float().mean(0).cpu(), _strides(network)[stage - 1])
        for stage, a in zip(stages, outputs, strict=True)
    ]


def spread(heatmap: Heatmap, height: int, width: int) -> torch.Tensor:
    """Returns a map at the size of the image, (height, width), bilinear, each cell's value at the centre of its pixels.

    Sizes that are not multiples of the stride leave pixels at the right and lower edge that no cell covers: they get
    the value of the nearest that has one, and nothing is stretched.
    """
    h, w = heatmap.values.shape
    covered = F.interpolate(heatmap.values[None, None], scale_factor=float(heatmap.stride), mode="bilinear")
    rest = (0, max(0, width - w * heatmap.stride), 0, max(0, height - h * heatmap.stride))
    return F.pad(covered, rest, mode="replicate")[0, 0, :height, :width]


def explain_figure(
    pixels: np.ndarray, activation: Heatmap, class_name: str, modulation: Sequence[Heatmap], heading: str
) -> Figure:
    """Draws the maps of an image over it, side by side, each with the scale of its colours.

    Args:
        pixels: (H, W, 3), what the network sees, values from 0 to 1.
        activation: of `class_name`.
        modulation: of the stages to show.
        heading: above all; markup in it is not read.
    """
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(0.3 + 3.1 * (2 + len(modulation)), 4.7), layout="compressed", dpi=110)
    figure.suptitle(heading, fontsize=10, parse_math=False)
    panels, scales = figure.subplots(2, 2 + len(modulation), height_ratios=[1, 0.045])
    panels[0].imshow(pixels, interpolation="nearest")
    panels[0].set_title(f"what the network sees\n{width} x {height} pixels", fontsize=9)
    panels[0].set(xticks=[], yticks=[])
    scales[0].set_axis_off()
    what = f"{'what' if activation.values.any() else 'nothing'} speaks for '{clipped(class_name, 24)}'"
    unit = "part of the class's score" if activation.stage == 4 else "weight for the class"
    _draw(panels[1], scales[1], pixels, activation, 0.0, "inferno", f"{what}\nGrad-CAM, stage {activation.stage}", unit)
    for axes, scale, one in zip(panels[2:], scales[2:], modulation, strict=True):
        title = f"how strong the modulation is\nlast block of stage {one.stage}"
        _draw(axes, scale, pixels, one, float(one.values.min()), "viridis", title, "mean |a| over the channels")
    return figure


def _draw(
    axes: Any, scale: Any, pixels: np.ndarray, one: Heatmap, low: float, colours: str, title: str, unit: str
) -> None:
    """Draws a map over the image, which is pale and grey, so that the colours are those of the scale."""
    axes.imshow(0.4 + 0.5 * pixels.mean(2), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    values = spread(one, *pixels.shape[:2]).numpy()
    high = float(one.values.max())
    high = high if high > low else low + 1.0  # a map of one value is all of the lowest colour
    shown = axes.imshow(values, cmap=colours, vmin=low, vmax=high, alpha=0.65, interpolation="nearest")
    axes.set_title(f"{title}, {one.cells}", fontsize=9, parse_math=False)
    axes.set(xticks=[], yticks=[])
    bar = axes.figure.colorbar(shown, cax=scale, orientation="horizontal")
    bar.set_label(unit, fontsize=8)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    scale.tick_params(labelsize=7)


class Explainer:
    """Draws explanations of predictions.

    Args:
        predictor: whose.
        class_name: the class to explain; None for each image's most probable one.
        cam_stage: of the class activation map; None for the deepest that is fine enough.
        stages: of the modulation maps; None for the deepest that is fine enough, at most the third.

    Raises:
        UserError: there is no such class, or captum is not installed.
    """

    def __init__(
        self,
        predictor: Predictor,
        class_name: str | None = None,
        cam_stage: int | None = None,
        stages: Sequence[int] | None = None,
    ) -> None:
        _grad_cam()
        if not isinstance(predictor.model, Conv2Former):
            raise ConfigError(
                f"--explain: {predictor.info.name} has no modulation to show; it is for Conv2Former alone"
            )
        self.predictor = predictor
        self.class_index = None if class_name is None else predictor.class_index(class_name)
        size = min(predictor.settings.preprocessing.size)
        strides = _strides(cast(Conv2Former, unwrap_model(predictor.model)))
        self.cam_stage = cam_stage or default_stage(size, strides)
        self.stages = sorted({*stages}) if stages else [default_stage(size, strides[:3])]

    def write(self, prediction: Prediction, folder: Path, total: int, number: int) -> str:
        """Writes the picture of one prediction, and returns its path below `folder`.

        Args:
            prediction: of the predictor.
            folder: of all results.
            total: how many predictions there are, at most.
            number: of this one, from 1.
        """
        model, given = self.predictor.model, self.predictor.settings.preprocessing
        index = prediction.top[0].index if self.class_index is None else self.class_index
        seen = seen_pixels(prediction.pixels, given.mean, given.std)
        activation = activation_map(model, prediction.pixels, index, self.cam_stage)
        modulation = modulation_maps(model, prediction.pixels, self.stages)
        heading = f"{clipped(prediction.name, 90, keep_end=True)}\n{clipped(str(prediction), 105)}"
        class_name = clipped(self.predictor.names[index], 60)
        figure = explain_figure(seen, activation, class_name, modulation, heading)
        stem = re.sub(r"[^\w.-]+", "_", Path(prediction.name).stem, flags=re.ASCII).strip("_.-")[:40]
        path = f"explanations/{number:0{len(str(total))}}_{stem}".rstrip("_") + ".png"
        save_figure(figure, folder / path)
        return path
