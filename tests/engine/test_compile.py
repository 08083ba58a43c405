"""Runs with `train.compile: true`. The numbers of compiled blocks are in tests/models/test_compiled.py."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml

from conv2former import ConfigError, compiling
from conv2former.config import check_config
from conv2former.engine import train
from conv2former.tasks import network
from conv2former.tools.runs.comparing import differing, metrics_of

from ..conftest import ROOT
from .conftest import configure, killed_after
from .test_step import make_run
from .test_trainer import final


@pytest.fixture
def without_code_generation(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(network, "compile_blocks", functools.partial(network.compile_blocks, backend="eager"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/as/given")


@pytest.mark.slow
def test_a_compiled_run_goes_on_exactly_and_in_eager_mode_too(raw_config, tmp_path, without_code_generation):
    """With accumulation, drop path, averaged weights and evaluations."""
    config = configure(raw_config, train__compile=True, checkpoint__every_steps=3)
    train(config, tmp_path / "whole")
    for name in ("parts", "eager"):
        with killed_after(8):
            train(config, tmp_path / name)
    train(config, tmp_path / "parts")
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    for key in ("model", "model_ema", "optimizer", "best_metric"):
        assert not differing(whole[key], parts[key]), key
    assert not any("_orig_mod" in key for key in whole["model"])

    with pytest.raises(ConfigError, match=r"train\.compile"):
        train(configure(raw_config, checkpoint__every_steps=3), tmp_path / "eager")
    changes = {"checkpoint__every_steps": 3, "checkpoint__allow_changes": ["train.compile"]}
    report = train(configure(raw_config, **changes), tmp_path / "eager")
    assert "torch.compile" not in report["kernels"]["network"]
    for a, b in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "eager"), strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), rel=1e-3)


def test_compiled_code_is_kept_in_the_store(raw_config, store, monkeypatch, without_code_generation):
    def folder_of_a_run() -> str:
        make_run(raw_config, train__compile=True)
        return os.environ["TORCHINDUCTOR_CACHE_DIR"]

    assert folder_of_a_run() == "/as/given"
    for default in (None, str(Path(tempfile.gettempdir(), "torchinductor_somebody"))):
        if default is None:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        else:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default)
        assert folder_of_a_run() == str(store / "inductor")
        assert (store / "inductor").stat().st_mode & 0o077 == 0
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    make_run(raw_config)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_where_the_store_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONV2FORMER_HOME", str(tmp_path / "file"))
    folder = compiling.private_folder("inductor")
    assert folder.is_dir()
    assert tmp_path not in folder.parents
    assert "cannot keep compiled functions" in caplog.text


@pytest.mark.slow
def test_the_script_with_code_generation(raw_config, tmp_path):
    """Losses are those of eager mode, and what was compiled is in the store afterwards."""
    raw_config["schedule"] = {"epochs": 1, "warmup_epochs": 0, "cooldown_epochs": 0}
    raw_config["model"]["variant"] |= {"dims": [8, 8, 8, 8], "depths": [1, 1, 2, 1]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw_config))
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    environment["CONV2FORMER_HOME"] = str(tmp_path / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "compiled").symlink_to(os.environ["CONV2FORMER_TESTS_COMPILED"], target_is_directory=True)
    command = [sys.executable, "scripts/train.py", "--config", tmp_path / "config.yaml", "--output", tmp_path / "run"]
    done = subprocess.run([*command, "train.compile=true"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "context_fn" not in done.stderr  # torch's advice for those who say what is to be saved
    assert list((tmp_path / "store" / "inductor").iterdir())
    train(check_config(raw_config, "test"), tmp_path / "eager")
    rows = [metrics_of(tmp_path / name) for name in ("run", "eager")]
    compiled, eager = ([row["loss"] for row in found if "loss" in row] for found in rows)
    assert len(compiled) > 2
    assert compiled == pytest.approx(eager, rel=1e-3)
