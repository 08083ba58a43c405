"""Detections as ONNX files: each box is the network's, on images of any size, with many boxes, few and none."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

import conv2former
from conv2former import ConfigError
from conv2former.commands.export import describe
from conv2former.errors import OutputError
from conv2former.tasks.detection.network import build_network
from conv2former.tools.export.detection import NAMES, BoxSubject, compared
from conv2former.tools.export.options import Options
from conv2former.tools.export.registry import export

from .test_network import configured, content_of


def silent(text: str) -> None:
    pass


def lively(detector: str, path, data=None) -> str:
    """Writes a checkpoint whose boxes differ in class, size and score, as those of fresh weights hardly do."""
    config = configured(detector, data={"short_side": 64, "long_side": 96, **(data or {})})
    model = build_network(config, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_logits.bias", "bbox_ctrness.bias")) and "rpn" not in name:
                parameter.fill_(-1.0)
            if name.endswith(("cls_logits.weight", "cls_score.weight", "bbox_pred.weight")):
                parameter.mul_(30)
    torch.save(content_of(model, config), path)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["mask_rcnn", "faster_rcnn", "fcos", "retinanet"])
def test_a_file_gives_the_network_s_boxes(detector, tmp_path):
    session = pytest.importorskip("onnxruntime").InferenceSession
    path = lively(detector, tmp_path / "best.pt")
    is_dynamic = detector in ("mask_rcnn", "retinanet")
    size = {} if is_dynamic else {"img_size": (64, 80)}
    score = {"fcos": 0.55, "retinanet": 0.35}.get(detector, 0.7)
    limits = (f"evaluation.score={score}", "evaluation.max_detections=60")
    options = Options(dynamic=is_dynamic, overrides=limits, **size)
    done = export(path, tmp_path / "a.onnx", options, silent)
    shapes = [(64, 96), (91, 63), (33, 103)] if is_dynamic else [(64, 80)]
    assert [case.shape for case in done.cases] == [(1, 3, *shape) for shape in shapes]
    assert all(case.relative < 1e-4 and case.agreement > 0.95 and case.scale > 0.3 for case in done.cases)
    assert json.loads(done.metadata["class_names"]) == ["square", "disc", "ring"]
    assert done.metadata["task"] == "detection"
    noted = json.loads(done.metadata["preprocessing"])
    assert (noted["short_side"], noted["long_side"]) == (64, 96)
    text = describe(done)
    assert "largest score" in text
    assert "same boxes" in text
    assert b"/tmp" not in (tmp_path / "a.onnx").read_bytes()

    model = conv2former.load_model(path)[0]
    model.limit(configured(detector, evaluation={"score": score, "max_detections": 60}).evaluation)
    opened = session(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    counts = set()
    for i, scale in enumerate((0.0, 0.3, 1.0, 2.0, 8.0)):
        inner = (40 + 13 * i, 97 - 9 * i) if is_dynamic else (64, 80)
        images = scale * torch.randn(1, 3, *inner, generator=torch.Generator().manual_seed(i))
        found = opened.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            (expected,) = model([images[0]])
        assert [len(part) for part in found] == [len(expected["boxes"])] * len(found)
        if scale:  # of one colour there are many boxes of the very same score
            same, boxes, _, difference = compared([expected[key].numpy() for key in NAMES if key in expected], found)
            assert same == boxes
            assert difference < 1e-5
            counts.add(boxes // 2)
    assert len(counts) > 1


def test_what_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    path = lively("retinanet", tmp_path / "best.pt")
    for output, options, message in (
        ("a.pt2", Options(), r"a detection is written as ONNX alone, .* give \.onnx"),
        ("a.ts", Options(), r"a detection is written as ONNX alone, .* give \.onnx"),
        ("a.onnx", Options(preprocessing="imagenet"), "--preprocessing: of classifiers"),
        ("a.onnx", Options(dynamic=False, batch_size=2), "--batch-size 2: .* takes one image"),
        ("a.onnx", Options(opset=23), "--opset 23: a detection is written in opset 16 to 20"),
        ("a.onnx", Options(overrides=("data.crop_pct=1",)), r"data\.crop_pct: has no effect here"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(path, tmp_path / output, options, silent)
    assert os.listdir(tmp_path) == ["best.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda boxes, scores, labels: (boxes, scores * 1.01, labels), "differ from the network's by up to"),
        (lambda boxes, scores, labels: (boxes[::2], scores[::2], labels[::2]), "% of its boxes are .* 95 % are needed"),
    ],
)
def test_a_file_that_answers_differently_is_not_kept(change, message, tmp_path, monkeypatch):
    """Compared box by box: a file whose scores, or whose boxes, are others."""
    pytest.importorskip("onnxruntime")
    real = BoxSubject._answer
    monkeypatch.setattr(BoxSubject, "_answer", lambda self, images: [*change(*real(self, images))])
    with pytest.raises(OutputError, match=rf"a\.onnx is not written: on .*{message}"):
        export(
            lively("retinanet", tmp_path / "best.pt"), tmp_path / "a.onnx", Options(dynamic=False, img_size=64), silent
        )
    assert os.listdir(tmp_path) == ["best.pt"]


def test_boxes_are_paired():
    """By class, place and score; a mask may differ in few pixels."""
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 40, 40]], np.float32)
    scores, labels = np.array([0.9, 0.8, 0.7], np.float32), np.array([0, 1, 1])
    masks = np.zeros((3, 1, 50, 50), np.float32)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
        mask[0, top:bottom, left:right] = 0.9
    one = [boxes, scores, labels, masks]
    assert compared(one, [part[::-1] for part in one])[:2] == (6, 6)
    none = [part[:0] for part in one]
    assert compared(none, none) == (0, 0, 0.0, 0.0)
    assert compared(one, none)[:2] == (0, 3)
    near = [boxes + 0.4, scores + 0.01, labels, masks]
    same, count, scale, difference = compared(one, near)
    assert (same, count) == (6, 6)
    assert (scale, difference) == pytest.approx((0.91, 0.01))
    assert compared(one, [boxes + 0.6, *one[1:]])[0] == 0
    assert compared(one, [boxes, scores, np.array([0, 0, 1]), masks])[0] == 4
    double = [boxes[[0, 0]], scores[[0, 0]], labels[[0, 0]], masks[[0, 0]]]
    assert compared(double, [part[:1] for part in double])[:2] == (2, 3)
    other = masks.copy()
    other[2, 0, 20, 20:24] = 0  # 4 of 400 pixels
    assert compared(one, [boxes, scores, labels, other])[0] == 6
    other[2, 0, 21, 20:24] = 0
    assert compared(one, [boxes, scores, labels, other])[0] == 4
    unsure, rounded = (np.where(masks > 0, np.float32(0.5 + by), 0) for by in (1e-4, -1e-4))
    assert compared([boxes, scores, labels, unsure], [boxes, scores, labels, rounded])[0] == 6
