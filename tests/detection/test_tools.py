"""Data sets as labelling tools export them, with the paths and the names that these give."""

from __future__ import annotations

import shutil

import pytest

from conv2former import DataError
from conv2former.tasks.detection.sources import open_split

from .conftest import NAMES, at, changed, configured, moved, opened, write_voc, write_yolo
from .test_coco import everywhere

STUDIO = ("../../label-studio/data/media/upload/4/", "..\\..\\label-studio\\media\\upload\\4\\", "images\\1/", "/data/")


@pytest.mark.parametrize("prefix", STUDIO)
def test_paths_of_label_studio(raw, folder, prefix):
    """They may be of its own server; then images are found by their names."""

    def prefixed(content):
        for image in content["images"]:
            image["file_name"] = f"{prefix}{image['file_name']}"

    changed(folder, prefixed)
    (folder / "val.json").unlink()
    shutil.rmtree(folder / "val")
    moved(folder, {"train.json": "result.json", "train": "images"})
    train, val = opened(raw, data__holdout=0.25)
    assert (len(train), len(val)) == (9, 3)
    assert {str(folder / "images")} == {name.rpartition("/")[0] for name in train.images.records.paths}


def test_names_that_come_twice_do_not_lead_to_images(raw, folder):
    def prefixed(content):
        for place, image in enumerate(content["images"]):
            image["file_name"] = f"elsewhere/{place}/{'00.png' if place < 2 else image['file_name']}"

    changed(folder, prefixed)
    with pytest.raises(DataError, match=r"none of its 12 images, such as elsewhere/0/00\.png, is in .*; give their"):
        opened(raw)


@pytest.mark.parametrize(
    ("file", "images"), [("annotations/instances.json", "images"), ("labels.json", "data"), ("annotations.json", ".")]
)
def test_a_coco_file_in_each_split_s_folder(raw, folder, file, images):
    """As Supervisely and FiftyOne have it."""
    for split in ("train", "val"):
        moved(folder, {split: "photos", f"{split}.json": f"{split}/{file}"})
        moved(
            folder, {str(path.relative_to(folder)): f"{split}/{images}/{path.name}" for path in folder.glob("photos/*")}
        )
        (folder / "photos").rmdir()
    assert [len(split) for split in opened(raw)] == [12, 6]


def test_objects_that_are_all_groups(raw, folder):
    """CVAT writes so what was drawn with its brush."""
    changed(folder, lambda content: everywhere(content, "iscrowd", 1))
    with pytest.raises(DataError, match=r"all 23 objects stand for groups, .*iscrowd is 1 .*; set it to 0 where"):
        opened(raw)


# ----------------------------------------------------------------------------------------------------------------- YOLO


LISTED = "names: [disc, square, triangle]\n"
MOVED = (
    f"train: /content/pets/images/train\nval: C:\\Users\\me\\images\\val\n{LISTED}",
    f"path: /content/pets\ntrain: train.txt\nval: ../../images/val\n{LISTED}",
    f"Train: images/train\nValidation: images/val\n{LISTED}",
)


@pytest.mark.parametrize("text", MOVED)
def test_a_yaml_file_of_another_machine(raw, tmp_path, text):
    root = write_yolo(tmp_path / "set")
    (root / "data.yaml").write_text(text)
    (root / "train.txt").write_text("".join(f"/content/pets/images/train/{i:02}.png\n" for i in range(12)))
    for place in (root, root / "data.yaml"):  # Ultralytics is given the file
        train, val = opened(at(raw, place, "yolo"))
        assert (len(train), len(val), train.counts.empty) == (12, 6, 1)


def test_a_path_that_is_not_there_is_not_taken_for_another(raw, tmp_path):
    root = write_yolo(tmp_path / "set")
    moved(root, {"images/train": "train"})
    with pytest.raises(DataError, match=r"`train`: images/train is not in"):
        opened(at(raw, root, "yolo"))


def test_darknet_s_files(raw, tmp_path):
    """CVAT's YOLO 1.1, whose paths may begin with a folder `data` that is not there."""
    root = write_yolo(tmp_path / "set", masks=False)
    (root / "data.yaml").unlink()
    places = {f"{kind}/train/{i:02}.{end}": f"obj_train_data/{i:02}.{end}" for i in range(12) for kind, end in KINDS}
    moved(root, {before: after for before, after in places.items() if (root / before).exists()})
    (root / "obj.names").write_text("disc\nsquare\ntriangle\n")
    (root / "obj.data").write_text("classes = 3\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    (root / "train.txt").write_text("".join(f"data/obj_train_data/{i:02}.png\n" for i in range(12)))
    train, val = opened(at(raw, root, "yolo"), data__holdout=0.25)
    assert (len(train), len(val), train.class_names) == (9, 3, NAMES)
    assert train.counts.objects.sum() + val.counts.objects.sum() == 23


KINDS = (("images", "png"), ("labels", "txt"))


def test_labelimg_lists_the_classes_in_each_folder(raw, tmp_path):
    root = write_yolo(tmp_path / "set")
    (root / "data.yaml").unlink()
    for split in ("train", "val"):
        (root / "labels" / split / "classes.txt").write_text("disc\nsquare\ntriangle\n")
    assert opened(at(raw, root, "yolo"))[0].class_names == NAMES
    (root / "labels" / "val" / "classes.txt").write_text("square\ndisc\ntriangle\n")
    with pytest.raises(
        DataError, match=r"train/classes\.txt and .*val/classes\.txt list other classes; give the right"
    ):
        opened(at(raw, root, "yolo"))


def test_poses_are_refused(raw, tmp_path):
    root = write_yolo(tmp_path / "set")
    with (root / "data.yaml").open("a") as file:
        file.write("kpt_shape: [17, 2]\n")
    with pytest.raises(DataError, match=r"data\.yaml: `kpt_shape` says that labels are poses, which are not read"):
        opened(at(raw, root, "yolo"))


# ------------------------------------------------------------------------------------------------------------------ VOC


def test_a_set_in_a_vocdevkit(raw, tmp_path):
    write_voc(tmp_path / "VOCdevkit" / "VOC2012")
    raw = at(raw, tmp_path / "VOCdevkit", "voc")
    assert [len(split) for split in opened(raw)] == [12, 6]
    write_voc(tmp_path / "VOCdevkit" / "VOC2007")
    with pytest.raises(
        DataError, match=r"has VOC2007, VOC2012, each a set of its own; choose one: data\.root=.*VOC2007"
    ):
        opened(raw)


def test_the_only_list_of_a_voc_set(raw, tmp_path):
    """CVAT calls it default."""
    root = write_voc(tmp_path / "set")
    (root / "ImageSets" / "Main" / "val.txt").unlink()
    moved(root, {"ImageSets/Main/train.txt": "ImageSets/Main/default.txt"})
    raw = at(raw, root, "voc")
    assert [len(split) for split in opened(raw, data__holdout=0.25)] == [9, 3]
    assert len(open_split(configured(raw), None)) == 12
