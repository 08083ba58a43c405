"""What an evaluation leaves: results.json and results.csv, tables per class, pictures; and its text on a terminal."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import DataSource, StreamSource
from ..data.classes import display_names
from ..data.images import UnreadableImage
from ..engine.evaluate import MAX_CONFUSION_CLASSES, SMALL_SPLIT, Evaluation, has_top5, one_image, standard_error
from ..engine.tallies import Mistake, calibration_error
from ..errors import OutputError, counted, shorten
from ..models.preprocessing import Preprocessing
from .output import check_writable, printable, replacing, save_figure, text_table

__all__ = ["Extras", "check_folder", "folders_of", "summary", "write_extras", "write_results"]

WORST_CLASSES = 10  # shown on a terminal
PICTURE_SIDE = 320  # pixels, at most, of a mistake's image


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
    columns = [key for key in columns if key not in ("notes", "worst", "worst_classes", "files", "changed")]
    cells = ([_cell(row.get(key)) for key in columns] for row in rows)
    _write_csv(folder / "results.csv", columns, cells)


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


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        csv.writer(file).writerows([header, *rows])


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
    from ..engine import pictures

    shown = display_names(class_names)
    title = f"{_tail(row['checkpoint'], 60)}\n{_tail(row['data'], 40)}, {row['preprocessing']} preprocessing"
    files: dict[str, Path] = {}
    found: dict[str, Any] = {}
    if extras.per_class:
        table = _class_rows(result, class_names, shown)
        files["per_class"] = folder / "per_class.csv"
        _write_csv(files["per_class"], list(table[0]), ([_cell(v) for v in line.values()] for line in table))
        present = [line for line in table if line["n"]]
        found["worst_classes"] = sorted(present, key=lambda line: line["top1"])[:WORST_CLASSES]
    if extras.confusion and result.confusion is not None:
        files["confusion"] = folder / "confusion.png"
        heading = f"{title}, {counted(int(row['n']), 'image')}, top-1 {row['top1']:.2f} %"
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
            save_figure(_worst_figure(result.tallies["worst"], found["worst"], source), files["worst"])
    return {**found, "files": {key: str(path) for key, path in files.items()}}


def _confusion_figure(counts: torch.Tensor, shown: Sequence[str], title: str) -> Any:
    """Draws a table with numbers if it is legible, which it may be of the few classes of many that occur."""
    from ..engine import pictures

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
    for i, (n, top1, top5, answered) in enumerate(result.tallies["per_class"].T.tolist()):
        line: dict[str, Any] = {"class": class_names[i], "name": shown[i], "n": n}
        line["top1"] = 100 * top1 / n if n else None
        line["top5"] = 100 * top5 / n if n else None
        line["answered"] = answered  # how often it was the network's answer
        line["precision"] = 100 * top1 / answered if answered else None
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


def _worst_figure(mistakes: Sequence[Mistake], rows: Sequence[dict[str, Any]], source: DataSource) -> Any:
    from ..engine.pictures import grid_figure

    images, captions = [], []
    for mistake, row in zip(mistakes, rows, strict=True):
        try:
            image = source.images[mistake.place][0]
        except UnreadableImage:  # it could be read a moment ago
            continue
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        images.append(np.asarray(image))
        captions.append(
            f"true: {_head(row['true'])}, {row['true_confidence']:.1%}\n"
            f"predicted: {_head(row['predicted'])}, {row['confidence']:.1%}\n"
            f"{_tail(printable(os.path.basename(row['image'])), 32)}"
        )
    return grid_figure(images, captions, columns=5, size=2.2)


def _head(text: str, length: int = 24) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _tail(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


# ------------------------------------------------------------------------------------------------------- on a terminal


def summary(rows: Sequence[dict[str, Any]], folder: Path | None = None) -> list[str]:
    """Returns lines that say what was evaluated, and the results as a table.

    Args:
        rows: as `validate_files` returns them, at least one.
        folder: where results.json is; None where nothing was written.
    """
    table = ["", *_results_table(rows), ""]
    head = (
        [f"skipped: {reason}" for row in rows for reason in row["skipped"]],
        [f"{row['checkpoint']}: {row['variant']}, {row['weights']} weights" for row in rows],
        [_data_line(row) for row in rows],
    )
    foot = (_view_lines(rows), _precision_lines(rows), [f"note: {text}" for row in rows for text in row["notes"]])
    once = [[line for group in groups for line in dict.fromkeys(group)] for groups in (head, foot)]
    lines = [*once[0], *table, *once[1]]
    for row in rows:
        if "worst_classes" in row:
            lines += ["", *_worst_classes_table(row)]
    for row in rows:
        if "worst" in row and not row["worst"]:
            lines += ["", f"{row['checkpoint']}, {row['preprocessing']}: no mistakes, so no picture of the worst"]
    if folder:
        written = [path for row in rows for path in row.get("files", {}).values()]
        names = [str(folder / "results.json"), str(folder / "results.csv"), *written]
        lines += ["", "written:", *(f"  {name}" for name in names)]
    return lines


def _data_line(row: dict[str, Any]) -> str:
    classes = counted(row["network_classes"], "class", "classes")
    present, scored = row["present_classes"], row["classes"]
    if present is not None and present < row["network_classes"]:
        classes = f"{present:,} of the network's {classes}, scored among {'all' if scored > present else 'these'}"
    processes = "" if row["processes"] == 1 else f", {row['processes']} processes"
    return f"{row['data']}: {counted(row['n'], 'image')}, {classes}, {row['precision']}{processes}"


def _precision_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a line on how coarse the accuracies on a small set of images are, for each number of images."""
    errors: dict[int, list[float]] = {}
    for row in rows:
        if row["n"] < SMALL_SPLIT:
            errors.setdefault(row["n"], []).append(standard_error(row["top1"], row["n"]))
    return [
        f"{one_image(n)} of top-1, whose standard error is "
        f"{' to '.join(dict.fromkeys(f'{choose(found):.2f}' for choose in (min, max)))} points"
        for n, found in errors.items()
    ]


def _results_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    has_real, has_ece = (any(key in row for row in rows) for key in ("real_top1", "ece"))
    five = ["top-5"] * any(has_top5(row["classes"]) for row in rows)
    header = ["checkpoint", "preprocessing", "top-1", *five, "loss"]
    header += ["ReaL", *(f"ReaL {name}" for name in five)] * has_real + ["ECE"] * has_ece + ["images", "images/s"]
    body = []
    for row in rows:
        top5, real_top5 = ([_top5_cell(row, key) for _ in five] for key in ("top5", "real_top5"))
        line = [row["checkpoint"], row["preprocessing"], f"{row['top1']:.2f}", *top5, f"{row['loss']:.4f}"]
        if has_real:
            line += [f"{row['real_top1']:.2f}", *real_top5]
        if has_ece:
            line.append(f"{row['ece']:.2f}")
        body.append([*line, str(row["n"]), f"{row['images_per_second']:,.0f}"])
    return text_table(header, body).split("\n")


def _top5_cell(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.2f}" if key in row and has_top5(row["classes"]) else "-"


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
    keys = {"top1": "top-1", "top5": "top-5"} if has_top5(row["classes"]) else {"top1": "top-1"}
    header = ["lowest classes", "images", *keys.values(), *["most often taken for"] * has_confusion]
    body = []
    for line in lines:
        cells = [_head(line["name"], 40), str(line["n"]), *(f"{line[key]:.2f}" for key in keys)]
        if has_confusion:
            cells.append(f"{_head(line['taken_for'], 32)} ({line['times']})" if line["times"] else "-")
        body.append(cells)
    return [f"{row['checkpoint']}, {row['preprocessing']}", *text_table(header, body).split("\n")]
