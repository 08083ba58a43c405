"""Exported files, run by clients that know nothing of this project; the documentation's script beside timm."""

from __future__ import annotations

import builtins
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from timm.data import create_transform

import conv2former
from conv2former.config.schema import DataConfig
from conv2former.data import open_val
from conv2former.errors import CheckpointError, ConfigError, DataError, OutputError, UserError
from conv2former.models import Preprocessing
from conv2former.models.ablations import FUSIONS
from conv2former.tools.export import export as tool
from conv2former.tools.export import opening, quantize, writing
from conv2former.tools.export.export import export
from conv2former.tools.export.opening import read_metadata
from conv2former.tools.export.options import Options
from conv2former.tools.export.quantize import Accuracy, ImagesFor, export_int8

from ..conftest import FIXTURES, ROOT

pytestmark = pytest.mark.slow

NAMES = [f"class {i}" for i in range(10)]
NOTED = {"img_size": 48, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear", "crop_pct": 0.9}
# Whether torch can be told the least size of an image, and calls an image's sizes as it is told
SAYS_SIZES = importlib.util.find_spec("torch.fx.experimental.dynamic_spec") is not None
DOCS = (ROOT / "docs" / "export.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS, re.S)


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Digits and pieces of two photographs, of many shapes, as files."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    digits = load_digits().images
    for i in range(0, 40, 2):
        Image.fromarray((digits[i] * 255 / 16).astype(np.uint8)).save(folder / f"digit_{i:02}.png")
    for i in range(20):
        photo = load_sample_images().images[i % 2]
        y, x = rng.integers(200, size=2)
        height, width = rng.integers(20, 220, size=2)
        Image.fromarray(photo[y : y + height, x : x + width]).save(folder / f"photo_{i:02}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, images):
    """The tiny network with names and a preprocessing of its own; its answers to `images` are not all the same."""
    model, _ = conv2former.load_model(FIXTURES / "official_format.pth.tar")
    transform = create_transform(48, is_training=False)
    with torch.no_grad():
        logits = model(torch.stack([transform(Image.open(path).convert("RGB")) for path in images]))
        model.head.fc.weight /= logits.std(0)[:, None]
        model.head.fc.bias.copy_((model.head.fc.bias - logits.mean(0)) / logits.std(0))
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    torch.save({"state_dict": model.state_dict(), "class_names": NAMES, "preprocessing": NOTED}, path)
    return path


SMALL = {"dims": (4, 4, 6, 8), "depths": (1, 1, 1, 1), "kernel_size": 5}


def small_network(**changes) -> conv2former.Conv2Former:
    torch.manual_seed(0)
    return conv2former.Conv2Former(**{"num_classes": 10, "ls_init_value": 0.5, **SMALL, **changes}).eval()


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp("exported") / "tiny.onnx", say=silent)


@pytest.fixture(scope="module")
def onnx_file(exported):
    return exported.path


def run_onnx(path, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": x.numpy()})[0]


@torch.no_grad()
def run_network(checkpoint, x: torch.Tensor) -> np.ndarray:
    return conv2former.load_model(checkpoint)[0](x).numpy()


def others(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------- the three formats


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (5, 3, 71, 40), (2, 3, 33, 190)])
def test_onnx_at_sizes_that_the_tool_did_not_try(checkpoint, onnx_file, shape):
    x = torch.randn(shape)
    np.testing.assert_allclose(run_onnx(onnx_file, x), run_network(checkpoint, x), rtol=1e-4, atol=1e-5)


def test_onnx_is_one_clean_file(checkpoint, onnx_file):
    assert others(onnx_file.parent) == ["tiny.onnx"]
    onnx.checker.check_model(str(onnx_file), full_check=True)
    model = onnx.load(onnx_file)
    dims = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"] if SAYS_SIZES else dims[1] == 3 and len({*dims}) == 4
    if SAYS_SIZES:  # an older torch looks at the sizes while the file runs
        assert not {"Shape", "If", "Loop", "Cast", "Range"} & {node.op_type for node in model.graph.node}
    assert str(ROOT).encode() not in onnx_file.read_bytes()
    assert b"site-packages" not in onnx_file.read_bytes()


def test_the_comparison_is_what_a_client_finds(checkpoint, exported):
    done = exported
    assert len(done.cases) == 6
    assert {case.shape[0] for case in done.cases} == {1, 3}
    sizes = {case.shape[2:] for case in done.cases}
    assert (48, 48) in sizes
    assert len(sizes) == 3
    assert any(h != w and h % 32 and w % 32 for h, w in sizes)
    rng = np.random.default_rng(0)
    for case in done.cases:
        x = torch.from_numpy(rng.standard_normal(case.shape, dtype=np.float32))
        expected = run_network(checkpoint, x)
        assert case.scale == pytest.approx(np.abs(expected).max(), rel=1e-5)
        assert case.difference == pytest.approx(np.abs(run_onnx(done.path, x) - expected).max(), abs=1e-6)
    assert done.size == done.path.stat().st_size


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:FutureWarning")
@pytest.mark.parametrize(("block", "name"), [(BLOCKS[1], "model.pt2"), (BLOCKS[2], "model.ts")])
def test_torch_formats_by_the_documentation_s_way_to_run_them(tmp_path, monkeypatch, capsys, block, name):
    checkpoint = tmp_path / "small.pt"
    torch.save({"state_dict": small_network().state_dict(), "class_names": NAMES, "preprocessing": NOTED}, checkpoint)
    done = export(checkpoint, tmp_path / name, say=silent)
    assert max(case.relative for case in done.cases) < 1e-5  # exports hold the plain formula, whose rounding is another
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(block, found)
    assert capsys.readouterr().out == "48 torch.Size([1, 10])\n"
    assert json.loads(found["texts"]["class_names"]) == NAMES
    for shape in ((1, 3, 32, 32), (4, 3, 33, 70)):
        x = torch.randn(shape)
        logits = found["network"](x).detach().numpy()
        np.testing.assert_allclose(logits, run_network(checkpoint, x), rtol=1e-5, atol=1e-6)
    if name == "model.pt2" and SAYS_SIZES:
        with pytest.raises(AssertionError, match="32"):
            found["network"](torch.zeros(1, 3, 31, 40))


def test_torchscript_needs_nothing_of_this_project(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "model.ts", say=silent)
    code = "import sys; sys.modules['conv2former'] = sys.modules['timm'] = None\n" + BLOCKS[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert out.stdout == "48 torch.Size([1, 10])\n", out.stderr


def test_a_fixed_file_of_grey_images_without_classes(tmp_path):
    model = small_network(in_chans=1, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    options = Options(dynamic=False, batch_size=2, img_size=32, opset=18)
    done = export(tmp_path / "a.pt", tmp_path / "a.onnx", options, silent)
    assert {case.shape for case in done.cases} == {(2, 1, 32, 32)}
    assert "opset 18" in done.facts
    assert json.loads(read_metadata(done.path)["preprocessing"])["img_size"] == 32
    session = onnxruntime.InferenceSession(done.path)
    x = torch.randn(2, 1, 32, 32)
    (found,) = session.run(["features"], {"images": x.numpy()})
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        session.run(None, {"images": x[:1].numpy()})


def test_a_fixed_file_that_is_not_square(tmp_path, monkeypatch, capsys):
    torch.save(small_network().state_dict(), tmp_path / "a.pt")
    words = ["--checkpoint", tmp_path / "a.pt", "--output", tmp_path / "a.onnx", "--fixed"]
    assert script(monkeypatch, *words, "--img-size", 40, 72, "data.crop_pct=1") == 0
    assert "images: 40 x 72 (height x width), bicubic, crop 1," in capsys.readouterr().out
    noted = json.loads(read_metadata(tmp_path / "a.onnx")["preprocessing"])
    assert (noted["img_size"], noted["crop_pct"]) == ([40, 72], 1)
    assert run_onnx(tmp_path / "a.onnx", torch.zeros(1, 3, 40, 72)).shape == (1, 10)
    for wrong in (["12x12"], [40, 72, 3], ["data.crop_pct=1"]):
        assert script(monkeypatch, *words, "--img-size", *wrong) == 2
        assert "expected one number, or height and width" in capsys.readouterr().err


@pytest.mark.parametrize(("fusion", "ending"), [*((name, ".ts") for name in FUSIONS), ("unit", ".onnx")])
def test_own_variants_with_other_fusions(tmp_path, fusion, ending):
    shape = {"head_hidden_size": 8, "fusion": fusion, **SMALL}
    content = {"state_dict": small_network(**shape).state_dict(), "variant": {"name": "mine", **shape}}
    torch.save(content, tmp_path / "a.pt")
    done = export(tmp_path / "a.pt", tmp_path / f"a{ending}", Options(img_size=32), silent)
    assert done.info.fusion == fusion
    assert done.metadata["variant"] == "mine"
    assert "class_names" not in done.metadata
    assert max(case.relative for case in done.cases) < 1e-5


def test_a_torch_without_the_newer_way_to_say_any_shape(monkeypatch):
    real = builtins.__import__

    def older(name, *args, **kwargs):
        if name.endswith("dynamic_spec") and args[0]["__name__"] == writing.__name__:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    if SAYS_SIZES:  # otherwise this is such a torch
        monkeypatch.setattr(builtins, "__import__", older)
    model = small_network()
    with torch.no_grad(), opening.quiet():
        network = tool._trace(model, 3, (64, 64), None).module()
        for x in (torch.randn(1, 3, 70, 95), torch.randn(3, 3, 128, 64)):
            np.testing.assert_allclose(network(x).numpy(), model(x).numpy(), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- the metadata


def test_metadata(checkpoint, onnx_file):
    texts = read_metadata(onnx_file)
    assert json.loads(texts["class_names"]) == NAMES
    assert json.loads(texts["preprocessing"]) == {**NOTED, "crop_mode": "center"}
    assert texts["source"] == "tiny.pt"
    assert texts["weights"] == "not noted"  # a state dict alone does not say
    assert texts["conv2former_version"] == conv2former.__version__
    shown = subprocess.run(["sha256sum", checkpoint], capture_output=True, text=True).stdout
    assert texts["source_sha256"] == shown.split()[0]
    documented = re.findall(r"^\| (`.*?`) \|", DOCS, re.M)
    assert {key for cell in documented for key in re.findall(r"`(\w+)`", cell)} == set(opening.METADATA)


def test_imagenet_s_names_and_another_preprocessing(tmp_path):
    torch.save(small_network(num_classes=1000).state_dict(), tmp_path / "a.pt")
    options = Options(preprocessing="inception", overrides=("data.crop_pct=0.8",), img_size=32)
    texts = export(tmp_path / "a.pt", tmp_path / "a.ts", options, silent).metadata
    assert json.loads(texts["class_names"])[0] == "n01440764"
    assert json.loads(texts["display_names"])[0] == "tench"
    noted = Preprocessing(**json.loads(texts["preprocessing"]))
    assert (noted.img_size, list(noted.mean), noted.crop_pct) == (32, [0.5, 0.5, 0.5], 0.8)


# ----------------------------------------------------------------------------------------------- the script in the docs


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs") / "classify.py"
    path.write_text(BLOCKS[0])
    return path


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_the_script_gives_the_same_labels_without_torch(checkpoint, onnx_file, images, classify, tmp_path, mode):
    cfg = json.loads(read_metadata(onnx_file)["preprocessing"])
    if mode != "center":
        cfg |= {"crop_mode": mode, "interpolation": "bicubic"}
        model = onnx.load(onnx_file)
        onnx.helper.set_model_props(model, {**read_metadata(onnx_file), "preprocessing": json.dumps(cfg)})
        onnx_file = tmp_path / "a.onnx"
        onnx.save(model, onnx_file)
    transform = create_transform(cfg.pop("img_size"), is_training=False, **cfg)
    x = torch.stack([transform(Image.open(path).convert("RGB")) for path in images])
    labels = run_network(checkpoint, x).argmax(1)
    assert len(set(labels.tolist())) > 3
    blocked = ("torch", "torchvision", "timm", "conv2former", "cv2")
    code = f"import runpy, sys\nfor name in {blocked}: sys.modules[name] = None\nrunpy.run_path({str(classify)!r})"
    words = [sys.executable, "-c", code, onnx_file, *images]
    out = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert out.stdout.splitlines() == [f"{path} {NAMES[i]}" for path, i in zip(images, labels, strict=True)], out.stderr


def test_the_script_s_pixels_are_timm_s_bit_for_bit(onnx_file, classify, monkeypatch):
    """Of square and other inputs, of three channels and one."""
    monkeypatch.setattr(sys, "argv", ["classify.py", str(onnx_file)])
    to_input = runpy.run_path(str(classify))["to_input"]
    rng = np.random.default_rng(0)
    photo = Image.fromarray(load_sample_images().images[0])
    for _ in range(150):
        width, height = (int(side) for side in rng.integers(3, 300, size=2))
        image = photo.crop((10, 10, 10 + width, 10 + height))
        sides = [int(side) for side in rng.choice([32, 33, 47, 224], size=2)]
        channels = int(rng.choice([1, 3]))
        p = Preprocessing(
            sides[0] if rng.random() < 0.5 else (sides[0], sides[1]),
            tuple(rng.random(channels).tolist()),
            tuple((rng.random(channels) + 0.1).tolist()),
            str(rng.choice(["bilinear", "bicubic"])),
            float(rng.choice([0.5, 0.72, 0.875, 0.9, 0.95, 1.0])),
            str(rng.choice(["center", "squash", "border"])),
        ).to_dict()
        ours = to_input(image, p)[0]
        theirs = create_transform(p.pop("img_size"), is_training=False, **p)(
            image if channels == 3 else image.convert("L")
        )
        theirs = theirs.numpy()
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs), (image.size, p)


# ----------------------------------------------------------------------------------------------------------------- int8


def top1(path, files_and_labels, cfg: dict) -> float:
    """An accuracy by a plain loop over PIL images."""
    cfg = dict(cfg)
    transform = create_transform(cfg.pop("img_size"), is_training=False, **cfg)
    right = [run_onnx(path, transform(image)[None]).argmax() == label for image, label in files_and_labels]
    return 100 * float(np.mean(right))


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory, checkpoint):
    """A checkpoint of three classes whose data section leads to digits in folders, and that data."""
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for split, first, last in (("train", 0, 30), ("val", 30, 90)):
        for i in range(first, last):
            label = int(digits.target[i]) % 3
            (root / split / "abc"[label]).mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[i] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).resize((40, 48)).save(root / split / "abc"[label] / f"{i}.png")
    state = {**torch.load(checkpoint, weights_only=True)["state_dict"]}
    state |= {key: state[key][:3] for key in ("head.fc.weight", "head.fc.bias")}
    recipe = {"data": {"root": str(root), "workers": 0, "img_size": 48}, "train": {}}
    path = root / "digits.pt"
    torch.save({"state_dict": state, "class_names": ["a", "b", "c"], "config": recipe}, path)
    return path, root


@pytest.fixture(scope="module")
def int8(of_digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    return export_int8(of_digits[0], folder / "int8.onnx", images=ImagesFor(calibration=12), say=silent)


def test_int8(of_digits, int8):
    path, root = of_digits
    file = int8.exported.path
    assert others(file.parent) == ["int8.onnx"]
    assert int8.calibrated_on == f"12 images of {root / 'train'}"
    assert int8.evaluated_on == f"60 images of {root / 'val'}"
    assert int8.exported.size < 0.65 * int8.float_size
    texts = read_metadata(file)
    noted = json.loads(texts["quantization"])
    assert noted["calibrated_on"] == int8.calibrated_on
    cfg = json.loads(texts["preprocessing"])
    transform = create_transform(cfg.pop("img_size"), is_training=False, **cfg)
    files = sorted((root / "val").glob("*/*"))
    labels = np.array(["abc".index(file.parent.name) for file in files])
    x = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    ours, theirs = run_onnx(file, x), run_network(path, x)
    assert int8.accuracy.n == 60
    assert int8.accuracy.float_top1 == pytest.approx(100 * (theirs.argmax(1) == labels).mean())
    assert int8.accuracy.int8_top1 == pytest.approx(100 * (ours.argmax(1) == labels).mean())
    assert int8.accuracy.agreement == pytest.approx(100 * (ours.argmax(1) == theirs.argmax(1)).mean())
    assert 0 < np.abs(ours - theirs).max() < 0.3 * np.abs(theirs).max()
    assert run_onnx(file, torch.randn(3, 3, 33, 61)).shape == (3, 3)


def test_what_is_quantized(int8):
    model = onnx.load(int8.exported.path)
    onnx.checker.check_model(model, full_check=True)
    made_by = {output: node for node in model.graph.node for output in node.output}
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight = made_by[node.input[1]]
            assert weight.op_type == "DequantizeLinear"
            assert arrays[weight.input[0]].data_type == onnx.TensorProto.INT8
            assert len(arrays[weight.input[1]].dims) == 1  # one scale per channel
        elif node.op_type == "LayerNormalization":
            assert arrays[node.input[1]].data_type == onnx.TensorProto.FLOAT
    assert made_by["logits"].op_type == "Gemm"  # float, not rounded to 8 bits
    assert {entry.domain for entry in model.opset_import} == {""}


def test_without_a_training_split_the_others_are_evaluated(of_digits):
    root = of_digits[1]
    data = DataConfig(root=str(root), train_split="none", val_split="val")
    val = open_val(data, ["a", "b", "c"])
    images = ImagesFor(calibration=9, evaluation=20)
    first, second = quantize._choose(data, val, [], images)
    names = [[source.images.name(i) for i in range(len(source))] for source in (first, second)]
    assert [len(part) for part in names] == [9, 20]
    assert not set(names[0]) & set(names[1])
    assert {name.split("/")[-2] for name in names[0]} == set("abc")
    assert second.name == f"the others of {root / 'val'}"
    with pytest.raises(DataError, match="none"):  # one that was asked for
        quantize._choose(data, val, ["data.train_split=none"], images)
    with pytest.raises(ConfigError, match="at least 1"):
        quantize._choose(data, val, [], ImagesFor(calibration=0))


def test_what_is_held_out_is_not_calibrated_on(of_digits):
    data = DataConfig(root=str(of_digits[1]), holdout=0.3, val_split=None)
    data = data.model_copy(update={"root": str(of_digits[1] / "train"), "train_split": "."})
    val = open_val(data, ["a", "b", "c"])
    first, second = quantize._choose(data, val, [], ImagesFor())
    names = [{source.images.name(i) for i in range(len(source))} for source in (first, second)]
    assert len(names[0]) + len(names[1]) == 30
    assert not names[0] & names[1]


def test_a_file_of_a_fixed_batch_size_is_evaluated_on_every_image_once(of_digits):
    data = DataConfig(root=str(of_digits[1]), img_size=32, workers=0)
    val = open_val(data, ["a", "b", "c"])
    seen = []

    def run(images: np.ndarray) -> np.ndarray:
        seen.append(len(images))
        return np.tile(np.float32([0, 1, 0]), (len(images), 1))

    accuracy = quantize._evaluate(run, lambda images: -run(images), val, data, 7, None)
    assert set(seen) == {7}
    assert accuracy.n == 60
    assert accuracy.float_top1 == pytest.approx(100 * (val.images.labels == 1).mean())
    assert accuracy.int8_top1 == pytest.approx(100 * (val.images.labels == 0).mean())
    assert accuracy.agreement == 0


# --------------------------------------------------------------------------------------------------------------- errors


def script(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    try:
        runpy.run_path(str(ROOT / "scripts" / "export.py"), run_name="__main__")
    except SystemExit as e:
        return int(e.code)
    return 0


def test_the_script(checkpoint, tmp_path, monkeypatch, capsys):
    assert script(monkeypatch, "--checkpoint", checkpoint, "--output", tmp_path / "new" / "a.ts") == 0
    out, err = capsys.readouterr()
    assert not err
    assert "10 classes with their names" in out
    assert "3 x 3 x 74 x 33" in out
    assert f"{tmp_path}/new/a.ts: torchscript, " in out


@pytest.mark.parametrize("drop", [0.5, 1.5])
def test_the_script_prints_both_accuracies_and_warns(int8, monkeypatch, capsys, drop):
    given = []

    def result(checkpoint, output, options, images, say):
        given.append(images)
        return replace(int8, accuracy=Accuracy(200, 90.0, 90.0 - drop, 97.5))

    monkeypatch.setattr("conv2former.commands.export.export_int8", result)
    words = ["--int8", "--calibration-images", 4, "--evaluation-images", 6, "--calibrate", "data.root=x"]
    assert script(monkeypatch, "--checkpoint", "a.pt", "--output", "a.onnx", *words) == 0
    out, err = capsys.readouterr()
    assert given == [ImagesFor(("data.root=x",), None, 4, 6)]
    assert re.search(rf"^float32 +[\d.]+ +90.00 +200\nint8 +[\d.]+ +{90 - drop:.2f} +200$", out, re.M)
    assert "the same class on 97.50 % of the images" in out
    assert bool(re.search(r"^warning: int8 loses 1.50 points of top-1", err, re.M)) == (drop > 1)


MISTAKES = [
    (["--output", "a.onxx"], "a.onxx: its ending says no format (did you mean '.onnx'?)"),
    (["--output", "a.pt2", "--format", "onnx"], "the ending is that of torch_export, not of onnx"),
    (["--output", "a.onnx", "--img-size", "31"], "--img-size 31: expected 32 to 4096 pixels"),
    (["--output", "a.onnx", "--img-size", "64", "31"], "--img-size 64 31: expected 32 to 4096 pixels"),
    (["--output", "a.onnx", "--tolerance", "nan"], "--tolerance nan: expected a number above 0"),
    (["--output", "a.onnx", "--batch-size", "4"], "--batch-size 4: goes with --fixed"),
    (["--output", "a.ts", "--fixed"], "--fixed: a TorchScript file takes any"),
    (["--output", "file/a.ts"], "file/a.ts cannot be written"),
    (["--output", "folder.ts"], "folder.ts is a folder"),
    (["--output", "tiny.pt", "--format", "torchscript"], "tiny.pt is the checkpoint itself"),
    (["--output", "a.ts", "--checkpoint", "none.pt"], "none.pt: no such file"),
    (["--output", "a.ts", "--checkpoint", "file"], "file is not a checkpoint that torch can read"),
    (["--output", "a.ts", "data.img_size=8"], "data.img_size"),
    (["--output", "a.ts", "data.root=x"], "data.root: has no effect here"),
    (["--output", "a.ts", "--int8"], "int8 is for ONNX; end it in .onnx"),
    (["--output", "a.onnx", "--int8"], "does not say where images are: give --data FOLDER"),
    (["--output", "a.onnx", "--int8", "--data", "none"], "none: no such folder"),
    (["--output", "a.onnx", "--fixed", "--opset", "17"], "--opset 17: torch wrote 18 instead; the default is 20"),
    (["--output", "a.onnx", "--fixed", "--tolerance", "1e-12"], "more than the tolerance of 1e-12"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_mistakes_are_one_sentence_and_leave_nothing(checkpoint, tmp_path, monkeypatch, capsys, words, expected):
    (tmp_path / "tiny.pt").write_bytes(checkpoint.read_bytes())
    (tmp_path / "file").write_text("no checkpoint")
    (tmp_path / "folder.ts").mkdir()
    (tmp_path / "a.onnx").write_text("as it was")
    before = others(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert script(monkeypatch, "--checkpoint", "tiny.pt", *words) == 2
    out, err = capsys.readouterr()
    assert err.count("error: ") == 1
    assert expected in err
    assert not out
    assert others(tmp_path) == before
    assert (tmp_path / "a.onnx").read_text() == "as it was"
    assert (tmp_path / "tiny.pt").read_bytes() == checkpoint.read_bytes()


@pytest.mark.parametrize("broken", ["nan", "shape", "raise"])
def test_a_file_that_answers_otherwise_is_not_kept(checkpoint, tmp_path, monkeypatch, broken):
    opened = writing.open_file

    def answer(found: np.ndarray) -> np.ndarray:
        if broken == "raise":
            raise RuntimeError("no\nsuch size")
        return found * np.float32("nan") if broken == "nan" else found[:, 1:]

    def faulty(*args):
        run, texts = opened(*args)
        return lambda images: answer(run(images)), texts

    monkeypatch.setattr(writing, "open_file", faulty)
    expected = {
        "nan": "more than the tolerance",
        "shape": r"has the shape \(1, 9\)",
        "raise": r"does not run .* \(no\)",
    }
    with pytest.raises(OutputError, match=expected[broken]):
        export(checkpoint, tmp_path / "a.ts", say=silent)
    assert not others(tmp_path)


def test_broken_weights(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["head.fc.bias"] = torch.full((10,), float("nan"))
    torch.save(content, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match="not all finite"):
        export(tmp_path / "nan.pt", tmp_path / "a.ts", say=silent)
    assert others(tmp_path) == ["nan.pt"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package(checkpoint, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"ONNX needs the package {package} .*pip install 'conv2former\[export\]'"):
        export(checkpoint, tmp_path / "a.onnx", say=silent)


def test_too_large_for_one_file(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_ONNX_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"write \.pt2 or \.ts"):
        export(checkpoint, tmp_path / "a.onnx", say=silent)
    assert not others(tmp_path)


def test_int8_of_other_than_rgb_and_grey(tmp_path):
    torch.save(small_network(in_chans=2).state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"takes images of 2 channels; .* RGB \(3\) or grey \(1\)"):
        export_int8(tmp_path / "a.pt", tmp_path / "a.onnx", images=ImagesFor(root=str(tmp_path)), say=silent)


@pytest.mark.parametrize(("on_error", "expected"), [("raise", r"a/0\.png: not a readable"), ("skip", "not one image")])
def test_images_to_calibrate_on_that_cannot_be_read(of_digits, exported, tmp_path, on_error, expected):
    for name in "abc":
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_text("no image")
    data = DataConfig(root=str(tmp_path), img_size=32, workers=0, on_error=on_error)
    inputs = quantize._inputs(open_val(data, ["a", "b", "c"]), data, 2, 3)
    (tmp_path / "float").mkdir()
    original = shutil.copy(exported.path, tmp_path / "float" / "a.onnx")
    with pytest.raises(DataError, match=expected):
        quantize._quantize(original, tmp_path / "a.onnx", inputs)
