"""The store: what `pretrained=True` finds, what it says where there is nothing, and what damage does not break."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models._hub import save_for_hf

import conv2former
from conv2former import CheckpointError, Conv2Former
from conv2former._store import store_folder
from conv2former.models.restore import load_model
from conv2former.models.zoo import add_and_register, make_cfg, register_installed
from conv2former.tools.checkpoints import table
from conv2former.tools.checkpoints.publish import uninstall
from conv2former.variants import add_variant, names_of_same_file, parse_variant
from conv2former.weights import installed
from conv2former.weights.installed import file_sha256, find_installed

from ..conftest import ROOT

pytestmark = pytest.mark.slow

SHAPE = {"dims": [8, 16, 24, 48], "depths": [1, 1, 1, 1], "kernel_size": 11}
CLASSES = 5
PAGE = "https://example.org/two"


@pytest.fixture
def zoo(store):
    """Two variants that differ in the kernel, with published files; the second of `pub_a` is that of `pub_b`."""
    one = {"top1": 80.0, "num_classes": CLASSES, "page": "https://example.org/one", "input_size": [3, 64, 64]}
    two = {**one, "top1": 81.0, "page": PAGE}
    a = parse_variant({"name": "pub_a", **SHAPE, "pretrained": {"one": one, "two": {**two, "kernel_size": 7}}}, "test")
    b = parse_variant({"name": "pub_b", **SHAPE, "kernel_size": 7, "pretrained": {"two": two}}, "test")
    for new in (a, b):
        add_variant(new)
    for name in ("pub_a", "pub_b"):
        register_installed(name)
    return store


def put(store: Path, name: str, architecture: str = "pub_a", seed: int = 0, **changes) -> Conv2Former:
    """Writes a folder into the store as timm does."""
    torch.manual_seed(seed)
    args = {**SHAPE, "num_classes": CLASSES, **changes}
    model = Conv2Former(**args).eval()
    size = (3, 64, 64)
    model.pretrained_cfg = {
        **make_cfg(None), "architecture": architecture, "num_classes": args["num_classes"], "input_size": size,
        "mean": (0.5, 0.5, 0.5), "crop_pct": 0.9,
    }  # fmt: skip
    save_for_hf(model, str(store / name), model_args=args, safe_serialization=True)
    return model


def edit(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def assert_same(model, expected) -> None:
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model.eval()(images), expected(images))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CONV2FORMER_HOME": "/a/b"}, "/a/b"),
        ({"CONV2FORMER_HOME": "", "XDG_CACHE_HOME": "/c"}, "/c/conv2former"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/conv2former"),
        ({"CONV2FORMER_HOME": "~/w", "HOME": "/h"}, "/h/w"),
    ],
)
def test_where_the_store_is(monkeypatch, environment, expected):
    for key in ("CONV2FORMER_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert str(store_folder()) == expected


def test_the_tests_do_not_see_what_a_developer_has_installed():
    assert "conv2former-tests" in str(store_folder())
    assert conv2former.list_installed() == []


def test_what_the_package_brings(zoo, tmp_path, monkeypatch):
    """It is found as what is installed is, which goes before it and alone can be removed; each has its own list."""
    monkeypatch.setattr(installed, "shipped_folder", lambda: tmp_path / "shipped")
    expected = put(tmp_path / "shipped", "pub_a.one")
    put(tmp_path / "shipped", "own_net.tag", "own_net")
    for name in ("pub_a", "own_net"):
        register_installed(name)
    assert_same(timm.create_model("pub_a", pretrained=True), expected)
    assert_same(load_model("pub_a.one")[0], expected)
    assert timm.create_model("own_net", pretrained=True).num_classes == CLASSES
    assert conv2former.list_installed() == []
    names = ["own_net.tag", "pub_a.one"]
    assert [found.name for found in installed.list_shipped(verify=True)] == names
    assert [line.split()[0] for line in table.installed_table(shipped=True).splitlines()[1:3]] == names
    monkeypatch.setattr(table, "measure", lambda name, size: (0, 0.0))
    assert "`own_net`" not in table.variants_table()
    assert "`pub_b`" in table.variants_table()
    with pytest.raises(CheckpointError, match=r"no such file.*did you mean 'own_net\.tag'"):
        load_model("own_net.tax")
    with pytest.raises(CheckpointError, match="is not installed; installed: nothing"):
        uninstall("pub_a.one")
    other = put(zoo, "pub_a.one", seed=1)
    assert_same(timm.create_model("pub_a", pretrained=True), other)
    uninstall("pub_a")
    assert_same(timm.create_model("pub_a", pretrained=True), expected)
    (tmp_path / "shipped" / "pub_a.one" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is damaged \(config.json: .*\): install conv2former again"):
        timm.create_model("pub_a", pretrained=True)


def test_by_tag_and_without(zoo):
    expected = put(zoo, "pub_a.one")
    for name in ("pub_a.one", "pub_a"):
        model = timm.create_model(name, pretrained=True)
        assert_same(model, expected)
        assert (model.pretrained_cfg["tag"], model.pretrained_cfg["architecture"]) == ("one", "pub_a")
        config = timm.data.resolve_model_data_config(model)
        assert (config["input_size"], config["mean"], config["crop_pct"]) == ((3, 64, 64), (0.5, 0.5, 0.5), 0.9)


def test_adapted_to_other_classes_channels_and_features(zoo, caplog):
    expected = put(zoo, "pub_a.one")
    features = timm.create_model("pub_a", pretrained=True, features_only=True)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(features.eval()(images)[-1], expected.forward_features(images))
    assert timm.create_model("pub_a", pretrained=True, num_classes=7).num_classes == 7
    assert "classifier for 5 classes" in caplog.text
    grey = timm.create_model("pub_a", pretrained=True, in_chans=1)
    assert torch.allclose(grey.stem.conv1.weight, expected.stem.conv1.weight.sum(1, keepdim=True))


def test_the_first_published_file_goes_before_others(zoo):
    """Without a tag: timm's default if it is there, else the only one, else a question."""
    mine = put(zoo, "pub_a.mine", seed=1)
    assert_same(timm.create_model("pub_a", pretrained=True), mine)
    two = put(zoo, "pub_a.two", seed=2, kernel_size=7)
    with pytest.raises(CheckpointError, match=r"several weights of pub_a are installed.*: pub_a\.two, pub_a\.mine"):
        timm.create_model("pub_a", pretrained=True)
    assert_same(timm.create_model("pub_a.two", pretrained=True), two)
    one = put(zoo, "pub_a.one", seed=3)
    assert_same(timm.create_model("pub_a", pretrained=True), one)


def test_one_file_under_two_names(zoo):
    assert names_of_same_file("pub_a.two") == ["pub_a.two", "pub_b.two"]
    assert names_of_same_file("conv2former_b.hvision_in22k_ft_in1k")[1:] == ["conv2former_b_22k.hvision_in22k_ft_in1k"]
    assert names_of_same_file("pub_a.mine") == ["pub_a.mine"]
    expected = put(zoo, "pub_b.two", kernel_size=7)
    for name in ("pub_a.two", "pub_b.two", "pub_b", "pub_a"):
        model = timm.create_model(name, pretrained=True)
        assert_same(model, expected)
        assert model.pretrained_cfg["architecture"] == name.partition(".")[0]
    assert [found.name for found in conv2former.list_installed()] == ["pub_b.two"]


def test_a_tag_can_have_another_kernel_than_its_variant():
    def kernel(name: str) -> int:
        return timm.create_model(name, device="meta").stages[0].blocks[0].attn.conv_dw.kernel_size[0]

    assert (kernel("conv2former_b"), kernel("conv2former_b.hvision_in1k")) == (11, 11)
    assert kernel("conv2former_b.hvision_in22k_ft_in1k") == 7


def test_the_kernel_in_the_file_is_the_right_one(zoo, tmp_path):
    """Also without its weights, and in what timm writes down about the network that it built."""
    expected = put(zoo, "pub_a.one", kernel_size=5)
    assert_same(timm.create_model("pub_a.one", pretrained=True), expected)
    assert timm.create_model("pub_a").stages[0].blocks[0].attn.conv_dw.kernel_size == (11, 11)
    empty = timm.create_model("pub_a.one")
    empty.load_state_dict(expected.state_dict())
    save_for_hf(timm.create_model("pub_a.one", pretrained=True), str(tmp_path / "again"), safe_serialization=True)
    assert_same(timm.create_model(f"local-dir:{tmp_path}/again", pretrained=True), expected)


def test_what_is_installed_changes_no_untrained_network(zoo):
    put(zoo, "pub_a.two", kernel_size=7)
    register_installed("pub_a")
    model = timm.create_model("pub_a")
    assert model.pretrained_cfg["tag"] == "one"
    assert "file" not in model.pretrained_cfg
    assert timm.list_pretrained("pub_a*") == ["pub_a.two"]
    assert timm.get_pretrained_cfg("pub_a.two").mean == (0.5, 0.5, 0.5)


def test_a_file_that_is_given_goes_before_what_is_installed(zoo, tmp_path):
    put(zoo, "pub_a.one", seed=0)
    other = put(tmp_path, "other", seed=9)
    overlay = {"file": str(tmp_path / "other" / "model.safetensors")}
    for name in ("pub_a", "pub_a.one"):
        assert_same(timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay), other)
    assert_same(timm.create_model(f"local-dir:{tmp_path}/other", pretrained=True), other)


def test_the_name_is_a_checkpoint(zoo):
    expected = put(zoo, "pub_a.one")
    model, info = load_model("pub_a.one")
    assert_same(model, expected)
    assert info.preprocessing.mean == (0.5, 0.5, 0.5)
    assert conv2former.inspect_checkpoint("pub_a").num_classes == CLASSES


# ------------------------------------------------------------------------------------------- nothing, or something else


@pytest.mark.parametrize("kwargs", [{}, {"features_only": True}, {"num_classes": 3}])
def test_nothing_installed(zoo, kwargs):
    with pytest.raises(CheckpointError) as error:
        timm.create_model("pub_a.two", pretrained=True, **kwargs)
    for text in ("pub_a.two", PAGE, "python scripts/convert.py FILE --install pub_a.two", "pretrained_cfg_overlay"):
        assert text in str(error.value)
    with pytest.raises(CheckpointError, match=r"the weights pub_a\.one are not installed"):
        timm.create_model("pub_a", pretrained=True, **kwargs)


def test_no_such_tag(zoo):
    put(zoo, "pub_a.mine")
    for pretrained in (True, False):
        with pytest.raises(CheckpointError, match=r"no weights 'nope'; published: one, two; installed: pub_a\.mine"):
            timm.create_model("pub_a.nope", pretrained=pretrained)


def test_uninstalled_since(zoo):
    """The path is still in timm's registry; the weights are not there."""
    put(zoo, "pub_a.one")
    register_installed("pub_a")
    (zoo / "pub_a.one").rename(zoo / "gone")
    with pytest.raises(CheckpointError, match="are not installed"):
        timm.create_model("pub_a", pretrained=True)


def note(folder, **keys) -> None:
    """Changes keys of a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: No such file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors: No such file"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: not readable as JSON"),
    "bytes": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), r"config\.json: "),
    "a size in words": (lambda folder: note(folder, conv2former={"bytes": "x"}), "bytes: expected a whole number"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "holds a list, not a timm model"),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 100_000), r"config\.json: "),
    "no size": (lambda folder: edit(folder, lambda c: c["pretrained_cfg"].update(input_size=3)), "input_size"),
    "classes": (lambda folder: edit(folder, lambda c: c.update(num_classes="5")), "num_classes"),
    "section": (lambda folder: edit(folder, lambda c: c.update(conv2former=[1])), r"conv2former is \[1\]; expected"),
    "shape": (lambda folder: edit(folder, lambda c: c["model_args"].update(dims=[1, 2])), "dims: expected"),
    "another": (lambda folder: edit(folder, lambda c: c["model_args"].update(depths=[2] * 4)), "than pub_a: depths"),
    "cut off": (
        lambda folder: edit(folder, lambda c: c.update(conv2former={"bytes": 10**9})), r"bytes instead of 1,000,000,000"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(zoo, damage):
    put(zoo, "pub_a.one")
    change, expected = DAMAGE[damage]
    change(zoo / "pub_a.one")
    (found,) = conv2former.list_installed()
    assert found.name == "pub_a.one"
    assert re.search(expected, found.problem)
    register_installed("pub_a")  # as an import does: nothing happens
    assert timm.create_model("pub_a.one").num_classes == CLASSES  # it needs no weights
    with pytest.raises(CheckpointError, match=r"pub_a\.one is damaged \(.*--install pub_a\.one --force"):
        timm.create_model("pub_a", pretrained=True)


def test_changed_bytes_are_found_by_the_checksum(zoo):
    put(zoo, "pub_a.one")
    path = zoo / "pub_a.one" / "model.safetensors"
    edit(zoo / "pub_a.one", lambda c: c.update(conv2former={"sha256": file_sha256(path)}))
    assert not conv2former.list_installed(verify=True)[0].problem
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert not conv2former.list_installed()[0].problem
    assert "does not match its checksum" in conv2former.list_installed(verify=True)[0].problem


def test_other_things_in_the_store(zoo):
    zoo.mkdir()
    (zoo / ".pub_a.one-abc").mkdir()
    (zoo / "notes.TXT.bak").touch()
    (zoo / "Pub.one").mkdir()
    assert conv2former.list_installed() == []
    (zoo / "pub_a.one").write_text("a file")
    assert "Not a directory" in conv2former.list_installed()[0].problem


def test_a_store_that_cannot_be_listed(zoo, monkeypatch):
    zoo.write_text("a file")
    assert conv2former.list_installed() == []
    assert find_installed("pub_a") is None


# ------------------------------------------------------------------------------------------------------ other processes

CHILD = """
import sys, timm, torch, conv2former
print(timm.list_pretrained("own_net*"), "resnet18" in timm.list_models("resnet18"), conv2former.variant("own_net").dims)
model = timm.create_model("own_net", pretrained=True).eval()
torch.save(model(torch.ones(1, 3, 64, 64)), sys.argv[1])
print([(found.name, bool(found.problem)) for found in conv2former.list_installed()])
"""


def test_a_network_of_ones_own_in_another_process(store, tmp_path):
    """It is known there although nobody registers it; what is broken, or has the name of another network, is not."""
    expected = put(store, "own_net.mine", dims=[8, 16, 24, 56])
    put(store, "resnet18.mine")
    put(store, "conv2former_t.broken")
    (store / "broken.net").mkdir()
    put(store, "zzz.deep")
    (store / "zzz.deep" / "config.json").write_text("[" * 100_000)
    ignored = "ignore:Implicitly cleaning up:ResourceWarning"  # a folder of torch 2.6's own
    command = [sys.executable, "-W", "error", "-W", ignored, "-c", CHILD, tmp_path / "logits.pt"]
    env = {**os.environ, "CONV2FORMER_COMPILE": "0"}  # the store is empty, and compiling would be announced
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    names, listed = out.stdout.splitlines()
    assert names == "['own_net.mine'] True (8, 16, 24, 56)"
    assert listed == str(
        [("broken.net", True), ("conv2former_t.broken", True), ("own_net.mine", False), ("resnet18.mine", False),
         ("zzz.deep", True)]
    )  # fmt: skip
    with torch.inference_mode():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected(torch.ones(1, 3, 64, 64)))


def test_the_users_own_definition_outweighs_the_stored_one(store):
    put(store, "own_net.mine", dims=[8, 16, 24, 56])
    register_installed("own_net")
    assert conv2former.variant("own_net").dims == (8, 16, 24, 56)
    other = parse_variant({"name": "own_net", **SHAPE}, "test")
    assert add_and_register(other, "test") == "own_net"
    assert timm.create_model("own_net").num_features == 48
    with pytest.raises(CheckpointError, match=r"it is another network than own_net: dims"):
        timm.create_model("own_net", pretrained=True)


def test_tensors_survive(zoo):
    """Bit for bit, through timm's own writing and reading."""
    expected = put(zoo, "pub_a.one").state_dict()
    stored = safetensors.torch.load_file(zoo / "pub_a.one" / "model.safetensors")
    model = timm.create_model("pub_a", pretrained=True).state_dict()
    assert stored.keys() == expected.keys() == model.keys()
    assert all(torch.equal(model[key], expected[key]) for key in expected)
