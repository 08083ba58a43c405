"""The fused operators: their formulas, and what torch asks of operators. `test_cuda_kernels.py` has those of GPUs."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from conv2former.ops import backends, operators
from conv2former.ops.cpu import native
from conv2former.tools.runs.killing import RunProcesses

from . import data_parallel
from .interpreter import INTERPRETS


def maps(*shape: int, count: int = 1, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    last = torch.channels_last
    return [torch.randn(shape, dtype=dtype).contiguous(memory_format=last).requires_grad_() for _ in range(count)]


def parameters(channels: int, side: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    weight = torch.randn(channels, 1, side, side, dtype=dtype, requires_grad=True)
    return weight, torch.randn(channels, dtype=dtype, requires_grad=True)


def plain_modulate(a, weight, bias, v):
    return F.conv2d(F.gelu(a), weight, bias, padding=weight.shape[-1] // 2, groups=a.shape[1]) * v


def plain_mlp_mix(f, weight, bias):
    h = F.gelu(f)
    return h + F.gelu(F.conv2d(h, weight, bias, padding=1, groups=f.shape[1]))


@pytest.fixture(params=["native", "PyTorch's operators"])
def on_the_cpu(request, monkeypatch):
    if request.param != "native":
        monkeypatch.setenv("CONV2FORMER_COMPILE", "0")
    elif not native.usable(torch.float64):
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("side", [1, 3, 11])
def test_modulate_on_the_cpu_is_the_formula(side, on_the_cpu):
    (a, v), (weight, bias) = maps(2, 3, 4, 5, count=2), parameters(3, side)
    out, plain = operators.modulate(a, weight, bias, v), plain_modulate(a, weight, bias, v)
    inputs, grad = (a, weight, bias, v), torch.randn_like(out)
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(plain, inputs, grad)
    for result in (torch.autograd.grad(out, inputs, grad), operators.modulate_backward(grad, *inputs)):
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


def test_mlp_mix_on_the_cpu_is_the_formula(on_the_cpu):
    (f,), (weight, bias) = maps(2, 3, 4, 5), parameters(3, 3)
    out, plain = operators.mlp_mix(f, weight, bias), plain_mlp_mix(f, weight, bias)
    inputs, grad = (f, weight, bias), torch.randn_like(out)
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(plain, inputs, grad)
    for result in (torch.autograd.grad(out, inputs, grad), operators.mlp_mix_backward(grad, *inputs)):
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


def test_gradients_have_the_types_of_what_they_are_of(on_the_cpu):
    """Under autocast maps are in 16 bits and parameters in 32."""
    (a, v), (weight, bias) = maps(2, 8, 4, 5, count=2, dtype=torch.bfloat16), parameters(8, 3, torch.float32)
    out = operators.mlp_mix(operators.modulate(a, weight, bias, v), weight, bias)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert [x.grad.dtype for x in (a, v)] == [torch.bfloat16] * 2
    assert [x.grad.dtype for x in (weight, bias)] == [torch.float32] * 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_accepts_the_operators(dtype, on_the_cpu):
    """Schemas, results without data (shapes, strides, types), autograd and tracing, as torch checks them."""
    (a, v), (weight, bias) = maps(2, 6, 5, 4, count=2, dtype=dtype), parameters(6, 3, torch.float32)
    grad = torch.randn_like(a)
    ops = torch.ops.conv2former
    torch.library.opcheck(ops.modulate.default, (a, weight, bias, v))
    torch.library.opcheck(ops.mlp_mix.default, (a, weight, bias))
    a, v, weight, bias = (x.detach() for x in (a, v, weight, bias))  # the gradients' operators have no gradient
    torch.library.opcheck(ops.modulate_backward.default, (grad, a, weight, bias, v))
    torch.library.opcheck(ops.mlp_mix_backward.default, (grad, a, weight, bias))


def test_the_operators_compile_as_one_graph_with_any_size(monkeypatch):
    monkeypatch.setitem(backends._devices, 0, False)

    def compute(a, v, weight, bias):
        assert backends.supports_operators(a, 3) in (True, False)  # asked and answered outside of the graph
        sign = -1.0 if backends._runs_triton(0) else 1.0
        return sign * operators.mlp_mix(operators.modulate(a, weight, bias, v), weight, bias)

    program = torch.compile(compute, fullgraph=True, dynamic=True, backend="aot_eager")
    weight, bias = parameters(6, 3)
    for size in (5, 7):
        inputs = (*maps(2, 6, size, 4, count=2), weight, bias)
        out, plain = program(*inputs), compute(*inputs)
        torch.testing.assert_close(out, plain)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(plain.sum(), inputs), rtol=1e-10, atol=1e-10
        )


def test_a_second_derivative_is_refused_with_a_way_out():
    (a, v), (weight, bias) = maps(1, 2, 3, 3, count=2), parameters(2, 3)
    for name, out in (
        ("modulate", operators.modulate(a, weight, bias, v)),
        ("mlp_mix", operators.mlp_mix(a, weight, bias)),
    ):
        (grad,) = torch.autograd.grad(out.sum(), a, create_graph=True)
        with pytest.raises(RuntimeError, match=f"^{name} has no second derivative: .*fused=False"):
            grad.sum().backward()


def test_checkpointing_computes_the_operators_again():
    (a, v), (weight, bias) = maps(1, 2, 3, 3, count=2), parameters(2, 3)
    out = torch.utils.checkpoint.checkpoint(operators.modulate, a, weight, bias, v, use_reentrant=False)
    expected = torch.autograd.grad(operators.modulate(a, weight, bias, v).sum(), (a, weight))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (a, weight)), expected)


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_every_backend(tmp_path):
    """With DistributedDataParallel and gloo; the GPU's backend in float32 and Triton's interpreter."""
    log = tmp_path / "output.txt"
    processes = RunProcesses(data_parallel.main, 2, log)
    assert processes.wait(250), log.read_text()
    assert not processes.has_failed, log.read_text()
    differences = json.loads(log.read_text().splitlines()[-1])
    compiled = ["compiled", "blocks, fused: True", "blocks, fused: False"]
    assert set(differences) == {"eager", *compiled, *(["cuda"] if INTERPRETS else [])}
    assert differences.pop("cuda", 0.0) < 1e-4
    assert max(differences.values()) < 1e-10, differences


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(2, 1, 3, 3)}, r"weight must be \(C, 1, k, k\) with C = 6, odd k up to 31, .*\(2, 1, 3"),
        ({"weight": torch.zeros(6, 1, 4, 4)}, r"odd k up to 31, but is \(6, 1, 4, 4\)"),
        ({"weight": torch.zeros(6, 1, 33, 33)}, "odd k up to 31"),
        ({"bias": torch.zeros(5)}, r"bias must be \(C,\) with C = 6, but is \(5,\)"),
        ({"v": torch.zeros(2, 6, 5, 5)}, r"v must be .* like a, \(2, 6, 5, 4\) torch.float32, but is \(2, 6, 5, 5\)"),
        ({"v": torch.zeros(2, 6, 5, 4).half()}, "but is .* torch.float16"),
        ({"a": torch.zeros(6, 5, 4), "v": torch.zeros(6, 5, 4)}, r"a must be \(N, C, H, W\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    (a, v), (weight, bias) = maps(2, 6, 5, 4, count=2, dtype=torch.float32), parameters(6, 3, torch.float32)
    with pytest.raises(ValueError, match=f"^modulate: .*{message}"):
        operators.modulate(**{"a": a, "weight": weight, "bias": bias, "v": v} | change)


def test_mlp_mix_takes_three_by_three_only():
    (f,), (weight, bias) = maps(2, 6, 5, 4), parameters(6, 5)
    with pytest.raises(ValueError, match=r"^mlp_mix: weight must be .* k = 3, but is"):
        operators.mlp_mix(f, weight, bias)


class OnGpu:
    """What `supports_operators` looks at, of a map that is said to be on a GPU."""

    is_cuda, is_cpu = True, False
    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype = torch.bfloat16, channels_last: bool = True) -> None:
        self.dtype = dtype
        self.channels_last = channels_last

    def is_contiguous(self, memory_format: torch.memory_format) -> bool:
        assert memory_format == torch.channels_last
        return self.channels_last


def test_supports_operators_says_where_the_kernels_run(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(backends._devices, 0, True)
    assert backends.supports_operators(OnGpu(), 11)
    assert backends.supports_operators(OnGpu(torch.float32), 31)
    assert not backends.supports_operators(OnGpu(torch.float64), 11)
    assert not backends.supports_operators(OnGpu(channels_last=False), 11)
    assert not backends.supports_operators(OnGpu(), 33)
    assert not backends.supports_operators(OnGpu(), 4)
    assert not backends.supports_operators(OnGpu(), 11, dilation=2)
    on_cpu = torch.zeros(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    assert not backends.supports_operators(on_cpu, 11)
    assert backends.supports_operators(on_cpu, 11, alone=True) == native.usable(torch.float32)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True, raising=False)
    assert not backends.supports_operators(OnGpu(), 11)


def test_supports_operators_on_the_cpu_while_something_compiles(monkeypatch):
    x = torch.zeros(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(native, "usable", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.delattr(torch.compiler, "is_exporting", raising=False)  # as in torch 2.6, which cannot tell
    assert not backends.supports_operators(x, 11)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: False, raising=False)
    assert backends.supports_operators(x, 11)
    assert not backends.supports_operators(x.half(), 11)
    assert not backends.supports_operators(x.contiguous(), 11)
    assert not backends.supports_operators(x, 33)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True, raising=False)
    assert not backends.supports_operators(x, 11)


@pytest.mark.parametrize(
    ("capability", "triton", "runs"),
    [
        ((8, 0), "3.9.0", True),
        ((9, 0), "3.10.0+git1a2b3c", True),
        ((7, 5), "3.9.0", False),
        ((9, 0), "3.2.0", False),
        ((9, 0), None, False),
    ],
)
def test_a_device_runs_the_kernels_if_it_and_triton_are_new_enough(monkeypatch, capability, triton, runs):
    monkeypatch.setattr(backends, "_devices", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, "triton", triton and SimpleNamespace(__version__=triton))  # None: ImportError
    assert backends._runs_triton(0) == runs
    assert backends._devices == {0: runs}


class Modulate(torch.nn.Module):
    """What a caller does: the operator where it is usable, the formula elsewhere."""

    def forward(self, a, v, weight, bias):
        modulate = operators.modulate if backends.supports_operators(a, weight.shape[-1]) else plain_modulate
        return modulate(a, weight, bias, v)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 has no maps on a GPU without data")
def test_an_exported_program_has_no_operator_of_ours(monkeypatch):
    """It is to run without this package. Traced otherwise, a map on a GPU (here without data) takes the operator."""
    monkeypatch.setitem(backends._devices, 0, True)
    monkeypatch.setattr(torch.version, "hip", None)
    with FakeTensorMode():
        a, v = (torch.empty(1, 2, 3, 4, device="cuda").contiguous(memory_format=torch.channels_last) for _ in range(2))
        inputs = (a, v, torch.empty(2, 1, 3, 3, device="cuda"), torch.empty(2, device="cuda"))
    assert "conv2former.modulate" in str(make_fx(Modulate())(*inputs).graph)
    for strict in (False, True):
        assert "conv2former" not in str(torch.export.export(Modulate(), inputs, strict=strict).graph)
