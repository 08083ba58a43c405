"""What a weight file notes about its images, and what is assumed where it notes nothing."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from conv2former import CheckpointError, Preprocessing
from conv2former.data import eval_transform
from conv2former.weights.preprocessing import candidates, noted_preprocessing

HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("size", [224, 384])
def test_the_two_candidates(size):
    found = candidates(size)
    assert list(found) == ["imagenet", "inception"]
    imagenet, inception = found.values()
    assert (imagenet.mean, imagenet.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert (imagenet.crop_pct, imagenet.crop_mode) == ((0.875, "center") if size == 224 else (1.0, "squash"))
    assert (inception.mean, inception.std, inception.crop_pct) == (HALF, HALF, 0.9)
    assert {imagenet.img_size, inception.img_size} == {size}


def test_the_fields_are_timms():
    own = Preprocessing(96, HALF, HALF, "bilinear", 0.8, "squash")
    cfg = own.to_cfg()
    assert cfg["input_size"] == [3, 96, 96]
    image = Image.effect_noise((150, 70), 60).convert("RGB")
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
    assert torch.equal(theirs(image), eval_transform(own)(image))
    assert Preprocessing(**own.to_dict()).to_dict() == own.to_dict()
    assert str(own) == "96 x 96, bilinear, crop 0.8 squash, mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5"


def test_sizes_that_are_not_square():
    own = Preprocessing((64, 96), (0.4,), (0.2,), crop_pct=1.0)
    assert (own.to_cfg()["input_size"], own.to_dict()["img_size"]) == ([1, 64, 96], [64, 96])
    assert str(own) == "64 x 96 (height x width), bicubic, crop 1, mean 0.4, std 0.2"
    assert noted_preprocessing({}, own.to_cfg(), None, 1)[0] == own
    assert noted_preprocessing({"data": own.to_dict()}, {}, None, 1)[0] == own == Preprocessing(**vars(own))
    assert Preprocessing((64, 64)) == Preprocessing(64)
    assert noted_preprocessing({"input_size": (3, 64, 96)}, {}, "conv2former_t")[0].size == (64, 96)
    assert candidates((96, 384))["imagenet"].crop_mode == "squash"


def test_networks_of_one_channel():
    """Three values become their mean, as timm does; one value is for one channel only."""
    found, noted = noted_preprocessing({"mean": (0.1, 0.2, 0.6), "crop_pct": 1.0}, {}, None, 1)
    assert (found.mean, found.std, noted) == (pytest.approx((0.3,)), pytest.approx((0.226,)), ["mean", "crop_pct"])
    assert candidates(224, 1)["inception"].mean == (0.5,)
    assert noted_preprocessing({"mean": [0.5]}, {}, None, 1)[1] == ["mean"]


def test_nothing_is_noted():
    assert noted_preprocessing({}, {}, None) == (Preprocessing(), [])
    recipe = {"mean": None, "std": None, "img_size": None, "input_size": None, "interpolation": "", "crop_pct": None}
    assert noted_preprocessing(recipe, {}, "conv2former_t") == (Preprocessing(), [])  # timm's script, all left out


def test_a_recipe_of_timms_script():
    recipe = {"mean": [0.5, 0.5, 0.5], "input_size": [3, 288, 288], "crop_pct": 0.95, "lr": 1e-3}
    found, noted = noted_preprocessing(recipe, {}, "conv2former_t")
    assert found == Preprocessing(288, mean=HALF, crop_pct=0.95)
    assert noted == ["img_size", "mean", "crop_pct"]


def test_a_configuration_of_this_project():
    data = {"img_size": 32, "mean": list(HALF), "std": list(HALF), "interpolation": "bilinear", "crop_mode": "border"}
    found, noted = noted_preprocessing({"data": data, "model": {}}, {}, None)
    assert found == Preprocessing(32, HALF, HALF, "bilinear", crop_mode="border")
    assert noted == ["img_size", "mean", "std", "interpolation", "crop_mode"]


def test_what_lies_beside_the_file_outweighs_the_recipe():
    note = {"input_size": (3, 64, 64), "crop_pct": 1.0}
    found, _ = noted_preprocessing({"img_size": 224, "crop_pct": 0.9, "mean": HALF}, note, None)
    assert found == Preprocessing(64, mean=HALF, crop_pct=1.0)


def test_the_published_crop_goes_with_the_size():
    """Only where no crop is noted."""
    found, noted = noted_preprocessing({"img_size": 384}, {}, "conv2former_l")
    assert (found, noted) == (Preprocessing(384, crop_pct=1.0, crop_mode="squash"), ["img_size"])
    assert noted_preprocessing({"img_size": 384}, {}, "conv2former_n")[0] == Preprocessing(384)
    assert noted_preprocessing({"img_size": 384, "crop_pct": 0.9}, {}, "conv2former_l")[0].crop_mode == "center"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", 0.5),
        ("mean", []),
        ("mean", ["a", "b", "c"]),
        ("mean", [float("nan")] * 3),
        ("mean", [True] * 3),
        ("mean", [10**400] * 3),
        ("mean", [[0.5]] * 3),
        ("mean", True),
        ("mean", {}),
        ("mean", [0.5] * 10**6),
        ("std", [0, 1, 1]),
        ("std", [-1, 1, 1]),
        ("std", 0),
        ("std", [True, True, True]),
        ("std", [float("inf")] * 3),
        ("img_size", 16),
        ("img_size", 0),
        ("img_size", "224"),
        ("img_size", True),
        ("img_size", [224]),
        ("img_size", 224.0),
        ("input_size", [3, 10**6, 10**6]),
        ("input_size", [3, 0, 0]),
        ("input_size", [0, 64, 64]),
        ("input_size", [64, 64]),
        ("input_size", 224),
        ("input_size", [3, "64", 64]),
        ("crop_pct", 0),
        ("crop_pct", float("inf")),
        ("crop_pct", True),
        ("crop_pct", "0.9"),
        ("interpolation", "lanczos"),
        ("interpolation", ["bicubic"]),
        ("interpolation", True),
        ("crop_mode", {}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_note_that_cannot_be_used_is_refused(key, value):
    """Naming the field, its value and what is allowed; wherever it is noted."""
    start = re.escape(f"{key} is {repr(value)[:80]}")
    for recipe, note in (({key: value}, {}), ({"data": {key: value}}, {}), ({}, {key: value})):
        with pytest.raises(CheckpointError, match=rf"^{start}.*; expected .*; correct it in the file$") as caught:
            noted_preprocessing(recipe, note, None)
        assert len(str(caught.value)) < 300


def test_as_many_values_as_channels():
    with pytest.raises(CheckpointError, match=r"^mean has 2 numbers; expected one for each channel \(3\)"):
        noted_preprocessing({"mean": [0.5, 0.5]}, {}, None)
    assert noted_preprocessing({"mean": [0.5], "std": [2]}, {}, None)[0] == Preprocessing(mean=HALF, std=(2, 2, 2))
