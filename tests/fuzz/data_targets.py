"""Targets that read data sets, images and configurations."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from conv2former import list_installed, load_model
from conv2former._preprocessing import is_noted
from conv2former.config import Config, load_config
from conv2former.config.schema import DataConfig
from conv2former.data import open_train_and_val
from conv2former.data.images import open_rgb
from conv2former.data.sources import DataSource
from conv2former.data.tables import read_class_list, read_table, write_table
from conv2former.engine import train
from conv2former.engine.terminal import say
from conv2former.tools.evaluation.files import Extras, summary
from conv2former.tools.evaluation.validate import validate_files
from conv2former.variants import read_variant

from ..conftest import ROOT
from ..hostile import faults_in, faults_of
from . import values
from .common import SHAPE, Call, settings_for


def tables(random: random.Random, folder: Path, base: Path) -> Call:
    """CSV files and class lists."""
    rows = [
        f"{split}/{name}/{i}.png,{name},{split}".encode() for split in ("train", "val") for name in "ab" for i in (0, 1)
    ]
    lines = [b"image,label,split", *rows]
    for _ in range(random.choice([1, 2])):
        label = random.choice([*values.TEXTS, *values.LABELS]).encode()
        changes = [(b",a,", b"," + label + b","), (b"train/", b"../photos/train/"), (b",", b";"), (b".png", b"\0.png")]
        changes += [(b"image", b"label"), (b",b,", b",-1,"), (b"train", b'"train')]
        changes += [(b"train/a/0.png", random.choice(values.paths(base)).encode())]
        place, (old, new) = random.randrange(len(lines)), random.choice(changes)
        lines[place] = lines[place].replace(old, new)
    data = values.text_lines(random, lines) if random.random() < 0.5 else b"\n".join(lines)
    (folder / "table.csv").write_bytes(data if random.random() < 0.7 else values.damaged(random, data))
    (folder / "names.txt").write_bytes(values.text_lines(random, [b"a", b"b"]))

    def call() -> str | None:
        if random.random() < 0.3:
            read_class_list(folder / "names.txt")
        return _look_at(DataConfig(source="csv", root=str(base / "photos"), csv=str(folder / "table.csv")))

    return call


def _look_at(config: DataConfig) -> str | None:
    """Opens a data set, and returns what is wrong with its classes, labels or images."""
    for source in open_train_and_val(config):
        assert isinstance(source, DataSource)
        assert len(source.class_names) > 0
        if config.source != "folder" and {"-1", ""} & {*source.class_names}:  # a folder may have any name
            return f"no label has become a class: {source.class_names}"
        labels = source.images.labels
        if len(labels) != len(source) or labels.min() < 0 or labels.max() >= len(source.class_names):
            return f"labels {labels} of {len(source.class_names)} classes"
        for i in range(min(4, len(source))):
            if source.images[i][0].mode != "RGB":
                return "an image is not RGB"
    return None


def tars(random: random.Random, folder: Path, base: Path) -> Call:
    """WebDataset tars with odd members, labels and bytes."""
    labels = [
        b"0",
        b"1",
        b"a",
        b"-1",
        b"9" * 30,
        b"9" * 5000,
        b"1.5",
        b"\xff",
        values.TERMINAL.encode(),
        b"",
        b"[" * 100_000,
        *(text.encode() for text in values.LABELS),
    ]
    for split in ("train", "val"):
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as tar:
            for i in range(3):
                label = random.choice(labels) if random.random() < 0.3 else str(i % 2).encode()
                image = (base / "photos" / split / "a" / f"{i % 2}.png").read_bytes()
                if random.random() < 0.2:
                    image = values.damaged(random, image)
                ending = random.choice(["cls", "cls", "json"])
                label = b'{"label": ' + label + b"}" if ending == "json" else label
                stem = random.choice([f"{i}", f"{i}", f"../{i}", f"{i}.x", f"a\n{i}", "x" * 300])
                for name, content in ((f"{stem}.png", image), (f"{stem}.{ending}", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        data = made.getvalue()
        (folder / f"{split}-0.tar").write_bytes(values.damaged(random, data) if random.random() < 0.3 else data)
    return lambda: _look_at(DataConfig(source="wds", root=str(folder)))


def folders(random: random.Random, folder: Path, base: Path) -> Call:
    """Folders with odd names, and images that are none."""
    for split in ("train", "val"):
        names = ["a", random.choice(["b", "b\x1b[31m", "x" * 200, "a b", "-1", "ü", "b\n", "=b"])]
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for i in range(2):
                data = (base / "photos" / split / "a" / "0.png").read_bytes()
                path = folder / split / name / random.choice([f"{i}.png", f"{i}.jpg", f"{i}.tif", f"{i}\n.png"])
                path.write_bytes(values.damaged(random, data) if random.random() < 0.5 else data)
    return lambda: _look_at(DataConfig(source="folder", root=str(folder)))


def names(random: random.Random, folder: Path, base: Path) -> Call:
    """Folders and images with names of anything, trained on and evaluated: what is printed, logged and written."""
    photos = folder / "photos"
    classes = {values.name(random) for _ in range(3)}
    for split in ("train", "val"):
        for label in classes:
            (photos / split / label).mkdir(parents=True, exist_ok=True)
            for i in range(3 if split == "train" else 1):
                pixels = np.full((32, 32, 3), random.randrange(256), dtype=np.uint8)
                Image.fromarray(pixels).save(photos / split / label / f"{values.name(random)}{i}.png", "PNG")

    def call() -> str | None:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            train(settings_for(photos), folder / "run")
            extras = Extras(per_class=True, confusion=True, worst=2)
            checkpoint = folder / "run" / "checkpoints" / "best.pt"
            say(*summary(validate_files([checkpoint], extras=extras, output=folder / "found"), folder / "found"))
            rows = [(label, label, "train") for label in {*classes, f"x{values.name(random)}"}]
            write_table(folder / "found" / "split.csv", rows)
            read = read_table(folder / "found" / "split.csv", "image", "label", "split")
        if [(row.image, row.label, row.split) for row in read] != rows:
            return f"a table is not read back as it was written: {rows!r}"
        faults = [*faults_of(said.getvalue()), *faults_in(folder / "run"), *faults_in(folder / "found")]
        return f"raw: {faults!r}" if faults else None

    return call


def parquet(random: random.Random, folder: Path, base: Path) -> Call:
    """Parquet files with odd labels, images and paths, and what a README.md says about them."""
    kind = random.choice([pa.int64(), pa.string(), pa.float64(), pa.bool_(), pa.list_(pa.int64()), pa.binary()])
    odd: dict[Any, list[Any]] = {
        pa.int64(): [-1, -2, 2**62, None],
        pa.string(): [*values.TEXTS, *values.LABELS, None],
    }
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    content = (base / "photos" / "train" / "a" / "0.png").read_bytes()
    for split in ("train", "val"):
        images: list[Any] = [{"bytes": content, "path": None} for _ in range(4)]
        images[random.randrange(4)] = random.choice(
            [
                None,
                {"bytes": None, "path": random.choice([*values.paths(base), str(folder / "none.png")])},
                {"bytes": values.damaged(random, content), "path": random.choice(values.TEXTS)},
                images[0],
            ]
        )
        plain = {pa.int64(): [0, 1], pa.string(): ["a", "b"], pa.float64(): [0.0, float("nan")]}
        of_kind = plain.get(kind, {pa.bool_(): [True, False], pa.binary(): [b"a", b"\xff"]}.get(kind, [[0], [1]]))
        labels = of_kind * 2
        if random.random() < 0.5:
            labels[random.randrange(4)] = random.choice(odd.get(kind, [None]))
        table = pa.table({"image": pa.array(images, image_type), "label": pa.array(labels, kind)})
        features = datasets.Features(
            image=datasets.Image(),
            label=datasets.ClassLabel(names=["a", "b"]) if kind == pa.int64() else datasets.Value("string"),
        )
        if kind in (pa.int64(), pa.string()) and random.random() < 0.6:
            table = table.replace_schema_metadata(features.arrow_schema.metadata)
        pq.write_table(table, folder / f"{split}.parquet")
        if random.random() < 0.15:
            path = folder / f"{split}.parquet"
            path.write_bytes(values.damaged(random, path.read_bytes()))
    if random.random() < 0.2:
        place = random.choice([*values.paths(base), "*.parquet", "val.parquet"])
        card = f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(place)}\n---\n".encode()
        (folder / "README.md").write_bytes(card if random.random() < 0.5 else values.damaged(random, card))
    return lambda: _look_at(DataConfig(source="hf", root=str(folder)))


def images(random: random.Random, folder: Path, base: Path) -> Call:
    """One image file, of any format and mode, damaged or with odd claims."""
    mode = random.choice(["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "I", "I;16", "F"])
    image = Image.effect_noise((random.choice([1, 7, 64]), random.choice([1, 9, 500])), 60).convert("RGB").convert("L")
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert("RGB").convert(mode)
    if mode == "F":
        image.putpixel((0, 0), random.choice([float("nan"), float("inf"), 1e30]))
    kind = random.choice(
        ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "EPS", "ICO", "PDF", "ICNS"]
    )
    made = io.BytesIO()
    try:
        image.save(made, kind, **({"save_all": True, "append_images": [image] * 300} if kind == "GIF" else {}))
    except (OSError, ValueError, KeyError):  # a mode that the format has not
        made = io.BytesIO()
        image.convert("RGB").save(made, "PNG")
    data = made.getvalue()
    change = random.randrange(4)
    if change < 2:
        data = values.damaged(random, data)
    elif change == 2 and data[:8] == b"\x89PNG\r\n\x1a\n":
        data = values.odd_png(random, data)
    path = folder / random.choice(["x.png", "x.jpg", "x.tif", "x"])
    path.write_bytes(data)

    def call() -> str | None:
        found = open_rgb(path, str(path), random.choice([None, (0, 1), (0, 65535)]), random.choice([None, 100, 10**9]))
        return None if found.mode == "RGB" and min(found.size) > 0 else f"{found}"

    return call


def hub_configs(random: random.Random, folder: Path, base: Path) -> Call:
    """config.json of timm's hub layout: a field that is there and wrong must not be replaced in silence."""
    fields = {
        "input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic",
        "crop_pct": 0.9, "label_names": ["a", "b"],
    }  # fmt: skip
    config: dict[str, Any] = {"architecture": "conv2former_n", "num_classes": 2, "pretrained_cfg": fields}
    config["conv2former"] = {"variant": SHAPE, "source": {}, "metric": 1.0}
    node = random.choice([config, fields, fields, fields, config["conv2former"]])
    key = random.choice(list(node))
    node[key] = random.choice(
        [
            values.plain(random),
            [3, 0, 0],
            [0, 0, 0],
            True,
            [True] * 3,
            [1e400] * 3,
            [3, 10**9, 10**9],
            -1,
            "x" * 10**6,
            10**400,
            [10**400] * 3,
            ["a"] * 10**6,
            [["a"], ["b"]],
        ]
    )
    data = json.dumps(config, default=str).encode()
    is_damaged = random.random() < 0.3
    if is_damaged:
        data = random.choice([values.damaged(random, data), b"[" * 10**6, b'{"a":' * 10**5])
    (folder / "config.json").write_bytes(data)
    shutil.copy(base / "model.safetensors", folder / "model.safetensors")

    def call() -> str | None:
        os.environ["CONV2FORMER_HOME"] = str(folder / "home")
        (folder / "home").mkdir()
        shutil.copytree(folder, folder / "home" / "conv2former_fuzzed.own", ignore=lambda *_: ["home"])
        list_installed()
        _, info = load_model(folder)
        if is_damaged or key not in info.preprocessing.to_dict() or node is not fields or not is_noted(node[key]):
            return None
        taken, noted = info.preprocessing.to_dict()[key], node[key]
        is_one = isinstance(noted, (list, tuple)) and len(noted) == 1
        same = [*noted] * 3 if is_one else [*noted] if isinstance(noted, tuple) else noted
        return None if taken == same else f"{key}: {noted!r:.80} is taken as {taken!r}"

    return call


def configs(random: random.Random, folder: Path, base: Path) -> Call:
    """Recipes and variants, damaged or with odd values, and odd words on the command line."""
    path = random.choice(sorted((ROOT / "configs").glob("**/*.yaml")))
    text = path.read_bytes()
    change = random.randrange(3)
    if change == 0:
        text = values.damaged(random, text)
    elif change == 1:
        text = values.text_lines(random, text.split(b"\n"))
    target = folder / path.name
    target.write_bytes(text if random.random() < 0.9 else b"[" * 10**5)
    fields = {name: getattr(field.annotation, "model_fields", {}) for name, field in Config.model_fields.items()}
    keys = [f"{name}.{key}" for name, section in fields.items() for key in section]
    word = f"{random.choice(keys)}={values.plain(random)!r:.2000}"

    def call() -> None:
        if "variants" in path.parts or "models" in path.parts:
            read_variant(target)
        load_config(target, [word] if change == 2 else [])

    return call
