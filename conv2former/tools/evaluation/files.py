"""What an evaluation leaves: results.json and results.csv, tables per class, pictures; and its text on a terminal."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data import DataSource, StreamSource
from ...data.classes import display_names
from ...data.images import UnreadableImage
from ...errors import OutputError, counted, shorten
from ...tasks.classification.class_metrics import ClassMetrics, about_missing
from ...tasks.classification.evaluation import MAX_CONFUSION_CLASSES, SMALL_SPLIT, Evaluation, has_top5, one_image
from ...tasks.classification.tallies import Mistake, calibration_error
from ...text import clipped
from ...weights.description import weights_text
from ...weights.preprocessing import Preprocessing
from ..output import check_writable, replacing, save_figure, text_table, write_csv
from .tables import written

__all__ = [
    "DEFAULT_FOLDER",
    "NOT_FINITE",
    "Extras",
    "check_folder",
    "folders_of",
    "heading",
    "summary",
    "write_extras",
    "write_results",
]

WORST_CLASSES = 10  # shown on a terminal
_NESTED = ("notes", "worst", "worst_classes", "per_class", "files", "changed")  # what has no column in results.csv
PICTURE_SIDE = 320  # pixels, at most, of a mistake's image
DEFAULT_FOLDER = Path("runs/evaluation")
NOT_FINITE = "the loss is not a finite number: so are some of the network's answers, or its weights"


@dataclass(frozen=True)
class Extras:
    """What to find out beyond the metrics.

    Attributes:
        real: also score by the ReaL labels.
        per_class: a table of all classes.
        confusion: a picture of the confusions.
        calibration: expected calibration error and reliability diagram.
        worst: how many of the worst mistakes to show; 0 for none.
    """

    real: bool = False
    per_class: bool = False
    confusion: bool = False
    calibration: bool = False
    worst: int = 0

    @property
    def need_files(self) -> bool:
        """Whether something is asked for that is a file."""
        return bool(self.per_class or self.confusion or self.calibration or self.worst)

    def folder_for(self, output: str | Path | None) -> Path | None:
        """Returns the folder of the results: the one that is given, or one of its own if files need one."""
        return Path(output) if output else DEFAULT_FOLDER if self.need_files else None


def check_folder(folder: Path) -> None:
    """Checks that files can be written in a folder, which is made.

    Raises:
        OutputError: they cannot.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; --output takes a folder")
    check_writable(folder / "results.json")


def folders_of(folder: Path | None, rows: Sequence[tuple[Path, str]]) -> list[Path]:
    """Returns a folder for the files of each row: `folder` itself for a single one, or else one below it for each.

    Args:
        folder: of all results; None for none.
        rows: checkpoint and name of the preprocessing.
    """
    if folder is None:
        return []
    if len(rows) == 1:
        return [folder]
    views = {view for _, view in rows}
    times: Counter[str] = Counter()
    out = []
    for path, view in rows:
        name = _stem(path) + (f"-{view}" if len(views) > 1 else "")
        times[name] += 1
        out.append(folder / (name if times[name] == 1 else f"{name}-{times[name]}"))
    return out


def _stem(path: Path) -> str:
    name = path.name.removeprefix("local-dir:")
    for ending in (".pth.tar", ".safetensors", ".pth", ".pt", ".bin"):
        name = name.removesuffix(ending)
    return name or "checkpoint"


# ------------------------------------------------------------------------------------------------------------ the files


def write_results(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes results.json, everything, and results.csv, the numbers.

    Raises:
        OutputError: they cannot be written.
    """
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(_plain(rows), indent=2) + "\n", "utf-8")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [key for key in columns if key not in _NESTED]
    columns = [key for key in columns if not key.endswith("top5") or any(row.get(key) is not None for row in rows)]
    cells = ([_cell(row.get(key)) for key in columns] for row in rows)
    write_csv(folder / "results.csv", columns, cells)


def _plain(value: Any) -> Any:
    """Returns JSON's types; it has no word for a number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _cell(value: Any) -> Any:
    if isinstance(value, list):  # mean and std; of the skipped images their number
        return " ".join(map(str, value)) if all(isinstance(v, float) for v in value) and value else len(value)
    return "" if value is None else value


def write_extras(
    folder: Path,
    row: dict[str, Any],
    result: Evaluation,
    source: DataSource | StreamSource,
    class_names: Sequence[str],
    extras: Extras,
) -> dict[str, Any]:
    """Writes the files that were asked for.

    Args:
        folder: where.
        row: what was evaluated.
        result: of it.
        source: the images.
        class_names: of the classes in `result`.
        extras: what was asked for.

    Returns:
        What to add to the row: `files`, by what they are; `worst_classes`, `ece` in percent, `worst`.

    Raises:
        OutputError: a file cannot be written.
    """
    from ...tasks import pictures

    shown = display_names(class_names)
    checkpoint, data = (clipped(row[key], 50, keep_end=True) for key in ("checkpoint", "data"))
    title = f"{checkpoint}\n{data}, {row['preprocessing']} preprocessing"
    files: dict[str, Path] = {}
    found: dict[str, Any] = {}
    if extras.per_class:
        table = _class_rows(result, class_names, shown)
        files["per_class"] = folder / "per_class.csv"
        write_csv(files["per_class"], list(table[0]), ([_cell(v) for v in line.values()] for line in table))
        present = [line for line in table if line["n"]]
        found["worst_classes"] = sorted(present, key=lambda line: line["top1"])[:WORST_CLASSES]
    if extras.confusion and result.confusion is not None:
        files["confusion"] = folder / "confusion.png"
        heading = f"{title}\n{counted(int(row['n']), 'image')}, top-1 {row['top1']:.2f} %"
        figure = _confusion_figure(result.confusion, shown, heading)
        save_figure(figure, files["confusion"])
    if extras.calibration:
        sums = result.tallies["calibration"]
        found["ece"] = 100 * calibration_error(sums)
        files["calibration"] = folder / "calibration.png"
        save_figure(pictures.reliability_figure(sums, found["ece"] / 100, title), files["calibration"])
    if extras.worst:
        assert isinstance(source, DataSource)
        found["worst"] = [_mistake_row(mistake, source, shown) for mistake in result.tallies["worst"]]
        if found["worst"]:
            files["worst"] = folder / "worst.png"
            heading = f"{title}\nthe {counted(len(found['worst']), 'mistake')} of the highest loss"
            save_figure(_worst_figure(result.tallies["worst"], found["worst"], source, heading), files["worst"])
    return {**found, "files": {key: str(path) for key, path in files.items()}}


def _confusion_figure(counts: torch.Tensor, shown: Sequence[str], title: str) -> Any:
    """Draws a table with numbers if it is legible, which it may be of the few classes of many that occur."""
    from ...tasks import pictures

    kept = list(range(len(counts)))
    if len(counts) > MAX_CONFUSION_CLASSES:
        kept = torch.nonzero(counts.sum(0) + counts.sum(1))[:, 0].tolist()
    if len(kept) > MAX_CONFUSION_CLASSES:
        return pictures.many_confusions_figure(counts, list(shown), title)
    return pictures.confusion_figure(counts[kept][:, kept].tolist(), [shown[i] for i in kept], title)


def _class_rows(result: Evaluation, class_names: Sequence[str], shown: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a line for each class; percentages are None where there are no images."""
    rows = []
    confusion = result.confusion
    f1 = ClassMetrics.of(result.per_class).f1.tolist()
    for i, (n, top1, top5, answered) in enumerate(result.per_class.T.tolist()):
        line: dict[str, Any] = {"class": class_names[i], "name": shown[i], "n": n}
        line["top1"] = 100 * top1 / n if n else None
        if has_top5(len(class_names)):
            line["top5"] = 100 * top5 / n if n else None
        line["answered"] = answered  # how often it was the network's answer
        line["precision"] = 100 * top1 / answered if answered else None
        line["f1"] = None if math.isnan(f1[i]) else f1[i]
        if confusion is not None:
            others = confusion[i].clone()
            others[i] = 0
            most = int(others.argmax())
            times = int(others[most])
            line |= {"taken_for": shown[most] if times else "", "times": times}
        rows.append(line)
    return rows


def _mistake_row(mistake: Mistake, source: DataSource, shown: Sequence[str]) -> dict[str, Any]:
    return {
        "image": source.images.name(mistake.place),
        "index": mistake.place,
        "true": shown[mistake.label],
        "predicted": shown[mistake.predicted],
        "confidence": mistake.confidence,
        "true_confidence": mistake.label_confidence,
        "loss": mistake.loss,
    }


def _worst_figure(mistakes: Sequence[Mistake], rows: Sequence[dict[str, Any]], source: DataSource, title: str) -> Any:
    from ...tasks.pictures import grid_figure

    images, captions = [], []
    for mistake, row in zip(mistakes, rows, strict=True):
        try:
            image = source.images[mistake.place][0]
        except UnreadableImage:  # it could be read a moment ago
            continue
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        images.append(np.asarray(image))
        captions.append(
            f"true: {clipped(row['true'], 24)}, {row['true_confidence']:.1%}\n"
            f"predicted: {clipped(row['predicted'], 24)}, {row['confidence']:.1%}\n"
            f"{clipped(os.path.join(*Path(row['image']).parts[-2:]), 34, keep_end=True)}"
        )
    return grid_figure(images, captions, columns=5, size=2.2, title=title)


# ------------------------------------------------------------------------------------------------------- on a terminal


def heading(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns lines that say what is evaluated, how and on what, which is known before it begins.

    Args:
        rows: as `validate_files` returns them, at least one; of the metrics `n` alone is needed.
    """
    lines = [f"{row['checkpoint']}: {row['variant']}, {weights_text(row['weights'])}" for row in rows]
    lines += [_data_line(row) for row in rows]
    lines += _view_lines(rows)
    lines += [f"note: {text}" for row in rows for text in row["notes"] if text != NOT_FINITE]
    return list(dict.fromkeys(lines))


def summary(rows: Sequence[dict[str, Any]], folder: Path | None = None, is_headed: bool = False) -> list[str]:
    """Returns lines that say what was evaluated, and the results as a table.

    Args:
        rows: as `validate_files` returns them, at least one.
        folder: where results.json is; None where nothing was written.
        is_headed: the lines of `heading` are there already.
    """
    lines = list(dict.fromkeys(f"skipped: {reason}" for row in rows for reason in row["skipped"]))
    if not is_headed:
        lines += heading(rows)
    lines += ["", *_results_table(rows)]
    if notes := _result_notes(rows):
        lines += ["", *notes]
    for row in rows:
        if "worst_classes" in row:
            lines += ["", *_worst_classes_table(row)]
    for row in rows:
        if "worst" in row and not row["worst"]:
            lines += ["", f"{row['checkpoint']}, {row['preprocessing']}: no mistakes, so no picture of the worst"]
    return lines + written(rows, folder)


def _result_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns lines on what the numbers are worth."""
    lines = []
    for row in rows:
        if NOT_FINITE in row["notes"]:
            lines.append(f"note: {NOT_FINITE}")
        if 0 < row["n"] < SMALL_SPLIT:
            lines.append(f"note: {one_image(row['n'])} of top-1; ± is its standard error, sqrt(p (1 - p) / n)")
        if missing := about_missing(row["per_class"]):
            lines.append(f"note: {missing}")
    return list(dict.fromkeys(lines))


def _data_line(row: dict[str, Any]) -> str:
    classes = f"all of the network's {counted(row['network_classes'], 'class', 'classes')}"
    present, scored = row["present_classes"], row["classes"]
    if present is not None and present < row["network_classes"]:
        classes = f"{present:,}{classes.removeprefix('all')}, scored among {'all' if scored > present else 'these'}"
    processes = "" if row["processes"] == 1 else f", {row['processes']} processes"
    images = counted(row["n"], "image") if row["n"] else "a stream of images"
    return f"{row['data']}: {images}, {classes}, {row['precision']}{processes}"


def _results_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    has_real, has_ece = (any(key in row for row in rows) for key in ("real_top1", "ece"))
    has_top5, is_small = any(row["top5"] is not None for row in rows), any(row["n"] < SMALL_SPLIT for row in rows)
    header = ["checkpoint", "preprocessing", "top-1", *["±"] * is_small, *["top-5"] * has_top5]
    header += ["macro-F1", "balanced", "loss"]
    header += ["ReaL"] * has_real + ["ReaL top-5"] * (has_real and has_top5) + ["ECE"] * has_ece
    body = []
    for row in rows:
        line = [row["checkpoint"], row["preprocessing"], f"{row['top1']:.2f}"]
        line += [f"{row['top1_error']:.2f}"] * is_small + [_percent(row["top5"])] * has_top5
        line += [f"{row['macro_f1']:.2f}", f"{row['balanced_accuracy']:.2f}", f"{row['loss']:.4f}"]
        line += [_percent(row.get("real_top1"))] * has_real + [_percent(row.get("real_top5"))] * (has_real and has_top5)
        line += [_percent(row.get("ece"))] * has_ece
        body.append([*line, str(row["n"]), f"{row['images_per_second']:,.0f}"])
    return text_table([*header, "images", "images/s"], body).split("\n")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _view_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a line for each preprocessing, with the checkpoints that had it where not all did."""
    paths: dict[str, list[str]] = {}
    for row in rows:
        view = Preprocessing(**{key: row[key] for key in Preprocessing.__dataclass_fields__})
        changed = f" with {', '.join(f'data.{key}' for key in row['changed'])} as given" if row["changed"] else ""
        paths.setdefault(f"preprocessing {row['preprocessing']}{changed}: {view}", []).append(row["checkpoint"])
    number = len({row["checkpoint"] for row in rows})
    return [f"{line}{f' ({shorten(of, 3)})' if len(set(of)) < number else ''}" for line, of in paths.items()]


def _worst_classes_table(row: dict[str, Any]) -> list[str]:
    lines = row["worst_classes"]
    has_confusion = "taken_for" in lines[0]
    keys = {key: text for key, text in {"top1": "top-1", "top5": "top-5"}.items() if key in lines[0]}
    header = ["lowest classes", "images", *keys.values(), *["most often taken for"] * has_confusion]
    body = []
    for line in lines:
        cells = [clipped(line["name"], 40), str(line["n"]), *(f"{line[key]:.2f}" for key in keys)]
        if has_confusion:
            cells.append(f"{clipped(line['taken_for'], 32)} ({line['times']})" if line["times"] else "-")
        body.append(cells)
    return [f"{row['checkpoint']}, {row['preprocessing']}", *text_table(header, body).split("\n")]
