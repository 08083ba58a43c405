"""What predictions of dense tasks share: their settings, images, networks, and the files that they leave."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image

from ...config import apply_overrides, check_config
from ...data import Skipped, batches
from ...data.classes import display_names
from ...data.images import any_size
from ...errors import ConfigError, closest
from ...tasks.dense.thumbnails import colours
from ...text import printable
from ...weights.description import weights_text
from .inputs import STANDARD_INPUT, ImageFile, OpenedImages
from .options import PredictionOptions
from .predict import choose_device, fitted
from .results import ResultsFolder
from .sheet import WHOLE, Cell, legend

__all__ = ["QUALITY", "DensePrediction", "DenseResults", "Loaded", "dense_settings", "distinct", "file_names"]

BATCH_SIZE = 1  # images may be large, and of many sizes
FEW = 8  # batches that are read without worker processes
QUALITY = 90  # of the JPEGs


def dense_settings(
    allowed: Mapping[str, Sequence[str]], noted: Mapping[str, Any], overrides: Sequence[str], **fixed: Any
) -> Any:
    """Returns how images become inputs and are answered: as a checkpoint's configuration says, with overrides.

    Args:
        allowed: keys that matter here, by their sections.
        noted: the configuration in the checkpoint.
        overrides: `data.short_side=800`.
        **fixed: sections with what holds where neither says it, or says something else of the training.

    Raises:
        ConfigError: an override is impossible, or has nothing to do with it.
    """
    given = apply_overrides({}, overrides)
    keys = [f"{section}.{key}" for section, names in allowed.items() for key in names]
    words = [f"{name}.{key}" for name, part in given.items() for key in (part if isinstance(part, dict) else [""])]
    for word in words:
        if word not in keys:
            raise ConfigError(f"{word}: has no effect here{closest(word, keys)}; what has: {', '.join(keys)}")
    plain = {**noted, **{section: {**noted[section], **values} for section, values in fixed.items()}}
    plain["data"] = {**plain["data"], "workers": None}  # noted are those of the training's machine
    checked = check_config(apply_overrides(plain, overrides), "the settings")
    checked.data.given_for(checked.model.in_chans or 3)
    return checked


class Loaded(NamedTuple):
    """An image as the network takes it, with its name, its height and width upright, and itself if it is drawn."""

    name: str
    size: tuple[int, int]
    pixels: torch.Tensor
    photo: Image.Image | None


class _Images(OpenedImages):
    """Images as an evaluation has them."""

    def __init__(self, images: Sequence[ImageFile], config: Any, transform: Any, needs_photo: bool) -> None:
        super().__init__(images, config.data)
        self.needs_photo, self.transform = needs_photo, transform

    def loaded(self, name: str, image: Image.Image) -> Loaded:
        photo = image if self.needs_photo else None
        return Loaded(name, (image.height, image.width), self.transform.image(image), photo)


class DensePrediction:
    """A network of a dense task that is ready to predict; see `registry.Predicting`.

    Args:
        checkpoint: its file.
        content: of it.
        options: how to predict.
        restore: from content, path and whether to take averaged weights to the network and what the file says.
        settings_from: from the configuration in the file and overrides to that of the prediction.
        kind: what it is, as a part of a sentence that says why its answers are not explained.

    Attributes:
        title: what to call the network.
        class_names, names: of the classes, in the checkpoint and for people.
        palette: a colour for each class, (classes, 3) uint8.

    Raises:
        UserError: the file cannot be used for it, or an option is wrong.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        content: Mapping[str, Any],
        options: PredictionOptions,
        restore: Callable[..., Any],
        settings_from: Callable[[Mapping[str, Any], Sequence[str]], Any],
        kind: str,
    ) -> None:
        if options.explain:
            raise ConfigError(f"--explain: of a classifier's answer; {checkpoint} is {kind}")
        self.options, self.device = options, choose_device(options.device)
        network, self.info = restore(content, checkpoint, options.use_ema)
        self.config = settings_from(self.info.recipe, options.overrides)
        self.model = network.to(self.device)
        if self.config.train.channels_last:  # as in training and in an evaluation, for the same rounding
            self.model.to(memory_format=torch.channels_last)
        self.class_names = list(self.info.class_names or ())
        self.names = display_names(self.class_names)
        self.palette = colours(len(self.names))[:-1]
        self.weights = weights_text(self.info.weights(options.use_ema))
        self.title = f"{self.info.name or 'a network of its own'} of {printable(Path(checkpoint).name)}"

    @abstractmethod
    def transform(self) -> Any:
        """Returns what makes of a photo, by its method `image`, what the network takes."""

    @abstractmethod
    def answers(self, items: Sequence[Loaded]) -> list[Any]:
        """Returns what is found in each of a few images."""

    @abstractmethod
    def prediction(self, place: int, item: Loaded, answer: Any) -> Any:
        """Returns what was found in an image, as the command shows it; see `registry.AnyPrediction`."""

    def predict(self, images: Sequence[ImageFile], results: Any | None) -> Iterator[Any]:
        """See `registry.Predicting`."""
        size = self.options.batch_size or BATCH_SIZE
        loader = _Images(images, self.config, self.transform(), results is not None).loader(size, FEW)
        place = 0
        for items in cast("Iterator[list[Loaded | Skipped]]", batches(loader)):
            answers = iter(self.answers([item for item in items if isinstance(item, Loaded)]))
            for item in items:
                yield item if isinstance(item, Skipped) else self.prediction(place, item, next(answers))
                place += 1


class DenseResults(ResultsFolder):
    """Results being written: pictures by the images' own names, a legend, JSON lines and contact sheets."""

    def __init__(self, folder: Path, images: Sequence[ImageFile], predicting: DensePrediction, note: str) -> None:
        super().__init__(folder, images, predicting.title, note)
        self.predicting = predicting
        self.files = file_names(images, self.above)

    def path(self, name: str) -> Path:
        """Returns the path of a file in the folder, whose own folder is made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_record(self, record: dict[str, Any]) -> None:
        """Writes the line of an image; with the first one a picture of the classes' colours, too."""
        if not self.count:
            entries = [cast(Any, tuple(colour)) for colour in self.predicting.palette.tolist()]
            numbered = [f"{i}  {printable(name)}" for i, name in enumerate(self.predicting.names)]
            legend(list(zip(entries, numbered, strict=True))).save(self.folder / "legend.png")
        self.write_line(record)

    def show_picture(
        self, name: str, size: tuple[int, int], picture: Image.Image, bars: Sequence[tuple[int, float]]
    ) -> None:
        """Puts a picture of an image on a contact sheet, above bars.

        Args:
            name: of the image.
            size: of it, width and height.
            picture: of it.
            bars: each of a class and a share.
        """
        texts = [(printable(self.predicting.names[index]), share) for index, share in bars]
        colour = [cast(Any, tuple(self.predicting.palette[index].tolist())) for index, _ in bars]
        with any_size():
            preview = fitted(picture, self.preview)
        self.show(Cell(preview, name, size, WHOLE, texts, colour))


def file_names(images: Sequence[ImageFile], above: str) -> list[str]:
    """Returns a name for the files of each image, without an ending: its own path below a folder, `above`.

    Where two images differ in their endings alone, their names keep them.
    """
    paths = ["standard input" if image.name == STANDARD_INPUT else image.name.removeprefix(above) for image in images]
    plain = ["/".join(part for part in Path(path).parts if part not in ("/", "..", ".")) for path in paths]
    stems = [os.path.splitext(path)[0] for path in plain]
    times = Counter(stems)
    return distinct([stem if times[stem] == 1 else path for stem, path in zip(stems, plain, strict=True)])


def distinct(names: Sequence[str]) -> list[str]:
    """Returns names of which no two are equal: a number is put behind those that came before."""
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
