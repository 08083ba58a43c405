"""Weight files of others, through every route by which they can be loaded."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re

import pytest
import safetensors.torch
import timm
import torch

import conv2former
from conv2former import CheckpointError, Conv2Former, Conv2FormerBlock, ConvMlp, ConvMod
from conv2former.weights.contents import native_state_dict
from conv2former.weights.reading import read_checkpoint

from ..conftest import FIXTURES, Fixture

LAYOUTS = json.loads((FIXTURES / "official_state_dict_layouts.json").read_text())


def to_birder(key: str) -> str:
    """Renames one of the authors' keys to birder's."""
    key = re.sub(r"^downsample_layers\.0\.", "stem.", key)
    key = re.sub(r"^downsample_layers\.(\d)\.", lambda m: f"body.stage{int(m[1]) + 1}.downsample.", key)
    key = re.sub(r"^stages\.(\d)\.(\d+)\.", lambda m: f"body.stage{int(m[1]) + 1}.blocks.{m[2]}.", key)
    key = key.replace(".attn.att.", ".attn.attn.")
    key = re.sub(r"^head\.", "features.", key)
    return re.sub(r"^pred\.", "classifier.", key)


def birder_state_dict(authors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns birder's layout: other names, layer scale as (1, C, 1, 1), and the eps of its channels-first norms."""
    out = {}
    for key, tensor in authors.items():
        name = to_birder(key)
        out[name] = tensor.reshape(1, -1, 1, 1) if "layer_scale" in key else tensor
        if re.search(r"(norm|downsample\.0|features\.2)\.weight$", name):
            out[name.replace(".weight", ".eps")] = torch.tensor(1e-6)
    return out


@pytest.fixture
def expected() -> Fixture:
    return Fixture("official_format_expected")


def assert_is_official(model, expected: Fixture) -> None:
    with torch.inference_mode():
        logits = model.eval()(expected["input"])
    assert torch.allclose(logits, expected["logits"], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ routes


def test_checkpoint_path(tiny, official_file, expected):
    assert_is_official(timm.create_model(tiny, num_classes=10, checkpoint_path=official_file), expected)


def test_pretrained_overlay(tiny, official_file, expected):
    overlay = {"file": str(official_file)}
    assert_is_official(
        timm.create_model(tiny, num_classes=10, pretrained=True, pretrained_cfg_overlay=overlay), expected
    )
    assert_is_official(
        timm.create_model(tiny, pretrained=True, pretrained_cfg_overlay={**overlay, "num_classes": 10}), expected
    )


def test_load_weights(tiny, official_file, expected):
    model = timm.create_model(tiny, num_classes=10)
    conv2former.load_weights(model, official_file)
    assert_is_official(model, expected)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("layout", ["authors", "birder", "native"])
def test_load_state_dict(tiny, official_content, expected, prefix, layout):
    state_dict = official_content["state_dict"]
    state_dict = {"authors": dict, "birder": birder_state_dict, "native": native_state_dict}[layout](state_dict)
    model = timm.create_model(tiny, num_classes=10)
    result = model.load_state_dict({prefix + key: tensor for key, tensor in state_dict.items()})
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_is_official(model, expected)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
@pytest.mark.parametrize("birder", [False, True])
def test_every_full_size_layout(name, birder):
    state_dict = {key: torch.empty(shape, device="meta") for key, shape in LAYOUTS[name]["state_dict"].items()}
    if birder:
        state_dict = birder_state_dict(state_dict)
    model = timm.create_model(name, device="meta")
    model.load_state_dict(state_dict)
    assert sum(p.numel() for p in model.parameters()) == LAYOUTS[name]["num_parameters"]


def test_a_block_and_its_halves_alone():
    fixture = Fixture("block_k7")
    authors = fixture.below("state_dict/")
    block = Conv2FormerBlock(16, 7).double()
    block.load_state_dict(authors)
    halves = (ConvMod(16, 7).double(), "attn."), (ConvMlp(16).double(), "mlp.")
    for half, prefix in halves:
        half.load_state_dict({k.removeprefix(prefix): v for k, v in authors.items() if k.startswith(prefix)})
        for name, parameter in half.named_parameters():
            assert torch.equal(parameter, block.get_parameter(prefix + name))


def test_as_a_part_of_a_bigger_model(tiny, official_content, expected):
    class Detector(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model(tiny, num_classes=10)

    detector = Detector()
    detector.load_state_dict({f"backbone.{k}": v for k, v in official_content["state_dict"].items()})
    assert_is_official(detector.backbone, expected)


def test_save_and_load_again(tiny, tmp_path, official_file, expected):
    model = timm.create_model(tiny, num_classes=10, checkpoint_path=official_file)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        again = timm.create_model(tiny, num_classes=10)
        conv2former.load_weights(again, tmp_path / name)
        assert_is_official(again, expected)


# --------------------------------------------------------------------------------------------------- what may differ


def test_averaged_weights_are_taken(tiny, tmp_path, official_content, expected):
    noise = {key: torch.randn_like(t.float()).to(t.dtype) for key, t in official_content["state_dict"].items()}
    path = tmp_path / "ema.pth.tar"
    torch.save({"state_dict": noise, "state_dict_ema": official_content["state_dict"], "epoch": 3}, path)
    assert_is_official(timm.create_model(tiny, num_classes=10, checkpoint_path=path), expected)
    model = timm.create_model(tiny, num_classes=10)
    conv2former.load_weights(model, path)
    assert_is_official(model, expected)
    assert conv2former.inspect_checkpoint(path).has_ema
    conv2former.load_weights(model, path, use_ema=False)
    assert torch.equal(model.head.fc.weight, noise["pred.weight"])


@pytest.mark.parametrize("num_classes", [5, 1000, 0])
@pytest.mark.parametrize("route", ["checkpoint_path", "overlay", "load_weights", "load_state_dict"])
def test_another_number_of_classes(tiny, official_file, expected, caplog, route, num_classes):
    torch.manual_seed(0)
    fresh = timm.create_model(tiny, num_classes=num_classes).head.fc
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        if route == "checkpoint_path":
            model = timm.create_model(tiny, num_classes=num_classes, checkpoint_path=official_file)
        elif route == "overlay":
            model = timm.create_model(
                tiny, num_classes=num_classes, pretrained=True, pretrained_cfg_overlay={"file": str(official_file)}
            )
        else:
            model = timm.create_model(tiny, num_classes=num_classes)
            if route == "load_weights":
                conv2former.load_weights(model, official_file)
            else:
                model.load_state_dict(read_checkpoint(official_file)["state_dict"])
    said = [record.getMessage() for record in caplog.records if "conv2former" in record.name]
    assert len(said) == 1
    assert "10 classes" in said[0]
    assert str(num_classes or "left out") in said[0]
    if num_classes:
        assert torch.equal(model.head.fc.weight, fresh.weight)  # the model's own, untouched
    # all else is the file's
    reference = timm.create_model(tiny, num_classes=10, checkpoint_path=official_file).eval()
    with torch.inference_mode():
        x = expected["input"]
        ours, theirs = (m.eval().forward_head(m.forward_features(x), pre_logits=True) for m in (model, reference))
    assert torch.equal(ours, theirs)


def test_the_right_number_of_classes_says_nothing(tiny, official_file, caplog):
    with caplog.at_level(logging.WARNING):
        timm.create_model(tiny, num_classes=10, checkpoint_path=official_file)
        timm.create_model(
            tiny, features_only=True, pretrained=True, pretrained_cfg_overlay={"file": str(official_file)}
        )
    assert not caplog.records


def test_without_pooling_the_classifier_is_a_convolution(tiny, official_file, expected):
    model = timm.create_model(tiny, num_classes=10, global_pool="", checkpoint_path=official_file).eval()
    assert torch.allclose(model(expected["input"]).mean((2, 3)), expected["logits"], rtol=1e-4, atol=1e-4)


def test_other_input_channels_are_adapted_by_timm_only(tiny, official_file):
    overlay = {"file": str(official_file)}
    model = timm.create_model(tiny, num_classes=10, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    weight = read_checkpoint(official_file)["state_dict"]["downsample_layers.0.0.weight"]
    assert torch.allclose(model.stem.conv1.weight, weight.sum(1, keepdim=True))
    with pytest.raises(CheckpointError, match=r"stem\.conv1\.weight"):
        timm.create_model(tiny, num_classes=10, in_chans=1, checkpoint_path=official_file)


# ------------------------------------------------------------------------------------------------------------- errors


def test_what_differs_is_listed_and_nothing_is_loaded(tiny, official_content):
    state_dict = dict(official_content["state_dict"])
    state_dict["extra.weight"] = torch.zeros(1)
    del state_dict["head.0.bias"]
    state_dict["stages.0.0.mlp.fc1.bias"] = torch.zeros(3)
    model = timm.create_model(tiny, num_classes=10)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        model.load_state_dict(state_dict)
    for text in (
        "missing keys: head_conv.conv.bias",
        "unexpected keys: extra.weight",
        "blocks.0.mlp.fc1.bias (3,) for (32,)",
    ):
        assert text in str(error.value)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    result = model.load_state_dict(
        {k: v for k, v in state_dict.items() if k != "stages.0.0.mlp.fc1.bias"}, strict=False
    )
    assert result.unexpected_keys == ["extra.weight"]
    assert set(result.missing_keys) == {"head_conv.conv.bias", "stages.0.blocks.0.mlp.fc1.bias"}


@pytest.mark.parametrize("num_classes", [1000, 7])
@pytest.mark.parametrize("route", ["load_weights", "overlay"])
def test_b_22k_given_to_b(tmp_path, route, num_classes):
    layout = LAYOUTS["conv2former_b_22k"]["state_dict"]
    path = tmp_path / "b.pth.tar"
    torch.save({"state_dict": {key: torch.empty(shape, device="meta") for key, shape in layout.items()}}, path)
    with pytest.raises(CheckpointError) as error:
        if route == "overlay":
            timm.create_model(
                "conv2former_b", num_classes=num_classes, device="meta", pretrained=True,
                pretrained_cfg_overlay={"file": str(path)},
            )  # fmt: skip
        else:
            conv2former.load_weights(timm.create_model("conv2former_b", num_classes=num_classes, device="meta"), path)
    message = str(error.value)
    assert "\n" not in message
    assert "conv2former_b_22k" in message
    assert "kernel size 7" in message


@pytest.mark.parametrize("route", ["checkpoint_path", "overlay", "load_weights", "inspect"])
def test_another_network_is_not_loaded_in_silence(tiny, tmp_path, route):
    """Left to timm, this file loads without a word when the class counts differ: it turns strictness off altogether."""
    path = tmp_path / "resnet.pth"
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), path)
    with pytest.raises(CheckpointError, match="not a Conv2Former checkpoint: its keys are conv1"):
        if route == "checkpoint_path":
            timm.create_model(tiny, num_classes=5, checkpoint_path=path)
        elif route == "overlay":
            timm.create_model(tiny, num_classes=5, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
        elif route == "load_weights":
            conv2former.load_weights(timm.create_model(tiny), path)
        else:
            conv2former.inspect_checkpoint(path)


@pytest.mark.parametrize("name", ["conv2former_t", "conv2former_l.hvision_in22k_ft_in1k_384"])
def test_pretrained_says_where_the_file_is(name):
    with pytest.raises(CheckpointError) as error:
        timm.create_model(name, pretrained=True, num_classes=3)
    variant = conv2former.variant(name)
    tag = next((t for t in variant.pretrained if name.endswith(f".{t.tag}")), variant.pretrained[0])
    assert tag.page in str(error.value)
    assert f"scripts/convert.py FILE --install {variant.name}.{tag.tag}" in str(error.value)


def test_pretrained_of_an_own_variant(tiny):
    with pytest.raises(CheckpointError, match="no weights are published or installed for conv2former_tiny"):
        timm.create_model(tiny, pretrained=True)


class _RunsCode:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_never_run(tiny, tmp_path, official_content):
    proof, path = tmp_path / "code_ran", tmp_path / "evil.pth.tar"
    torch.save({**official_content, "extra": _RunsCode(proof)}, path)
    with pytest.raises(CheckpointError, match=r"refused.*mkdir"):
        conv2former.inspect_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"refused.*mkdir"):
        conv2former.load_weights(timm.create_model(tiny), path)
    with pytest.raises(RuntimeError):
        timm.create_model(tiny, checkpoint_path=path)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the file is what it claims to be
    assert proof.exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.pth", None, "no such file"),
        ("empty.pth", b"", "truncated or not a checkpoint"),
        ("text.pth", b"hello, this is no checkpoint", "not a checkpoint"),
        ("zeros.pth", bytes(4096), "not a checkpoint"),
        ("short.safetensors", b"hello", "not a complete .safetensors"),
    ],
)
def test_unreadable_files(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=expected):
        conv2former.inspect_checkpoint(path)


def replaced(state_dict: dict, key: str, value) -> dict:
    return {**state_dict, key: value}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("pred.weight", None, "is a NoneType"),
        ("pred.weight", "text", "is a str"),
        (7, torch.zeros(1), "the key 7 is no text"),
        ("extra", {"nested": torch.zeros(1)}, "is a dict"),
        ("pred.weight", torch.zeros(10, 1280).to_sparse(), "is a torch.sparse_coo tensor"),
        ("stages.0.0.attn.att.2.weight", torch.zeros(()), "wrong shapes"),
        ("stages.0.0.mlp.fc1.weight", torch.zeros(3, 0), "wrong shapes"),
        ("downsample_layers.0.0.weight", torch.zeros(3), "wrong shapes"),
        ("stages.0.0.layer_scale_1", torch.zeros(3, 3), "wrong shapes"),
        ("stages.0.0.attn.norm.eps", torch.zeros(3), "unexpected keys"),
        ("head.0.weight", torch.zeros(()), "wrong shapes"),
    ],
)
def test_hand_made_state_dicts(tiny, tmp_path, official_content, caplog, key, value, expected):
    state_dict = replaced(official_content["state_dict"], key, value)
    model = timm.create_model(tiny, num_classes=10)
    with pytest.raises(CheckpointError, match=expected):
        model.load_state_dict(state_dict)
    path = tmp_path / "x.pt"
    torch.save({"state_dict": state_dict, "state_dict_ema": torch.zeros(1), "class_names": 3}, path)
    with pytest.raises(CheckpointError, match=expected):
        conv2former.load_weights(model, path)
    if expected not in ("wrong shapes", "unexpected keys"):  # those are about the model it is to be loaded into
        with pytest.raises(CheckpointError, match=rf"x\.pt: .*{expected}"):
            conv2former.inspect_checkpoint(path)
    assert not caplog.records  # nothing claims that weights were loaded


def test_a_missing_stage_and_nothing_at_all(tiny, official_content):
    model = timm.create_model(tiny, num_classes=10)
    part = {k: v for k, v in official_content["state_dict"].items() if not k.startswith("stages.1.")}
    with pytest.raises(CheckpointError, match=r"missing keys: stages\.1\.blocks"):
        model.load_state_dict(part)
    with pytest.raises(CheckpointError, match="its keys are none"):
        model.load_state_dict({})


def test_a_classifier_of_another_width_is_an_error(tiny, official_content):
    state_dict = replaced(official_content["state_dict"], "pred.weight", torch.zeros(10, 7))
    with pytest.raises(CheckpointError, match=r"head\.fc\.weight \(10, 7\) for \(10, 1280\)"):
        timm.create_model(tiny, num_classes=10).load_state_dict(state_dict)


def test_load_weights_into_a_compiled_model(tiny, official_file, expected):
    model = timm.create_model(tiny, num_classes=10)
    conv2former.load_weights(torch.compile(model), official_file)
    assert_is_official(model, expected)


def test_load_weights_needs_a_whole_network(tiny, official_file):
    with pytest.raises(CheckpointError, match="pretrained_cfg_overlay"):
        conv2former.load_weights(timm.create_model(tiny, features_only=True), official_file)


def test_a_truncated_file_and_a_folder(tmp_path, official_file):
    path = tmp_path / "half.pth.tar"
    path.write_bytes(official_file.read_bytes()[: official_file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        conv2former.inspect_checkpoint(path)
    with pytest.raises(CheckpointError, match="must not be unpacked"):
        conv2former.inspect_checkpoint(tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        conv2former.inspect_checkpoint(path)


# --------------------------------------------------------------------------------------------------------- inspection


def test_inspect_the_official_file(tiny, official_file):
    info = conv2former.inspect_checkpoint(official_file)
    assert info.layout == "authors"
    assert conv2former.variant(info.name).model_args() == conv2former.variant(tiny).model_args()  # another may have it
    assert (info.dims, info.depths, info.kernel_size, info.num_classes) == ((8, 16, 24, 32), (1, 1, 2, 1), 7, 10)
    assert info.num_parameters == sum(p.numel() for p in timm.create_model(tiny, num_classes=10).parameters())
    assert (info.epoch, info.metric, info.has_ema) == (0, 50.0, False)
    assert info.recipe["lr"] == 0.001
    assert info.recipe["model"] == "conv2former_tiny_test"
    for text in (
        f"{info.name} (dims [8, 16, 24, 32]",
        "10 classes",
        "layout: authors",
        "epoch: 0, metric 50",
        "lr=0.001",
    ):
        assert text in str(info)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
@pytest.mark.parametrize("layout", ["authors", "birder"])
def test_inspect_tells_the_variant(tmp_path, name, layout):
    state_dict = {key: torch.empty(shape, device="meta") for key, shape in LAYOUTS[name]["state_dict"].items()}
    renamed = {to_birder(k): v for k, v in state_dict.items()} if layout == "birder" else state_dict
    args = argparse.Namespace(drop_path=0.3)
    torch.save({"state": renamed} if layout == "birder" else {"state_dict": renamed, "args": args}, tmp_path / "x.pt")
    info = conv2former.inspect_checkpoint(tmp_path / "x.pt")
    assert (info.name, info.layout, info.num_parameters) == (name, layout, LAYOUTS[name]["num_parameters"])
    assert info.recipe == ({} if layout == "birder" else {"drop_path": 0.3})


def test_inspect_a_shape_that_nobody_registered(tmp_path):
    model = Conv2Former(dims=(4, 6, 8, 10), depths=(1, 2, 1, 1), kernel_size=(3, 5, 7, 9), num_classes=3)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    info = conv2former.inspect_checkpoint(tmp_path / "x.pt")
    assert (info.name, info.kernel_size, info.depths) == (None, (3, 5, 7, 9), (1, 2, 1, 1))


@pytest.mark.parametrize(
    ("definition", "error"),
    [
        ({"fusion": "nope"}, "has the fusion 'nope'"),
        ({"fusion": ["product"]}, "has the fusion"),
        ({"stem_stride": 3}, "has the stem_stride 3; known: 2, 4"),
        ({"stem_stride": [2]}, "has the stem_stride"),
        ({"name": [1]}, ""),
    ],
)
def test_a_definition_of_nonsense(tmp_path, official_content, definition, error):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": official_content["state_dict"], "variant": definition}, path)
    if error:
        with pytest.raises(CheckpointError, match=error):
            conv2former.load_model(path)
    else:
        assert isinstance(conv2former.load_model(path)[1].name, (str, type(None)))


def test_a_training_file_of_birders(tmp_path, official_content):
    """It has the classes with their indices, mean and std, and the size of its images."""
    names = {f"c{i}": 9 - i for i in range(10)}
    stats = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    signature = {"inputs": [{"data_shape": [0, 3, 256, 256]}], "outputs": []}
    content = {
        "state": official_content["state_dict"],
        "class_to_idx": names,
        "rgb_stats": stats,
        "signature": signature,
    }
    torch.save(content, tmp_path / "x.pt")
    info = conv2former.inspect_checkpoint(tmp_path / "x.pt")
    assert info.class_names == [f"c{9 - i}" for i in range(10)]
    assert (info.preprocessing.img_size, info.preprocessing.mean) == (256, (0.5, 0.4, 0.3))
    assert {"img_size", "mean", "std"} <= set(info.preprocessing_noted)


def test_a_network_that_looks_like_one(tmp_path):
    model = timm.create_model("convnext_atto", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is not a Conv2Former checkpoint"):
        conv2former.load_model(tmp_path / "x.pt")


def test_a_key_cannot_forge_a_line_of_an_error(tmp_path, official_file):
    state_dict = conv2former.load_model(official_file)[0].state_dict()
    torch.save(state_dict | {"x\nerror: forged": torch.zeros(1)}, tmp_path / "forged.pt")
    with pytest.raises(CheckpointError) as raised:
        conv2former.load_model(tmp_path / "forged.pt")
    assert "x\\nerror: forged" in str(raised.value)
    assert "\nerror: forged" not in str(raised.value).replace("\\n", "")
