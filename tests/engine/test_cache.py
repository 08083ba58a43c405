"""Runs with data.cache: ram: the same as without, also killed, also on several processes; and what refuses it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from conv2former import ConfigError
from conv2former.data.cache import CachePlace
from conv2former.engine import cache, train
from conv2former.errors import DataError, RunStopped
from conv2former.tools.runs.comparing import differing_runs, metrics_of

from .conftest import configure, killed_after
from .test_processes import run

SHORT = {"schedule__epochs": 2, "schedule__cooldown_epochs": 0, "checkpoint__every_steps": 3}

pytestmark = pytest.mark.slow


@pytest.fixture
def reads(monkeypatch):
    """A list that gets an item whenever this process reads an image from its file."""
    from conv2former.data import hf

    read, real = [], hf.open_rgb
    monkeypatch.setattr(hf, "open_rgb", lambda *args: read.append(1) or real(*args))
    return read


def test_a_run_in_memory_is_the_run_from_files(raw_config, tmp_path, reads, capsys):
    """Bit for bit: in one go, and killed twice within an epoch, with other workers, at last without a cache."""
    train(configure(raw_config, **SHORT), tmp_path / "files")
    reads.clear()
    cached = {**SHORT, "data__cache": "ram"}
    train(configure(raw_config, **cached), tmp_path / "memory")
    assert len(reads) == 2 * (44 + 7)  # to estimate, where so few are all, and to read
    assert not differing_runs(tmp_path / "files", tmp_path / "memory")
    assert "51 images read into memory in 0 s, 0." in capsys.readouterr().out

    for changes, steps in (({**cached, "data__workers": 2}, 4), (cached, 4), (SHORT, 10)):
        with killed_after(steps) if steps < 10 else contextlib.nullcontext():
            train(configure(raw_config, **changes), tmp_path / "parts")
    assert not differing_runs(tmp_path / "files", tmp_path / "parts")


def test_held_out_images_are_in_memory_too(raw_config, tmp_path, small_data, reads):
    changes = {**SHORT, "data__val_split": "none", "data__holdout": 0.2}
    for name, way in (("files", "none"), ("memory", "ram")):
        reads.clear()
        train(configure(raw_config, **changes, data__cache=way), tmp_path / name)
    assert len(reads) == 2 * 44
    assert not differing_runs(tmp_path / "files", tmp_path / "memory")


def test_processes_of_one_machine_read_every_image_once(raw_config, tmp_path, reads):
    """Two processes; the second opens the memory of the first."""
    log = tmp_path / "read.txt"

    def noted(config, name):
        try:
            train(config, tmp_path / name)
        finally:
            with log.open("a") as file:
                file.write(f"{name} {len(reads)}\n")

    for name, way in (("files", "none"), ("memory", "ram")):
        config = configure(raw_config, **SHORT, data__cache=way)
        codes, output = run(lambda config=config, name=name: noted(config, name), 2, tmp_path)
        assert set(codes) == {0}, output
    assert sorted(log.read_text().splitlines())[-2:] == ["memory 0", f"memory {2 * (44 + 7)}"]
    assert not differing_runs(tmp_path / "files", tmp_path / "memory")


def test_an_error_of_the_process_that_reads_ends_all(raw_config, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda: 100_000)
    config = configure(raw_config, data__cache="ram")
    codes, output = run(lambda: train(config, tmp_path / "run"), 2, tmp_path)
    assert set(codes) == {2}, output
    assert output.count("data.cache: the 51 images of") == 1


def test_too_many_images_for_the_memory(raw_config, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda: 100_000)
    expected = r"the 51 images of .* and .* take about 0.2 MiB as pixels, .* room for 0.1 MiB .*; set data.cache=none"
    with pytest.raises(DataError, match=expected):
        train(configure(raw_config, data__cache="ram"), tmp_path / "run")
    monkeypatch.setattr(cache, "free_memory", lambda: None)  # nobody knows: it is tried
    assert train(configure(raw_config, data__cache="ram", **SHORT), tmp_path / "run")["steps"] == 10


def test_a_signal_while_images_are_read(raw_config, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SLICE", 0.0)
    monkeypatch.setattr(cache, "free_memory", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunStopped, match="stopped by SIGTERM while images were read"):
        train(configure(raw_config, data__cache="ram"), tmp_path / "run")
    monkeypatch.undo()
    assert train(configure(raw_config, data__cache="ram", **SHORT), tmp_path / "run")["steps"] == 10


def test_an_image_that_cannot_be_read_counts_as_without_a_cache(raw_config, tmp_path):
    root = tmp_path / "images"
    for i in range(24):
        path = root / ("val" if i > 17 else "train") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32 + i), (10 * i, 0, 255)).save(path)
    for broken in (root / "train" / "a" / "0.png", root / "val" / "a" / "20.png"):
        broken.write_bytes(b"nothing")
    raw_config["data"] = {"root": str(root), "img_size": 32, "workers": 0, "on_error": "skip", "max_skipped": 0.5}
    for name, way in (("files", "none"), ("memory", "ram")):
        train(configure(raw_config, **SHORT, data__cache=way), tmp_path / name)
    assert not differing_runs(tmp_path / "files", tmp_path / "memory")
    assert metrics_of(tmp_path / "memory")[-1]["n"] == 5
    assert skipped(tmp_path / "memory") == skipped(tmp_path / "files")
    assert len(skipped(tmp_path / "memory")) == 2
    with pytest.raises(DataError, match=r"0.png: not a readable image .*data.on_error=skip"):
        train(configure(raw_config, data__cache="ram", data__on_error="raise"), tmp_path / "raise")


def skipped(folder: Path) -> list[str]:
    lines = (folder / "train.log").read_text().splitlines()
    return sorted(line.split("skipped: ")[1] for line in lines if "skipped: " in line)


def test_a_stream_is_not_kept(raw_config):
    with pytest.raises(ConfigError, match=r"data.cache: not with data.streaming"):
        configure(raw_config, data__cache="ram", data__streaming=True, data__epoch_images=40)


def test_a_system_without_such_memory(raw_config, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ConfigError, match=r"data.cache: ram needs Linux"):
        train(configure(raw_config, data__cache="ram"), tmp_path / "run")


def test_memory_that_cannot_be_opened():
    with pytest.raises(ConfigError, match=r"the memory of rank 3 cannot be opened .* .No such file or directory."):
        cache._opened(3, [CachePlace("/proc/0/fd/1", 1, 3, {})])


def test_processes_that_cannot_open_each_others_memory_read_for_themselves(monkeypatch):
    monkeypatch.setattr(cache, "Path", lambda *_: (_ for _ in ()).throw(OSError))
    assert str(os.getpid()) in cache._machine()
