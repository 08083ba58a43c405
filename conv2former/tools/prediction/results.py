"""The folder of results of a prediction, which appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import OutputError, counted
from ...text import printable
from ..output import replacing
from .explain import Explainer
from .inputs import ImageFile
from .predict import Prediction, Predictor, unit_crop
from .sheet import WHOLE, Cell, contact_sheet, layout_for

__all__ = ["Results", "check_results_folder", "writing_results"]

JSON_LINES = "predictions.jsonl"
OWN_FILE = re.compile(r"predictions\.jsonl|sheet(_\d+)?\.png|explanations")  # what a folder of results holds
SHEET_ROWS, MAX_BARS, MAX_SHEET_IMAGES = 6, 5, 1000


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
