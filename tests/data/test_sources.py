from __future__ import annotations

import datasets
import numpy as np
import pytest
from PIL import Image

from conv2former import DataError
from conv2former.config.schema import DataConfig
from conv2former.data import open_train_and_val, open_val


def picture(shade: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.full((20, 30, 3), shade, dtype=np.uint8)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Two splits of two classes, one of them nested, under a path with capital letters."""
    root = tmp_path / "My Photos"
    for split, count in (("train", 3), ("val", 2)):
        for shade, name in ((0, "Cat"), (255, "dog")):
            (root / split / name / "nested").mkdir(parents=True)
            for i in range(count):
                picture(shade).save(root / split / name / f"{i}.png")
    picture(0, "L").save(root / "train" / "Cat" / "nested" / "grey.jpg")
    return root


@pytest.fixture
def parquet(tmp_path):
    root = tmp_path / "Parquet"
    root.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split, labels in (("train", [0, 1, 1, 0]), ("validation", [1, 0, 1])):
        columns = {"image": [picture(255 * label) for label in labels], "label": labels}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(root / f"{split}.parquet")
    return root


def config(root, source: str = "folder", **kwargs) -> DataConfig:
    return DataConfig(source=source, root=str(root), **kwargs)


def shades(source) -> set[tuple[int, int]]:
    return {(image.getpixel((0, 0))[0], label) for image, label in (source.images[i] for i in range(len(source)))}


def test_folder(folder):
    train, val = open_train_and_val(config(folder))
    assert train.class_names == val.class_names == ["Cat", "dog"]
    assert (len(train), len(val)) == (7, 4)  # nested folders belong to the class folder
    assert shades(train) == shades(val) == {(0, 0), (255, 1)}
    assert all(train.images[i][0].mode == "RGB" for i in range(len(train)))


def test_hf_parquet(parquet):
    train, val = open_train_and_val(config(parquet, "hf"))
    assert train.class_names == ["cat", "dog"]
    assert (len(train), len(val)) == (4, 3)
    assert shades(train) == shades(val) == {(0, 0), (255, 1)}


def test_hf_labels_without_names(tmp_path):
    """Text labels get indices in sorted order, the training split's for both splits."""
    for split, labels in (("train", ["z", "a", "m"]), ("test", ["z", "m"])):
        columns = {"img": [picture(ord(label)) for label in labels], "kind": labels}
        features = datasets.Features({"img": datasets.Image(), "kind": datasets.Value("string")})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    train, val = open_train_and_val(config(tmp_path, "hf", image_key="img", label_key="kind"))
    assert train.class_names == ["a", "m", "z"]
    assert shades(val) == {(ord("z"), 2), (ord("m"), 1)}


def test_hf_saved_to_disk(parquet, tmp_path):
    datasets.load_dataset(str(parquet)).save_to_disk(tmp_path / "disk")
    train, val = open_train_and_val(config(tmp_path / "disk", "hf"))
    assert (len(train), len(val)) == (4, 3)


def test_another_class_list(folder):
    val = open_val(config(folder), ["dog", "bird", "Cat"])
    assert shades(val) == {(0, 2), (255, 0)}


@pytest.mark.parametrize("source", ["folder", "hf"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train_split": "trian"}, r"no split 'trian' \(did you mean 'train'\?\)"),
        ({"val_split": "test"}, "no split 'test': it has train, val"),
        ({"num_classes": 3}, "has 2 classes, data.num_classes says 3: [cC]at, dog"),
    ],
)
def test_wrong_splits_and_counts(folder, parquet, source, change, expected):
    with pytest.raises(DataError, match=expected):
        open_train_and_val(config(folder if source == "folder" else parquet, source, **change))


def test_wrong_folders(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_train_and_val(config(tmp_path / "none"))
    with pytest.raises(DataError, match="no such folder"):
        open_train_and_val(config(tmp_path / "none", "hf"))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="no class folders"):
        open_train_and_val(config(tmp_path / "empty"))
    (folder / "val" / "bird").mkdir()
    with pytest.raises(DataError, match="1 classes that the class list has not: bird; the list has 2: Cat, dog"):
        open_train_and_val(config(folder))
    (folder / "train" / "bird").mkdir()
    with pytest.raises(DataError, match="1 class folders without images: bird"):
        open_train_and_val(config(folder))


def test_no_validation_split(folder):
    (folder / "val").rename(folder / "something")
    with pytest.raises(
        DataError, match="no validation split: none of validation, val, valid, test in something, train"
    ):
        open_train_and_val(config(folder))


def test_wrong_columns(parquet):
    with pytest.raises(DataError, match=r"no column 'img' \(data.image_key\) \(did you mean 'image'\?\)"):
        open_train_and_val(config(parquet, "hf", image_key="img"))
    with pytest.raises(DataError, match=r"no column 'class' \(data.label_key\).*it has image, label"):
        open_train_and_val(config(parquet, "hf", label_key="class"))


def test_an_unreadable_image_is_named(folder):
    bad = folder / "train" / "Cat" / "0.png"
    bad.write_bytes(b"not a picture")
    train, _ = open_train_and_val(config(folder))
    with pytest.raises(DataError, match=r"Cat/0\.png: not a readable image"):
        shades(train)


def test_labels_that_are_no_classes(tmp_path):
    images = [picture(0), picture(9)]
    for name, labels, expected in (("float", [0.5, 1.0], "holds float64"), ("none", [1, None], "rows without a label")):
        root = tmp_path / name
        root.mkdir()
        for split in ("train", "test"):
            columns = {"image": images, "label": labels}
            features = datasets.Features(
                {"image": datasets.Image(), "label": datasets.Value("float64" if name == "float" else "int64")}
            )
            datasets.Dataset.from_dict(columns, features=features).to_parquet(root / f"{split}.parquet")
        with pytest.raises(DataError, match=expected):
            open_train_and_val(config(root, "hf"))
    with pytest.raises(DataError, match=r"holds (Image|PIL)"):
        open_train_and_val(config(tmp_path / "float", "hf", label_key="image"))


def test_hidden_folders_are_no_classes(folder):
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    picture(9).save(folder / "train" / ".ipynb_checkpoints" / "0.png")
    assert open_train_and_val(config(folder))[0].class_names == ["Cat", "dog"]


def test_the_digits_take_no_folder_that_is_in_use(folder, parquet, tmp_path):
    before = sorted(tmp_path.glob("**/*"))
    for root in (folder, folder / "train" / "Cat" / "0.png"):
        with pytest.raises(DataError, match="holds something else"):
            open_train_and_val(config(root, "digits"))
    with pytest.raises(DataError, match="is not the digits data set"):
        open_train_and_val(config(parquet, "digits"))
    (parquet / "validation.parquet").unlink()
    with pytest.raises(DataError, match="holds something else"):
        open_train_and_val(config(parquet, "digits"))
    assert sorted(tmp_path.glob("**/*")) == [path for path in before if path != parquet / "validation.parquet"]
    with pytest.raises(DataError, match="cannot be written"):
        open_train_and_val(config("/proc/digits", "digits"))


def test_digits(tmp_path):
    train, val = open_train_and_val(config(tmp_path / "digits", "digits"))
    assert (len(train), len(val)) == (1437, 360)
    assert train.class_names == [str(digit) for digit in range(10)]
    counts = np.bincount([val.images[i][1] for i in range(360)])
    assert counts.min() >= 34  # stratified: 10 classes of about 36
    assert counts.max() <= 38
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "digits").iterdir()}
    open_train_and_val(config(tmp_path / "digits", "digits"))
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "digits").iterdir()}
    assert set(before) == {"train.parquet", "validation.parquet"}
    pixels = {p.tobytes() for p in (val.images[i][0] for i in range(360))}
    assert not pixels & {p.tobytes() for p in (train.images[i][0] for i in range(1437))}
