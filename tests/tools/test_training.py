"""Training from Python: `conv2former.train`."""

from __future__ import annotations

import importlib
import inspect
import json
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import conv2former
from conv2former import ConfigError
from conv2former._yaml import dump_yaml
from conv2former.config import check_config, load_config, override_config
from conv2former.engine import logging

from ..engine.conftest import raw_config, small_data, without_pictures  # noqa: F401

FILE = "data: {root: x}\noptim: {base_lr: 0.5, opt: sgd}\n"


def test_overrides_from_python(tmp_path):
    """As from the command line, which win over the file; dotted or nested, plain values of any kind."""
    file = tmp_path / "run.yaml"
    file.write_text(FILE)
    words = ["optim.base_lr=2e-3", "augment.scale=[0.5,1.0]", "data.root=photos", "train.early_stop.patience=3"]
    expected = load_config(file, words)
    dotted = {
        "optim.base_lr": np.float64(2e-3),
        "augment.scale": (0.5, np.float64(1.0)),
        "data.root": Path("photos"),
        "train.early_stop.patience": np.int64(3),
    }
    nested = {
        "optim": {"base_lr": 2e-3},
        "augment": {"scale": [0.5, 1.0]},
        "data.root": "photos",
        "train": {"early_stop": {"patience": 3}},
    }
    assert load_config(file, dotted) == load_config(file, nested) == expected
    assert expected.optim.opt == "sgd"
    assert override_config({"data": {"root": "x"}, "optim": {"base_lr": 0.5, "opt": "sgd"}}, nested) == expected
    assert override_config(load_config(file), nested) == expected
    assert load_config(file, {}) == load_config(file)
    assert load_config(file, {"optim": {}}) == load_config(file)
    shape = {"model.variant": {"name": "mine", "dims": (np.int64(8), 16, 24, 40), "depths": (1, 1, 2, 1)}}
    assert load_config(file, shape).model.variant == {"name": "mine", "dims": [8, 16, 24, 40], "depths": [1, 1, 2, 1]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim.base_rl": 1}, "optim.base_rl: unknown key (did you mean 'base_lr'?)"),
        ({"optim": {"base_rl": 1}}, "optim.base_rl: unknown key (did you mean 'base_lr'?)"),
        ({"lr": 1}, "lr: unknown key (did you mean 'optim.base_lr'?)"),
        ({"optim.base_lr": object()}, "optim.base_lr: input should be a valid number, or 'auto', found <object"),
        ({"optim.base_lr": np.zeros(2)}, "optim.base_lr: input should be a valid number"),
        ({"optim..base_lr": 1}, "'optim..base_lr': not a key"),
        ({3: 1}, "3: unknown key"),
        ({"optim.base_lr.x": 1}, "optim.base_lr.x: 'base_lr' is not a section"),
    ],
)
def test_mistakes(tmp_path, overrides, message):
    file = tmp_path / "run.yaml"
    file.write_text(FILE)
    with pytest.raises(ConfigError) as error:
        conv2former.train(file, overrides)
    assert message in str(error.value)
    with pytest.raises(ConfigError, match="no such file"):
        conv2former.train(tmp_path / "none.yaml")


@pytest.mark.slow
def test_twice_in_a_row(raw_config, tmp_path, monkeypatch):  # noqa: F811
    """The report, the run folder's name, and nothing that is left behind in the process."""
    monkeypatch.chdir(tmp_path)
    Path("oaks").mkdir()
    Path("oaks/hf.yaml").write_text(dump_yaml(raw_config))  # a file that only says what the data is
    short = {"schedule": {"epochs": 1, "cooldown_epochs": 0, "warmup_epochs": 0}, "train.batch_size": 22}
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)], threading.excepthook
    report = conv2former.train("oaks/hf.yaml", {**short, "log.tensorboard": True})
    assert (report["folder"], report["checkpoint"]) == ("runs/oaks_hf", "runs/oaks_hf/checkpoints/best.pt")
    assert report == json.loads(Path("runs/oaks_hf/report.json").read_text())
    assert {"top1", "loss", "macro_f1", "balanced_accuracy", "epoch", "classes"} <= report.keys()
    assert [row["class"] for row in report["classes"]] == ["a", "b", "c"]
    assert ([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)], threading.excepthook) == before
    assert not [thread for thread in threading.enumerate() if "tensorboard" in type(thread).__module__]
    again = conv2former.train(check_config(raw_config, "x").to_dict(), short, output=Path("second"))
    assert again["folder"] == "second"
    assert again["top1"] == report["top1"]
    rows = [logging.read_metrics(Path(run) / "metrics.jsonl") for run in ("runs/oaks_hf", "second")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    with pytest.raises(ConfigError, match="holds a run"):
        conv2former.train("oaks/hf.yaml", short, resume="never")


def test_the_file_of_that_name_does_not_hide_it(monkeypatch):
    """Importing a file puts it into its package under its name, and there it must not be."""
    function = conv2former.train
    monkeypatch.delitem(sys.modules, "conv2former.train", raising=False)
    assert importlib.import_module("conv2former.train") is function
    assert conv2former.train is function
    assert list(inspect.signature(function).parameters) == ["config", "overrides", "output", "resume"]
