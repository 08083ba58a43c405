from __future__ import annotations

import re

import datasets
import numpy as np
import pytest
from PIL import Image

from conv2former import ConfigError, DataError
from conv2former.config import check_config
from conv2former.config.schema import DataConfig
from conv2former.data import open_train_and_val, open_val
from conv2former.data.sources import open_split
from conv2former.data.tables import read_class_list, write_table

SHADES = {"cat": 0, "dog": 255, "größe": 100}


@pytest.fixture
def photos(tmp_path):
    """Four images of each of three classes, with blanks and commas in their names, shade by class."""
    root = tmp_path / "photos"
    for label, shade in SHADES.items():
        (root / label).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 9, 3), shade, np.uint8)).save(root / label / f"{i}, my.png")
    return root


def rows(split: bool = True, labels=tuple(SHADES)) -> list[tuple[str, ...]]:
    found = [("image", "label", "split")[: 2 + split]]
    for label in labels:
        found += [(f"{label}/{i}, my.png", label, "train" if i else "val")[: 2 + split] for i in range(4)]
    return found


def text(table, separator: str = ",") -> str:
    return "".join(separator.join(f'"{f}"' if separator in f else f for f in row) + "\n" for row in table)


def write(path, content, encoding: str = "utf-8"):
    path.write_bytes(content.encode(encoding))
    return path


def config(root, **kwargs) -> DataConfig:
    kwargs = {key: str(value) if key in ("csv", "class_names") else value for key, value in kwargs.items()}
    return DataConfig(**{"source": "csv", "root": str(root)} | kwargs)


def shades(source) -> set[tuple[int, str]]:
    pairs = (source.images[i] for i in range(len(source)))
    return {(image.getpixel((0, 0))[0], source.class_names[label]) for image, label in pairs}


def refused(settings: DataConfig, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as error:
        open_train_and_val(settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_as_spreadsheets_save_it(photos, tmp_path, separator, end, encoding):
    content = "\n" + text(rows(), separator) + separator * 2 + "\n\n"  # an empty row and an empty line, as Excel leaves
    table = write(tmp_path / "list.csv", content.replace("\n", end), encoding)
    train, val = open_train_and_val(config(photos, csv=table))
    assert train.class_names == val.class_names == ["cat", "dog", "größe"]
    assert (len(train), len(val)) == (9, 3)
    assert shades(train) == shades(val) == {(shade, label) for label, shade in SHADES.items()}
    assert train.images.name(0) == f"{photos}/cat/1, my.png"


def test_columns_by_other_names_and_paths_from_elsewhere(photos, tmp_path):
    table = [("id", "Teil", "art", "datei")]
    table += [(str(i), split, label, f"{photos}/./{image}") for i, (image, label, split) in enumerate(rows()[1:])]
    write(tmp_path / "list.csv", text(table))
    keys = {"image_key": "datei", "label_key": "art", "split_key": "Teil"}
    train, val = open_train_and_val(config(tmp_path, csv=tmp_path / "list.csv", **keys))
    assert (len(train), len(val)) == (9, 3)
    assert shades(train) == {(shade, label) for label, shade in SHADES.items()}


def test_a_table_for_each_split(photos):
    parts = {split: [rows()[0][:2], *(row[:2] for row in rows()[1:] if row[2] == split)] for split in ("train", "val")}
    write(photos / "train.csv", text(parts["train"]))
    write(photos / "val.tsv", text(parts["val"], "\t"))
    train, val = open_train_and_val(config(photos))
    assert (len(train), len(val)) == (9, 3)
    refused(config(photos, val_split="vla"), r"no split 'vla' \(did you mean 'val'\?\): it has train, val")
    write(photos / "val.tsv", text([*parts["val"], parts["train"][1]], "\t"))
    refused(config(photos), r"train.csv and .*val.tsv have 1 image in common: .*cat/1, my.png")
    write(photos / "val.tsv", text([*parts["val"], ("größe/1, my.png", "dgo")], "\t"))
    refused(config(photos), r"val.tsv, line 5 has 1 class not in the class list: dgo \(did you mean 'dog'\?\)")


def test_lines_of_paths_and_labels(photos, tmp_path):
    """As ImageNet's val.txt; whole numbers are sorted as such."""
    lines = "".join(f"{image}  {10 - i}\n" for i, (image, _) in enumerate(rows(split=False)[1:11]))
    table = write(tmp_path / "list.txt", lines + "\n")
    val = open_val(config(photos, csv=table), None)
    assert val.class_names == [str(i) for i in range(1, 11)]
    assert val.images.labels.tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert shades(val) == {(0, "10"), (0, "9"), (0, "8"), (0, "7"), (100, "2"), (100, "1")} | {
        (255, label) for label in "6543"
    }
    refused(config(photos, csv=write(tmp_path / "list.txt", "cat/0.png\n")), "line 1: 'cat/0.png': expected a path")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ": has no rows"),
        ("image,label\n", ": has no rows"),
        ("imgae,label\na,b\n", r"line 1: no column 'image' \(data.image_key\) \(did you mean 'imgae'\?\): the header"),
        ("image,class\na,b\n", r"line 1: no column 'label' \(data.label_key\).*: the header has image, class"),
        ("image,label,label\na,b,c\n", "line 1: 2 columns are called 'label'"),
        ("image,label\ncat/0, my.png,cat\n", r'line 2: 3 fields, the header has 2; a \',\' in a value needs "..."'),
        ("image,label\ncat.png\n", "line 2: 1 field, the header has 2"),
        ('image,label\n"cat/0, my.png,cat\n"dog.png",dog\n', "line 2: .*check the quotation marks"),
        ('image,label\n"cat/0, my.png,cat\n', "line 2: .*check the quotation marks"),
        ('image,label\n"cat/0, my.png"x,cat\n', "line 2: .*check the quotation marks"),
        ('image,label\n\n"cat/0, my.png",\n', "line 3: the label is empty"),
        ("image,label\n,cat\n", "line 2: the image is empty"),
        ("image,label,split\na.png,cat,\n", "line 2: the split is empty"),
        ("image,label\nnone.png,cat\n", r"line 2: no such file: .*photos/none.png; paths are relative to data.root"),
        ("image,label\ncat,cat\nb.png,cat\n", r"line 2: no such file: .*photos/cat; 2 of 2 are missing"),
        ('image,label\n"cat/0, my.png",a\n"cat/./0, my.png",b\n', "line 3: .* is there twice, first in line 2"),
        ("image,label\na.png,gr\udcf6\n", "line 2: not UTF-8; save it as UTF-8"),
        ("image,label\na\0.png,b\n", "zero byte"),
    ],
)
def test_mistakes_name_file_and_line(photos, tmp_path, content, expected):
    table = tmp_path / "list.csv"
    table.write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(config(photos, csv=table, holdout=0.2), f"^{tmp_path}/list.csv.*{expected}")


def test_tables_that_are_not_there(photos, tmp_path):
    refused(config(photos), "photos has no tables; expected .*photos/train.csv, or another file as data.csv")
    refused(config(photos, csv=tmp_path / "none.csv"), "none.csv: cannot be read .No such file")
    write(photos / "list.csv", text(rows()))
    refused(
        config(photos, csv="list.csv"), r"list.csv: no such file .*; it is not relative to data.root: give .*photos/"
    )
    with pytest.raises(ConfigError, match=r"data.csv: only with data.source csv, not folder"):
        check_config({"data": {"root": "x", "csv": "list.csv"}}, "test")


def test_a_table_of_one_split(photos, tmp_path):
    table = write(tmp_path / "list.csv", text(rows(split=False)))
    refused(config(photos, csv=table), r"no validation split: no column 'split' \(data.split_key\).*; data.holdout=0.2")
    refused(config(photos, csv=table, val_split="val"), r"no split 'val': no column 'split'")
    refused(config(photos, csv=table, train_split="trian"), r"no split 'trian': no column 'split'")
    assert len(open_val(config(photos, csv=table), None)) == 12  # an evaluation takes the table as it is
    train, val = open_train_and_val(config(photos, csv=table, holdout=0.25))
    assert (len(train), len(val)) == (9, 3)


def test_what_is_written_is_read(photos, tmp_path):
    odd = ('cat/"a" , b;c\t.png', 'cat\'s "best"')
    Image.new("RGB", (4, 4)).save(photos / odd[0])
    write_table(tmp_path / "split.csv", [(*odd, "train"), *rows()[1:]])
    train, val = open_train_and_val(config(photos, csv=tmp_path / "split.csv"))
    assert train.images.name(0) == f"{photos}/{odd[0]}"
    assert train.class_names[train.images.labels[0]] == odd[1]
    assert (len(train), len(val)) == (10, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "split.csv"}


# ------------------------------------------------------------------------------------------------------- class lists


def class_list(tmp_path, *names: str):
    return write(tmp_path / "classes.txt", "\r\n".join(names) + "\r\n\r\n", "utf-8-sig")


def numbered(tmp_path, kind: str):
    """A Hugging Face data set whose labels are 0 and 1 without names, or with."""
    root = tmp_path / kind
    root.mkdir()
    feature = datasets.ClassLabel(names=["cat", "dog"]) if kind == "named" else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    for split in ("train", "validation"):
        images = [Image.new("RGB", (4, 4), (shade, shade, shade)) for shade in (0, 255)]
        table = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
        table.to_parquet(root / f"{split}.parquet")
    return root


def test_a_list_fixes_the_order_and_names_numbers(photos, tmp_path):
    names = class_list(tmp_path, "dog", "größe", "cat")
    table = write(tmp_path / "list.csv", text(rows()))
    folders = config(photos, source="folder", class_names=names, holdout=0.25)
    for settings in (config(photos, csv=table, class_names=names), folders):
        train, val = open_train_and_val(settings)
        assert train.class_names == val.class_names == ["dog", "größe", "cat"]
        assert shades(train) == shades(val) == {(shade, label) for label, shade in SHADES.items()}
    by_number = [row if row[1] == "label" else (row[0], str(list(SHADES).index(row[1])), row[2]) for row in rows()]
    write(table, text(by_number))
    train, _ = open_train_and_val(config(photos, csv=table, class_names=class_list(tmp_path, *SHADES)))
    assert shades(train) == {(shade, label) for label, shade in SHADES.items()}
    names = class_list(tmp_path, "Cat of mine", "Dog")
    train, val = open_train_and_val(config(numbered(tmp_path, "plain"), source="hf", class_names=names))
    assert shades(train) == shades(val) == {(0, "Cat of mine"), (255, "Dog")}
    train, _ = open_train_and_val(
        config(numbered(tmp_path, "named"), source="hf", class_names=class_list(tmp_path, "dog", "cat"))
    )
    assert shades(train) == {(0, "cat"), (255, "dog")}
    assert train.class_names == ["dog", "cat"]


def test_a_list_in_place_of_the_tars_own(tmp_path):
    from .test_tars import pairs
    from .test_tars import write as write_tar

    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-0.tar", pairs(1, 0))
    (tmp_path / "classnames.txt").write_text("a\n\nmistake\n")
    train, val = open_train_and_val(config(tmp_path, source="wds", class_names=class_list(tmp_path, "x", "y")))
    assert train.class_names == val.class_names == ["x", "y"]
    assert train.images.labels.tolist() == [1, 0]


def test_lists_that_do_not_fit(photos, tmp_path):
    folders = {"source": "folder", "holdout": 0.25}
    for names, expected in (
        (
            ("dog", "cat"),
            r"photos has 1 class not in the class list: größe; the list has 2: dog, cat \(.*classes.txt\)",
        ),
        (("dog", "cat", "große"), r"größe \(did you mean 'große'\?\)"),
        (("dog", "", "cat"), "classes.txt, line 2: empty"),
        (("dog", "cat", "dog"), "classes.txt, line 3: 'dog' is there twice, first in line 1"),
        ((), "classes.txt: empty; each line must name one class"),
    ):
        refused(config(photos, class_names=class_list(tmp_path, *names), **folders), expected)
    four = class_list(tmp_path, *SHADES, "bird")
    refused(
        config(photos, class_names=four, num_classes=3, **folders), "classes.txt has 4 classes, data.num_classes says"
    )
    train, _ = open_train_and_val(config(photos, class_names=four, **folders))
    assert train.class_names[3] == "bird"  # without images it is still a class
    named, plain = numbered(tmp_path, "named"), numbered(tmp_path, "plain")
    refused(config(named, source="hf", class_names=four), "classes.txt has 4 names, the data has 2 classes")
    one = class_list(tmp_path, "cat")
    refused(config(plain, source="hf", class_names=one), "has class 1, and the class list 1 name, for 0 to 0")
    refused(config(photos, class_names=tmp_path / "none", **folders), "none: cannot be read")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        (tmp_path / "latin.txt").write_bytes("cat\ngröße\n".encode("latin-1"))
        read_class_list(tmp_path / "latin.txt")


def test_numbers_that_are_names(photos, tmp_path):
    """A list that has the numbers themselves is not one of names for them."""
    for label, number in zip(SHADES, "201", strict=True):
        (photos / label).rename(photos / number)
    train, _ = open_train_and_val(
        config(photos, source="folder", class_names=class_list(tmp_path, "0", "1", "2"), holdout=0.25)
    )
    assert {re.search(r"photos/(\d)/", train.images.name(i))[1] for i in np.flatnonzero(train.images.labels == 2)} == {
        "2"
    }


def test_what_spreadsheets_on_windows_make(tmp_path):
    """Headings with a capital letter, backslashes between folders."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "sub" / name)
    (tmp_path / "all.csv").write_text("Image;Label;Split\r\nsub\\a.png;cat;train\r\nsub\\b.png;dog;train\r\n")
    data = check_config({"data": {"source": "csv", "root": str(tmp_path), "csv": str(tmp_path / "all.csv")}}, "").data
    source = open_split(data, "train")
    assert [source.images.name(i) for i in range(2)] == [str(tmp_path / "sub" / name) for name in ("a.png", "b.png")]
    assert source.class_names == ["cat", "dog"]
    assert source.images[0][0].size == (8, 8)


def test_several_labels_of_an_image(photos, tmp_path):
    table = tmp_path / "list.csv"
    for label in ("cat|dog", "cat;dog", "cat,dog", " cat | emu "):
        write(table, f'image,label\n"cat/0, my.png",cat\n"dog/0, my.png",dog\n"cat/1, my.png","{label}"\n')
        settings = config(photos, csv=table, holdout=0.2)
        refused(
            settings, rf"list.csv, line 4: the label '{re.escape(label.strip())}' is several labels, and an image has"
        )
    write(table, 'image,label\n"cat/0, my.png","tench, Tinca tinca"\n"dog/0, my.png",AT&T; old\n')  # are names
    assert len(open_val(config(photos, csv=table), None).class_names) == 2
    write(table, 'image,label\n"cat/0, my.png",cat|dog\n"dog/0, my.png",emu\n')
    names = class_list(tmp_path, "cat|dog", "emu")
    assert open_val(config(photos, csv=table, class_names=names), None).class_names == ["cat|dog", "emu"]


def test_several_labels_in_a_column_of_hugging_face(tmp_path):
    columns = {"image": [Image.new("RGB", (4, 4))] * 2, "label": ["a", "a|b"]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    refused(config(tmp_path, source="hf", holdout=0.2), r"\(train\): the label 'a\|b' is several labels")


@pytest.mark.parametrize("label", ["²", "٣", "+1", "0x10", "1_000", "9" * 5000, "1e400", "nan", "-2"])
def test_labels_that_are_odd_are_names(photos, tmp_path, label):
    table = write(tmp_path / "list.csv", text([*rows(split=False)[:2], ("dog/1, my.png", label)]))
    assert set(open_val(config(photos, csv=table), None).class_names) == {"cat", label}


def test_minus_1_stands_for_no_label(photos, tmp_path):
    """Unless a list of classes has it."""
    table = write(tmp_path / "list.csv", text([*rows(split=False)[:2], ("dog/1, my.png", "-1")]))
    refused(config(photos, csv=table, holdout=0.5), "list.csv, line 3: the label is -1, which stands for no label")
    names = write(tmp_path / "names.txt", "cat\n-1\n")
    assert open_val(config(photos, csv=table, class_names=names), None).images.labels.tolist() == [0, 1]
