"""From a weight file alone to its network."""

from __future__ import annotations

import argparse
import json

import pytest
import safetensors.torch
import timm
import torch

import conv2former
from conv2former import CheckpointError, Conv2Former, Preprocessing
from conv2former.models import restore
from conv2former.models.ablations import FUSIONS

from ..conftest import TINY_YAML, Fixture
from ..weights.test_weights import birder_state_dict

HALF = (0.5, 0.5, 0.5)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(Fixture("official_format_expected")["input"])


def test_the_authors_file(official_file):
    model, info = conv2former.load_model(official_file)
    assert not model.training
    assert torch.allclose(logits(model), Fixture("official_format_expected")["logits"], rtol=1e-4, atol=1e-5)
    assert (info.layout, info.num_classes, info.metric, info.epoch) == ("authors", 10, 50.0, 0)
    assert (info.preprocessing, info.preprocessing_noted) == (Preprocessing(), ())
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 224, 224)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["birder", "native", "safetensors", "hub", "local-dir"])
def test_every_layout_gives_the_same_network(tmp_path, official_file, official_content, kind):
    expected, _ = conv2former.load_model(official_file)
    path: object = tmp_path / "x.pt"
    if kind == "birder":
        torch.save({"state": birder_state_dict(official_content["state_dict"])}, path)
    elif kind == "native":
        torch.save({"model": expected.state_dict()}, path)
    elif kind == "safetensors":
        path = tmp_path / "x.safetensors"
        safetensors.torch.save_file(expected.state_dict(), path)
    else:
        safetensors.torch.save_file(expected.state_dict(), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "conv2former_t", "num_classes": 10}))
        path = f"local-dir:{tmp_path}" if kind == "local-dir" else tmp_path
    model, info = conv2former.load_model(path)
    assert torch.equal(logits(model), logits(expected))
    assert info.layout == ("birder" if kind == "birder" else "conv2former")


def test_what_a_checkpoint_of_this_project_notes(tmp_path):
    variant = {"name": "my_sum", "dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "kernel_size": 3, "fusion": "sum"}
    model = Conv2Former(num_classes=3, **{key: value for key, value in variant.items() if key != "name"}).eval()
    data = Preprocessing(64, HALF, HALF, "bilinear", 0.9).to_dict()
    averaged = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    torch.save(
        {
            "model": model.state_dict(), "model_ema": averaged, "variant": variant, "config": {"data": data},
            "class_names": ["a", "b", "c"], "metric": 90.0, "epoch": 4,
        },
        tmp_path / "x.pt",
    )  # fmt: skip
    raw, info = conv2former.load_model(tmp_path / "x.pt", use_ema=False)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(raw(images), model(images))
        assert not torch.equal(conv2former.load_model(tmp_path / "x.pt")[0](images), model(images))
    assert (info.name, info.fusion, info.class_names, info.has_ema) == ("my_sum", "sum", ["a", "b", "c"], True)
    assert info.preprocessing == Preprocessing(64, HALF, HALF, "bilinear", 0.9)
    assert len(info.preprocessing_noted) == 6
    config = timm.data.resolve_model_data_config(raw)
    assert (config["input_size"], config["mean"], config["crop_pct"]) == ((3, 64, 64), [0.5] * 3, 0.9)


@pytest.mark.parametrize("untold", [{"stem_stride": 2}, *({"fusion": fusion} for fusion in FUSIONS)], ids=str)
def test_what_the_tensors_do_not_tell_is_that_of_the_file(tmp_path, untold):
    shape = {"dims": [4, 6, 8, 10], "depths": [1, 1, 1, 1], "kernel_size": 3, **untold}
    model = Conv2Former(num_classes=2, **shape).eval()
    torch.save({"model": model.state_dict(), "variant": {"name": "x", **shape}}, tmp_path / "x.pt")
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(conv2former.load_model(tmp_path / "x.pt")[0](images), model(images))


def test_grey_images_and_layer_scale(tmp_path):
    args = {"dims": (4, 6, 8, 10), "depths": (1, 1, 1, 1), "kernel_size": (3, 5, 7, 9), "head_hidden_size": 12}
    model = Conv2Former(in_chans=1, num_classes=2, ls_init_value=None, mlp_ratio=2, **args).eval()
    torch.save(model.state_dict(), tmp_path / "x.pt")
    again, info = conv2former.load_model(tmp_path / "x.pt")
    assert (info.in_chans, info.layer_scale, info.mlp_ratio, info.kernel_size) == (1, False, 2, (3, 5, 7, 9))
    assert again.pretrained_cfg["input_size"] == (1, 224, 224)
    images = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))


def test_another_network_than_expected(tmp_path, tiny, official_file):
    path = tmp_path / "five.yaml"
    path.write_text(TINY_YAML.replace("7", "5"))
    assert conv2former.load_model(official_file, expect=tiny)[1].num_classes == 10
    with pytest.raises(CheckpointError, match=r"official_format\.pth\.tar is not five but .*: kernel_size 7 for 5$"):
        conv2former.load_model(official_file, expect=path)
    with pytest.raises(CheckpointError, match=r"is not conv2former_t but .*: dims \[8, 16, 24, 32\] for \[72, "):
        conv2former.load_model(official_file, expect="conv2former_t")
    path.write_text(TINY_YAML.replace("7", "[7, 7, 7, 7]") + "ls_init_value: null\n")
    with pytest.raises(CheckpointError, match=r": with layer scale$"):  # four equal kernels are one
        conv2former.load_model(official_file, expect=path)
    with pytest.raises(conv2former.ConfigError, match="did you mean 'conv2former_t'"):
        conv2former.load_model(official_file, expect="conv2former_tt")


def test_parts_and_contradictions(tmp_path, official_content):
    state_dict = official_content["state_dict"]
    torch.save({k: v for k, v in state_dict.items() if not k.startswith("head.")}, tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match=r"part\.pt holds a part of a network"):
        conv2former.load_model(tmp_path / "part.pt")
    args = argparse.Namespace(lr=1)
    torch.save({"state_dict": state_dict, "class_names": ["a", "b"], "args": args}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"two\.pt names 2 classes, and its classifier has 10"):
        conv2former.load_model(tmp_path / "two.pt")
    torch.save({k: v for k, v in state_dict.items() if "1.0.mlp" not in k}, tmp_path / "hole.pt")
    with pytest.raises(CheckpointError, match=r"hole\.pt: the checkpoint does not fit the model:\n  missing keys"):
        conv2former.load_model(tmp_path / "hole.pt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "holds a list, not a timm model's configuration"),
        ("\xff", "not readable"),
    ],
)
def test_a_folder_with_a_broken_configuration(tmp_path, official_file, text, expected):
    model, _ = conv2former.load_model(official_file)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"config\.json.*{expected}"):
        conv2former.load_model(tmp_path)


def test_a_file_for_which_memory_does_not_suffice(official_file, monkeypatch):
    """That is said of the file: no batch has been made yet."""

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: 8 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(restore, "Conv2Former", full)
        with pytest.raises(CheckpointError, match=r"the network in .* needs more memory than there is"):
            conv2former.load_model(official_file)
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(CheckpointError, match="claims more memory than this machine has"):
        conv2former.load_model(official_file)
