"""The backend of a GPU against the definition, in Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conv2former.ops.branch import BranchCall, BranchParams, BranchSpec, SpatialMixing

from .branches import exact, make_params, random
from .interpreter import INTERPRETS

if not INTERPRETS:
    pytest.skip("needs Triton, and its interpreter chosen", allow_module_level=True)

from conv2former.ops.cuda import branch, mixing, rows

# What is computed in, and of what type the parameters are.
TYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
# Relative errors of values and gradients, against float64.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

pytestmark = pytest.mark.usefixtures("on_a_gpu")


def make_call(
    kind: SpatialMixing,
    types: tuple[torch.dtype, torch.dtype],
    channels: int = 8,
    images: int = 2,
    gamma: bool = True,
    mask: bool = True,
    recompute: bool = True,
) -> BranchCall:
    dtype, of_params = types
    inner, side = (channels, 5) if kind is SpatialMixing.MODULATION else (2 * channels, 3)
    params = make_params(kind, channels, inner, side, gamma)
    params = BranchParams.from_tensors([None if t is None else t.to(of_params) for t in params.tensors()])  # type: ignore[misc]
    out = torch.promote_types(dtype, of_params)
    spec = BranchSpec(kind, 1e-6, recompute, dtype, dtype, out)
    return BranchCall(spec, params, random(12, images, 1, 1, 1).to(out) if mask else None)


def image_maps(number: int, *size: int, dtype: torch.dtype) -> Tensor:
    return random(number, *size).to(dtype).contiguous(memory_format=torch.channels_last)


def check(call: BranchCall, x: Tensor) -> None:
    """Compares values and gradients, their types and layouts, with those of the definition."""
    grad = image_maps(20, *x.shape, dtype=call.spec.out_dtype)
    saved: list[Tensor] = []
    y = branch.forward([call], x, saved)
    dx, grads = branch.backward(call, x, saved, grad, True)
    assert grads is not None
    results = (y, dx, *grads)
    kinds = (call.spec.out_dtype, x.dtype, *[call.params.norm_weight.dtype] * len(grads))
    for ours, dtype, truth in zip(results, kinds, exact(call, x, grad), strict=True):
        assert (ours is None) == (truth is None)
        if ours is not None and truth is not None:
            assert (ours.shape, ours.dtype) == (truth.shape, dtype)
            error = (ours.double() - truth).norm() / truth.norm()
            assert error < TOLERANCES[call.spec.dtype]
    assert y.is_contiguous(memory_format=torch.channels_last)
    alone = branch.backward(call, x, saved, grad, False)
    assert torch.equal(alone[0], dx)
    assert alone[1] is None
    assert torch.equal(branch.forward([call], x, None), y), "the same without a backward pass"


@pytest.mark.slow
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("kind", SpatialMixing)
@pytest.mark.parametrize("options", [{}, {"gamma": False, "mask": False}, {"recompute": False, "mask": False}], ids=str)
def test_values_and_gradients(kind, types, options):
    check(make_call(kind, types, channels=5, **options), image_maps(0, 2, 5, 4, 3, dtype=types[1]))


@pytest.mark.slow
@pytest.mark.parametrize("types", TYPES[1:], ids=str)
def test_the_modulation_on_tensor_cores(types, monkeypatch):
    monkeypatch.setattr(mixing, "MIN_BAND_PROGRAMS", 1)
    used, real = [], mixing.convolve_band
    monkeypatch.setattr(mixing, "convolve_band", lambda *args: (used.append(1), real(*args)))
    check(make_call(SpatialMixing.MODULATION, types), image_maps(0, 2, 8, 2, 3, dtype=types[1]))
    assert used


def test_branches_of_a_stage_are_prepared_together():
    """Their weights come as one copy; those that are of the right type already stay what they are."""
    kinds = [SpatialMixing.MODULATION, SpatialMixing.MLP]
    for types in TYPES[:2]:
        calls = branch.prepare([make_call(kind, types) for kind in kinds])
        assert branch.prepare(calls) == calls
        for call in calls:
            products, params = call.products, call.params
            assert products is not None
            assert {t.dtype for t in products[:4]} == {types[0]}
            expected = torch.cat([weight.flatten(1) for weight in params.in_weights]).to(types[0])
            assert torch.equal(products.in_weight, expected)
            assert torch.equal(products.in_bias, torch.cat(params.in_biases).to(types[0]))
            assert torch.equal(products.out_weight, params.out_weight.flatten(1).to(types[0]))
            if types[0] == types[1]:
                assert products.out_weight.data_ptr() == params.out_weight.data_ptr()


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_a_branch_computes_the_norm_of_the_next(monkeypatch, types, trains):
    """With its residual sum, in one pass: the same bits, and two kernels less for each two branches."""
    calls = [make_call(kind, types, channels=5, mask=i < 2) for i, kind in enumerate([*SpatialMixing] * 2)]
    x = image_maps(0, 2, 5, 3, 4, dtype=types[1])
    launches: list[str] = []
    real = rows.launch

    def launch(kernel, *args, **options) -> None:
        launches.append(kernel.fn.__name__)
        real(kernel, *args, **options)

    monkeypatch.setattr(rows, "launch", launch)
    with torch.set_grad_enabled(trains):
        linked = branch.prepare(calls)
    apart = [branch.prepare([call])[0] for call in calls]
    results = []
    for row in (linked, apart):
        y, maps = x, []
        for call in row:
            saved: list[Tensor] | None = [] if trains else None
            y = branch.forward([call], y, saved)
            maps += [y, *(saved or [])[:4]]  # what may follow differs
        results.append(maps)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert launches.count("residual_norm_kernel") == 3
    assert launches.count("layer_norm_kernel") == 1 + 4
    assert all(call.links.norm is None or call.links.norm.result is None for call in linked), "nothing is kept"


def test_a_norm_that_was_not_computed_is_computed():
    """Where the branch before it is another backend's."""
    first, second = branch.prepare([make_call(kind, TYPES[0]) for kind in SpatialMixing])
    x = image_maps(0, 1, 8, 2, 3, dtype=torch.float32)
    assert torch.equal(
        branch.forward([second], x, None), branch.forward([second._replace(products=None, links=None)], x, None)
    )
    assert first.links.next_norm is second.links.norm


@pytest.mark.slow
def test_the_same_input_gives_the_same_bits():
    call = make_call(SpatialMixing.MODULATION, TYPES[0])
    x = image_maps(0, 2, 8, 3, 3, dtype=torch.float32)
    rounds = []
    for _ in range(2):
        saved: list[Tensor] = []
        y = branch.forward([call], x, saved)
        dx, grads = branch.backward(call, x, saved, x, True)
        assert grads is not None
        rounds.append([y, dx, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*rounds, strict=True))
