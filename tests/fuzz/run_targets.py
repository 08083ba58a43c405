"""Targets that read weights, runs and compiled functions."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from conv2former import compiling, inspect_checkpoint, load_model
from conv2former.engine import train
from conv2former.engine.checkpoint import latest_checkpoint, read_training_checkpoint
from conv2former.errors import CheckpointError

from ..conftest import FIXTURES
from . import values
from .common import Call, newest, settings_for


def weights(random: random.Random, folder: Path, base: Path) -> Call:
    """Damaged and foreign weight files."""
    source = random.choice([FIXTURES / "official_format.pth.tar", FIXTURES / "model_k7.safetensors", newest(base)])
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
    path = newest(folder)
    content = read_any(path)
    kind = random.randrange(3)
    if kind == 0:
        content[random.choice(list(content))] = values.anything(random)
    elif kind == 1:
        _change(random, content)
    if kind < 2:
        torch.save(content, path)
        path.with_name(path.name + ".sha256").unlink()
    else:
        metrics = folder / "run" / "metrics.jsonl"
        metrics.write_bytes(values.text_lines(random, metrics.read_bytes().splitlines()))
    resume = random.choice(["auto", str(path)])

    def call() -> None:
        train(settings_for(base / "photos", epochs=2) if resume == "auto" else settings_for(base / "photos"),
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
        report = train(settings_for(base / "photos"), run)
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
