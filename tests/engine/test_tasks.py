"""That a task needs nothing but `Task` to train, resume, stop and be evaluated as classification is."""

from __future__ import annotations

import json
from functools import partial
from typing import get_args

import pytest
import torch

from conv2former import CheckpointError, ConfigError
from conv2former.commands.train import summary
from conv2former.config import Config, check_config, load_config, schema
from conv2former.config import registry as configs
from conv2former.config.registry import as_classification
from conv2former.engine import dry_run, train, trainer
from conv2former.engine.checkpoint import read_training_checkpoint
from conv2former.engine.logging import read_metrics
from conv2former.errors import TrainingError
from conv2former.tasks import registry
from conv2former.tasks.registry import find_task, register_task
from conv2former.tools.runs.comparing import differing_runs
from conv2former.tools.runs.killing import RunProcesses

from ..graphs_on_cpu import CpuRecorder, capture_with
from .colour_task import ColourTask
from .conftest import SHAPE, configure, killed_after

TASKS = "classification, segmentation, detection, colour"


@pytest.fixture(autouse=True)
def colour(monkeypatch):
    monkeypatch.setattr(registry, "_tasks", dict(registry._tasks))
    monkeypatch.setattr(configs, "_classes", dict(configs._classes))
    register_task(ColourTask())


@pytest.fixture
def raw(tmp_path) -> dict:
    return {
        "task": "colour",
        "model": {"variant": {"name": "conv2former_test", "ls_init_value": 0.5, **SHAPE}, "drop_path_rate": 0.2},
        "data": {"root": str(tmp_path), "workers": 0},
        "loss": {"beta": 0.5},
        "schedule": {"epochs": 2, "warmup_epochs": 0, "cooldown_epochs": 0},
        "train": {"batch_size": 2, "accum_steps": 2},
        "optim": {"base_lr": 1e-3, "base_batch_size": 4},
        "ema": {"decay": 0.5},
        "checkpoint": {"every_steps": 1},
        "log": {"every_steps": 1, "tensorboard": False},
    }


@pytest.mark.slow
def test_it_trains_and_goes_on_exactly(raw, tmp_path, capsys):
    config = configure(raw)
    report = train(config, tmp_path / "whole")
    assert (report["task"], report["steps"], report["n"]) == ("colour", 10, 7)
    assert f"epoch {report['epoch']} of 2" in "\n".join(summary(report, tmp_path))
    assert json.loads((tmp_path / "whole" / "report.json").read_text()) == report
    rows = [row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if row["kind"] == "eval"]
    assert [set(row) for row in rows] == [{"kind", "step", "epoch", "error", "ema_error", "n"}] * 2
    assert report["error"] == min(row["ema_error"] for row in rows) == rows[1]["ema_error"] < rows[0]["ema_error"]
    saved = read_training_checkpoint(tmp_path / "whole" / "checkpoints" / "best.pt")
    assert saved["best_metric"] == report["error"]
    assert saved["history"][-1] == [saved["epoch"], saved["metric"]]
    assert len(saved["worst"]) == 3
    assert saved["config"]["loss"] == {"beta": 0.5}
    output = capsys.readouterr().out
    assert "training on 21 images (noise), validating on 7 (other noise)" in output
    assert "images: 3 channels (RGB) by default\nconv2former_test from scratch, drop path 0.2\n" in output

    with killed_after(7):  # in the second epoch
        train(config, tmp_path / "parts")
    train(configure(raw, data__workers=1), tmp_path / "parts")
    assert not differing_runs(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ConfigError, match=r"loss\.beta: 0\.5 -> 0\.1"):
        train(configure(raw, loss__beta=0.1), tmp_path / "whole")


@pytest.mark.parametrize("key", ["error", "ema_error"])
def test_exploded_weights_are_not_saved(raw, tmp_path, monkeypatch, key):
    """There is no validation loss here, so the headline says it."""
    real, calls = trainer.evaluate, []

    def exploded(*args):
        result = real(*args)
        calls.append(result)
        if len(calls) == ["error", "ema_error"].index(key) + 1:
            result.metrics["error"] = float("inf")
        return result

    monkeypatch.setattr(trainer, "evaluate", exploded)
    with pytest.raises(TrainingError, match=f"the validation {key} is not finite after step 5"):
        train(configure(raw, checkpoint__every_steps=None), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_two_processes_gather_what_they_found(raw, tmp_path):
    config = configure(raw, train__batch_size=1, schedule__epochs=1)
    run = RunProcesses(partial(train, config, tmp_path / "two"), 2, tmp_path / "output.txt")
    assert run.wait(300), (tmp_path / "output.txt").read_text()
    assert run.exit_codes == [0, 0], (tmp_path / "output.txt").read_text()
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert (report["n"], report["steps"]) == (7, 5)


@pytest.mark.slow
def test_it_stops_early_by_its_own_metric_and_goes_without_graphs(raw, tmp_path, monkeypatch, capsys):
    capture_with(monkeypatch, CpuRecorder)
    config = configure(raw, train__early_stop={"patience": 1, "min_delta": 9.0}, schedule__epochs=9, ema__decay=None)
    report = train(config, tmp_path / "run")
    assert report["stopped_early"].startswith("the error has not fallen by more than 9 for 1 evaluation (best: ")
    assert "CUDA graphs: not used: its images differ in size" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"train\.cuda_graph: on, but its images differ in size"):
        dry_run(configure(raw, train__cuda_graph="on"))


@pytest.mark.slow
def test_a_dry_run_needs_no_data(raw, monkeypatch):
    monkeypatch.setattr(ColourTask, "open_data", None)
    assert "one step on 2 random images: loss " in dry_run(configure(raw))[-1]


def test_its_configuration_is_checked_by_its_own_sections(raw):
    assert find_task(configure(raw)).name == "colour"
    for words, message in (
        (["task=colur"], f"task: no task 'colur' (did you mean 'colour'?): {TASKS}"),
        (["task=[colour]"], f"task: no task ['colour']: {TASKS}"),
        (["task=colour", "data.root=x", "loss.bta=1"], "loss.bta: unknown key (did you mean 'beta'?)"),
        (["task=colour", "data.root=x", "betaa=1"], "betaa: unknown key (did you mean 'loss.beta'?)"),
        (["task=colour", "data.root=x", "augment.mixup=0"], "augment: unknown key"),
        (["task=colour", "data.root=x", "checkpoint.metric=top1"], "checkpoint.metric: input should be 'error'"),
        (["task=colour"], "data.root: missing"),
        (["task=colour", "data.root=x", "data.std=[1,1,1]"], "data.std: has no effect with task: colour; leave it out"),
    ):
        with pytest.raises(ConfigError) as error:
            load_config(None, words)
        assert message in str(error.value)
    with pytest.raises(ConfigError, match="task: colour; here only task: classification can be used"):
        as_classification(configure(raw))


def test_its_metrics_are_those_that_its_configuration_allows():
    assert {*get_args(schema.Metric)} == find_task(Config()).metrics.keys()


def test_without_the_key_it_is_classification(raw):
    config = check_config({"data": {"root": "x"}}, "test")
    assert find_task(config).name == as_classification(config).task == "classification"
    assert config.to_dict()["task"] == "classification"


@pytest.mark.slow
def test_checkpoints_of_other_tasks_are_told_apart(raw_config, raw, tmp_path):
    train(configure(raw_config, schedule__epochs=1, schedule__warmup_epochs=0, schedule__cooldown_epochs=0), tmp_path)
    best = tmp_path / "checkpoints" / "best.pt"
    content = torch.load(best)
    assert len(content["per_class"]) == 4
    with pytest.raises(ConfigError, match="is of the task classification, not colour; choose another --output"):
        train(configure(raw), tmp_path)
    best.with_name("best.pt.sha256").unlink()
    content["config"]["task"] = "pose"
    torch.save(content, best)
    with pytest.raises(CheckpointError, match=f"'pose', and this version knows {TASKS}"):
        read_training_checkpoint(best)
    del content["config"]["task"]  # as before there were tasks
    torch.save(content, best)
    assert read_training_checkpoint(best)["best_metric"] == content["best_metric"]
    torch.save(content | {"history": [[1, 2.0]]}, best)
    with pytest.raises(CheckpointError, match="history not as it is written here"):
        read_training_checkpoint(best)
