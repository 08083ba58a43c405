"""The two heavy parts of the block as single operations, with hand-written gradients.

    modulate(a, weight, bias, v) = (conv_dw(gelu(a)) + bias) * v
    mlp_mix(f, weight, bias)     = h + gelu(conv_dw(h) + bias)  with  h = gelu(f)

They are operators of torch (`torch.ops.conv2former`), so that torch.compile, DDP and checkpointing see one step each.
They keep their arguments for the backward pass and compute everything between again. On NVIDIA GPUs they are Triton
kernels, on CPUs the functions of `compiled.py` or, without a C++ compiler, the formulas above, written out. `usable`
says where they are faster than these. Triton is imported when a kernel first runs, and nothing here needs it before.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compiled

__all__ = [
    "MAX_KERNEL_SIZE",
    "MIN_TRITON",
    "is_exporting",
    "mlp_mix",
    "mlp_mix_backward",
    "modulate",
    "modulate_backward",
    "usable",
]

MAX_KERNEL_SIZE = 31
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # Ampere: the first with bfloat16
MIN_TRITON = "3.3"  # the oldest that was seen to compile the kernels

_devices: dict[int, bool] = {}


def usable(x: Tensor, kernel_size: int, dilation: int = 1) -> bool:
    """Says whether the operators can take `x`, are faster than plain PyTorch, and are allowed to.

    They are not where a program is taken down to run elsewhere, without this package: torch.export, TorchScript, ONNX.
    On a CPU they are for torch.compile; otherwise `fused.py` has a better way.

    Args:
        x: a map (N, C, H, W); the other maps of the call must be like it.
        kernel_size: side of the depthwise kernel.
        dilation: its dilation; there are kernels for 1 only.

    Returns:
        True for maps in channels_last memory and an odd kernel size of at most 31: float32, bfloat16 or float16 on an
        NVIDIA GPU of capability 8.0 or more, with Triton 3.3 or newer installed; while torch.compile is at work (torch
        2.7 or newer), float32, bfloat16 or float64 on a CPU for which `compiled.py` has functions.
    """
    if is_exporting() or kernel_size % 2 == 0 or kernel_size > MAX_KERNEL_SIZE or dilation != 1:
        return False
    if x.is_cpu:
        runs = torch.compiler.is_compiling() and _runs_compiled(x.dtype)
    else:
        runs = x.is_cuda and torch.version.hip is None and x.dtype in DTYPES and _runs_triton(x.device.index)
    return runs and x.is_contiguous(memory_format=torch.channels_last)


def is_exporting() -> bool:
    """Says whether a program is taken down to run elsewhere."""
    # Torch 2.6 does not tell torch.export from torch.compile, which then does without the operators.
    tells = hasattr(torch.compiler, "is_exporting")
    exporting = torch.compiler.is_exporting() if tells else torch.compiler.is_compiling()
    return exporting or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


@torch.compiler.assume_constant_result
def _runs_compiled(dtype: torch.dtype) -> bool:
    return compiled.usable(dtype)


@torch.compiler.assume_constant_result
def _runs_triton(device: int) -> bool:
    """Says whether a CUDA device runs the kernels. Asked at every call, found out once."""
    if device not in _devices:
        _devices[device] = torch.cuda.get_device_capability(device) >= CAPABILITY and _has_triton()
    return _devices[device]


def _has_triton() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return _release(triton.__version__) >= _release(MIN_TRITON)


def _release(version: str) -> tuple[int, ...]:
    """Reads the first two numbers of a version, also of `3.9.0+git1234`."""
    return tuple(int(part) for part in version.split(".")[:2])


def _triton() -> ModuleType:
    from . import triton_launch

    return triton_launch


def modulate(a: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
    """Convolutional modulation between its 1x1 convolutions: ``(conv_dw(gelu(a)) + bias) * v``.

    Args:
        a: (N, C, H, W), what the context is computed from.
        weight: (C, 1, k, k) of the depthwise convolution, k odd, padding k // 2, dilation 1; float32 or a's type.
        bias: (C,) likewise.
        v: the values, like `a`.

    Returns:
        (N, C, H, W) in a's type and channels_last memory. It has a gradient, and no second one.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    _check("modulate", weight, bias, a=a, v=v)
    return _modulate(a, weight, bias, v)


def modulate_backward(
    dm: Tensor, a: Tensor, weight: Tensor, bias: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `modulate`, from its arguments and the gradient `dm` of its result.

    Returns:
        Gradients of a, weight, bias and v, in their shapes and types. They cannot be differentiated.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    _check("modulate_backward", weight, bias, a=a, v=v, dm=dm)
    return _modulate_backward(dm, a, weight, bias, v)


def mlp_mix(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the MLP does between its 1x1 convolutions: ``h + gelu(conv_dw(h) + bias)`` with ``h = gelu(f)``.

    Args:
        f: (N, C, H, W), the first 1x1 convolution's result.
        weight: (C, 1, 3, 3) of the depthwise convolution, padding 1, dilation 1; float32 or f's type.
        bias: (C,) likewise.

    Returns:
        (N, C, H, W) in f's type and channels_last memory. It has a gradient, and no second one.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    _check("mlp_mix", weight, bias, 3, f=f)
    return _mlp_mix(f, weight, bias)


def mlp_mix_backward(ds: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `mlp_mix`, from its arguments and the gradient `ds` of its result.

    Returns:
        Gradients of f, weight and bias, in their shapes and types. They cannot be differentiated.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    _check("mlp_mix_backward", weight, bias, 3, f=f, ds=ds)
    return _mlp_mix_backward(ds, f, weight, bias)


def _check(name: str, weight: Tensor, bias: Tensor, kernel_size: int | None = None, **maps: Tensor) -> None:
    """Raises ValueError unless all maps are like the first and the convolution's parameters fit it."""
    first, x = next(iter(maps.items()))
    for other, y in maps.items():
        if y.dim() != 4 or y.shape != x.shape or y.dtype != x.dtype:
            raise ValueError(
                f"{name}: {other} must be (N, C, H, W) and like {first}, {tuple(x.shape)} {x.dtype}, "
                f"but is {tuple(y.shape)} {y.dtype}"
            )
    side = weight.shape[-1] if kernel_size is None else kernel_size
    if weight.shape != (x.shape[1], 1, side, side) or side % 2 == 0 or side > MAX_KERNEL_SIZE:
        sides = f"odd k up to {MAX_KERNEL_SIZE}" if kernel_size is None else f"k = {kernel_size}"
        raise ValueError(
            f"{name}: weight must be (C, 1, k, k) with C = {x.shape[1]}, {sides}, but is {tuple(weight.shape)}"
        )
    if bias.shape != (x.shape[1],):
        raise ValueError(f"{name}: bias must be (C,) with C = {x.shape[1]}, but is {tuple(bias.shape)}")


# The operators. A function below is the operator's on the CPU: the compiled functions, or the formula.


def _conv_dw(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=weight.shape[-1] // 2, groups=x.shape[1])


def _conv_dw_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pad = weight.shape[-1] // 2
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), bias.shape, [1, 1], [pad, pad], [1, 1], False, [0, 0], x.shape[1], [True] * 3
    )
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pixels(x: Tensor) -> Tensor:
    """Returns (N, C, H, W) as the compiled functions have it, (N, H, W, C)."""
    return _nhwc(x).permute(0, 2, 3, 1)


def _map(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


@torch.library.custom_op("conv2former::modulate", mutates_args=(), device_types="cpu")
def _modulate(a: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
    if compiled.usable(a.dtype):
        return _map(compiled.modulate(_pixels(a), _pixels(v), weight, bias))
    return _nhwc(_conv_dw(F.gelu(a), weight, bias) * v)


@torch.library.custom_op("conv2former::modulate_backward", mutates_args=(), device_types="cpu")
def _modulate_backward(
    dm: Tensor, a: Tensor, weight: Tensor, bias: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if compiled.usable(a.dtype):
        a, v, dm = _pixels(a), _pixels(v), _pixels(dm).clone()
        context = torch.empty_like(a)
        compiled.modulate(a, v, weight, bias, context)
        _, da, dv, dweight, (dbias, *_) = compiled.modulate_backward(dm, a, v, context, weight)
        return _map(da), dweight.to(weight.dtype), dbias.to(bias.dtype), _map(dv)
    g = F.gelu(a)
    dg, dweight, dbias = _conv_dw_backward(dm * v, g, weight, bias)
    return _nhwc(torch.ops.aten.gelu_backward(dg, a)), dweight, dbias, _nhwc(_conv_dw(g, weight, bias) * dm)


@torch.library.custom_op("conv2former::mlp_mix", mutates_args=(), device_types="cpu")
def _mlp_mix(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if compiled.usable(f.dtype):
        return _map(compiled.mix(_pixels(f), weight, bias))
    h = F.gelu(f)
    return _nhwc(h + F.gelu(_conv_dw(h, weight, bias)))


@torch.library.custom_op("conv2former::mlp_mix_backward", mutates_args=(), device_types="cpu")
def _mlp_mix_backward(ds: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if compiled.usable(f.dtype):
        _, df, dweight, (dbias, *_) = compiled.mix_backward(_pixels(ds).clone(), _pixels(f), weight, bias)
        return _map(df), dweight.to(weight.dtype), dbias.to(bias.dtype)
    h = F.gelu(f)
    dz = torch.ops.aten.gelu_backward(ds, _conv_dw(h, weight, bias))
    dh, dweight, dbias = _conv_dw_backward(dz, h, weight, bias)
    return _nhwc(torch.ops.aten.gelu_backward(ds + dh, f)), dweight, dbias


@_modulate.register_kernel("cuda")
def _(a: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
    return _triton().modulate(a, weight, bias, v)


@_modulate_backward.register_kernel("cuda")
def _(dm: Tensor, a: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _triton().modulate_backward(dm, a, weight, bias, v)


@_mlp_mix.register_kernel("cuda")
def _(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _triton().mlp_mix(f, weight, bias)


@_mlp_mix_backward.register_kernel("cuda")
def _(ds: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _triton().mlp_mix_backward(ds, f, weight, bias)


def _map_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@_modulate.register_fake
def _(a: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
    return _map_like(a)


@_modulate_backward.register_fake
def _(dm: Tensor, a: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _map_like(a), torch.empty_like(weight), torch.empty_like(bias), _map_like(v)


@_mlp_mix.register_fake
def _(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _map_like(f)


@_mlp_mix_backward.register_fake
def _(ds: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _map_like(f), torch.empty_like(weight), torch.empty_like(bias)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{name} has no second derivative: create the model with fused=False, whose plain formula has one"
        )

    return backward


_modulate.register_autograd(lambda ctx, dm: _modulate_backward(dm, *ctx.saved_tensors), setup_context=_keep_inputs)
_mlp_mix.register_autograd(lambda ctx, ds: _mlp_mix_backward(ds, *ctx.saved_tensors), setup_context=_keep_inputs)
_modulate_backward.register_autograd(_no_second_derivative("modulate"))
_mlp_mix_backward.register_autograd(_no_second_derivative("mlp_mix"))
