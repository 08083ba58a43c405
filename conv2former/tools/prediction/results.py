"""What the predictions of a classifier leave in a folder: JSON lines, contact sheets, explanations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import counted
from ...text import printable
from .explain import Explainer
from .folder import JSON_LINES, common_folder, writing_folder
from .inputs import ImageFile
from .predict import Prediction, Predictor, unit_crop
from .sheet import WHOLE, Cell, contact_sheet, layout_for

__all__ = ["MAX_BARS", "Results", "ResultsFolder", "writing_results"]

SHEET_ROWS, MAX_BARS, MAX_SHEET_IMAGES = 6, 5, 1000


class ResultsFolder:
    """What every task's results have: a line of JSON for each image, and contact sheets; see `folder.AnyResults`.

    Args:
        folder: exists, and is empty.
        images: all that there are, whether or not they can be read.
        title: of the network, above each sheet.
        note: about the pictures, in the same place.
    """

    def __init__(self, folder: Path, images: Sequence[ImageFile], title: str, note: str = "") -> None:
        self.folder, self.total, self.title, self.note = folder, len(images), title, note
        self.above = common_folder(images)
        self.columns, self.preview = layout_for(self.total)
        self.per_sheet = self.columns * SHEET_ROWS
        self.pages = -(-min(self.total, MAX_SHEET_IMAGES) // self.per_sheet)
        self.count = self.sheets = 0
        self._cells: list[Cell] = []

    def write_line(self, record: dict[str, Any]) -> None:
        """Writes the line of one more image."""
        with (self.folder / JSON_LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.count += 1

    def show(self, cell: Cell) -> None:
        """Puts the image whose line was written last on a sheet, its title without the folder of all images."""
        if self.count > MAX_SHEET_IMAGES:
            return
        self._cells.append(cell._replace(title=printable(cell.title.removeprefix(self.above))))
        if len(self._cells) == self.per_sheet:
            self._write_sheet()

    def finish(self) -> None:
        """Writes the sheet that has been filled so far."""
        self._write_sheet()

    def _write_sheet(self) -> None:
        """Writes a sheet, if there is anything on it."""
        if not self._cells:
            return
        self.sheets += 1
        several = self.pages > 1
        name = f"sheet_{self.sheets:0{len(str(self.pages))}}.png" if several else "sheet.png"
        parts = [self.title]
        parts += [printable(self.above)] * bool(self.above)
        parts += [self.note] * bool(self.note)
        parts += ["in the frame: what the network sees"] * any(cell.frame != WHOLE for cell in self._cells)
        parts += [f"page {self.sheets} of {self.pages}"] * several
        contact_sheet(self._cells, self.columns, self.preview, " · ".join(parts)).save(self.folder / name)
        self._cells = []

    def __str__(self) -> str:
        more = f" of the first {MAX_SHEET_IMAGES:,} images" if self.count > MAX_SHEET_IMAGES else ""
        return f"{JSON_LINES}, {counted(self.sheets, 'contact sheet')}{more}"


class Results(ResultsFolder):
    """A classifier's results, with an explainer explanations, too.

    Args:
        folder: exists, and is empty.
        images: all that there are, whether or not they can be read.
        predictor: whose predictions they are.
        explainer: draws a picture of each prediction.
    """

    def __init__(
        self, folder: Path, images: Sequence[ImageFile], predictor: Predictor, explainer: Explainer | None = None
    ) -> None:
        super().__init__(folder, images, predictor.title)
        self.predictor, self.explainer = predictor, explainer

    def add(self, prediction: Prediction) -> dict[str, Any]:
        """Adds an image; returns the object of its JSON line."""
        record = prediction.to_dict()
        if self.explainer:
            record["explanation"] = self.explainer.write(prediction, self.folder, self.total, self.count + 1)
        self.write_line(record)
        if prediction.preview is not None:
            bars = [(printable(guess.name), guess.probability) for guess in prediction.top[:MAX_BARS]]
            crop = unit_crop(prediction.size, self.predictor.settings)
            self.show(Cell(prediction.preview, prediction.name, prediction.size, crop, bars))
        return record

    def __str__(self) -> str:
        return super().__str__() + (f", {counted(self.count, 'explanation')}" if self.explainer else "")


@contextmanager
def writing_results(
    folder: Path, images: Sequence[ImageFile], predictor: Predictor, explainer: Explainer | None = None
) -> Iterator[Results]:
    """Lets the results of a classifier be written into a folder; see `writing_folder`."""
    with writing_folder(folder, images, lambda temporary: Results(temporary, images, predictor, explainer)) as results:
        yield results
