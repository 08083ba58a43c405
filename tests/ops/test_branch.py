"""Every backend of a residual branch against its definition in `functional.py`, through the same tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conv2former.ops import functional
from conv2former.ops.branch import Backend, BranchCall, BranchParams, BranchSpec, SpatialMixing
from conv2former.ops.cpu import chunks, native, native_branch, operator_branch

from .branches import exact, make_params, random

C, D, K = 20, 24, 5
SIZE = (3, C, 6, 7)


@pytest.fixture(params=["native", "operators", "operators without native functions"])
def backend(request, monkeypatch) -> Backend:
    """A backend for float64 on this CPU."""
    monkeypatch.setattr(chunks, "CHUNK", 2 * SIZE[2] * SIZE[3] * D)  # two images at a time
    if request.param.endswith("native functions"):
        monkeypatch.setenv("CONV2FORMER_COMPILE", "0")
    elif not native.usable(torch.float64):
        pytest.skip("no C++ compiler")
    return native_branch if request.param == "native" else operator_branch  # type: ignore[return-value]


def make_call(mixing: SpatialMixing, recompute: bool = True, gamma: bool = True, mask: bool = False) -> BranchCall:
    modulation = mixing is SpatialMixing.MODULATION
    channels, side = (C, K) if modulation else (D, 3)
    params = make_params(mixing, C, channels, side, gamma)
    dtype = torch.float64
    spec = BranchSpec(mixing, 1e-6, recompute, dtype, dtype, dtype)
    return BranchCall(spec, params, random(12, SIZE[0], 1, 1, 1) if mask else None)


def image_maps(number: int = 0) -> Tensor:
    return random(number, *SIZE).contiguous(memory_format=torch.channels_last)


def check(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixing", SpatialMixing)
@pytest.mark.parametrize(
    "options", [{}, {"recompute": False}, {"gamma": False}, {"mask": True}, {"mask": True, "gamma": False}], ids=str
)
class TestBackends:
    """What each backend promises, see `branch.Backend`."""

    def test_values_and_gradients(self, backend, mixing, options):
        call, x, grad = make_call(mixing, **options), image_maps(), image_maps(20)
        if backend is native_branch and not call.spec.recompute:
            assert not native_branch.applies(call.spec, call.params, x, learns=True)
            return
        saved: list[Tensor] = []
        y = backend.forward([call], x, saved)
        dx, grads = backend.backward(call, x, saved, grad, True)
        assert grads is not None
        check([y, dx, *grads], exact(call, x, grad))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, image_maps()), "what comes in is not overwritten"

    def test_nothing_is_computed_for_frozen_parameters(self, backend, mixing, options):
        call, x, grad = make_call(mixing, **{**options, "recompute": True}), image_maps(), image_maps(20)
        saved: list[Tensor] = []
        backend.forward([call], x, saved)
        dx, grads = backend.backward(call, x, saved, grad, False)
        assert grads is None
        check([dx], exact(call, x, grad)[1:2])

    def test_branches_in_a_row_without_a_backward_pass(self, backend, mixing, options):
        call, x = make_call(mixing, **options), image_maps()
        other = make_call(SpatialMixing.MLP if mixing is SpatialMixing.MODULATION else SpatialMixing.MODULATION)
        expected = x
        for each in (call, other, call):
            expected = functional.residual_branch(*each[:2], expected, each.mask)
        check([backend.forward([call, other, call], x, None)], [expected])
        assert torch.equal(x, image_maps())


def test_parameters_and_gradients_in_a_row():
    call = make_call(SpatialMixing.MODULATION)
    again = BranchParams.from_tensors(call.params.tensors())  # type: ignore[arg-type]
    assert all(a is b for a, b in zip(again.tensors(), call.params.tensors(), strict=True))
    assert again.in_weights == call.params.in_weights
    without = replace(call.params, gamma=None)
    assert BranchParams.from_tensors(without.tensors()).gamma is None  # type: ignore[arg-type]
