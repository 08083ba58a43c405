"""The weights that are part of the package: they load as they are, anywhere, and say where they come from."""

from __future__ import annotations

import logging

import pytest
import timm
import torch

import conv2former
from conv2former.variants import read_variant
from conv2former.weights.installed import list_shipped

from ..conftest import ROOT

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# Logits of `picture()`, as scripts/predict.py and scripts/validate.py computed them when the accuracy was measured.
LOGITS = {
    "conv2former_cifar10": [2.1327, -1.1852, 2.4994, 2.1798, -1.8926, 0.6904, -0.1786, -2.3297, -1.2231, -0.9312],
    "conv2former_cifar10_ln": [0.3625, -1.1902, 1.6268, 3.0485, -0.8922, 0.3282, 0.1446, -1.2429, -0.7995, -1.2686],
}


@pytest.fixture(autouse=True)
def empty_store(tmp_path, monkeypatch):
    monkeypatch.setenv("CONV2FORMER_HOME", str(tmp_path / "nothing"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def picture() -> torch.Tensor:
    """Returns waves of three colours, (1, 3, 32, 32), normalised."""
    steps = torch.arange(32.0)
    waves = [(steps[:, None] / (3 + k)).sin() + (steps[None] / (5 - k)).cos() for k in range(3)]
    return torch.stack(waves)[None]


def test_what_they_are():
    shipped = list_shipped(verify=True)
    assert [found.name for found in shipped] == [f"{name}.cifar10" for name in LOGITS]
    for found in shipped:
        assert (found.problem, found.is_unverified) == ("", False)
        assert found.weights.stat().st_size < 4e6
        cfg = found.pretrained_cfg()
        assert (cfg["label_names"], cfg["input_size"], cfg["license"]) == (CLASSES, (3, 32, 32), "apache-2.0")
        assert found.config["architecture"] == found.variant
        recipe = found.config["conv2former"]["recipe"]
        assert recipe["data"]["root"] == "data/cifar10"
        card = (found.path / "README.md").read_text()
        assert f"{found.metric:.2f} % of the 10,000 validation photos" in card
        assert f"{found.metric:.2f} %" in cfg["description"]
        assert found.sha256 in card
        # the network of the recipes, so that a run of theirs and these weights can be compared
        own = read_variant(ROOT / "configs" / "variants" / f"{found.variant}.yaml")
        assert conv2former.variant(found.variant).model_args() == own.model_args()


@pytest.mark.parametrize("name", LOGITS)
def test_they_load_and_compute_what_was_measured(name, caplog):
    with caplog.at_level(logging.WARNING):
        model = timm.create_model(name, pretrained=True).eval()
    assert not caplog.records
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.inference_mode():
        logits = model(picture())[0]
    assert torch.allclose(logits, torch.tensor(LOGITS[name]), atol=1e-3)
    again, info = conv2former.load_model(name)
    assert info.class_names == CLASSES
    with torch.inference_mode():
        assert torch.equal(again.eval()(picture())[0], logits)


@pytest.mark.parametrize(("name", "first"), [("conv2former_cifar10", 64), ("conv2former_cifar10_ln", 32)])
def test_for_other_classes_and_as_a_backbone(name, first):
    assert timm.create_model(name, pretrained=True, num_classes=3).num_classes == 3
    maps = timm.create_model(name, pretrained=True, features_only=True)(torch.zeros(1, 3, 64, 64))
    assert [tuple(each.shape[1:]) for each in maps] == [(first, 32, 32), (64, 16, 16), (128, 8, 8), (160, 4, 4)]
