"""Links: an image is found once, under its own class, or the run stops."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest
from PIL import Image

from conv2former import DataError
from conv2former.config.schema import DataConfig
from conv2former.data import open_train_and_val, open_val
from conv2former.data.files import find_files
from conv2former.data.tars import find_tars

from .test_tars import pairs
from .test_tars import write as write_tar


def fill(folder: Path, count: int, red: int = 0) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (4, 4), (red, i, 0)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def photos(tmp_path):
    """Class folders, of the red value 0, 100 and 200."""
    for number, name in enumerate(("cat", "dog", "emu")):
        fill(tmp_path / "photos" / name, 5, 100 * number)
    return tmp_path / "photos"


def config(root, **kwargs) -> DataConfig:
    return DataConfig(**{"root": str(root), "holdout": 0.4} | kwargs)


def colours(*sources) -> list[tuple[tuple[int, ...], str]]:
    """Returns every image by its colour, with its class, sorted."""
    images = [(source, *source.images[i]) for source in sources for i in range(len(source))]
    return sorted((image.getpixel((0, 0)), source.class_names[label]) for source, image, label in images)


def check_whole(root) -> str:
    train, val = open_train_and_val(config(root))
    found = colours(train, val)
    assert len(found) == len(set(found)) == 15
    assert {(colour[0], name) for colour, name in found} == {(0, "cat"), (100, "dog"), (200, "emu")}
    return find_note(root)


def find_note(root) -> str:
    return open_val(config(root, val_split=".", holdout=None), None).note


def refused(settings: DataConfig, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        open_train_and_val(settings)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("cat/all", ".."),
        ("cat/deep/er/all", "../../.."),
        ("cat/all", "../.."),  # above the data's root
        ("cat/deep/loop", ".."),
        ("cat/self", "."),
    ],
)
def test_a_link_to_a_folder_above_is_not_followed(photos, link, target):
    (photos / link).parent.mkdir(parents=True, exist_ok=True)
    (photos / link).symlink_to(target)
    assert f"not followed in {photos}: 1 link to a folder above, {photos / link}" in check_whole(photos)
    assert len(find_files(photos).paths) == 15


def test_a_way_up_through_a_folder_elsewhere(photos, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "back").symlink_to(photos)
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    (photos / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    assert "2 links to a folder above" in check_whole(photos)


def test_links_to_what_a_class_has_already(photos, tmp_path):
    os.rename(photos / "cat" / "4.png", tmp_path / "4.png")
    for name in ("4.png", "again.png"):
        (photos / "cat" / name).symlink_to(tmp_path / "4.png")
    (photos / "cat" / "first.png").symlink_to("0.png")
    assert "2 links to images that the class has already" in check_whole(photos)
    fill(tmp_path / "more", 2, 7)
    for name in ("a", "b"):
        (photos / "cat" / name).symlink_to(tmp_path / "more")
    assert len(find_files(photos / "cat").paths) == 7


@pytest.mark.parametrize(
    ("link", "target", "expected"),
    [
        ("cat/more", "../dog", "photos/dog and .*photos/cat/more|photos/cat/more and .*photos/dog"),
        ("cat/deep/more", "../../dog", "are the same by a link, so that images would be of two classes"),
        ("kitten", "cat", "photos/cat and .*photos/kitten are the same by a link"),
        ("all", ".", "photos/all: a link to a folder above it, where the images of all classes are; remove it"),
        ("everything", "..", "photos/everything: a link to a folder above it"),
        ("cat/other.png", "../dog/0.png", "photos/dog/0.png and .*cat/other.png are the same by a link"),
    ],
)
def test_an_image_of_two_classes_stops_the_run(photos, link, target, expected):
    (photos / link).parent.mkdir(parents=True, exist_ok=True)
    (photos / link).symlink_to(target)
    refused(config(photos), expected)


def test_one_file_elsewhere_under_two_classes(photos, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "blob", "PNG")
    for name in ("cat", "dog"):
        (photos / name / "linked.png").symlink_to(tmp_path / "blob")
    refused(config(photos), "cat/linked.png and .*dog/linked.png are the same by a link")


def test_class_folders_splits_and_images_on_other_disks(tmp_path):
    """Links as they should be."""
    for split in ("train", "val"):
        disk = tmp_path / f"disk of {split}"
        fill(disk / "cat", 3, 1)
        blobs = fill(tmp_path / f"blobs of {split}", 3, 2)
        (disk / "dog").mkdir()
        for i in range(3):
            (disk / "dog" / f"{i}.png").symlink_to(os.path.relpath(blobs / f"{i}.png", disk / "dog"))
        fill(tmp_path / f"another disk of {split}", 2, 3)
        (disk / "emu").symlink_to(tmp_path / f"another disk of {split}")
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(disk)
    for source in open_train_and_val(config(tmp_path / "data", holdout=None)):
        assert [(colour[0], name) for colour, name in colours(source)] == (
            [(1, "cat")] * 3 + [(2, "dog")] * 3 + [(3, "emu")] * 2
        )
        assert source.note == ""


def test_the_same_images_in_both_splits(photos, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    os.rename(photos, root / "train")
    (root / "val").symlink_to("train")
    refused(config(root, holdout=None), r"train and .*val have 15 images in common: .*val/cat/0.png.*; remove them")
    (root / "val").unlink()
    for name in ("cat", "dog", "emu"):
        fill(root / "val" / name, 1, 50)
    (root / "val" / "cat" / "more").symlink_to(root / "train" / "cat")
    refused(config(root, holdout=None), "have 5 images in common")
    (root / "val" / "cat" / "more").unlink()
    (root / "val" / "cat" / "one.png").symlink_to(root / "train" / "cat" / "0.png")
    refused(config(root, holdout=None), "have 1 image in common: .*val/cat/one.png")


def test_tables(photos, tmp_path):
    """A table names its images, so links in it are compared, too."""
    (photos / "by").symlink_to("cat")
    rows = ["image,label,split", "cat/0.png,cat,train", "dog/0.png,dog,train"]
    table = tmp_path / "list.csv"
    settings = config(photos, source="csv", csv=str(table), holdout=None)
    for row, expected in (
        ("by/0.png,cat,val", "have 1 image in common: .*by/0.png"),
        ("by/0.png,dog,train", "line 4: by/0.png is by a link the image of line 2, cat/0.png, .* another label, 'cat'"),
    ):
        table.write_text("\n".join([*rows, row, "dog/1.png,dog,val"]))
        refused(settings, expected)
    table.write_text("\n".join([*rows, "by/0.png,cat,train", "dog/1.png,dog,val", "cat/1.png,cat,val"]))
    train, val = open_train_and_val(settings)
    assert (len(train), len(val)) == (2, 2)
    assert "1 row whose image is by a link that of another row" in train.note


def test_tars(tmp_path):
    write_tar(tmp_path / "train" / "a.tar", pairs(0, 1))
    write_tar(tmp_path / "val" / "b.tar", pairs(0, 1))
    (tmp_path / "train" / "up").symlink_to("..")
    (tmp_path / "train" / "again.tar").symlink_to("a.tar")
    (tmp_path / "train" / "more").symlink_to("../val")
    assert find_tars(tmp_path)["train"] == [str(tmp_path / "train" / "a.tar")]
    train, val = open_train_and_val(config(tmp_path, source="wds", holdout=None))
    assert (len(train), len(val)) == (2, 2)


def test_hugging_face_image_folders(photos, tmp_path):
    """`datasets` follows links to files."""
    os.mkdir(tmp_path / "data")
    os.rename(photos, tmp_path / "data" / "train")
    for name in ("cat", "dog", "emu"):
        fill(tmp_path / "data" / "val" / name, 1, 50)
    link = tmp_path / "data" / "val" / "cat" / "linked.png"
    link.symlink_to("../../train/cat/0.png")
    settings = config(tmp_path / "data", source="hf", holdout=None)
    if len(datasets.load_dataset(str(tmp_path / "data"), split="validation")) == 3:
        pytest.skip("this version of `datasets` leaves links out")
    refused(settings, "have 1 image in common: .*val/cat/linked.png")
    link.unlink()
    (tmp_path / "data" / "train" / "dog" / "linked.png").symlink_to("../cat/0.png")
    refused(settings, r"cat/0.png and .*dog/linked.png are the same image by a link|dog/linked.png and .*cat/0.png")


def test_a_file_that_cannot_be_followed(photos):
    (photos / "cat" / "a.png").symlink_to("b.png")
    (photos / "cat" / "b.png").symlink_to("a.png")
    assert len(find_files(photos / "cat").paths) == 7  # two that will be named as unreadable
