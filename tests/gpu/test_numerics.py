"""Values and gradients against the plain formula in float64, and against the plain path in the same type."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import conv2former
from conv2former.models.compiled import compile_blocks
from conv2former.ops import operators

from ..models.test_fusion import plain, relative
from .conftest import DEVICE, REHEARSES, needs_gpu

TYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def without_tensor_float_32():
    """Which convolutions and matrix products would round to, and then nothing could be said of float32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def worst_error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Returns the largest relative error of a tensor."""
    assert len(ours) == len(exact)
    assert all(torch.isfinite(x).all() for x in ours)
    return max(relative(a, b) for a, b in zip(ours, exact, strict=True))


# ------------------------------------------------------------------------------------------------------- operators


class Shape(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    k: int


# Stages of t and n; sizes that divide by nothing; kernels from 3 to 31; matrix products and not; one image
SHAPES = [
    Shape(16, 72, 56, 56, 11),
    Shape(1, 72, 56, 56, 11),
    Shape(2, 64, 25, 33, 7),
    Shape(33, 576, 7, 7, 11),
    Shape(3, 20, 13, 9, 3),
    Shape(2, 24, 40, 31, 31),
    Shape(5, 15, 1, 1, 5),
]


@pytest.fixture(scope="module")
def compiled_together():
    """All kernels of the operators, compiled on all cores: one by one they take minutes."""
    if REHEARSES:
        return
    from conv2former.ops.cuda import mixing
    from conv2former.ops.cuda.ahead import compile_together, launched_by

    def run() -> None:
        for (n, c, h, w, k), dtype in itertools.product(SHAPES, TYPES):
            x = torch.empty(n, c, h, w, device="meta", dtype=dtype).contiguous(memory_format=torch.channels_last)
            weight, weight3 = (torch.empty(c, 1, side, side, device="meta") for side in (k, 3))
            bias = torch.empty(c, device="meta")
            mixing.modulate_backward(mixing.modulate(x, weight, bias, x), x, weight, bias, x)
            mixing.mlp_mix_backward(mixing.mlp_mix(x, weight3, bias), x, weight3, bias)
            mixing.depthwise_conv2d_backward(mixing.depthwise_conv2d(x, weight, bias), x, weight, bias)

    compile_together(launched_by(run), DEVICE)


@pytest.mark.usefixtures("compiled_together")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_operators(shape, dtype):
    n, c, h, w, k = shape._replace(n=1) if REHEARSES else shape
    torch.manual_seed(0)
    map_format = {"device": DEVICE, "dtype": dtype, "memory_format": torch.channels_last}
    a, v, grad = (torch.randn(n, c, h, w).to(**map_format) for _ in range(3))
    # band_kernel rounds the weight to the maps' type, as autocast does for cuDNN
    weight = (torch.randn(c, 1, k, k) / k).to(DEVICE, dtype).float()
    weight3, bias = (torch.randn(c, 1, 3, 3) / 3).to(DEVICE, dtype).float(), torch.randn(c).to(DEVICE)

    def gradients(function, *inputs: Tensor) -> list[Tensor]:
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    def exact(function, *inputs: Tensor) -> list[Tensor]:
        return gradients(function, *(x.double() for x in inputs))

    def modulate(a, weight, bias, v):
        return F.conv2d(F.gelu(a), weight, bias, padding=k // 2, groups=c) * v

    def depthwise_conv2d(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=k // 2, groups=c)

    def mlp_mix(f, weight, bias):
        g = F.gelu(f)
        return g + F.gelu(F.conv2d(g, weight, bias, padding=1, groups=c))

    for ours, formula, inputs in (
        (operators.modulate, modulate, (a, weight, bias, v)),
        (operators.mlp_mix, mlp_mix, (a, weight3, bias)),
        (operators.depthwise_conv2d, depthwise_conv2d, (a, weight, bias)),
    ):
        results, truth = gradients(ours, *inputs), exact(formula, *inputs)
        theirs = gradients(formula, *(x.to(dtype) for x in inputs))
        assert worst_error(results, truth) < 1.5 * worst_error(theirs, truth) + EPS[dtype]
        assert [x.dtype for x in results[1:]] == [x.dtype for x in inputs]
        again = gradients(ours, *inputs)
        assert all(torch.equal(x, y) for x, y in zip(results, again, strict=True)), "the same bits"


# -------------------------------------------------------------------------------------------------------- networks


class Case(NamedTuple):
    name: str
    dtype: torch.dtype
    batch: int
    size: tuple[int, int]
    channels_last: bool


ODD, SMALL, USUAL = (97, 131), (64, 64), (224, 224)
CASES = [
    Case("conv2former_n", torch.float32, 2, ODD, False),
    Case("conv2former_n", torch.bfloat16, 96, SMALL, True),
    Case("conv2former_n", torch.float16, 2, USUAL, True),
    Case("conv2former_t", torch.float32, 2, USUAL, True),
    Case("conv2former_t", torch.bfloat16, 96, SMALL, False),
    Case("conv2former_t", torch.bfloat16, 2, ODD, True),
    Case("conv2former_t", torch.float16, 2, ODD, True),
    Case("conv2former_b_22k", torch.bfloat16, 2, USUAL, True),
]
if REHEARSES:
    CASES = [Case("conv2former_n", torch.float32, 2, (33, 47), False), Case("conv2former_n", TYPES[1], 2, SMALL, True)]


def network(name: str, channels_last: bool) -> nn.Module:
    """Returns a network that trains, whose branches count: with the published layer scale of 1e-6 they do not."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, ls_init_value=0.1).to(DEVICE).train()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def batch_for(case: Case) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    images = torch.randn(case.batch, 3, *case.size).to(DEVICE)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return images.contiguous(memory_format=layout), torch.randint(10, (case.batch,)).to(DEVICE)


def step(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Returns logits and all gradients."""
    model.zero_grad()
    with torch.autocast(DEVICE.type, dtype, enabled=dtype in TYPES[1:]):
        logits = model(images)
    scale = 1024.0 if dtype == torch.float16 else 1.0
    (F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels) * scale).backward()
    return [logits.detach(), *(p.grad.double() / scale for p in model.parameters())]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_networks(case):
    """Values and all gradients, at most 1.5 times as far from float64 as the plain path in the same type."""
    model, (images, labels) = network(case.name, case.channels_last), batch_for(case)
    exact = step(plain(model).double(), images.double(), labels, torch.float64)
    theirs = step(plain(model), images, labels, case.dtype)
    modes = {"eager": model}
    if case.name == "conv2former_n" and case.dtype == torch.bfloat16:
        modes["compile"] = copy.deepcopy(model)
        compile_blocks(block for stage in modes["compile"].stages for block in stage.blocks)
    for mode, candidate in modes.items():
        ours = step(candidate, images, labels, case.dtype)
        assert relative(ours[0], exact[0]) < 1.5 * relative(theirs[0], exact[0]) + EPS[case.dtype], mode
        whole = [torch.cat([g.flatten() for g in found[1:]]) for found in (ours, theirs, exact)]
        assert relative(whole[0], whole[2]) < 1.5 * relative(whole[1], whole[2]) + EPS[case.dtype], mode
        # one gradient of a few numbers may be luckier in one of the paths
        assert worst_error(ours[1:], exact[1:]) < 3 * worst_error(theirs[1:], exact[1:]) + EPS[case.dtype], mode


@needs_gpu
@pytest.mark.parametrize("name", ["conv2former_n", "conv2former_t"])
@pytest.mark.parametrize("batch", [1, 32])
def test_a_captured_network_gives_the_same_bits(name, batch, caplog):
    model = network(name, True).eval()
    serve = conv2former.capture(model, torch.zeros(batch, 3, *USUAL, device=DEVICE), dtype=torch.bfloat16)
    for seed in range(3):
        torch.manual_seed(seed)
        images = torch.randn(batch, 3, *USUAL, device=DEVICE)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            expected = model(images)
        assert torch.equal(serve(images), expected)
    assert not caplog.records, "a capture that fails is a warning"


@needs_gpu
def test_what_cannot_be_captured_is_computed_plainly():
    """In a process of its own, which captures nothing after it."""
    program = """
import torch, timm, conv2former
model = timm.create_model("conv2former_n", num_classes=10).cuda().eval()
waits = model.forward_head
model.forward_head = lambda x: waits(x) * float(x.abs().max() > 0)  # which no graph can
images = torch.randn(2, 3, 64, 64, device="cuda")
serve = conv2former.capture(model, images)
torch.manual_seed(3)
drawn = torch.rand(5, device="cuda")
torch.manual_seed(3)
assert torch.equal(torch.rand(5, device="cuda"), drawn)
with torch.inference_mode():
    assert torch.equal(serve(images), model(images))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert "no CUDA graph: " in ended.stderr
