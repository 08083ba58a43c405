"""What reads files, each as a function that writes a hostile file into an empty folder and returns what reads it.

`prepare` writes, once, what they damage. What a target returns may come back, or raise a UserError or TrainingError;
all else is a find. It returns a text if what it read is silently wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from conv2former import compiling, inspect_checkpoint, list_installed, load_model
from conv2former._preprocessing import is_noted
from conv2former.config.schema import DataConfig
from conv2former.data import open_train_and_val
from conv2former.data.images import open_rgb
from conv2former.data.sources import DataSource
from conv2former.data.tables import read_class_list, read_table, write_table
from conv2former.engine import train
from conv2former.engine.checkpoint import latest_checkpoint, read_training_checkpoint
from conv2former.engine.terminal import say
from conv2former.errors import CheckpointError
from conv2former.tools.evaluation.files import summary
from conv2former.tools.evaluation.validate import Extras, validate_files

from ..conftest import FIXTURES
from ..hostile import faults_in, faults_of
from . import values

Call = Callable[[], "str | None"]
SHAPE = {"name": "conv2former_fuzzed", "dims": [8, 16, 24, 40], "depths": [1, 1, 2, 1], "kernel_size": 7}


def _settings(root: Path, **schedule: Any) -> dict[str, Any]:
    return {
        "model": {"variant": SHAPE},
        "data": {"source": "folder", "root": str(root), "img_size": 32, "workers": 0},
        "train": {"batch_size": 6, "channels_last": False},
        "schedule": {"epochs": 1, "warmup_epochs": 0, "cooldown_epochs": 0, **schedule},
        "checkpoint": {"every_steps": 1, "keep": 3},
        "log": {"tensorboard": False, "every_steps": 1},
        "ema": {"decay": 0.9},
    }


def prepare(base: Path) -> None:
    """Writes a small data set and a run on it."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 2)):
        for name in ("a", "b"):
            (base / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(base / "photos" / split / name / f"{i}.png")
    train(_settings(base / "photos"), base / "run")
    save_file(load_model(_newest(base))[0].state_dict(), base / "model.safetensors")


def _newest(base: Path) -> Path:
    return sorted((base / "run" / "checkpoints").glob("step_*.pt"))[-1]


# ------------------------------------------------------------------------------------------------------------ weights


def weights(random: random.Random, folder: Path, base: Path) -> Call:
    """Damaged and foreign weight files."""
    source = random.choice([FIXTURES / "official_format.pth.tar", FIXTURES / "model_k7.safetensors", _newest(base)])
    path = folder / f"file{source.suffix}"
    kind = random.randrange(4)
    if kind < 2 or source.suffix == ".safetensors":
        path.write_bytes(values.damaged(random, source.read_bytes()))
    elif kind == 2:
        content = read_any(source)
        _change(random, content)
        torch.save(content, path)
    else:
        path.write_bytes(_odd_zip(random, source.read_bytes()))

    def call() -> None:
        inspect_checkpoint(path)
        load_model(path)

    return call


def read_any(path: Path) -> dict:
    """Reads one of our own files, whatever is in it."""
    return torch.load(path, weights_only=False, map_location="cpu")


def _change(random: random.Random, content: dict) -> None:
    """Changes entries somewhere in nested dictionaries."""
    for _ in range(random.choice([1, 1, 2, 4])):
        node = content
        while random.random() < 0.7:
            inner = [v for v in node.values() if isinstance(v, dict) and v]
            if not inner:
                break
            node = random.choice(inner)
        key = random.choice(list(node))
        change = random.randrange(4)
        if change == 0:
            del node[key]
        elif change == 1 and isinstance(key, str):
            node[random.choice([key + "x", "stages.0.blocks.999999999.ls1.gamma", values.TERMINAL, key.upper()])] = (
                node[key]
            )
        else:
            node[key] = values.anything(random)


def _odd_zip(random: random.Random, content: bytes) -> bytes:
    """Returns a zip archive with its entries compressed, renamed, left out, inflated or doubled."""
    made, kind = io.BytesIO(), random.randrange(5)
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        inflated = random.choice(old.infolist()).filename
        for entry in old.infolist():
            data = old.read(entry)
            if kind == 0 and random.random() < 0.3:
                continue
            if kind == 1 and random.random() < 0.3:
                data = values.damaged(random, data) if data else data
            if kind == 2 and entry.filename.endswith("data.pkl"):
                data = pickle.dumps(values.plain(random, 3), protocol=2)
            if kind == 3 and entry.filename == inflated:
                data = bytes(300 << 20)
            name = entry.filename if kind != 4 or random.random() < 0.8 else "../" + entry.filename
            new.writestr(name, data, zipfile.ZIP_DEFLATED if kind == 3 else zipfile.ZIP_STORED)
    return made.getvalue()


# ------------------------------------------------------------------------------------------------------------ runs


def checkpoints(random: random.Random, folder: Path, base: Path) -> Call:
    """Damaged training checkpoints, with and without their checksums: a flipped bit must be seen."""
    run = folder / "checkpoints"
    shutil.copytree(base / "run" / "checkpoints", run)
    newest = sorted(run.glob("step_*.pt"))[-1]
    whole = read_any(newest)
    newest.write_bytes(values.damaged(random, newest.read_bytes()))
    if random.random() < 0.7:
        newest.with_name(newest.name + ".sha256").unlink()

    def call() -> str | None:
        found = latest_checkpoint(run)
        assert found is not None
        try:
            read_training_checkpoint(newest)
        except CheckpointError:
            return None if found[0] != newest else "the newest is taken although it is damaged"
        return None if _same(whole, found[1]) else "a damage is not seen"

    return call


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and [*a] == [*b] and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def resuming(random: random.Random, folder: Path, base: Path) -> Call:
    """Runs that go on from checkpoints with foreign values, beside foreign files."""
    shutil.copytree(base / "run", folder / "run")
    newest = _newest(folder)
    content = read_any(newest)
    kind = random.randrange(3)
    if kind == 0:
        content[random.choice(list(content))] = values.anything(random)
    elif kind == 1:
        _change(random, content)
    if kind < 2:
        torch.save(content, newest)
        newest.with_name(newest.name + ".sha256").unlink()
    else:
        metrics = folder / "run" / "metrics.jsonl"
        metrics.write_bytes(values.text_lines(random, metrics.read_bytes().splitlines()))
    resume = random.choice(["auto", str(newest)])

    def call() -> None:
        train(_settings(base / "photos", epochs=2) if resume == "auto" else _settings(base / "photos"),
              folder / "run" if resume == "auto" else folder / "other", resume)  # fmt: skip

    return call


def run_folders(random: random.Random, folder: Path, base: Path) -> Call:
    """Finished runs whose files were damaged or replaced by pipes, folders and dangling links, started again."""
    run = folder / "run"
    shutil.copytree(base / "run", run)
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    for path in random.sample(files, random.choice([1, 1, 2, 4])):
        content = path.read_bytes()
        path.unlink()
        _plant(random, path, content)

    def call() -> str | None:
        report = train(_settings(base / "photos"), run)
        for key in ("checkpoint", "last_checkpoint"):
            load_model(report[key])
        return None

    return call


def _plant(random: random.Random, path: Path, content: bytes) -> None:
    """Leaves a file damaged, or puts nothing or something else in its place."""
    kind = random.randrange(6)
    if kind < 2:
        path.write_bytes(values.damaged(random, content or b"\0"))
    elif kind == 2 and path.suffix in (".pt", ".sha256"):
        os.mkfifo(path)
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        path.symlink_to("nowhere")


SOURCE = """
extern "C" int answer() { return LANE_BYTES; }
extern "C" void compiled_to_the_end() {}
"""


def compiled_libraries(random: random.Random, folder: Path, base: Path) -> Call:
    """Damaged and foreign files in the cache of compiled functions: none is loaded, and the answer stays right."""
    source, store = folder / "answer.cpp", folder / "store"
    source.write_text(SOURCE)
    os.environ["CONV2FORMER_HOME"] = str(store)
    whole = compiling.library(source)
    if whole is None:
        return lambda: None
    expected = whole.answer()
    for path in random.sample(sorted((store / "compiled").glob("answer-*")), random.choice([1, 2])):
        content = path.read_bytes()
        path.unlink()
        _plant(random, path, content)
        if path.is_file():
            path.chmod(random.choice([0o600, 0o600, 0o666]))
    compiling._library.cache_clear()

    def call() -> str | None:
        found = compiling.library(source)
        return None if found is not None and found.answer() == expected else "the library is lost, or another"

    return call


# ------------------------------------------------------------------------------------------------------------ data


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
    for source in open_train_and_val(config):
        assert isinstance(source, DataSource)
        assert len(source.class_names) > 0
        if "-1" in source.class_names or "" in source.class_names:
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
            train(_settings(photos), folder / "run")
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


FUNCTIONS = (
    weights,
    checkpoints,
    resuming,
    run_folders,
    compiled_libraries,
    tables,
    tars,
    folders,
    names,
    parquet,
    images,
    hub_configs,
)
TARGETS: dict[str, Callable[[random.Random, Path, Path], Call]] = {
    function.__name__: function for function in FUNCTIONS
}
