"""validate and predict with a detection's checkpoint."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from conv2former import DataError
from conv2former.engine import train
from conv2former.errors import OutputError
from conv2former.tasks.dense.thumbnails import colours
from conv2former.tasks.detection.objects import Detections
from conv2former.tools.evaluation.detection import _words_for
from conv2former.tools.evaluation.files import Extras
from conv2former.tools.evaluation.registry import summary, validate_files
from conv2former.tools.prediction.detection import PredictedBoxes, class_folders
from conv2former.tools.prediction.drawing import annotated
from conv2former.tools.prediction.folder import check_results_folder

from ..conftest import run_script
from ..engine.conftest import configure
from .conftest import NAMES, NUMBERS, SHAPE, write_coco

METRICS = ("ap", "ap50", "ap75", "mask_ap", "mask_ap50", "mask_ap75", "n")
LOW = "evaluation.score=0.02"  # so short a training is sure of nothing


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    """One short training: its data, its report, and its best and last checkpoint."""
    place = tmp_path_factory.mktemp("detection")
    raw = {
        "task": "detection",
        "model": {
            "variant": {"name": "conv2former_test", "ls_init_value": 0.5, **SHAPE},
            "detector": {"name": "mask_rcnn", "channels": 16},
        },
        "data": {"root": str(write_coco(place / "data")), "short_side": 64, "long_side": 96, "workers": 0},
        "augment": {"short_sides": [64]},
        "schedule": {"epochs": 8, "warmup_epochs": 0, "cooldown_epochs": 0},
        "train": {"batch_size": 4, "eval_every": 4},
        "optim": {"base_lr": 1e-2, "base_batch_size": 4},
        "evaluation": {"score": 0.02, "pictures": 3},
        "log": {"tensorboard": False},
    }
    report = train(configure(raw), place / "run")
    best, last = (place / "run" / "checkpoints" / f"{name}.pt" for name in ("best", "last"))
    return SimpleNamespace(data=place / "data", report=report, best=best, last=last)


def run(monkeypatch, capsys, name: str, *words) -> tuple[int, str, str]:
    """Returns exit code, output and errors of a command."""
    return run_script(monkeypatch, f"{name}.py", *words), *capsys.readouterr()


# ------------------------------------------------------------------------------------------------------------ validate


@pytest.mark.slow
def test_an_evaluation_has_the_training_s_numbers(trained, tmp_path):
    """To the bit; and its detections, as a file, have them for plain pycocotools, too."""
    extras = Extras(per_class=True, confusion=True, worst=2)
    rows = validate_files([trained.best, trained.last], extras=extras, output=tmp_path / "out")
    assert rows[0]["ap50"] > 0
    assert {key: rows[0][key] for key in METRICS} == {key: trained.report[key] for key in METRICS}
    assert (rows[0]["best_score"], rows[0]["best_f1"]) == (trained.report["score"], trained.report["f1"])
    for row, noted in zip(rows[0]["per_class"], trained.report["classes"], strict=True):
        assert {key: row[key] for key in noted} == noted
        assert 0 <= row["recall"] <= 100
    noted = [image["image"] for image in trained.report["worst_images"]]
    assert [image["image"] for image in rows[0]["worst"]] == noted[:2]
    folder = tmp_path / "out" / "best"
    for name in ("per_class.csv", "confusion.png", "confusion.csv", "worst.png", "detections.json"):
        assert (folder / name).stat().st_size > 50, name
    header = (tmp_path / "out" / "results.csv").read_text().splitlines()[0].split(",")
    assert {"checkpoint", "ap", "ap50", "mask_ap", "best_score", "n"} <= set(header)
    assert "per_class" not in header
    counts = [line.split(",") for line in (folder / "confusion.csv").read_text().splitlines()]
    assert [line[0] for line in counts[1:]] == counts[0][1:] == [*NAMES, "background"]
    assert [sum(map(int, line[1:])) for line in counts[1:4]] == [row["objects"] for row in rows[0]["per_class"]]
    lines = summary(rows, tmp_path / "out")
    assert any(line.startswith(f"{trained.last} ") and f"{rows[1]['ap']:.2f}" in line for line in lines)
    assert any(line.startswith("disc ") for line in lines)
    assert "masks:" in lines
    none = "no box of any score has an object of its class at an IoU of 0.5 or more"
    assert none in summary([{**rows[0], "best_f1": 0.0}])
    assert none not in lines
    _check_against_files(trained.data / "val.json", folder / "detections.json", rows[0])


def _check_against_files(truth, detections, row) -> None:
    """Compares a row with COCOeval on the data's own file."""
    results = json.loads(detections.read_text())
    assert results
    assert {line["category_id"] for line in results} <= set(NUMBERS)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        for kind, prefix in (("bbox", ""), ("segm", "mask_")):
            left_out = "bbox" if kind == "segm" else "segmentation"  # a mask's area counts, not its box's
            given = [{key: value for key, value in line.items() if key != left_out} for line in results]
            evaluation = COCOeval(coco, coco.loadRes(given), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for i, key in enumerate(("ap", "ap50", "ap75", "ap_small")):
                assert row[f"{prefix}{key}"] == pytest.approx(100 * evaluation.stats[i], abs=1e-9)


@pytest.mark.slow
def test_other_data_and_limits(trained, tmp_path, monkeypatch, capsys):
    """A JSON file alone is data, too; what is counted and how many boxes can be changed, and is said."""
    words = ("evaluation.max_detections=5", "evaluation.score=0.3", "evaluation.nms=0.4", "data.short_side=48")
    code, out, err = run(
        monkeypatch, capsys, "validate", "--checkpoint", trained.best, "--data", trained.data / "val.json", *words
    )
    assert code == 0, err
    assert "val.json: 6 images, 3 classes, fp32\n" in out
    assert "shorter side 48 pixels" in out
    assert "score 0.3 and above, NMS at an IoU of 0.4, at most 5 of an image (COCO's own AP counts 100)" in out
    (few,) = validate_files([trained.best], None, words[:1])
    (same,) = validate_files([trained.best], data=trained.data)
    assert same["ap50"] == trained.report["ap50"]
    assert few["ar100"] <= same["ar100"]
    content = json.loads((trained.data / "val.json").read_text())
    content["categories"][0]["name"] = "disk"
    (tmp_path / "val").mkdir()
    (tmp_path / "val.json").write_text(json.dumps(content))
    shutil.copytree(trained.data / "val", tmp_path / "val", dirs_exist_ok=True)
    with pytest.raises(DataError, match="disk"):
        validate_files([trained.best], data=tmp_path)


@pytest.mark.slow
def test_data_without_masks_has_its_boxes_evaluated(trained, tmp_path, monkeypatch, capsys):
    data = write_coco(tmp_path / "boxes", masks=False)
    code, out, err = run(monkeypatch, capsys, "validate", "--checkpoint", trained.best, "--data", data, "--worst", "1")
    assert code == 0, err
    assert "val.json has not a mask for each object: boxes alone are evaluated" in out
    (row,) = validate_files([trained.best], data=data)
    assert (row["ap"], row["ap50"]) == (trained.report["ap"], trained.report["ap50"])
    assert "mask_ap" not in row
    assert "ap" in row["per_class"][0]


@pytest.mark.slow
def test_what_is_not_evaluated(trained, monkeypatch, capsys):
    for words, expected in (
        (["--among", "present"], "--among: of classifiers, and this is a detection"),
        (["--real"], "--real: of classifiers"),
        (["--calibration"], "--calibration: of classifiers"),
        (["--preprocessing", "both"], "--preprocessing: of classifiers"),
        (["augment.hflip=1"], "augment: no effect on an evaluation"),
        (["model.detector.name=fcos"], "model: no effect on an evaluation"),
        (["evaluation.pictures=3"], "it is --worst here"),
        (["evaluation.score=2"], "evaluation.score: "),
        (["--model", "conv2former_t"], "is not conv2former_t but "),
        (["--data", trained.best], "a file, and neither COCO's .json nor YOLO's .yaml"),
    ):
        code, _, err = run(monkeypatch, capsys, "validate", "--checkpoint", trained.best, *words)
        assert (code, expected in err) == (2, True), err


@pytest.mark.parametrize(
    ("names", "source"),
    [
        (["train.json", "train/a.jpg"], "coco"),
        (["annotations/instances_val.json"], "coco"),
        (["valid/_annotations.coco.json"], "coco"),
        (["data.yaml", "images/val/a.jpg"], "yolo"),
        (["valid/labels/a.txt", "valid/images/a.jpg"], "yolo"),
        (["Annotations/a.xml", "JPEGImages/a.jpg"], "voc"),
        (["valid/a.xml", "valid/a.jpg"], "voc"),
        (["VOC2012/Annotations/a.xml", "VOC2012/ImageSets/Main/val.txt"], "voc"),
        (["obj.data", "obj_train_data/a.jpg"], "yolo"),
        (["val/classes.txt", "val/a.txt", "val/a.jpg"], "yolo"),
        (["validation.parquet"], "hf"),
        (["validation/metadata.jsonl", "validation/a.jpg"], "hf"),
    ],
)
def test_how_data_is_stored_is_told_by_names(tmp_path, names, source):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert _words_for(tmp_path)[1] == f'data.source="{source}"'


def test_a_name_that_is_no_folder_is_the_hub_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _words_for(Path("owner/name"))[1] == 'data.source="hf"'
    assert _words_for(Path("name"))[1] == 'data.source="coco"'


# ------------------------------------------------------------------------------------------------------------- predict


@pytest.mark.slow
def test_boxes_of_photos(trained, tmp_path, monkeypatch, capsys):
    """Photos with boxes, COCO's results, crops; what cannot be read is named at the end."""
    photos = tmp_path / "photos"
    shutil.copytree(trained.data / "val", photos / "street")
    (photos / "broken.jpg").write_bytes(b"no image")
    image = Image.open(photos / "street" / "00.png")
    exif = image.getexif()
    exif[274] = 6  # to be turned by a quarter
    image.convert("L").save(photos / "turned\n$(x).jpg", exif=exif, quality=95)
    output = tmp_path / "found"
    words = ("--checkpoint", trained.best, photos, LOW, "evaluation.max_detections=7", "--output", output, "--crops")
    for _ in range(2):  # earlier results are replaced
        code, out, err = run(monkeypatch, capsys, "predict", *words, "--json")
        assert code == 2
        assert "1 of 8 images cannot be read, the others are done" in err
    expected = ["annotated", "crops", "detections.json", "legend.png", "predictions.jsonl", "sheet.png"]
    assert sorted(os.listdir(output)) == expected
    records = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert records == [json.loads(line) for line in out.splitlines()]
    lines = json.loads((output / "detections.json").read_text())
    assert len(lines) == sum(len(record["detections"]) for record in records) > 7
    (turned,) = (record for record in records if "turned" in record["image"])
    assert turned["size"] == [image.height, image.width]
    for record in records:
        width, height = record["size"]
        assert Image.open(output / record["annotated"]).size[0] % width == 0
        assert len(record["detections"]) <= 7
        scores = [found["score"] for found in record["detections"]]
        assert scores == sorted(scores, reverse=True)
        own = [line for line in lines if line["file_name"] == record["image"]]
        for found, line in zip(record["detections"], own, strict=True):
            assert (found["score"], found["bbox"]) == (line["score"], line["bbox"])
            assert found["class"] == line["category"] == NAMES[line["category_id"] - 1]
            assert found["segmentation"]["size"] == [height, width]
            left, top, *sides = found["bbox"]
            right, bottom = left + sides[0], top + sides[1]
            assert 0 <= left <= right <= width + 1e-4
            assert 0 <= top <= bottom <= height + 1e-4
            crop = Image.open(output / found["crop"])
            assert found["crop"].startswith(f"crops/{found['class']}/")
            assert np.allclose(crop.size, sides, rtol=0, atol=2)
    assert len({line["image_id"] for line in lines if "turned" in line["file_name"]}) == 1

    (output / "crops" / "mine.jpg").write_bytes(b"")
    code, _, err = run(monkeypatch, capsys, "predict", *words)
    assert (code, "something else than predictions (crops/mine.jpg)" in err) == (2, True)


@pytest.mark.slow
def test_lines_on_a_terminal_and_what_is_refused(trained, monkeypatch, capsys, tmp_path):
    photo = trained.data / "val" / "00.png"
    code, out, err = run(monkeypatch, capsys, "predict", "--checkpoint", trained.best, photo, "evaluation.score=0.999")
    assert code == 0, err
    assert "00.png  nothing of score 0.999 and above" in out
    code, out, _ = run(monkeypatch, capsys, "predict", "--checkpoint", trained.best, photo, "data.short_side=40")
    assert "images: shorter side 40 pixels, longer one at most 96; boxes of score 0.5 and above (evaluation.sc" in out
    assert "mask_rcnn: 3 classes, raw weights, on cpu" in out
    for more, expected in (
        (["--explain", "--output", tmp_path / "a"], "--explain: of a classifier's answer"),
        (["data.crop_pct=1"], "data.crop_pct: has no effect here"),
        (["evaluation.scor=0.3"], "evaluation.scor: has no effect here (did you mean"),
        (["data.short_side=400"], "data.short_side: above data.long_side"),
        (["--crops"], "--crops writes pictures; give --output FOLDER"),
    ):
        code, _, err = run(monkeypatch, capsys, "predict", "--checkpoint", trained.best, photo, *more)
        assert (code, expected in err) == (2, True), err


def boxes_of(rows, scores, labels) -> Detections:
    boxes = np.array(rows, np.float32).reshape(-1, 4)
    return Detections(boxes, np.array(scores, np.float32), np.array(labels, np.int64))


def test_an_image_in_one_line():
    found = boxes_of([(0, 0, 5, 5)] * 4, [0.91, 0.8, 0.6, 0.55], [1, 0, 1, 2])
    prediction = PredictedBoxes(2, "a.jpg", (10, 20), found, ["a", "b", "c\n"], ["A", "B", "C\n"], None, 2, 0.5)
    assert str(prediction) == "2 B (0.91), 1 A (0.80), 1 more class"
    line = prediction.lines()[0]
    assert (line["image_id"], line["category_id"], line["bbox"], line["category"]) == (3, 2, [0, 0, 5, 5], "b")
    assert prediction.to_dict()["size"] == [20, 10]


def test_class_folders_lead_nowhere_else():
    found = class_folders(["a/b", "..", "a:b", "", "Müller", "道", "x" * 300, ". ."])
    assert found == ["a_b", "class", "a_b_2", "class_2", "Müller", "道", "x" * 80, "class_3"]


@pytest.mark.parametrize("size", [(1, 1), (64, 30), (900, 700)])
def test_photos_with_boxes_of_any_size(size):
    """Also of boxes without area, at the edges, and of names that no font has; small photos are enlarged."""
    width, height = size
    rows = [(0, 0, width, height), (width, height, width, height), (0, 0, 0.2, 0.2), *[(0, 0, width, height)] * 30]
    found = boxes_of(rows, np.linspace(1, 0.5, len(rows)), [i % 3 for i in range(len(rows))])
    photo = Image.new("L", size, 90)
    picture = annotated(photo, found, ["cat", "x" * 300, "\x1b[31m"], colours(3)[:-1])
    assert picture.mode == "RGB"
    assert picture.width % width == 0
    assert max(picture.size) >= 240
    assert len(picture.getcolors(1 << 20)) > 2
    plain = annotated(photo, boxes_of([], [], []), ["cat"], colours(1)[:-1])
    assert plain.getcolors(1 << 20) == [(plain.width * plain.height, (90, 90, 90))]


@pytest.mark.parametrize("side", [48, 300, 900])
def test_the_colour_of_a_box_is_seen(side):
    """It takes as many pixels of a line as the white border on both of its sides."""
    photo, colour = Image.new("RGB", (side, side), (90, 90, 90)), (20, 30, 200)
    found = boxes_of([[0.3 * side, 0.3 * side, 0.9 * side, 0.9 * side]], [0.9], [0])
    picture = np.array(annotated(photo, found, ["a"], np.array([colour], dtype=np.uint8)))
    across = picture[round(0.8 * len(picture))]  # below the label
    coloured, white = ((across == ink).all(1).sum() for ink in (colour, (255, 255, 255)))
    assert coloured >= white > 0


def test_a_folder_of_crops_that_is_not_ours(tmp_path):
    (tmp_path / "crops" / "cat").mkdir(parents=True)
    (tmp_path / "crops" / "cat" / "a_1.jpg").write_bytes(b"")
    for lines in ("", '{"detections": [{"crop": "crops/cat/b_1.jpg"}]}\n', '{"detections": 3}\n', '[{"crop": 1}]\n'):
        (tmp_path / "predictions.jsonl").write_text(lines)
        with pytest.raises(OutputError, match=r"crops/cat/a_1\.jpg"):
            check_results_folder(tmp_path)
    (tmp_path / "predictions.jsonl").write_text('{"detections": [{"crop": "crops/cat/a_1.jpg"}]}\n')
    check_results_folder(tmp_path)


@pytest.mark.slow
def test_crops_are_of_detections_alone(tmp_path, monkeypatch, capsys):
    photo = tmp_path / "a.png"
    Image.new("RGB", (40, 40)).save(photo)
    words = ("--checkpoint", "conv2former_cifar10.cifar10", photo, "--crops", "--output", tmp_path / "out")
    code, _, err = run(monkeypatch, capsys, "predict", *words)
    assert (code, "--crops: of the boxes of a detection" in err) == (2, True), err
