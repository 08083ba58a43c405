from __future__ import annotations

import re

import pytest
import yaml

from conv2former import ConfigError, DataError
from conv2former._yaml import dump_yaml
from conv2former.config import Config, check_config, differences, fit_batch, load_config, make_plan, override_config
from conv2former.errors import counted

from ..conftest import ROOT


def write(tmp_path, name: str, text: str):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_later_layers_win(tmp_path):
    write(tmp_path, "a.yaml", "data: {root: a, img_size: 64}\noptim: {base_lr: 1e-3}\naugment: {scale: [0.1, 0.2]}")
    write(tmp_path, "b.yaml", "data: {root: b}\ntrain: {seed: 5}")
    path = write(tmp_path, "c.yaml", "base: [a.yaml, b.yaml]\noptim: {opt: sgd}\naugment: {scale: [0.5, 1.0]}")
    config = load_config(path, ["train.seed=6", "--data.workers", "3", "--ema.decay=0.9"])
    assert (config.data.root, config.data.img_size, config.data.workers) == ("b", 64, 3)
    assert (config.optim.base_lr, config.optim.opt, config.train.seed) == (1e-3, "sgd", 6)
    assert config.augment.scale == (0.5, 1.0)  # lists are replaced, not merged
    assert config.ema.decay == 0.9
    assert config.schedule.epochs == 300  # the schema's


def test_a_number_without_a_dot_is_a_number(tmp_path):
    path = write(tmp_path, "a.yaml", "data: {root: 2024}\noptim: {base_lr: 4e-3, eps: 1E-9}")
    config = load_config(path, ["schedule.min_lr=2e-6"])
    assert (config.optim.base_lr, config.optim.eps, config.schedule.min_lr) == (4e-3, 1e-9, 2e-6)
    assert config.data.root == "2024"


@pytest.mark.parametrize("name", ["2020-01-31", "2020-13-45", "010", "12:30", "0x10", "1e", "1.2.3", "="])
def test_a_name_stays_as_it_is_written(tmp_path, name):
    path = write(tmp_path, "a.yaml", f"data: {{root: {name}}}")
    assert load_config(path).data.root == load_config(None, [f"data.root={name}"]).data.root == name


def test_every_mistake_is_in_one_message(tmp_path):
    path = write(tmp_path, "a.yaml", "model: {nmae: x}\ntrain: {batch_size: -1}\noptim: {betas: [0.9]}\nagument: {}")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    message = str(error.value)
    assert f"{path}: 4 mistakes" in message
    assert "model.nmae: unknown key (did you mean 'name'?)" in message
    assert "agument: unknown key (did you mean 'augment'?)" in message
    assert "train.batch_size: " in message
    assert "found -1" in message
    assert "optim.betas.1: field required" in message


def test_conflicts_between_keys():
    with pytest.raises(ConfigError) as error:
        check_config({"train": {"batch_size": 7}, "schedule": {"epochs": 3}, "augment": {"scale": [1, 0.1]}}, "test")
    for key in ("data.root", "train.batch_size", "schedule.warmup_epochs", "augment.scale"):
        assert f"- {key}: " in str(error.value)


@pytest.mark.parametrize(
    ("files", "overrides", "expected"),
    [
        ({}, (), "no such file"),
        ({"a.yaml": "base: a.yaml"}, (), r"goes in a circle: a\.yaml -> a\.yaml"),
        ({"a.yaml": "base: b.yaml", "b.yaml": "base: a.yaml"}, (), r"circle: a\.yaml -> b\.yaml -> a\.yaml"),
        ({"a.yaml": "base: none.yaml"}, (), r"none\.yaml: no such file"),
        ({"a.yaml": "base: {x: 1}"}, (), "expected a file name"),
        ({"a.yaml": "data: [1"}, (), "not valid YAML"),
        ({"a.yaml": "data: {root: x}\ndata: {root: y}"}, (), "'data' stands twice"),
        ({"a.yaml": "data: {root: x}"}, ["train.seed"], "expected key=value"),
        ({"a.yaml": "data: {root: x}"}, ["train.seed=[1"], "not a valid value"),
        ({"a.yaml": "data: {root: x}"}, ["data.root.x=1"], "'root' is not a section"),
        ({"a.yaml": "data: {root: x}"}, ["train.sed=1"], "did you mean 'seed'"),
        ({"a.yaml": "data: {root: x}"}, ["model.variant="], r"no value; write model\.variant=null"),
        ({"a.yaml": "data: &d {root: x}\nmodel: {<<: *d}"}, (), "aliases .* are not supported"),
        ({"a.yaml": "data: " + "[" * 3000}, (), "not valid YAML"),
        ({"a.yaml": "augment: {auto_augment: rnad-m9}"}, (), "augment.auto_augment: string should match"),
        ({"a.yaml": "train: {seed: 99999999999999999999999}"}, (), "train.seed: "),
        ({"a.yaml": "data: {root: x, mean: [.nan, 1, 1]}"}, (), "data.mean.0: "),
        ({"a.yaml": "data: {root: x}\nmodel: {variant: none.yaml}"}, (), r"none\.yaml: no such file"),
    ],
)
def test_wrong_files_and_overrides(tmp_path, files, overrides, expected):
    for name, text in files.items():
        write(tmp_path, name, text)
    with pytest.raises(ConfigError, match=expected):
        load_config(tmp_path / "a.yaml", overrides)


def test_a_variant_file_is_read_where_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", "mine.yaml", "dims: [8, 16, 24, 32]")
    write(tmp_path / "deep", "base.yaml", "data: {root: x}\nmodel: {variant: mine.yaml}")
    path = write(tmp_path, "a.yaml", "base: deep/base.yaml")
    expected = {"name": "mine", "dims": [8, 16, 24, 32]}
    assert load_config(path).model.variant == expected
    monkeypatch.chdir(tmp_path)
    assert load_config(None, ["data.root=x", "model.variant=deep/mine.yaml"]).model.variant == expected


def test_a_variant_file_is_whole(tmp_path):
    """Of a base's variant nothing stays; a mapping changes single keys of it."""
    write(tmp_path, "first.yaml", "dims: [8, 8, 8, 8]\nnorm_layer: batchnorm2d")
    write(tmp_path, "second.yaml", "dims: [16, 16, 16, 16]")
    write(tmp_path, "base.yaml", "data: {root: x}\nmodel: {variant: first.yaml}")
    file = write(tmp_path, "file.yaml", "base: base.yaml\nmodel: {variant: second.yaml}")
    mapping = write(tmp_path, "mapping.yaml", "base: file.yaml\nmodel: {variant: {mlp_ratio: 2}}")
    second = {"name": "second", "dims": [16, 16, 16, 16]}
    assert load_config(file).model.variant == second
    assert load_config(mapping).model.variant == {**second, "mlp_ratio": 2}
    assert dump_yaml(load_config(file).to_dict())  # plain types


def test_a_saved_configuration_loads_again(tmp_path):
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    path = write(tmp_path, "saved.yaml", yaml.safe_dump(config.to_dict()))
    assert load_config(path) == config


def test_sizes_of_images(tmp_path):
    """One number, or height and width; what is not set is open until a run starts."""
    wide = load_config(None, ["data.root=x", "data.img_size=[128,256]"])
    assert wide.data.preprocessing.size == (128, 256)
    assert wide.to_dict()["data"]["img_size"] == [128, 256]
    assert check_config(wide.to_dict(), "again") == wide
    square = load_config(None, ["data.root=x", "data.img_size=[64,64]"])
    assert square.to_dict()["data"]["img_size"] == 64
    unset = load_config(None, ["data.root=x"]).data
    assert (unset.given, unset.img_size, unset.preprocessing.img_size) == ({}, None, 224)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.img_size=[128]"], "- data.img_size.1: field required"),
        (["data.img_size=[16,64]"], "- data.img_size.0: input should be greater than or equal to 32, found 16"),
        (["data.img_size=big"], "- data.img_size: input should be a valid integer"),
        (["data.img_size=[64,128]", "augment.first_img_size=96"], "augment.first_img_size: above data.img_size: 96"),
        (["model.in_chans=1", "data.mean=[.5,.5,.5]"], "data.mean: 3 numbers for images of 1 channel (grey)"),
        (
            ["data.mean=[.5]", "data.std=[.5,.5,.5]"],
            "data.mean: 1 number, and data.std has 3; give one for each channel",
        ),
        (["model.in_chans=5"], "model.in_chans: input should be 1 or 3, found 5"),
    ],
)
def test_mistakes_about_images(words, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(None, ["data.root=x", *words])


def test_differences():
    old, new = Config().to_dict(), Config().to_dict()
    new["optim"]["base_lr"] = 2.0
    new["train"]["extra"] = 1
    assert differences(old, new) == ["optim.base_lr: 0.001 -> 2.0", "train.extra: None -> 1"]


def test_plan():
    config = check_config({"data": {"root": "x"}, "train": {"batch_size": 32, "accum_steps": 2}}, "test")
    plan = make_plan(config, world_size=4, num_train_images=1000)
    assert plan.global_batch_size == 256
    assert plan.lr == pytest.approx(1e-3 * 256 / 1024)
    assert (plan.steps_per_epoch, plan.epochs, plan.total_steps) == (3, 310, 930)
    with pytest.raises(DataError, match=re.escape("fewer than one global batch of 256 (32 x 2 accumulation steps x 4")):
        make_plan(config, world_size=4, num_train_images=255)


@pytest.mark.parametrize(
    ("images", "devices", "mixup", "expected"),
    [
        (1000, 1, 0.0, (32, 2)),
        (64, 1, 0.0, (32, 2)),
        (63, 1, 0.0, (31, 2)),
        (63, 1, 0.8, (30, 2)),
        (25, 2, 0.0, (6, 2)),
        (25, 2, 0.8, (6, 2)),
        (3, 2, 0.0, (1, 1)),
        (1, 1, 0.0, (1, 1)),
        (3, 1, 0.8, (2, 1)),
    ],
)
def test_a_small_set_gets_a_small_batch(images, devices, mixup, expected):
    sections = {"data": {"root": "x"}, "augment": {"mixup": mixup, "cutmix": 0.0}}
    config = check_config(sections | {"train": {"batch_size": 32, "accum_steps": 2, "shrink_batch": True}}, "test")
    fitted = fit_batch(config, devices, images)
    assert (fitted.train.batch_size, fitted.train.accum_steps) == expected
    assert fit_batch(fitted, devices, images) == fitted
    plan = make_plan(fitted, devices, images)
    assert plan.steps_per_epoch >= 1
    assert plan.lr == pytest.approx(1e-3 * expected[0] * expected[1] * devices / 1024)
    unasked = check_config(sections | {"train": {"batch_size": 32, "accum_steps": 2}}, "test")
    assert fit_batch(unasked, devices, images) == unasked


def test_a_set_that_is_too_small_for_any_batch():
    sections = {"data": {"root": "x"}, "train": {"batch_size": 32, "shrink_batch": True}}
    for images, devices in ((1, 1), (3, 2)):  # mixup needs a pair on every device
        config = fit_batch(check_config(sections, "test"), devices, images)
        has = f"has {counted(images, 'image')}, fewer than one global batch of {32 * devices} "
        with pytest.raises(DataError, match=has):
            make_plan(config, devices, images)


@pytest.mark.parametrize(
    ("images", "devices", "mixup", "expected"),
    [
        (2, 4, 0.0, "each process needs an image, so start fewer processes: 2 processes at most"),
        (
            7,
            4,
            0.8,
            "each process needs two images, for mixup and cutmix, so start fewer processes: 3 processes at most",
        ),
        (2, 4, 0.8, "start fewer processes: 1 process at most"),
        (1, 1, 0.8, "a step needs two images, for mixup and cutmix; add some, or turn these off"),
        (40, 4, 0.0, r"global batch of 128 \(32 x 1 accumulation step x 4 devices\): lower train.batch_size$"),
    ],
)
def test_what_to_do_about_a_small_set(images, devices, mixup, expected):
    config = check_config(
        {"data": {"root": "x"}, "augment": {"mixup": mixup, "cutmix": 0.0}, "train": {"batch_size": 32}}, ""
    )
    with pytest.raises(DataError, match=expected):
        make_plan(config, devices, images)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"model": {"name": "auto"}}, "model.name: auto reads the network off model.checkpoint; give a weight file"),
        (
            {"data": {"source": "hf", "streaming": True, "epoch_images": 9, "sampling": "sqrt"}},
            "data.sampling: not with data.streaming",
        ),
        (
            {"data": {"source": "hf", "streaming": True, "epoch_images": 9}, "train": {"class_weight": "sqrt"}},
            "train.class_weight: not with data.streaming",
        ),
        (
            {"data": {"source": "hf", "streaming": True, "epoch_images": 9}, "augment": {"hflip": "alternating"}},
            "augment.hflip: not alternating with data.streaming",
        ),
        ({"augment": {"hflip": "often"}}, "augment.hflip: input should be 'alternating', found 'often'"),
        ({"augment": {"hflip": 2}}, "augment.hflip: input should be less than or equal to 1, found 2"),
        (
            {"data": {"sampling": "sqrt"}, "train": {"class_weight": "sqrt"}},
            "train.class_weight: corrects what data.sampling does already",
        ),
    ],
)
def test_conflicts_of_fine_tuning(sections, expected):
    sections["data"] = {"root": "x"} | sections.get("data", {})
    with pytest.raises(ConfigError, match=f"1 mistake:\n.*{expected}"):
        check_config(sections, "test")


@pytest.mark.parametrize("word", ["auto", "on", "off"])
def test_switches(tmp_path, word):
    """YAML 1.1 takes on and off for true and false, in files and on the command line."""
    (tmp_path / "x.yaml").write_text(f"data: {{root: x}}\ntrain: {{cuda_graph: {word}}}\n")
    config = load_config(tmp_path / "x.yaml")
    assert config.train.cuda_graph == word
    assert load_config(tmp_path / "x.yaml", [f"train.cuda_graph={word}"]) == config
    (tmp_path / "dumped.yaml").write_text(dump_yaml(config.to_dict()))
    assert load_config(tmp_path / "dumped.yaml") == config
    with pytest.raises(ConfigError, match=r"train\.cuda_graph: input should be 'auto', 'on' or 'off', found 1"):
        load_config(tmp_path / "x.yaml", ["train.cuda_graph=1"])


def test_the_imagenet_recipe_is_the_authors():
    """The numbers of their training script."""
    for size in ("n", "t", "s", "b", "l"):
        config = load_config(ROOT / "configs" / "imagenet1k" / f"conv2former_{size}.yaml")
        assert config.model.name == f"conv2former_{size}"
        assert make_plan(config, 8, 1_281_167).lr == pytest.approx(1e-3)
        optim, schedule, augment = config.optim, config.schedule, config.augment
        assert (optim.opt, optim.weight_decay, optim.betas) == ("adamw", 0.05, (0.9, 0.999))
        assert (schedule.epochs, schedule.warmup_epochs, schedule.cooldown_epochs) == (300, 5, 10)
        assert (schedule.warmup_lr, schedule.min_lr) == (1e-6, 1e-6)
        assert (augment.mixup, augment.cutmix, augment.mix_switch_prob, augment.mix_prob) == (0.8, 1.0, 0.5, 1.0)
        assert (augment.smoothing, augment.re_prob, augment.re_mode) == (0.1, 0.25, "pixel")
        assert (augment.auto_augment, augment.scale, augment.hflip) == ("rand-m9-mstd0.5-inc1", (0.08, 1.0), 0.5)
        assert (augment.interpolation, config.ema.decay, optim.clip_grad) == ("random", None, None)
        assert augment.ratio == pytest.approx((3 / 4, 4 / 3))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("train.early_stop.patiense=3", "train.early_stop.patiense: unknown key (did you mean 'patience'?)"),
        (
            "train.early_stop=3",
            "train.early_stop: a section, found 3; its keys are set one by one: train.early_stop.patience, "
            "train.early_stop.metric, train.early_stop.min_delta",
        ),
        (
            "schedule.epochs=many",
            "schedule.epochs: input should be a valid integer, unable to parse string as an integer, or 'auto', "
            "found 'many'",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, word, expected):
    """Which does not say that it is in the file."""
    path = tmp_path / "x.yaml"
    path.write_text("data: {root: x}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, [word])
    assert list(error.value.lines) == [f"{path}, with what is given beside it: 1 mistake:", f"  - {expected}"]


def test_a_key_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)2 mistakes:.*train.early_stop.patience: .*early_stop.min_dilta: unkn"):
        check_config({"data": {"root": "x"}, "train": {"early_stop": {"min_dilta": 1}}}, "test")


@pytest.mark.parametrize("config", [None, 3, ["data.root=x"]])
def test_what_is_no_configuration_is_said_to_be_none(config):
    with pytest.raises(ConfigError, match="the configuration: expected a file's path, or plain types in a mapping"):
        override_config(config, {})
