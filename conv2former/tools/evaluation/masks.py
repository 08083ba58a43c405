"""What the evaluation of a segmentation leaves: tables per class, pictures; and its text on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...data.classes import display_names
from ...errors import counted
from ...tasks.classification.evaluation import MAX_CONFUSION_CLASSES
from ...tasks.segmentation.evaluation import MaskEvaluation, about_missing
from ...text import clipped
from ...weights.description import weights_text
from ..output import save_figure, text_table
from .files import NOT_FINITE, Extras
from .tables import data_line, write_class_table, written

__all__ = ["heading", "summary", "write_mask_extras"]

MOST_SHOWN = 40  # classes in a table on a terminal


def write_mask_extras(
    folder: Path, row: dict[str, Any], result: MaskEvaluation, class_names: Sequence[str], extras: Extras
) -> dict[str, Any]:
    """Writes the files that were asked for.

    Args:
        folder: where.
        row: what was evaluated, with its metrics.
        result: of it.
        class_names: in index order.
        extras: what was asked for.

    Returns:
        What to add to the row: `files`, by what they are; `worst`.

    Raises:
        OutputError: a file cannot be written.
    """
    from ...tasks.segmentation.pictures import worst_figure

    checkpoint, data = (clipped(row[key], 50, keep_end=True) for key in ("checkpoint", "data"))
    title = f"{checkpoint}\n{data}"
    shown = display_names(class_names)
    files: dict[str, Path] = {}
    found: dict[str, Any] = {}
    if extras.per_class:
        files["per_class"] = write_class_table(folder, row["per_class"])
    if extras.confusion:
        files["confusion"] = folder / "confusion.png"
        heading = f"{title}\npixels of {counted(int(row['n']), 'image')}, mIoU {row['miou']:.2f} %"
        save_figure(_confusion_figure(result.confusion, shown, heading), files["confusion"])
    if extras.worst:
        found["worst"] = [{"image": one.name, "index": one.place, "iou": one.iou} for one in result.worst]
        rows = [[one.iou, one.place, one.name, *one.pictures] for one in result.worst]
        heading = f"{title}\nthe {counted(len(rows), 'image')} of the lowest IoU"
        figure = worst_figure(rows, shown, heading)
        if figure is not None:
            files["worst"] = folder / "worst.png"
            save_figure(figure, files["worst"])
    return {**found, "files": {key: str(path) for key, path in files.items()}}


def _confusion_figure(counts: torch.Tensor, shown: list[str], title: str) -> Any:
    """Draws a table, in percent of each true class, of few classes, and the most frequent confusions of many."""
    from ...tasks import pictures

    if len(counts) > MAX_CONFUSION_CLASSES:
        return pictures.many_confusions_figure(counts, shown, title, "pixels")
    percent = (100 * counts.double() / counts.sum(1, keepdim=True).clamp(min=1)).round().long()
    return pictures.confusion_figure(percent.tolist(), shown, f"{title}\npercent of the true class")


def heading(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns lines that say what is evaluated, how and on what, which is known before it begins."""
    lines = [
        f"{row['checkpoint']}: {row['variant']}, head {row['head']}, {weights_text(row['weights'])}" for row in rows
    ]
    lines += [data_line(row) for row in rows]
    lines += [f"images: {_how(row)}" for row in rows]
    lines += [f"note: {text}" for row in rows for text in row["notes"] if text != NOT_FINITE]
    return list(dict.fromkeys(lines))


def _how(row: dict[str, Any]) -> str:
    """Returns how images are answered, in words."""
    size = f"shorter side {row['short_side']} pixels" if row["short_side"] else "at their own size"
    window = row["window"]
    how = f"in windows of {window[0]} x {window[1]} that share {row['overlap']:.0%}" if window else "whole"
    mirrored = ", also mirrored" if row["flip"] else ""
    return f"{size}, {how}{mirrored}; compared with the masks at the masks' size"


def summary(rows: Sequence[dict[str, Any]], folder: Path | None = None, is_headed: bool = False) -> list[str]:
    """Returns lines that say what was evaluated, and the results as tables; see `files.summary`."""
    lines = list(dict.fromkeys(f"skipped: {reason}" for row in rows for reason in row["skipped"]))
    if not is_headed:
        lines += heading(rows)
    lines += ["", *_results_table(rows)]
    notes = [f"note: {NOT_FINITE}" for row in rows if NOT_FINITE in row["notes"]]
    notes += [f"note: {missing}" for row in rows if (missing := about_missing(row["per_class"]))]
    if notes:
        lines += ["", *dict.fromkeys(notes)]
    for row in rows:
        if "per_class" in row.get("files", {}):
            lines += ["", *_classes_table(row, several=len(rows) > 1)]
    return lines + written(rows, folder)


def _results_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    header = ("checkpoint", "mIoU", "pixel accuracy", "mean accuracy", "loss", "images", "images/s")
    body = [
        (
            row["checkpoint"],
            *(f"{row[key]:.2f}" for key in ("miou", "pixel_accuracy", "mean_accuracy")),
            f"{row['loss']:.4f}",
            str(row["n"]),
            f"{row['images_per_second']:,.1f}",
        )
        for row in rows
    ]
    return text_table(header, body).split("\n")


def _classes_table(row: dict[str, Any], several: bool) -> list[str]:
    """Returns a table of all classes, or of those of the lowest IoU where they are many."""
    lines = row["per_class"]
    total = max(1, sum(line["pixels"] for line in lines))
    first = "class"
    if len(lines) > MOST_SHOWN:
        lines = sorted((line for line in lines if line["pixels"]), key=lambda line: line["iou"])[:MOST_SHOWN]
        first = "lowest classes"
    body = [
        (
            clipped(line["class"], 40),
            f"{100 * line['pixels'] / total:.2f}",
            *("-" if line[key] is None else f"{line[key]:.2f}" for key in ("iou", "recall", "precision")),
        )
        for line in lines
    ]
    table = text_table((first, "% of pixels", "IoU", "recall", "precision"), body).split("\n")
    return [row["checkpoint"], *table] if several else table
