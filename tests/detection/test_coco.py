"""COCO's files as labelling tools write them, and what is wrong with one, by its name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from conv2former import DataError
from conv2former.data import EpochSampler
from conv2former.tasks.detection.check import about_objects, check_source
from conv2former.tasks.detection.images import DetectionImages
from conv2former.tasks.detection.loader import train_loader
from conv2former.tasks.detection.shapes import decode
from conv2former.tasks.detection.sources import open_split, open_train_and_val

from .conftest import (
    MASKS,
    NAMES,
    changed,
    coco_content,
    configured,
    entry,
    opened,
    scenes,
)


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
        lambda c: [image.update(file_name=f"x/y{image['file_name']}") for image in c["images"]],
        r"none of its 12 images, such as x/y00\.png, is in .*data\.train_images",
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
    """What tools write that have no numbers, and no order."""
    content["categories"].reverse()
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
            "1 image without objects; 1 group (iscrowd or difficult) not trained on; 2 boxes without area left out; "
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
    with pytest.raises(DataError, match=r"01\.png: 1 of its objects has no mask"):  # of a split that was not checked
        open_split(configured(raw, **MASKS), "train").images[1]
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


def test_a_polygon_that_reaches_far_out(raw, folder):
    """An outline costs pycocotools memory for each of its pixels, wherever they are."""
    far = [[-1e12, 10, 1e12, 10, 1e12, 20, -1e12, 20]]
    changed(folder, lambda c: entry(c).update(segmentation=far, bbox=[-1e12, 10, 2e12, 10]))
    photo, objects, _ = opened(raw, **MASKS)[0].images[0][0]
    assert objects.boxes[0].tolist() == [0, 10, 80, 20]
    assert decode(objects.masks[:1], photo.height, photo.width)[0, 10:20].all()


def test_categories_of_labelling_tools(raw, folder):
    """One without objects is a class, but for a heading, and for one of the same name as another."""

    def above(name):
        return lambda content: content["categories"].insert(0, {"id": 0, "name": name, "supercategory": name})

    def heading(content, used=False):
        for category in content["categories"]:
            category["supercategory"] = "things"
        above("things")(content)
        entry(content)["category_id"] = 0 if used else entry(content)["category_id"]

    for split in ("train", "val"):
        changed(folder, above("things"), split)
    train, val = opened(raw)
    assert train.class_names == ["things", *NAMES]
    assert train.counts.objects[0] == 0
    assert "none of 1 class: things" in about_objects(train)
    for change in (heading, above("_background_")):
        for split in ("train", "val"):
            changed(folder, change, split)
        train, val = opened(raw)
        assert train.class_names == NAMES == val.class_names
        assert train.images[0][0].objects.labels.tolist() == [scenes("train")[0][2][0].label]
    changed(folder, lambda content: heading(content, used=True))
    changed(folder, heading, "val")
    assert opened(raw)[1].class_names == ["things", *NAMES]
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
    with pytest.raises(DataError, match=r"has objects of 1 class that the list of classes \(.*\) has not: square"):
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
        (b'{"0.png123": {"filename": "0.png", "regions": []}}', "it looks like a file of the VGG annotator"),
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
