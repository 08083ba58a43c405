"""timm's model contract, for every variant: on the meta device, or with tiny inputs where values matter."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import FeatureInfo, group_parameters
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

import conv2former
from conv2former import Conv2Former

VARIANTS = ["conv2former_n", "conv2former_t", "conv2former_s", "conv2former_b", "conv2former_b_22k", "conv2former_l"]
# parameters with 1,000 and 21,841 classes, GMACs at 224 and 384
SIZES = {
    "conv2former_n": (14_992_840, 41_690_161, 2.330, 6.846),
    "conv2former_t": (26_697_204, 53_394_525, 4.361, 12.812),
    "conv2former_s": (50_032_692, 76_730_013, 8.708, 25.590),
    "conv2former_b": (90_029_112, 116_726_433, 15.890, 46.695),
    "conv2former_b_22k": (88_784_952, 115_482_273, 15.565, 45.739),
    "conv2former_l": (198_893_736, 225_591_057, 36.037, 105.904),
}


SHALLOW = {"depths": (1, 1, 1, 1)}  # for what all blocks but the first of a stage have nothing to do with


def meta(name: str, **kwargs):
    return timm.create_model(name, device="meta", **kwargs)


def images(size: int, batch_size: int = 1, **kwargs) -> torch.Tensor:
    return torch.randn(batch_size, 3, size, size, **kwargs)


def lively(model: Conv2Former) -> Conv2Former:
    """Sets the layer scales to 1, so that the blocks do something."""
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(parameter)
    return model


@pytest.fixture
def model(tiny) -> Conv2Former:
    torch.manual_seed(0)
    return lively(timm.create_model(tiny, num_classes=7)).eval()


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_macs(name):
    parameters, parameters_22k, gmacs_224, gmacs_384 = SIZES[name]
    model = meta(name)
    assert count(model) == parameters
    assert count(meta(name, num_classes=21841)) == parameters_22k
    for size, expected in ((224, gmacs_224), (384, gmacs_384)):
        with FlopCounterMode(display=False) as counter:
            model.eval()(images(size, device="meta"))
        assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_default_cfg_is_true(name):
    for tagged in [name, *(f"{name}.{tag.tag}" for tag in conv2former.variant(name).pretrained)]:
        model = meta(tagged, **SHALLOW).eval()
        cfg = model.default_cfg
        x = torch.randn(1, *cfg["input_size"], device="meta")
        features = model.forward_features(x)
        pre_logits = model.forward_head(features, pre_logits=True)
        assert features.shape == (1, model.num_features, *cfg["pool_size"])
        assert pre_logits.shape == (1, model.head_hidden_size) == (1, 1280)
        assert model(x).shape == (1, cfg["num_classes"])
        names = model.state_dict()
        assert f"{cfg['first_conv']}.weight" in names
        assert f"{cfg['classifier']}.weight" in names
        assert model.get_classifier() is model.get_submodule(cfg["classifier"])


@pytest.mark.parametrize("name", VARIANTS)
def test_heads(name):
    x = images(96, device="meta")
    model = meta(name, **SHALLOW).eval()
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(x).shape == (1, 1280)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, 1280, 3, 3)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (1, 5)
    model.reset_classifier(6, "catavgmax")
    assert model(x).shape == (1, 6)
    assert model.head_hidden_size == 2560
    assert meta(name, num_classes=0, global_pool="", **SHALLOW).eval()(x).shape == (1, 1280, 3, 3)
    assert meta(name, num_classes=4, global_pool="", **SHALLOW).eval()(x).shape == (1, 4, 3, 3)  # dense class maps
    assert meta(name, in_chans=1, **SHALLOW).eval()(x[:, :1]).shape == (1, 1000)


FEATURE_INDICES = [(0, 1, 2, 3), (1, 3), (2,), (-1,), (-2, -1), 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "out_indices"),
    [*((VARIANTS[0], indices) for indices in FEATURE_INDICES), *((name, (1, -1)) for name in VARIANTS[1:])],
)
def test_features_only(name, out_indices):
    model = meta(name, features_only=True, out_indices=out_indices).eval()
    maps = model(images(96, device="meta"))
    info = model.feature_info
    expected = [(1, c, 96 // r, 96 // r) for c, r in zip(info.channels(), info.reduction(), strict=True)]
    assert [tuple(m.shape) for m in maps] == expected
    wanted = range(4)[-out_indices:] if isinstance(out_indices, int) else [i % 4 for i in out_indices]
    assert info.reduction() == [4 * 2**i for i in wanted]


@pytest.mark.parametrize("feature_cls", ["list", "getter", "hook", "fx", "dict"])
def test_feature_extractors_agree(model, tiny, feature_cls):
    source = {"state_dict": model.state_dict()}
    extractor = timm.create_model(
        tiny, features_only=True, feature_cls=feature_cls, pretrained=True, pretrained_cfg_overlay=source
    ).eval()
    x = images(64)
    maps = extractor(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    for actual, expected in zip(maps, model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.allclose(actual, expected, atol=1e-6)


def test_intermediates(model):
    x = images(64)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert len(maps) == 4
    assert torch.equal(maps[-1], final)
    info = FeatureInfo(model.feature_info, 4)
    assert [m.shape[1] for m in maps] == info.channels()
    assert torch.equal(
        model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)[0], maps[1]
    )
    early, _ = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert torch.equal(early, maps[1])


@pytest.mark.parametrize(("indices", "kept"), [([1], 2), (1, 4), ([0, 2], 3)])
def test_prune(model, indices, kept):
    x = images(64)
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    pruned = copy.deepcopy(model)
    taken = pruned.prune_intermediate_layers(indices)
    assert len(pruned.stages) == kept
    for actual, wanted in zip(pruned.forward_intermediates(x, taken, intermediates_only=True), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert (
        pruned(x).shape[1] == pruned.num_features == pruned.head_hidden_size == model.feature_info[kept - 1]["num_chs"]
    )
    pruned.reset_classifier(3, "avg")
    assert pruned(x).shape == (1, 3)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride(output_stride):
    model = meta("conv2former_n", features_only=True, output_stride=output_stride).eval()
    assert model.feature_info.reduction() == [min(s, output_stride) for s in (4, 8, 16, 32)]
    assert model(images(96, device="meta"))[-1].shape[-1] == 96 // output_stride


def test_output_stride_computes_the_same_at_the_same_pixels(model, tiny):
    """Where both networks have a pixel they agree, so weights trained with stride 32 hold for 8 and 16."""
    x = images(96)
    expected = model.forward_features(x)
    for output_stride in (8, 16):
        dilated = timm.create_model(tiny, num_classes=7, output_stride=output_stride).eval()
        dilated.load_state_dict(model.state_dict())
        step = 32 // output_stride
        assert torch.allclose(dilated.forward_features(x)[..., ::step, ::step], expected, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_stem_for_small_images(fused):
    shape = {"dims": (4, 6, 8, 10), "depths": (1, 1, 1, 1), "kernel_size": 3, "fused": fused}
    small = Conv2Former(stem_stride=2, **shape)
    assert [info["reduction"] for info in small.feature_info] == [2, 4, 8, 16]
    assert [y.shape[-1] for y in small.forward_intermediates(images(32), intermediates_only=True)] == [16, 8, 4, 2]
    dilated = Conv2Former(stem_stride=2, output_stride=8, **shape)
    assert dilated.forward_features(images(32)).shape[-1] == 4
    # without a stride in its first convolution the stem sees every second pixel as the usual one does
    usual, x = Conv2Former(**shape), images(32)
    usual.load_state_dict(small.state_dict())
    torch.testing.assert_close(small.stem.conv1(x)[..., ::2, ::2], usual.stem.conv1(x))


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_stem_stride_must_be_known(stride):
    with pytest.raises(ValueError, match="stem_stride must be 2 or 4"):
        Conv2Former(stem_stride=stride)


def test_output_stride_must_be_known(tiny):
    with pytest.raises(ValueError, match="output_stride"):
        timm.create_model(tiny, output_stride=4)


def test_grad_checkpointing_changes_nothing(tiny):
    torch.manual_seed(0)
    model = lively(timm.create_model(tiny, num_classes=3, drop_path_rate=0.3).double()).train()
    x = images(64, batch_size=4, dtype=torch.float64)

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        clone = copy.deepcopy(model)
        clone.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)  # of drop path
        clone(x).square().sum().backward()
        return [p.grad for p in clone.parameters()]

    saved = {True: 0, False: 0}
    for checkpointing in saved:
        clone = copy.deepcopy(model)
        clone.set_grad_checkpointing(checkpointing)
        weights = {p.data_ptr() for p in clone.parameters()}

        def note(tensor: torch.Tensor, key: bool = checkpointing, weights: set[int] = weights) -> torch.Tensor:
            saved[key] += 0 if tensor.data_ptr() in weights else tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            clone(x)
    assert saved[True] < saved[False] * 2 / 3, "checkpointing keeps as much as before"
    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_layer_groups(name):
    model = meta(name)
    layer_of = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layer_of) == {n for n, _ in model.named_parameters()}
    last = max(layer_of.values())
    assert set(layer_of.values()) == set(range(last + 1))
    assert 7 <= last <= 13
    of = {
        key: {layer for n, layer in layer_of.items() if n.startswith(key)} for key in ("stem", "head.fc", "head_conv")
    }
    assert (of["stem"], of["head.fc"], of["head_conv"]) == ({0}, {last}, {last - 1})
    # from block to block through the network the group never falls, and a block is in one group
    order = []
    for s, depth in enumerate(conv2former.variant(name).depths):
        for b in range(depth):
            groups = {layer for n, layer in layer_of.items() if n.startswith(f"stages.{s}.blocks.{b}.")}
            assert len(groups) == 1
            order += groups
        if s:
            downsample = {layer for n, layer in layer_of.items() if n.startswith(f"stages.{s}.downsample.")}
            assert downsample == {order[-depth]}
    assert order == sorted(order)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert sorted(set(coarse.values())) == [0, 1, 2, 3, 4, 5]


def test_layer_decay_scales_rates(model):
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}
    assert len(groups) == len(names)
    last = max(group_parameters(model, model.group_matcher(), reverse=True).values())
    assert groups["head.fc.weight"]["lr_scale"] == 1.0
    assert groups["stem.conv1.weight"]["lr_scale"] == pytest.approx(0.5**last)
    assert groups["stages.0.blocks.0.ls1.gamma"]["weight_decay"] == 0.0
    assert groups["stages.0.blocks.0.attn.a.weight"]["weight_decay"] == 0.1


def test_drop_path_grows_over_the_whole_network():
    model = Conv2Former(dims=(8, 8, 8, 8), depths=(2, 1, 3, 2), kernel_size=3, drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)], abs=1e-6)


def test_initial_values():
    torch.manual_seed(0)
    model = timm.create_model("conv2former_n", head_init_scale=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            assert torch.all(parameter == 1e-6), name
        elif name.endswith("bias"):
            assert torch.all(parameter == 0), name
        elif "norm" in name:
            assert torch.all(parameter == 1), name
        elif parameter.numel() > 5000:
            assert parameter.std().item() == pytest.approx(0.01 if name == "head.fc.weight" else 0.02, rel=0.1), name


@pytest.mark.parametrize(
    "wrong",
    [
        {"dims": (8, 8, 8)},
        {"dims": (7, 8, 8, 8)},
        {"depths": (1, 1, 0, 1)},
        {"kernel_size": 4},
        {"kernel_size": (3, 3)},
    ],
)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"stages|dims|kernel_size"):
        Conv2Former(**wrong, device="meta")


def test_channels_last_and_odd_sizes(model):
    x = torch.randn(2, 3, 75, 101)
    expected = model(x)
    assert torch.allclose(
        model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)),
        expected,
        atol=1e-5,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_torchscript_and_fx(model):
    from torchvision.models.feature_extraction import create_feature_extractor

    x = images(64)
    expected = model(x)
    assert torch.allclose(torch.jit.script(model)(x), expected, atol=1e-6)
    traced = torch.fx.symbolic_trace(model)
    assert torch.allclose(traced(x), expected, atol=1e-6)  # of the modules: their plain way
    assert torch.allclose(torch.jit.script(traced)(x), expected, atol=1e-6)  # needs real annotations in `forward`
    extractor = create_feature_extractor(model, {"stages.2": "c4"})
    assert torch.allclose(extractor(x)["c4"], model.forward_intermediates(x)[1][2], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_fx_traces_every_variant(name):
    model = meta(name).eval()
    assert torch.fx.symbolic_trace(model)(images(64, device="meta")).shape == (1, 1000)


@pytest.mark.slow
def test_export_with_dynamic_shapes(model):
    dim = torch.export.Dim
    dynamic = {"x": {0: dim("n", max=64), 2: dim("h", min=64, max=512), 3: dim("w", min=64, max=512)}}
    program = torch.export.export(model, (images(64, batch_size=2),), dynamic_shapes=dynamic)
    for shape in ((3, 3, 96, 75), (1, 3, 65, 64)):
        x = torch.randn(*shape)
        assert torch.allclose(program.module()(x), model(x), atol=1e-5)


@pytest.mark.slow
def test_compile_without_graph_breaks(model):
    x = images(64, batch_size=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
    model.train()
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_constructor_dtype_and_device(dtype, tiny):
    model = timm.create_model(tiny, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(images(64, dtype=dtype)).dtype == dtype
    model.reset_classifier(3)
    assert model.head.fc.weight.dtype == dtype
    assert {p.device.type for p in timm.create_model(tiny, device="meta").parameters()} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name):
    model = meta(name, num_classes=4, drop_path_rate=0.2).train()
    model(images(64, batch_size=2, device="meta")).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
