"""Cuts the work of `ops/operators.py` into programs of the Triton kernels, and runs them.

The cuts are functions of the shapes alone, not of timings: nothing is tuned at the start of a run, and two runs on one
GPU give the same bits. docs/performance.md has the counts that they come from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .kernels import (
    PLUS_TIMES_SLOPE,
    TIMES,
    TIMES_SLOPE,
    band_kernel,
    depthwise_kernel,
    depthwise_weight_kernel,
    mlp_backward_kernel,
    mlp_kernel,
)

__all__ = ["mlp_mix", "mlp_mix_backward", "modulate", "modulate_backward"]

PROGRAMS = 512  # where work can be cut at will: some for each of a hundred or so multiprocessors
BAND_CHANNELS = 8  # 16 bytes of each pixel; one channel for each warp
MIN_BAND_PROGRAMS = 128  # about one for each multiprocessor


class Blocking(NamedTuple):
    """How a depthwise convolution is cut: S columns of R rows per lane, BLOCK lanes per program."""

    strip: int
    rows: int
    block: int


def choose_strip(width: int, choices: Iterable[int]) -> int:
    """Returns the strip that covers a row with the fewest columns beside the map, and of those the widest."""
    return min(choices, key=lambda strip: (triton.cdiv(width, strip) * strip, -strip))


def choose_blocking(channels: int, width: int, kernel_size: int) -> Blocking:
    """Cuts a depthwise convolution so that its sums, a window of the row and the rest fit a thread's registers."""
    per_thread = 1 if channels % 2 else 2
    strip = choose_strip(width, (7, 8) if kernel_size > 13 else (7, 8, 14, 16))
    return Blocking(strip, 4 if strip <= 8 and kernel_size <= 13 else 2, 128 * per_thread)


class Band(NamedTuple):
    """How a convolution is cut into matrix products, by the constants of `band_kernel`."""

    strip: int
    columns: int
    window: int
    left: int


def choose_band(shape: torch.Size, dtype: torch.dtype, kernel_size: int) -> Band | None:
    """Returns how the tensor cores compute a convolution, or None where `depthwise_kernel` does it.

    That is for float32, which they would round; for small kernels, where they gain nothing, and large ones, whose K
    rows of sums do not fit the registers; and for few images, since a program takes 16 and too few programs are left.
    """
    n, c, _, w = shape
    if dtype == torch.float32 or not 5 <= kernel_size <= 13 or c % BAND_CHANNELS:
        return None
    if w <= 16:  # the whole row, and nothing beside the map
        columns = 8 if w <= 8 else 16
        band = Band(columns, columns, 16, 0)
    else:
        window = 16 if kernel_size <= 7 else 32
        band = Band(min(16, window - kernel_size + 1), 16, window, kernel_size // 2)
    programs = triton.cdiv(n, 16) * triton.cdiv(w, band.strip) * (c // BAND_CHANNELS)
    return band if programs >= MIN_BAND_PROGRAMS else None


class WeightBlocking(NamedTuple):
    """How its weight's gradient is cut: `groups` warps with D rows of it each, LANES lanes, strips of S columns."""

    strip: int
    rows: int
    groups: int
    lanes: int


def choose_weight_blocking(channels: int, width: int, kernel_size: int) -> WeightBlocking:
    """Cuts the weight's gradient so that each of a warp's threads has at most about 35 sums, of one or two channels."""
    per_thread = 1 if channels % 2 or kernel_size > 13 else 2
    groups = min(8, triton.next_power_of_2(triton.cdiv(kernel_size, 3)))
    rows = triton.cdiv(kernel_size, groups)
    return WeightBlocking(choose_strip(width, (7, 8)), rows, groups, 32 * per_thread * max(1, 4 // groups))


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def launch(kernel: Any, programs: int, *args: Any, warps: int = 4, **constants: int | None) -> None:
    """Runs a kernel on the device of its first argument."""
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # The kernels write a * b + c where they mean one instruction, which Triton's default may or may not allow.
        kernel[(programs,)](*args, **constants, num_warps=warps, enable_fp_fusion=True)


def pack_taps(weight: Tensor, flip: bool, rows_around: int) -> Tensor:
    """Turns a weight (C, 1, K, K) into (K + 2 rows_around, K, C) in float32, with rows of zeros around it."""
    taps = weight.float()[:, 0].permute(1, 2, 0)
    if flip:
        taps = taps.flip(0, 1)
    return F.pad(taps, (0, 0, 0, 0, rows_around, rows_around)).contiguous()


def depthwise(
    x: Tensor, weight: Tensor, epilogue: Any, p: Tensor, q: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Convolves x, (N, C, H, W), and applies the epilogue; without a bias it is a gradient with the weight flipped."""
    n, c, h, w = x.shape
    k = weight.shape[-1]
    strip, rows, block = choose_blocking(c, w, k)
    strips, row_blocks = triton.cdiv(w, strip), triton.cdiv(h, rows)
    taps = pack_taps(weight, bias is None, rows - 1)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    launch(
        depthwise_kernel, triton.cdiv(n * strips * c, block) * row_blocks,
        nhwc(x), taps, taps if bias is None else bias.contiguous(), nhwc(p), nhwc(p if q is None else q), out,
        n, h, w, strips, row_blocks, C=c, K=k, S=strip, R=rows, EPILOGUE=epilogue.value, BLOCK=block,
    )  # fmt: skip
    return out


def depthwise_weight(x: Tensor, out_grad: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of weight and bias of a depthwise convolution of x, (N, C, H, W)."""
    n, c, h, w = x.shape
    k = weight.shape[-1]
    strip, rows, groups, lanes = choose_weight_blocking(c, w, k)
    strips = triton.cdiv(w, strip)
    lane_blocks = triton.cdiv(strips * c, lanes)
    chunk_rows = max(1, triton.cdiv(n * h * lane_blocks, PROGRAMS))
    chunks = triton.cdiv(n * h, chunk_rows)
    partial = torch.empty((chunks, k * k + 1, strips, c), device=x.device)
    launch(
        depthwise_weight_kernel, lane_blocks * chunks, nhwc(x), nhwc(out_grad), partial,
        n, h, w, strips, chunks, chunk_rows, C=c, K=k, S=strip, D=rows, GROUPS=groups, LANES=lanes,
        warps=max(4, groups),
    )  # fmt: skip
    return unpack_sums(partial.sum((0, 2)), weight, bias)


def unpack_sums(sums: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Turns (K K + 1, C) into the gradients of a weight (C, 1, K, K) and a bias (C,), in their types.

    They are copies: an operator may not return two views of one tensor.
    """
    weight_grad = sums[:-1].t().reshape(weight.shape)
    return (
        weight_grad.to(weight.dtype, copy=True, memory_format=torch.contiguous_format),
        sums[-1].to(bias.dtype, copy=True),
    )


def convolve_band(
    x: Tensor, weight: Tensor, epilogue: Any, p: Tensor, band: Band, bias: Tensor | None = None
) -> Tensor:
    """Convolves gelu(x) with a bias or x without, as `depthwise` does, on the tensor cores."""
    n, c, h, w = x.shape
    k = weight.shape[-1]
    strips, image_blocks = triton.cdiv(w, band.strip), triton.cdiv(n, 16)
    taps = pack_taps(weight, bias is None, 0).to(x.dtype)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    launch(
        band_kernel, image_blocks * strips * (c // BAND_CHANNELS),
        nhwc(x), taps, taps if bias is None else bias.contiguous(), nhwc(p), out, n, h, w, strips, image_blocks,
        C=c, K=k, S=band.strip, COLUMNS=band.columns, WINDOW=band.window, LEFT=band.left, EPILOGUE=epilogue.value,
        CHANNELS=BAND_CHANNELS, warps=BAND_CHANNELS, maxnreg=128,
    )  # fmt: skip
    return out


def context(a: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
    """Returns (conv_dw(gelu(a)) + bias) * factor."""
    band = choose_band(a.shape, a.dtype, weight.shape[-1])
    if band:
        return convolve_band(a, weight, TIMES, factor, band, bias)
    return depthwise(F.gelu(a), weight, TIMES, factor, bias=bias)  # inside, each value would need GELU ten times


def modulate(a: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
    """See `operators.modulate`."""
    return context(a, weight, bias, v)


def modulate_backward(
    dm: Tensor, a: Tensor, weight: Tensor, bias: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `operators.modulate_backward`. The convolution is computed again: keeping it would cost a map."""
    dc = dm * v
    band = choose_band(a.shape, a.dtype, weight.shape[-1])
    if band:
        da = convolve_band(dc, weight, TIMES_SLOPE, a, band)
    else:
        da = depthwise(dc, weight, TIMES_SLOPE, a)
    return da, *depthwise_weight(F.gelu(a), dc, weight, bias), context(a, weight, bias, dm)


class MlpBlocking(NamedTuple):
    """How the MLP's kernels are cut: strips of S columns, row blocks, BLOCK lanes per program."""

    strip: int
    strips: int
    row_blocks: int
    block_rows: int
    block: int
    programs: int


def choose_mlp_blocking(shape: torch.Size) -> MlpBlocking:
    """Cuts columns into as few pieces as fill the device: a piece computes the rows above and below it again."""
    n, c, h, w = shape
    block = 128 * (1 if c % 2 else 2)
    strip = choose_strip(w, (7, 8))
    strips = triton.cdiv(w, strip)
    lane_blocks = triton.cdiv(n * strips * c, block)
    block_rows = max(min(h, 4), triton.cdiv(h * lane_blocks, max(lane_blocks, PROGRAMS)))
    row_blocks = triton.cdiv(h, block_rows)
    return MlpBlocking(strip, strips, row_blocks, block_rows, block, lane_blocks * row_blocks)


def mlp_mix(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `operators.mlp_mix`."""
    n, c, h, w = f.shape
    strip, strips, row_blocks, block_rows, block, programs = choose_mlp_blocking(f.shape)
    out = torch.empty_like(f, memory_format=torch.channels_last)
    launch(
        mlp_kernel, programs, nhwc(f), pack_taps(weight, False, 0), bias.contiguous(), out,
        n, h, w, strips, row_blocks, block_rows, C=c, S=strip, BLOCK=block,
    )  # fmt: skip
    return out


def mlp_mix_backward(ds: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `operators.mlp_mix_backward`."""
    n, c, h, w = f.shape
    strip, strips, row_blocks, block_rows, block, programs = choose_mlp_blocking(f.shape)
    dz = torch.empty_like(f, memory_format=torch.channels_last)
    partial = torch.empty((n * strips * row_blocks, 10, c), device=f.device)
    launch(
        mlp_backward_kernel, programs, nhwc(f), nhwc(ds), pack_taps(weight, False, 0), bias.contiguous(), dz, partial,
        n, h, w, strips, row_blocks, block_rows, C=c, S=strip, BLOCK=block,
    )  # fmt: skip
    df = depthwise(dz, weight, PLUS_TIMES_SLOPE, ds, f)
    return df, *unpack_sums(partial.sum(0), weight, bias)
