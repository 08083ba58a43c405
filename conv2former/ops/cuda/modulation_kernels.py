"""The Triton kernels of the modulation's spatial mixing; `mixing.py` cuts the work and runs them.

Weights are as PyTorch has them, (C, 1, K, K), unless it is said otherwise. Sums are in float32 for every type of map,
and nothing is added by atomics: the same input gives the same bits. docs/kernels-gpu.md says why the kernels are cut as
they are.
"""

# mypy: ignore-errors
# What stands in a kernel is Triton's language, not Python: its types are those of registers.

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import find_lane, find_row, gelu, gelu_slope, load_column, load_columns, width_of, zeros

__all__ = [
    "band_kernel",
    "depthwise_kernel",
    "depthwise_weight_kernel",
    "gelu_product_kernel",
    "pack_taps_kernel",
]

# A map of another size and another batch run the kernels that are compiled; other channels and types compile new ones.
SIZES = ["N", "H", "W", "strips", "row_blocks", "image_blocks", "chunks", "chunk_rows", "block_rows", "pixels"]


@triton.jit
def pack_taps_kernel(weight_ptr, taps_ptr, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, FLIP: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Writes a weight as `depthwise_kernel` reads it, (K + 2 R - 2, K, C) in float32, for BLOCK numbers."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = at // (K * C) - (R - 1)
    tap = row * K + at // C % K
    if FLIP:
        tap = K * K - 1 - tap
    value = tl.load(weight_ptr + at % C * (K * K) + tap, mask=(row >= 0) & (row < K), other=0.0)
    tl.store(taps_ptr + at, value, mask=at < (K + 2 * R - 2) * K * C)


@triton.jit(do_not_specialize=SIZES)
def gelu_product_kernel(
    a_ptr, grad_ptr, v_ptr, gelu_ptr, product_ptr, pixels,
    C: tl.constexpr, A_PITCH: tl.constexpr, G_PITCH: tl.constexpr, V_PITCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes gelu(a) and grad * v, for BLOCK numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < pixels.to(tl.int64) * C
    pixel = at // C
    channel = at % C
    a = tl.load(a_ptr + pixel * A_PITCH + channel, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + pixel * G_PITCH + channel, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + pixel * V_PITCH + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(gelu_ptr + at, gelu(a), mask=mask)
    tl.store(product_ptr + at, grad * v, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def depthwise_kernel(
    x_ptr, taps_ptr, bias_ptr, p_ptr, out_ptr, N, H, W, strips, row_blocks,
    C: tl.constexpr, P_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, K: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    FLIP: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A K x K depthwise convolution of x, for R rows of BLOCK lanes, and what is left to do with the sums.

    That is ``(sum + bias) * p``, or for a gradient (FLIP) ``sum * gelu'(p)``; without a FACTOR there is no p.

    A lane has R x S sums in registers. Each row of x comes once, a column at a time:

        row i of x      | S - 1 + K columns, of which S are a window that slides right  |
        tap dx of row i - first - r + P of the weight, loaded for each r and dx:
                        window[s + dx] * tap  ->  sums[r, s]    R S multiply-adds for R + 1 loads

    The weight is (K + 2 R - 2, K, C), with R - 1 rows of zeros on either side: row i of x meets the R rows of the
    result with R different rows of the weight, of which the first and the last may be none.
    """
    P: tl.constexpr = K // 2
    row_size = W.to(tl.int64) * C
    # Neighbouring programs share rows of x: at the same time, so that the second finds them in the cache.
    first = (tl.program_id(0) % row_blocks) * R
    mask, image, strip, channel = find_lane(tl.program_id(0) // row_blocks, N, strips, C, BLOCK)
    column = strip * S
    start = find_row(image, channel, column, H, W, C)
    sums = zeros(R * S, (BLOCK,))
    for i in range(tl.maximum(first - P, 0), tl.minimum(first + R + P, H)):
        row_ptr = x_ptr + start + i * row_size
        row_taps_ptr = taps_ptr + channel + (i - first + P + R - 1) * (K * C)
        window = load_columns(row_ptr, mask, column, W, -P, S - 1, C)
        for dx in tl.static_range(K):
            window += (load_column(row_ptr, mask, column, W, dx + S - 1 - P, C),)
            added = ()
            for r in tl.static_range(R):
                tap = tl.load(row_taps_ptr + (dx - r * K) * C)
                for s in tl.static_range(S):
                    added += (sums[r * S + s] + window[dx + s] * tap,)
            sums = added

    bias = tl.zeros((BLOCK,), tl.float32)
    if not FLIP:
        bias = tl.load(bias_ptr + channel).to(tl.float32)
    p_ptr += find_row(image, channel, column, H, W, P_PITCH)
    out_ptr += find_row(image, channel, column, H, W, OUT_PITCH)
    for r in tl.static_range(R):
        pixels_before = (first + r) * W.to(tl.int64)
        width = width_of(first + r, H, W)
        for s in tl.static_range(S):
            out = sums[r * S + s] + bias
            if FACTOR:
                p = load_column(p_ptr + pixels_before * P_PITCH, mask, column, width, s, P_PITCH)
                out = out * gelu_slope(p) if FLIP else out * p
            tl.store(out_ptr + (pixels_before + s) * OUT_PITCH, out, mask=mask & (column + s < width))


@triton.jit(do_not_specialize=SIZES)
def band_kernel(
    x_ptr, weight_ptr, bias_ptr, p_ptr, out_ptr, N, H, W, strips, image_blocks, block_rows,
    C: tl.constexpr, X_PITCH: tl.constexpr, P_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, LEFT: tl.constexpr, FLIP: tl.constexpr,
    FACTOR: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A K x K depthwise convolution of gelu(x) or x for 16-bit types, as matrix products, and its epilogue.

    For one channel, a row of the weight takes the WINDOW columns of a row of x to COLUMNS columns of the result, S of
    which count: a matrix with a band of K diagonals. A warp has a channel of 16 images. It goes down the rows of x that
    `block_rows` rows of the result need and multiplies each, (16, WINDOW), by K bands, to K rows of the result at once,
    of which one is then complete.

        row i of x                            rows of the result, in registers
        16 images x WINDOW columns  x band 0        -> row i - P   complete: epilogue, written
                                    x band 1        -> row i - P + 1
                                    ...
                                    x band K - 1    -> row i + P   begins

    The weight is rounded to x's type; for a gradient, FLIP, it is flipped. GELU is for `(sum + bias) * p` alone.
    """
    P: tl.constexpr = K // 2
    row_size = W.to(tl.int64)  # in pixels
    block = tl.program_id(0)  # neighbours share cache lines: the channels of the same pixels
    channel = block % (C // CHANNELS) * CHANNELS + tl.arange(0, CHANNELS)[:, None, None]
    image = block // (C // CHANNELS) % image_blocks * 16 + tl.arange(0, 16)[None, :, None]
    piece = block // (C // CHANNELS) // image_blocks
    first = piece % strips * S
    first_row = piece // strips * block_rows
    at = tl.arange(0, WINDOW)
    to = tl.arange(0, COLUMNS)
    dx = at[None, :, None] - to[None, None, :] + (P - LEFT)
    in_band = (dx >= 0) & (dx < K)
    bands = ()
    for dy in tl.static_range(K):
        tap = dy * K + dx
        if FLIP:
            tap = K * K - 1 - tap
        band = tl.load(weight_ptr + channel * (K * K) + tap, mask=in_band, other=0.0)
        bands += (band.to(x_ptr.dtype.element_ty),)
    bias = tl.zeros((CHANNELS, 1, 1), tl.float32)
    if not FLIP:
        bias = tl.load(bias_ptr + channel).to(tl.float32)

    column = first - LEFT + at[None, None, :]
    x_ptr += find_row(image, channel, column, H, W, X_PITCH)
    x_mask = (image < N) & (column >= 0)
    to_column = first + to[None, None, :]
    p_ptr += find_row(image, channel, to_column, H, W, P_PITCH)
    out_ptr += find_row(image, channel, to_column, H, W, OUT_PITCH)
    to_mask = (image < N) & (to < S)[None, None, :]
    sums = zeros(K, (CHANNELS, 16, COLUMNS))  # of rows i - P to i + P
    begin, end = tl.maximum(first_row - P, 0), tl.minimum(first_row + block_rows, H)
    # Both maps are read a step before they are used: the products hide the waiting. The first row of p is for K > 1.
    p_ahead = tl.zeros((CHANNELS, 16, COLUMNS), p_ptr.dtype.element_ty)
    ahead = tl.load(x_ptr + begin * row_size * X_PITCH, mask=x_mask & (column < width_of(begin, H, W)), other=0.0)
    for i in range(begin, end + P):
        x = ahead
        ahead = tl.load(x_ptr + (i + 1) * row_size * X_PITCH, mask=x_mask & (column < width_of(i + 1, H, W)), other=0.0)
        if FACTOR and not FLIP:
            x = gelu(x.to(tl.float32)).to(x.dtype)
        row = i - P
        p = p_ahead.to(tl.float32)
        if FACTOR:
            p_mask = to_mask & (to_column < tl.where((row + 1 >= first_row) & (row + 1 < end), W, 0))
            p_ahead = tl.load(p_ptr + (row + 1) * row_size * P_PITCH, mask=p_mask, other=0.0)
        out = tl.dot(x, bands[K - 1], sums[0]) + bias
        if FACTOR:
            out = out * gelu_slope(p) if FLIP else out * p
        out_mask = to_mask & (to_column < tl.where(row >= first_row, W, 0))
        tl.store(out_ptr + row * row_size * OUT_PITCH, out.to(x.dtype), mask=out_mask)
        added = ()
        for j in tl.static_range(1, K):
            added += (tl.dot(x, bands[K - 1 - j], sums[j]),)
        added += (tl.zeros((CHANNELS, 16, COLUMNS), tl.float32),)
        sums = added


@triton.jit(do_not_specialize=SIZES)
def depthwise_weight_kernel(
    x_ptr, out_grad_ptr, partial_ptr, N, H, W, strips, chunks, chunk_rows,
    C: tl.constexpr, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradients of a depthwise convolution's weight and bias, from `chunk_rows` rows of x among those of all images.

    Group g of the threads has the rows D g to D g + D - 1 of the weight's gradient, K sums for each; all groups read
    the same row of x and neighbouring rows of the other map, each of them from memory once. Here a lane is a channel
    of a strip of any image. Writes (K K + 1, strips, C) sums for each chunk, the bias's last.

        row i of x, S - 1 + K columns      row i + P - dy of out_grad, S columns
             window[s + dx]             x       grads[dy, s]                   -> sums[dy, dx], added over s and i
        group 0: dy = 0 ... D - 1 | group 1: dy = D ... 2 D - 1 | ...            D K sums for each channel of a thread
    """
    P: tl.constexpr = K // 2
    row_size = W.to(tl.int64) * C
    chunk = tl.program_id(0) % chunks
    lane = (tl.program_id(0) // chunks) * LANES + tl.arange(0, LANES)[None, :]
    dy = tl.arange(0, GROUPS)[:, None] * D
    lane, dy = tl.broadcast(lane, dy)
    column = lane // C * S
    mask = lane < strips * C
    start = column * C + lane % C

    sums = zeros(D * K, (GROUPS, LANES))
    bias_sum = tl.zeros((GROUPS, LANES), tl.float32)  # by the middle row of the weight, which meets every row of x
    for row in range(chunk * chunk_rows, tl.minimum(chunk * chunk_rows + chunk_rows, N * H)):
        grads = ()
        for d in tl.static_range(D):
            shift = P - d - dy
            row_mask = mask & (row % H + shift >= 0) & (row % H + shift < H)
            grads += load_columns(out_grad_ptr + start + (row + shift) * row_size, row_mask, column, W, 0, S, C)
        for s in tl.static_range(S):
            bias_sum += grads[P % D * S + s]
        window = load_columns(x_ptr + start + row * row_size, mask, column, W, -P, S - 1 + K, C)
        added = ()
        for d in tl.static_range(D):
            for dx in tl.static_range(K):
                total = sums[d * K + dx]
                for s in tl.static_range(S):
                    total += grads[d * S + s] * window[dx + s]
                added += (total,)
        sums = added

    partial_ptr += chunk.to(tl.int64) * (K * K + 1) * strips * C + lane
    for d in tl.static_range(D):
        for dx in tl.static_range(K):
            at = ((dy + d) * K + dx) * strips * C
            tl.store(partial_ptr + at, sums[d * K + dx], mask=mask & (dy + d < K))
    tl.store(partial_ptr + K * K * strips * C, bias_sum, mask=mask & (dy == P // D * D))
