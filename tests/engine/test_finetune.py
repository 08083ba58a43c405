"""Fine-tuning on one's own images, through the recipes in configs/finetune/."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy
from torch.nn.functional import cross_entropy

import conv2former
from conv2former import CheckpointError, ConfigError, DataError
from conv2former.config import load_config, make_plan
from conv2former.data import Batch
from conv2former.engine import dry_run, prepare, train
from conv2former.engine.build import build_run
from conv2former.engine.step import FiniteCheck, train_step
from conv2former.errors import OutputError
from conv2former.tasks.classification.data import describe_classes
from conv2former.tasks.classification.loss import WeightedCrossEntropy, class_weights
from conv2former.tasks.network import build_model, find_variant_of, name_network
from conv2former.tools.evaluation.validate import validate
from conv2former.tools.runs.comparing import differing_runs
from conv2former.weights.architecture import CLASSIFIER

from ..conftest import ROOT
from .conftest import SHAPE, configure, killed_after
from .test_step import PLAIN, WORLD, batch
from .test_trainer import final

pytestmark = pytest.mark.slow

OFFICIAL = ROOT / "tests" / "fixtures" / "official_format.pth.tar"
QUICK = [
    "data.img_size=32",
    "data.workers=0",
    "schedule.epochs=2",
    "log.tensorboard=false",
    "augment.auto_augment=null",
    "train.batch_size=8",
]


def fill(root, counts: dict[str, int], kinds: tuple[str, ...] = ("RGB",)) -> None:
    """Noise, whose brightness is the class."""
    rng = np.random.default_rng(0)
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            grey = rng.integers(0, 60, (36, 40)) + 90 * number
            kind = kinds[i % len(kinds)]
            pixels = (grey * 257).astype(np.uint16) if kind == "I;16" else grey.astype(np.uint8)
            image = Image.fromarray(pixels)
            (image if kind in ("L", "I;16") else image.convert(kind)).save(root / name / f"{i}.png")


@pytest.fixture
def photos(tmp_path):
    fill(tmp_path / "photos", {"cat": 20, "dog": 10, "emu": 4})
    return tmp_path / "photos"


def recipe(root, *overrides: str, name: str = "finetune/folder", checkpoint=OFFICIAL):
    words = [*QUICK, f"data.root={root}", f"model.checkpoint={checkpoint}", *overrides]
    return load_config(ROOT / "configs" / f"{name}.yaml", words)


def split_of(folder) -> list[dict[str, str]]:
    with (folder / "split.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------- a folder is enough


def test_class_folders_and_a_weight_file_are_enough(photos, tmp_path, capsys):
    """The network is the file's, validation images are held out, and the first accuracy comes after an epoch."""
    report = train(recipe(photos), tmp_path / "run")
    assert (report["n"], report["model"], report["started_from"]) == (7, "conv2former_custom", str(OFFICIAL))
    printed = capsys.readouterr().out
    assert "photos has no validation split: 7 images of 34 held out, about 20 % of each class" in printed
    assert f"listed in {tmp_path / 'run' / 'split.csv'}" in printed
    assert f"conv2former_custom from {OFFICIAL}, drop path 0, 32 x 32" in printed
    assert "training images per class: 3 (emu) to 16 (cat); to learn the rare ones better try data.sampling" in printed
    assert "epoch 1/2  top-1 " in printed
    rows = split_of(tmp_path / "run")
    assert sorted(row["image"] for row in rows) == sorted(str(p.relative_to(photos)) for p in photos.glob("*/*"))
    assert all(row["image"].startswith(row["label"]) for row in rows)
    held_out = [row["label"] for row in rows if row["split"] == "val"]
    assert sorted(held_out) == ["cat"] * 4 + ["dog"] * 2 + ["emu"]

    best = tmp_path / "run" / "checkpoints" / "best.pt"
    info = conv2former.inspect_checkpoint(best)
    assert info.recipe["model"]["name"] == "conv2former_custom"
    assert info.recipe["model"]["variant"]["dims"] == [8, 16, 24, 32]
    assert (info.name, info.fusion, info.kernel_size) == ("conv2former_custom", "product", 7)
    assert len(info.recipe["data"]["holdout_sha256"]) == 64
    for overrides in ((), ("data.source=csv", f"data.csv={tmp_path / 'run' / 'split.csv'}")):
        result = validate(best, None, list(overrides))
        assert result["n"] == 7
        assert result["top1"] == pytest.approx(report["top1"])
        assert result["loss"] == pytest.approx(report["loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["finetune/folder", "linear_probe/folder", "scratch/folder"])
def test_layouts_of_a_folder(photos, tmp_path, name):
    """Of train and val, train alone, or class folders: as the recipes' comments say."""
    tiny = {**SHAPE, "name": "conv2former_tiny_here"}
    scratch = ["model.checkpoint=null", f"model.variant={json.dumps(tiny)}", "schedule.epochs=30"]
    start = scratch if name.startswith("scratch") else []
    for layout, expected in (("both", 34), ("train", 7), ("bare", 7)):
        root = tmp_path / layout if layout != "bare" else photos
        for split in {"both": ("train", "val"), "train": ("train",), "bare": ()}[layout]:
            shutil.copytree(photos, root / split)
        config = name_network(recipe(root, *start, name=name))
        job = prepare.prepare(config, tmp_path / f"run_{layout}", "auto", WORLD)
        assert job.lock
        job.lock.close()
        assert len(job.val_source) == expected
        assert (tmp_path / f"run_{layout}" / "split.csv").exists() == (layout != "both")
        assert bool(job.config.data.holdout_sha256) == (layout != "both")


@pytest.mark.parametrize("kinds", [("L",), ("I;16",), ("RGB", "L", "I;16", "RGBA", "P", "1")])
def test_grey_images(kinds, tmp_path):
    """8 and 16 bits become the RGB that the network takes, of the same brightness."""
    fill(tmp_path / "photos", {"dark": 12, "light": 12}, kinds)
    config = recipe(tmp_path / "photos", "optim.base_lr=2e-2", "schedule.epochs=6")
    report = train(config, tmp_path / "run")
    assert report["n"] == 4
    if len(kinds) == 1:
        assert report["top1"] == 100.0  # brightness is all there is to see


def test_a_set_smaller_than_a_batch(tmp_path, capsys):
    fill(tmp_path / "photos", {"cat": 5, "dog": 5})
    config = recipe(tmp_path / "photos", "train.batch_size=32", "augment.mixup=0.2", "optim.base_lr=1e-4")
    report = train(config, tmp_path / "run")
    assert (report["n"], report["steps"]) == (2, 2)
    printed = capsys.readouterr().out
    assert "8 training images are fewer than a global batch: train.batch_size 32 -> 8, and the rate follows" in printed
    assert "learning rate 2.5e-05 = 0.0001 x 8 / 32" in printed
    saved = final(tmp_path / "run")
    assert (saved["config"]["train"]["batch_size"], saved["plan"]["global_batch_size"]) == (8, 8)
    again = train(config, tmp_path / "run")  # the same command goes on, or here finds that it is done
    assert again["steps"] == 2
    with pytest.raises(DataError, match=r"fewer than one global batch of 32 .*: lower train.batch_size"):
        train(recipe(tmp_path / "photos", "train.batch_size=32", "train.shrink_batch=false"), tmp_path / "other")


# --------------------------------------------------------------------------------------------------- the held-out split


def test_an_evaluation_of_other_images_is_refused(photos, tmp_path):
    train(recipe(photos, "schedule.epochs=1", "schedule.warmup_epochs=0"), tmp_path / "run")
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    out = next(row["image"] for row in split_of(tmp_path / "run") if row["split"] == "val")
    (photos / out).rename(photos / f"{out}.bak")
    with pytest.raises(DataError, match="the images have changed: other ones than in the run would be held out"):
        validate(best)
    with pytest.raises(DataError, match="the images have changed since this run was started"):
        train(recipe(photos, "schedule.epochs=1", "schedule.warmup_epochs=0"), tmp_path / "run")
    assert out in [row["image"] for row in split_of(tmp_path / "run")]  # the list is still that of the run
    with pytest.raises(DataError, match=r"line .*no such file: .*paths are relative to data.root"):
        validate(best, None, ["data.source=csv", f"data.csv={tmp_path / 'run' / 'split.csv'}"])
    (photos / f"{out}.bak").rename(photos / out)
    assert validate(best)["n"] == 7


def test_going_on_is_exact(photos, tmp_path):
    """With a held-out split, a batch that was made smaller, and images that repeat in an epoch."""
    words = ("data.sampling=balanced", "train.batch_size=64", "checkpoint.every_steps=1", "schedule.epochs=4")
    train(recipe(photos, *words), tmp_path / "whole")
    with killed_after(2):
        train(recipe(photos, *words), tmp_path / "parts")
    train(recipe(photos, *words), tmp_path / "parts")
    assert differing_runs(tmp_path / "whole", tmp_path / "parts") == []
    assert (tmp_path / "whole" / "split.csv").read_text() == (tmp_path / "parts" / "split.csv").read_text()


def test_a_run_from_a_runs_configuration(photos, tmp_path):
    """config.yaml has the network and the fingerprint: it repeats the run, or says that the images have changed."""
    first = train(recipe(photos), tmp_path / "run")
    again = train(tmp_path / "run" / "config.yaml", tmp_path / "again")
    assert (again["top1"], again["loss"], again["model"]) == (first["top1"], first["loss"], first["model"])
    fill(photos / "more", {"x": 1})
    (photos / "more" / "x" / "0.png").rename(photos / "cat" / "new.png")
    shutil.rmtree(photos / "more")
    for i in range(30):
        shutil.copy(photos / "cat" / "new.png", photos / "cat" / f"new{i}.png")
    with pytest.raises(DataError, match="the images have changed"):
        train(tmp_path / "run" / "config.yaml", tmp_path / "third")
    assert not (tmp_path / "third").exists()


# ----------------------------------------------------------------------------------------- the network of a weight file


def auto(path):
    return name_network(load_config(None, ["data.root=x", "model.name=auto", f"model.checkpoint={path}"]))


def test_a_published_variant_is_told_by_its_file(tmp_path):
    with torch.device("meta"):
        model = conv2former.models.Conv2Former(num_classes=5, **conv2former.variant("conv2former_b_22k").model_args())
    state = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "b.pth.tar")
    config = auto(tmp_path / "b.pth.tar")
    assert (config.model.name, config.model.variant) == ("conv2former_b_22k", None)
    assert find_variant_of(config).train_drop_path_rate == conv2former.variant("conv2former_b_22k").train_drop_path_rate


def test_the_definition_in_a_checkpoint_is_honoured(raw_config, photos, tmp_path):
    own = {**SHAPE, "name": "conv2former_my_sum", "fusion": "sum", "ls_init_value": None, "train_drop_path_rate": 0.15}
    short = {"schedule__epochs": 1, "schedule__warmup_epochs": 0, "schedule__cooldown_epochs": 0}
    train(configure(raw_config, model__variant=own, model__drop_path_rate=None, **short), tmp_path / "own")
    best = tmp_path / "own" / "checkpoints" / "best.pt"
    config = auto(best)
    assert config.model.name == "conv2former_my_sum"
    variant = find_variant_of(config)
    assert (variant.fusion, variant.ls_init_value, variant.train_drop_path_rate) == ("sum", None, 0.15)
    report = train(recipe(photos, checkpoint=best), tmp_path / "tuned")
    assert report["model"] == "conv2former_my_sum"
    info = conv2former.inspect_checkpoint(tmp_path / "tuned" / "checkpoints" / "best.pt")
    assert (info.name, info.fusion, info.class_names) == ("conv2former_my_sum", "sum", ["cat", "dog", "emu"])


def test_files_without_a_network_for_photographs(tmp_path, official_content):
    state = official_content["state_dict"]
    part = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    for name, content, expected in (
        ("part", part, "part.pt holds a part of a network"),
        ("none", {"a": torch.zeros(1)}, "none.pt is not a Conv2Former checkpoint"),
    ):
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(CheckpointError, match=expected):
            auto(tmp_path / f"{name}.pt")
    with pytest.raises(CheckpointError, match=r"gone.pt: no such file"):
        auto(tmp_path / "gone.pt")
    torch.save({"state_dict": state, "variant": {"name": "Bad Name"}}, tmp_path / "bad.pt")
    with pytest.raises(ConfigError, match=r"bad.pt: 1 mistake:\n(.*\n)*.*name: expected a name"):
        auto(tmp_path / "bad.pt")


@pytest.mark.parametrize("lacks", [("pred.",), ("pred.", "head.")])
def test_weights_without_a_head_start_one_anew(photos, tmp_path, official_content, caplog, lacks):
    """As self-supervised training leaves them: the network is the file's, its head is fresh, and a line says so."""
    state = {key: tensor for key, tensor in official_content["state_dict"].items() if not key.startswith(lacks)}
    torch.save({"state_dict": {f"model.{key}": tensor for key, tensor in state.items()}}, tmp_path / "ssl.ckpt")
    config = recipe(photos, checkpoint=tmp_path / "ssl.ckpt")
    assert find_variant_of(config).head_hidden_size == 1280
    model = build_model(config, 3, ["cat", "dog", "emu"])
    first = official_content["state_dict"]["downsample_layers.0.0.weight"]
    assert torch.equal(model.stem.conv1.weight, first)
    assert model.head.fc.out_features == 3
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert f"the checkpoint has no {'head' if lacks[1:] else 'classifier'}: the model keeps its own" in text
    probe = recipe(photos, name="linear_probe/folder", checkpoint=tmp_path / "ssl.ckpt")
    if lacks[1:]:
        with pytest.raises(ConfigError, match=r"model\.freeze: backbone would freeze .* model\.freeze=stage4$"):
            build_model(probe, 3, ["cat", "dog", "emu"])
    else:
        build_model(probe, 3, ["cat", "dog", "emu"])


@pytest.mark.parametrize("name", ["finetune/folder", "linear_probe/folder", "imagenet1k_384/conv2former_t_384"])
def test_a_forgotten_checkpoint(name):
    """The recipe's own is not there: one sentence names the key and an example."""
    config = load_config(ROOT / "configs" / f"{name}.yaml", ["data.root=photos"])
    with pytest.raises(CheckpointError) as error:
        build_model(config, 3)
    text = str(error.value)
    assert text.startswith(
        f"{config.model.checkpoint}: no such file (model.checkpoint); give the weights to start from"
    )
    assert "model.checkpoint=runs/NAME/checkpoints/best.pt" in text


def test_a_run_folder_as_the_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.pt").touch()
    with pytest.raises(CheckpointError, match=r"give the weight file in it: .*best\.pt \(model\.checkpoint\)$"):
        auto(tmp_path)


def test_a_dry_run_names_the_network(photos):
    text = "\n".join(dry_run(recipe(photos, "train.batch_size=64")))
    assert f"conv2former_custom from {OFFICIAL}" in text
    assert "global batch 27 = 27 per device" in text


def test_another_normalisation_is_said(raw_config, photos, tmp_path):
    short = {"schedule__epochs": 1, "schedule__warmup_epochs": 0, "schedule__cooldown_epochs": 0}
    train(configure(raw_config, data__mean=[0.5, 0.5, 0.5], data__std=[0.5, 0.5, 0.5], **short), tmp_path / "own")
    best = tmp_path / "own" / "checkpoints" / "best.pt"

    def notes(*words: str) -> str:
        job = prepare.prepare(name_network(recipe(photos, *words, checkpoint=best)), tmp_path / "tuned", "auto", WORLD)
        assert job.lock
        job.lock.close()
        return "\n".join(job.notes)

    line = f"{best} was trained with another normalisation of the images than this run's; to take it: "
    assert f"{line}data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5]" in notes("data.mean=[.4,.5,.5]")
    for same in ((), ("data.mean=[.5,.5,.5]", "data.std=[.5,.5,.5]")):
        assert "another normalisation" not in notes(*same)


# --------------------------------------------------------------------------------------------------------- imbalance


def test_weights_of_classes():
    counts = np.array([1, 9, 0, 90])
    balanced, root = (class_weights(counts, kind).double().numpy() for kind in ("balanced", "sqrt"))
    for weights in (balanced, root):
        assert (weights * counts).sum() / counts.sum() == pytest.approx(1.0)
        assert weights[2] == 0
    assert balanced[[0, 1, 3]] * counts[[0, 1, 3]] == pytest.approx([100 / 3] * 3)
    assert root[0] / root[3] == pytest.approx(90**0.5)


def test_the_weighted_loss():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 3, 3, 1, 0])
    weights = torch.tensor([3.0, 0.5, 1.0, 2.0])
    each = cross_entropy(logits, labels, reduction="none") * weights[labels]
    assert WeightedCrossEntropy(weights, 0.0)(logits, labels) == pytest.approx(float(each.mean()))
    equal = WeightedCrossEntropy(torch.ones(4), 0.1)(logits, labels)
    assert equal == pytest.approx(float(LabelSmoothingCrossEntropy(0.1)(logits, labels)))
    mixed = torch.rand(6, 4, generator=generator).softmax(1)
    expected = -(weights * mixed * logits.log_softmax(1)).sum(1).mean()
    assert WeightedCrossEntropy(weights, 0.1)(logits, mixed) == pytest.approx(float(expected))


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_weights_are_in_the_training_loss_and_accumulate(raw_config, monkeypatch, mixup):
    """Two halves give the gradients of the whole, which a mean by the weights in each batch would not."""
    counts, whole = np.array([1, 20, 5]), batch(8)
    halves = [Batch(whole.images[part], whole.labels[part], []) for part in (slice(4), slice(4, 8))]
    changes = {**PLAIN, "augment__mixup": mixup, "model__freeze": "stem"}  # its BatchNorm would see half the images
    monkeypatch.setattr(Mixup, "_params_per_batch", lambda self: (0.7, False))
    if mixup:  # every pair within a half
        order = [0, 1, 7, 6, 2, 3, 5, 4]
        whole = Batch(whole.images[order], whole.labels[order], [])
        halves = [Batch(whole.images[part], whole.labels[part], []) for part in ([0, 1, 6, 7], [2, 3, 4, 5])]
    losses, gradients = [], []
    for batches, kind in (([whole], "balanced"), (halves, "balanced"), ([whole], "none")):
        config = configure(raw_config, **changes, train__class_weight=kind)
        run = build_run(config, make_plan(config, 1, 44), WORLD, build_model(config, 3), counts)
        result = train_step(run, batches, 0, FiniteCheck(WORLD, run.optimizer))
        losses.append(float(result.loss))
        gradients.append(run.model.stages[1].blocks[0].mlp.fc1.weight.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    assert abs(losses[0] - losses[2]) > 0.01
    assert not torch.allclose(gradients[0], gradients[2], rtol=0.1)


def test_what_is_said_about_classes(photos):
    config, names = recipe(photos), ["cat", "dog", "emu", "fox"]
    assert describe_classes(config, np.array([9, 9, 9, 9]), names) == "training images per class: 9"
    line = "training images per class: 3 (dog) to 9 (cat)"
    assert describe_classes(config, np.array([9, 3, 3, 3]), names) == line
    assert describe_classes(config, np.array([9, 3, 0, 3]), names) == f"{line}, none of 1 listed class: emu"
    assert "; to learn the rare ones better try data.sampling=sqrt" in describe_classes(
        config, np.array([10, 3, 3, 3]), names
    )
    for word, expected in (
        ("data.sampling=balanced", "; seen equally often (data.sampling)"),
        ("data.sampling=sqrt", "; seen in proportion to the square root of that (data.sampling)"),
        ("train.class_weight=balanced", "; weighted in the loss by one over that (train.class_weight)"),
        ("train.class_weight=sqrt", "; weighted in the loss by one over the square root of that (train.class_weight)"),
    ):
        described = describe_classes(recipe(photos, word), np.array([90, 3, 3, 3]), names)
        assert described == f"training images per class: 3 (dog) to 90 (cat){expected}"


def test_sampling_and_weights_change_a_run(photos, tmp_path, capsys):
    weights = []
    for i, word in enumerate(("data.sampling=uniform", "data.sampling=balanced", "train.class_weight=balanced")):
        report = train(recipe(photos, word), tmp_path / str(i))
        assert report["steps"] == 6  # an epoch stays as long
        weights.append(final(tmp_path / str(i))["model"]["head.fc.bias"])
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[1][2] > weights[0][2]  # the rarest class is seen more often
    assert weights[2][2] > weights[0][2]
    printed = capsys.readouterr().out
    assert "seen equally often" in printed
    assert "weighted in the loss by one over that" in printed


def test_a_classifier_is_taken_for_the_same_classes_only(tmp_path, raw_config, caplog):
    """By name: of as many others it would be the wrong one, and in another order each class keeps its own."""
    train(configure(raw_config, schedule__epochs=1, schedule__warmup_epochs=0), tmp_path / "first")
    config = configure(raw_config, model__checkpoint=str(tmp_path / "first" / "checkpoints" / "best.pt"))
    fresh = build_model(configure(raw_config), 3).state_dict()
    same = build_model(config, 3, ["a", "b", "c"]).state_dict()
    unnamed = build_model(config, 3).state_dict()
    assert all(torch.equal(tensor, unnamed[key]) for key, tensor in same.items())
    turned = build_model(config, 3, ["c", "b", "a"]).state_dict()
    assert not caplog.records
    others = build_model(config, 3, ["a", "b", "d"]).state_dict()
    assert "the checkpoint's 3 classes are others than the data's" in caplog.text
    for key, tensor in same.items():
        if key in CLASSIFIER:
            assert not torch.equal(tensor, fresh[key])
            assert torch.equal(turned[key], tensor.flip(0))
            assert torch.equal(others[key], fresh[key])
        else:
            assert torch.equal(turned[key], tensor)
            assert torch.equal(others[key], tensor)


def test_a_run_folder_is_not_among_the_classes(photos):
    for folder in (photos, photos / "run"):
        with pytest.raises(OutputError, match="lies among the class folders"):
            train(recipe(photos), folder)
    assert not (photos / "run").exists()


def test_classes_that_differ_by_capital_letters_are_named(photos):
    line = describe_classes(recipe(photos), np.array([3, 3, 2]), ["Oak", "oak", "elm"])
    assert line.endswith("names that differ by capital letters only are several classes: oak")


def test_what_timm_notes_beside_a_network_is_no_part_of_its_definition(tmp_path, official_content):
    """A folder of timm's has arguments of its entry point, which no variant has."""
    model, _ = conv2former.load_model(OFFICIAL)
    args = {**{k: list(v) for k, v in SHAPE.items() if k != "kernel_size"}, "in_chans": 3, "drop_path_rate": 0.1}
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "conv2former_t", "model_args": args}))
    assert find_variant_of(auto(tmp_path)).dims == (8, 16, 24, 32)


def test_a_run_whose_classes_were_in_another_order(tmp_path, capsys):
    """As folders of numbers were, by text: it says how it goes on, and does."""
    fill(tmp_path / "photos", {"2": 8, "10": 8})
    config = recipe(tmp_path / "photos", "schedule.epochs=1", "schedule.warmup_epochs=0")
    train(config, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*.pt*"):
        if path.suffix != ".pt":
            path.unlink()  # checksums
            continue
        content = torch.load(path, weights_only=True)
        torch.save(content | {"class_names": ["10", "2"]}, path)
    with pytest.raises(
        DataError, match="in another order than when this run was started, 2, 10 instead of 10, 2; to go"
    ):
        train(config, tmp_path / "run")
    (tmp_path / "names.txt").write_text("10\n2\n")
    allowed = ("checkpoint.allow_changes=[data.class_names]", f"data.class_names={tmp_path / 'names.txt'}")
    words = ("schedule.epochs=1", "schedule.warmup_epochs=0", *allowed)
    assert train(recipe(tmp_path / "photos", *words), tmp_path / "run")["epochs_done"] == 1


def test_weights_that_do_not_name_numbers(tmp_path, caplog):
    fill(tmp_path / "photos", {str(number): 2 for number in range(12)})
    content = torch.load(OFFICIAL, weights_only=False)
    weights = dict(content["state_dict"])
    weights["pred.weight"] = torch.randn(12, weights["pred.weight"].shape[1])
    weights["pred.bias"] = torch.randn(12)
    torch.save({"state_dict": weights}, tmp_path / "twelve.pt")
    config = recipe(tmp_path / "photos", checkpoint=tmp_path / "twelve.pt")
    model = build_model(config, 12, [str(number) for number in range(12)])
    assert torch.equal(model.get_classifier().bias, weights["pred.bias"])  # as they are
    assert "twelve.pt does not name its classes" in caplog.text
    assert "in the order 0, 1, 2, 3, 4, and 7 more" in caplog.text
