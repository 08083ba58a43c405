"""A segmentation trains, is killed, goes on and is evaluated as a classifier is, by the same engine."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from conv2former import ConfigError, DataError
from conv2former.commands.train import summary
from conv2former.engine import dry_run, train, trainer
from conv2former.engine.checkpoint import read_training_checkpoint
from conv2former.engine.logging import read_metrics
from conv2former.tasks.segmentation.task import Segmentation
from conv2former.tools.runs.comparing import differing_runs
from conv2former.tools.runs.killing import RunProcesses

from ..engine.conftest import configure
from .conftest import NAMES

LAST = {f"{layer}.{kind}" for layer in ("head.classifier", "auxiliary.4") for kind in ("weight", "bias")}


def check_start(raw, saved, path):
    """Its weights start another run: all of them, or the backbone's where the head is another."""
    weights = saved["model_ema"]
    given = configure(raw, model__checkpoint=path)
    for names, fresh in ((NAMES, set()), (NAMES[::-1], LAST)):
        state = Segmentation().build_model(given, 3, names).state_dict()
        assert state.keys() == weights.keys()
        assert {key for key, value in state.items() if not value.equal(weights[key])} == fresh
    raw = {**raw, "model": {**raw["model"], "head": {"name": "upernet", "channels": 16}, "checkpoint": path}}
    state = Segmentation().build_model(configure(raw), 3, NAMES).state_dict()
    assert all(state[key].equal(value) for key, value in weights.items() if key.startswith("backbone."))


def kill_at(step: int, monkeypatch, config, folder: Path) -> None:
    """Kills a run and its loader's workers with SIGKILL when it has computed this step and not saved it."""
    real = trainer.train_step

    def last_step(run, batches, number, *args):
        result = real(run, batches, number, *args)
        if number + 1 == step:
            assert multiprocessing.active_children()  # the loaders' workers, which die with it
            os.killpg(0, signal.SIGKILL)
        return result

    monkeypatch.setattr(trainer, "train_step", last_step)
    processes = RunProcesses(partial(train, config, folder), 1, folder.with_suffix(".txt"))
    monkeypatch.setattr(trainer, "train_step", real)
    assert processes.wait(120)
    assert processes.exit_codes == [-signal.SIGKILL], folder.with_suffix(".txt").read_text()


@pytest.mark.slow
def test_it_trains_and_goes_on_exactly(raw, tmp_path, monkeypatch, capsys):
    """With everything on that draws; the picture of the worst images comes out of the checkpoint of the first part."""
    raw["schedule"] |= {"decay": "multistep", "milestones": [1.4]}
    config = configure(raw, checkpoint__every_steps=2)
    report = train(config, tmp_path / "whole")
    assert (report["task"], report["steps"], report["n"]) == ("segmentation", 6, 5)
    rows = [row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if row["kind"] == "eval"]
    assert report["miou"] == max(row["ema_miou"] for row in rows)
    assert {"miou", "loss", "pixel_accuracy", "mean_accuracy", "iou/disc", "ema_iou/ground", "n"} <= set(rows[0])
    assert [row["class"] for row in report["classes"]] == NAMES
    assert len(report["worst_images"]) == 5
    assert (tmp_path / "whole" / "worst.png").stat().st_size > 10_000
    assert (tmp_path / "whole" / "first_batch.png").is_file()
    saved = read_training_checkpoint(tmp_path / "whole" / "checkpoints" / "best.pt")
    assert saved["best_metric"] == report["miou"]
    assert len(saved["pixels"][0]) == 3
    output = capsys.readouterr().out
    assert "classifier" not in output
    assert "images: training crops of 32 x 32 from the configuration; 3 channels (RGB), mean 0.485, " in output
    assert "bicubic" not in output
    assert "head fpn, 64 channels, an auxiliary one on stage 3 (x 0.4 in the loss)" in output
    assert "training pixels per class: " in output
    assert "  worst images " in "\n".join(summary(report, tmp_path))

    check_start(raw, saved, str(tmp_path / "whole" / "checkpoints" / "best.pt"))
    kill_at(5, monkeypatch, configure(raw, checkpoint__every_steps=2, data__workers=2), tmp_path / "parts")
    train(configure(raw, checkpoint__every_steps=2, data__workers=1), tmp_path / "parts")
    assert "going on from " in (output := capsys.readouterr().out)
    assert "step_00000004.pt\n" in output  # of six, three an epoch
    assert not differing_runs(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ConfigError, match=r"loss\.dice: 0\.5 -> 0\.1"):
        train(configure(raw, loss__dice=0.1), tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_evaluate_every_image_once(raw, tmp_path):
    config = configure(raw, train__batch_size=1, schedule__epochs=1, evaluation__mode="slide", evaluation__flip=True)
    run = RunProcesses(partial(train, config, tmp_path / "two"), 2, tmp_path / "output.txt")
    assert run.wait(300), (tmp_path / "output.txt").read_text()
    assert run.exit_codes == [0, 0], (tmp_path / "output.txt").read_text()
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert (report["n"], report["steps"], len(report["worst_images"])) == (5, 3, 5)
    pixels = Segmentation().open_data(config)[1].counts.pixels
    assert [row["pixels"] for row in report["classes"]] == pixels.tolist()


@pytest.mark.slow
def test_a_dry_run_needs_no_data_where_the_classes_are_known(raw, monkeypatch):
    monkeypatch.setattr(Segmentation, "open_data", None)
    for changes in ({"data__num_classes": 5}, {"data__source": "cityscapes", "data__root": "nowhere"}, {}):
        lines = dry_run(configure(raw, **changes))
        assert "one step on 2 random images: loss " in lines[-1]
        classes = {"data__num_classes": 5, "data__source": 19}.get(next(iter(changes), ""), 3)
        assert f"{classes} classes" in lines[-2]


def test_masks_are_checked_before_the_network_is_built(raw, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Segmentation, "build_model", None)
    (folder / "masks" / "train" / "07.png").unlink()
    with pytest.raises(DataError, match=r"images/train/07\.png: no mask"):
        train(configure(raw), tmp_path / "run")
    assert not (tmp_path / "run").exists()
