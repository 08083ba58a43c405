"""The operators for other networks: where they are the kernels', where PyTorch's, under autocast, with mistakes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conv2former.ops import backends, depthwise_conv2d, modulate, operators, standalone

from .branches import random


def tensors(channels: int = 6, side: int = 5, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(2, channels, 7, 9), (channels, 1, side, side), (channels,), (2, channels, 7, 9)]
    return [random(i, *shape).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]


def formula(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


@pytest.fixture(params=[False, True], ids=["elsewhere", "as on a GPU"])
def taken(request, monkeypatch) -> list[str]:
    """Which operators were taken, on a CPU by a backend that says that it supports them."""
    names: list[str] = []
    for name in ("depthwise_conv2d", "modulate"):
        real = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *a, real=real, name=name: (names.append(name), real(*a))[1])
    if request.param:
        monkeypatch.setattr(standalone, "supports_operators", lambda x, side: side % 2 == 1)
    yield names
    assert bool(names) == request.param


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("side", [1, 3, 7, 31])
def test_depthwise_convolution(taken, side, with_bias):
    x, weight, bias, grad = tensors(side=side)
    inputs = (x, weight, bias) if with_bias else (x, weight)
    out, expected = depthwise_conv2d(*inputs), formula(x, weight, bias if with_bias else None)
    torch.testing.assert_close(out, expected)
    grads, truth = (torch.autograd.grad(y, inputs, grad) for y in (out, expected))
    torch.testing.assert_close(grads, truth)


def test_modulation(taken):
    a, weight, bias, v = tensors()
    out, expected = modulate(a, weight, bias, v), formula(F.gelu(a), weight, bias) * v
    torch.testing.assert_close(out, expected)
    for ours, truth in zip(*(torch.autograd.grad(y.sum(), (a, weight, bias, v)) for y in (out, expected)), strict=True):
        torch.testing.assert_close(ours, truth)


def test_autocast(taken):
    """Maps get its type, weights and their gradients keep theirs."""
    a, weight, bias, v = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        convolved, modulated = depthwise_conv2d(a, weight, bias), modulate(a, weight, bias, v)
    assert convolved.dtype == modulated.dtype == torch.bfloat16
    (convolved.float() + modulated.float()).sum().backward()
    assert {x.grad.dtype for x in (a, weight, bias, v)} == {torch.float32}
    assert (convolved.float() - formula(a, weight, bias)).norm() < 2e-2 * convolved.float().norm()


def test_what_the_kernels_cannot_do_is_pytorch_s(monkeypatch):
    """As F.conv2d does it, which for an even kernel gives a larger map."""
    monkeypatch.setattr(operators, "depthwise_conv2d", None)
    x, weight, bias, _ = tensors(side=4)
    assert torch.equal(depthwise_conv2d(x, weight, bias), formula(x, weight, bias))
    assert not backends.supports_operators(x, 33)


def test_a_mistake_is_named():
    x, weight, bias, _ = tensors()
    with pytest.raises(ValueError, match=r"depthwise_conv2d: weight must be \(C, 1, k, k\) with C = 6"):
        operators.depthwise_conv2d(x, weight[:5], bias)
    grad = operators.depthwise_conv2d(x, weight, bias).sum()
    (dx,) = torch.autograd.grad(grad, x, create_graph=True)
    with pytest.raises(RuntimeError, match="depthwise_conv2d has no second derivative"):
        dx.sum().backward()
