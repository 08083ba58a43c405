"""Pairs of image and mask from every source, and what is wrong with one, by its name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from conv2former import ConfigError, DataError
from conv2former.config import check_config
from conv2former.data import Stream, seed_all
from conv2former.engine.images import settle_images
from conv2former.engine.prepare import changed_keys
from conv2former.tasks.segmentation import pairs
from conv2former.tasks.segmentation.augment import EvalTransform, TrainTransform
from conv2former.tasks.segmentation.labels import CITYSCAPES, Labels, as_targets
from conv2former.tasks.segmentation.masks import read_mask
from conv2former.tasks.segmentation.pairs import Pair
from conv2former.tasks.segmentation.restore import saved_config
from conv2former.tasks.segmentation.sources import open_split, open_train_and_val
from conv2former.tasks.segmentation.task import Segmentation
from conv2former.tools.prediction.segmentation import settings_from

from ..engine.conftest import configure
from .conftest import NAMES, draw, write_pair


def opened(raw, **changes):
    return Segmentation().open_data(configure(raw, **changes))


def masks_of(source) -> list[np.ndarray]:
    return [source.images[i][0].mask for i in range(len(source))]


def test_pairs_of_a_folder(raw, folder):
    train, val = opened(raw)
    assert (len(train), len(val), train.class_names) == (12, 5, NAMES)
    assert train.images.name(1) == str(folder / "images" / "train" / "01.png")
    masks = masks_of(train)
    pair = train.images[1][0]
    assert (pair.photo.mode, pair.photo.size[::-1]) == ("RGB", pair.mask.shape)
    assert masks[1].dtype == np.uint8
    np.testing.assert_array_equal(masks[1], draw(1201)[1])
    np.testing.assert_array_equal(train.counts.pixels, [sum((m == c).sum() for m in masks) for c in range(3)])
    assert train.counts.ignored == sum((mask == 255).sum() for mask in masks)


@pytest.mark.parametrize("kind", ["grey", "palette", "16 bits", "4 bits", "palette of 4 bits", "1 bit", "bmp", "tiff"])
def test_masks_of_every_kind(tmp_path, kind):
    """The numbers count, and never the colours that a palette gives them."""
    numbers = np.arange(60, dtype=np.uint8).reshape(6, 10) % 3
    path, image = tmp_path / "mask.png", Image.fromarray(numbers)
    if kind.startswith("palette"):
        image = Image.frombytes("P", (10, 6), numbers.tobytes())
        image.putpalette([200, 10, 10, 0, 0, 0, 9, 9, 9] + [0] * 759)
        image.save(path, bits=4 if "4" in kind else 8)
    elif kind == "16 bits":
        numbers = numbers.astype(np.uint16) + 300
        Image.fromarray(numbers).save(path)
    elif kind == "4 bits":
        path = tmp_path / "grey4.png"
        path.write_bytes(_grey_png_of_4_bits(numbers))
    elif kind == "1 bit":
        numbers = numbers % 2
        Image.fromarray(numbers * 255).convert("1").save(path)
    elif kind == "bmp":
        image.save(path := tmp_path / "mask.bmp")
    elif kind == "tiff":
        image.save(path := tmp_path / "mask.tiff")
    else:
        image.save(path)
    found = read_mask(str(path), str(path))
    np.testing.assert_array_equal(found.numbers, numbers)
    np.testing.assert_array_equal(np.flatnonzero(found.counts), np.unique(numbers))
    assert found.counts.sum() == numbers.size


def _grey_png_of_4_bits(numbers: np.ndarray) -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(int(a) << 4 | int(b) for a, b in row.reshape(-1, 2)) for row in numbers)
    header = struct.pack(">IIBBBBB", numbers.shape[1], numbers.shape[0], 4, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def mask_path(folder, name="02"):
    return folder / "masks" / "train" / f"{name}.png"


def _spoil(folder, kind):
    path = mask_path(folder)
    numbers = np.asarray(Image.open(path)).copy()
    if kind == "class":
        numbers[5, 5:9] = 7
    elif kind == "size":
        numbers = numbers[:, :-1]
    elif kind == "turned":
        numbers = np.ascontiguousarray(numbers.T)
    if kind in ("class", "size", "turned"):
        Image.fromarray(numbers).save(path)
    elif kind in ("RGB", "RGBA", "LA"):
        Image.fromarray(numbers).convert(kind).save(path)
    elif kind == "missing":
        path.unlink()
    elif kind == "jpeg":
        Image.fromarray(numbers).save(path.with_suffix(".jpg"))
        path.unlink()
    elif kind == "renamed jpeg":
        Image.fromarray(numbers).save(path, "JPEG")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "twice":
        Image.fromarray(numbers).save(path.with_suffix(".tif"))
    elif kind == "thin":
        write_pair(folder, "train", "02", Image.new("RGB", (4000, 1)), np.zeros((1, 4000), np.uint8))


WRONG = {
    "class": r"02\.png: 4 pixels of class 7; the list has 3 classes, numbers 0 to 2, and 255 is ignored",
    "size": r"02\.png: a mask of 47 x 40 pixels, and its image .*02\.png has 48 x 40",
    "turned": r"02\.png: a mask of 40 x 48 .* has 48 x 40; one of them is turned: an image is read upright",
    "RGB": r"02\.png: an image in colours \(mode RGB\), and a mask has one number a pixel",
    "RGBA": r"02\.png: an image in colours \(mode RGBA\)",
    "LA": r"02\.png: an image in colours \(mode LA\)",
    "missing": r"images/train/02\.png: no mask .*masks/train/02\.png",
    "jpeg": r"02\.png: no mask .*02\.png, but .*02\.jpg; masks are read from \.png",
    "renamed jpeg": r"02\.png: a mask in JPEG, which changes numbers",
    "truncated": r"masks/train/02\.png: not a readable image",
    "empty": r"masks/train/02\.png: not a readable image",
    "thin": r"images/train/02\.png: an image of 4000 x 1 pixels is too long and thin; cut it in pieces",
    "twice": r"02\.png and .*02\.tif have one name",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named_before_training(raw, folder, kind):
    _spoil(folder, kind)
    with pytest.raises(DataError, match=WRONG[kind]):
        opened(raw)


def test_several_mistakes_are_counted(raw, folder):
    for name in ("02", "05"):
        Image.fromarray(np.full((40, 48), 9, np.uint8)).save(mask_path(folder, name))
    with pytest.raises(DataError, match=r"02\.png: .* class 9; .*; there are mistakes in 1 more file at least"):
        opened(raw)


def test_without_the_check_the_loader_says_it(raw, folder):
    _spoil(folder, "class")
    train, _ = opened(raw, data__check=False, loss__class_weights="none")
    assert train.counts is None
    with pytest.raises(DataError, match="4 pixels of class 7"):
        masks_of(train)


def test_unreadable_masks_may_be_skipped(raw, folder):
    _spoil(folder, "truncated")
    train, _ = opened(raw, data__on_error="skip")
    assert train.counts.unreadable == 1
    with pytest.raises(DataError, match="not a readable image"):
        train.images[2]
    Image.new("RGB", (48, 40)).save(mask_path(folder))
    with pytest.raises(DataError, match="an image in colours"):
        opened(raw, data__on_error="skip")


def test_what_was_counted_is_kept_until_a_file_changes(raw, folder, monkeypatch):
    first, _ = opened(raw)

    def fail(*args):
        raise AssertionError

    monkeypatch.setattr(pairs, "read_mask", fail)
    again, _ = opened(raw)
    np.testing.assert_array_equal(again.counts.pixels, first.counts.pixels)
    assert again.counts[1:] == first.counts[1:]
    mask_path(folder).write_bytes(mask_path(folder, "04").read_bytes())
    with pytest.raises(AssertionError):
        opened(raw)


def test_binary_masks(raw, folder):
    for split in ("train", "val"):
        for path in (folder / "masks" / split).glob("*.png"):
            Image.fromarray(np.uint8(255) * (np.asarray(Image.open(path)) == 1)).save(path)
    with pytest.raises(DataError, match=r"numbers 0 and 255 alone, .* data\.labels=binary data\.ignore_index=null"):
        opened(raw)
    with pytest.raises(ConfigError, match=r"data\.ignore_index: with data\.labels binary 255 is the second class"):
        configure(raw, data__labels="binary")
    with pytest.raises(DataError, match=r"classes\.txt has 3 classes, data\.labels binary says 2"):
        opened(raw, data__labels="binary", data__ignore_index=None)
    (folder / "classes.txt").unlink()
    train, _ = opened(raw, data__labels="binary", data__ignore_index=None)
    assert train.class_names == ["background", "foreground"]
    assert set(np.unique(np.concatenate([mask.ravel() for mask in masks_of(train)]))) == {0, 1}


def test_what_the_numbers_mean():
    def meant(kind, classes, ignore, numbers):
        labels = Labels(kind, classes, ignore)
        found = labels.to_indices(np.array([numbers], np.uint16), labels.table(), "m")
        return as_targets(torch.from_numpy(found))[0].tolist()

    assert meant("minus_one", 150, 255, [0, 1, 150, 255]) == [-1, 0, 149, -1]
    assert meant("cityscapes", 19, 255, [*CITYSCAPES.values(), 0, 9, 29, 255]) == [*range(19), -1, -1, -1, -1]
    assert meant("binary", 2, None, [0, 1, 255, 65535]) == [0, 1, 1, 1]
    assert meant("index", 3, 1, [0, 1, 2]) == [0, -1, 2]
    assert meant("index", 300, 65535, [0, 255, 299, 65535]) == [0, 255, 299, -1]
    assert meant("index", 255, 255, [254, 255]) == [254, -1]
    for kind, wrong, hint in (("index", 3, "data.labels=minus_one"), ("minus_one", 4, "numbers 1 to 3")):
        with pytest.raises(DataError, match=re.escape(hint)):
            meant(kind, 3, 255, [wrong])


def test_ade20k_and_cityscapes_as_their_authors_store_them(raw, tmp_path):
    image, mask = draw(1)
    for split in ("training", "validation"):
        numbers = Image.fromarray(np.where(mask == 255, 0, mask + 148).astype(np.uint8))
        for folder, pixels in (("images", image), ("annotations", numbers)):
            (tmp_path / "ade" / folder / split).mkdir(parents=True)
            pixels.save(tmp_path / "ade" / folder / split / f"ADE_1.{'jpg' if folder == 'images' else 'png'}")
    config = configure(raw, data__root=str(tmp_path / "ade"), data__source="ade20k", loss__class_weights="none")
    train, val = Segmentation().open_data(config)
    assert (len(train.class_names), val.name) == (150, str(tmp_path / "ade" / "images" / "validation"))
    np.testing.assert_array_equal(train.images[0][0].mask, np.where(mask == 255, 255, mask + 147))
    (tmp_path / "ade" / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n" + "".join(f"{i}\t0.1\t1\t1\tthing{i}, also {i}\n" for i in range(150))
    )
    assert open_split(config, None).class_names[:2] == ["thing0", "thing1"]

    for split in ("train", "val"):
        for folder, suffix, pixels in (
            ("leftImg8bit", "_leftImg8bit", image),
            ("gtFine", "_gtFine_labelIds", Image.fromarray(np.where(mask == 255, 0, mask + 24).astype(np.uint8))),
            ("gtFine", "_gtFine_color", image),
        ):
            (tmp_path / "city" / folder / split / "ulm").mkdir(parents=True, exist_ok=True)
            pixels.save(tmp_path / "city" / folder / split / "ulm" / f"ulm_1{suffix}.png")
    config = configure(raw, data__root=str(tmp_path / "city"), data__source="cityscapes", loss__class_weights="none")
    train, _ = Segmentation().open_data(config)
    assert train.class_names == list(CITYSCAPES)
    assert train.note == ""
    np.testing.assert_array_equal(train.images[0][0].mask, np.where(mask == 255, 255, mask + 11))


def test_tables_and_hugging_face_sets(raw, folder, tmp_path):
    found = open_train_and_val(configure(raw))[0]
    rows = ["image,mask,split"]
    for split, count in (("train", 12), ("val", 5)):
        rows += [f"images/{split}/{i:02}.png,masks/{split}/{i:02}.png,{split}" for i in range(count)]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    table, _ = opened(raw, data__source="csv", data__csv=str(tmp_path / "pairs.csv"))
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    hf = tmp_path / "hf"
    for split, count in (("train", 12), ("validation", 5)):
        own = "val" if split == "validation" else split
        files = [[str(folder / kind / own / f"{i:02}.png") for i in range(count)] for kind in ("images", "masks")]
        columns = {
            key: [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
            for key, paths in zip(features, files, strict=True)
        }
        hf.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(hf / f"{split}.parquet")
    names = str(folder / "classes.txt")
    stored, _ = opened(raw, data__source="hf", data__root=str(hf), data__class_names=names)
    for other in (table, stored):
        for a, b in zip(masks_of(found), masks_of(other), strict=True):
            np.testing.assert_array_equal(a, b)
    for changes, message in (
        ({"data__mask_key": "labels"}, r"no column 'labels' \(data\.mask_key\)"),
        ({"data__class_names": None}, r"nothing names the classes; write their names"),
        ({"data__class_names": None, "data__num_classes": 2}, r"row 0 \(mask\): \d+ pixels of class 2"),
    ):
        with pytest.raises(DataError, match=message):
            opened(raw, **{"data__source": "hf", "data__root": str(hf), "data__class_names": names} | changes)
    (tmp_path / "pairs.csv").write_text("\n".join([*rows, "images/train/00.png,masks/no.png,val"]))
    for text, message in (
        ("\n".join([*rows[:-1], "images/val/04.png,masks/no.png,val"]), r"line 18: no such file: .*masks/no\.png"),
        ("\n".join([*rows[:-1], "images/val/04.png,../x.png,val"]), r"line 18: \.\./x\.png leads out of data\.root"),
        ("\n".join(rows).replace("mask,", "truth,"), r"no column 'mask' \(data\.mask_key\)"),
    ):
        (tmp_path / "pairs.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            opened(raw, data__source="csv", data__csv=str(tmp_path / "pairs.csv"))


def test_folders_that_lie_otherwise(raw, folder):
    before = len(opened(raw)[0])
    (folder / "masks").rename(folder / "mask")
    with pytest.raises(DataError, match=r"no folder 'masks' \(did you mean 'mask'\?\); expected .*SPLIT/NAME\.png"):
        opened(raw)
    (folder / "mask").rename(folder / "masks")
    for kind in ("images", "masks"):
        (folder / kind / "train").rename(folder / kind / "Train")
    assert len(opened(raw)[0]) == before
    for kind in ("images", "masks"):
        (folder / kind / "Train").rename(folder / kind / "trian")
    with pytest.raises(DataError, match=r"has no split 'train' \(did you mean 'trian'\?\)"):
        opened(raw)
    for kind in ("images", "masks"):
        (folder / kind / "trian").rename(folder / kind / "train")
    with pytest.raises(DataError, match="has no split 'tset'"):
        opened(raw, data__val_split="tset")
    with pytest.raises(DataError, match=r"data\.val_split is the training split, 'train'"):
        opened(raw, data__val_split="train")
    with pytest.raises(DataError, match="no such folder"):
        opened(raw, data__root="nowhere")
    (folder / "images" / "val" / "04.png").unlink()
    (folder / "images" / "val" / "04.png").symlink_to(folder / "images" / "train" / "04.png")
    with pytest.raises(DataError, match=r"have 1 image in common: .*train/04\.png; remove them from one"):
        opened(raw)


def test_images_are_held_out_where_there_is_no_validation_split(raw, folder):
    with pytest.raises(DataError, match=r"nothing is held out .* where there is more than 'train'"):
        shutil.copytree(folder / "images" / "val", folder / "images" / "extra")
        shutil.copytree(folder / "masks" / "val", folder / "masks" / "extra")
        for kind in ("images", "masks"):
            shutil.rmtree(folder / kind / "val")
        opened(raw, data__holdout=0.25)
    for kind in ("images", "masks"):
        shutil.rmtree(folder / kind / "extra")
    with pytest.raises(DataError, match=r"has no validation split.*; name one .*, or data\.holdout=0\.2"):
        opened(raw)

    def names(source):
        return {Path(source.images.name(i)).name for i in range(len(source))}

    train, val = opened(raw, data__holdout=0.25)
    assert (len(train), len(val)) == (9, 3)
    assert not names(train) & names(val)
    assert names(open_split(configure(raw, data__holdout=0.25), None)) == names(val)
    assert names(opened(raw, data__holdout=0.25, data__holdout_seed=1)[1]) != names(val)
    moved = folder.with_name("moved")  # the choice does not depend on where the data lies
    folder.rename(moved)
    for kind in ("images", "masks"):  # nor are folders of splits needed
        for path in (moved / kind / "train").iterdir():
            path.rename(moved / kind / path.name)
        (moved / kind / "train").rmdir()
    train, val = opened(raw, data__root=str(moved), data__holdout=0.25)
    assert (len(train), len(val)) == (9, 3)
    with pytest.raises(DataError, match="has no validation split"):
        opened(raw, data__root=str(moved))


def transformed(config, pair, *place):
    seed_all(Stream.IMAGE, 0, *place)
    return TrainTransform(config, 3)(pair)


def test_augmentation_is_a_function_of_its_place_and_keeps_image_and_mask_together(raw):
    image, mask = draw(5, (90, 70))
    pair = Pair(image, mask, "x")
    config = configure(raw, augment__vflip=0.5)
    first, again, other = (transformed(config, pair, *place) for place in ((0, 3), (0, 3), (1, 3)))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.image, other.image)
    plain = configure(raw, augment__photometric=0.0, data__img_size=[48, 64])
    wide = set()
    for index in range(12):
        found = transformed(plain, pair, 0, index)
        assert (found.image.shape, found.mask.shape, found.image.dtype) == ((3, 48, 64), (48, 64), torch.uint8)
        counts = found.mask < 3
        told = ((found.image.float().mean(0) - 40) / 80).round().clamp(0, 2)
        assert (told[counts] == found.mask[counts]).float().mean() > 0.95  # but for pixels at edges
        wide.add(int((found.mask != 255).sum(1).max()))
    assert len(wide) > 3  # of several scales
    assert {int(v) for v in transformed(configure(raw, augment__scale=[0.2, 0.2]), pair, 0, 0).mask.unique()} >= {255}


@pytest.mark.parametrize("size", [(20, 4000), (4000, 20), (1, 150), (1, 1)])
@pytest.mark.parametrize("number", [1, 255])
def test_crops_of_thin_images_and_of_masks_that_count_for_nothing(raw, size, number):
    """Of the longest images that are read (see WRONG for longer ones), in the scale of the data and in a larger one."""
    pair = Pair(Image.new("RGB", size[::-1], "red"), np.full(size, number, np.int32), "x")
    for config in (configure(raw), configure(raw, data__short_side=40, augment__scale=[2, 2])):
        found = transformed(config, pair, 0, 0)
        assert (found.image.shape, found.mask.shape) == ((3, 32, 32), (32, 32))
        assert number in found.mask
        assert {*found.mask.unique().tolist()} <= {number, 255}


def test_evaluation_resizes_the_image_and_not_the_mask():
    image, mask = draw(5, (90, 70))
    found = EvalTransform(35, 3)(Pair(image, mask, "x"))
    assert (found.image.shape, found.mask.shape) == ((3, 45, 35), (90, 70))
    assert EvalTransform(None, 1)(Pair(image, mask, "x")).image.shape == (1, 90, 70)


def test_the_configuration_is_checked_by_its_own_sections(raw):
    for section, key, value, message in (
        ("model", "head", {"nam": "fpn"}, r"model\.head\.nam: unknown key \(did you mean 'name'\?\)"),
        ("model", "head", {"name": "unet"}, r"model\.head\.name: input should be 'upernet', 'fpn'"),
        ("model", "head", {"name": "fpn", "channels": 40}, r"model\.head\.channels: a multiple of 32 from 64 on"),
        ("loss", "dise", 1.0, r"loss\.dise: unknown key \(did you mean 'dice'\?\)"),
        ("augment", "mixup", 0.5, r"augment\.mixup: unknown key"),
        ("data", "cache", "ram", r"data\.cache: ram holds images without masks"),
        ("data", "crop_pct", 1.0, r"data\.crop_pct: has no effect with task: segmentation; leave it out"),
        ("data", "crop_mode", "squash", r"data\.crop_mode: has no effect"),
        ("data", "interpolation", "bilinear", r"data\.interpolation: has no effect"),
        ("data", "check", False, r"loss\.class_weights: sqrt needs pixels counted"),
        ("checkpoint", "metric", "top1", r"checkpoint\.metric: input should be 'miou'"),
    ):
        changed = {**raw, section: {**raw.get(section, {}), key: value}}
        with pytest.raises(ConfigError, match=message):
            check_config(changed, "test")
    with pytest.raises(ConfigError, match=r"train\.batch_size: upernet normalises"):
        configure({**raw, "model": {**raw["model"], "head": {}}}, train__batch_size=1)
    with pytest.raises(ConfigError, match=r"loss\.class_weights: 2 numbers for 3 classes"):
        opened(raw, loss__class_weights=[1.0, 2.0])


def test_what_a_run_says_and_notes_of_its_images(raw):
    config, (line,) = settle_images(configure(raw, data__img_size=[32, 64], data__short_side=40, data__std=[1, 1, 1]))
    assert line == (
        "images: training crops of 32 x 64 (height x width) from the configuration; 3 channels (RGB), mean 0.485, "
        "0.456, 0.406 by default; std 1, 1, 1, resized to a shorter side of 40 from the configuration"
    )
    noted = config.to_dict()
    assert [noted["data"][key] for key in ("interpolation", "crop_pct", "crop_mode")] == [None] * 3
    assert settle_images(check_config(noted, "a run's own"))[0] == config


def test_runs_that_noted_a_classifier_s_crop_go_on(raw):
    """As those of earlier versions, which did not use it: with their command, their own file and their checkpoint."""
    config, _ = settle_images(configure(raw, data__workers=None))
    noted = config.to_dict()
    noted["data"] |= {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}
    assert changed_keys(noted, config.to_dict()) == []
    assert changed_keys(noted, settle_images(configure(raw, data__std=[1, 1, 1]))[0].to_dict()) == [
        "data.std: [0.229, 0.224, 0.225] -> [1.0, 1.0, 1.0]"
    ]
    assert saved_config(noted, "best.pt") == config == settings_from(noted, ())


def test_a_class_that_would_be_ignored_is_said(raw, folder):
    (folder / "classes.txt").write_text("\n".join(f"c{i}" for i in range(256)))
    with pytest.raises(DataError, match=r"data\.ignore_index: 255 is also the number of the class 'c255'; set"):
        opened(raw)
    train, _ = opened(raw, data__ignore_index=None)
    assert (train.counts.ignored, train.images[3][0].mask.dtype) == (0, np.int32)
    assert train.counts.pixels[255] == sum((mask == 255).sum() for mask in masks_of(train)) > 0


def test_a_split_without_a_labelled_pixel_is_refused(raw, folder):
    for path in (folder / "masks" / "val").glob("*.png"):
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    with pytest.raises(DataError, match="the masks have the numbers 255 alone"):
        opened(raw)
    with pytest.raises(DataError, match="not one pixel of the masks has a class"):
        opened(raw, data__labels="minus_one")
