"""Functions that several Triton kernels are made of.

All maps are (N, C, H, W) with the channels of a pixel close together: from a pixel to the next there are C numbers, or
another *pitch* where a map is a half of a wider one. For most kernels a *lane* is one channel of one strip of S
neighbouring columns of one image, and a thread has a lane or two: it keeps the sums of the strip in registers, a loaded
value goes into up to K of them, and neighbouring threads read neighbouring channels.
"""

# mypy: ignore-errors
# What stands in a kernel is Triton's language, not Python: its types are those of registers.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "find_lane",
    "find_row",
    "gelu",
    "gelu_slope",
    "load_column",
    "load_columns",
    "load_raw",
    "wide",
    "width_of",
    "zeros",
]


@triton.jit
def lower_tail(t):
    """The standard normal distribution below -t, for t >= 0.

    2 to the power of a polynomial of t, fitted to log2(erfc(t / sqrt(2)) / 2) on [0, 6]; farther out it falls faster
    than the distribution does. The error is at most 1.6e-7, and 8.4e-5 of the value down to t = 6. That is half the
    instructions of erf, and small values are not the difference of two large ones.
    """
    power = -5.337051e-07
    power = power * t + 9.3745425e-06
    power = power * t - 3.1829386e-05
    power = power * t - 5.359618e-04
    power = power * t + 7.6117398e-03
    power = power * t - 5.2885725e-02
    power = power * t - 4.5908114e-01
    power = power * t - 1.1511189
    power = power * t - 1.0
    return tl.exp2(power)


@triton.jit
def gelu(x):
    """Exact GELU, x * Phi(x), as relu(x) - |x| * Phi(-|x|)."""
    t = tl.abs(x)
    return tl.maximum(x, 0.0) - t * lower_tail(t)


@triton.jit
def gelu_slope(x):
    """The derivative of GELU, Phi(x) + x * phi(x)."""
    tail = lower_tail(tl.abs(x))
    density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
    return tl.where(x < 0.0, tail, 1.0 - tail) + x * density


@triton.jit
def find_lane(block, N, strips, C: tl.constexpr, BLOCK: tl.constexpr):
    """Returns of BLOCK lanes: which exist, image, strip and channel."""
    lane = block * BLOCK + tl.arange(0, BLOCK)
    return lane < N * strips * C, lane // (strips * C), lane // C % strips, lane % C


@triton.jit
def find_row(image, channel, column, H, W, PITCH: tl.constexpr):
    """Returns where row 0 of an image begins, at a channel and a column."""
    return image.to(tl.int64) * H * (W * PITCH) + column * PITCH + channel


@triton.jit
def load_raw(row_ptr, mask, column, W, AT: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    """Loads COUNT neighbouring columns, the first AT columns right of `column`, as a tuple; outside the map they are 0.

    `row_ptr` points to `column`. Values are as they are in memory: nothing waits for them before they are used, so that
    a row can be loaded a step ahead.
    """
    values = ()
    for t in tl.static_range(COUNT):
        inside = mask & (column + (AT + t) >= 0) & (column + (AT + t) < W)
        values += (tl.load(row_ptr + (AT + t) * C, mask=inside, other=0.0),)
    return values


@triton.jit
def wide(raw):
    """Converts a tuple of values to float32."""
    values = ()
    for t in tl.static_range(len(raw)):
        values += (raw[t].to(tl.float32),)
    return values


@triton.jit
def load_columns(row_ptr, mask, column, W, AT: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    """As `load_raw`, in float32."""
    return wide(load_raw(row_ptr, mask, column, W, AT, COUNT, C))


@triton.jit
def load_column(row_ptr, mask, column, W, AT: tl.constexpr, C: tl.constexpr):
    """As `load_columns`, one column and no tuple."""
    return load_columns(row_ptr, mask, column, W, AT, 1, C)[0]


@triton.jit
def width_of(row, H, W):
    """The columns that a row has: none above and below the map."""
    return tl.where((row >= 0) & (row < H), W, 0)


@triton.jit
def zeros(COUNT: tl.constexpr, shape: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values += (tl.zeros(shape, tl.float32),)
    return values
