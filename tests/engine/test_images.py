"""How a run's images become the network's input: the checkpoint's way unless the user says another."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import conv2former
from conv2former import CheckpointError, ConfigError
from conv2former.data import eval_transform
from conv2former.engine import dry_run, dryrun, train
from conv2former.engine.images import settle_images
from conv2former.models import Conv2Former
from conv2former.tasks.network import build_model, name_network
from conv2former.tools.checkpoints.convert import convert
from conv2former.tools.checkpoints.publish import write_folder
from conv2former.tools.evaluation.validate import validate
from conv2former.tools.prediction.explain import Explainer
from conv2former.tools.prediction.inputs import find_images
from conv2former.tools.prediction.predict import Predictor
from conv2former.tools.runs.comparing import differing_runs
from conv2former.weights.reading import read_checkpoint

from .conftest import killed_after
from .test_finetune import OFFICIAL, fill, recipe

pytestmark = pytest.mark.slow

NOTED = {
    "img_size": 48,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "squash",
}
OPEN = "data.img_size=null"  # which QUICK of the other tests sets


def checkpoint(path, in_chans: int = 3, **noted):
    shape = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "kernel_size": 7, "num_classes": 3}
    torch.manual_seed(0)
    content = {"model": Conv2Former(in_chans=in_chans, **shape).state_dict()}
    torch.save(content | ({"config": {"data": noted}} if noted else {}), path)
    return path


def settled(path, *words):
    return settle_images(name_network(recipe("x", OPEN, *words, checkpoint=path)))


def test_the_checkpoints_are_taken_unless_others_are_set(tmp_path):
    path = checkpoint(tmp_path / "own.pt", **NOTED)
    config, (line,) = settled(path)
    assert config.data.preprocessing.to_dict() == NOTED
    assert config.model.in_chans == 3
    assert line == (
        "images: input size 48 x 48, 3 channels (RGB), bilinear, crop 1 squash, mean 0.4, 0.5, 0.6, std 0.2, 0.3, 0.4 "
        "from the checkpoint"
    )
    config, lines = settled(path, "data.img_size=[64,96]", "data.crop_mode=center", "data.mean=[0,0,0]")
    own = {"img_size": [64, 96], "crop_mode": "center", "mean": [0, 0, 0]}
    assert config.data.preprocessing.to_dict() == NOTED | own
    assert lines[0] == (
        "images: input size 64 x 96 (height x width) from the configuration; 3 channels (RGB), bilinear from the "
        "checkpoint; crop 1, mean 0, 0, 0 from the configuration; std 0.2, 0.3, 0.4 from the checkpoint"
    )
    assert lines[1].endswith("to take it: data.mean=[0.4,0.5,0.6] data.std=[0.2,0.3,0.4], or leave both out")


def test_files_that_note_nothing():
    config, (line,) = settled(OFFICIAL)
    assert config.data.preprocessing == conv2former.Preprocessing()
    assert line.startswith("images: input size 224 x 224 by default; 3 channels (RGB) from the checkpoint; bicubic")
    words = ("model.checkpoint=null", "schedule.epochs=30")
    scratch, (line,) = settle_images(recipe("x", OPEN, *words, name="scratch/folder"))
    assert (scratch.data.img_size, scratch.model.in_chans) == (224, 3)
    assert line.count(" by default") == 1


def test_a_recipe_about_a_size_keeps_it(tmp_path):
    path = checkpoint(tmp_path / "own.pt", **NOTED)
    config = recipe("x", "data.img_size=384", name="imagenet1k_384/conv2former_t_384", checkpoint=path)
    found = settle_images(config)[0].data.preprocessing
    assert (found.img_size, found.crop_pct, found.crop_mode, found.interpolation) == (384, 1.0, "squash", "bicubic")


def test_weights_that_are_not_there_are_named_with_their_key():
    config = recipe("x", OPEN, name="imagenet1k_384/conv2former_t_384", checkpoint="gone.pt")
    with pytest.raises(CheckpointError, match=r"gone.pt: no such file \(model.checkpoint\); give the weights to start"):
        settle_images(config)


def test_a_dry_run_says_it_and_has_the_size(tmp_path, monkeypatch):
    shapes = []
    step = dryrun.train_step
    monkeypatch.setattr(dryrun, "train_step", lambda run, window, *args: (
        shapes.append(tuple(window[0].images.shape)) or step(run, window, *args)
    ))  # fmt: skip
    path = checkpoint(tmp_path / "own.pt", **NOTED)
    words = ("data.num_classes=3", "data.img_size=[32,64]", "model.in_chans=1")
    lines = dry_run(recipe("x", *words, checkpoint=path))
    assert shapes == [(2, 1, 32, 64)]
    assert lines[0].startswith("images: input size 32 x 64 (height x width), 1 channel (grey) from the configuration; ")
    assert lines[0].endswith("mean 0.5, std 0.3 from the checkpoint")
    assert lines[1] == f"the first convolution of {path} takes 3 channels (RGB): it is summed over them"


# --------------------------------------------------------------------------------------------------------- one channel


def test_from_three_channels_to_one(tmp_path):
    """As timm does it, and the answer to a grey image is nearly that of the RGB network, but for the normalisation."""
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    path = checkpoint(tmp_path / "rgb.pt", **half)
    config, _ = settled(path, "model.in_chans=1")
    model, rgb = build_model(config, 3).eval(), conv2former.load_model(path)[0]
    assert torch.equal(model.stem.conv1.weight, rgb.stem.conv1.weight.sum(1, keepdim=True))
    image = torch.randn(1, 1, 64, 64)
    features = [network.forward_features(x) for network, x in ((model, image), (rgb, image.expand(-1, 3, -1, -1)))]
    torch.testing.assert_close(features[0], features[1], rtol=1e-4, atol=1e-5)


def test_from_one_channel_to_one(tmp_path):
    path = checkpoint(tmp_path / "grey.pt", 1, mean=[0.3], std=[0.2], img_size=[32, 64])
    config, lines = settled(path)
    assert len(lines) == 1
    assert (config.model.in_chans, config.data.preprocessing.size) == (1, (32, 64))
    assert (config.data.mean, config.data.std) == ((0.3,), (0.2,))
    own = read_checkpoint(path)["model"]
    found = build_model(config, 3).state_dict()
    assert all(torch.equal(found[key], own[key]) for key in own if not key.startswith("head."))


def test_channels_that_cannot_be(tmp_path):
    grey, pairs = checkpoint(tmp_path / "grey.pt", 1), checkpoint(tmp_path / "pairs.pt", 2)
    with pytest.raises(CheckpointError, match=r"grey.pt is for images of 1 channel \(grey\); .* one for 3 \(model.in_"):
        settled(grey, "model.in_chans=3")
    with pytest.raises(
        CheckpointError, match=r"pairs.pt is for images of 2 channels; training needs one for 3, RGB, or"
    ):
        settled(pairs)
    with pytest.raises(ConfigError, match=r"data.mean: 3 numbers for images of 1 channel \(grey\)"):
        settled(grey, "data.mean=[0,0,0]")
    small = checkpoint(tmp_path / "small.pt", **NOTED)
    with pytest.raises(ConfigError, match=r"augment\.first_img_size: above data\.img_size: 64"):
        settled(small, "augment.first_img_size=64")


def test_wide_grey_images_end_to_end(tmp_path, capsys, with_pictures):
    """16-bit grey, not square, growing: trained, stopped and gone on with exactly, evaluated, predicted, converted."""
    fill(tmp_path / "photos", {"dark": 12, "light": 12}, ("I;16",))
    words = (
        "model.in_chans=1",
        "data.img_size=[32,64]",
        "augment.auto_augment=rand-m9-mstd0.5-inc1",
        "augment.mixup=0.2",
    )
    more = ("schedule.epochs=3", "checkpoint.every_steps=1", "log.tensorboard=true")
    config = recipe(tmp_path / "photos", *words, *more)
    report = train(config, tmp_path / "whole")
    assert "images: input size 32 x 64 (height x width), 1 channel (grey) from the conf" in capsys.readouterr().out
    with killed_after(2):
        train(config, tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert differing_runs(tmp_path / "whole", tmp_path / "parts") == []

    best = tmp_path / "whole" / "checkpoints" / "best.pt"
    info = conv2former.inspect_checkpoint(best)
    assert (info.in_chans, info.preprocessing.size, info.preprocessing.channels) == (1, (32, 64), 1)
    saved = read_checkpoint(best)["config"]
    assert (saved["model"]["in_chans"], saved["data"]["img_size"], saved["data"]["crop_pct"]) == (1, [32, 64], 0.875)
    result = validate(best)
    assert (result["top1"], result["loss"]) == (pytest.approx(report["top1"]), pytest.approx(report["loss"], rel=1e-5))
    predictor = Predictor(best)
    (prediction,) = predictor(find_images([str(tmp_path / "photos" / "dark" / "0.png")]), preview=64)
    assert prediction.pixels.shape == (1, 32, 64)
    (tmp_path / "explanations").mkdir()
    Explainer(predictor).write(prediction, tmp_path, 1, 1)
    write_folder(convert(best), tmp_path / "hub")
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    cfg = timm.data.resolve_model_data_config(model)
    assert cfg["input_size"] == (1, 32, 64)
    with Image.open(tmp_path / "photos" / "dark" / "0.png") as file:
        grey = Image.fromarray((np.asarray(file).astype(np.float32) / 257).round().astype(np.uint8))
    x = timm.data.create_transform(**cfg)(grey)
    assert torch.equal(x, eval_transform(info.preprocessing)(grey.convert("RGB")))
    torch.testing.assert_close(x, prediction.pixels)
