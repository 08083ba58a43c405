"""Conversion to timm's hub layout, the store, and what would be sent to the hub."""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import subprocess
import sys
import threading

import huggingface_hub
import pytest
import timm
import torch
import yaml
from timm.models import _hub

import conv2former
from conv2former import CheckpointError, ConfigError, Conv2Former, DataError
from conv2former.errors import OutputError
from conv2former.tools.checkpoints import convert as tool
from conv2former.tools.checkpoints.convert import convert, summary
from conv2former.tools.checkpoints.publish import check_hub, install, push, uninstall, write_folder
from conv2former.tools.checkpoints.table import installed_table
from conv2former.tools.evaluation.validate import validate
from conv2former.tools.prediction.predict import Predictor
from conv2former.weights.installed import file_sha256

from ..conftest import ROOT
from ..weights.test_installed import CLASSES, SHAPE, zoo  # noqa: F401 - a fixture
from ..weights.test_weights import LAYOUTS, birder_state_dict

pytestmark = pytest.mark.slow

HALF = (0.5, 0.5, 0.5)


def authors_keys(model: Conv2Former) -> dict[str, torch.Tensor]:
    """Renames a network's tensors as the authors have them: the other way round than reading does."""
    from conv2former.weights.contents import native_state_dict

    stages = [len(stage.blocks) for stage in model.stages]
    known = LAYOUTS["conv2former_t"]["state_dict"]
    block = [key.removeprefix("stages.0.0.") for key in known if key.startswith("stages.0.0.")]
    foreign = [key for key in known if not key.startswith("stages.")]
    foreign += [f"stages.{s}.{b}.{key}" for s, depth in enumerate(stages) for b in range(depth) for key in block]
    own = model.state_dict()
    native = {key: next(iter(native_state_dict({key: torch.zeros(1)}))) for key in foreign}
    assert set(native.values()) == set(own)
    return {key: own[name].clone() for key, name in native.items()}


def network(seed: int = 0, **changes) -> Conv2Former:
    torch.manual_seed(seed)
    model = Conv2Former(**{**SHAPE, "num_classes": CLASSES, **changes}).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


def authors_file(path, model: Conv2Former, layout: str = "authors", **args):
    state_dict = authors_keys(model)
    if layout == "birder":
        torch.save({"state": birder_state_dict(state_dict)}, path)
    else:
        namespace = argparse.Namespace(lr=1e-3, data_dir="/secret/place/imagenet", mean=None, **args)
        content = {"state_dict": state_dict, "args": namespace, "epoch": 299, "metric": 79.5, "arch": "x"}
        torch.save(content, path)
    return path


def same(model, expected, chans: int = 3) -> bool:
    images = torch.rand(2, chans, 64, 64)
    with torch.inference_mode():
        return torch.equal(model.eval()(images), expected(images))


def section(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["conv2former"]


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("layout", ["authors", "birder"])
def test_a_foreign_file(zoo, tmp_path, layout):  # noqa: F811
    expected = network()
    path = authors_file(tmp_path / "a.pth.tar", expected, layout)
    write_folder(convert(path, "pub_a.one"), tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    assert same(model, expected)
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"]) == ((3, 64, 64), 0.875)  # of the published file
    noted = section(tmp_path / "out")
    assert noted["source"] == {
        "file": "a.pth.tar", "sha256": file_sha256(path), "layout": layout, "weights": "not noted"
    }  # fmt: skip
    assert noted["sha256"] == file_sha256(tmp_path / "out" / "model.safetensors")
    assert noted["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert "img_size" in noted["assumed"]
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (noted["sha256"], noted["source"]["sha256"], "a.pth.tar", "80.0 % top-1", "not measured", "assumed"):
        assert text in card
    assert ("79.5, epoch 299" in card) == (layout == "authors")
    assert ("lr: 0.001" in card) == (layout == "authors")
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("timm", "image-classification")


def test_again_the_same(zoo, tmp_path):  # noqa: F811
    """A converted folder, and the weight file in it, convert to the same bytes: weights, configuration and card."""
    path = authors_file(tmp_path / "a.pth.tar", network(), img_size=96)
    write_folder(convert(path, preprocessing="inception"), tmp_path / "one")
    write_folder(convert(tmp_path / "one"), tmp_path / "two")
    write_folder(convert(tmp_path / "two" / "model.safetensors"), tmp_path / "three")
    for name in ("model.safetensors", "config.json", "README.md"):
        first = (tmp_path / "one" / name).read_bytes()
        assert first == (tmp_path / "two" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_changed_weights_are_not_those_of_the_source(tmp_path, official_file):
    write_folder(convert(official_file), tmp_path / "one")
    model, _ = conv2former.load_model(tmp_path / "one")
    model.head.fc.bias.data += 1
    import safetensors.torch

    safetensors.torch.save_file(model.state_dict(), tmp_path / "one" / "model.safetensors")
    assert convert(tmp_path / "one").section["source"]["file"] == "model.safetensors"
    assert convert(official_file).section["source"]["file"] == official_file.name


def test_adapted(tmp_path, official_file):
    write_folder(convert(official_file), tmp_path / "out")
    name = f"local-dir:{tmp_path}/out"
    expected, _ = conv2former.load_model(official_file)
    assert same(timm.create_model(name, pretrained=True), expected)
    assert timm.create_model(name, pretrained=True, num_classes=7).num_classes == 7
    grey = timm.create_model(name, pretrained=True, in_chans=1)
    assert torch.allclose(grey.stem.conv1.weight, expected.stem.conv1.weight.sum(1, keepdim=True))
    images = torch.rand(1, 3, 64, 64)
    features = timm.create_model(name, pretrained=True, features_only=True).eval()(images)
    assert torch.equal(features[-1], expected.forward_features(images))


CHILD = """
import sys, timm, torch, conv2former
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
torch.save(model(torch.ones(1, 3, 64, 64)), sys.argv[2])
print(*sorted(conv2former.list_variants()))
"""


def test_a_network_of_ones_own_where_nobody_registered_it(tmp_path):
    shape = {"dims": [4, 6, 8, 10], "depths": [1, 2, 1, 1], "kernel_size": [3, 5, 7, 9], "fusion": "sigmoid"}
    shape["stem_stride"] = 2
    model = Conv2Former(num_classes=2, ls_init_value=None, head_hidden_size=12, mlp_ratio=2, **shape).eval()
    definition = {"name": "my_net", "ls_init_value": None, "head_hidden_size": 12, "mlp_ratio": 2, **shape}
    content = {"model": model.state_dict(), "variant": {**definition, "train_drop_path_rate": 0.3}}
    torch.save(content | {"class_names": ["cat", "dog"]}, tmp_path / "x.pt")
    write_folder(convert(tmp_path / "x.pt"), tmp_path / "out")
    words = [sys.executable, "-c", CHILD, tmp_path / "out", tmp_path / "logits.pt"]
    out = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert "my_net" not in out.stdout
    with torch.inference_mode():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.ones(1, 3, 64, 64)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"].startswith("conv2former_")
    assert config["label_names"] == ["cat", "dog"]
    assert config["conv2former"]["variant"]["train_drop_path_rate"] == 0.3
    assert conv2former.inspect_checkpoint(tmp_path / "out").name == "my_net"


def test_half_the_size(tmp_path):
    """The file has the weights rounded to float16; what is built from it computes in float32."""
    model = network()
    torch.save({"model": model.state_dict(), "variant": {"name": "x", **SHAPE}}, tmp_path / "x.pt")
    whole, half = (convert(tmp_path / "x.pt", half=rounds) for rounds in (False, True))
    assert half.section["bytes"] == len(half.weights) < 0.55 * len(whole.weights)
    write_folder(half, tmp_path / "half")
    again = conv2former.load_model(tmp_path / "half")[0]
    assert {value.dtype for value in again.parameters()} == {torch.float32}
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value.half().to(value.dtype)), key
    model.head.fc.bias.data[0] = 1e6
    torch.save({"model": model.state_dict()}, tmp_path / "x.pt")
    convert(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"head.fc.bias has values beyond float16's range; leave --half out"):
        convert(tmp_path / "x.pt", half=True)


def test_averaged_or_raw(tmp_path):
    raw, averaged = network(0), network(1)
    path = tmp_path / "x.pt"
    torch.save({"model": raw.state_dict(), "model_ema": averaged.state_dict()}, path)
    for use_ema, expected, word in ((None, averaged, "averaged"), (True, averaged, "averaged"), (False, raw, "raw")):
        export = convert(path, use_ema=use_ema)
        assert same(export.model, expected)
        assert export.section["source"]["weights"] == word
    torch.save(raw.state_dict(), path)
    with pytest.raises(CheckpointError, match="has no averaged weights; leave --ema out"):
        convert(path, use_ema=True)


def test_imagenets_classes(tmp_path):
    path = authors_file(tmp_path / "a.pth", network(num_classes=1000))
    write_folder(convert(path), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"][0] == "n01440764"
    assert config["label_descriptions"]["n01440764"] == "tench, Tinca tinca"
    assert config["conv2former"]["class_names"] == "assumed"
    model = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    assert len(model.pretrained_cfg["label_names"]) == len(model.pretrained_cfg["label_descriptions"]) == 1000
    export = convert(path, class_names=[f"class {i}" for i in range(1000)])
    assert "label_descriptions" not in export.config
    assert export.section["class_names"] == "given"
    with pytest.raises(DataError, match="3 class names for 1,000 classes"):
        convert(path, class_names=["a", "b", "c"])


def test_preprocessing(zoo, tmp_path):  # noqa: F811
    path = authors_file(tmp_path / "a.pth", network(), crop_pct=0.95)
    noted = convert(path)
    assert (noted.preprocessing.crop_pct, noted.preprocessing.img_size) == (0.95, 64)
    assert noted.section["assumed"] == ["img_size", "mean", "std", "interpolation", "crop_mode"]
    half = convert(path, preprocessing="inception")
    assert (half.preprocessing.mean, half.preprocessing.crop_pct, half.section["assumed"]) == (HALF, 0.9, [])
    given = convert(path, overrides=["data.mean=[0.1,0.2,0.3]", "data.img_size=96"])
    assert (given.preprocessing.mean, given.preprocessing.img_size) == ((0.1, 0.2, 0.3), 96)
    assert given.section["assumed"] == ["std", "interpolation", "crop_mode"]
    for words, expected in (
        ["data.root=x"], "data.root: has no effect here"), (["train.seed=1"], "train: has no effect"), (
        ["data.mean=[1,2]"], "data.mean"), (["data.img_size=7"], "data.img_size: input should be greater"), (
        ["data=3"], "has no effect here"
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=expected):
            convert(path, overrides=words)


def test_grey_images(tmp_path):
    model = network(in_chans=1)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    write_folder(convert(tmp_path / "x.pt"), tmp_path / "out")
    write_folder(convert(tmp_path / "out"), tmp_path / "again")
    for folder in ("out", "again"):
        again = timm.create_model(f"local-dir:{tmp_path}/{folder}", pretrained=True)
        assert same(again, model, 1)
        config = timm.data.resolve_model_data_config(again)
        assert (config["input_size"], len(config["mean"])) == ((1, 224, 224), 1)


def test_an_output_that_is_there(tmp_path, official_file):
    export = convert(official_file)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for name, force, expected in (
        ("mine", False, "holds something already"), ("mine", True, r"holds other files \(thesis\.txt\)"),
        ("file", True, "is a file"), ("new.safetensors", False, "expected a folder"),
    ):  # fmt: skip
        with pytest.raises(OutputError, match=expected):
            write_folder(export, tmp_path / name, force)
    write_folder(export, tmp_path / "out")
    with pytest.raises(OutputError, match="--force to replace it"):
        write_folder(export, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"old")
    write_folder(export, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == len(export.weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "out"]


def test_what_does_not_load_again_is_not_written(tmp_path, official_file, monkeypatch):
    """The folder is loaded by timm before it appears."""
    export = convert(official_file)
    monkeypatch.setitem(export.model_args, "fusion", "sum")
    with pytest.raises(CheckpointError, match="does not load as the network that was read"):
        write_folder(export, tmp_path / "out")
    broken = network()
    broken.head.fc.bias.data[0] = float("nan")
    torch.save(broken.state_dict(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not all numbers"):
        write_folder(convert(tmp_path / "x.pt"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


# --------------------------------------------------------------------------------------------------------------- names


def test_the_name_is_worked_out(zoo, tmp_path):  # noqa: F811
    """Of the authors' files, where one alone fits: by kernel, and by image size if that is noted."""
    eleven = authors_file(tmp_path / "a.pth", network())
    seven = authors_file(tmp_path / "b.pth", network(kernel_size=7))
    assert convert(eleven).name == "pub_a.one"
    assert convert(seven).name == "pub_b.two"  # rather than pub_a.two, the same file
    assert convert(seven, "pub_a").name == "pub_a.two"
    assert convert(authors_file(tmp_path / "c.pth", network(), img_size=96)).name == "pub_a"
    assert convert(authors_file(tmp_path / "d.pth", network(num_classes=3))).name == "pub_a"
    torch.save(network().state_dict(), tmp_path / "e.pt")
    assert convert(tmp_path / "e.pt").name == "pub_a"  # it may be anybody's
    assert "the only published file of this shape" in summary(convert(eleven))


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("pub_a.two words", ConfigError, r"expected VARIANT\.TAG"),
        ("pub_a.", ConfigError, r"expected VARIANT\.TAG"),
        ("../x.y", ConfigError, r"expected VARIANT\.TAG"),
        ("Pub.one", ConfigError, r"expected VARIANT\.TAG"),
        ("pub_a.hvision_in1k", ConfigError, "the authors published no pub_a.hvision_in1k"),
        ("conv2former_t.mine", CheckpointError, r"is not conv2former_t but pub_a: dims \[8, 16, 24, 48\] for \[72"),
        ("resnet18.mine", ConfigError, "timm has a model 'resnet18'"),
    ],
)
def test_names_that_cannot_be(zoo, tmp_path, name, error, expected):  # noqa: F811
    path = authors_file(tmp_path / "a.pth", network())
    with pytest.raises(error, match=expected):
        convert(path, name)


def test_names_that_the_file_contradicts(zoo, tmp_path):  # noqa: F811
    with pytest.raises(CheckpointError, match=r"has 3 classes and takes 3 channels, pub_a\.one has 5"):
        convert(authors_file(tmp_path / "a.pth", network(num_classes=3)), "pub_a.one")
    noted = authors_file(tmp_path / "b.pth", network(), img_size=96)
    with pytest.raises(CheckpointError, match="notes images of 96 pixels, and this tag is for 64"):
        convert(noted, "pub_a.one")
    assert convert(noted, "pub_a.one", overrides=["data.img_size=64"]).preprocessing.img_size == 64
    other = authors_file(tmp_path / "c.pth", network(depths=[2, 1, 1, 1]))
    with pytest.raises(CheckpointError, match=r"is not pub_a but a network of its own: depths \[2, 1, 1, 1\] for"):
        convert(other, "pub_a.mine")
    full = {key: torch.empty(shape, device="meta") for key, shape in LAYOUTS["conv2former_n"]["state_dict"].items()}
    small = {key: torch.zeros(tensor.shape) for key, tensor in full.items()}
    torch.save({"state_dict": small}, tmp_path / "n.pth")
    with pytest.raises(ConfigError, match=r"no variant 'conv2former_m'.*name it conv2former_n\.TAG"):
        convert(tmp_path / "n.pth", "conv2former_m.x")


@pytest.mark.parametrize(
    ("changes", "layout", "expected"),
    [
        ({"kernel_size": 5}, "authors", r"no published file is known .*kernel size 5.*: --install pub_a\.one or .*two"),
        ({"num_classes": 3}, "authors", r"no published file has this network; .*--install pub_a\.TAG"),
        ({"dims": [4, 6, 8, 12]}, "authors", r"no published file has this network; .*--install VARIANT\.TAG"),
        (
            {},
            "conv2former",
            r"need a name: --install pub_a\.TAG, with a tag of your own; or, .*: pub_a\.one, pub_a\.two",
        ),
    ],
)
def test_a_name_is_asked_for(zoo, tmp_path, changes, layout, expected):  # noqa: F811
    model = network(**changes)
    if layout == "authors":
        authors_file(tmp_path / "a.pth", model)
    else:
        torch.save({"model": model.state_dict(), "config": {"data": {}}}, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=expected):
        install(convert(tmp_path / "a.pth"))
    assert not zoo.exists()


# --------------------------------------------------------------------------------------------------------------- store


def test_install(zoo, tmp_path):  # noqa: F811
    expected = network()
    path = authors_file(tmp_path / "a.pth.tar", expected)
    assert install(convert(path)) == (zoo / "pub_a.one", True)
    assert same(timm.create_model("pub_a", pretrained=True), expected)
    assert "pub_a.one" in timm.list_pretrained()
    (found,) = conv2former.list_installed(verify=True)
    assert (found.name, found.problem, found.source, found.metric, found.epoch) == (
        "pub_a.one", "", "a.pth.tar", 79.5, 299,
    )  # fmt: skip
    assert install(convert(path)) == (zoo / "pub_a.one", False)  # nothing to do
    assert install(convert(zoo / "pub_a.one")) == (zoo / "pub_a.one", False)
    other = authors_file(tmp_path / "b.pth.tar", network(1))
    for export in (convert(other), convert(path, preprocessing="inception"), convert(path, class_names=list("abcde"))):
        with pytest.raises(
            OutputError, match=r"pub_a\.one is installed already, with other .* from a\.pth\.tar; --force"
        ):
            install(export)
    assert same(timm.create_model("pub_a", pretrained=True), expected)
    assert install(convert(other), force=True)[1]
    assert same(timm.create_model("pub_a", pretrained=True), network(1))
    assert [path.name for path in zoo.iterdir()] == ["pub_a.one"]
    assert uninstall("pub_a") == zoo / "pub_a.one"
    assert list(zoo.iterdir()) == []
    assert "pub_a.one" not in timm.list_pretrained()
    with pytest.raises(CheckpointError, match="are not installed"):
        timm.create_model("pub_a", pretrained=True)


def test_one_file_under_two_names(zoo, tmp_path):  # noqa: F811
    path = authors_file(tmp_path / "a.pth", network(kernel_size=7))
    assert install(convert(path, "pub_a.two")) == (zoo / "pub_a.two", True)
    assert install(convert(path, "pub_b.two")) == (zoo / "pub_a.two", False)
    other = convert(authors_file(tmp_path / "b.pth", network(1, kernel_size=7)), "pub_b.two")
    with pytest.raises(OutputError, match=r"pub_a\.two is installed already"):
        install(other)
    install(other, force=True)
    assert [path.name for path in zoo.iterdir()] == ["pub_b.two"]
    assert uninstall("pub_a.two") == zoo / "pub_b.two"


def test_a_kernel_that_nobody_knew(zoo, tmp_path):  # noqa: F811
    expected = network(kernel_size=5)
    export = convert(authors_file(tmp_path / "a.pth", expected), "pub_a.one")
    assert "note: its kernel size is 5, not 11 as of pub_a here" in summary(export)
    install(export)
    assert same(timm.create_model("pub_a.one", pretrained=True), expected)


def test_a_name_of_ones_own(store, tmp_path):
    expected = network(dims=[8, 16, 24, 56])
    torch.save({"model": expected.state_dict(), "class_names": list("abcde")}, tmp_path / "x.pt")
    install(convert(tmp_path / "x.pt", "own_net.v-2"))
    assert same(timm.create_model("own_net", pretrained=True), expected)
    assert timm.create_model("own_net.v-2", pretrained=True).pretrained_cfg["label_names"] == list("abcde")
    with pytest.raises(CheckpointError, match=r"own_net.v-3 is not installed \(did you mean 'own_net.v-2'\?\)"):
        uninstall("own_net.v-3")


def test_damage_is_repaired_or_removed(zoo, tmp_path):  # noqa: F811
    path = authors_file(tmp_path / "a.pth", network())
    install(convert(path))
    (zoo / "pub_a.one" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="is damaged"):
        timm.create_model("pub_a", pretrained=True)
    with pytest.raises(OutputError, match=r"pub_a\.one is installed already, damaged"):
        install(convert(path))
    install(convert(path), force=True)
    assert same(timm.create_model("pub_a", pretrained=True), network())
    (zoo / "pub_a.one" / "config.json").unlink()
    uninstall("pub_a.one")
    assert list(zoo.iterdir()) == []


def test_installed_at_the_same_time(zoo, tmp_path):  # noqa: F811
    """Whoever is first wins; all end well, and what is there is whole."""
    exports = [convert(authors_file(tmp_path / f"{i}.pth", network()), "pub_a.one") for i in range(4)]
    results: list = []

    def run(export) -> None:
        try:
            results.append(install(export))
        except BaseException as e:
            results.append(e)

    threads = [threading.Thread(target=run, args=(export,)) for export in exports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [folder for folder, _ in results] == [zoo / "pub_a.one"] * 4, results
    assert sum(is_new for _, is_new in results) == 1
    assert [found.problem for found in conv2former.list_installed(verify=True)] == [""]
    assert [path.name for path in zoo.iterdir()] == ["pub_a.one"]


def test_a_store_that_cannot_be_written(zoo, tmp_path):  # noqa: F811
    export = convert(authors_file(tmp_path / "a.pth", network()))
    zoo.write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        install(export)


# ----------------------------------------------------------------------------------------------------------------- hub


class _Hub:
    """Stands in for the hub's client, and keeps what it is sent."""

    sent: dict = {}

    def __init__(self, token=None, **kwargs) -> None:
        pass

    def create_repo(self, repo_id, private=False, exist_ok=False):
        type(self).sent = {"repo_id": repo_id, "private": private}
        return argparse.Namespace(repo_id=repo_id)

    def file_exists(self, **kwargs) -> bool:
        return False

    def upload_folder(self, repo_id, folder_path, **kwargs) -> str:
        shutil.copytree(folder_path, self.sent["copy"])
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(_hub, "HfApi", _Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    create = _Hub.create_repo

    def create_repo(self, *args, **kwargs):
        made = create(self, *args, **kwargs)
        type(self).sent["copy"] = tmp_path / "sent"
        return made

    monkeypatch.setattr(_Hub, "create_repo", create_repo)
    return tmp_path / "sent"


def test_what_is_sent(zoo, tmp_path, hub):  # noqa: F811
    """By timm's own function: weights, configuration and card, as the folder on the disk, without local paths."""
    path = authors_file(tmp_path / "a.pth", network())
    export = convert(path)
    assert push(export, "me/pub", private=True) == "https://hub/me/pub/commit/1"
    assert (_Hub.sent["repo_id"], _Hub.sent["private"]) == ("me/pub", True)
    assert sorted(path.name for path in hub.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert file_sha256(hub / "model.safetensors") == export.section["sha256"]
    assert same(timm.create_model(f"local-dir:{hub}", pretrained=True), network())
    card = (hub / "README.md").read_text()
    for text in (
        "hf-hub:me/pub",
        export.section["sha256"],
        "lr: 0.001",
        "data_dir: imagenet",
        "https://example.org/one",
    ):
        assert text in card
    for name in ("README.md", "config.json"):
        assert "secret" not in (hub / name).read_text()
    write_folder(export, tmp_path / "local")
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "local", hub))
    assert ours["conv2former"].pop("recipe") != theirs["conv2former"].pop("recipe")
    assert ours == theirs


def test_the_hub_is_out_of_reach(tmp_path, official_file, hub, monkeypatch):
    export = convert(official_file)

    def refuse(*args, **kwargs):
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(_Hub, "create_repo", refuse)
    with pytest.raises(OutputError, match=r"^me/x: the hub did not take it \(Name or service not known\); no file"):
        push(export, "me/x")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token for the Hugging Face hub"):
        push(export, "me/x")
    for name in ("x", "a/b/c", "me/../x", "me/x y", ""):
        with pytest.raises(ConfigError, match="expected the name of a repository on the hub, USER/NAME"):
            check_hub(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        check_hub("me/x")


# -------------------------------------------------------------------------------------------------------------- script


def script(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "convert.py"), run_name="__main__")
        sys.exit(0)
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def test_the_command(zoo, tmp_path, monkeypatch, capsys):  # noqa: F811
    path = authors_file(tmp_path / "a.pth.tar", network())
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    code, out, _ = script(
        monkeypatch, capsys, path, "--install", "pub_a.one", "--output", tmp_path / "out", "--class-names",
        tmp_path / "names.txt", "data.crop_pct=0.5",
    )  # fmt: skip
    assert code == 0
    assert f"local-dir:{tmp_path}/out" in out
    assert 'timm.create_model("pub_a.one", pretrained=True)' in out
    model = timm.create_model("pub_a", pretrained=True)
    assert (model.pretrained_cfg["crop_pct"], model.pretrained_cfg["label_names"]) == (0.5, list("abcde"))
    assert script(monkeypatch, capsys, "--uninstall", "pub_a.one")[1] == f"removed {zoo}/pub_a.one\n"
    code, out, _ = script(monkeypatch, capsys, "--install", path)  # the file after --install
    assert code == 0
    assert "installed in" in out


MISTAKES = [
    ([], "give a weight file, and --output FOLDER"),
    (["FILE"], "give a weight file, and --output FOLDER"),
    (["FILE", "--install", "pub_a.one", "--name", "pub_a.two"], "give the name once"),
    (["FILE", "--output", "out", "--private"], "--private: only with"),
    (["none.pth", "--output", "out"], "none.pth: no such file"),
    (["TEXT", "--output", "out"], "is not a checkpoint"),
    (["HALF", "--output", "out"], "truncated or not a checkpoint"),
    (["FILE", "--output", "out", "--install", "conv2former_t.x"], "is not conv2former_t"),
    (["SMALL", "--output", "out", "--install"], "needs a name"),
    (["FILE", "--output", "out", "--push-to-hub", "me"], "expected the name of a repository"),
    (["FILE", "--output", "out", "--push-to-hub", "me/x"], "HF_HUB_OFFLINE is set"),
    (["FILE", "--output", "/dev/null/x"], "cannot be written"),
    (["FILE", "--output", "out", "--class-names", "none.txt"], "none.txt"),
    (["FILE", "--output", "out", "surplus"], "'surplus': expected key=value"),
    (["--uninstall", "pub_a.one"], "pub_a.one is not installed; installed: nothing"),
]


def test_a_missing_name_is_said_before_the_work(zoo, tmp_path, monkeypatch, capsys):  # noqa: F811
    """No network is built and no checksum computed for it."""
    monkeypatch.setattr(tool, "restore", None)
    monkeypatch.setattr(tool, "file_sha256", None)
    path = authors_file(tmp_path / "a.pth.tar", network(kernel_size=5))
    code, out, err = script(monkeypatch, capsys, path, "--install")
    assert (code, out) == (2, "")
    assert "say which it is: --install pub_a.one or --install pub_a.two" in err


@pytest.mark.parametrize("lacks", [("pred.",), ("pred.", "head.")])
def test_weights_without_a_classifier_are_refused(tmp_path, official_content, lacks):
    """By whatever answers with classes; each says what is missing."""
    state = {key: t for key, t in official_content["state_dict"].items() if not key.startswith(lacks)}
    torch.save(state, tmp_path / "x.pt")
    for use in (convert, Predictor, lambda path: validate(path, data=tmp_path)):
        with pytest.raises(CheckpointError, match=r"x\.pt has no classifier"):
            use(tmp_path / "x.pt")


@pytest.mark.parametrize(("words", "expected"), MISTAKES)
def test_mistakes_end_with_one_message(zoo, tmp_path, monkeypatch, capsys, words, expected):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    authors_file(tmp_path / "FILE", network())
    authors_file(tmp_path / "SMALL", network(dims=[4, 6, 8, 10]))
    (tmp_path / "TEXT").write_text("no checkpoint at all")
    (tmp_path / "HALF").write_bytes((tmp_path / "FILE").read_bytes()[:20_000])
    code, _, err = script(monkeypatch, capsys, *words)
    assert code == 2
    assert err.startswith("error: ")
    assert expected in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "HALF", "SMALL", "TEXT"]


def test_a_full_size_file_in_another_process(store, tmp_path):
    """The issue's two lines: the file is installed once, and `pretrained=True` finds it in any later process."""
    generator = torch.Generator().manual_seed(0)
    state_dict = {
        key: torch.tensor(7) if key.endswith("tracked") else torch.rand(shape, generator=generator) * 0.1 + 0.01
        for key, shape in LAYOUTS["conv2former_n"]["state_dict"].items()
    }
    torch.save({"state_dict": state_dict, "epoch": 299, "metric": 81.5}, tmp_path / "n.pth.tar")
    install(convert(tmp_path / "n.pth.tar"))
    code = (
        "import conv2former, timm, torch\n"
        "model = timm.create_model('conv2former_n', pretrained=True).eval()\n"
        f"other = conv2former.load_model({str(tmp_path / 'n.pth.tar')!r})[0]\n"
        "images = torch.rand(1, 3, 64, 64)\n"
        "print(torch.equal(model(images), other(images)), conv2former.list_installed()[0].name)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "True conv2former_n.hvision_in1k", out.stderr


def test_the_list_of_what_is_installed(zoo, tmp_path):  # noqa: F811
    assert installed_table() == "nothing is installed"
    install(convert(authors_file(tmp_path / "a.pth.tar", network())))
    install(convert(authors_file(tmp_path / "b.pth.tar", network(1)), "pub_a.mine"))
    (zoo / "pub_a.mine" / "config.json").write_text("{}")
    header, mine, one, problem, note = installed_table(verify=True).splitlines()
    assert header.split() == ["name", "classes", "metric", "source", "sha256", "state", "weights", "accuracy"]
    assert mine.split()[0:6:5] == ["pub_a.mine", "damaged"]
    assert one.split()[:4] == ["pub_a.one", "5", "79.5", "a.pth.tar"]
    assert one.split()[5:] == ["verified", "not", "noted", "unverified"]
    assert note.startswith("unverified: taken for the published file by its shape alone")
    assert problem.startswith("pub_a.mine: config.json: ")
