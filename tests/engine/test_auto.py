"""Runs with keys that are `auto`: what is printed and recorded, and how such a run goes on."""

from __future__ import annotations

import pytest
import yaml

from conv2former import ConfigError
from conv2former.config import auto
from conv2former.engine import dry_run, train
from conv2former.engine.images import settle_images
from conv2former.engine.prepare import changed_keys
from conv2former.tools.runs.comparing import differing_runs

from .conftest import configure, killed_after
from .test_trainer import final

pytestmark = pytest.mark.slow

AUTO = {
    "schedule__epochs": "auto",
    "schedule__warmup_epochs": "auto",
    "optim__base_lr": "auto",
    "augment__auto_augment": "auto",
    "train__eval_every": "auto",
}


@pytest.fixture
def short(monkeypatch, raw_config):
    raw_config["model"]["fused"] = False  # there is nothing to compile
    monkeypatch.setattr(auto, "MIN_STEPS", 15)  # 5 steps of 8 images an epoch
    monkeypatch.setattr(auto, "MIN_EPOCHS", 2)


def test_a_run_with_auto(raw_config, tmp_path, monkeypatch, capsys, short):
    """Killed, and continued by a version with another table: it ends as if nothing had been."""
    config = configure(raw_config, **AUTO, schedule__cooldown_epochs=0, checkpoint__every_steps=1)
    assert train(config, tmp_path / "whole")["steps"] == 15
    line = "auto, by 44 training images and 5 steps in an epoch: "
    assert line in capsys.readouterr().out
    noted = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert noted["schedule"]["epochs"] == 3
    assert "auto" not in {noted[key.split("__")[0]][key.split("__")[1]] for key in AUTO}
    assert noted == final(tmp_path / "whole")["config"]
    assert set(noted["train"]["fitted"]) == {key.replace("__", ".") for key in AUTO}

    with killed_after(7):
        train(config, tmp_path / "parts")
    monkeypatch.setattr(auto, "MIN_STEPS", 40)
    assert train(config, tmp_path / "parts")["steps"] == 15
    assert differing_runs(tmp_path / "whole", tmp_path / "parts") == []
    # a study asks whether a run is that of its configuration
    assert changed_keys(noted, settle_images(config)[0].to_dict()) == []
    given = configure(raw_config, **{**AUTO, "optim__base_lr": 1e-5}, schedule__cooldown_epochs=0)
    assert [text.partition(":")[0] for text in changed_keys(noted, settle_images(given)[0].to_dict())] == [
        "optim.base_lr"
    ]

    # a trial of fewer epochs was another run
    trial = configure(raw_config, **{**AUTO, "schedule__epochs": 1}, schedule__cooldown_epochs=0)
    train(trial, tmp_path / "trial")
    with pytest.raises(ConfigError, match="started with another configuration") as error:
        train(config, tmp_path / "trial")
    assert "schedule.epochs: 1 -> 8" in str(error.value)


def test_dry_run_with_auto(raw_config, short):
    config = configure(raw_config, **AUTO, schedule__cooldown_epochs=0)
    lines = dry_run(config)
    assert lines[1].startswith("auto, by 44 training images and 5 steps in an epoch: ")
    assert any(text.startswith("3 epochs (1 warm-up, 0 cool-down) of 5 steps") for text in lines)
    blind = dry_run(configure(raw_config, **AUTO, schedule__cooldown_epochs=0, data__num_classes=3))
    assert blind[1].startswith("auto, of a large training set, as the images were not counted: ")
    assert "2 epochs; the number of steps follows from the data" in blind
