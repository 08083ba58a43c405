"""Networks with BatchNorm in the place of LayerNorm."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import conv2former
from conv2former import Conv2Former, ConvMlp, ConvMod
from conv2former.models.block import NORMS
from conv2former.ops.cpu import native
from conv2former.variants import NORM_NAMES, find_variant
from conv2former.weights.architecture import identify

from ..conftest import TINY_YAML

SHAPE = {"dims": (4, 6, 8, 10), "depths": (1, 2, 1, 1), "kernel_size": 3, "head_hidden_size": 12}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "conv2former_norms.yaml"
    path.write_text(TINY_YAML + "norm_layer: batchnorm2d\nls_init_value: null\n")
    return path


def norms(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules() if name.endswith("norm")}


def test_a_file_may_name_all_of_them():
    assert tuple(NORMS) == NORM_NAMES


def test_all_but_the_stem_follows():
    blocks = [f"stages.{s}.blocks.{b}" for s, depth in enumerate(SHAPE["depths"]) for b in range(depth)]
    places = [f"{block}.{branch}.norm" for block in blocks for branch in ("attn", "mlp")]
    places += [*(f"stages.{s}.downsample.norm" for s in (1, 2, 3)), "head_conv.norm"]
    for name, kind in (("layernorm2d", LayerNorm2d), ("batchnorm2d", nn.BatchNorm2d)):
        assert norms(Conv2Former(norm_layer=name, **SHAPE)) == dict.fromkeys(places, kind)
        assert norms(Conv2Former(norm_layer=name, output_stride=8, **SHAPE)) == dict.fromkeys(places, kind)


@pytest.mark.parametrize("fused", [True, False])
def test_what_it_computes(fused):
    """A training step moves the statistics; an evaluation is that of scales and shifts."""
    torch.manual_seed(0)
    branch = ConvMod(4, 3, fused=fused, norm_layer="batchnorm2d").double()
    x = torch.randn(5, 4, 6, 7, dtype=torch.float64)
    h = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(branch(x), branch.proj(branch.conv_dw(branch.act(branch.a(h))) * branch.v(h)))
    torch.testing.assert_close(branch.norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    branch.eval()
    h = (x - branch.norm.running_mean.view(4, 1, 1)) / (branch.norm.running_var + 1e-5).sqrt().view(4, 1, 1)
    torch.testing.assert_close(branch(x), branch.proj(branch.conv_dw(branch.act(branch.a(h))) * branch.v(h)))


def test_a_network_trains_fused_as_its_modules_do():
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = Conv2Former(num_classes=3, norm_layer="batchnorm2d", fused=fused, drop_path_rate=0.2, **SHAPE).double()
        x = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        model(x).square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers(), model.eval()(x)])
    torch.testing.assert_close(*results)


def test_operators_compute_what_lies_between_the_convolutions():
    """On a CPU with native functions, which make a step a quarter faster; where a mode looks on, the modules do."""
    model = Conv2Former(num_classes=3, norm_layer="batchnorm2d", **SHAPE)
    x = torch.rand(2, 3, 64, 64).to(memory_format=torch.channels_last)

    def operators() -> set[str]:
        with torch.profiler.profile() as profile:
            model(x).sum().backward()
        return {name for name in ("modulate", "mlp_mix") if any(name in event.key for event in profile.key_averages())}

    assert operators() == ({"modulate", "mlp_mix"} if native.usable(torch.float32) else set())
    with FlopCounterMode(display=False) as counter:
        assert operators() == set()
    plain = Conv2Former(num_classes=3, norm_layer="batchnorm2d", fused=False, **SHAPE)
    with FlopCounterMode(display=False) as reference:
        plain(x).sum().backward()
    assert counter.get_total_flops() == reference.get_total_flops() > 0


def test_in_timm(path):
    name = conv2former.register_variant(path)
    model = timm.create_model(name, num_classes=7).eval()
    x = torch.rand(2, 3, 64, 64)
    maps = timm.create_model(name, features_only=True, feature_cls="getter").eval()
    maps.model.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(maps(x)[-1], model.forward_features(x))
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))


def test_a_file_tells_it(path, tmp_path):
    name = conv2former.register_variant(path)
    model = timm.create_model(name, num_classes=2).eval()
    with torch.no_grad():
        for buffer in (buffer for key, buffer in model.named_buffers() if "running" in key):
            buffer.add_(torch.rand_like(buffer))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again, info = conv2former.load_model(tmp_path / "weights.pt", expect=path)
    assert (info.norm_layer, info.variant) == ("batchnorm2d", name)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    usual = {key: tensor for key, tensor in model.state_dict().items() if "blocks" not in key or "running" not in key}
    assert identify(usual).norm_layer == "layernorm2d"
    assert find_variant(dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), norm_layer="layernorm2d", kernel_size=7) != name
    # the tensors of the other kind do not fit, and the error says which networks they are
    other = Conv2Former(num_classes=2, **{**SHAPE, "dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "kernel_size": 7})
    torch.save(other.state_dict(), tmp_path / "other.pt")
    with pytest.raises(conv2former.CheckpointError, match="norm_layer layernorm2d for batchnorm2d"):
        conv2former.load_model(tmp_path / "other.pt", expect=path)


def test_an_unknown_norm_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(TINY_YAML + "norm_layer: groupnorm\n")
    with pytest.raises(conv2former.ConfigError, match="norm_layer: expected one of layernorm2d, batchnorm2d, found"):
        conv2former.register_variant(path)
    for make in (lambda: Conv2Former(norm_layer="groupnorm"), lambda: ConvMlp(4, norm_layer="groupnorm")):
        with pytest.raises(ValueError, match="norm_layer must be one of layernorm2d, batchnorm2d: 'groupnorm'"):
            make()
