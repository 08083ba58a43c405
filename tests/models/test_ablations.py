"""The ablations of the modulation: what each computes, and that each keeps the contract of the network."""

from __future__ import annotations

import pytest
import timm
import torch

import conv2former
from conv2former import Conv2Former, ConvMod
from conv2former.models.ablations import FUSIONS
from conv2former.variants import FUSION_NAMES, find_variant, read_variant

from ..conftest import ROOT, TINY_YAML

ABLATIONS = sorted((ROOT / "configs" / "variants" / "ablations").glob("*.yaml"))
OTHERS = [name for name in FUSIONS if name != "product"]


@pytest.fixture(params=OTHERS)
def model(request, tmp_path) -> Conv2Former:
    path = tmp_path / f"conv2former_tiny_{request.param}.yaml"
    path.write_text(f"{TINY_YAML}fusion: {request.param}\nls_init_value: 1.0\n")
    torch.manual_seed(0)
    return timm.create_model(conv2former.register_variant(path), num_classes=7).eval()


def fuse(name: str, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return FUSIONS[name](a.shape[1], kernel_size=3).fuse(a, v)


def test_a_file_may_name_all_of_them():
    assert tuple(FUSIONS) == FUSION_NAMES


def test_formulas():
    a, v = torch.randn(2, 2, 6, 5, 4, dtype=torch.float64)
    assert torch.equal(fuse("product", a, v), a * v)
    assert torch.equal(fuse("sum", a, v), a + v)
    assert torch.allclose(fuse("sigmoid", a, v), v / (1 + torch.exp(-a)))
    assert torch.allclose(fuse("l1", a, v), v * a / a.abs().sum(1, keepdim=True))
    ones = torch.ones_like(a)
    unit = fuse("unit", a, ones)
    assert unit.min() > 0
    assert torch.equal(unit.amax((2, 3)), ones[..., 0, 0])
    line = unit[0, 0].flatten(), a[0, 0].flatten()
    assert torch.corrcoef(torch.stack(line))[0, 1] == pytest.approx(1.0)  # the scaling is linear


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_of_zeros_and_of_one_pixel(name, dtype):
    for size in ((3, 3), (1, 1)):
        a = torch.zeros(1, 4, *size, dtype=dtype, requires_grad=True)
        out = fuse(name, a, torch.ones_like(a))
        out.sum().backward()
        assert out.dtype == dtype
        assert torch.isfinite(out).all()
        assert torch.isfinite(a.grad).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_torchscript_and_fx(model):
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    traced = torch.fx.symbolic_trace(model)
    assert torch.allclose(traced(x), expected, atol=1e-6)
    for module in (model, traced):
        assert torch.allclose(torch.jit.script(module)(x), expected, atol=1e-6)


@pytest.mark.slow
def test_export_and_compile(model):
    """One block, which is where they differ; the whole network is compiled in test_backbone.py."""
    block = model.stages[0].blocks[0]
    dim = torch.export.Dim
    dynamic = {"x": {0: dim("n", max=64), 2: dim("h", min=8, max=512), 3: dim("w", min=8, max=512)}}
    channels = block.attn.a.in_channels
    program = torch.export.export(block, (torch.randn(2, channels, 16, 16),), dynamic_shapes=dynamic)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, channels, 24, 19)
    assert torch.allclose(program.module()(x), block(x), atol=1e-5)
    assert torch.allclose(compiled(x), block(x), atol=1e-5)


def test_autocast_and_gradients(model):
    model.train()
    x = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_variant_files(path):
    """Each is conv2former_t but for one thing, which its name tells."""
    changed, base = read_variant(path), conv2former.variant("conv2former_t")
    name = path.stem.removeprefix("conv2former_t_")
    expected = {"fusion": name} if name in FUSIONS else {"kernel_size": int(name.removeprefix("k"))}
    assert dict(changed.model_args().items() - base.model_args().items()) == expected
    assert changed.train_drop_path_rate == base.train_drop_path_rate
    model = timm.create_model(conv2former.register_variant(path), device="meta")
    assert model.state_dict().keys() == timm.create_model("conv2former_t", device="meta").state_dict().keys()
    assert model(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)
    shape = {key: value for key, value in changed.model_args().items() if key != "fusion"}
    assert find_variant(**shape) == ("conv2former_t" if name in FUSIONS else changed.name)
    assert find_variant(**changed.model_args()) == changed.name


def test_all_published_ablations_are_there():
    names = {path.stem.removeprefix("conv2former_t_") for path in ABLATIONS}
    assert names == {"k5", "k7", "k9", "k15", "k21", *OTHERS}  # kernel 11 and the product are conv2former_t itself


def test_an_unknown_fusion_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TINY_YAML + "fusion: division\n")
    with pytest.raises(conv2former.ConfigError, match=r"fusion: expected one of product, .* found 'division'"):
        conv2former.register_variant(path)
    with pytest.raises(ValueError, match="fusion must be one of product"):
        Conv2Former(fusion="division")


def test_the_block_takes_any_modulation():
    class Values(ConvMod):
        def fuse(self, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return v

    block = conv2former.Conv2FormerBlock(8, kernel_size=3, mod_layer=Values)
    assert isinstance(block.attn, Values)
    x = torch.randn(1, 8, 4, 4)
    assert torch.allclose(block.attn(x), block.attn.proj(block.attn.v(block.attn.norm(x))))
