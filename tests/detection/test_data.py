"""Images with objects: the same from every format, where files lie, and which are held out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest

from conv2former import DataError
from conv2former.tasks.detection.check import about_objects
from conv2former.tasks.detection.shapes import decode
from conv2former.tasks.detection.sources import open_split

from .conftest import (
    MASKS,
    NAMES,
    NEGATIVE,
    at,
    configured,
    moved,
    opened,
    scenes,
    write_coco,
    write_hf,
    write_voc,
    write_yolo,
)

WRITE = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc, "hf": write_hf}


@pytest.mark.parametrize(
    ("source", "masks"), [*((source, False) for source in WRITE), ("coco", True), ("yolo", True), ("hf", True)]
)
def test_the_same_objects_come_out_of_all_formats(raw, tmp_path, source, masks):
    root = WRITE[source](tmp_path / "set") if source == "voc" else WRITE[source](tmp_path / "set", masks)
    sources = opened(at(raw, root, source), **(MASKS if masks else {}))
    for found, split in zip(sources, ("train", "val"), strict=True):
        drawn = scenes(split)
        assert found.class_names == NAMES
        assert (len(found), found.has_masks) == (len(drawn), masks)
        assert found.counts.empty == 1
        for i, (_, image, things) in enumerate(drawn):
            (photo, objects, name), label = found.images[i]
            assert (label, photo.mode, name) == (0, "RGB", found.images.name(i))
            np.testing.assert_array_equal(np.asarray(photo), np.asarray(image))
            assert len(objects) == len(things) == (0 if i == NEGATIVE else 1 + i % 3)
            assert (objects.boxes.dtype, objects.labels.dtype, objects.areas.dtype) == (np.float32, np.int64, float)
            np.testing.assert_allclose(objects.boxes, np.array([t.box for t in things]).reshape(-1, 4), atol=1e-4)
            assert objects.labels.tolist() == [thing.label for thing in things]
            assert not objects.crowd.any()
            if not masks:
                assert objects.masks is None
                sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
                np.testing.assert_allclose(objects.areas, sides.prod(1), rtol=1e-5)
                continue
            pixels = decode(objects.masks, photo.height, photo.width)
            whole = [pycocotools.mask.frPyObjects([t.polygon.reshape(-1).tolist()], *photo.size[::-1]) for t in things]
            expected = decode([runs[0] for runs in whole], photo.height, photo.width)
            assert (pixels != expected).sum() <= 4 * len(things)  # YOLO's shares are rounded
            if source != "coco":  # which says them
                np.testing.assert_array_equal(objects.areas, pixels.sum((1, 2)))


def test_the_line_of_what_was_counted(raw, folder):
    train, val = opened(raw)
    numbers = np.bincount([t.label for *_, things in scenes("train") for t in things], minlength=3)
    assert train.counts.objects.tolist() == numbers.tolist()
    assert about_objects(train) == (
        f"12 images, {numbers.sum()} objects: {numbers[0]} disc, {numbers[1]} square, {numbers[2]} triangle; "
        "1 image without objects"
    )
    assert (train.name, val.name) == (str(folder / "train.json"), str(folder / "val.json"))
    with_masks = opened(raw, **MASKS)[0]
    assert "objects with masks" in about_objects(with_masks)


# ------------------------------------------------------------------------------------------------------ where files lie


LAYOUTS = {
    "coco 2017": {
        "train.json": "annotations/instances_train2017.json",
        "val.json": "annotations/instances_val2017.json",
        "train": "train2017",
        "val": "val2017",
    },
    "coco in images": {
        "train.json": "annotations/instances_train2017.json",
        "val.json": "annotations/instances_val2017.json",
        "train": "images/train2017",
        "val": "images/val2017",
    },
    "cvat": {
        "train.json": "annotations/instances_Train.json",
        "val.json": "annotations/instances_Validation.json",
        "train": "images/Train",
        "val": "images/Validation",
    },
    "annotations": {"train.json": "annotations/train.json", "val.json": "annotations/val.json"},
    "roboflow": {"train.json": "train/_annotations.coco.json", "val.json": "valid/_annotations.coco.json"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_coco_files_lie(raw, folder, layout):
    if layout == "roboflow":
        shutil.move(folder / "val", folder / "valid")
    moved(folder, LAYOUTS[layout])
    train, val = opened(raw)
    assert (len(train), len(val)) == (12, 6)
    assert len(open_split(configured(raw), None)) == 6
    assert len(open_split(configured(raw), "Train" if layout == "cvat" else "train")) == 12


def test_a_lone_file_of_a_labelling_tool(raw, folder):
    """As CVAT and Label Studio export it: nothing says a split, and a share is held out."""
    (folder / "val.json").unlink()
    moved(folder, {"train.json": "annotations/instances_default.json", "train": "images/default"})
    assert [len(split) for split in opened(raw, data__holdout=0.25)] == [9, 3]
    moved(folder, {"annotations/instances_default.json": "result.json", "images/default": "photos/images"})
    shutil.rmtree(folder / "images")
    moved(folder, {"photos/images": "images"})
    assert [len(split) for split in opened(raw, data__holdout=0.25)] == [9, 3]
    assert len(open_split(configured(raw), None)) == 12


def test_coco_files_that_are_named(raw, folder):
    moved(folder, {"train.json": "a/x.json", "val.json": "y.json", "train": "photos/one", "val": "photos/two"})
    with pytest.raises(DataError, match=r"none of its 6 images, such as 00\.png, is in .*; give their folder"):
        opened(raw, data__holdout=0.2)  # the only file, at the root
    (folder / "z.json").write_text("{}")
    with pytest.raises(DataError, match=r"no COCO file for a split.*it has y\.json, z\.json; give them"):
        opened(raw)
    keys = {"data__train_annotations": "a/x.json", "data__val_annotations": "y.json"}
    places = {"data__train_images": "photos/one", "data__val_images": str(folder / "photos" / "two")}
    train, val = opened(raw, **keys, **places)
    assert (len(train), len(val)) == (12, 6)
    assert train.images.name(0) == str(folder / "photos" / "one" / "00.png")
    shutil.copy(folder / "y.json", folder / "validation.json")  # which is not looked at
    assert opened(raw, **keys, **places)[1].name == str(folder / "y.json")
    shutil.copy(folder / "a" / "x.json", folder / "train.json")
    train, val = opened(raw, data__val_annotations="y.json", **places)
    assert (train.name, val.name) == (str(folder / "train.json"), str(folder / "y.json"))
    with pytest.raises(DataError, match=r"w\.json: no such file \(data\.val_annotations\)"):
        opened(raw, **{**keys, "data__val_annotations": "w.json"})


def test_two_files_for_one_split_and_images_in_both(raw, folder):
    (folder / "annotations").mkdir()
    shutil.copy(folder / "train.json", folder / "annotations" / "instances_train.json")
    with pytest.raises(DataError, match=r"could be the split 'train'; give the right one"):
        opened(raw)
    (folder / "annotations" / "instances_train.json").unlink()
    shutil.rmtree(folder / "val")
    with pytest.raises(DataError, match=r"val\.json have 6 images in common: .*train/00\.png"):
        opened(raw, data__val_images="train")


def test_images_are_held_out_by_their_names(raw, folder):
    (folder / "val.json").unlink()
    with pytest.raises(DataError, match=r"has no validation split.*data\.holdout=0\.2 holds a fifth"):
        opened(raw)
    train, val = opened(raw, data__holdout=0.25)
    assert (len(train), len(val)) == (9, 3)
    names = [[Path(s.images.name(i)).name for i in range(len(s))] for s in (train, val)]
    assert sorted([*names[0], *names[1]]) == [f"{i:02}.png" for i in range(12)]
    # a later version must not hold out others: they would have been trained on
    assert names[1] == ["04.png", "06.png", "08.png"]
    again = open_split(configured(raw, data__holdout=0.25), None)
    assert [Path(again.images.name(i)).name for i in range(3)] == names[1]
    other = opened(raw, data__holdout=0.25, data__holdout_seed=1)[1]
    assert [Path(other.images.name(i)).name for i in range(3)] != names[1]


def test_keys_that_do_not_go_together(raw):
    for changes, message in (
        ({"data__source": "yolo", "data__val_images": "x"}, "data.val_images: only with data.source coco"),
        ({"data__absolute_paths": True}, "data.absolute_paths: only with data.source hf"),
        ({"data__short_side": 100}, "data.short_side: above data.long_side"),
        ({"augment__crop_scale": [0.9, 0.5]}, "augment.crop_scale: the first number"),
        ({"augment__crop_scale": [0.5, 1.5]}, "augment.crop_scale: shares of the image"),
        ({"augment__resize": "large_scale_jitter"}, "augment.resize: large_scale_jitter makes images of data.img_size"),
        ({"data__img_size": 640}, "data.img_size: has no effect with augment.resize multi_scale; images are sized by"),
        ({"data__crop_pct": 0.9}, "data.crop_pct: has no effect with task: detection; leave it out"),
        ({"augment__short_sides": [64, 100]}, "augment.short_sides: 100 is above data.long_side"),
    ):
        found = configured(raw, **changes).conflicts()
        assert any(re.match(re.escape(message), text) for text in found), found
    assert not configured(raw).conflicts()
