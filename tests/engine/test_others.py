"""Networks of timm's registry besides Conv2Former: training, and all that is done with what comes out."""

from __future__ import annotations

import copy
import logging
import re
import sys

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

import conv2former
from conv2former import CheckpointError, ConfigError
from conv2former.data import Batch
from conv2former.engine import build, dry_run, train, trainer
from conv2former.engine.build import fit_memory_format
from conv2former.engine.images import settle_images
from conv2former.errors import OutputError
from conv2former.models import others as models_others
from conv2former.models.others import overwriting_convolution
from conv2former.tasks import others
from conv2former.tasks.network import build_model, find_network, freeze, name_network
from conv2former.tasks.registry import find_task
from conv2former.tools.checkpoints.average import average
from conv2former.tools.checkpoints.convert import convert
from conv2former.tools.checkpoints.publish import write_folder
from conv2former.tools.evaluation.validate import validate
from conv2former.tools.export.export import export
from conv2former.tools.export.opening import read_metadata
from conv2former.tools.export.options import Options
from conv2former.tools.prediction.explain import Explainer
from conv2former.tools.prediction.predict import Predictor
from conv2former.tools.runs.comparing import differing
from conv2former.weights.reading import read_checkpoint

from .conftest import configure, killed_after
from .test_step import make_run
from .test_trainer import final

ARGS = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
CONVNEXT = {"name": "timm/convnext_tiny", "args": ARGS, "drop_path_rate": 0.2, "drop_rate": 0.1}
VIT = {
    "name": "timm/vit_tiny_patch16_224",
    "args": {"depth": 1, "embed_dim": 16, "num_heads": 2, "pos_drop_rate": 0.0},
}
SHORT = {"schedule__epochs": 1, "schedule__warmup_epochs": 0, "schedule__cooldown_epochs": 0}


@pytest.fixture
def raw_other(raw_config) -> dict:
    """As `raw_config`, everything that draws random numbers or keeps state on, of a small ConvNeXt."""
    return {**raw_config, "model": copy.deepcopy(CONVNEXT)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A state dict that notes nothing, of a ConvNeXt of three classes."""
    path = tmp_path_factory.mktemp("weights") / "plain.safetensors"
    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model("convnext_tiny", num_classes=3, **ARGS).state_dict(), path)
    return path


@pytest.mark.slow
def test_a_run_goes_on_exactly_and_its_checkpoint_is_of_use(raw_other, tmp_path, capsys):
    """With accumulation, drop path, layer decay and averaged weights."""
    config = configure(raw_other, **SHORT, checkpoint__every_steps=1)
    report = train(config, tmp_path / "whole")
    assert report["model"] == "timm/convnext_tiny"
    assert "depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]) from scratch, drop path 0.2" in capsys.readouterr().out
    assert report["kernels"]["network"] == "PyTorch, module by module"
    with killed_after(3):
        train(config, tmp_path / "parts")
    train(config, tmp_path / "parts")
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    for key in ("model", "model_ema", "optimizer", "best_metric"):
        assert not differing(whole[key], parts[key]), key
    assert whole["variant"] == {"name": "timm/convnext_tiny", "args": ARGS, "in_chans": 3}

    best = tmp_path / "whole" / "checkpoints" / "best.pt"
    row = validate(best)
    assert (row["variant"], row["weights"]) == ("timm/convnext_tiny", "average")
    assert (row["top1"], row["loss"]) == (report["top1"], report["loss"])
    predictor = Predictor(best)
    assert predictor.class_names == ["a", "b", "c"]
    assert str(predictor).startswith("timm/convnext_tiny of best.pt: 3 classes")
    with pytest.raises(ConfigError, match=r"--explain: timm/convnext_tiny has no modulation"):
        Explainer(predictor)

    done = export(best, tmp_path / "model.pt2", Options(), lambda text: None)
    assert [case.shape for case in done.cases] == [(1, 3, 32, 32), (3, 3, 32, 32)]
    assert read_metadata(tmp_path / "model.pt2")["variant"] == "timm/convnext_tiny"

    last = tmp_path / "parts" / "checkpoints" / "last.pt"
    average([best, last], tmp_path / "soup.pt", say=lambda text: None)
    soup = conv2former.load_model(tmp_path / "soup.pt")[0].state_dict()
    parts = [conv2former.load_model(path)[0].state_dict()["stem.0.weight"] for path in (best, last)]
    assert torch.allclose(soup["stem.0.weight"], sum(parts) / 2)

    converted = convert(best)
    write_folder(converted, tmp_path / "folder")
    assert validate(tmp_path / "folder", overrides=[f"data.root={raw_other['data']['root']}"])["loss"] == row["loss"]
    assert "conv2former" not in (tmp_path / "folder" / "README.md").read_text().split("## Recipe")[0]
    for arguments in ({"name": "convnext_tiny.mine"}, {"needs_tag": True}):
        with pytest.raises(ConfigError, match=r"--install and --name are for Conv2Former, .* timm/convnext_tiny"):
            convert(best, **arguments)

    auto = configure(raw_other, **SHORT, model__checkpoint=str(best), model__name="auto", model__args={})
    named = name_network(auto).model
    assert (named.name, named.args, named.fused) == ("timm/convnext_tiny", ARGS, False)
    own, theirs = build_model(auto, 3, ["c", "b", "a"]), whole["model_ema"]
    assert torch.equal(own.head.fc.weight, final(tmp_path / "whole")["model_ema"]["head.fc.weight"].flip(0))
    assert torch.equal(own.stem[0].weight, theirs["stem.0.weight"])


# ----------------------------------------------------------------------------------------------------- starting weights


def test_a_file_that_notes_nothing_is_the_configured_network(raw_other, weights, tmp_path, caplog):
    config = configure(raw_other, model__checkpoint=str(weights), model__head_init_scale=0.001)
    theirs = read_checkpoint(weights)
    assert torch.equal(build_model(config, 3).head.fc.weight, theirs["head.fc.weight"])
    other = build_model(config, 5)
    assert "a classifier for 3 classes: the model keeps its own for 5 classes" in caplog.text
    assert other.head.fc.weight.shape == (5, 32)
    assert other.head.fc.weight.abs().max().item() < 1e-3
    assert torch.equal(other.stem[0].weight, theirs["stem.0.weight"])
    grey = build_model(configure(raw_other, model__checkpoint=str(weights), model__in_chans=1), 3)
    assert torch.allclose(grey.stem[0].weight, theirs["stem.0.weight"].sum(1, keepdim=True))

    for changes, message in (
        ({"model__name": "timm/resnet18", "model__args": {}}, r"plain\.safetensors does not hold .* timm/resnet18"),
        ({"model__args": {**ARGS, "depths": [1, 1, 2, 1]}}, r"missing: stages\.2\.blocks\.1"),
        ({"model__name": "auto", "model__args": {}}, r"not a Conv2Former checkpoint.* timm/NAME"),
    ):
        with pytest.raises(CheckpointError, match=message):
            build_model(configure(raw_other, model__checkpoint=str(weights), **changes), 3)

    root = f"data.root={raw_other['data']['root']}"
    plain = tmp_path / "resnet.pth"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), plain)
    words = [root, "data.source=hf", "data.img_size=32"]
    assert validate(plain, overrides=words, model="timm/test_resnet")["variant"] == "timm/test_resnet"
    torch.save({"arch": "test_resnet", "state_dict": torch.load(plain)}, plain)  # as timm's script does
    assert validate(plain, overrides=words)["variant"] == "timm/test_resnet"
    with pytest.raises(CheckpointError, match="is not timm/resnet18 but timm/test_resnet"):
        validate(plain, overrides=words, model="timm/resnet18")


def test_networks_of_one_size(raw_other, tmp_path):
    """What the constructor takes is data.img_size; weights are fitted to another one for training alone."""
    config = configure({**raw_other, "model": VIT}, **SHORT)
    report = train(config, tmp_path)
    best = report["checkpoint"]
    assert final(tmp_path)["variant"]["args"]["img_size"] == [32, 32]
    with pytest.raises(ConfigError, match=r"data\.img_size: .*best\.pt does not take images of 64 x 64 \(Input height"):
        validate(best, overrides=["data.img_size=64"])
    with pytest.raises(ConfigError, match=r"data\.img_size: .*best\.pt does not take images of 64 x 64"):
        Predictor(best, ["data.img_size=64"])
    larger = configure(
        raw_other, **SHORT, model__name="auto", model__args={}, model__checkpoint=best, data__img_size=64,
        model__drop_path_rate=None, model__drop_rate=0.0,
    )  # fmt: skip
    model = build_model(larger, 3)
    assert model.pos_embed.shape == (1, 17, 16)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, final(tmp_path)["model_ema"]["blocks.0.mlp.fc1.weight"])
    growing = configure({**raw_other, "model": VIT}, data__img_size=64, augment__first_img_size=32, schedule__epochs=2)
    with pytest.raises(
        ConfigError, match=r"augment\.first_img_size: timm/vit_tiny_patch16_224 does not take .* 32 x 32"
    ):
        find_task(growing).build_model(growing, 3, None)


def test_timms_own_folders(raw_other, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("convnext_tiny", num_classes=3, **ARGS).eval()
    save_for_hf(model, tmp_path / "folder", model_args=ARGS, safe_serialization=True)
    loaded, info = conv2former.load_model(tmp_path / "folder")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert (info.name, info.num_classes) == ("timm/convnext_tiny", 3)
    with pytest.raises(CheckpointError, match=r"not a Conv2Former; give model\.name=auto"):
        build_model(
            configure({**raw_other, "model": {"checkpoint": str(tmp_path / "folder"), "name": "conv2former_t"}}), 3
        )


def test_pretrained_weights(raw_other, monkeypatch, weights):
    """Without the hub one sentence says what is missing; with it their images are the run's."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = configure(raw_other, model__pretrained=True)
    with pytest.raises(
        CheckpointError,
        match=r"model\.pretrained: the weights timm/convnext_tiny\.in12k_ft_in1k cannot be had from timm/",
    ):
        build_model(config, 3)
    settled, lines = settle_images(configure({**raw_other, "model": {"name": "timm/test_resnet", "pretrained": True}}))
    assert "32 x 32 from the configuration; 3 channels (RGB), bilinear, crop 0.95, mean 0.5, 0.5, 0.5" in lines[0]
    assert lines[0].endswith("std 0.5, 0.5, 0.5 of timm's weights")
    assert settled.data.mean == (0.5, 0.5, 0.5)
    with pytest.raises(CheckpointError, match=r"timm knows no weights of timm/starnet_s050; leave it out"):
        build_model(configure(raw_other, model__pretrained=True, model__args={}, model__name="timm/starnet_s050"), 3)
    real = timm.create_model

    def from_file(name, pretrained, **options):
        found = {"state_dict": read_checkpoint(weights), "num_classes": 3}
        return real(name, pretrained, **options, pretrained_cfg_overlay=found)

    monkeypatch.setattr(models_others.timm, "create_model", from_file)
    model = build_model(config, 5)
    assert torch.equal(model.stem[0].weight, read_checkpoint(weights)["stem.0.weight"])


def test_hostile_notes(weights, tmp_path):
    """No file lets a network be built that is far larger than it, nor names files or addresses of its own."""
    for args, message in (
        ({"depths": [10**6] * 4}, "damaged or made to harm"),
        ({"dims": [10**7] * 4}, "damaged or made to harm"),
        ({"dims": [[[[10**7]]]]}, "damaged or made to harm"),
        ({**ARGS, "dims": [4096] * 4}, "does not hold the weights of .*: that has .*, and the file "),
        ({"checkpoint_path": "/etc/passwd"}, r"model\.args\.checkpoint_path"),
        ({"pretrained_cfg_overlay": {"url": "http://localhost"}}, r"model\.args\.pretrained_cfg_overlay"),
        ([1], "the note of its network is not one"),
        ({"a b": 1}, "is no name of an argument"),
    ):
        content = {"model": read_checkpoint(weights), "variant": {"name": "timm/convnext_tiny", "args": args}}
        torch.save(content, tmp_path / "hostile.pt")
        with pytest.raises(CheckpointError, match=message) as caught:
            conv2former.load_model(tmp_path / "hostile.pt")
        assert str(caught.value).startswith(str(tmp_path / "hostile.pt"))
    content["variant"] = {"name": "timm/no_such_network"}
    torch.save(content, tmp_path / "hostile.pt")
    with pytest.raises(CheckpointError, match="timm has no network 'no_such_network'"):
        conv2former.load_model(tmp_path / "hostile.pt")


# -------------------------------------------------------------------------------------------------------- configuration


MISTAKES = [
    ({"name": "timm/convnext_tinny"}, r"model\.name: timm has no network 'convnext_tinny'; near it: convnext_tiny, "),
    ({"name": "timm/convnext_tiny.foo"}, r"model\.name: timm's convnext_tiny has no weights 'foo'; it has: .*in12k"),
    ({**CONVNEXT, "args": {"dephts": [1]}}, r"model\.args\.dephts: .* takes no dephts; leave it out"),
    ({**CONVNEXT, "args": {"depths": [1]}}, r"model\.args: timm cannot build timm/convnext_tiny\("),
    ({**CONVNEXT, "args": {"img_size": 48}}, r"model\.args\.img_size: .* takes no img_size; leave it out"),
    ({**CONVNEXT, "args": {"drop_rate": 0.1}}, r"model\.args\.drop_rate: set model\.drop_rate"),
    ({**CONVNEXT, "args": {**ARGS, "global_pool": ""}}, r"model\.args: .* not with a logit for each"),
    ({**CONVNEXT, "pretrained": True, "checkpoint": "x"}, r"model\.pretrained: and model\.checkpoint are two starts"),
    ({**CONVNEXT, "variant": {"dims": [8]}}, r"model\.variant: a Conv2Former of your own, and model\.name"),
    ({"name": "timm/dla34", "grad_checkpointing": True}, r"model\.grad_checkpointing: timm/dla34 cannot recompute"),
    ({"name": "timm/dla34", "drop_path_rate": 0.1}, r"model\.drop_path_rate: timm/dla34 takes no drop_path_rate"),
    ({"name": "timm/conv2former_t", "args": ARGS}, r"model\.args: .* conv2former_t is a Conv2Former; leave it out"),
    ({"name": "conv2former_t", "args": ARGS}, r"model\.args: for model\.name: timm/NAME"),
    ({"name": "conv2former_t", "pretrained": True}, r"model\.pretrained: for model\.name: timm/NAME"),
    ({**VIT, "freeze": "stage1"}, r"model\.freeze: timm/vit_tiny_patch16_224 has no four stages"),
]


@pytest.mark.parametrize(("model", "message"), MISTAKES)
def test_mistakes_are_one_sentence(raw_config, model, message):
    with pytest.raises(ConfigError, match=message):
        build_model(configure({**raw_config, "model": model}), 3)


@pytest.mark.parametrize(("args", "keys"), [({}, "data.img_size"), ({"depth": 1}, "data.img_size or model.args")])
def test_a_size_that_a_constructor_refuses(raw_config, args, keys):
    model = {"name": "timm/xcit_nano_12_p16_224", "args": args}
    with pytest.raises(ConfigError, match=rf"^{re.escape(keys)}: timm cannot build .*.patch_size. should divide"):
        build_model(configure({**raw_config, "model": model}, data__img_size=40), 3)


def test_timm_conv2former_is_this_projects_own(raw_config):
    config = configure({**raw_config, "model": {"name": "timm/conv2former_n"}})
    assert name_network(config).model.name == find_network(config).name == "conv2former_n"
    assert name_network(config).model.fused


def test_a_dry_run(raw_other):
    lines = dry_run(configure(raw_other, data__num_classes=4, model__grad_checkpointing=True))
    assert any(line.startswith("timm/convnext_tiny(depths=") for line in lines)
    assert any(line.endswith(" parameters, 4 classes") for line in lines)


def test_a_convolution_that_would_crash_in_channels_last(raw_other, tmp_path, capsys, monkeypatch):
    """PyTorch writes its gradient beyond its memory. The run goes on from a configuration that says nothing of it."""
    with torch.device("meta"):
        names = [overwriting_convolution(timm.create_model(name)) for name in ("mobileone_s0", "fastvit_t8")]
    assert names == ["stem.conv_scale.conv", "stem.0.conv_scale.conv"]
    config = configure(raw_other, **SHORT)
    assert fit_memory_format(config, build_model(config, 3), torch.device("cpu")) == (config, [])
    monkeypatch.setattr(build, "overwriting_convolution", lambda model: "stem.conv")
    assert fit_memory_format(config, torch.nn.Identity(), torch.device("cuda")) == (config, [])
    line = "train.channels_last: false on this CPU, where PyTorch's gradient of stem.conv, a 1 x 1 convolution"
    assert any(text.startswith(line) for text in dry_run(config))
    with killed_after(2):
        train(config, tmp_path)
    assert line in capsys.readouterr().out
    train(config, tmp_path)
    assert (config.train.channels_last, final(tmp_path)["config"]["train"]["channels_last"]) == (True, False)


# -------------------------------------------------------------------------------------------------- freezing, optimizer


def test_layer_decay_and_weight_decay_are_the_networks_own(raw_config):
    run = make_run({**raw_config, "model": VIT})
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    scale = {id(p): group["lr_scale"] for group in run.optimizer.param_groups for p in group["params"]}
    model = run.model
    assert decay[id(model.pos_embed)] == 0.0  # two of its dimensions are above 1: no_weight_decay() names it
    assert decay[id(model.blocks[0].mlp.fc1.weight)] == 0.05
    rates = [scale[id(p)] for p in (model.pos_embed, model.blocks[0].mlp.fc1.weight, model.head.weight)]
    assert rates == pytest.approx([0.81, 0.9, 1.0])


@pytest.mark.parametrize("until", ["stem", "stage1", "stage3", "stage4", "backbone"])
def test_what_is_frozen_stays(raw_other, until):
    """Weights, BatchNorm's statistics, drop path; and what comes after it trains."""
    raw = {**raw_other, "model": {"name": "timm/test_resnet", "freeze": until}}
    run = make_run(raw)
    model = run.model
    order = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    frozen = order[: {"stem": 1, "stage1": 2, "stage3": 4, "stage4": 5, "backbone": 5}[until]]
    before = copy.deepcopy(model.state_dict())
    run.forward.train()
    freeze(model, until)
    for name in order:
        assert model.get_submodule(name).training == (name not in frozen), name
    assert model.training  # or there would be no dropout before the classifier
    images = torch.randn(4, 3, 32, 32)
    batch = Batch(images, torch.tensor([0, 1, 2, 0]), [])
    trainer.train_step(run, [batch, batch], 0, trainer.FiniteCheck.of(run))
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert not [key for key in changed if key.split(".")[0] in frozen]
    assert {name for name in order if any(key.startswith(name) for key in changed)} == {*order} - {*frozen}
    assert "fc.weight" in changed


def test_a_compiled_run(raw_other, monkeypatch):
    """Through the compiler's front end, without code generation; what is saved has the network's own names."""
    torch._dynamo.reset()
    monkeypatch.setattr(others.Compiled.__init__, "__defaults__", ("eager",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/as/given")
    model = {**CONVNEXT, "drop_path_rate": 0.0, "drop_rate": 0.0}
    losses = []
    for compiles in (False, True):
        run = make_run({**raw_other, "model": model}, train__compile=compiles)
        assert isinstance(run.forward, others.Compiled) is compiles
        assert not any("program" in key for key in run.model.state_dict())
        batch = Batch(torch.ones(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), [])
        losses.append(float(trainer.train_step(run, [batch], 0, trainer.FiniteCheck.of(run)).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_refusals_of_torch_are_one_sentence(raw_other, tmp_path, monkeypatch, capsys):
    report = train(configure(raw_other, **SHORT), tmp_path / "run")
    capsys.readouterr()

    def refuse(*args, **options):
        print("def forward(self, x):")
        print("def forward(self, x):", file=sys.stderr)
        logging.getLogger("torch.export").error("def forward(self, x):")
        raise NotImplementedError("no such layer\nin line 3")

    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(OutputError, match=r"torch cannot write timm/convnext_tiny so \(no such layer\): --fixed"):
        export(report["checkpoint"], tmp_path / "model.pt2", Options(), lambda text: None)
    assert not (tmp_path / "model.pt2").exists()
    assert capsys.readouterr() == ("", "")  # without the pages of torch's graph
