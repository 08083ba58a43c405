"""Predicts classes of images from anywhere, and keeps what was found: JSON lines and contact sheets."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .._preprocessing import CHANNELS, FIELDS
from ..config import apply_overrides, check_config
from ..config.schema import DataConfig
from ..data import Skipped, batches, eval_transform
from ..data.classes import class_names_of, display_names, match_classes
from ..data.files import find_files
from ..data.images import IMAGE_ENDINGS, UnreadableImage, any_size, open_rgb, unread_hint
from ..data.loader import workers_for
from ..data.workers import Sent, portable_errors
from ..errors import CheckpointError, ConfigError, DataError, OutputError, bullets, closest, counted
from ..models import Preprocessing, load_model
from ..models.weights import weights_text
from ..text import printable
from .output import replacing
from .sheet import WHOLE, Cell, contact_sheet, layout_for

if TYPE_CHECKING:
    from .explain import Explainer

__all__ = [
    "Guess",
    "ImageFile",
    "Prediction",
    "Predictor",
    "Results",
    "check_channels",
    "check_results_folder",
    "choose_device",
    "find_images",
    "positive",
    "raise_unreadable",
    "read_settings",
    "unit_crop",
    "writing_results",
]

STANDARD_INPUT = "-"
JSON_LINES = "predictions.jsonl"
OWN_FILE = re.compile(r"predictions\.jsonl|sheet(_\d+)?\.png|explanations")  # what a folder of results holds
SHEET_ROWS, MAX_BARS, MAX_SHEET_IMAGES = 6, 5, 1000
SETTINGS = (
    *FIELDS,
    "value_range",
    "max_image_pixels",
    "workers",
)  # keys of a data section that matter here


class ImageFile(NamedTuple):
    """An image to read: what to call it, and its path or its bytes."""

    name: str
    file: str | bytes


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


def find_images(inputs: Sequence[str]) -> list[ImageFile]:
    """Finds the images that a user names, in that order, each once.

    Args:
        inputs: image files, whatever their names end with; folders, of which all images in and below are taken; glob
            patterns, of whose matches folders and images are; '-' for one image on standard input, which is read here.

    Raises:
        DataError: one of them does not exist, matches nothing or has no image.
    """
    found: dict[str, ImageFile] = {}
    for text in inputs:
        is_folder = os.path.isdir(text)
        for image in _images_of(text):
            found.setdefault(_key_of(image, is_folder), image)
    return list(found.values())


def _key_of(image: ImageFile, is_folder: bool) -> str:
    """Returns what is the same for one image; a link counts as one of its own only where the user names it."""
    if isinstance(image.file, bytes):
        return image.name
    if is_folder:
        return os.path.realpath(image.file)
    folder, name = os.path.split(image.file)
    return os.path.join(os.path.realpath(folder), name)


def _images_of(text: str) -> Iterator[ImageFile]:
    if text == STANDARD_INPUT:
        yield _read_standard_input()
    elif os.path.isdir(text):
        yield from _images_in(text)
    elif os.path.lexists(text):
        yield ImageFile(text, text)
    elif glob.has_magic(text):
        matches = sorted(glob.glob(text, recursive=True))
        images = [image for match in matches if os.path.isdir(match) for image in _images_in(match, required=False)]
        images += [ImageFile(match, match) for match in matches if _is_image(match) and not os.path.isdir(match)]
        if not images:
            others = f"; {counted(len(matches), 'match', 'matches')} without an image's ending" if matches else ""
            hint = unread_hint(os.path.splitext(match)[1] for match in matches)
            raise DataError(f"{text}: no image matches{others}{hint}")
        yield from sorted(images)
    else:
        raise DataError(f"{text}: no such file or folder")


def _images_in(folder: str, required: bool = True) -> list[ImageFile]:
    try:
        paths = find_files(Path(folder)).paths
    except OSError as e:
        raise DataError(f"{e.filename or folder}: cannot be read ({e.strerror})") from None
    images = [ImageFile(path, path) for path in paths if _is_image(path)]
    if required and not images:
        hint = unread_hint(os.path.splitext(path)[1] for path in paths)
        raise DataError(
            f"{folder}: no image in this folder or below it; images end in {', '.join(IMAGE_ENDINGS)}{hint}"
        )
    return images


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_ENDINGS)


def _read_standard_input() -> ImageFile:
    if sys.stdin.isatty():
        raise DataError("-: standard input is the terminal; let a program write an image to it, as in `camera | ...`")
    return ImageFile(STANDARD_INPUT, sys.stdin.buffer.read())


def raise_unreadable(unreadable: Sequence[Skipped], total: int) -> None:
    """Raises one DataError that names every image that could not be read, if there are any."""
    reasons = [item.reason for item in unreadable]
    if total == len(reasons) == 1:
        raise DataError(reasons[0])
    if reasons:
        rest = "the others are done" if len(reasons) < total else "nothing is written"
        raise DataError(f"{len(reasons):,} of {total:,} images cannot be read, {rest}:", *bullets(reasons))


# ---------------------------------------------------------------------------------------------------------- settings


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
    checked = check_config({"data": plain}, "the preprocessing").data
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


class _Images(Dataset):
    """Images through the evaluation transform."""

    def __init__(self, images: Sequence[ImageFile], settings: DataConfig, preview: int | None) -> None:
        self.images, self.settings, self.preview = images, settings, preview
        self.transform = eval_transform(settings)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Loaded | Skipped:
        name, file = self.images[index]
        shown = "standard input" if name == STANDARD_INPUT else name
        try:
            image = open_rgb(file, shown, self.settings.value_range, self.settings.max_image_pixels)
        except UnreadableImage as e:
            return Skipped(name, str(e))
        with portable_errors(), any_size():
            preview = _fitted(image, self.preview) if self.preview else None
            return _Loaded(name, image.size, self.transform(image), preview)


def _fitted(image: Image.Image, side: int) -> Image.Image:
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
        self, checkpoint: str | Path, overrides: Sequence[str] = (), device: str = "auto", use_ema: bool = True
    ) -> None:
        self.device = choose_device(device)
        model, self.info = load_model(checkpoint, use_ema)
        if not self.info.num_classes:
            raise CheckpointError(f"{checkpoint} has no classifier; to predict classes the network needs one")
        check_channels(checkpoint, self.info.in_chans)
        self.model = model.to(self.device)
        self.settings = read_settings(self.info.preprocessing, overrides, self.info.recipe.get("data"))
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
        count = -(-len(images) // batch_size)
        loader = DataLoader(
            cast(Any, _Images(images, self.settings, preview)),
            batch_size=batch_size,
            num_workers=0 if count < 2 else min(workers_for(self.settings), count, os.cpu_count() or 1),
            collate_fn=Sent(list),
        )
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
        probabilities = self.model(pixels.to(self.device)).softmax(1)
        if not torch.isfinite(probabilities).all():
            raise CheckpointError("the network's answers are not all numbers (NaN): its weights are broken")
        values, indices = (t.tolist() for t in probabilities.topk(min(topk, probabilities.shape[1])))
        return [[self.guess(i, p) for i, p in zip(*row, strict=True)] for row in zip(indices, values, strict=True)]

    def guess(self, index: int, probability: float) -> Guess:
        """Returns a class with its names."""
        return Guess(index, self.class_names[index] if self.class_names else None, self.names[index], probability)


# ------------------------------------------------------------------------------------------------------------ results


class Results:
    """A folder of results being written: `predictions.jsonl`, contact sheets, and with an explainer explanations.

    Args:
        folder: exists, and is empty.
        images: all that there are, whether or not they can be read.
        predictor: whose predictions they are.
        explainer: draws a picture of each prediction.
    """

    def __init__(
        self, folder: Path, images: Sequence[ImageFile], predictor: Predictor, explainer: Explainer | None = None
    ) -> None:
        self.folder, self.total, self.predictor, self.explainer = folder, len(images), predictor, explainer
        self.above = _common_folder(images)
        self.columns, self.preview = layout_for(self.total)
        self.per_sheet = self.columns * SHEET_ROWS
        self.pages = -(-min(self.total, MAX_SHEET_IMAGES) // self.per_sheet)
        self.count = self.sheets = 0
        self._cells: list[Cell] = []

    def add(self, prediction: Prediction) -> dict[str, Any]:
        """Adds an image; returns the object of its JSON line."""
        record = prediction.to_dict()
        if self.explainer:
            record["explanation"] = self.explainer.write(prediction, self.folder, self.total, self.count + 1)
        with (self.folder / JSON_LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.count += 1
        if self.count <= MAX_SHEET_IMAGES and prediction.preview is not None:
            bars = [(printable(guess.name), guess.probability) for guess in prediction.top[:MAX_BARS]]
            crop = unit_crop(prediction.size, self.predictor.settings)
            title = printable(prediction.name.removeprefix(self.above))
            self._cells.append(Cell(prediction.preview, title, prediction.size, crop, bars))
            if len(self._cells) == self.per_sheet:
                self.write_sheet()
        return record

    def write_sheet(self) -> None:
        """Writes the sheet that has been filled so far, if there is anything on it."""
        if not self._cells:
            return
        self.sheets += 1
        several = self.pages > 1
        name = f"sheet_{self.sheets:0{len(str(self.pages))}}.png" if several else "sheet.png"
        parts = [self.predictor.title]
        parts += [printable(self.above)] * bool(self.above)
        parts += ["in the frame: what the network sees"] * any(cell.frame != WHOLE for cell in self._cells)
        parts += [f"page {self.sheets} of {self.pages}"] * several
        contact_sheet(self._cells, self.columns, self.preview, " · ".join(parts)).save(self.folder / name)
        self._cells = []

    def __str__(self) -> str:
        parts = [JSON_LINES, counted(self.sheets, "contact sheet")]
        if self.count > MAX_SHEET_IMAGES:
            parts[-1] += f" of the first {MAX_SHEET_IMAGES:,} images"
        if self.explainer:
            parts.append(counted(self.count, "explanation"))
        return ", ".join(parts)


def _common_folder(images: Sequence[ImageFile]) -> str:
    """Returns the path of the deepest folder that all images are below, with a slash; '' where there is none."""
    folders = {os.path.dirname(image.name) for image in images}
    if len({os.path.isabs(folder) for folder in folders}) > 1:
        return ""
    common = os.path.commonpath(folders)
    return os.path.join(common, "") if common else ""


@contextmanager
def writing_results(
    folder: Path, images: Sequence[ImageFile], predictor: Predictor, explainer: Explainer | None = None
) -> Iterator[Results]:
    """Lets results be written into a folder that appears whole, or not at all: after an error, or without any result.

    A folder that holds nothing but earlier results is replaced.

    Raises:
        OutputError: it cannot be written, or holds something else.
    """
    folder = Path(os.path.realpath(folder))  # a link stays one
    check_results_folder(folder, images)
    with replacing(folder) as temporary:
        temporary.mkdir()
        results = Results(temporary, images, predictor, explainer)
        yield results
        results.write_sheet()
        if not results.count:
            shutil.rmtree(temporary)
        elif folder.exists():
            check_results_folder(folder, images)  # again: it may have been used in the meantime
            os.replace(folder, temporary.with_name("replaced"))  # goes with the temporary folder


def check_results_folder(folder: Path, images: Sequence[ImageFile] = ()) -> None:
    """Raises OutputError if there is something at `folder` that is not results of an earlier call, or of `images`."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as e:
        raise OutputError(f"{folder} cannot be written ({e.strerror}); give the name of a folder") from None
    own = str(folder.resolve())
    inputs = [image.name for image in images if isinstance(image.file, str)]
    if names and any(os.path.realpath(name).startswith(os.path.join(own, "")) for name in inputs):
        raise OutputError(f"{folder} holds images to predict; give another folder")
    foreign = [name for name in names if not OWN_FILE.fullmatch(name)]
    if names and JSON_LINES not in names:
        foreign = foreign or names
    if "explanations" in names:
        inside = os.listdir(folder / "explanations") if (folder / "explanations").is_dir() else ["explanations"]
        foreign += [name for name in inside if not re.fullmatch(r"\d+_.*\.png", name, re.DOTALL)]
    if foreign:
        raise OutputError(f"{folder} holds something else than predictions ({foreign[0]}); give another folder")
