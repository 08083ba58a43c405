"""What the evaluation of a detection leaves: detections, tables per class, pictures; and its text on a terminal."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.classes import display_names
from ...errors import counted
from ...tasks.detection.evaluation import BoxEvaluation, about_missing
from ...tasks.detection.images import DetectionSource
from ...tasks.detection.matching import IOU, NONE_RIGHT
from ...tasks.detection.results import coco_results
from ...text import clipped
from ...weights.description import weights_text
from ..output import replacing, save_figure, text_table, write_csv
from .files import Extras
from .tables import data_line, write_class_table, written

__all__ = ["heading", "summary", "write_box_extras"]

MOST_SHOWN = 40  # classes in a table on a terminal
COCO_DETECTIONS = 100  # of an image, that COCO's own AP counts
TITLES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ar100": "AR100"}
SIZES = {"ap_small": "small", "ap_medium": "medium", "ap_large": "large"}


def write_box_extras(
    folder: Path, row: dict[str, Any], result: BoxEvaluation, source: DetectionSource, extras: Extras
) -> dict[str, Any]:
    """Writes the detections in COCO's result format, and the files that were asked for.

    Args:
        folder: where.
        row: what was evaluated, with its metrics.
        result: of it.
        source: the images.
        extras: what was asked for.

    Returns:
        What to add to the row: `files`, by what they are; `worst`.

    Raises:
        OutputError: a file cannot be written.
    """
    from ...tasks.detection.pictures import BACKGROUND, confusions_figure, worst_figure

    checkpoint, data = (clipped(row[key], 50, keep_end=True) for key in ("checkpoint", "data"))
    title, shown = f"{checkpoint}\n{data}", display_names(source.class_names)
    files: dict[str, Path] = {"detections": folder / "detections.json"}
    found: dict[str, Any] = {}
    _write_detections(files["detections"], result, source)
    if extras.per_class:
        files["per_class"] = write_class_table(folder, row["per_class"])
    if extras.confusion:
        files |= {"confusion": folder / "confusion.png", "confusion_counts": folder / "confusion.csv"}
        confusion, names = result.confusion.tolist(), [*source.class_names, BACKGROUND]
        heading = f"{title}\nobjects of {counted(int(row['n']), 'image')}, AP50 {row['ap50']:.2f} %"
        save_figure(confusions_figure(confusion, result.score, shown, heading), files["confusion"])
        lines = ([name, *counts] for name, counts in zip(names, confusion, strict=True))
        write_csv(files["confusion_counts"], ["true \\ predicted", *names], lines)
    if extras.worst:
        found["worst"] = [
            {"image": one.name, "index": one.place, "mistakes": one.mistakes, "objects": one.objects}
            for one in result.worst
        ]
        heading = f"{title}\n{counted(len(result.worst), 'image')} of the most mistakes for each object"
        figure = worst_figure([one.plain() for one in result.worst], result.score, shown, heading)
        if figure is not None:
            files["worst"] = folder / "worst.png"
            save_figure(figure, files["worst"])
    return {**found, "files": {key: str(path) for key, path in files.items()}}


def _write_detections(path: Path, result: BoxEvaluation, source: DetectionSource) -> None:
    """Writes all detections, one a line.

    Ids of images and categories are the data's where it has some, as COCO's files; else they are places from 1.
    """
    images, categories = source.images.records, _category_ids(source)
    lines = []
    for record in result.records:
        number = images.records[record.place].number
        found = coco_results(record.found, record.place + 1 if number is None else number, categories)
        lines += [json.dumps(line) for line in found]
    with replacing(path) as temporary:
        temporary.write_text("[" + ",\n".join(lines) + "]\n", "utf-8")


def _category_ids(source: DetectionSource) -> list[int | str]:
    """Returns an id for each class; those that the data does not know follow its highest one."""
    known = source.images.records.category_ids
    free = itertools.count(1 + max((number for number in known.values() if isinstance(number, int)), default=0))
    return [known[name] if name in known else next(free) for name in source.class_names]


def heading(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns lines that say what is evaluated, how and on what, which is known before it begins."""
    lines = [
        f"{row['checkpoint']}: {row['variant']}, {row['detector']}, {weights_text(row['weights'])}" for row in rows
    ]
    lines += [data_line(row) for row in rows]
    lines += [_how(row) for row in rows]
    lines += [f"note: {text}" for row in rows for text in row["notes"]]
    return list(dict.fromkeys(lines))


def _how(row: dict[str, Any]) -> str:
    """Returns how images are answered and what counts, in words."""
    most = row["max_detections"]
    coco = f" (COCO's own AP counts {COCO_DETECTIONS})" if most != COCO_DETECTIONS else ""
    return (
        f"images: shorter side {row['short_side']} pixels, longer one at most {row['long_side']}; boxes of score "
        f"{row['score']:g} and above, NMS at an IoU of {row['nms']:g}, at most {most:,} of an image{coco}"
    )


def summary(rows: Sequence[dict[str, Any]], folder: Path | None = None, is_headed: bool = False) -> list[str]:
    """Returns lines that say what was evaluated, and the results as tables; see `files.summary`."""
    lines = list(dict.fromkeys(f"skipped: {reason}" for row in rows for reason in row["skipped"]))
    if not is_headed:
        lines += heading(rows)
    kinds = ["", "mask_"] if any("mask_ap" in row for row in rows) else [""]
    for prefix in kinds:
        lines += ["", *(["masks:"] if prefix else ["boxes:"] if len(kinds) > 1 else []), *_results_table(rows, prefix)]
    lines.append("")
    for row in rows:
        where = f"{row['checkpoint']}: " if len(rows) > 1 else ""
        best = f"best F1 {row['best_f1']:.2f} % with boxes of score {row['best_score']:.2f} and above"
        lines.append(f"{where}{f'{best}, at an IoU of {IOU:g}' if row['best_f1'] else NONE_RIGHT}")
    notes = [f"note: {missing}" for row in rows if (missing := about_missing(row["per_class"]))]
    lines += dict.fromkeys(notes)
    for row in rows:
        if "per_class" in row.get("files", {}):
            lines += ["", *_classes_table(row, several=len(rows) > 1)]
    return lines + written(rows, folder)


def _results_table(rows: Sequence[dict[str, Any]], prefix: str) -> list[str]:
    keys = {f"{prefix}{key}": title for key, title in (TITLES | SIZES).items()}
    header = ("checkpoint", *keys.values(), "images", "images/s")
    body = [
        (row["checkpoint"], *(_cell(row.get(key)) for key in keys), str(row["n"]), f"{row['images_per_second']:,.1f}")
        for row in rows
    ]
    return text_table(header, body).split("\n")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _classes_table(row: dict[str, Any], several: bool) -> list[str]:
    """Returns a table of all classes, or of those of the lowest AP where they are many."""
    lines, first = row["per_class"], "class"
    if len(lines) > MOST_SHOWN:
        lines = sorted((line for line in lines if line["objects"]), key=lambda line: line["ap"])[:MOST_SHOWN]
        first = "lowest classes"
    titles = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "mask_ap": "mask AP", "mask_ap50": "mask AP50"}
    titles |= {"recall": "recall", "precision": "precision"}
    keys = [key for key in titles if any(key in line for line in lines)]
    body = [
        (clipped(line["class"], 40), f"{line['objects']:,}", *(_cell(line.get(key)) for key in keys)) for line in lines
    ]
    table = text_table((first, "objects", *(titles[key] for key in keys)), body).split("\n")
    return [row["checkpoint"], *table] if several else table
