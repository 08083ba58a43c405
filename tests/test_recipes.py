"""Every configuration under configs/ that is a run: it loads, it trains a step, and its header is true."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import sys

import pytest

import conv2former
from conv2former import variants
from conv2former.config import Config, load_config
from conv2former.config.auto import AUTO_KEYS
from conv2former.engine import dry_run
from conv2former.tools.recipes import find_recipes, read_recipe, recipes_table, run_name
from conv2former.weights.installed import list_shipped

from .conftest import ROOT

CONFIGS = ROOT / "configs"
RECIPES = find_recipes(CONFIGS)
NAMES = [str(path.relative_to(CONFIGS)) for path in RECIPES]
# The recipe's step, but cheap: two small images, two being what a dry run takes on a CPU anyway, and no weight file;
# `shallow` networks besides. Contiguous tensors are no other computation, and twice as fast here.
CHEAP = [
    "data.img_size=32",
    "train.batch_size=2",
    "train.accum_steps=1",
    "train.channels_last=false",
    "model.checkpoint=null",
]
_stepped: dict[str, list[str]] = {}


@pytest.fixture(params=RECIPES, ids=NAMES)
def recipe(request):
    return read_recipe(request.param)


@pytest.fixture
def shallow(monkeypatch):
    """Leaves every variant one block in each stage."""
    for name, variant in variants._variants.items():
        monkeypatch.setitem(variants._variants, name, dataclasses.replace(variant, depths=(1, 1, 1, 1)))


def step(config: Config) -> list[str]:
    """Trains one step. Recipes that differ in nothing that the step sees share it: folder and hf, 224 and 384."""
    raw = config.to_dict()
    seen = ("num_classes", "class_names", "img_size", "short_side", "long_side")  # a dry run opens no data
    raw["data"] = {key: raw["data"][key] for key in seen if key in raw["data"]}
    raw["log"] = raw["checkpoint"] = None
    key = json.dumps(raw)
    if key not in _stepped:
        _stepped[key] = dry_run(config)
    return _stepped[key]


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_trains_a_step(path, shallow, tmp_path_factory):
    whole = load_config(path)
    found = getattr(whole.data, "num_classes", None)
    network = ["model.name=conv2former_n"] if whole.model.name == "auto" else []  # there is no file to tell it
    network += ["model.head.channels=32"] if whole.task == "segmentation" else []  # whose head is larger than it
    classes = [f"data.num_classes={found or 7}"]
    if whole.task == "detection":
        names = tmp_path_factory.getbasetemp() / "names.txt"
        names.write_text("".join(f"{i}\n" for i in range(7)))
        classes = [f"data.class_names={names}"]
        network += ["model.detector.channels=64", "augment.short_sides=[32]", "data.short_side=32", "data.long_side=48"]
        network += ["data.img_size=null"]
    text = "\n".join(step(load_config(path, [*CHEAP, *network, *classes])))
    assert f" {found or 7} classes" in text
    loss, norm = re.search(r"loss ([\d.]+), gradient norm ([\d.e+]+)", text).groups()
    assert float(loss) > 0
    assert float(norm) > 0


def test_a_header_without_a_result_is_a_mistake(tmp_path):
    (tmp_path / "mine.yaml").write_text("# Mine.\ndata: {root: photos}\n")
    with pytest.raises(conv2former.ConfigError, match=r"mine\.yaml: the header needs a line '# Published: none'"):
        recipes_table(tmp_path)


def test_no_recipe_is_forgotten():
    """What is no run is a network, or a base that a run uses."""
    runs = set(RECIPES)
    used = {(path.parent / name).resolve() for path in CONFIGS.glob("**/*.yaml") for name in bases(path)}
    for path in set(CONFIGS.glob("**/*.yaml")) - runs:
        assert path in used or path.relative_to(CONFIGS).parts[0] in ("models", "variants"), path


def bases(path) -> list[str]:
    match = re.search(r"^base: (.+)$", path.read_text(), re.MULTILINE)
    return re.findall(r"[\w./]+", match[1]) if match else []


def test_names_are_unique():
    """The run folder is named after the file."""
    names = [run_name(path) for path in RECIPES]
    assert len(names) == len(set(names))
    assert {"conv2former_t", "quickstart", "finetune_folder", "linear_probe_csv", "scratch_hf"} <= set(names)
    assert {"segmentation_folder", "detection_coco", "detection_yolo"} <= set(names)


def test_header(recipe):
    """The command is that of this file, and it gives the batch and the rate that the header promises."""
    header, plan, train = recipe.header, recipe.plan, recipe.config.train
    assert f"scripts/train.py --config configs/{recipe.path.relative_to(CONFIGS)} " in f"{header} "
    assert ("torchrun" in header) == (recipe.devices > 1)
    words = [str(train.batch_size), "per device"]
    words += ["x", str(train.accum_steps), "accumulation steps"] if train.accum_steps > 1 else []
    words += ["x", str(recipe.devices), "devices" if recipe.devices > 1 else "device"]
    assert f"Global batch {plan.global_batch_size} = {' '.join(words)}, learning rate " in header
    rate = re.search(r"learning rate ([\de.-]+?|auto)[.:]? ", f"{header} ")[1]
    assert rate == "auto" if "optim.base_lr" in recipe.config.auto else float(rate) == pytest.approx(plan.lr)
    if recipe.path.name != "quickstart.yaml":  # a test runs that one to its end
        assert "Unverified: " in header
        assert "Measured" in header or "Training time and memory are not measured." in header
    if recipe.published != "none":
        assert "not reproduced here" in header.lower()


def test_lines_are_short():
    for path in CONFIGS.glob("**/*.yaml"):
        assert max(map(len, path.read_text().splitlines())) <= 120, path


def test_starting_weights_are_asked_for(recipe):
    """A recipe for given weights names a file that another recipe writes, or the user's, and says so above.

    Weights that are in the package need no words.
    """
    checkpoint, header = recipe.config.model.checkpoint, recipe.header
    if checkpoint in {model.name.partition(".")[0] for model in list_shipped()}:
        return
    assert bool(checkpoint) == ("model.checkpoint=FILE" in header)
    if checkpoint and checkpoint.startswith("runs/"):
        source = next(path for path in RECIPES if checkpoint == f"runs/{path.stem}/checkpoints/best.pt")
        assert f"configs/{source.relative_to(CONFIGS)} writes" in header
        assert read_recipe(source).config.model.name == recipe.config.model.name
    elif checkpoint:
        assert checkpoint in header


@pytest.mark.parametrize("name", ["imagenet22k_to_1k/conv2former_s_22k_to_1k.yaml", "finetune/folder.yaml"])
def test_missing_weights_are_named(name):
    config = load_config(CONFIGS / name, ["data.num_classes=3", "data.img_size=32"])
    with pytest.raises(conv2former.CheckpointError, match=f"{re.escape(config.model.checkpoint)}: no such file"):
        dry_run(config)


TAGS = {"imagenet1k": "hvision_in1k", "imagenet22k_to_1k": "hvision_in22k_ft_in1k"}


@pytest.mark.parametrize("folder", TAGS)
def test_published_results_are_those_of_the_variants(folder):
    seen = set()
    for recipe in map(read_recipe, (path for path in RECIPES if path.parent.name == folder)):
        size = recipe.config.data.img_size
        suffix = "" if size == 224 else f"_{size}"
        tags = {tag.tag: tag for tag in conv2former.variant(recipe.config.model.name).pretrained}
        tag = tags.get(TAGS[folder] + suffix)
        if tag:
            assert recipe.published == f"{tag.top1} % top-1 at {size}"
            data = recipe.config.data
            assert (data.crop_pct, data.crop_mode) == (tag.crop_pct, tag.crop_mode)
            seen.add(tag)
        else:  # the only result without a file
            assert recipe.published == "none" or recipe.path.stem == "conv2former_b_22k_to_1k_384"
    assert len(seen) == 4


def test_recipes_for_ones_own_images():
    """What docs/recipes.md promises: every kind of source, whatever the folder looks like, however few the images."""
    sources = {path.stem for path in RECIPES if path.parent.name == "finetune" and "digits" not in path.stem}
    assert sources == {"folder", "hf", "csv"}
    for folder in ("finetune", "linear_probe", "scratch"):
        for source in sources:
            config = load_config(CONFIGS / folder / f"{source}.yaml")
            assert (config.data.source, config.data.holdout, config.train.shrink_batch) == (source, 0.2, True)
            assert config.schedule.cooldown_epochs == 0  # schedule.epochs is all
            assert config.auto == (AUTO_KEYS if folder == "finetune" else ())
            assert (config.model.name == "auto") == (folder != "scratch")
            assert (config.optim.layer_decay, config.model.freeze) == {
                "finetune": (0.8, "nothing"),
                "linear_probe": (None, "backbone"),
                "scratch": (None, "nothing"),
            }[folder]


def test_what_the_recipes_for_given_weights_set():
    """The values of ConvNeXt's commands, the nearest documented ones."""
    for path in RECIPES:
        if path.parent.name not in ("imagenet22k_to_1k", "imagenet1k_384"):
            continue
        recipe = read_recipe(path)
        config = recipe.config
        optim, schedule, augment, data = config.optim, config.schedule, config.augment, config.data
        assert (recipe.plan.lr, recipe.plan.global_batch_size) == (pytest.approx(5e-5), 512)
        assert (schedule.epochs, schedule.warmup_epochs, schedule.cooldown_epochs) == (30, 0, 0)
        assert (optim.weight_decay, optim.layer_decay) == (1e-8, 0.8 if "22k" in path.stem else 0.7)
        assert (augment.mixup, augment.cutmix, augment.smoothing, augment.re_prob) == (0, 0, 0.1, 0.25)
        assert (data.crop_pct, data.crop_mode) == ((1.0, "squash") if data.img_size == 384 else (0.875, "center"))


def test_the_docs_have_the_table_that_the_script_prints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["list_recipes.py"])
    runpy.run_path(str(ROOT / "scripts" / "list_recipes.py"), run_name="__main__")
    printed = capsys.readouterr().out.strip()
    assert printed == recipes_table(CONFIGS)
    assert f"\n\n{printed}\n\n" in (ROOT / "docs" / "recipes.md").read_text()
