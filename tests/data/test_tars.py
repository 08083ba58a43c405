from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conv2former import DataError
from conv2former.config.schema import DataConfig
from conv2former.data import open_train_and_val, open_val
from conv2former.data.images import UnreadableImage
from conv2former.data.sources import open_split
from conv2former.data.tars import find_tars, index_tars


def picture(shade: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (shade, shade, shade)).save(file, kind)
    return file.getvalue()


def write(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pairs(*labels: int | str, first: int = 0) -> dict[str, bytes]:
    """Returns the members of one sample for each label; sample i is of shade i."""
    members = {}
    for i, label in enumerate(labels, first):
        members |= {f"{i:03}.png": picture(i), f"{i:03}.cls": str(label).encode()}
    return members


def config(root: Path, **kwargs) -> DataConfig:
    return DataConfig(source="wds", root=str(root), **kwargs)


def shades(source) -> list[tuple[int, int]]:
    return [(image.getpixel((0, 0))[0], label) for image, label in (source.images[i] for i in range(len(source)))]


def refused(root: Path, match: str, **kwargs) -> None:
    with pytest.raises(DataError, match=match) as caught:
        open_split(config(root, **kwargs), "train")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, UnreadableImage)


def test_samples_are_in_the_order_of_the_tars(tmp_path):
    write(tmp_path / "train" / "1.tar", pairs(7, 20, first=3))
    write(tmp_path / "train" / "0.tar", pairs(100, 7, 20))
    write(tmp_path / "val" / "deep" / "er" / "0.tar", pairs(100, 20))
    train, val = open_train_and_val(config(tmp_path))
    assert train.class_names == val.class_names == ["7", "20", "100"]  # integers in their order, not as text
    assert shades(train) == [(0, 2), (1, 0), (2, 1), (3, 0), (4, 1)]
    assert shades(val) == [(0, 2), (1, 1)]  # by the training split's list
    image, label = train.images[0]
    assert (image.mode, image.size, type(label)) == ("RGB", (5, 4), int)
    assert [train.images[i][1] for i in (4, 0)] == [1, 2]
    assert train.images.labels.dtype == np.int32
    with pytest.raises(IndexError):
        train.images[5]
    assert open_val(config(tmp_path), ["20", "9", "100"]).images.labels.tolist() == [2, 0]
    with pytest.raises(DataError, match="1 class not in the class list: 100"):
        open_val(config(tmp_path), ["20"])


@pytest.mark.parametrize(
    "names",
    [
        ("train-000.tar", "val-000.tar"),
        ("imagenet-train-000000-of-000002.tar", "imagenet-val-000000.tar"),
        ("sets_train_0.tar", "sets_val_0.TAR"),
        ("train.tar", "val.1.tar"),
        ("train/x.tar", "val/x.tar"),
        ("a/train/b/x.tar", "a/val-0.tar"),
    ],
)
def test_layouts(tmp_path, names):
    root = tmp_path / "my-train-val-data"  # above the root and the root itself name no split
    for i, name in enumerate(names):
        write(root / name, pairs(5, first=i))
    train, val = open_train_and_val(config(root))
    assert (shades(train), shades(val)) == ([(0, 0)], [(1, 0)])


def test_wrong_splits(tmp_path):
    refused(tmp_path / "none", r"none: no such folder \(data.root\)")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", r"file: a file, not a folder \(data.root\)")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has no tars; expected .*empty/SPLIT/\*.tar or .*empty/SPLIT-\*.tar")
    root = tmp_path / "data"
    write(root / "set-trian-0001.tar", pairs(1))
    refused(root, r"no split 'train' \(did you mean 'trian'\?\): it has set, trian$")
    assert sorted(find_tars(root)) == ["0001", "set", "trian"]
    write(root / "train-test-0001.tar", pairs(1))
    with pytest.raises(DataError, match=r"\(train\) and .* \(test\) have 1 tar in common: .*train-test-0001.tar"):
        open_train_and_val(config(root))


def test_labels_of_all_kinds(tmp_path):
    members = {
        "a/0.JPG": picture(0, "jpeg"),
        "a/0.CLS": b" dog\n",
        "a/1.json": json.dumps({"label": "cat", "n": 1}).encode(),
        "a/1.webp": picture(1, "webp"),
        "b/1.tiff": picture(2, "tiff"),  # the same name in another folder
        "b/1.json": b'{"label": 3}',
        "b/2.json": b'{"no": "label"}',
        "b/2.ppm": picture(3, "ppm"),
        "b/2.mask.png": picture(99),  # not the image of 2
        "b/2.txt": b"a text",
        "b/2.cls": b"cat",  # before json
    }
    write(tmp_path / "train-0.tar", members)
    source = open_split(config(tmp_path), "train")
    assert source.class_names == ["3", "cat", "dog"]  # one text makes all of them texts
    assert source.images.labels.tolist() == [2, 1, 0, 1]
    assert [round(source.images[i][0].getpixel((0, 0))[0]) for i in (0, 2, 3)] == [0, 2, 3]
    write(tmp_path / "train-0.tar", {"0.png": picture(0), "0.json": b'{"kind": 4}'})
    refused(tmp_path, r"train-0.tar, member 0.json has no key 'label' \(data.label_key\): it has kind")
    assert open_split(config(tmp_path, label_key="kind"), "train").class_names == ["4"]


def test_a_list_of_class_names(tmp_path):
    write(tmp_path / "train-0.tar", pairs(2, 0))
    (tmp_path / "classes.txt").write_text("cat\ndog of wool\nfish\n")
    source = open_split(config(tmp_path), "train")
    assert source.class_names == ["cat", "dog of wool", "fish"]
    assert source.images.labels.tolist() == [2, 0]
    assert open_split(config(tmp_path), "train", ["fish", "cat"]).images.labels.tolist() == [0, 1]
    write(tmp_path / "train-1.tar", pairs(1, 3))
    refused(tmp_path, r"train-1.tar, member 001.png: class 3 of the 3 in .*list of class names")
    for text, expected in (("cat\n\nfish", "empty; each line"), ("cat\ncat", "'cat' is there twice, first in line 1")):
        (tmp_path / "classnames.txt").write_text(text)
        refused(tmp_path, f"classnames.txt, line 2: {expected}")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([], "has no samples; expected members such as 000.jpg and 000.cls"),
        ({"readme.txt": b"x"}, "has no samples"),
        ({**pairs(1), "x/7.png": picture(0)}, r", member x/7.png: a sample without a label, x/7.cls or x/7.json"),
        ({**pairs(1), "7.cls": b"1"}, r", member 7.\*: a sample without an image such as 7.jpg"),
        ({"photo.v2.png": picture(0), "photo.v2.cls": b"1"}, r", member photo.\*: a sample without an image"),
        ({**pairs(1), "000.jpg": picture(0)}, ", member 000.jpg: its sample already has 000.png"),
        ([*pairs(1, 2).items(), *pairs(1).items()], ", member 000.png: its sample already has 000.png"),
        ({"0.png": picture(0), "0.cls": b" \n"}, r", member 0.cls: no label \(''\)"),
        ({"0.png": picture(0), "0.cls": b"\xff\xfe"}, ", member 0.cls: not readable as a label"),
        ({"0.png": picture(0), "0.json": b"{"}, ", member 0.json: not readable as a label"),
        ({"0.png": picture(0), "0.json": b"[1]"}, ", member 0.json has no key 'label' .*: it has none"),
        ({"0.png": picture(0), "0.json": b'{"labels": 1}'}, r"\(did you mean 'labels'\?\)"),
        ({"0.png": picture(0), "0.json": b'{"label": 0.5}'}, ", member 0.json: the label 0.5 is neither"),
        ({"0.png": picture(0), "0.json": b'{"label": null}'}, r", member 0.json: no label \(None\)"),
        ({"0.png": picture(0), "0.json": b'{"label": true}'}, ", member 0.json: the label True is neither"),
        ({"0.png": picture(0), "0.json": b'{"label": [0]}'}, r", member 0.json: the label \[0\] is neither"),
        ({"0.png": picture(0), "0.json": b'{"label": NaN}'}, ", member 0.json: the label nan is neither"),
        ({"0.png": picture(0), "0.json": b'{"label": 1e400}'}, ", member 0.json: the label inf is neither"),
        ({"0.png": picture(0), "0.json": b'{"label": " "}'}, r", member 0.json: no label \(''\)"),
        ({"0.png": picture(0), "0.json": b'{"label": -1}'}, r", member 0.json: no label \(-1\)"),
        ({"0.png": picture(0), "0.json": b'{"label": -2}'}, ", member 0.json: the label -2 is below 0"),
        ({"0.png": picture(0), "0.json": b'{"label": "\\ud800"}'}, ", member 0.json: not readable as a label"),
        ({"0.png": picture(0), "0.json": b'{"label": [' + b"0, " * 999 + b"0]}"}, ", 0.*[.]{3} is neither"),
        ({"0.png": picture(0), "0.cls": b"-1"}, r", member 0.cls: no label \(-1\)"),
        ({"0.png": picture(0), "0.cls": b"-7"}, ", member 0.cls: the label -7 is below 0"),
        ({"0.png": picture(0), "0.cls": bytes((1 << 24) + 1)}, ", member 0.cls: 16,777,217 bytes are too many"),
        ({"0.png": picture(0), "0.cls": b"9" * 5000}, ", member 0.cls: not readable as a label"),
        ({"0.png": picture(0), "0.cls": b"9" * 30}, ", member 0.cls: the label 9{20}... is too large for the index"),
        (
            {"0.png": picture(0), "0.json": b'{"label": ' + b"9" * 30 + b"}"},
            ", member 0.json: the label 9{20}... is too",
        ),
        ({"0.png": picture(0), "0.json": b"[" * 100_000}, ", member 0.json: not readable as a label"),
    ],
)
def test_wrong_samples(tmp_path, members, expected):
    write(tmp_path / "train-0.tar", pairs(1))
    write(tmp_path / "train-1.tar", members)
    refused(tmp_path, f"train-1.tar.*{expected}")


def test_damaged_tars(tmp_path):
    path = tmp_path / "train-0.tar"
    whole = write(path, pairs(*range(4))).read_bytes()
    end = whole.rindex(b"3") // 512 * 512 + 512  # behind the last label
    assert not any(whole[end:])
    for cut in (end - 1024, end, end + 100):  # between two members, and without the whole end marker
        path.write_bytes(whole[:cut])
        refused(tmp_path, "train-0.tar has no end marker, so it is cut off")
    for cut in (end - 1200, end - 600, end - 100, 300, 0):
        path.write_bytes(whole[:cut])
        refused(tmp_path, "train-0.tar: not a readable tar|train-0.tar has no end marker")
    path.write_bytes(whole[: end + 512])  # one block of the marker is enough
    assert len(open_split(config(tmp_path), "train")) == 4
    path.write_bytes(whole + whole)
    refused(tmp_path, f"train-0.tar is damaged at byte {end}, or tars were joined there")
    path.write_bytes(whole[:1024] + b"x" + whole[1025:])  # in the header of the second member
    refused(tmp_path, "train-0.tar is damaged at byte 1024")
    path.write_bytes(b"a text" * 1000)
    refused(tmp_path, "train-0.tar: not a readable tar")
    for name in ("train-0.tar", "train-0.tar.gz", "train-0.tgz"):
        path.unlink(missing_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(whole))
        refused(tmp_path, f"{name} is compressed")
        (tmp_path / name).unlink()
    path.symlink_to(tmp_path / "gone.tar")
    refused(tmp_path, "train-0.tar: not a readable tar .*No such file")


def test_members_that_are_no_files_are_left_out(tmp_path):
    path = write(tmp_path / "train-0.tar", {**pairs(1), "._000.png": b"of macOS", ".hidden.png": b"x"})
    with tarfile.open(path, "a") as tar:
        for name, kind in (("folder.png", tarfile.DIRTYPE), ("001.png", tarfile.SYMTYPE), ("2.cls", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "000.png"
            tar.addfile(member)
    assert shades(open_split(config(tmp_path), "train")) == [(0, 0)]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_are_exact(tmp_path, kind):
    name = "Klasse #1 %20/" + "lang/" * 30 + "größe"
    path = tmp_path / "train #0 %.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        for member, content in ((f"{name}.png", b"no image"), (f"{name}.cls", "größe".encode())):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    images, labels = index_tars([str(path)], "label")
    assert labels == ["größe"]
    with pytest.raises(UnreadableImage) as caught:
        images[0]
    assert caught.value.name == f"{path}, member {name}.png"
    assert str(caught.value).startswith(f"{caught.value.name}: not a readable image (empty, or of a format")
    path.unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        images[0]


def test_16_bits_in_tars(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), 500, dtype=np.uint16)).save(file, "PNG")
    write(tmp_path / "train-0.tar", {"0.png": file.getvalue(), "0.cls": b"1"})
    assert shades(open_split(config(tmp_path), "train")) == [(2, 0)]
    assert shades(open_split(config(tmp_path, value_range=(0, 1000)), "train")) == [(128, 0)]


def _read(images, start: int, step: int) -> list[int]:
    return [images[i][0].getpixel((0, 0))[0] for i in range(start, len(images), step)]


def test_processes_share_no_position(tmp_path):
    """Forked processes and pickled copies read at once, each the right image."""
    for number in range(3):
        write(tmp_path / f"train-{number}.tar", pairs(*range(50), first=50 * number))
    images = open_split(config(tmp_path), "train").images
    assert _read(images, 0, 1) == list(range(150))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        shares = pool.starmap(_read, [(images, start, 4) for start in range(4)])
    assert [shares[i % 4][i // 4] for i in range(150)] == list(range(150))
    assert _read(pickle.loads(pickle.dumps(images)), 7, 50) == [7, 57, 107]
    assert len(pickle.dumps(images)) < 150 * 64


def test_names_with_dots(tmp_path):
    """A sample's name ends at the first dot, as WebDataset has it; the message says so."""
    image = pairs(0)["000.png"]
    rule = "a sample's name ends at the first dot, as in WebDataset, so"
    for members, expected in (
        (
            {"a.b.png": image, "a.b.cls": b"0"},
            rf"member a.\*: a sample without an image .*{rule} a.b.png is the 'b.png'",
        ),
        (
            {"a.b.png": image, "a.cls": b"0"},
            rf"{rule} a.b.png is the 'b.png' of the sample 'a'; write the names without",
        ),
        ({"a.png": image, "a.b.cls": b"0"}, rf"member a.png: a sample without a label.*{rule} a.b.cls is the 'b.cls'"),
        ({"a.heic": b"x", "a.cls": b"0"}, "without an image .*; .heic are images that Pillow does not read: convert"),
        ({"a.heic": b"x"}, "has no samples; .*; .heic are images that Pillow does not read"),
    ):
        write(tmp_path / "train.tar", members)
        refused(tmp_path, expected)


def test_several_labels(tmp_path):
    image = pairs(0)["000.png"]
    write(tmp_path / "train.tar", {"a.png": image, "a.cls": b"cat|dog", "b.png": image, "b.cls": b"cat"})
    refused(tmp_path, r"\(train\): the label 'cat|dog' is several labels")


@pytest.mark.parametrize("label", ["²", "٣", "+1", "0x10", "1_000", "1e3", "nan", "True"])
def test_texts_that_only_look_like_numbers_are_names(tmp_path, label):
    write(
        tmp_path / "train-0.tar", {"0.png": picture(0), "0.cls": label.encode(), "1.png": picture(1), "1.cls": b"dog"}
    )
    assert sorted(open_split(DataConfig(source="wds", root=str(tmp_path)), "train").class_names) == sorted(
        [label, "dog"]
    )
