"""The target that reads images with objects: COCO, YOLO, Pascal VOC and Hugging Face sets with odd annotations."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from conv2former.tasks.detection.augment import TrainTransform
from conv2former.tasks.detection.check import about_objects, check_source
from conv2former.tasks.detection.config import DetectionConfig
from conv2former.tasks.detection.sources import open_train_and_val

from . import values
from .common import SHAPE, Call

RUNS = [{"size": [32, 32], "counts": [4, 8, 1012]}, {"size": [32, 32], "counts": "48do0"}, [[1, 1, 20, 1, 20, 20.0]]]


def objects(random: random.Random, folder: Path, base: Path) -> Call:
    """Annotations of every format with odd values, read with their masks or without, and augmented."""
    source = random.choice(["coco", "coco", "coco", "yolo", "voc", "hf"])
    {"coco": _coco, "yolo": _yolo, "voc": _voc, "hf": _hf}[source](random, folder, base)
    detector = random.choice(["mask_rcnn", "faster_rcnn"])
    config = DetectionConfig.model_validate(
        {
            "task": "detection",
            "model": {"variant": SHAPE, "detector": {"name": detector}},
            "data": {"source": source, "root": str(folder), "on_error": random.choice(["raise", "skip"])},
            "augment": {"short_sides": [32], "crop": 0.5},
        }
    )
    os.environ["CONV2FORMER_HOME"] = str(folder / "store")  # of this process: counts of every case would stay otherwise
    return lambda: _look_at(config)


def _look_at(config: DetectionConfig) -> str | None:
    """Opens a data set, and returns what is wrong with its classes or its objects."""
    for source in open_train_and_val(config):
        if not source.class_names or not all(name.strip() for name in source.class_names):
            return f"a class without a name: {source.class_names}"
        checked = check_source(source, config.data.on_error == "skip")
        about_objects(checked)
        for i in range(len(checked)):
            example = checked.images[i][0]
            found, (width, height) = example.objects, example.photo.size
            left, top, right, bottom = found.boxes.T
            if not (
                (left >= 0) & (left < right) & (right <= width) & (top >= 0) & (top < bottom) & (bottom <= height)
            ).all():
                return f"a box that is none: {found.boxes.tolist()}"
            if (
                not ((found.labels >= 0) & (found.labels < len(source.class_names))).all()
                or not (found.areas > 0).all()
            ):
                return f"labels {found.labels.tolist()}, areas {found.areas.tolist()}"
            target = TrainTransform(config)(example).target
            if not len(target["boxes"]) == len(target["labels"]) == len(target.get("masks", target["labels"])):
                return "targets of different lengths"
    return None


def _mutate(random: random.Random, value: Any, share: float) -> Any:
    """Returns a value of JSON in which some parts are replaced, left out or doubled."""
    if random.random() < share:
        return random.choice([values.plain(random), random.choice(values.NUMBERS), str(value), [value], None])
    if isinstance(value, dict):
        changed = {key: _mutate(random, inner, share) for key, inner in value.items() if random.random() > share / 2}
        return {**changed, **({random.choice(["id", "size", "x"]): 1} if random.random() < share / 2 else {})}
    if isinstance(value, list):
        changed_list = [_mutate(random, inner, share) for inner in value if random.random() > share / 2]
        return changed_list * 2 if random.random() < share / 2 else changed_list
    return value


def _annotations(random: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "bbox": [
                random.randrange(20),
                random.randrange(20),
                random.choice([5, 9, 40]),
                random.choice([5.5, 0, 12]),
            ],
            "category": i % 2,
            "area": random.choice([20, 0, 5.5]),
            "iscrowd": 0,
            "segmentation": random.choice(RUNS),
        }
        for i in range(4)
    ]


def _coco(random: random.Random, folder: Path, base: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(base / "photos" / split / "a", folder / split)
        entries = _annotations(random)
        content = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 32, "height": 32} for i in range(2)],
            "annotations": [
                {**entry, "id": i, "image_id": i % 2, "category_id": entry["category"]}
                for i, entry in enumerate(entries)
            ],
            "categories": [{"id": i, "name": name} for i, name in enumerate("ab")],
        }
        text = json.dumps(_mutate(random, content, random.choice([0.0, 0.01, 0.03])), default=str).encode()
        if random.random() < 0.1:
            text = values.damaged(random, text)
        (folder / f"{split}.json").write_bytes(text)


def _yolo(random: random.Random, folder: Path, base: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(base / "photos" / split / "a", folder / "images" / split)
        (folder / "labels" / split).mkdir(parents=True)
        for i in range(2):
            lines = [b"0 0.5 0.5 0.2 0.3", b"1 0.1 0.1 0.9 0.1 0.9 0.9"]
            text = values.text_lines(random, lines) if random.random() < 0.3 else b"\n".join(lines)
            (folder / "labels" / split / f"{i}.txt").write_bytes(
                values.damaged(random, text) if random.random() < 0.2 else text
            )
    yaml = _mutate(random, {"train": "images/train", "val": ["images/val"], "names": ["a", "b"], "nc": 2}, 0.03)
    (folder / "data.yaml").write_text(json.dumps(yaml, default=str))


def _voc(random: random.Random, folder: Path, base: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(base / "photos" / split / "a", folder / split)
        for path in sorted((folder / split).glob("*.png")):
            box = "<xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>21</ymax>"
            text = f"<annotation><size><width>32</width></size><object><name>a</name><bndbox>{box}</bndbox></object>"
            data = f"{text}</annotation>".encode()
            old, new = random.choice(
                [(b"3", b"nan"), (b"20", b"1"), (b"a<", b"\xff<"), (b"32", b"9" * 400), (b"", b"")]
            )
            data = data.replace(old, new, 1) if random.random() < 0.2 else data
            data = values.damaged(random, data) if random.random() < 0.1 else data
            if random.random() < 0.02:
                data = b'<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;">]>' + data
            path.with_suffix(".xml").write_bytes(data)


def _hf(random: random.Random, folder: Path, base: Path) -> None:
    content = (base / "photos" / "train" / "a" / "0.png").read_bytes()
    are_lists = random.random() < 0.5
    for split in ("train", "val"):
        entries = _annotations(random)
        for entry in entries:
            entry["segmentation"] = [[1.0, 1.0, 20.0, 1.0, 20.0, 20.0]]
        rows: Any = [entries[:2], entries[2:]]
        if are_lists:
            rows = [{key: [entry[key] for entry in row] for key in entries[0]} for row in rows]
        rows = _mutate(random, rows, random.choice([0.0, 0.0, 0.03]))
        try:
            column = pa.array(rows if isinstance(rows, list) and len(rows) == 2 else [None, None])
        except (pa.ArrowException, ValueError, OverflowError):
            column = pa.array([None, [{"bbox": [1.0, 2.0, 3.0, 4.0], "category": 0}]])
        images = pa.array([{"bytes": content, "path": None}] * 2)
        pq.write_table(pa.table({"image": images, "objects": column}), folder / f"{split}.parquet")
