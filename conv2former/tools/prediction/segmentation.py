"""Prediction of masks: a class for every pixel of images from anywhere, as index PNGs, overlays and shares of area."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image

from ...config import apply_overrides, check_config
from ...data import Skipped, batches
from ...data.classes import display_names
from ...data.images import any_size
from ...data.pixels import normalize
from ...errors import CheckpointError, ConfigError, closest, counted
from ...inference import capture
from ...tasks.dense.thumbnails import colours
from ...tasks.segmentation.augment import EvalTransform
from ...tasks.segmentation.config import SegmentationConfig
from ...tasks.segmentation.inference import Answerer
from ...tasks.segmentation.restore import restore_network
from ...text import printable
from ...weights.description import weights_text
from .inputs import STANDARD_INPUT, ImageFile, OpenedImages
from .options import PredictionOptions
from .predict import choose_device, fitted
from .results import MAX_BARS, ResultsFolder
from .sheet import WHOLE, Cell, legend

__all__ = ["AreaShare", "MaskPrediction", "PredictedMask", "answerer_for", "mask_image"]

SETTINGS = {
    "data": ("short_side", "img_size", "mean", "std", "value_range", "max_image_pixels", "workers"),
    "evaluation": ("mode", "window", "overlap", "flip"),
}  # keys that matter here
BATCH_SIZE = 1  # images may be large, and of many sizes
FEW = 8  # batches that are read without worker processes
MOST_IN_PALETTE = 256
OPACITY = 0.55  # of the classes over a photo
QUALITY = 90  # of the JPEGs


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
    """Returns how images become inputs and are answered: as a checkpoint's configuration says, with overrides.

    Raises:
        ConfigError: an override is impossible, or has nothing to do with it.
    """
    given = apply_overrides({}, overrides)
    keys = [f"{section}.{key}" for section, names in SETTINGS.items() for key in names]
    words = [f"{name}.{key}" for name, part in given.items() for key in (part if isinstance(part, dict) else [""])]
    for word in words:
        if word not in keys:
            raise ConfigError(f"{word}: has no effect here{closest(word, keys)}; what has: {', '.join(keys)}")
    plain = {**noted, "data": {**noted["data"], "workers": None}}  # those of the training's machine
    checked = check_config(apply_overrides(plain, overrides), "the settings")
    assert isinstance(checked, SegmentationConfig)
    checked.data.given_for(checked.model.in_chans or 3)
    return checked


# -------------------------------------------------------------------------------------------------------- prediction


class _Loaded(NamedTuple):
    name: str
    size: tuple[int, int]  # height and width of the upright image
    pixels: torch.Tensor
    photo: Image.Image | None


class _Images(OpenedImages):
    """Images as an evaluation has them."""

    def __init__(self, images: Sequence[ImageFile], config: SegmentationConfig, needs_photo: bool) -> None:
        super().__init__(images, config.data)
        self.needs_photo = needs_photo
        self.transform = EvalTransform(config.data.short_side, config.data.preprocessing.channels)

    def loaded(self, name: str, image: Image.Image) -> _Loaded:
        photo = image if self.needs_photo else None
        return _Loaded(name, (image.height, image.width), self.transform.image(image), photo)


class MaskPrediction:
    """A segmentation that is ready to predict; see `registry.Predicting`.

    Args:
        checkpoint: its file.
        content: of it.
        options: how to predict.

    Attributes:
        title: what to call the network.
        names: of the classes for people.
        palette: a colour for each class, (classes, 3) uint8.

    Raises:
        UserError: the file cannot be used for it, or an option is wrong.
    """

    def __init__(self, checkpoint: str | Path, content: Mapping[str, Any], options: PredictionOptions) -> None:
        if options.explain:
            raise ConfigError(
                f"--explain: of a classifier's answer; {checkpoint} is a segmentation, whose masks say where"
            )
        self.options, self.device = options, choose_device(options.device)
        model, self.info = restore_network(content, checkpoint, options.use_ema)
        self.config = settings_from(self.info.recipe, options.overrides)
        self.answerer, images = answerer_for(self.config), self.config.data.preprocessing
        self.mean, self.std = (torch.tensor(values, device=self.device) for values in (images.mean, images.std))
        self.model = model.to(self.device)
        if self.config.train.channels_last:  # as in training and in an evaluation, for the same rounding
            self.model.to(memory_format=torch.channels_last)
        self._answer = capture(self.model)
        self.class_names = list(self.info.class_names or ())
        self.names = display_names(self.class_names)
        self.palette = colours(len(self.names))[:-1]
        self._weights = weights_text(self.info.weights(options.use_ema))
        self.title = f"{self.info.name or 'a network of its own'} of {printable(Path(checkpoint).name)}"

    def __str__(self) -> str:
        classes, data = counted(len(self.names), "class", "classes"), self.config.data
        head = self.config.model.head.name
        about = f"{self.title}, head {head}: {classes} of pixels, {self._weights}, on {self.device}"
        size = f"shorter side {data.short_side} pixels" if data.short_side else "at their own size"
        window = self.answerer.window
        how = f"in windows of {window[0]} x {window[1]}" if window else "whole"
        mirrored = ", also mirrored" if self.answerer.flip else ""
        return f"{printable(about)}\nimages: {size}, {how}{mirrored}; masks at the size of the photos"

    def results(self, folder: Path, images: Sequence[ImageFile]) -> MaskResults:
        """See `registry.Predicting`."""
        return MaskResults(folder, images, self)

    def predict(self, images: Sequence[ImageFile], results: MaskResults | None) -> Iterator[PredictedMask | Skipped]:
        """See `registry.Predicting`."""
        size = self.options.batch_size or BATCH_SIZE
        loader = _Images(images, self.config, results is not None).loader(size, FEW)
        place = 0
        for items in cast("Iterator[list[_Loaded | Skipped]]", batches(loader)):
            masks = iter(self._masks([item for item in items if isinstance(item, _Loaded)]))
            for item in items:
                yield item if isinstance(item, Skipped) else self._prediction(place, item, next(masks))
                place += 1

    @torch.inference_mode()
    def _masks(self, items: Sequence[_Loaded]) -> list[np.ndarray]:
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

    def _prediction(self, place: int, item: _Loaded, classes: np.ndarray) -> PredictedMask:
        counts = np.bincount(classes.ravel(), minlength=len(self.names))
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda index: -counts[index])
        areas = [AreaShare(i, self.class_names[i], self.names[i], int(counts[i])) for i in order]
        return PredictedMask(place, item.name, classes, areas, item.photo, self.options.topk)


# ------------------------------------------------------------------------------------------------------------- results


class MaskResults(ResultsFolder):
    """Results being written: masks and overlays, by the images' own names, a legend, JSON lines and contact sheets."""

    def __init__(self, folder: Path, images: Sequence[ImageFile], predicting: MaskPrediction) -> None:
        super().__init__(
            folder, images, predicting.title, "the classes over the images; below: their shares of the area"
        )
        self.predicting = predicting
        self.files = file_names(images, self.above)
        self._has_legend = False

    def add(self, prediction: PredictedMask) -> dict[str, Any]:
        """Adds an image; returns the object of its JSON line."""
        own = self.files[prediction.place]
        names = {"mask": f"masks/{own}.png", "overlay": f"overlays/{own}.jpg"}
        mask = mask_image(prediction.classes, self.predicting.palette)
        assert prediction.photo is not None
        colour = Image.fromarray(self.predicting.palette[prediction.classes])
        overlay = Image.blend(prediction.photo.convert("RGB"), colour, OPACITY)
        for name in names.values():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        mask.save(self.folder / names["mask"])
        overlay.save(self.folder / names["overlay"], quality=QUALITY)
        if not self._has_legend:
            entries = [tuple(colour) for colour in self.predicting.palette.tolist()]
            numbered = [f"{i}  {printable(name)}" for i, name in enumerate(self.predicting.names)]
            legend(list(zip(cast(Any, entries), numbered, strict=True))).save(self.folder / "legend.png")
            self._has_legend = True
        record = {**prediction.to_dict(), **names}
        self.write_line(record)
        self._show(prediction, overlay)
        return record

    def _show(self, prediction: PredictedMask, overlay: Image.Image) -> None:
        shown = prediction.areas[:MAX_BARS]
        bars = [(printable(area.name), prediction.share(area)) for area in shown]
        colour = [cast(Any, tuple(self.predicting.palette[area.index].tolist())) for area in shown]
        with any_size():
            preview = fitted(overlay, self.preview)
        self.show(Cell(preview, prediction.name, overlay.size, WHOLE, bars, colour))

    def __str__(self) -> str:
        return f"{super().__str__()}, {counted(self.count, 'mask')}, {counted(self.count, 'overlay')}, legend.png"


def file_names(images: Sequence[ImageFile], above: str) -> list[str]:
    """Returns a name for the files of each image, without an ending: its own path below a folder, `above`.

    Where two images differ in their endings alone, their names keep them.
    """
    paths = ["standard input" if image.name == STANDARD_INPUT else image.name.removeprefix(above) for image in images]
    plain = ["/".join(part for part in Path(path).parts if part not in ("/", "..", ".")) for path in paths]
    stems = [os.path.splitext(path)[0] for path in plain]
    times = Counter(stems)
    names = [stem if times[stem] == 1 else path for stem, path in zip(stems, plain, strict=True)]
    seen: set[str] = set()
    found = []
    for name in names:
        count, free = 1, name
        while free in seen:
            count += 1
            free = f"{name}_{count}"
        seen.add(free)
        found.append(free)
    return found
