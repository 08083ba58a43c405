"""The spatial mixing of both branches as single operators, and the convolution in it, with hand-written gradients.

    depthwise_conv2d(x, weight, bias) = conv_dw(x) + bias
    modulate(a, weight, bias, v) = (conv_dw(gelu(a)) + bias) * v
    mlp_mix(f, weight, bias)     = h + gelu(conv_dw(h) + bias)  with  h = gelu(f)

They are operators of torch (`torch.ops.conv2former`), so that torch.compile, DDP and checkpointing see one step each.
They keep their arguments for the backward pass and compute everything between again. On NVIDIA GPUs they are Triton
kernels, on CPUs the native functions or, without a C++ compiler, the formulas above, written out. `backends.py` says
where they are faster than these. Triton is imported when a kernel first runs, and nothing here needs it before.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .cpu import operators as cpu_operators

__all__ = [
    "MAX_KERNEL_SIZE",
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "mlp_mix",
    "mlp_mix_backward",
    "modulate",
    "modulate_backward",
]

MAX_KERNEL_SIZE = 31


def _triton() -> ModuleType:
    from .cuda import mixing  # Triton is optional, and takes a second to import

    return mixing


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A depthwise convolution of stride 1: ``conv_dw(x) + bias``.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, k, k), k odd, padding k // 2, dilation 1; float32 or x's type.
        bias: (C,) likewise.

    Returns:
        (N, C, H, W) in x's type and channels_last memory. It has a gradient, and no second one.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    _check("depthwise_conv2d", weight, bias, x=x)
    return _depthwise_conv2d(x, weight, bias)


def depthwise_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `depthwise_conv2d`, from its arguments and the gradient of its result.

    Returns:
        Gradients of x, weight and bias, in their shapes and types. They cannot be differentiated.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    _check("depthwise_conv2d_backward", weight, bias, x=x, grad=grad)
    return _depthwise_conv2d_backward(grad, x, weight, bias)


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


# The operators. A function below is the operator's on the CPU.


@torch.library.custom_op("conv2former::depthwise_conv2d", mutates_args=(), device_types="cpu")
def _depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return cpu_operators.depthwise_conv2d(x, weight, bias)


@torch.library.custom_op("conv2former::depthwise_conv2d_backward", mutates_args=(), device_types="cpu")
def _depthwise_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return cpu_operators.depthwise_conv2d_backward(grad, x, weight, bias)


@torch.library.custom_op("conv2former::modulate", mutates_args=(), device_types="cpu")
def _modulate(a: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
    return cpu_operators.modulate(a, weight, bias, v)


@torch.library.custom_op("conv2former::modulate_backward", mutates_args=(), device_types="cpu")
def _modulate_backward(
    dm: Tensor, a: Tensor, weight: Tensor, bias: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpu_operators.modulate_backward(dm, a, weight, bias, v)


@torch.library.custom_op("conv2former::mlp_mix", mutates_args=(), device_types="cpu")
def _mlp_mix(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return cpu_operators.mlp_mix(f, weight, bias)


@torch.library.custom_op("conv2former::mlp_mix_backward", mutates_args=(), device_types="cpu")
def _mlp_mix_backward(ds: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return cpu_operators.mlp_mix_backward(ds, f, weight, bias)


@_depthwise_conv2d.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _triton().depthwise_conv2d(x, weight, bias)


@_depthwise_conv2d_backward.register_kernel("cuda")
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _triton().depthwise_conv2d_backward(grad, x, weight, bias)


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


@_depthwise_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _map_like(x)


@_depthwise_conv2d_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _map_like(x), torch.empty_like(weight), torch.empty_like(bias)


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
            f"{name} has no second derivative: take the plain formula, in a model fused=False, which has one"
        )

    return backward


_depthwise_conv2d.register_autograd(
    lambda ctx, grad: _depthwise_conv2d_backward(grad, *ctx.saved_tensors), setup_context=_keep_inputs
)
_modulate.register_autograd(lambda ctx, dm: _modulate_backward(dm, *ctx.saved_tensors), setup_context=_keep_inputs)
_mlp_mix.register_autograd(lambda ctx, ds: _mlp_mix_backward(ds, *ctx.saved_tensors), setup_context=_keep_inputs)
_depthwise_conv2d_backward.register_autograd(_no_second_derivative("depthwise_conv2d"))
_modulate_backward.register_autograd(_no_second_derivative("modulate"))
_mlp_mix_backward.register_autograd(_no_second_derivative("mlp_mix"))
