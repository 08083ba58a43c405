from __future__ import annotations

import csv
import json
import math
import re
import runpy
import shutil
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.real_labels import RealLabelsImagenet

from conv2former import (
    CheckpointError,
    ConfigError,
    Conv2Former,
    DataError,
    UserError,
    inspect_checkpoint,
    load_model,
)
from conv2former.engine import train
from conv2former.engine.evaluate import evaluate
from conv2former.errors import OutputError
from conv2former.tools.evaluation.files import Extras, summary
from conv2former.tools.evaluation.validate import validate, validate_files
from conv2former.tools.runs.killing import RunProcesses
from conv2former.weights.preprocessing import Preprocessing, candidates

from ..conftest import ROOT
from ..engine.conftest import configure, raw_config, small_data  # noqa: F401 - fixtures

pytestmark = pytest.mark.slow

SHAPE = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "kernel_size": 7, "head_hidden_size": 64}
INFO = resources.files("timm.data") / "_info"
LETTERS = list("abcdefghij")


def by_hand(model, samples, view: Preprocessing) -> dict[str, float]:
    """Evaluates file by file: Pillow reads and resizes, NumPy crops and normalises.

    Args:
        samples: (path, class index) pairs.
    """
    side, right, right5, loss = view.img_size, 0, 0, 0.0
    for path, label in samples:
        image = Image.open(path).convert("RGB")
        size = math.floor(side / view.crop_pct)
        width, height = image.size
        if view.crop_mode == "squash":
            width = height = size
        elif width <= height:
            width, height = size, int(size * height / width)
        else:
            width, height = int(size * width / height), size
        image = image.resize(
            (width, height), {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[view.interpolation]
        )
        top, left = round((height - side) / 2), round((width - side) / 2)
        pixels = np.asarray(image, dtype=np.float32)[top : top + side, left : left + side] / 255
        pixels = (pixels - np.float32(view.mean)) / np.float32(view.std)
        with torch.no_grad():
            logits = model(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].double()
        order = logits.argsort(descending=True).tolist()
        right, right5 = right + (order[0] == label), right5 + (label in order[:5])
        loss += float(torch.logsumexp(logits, 0) - logits[label])
    n = len(samples)
    top5 = 100 * right5 / n if len(order) > 5 else None
    return {"top1": 100 * right / n, "top5": top5, "loss": loss / n, "n": n}


def check(row: dict, expected: dict) -> None:
    for key in ("top1", "n"):
        assert row[key] == pytest.approx(expected[key], rel=1e-12)
    assert row["top5"] == (None if expected["top5"] is None else pytest.approx(expected["top5"], rel=1e-12))
    assert row["loss"] == pytest.approx(expected["loss"], rel=2e-6)


def noise(path: Path, size: tuple[int, int], rng) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.BICUBIC).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """val/: ten classes, 3 images each, of several shapes."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    sizes = [(50, 40), (37, 61), (32, 32), (90, 33)]
    for i, name in enumerate(LETTERS):
        for k in range(3):
            noise(root / "val" / name / f"{k}.{('png', 'jpg')[k % 2]}", sizes[(i + k) % 4], rng)
    return root


def samples_of(folder: Path, class_names: list[str]) -> list[tuple[Path, int]]:
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    return [(path, class_names.index(path.parent.name)) for path in files]


def network(path: Path, num_classes: int, class_names: list[str] | None = None) -> Path:
    """Writes random weights whose answers differ from image to image."""
    torch.manual_seed(num_classes)
    model = Conv2Former(num_classes=num_classes, ls_init_value=0.5, **SHAPE)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.save({"model": model.state_dict(), "class_names": class_names}, path)
    return path


@pytest.fixture(scope="module")
def lettered(tmp_path_factory) -> Path:
    """A checkpoint with class names; it does not say where data is."""
    return network(tmp_path_factory.mktemp("networks") / "letters.pt", 10, LETTERS)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    return network(tmp_path_factory.mktemp("networks") / "imagenet.pt", 1000)


SMALL = ["data.img_size=32", "data.workers=0"]


# ------------------------------------------------------------------------------------------- equal to a plain loop


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_the_authors_file_equals_a_plain_loop(official_file, photos, mode):
    words = ["data.img_size=48", "data.workers=0", "data.interpolation=bilinear", f"data.crop_mode={mode}"]
    row = validate(official_file, None, [*words, "train.eval_batch_size=7"], data=photos)
    view = Preprocessing(48, interpolation="bilinear", crop_mode=mode)
    check(row, by_hand(load_model(official_file)[0], samples_of(photos / "val", LETTERS), view))
    assert 0 < row["top5"] < 100
    assert "the file does not name its classes" in row["notes"][0]
    assert "does not say its mean, std, crop_pct" in row["notes"][1]


def test_both_preprocessings_in_one_pass(official_file, photos, monkeypatch):
    """As two plain loops, as two evaluations, and every file is opened once."""
    opened = []
    real_open = Image.open

    def count(file, *args, **options):
        opened.append(getattr(file, "name", file))
        return real_open(file, *args, **options)

    expected = {
        name: by_hand(load_model(official_file)[0], samples_of(photos / "val", LETTERS), view)
        for name, view in candidates(64).items()
    }
    words = ["data.img_size=64", "data.workers=0", "train.eval_batch_size=8", "train.cuda_graph=off"]
    monkeypatch.setattr(Image, "open", count)
    rows = validate_files([official_file], None, words, data=photos, preprocessing="both")
    assert sorted(Path(file).name for file in opened) == sorted(p.name for p, _ in samples_of(photos / "val", LETTERS))
    assert [row["preprocessing"] for row in rows] == ["imagenet", "inception"]
    for row in rows:
        check(row, expected[row["preprocessing"]])
        alone = validate(official_file, None, words, data=photos, preprocessing=row["preprocessing"])
        assert all(alone[key] == row[key] for key in ("top1", "top5", "n", "loss", "mean", "crop_pct"))
    assert rows[0]["loss"] != rows[1]["loss"]
    text = "\n".join(summary(rows))
    for name, view in candidates(64).items():
        assert f"preprocessing {name} with data.img_size as given: {view}" in text


def test_a_trained_run_equals_a_plain_loop(raw_config, small_data, tmp_path):  # noqa: F811
    """The checkpoint brings its data along; the same images as files and as tars give the same numbers."""
    report = train(configure(raw_config, schedule__epochs=2, schedule__cooldown_epochs=0), tmp_path / "run")
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    import datasets

    split = datasets.load_dataset(str(small_data), split="validation")
    for i, item in enumerate(split):
        path = tmp_path / "files" / "abc"[item["label"]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        item["image"].save(path)
    model, info = load_model(best)
    expected = by_hand(model, samples_of(tmp_path / "files", ["a", "b", "c"]), info.preprocessing)
    own = validate(best)
    check(own, expected)
    assert own["loss"] == pytest.approx(report["loss"], rel=1e-6)
    assert (own["n"], own["weights"], own["top1"]) == (7, "average", report["top1"])
    check(validate(best, data=tmp_path / "files"), expected)  # class folders themselves, not splits
    check(validate(best, data=small_data), expected)  # parquet is found out
    raw = validate(best, use_ema=False)
    check(
        raw,
        by_hand(load_model(best, use_ema=False)[0], samples_of(tmp_path / "files", list("abc")), info.preprocessing),
    )
    assert raw["loss"] != own["loss"]
    assert raw["weights"] == "raw"


def test_several_processes_have_the_same_numbers(lettered, photos, tmp_path):
    """Shares of 3, 2 and 2 images, and of 1, 1 and 0."""
    for count in (7, 2):
        root = tmp_path / str(count)
        for path, _ in samples_of(photos / "val", LETTERS)[:count]:
            (root / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.parent.name)

        def action(name: str, root=root) -> None:
            extras = Extras(per_class=True, confusion=True, calibration=True, worst=3)
            words = [*SMALL, "train.eval_batch_size=2"]
            validate_files(
                [lettered], None, words, data=root, preprocessing="both", extras=extras, output=tmp_path / name
            )

        action(f"alone{count}")
        processes = RunProcesses(lambda count=count, action=action: action(f"three{count}"), 3, tmp_path / "log.txt")
        assert processes.wait(100), (tmp_path / "log.txt").read_text()
        assert set(processes.exit_codes) == {0}, (tmp_path / "log.txt").read_text()
        alone, three = (json.loads((tmp_path / f"{n}{count}" / "results.json").read_text()) for n in ("alone", "three"))
        for one, other in zip(alone, three, strict=True):
            assert (one["processes"], other["processes"], one["n"]) == (1, 3, count)
            for key in ("top1", "top5", "n", "worst_classes", "macro_f1", "balanced_accuracy", "per_class"):
                assert one[key] == other[key]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
            assert one["ece"] == pytest.approx(other["ece"], rel=1e-5)
            assert [w["image"] for w in one["worst"]] == [w["image"] for w in other["worst"]]
        for view in ("imagenet", "inception"):
            tables = [(tmp_path / f"{n}{count}" / f"letters-{view}" / "per_class.csv") for n in ("alone", "three")]
            assert tables[0].read_text() == tables[1].read_text()


# ----------------------------------------------------------------------------------------------- ImageNet's classes


def make_folders(root: Path, names: list[str], file: str = "0.png") -> Path:
    rng = np.random.default_rng(1)
    for i, name in enumerate(names):
        noise(root / name / file.format(i), (32, 32), rng)
    return root


@pytest.mark.parametrize("letter", ["a", "r"])
def test_imagenet_a_and_r_are_scored_among_their_classes(imagenet, tmp_path, letter):
    synsets = ImageNetInfo().label_names()
    subset = (INFO / f"imagenet_{letter}_synsets.txt").read_text().split()
    root = make_folders(tmp_path / "set", subset)
    samples, model = samples_of(root, sorted(subset)), load_model(imagenet)[0]
    order = [synsets.index(name) for name in sorted(subset)]
    row = validate(imagenet, None, SMALL, data=root)
    check(row, by_hand(lambda x: model(x)[:, order], samples, Preprocessing(32)))
    text = "\n".join(summary([row]))
    assert "200 of the network's 1,000 classes, scored among these" in text
    assert f"ImageNet-{letter.upper()}: scored among its 200 classes, as published" in text
    if letter == "r":
        return
    everything = validate(imagenet, None, SMALL, data=root, among="all")
    check(everything, by_hand(model, [(path, order[i]) for path, i in samples], Preprocessing(32)))
    assert everything["loss"] > row["loss"]
    shutil.rmtree(root / subset[0])  # another set with a subset of the classes
    assert validate(imagenet, None, SMALL, data=root)["classes"] == 1000
    assert validate(imagenet, None, SMALL, data=root, among="present")["classes"] == 199


def test_imagenet_v2_has_indices_for_names(imagenet, tmp_path):
    """Sorted as text, 10 comes before 2."""
    root = make_folders(tmp_path / "v2", [str(i) for i in (0, 2, 10, 100, 999)])
    samples = [(path, int(path.parent.name)) for path, _ in samples_of(root, ["0", "2", "10", "100", "999"])]
    check(validate(imagenet, None, SMALL, data=root), by_hand(load_model(imagenet)[0], samples, Preprocessing(32)))


def test_real_labels(imagenet, tmp_path):
    """As timm's class counts them, on some of the images, some of which have no label and some two."""
    synsets = ImageNetInfo().label_names()
    root, rng, numbers = tmp_path / "val", np.random.default_rng(2), range(1, 61)
    listed = json.loads((INFO / "imagenet_real_labels.json").read_text())
    for number in numbers:
        folder = synsets[(listed[number - 1] or [0])[0]]
        noise(root / folder / f"ILSVRC2012_val_{number:08d}.JPEG", (40, 36), rng)
    assert {0, 1, 2} <= {len(listed[number - 1]) for number in numbers}
    model = load_model(imagenet)[0]
    with torch.no_grad():  # so that some answers are right
        labels = [label for number in numbers for label in listed[number - 1]]
        model.head.fc.bias[labels] += 30.0
    torch.save({"model": model.state_dict()}, tmp_path / "biased.pt")
    row = validate(tmp_path / "biased.pt", None, SMALL, data=root, extras=Extras(real=True))

    paths = [path for path, _ in samples_of(root, synsets)]
    names = [path.name for path in paths]
    theirs = RealLabelsImagenet(names + [""] * (50_000 - len(names)))
    for path in paths:
        seen: list[torch.Tensor] = []
        by_hand(lambda x, seen=seen: seen.append(model(x)) or seen[0], [(path, 0)], Preprocessing(32))
        theirs.add_result(seen[0])
    expected = theirs.get_accuracy()
    assert row["real_top1"] == pytest.approx(expected[1])
    assert row["real_top5"] == pytest.approx(expected[5])
    assert row["real_n"] == len(theirs.is_correct[1]) < row["n"] == 60
    assert 0 < expected[1] < expected[5]
    assert "ReaL" in "\n".join(summary([row]))

    present = sorted({synsets.index(path.parent.name) for path in paths})
    some = validate(tmp_path / "biased.pt", None, SMALL, data=root, among="present", extras=Extras(real=True))
    right = n = 0
    for path in paths:
        seen = []
        by_hand(lambda x, seen=seen: seen.append(model(x)[:, present]) or seen[0], [(path, 0)], Preprocessing(32))
        answer = present[int(seen[0].argmax())]
        labels = set(listed[int(path.stem[-8:]) - 1]) & set(present)
        right, n = right + (answer in labels), n + bool(labels)
    assert some["real_n"] == n
    assert some["real_top1"] == pytest.approx(100 * right / n)
    assert right


# -------------------------------------------------------------------------------------------------- files and text


def test_everything_that_is_written(lettered, photos, tmp_path):
    other = tmp_path / "letters.pt"  # of the same name
    shutil.copy(lettered, other)
    extras = Extras(per_class=True, confusion=True, calibration=True, worst=4)
    rows = validate_files([lettered, other], None, SMALL, data=photos, extras=extras, output=tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved == json.loads(json.dumps(rows))
    with (tmp_path / "out" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["top1"]) for line in lines] == [row["top1"] for row in rows]
    files = [path for row in rows for path in row["files"].values()]
    assert len(set(files)) == 8
    for path in files:
        if path.endswith(".png"):
            assert Image.open(path).size > (100, 100)
    for row in rows:
        with Path(row["files"]["per_class"]).open() as file:
            classes = list(csv.DictReader(file))
        assert [line["class"] for line in classes] == LETTERS
        assert sum(int(line["n"]) for line in classes) == sum(int(line["answered"]) for line in classes) == 30
        assert sum(float(line["top1"]) for line in classes) / 10 == pytest.approx(row["top1"])
        assert [float(line["f1"] or "nan") for line in classes] == pytest.approx([c["f1"] for c in row["per_class"]])
        assert row["balanced_accuracy"] == pytest.approx(row["top1"])  # three images of each class
        assert row["macro_f1"] == pytest.approx(sum(c["f1"] for c in row["per_class"]) / 10)
        assert [w["loss"] for w in row["worst"]] == sorted((w["loss"] for w in row["worst"]), reverse=True)
        assert all(Path(w["image"]).is_file() and w["true"] != w["predicted"] for w in row["worst"])
        assert all(Path(w["image"]).parent.name == w["true"] for w in row["worst"])
    text = "\n".join(summary(rows, tmp_path / "out"))
    assert text.count("lowest classes") == 2
    assert text.count(f"{rows[0]['macro_f1']:.2f}  ") >= 2
    assert all(path in text for path in files)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(".")]


def test_many_classes_have_another_picture(imagenet, photos, tmp_path):
    names = ImageNetInfo().label_names()
    root = make_folders(tmp_path / "val", names[:60])
    many = validate(
        imagenet, None, SMALL, data=root, among="present", extras=Extras(confusion=True), output=tmp_path / "a"
    )
    few_root = make_folders(tmp_path / "few", names[:4])
    few = validate(imagenet, None, SMALL, data=few_root, extras=Extras(confusion=True), output=tmp_path / "b")
    sizes = [Image.open(row["files"]["confusion"]).size for row in (many, few)]
    assert sizes[0] == (1600, 850)
    assert sizes[1][0] == sizes[1][1] < 900  # of the few classes that occur, a table


def test_a_network_that_answers_with_no_numbers(lettered, photos, tmp_path):
    content = torch.load(lettered, weights_only=True)
    content["model"]["head.fc.bias"][:] = float("nan")
    torch.save(content, tmp_path / "nan.pt")
    (row,) = validate_files([tmp_path / "nan.pt"], None, SMALL, data=photos, output=tmp_path / "out")
    assert any("not a finite number" in note for note in row["notes"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())[0]["loss"] is None


def test_skipped_images_are_named(lettered, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "val" / "a" / "0.png").write_text("no image")
    with pytest.raises(DataError, match=r"a/0\.png: not a readable image"):
        validate(lettered, None, SMALL, data=tmp_path / "photos")
    words = [*SMALL, "data.on_error=skip", "data.max_skipped=0.1"]
    row = validate(lettered, None, words, data=tmp_path / "photos", preprocessing="imagenet")
    assert row["n"] == 29
    assert "skipped: " in summary([row])[0]
    assert "a/0.png: not a readable image" in summary([row])[0]
    with pytest.raises(DataError, match=r"1 of 30 images cannot be read, more than data.max_skipped = 0.01"):
        validate(lettered, None, words[:-1], data=tmp_path / "photos")


def test_class_folders_need_not_be_all_or_in_order(lettered, photos, tmp_path):
    (tmp_path / "set").mkdir()
    for name in "cb":
        shutil.copytree(photos / "val" / name, tmp_path / "set" / name)
    row = validate(lettered, None, SMALL, data=tmp_path / "set")
    model = load_model(lettered)[0]
    check(row, by_hand(model, samples_of(tmp_path / "set", LETTERS), Preprocessing(32)))
    assert (row["present_classes"], row["classes"]) == (2, 10)


def test_class_names_of_a_file_that_has_none(official_file, photos, tmp_path):
    """With a list in another order than the folders' the labels are others."""
    listed = LETTERS[::-1]
    (tmp_path / "names.txt").write_text("\n".join(listed) + "\n")
    row = validate(official_file, None, [*SMALL, f"data.class_names={tmp_path}/names.txt"], data=photos)
    check(row, by_hand(load_model(official_file)[0], samples_of(photos / "val", listed), Preprocessing(32)))
    (tmp_path / "names.txt").write_text("\n".join(listed[:9]) + "\n")
    with pytest.raises(DataError, match=r"names.txt has 9 names, \S+ has 10 classes"):
        validate(official_file, None, [*SMALL, f"data.class_names={tmp_path}/names.txt"], data=photos)


def test_what_wins(lettered, photos, tmp_path):
    """Over the checkpoint's preprocessing a configuration, over that the command line; a choice by name over both."""
    (tmp_path / "config.yaml").write_text("data: {workers: 0, img_size: 64, mean: [0.1, 0.2, 0.3]}\n")
    config = tmp_path / "config.yaml"
    row = validate(lettered, config, ["data.crop_pct=1"], data=photos)
    assert (row["img_size"], row["mean"], row["crop_pct"]) == (64, [0.1, 0.2, 0.3], 1.0)
    assert row["changed"] == ["img_size", "mean", "crop_pct"]
    named = validate(lettered, config, ["data.img_size=32"], data=photos, preprocessing="inception")
    assert (named["img_size"], named["mean"], named["crop_pct"]) == (32, [0.5] * 3, 0.9)
    assert named["changed"] == ["img_size"]
    large = validate(lettered, None, ["data.img_size=256", "data.workers=0"], data=photos, preprocessing="imagenet")
    assert (large["crop_pct"], large["crop_mode"]) == (1.0, "squash")  # as the candidate is at such a size


# ------------------------------------------------------------------------------------------------------- mistakes


def test_mistakes(lettered, imagenet, official_file, photos, tmp_path):
    for folder in ("empty", "noimages/val/a"):
        (tmp_path / folder).mkdir(parents=True)
    noise(tmp_path / "flat" / "0.png", (32, 32), np.random.default_rng(0))
    for folder in ("nosplit/vla/y", "deep/x/y"):
        noise(tmp_path / folder / "0.png", (32, 32), np.random.default_rng(0))
    (tmp_path / "file").write_text("x")
    ok = {"data": photos}
    cases: list[tuple[type[UserError], str, dict]] = [
        (ConfigError, "letters.pt does not say where images are: give --data FOLDER", {}),
        (DataError, "nowhere: no such folder", {"data": tmp_path / "nowhere"}),
        (DataError, "empty has no class folders; expected", {"data": tmp_path / "empty"}),
        (DataError, "flat has no class folders; expected", {"data": tmp_path / "flat"}),
        (DataError, "noimages/val has 1 class folder without images: a", {"data": tmp_path / "noimages"}),
        (DataError, "nosplit has no validation split: none of", {"data": tmp_path / "nosplit"}),
        (DataError, "deep has 1 class not in the class list: x; the list has 10", {"data": tmp_path / "deep"}),
        (DataError, "val has 10 classes not in the class list: a, b", {**ok, "files": [imagenet]}),
        (CheckpointError, ": dims [8, 16, 24, 32] for [72, 144, 288, 576], depths", {**ok, "model": "conv2former_t"}),
        (ConfigError, "did you mean 'conv2former_t'", {**ok, "model": "conv2former_tt"}),
        (ConfigError, "data.img_size: input should be greater than", {**ok, "words": ["data.img_size=16"]}),
        (ConfigError, "train.seed: no effect on an evaluation", {**ok, "words": ["train.seed=1"]}),
        (ConfigError, "optim: no effect on an evaluation", {**ok, "words": ["optim.base_lr=1"]}),
        (ConfigError, "data: input should be a valid dictionary", {**ok, "words": ["data=3"]}),
        (ConfigError, "train: a section, found 3", {**ok, "words": ["train=3"]}),
        (ConfigError, "two ways to say the same", {**ok, "words": ["data.root=x"]}),
        (ConfigError, "preprocessing 'best': expected checkpoint, imagenet", {**ok, "preprocessing": "best"}),
        (ConfigError, "both are the same", {
            **ok, "preprocessing": "both", "words": ["data.mean=[0,0,0]", "data.std=[1,1,1]", "data.crop_pct=1"]
        }),
        (DataError, "ReaL labels are of ImageNet's classes", {**ok, "extras": Extras(real=True)}),
        (OutputError, "file is a file; --output takes a folder", {**ok, "output": tmp_path / "file"}),
        (OutputError, "cannot be written", {**ok, "output": tmp_path / "file" / "below"}),
    ]  # fmt: skip
    for kind, text, options in cases:
        files, words = options.pop("files", [lettered]), options.pop("words", [])
        with pytest.raises(kind) as error:
            validate_files(files, None, ["data.workers=0", *words], **options)
        assert text in str(error.value), str(error.value)


def test_real_labels_need_imagenets_file_names(imagenet, tmp_path):
    root = make_folders(tmp_path / "val", ImageNetInfo().label_names()[:2])
    with pytest.raises(DataError, match=r"ReaL labels go by the file names .* has '\S+0.png'"):
        validate(imagenet, None, SMALL, data=root, extras=Extras(real=True))


def test_too_many_classes_for_confusions(photos, tmp_path):
    file = network(tmp_path / "many.pt", 21_841)
    root = make_folders(tmp_path / "val", ImageNetInfo("imagenet-22k").label_names()[:3])
    with pytest.raises(ConfigError, match="21,841 classes, too many to count every pair"):
        validate(file, None, SMALL, data=root, extras=Extras(confusion=True), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    extras = Extras(per_class=True, calibration=True)
    assert validate(file, None, SMALL, data=root, extras=extras, output=tmp_path / "out")["classes"] == 21_841
    assert len((tmp_path / "out" / "per_class.csv").read_text().splitlines()) == 21_842


def test_nothing_is_evaluated_if_something_is_wrong(lettered, photos, tmp_path, monkeypatch):
    (tmp_path / "broken.pt").write_bytes(lettered.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("no weights")
    monkeypatch.setattr("conv2former.tools.evaluation.run.evaluate", lambda *a: pytest.fail("it was evaluated"))
    for name in ("broken.pt", "text.pt", "missing.pt"):
        with pytest.raises(CheckpointError, match=name):
            validate_files([lettered, tmp_path / name], None, SMALL, data=photos, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        validate_files([lettered], None, SMALL, data=photos, output=tmp_path / "file")


def script(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["validate.py", *map(str, words)])
    runpy.run_path(str(ROOT / "scripts" / "validate.py"), run_name="__main__")


def test_the_script(lettered, photos, tmp_path, monkeypatch, capsys):
    """Overrides may follow the checkpoints; a checkpoint may have = in its name."""
    other = tmp_path / "lr=1.pt"
    shutil.copy(lettered, other)
    monkeypatch.chdir(tmp_path)
    script(monkeypatch, "--checkpoint", lettered, other, *SMALL, "--data", photos, "--worst", "1")
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.endswith(" 30") or " 30  " in line]) == 2
    for path in ("results.json", "letters/worst.png", "lr=1/worst.png"):
        assert f"  runs/evaluation/{path}\n" in out + "\n"
        assert (tmp_path / "runs" / "evaluation" / path).is_file()


def test_the_script_begins_with_what_it_evaluates(lettered, photos, monkeypatch, capsys):
    """A wrong folder is seen before the first image is read."""
    heads = []
    name = inspect_checkpoint(lettered).name or "unnamed variant"  # another test may have registered its shape
    monkeypatch.setattr(
        "conv2former.tools.evaluation.run.evaluate",
        lambda *args, **kwargs: heads.append(capsys.readouterr().out) or evaluate(*args, **kwargs),
    )
    script(monkeypatch, "--checkpoint", lettered, *SMALL, "--data", photos / "val")
    assert heads == [
        f"{lettered}: {name}, weights\n"
        f"{photos}/val: 30 images, all of the network's 10 classes, fp32\n"
        f"preprocessing checkpoint with data.img_size as given: {Preprocessing(32)}\n"
        f"note: {lettered} does not say its mean, std, crop_pct: --preprocessing both compares the two likely ones\n"
    ]
    rest = capsys.readouterr().out
    assert "of the network's" not in rest
    assert "top-1" in rest


def test_how_much_a_small_set_says(lettered, photos):
    row = validate(lettered, None, SMALL, data=photos)
    share = row["top1"] / 100
    assert row["top1_error"] == pytest.approx(100 * math.sqrt(share * (1 - share) / 30))
    text = "\n".join(summary([row]))
    assert re.search(rf"top-1 +± .*\n.* {row['top1']:.2f} +{row['top1_error']:.2f} ", text)
    assert "note: one of 30 images is 3.33 points of top-1; ± is its standard error" in text
    assert "±" not in "\n".join(summary([row | {"n": 500}]))


def test_five_classes_have_no_five_best(photos, tmp_path):
    few, many = (network(tmp_path / f"{n}.pt", n, LETTERS[:n]) for n in (5, 10))
    for name in LETTERS[:5]:
        shutil.copytree(photos / "val" / name, tmp_path / "five" / name)
    extras = Extras(per_class=True, confusion=True)
    rows = validate_files([few], None, SMALL, data=tmp_path / "five", extras=extras, output=tmp_path / "out")
    assert rows[0]["top5"] is None
    assert json.loads((tmp_path / "out" / "results.json").read_text())[0]["top5"] is None
    for file in ("results.csv", "per_class.csv"):
        assert "top5" not in (tmp_path / "out" / file).read_text().splitlines()[0]
    assert "top-5" not in "\n".join(summary(rows))
    rows += validate_files([many], None, SMALL, data=tmp_path / "five", extras=extras, output=tmp_path / "more")
    assert "top5" in (tmp_path / "more" / "per_class.csv").read_text()
    text = "\n".join(summary(rows))
    assert re.search(r"top-1 +± +top-5 .*\n.*5\.pt .* - .*\n.*10\.pt .*\d", text)


def test_the_picture_of_the_worst_names_folders_and_has_a_title(lettered, photos, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "conv2former.tasks.pictures.grid_figure",
        lambda images, captions, **more: drawn.update(more, captions=captions),
    )
    monkeypatch.setattr("conv2former.tools.evaluation.files.save_figure", lambda figure, path: None)
    extras = Extras(worst=3)
    row = validate(lettered, None, SMALL, data=photos, extras=extras, output=tmp_path / "out")
    assert str(lettered)[-30:] in drawn["title"]
    assert "the 3 mistakes of the highest loss" in drawn["title"]
    names = [Path(item["image"]) for item in row["worst"]]
    assert [text.split("\n")[2] for text in drawn["captions"]] == [f"{p.parent.name}/{p.name}" for p in names]


def test_a_mistake_in_the_script_is_one_line(lettered, photos, tmp_path, monkeypatch, capsys):
    for words, text in (
        (["--checkpoint", tmp_path / "none.pt"], f"error: {tmp_path}/none.pt: no such file\n"),
        (["--checkpoint", lettered, "--data", photos, "--preprocessing", "x"], "invalid choice: 'x'"),
        (["--checkpoint", lettered, "--data", photos, "--worst", "none"], "expected a number from 1 to 200"),
    ):
        with pytest.raises(SystemExit) as stop:
            script(monkeypatch, *words)
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert text in err
        assert "Traceback" not in err


def test_a_table_with_a_folder_of_its_own(lettered, photos, tmp_path):
    """`--data TABLE` goes with `data.root`, which its paths are then relative to."""
    files = samples_of(photos / "val", LETTERS)
    lines = [f"{path.relative_to(photos)},{LETTERS[label]}" for path, label in files]
    (tmp_path / "list.csv").write_text("\n".join(["image,label", *lines]))
    row = validate(lettered, overrides=[*SMALL, f"data.root={photos}"], data=tmp_path / "list.csv")
    other = validate(lettered, overrides=SMALL, data=photos)
    assert (row["n"], row["top1"]) == (30, other["top1"])


def test_classes_that_are_numbers(tmp_path):
    """Weights that do not name them are read alike in folders and in tables, and a note says in which order."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        (tmp_path / "photos" / str(number)).mkdir(parents=True)
        noise(tmp_path / "photos" / str(number) / "0.png", (32, 32), rng)
        rows.append(f"{number}/0.png {number}\n")
    (tmp_path / "list.txt").write_text("".join(rows))
    file = network(tmp_path / "twelve.pt", 12)
    table = ["data.source=csv", f"data.csv={tmp_path / 'list.txt'}"]
    folder, listed = (validate(file, None, [*SMALL, *words], data=tmp_path / "photos") for words in ([], table))
    assert (folder["top1"], folder["loss"]) == (listed["top1"], listed["loss"])
    for row in (folder, listed):
        assert (
            sum("the classes are numbers in the order 0, 1, 2, 3, 4, and 7 more" in note for note in row["notes"]) == 1
        )
    named = network(tmp_path / "named.pt", 12, sorted(map(str, range(12))))  # as folders were ordered as text
    row = validate(named, None, SMALL, data=tmp_path / "photos")
    assert row["top1"] != folder["top1"] or row["loss"] != folder["loss"]
    assert not [note for note in row["notes"] if "the classes are numbers" in note]
