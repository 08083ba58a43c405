"""Cuts the spatial mixing of both branches into programs of the Triton kernels, and runs them.

The cuts are functions of the shapes alone, not of timings: nothing is tuned at the start of a run, and two runs on one
GPU give the same bits. docs/kernels-gpu.md has the counts that they come from.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .launch import launch, pitch_of, with_pitch
from .mlp_kernels import mlp_backward_kernel, mlp_input_grad_kernel, mlp_kernel
from .modulation_kernels import (
    band_kernel,
    depthwise_kernel,
    depthwise_weight_kernel,
    gelu_product_kernel,
    pack_taps_kernel,
)
from .rows import Partials, sum_partials

__all__ = [
    "cuts",
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "mlp_mix",
    "mlp_mix_backward",
    "mlp_mix_grads",
    "modulate",
    "modulate_backward",
    "modulate_grads",
]

BAND_CHANNELS = 8  # 16 bytes of each pixel; one channel for each warp
MIN_BAND_PROGRAMS = 128  # about one for each multiprocessor
# `benchmark.py tune` times other values of the following. None was chosen by time yet.
BAND_PARTS = 1  # of a map's height: more programs, which compute with the K - 1 rows between two of them twice
BAND_REGISTERS = 128  # of a thread: two programs share a multiprocessor
PROGRAMS = 512  # where work can be cut at will: some for each of a hundred or so multiprocessors
# Wider ones compute GELU again less often, and take up to twice the registers and four times as long to compile.
MLP_STRIP = 4


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


def cuts(shape: torch.Size, dtype: torch.dtype, kernel_size: int) -> Hashable:
    """Returns what decides which kernels a branch runs for a map: all maps for which it is the same share them.

    Args:
        shape: of the map, (N, C, H, W).
        dtype: that the branch computes in.
        kernel_size: of the modulation's depthwise convolution.
    """
    _, c, _, w = shape
    convolution = choose_band(shape, dtype, kernel_size) or choose_blocking(c, w, kernel_size)
    return c, convolution, choose_weight_blocking(c, w, kernel_size)


def pack_taps(weight: Tensor, flip: bool, rows: int) -> Tensor:
    """Turns a weight (C, 1, K, K) into (K + 2 rows - 2, K, C) in float32, with rows of zeros around it."""
    c, _, _, k = weight.shape
    taps = torch.empty((k + 2 * rows - 2, k, c), dtype=torch.float32, device=weight.device)
    programs = triton.cdiv(taps.numel(), 1024)
    launch(pack_taps_kernel, programs, weight.contiguous(), taps, C=c, K=k, R=rows, FLIP=flip, BLOCK=1024)
    return taps


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, p: Tensor | None, out: Tensor) -> None:
    """Convolves x, (N, C, H, W), and writes what is made of it and of p to `out`.

    With a bias that is ``(sum + bias) * p``. Without it is a gradient: the weight is flipped, and ``sum * gelu'(p)``.
    Without p there is no second factor.
    """
    n, c, h, w = x.shape
    k = weight.shape[-1]
    strip, rows, block = choose_blocking(c, w, k)
    strips, row_blocks = triton.cdiv(w, strip), triton.cdiv(h, rows)
    taps = pack_taps(weight, bias is None, rows)
    what = {"FLIP": bias is None, "FACTOR": p is not None}
    x = _dense(x)
    p, p_pitch = with_pitch(x if p is None else p)
    launch(
        depthwise_kernel, triton.cdiv(n * strips * c, block) * row_blocks,
        x, taps, taps if bias is None else bias.contiguous(), p, out,
        n, h, w, strips, row_blocks, C=c, P_PITCH=p_pitch, OUT_PITCH=pitch_of(out), K=k, S=strip, R=rows,
        **what, BLOCK=block,
    )  # fmt: skip


def depthwise_weight(x: Tensor, out_grad: Tensor, weight: Tensor, bias: Tensor) -> Partials:
    """Returns the gradients of weight and bias of a depthwise convolution of x; maps in channels_last memory."""
    n, c, h, w = x.shape
    k = weight.shape[-1]
    strip, rows, groups, lanes = choose_weight_blocking(c, w, k)
    strips = triton.cdiv(w, strip)
    lane_blocks = triton.cdiv(strips * c, lanes)
    chunk_rows = max(1, triton.cdiv(n * h * lane_blocks, PROGRAMS))
    chunks = triton.cdiv(n * h, chunk_rows)
    partial = torch.empty((chunks, k * k + 1, strips, c), dtype=torch.float32, device=x.device)
    launch(
        depthwise_weight_kernel, lane_blocks * chunks, x, out_grad, partial,
        n, h, w, strips, chunks, chunk_rows, C=c, K=k, S=strip, D=rows, GROUPS=groups, LANES=lanes,
        warps=max(4, groups),
    )  # fmt: skip
    return Partials(partial, weight, bias)


def convolve_band(x: Tensor, weight: Tensor, bias: Tensor | None, p: Tensor | None, out: Tensor, band: Band) -> None:
    """As `depthwise`, on the tensor cores; of gelu(x) where there are a bias and p."""
    n, c, h, w = x.shape
    strips, image_blocks, block_rows = triton.cdiv(w, band.strip), triton.cdiv(n, 16), triton.cdiv(h, BAND_PARTS)
    what = {"FLIP": bias is None, "FACTOR": p is not None}
    (x, x_pitch), (p, p_pitch) = with_pitch(x), with_pitch(x if p is None else p)
    weight = weight.contiguous()
    launch(
        band_kernel, image_blocks * strips * (c // BAND_CHANNELS) * triton.cdiv(h, block_rows),
        x, weight, weight if bias is None else bias.contiguous(), p, out, n, h, w, strips, image_blocks, block_rows,
        C=c, X_PITCH=x_pitch, P_PITCH=p_pitch, OUT_PITCH=pitch_of(out), K=weight.shape[-1],
        S=band.strip, COLUMNS=band.columns, WINDOW=band.window, LEFT=band.left, **what,
        CHANNELS=BAND_CHANNELS, warps=BAND_CHANNELS, maxnreg=BAND_REGISTERS,
    )  # fmt: skip


def new_map(x: Tensor) -> Tensor:
    """Returns a map like x, (N, C, H, W), in channels_last memory, with nothing in it yet."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `operators.depthwise_conv2d`."""
    out = new_map(x)
    _convolve(x, weight, bias, out)
    return out


def depthwise_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `operators.depthwise_conv2d_backward`."""
    grad, dx = _dense(grad), new_map(x)
    _convolve(grad, weight, None, dx)
    (dweight, dbias), _ = sum_partials(depthwise_weight(_dense(x), grad, weight, bias))
    return dx, dweight, dbias


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    band = choose_band(x.shape, x.dtype, weight.shape[-1])
    if band:
        convolve_band(x, weight, bias, None, out, band)
    else:
        depthwise(x, weight, bias, None, out)


def context(a: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, out: Tensor, gelu_a: Tensor | None = None) -> None:
    """Writes ``(conv_dw(gelu(a)) + bias) * factor`` to `out`. Where gelu(a) is at hand, it may be given."""
    band = choose_band(a.shape, a.dtype, weight.shape[-1])
    if band:
        convolve_band(a, weight, bias, factor, out, band)
    else:  # inside, each value would need GELU ten times
        depthwise(F.gelu(a) if gelu_a is None else gelu_a, weight, bias, factor, out)


def modulate(a: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
    """See `operators.modulate`. Both maps may be halves of a wider one."""
    out = new_map(a)
    context(a, weight, bias, v, out)
    return out


def modulate_backward(
    dm: Tensor, a: Tensor, weight: Tensor, bias: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `operators.modulate_backward`."""
    da, dv = new_map(a), new_map(v)
    (dweight, dbias), _ = sum_partials(modulate_grads(dm, a, weight, bias, v, da, dv))
    return da, dweight, dbias, dv


def modulate_grads(dm: Tensor, a: Tensor, weight: Tensor, bias: Tensor, v: Tensor, da: Tensor, dv: Tensor) -> Partials:
    """Computes the gradients of `modulate`. The convolution is computed again: keeping it would cost a map.

    Args:
        dm, a, weight, bias, v: as in `operators.modulate_backward`; a and v may be halves of a wider map.
        da, dv: for the gradients of a and v; they may be halves of a wider map.

    Returns:
        Those of weight and bias.
    """
    gelu_a, dc = gelu_and_product(a, dm, v)
    band = choose_band(a.shape, a.dtype, weight.shape[-1])
    if band:
        convolve_band(dc, weight, None, a, da, band)
    else:
        depthwise(dc, weight, None, a, da)
    context(a, weight, bias, dm, dv, gelu_a)
    return depthwise_weight(gelu_a, dc, weight, bias)


def gelu_and_product(a: Tensor, grad: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns gelu(a) and grad * v."""
    n, c, h, w = a.shape
    (a, a_pitch), (grad, grad_pitch), (v, v_pitch) = with_pitch(a), with_pitch(grad), with_pitch(v)
    gelu_a, product = new_map(a), new_map(a)
    launch(
        gelu_product_kernel, triton.cdiv(a.numel(), 1024), a, grad, v, gelu_a, product, n * h * w,
        C=c, A_PITCH=a_pitch, G_PITCH=grad_pitch, V_PITCH=v_pitch, BLOCK=1024,
    )  # fmt: skip
    return gelu_a, product


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
    strips = triton.cdiv(w, MLP_STRIP)
    lane_blocks = triton.cdiv(n * strips * c, block)
    block_rows = max(min(h, 4), triton.cdiv(h * lane_blocks, max(lane_blocks, PROGRAMS)))
    row_blocks = triton.cdiv(h, block_rows)
    return MlpBlocking(MLP_STRIP, strips, row_blocks, block_rows, block, lane_blocks * row_blocks)


def mlp_mix(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `operators.mlp_mix`."""
    n, c, h, w = f.shape
    strip, strips, row_blocks, block_rows, block, programs = choose_mlp_blocking(f.shape)
    out = new_map(f)
    launch(
        mlp_kernel, programs, _dense(f), weight.contiguous(), bias.contiguous(), out,
        n, h, w, strips, row_blocks, block_rows, C=c, S=strip, BLOCK=block,
    )  # fmt: skip
    return out


def mlp_mix_backward(ds: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `operators.mlp_mix_backward`."""
    df, partials = mlp_mix_grads(ds, f, weight, bias)
    (dweight, dbias, _), _ = sum_partials(partials)
    return df, dweight, dbias


def mlp_mix_grads(ds: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Partials]:
    """Returns the gradients of `mlp_mix`: of f, and of weight and bias, with the sums of the first in the last row."""
    n, c, h, w = f.shape
    strip, strips, row_blocks, block_rows, block, programs = choose_mlp_blocking(f.shape)
    ds, f, weight = _dense(ds), _dense(f), weight.contiguous()
    dz, df = new_map(f), new_map(f)
    partial = torch.empty((n * strips * row_blocks, 11, 1, c), dtype=torch.float32, device=f.device)
    sizes = (n, h, w, strips, row_blocks, block_rows)
    blocking = {"C": c, "S": strip, "BLOCK": block}
    # with a few registers more than 128 a multiprocessor would have three programs instead of four
    cap = {"maxnreg": 128} if strip <= 4 else {}
    launch(mlp_backward_kernel, programs, f, ds, weight, bias.contiguous(), dz, partial, *sizes, **blocking, **cap)
    launch(mlp_input_grad_kernel, programs, dz, ds, f, weight, df, partial, *sizes, **blocking)
    return df, Partials(partial, weight, bias)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
