from __future__ import annotations

import re

import pytest
import timm
import yaml

import conv2former
from conv2former import ConfigError
from conv2former.variants import parse_variant, read_builtin_variants

from .conftest import ROOT, TINY_YAML


def write(tmp_path, text: str, name: str = "mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_the_yaml_files_are_what_is_registered():
    names = {path.stem for path in (ROOT / "configs" / "models").glob("*.yaml")}
    assert names == {v.name for v in read_builtin_variants()}
    assert names <= set(timm.list_models("conv2former*"))


def test_published_tags():
    published = {
        "conv2former_n.hvision_in1k": (81.5, 224),
        "conv2former_t.hvision_in1k": (83.2, 224),
        "conv2former_s.hvision_in1k": (84.1, 224),
        "conv2former_s.hvision_in22k_ft_in1k": (84.9, 224),
        "conv2former_b.hvision_in1k": (84.4, 224),
        "conv2former_b.hvision_in22k_ft_in1k": (86.2, 224),  # the same file as the next
        "conv2former_b_22k.hvision_in22k_ft_in1k": (86.2, 224),
        "conv2former_l.hvision_in22k_ft_in1k": (87.0, 224),
        "conv2former_l.hvision_in22k_ft_in1k_384": (87.7, 384),
    }
    found = {}
    for variant in read_builtin_variants():
        for tag in variant.pretrained:
            cfg = timm.get_pretrained_cfg(f"{variant.name}.{tag.tag}")
            assert cfg.input_size == (3, tag.input_size[-1], tag.input_size[-1])
            assert cfg.num_classes == 1000
            assert not cfg.has_weights  # none can be fetched by a program
            assert str(tag.top1) in cfg.description
            assert (cfg.crop_pct, cfg.crop_mode) == (
                (1.0, "squash") if tag.input_size[-1] == 384 else (0.875, "center")
            )
            found[f"{variant.name}.{tag.tag}"] = (tag.top1, tag.input_size[-1])
    assert found == published


def test_a_variant_of_ones_own(tmp_path):
    path = write(tmp_path, TINY_YAML + "mlp_ratio: 2\nls_init_value: 1e-5\n", "conv2former_mine.yaml")
    assert conv2former.register_variant(path) == "conv2former_mine"
    assert conv2former.register_variant(path) == "conv2former_mine"  # again: nothing happens
    model = timm.create_model("conv2former_mine", num_classes=3)
    assert model.stages[0].blocks[0].mlp.fc1.out_channels == 16
    assert model.stages[0].blocks[0].ls1.gamma[0].item() == pytest.approx(1e-5)
    assert conv2former.variant("conv2former_mine").dims == (8, 16, 24, 32)


def test_names_of_others_are_safe(tmp_path):
    before = timm.create_model("resnet18").default_cfg
    with pytest.raises(ConfigError, match="timm has a model: 'resnet18'"):
        conv2former.register_variant(write(tmp_path, TINY_YAML, "resnet18.yaml"))
    with pytest.raises(ConfigError, match="registered with another definition: 'conv2former_t'"):
        conv2former.register_variant(write(tmp_path, TINY_YAML, "conv2former_t.yaml"))
    assert timm.create_model("resnet18").default_cfg == before


@pytest.mark.parametrize("name", ["variant", "partial", "default_cfgs", "register_model"])
def test_a_name_that_the_code_uses_too(tmp_path, name):
    assert conv2former.register_variant(write(tmp_path, TINY_YAML, f"{name}.yaml")) == name
    for each in (name, "conv2former_n"):
        assert timm.create_model(each, device="meta").num_classes == 1000
    again = write(tmp_path, TINY_YAML.replace("7", "5"), f"{name}.yaml")
    with pytest.raises(ConfigError, match="registered with another definition"):
        conv2former.register_variant(again)


def test_every_mistake_is_listed(tmp_path):
    text = "dims: [8, 16, 24]\ndepths: [1, -1, 2, 1]\nkernel_sizes: 7\nkernel_size: 8\npretrained: {x: {top: 3}}\n"
    with pytest.raises(ConfigError) as error:
        conv2former.register_variant(write(tmp_path, text))
    message = str(error.value)
    assert "mine.yaml: 6 mistakes" in message
    for mistake in ("dims: ", "depths: ", "kernel_size: ", "did you mean 'kernel_size'?", "pretrained.x.top: unknown"):
        assert mistake in message
    assert "mine" not in timm.list_models("mine")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "dims: missing"),
        ("dims: [8, 16, 24, 32]", "depths: missing"),
        (TINY_YAML + "depths: [1, 1, 1, 1]", "mine.yaml:4:1: .*'depths' stands twice"),
        ("dims: [8, 16", "not valid YAML"),
        ("- 1\n- 2", "found a list"),
        (TINY_YAML.replace("[8,", "[7,"), "even numbers"),
        (TINY_YAML.replace("7", "true"), "kernel_size: expected"),
        (TINY_YAML + "train_drop_path_rate: 1.0", "train_drop_path_rate: expected a number in"),
        (TINY_YAML + "name: Großartig", "name: expected a name of lower-case"),
        (TINY_YAML + "mlp_ratio: .inf", "mlp_ratio: expected a number"),
        (TINY_YAML + "drop_path_rate: 0.1", "did you mean 'train_drop_path_rate'"),
    ],
)
def test_wrong_files(tmp_path, text, expected):
    with pytest.raises(ConfigError, match=expected):
        conv2former.register_variant(write(tmp_path, text))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        conv2former.register_variant(tmp_path / "none.yaml")


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match=re.escape("(did you mean 'conv2former_t'?)")):
        conv2former.variant("conv2former_tt")


def test_a_definition_survives_the_way_through_plain_types():
    for variant in read_builtin_variants():
        again = parse_variant(yaml.safe_load(yaml.safe_dump(variant.to_dict())), "test")
        assert again.model_args() == variant.model_args()
        assert again.train_drop_path_rate == variant.train_drop_path_rate


def test_a_fresh_model_has_no_drop_path():
    """As for every timm model; the variant's rate is for the training script."""
    model = timm.create_model("conv2former_n", device="meta")
    assert not [module for module in model.modules() if type(module).__name__ == "DropPath"]
