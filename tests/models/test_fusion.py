"""The fused blocks and stem against their modules, `fused=False`: the plain formula."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import sys
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from conv2former import Conv2FormerBlock
from conv2former.models import fusion, stem_fusion
from conv2former.ops.cpu import chunks, native, onednn
from conv2former.tools.benchmark.memory import bytes_held

DIM = 20


@pytest.fixture(autouse=True)
def two_images_at_a_time(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 9 * 10 * 4 * DIM * 2)


@pytest.fixture(autouse=True, params=["native", "PyTorch's operators"])
def with_and_without_native_functions(request, monkeypatch):
    if request.param != "native":
        monkeypatch.setenv("CONV2FORMER_COMPILE", "0")
    elif not native.usable(torch.float32):
        pytest.skip("no C++ compiler")


@pytest.fixture
def dim(request, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DIM", request.param)


# In float32 the norm of 12 channels is PyTorch's, that of 20 is compiled.
few_and_more_channels = pytest.mark.parametrize("dim", [12, 20], indirect=True)


def make_block(dtype: torch.dtype = torch.float64, **options) -> Conv2FormerBlock:
    torch.manual_seed(0)
    block = Conv2FormerBlock(DIM, **{"kernel_size": 7, "ls_init_value": 0.5, "dtype": dtype, **options})
    for p in block.parameters():
        nn.init.normal_(p, std=0.4)
    return block.train()


def make_images(dtype: torch.dtype = torch.float64, size: tuple[int, int] = (9, 10)) -> Tensor:
    return torch.randn(5, DIM, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def results(block: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> list[Tensor]:
    """Returns the output and the gradients of the input and of every parameter."""
    block = copy.deepcopy(block)
    x = x.clone().requires_grad_()
    torch.manual_seed(2)  # of drop path
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = block(x)
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (y * weights.to(y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in block.parameters())]


def plain(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for part in module.modules():
        if hasattr(part, "fused"):
            part.fused = False
    return module


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What was computed by `ops`."""
    made: list[str] = []
    for module, name in ((fusion, "forward"), (stem_fusion, "forward_stem")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: (made.append(name), real(*a))[1])
    return made


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"drop_path": 0.4}, {"ls_init_value": None}, {"kernel_size": 11}, {"kernel_size": 3}, {"kernel_size": 1}],
    ids=str,
)
def test_values_and_gradients(options, recompute, calls):
    block = make_block(recompute=recompute, **options)
    ours, reference = results(block, make_images()), results(plain(block), make_images())
    assert calls == ["forward"]
    for a, b in zip(ours, reference, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 9), (23, 4)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@few_and_more_channels
@pytest.mark.usefixtures("dim")
def test_sizes_and_no_images(size, dtype, bound):
    block = make_block().to(dtype)
    exact = results(plain(make_block()), make_images(dtype, size).double())
    for a, b in zip(results(block, make_images(dtype, size)), exact, strict=True):
        assert relative(a, b) < bound
    none = make_images(dtype, size)[:0]
    for a, b in zip(results(block, none), results(plain(block), none), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(params=["with 16-bit products", "without"])
def processor(request, monkeypatch):
    """One that has matrix products of 16-bit types and one that has not; PyTorch computes them on both."""
    monkeypatch.setattr(onednn, "multiplies", lambda dtype: request.param != "without" or dtype.itemsize > 2)


@pytest.mark.slow
@pytest.mark.parametrize("fuses", [True, False])
@pytest.mark.parametrize(
    ("dtype", "autocast", "bound"),
    [
        (torch.float32, None, 1e-5),
        (torch.float32, torch.bfloat16, 2e-2),
        (torch.float32, torch.float16, 3e-3),
        (torch.bfloat16, None, 3e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [True, False])
@few_and_more_channels
@pytest.mark.usefixtures("dim")
def test_other_precisions_are_as_exact_as_the_modules(
    dtype, autocast, bound, fuses, recompute, processor, monkeypatch, calls
):
    if not fuses:
        monkeypatch.setattr(onednn, "_has_pointwise", lambda dtype: False)
    exact = results(plain(make_block()), make_images())
    block = make_block(recompute=recompute).to(dtype)
    x = make_images().to(dtype)
    ours, reference = results(block, x, autocast), results(plain(block), x, autocast)
    assert calls
    for a, b, truth in zip(ours, reference, exact, strict=True):
        assert a.dtype == b.dtype
        assert relative(a, truth) < max(bound, 1.5 * relative(b, truth))
    with torch.inference_mode(), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        assert relative(block.eval()(x), exact[0]) < bound


def test_tiny_layer_scale_under_float16(processor):
    block = make_block(torch.float32)
    for layer in (block.ls1, block.ls2):
        nn.init.constant_(layer.gamma, 1e-6)
    x = make_images(torch.float32)
    ours, reference = results(block, x, torch.float16), results(plain(block), x, torch.float16)
    for a, b, exact in zip(ours, reference, results(plain(block), x), strict=True):
        assert relative(a, exact) < max(3e-3, 1.2 * relative(b, exact))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"recompute": False}], ids=str)
def test_a_network_in_every_mode(tiny, options, calls):
    torch.manual_seed(0)
    model = timm.create_model(tiny, num_classes=3, drop_path_rate=0.3, **options).double()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, 0.2, 0.8)
    reference = results(plain(model.train()), x)
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        for a, b in zip(results(model, x), reference, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    assert bool(calls) == (options.get("fused") is not False), "one option switches it off"
    for a, b in zip(stem_statistics(model, x), stem_statistics(plain(model), x), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    assert torch.allclose(model.eval()(x), plain(model)(x), rtol=1e-10)
    for mode, checkpointing in itertools.product((True, False), (True, False)):  # with it block by block
        model.set_grad_checkpointing(checkpointing)
        answers = []
        for network in (model, plain(model)):
            torch.manual_seed(5)  # of drop path
            with torch.no_grad():
                answers.append(network.train(mode)(x))
        assert torch.allclose(*answers, rtol=1e-10, atol=1e-10)


def stem_statistics(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the buffers of BatchNorm after one step."""
    model = copy.deepcopy(model).train()
    model(x)
    return [buffer.double() for buffer in model.buffers()]


def test_plain_nchw_images_are_fused(tiny, calls):
    model = timm.create_model(tiny)
    x = torch.randn(1, 3, 64, 64)
    assert x.is_contiguous()
    features = model.train().forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert calls == ["forward_stem", *["forward"] * 4], "once for each stage"


def test_second_derivatives():
    block = make_block(kernel_size=3)
    x = make_images(size=(3, 4))[:2].requires_grad_()
    assert torch.autograd.gradgradcheck(block, (x,), fast_mode=True)

    def penalty(block: nn.Module) -> list[Tensor]:
        (slope,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), list(block.parameters())[:-1]))

    for a, b in zip(penalty(block), penalty(plain(block)), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_second_derivatives_of_the_stem(tiny):
    model = timm.create_model(tiny).double().train()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(model.stem, (x,), fast_mode=True, atol=1e-4)


def test_frozen_weights_cost_nothing(monkeypatch):
    block = make_block().requires_grad_(False)
    x = make_images().requires_grad_()
    reference = torch.autograd.grad(plain(block)(x).square().sum(), x)[0]
    monkeypatch.setattr(onednn, "conv_dw_weight_grad", None)
    assert torch.allclose(torch.autograd.grad(block(x).square().sum(), x)[0], reference, rtol=1e-10)
    block.mlp.fc2.weight.requires_grad_(True)
    monkeypatch.undo()
    (grad,) = torch.autograd.grad(block(x).sum(), [block.mlp.fc2.weight])
    other = plain(block)
    (expected,) = torch.autograd.grad(other(x).sum(), [other.mlp.fc2.weight])
    assert torch.allclose(grad, expected, rtol=1e-10)


def test_backward_twice_and_accumulation():
    block, x = make_block(), make_images()
    y = block(x).sum()
    y.backward(retain_graph=True)
    first = [p.grad.clone() for p in block.parameters()]
    y.backward()
    for p, grad in zip(block.parameters(), first, strict=True):
        assert torch.equal(p.grad, 2 * grad)


def test_another_number_of_images_at_a_time_in_the_backward_pass(monkeypatch):
    block, x = make_block(), make_images()
    reference = results(block, x)[2:]
    loss = (block(x) * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))).sum()
    monkeypatch.setattr(chunks, "CHUNK", 1)
    loss.backward()
    for p, expected in zip(block.parameters(), reference, strict=True):
        assert torch.allclose(p.grad, expected, rtol=1e-10)


PARTS = ["attn", "mlp", "attn.norm", "attn.a", "attn.act", "attn.conv_dw", "attn.v", "attn.proj", "ls1", "drop_path"]


@pytest.mark.slow
@pytest.mark.parametrize("part", [*PARTS, "mlp.norm", "mlp.fc1", "mlp.act", "mlp.conv_dw", "mlp.fc2", "ls2"])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize("options", [{"drop_path": 0.1}, {"ls_init_value": None}], ids=str)
def test_hooks_are_called(part, register, options, calls):
    block = make_block(**options)
    seen = []
    handle = getattr(block.get_submodule(part), register)(lambda *a: seen.append(part))
    results(block, make_images())  # on a copy, hooks with it
    assert seen
    assert not calls
    handle.remove()
    results(block, make_images())
    assert calls == ["forward"]


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("part", ["", ".1"])
def test_hooks_on_a_row_of_blocks_are_called(part, learns, tiny, calls):
    model = timm.create_model(tiny)
    x, seen = torch.randn(1, 3, 64, 64), []
    handle = model.get_submodule(f"stages.2.blocks{part}").register_forward_hook(lambda *a: seen.append(part))
    with torch.set_grad_enabled(learns):
        model(x)
        assert seen
        assert calls.count("forward") == 5, "the blocks of that row are fused one by one"
        handle.remove()
        calls.clear()
        model(x)
    assert calls.count("forward") == 4


def test_other_blocks_in_a_row_keep_their_meaning(tiny):
    class Twice(Conv2FormerBlock):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = timm.create_model(tiny).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = model.stages[1](model.stages[0](model.stem(x)))
        before = model.stages[2](x)
        model.stages[2].blocks[1].__class__ = Twice
        assert torch.allclose(model.stages[2](x), 2 * before)


def exchange_act(block: Conv2FormerBlock) -> None:
    block.mlp.act = nn.GELU("tanh")


def exchange_linear(block: Conv2FormerBlock) -> None:
    class Low(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    block.attn.v = Low(DIM, DIM, 1, dtype=torch.float64)


def exchange_conv(block: Conv2FormerBlock) -> None:
    block.mlp.conv_dw = nn.Conv2d(4 * DIM, 4 * DIM, 3, padding=1, padding_mode="reflect", groups=4 * DIM).double()


def dilate(block: Conv2FormerBlock) -> None:
    block.attn.conv_dw = nn.Conv2d(DIM, DIM, 7, padding=6, dilation=2, groups=DIM).double()


def parametrise(block: Conv2FormerBlock) -> None:
    nn.utils.parametrizations.weight_norm(block.attn.proj)


def prune(block: Conv2FormerBlock) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(block.mlp.fc1, "weight", 0.5)


def patch_forward(block: Conv2FormerBlock) -> None:
    block.attn.forward = lambda x: x * 3  # type: ignore[method-assign]


def patch_fuse(block: Conv2FormerBlock) -> None:
    block.attn.fuse = lambda a, v: a + v  # type: ignore[method-assign]


def widen(block: Conv2FormerBlock) -> None:
    block.attn.a = nn.Conv2d(DIM, 2 * DIM, 1).double()
    block.attn.conv_dw = nn.Conv2d(2 * DIM, DIM, 7, padding=3, groups=DIM).double()


@pytest.mark.parametrize(
    "change",
    [exchange_act, exchange_linear, exchange_conv, dilate, parametrise, prune, patch_forward, patch_fuse, widen],
)
def test_changed_blocks_keep_their_meaning(change: Callable, calls):
    block, reference = make_block(), make_block()
    for each in (block, reference):
        torch.manual_seed(4)
        change(each)
    reference.fused = False
    assert torch.equal(block(make_images()), reference(make_images()))
    assert not calls


def reflect(block: Conv2FormerBlock) -> None:
    block.attn.conv_dw.padding_mode = "reflect"
    block.attn.conv_dw._reversed_padding_repeated_twice = [3] * 4


def approximate(block: Conv2FormerBlock) -> None:
    block.attn.act.approximate = "tanh"


def set_eps(block: Conv2FormerBlock) -> None:
    block.mlp.norm.eps = 0.5


def new_parameter(block: Conv2FormerBlock) -> None:
    block.mlp.fc2.weight = nn.Parameter(block.mlp.fc2.weight.detach() * 2)


def new_scale(block: Conv2FormerBlock) -> None:
    block.ls1 = nn.Identity()


def new_data(block: Conv2FormerBlock) -> None:
    block.attn.proj.bias.data = block.attn.proj.bias.data + 1


def change_class(block: Conv2FormerBlock) -> None:
    class Twice(type(block.attn)):  # type: ignore[misc]
        def fuse(self, a: Tensor, v: Tensor) -> Tensor:
            return 2 * a * v

    block.attn.__class__ = Twice


def hook_in_another_dictionary(block: Conv2FormerBlock) -> None:
    block.mlp._forward_hooks = type(block.mlp._forward_hooks)()
    block.mlp.register_forward_hook(lambda module, inputs, output: 2 * output)


LATER = [reflect, approximate, set_eps, new_parameter, new_scale, new_data, change_class, hook_in_another_dictionary]


@pytest.mark.parametrize("change", [*LATER, exchange_act, exchange_linear, dilate, parametrise, patch_forward, widen])
def test_blocks_that_change_later(change: Callable, calls):
    """What was found out about a block is not taken for granted in the next step."""
    block = make_block()
    block(make_images())
    assert calls == ["forward"]
    torch.manual_seed(4)
    change(block)
    expected = plain(block)(make_images())
    torch.testing.assert_close(block(make_images()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_what_was_found_out_is_kept_and_forgotten(monkeypatch):
    looked = []
    real = fusion._has_standard_layers
    monkeypatch.setattr(fusion, "_has_standard_layers", lambda *a: (looked.append(1), real(*a))[1])
    block = make_block()
    for _ in range(3):
        block.train()(make_images())
        block.eval()(make_images())
    block.float()(make_images().float())  # the same parameters in another type
    assert len(looked) == 1
    assert block in fusion._plans
    known = len(fusion._plans)
    copied = pickle.loads(pickle.dumps(block))
    assert copied not in fusion._plans
    del block
    gc.collect()
    assert len(fusion._plans) < known


@pytest.mark.parametrize("part", ["", "mlp.fc1"])
def test_parameters_elsewhere_are_left_to_the_modules(part):
    """They say so; a native function would read from an address that is none."""
    block, x = make_block(), make_images()
    assert fusion.is_fusable(block, x)
    block.get_submodule(part).to("meta")
    assert not fusion.is_fusable(block, x)
    assert not fusion.is_fusable(block, x)


def test_transforms_of_torch_func():
    block = make_block(kernel_size=3)
    x = make_images()[:3]
    weights = dict(block.named_parameters())

    def loss(weights: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(block, weights, (x[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    block(x).square().sum().backward()
    for name, p in block.named_parameters():
        assert torch.allclose(grads[name].sum(0), p.grad, rtol=1e-9, atol=1e-9)
    _, slope = torch.func.jvp(block, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        y = block(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(y).tangent, slope)


def test_vmap_over_a_network(tiny):
    model = timm.create_model(tiny).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(torch.func.vmap(model)(x[:, None]).squeeze(1), model(x), atol=1e-5)


def test_vectorised_jacobian():
    block = make_block(kernel_size=3)
    x = make_images(size=(2, 2))[:1]
    ours, reference = (
        torch.autograd.functional.jacobian(b, x, vectorize=vectorize)
        for b, vectorize in ((block, True), (plain(block), False))
    )
    assert torch.allclose(ours, reference, rtol=1e-9)


def test_modes_see_every_operation(calls):
    from torch.fx.experimental.proxy_tensor import make_fx

    block, x = make_block(), make_images()
    assert torch.equal(make_fx(lambda z: block(z))(x)(x), plain(block)(x))
    assert not calls


def test_a_layer_in_two_places():
    block = make_block()
    block.attn.v = block.attn.a
    x = make_images()
    for b in (block, plain(block)):
        b.zero_grad()
    grads = [
        torch.autograd.grad(b(x).square().sum(), list(b.parameters()), create_graph=True) for b in (block, plain(block))
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_many_parts_in_16_bits(dtype, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 1)
    block = make_block(kernel_size=3).to(dtype)
    x = torch.randn(400, DIM, 5, 5, generator=torch.Generator().manual_seed(1))

    def slopes(block: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(block(x).float().mean() * 100, list(block.parameters()))

    for a, exact in zip(slopes(block, x.to(dtype)), slopes(plain(block).float(), x.to(dtype).float()), strict=True):
        assert relative(a, exact) < 0.02


def test_sums_that_float16_cannot_hold():
    block = make_block(torch.float32)
    for layer in (block.ls1, block.ls2):
        nn.init.constant_(layer.gamma, 1e-6)
    with torch.autocast("cpu", dtype=torch.float16):
        y = block(torch.randn(8, DIM, 28, 28))
    (y.sum() * 512).backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_autocast_around_the_backward_pass():
    block, x = make_block(torch.float32), make_images(torch.float32)
    inside, outside = copy.deepcopy(block), block
    y, z = (b(x).square().sum() for b in (inside, outside))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward()
    z.backward()
    for a, b in zip(inside.parameters(), outside.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("index", range(7))
def test_one_parameter_alone_learns(index):
    grads = []
    for block in (make_block(), plain(make_block())):
        block.requires_grad_(False)
        p = list(block.parameters())[index].requires_grad_()
        grads.append(torch.autograd.grad(block(make_images()).square().sum(), p)[0])
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-10)


def test_stem_under_autocast(tiny, processor):
    stem = timm.create_model(tiny).stem.train()
    x = torch.randn(2, 3, 32, 32)
    ours, reference, exact = (
        results(s, x, a) for s, a in ((stem, torch.bfloat16), (plain(stem), torch.bfloat16), (plain(stem), None))
    )
    assert ours[0].dtype == torch.bfloat16
    for a, b, truth in zip(ours, reference, exact, strict=True):
        assert relative(a, truth) < max(2e-2, 1.5 * relative(b, truth))


def test_stem_without_enough_pixels_or_with_other_layers(tiny, calls):
    stem = timm.create_model(tiny).stem.train()
    with pytest.raises((ValueError, RuntimeError)):
        stem(torch.randn(1, 3, 2, 2))
    assert stem.norm1.running_var.isfinite().all()
    assert stem(torch.randn(0, 3, 32, 32)).shape == (0, 8, 8, 8)
    stem.conv2 = nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False)
    stem(torch.randn(1, 3, 32, 32)).sum().backward()
    stem.norm1.momentum = None
    stem(torch.randn(1, 3, 32, 32))
    assert not calls


def test_pickles_from_before_the_options():
    block = make_block()
    for layer in (block, block.attn, block.mlp):
        for name in ("fused", "recompute"):
            layer.__dict__.pop(name, None)
    assert torch.allclose(block(make_images()), plain(make_block())(make_images()), rtol=1e-10)


def test_wrong_types_fail_as_they_do_in_the_modules():
    block = make_block(torch.float32)
    for x in (make_images(torch.float64), make_images(torch.bfloat16)):
        with pytest.raises(RuntimeError, match=r"type|dtype"):
            block(x)


def test_exports_contain_plain_operators_only(tiny):
    model = timm.create_model(tiny).eval()
    graph = str(torch.export.export(model, (torch.randn(1, 3, 64, 64),)).graph)
    assert "conv2former" not in graph
    assert "mkldnn" not in graph


@pytest.mark.slow
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9, 11, 13, 31])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (13, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_gradient_of_the_depthwise_convolution(kernel_size, size, dtype):
    torch.manual_seed(0)
    x, grad = torch.randn(2, 3, *size, 20, dtype=dtype).unbind()
    conv = nn.Conv2d(20, 20, kernel_size, padding=kernel_size // 2, groups=20, dtype=torch.float64)
    conv(x.permute(0, 3, 1, 2).double()).backward(grad.permute(0, 3, 1, 2).double())
    weight, bias = onednn.conv_dw_weight_grad(grad, x, kernel_size)
    for ours, exact in ((weight, conv.weight.grad), (bias, conv.bias.grad)):
        assert ours.shape == exact.shape
        assert ours.dtype == dtype
        assert (ours - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12) * exact.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("with_and_without_native_functions", ["PyTorch's operators"], indirect=True)  # it has neither
@pytest.mark.parametrize(
    ("autocast", "recompute", "bound"),
    [(None, False, 1e-5), (torch.bfloat16, True, 2e-2), (torch.float16, True, 3e-3)],
)
def test_the_backend_of_a_gpu(on_a_gpu, autocast, recompute, bound, monkeypatch):
    used = []
    real = on_a_gpu.backward
    monkeypatch.setattr(on_a_gpu, "backward", lambda *a: (used.append(1), real(*a))[1])
    block = make_block(recompute=recompute).float()
    x = make_images(size=(4, 3))[:2].float()
    exact = results(plain(make_block()), x.double())
    for a, truth in zip(results(block, x, autocast), exact, strict=True):
        assert relative(a, truth) < bound
    assert len(used) == 2, "both branches"
    with torch.inference_mode(), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        assert relative(block(x), exact[0]) < bound


@pytest.mark.slow
@pytest.mark.parametrize("as_on_a_gpu", [True, False])
def test_compiled_modules_take_the_operators(as_on_a_gpu, tiny, monkeypatch, calls):
    """On a CPU by themselves, if there are compiled functions."""
    if as_on_a_gpu:
        monkeypatch.setattr(fusion, "supports_operators", lambda *a, **options: True)
        monkeypatch.setattr(stem_fusion, "supports_operators", lambda *a: True)
    elif not native.usable(torch.float64):
        pytest.skip("no compiled functions")
    elif not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch 2.6 compiles the formulas")
    torch.manual_seed(0)
    model = timm.create_model(tiny, dtype=torch.float64).train()
    targets = []

    def backend(module: torch.fx.GraphModule, inputs: list) -> Callable:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module

    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)  # NCHW: nobody has to ask
    grads = []
    for network in (model, plain(model)):
        out = torch.compile(network, backend=backend, fullgraph=True)(x)
        grads.append([out, *torch.autograd.grad(out.square().sum(), list(network.parameters()))])
        used = {name for name in ("modulate", "mlp_mix") if any(name in t for t in targets)}
        assert used == ({"modulate", "mlp_mix"} if network is model else set())
        targets.clear()
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    assert not calls


# MB that the authors' code keeps per image, a third of which is the aim; of b and l nobody measured theirs
@pytest.mark.slow
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("name", "fp32", "bf16"), [("conv2former_t", 80, 60), ("conv2former_n", 49.2, 34.5)])
def test_memory_of_a_training_step(name, fp32, bf16, wide, monkeypatch):
    if wide:  # without 16-bit products; the other way, on such a processor, takes a minute
        monkeypatch.setattr(onednn, "multiplies", lambda dtype: dtype.itemsize > 2)
    elif not onednn.multiplies(torch.bfloat16):
        pytest.skip("not on this processor")
    model = timm.create_model(name)
    images = torch.randn(2, 3, 224, 224)
    assert bytes_held(model, images) / 2e6 < fp32
    assert bytes_held(model, images, torch.bfloat16) / 2e6 < bf16
    model.set_grad_checkpointing()
    assert bytes_held(model, images) / 2e6 < fp32 / 2, "whole blocks keep still less"


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("came_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@few_and_more_channels
@pytest.mark.usefixtures("dim")
def test_without_gradients(layer_scale, came_in, autocast, drop_path, processor, monkeypatch):
    """Of any type that may come in, a few images at a time, as the modules' values and type."""
    if came_in == torch.bfloat16 and autocast is None:
        pytest.skip("not without autocast")
    block = make_block(torch.float32, ls_init_value=layer_scale, drop_path=drop_path)
    x = make_images(torch.float32).to(came_in)
    monkeypatch.setattr(chunks, "CHUNK", 2 * 9 * 10 * DIM * 4)
    answers = []
    for module in (block, plain(block)):
        torch.manual_seed(2)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            answers.append(module(x))
    ours, theirs = answers
    assert ours.dtype == theirs.dtype
    assert relative(ours, theirs) < (1e-5 if autocast is None else 2e-2)
    assert torch.equal(x, make_images(torch.float32).to(came_in))
