from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import time

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conv2former import DataError
from conv2former.config.schema import DataConfig
from conv2former.data import digits, open_train_and_val, open_val
from conv2former.data.images import UnreadableImage
from conv2former.data.sources import open_split


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
    with pytest.raises(DataError, match=r"same class folders, but there are 1 only in .*val: bird$"):
        open_train_and_val(config(folder))
    with pytest.raises(DataError, match="1 class not in the class list: bird; the list has 2: Cat, dog"):
        open_val(config(folder), ["Cat", "dog"])
    (folder / "train" / "bird").mkdir()
    with pytest.raises(DataError, match="1 class folder without images: bird"):
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


def test_class_folders_of_one_split_only(folder):
    (folder / "val" / "dog").rename(folder / "val" / "dogs")
    with pytest.raises(DataError, match=r"there are 1 only in .*train: dog; 1 only in .*val: dogs$"):
        open_train_and_val(config(folder))
    (folder / "val" / "dogs").rename(folder / "dogs")
    with pytest.raises(DataError, match=r"there are 1 only in .*train: dog$"):
        open_train_and_val(config(folder))
    assert shades(open_val(config(folder), ["Cat", "dog"])) == {(0, 0)}  # a checkpoint may know more classes


def test_files_of_other_types(folder):
    for split in ("train", "val"):
        (folder / split / "scan").mkdir()
        for name in ("1.dcm", "2.DCM", "notes"):
            (folder / split / "scan" / name).write_text("x")
    with pytest.raises(
        DataError, match=r"images: scan; images end in .avif, .* here in .dcm \(1\), .DCM \(1\), nothing \(1\)$"
    ):
        open_train_and_val(config(folder))
    picture(7).save(folder / "train" / "scan" / "3.PNG")
    picture(7).save(folder / "val" / "scan" / "3.TIFF")
    train, val = open_train_and_val(config(folder))
    assert (7, 2) in shades(train) & shades(val)
    assert train.note == f"left out of {folder}/train: 3 files ending in .dcm (1), .DCM (1), nothing (1)"
    assert (len(train), len(val)) == (8, 5)


def test_paths_with_odd_characters_and_links(folder):
    odd = folder / "train" / "a b#c%20 größe 猫"
    (odd / "deep").mkdir(parents=True)
    picture(3).save(odd / "deep" / "B #1 %.PNG", "PNG")
    picture(5).save(odd / "Z 猫.png")
    (odd / "broken.png").symlink_to(folder / "none.png")
    (odd / "._Z 猫.png").write_bytes(b"macOS")
    (odd / ".ipynb_checkpoints").mkdir()
    picture(9).save(odd / ".ipynb_checkpoints" / "copy.png")
    shutil.copytree(odd, folder.parent / "another disk", symlinks=True)
    (folder / "val" / odd.name).symlink_to(folder.parent / "another disk", target_is_directory=True)
    (folder.parent / "another disk" / "broken.png").unlink()
    (folder.parent / "another disk" / "broken.png").symlink_to("none.png")
    train, val = open_train_and_val(config(folder))
    assert train.class_names == val.class_names == ["Cat", odd.name, "dog"]
    for source in (train, val):
        ours = [i for i, (_, label) in enumerate(source.images.samples) if label == 1]
        names = [os.path.basename(source.images.samples[i][0]) for i in ours]
        assert names == ["Z 猫.png", "broken.png", "B #1 %.PNG"]
        assert [source.images[i][0].getpixel((0, 0))[0] for i in (ours[0], ours[2])] == [5, 3]
        with pytest.raises(UnreadableImage, match=r"猫/broken.png: not a readable image \(No such file") as caught:
            source.images[ours[1]]
        assert caught.value.name == source.images.samples[ours[1]][0]


def test_roots_that_are_no_folder_of_splits(folder, tmp_path, monkeypatch):
    file = folder / "train" / "Cat" / "0.png"
    for source, expected in (
        ("folder", "a file, not a folder"),
        ("wds", "a file, not a folder"),
        ("hf", "a file; give"),
    ):
        with pytest.raises(DataError, match=expected):
            open_train_and_val(config(file, source))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no split 'train': it has none"):
        open_train_and_val(config(tmp_path / "empty"))
    scandir = os.scandir

    def forbid(path):
        if str(path).endswith("nested"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)  # root may read everything
    with pytest.raises(DataError, match=r"train/Cat/nested: cannot be read \(Permission denied\)"):
        open_train_and_val(config(folder))


def test_more_than_8_bits_in_all_sources(folder, tmp_path):
    deep = Image.fromarray(np.full((4, 4), 500, dtype=np.uint16))
    deep.save(folder / "train" / "Cat" / "0.png")
    root = tmp_path / "deep"
    root.mkdir()
    for split in ("train", "test"):
        columns = {"image": [encoded(deep)], "label": [0]}
        datasets.Dataset.from_dict(columns).to_parquet(root / f"{split}.parquet")
    for source, path in (("folder", folder), ("hf", root)):
        for value_range, expected in ((None, 2), ((0, 1000), 128)):
            train, _ = open_train_and_val(config(path, source, value_range=value_range))
            assert train.images[0][0].getpixel((0, 0)) == (expected,) * 3


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["image", "binary", "struct"])
def test_hf_unreadable_images_and_labels_are_named(kind, tmp_path):
    """By row if the bytes are in the data, by path if they are in a file; a wrong label is no unreadable image."""
    root = tmp_path / "data"
    root.mkdir()
    picture(4).save(root / "x.png")
    contents = [encoded(picture(5)), b"no image", None, encoded(picture(6)), encoded(picture(7))]
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    feature = {"image": datasets.Image(), "binary": datasets.Value("binary"), "struct": image}[kind]
    images = contents if kind == "binary" else [content and {"bytes": content, "path": None} for content in contents]
    if kind == "struct":  # `to_parquet` would put the files of the other into the data
        images += [{"bytes": None, "path": str(root / name)} for name in ("x.png", "none.png")]
        images += [{"bytes": contents[0], "path": "gone.png"}]
    labels = [1, 0, 0, 1, 0, 1, 1, 1][: len(images)]
    features = datasets.Features({"image": feature, "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split in ("train", "test"):
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(root / f"{split}.parquet")
    train, _ = open_train_and_val(config(root, "hf"))
    good = {0: 5, 5: 4, 7: 5} if kind == "struct" else {0: 5}
    for row, shade in good.items():
        image, label = train.images[row]
        assert (image.mode, image.getpixel((0, 0))[0], label) == ("RGB", shade, 1)
    for row, expected in ((1, "not a readable image .*; remove or replace it"), (2, "no image; remove the row")):
        with pytest.raises(UnreadableImage, match=rf"data \(train\), row {row}: {expected}") as caught:
            train.images[row]
        assert caught.value.name == f"{root} (train), row {row}"
    if kind == "struct":
        with pytest.raises(UnreadableImage, match=r"none.png: not a readable image .No such file"):
            train.images[6]
    for missing in (-1, None):
        table = datasets.Dataset.from_dict({"image": images, "label": [missing, *labels[1:]]}, features=features)
        table.to_parquet(root / "train.parquet")
        with pytest.raises(
            DataError, match=r"data \(train\): the column 'label' .* has rows without a label"
        ) as caught:
            open_train_and_val(config(root, "hf"))
        assert not isinstance(caught.value, UnreadableImage)


@pytest.mark.parametrize("labels", [["a", " "], ["a", ""], [0, -1], ["1", "-1"]])
def test_hf_values_that_stand_for_no_label(labels, tmp_path):
    """Unless a list of classes has -1."""
    columns = {"image": [encoded(picture(0))] * 2, "label": labels}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"the column 'label' \(data.label_key\) has rows without a label \(.*-1\)"):
        open_split(config(tmp_path, "hf"), "train")
    if "-1" in map(str, labels):
        (tmp_path / "names.txt").write_text(f"-1\n{labels[0]}\n")
        (tmp_path / "data").mkdir()
        (tmp_path / "train.parquet").rename(tmp_path / "data" / "train.parquet")
        source = open_split(config(tmp_path / "data", "hf", class_names=str(tmp_path / "names.txt")), "train")
        assert source.images.labels.tolist() == [1, 0]


def test_hf_labels_without_a_name_are_named(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict({"image": [picture(0)], "label": [1]}, features=features).with_format("arrow")[:]
    for wrong in (2, -7, 2**62):
        wrongly = table.set_column(1, table.schema.field(1), [[wrong]])
        pq.write_table(wrongly, tmp_path / "train.parquet")
        with pytest.raises(DataError, match=rf"the column 'label' \(data.label_key\) has {wrong}, and 2 names"):
            open_split(config(tmp_path, "hf"), "train")


def test_links(folder):
    """Those to elsewhere are followed, those that lead back are not."""
    (folder / "train" / "Cat" / "nested" / "loop").symlink_to(folder / "train" / "Cat")
    shutil.copytree(folder / "val" / "dog", folder.parent / "elsewhere")
    (folder / "train" / "dog" / "more").symlink_to(folder.parent / "elsewhere")
    train, _ = open_train_and_val(config(folder))
    assert len(train) == 7 + 2


def test_a_class_folder_that_is_not_utf_8(folder):
    os.mkdir(os.fsencode(folder / "train") + b"/\xff")
    with pytest.raises(DataError, match=r"the name of the folder '.udcff' is not UTF-8; rename it"):
        open_train_and_val(config(folder))


def test_one_split_alone_saved_to_disk(parquet, tmp_path):
    datasets.load_dataset(str(parquet), split="train").save_to_disk(tmp_path / "disk")
    with pytest.raises(DataError, match=r"disk is one split of a data set"):
        open_train_and_val(config(tmp_path / "disk", "hf"))
    datasets.load_dataset(str(parquet)).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"^\S+both is stored already, by save_to_disk: leave data.streaming out$"):
        open_train_and_val(config(tmp_path / "both", "hf", streaming=True, epoch_images=3))


def test_hf_images_in_an_archive(tmp_path):
    """Outside data.root, with leave."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.png", encoded(picture(8)))
        archive.writestr("bad.png", b"no image")
    paths = [f"zip://{name}::{tmp_path / 'a.zip'}" for name in ("x.png", "bad.png")]
    columns = {"image": [{"bytes": None, "path": path} for path in paths], "label": ["a", "a"]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(columns, features=features) for split in ("train", "test")}
    ).save_to_disk(tmp_path / "data")
    train, _ = open_train_and_val(config(tmp_path / "data", "hf", absolute_paths=True))
    assert train.images[0][0].getpixel((0, 0)) == (8, 8, 8)
    stored = datasets.load_from_disk(tmp_path / "data")["train"].cast_column("image", datasets.Image(decode=False))
    path = r" \(zip://bad.png.*\)" if stored[1]["image"]["bytes"] is None else ""  # `datasets` 3 copies the bytes
    with pytest.raises(UnreadableImage, match=f"row 1{path}: not a readable image"):
        train.images[1]


def test_hf_image_files(folder):
    (folder / "train" / "Cat" / "nested" / "grey.jpg").unlink()  # `datasets` wants all images at one depth
    (folder / "train" / "Cat" / "1.png").write_bytes(b"no image")
    train, val = open_train_and_val(config(folder, "hf"))
    assert train.class_names == ["Cat", "dog"]
    assert shades(val) == {(0, 0), (255, 1)}
    paths = [value["path"] for value in train.images.dataset["image"]]
    with pytest.raises(UnreadableImage, match=r"train/Cat/1.png: not a readable image"):
        train.images[paths.index(str(folder / "train" / "Cat" / "1.png"))]


def test_hf_damaged_data(parquet, monkeypatch):
    train, _ = open_train_and_val(config(parquet, "hf"))

    def fail(*_):
        raise pyarrow.ArrowInvalid("bad block\nat 7")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "__getitem__", fail)
        with pytest.raises(
            DataError, match=r"\(train\), row 2: `datasets` cannot read the data \(bad block\)"
        ) as caught:
            train.images[2]
        assert not isinstance(caught.value, UnreadableImage)
    with pytest.raises(IndexError):
        train.images[len(train)]
    content = (parquet / "train.parquet").read_bytes()
    (parquet / "train.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="`datasets` cannot read it"):
        open_train_and_val(config(parquet, "hf"))


def test_hf_columns_that_hold_no_images(parquet, tmp_path):
    with pytest.raises(DataError, match=r"the column 'label' \(data.image_key\) holds int64, not images"):
        open_train_and_val(config(parquet, "hf", image_key="label"))


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


def _write_slowly(root, barrier, made) -> None:
    def write(folder) -> None:
        barrier.wait(30)  # all have seen that there is nothing
        folder.mkdir()
        for split in ("train", "validation"):
            (folder / f"{split}.parquet").write_text(str(os.getpid()))
            time.sleep(0.02)

    digits._write = write
    made.put(digits.write_digits(root))


def test_processes_that_write_the_digits_at_once(tmp_path):
    root, context = tmp_path / "new" / "digits", multiprocessing.get_context("fork")
    barrier, made = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_write_slowly, args=(root, barrier, made)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    files = {split: str(root / f"{split}.parquet") for split in ("train", "validation")}
    assert [made.get(timeout=10) for _ in workers] == [files] * 4
    assert len({(root / f"{split}.parquet").read_text() for split in files}) == 1  # both are of one process
    assert [path.name for path in root.parent.iterdir()] == ["digits"]


def test_digits_to_predict_on(tmp_path):
    files = digits.write_digits(tmp_path / "digits")
    rows = datasets.load_dataset("parquet", data_files=files)["validation"]
    paths = digits.write_samples(tmp_path / "samples", 3)
    assert [path.name for path in paths] == [f"{i}_is_{rows[i]['label']}.png" for i in range(3)]
    for path, row in zip(paths, rows, strict=False):
        assert Image.open(path).tobytes() == row["image"].tobytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written there"):
        digits.write_samples(tmp_path / "file")


def test_digits_that_appear_while_the_folder_is_looked_at(tmp_path, monkeypatch):
    exist, looks = digits._exist, []

    def late(files) -> bool:
        looks.append(exist(files))
        if len(looks) == 1:
            tmp_path.joinpath("train.parquet").touch()
            tmp_path.joinpath("validation.parquet").touch()
        return looks[-1]

    monkeypatch.setattr(digits, "_exist", late)
    monkeypatch.setattr(digits, "_write", lambda folder: folder.mkdir())
    digits.write_digits(tmp_path)
    assert looks[0] is False
    assert looks[-1] is True


def test_the_digits_are_written_without_a_bar(tmp_path, capfd):
    """Each process would print its own."""
    before = datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    try:
        digits.write_digits(tmp_path / "digits")
        assert not datasets.are_progress_bars_disabled()
    finally:
        if before:
            datasets.disable_progress_bars()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [NotADirectoryError, PermissionError, OSError])
def test_a_cache_that_cannot_be_written(error, parquet, tmp_path, monkeypatch):
    """The data is right; the message says what is not."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)

    def fail(*_, **__):
        if error is OSError:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from OSError(28, "No space left")
        raise error(13, "Permission denied", str(cache / "parquet"))

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(DataError, match=r"cache.*: `datasets` cannot write its cache there .*; set HF_HOME, or "):
        open_train_and_val(config(parquet, "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "another")
    if error is not OSError:
        with pytest.raises(DataError, match=r"`datasets` cannot read it as a folder or a hub name \(data.root\)"):
            open_train_and_val(config(parquet, "hf"))
