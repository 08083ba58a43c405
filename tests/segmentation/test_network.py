"""Heads on any backbone, for images of any size, with the backbone's layer groups and frozen parts."""

from __future__ import annotations

import sys

import pytest
import torch
from timm.optim import create_optimizer_v2

from conv2former import ConfigError
from conv2former.config import check_config
from conv2former.tasks.segmentation.config import SegmentationConfig
from conv2former.tasks.segmentation.network import build_network
from conv2former.tasks.segmentation.task import Segmentation

from .conftest import SHAPE

HEADS = ("upernet", "fpn", "deeplabv3plus", "segformer")


def configured(head: str | dict = "fpn", **model) -> SegmentationConfig:
    head = head if isinstance(head, dict) else {"name": head, "channels": 64}
    own = {"variant": {"name": "conv2former_test", **SHAPE}, "head": head}
    found = check_config({"task": "segmentation", "data": {"root": "x"}, "model": {**own, **model}}, "test")
    assert isinstance(found, SegmentationConfig)
    return found


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("stem_stride", [4, 2])
def test_every_head_answers_at_the_size_of_the_images(head, stem_stride):
    """Shapes at odd sizes, finite gradients of every weight, and the same answer whatever else is in a batch."""
    variant = {"name": "conv2former_test", "stem_stride": stem_stride, **SHAPE}
    model = build_network(configured(head, variant=variant), 5)
    images = torch.randn(2, 3, 45, 71)
    logits, auxiliary = model(images)
    assert logits.shape == auxiliary.shape == (2, 5, 45, 71)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model.eval()
    with torch.inference_mode():
        for size in ((1, 200), (33, 32), (7, 5)):
            one = torch.randn(1, 3, *size)
            assert model(one).shape == (1, 5, *size)
        both = model(images)
        torch.testing.assert_close(model(images[1:]), both[1:], rtol=1e-4, atol=1e-5)
        filled = torch.nn.functional.pad(images, (0, -71 % model.stride, 0, -45 % model.stride))
        torch.testing.assert_close(model(filled)[..., :45, :71], both)  # pixel for pixel
    assert both.dtype == torch.float32


def test_an_image_of_one_row():
    with torch.inference_mode():
        model = build_network(configured("upernet"), 5).eval()
        assert model(torch.randn(1, 3, 1, 4000)).shape == (1, 5, 1, 4000)


def test_the_head_is_above_the_backbones_layer_groups():
    config = configured()
    model = build_network(config, 5)
    groups = create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert set(scales) == set(names.values())
    head = {scale for name, scale in scales.items() if not name.startswith("backbone.")}
    assert head == {1.0}
    stem, last = scales["backbone.stem.conv1.weight"], scales["backbone.stages.3.blocks.0.mlp.fc1.weight"]
    assert stem < scales["backbone.stages.1.blocks.0.mlp.fc1.weight"] < last == 0.5
    assert stem == 0.5 ** (len(set(scales.values())) - 1)


@pytest.mark.parametrize("until", ["nothing", "stage2", "backbone"])
def test_freezing_keeps_a_part_of_the_backbone(until):
    model = build_network(configured(), 5)
    model.train()
    Segmentation().freeze(model, until)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("backbone.stages.3") for name in trained) == (until != "backbone")
    assert any(name.startswith("backbone.stem") for name in trained) == (until == "nothing")
    assert {"head.classifier.weight", "auxiliary.0.weight"} <= trained
    assert model.backbone.stem.training == (until == "nothing")
    assert model.head.training


def test_without_an_auxiliary_head_there_is_one_answer():
    model = build_network(configured({"name": "fpn", "channels": 64, "auxiliary": 0}), 2)
    assert model.auxiliary is None
    assert len(model(torch.randn(2, 3, 32, 32))) == 1


def test_other_backbones_of_timm():
    """Any that gives four maps; others are refused by name."""
    head = {"name": "upernet", "channels": 16}
    model = build_network(configured(name="timm/resnet10t", variant=None, head=head), 4)
    assert model(torch.randn(2, 3, 40, 40))[0].shape == (2, 4, 40, 40)
    scales = {group["lr_scale"] for group in create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5).param_groups}
    assert len(scales) > 4
    Segmentation().freeze(model, "backbone")
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    with pytest.raises(ConfigError, match=r"model\.name: timm/vit_.* has no four maps of an image"):
        args = {"depth": 1, "embed_dim": 16, "num_heads": 1}
        build_network(configured(name="timm/vit_tiny_patch16_224", variant=None, args=args, head=head), 4)


def test_starting_weights_are_a_classifiers(official_file, caplog):
    """Of the authors' layout, without its classifier; a dilated last stage has the same weights."""
    given = {"variant": None, "name": "auto", "checkpoint": str(official_file)}
    plain, dilated = (build_network(configured(head, **given), 4).backbone for head in ("fpn", "deeplabv3plus"))
    content = torch.load(official_file, weights_only=False)
    weights = content.get("state_dict", content)
    first = next(value for value in weights.values() if value.ndim == 4 and value.shape[1] == 3)
    torch.testing.assert_close(plain.stem.conv1.weight, first)
    assert plain.feature_info[3]["reduction"] == 32
    assert dilated.feature_info[3]["reduction"] == 16
    assert all(value.equal(plain.state_dict()[name]) for name, value in dilated.state_dict().items())
    assert "classes: it is left out; all other weights are loaded" in caplog.text


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ConfigError, match=r'needs segmentation-models-pytorch, .* pip install "conv2former\[dense\]"'):
        Segmentation().check(configured())
