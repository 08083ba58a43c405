"""YOLO, Pascal VOC and Hugging Face sets, and what is wrong with one, by its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from conv2former import DataError
from conv2former.tasks.detection.augment import TrainTransform

from .conftest import (
    MASKS,
    NAMES,
    at,
    configured,
    moved,
    opened,
    save_images,
    scenes,
    voc_text,
    write_voc,
    write_yolo,
)

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
