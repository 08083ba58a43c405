"""Which images are trained on and which validate, where folders and tables leave that open."""

from __future__ import annotations

import shutil

import datasets
import pytest
from PIL import Image

from conv2former import ConfigError, DataError
from conv2former.config import check_config
from conv2former.config.schema import DataConfig
from conv2former.data import open_train_and_val, open_val
from conv2former.data.sources import is_bare

from .test_tars import pairs
from .test_tars import write as write_tar


def fill(folder, count: int = 4, ending: str = "png") -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i}.{ending}", "PNG")


def config(root, **kwargs) -> DataConfig:
    return DataConfig(**{"root": str(root), "holdout": 0.25} | kwargs)


def sizes(settings: DataConfig) -> tuple[int, int]:
    return tuple(map(len, open_train_and_val(settings)))


def refused(settings: DataConfig, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as error:
        open_train_and_val(settings)
    assert "\n" not in str(error.value)


def save(root, **labels) -> None:
    """Saves splits of integer labels of two named classes as a Hugging Face data set."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    root.mkdir()
    for split, values in labels.items():
        columns = {"image": [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(len(values))], "label": values}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(root / f"{split}.parquet")


def test_class_folders_whose_images_all_lie_deeper(tmp_path):
    for name in ("cat", "dog"):
        fill(tmp_path / name / "2024" / "may")
    assert is_bare(tmp_path)
    train, val = open_train_and_val(config(tmp_path))
    assert (train.class_names, len(train), len(val)) == (["cat", "dog"], 6, 2)
    refused(config(tmp_path, holdout=None), "class folders and no split 'train'; data.holdout=0.2")
    fill(tmp_path / "rain" / "2024")  # or a misspelt train
    assert not is_bare(tmp_path)
    refused(
        config(tmp_path), "no split 'train'.*; if cat, dog, rain are classes, set data.train_split=. data.holdout=0.2"
    )
    assert sizes(config(tmp_path, train_split=".")) == (9, 3)


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_class_that_is_called_like_a_split(name, tmp_path):
    for folder in (name, "cat", "dog"):
        fill(tmp_path / folder)
    refused(
        config(tmp_path),
        rf"no split 'train'.*; '{name}' is taken for a split because of its name. If it is a class like cat, dog, "
        r"rename it, or set data.train_split=. data.holdout=0.2 .*; if it is not, move it out",
    )
    train, val = open_train_and_val(config(tmp_path, train_split="."))
    assert (sorted(train.class_names), len(train), len(val)) == (sorted(["cat", "dog", name]), 9, 3)
    assert len(open_val(config(tmp_path, val_split=".", holdout=None), None)) == 12
    assert len(open_val(config(tmp_path, train_split="."), train.class_names)) == 3


def test_a_class_that_is_called_train(tmp_path):
    for folder in ("train", "car", "plane"):
        fill(tmp_path / folder)
    for holdout in (0.25, None):
        refused(
            config(tmp_path, holdout=holdout),
            "train has images and no class folders, .*; 'train' is taken for a split because .*like car, plane, rename",
        )
    assert sizes(config(tmp_path, train_split=".")) == (9, 3)


@pytest.mark.slow
def test_the_training_split_does_not_validate(tmp_path):
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        fill(tmp_path / "photos" / name)
    save(tmp_path / "hf", train=[0, 1, 0, 1], test=[0, 1])
    write_tar(tmp_path / "tars" / "train.tar", pairs(0, 1))
    (tmp_path / "tables").mkdir()
    shutil.copytree(tmp_path / "photos" / "train", tmp_path / "tables" / "images")
    (tmp_path / "tables" / "train.csv").write_text("image,label\nimages/cat/0.png,cat\nimages/dog/0.png,dog\n")
    table = tmp_path / "list.txt"
    table.write_text("cat/0.png cat\ndog/0.png dog\n")
    for root, kwargs in (
        ("photos", {}),
        ("photos", {"val_split": "./train/"}),
        ("photos", {"train_split": ".", "val_split": "."}),
        ("hf", {"source": "hf"}),
        ("hf", {"source": "hf", "streaming": True, "epoch_images": 4}),
        ("tars", {"source": "wds"}),
        ("tables", {"source": "csv"}),
        ("tables/images", {"source": "csv", "csv": str(table)}),
        ("digits", {"source": "digits"}),
    ):
        settings = config(tmp_path / root, **{"val_split": "train"} | kwargs)
        refused(settings, "data.val_split is the training split, .*: data.val_split=none data.holdout=0.25")
    whole = config(tmp_path / "tables/images", source="csv", csv=str(table), val_split=".", holdout=None)
    refused(whole, "have 2 images in common")
    (tmp_path / "tables" / "val.csv").symlink_to("train.csv")
    refused(config(tmp_path / "tables", source="csv"), "have 2 images in common")
    part = config(tmp_path / "hf", source="hf", val_split="train[:50%]", holdout=None)
    refused(part, r"no split 'train\[:50%\]'.*; a part of a split has no name: data.holdout holds a share")
    assert len(open_val(config(tmp_path / "photos", val_split="train", holdout=None), None)) == 8  # an evaluation may


def test_names_are_decided_before_a_split_is_opened(tmp_path):
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        fill(tmp_path / name)
    (tmp_path / "train" / "empty").mkdir()  # found when the split is opened, which may take minutes
    refused(config(tmp_path, val_split="vall"), r"no split 'vall' \(did you mean 'val'\?\)")
    refused(config(tmp_path), "train has 1 class folder without images: empty")
    (tmp_path / "val").rename(tmp_path / "unknown")
    refused(
        config(tmp_path, holdout=None), "train has 1 class folder without images: empty"
    )  # not: no validation split


WAY_OUT = r"; to train without it: data.val_split=none data.holdout=0.25?$"


def test_an_unlabelled_test_folder(tmp_path):
    for name in ("train/cat", "train/dog", "test"):
        fill(tmp_path / name)
    for holdout in (0.25, None):
        settings = config(tmp_path, holdout=holdout)
        refused(settings, f"test has images and no class folders, so no labels; expected .*{WAY_OUT}")
    train, val = open_train_and_val(config(tmp_path, val_split="none"))
    assert (len(train), len(val)) == (6, 2)
    assert "train is divided, as data.val_split is none: 2 images of 8 held out" in val.note
    assert (
        open_val(config(tmp_path, val_split="none", holdout_sha256=val.sha256), train.class_names).sha256 == val.sha256
    )
    (tmp_path / "test").rename(tmp_path / "unknown")
    (tmp_path / "test").mkdir()
    (tmp_path / "unknown").rename(tmp_path / "test" / "unknown")
    refused(config(tmp_path), f"1 only in .*test: unknown{WAY_OUT}")
    assert sizes(config(tmp_path, val_split="none")) == (6, 2)


def test_no_split_and_nothing_held_out():
    with pytest.raises(ConfigError, match=r"data.val_split: none leaves nothing to validate on; add data.holdout=0.2"):
        check_config({"data": {"root": "x", "val_split": "none"}}, "test")


@pytest.mark.parametrize("labels", [[-1, -1], [0, -1]])
def test_an_unlabelled_split_of_hugging_face(labels, tmp_path):
    save(tmp_path / "hf", train=[0, 1] * 4, test=labels)
    refused(
        config(tmp_path / "hf", source="hf"),
        rf"\(test\): the column 'label' .* has rows without a label \(-1\){WAY_OUT}",
    )
    assert sizes(config(tmp_path / "hf", source="hf", val_split="none")) == (6, 2)


def test_unlabelled_rows_and_tars(tmp_path):
    for name in ("cat", "dog"):
        fill(tmp_path / "photos" / name)
    rows = [f"{name}/{i}.png,{name},train" for name in ("cat", "dog") for i in range(4)]
    fill(tmp_path / "photos" / "new", 2)
    table = tmp_path / "list.csv"
    table.write_text("\n".join(["image,label,split", *rows, "new/0.png,,test", "new/1.png,,test"]))
    settings = {"source": "csv", "csv": str(table)}
    refused(config(tmp_path / "photos", **settings), f"list.csv, line 10: the label is empty{WAY_OUT}")
    assert sizes(config(tmp_path / "photos", val_split="none", **settings)) == (6, 2)
    plain = tmp_path / "list.txt"
    plain.write_text("".join(f"{row.split(',')[0]} {row.split(',')[1]}\n" for row in rows))
    assert sizes(config(tmp_path / "photos", source="csv", csv=str(plain), val_split="none")) == (6, 2)
    write_tar(tmp_path / "tars" / "train.tar", pairs(*[0, 1] * 4))
    write_tar(tmp_path / "tars" / "test.tar", {"000.png": pairs(0)["000.png"]})
    refused(config(tmp_path / "tars", source="wds"), f"a sample without a label, 000.cls or 000.json{WAY_OUT}")
    assert sizes(config(tmp_path / "tars", source="wds", val_split="none")) == (6, 2)


def test_one_split_saved_alone(tmp_path):
    save(tmp_path / "hf", train=[0, 1] * 4)
    datasets.load_dataset(str(tmp_path / "hf"), split="train").save_to_disk(tmp_path / "disk")
    settings = config(tmp_path / "disk", source="hf")
    train, val = open_train_and_val(settings)
    assert (train.class_names, len(train), len(val)) == (["cat", "dog"], 6, 2)
    refused(config(tmp_path / "disk", source="hf", holdout=None), "so there is no validation split; data.holdout=0.2")
    refused(
        config(tmp_path / "disk", source="hf", val_split="val"), "one split of a data set.*, 'train', and not 'val'"
    )
    assert len(open_val(config(tmp_path / "disk", source="hf", holdout=None), None)) == 8
    columns = {"image": [Image.new("RGB", (4, 4))] * 4, "label": ["a", "b", "a", "b"]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "unnamed")
    assert sizes(config(tmp_path / "unnamed", source="hf")) == (2, 2)


def test_images_that_pillow_does_not_read(tmp_path):
    for name in ("cat", "dog"):
        fill(tmp_path / name, ending="HEIC")
    hint = "; .heic are images that Pillow does not read: convert them to .jpg or .png"
    refused(config(tmp_path), rf"2 class folders without images: cat, dog; .* here in .HEIC \(8\){hint}$")
    for name in ("cat", "dog"):
        shutil.copy(tmp_path / name / "0.HEIC", tmp_path / name / "0.png")
        shutil.copy(tmp_path / name / "1.HEIC", tmp_path / name / "1.png")
    train, _ = open_train_and_val(config(tmp_path))
    assert train.note.endswith(f"8 files ending in .HEIC (8){hint}")


def test_numbers_are_ordered_by_value_in_every_source(tmp_path):
    numbers = [str(i) for i in range(12)]
    for name in numbers:
        fill(tmp_path / "photos" / name, 2)
    (tmp_path / "list.txt").write_text("".join(f"{name}/{i}.png {name}\n" for name in sorted(numbers) for i in (0, 1)))
    for kind in ("string", "int64"):
        labels = [int(name) if kind == "int64" else name for name in sorted(numbers) * 2]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
        columns = {"image": [Image.new("RGB", (4, 4))] * 24, "label": labels}
        (tmp_path / kind).mkdir()
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / kind / "train.parquet")
    write_tar(tmp_path / "tars" / "train.tar", pairs(*[*range(12)] * 2))
    for root, kwargs in (
        ("photos", {}),
        ("photos", {"source": "hf"}),
        ("photos", {"source": "csv", "csv": str(tmp_path / "list.txt")}),
        ("string", {"source": "hf"}),
        ("int64", {"source": "hf"}),
        ("tars", {"source": "wds"}),
    ):
        train, val = open_train_and_val(config(tmp_path / root, **kwargs))
        assert train.class_names == val.class_names == numbers, root
