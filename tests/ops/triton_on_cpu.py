"""The Triton kernels on the CPU, in Triton's interpreter, against float64 PyTorch: `python triton_on_cpu.py CASES`.

A program of its own, since the interpreter must be chosen before Triton is imported. It takes cases, a JSON list, and
writes a line of JSON for each: relative errors and types of result and gradients, whether maps are channels_last, and
whether no tensor shares memory with another, which torch asks of operators.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from conv2former.ops.cuda import mixing


def multiply_bfloat16() -> None:
    """Mends the interpreter of Triton 3.9, which multiplies the bits of bfloat16 matrices as integers."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widen(x: Any) -> Any:
        if x.dtype != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot_widened(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return create_dot(self, widen(a), widen(b), *args)

    interpreter.InterpreterBuilder.create_dot = create_dot_widened


def reference(name: str, a: Tensor, weight: Tensor, bias: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Returns result and gradients of the formula, in float64, in the operators' order."""
    a, weight, bias, v = (x.detach().double().requires_grad_() for x in (a, weight, bias, v))
    h = F.gelu(a)
    c = F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2, groups=a.shape[1])
    inputs = (a, weight, bias, v) if name == "modulate" else (a, weight, bias)
    out = c * v if name == "modulate" else h + F.gelu(c)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.double())]


def error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


def run(name: str, shape: list[int], kernel_size: int, dtype: str, band: bool) -> dict[str, Any]:
    """Runs an operator and its gradient on random numbers."""
    mixing.MIN_BAND_PROGRAMS = 1 if band else 10**9
    map_dtype = getattr(torch, dtype)
    assert (mixing.choose_band(torch.Size(shape), map_dtype, kernel_size) is not None) == band
    torch.manual_seed(0)
    a, v, grad = (torch.randn(shape).to(map_dtype, memory_format=torch.channels_last) for _ in range(3))
    weight = torch.randn(shape[1], 1, kernel_size, kernel_size) / kernel_size
    if band:  # which rounds it
        weight = weight.to(map_dtype).float()
    bias = torch.randn(shape[1])

    if name == "modulate":
        results = [mixing.modulate(a, weight, bias, v)]
        results += mixing.modulate_backward(grad, a, weight, bias, v)
    else:
        results = [mixing.mlp_mix(a, weight, bias)]
        results += mixing.mlp_mix_backward(grad, a, weight, bias)
    expected = reference(name, a, weight, bias, v, grad)
    memories = {x.untyped_storage().data_ptr() for x in (*results, a, weight, bias, v, grad)}
    return {
        "errors": [error(x, y) for x, y in zip(results, expected, strict=True)],
        "types": [str(x.dtype).removeprefix("torch.") for x in results],
        "channels_last": all(x.is_contiguous(memory_format=torch.channels_last) for x in results[:2]),
        "apart": len(memories) == len(results) + 5,
    }


if __name__ == "__main__":
    multiply_bfloat16()
    torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        print(json.dumps(run(**case)), flush=True)
