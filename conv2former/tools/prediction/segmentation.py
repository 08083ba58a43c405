"""Prediction of masks: a class for every pixel of images from anywhere, as index PNGs, overlays and shares of area."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...data.pixels import normalize
from ...errors import CheckpointError, counted
from ...inference import capture
from ...tasks.segmentation.augment import EvalTransform
from ...tasks.segmentation.config import SegmentationConfig
from ...tasks.segmentation.inference import Answerer
from ...tasks.segmentation.restore import restore_network
from ...text import printable
from .dense import QUALITY, DensePrediction, DenseResults, Loaded, dense_settings
from .inputs import ImageFile
from .options import PredictionOptions
from .results import MAX_BARS

__all__ = ["AreaShare", "MaskPrediction", "PredictedMask", "answerer_for", "mask_image"]

SETTINGS = {
    "data": ("short_side", "img_size", "mean", "std", "value_range", "max_image_pixels", "workers"),
    "evaluation": ("mode", "window", "overlap", "flip"),
}  # keys that matter here
MOST_IN_PALETTE = 256
OPACITY = 0.55  # of the classes over a photo


@dataclass(frozen=True)
class AreaShare:
    """A class in an image: its index, its names in the checkpoint and for people, and how many pixels it has."""

    index: int
    class_name: str
    name: str
    pixels: int


@dataclass(frozen=True)
class PredictedMask:
    """What was found for one image.

    Attributes:
        place: of the image among those that were given.
        name: of the image, as it was given or found.
        classes: index of the class of every pixel of the upright photo, (H, W) uint8, or uint16 of more than 256.
        areas: the classes that occur, the largest first.
        photo: the image; None if it was not asked for.
        topk: how many classes the text names.
    """

    place: int
    name: str
    classes: np.ndarray
    areas: list[AreaShare]
    photo: Image.Image | None
    topk: int

    def share(self, area: AreaShare) -> float:
        """Returns how much of the image a class has, from 0 to 1."""
        return area.pixels / self.classes.size

    def to_dict(self) -> dict[str, Any]:
        """Returns the object of a JSON line; shares have six significant digits."""
        height, width = self.classes.shape
        areas = [
            {
                "class": area.class_name,
                "index": area.index,
                "name": area.name,
                "pixels": area.pixels,
                "share": float(f"{self.share(area):.6g}"),
            }
            for area in self.areas
        ]
        return {"image": self.name, "size": [width, height], "areas": areas}

    def __str__(self) -> str:
        shown = (f"{printable(area.name)}: {100 * self.share(area):.1f} %" for area in self.areas[: self.topk])
        more = len(self.areas) - self.topk
        return ", ".join(shown) + (f", {more} more" if more > 0 else "")


def mask_image(classes: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Returns a mask as an indexed image with a palette; of more than 256 classes it is grey, of 16 bits.

    Args:
        classes: (H, W) indices.
        palette: (classes or more, 3) uint8.
    """
    if classes.dtype != np.uint8:
        return Image.fromarray(classes)
    image = Image.fromarray(classes).convert("L")
    image.putpalette(palette[:MOST_IN_PALETTE].tobytes())  # makes it an indexed one
    return image


def answerer_for(config: SegmentationConfig) -> Answerer:
    """Returns what gives a network's answers to whole images as a configuration says."""
    evaluation = config.evaluation
    return Answerer(config.window if evaluation.mode == "slide" else None, evaluation.overlap, evaluation.flip)


def settings_from(noted: Mapping[str, Any], overrides: Sequence[str]) -> SegmentationConfig:
    """Returns how images become inputs and are answered; see `dense_settings`."""
    found: SegmentationConfig = dense_settings(SETTINGS, noted, overrides)
    return found


# -------------------------------------------------------------------------------------------------------- prediction


class MaskPrediction(DensePrediction):
    """A segmentation that is ready to predict; see there."""

    def __init__(self, checkpoint: str | Path, content: Mapping[str, Any], options: PredictionOptions) -> None:
        kind = "a segmentation, whose masks say where"
        super().__init__(checkpoint, content, options, restore_network, settings_from, kind)
        self.answerer, images = answerer_for(self.config), self.config.data.preprocessing
        self.mean, self.std = (torch.tensor(values, device=self.device) for values in (images.mean, images.std))
        self._answer = capture(self.model)

    def __str__(self) -> str:
        classes, data = counted(len(self.names), "class", "classes"), self.config.data
        head = self.config.model.head.name
        about = f"{self.title}, head {head}: {classes} of pixels, {self.weights}, on {self.device}"
        size = f"shorter side {data.short_side} pixels" if data.short_side else "at their own size"
        window = self.answerer.window
        how = f"in windows of {window[0]} x {window[1]}" if window else "whole"
        mirrored = ", also mirrored" if self.answerer.flip else ""
        return f"{printable(about)}\nimages: {size}, {how}{mirrored}; masks at the size of the photos"

    def results(self, folder: Path, images: Sequence[ImageFile]) -> MaskResults:
        """See `registry.Predicting`."""
        return MaskResults(folder, images, self)

    def transform(self) -> EvalTransform:
        return EvalTransform(self.config.data.short_side, self.config.data.preprocessing.channels)

    @torch.inference_mode()
    def answers(self, items: Sequence[Loaded]) -> list[np.ndarray]:
        """Returns the classes of images, each (H, W); those of one size are answered together."""
        found: dict[int, np.ndarray] = {}
        of_size: dict[tuple[int, ...], list[int]] = {}
        for i, item in enumerate(items):
            of_size.setdefault(tuple(item.pixels.shape), []).append(i)
        layout = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        for members in of_size.values():
            pixels = torch.stack([items[i].pixels for i in members]).to(self.device)
            images = normalize(pixels.permute(0, 2, 3, 1), self.mean, self.std).permute(0, 3, 1, 2)
            images = images.contiguous(memory_format=layout)
            try:
                masks = self.answerer.classes(self._answer, images, [items[i].size for i in members])
            except ValueError:
                raise CheckpointError(
                    "the network's answers are not all numbers (NaN): its weights are broken"
                ) from None
            kind = np.uint8 if len(self.names) <= MOST_IN_PALETTE else np.uint16
            found |= {i: mask.cpu().numpy().astype(kind) for i, mask in zip(members, masks, strict=True)}
        return [found[i] for i in range(len(items))]

    def prediction(self, place: int, item: Loaded, answer: np.ndarray) -> PredictedMask:
        counts = np.bincount(answer.ravel(), minlength=len(self.names))
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda index: -counts[index])
        areas = [AreaShare(i, self.class_names[i], self.names[i], int(counts[i])) for i in order]
        return PredictedMask(place, item.name, answer, areas, item.photo, self.options.topk)


# ------------------------------------------------------------------------------------------------------------- results


class MaskResults(DenseResults):
    """Results being written: masks and overlays, and what all dense tasks leave."""

    def __init__(self, folder: Path, images: Sequence[ImageFile], predicting: MaskPrediction) -> None:
        super().__init__(folder, images, predicting, "the classes over the images; below: their shares of the area")

    def add(self, prediction: PredictedMask) -> dict[str, Any]:
        """Adds an image; returns the object of its JSON line."""
        own, palette = self.files[prediction.place], self.predicting.palette
        names = {"mask": f"masks/{own}.png", "overlay": f"overlays/{own}.jpg"}
        assert prediction.photo is not None
        colour = Image.fromarray(palette[prediction.classes])
        overlay = Image.blend(prediction.photo.convert("RGB"), colour, OPACITY)
        mask_image(prediction.classes, palette).save(self.path(names["mask"]))
        overlay.save(self.path(names["overlay"]), quality=QUALITY)
        record = {**prediction.to_dict(), **names}
        self.write_record(record)
        bars = [(area.index, prediction.share(area)) for area in prediction.areas[:MAX_BARS]]
        self.show_picture(prediction.name, overlay.size, overlay, bars)
        return record

    def __str__(self) -> str:
        return f"{super().__str__()}, {counted(self.count, 'mask')}, {counted(self.count, 'overlay')}, legend.png"
