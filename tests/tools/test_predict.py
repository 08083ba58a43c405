from __future__ import annotations

import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from conv2former.config.schema import DataConfig
from conv2former.data import Skipped, eval_transform
from conv2former.engine import terminal
from conv2former.errors import CheckpointError, ConfigError, DataError, OutputError
from conv2former.models import Conv2Former
from conv2former.text import printable
from conv2former.tools.prediction.inputs import find_images
from conv2former.tools.prediction.predict import Predictor, unit_crop
from conv2former.tools.prediction.results import writing_results
from conv2former.tools.prediction.sheet import WHOLE, Cell, contact_sheet, layout_for

from ..conftest import ROOT
from ..graphs_on_cpu import CpuRecorder, capture_with

pytestmark = pytest.mark.slow

SIZES = [(40, 30), (30, 40), (97, 33), (8, 8), (1, 1), (64, 64), (300, 2)]
TURNED = {  # by EXIF orientation, how the pixels are stored
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
    8: lambda p: np.rot90(p, -1),
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """Seven readable images of odd sizes, in two folders, and a text file."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for i, size in enumerate(SIZES):
        picture(*size, seed=i).save(folder / ("deep" if i % 2 else ".") / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A checkpoint for 64 x 64 images with names of its own."""
    torch.manual_seed(0)
    model = Conv2Former(dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), kernel_size=7, num_classes=3, head_hidden_size=16)
    torch.nn.init.normal_(model.head.fc.weight)
    path = tmp_path_factory.mktemp("checkpoint") / "small.pt"
    noted = {"img_size": 64, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "crop_pct": 1.0, "crop_mode": "squash"}
    content = {"state_dict": model.state_dict(), "class_names": ["cat", "dog", "7"], "config": {"data": noted}}
    torch.save(content, path)
    return path


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_as_timm_predicts(tiny, official_file, photos, batch_size):
    """The probabilities are those of timm's own model and transform, in batches of any size."""
    images = find_images([str(photos)])
    found = list(Predictor(official_file)(images, topk=10, batch_size=batch_size))
    model = timm.create_model(tiny, num_classes=10, checkpoint_path=str(official_file)).eval()
    transform = create_transform(224, interpolation="bicubic", crop_pct=0.875)
    assert [prediction.name for prediction in found] == [image.name for image in images]
    for prediction in found:
        image = Image.open(prediction.name).convert("RGB")
        with torch.no_grad():
            expected = model(transform(image)[None])[0].softmax(0)
        assert prediction.size == image.size
        assert [guess.index for guess in prediction.top] == expected.argsort(descending=True).tolist()
        for guess in prediction.top:
            assert guess.probability == pytest.approx(float(expected[guess.index]), abs=1e-5)
            assert (guess.class_name, guess.name) == (None, f"class {guess.index}")


def test_workers_change_nothing(official_file, photos):
    images = find_images([str(photos)])
    alone, together = (
        [p.to_dict() for p in Predictor(official_file, [f"data.workers={n}"])(images, batch_size=2)] for n in (0, 2)
    )
    assert alone == together


def test_whole_batches_are_captured(official_file, photos, monkeypatch):
    """By a stand-in for CUDA graphs; the last batch, of another size, is not."""
    images = find_images([str(photos)])
    assert len(images) == 7
    plain = [p.to_dict() for p in Predictor(official_file)(images * 2, batch_size=3)]
    recorder = CpuRecorder()
    capture_with(monkeypatch, lambda: recorder)
    assert [p.to_dict() for p in Predictor(official_file)(images * 2, batch_size=3)] == plain
    assert recorder.events == ["warm-up", "warm-up", "capture", "replay", "replay", "warm-up"]


def test_preprocessing_of_the_checkpoint_and_overrides(small_file, photos):
    predictor = Predictor(small_file)
    assert (predictor.settings.img_size, predictor.settings.crop_mode) == (64, "squash")
    assert predictor.settings.mean == (0.1, 0.2, 0.3)
    (prediction,) = predictor(find_images([str(photos / "0.png")]))
    assert prediction.pixels.shape == (3, 64, 64)
    assert {guess.name for guess in prediction.top} == {"cat", "dog", "7"}  # three of them, though five were asked for
    changed = Predictor(small_file, ["data.img_size=32", "data.std=[1,1,1]"])
    assert (changed.settings.img_size, changed.settings.std, changed.settings.crop_pct) == (32, (1, 1, 1), 1.0)
    for override, words in (
        ("data.img_size=16", "greater than or equal to 32"),
        ("data.crop=1", "data.crop: has no effect here.*did you mean 'data.crop_pct'"),
        ("data.root=x", "data.root: has no effect"),
        ("data.mean=[1]", "data.mean"),
    ):
        with pytest.raises(ConfigError, match=words):
            Predictor(small_file, [override])


def test_16_bits_in_the_range_that_the_checkpoint_was_trained_with(small_file, tmp_path):
    content = torch.load(small_file, weights_only=True)
    content["config"]["data"]["value_range"] = [0, 1000]
    torch.save(content, tmp_path / "range.pt")
    Image.fromarray(np.full((8, 8), 500, np.uint16)).save(tmp_path / "grey.png")
    images = find_images([str(tmp_path / "grey.png")])
    (as_noted,), (default,) = (list(Predictor(path)(images)) for path in (tmp_path / "range.pt", small_file))
    values = [round(float(p.pixels[0].mean() * 0.5 + 0.1), 3) for p in (as_noted, default)]
    assert values == [round(128 / 255, 3), round(2 / 255, 3)]


def test_upright(small_file, tmp_path):
    pixels = np.asarray(picture(40, 30))
    for orientation, turn in TURNED.items():
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(np.ascontiguousarray(turn(pixels))).save(tmp_path / f"{orientation}.png", exif=exif)
    first, *others = Predictor(small_file)(find_images([str(tmp_path)]), preview=20)
    assert first.preview.size == (20, 15)
    for other in others:
        assert (other.size, other.top) == (first.size, first.top)
        assert np.array_equal(other.preview, first.preview)


def test_which_images(photos, monkeypatch):
    monkeypatch.chdir(photos)

    def names(*inputs):
        return [image.name for image in find_images(inputs)]

    assert names(".") == ["./0.png", "./2.png", "./4.png", "./6.png", "./deep/1.png", "./deep/3.png", "./deep/5.png"]
    assert names("deep/3.png", "0.png", "./0.png", "deep") == ["deep/3.png", "0.png", "deep/1.png", "deep/5.png"]
    assert names("*.png") == ["0.png", "2.png", "4.png", "6.png"]
    assert names("**/[13].png") == ["deep/1.png", "deep/3.png"]
    assert names("*") == ["0.png", "2.png", "4.png", "6.png", "deep/1.png", "deep/3.png", "deep/5.png"]
    assert names("notes.txt") == ["notes.txt"]  # who names a file means it
    (photos / "a[1].png").write_bytes((photos / "0.png").read_bytes())
    assert names("a[1].png") == ["a[1].png"]
    (photos / "empty").mkdir()
    for text, words in (
        ("none.png", r"none\.png: no such file or folder"),
        ("*.bmp", r"\*\.bmp: no image matches$"),
        ("*.txt", r"no image matches; 1 match without an image's ending"),
        ("empty", "empty: no image in this folder or below it; images end in"),
    ):
        with pytest.raises(DataError, match=words):
            find_images(["0.png", text])


def test_an_image_on_standard_input(photos, monkeypatch, small_file):
    data = (photos / "0.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False))
    (prediction,) = Predictor(small_file)(find_images(["-"]))
    (same,) = Predictor(small_file)(find_images([str(photos / "0.png")]))
    assert prediction.to_dict() == same.to_dict() | {"image": "-"}
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(DataError, match="standard input is the terminal"):
        find_images(["-"])


def test_unreadable_images_come_in_their_place(photos, small_file):
    (photos / "1.jpg").write_text("no image")
    kinds = [type(item) for item in Predictor(small_file)(find_images([str(photos)]), batch_size=2)]
    assert kinds.index(Skipped) == 1
    assert kinds.count(Skipped) == 1
    assert len(kinds) == 8


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(200, 100), (100, 200), (150, 150)])
@pytest.mark.parametrize("img_size", [32, (32, 96), (64, 32)])
def test_the_frame_is_what_the_transform_keeps(crop_mode, size, img_size):
    """Pixels that hold their own coordinates, sent through the transform."""
    settings = DataConfig(img_size=img_size, crop_pct=0.7, crop_mode=crop_mode, mean=(0, 0, 0), std=(1, 1, 1))
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    image = Image.fromarray(np.stack([x, y, np.full_like(x, 255)], 2).astype(np.uint8))
    seen = eval_transform(settings)(image) * 255
    inside = seen[2] > 254
    bounds = [float(seen[c][inside].min()) for c in (0, 1)] + [float(seen[c][inside].max()) for c in (0, 1)]
    frame = unit_crop(size, settings)
    expected = [share * size[i % 2] for i, share in enumerate(frame)]
    step = max(size) / 32 / 0.7  # pixels of the image in one of the input
    assert bounds == pytest.approx(expected, abs=step)


def test_naming_a_class(small_file, tmp_path):
    predictor = Predictor(small_file)
    assert [predictor.class_index(text) for text in ("dog", "7", "0")] == [1, 2, 0]  # a name is before an index
    for text in ("3", "-1", "²"):
        with pytest.raises(ConfigError, match=r"no such class; give a name, or an index up to 2"):
            predictor.class_index(text)
    with pytest.raises(ConfigError, match=r"did you mean 'dog'"):
        predictor.class_index("dogs")
    model = Conv2Former(dims=(2, 2, 2, 2), depths=(1, 1, 1, 1), kernel_size=3, head_hidden_size=2)
    torch.save(model.state_dict(), tmp_path / "imagenet.pt")
    imagenet = Predictor(tmp_path / "imagenet.pt")
    names = ("tench", "n01440764", "tench, Tinca tinca", "0")
    assert [imagenet.class_index(text) for text in names] == [0, 0, 0, 0]
    assert imagenet.guess(0, 0.5).class_name == "n01440764"


def test_networks_that_cannot_predict(tmp_path):
    shape = {"dims": (2, 2, 2, 2), "depths": (1, 1, 1, 1), "kernel_size": 3, "head_hidden_size": 2}
    for name, more, words in (
        ("headless", {"num_classes": 0}, "has no classifier"),
        ("pairs", {"in_chans": 2, "num_classes": 2}, "takes images of 2 channels"),
    ):
        torch.save(Conv2Former(**shape, **more).state_dict(), tmp_path / name)
        with pytest.raises(CheckpointError, match=words):
            Predictor(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ results


def test_results(small_file, photos, tmp_path):
    predictor, images, folder = Predictor(small_file), find_images([str(photos)]), tmp_path / "a" / "found"
    with writing_results(folder, images, predictor) as results:
        records = [results.add(prediction) for prediction in predictor(images, preview=results.preview)]
        assert not folder.exists()
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert lines == records
    assert lines[0]["size"] == [40, 30]
    assert set(lines[0]["top"][0]) == {"class", "index", "name", "probability"}
    assert sorted(os.listdir(folder)) == ["predictions.jsonl", "sheet.png"]
    assert str(results) == "predictions.jsonl, 1 contact sheet"
    with writing_results(folder, images, predictor) as results:  # earlier results are replaced
        results.add(next(predictor(images)))
    assert os.listdir(folder) == ["predictions.jsonl"]  # without previews no sheet
    (folder / "mine.txt").touch()
    with (
        pytest.raises(OutputError, match=r"holds something else than predictions \(mine.txt\)"),
        writing_results(folder, images, predictor),
    ):
        pass
    assert os.listdir(tmp_path / "a") == ["found"]


@pytest.mark.parametrize("error", [None, BrokenPipeError, KeyboardInterrupt, DataError])
def test_nothing_is_left_where_nothing_was_finished(small_file, photos, tmp_path, error):
    predictor, images = Predictor(small_file), find_images([str(photos)])

    def write():
        with writing_results(tmp_path / "out" / "found", images, predictor) as results:
            if error:
                results.add(next(predictor(images, preview=results.preview)))
                raise error

    if error:
        with pytest.raises(error):
            write()
    else:
        write()
    assert os.listdir(tmp_path / "out") == []


def test_pages(small_file, tmp_path, monkeypatch):
    monkeypatch.setattr("conv2former.tools.prediction.results.MAX_SHEET_IMAGES", 40)
    picture(8, 8).save(tmp_path / "0.png")
    predictor = Predictor(small_file)
    (prediction,) = predictor(find_images([str(tmp_path / "0.png")]), preview=50)
    images = find_images([str(tmp_path / "0.png")]) * 50
    with writing_results(tmp_path / "found", images, predictor) as results:
        for _ in images:
            results.add(prediction)
    assert sorted(os.listdir(tmp_path / "found")) == ["predictions.jsonl", "sheet_1.png", "sheet_2.png"]
    assert len((tmp_path / "found" / "predictions.jsonl").read_text().splitlines()) == 50
    assert str(results) == "predictions.jsonl, 2 contact sheets of the first 40 images"
    first, second = (Image.open(tmp_path / "found" / f"sheet_{i}.png") for i in (1, 2))
    side = layout_for(50)[1]
    assert (first.width, second.width) == (6 * side + 7 * 18, 4 * side + 5 * 18)  # 36 in rows of six, a row of four
    assert first.height > 5 * second.height


def cells(image: Image.Image, count: int = 1, title: str = "name") -> list[Cell]:
    return [Cell(image, title, (640, 480), WHOLE, [("a class", 0.75), ("another", 0.25)])] * count


@pytest.mark.parametrize("size", [(210, 140), (140, 210), (210, 1), (1, 210), (210, 210)])
def test_images_on_a_sheet_are_whole_and_not_distorted(size):
    page = np.asarray(contact_sheet(cells(Image.new("RGB", size, (255, 0, 0))), 6, 210, "heading")).astype(int)
    red = np.argwhere((page == (255, 0, 0)).all(2))
    assert len(red) == size[0] * size[1]
    assert tuple(red.max(0) - red.min(0) + 1) == size[::-1]


@pytest.mark.parametrize("count", [1, 7, 36])
def test_sheets_of_any_length(count):
    columns, side = layout_for(count)
    page = contact_sheet(cells(Image.new("RGB", (side, side), (255, 0, 0)), count), columns, side, "heading " * 9)
    pixels = np.asarray(page).astype(int)
    assert (pixels == (255, 0, 0)).all(2).sum() == count * side * side
    assert (pixels[-9:] == 255).all()  # the last row ends above the margin
    assert page.width <= 1400


def test_long_texts_stay_in_their_column():
    image = Image.new("RGB", (210, 210), "white")
    long = [Cell(image, "W" * 300, (1, 1), WHOLE, [("W" * 300, 1.0)])]
    pixels = np.asarray(contact_sheet(long, 1, 210, "")).astype(int)
    assert (pixels[:, :18] == 255).all()
    assert (pixels[:, -18:] == 255).all()


def test_the_frame_is_drawn_where_the_crop_is():
    cell = Cell(Image.new("RGB", (200, 100), "white"), "name", (200, 100), (0.25, 0.0, 0.75, 1.0), [])
    pixels = np.asarray(contact_sheet([cell], 1, 200, "")).astype(int)
    orange = np.argwhere((pixels == (255, 157, 0)).all(2))
    height, width = orange.max(0) - orange.min(0) + 1
    assert (width, height) == (100, 100)
    assert orange.min(0)[1] == 18 + 50  # the margin and a quarter of the image


def test_printable():
    assert printable("a b ü 写 $") == "a b ü 写 $"
    assert printable("new\nline\x1b[31m \udcff") == "new\\nline\\x1b[31m \\udcff"


# --------------------------------------------------------------------------------------------------------- the script


def predict(monkeypatch, *words) -> int:
    """Runs scripts/predict.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
    monkeypatch.setattr(terminal, "SECONDS", math.inf)  # a slow machine prints nothing more
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **kwargs: None, raising=False)
    try:
        runpy.run_path(str(ROOT / "scripts" / "predict.py"), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_script(monkeypatch, capsys, photos, small_file, tmp_path):
    bad = tmp_path / "bad\nname.jpg"
    bad.write_text("no image")
    words = ["--checkpoint", small_file, photos, bad, "--output", tmp_path / "found", "--topk", "2", "data.img_size=32"]
    assert predict(monkeypatch, *words) == 2
    out, err = capsys.readouterr()
    assert re.search(r"^\S+/0\.png +\w+: [\d.]+ %, \w+: [\d.]+ %$", out, re.MULTILINE)
    assert "images: 32 x 32" in out
    assert err.startswith("error: 1 of 8 images cannot be read, the others are done:\n  - ")
    assert "bad\\nname.jpg: not a readable image" in err
    assert len((tmp_path / "found" / "predictions.jsonl").read_text().splitlines()) == 7

    assert predict(monkeypatch, *words, "--json", "--explain", "--class", "dog") == 2
    out, _ = capsys.readouterr()
    assert out == (tmp_path / "found" / "predictions.jsonl").read_text()
    for record in map(json.loads, out.splitlines()):
        with Image.open(tmp_path / "found" / record["explanation"]) as image:
            assert image.width > 900


def test_script_mistakes(monkeypatch, capsys, photos, small_file, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    found = ["--output", tmp_path / "found"]
    for words, expected in (
        ([small_file, text, *found], r"^error: \S+text\.jpg: not a readable image .*; remove or replace it\n$"),
        ([text, photos, *found], "^error: .*text.jpg is .*not a checkpoint that torch can read"),
        ([tmp_path / "none.pt", tmp_path / "none.jpg"], r"^error: \S+none\.jpg: no such file or folder\n$"),
        (
            [tmp_path / "none.pt", photos, "--output", tmp_path / "full"],
            r"^error: .*thesis\.tex\); give another folder",
        ),
        ([small_file, photos, "--output", text], r"^error: .*text\.jpg cannot be written"),
        ([small_file, photos, "--explain"], "--explain writes pictures; give --output FOLDER\n$"),
        ([small_file, photos, "--stage", "2"], "go with --explain\n$"),
        ([small_file, photos, "--topk", "0"], "--topk: invalid positive value: '0'\n$"),
        ([small_file, "data.crop_pct=1"], "are required: INPUT\n$"),
        ([small_file, photos, *found, "--explain", "--class", "fish"], "^error: --class fish: no such class"),
    ):
        assert predict(monkeypatch, "--checkpoint", *words) == 2
        assert re.search(expected, capsys.readouterr().err), words
    assert not (tmp_path / "found").exists()


def test_pipes(small_file, photos):
    """As a user starts it: an image comes from a pipe, and the reader of the output leaves early."""
    command = f"{sys.executable} scripts/predict.py --json --checkpoint {small_file}"
    result = subprocess.run(
        f"cat {photos}/0.png | {command} - {photos}/*.png | head -n 1",
        shell=True, capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert json.loads(result.stdout)["image"] == "-"
    assert "Traceback" not in result.stderr
    assert "error" not in result.stderr


def test_a_reader_that_has_gone(small_file, photos, tmp_path, monkeypatch, capsys):
    """Files that were asked for are written all the same; without any, it ends as `cat` does: 128 + SIGPIPE."""
    for words, code in (([], 141), (["--output", tmp_path / "found"], 0)):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "argv", ["predict.py", *map(str, ["--checkpoint", small_file, photos, *words])])
            with pytest.raises(SystemExit) if code else nullcontext() as stop:
                runpy.run_path(str(ROOT / "scripts" / "predict.py"), run_name="__main__")
            assert not code or stop.value.code == code
    assert sorted(os.listdir(tmp_path / "found")) == ["predictions.jsonl", "sheet.png"]
    assert len((tmp_path / "found" / "predictions.jsonl").read_text().splitlines()) == len(SIZES)
    assert capsys.readouterr().err == ""


def test_bars_end_before_the_percentages(monkeypatch):
    """So that no digit is crossed by the end of a bar, whatever its length."""
    image = Image.new("RGB", (210, 210), "white")
    bars = [("", share / 40) for share in range(41)]
    pixels = np.asarray(contact_sheet([Cell(image, "", (1, 1), WHOLE, bars)], 1, 210, "")).astype(int)
    bar = np.argwhere((pixels == (188, 215, 240)).all(2))
    digits = np.argwhere((pixels == 0).all(2))
    assert bar[:, 1].max() < digits[:, 1].min()
    assert bar[:, 1].max() > 120  # a certain class still has a long one


def test_no_image_of_the_users_is_replaced(small_file, tmp_path):
    """Although it is called as a result is."""
    for name in ("sheet_1.png", "sheet.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    predictor = Predictor(small_file)
    images = find_images([str(tmp_path)])
    for given in (images, []):
        with pytest.raises(OutputError, match="give another folder"), writing_results(tmp_path, given, predictor):
            pass
    (tmp_path / "old" / "explanations").mkdir(parents=True)
    (tmp_path / "old" / "predictions.jsonl").touch()
    (tmp_path / "old" / "explanations" / "thesis.txt").touch()
    with pytest.raises(OutputError, match=r"thesis\.txt"), writing_results(tmp_path / "old", images, predictor):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
        "predictions.jsonl", "sheet.png", "sheet_1.png", "thesis.txt",
    ]  # fmt: skip


def test_a_network_that_answers_no_numbers(small_file, photos):
    predictor = Predictor(small_file)
    torch.nn.init.constant_(predictor.model.get_classifier().weight, torch.nan)
    with pytest.raises(CheckpointError, match="not all numbers"):
        list(predictor(find_images([str(photos)])))


def test_each_image_of_a_folder_once_however_links_lead_to_it(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / f"{i}.png")
    cat, dog = tmp_path / "photos" / "cat", tmp_path / "photos" / "dog"
    (cat / "all").symlink_to("..")
    (cat / "deep").mkdir()
    (cat / "deep" / "loop").symlink_to("..")
    (cat / "more").symlink_to("../dog")
    (cat / "linked.png").symlink_to("../dog/0.png")
    expected = [str(folder / f"{i}.png") for folder in (cat, dog) for i in range(2)]
    for inputs in ([str(tmp_path / "photos")], [str(tmp_path / "photos"), str(cat)]):
        assert sorted(image.name for image in find_images(inputs)) == expected, inputs
    for inputs in ([str(tmp_path / "photos/*")], [str(cat), str(dog)]):
        assert sorted(os.path.realpath(image.name) for image in find_images(inputs)) == expected, inputs
    named = [str(dog / "0.png"), str(cat / "linked.png")]
    assert [image.name for image in find_images(named)] == named  # both were asked for


def test_folders_of_images_that_pillow_does_not_read(tmp_path):
    (tmp_path / "IMG_1.HEIC").touch()
    for text in (str(tmp_path), str(tmp_path / "*")):
        with pytest.raises(DataError, match=r"; .heic are images that Pillow does not read: convert them to"):
            find_images([text])


def test_the_largest_image_can_be_set(small_file, tmp_path, monkeypatch):
    Image.new("L", (40, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    images = find_images([str(tmp_path / "large.png")])
    (refused,) = Predictor(small_file)(images)
    assert "more than 200 pixels; make it smaller, or raise data.max_image_pixels" in refused.reason
    (found,) = Predictor(small_file, ["data.max_image_pixels=1200"])(images, preview=1000)
    assert found.size == (40, 30)
