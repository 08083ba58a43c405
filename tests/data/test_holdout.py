from __future__ import annotations

import os
import random
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from conv2former import DataError
from conv2former.config import check_config
from conv2former.config.schema import DataConfig
from conv2former.data import open_train_and_val, open_val
from conv2former.data.holdout import fingerprint, held_out, relative_names
from conv2former.data.sources import open_split

SIZES = {"ant": 1, "bee": 2, "cat": 10, "dog": 33}


def fill(root, sizes=SIZES) -> None:
    for name, count in sizes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (i, i, i)).save(root / name / f"{i}.png")


@pytest.fixture
def bare(tmp_path):
    fill(tmp_path / "photos")
    return tmp_path / "photos"


def config(root, **kwargs) -> DataConfig:
    return DataConfig(**{"root": str(root), "holdout": 0.2} | kwargs)


def names_of(source, root) -> list[str]:
    return relative_names(source.images, str(root))


def per_class(source) -> list[int]:
    return np.bincount(source.images.labels, minlength=len(source.class_names)).tolist()


def refused(settings: DataConfig, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        open_train_and_val(settings)


@pytest.mark.parametrize(("share", "expected"), [(0.2, [0, 1, 2, 7]), (0.5, [0, 1, 5, 17]), (0.01, [0, 1, 1, 1])])
def test_a_share_of_each_class(bare, share, expected):
    train, val = open_train_and_val(config(bare, holdout=share))
    assert train.class_names == val.class_names == list(SIZES)
    assert per_class(val) == expected
    assert [a + b for a, b in zip(per_class(train), per_class(val), strict=True)] == list(SIZES.values())
    assert not set(names_of(train, bare)) & set(names_of(val, bare))
    assert all(val.images[i][0].size == (4, 4) for i in range(len(val)))
    assert [val.images[i][1] for i in range(len(val))] == val.images.labels.tolist()
    assert (
        f"{sum(expected)} images of 46 held out, about {100 * share:g} % of each class (data.holdout, seed 0)"
        in val.note
    )
    assert "none of 1 class with a single image: ant" in val.note


def test_a_function_of_seed_and_name_alone(bare, tmp_path):
    names = [f"{name}/{i}.png" for name, count in SIZES.items() for i in range(count)]
    labels = np.repeat(np.arange(4), list(SIZES.values()))
    chosen = {name for name, is_out in zip(names, held_out(names, labels, 0.2, 7), strict=True) if is_out}
    order = random.Random(0).sample(range(46), 46)
    shuffled, its_labels = [names[i] for i in order], 3 - labels[order]  # classes in another order, too
    again = {name for name, is_out in zip(shuffled, held_out(shuffled, its_labels, 0.2, 7), strict=True) if is_out}
    assert chosen == again
    _, val = open_train_and_val(config(bare, holdout_seed=7))
    assert set(names_of(val, bare)) == chosen
    shutil.move(bare, tmp_path / "On another disk")
    _, moved = open_train_and_val(config(tmp_path / "On another disk/.", holdout_seed=7))
    assert set(names_of(moved, tmp_path / "On another disk")) == chosen
    assert moved.sha256 == val.sha256
    _, other = open_train_and_val(config(tmp_path / "On another disk", holdout_seed=8))
    assert set(names_of(other, tmp_path / "On another disk")) != chosen
    assert other.sha256 != val.sha256


def test_known_values():
    """A run of today and an evaluation in a year must hold out the same."""
    names = [f"cat/{i}.png" for i in range(10)]
    assert np.flatnonzero(held_out(names, np.zeros(10, int), 0.3, 0)).tolist() == [1, 6, 9]
    assert fingerprint(["b", "a"], ["x", "y"]) == fingerprint(["a", "b"], ["y", "x"])
    assert fingerprint(["a", "b"], ["x", "y"]) == "a6ae7ff037f35d85e664e0ae03b54b0780b00c1f0ae7e241ae2be98fda86b44b"


def test_a_working_directory_as_root(bare, monkeypatch):
    _, there = open_train_and_val(config(bare))
    monkeypatch.chdir(bare)
    _, here = open_train_and_val(config("."))
    assert here.sha256 == there.sha256
    monkeypatch.chdir(bare.parent)
    _, relative = open_train_and_val(config("./photos/"))
    assert relative.sha256 == there.sha256


def test_all_sources_divide(bare, tmp_path):
    _, by_root = open_train_and_val(config(bare))
    whole = tmp_path / "whole"
    shutil.copytree(bare, whole / "train")
    train, val = open_train_and_val(config(whole))
    assert (len(train), len(val)) == (36, 10)
    lines = [f"{name}/{i}.png {name}\n" for name, count in SIZES.items() for i in range(count)]
    (tmp_path / "list.txt").write_text("".join(reversed(lines)))
    _, listed = open_train_and_val(config(bare, source="csv", csv=str(tmp_path / "list.txt")))
    assert listed.sha256 == by_root.sha256  # the names are the same
    hf = tmp_path / "hf"
    hf.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(20)], "label": [i % 2 for i in range(20)]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(hf / "train.parquet")
    train, val = open_train_and_val(config(hf, source="hf"))
    assert per_class(train) == [8, 8]
    assert per_class(val) == [2, 2]
    reds = [{source.images[i][0].getpixel((0, 0))[0] for i in range(len(source))} for source in (train, val)]
    assert sorted(reds[0] | reds[1]) == list(range(20))
    from .test_tars import pairs
    from .test_tars import write as write_tar

    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "mine-train-0.tar", pairs(*[i % 2 for i in range(20)]))
    train, val = open_train_and_val(config(tmp_path / "tars", source="wds"))
    assert (per_class(train), per_class(val)) == ([8, 8], [2, 2])
    write_tar(tmp_path / "tars" / "mine-vla-0.tar", pairs(0, 1))
    refused(config(tmp_path / "tars", source="wds"), "nothing is held out .* where there is more than 'train'")


def test_where_there_is_a_validation_split_nothing_is_held_out(bare, tmp_path):
    whole = tmp_path / "whole"
    for split in ("train", "test"):
        shutil.copytree(bare, whole / split)
    train, val = open_train_and_val(config(whole))
    assert (len(train), len(val), val.sha256) == (46, 46, "")


def test_without_it_nothing_is_held_out(bare, tmp_path):
    refused(config(bare, holdout=None), "class folders and no split 'train'; data.holdout=0.2 holds a fifth")
    shutil.copytree(bare, tmp_path / "whole" / "train")
    refused(config(tmp_path / "whole", holdout=None), "no validation split.*; data.holdout=0.2 holds a fifth")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train", "vla"), r"no validation split: .*: if one of them is, name it .*give data.root=.*/data/train"),
        (("train", "extra"), r"nothing is held out \(data.holdout\) where there is more than 'train'"),
        (("trian", "vla"), r"no split 'train' \(did you mean 'trian'\?\)"),
        (("trian", "val"), r"no split 'train' \(did you mean 'trian'\?\)"),
        (("trian",), r"no split 'train' \(did you mean 'trian'\?\)"),
        (("Train", "Val"), r"no split 'train' \(did you mean 'Train'\?\)"),
    ],
)
def test_a_misspelt_split_is_no_class(bare, tmp_path, names, expected):
    for name in names:
        shutil.copytree(bare, tmp_path / "data" / name)
    refused(config(tmp_path / "data"), expected)
    if "train" in names:
        return
    shutil.copy(bare / "dog" / "0.png", tmp_path / "data" / names[0] / "stray.png")  # so that it looks like a class
    refused(config(tmp_path / "data"), f"no split 'train'|{names[0]}: a class, or a misspelt split")


def test_names_that_are_given_must_exist(bare, tmp_path):
    refused(config(bare, train_split="training"), "no split 'training'")
    shutil.copytree(bare, tmp_path / "whole" / "train")
    (tmp_path / "whole" / "notes").mkdir()
    (tmp_path / "whole" / "notes" / "a.txt").write_text("no images, so no split")
    refused(config(tmp_path / "whole", val_split="val"), "no split 'val'")
    assert len(open_train_and_val(config(tmp_path / "whole"))[1]) == 10


def test_what_cannot_be_divided(tmp_path):
    fill(tmp_path / "one", {"cat": 5})
    refused(config(tmp_path / "one"), "one: all 5 images are of one class, 'cat'; a classifier needs two")
    fill(tmp_path / "lone", {"cat": 1, "dog": 1})
    refused(config(tmp_path / "lone"), r"lone: no class has two images, so none can be held out")
    hf = tmp_path / "hf"
    hf.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": [Image.new("RGB", (4, 4))] * 4, "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(hf / "train.parquet")
    stream = config(hf, source="hf", streaming=True, epoch_images=4)
    refused(stream, "of a stream nothing can be held out")
    with pytest.raises(DataError, match="of a stream nothing can be held out"):
        open_val(stream, None)


def test_an_evaluation_sees_what_was_held_out_or_nothing(bare):
    """By the fingerprint that training puts into the configuration."""
    _, val = open_train_and_val(config(bare))
    of_run = config(bare, holdout_sha256=val.sha256)
    again = open_val(of_run, ["dog", "cat", "bee", "ant"])
    assert names_of(again, bare) == names_of(val, bare)
    assert [again.class_names[i] for i in again.images.labels] == [val.class_names[i] for i in val.images.labels]
    changed = r"photos: the images have changed.*split.csv in the run folder"
    first = os.path.join(bare, names_of(val, bare)[-1])
    os.rename(first, f"{first}.gone")
    with pytest.raises(DataError, match=changed):
        open_val(of_run, val.class_names)
    refused(of_run, changed)
    os.rename(f"{first}.gone", first)
    assert len(open_val(of_run, val.class_names)) == 10
    for i in range(100, 120):
        Image.new("RGB", (4, 4)).save(bare / "cat" / f"{i}.png")
    refused(of_run, changed)


def test_a_file_name_that_is_not_utf_8(bare):
    os.rename(os.fsencode(bare / "cat" / "0.png"), os.fsencode(bare / "cat") + b"/\xff.png")
    train, val = open_train_and_val(config(bare))
    assert len(train) + len(val) == 46


def test_names_below_the_root_where_a_class_begins_like_it(tmp_path, monkeypatch):
    for root in ("flowers", "elsewhere"):
        for name in ("flowers_blue", "flowers"):
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8)).save(tmp_path / root / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    found = []
    for root in ("flowers", "elsewhere", str(tmp_path / "flowers")):
        images = open_split(check_config({"data": {"root": root}}, "").data, ".").images
        found.append(relative_names(images, root))
    assert found[0] == ["flowers/0.png", "flowers/1.png", "flowers_blue/0.png", "flowers_blue/1.png"]
    assert found[1] == found[2] == found[0]
