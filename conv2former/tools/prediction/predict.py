"""Predicts classes of images from anywhere, and keeps what was found: JSON lines and contact sheets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image

from ..._preprocessing import CHANNELS, FIELDS
from ...config import apply_overrides, check_config
from ...config.registry import as_classification
from ...config.schema import DataConfig
from ...data import Skipped, batches, eval_transform
from ...data.classes import class_names_of, display_names, match_classes
from ...errors import CheckpointError, ConfigError, DataError, closest, counted
from ...inference import capture
from ...models import Preprocessing, load_model
from ...models.others import check_size
from ...models.restore import restore
from ...text import printable
from ...weights.description import weights_text
from .inputs import ImageFile, OpenedImages

__all__ = [
    "Guess",
    "Prediction",
    "Predictor",
    "check_channels",
    "choose_device",
    "fitted",
    "positive",
    "read_settings",
    "unit_crop",
]

SETTINGS = (
    *FIELDS,
    "value_range",
    "max_image_pixels",
    "workers",
)  # keys of a data section that matter here


@dataclass(frozen=True)
class Guess:
    """A class: its index, the checkpoint's name for it if there is one, a name for people, and its probability."""

    index: int
    class_name: str | None
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What was found for one image.

    Attributes:
        name: of the image, as it was given or found.
        size: width and height of the image when upright, pixels.
        top: the most probable classes, best first.
        pixels: the network's input, (channels, height, width).
        preview: the whole image, made small; None if it was not asked for.
    """

    name: str
    size: tuple[int, int]
    top: list[Guess]
    pixels: torch.Tensor
    preview: Image.Image | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the prediction as the object of a JSON line; probabilities have six significant digits."""
        top = [
            {"class": g.class_name, "index": g.index, "name": g.name, "probability": float(f"{g.probability:.6g}")}
            for g in self.top
        ]
        return {"image": self.name, "size": list(self.size), "top": top}

    def __str__(self) -> str:
        return ", ".join(f"{printable(guess.name)}: {100 * guess.probability:.1f} %" for guess in self.top)


def positive(text: str) -> int:
    """Reads a whole number above 0 from the command line.

    Raises:
        ValueError: it is none.
    """
    if int(text) < 1:
        raise ValueError
    return int(text)


# ------------------------------------------------------------------------------------------------------ which images


def read_settings(noted: Preprocessing, overrides: Sequence[str], section: Any = None) -> DataConfig:
    """Returns how images become inputs: as a checkpoint notes it, with overrides such as `data.crop_pct=1`.

    Args:
        noted: by the checkpoint.
        overrides: from the command line.
        section: the data section of the checkpoint's configuration, of which it takes how files are read.

    Raises:
        ConfigError: an override is impossible, or has nothing to do with it.
    """
    raw = apply_overrides({}, overrides)
    data = raw.pop("data", {})
    if not isinstance(data, dict):
        raise ConfigError("data: expected one of its keys, for example data.img_size=224")
    foreign = sorted([*raw, *(f"data.{key}" for key in data if key not in SETTINGS)])
    if foreign:
        keys = [f"data.{key}" for key in SETTINGS]
        raise ConfigError(f"{foreign[0]}: has no effect here{closest(foreign[0], keys)}; what has: {', '.join(keys)}")
    section = section if isinstance(section, dict) else {}
    reading = {key: section.get(key) for key in ("value_range", "max_image_pixels")}
    given = {key: value for key, value in data.items() if value is not None or key not in FIELDS}
    plain = {**noted.to_dict(), **reading, **given, "root": "."}
    checked = as_classification(check_config({"data": plain}, "the preprocessing")).data
    checked.given_for(noted.channels)
    return checked


def check_channels(path: object, count: int) -> None:
    """Raises CheckpointError if a network takes other channels than images can have here: 3, RGB, or 1, grey."""
    if count not in CHANNELS:
        raise CheckpointError(
            f"the network in {path} takes images of {counted(count, 'channel')}; those that can be read are RGB (3) or "
            "grey (1)"
        )


def choose_device(name: str) -> torch.device:
    """Returns the device called 'cpu' or 'cuda'; for 'auto' the GPU if there is one.

    Raises:
        ConfigError: there is no GPU, and it was asked for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch sees no GPU here; leave it out, or give cpu")
    return torch.device(name)


def unit_crop(size: tuple[int, int], settings: DataConfig | Preprocessing) -> tuple[float, float, float, float]:
    """Returns the part of an image that the network sees, as shares of its width and height: left, top, right, bottom.

    Args:
        size: width and height of the image.
        settings: size and crop; with `crop_mode` 'border' the image may be smaller than the crop, all of it is seen.
    """
    seen = settings.preprocessing if isinstance(settings, DataConfig) else settings
    input_size = seen.size[::-1]
    resized = [int(side / seen.crop_pct) for side in input_size]  # what the image is resized to, fits into or covers
    factors = [to / side for to, side in zip(resized, size, strict=True)]
    if seen.crop_mode != "squash":
        factors = [min(factors) if seen.crop_mode == "border" else max(factors)] * 2
    halves = [min(1.0, to / (factor * side)) / 2 for to, factor, side in zip(input_size, factors, size, strict=True)]
    return 0.5 - halves[0], 0.5 - halves[1], 0.5 + halves[0], 0.5 + halves[1]


# -------------------------------------------------------------------------------------------------------- prediction


class _Loaded(NamedTuple):
    name: str
    size: tuple[int, int]
    pixels: torch.Tensor
    preview: Image.Image | None


class _Images(OpenedImages):
    """Images through the evaluation transform."""

    def __init__(self, images: Sequence[ImageFile], settings: DataConfig, preview: int | None) -> None:
        super().__init__(images, settings)
        self.preview = preview
        self.transform = eval_transform(settings)

    def loaded(self, name: str, image: Image.Image) -> _Loaded:
        preview = fitted(image, self.preview) if self.preview else None
        return _Loaded(name, image.size, self.transform(image), preview)


def fitted(image: Image.Image, side: int) -> Image.Image:
    """Returns the image scaled so that its longer side is `side`; the pixels of a small one stay visible as squares."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor >= 3 else Image.Resampling.LANCZOS, reducing_gap=3.0)


class Predictor:
    """A classifier from a weight file.

    Args:
        checkpoint: a file or folder that `load_model` takes.
        overrides: of the file's preprocessing, `data.crop_pct=1`.
        device: where to compute, 'auto', 'cpu' or 'cuda'.
        use_ema: take the averaged weights where the file has them.
        content: of the file, where it has been read already.

    Attributes:
        model: the network, in evaluation mode.
        info: what the file says about itself.
        settings: how images become inputs.
        class_names: in index order, None where nobody knows them.
        names: of the classes for people, 'class 7' where nobody knows them.

    Raises:
        UserError: the file cannot be used for it, or an override is wrong.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        overrides: Sequence[str] = (),
        device: str = "auto",
        use_ema: bool = True,
        content: Mapping[str, Any] | None = None,
    ) -> None:
        self.device = choose_device(device)
        model, self.info = load_model(checkpoint, use_ema) if content is None else restore(content, checkpoint, use_ema)
        if not self.info.num_classes:
            raise CheckpointError(f"{checkpoint} has no classifier; to predict classes the network needs one")
        check_channels(checkpoint, self.info.in_chans)
        self.settings = read_settings(self.info.preprocessing, overrides, self.info.recipe.get("data"))
        check_size(model, checkpoint, self.settings.preprocessing.size, self.info.in_chans)
        self.model = model.to(self.device)
        self._answer = capture(self.model)  # whole batches come often, and the last one once
        self.class_names = class_names_of(self.info.num_classes, self.info.class_names)
        numbered = [f"class {i}" for i in range(self.info.num_classes)]
        self.names = display_names(self.class_names) if self.class_names else numbered
        self._weights = weights_text(self.info.weights(use_ema))
        self.title = f"{self.info.name or 'a network of its own'} of {printable(Path(checkpoint).name)}"

    def __str__(self) -> str:
        classes = counted(self.info.num_classes, "class", "classes")
        about = f"{self.title}: {classes}, {self._weights}, on {self.device}"
        return f"{printable(about)}\nimages: {printable(str(self.settings.preprocessing))}"

    def class_index(self, text: str) -> int:
        """Returns the index of a class that the user names: as the checkpoint or a person does, or by its index.

        Raises:
            ConfigError: there is none of this name.
        """
        names = [*(self.class_names or []), *self.names]
        if text in names:
            return names.index(text) % len(self.names)
        if self.class_names:
            try:
                return match_classes([text], self.class_names, "")[0]  # by other names of ImageNet's classes
            except DataError:
                pass
        if text.isascii() and text.isdigit() and int(text) < len(self.names):
            return int(text)
        last = len(self.names) - 1
        raise ConfigError(f"--class {text}: no such class{closest(text, names)}; give a name, or an index up to {last}")

    def __call__(
        self, images: Sequence[ImageFile], topk: int = 5, batch_size: int = 32, preview: int | None = None
    ) -> Iterator[Prediction | Skipped]:
        """Predicts the classes of images, in their order; those that cannot be read come as `Skipped`.

        Args:
            images: see `find_images`.
            topk: how many classes, at most.
            batch_size: images in a forward pass; it changes the results by rounding only.
            preview: the longer side of the images' previews, pixels; None for none.
        """
        loader = _Images(images, self.settings, preview).loader(batch_size, few=2)
        for items in cast("Iterator[list[_Loaded | Skipped]]", batches(loader)):
            pixels = [item.pixels for item in items if isinstance(item, _Loaded)]
            tops = iter(self._top(torch.stack(pixels), topk) if pixels else [])
            for item in items:
                if isinstance(item, Skipped):
                    yield item
                else:
                    yield Prediction(item.name, item.size, next(tops), item.pixels, item.preview)

    @torch.inference_mode()
    def _top(self, pixels: torch.Tensor, topk: int) -> list[list[Guess]]:
        probabilities = self._answer(pixels.to(self.device), copy=False).softmax(1)
        if not torch.isfinite(probabilities).all():
            raise CheckpointError("the network's answers are not all numbers (NaN): its weights are broken")
        values, indices = (t.tolist() for t in probabilities.topk(min(topk, probabilities.shape[1])))
        return [[self.guess(i, p) for i, p in zip(*row, strict=True)] for row in zip(indices, values, strict=True)]

    def guess(self, index: int, probability: float) -> Guess:
        """Returns a class with its names."""
        return Guess(index, self.class_names[index] if self.class_names else None, self.names[index], probability)
