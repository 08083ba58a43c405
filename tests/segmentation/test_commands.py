"""validate, predict, export and average with a segmentation's checkpoint, and what the other commands say of one."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import conv2former
from conv2former import CheckpointError, ConfigError, DataError, models
from conv2former.engine import train, trainer
from conv2former.errors import OutputError
from conv2former.tasks.dense.thumbnails import colours
from conv2former.tasks.segmentation import inference
from conv2former.tasks.segmentation.inference import Answerer
from conv2former.tasks.segmentation.masks import read_mask
from conv2former.tasks.segmentation.network import SegmentationNetwork, build_network
from conv2former.tools.checkpoints.average import average, greedy
from conv2former.tools.checkpoints.convert import convert
from conv2former.tools.evaluation import registry
from conv2former.tools.evaluation.files import Extras
from conv2former.tools.evaluation.registry import summary, validate_files
from conv2former.tools.export.options import Options
from conv2former.tools.export.registry import export
from conv2former.tools.export.segmentation import MaskSubject, _exportable_pools, _Pool, _without_ceil_mode
from conv2former.tools.prediction.dense import file_names
from conv2former.tools.prediction.folder import check_results_folder
from conv2former.tools.prediction.inputs import ImageFile
from conv2former.tools.prediction.segmentation import mask_image

from ..conftest import ROOT
from ..engine.conftest import configure
from .conftest import NAMES, SHAPE, draw, make_folder, write_pair

METRICS = ("miou", "pixel_accuracy", "mean_accuracy", "loss", "n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    """One short training: its data, its report, and its best and last checkpoint."""
    place = tmp_path_factory.mktemp("segmentation")
    raw = {
        "task": "segmentation",
        "model": {
            "variant": {"name": "conv2former_test", "ls_init_value": 0.5, **SHAPE},
            "head": {"name": "upernet", "channels": 16, "auxiliary_channels": 8},
        },
        "data": {"root": str(make_folder(place / "data")), "img_size": 32, "workers": 0},
        "loss": {"class_weights": "balanced"},
        "schedule": {"epochs": 3, "warmup_epochs": 0, "cooldown_epochs": 0},
        "train": {"batch_size": 4},
        "optim": {"base_lr": 1e-2, "base_batch_size": 4},
        "ema": {"decay": 0.5},
        "log": {"tensorboard": False},
    }
    report = train(configure(raw), place / "run")
    best, last = (place / "run" / "checkpoints" / f"{name}.pt" for name in ("best", "last"))
    return SimpleNamespace(data=place / "data", report=report, best=best, last=last)


def run(monkeypatch, capsys, name: str, *words) -> tuple[int, str, str]:
    """Returns exit code, output and errors of a command."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    code = 0
    try:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    except SystemExit as e:
        code = int(e.code or 0)
    return code, *capsys.readouterr()


def answer_of(model: nn.Module, image: Image.Image) -> np.ndarray:
    """Returns a network's classes of a photo's pixels, (H, W), from logits made by hand."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (np.asarray(image.convert("RGB")) / 255 - mean) / std
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])
    return logits[0].argmax(0).numpy()


# ------------------------------------------------------------------------------------------------------------ validate


@pytest.mark.slow
def test_an_evaluation_has_the_training_s_numbers(trained, tmp_path):
    extras = Extras(per_class=True, confusion=True, worst=2)
    rows = validate_files([trained.best, trained.last], extras=extras, output=tmp_path / "out")
    assert {key: rows[0][key] for key in METRICS} == {key: trained.report[key] for key in METRICS}
    for row, noted in zip(rows[0]["per_class"], trained.report["classes"], strict=True):
        assert {key: row[key] for key in noted} == noted
    assert len({row["head"] for row in rows}) == 1
    noted = [image["image"] for image in trained.report["worst_images"]]
    assert [image["image"] for image in rows[0]["worst"]] == noted[:2]
    for name in ("per_class.csv", "confusion.png", "worst.png"):
        assert (tmp_path / "out" / "last" / name).stat().st_size > 50
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 2
    header = (tmp_path / "out" / "results.csv").read_text().splitlines()[0].split(",")
    assert {"checkpoint", "miou", "mode", "n"} <= set(header)
    assert "per_class" not in header
    lines = summary(rows, tmp_path / "out")
    assert any(line.startswith(f"{trained.last} ") and f"{rows[1]['miou']:.2f}" in line for line in lines)
    assert any(line.startswith("disc ") for line in lines)


@pytest.mark.slow
def test_other_data_and_windows(trained, tmp_path, monkeypatch, capsys):
    """Folders without splits and without names have the network's classes; windows and mirrored images are averaged."""
    plain = tmp_path / "plain"
    for folder in ("images", "masks"):
        shutil.copytree(trained.data / folder / "val", plain / folder)
    words = ("evaluation.mode=slide", "evaluation.flip=true")
    code, out, _ = run(monkeypatch, capsys, "validate", "--checkpoint", trained.best, "--data", plain, *words)
    assert code == 0
    assert f"{plain}/images: 5 images, 3 classes, fp32\n" in out
    assert "in windows of 32 x 32 that share 33%, also mirrored" in out
    (same,) = validate_files([trained.best], data=plain)
    assert same["miou"] == trained.report["miou"]
    (slid,) = validate_files([trained.best], None, words, data=plain)
    assert f"{slid['miou']:.2f}" in out
    assert slid["loss"] != same["loss"]

    for names, expected in (
        (NAMES[::-1], "in another order: number 0 is 'disc' and not 'ground'"),
        (["ground", "square", "disk"], "disk is not among the network's, disc is missing"),
    ):
        (plain / "classes.txt").write_text("\n".join(names))
        with pytest.raises(DataError, match=expected):
            validate_files([trained.best], data=plain)
    image, mask = draw(1)
    mask[5:9, 5:9] = 7
    (plain / "classes.txt").unlink()
    write_pair(tmp_path / "wrong", "val", "a", image, mask)
    with pytest.raises(DataError, match=r"masks/val/a\.png: 16 pixels of class 7"):
        validate_files([trained.best], data=tmp_path / "wrong")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--among", "present"], "--among: of classifiers"),
        (["--real"], "--real: of classifiers"),
        (["--preprocessing", "both"], "--preprocessing: of classifiers"),
        (["loss.dice=1"], "loss: no effect on an evaluation"),
        (["evaluation.pictures=3"], "it is --worst here"),
        (["evaluation.mode=half"], "evaluation.mode: "),
        (["--model", "conv2former_t"], "is not conv2former_t but "),
    ],
)
def test_what_is_not_evaluated(trained, monkeypatch, capsys, words, expected):
    code, _, err = run(monkeypatch, capsys, "validate", "--checkpoint", trained.best, *words)
    assert (code, expected in err) == (2, True), err


# ------------------------------------------------------------------------------------------------------------- predict


@pytest.mark.parametrize(
    ("module", "name", "words", "keys"),
    [
        (trainer, "prepare", ["train", "--config", "segmentation/folder"], ("data.img_size", "train.eval_batch_size")),
        (registry, "read_checkpoint", ["validate", "--checkpoint"], ("data.short_side", "evaluation.mode=slide")),
    ],
)
def test_where_memory_runs_out_the_size_of_the_images_is_named(folder, monkeypatch, capsys, module, name, words, keys):
    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(module, name, fails)
    more = (
        [folder / "classes.txt"]
        if words[-1] == "--checkpoint"
        else [f"data.root={folder}", "model.name=timm/resnet18", "model.checkpoint=null"]
    )
    code, _, err = run(monkeypatch, capsys, *words, *more)
    assert code == 3
    assert "out of memory; lower " in err
    assert all(key in err for key in keys)


@pytest.mark.slow
def test_masks_of_photos(trained, tmp_path, monkeypatch, capsys):
    """Indices at the photo's size, a palette, overlays, shares; what cannot be read is named at the end."""
    photos = tmp_path / "photos"
    shutil.copytree(trained.data / "images" / "val", photos / "street")
    (photos / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (4000, 1)).save(photos / "line.png")
    image = Image.open(photos / "street" / "01.png")
    exif = image.getexif()
    exif[274] = 6  # to be turned by a quarter
    image.save(photos / "turned.jpg", exif=exif, quality=95)
    output = tmp_path / "found"
    for _ in range(2):  # earlier results are replaced
        code, out, err = run(
            monkeypatch, capsys, "predict", "--checkpoint", trained.best, photos, "--output", output, "--json"
        )
        assert code == 2
        assert "2 of 8 images cannot be read, the others are done" in err
        assert f"{photos}/broken.jpg: not a readable image" in err
        assert f"{photos}/line.png: an image of 4000 x 1 pixels is too long and thin; cut it in pieces" in err
    assert sorted(os.listdir(output)) == ["legend.png", "masks", "overlays", "predictions.jsonl", "sheet.png"]
    records = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert records == [json.loads(line) for line in out.splitlines()]
    assert {record["mask"] for record in records} == {f"masks/street/0{i}.png" for i in range(5)} | {"masks/turned.png"}
    model, info = conv2former.load_model(trained.best)
    palette = colours(3)
    for record in records:
        numbers = read_mask(output / record["mask"], "mask").numbers
        stored = Image.open(output / record["mask"])
        assert stored.mode == "P"
        assert np.array_equal(np.asarray(stored.convert("RGB")), palette[numbers])
        assert [numbers.shape[1], numbers.shape[0]] == record["size"] == list(stored.size)
        assert Image.open(output / record["overlay"]).size == stored.size
        for area in record["areas"]:
            assert info.class_names[area["index"]] == area["class"]
            assert area["pixels"] == (numbers == area["index"]).sum()
        assert sum(area["share"] for area in record["areas"]) == pytest.approx(1, abs=1e-5)
        if record["image"].endswith(".png"):
            assert (numbers == answer_of(model, Image.open(record["image"]))).mean() > 0.999
    (turned,) = (record for record in records if record["image"].endswith("turned.jpg"))
    assert turned["size"] == [image.height, image.width]

    (output / "masks" / "mine.png").write_bytes(b"")
    code, _, err = run(monkeypatch, capsys, "predict", "--checkpoint", trained.best, photos, "--output", output)
    assert (code, "something else than predictions (masks/mine.png)" in err) == (2, True)


@pytest.mark.slow
def test_a_photo_on_standard_input_at_another_size(trained, tmp_path, monkeypatch, capsys):
    photo = (trained.data / "images" / "val" / "00.png").read_bytes()
    words = ("predict", "--checkpoint", trained.best, "-", "data.short_side=64", "evaluation.flip=true", "--output")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(photo), isatty=lambda: False))
    code, out, err = run(monkeypatch, capsys, *words, tmp_path / "found")
    assert code == 0, err
    assert "images: shorter side 64 pixels, whole, also mirrored; masks at the size of the photos" in out
    assert Image.open(tmp_path / "found" / "masks" / "standard input.png").size == Image.open(io.BytesIO(photo)).size
    for more, expected in (
        (["--explain", "--output", tmp_path / "a"], "--explain: of a classifier's answer"),
        (["data.crop_pct=1"], "data.crop_pct: has no effect here"),
        (["evaluation.mod=slide"], "evaluation.mod: has no effect here (did you mean"),
    ):
        code, _, err = run(monkeypatch, capsys, "predict", "--checkpoint", trained.best, trained.data, *more)
        assert (code, expected in err) == (2, True), err


def test_files_have_the_images_names():
    names = ["/a/b/1.jpg", "/a/b/1.png", "/a/b/c/2.jpg", "/a/b/c/../2.jpg", "-"]
    found = file_names([ImageFile(name, name) for name in names], "/a/b/")
    assert found == ["1.jpg", "1.png", "c/2.jpg", "c/2.jpg_2", "standard input"]


def test_masks_of_many_classes_have_16_bits(tmp_path):
    classes = np.arange(300, dtype=np.uint16).reshape(15, 20)
    mask_image(classes, colours(300)).save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png", "a").numbers, classes)


@pytest.mark.parametrize("flip", [False, True])
def test_classes_are_those_of_the_highest_probability(monkeypatch, flip):
    """Whether a few classes are enlarged at a time, or all."""
    images = torch.randn(2, 7, 6, 9, generator=torch.Generator().manual_seed(0))
    sizes = [(13, 17), (6, 9)]
    answerer = Answerer(None, 0.0, flip)
    expected = [shares.argmax(0) for shares in answerer(torch.sin, images, sizes)]
    for limit in (1, 500, 1 << 27):
        monkeypatch.setattr(inference, "AT_ONCE", limit)
        found = answerer.classes(torch.sin, images, sizes)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="finite"):
        answerer.classes(torch.log, images, sizes)


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.slow
def test_an_onnx_file_takes_any_size(trained, tmp_path):
    """The head has pooling of several sizes, which ONNX does not know; masks and logits are the network's."""
    session = pytest.importorskip("onnxruntime").InferenceSession
    done = export(trained.best, tmp_path / "a.onnx", Options(), lambda text: None)
    assert all(case.relative < 1e-4 and case.agreement > 0.999 for case in done.cases)
    assert {case.shape[2:] for case in done.cases} == {(32, 32), (59, 32), (33, 39)}
    assert json.loads(done.metadata["class_names"]) == NAMES
    assert json.loads(done.metadata["palette"]) == colours(3)[:3].tolist()
    assert json.loads(done.metadata["preprocessing"])["short_side"] is None
    model = conv2former.load_model(trained.best)[0]
    images = torch.randn(2, 3, 45, 77)
    (found,) = session(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"]).run(
        None, {"images": images.numpy()}
    )
    with torch.no_grad():
        expected = model(images).numpy()
    assert found.shape == (2, 3, 45, 77)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    pools = model.head.decoder.psp.blocks
    with _exportable_pools(model):
        assert {type(pool[0]) for pool in pools} == {_Pool}
    assert {type(pool[0]) for pool in pools} == {nn.AdaptiveAvgPool2d}
    with pytest.raises(
        ConfigError, match=r"TorchScript does not take the heads of segmentations; write \.onnx or \.pt2"
    ):
        export(trained.best, tmp_path / "a.ts", Options(), lambda text: None)
    with pytest.raises(ConfigError, match="--preprocessing: of classifiers"):
        export(trained.best, tmp_path / "b.onnx", Options(preprocessing="imagenet"), lambda text: None)
    assert sorted(os.listdir(tmp_path)) == ["a.onnx"]


@pytest.mark.parametrize("cells", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 10), (12, 6)])
def test_pooling_for_the_export_is_torch_s(cells, size):
    maps = torch.randn(2, 3, *size)
    torch.testing.assert_close(_Pool(cells)(maps), nn.AdaptiveAvgPool2d(cells)(maps))


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(2, 2), nn.AvgPool2d((2, 2), (2, 2)), nn.MaxPool2d(2), nn.MaxPool2d(3, 2)]
)
def test_pooling_whose_size_is_rounded_up(pool):
    """As timm's networks have it; the maps that a segmentation's have are even."""
    assert _without_ceil_mode(pool) is None
    pool.ceil_mode = True
    for size in ((2, 8), (10, 4)):
        maps = torch.randn(2, 3, *size) - 10
        found = _without_ceil_mode(pool)(maps)
        assert torch.equal(found, pool(maps))
        assert found.shape[2:] == (size[0] // 2, size[1] // 2)


def test_pooling_that_is_left_as_it_is():
    for pool in (
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(2, 1, ceil_mode=True),
        nn.MaxPool2d((3, 2), 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(2, 2, ceil_mode=True, divisor_override=3),
        nn.AdaptiveAvgPool2d(1),
    ):
        assert _without_ceil_mode(pool) is None


@pytest.mark.slow
def test_networks_whose_pooling_rounds_up_are_written_for_any_size():
    """One with average pooling of 2 and, as some of timm's begin, maxima of 3."""
    raw = {
        "task": "segmentation",
        "model": {"name": "timm/test_resnet", "head": {"name": "fpn", "channels": 64, "auxiliary": 0.0}},
        "data": {"root": "x"},
    }
    model = build_network(configure(raw), 3).eval()
    assert sum(getattr(module, "ceil_mode", False) for module in model.backbone.modules()) == 3
    model.backbone.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
    info = SimpleNamespace(in_chans=3, name="test_resnet")
    program = MaskSubject(model, info, None, {}).trace(None).module()
    for size in ((64, 96), (33, 71), (90, 45)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------- other commands, and from Python


@pytest.mark.slow
def test_the_mean_of_files(trained, tmp_path):
    average([trained.best, trained.last], tmp_path / "soup.pt", say=lambda text: None)
    soup, info = conv2former.load_model(tmp_path / "soup.pt")
    two = [conv2former.load_model(path)[0].state_dict() for path in (trained.best, trained.last)]
    for key, value in soup.state_dict().items():
        torch.testing.assert_close(value, (two[0][key] + two[1][key]) / 2 if value.is_floating_point() else two[0][key])
    assert info.weights() == "soup of 2"
    assert validate_files([tmp_path / "soup.pt"])[0]["n"] == 5
    lines: list[str] = []
    found = greedy([trained.best, trained.last], tmp_path / "greedy.pt", say=lines.append)
    assert found >= trained.report["miou"]
    assert f"{trained.best}: mIoU {trained.report['miou']:.2f} %" in lines


@pytest.mark.slow
def test_from_python(trained):
    model, info = conv2former.load_model(trained.best)
    assert isinstance(model, SegmentationNetwork)
    assert not model.training
    assert model.auxiliary is None
    assert info.class_names == NAMES
    assert info.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    raw = conv2former.load_model(trained.best, use_ema=False)[0]
    assert not torch.equal(raw.head.classifier.weight, model.head.classifier.weight)
    with pytest.raises(CheckpointError, match=r"is of the task 'segmentation', .* conv2former\.load_model"):
        models.load_model(trained.best)
    with pytest.raises(CheckpointError, match="is of the task 'segmentation', and a classifier is needed here"):
        convert(trained.best)


@pytest.mark.slow
def test_damaged_checkpoints(trained, tmp_path):
    """One sentence each, and nothing of a size is built that the file does not have."""
    content = torch.load(trained.best, weights_only=True)

    def load(**changes) -> None:
        torch.save({**content, **changes}, tmp_path / "a.pt")
        conv2former.load_model(tmp_path / "a.pt")

    weights, config = content["model_ema"], content["config"]
    head = {**config["model"]["head"], "channels": 4096}
    for changes, expected in (
        ({"class_names": NAMES[:2]}, "names 2 classes and a head of 16 channels, and its head.classifier.weight has"),
        ({"class_names": None}, "does not name its classes"),
        ({"config": {**config, "model": {**config["model"], "head": head}}}, "names 3 classes and a head of 4096"),
        ({"config": {**config, "loss": {"focal": 1}}}, "its configuration is not one of this version: .*loss.focal"),
        (
            {"model_ema": {k: v for k, v in weights.items() if "psp" not in k}},
            "does not hold the network that it notes",
        ),
        ({"model_ema": None, "model": 3}, "holds no weights of a segmentation"),
        ({"config": {**config, "task": "dreaming"}}, "is of the task 'dreaming', and this version knows"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            load(**changes)


def test_a_folder_of_masks_that_is_not_ours(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(b"")
    for lines in ("", '{"mask": "masks/b.png"}\n', "no JSON\n"):
        (tmp_path / "predictions.jsonl").write_text(lines)
        with pytest.raises(OutputError, match=r"masks/a\.png"):
            check_results_folder(tmp_path)
    (tmp_path / "predictions.jsonl").write_text('{"mask": "masks/a.png"}\n')
    check_results_folder(tmp_path)
