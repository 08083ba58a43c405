"""Weights without a head, as self-supervised training and feature extractors leave them."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch

import conv2former
from conv2former import CheckpointError
from conv2former.weights.contents import native_state_dict

from ..weights.test_weights import birder_state_dict

HEADS = {
    "native": {"classifier": ("head.fc.",), "head": ("head.fc.", "head_conv.")},
    "authors": {"classifier": ("pred.",), "head": ("pred.", "head.")},
    "birder": {"classifier": ("classifier.",), "head": ("classifier.", "features.")},
}
CASES = [(layout, lacks) for layout in HEADS for lacks in ("classifier", "head")]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def whole(official_file):
    return conv2former.load_model(official_file)[0]


@pytest.fixture
def headless(tmp_path, official_content):
    """Writes a file in some layout without its classifier, or without its whole head."""

    def write(layout: str, lacks: str):
        state = dict(official_content["state_dict"])
        state = {"authors": dict, "birder": birder_state_dict, "native": native_state_dict}[layout](state)
        content = {key: tensor for key, tensor in state.items() if not key.startswith(HEADS[layout][lacks])}
        torch.save({"state_dict": content}, tmp_path / "backbone.pth")
        return tmp_path / "backbone.pth"

    return write


def last(model, images) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval().forward_features(images)


def maps(model, images) -> list[torch.Tensor]:
    with torch.inference_mode():
        found = model.eval()(images)
    return list(found.values()) if isinstance(found, dict) else found


@pytest.mark.parametrize(("layout", "lacks"), CASES)
def test_a_classifier_gets_a_head_of_its_own(tiny, headless, whole, images, caplog, layout, lacks):
    path = headless(layout, lacks)
    overlay = {"file": str(path)}
    torch.manual_seed(0)
    fresh = timm.create_model(tiny, num_classes=3)
    for i, make in enumerate(
        (
            lambda: timm.create_model(tiny, num_classes=3, checkpoint_path=path),
            lambda: timm.create_model(tiny, num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay),
        )
    ):
        torch.manual_seed(0)
        model = make().eval()
        assert torch.equal(last(model, images), last(whole, images))
        assert torch.equal(model.head.fc.weight, fresh.head.fc.weight)
        is_fresh = torch.equal(model.head_conv.conv.weight, fresh.head_conv.conv.weight)
        assert is_fresh == (lacks == "head")
        text = caplog.records[i].getMessage()
        assert f"the checkpoint has no {lacks}: the model keeps its own" in text
        assert text.count("3 classes") == 1
    assert len(caplog.records) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "lacks"), CASES)
def test_a_feature_extractor_needs_none(tiny, headless, whole, images, caplog, layout, lacks):
    path = headless(layout, lacks)
    with torch.inference_mode():
        expected = whole.forward_intermediates(images, intermediates_only=True)
    overlay = {"file": str(path)}
    for model in (
        timm.create_model(tiny, features_only=True, checkpoint_path=path),
        timm.create_model(tiny, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay),
    ):
        assert all(torch.equal(a, b) for a, b in zip(maps(model, images), expected, strict=True))
    two = timm.create_model(tiny, features_only=True, out_indices=(0, 2), checkpoint_path=path)
    assert torch.equal(maps(two, images)[1], expected[2])
    assert not caplog.records


def test_a_feature_extractor_loads_a_whole_network(tiny, official_file, official_content, whole, images, caplog):
    expected = last(whole, images)
    model = timm.create_model(tiny, features_only=True, checkpoint_path=official_file)
    assert torch.equal(maps(model, images)[-1], expected)
    model = timm.create_model(tiny, features_only=True)
    model.load_state_dict({"model_state_dict": official_content["state_dict"]})
    assert torch.equal(maps(model, images)[-1], expected)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["list", "dict", "hook", "getter"])
def test_what_a_feature_extractor_saves(tiny, tmp_path, official_content, whole, images, kind):
    """It goes back into one, and into a classifier with a fresh head; the extractor can be copied and pickled."""
    model = timm.create_model(tiny, features_only=True, feature_cls=kind)
    model.load_state_dict(official_content["state_dict"])
    torch.save(model.state_dict(), tmp_path / "features.pt")
    expected = last(whole, images)
    again = timm.create_model(tiny, features_only=True, feature_cls=kind, checkpoint_path=tmp_path / "features.pt")
    plain = timm.create_model(tiny, features_only=True, checkpoint_path=tmp_path / "features.pt")
    for each in (again, plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert torch.equal(maps(each, images)[-1], expected)
        each.load_state_dict(each.state_dict())
    classifier = timm.create_model(tiny, num_classes=3, checkpoint_path=tmp_path / "features.pt").eval()
    assert torch.equal(last(classifier, images), expected)
    info = conv2former.inspect_checkpoint(tmp_path / "features.pt")
    assert (info.num_classes, info.has_head) == (0, False)
    assert conv2former.variant(info.name).dims == conv2former.variant(tiny).dims


def test_a_feature_extractor_in_a_bigger_model(tiny, official_content, whole, images):
    class Detector(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model(tiny, features_only=True)
            self.neck = torch.nn.Linear(2, 2)

    detector = Detector()
    neck = {f"neck.{key}": tensor for key, tensor in detector.neck.state_dict().items()}
    detector.load_state_dict({f"backbone.{k}": v for k, v in official_content["state_dict"].items()} | neck)
    assert torch.equal(maps(detector.backbone, images)[-1], last(whole, images))
    detector.load_state_dict(detector.state_dict())


@pytest.mark.parametrize("features_only", [False, True])
def test_whatever_else_is_missing_is_an_error_that_lists_it(tiny, official_content, features_only):
    state = {k: v for k, v in official_content["state_dict"].items() if not k.startswith(("pred.", "head."))}
    model = timm.create_model(tiny, features_only=features_only)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"missing keys: stages[._]1\.blocks\.0\.mlp\.fc1\.bias$"):
        model.load_state_dict({k: v for k, v in state.items() if k != "stages.1.0.mlp.fc1.bias"})
    with pytest.raises(CheckpointError, match=r"unexpected keys: extra$"):
        model.load_state_dict({**state, "extra": torch.zeros(1)})
    if not features_only:
        half = {k: v for k, v in official_content["state_dict"].items() if k != "head.0.bias"}
        with pytest.raises(CheckpointError, match=r"missing keys: head_conv\.conv\.bias$"):
            model.load_state_dict(half)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(("lacks", "channels"), [("classifier", 1280), ("head", 32)])
def test_the_network_of_the_file_gives_pooled_features(headless, whole, images, lacks, channels):
    path = headless("authors", lacks)
    model, info = conv2former.load_model(path)
    assert torch.equal(last(model, images), last(whole, images))
    assert model(images).shape == (1, channels)
    assert f"no {lacks}" in str(info)
