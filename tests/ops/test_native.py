"""The native functions against the formulas that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conv2former.models.backbone import Downsample, Stem
from conv2former.ops.cpu import native, onednn

needs_compiler = pytest.mark.skipif(not native.usable(torch.float32), reason="no C++ compiler")
BOUNDS = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 8e-3}
SHAPES = [(2, 9, 13, 40), (3, 1, 1, 5), (1, 2, 30, 16), (2, 17, 3, 33), (1, 15, 29, 8), (2, 4, 5, 3)]


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conv_dw(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    return x.permute(0, 2, 3, 1)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.double().requires_grad_() for t in tensors]


def pixels(x: Tensor) -> Tensor:
    return x.sum((0, 1, 2))


def check(ours: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= BOUNDS[dtype] * b.abs().max()


@needs_compiler
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9, 11, 13, 31])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modulation(shape, kernel_size, dtype):
    a, v, dout = (random(i, *shape, dtype=dtype) for i in range(3))
    weight = random(3, shape[-1], 1, kernel_size, kernel_size, dtype=dtype) / kernel_size
    bias = random(4, shape[-1], dtype=dtype)
    exact = wide(a, v, weight, bias)
    exact_context = conv_dw(F.gelu(exact[0]), exact[2], exact[3])
    exact_out = exact_context * exact[1]
    da, dv, dweight, dbias = torch.autograd.grad(exact_out, exact, dout.double())

    context = torch.empty_like(a)
    out = native.modulate(a, v, weight, bias, context)
    check([out, context], [exact_out, exact_context], dtype)
    assert torch.equal(native.modulate(a, v, weight, bias), out)
    values = v.clone()
    assert native.modulate(a, values, weight, bias, out=values) is values
    assert torch.equal(values, out)

    overwritten = dout.clone()
    ours = native.modulate_backward(overwritten, a, v, context, weight)
    assert ours[1] is overwritten
    check([*ours[:4], *ours[4]], [exact_out, da, dv, dweight, dbias, pixels(da), pixels(dv)], dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9, 11, 13, 31])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modulation_of_maps_without_their_biases(shape, kernel_size, dtype):
    a, v, dout = (random(i, *shape, dtype=dtype) for i in range(3))
    weight = random(3, shape[-1], 1, kernel_size, kernel_size, dtype=dtype) / kernel_size
    bias = random(4, shape[-1], dtype=dtype)
    a_bias, v_bias = random(5, shape[-1]), random(6, shape[-1])
    exact = wide(a, v, weight, bias)
    exact_context = conv_dw(F.gelu(exact[0] + a_bias), exact[2], exact[3])
    exact_out = exact_context * (exact[1] + v_bias)
    da, dv, dweight, dbias = torch.autograd.grad(exact_out, exact, dout.double())

    context = torch.empty_like(a)
    out = native.modulate(a, v, weight, bias, context, biases=(a_bias, v_bias))
    check([out, context], [exact_out, exact_context], dtype)
    ours = native.modulate_backward(dout, a, v, context, weight, (a_bias, v_bias))
    check([*ours[:4], *ours[4]], [exact_out, da, dv, dweight, dbias, pixels(da), pixels(dv)], dtype)


@needs_compiler
@pytest.mark.parametrize("lacks_bias", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixing(shape, dtype, lacks_bias):
    u, dout = (random(i, *shape, dtype=dtype) for i in range(2))
    weight, bias = random(2, shape[-1], 1, 3, 3, dtype=dtype) / 3, random(3, shape[-1], dtype=dtype)
    exact = wide(u, weight, bias)
    u_bias = random(4, shape[-1]) if lacks_bias else None
    g = F.gelu(exact[0] if u_bias is None else exact[0] + u_bias)
    exact_out = g + F.gelu(conv_dw(g, exact[1], exact[2]))
    du, dweight, dbias = torch.autograd.grad(exact_out, exact, dout.double())

    out = native.mlp_mix(u, weight, bias, u_bias=u_bias)
    check([out], [exact_out], dtype)
    hidden = u.clone()
    assert native.mlp_mix(hidden, weight, bias, out=hidden, u_bias=u_bias) is hidden
    assert torch.equal(hidden, out)

    overwritten = dout.clone()
    ours = native.mlp_mix_backward(overwritten, u, weight, bias, u_bias)
    assert ours[1] is overwritten
    check([*ours[:3], *ours[3]], [exact_out, du, dweight, dbias, pixels(du)], dtype)


@needs_compiler
@pytest.mark.parametrize("inner", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 17, 31, 48, 72])
def test_norm_and_residual_sum(channels, inner):
    check_norm_and_residual_sum(torch.float32, inner, channels)


@needs_compiler
@pytest.mark.parametrize("channels", [8, 12, 16])
def test_norm_and_residual_sum_in_float64(channels):
    check_norm_and_residual_sum(torch.float64, torch.float64, channels)


def check_norm_and_residual_sum(dtype: torch.dtype, inner: torch.dtype, channels: int) -> None:
    shape = (3, 5, 7, channels)
    x = random(0, *shape, dtype=dtype) * 2 + 3
    weight, bias, gamma = (random(i, channels, dtype=dtype) for i in (1, 2, 3))
    assert native.supports_layer_norm(x, dtype, inner)
    exact = wide(x, weight, bias)
    exact_out = F.layer_norm(exact[0], (channels,), exact[1], exact[2], 1e-6)
    out, mean, rstd = native.layer_norm(x, weight, bias, 1e-6, inner)
    assert out.dtype == inner
    check([out], [exact_out], inner)
    moments = exact[0].mean(-1, keepdim=True), (exact[0].var(-1, correction=0, keepdim=True) + 1e-6).rsqrt()
    check([mean, rstd], list(moments), dtype)
    given = torch.empty_like(out)
    assert native.layer_norm(x, weight, bias, 1e-6, inner, stats=False, out=given) == (given, None, None)
    assert torch.equal(given, out)

    dout, residual = random(4, *shape, dtype=inner), random(5, *shape, dtype=dtype)
    dx, dweight, dbias = torch.autograd.grad(exact_out, exact, dout.double())
    ours = torch.empty_like(x)
    sums = native.layer_norm_backward(dout, x, mean, rstd, weight, residual, ours)
    check([ours, *sums], [dx + residual, dweight, dbias], dtype)

    y, mask = random(6, *shape, dtype=inner), torch.tensor([0.0, 1.25, 2.5], dtype=dtype).view(3, 1, 1, 1)
    for scale, factor in ((gamma, mask), (gamma, None), (None, mask), (None, None)):
        native.add_scaled(x, y, scale, factor, ours)
        product = y.double() * (1 if scale is None else scale) * (1 if factor is None else factor)
        check([ours], [x.double() + product], dtype)
        native.add_scaled(x, y, scale, factor, ours, bias)
        product = (y.double() + bias) * (1 if scale is None else scale) * (1 if factor is None else factor)
        check([ours], [x.double() + product], dtype)
        normed = native.layer_norm(ours, weight, gamma, 1e-6, inner)[0]
        for in_place in (False, True):  # the sum where x was, and its norm where y was
            x_, y_ = x.clone(), y.clone()
            total, h = (x_, y_) if in_place else (torch.empty_like(x), torch.empty_like(y))
            native.add_scaled(x_, y_, scale, factor, total, bias, (weight, gamma, 1e-6, h))
            assert torch.equal(total, ours)
            assert torch.equal(h, normed)


@needs_compiler
@pytest.mark.parametrize("channels", [8, 15])
def test_few_channels_are_left_to_pytorch(channels):
    assert not native.supports_layer_norm(torch.zeros(1, 2, 2, channels), torch.float32, torch.float32)
    assert not native.supports_gelu_affine(channels, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("channels", [16, 36])
def test_gelu_and_batch_norm(channels, dtype):
    x, dout = (random(i, 3, 6, 5, channels, dtype=dtype) for i in range(2))
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (random(i, channels, dtype=parameters) for i in (2, 3))
    exact = wide(x, weight, bias)
    z = F.gelu(exact[0])
    exact_out = F.batch_norm(z.permute(0, 3, 1, 2), None, None, exact[1], exact[2], training=True).permute(0, 2, 3, 1)
    out, mean, var = native.gelu_norm(x, weight, bias, 1e-5)
    check([out], [exact_out], dtype)
    check([mean, var], [z.mean((0, 1, 2)), z.var((0, 1, 2), correction=0)], parameters)
    grads = native.gelu_norm_backward(dout, x, weight, mean, (var + 1e-5).rsqrt())
    check(list(grads), list(torch.autograd.grad(exact_out, exact, dout.double())), dtype)
    for images in (x, x[:1, :3, :5].contiguous()):  # of 36 channels, some pixels together fill vectors, and 15 do not
        affine = native.gelu_affine(images, weight, bias)
        check([affine], [F.gelu(images.double()) * weight + bias], dtype)
        overwritten = images.clone()
        assert torch.equal(native.gelu_affine(overwritten, weight, bias, overwrite=True), affine)


@needs_compiler
@pytest.mark.parametrize("outs", [16, 17, 32, 36, 48, 72])
@pytest.mark.parametrize(
    ("channels", "size", "side", "stride", "padding"),
    [(36, (9, 14), 3, 1, 1), (13, (8, 7), 2, 2, 0), (3, (11, 12), 3, 2, 1), (4, (1, 2), 5, 1, 2), (2, (9, 3), 3, 3, 4)],
)
def test_weight_gradient_of_a_dense_convolution(channels, size, side, stride, padding, outs):
    x = random(0, 2, channels, *size, dtype=torch.float32)
    weight = random(1, outs, channels, side, side).requires_grad_()
    out = F.conv2d(x.double(), weight, stride=stride, padding=padding)
    dout = random(2, *out.shape, dtype=torch.float32)
    (exact,) = torch.autograd.grad(out, weight, dout.double())
    maps = [t.permute(0, 2, 3, 1).contiguous() for t in (dout, x)]
    check([native.conv_weight_grad(*maps, side, stride, padding)], [exact], torch.float32)


@needs_compiler
def test_dense_convolutions_that_are_left_to_onednn(monkeypatch):
    """With AVX-512, of several strides, with many weights, few channels, or in another type."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    weight = torch.zeros(36, 36, 3, 3)
    geometry = (1, 1), (1, 1), (1, 1)
    assert native.supports_conv_weight_grad(weight, *geometry)
    assert not native.supports_conv_weight_grad(weight.double(), *geometry)
    for other in ((36, 36, 3, 2), (8, 36, 3, 3), (288, 144, 2, 2)):
        assert not native.supports_conv_weight_grad(torch.zeros(other), *geometry)
    for number in range(3):
        other = [*geometry[:number], (1, 2), *geometry[number + 1 :]]
        assert not native.supports_conv_weight_grad(weight, *other)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not native.supports_conv_weight_grad(weight, *geometry)


@needs_compiler
@pytest.mark.parametrize(("autocast", "bound"), [(False, 1e-5), (True, 2e-2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stride", [2, 4])
def test_the_stem(stride, dtype, autocast, bound, monkeypatch):
    if autocast and dtype == torch.float64:
        pytest.skip("autocast is not for float64")
    used = []
    native.usable(dtype)  # which asks for the processor, too
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for name in ("gelu_norm", "gelu_norm_backward", "gelu_affine", "conv_weight_grad"):
        real = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, real=real, name=name, **k: (used.append(name), real(*a, **k))[1])
    torch.manual_seed(0)
    stem, plain, exact = (Stem(3, 72, stride, fused, dtype=dtype) for fused in (True, False, False))
    exact.double()
    plain.load_state_dict(stem.state_dict())
    exact.load_state_dict(stem.state_dict())
    results = []
    for module in (stem, plain, exact):
        x = random(0, 2, 3, 20, 28).to(module.conv1.weight.dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and module is not exact):
            y = module(x)
            (y * random(1, *y.shape)).sum().backward()
            with torch.no_grad():
                inferred = module.eval()(x)
        grads = [p.grad for p in module.parameters()]
        results.append([y, x.grad, inferred, *grads, *module.buffers()])
    single = dtype == torch.float32 and not (autocast and onednn.multiplies(torch.bfloat16))
    backward = ["gelu_affine", *(["conv_weight_grad"] if single else []), "gelu_norm_backward"]
    assert used == [*["gelu_norm", "gelu_affine"] * 2, *backward * 2, *["gelu_affine"] * 2]
    for ours, theirs, truth in zip(*results, strict=True):
        error, usual = ((t.double() - truth).norm() / truth.double().norm() for t in (ours, theirs))
        assert error <= max(1.5 * usual, bound / 10 if dtype == torch.float32 else 1e-12)


@needs_compiler
def test_threads_change_no_bit():
    maps = [random(i, 3, 14, 14, 72, dtype=torch.float32) for i in range(4)]
    weight, bias = random(4, 72, 1, 7, 7, dtype=torch.float32), random(5, 72, dtype=torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            *first, sums = native.modulate_backward(maps[0].clone(), *maps[1:], weight)
            *second, more = native.mlp_mix_backward(maps[0].clone(), maps[1], weight[..., :3, :3].contiguous(), bias)
            results.append([*first, *sums, *second, *more, native.conv_weight_grad(maps[0], maps[1], 3, 1, 1)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_compiler
def test_gelu_and_its_slope_over_the_whole_range():
    u = torch.linspace(-30, 30, 160_000).view(1, 100, 100, 16)
    nothing = torch.zeros(16, 1, 3, 3)
    exact = u.double().requires_grad_()
    F.gelu(exact).sum().backward()
    size = u.double().abs().clamp(min=1)
    low = torch.full((16,), -50.0)  # with a convolution of zeros and this bias, the second GELU is zero
    assert ((native.mlp_mix(u, nothing, low) - F.gelu(u.double())).abs() / size).max() < 1.5e-7
    eight_bits = u.bfloat16()
    rounded = native.mlp_mix(eight_bits, nothing, low).double()
    gelus = F.gelu(eight_bits.double())
    assert ((rounded - gelus).abs() <= 4e-5 + 2**-8 * gelus.abs()).all()
    assert (rounded[eight_bits < -4.5] == 0).all()
    du = native.mlp_mix_backward(torch.ones_like(u), u, nothing, low)[1]
    assert exact.grad is not None
    assert (du - exact.grad).abs().max() < 3e-7


@needs_compiler
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value, dtype):
    u = torch.zeros(1, 5, 5, 16, dtype=dtype)
    u[0, 2, 2] = value
    weight, bias = torch.ones(16, 1, 3, 3, dtype=dtype), torch.zeros(16, dtype=dtype)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(~native.mlp_mix(u, weight, bias)[0, :, :, 3].isfinite(), expected)
    assert torch.equal(~native.modulate(u, torch.ones_like(u), weight, bias)[0, :, :, 3].isfinite(), expected)


@needs_compiler
def test_bfloat16_is_rounded_as_in_pytorch():
    values = torch.cat([random(0, 4000), torch.tensor([3e38, 1e-37])]).float()
    v = values.to(torch.bfloat16).view(1, 1, -1, 1)
    factor = torch.tensor([1.2345678])
    # gelu(0) is 0: what remains is the bias times v
    out = native.modulate(torch.zeros_like(v), v, torch.zeros(1, 1, 1, 1).bfloat16(), factor.bfloat16())
    assert torch.equal(out, (v.float() * factor.bfloat16().float()).bfloat16())


def test_maps_must_be_contiguous():
    if not native.usable(torch.float32):
        pytest.skip("no C++ compiler")
    with pytest.raises(ValueError, match="contiguous"):
        native.mlp_mix(torch.zeros(1, 4, 4, 4).transpose(1, 2)[:, ::2], torch.zeros(4, 1, 3, 3), torch.zeros(4))


def test_switched_off(monkeypatch):
    monkeypatch.setenv("CONV2FORMER_COMPILE", "0")
    assert not native.usable(torch.float32)


def test_types_without_functions():
    assert not native.usable(torch.float16)


@needs_compiler
@pytest.mark.parametrize("dilation", [None, 2])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)])
def test_the_norm_of_a_downsampling(dtype, autocast, dilation, monkeypatch):
    used = []
    real = native.layer_norm
    monkeypatch.setattr(native, "layer_norm", lambda *a, **k: (used.append(1), real(*a, **k))[1])
    torch.manual_seed(0)
    ours, plain = (Downsample(24, 32, dilation, fused, dtype=dtype) for fused in (True, False))
    for p in plain.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(plain.state_dict())
    x = random(0, 2, 24, 6, 10, dtype=dtype).contiguous(memory_format=torch.channels_last)
    results = []
    for module in (ours, plain):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(module(x))
    check([results[0]], [results[1].double()], torch.bfloat16 if autocast else dtype)
    assert results[0].dtype == results[1].dtype
    assert used == [1]
    ours(x)  # with gradients
    seen = []
    ours.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours(x)
    assert (used, seen) == ([1], [dtype])
