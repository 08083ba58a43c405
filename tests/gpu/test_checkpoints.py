"""What a GPU has trained, elsewhere, and the other way round: evaluation, prediction, export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conv2former.config import Config, load_config
from conv2former.data.digits import write_samples
from conv2former.engine import train
from conv2former.tools.evaluation.validate import validate
from conv2former.tools.export.export import export
from conv2former.tools.export.options import Options
from conv2former.tools.prediction.inputs import find_images
from conv2former.tools.prediction.predict import Predictor

from ..conftest import ROOT
from .conftest import DEVICE


@pytest.fixture(scope="module")
def config(digits) -> Config:
    words = [f"data.root={digits}", "schedule.epochs=4", "log.tensorboard=false"]
    return load_config(ROOT / "configs" / "quickstart.yaml", words)


@pytest.fixture(scope="module")
def checkpoint(config, tmp_path_factory) -> Path:
    """Of a network that was trained on the GPU."""
    folder = tmp_path_factory.mktemp("run")
    train(config, folder)
    return folder / "checkpoints" / "best.pt"


def without_gpu(*words: object) -> str:
    """Runs a script that sees no GPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, words)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_a_checkpoint_of_a_gpu_is_evaluated_on_a_cpu(checkpoint, tmp_path):
    here = validate(checkpoint, overrides=["train.precision=fp32"])
    without_gpu("scripts/validate.py", "--checkpoint", checkpoint, "train.precision=fp32", "--output", tmp_path)
    (there,) = json.loads((tmp_path / "results.json").read_text())
    assert there["n"] == here["n"] == 360
    assert abs(there["top1"] - here["top1"]) <= 100 / 360  # an image of which both classes are as probable
    assert there["loss"] == pytest.approx(here["loss"], rel=2e-3)  # TF32 in the stem's convolutions


def test_a_checkpoint_of_a_cpu_is_evaluated_and_continued_on_a_gpu(config, digits, tmp_path):
    words = ["scripts/train.py", "--config", "configs/quickstart.yaml", "--output", tmp_path / "run"]
    without_gpu(
        *words, f"data.root={digits}", "schedule.epochs=4", "log.tensorboard=false", "checkpoint.every_steps=40"
    )
    row = validate(tmp_path / "run" / "checkpoints" / "best.pt")
    assert row["n"] == 360
    middle = min((tmp_path / "run" / "checkpoints").glob("step_*.pt"))
    report = train(config, tmp_path / "rest", resume=str(middle))
    assert report["top1"] == pytest.approx(row["top1"], abs=5)


def test_predictions_are_those_of_a_cpu(checkpoint, tmp_path):
    write_samples(tmp_path)
    images = find_images([str(tmp_path)])
    ours, theirs = (
        [found.top[0] for found in Predictor(checkpoint, device=device)(images, topk=1, batch_size=4)]
        for device in (DEVICE.type, "cpu")
    )
    assert [guess.index for guess in ours] == [guess.index for guess in theirs]
    # TF32 in the stem's convolutions
    assert [guess.probability for guess in ours] == pytest.approx([guess.probability for guess in theirs], abs=5e-3)


@pytest.mark.parametrize("name", ["network.onnx", "network.pt2"])
def test_export_where_there_is_a_gpu(checkpoint, tmp_path, name):
    done = export(checkpoint, tmp_path / name, Options(), lambda line: None)
    assert done.cases
    assert (tmp_path / name).stat().st_size > 10_000
