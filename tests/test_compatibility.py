"""What earlier versions wrote is read: see tests/fixtures/README.md for how the files were made."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from PIL import Image

import conv2former
from conv2former import ConfigError
from conv2former.config import check_config
from conv2former.engine import train
from conv2former.engine.checkpoint import read_training_checkpoint

from .conftest import FIXTURES

EARLIER = FIXTURES / "earlier_version"
STEP = EARLIER / "step_00000002.pt"


def test_a_pickled_network():
    content = torch.load(EARLIER / "whole_network.pt", weights_only=False)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(content["model"](x), content["expected"], rtol=1e-5, atol=1e-6)
    assert type(content["model"]) is conv2former.Conv2Former


def test_a_training_checkpoint_as_weights():
    info = conv2former.inspect_checkpoint(STEP)
    assert (info.dims, info.num_classes, info.class_names) == ((2, 2, 4, 4), 2, ["a", "b"])
    model, _ = conv2former.load_model(STEP)
    content = torch.load(STEP, weights_only=True)
    assert all(torch.equal(tensor, content["model"][name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def run(tmp_path):
    """A run folder with the checkpoint, and the configuration to go on with."""
    for split, count in (("train", 4), ("val", 2)):
        for name in "ab":
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (40 * i, 90, 0)).save(tmp_path / "photos" / split / name / f"{i}.png")
    config = {
        "model": {
            "variant": yaml.safe_load((EARLIER / "conv2former_old.yaml").read_text()) | {"name": "conv2former_old"}
        },
        "data": {"source": "folder", "root": str(tmp_path / "photos"), "img_size": 32, "workers": 0},
        "train": {"batch_size": 4},
        "schedule": {"epochs": 2, "warmup_epochs": 0, "cooldown_epochs": 0},
    }
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path in (STEP, STEP.with_name(f"{STEP.name}.sha256")):
        shutil.copy(path, tmp_path / "run" / "checkpoints")
    return tmp_path / "run", check_config(config, "earlier")


@pytest.mark.slow
def test_a_run_goes_on(run):
    folder, config = run
    train(config, folder)
    assert "going on" in (folder / "train.log").read_text("utf-8")
    assert read_training_checkpoint(folder / "checkpoints" / "step_00000004.pt")["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(("section", "differs"), [("ema", False), ("data", True)])
def test_a_section_that_is_not_in_the_checkpoint_was_at_its_defaults(run, section, differs):
    folder, config = run
    content = torch.load(STEP, weights_only=True)
    del content["config"][section]
    (folder / "checkpoints" / f"{STEP.name}.sha256").unlink()
    torch.save(content, folder / "checkpoints" / STEP.name)
    if differs:
        with pytest.raises(ConfigError, match=r"another configuration(.|\n)*data\.img_size: 224 -> 32"):
            train(config, folder)
    else:
        train(config, folder)


@pytest.mark.parametrize("name", ["modulate", "modulate_backward", "mlp_mix", "mlp_mix_backward"])
def test_operators_have_their_names(name):
    assert hasattr(torch.ops.conv2former, name)
