"""A detection trains, is killed, goes on and is evaluated as a classifier is, by the same engine."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

import conv2former
from conv2former import ConfigError, DataError
from conv2former.commands.train import summary
from conv2former.engine import dry_run, train
from conv2former.engine.checkpoint import read_training_checkpoint
from conv2former.engine.logging import read_metrics
from conv2former.engine.saved import wrong_fields
from conv2former.tasks.detection.network import DetectionNetwork
from conv2former.tasks.detection.task import Detection
from conv2former.tools.runs.comparing import differing_runs
from conv2former.tools.runs.killing import RunProcesses

from ..engine.conftest import configure, killed_after
from .conftest import NAMES, draw, write_coco

BOXES = {"ap", "ap50", "ap75"}
MASKS = {f"mask_{key}" for key in BOXES}


def settings(raw: dict, detector: str, **model) -> dict:
    """Returns the drawn data's settings with another detector."""
    own = {"name": detector, "channels": 64 if detector == "fcos" else 16, "head_convs": 1}
    return {**raw, "model": {**raw["model"], "detector": own, **model}, "evaluation": {"pictures": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet"])
def test_it_trains_and_goes_on_exactly(raw, detector, tmp_path, capsys):
    """Which boxes a detector of two stages looks at is drawn, and so are augmentations and drop path."""
    raw = settings(raw, detector)
    config = configure(raw)
    report = train(config, tmp_path / "whole")
    assert (report["task"], report["steps"], report["n"]) == ("detection", 6, 6)
    rows = [row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if row["kind"] == "eval"]
    assert report["ap"] == max(row["ema_ap"] for row in rows)
    there = BOXES | (MASKS if detector == "mask_rcnn" else set())
    assert {*there, "ema_ap", "n"} <= set(rows[0])
    assert {key for key in MASKS if report[key] is not None} == there - BOXES
    assert (MASKS & set(rows[0])) == there - BOXES
    assert [row["class"] for row in report["classes"]] == NAMES
    assert (tmp_path / "whole" / "first_batch.png").stat().st_size > 5_000
    saved = read_training_checkpoint(tmp_path / "whole" / "checkpoints" / "best.pt")
    assert saved["best_metric"] == report["ap"]
    assert {len(row) for row in saved["history"]} == {1 + len(there)}
    history = [row[:3] for row in saved["history"]]
    assert wrong_fields({**saved, "history": history}, Detection()) == ["history"]
    output = capsys.readouterr().out
    assert "classifier" not in output
    assert f"detector {detector}, 16 channels, on maps from stride {4 if detector == 'mask_rcnn' else 8} on" in output
    assert "  others       AP50 " in "\n".join(summary(report, tmp_path))
    model, info = conv2former.load_model(tmp_path / "whole" / "checkpoints" / "best.pt")
    assert isinstance(model, DetectionNetwork)
    assert all(value.equal(saved["model_ema"][key]) for key, value in model.state_dict().items())
    assert info.class_names == NAMES

    with killed_after(4):  # in the second epoch
        train(config, tmp_path / "parts")
    train(configure(raw, data__workers=1), tmp_path / "parts")
    assert not differing_runs(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ConfigError, match=r"augment\.crop: 0\.5 -> 0\.1"):
        train(configure(raw, augment__crop=0.1), tmp_path / "whole")


@pytest.mark.slow
def test_instance_masks_are_learned(tmp_path):
    """From the installed weights, in 84 steps, and measured on other images.

    Whole boxes for masks could reach an AP50 of 60 as well: of the shapes only a triangle is no more than half of its
    box. Their AP75 is that of the squares alone.
    """
    drawn = {
        split: [(f"{seed}.png", *draw(seed, (48, 48), 1 + seed % 3)) for seed in seeds]
        for split, seeds in (("train", range(48)), ("val", range(1000, 1024)))
    }
    raw = {
        "task": "detection",
        "model": {
            "name": "conv2former_cifar10",
            "checkpoint": "conv2former_cifar10",
            "drop_path_rate": 0.0,
            "detector": {"name": "mask_rcnn", "channels": 32, "anchor_sizes": [16, 32, 64, 128]},
        },
        "data": {"root": str(write_coco(tmp_path / "data", drawn=drawn)), "short_side": 48, "workers": 0},
        "augment": {"short_sides": [48]},
        "optim": {"opt": "nmuon", "momentum": 0.9, "base_lr": 5e-3, "base_batch_size": 4, "weight_decay": 0.02},
        "schedule": {"epochs": 7, "warmup_epochs": 2, "cooldown_epochs": 0, "min_lr": 0.0},
        "train": {"batch_size": 4, "eval_every": 7},
        "evaluation": {"pictures": 0},
        "log": {"tensorboard": False},
    }
    report = train(configure(raw), tmp_path / "run")
    assert report["ap50"] >= 60
    assert report["mask_ap50"] >= 60
    assert report["mask_ap75"] >= 25


@pytest.mark.slow
def test_two_processes_train_also_without_boxes(raw, folder, tmp_path):
    """In each step one of them may have no box at all, and no gradient of a mask but 0; they evaluate an image once."""
    content = json.loads((folder / "train.json").read_text())
    first = {image["id"] for image in content["images"][:3]}
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in first]
    (folder / "train.json").write_text(json.dumps(content))
    config = configure(settings(raw, "mask_rcnn"), train__batch_size=1, train__accum_steps=1, schedule__epochs=1)
    run = RunProcesses(partial(train, config, tmp_path / "two"), 2, tmp_path / "output.txt")
    assert run.wait(300), (tmp_path / "output.txt").read_text()
    assert run.exit_codes == [0, 0], (tmp_path / "output.txt").read_text()
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert (report["n"], report["steps"]) == (6, 6)
    val = Detection().open_data(config)[1]
    assert [row["objects"] for row in report["classes"]] == val.counts.objects.tolist()


@pytest.mark.slow
def test_a_dry_run_needs_no_data_where_the_classes_are_listed(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(Detection, "open_data", None)
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\n")
    small = {"data__root": "nowhere", "data__class_names": str(names)}
    jitter = {"augment__resize": "large_scale_jitter", "data__img_size": 64}
    for detector, resize in (("mask_rcnn", {}), ("faster_rcnn", jitter)):
        lines = dry_run(configure(settings(raw, detector), **resize, **small))
        assert "one step on 2 random images: loss " in lines[-1]
        assert "4 classes" in lines[-2]


def test_the_synthetic_batch_is_of_the_largest_size(raw):
    config = configure(settings(raw, "mask_rcnn"))
    batch = Detection().synthetic_batch(config, 3, 2, torch.Generator().manual_seed(0))
    assert {tuple(image.shape) for image in batch.images} == {(3, 64, 96)}
    for target in batch.targets:
        boxes = target["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes <= torch.tensor([96.0, 64.0] * 2)).all()
        assert target["masks"].shape == (8, 64, 96)
    jitter = configure(raw, augment__resize="large_scale_jitter", data__img_size=32)
    (image, _) = Detection().synthetic_batch(jitter, 3, 2, torch.Generator().manual_seed(0)).images
    assert image.shape == (3, 32, 32)


def test_objects_are_checked_before_the_network_is_built(raw, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Detection, "build_model", None)
    (folder / "train" / "07.png").unlink()
    with pytest.raises(DataError, match=r"07\.png"):
        train(configure(raw), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_are_those_of_the_run(raw):
    """Of a network without masks there are none of masks, in history, early stop and comparison of runs."""
    task = Detection()
    assert set(task.metrics_of(configure(raw))) == BOXES
    assert set(task.metrics_of(configure(settings(raw, "mask_rcnn")))) == BOXES | MASKS == set(task.metrics)
    assert list(task.metrics)[: len(BOXES)] == list(task.metrics_of(configure(raw)))
    assert task.optional == MASKS


def test_results_in_words():
    task = Detection()
    row = {"ap": 12.35, "ap50": 40.0, "ema_ap": 13.5, "ema_ap50": 41.0}
    assert task.result_line(row, False, 3) == "AP 12.35 %  AP50 40.00 %"
    assert task.result_line(row, True, 3).endswith("averaged weights 13.50 %  AP50 41.00 %")
    assert task.result_line({**row, "mask_ap": 7.0}, False, 3).endswith("AP50 40.00 %  mask AP 7.00 %")
    details = {
        "classes": [
            {"objects": 3, "ap": 50.0, "ap50": 80.0, "ap75": 20.0},
            {"objects": 0, "ap": None, "ap50": None, "ap75": None},
            {"objects": 2, "ap": 10.0, "ap50": 30.0, "ap75": 5.0},
        ],
        "score": 0.35,
        "f1": 66.0,
        "confusion": None,
        "worst": [],
    }
    report = {"n": 5, **task.report({"ap": 30.0, "ap50": 55.0, "ap75": 12.5}, details, NAMES)}
    title, lines = task.summarise(report)
    assert title == "AP 30.00 % on 5 images"
    assert lines[0] == "  others       AP50 55.00 %, AP75 12.50 %"
    assert lines[1] == f"  lowest       AP of {NAMES[2]} 10.00 %, {NAMES[0]} 50.00 %"
    assert lines[2] == "  best score   0.35, from which on F1 is 66.00 %"
    assert lines[3].startswith(f"  not there    no object of {NAMES[1]}")
    untrained = {**details, "score": 0.5, "f1": 0.0}
    assert task.summarise({"n": 5, **task.report({"ap": 0.0, "ap50": 0.0, "ap75": 0.0}, untrained, NAMES)})[1][2] == (
        "  best score   no box of any score has an object of its class at an IoU of 0.5 or more"
    )
    nothing = {**details, "classes": None, "score": None, "f1": None, "worst": None}
    assert task.summarise({"n": 5, **task.report({"ap": 30.0, "ap50": 5.0, "ap75": 1.0}, nothing, NAMES)})[1]
