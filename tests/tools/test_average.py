"""The average of weight files, against means that the test computes itself."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from PIL import Image

import conv2former
from conv2former import CheckpointError, ConfigError, Conv2Former
from conv2former.commands.export import describe
from conv2former.data import eval_transform
from conv2former.errors import OutputError
from conv2former.tools.checkpoints.average import average, greedy
from conv2former.tools.checkpoints.convert import convert, summary
from conv2former.tools.checkpoints.publish import install, write_folder
from conv2former.tools.checkpoints.table import installed_table
from conv2former.tools.export.export import export
from conv2former.tools.export.options import Options
from conv2former.tools.prediction.predict import Predictor

from ..conftest import ROOT

pytestmark = pytest.mark.slow

SHAPE = {"dims": [4, 6, 8, 10], "depths": [1, 1, 1, 1], "kernel_size": 3, "head_hidden_size": 8}
NAMES = ["cat", "dog", "owl"]


def network(seed: int) -> Conv2Former:
    torch.manual_seed(seed)
    model = Conv2Former(num_classes=3, **SHAPE).eval()
    for buffer in model.buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5 if buffer.is_floating_point() else torch.tensor(seed + 7))
    return model


def save(path, model: Conv2Former, **more):
    variant = {"name": "soup_net", **SHAPE}
    content = {"model": model.state_dict(), "variant": variant, "class_names": NAMES, "metric": 50.0}
    torch.save(content | {"config": {"data": {"img_size": 32, "workers": 0}, "train": {"batch_size": 4}}} | more, path)
    return path


@pytest.fixture
def files(tmp_path):
    return [save(tmp_path / f"{seed}.pt", network(seed)) for seed in range(3)]


def mean(models: list[Conv2Former]) -> dict[str, torch.Tensor]:
    states = [model.state_dict() for model in models]
    return {
        key: sum(state[key].double() for state in states).div(len(states)).float()
        if tensor.is_floating_point()
        else tensor
        for key, tensor in states[0].items()
    }


def assert_weights(path, expected: dict[str, torch.Tensor]) -> None:
    found = conv2former.load_model(path)[0].state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_the_kind_of_weights_is_said_everywhere(store, tmp_path, capsys):
    """Of a soup, of averaged weights that are installed, and of a file that does not say."""
    for seed in range(2):
        ema = network(seed + 5).state_dict()
        save(tmp_path / f"{seed}.pt", network(seed), model_ema=ema, optimizer={})
    average([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "soup.pt")
    install(convert(tmp_path / "soup.pt", "soup_net.soup"))
    install(convert(tmp_path / "0.pt", "soup_net.ema"))
    install(convert(tmp_path / "0.pt", "soup_net.raw", use_ema=False))
    torch.save(network(0).state_dict(), tmp_path / "plain.pt")
    for path, kind, text in (
        (tmp_path / "0.pt", "average", "averaged weights (EMA)"),
        (tmp_path / "soup.pt", "soup of 2", "soup of 2 files"),
        ("soup_net.soup", "soup of 2", "soup of 2 files"),
        ("soup_net.ema", "average", "averaged weights (EMA)"),
        ("soup_net.raw", "raw", "raw weights"),
        (tmp_path / "plain.pt", "not noted", " weights"),
    ):
        assert conv2former.inspect_checkpoint(path).weights() == kind
        assert f"3 classes, {text.strip()}, on cpu" in str(Predictor(path, device="cpu"))
        assert text in summary(convert(path, "soup_net.again"))
        assert "raw weights" not in summary(convert(path, "soup_net.again")) or kind == "raw"
        done = export(path, tmp_path / "out.ts", Options(overrides=("data.img_size=32",)), lambda text: None)
        assert done.metadata["weights"] == kind
        assert text.strip() in describe(done)
    table = {line.split()[0]: line for line in installed_table().splitlines()}
    assert "soup of 2" in table["soup_net.soup"]
    assert " average " in table["soup_net.ema"]
    assert " raw " in table["soup_net.raw"]


def test_uniform(files, tmp_path):
    said: list[str] = []
    average(files, tmp_path / "soup.pt", say=said.append)
    assert_weights(tmp_path / "soup.pt", mean([network(seed) for seed in range(3)]))
    assert len(said) == 2
    assert "running mean and variance are averaged too" in said[0]
    info = conv2former.inspect_checkpoint(tmp_path / "soup.pt")
    assert (info.name, info.class_names, info.preprocessing.img_size) == ("soup_net", NAMES, 32)
    assert info.recipe["data"]["img_size"] == 32
    sources = torch.load(tmp_path / "soup.pt", weights_only=True)["averaged_from"]
    assert [source["file"] for source in sources] == ["0.pt", "1.pt", "2.pt"]
    assert all(len(source["sha256"]) == 64 for source in sources)


def test_averaged_in_double_precision(tmp_path):
    """Of many files with a large common part; in single precision the small part would be lost."""
    models = [network(seed) for seed in range(8)]
    for i, model in enumerate(models):
        model.head.fc.bias.data[:] = torch.tensor([3e7 + 4 * i, 1.0, -1.0])
    paths = [save(tmp_path / f"{i}.pt", model) for i, model in enumerate(models)]
    average(paths, tmp_path / "soup.pt", say=lambda text: None)
    assert conv2former.load_model(tmp_path / "soup.pt")[0].head.fc.bias[0].item() == 3e7 + 14


def test_any_layout_and_averaged_weights(files, tmp_path):
    ema = save(tmp_path / "ema.pt", network(5), model_ema=network(1).state_dict())
    write_folder(convert(files[0]), tmp_path / "folder")
    average([tmp_path / "folder", ema], tmp_path / "soup.pt", say=lambda text: None)
    assert_weights(tmp_path / "soup.pt", mean([network(0), network(1)]))
    average([tmp_path / "folder", ema], tmp_path / "raw.pt", use_ema=False, say=lambda text: None)
    assert_weights(tmp_path / "raw.pt", mean([network(0), network(5)]))


def test_preprocessing_of_a_folder_is_kept(files, tmp_path):
    half = ["data.mean=[0.5,0.5,0.5]", "data.img_size=64"]
    for i in (0, 1):
        write_folder(convert(files[i], overrides=half), tmp_path / f"folder{i}")
    average([tmp_path / "folder0", tmp_path / "folder1"], tmp_path / "soup.pt", say=lambda text: None)
    noted = conv2former.load_model(tmp_path / "soup.pt")[1].preprocessing
    assert (noted.mean, noted.img_size) == ((0.5, 0.5, 0.5), 64)
    said: list[str] = []
    average([tmp_path / "folder0", files[2]], tmp_path / "soup.pt", say=said.append)
    assert any("2.pt notes other images" in text for text in said)


def test_the_soup_is_converted_like_any_file(files, tmp_path):
    average(files, tmp_path / "soup.pt", say=lambda text: None)
    write_folder(convert(tmp_path / "soup.pt"), tmp_path / "out")
    assert_weights(tmp_path / "out", mean([network(seed) for seed in range(3)]))
    assert "`2.pt`, sha256 `" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture
def photos(tmp_path):
    """Images whose class is told by the answers of network 0: it is right on all of them, the others are not."""
    model, info = conv2former.load_model(save(tmp_path / "judge.pt", sharpened(0)))
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        pixels = (torch.rand(32, 32, 3, generator=generator) * 255 * torch.rand(3, generator=generator)).byte()
        image = Image.fromarray(pixels.numpy())
        with torch.inference_mode():
            label = int(model(eval_transform(info.preprocessing)(image)[None]).argmax())
        folder = tmp_path / "photos" / "val" / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    for name in NAMES:
        (tmp_path / "photos" / "val" / name).mkdir(exist_ok=True)
    assert sum(any(folder.iterdir()) for folder in (tmp_path / "photos" / "val").iterdir()) > 1
    return tmp_path / "photos"


def sharpened(seed: int) -> Conv2Former:
    """A network whose answer depends on the image."""
    model = network(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "gamma" in name:
                parameter.mul_(20)
        model.head.fc.bias.zero_()
    return model


def test_greedy(photos, tmp_path):
    """From the best on; what lowers the accuracy stays out; each number is that of an evaluation by hand."""
    near = sharpened(0)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1.0001)
    paths = [
        save(tmp_path / "far.pt", sharpened(3)),
        save(tmp_path / "good.pt", sharpened(0)),
        save(tmp_path / "near.pt", near),
    ]
    said: list[str] = []
    top1 = greedy(paths, tmp_path / "soup.pt", [f"data.root={photos}", "data.crop_pct=0.875"], say=said.append)
    assert top1 == 100
    assert_weights(tmp_path / "soup.pt", mean([sharpened(0), near]))
    steps = [text for text in said if text.startswith(("start", "added", "left out"))]
    assert [text.split(".pt")[0].split("/")[-1] for text in steps] == ["good", "near", "far"]
    assert steps[2].startswith("left out")
    assert said[-1].endswith("the mean of 2 of 3 files, top-1 100.00 %")
    content = torch.load(tmp_path / "soup.pt", weights_only=True)
    assert content["metric"] == 100
    assert [source["file"] for source in content["averaged_from"]] == ["good.pt", "near.pt"]
    alone = next(float(text.split("top-1 ")[1].split(" ")[0]) for text in said if text.startswith(str(paths[0])))
    assert alone == pytest.approx(by_hand(sharpened(3), photos, tmp_path), abs=0.005)


def by_hand(model: Conv2Former, photos, tmp_path) -> float:
    info = conv2former.inspect_checkpoint(tmp_path / "far.pt")
    right = []
    for path in sorted((photos / "val").glob("*/*.png")):
        with torch.inference_mode():
            answer = model(eval_transform(info.preprocessing)(Image.open(path))[None]).argmax()
        right.append(NAMES[int(answer)] == path.parent.name)
    return 100 * sum(right) / len(right)


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_averaged(files, tmp_path):
    other = Conv2Former(num_classes=3, **{**SHAPE, "depths": [1, 1, 2, 1]})
    torch.save(other.state_dict(), tmp_path / "deep.pt")
    wide = Conv2Former(num_classes=4, **SHAPE)
    torch.save(wide.state_dict(), tmp_path / "four.pt")
    save(tmp_path / "names.pt", network(1), class_names=["a", "b", "c"])
    save(tmp_path / "sum.pt", network(1), variant={"name": "x", "fusion": "sum", **SHAPE})
    save(tmp_path / "stem.pt", network(1), variant={"name": "x", "stem_stride": 2, **SHAPE})
    norms = Conv2Former(num_classes=3, norm_layer="batchnorm2d", **SHAPE)
    torch.save(norms.state_dict(), tmp_path / "norms.pt")
    broken = network(1)
    broken.head.fc.bias.data[0] = float("inf")
    save(tmp_path / "inf.pt", broken)
    output = tmp_path / "new" / "soup.pt"
    for name, expected in (
        ("deep.pt", r"deep\.pt is not the network of .*0\.pt: depths \[1, 1, 2, 1\] for \[1, 1, 1, 1\]"),
        ("four.pt", r"four\.pt is not the network of .*: num_classes 4 for 3"),
        ("names.pt", "but not the same class names"),
        ("sum.pt", "fusion sum for product"),
        ("stem.pt", "stem_stride 2 for 4"),
        ("norms.pt", "norm_layer batchnorm2d for layernorm2d"),
        ("inf.pt", r"inf\.pt: head\.fc\.bias holds values that are not finite"),
        ("none.pt", r"none\.pt: no such file"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            average([files[0], tmp_path / name], output)
        with pytest.raises(CheckpointError, match=expected):
            greedy([files[0], tmp_path / name], output, ["data.root=/none"])
    with pytest.raises(ConfigError, match="at least two"):
        average(files[:1], output)
    (tmp_path / "link.pt").symlink_to(files[0])
    with pytest.raises(ConfigError, match=r"link\.pt is given twice"):
        average([files[0], files[1], tmp_path / "link.pt"], output)
    with pytest.raises(OutputError, match="is one of the files to average"):
        average(files, files[1])
    with pytest.raises(OutputError, match="do not fit into it"):
        average(files, tmp_path / "soup.safetensors")
    assert not output.exists()
    assert_weights(files[1], network(1).state_dict())


def script(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["average.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "average.py"), run_name="__main__")
        sys.exit(0)
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def test_the_command(files, photos, tmp_path, monkeypatch, capsys):
    soup = tmp_path / "soup.pt"
    code, _, err = script(monkeypatch, capsys, *files, "--output", soup, f"data.root={photos}")
    assert code == 2
    assert "no effect without --greedy" in err
    code, _, err = script(monkeypatch, capsys, *files, "--output", soup, "--greedy", "data.root=/none")
    assert code == 2
    assert err.count("\n") == 1
    assert "/none" in err
    assert not soup.exists()
    code, _, err = script(monkeypatch, capsys, *files, "--output", "/dev/null/x.pt")
    assert (code, err.count("\n")) == (2, 1)
    code, out, _ = script(monkeypatch, capsys, *files, "--output", soup, "--greedy", f"data.root={photos}")
    assert code == 0
    assert out.splitlines()[-1].startswith(f"{soup}: the mean of ")
    assert script(monkeypatch, capsys, *files, "--output", soup)[1].endswith("the mean of 3 files\n")
