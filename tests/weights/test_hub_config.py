"""config.json of timm's hub layout: what is wrong is one sentence, and nothing is replaced in silence."""

from __future__ import annotations

import json
import re

import pytest
import safetensors.torch

import conv2former
from conv2former import CheckpointError, Conv2Former
from conv2former.weights import hub_config

WRONG = [
    ("input_size", [3, 0, 0]),
    ("std", 0),
    ("std", [0, 0, 0]),
    ("mean", True),
    ("mean", [float("nan")] * 3),
    ("crop_pct", 10**30),
    ("interpolation", "nearest"),
    ("num_classes", -1),
    ("num_classes", True),
    ("num_classes", 1e400),
    ("num_classes", 10**9),
    ("label_names", "cat"),
    ("label_names", [["cat"]]),
    ("label_names", [None] * 10**5),
    ("label_descriptions", 5),
    ("architecture", ["conv2former_t"]),
    ("architecture", {}),
]


def write(folder, **fields):
    """Writes a network of three classes, and a config.json of some fields."""
    model = Conv2Former(dims=(8, 16, 24, 40), depths=(1, 1, 1, 1), num_classes=3)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: str(value)[:20])
def test_wrong_fields(key, value, tmp_path):
    for prefix, fields in (("", {key: value}), ("pretrained_cfg.", {"pretrained_cfg": {key: value}})):
        with pytest.raises(CheckpointError) as caught:
            conv2former.inspect_checkpoint(write(tmp_path, **fields))
        assert re.match(rf"{tmp_path}/config.json: {prefix}{key} is .*; expected .*; correct it, or", str(caught.value))
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["pretrained_cfg", "model_args", "conv2former"])
def test_parts_that_are_no_objects(key, tmp_path):
    with pytest.raises(CheckpointError, match=rf"config.json: {key} is \[1\]; expected an object of fields"):
        conv2former.inspect_checkpoint(write(tmp_path, **{key: [1]}))


def test_missing_fields_take_the_default(tmp_path):
    nothing = {"input_size": None, "mean": None, "std": None, "interpolation": "", "label_names": None}
    for fields in ({}, {"pretrained_cfg": {}}, {"pretrained_cfg": None}, {"pretrained_cfg": nothing}):
        info = conv2former.inspect_checkpoint(write(tmp_path, **fields))
        assert (info.preprocessing, info.preprocessing_noted) == (conv2former.Preprocessing(), ())


def test_what_is_no_json(tmp_path, monkeypatch):
    write(tmp_path)
    for content, expected in (
        (b"[" * 100_000, "lists in lists in lists"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b"\xff", "not readable as JSON"),
        (b"[]", "holds a list"),
        (b"{}" + b" " * 100, "larger than 100 bytes"),
    ):
        monkeypatch.setattr(hub_config, "MAX_BYTES", 100 if b"  " in content else 1 << 20)
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"config.json: {expected}"):
            conv2former.inspect_checkpoint(tmp_path)


def test_the_number_of_classes_is_that_of_the_weights(tmp_path):
    assert conv2former.inspect_checkpoint(write(tmp_path, num_classes=3)).num_classes == 3
    with pytest.raises(CheckpointError, match=r"num_classes is 4 in config.json, and the weights have 3 classes"):
        conv2former.inspect_checkpoint(write(tmp_path, num_classes=4))
