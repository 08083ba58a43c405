"""Images with objects from every format, and what is wrong with one, by its name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from conv2former import DataError
from conv2former.data import EpochSampler, Stream, seed_all
from conv2former.tasks.detection.augment import EvalTransform, TrainTransform
from conv2former.tasks.detection.check import about_objects, check_source
from conv2former.tasks.detection.images import DetectionImages
from conv2former.tasks.detection.loader import eval_loader, train_loader
from conv2former.tasks.detection.shapes import decode
from conv2former.tasks.detection.sources import open_split, open_train_and_val

from .conftest import (
    COLOURS,
    MASKS,
    NAMES,
    NEGATIVE,
    coco_content,
    configured,
    save_images,
    scenes,
    voc_text,
    write_coco,
    write_hf,
    write_voc,
    write_yolo,
)

WRITE = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc, "hf": write_hf}


def opened(raw, **changes):
    """Opens and checks both splits."""
    train, val = open_train_and_val(configured(raw, **changes))
    return check_source(train, False), check_source(val, False)


def at(raw, root: Path, source: str = "coco") -> dict:
    """Returns a copy of `raw` for data elsewhere."""
    return {**raw, "data": {**raw["data"], "root": str(root), "source": source}}


# ---------------------------------------------------------------------------------------------- the same in all formats


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


def test_the_sets_of_the_house_and_their_line(raw, folder):
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


# ------------------------------------------------------------------------------------------------------ COCO's oddities


def changed(folder: Path, change, split: str = "train") -> dict:
    """Rewrites a split's file as a function changes its content."""
    content = coco_content(split)
    content = change(content) or content
    (folder / f"{split}.json").write_text(json.dumps(content))
    return content


def entry(content, index: int = 0) -> dict:
    return content["annotations"][index]


def everywhere(content, key: str, value) -> None:
    for annotation in content["annotations"]:
        annotation[key] = value


WRONG = {
    "unknown category": (lambda c: entry(c).update(category_id=99), r"annotation 1: has category 99, which is none of"),
    "unknown image": (lambda c: entry(c).update(image_id=5), r"annotation 1: is of image 5, which is not in `images`"),
    "no image": (lambda c: entry(c).pop("image_id"), r"annotation 1: image_id is 'None'"),
    "annotation id twice": (lambda c: entry(c, 1).update(id=1), r"annotation 1: a second annotation has this id"),
    "image id twice": (lambda c: c["images"][1].update(id=10), r"image 10: a second image has this id"),
    "image id twice as text": (lambda c: c["images"][1].update(id="10"), r"image 10: a second image has this id"),
    "one file twice": (lambda c: c["images"][1].update(file_name="00.png"), r"images 10 and 20 are one file, 00\.png"),
    "category id twice": (lambda c: c["categories"][1].update(id=2), r"category 2: a second category has this id"),
    "two classes of one name": (
        lambda c: c["categories"][1].update(name="disc"),
        r"categories 2 and 7 are both called 'disc'",
    ),
    "category without a name": (lambda c: c["categories"][0].pop("name"), r"category 2: has no name"),
    "no categories": (lambda c: c.update(categories=[]), r"`categories` is empty"),
    "no images": (lambda c: c.update(images=[]), r"`images` is empty"),
    "no box": (lambda c: (entry(c).pop("bbox"), entry(c).pop("segmentation")), r"annotation 1: has no `bbox`"),
    "three numbers": (lambda c: entry(c).update(bbox=[1, 2, 3]), r"a box is a list of left, top, width, height"),
    "NaN": (lambda c: entry(c).update(bbox=[1, float("nan"), 3, 4]), r"annotation 1: the box's top is 'nan'"),
    "infinite": (lambda c: entry(c).update(bbox=[1, 2, 1e999, 4]), r"annotation 1: the box's width is 'inf'"),
    "negative": (lambda c: entry(c).update(bbox=[9, 9, -5, 4]), r"annotation 1: a box of -5 x 4 pixels"),
    "words": (lambda c: entry(c).update(bbox="1 2 3 4"), r"a box is a list"),
    "crowd of 2": (lambda c: entry(c).update(iscrowd=2), r"annotation 1: iscrowd is '2'"),
    "area of text": (lambda c: entry(c).update(area="big"), r"annotation 1: its area is 'big'"),
    "odd polygon": (lambda c: entry(c).update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), r"a polygon is a list of x, y"),
    "polygon of NaN": (lambda c: entry(c).update(segmentation=[[1, float("nan")] * 3]), r"no finite number"),
    "mask of text": (lambda c: entry(c).update(segmentation="1 2 3"), r"a list of polygons or run lengths, not str"),
    "size of text": (lambda c: c["images"][0].update(width="wide"), r"image 10: width is 'wide'"),
    "no file name": (lambda c: c["images"][0].pop("file_name"), r"image 10: has no `file_name`"),
    "address": (lambda c: c["images"][0].update(file_name="https://x.org/0.png"), r"is an address"),
    "way out": (lambda c: c["images"][0].update(file_name="../val/00.png"), r"leads out of the folder of the images"),
    "elsewhere": (lambda c: c["images"][0].update(file_name="/etc/hosts"), r"lies outside the folder data\.root"),
    "all elsewhere": (
        lambda c: [image.update(file_name=f"x/{image['file_name']}") for image in c["images"]],
        r"none of its 12 images, such as x/00\.png, is in .*data\.train_images",
    ),
    "no objects": (lambda c: c.update(annotations=[]), r"not one of its 12 images has an object"),
    "annotations of text": (lambda c: c.update(annotations=["a"]), r"annotation number 1: not an object with"),
    "a list": (lambda c: [c], r"not a COCO file, but a list"),
    "no list": (lambda c: c.pop("annotations"), r"has no list `annotations`"),
    "labelme": (lambda c: {"shapes": [], "imagePath": "a.png"}, r"it looks like a file of labelme"),
    "VGG": (lambda c: {"_via_img_metadata": {}}, r"it looks like a file of the VGG annotator"),
    "runs of another image": (
        lambda c: entry(c).update(segmentation={"size": [9, 9], "counts": [0, 81]}),
        r"object 1: a mask of 9 x 9 pixels, and its image has 80 x 56",
    ),
    "runs too long": (
        lambda c: entry(c).update(segmentation={"size": [56, 80], "counts": [0, 9999]}),
        r"annotation 1: run lengths that do not add up to the 80 x 56 pixels",
    ),
    "runs of text that is none": (
        lambda c: entry(c).update(segmentation={"size": [56, 80], "counts": "\u00e9~~~"}),
        r"annotation 1: run lengths that do not add up",
    ),
    "runs without a size": (lambda c: entry(c).update(segmentation={"counts": [1]}), r"without a `size`"),
    "another size": (
        lambda c: c["images"][0].update(width=81),
        r"00\.png: an image of 80 x 56 pixels, and its boxes are for one of 81 x 56; put the image back",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_in_a_coco_file_is_one_sentence(raw, folder, what):
    change, message = WRONG[what]
    content = coco_content("train")
    found = change(content)
    content = found if what in ("a list", "labelme", "VGG") else content
    (folder / "train.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as raised:
        opened(raw, **MASKS)
    assert len(raised.value.lines) == 1
    assert not str(raised.value).endswith(".")


def as_text(content) -> None:
    """What tools write that have no numbers."""
    for image in content["images"]:
        image.update(id=str(image["id"]), width=str(image["width"]), height=float(image["height"]))
    for annotation in content["annotations"]:
        annotation.update(image_id=str(annotation["image_id"]), category_id=str(annotation["category_id"]))
        annotation["bbox"] = [str(number) for number in annotation["bbox"]]
        annotation["iscrowd"] = "0"


def bare(content) -> None:
    """The least that can be left out."""
    for image in content["images"]:
        del image["width"], image["height"]
    for annotation in content["annotations"]:
        del annotation["id"], annotation["area"], annotation["iscrowd"], annotation["segmentation"]


def empty_masks(content) -> None:
    everywhere(content, "segmentation", [])
    everywhere(content, "area", 0)


def two_points(content) -> None:
    everywhere(content, "segmentation", [[1.0, 2.0, 3.0, 4.0]])


def windows(content) -> None:
    for image in content["images"]:
        image["file_name"] = f".\\inner\\{image['file_name']}"


def unboxed(content) -> None:
    everywhere(content, "bbox", [])


@pytest.mark.parametrize("change", [as_text, bare, empty_masks, two_points, windows, unboxed])
def test_what_tools_leave_out_or_write_otherwise(raw, folder, change):
    before = opened(raw)[0]
    drawn = [before.images[i][0].objects for i in range(len(before))]
    changed(folder, change)
    if change is windows:
        (folder / "train").rename(folder / "inner")
        (folder / "train").mkdir()
        (folder / "inner").rename(folder / "train" / "inner")
    train = opened(raw)[0]
    for i in range(len(train)):
        there, here = drawn[i], train.images[i][0].objects
        for key in ("boxes", "labels", "crowd", "areas"):
            np.testing.assert_allclose(getattr(here, key), getattr(there, key), atol=1e-4)
    assert about_objects(train) == about_objects(before)
    if change in (bare, empty_masks, two_points):
        with pytest.raises(DataError, match=r"train\.json has boxes and no masks, which mask_rcnn needs; set model"):
            opened(raw, **MASKS)


def test_boxes_without_area_or_outside_are_left_out_and_counted(raw, folder):
    boxes = [[5, 5, 0, 0], [5, 5, 7, 0], [-20, 3, 10, 10], [90, 3, 10, 10], [70, 40, 40, 40], [-0.5, 0, 12, 12]]

    def change(content):
        more = [{**entry(content), "id": 1000 + i, "bbox": box, "area": 1} for i, box in enumerate(boxes)]
        content["annotations"] += [*more, {**entry(content), "id": 2000, "iscrowd": 1}]
        for annotation in content["annotations"]:  # the crowd's, in COCO's own way
            if annotation["iscrowd"]:
                annotation["segmentation"] = {"size": [56, 80], "counts": [56, 112, 56 * 77]}

    changed(folder, change)
    for changes in ({}, MASKS):
        train = opened(raw, **changes)[0]
        objects = train.images[0][0].objects
        np.testing.assert_array_equal(objects.boxes[1:3], [[70, 40, 80, 56], [0, 0, 11.5, 12]])
        assert objects.crowd.tolist() == [False, False, False, True]
        assert train.counts.tally[:3] == (2, 2, 1)  # half a pixel is no mistake
        assert train.counts.crowds == 1
        assert about_objects(train).endswith(
            "1 image without objects; 1 group not trained on; 2 boxes without area left out; "
            "2 boxes outside the image left out; 1 box clipped at the image's edges"
        )
    np.testing.assert_array_equal(decode(objects.masks[-1:], 56, 80)[0].sum(0), [0, 56, 56, *[0] * 77])


def test_a_file_is_read_as_pycocotools_reads_it(raw, folder, capsys):
    def change(content):
        content["annotations"].append({**entry(content), "id": 900, "iscrowd": 1, "area": 9.5})
        content["annotations"][-1]["segmentation"] = {"size": [56, 80], "counts": [100, 50, 56 * 80 - 150]}
        entry(content)["segmentation"].append([70.0, 40.0, 79.0, 40.0, 79.0, 50.0])  # a second part

    changed(folder, change)
    train = opened(raw, **MASKS)[0]
    theirs = COCO(str(folder / "train.json"))
    for i, number in enumerate(theirs.getImgIds()):
        annotations = theirs.loadAnns(theirs.getAnnIds(number))
        photo, objects, name = train.images[i][0]
        assert Path(name).name == theirs.imgs[number]["file_name"]
        boxes = np.array([one["bbox"] for one in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(objects.boxes, boxes, atol=1e-5)
        assert objects.crowd.tolist() == [bool(one["iscrowd"]) for one in annotations]
        assert objects.areas.tolist() == [one["area"] for one in annotations]
        names = [theirs.cats[one["category_id"]]["name"] for one in annotations]
        assert [train.class_names[label] for label in objects.labels] == names
        for mask, one in zip(decode(objects.masks, photo.height, photo.width), annotations, strict=True):
            np.testing.assert_array_equal(mask, theirs.annToMask(one))


def test_what_was_counted_is_kept_until_something_changes(raw, folder, monkeypatch):
    counts = opened(raw)[0].counts
    looks = []
    real = DetectionImages.examine
    monkeypatch.setattr(DetectionImages, "examine", lambda self, i: looks.append(i) or real(self, i))
    again = opened(raw)[0].counts
    assert not looks
    assert {**vars(again), "objects": again.objects.tolist()} == {**vars(counts), "objects": counts.objects.tolist()}
    (folder / "train" / "00.png").touch()
    opened(raw)
    assert len(looks) == 12
    changed(folder, lambda c: entry(c).update(bbox=[5, 5, 9, 9]))
    opened(raw)
    assert len(looks) == 24
    opened(raw, **MASKS)
    assert len(looks) == 24 + 18


def test_a_few_missing_masks_are_counted(raw, folder):
    changed(folder, lambda c: [entry(c, i).update(segmentation=[]) for i in (2, 4)] and None)
    total = sum(len(things) for *_, things in scenes("train"))
    with pytest.raises(DataError, match=rf"2 objects of {total} without a mask, the first in .*/01\.png; mask_rcnn"):
        opened(raw, **MASKS)


def test_masks_of_run_lengths(raw, folder):
    """Compressed, as bytes in text, and not: the same masks as those of the polygons."""
    before = opened(raw, **MASKS)[0]

    def change(content):
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        for number, annotation in enumerate(content["annotations"]):
            height, width = sizes[annotation["image_id"]]
            runs = pycocotools.mask.frPyObjects(annotation["segmentation"], height, width)[0]
            counts = runs["counts"].decode()
            if number % 2:
                flat = pycocotools.mask.decode(runs).T.reshape(-1)
                edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
                counts = np.diff(np.concatenate([[0], edges])).tolist()
            annotation["segmentation"] = {"size": [height, width], "counts": counts}

    changed(folder, change)
    train = opened(raw, **MASKS)[0]
    for i in range(len(train)):
        photo, objects, _ = train.images[i][0]
        there = before.images[i][0].objects
        np.testing.assert_array_equal(*(decode(o.masks, photo.height, photo.width) for o in (objects, there)))


def test_categories_of_labelling_tools(raw, folder):
    """One that is above all others and has no objects is a class, but for one of the same name as another."""

    def above(name):
        return lambda content: content["categories"].insert(0, {"id": 0, "name": name, "supercategory": "none"})

    for split in ("train", "val"):
        changed(folder, above("things"), split)
    train, val = opened(raw)
    assert train.class_names == ["things", *NAMES]
    assert train.counts.objects[0] == 0
    assert "none of 1 class: things" in about_objects(train)
    for split in ("train", "val"):
        changed(folder, above("disc"), split)
    train, val = opened(raw)
    assert train.class_names == NAMES == val.class_names


def test_other_classes_in_validation(raw, folder, tmp_path):
    changed(folder, lambda content: content["categories"].append({"id": 50, "name": "star"}), "val")
    with pytest.raises(DataError, match=r"have other classes: .*val\.json alone has star; make them the same"):
        opened(raw)
    (tmp_path / "names.txt").write_text("triangle\ndisc\nsquare\n")
    listed = {"data__class_names": str(tmp_path / "names.txt")}
    train, val = opened(raw, **listed)
    assert train.class_names == val.class_names == ["triangle", "disc", "square"]
    thing = scenes("val")[0][2][0]
    assert val.images[0][0].objects.labels.tolist() == [(thing.label + 1) % 3]
    (tmp_path / "names.txt").write_text("triangle\ndisc\n")
    with pytest.raises(DataError, match=r"has objects of 1 class that the list of classes has not: square"):
        opened(raw, **listed)
    # other ids for the same names
    changed(folder, lambda c: (everywhere_id(c, 2, 40), None)[1], "val")
    train, val = opened(raw)
    assert val.class_names == NAMES
    assert val.images[0][0].objects.labels.tolist() == [thing.label for thing in scenes("val")[0][2]]


def everywhere_id(content, old: int, new: int) -> None:
    for category in content["categories"]:
        category["id"] = new if category["id"] == old else category["id"]
    for annotation in content["annotations"]:
        annotation["category_id"] = new if annotation["category_id"] == old else annotation["category_id"]


def test_files_that_are_no_json(raw, folder):
    for content, message in (
        (b"{", "not a JSON file in UTF-8"),
        (b"\xff\xfe{}", "not a JSON file"),
        (b"[" * 200_000, "nested too deeply"),
        (b"null", "not a COCO file, but nothing"),
    ):
        (folder / "train.json").write_bytes(content)
        with pytest.raises(DataError, match=message):
            opened(raw)
    (folder / "train.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(coco_content("train")).encode())
    assert len(opened(raw)[0]) == 12


def test_missing_and_damaged_images(raw, folder):
    (folder / "train" / "02.png").unlink()
    (folder / "train" / "05.png").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"02\.png: not a readable image .*; there are mistakes in 1 more image at least"
    ):
        opened(raw)
    config = configured(raw, data__on_error="skip")
    train = check_source(open_train_and_val(config)[0], True)
    assert train.counts.unreadable == 2
    assert about_objects(train).endswith("2 images unreadable")
    loader = train_loader(train, config, EpochSampler(12, 4), torch.device("cpu"), None)
    loader.batch_sampler.set_epoch(0)
    batches = list(loader)
    assert sorted(Path(s.name).name for batch in batches for s in batch.skipped) == ["02.png", "05.png"]
    assert [len(batch.images) for batch in batches] == [len(batch.targets) for batch in batches] == [4, 4, 4]
    for path in (folder / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.json: not one of its 12 images can be read"):
        check_source(open_train_and_val(config)[0], True)
    with pytest.raises(DataError, match=r"go on without such images: data\.on_error=skip"):
        list(train_loader(train, configured(raw), EpochSampler(12, 12), torch.device("cpu"), None))


def test_images_that_are_turned_by_exif(raw, folder):
    """Boxes are upright, unless the data has the size that the file has before it is turned."""
    turned = Image.Exif()
    turned[274] = 6  # turn it to the right by a quarter
    image = Image.open(folder / "train" / "00.png").copy()
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "train" / "00.png", exif=turned)
    train = opened(raw)[0]
    assert (train.counts.turned, train.images[0][0].photo.size) == (0, (80, 56))
    np.testing.assert_array_equal(np.asarray(train.images[0][0].photo), np.asarray(image))
    image.save(folder / "train" / "00.png", exif=turned)  # the size is that of the pixels as they are stored
    train = opened(raw)[0]
    assert train.counts.turned == 1
    np.testing.assert_array_equal(np.asarray(train.images[0][0].photo), np.asarray(image))
    assert about_objects(train).endswith("1 image not turned by EXIF, as the boxes are not")


# ------------------------------------------------------------------------------------------------------ where files lie


def moved(folder: Path, places: dict[str, str]) -> None:
    for before, after in places.items():
        (folder / after).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / before, folder / after)


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
    names = {"data__train_split": "Train", "data__val_split": "Validation"} if layout == "cvat" else {}
    train, val = opened(raw, **names)
    assert (len(train), len(val)) == (12, 6)
    if layout != "cvat":
        assert len(open_split(configured(raw), None)) == 6
        assert len(open_split(configured(raw), "train")) == 12


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
    again = open_split(configured(raw, data__holdout=0.25), None)
    assert [Path(again.images.name(i)).name for i in range(3)] == names[1]
    other = opened(raw, data__holdout=0.25, data__holdout_seed=1)[1]
    assert [Path(other.images.name(i)).name for i in range(3)] != names[1]


# ----------------------------------------------------------------------------------------------------------------- YOLO


def test_yolo_folders_of_every_kind(raw, tmp_path):
    root = write_yolo(tmp_path / "set")
    yaml = root / "data.yaml"
    names = "names: [disc, square, triangle]\nnc: 3\n"
    raw = at(raw, root, "yolo")
    for text in (
        f"train: ../images/train\nval: ../images/val\n{names}",  # Roboflow's
        f"path: /content/set\ntrain: images/train\nval: [images/val]\n{names}",
        f"train: train.txt\nval: images/val\n{names}",
        names,
    ):
        yaml.write_text(text)
        paths = [f"./images/train/{i:02}.png" for i in range(12)]
        (root / "train.txt").write_text("\n".join(paths) + "\n")
        train, val = opened(raw)
        assert (len(train), len(val), train.class_names) == (12, 6, NAMES)
        assert train.images[1][0].objects.labels.tolist() == [thing.label for thing in scenes("train")[1][2]]
    yaml.unlink()
    with pytest.raises(DataError, match=r"nothing names the classes; expected a data\.yaml with `names`"):
        opened(raw)
    (root / "classes.txt").write_text("disc\nsquare\ntriangle\n")
    assert len(opened(raw)[0]) == 12
    for split in ("train", "val"):  # Roboflow's folders
        moved(root, {f"images/{split}": f"{split}/images", f"labels/{split}": f"{split}/labels"})
    shutil.rmtree(root / "images")
    assert len(opened(raw)[1]) == 6


LINES = {
    "5 0.5 0.5 0.1 0.1": r"00\.txt, line 2: class 5, and there are 3 names, for 0 to 2",
    "-1 0.5 0.5 0.1 0.1": r"line 2: class -1",
    "0.5 0.5 0.5 0.1 0.1": r"line 2: class 0\.5",
    "disc 0.5 0.5 0.1 0.1": r"line 2: a number of it is 'disc', and no finite number",
    "0 0.5 0.5 0.1": r"line 2: 4 numbers; a line is a class, the box's middle",
    "0 0.5 0.5 0.1 0.1 0.9": r"line 2: 6 numbers",
    "0 0.5 0.5 0.1 nan": r"line 2: a number of it is 'nan'",
    "0 32 32 8 8": r"line 2: coordinates are shares of the image's sides",
    "0 0.5 0.5 -0.1 0.1": r"line 2: a box with a negative side",
}


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_line_of_yolo_is_named(raw, tmp_path, line):
    root = write_yolo(tmp_path / "set")
    with (root / "labels" / "train" / "00.txt").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=LINES[line]):
        opened(at(raw, root, "yolo"))


def test_yolo_boxes_at_the_edge_and_mixed_lines(raw, tmp_path):
    root = write_yolo(tmp_path / "set")
    (root / "labels" / "train" / "00.txt").write_text("1 1.0 0.5 0.5 0.5\n\n2 0.5 0.5 0 0.5\n")
    train = opened(at(raw, root, "yolo"))[0]
    np.testing.assert_allclose(train.images[0][0].objects.boxes, [[60, 14, 80, 42]])
    assert train.counts.tally[:3] == (1, 0, 1)
    with pytest.raises(DataError, match=r"1 object of .* without a mask, the first in .*images/train/00\.png"):
        opened(at(raw, root, "yolo"), **MASKS)


YAMLS = {
    "names: [a, b]\nnc: 3\n": r"`nc` is 3, and `names` has 2",
    "names: {0: a, 2: b}\n": r"`names` has 0, 2 for classes; they are 0, 1, 2",
    "names: disc\n": r"`names` is no list",
    "names: [a, a]\n": r"`names` has 'a' twice",
    "names: [disc, square, triangle]\ntrain: nowhere\nval: images/val\n": r"`train`: nowhere is not in",
    "names: [disc, square, triangle]\ntrain: ../../elsewhere\nval: images/val\n": r"elsewhere is not in",
    "names: [disc, square, triangle]\ntrain: images/train\nval: ''\n": r"has no validation split",
    "names: [disc, square, triangle]\ntrain: 5\nval: images/val\n": r"`train` is no path",
    "names: [disc, square, triangle]\ntrain: list.txt\nval: images/val\n": r"list\.txt, line 1: .* lies outside",
    "names: [": r"not valid YAML",
}


@pytest.mark.parametrize("text", YAMLS)
def test_a_wrong_data_yaml_is_named(raw, tmp_path, text):
    root = write_yolo(tmp_path / "set")
    (root / "data.yaml").write_text(text)
    (root / "list.txt").write_text("/etc/hosts\n")
    with pytest.raises(DataError, match=YAMLS[text]):
        opened(at(raw, root, "yolo"))


def test_yolo_images_without_any_labels(raw, tmp_path):
    root = write_yolo(tmp_path / "set")
    shutil.rmtree(root / "labels" / "val")
    with pytest.raises(DataError, match=r"not one of its 6 images has a text file of labels; that of .*labels/val/00"):
        opened(at(raw, root, "yolo"))


# ------------------------------------------------------------------------------------------------------------------ VOC


def test_voc_folders_of_every_kind(raw, tmp_path):
    for name, place in {"beside": "{}", "inner": "{}/images", "outer": "images/{}"}.items():
        root = tmp_path / name
        for split in ("train", "valid"):
            folder = root / place.format(split)
            save_images(folder, "train" if split == "train" else "val")
            inside = Path(str(folder).replace("/images", "/annotations"))
            inside.mkdir(parents=True, exist_ok=True)
            for file, image, things in scenes("train" if split == "train" else "val"):
                (inside / file).with_suffix(".xml").write_text(voc_text(image, things))
        train, val = opened(at(raw, root, "voc"))
        assert (len(train), len(val), train.class_names) == (12, 6, NAMES)
    (root / "classes.txt").write_text("triangle\ndisc\nsquare\n")
    assert opened(at(raw, root, "voc"))[0].class_names == ["triangle", "disc", "square"]


def test_what_is_difficult_is_a_group(raw, tmp_path):
    root = write_voc(tmp_path / "set")
    path = root / "Annotations" / "train_00.xml"
    path.write_text(path.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>"))
    train = opened(at(raw, root, "voc"))[0]
    assert train.images[0][0].objects.crowd.tolist() == [True]
    assert (train.counts.crowds, train.counts.empty) == (1, 2)
    pixels = TrainTransform(configured(raw))(train.images[0][0])
    assert len(pixels.target["boxes"]) == 0


XMLS = {
    ("<annotation>", '<!DOCTYPE a [<!ENTITY x "y">]><annotation>'): r"train_00\.xml: not an XML file \(a document type",
    ("<annotation>", "<annotation"): r"not an XML file",
    ("annotation>", "page>"): r"not a file of Pascal VOC: its outermost element is <page>",
    ("<bndbox>", "<polygon>x</polygon><box>"): r"not an XML file",
    ("xmin>", "left>"): r"object 1: xmin is '', and no finite number",
    ("<xmin>", "<xmin>9"): r"object 1 \(\w+\): from 9\d+, \d+ to",
    ("<name>", "<name> </name><name>"): r"object 1: has no <name>",
    ("<width>80", "<width>90"): r"an image of 80 x 56 pixels, and its boxes are for one of 90 x 56",
    ("<width>80", "<width>wide"): r"its width is 'wide', and no finite number",
}


@pytest.mark.parametrize("change", XMLS)
def test_a_wrong_xml_file_is_named(raw, tmp_path, change):
    root = write_voc(tmp_path / "set")
    path = root / "Annotations" / "train_00.xml"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(DataError, match=XMLS[change]) as raised:
        opened(at(raw, root, "voc"))
    assert len(raised.value.lines) == 1


def test_voc_files_that_are_missing(raw, tmp_path):
    root = write_voc(tmp_path / "set")
    (root / "Annotations" / "val_02.xml").unlink()
    with pytest.raises(DataError, match=r"val\.txt: val_02 has no XML file; one of an image without objects"):
        opened(at(raw, root, "voc"))
    (root / "JPEGImages" / "train_01.png").unlink()
    (root / "JPEGImages" / "train_04.png").unlink()
    with pytest.raises(DataError, match=r"train\.txt: train_01 has no image, as 1 other"):
        opened(at(raw, root, "voc"))
    shutil.rmtree(root / "Annotations")
    with pytest.raises(DataError, match="has no XML files"):
        opened(at(raw, root, "voc"))


# --------------------------------------------------------------------------------------------------------- Hugging Face


def write_rows(root: Path, objects: list, features=None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        images = [image for _, image, _ in scenes("train")[: len(objects)]]
        table = datasets.Dataset.from_dict({"image": images, "objects": objects}, features=features)
        table.to_parquet(root / f"{split}.parquet")
    return root


def test_hugging_face_sets_of_every_kind(raw, tmp_path):
    rows = [
        [{"boxes": [1.0, 2.0, 11.0, 22.0], "label": "b"}, {"boxes": [5.0, 5.0, 9.0, 9.0], "label": "a"}],
        [{"boxes": [0.0, 0.0, 64.0, 64.0], "label": "b"}],
    ]
    train = opened(at(raw, write_rows(tmp_path / "rows", rows), "hf"), data__box_format="xyxy")[0]
    assert train.class_names == ["a", "b"]
    objects = train.images[0][0].objects
    np.testing.assert_array_equal(objects.boxes, [[1, 2, 11, 22], [5, 5, 9, 9]])
    assert (objects.labels.tolist(), objects.areas.tolist()) == ([1, 0], [200, 16])
    assert train.images.name(1) == f"{tmp_path}/rows (train), row 1"
    numbers = [
        {"bbox": [[1, 2, 10, 20]], "category_id": [4], "iscrowd": [1], "area": [3.0]},
        {"bbox": [[1, 2, 10, 20]], "category_id": [2], "iscrowd": [0], "area": [7.0]},
    ]
    root = write_rows(tmp_path / "numbers", numbers)
    train = opened(at(raw, root, "hf"))[0]
    assert train.class_names == ["2", "4"]
    assert train.images[0][0].objects.crowd.tolist() == [True]
    assert train.images[1][0].objects.areas.tolist() == [7.0]
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    named = opened(at(raw, root, "hf"), data__class_names=str(tmp_path / "names.txt"))[0]
    assert named.images[0][0].objects.labels.tolist() == [4]
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"objects of class 4, and 3 names"):
        opened(at(raw, root, "hf"), data__class_names=str(tmp_path / "names.txt"))
    with pytest.raises(DataError, match=r"no column 'object' \(data\.objects_key\) \(did you mean 'objects'\?\)"):
        opened(at(raw, root, "hf"), data__objects_key="object")


ROWS = {
    "no box": ([{"category": [1]}], r"row 0, object 1: has category, and no box"),
    "no class": ([{"bbox": [[1, 2, 3, 4]]}], r"row 0: an object has bbox, and no class"),
    "lengths": (
        [{"bbox": [[1, 2, 3, 4]], "category": [1, 2]}],
        r"row 0: .* different lengths: 1 of bbox, 2 of category",
    ),
    "negative": ([{"bbox": [[1, 2, -3, 4]], "category": [1]}], r"row 0, object 1: a box of -3 x 4"),
    "text": (["disc"], r"row 0: its objects are no dictionary of lists"),
    "NaN": ([{"bbox": [[1.0, float("nan"), 3.0, 4.0]], "category": [1]}], r"object 1: the box's top is 'nan'"),
}


@pytest.mark.parametrize("what", ROWS)
def test_a_wrong_row_is_named(raw, tmp_path, what):
    rows, message = ROWS[what]
    with pytest.raises(DataError, match=message):
        opened(at(raw, write_rows(tmp_path / "set", rows), "hf"))


# --------------------------------------------------------------------------------------------------------- augmentation


def look(image: torch.Tensor) -> np.ndarray:
    """Returns the class of each pixel by its colour, -1 where it has none of them: (h, w)."""
    pixels = image.permute(1, 2, 0).numpy().astype(float)
    distance = np.abs(pixels[..., None, :] - COLOURS).max(-1)
    return np.where(distance.min(-1) < 40, distance.argmin(-1), -1)


@pytest.mark.parametrize(
    "augment",
    [
        {"crop": 1.0, "crop_scale": [0.4, 0.9], "hflip": 0.5, "vflip": 0.5, "short_sides": [48, 64, 100]},
        {"resize": "large_scale_jitter", "scale": [0.4, 2.5], "hflip": 0.5, "vflip": 0.5},
    ],
    ids=["multi_scale", "large_scale_jitter"],
)
def test_boxes_and_masks_stay_on_their_things(raw, augment):
    config = configured({**raw, "augment": augment}, data__img_size=[72, 96], **MASKS)
    train = opened(raw, data__img_size=[72, 96], **MASKS)[0]
    transform, seen, cut = TrainTransform(config), 0, 0
    for epoch in range(12):
        for index in range(len(train)):
            seed_all(Stream.IMAGE, 0, epoch, index)
            example = train.images[index][0]
            image, target = transform(example)
            boxes, labels, masks = target["boxes"], target["labels"], target["masks"]
            assert (image.dtype, masks.dtype, boxes.dtype) == (torch.uint8, torch.uint8, torch.float32)
            assert masks.shape == (len(boxes), *image.shape[1:])
            if "resize" in augment:
                assert image.shape == (3, 72, 96)
            else:
                assert max(image.shape[1:]) <= 96
                assert len(boxes) or index == NEGATIVE
            classes, inside = look(image), np.zeros(image.shape[1:], bool)
            for box, label, mask in zip(boxes.tolist(), labels.tolist(), masks.numpy(), strict=True):
                left, top, right, bottom = box
                assert 0 <= left < right <= image.shape[2]
                assert 0 <= top < bottom <= image.shape[1]
                rows, columns = (slice(max(0, int(a) - 1), int(b) + 2) for a, b in ((top, bottom), (left, right)))
                assert not np.delete(mask, np.s_[columns], axis=1).any()
                inside[rows, columns] |= True
                if mask.sum() > 60:
                    assert (classes[mask > 0] == label).mean() > 0.6
                    seen += 1
            assert not (classes[~inside] >= 0).any()
            cut += len(boxes) < len(example.objects)
    assert seen > 100
    assert cut > 3  # some objects are cut off


def test_objects_of_which_little_is_left_are_left_out(raw, folder):
    changed(folder, lambda c: entry(c).update(bbox=[20, 20, 1.2, 1.2], segmentation=[[20, 20, 22, 20, 22, 22, 20, 22]]))
    train = opened(raw, **MASKS)[0]
    for sides, left in (([56], 1), ([28], 0)):
        plain = {"short_sides": sides, "hflip": 0.0}
        target = TrainTransform(configured({**raw, "augment": plain}, **MASKS))(train.images[0][0]).target
        assert [len(target[key]) for key in ("boxes", "labels", "masks")] == [left] * 3


def test_the_shorter_side_and_the_longer_one(raw, folder):
    photo = Image.new("RGB", (200, 100))
    assert EvalTransform(64, 1000, 3).image(photo).shape == (3, 64, 128)
    assert EvalTransform(64, 96, 3).image(photo).shape == (3, 48, 96)
    assert EvalTransform(64, 96, 1).image(photo).shape == (1, 48, 96)
    batch = next(iter(eval_loader(opened(raw)[1], configured(raw), 1, 2, torch.device("cpu"), None)))
    assert batch.places == [1, 3]
    assert [Path(name).name for name in batch.names] == ["01.png", "03.png"]
    assert batch.sizes == [(64, 64), (56, 80)]
    assert [image.shape[1:] for image in batch.images] == [(64, 64), (64, 91)]
    np.testing.assert_allclose(batch.objects[0].boxes, [thing.box for thing in scenes("val")[1][2]])


def batches_of(raw, workers: int, first: int = 0, epoch: int = 1) -> list:
    config = configured(raw, data__workers=workers, data__img_size=64, **MASKS)
    train = open_train_and_val(config)[0]
    sampler = EpochSampler(len(train), 2, 2, seed=3)
    sampler.set_epoch(epoch, first)
    return list(train_loader(train, config, sampler, torch.device("cpu"), None))


@pytest.mark.parametrize("resize", ["multi_scale", "large_scale_jitter"])
def test_every_draw_is_a_function_of_its_place(raw, resize):
    raw = {**raw, "augment": {**raw["augment"], "resize": resize}}
    whole = batches_of(raw, 0)
    assert len(whole) == 6
    assert whole[0].images[0].dtype == torch.float32
    assert abs(float(whole[0].images[0].mean())) < 2
    for again in (batches_of(raw, 2), batches_of(raw, 0, first=2), batches_of(raw, 2, first=2)):
        for there, here in zip(whole[-len(again) :], again, strict=True):
            for image, other in zip(there.images, here.images, strict=True):
                torch.testing.assert_close(image, other, rtol=0, atol=0)
            for target, other in zip(there.targets, here.targets, strict=True):
                assert target.keys() == other.keys() == {"boxes", "labels", "masks"}
                assert all(torch.equal(target[key], other[key]) for key in target)
    assert any(
        not torch.equal(a.images[0], b.images[0])
        for a, b in zip(whole, batches_of(raw, 0, epoch=0), strict=True)
        if a.images[0].shape == b.images[0].shape
    )


def test_grey_images_and_16_bits(raw, folder):
    values = np.linspace(0, 65535, 56 * 80).reshape(56, 80).astype(np.uint16)
    Image.fromarray(values).save(folder / "train" / "00.png")
    train = opened(raw, data__mean=[0.5], data__std=[0.5])[0]
    photo = train.images[0][0].photo
    assert (photo.mode, photo.getextrema()[0]) == ("RGB", (0, 255))
    config = configured(raw, data__mean=[0.5], data__std=[0.5])
    assert TrainTransform(config)(train.images[0][0]).image.shape[0] == 1


def test_keys_that_do_not_go_together(raw):
    for changes, message in (
        ({"data__source": "yolo", "data__val_images": "x"}, "data.val_images: only with data.source coco"),
        ({"data__absolute_paths": True}, "data.absolute_paths: only with data.source hf"),
        ({"data__short_side": 100}, "data.short_side: above data.long_side"),
        ({"augment__crop_scale": [0.9, 0.5]}, "augment.crop_scale: the first number"),
        ({"augment__crop_scale": [0.5, 1.5]}, "augment.crop_scale: shares of the image"),
        ({"augment__resize": "large_scale_jitter"}, "augment.resize: large_scale_jitter makes images of data.img_size"),
        ({"augment__short_sides": [64, 100]}, "augment.short_sides: 100 is above data.long_side"),
    ):
        found = configured(raw, **changes).conflicts()
        assert any(re.match(re.escape(message), text) for text in found), found
    assert not configured(raw).conflicts()
