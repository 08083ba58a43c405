"""The Triton kernels of both mixings without a GPU: their values, as operators before torch's checks, compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conv2former.ops import operators

from .interpreter import INTERPRETS, mend, needs_interpreter, needs_triton

if INTERPRETS:
    from conv2former.ops.cuda import mixing

pytestmark = pytest.mark.slow

# The relative errors of the results in the maps' type: rounding, once or a few times.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True, scope="module")
def mended():
    if INTERPRETS:
        mend()


class Case(NamedTuple):
    name: str
    shape: tuple[int, int, int, int]
    kernel_size: int
    dtype: torch.dtype
    band: bool = False  # matrix products
    parts: int = 1  # of the height, in which these are cut


# Odd sizes, maps smaller than the kernel, one and several strips, channels that are odd or no power of two.
CASES = [
    Case("modulate", (2, 3, 4, 5), 1, torch.float32),
    Case("modulate", (2, 6, 5, 9), 3, torch.float32),
    Case("modulate", (2, 5, 3, 4), 3, torch.float16),
    Case("modulate", (1, 5, 4, 7), 7, torch.bfloat16),
    Case("modulate", (1, 6, 3, 15), 11, torch.float32),
    Case("modulate", (2, 72, 1, 2), 11, torch.bfloat16),
    Case("modulate", (1, 2, 3, 2), 13, torch.float16),
    Case("modulate", (1, 2, 2, 9), 31, torch.float32),
    Case("modulate", (2, 16, 2, 9), 11, torch.float16, band=True),
    Case("modulate", (17, 8, 1, 5), 7, torch.bfloat16, band=True),
    Case("modulate", (1, 8, 2, 19), 11, torch.bfloat16, band=True),
    Case("modulate", (2, 8, 3, 20), 7, torch.float16, band=True),
    Case("modulate", (1, 8, 2, 17), 13, torch.bfloat16, band=True),
    Case("modulate", (1, 8, 7, 5), 5, torch.bfloat16, band=True, parts=3),
    Case("modulate", (2, 8, 2, 3), 7, torch.float16, band=True, parts=4),
    Case("depthwise_conv2d", (2, 6, 5, 9), 3, torch.float32),
    Case("depthwise_conv2d", (1, 5, 4, 7), 11, torch.bfloat16),
    Case("depthwise_conv2d", (1, 2, 2, 9), 31, torch.float32),
    Case("depthwise_conv2d", (1, 8, 2, 17), 7, torch.float16, band=True),
    Case("depthwise_conv2d", (17, 8, 1, 5), 13, torch.bfloat16, band=True),
    Case("mlp_mix", (2, 6, 5, 9), 3, torch.float32),
    Case("mlp_mix", (2, 3, 1, 1), 3, torch.float32),
    Case("mlp_mix", (2, 5, 6, 2), 3, torch.bfloat16),
    Case("mlp_mix", (2, 12, 2, 7), 3, torch.float16),
]


def reference(name: str, a: Tensor, weight: Tensor, bias: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Returns result and gradients of the formula, in float64, in the operators' order."""
    a, weight, bias, v = (x.detach().double().requires_grad_() for x in (a, weight, bias, v))
    h = a if name == "depthwise_conv2d" else F.gelu(a)
    c = F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2, groups=a.shape[1])
    inputs = (a, weight, bias, v) if name == "modulate" else (a, weight, bias)
    out = {"modulate": c * v, "mlp_mix": h + F.gelu(c), "depthwise_conv2d": c}[name]
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.double())]


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_the_kernels_compute_the_formula_and_its_gradients(case, monkeypatch):
    """To the rounding of the maps' type; gradients of weight and bias come in their own, float32."""
    name, shape, kernel_size, dtype, band, parts = case
    monkeypatch.setattr(mixing, "BAND_PARTS", parts)
    monkeypatch.setattr(mixing, "MIN_BAND_PROGRAMS", 1 if band else 10**9)
    assert (mixing.choose_band(torch.Size(shape), dtype, kernel_size) is not None) == band
    torch.manual_seed(0)
    a, v, grad = (torch.randn(shape).to(dtype, memory_format=torch.channels_last) for _ in range(3))
    weight, bias = torch.randn(shape[1], 1, kernel_size, kernel_size) / kernel_size, torch.randn(shape[1])
    if band:  # which rounds it
        weight = weight.to(dtype).float()

    if name == "modulate":
        results = [mixing.modulate(a, weight, bias, v), *mixing.modulate_backward(grad, a, weight, bias, v)]
    else:
        forward, backward = getattr(mixing, name), getattr(mixing, f"{name}_backward")
        results = [forward(a, weight, bias), *backward(grad, a, weight, bias)]
    expected = reference(name, a, weight, bias, v, grad)
    for ours, truth in zip(results, expected, strict=True):
        assert (ours.double() - truth).norm() / truth.norm() < TOLERANCES[dtype]
    types = [dtype, dtype, torch.float32, torch.float32, dtype]
    assert [x.dtype for x in results] == types[: len(results)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in results[:2])
    memories = {x.untyped_storage().data_ptr() for x in (*results, a, weight, bias, v, grad)}
    assert len(memories) == len(results) + 5, "no tensor shares memory with another"


@pytest.fixture
def operators_of_a_gpu(monkeypatch):
    """Puts the implementations that run on a GPU behind the operators, for maps on the CPU."""
    for name in ("depthwise_conv2d", "modulate", "mlp_mix"):
        monkeypatch.setattr(operators.cpu_operators, f"{name}_backward", getattr(mixing, f"{name}_backward"))
        monkeypatch.setattr(operators.cpu_operators, name, getattr(mixing, name))
    monkeypatch.setattr(mixing, "choose_strip", lambda width, choices: 2)  # less to interpret


def operands(shape: tuple[int, ...], map_dtype: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
    """Returns a, weight, bias and v."""
    torch.manual_seed(0)
    a, v = (torch.randn(shape).to(map_dtype, memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.randn(shape[1], 1, 3, 3, dtype=dtype), torch.randn(shape[1], dtype=dtype)
    return [x.requires_grad_() for x in (a, weight, bias, v)]


@needs_interpreter
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype", "shape"),
    [
        (torch.float32, torch.float32, (2, 3, 1, 4)),
        (torch.bfloat16, torch.bfloat16, (1, 8, 3, 2)),
        (torch.bfloat16, torch.float32, (2, 3, 1, 4)),
        (torch.float16, torch.float16, (2, 3, 1, 4)),
        (torch.float16, torch.float32, (1, 8, 3, 2)),
    ],
    ids=str,
)
def test_torch_accepts_what_runs_on_a_gpu(operators_of_a_gpu, dtype, parameter_dtype, shape):
    """Torch's own checks: results that alias arguments or each other, shapes, strides, types, autograd.

    NCHW maps too, which the operators bring into channels_last memory.
    """
    ops, checks = torch.ops.conv2former, ("test_schema", "test_faketensor", "test_autograd_registration")
    a, weight, bias, v = operands(shape, dtype, parameter_dtype)
    torch.library.opcheck(ops.modulate.default, (a, weight, bias, v), test_utils=checks)
    torch.library.opcheck(ops.mlp_mix.default, (a, weight, bias), test_utils=checks)
    torch.library.opcheck(ops.depthwise_conv2d.default, (a, weight, bias), test_utils=checks)
    a, v, weight, bias = (x.detach() for x in (a, v, weight, bias))  # the gradients' operators have no gradient
    for x in (a, a.contiguous()):
        grad = torch.randn_like(x)
        torch.library.opcheck(ops.modulate_backward.default, (grad, x, weight, bias, v), test_utils=checks)
        torch.library.opcheck(ops.mlp_mix_backward.default, (grad, x, weight, bias), test_utils=checks)
        torch.library.opcheck(ops.depthwise_conv2d_backward.default, (grad, x, weight, bias), test_utils=checks)


@needs_interpreter
def test_torch_refuses_gradients_that_share_memory(operators_of_a_gpu, monkeypatch):
    """Which stopped training in float32 once; the check above sees it."""

    def two_views(partials):
        weight, bias, sums = partials.weight, partials.bias, partials.sums.sum((0, 2))
        return [sums[:-1].t().reshape(weight.shape).to(weight.dtype), sums[-1].to(bias.dtype)], []

    monkeypatch.setattr(mixing, "sum_partials", two_views)
    with pytest.raises(RuntimeError, match="may not alias"):
        operators.modulate(*operands((1, 1, 2, 2), torch.float32, torch.float32)).sum().backward()


@needs_triton
def test_a_block_compiles_for_a_gpu(tmp_path):
    """For a Hopper GPU, a block of the first stage of conv2former_t, batch 128, with registers for nearly everything.

    Triton's versions differ by some bytes. `band_kernel` has more of them: its registers are capped, so that two
    programs share a multiprocessor.
    """
    command = [sys.executable, str(Path(__file__).with_name("triton_compile.py")), "90"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    out = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert out.returncode == 0, out.stderr[-3000:]
    reports = [json.loads(line) for line in out.stdout.splitlines()]
    kernels = {report["kernel"].removesuffix("_kernel") for report in reports}
    assert {"band", "depthwise_weight", "mlp", "mlp_backward"} < kernels
    assert {"layer_norm", "layer_norm_backward", "residual_norm"} < kernels
    for report in reports:
        assert report["spilled_bytes"] <= (128 if report["kernel"] == "band_kernel" else 16), report
        assert report["shared_bytes"] <= 113 * 1024, report  # half of what a multiprocessor has
        assert report["programs"] >= 2, report
        counts = report["instructions"]
        assert counts["all"] > counts["global"] > 0, report
        assert (counts["matrix"] > 0) == (report["kernel"] == "band_kernel"), report
        # a thread has 16 numbers; several times as many instructions if each is given all pixels of its program
        assert report["kernel"] != "residual_norm_kernel" or counts["all"] < 700, report
        assert counts["local"] == 0 or report["spilled_bytes"] > 0, report
