"""Which network is taken from what others' training scripts save, and what is said about it."""

from __future__ import annotations

import logging

import pytest
import safetensors.torch
import timm
import torch

import conv2former
from conv2former import CheckpointError
from conv2former.weights import contents
from conv2former.weights.contents import native_state_dict

from .test_weights import birder_state_dict


@pytest.fixture(autouse=True)
def anew():
    """What is said once is said anew in each test."""
    contents._warn_once.cache_clear()


@pytest.fixture
def states(official_content) -> dict[str, dict[str, torch.Tensor]]:
    """The same network in three layouts, and `other`, another one."""
    authors = dict(official_content["state_dict"])
    other = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in authors.items()}
    native = native_state_dict(authors)
    return {"authors": authors, "birder": birder_state_dict(authors), "native": native, "other": other}


def below(prefix: str, state_dict: dict) -> dict:
    return {prefix + key: tensor for key, tensor in state_dict.items()}


def is_network(model, state_dict: dict) -> bool:
    own, theirs = model.state_dict(), native_state_dict(state_dict)
    return own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["authors", "birder", "native"])
@pytest.mark.parametrize(
    "prefix", ["model.", "module.", "_orig_mod.", "backbone.", "encoder.", "net.", "model._orig_mod.", "a.b.c."]
)
def test_a_common_prefix_is_taken_off_and_said_once(tiny, tmp_path, caplog, states, layout, prefix):
    """In every layout, through every route."""
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": below(prefix, states[layout]), "epoch": 3, "pytorch-lightning_version": "2"}, path)
    model, info = conv2former.load_model(path)
    assert is_network(model, states["authors"])
    conv2former.load_weights(timm.create_model(tiny, num_classes=10), path)
    (text,) = said(caplog)
    plain = prefix.replace("_orig_mod.", "")
    assert f"x.ckpt: the names have '{plain or prefix}'" in text
    assert ("'_orig_mod.'" in text) == ("_orig_mod" in prefix)
    assert (info.layout, info.epoch) == ("conv2former" if layout == "native" else layout, 3)
    assert is_network(timm.create_model(tiny, num_classes=10, checkpoint_path=path), states["authors"])
    assert is_network(
        timm.create_model(tiny, num_classes=10, pretrained=True, pretrained_cfg_overlay={"file": str(path)}),
        states["authors"],
    )


@pytest.mark.parametrize(
    ("key", "is_said"),
    [
        ("state_dict", False), ("model_state_dict", False), ("model", False), ("net", False), ("module", False),
        ("state", False), ("teacher", True), ("my_network", True), ("checkpoint.model", True),
    ],
)  # fmt: skip
def test_whatever_the_state_dict_is_called(tiny, tmp_path, caplog, states, key, is_said):
    content = states["authors"]
    for word in reversed(key.split(".")):
        content = {word: content}
    torch.save(
        {**content, "optimizer": {"state": {0: {"step": torch.zeros(1)}}, "param_groups": [{"lr": 1}]}},
        tmp_path / "x.pt",
    )
    model, _ = conv2former.load_model(tmp_path / "x.pt")
    assert is_network(model, states["authors"])
    assert any(f"'{key}' is taken" in text for text in said(caplog)) == is_said
    again = timm.create_model(tiny, num_classes=10, checkpoint_path=tmp_path / "x.pt")
    assert is_network(again, states["authors"])


def test_what_is_beside_the_network_is_left_out_and_said(tmp_path, caplog, states):
    content = below("model.", states["native"]) | {"criterion.weight": torch.ones(10), "metric.total": torch.zeros(())}
    torch.save({"state_dict": content}, tmp_path / "x.ckpt")
    assert is_network(conv2former.load_model(tmp_path / "x.ckpt")[0], states["native"])
    (text,) = said(caplog)
    assert text.endswith("'model.' before them, which is taken off; left out: criterion.weight, metric.total")


def test_safetensors_and_lower_precision(tmp_path, states):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state = {key: t.to(dtype) if t.is_floating_point() else t for key, t in states["native"].items()}
        safetensors.torch.save_file(below("module.", state), tmp_path / "x.safetensors")
        model, _ = conv2former.load_model(tmp_path / "x.safetensors")
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.int64}
        torch.testing.assert_close(model.state_dict()["head.fc.weight"], state["head.fc.weight"].float())


@pytest.mark.parametrize(
    ("names", "prefix"),
    [(("student", "teacher"), ""), (("student", "teacher"), "backbone."), (("one", "two"), "module.")],
)
def test_several_networks_are_not_guessed_at(tiny, tmp_path, states, names, prefix):
    """A dict for each, and all in one dict."""
    content = {name: below(prefix, states[key]) for name, key in zip(names, ("authors", "other"), strict=True)}
    one = {"state_dict": below(f"{names[0]}.", states["authors"]) | below(f"{names[1]}.", states["other"])}
    expected = rf"x\.pt: it holds 2 networks, '{names[0]}\.?', '{names[1]}\.?', .*torch\.save\("
    for each in (content, one):
        torch.save(each, tmp_path / "x.pt")
        for read in (conv2former.load_model, conv2former.inspect_checkpoint):
            with pytest.raises(CheckpointError, match=expected):
                read(tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=expected):
            conv2former.load_weights(timm.create_model(tiny, num_classes=10), tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("taken", "left"), [("model", "teacher"), ("state_dict", "model"), ("net", "discriminator"), ("backbone", "target")]
)
def test_the_usual_name_is_taken_and_said(tmp_path, caplog, states, taken, left):
    torch.save({left: states["other"], taken: states["authors"]}, tmp_path / "x.pt")
    assert is_network(conv2former.load_model(tmp_path / "x.pt")[0], states["authors"])
    assert said(caplog) == [f"{tmp_path}/x.pt: '{taken}' is taken, not '{left}'"]


@pytest.mark.parametrize(
    "content",
    [
        lambda raw, average: {"state_dict": below("model.", raw) | below("ema_model.module.", average)},
        lambda raw, average: {"model": raw, "ema": average},
        lambda raw, average: {"model": raw, "ema": below("module.", average) | {"ema.updates": torch.zeros(1)}},
        lambda raw, average: {"model_state_dict": raw, "ema_state_dict": average},
    ],
)
def test_averaged_weights_under_other_names(tmp_path, states, content):
    torch.save(content(states["other"], states["authors"]), tmp_path / "x.pt")
    model, info = conv2former.load_model(tmp_path / "x.pt")
    assert is_network(model, states["authors"])
    assert (info.has_ema, info.weights(), info.weights(False)) == (True, "average", "raw")
    assert is_network(conv2former.load_model(tmp_path / "x.pt", use_ema=False)[0], states["other"])


def test_averaged_weights_alone(tmp_path, states):
    torch.save({"model_ema": states["authors"]}, tmp_path / "x.pt")
    assert conv2former.inspect_checkpoint(tmp_path / "x.pt").weights() == "average"
    with pytest.raises(CheckpointError, match=r"x\.pt: it holds averaged weights alone, 'model_ema', .*--raw"):
        conv2former.load_model(tmp_path / "x.pt", use_ema=False)


def test_one_process_says_it(tmp_path, caplog, states, monkeypatch):
    torch.save(below("model.", states["authors"]), tmp_path / "x.pt")
    monkeypatch.setenv("RANK", "1")
    conv2former.load_model(tmp_path / "x.pt")
    assert not said(caplog)


@pytest.mark.parametrize(
    ("content", "kind", "text"),
    [
        (lambda s: s, "not noted", "layout: authors, weights\n"),
        (lambda s: {"state_dict": s}, "not noted", "weights\n"),
        (lambda s: {"model": s, "model_ema": None}, "raw", "raw weights\n"),
        (lambda s: {"state_dict": s, "optimizer": {}}, "raw", "raw weights\n"),
        (lambda s: {"state_dict": s, "args": {"model_ema": False}}, "raw", "raw weights\n"),
        (lambda s: {"state_dict": s, "args": {"model_ema": True}}, "not noted", "weights\n"),
        (lambda s: {"state_dict": s, "state_dict_ema": s}, "average", "averaged weights (EMA)\n"),
        (lambda s: {"model": s, "averaged_from": [{}, {}, {}]}, "soup of 3", "soup of 3 files\n"),
    ],
)
def test_the_kind_of_weights_is_what_the_file_says(tmp_path, states, content, kind, text):
    torch.save(content(states["authors"]), tmp_path / "x.pt")
    info = conv2former.inspect_checkpoint(tmp_path / "x.pt")
    assert info.weights() == kind
    assert text in str(info)


def test_a_plain_file_says_nothing(tiny, caplog, states):
    with caplog.at_level(logging.WARNING):
        timm.create_model(tiny, num_classes=10).load_state_dict(states["authors"])
    assert not said(caplog)
