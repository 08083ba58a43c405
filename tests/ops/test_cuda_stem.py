"""What a GPU does outside of the blocks: a layer norm, in Triton's interpreter, and weights that are cast together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conv2former import _private
from conv2former.ops import stem
from conv2former.ops.tensors import nchw, nhwc

from .branches import random
from .interpreter import mend, needs_interpreter

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nchw(F.layer_norm(nhwc(x), weight.shape, weight, bias, 1e-6))


def norm_inputs(map_dtype: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = (random(0, 2, 12, 3, 5) + 1).to(map_dtype).contiguous(memory_format=torch.channels_last)
    inputs = x, (random(1, 12) + 1).to(dtype), random(2, 12).to(dtype)
    return tuple(t.requires_grad_() for t in inputs)  # type: ignore[return-value]


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("map_dtype", [torch.float32, torch.bfloat16])
def test_layer_norm(dtype, map_dtype):
    """Values, gradients, their types and layouts; the same without a backward pass."""
    from conv2former.ops.cuda import norm

    mend()
    inputs = norm_inputs(map_dtype, torch.float32)
    y = norm.layer_norm(*inputs, 1e-6, dtype)
    grad = random(3, *y.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    results = [y, *torch.autograd.grad(y, inputs, grad)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = formula(*exact)
    for ours, true in zip(results, [truth, *torch.autograd.grad(truth, exact, grad.double())], strict=True):
        error = (ours.double() - true).norm() / true.norm()
        assert error < max(TOLERANCES[dtype], TOLERANCES[map_dtype])
    assert [t.dtype for t in results] == [dtype, map_dtype, torch.float32, torch.float32]
    assert y.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(norm.layer_norm(*inputs, 1e-6, dtype), y)


@needs_interpreter
def test_layer_norm_has_a_second_derivative_and_batched_ones():
    from conv2former.ops.cuda import norm

    inputs = norm_inputs(torch.float32, torch.float32)

    def results(compute: Callable[..., Tensor]) -> list[Tensor]:
        y = compute(*inputs)
        (dx,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
        second = torch.autograd.grad(dx.square().sum(), inputs)
        y = compute(*inputs)
        batched = torch.autograd.grad(y, inputs, torch.stack([y.detach(), 2 * y.detach()]), is_grads_batched=True)
        return [*second, *batched]

    ours = results(lambda *tensors: norm.layer_norm(*tensors, 1e-6, torch.float32))
    for found, expected in zip(ours, results(formula), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def weights() -> list[Tensor]:
    conv = random(0, 4, 3, 2, 2).float().contiguous(memory_format=torch.channels_last)
    return [conv.requires_grad_(), random(1, 4).float().requires_grad_(), random(2, 5).float().requires_grad_()]


@pytest.mark.parametrize("has_copy", [True, False])
def test_weights_cast_together(has_copy, monkeypatch):
    """As they are cast one by one, and their gradients; one that is not used has none."""
    if not has_copy:
        monkeypatch.setattr(_private.COPY_ALL, "value", None)
    originals = weights()
    first, second, _ = casts = stem.cast_together(torch.bfloat16, *originals)
    for cast, original in zip(casts, originals, strict=True):
        assert torch.equal(cast, original.to(torch.bfloat16))
        assert cast.stride() == original.stride()
    ((first * 3).sum() + (second * second).sum()).backward()
    assert [w.grad is None for w in originals] == [False, False, True]
    assert originals[0].grad.dtype == torch.float32
    assert originals[0].grad.stride() == originals[0].stride()
    assert torch.equal(originals[0].grad, torch.full_like(originals[0], 3))
    assert torch.equal(originals[1].grad, (2 * second.detach()).float())


def test_weights_cast_together_have_second_derivatives_and_batched_ones():
    original = weights()[1]
    (cast,) = stem.cast_together(torch.float64, original)
    (grad,) = torch.autograd.grad((cast**3).sum(), original, create_graph=True)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), original)[0], 6 * original.detach())
    (cast,) = stem.cast_together(torch.float64, original)
    (grads,) = torch.autograd.grad(cast, original, torch.eye(4, dtype=torch.float64), is_grads_batched=True)
    assert torch.equal(grads, torch.eye(4))
